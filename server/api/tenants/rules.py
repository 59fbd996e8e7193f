"""The tenants file (TOML): who the tenants are, their weights, limits and sources, and whose tokens are taken.

Owns the file's keys, their bounds and the words of every mistake, which name the key. It knows neither requests nor disks; `tenancy` reads
the file again when it changes, and hands the parsed `Rules` on. What it says together: docs/tenants.md.
"""

import difflib
import hashlib
import re
import tomllib
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from server.sources import FACTORIES

TENANT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_HASHED_NAME = re.compile(r"id-[0-9a-f]{24}")  # of a caller whose own name cannot be one
EVERY = "*"  # any adapter, any place of a source
_RESERVED = ("anonymous",)  # what gateways call a caller without a key
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
MIN_WEIGHT, MAX_WEIGHT = 1e-3, 1e3  # what the scheduler takes
_MAX_FILE_BYTES = 4 << 20
_PLAIN = ("weight", "publish", "max_names", "max_pinned", "max_orders", "max_merges")  # a tenant's own, or else of [defaults]
_Text = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class RulesError(ValueError):
    """The tenants file cannot be. The message names the key and what is allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Limits(_Section):
    """Bounds of a tenant or of an adapter; None: no bound of its own."""

    requests_in_flight: int | None = Field(None, ge=1, description="Sequences between arrival and last byte, on one server.")
    queue_length: int | None = Field(None, ge=1, description="Of these, sequences without a token yet, on one server.")
    tokens_a_minute: int | None = Field(None, ge=1, description="Prompt and output tokens, over the whole fleet.")
    output_tokens: int | None = Field(None, ge=1, description="Longest answer that a request may ask for.")

    def over(self, other: "Limits") -> "Limits":
        """These, and where they say nothing those of `other`."""
        return Limits(**(other.model_dump(exclude_none=True) | self.model_dump(exclude_none=True)))


Sources = dict[str, tuple[_Text, ...]]
Spelling = Callable[[str], str]


def _check_sources(sources: Sources) -> None:
    for name in sources:
        if name not in FACTORIES:
            raise ValueError(f"sources.{name[:64]}: there is no such source; allowed are {', '.join(sorted(FACTORIES))}")


class _Shares(_Section):
    adapters: dict[_Text, Limits] = Field({}, description='Limits of each adapter; "*": of every other one.')
    sources: Sources = Field({}, description="Places of each source: folders, bucket/prefix, hub owners; `*` is all of it.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_sources(self.sources)
        return self

    def limits_of(self, adapter: str, source: str = "", spelling: Spelling = str) -> Limits:
        """The limits of an adapter by the name that the tenant gives it. `spelling`: how an id of the source is kept, however the file
        writes it; one for each source, asked once for each key of the file."""
        spelled = self._spelled.get(source)
        if spelled is None:  # of two keys that are one id the first counts
            keys = [key for key in reversed(self.adapters) if key != EVERY]
            spelled = self._spelled[source] = {spelling(key): self.adapters[key] for key in keys}
        return self.adapters.get(adapter) or spelled.get(adapter) or self.adapters.get(EVERY) or Limits()

    @cached_property
    def _spelled(self) -> dict[str, dict[str, Limits]]:
        """`adapters` by ids as each source keeps them."""
        return {}


class Defaults(_Section):
    """[defaults]: what a tenant has that says nothing else."""

    weight: float = Field(1.0, ge=MIN_WEIGHT, le=MAX_WEIGHT, description="Share of the engine against other tenants' when all have work.")
    publish: bool = Field(True, description="May publish, pin, unload and delete what is its own.")
    max_names: int = Field(100, ge=0, description="Names that it may have published; and ids of sources that it may have deleted.")
    max_pinned: int = Field(0, ge=0, description="Adapters that it may keep in memory.")
    max_orders: int = Field(8, ge=1, description="Orders about adapters under way at once, and merges being made, on one server.")
    max_merges: int = Field(32, ge=1, description="Merges kept in a server's store; beyond it the least recently used goes.")
    limits: Limits = Limits()
    sources: dict[str, tuple[_Text, ...]] = Field({}, description="As of a tenant; {tenant} in it stands for the tenant's name.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_sources(self.sources)
        return self


class TenantRules(_Shares):
    """[tenants.NAME]"""

    limits: Limits = Limits()
    weight: float | None = Field(None, ge=MIN_WEIGHT, le=MAX_WEIGHT, description="See [defaults].")
    publish: bool | None = Field(None, description="See [defaults].")
    max_names: int | None = Field(None, ge=0, description="See [defaults].")
    max_pinned: int | None = Field(None, ge=0, description="See [defaults].")
    max_orders: int | None = Field(None, ge=1, description="See [defaults].")
    max_merges: int | None = Field(None, ge=1, description="See [defaults].")
    gateway: tuple[_Text, ...] = Field((), description="What the gateway calls it: key ids, ARNs, client ids; its own name is always one.")
    claims: tuple[_Text, ...] = Field((), description="Values of a token's claim that mean it; its own name is always one.")


class Shared(_Shares):
    """[shared]: adapters of nobody, which every tenant may list and call. Limits of an adapter are of all tenants together."""

    prefix_cache: bool = Field(False, description="Tenants share the prefix cache of shared adapters and of the base.")


class Gateway(_Section):
    """[gateway]"""

    others: Literal["refuse", "each"] = Field("refuse", description="Callers that no tenant names; each: every one is a tenant of its own.")


class Issuer(_Section):
    """[[issuers]]: who makes tokens that are taken here."""

    issuer: _Text = Field(description="The claim `iss`, to the letter.")
    audience: tuple[_Text, ...] = Field(min_length=1, description="The claim `aud` must hold one of them.")
    jwks: _Text = Field(description="The issuer's keys: an https address, or a file.")
    algorithms: tuple[str, ...] = Field(("RS256",), min_length=1, description="Signatures that are taken.")
    claim: _Text = Field("tenant", description="The claim whose value says which tenant.")
    leeway_s: float = Field(30.0, ge=0, le=300, description="Clocks may differ by so much.")
    cache_s: float = Field(300.0, ge=10, le=86_400, description="Keys are asked for again after so long.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.algorithms:
            if name not in ALGORITHMS:
                raise ValueError(f"algorithms: {name[:32]!r} is none of {', '.join(ALGORITHMS)}")
        scheme, colon, rest = self.jwks.partition("://")
        loopback = rest.split("/")[0].rsplit(":", 1)[0] in ("localhost", "127.0.0.1", "[::1]")
        if colon and scheme != "https" and not (scheme == "http" and loopback):
            raise ValueError(f"jwks: keys come over https (http from this machine alone), or from a file. Given: {scheme[:32]}")
        return self


class Tenant(_Section):
    """A tenant with everything said about it, defaults filled in."""

    name: str
    weight: float
    publish: bool
    max_names: int
    max_pinned: int
    max_orders: int
    max_merges: int
    limits: Limits
    rules: TenantRules
    sources: Sources  # its own; those of [shared] come beside them


class Rules(_Section):
    """The whole file."""

    defaults: Defaults = Defaults()
    shared: Shared = Shared()
    gateway: Gateway = Gateway()
    issuers: tuple[Issuer, ...] = ()
    tenants: dict[str, TenantRules] = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.tenants:
            if not TENANT_NAME.fullmatch(name) or name in _RESERVED:
                raise ValueError(
                    f"tenants.{ascii(name[:64])[1:-1]}: a tenant's name has 1 to 63 of a-z, 0-9, - and _, begins with a letter or digit "
                    f"(no separators), and is not {' or '.join(_RESERVED)}"
                )
        for what in ("gateway", "claims"):
            known: dict[str, str] = {}
            for name, tenant in self.tenants.items():
                for value in {name, *getattr(tenant, what)}:
                    if known.setdefault(value, name) != name:
                        raise ValueError(f"tenants.{name}.{what}: {value[:64]!r} means tenant {known[value]} already")
        if len({one.issuer for one in self.issuers}) < len(self.issuers):
            raise ValueError("issuers: each `issuer` may stand here once")
        return self

    def tenant(self, name: str) -> Tenant | None:
        """The tenant of that name; None if the file has none."""
        return self._filled(name, self.tenants[name]) if name in self.tenants else None

    def of_claim(self, value: str) -> Tenant | None:
        """Whom a token's claim means."""
        return self._named_by("claims", value)

    def of_gateway(self, value: str) -> Tenant | None:
        """Whom the gateway means. With `others = "each"` everybody is somebody: by that name if it can be one, else by its hash. A
        caller whose name looks like a hash gets one too: it could be another one's."""
        if (known := self._named_by("gateway", value)) is not None or self.gateway.others == "refuse" or value in ("", *_RESERVED):
            return known
        can_be_name = TENANT_NAME.fullmatch(value) and not _HASHED_NAME.fullmatch(value)
        name = value if can_be_name else f"id-{hashlib.sha256(value.encode()).hexdigest()[:24]}"
        return None if name in self.tenants else self._filled(name, TenantRules())

    def _named_by(self, what: str, value: str) -> Tenant | None:
        for name, tenant in self.tenants.items():
            if value == name or value in getattr(tenant, what):
                return self._filled(name, tenant)
        return None

    def _filled(self, name: str, rules: TenantRules) -> Tenant:
        own = {key: value for key in _PLAIN if (value := getattr(rules, key)) is not None}
        given = {source: tuple(one.replace("{tenant}", name) for one in places) for source, places in self.defaults.sources.items()}
        return Tenant(
            name=name, limits=rules.limits.over(self.defaults.limits), rules=rules, sources=given | rules.sources,
            **self.defaults.model_dump(include=set(_PLAIN)) | own,
        )  # fmt: skip


