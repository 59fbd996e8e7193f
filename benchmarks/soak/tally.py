"""What came of the requests and orders: counted, with a few examples of what went wrong. Shared by requests and orders; judges nothing."""

from collections import Counter
from dataclasses import dataclass, field

_MAX_EXAMPLES = 20


@dataclass
class Tally:
    """`wrong`: answered by something else than what the name meant, or not as before. `lost`: no whole answer, or an error that nothing
    explains; orders that failed among them."""

    done: Counter[str] = field(default_factory=Counter)  # kind -> how often it ended as it should
    num_wrong: int = 0
    num_lost: int = 0
    examples: list[str] = field(default_factory=list)

    def wrong(self, words: str) -> None:
        """An answer that must not be."""
        self.num_wrong += 1
        self._show(f"wrong: {words}")

    def lost(self, words: str) -> None:
        """A request or an order without its answer."""
        self.num_lost += 1
        self._show(f"lost: {words}")

    def _show(self, words: str) -> None:
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(words)
            print(words, flush=True)
