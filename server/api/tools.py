"""What a chat with tools means: which may be called, how the prompt tells the model, how its answer is read.

Owns the checks across fields and the choice of a format. Spellings are api.tool_formats', reading api.tool_calls'. A template that knows no
tools gets them as text, so that an adapter trained on another template can be asked too. api.openai_chat calls it.
"""

import json
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json

from server.api.sampling import refuse
from server.api.schemas_openai import ChatRequest, Message
from server.api.schemas_tools import AllowedToolsChoice, NamedToolChoice, Tool
from server.api.sequence import Token
from server.api.text.tokenizer import Tokenizer
from server.api.tool_calls import CallArguments, CallStart, Content, Piece, ToolCallReader
from server.api.tool_formats import FORMATS, HERMES, MISTRAL, ToolFormat, call_grammar, find_format
from server.types import GrammarSpec

_PROMPT = (
    "You may call functions to help with the user's request. They are given as JSON between <tools> and </tools>:\n<tools>\n{tools}\n"
    "</tools>\nTo call one, write its name and its arguments as a JSON object between <tool_call> and </tool_call>:\n"
    '<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)
_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ToolUse:
    """The tools of one request. `forced`: the answer is nothing but calls."""

    format: ToolFormat
    tools: Sequence[Tool]
    forced: bool
    grammar: GrammarSpec | None

    def reader(self) -> ToolCallReader:
        """For one sequence."""
        return ToolCallReader(self.format, [tool.function.name for tool in self.tools])

    def text_of(self, token: Token) -> str:
        """What of a token is to be read: special tokens too where they are the format's."""
        return token.spelled if token.special and token.spelled in self.format.markers else token.text

    def new_id(self) -> str:
        """Of a call. Mistral's templates take nothing but nine letters and digits."""
        if self.format is MISTRAL:
            return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


@dataclass
class Answer:
    """An answer with calls, as it is put together from pieces."""

    use: ToolUse
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def add(self, piece: Piece) -> dict[str, Any]:
        """Take a piece in; returns it as a stream's delta."""
        match piece:
            case Content(text):
                self.content += text
                return {"content": text}
            case CallStart(index, name):
                start = {"id": self.use.new_id(), "type": "function"}
                self.calls.append({**start, "function": {"name": name, "arguments": ""}})
                return {"tool_calls": [{"index": index, **start, "function": {"name": name, "arguments": ""}}]}
            case CallArguments(index, text):
                self.calls[index]["function"]["arguments"] += text
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}

    def message(self) -> dict[str, Any]:
        """The assistant's turn."""
        if not self.calls:
            return {"role": "assistant", "content": self.content}
        return {"role": "assistant", "content": self.content or None, "tool_calls": self.calls}


def check_tools(body: ChatRequest) -> None:
    """ValidationFailed for tools, or a choice of them, that contradict each other."""
    names = [tool.function.name for tool in body.tools or []]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise refuse(f"`tools` must have different names. Given twice: {twice}", "tools")
    if not names and body.tool_choice not in (None, "none", "auto"):
        raise refuse("`tool_choice` is only allowed with `tools`", "tool_choice")
    for name in _chosen_names(body):
        if name not in names:
            raise refuse(f"Tool with name {name[:64]} not found; `tool_choice` takes auto, none, required or one of `tools`", "tool_choice")
    constrained = body.structured_outputs is not None or (body.response_format is not None and body.response_format.type != "text")
    if constrained and names and body.tool_choice != "none":
        raise refuse(
            "Response format and tools are mutually exclusive; a strict tool's arguments meet its schema anyway", "response_format"
        )


def _chosen_names(body: ChatRequest) -> list[str]:
    """Names that `tool_choice` mentions; a plain name is LoRAX's form."""
    choice = body.tool_choice
    if choice is None or choice in ("auto", "none", "required"):
        return []
    if isinstance(choice, str):
        return [choice]
    return [choice.function.name] if isinstance(choice, NamedToolChoice) else [tool.function.name for tool in choice.allowed_tools.tools]


