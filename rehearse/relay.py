"""Hands connections on between TCP and Unix sockets: the one way in and out of an instance's network namespace.

Addresses are `host:port` or a path. Standard library alone. `Relays` runs them in a thread, in the rehearsal and inside an instance.
"""

import asyncio
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_CHUNK = 1 << 16


class Relays:
    """{listen: connect}, each a TCP address or the path of a Unix socket; up when the constructor returns. OSError if one cannot listen."""

    def __init__(self, pairs: Mapping[str, str]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        for listen, connect in pairs.items():
            asyncio.run_coroutine_threadsafe(_listen(listen, connect), self._loop).result(10)

    def close(self) -> None:
        """Ends every connection."""
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _listen(listen: str, connect: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        _KEPT.add(task)
        task.add_done_callback(_KEPT.discard)
        with suppress(asyncio.CancelledError):  # at the relay's end; the stream's own callback cannot take it
            await hand_on(reader, writer)

    async def hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if _is_path(connect):
                others = await asyncio.open_unix_connection(connect)
            else:
                host, port = connect.rsplit(":", 1)
                others = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()  # nobody is there: the caller's connection breaks, as with an instance that is gone
            return
        try:
            await asyncio.gather(_pump(reader, others[1]), _pump(others[0], writer))
        finally:
            for side in (writer, others[1]):
                side.transport.abort() if side.transport.is_closing() else side.close()

    if _is_path(listen):
        Path(listen).unlink(missing_ok=True)
        server = await asyncio.start_unix_server(serve, listen)
    else:
        host, port = listen.rsplit(":", 1)
        server = await asyncio.start_server(serve, host, int(port))
    task = asyncio.get_running_loop().create_task(server.serve_forever())
    task.set_name(listen)
    _KEPT.add(task)
    task.add_done_callback(_KEPT.discard)


_KEPT: set[asyncio.Task[None]] = set()  # the loop itself holds tasks weakly


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _is_path(address: str) -> bool:
    return address.startswith("/")
