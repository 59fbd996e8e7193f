"""Tokens to text, one at a time, never half a character.

Owns the window of recent tokens that is decoded again with each new one: a token's text depends on those before it (spaces, bytes of one
character). Does not know of stop strings. One Detokenizer belongs to one sequence; api.sequence feeds it.
"""

from collections.abc import Sequence

from server.api.text.tokenizer import Tokenizer

CONTEXT_LEN = 5  # prompt tokens decoded along, so that the first word keeps its space
_INCOMPLETE = "\ufffd"
_MAX_HELD = 64  # tokens; a character has at most 4 bytes, so what is still broken by then is no character


class Detokenizer:
    """The text of a growing list of tokens; what `add` and `flush` returned, joined, is the text of all of them."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = [id for id in prompt_ids[-CONTEXT_LEN:] if id < tokenizer.num_ids]
        self._shift(0)

    def _shift(self, read: int) -> None:
        """Let the window begin at `read`; all that is in it has been returned."""
        self._ids = self._ids[read:]
        self._read = len(self._ids)
        self._seen = self._tokenizer.decode_one(self._ids[0]) if self._read == 1 else self._tokenizer.decode(self._ids)
        self._num_returned = 0  # characters after self._seen

    def add(self, id: int) -> str:
        """Text that is certain now that `id` came; "" while a character is incomplete, or for a special token."""
        if self._tokenizer.is_special(id):
            return ""
        self._ids.append(id)
        text = self._tokenizer.decode(self._ids)[len(self._seen) :]
        settled = text.rstrip(_INCOMPLETE) if len(self._ids) - self._read < _MAX_HELD else text
        fresh = settled[self._num_returned :]
        if len(settled) == len(text):
            self._shift(self._read)
        else:
            self._num_returned = max(self._num_returned, len(settled))
        return fresh

    def flush(self) -> str:
        """What is still held back, broken characters as U+FFFD."""
        rest = self._tokenizer.decode(self._ids)[len(self._seen) + self._num_returned :]
        self._shift(self._read)
        return rest
