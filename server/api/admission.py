"""How many sequences may be in flight, and the end of it all: draining.

Owns one count. LoRAX counts requests; a request with n or best_of counts as many as it starts. The routes ask; api.serving drains.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import Overloaded, Unavailable, ValidationFailed
from server.metrics import Metrics


class Admission:
    """Counts sequences from admission to the last byte."""

    def __init__(self, max_sequences: int, metrics: Metrics) -> None:
        self._max, self._metrics = max_sequences, metrics
        self._num_requests = 0
        self._num_sequences = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    def check(self) -> None:
        """Refuse before any work is done: Unavailable while draining, Overloaded when full."""
        if self.draining:
            raise Unavailable("the server is shutting down", retry_after_s=5.0)
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
        try:
            yield
        finally:
            self._add(-num_sequences, -1)

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
