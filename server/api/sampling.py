"""What a request wishes of sampling, checked in LoRAX's order with LoRAX's words, and turned into the engine's SamplingParams.

Owns the bounds of every number that a request may set. Knows neither bodies nor tokenizers; the routes fill a `Wishes` and call it.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from server.errors import ValidationFailed
from server.types import GrammarSpec, SamplingParams

MAX_STOP_CHARS = 1000
# float32 takes no smaller and no larger ones; nobody means them.
_GREEDY_BELOW = 1e-4
_MAX_TEMPERATURE = 100.0
_PENALTY_BOUNDS = (0.01, 100.0)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the settings and the model allow."""

    max_best_of: int
    max_stop_sequences: int
    max_top_logprobs: int
    max_input_length: int
    max_total_tokens: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """A request's words on sampling; None is "not said". `*_name` are what the route calls a field."""

    best_of: int | None = None
    n: int | None = None
    stream: bool = False
    do_sample: bool = False
    samples_by_default: bool = False  # OpenAI: temperature 1 unless said otherwise
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_p: float | None = None
    typical_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    logit_bias: Mapping[str, float] | None = None
    max_new_tokens: int | None = None
    max_new_tokens_name: str = "max_new_tokens"
    num_alternatives: int | None = None
    num_alternatives_name: str = "return_k_alternatives"
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    seed_with_best_of: bool = False  # OpenAI allows it

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn; otherwise the likeliest is taken."""
        if self.temperature is not None and self.temperature < _GREEDY_BELOW:
            return False
        narrowed = self.top_k is not None or (self.top_p or 1.0) < 1 or (self.typical_p or 1.0) < 1 or (self.min_p or 0.0) > 0
        return self.samples_by_default or self.do_sample or self.temperature not in (None, 1.0) or narrowed


def refuse(message: str, param: str) -> ValidationFailed:
    """The error to raise for a field."""
    return ValidationFailed(message, param=param)


def too_long(message: str, param: str) -> ValidationFailed:
    """The error to raise for a prompt that leaves no room; OpenAI's clients know it by its code."""
    error = refuse(message, param)
    error.code = "context_length_exceeded"
    return error


def check_best_of(best_of: int | None, max_best_of: int, *, name: str = "best_of") -> None:
    """LoRAX's first two checks."""
    if best_of not in (None, 1) and max_best_of == 1:
        raise refuse(f"`{name}` != 1 is not allowed for this endpoint", name)
    if best_of is not None and not 0 < best_of <= max_best_of:
        raise refuse(f"`{name}` must be > 0 and <= {max_best_of}. Given: {best_of}", name)


def check_wishes(wishes: Wishes, limits: Limits) -> None:
    """ValidationFailed for the first field that is out of bounds."""
    if (wishes.best_of or 1) > 1 and not wishes.samples:
        raise refuse("you must use sampling when `best_of` is > 1", "best_of")
    _check_numbers(wishes)
    _check_counts(wishes, limits)
    if len(wishes.stop) > limits.max_stop_sequences:
        raise refuse(f"`stop` supports up to {limits.max_stop_sequences} stop sequences. Given: {len(wishes.stop)}", "stop")
    for stop in wishes.stop:
        if not 0 < len(stop) <= MAX_STOP_CHARS:
            raise refuse(f"`stop` sequences must have 1 to {MAX_STOP_CHARS} characters. Given: {len(stop)}", "stop")
    if wishes.seed is not None and (wishes.best_of or 1) > 1 and not wishes.seed_with_best_of:
        raise refuse("`seed` must not be set when `best_of` > 1", "seed")
    _check_ids(wishes, limits)


