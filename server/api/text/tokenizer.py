"""A model's (or an adapter's) tokenizer, read from its folder the way transformers reads it, without importing transformers.

Owns token ids, special tokens and the chat template's text. Does not know about requests. api.base_model and api.adapters make them.
"""

import asyncio
import copy
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer as FastTokenizer

from server.errors import AdapterRefused, ValidationFailed

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's byte fallback


def _byte_letters() -> dict[str, int]:
    """Letter -> byte of byte-level BPE (GPT-2): printable bytes stand for themselves, the others for letters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_letters()
MAX_TOKENIZER_BYTES = 64 << 20  # of an adapter's tokenizer.json
_BATCH_CHARS = 4096  # from here on letting other threads run is worth the way through the library's pool
_MAX_ALONE = 16_384  # ids whose text by itself is remembered
_INTERRUPTS = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)
_FIXED_SECTIONS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")


class Tokenizer:
    """Encodes and decodes. Safe to use from several threads: nothing that is said of a text changes after it is made."""

    def __init__(self, fast: FastTokenizer, config: dict[str, Any], *, chat_template: str | None, extra_eos: Sequence[int] = ()) -> None:
        self._fast = fast
        fast.no_padding()
        fast.no_truncation()
        self.bos_token = _content(config.get("bos_token"))
        self.eos_token = _content(config.get("eos_token"))
        self.chat_template = chat_template
        self._special = {id for id, token in fast.get_added_tokens_decoder().items() if token.special}
        for token in (self.bos_token, self.eos_token):
            if token is not None and (id := fast.token_to_id(token)) is not None:
                self._special.add(id)
        self._byte_level = fast.decoder is not None and b"ByteLevel" in fast.decoder.__getstate__()
        eos = fast.token_to_id(self.eos_token) if self.eos_token is not None else None
        self.eos_ids = tuple(sorted(set(extra_eos) | ({eos} if eos is not None else set())))
        vocabulary = fast.get_vocab(with_added_tokens=True)
        self.num_ids = max(vocabulary.values(), default=-1) + 1
        self._alone: dict[int, str] = {}  # what decode says of one id
        self.max_token_chars = max(map(len, vocabulary), default=1)  # a raw entry is never shorter than the text that it stands for

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it become those tokens. ValidationFailed if it cannot be encoded.

        What `add_special_tokens` adds (BOS) is up to tokenizer.json alone: transformers 5 too ignores add_bos_token beside it."""
        return self._encode([text], add_special_tokens)[0].ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with the special tokens that tokenizer.json adds. Errors as `encode`."""
        return [encoding.ids for encoding in self._encode(texts, True)]

    def encode_with_offsets(self, text: str, *, add_special_tokens: bool = True) -> list[tuple[int, str, int, int]]:
        """(id, raw vocabulary entry, first character, character after the last) of each token."""
        (encoding,) = self._encode([text], add_special_tokens)
        return [(id, raw, start, stop) for id, raw, (start, stop) in zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True)]

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> Sequence[Any]:
        with _library_errors():
            if sum(map(len, texts)) <= _BATCH_CHARS:
                return [self._fast.encode(text, add_special_tokens=add_special_tokens) for text in texts]
            # Unlike encode, encode_batch lets go of the interpreter's lock.
            return self._fast.encode_batch(list(texts), add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. ValidationFailed if the library cannot decode them."""
        try:  # not _library_errors: of each token of a stream, a context manager would take longer than the decoding
            return self._fast.decode(ids, skip_special_tokens=skip_special_tokens)
        except _INTERRUPTS:
            raise
        except BaseException as error:
            raise _library_error(error) from None

    def decode_one(self, id: int) -> str:
        """decode([id]), remembered: every token that a sequence gets is asked about once more when the next one comes."""
        text = self._alone.get(id)
        if text is None:
            if len(self._alone) >= _MAX_ALONE:
                self._alone.clear()
            text = self._alone[id] = self.decode([id])
        return text

    def token_text(self, id: int) -> str:
        """Text of one token by itself, special ones written out; "" for an id without a token (a padded vocabulary has such)."""
        if id in self._special:
            return self._fast.id_to_token(id) or ""
        return self._fast.decode([id], skip_special_tokens=False)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that the token stands for, also where they are only a part of a character."""
        raw = self._fast.id_to_token(id) or ""
        if id in self._special:
            return raw.encode()
        if self._byte_level and all(letter in _BYTE_OF for letter in raw):
            return bytes(_BYTE_OF[letter] for letter in raw)
        if (match := _BYTE_TOKEN.fullmatch(raw)) is not None:
            return bytes([int(match[1], 16)])
        return self.token_text(id).encode()

    def is_special(self, id: int) -> bool:
        """Whether the token is left out of generated text."""
        return id in self._special

    def special_id(self, text: str) -> int | None:
        """The special token that is written exactly `text`, if there is one."""
        id = self._fast.token_to_id(text)
        return id if id in self._special else None

    @functools.cached_property
    def _sections(self) -> dict[str, Any]:
        """tokenizer.json as the library writes it: each fixed section's digest, the added tokens by id."""
        raw = msgspec.json.decode(self._fast.to_str(), type=dict[str, msgspec.Raw])
        digests = {name: hashlib.sha256(raw[name]).hexdigest() for name in _FIXED_SECTIONS}
        return digests | {"added_tokens": {token["id"]: token for token in msgspec.json.decode(raw["added_tokens"])}}

    def with_added(self, own: "Tokenizer") -> "Tokenizer":
        """`own`, checked to be this tokenizer with tokens added at most; it shares the vocabulary if none are. ValueError if it is not.

        A pattern in another normalizer or pre-tokenizer is a program of a stranger's that this process would run on every text."""
        ours, theirs = self._sections, own._sections
        for name in _FIXED_SECTIONS:
            if ours[name] != theirs[name]:
                raise ValueError(f"tokenizer.json: `{name}` differs from the base model's; an adapter may only add `added_tokens`")
        if any(theirs["added_tokens"].get(id) != token for id, token in ours["added_tokens"].items()):
            raise ValueError("tokenizer.json: `added_tokens` lacks or changes tokens of the base model's")
        if len(ours["added_tokens"]) == len(theirs["added_tokens"]):
            own._fast = self._fast
            same = ("bos_token", "eos_token", "eos_ids", "chat_template", "_special")
            return self if all(getattr(self, name) == getattr(own, name) for name in same) else own
        return own


