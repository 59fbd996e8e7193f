"""From what a request says of an adapter to what the engine and the tokenizer need: found, fetched, packed, tokenizer read.

Owns the threads in which that happens (some for each source, so that a slow one holds up nobody else), single flight, and what is
remembered: a version's pack, never a failure for longer than a second. Knows no HTTP. The routes call `resolve`, and pin what they got
while they run.
"""

import asyncio
import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from server.adapters.merge import merge_hash, merge_packs
from server.adapters.pack import read_header, write_pack
from server.api.text.tokenizer import TOKENIZER_FILES, Tokenizer, load_adapter_tokenizer
from server.errors import AdapterRefused, ServerError
from server.metrics import Metrics
from server.sources import Snapshot, Source, Sources, Store, StoredAdapter, canonical_name
from server.sources.space import mark_used
from server.types import AdapterRef, BaseLayout

log = logging.getLogger(__name__)

_THREADS_PER_SOURCE = 8
_REMEMBER_FAILURE_S = 1.0
_DOUBT_AGAIN_S = 60.0
_LIST_AGAIN_S = 5.0
_MAX_LISTED = 10_000
_MAX_REMEMBERED = 20_000  # adapters; an entry is small
_MAX_TOKENIZERS = 32  # of adapters that bring their own, by content; tens of MB each


@dataclass(frozen=True)
class Merge:
    """LoRAX's merged_adapters, already checked."""

    ids: tuple[str, ...]
    weights: tuple[float, ...]
    strategy: str = "linear"
    density: float = 0.0
    majority_sign_method: str = "total"


@dataclass(frozen=True)
class AdapterSelection:
    """What a request says: one adapter, or several merged. `api_token` is the caller's own, for sources that know callers."""

    source: str
    adapter_id: str = ""
    merge: Merge | None = None
    api_token: str | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids as they were given."""
        return self.merge.ids if self.merge is not None else (self.adapter_id,)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for requests that must get the same answer."""
        token = hashlib.sha256((self.api_token or "").encode("utf-8", errors="surrogatepass")).digest()
        return (self.source, self.adapter_id, self.merge, token)


@dataclass(frozen=True)
class ResolvedAdapter:
    """An adapter that is ready on local disk. `tokenizer` is the base's own unless the adapter brings one or a chat template."""

    ref: AdapterRef
    tokenizer: Tokenizer
    own_template: bool  # the chat template is a stranger's


@dataclass(frozen=True)
class _Known:
    version: tuple[str, ...]
    resolved: ResolvedAdapter
    checked_at: float
    cheap: bool  # asking the source again costs next to nothing
    settled: bool  # may be remembered


