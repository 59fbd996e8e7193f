"""Run as a program by test_disk, on a file system of one megabyte: the store and the registry when it is full.

python -m tests.faults.full_disk FOLDER
"""

import asyncio
import json
import os
import sys
from pathlib import Path

from server.api.registry import Entry, Registry
from server.errors import ServerError, SourceUnavailable
from server.sources import Store
from server.sources.content import hash_adapter
from tests.server.sources.toy_source import ToySource, write


def fill(folder: Path) -> Path:
    """A file that takes all that is left."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (65536, 4096, 256, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
    return path


def half_written(root: Path) -> list[str]:
    """What a reader could see that is not whole, and work that was left."""
    found = [path.name for path in (root / "objects").iterdir() if hash_adapter(path) != path.name]
    found += [path.name for path in (root / "packs").iterdir() if path.read_bytes() != b"p" * 3000]
    return found + [path.name for path in (root / "staging").iterdir()]


def refused(work) -> str:
    """The words of a refusal; empty if there was none."""
    try:
        work()
    except SourceUnavailable as error:
        return error.message
    return ""


def main(folder: Path) -> dict:
    """What was seen."""
    root, source, seen = folder / "store", ToySource(), {}
    store = Store(root, max_bytes=1 << 40, min_idle_s=3600)  # as where nobody said how large the disk is
    there = store.materialize(source, source.snapshot("a"))
    pack = store.publish_pack(there.hash, "base", write(b"p" * 3000), there)
    registry = Registry(folder / "registry", "m", "local")
    asyncio.run(registry.update("one", lambda before, now: Entry(now, pinned=True)))
    filler = fill(folder)

    seen["refused"] = refused(lambda: store.materialize(source, source.snapshot("b")))
    again = store.materialize(source, source.snapshot("a"))
    seen["there_goes_on"] = again.hash == there.hash and store.publish_pack(there.hash, "base", write(b"x"), again) == pack
    seen["half_written"] = half_written(root)
    seen["pack_refused"] = "disk is full" in refused(lambda: store.publish_pack("a" * 64, "base", write(b"p" * 3000)))
    try:
        asyncio.run(registry.update("two", lambda before, now: Entry(now, pinned=True)))
        seen["registry_refused"] = False
    except ServerError as error:
        seen["registry_refused"] = "nothing was changed" in error.message
    seen["registry_as_before"] = set(Registry(folder / "registry", "m", "local").view.names) == {"one"}

    os.truncate(filler, filler.stat().st_size - 3 * 65536)
    seen["works_with_room"] = store.verify(store.materialize(source, source.snapshot("b")))
    fill(folder / "registry")
    eager = Store(root, max_bytes=1 << 40, min_idle_s=0)  # what is idle may go
    seen["evicted_for_room"] = eager.verify(eager.materialize(source, source.snapshot("c")))
    seen["half_written_in_the_end"] = half_written(root)
    return seen


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
