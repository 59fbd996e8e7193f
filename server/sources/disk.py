"""How the store writes: into a staging place first, then renamed to where readers look, so that a reader sees all of it or nothing.

Owns staging, syncing, what is left over after a crash, and the words for a disk that is full. It does not know what it writes.
"""

import errno
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from server.errors import SourceUnavailable
from server.sources.flight import try_lock

logger = logging.getLogger(__name__)

LEFTOVER_S = 3600.0  # by then a staging place without an owner is rubbish, also where the file system has no locks to tell


class Staging:
    """Places to write in, on the same file system as their target. Each is locked by its owner for as long as that lives."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def open(self) -> Iterator[Path]:
        """An empty folder of our own, gone at the end with all that was not renamed out of it."""
        place = self._root / uuid.uuid4().hex
        place.mkdir()
        owner = None
        try:
            with suppress(OSError):  # without locks its age alone protects it
                owner = try_lock(place / "lock")
            folder = place / "files"
            folder.mkdir()
            yield folder
        finally:
            if owner is not None:
                os.close(owner)  # before the removal: NFS keeps a name for a removed file that is still open
            shutil.rmtree(place, ignore_errors=True)

    def take_away(self, path: Path) -> None:
        """Remove a published file or folder: gone for readers at once, for those who have it open when they close it."""
        grave = self._root / uuid.uuid4().hex
        try:
            os.rename(path, grave)
        except FileNotFoundError:
            return
        if grave.is_dir():
            shutil.rmtree(grave, ignore_errors=True)
        else:
            grave.unlink(missing_ok=True)

    def sweep(self, older_than_s: float = LEFTOVER_S) -> int:
        """Remove what owners that died left behind; the number of places removed."""
        num_removed = 0
        for place in list(self._root.iterdir()):
            with suppress(FileNotFoundError):
                if time.time() - _touched_at(place) > older_than_s and not _is_owned(place):
                    shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink()
                    num_removed += 1
        return num_removed


def publish_folder(folder: Path, target: Path) -> bool:
    """Rename a staged folder to `target`. False if it exists: somebody published the same content first and ours is not needed."""
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    _sync(target.parent)
    return True


def publish_file(file: Path, target: Path) -> None:
    """Rename a staged file over `target`."""
    _sync(file)
    os.replace(file, target)
    _sync(target.parent)


@contextmanager
def explain_disk_errors() -> Iterator[None]:
    """The store's own OSErrors as SourceUnavailable, without the path; everything else passes."""
    try:
        yield
    except OSError as error:
        logger.error("adapter store: %s", error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SourceUnavailable("The adapter store's disk is full; nothing was kept of this adapter") from error
        raise SourceUnavailable(f"The adapter store failed: {os.strerror(error.errno or errno.EIO)}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _touched_at(place: Path) -> float:
    """When anything in the place last changed."""
    inside = place.rglob("*") if place.is_dir() else ()
    return max(path.lstat().st_mtime for path in (place, *inside))


def _is_owned(place: Path) -> bool:
    lock = place / "lock"
    if not lock.exists():
        return False
    try:
        descriptor = try_lock(lock)
    except OSError:
        return False
    if descriptor is None:
        return True
    os.close(descriptor)
    return False
