"""A disk that is full: a real, tiny file system of its own, in a mount namespace."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.fault(
    "Files and disks", "the store's disk is full",
    "nothing where something can be evicted; else 424, “the adapter store's disk is full; nothing was kept of this adapter”",
    "adapters that are there go on; nothing is half-written; works as soon as there is room. An order to a full registry changes nothing",
)  # fmt: skip
def test_a_full_disk(tmp_path) -> None:
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    tried = subprocess.run([*unshare, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"a file system cannot be mounted here: {tried.stderr.strip()}")
    shell = f'mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec "$0" -m tests.faults.full_disk {tmp_path}'
    done = subprocess.run([*unshare, "sh", "-c", shell, sys.executable], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "refused": "The adapter store's disk is full; nothing was kept of this adapter",
        "there_goes_on": True,
        "half_written": [],
        "pack_refused": True,
        "registry_refused": True,
        "registry_as_before": True,
        "works_with_room": True,
        "evicted_for_room": True,
        "half_written_in_the_end": [],
    }
