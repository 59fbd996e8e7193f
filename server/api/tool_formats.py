"""How models write calls of tools: one entry a format, in the order in which a chat template is asked for it.

Owns the spellings and the grammar of a forced call. Reading calls out of text is api.tool_calls', what a request means api.tools'.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.api.structured import lark_string

MAX_CALLS = 16  # of one answer, where they are forced
_JSON_OPTIONS = {"whitespace_pattern": r"[ \n\r\t]{1,40}"}


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """`opening` and `closing` stand around calls; a call is a JSON object {"name": ..., `arguments_key`: {...}}."""

    name: str
    opening: str
    closing: str = ""
    arguments_key: str = "arguments"
    blank: str = ""  # between the markers and the calls, as models are used to
    listed: bool = False  # the calls are one JSON list after one opening
    named: bool = False  # also `opening name [ARGS] {...}`
    bare: bool = False  # an answer that begins with a call's { needs no opening
    separator: str = ""  # between calls

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens and mean something here."""
        return (self.opening, *filter(None, (self.closing,)), *(("[ARGS]",) if self.named else ()))

    def spell(self, name: str, arguments: Any) -> str:
        """A call as the model would have written it, markers included."""
        call = json.dumps({"name": name, self.arguments_key: arguments}, ensure_ascii=False)
        return self.opening + self.blank + (f"[{call}]" if self.listed else call) + self.blank + self.closing


HERMES = ToolFormat(name="hermes", opening="<tool_call>", closing="</tool_call>", blank="\n", separator="\n")
MISTRAL = ToolFormat(name="mistral", opening="[TOOL_CALLS]", listed=True, named=True, separator=", ")
LLAMA3_JSON = ToolFormat(name="llama3_json", opening="<|python_tag|>", arguments_key="parameters", bare=True, separator="; ")

# name -> (format, does a chat template speak it)
FORMATS: Mapping[str, tuple[ToolFormat, Callable[[str], bool]]] = {
    "mistral": (MISTRAL, lambda template: "[TOOL_CALLS]" in template),
    "hermes": (HERMES, lambda template: "<tool_call>" in template and "<function=" not in template),
    "llama3_json": (LLAMA3_JSON, lambda template: "<|python_tag|>" in template or ('"parameters"' in template and '"name"' in template)),
}


def find_format(template: str) -> ToolFormat | None:
    """The format that a chat template with tools asks the model for; None if it is not one of ours."""
    return next((format for format, speaks in FORMATS.values() if speaks(template)), None)


def call_grammar(
    format: ToolFormat, tools: Mapping[str, Any], *, parallel: bool, forced: bool, special_id: Callable[[str], int | None]
) -> str:
    """Lark of an answer that calls `tools` (name -> JSON schema of the arguments).

    `forced`: nothing but calls. Else any text is allowed too, and what follows an opening is a call. `special_id`: the id of a marker that
    is a token by itself."""

    def marker(text: str) -> str:
        id = special_id(text)
        return f"<[{id}]>" if id is not None else lark_string(text)

    def sequence(*parts: str) -> str:
        return " ".join(filter(None, parts))

    blank = lark_string(format.blank) if format.blank else ""
    closing = sequence(blank, marker(format.closing)) if format.closing else ""
    separator = lark_string(format.separator)
    more = f"{{0,{MAX_CALLS - 1}}}" if parallel else ""
    lines = [f"call: {' | '.join(f'call_{n}' for n in range(len(tools)))}"]
    lines += _calls(format, tools)
    if format.listed:
        lines.append(f'calls: "[" call {f"({separator} call){more}" if more else ""} "]"')
    if format.bare:
        lines.append(f"calls: call {f'({separator} call){more}' if more else ''}")
        return _lark("start: calls" if forced else r"start: calls | /[^{\s](.|\n)*/", lines)
    body = "calls" if format.listed else sequence(blank, "call", closing)
    if forced:
        one = sequence(marker(format.opening), body)
        repeated = more and not format.listed
        return _lark("start: one" + (f" ({separator} one){more}" if repeated else ""), [f"one: {one}", *lines])
    if special_id(format.opening) is not None:
        opened = sequence("TEXT", marker(format.opening), body)
    else:
        lines.append(f"opening[lazy]: TEXT {lark_string(format.opening)}")
        opened = sequence("opening", body)
    many = f"{{0,{MAX_CALLS if parallel else 1}}}"
    return _lark(f"start: (opened){many} rest", [f"opened: {opened}", "rest: TEXT", r"TEXT: /(.|\n)*/", *lines])


def _calls(format: ToolFormat, tools: Mapping[str, Any]) -> list[str]:
    lines = []
    for number, (name, schema) in enumerate(tools.items()):
        begin = f'{{"name": {json.dumps(name)}, "{format.arguments_key}": '
        with_options = json.dumps({**schema, "x-guidance": _JSON_OPTIONS})
        lines.append(f'call_{number}: {lark_string(begin)} arguments_{number} "}}"')
        lines.append(f"arguments_{number}: %json {with_options}")
    return lines


def _lark(start: str, lines: Sequence[str]) -> str:
    return "\n".join(["%llguidance {}", start, *lines])
