"""Bodies of OpenAI's routes: /v1/completions and /v1/chat/completions, with the sampling parameters that LoRAX and vLLM add.

Owns shapes alone: bounds between fields are in api.sampling. What is known but not served is refused by name.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import FailFast, Field, SkipValidation, field_validator, model_validator

from server.api.schemas_common import RequestModel, ResponseModel
from server.api.schemas_tools import MAX_TOOLS, PastCall, Tool, ToolCall, ToolChoice
from server.api.selection import AdapterTier
from server.api.structured import ResponseFormat, StructuredOutputs

_TIER = "With `usage`: where the adapter was found: device, host, disk, or source (fetched for this request); null for the base (addition)."
_GUIDED = {name: ("; use `structured_outputs`", (None,)) for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar")}


class StreamOptions(RequestModel):
    """What a stream brings besides the answer."""

    not_served: ClassVar = {"include_obfuscation": ("", (None, False)), "continuous_usage_stats": ("", (None, False))}

    include_usage: bool = Field(False, description="End with a chunk that holds `usage`.")


class _Common(RequestModel):
    model: str = Field(description="The base's name (or empty), or an adapter's id.", max_length=1024)
    temperature: float | None = Field(None, description="0 to 2, default 1; 0 is greedy.", le=2)
    top_p: float | None = Field(None, description="Above 0, up to 1.")
    n: int | None = Field(None, description="Answers to give, default 1.")
    stream: bool | None = Field(None, description="Answer as server-sent events, ended by [DONE].")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    stop: Annotated[list[str], FailFast()] = Field([], description="A string or a list of strings; not part of the answer.")
    presence_penalty: float | None = Field(None, description="-2 to 2.")
    frequency_penalty: float | None = Field(None, description="-2 to 2.")
    logit_bias: dict[str, float] | None = Field(None, description="Token id -> value added to its logit, -100 to 100.")
    seed: int | None = Field(None, description="Same seed, same answer; none: equal prompts are drawn apart.", ge=-(1 << 63), lt=1 << 64)
    user: str | None = Field(None, description="Without effect.")
    top_k: int | None = Field(None, description="> 0 (addition).")
    min_p: float | None = Field(None, description="0 to 1 (addition).")
    typical_p: float | None = Field(None, description="Above 0, below 1 (addition).")
    repetition_penalty: float | None = Field(None, description="> 0 (LoRAX's addition).")
    response_format: ResponseFormat | None = Field(None, description="What the answer must look like; text is anything.")
    structured_outputs: StructuredOutputs | None = Field(None, description="In place of `response_format` (vLLM's addition).")
    ignore_eos_token: bool = Field(False, description="Go on after the end token (LoRAX's addition).")
    stop_token_ids: list[int] = Field([], description="Stop after any of these tokens (addition).", max_length=64)
    adapter_source: str | None = Field(None, description="local, s3 or hub (LoRAX's addition).", max_length=64)
    api_token: str | None = Field(None, description="The caller's token for the adapter's source (LoRAX's addition).", max_length=4096)

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_list(cls, value: Any) -> Any:
        if value is None:
            return []
        return [value] if isinstance(value, str) else value


class CompletionRequest(_Common):
    """A prompt, or several, to go on with."""

    not_served: ClassVar = {"suffix": (" (no fill-in-the-middle)", (None, "")), **_GUIDED}

    # Checked by _one_of_four alone: pydantic would try the branches in turn and make an error of each of a million ids.
    prompt: Annotated[str | list[str] | list[int] | list[list[int]], SkipValidation] = Field(
        description="A text, a list of texts, token ids, or a list of lists of token ids."
    )
    max_tokens: int | None = Field(None, description="Default 16; 0 is allowed with `echo`.")
    logprobs: int | None = Field(None, description="Log probabilities, with so many alternatives.", ge=0)
    echo: bool | None = Field(None, description="Begin the text with the prompt.")
    best_of: int | None = Field(None, description="Generate so many and answer with the n likeliest; not when streaming.")

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_of_four(cls, value: Any) -> Any:
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value:
            kinds = {type(item) for item in value}
            if kinds in ({str}, {int}) or (kinds == {list} and all(item and {type(id) for id in item} == {int} for item in value)):
                return value
        raise ValueError("must be a string, a list of strings, a list of token ids, or a list of lists of token ids, none of them empty")


class TextPart(RequestModel):
    """A part of a message."""

    type: Literal["text"] = Field(description="Only text is served.")
    text: str


class Message(RequestModel):
    """One turn of the chat."""

    not_served: ClassVar = {
        "function_call": ("; use `tool_calls`", (None,)), "refusal": ("", (None,)), "audio": ("", (None,)), "annotations": ("", (None, [])),
    }  # fmt: skip

    role: str = Field(description="system, user, assistant, or what else the template knows.", min_length=1, max_length=64)
    content: str | list[TextPart] | None = Field(None, description="A text, or a list of text parts.")
    name: str | None = Field(None, max_length=256)
    tool_calls: list[PastCall] | None = Field(None, description="Of an assistant's turn.", max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(None, description="Of a tool's turn: the call that it answers.", max_length=256)

    @model_validator(mode="after")
    def _check_role(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise ValueError("`tool_calls` are only allowed in a message of the role assistant")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError("`tool_call_id` is only allowed in a message of the role tool")
        return self

    @field_validator("content", mode="before")
    @classmethod
    def _text_only(cls, value: Any) -> Any:
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
            return value
        raise ValueError('must be a string or a list of {"type": "text", "text": ...}; images and audio are not supported')

    @property
    def text(self) -> str | None:
        """The content as one text."""
        return "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content


class ChatRequest(_Common):
    """A chat to go on with."""

    not_served: ClassVar = {
        "functions": ("; use `tools`", (None, [])), "function_call": ("; use `tool_choice`", (None,)),
        "tool_prompt": ("; put it into a message", (None,)),
        "modalities": ("; only text is", (None, ["text"])), "audio": ("", (None,)), "prediction": ("", (None,)),
        "reasoning_effort": ("", (None,)), "verbosity": ("", (None,)), "web_search_options": ("", (None,)), "moderation": ("", (None,)),
        "store": ("", (None, False)), "service_tier": ("", (None, "auto", "default")), "prompt_cache_options": ("", (None,)), **_GUIDED,
    }  # fmt: skip

    messages: list[Message] = Field(description="The turns so far.", min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, description="Older name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(None, description="Default: what the prompt leaves.")
    logprobs: bool | None = Field(None, description="Answer with the tokens' log probabilities.")
    top_logprobs: int | None = Field(None, description="Alternatives at each position; needs `logprobs`.", ge=0)
    tools: list[Tool] | None = Field(None, description="Functions that the model may call.", max_length=MAX_TOOLS)
    tool_choice: str | ToolChoice | None = Field(
        None, description="auto (default), none, required, a function that must be called, or some that may; a plain name is LoRAX's form."
    )
    parallel_tool_calls: bool | None = Field(None, description="False: one call at most where calls are forced or strict.")
    guideline: str | None = Field(None, description="A variable of the template (LoRAX's addition).", max_length=1 << 16)
    add_generation_prompt: bool = Field(True, description="End the prompt with the opening of the assistant's turn (addition).")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="More variables for the template (addition).")
    metadata: dict[str, str] | None = Field(None, description="Without effect.")
    safety_identifier: str | None = Field(None, description="Without effect.")
    prompt_cache_key: str | None = Field(None, description="Without effect: equal beginnings are always reused.")
    prompt_cache_retention: str | None = Field(None, description="Without effect.")

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _known_choice(cls, value: Any) -> Any:
        known = value is None or isinstance(value, str) or (isinstance(value, dict) and value.get("type") in ("function", "allowed_tools"))
        if not known:
            raise ValueError('must be "auto", "none", "required", or an object of the type function or allowed_tools')
        return value


class Usage(ResponseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class CompletionLogprobs(ResponseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionResponse(ResponseModel):
    """A completion, or with `stream` one chunk of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class ChatMessage(ResponseModel):
    role: Literal["assistant"]
    content: str | None = Field(description="Null if there are calls and nothing else.")
    tool_calls: list[ToolCall] = Field([], description="Absent without calls.")


