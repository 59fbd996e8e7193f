"""Adapters on disk, by content. Owns what is fetched, how it is named and when it goes; called in threads by the API.

    objects/HASH/            the files of an adapter (never changed once they are there)
    packs/HASH-KEY.pack      what was derived from one
    index/DIGEST.json        (source, id, version) -> HASH: a known version needs no download
    staging/, locks/         work under way; rubbish after a crash

The folder may be shared by several servers (NFS, EFS). All is written in staging and renamed into place; locks only save work.
It does not know any single source, nor what is in the files.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from server.errors import AdapterRefused, SourceUnavailable
from server.sources.base import Progress, Snapshot, Source, SourceChanged
from server.sources.content import hash_adapter, stat_signature
from server.sources.disk import LEFTOVER_S, Staging, explain_disk_errors, publish_file, publish_folder
from server.sources.flight import SingleFlight, file_lock
from server.sources.space import MIN_IDLE_S, Space, mark_used

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NUM_ATTEMPTS = 3  # when the source changes under our hands
_INDEX_KEEP_S = 30 * 86400.0
_HASH = re.compile(r"[0-9a-f]{64}")
_PACK_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter whose files can be read. `path` is an object of the store, or the source's own folder (`snapshot.folder`)."""

    hash: str
    path: Path
    bytes: int
    snapshot: Snapshot
    fresh: bool = field(default=False, compare=False)  # hashed just now: it need not be hashed again before use


