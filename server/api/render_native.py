"""LoRAX's answers: `details`, tokens, stream events. Pure functions from a generation to JSON; every key is there when LoRAX has it."""

from collections.abc import Sequence
from typing import Any

from server.api.generation import Generation
from server.api.schemas_native import GenerateParameters
from server.api.sequence import TextSequence, Token
from server.api.text.tokenizer import Tokenizer
from server.types import Logprob

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
) -> dict[str, Any]:
    """`details` of a whole answer; `rest` are best_of's others."""
    details = {
        **_sequence(generation, best, tokenizer, samples, num_alternatives, show_prompt),
        "prompt_tokens": generation.num_prompt_tokens,
        "skipped_tokens": 0,
    }
    if rest:
        others = [
            {"generated_text": other.text, **_sequence(generation, other, tokenizer, samples, num_alternatives, show_prompt)}
            for other in rest
        ]
        details["best_of_sequences"] = others
    return details


def _sequence(
    generation: Generation, sequence: TextSequence, tokenizer: Tokenizer, samples: bool, num_alternatives: int, show_prompt: bool
) -> dict[str, Any]:
    return {
        "finish_reason": sequence.finish_reason,
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
) -> dict[str, Any]:
    """One token's event; the last one carries the whole text."""
    last = sequence.finish_reason is not None
    details = None
    if last and parameters.details:
        details = {
            "finish_reason": sequence.finish_reason,
            "prompt_tokens": generation.num_prompt_tokens,
            "generated_tokens": len(sequence.tokens),
            "seed": _seed(generation, sequence) if samples else None,
        }
    return {
        "token": token_of(token, tokenizer, parameters.return_k_alternatives or 0),
        "generated_text": (prompt if parameters.return_full_text else "") + sequence.text if last else None,
        "details": details,
    }


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
    return _LOWEST if value is None else max(value, _LOWEST)
