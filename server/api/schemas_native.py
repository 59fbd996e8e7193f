"""Bodies of LoRAX's routes: /, /generate, /tokenize, /embed, /classify and their like. Names, types and defaults are LoRAX's; ours say
"(addition)".

Owns shapes alone: bounds between fields, and LoRAX's words for them, are in api.sampling.
"""

from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, StringConstraints, field_validator

from server.api.schemas_common import RequestModel, ResponseModel
from server.api.structured import NativeResponseFormat, StructuredOutputs


def _field(default: Any, description: str, examples: list[Any], *, shown: dict[str, Any] | None = None, **rules: Any) -> Any:
    """A field with examples. `shown`: bounds for /docs alone; api.sampling checks them, in LoRAX's order and with LoRAX's words."""
    return Field(default, description=description, examples=examples, json_schema_extra=shown, **rules)


class MergedAdapters(RequestModel):
    """Several adapters merged for this request; the result is cached."""

    ids: list[Annotated[str, StringConstraints(max_length=1024)]] = Field(description="Adapter ids.", max_length=32)
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

    adapter_id: str | None = _field(None, "Adapter to apply; none or empty is the base model.", ["pirate"], max_length=1024)
    adapter_source: str | None = _field(None, "local, s3 or hub; the server's default if none is given.", ["local"], max_length=64)
    merged_adapters: MergedAdapters | None = Field(None, description="In place of `adapter_id`.")
    api_token: str | None = Field(
        None,
        description="The caller's token for the adapter's source (lorax-strict: else the Bearer token).",
        max_length=4096,
    )
    best_of: int | None = _field(
        None, "Generate so many and answer with the likeliest; needs sampling. At most the server's max-best-of.", [2], shown={"minimum": 1}
    )
    temperature: float | None = _field(None, "0 is greedy.", [0.7], shown={"minimum": 0, "maximum": 100})
    repetition_penalty: float | None = _field(None, "1 is none (over prompt and output).", [1.1], shown={"minimum": 0.01, "maximum": 100})
    frequency_penalty: float | None = _field(
        None, "Times the token's count in the output (OpenAI's meaning).", [0.5], shown={"minimum": -2, "maximum": 2}
    )
    presence_penalty: float | None = _field(None, "Once for a token in the output.", [0.5], shown={"minimum": -2, "maximum": 2})
    top_k: int | None = _field(None, "Sample from the k likeliest.", [40], shown={"minimum": 1})
    top_p: float | None = _field(
        None, "Sample from the likeliest that hold this probability.", [0.9], shown={"exclusiveMinimum": 0, "maximum": 1}
    )
    typical_p: float | None = _field(None, "Locally typical sampling.", [0.95], shown={"exclusiveMinimum": 0, "exclusiveMaximum": 1})
    min_p: float | None = _field(
        None, "Leave out tokens below this share of the likeliest one's probability (addition).", [0.05], shown={"minimum": 0, "maximum": 1}
    )
    do_sample: bool = Field(False, description="Sample also when nothing else says so.")
    max_new_tokens: int | None = _field(None, "Default: what the prompt leaves.", [20], shown={"minimum": 1})
    ignore_eos_token: bool = Field(False, description="Go on after the end token.")
    return_full_text: bool | None = Field(None, description="Begin `generated_text` with the prompt.")
    stop: Annotated[list[str], FailFast()] = _field(
        [], "Stop after any of these (1 to 1000 characters; as many as the server's max-stop-sequences); the text includes it.", [["\n\n"]]
    )
    stop_token_ids: list[int] = Field([], description="Stop after any of these tokens (addition).", max_length=64)
    logit_bias: dict[str, float] | None = _field(
        None, "Token id -> value added to its logit, -100 to 100, up to 1024 of them (addition).", [{"198": -100}]
    )
    truncate: int | None = _field(None, "Keep the prompt's last so many tokens.", [512], shown={"minimum": 1})
    watermark: bool = Field(False, description="Not supported: true is refused.", json_schema_extra={"enum": [False]})
    details: bool = Field(False, description="Answer with `details`.")
    decoder_input_details: bool = Field(
        False, description="Answer with log probabilities of the prompt (implies details; not when streaming)."
    )
    return_k_alternatives: int | None = _field(
        None, "The k likeliest tokens at each position; at most the server's max-top-logprobs.", [3], shown={"minimum": 1}
    )
    apply_chat_template: bool = Field(
        False, description="Take `inputs` as one user message of the chat template (LoRAX and lorax-strict ignore it)."
    )
    response_format: NativeResponseFormat | None = _field(
        None,
        "What the answer must look like. Without a schema: any JSON object.",
        [{"type": "json_object", "schema": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}}],
    )
    structured_outputs: StructuredOutputs | None = _field(
        None, "A regular expression, a grammar, a choice or a JSON schema, as vLLM has it (addition).", [{"choice": ["yes", "no"]}]
    )
    seed: int | None = _field(None, "Random if none is given.", [42], ge=0, lt=1 << 64)


