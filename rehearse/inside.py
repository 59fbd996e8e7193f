"""The first process of an instance: `python -m rehearse.inside STATE EMULATOR_PORT SERVER_PORT COMMAND...`, in namespaces of its own.

Brings up a loopback that has the metadata service's address, relays to the rehearsal's sockets in STATE, runs COMMAND (user-data), writes
its exit status to STATE/boot, and reaps until its input ends: then it ends too, and the kernel with it every process of the instance.
"""

import fcntl
import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path

from rehearse.relay import Relays

METADATA = "169.254.169.254"
_SIOCSIFADDR, _SIOCSIFFLAGS = 0x8916, 0x8914
_UP_AND_RUNNING = 0x41


def bring_up_loopback() -> None:
    """127.0.0.1 as everywhere, and the metadata service's address beside it; nothing else is reachable."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _UP_AND_RUNNING))
        address = struct.pack("16sH2x4s8x", b"lo:1", socket.AF_INET, socket.inet_aton(METADATA))
        fcntl.ioctl(control, _SIOCSIFADDR, address)


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    state, emulator_port, server_port, *command = sys.argv[1:]
    bring_up_loopback()
    Relays({
        f"127.0.0.1:{emulator_port}": f"{state}/aws.sock",
        f"{METADATA}:80": f"{state}/imds.sock",
        f"{state}/server.sock": f"127.0.0.1:{server_port}",
    })  # fmt: skip
    threading.Thread(target=_end_with_input, daemon=True).start()
    with open(f"{state}/boot.log", "wb") as log, open("/dev/null", "rb") as nothing:
        files = [(os.POSIX_SPAWN_DUP2, nothing.fileno(), 0), *((os.POSIX_SPAWN_DUP2, log.fileno(), number) for number in (1, 2))]
        boot = os.posix_spawnp(command[0], command, os.environ, file_actions=files)
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            time.sleep(0.1)
            continue
        if pid == boot:
            fresh = Path(state, "boot.part")
            fresh.write_text(str(os.waitstatus_to_exitcode(status)))
            fresh.rename(Path(state, "boot"))


if __name__ == "__main__":
    main()
