"""How this package words a refusal: names from an untrusted file are quoted and shortened before they reach a caller."""

from collections.abc import Iterable

from server.errors import AdapterRefused


def quote(name: object) -> str:
    """`name` in quotes, in ASCII, at most 120 characters."""
    text = ascii(name)
    return text if len(text) <= 120 else text[:117] + "..."


def quote_some(names: Iterable[object], limit: int = 3) -> str:
    """The first few names in quotes, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(quote(name) for name in listed[:limit]) + more


def refuse(message: str, *, param: str | None = None) -> AdapterRefused:
    """The error to raise; `param` is the config's field or the file's key, made plain here."""
    shown = None if param is None else param.encode("ascii", "backslashreplace").decode()[:200]
    return AdapterRefused(message, param=shown)
