"""Grammars: whatever is drawn under a mask meets them; hostile ones are refused in words, and hurt nobody else."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer

from server.engine.grammar import MAX_GRAMMAR_CHARS, Grammar, GrammarCompiler, Matcher
from server.engine.grammar_queue import GrammarQueue
from server.engine.grammar_text import find_endless
from server.engine.masks import GrammarMasks, unpack
from server.errors import GenerationFailed, ValidationFailed
from server.types import EngineRequest, GrammarSpec, SamplingParams

VOCAB = 49152
EOS = 2


@pytest.fixture(scope="module")
def compiler(model_dir: Path) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(model_dir, vocab_size=VOCAB, quick_s=5.0, timeout_s=10.0)
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


def spec(value: Any, kind: str = "json_schema") -> GrammarSpec:
    return GrammarSpec(kind, json.dumps(value) if kind == "json_schema" else value)


def compile_now(compiler: GrammarCompiler, value: Any, kind: str = "json_schema") -> Grammar:
    return compiler.request(spec(value, kind)).result(60)


def refusal(compiler: GrammarCompiler, value: Any, kind: str = "json_schema") -> str:
    with pytest.raises(ValidationFailed) as caught:
        compile_now(compiler, value, kind)
    return caught.value.message


def likes(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Logits that prefer the tokens of `text`, and what ends it: what a model that means well would bring."""
    logits = torch.zeros(VOCAB)
    logits[tokenizer.encode(text, add_special_tokens=False).ids] = 8.0
    logits[EOS] = 4.0
    return logits


def draw(matchers: list[Matcher], seed: int, tokenizer: Tokenizer, bias: str = '{"}:, 12[]', max_len: int = 400) -> list[str | None]:
    """Random text of each grammar, all in one batch with a free row; None where `max_len` tokens did not suffice."""
    generator, masks = torch.Generator().manual_seed(seed), GrammarMasks()
    tokens: list[list[int]] = [[] for _ in matchers]
    done = [False] * len(matchers)
    preferred = likes(tokenizer, bias)
    for _ in range(max_len):
        open_rows = [row for row, ended in enumerate(done) if not ended]
        if not open_rows:
            break
        logits = torch.randn(len(open_rows) + 1, VOCAB, generator=generator) + preferred
        free = logits[-1].clone()
        assert masks.apply(logits, {at: matchers[row] for at, row in enumerate(open_rows)}) == {}
        assert torch.equal(logits[-1], free)
        for at, row in enumerate(open_rows):
            token = int(torch.multinomial(logits[at].softmax(-1), 1, generator=generator))
            tokens[row].append(token)
            matchers[row].accept(token)
            done[row] = token == EOS or matchers[row].finished
    return [tokenizer.decode(ids) if ended else None for ids, ended in zip(tokens, done, strict=True)]


SCHEMAS: list[Any] = [
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}}, "required": ["name", "age"],
     "additionalProperties": False},
    {"type": "array", "items": {"enum": ["a", "b\n", 3, None, "ü"]}, "minItems": 1, "maxItems": 3},
    {"anyOf": [{"type": "boolean"}, {"type": "object", "properties": {"x": {"type": "null"}}, "required": ["x"],
     "additionalProperties": False}]},
    {"$defs": {"tree": {"type": "object", "properties": {"sub": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1}},
     "additionalProperties": False}}, "$ref": "#/$defs/tree"},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    {"type": "number", "minimum": 3, "maximum": 7.5},
    {"type": "string", "format": "date"},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
               {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]}], "maxProperties": 2},
    {"type": "object", "patternProperties": {"^x[ab]{1,3}$": {"type": "null"}}, "additionalProperties": False, "maxProperties": 2},
    {"type": "integer", "multipleOf": 7, "exclusiveMinimum": 0, "maximum": 100},
    {"oneOf": [{"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"], "maxProperties": 1} for kind in "ab"]},
]  # fmt: skip


