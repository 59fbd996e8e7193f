"""Which steps are captured as CUDA graphs, at which padded sizes, and in what order. No tensors, and nothing of CUDA.

A capture takes a tenth of a second, most of it Python's, and there are more than a hundred: so an engine starts with those that can stand
in for all others, and has the rest captured while it has nothing else to do, or as steps want them. engine.graphs captures them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

MAX_MIXED_ROWS = 2048  # beyond, the device is busy for longer than the launches take


class Variant(NamedTuple):
    """What the adapters of a step do: bit s of `slots` for slot s of the layers (ForwardState.slots), 0 for the base alone.
    `has_gains`: some scale the base's products (DoRA)."""

    slots: int = 0
    has_gains: bool = False


class GraphSize(NamedTuple):
    """What a graph is captured for: decode rows, or (`num_sequences`) rows of any kind of up to so many sequences."""

    num_rows: int
    num_sequences: int | None = None


Key = tuple[GraphSize, Variant]


def decode_sizes(max_rows: int) -> list[GraphSize]:
    """Numbers of decode rows that are captured. Never one: a size of one is compiled by itself, and two cost the same."""
    sizes = [2, 4, *range(8, min(max_rows, 64) + 1, 8), *range(96, max_rows + 1, 32)]
    return [GraphSize(size) for size in sorted({*(size for size in sizes if size < max_rows), max(2, max_rows)})]


def mixed_sizes(max_rows: int, max_sequences: int) -> list[GraphSize]:
    """Numbers of rows of steps with prompts in them that are captured: multiples of 16, four to each doubling from 64 on."""
    max_rows, sizes, step = min(max_rows, MAX_MIXED_ROWS), [16], 16
    while sizes[-1] < max_rows:
        if sizes[-1] >= 8 * step:
            step *= 2
        sizes.append(min(sizes[-1] + step, max_rows))
    return [GraphSize(size, min(size, max_sequences)) for size in sizes if size <= max_rows]


def first_sizes(sizes: Sequence[GraphSize]) -> list[GraphSize]:
    """Of sizes in ascending order those to start with, the largest first: each at most half as large as the one before. A step is padded to
    some two to four times its rows at most."""
    first: list[GraphSize] = []
    for size in reversed(sizes):
        if not first or 2 * size.num_rows <= first[-1].num_rows or size == sizes[0]:
            first.append(size)
    return first


def variants_of(num_slots: int) -> list[Variant]:
    """The variants that are captured, each before those that could stand in for it. A slot that no adapter of a step touches costs a
    product, noughts and their sum: so the first one alone, the attention's input, where most small adapters are, is a variant."""
    every = (1 << num_slots) - 1
    return list(dict.fromkeys([Variant(), Variant(1 & every), Variant(every), Variant(every, has_gains=True)]))


class Captures:
    """The graphs there are, by size and variant, and those that are still to be captured."""

    def __init__(self, decode: Sequence[GraphSize], mixed: Sequence[GraphSize], variants: Sequence[Variant]) -> None:
        """Sizes in ascending order, variants as of `variants_of`."""
        self.graphs: dict[Key, Any] = {}
        self._decode, self._mixed, self._variants = decode, mixed, variants
        self._wanted: dict[Key, None] = {}  # of those left, by a step; whose wish is the oldest first
        first = {*first_sizes(decode), *first_sizes(mixed)}
        sizes = sorted([*decode, *mixed], key=lambda size: size.num_rows, reverse=True)
        # Deltas are computed beside the products, gains behind them. Steps with prompts and gains run uncaptured.
        keys = [(size, variant) for size in sizes for variant in variants if not (size.num_sequences and variant.has_gains)]
        self._left = dict.fromkeys(sorted(keys, key=lambda key: key[0] not in first))  # of both the largest first

    def num_left(self, *, only_wanted: bool = False) -> int:
        """How many are still to be captured, or how many of them steps wanted."""
        return len(self._wanted if only_wanted else self._left)

    def first(self) -> list[Key]:
        """What is to be captured before the first step, the largest first, so that the smaller ones find their memory in its pool."""
        first = {*first_sizes(self._decode), *first_sizes(self._mixed)}
        return [key for key in self._left if key[0] in first]

    def next(self, *, only_wanted: bool = False) -> Key | None:
        """The one to capture next, what steps wanted before all else; None if there is none."""
        return next(iter(self._wanted), None) or (None if only_wanted else next(iter(self._left), None))

    def add(self, key: Key, graph: Any) -> None:
        """It is captured."""
        self.graphs[key] = graph
        self._left.pop(key, None)
        self._wanted.pop(key, None)

    def give_up(self) -> None:
        """Capture no more; what there is stands in."""
        self._left.clear()
        self._wanted.clear()

    def find(self, num_rows: int, wanted: Variant, *, is_decode: bool) -> Key | None:
        """The graph for a step of so many rows: of the smallest size that has room for them; while that is still to be captured, which is
        noted as a wish, of a larger one. None if there is none that does what the step's adapters do."""
        variant = next(v for v in self._variants if v.has_gains == wanted.has_gains and not wanted.slots & ~v.slots)
        # As many sequences as rows is the most that a mixed size below the most sequences has; a step never has more of them than rows.
        wish: Key | None = None
        for size in self._decode if is_decode else self._mixed:
            key = size, variant
            if size.num_rows >= num_rows and key in self.graphs:
                return key
            if size.num_rows >= num_rows and wish is None and key in self._left:
                wish = key
                self._wanted[key] = None
        return None
