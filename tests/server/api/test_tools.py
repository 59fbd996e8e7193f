"""Tools in chats: what the prompt says, what the engine is told, how answers and streams bring calls, what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.api.schemas_openai import ChatRequest
from server.api.schemas_tools import Tool
from server.api.text.tokenizer import Tokenizer, load_tokenizer, with_template
from server.api.tool_formats import FORMATS, ToolFormat, call_grammar
from server.api.tools import template_messages, use_tools
from server.engine.grammar import GrammarCompiler
from server.errors import ValidationFailed
from server.types import GrammarSpec
from tests.server.api.live import LiveServer, live_server

ADD = {"name": "add", "description": "Adds.", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"],
    "additionalProperties": False,
}}  # fmt: skip
NOW = {"name": "now"}
TOOLS = [{"type": "function", "function": ADD}, {"type": "function", "function": NOW}]
MESSAGES = [{"role": "user", "content": "hi"}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


def chat(live: LiveServer, **body: Any) -> Any:
    return live.post("/v1/chat/completions", {"model": "base", "messages": MESSAGES, "tools": TOOLS} | body)


def prompt_of(live: LiveServer) -> str:
    return live.api.model.tokenizer.decode(live.seen("Submit")[-1]["token_ids"], skip_special_tokens=False)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("live"), model_dir, max_total_tokens=1024) as server:
        yield server


@pytest.mark.parity(
    "1.8", "`tools`", "better", "in the model's own format, also several calls, finish_reason tool_calls; LoRAX forces one JSON object"
)
def test_calls_in_an_answer(live: LiveServer) -> None:
    live.answer("Let me see. " + CALL + "\n" + '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    choice = chat(live).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me see."
    first, second = choice["message"]["tool_calls"]
    assert first["type"] == "function" and first["function"]["name"] == "add"
    assert json.loads(first["function"]["arguments"]) == {"a": 1, "b": 2}
    assert second["function"] == {"name": "now", "arguments": "{}"}
    assert first["id"].startswith("call_") and first["id"] != second["id"]


def test_no_calls_in_an_answer(live: LiveServer) -> None:
    live.answer("Just text.")
    choice = chat(live).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "Just text."} and choice["finish_reason"] == "stop"


def test_a_call_that_was_cut_off(live: LiveServer) -> None:
    live.answer(CALL)
    num_tokens = len(live.api.model.tokenizer.encode(CALL.partition(' "b"')[0]))
    choice = chat(live, max_tokens=num_tokens).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": 1,'


@pytest.mark.parity("1.8", "`tools` in streams", "better", "name, then arguments as they are written; LoRAX streams JSON as text")
@pytest.mark.parametrize("logprobs", [False, True])
def test_calls_in_a_stream(live: LiveServer, logprobs: bool) -> None:
    live.answer("Hm. " + CALL)
    body = {"model": "base", "messages": MESSAGES, "tools": TOOLS, "stream": True, "logprobs": logprobs}
    events = live.events("/v1/chat/completions", body)[:-1]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content") or "" for delta in deltas) == "Hm."
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert calls[0]["id"] and calls[0]["type"] == "function" and calls[0]["function"] == {"name": "add", "arguments": ""}
    assert all(call["index"] == 0 and set(call) == {"index", "function"} and "name" not in call["function"] for call in calls[1:])
    assert len(calls) > 4, "the arguments come in pieces"
    assert "".join(call["function"]["arguments"] for call in calls) == '{"a": 1, "b": 2}'
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    if logprobs:
        told = [
            entry["token"] for event in events if event["choices"][0]["logprobs"] for entry in event["choices"][0]["logprobs"]["content"]
        ]
        assert len(told) == len(live.api.model.tokenizer.encode("Hm. " + CALL)) + 1


@pytest.mark.parity("1.8", "messages of the roles developer and tool, `tool_calls` of earlier turns", "better", "LoRAX has none of them")
def test_the_model_is_told_of_tools_in_text_where_its_template_is_not(live: LiveServer) -> None:
    live.answer("x")
    history = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
    ]  # fmt: skip
    assert chat(live, messages=history).status_code == 200
    prompt = prompt_of(live)
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou may call functions") and '"name": "add"' in prompt
    assert "<|im_start|>assistant\n" + CALL + "<|im_end|>" in prompt
    assert "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>" in prompt
    chat(live)
    assert prompt_of(live).startswith("<|im_start|>system\nYou may call functions")
    chat(live, tool_choice="none")
    assert "call functions" not in prompt_of(live) and "grammar" not in live.seen("Submit")[-1]["params"]


@pytest.mark.parity("1.8", "`tool_choice`: auto, none, a function's name", "better", "also required, and OpenAI's objects")
@pytest.mark.parametrize(
    ("choice", "names", "parallel"),
    [
        ("required", {"add", "now"}, True),
        ({"type": "function", "function": {"name": "add"}}, {"add"}, False),
        ("add", {"add"}, False),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}},
         {"now"}, True),
    ],
)  # fmt: skip
def test_forced_calls_are_a_grammar(live: LiveServer, choice: Any, names: set[str], parallel: bool) -> None:
    live.answer(CALL)
    assert chat(live, tool_choice=choice).json()["choices"][0]["message"]["content"] is None
    grammar = live.seen("Submit")[-1]["params"]["grammar"]
    assert grammar["kind"] == "grammar" and grammar["param"] == "tools"
    assert {name for name in ("add", "now") if f'\\"{name}\\"' in grammar["text"]} == names
    assert ("{0,15}" in grammar["text"]) == parallel
    chat(live, tool_choice=choice, parallel_tool_calls=False)
    assert "{0,15}" not in live.seen("Submit")[-1]["params"]["grammar"]["text"]


def test_an_optional_call_is_a_grammar_only_if_it_is_strict(live: LiveServer) -> None:
    live.answer("x")
    chat(live)
    assert "grammar" not in live.seen("Submit")[-1]["params"]
    chat(live, tools=[{"type": "function", "function": ADD | {"strict": True}}])
    assert "TEXT" in live.seen("Submit")[-1]["params"]["grammar"]["text"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing field"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].custom", "only functions are"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "match pattern"),
        ({"tools": [{"type": "function", "function": ADD | {"parameters": {"type": "array"}}}]}, "tools[0].function.parameters", "object"),
        ({"tools": TOOLS + TOOLS[:1]}, "tools", "Given twice: add"),
        ({"tools": TOOLS * 65}, "tools", "at most 128"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "only allowed with `tools`"),
        ({"tool_choice": "nobody"}, "tool_choice", "Tool with name nobody not found"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "Tool with name x not found"),
        ({"tool_choice": {"type": "custom", "custom": {}}}, "tool_choice", "an object of the type function or allowed_tools"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "missing field"),
        ({"tool_choice": 5}, "tool_choice", 'must be "auto", "none", "required"'),
        ({"response_format": {"type": "json_object"}}, "response_format", "mutually exclusive"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}]},
         "messages[0]", "only allowed in a message of the role assistant"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[1"}}]}]},
         "messages[0].tool_calls[0].function.arguments", "must be a JSON object as a text"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0]", "role tool"),
        ({"messages": [{"role": "user", "content": "x", "function_call": {}}]}, "messages[0].function_call", "use `tool_calls`"),
    ],
)  # fmt: skip
def test_refusals(live: LiveServer, body: dict, param: str, words: str) -> None:
    answer = chat(live, **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and words in error["message"]


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return load_tokenizer(model_dir)


def request(**body: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "", "messages": MESSAGES, "tools": TOOLS} | body)


def test_a_template_that_knows_tools_gets_them(tokenizer: Tokenizer) -> None:
    template = "{{ tools }}{% if message.tool_calls %}<|python_tag|>"
    use = use_tools(request(), with_template(tokenizer, template), "auto", 49152)
    assert use is not None and use.format.name == "llama3_json"
    body = request(messages=[{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
                             {"role": "tool", "tool_call_id": "a", "content": "ok"}])  # fmt: skip
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert template_messages(body.messages, use, template) == [
        {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "ok", "tool_call_id": "a"}
    ]  # fmt: skip
    with pytest.raises(ValidationFailed, match="set --tool-call-format"):
        use_tools(request(), with_template(tokenizer, "{{ tools }}"), "auto", 49152)
    use = use_tools(request(), with_template(tokenizer, "{{ tools }}"), "mistral", 49152)
    assert use is not None and use.format.name == "mistral" and len(use.new_id()) == 9


@pytest.fixture(scope="module")
def compiler(model_dir: Path) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(model_dir, vocab_size=49152, quick_s=5.0)
    yield compiler
    compiler.close()


@pytest.mark.parametrize("marker", [None, "<|im_start|>"])
@pytest.mark.parametrize("format", [format for format, _ in FORMATS.values()], ids=lambda format: format.name)
def test_grammars_of_calls(compiler: GrammarCompiler, tokenizer: Tokenizer, format: ToolFormat, marker: str | None) -> None:
    """A grammar takes what the format spells, and nothing else; with a marker that is a token by itself as well."""
    schemas = {tool.function.name: {"type": "object", **(tool.function.parameters or {})} for tool in map(Tool.model_validate, TOOLS)}

    def special_id(text: str) -> int | None:
        return tokenizer.special_id(marker) if marker is not None and text == format.opening else None

    def takes(text: str, **options: bool) -> tuple[bool, bool]:
        """(may the answer be so far, may it end there)"""
        grammar = call_grammar(format, schemas, special_id=special_id, **options)
        inner = compiler.request(GrammarSpec("grammar", grammar)).result(60).matcher([]).inner
        text = text if marker is None else text.replace(format.opening, marker)
        ids = tokenizer.encode(text, add_special_tokens=False)
        return inner.try_consume_tokens(ids) == len(ids), inner.is_accepting()

    call = format.spell("add", {"a": 1, "b": 2})
    if format.bare:  # forced calls come without the marker
        call = call.removeprefix(format.opening)
    two = call + format.separator + call
    if format.listed:
        two = call[:-1] + format.separator + call.partition("[{")[2].join(["{", ""])
    assert takes(call, parallel=True, forced=True) == (True, True)
    assert takes(two, parallel=True, forced=True) == (True, True)
    assert takes(two, parallel=False, forced=True)[0] is False
    assert takes("No.", parallel=True, forced=True)[0] is False
    assert takes(call.replace("2", '"x"'), parallel=True, forced=True)[0] is False
    assert takes(call.replace('"add"', '"sub"'), parallel=True, forced=True)[0] is False
    assert takes("No.", parallel=True, forced=False) == (True, True)
    assert takes(call, parallel=True, forced=False) == (True, True)
    assert takes(call.replace("2", '"x"'), parallel=True, forced=False)[0] is False
