"""The server on a base with random weights: `python -m benchmarks.gpu.serve FLAGS` takes the flags of `python -m server`.

Only the engine's program is another one (random_base). `RandomServer` is that as a subprocess, for the parts that go over HTTP.
"""

import functools
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

from benchmarks.gpu.rows import ROOT

ENGINE_COMMAND = (sys.executable, "-m", "benchmarks.gpu.random_base")
MODEL_NAME = "base"  # of the base in requests
_SETTING_OF = {"max_batch_tokens": "max_batch_prefill_tokens", "max_sequence_len": "max_total_tokens"}  # where the names differ
_NO_SETTING = ("model_dir", "revision")
_STOP_TIMEOUT_S = 60.0
_CAPTURES_LATER = "more are captured later"  # what the engine logs of its captures
_NO_MORE = (" 0 more are captured later", "graphs are captured", "no more steps are captured")


class ServerFailed(Exception):
    """The server did not start or died; the message has the end of its log."""


def flags_for(options: Mapping[str, Any]) -> list[str]:
    """Engine options (server.types.EngineOptions) as flags of the server. ValueError names one that the server has no flag for."""
    from server.settings import Settings

    flags = []
    for name, value in options.items():
        if name not in _NO_SETTING and value is not None:
            setting = _SETTING_OF.get(name, name)
            if setting not in Settings.model_fields:
                raise ValueError(f"--option {name}: the server has no such setting, so the parts over HTTP cannot be run with it")
            flags.append(f"--{setting.replace('_', '-')}={str(value).lower() if isinstance(value, bool) else value}")
    return flags


class RandomServer:
    """The server as a subprocess, from its start to the end of the block. `url` is where it listens."""

    def __init__(self, model_dir: Path, adapters_dir: Path, store_dir: Path, log: Path, options: Mapping[str, Any], **environment: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self._log = f"http://127.0.0.1:{port}", log
        flags = {
            "model-id": model_dir, "served-model-name": MODEL_NAME, "adapters-dir": adapters_dir, "store-dir": store_dir,
            "hostname": "127.0.0.1", "port": port, "max-concurrent-requests": 4096,
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.gpu.serve", *(f"--{name}={value}" for name, value in flags.items())]
        self.started_at = time.monotonic()
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                [*command, *flags_for(options)], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | environment
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the API's process."""
        return self._process.pid

    def cpu_seconds(self) -> dict[str, float]:
        """Used so far by the API's process, and by those that it started: the engine, above all."""
        api = psutil.Process(self.pid)
        return {name: sum(sum(one.cpu_times()[:2]) for one in some) for name, some in (("api", [api]), ("engine", api.children(True)))}

    def stop(self) -> int:
        """End it, by force if it takes too long; its exit status."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return self._process.wait()

    def wait_healthy(self, until: float) -> float:
        """Seconds from the process's start to health; `until` is in monotonic seconds. ServerFailed if it is not healthy by then."""
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise ServerFailed(f"the server ended with status {self._process.returncode}; its log ends:\n{self.log_tail()}")
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return time.monotonic() - self.started_at
            except httpx.TransportError:
                pass  # it does not listen yet
            time.sleep(0.05)
        raise ServerFailed(f"the server was not healthy in time; its log ends:\n{self.log_tail()}")

    def wait_captured(self, until: float) -> None:
        """Until the engine has captured every step, which it does while it has nothing else to do; at most until `until`."""
        while any(_CAPTURES_LATER in line for line in self.log_lines()) and time.monotonic() < until:
            if any(words in line for line in self.log_lines() for words in _NO_MORE):
                return
            time.sleep(0.1)

    def engine_facts(self) -> dict[str, Any]:
        """What the engine said when it became ready: seconds by phase, memory, versions."""
        return httpx.get(f"{self.url}/info", timeout=30).json()["engine"]

    def log_lines(self) -> list[str]:
        """What it logged so far."""
        return self._log.read_text(errors="replace").splitlines()

    def log_tail(self, num_lines: int = 25) -> str:
        """The log's last lines."""
        return "\n".join(self.log_lines()[-num_lines:])


def main() -> int:
    """Serve as `python -m server` does, with as many connections as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    import server.__main__ as program
    from server.api import app

    app.make_api = functools.partial(app.make_api, engine_command=ENGINE_COMMAND)
    return program.main(sys.argv[1:])


if __name__ == "__main__":
    status = main()
    from server.__main__ import end

    end(status)
