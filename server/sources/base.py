"""What a source of adapters is: the protocol, what it answers with, and the options that settings give.

Owns the vocabulary of this package. It does not know any single source, nor the store that calls them.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from server.errors import AdapterNotFound, SourceUnavailable, ValidationFailed

Progress = Callable[[int, int], None]  # bytes fetched so far, bytes in all


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What a deployer says about sources. Whatever is not allowed here cannot be reached by any request."""

    adapters_dir: Path | None = None  # root of `local`; None turns it off
    allowed_buckets: tuple[str, ...] = ()  # "bucket" or "bucket/prefix"
    model_bucket: str | None = None  # where ids without a bucket live (LoRAX's PREDIBASE_MODEL_BUCKET); allowed by itself
    model_folder: str | None = None  # below model_bucket (LoRAX's PREDIBASE_MODEL_FOLDER)
    s3_endpoint_url: str | None = None
    s3_region: str | None = None
    hub_enabled: bool = False
    hub_endpoint: str = "https://huggingface.co"
    allowed_hub_owners: tuple[str, ...] = ()  # "*" is any owner
    link_bounds: Callable[[str], Sequence[str]] = lambda place: ()  # places of `local` that links of what is at `place` must not leave
    max_adapter_bytes: int = 2 << 30
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 20.0
    num_retries: int = 3


@dataclass(frozen=True)
class SourceFile:
    """A file of an adapter as its source lists it; `version` is the source's own name for these bytes, if it has one."""

    name: str
    size_bytes: int
    version: str = ""


@dataclass(frozen=True)
class Snapshot:
    """An adapter's exact bytes, named but not fetched.

    `folder`: the files may be read in place there, and `version` is then `content.stat_signature(folder, names)`;
    None: they must be fetched."""

    source: str
    adapter_id: str  # canonical: equal ids name the same place
    version: str  # opaque; other bytes have another version
    files: tuple[SourceFile, ...]
    revision: str | None = None  # as it was asked for
    folder: Path | None = None
    given_id: str = ""  # as the caller wrote it: messages name no bucket or prefix that the caller did not
    asked_id: str = ""  # what its source is asked again by, where that is not `shown_id`
    hash: str | None = None  # what the bytes must be, if it is known; for folders read in place
    settled: bool = True  # False: so fresh that a further write could still get the same version; must not be remembered

    @property
    def shown_id(self) -> str:
        """The id for messages."""
        return self.given_id or self.adapter_id

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(file.size_bytes for file in self.files)

    @property
    def names(self) -> tuple[str, ...]:
        """The files' names."""
        return tuple(file.name for file in self.files)


class Source(Protocol):
    """A place that adapters come from. Blocking, safe to call from many threads; holds nothing of any one request.

    Errors of both calls: ValidationFailed (the id or revision cannot be one), AdapterNotFound, AdapterRefused, SourceUnavailable."""

    name: str

    def snapshot(self, adapter_id: str, *, revision: str | None = None, api_token: str | None = None) -> Snapshot:
        """What the id names now, in one or two cheap calls. Whether this caller may read it is decided here, on every request;
        `api_token` is the caller's own and only sources that authenticate callers (the hub) look at it."""
        ...

    def place(self, adapter_id: str) -> str:
        """Where the id points, as a path in this source's own terms (folder, bucket/key, owner/name), without asking anybody: so that what
        a caller may reach can be said as beginnings of places. ValidationFailed if the id cannot be one."""
        ...

    def spelling(self, adapter_id: str) -> str:
        """The one id that is kept for the place that `adapter_id` names, however it is written; the id of its own spelling. It names no
        bucket or prefix that the caller need not know. ValidationFailed as `place`."""
        ...

    def fetch(self, snapshot: Snapshot, into: Path, api_token: str | None = None, progress: Progress | None = None) -> None:
        """Write exactly the snapshot's files into the empty folder `into`. SourceChanged if the source holds other bytes by now."""
        ...

    def adapter_ids(self, limit: int) -> list[str]:
        """At most `limit` ids that `snapshot` would look at now, sorted; empty where a place cannot be listed (the hub)."""
        ...


class SourceChanged(SourceUnavailable):
    """The bytes behind a snapshot were replaced before they were read. The store takes a new snapshot and tries again."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(f"Adapter '{snapshot.shown_id}' changed in source '{snapshot.source}' while it was read; try again")


class TooSlow(Exception):
    """A transfer brings next to nothing."""


class Tally:
    """Counts fetched bytes over the files of one fetch and reports them. TooSlow from `add` if in a whole `window_s` less than
    MIN_BYTES_S a second came: a source that drips is as good as silent, and would hold a thread for days."""

    MIN_BYTES_S = 16 << 10

    def __init__(self, snapshot: Snapshot, progress: Progress | None, window_s: float = math.inf) -> None:
        self._done_bytes = 0
        self._total_bytes = snapshot.size_bytes
        self._progress, self._window_s = progress, window_s
        self.begin()

    def begin(self) -> None:
        """A transfer begins (again): its speed is judged from now on."""
        self._window_at, self._window_bytes = time.monotonic(), 0

    def add(self, num_bytes: int) -> None:
        """`num_bytes` more arrived; fewer than 0 when a file is started again."""
        self._done_bytes += num_bytes
        self._window_bytes += max(0, num_bytes)
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)
        elapsed_s = time.monotonic() - self._window_at
        if num_bytes > 0 and elapsed_s > self._window_s:
            is_slow = self._window_bytes < self.MIN_BYTES_S * elapsed_s
            self.begin()
            if is_slow:
                raise TooSlow


def not_found(source: str, adapter_id: str, why: str = "") -> AdapterNotFound:
    """The one wording for "there is none" and "not for you", so that a caller cannot tell which names exist."""
    return AdapterNotFound(f"Adapter '{adapter_id}' was not found in source '{source}'{why and ': ' + why}", param="adapter_id")


def unavailable(source: str, why: str) -> SourceUnavailable:
    """The source failed for now; `why` is short and holds no address, path or token."""
    return SourceUnavailable(f"Source '{source}' is unavailable: {why}; try again")


def source_off(source: str, needed: str) -> ValidationFailed:
    """This server does not read from that source; `needed` names the setting that would allow it."""
    return ValidationFailed(f"Source '{source}' is off on this server ({needed})", param="adapter_source")


def refuse_revision(source: str, revision: str | None) -> None:
    """For sources without revisions. ValidationFailed if one is asked for."""
    if revision is not None:
        raise ValidationFailed(f"`revision` is not allowed: source '{source}' has no revisions", param="revision")


def log_hidden_reason(logger: logging.Logger, adapter_id: str, reason: object) -> None:
    """For the operator what the caller is not told."""
    logger.warning("adapter %r: %s", adapter_id, reason)


def raise_invalid(adapter_id: str, why: str) -> NoReturn:
    """ValidationFailed for an id that cannot name an adapter."""
    shown = ascii(adapter_id[:120])
    raise ValidationFailed(f"`adapter_id` {shown} is not valid: {why}", param="adapter_id")
