"""Run as a program by test_clients, in a network namespace: a server and a client on its loopback, which is then switched off.

python -m tests.faults.cut_network FOLDER MODEL
"""

import fcntl
import json
import socket
import struct
import sys
import time
from pathlib import Path

from tests.faults.test_clients import ask, connect
from tests.server.api.live import live_server, wait_for

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def switch(is_up: bool) -> None:
    """The loopback device."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack("16xh14x", fcntl.ioctl(control, _SIOCGIFFLAGS, request))
        flags = flags | _IFF_UP if is_up else flags & ~_IFF_UP
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags))


def main(folder: Path, model_dir: Path) -> dict:
    """What was seen."""
    switch(True)
    seen = {}
    with live_server(folder, model_dir, max_total_tokens=8000, write_timeout_s=2) as live:
        live.control(step_s=0.01)
        client = connect(live)
        ask(client, "/generate_stream", {"inputs": "one two three", "parameters": {"max_new_tokens": 7000}})
        seen["streamed"] = bool(client.recv(100))
        switch(False)
        deadline = time.monotonic() + 40
        while live.api.admission._num_sequences and time.monotonic() < deadline:
            time.sleep(0.1)
        seen["freed"] = live.api.admission._num_sequences == 0
        switch(True)
        wait_for(lambda: live.client.get("/health").status_code == 200)
        live.control()
        seen["served_afterwards"] = live.post("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 3}}).status_code
    return seen


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
