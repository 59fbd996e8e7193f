"""Bodies of OpenAI's routes: /v1/completions and /v1/chat/completions, with the sampling parameters that LoRAX and vLLM add.

Owns shapes alone: bounds between fields are in api.sampling. What is known but not served is refused by name.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import FailFast, Field, SkipValidation, field_validator

from server.api.schemas_common import RequestModel, ResponseModel

_NOT_YET = (" yet", (None,))
_NO_GRAMMAR = (" yet (structured output)", (None, {"type": "text"}))


class StreamOptions(RequestModel):
    """What a stream brings besides the answer."""

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
    seed: int | None = Field(None, description="Same seed, same answer.", ge=-(1 << 63), lt=1 << 64)
    user: str | None = Field(None, description="Without effect.")
    top_k: int | None = Field(None, description="> 0 (addition).")
    min_p: float | None = Field(None, description="0 to 1 (addition).")
    typical_p: float | None = Field(None, description="Above 0, below 1 (addition).")
    repetition_penalty: float | None = Field(None, description="> 0 (LoRAX's addition).")
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

    not_served: ClassVar = {
        "suffix": (" (no fill-in-the-middle)", (None, "")),
        "response_format": _NO_GRAMMAR,
    }

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
        "tool_calls": (" yet", (None, [])), "function_call": (" yet", (None,)), "refusal": ("", (None,)), "audio": ("", (None,)),
        "annotations": ("", (None, [])),
    }  # fmt: skip

    role: str = Field(description="system, user, assistant, or what else the template knows.", min_length=1, max_length=64)
    content: str | list[TextPart] | None = Field(None, description="A text, or a list of text parts.")
    name: str | None = Field(None, max_length=256)
    tool_call_id: str | None = Field(None, max_length=256)

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
        "tools": (" yet", (None, [])), "tool_choice": (" yet", (None, "none", "auto")), "functions": (" yet", (None, [])),
        "function_call": _NOT_YET, "parallel_tool_calls": (" yet", (None, True, False)), "tool_prompt": _NOT_YET, "guideline": _NOT_YET,
        "response_format": _NO_GRAMMAR, "modalities": ("; only text is", (None, ["text"])), "audio": ("", (None,)),
        "prediction": ("", (None,)), "reasoning_effort": ("", (None,)), "web_search_options": ("", (None,)), "store": ("", (None, False)),
        "service_tier": ("", (None, "auto", "default")),
    }  # fmt: skip

    messages: list[Message] = Field(description="The turns so far.", min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, description="Older name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(None, description="Default: what the prompt leaves.")
    logprobs: bool | None = Field(None, description="Answer with the tokens' log probabilities.")
    top_logprobs: int | None = Field(None, description="Alternatives at each position; needs `logprobs`.", ge=0)
    add_generation_prompt: bool = Field(True, description="End the prompt with the opening of the assistant's turn (addition).")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="More variables for the template (addition).")
    metadata: dict[str, str] | None = Field(None, description="Without effect.")


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
    content: str


class ChatChoice(ResponseModel):
    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"] | None


class ChatResponse(ResponseModel):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class OpenAIErrorBody(ResponseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(ResponseModel):
    """OpenAI's errors."""

    error: OpenAIErrorBody
