"""How many sequences may be in flight, and the end of it all: draining.

Owns one count, and the tasks that were admitted, so that none is left without an answer. LoRAX counts requests; a request with n or
best_of counts as many as it starts. The routes ask; api.serving drains.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import SHUTTING_DOWN, Overloaded, ServerError, Unavailable, ValidationFailed
from server.metrics import Metrics


class Admission:
    """Counts sequences from admission to the last byte."""

    def __init__(self, max_sequences: int, metrics: Metrics) -> None:
        self._max, self._metrics = max_sequences, metrics
        self._num_requests = 0
        self._num_sequences = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks: dict[object, asyncio.Task[object]] = {}  # one an admission; a stream's is its first event's, done once that is out
        self._ended: dict[asyncio.Task[object], ServerError] = {}
        self.draining = False
        self.leaving = False  # a drain is to come: /health says so, and requests are still taken

    def check(self) -> None:
        """Refuse before any work is done: Unavailable while draining, Overloaded when full."""
        if self.draining:
            raise Unavailable(SHUTTING_DOWN, retry_after_s=5.0)
        if self._num_sequences >= self._max:
            raise Overloaded()

    @contextmanager
    def admitted(self, num_sequences: int) -> Iterator[None]:
        """Hold `num_sequences` places. Errors as `check`; ValidationFailed if one request wants more than there are at all."""
        self.check()
        if num_sequences > self._max:
            raise ValidationFailed(f"one request may start at most {self._max} sequences. Given: {num_sequences}", param="n")
        if self._num_sequences + num_sequences > self._max:
            raise Overloaded()
        self._add(num_sequences, 1)
        admission, task = object(), asyncio.current_task()
        assert task is not None
        self._tasks[admission] = task
        try:
            yield
        except asyncio.CancelledError:
            if (error := self._ended.pop(task, None)) is None or asyncio.current_task() is not task:
                raise
            task.uncancel()
            raise error from None
        finally:
            del self._tasks[admission]
            self._ended.pop(task, None)
            self._add(-num_sequences, -1)

    def end_all(self, error: ServerError) -> None:
        """End those that still wait for something, an adapter for example, with `error` as their answer."""
        for task in self._tasks.values():
            if not task.done():
                self._ended[task] = error
                task.cancel()

    def _add(self, num_sequences: int, num_requests: int) -> None:
        self._num_sequences += num_sequences
        self._num_requests += num_requests
        self._metrics.in_flight.set(self._num_sequences)
        if self._num_requests:
            self._idle.clear()
        else:
            self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Admit no more and wait for those inside; False if some are still there after `timeout_s`."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
