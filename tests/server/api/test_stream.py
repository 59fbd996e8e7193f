"""Streams: LoRAX's frames, errors before and after the headers, clients that leave."""

import asyncio
import json
import socket
import time
from pathlib import Path

import httpx
import pytest

from server.api.stream import KEEP_ALIVE, EventStream, native_error
from server.errors import ValidationFailed
from tests.server.api.live import LiveServer, live_server, wait_for

PROMPT = "one two three four"


def body(**parameters) -> dict:
    return {"inputs": PROMPT, "parameters": parameters}


@pytest.mark.parity("1.1", "`POST /generate_stream`", "same")
@pytest.mark.parity("1.7", "frames: `data: {json}`, one a token; all three keys; no `[DONE]`", "same")
def test_frames_are_lorax_ones(live: LiveServer) -> None:
    answer = live.post("/generate_stream", body(max_new_tokens=2, details=True))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream" and answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no" and answer.headers["x-model-id"] == "base"
    ids = live.api.model.tokenizer.encode(PROMPT)
    first = {
        "token": {"id": ids[0], "text": "one", "logprob": -0.5, "special": False, "skipped": False},
        "generated_text": None,
        "details": None,
    }
    last = {
        "token": {"id": ids[1], "text": " two", "logprob": -0.5, "special": False, "skipped": False}, "generated_text": "one two",
        "details": {"finish_reason": "length", "prompt_tokens": 4, "generated_tokens": 2, "seed": None},
    }  # fmt: skip
    assert answer.content == b"".join(b"data: " + json.dumps(e, separators=(",", ":")).encode() + b"\n\n" for e in (first, last))


@pytest.mark.parity("1.7", "`details` of the last event alone, if asked for", "same")
def test_details_are_null_unless_asked_for(live: LiveServer) -> None:
    assert live.events("/generate_stream", body(max_new_tokens=1))[-1]["details"] is None


def test_compat_route_streams(live: LiveServer) -> None:
    events = live.events("/", body(max_new_tokens=3) | {"stream": True})
    assert [event["token"]["text"] for event in events] == ["one", " two", " three"]


def test_token_texts_join_to_the_generated_text_also_at_a_stop_string(live: LiveServer) -> None:
    events = live.events("/generate_stream", body(max_new_tokens=9, stop=["o th"]))
    assert "".join(event["token"]["text"] for event in events) == events[-1]["generated_text"] == "one two th"


@pytest.mark.parity("1.7", "a character of several tokens comes whole", "same")
def test_emoji_come_whole(live: LiveServer) -> None:
    events = live.events(
        "/generate_stream", {"inputs": "🏴‍☠️ 日本", "parameters": {"max_new_tokens": len(live.api.model.tokenizer.encode("🏴‍☠️ 日本"))}}
    )
    assert "".join(event["token"]["text"] for event in events) == "🏴‍☠️ 日本" == events[-1]["generated_text"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"best_of": 2, "do_sample": True}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"decoder_input_details": True}, "`decoder_input_details` == true is not supported when streaming tokens"),
        ({"temperature": -1}, "`temperature` must be non-negative"),
    ],
)
@pytest.mark.parity("1.5", "`best_of`, `decoder_input_details` when streaming", "same")
def test_refusals_before_the_stream_have_their_status(live: LiveServer, parameters: dict, message: str) -> None:
    answer = live.post("/generate_stream", body(**parameters))
    assert answer.status_code == 422
    assert answer.json() == {"error": f"Input validation error: {message}", "error_type": "validation"}


def test_an_engine_error_before_the_first_token_has_its_status(live: LiveServer) -> None:
    live.control(fail="cannot", kind="AdapterRefused")
    answer = live.post("/generate_stream", body(max_new_tokens=2))
    assert answer.status_code == 424 and answer.json()["error_type"] == "generation"


