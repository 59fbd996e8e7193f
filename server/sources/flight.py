"""One worker for one piece of work: `SingleFlight` among the threads of a process, `file_lock` among processes. Called by the store."""

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_POLL_S = (0.01, 0.25)  # flock has no timed wait: first and longest pause between two tries


class SingleFlight:
    """Threads that ask for the same key at the same time share one run of the work, its result or its error."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[Hashable, Future[Any]] = {}

    def run(self, key: Hashable, work: Callable[[], T]) -> T:
        """The result of `work`, or of the run that was under way. Nothing is kept once it ended: the next call runs again."""
        with self._lock:
            flight = self._flights.get(key)
            mine = flight is None
            if flight is None:
                flight = self._flights[key] = Future()
        if not mine:
            return flight.result()
        try:
            result = work()
        except BaseException as error:
            self._end(key)
            flight.set_exception(error)
            raise
        self._end(key)
        flight.set_result(result)
        return result

    def _end(self, key: Hashable) -> None:
        with self._lock:
            del self._flights[key]


@contextmanager
def file_lock(path: Path, wait_s: float) -> Iterator[bool]:
    """Holds flock(2) on `path`, which the kernel lets go when its owner dies. Yields whether it is held.

    False after `wait_s`, or where the file system has no locks (some NFS): the work must then be correct without it, only done twice."""
    lock = _acquire(path, time.monotonic() + wait_s)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)  # while it is held: who waits for it sees below that its file is gone
            os.close(lock)


def try_lock(path: Path) -> int | None:
    """An open, locked descriptor. None if somebody holds it; OSError if the file system has no locks."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise
    return descriptor


def _acquire(path: Path, give_up_at: float) -> int | None:
    pause_s, longest_s = _POLL_S
    while True:
        try:
            descriptor = try_lock(path)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EINVAL):
                return None
            raise
        if descriptor is not None:
            if _is_at(descriptor, path):
                return descriptor
            os.close(descriptor)  # its last owner removed it meanwhile: that lock protects nothing
            continue
        if time.monotonic() >= give_up_at:
            return None
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, longest_s)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
