"""One step on the device: chunks to tensors, the model's three parts, logits to tokens. Owns every tensor of the engine.

It does not know queues or sockets. Rows are sorted by adapter, so that each adapter's rows are one slice of the batch.
"""

import torch

from server.engine.sampler import Sampled, describe_prompt, sample
from server.engine.scheduler import Chunk
from server.memory.tiers import AdapterTiers
from server.model.attention import SequenceSpan
from server.model.base import BaseModel
from server.model.forward import Segment


class Runner:
    """Runs steps of a BaseModel. Its adapters come from `tiers`, where the scheduler has pinned them."""

    def __init__(self, base: BaseModel, tiers: AdapterTiers) -> None:
        self.base, self.tiers = base, tiers

    @torch.inference_mode()
    def execute(self, chunks: list[Chunk]) -> dict[str, Sampled]:
        """Compute the chunks' tokens and draw a token for each that samples, by request id. Running it twice changes nothing."""
        chunks = sorted(chunks, key=lambda chunk: chunk.sequence.adapter_hash)
        base, state = self.base, self.base.state
        tokens: list[int] = []
        positions: list[int] = []
        spans: list[SequenceSpan] = []
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.sequence.num_computed
            stop = start + chunk.num_tokens
            spans.append(SequenceSpan(len(tokens), chunk.num_tokens, stop, sequence.blocks))
            tokens += sequence.tokens[start:stop]
            positions += range(start, stop)
        head_rows, head_counts = _head_rows(chunks, spans)
        try:
            state.token_segments = self._segments(chunks, [chunk.num_tokens for chunk in chunks])
            state.head_segments = self._segments(chunks, head_counts)
            base.attention.plan(spans)
            embeddings = base.embed(torch.tensor(tokens, device=base.device))  # [tokens, hidden]
            hidden = base.decode(embeddings, torch.tensor(positions, device=base.device))  # [tokens, hidden]
            if not head_rows:
                return {}
            rows = hidden if len(head_rows) == len(tokens) else hidden[torch.tensor(head_rows, device=base.device)]
            logits = base.head(rows)  # [head rows, vocabulary]
        finally:
            state.clear()
        return self._finish(chunks, logits, head_counts)

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

    def _finish(self, chunks: list[Chunk], logits: torch.Tensor, head_counts: list[int]) -> dict[str, Sampled]:
        row, sample_rows, sequences = 0, [], []
        for chunk, count in zip(chunks, head_counts, strict=True):
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
        sampled = sample(logits, sequences, [self._vocab_size(sequence.adapter_hash) for sequence in sequences])
        return {sequence.request.request_id: result for sequence, result in zip(sequences, sampled, strict=True)}

    def _vocab_size(self, adapter_hash: str) -> int:
        return self.tiers.on_device(adapter_hash).vocab_size if adapter_hash else self.base.layout.vocab_size

    def _keep_prompt_logprobs(self, chunk: Chunk, logits: torch.Tensor) -> None:
        sequence, start = chunk.sequence, chunk.sequence.num_computed
        stop = min(start + chunk.num_tokens, sequence.prompt_len - 1)  # position p tells of token p + 1
        if stop > start:
            logits = logits[: stop - start, : self._vocab_size(sequence.adapter_hash)]
            following = sequence.tokens[start + 1 : stop + 1]
            sequence.prompt_logprobs[start + 1 : stop + 1] = describe_prompt(logits, following, sequence.request.params.num_prompt_logprobs)


def _head_rows(chunks: list[Chunk], spans: list[SequenceSpan]) -> tuple[list[int], list[int]]:
    """Rows of the batch whose logits are wanted, and how many each chunk has."""
    rows: list[int] = []
    counts: list[int] = []
    for chunk, span in zip(chunks, spans, strict=True):
        if chunk.sequence.prompt_logprobs is not None and chunk.sequence.num_computed < chunk.sequence.prompt_len - 1:
            wanted = range(span.start, span.start + span.num_tokens)
        elif chunk.samples:
            wanted = range(span.start + span.num_tokens - 1, span.start + span.num_tokens)
        else:
            wanted = range(0)
        rows += wanted
        counts.append(len(wanted))
    return rows, counts