def _check_numbers(wishes: Wishes) -> None:
    if wishes.temperature is not None and wishes.temperature < 0:
        raise refuse("`temperature` must be non-negative", "temperature")
    if wishes.temperature is not None and wishes.temperature > _MAX_TEMPERATURE:
        raise refuse(f"`temperature` must be <= {_MAX_TEMPERATURE:g}", "temperature")
    penalty = wishes.repetition_penalty
    if penalty is not None and penalty <= 0:
        raise refuse("`repetition_penalty` must be strictly positive", "repetition_penalty")
    if penalty is not None and not _PENALTY_BOUNDS[0] <= penalty <= _PENALTY_BOUNDS[1]:
        raise refuse(f"`repetition_penalty` must be >= {_PENALTY_BOUNDS[0]:g} and <= {_PENALTY_BOUNDS[1]:g}", "repetition_penalty")
    for name in ("frequency_penalty", "presence_penalty"):
        value = getattr(wishes, name)
        if value is not None and not -2 <= value <= 2:
            raise refuse(f"`{name}` must be >= -2.0 and <= 2.0", name)
    if wishes.top_p is not None and not 0 < wishes.top_p <= 1:  # LoRAX takes 1.0 too, whatever its words say
        raise refuse("`top_p` must be > 0.0 and < 1.0", "top_p")
    if wishes.typical_p is not None and not 0 < wishes.typical_p < 1:
        raise refuse("`typical_p` must be > 0.0 and < 1.0", "typical_p")
    if wishes.min_p is not None and not 0 <= wishes.min_p <= 1:
        raise refuse("`min_p` must be >= 0.0 and <= 1.0", "min_p")


def _check_counts(wishes: Wishes, limits: Limits) -> None:
    if wishes.top_k is not None and wishes.top_k <= 0:
        raise refuse("`top_k` must be strictly positive", "top_k")
    name = wishes.num_alternatives_name
    if wishes.num_alternatives is not None and wishes.num_alternatives <= 0 and name == "return_k_alternatives":
        raise refuse(f"`{name}` must be strictly positive", name)
    if wishes.num_alternatives is not None and wishes.num_alternatives > limits.max_top_logprobs:
        raise refuse(f"`{name}` must be <= {limits.max_top_logprobs}. Given: {wishes.num_alternatives}", name)
    if wishes.max_new_tokens is not None and wishes.max_new_tokens <= 0:
        raise refuse(f"`{wishes.max_new_tokens_name}` must be strictly positive", wishes.max_new_tokens_name)


def _check_ids(wishes: Wishes, limits: Limits) -> None:
    for id in wishes.stop_token_ids:
        if not 0 <= id < limits.vocab_size:
            raise refuse(f"`stop_token_ids` must be token ids from 0 to {limits.vocab_size - 1}. Given: {id}", "stop_token_ids")
    if len(wishes.logit_bias or {}) > 1024:
        raise refuse(f"`logit_bias` takes up to 1024 token ids. Given: {len(wishes.logit_bias or {})}", "logit_bias")
    for key, value in (wishes.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < limits.vocab_size):
            raise refuse(f"`logit_bias` keys must be token ids from 0 to {limits.vocab_size - 1}. Given: {key[:32]!a}", "logit_bias")
        if not -100 <= value <= 100:
            raise refuse(f"`logit_bias` values must be from -100 to 100. Given: {value:g}", "logit_bias")


def to_params(
    wishes: Wishes, *, stop_token_ids: tuple[int, ...], max_new_tokens: int, num_logprobs: int, raw_logprobs: bool,
    num_prompt_logprobs: int, grammar: GrammarSpec | None = None,
) -> SamplingParams:  # fmt: skip
    """The engine's parameters; a missing seed is drawn here, so that it can be told."""
    temperature = 1.0 if wishes.temperature is None else wishes.temperature
    seed = (wishes.seed if wishes.seed is not None else secrets.randbits(64)) % (1 << 64) if wishes.samples else 0
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature if wishes.samples else 0.0,
        top_k=min(wishes.top_k or 0, 1 << 30),
        top_p=1.0 if wishes.top_p is None else wishes.top_p,
        min_p=wishes.min_p or 0.0,
        typical_p=1.0 if wishes.typical_p is None else wishes.typical_p,
        repetition_penalty=1.0 if wishes.repetition_penalty is None else wishes.repetition_penalty,
        frequency_penalty=wishes.frequency_penalty or 0.0,
        presence_penalty=wishes.presence_penalty or 0.0,
        logit_bias={int(key): value for key, value in (wishes.logit_bias or {}).items()},
        seed=seed,
        stop_token_ids=stop_token_ids,
        num_logprobs=num_logprobs,
        raw_logprobs=raw_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        grammar=grammar,
    )
