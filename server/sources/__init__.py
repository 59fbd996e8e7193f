"""Where adapters come from. Owns the registry of sources: adding one is a file with a class and a line here.

Called by the API, which asks for a source by its name and hands it to the store.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from server.errors import ValidationFailed
from server.sources.base import Progress, Snapshot, Source, SourceChanged, SourceFile, SourceOptions
from server.sources.hub import HubSource
from server.sources.local import LocalSource
from server.sources.s3 import S3Source
from server.sources.store import Store, StoredAdapter

__all__ = [
    "FACTORIES",
    "Progress",
    "Snapshot",
    "Source",
    "SourceChanged",
    "SourceFile",
    "SourceOptions",
    "Sources",
    "Store",
    "StoredAdapter",
    "canonical_name",
]

FACTORIES: dict[str, Callable[[SourceOptions], Source]] = {source.name: source for source in (HubSource, LocalSource, S3Source)}


def canonical_name(name: str) -> str:
    """A source's name as the registry has it; case does not matter (LoRAX). ValidationFailed, listing the names, if there is none."""
    folded = name.lower()
    if folded in FACTORIES:
        return folded
    allowed = ", ".join(f"'{known}'" for known in sorted(FACTORIES))
    if folded == "pbase":
        raise ValidationFailed(f"Source 'pbase' (Predibase's service) is not served here; allowed are {allowed}", param="adapter_source")
    raise ValidationFailed(f"Invalid source {ascii(name[:64])}; allowed are {allowed}", param="adapter_source")


class Sources:
    """The sources of one server, each made when it is first asked for. Safe to call from many threads."""

    def __init__(self, options: SourceOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._made: dict[str, Source] = {}

    def bound_links(self, link_bounds: Callable[[str], Sequence[str]]) -> None:
        """See SourceOptions.link_bounds. Before any source is asked."""
        self._options = replace(self._options, link_bounds=link_bounds)

    def get(self, name: str) -> Source:
        """The source of that name. ValidationFailed if there is none or if it is off on this server."""
        name = canonical_name(name)
        with self._lock:
            if name not in self._made:
                self._made[name] = FACTORIES[name](self._options)
            return self._made[name]