class Store:
    """A folder of adapters, bounded in size."""

    def __init__(self, root: Path, max_bytes: int | None = None, *, lock_wait_s: float = 600.0, min_idle_s: float = MIN_IDLE_S) -> None:
        self._objects, self._packs, self._index = root / "objects", root / "packs", root / "index"
        self._locks = root / "locks"
        for folder in (self._objects, self._packs, self._index, self._locks, root / "staging"):
            folder.mkdir(parents=True, exist_ok=True)
        self._staging = Staging(root / "staging")
        self._space = Space((self._objects, self._packs), self._staging, max_bytes, min_idle_s)
        self._flights = SingleFlight()
        self._lock_wait_s = lock_wait_s
        self._tidy()

    def materialize(
        self, source: Source, snapshot: Snapshot, api_token: str | None = None, progress: Progress | None = None
    ) -> StoredAdapter:
        """The snapshot's files on disk: found, or fetched once however many ask. Blocking.

        If the source changes meanwhile, its newer version is taken instead (see the result's `snapshot`). `progress` is told only to
        the caller whose thread fetches. Errors: those of Source, and SourceUnavailable when the disk fails."""
        # One's bad token is not another's error, nor are the words in which one named the adapter.
        caller = hashlib.sha256(f"{api_token or ''}\0{snapshot.shown_id}".encode(errors="surrogatepass")).digest()
        for _ in range(_NUM_ATTEMPTS):
            digest = _digest(snapshot)
            with explain_disk_errors():
                if found := self.find(snapshot):
                    return found
            try:
                return self._once(digest, partial(self._bring, source, snapshot, digest, api_token, progress), caller)
            except SourceChanged as error:
                changed = error
                snapshot = source.snapshot(snapshot.asked_id or snapshot.shown_id, revision=snapshot.revision, api_token=api_token)
        raise changed

    def verify(self, stored: StoredAdapter) -> bool:
        """Whether the bytes on disk are still those of the hash; for use when an adapter fails to load. A damaged object is removed
        with its packs, so that the next `materialize` fetches it again."""
        try:
            if hash_adapter(stored.path, stored.snapshot.names) == stored.hash:
                return True
        except (OSError, AdapterRefused) as error:
            logger.error("adapter store: %s cannot be read: %s", stored.hash, error)
        with explain_disk_errors():
            (self._index / f"{_digest(stored.snapshot)}.json").unlink(missing_ok=True)
            if stored.snapshot.folder is None:
                logger.error("adapter store: %s is damaged and was removed", stored.hash)
                self._staging.take_away(self._objects / stored.hash)
                self.discard_packs(stored.hash)  # what is in use was made of it when it was whole
        return False

    def check_unchanged(self, stored: StoredAdapter) -> None:
        """SourceChanged if the files are those of a folder read in place, and no longer those of the hash."""
        with explain_disk_errors():
            _check_still(stored)

    def pack_path(self, adapter_hash: str, key: str) -> Path:
        """Where the pack of an adapter for `key` (base fingerprint, dtype) is once it is published."""
        if not _HASH.fullmatch(adapter_hash) or not _PACK_KEY.fullmatch(key):
            raise ValueError(f"not a pack's name: {adapter_hash!r}, {key!r}")
        return self._packs / f"{adapter_hash}-{key}.pack"

    def publish_pack(self, adapter_hash: str, key: str, writer: Callable[[Path], object], of: StoredAdapter | None = None) -> Path:
        """The pack's path; `writer` makes the file at the path that it is given, unless it exists. Its errors pass through.

        `of`: what the writer reads. If that is a folder read in place and it changed meanwhile, nothing is published: SourceChanged."""
        path = self.pack_path(adapter_hash, key)
        with explain_disk_errors():
            known = mark_used(path)
        if not known:
            # Other adapters may have the same hash: whether this one changed meanwhile is for those alone who asked for it.
            reader = f"{of.snapshot.source}\0{of.snapshot.shown_id}".encode() if of is not None else b""
            self._once(path.name, partial(self._write_pack, path, writer, of), reader)
        return path

    def discard_packs(self, adapter_hash: str, *, damaged: bool = False, idle_s: float = 0.0) -> bool:
        """Remove an adapter's packs, unless they are pinned or were used within `idle_s`; whether none is left. `damaged`: also when
        pinned, nobody can use them."""
        if self.is_pinned(adapter_hash) and not damaged:
            return False
        with explain_disk_errors():
            return all([self._space.discard(path, idle_s) for path in self._packs.glob(f"{adapter_hash}-*.pack")])

    def pin(self, adapter_hash: str) -> None:
        """Keep this adapter's files and packs, against this process's evictions."""
        self._space.pin(adapter_hash)

    def unpin(self, adapter_hash: str) -> None:
        """Undo one `pin`."""
        self._space.unpin(adapter_hash)

    def is_pinned(self, adapter_hash: str) -> bool:
        """Whether anybody in this process keeps it."""
        return self._space.is_pinned(adapter_hash)

    @contextmanager
    def pinned(self, adapter_hash: str) -> Iterator[None]:
        """`pin` for a while."""
        self.pin(adapter_hash)
        try:
            yield
        finally:
            self.unpin(adapter_hash)

    def _once(self, name: str, work: Callable[[], T], key: bytes = b"") -> T:
        """Run `work` once among this process's threads with the same key, and one at a time among all processes."""

        def locked() -> T:
            with explain_disk_errors(), file_lock(self._locks / f"{name}.lock", self._lock_wait_s):
                return work()

        return self._flights.run((name, key), locked)

    def _bring(self, source: Source, snapshot: Snapshot, digest: str, api_token: str | None, progress: Progress | None) -> StoredAdapter:
        if found := self.find(snapshot):  # fetched by another process while we waited for the lock
            return found
        if snapshot.folder is not None:
            stored = _hash_in_place(snapshot, snapshot.folder)
        else:
            stored = self._fetch(source, snapshot, api_token, progress)
        if snapshot.settled:
            self._remember(stored, digest)
        return stored

    def _fetch(self, source: Source, snapshot: Snapshot, api_token: str | None, progress: Progress | None) -> StoredAdapter:
        self._space.reserve(snapshot.size_bytes)
        started_at = time.monotonic()
        with self._staging.open() as folder:
            source.fetch(snapshot, folder, api_token, progress)
            _check_complete(snapshot, folder)
            adapter_hash = hash_adapter(folder, snapshot.names)
            path = self._objects / adapter_hash
            if publish_folder(folder, path):
                self._space.add(snapshot.size_bytes)
            mark_used(path)
        logger.info("fetched adapter %r: %d bytes in %.2f s", snapshot.adapter_id, snapshot.size_bytes, time.monotonic() - started_at)
        return StoredAdapter(adapter_hash, path, snapshot.size_bytes, snapshot, fresh=True)

    def _write_pack(self, path: Path, writer: Callable[[Path], object], of: StoredAdapter | None) -> None:
        if mark_used(path):
            return
        self._space.reserve(of.bytes if of is not None else 0)
        with self._staging.open() as folder:
            try:
                writer(folder / path.name)
            except Exception:
                if of is not None:
                    _check_still(of)  # a folder that is being written to explains any error
                raise
            if of is not None:
                _check_still(of)
            publish_file(folder / path.name, path)
        self._space.add(path.stat().st_size)

    def find(self, snapshot: Snapshot) -> StoredAdapter | None:
        """What the index knows, if it is still there. Its files are not looked at."""
        if not snapshot.settled:
            return None
        entry = self._index / f"{_digest(snapshot)}.json"
        try:
            known = json.loads(entry.read_bytes())
            adapter_hash, size_bytes = known["hash"], known["bytes"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):  # not ours, or damaged: as if it were not there
            return None
        if not isinstance(adapter_hash, str) or not _HASH.fullmatch(adapter_hash) or not isinstance(size_bytes, int):
            return None
        path = snapshot.folder or self._objects / adapter_hash
        if snapshot.folder is None and not mark_used(path):
            return None
        mark_used(entry)
        return StoredAdapter(adapter_hash, path, size_bytes, snapshot)

    def _remember(self, stored: StoredAdapter, digest: str) -> None:
        known = {"hash": stored.hash, "bytes": stored.bytes, "source": stored.snapshot.source, "adapter_id": stored.snapshot.adapter_id}
        with self._staging.open() as folder:
            file = folder / "entry"
            file.write_text(json.dumps(known))
            publish_file(file, self._index / f"{digest}.json")

    def _tidy(self) -> None:
        """Remove what crashes and time left behind. Never a reason not to start."""
        with suppress(OSError):
            num_removed = self._staging.sweep()
            if num_removed:
                logger.info("adapter store: removed %d leftovers", num_removed)
            for folder, keep_s in ((self._index, _INDEX_KEEP_S), (self._locks, LEFTOVER_S)):
                for path in folder.iterdir():
                    with suppress(FileNotFoundError):
                        if time.time() - path.stat().st_mtime > keep_s:
                            path.unlink()


