"""A server started as a subprocess on the embedded model and the example adapters, for the demo and for `make serve`.

Owns the process: its command line, its log, the wait until it is healthy, its end. It does not know requests. It listens on
127.0.0.1 alone.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import httpx

from examples.embedded_model import DEFAULT_DIR

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS_DIR = ROOT / "examples" / "adapters"
STORE_DIR = ROOT / ".cache" / "store"
HOST = "127.0.0.1"
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 150.0  # the server itself drains for up to 120


class ServerFailed(Exception):
    """The server did not start, died, or did not stop; the message carries the end of its log where there is one."""


class ServerProcess:
    """`python -m server` as a child, a context manager: leaving it stops the server. `url` is where it listens, `model_id` the base's
    name in requests.

    It gets its own session: Ctrl-C in the terminal reaches us alone, and we stop it in order.
    """

    def __init__(self, *, port: int = 0, log_path: Path | None = None, admin_key: str | None = None) -> None:
        """Start it. Port 0 takes a free one. Without `log_path` it writes to this terminal. `admin_key`: who shows it may give orders."""
        self.port = port or free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.model_id = DEFAULT_DIR.name
        self.log_path = log_path
        options = {
            "model-id": DEFAULT_DIR,
            "adapters-dir": ADAPTERS_DIR,
            "adapter-source": "local",
            "store-dir": STORE_DIR,
            "hostname": HOST,
            "port": self.port,
        }
        command = [sys.executable, "-m", "server", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
        environment = os.environ | ({"MANYLORA_ADMIN_KEY": admin_key} if admin_key is not None else {})  # flags are seen in ps
        if log_path is None:
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
            return
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None or self._process.poll() is None:  # else it is dead, and the error on its way says so
            self.stop()

    def wait_healthy(self, on_wait: Callable[[float], None], timeout_s: float = START_TIMEOUT_S) -> float:
        """Seconds until /health said 200. `on_wait` is called with the seconds so far, a few times a second. ServerFailed otherwise."""
        started_at = time.monotonic()
        while (waited_s := time.monotonic() - started_at) < timeout_s:
            if self._process.poll() is not None:
                raise ServerFailed(f"the server ended with status {self._process.returncode} while starting{self._log_tail()}")
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return waited_s
            except httpx.TransportError:
                pass  # it does not listen yet
            on_wait(waited_s)
            time.sleep(0.2)
        raise ServerFailed(f"the server was not healthy after {timeout_s:.0f} s{self._log_tail()}")

    def wait(self) -> int:
        """Block until it ends by itself; its exit status."""
        return self._process.wait()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """SIGTERM, then wait: running requests finish. ServerFailed if it had died before, ends with an error, or has to be killed."""
        if self._process.poll() is not None:
            raise ServerFailed(f"the server had already ended, with status {self._process.returncode}{self._log_tail()}")
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ServerFailed(f"the server did not stop within {timeout_s:.0f} s of SIGTERM and was killed{self._log_tail()}") from None
        finally:  # a second Ctrl-C ends up here too
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
        if status not in (0, -signal.SIGTERM):  # uvicorn raises the signal again once it is done
            raise ServerFailed(f"the server stopped with status {status}{self._log_tail()}")

    def _log_tail(self, num_lines: int = 20) -> str:
        if self.log_path is None or not self.log_path.is_file():
            return ""
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:]
        return "\n".join([f"; the end of {self.log_path}:", *lines])


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def adapter_ids() -> list[str]:
    """The example adapters' ids: their folders' names."""
    return sorted(path.parent.name for path in ADAPTERS_DIR.glob("*/adapter_config.json"))
