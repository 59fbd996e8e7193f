"""The two ends of the wire between the API process and one engine process: ipc.messages over ZeroMQ on a unix socket.

Owns framing, threads and the noticing of a lost peer. It does not know what the messages mean, nor who starts whom. A pair of
one-way sockets hangs off one address ("<address>.to-engine", "<address>.to-api"), so that the engine may send from several
threads while its main thread waits to receive. An address serves one engine's life: a restarted engine gets a new one, and no
message of the old one can reach it. The API calls EngineSocket, the engine ApiSocket.
"""

import ctypes
import signal
import sys
import threading
import time

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from server.ipc.messages import FromEngine, ToEngine, decode_from_engine, decode_to_engine, encode

_TO_ENGINE = ".to-engine"
_TO_API = ".to-api"
_PR_SET_PDEATHSIG = 1
_FIRST_SEND_MS = 200


class PeerLost(ConnectionError):
    """The process at the other end is gone, or never came."""


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux; elsewhere the lost socket must do). Call it first thing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _open(context: zmq.Context, kind: int) -> zmq.Socket:
    socket = context.socket(kind)
    socket.set_hwm(0)  # the API bounds what is in flight; a limit here could only block a step or lose a message
    socket.linger = 0
    return socket


class EngineSocket:
    """The API's end (asyncio). Binds when made, so that the engine can connect whenever it is up."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._context = zmq.asyncio.Context()
        self._in = _open(self._context, zmq.PULL)
        self._in.bind(address + _TO_API)
        self._out_context = zmq.Context()  # not asyncio's: sending never waits
        self._out = _open(self._out_context, zmq.PUSH)
        self._out.bind(address + _TO_ENGINE)
        self._has_sent = False

    def send(self, message: ToEngine) -> None:
        """Send without waiting. PeerLost if no engine is connected."""
        # Its first message may come a moment before its other connection is up; after that there is nothing to wait for.
        if not self._has_sent:
            self._out.poll(_FIRST_SEND_MS, zmq.POLLOUT)
        try:
            self._out.send(encode(message), zmq.NOBLOCK)
        except zmq.ZMQError:
            raise PeerLost("no engine is connected") from None
        self._has_sent = True

    async def receive(self) -> FromEngine:
        """The next message. msgspec.ValidationError if the engine speaks another version."""
        return decode_from_engine(await self._in.recv())  # type: ignore[misc]  # pyzmq's own types forget the asyncio socket

    def close(self) -> None:
        """Drop both sockets and what is still queued in them."""
        self._context.destroy(linger=0)
        self._out_context.destroy(linger=0)


class ApiSocket:
    """The engine's end (blocking). `send` may be called from any thread, `receive` and `close` only from the one that owns it."""

    def __init__(self, address: str, *, connect_timeout_s: float = 30.0) -> None:
        self._context = zmq.Context()
        self._in = _open(self._context, zmq.PULL)
        self._monitor = self._in.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._in.connect(address + _TO_ENGINE)
        self._out = _open(self._context, zmq.PUSH)
        self._out.connect(address + _TO_API)
        self._send_lock = threading.Lock()
        self._poller = zmq.Poller()
        self._poller.register(self._in, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._connected = False
        self._give_up_at = time.monotonic() + connect_timeout_s

    def send(self, message: FromEngine) -> None:
        """Send without waiting. Any thread."""
        data = encode(message)
        with self._send_lock:
            if not self._out.closed:
                self._out.send(data)

    def receive(self, timeout_s: float = 0.0) -> list[ToEngine]:
        """All messages that are there, waiting at most `timeout_s` for the first. PeerLost when the API is gone."""
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        if self._monitor in ready:
            self._watch_peer()
        if not self._connected and time.monotonic() > self._give_up_at:
            raise PeerLost("the API did not answer on the socket")
        messages = []
        while True:
            try:
                messages.append(decode_to_engine(self._in.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def _watch_peer(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_DISCONNECTED:
                raise PeerLost("the API closed the socket")
            self._connected = True

    def close(self, *, linger_s: float = 1.0) -> None:
        """Close, giving the last messages `linger_s` to leave."""
        with self._send_lock:
            self._in.disable_monitor()
            self._monitor.close(0)
            self._in.close(0)
            self._out.close(int(linger_s * 1000))
        self._context.term()
