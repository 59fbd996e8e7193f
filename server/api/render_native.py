"""LoRAX's answers: `details`, tokens, stream events. Pure functions from a generation to JSON; every key is there when LoRAX has it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from server.api.generation import Generation
from server.api.schemas_native import GenerateParameters
from server.api.sequence import TextSequence, Token
from server.api.stream import dump
from server.api.text.tokenizer import Tokenizer
from server.types import Logprob

_RUNNING = b'data: {"token":{"id":%d,"text":%b,"logprob":%b,"special":%b,"skipped":false},"generated_text":null,"details":null}\n\n'
_LOWEST = -9999.0  # LoRAX's clients take no null; a token that a bias forced may have log probability minus infinity


def details_of(
    generation: Generation,
    best: TextSequence,
    rest: Sequence[TextSequence],
    tokenizer: Tokenizer,
    *,
    samples: bool,
    num_alternatives: int,
    show_prompt: bool,
    length_first: bool,
) -> dict[str, Any]:
    """`details` of a whole answer; `rest` are best_of's others. `length_first`: see `finish_reason_of`."""
    options = (tokenizer, samples, num_alternatives, show_prompt, length_first)
    details = {
        **_sequence(generation, best, *options),
        "prompt_tokens": generation.num_prompt_tokens,
        "skipped_tokens": 0,
    }
    if rest:
        others = [{"generated_text": other.text, **_sequence(generation, other, *options)} for other in rest]
        details["best_of_sequences"] = others
    return details


def _sequence(
    generation: Generation,
    sequence: TextSequence,
    tokenizer: Tokenizer,
    samples: bool,
    num_alternatives: int,
    show_prompt: bool,
    length_first: bool,
) -> dict[str, Any]:
    return {
        "finish_reason": finish_reason_of(generation, sequence, length_first),
        "generated_tokens": len(sequence.tokens),
        "seed": _seed(generation, sequence) if samples else None,
        "prefill": prefill_of(sequence, tokenizer) if show_prompt else [],
        "tokens": [token_of(token, tokenizer, num_alternatives) for token in sequence.tokens],
    }


def stream_event(
    generation: Generation,
    sequence: TextSequence,
    token: Token,
    tokenizer: Tokenizer,
    *,
    parameters: GenerateParameters,
    samples: bool,
    prompt: str,
    length_first: bool,
) -> dict[str, Any]:
    """One token's event; the last one carries the whole text."""
    last = sequence.finish_reason is not None
    details = None
    if last and parameters.details:
        details = {
            "finish_reason": finish_reason_of(generation, sequence, length_first),
            "prompt_tokens": generation.num_prompt_tokens,
            "generated_tokens": len(sequence.tokens),
            "seed": _seed(generation, sequence) if samples else None,
        }
    return {
        "token": token_of(token, tokenizer, parameters.return_k_alternatives or 0),
        "generated_text": (prompt if parameters.return_full_text else "") + sequence.text if last else None,
        "details": details,
    }


def running_event(token: Token) -> bytes:
    """event(stream_event(...)) of a token that is not the last and has no alternatives, in less than half the time."""
    logprob = _number(token.logprob.logprob if token.logprob is not None else None)
    if math.isnan(logprob):
        raise ValueError("a log probability is no number")
    special = b"true" if token.special else b"false"
    return _RUNNING % (token.id, dump(token.spelled), repr(logprob).encode(), special)


def finish_reason_of(generation: Generation, sequence: TextSequence, length_first: bool) -> str | None:
    """Why it ended. If the last token that was allowed also ends the text, that is the reason; LoRAX (`length_first`) says "length"."""
    max_new_tokens = generation.plan.max_new_tokens[sequence.index // generation.plan.samples]
    return "length" if length_first and len(sequence.tokens) == max_new_tokens else sequence.finish_reason


def token_of(token: Token, tokenizer: Tokenizer, num_alternatives: int) -> dict[str, Any]:
    """A generated token. `text` is what it adds to the answer, a special one's is its name."""
    rendered = {
        "id": token.id,
        "text": token.spelled,
        "logprob": _number(token.logprob.logprob if token.logprob is not None else None),
        "special": token.special,
        "skipped": False,
    }
    if num_alternatives and token.logprob is not None:
        rendered["alternative_tokens"] = [
            {"id": id, "text": tokenizer.token_text(id), "logprob": _number(value)} for id, value in with_chosen(token.logprob)
        ]
    return rendered


def prefill_of(sequence: TextSequence, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The prompt's tokens; the first has no log probability."""
    known = sequence.prompt_logprobs or []
    return [
        {"id": entry.token_id, "text": tokenizer.token_text(entry.token_id), "logprob": None if position == 0 else _number(entry.logprob)}
        for position, entry in enumerate(known)
    ]


def with_chosen(logprob: Logprob) -> list[tuple[int, float]]:
    """The alternatives and the chosen token among them, likeliest first."""
    top = list(logprob.top)
    if all(id != logprob.token_id for id, _ in top):
        top.append((logprob.token_id, logprob.logprob if logprob.logprob is not None else _LOWEST))
    return sorted(top, key=lambda entry: -entry[1])


def _seed(generation: Generation, sequence: TextSequence) -> int:
    return (generation.plan.params.seed + sequence.index % generation.plan.samples) % (1 << 64)


def _number(value: float | None) -> float:
    """As LoRAX prints it: the shortest digits that tell its float32 from the next one."""
    return _LOWEST if value is None else float(str(np.float32(max(value, _LOWEST))))
