"""Adapters in a folder of this machine (in production the file system that all instances mount). Owns containment.

An id is a path below `adapters_dir`. Nothing is copied unless the folder also holds weights that are not the adapter's.
"""

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.errors import AdapterRefused
from server.sources.base import (
    Progress,
    Snapshot,
    SourceChanged,
    SourceOptions,
    Tally,
    log_hidden_reason,
    not_found,
    refuse_revision,
    source_off,
    unavailable,
)
from server.sources.content import is_settled, list_folder, stat_signature
from server.sources.ids import split_id
from server.sources.selection import select_files, weights_in

logger = logging.getLogger(__name__)


class LocalSource:
    """The folders below one root."""

    name = "local"

    def __init__(self, options: SourceOptions) -> None:
        if options.adapters_dir is None:
            raise source_off(self.name, "adapters-dir is not set")
        self._root = options.adapters_dir
        self._link_bounds = options.link_bounds
        self._max_bytes = options.max_adapter_bytes

    def snapshot(self, adapter_id: str, *, revision: str | None = None, api_token: str | None = None) -> Snapshot:
        """See Source. The version is the stat signature of the adapter's files."""
        refuse_revision(self.name, revision)
        segments = split_id(adapter_id)
        with self._explain(adapter_id):
            folder = self._contained(adapter_id, segments)
            listing = list_folder(folder, adapter_id)
            files = select_files(adapter_id, listing, self._max_bytes)
            names = [file.name for file in files]
            for name in names:
                if os.path.islink(folder / name):  # the folder itself is where it should be, and so is all else in it
                    self._check_inside(adapter_id, folder / name)
            version = stat_signature(folder, names)
            settled = is_settled(folder, names)  # after it: a write between the two must not look settled
        # Whoever reads the folder takes every *.safetensors in it: with foreign ones beside the adapter's it is copied without them.
        in_place = weights_in(file.name for file in listing) == weights_in(names)
        return Snapshot(self.name, adapter_id, version, files, folder=folder if in_place else None, settled=settled)

    def place(self, adapter_id: str) -> str:
        """See Source: the path below adapters_dir."""
        return "/".join(split_id(adapter_id))

    def spelling(self, adapter_id: str) -> str:
        """See Source: split_id takes an id in one way alone."""
        return self.place(adapter_id)

    def fetch(self, snapshot: Snapshot, into: Path, api_token: str | None = None, progress: Progress | None = None) -> None:
        """See Source. Copies; noticed if a file changes meanwhile."""
        tally = Tally(snapshot, progress)
        with self._explain(snapshot.adapter_id):
            folder = self._contained(snapshot.adapter_id, split_id(snapshot.adapter_id))
        for file in snapshot.files:
            try:
                shutil.copyfile(folder / file.name, into / file.name)
            except FileNotFoundError as error:
                raise SourceChanged(snapshot) from error
            tally.add(file.size_bytes)
        with self._explain(snapshot.adapter_id):
            if stat_signature(folder, snapshot.names) != snapshot.version:
                raise SourceChanged(snapshot)

    def adapter_ids(self, limit: int) -> list[str]:
        """See Source. Folders with an adapter_config.json; hidden ones and links to folders are not walked."""
        found: list[str] = []
        with self._explain(""):
            for folder, names, files in os.walk(self._root):
                names[:] = sorted(name for name in names if not name.startswith("."))
                if "adapter_config.json" in files and Path(folder) != self._root:
                    found.append(Path(folder).relative_to(self._root).as_posix())
                    if len(found) == limit:
                        break
        return sorted(found)

    def _contained(self, adapter_id: str, segments: list[str]) -> Path:
        """The real folder behind the id. AdapterRefused if links lead out of the root, or out of a place that the id is bound to."""
        if not self._root.is_dir():
            logger.error("the adapters' folder is missing; is the file system mounted?")
            raise unavailable(self.name, "the adapters' folder is missing")
        return self._check_inside(adapter_id, self._root.joinpath(*segments))

    def _check_inside(self, adapter_id: str, path: Path) -> Path:
        real = path.resolve()  # also of what is not there: where a link leads is refused alike, whether there is something or not
        if not real.is_relative_to(self._root.resolve()):
            log_hidden_reason(logger, adapter_id, "a symbolic link leads out of the adapters' folder")
            raise AdapterRefused(f"Adapter '{adapter_id}' leaves the adapters' folder through a symbolic link")
        for bound in self._link_bounds(adapter_id):
            if not real.is_relative_to(self._root.joinpath(bound).resolve()):
                log_hidden_reason(logger, adapter_id, f"a symbolic link leads out of {bound!r}, a place of the tenants file")
                raise AdapterRefused(f"Adapter '{adapter_id}' leaves the place of its tenant through a symbolic link")
        return real

    @contextmanager
    def _explain(self, adapter_id: str) -> Iterator[None]:
        """File system errors as the caller may see them."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                raise not_found(self.name, adapter_id) from error
            log_hidden_reason(logger, adapter_id, error)
            if error.errno in (errno.EACCES, errno.EPERM, errno.ELOOP):
                raise not_found(self.name, adapter_id) from error
            raise unavailable(self.name, os.strerror(error.errno or errno.EIO)) from error
        except RuntimeError as error:  # what Path.resolve makes of a loop of links before Python 3.13
            raise not_found(self.name, adapter_id) from error
