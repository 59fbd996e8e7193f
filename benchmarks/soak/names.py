"""What each name means, and what it may have meant while a request was open. The soak's own truth: it asks the server nothing.

A meaning holds from the moment that the order for it is sent, and the one before it until that order is answered: in between either is
right. From the answer on only the new one is.
"""

import asyncio
import math
import random
from dataclasses import dataclass, field

ABSENT = -1  # no such adapter
_REMEMBERED_S = 1.5  # api.adapters remembers for a second that a source has no such adapter
_KEPT = 16  # meanings of a name; far more than change while one request is open


@dataclass
class Meaning:
    """A mark, or ABSENT, and when the name may have meant it, in monotonic seconds."""

    mark: int
    from_at: float
    until_at: float = math.inf


@dataclass
class Name:
    """One adapter's name. `published`: it is changed by orders to the server, else by changing its folder in the source."""

    id: str
    published: bool
    meanings: list[Meaning] = field(default_factory=list)
    pinned: bool = False
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)  # one change of a name at a time; requests do not look at it

    @property
    def mark(self) -> int:
        """What it means now."""
        return self.meanings[-1].mark if self.meanings else ABSENT

    def begin(self, mark: int, now: float) -> None:
        """An order is about to be sent that gives it this meaning."""
        self.meanings = [*self.meanings[-_KEPT:], Meaning(mark, now)]

    def end(self, now: float) -> None:
        """The order was carried out: what it meant before holds no more."""
        for before in self.meanings[:-1]:
            late_s = _REMEMBERED_S if before.mark == ABSENT and not self.published else 0.0
            before.until_at = min(before.until_at, now + late_s)

    def could_mean(self, from_at: float, until_at: float) -> set[int]:
        """Every mark (or ABSENT) that is right for a request that was open in that time."""
        return {one.mark for one in self.meanings if one.from_at <= until_at and one.until_at >= from_at} or {ABSENT}


class Popularity:
    """Zipf: a few names get most of the requests, all get some."""

    def __init__(self, names: list[Name], exponent: float = 0.9) -> None:
        self._names = names
        self._weights = [1 / (rank + 1) ** exponent for rank in range(len(names))]

    def choose(self, rng: random.Random) -> Name:
        """A name."""
        return rng.choices(self._names, self._weights)[0]
