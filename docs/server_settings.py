"""infra/server_settings.json: the server's settings as the deployment's configuration checks them. `make docs` writes it."""

import json
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import ByteSize, SecretStr

from server.settings.fields import Settings

PATH = Path(__file__).parent.parent / "infra" / "server_settings.json"
_NAMES = {bool: "boolean", int: "integer", float: "number", str: "text", Path: "text", ByteSize: "bytes", list: "list", SecretStr: "secret"}


def server_settings() -> str:
    """The file's text: type, bounds and description of each setting."""
    return json.dumps({name: _rule(field) for name, field in Settings.model_fields.items()}, indent=1) + "\n"


def _rule(field: Any) -> dict[str, Any]:
    kind = field.annotation
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    rule: dict[str, Any] = {"description": field.description}
    if typing.get_origin(kind) is typing.Literal:
        return rule | {"type": "text", "allowed": list(typing.get_args(kind))}
    rule["type"] = _NAMES[typing.get_origin(kind) or kind]
    for bound in field.metadata:
        for key in ("ge", "gt", "le", "lt", "pattern"):
            if getattr(bound, key, None) is not None:
                rule[key] = getattr(bound, key)
    return rule
