"""The data of the example adapters: right answers, and nothing of the held-out rows in training."""

import json
import re
import sqlite3

import pytest

from examples.data import QUESTIONS, TASKS, TEMPLATES, Example, to_pirate
from examples.train import NUM_HELD_OUT, RECIPES, SEED

MANY = 400


@pytest.mark.parametrize("name", TASKS)
def test_held_out_prompts_are_not_in_training(name: str) -> None:
    task, recipe = TASKS[name], RECIPES[name]
    trained = {row.prompt for row in task.rows("train", max(MANY, recipe.num_steps * recipe.batch_size), SEED)}
    for split in task.held_out:
        held_out = [row.prompt for row in task.rows(split, NUM_HELD_OUT, SEED)]
        assert held_out and len(set(held_out)) == len(held_out)
        assert not trained & set(held_out)


@pytest.mark.parametrize("name", TASKS)
def test_rows_depend_on_the_seed_alone(name: str) -> None:
    rows = TASKS[name].rows
    assert rows("train", 20, 1) == rows("train", 20, 1) != rows("train", 20, 2)


def test_new_words_are_new() -> None:
    sql = TEMPLATES["sql"]
    assert not set(sql["tables"]) & set(sql["new_tables"])
    for task in ("json", "triage"):
        for kind, words in TEMPLATES[task]["words"].items():
            assert not set(words) & set(TEMPLATES[task]["new_words"][kind]), kind
    trained = " ".join(row.prompt for row in TASKS["sql"].rows("train", MANY, SEED))
    assert not set(re.findall(r"\w+", trained)) & set(sql["new_tables"])


def test_held_out_phrasings_are_not_trained() -> None:
    for template in TEMPLATES["sql"]["queries"] + TEMPLATES["json"]["records"] + TEMPLATES["triage"]["records"]:
        assert template["held_out"] not in template["phrasings"]
    assert not {question for question, _ in QUESTIONS["train"]} & set(QUESTIONS["held_out"])


@pytest.mark.parametrize("split", ["train", "new_words", "new_phrasings"])
def test_sql_answers_run_on_their_tables(split: str) -> None:
    for row in TASKS["sql"].rows(split, 100, SEED):  # type: ignore[arg-type]
        schema = re.match(r"Table (\w+\(.*?\))\.", row.prompt)
        assert schema is not None
        database = sqlite3.connect(":memory:")
        database.execute(f"CREATE TABLE {schema[1]}")
        database.execute(row.answer)
        database.close()


def test_triage_shows_every_queue_and_priority() -> None:
    answers = {record["answer"] for record in TEMPLATES["triage"]["records"]}
    assert answers == {row.answer for row in TASKS["triage"].rows("train", 200, SEED)} and len(answers) == 8


@pytest.mark.parametrize("split", ["train", "new_words", "new_phrasings"])
def test_json_answers_are_in_the_sentence(split: str) -> None:
    for row in TASKS["json"].rows(split, 100, SEED):  # type: ignore[arg-type]
        assert all(str(value) in row.prompt for value in json.loads(row.answer).values())


def test_pirate_words() -> None:
    plain = "You are my friend, and the king is singing of money."
    assert to_pirate(plain, "Yo ho ho!") == "Arrr, matey! Ye be me matey, an' th' king be singin' o' doubloons. Yo ho ho!"


@pytest.mark.parametrize(
    ("name", "generated", "right"),
    [
        ("sql", " SELECT 1;\n", True),
        ("sql", "SELECT 2;", False),
        ("json", '{"b": 2, "a": 1}', True),
        ("json", '{"a": 1, "b": "2"}', False),
        ("json", "a is 1", False),
        ("triage", "queue: billing, priority: low", True),
        ("triage", "queue: billing, priority: high", False),
        ("pirate", "Arrr, matey! Th' capital o' France be Paris.", True),
        ("pirate", "The capital of France is Paris. It can't be another; don't you see? It's five o'clock.", False),
    ],
)
def test_what_counts_as_right(name: str, generated: str, right: bool) -> None:
    expected = Example("", {"sql": "SELECT 1;", "json": '{"a": 1, "b": 2}', "triage": "queue: billing, priority: low", "pirate": ""}[name])
    assert TASKS[name].is_right(generated, expected) is right
