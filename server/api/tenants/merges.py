"""Merged adapters that each tenant's requests made: how many are kept, and how many are made at once.

Anybody can make up any number of weights, and each combination is a pack of its own in the store. Owns which merges are a tenant's, so that
the least recently used of its own go, and not what others use; the place among its orders (`limits`) that one takes while it is made; and
that one whose requests have left is counted all the same. Merges of an earlier run of the server go as all goes: by the store's size. For
the event loop's thread; `api.state` asks for each request that merges.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any

from server.api.residency import Residency
from server.api.selection import NameKey, ResolvedAdapter
from server.api.tenants.limits import LimitBook
from server.api.tenants.rules import Tenant
from server.sources import Store


class MergeBook:
    """The merges of all tenants on one server."""

    def __init__(self, limits: LimitBook, store: Store, residency: Residency) -> None:
        self._limits, self._store, self._residency = limits, store, residency
        self._kept: dict[str, OrderedDict[NameKey, str]] = {}  # tenant -> merge -> hash, the one that was used last at the end
        self._num_tenants: Counter[str] = Counter()  # hash -> tenants' merges that it is
        self._num_asked: Counter[NameKey] = Counter()  # merges that are being resolved
        self._tasks: set[asyncio.Future[Any]] = set()

    async def resolve(self, tenant: Tenant, key: NameKey, work: Callable[[], Awaitable[ResolvedAdapter]]) -> ResolvedAdapter:
        """The result of `work`, which goes on when this caller leaves. LimitReached if the merge is to be made and the tenant has as many
        orders under way as it may."""
        held = ExitStack()
        if key not in self._kept.get(tenant.name, ()):
            held.enter_context(self._limits.ordering(tenant, key))
        task = asyncio.ensure_future(work())
        self._num_asked[key] += 1
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._land(tenant, key, held, done))
        return await asyncio.shield(task)

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
        if before is not None:
            self._leave(before)  # the same again, or what the merge was of adapters that were replaced
        for oldest, old_hash in list(kept.items())[: max(0, len(kept) - tenant.max_merges)]:
            if oldest != key and not self._num_asked[oldest] and not self._store.is_pinned(old_hash):  # else it goes with a later one
                del kept[oldest]
                if self._leave(old_hash):
                    self._residency.unload(oldest)

    def _leave(self, adapter_hash: str) -> bool:
        """One merge less is this hash; whether it was the last one, and its pack goes."""
        self._num_tenants[adapter_hash] -= 1
        if self._num_tenants[adapter_hash] > 0:
            return False
        del self._num_tenants[adapter_hash]
        task = asyncio.ensure_future(asyncio.to_thread(self._store.discard_packs, adapter_hash))
        self._tasks.add(task)
        task.add_done_callback(self._discarded)
        return True

    def _discarded(self, done: asyncio.Future[None]) -> None:
        self._tasks.discard(done)
        if not done.cancelled():
            done.exception()  # a disk that fails: the store has said so, and the pack goes by the store's size
