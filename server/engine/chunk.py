"""A sequence's share of a step."""

from typing import NamedTuple

from server.engine.sequence import Sequence

MAX_LOGPROBS_CHUNK = 256  # tokens


class Chunk(NamedTuple):
    """A sequence's share of a step: its next `num_tokens` tokens. `samples`: its last token is among them, so a new one is drawn."""

    sequence: Sequence
    num_tokens: int
    samples: bool


def longest_chunk(sequence: Sequence) -> int:
    """Prompt log probabilities need a row of the whole vocabulary for each token: a long chunk of them would hold up everybody else."""
    return sequence.num_pending if sequence.prompt_logprobs is None else min(sequence.num_pending, MAX_LOGPROBS_CHUNK)
