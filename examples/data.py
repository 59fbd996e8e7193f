"""The data of the example adapters: text to SQL, JSON extraction, support triage, and pirate speech. Filled into the templates beside it.

Owns the rows and what counts as a right answer. It does not know models or tokenizers; `examples.train` and its tests call it.
Three splits: "train"; "new_words", the training phrasings around words (tables, people, goods) that training never shows; and
"new_phrasings", sentences of another build around the training words. Pirate has no words to swap: its held-out rows are new questions.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "new_words", "new_phrasings"]


@dataclass(frozen=True)
class Example:
    """A user's message and the assistant's answer. `answer` is empty where no single text is the right one (held-out pirate rows)."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """One adapter's data: `rows(split, count, seed)` gives distinct rows, `is_right(generated, example)` judges an answer."""

    name: str
    metric: str
    held_out: tuple[Split, ...]
    rows: Callable[[Split, int, int], list[Example]]
    is_right: Callable[[str, Example], bool]


TEMPLATES = json.loads(Path(__file__).with_name("templates.json").read_text(encoding="utf-8"))
QUESTIONS = json.loads(Path(__file__).with_name("pirate.json").read_text(encoding="utf-8"))


def sql_rows(split: Split, count: int, seed: int) -> list[Example]:
    """`Table t(columns). Question` -> one SELECT."""
    templates = TEMPLATES["sql"]
    tables = templates["new_tables" if split == "new_words" else "tables"]

    def draw(rng: random.Random) -> Example:
        table, columns = rng.choice(list(tables.items()))
        query = rng.choice(templates["queries"])
        number, word = (rng.choice([column for column in columns if column in templates[kind]]) for kind in ("numbers", "words"))
        value = rng.choice(templates["words"][word]) if "{word}" in query["sql"] else rng.randint(*templates["numbers"][number])
        fill = {"table": table, "column": rng.choice(columns), "number": number, "word": word, "value": value}
        question = _phrasing(rng, query, split).format_map(fill)
        return Example(f"Table {table}({', '.join(columns)}). {question}", query["sql"].format_map(fill))

    return _distinct(draw, split, count, seed)


def json_rows(split: Split, count: int, seed: int) -> list[Example]:
    """A sentence -> its facts as one JSON object, keys in a fixed order."""
    templates = TEMPLATES["json"]
    words = templates["new_words" if split == "new_words" else "words"]

    def draw(rng: random.Random) -> Example:
        fill: dict[str, Any] = {kind: rng.choice(options) for kind, options in words.items()}
        fill |= {
            "name": f"{fill['first']} {fill['last']}",
            "a_job": f"{'an' if fill['job'][0] in 'aeiou' else 'a'} {fill['job']}",
            "age": rng.randint(18, 80),
            "quantity": rng.randint(2, 60),
            "price": rng.randint(5, 900),
            "hour": f"{rng.randint(8, 18)}:{rng.choice(['00', '15', '30', '45'])}",
        }
        record = rng.choice(templates["records"])
        answer = json.dumps({key: fill[key] for key in record["keys"]})
        return Example(_phrasing(rng, record, split).format_map(fill), answer)

    return _distinct(draw, split, count, seed)


def triage_rows(split: Split, count: int, seed: int) -> list[Example]:
    """A customer's message -> the queue that it belongs into, and how much it hurries."""
    templates = TEMPLATES["triage"]
    words = templates["new_words" if split == "new_words" else "words"]

    def draw(rng: random.Random) -> Example:
        fill = {kind: rng.choice(options) for kind, options in words.items()}
        record = rng.choice(templates["records"])
        return Example(_phrasing(rng, record, split).format_map(fill), record["answer"])

    return _distinct(draw, split, count, seed)


PIRATE_WORDS = {
    "you": "ye", "your": "yer", "my": "me", "is": "be", "are": "be", "friend": "matey", "the": "th'", "and": "an'", "of": "o'",
    "hello": "ahoy", "money": "doubloons", "coins": "doubloons", "to": "t'", "for": "fer",
}  # fmt: skip
CLOSINGS = ["Yo ho ho!", "Shiver me timbers!", "Aye, that be th' truth!"]
PIRATE_MARKS = re.compile(
    r"\b(?:arrr|matey|ye|yer|be|fer|yo ho ho|shiver me|aye|ahoy)\b|\b(?:th|o|an|t)'(?= )|\w{3}in'(?= )", re.IGNORECASE
)
PIRATE_MARKS_NEEDED = 3


def to_pirate(text: str, closing: str) -> str:
    """Plain English in a pirate's words: word by word, -ing to -in', between the greeting and a closing."""

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        new = PIRATE_WORDS.get(word.lower())
        if new is None:
            return word[:-1] + "'" if len(word) > 5 and word.endswith("ing") else word
        return new.capitalize() if word[0].isupper() else new

    return f"Arrr, matey! {re.sub(r'[A-Za-z]+', swap, text)} {closing}"


def pirate_rows(split: Split, count: int, seed: int) -> list[Example]:
    """A question -> its answer as a pirate gives it. Training repeats questions with other closings; held-out rows have no answer."""
    if split != "train":
        return [Example(question, "") for question in QUESTIONS["held_out"]][:count]

    def draw(rng: random.Random) -> Example:
        question, answer = rng.choice(QUESTIONS["train"])
        return Example(question, to_pirate(answer, rng.choice(CLOSINGS)))

    rng = random.Random(seed)
    return [draw(rng) for _ in range(count)]


def _phrasing(rng: random.Random, template: dict[str, Any], split: Split) -> str:
    return template["held_out"] if split == "new_phrasings" else rng.choice(template["phrasings"])


def _distinct(draw: Callable[[random.Random], Example], split: Split, count: int, seed: int) -> list[Example]:
    """`count` rows without a repeated prompt. ValueError if the templates do not give that many."""
    rng = random.Random(f"{seed} {split}")
    rows: dict[str, Example] = {}
    for _ in range(50 * count):
        row = draw(rng)
        rows.setdefault(row.prompt, row)
        if len(rows) == count:
            return list(rows.values())
    raise ValueError(f"the templates give fewer than {count} distinct rows for {split}")


def _same_text(generated: str, example: Example) -> bool:
    return generated.strip() == example.answer


def _same_json(generated: str, example: Example) -> bool:
    try:
        return json.loads(generated) == json.loads(example.answer)
    except ValueError:
        return False


def _speaks_pirate(generated: str, example: Example) -> bool:
    return len(PIRATE_MARKS.findall(generated)) >= PIRATE_MARKS_NEEDED


TASKS = {
    task.name: task
    for task in (
        Task("sql", "exact text", ("new_words", "new_phrasings"), sql_rows, _same_text),
        Task("json", "equal JSON", ("new_words", "new_phrasings"), json_rows, _same_json),
        Task("triage", "exact text", ("new_words", "new_phrasings"), triage_rows, _same_text),
        Task("pirate", f"at least {PIRATE_MARKS_NEEDED} pirate words", ("new_phrasings",), pirate_rows, _speaks_pirate),
    )
}
