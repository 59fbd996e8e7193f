"""The threads in which sources are asked. Owns the pools alone; api.adapters and api.adapter_lists say what runs in them.

A source has a pool for each kind of work, so that neither a slow source holds up another one nor slow work of a source its quick work.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeVar

Result = TypeVar("Result")

# known: looking at the local disk; ask: one short question to the source; fetch: whatever a new adapter takes; list: all ids
Work = Literal["known", "ask", "fetch", "list"]
_NUM_THREADS: dict[Work, int] = {"known": 4, "ask": 8, "fetch": 8, "list": 1}


class SourceThreads:
    """Pools of threads, each made when it is first needed. For one event loop's thread."""

    def __init__(self) -> None:
        self._pools: dict[tuple[str, Work], ThreadPoolExecutor] = {}
        self._late: dict[tuple[str, Work], list[Future[Any]]] = {}

    def is_late(self, source: str, work: Work) -> bool:
        """Whether such work was given up by `note_late` and is still not done: more of it would only wait behind it."""
        late = self._late[source, work] = [job for job in self._late.get((source, work), ()) if not job.done()]
        return bool(late)

    def note_late(self, source: str, work: Work, job: Future[Any]) -> None:
        """Somebody waits for this no longer, since it takes too long."""
        self._late.setdefault((source, work), []).append(job)

    def submit(self, source: str, work: Work, run: Callable[[], Result]) -> Future[Result]:
        """Run it in a thread, now or when one is free; until then its future can be cancelled."""
        pool = self._pools.get((source, work))
        if pool is None:
            pool = self._pools[source, work] = ThreadPoolExecutor(_NUM_THREADS[work], thread_name_prefix=f"{work}-{source}")
        return pool.submit(run)

    def close(self) -> None:
        """Take no more work and drop what waits; what runs is left to end with the process."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
