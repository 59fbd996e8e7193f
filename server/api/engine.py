"""The API's hold on the engine process: started, watched, started again; requests go in, outputs come out.

Owns the subprocess: every submitted request ends in one terminal output or one ServerError, also when the engine dies. Knows no HTTP and
nothing about tokens. api.generation submits; api.health asks how it is.
"""

import asyncio
import logging
import shutil
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from server.api.open_requests import NotTaken, OpenRequests
from server.api.outcome import unless_failed
from server.api.vitals import Vitals
from server.errors import SHUTTING_DOWN, Overloaded, ServerError, Unavailable
from server.ipc.messages import (
    Abort,
    Accepted,
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
_MAX_BACKOFF_S, _SERVED = 60.0, 4  # an engine that served for so many times the pause before it starts after the shortest one
_STOP_TIMEOUT_S = 10.0
_WATCH_EVERY_S = 0.25
_MAX_KILLED_STARTS = 3  # a signal is no fault of the configuration, unless it comes each time


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
        self._vitals = Vitals(start_timeout_s=start_timeout_s, heartbeat_timeout_s=heartbeat_timeout_s, hang_timeout_s=hang_timeout_s)
        self._open = OpenRequests()
        self._socket: EngineSocket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._became_ready = asyncio.Event()
        self._stopping = False
        self._phase, self._death, self._num_killed_starts = "not started", "", 0
        self.ready: Ready | None = None
        self.last_ready: Ready | None = None  # of the engine before, while a new one starts
        self.on_ready: Callable[[], None] = lambda: None
        self.on_lost: Callable[[], None] = lambda: None  # it was started, and has ended
        self.on_sick: Callable[[], None] = lambda: None  # it has just fallen silent, or is stuck
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
        if self.ready is None:
            return f"the engine is not ready ({self._phase})"
        if self._process is not None and self._process.returncode is not None:
            return "the engine has ended"
        return self._vitals.unhealthy_reason()

    @property
    def stats(self) -> Heartbeat | None:
        """The last heartbeat."""
        return self._vitals.heartbeat

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
            self.fail_open(Unavailable(SHUTTING_DOWN))

    async def _supervise(self) -> None:
        backoff_s = self._backoff_s
        while not self._stopping:
            try:
                reason = await self._run_engine()
            except Exception as error:  # whatever it is, the requests that wait must end
                log.exception("the engine's supervisor failed")
                reason = f"the engine could not be started ({type(error).__name__})"
            if self._stopping:
                return
            log.error("engine on %s: %s; %d open requests failed", self.device, reason, len(self._open))
            self._open.fail_not_taken(reason)
            self.fail_open(Unavailable(f"the engine stopped while this request was open ({reason}); try again", retry_after_s=backoff_s))
            if self.last_ready is None and not self._may_start_again():
                self._phase = reason
                if not self._on_fatal(reason):
                    return
            has_served = self._vitals.ready_s > _SERVED * backoff_s  # a crash now and then is no reason to stay away for long
            backoff_s = self._backoff_s if has_served else min(backoff_s * 2, _MAX_BACKOFF_S)
            self._phase = f"{reason}; starting again in {backoff_s:.0f} s"
            await asyncio.sleep(backoff_s)

    def _may_start_again(self) -> bool:
        """Whether it was killed before it ever was ready, for example by the kernel when memory is short, and not each time."""
        self._num_killed_starts += 1
        return (self._process.returncode or 0) < 0 and self._num_killed_starts < _MAX_KILLED_STARTS if self._process else False

    async def _run_engine(self) -> str:
        """One life of the engine; returns why it ended."""
        folder = Path(tempfile.mkdtemp(prefix="manylora-"))
        self._death, self._phase = "", "starting"
        self._vitals.begin()
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
            self.ready = self._vitals.heartbeat = self._socket = None
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
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            if self.ready is None:
                if (reason := self._vitals.why_not_started()) is not None:
                    return f"{reason} ({self._phase})"
                continue
            reason = self.unhealthy_reason()
            self._metrics.engine_up.set(reason is None)
            if self._vitals.note(reason):
                self.on_sick()
            if self._vitals.is_lost:
                return reason or ""

    # -- messages -----------------------------------------------------------------------------------------------------------------

    async def _listen(self, socket: EngineSocket) -> str:
        while True:
            try:
                message = await socket.receive()
            except msgspec.ValidationError as error:
                return f"the engine speaks another version ({error})"
            self._vitals.hear(message)
            self._take(message)

    def _take(self, message: FromEngine) -> None:
        match message:
            case StepOutputs(outputs=outputs):
                self._open.put(outputs)
            case Accepted(request_ids=request_ids):
                self._open.take(request_ids)
            case Heartbeat(stats=stats):
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
                log.info("engine ready on %s after %.1f s", self.device, self._vitals.age_s)
            case AdapterEvent(state=state, load_s=load_s):
                self.on_adapter(message)
                if state in ("host", "device") and load_s:
                    self._metrics.adapter_load.labels(tier=state).observe(load_s)
                self._metrics.adapter_states.labels(state=state if state in _STATES else "failed").inc()
            case Died(reason=reason):
                self._death = f"the engine stopped: {reason}"

    def fail_open(self, error: ServerError) -> None:
        """End every open request with `error`."""
        self._open.fail(error)

    def give_back(self, reason: str) -> None:
        """End with NotTaken those requests that the engine has not confirmed; should it wake up, it is told to drop them."""
        self._open.fail_not_taken(reason)

    def tell(self, message: Prefetch | Forget | Pin | Unpin) -> None:
        """Send what needs no answer. Without effect while there is no engine."""
        if self.ready is not None and self._socket is not None:
            with suppress(PeerLost):
                self._socket.send(message)

    async def submit(self, request: EngineRequest) -> AsyncGenerator[SequenceOutput, None]:
        """The outputs of one sequence; the last one has a finish_reason "length" or "stop". Closing the generator aborts the sequence.

        Unavailable without an engine or when it dies (NotTaken if it never had the request), Overloaded when too many are open, or what
        failed in the engine."""
        socket = self._socket
        if self.ready is None or socket is None:
            raise Unavailable(self.unhealthy_reason() or "no engine", retry_after_s=5.0)
        if len(self._open) >= self._max_open:
            raise Overloaded()
        waiting = self._open.open(request.request_id)
        ended = False
        try:
            socket.send(Submit(request))
            while not ended:
                output = await waiting.get()
                ended = not isinstance(output, NotTaken) if isinstance(output, ServerError) else output.finish_reason is not None
                yield unless_failed(output)
        except PeerLost:
            ended = True
            raise NotTaken("the engine is gone; try again", retry_after_s=1.0) from None
        finally:
            self._open.close(request.request_id)
            if not ended and socket is self._socket:
                with suppress(PeerLost):
                    socket.send(Abort([request.request_id]))