@pytest.mark.parity("1.7", "an error after the first token is the last event", "same")
def test_an_error_after_the_first_token_is_the_last_event(live: LiveServer) -> None:
    live.control(step_s=0.1)
    events = []
    with live.client.stream("POST", "/generate_stream", json=body(max_new_tokens=50)) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line[6:]))
                if len(events) == 1:
                    live.control(fail="broke", kind="GenerationFailed")
    assert "token" in events[0]
    assert events[-1] == {"error": "Request failed during generation: Server error: broke", "error_type": "generation"}


@pytest.mark.parametrize("path", ["/generate_stream", "/generate", "/v1/chat/completions"])
def test_a_client_that_leaves_aborts_its_sequence(live: LiveServer, path: str) -> None:
    live.control(step_s=0.05)
    before = len(live.seen("Abort"))
    chat = {"model": "", "messages": [{"role": "user", "content": PROMPT}], "stream": True}
    payload = json.dumps(chat if "chat" in path else body(max_new_tokens=120)).encode()
    host, port = live.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
        num_submitted = len(live.seen("Submit"))
        raw.sendall(head.encode() + payload)
        wait_for(lambda: len(live.seen("Submit")) > num_submitted)
        if path != "/generate":
            assert raw.recv(100)
    wait_for(lambda: len(live.seen("Abort")) > before, 5)
    assert live.seen("Abort")[-1]["request_ids"] == [live.seen("Submit")[-1]["request_id"]]
    wait_for(lambda: live.api.admission._num_sequences == 0)


def test_a_stop_string_aborts_what_the_engine_would_go_on_with(live: LiveServer) -> None:
    live.control(step_s=0.05)
    before = len(live.seen("Abort"))
    live.post("/generate", body(max_new_tokens=100, stop=["two"]))
    wait_for(lambda: len(live.seen("Abort")) > before)


@pytest.mark.parity("1.7", "keep-alive comment after 15 s of silence", "same")
def test_silent_streams_get_comments_and_strict_ones_their_headers_at_once(tmp_path: Path, model_dir: Path) -> None:
    with live_server(tmp_path, model_dir, keep_alive_s=0.1, lorax_strict=True) as live:
        live.control(step_s=0.35)
        text = live.post("/generate_stream", body(max_new_tokens=3)).text
        assert ":\n\n" in text and text.count("data: ") == 3
        refused = live.post("/generate_stream", body(temperature=-1, unknown_field=3))
        assert refused.status_code == 200
        assert refused.text == 'data: {"error":"Input validation error: `temperature` must be non-negative","error_type":"validation"}\n\n'
        ignored = live.post("/generate", {"inputs": PROMPT, "foo": 1, "parameters": {"max_new_tokens": 4, "bar": {"baz": 1}}})
        assert ignored.json() == {"generated_text": PROMPT}


def test_200_clients_at_once(live: LiveServer) -> None:
    async def one(client: httpx.AsyncClient, n: int) -> str:
        inputs = f"number {n} of them"
        answer = await client.post("/generate", json={"inputs": inputs, "parameters": {"max_new_tokens": 12}})
        return answer.json()["generated_text"] if answer.json()["generated_text"].startswith(f"number {n} ") else "wrong"

    async def all_of_them() -> list[str]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=live.base_url, timeout=60, limits=limits) as client:
            return await asyncio.gather(*(one(client, n) for n in range(200)))

    assert "wrong" not in asyncio.run(all_of_them())


class Connection:
    """A client at ASGI's level: what it was sent, and when it leaves."""

    def __init__(self, *, leaves: bool = False, reads: bool = True) -> None:
        self.sent: list[dict] = []
        self._leaves, self._reads = leaves, reads

    async def receive(self) -> dict:
        if not self._leaves:
            await asyncio.Event().wait()
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        if not self._reads and message["type"] == "http.response.body":
            await asyncio.Event().wait()
        self.sent.append(message)


class Numbers:
    """Events for ever; knows whether it was closed."""

    def __init__(self, error: Exception | None = None) -> None:
        self.closed, self._error = False, error

    async def events(self):
        try:
            for n in range(1_000_000):
                if n == 2 and self._error is not None:
                    raise self._error
                yield f"data: {n}\n\n".encode()
                await asyncio.sleep(0.01)
        finally:
            self.closed = True