def use_tools(body: ChatRequest, tokenizer: Tokenizer, format_name: str, vocab_size: int) -> ToolUse | None:
    """How this request's tools are used; None if it has none, or may call none. ValidationFailed if the model's format is not known.

    A marker that is a token beyond the base's `vocab_size` (an adapter's own) is spelled out where calls are enforced: grammars know the
    base's tokens alone."""
    if not body.tools or body.tool_choice == "none":
        return None
    format = _format(tokenizer.chat_template or "", format_name)
    names = _chosen_names(body)
    tools = [tool for tool in body.tools if not names or tool.function.name in names]
    choice = body.tool_choice
    one = isinstance(choice, NamedToolChoice) or (isinstance(choice, str) and bool(names))
    forced = one or choice == "required" or (isinstance(choice, AllowedToolsChoice) and choice.allowed_tools.mode == "required")

    def special_id(text: str) -> int | None:
        id = tokenizer.special_id(text)
        return id if id is not None and id < vocab_size else None

    grammar = None
    if forced or any(tool.function.strict for tool in tools):
        schemas = {tool.function.name: _schema(tool) for tool in tools}
        parallel = body.parallel_tool_calls is not False and not one
        grammar = GrammarSpec("grammar", call_grammar(format, schemas, parallel=parallel, forced=forced, special_id=special_id), "tools")
    return ToolUse(format, tools, forced, grammar)


def _schema(tool: Tool) -> dict[str, Any]:
    """Of a function's arguments; without parameters there are none."""
    return {"type": "object", **(tool.function.parameters or {"properties": {}, "additionalProperties": False})}


def _format(template: str, name: str) -> ToolFormat:
    if name != "auto":
        return FORMATS[name][0]
    if "tools" not in template:
        return HERMES  # `template_messages` tells the model
    format = find_format(template)
    if format is None:
        raise refuse("`tools`: the model's chat template shows no format of calls that is known; set --tool-call-format", "tools")
    return format


def template_tools(use: ToolUse | None, template: str) -> list[dict[str, Any]] | None:
    """The template's variable `tools`."""
    return [_as_json(tool) for tool in use.tools] if use is not None and "tools" in template else None


def _as_json(tool: Tool) -> dict[str, Any]:
    return {"type": "function", "function": tool.function.model_dump(exclude_none=True, exclude={"strict"})}


def template_messages(messages: Sequence[Message], use: ToolUse | None, template: str) -> list[dict[str, Any]]:
    """The messages as the template knows them; what it does not know of tools is written out."""
    format = use.format if use is not None else HERMES
    found = [_message(message, position, format, template) for position, message in enumerate(messages)]
    if use is None or "tools" in template:
        return found
    prompt = _PROMPT.format(tools="\n".join(json.dumps(_as_json(tool), ensure_ascii=False) for tool in use.tools))
    if found[0]["role"] == "system":
        return [found[0] | {"content": f"{found[0]['content']}\n\n{prompt}".strip()}, *found[1:]]
    return [{"role": "system", "content": prompt}, *found]


def _message(message: Message, position: int, format: ToolFormat, template: str) -> dict[str, Any]:
    role = "system" if message.role == "developer" and "developer" not in template else message.role
    more = {"name": message.name, "tool_call_id": message.tool_call_id}
    found: dict[str, Any] = {"role": role, "content": message.text or ""} | {key: value for key, value in more.items() if value is not None}
    calls = []
    for number, call in enumerate(message.tool_calls or []):
        where = f"messages[{position}].tool_calls[{number}].function.arguments"
        calls.append((call, _arguments(call.function.arguments, where)))
    if "tool_calls" in template:
        if calls:
            found["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
                for call, arguments in calls
            ]
        return found
    spelled = [format.spell(call.function.name, arguments) for call, arguments in calls]
    found["content"] = "\n".join(filter(None, [found["content"], *spelled]))
    if role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{found['content']}\n</tool_response>"}
    return found


def _arguments(text: str, where: str) -> Any:
    """Templates write the arguments themselves, from a value."""
    try:
        arguments = from_json(text or "{}", allow_inf_nan=False)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise refuse(f"`{where}` must be a JSON object as a text", where)
    return arguments
