"""The rehearsal's systemctl: the tests' stand-in, which obeys the units' commands and environments, and `stop` as the units have it.

KillMode=mixed: SIGTERM to the main process alone, SIGKILL to the rest after TimeoutStopSec. Restart= is not obeyed: an instance that is
killed here is killed whole. Called by user-data and by the agent on an instance.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.infra.instance import systemctl as stand_in

_DEFAULT_STOP_S = "90"


def start(name: str) -> int:
    """Start a unit and keep the pid of its main process."""
    pids = stand_in.STATE / "pids"
    before = len(pids.read_text().split()) if pids.exists() else 0
    status = stand_in.start(name)
    started = pids.read_text().split()[before:] if pids.exists() else []
    if started:
        (stand_in.STATE / f"main-{name}").write_text(started[-1])
    return status


def stop(name: str) -> int:
    """End a unit; when this returns it has ended."""
    record = stand_in.STATE / f"main-{name}"
    if not record.exists():
        return 0
    pid = int(record.read_text())
    limit_s = float(stand_in.read_unit(name).get("TimeoutStopSec", [_DEFAULT_STOP_S])[-1])
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.1)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    record.unlink()
    (stand_in.STATE / f"started-{name}").unlink(missing_ok=True)
    return 0


def main() -> int:
    """`systemctl VERB NAME...`"""
    stand_in.UNITS = Path(os.environ["STAND_IN_UNITS"])
    verb, *rest = sys.argv[1:]
    names = [word for word in rest if not word.startswith("--")]
    if verb == "stop":
        return max(stop(name) for name in names)
    if verb == "start" or (verb == "enable" and "--now" in rest):
        return max(start(name) for name in names)
    return stand_in.main()


if __name__ == "__main__":
    sys.exit(main())
