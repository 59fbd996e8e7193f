"""Run as a program by test_store_processes.py: a process that works on a store and, if asked to, kills itself at one moment.

python -m tests.server.sources.store_victim ROOT fetch [SECONDS]
python -m tests.server.sources.store_victim ROOT kill-everywhere
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from server.sources.base import Progress, Snapshot, SourceFile
from server.sources.content import hash_adapter
from server.sources.store import Store

CONTENT = {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": b"w" * 5000}


class SlowSource:
    """One adapter; each fetch is noted in a file and takes a while."""

    name = "slow"

    def __init__(self, notes: Path, pause_s: float) -> None:
        self._notes = notes
        self._pause_s = pause_s

    def snapshot(self, adapter_id: str, *, revision: str | None = None, api_token: str | None = None) -> Snapshot:
        return Snapshot(self.name, adapter_id, "v1", tuple(SourceFile(name, len(data)) for name, data in CONTENT.items()))

    def fetch(self, snapshot: Snapshot, into: Path, api_token: str | None = None, progress: Progress | None = None) -> None:
        with self._notes.open("a") as notes:
            notes.write(f"{os.getpid()}\n")
        for name, data in CONTENT.items():
            with (into / name).open("wb") as file:
                file.write(data[:1000])
                file.flush()
                time.sleep(self._pause_s)
                file.write(data[1000:])


def work(root: Path, pause_s: float = 0.0) -> str:
    """One adapter into the store, and a pack of it."""
    store, source = Store(root / "store"), SlowSource(root / "notes", pause_s)
    stored = store.materialize(source, source.snapshot("a"))
    store.publish_pack(stored.hash, "base", lambda path: path.write_bytes(b"p" * 3000))
    return stored.hash


def arm(root: Path, num_operations: int) -> None:
    """SIGKILL to ourselves before the n-th operation on the file system below `root`."""
    left = num_operations

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal left
        touches = event == "fcntl.flock" or (
            (event == "open" or event.startswith("os."))
            and args
            and isinstance(args[0], str | os.PathLike)
            and str(args[0]).startswith(str(root))
        )
        if touches:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def visible_errors(store: Path) -> list[str]:
    """What a reader could see that is not whole."""
    errors = [f"object {path.name}" for path in (store / "objects").glob("*") if hash_adapter(path) != path.name]
    errors += [f"pack {path.name}" for path in (store / "packs").glob("*") if path.read_bytes() != b"p" * 3000]
    for path in (store / "index").glob("*"):
        known = json.loads(path.read_bytes())
        if not (store / "objects" / known["hash"]).is_dir():
            errors.append(f"index {path.name}")
    return errors


def in_child(work_there: object) -> int:
    """The wait status of a forked child; it must never come back into this program."""
    pid = os.fork()
    if pid == 0:
        try:
            work_there()  # type: ignore[operator]
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        os._exit(1)
    return os.waitpid(pid, 0)[1]


def kill_everywhere(root: Path) -> None:
    """For n = 1, 2, ... until a child survives: kill it at its n-th operation, look at what is visible, let a second one finish
    the work. Prints one JSON line."""
    num_kills, failures = 0, []
    while True:
        place = root / f"kill-{num_kills + 1}"
        place.mkdir()

        def victim(place: Path = place, at: int = num_kills + 1) -> None:
            arm(place, at)
            work(place)

        status = in_child(victim)
        if status == 0:
            break
        num_kills += 1
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            failures.append(f"{num_kills}: ended with {status}")
        failures += [f"{num_kills}: {error}" for error in visible_errors(place / "store")]
        if in_child(lambda place=place: work(place)) != 0:
            failures.append(f"{num_kills}: the next process failed")
        failures += [f"{num_kills}: then {error}" for error in visible_errors(place / "store")]
        if [len(list((place / "store" / folder).iterdir())) for folder in ("objects", "packs", "index")] != [1, 1, 1]:
            failures.append(f"{num_kills}: the next process left the work undone")
    print(json.dumps({"num_kills": num_kills, "failures": failures}))


if __name__ == "__main__":
    if sys.argv[2] == "fetch":
        print(work(Path(sys.argv[1]), float(sys.argv[3])))
    else:
        kill_everywhere(Path(sys.argv[1]))