def read_rules(path: Path) -> Rules:
    """The file, checked. RulesError that names the key."""
    try:
        raw = path.read_bytes()[: _MAX_FILE_BYTES + 1]
    except OSError as error:
        raise RulesError(f"tenants file {path}: {error.strerror}") from None
    if len(raw) > _MAX_FILE_BYTES:
        raise RulesError(f"tenants file {path}: it is larger than {_MAX_FILE_BYTES} bytes")
    try:
        return parse_rules(tomllib.loads(raw.decode()))
    except ValueError as error:  # tomllib's and ours are ValueErrors
        raise RulesError(f"tenants file {path}: {error}") from None


def parse_rules(values: Mapping[str, Any]) -> Rules:
    """What the file holds, checked. RulesError as `read_rules`."""
    try:
        return Rules.model_validate(_with_tuples(values))
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise RulesError("; ".join(_words(detail) for detail in details[:5])) from None


def _with_tuples(value: Any) -> Any:
    """TOML's arrays as pydantic's strict mode wants them."""
    if isinstance(value, Mapping):
        return {key: _with_tuples(one) for key, one in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _words(detail: Any) -> str:
    path = ".".join(str(part) if str(part).isprintable() else ascii(part) for part in detail["loc"] if part != "[key]")
    if detail["type"] == "extra_forbidden":
        known = _keys_at(detail["loc"][:-1])
        near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        return f"unknown key {path}{f'; did you mean {near[0]}?' if near else ''} Allowed: {', '.join(known)}"
    message = detail["msg"].removeprefix("Value error, ")
    shown = "" if detail["type"] in ("missing", "value_error") else f". Given: {detail['input']!r:.64}"
    return f"{path}: {message}{shown}" if path else message


def _keys_at(loc: tuple[Any, ...]) -> list[str]:
    """The keys that the section at `loc` takes."""
    model: type[BaseModel] = Rules
    sections = {
        "defaults": Defaults, "shared": Shared, "gateway": Gateway, "issuers": Issuer, "tenants": TenantRules, "limits": Limits,
        "adapters": Limits,
    }  # fmt: skip
    for part in loc:
        model = sections.get(part, model) if isinstance(part, str) else model
    return list(model.model_fields)
