"""Decode steps as CUDA graphs: the decoder alone, at padded numbers of rows, with adapters and without.

Owns the buffers that a graph reads and writes. A replay is: plan the attention, refresh the buffers with three copies, launch. Nothing in a
graph depends on what there was at its capture: tables and tiles are read from the buffers, whose unused rest says so itself.
"""

import logging
from collections.abc import Callable

import numpy as np
import torch

from server.engine.batch import Batch
from server.engine.tiling import Tiling
from server.kernels.grouped import NONE, Tiles, make_tiles
from server.model.base import BaseModel
from server.model.flashinfer import FlashInferAttention

log = logging.getLogger(__name__)


def graph_sizes(max_rows: int) -> list[int]:
    """Numbers of rows that are captured. Never one: a size of one is compiled by itself, and two cost the same."""
    sizes = [2, 4, *range(8, min(max_rows, 64) + 1, 8), *range(80, max_rows + 1, 16)]
    return sorted({*(size for size in sizes if size < max_rows), max(2, max_rows)})


class _Buffers:
    """Numbers that a step's graph reads, refreshed by one copy for each type. Two host sides take turns, as those of
    FlashInferAttention.pinned do."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        n = num_rows
        self.long = torch.zeros(3 * n + 1, dtype=torch.int64, device=device)
        self.int = torch.zeros(3 * n, dtype=torch.int32, device=device)
        self.positions, self.slots, self.tile_base = self.long.split([n, n, n + 1])
        self.tile_start, self.tile_len, self.row_ids = self.int.split([n, n, n])
        self.tile_base.fill_(NONE)
        self._hosts = [(self.long.cpu().pin_memory(), self.int.cpu().pin_memory()) for _ in range(2)]
        self._num_rows, self._turn = n, 0

    def refresh(self, positions: np.ndarray, slots: np.ndarray, bases: np.ndarray, block_m: int) -> None:
        """positions and bases [live rows], slots [padded rows]."""
        self._turn = 1 - self._turn
        long, int_ = self._hosts[self._turn]
        n, host, small = self._num_rows, long.numpy(), int_.numpy()
        host[: len(positions)] = positions
        host[len(positions) : n] = 0
        host[n : n + len(slots)] = slots
        host[2 * n :] = NONE
        if (bases >= 0).any():
            tiles = make_tiles(bases, block_m)
            count = len(tiles.tile_base)
            host[2 * n : 2 * n + count] = tiles.tile_base
            small[:count], small[n : n + count] = tiles.tile_start, tiles.tile_len
            small[2 * n : 2 * n + len(tiles.row_ids)] = tiles.row_ids
            self.int.copy_(int_, non_blocking=True)
        self.long.copy_(long, non_blocking=True)


class DecodeGraphs:
    """The captured decode steps of a model."""

    def __init__(self, base: BaseModel, tiling: Tiling, max_rows: int) -> None:
        self._base, self._tiling, self._attention = base, tiling, base.attention
        assert isinstance(self._attention, FlashInferAttention)
        self.sizes = graph_sizes(max_rows)
        self._buffers = _Buffers(self.sizes[-1], base.device)
        self._embeddings = torch.zeros(self.sizes[-1], base.layout.hidden_size, dtype=base.dtype, device=base.device)
        self._hidden = torch.zeros_like(self._embeddings)
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self.num_bytes = 0

    def size_for(self, batch: Batch) -> int | None:
        """The size that a batch is replayed at; None if it is not one of decode rows, or has too many."""
        if not batch.is_decode or len(batch.chunks) > self.sizes[-1]:
            return None
        return next(size for size in self.sizes if size >= len(batch.chunks))

    @torch.inference_mode()
    def capture(self, on_size: Callable[[int], None] = lambda size: None) -> None:
        """Capture every size, the largest first, so that the smaller ones find their memory in its pool."""
        free_before = torch.cuda.mem_get_info(self._base.device)[0]
        pool, state = torch.cuda.graph_pool_handle(), self._base.state
        for size in reversed(self.sizes):
            on_size(size)
            self._attention.prepare_graph(size, self._buffers.slots[:size])
            self._buffers.slots.fill_(-1)
            for with_adapters in (False, True):
                state.tiles = self._tiles(size) if with_adapters else None
                run = lambda size=size: self._base.decode(self._embeddings[:size], self._buffers.positions[:size])  # noqa: E731
                try:
                    run()  # what is compiled or allocated at first use must be so before the capture
                    torch.cuda.synchronize(self._base.device)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool):
                        self._hidden[:size].copy_(run())
                finally:
                    state.clear()
                self._graphs[size, with_adapters] = graph
        self.num_bytes = free_before - torch.cuda.mem_get_info(self._base.device)[0]
        log.info("%d decode graphs of up to %d rows take %.2f GB", len(self._graphs), self.sizes[-1], self.num_bytes / 1e9)

    def replay(self, size: int, batch: Batch, embeddings: torch.Tensor, bases: np.ndarray) -> torch.Tensor:
        """Run a batch at a captured size: embeddings [rows, hidden] -> hidden states [rows, hidden], overwritten by the next replay."""
        rows = len(batch.chunks)
        indices, copies = self._attention.plan_graph(batch.spans, size)
        self._buffers.refresh(batch.positions, indices.slots, bases, self._tiling.block_m(size))
        for source, target in copies:
            target.copy_(torch.from_numpy(source).pin_memory(), non_blocking=True)
        self._embeddings[:rows].copy_(embeddings)
        self._graphs[size, bool((bases >= 0).any())].replay()
        return self._hidden[:rows]

    def _tiles(self, size: int) -> Tiles:
        buffers = self._buffers
        return Tiles(
            buffers.tile_base[: size + 1],
            buffers.tile_start[:size],
            buffers.tile_len[:size],
            buffers.row_ids[:size],
            self._tiling.block_m(size),
        )
