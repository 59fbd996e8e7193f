"""Orders about adapters: publish, load, pin, unload, delete. Each is written to the registry and then carried out on every server alike.

Owns what this server keeps pinned, and the work that follows a change of the registry, its own or another server's. An order is checked
before it is written: what cannot be fetched, packed or loaded here changes nothing. api.adapter_routes gives the orders.
"""

import asyncio
import logging
import time
from collections.abc import Collection, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec

from server.api.adapters import AdapterResolver, AdapterSelection
from server.api.engine import EngineClient
from server.api.engines import Engines
from server.api.names import shown
from server.api.packing import AdapterPacker, Packed
from server.api.pins import Pins
from server.api.published import OneVersion, PublishedWeights
from server.api.registry import NOTHING, Change, Check, Entry, Registry, Version
from server.api.versions import published, rolled_back, to_return_to
from server.errors import AdapterNotFound, AdapterRefused, Conflict, ServerError, SourceUnavailable, Unavailable, ValidationFailed
from server.sources import SourceChanged, Sources, Store, StoredAdapter
from server.sources.base import not_found
from server.sources.ids import split_id
from server.types import AdapterRef, BaseLayout

log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 10.0  # a host tier that is full of adapters in use may take its time; the order holds all the same
_TEND_S = 5.0
_NUM_ATTEMPTS = 3  # when a folder is written to while it is published


@dataclass(frozen=True)
class Order:
    """What to publish. `pin` None leaves the pin as it is."""

    name: str
    source: str
    adapter_id: str
    api_token: str | None = None
    replace: bool = True
    pin: bool | None = None
    check: Check = lambda names: None  # as Registry.update's: whether whoever orders it may have one more


