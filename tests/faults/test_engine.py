"""Signals to a real engine: killed and stopped at several moments, and what is open then ends, once."""

import os
import signal
import time

import pytest

from tests.faults.marked import MarkedServer, wait_for

LONG = 900  # tokens; more than any of these tests lets a stream come to

pytestmark = pytest.mark.slow


def open_streams(server: MarkedServer, num_new: int = LONG) -> list:
    return [server.stream(adapter, num_new) for adapter in (None, 0, 1, 2, None, 0)]


def ended(streams: list, timeout_s: float = 60) -> None:
    for stream in streams:
        assert stream.done.wait(timeout_s), "it never ended"
        assert stream.is_right, stream


def kill_when(server: MarkedServer, condition) -> None:
    engine = server.engine()
    wait_for(condition)
    os.kill(engine.pid, signal.SIGKILL)
    wait_for(lambda: not engine.is_running() or engine.status() == "zombie")


@pytest.mark.fault(
    "Engine", "killed (SIGKILL) while it reads prompts, while it decodes, idle",
    "503 and `Retry-After`, or as the last event of a stream: “the engine stopped while this request was open … try again”",
    "restarted by itself; requests that come meanwhile get a 503 at once",
)  # fmt: skip
@pytest.mark.parametrize("moment", ["prompts", "decoding", "idle"])
def test_killed_at_any_moment(server: MarkedServer, moment: str) -> None:
    before = {adapter: server.ask(adapter) for adapter in (None, 0, 1)}
    if moment == "idle":
        streams, condition = [], lambda: True
    elif moment == "prompts":  # 140 steps of prompts, and answers that would take far longer than the kill
        streams = [server.stream(adapter, LONG, [3 + n % 90 for n in range(1100)]) for adapter in (None, 1) * 4]
        steps = server.metric("manylora_engine_steps_total")
        condition = lambda: server.metric("manylora_engine_steps_total") > steps  # noqa: E731
    else:
        streams = open_streams(server)
        condition = lambda: any(len(stream.tokens) >= 40 for stream in streams)  # noqa: E731
    kill_when(server, condition)
    ended(streams)
    assert all(stream.error_type == "unavailable" for stream in streams)
    refused = server.client.post("/generate", json=server.body(0, 2))
    assert refused.status_code in (200, 503)  # 200: it is back already
    server.wait_well()
    assert {adapter: server.ask(adapter) for adapter in (None, 0, 1)} == before


@pytest.mark.fault(
    "Engine", "killed while it starts, before it ever was ready and again later", "503 while it is away", "tried again; the server stays",
)  # fmt: skip
def test_killed_while_it_starts(server: MarkedServer) -> None:
    engine = server.engine()
    os.kill(engine.pid, signal.SIGKILL)
    again = wait_for(lambda: (now := server.engine()) is not None and now.pid != engine.pid and now)
    os.kill(again.pid, signal.SIGKILL)
    assert server.client.post("/generate", json=server.body(0, 2)).status_code == 503
    server.wait_well()
    assert server.ask(0)


@pytest.mark.fault(
    "Engine", "hung (SIGSTOP) while it decodes", "503, or as the last event, once it has been silent for the hang's timeout",
    "`/health` says so at once; killed and restarted; what comes meanwhile is refused with the reason",
)  # fmt: skip
def test_stopped_for_good(server: MarkedServer) -> None:
    streams, engine = open_streams(server), server.engine()
    wait_for(lambda: all(stream.tokens for stream in streams))
    os.kill(engine.pid, signal.SIGSTOP)
    wait_for(lambda: not server.is_well())
    assert "silent" in server.client.get("/health").text
    ended(streams)
    assert {stream.error_type for stream in streams} == {"unavailable"}
    server.wait_well()
    assert server.engine().pid != engine.pid and server.ask(1)


@pytest.mark.fault("Engine", "stopped for a moment", "a pause", "nothing is lost, nothing is said twice")
def test_stopped_for_a_moment(server: MarkedServer) -> None:
    streams, engine = open_streams(server, 60), server.engine()
    wait_for(lambda: all(stream.tokens for stream in streams))
    os.kill(engine.pid, signal.SIGSTOP)
    time.sleep(0.5)  # less than the heartbeat's timeout
    os.kill(engine.pid, signal.SIGCONT)
    ended(streams)
    assert all(len(stream.tokens) == 60 and "error" not in stream.terminal[0] for stream in streams)
    assert server.engine().pid == engine.pid


@pytest.mark.fault(
    "Machine", "SIGTERM under load", "nothing: what is open is answered whole; what comes later gets a 503",
    "exit status 0 within the drain's timeout, no process and no half-written file left",
)  # fmt: skip
def test_sigterm_under_load(tmp_path) -> None:
    with MarkedServer(tmp_path, drain_timeout_s=60) as server:
        first = wait_for(server.engine)
        os.kill(first.pid, signal.SIGKILL)  # and before that, the engine's very first start is cut short
        server.wait_well()
        streams = open_streams(server, 200)
        wait_for(lambda: all(stream.tokens for stream in streams))
        cold = server.stream(5, 20)  # its adapter is still to be read
        wait_for(lambda: server.metric("manylora_sequences_in_flight") == 7)
        engine = server.engine()
        os.kill(server.server.pid, signal.SIGUSR1)  # as whoever restarts it does, so that a load balancer lets go first
        wait_for(lambda: not server.is_well())
        assert server.client.post("/generate", json=server.body(None, 2)).status_code == 200
        os.kill(server.server.pid, signal.SIGTERM)
        wait_for(lambda: server.client.post("/generate", json=server.body(None, 2)).status_code == 503)
        ended([*streams, cold])
        assert all("error" not in stream.terminal[0] for stream in (*streams, cold)) and len(cold.tokens) == 20
        assert all(len(stream.tokens) == 200 for stream in streams)
        assert server.server.stop() == 0
        assert not engine.is_running()
        assert not list((server.store_dir / "staging").iterdir()) and not list((server.store_dir / "locks").iterdir())
