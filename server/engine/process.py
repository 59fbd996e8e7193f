"""The engine as a process: messages in from the API, one step at a time, messages out. No HTTP, no network.

Two threads beside the readers of adapters: the main one owns the engine; the other sends a heartbeat that says in which phase the main one
is and until when that may last, so that a hung step is told from a long one.
"""

import argparse
import logging
import sys
import threading
import time
from collections.abc import MutableMapping
from pathlib import Path

import msgspec
import torch
import transformers

from server.engine.build import build_engine
from server.engine.core import EngineCore
from server.ipc.messages import (
    Abort,
    Accepted,
    AdapterEvent,
    Died,
    EngineStats,
    Forget,
    Heartbeat,
    Pin,
    Prefetch,
    Ready,
    Shutdown,
    Starting,
    StepOutputs,
    Submit,
    ToEngine,
    Unpin,
)
from server.ipc.sockets import ApiSocket, PeerLost, die_with_parent
from server.types import EngineOptions

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
START_DEADLINE_S = 1800.0  # a large model from a cold disk
STEP_DEADLINE_S = 120.0
IDLE_WAIT_S = 0.2
CAPTURE_SHARE = 0.1  # of the time, at most, that steps wait for captures that they want
QUIET_S = 0.5  # with nothing to do, before others are captured: a client that asks again at once is not to wait for them


