"""How much the store holds, and what goes when it is too much. Owns the pins of this process; called by the store.

Least recently used goes first: an entry's mtime is the time of its last use, for every server on a shared folder. The clock may be stepped:
a time that is to come tells nothing, and a step forward makes all look idle, so what this process itself uses is pinned.
"""

import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from server.errors import AdapterRefused
from server.sources.disk import Staging

logger = logging.getLogger(__name__)

_SLACK_BYTES = 1 << 20  # of the disk: for folders, index and locks
MIN_IDLE_S = 60.0  # what was used within it another server may be about to open
_RECOUNT_S = 300.0  # other servers on the same folder add and remove too


class _Entry(NamedTuple):
    used_at: float  # seconds since the epoch
    size_bytes: int
    path: Path
    hash: str


class Space:
    """The published folders and files of a store. An entry's name is its adapter's hash, or begins with it and a dash."""

    def __init__(self, folders: Sequence[Path], staging: Staging, max_bytes: int | None, min_idle_s: float) -> None:
        self._folders = folders
        self._staging = staging
        self._max_bytes = max_bytes
        self._min_idle_s = min_idle_s
        self._lock = threading.Lock()  # for the numbers below alone, never during I/O: the event loop pins
        self._reserver = threading.Lock()  # one at a time counts and evicts
        self._pins: Counter[str] = Counter()
        self._used_bytes = 0
        self._added_bytes = 0  # since the last count began
        self._counted_at = float("-inf")

    def pin(self, adapter_hash: str) -> None:
        """Keep this adapter's entries until as many `unpin`."""
        with self._lock:
            self._pins[adapter_hash] += 1

    def unpin(self, adapter_hash: str) -> None:
        """Undo one `pin`."""
        with self._lock:
            if self._pins[adapter_hash] <= 0:
                raise ValueError(f"unpin without a pin: {adapter_hash}")
            self._pins[adapter_hash] -= 1
            if not self._pins[adapter_hash]:
                del self._pins[adapter_hash]

    def is_pinned(self, adapter_hash: str) -> bool:
        """Whether there are pins that were not undone."""
        with self._lock:
            return adapter_hash in self._pins

    def add(self, size_bytes: int) -> None:
        """`size_bytes` more were published."""
        with self._lock:
            self._used_bytes += size_bytes
            self._added_bytes += size_bytes

    def reserve(self, size_bytes: int) -> None:
        """Make room for so much more, within the bound and on the disk. AdapterRefused if the whole store is smaller. What is pinned or was
        used within `min_idle_s` (another server may be about to open it) stays, so the bound may be passed for that long."""
        if self._max_bytes is not None and size_bytes > self._max_bytes:
            raise AdapterRefused(f"The adapter has {size_bytes} bytes; the whole store holds {self._max_bytes} (store-max-bytes)")
        if self._fits(size_bytes) and self._is_counted():
            return
        with self._reserver:
            if self._fits(size_bytes) and self._is_counted():
                return  # another thread made room meanwhile
            self._evict(sorted(self._count()), size_bytes)
        if not self._fits(size_bytes):
            logger.warning("adapter store: there is no room for %d bytes beside the %d in use", size_bytes, self._used_bytes)

    def discard(self, path: Path, idle_s: float) -> bool:
        """Take an entry away unless any server used it within `idle_s`; whether it is gone."""
        try:
            is_idle = abs(time.time() - path.stat().st_mtime) >= idle_s
        except FileNotFoundError:
            return True
        if is_idle:
            self._staging.take_away(path)
        return is_idle

    def _fits(self, size_bytes: int) -> bool:
        with self._lock:
            is_within = self._max_bytes is None or self._used_bytes + size_bytes <= self._max_bytes
        return is_within and shutil.disk_usage(self._folders[0]).free >= size_bytes + _SLACK_BYTES

    def _is_counted(self) -> bool:
        return self._max_bytes is None or time.monotonic() - self._counted_at < _RECOUNT_S

    def _evict(self, entries: list[_Entry], size_bytes: int) -> None:
        """Take entries away, first ones first, until so much more fits."""
        now = time.time()
        for entry in entries:
            if self._fits(size_bytes):
                return
            if abs(now - entry.used_at) < self._min_idle_s or self.is_pinned(entry.hash):
                continue
            self._staging.take_away(entry.path)
            with self._lock:
                self._used_bytes -= entry.size_bytes
            logger.info("adapter store: evicted %s (%d bytes)", entry.path.name, entry.size_bytes)

    def _count(self) -> list[_Entry]:
        """All entries. What is added while they are counted may be counted twice, until the next count."""
        with self._lock:
            self._added_bytes = 0
        entries = []
        for folder in self._folders:
            for path in folder.iterdir():
                try:
                    used_at = path.stat().st_mtime
                    size_bytes = folder_bytes(path) if path.is_dir() else path.stat().st_size
                except FileNotFoundError:  # another server was faster
                    continue
                entries.append(_Entry(used_at, size_bytes, path, path.name.split("-", 1)[0]))
        with self._lock:
            self._used_bytes = sum(entry.size_bytes for entry in entries) + self._added_bytes
        self._counted_at = time.monotonic()
        return entries


def folder_bytes(folder: Path) -> int:
    """The files of a folder together."""
    return sum(path.stat().st_size for path in folder.iterdir())


def mark_used(path: Path) -> bool:
    """Record a use of an entry; False if it is not there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except PermissionError:  # another owner's file on a shared folder: readable is enough
        return path.exists()
    return True
