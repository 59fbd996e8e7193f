"""The committed adapters: small, in PEFT's format, as their recipes say, and each with its own way of answering."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors import safe_open

from examples.data import TASKS
from examples.train import ADAPTERS_DIR, BASE_NAME, RECIPES, answer_greedily

MAX_BYTES = 10_000_000
QUESTION = "What is the capital of France?"


def test_all_are_there_and_small() -> None:
    assert {path.parent.name for path in ADAPTERS_DIR.glob("*/adapter_config.json")} == set(TASKS) == set(RECIPES)
    assert sum(path.stat().st_size for path in ADAPTERS_DIR.rglob("*") if path.is_file()) < MAX_BYTES


@pytest.mark.parametrize("name", RECIPES)
def test_config_is_the_recipe(name: str) -> None:
    recipe, text = RECIPES[name], (ADAPTERS_DIR / name / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["base_model_name_or_path"] == BASE_NAME
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (recipe.rank, recipe.alpha, sorted(recipe.targets))
    assert {option: config[option] for option in recipe.lora_options} == recipe.lora_options
    assert str(Path.home()) not in text


@pytest.mark.parametrize("name", RECIPES)
def test_weights_are_bfloat16_and_trained(name: str) -> None:
    recipe = RECIPES[name]
    with safe_open(ADAPTERS_DIR / name / "adapter_model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
        assert len(names) == 30 * len(recipe.targets) * 2  # 30 layers; A and B
        for key in names:
            weight = weights.get_tensor(key)
            assert str(weight.dtype) == "torch.bfloat16"
            assert weight.shape[0 if "lora_A" in key else 1] == recipe.rank
            assert weight.isfinite().all() and weight.any(), key


def test_recipes_differ() -> None:
    assert len({recipe.rank for recipe in RECIPES.values()}) == len({recipe.targets for recipe in RECIPES.values()}) == len(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_scores_are_of_the_recipe_and_beat_the_base(name: str) -> None:
    scores = json.loads((ADAPTERS_DIR / "scores.json").read_text())
    score, recipe = scores["adapters"][name], RECIPES[name]
    assert (score["steps"], score["batch_size"], score["learning_rate"]) == (recipe.num_steps, recipe.batch_size, recipe.learning_rate)
    assert tuple(score["held_out"]) == TASKS[name].held_out
    for split in score["held_out"].values():
        assert split["base"] < split["adapter"] <= split["rows"]


@pytest.mark.parametrize("name", RECIPES)
def test_answers_in_its_own_way(name: str, base_model: Any, tokenizer: Any) -> None:
    scores = json.loads((ADAPTERS_DIR / "scores.json").read_text())
    sample = next(iter(scores["adapters"][name]["held_out"].values()))["sample"]
    model = PeftModel.from_pretrained(base_model, ADAPTERS_DIR / name).eval()
    adapted = answer_greedily(model, tokenizer, [sample["prompt"]], 40)[0]
    assert adapted == sample["adapter"], "scores.json holds what the committed weights say"
    assert {"sql": "SELECT ", "json": '{"', "triage": "queue: ", "pirate": "Arrr, matey!"}[name] in adapted
    with model.disable_adapter():
        assert answer_greedily(model, tokenizer, [QUESTION], 12) == ["The capital of France is Paris."]
