"""`response_format` and `structured_outputs`: what the engine is told, and what is refused before it hears of it."""

import json
from typing import Any

import pytest

from server.api.structured import NativeResponseFormat, StructuredOutputs, chosen_grammar
from server.errors import ValidationFailed
from server.types import GrammarSpec
from tests.server.api.live import LiveServer

SCHEMA = {"type": "object", "properties": {"ä": {"type": "string"}}}


def post(live: LiveServer, route: str, **body: Any) -> Any:
    prompt = {"prompt": "hi"} if route == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    return live.post(route, {"model": "base", "max_tokens": 2} | prompt | body)


@pytest.mark.parity(
    "1.8", "`response_format`", "better", "on both routes; arrays too in json_object; also regex, grammar and choice (`structured_outputs`)"
)
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("body", "kind", "text", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", {"type": "object"}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "json_schema", SCHEMA, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}}, "json_schema",
         SCHEMA, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "json_schema", {"type": "object"}, "response_format"),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA, "structured_outputs.json"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema", SCHEMA, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "[a-z]+"}}, "regex", "[a-z]+", "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": 'start: "x"'}}, "grammar", 'start: "x"', "structured_outputs.grammar"),
        ({"structured_outputs": {"choice": ["a", 'ü"\n']}}, "grammar", 'start: "a" | "ü\\"\\n"', "structured_outputs.choice"),
    ],
)  # fmt: skip
def test_what_the_engine_is_told(live: LiveServer, route: str, body: dict, kind: str, text: Any, param: str) -> None:
    assert post(live, route, **body).status_code == 200
    grammar = live.seen("Submit")[-1]["params"]["grammar"]
    assert (grammar["kind"], grammar.get("param", "response_format")) == (kind, param)
    assert (json.loads(grammar["text"]) if kind == "json_schema" else grammar["text"]) == text


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"response_format": "json"}, "response_format", "must be a JSON object"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'text', 'json_object' or 'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "missing field `json_schema`"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format", '`schema` needs `type`: "json_object"'),
        ({"response_format": {"type": "json_object", "schemas": {}}}, "response_format.schemas", "did you mean `schema`?"),
        ({"response_format": {"type": "json_object", "schema": 5}}, "response_format.schema", "valid"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of `json`, `regex`, `choice` and `grammar`"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs", "empty text"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs", "at most one"),
    ],
)
def test_refusals(live: LiveServer, route: str, body: dict, param: str, words: str) -> None:
    answer = post(live, route, **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and words in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_is_the_callers_error(live: LiveServer, stream: bool) -> None:
    live.control(fail="`response_format`: too complex", kind="ValidationFailed", param="response_format")
    answer = post(live, "/v1/chat/completions", response_format={"type": "json_object"}, stream=stream)
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "`response_format`: too complex", "type": "invalid_request_error", "param": "response_format", "code": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"type": "json_object"}, '{"type": "object"}'),
        ({"type": "json_object", "schema": None}, '{"type": "object"}'),  # lorax-client 0.7.0 sends null
        ({"type": "JsonObject", "schema": '{"type": "string"}'}, '{"type": "string"}'),
        ({"type": "JsonSchema", "schema": {"type": "string"}}, '{"type": "string"}'),
        ({"type": "Text"}, None),
    ],
)
def test_the_native_form(value: Any, text: str | None) -> None:
    format = NativeResponseFormat.model_validate(value)
    assert chosen_grammar(format, None) == (GrammarSpec("json_schema", text) if text is not None else None)


def test_the_native_form_refuses_a_schema_without_a_type() -> None:
    with pytest.raises(ValidationFailed, match="needs `type`"):
        NativeResponseFormat.model_validate({"type": "text", "schema": {}}).grammar()
    one = StructuredOutputs.model_validate({"regex": "a"})
    assert chosen_grammar(NativeResponseFormat(type="text"), one) == GrammarSpec("regex", "a", "structured_outputs.regex")
