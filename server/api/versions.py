"""The versions of a published name: the one that answers, and those before it that can answer again.

Pure functions from a registry's entry to the next one; api.publishing runs them under the registry's lock and carries out what follows.
"""

import msgspec

from server.api.names import shown
from server.api.registry import Entry, Version
from server.errors import AdapterNotFound, Conflict

MAX_KEPT = 5  # versions before the current one whose weights stay on the shared file system


def published(before: Entry, version: Version, now: int, pin: bool | None) -> Entry:
    """The entry once `version` is published; it gets the name's next number. The same weights again are no new version."""
    pinned = before.pinned if pin is None else pin
    if before.version is not None and before.version.hash == version.hash:
        return msgspec.structs.replace(before, pinned=pinned)
    number = before.last_number + 1
    past = (*before.past, before.version)[-MAX_KEPT:] if before.version is not None else ()
    return msgspec.structs.replace(
        before, changed=now, version=msgspec.structs.replace(version, number=number), deleted=False, pinned=pinned, last_number=number,
        past=past,
    )  # fmt: skip


def to_return_to(name: str, entry: Entry) -> Version:
    """The version before the current one. AdapterNotFound if the name is not published, Conflict if no version before it is kept."""
    if entry.version is None:
        raise AdapterNotFound(f"Adapter '{shown(name)}' is not published, so it has no versions")
    if not entry.past:
        raise Conflict(
            f"`name` '{shown(name)}' has no version before {entry.version.number}: publish what it should answer with", param="name"
        )
    return entry.past[-1]


def rolled_back(name: str, before: Entry, version: Version, now: int) -> Entry:
    """The entry once the version before answers again, under its own number. Conflict if another order came in between."""
    if to_return_to(name, before) != version:
        raise Conflict(f"`name` '{shown(name)}' was given another version meanwhile; look, and try again", param="name")
    return msgspec.structs.replace(before, changed=now, version=version, past=before.past[:-1])
