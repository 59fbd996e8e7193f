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
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from server.api.adapter_lists import AdapterLists
from server.api.adapter_tokenizers import AdapterTokenizers
from server.api.mending import PackMender
from server.api.packing import AdapterPacker, Packed
from server.api.residency import Residency
from server.api.selection import AdapterSelection, Merge, ResolvedAdapter
from server.api.source_threads import SourceThreads, Work
from server.api.text.tokenizer import Tokenizer
from server.errors import AdapterNotFound, ServerError, Unavailable
from server.metrics import Metrics
from server.sources import Snapshot, Sources, Store, canonical_name
from server.sources.space import mark_used
from server.types import AdapterRef, BaseLayout

__all__ = ["AdapterResolver", "AdapterSelection", "Merge", "ResolvedAdapter"]

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Key = tuple[object, ...]
Stamps = Callable[[str, Sequence[str]], tuple[int, ...]]

_REMEMBER_FAILURE_S = 1.0
_MAX_REMEMBERED = 20_000  # adapters; an entry is small


@dataclass(frozen=True)
class _Known:
    """An adapter that was resolved once. Its tokenizer is named, not held: the cache of tokenizers decides what stays in memory."""

    version: tuple[str, ...]
    ref: AdapterRef
    rank: int
    base_name: str | None
    tokenizer_digest: str | None  # None: the base's
    checked_at: float
    cheap: bool  # asking the source again costs next to nothing


class _Flight:
    """A resolution under way, and for how many."""

    def __init__(self) -> None:
        self.task: asyncio.Task[ResolvedAdapter]
        self.job: Future[Any] | None = None  # what it waits for in a thread
        self.num_waiting = 0


