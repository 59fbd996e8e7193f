"""The first process of an instance without namespaces: `python -m rehearse.beside STATE COMMAND...`.

Runs COMMAND (user-data), writes its exit status to STATE/boot, and stays until its input ends: then it ends every process of the instance.
They are known by their PATH, which begins with STATE/bin, whoever their parent is by now.
"""

import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

_GONE_S = 5.0


def end_marked(state: Path) -> None:
    """SIGKILL to every process of the instance but this one, until there is none."""
    import psutil

    mark = f"{state / 'bin'}:"
    while True:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get("PATH", "").startswith(mark):
                    found.append(process)
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        if not psutil.wait_procs(found, timeout=_GONE_S)[0]:
            return


def main() -> None:
    """Until the input ends."""
    state, *command = sys.argv[1:]

    def boot() -> None:
        status = subprocess.call(command, stdin=subprocess.DEVNULL)
        fresh = Path(state, "boot.part")
        fresh.write_text(str(status))
        fresh.rename(Path(state, "boot"))

    threading.Thread(target=boot, daemon=True).start()
    sys.stdin.buffer.read()
    end_marked(Path(state))
    os._exit(0)


if __name__ == "__main__":
    main()
