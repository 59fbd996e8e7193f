"""One sequence as text: the engine's tokens become pieces that may be shown, until the engine or a stop string ends it.

Owns the meaning of "finished": the order in which tokens, end tokens and stop strings count, independent of how the engine bundles tokens
into messages. Knows neither HTTP nor the shapes of answers. api.generation drives it, the routes render what it collected.
"""

import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from server.api.text.detokenizer import Detokenizer
from server.api.text.stops import StopFinder
from server.api.text.tokenizer import Tokenizer
from server.errors import IncompleteGeneration
from server.types import Logprob, SequenceOutput

FinishReason = Literal["length", "eos_token", "stop_sequence"]


class Token(msgspec.Struct, frozen=True, gc=False):
    """A generated token. `text` is what it adds to the answer; a special token adds nothing and is spelled in `spelled`."""

    id: int
    text: str
    special: bool
    spelled: str
    logprob: Logprob | None


@dataclass(slots=True)
class TextSequence:
    """One sequence and all that came of it so far. Times are monotonic seconds."""

    index: int
    prompt_ids: Sequence[int]
    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[Logprob] | None = None
    num_cached_tokens: int = 0
    queued_s: float = 0.0
    started_at: float = field(default_factory=time.monotonic)
    first_token_at: float | None = None
    finished_at: float | None = None

    @property
    def mean_logprob(self) -> float:
        """Mean log probability of the generated tokens, by which best_of chooses; needs num_logprobs >= 0."""
        values = [token.logprob.logprob or 0.0 for token in self.tokens if token.logprob is not None]
        return sum(values) / len(values) if values else float("-inf")


async def follow(
    sequence: TextSequence,
    outputs: AsyncGenerator[SequenceOutput, None],
    tokenizer: Tokenizer,
    *,
    stops: Sequence[str],
    keep_stop: bool,
    stop_ids: Collection[int] = (),
) -> AsyncGenerator[tuple[TextSequence, Token], None]:
    """Yield the sequence and its tokens as their texts become certain, filling it; the last one comes with its finish_reason set.

    `stop_ids`: special tokens that the request named as stop strings. Closes `outputs` (which aborts the sequence) at a stop string."""
    detokenizer = Detokenizer(tokenizer, sequence.prompt_ids)
    finder = StopFinder(stops, keep=keep_stop)
    async with aclosing(outputs):
        async for output in outputs:
            _note_first(sequence, output)
            for position, id in enumerate(output.token_ids):
                last = output.finish_reason is not None and position == len(output.token_ids) - 1
                text = detokenizer.add(id) + (detokenizer.flush() if last else "")
                shown = finder.add(text) + (finder.flush() if last else "")
                if finder.found is not None:
                    sequence.finish_reason = "stop_sequence"
                elif last:
                    sequence.finish_reason = _reason(output, id, stop_ids)
                logprob = output.logprobs[position] if output.logprobs else None
                special = tokenizer.is_special(id)
                token = Token(id, shown, special, tokenizer.token_text(id) if special else shown, logprob)
                sequence.tokens.append(token)
                sequence.text += shown
                if sequence.finish_reason is not None:
                    sequence.finished_at = time.monotonic()
                yield sequence, token
                if sequence.finish_reason is not None:
                    return
    raise IncompleteGeneration("Incomplete generation")


def _note_first(sequence: TextSequence, output: SequenceOutput) -> None:
    if sequence.first_token_at is None and output.token_ids:
        sequence.first_token_at = time.monotonic()
        sequence.num_cached_tokens, sequence.queued_s = output.num_cached_tokens, output.queued_s
    if output.prompt_logprobs is not None:
        sequence.prompt_logprobs = output.prompt_logprobs


def _reason(output: SequenceOutput, last_id: int, stop_ids: Collection[int]) -> FinishReason:
    if output.finish_reason == "length":
        return "length"
    return "stop_sequence" if last_id in stop_ids else "eos_token"