class AdapterResolver:
    """All adapters of one server. `layout` is what the engine said of the base when it became ready.

    `stamps(source, ids)` changes whenever the registry gives an id another meaning: what was asked, or is under way, before that is not
    used for whom asks after it."""

    def __init__(
        self, sources: Sources, store: Store, base: Tokenizer, metrics: Metrics, *,
        recheck_s: float = 2.0, max_merged_rank: int = 256, residency: Residency | None = None, stamps: Stamps = lambda source, ids: (),
        name_by_hash: bool = False,
    ) -> None:  # fmt: skip
        self._sources, self._store, self._base, self._metrics = sources, store, base, metrics
        self._recheck_s, self._stamps = recheck_s, stamps
        self.residency = residency or Residency(lambda message: None)
        self._threads = SourceThreads()
        self._lists = AdapterLists(sources, self._threads)
        self._tokenizers = AdapterTokenizers(base, store)
        self._packer = AdapterPacker(store, self._tokenizers, max_merged_rank=max_merged_rank, name_by_hash=name_by_hash)
        self._flights: dict[Key, _Flight] = {}
        self._known: OrderedDict[Key, _Known] = OrderedDict()
        self._failures: OrderedDict[Key, tuple[float, ServerError]] = OrderedDict()  # oldest first
        self._mender = PackMender(store, self._threads)

    async def resolve(self, selection: AdapterSelection, layout: BaseLayout, *, anew: bool = False) -> ResolvedAdapter:
        """The adapter, fetched and packed if it is not yet; one flight however many ask. The errors of Source and of adapters.pack.

        `anew`: try also what failed a moment ago."""
        source = canonical_name(selection.source)
        stamps = self._stamps(source, selection.ids)
        key = (*selection.key, layout.fingerprint, stamps)
        failed = self._failures.get(key)
        if failed is not None and not anew and time.monotonic() - failed[0] < _REMEMBER_FAILURE_S:
            raise failed[1].with_traceback(None)
        flight = self._flights.get(key)
        if flight is None or flight.task.done():
            flight = self._flights[key] = _Flight()
            flight.task = asyncio.create_task(self._fly(flight, source, key, selection, layout))
            flight.task.add_done_callback(lambda task: self._land(key, flight))
        flight.num_waiting += 1
        try:
            found = await asyncio.shield(flight.task)
            tier = self.residency.tier(found.ref.hash)  # before this request moves it
            self.residency.resolved(selection.name_key, found.ref, stamps, found.rank, found.base_name)
            return replace(found, tier=tier.state) if tier is not None and tier.state in ("host", "device") else found
        except AdapterNotFound:
            self.residency.unload(selection.name_key)
            raise
        except asyncio.CancelledError:
            if flight.task.cancelled() and flight.num_waiting > 0 and not _is_cancelled():
                raise Unavailable("the server is shutting down", retry_after_s=5.0) from None  # `close` dropped what waited
            raise
        finally:
            flight.num_waiting -= 1
            if flight.num_waiting == 0 and flight.job is not None and flight.job.cancel():
                self._forget(key, flight)  # nobody waits and no thread has begun: the place in the queue is free at once

    async def list_ids(self, source: str) -> list[str]:
        """Ids that the source holds, as api.adapter_lists remembers them. The errors of Source."""
        return await self._lists.ids(source)

    def _land(self, key: Key, flight: _Flight) -> None:
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

    def _forget(self, key: Key, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _fly(self, flight: _Flight, source: str, key: Key, selection: AdapterSelection, layout: BaseLayout) -> ResolvedAdapter:
        with self._metrics.adapter_resolve.time():
            known = self._known.get(key)
            tokenizer = self._tokenizer(known)
            if known is not None:
                on_disk = await self._in_thread(flight, source, "known", lambda path=known.ref.path: mark_used(Path(path)))
                if not on_disk or tokenizer is None:
                    known = None  # the store let its pack go, or the cache its tokenizer
            if known is not None and tokenizer is not None and not known.cheap and time.monotonic() - known.checked_at < self._recheck_s:
                return self._resolved(known, tokenizer)
            work: Work = "fetch" if known is None else "known" if known.cheap else "ask"
            snapshots = await self._in_thread(flight, source, work, lambda: self._ask(source, selection))
            if known is not None and tokenizer is not None and known.version == _version(snapshots):
                self._remember(key, replace(known, checked_at=time.monotonic()))
                return self._resolved(known, tokenizer)
            packed = await self._in_thread(
                flight, source, "fetch", lambda: self._packer.make(self._sources.get(source), selection, snapshots, layout)
            )
        self._known.pop(key, None)
        if all(one.settled for one in packed.snapshots):
            self._remember(key, _known(packed))
        found = self._resolved(_known(packed), packed.own[1] if packed.own is not None else self._base)
        return replace(found, tier="source") if packed.is_new else found

    async def _in_thread(self, flight: _Flight, source: str, work: Work, run: Callable[[], Result]) -> Result:
        """The result of `run`; nothing is begun for a flight that everybody left."""
        if flight.num_waiting == 0:
            raise asyncio.CancelledError
        flight.job = self._threads.submit(source, work, run)
        try:
            return await asyncio.wrap_future(flight.job)
        finally:
            flight.job = None

    def _ask(self, name: str, selection: AdapterSelection) -> list[Snapshot]:
        source = self._sources.get(name)
        return [source.snapshot(adapter_id, api_token=selection.api_token) for adapter_id in selection.ids]

    def _tokenizer(self, known: _Known | None) -> Tokenizer | None:
        if known is None or known.tokenizer_digest is None:
            return self._base
        return self._tokenizers.get(known.tokenizer_digest)

    def _resolved(self, known: _Known, tokenizer: Tokenizer) -> ResolvedAdapter:
        own_template = tokenizer.chat_template != self._base.chat_template
        return ResolvedAdapter(known.ref, tokenizer, own_template, known.rank, known.base_name)

    def _remember(self, key: Key, known: _Known) -> None:
        self._known[key] = known
        self._known.move_to_end(key)
        while len(self._known) > _MAX_REMEMBERED:
            self._known.popitem(last=False)

    def is_resolving(self, selection: AdapterSelection) -> bool:
        """Whether it is being found, fetched or packed now, for any caller."""
        named = len(selection.name_key)
        return any(key[:named] == selection.name_key for key in self._flights)

    async def run(self, source: str, work: Callable[[AdapterPacker], Result]) -> Result:
        """Whatever takes as long as a fetch, in a thread of those that fetch from the source."""
        return await asyncio.wrap_future(self._threads.submit(canonical_name(source), "fetch", lambda: work(self._packer)))

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


def _known(packed: Packed) -> _Known:
    cheap = all(one.folder is not None for one in packed.snapshots)
    digest = packed.own[0] if packed.own is not None else None
    return _Known(_version(packed.snapshots), packed.ref, packed.rank, packed.base_name, digest, time.monotonic(), cheap)


def _version(snapshots: Sequence[Snapshot]) -> tuple[str, ...]:
    return tuple(snapshot.version for snapshot in snapshots)


def _is_cancelled() -> bool:
    """Whether it is this task that is being cancelled, not what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
