"""`python -m server keys create|list|revoke`: API keys of a fleet, in the document that its servers read (server.api.tenants.keys).

Owns the command's flags and what it prints: a new key once, on stdout alone, and never again. It works on the shared folder itself, beside
running servers, which follow within a second. Where that folder is, it takes from the server's own settings: --registry-dir, MANYLORA_*, or
the file of --config.
"""

import argparse
import json
import re
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from server.api.tenants.keys import ApiKey, KeyRing
from server.api.tenants.rules import TENANT_NAME, RulesError, read_rules
from server.errors import ServerError

_SPAN = re.compile(r"(\d{1,5})([hdw])")
_SECONDS = {"h": 3600, "d": 86_400, "w": 604_800}
_MAX_LABEL_CHARS = 100


class _Refused(Exception):
    """What was asked for cannot be; the message says why."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Refused(message)


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """0 when done, 1 if the document could not be read or written, 2 for what cannot be."""
    try:
        flags = _read_flags(argv)
        ring = KeyRing(_setting("registry_dir", flags, environ, "the folder that the servers share"))
        answer = {"create": _create, "list": _list, "revoke": _revoke}[flags.order](ring, flags, environ)
    except (_Refused, ServerError, RulesError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of stdout
        raise
    except (OSError, ValueError) as error:
        print(f"error: the document of keys: {error}", file=sys.stderr)
        return 1
    if answer is not None:
        print(json.dumps(answer, indent=1 if sys.stdout.isatty() else None))
    return 0


def _read_flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m server keys", description="API keys of tenants.", allow_abbrev=False)
    orders = parser.add_subparsers(dest="order", required=True, parser_class=_Parser)
    create = orders.add_parser("create", help="make a key; it is shown once", allow_abbrev=False)
    create.add_argument("--tenant", required=True, help="whose it is")
    create.add_argument("--label", default="", help="what for; shown in lists")
    create.add_argument("--expires", metavar="SPAN", help="12h, 90d or 4w; without it until it is revoked")
    listing = orders.add_parser("list", help="prefixes, tenants, states; never a key", allow_abbrev=False)
    listing.add_argument("--tenant", help="of this one alone")
    revoke = orders.add_parser("revoke", help="a key opens nothing from now on, on every server of the fleet", allow_abbrev=False)
    revoke.add_argument("prefix", help="as `list` shows it: mlk_...")
    for each in (create, listing, revoke):
        each.add_argument("--json", action="store_true", help="print JSON")
        each.add_argument("--registry-dir", type=Path, help="as the servers' own setting")
        each.add_argument("--tenants-file", type=Path, help="as the servers' own setting; a tenant that is not in it is refused")
        each.add_argument("--config", type=Path, help="the servers' file of settings")
    return parser.parse_args(list(argv))


def _setting(name: str, flags: argparse.Namespace, environ: Mapping[str, str], what: str) -> Path:
    """A setting of the servers: flag, environment, file, in this order; the registry's own default comes from store_dir."""
    if (found := _find(name, flags, environ)) is not None:
        return found
    if name == "registry_dir" and (store := _find("store_dir", flags, environ)) is not None:
        return store / "registry"
    raise _Refused(f"--{name.replace('_', '-')} (or MANYLORA_{name.upper()}) must say {what}")


def _find(name: str, flags: argparse.Namespace, environ: Mapping[str, str]) -> Path | None:
    config = flags.config or environ.get("MANYLORA_CONFIG")
    value: Any = getattr(flags, name, None) or environ.get(f"MANYLORA_{name.upper()}")
    if value is None and config:
        try:
            value = tomllib.loads(Path(config).read_text(encoding="utf-8")).get(name)
        except (OSError, ValueError) as error:
            raise _Refused(f"--config {config}: {error}") from None
    return Path(value) if value else None


def _create(ring: KeyRing, flags: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, Any] | None:
    tenant, label = flags.tenant, flags.label
    if not TENANT_NAME.fullmatch(tenant):
        raise _Refused("--tenant: a tenant's name has 1 to 63 of a-z, 0-9, - and _, and begins with a letter or digit (no separators)")
    if (path := _find("tenants_file", flags, environ)) is not None and read_rules(path).tenant(tenant) is None:
        raise _Refused(f"--tenant {tenant}: {path} has no tenant of that name, its key would open nothing")
    if len(label) > _MAX_LABEL_CHARS or not label.isprintable():
        raise _Refused(f"--label must have at most {_MAX_LABEL_CHARS} printable characters")
    key, prefix, kept = ring.create(tenant, label=label, expires_at=_expiry(flags.expires))
    if flags.json:
        return {"key": key, **_row(prefix, kept)}
    print(f"key {prefix} of tenant {tenant}; it is shown this once:", file=sys.stderr)
    print(key)
    return None


def _expiry(span: str | None) -> int:
    if span is None:
        return 0
    form = _SPAN.fullmatch(span)
    if form is None or not int(form[1]):
        raise _Refused("--expires must be a number of hours, days or weeks, as 12h, 90d or 4w")
    return int(time.time()) + int(form[1]) * _SECONDS[form[2]]


def _list(ring: KeyRing, flags: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, Any] | None:
    rows = [_row(prefix, key) for prefix, key in ring.document.keys.items() if flags.tenant in (None, key.tenant)]
    rows.sort(key=lambda row: (row["tenant"], row["created_at"], row["prefix"]))
    if flags.json:
        return {"keys": rows, "generation": ring.document.generation}
    for row in rows:
        until = f" until {_day(row['expires_at'])}" if row["expires_at"] else ""
        print(f"{row['prefix']}  {row['tenant']:<20}  {row['state']}{until}  made {_day(row['created_at'])}  {row['label']}".rstrip())
    return None


def _revoke(ring: KeyRing, flags: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, Any] | None:
    prefix = ring.revoke(flags.prefix)
    if flags.json:
        return _row(prefix, ring.document.keys[prefix])
    print(f"key {prefix} is revoked; servers that run follow within a second or two", file=sys.stderr)
    return None


def _row(prefix: str, key: ApiKey) -> dict[str, Any]:
    times = {"created_at": key.created_at, "expires_at": key.expires_at or None, "revoked_at": key.revoked_at or None}
    return {"prefix": prefix, "tenant": key.tenant, "label": key.label, "state": key.state(time.time()), **times}


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
