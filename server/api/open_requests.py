"""The requests that are open on one engine: who waits for their outputs, and which of them the engine has said that it has.

Owns both, and the promise that each of them ends in one terminal output or one ServerError. Knows no processes; api.engine feeds it.
"""

import asyncio
from collections import deque
from collections.abc import Iterable

from server.errors import ServerError, Unavailable
from server.types import SequenceOutput


class Waiting:
    """What was said of one request and not taken yet; for one task that takes it. asyncio.Queue, which looks after several and after
    bounds, takes three times as long, and there is one for each token."""

    def __init__(self) -> None:
        self._items: deque[SequenceOutput | ServerError] = deque()
        self._wake: asyncio.Future[None] | None = None

    def put(self, item: SequenceOutput | ServerError) -> None:
        """Say it."""
        self._items.append(item)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def get(self) -> SequenceOutput | ServerError:
        """The next, now or once it is said."""
        if not self._items:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        return self._items.popleft()


class NotTaken(Unavailable):
    """The engine was lost, or fell silent, before it said that it has the request: another engine may run it."""


class OpenRequests:
    """For the event loop's thread."""

    def __init__(self) -> None:
        self._waiting: dict[str, Waiting] = {}
        self._taken: set[str] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def open(self, request_id: str) -> Waiting:
        """What the engine says of the request, until `close`."""
        waiting = self._waiting[request_id] = Waiting()
        return waiting

    def close(self, request_id: str) -> None:
        """It has ended, or nobody waits for it any more."""
        del self._waiting[request_id]
        self._taken.discard(request_id)

    def take(self, request_ids: Iterable[str]) -> None:
        """The engine has them."""
        self._taken.update(self._waiting.keys() & request_ids)

    def put(self, outputs: Iterable[SequenceOutput]) -> None:
        """Hand outputs to those who wait for them."""
        for output in outputs:
            if (waiting := self._waiting.get(output.request_id)) is not None:
                waiting.put(output)

    def fail(self, error: ServerError) -> None:
        """End every one with `error`."""
        for waiting in self._waiting.values():
            waiting.put(error)

    def fail_not_taken(self, reason: str) -> None:
        """End those that the engine does not have with NotTaken."""
        for request_id in self._waiting.keys() - self._taken:
            self._waiting[request_id].put(NotTaken(f"{reason}; try again", retry_after_s=1.0))
