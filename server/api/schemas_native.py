"""Bodies of LoRAX's routes: /, /generate, /generate_stream, /tokenize. Names, types and defaults are LoRAX's; ours say "(addition)".

Owns shapes alone: bounds between fields, and LoRAX's words for them, are in api.sampling.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import FailFast, Field, field_validator

from server.api.schemas_common import RequestModel, ResponseModel

_NO_GRAMMAR = (" yet (structured output)", (None, {"type": "text"}))


class MergedAdapters(RequestModel):
    """Several adapters merged for this request; the result is cached."""

    ids: list[str] = Field(description="Adapter ids.", max_length=32)
    weights: list[float] = Field(description="One weight an id.", max_length=32)
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] | None = Field(
        None, description="linear is the exact weighted sum; ties, dare_linear and dare_ties as PEFT's add_weighted_adapter."
    )
    density: float = Field(0.0, description="Share of the values that ties and dare_* keep; they need it above 0.", ge=0, le=1)
    majority_sign_method: Literal["total", "frequency"] | None = Field(None, description="How ties and dare_ties elect a sign.")

    @field_validator("merge_strategy", "majority_sign_method", mode="before")
    @classmethod
    def _fold_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value


class GenerateParameters(RequestModel):
    """How to generate. Without any of the sampling parameters the answer is greedy."""

    not_served: ClassVar = {
        "watermark": ("", (False,)),
        "response_format": _NO_GRAMMAR,
        "grammar": _NO_GRAMMAR,
        "adapters": ("; use `merged_adapters`", (None,)),
    }

    adapter_id: str | None = Field(None, description="Adapter to apply; none or empty is the base model.", max_length=1024)
    adapter_source: str | None = Field(None, description="local, s3 or hub; the server's default if none is given.", max_length=64)
    merged_adapters: MergedAdapters | None = Field(None, description="In place of `adapter_id`.")
    api_token: str | None = Field(
        None,
        description="The caller's token for the adapter's source (lorax-strict: else the Bearer token).",
        max_length=4096,
    )
    best_of: int | None = Field(None, description="Generate so many and answer with the likeliest; needs sampling.")
    temperature: float | None = Field(None, description=">= 0; 0 is greedy.")
    repetition_penalty: float | None = Field(None, description="> 0; 1 is none (over prompt and output).")
    frequency_penalty: float | None = Field(None, description="-2 to 2, times the token's count in the output (OpenAI's meaning).")
    presence_penalty: float | None = Field(None, description="-2 to 2, once for a token in the output.")
    top_k: int | None = Field(None, description="> 0; sample from the k likeliest.")
    top_p: float | None = Field(None, description="Above 0, up to 1; sample from the likeliest that hold this probability.")
    typical_p: float | None = Field(None, description="Above 0, below 1; locally typical sampling.")
    min_p: float | None = Field(
        None, description="0 to 1; leave out tokens below this share of the likeliest one's probability (addition)."
    )
    do_sample: bool = Field(False, description="Sample also when nothing else says so.")
    max_new_tokens: int | None = Field(None, description="> 0; default: what the prompt leaves.")
    ignore_eos_token: bool = Field(False, description="Go on after the end token.")
    return_full_text: bool | None = Field(None, description="Begin `generated_text` with the prompt.")
    stop: Annotated[list[str], FailFast()] = Field([], description="Stop after any of these; the text includes it.")
    stop_token_ids: list[int] = Field([], description="Stop after any of these tokens (addition).", max_length=64)
    logit_bias: dict[str, float] | None = Field(None, description="Token id -> value added to its logit, -100 to 100 (addition).")
    truncate: int | None = Field(None, description="Keep the prompt's last so many tokens.")
    details: bool = Field(False, description="Answer with `details`.")
    decoder_input_details: bool = Field(
        False, description="Answer with log probabilities of the prompt (implies details; not when streaming)."
    )
    return_k_alternatives: int | None = Field(None, description="> 0; the k likeliest tokens at each position.")
    apply_chat_template: bool = Field(False, description="Take `inputs` as one user message of the chat template (LoRAX ignores it).")
    seed: int | None = Field(None, description="0 to 2**64 - 1; random if none is given.", ge=0, lt=1 << 64)


class GenerateRequest(RequestModel):
    """A prompt and how to go on with it."""

    inputs: str = Field(description="The prompt.")
    parameters: GenerateParameters | None = Field(None)
    stream: bool = Field(False, description="Of `/` alone: answer as server-sent events.")


class TokenizeRequest(RequestModel):
    """A text to tokenize."""

    inputs: str
    add_special_tokens: bool = True


class TokenizeResponse(ResponseModel):
    """A token and where in the text it stands (characters)."""

    id: int
    text: str
    start: int
    stop: int


class ErrorResponse(ResponseModel):
    """LoRAX's errors."""

    error: str
    error_type: str


class PrefillToken(ResponseModel):
    id: int
    text: str
    logprob: float | None


class AlternativeToken(ResponseModel):
    id: int
    text: str
    logprob: float


class TokenModel(ResponseModel):
    id: int
    text: str
    logprob: float
    special: bool
    alternative_tokens: list[AlternativeToken] = Field([], description="Absent unless return_k_alternatives is set.")
    skipped: bool


class BestOfSequence(ResponseModel):
    generated_text: str
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[TokenModel]


class Details(ResponseModel):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[TokenModel]
    best_of_sequences: list[BestOfSequence] = Field([], description="Absent unless best_of is above 1.")


class GenerateResponse(ResponseModel):
    """An answer; `details` is absent unless it was asked for."""

    generated_text: str
    details: Details | None = None
