"""One run of some work at a time, however many ask for it. Owns the running task; knows nothing of the work."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class SharedRun:
    """For the event loop's thread."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._work = work
        self._task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Returns when the run that is under way, or else one that begins now, has ended; its errors pass.

        Who leaves ends it for nobody."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
            self._task.add_done_callback(lambda task: task.cancelled() or task.exception())  # read, though all may have left
        await asyncio.shield(self._task)
