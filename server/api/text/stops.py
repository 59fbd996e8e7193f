"""Stop strings in a growing text, wherever the borders of tokens fall.

Meaning: generation ends at the first character with which the text so far ends in a stop string; of several that end there the longest
counts. Owns the text that is held back because it may be a stop string's beginning. One StopFinder belongs to one sequence.
"""

from collections.abc import Sequence


class StopFinder:
    """`keep`: the stop string itself stays in the text (LoRAX) or is cut off (OpenAI). Only then is text held back."""

    def __init__(self, stops: Sequence[str], *, keep: bool) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._keep = keep
        self._text = ""  # the tail in which a stop string may be beginning
        self._num_shown = 0  # characters of it that were already returned
        self.found: str | None = None

    def add(self, text: str) -> str:
        """What may be shown of the text so far and was not yet. Once `found` is set, there is no more."""
        if self.found is not None or not self._stops:
            return "" if self.found is not None else text
        self._text += text
        match = min(((start + len(stop), -len(stop), stop) for stop in self._stops if (start := self._text.find(stop)) >= 0), default=None)
        if match is not None:
            end, negative_len, self.found = match
            return self._show(end if self._keep else end + negative_len)
        tail = self._possible_stop_len()
        fresh = self._show(len(self._text) if self._keep else len(self._text) - tail)
        drop = len(self._text) - tail
        self._text, self._num_shown = self._text[drop:], self._num_shown - drop
        return fresh

    def flush(self) -> str:
        """What was held back, once nothing more comes."""
        return "" if self.found is not None else self._show(len(self._text))

    def _show(self, end: int) -> str:
        fresh = self._text[self._num_shown : end]
        self._num_shown = max(self._num_shown, end)
        return fresh

    def _possible_stop_len(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        text = self._text
        for length in range(min(len(text), len(self._stops[0]) - 1), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
