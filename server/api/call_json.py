"""JSON of a call, character by character: where a value ends, and what of a call's object is known so far.

Owns the scanning alone. Knows neither markers nor answers; api.tool_calls feeds it.
"""

import json

_ARGUMENT_KEYS = ("arguments", "parameters")
_BLANKS = " \t\r\n"
MAX_NAME_CHARS = 256


class JsonValue:
    """One JSON value, character by character: where it ends. Only its nesting and its strings are looked at."""

    def __init__(self) -> None:
        self.text = ""
        self.ended = False
        self._depth = 0
        self._in_string = self._escaped = False

    def add(self, char: str) -> bool:
        """Whether the character belongs to the value (blanks before it do not)."""
        if not self.text and char in _BLANKS:
            return False
        if self._in_string:
            self.text += char
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                self.ended = self._depth == 0
            return True
        if self._depth == 0 and self.text and (char in ",]}" or char in _BLANKS):  # after a number, true, false or null
            self.ended = True
            return False
        self.text += char
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.ended = self._depth <= 0
        return True


class CallObject:
    """One object {"name": ..., "arguments": {...}}, character by character. `take` returns what is new of the arguments."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.ended = self.broken = False
        self._expects = "open"
        self._key = ""
        self._value = JsonValue()
        self._has_arguments = False
        self._fresh = ""

    def take(self) -> str:
        """Arguments that came since the last time."""
        fresh, self._fresh = self._fresh, ""
        return fresh

    def add(self, char: str) -> None:
        """The next character; `ended` after the object's last one, `broken` if it is no such object."""
        if self._expects in ("key", "value"):
            self._add_to_value(char)
            return
        if char in _BLANKS:
            return
        following = {("open", "{"): "key", ("colon", ":"): "value", ("comma", ","): "key", ("comma", "}"): "end"}
        self._expects = following.get((self._expects, char), "nothing")
        self._value = JsonValue()
        if self._expects == "end":
            self.ended = True
            if not self._has_arguments:
                self._fresh = "{}"
        self.broken = self._expects == "nothing" or (self.ended and self.name is None)

    def _add_to_value(self, char: str) -> None:
        value = self._value
        if not value.text and char not in _BLANKS and self._expects == "key" and char != '"':
            self.broken = True
            return
        belongs = value.add(char)
        streams = self._expects == "value" and self._key in _ARGUMENT_KEYS and value.text[:1] == "{"
        if belongs and streams:
            self._has_arguments = True
            self._fresh += char
        if value.ended:
            self._end_value(streams)
            if not belongs:
                self.add(char)

    def _end_value(self, streamed: bool) -> None:
        value, self._value = self._value.text, JsonValue()
        if self._expects == "key":
            self._key, self._expects = _text(value) or "", "colon"
            return
        self._expects = "comma"
        if self._key == "name":
            self.name = _text(value)
            self.broken = not self.name or len(self.name) > MAX_NAME_CHARS
        elif self._key in _ARGUMENT_KEYS and not streamed:  # some models write the arguments' JSON as a string, or null for none
            self._has_arguments = True
            self._fresh += _text(value) or ("{}" if value in ("null", '""') else value)


def _text(value: str) -> str | None:
    """The string that a JSON string stands for."""
    try:
        parsed = json.loads(value)
    except ValueError:
        return None
    return parsed if isinstance(parsed, str) else None
