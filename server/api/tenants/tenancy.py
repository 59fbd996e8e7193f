"""Tenants as one server knows them: rules, keys, issuers' tokens, limits; made once, kept up to date while the server runs.

Owns what holds now. Rules that cannot be stop a start; later they leave what holds in force, and say so in the log and in
`manylora_tenants_file_valid`. A revoked key or a new rule holds within about a second on every server of a fleet. `api.app` makes one if
--tenants-file is set; `LetIn` and the routes ask it.
"""

import asyncio
import logging
import os
import uuid
from functools import lru_cache
from pathlib import Path

from pydantic import SecretStr

from server.api.registry import Registry
from server.api.tenants.access import Access, Places
from server.api.tenants.bounds import LinkBounds
from server.api.tenants.callers import Caller
from server.api.tenants.keys import KeyRing
from server.api.tenants.limits import LimitBook
from server.api.tenants.rules import Rules, RulesError, Tenant, read_rules
from server.api.tenants.tokens import Tokens
from server.api.tenants.usage import FleetUsage
from server.errors import ServerError
from server.metrics import TenantSeries
from server.settings import Settings

log = logging.getLogger(__name__)

_MAX_REMEMBERED = 20_000


class Tenancy:
    """An `Identities` for `LetIn`. RulesError if the file cannot be; OSError or ValueError if the document of keys cannot be read."""

    def __init__(self, settings: Settings, registry: Registry, places: Places, series: TenantSeries) -> None:
        assert settings.tenants_file is not None and settings.registry_dir is not None
        self.admin_key: SecretStr | None = settings.admin_key
        self.gateway_key: SecretStr | None = settings.gateway_key
        self._path, self._registry, self._places, self._series = settings.tenants_file, registry, places, series
        self._seen = _facts(self._path)
        self._take(*_read(self._path), None)
        self.keys = KeyRing(settings.registry_dir)
        self._usage = FleetUsage(settings.registry_dir / "usage", uuid.uuid4().hex)
        self.limits = LimitBook(on_refused=lambda limit: series.limited.labels(limit=limit).inc())
        self._failures: dict[str, str] = {}

    def _take(self, rules: Rules, link_bounds: LinkBounds, tokens: Tokens | None) -> None:
        self._link_bounds = link_bounds
        self.rules, self.tokens = rules, Tokens(rules.issuers, tokens)
        self._of_name, self._of_claim, self._of_gateway = (
            lru_cache(_MAX_REMEMBERED)(find) for find in (rules.tenant, rules.of_claim, rules.of_gateway)
        )
        self._series.valid.set(1)
        self._series.tenants.set(len(rules.tenants))

    # -- callers ------------------------------------------------------------------------------------------------------------------

    def of_key(self, shown: str) -> Tenant | None:
        """See Identities. A key of a tenant that the rules no longer have opens nothing."""
        found = self.keys.check(shown)
        return self._of_name(found[0]) if found is not None else None

    def of_gateway(self, value: str) -> Tenant | None:
        """See Identities."""
        return self._of_gateway(value)

    async def of_token(self, token: str) -> Tenant | None:
        """See Identities."""
        return self._of_claim(await self.tokens.claim(token)) if self.tokens else None

    def refuses(self, reason: str) -> None:
        """See Identities."""
        self._series.refused.labels(reason=reason).inc()

    def link_bounds(self, place: str) -> list[str]:
        """Places that links of the adapter folder at `place` must not leave, by the rules as they are now. Any thread."""
        return self._link_bounds.of(place)

    def access(self, caller: Caller) -> Access:
        """What the caller may, by the rules as they are now."""
        return Access(caller, self._registry, self._places, self.rules.shared)

    # -- kept up to date ------------------------------------------------------------------------------------------------------------

    async def follow(self, every_s: float) -> None:
        """Take over what changes: the file, keys, what other servers used. Never returns."""
        while True:
            for refresh in (self._refresh_rules, self._refresh_keys, self._refresh_usage):
                try:
                    await refresh()
                except Exception:  # a fault of ours must not end this: a revoked key would hold for ever
                    log.exception("tenants: what changed could not be taken over")
            await asyncio.sleep(every_s)

    async def _refresh_rules(self) -> None:
        try:
            facts = await asyncio.to_thread(_facts, self._path)
            if facts == self._seen and "rules" not in self._failures:
                return
            rules, link_bounds = await asyncio.to_thread(_read, self._path)
        except (OSError, RulesError) as error:
            self._series.valid.set(0)
            self._failed("rules", f"the tenants file cannot be taken, what it said before holds: {error}")
            return
        self._failures.pop("rules", None)
        self._seen = facts
        self._take(rules, link_bounds, self.tokens)
        log.info("tenants: the file was read again, %d tenants", len(rules.tenants))

    async def _refresh_keys(self) -> None:
        try:
            if await asyncio.to_thread(self.keys.refresh):
                log.info("tenants: keys were made or revoked; generation %d", self.keys.document.generation)
            self._failures.pop("keys", None)
        except (OSError, ValueError, ServerError) as error:
            self._failed("keys", f"the document of keys cannot be read, those that it held before hold: {error}")

    async def _refresh_usage(self) -> None:
        try:
            self.limits.others = await asyncio.to_thread(self._usage.exchange, self.limits.used())
            self._failures.pop("usage", None)
        except OSError as error:
            self.limits.others = {}
            self._failed("usage", f"tokens are counted by this server alone: {error}")

    def _failed(self, what: str, words: str) -> None:
        """Once, however often it is tried again."""
        if self._failures.get(what) != words:
            log.error("%s", words)
        self._failures[what] = words

    async def close(self) -> None:
        """This server uses nothing any more."""
        await asyncio.to_thread(self._usage.close)


def _read(path: Path) -> tuple[Rules, LinkBounds]:
    """The rules and what is made of all tenants together: for thousands it takes too long for the event loop. RulesError."""
    rules = read_rules(path)
    return rules, LinkBounds(rules)


def _facts(path: Path) -> tuple[int, int, int]:
    """Change when the file does. Opened by its name, since a cached directory of NFS may be old."""
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
    except OSError as error:
        raise RulesError(f"tenants file {path}: {error.strerror}") from None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
