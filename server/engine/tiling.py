"""Rows of a step as tiles of one adapter each, and when the kernels of their deltas run. The link between a batch and kernels.grouped.

Owns the scratch that the kernels share, and the launch choices by group and number of rows. Rows and adapters come from the runner.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

from server.kernels.grouped import NONE, ZERO, GroupShape, Tiles, empty_tiles, make_tiles, new_scratch
from server.kernels.launch import Card, Choice, block_m_of, card_of, choose, max_split_k
from server.model.forward import ForwardState
from server.model.linear import Accumulate, Compute

WARM_ROWS = (8, 512, 2048)  # one of each line of launch.py's tables
_Operands = tuple[torch.Tensor, GroupShape, Tiles, torch.Tensor, Choice]  # arena, shape, tiles, scratch, choice


class Tiling:
    """Tiles for steps of up to `max_rows` rows, and what runs a group's product with its deltas (model.linear's TileDeltas)."""

    def __init__(
        self,
        state: ForwardState,
        arena: torch.Tensor,
        max_rows: int,
        choose: Callable[[Card, int, GroupShape, int], Choice] = choose,
    ) -> None:
        from server.kernels import gated_kernels, grouped_kernels  # need Triton

        self._kernels, self._gated, self._state, self._arena, self._device = grouped_kernels, gated_kernels, state, arena, arena.device
        self._choose = choose
        self.card = self._card()
        self.max_rows = max_rows
        sizes = {min(max_rows, 1 << power) for power in range(max_rows.bit_length() + 1)}
        self._scratch = new_scratch(1, max(max_split_k(self.card, n) * n for n in sizes), self._device)[0]  # [planes * rows, ranks]
        self._choices: dict[tuple[int, GroupShape], Choice] = {}
        self._side: torch.cuda.Stream | None = None  # of captured steps: another stream, for what runs beside the base's products
        self._is_captured = False

    def block_m(self, num_rows: int) -> int:
        """Rows of a tile in a step of so many rows."""
        return block_m_of(self.card, num_rows)

    def warm_up(self, shapes: list[GroupShape]) -> None:
        """Have the kernels of every kind of step compiled: the first step that needs one would stop everybody for seconds."""
        for num_rows in sorted({min(num_rows, self.max_rows) for num_rows in WARM_ROWS}):
            tiles = empty_tiles(2, num_rows, self.block_m(num_rows), self._device)
            for shape in {shape[:2]: shape for shape in shapes}.values():
                x = torch.zeros(num_rows, shape.in_features, dtype=self._arena.dtype, device=self._device)
                y = torch.zeros(num_rows, shape.out_features, dtype=self._arena.dtype, device=self._device)
                for adds in (False, True):
                    self._state.tiles, self._state.has_gains = tiles, not adds
                    try:
                        self.around(x, shape, lambda y=y: y, lambda y: None)
                        if not adds and self._gated.is_gated(shape):
                            self.gated(x, shape, lambda y=y: y)
                            self.silu_mul(y)
                    finally:
                        self._state.clear()

    def tiles_for(self, bases: np.ndarray) -> Tiles | None:
        """Tiles of a step that runs uncaptured, from each row's adapter (int64 [rows], -1: the base); None if there are only base rows."""
        if not (bases >= 0).any():
            return None
        arrays = make_tiles(np.where(bases < 0, ZERO, bases), self.block_m(len(bases)))
        return Tiles(
            self._to_device(np.append(arrays.tile_base, NONE)),
            self._to_device(np.append(arrays.tile_start, np.int32(0))),
            self._to_device(np.append(arrays.tile_len, np.int32(0))),
            self._to_device(arrays.row_ids),
            self.block_m(len(bases)),
        )

    @contextmanager
    def captured(self) -> Iterator[None]:
        """A step that is captured, or tried before that: a graph's branches cost nothing to launch, so kernels run beside the products."""
        self._is_captured = True
        try:
            yield
        finally:
            self._is_captured = False

    def around(self, x: torch.Tensor, shape: GroupShape, compute: Compute, accumulate: Accumulate | None) -> torch.Tensor:
        """x [rows, in] -> [rows, sum of outs]: the group's product with every row's delta, by the step's tiles.

        `compute()` is the product; `accumulate(y)`, where there is one, adds it to y in place. Tiles hold every row."""
        operands = self._operands(shape, self._choice(x.shape[0], shape))
        if accumulate is not None and not self._state.has_gains:  # so that the product's output is read once less
            y = torch.empty(x.shape[0], shape.out_features, dtype=x.dtype, device=x.device)
            self._kernels.shrink(x, *operands)
            self._kernels.write(y, *operands)
            accumulate(y)
        else:
            y = compute()
            self._kernels.apply_group(y, x, *operands)
        return y

    def gated(self, x: torch.Tensor, shape: GroupShape, compute: Compute) -> torch.Tensor:
        """x [rows, in] -> silu(gate) * up [rows, half of sum of outs] of the product `compute()` and the rows' deltas. For steps without
        gains, and tiles that hold every row."""
        operands = self._operands(shape, self._choice(x.shape[0], shape)._replace(pdl=False))  # the product runs in between
        self._kernels.shrink(x, *operands)
        out = torch.empty(x.shape[0], shape.out_features // 2, dtype=x.dtype, device=x.device)
        self._gated.gate(compute(), *operands, out)
        return out

    def silu_mul(self, y: torch.Tensor) -> torch.Tensor:
        """y [rows, 2 width] -> silu(gate) * up [rows, width]."""
        return self._gated.silu_mul(y)

    def apart(self, x: torch.Tensor, shape: GroupShape, compute: Compute, *, goes_first: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """x [rows, in] -> the product `compute()` and the rows' deltas, both [rows, sum of outs]; where a step is captured, computed beside
        each other, and launched in the order that `goes_first` says of the product: who comes first has the SMs it wants. For steps without
        gains, and tiles that hold every row."""
        arena, shape, tiles, scratch, choice = self._operands(shape, self._choice(x.shape[0], shape))
        deltas = torch.empty(x.shape[0], shape.out_features, dtype=x.dtype, device=self._device)
        # No group begins before the group before is done with its planes: it needs that one's output. So one scratch is enough.
        # What follows another stream's work has no one predecessor: no programmatic launch.
        operands = arena, shape, tiles, scratch, choice._replace(pdl=False)
        side = self._side_stream() if self._is_captured else None
        y = compute() if goes_first else None
        with nullcontext() if side is None else torch.cuda.stream(side):
            self._kernels.shrink(x, *operands)
            self._kernels.write(deltas, *operands)
        y = compute() if y is None else y
        if side is not None:
            torch.cuda.current_stream(self._device).wait_stream(side)
        return y, deltas

    def _side_stream(self) -> torch.cuda.Stream:
        """One that runs beside the current stream, from what that has got so far."""
        current = torch.cuda.current_stream(self._device)
        # torch hands out the same few streams in turns: the next one may be the very stream that captures.
        while self._side is None or self._side.cuda_stream == current.cuda_stream:
            self._side = torch.cuda.Stream(self._device)
        self._side.wait_stream(current)
        return self._side

    def _operands(self, shape: GroupShape, choice: Choice) -> _Operands:
        tiles = self._state.tiles
        row_cap = tiles.row_ids.numel()
        scratch = self._scratch[: choice.split_k * row_cap].view(choice.split_k, row_cap, -1)
        return self._arena, shape, tiles, scratch, choice

    def _choice(self, num_rows: int, shape: GroupShape) -> Choice:
        choice = self._choices.get((num_rows, shape))
        if choice is None:
            if len(self._choices) > 65536:  # uncaptured steps have any number of rows
                self._choices.clear()
            choice = self._choices[num_rows, shape] = self._choose(self.card, num_rows, shape, self._arena.element_size())
        return choice

    def _card(self) -> Card:
        if self._device.type != "cuda":
            return card_of((0, 0), 1)
        properties = torch.cuda.get_device_properties(self._device)
        return card_of((properties.major, properties.minor), properties.multi_processor_count)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor
