"""Targets are PEFT's: the same modules, ranks and alphas, whatever the config says."""

import time
from types import SimpleNamespace

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from server.adapters import match
from server.adapters.config import parse_config
from server.adapters.match import PatternValue, resolve_targets
from server.errors import AdapterRefused
from server.types import BaseLayout, Module
from tests.server.adapters.layouts import describe, gpt2, llama, tied_llama

LAYOUT = describe(llama())
NAMES = [module.name for module in LAYOUT.modules]

_suffixes = st.sampled_from(
    ["q_proj", "proj", "self_attn.v_proj", "model.layers.0.mlp.up_proj", "lm_head", "embed_tokens", "norm", "1", "x"]
)
_patterns = st.sampled_from([".*", r".*\.q_proj", "model.layers.1.*", r".*(gate|up)_proj", "q_proj", ".*norm", r".*\.(0|1)\.mlp"])


def targets(**config):
    return resolve_targets(parse_config({"peft_type": "LORA", "target_modules": ["q_proj"], **config}), LAYOUT)


@settings(max_examples=150, deadline=None)
@given(
    target_modules=st.one_of(st.lists(_suffixes, min_size=1), _patterns),
    exclude_modules=st.one_of(st.none(), st.lists(_suffixes), _patterns),
    modules_to_save=st.one_of(st.none(), st.lists(st.sampled_from(["mlp", "norm", "layers.1", "v_proj", "lm_head"]))),
    layers=st.one_of(st.none(), st.integers(-1, 2), st.lists(st.integers(0, 2))),
    layers_pattern=st.sampled_from([None, [], "", "layers", ["h", "layers"], "self_attn", ["h"]]),
)
def test_targets_are_pefts(target_modules, exclude_modules, modules_to_save, layers, layers_pattern):
    config = {"target_modules": target_modules, "exclude_modules": exclude_modules, "modules_to_save": modules_to_save}
    if isinstance(target_modules, list) and layers is not None:
        config |= {"layers_to_transform": layers, "layers_pattern": layers_pattern}
    theirs = peft.LoraConfig(**config)
    expected = {name for name in NAMES if check_target_module_exists(theirs, name)}
    assert targets(**config).lora == expected


@settings(max_examples=100, deadline=None)
@given(
    patterns=st.dictionaries(
        st.sampled_from(["q_proj", "layers.1.*", "layers.1.mlp.up_proj", "^model.*k_proj", "self_attn.(q|v)_proj", "o", "proj"]),
        st.integers(1, 9),
    ),
    name=st.sampled_from(NAMES),
)
def test_pattern_values_are_pefts(patterns, name):
    assert PatternValue("rank_pattern", patterns, 77).of(name) == patterns.get(get_pattern_key(patterns.keys(), name), 77)


@pytest.mark.parametrize("base", [llama, tied_llama, gpt2])
def test_all_linear_is_pefts(base):
    layout = describe(base())
    model = peft.get_peft_model(base(), peft.LoraConfig(target_modules="all-linear", fan_in_fan_out=base is gpt2))
    found = resolve_targets(parse_config({"peft_type": "LORA", "target_modules": "All-Linear"}), layout)
    assert found.lora == set(model.targeted_module_names) and layout.head not in found.lora


def test_saved_modules_match_by_the_end_of_the_name_as_in_peft():
    found = targets(modules_to_save=["norm"])
    assert found.saved == {name for name in NAMES if name.endswith("norm")} and len(found.saved) == 5
    assert targets(modules_to_save=["mlp"]).saves("model.layers.1.mlp.up_proj")


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize(
    "pattern", ["(", "[a-", "(?P<x", "*", "a{1001}", "((a{100}){100}){100}", "a{9,1000000000}", "(?:q){e<=2}", "(" * 4000]
)
def test_invalid_pattern_is_refused_by_field(name, pattern):
    with pytest.raises(AdapterRefused, match=name):
        targets(**{name: pattern})


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern"])
def test_catastrophic_pattern_is_refused_in_time(name, monkeypatch):
    monkeypatch.setattr(match, "MATCH_SECONDS", 0.2)
    layout = BaseLayout("", "x", 1, 1, 1, False, "e", "h", "float32", [], [Module("layers.0." + "a" * 60 + "!.q_proj", "Linear", {})])
    pattern = ".*(a|aa)+b"
    started_at = time.monotonic()
    with pytest.raises(AdapterRefused, match=f"{name} takes too long"):
        if name == "rank_pattern":
            PatternValue(name, {pattern: 1}, 1).of(layout.modules[0].name)
        value = [pattern] if name == "modules_to_save" else pattern
        extra = {"layers_to_transform": [0]} if name == "layers_pattern" else {}
        resolve_targets(parse_config({"peft_type": "LORA", "target_modules": ["q_proj"], name: value, **extra}), layout)
    assert time.monotonic() - started_at < 2


def test_tokens_of_another_module_are_refused():
    with pytest.raises(AdapterRefused, match="trainable_token_indices.*'up_proj'"):
        targets(trainable_token_indices={"up_proj": [1]})


def test_tied_tokens_that_differ_are_refused_where_tying_is_demanded():
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], "ensure_weight_tying": True}
    config["trainable_token_indices"] = {"embed_tokens": [1], "lm_head": [2]}
    with pytest.raises(AdapterRefused, match="trainable_token_indices differ"):
        resolve_targets(parse_config(config), describe(tied_llama()))


def test_layout_without_the_linear_as_a_site_still_has_it_targeted():
    """all-linear on a linear that the engine cannot patch must lead to a refusal, not to silence."""
    layout = SimpleNamespace(modules=[Module("x.y", "Linear", {})], sites=[], head="lm_head", embedding="e", tied_head=False)
    assert resolve_targets(parse_config({"peft_type": "LORA", "target_modules": "all-linear"}), layout).lora == {"x.y"}