class ChatChoice(ResponseModel):
    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatResponse(ResponseModel):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChunk(ResponseModel):
    """An event of a completion's stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice] = Field(description="Empty in the chunk that brings `usage`.")
    usage: Usage | None = Field(None, description="Only with `stream_options`; null in all chunks but the last.")
    adapter_tier: AdapterTier | None = Field(None, description=_TIER)


class DeltaFunction(ResponseModel):
    name: str | None = Field(None, description="In a call's first piece alone.")
    arguments: str = Field(description="Joined they are JSON.")


class DeltaToolCall(ResponseModel):
    index: int
    id: str | None = Field(None, description="In a call's first piece alone, as `type` is.")
    type: Literal["function"] | None = None
    function: DeltaFunction


class ChatDelta(ResponseModel):
    role: Literal["assistant"] | None = Field(None, description="In the first chunk alone.")
    content: str | None = None
    tool_calls: list[DeltaToolCall] | None = None


class ChatChunkChoice(ResponseModel):
    index: int
    delta: ChatDelta
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatChunk(ResponseModel):
    """An event of a chat's stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice] = Field(description="Empty in the chunk that brings `usage`.")
    usage: Usage | None = Field(None, description="Only with `stream_options`; null in all chunks but the last.")
    adapter_tier: AdapterTier | None = Field(None, description=_TIER)


class OpenAIErrorBody(ResponseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(ResponseModel):
    """OpenAI's errors."""

    error: OpenAIErrorBody


OPENAI_ERRORS: dict[int | str, Any] = {
    status: {"model": OpenAIError, "description": words}
    for status, words in {
        400: "The request is wrong: `param` is the field, the message what is allowed.",
        404: "There is no such model.",
        413: "The body is longer than the server reads.",
        415: "The body is not said to be JSON.",
        424: "The adapter cannot be had or applied, or the engine failed this request.",
        429: "Too many requests are in flight: Retry-After says when to try again.",
        500: "A fault of the server.",
        503: "The engine is starting, gone or draining.",
    }.items()
}
