"""A file system that does not answer, or fails: what this process asks of paths below a folder waits, or raises, until it is over."""

import builtins
import errno
import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_CALLS = ("stat", "lstat", "open", "scandir", "listdir", "utime", "replace", "rename", "mkdir", "unlink")


class Stall:
    """`folder` as an NFS mount whose server is away. `num_waiting`: threads that hang in it now, as they would in the kernel."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._prefix, self._answers, self._error = str(folder), threading.Event(), 0
        self._answers.set()
        self.num_waiting = 0
        for module, name in [*((os, name) for name in _CALLS), (io, "open"), (builtins, "open")]:
            monkeypatch.setattr(module, name, self._wrap(getattr(module, name)))

    def _wrap(self, call):
        def asked(path, *rest, **options):
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._prefix):
                self._ask()
            return call(path, *rest, **options)

        return asked

    def _ask(self) -> None:
        if self._error:
            raise OSError(self._error, os.strerror(self._error))
        if not self._answers.is_set():
            self.num_waiting += 1
            self._answers.wait(60)
            self.num_waiting -= 1

    @contextmanager
    def hangs(self) -> Iterator[None]:
        """Nothing is answered."""
        self._answers.clear()
        try:
            yield
        finally:
            self._answers.set()

    @contextmanager
    def fails(self, error: int = errno.EIO) -> Iterator[None]:
        """Everything is answered with an error."""
        self._error = error
        try:
            yield
        finally:
            self._error = 0
