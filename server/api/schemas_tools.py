"""Tools in OpenAI's forms: what a chat offers, what the caller chooses, calls in earlier turns, calls in answers.

Owns shapes alone; what they mean is in api.tools.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from server.api.schemas_common import RequestModel, ResponseModel

MAX_TOOLS = 128
NAME_PATTERN = r"^[A-Za-z0-9_.:-]{1,64}$"


class FunctionTool(RequestModel):
    """A function that the model may call."""

    name: str = Field(description="Letters, digits and _ . : -, at most 64.", pattern=NAME_PATTERN)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of the arguments, an object; none: there are none.")
    strict: bool | None = Field(None, description="The arguments always meet the schema, also when the model may choose not to call.")

    @field_validator("parameters")
    @classmethod
    def _object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value and value.get("type", "object") != "object":
            raise ValueError('must be a JSON schema of `type`: "object"')
        return value


class Tool(RequestModel):
    """Something that the model may call."""

    not_served: ClassVar = {"custom": ("; only functions are", ())}

    type: Literal["function"] = Field(description="Only functions are served.")
    function: FunctionTool


class ChosenFunction(RequestModel):
    name: str = Field(max_length=64)


class NamedToolChoice(RequestModel):
    """The function that must be called."""

    type: Literal["function"]
    function: ChosenFunction


class AllowedTools(RequestModel):
    mode: Literal["auto", "required"]
    tools: list[NamedToolChoice] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedToolsChoice(RequestModel):
    """Some of the functions."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _kind_of_choice(value: Any) -> str:
    allowed = isinstance(value, AllowedToolsChoice) or (isinstance(value, dict) and value.get("type") == "allowed_tools")
    return "some-tools" if allowed else "one-tool"


# The tags are no identifiers, so that errors leave them out of a field's path.
ToolChoice = Annotated[
    Annotated[NamedToolChoice, Tag("one-tool")] | Annotated[AllowedToolsChoice, Tag("some-tools")], Discriminator(_kind_of_choice)
]


class CalledFunction(RequestModel):
    name: str = Field(max_length=256)
    arguments: str = Field(description="JSON as a text, as the answer gave it.")


class PastCall(RequestModel):
    """A call of an earlier turn."""

    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(None, description="Without effect: clients that send back what they streamed leave it there.")


class FunctionCall(ResponseModel):
    name: str
    arguments: str = Field(description="JSON as a text; cut off where finish_reason is length.")


class ToolCall(ResponseModel):
    """A call that the model wants made."""

    id: str
    type: Literal["function"]
    function: FunctionCall
