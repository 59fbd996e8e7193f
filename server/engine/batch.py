"""A step's chunks as rows: which tokens at which positions, whose rows are whose, which rows reach the output head. NumPy alone, no torch.

Rows of decoding sequences come first, then prompts' chunks; within both, adapters stand together. Made by the runner for every launch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from server.engine.chunk import Chunk
from server.engine.sequence import UNKNOWN, Sequence
from server.model.attention import SequenceSpan


@dataclass(slots=True)
class Batch:
    """The rows of one launch, in order of `chunks`."""

    chunks: list[Chunk]
    spans: list[SequenceSpan]
    ids: np.ndarray  # int64 [tokens]; UNKNOWN where the launch before draws it
    positions: np.ndarray  # int64 [tokens]
    head_rows: np.ndarray  # int64 [head rows]: rows whose logits are wanted
    head_counts: list[int]  # of each chunk

    @property
    def adapter_hashes(self) -> set[str]:
        """The adapters of the rows, the base not among them."""
        return {chunk.sequence.adapter_hash for chunk in self.chunks} - {""}

    @property
    def is_decode(self) -> bool:
        """Whether every chunk is one row."""
        return len(self.ids) == len(self.chunks)

    def repeat(self, of_chunk: Callable[[Chunk], int]) -> np.ndarray:
        """A number of each chunk, for each of its rows: int64 [tokens]."""
        values = np.fromiter((of_chunk(chunk) for chunk in self.chunks), np.int64, len(self.chunks))
        return values if self.is_decode else np.repeat(values, [chunk.num_tokens for chunk in self.chunks])

    @property
    def head_spans(self) -> list[SequenceSpan]:
        """The head rows by sequence, as rows of a batch of their own: the last ones of each sequence's."""
        spans, row = [], 0
        for span, count in zip(self.spans, self.head_counts, strict=True):
            if count:
                spans.append(replace(span, start=row, num_tokens=count))
                row += count
        return spans

    def unknown_rows(self, drawn_row: dict[Sequence, int]) -> np.ndarray | None:
        """For each row the row of the launch before that draws its token, -1 if it is known: int64 [tokens]; None if all are known."""
        if not (self.ids == UNKNOWN).any():
            return None
        return self.repeat(lambda chunk: drawn_row[chunk.sequence] if chunk.sequence.num_unknown else -1)


def make_batch(chunks: list[Chunk]) -> Batch:
    """The rows of some chunks."""
    chunks = sorted(chunks, key=lambda chunk: (chunk.num_tokens > 1, chunk.sequence.adapter_hash))
    spans: list[SequenceSpan] = []
    ids: list[int] = []
    positions: list[int] = []
    head_rows: list[int] = []
    head_counts: list[int] = []
    for chunk in chunks:
        sequence, row, count = chunk.sequence, len(ids), chunk.num_tokens
        start, stop = sequence.num_computed, sequence.num_computed + count
        spans.append(SequenceSpan(row, count, stop, sequence.blocks, _table(sequence)))
        if count == 1:
            ids.append(sequence.tokens[start])
            positions.append(start)
        else:
            ids += sequence.tokens[start:stop]
            positions += range(start, stop)
        if sequence.prompt_logprobs is not None and start < sequence.prompt_len - 1:
            wanted = range(row, row + count)
        else:
            wanted = range(row + count - 1, row + count) if chunk.samples else range(0)
        head_rows += wanted
        head_counts.append(len(wanted))
    return Batch(chunks, spans, np.array(ids, np.int64), np.array(positions, np.int64), np.array(head_rows, np.int64), head_counts)


def _table(sequence: Sequence) -> np.ndarray:
    """The sequence's blocks as an array, kept until they change."""
    if sequence.table is None or len(sequence.table) != len(sequence.blocks):
        sequence.table = np.array(sequence.blocks, np.int32)
    return sequence.table
