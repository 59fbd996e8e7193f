"""Streams at ASGI's level, where something goes wrong: backlogs, generators that swallow a cancel, comments that cannot be sent."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

import pytest

from server.api.stream import KEEP_ALIVE, EventStream, native_error
from tests.server.api.test_stream import Connection, Slow


def frame(n: int) -> bytes:
    return b"data: %d\n\n" % n


def bodies(connection: Connection) -> list[bytes]:
    return [message["body"] for message in connection.sent[1:]]


async def run(events: AsyncGenerator[bytes, None], connection: Any, **options: Any) -> None:
    settings = {"headers": dict, "keep_alive_s": 60, "write_timeout_s": 60, "patience_s": 60} | options
    async with asyncio.timeout(20):
        await EventStream(events, dialect=native_error, **settings)({"type": "http"}, connection.receive, connection.send)


class Leaves(Connection):
    """A client that leaves once it has so many messages."""

    def __init__(self, num_messages: int) -> None:
        super().__init__()
        self._num_messages = num_messages

    async def receive(self) -> dict:
        while len(self.sent) < self._num_messages:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}


async def test_a_backlog_leaves_the_loop_its_turns() -> None:
    async def events():
        for n in range(20_000):
            yield frame(n)

    connection = Leaves(100)
    await run(events(), connection)
    assert 100 <= len(connection.sent) < 1000


async def test_a_client_that_leaves_ends_a_generator_that_swallows_the_cancel() -> None:
    async def events():
        yield frame(0)
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        for n in range(1, 10):
            yield frame(n)

    connection = Leaves(2)
    await run(events(), connection)
    assert bodies(connection) == [frame(0)]


async def test_a_client_that_does_not_take_a_comment_is_dropped_though_the_generator_answers_the_cancel() -> None:
    connection = Slow(lets=False)

    async def events():
        yield frame(0)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise RuntimeError("its end failed") from None

    await run(events(), connection, keep_alive_s=0.02, write_timeout_s=0.1)
    assert connection.asked.is_set() and bodies(connection) == [frame(0)]


class Broken(Connection):
    """A connection that fails at a message."""

    def __init__(self, fails_at: Callable[[dict], bool]) -> None:
        super().__init__()
        self._fails_at = fails_at

    async def send(self, message: dict) -> None:
        if self._fails_at(message):
            raise RuntimeError("it broke")
        self.sent.append(message)


def cannot() -> dict[str, str]:
    raise RuntimeError("it broke")


@pytest.mark.parametrize(
    ("fails_at", "headers", "num_before"),
    [
        (lambda message: message.get("body") == KEEP_ALIVE, dict, 1),
        (lambda message: message["type"] == "http.response.start", dict, 0),
        (lambda message: False, cannot, 0),
    ],
    ids=["comment", "start", "headers"],
)
async def test_what_fails_in_a_silence_ends_the_stream(fails_at: Callable[[dict], bool], headers: Any, num_before: int) -> None:
    closed = asyncio.Event()

    async def events():
        try:
            for n in range(num_before):
                yield frame(n)
            await asyncio.Event().wait()
        finally:
            closed.set()

    connection = Broken(fails_at)
    with pytest.raises(RuntimeError, match="it broke"):
        await run(events(), connection, headers=headers, keep_alive_s=0.02, patience_s=0.02)
    assert closed.is_set() and bodies(connection) == [frame(n) for n in range(num_before)]


async def test_the_start_and_the_first_event_have_their_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes 60 s of 100, by the loop's clock."""
    loop = asyncio.get_running_loop()
    real, ahead_s, connection = loop.time, 0.0, Connection()
    monkeypatch.setattr(loop, "time", lambda: real() + ahead_s)

    async def send(message: dict) -> None:
        nonlocal ahead_s
        if message.get("more_body", True):
            ahead_s += 60
            for _ in range(5):
                await asyncio.sleep(0)
        connection.sent.append(message)

    async def events():
        yield frame(0)

    stream = EventStream(events(), dialect=native_error, headers=dict, keep_alive_s=1000, write_timeout_s=100, patience_s=1000)
    await stream({"type": "http"}, connection.receive, send)
    assert bodies(connection) == [frame(0), b""]
