"""Steps as CUDA graphs: the decoder alone, at padded numbers of rows, with adapters and without. Decode steps have graphs of their own;
steps with prompts in them, whose launches from Python take longer than a small step's work, have others.

Owns the buffers that a graph reads and writes. A replay is: plan the attention, refresh the buffers with a few copies, launch. Nothing in a
graph depends on what there was at its capture: tables and tiles are read from the buffers, whose unused rest says so itself.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch

from server.engine.batch import Batch
from server.engine.tiling import Tiling
from server.kernels.grouped import NONE, ZERO, Tiles, make_tiles
from server.model.base import BaseModel
from server.model.flashinfer import FlashInferAttention

log = logging.getLogger(__name__)

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


class _Buffers:
    """Numbers that a step's graph reads, refreshed by one copy for each type. Two host sides take turns: no more than one step is queued
    behind the one that runs (runner.Launch.follow)."""

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
            tiles = make_tiles(np.where(bases < 0, ZERO, bases), block_m)
            count = len(tiles.tile_base)
            host[2 * n : 2 * n + count] = tiles.tile_base
            small[:count], small[n : n + count] = tiles.tile_start, tiles.tile_len
            small[2 * n : 2 * n + len(tiles.row_ids)] = tiles.row_ids
            self.int.copy_(int_, non_blocking=True)
        self.long.copy_(long, non_blocking=True)


def variants_of(num_slots: int) -> list[Variant]:
    """The variants that are captured, each before those that could stand in for it. A slot that no adapter of a step touches costs a
    product, noughts and their sum: so the first one alone, the attention's input, where most small adapters are, is a variant."""
    every = (1 << num_slots) - 1
    return list(dict.fromkeys([Variant(), Variant(1 & every), Variant(every), Variant(every, has_gains=True)]))


class StepGraphs:
    """The captured steps of a model."""

    @torch.inference_mode()  # what is compiled for the inner layers' inputs is then right for the first one's too
    def __init__(self, base: BaseModel, tiling: Tiling, max_sequences: int, max_rows: int) -> None:
        """Decode steps of up to `max_sequences` rows; others of up to `max_rows` rows and as many sequences."""
        self._base, self._tiling, self._attention = base, tiling, base.attention
        assert isinstance(self._attention, FlashInferAttention)
        self.decode_sizes, self.mixed_sizes = decode_sizes(max_sequences), mixed_sizes(max_rows, max_sequences)
        self.sizes = sorted(self.decode_sizes + self.mixed_sizes, key=lambda size: size.num_rows)
        num_rows, self._max_sequences = self.sizes[-1].num_rows, max_sequences
        self._buffers = _Buffers(num_rows, base.device)
        self._embeddings = torch.zeros(num_rows, base.layout.hidden_size, dtype=base.dtype, device=base.device)
        self._hidden = torch.zeros_like(self._embeddings)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[GraphSize, Variant], torch.cuda.CUDAGraph] = {}
        self.variants = variants_of(len(base.state.slots))
        self.num_bytes = 0

    def find(self, batch: Batch, wanted: Variant) -> tuple[GraphSize, Variant] | None:
        """The graph that a batch is replayed with; None if it has too many rows or sequences, or none does what its adapters do."""
        if len(batch.chunks) > self._max_sequences:
            return None
        variant = next(v for v in self.variants if v.has_gains == wanted.has_gains and not wanted.slots & ~v.slots)
        sizes = self.decode_sizes if batch.is_decode else self.mixed_sizes
        # As many sequences as rows is the most that a mixed size below `max_sequences` rows has; a batch never has more of them than rows.
        size = next((size for size in sizes if size.num_rows >= len(batch.ids)), None)
        return (size, variant) if (size, variant) in self._graphs else None

    @torch.inference_mode()
    def capture(self, on_size: Callable[[int], None] = lambda size: None) -> None:
        """Capture every size, the largest first, so that the smaller ones find their memory in its pool."""
        free_before = torch.cuda.mem_get_info(self._base.device)[0]
        self._buffers.slots.fill_(-1)
        for size in reversed(self.sizes):
            on_size(size.num_rows)
            self._attention.prepare_graph(size.num_rows, size.num_sequences, self._buffers.slots[: size.num_rows])
            for variant in self.variants:
                # Deltas are computed beside the products, gains behind them. Steps with prompts and gains run uncaptured.
                if not (size.num_sequences and variant.has_gains):
                    self._graphs[size, variant] = self._capture(size.num_rows, variant)
        self.num_bytes = free_before - torch.cuda.mem_get_info(self._base.device)[0]
        log.info("%d graphs of up to %d rows take %.2f GB", len(self._graphs), self.sizes[-1].num_rows, self.num_bytes / 1e9)

    def replay(self, graph: tuple[GraphSize, Variant], batch: Batch, embeddings: torch.Tensor, bases: np.ndarray) -> torch.Tensor:
        """Run a batch with the graph that was found for it: embeddings [rows, hidden] -> hidden states [rows, hidden], overwritten by the
        next replay. bases int64 [rows]: where each row's adapter lies, -1 for the base."""
        size, num_rows = graph[0], len(batch.ids)
        indices, copies = self._attention.plan_graph(batch.spans, size.num_rows, size.num_sequences)
        self._buffers.refresh(batch.positions, indices.slots, bases, self._tiling.block_m(size.num_rows))
        for source, target in copies:
            target.copy_(torch.from_numpy(source).pin_memory(), non_blocking=True)
        self._embeddings[:num_rows].copy_(embeddings)
        self._graphs[graph].replay()
        return self._hidden[:num_rows]

    def _capture(self, num_rows: int, variant: Variant) -> torch.cuda.CUDAGraph:
        state, rows = self._base.state, slice(0, num_rows)

        def run() -> torch.Tensor:
            return self._base.decode(self._embeddings[rows], self._buffers.positions[rows])

        try:
            if variant.slots:
                state.tiles, state.has_gains = self._tiles(num_rows), variant.has_gains
                if not variant.has_gains:
                    state.set_apart(variant.slots)
            with self._tiling.captured():
                # What is compiled, loaded or allocated at first use must be so before the capture. What depends on the number of rows is
                # alike in layers that are.
                is_first = not any(captured == variant for _, captured in self._graphs)
                with nullcontext() if is_first else self._base.layers.shortened():
                    run()
                torch.cuda.synchronize(self._base.device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool):
                    self._hidden[rows].copy_(run())
        finally:
            state.clear()
        return graph

    def _tiles(self, num_rows: int) -> Tiles:
        buffers = self._buffers
        return Tiles(
            buffers.tile_base[: num_rows + 1],
            buffers.tile_start[:num_rows],
            buffers.tile_len[:num_rows],
            buffers.row_ids[:num_rows],
            self._tiling.block_m(num_rows),
        )
