"""uvicorn with our end: SIGTERM drains, a second signal or the drain's timeout stops, an engine that cannot start stops too. SIGUSR1
before it announces it to load balancers: /health is 503 from then on, and everything else is answered as before; for five minutes, if no
SIGTERM follows.

Owns the order of the end: new requests 503 while the port still answers, running ones finish, then the port closes, then the engine stops.
`server.__main__` runs it.
"""

import asyncio
import logging
import signal
import threading
from types import FrameType

import uvicorn

from server.api.app import make_app
from server.api.connections import BoundedConnection, bound_listener
from server.api.state import Api
from server.errors import SHUTTING_DOWN, Unavailable

log = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 5
_LEAVE_S = 300.0  # whoever announced the end and did not bring it has died, or has been stopped


class DrainingServer(uvicorn.Server):
    """Serves `api` until it is told to stop; `exit_code` is then what the process should return."""

    def __init__(self, api: Api) -> None:
        super().__init__(
            uvicorn.Config(
                make_app(api),
                host=api.settings.hostname,
                port=api.settings.port,
                log_config=None,
                access_log=False,
                server_header=False,
                http=BoundedConnection,
                timeout_keep_alive=api.settings.idle_connection_s,
                timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
            )
        )
        self.exit_code = 0
        self._api = api
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self._lapse: asyncio.TimerHandle | None = None

    async def _serve(self, sockets: list | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():  # as uvicorn does with its own signals
            self._loop.add_signal_handler(signal.SIGUSR1, self.leave)
        await super()._serve(sockets)

    async def startup(self, sockets: list | None = None) -> None:
        """Listen, within bounds."""
        await super().startup(sockets=sockets)
        for server in self.servers:
            for listener in server.sockets:
                bound_listener(listener.fileno(), self._api.settings.write_timeout_s)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one stops at once."""
        if self._loop is None or self._api.admission.draining:
            self.should_exit = True
            return
        self._api.admission.draining = True
        log.info("draining: running requests have %.0f s", self._api.settings.drain_timeout_s)
        self._loop.call_soon_threadsafe(self._start_drain)

    def leave(self) -> None:
        """A load balancer is to let go of this server while it still serves."""
        log.info("leaving: /health is 503, requests are still taken")
        assert self._loop is not None
        self._api.admission.leaving = True
        self._loop.call_soon_threadsafe(self._start_lapse)

    def _start_lapse(self) -> None:
        assert self._loop is not None
        if self._lapse is not None:
            self._lapse.cancel()
        self._lapse = self._loop.call_later(_LEAVE_S, self._stay)

    def _stay(self) -> None:
        if not self._api.admission.draining:
            log.warning("nothing came of it in %.0f s; /health is true again", _LEAVE_S)
            self._api.admission.leaving = False

    def _start_drain(self) -> None:
        self._drain = asyncio.create_task(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        if not await self._api.admission.drain(self._api.settings.drain_timeout_s):
            log.warning("requests are still running after the drain's timeout; they are ended")
            ending = Unavailable(SHUTTING_DOWN, retry_after_s=5.0)
            self._api.engine.fail_open(ending)
            if not await self._api.admission.drain(1.0):
                self._api.admission.end_all(ending)  # those that are not yet with the engine
                await self._api.admission.drain(1.0)
        self.should_exit = True

    def on_fatal(self, reason: str) -> None:
        """The engine cannot start."""
        log.error("cannot serve: %s", reason)
        self.exit_code = 1
        self.should_exit = True
