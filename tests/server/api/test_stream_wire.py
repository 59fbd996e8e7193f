"""Streams at ASGI's level: what the client of a backlog sees, and the others."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from server.api.stream import EventStream, native_error
from tests.server.api.test_stream import Connection


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