class AdapterResolver:
    """All adapters of one server. `layout` is what the engine said of the base when it became ready."""

    def __init__(
        self, sources: Sources, store: Store, base: Tokenizer, metrics: Metrics, *,
        recheck_s: float = 2.0, max_merged_rank: int = 256,
    ) -> None:  # fmt: skip
        self._sources, self._store, self._base, self._metrics = sources, store, base, metrics
        self._recheck_s, self._max_merged_rank = recheck_s, max_merged_rank
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._flights: dict[tuple[object, ...], asyncio.Task[ResolvedAdapter]] = {}
        self._known: OrderedDict[tuple[object, ...], _Known] = OrderedDict()
        self._failures: dict[tuple[object, ...], tuple[float, ServerError]] = {}
        self._tokenizers: OrderedDict[str, Tokenizer | None] = OrderedDict()
        self._tokenizers_lock = threading.Lock()
        self._doubted_at: dict[str, float] = {}
        self._listed: dict[str, tuple[float, list[str]]] = {}

    async def resolve(self, selection: AdapterSelection, layout: BaseLayout) -> ResolvedAdapter:
        """The adapter, fetched and packed if it is not yet; one flight however many ask. The errors of Source and of adapters.pack."""
        source = canonical_name(selection.source)
        key = (*selection.key, layout.fingerprint)
        failed = self._failures.get(key)
        if failed is not None and time.monotonic() - failed[0] < _REMEMBER_FAILURE_S:
            raise failed[1].with_traceback(None)
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = asyncio.create_task(self._fly(source, key, selection, layout))
            flight.add_done_callback(lambda task: self._land(key, task))
        return await asyncio.shield(flight)

    async def list_ids(self, source: str) -> list[str]:
        """Ids that the source holds, at most _MAX_LISTED; asked of it at most every few seconds. The errors of Source."""
        source = canonical_name(source)
        listed_at, ids = self._listed.get(source, (float("-inf"), []))
        if time.monotonic() - listed_at > _LIST_AGAIN_S:
            ids = await asyncio.to_thread(lambda: self._sources.get(source).adapter_ids(_MAX_LISTED))
            self._listed[source] = (time.monotonic(), ids)
        return ids

    def _land(self, key: tuple[object, ...], task: asyncio.Task[ResolvedAdapter]) -> None:
        """Forget the flight; remember its failure for a moment. Reads the exception, so that nobody is warned of it if all callers left."""
        self._flights.pop(key, None)
        error = None if task.cancelled() else task.exception()
        now = time.monotonic()
        self._failures = {k: kept for k, kept in self._failures.items() if now - kept[0] < _REMEMBER_FAILURE_S}
        if isinstance(error, ServerError):
            self._failures[key] = (now, error)
        outcome = "ok" if error is None else type(error).__name__ if isinstance(error, ServerError) else "internal"
        self._metrics.adapter_resolutions.labels(outcome=outcome).inc()

    async def _fly(self, source: str, key: tuple[object, ...], selection: AdapterSelection, layout: BaseLayout) -> ResolvedAdapter:
        if source not in self._pools:
            self._pools[source] = ThreadPoolExecutor(_THREADS_PER_SOURCE, thread_name_prefix=f"adapters-{source}")
        known = self._known.get(key)
        with self._metrics.adapter_resolve.time():
            found = await asyncio.get_running_loop().run_in_executor(
                self._pools[source], lambda: self._resolve(known, self._sources.get(source), selection, layout)
            )
        self._known.pop(key, None)
        if found.settled:
            self._known[key] = found
            while len(self._known) > _MAX_REMEMBERED:
                self._known.popitem(last=False)
        return found.resolved

    # -- in a thread ---------------------------------------------------------------------------------------------------------------

    def _resolve(self, known: _Known | None, source: Source, selection: AdapterSelection, layout: BaseLayout) -> _Known:
        """What is known if its source says that it is still the same, else made anew."""
        if known is not None and not mark_used(Path(known.resolved.ref.path)):
            known = None  # the store let its pack go
        if known is not None and not known.cheap and time.monotonic() - known.checked_at < self._recheck_s:
            return known
        snapshots = [source.snapshot(adapter_id, api_token=selection.api_token) for adapter_id in selection.ids]
        if known is not None and known.version == _version(snapshots):
            return replace(known, checked_at=time.monotonic())
        stored = [self._store.materialize(source, snapshot, api_token=selection.api_token) for snapshot in snapshots]
        resolved = self._make(selection, stored, layout)
        final = [one.snapshot for one in stored]
        settled, cheap = all(one.settled for one in final), all(one.folder is not None for one in final)
        return _Known(_version(final), resolved, time.monotonic(), cheap, settled)

    def _make(self, selection: AdapterSelection, stored: list[StoredAdapter], layout: BaseLayout) -> ResolvedAdapter:
        refs = [self._pack(one, layout) for one in stored]
        if selection.merge is not None:
            return self._merge(selection.merge, refs, layout)
        own = self._tokenizer(stored[0], read_header(Path(refs[0].path))[0].vocab_size)
        stranger = own is not None and own.chat_template != self._base.chat_template
        return ResolvedAdapter(refs[0], own or self._base, stranger)

    def _pack(self, stored: StoredAdapter, layout: BaseLayout) -> AdapterRef:
        def write(out: Path) -> None:
            write_pack(stored.path, layout, stored.hash, out)

        adapter_id = stored.snapshot.adapter_id
        try:
            path = self._store.publish_pack(stored.hash, _pack_key(layout), write, stored)
        except AdapterRefused as refusal:
            raise AdapterRefused(f"Adapter '{adapter_id}': {refusal.message}", param=refusal.param) from refusal
        return AdapterRef(stored.hash, str(path), adapter_id)

    def _merge(self, merge: Merge, refs: list[AdapterRef], layout: BaseLayout) -> ResolvedAdapter:
        """The merged pack, under the hash of all that goes into it. Its random masks come of that hash, so the seed is always 0."""
        options = (merge.strategy, merge.density, merge.majority_sign_method, 0)
        hash = merge_hash([(ref.hash, weight) for ref, weight in zip(refs, merge.weights, strict=True)], *options)
        inputs = [(Path(ref.path), weight) for ref, weight in zip(refs, merge.weights, strict=True)]

        def write(out: Path) -> None:
            merge_packs(inputs, *options, self._max_merged_rank, out)

        path = self._store.publish_pack(hash, _pack_key(layout), write)
        return ResolvedAdapter(AdapterRef(hash, str(path), "+".join(merge.ids)), self._base, False)

    def _tokenizer(self, stored: StoredAdapter, num_rows: int) -> Tokenizer | None:
        """The adapter's own tokenizer, one object for all adapters that bring the same files."""
        digest = hashlib.sha256(str(num_rows).encode())
        for name in TOKENIZER_FILES:
            path = stored.path / name
            if path.is_file():
                digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        name = digest.hexdigest()
        with self._tokenizers_lock:
            if name in self._tokenizers:
                self._tokenizers.move_to_end(name)
                return self._tokenizers[name]
        try:
            tokenizer = load_adapter_tokenizer(stored.path, self._base, num_rows=num_rows)
        except OSError as error:
            raise AdapterRefused(f"the adapter's tokenizer cannot be read ({error.strerror})") from None
        with self._tokenizers_lock:
            self._tokenizers[name] = tokenizer
            while len(self._tokenizers) > _MAX_TOKENIZERS:
                self._tokenizers.popitem(last=False)
        return tokenizer

    # -- held while requests run ---------------------------------------------------------------------------------------------------

    @contextmanager
    def pinned(self, adapter: ResolvedAdapter | None) -> Iterator[None]:
        """Keep the adapter's pack on disk while a request needs it. If the engine refuses the pack, it is made anew for the next one."""
        if adapter is None:
            yield
            return
        with self._store.pinned(adapter.ref.hash):
            try:
                yield
            except AdapterRefused:
                self._doubt(adapter.ref.hash)
                raise

    def _doubt(self, hash: str) -> None:
        """The pack may have been damaged on disk; but not more than once a minute, since the engine may also be right."""
        now = time.monotonic()
        self._doubted_at = {known: at for known, at in self._doubted_at.items() if now - at < _DOUBT_AGAIN_S}
        if hash not in self._doubted_at:
            self._doubted_at[hash] = now
            log.warning("the engine refused the pack of %s; it is made anew", hash)
            asyncio.get_running_loop().run_in_executor(None, self._store.discard_packs, hash)

    def close(self) -> None:
        """Take no more work; running fetches are left to end with the process."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)


def _version(snapshots: list[Snapshot]) -> tuple[str, ...]:
    return tuple(snapshot.version for snapshot in snapshots)


def _pack_key(layout: BaseLayout) -> str:
    return f"{layout.fingerprint[:32]}-{layout.dtype}"
