"""One step on the device: chunks to tensors, the model's three parts, logits to tokens. Owns every tensor of the engine.

It does not know queues or sockets. `launch` returns before the device is done where nothing of the step is needed on the host but tokens;
the next step can then be launched with tokens that are still unknown here: they are read from where the last step leaves them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from operator import or_

import numpy as np
import torch

from server.engine.batch import Batch, make_batch
from server.engine.captures import Variant
from server.engine.chunk import Chunk
from server.engine.draw import NOT_FINITE, draw_all
from server.engine.graphs import StepGraphs
from server.engine.masks import GrammarMasks
from server.engine.sampler import Sampled, describe_prompt, sample
from server.engine.sequence import Sequence
from server.engine.tiling import Tiling
from server.memory.tiers import AdapterTiers
from server.model.base import BaseModel
from server.model.forward import Segment
from server.model.layers import Narrow

MIN_NARROWED = 16  # rows that the last layer is spared at least, for what it costs to begin it twice


class Launch:
    """A step that was launched. `drawn` [rows] are its tokens on the device, `drawn_row` says whose is where."""

    def __init__(self, chunks: list[Chunk]) -> None:
        self.chunks = chunks
        self.is_deferred = False
        self.drawn: torch.Tensor | None = None
        self.drawn_row: dict[Sequence, int] = {}
        self._results: dict[str, Sampled] = {}
        self._done: torch.cuda.Event | None = None
        self._on_host: torch.Tensor | None = None

    def keep(self, results: dict[str, Sampled]) -> None:
        """The step's results, known at once."""
        self._results |= results

    def defer(self, sequences: list[Sequence], drawn: torch.Tensor) -> None:
        """The step's tokens are on the device alone yet."""
        self.drawn = self._on_host = drawn
        self.drawn_row = {sequence: row for row, sequence in enumerate(sequences)}
        if drawn.device.type == "cuda":
            self._on_host = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
            self._on_host.copy_(drawn, non_blocking=True)
        self.follow(drawn.device, is_deferred=True)

    def follow(self, device: torch.device, *, is_deferred: bool) -> None:
        """Wait for the device in `collect`, even where it brings nothing: host buffers are written anew in turns while no more than one
        step is queued behind the one that runs, and a newcomer shall not stand behind all of a long prompt."""
        self.is_deferred = is_deferred
        if device.type == "cuda":
            self._done = torch.cuda.Event()
            self._done.record()

    def collect(self) -> dict[str, Sampled]:
        """What was drawn, by request id; waits for the device. What failed there is raised here."""
        if self._done is not None:
            self._done.synchronize()
        if self._on_host is not None:
            tokens = self._on_host.tolist()
            for sequence, row in self.drawn_row.items():
                self._results[sequence.request.request_id] = Sampled(None if tokens[row] == NOT_FINITE else tokens[row])
        return self._results


