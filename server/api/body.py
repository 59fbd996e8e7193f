"""A request's body, read within limits and checked against its schema; every mistake gets a message that names the field.

Owns the reading and the words. The routes call `read_body`, and put `body_docs` beside their path so that /docs shows the schema.
"""

import asyncio
import difflib
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from server.api.schemas_common import RequestModel
from server.errors import BodyMismatch, BodyTooLarge, MalformedBody, ValidationFailed, WrongMediaType

Body = TypeVar("Body", bound=RequestModel)

_READ_TIMEOUT_S = 60.0
# Each wrong item costs an error of about a kilobyte; no request needs nearly as many items.
MAX_ITEMS = 10_000  # of one list or object
_MAX_ALL_ITEMS = 50_000


class ClientGone(Exception):
    """Nobody is there to be answered."""


async def read_body(request: Request, schema: type[Body], *, max_bytes: int, ignore_unknown: bool = False) -> Body:
    """The body as `schema`. WrongMediaType, BodyTooLarge, MalformedBody, or BodyMismatch for what is in it.

    `ignore_unknown`: drop unknown fields as LoRAX does, in place of refusing them."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise WrongMediaType("Expected request with `Content-Type: application/json`")
    try:
        value = from_json(await _read(request, max_bytes), allow_inf_nan=False)
    except ValueError as error:
        raise MalformedBody(f"Failed to parse the request body as JSON: {error}") from None
    if isinstance(value, dict | list):
        _check_sizes(value)
    while True:
        try:
            return schema.model_validate(value)
        except ValidationError as error:
            details = error.errors(include_url=False, include_input=False)
            unknown = [detail["loc"] for detail in details if detail["type"] == "extra_forbidden"]
            if not (ignore_unknown and unknown):
                raise _failure(schema, details) from None
            for path in unknown:
                _drop(value, path)


async def _read(request: Request, max_bytes: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > max_bytes:
        raise BodyTooLarge(f"The request body is longer than {max_bytes} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(_READ_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise BodyTooLarge(f"The request body is longer than {max_bytes} bytes")
    except ClientDisconnect:
        raise ClientGone from None
    except TimeoutError:
        raise MalformedBody(f"The request body did not arrive within {_READ_TIMEOUT_S:.0f} s") from None
    return bytes(body)


def _check_sizes(value: Any) -> None:
    """Refuse lists and objects far beyond what any field takes, before each item is checked; token ids (lists in `prompt`) may be many."""
    num_items = 0
    pending: list[tuple[Any, tuple[Any, ...]]] = [(value, ())]
    while pending:
        value, loc = pending.pop()
        if loc[:1] == ("prompt",) and isinstance(value, list) and len(loc) <= 2 and value and isinstance(value[0], int):
            continue
        num_items += len(value)
        if len(value) > MAX_ITEMS or num_items > _MAX_ALL_ITEMS:
            name, max_items = (_path(loc)[:200], MAX_ITEMS) if len(value) > MAX_ITEMS else (_path(loc[:1])[:200], _MAX_ALL_ITEMS)
            what = f"`{name}`" if name else "the body"
            raise ValidationFailed(f"{what} has more than {max_items} items", param=name or None)
        items = value.items() if isinstance(value, dict) else enumerate(value)
        pending += [(item, (*loc, key)) for key, item in items if isinstance(item, dict | list) and item]


def _failure(schema: type[RequestModel], details: list[Any]) -> BodyMismatch:
    """One sentence a mistake, at most five; the first names `param`."""
    if any(detail["loc"][-1:] != ("str",) for detail in details):  # "not a string" says nothing where a list's part is wrong
        details = [detail for detail in details if detail["loc"][-1:] != ("str",)]
    words = [_words(schema, detail) for detail in details[:5]]
    if len(details) > 5:
        words.append(f"and {len(details) - 5} more")
    return BodyMismatch("; ".join(words), param=_path((*details[0]["loc"], *_named_field(details[0]))) or None)


def _words(schema: type[RequestModel], detail: Any) -> str:
    path = _path(detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    match detail["type"]:
        case "missing":
            return f"missing field `{path}`"
        case "extra_forbidden":
            allowed = _fields_at(schema, detail["loc"][:-1])
            name = str(detail["loc"][-1])
            near = difflib.get_close_matches(name, allowed, n=1)
            return f"unknown field `{path[:200]}`{f', did you mean `{near[0]}`?' if near else ';'} allowed are {', '.join(allowed)}"
        case "not_served":
            return message
        case "model_type" | "model_attributes_type":
            return f"{f'`{path}`' if path else 'the body'} must be a JSON object"
    return f"`{path}`: {message}" if path else message


def _named_field(detail: Any) -> tuple[str, ...]:
    return (detail["ctx"]["name"],) if detail["type"] == "not_served" else ()


def _path(loc: tuple[Any, ...]) -> str:
    """("messages", 0, "role") -> messages[0].role; leaves out pydantic's names of a union's branches."""
    parts = [part for part in loc if isinstance(part, int) or (part.isidentifier() and part not in ("str", "int"))]
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return (text or ".".join(map(str, loc))).removeprefix(".").encode("utf-8", "replace").decode()


def _fields_at(schema: type[RequestModel], loc: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the model at `loc`."""
    model: Any = schema
    for part in loc:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        model = next((kind for kind in _models_in(model.model_fields[part].annotation)), model)
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _drop(value: Any, path: tuple[Any, ...]) -> None:
    """Remove what is at `path`; names of a union's branches in it are passed over."""
    for part in path[:-1]:
        if isinstance(value, list) and isinstance(part, int) or isinstance(value, dict) and part in value:
            value = value[part]
    value.pop(path[-1])


def body_docs(schema: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is `schema`. Its definitions are collected by api.openapi."""
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}},
        }
    }


def stream_docs(schema: type[BaseModel], description: str) -> dict[str, Any]:
    """An entry of a route's `responses` for server-sent events whose data is `schema` (OpenAPI 3.2's form). api.openapi collects its
    definition."""
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"$ref": f"#/components/schemas/{schema.__name__}"}}
    event = {"type": "object", "required": ["data"], "properties": {"data": data}}
    return {"description": description, "content": {"text/event-stream": {"schema": event}}}


def error_content(schema: type[BaseModel]) -> dict[str, Any]:
    """`content` of an error's entry in a route's `responses`, where the route itself answers no JSON."""
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}}
