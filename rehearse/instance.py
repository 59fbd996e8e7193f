"""One instance: the deployed user-data in namespaces of its own (mounts, network, processes), with its metadata service and its way in.

Owns the folder, the sockets and the process tree; ending the first process ends all of it. What stands in for what is the tests' machine
(tests/infra/instance), and EFS is a folder that the instances share, bound in. `rehearse.group` makes them.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from rehearse.emulator.names import REGION
from rehearse.emulator_process import ROOT, Emulator, end_group, free_ports
from rehearse.errors import Differs
from rehearse.relay import Relays
from tests.infra.instance import boot
from tests.server.host.instance import MetadataStandIn

NAMESPACES = ["--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
SERVER_PORT = 8080  # in user-data
_TIMED = re.compile(r"manylora: (\w+): (\d+) ms")
_AWS = """[ "$1 $2" != "cloudformation signal-resource" ] ||
    echo "$(curl -s -o /dev/null -w '%{{http_code}}' http://127.0.0.1:{port}/health)" >>{state}/health-at-signal
exec {python} {here}/aws.py "$@\""""


def why_not() -> str | None:
    """What is missing for an instance's namespaces, if anything."""
    if (reason := boot.why_not()) is not None:
        return reason
    result = subprocess.run([*boot.UNSHARE, *NAMESPACES, "true"], capture_output=True, text=True)
    return None if result.returncode == 0 else f"no network and process namespaces ({result.stderr.strip()[:80]})"


class Instance(boot.Machine):
    """`id`, `port` (of its server, on this machine's loopback), `imds`. `start` boots it, `stop` ends it at once."""

    def __init__(self, folder: Path, *, id: str, emulator: Emulator, shared: Path, lock: str) -> None:
        folder.mkdir()
        self.state, self.id, self.lock = folder, id, lock
        for name in ("bin", "nvme", "environments"):
            (folder / name).mkdir()
        (folder / "shared").symlink_to(shared)
        self._put_environment(lock)
        self._emulator = emulator
        self.imds = MetadataStandIn(**{
            "instance-id": id, "placement/region": REGION, "autoscaling/target-lifecycle-state": "InService",
        })  # fmt: skip
        (self.port,) = free_ports(1)
        self._put_programs()
        # The agent calls it too, from an environment that a unit made.
        given = f"STAND_IN_STATE={folder} STAND_IN_UNITS={self._units()} PYTHONPATH={ROOT}"
        self._program("systemctl", f'{given} exec {sys.executable} -m rehearse.systemctl "$@"')
        self._program("aws", _AWS.format(state=folder, port=self._inner_port(), python=sys.executable, here=boot.HERE))
        self._process: subprocess.Popen[bytes] | None = None
        self._relays: Relays | None = None
        self._has_metadata = False

    def _environment(self) -> dict[str, str]:
        """Of its first process: nothing of this machine's but PATH."""
        given = {name: value for name, value in self._emulator.environment({}).items() if name.startswith("AWS_")}
        return given | {"PATH": os.environ["PATH"], "HOME": str(self.state), "PYTHONPATH": str(ROOT)}

    def _units(self) -> str:
        """Where its units lie."""
        return "/etc/systemd/system"

    def _inner_port(self) -> int:
        """Where its server listens, as it sees itself."""
        return SERVER_PORT

    def signals(self) -> list[dict[str, str]]:
        """What it told CloudFormation: the call's flags, and as `health` what /health answered at that moment."""
        health = self.recorded("health-at-signal")
        calls = [shlex.split(line) for line in self.recorded("aws")]
        return [dict(zip(words[2::2], words[3::2], strict=True)) | {"health": status} for words, status in zip(calls, health, strict=True)]

    def start(self, user_data: str) -> None:
        """Boot; `await_boot` waits for its end."""
        self._enter_metadata()
        state = str(self.state)
        self._relays = Relays({
            f"{state}/aws.sock": f"127.0.0.1:{self._emulator.port}",
            f"{state}/imds.sock": self.imds.endpoint.removeprefix("http://"),
            f"127.0.0.1:{self.port}": f"{state}/server.sock",
        })  # fmt: skip
        script = self.state / "user-data.sh"
        script.write_text(user_data)
        environment = self._environment()
        inside = [sys.executable, "-m", "rehearse.inside", state, str(self._emulator.port), str(SERVER_PORT)]
        shell = ["env", "-u", "PYTHONPATH", "bash", str(boot.HERE / "namespace.sh"), state, str(script)]
        with (self.state / "inside.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*boot.UNSHARE, *NAMESPACES, *inside, *shell], env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def await_boot(self, limit_s: float) -> None:
        """Until user-data ended with 0. Differs, with the end of its log, otherwise."""
        deadline = time.monotonic() + limit_s
        while not (self.state / "boot").exists():
            if time.monotonic() > deadline or not self.is_alive():
                raise Differs(f"{self.id} did not boot within {limit_s:.0f} s: {self._said()}")
            time.sleep(0.1)
        if (status := (self.state / "boot").read_text()) != "0":
            raise Differs(f"user-data of {self.id} ended with {status}: {self._said()}")

    def boot_seconds(self) -> dict[str, float]:
        """Of each step, as user-data said on the console; what it writes down, the agent publishes and empties."""
        said = (_TIMED.fullmatch(line) for line in self.recorded("boot.log"))
        return {match[1]: int(match[2]) / 1000 for match in said if match}

    def is_alive(self) -> bool:
        """Whether its first process runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """As if its power went: no process of it gets to say anything."""
        if self._process is not None:
            end_group(self._process, grace_s=0)
        if self._relays is not None:
            self._relays.close()
        self._process = self._relays = None
        self._exit_metadata()

    def _enter_metadata(self) -> None:
        self.imds.__enter__()
        self._has_metadata = True

    def _exit_metadata(self) -> None:
        if self._has_metadata:
            self.imds.__exit__()
        self._has_metadata = False

    def _said(self) -> str:
        lines: list[str] = []
        for name in ("boot.log", "inside.log"):
            with suppress(FileNotFoundError):
                lines += (self.state / name).read_text(errors="replace").splitlines()[-25:]
        return "\n".join(lines)
