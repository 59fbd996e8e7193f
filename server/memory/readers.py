"""Threads that bring adapters from disk into host memory. They own nothing but what they read; AdapterTiers says what and when."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from server.errors import ServerError
from server.types import AdapterRef

log = logging.getLogger(__name__)

Done = tuple[AdapterRef, Any, float, Exception | None]  # what was asked for, what was read, seconds, why not


class Readers:
    """`num_threads` reads at a time, in the order of asking. All methods are for one thread; `read_one` runs in the others."""

    def __init__(self, read_one: Callable[[AdapterRef], Any], num_threads: int) -> None:
        self._read_one = read_one
        self._num_reading, self._num_threads = 0, num_threads
        self._jobs: queue.SimpleQueue[AdapterRef | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self.arrived = threading.Event()  # set when `take` has something to return
        for index in range(num_threads):
            threading.Thread(target=self._run, name=f"adapter-reader-{index}", daemon=True).start()

    @property
    def has_idle(self) -> bool:
        """Whether a read would start at once."""
        return self._num_reading < self._num_threads

    def read(self, ref: AdapterRef) -> None:
        """Ask for an adapter."""
        self._num_reading += 1
        self._jobs.put(ref)

    def take(self) -> list[Done]:
        """What was read since the last time."""
        done: list[Done] = []
        while not self._done.empty():
            done.append(self._done.get())
        self._num_reading -= len(done)
        return done

    def close(self) -> None:
        """Let the threads end once they are idle."""
        for _ in range(self._num_threads):
            self._jobs.put(None)

    def _run(self) -> None:
        while (ref := self._jobs.get()) is not None:
            started_at = time.monotonic()
            host, error = None, None
            try:
                host = self._read_one(ref)
            except ServerError as refusal:
                error = refusal
            except Exception as unexpected:
                log.exception("reading adapter %s failed", ref.hash)
                error = unexpected
            self._done.put((ref, host, time.monotonic() - started_at, error))
            self.arrived.set()
