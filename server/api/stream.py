"""Answers: JSON, errors in both dialects, server-sent events.

Owns the framing and the life of a connection: keep-alive comments, a client that left or does not read, an error before or after the
headers went out. Does not know what an event says. The routes give it a generator of events.
"""

import asyncio
import itertools
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.api.body import ClientGone
from server.errors import (
    AdapterNotFound,
    AdapterRefused,
    GenerationFailed,
    ServerError,
    SourceUnavailable,
    TemplateFailed,
    ValidationFailed,
)

log = logging.getLogger(__name__)

_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))  # json.dumps would make one for each event

Result = TypeVar("Result")


class Dialect(Protocol):
    """How a family of routes words its errors."""

    def __call__(self, error: ServerError) -> tuple[int, dict[str, Any]]:
        """HTTP status and body."""
        ...


def native_error(error: ServerError) -> tuple[int, dict[str, Any]]:
    """LoRAX's errors, with LoRAX's beginnings."""
    message = error.message
    if isinstance(error, ValidationFailed):
        message = f"Input validation error: {message}"
    elif isinstance(error, TemplateFailed):
        message = f"Failed applying chat template to inputs: {message}"
    elif isinstance(error, (AdapterNotFound, AdapterRefused, SourceUnavailable, GenerationFailed)):
        message = f"Request failed during generation: Server error: {message}"
    return error.status, {"error": message, "error_type": error.error_type}


def openai_error(error: ServerError) -> tuple[int, dict[str, Any]]:
    """OpenAI's errors: 400 for a wrong request, 404 for a model that is not there."""
    status, kind, code = error.status, "server_error", None
    if isinstance(error, (ValidationFailed, TemplateFailed)):
        status, kind = 400, "invalid_request_error"
    elif isinstance(error, AdapterNotFound):
        status, kind, code = 404, "invalid_request_error", "model_not_found"
    elif isinstance(error, AdapterRefused) or 400 <= status < 424:
        kind = "invalid_request_error"
    elif status == 429:
        kind, code = "rate_limit_error", "overloaded"
    return status, {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code or code}}


def error_response(error: ServerError, dialect: Dialect) -> Response:
    """The error as a whole answer, with Retry-After where trying again may help."""
    status, body = dialect(error)
    headers = {"retry-after": str(max(1, round(error.retry_after_s)))} if error.retry_after_s is not None else {}
    headers |= error.headers
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response(body, status=status, headers=headers)


