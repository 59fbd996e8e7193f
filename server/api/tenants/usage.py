"""Tokens of the last minute: counted here, and shared with the other servers of a fleet through small files on the shared file system.

    usage/SERVER.json     {"used": {"tenant/acme": 1200, ...}}: what that server used in the last minute, each second anew if it changed,
                          now and then if it did not: who uses as much in each minute is not silent

Owns the window and the files. A limit is held against this server's own count and what the others last told, which is one or two seconds
old: so it holds for the fleet, and may be overshot by what all servers let in within that time. While the file system is away each server
goes on by itself. It does not know what a limit is; `limits` asks, `tenancy` calls `exchange` in a thread.
"""

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

WINDOW_S = 60
_TELL_AGAIN_S = 20.0
_SILENT_S = 90.0  # a server that told nothing for so long uses nothing, or is dead
_FORGET_S = 3600.0  # then anybody may remove its file
_MAX_FILE_BYTES = 8 << 20


class Window:
    """Tokens of the last minute, by the second. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._bins: deque[list[int]] = deque()  # [second, tokens], oldest first
        self._sum = 0

    def add(self, tokens: int, at: float) -> None:
        """Count tokens now."""
        second = int(at)
        if not self._bins or self._bins[-1][0] < second:
            self._bins.append([second, 0])
        self._bins[-1][1] += tokens
        self._sum += tokens

    def give_back(self, tokens: int, at: float) -> None:
        """Of those that were counted at `at`; without effect once they have left the window."""
        for one in self._bins:
            if one[0] == int(at):
                one[1] -= tokens
                self._sum -= tokens

    def used(self, now: float) -> int:
        """Tokens of the minute that ends now."""
        while self._bins and self._bins[0][0] <= now - WINDOW_S:
            self._sum -= self._bins.popleft()[1]
        return self._sum

    def wait_s(self, tokens: int, now: float) -> float:
        """Seconds until so many of those that are counted now have left the window; a whole minute if they are fewer."""
        self.used(now)
        freed = 0
        for second, counted in self._bins:
            freed += counted
            if freed >= tokens:
                return second + WINDOW_S - now
        return float(WINDOW_S)


class FleetUsage:
    """The files of a fleet's servers. Blocking; one call at a time."""

    def __init__(self, folder: Path, server_id: str, *, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._own, self._clock = folder, f"{server_id}.json", clock
        folder.mkdir(parents=True, exist_ok=True)
        self._written: dict[str, int] = {}
        self._written_at = 0.0

    def exchange(self, used: Mapping[str, int]) -> dict[str, int]:
        """Tell what this server used in the last minute, by what it counts for; returns the others' together. OSError."""
        now = self._clock()
        if used != self._written or (used and abs(now - self._written_at) > _TELL_AGAIN_S):
            staged = self._folder / f".{self._own}.new"
            staged.write_text(json.dumps({"used": used}))
            os.replace(staged, self._folder / self._own)
            self._written, self._written_at = dict(used), now
        others: dict[str, int] = {}
        for entry in os.scandir(self._folder):
            if entry.name.endswith(".json") and entry.name != self._own:
                for key, tokens in self._read(Path(entry.path)).items():
                    others[key] = others.get(key, 0) + tokens
        return others

    def _read(self, path: Path) -> dict[str, int]:
        """What a server told; nothing if that is too long ago, or no file of ours."""
        try:
            with path.open("rb") as file:  # by its name each time: NFS then asks the server
                age_s = self._clock() - os.fstat(file.fileno()).st_mtime
                if age_s > _FORGET_S:
                    path.unlink(missing_ok=True)
                if age_s > _SILENT_S:
                    return {}
                used = json.loads(file.read(_MAX_FILE_BYTES))["used"]
                return {key: tokens for key, tokens in used.items() if type(tokens) is int and tokens > 0}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("a file in the usage folder is not one of ours")
            return {}

    def close(self) -> None:
        """A server that ends leaves no file; what it used is forgotten with it."""
        with suppress(OSError):
            (self._folder / self._own).unlink(missing_ok=True)
