"""Threads that bring adapters from disk into host memory. They own nothing but what they read; AdapterTiers says what and when.

A read that hangs in the kernel cannot be ended. It is given up after a while: whoever waits for it is told, another thread takes the place
of the one that hangs, and what it reads in the end is dropped.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from server.errors import ServerError, SourceUnavailable
from server.types import AdapterRef

log = logging.getLogger(__name__)

Done = tuple[AdapterRef, Any, float, Exception | None]  # what was asked for, what was read, seconds, why not

_MAX_HUNG = 32  # threads that may hang at a time; beyond that reads wait for one of them


class _Job:
    """One read; `begun_at` is None while it waits for a thread."""

    __slots__ = ("ref", "begun_at", "given_up")

    def __init__(self, ref: AdapterRef) -> None:
        self.ref, self.begun_at, self.given_up = ref, None, False


class Readers:
    """`num_threads` reads at a time, in the order of asking. All methods are for one thread; `read_one` runs in the others."""

    def __init__(
        self,
        read_one: Callable[[AdapterRef], Any],
        num_threads: int,
        drop: Callable[[Any], None] = lambda host: None,
        timeout_s: float = 300.0,
    ) -> None:
        """`drop` frees what was read too late; it is called where `take` is."""
        self._read_one, self._drop, self._timeout_s = read_one, drop, timeout_s
        self._num_threads, self._num_hung = num_threads, 0
        self._reading: list[_Job] = []  # asked for, neither taken nor given up
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[_Job, Done]] = queue.SimpleQueue()
        self.arrived = threading.Event()  # set when `take` has something to return
        for _ in range(num_threads):
            self._start_thread()

    @property
    def has_idle(self) -> bool:
        """Whether a read would start at once."""
        return len(self._reading) < self._num_threads

    @property
    def is_late(self) -> bool:
        """Whether `take` would give a read up."""
        latest = time.monotonic() - self._timeout_s
        return any(job.begun_at is not None and job.begun_at < latest for job in self._reading)

    def read(self, ref: AdapterRef) -> None:
        """Ask for an adapter."""
        job = _Job(ref)
        self._reading.append(job)
        self._jobs.put(job)

    def take(self) -> list[Done]:
        """What was read, or given up, since the last time."""
        done: list[Done] = []
        while not self._done.empty():
            job, result = self._done.get()
            if job.given_up:  # its thread is one of `num_threads` again, and its stand-in one too many
                self._num_hung -= 1
                self._jobs.put(None)
                if result[1] is not None:
                    self._drop(result[1])
            else:
                self._reading.remove(job)
                done.append(result)
        if self.is_late:
            done += self._give_up()
        return done

    def close(self) -> None:
        """Let the threads end once they are idle."""
        for _ in range(self._num_threads + self._num_hung):
            self._jobs.put(None)

    def _give_up(self) -> list[Done]:
        now, given_up = time.monotonic(), []
        for job in list(self._reading):
            if job.begun_at is None or now - job.begun_at < self._timeout_s or self._num_hung >= _MAX_HUNG:
                continue
            log.error("reading adapter %s has not ended after %.0f s; it is given up", job.ref.hash, now - job.begun_at)
            job.given_up = True
            self._reading.remove(job)
            self._num_hung += 1
            self._start_thread()
            late = SourceUnavailable(f"adapter '{job.ref.name}' could not be read within {self._timeout_s:g} s; try again")
            given_up.append((job.ref, None, now - job.begun_at, late))
        return given_up

    def _start_thread(self) -> None:
        threading.Thread(target=self._run, name="adapter-reader", daemon=True).start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.begun_at = time.monotonic()
            host, error = None, None
            try:
                host = self._read_one(job.ref)
            except ServerError as refusal:
                error = refusal
            except Exception as unexpected:
                log.exception("reading adapter %s failed", job.ref.hash)
                error = unexpected
            self._done.put((job, (job.ref, host, time.monotonic() - job.begun_at, error)))
            self.arrived.set()