class Runner:
    """Runs steps of a BaseModel. Its adapters come from `tiers`, where the scheduler has pinned them."""

    def __init__(
        self,
        base: BaseModel,
        tiers: AdapterTiers,
        *,
        tiling: Tiling | None = None,
        graphs: StepGraphs | None = None,
        defers: bool = False,
    ) -> None:
        """`tiling`: adapters lie in an arena and rows go by tiles. `graphs`: decode steps are replayed. `defers`: tokens are not
        waited for."""
        self.base, self.tiers, self.tiling, self.graphs, self.defers = base, tiers, tiling, graphs, defers
        self.masks = GrammarMasks()

    def execute(self, chunks: list[Chunk]) -> dict[str, Sampled]:
        """Compute the chunks' tokens and draw a token for each that samples, by request id. Running it twice changes nothing."""
        return self.launch(chunks).collect()

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk], before: Launch | None = None) -> Launch:
        """Start a step; `before` is the one whose tokens are UNKNOWN here yet."""
        launch = Launch(chunks)
        together = [chunk for chunk in chunks if self.tiling is None or self._is_grouped(chunk)]
        apart = [chunk for chunk in chunks if self.tiling is not None and not self._is_grouped(chunk)]
        defers = self.defers and not apart and not any(chunk.sequence.needs_host for chunk in chunks)
        if together:
            self._run(launch, make_batch(together), before, defers)
        if apart:  # an adapter that replaces weights or modules: its rows see its own modules, uncaptured and uncompiled
            with self.base.replacements():
                self._run(launch, make_batch(apart), before, False, apart=True)
        if not any(chunk.samples for chunk in chunks):
            launch.follow(self.base.device, is_deferred=defers)
        return launch

    def _run(self, launch: Launch, batch: Batch, before: Launch | None, defers: bool, *, apart: bool = False) -> None:
        base, state = self.base, self.base.state
        variant = self._variant(batch)
        graph = self.graphs.find(batch, variant) if self.graphs is not None and not apart else None
        try:
            state.token_segments = self._segments(batch.chunks, [chunk.num_tokens for chunk in batch.chunks])
            state.head_segments = self._segments(batch.chunks, batch.head_counts)
            ids = self._ids(batch, before)  # [tokens]
            embeddings = base.embed(ids)  # [tokens, hidden]
            if graph is not None:
                hidden = self.graphs.replay(graph, batch, embeddings, self._bases(batch))  # [tokens, hidden]
            else:
                if self.tiling is not None and not apart:
                    state.tiles = self.tiling.tiles_for(self._bases(batch))
                    state.touched, state.has_gains = self._touched(batch), variant.has_gains
                base.attention.plan(batch.spans)
                state.narrow = self._narrow(batch, apart=apart)
                hidden = base.decode(embeddings, self._to_device(batch.positions))  # [tokens, hidden]
            if not len(batch.head_rows):
                return
            rows = hidden if len(batch.head_rows) == len(batch.ids) else hidden[self._to_device(batch.head_rows)]
            logits = base.head(rows)  # [head rows, vocabulary]
        finally:
            state.clear()
        if defers:
            sequences = [chunk.sequence for chunk in batch.chunks if chunk.samples]
            launch.defer(sequences, draw_all(logits, sequences, self._vocab_sizes(sequences)))
        else:
            launch.keep(self._sample(batch, logits))

    def _narrow(self, batch: Batch, *, apart: bool) -> Narrow | None:
        """The batch's head rows for its last layer; None where all rows go through it."""
        num_rows = len(batch.head_rows)
        if not self.base.layers.narrows or len(batch.ids) - num_rows < MIN_NARROWED or (num_rows == 1 and self.base.compiles):
            return None  # compiled code takes a single row for a constant, and would be compiled anew for it
        state, spans = self.base.state, batch.head_spans

        @contextmanager
        def alone() -> Iterator[None]:
            before = state.token_segments, state.tiles
            state.token_segments = state.head_segments
            if self.tiling is not None and not apart:
                state.tiles = self.tiling.tiles_for(self._bases(batch)[batch.head_rows])
            self.base.attention.plan(spans, writes=False)
            yield
            state.token_segments, state.tiles = before  # what comes behind the layers has all rows again

        return Narrow(self._to_device(batch.head_rows), alone)

    def _ids(self, batch: Batch, before: Launch | None) -> torch.Tensor:
        unknown = None if before is None else batch.unknown_rows(before.drawn_row)
        ids = self._to_device(batch.ids)
        if unknown is None:
            return ids
        rows = self._to_device(unknown)
        return torch.where(rows >= 0, before.drawn[rows.clamp_min(0)].clamp_min(0), ids)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.base.device, non_blocking=True) if self.base.device.type == "cuda" else tensor

    def _is_grouped(self, chunk: Chunk) -> bool:
        adapter_hash = chunk.sequence.adapter_hash
        return not adapter_hash or self.tiers.on_device(adapter_hash).is_grouped

    def _bases(self, batch: Batch) -> np.ndarray:
        """Where each row's adapter lies, -1 for the base: int64 [tokens]."""
        on_device = self.tiers.on_device
        return batch.repeat(lambda chunk: on_device(chunk.sequence.adapter_hash).base if chunk.sequence.adapter_hash else -1)

    def _touched(self, batch: Batch) -> int:
        """The groups at which some adapter of the batch does something, as bits."""
        return reduce(or_, (self.tiers.on_device(adapter_hash).touched for adapter_hash in batch.adapter_hashes), 0)

    def _variant(self, batch: Batch) -> Variant:
        if not batch.adapter_hashes:
            return Variant()
        has_gains = any(self.tiers.on_device(adapter_hash).has_gains for adapter_hash in batch.adapter_hashes)
        return Variant(self.base.state.slots_touched(self._touched(batch)), has_gains)

    def _segments(self, chunks: list[Chunk], counts: list[int]) -> list[Segment]:
        segments: list[Segment] = []
        row, previous = 0, ""
        for chunk, count in zip(chunks, counts, strict=True):
            adapter_hash = chunk.sequence.adapter_hash
            if adapter_hash and count:
                if segments and adapter_hash == previous and segments[-1].stop == row:
                    segments[-1] = segments[-1]._replace(stop=row + count)
                else:
                    segments.append(Segment(row, row + count, self.tiers.on_device(adapter_hash)))
                previous = adapter_hash
            row += count
        return segments

    def _sample(self, batch: Batch, logits: torch.Tensor) -> dict[str, Sampled]:
        row, sample_rows, sequences = 0, [], []
        for chunk, count in zip(batch.chunks, batch.head_counts, strict=True):
            sequence = chunk.sequence
            if sequence.prompt_logprobs is not None:
                self._keep_prompt_logprobs(chunk, logits[row : row + count])
            if chunk.samples:
                sample_rows.append(row + count - 1)
                sequences.append(sequence)
            row += count
        if not sequences:
            return {}
        if len(sample_rows) != len(logits):
            logits = logits[torch.tensor(sample_rows, device=logits.device)]
        sampled = sample(logits, sequences, self._vocab_sizes(sequences), self.masks)
        return {sequence.request.request_id: result for sequence, result in zip(sequences, sampled, strict=True)}

    def _vocab_sizes(self, sequences: list[Sequence]) -> list[int]:
        of_base, on_device = self.base.layout.vocab_size, self.tiers.on_device
        return [on_device(s.adapter_hash).vocab_size if s.adapter_hash else of_base for s in sequences]

    def _keep_prompt_logprobs(self, chunk: Chunk, logits: torch.Tensor) -> None:
        sequence, start = chunk.sequence, chunk.sequence.num_computed
        stop = min(start + chunk.num_tokens, sequence.prompt_len - 1)  # position p tells of token p + 1
        if stop > start:
            logits = logits[: stop - start, : self._vocab_sizes([sequence])[0]]
            following = sequence.tokens[start + 1 : stop + 1]
            sequence.prompt_logprobs[start + 1 : stop + 1] = describe_prompt(logits, following, sequence.request.params.num_prompt_logprobs)
