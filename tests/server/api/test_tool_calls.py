"""Calls read out of text, however it is cut into pieces; what is no call comes back as it was."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.tool_calls import CallArguments, CallStart, Content, Piece, ToolCallReader
from server.api.tool_formats import FORMATS, HERMES, LLAMA3_JSON, MISTRAL, ToolFormat, find_format

KNOWN = ("add", "find")


def read(format: ToolFormat, chunks: list[str]) -> list[Piece]:
    reader = ToolCallReader(format, KNOWN)
    pieces = [piece for chunk in chunks for piece in reader.feed(chunk)]
    return pieces + reader.finish()


def summed(pieces: list[Piece]) -> tuple[str, list[tuple[str, str]]]:
    """The content, and (name, arguments) of each call; calls must come in order."""
    content, calls = "", []
    for piece in pieces:
        match piece:
            case Content(text):
                content += text
            case CallStart(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case CallArguments(index, text):
                assert index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
    return content, calls


CASES = [
    (HERMES, "Just text.\n", "Just text.\n", []),
    (HERMES, 'Sure.\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "}"]}}\n</tool_call>', "Sure.",
     [("add", '{"a": 1, "b": [2, "}"]}')]),
    (HERMES, '<tool_call>{"arguments": {"a": "\\"}"}, "name": "add"}</tool_call>\n<tool_call>{"name":"find"}</tool_call>\n', "",
     [("add", '{"a": "\\"}"}'), ("find", "{}")]),
    (HERMES, '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "add", "arguments": null}', "", [("add", "{}")]),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')]),
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call> done', " done", [("unknown", "{}")]),
    (HERMES, "a < b <tool_cal x", "a < b <tool_cal x", []),
    (HERMES, "<tool_call>\nno JSON</tool_call>", "<tool_call>\nno JSON</tool_call>", []),
    (HERMES, '<tool_call>\n{"name": 5, "arguments": {}}', '<tool_call>\n{"name": 5, "arguments": {}}', []),
    (HERMES, '<tool_call>\n{"arguments": {}}', '<tool_call>\n{"arguments": {}}', []),
    (HERMES, '{"name": "add", "arguments": {}}', '{"name": "add", "arguments": {}}', []),
    (LLAMA3_JSON, '{"name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    (LLAMA3_JSON, ' \n{"name": "add", "parameters": {}}; {"name": "find", "parameters": {"q": "x;{"}}', "",
     [("add", "{}"), ("find", '{"q": "x;{"}')]),
    (LLAMA3_JSON, '<|python_tag|>{"name": "add", "parameters": {"a": -1.5e3}}', "", [("add", '{"a": -1.5e3}')]),
    (LLAMA3_JSON, '{"name": "nobody", "parameters": {"a": 1}}', '{"name": "nobody", "parameters": {"a": 1}}', []),
    (LLAMA3_JSON, '{"city": "x"} and {"name": "add"}', '{"city": "x"} and {"name": "add"}', []),
    (LLAMA3_JSON, 'It is {"name": "add", "parameters": {}}', 'It is {"name": "add", "parameters": {}}', []),
    (MISTRAL, '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}, {"name": "find", "arguments": {}}]', "",
     [("add", '{"a": 1}'), ("find", "{}")]),
    (MISTRAL, 'Hm. [TOOL_CALLS] [{"name": "add", "arguments": {"a": "]"}, "id": "x"}]', "Hm.", [("add", '{"a": "]"}')]),
    (MISTRAL, '[TOOL_CALLS]add[ARGS]{"a": {"b": 1}}[TOOL_CALLS]find[CALL_ID]c1[ARGS]{}', "", [("add", '{"a": {"b": 1}}'), ("find", "{}")]),
    (MISTRAL, '[TOOL_CALLS]add{"a": 1}', "", [("add", '{"a": 1}')]),
    (MISTRAL, "[TOOL_CALLS]\nnothing\n", "[TOOL_CALLS]\nnothing\n", []),
]  # fmt: skip


@pytest.mark.parametrize(("format", "text", "content", "calls"), CASES)
def test_reading(format: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert summed(read(format, [text])) == (content, calls)
    assert summed(read(format, list(text))) == (content, calls)


@given(st.sampled_from(CASES), st.lists(st.integers(0, 120), max_size=6))
def test_where_the_text_is_cut_does_not_matter(case: tuple, cuts: list[int]) -> None:
    format, text, content, calls = case
    edges = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    chunks = [text[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
    assert summed(read(format, chunks)) == (content, calls)


@given(st.sampled_from([HERMES, LLAMA3_JSON, MISTRAL]), st.text('<tool_call>/[TOOL_CALLS]{}":,; \nadd', max_size=60))
def test_no_text_is_too_odd(format: ToolFormat, text: str) -> None:
    assert summed(read(format, [text])) == summed(read(format, list(text)))
    if format.opening not in text and not text.lstrip().startswith("{"):
        assert summed(read(format, [text])) == (text, [])


def test_arguments_come_as_they_are_written() -> None:
    reader = ToolCallReader(HERMES, KNOWN)
    assert reader.feed("Well <tool") == [Content("Well")]
    assert reader.feed('_call>\n{"name": "ad') == []
    assert reader.feed('d", "arguments": {"a"') == [CallStart(0, "add"), CallArguments(0, '{"a"')]
    assert reader.feed(": 1") == [CallArguments(0, ": 1")]
    assert reader.feed("}}\n</tool_call>") == [CallArguments(0, "}")]
    assert reader.finish() == [] and reader.num_calls == 1


@pytest.mark.parametrize("format", [format for format, _ in FORMATS.values()], ids=lambda format: format.name)
def test_what_a_format_spells_it_reads(format: ToolFormat) -> None:
    arguments = {"a": 'x"}]', "b": [1, None]}
    content, ((name, text),) = summed(read(format, list(format.spell("find", arguments))))
    assert (content, name, json.loads(text)) == ("", "find", arguments)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<tool_call>' }}{{ tool_call | tojson }}", "hermes"),
        ("<tool_call>\n<function=x>", None),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ('{"name": function name, "parameters": dictionary}', "llama3_json"),
        ("{{ tools }}", None),
    ],
)
def test_a_template_tells_its_format(template: str, name: str | None) -> None:
    format = find_format(template)
    assert (format.name if format is not None else None) == name
