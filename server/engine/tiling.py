"""Rows of a step as tiles of one adapter each, and the kernels that add their deltas. The link between a batch and kernels.grouped.

Owns the scratch that the kernels share, and the launch choices by group and number of rows. Rows and adapters come from the runner.
"""

import numpy as np
import torch

from server.kernels.grouped import NONE, GroupShape, Tiles, empty_tiles, make_tiles, new_scratch
from server.kernels.launch import Card, Choice, block_m_of, card_of, choose, max_split_k
from server.model.forward import ForwardState

WARM_ROWS = (8, 512, 1024)  # one of each line of launch.py's tables


class Tiling:
    """Tiles for steps of up to `max_rows` rows, and `add`, which a group calls with its product."""

    def __init__(self, state: ForwardState, arena: torch.Tensor, max_rows: int) -> None:
        from server.kernels.grouped_kernels import apply_group  # needs Triton

        self._apply, self._state, self._arena, self._device = apply_group, state, arena, arena.device
        self.card = self._card()
        self.max_rows = max_rows
        sizes = {min(max_rows, 1 << power) for power in range(max_rows.bit_length() + 1)}
        self._scratch = new_scratch(1, max(max_split_k(self.card, n) * n for n in sizes), self._device)[0]  # [planes * rows, ranks]
        self._choices: dict[tuple[int, GroupShape], Choice] = {}

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
                self._state.tiles = tiles
                try:
                    self.add(y, x, shape)
                finally:
                    self._state.clear()

    def tiles_for(self, bases: np.ndarray) -> Tiles | None:
        """Tiles of a step that runs uncaptured, from each row's adapter (int64 [rows], -1: the base); None if there are only base rows."""
        if not (bases >= 0).any():
            return None
        arrays = make_tiles(bases, self.block_m(len(bases)))
        return Tiles(
            self._to_device(np.append(arrays.tile_base, NONE)),
            self._to_device(np.append(arrays.tile_start, np.int32(0))),
            self._to_device(np.append(arrays.tile_len, np.int32(0))),
            self._to_device(np.resize(arrays.row_ids, len(bases))),
            self.block_m(len(bases)),
        )

    def add(self, y: torch.Tensor, x: torch.Tensor, shape: GroupShape) -> None:
        """Every row's delta at a group, by the step's tiles: y [rows, sum of outs] in place, x [rows, in]."""
        num_rows, tiles = y.shape[0], self._state.tiles
        choice = self._choices.get((num_rows, shape))
        if choice is None:
            if len(self._choices) > 65536:  # uncaptured steps have any number of rows
                self._choices.clear()
            choice = self._choices[num_rows, shape] = choose(self.card, num_rows, shape)
        row_cap = tiles.row_ids.numel()
        scratch = self._scratch[: choice.split_k * row_cap].view(choice.split_k, row_cap, -1)
        self._apply(y, x, self._arena, shape, tiles, scratch, choice)

    def _card(self) -> Card:
        if self._device.type != "cuda":
            return card_of((0, 0), 1)
        properties = torch.cuda.get_device_properties(self._device)
        return card_of((properties.major, properties.minor), properties.multi_processor_count)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor
