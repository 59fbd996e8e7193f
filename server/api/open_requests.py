"""The requests that are open on one engine: who waits for their outputs, and which of them the engine has said that it has.

Owns both, and the promise that each of them ends in one terminal output or one ServerError. Knows no processes; api.engine feeds it.
"""

import asyncio
from collections.abc import Iterable

from server.errors import ServerError, Unavailable
from server.types import SequenceOutput

Waiting = asyncio.Queue[SequenceOutput | ServerError]


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
        waiting = self._waiting[request_id] = asyncio.Queue()
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
                waiting.put_nowait(output)

    def fail(self, error: ServerError) -> None:
        """End every one with `error`."""
        for waiting in self._waiting.values():
            waiting.put_nowait(error)

    def fail_not_taken(self, reason: str) -> None:
        """End those that the engine does not have with NotTaken."""
        for request_id in self._waiting.keys() - self._taken:
            self._waiting[request_id].put_nowait(NotTaken(f"{reason}; try again", retry_after_s=1.0))