def stream_of(numbers: Numbers, **options) -> EventStream:
    return EventStream(numbers.events(), dialect=native_error, headers=dict, **{"keep_alive_s": 5, "write_timeout_s": 5} | options)


async def test_leaving_closes_the_generator() -> None:
    numbers, connection = Numbers(), Connection(leaves=True)
    await stream_of(numbers)({}, connection.receive, connection.send)
    assert numbers.closed and connection.sent[0]["status"] == 200


async def test_not_reading_closes_the_generator() -> None:
    numbers, connection = Numbers(), Connection(reads=False)
    started_at = time.monotonic()
    await stream_of(numbers, write_timeout_s=0.1)({}, connection.receive, connection.send)
    assert numbers.closed and time.monotonic() - started_at < 3


@pytest.mark.parametrize(
    ("error", "words"), [(ValidationFailed("no"), "Input validation error: no"), (RuntimeError("path /secret"), "internal server error")]
)
async def test_errors_end_a_stream(error: Exception, words: str) -> None:
    numbers, connection = Numbers(error), Connection()
    await stream_of(numbers)({}, connection.receive, connection.send)
    frames = [message["body"] for message in connection.sent[1:]]
    assert frames[:2] == [b"data: 0\n\n", b"data: 1\n\n"] and frames[-1] == b""
    assert json.loads(frames[2][6:])["error"] == words
    assert connection.sent[-1]["more_body"] is False and numbers.closed


class Slow(Connection):
    """A client that takes comments only when it is let."""

    def __init__(self, *, lets: bool) -> None:
        super().__init__()
        self.asked, self.may_go_on = asyncio.Event(), asyncio.Event()
        self._lets = lets

    async def send(self, message: dict) -> None:
        if message.get("body") == KEEP_ALIVE:
            self.asked.set()
            await (self.may_go_on if self._lets else asyncio.Event()).wait()
        self.sent.append(message)


async def test_what_comes_while_a_comment_is_under_way_comes_behind_it() -> None:
    connection = Slow(lets=True)

    async def events():
        yield b"data: 0\n\n"
        await connection.asked.wait()
        asyncio.get_running_loop().call_later(0.05, connection.may_go_on.set)
        for n in (1, 2):
            yield f"data: {n}\n\n".encode()

    stream = EventStream(events(), dialect=native_error, headers=dict, keep_alive_s=0.02, write_timeout_s=60, patience_s=60)
    async with asyncio.timeout(20):  # the first comment does not wait for the patience with the start
        await stream({}, connection.receive, connection.send)
    bodies = [message["body"] for message in connection.sent[1:]]
    assert bodies == [b"data: 0\n\n", KEEP_ALIVE, b"data: 1\n\n", b"data: 2\n\n", b""]


async def test_a_client_that_does_not_take_a_comment_is_dropped_in_its_silence() -> None:
    connection, closed = Slow(lets=False), asyncio.Event()

    async def events():
        try:
            yield b"data: 0\n\n"
            await asyncio.Event().wait()
        finally:
            closed.set()

    stream = EventStream(events(), dialect=native_error, headers=dict, keep_alive_s=0.02, write_timeout_s=0.1)
    async with asyncio.timeout(10):
        await stream({}, connection.receive, connection.send)
    assert closed.is_set() and [message["body"] for message in connection.sent[1:]] == [b"data: 0\n\n"]


async def test_an_event_takes_no_task_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[asyncio.Task] = []

    def make(loop, coroutine, **options):
        tasks.append(asyncio.Task(coroutine, loop=loop, **options))
        return tasks[-1]

    async def events():
        for n in range(100):
            await asyncio.sleep(0)
            yield f"data: {n}\n\n".encode()

    asyncio.get_running_loop().set_task_factory(make)
    connection = Connection()
    stream = EventStream(events(), dialect=native_error, headers=dict, keep_alive_s=5, write_timeout_s=5)
    await stream({}, connection.receive, connection.send)
    assert len(connection.sent) == 102 and len(tasks) == 3  # the first event alone has one
