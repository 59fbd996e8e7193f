"""Which adapters a source holds, for GET /v1/models. Owns what is remembered of it; does not know who asks.

One listing of a source at a time, in a thread of its own: a large bucket or a slow file system delays nothing but this answer.
"""

import asyncio
import time

from server.api.source_threads import SourceThreads
from server.errors import ServerError, SourceUnavailable
from server.sources import Sources, canonical_name

_REMEMBER_S = 5.0
_MAX_LISTED = 10_000


class AdapterLists:
    """The last listing of each source, or why there is none; both for a few seconds."""

    def __init__(self, sources: Sources, threads: SourceThreads, *, timeout_s: float = 10.0) -> None:
        self._sources, self._threads, self._timeout_s = sources, threads, timeout_s
        self._running: dict[str, asyncio.Future[list[str]]] = {}
        self._kept: dict[str, tuple[float, list[str] | ServerError]] = {}

    async def ids(self, source: str) -> list[str]:
        """At most _MAX_LISTED ids. The errors of Source; SourceUnavailable after `timeout_s`; the listing goes on for later callers."""
        source = canonical_name(source)
        kept_at, kept = self._kept.get(source, (float("-inf"), []))
        if time.monotonic() - kept_at > _REMEMBER_S:
            kept = await self._ask(source)
        if isinstance(kept, ServerError):
            raise kept.with_traceback(None)
        return kept

    async def _ask(self, source: str) -> list[str] | ServerError:
        running = self._running.get(source)
        if running is None:
            job = self._threads.submit(source, "list", lambda: self._sources.get(source).adapter_ids(_MAX_LISTED))
            running = self._running[source] = asyncio.wrap_future(job)
            running.add_done_callback(lambda done: self._land(source, done))
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.shield(running)
        except TimeoutError:
            late = SourceUnavailable(f"Source '{source}' did not list its adapters within {self._timeout_s:g} s; try again")
            self._kept[source] = (time.monotonic(), late)
            return late
        except ServerError as error:
            return error

    def _land(self, source: str, done: asyncio.Future[list[str]]) -> None:
        self._running.pop(source, None)
        if done.cancelled():
            return
        error = done.exception()
        if error is None or isinstance(error, ServerError):
            self._kept[source] = (time.monotonic(), error or done.result())
