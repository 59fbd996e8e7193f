"""The end of requests and of the process while something hangs."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from server.api import engine as engine_module
from server.api.admission import Admission
from server.api.engine import EngineClient
from server.api.stream import EventStream, event, native_error
from server.errors import Unavailable
from server.metrics import Metrics
from server.types import EngineOptions, EngineRequest, SamplingParams
from tests.server.api.live import ROOT, wait_for
from tests.server.api.test_adapters import write_adapter

PROGRAM = """
import functools, runpy, sys, time
sys.path.insert(0, {root!r})
from server.api import app
from server.sources.local import LocalSource
fake = "import sys; sys.path.insert(0, {root!r}); from tests.server.api.fake_engine import main; sys.exit(main())"
command = [sys.executable, "-c", fake, "--control", {control!r}, "--log", {log!r}, "--vocab-size", "1000"]
app.make_api = functools.partial(app.make_api, engine_command=command)
LocalSource.snapshot = lambda *arguments, **options: time.sleep(60)
sys.argv[1:] = {flags!r}
runpy.run_module("server", run_name="__main__", alter_sys=True)
"""


def test_the_process_ends_though_a_source_hangs(tmp_path: Path, model_dir: Path) -> None:
    """Requests that still wait for it hear 503, and the process does not wait for the thread."""
    write_adapter(tmp_path / "adapters/one")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = [
        "--model-id", str(model_dir), "--port", str(port), "--hostname", "127.0.0.1", "--store-dir", str(tmp_path / "store"),
        "--adapters-dir", str(tmp_path / "adapters"), "--max-total-tokens", "128", "--drain-timeout-s", "0.2",
    ]  # fmt: skip
    program = PROGRAM.format(root=str(ROOT), control=str(tmp_path / "control.json"), log=str(tmp_path / "engine.log"), flags=flags)
    env = {name: value for name, value in os.environ.items() if not name.startswith("MANYLORA_")}
    process = subprocess.Popen([sys.executable, "-c", program], env=env, stderr=subprocess.PIPE, text=True)
    answers: dict[str, httpx.Response] = {}
    body = {"inputs": "a b", "parameters": {"adapter_id": "one", "adapter_source": "local"}}

    def post(path: str) -> None:
        answers[path] = httpx.post(f"http://127.0.0.1:{port}{path}", json=body, timeout=30)

    def is_up() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_for(is_up, 40)
        threads = [threading.Thread(target=post, args=(path,)) for path in ("/generate", "/generate_stream")]
        for thread in threads:
            thread.start()
        wait_for(lambda: "in_flight 2.0" in httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(20)
        _, log = process.communicate(timeout=20)  # the source sleeps for 60 s
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0 and "they are ended" in log
    for answer in answers.values():
        assert answer.status_code == 503 and answer.json() == {"error": "the server is shutting down", "error_type": "unavailable"}
    assert len(answers) == 2


async def test_end_all_answers_only_those_that_wait() -> None:
    admission = Admission(4, Metrics())

    async def wait(seconds: float) -> str:
        with admission.admitted(1):
            await asyncio.sleep(seconds)
        return "done"

    finished, waits, leaves = (asyncio.create_task(wait(seconds)) for seconds in (0, 60, 60))
    assert await finished == "done"
    leaves.cancel()
    await asyncio.wait({leaves})
    admission.end_all(Unavailable("over"))
    with pytest.raises(Unavailable, match="over"):
        await waits
    assert leaves.cancelled() and waits.cancelling() == 0 and await admission.drain(1.0)


async def test_end_all_leaves_a_stream_that_runs_to_its_engine() -> None:
    """It hears the engine's last word though its client reads slowly; one that has no event yet hears 503."""
    admission, fed, reads, is_slow = Admission(4, Metrics()), asyncio.Event(), asyncio.Event(), asyncio.Event()
    sent: dict[str, list[dict]] = {"runs": [], "waits": []}

    async def events(num: int):
        with admission.admitted(1):
            for n in range(num):
                yield event({"n": n})
            await fed.wait()
            raise Unavailable("the engine's word")

    async def run(name: str, num: int) -> None:
        async def receive() -> dict:
            return await asyncio.Event().wait()  # type: ignore[return-value]

        async def send(message: dict) -> None:
            if message.get("body") == event({"n": 1}):
                is_slow.set()
                await reads.wait()
            sent[name].append(message)

        stream = EventStream(events(num), dialect=native_error, headers=dict, keep_alive_s=60, write_timeout_s=60)
        await stream({"type": "http"}, receive, send)

    streams = asyncio.gather(run("runs", 2), run("waits", 0))
    async with asyncio.timeout(20):
        await is_slow.wait()
        admission.end_all(Unavailable("over"))
        fed.set()
        reads.set()
        await streams
    bodies = [message["body"] for message in sent["runs"][1:]]
    assert bodies[:2] == [event({"n": 0}), event({"n": 1})] and b"the engine's word" in bodies[2] and bodies[3:] == [b""]
    assert sent["waits"][0]["status"] == 503 and b"over" in sent["waits"][1]["body"] and await admission.drain(1.0)


async def test_stopping_the_engine_ends_what_it_had_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_STOP_TIMEOUT_S", 0.1)
    (tmp_path / "control").write_text('{"hang": true}')
    fake = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.server.api.fake_engine import main; sys.exit(main())"
    command = [
        sys.executable, "-c", fake, "--control", str(tmp_path / "control"), "--log", str(tmp_path / "log"), "--vocab-size", "10",
    ]  # fmt: skip
    client = EngineClient(EngineOptions(model_dir="x"), Metrics(), max_open=4, command=command)
    client.start()
    await client.wait_ready()

    async def use() -> None:
        async for _ in client.submit(EngineRequest("r", [1, 2], SamplingParams(max_new_tokens=5))):
            pass

    request = asyncio.create_task(use())
    await asyncio.sleep(0.05)
    await client.stop()
    done, _ = await asyncio.wait({request}, timeout=5)
    request.cancel()
    assert done and isinstance(request.exception(), Unavailable)


async def test_an_engine_without_a_socket_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str) -> None:
        raise OSError("no socket")

    monkeypatch.setattr(engine_module, "EngineSocket", refuse)
    monkeypatch.setattr(engine_module.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError, match="no socket"):
        await EngineClient(EngineOptions(model_dir="x"), Metrics(), max_open=1)._run_engine()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stuck", ["start", "end"])
@pytest.mark.parametrize("patience_s", [0.0, 1.0])
async def test_a_client_that_takes_nothing_is_dropped_at_every_message(stuck: str, patience_s: float) -> None:
    async def events():
        yield event({"a": 1})

    async def receive() -> dict:
        return await asyncio.Event().wait()  # type: ignore[return-value]

    async def send(message: dict) -> None:
        if message["type"] == "http.response.start" if stuck == "start" else message.get("more_body") is False:
            await asyncio.Event().wait()

    stream = EventStream(events(), dialect=native_error, headers=dict, keep_alive_s=5, write_timeout_s=0.05, patience_s=patience_s)
    started_at = time.monotonic()
    async with asyncio.timeout(10):
        await stream({}, receive, send)
    assert time.monotonic() - started_at < 5