@contextmanager
def _library_errors() -> Iterator[None]:
    """What tokenizers raises (bare Exception; a panic is no Exception at all) as ValidationFailed."""
    try:
        yield
    except _INTERRUPTS:
        raise
    except BaseException as error:
        raise _library_error(error) from None


def _library_error(error: BaseException) -> ValidationFailed:
    return ValidationFailed(f"tokenizer error {error}"[:500])


def load_tokenizer(folder: Path, *, extra_eos: Sequence[int] = ()) -> Tokenizer:
    """The tokenizer in `folder`. ValueError if tokenizer.json is missing or broken."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError("no tokenizer.json (a slow tokenizer has to be converted first)")
    try:
        with _library_errors():
            fast = FastTokenizer.from_file(str(path))
    except ValidationFailed as error:
        raise ValueError(f"tokenizer.json: {error.message}") from None
    return Tokenizer(fast, read_json(folder / "tokenizer_config.json"), chat_template=read_chat_template(folder), extra_eos=extra_eos)


def load_adapter_tokenizer(folder: Path, base: Tokenizer, *, num_rows: int) -> Tokenizer | None:
    """The tokenizer that an adapter brings, or None if it brings none and no template. `num_rows`: rows of the embedding with the adapter.

    Adapters without tokens of their own share the base's vocabulary. AdapterRefused, naming the file, if it is broken, too long, other than
    the base's in more than added tokens, or knows tokens that the model has no row for."""
    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            if path.stat().st_size > MAX_TOKENIZER_BYTES:
                raise ValueError(f"tokenizer.json: longer than {MAX_TOKENIZER_BYTES} bytes")
            own = load_tokenizer(folder, extra_eos=base.eos_ids)
            if own.chat_template is None:
                own.chat_template = base.chat_template
            own = base.with_added(own)
        elif (template := read_chat_template(folder)) is not None:
            own = with_template(base, template)
        else:
            return None
    except ValueError as error:
        raise AdapterRefused(f"the adapter's {error}") from None
    if own.num_ids > max(num_rows, base.num_ids):
        raise AdapterRefused(f"the adapter's tokenizer.json has token ids up to {own.num_ids - 1}, its embedding {num_rows} rows")
    return own


def with_template(base: Tokenizer, template: str) -> Tokenizer:
    """`base` with another chat template, sharing its vocabulary."""
    own = copy.copy(base)
    own.chat_template = template
    return own


def read_chat_template(folder: Path) -> str | None:
    """The folder's default chat template, wherever transformers would find it. ValueError if a file is broken."""
    if (folder / "chat_template.jinja").is_file():
        return _read_text(folder / "chat_template.jinja")
    template = read_json(folder / "chat_template.json").get("chat_template")
    template = template or read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError("chat_template: neither a string nor a list of named templates")
    return template


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no file. ValueError, naming the file, if it holds anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name}: not a JSON object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path.name}: {error.strerror}") from None


def _content(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
