"""Which settings of the server a deployer may set in [server], read from server_settings.json.

The list is made from the server's own settings by `make docs` (infra may not import the server) and a test keeps the two the same. Owns the
check of a value against it, and the names that the kit sets itself, each with the key to use instead. `config` and user-data call it.
"""

import json
import re
from pathlib import Path
from typing import Any

SETTINGS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
OWNED = {
    "model_id": "model.id",
    "revision": "model.revision",
    "device": "none: the fleet has GPUs",
    "adapters_dir": "model.adapters_prefix",
    "store_dir": "storage",
    "registry_dir": "storage",
    "model_bucket": "none: the kit's bucket",
    "model_folder": "model.adapters_prefix",
    "s3_endpoint_url": "none: the kit's bucket",
    "s3_region": "region",
    "hub_enabled": "model.hub",
    "allowed_hub_owners": "model.hub_owners",
    "hostname": "none: the instance's address",
    "port": "none: the load balancer's target port",
    "drain_timeout_s": "fleet.drain_s",
    "otlp_endpoint": "observability.otlp_endpoint",
    "idle_connection_s": "endpoint.timeout_s",
    "root_path": "none: the gateway's stage",
    "cors_allow_origin": "endpoint.cors_origins",
    "cors_allow_method": "endpoint.cors_origins",
    "cors_allow_header": "endpoint.cors_origins",
    "tenants_file": "endpoint.tenants",
    "gateway_key": "none: made by the kit with endpoint.tenants",
    "admin_key": "none: made by the kit where endpoint.auth can tell an admin",
}
_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "bytes": (int, str),
    "number": (int, float),
    "boolean": (bool,),
    "text": (str,),
    "list": (list, tuple),
}
_BYTES = re.compile(r"^[0-9]+(\.[0-9]+)? ?([kKMGT]i?)?B?$")


def check_server_settings(values: dict[str, Any]) -> None:
    """ValueError that names the first setting that is unknown, the kit's own, or out of bounds, and what is allowed."""
    for name, value in values.items():
        if name in OWNED:
            raise ValueError(f"{name} is set by the kit; the key for it: {OWNED[name]}")
        if SETTINGS.get(name, {}).get("type") == "secret":
            raise ValueError(f"{name} is a secret, and what is set here can be read in user-data")
        if name not in SETTINGS:
            raise ValueError(f"{name} is not a setting of the server. Allowed: {', '.join(_allowed())}")
        _check(name, value, SETTINGS[name])


def _allowed() -> list[str]:
    return sorted(name for name, rule in SETTINGS.items() if name not in OWNED and rule["type"] != "secret")


def environment_value(value: Any) -> str:
    """A checked value as the server reads it from the environment."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _check(name: str, value: Any, rule: dict[str, Any]) -> None:
    wrong_bool = isinstance(value, bool) and rule["type"] != "boolean"
    if wrong_bool or not isinstance(value, _TYPES[rule["type"]]):
        raise ValueError(f"{name} must be of type {rule['type']}. Given: {value!r}")
    if "allowed" in rule and value not in rule["allowed"]:
        raise ValueError(f"{name} must be one of {', '.join(rule['allowed'])}. Given: {value!r}")
    if "pattern" in rule and not re.search(rule["pattern"], value):
        raise ValueError(f"{name} must match {rule['pattern']}. Given: {value!r}")
    if isinstance(value, str):
        if rule["type"] == "bytes" and not _BYTES.match(value):
            raise ValueError(f"{name} must be a number of bytes such as 4GiB. Given: {value!r}")
        if any(ord(character) < 32 or character in "\"'\\$`" for character in value):
            raise ValueError(f"{name} must not hold quotes, backslashes, $ or control characters. Given: {value!r}")
        return
    for key, holds, sign in (
        ("ge", lambda bound: value >= bound, ">="),
        ("gt", lambda bound: value > bound, ">"),
        ("le", lambda bound: value <= bound, "<="),
        ("lt", lambda bound: value < bound, "<"),
    ):
        if key in rule and not holds(rule[key]):
            raise ValueError(f"{name} must be {sign} {rule[key]}. Given: {value!r}")
