"""How long a product takes while deltas are computed beside it, by made-up adapters, before any real one is there.

A captured step has both on the card at once (Tiling.apart). Which kernel of a product is fastest alone says little about that: one that
fills every SM leaves the deltas none until it ends (LOG.md). Called by model/fastest.py, through engine/backends.py.
"""

from collections.abc import Sequence

import numpy as np
import torch

from server.engine.tiling import Tiling
from server.kernels.grouped import (
    BASE_BYTES,
    DESC_WIDTH,
    MAX_SITES,
    NONE,
    GroupShape,
    SiteEntry,
    Tiles,
    describe,
    empty_tiles,
    fill_tiles,
    make_tiles,
)
from server.model.fastest import Gemm, seconds_of
from server.model.forward import ForwardState

RANK, NUM_ADAPTERS = 16, 24  # of the made-up adapters at every site; that a step's rows have, if it has so many
_NUM_SETS = 4  # of adapters, which take turns so that none is in the cache


class Beside:
    """Seconds of one group's product beside its deltas (fastest.Timer). It uses the arena's first elements, and leaves noughts there."""

    def __init__(self, tiling: Tiling, state: ForwardState, arena: torch.Tensor, shape: GroupShape) -> None:
        """`arena` [elements]: nobody else uses it before the last call."""
        self._tiling, self._state, self._arena, self._shape = tiling, state, arena, shape
        self._sets: list[Tiles] = []
        self._num_rows = self._num_used = 0  # of the sets; elements

    def __call__(self, gemm: Gemm, x: torch.Tensor, weights: Sequence[torch.Tensor], *, goes_first: bool = False) -> float:
        """As fastest.seconds_of; `goes_first` as of Tiling.apart. RuntimeError if there can be no such adapters, or the arena has no room
        for those of so many rows."""
        if self._num_rows != len(x):
            self._sets, self._num_rows = self._make_sets(len(x)), len(x)
        num_calls = 0

        def both(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal num_calls
            self._state.tiles, num_calls = self._sets[num_calls % len(self._sets)], num_calls + 1
            return self._tiling.apart(x, self._shape, lambda: gemm(x, weight), goes_first=goes_first)

        try:
            with self._tiling.captured():
                return seconds_of(both, x, weights)
        finally:
            self._state.clear()

    def close(self) -> None:
        """Leave the arena as it was."""
        self._arena[: self._num_used].zero_()

    def _make_sets(self, num_rows: int) -> list[Tiles]:
        descriptor, size = _lay_out(self._shape, self._arena.element_size())
        block_m, device = self._tiling.block_m(num_rows), self._arena.device
        num_adapters = min(num_rows, NUM_ADAPTERS)
        count = min(_NUM_SETS * num_adapters, self._arena.numel() // size)
        if count < num_adapters:
            raise RuntimeError(f"the arena has room for {count} of {num_adapters} adapters to try products with")
        self._num_used = max(self._num_used, count * size)
        self._arena[: count * size].view(descriptor.dtype).view(count, size)[:, : descriptor.numel()] = descriptor.to(device)
        bases = np.arange(count, dtype=np.int64) * size
        sets = []
        for first in range(0, count - num_adapters + 1, num_adapters):
            tiles = empty_tiles(num_rows + 1, num_rows, block_m, device)  # as many as a captured step has room for
            fill_tiles(tiles, make_tiles(bases[first + np.arange(num_rows) * num_adapters // num_rows], block_m))
            sets.append(tiles)
        return sets


def _lay_out(shape: GroupShape, item_bytes: int) -> tuple[torch.Tensor, int]:
    """A made-up adapter's descriptors up to the group's, as elements of so many bytes, and the elements of its run. RuntimeError for a
    group that the kernels cannot say."""
    if len(shape.columns) > MAX_SITES:
        raise RuntimeError(f"a group of {len(shape.columns)} linears has its deltas by torch, never beside its product")
    step = BASE_BYTES // item_bytes
    a = -(-(shape.index + 1) * DESC_WIDTH * 8 // BASE_BYTES) * step
    at, sites = a + RANK * len(shape.columns) * shape.in_features, []
    for index, (start, stop) in enumerate(shape.columns):
        sites.append(SiteEntry(r_start=RANK * index, r_stop=RANK * (index + 1), b=at))
        at += RANK * (stop - start)
    rows = np.full((shape.index + 1, DESC_WIDTH), NONE, np.int64)
    rows[-1] = describe(a, RANK * len(shape.columns), sites)
    dtype = {2: torch.int16, 4: torch.int32}[item_bytes]
    return torch.from_numpy(rows.reshape(-1)).view(dtype), -(-at // step) * step
