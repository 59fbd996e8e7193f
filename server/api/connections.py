"""Connections that end: uvicorn's protocol with a bound on how long a request's head may take and how long it may be, and the kernel's own
bounds on a peer that is gone without a word or takes nothing.

Owns no request. uvicorn bounds idle connections alone; api.body bounds the body's time, api.stream each write. api.serving uses both.
"""

import asyncio
import os
import socket
import sys

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10
HEAD_S = 75.0  # a request's head, from the connection's beginning or its own first byte
_PROBE_AFTER_S, _PROBE_EVERY_S, _NUM_PROBES = 60, 15, 4  # of a silent peer: gone for sure after two minutes


class BoundedConnection(HttpToolsProtocol):
    """As uvicorn's; closed if a request's head is not there in HEAD_S, or is too long."""

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first request's head is awaited from now on."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on; a head that goes on and on is answered 431."""
        if self._head_timer is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_timer is not None and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()

    def on_message_begin(self) -> None:
        """A request's first bytes: its head is awaited."""
        super().on_message_begin()
        if self._head_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._stop_waiting()
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_S, self._end_if_waiting)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_if_waiting(self) -> None:
        self._head_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._await_head()  # an earlier request of this connection is still answered
        elif not self.transport.is_closing():
            self.transport.abort()


def bound_listener(listener: int, write_timeout_s: float) -> None:
    """Set on the listening descriptor what its connections inherit (Linux): a peer that acknowledges nothing, or has no room, for
    `write_timeout_s` is given up, and a silent one is probed."""
    if sys.platform != "linux":
        return
    with socket.socket(fileno=os.dup(listener)) as duplicate:
        if duplicate.family not in (socket.AF_INET, socket.AF_INET6):
            return
        duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_KEEPIDLE, _PROBE_AFTER_S),
            (socket.TCP_KEEPINTVL, _PROBE_EVERY_S),
            (socket.TCP_KEEPCNT, _NUM_PROBES),
            (socket.TCP_USER_TIMEOUT, int(write_timeout_s * 1000)),
        ):
            duplicate.setsockopt(socket.IPPROTO_TCP, option, value)
