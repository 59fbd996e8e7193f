"""The table of docs/tenants.md: every key of the tenants file. `tables` fills it in."""

from collections.abc import Callable, Iterator
from typing import Any

from pydantic.fields import PydanticUndefined

from server.api.tenants.rules import Defaults, Gateway, Issuer, Limits, Shared, TenantRules

_SECTIONS = {
    "[defaults]": Defaults,
    "[tenants.NAME]": TenantRules,
    "[shared]": Shared,
    "limits, and each of adapters": Limits,
    "[gateway]": Gateway,
    "[[issuers]]": Issuer,
}
_DESCRIBED = {"limits": "Its limits, see below."}


def tenant_rules() -> str:
    """Every key, by section."""
    rows = ["| key | default | what it is |", "|---|---|---|"]
    for section, model in _SECTIONS.items():
        rows.append(f"| **{section}** | | |")
        rows += _rows(model)
    return "\n".join(rows)


def _rows(model: Any) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"| `{name}` | {_default(field)} | {field.description or _DESCRIBED[name]} |"


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None or field.default in ((), {}) or isinstance(field.default, Limits):
        return "none"
    value = field.default
    return f"`{str(value).lower() if isinstance(value, bool) else ', '.join(value) if isinstance(value, tuple) else value}`"


TABLES: dict[str, Callable[[], str]] = {"tenant_rules": tenant_rules}
