"""Chat templates: messages to one prompt, with the Jinja dialect of transformers.

Owns the sandboxed environment and what a template may see. The base's template is the deployer's and runs here; a template that an adapter
brings is a stranger's program and runs in template_worker's process. Knows no HTTP.
"""

import functools
import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.errors import TemplateFailed

MAX_TEMPLATE_CHARS = 256 << 10
MAX_PROMPT_CHARS = 8 << 20


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text for training; here its body is just shown."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@functools.lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(template)


def render(template: str, variables: dict[str, Any]) -> str:
    """The prompt. TemplateFailed if the template is broken, refuses the messages, or writes without end."""
    if len(template) > MAX_TEMPLATE_CHARS:
        raise TemplateFailed(f"the chat template is longer than {MAX_TEMPLATE_CHARS} characters")
    try:
        pieces, length = [], 0
        for piece in _compile(template).generate(**variables):
            length += len(piece)
            if length > MAX_PROMPT_CHARS:
                raise TemplateFailed(f"the chat template wrote more than {MAX_PROMPT_CHARS} characters")
            pieces.append(piece)
        return "".join(pieces)
    except TemplateFailed:
        raise
    except Exception as error:  # a template may raise anything that Python can
        raise TemplateFailed(f"{type(error).__name__}: {error}"[:1000]) from None
