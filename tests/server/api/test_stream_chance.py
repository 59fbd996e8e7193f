"""Streams whose events, clients and silences come by chance, many at once: each is whole and in order, and leaves nothing behind."""

import asyncio
import random
from typing import Any

import pytest

from server.api.stream import KEEP_ALIVE, EventStream, native_error
from server.errors import ValidationFailed

_NUM_AT_ONCE = 60


async def _never() -> dict:
    return await asyncio.Event().wait()  # type: ignore[return-value]


class Draw:
    """One stream: its events, its client, and what was sent."""

    def __init__(self, chance: random.Random) -> None:
        self.chance, self.sent, self.is_closed = chance, [], False
        self.num_events = chance.randrange(6)
        self.error = chance.choice([None, None, ValidationFailed("no"), RuntimeError("a fault")])
        self.is_slow, self.leaves = chance.random() < 0.3, chance.random() < 0.2
        self.stuck_at = chance.randrange(8) if chance.random() < 0.15 else None  # messages that it takes
        self.patience_s = chance.choice([0.0, 0.004, 1.0])

    async def events(self):
        try:
            for n in range(self.num_events):
                if self.chance.random() < 0.5:
                    await asyncio.sleep(self.chance.random() * 0.02)
                yield b"data: %d\n\n" % n
            if self.error is not None:
                raise self.error
        finally:
            self.is_closed = True

    async def receive(self) -> dict:
        if not self.leaves:
            return await _never()
        await asyncio.sleep(self.chance.random() * 0.05)
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        if len(self.sent) == self.stuck_at:
            await _never()
        if self.is_slow:
            await asyncio.sleep(self.chance.random() * 0.01)
        self.sent.append(message)

    async def run(self) -> None:
        write_timeout_s = 5 if self.stuck_at is None else 0.05  # a slow machine drops nobody who reads
        options = {"keep_alive_s": 0.006, "write_timeout_s": write_timeout_s, "patience_s": self.patience_s}
        stream = EventStream(self.events(), dialect=native_error, headers=dict, **options)
        async with asyncio.timeout(20):
            await stream({"type": "http"}, self.receive, self.send)

    def check(self) -> None:
        types = [message["type"] for message in self.sent]
        assert types[:1] in ([], ["http.response.start"]) and set(types[1:]) <= {"http.response.body"}
        frames = [message["body"] for message in self.sent[1:]]
        events = [frame for frame in frames if frame[6:7].isdigit()]
        assert events == [b"data: %d\n\n" % n for n in range(len(events))]
        if self.leaves or self.stuck_at is not None:
            return
        assert self.is_closed and not self.sent[-1].get("more_body", False)
        if self.sent[0]["status"] == 200:
            assert len(events) == self.num_events and sum(not message["more_body"] for message in self.sent[1:]) == 1
            spoken = [frame for frame in frames if frame != KEEP_ALIVE]  # one may have waited behind the error
            assert self.error is None or b'"error"' in spoken[-2]
        else:
            assert self.error is not None and self.num_events == 0


@pytest.mark.parametrize("seed", range(8))
async def test_streams_are_whole_whatever_happens_when(seed: int) -> None:
    faults: list[dict] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: faults.append(context))
    draws = [Draw(random.Random(1000 * seed + n)) for n in range(_NUM_AT_ONCE)]
    await asyncio.gather(*(draw.run() for draw in draws))
    for draw in draws:
        draw.check()
    await asyncio.sleep(0.001)
    assert asyncio.all_tasks() == {asyncio.current_task()} and not faults
