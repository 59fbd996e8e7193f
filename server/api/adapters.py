"""From what a request says of an adapter to what the engine and the tokenizer need: found, fetched, packed, tokenizer read.

Owns single flight and what is remembered: a version's pack, never a failure for longer than a second. All that blocks runs in
api.source_threads: an adapter that is known waits for no fetch of another one. Knows no HTTP. The routes call `resolve`, and pin what they
got while they run.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from server.api.adapter_lists import AdapterLists
from server.api.adapter_tokenizers import AdapterTokenizers
from server.api.known import PATIENCE_S, Flight, Key, Known, KnownAdapters, version_of
from server.api.mending import PackMender
from server.api.packing import AdapterPacker, Packed
from server.api.residency import Residency
from server.api.selection import AdapterSelection, Merge, ResolvedAdapter
from server.api.source_threads import SourceThreads
from server.api.text.tokenizer import Tokenizer
from server.errors import SHUTTING_DOWN, AdapterNotFound, ServerError, SourceUnavailable, Unavailable
from server.metrics import Metrics
from server.sources import Snapshot, SourceChanged, Sources, Store, canonical_name
from server.sources.space import mark_used
from server.types import AdapterRef, BaseLayout

__all__ = ["AdapterResolver", "AdapterSelection", "Merge", "ResolvedAdapter"]

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Stamps = Callable[[str, Sequence[str]], tuple[int, ...]]

_REMEMBER_FAILURE_S = 1.0
_MAX_STALE_S = 3600.0  # what a source that is away said last is believed for so long
_SAY_STALE_S, _NUM_ATTEMPTS = 60.0, 3  # attempts: when the source changes under our hands


class _PackGone(Exception):
    """What is known of an adapter is right, but its pack is not on disk any more."""


class AdapterResolver:
    """All adapters of one server. `layout` is what the engine said of the base when it became ready.

    `stamps(source, ids)` changes whenever the registry gives an id another meaning: what was asked, or is under way, before that is not
    used for whom asks after it."""

    def __init__(
        self, sources: Sources, store: Store, base: Tokenizer, metrics: Metrics, *,
        recheck_s: float = 2.0, timeout_s: float = 300.0, max_merged_rank: int = 256, residency: Residency | None = None,
        stamps: Stamps = lambda source, ids: (), name_by_hash: bool = False,
    ) -> None:  # fmt: skip
        self._sources, self._store, self._base, self._metrics = sources, store, base, metrics
        self._recheck_s, self._timeout_s, self._stamps = recheck_s, timeout_s, stamps
        self.residency = residency or Residency(lambda message: None)
        self._threads = SourceThreads()
        self._lists = AdapterLists(sources, self._threads)
        self._tokenizers = AdapterTokenizers(base, store)
        self._packer = AdapterPacker(store, self._tokenizers, max_merged_rank=max_merged_rank, name_by_hash=name_by_hash)
        self._flights: dict[Key, Flight] = {}
        self._known = KnownAdapters()
        self._failures: OrderedDict[Key, tuple[float, ServerError]] = OrderedDict()  # oldest first
        self._stale_said_at: dict[str, float] = {}
        self._mender = PackMender(store, self._threads)

    async def resolve(self, selection: AdapterSelection, layout: BaseLayout, *, anew: bool = False) -> ResolvedAdapter:
        """The adapter, fetched and packed if it is not yet; one flight however many ask. The errors of Source and of adapters.pack.

        `anew`: try also what failed a moment ago."""
        found, was_asked = await self._join(selection, layout, anew)
        if was_asked:  # before this request came: the source may hold something else since, and a look at it costs little now
            again, _ = await self._join(selection, layout, anew)
            return found if again.ref == found.ref else again
        return found

    async def _join(self, selection: AdapterSelection, layout: BaseLayout, anew: bool) -> tuple[ResolvedAdapter, bool]:
        """What the flight brings, and whether the source had been asked before this request joined it."""
        source = canonical_name(selection.source)
        stamps = self._stamps(source, selection.ids)
        key = (*selection.key, layout.fingerprint, stamps)
        failed = self._failures.get(key)
        if failed is not None and not anew and time.monotonic() - failed[0] < _REMEMBER_FAILURE_S:
            raise failed[1].with_traceback(None)
        flight = self._flights.get(key)
        if flight is None or flight.task.done():
            flight = self._flights[key] = Flight()
            flight.task = asyncio.create_task(self._fly(flight, source, key, selection, layout))
            flight.task.add_done_callback(lambda task: self._land(key, flight))
        flight.num_waiting += 1
        was_asked = flight.was_asked
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await asyncio.shield(flight.task)
            tier = self.residency.tier(found.ref.hash)  # before this request moves it
            self.residency.resolved(selection.name_key, found.ref, stamps, found.rank, found.base_name)
            if tier is not None and tier.state in ("host", "device"):
                found = replace(found, tier=tier.state)
            return found, was_asked
        except TimeoutError:
            named = "', '".join(selection.ids)
            raise SourceUnavailable(f"Adapter '{named}' was not ready within {self._timeout_s:g} s; try again") from None
        except AdapterNotFound:
            self.residency.unload(selection.name_key)
            raise
        except asyncio.CancelledError:
            if flight.was_dropped():
                raise Unavailable(SHUTTING_DOWN, retry_after_s=5.0) from None  # `close` dropped what waited
            raise
        finally:
            flight.num_waiting -= 1
            if flight.num_waiting == 0 and flight.job is not None and flight.job.cancel():
                self._forget(key, flight)  # nobody waits and no thread has begun: the place in the queue is free at once

    async def list_ids(self, source: str) -> list[str]:
        """Ids that the source holds, as api.adapter_lists remembers them. The errors of Source."""
        return await self._lists.ids(source)

    def _land(self, key: Key, flight: Flight) -> None:
        """Forget the flight; remember its failure for a moment. Reads the exception, so that nobody is warned of it if all callers left."""
        self._forget(key, flight)
        if flight.task.cancelled():
            self._metrics.adapter_resolutions.labels(outcome="dropped").inc()
            return
        error, now = flight.task.exception(), time.monotonic()
        while self._failures and now - next(iter(self._failures.values()))[0] >= _REMEMBER_FAILURE_S:
            self._failures.popitem(last=False)
        if isinstance(error, ServerError):
            self._failures.pop(key, None)
            self._failures[key] = (now, error)
        outcome = "ok" if error is None else type(error).__name__ if isinstance(error, ServerError) else "internal"
        self._metrics.adapter_resolutions.labels(outcome=outcome).inc()

    def _forget(self, key: Key, flight: Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _fly(self, flight: Flight, source: str, key: Key, selection: AdapterSelection, layout: BaseLayout) -> ResolvedAdapter:
        with self._metrics.adapter_resolve.time():
            flight.was_asked = True
            known = self._known.get(key)
            tokenizer = self._tokenizer(known)
            snapshots: list[Snapshot] | None = None
            if known is not None and tokenizer is not None:
                try:
                    snapshots = await self._asked_again(flight, source, key, known, selection)
                    if snapshots is None:
                        return self._resolved(known, tokenizer)
                except _PackGone:
                    pass
            if snapshots is None:  # unknown, or the store let its pack go, or the cache its tokenizer
                snapshots = await flight.run(self._threads, source, "fetch", lambda: self._ask(source, selection))
            packed = await flight.run(self._threads, source, "fetch", lambda: self._make(source, selection, snapshots, layout))
        self._known.forget(key)
        if all(one.settled for one in packed.snapshots):
            self._known.remember(key, Known.of(packed))
        found = self._resolved(Known.of(packed), packed.own[1] if packed.own is not None else self._base)
        return replace(found, tier="source") if packed.is_new else found

    async def _asked_again(self, flight: Flight, source: str, key: Key, known: Known, selection: AdapterSelection) -> list[Snapshot] | None:
        """The source's snapshots if they are of other versions than what is known; None if that may be used. While the source is away it
        may, for an hour: what is in memory and on disk here needs no source. A source that says no is believed. _PackGone if the store
        let go of the pack."""
        age_s = time.monotonic() - known.checked_at

        def find_pack() -> None:
            if not mark_used(Path(known.ref.path)):
                raise _PackGone

        def ask() -> list[Snapshot]:
            if known.cheap:  # in one go: a busy server's thread waits for its turn each time that it is handed something
                find_pack()
            return self._ask(source, selection)

        if not known.cheap:
            await flight.run_in_time(self._threads, source, "known", find_pack)
            if age_s < self._recheck_s:
                return None

        def take(snapshots: list[Snapshot]) -> list[Snapshot] | None:
            if known.version != version_of(snapshots):
                return snapshots
            self._known.remember(key, replace(known, checked_at=time.monotonic()))
            return None

        def take_late(asked: asyncio.Future[list[Snapshot]]) -> None:
            if asked.cancelled() or isinstance(asked.exception(), SourceUnavailable) or self._known.get(key) is not known:
                return
            if asked.exception() is not None or take(asked.result()) is not None:
                self._known.forget(key)  # the next request asks, and waits

        try:
            snapshots = await flight.run_in_time(self._threads, source, "known" if known.cheap else "ask", ask, take_late)
        except SourceUnavailable as error:
            if age_s > _MAX_STALE_S:
                raise
            self._note_stale(source, error.message)
            return None
        if snapshots is not None:
            return take(snapshots)
        if age_s > _MAX_STALE_S:
            raise SourceUnavailable(f"Source '{source}' has not answered for an hour; try again")
        self._note_stale(source, f"no answer within {PATIENCE_S:g} s")
        return None

    def _note_stale(self, source: str, why: str) -> None:
        now = time.monotonic()
        if now - self._stale_said_at.get(source, float("-inf")) > _SAY_STALE_S:
            self._stale_said_at[source] = now
            log.warning("source %r is away (%s): adapters that are here are used as they were", source, why)

    def _make(self, name: str, selection: AdapterSelection, snapshots: Sequence[Snapshot], layout: BaseLayout) -> Packed:
        """Fetched and packed; from new snapshots if the source changes meanwhile."""
        for num_left in reversed(range(_NUM_ATTEMPTS)):
            try:
                return self._packer.make(self._sources.get(name), selection, snapshots, layout)
            except SourceChanged:
                if not num_left:
                    raise
                snapshots = self._ask(name, selection)
        raise AssertionError

    def _ask(self, name: str, selection: AdapterSelection) -> list[Snapshot]:
        source = self._sources.get(name)
        return [source.snapshot(adapter_id, api_token=selection.api_token) for adapter_id in selection.ids]

    def _tokenizer(self, known: Known | None) -> Tokenizer | None:
        if known is None or known.tokenizer_digest is None:
            return self._base
        return self._tokenizers.get(known.tokenizer_digest)

    def _resolved(self, known: Known, tokenizer: Tokenizer) -> ResolvedAdapter:
        own_template = tokenizer.chat_template != self._base.chat_template
        return ResolvedAdapter(known.ref, tokenizer, own_template, known.rank, known.base_name)

    def is_resolving(self, selection: AdapterSelection) -> bool:
        """Whether it is being found, fetched or packed now, for any caller."""
        named = len(selection.name_key)
        return any(key[:named] == selection.name_key for key in self._flights)

    async def has_merge(self, selection: AdapterSelection, layout: BaseLayout) -> bool:
        """Whether a merge of what the source holds now is on disk already. The errors of Source."""
        source = canonical_name(selection.source)
        return await self.run(source, lambda packer: packer.has_merge(selection, self._ask(source, selection), layout))

    async def run(self, source: str, work: Callable[[AdapterPacker], Result]) -> Result:
        """Whatever takes as long as a fetch, in a thread of those that fetch from the source. SourceUnavailable if it takes too long."""
        source = canonical_name(source)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.wrap_future(self._threads.submit(source, "fetch", lambda: work(self._packer)))
        except TimeoutError:
            raise SourceUnavailable(f"Source '{source}' did not bring the adapter within {self._timeout_s:g} s; try again") from None

    # -- held while requests run ---------------------------------------------------------------------------------------------------

    @contextmanager
    def pinned(self, adapter: ResolvedAdapter | None) -> Iterator[None]:
        """Keep the adapter's pack on disk while a request needs it."""
        if adapter is None:
            yield
            return
        with self._store.pinned(adapter.ref.hash), self.residency.running(adapter.ref.hash):
            yield

    async def mend(self, selection: AdapterSelection, adapter: ResolvedAdapter, layout: BaseLayout) -> bool:
        """Whether the engine refused a pack that was damaged on disk, and that is whole again now. The errors of `resolve`."""

        async def make() -> AdapterRef:
            return (await self.resolve(selection, layout, anew=True)).ref

        return await self._mender.mend(adapter.ref, make)

    def close(self) -> None:
        """Take no more work; running fetches are left to end with the process."""
        self._threads.close()