class GenerateRequest(RequestModel):
    """A prompt and how to go on with it."""

    model_config = RequestModel.model_config | {
        "json_schema_extra": {
            "examples": [
                {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 20}},
                {"inputs": "What is coffee?", "parameters": {"adapter_id": "pirate", "adapter_source": "local", "max_new_tokens": 48}},
            ]
        }
    }

    inputs: str = _field(..., "The prompt.", ["The capital of France is"], shown={"minLength": 1})
    parameters: GenerateParameters | None = _field(None, "How to go on.", [{"max_new_tokens": 20, "adapter_id": "pirate"}])
    stream: bool = Field(False, description="Of `/` and `/invocations` alone: answer as server-sent events.")


class TokenizeRequest(RequestModel):
    """A text to tokenize."""

    model_config = RequestModel.model_config | {"json_schema_extra": {"examples": [{"inputs": "The capital of France"}]}}

    inputs: str = _field(..., "The text, no longer than a prompt may be.", ["The capital of France"])
    add_special_tokens: bool | None = Field(True, description="With those that the tokenizer puts around a text; null is true.")


class AdapterParameters(RequestModel):
    """What of `parameters` the embedding routes of LoRAX take."""

    adapter_id: str | None = Field(None, max_length=1024)
    adapter_source: str | None = Field(None, max_length=64)
    merged_adapters: MergedAdapters | None = None
    api_token: str | None = Field(None, max_length=4096)


class EmbedRequest(RequestModel):
    """A text to embed."""

    model_config = RequestModel.model_config | {"json_schema_extra": {"examples": [{"inputs": "a sentence"}]}}

    inputs: str = _field(..., "The text.", ["a sentence"])
    parameters: AdapterParameters | None = None
    stream: bool = Field(False, description="LoRAX's client sends it; without effect.")


class EmbeddingsRequest(RequestModel):
    """A text to embed, with OpenAI's names."""

    model_config = RequestModel.model_config | {"json_schema_extra": {"examples": [{"input": "a sentence", "model": "base"}]}}

    input: str | list[str] = _field(..., "The text.", ["a sentence"])
    model: str = Field(description="Ignored.")
    encoding_format: str | None = None
    dimensions: int | None = None
    user: str | None = None
    parameters: AdapterParameters | None = None


class ClassifyRequest(RequestModel):
    """A text whose tokens to classify."""

    model_config = RequestModel.model_config | {"json_schema_extra": {"examples": [{"inputs": "Ada Lovelace lived in London"}]}}

    inputs: str = _field(..., "The text.", ["Ada Lovelace lived in London"])
    parameters: AdapterParameters | None = None
    stream: bool = Field(False, description="LoRAX's client sends it; without effect.")


class ClassifyBatchRequest(RequestModel):
    """Texts whose tokens to classify."""

    model_config = RequestModel.model_config | {"json_schema_extra": {"examples": [{"inputs": ["Ada Lovelace lived in London"]}]}}

    inputs: Annotated[list[str], FailFast()] = _field(..., "The texts.", [["Ada Lovelace lived in London"]])
    parameters: AdapterParameters | None = None
    stream: bool = Field(False, description="LoRAX's client sends it; without effect.")


class TokenizeResponse(ResponseModel):
    """A token and where in the text it stands (characters)."""

    id: int
    text: str
    start: int
    stop: int


class ErrorResponse(ResponseModel):
    """LoRAX's errors."""

    error: str = Field(examples=["Input validation error: `temperature` must be non-negative"])
    error_type: str = Field(examples=["validation"])


# What a route that generates may answer besides 200.
ERRORS: dict[int | str, Any] = {
    400: {"model": ErrorResponse, "description": "The body is not JSON."},
    413: {"model": ErrorResponse, "description": "The body is longer than max-body-bytes."},
    415: {"model": ErrorResponse, "description": "The content type is not JSON."},
    422: {"model": ErrorResponse, "description": "A field is wrong; the message names it and what is allowed."},
    424: {"model": ErrorResponse, "description": "The adapter cannot be had or applied, or the engine failed this request."},
    429: {"model": ErrorResponse, "description": "Too many requests in flight; see Retry-After."},
    500: {"model": ErrorResponse, "description": "A fault of the server."},
    503: {"model": ErrorResponse, "description": "The engine is starting, gone or draining; see Retry-After."},
}


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


class StreamDetails(ResponseModel):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    prompt_tokens: int
    generated_tokens: int
    seed: int | None


class StreamEvent(ResponseModel):
    """The data of one server-sent event."""

    token: TokenModel
    generated_text: str | None = Field(description="The whole text, with the last token.")
    details: StreamDetails | None = Field(description="With the last token, if `details` was asked for.")