def test_random_text_under_a_mask_is_valid(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammars = [compile_now(compiler, schema) for schema in SCHEMAS]
    num_ended = 0
    for seed in range(3):
        texts = draw([grammar.matcher([EOS]) for grammar in grammars], seed, tokenizer)
        for schema, text in zip(SCHEMAS, texts, strict=True):
            if text is not None:
                num_ended += 1
                jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    assert num_ended >= 2 * len(SCHEMAS)


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("regex", r"(foo|bar)[0-9]{2,3}", r"(foo|bar)[0-9]{2,3}"),
        ("grammar", 'start: "yes" | "no" "!"*', r"yes|no!*"),
        ("grammar", 'root ::= "SELECT " name ("," name)*\nname ::= [a-c]+', r"SELECT [a-c]+(,[a-c]+)*"),
    ],
)
def test_other_kinds(compiler: GrammarCompiler, tokenizer: Tokenizer, kind: str, text: str, pattern: str) -> None:
    drawn = draw([compile_now(compiler, text, kind).matcher([EOS]) for _ in range(4)], 1, tokenizer, bias="ab,12", max_len=60)
    ended = [one for one in drawn if one is not None]
    assert ended and all(re.fullmatch(pattern, one) for one in ended), drawn


def test_stop_tokens_only_where_the_answer_may_end(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compile_now(compiler, "[0-9]+", "regex").matcher([EOS, VOCAB + 5])
    masks, logits = GrammarMasks(), torch.zeros(1, VOCAB + 8)
    masks.apply(logits, {0: matcher})
    assert logits[0, EOS] == float("-inf") and logits[0, VOCAB + 5] == float("-inf")
    matcher.accept(tokenizer.token_to_id("7"))
    for _ in range(2):  # twice: as a step that is run again
        logits = torch.zeros(1, VOCAB + 8)
        masks.apply(logits, {0: matcher})
        assert logits[0, EOS] == 0 and logits[0, VOCAB + 5] == 0 and logits[0, VOCAB + 4] == float("-inf")
        assert logits[0, 0] == float("-inf"), "a special token that nobody asked for"
    assert not matcher.finished
    matcher.accept(EOS)


def test_without_stop_tokens_it_ends_with_the_grammar(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compile_now(compiler, "[0-9]{2}", "regex").matcher([])
    assert draw([matcher], 0, tokenizer)[0] is not None and matcher.finished


def test_a_foreign_token_is_an_error(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = compile_now(compiler, "[0-9]{2}", "regex")
    matcher, other = grammar.matcher([EOS]), grammar.matcher([EOS])
    with pytest.raises(GenerationFailed, match="grammar"):
        matcher.accept(tokenizer.token_to_id("a"))
    logits = torch.zeros(2, VOCAB)
    failed = GrammarMasks().apply(logits, {0: matcher, 1: other})
    assert list(failed) == [0] and torch.equal(logits[0], torch.zeros(VOCAB))
    assert torch.isfinite(logits[1]).sum() > 0 and logits[1, tokenizer.token_to_id("a")] == float("-inf")


def test_masks_are_unpacked_bit_by_bit() -> None:
    words = torch.tensor([[1, -(1 << 31)], [6, 0]], dtype=torch.int32)
    assert unpack(words, 70).nonzero().tolist() == [[0, 0], [0, 63], [1, 1], [1, 2]] and unpack(words, 40).shape == (2, 40)


def test_one_compilation_for_all_who_ask(compiler: GrammarCompiler) -> None:
    one, other = compiler.request(spec("x[0-9]{7}", "regex")), compiler.request(spec("x[0-9]{7}", "regex"))
    assert one.result(60) is other.result(60) is compile_now(compiler, "x[0-9]{7}", "regex")


def chain(num: int) -> str:
    return "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(num)) + f'\nr{num}: "a"'


def refs(num: int) -> dict[str, Any]:
    links = {f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(num)}
    return {"$defs": links | {f"d{num}": {"type": "string"}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "json_schema", "no finite JSON meets the schema"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "json_schema", "minLength"),
        (False, "json_schema", "no JSON meets the schema"),
        ({"x-guidance": {"lenient": True}}, "json_schema", "`x-guidance` is not a keyword"),
        ([1], "json_schema", "a JSON schema is an object"),
        ({"type": "array", "uniqueItems": True}, "json_schema", "uniqueItems"),
        ({"$ref": "http://example.com/schema"}, "json_schema", "http://example.com/schema"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "json_schema", "use `anyOf`"),
        (refs(3000), "json_schema", "too complex"),
        ({"const": "x" * 200_000}, "json_schema", "too complex"),
        ("x" * (MAX_GRAMMAR_CHARS + 1), "regex", f"longer than {MAX_GRAMMAR_CHARS}"),
        ("(a", "regex", "unclosed group"),
        ("(?=a)b", "regex", "look-around"),
        ("", "regex", "empty text"),
        ("start: foo", "grammar", "unknown name"),
        ("root ::= (", "grammar", "neither Lark nor GBNF"),
        (chain(12_000), "grammar", "too complex"),
        ("start: " + "(" * 100_000, "grammar", "nested"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals(compiler: GrammarCompiler, value: Any, kind: str, words: str) -> None:
    message = refusal(compiler, value, kind)
    assert words in message and len(message) < 600
    assert compiler.request(spec(value, kind)).done(), "remembered: nobody tries again"
    assert refusal(compiler, value, kind) == message


def test_a_hard_grammar_is_ended_and_holds_up_nobody(model_dir: Path) -> None:
    compiler = GrammarCompiler(model_dir, vocab_size=VOCAB, quick_s=0.3, timeout_s=1.0)
    try:
        compile_now(compiler, "warm", "regex")
        hard = [compiler.request(spec({"type": "integer", "multipleOf": 1_000_003 + n})) for n in range(2)]
        easy = compiler.request(spec("[0-9]+", "regex"))
        easy.result(30)
        assert not hard[1].done(), "the easy one overtook"
        with pytest.raises(ValidationFailed, match="not compiled within 1 s"):
            hard[0].result(30)
    finally:
        compiler.close()


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        (True, None),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "#/$defs/a"),
        ({"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, None),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}}, None),
        ({"type": "array", "items": {"$ref": "#"}}, None),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "#"),
        ({"type": "object", "properties": {"a/b": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["a/b"]}, None),
        ({"type": "object", "properties": {"a/b": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}}, "required": ["a/b"]}, "#"),
        ({"type": "object", "properties": {"a": {"allOf": [{}, {"$ref": "#/properties/a"}]}}, "required": ["a"]}, "#/properties/a"),
        ({"enum": [1], "type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a", 5]}, None),
    ],
)  # fmt: skip
def test_endless_schemas(schema: Any, place: str | None) -> None:
    assert find_endless(schema) == place


class FakeCompiler:
    def __init__(self) -> None:
        self.futures: list[Future[Grammar]] = []

    def request(self, spec: GrammarSpec) -> Future[Grammar]:
        self.futures.append(Future())
        return self.futures[-1]

    def close(self) -> None: ...


def request(id: str) -> EngineRequest:
    return EngineRequest(id, [1], SamplingParams(max_new_tokens=1, grammar=GrammarSpec("regex", "a", "tools")))


def test_queue(compiler: GrammarCompiler) -> None:
    fake = FakeCompiler()
    waiting = GrammarQueue(fake)  # type: ignore[arg-type]
    for id in "abc":
        waiting.add(request(id))
    with pytest.raises(KeyError):
        waiting.add(request("a"))
    assert len(waiting) == 3 and not waiting.arrived.is_set() and waiting.take() == []
    assert waiting.remove("b") and not waiting.remove("b") and "b" not in waiting
    fake.futures[2].set_exception(ValidationFailed("too complex"))
    fake.futures[1].set_result(compile_now(compiler, "a", "regex"))  # nobody waits any more
    assert waiting.arrived.is_set()
    ((failed, error),) = waiting.take()
    assert failed.request_id == "c" and isinstance(error, ValidationFailed)
    assert error.message == "`tools`: too complex" and error.param == "tools"
    assert waiting.request_ids == ["a"] and not waiting.arrived.is_set()
    fake.futures[0].set_result(compile_now(compiler, "a", "regex"))
    ((ready, matcher),) = waiting.take()
    assert ready.request_id == "a" and isinstance(matcher, Matcher) and len(waiting) == 0
