"""Merged adapters that each tenant's requests made: how many are kept, and how many are made at once.

Anybody can make up any number of weights, and each combination is a pack of its own in the store. Owns which merges are a tenant's, so that
the least recently used of its own go, and not what others use; the place among its orders (`limits`) that one takes while it is made; and
that one whose requests have left is counted all the same. A pack goes late: other servers may share the store, and say by its mark of use
alone that they need it. Merges of an earlier run of the server go as all goes: by the store's size. For the event loop's thread;
`api.state` asks for each request that merges.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from server.api.residency import Residency
from server.api.selection import NameKey, ResolvedAdapter
from server.api.tenants.limits import LimitBook
from server.api.tenants.rules import Tenant
from server.errors import ServerError
from server.sources import Store
from server.sources.space import MIN_IDLE_S


class _Leaving(NamedTuple):
    """When a pack may go (the event loop's time), and the merge that it was."""

    not_before: float
    key: NameKey


class MergeBook:
    """The merges of all tenants on one server. `idle_s`: a pack goes so long after the last merge that it was, and after its last use by
    any server."""

    def __init__(self, limits: LimitBook, store: Store, residency: Residency, idle_s: float = MIN_IDLE_S) -> None:
        self._limits, self._store, self._residency = limits, store, residency
        self.idle_s = idle_s
        self._kept: dict[str, OrderedDict[NameKey, str]] = {}  # tenant -> merge -> hash, the one that was used last at the end
        self._num_tenants: Counter[str] = Counter()  # hash -> tenants' merges that it is
        self._num_asked: Counter[NameKey] = Counter()  # merges that are being resolved
        self._tasks: set[asyncio.Future[Any]] = set()
        self._looks: dict[NameKey, asyncio.Task[bool]] = {}  # whether merges are on disk
        self._leaving: dict[str, _Leaving] = {}  # by hash: no tenant's merge any more; the next to go first
        self._discarding: asyncio.Task[None] | None = None  # while anything leaves

    async def resolve(
        self, tenant: Tenant, key: NameKey, work: Callable[[], Awaitable[ResolvedAdapter]], is_made: Callable[[], Awaitable[bool]]
    ) -> ResolvedAdapter:
        """The result of `work`, which goes on when this caller leaves. LimitReached if the merge is to be made and the tenant has as many
        orders under way as it may. `is_made`: whether `work` finds it on disk; asked of what the tenant has not used since the start."""
        held = ExitStack()
        if key not in self._kept.get(tenant.name, ()) and not await self._is_made(key, is_made):
            held.enter_context(self._limits.ordering(tenant, key))
        task = asyncio.ensure_future(work())
        self._num_asked[key] += 1
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._land(tenant, key, held, done))
        return await asyncio.shield(task)

    async def _is_made(self, key: NameKey, ask: Callable[[], Awaitable[bool]]) -> bool:
        """The answer of `ask`, once however many want it; False if it fails, since `work` will say why."""

        async def asked() -> bool:
            try:
                return await ask()
            except ServerError:
                return False
            finally:
                del self._looks[key]

        if key not in self._looks:
            self._looks[key] = asyncio.ensure_future(asked())
        return await asyncio.shield(self._looks[key])

    def close(self) -> None:
        """Discard no more: what leaves goes by the store's size."""
        if self._discarding is not None:
            self._discarding.cancel()

    def _land(self, tenant: Tenant, key: NameKey, held: ExitStack, done: asyncio.Future[ResolvedAdapter]) -> None:
        self._tasks.discard(done)
        held.close()
        self._num_asked[key] -= 1
        if not self._num_asked[key]:
            del self._num_asked[key]
        if not done.cancelled() and done.exception() is None:
            self._note(tenant, key, done.result().ref.hash)

    def _note(self, tenant: Tenant, key: NameKey, adapter_hash: str) -> None:
        kept = self._kept.setdefault(tenant.name, OrderedDict())
        before = kept.pop(key, None)
        kept[key] = adapter_hash
        self._num_tenants[adapter_hash] += 1
        self._leaving.pop(adapter_hash, None)
        if before is not None:
            self._leave(before, key)  # the same again, or what the merge was of adapters that were replaced
        for oldest, old_hash in list(kept.items())[: max(0, len(kept) - tenant.max_merges)]:
            if oldest != key and not self._num_asked[oldest] and not self._store.is_pinned(old_hash):  # else it goes with a later one
                del kept[oldest]
                if self._leave(old_hash, oldest):
                    self._residency.unload(oldest)

    # -- packs that go --------------------------------------------------------------------------------------------------------------

    def _leave(self, adapter_hash: str, key: NameKey) -> bool:
        """One merge less is this hash; whether it was the last one, so that its pack is to go."""
        self._num_tenants[adapter_hash] -= 1
        if self._num_tenants[adapter_hash] > 0:
            return False
        del self._num_tenants[adapter_hash]
        self._put_last(adapter_hash, key)
        if self._discarding is None or self._discarding.done():
            self._discarding = asyncio.get_running_loop().create_task(self._discard_leaving(), name="discard merges")
        return True

    def _put_last(self, adapter_hash: str, key: NameKey) -> None:
        self._leaving.pop(adapter_hash, None)
        self._leaving[adapter_hash] = _Leaving(asyncio.get_running_loop().time() + self.idle_s, key)

    async def _discard_leaving(self) -> None:
        """Discard each pack when its time has come; what is in use then is looked at again later. Ends when nothing leaves."""
        loop = asyncio.get_running_loop()
        while self._leaving:
            adapter_hash, leaving = next(iter(self._leaving.items()))
            if (wait_s := leaving.not_before - loop.time()) > 0:
                await asyncio.sleep(wait_s)  # it may be asked for meanwhile
                continue
            is_gone = not self._num_asked[leaving.key] and await self._discard(adapter_hash)
            if self._leaving.get(adapter_hash) is leaving:  # nobody had it again meanwhile
                del self._leaving[adapter_hash]
                if not is_gone:
                    self._put_last(adapter_hash, leaving.key)

    async def _discard(self, adapter_hash: str) -> bool:
        try:
            return await asyncio.to_thread(self._store.discard_packs, adapter_hash, idle_s=self.idle_s)
        except ServerError:  # a disk that fails: the store has said so
            return False
