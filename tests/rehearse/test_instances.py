"""An instance of the rehearsal, with and without namespaces: what it reaches, and that its end is the end of everything in it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rehearse.instance import Instance, why_not
from rehearse.plain_instance import PlainInstance
from rehearse.relay import Relays

ROOT = Path(__file__).parents[2]
REASON = why_not()
KINDS = [
    pytest.param(Instance, marks=pytest.mark.skipif(REASON is not None, reason=f"namespaces: {REASON}")),
    pytest.param(PlainInstance),
]
WAIT_S = 60.0
# A boot that starts something and ends, as user-data does; what is started knows the instance by its PATH alone.
SCRIPT = """
curl -fsS -X PUT -H 'x-aws-ec2-metadata-token-ttl-seconds: 60' "${IMDS:-http://169.254.169.254}/latest/api/token" >/dev/null
env -i PATH="$PATH" setsid sleep 86000.125 </dev/null >/dev/null 2>&1 &
echo "manylora: ready: 1500 ms"
"""


class NoEmulator:
    """An instance needs its port and its environment alone."""

    port = 9

    def environment(self, base):
        return {"AWS_ENDPOINT_URL": "http://localhost:9"}


def make(kind, folder: Path) -> Instance:
    (folder / "shared").mkdir()
    return kind(folder / "one", id="i-0123456789abcdef0", emulator=NoEmulator(), shared=folder / "shared", lock="lock")


def sleepers() -> set[int]:
    return {item.pid for item in psutil.process_iter(["cmdline"]) if item.info["cmdline"] == ["sleep", "86000.125"]}


def wait_for(what) -> None:
    deadline = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_the_boot_reaches_the_metadata_service_and_its_end_ends_all(kind, short_folder):
    before, instance = sleepers(), make(kind, short_folder)
    try:
        instance.start(SCRIPT)
        instance.await_boot(WAIT_S)
        assert instance.boot_seconds() == {"ready": 1.5} and len(instance.imds.tokens) == 1 and instance.is_alive()
        wait_for(lambda: len(sleepers() - before) == 1)  # the boot may end before what it started has become `sleep`
    finally:
        instance.stop()
    assert not sleepers() - before and not instance.is_alive()
    assert str(short_folder) not in Path("/proc/mounts").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_boot_that_fails_is_told_with_the_end_of_its_log(kind, short_folder):
    instance = make(kind, short_folder)
    try:
        instance.start("echo 'no such model' >&2; exit 7")
        with pytest.raises(Exception, match=r"(?s)ended with 7: .*no such model"):
            instance.await_boot(WAIT_S)
    finally:
        instance.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rehearsal_that_is_killed_leaves_no_process(kind, short_folder):
    """Not even SIGKILL leaves one: an instance ends with the pipe that it reads."""
    before = sleepers()
    code = (
        "import sys, time; from pathlib import Path; from tests.rehearse.test_instances import *\n"
        f"instance = make({kind.__name__}, Path(sys.argv[1])); instance.start(SCRIPT); instance.await_boot(WAIT_S)\n"
        "print('booted', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(short_folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None and process.stdout.readline() == "booted\n"
        assert len(sleepers() - before) == 1
        os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not sleepers() - before)


def test_a_relay_hands_on_both_ways_and_closes(short_folder):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        path = str(short_folder / "a.sock")
        relays = Relays({path: f"127.0.0.1:{server.getsockname()[1]}"})
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(b"question")
            inner, _ = server.accept()
            with inner:
                assert inner.recv(100) == b"question"
                inner.sendall(b"answer")
                assert client.recv(100) == b"answer"
                relays.close()
                assert client.recv(100) == b""


def test_a_relay_to_nobody_breaks_the_connection(short_folder):
    import socket

    path = str(short_folder / "a.sock")
    relays = Relays({path: str(short_folder / "nobody.sock")})
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        assert client.recv(100) == b""
    relays.close()
