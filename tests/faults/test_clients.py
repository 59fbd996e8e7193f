"""Clients that read a byte at a time, say nothing, or are gone without a word."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.api import connections
from server.api.connections import MAX_HEAD_BYTES
from tests.server.api.live import LiveServer, live_server, wait_for

ROOT = Path(__file__).parents[2]
LONG = {"inputs": "one two three four", "parameters": {"max_new_tokens": 7000, "return_k_alternatives": 15}}  # many megabytes


def connect(live: LiveServer, room: int | None = None) -> socket.socket:
    host, port = live.base_url.removeprefix("http://").split(":")
    raw = socket.socket()
    if room is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    raw.settimeout(30)
    raw.connect((host, int(port)))
    return raw


def ask(raw: socket.socket, path: str, body: dict) -> None:
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
    raw.sendall(head.encode() + payload)


def is_closed(raw: socket.socket) -> bool:
    """Whether the other end has closed it; what was sent before is read away."""
    raw.settimeout(0.05)
    try:
        while raw.recv(1 << 16):
            pass
        return True
    except TimeoutError:
        return False
    except ConnectionError:
        return True


@pytest.mark.fault(
    "Clients", "reads a byte a second", "dropped once it took nothing for `--write-timeout-s`; its sequence is freed",
    "others do not notice; what is kept for it is bounded by its own request",
)  # fmt: skip
def test_a_client_that_reads_a_byte_at_a_time(tmp_path, model_dir) -> None:
    with live_server(tmp_path, model_dir, max_total_tokens=8000, write_timeout_s=1.5) as live:
        live.control(bundle=50)
        slow = [connect(live, 2048) for _ in range(3)]
        num_submitted = len(live.seen("Submit"))
        for raw in slow:
            ask(raw, "/generate_stream", LONG)
        wait_for(lambda: len(live.seen("Submit")) == num_submitted + 3)
        dropped = False
        for _ in range(60):
            for raw in slow:
                raw.recv(1)
            begun_at = time.monotonic()
            assert live.post("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 3}}).status_code == 200
            assert time.monotonic() - begun_at < 10
            if dropped := live.api.admission._num_sequences == 0:
                break
            time.sleep(0.3)
        assert dropped, "the slow clients still hold their places"
        for raw in slow:
            raw.close()


@pytest.mark.fault(
    "Clients", "connects and sends nothing, half a request's head, or a head without an end",
    "closed after 75 s; 431 for a head over 64 KiB",
    "others do not notice",
)  # fmt: skip
def test_clients_that_never_come_to_the_point(tmp_path, model_dir, monkeypatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 1)
    with live_server(tmp_path, model_dir) as live:
        silent, half, drips, used = (connect(live) for _ in range(4))
        half.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\nx-")
        used.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" in used.recv(4096)
        used.sendall(b"GET /hea")  # a second head on a connection that was fine
        closed = set()
        wait_for(lambda: closed.update(n for n, raw in enumerate((silent, half, used)) if is_closed(raw)) or len(closed) == 3, 20)
        try:
            for _ in range(100):
                drips.sendall(b"G")
                time.sleep(0.05)
            raise AssertionError("it could go on for ever")
        except ConnectionError:
            pass
        endless = connect(live)
        try:
            endless.sendall(b"GET /health HTTP/1.1\r\n" + b"x-y: z\r\n" * (MAX_HEAD_BYTES // 4))
            assert b" 431 " in endless.recv(4096)
        except ConnectionError:
            pass  # its end may come before the answer is read
        assert live.client.get("/health").status_code == 200
        for raw in (silent, half, drips, used, endless):
            raw.close()


def test_a_long_answer_is_not_taken_for_a_head_that_does_not_come(tmp_path, model_dir, monkeypatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.3)
    with live_server(tmp_path, model_dir) as live:
        live.control(step_s=0.02)
        answer = live.post("/generate", {"inputs": "one two", "parameters": {"max_new_tokens": 60}})  # longer than that
        assert answer.status_code == 200 and answer.json()["generated_text"]


def test_a_connection_between_two_requests_may_be_idle_for_longer_than_a_head_may_take(tmp_path, model_dir, monkeypatch) -> None:
    """A load balancer keeps connections and must be the first to close one: else it answers 502 to a request that it was sending."""
    monkeypatch.setattr(connections, "HEAD_S", 0.3)
    with live_server(tmp_path, model_dir, idle_connection_s=3) as live:
        kept = connect(live)
        for pause_s in (1.0, 0.0):
            kept.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"200 OK" in kept.recv(4096)
            time.sleep(pause_s)
        assert not is_closed(kept)
        wait_for(lambda: is_closed(kept), 20)
        kept.close()


@pytest.mark.fault(
    "Clients", "is gone without a word (its network is cut): no FIN, no RST", "-",
    "found out after `--write-timeout-s` where something is to be sent, by probes where not; its sequence is freed",
)  # fmt: skip
def test_a_client_whose_network_is_cut(tmp_path, model_dir) -> None:
    """In a network of its own, whose loopback device is switched off under the open stream."""
    tried = subprocess.run(["unshare", "--user", "--map-root-user", "--net", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"a network namespace cannot be made here: {tried.stderr.strip()}")
    command = [
        "unshare",
        "--user",
        "--map-root-user",
        "--net",
        sys.executable,
        "-m",
        "tests.faults.cut_network",
        str(tmp_path),
        str(model_dir),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"streamed": True, "freed": True, "served_afterwards": 200}