class Publisher:
    """The orders of one server. For the event loop's thread. `reserved` are the base's names; `has_tenants`: names may be of a tenant
    (api.names), and whoever gives an order has looked at whose."""

    def __init__(
        self, registry: Registry, weights: PublishedWeights, raw: Sources, store: Store, adapters: AdapterResolver,
        engine: EngineClient | Engines,
        reserved: Collection[str],
        has_tenants: bool = False,
    ) -> None:  # fmt: skip
        self.registry, self._weights, self.raw, self._store = registry, weights, raw, store
        self._adapters, self._engine, self._reserved = adapters, engine, frozenset(reserved)
        self._has_tenants = has_tenants
        self._residency = adapters.residency
        self._pins = Pins(store, engine.tell, on_unpinned=self._residency.abandon)
        self._failed: dict[str, str] = {}  # name -> why it could not be loaded ahead
        self._tasks: set[asyncio.Task[None]] = set()
        registry.on_change = self._on_change

    # -- orders -------------------------------------------------------------------------------------------------------------------

    async def publish(self, order: Order) -> Entry:
        """The name answers with what the id holds now, until the next order; running requests end with what they began with.

        The errors of Source and of adapters.pack; ValidationFailed for the name; Conflict if it is taken and not to be replaced."""
        self._check_name(order.name)
        if not order.replace and self.registry.entry(order.name).version is not None:
            raise _taken(order.name)
        layout = self._layout()
        stored, packed = await self._adapters.run(order.source, lambda packer: self._copy(order, layout, packer))
        version = Version(
            hash=packed.ref.hash, number=0, source=order.source, adapter_id=order.adapter_id, size_bytes=stored.bytes,
            published_at=int(time.time()), rank=packed.rank, base_name=packed.base_name,
        )  # fmt: skip
        return await self._give(order.name, packed, lambda before, now: self._publish(order, version, before, now), order.check)

    async def roll_back(self, name: str) -> Entry:
        """The version before answers again. AdapterNotFound, Conflict: versions.to_return_to; the errors of adapters.pack."""
        version, layout = to_return_to(name, self.registry.entry(name)), self._layout()
        packed = await self._adapters.run(self.registry.default_source, lambda packer: self._pack(version.hash, name, layout, packer))
        return await self._give(name, packed, lambda before, now: rolled_back(name, before, version, now))

    async def _give(self, name: str, packed: Packed, change: Change, check: Check = lambda names: None) -> Entry:
        """Load the weights, then let the name mean them by `change`."""
        ref = packed.ref
        try:
            with self._store.pinned(ref.hash), self._residency.running(ref.hash):
                await self._residency.load(ref, LOAD_TIMEOUT_S)
                entry = await self.registry.update(name, change, check)
                if entry.version is not None and entry.version.hash == ref.hash:
                    selection = self._selection(name)
                    stamps = self.registry.stamps(selection.source, selection.ids)
                    self._residency.resolved(selection.name_key, ref, stamps, packed.rank, packed.base_name)
        finally:
            self._residency.abandon(ref.hash)  # unless a name means it now
        self._spawn(self._prune())
        return entry

    async def load(self, name: str) -> bool:
        """Bring it into memory on every server; whether it is there on this one by now. The errors of Source, adapters.pack and engine."""
        loaded = await self._load(name)
        await self.registry.update(name, lambda before, now: self._known(name, before, loaded=now))
        return loaded is not None

    async def pin(self, name: str, wanted: bool, check: Check = lambda names: None) -> Entry:
        """Bring it into memory on every server and keep it there, or no longer keep it. `check`: as Registry.update's."""
        if wanted:
            await self._load(name)
        else:
            await self.check_known(name)
        return await self.registry.update(name, lambda before, now: self._known(name, before, pinned=wanted), check)

    async def unload(self, name: str) -> Entry:
        """Free its memory on every server when its last request there has ended; the next request loads it again. Takes its pin."""
        await self.check_known(name)
        return await self.registry.update(name, lambda before, now: self._known(name, before, unloaded=now, pinned=False))

    async def delete(self, name: str, release: bool = False, check: Check = lambda names: None) -> Entry:
        """The name answers no more, and its memory is freed as by `unload`. Its source is left alone, and so is blocked an id of that name.

        `release`: the registry lets go of the name; an id of that name in the default source answers then. `check`: as of `pin`."""
        if not release:
            await self.check_known(name)
        elif self.registry.entry(name) == NOTHING:
            raise self._not_found(name)
        return await self.registry.update(
            name, lambda before, now: NOTHING if release else Entry(changed=now, deleted=True, last_number=before.last_number), check
        )

    async def check_known(self, name: str) -> None:
        """AdapterNotFound unless requests may name it, or this server has it from then. Asks the source if nothing else knows."""
        entry, key = self.registry.entry(name), self._selection(name).name_key
        if entry.deleted:
            raise self._not_found(name)
        if entry.version is not None or self._residency.use(key) is not None:
            return
        source = self.registry.default_source
        try:
            await self._adapters.run(source, lambda packer: self.raw.get(source).snapshot(name))
        except ValidationFailed:  # no such id can be
            raise self._not_found(name) from None
        except AdapterRefused:  # a broken one is one
            return

    def _publish(self, order: Order, version: Version, before: Entry, now: int) -> Entry:
        """The entry after a publication. Runs under the registry's lock."""
        if before.version is not None and not order.replace:
            raise _taken(order.name)
        if not self._weights.hold(version.hash):
            raise SourceUnavailable(f"Adapter '{shown(order.name)}': its weights were removed while it was published; try again")
        return published(before, version, now, order.pin)

    def _copy(self, order: Order, layout: BaseLayout, packer: AdapterPacker) -> tuple[StoredAdapter, Packed]:
        """Fetch, copy to the shared file system, and pack from there: what is checked is what every server will read. Blocks."""
        source = self.raw.get(order.source)
        for attempt in range(_NUM_ATTEMPTS):
            try:
                snapshot = source.snapshot(order.adapter_id, api_token=order.api_token)
                stored = self._store.materialize(source, snapshot, order.api_token)
                self._weights.keep(stored)
                break
            except SourceChanged:
                if attempt == _NUM_ATTEMPTS - 1:
                    raise
        return stored, self._pack(stored.hash, order.name, layout, packer)

    def _pack(self, adapter_hash: str, name: str, layout: BaseLayout, packer: AdapterPacker) -> Packed:
        """Pack what lies in the registry's folder. Blocks."""
        version = OneVersion(self._weights, adapter_hash)
        return packer.make(version, self._selection(name), [version.snapshot(name)], layout)

    async def _prune(self) -> None:
        """Remove weights that no name means any more. Never a reason for an order to fail."""
        try:
            num_removed = await self.registry.in_thread(lambda: self._weights.prune(self.registry.read_hashes))
        except (OSError, ValueError) as error:  # a TimeoutError is an OSError
            log.warning("old published weights could not be removed: %s", error)
            return
        if num_removed:
            log.info("removed the published weights of %d adapters that no name means any more", num_removed)

    # -- checks -------------------------------------------------------------------------------------------------------------------

    def _check_name(self, name: str) -> None:
        if shown(name) in self._reserved:
            raise ValidationFailed(f"`name` must not be the base model's: '{shown(name)}'", param="name")
        try:
            split_id(shown(name) if self._has_tenants else name)
        except ValidationFailed as error:
            raise ValidationFailed(error.message.replace("`adapter_id`", "`name`", 1), param="name") from None

    def _not_found(self, name: str) -> AdapterNotFound:
        return not_found(self.registry.default_source, shown(name))

    def _known(self, name: str, before: Entry, **changes: object) -> Entry:
        """The entry with these changes. AdapterNotFound if another server deleted the name meanwhile. Runs under the registry's lock."""
        if before.deleted:
            raise self._not_found(name)
        return msgspec.structs.replace(before, **changes)

    def _layout(self) -> BaseLayout:
        ready = self._engine.ready
        if ready is None:
            raise Unavailable(self._engine.unhealthy_reason() or "the engine is not ready", retry_after_s=5.0)
        return ready.layout

    def _selection(self, name: str) -> AdapterSelection:
        return AdapterSelection(self.registry.default_source, name)

    # -- carried out on every server ----------------------------------------------------------------------------------------------

    def _on_change(self, name: str, before: Entry, after: Entry) -> None:
        selection = self._selection(name)
        was_used = self._residency.use(selection.name_key) is not None
        if after.changed != before.changed:
            self._residency.changed(selection.name_key, self.registry.stamps(selection.source, selection.ids))
        elif after.unloaded > before.unloaded:
            self._residency.unload(selection.name_key)
        if not after.pinned:
            self._pins.let_go(name)
            self._failed.pop(name, None)
        replaced = after.changed != before.changed and after.version is not None
        if after.pinned or after.loaded > before.loaded or (replaced and was_used):
            self._spawn(self._warm(name))

    async def _load(self, name: str) -> AdapterRef | None:
        """Into the engine's memory; None if that takes longer than LOAD_TIMEOUT_S."""
        adapter = await self._adapters.resolve(self._selection(name), self._layout(), anew=True)
        with self._adapters.pinned(adapter):
            return adapter.ref if await self._residency.load(adapter.ref, LOAD_TIMEOUT_S) else None

    async def _warm(self, name: str) -> None:
        """Load it, and pin it if it is to be pinned. What fails is logged; requests hear it themselves."""
        try:
            adapter = await self._adapters.resolve(self._selection(name), (await self._engine.wait_ready()).layout)
            with self._adapters.pinned(adapter):
                if self.registry.entry(name).pinned:
                    self._pins.hold(name, adapter.ref)
                await self._residency.load(adapter.ref, LOAD_TIMEOUT_S)
        except Exception as error:  # a fault of ours with one adapter is no reason to let the others' pins go
            told = error.message if isinstance(error, ServerError) else repr(error)
            if self._failed.get(name) != told:  # a pinned one is tried every few seconds
                log.warning("adapter %r could not be loaded ahead: %s", name, told, exc_info=not isinstance(error, ServerError))
            self._failed[name] = told
        else:
            self._failed.pop(name, None)

    def engine_ready(self) -> None:
        """A new engine knows nothing of pins, and holds nothing."""
        self._residency.engine_started()
        self._pins.tell_all()

    def engine_joined(self) -> None:
        """A new engine knows nothing of pins; others beside it hold what they held."""
        self._pins.tell_all()

    async def _tend(self) -> None:
        """Pin what should be and is not, because its source was away or a pinned id has new content; never returns."""
        while True:
            await self._engine.wait_ready()
            for name, entry in list(self.registry.view.names.items()):
                if entry.pinned:
                    use = self._residency.use(self._selection(name).name_key)
                    if use is None or self._pins.hash_of(name) != use.ref.hash:
                        await self._warm(name)
            await asyncio.sleep(_TEND_S)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def start(self, poll_s: float) -> None:
        """Follow the registry, and keep pinned what is to be pinned, until `close`."""
        self._spawn(self.registry.follow(poll_s))
        self._spawn(self._tend())

    async def close(self) -> None:
        """End what is under way in the background."""
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self.registry.close()


def _taken(name: str) -> Conflict:
    return Conflict(f"`name` '{shown(name)}' is published already; `replace` gives it a new version", param="name")
