"""Calls of tools, read out of an answer while it comes: content, then names, then arguments piece by piece.

Owns the reading alone: it does not judge whether arguments meet a schema, and gives back as content what turned out to be no call. Knows
neither tokens nor HTTP. One ToolCallReader belongs to one sequence; api.tools feeds it.
"""

from collections.abc import Collection
from dataclasses import dataclass

from server.api.call_json import MAX_NAME_CHARS, CallObject, JsonValue
from server.api.tool_formats import ToolFormat

_BLANKS = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The answer's call number `index`, from 0, is of this function."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of that call's arguments: joined they are JSON as the model wrote it."""

    index: int
    text: str


Piece = Content | CallStart | CallArguments


class ToolCallReader:
    """Pieces of an answer. `known`: the functions that were offered; where a format has calls without a marker, others are just JSON."""

    def __init__(self, format: ToolFormat, known: Collection[str]) -> None:
        self._format, self._known = format, known
        self._state = "text"
        self._held = ""  # text state: may be a marker's beginning, or blanks before one. Else: what is given back if it is no call
        self._num_calls = 0
        self._bare = False  # in a call that no marker opened
        self._committed = False  # the call has been shown
        self._in_list = False
        self._began = False  # some content came that was not blank
        self._object = CallObject()
        self._value = JsonValue()
        self._name = ""

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._num_calls

    def feed(self, text: str) -> list[Piece]:
        """What is certain now that `text` came."""
        pieces: list[Piece] = []
        if self._state == "text":
            self._read_text(text, pieces)
        else:
            for position, char in enumerate(text):
                self._read_call(char, pieces)
                if self._state == "text":
                    self._read_text(text[position + 1 :], pieces)
                    break
        return _joined(pieces)

    def finish(self) -> list[Piece]:
        """What was held back, once nothing more comes: blanks after calls are dropped, an unfinished call stays unfinished."""
        held, self._held = self._held, ""
        lost = self._state == "between" or not held or (self._num_calls > 0 and not held.strip())
        return [] if lost else [Content(held)]

    def _read_text(self, text: str, pieces: list[Piece]) -> None:
        self._held += text
        opening = self._format.opening
        if self._format.bare and not self._began and self._held.lstrip()[:1] == "{":
            rest, self._held, self._bare = self._held, "", True
            self._enter("object", rest, pieces)
            return
        start = self._held.find(opening)
        if start >= 0:
            before, rest = self._held[:start], self._held[start + len(opening) :]
            self._show(before.rstrip(), pieces)
            self._held, self._bare = self._held[len(before.rstrip()) : start] + opening, False
            self._enter("opened", rest, pieces)
            return
        end = len(self._held)
        for length in range(min(len(opening) - 1, end), 0, -1):
            if self._held.endswith(opening[:length]):
                end -= length
                break
        shown = self._held[:end].rstrip()
        self._held = self._held[len(shown) :]
        self._show(shown, pieces)

    def _show(self, text: str, pieces: list[Piece]) -> None:
        if text:
            self._began = True
            pieces.append(Content(text))

    def _enter(self, state: str, rest: str, pieces: list[Piece]) -> None:
        self._state = state
        self._object, self._value, self._name, self._in_list, self._committed = CallObject(), JsonValue(), "", False, False
        pieces += self.feed(rest)

    def _read_call(self, char: str, pieces: list[Piece]) -> None:
        self._held += char
        match self._state:
            case "opened":
                self._read_opened(char, pieces)
            case "object":
                self._object.add(char)
                self._read_object(pieces)
            case "name":
                self._read_name(char, pieces)
            case "arguments":
                if self._value.add(char):
                    pieces.append(CallArguments(self._num_calls - 1, char))
                self._held = ""
                if self._value.ended:
                    self._state = "text"
            case "between":
                self._read_between(char, pieces)

    def _read_opened(self, char: str, pieces: list[Piece]) -> None:
        if char in _BLANKS:
            return
        if char == "{":
            self._state = "object"
            self._object.add(char)
        elif char == "[" and self._format.listed and not self._in_list:
            self._in_list = True
        elif self._format.named and not self._in_list:
            self._state = "name"
            self._read_name(char, pieces)
        else:
            self._give_back(pieces)

    def _read_object(self, pieces: list[Piece]) -> None:
        call = self._object
        if not self._committed and call.name is not None and not call.broken:
            if self._bare and call.name not in self._known:
                self._give_back(pieces)
                return
            self._begin(call.name, pieces)
        if self._committed:
            self._held = ""
            if fresh := call.take():
                pieces.append(CallArguments(self._num_calls - 1, fresh))
        if call.broken:
            self._give_back(pieces)
        elif call.ended:
            self._state = "between"

    def _begin(self, name: str, pieces: list[Piece]) -> None:
        """From here on it is a call, whatever follows."""
        pieces.append(CallStart(self._num_calls, name))
        self._num_calls += 1
        self._committed, self._began, self._held = True, True, ""

    def _read_name(self, char: str, pieces: list[Piece]) -> None:
        self._name += char
        name = self._name.partition("[")[0].removesuffix("{").strip()  # a call's id may stand between the name and [ARGS]
        if char == "{" and name:
            self._begin(name, pieces)
            self._state = "arguments"
            self._value.add(char)
            pieces.append(CallArguments(self._num_calls - 1, char))
        elif len(self._name) > MAX_NAME_CHARS or char in "{\n":
            self._give_back(pieces)

    def _read_between(self, char: str, pieces: list[Piece]) -> None:
        """After a call: its closing marker; without one, a separator and the next call, or the list's end."""
        closing = self._format.closing
        if closing and closing.startswith(self._held.strip()):
            if self._held.strip() == closing:
                self._held, self._state = "", "text"
        elif not closing and char == "{":
            self._state, self._object, self._committed = "object", CallObject(), False
            self._object.add(char)
        elif char == "]" and self._in_list:
            self._held, self._state = "", "text"
        elif closing or char not in _BLANKS + ",;":
            self._give_back(pieces)

    def _give_back(self, pieces: list[Piece]) -> None:
        """It is no call (or no more of one): what is held is content."""
        held, self._held, self._state = self._held, "", "text"
        self._bare = False
        if held.strip():
            self._show(held, pieces)


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind as one."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + piece.text)
        elif isinstance(piece, CallArguments) and isinstance(last, CallArguments) and last.index == piece.index:
            joined[-1] = CallArguments(piece.index, last.text + piece.text)
        else:
            joined.append(piece)
    return joined
