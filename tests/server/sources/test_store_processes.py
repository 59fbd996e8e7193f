"""The store between processes: one fetch for two servers on a folder, and kill -9 at every operation on the file system."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.sources import Store
from server.sources.disk import Staging
from tests.server.sources.store_victim import SlowSource, visible_errors

VICTIM = [sys.executable, "-m", "tests.server.sources.store_victim"]
CHECKOUT = Path(__file__).parents[3]


def start(root: Path, pause_s: float) -> subprocess.Popen[str]:
    return subprocess.Popen([*VICTIM, str(root), "fetch", str(pause_s)], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    give_up_at = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def test_two_processes_make_one_fetch(tmp_path: Path) -> None:
    processes = [start(tmp_path, 0.3) for _ in range(2)]
    hashes = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(hashes) == 1
    assert len((tmp_path / "notes").read_text().splitlines()) == 1
    assert visible_errors(tmp_path / "store") == []


def test_killed_in_the_middle_of_a_fetch(tmp_path: Path) -> None:
    process = start(tmp_path, 60)
    wait_for(tmp_path / "notes")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    root, source = tmp_path / "store", SlowSource(tmp_path / "notes", 0)
    assert [list((root / folder).iterdir()) for folder in ("objects", "index", "packs")] == [[], [], []]
    (leftover,) = (root / "staging").iterdir()
    store = Store(root)  # too young to be removed: on a file system without locks its owner might live
    assert store.verify(store.materialize(source, source.snapshot("a")))  # at once: the kernel let go of the lock
    assert leftover.exists()
    for path in (leftover, *leftover.rglob("*")):
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    Store(root)
    assert not leftover.exists()


def test_the_staging_of_a_living_process_is_not_swept(tmp_path: Path) -> None:
    staging = Staging(tmp_path)
    with staging.open() as folder:
        for path in (folder.parent, *folder.parent.rglob("*")):
            os.utime(path, (time.time() - 7200, time.time() - 7200))
        assert staging.sweep() == 0
        assert folder.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(
    "Files and disks", "the server killed (SIGKILL) before each single operation on the store", "the connection breaks off",
    "nothing that readers see is half-written, and the next process finishes the work",
)  # fmt: skip
def test_kill_9_at_every_operation(tmp_path: Path) -> None:
    done = subprocess.run([*VICTIM, str(tmp_path), "kill-everywhere"], cwd=CHECKOUT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["failures"] == []
    assert result["num_kills"] > 40  # that many moments there are
