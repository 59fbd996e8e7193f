"""The whole rehearsal as `make rehearse` runs it, and one that is interrupted. Minutes: the CDK command line, and servers that start."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.rehearsal, pytest.mark.slow]


def left_behind(scratch: Path) -> list[str]:
    """Files, mounts and processes of what ran with this TMPDIR."""
    mark = str(scratch)
    found = [str(path) for path in scratch.iterdir()]
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if mark in line]
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(mark in word for word in (*process.cmdline(), *process.environ().values())):
                found.append(f"{process.pid} {' '.join(process.cmdline())}")
    return found


def start(scratch: Path, *flags: str) -> subprocess.Popen[str]:
    """As on a machine without credentials."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | {"TMPDIR": str(scratch)}
    command = [sys.executable, "-m", "rehearse", *flags]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.timeout(1500)
def test_the_whole_of_it(rehearsal_ready, tmp_path, short_folder):
    with start(short_folder, "--json", str(tmp_path / "table.json")) as process:
        assert process.stdout is not None
        said = process.stdout.read()
    assert process.returncode == 0, said[-6000:]
    lines = json.loads((tmp_path / "table.json").read_text())
    by_step = {step: [line for line in lines if line["step"] == step] for step in range(1, 7)}
    assert all(line["verdict"] == "proven" for step in range(1, 6) for line in by_step[step])
    assert all(line["verdict"] == "not provable offline" for line in by_step[6])
    assert [len(by_step[step]) for step in by_step] == [4, 5, 8, 7, 4, 7], said
    assert left_behind(short_folder) == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_one_leaves_nothing(rehearsal_ready, number, short_folder):
    with start(short_folder) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "proven: `cdk bootstrap`" in line:  # the emulator runs, and so does the next command
                process.send_signal(number)
                process.send_signal(number)  # somebody is impatient
                break
        said = process.stdout.read()
    assert process.returncode == 128 + number and "interrupted" in said, said
    assert left_behind(short_folder) == []


def test_it_says_what_is_missing(tmp_path):
    code = "import rehearse.cdk, pathlib, sys; rehearse.cdk.CDK = pathlib.Path(rehearse.cdk.ROOT, 'nowhere', 'cdk')\n"
    code += "import rehearse.__main__ as main; sys.argv = ['rehearse']; sys.exit(main.main())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "make rehearse-ready" in result.stderr, result.stdout + result.stderr