def _digest(snapshot: Snapshot) -> str:
    """The name of (source, id, version) in the index."""
    return hashlib.sha256(json.dumps([snapshot.source, snapshot.adapter_id, snapshot.version]).encode()).hexdigest()


def _hash_in_place(snapshot: Snapshot, folder: Path) -> StoredAdapter:
    """Hash a folder that others may write to: the files must be the snapshot's before and after."""
    _check_unchanged(snapshot, folder)
    try:
        adapter_hash = hash_adapter(folder, snapshot.names)
    except AdapterRefused:
        _check_unchanged(snapshot, folder)  # a half-written config is no reason to refuse the whole one
        raise
    except FileNotFoundError as error:
        raise SourceChanged(snapshot) from error
    _check_unchanged(snapshot, folder)
    if snapshot.hash not in (None, adapter_hash):
        raise AdapterRefused(f"Adapter '{snapshot.shown_id}': its files are not what was published; publish it again")
    return StoredAdapter(adapter_hash, folder, snapshot.size_bytes, snapshot)


def _check_unchanged(snapshot: Snapshot, folder: Path) -> None:
    try:
        unchanged = stat_signature(folder, snapshot.names) == snapshot.version
    except FileNotFoundError:
        unchanged = False
    if not unchanged:
        raise SourceChanged(snapshot)


def _check_still(stored: StoredAdapter) -> None:
    """SourceChanged if a folder read in place holds other bytes by now than those of the hash."""
    snapshot = stored.snapshot
    if snapshot.folder is None:
        return
    _check_unchanged(snapshot, snapshot.folder)
    if not snapshot.settled and _hash_in_place(snapshot, snapshot.folder).hash != stored.hash:
        raise SourceChanged(snapshot)


def _check_complete(snapshot: Snapshot, folder: Path) -> None:
    """Exactly the listed files with the listed sizes. SourceUnavailable if the transfer lost something."""
    found = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file() and not path.is_symlink()}
    for file in snapshot.files:
        if found.get(file.name) != file.size_bytes:
            raise SourceUnavailable(
                f"Adapter '{snapshot.shown_id}': {file.name} arrived with {found.get(file.name, 0)} of {file.size_bytes} bytes; try again"
            )
    if strangers := sorted(os.listdir(folder) - found.keys() | found.keys() - set(snapshot.names)):
        raise SourceUnavailable(f"Adapter '{snapshot.shown_id}': unexpected file {ascii(strangers[0])}")
