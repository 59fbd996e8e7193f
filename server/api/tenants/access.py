"""Which adapters a caller may list, call and give orders about. Names first: its own, then shared ones; then ids of sources by their place.

Owns the decision; it is made from the id, the rules and the registry alone, before any source is asked, so "not yours" takes as long for
what there is as for what there is not, and is worded like "not there" (`nowhere`). The routes ask for one `Access` a request. Without
tenants, and for the operator, everything is allowed and names are as they are kept.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from server.api.names import SEPARATOR, owner_of, qualified, shown
from server.api.registry import NOTHING, Entry, Registry
from server.api.selection import AdapterSelection
from server.api.tenants.callers import OPERATOR, Caller
from server.api.tenants.rules import EVERY, TENANT_NAME, Shared, Sources, Tenant
from server.errors import AdapterNotFound, Conflict, Forbidden, ValidationFailed
from server.sources import Sources as AdapterSources
from server.sources.base import not_found, raise_invalid
from server.sources.ids import split_id

_MAX_PLACES = 50_000
Names = Mapping[str, Entry]


class Places:
    """What ids mean, remembered."""

    def __init__(self, sources: AdapterSources) -> None:
        find = lru_cache(_MAX_PLACES)
        self.of: Callable[[str, str], str] = find(lambda source, adapter_id: sources.get(source).place(adapter_id))
        self._spelling = find(lambda source, adapter_id: sources.get(source).spelling(adapter_id))

    def spelling(self, source: str, adapter_id: str) -> str:
        """The id as it is kept, however it is written. What can be no id of the source (a published name may be none) is kept as it is."""
        try:
            return self._spelling(source, adapter_id)
        except ValidationFailed:
            return adapter_id


def nowhere(selection: AdapterSelection) -> AdapterNotFound:
    """The one answer for "there is none" and "not for you"."""
    return not_found(selection.source, "+".join(selection.shown_ids)[:1024])


def is_below(place: str, entries: Iterable[str]) -> bool:
    """Whether a place is one of the entries or below one of them."""
    return f"{place}/".startswith(_beginnings(entries))


def _beginnings(entries: Iterable[str]) -> tuple[str, ...]:
    """How a place with a slash behind it begins that is one of the entries or below one of them."""
    return tuple("" if entry == EVERY else f"{entry.removeprefix('s3://').strip('/')}/" for entry in entries)


@dataclass(frozen=True)
class Access:
    """What one caller may. `shared`: None where there are no tenants."""

    caller: Caller
    registry: Registry
    places: Places
    shared: Shared | None = None

    @property
    def tenant(self) -> Tenant | None:
        """None: everything is allowed."""
        return self.caller.tenant

    # -- calls --------------------------------------------------------------------------------------------------------------------

    def to_call(self, selection: AdapterSelection | None) -> AdapterSelection | None:
        """The selection with each id as it is kept. AdapterNotFound for what the caller may not call, ValidationFailed for no id."""
        if selection is None:
            return None
        spelled = tuple(self.places.spelling(selection.source, adapter_id) for adapter_id in selection.ids)
        found = spelled if self.tenant is None else tuple(self._kept(selection.source, adapter_id) for adapter_id in spelled)
        kept = tuple(adapter_id for adapter_id in found if adapter_id is not None)
        if len(kept) < len(found):
            raise nowhere(selection)
        given = selection.ids if spelled != selection.ids else ()
        if selection.merge is not None:
            return replace(selection, merge=replace(selection.merge, ids=kept), given=given)
        return replace(selection, adapter_id=kept[0], given=given)

    def _kept(self, source: str, adapter_id: str) -> str | None:
        """An id of its source's spelling as it is kept; None if it is not for this caller."""
        assert self.tenant is not None
        if SEPARATOR in adapter_id:
            raise_invalid(adapter_id, "a backslash is not allowed")
        if source == self.registry.default_source:
            own = qualified(self.tenant.name, adapter_id)
            entry = self.registry.entry(own)
            if entry.version is not None or entry.deleted:
                return own
            if self.registry.entry(adapter_id).version is not None:
                return adapter_id
        return adapter_id if self._may_read(source, adapter_id) else None

    def _may_read(self, source: str, adapter_id: str) -> bool:
        return self._is_own(source, adapter_id) or self._is_shared(source, adapter_id)

    def _is_own(self, source: str, adapter_id: str) -> bool:
        return self.tenant is not None and self._is_at(self.tenant.sources, source, adapter_id)

    def _is_shared(self, source: str, adapter_id: str) -> bool:
        return self.shared is not None and self._is_at(self.shared.sources, source, adapter_id)

    def _is_at(self, allowed: Sources, source: str, adapter_id: str) -> bool:
        entries = allowed.get(source)
        return bool(entries) and is_below(self.places.of(source, adapter_id), entries or ())

    # -- shares of the engine -------------------------------------------------------------------------------------------------------

    def is_shared(self, selection: AdapterSelection | None) -> bool:
        """Whether every tenant may call it: the base, a shared name, an id at a shared place. Ids are as they are kept."""
        return selection is None or self.shared_ids(selection).issuperset(selection.ids)

    def shared_ids(self, selection: AdapterSelection | None) -> set[str]:
        """Those of its ids that every tenant may call; ids are as they are kept."""
        if selection is None:
            return set()
        is_default = selection.source == self.registry.default_source
        return {
            one
            for one in selection.ids
            if (is_default and not owner_of(one) and self.registry.entry(one).version is not None)
            or (SEPARATOR not in one and self._is_shared(selection.source, one))
        }

    def cache_salt(self, selection: AdapterSelection | None) -> str:
        """What parts this caller's prefix cache from others'; empty: it is not parted."""
        if self.tenant is None or (self.shared is not None and self.shared.prefix_cache and self.is_shared(selection)):
            return ""
        return f"tenant {self.tenant.name}"

    def share(self, selection: AdapterSelection | None) -> dict[str, Any]:
        """What of a Plan is the caller's: tenant, weight, cache_salt."""
        if self.tenant is None:
            return {}
        return {"tenant": self.tenant.name, "weight": self.tenant.weight, "cache_salt": self.cache_salt(selection)}

    # -- lists ----------------------------------------------------------------------------------------------------------------------

    def sees(self, selection: AdapterSelection) -> bool:
        """Whether the caller may know of it; the selection's id is as it is kept."""
        return bool(self.seen(selection.source, (selection.adapter_id,)))

    def seen(self, source: str, ids: Iterable[str]) -> list[str]:
        """Those of the ids, as they are kept, that the caller may know of. Some microseconds for each: for many, not on the event loop."""
        if self.tenant is None:
            return list(ids)
        own, found = qualified(self.tenant.name, ""), []
        names = self.registry.view.names if source == self.registry.default_source else {}
        shared = self.shared.sources if self.shared is not None else {}
        allowed = _beginnings((*self.tenant.sources.get(source, ()), *shared.get(source, ())))
        for kept in ids:
            if SEPARATOR in kept:
                is_seen = kept.startswith(own)
            elif names.get(own + kept, NOTHING).version is not None:
                is_seen = False  # its own of that name stands before it
            else:
                is_seen = names.get(kept, NOTHING).version is not None or self._is_below(source, kept, allowed)
            if is_seen:
                found.append(kept)
        return found

    def _is_below(self, source: str, adapter_id: str, allowed: tuple[str, ...]) -> bool:
        try:
            return bool(allowed) and f"{self.places.of(source, adapter_id)}/".startswith(allowed)
        except ValidationFailed:  # the source is off, or lists what no id can name
            return False

    def is_own(self, selection: AdapterSelection) -> bool:
        """Whether it belongs to the caller alone; everything does to the operator."""
        if self.tenant is None or owner_of(selection.adapter_id) == self.tenant.name:
            return True
        return not self.is_shared(selection) and self._is_own(selection.source, selection.adapter_id)

    # -- orders ---------------------------------------------------------------------------------------------------------------------

    def to_publish(self, name: str, owner: str | None = None) -> str:
        """The name as it is kept, for a new version of it. `owner`: for the operator, whose it is to be.

        Forbidden if the caller may not publish; Conflict if it has as many names as it may."""
        if self.shared is None and owner is not None:
            raise ValidationFailed("`owner` is not allowed: this server has no tenants (tenants-file)", param="owner")
        if self.tenant is None:
            given = owner if owner is not None else owner_of(name)
            if given and self.shared is not None and not TENANT_NAME.fullmatch(given):
                raise ValidationFailed("`owner` must be a tenant's name, or null for an adapter that all share", param="owner")
            return name if owner is None else qualified(owner, shown(name))
        if owner not in (None, self.tenant.name):
            raise Forbidden("`owner` may name another tenant in the operator's orders alone")
        self._check_publisher()
        _check_name(name)
        kept = qualified(self.tenant.name, name)
        self.check_names(kept, self.registry.view.names)
        return kept

    def to_read(self, source: str, adapter_id: str) -> None:
        """AdapterNotFound unless the caller may publish what is there."""
        if self.tenant is not None and not self._may_read(source, adapter_id):
            raise nowhere(AdapterSelection(source, adapter_id))

    def to_show(self, name: str) -> str:
        """The name as it is kept, of an adapter that the caller may call. AdapterNotFound."""
        try:
            kept = self.to_call(AdapterSelection(self.registry.default_source, name))
        except ValidationFailed:  # no such id can be
            raise nowhere(AdapterSelection(self.registry.default_source, name)) from None
        assert kept is not None
        return kept.adapter_id

    def to_order(self, name: str) -> str:
        """The name as it is kept, for an order that changes it. Forbidden for what is shared, AdapterNotFound for what is another's."""
        kept = self.to_show(name)
        if self.tenant is None:
            return kept
        self._check_publisher()
        if not self.is_own(AdapterSelection(self.registry.default_source, kept)):
            raise Forbidden(f"adapter '{name[:256]}' is shared: it is the operator's to change")
        return kept

    def to_delete(self, name: str, release: bool = False) -> str:
        """As `to_order`. The Conflict of `check_deleted`."""
        kept = self.to_order(name)
        if not release:
            self.check_deleted(kept, self.registry.view.names)
        return kept

    def to_pin(self, name: str) -> str:
        """As `to_order`. Conflict if the caller keeps as many in memory as it may."""
        kept = self.to_order(name)
        self.check_pins(kept, self.registry.view.names)
        return kept

    # Bounds of what the registry holds for a tenant. Asked before the work of an order and again, under the registry's lock and in a
    # thread, when the order is written: two orders at once must not both have the last place.

    def check_names(self, kept: str, names: Names) -> None:
        """Conflict if the caller has as many names as it may, this one apart."""
        if self.tenant is None or kept in names:
            return
        start = qualified(self.tenant.name, "")
        if sum(one.startswith(start) for one in names) >= self.tenant.max_names:
            raise Conflict(f"the tenant has {self.tenant.max_names} names, all that it may (`max_names`); delete some with `release`")

    def check_deleted(self, kept: str, names: Names) -> None:
        """Conflict if the caller has as many ids of sources deleted as it may have names, this one apart: the registry, which all tenants
        share, keeps each of them."""
        if self.tenant is None or owner_of(kept) or names.get(kept, NOTHING).deleted:
            return
        num_own = sum(entry.deleted and not owner_of(one) and self._is_named(one) for one, entry in names.items())
        if num_own >= self.tenant.max_names:
            raise Conflict(f"the tenant has {num_own} ids of sources deleted, all that it may (`max_names`); let some go with `release`")

    def check_pins(self, kept: str, names: Names) -> None:
        """Conflict if the caller keeps as many adapters in memory as it may, this one apart."""
        if self.tenant is None or names.get(kept, NOTHING).pinned:
            return
        num_own = sum(entry.pinned and self._is_named(one) for one, entry in names.items())
        if num_own >= self.tenant.max_pinned:
            raise Conflict(f"the tenant keeps {num_own} adapters in memory and may keep {self.tenant.max_pinned} (`max_pinned`)")

    def _is_named(self, kept: str) -> bool:
        """Whether a name of the registry is the caller's own."""
        try:
            return self.is_own(AdapterSelection(self.registry.default_source, kept))
        except ValidationFailed:  # a shared name that can be no id of the source
            return False

    def _check_publisher(self) -> None:
        if self.tenant is not None and not self.tenant.publish:
            raise Forbidden("the tenant may not publish or change adapters (`publish`)")


def _check_name(name: str) -> None:
    try:
        split_id(name)
    except ValidationFailed as error:
        raise ValidationFailed(error.message.replace("`adapter_id`", "`name`", 1), param="name") from None


def unrestricted(registry: Registry, places: Places) -> Access:
    """What anybody may where there are no tenants."""
    return Access(OPERATOR, registry, places)
