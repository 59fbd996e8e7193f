"""Steps as CUDA graphs: the decoder alone, at padded numbers of rows, with adapters and without. Decode steps have graphs of their own;
steps with prompts in them, whose launches from Python take longer than a small step's work, have others.

Owns the buffers that a graph reads and writes. A replay is: plan the attention, refresh the buffers with a few copies, launch. Nothing in a
graph depends on what there was at its capture: tables and tiles are read from the buffers, whose unused rest says so itself.
"""

import logging
from contextlib import nullcontext

import numpy as np
import torch

from server.engine.batch import Batch
from server.engine.captures import Captures, Key, Variant, decode_sizes, mixed_sizes, variants_of
from server.engine.tiling import Tiling
from server.kernels.grouped import NONE, ZERO, Tiles, make_tiles
from server.model.base import BaseModel
from server.model.flashinfer import FlashInferAttention

log = logging.getLogger(__name__)

_MIN_FREE_BYTES = 512 << 20  # before a capture beside requests: what fails within one may cost the device


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

    def clear(self) -> None:
        """As before the first step: no rows' keys and values are kept, and no tile is live."""
        self.long.zero_()
        self.int.zero_()
        self.slots.fill_(-1)
        self.tile_base.fill_(NONE)

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


class StepGraphs:
    """The captured steps of a model."""

    @torch.inference_mode()  # what is compiled for the inner layers' inputs is then right for the first one's too
    def __init__(self, base: BaseModel, tiling: Tiling, max_sequences: int, max_rows: int) -> None:
        """Decode steps of up to `max_sequences` rows; others of up to `max_rows` rows and as many sequences."""
        self._base, self._tiling, self._attention = base, tiling, base.attention
        assert isinstance(self._attention, FlashInferAttention)
        decode, mixed = decode_sizes(max_sequences), mixed_sizes(max_rows, max_sequences)
        num_rows, self._max_sequences = max(size.num_rows for size in decode + mixed), max_sequences
        self.captures = Captures(decode, mixed, variants_of(len(base.state.slots)))
        self._buffers = _Buffers(num_rows, base.device)
        self._embeddings = torch.zeros(num_rows, base.layout.hidden_size, dtype=base.dtype, device=base.device)
        self._hidden = torch.zeros_like(self._embeddings)
        self._pool = torch.cuda.graph_pool_handle()
        self.num_bytes = 0

    def find(self, batch: Batch, wanted: Variant) -> Key | None:
        """The graph that a batch is replayed with; None if it has too many rows or sequences, or none does what its adapters do."""
        if len(batch.chunks) > self._max_sequences:
            return None
        return self.captures.find(len(batch.ids), wanted, is_decode=batch.is_decode)

    def capture(self) -> None:
        """Capture what an engine starts with."""
        for key in self.captures.first():
            self._add(key)
        num_graphs, num_left = len(self.captures.graphs), self.captures.num_left()
        log.info("%d graphs take %.2f GB; %d more are captured later", num_graphs, self.num_bytes / 1e9, num_left)

    def capture_more(self, *, only_wanted: bool = False) -> None:
        """Capture one of those that are left, or of them that steps wanted, between any two steps. MemoryError if there is little left."""
        if (key := self.captures.next(only_wanted=only_wanted)) is None:
            return
        self._add(key, _MIN_FREE_BYTES)
        if not self.captures.num_left():
            log.info("all %d graphs are captured; they take %.2f GB", len(self.captures.graphs), self.num_bytes / 1e9)

    def replay(self, graph: Key, batch: Batch, embeddings: torch.Tensor, bases: np.ndarray) -> torch.Tensor:
        """Run a batch with the graph that was found for it: embeddings [rows, hidden] -> hidden states [rows, hidden], overwritten by the
        next replay. bases int64 [rows]: where each row's adapter lies, -1 for the base."""
        size, num_rows = graph[0], len(batch.ids)
        indices, copies = self._attention.plan_graph(batch.spans, size.num_rows, size.num_sequences)
        self._buffers.refresh(batch.positions, indices.slots, bases, self._tiling.block_m(size.num_rows))
        for source, target in copies:
            target.copy_(torch.from_numpy(source).pin_memory(), non_blocking=True)
        self._embeddings[:num_rows].copy_(embeddings)
        self.captures.graphs[graph].replay()
        return self._hidden[:num_rows]

    @torch.inference_mode()
    def _add(self, key: Key, min_free_bytes: int = 0) -> None:
        size, variant = key
        torch.cuda.synchronize(self._base.device)  # a step may still read what is written next
        torch.cuda.empty_cache()
        free_before = torch.cuda.mem_get_info(self._base.device)[0]
        if free_before < min_free_bytes:
            raise MemoryError(f"{free_before / 1e6:.0f} MB of the device are free; a capture wants {min_free_bytes / 1e6:.0f}")
        self._buffers.clear()
        self._attention.prepare_graph(size.num_rows, size.num_sequences, self._buffers.slots[: size.num_rows])
        self.captures.add(key, self._capture(size.num_rows, variant))
        self.num_bytes += max(0, free_before - torch.cuda.mem_get_info(self._base.device)[0])

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
                is_first = not any(captured == variant for _, captured in self.captures.graphs)
                with nullcontext() if is_first else self._base.layers.shortened():
                    run()
                torch.cuda.synchronize(self._base.device)
                graph = torch.cuda.CUDAGraph()
                # Not "global": the threads that read adapters may page-lock memory meanwhile.
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
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
