"""Weights of published names: immutable folders on the shared file system; and the sources as requests see them, names first.

    objects/HASH/    the files of an adapter that was published, for every server of the fleet

Owns that folder. What a name means is api.registry's; fetching, hashing and packing are the store's, which reads these folders in place.
"""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from server.api.names import owner_of, shown
from server.api.registry import Registry
from server.errors import SourceUnavailable
from server.sources import Progress, Snapshot, Source, SourceChanged, Sources, StoredAdapter, canonical_name
from server.sources.base import not_found, refuse_revision
from server.sources.content import hash_adapter, list_folder, stat_signature
from server.sources.disk import Staging, explain_disk_errors, publish_folder
from server.sources.selection import select_files
from server.sources.space import mark_used

_KEEP_S = 3600.0  # a server that has not yet seen a change may still look for what no name means any more


class PublishedWeights:
    """The folders below `root`/objects. All calls block."""

    name = "published"

    def __init__(self, root: Path) -> None:
        self._objects = root / "objects"
        for folder in (self._objects, root / "staging"):
            folder.mkdir(parents=True, exist_ok=True)
        self._staging = Staging(root / "staging")
        with suppress(OSError):
            self._staging.sweep()

    def keep(self, stored: StoredAdapter) -> None:
        """Copy an adapter here, unless its content is here. SourceChanged if it is a folder that was written to meanwhile."""
        target = self._objects / stored.hash
        with explain_disk_errors():
            if self.hold(stored.hash):
                return
            with self._staging.open() as folder:
                try:
                    for name in stored.snapshot.names:
                        shutil.copyfile(stored.path / name, folder / name)
                except FileNotFoundError:
                    raise SourceChanged(stored.snapshot) from None
                if hash_adapter(folder, stored.snapshot.names) != stored.hash:
                    raise SourceChanged(stored.snapshot)
                publish_folder(folder, target)

    def hold(self, adapter_hash: str) -> bool:
        """Whether it is here; if so, `prune` leaves it for an hour."""
        return mark_used(self._objects / adapter_hash)

    def snapshot(self, adapter_hash: str, name: str) -> Snapshot:
        """The files of a published hash, for the name that a request gave. SourceUnavailable if they are gone."""
        folder = self._objects / adapter_hash
        try:
            files = select_files(name, list_folder(folder, name), None)
            version = stat_signature(folder, [file.name for file in files])
        except OSError as error:
            raise SourceUnavailable(f"Adapter '{name}': its published weights cannot be read ({os.strerror(error.errno or 5)})") from None
        return Snapshot(self.name, adapter_hash, version, files, folder=folder, given_id=name, hash=adapter_hash)

    def prune(self, in_use: Callable[[], set[str]]) -> int:
        """Remove what no name has meant for an hour; the number of folders removed. `in_use` is asked after the folders were listed."""
        found = [path for path in self._objects.iterdir() if _is_idle(path)]
        wanted, num_removed = in_use(), 0
        for path in found:
            if path.name not in wanted and _is_idle(path):  # looked at again: another server may hold it by now, to publish it
                self._staging.take_away(path)
                num_removed += 1
        return num_removed


def _is_idle(path: Path) -> bool:
    """Whether nobody held it in the last hour; False too if it is gone."""
    try:
        return time.time() - path.stat().st_mtime > _KEEP_S
    except FileNotFoundError:  # another server was faster
        return False


class OneVersion:
    """A published hash as a Source, for packing it before any name means it."""

    name = PublishedWeights.name

    def __init__(self, weights: PublishedWeights, adapter_hash: str) -> None:
        self._weights, self._hash = weights, adapter_hash

    def snapshot(self, adapter_id: str, *, revision: str | None = None, api_token: str | None = None) -> Snapshot:
        """See Source; the id is only what messages call it."""
        return self._weights.snapshot(self._hash, shown(adapter_id))

    def place(self, adapter_id: str) -> str:
        """See Source."""
        return adapter_id

    def spelling(self, adapter_id: str) -> str:
        """See Source."""
        return adapter_id

    def fetch(self, snapshot: Snapshot, into: Path, api_token: str | None = None, progress: Progress | None = None) -> None:
        """See Source; it is read in place."""
        raise SourceUnavailable(f"Adapter '{snapshot.shown_id}': its published weights are read in place")

    def adapter_ids(self, limit: int) -> list[str]:
        """See Source; it has no ids of its own."""
        return []


class NamesFirst:
    """The default source as requests see it: a published name before an id, a deleted one not at all. A Source."""

    def __init__(self, sources: Sources, registry: Registry, weights: PublishedWeights) -> None:
        self._sources, self._registry, self._weights = sources, registry, weights
        self.name = registry.default_source

    def snapshot(self, adapter_id: str, *, revision: str | None = None, api_token: str | None = None) -> Snapshot:
        """See Source."""
        entry = self._registry.entry(adapter_id)
        if entry.deleted or (entry.version is None and owner_of(adapter_id)):
            raise not_found(self.name, shown(adapter_id))
        if entry.version is None:
            return self._sources.get(self.name).snapshot(adapter_id, revision=revision, api_token=api_token)
        refuse_revision(self.name, revision)
        return replace(self._weights.snapshot(entry.version.hash, shown(adapter_id)), asked_id=adapter_id)

    def place(self, adapter_id: str) -> str:
        """See Source; of an id that is no published name."""
        return self._sources.get(self.name).place(adapter_id)

    def spelling(self, adapter_id: str) -> str:
        """See Source; of an id that is no published name."""
        return self._sources.get(self.name).spelling(adapter_id)

    def fetch(self, snapshot: Snapshot, into: Path, api_token: str | None = None, progress: Progress | None = None) -> None:
        """See Source; published weights are read in place and never come here."""
        self._sources.get(self.name).fetch(snapshot, into, api_token, progress)

    def adapter_ids(self, limit: int) -> list[str]:
        """The source's own ids; Registry.listed says what requests may name."""
        return self._sources.get(self.name).adapter_ids(limit)


class NamedSources(Sources):
    """Sources whose default one is NamesFirst. `raw` are those without names: what is published is read from them."""

    def __init__(self, raw: Sources, registry: Registry, weights: PublishedWeights) -> None:
        self.raw = raw
        self._default = NamesFirst(raw, registry, weights)

    def get(self, name: str) -> Source:
        """See Sources."""
        return self._default if canonical_name(name) == self._default.name else self.raw.get(name)
