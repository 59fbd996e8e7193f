"""The API's hold on the engine process: started, watched, started again; requests go in, outputs come out.

Owns the subprocess and the map from request id to whoever waits for it: every submitted request ends in one terminal output or one
ServerError, also when the engine dies. Knows no HTTP and nothing about tokens. api.generation submits; api.health asks how it is.
"""

import asyncio
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from server.api.outcome import unless_failed
from server.errors import Overloaded, ServerError, Unavailable
from server.ipc.messages import (
    Abort,
    AdapterEvent,
    Died,
    Forget,
    FromEngine,
    Heartbeat,
    Pin,
    Prefetch,
    Ready,
    Shutdown,
    Starting,
    StepOutputs,
    Submit,
    Unpin,
)
from server.ipc.sockets import EngineSocket, PeerLost
from server.metrics import Metrics
from server.types import EngineOptions, EngineRequest, SequenceOutput

log = logging.getLogger(__name__)

ENGINE_COMMAND = (sys.executable, "-m", "server.engine")
_STATES = ("absent", "loading", "host", "device", "failed")
_MAX_BACKOFF_S = 60.0
_STOP_TIMEOUT_S = 10.0
_WATCH_EVERY_S = 0.25


class EngineClient:
    """One engine process. `on_fatal` is called with the reason if it could not start and never could before: trying again would not help,
    unless it returns True."""

    def __init__(
        self,
        options: EngineOptions,
        metrics: Metrics,
        *,
        max_open: int,
        start_timeout_s: float = 1800.0,
        heartbeat_timeout_s: float = 5.0,
        hang_timeout_s: float = 60.0,
        backoff_s: float = 1.0,
        command: Sequence[str] = ENGINE_COMMAND,
        on_fatal: Callable[[str], bool | None] = lambda reason: None,
    ) -> None:
        self._options, self._metrics, self._command, self._on_fatal = options, metrics, tuple(command), on_fatal
        self._max_open, self._backoff_s = max_open, backoff_s
        self._start_timeout_s, self._heartbeat_timeout_s, self._hang_timeout_s = start_timeout_s, heartbeat_timeout_s, hang_timeout_s
        self._open: dict[str, asyncio.Queue[SequenceOutput | ServerError]] = {}
        self._socket: EngineSocket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._became_ready = asyncio.Event()
        self._stopping = False
        self._phase, self._started_at, self._heard_at = "not started", 0.0, 0.0
        self._heartbeat: Heartbeat | None = None
        self._death = ""
        self.ready: Ready | None = None
        self.last_ready: Ready | None = None  # of the engine before, while a new one starts
        self.on_ready: Callable[[], None] = lambda: None
        self.on_lost: Callable[[], None] = lambda: None  # it was started, and has ended
        self.on_adapter: Callable[[AdapterEvent], None] = lambda event: None

    # -- life ---------------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine in the background; `ready` is set once it takes requests."""
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def wait_ready(self) -> Ready:
        """What the engine said when it became ready, now or soon."""
        await self._became_ready.wait()
        assert self.last_ready is not None
        return self.last_ready

    def unhealthy_reason(self) -> str | None:
        """None while the engine answers and its step loop moves on; else why not."""
        now = time.monotonic()
        if self.ready is None:
            return f"the engine is not ready ({self._phase})"
        if self._process is not None and self._process.returncode is not None:
            return "the engine has ended"
        if (silent_s := now - self._heard_at) > self._heartbeat_timeout_s:
            return f"the engine has been silent for {silent_s:.0f} s"
        beat = self._heartbeat
        if beat is not None and beat.phase_deadline_at is not None and now > beat.phase_deadline_at:
            return f"the engine is stuck in phase '{beat.phase}'"
        return None

    @property
    def stats(self) -> Heartbeat | None:
        """The last heartbeat."""
        return self._heartbeat

    @property
    def device(self) -> str:
        """Its GPU as this process counts them (the engine sees no other, and calls it cuda:0), or what it chose."""
        return self._options.device if self._options.device != "auto" or self.last_ready is None else self.last_ready.device

    async def stop(self) -> None:
        """Stop the engine and end open requests."""
        self._stopping = True
        try:
            if self._socket is not None:
                with suppress(PeerLost):
                    self._socket.send(Shutdown())
            if self._process is not None and self._process.returncode is None:
                if self.ready is None:
                    self._process.terminate()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_STOP_TIMEOUT_S):
                        await self._process.wait()
            if self._supervisor is not None:
                self._supervisor.cancel()
                await asyncio.wait({self._supervisor})
        finally:
            self.fail_open(Unavailable("the server is shutting down"))

    async def _supervise(self) -> None:
        backoff_s = self._backoff_s
        while not self._stopping:
            was_up_at = time.monotonic()
            try:
                reason = await self._run_engine()
            except Exception as error:  # whatever it is, the requests that wait must end
                log.exception("the engine's supervisor failed")
                reason = f"the engine could not be started ({type(error).__name__})"
            if self._stopping:
                return
            log.error("engine on %s: %s; %d open requests failed", self.device, reason, len(self._open))
            self.fail_open(Unavailable(f"the engine stopped while this request was open ({reason}); try again", retry_after_s=backoff_s))
            if self.last_ready is None:
                self._phase = reason
                if not self._on_fatal(reason):
                    return
            backoff_s = self._backoff_s if time.monotonic() - was_up_at > _MAX_BACKOFF_S else min(backoff_s * 2, _MAX_BACKOFF_S)
            self._phase = f"{reason}; starting again in {backoff_s:.0f} s"
            await asyncio.sleep(backoff_s)

    async def _run_engine(self) -> str:
        """One life of the engine; returns why it ended."""
        folder = Path(tempfile.mkdtemp(prefix="manylora-"))
        self._death, self._phase = "", "starting"
        self._started_at = time.monotonic()
        socket: EngineSocket | None = None
        tasks: list[asyncio.Task[str]] = []
        try:
            socket = EngineSocket(f"ipc://{folder}/engine-0.sock")
            options = folder / "options.json"
            options.write_bytes(msgspec.json.encode(self._options))
            process = await asyncio.create_subprocess_exec(
                *self._command,
                "--address",
                socket.address,
                "--options",
                str(options),
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip  (its own session: Ctrl-C is for the API, which drains first)
            self._socket, self._process = socket, process
            self._metrics.engine_starts.inc()
            tasks = [asyncio.create_task(work) for work in (self._listen(socket), self._watch(), self._wait_exit(process))]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            self.ready = self._heartbeat = self._socket = None
            self._metrics.engine_up.set(0)
            self.on_lost()
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            if self._process is not None and self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
            if socket is not None:
                socket.close()
            shutil.rmtree(folder, ignore_errors=True)

    async def _wait_exit(self, process: asyncio.subprocess.Process) -> str:
        code = await process.wait()
        await asyncio.sleep(0.1)  # its last message may still be on the way
        return self._death or (f"the engine was killed by signal {-code}" if code < 0 else f"the engine exited with status {code}")

    async def _watch(self) -> str:
        """Ends when the engine has to be killed."""
        sick_since: float | None = None
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            now = time.monotonic()
            if self.ready is None:
                if now - self._started_at > self._start_timeout_s:
                    return f"the engine was not ready after {self._start_timeout_s:.0f} s ({self._phase})"
                continue
            reason = self.unhealthy_reason()
            self._metrics.engine_up.set(reason is None)
            sick_since = None if reason is None else sick_since or now
            if sick_since is not None and now - sick_since > self._hang_timeout_s:
                return reason or ""

    # -- messages -----------------------------------------------------------------------------------------------------------------

    async def _listen(self, socket: EngineSocket) -> str:
        while True:
            try:
                message = await socket.receive()
            except msgspec.ValidationError as error:
                return f"the engine speaks another version ({error})"
            self._heard_at = time.monotonic()
            self._take(message)

    def _take(self, message: FromEngine) -> None:
        match message:
            case StepOutputs(outputs=outputs):
                for output in outputs:
                    if (waiting := self._open.get(output.request_id)) is not None:
                        waiting.put_nowait(output)
            case Heartbeat(stats=stats):
                self._heartbeat = message
                self._metrics.observe_engine(msgspec.structs.asdict(stats))
            case Starting(phase=phase, elapsed_s=elapsed_s):
                self._phase = phase
                log.info("engine on %s: %s (%.1f s)", self.device, phase, elapsed_s)
            case Ready():
                self.ready = self.last_ready = message
                self._phase = "ready"
                self._became_ready.set()
                self._metrics.engine_up.set(1)
                self.on_ready()
                log.info("engine ready on %s after %.1f s", self.device, time.monotonic() - self._started_at)
            case AdapterEvent(state=state, load_s=load_s):
                self.on_adapter(message)
                if state in ("host", "device") and load_s:
                    self._metrics.adapter_load.labels(tier=state).observe(load_s)
                self._metrics.adapter_states.labels(state=state if state in _STATES else "failed").inc()
            case Died(reason=reason):
                self._death = f"the engine stopped: {reason}"

    def fail_open(self, error: ServerError) -> None:
        """End every open request with `error`."""
        for waiting in self._open.values():
            waiting.put_nowait(error)

    def tell(self, message: Prefetch | Forget | Pin | Unpin) -> None:
        """Send what needs no answer. Without effect while there is no engine."""
        if self.ready is not None and self._socket is not None:
            with suppress(PeerLost):
                self._socket.send(message)

    async def submit(self, request: EngineRequest) -> AsyncGenerator[SequenceOutput, None]:
        """The outputs of one sequence; the last one has a finish_reason "length" or "stop". Closing the generator aborts the sequence.

        Unavailable without an engine or when it dies, Overloaded when too many are open, or what failed in the engine."""
        if self.ready is None or self._socket is None:
            raise Unavailable(self.unhealthy_reason() or "no engine", retry_after_s=5.0)
        if len(self._open) >= self._max_open:
            raise Overloaded()
        socket = self._socket
        waiting = self._open[request.request_id] = asyncio.Queue()
        ended = False
        try:
            socket.send(Submit(request))
            while not ended:
                output = await waiting.get()
                ended = isinstance(output, ServerError) or output.finish_reason is not None
                yield unless_failed(output)
        except PeerLost:
            ended = True
            raise Unavailable("the engine is gone; try again", retry_after_s=1.0) from None
        finally:
            del self._open[request.request_id]
            if not ended and socket is self._socket:
                with suppress(PeerLost):
                    socket.send(Abort([request.request_id]))
