"""Flags, environment and a TOML file become one Settings; flags win over the environment, that over the file, that over defaults.

Owns the spelling of each way in (`--max-best-of`, `MANYLORA_MAX_BEST_OF`, LoRAX's `MAX_BEST_OF`, `max_best_of`) and the words of every
mistake. Does not know what a setting means. `__main__` calls it, with the environment as an argument.
"""

import argparse
import difflib
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ByteSize, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from server.settings.fields import Settings
from server.settings.foreign import LORAX, LORAX_VARIABLES, VLLM, refusal

PREFIX = "MANYLORA_"
_OF_COMMANDS = {PREFIX + "SERVER", PREFIX + "KEY"}  # server.commands: a shell that talks to a server may start one too
_FIELDS = Settings.model_fields


class SettingsError(ValueError):
    """A setting is unknown or wrong. The message says which, where it came from, and what is allowed."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def read_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """The settings of this start. SettingsError for anything unknown or out of bounds; SystemExit(0) after `--help`."""
    flags = _read_flags(argv)
    config = flags.pop("config", None) or environ.get(PREFIX + "CONFIG")
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    from_file = {name: (value, f"key {name} of {config}") for name, value in (_read_file(Path(config)) if config else {}).items()}
    from_flags = {name: (value, "flag") for name, value in flags.items()}
    for layer in (from_file, _read_environment(environ), from_flags):
        values.update({name: _plain(name, value) for name, (value, _) in layer.items()})
        origins.update({name: origin for name, (_, origin) in layer.items()})
    try:
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError("; ".join(_words(detail, origins) for detail in error.errors())) from None


def _read_flags(argv: Sequence[str]) -> dict[str, Any]:
    parser = _Parser(
        prog="python -m server", allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter,
        description="Serves one base model and any number of LoRA adapters over HTTP.",
        epilog=f"Each flag may also be set as {PREFIX}<NAME> in the environment, or as <name> in the TOML file of --config.\n"
        "Flags win over the environment, that over the file. Sizes take a unit: 4GiB.",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help=f"TOML file with settings. Environment: {PREFIX}CONFIG")
    groups: dict[str, Any] = {}
    for name, field in _FIELDS.items():
        group = groups.setdefault(_extra(field)["group"], parser.add_argument_group(_extra(field)["group"]))
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(name, field), "metavar": _metavar(field)}
        if field.annotation is bool:
            options |= {"nargs": "?", "const": "true"}
        elif _is_list(field):
            options |= {"action": "append"}
        names = [_flag(name)] + (["-p"] if name == "port" else [])
        group.add_argument(*names, **options)
    strange = [name for name in LORAX | VLLM if name.replace("-", "_") not in _FIELDS]
    for name in strange:
        parser.add_argument(f"--{name}", dest=f"--{name}", nargs="*", default=None, help=argparse.SUPPRESS)
    if "env" in strange:
        parser.add_argument("-e", dest="--env", nargs="*", default=None, help=argparse.SUPPRESS)
    known, unknown = parser.parse_known_args(list(argv))
    for name in strange:
        values = vars(known).pop(f"--{name}")
        if values is not None and (reason := refusal(f"--{name}", name, " ".join(values) or "true")) is not None:
            raise SettingsError(reason)
    if unknown:
        raise SettingsError(_unknown("flag", unknown[0].split("=")[0], [_flag(name) for name in _FIELDS] + ["--config", "--help"]))
    return {name: value for name, value in vars(known).items() if value is not None}


def _read_environment(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Setting -> its value and the variable that it came from; our names win over LoRAX's, of which empty ones count as not set."""
    ours = {PREFIX + name.upper(): name for name in _FIELDS}
    for variable in environ:
        if variable.startswith(PREFIX) and variable not in ours and variable not in {PREFIX + "CONFIG", *_OF_COMMANDS}:
            raise SettingsError(_unknown("environment variable", variable, [*ours, PREFIX + "CONFIG"]))
    for variable, name in LORAX_VARIABLES.items():
        if name.replace("-", "_") in _FIELDS or not environ.get(variable):
            continue
        if (reason := refusal(f"environment variable {variable}", name, environ[variable])) is not None:
            raise SettingsError(reason)
    theirs = {lorax: name for name, field in _FIELDS.items() if (lorax := _extra(field)["lorax"])}
    found = {name: (environ[variable], variable) for variable, name in theirs.items() if environ.get(variable)}
    return found | {name: (environ[variable], variable) for variable, name in ours.items() if variable in environ}


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"config file {path}: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"config file {path}: {error}") from None
    for key in values:
        if key not in _FIELDS:
            raise SettingsError(_unknown(f"key in {path}:", key, list(_FIELDS)))
    return values


def _plain(name: str, value: Any) -> Any:
    """Text as the field's type wants it: "auto" and "" are None where None is allowed, lists part at commas."""
    field = _FIELDS[name]
    if isinstance(value, str) and _may_be_none(field) and value.strip().lower() in ("", "auto", "none"):
        return None
    if _is_list(field):
        parts = [value] if isinstance(value, str) else value
        if isinstance(parts, list) and all(isinstance(part, str) for part in parts):
            return [item.strip() for part in parts for item in part.split(",") if item.strip()]
    return value


def _words(detail: Any, origins: Mapping[str, str]) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return message
    name = str(detail["loc"][0])
    if detail["type"] == "missing":
        return f"{_flag(name)} is required (or {PREFIX}{name.upper()}, or {name} in the file)"
    given = "" if SecretStr in typing.get_args(_FIELDS[name].annotation) else f". Given: {detail['input']!r}"
    return f"{_flag(name)} ({origins.get(name, 'default')}): {message}{given}"


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"unknown {what} {name}" + (f"; did you mean {near[0]}?" if near else "")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _extra(field: FieldInfo) -> dict[str, Any]:
    assert isinstance(field.json_schema_extra, dict)
    return field.json_schema_extra


def _is_list(field: FieldInfo) -> bool:
    return typing.get_origin(field.annotation) is list


def _may_be_none(field: FieldInfo) -> bool:
    return type(None) in typing.get_args(field.annotation)


def _metavar(field: FieldInfo) -> str:
    kinds = [kind for kind in (typing.get_args(field.annotation) or (field.annotation,)) if kind is not type(None)]
    kinds = list(typing.get_args(kinds[0])) if typing.get_origin(kinds[0]) is typing.Literal else kinds
    if all(isinstance(kind, str) for kind in kinds):  # a Literal
        return "{" + ",".join(kinds) + "}"
    names = {"str": "TEXT", "Path": "DIR", "int": "N", "float": "X", "bool": "true|false", "ByteSize": "BYTES", "SecretStr": "KEY"}
    return names[kinds[0].__name__]


def _help(name: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"default: {_shown(field)}"
    bounds = [f"{word} {getattr(rule, key)}" for rule in field.metadata for key, word in _BOUNDS if getattr(rule, key, None) is not None]
    lorax = _extra(field)["lorax"]
    return f"{field.description}\n({', '.join([default, *bounds])}; {PREFIX}{name.upper()}{f' or {lorax}' if lorax else ''})"


_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


def _shown(field: FieldInfo) -> str:
    value = field.default
    if value is None:
        return "auto" if "auto:" in (field.description or "").lower() else "none"
    if isinstance(value, ByteSize):
        return value.human_readable()
    return ",".join(value) or "none" if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else str(value)
