"""What is remembered of adapters that were resolved or are being resolved. Owns the memory; api.adapters decides what it is good for."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from server.api.packing import Packed
from server.api.selection import ResolvedAdapter
from server.api.source_threads import SourceThreads, Work
from server.sources import Snapshot
from server.types import AdapterRef

Key = tuple[object, ...]
Result = TypeVar("Result")

PATIENCE_S = 2.0  # with a source that is asked whether what is known still holds
_MAX_REMEMBERED = 20_000  # adapters; an entry is small


@dataclass(frozen=True)
class Known:
    """An adapter that was resolved once. Its tokenizer is named, not held: the cache of tokenizers decides what stays in memory."""

    version: tuple[str, ...]
    ref: AdapterRef
    rank: int
    base_name: str | None
    tokenizer_digest: str | None  # None: the base's
    checked_at: float
    cheap: bool  # asking the source again costs next to nothing

    @classmethod
    def of(cls, packed: Packed) -> Self:
        """As it was packed just now."""
        cheap = all(one.folder is not None for one in packed.snapshots)
        digest = packed.own[0] if packed.own is not None else None
        return cls(version_of(packed.snapshots), packed.ref, packed.rank, packed.base_name, digest, time.monotonic(), cheap)


def version_of(snapshots: Sequence[Snapshot]) -> tuple[str, ...]:
    """Of all that a selection names."""
    return tuple(snapshot.version for snapshot in snapshots)


class Flight:
    """A resolution under way, and for how many."""

    def __init__(self) -> None:
        self.task: asyncio.Task[ResolvedAdapter]
        self.job: Future[Any] | None = None  # what it waits for in a thread
        self.was_asked = False  # it has begun to ask the source
        self.num_waiting = 0

    def was_dropped(self) -> bool:
        """Whether nobody let it finish, and not whoever waits for it now is being cancelled."""
        task = asyncio.current_task()
        return self.task.cancelled() and self.num_waiting > 0 and (task is None or task.cancelling() == 0)

    async def run(self, threads: SourceThreads, source: str, work: Work, job: Callable[[], Result]) -> Result:
        """The result of `job`, in a thread; nothing is begun for a flight that everybody left."""
        self.job = self._submit(threads, source, work, job)
        try:
            return await asyncio.wrap_future(self.job)
        finally:
            self.job = None

    async def run_in_time(
        self, threads: SourceThreads, source: str, work: Work, job: Callable[[], Result],
        take_late: Callable[[asyncio.Future[Result]], None] = lambda asked: None,
    ) -> Result | None:  # fmt: skip
        """As `run`, for short work on what is known: None if it takes long, or other such work does already."""
        if threads.is_late(source, work):
            return None
        self.job = running = self._submit(threads, source, work, job)
        try:
            asked = asyncio.wrap_future(running)
            asked.add_done_callback(lambda asked: asked.cancelled() or asked.exception())  # whoever waits may be cancelled
            await asyncio.wait({asked}, timeout=PATIENCE_S)
            if asked.done():
                return asked.result()
            if not running.cancel():
                threads.note_late(source, work, running)
                asked.add_done_callback(take_late)
            return None
        finally:
            self.job = None

    def _submit(self, threads: SourceThreads, source: str, work: Work, job: Callable[[], Result]) -> Future[Result]:
        if self.num_waiting == 0:
            raise asyncio.CancelledError
        return threads.submit(source, work, job)


class KnownAdapters:
    """The adapters that were used last."""

    def __init__(self) -> None:
        self._known: OrderedDict[Key, Known] = OrderedDict()

    def get(self, key: Key) -> Known | None:
        """What is remembered; None if nothing is."""
        return self._known.get(key)

    def remember(self, key: Key, known: Known) -> None:
        """Remember it, in place of the one that was used longest ago."""
        self._known[key] = known
        self._known.move_to_end(key)
        while len(self._known) > _MAX_REMEMBERED:
            self._known.popitem(last=False)

    def forget(self, key: Key) -> None:
        """The next request starts anew."""
        self._known.pop(key, None)
