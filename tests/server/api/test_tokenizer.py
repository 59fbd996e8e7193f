"""The tokenizer's own promises: threads, panics, and what an adapter may bring in place of the base's."""

import asyncio
import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from server.api.text import tokenizer as tokenizer_module
from server.api.text.tokenizer import Tokenizer, load_adapter_tokenizer, load_tokenizer, read_chat_template
from server.errors import AdapterRefused, ValidationFailed


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return load_tokenizer(model_dir)


def test_adapters_without_files_use_the_base(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert load_adapter_tokenizer(tmp_path, tokenizer, num_rows=10**6) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_adapter_tokenizer(tmp_path, tokenizer, num_rows=10**6) is None


def test_what_is_remembered_of_an_id_is_what_decode_says_and_is_bounded(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_MAX_ALONE", 100)
    tokenizer, asked = load_tokenizer(model_dir), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: (asked.append(list(ids)), decode(ids))[1])
    for _ in range(2):
        assert [tokenizer.decode_one(id) for id in range(50)] == [decode([id]) for id in range(50)]
    assert asked == [[id] for id in range(50)]  # each once
    assert [tokenizer.decode_one(id) for id in range(250)] == [decode([id]) for id in range(250)]
    assert len(tokenizer._alone) <= 100


def test_adapters_templates_wherever_they_are(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]})
    )
    assert read_chat_template(tmp_path) == "d"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "j"}))
    assert read_chat_template(tmp_path) == "j"
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    own = load_adapter_tokenizer(tmp_path, tokenizer, num_rows=10**6)
    assert own is not None and own.chat_template == "{{ messages }}" and tokenizer.chat_template != own.chat_template
    assert own.encode("abc") == tokenizer.encode("abc")


def test_adapters_with_tokens_that_have_no_row_are_refused(tokenizer: Tokenizer, model_dir: Path, tmp_path: Path) -> None:
    grown = json.loads((model_dir / "tokenizer.json").read_text())
    grown["added_tokens"].append({"id": tokenizer.num_ids, "content": "<new>", "single_word": False, "lstrip": False, "rstrip": False,
                                  "normalized": False, "special": True})  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(grown))
    with pytest.raises(AdapterRefused, match=f"token ids up to {tokenizer.num_ids}, its embedding {tokenizer.num_ids} rows"):
        load_adapter_tokenizer(tmp_path, tokenizer, num_rows=tokenizer.num_ids)
    own = load_adapter_tokenizer(tmp_path, tokenizer, num_rows=tokenizer.num_ids + 1)
    assert own is not None and own.encode("a<new>")[-1] == tokenizer.num_ids and own.is_special(tokenizer.num_ids)
    assert own.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "[1"), ("chat_template.json", "[]")])
def test_broken_tokenizer_files_are_named(tokenizer: Tokenizer, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(AdapterRefused, match=name):
        load_adapter_tokenizer(tmp_path, tokenizer, num_rows=10**6)


class _Library:
    """In place of the tokenizers library: remembers what was called, raises what it is told to."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.called: list[str] = []
        self.error = error

    def encode(self, text: str, **_options: bool):
        return self.encode_batch([text], name="encode")[0]

    def encode_batch(self, texts: list[str], *, name: str = "encode_batch", **_options: bool):
        self.called.append(name)
        if self.error is not None:
            raise self.error
        return [SimpleNamespace(ids=[len(text)]) for text in texts]

    def decode(self, _ids: list[int], **_options: bool) -> str:
        raise self.error or AssertionError


class _Panic(BaseException):
    """As pyo3's PanicException: no Exception."""


def test_long_texts_let_other_threads_run(tokenizer: Tokenizer) -> None:
    own, own._fast = copy.copy(tokenizer), (library := _Library())
    assert own.encode("a" * 100_000) == [100_000] and own.encode_all(["a" * 3000, "b" * 2000]) == [[3000], [2000]]
    assert library.called == ["encode_batch"] * 2  # the call of the library that gives the interpreter's lock back
    assert own.encode("a") == [1] and library.called[-1] == "encode"


def test_a_panic_of_the_library_is_a_refusal(tokenizer: Tokenizer) -> None:
    own, own._fast = copy.copy(tokenizer), (library := _Library(_Panic("stack")))
    for call in (
        lambda: own.encode("a"),
        lambda: own.encode_all(["a" * 9999]),
        lambda: own.encode_with_offsets("a"),
        lambda: own.decode([1]),
    ):
        library.error = _Panic("stack")
        with pytest.raises(ValidationFailed, match="tokenizer error stack"):
            call()
        library.error = asyncio.CancelledError()
        with pytest.raises(asyncio.CancelledError):
            call()


def test_the_longest_token(tokenizer: Tokenizer) -> None:
    longest = max((tokenizer.token_text(id) for id in range(tokenizer.num_ids)), key=len)
    assert len(longest) <= tokenizer.max_token_chars < 1000


CHANGES = {
    "normalizer": {"type": "Lowercase"},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "decoder": {"type": "Fuse"},
    "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    "added_tokens": [],
}


@pytest.mark.parametrize("section", CHANGES)
def test_adapters_may_not_change_the_tokenizer(tokenizer: Tokenizer, model_dir: Path, tmp_path: Path, section: str) -> None:
    raw = json.loads((model_dir / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | {section: CHANGES[section]}))
    with pytest.raises(AdapterRefused, match=f"tokenizer.json: `{section}`"):
        load_adapter_tokenizer(tmp_path, tokenizer, num_rows=10**6)


def test_adapters_with_the_base_tokenizer_share_it(tokenizer: Tokenizer, model_dir: Path, tmp_path: Path) -> None:
    raw = json.loads((model_dir / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw, indent=1, sort_keys=True))
    shutil.copy(model_dir / "tokenizer_config.json", tmp_path)
    assert load_adapter_tokenizer(tmp_path, tokenizer, num_rows=tokenizer.num_ids) is tokenizer
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    own = load_adapter_tokenizer(tmp_path, tokenizer, num_rows=tokenizer.num_ids)
    assert own is not None and own.chat_template == "{{ messages }}" and own._fast is tokenizer._fast


def test_huge_tokenizers_are_refused_unread(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(AdapterRefused, match="tokenizer.json: longer than"):
        load_adapter_tokenizer(tmp_path, tokenizer, num_rows=10**6)
