"""Detokenizer and stop strings against their simple meaning; the tokenizer and chat templates against transformers."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.text.detokenizer import Detokenizer
from server.api.text.stops import StopFinder
from server.api.text.templates import render
from server.api.text.tokenizer import Tokenizer, load_tokenizer
from server.errors import TemplateFailed

TEXTS = [
    "a  1 b",
    "Hello, wörld! 日本語 🏴‍☠️ ok",
    "",
    " leading",
    "tab\tnew\n\nline",
    "<|im_start|>user\nhi<|im_end|>",
    "x" * 300,
    "12345 6,7",
]


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return load_tokenizer(model_dir)


@pytest.fixture(scope="module")
def reference(model_dir: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_agrees_with_transformers(tokenizer: Tokenizer, reference, text: str) -> None:
    assert tokenizer.encode(text) == reference(text)["input_ids"]
    ids = reference(text)["input_ids"]
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


BOS_FIRST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
}  # fmt: skip


@pytest.mark.parametrize("processor", [BOS_FIRST, None, "kept"], ids=["bos", "none", "kept"])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_bos_is_added_as_in_transformers(model_dir: Path, tmp_path: Path, config: dict, processor: object) -> None:
    from transformers import AutoTokenizer

    fast = json.loads((model_dir / "tokenizer.json").read_text())
    fast["post_processor"] = fast["post_processor"] if processor == "kept" else processor
    (tmp_path / "tokenizer.json").write_text(json.dumps(fast))
    known = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(known | config))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for special in (True, False):
        assert load_tokenizer(tmp_path).encode("hello", add_special_tokens=special) == theirs.encode("hello", add_special_tokens=special)


def test_chat_template_agrees_with_transformers(tokenizer: Tokenizer, reference) -> None:
    messages = [
        {"role": "system", "content": "Be <b>brief</b>."},
        {"role": "user", "content": "Hé?"},
        {"role": "assistant", "content": "No."},
    ]
    variables = {"messages": messages, "bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "add_generation_prompt": True}
    assert tokenizer.chat_template is not None
    assert render(tokenizer.chat_template, variables) == reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


DIALECT = """{%- for message in messages if message.role != 'system' %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
{% generation %}{{ message | tojson }}{% endgeneration %}
{%- endfor %}
{%- set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ strftime_now('%Y')[:2] }}
"""


def test_the_dialect_of_templates_is_transformers(reference) -> None:
    messages = [{"role": role, "content": "ä<&'\""} for role in ("user", "system", "assistant", "user", "user")]
    theirs = reference.apply_chat_template(messages, chat_template=DIALECT, tokenize=False)
    assert render(DIALECT, {"messages": messages}) == theirs


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for x in %}", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ undefined_thing.attribute }}", "UndefinedError"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "characters"),
        ("x" * 300_000, "longer than"),
    ],
)
def test_templates_that_fail_say_why(template: str, words: str) -> None:
    with pytest.raises(TemplateFailed, match=words):
        render(template, {"messages": []})


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_decoded_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.num_ids - 1) | st.integers(17, 300), max_size=30))
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(id) for id in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


@given(text=st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_no_piece_holds_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(id) for id in ids]
    whole = tokenizer.decode(ids)  # the vocabulary lacks some bytes: then it holds U+FFFD itself
    assert "".join(pieces) + detokenizer.flush() == whole
    assert ("\ufffd" in "".join(pieces)) <= ("\ufffd" in whole)


def test_broken_bytes_are_not_held_for_ever(tokenizer: Tokenizer) -> None:
    lone = next(id for id in range(tokenizer.num_ids) if tokenizer.token_bytes(id) == b"\xf0")
    detokenizer = Detokenizer(tokenizer)
    assert any(detokenizer.add(lone) for _ in range(100))
    assert len(detokenizer._ids) < 200


def test_token_bytes_join_to_the_text(tokenizer: Tokenizer) -> None:
    text = "naïve 🏴‍☠️ 日本\n\t<|im_end|>"
    assert b"".join(tokenizer.token_bytes(id) for id in tokenizer.encode(text)).decode() == text


def meaning(text: str, stops: list[str], keep: bool) -> tuple[str, bool]:
    """The simple meaning: the first prefix that ends in a stop string ends the text; the longest such string is cut off."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end if keep else end - max(map(len, found))], True
    return text, False


letters = st.text("ab c", min_size=1, max_size=4)


@given(st.lists(st.text("ab c", max_size=5), max_size=12), st.lists(letters, max_size=4), st.booleans())
@settings(max_examples=400, deadline=None)
def test_stop_strings_across_pieces(pieces: list[str], stops: list[str], keep: bool) -> None:
    finder = StopFinder(stops, keep=keep)
    shown = []
    for piece in pieces:
        shown.append(finder.add(piece))
        if finder.found is not None:
            break
    shown.append(finder.flush())
    expected, stopped = meaning("".join(pieces), stops, keep)
    assert "".join(shown) == expected
    assert (finder.found is not None) == stopped


@given(st.lists(st.text("ab c", max_size=5), max_size=12), st.lists(letters, max_size=4))
@settings(max_examples=200, deadline=None)
def test_no_more_is_held_back_than_may_be_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    finder, fed, shown = StopFinder(stops, keep=False), "", ""
    for piece in pieces:
        fed += piece
        shown += finder.add(piece)
        if finder.found is not None:
            return
        held = fed[len(shown) :]
        assert fed.startswith(shown)
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
