"""What is known of each adapter, for GET /v1/adapters and /v1/models: names from registry and sources, memory from api.residency.

Owns nothing but the words: `state` is what is going on with a name, `tier` where its weights are on this server.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from server.api.adapters import AdapterResolver, AdapterSelection
from server.api.names import owner_of, shown
from server.api.registry import Registry
from server.api.residency import Tier, Use
from server.api.tenants.access import Access

_STATES = {"loading": "loading", "failed": "failed", "host": "ready", "device": "ready"}


class AdapterStatus:
    """Rows about the adapters of one server; for the event loop's thread."""

    def __init__(self, registry: Registry, adapters: AdapterResolver) -> None:
        self._registry, self._adapters, self._residency = registry, adapters, adapters.residency

    def used(self) -> list[AdapterSelection]:
        """What this server has used, of any source."""
        return [AdapterSelection(source, adapter_id) for (source, adapter_id, merge), _ in self._residency.uses() if merge is None]

    def names(self, ids: Iterable[str], used: Iterable[AdapterSelection]) -> list[AdapterSelection]:
        """What requests may name: published names, `ids` of the default source, and what was `used` of other sources. Any thread."""
        default = self._registry.default_source
        named = [AdapterSelection(default, name) for name in self._registry.listed(default, ids)]
        known = {selection.name_key for selection in named}
        return named + sorted((one for one in used if one.name_key not in known), key=lambda one: (one.source, one.adapter_id))

    def row(self, selection: AdapterSelection, access: Access) -> dict[str, Any]:
        """All that is known of a name, for whom it is: where a shared adapter came from and how others use it is the operator's to know."""
        row = self._row(selection)
        if access.shared is None:  # there are no tenants
            return row
        row["owner"] = owner_of(selection.adapter_id) or None
        if access.tenant is not None:
            row["id"] = shown(row["id"])
            if access.is_own(selection):
                row["owner"], row["source_id"] = access.tenant.name, shown(row["source_id"])
            else:
                row |= {"source_id": row["id"], "hits": None, "requests": None, "error": None, "past_versions": []}
        return row

    def _row(self, selection: AdapterSelection) -> dict[str, Any]:
        is_name = selection.source == self._registry.default_source
        entry = self._registry.entry(selection.adapter_id)
        version, pinned = (entry.version, entry.pinned) if is_name else (None, False)
        use = self._residency.use(selection.name_key)
        adapter_hash = version.hash if version is not None else use.ref.hash if use is not None else None
        tier = self._residency.tier(adapter_hash) if adapter_hash is not None else None
        facts = version if version is not None else use
        return {
            "id": selection.adapter_id,
            "object": "adapter",
            "source": version.source if version is not None else selection.source,
            "source_id": version.adapter_id if version is not None else selection.adapter_id,
            "version": version.number if version is not None else None,
            "past_versions": [one.number for one in entry.past] if is_name else [],
            "published_at": version.published_at if version is not None else None,
            "hash": adapter_hash,
            "base": facts.base_name if facts is not None else None,
            "rank": facts.rank if facts is not None else None,
            "state": self._state(selection, tier),
            "tier": _tier(use, tier),
            "file_bytes": version.size_bytes if version is not None else None,
            "memory_bytes": tier.bytes if tier is not None else 0,
            "load_s": tier.load_s if tier is not None else None,
            "error": tier.error if tier is not None else None,
            "hits": self._residency.num_hits(selection.name_key),
            "requests": self._residency.num_requests(adapter_hash) if adapter_hash is not None else 0,
            "pinned": pinned,
        }

    def draining(self) -> list[dict[str, Any]]:
        """Versions that no name means any more and that requests still end with."""
        rows = []
        for adapter_hash, num_requests in self._residency.draining():
            tier = self._residency.tier(adapter_hash)
            rows.append({"hash": adapter_hash, "requests": num_requests, "memory_bytes": tier.bytes if tier is not None else 0})
        return rows

    def num_by_tier(self) -> Counter[str]:
        """Adapters of this server, each counted once, by the nearest tier that has it: device, host or disk."""
        used = [use.ref.hash for _, use in self._residency.uses()]
        tiers = {one: "disk" for one in used} | {one: tier.state for one, tier in self._residency.tiers()}
        return Counter(tier if tier in ("device", "host") else "disk" for tier in tiers.values())

    def _state(self, selection: AdapterSelection, tier: Tier | None) -> str:
        if tier is not None:
            return _STATES.get(tier.state, "failed")
        return "fetching" if self._adapters.is_resolving(selection) else "idle"


def _tier(use: Use | None, tier: Tier | None) -> str:
    """absent, disk, host or device."""
    if tier is not None and tier.state in ("host", "device"):
        return tier.state
    return "absent" if use is None else "disk"
