"""A machine to try user-data on: a mount namespace with stand-ins, S3 on loopback, and what the boot left behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from infra.artifact import lock_of, read_content, write_archive
from infra.user_data import render

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
BUCKET = "try-user-data"
UNSHARE = ["unshare", "--mount", "--propagation", "private", *([] if os.geteuid() == 0 else ["--map-root-user"])]


def why_not() -> str | None:
    """What is missing for a namespace with overlays, if anything."""
    for program in ("unshare", "mount", "mountpoint", "curl", "bash"):
        if shutil.which(program) is None:
            return f"there is no {program}"
    probe = "d=$(mktemp -d); trap 'umount -l $d 2>/dev/null; rmdir $d' EXIT; "
    probe += "mount -t tmpfs t $d; mkdir $d/u $d/w; mount -t overlay o -o lowerdir=/mnt,upperdir=$d/u,workdir=$d/w /mnt"
    result = subprocess.run([*UNSHARE, "sh", "-ec", probe], capture_output=True, text=True)
    return None if result.returncode == 0 else f"no mount namespace with overlays ({result.stderr.strip()[:80]})"


class Machine:
    """One instance. `run` boots it; `state` holds what was recorded."""

    def __init__(self, folder: Path, s3: Any, imds: str) -> None:
        self.state, self._imds = folder, imds
        for name in ("bin", "nvme", "shared", "environments"):
            (folder / name).mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._put_programs()
        content = read_content()
        self.lock = lock_of(content)
        self._put_environment(self.lock)
        write_archive(content, folder / "artifact.zip")
        with suppress(s3.exceptions.BucketAlreadyOwnedByYou):
            s3.create_bucket(Bucket=BUCKET)
        s3.upload_file(str(folder / "artifact.zip"), BUCKET, "assets/0123abcd.zip")

    def variables(self, **changes: str) -> dict[str, str]:
        """Those of an EFS deployment in small."""
        return {
            "REGION": "us-east-1",
            "STACK_NAME": "manylora-service",
            "SIGNAL_RESOURCE": "GpuFleetGroup",
            "ARTIFACT_URI": f"s3://{BUCKET}/assets/0123abcd.zip",
            "WHEELHOUSE_URI": "",
            "MOUNT_KIND": "efs",
            "MOUNT_SOURCE": "fs-1:/",
            "MOUNT_OPTIONS": "_netdev,tls,iam,accesspoint=fsap-1",
            "MOUNT_POINT": "/mnt/manylora",
            "CACHE_ROOT": "/opt/dlami/nvme",
            "MODEL_ORIGIN": f"s3://{BUCKET}/models/base",
            "SHARED_DIR": "/mnt/manylora/base",
            "HUB_SECRET_ARN": "",
            "ADMIN_SECRET_ARN": "",
            "GATEWAY_SECRET_ARN": "",
            "LOG_GROUP": "try",
            "DRAIN_HOOK": "drain",
            "LAUNCH_HOOK": "",
            "READY_S": "150",
            "HEAL_S": "600",
            "ENTER_S": "0",
            "MANYLORA_MODEL_ID": "/var/lib/manylora/model",
            "MANYLORA_PORT": str(self.port),
            "MANYLORA_HOSTNAME": "127.0.0.1",
            "MANYLORA_DRAIN_TIMEOUT_S": "5",
        } | changes

    def run(self, variables: dict[str, str], *, times: int = 1) -> subprocess.CompletedProcess[str]:
        """Boot, `times` over on the same machine; the namespace ends with what it started."""
        script = self.state / "user-data.sh"
        script.write_text(render(variables))
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(self.state), "IMDS": self._imds, "AWS_EC2_METADATA_DISABLED": "true",
            **{name: value for name, value in os.environ.items() if name.startswith("AWS_")},
        }  # fmt: skip
        command = [*UNSHARE, "bash", str(HERE / "namespace.sh"), str(self.state), *[str(script)] * times]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)

    def recorded(self, name: str) -> list[str]:
        """Lines of one of the stand-ins' records."""
        path = self.state / name
        return path.read_text().splitlines() if path.exists() else []

    def steps(self) -> list[str]:
        """The boot's steps, as they were written down."""
        return [json.loads(line)["step"] for line in self.recorded("boot.jsonl")]

    def stop(self) -> None:
        """End what the stand-in for systemd started: SIGTERM to each, then the group."""
        pids = [int(pid) for pid in self.recorded("pids")]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.killpg(pid, number)
            _wait_gone(pids, 10 if number == signal.SIGTERM else 2)

    def _put_programs(self) -> None:
        python = sys.executable
        for name in ("systemctl", "aws"):
            self._program(name, f'exec {python} {HERE / name}.py "$@"')
        # `mount POINT`, as with an fstab entry: the shared folder stands for the file system.
        self._program("mount", f'echo "$@" >>{self.state}/mount; exec {shutil.which("mount")} --bind {self.state}/shared "$1"')
        self._program("mount.efs", "exit 1")
        self._program("getent", "exit 2")
        self._program("useradd", f'echo "$@" >>{self.state}/useradd')

    def _program(self, name: str, text: str) -> None:
        path = self.state / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def _put_environment(self, lock: str) -> None:
        """The packages as an image would bring them: this interpreter."""
        python = self.state / "environments" / lock / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        (self.state / "environments" / lock / ".complete").touch()


def _wait_gone(pids: list[int], timeout_s: float) -> None:
    import psutil

    processes = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    psutil.wait_procs(processes, timeout=timeout_s)
