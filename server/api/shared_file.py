"""One small document on the file system that a fleet shares: replaced as a whole by rename, numbered by its generation.

Owns the file, its lock and its reading. It does not know what the document says. Both calls block: their users run them in threads.
A reader opens the file by its name each time: on NFS (EFS) that asks the server, where looking at a cached directory would not.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import msgspec

from server.errors import Unavailable
from server.sources.disk import Staging, publish_file
from server.sources.flight import file_lock

_LOCK_WAIT_S = 10.0  # a writer holds it for some milliseconds


class Numbered(Protocol):
    """A document: a msgspec struct with a generation that grows by one with every change, by whomever."""

    @property
    def generation(self) -> int:
        """0 is the document that nobody wrote yet."""
        ...


Document = TypeVar("Document", bound=Numbered)


class SharedFile(Generic[Document]):
    """The document at `path` (JSON). `empty` is what it says while there is no such file. Safe to use from several threads."""

    def __init__(self, path: Path, empty: Document) -> None:
        self._path, self._empty = path, empty
        self._decoder = msgspec.json.Decoder(type(empty))
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "staging").mkdir(exist_ok=True)
        self._staging = Staging(path.parent / "staging")
        self._seen: tuple[int, int, int] | None = None  # inode, mtime and size of what was read last

    def read(self) -> Document:
        """The document as it is now. OSError; ValueError if the file is not one of ours."""
        try:
            raw = self._path.read_bytes()
        except FileNotFoundError:
            return self._empty
        return self._decode(raw)

    def read_if_changed(self) -> Document | None:
        """As `read`; None if the file is the one of the last call."""
        try:
            with self._path.open("rb") as file:
                facts = os.fstat(file.fileno())
                seen = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
                if seen == self._seen:
                    return None
                raw = file.read()
        except FileNotFoundError:
            return None
        self._seen = seen
        return self._decode(raw)

    def update(self, change: Callable[[Document], Document], known_generation: int) -> Document:
        """Write what `change` makes of the current document, one writer of the fleet at a time; returns what was written.

        `change` must give the generation that it is told: one more than the file's and than `known_generation`, so that a file that was
        put back by hand cannot look older than what this process has seen. Its errors pass. Unavailable if the lock cannot be had."""
        with file_lock(self._path.with_suffix(".lock"), _LOCK_WAIT_S) as held:
            if not held:
                raise Unavailable("the registry is busy, or its file system has no locks; nothing was changed", retry_after_s=1.0)
            current = self.read()
            if current.generation < known_generation:
                current = msgspec.structs.replace(current, generation=known_generation)  # type: ignore[type-var]
            changed = change(current)
            if changed is current:
                return current
            with self._staging.open() as folder:
                file = folder / self._path.name
                file.write_bytes(msgspec.json.format(msgspec.json.encode(changed), indent=1))
                publish_file(file, self._path)
            return changed

    def _decode(self, raw: bytes) -> Document:
        try:
            return self._decoder.decode(raw)
        except msgspec.MsgspecError as error:
            raise ValueError(f"{self._path} is not a registry of this version: {error}") from None
