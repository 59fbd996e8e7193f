"""Packs that were damaged where they lie: found out when the engine refuses one, removed, and made anew from the adapter's files.

Owns what was mended lately; the looking blocks and runs in api.source_threads. A pack that is whole was refused for what it is, and stays.
The requests that met the damage are run once more (api.generation): their callers notice nothing.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from server.adapters.pack import check_pack
from server.api.source_threads import SourceThreads
from server.errors import AdapterRefused, ServerError
from server.sources import Store
from server.types import AdapterRef

log = logging.getLogger(__name__)

_WINDOW_S, _MAX_MENDED = 60.0, 3  # a disk that damages all that is written is not written to for every request


class PackMender:
    """For the event loop's thread."""

    def __init__(self, store: Store, threads: SourceThreads) -> None:
        self._store, self._threads = store, threads
        self._running: dict[str, asyncio.Task[bool]] = {}  # by hash
        self._mended_at: dict[str, list[float]] = {}  # by hash, within the window

    async def mend(self, ref: AdapterRef, make: Callable[[], Awaitable[AdapterRef]]) -> bool:
        """Whether the pack that the engine refused was damaged, and is whole now; one look and one making however many ask.

        `make` resolves the adapter anew. Its errors pass, but to its own caller alone: others may have named the same weights otherwise."""
        while (running := self._running.get(ref.hash)) is not None:
            with suppress(ServerError):
                return await asyncio.shield(running)
        task = self._running[ref.hash] = asyncio.create_task(self._mend(ref, make))
        task.add_done_callback(lambda done: self._land(ref.hash, done))
        return await asyncio.shield(task)

    async def _mend(self, ref: AdapterRef, make: Callable[[], Awaitable[AdapterRef]]) -> bool:
        earliest = time.monotonic() - _WINDOW_S
        self._mended_at = {known: kept for known, at in self._mended_at.items() if (kept := [one for one in at if one > earliest])}
        mended_at = self._mended_at.get(ref.hash, [])
        if len(mended_at) >= _MAX_MENDED:
            return False
        if not await asyncio.wrap_future(self._threads.submit("store", "fetch", lambda: self._remove_damaged(ref))):
            return bool(mended_at)  # whole: it was mended since this request was refused, or it is refused for what it is
        if (await make()).hash != ref.hash:
            return False  # the name means something else by now: nothing can be made of these weights any more
        self._mended_at[ref.hash] = [*mended_at, time.monotonic()]
        return True

    def _remove_damaged(self, ref: AdapterRef) -> bool:
        """Blocks."""
        try:
            check_pack(Path(ref.path))
        except AdapterRefused as damage:
            log.error("the pack of adapter %s is damaged on disk (%s); it is made anew", ref.hash, damage.message)
            self._store.discard_packs(ref.hash, damaged=True)
            return True
        return False

    def _land(self, adapter_hash: str, task: asyncio.Task[bool]) -> None:
        self._running.pop(adapter_hash, None)
        if not task.cancelled():
            task.exception()  # whoever waits hears it
