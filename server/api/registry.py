"""What names mean: published versions, deleted names, pins, the latest orders to load and unload; the same on every server of a fleet.

Owns the view of this process, on the event loop, and the poll that follows what other servers wrote (api.shared_file). Names are of the
default source: one that nobody published means its id there. It does not know how an order is carried out: `on_change` is told.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import msgspec

from server.api.shared_file import SharedFile
from server.errors import ServerError, SourceUnavailable, Unavailable, ValidationFailed

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_PATIENCE_S = 20.0  # longer than a writer waits for the lock
MAX_NAMES = 20_000  # a few MB, read by every server after each change


class Version(msgspec.Struct, frozen=True):
    """What a published name answers with, and where it came from."""

    hash: str
    number: int  # 1, 2, ... of this name
    source: str
    adapter_id: str
    size_bytes: int  # of its files
    published_at: int  # seconds since 1970
    rank: int
    base_name: str | None = None  # base_model_name_or_path of its config


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """A name. Neither version nor deleted: it means its id in the default source, as if it were not here."""

    changed: int = 0  # generation since which it means what it means
    version: Version | None = None
    deleted: bool = False
    pinned: bool = False
    loaded: int = 0  # generation of the last order to load it
    unloaded: int = 0  # generation of the last order to unload it
    last_number: int = 0  # of all versions that there were
    past: tuple[Version, ...] = ()  # versions before this one that can answer again, the last one last


class Names(msgspec.Struct, frozen=True):
    """The document on the shared file system."""

    generation: int = 0
    names: dict[str, Entry] = {}


Change = Callable[[Entry, int], Entry]  # the name's entry and the new generation -> what it becomes
Check = Callable[[Mapping[str, Entry]], None]
OnChange = Callable[[str, Entry, Entry], None]
NOTHING = Entry()


class Registry:
    """The names of one base model below `root`. `view` is what holds now: read it on the event loop or in any thread."""

    def __init__(self, root: Path, model_name: str, default_source: str) -> None:
        self.folder = root / f"model-{quote(model_name, safe='')}"
        self.default_source = default_source
        self.on_change: OnChange = lambda name, before, after: None
        self._file = SharedFile(self.folder / "names.json", Names())
        self.view: Names = self._file.read()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="registry")
        self._follower = ThreadPoolExecutor(1, thread_name_prefix="registry-follower")

    def entry(self, name: str) -> Entry:
        """What is known of a name; NOTHING if nothing is."""
        return self.view.names.get(name, NOTHING)

    def stamps(self, source: str, ids: Iterable[str]) -> tuple[int, ...]:
        """Changes whenever what the ids mean is changed here."""
        return tuple(self.entry(adapter_id).changed if source == self.default_source else 0 for adapter_id in ids)

    def listed(self, source: str, ids: Iterable[str]) -> list[str]:
        """Ids of a source as requests may name them: without deleted names, with published ones."""
        if source != self.default_source:
            return sorted(ids)
        names = self.view.names
        published = (name for name, entry in names.items() if entry.version is not None)
        return sorted({*published, *(adapter_id for adapter_id in ids if not names.get(adapter_id, NOTHING).deleted)})

    def read_hashes(self) -> set[str]:
        """The hashes that names mean or can go back to, read from the file now. Blocks. OSError or ValueError if it cannot be read."""
        versions = (one for entry in self._file.read().names.values() for one in (entry.version, *entry.past))
        return {version.hash for version in versions if version is not None}

    async def update(self, name: str, change: Change, check: Check = lambda names: None) -> Entry:
        """Change what a name means, for the whole fleet; it holds here when this returns. `change` may raise, and then nothing changes.
        So may `check`, which sees all names as they are under the lock, and runs in a thread.

        Unavailable if the registry is busy or hangs, SourceUnavailable if its disk fails, ValidationFailed if it is full."""
        try:
            after = await self.in_thread(lambda: self._file.update(lambda now: _changed(now, name, change, check), self.view.generation))
        except TimeoutError:
            raise Unavailable("the registry's file system does not answer; the order may still be carried out", retry_after_s=5.0) from None
        except (OSError, ValueError) as error:
            log.error("the registry of adapters cannot be written: %s", error)
            raise SourceUnavailable("the registry of adapters failed; nothing was changed") from None
        self._take(after)
        return self.entry(name)

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """What blocks on the registry's file system, in threads that nothing else needs: it may hang. TimeoutError if it does."""
        async with asyncio.timeout(_PATIENCE_S):
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Take no more work; what hangs is left to end with the process."""
        for threads in (self._threads, self._follower):
            threads.shutdown(wait=False, cancel_futures=True)

    async def follow(self, every_s: float) -> None:
        """Take over what other servers write; never returns. While the file cannot be read the last view holds."""
        failure = ""
        while True:
            try:
                found = await asyncio.get_running_loop().run_in_executor(self._follower, self._file.read_if_changed)
                if found is not None:
                    self._take(found)
                failure = ""
            except Exception as error:  # a fault of ours too: what is not followed would be wrong for ever
                if str(error) != failure:
                    is_known = isinstance(error, OSError | ValueError | ServerError)
                    log.error("the registry of adapters cannot be read, what it said before holds: %s", error, exc_info=not is_known)
                failure = str(error)
            await asyncio.sleep(every_s)

    def _take(self, found: Names) -> None:
        if found.generation < self.view.generation:
            return  # read before our own last change was written
        before, self.view = self.view.names, found
        for name in found.names.keys() | before.keys():
            was, now = before.get(name, NOTHING), found.names.get(name, NOTHING)
            if was != now:
                self.on_change(name, was, now)


def _changed(now: Names, name: str, change: Change, check: Check) -> Names:
    check(now.names)
    generation = now.generation + 1
    before = now.names.get(name, NOTHING)
    after = change(before, generation)
    if after == before:
        return now
    names = {**now.names, name: after}
    if len(names) > MAX_NAMES:  # orders to load and unload have been seen by now, or will not be missed
        names = {one: entry for one, entry in names.items() if one == name or entry.version or entry.deleted or entry.pinned}
    if len(names) > MAX_NAMES:
        raise ValidationFailed(f"the registry holds {MAX_NAMES} names, all that it takes; release some that were deleted", param="name")
    if after == NOTHING:
        del names[name]
    return Names(generation, names)