def json_response(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`body` as compact JSON; a NaN in it would be a fault of ours and raises."""
    return Response(dump(body), status_code=status, headers=dict(headers or {}), media_type="application/json")


def dump(body: Any) -> bytes:
    """JSON in UTF-8."""
    return _JSON.encode(body).encode("utf-8", errors="replace")


def event(body: Any) -> bytes:
    """One server-sent event, framed as LoRAX's and OpenAI's servers do."""
    return b"data: " + dump(body) + b"\n\n"


DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b":\n\n"
_NUM_IN_A_ROW = 32  # events of a backlog that may go out before the loop has its turn: some 5 ms


def internal_error(error: BaseException) -> ServerError:
    """What a caller hears of a fault of ours: nothing of its inside."""
    if isinstance(error, ServerError):
        return error
    log.error("unexpected error", exc_info=error)
    return ServerError("internal server error")


async def wait_gone(receive: Callable[[], Awaitable[Message]]) -> None:
    """Returns when the client has closed the connection. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled with ClientGone when the client leaves."""
    task, gone = asyncio.create_task(work), asyncio.create_task(wait_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait({task, gone})
        if not task.cancelled():
            task.exception()


class EventStream(Response):
    """Server-sent events from a generator of frames.

    The headers go out with the first event, so that an error before it is an answer with its own status; after `patience_s` without one
    they go out alone (0: at once, as LoRAX does), and errors become events. A client that leaves, or takes nothing for `write_timeout_s`,
    closes the generator. Each event is asked for when the one before was taken: who stalls at the last one keeps the request open and its
    place until it reads, or is dropped and counts as such."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        dialect: Dialect,
        headers: Callable[[], Mapping[str, str]],
        keep_alive_s: float,
        write_timeout_s: float,
        patience_s: float = 10.0,
    ) -> None:
        super().__init__(media_type="text/event-stream")
        self._events, self._dialect, self._make_headers = events, dialect, headers
        self._keep_alive_s, self._write_timeout_s, self._patience_s = keep_alive_s, write_timeout_s, patience_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump, gone = asyncio.create_task(self._pump(scope, receive, send)), asyncio.create_task(wait_gone(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (pump, gone):
                task.cancel()
            await asyncio.wait({pump, gone})
            await self._events.aclose()
        if not pump.cancelled() and (error := pump.exception()) is not None:
            raise error

    async def _pump(self, scope: Scope, receive: Receive, send: Send) -> None:
        wire, task = _Wire(send, self._start_message, (self._patience_s, self._keep_alive_s), self._write_timeout_s), asyncio.current_task()
        assert task is not None
        try:
            if self._patience_s == 0:
                await wire.send(b"")
            # The first event has a task of its own: Admission.end_all ends that alone, not a stream that runs.
            upcoming: Awaitable[bytes | None] = asyncio.ensure_future(anext(self._events, None))
            for num_sent in itertools.count(1):
                try:
                    frame = await upcoming
                except Exception as error:
                    failure = internal_error(error)
                    if not wire.has_begun:
                        wire.close()
                        async with asyncio.timeout(self._write_timeout_s):
                            await error_response(failure, self._dialect)(scope, receive, send)
                        return
                    await wire.send(event(self._dialect(failure)[1]))
                    break
                if task.cancelling():  # the generator went on all the same
                    raise asyncio.CancelledError
                if frame is None:
                    break
                await wire.send(frame)
                if num_sent % _NUM_IN_A_ROW == 0:  # a backlog that is taken at once waits for nothing by itself
                    await asyncio.sleep(0)
                upcoming = anext(self._events, None)
            await wire.send(b"", is_last=True)
        except (TimeoutError, asyncio.CancelledError) as error:
            failure = wire.failure or error
            if not isinstance(failure, TimeoutError):
                raise failure from None
            log.info("a client took nothing for %.0f s and was dropped", self._write_timeout_s)
        finally:
            wire.close()

    def _start_message(self) -> Message:
        headers = {
            "content-type": "text/event-stream",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            **self._make_headers(),
        }
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        return {"type": "http.response.start", "status": 200, "headers": raw}


class _Wire:
    """What one task sends of a stream: frames as they come, the start before the first, a comment where none comes for long.

    One timer looks after all of it: a task, a timeout or a timer for each frame would cost more than the frame (benchmarks/LOG.md). A
    message that is not taken in time, or a comment that cannot be sent, cancels the task that made this (`failure`)."""

    def __init__(self, send: Send, make_start: Callable[[], Message], silences_s: tuple[float, float], write_timeout_s: float) -> None:
        """`silences_s`: how long nothing is said before the start (0: whoever makes this begins at once), and after it."""
        self._send, self._make_start, self._silences_s, self._write_timeout_s = send, make_start, silences_s, write_timeout_s
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._lock = asyncio.Lock()  # a comment may be under way
        self._comment: asyncio.Task[None] | None = None
        self._is_sending, self._since = False, self._loop.time()  # since when it sends, or does not
        self.has_begun = False
        self.failure: BaseException | None = None  # TimeoutError: the client takes nothing
        self._look_s = min(filter(None, (*silences_s, write_timeout_s)))
        self._timer = self._loop.call_later(self._look_s, self._look)

    async def send(self, frame: bytes, *, is_last: bool = False) -> None:
        """Send the start if that was not, and the frame unless it is empty. Raises `failure` if there is one."""
        await self._lock.acquire()  # `async with` would make two coroutines more for each frame
        try:
            if self.failure is not None:
                raise self.failure
            self._is_sending, self._since = True, self._loop.time()
            if not self.has_begun:
                self.has_begun = True
                await self._send(self._make_start())
                self._since = self._loop.time()  # the frame has its own time
            if frame or is_last:
                await self._send({"type": "http.response.body", "body": frame, "more_body": not is_last})
        finally:
            self._is_sending, self._since = False, self._loop.time()
            self._lock.release()

    def close(self) -> None:
        """Say no more by itself."""
        self._timer.cancel()
        if self._comment is not None:
            self._comment.cancel()

    @property
    def _silence_s(self) -> float:
        return self._silences_s[self.has_begun]

    def _look(self) -> None:
        now, due_at = self._loop.time(), self._since + (self._write_timeout_s if self._is_sending else self._silence_s)
        if now >= due_at and self._is_sending:
            self._fail(TimeoutError())
            return
        if now >= due_at:
            self._comment = self._loop.create_task(self.send(KEEP_ALIVE if self.has_begun else b""))
            self._comment.add_done_callback(self._end_comment)
            due_at = now + self._silences_s[1]
        self._timer = self._loop.call_at(min(due_at, now + self._look_s), self._look)

    def _end_comment(self, comment: asyncio.Task[None]) -> None:
        if not comment.cancelled() and (error := comment.exception()) is not None:
            self._fail(error)

    def _fail(self, failure: BaseException) -> None:
        self.failure = failure
        self._task.cancel()
        self.close()  # a comment that hangs would hold what the task may still want to send
