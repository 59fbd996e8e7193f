"""An instance where namespaces are refused: the same user-data, with the paths that it writes to moved below the instance's folder.

Weaker than `instance`, and said so in the table: the rewriting is ours, the network is the machine's own. Units, archive, delivery, server
and agent are the deployed ones all the same. `rehearse.group` makes them where it has to.
"""

import os
import re
import shutil
import subprocess
import sys

from rehearse.beside import end_marked
from rehearse.emulator_process import ROOT, end_group
from rehearse.instance import Instance
from rehearse.moved import moved

_PLACES = {"fstab": "etc/fstab", "server.env": "etc/manylora/server.env", "boot.jsonl": "var/log/manylora/boot.jsonl"}


class PlainInstance(Instance):
    """As Instance."""

    def start(self, user_data: str) -> None:
        """Boot; `await_boot` waits for its end."""
        self._enter_metadata()
        root = self.state / "root"
        for name in ("etc/systemd/system", "etc/logrotate.d", "opt/manylora", "opt/aws/amazon-cloudwatch-agent/bin", "mnt", "run", "var"):
            (root / name).mkdir(parents=True)
        (root / "etc" / "fstab").touch()
        shutil.copytree(self.state / "environments", root / "opt" / "manylora" / "environments", symlinks=True)
        agent = root / "opt" / "aws" / "amazon-cloudwatch-agent" / "bin" / "amazon-cloudwatch-agent-ctl"
        agent.write_text(f'#!/bin/sh\necho "$@" >>"{self.state}/agent"\n')
        agent.chmod(0o755)
        self._put_plain_programs()
        for name, value in {"PORT": str(self.port), "HOSTNAME": "127.0.0.1"}.items():
            user_data = re.sub(rf"(?m)^MANYLORA_{name}='.*'$", f"MANYLORA_{name}='{value}'", user_data)
        script = self.state / "user-data.sh"
        script.write_text(moved(user_data, root))
        environment = self._environment() | {
            "PATH": f"{self.state / 'bin'}:{os.environ['PATH']}", "STAND_IN_STATE": str(self.state), "IMDS": self.imds.endpoint,
        }  # fmt: skip
        command = [sys.executable, "-m", "rehearse.beside", str(self.state), "env", "-u", "PYTHONPATH", "bash", str(script)]
        with (self.state / "boot.log").open("wb") as log:
            self._process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )

    def recorded(self, name: str) -> list[str]:
        """As Machine's; what user-data wrote is still where it wrote it."""
        path = self.state / "root" / _PLACES[name] if name in _PLACES else self.state / name
        return [line.replace(str(self.state / "root"), "") for line in path.read_text().splitlines()] if path.exists() else []

    def stop(self) -> None:
        """As if its power went."""
        if self._process is not None:
            end_marked(self.state)
            end_group(self._process)
        self._process = None
        self._exit_metadata()

    def _inner_port(self) -> int:
        """The machine's network is its own."""
        return self.port

    def _units(self) -> str:
        return str(self.state / "root" / "etc" / "systemd" / "system")

    def _put_plain_programs(self) -> None:
        root = self.state / "root"
        link = f'ln -sfn "$(readlink -f {self.state}/shared)" "$1.new" && rmdir "$1" && mv -T "$1.new" "$1"'
        self._program("mount", f'echo "$@" >>{self.state}/mount; {link}')
        self._program("mountpoint", '[ "$1" = -q ] && [ -L "$2" ]')
        rewrite = f'PYTHONPATH={ROOT} {sys.executable} -m rehearse.moved "$5" {root} {self.imds.endpoint}'
        self._program("python3", f'{sys.executable} "$@" || exit; [ "$1 $2" != "-m zipfile" ] || {rewrite}')