class Pulse:
    """What the heartbeat says. The main thread writes, the heartbeat's thread reads and sends."""

    def __init__(self, socket: ApiSocket) -> None:
        self._socket = socket
        self._lock = threading.Lock()
        self._step, self._phase, self._deadline_at, self._stats = 0, "start", time.monotonic() + START_DEADLINE_S, EngineStats()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def enter(self, phase: str, deadline_s: float | None, step: int = 0, stats: EngineStats | None = None) -> None:
        """The main thread is now in `phase`, for at most `deadline_s` seconds (None: as long as it likes)."""
        with self._lock:
            self._phase, self._step = phase, step
            self._deadline_at = None if deadline_s is None else time.monotonic() + deadline_s
            if stats is not None:
                self._stats = stats

    def stop(self) -> None:
        """Send no more."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with self._lock:
                beat = Heartbeat(self._step, self._phase, self._deadline_at, self._stats)
            self._socket.send(beat)


class EngineLoop:
    """Reads messages between steps and sends what each step brought as one message."""

    def __init__(self, socket: ApiSocket, core: EngineCore, pulse: Pulse) -> None:
        self.socket, self.core, self.pulse = socket, core, pulse
        self.stopped = False
        self._capture_at = self._quiet_at = 0.0  # monotonic seconds: no capture before, while there is something to do, and else

    def run(self) -> None:
        """Until Shutdown comes or the API is gone (PeerLost)."""
        next_stats_at = 0.0
        while not self.stopped:
            idle = not self.core.has_work
            # While adapters are read nothing else wakes the loop, so it looks more often.
            expects = bool(self.core.scheduler.num_waiting or len(self.core.grammars))
            busy = expects or not idle
            now = time.monotonic()
            captures = self.core.num_to_capture(only_wanted=busy) > 0 and now >= (self._capture_at if busy else self._quiet_at)
            if idle:
                self.pulse.enter("idle", None, self.core.num_steps, self.core.stats())
            if messages := self.socket.receive(0.0 if captures or not idle else 0.002 if expects else IDLE_WAIT_S):
                self._take(messages)
            if busy or messages:
                self._quiet_at = now + QUIET_S
            if captures and not self.stopped and (busy or not messages):
                self._capture(only_wanted=busy)
            if self.core.has_work and not self.stopped:
                now = time.monotonic()
                stats = None
                if now >= next_stats_at:
                    stats, next_stats_at = self.core.stats(), now + HEARTBEAT_S
                self.pulse.enter("step", STEP_DEADLINE_S, self.core.num_steps, stats)
                outputs = self.core.step()
                if outputs:
                    self.socket.send(StepOutputs(outputs))

    def _capture(self, *, only_wanted: bool) -> None:
        """Capture a step that is still missing."""
        started_at = time.monotonic()
        self.pulse.enter("capture", STEP_DEADLINE_S, self.core.num_steps)
        self.core.capture_more(only_wanted=only_wanted)
        now = time.monotonic()
        self._capture_at = now + (now - started_at) / CAPTURE_SHARE

    def _take(self, messages: list[ToEngine]) -> None:
        """Confirm what is submitted before anything is done about it, then do it; that must end in time as a step must."""
        if request_ids := [message.request.request_id for message in messages if isinstance(message, Submit)]:
            self.socket.send(Accepted(request_ids))
        self.pulse.enter("messages", STEP_DEADLINE_S, self.core.num_steps)
        for message in messages:
            self._handle(message)

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Submit(request):
                self.core.add(request)
            case Abort(request_ids):
                for request_id in request_ids:
                    self.core.abort(request_id)
            case Prefetch(adapter):
                self.core.tiers.prefetch(adapter)
            case Forget(adapter_hash):
                self.core.tiers.forget(adapter_hash)
            case Pin(adapter):
                self.core.tiers.want(adapter)
            case Unpin(adapter_hash):
                self.core.tiers.unwant(adapter_hash)
            case Shutdown():
                self.core.abort_all()
                self.socket.send(StepOutputs(self.core.take_outputs()))
                self.stopped = True


def serve(address: str, options: EngineOptions) -> int:
    """Start the engine and serve the API at `address`; the process's exit code."""
    socket = ApiSocket(address)
    pulse = Pulse(socket)
    started_at = time.monotonic()
    try:
        core, base, phases = build_engine(
            options,
            on_phase=lambda phase: socket.send(Starting(phase, time.monotonic() - started_at)),
            on_adapter=lambda *event: socket.send(AdapterEvent(*event)),
        )
        socket.send(
            Ready(
                layout=base.layout,
                device=str(base.device),
                max_sequence_len=options.max_sequence_len,
                block_size=options.block_size,
                num_blocks=core.pool.num_blocks,
                adapter_bytes=core.tiers.device.max_bytes,
                start_s=phases,
                versions={
                    "torch": str(torch.__version__),
                    "transformers": transformers.__version__,
                    "attention": base.attention.name,
                    "kv_cache_dtype": str(base.attention.keys[0].dtype).removeprefix("torch."),
                },
            )
        )
        EngineLoop(socket, core, pulse).run()
        core.grammars.close()
        core.tiers.close()
        return 0
    except PeerLost as lost:
        log.info("the API is gone (%s); stopping", lost)
        return 0
    except Exception as error:
        log.exception("the engine cannot go on")
        socket.send(Died(f"{type(error).__name__}: {error}" if isinstance(error, ValueError) else type(error).__name__))
        return 1
    finally:
        pulse.stop()
        socket.close()


def main(environment: MutableMapping[str, str]) -> int:
    """`python -m server.engine --address ADDRESS --options FILE`: started by the API, not by people."""
    die_with_parent()
    parser = argparse.ArgumentParser(prog="python -m server.engine", description="The engine process; the server starts it by itself.")
    parser.add_argument("--address", required=True, help="where the API listens: ipc://PATH")
    parser.add_argument("--options", required=True, type=Path, help="file with EngineOptions as JSON")
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s engine %(name)s %(message)s")
    transformers.utils.logging.disable_progress_bar()
    options = msgspec.json.decode(arguments.options.read_bytes(), type=EngineOptions)
    return serve(arguments.address, msgspec.structs.replace(options, device=see_one_gpu(options.device, environment)))


def see_one_gpu(device: str, environment: MutableMapping[str, str]) -> str:
    """Let `cuda:N` be the only GPU that this process sees, and say what it is called then. Before CUDA is used.

    Readers' threads, Triton and FlashInfer take the current device, which in a new thread is always the first one."""
    if not device.startswith("cuda:"):
        return device
    index = int(device.removeprefix("cuda:"))
    visible = [entry.strip() for entry in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    if visible and index >= len(visible):
        return device  # torch says that there is no such GPU
    environment["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else str(index)
    return "cuda:0"
