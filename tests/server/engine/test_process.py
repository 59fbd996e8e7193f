"""The engine process from outside, over its real socket: starts, answers, beats, is aborted, shut down, orphaned, misconfigured."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import msgspec
import pytest

from server.engine.build import build_engine
from server.engine.process import EngineLoop, Pulse, see_one_gpu
from server.ipc.messages import (
    Abort,
    Accepted,
    AdapterEvent,
    Died,
    EngineStats,
    Forget,
    Heartbeat,
    Prefetch,
    Ready,
    Shutdown,
    StepOutputs,
    Submit,
)
from server.ipc.sockets import EngineSocket
from server.types import AdapterRef, EngineOptions, EngineRequest, SamplingParams
from tests.server.engine.peft_oracle import pack, save_adapter
from tests.server.engine.tiny_models import make_model

# PEFT warns about what it saves and about tied weights; what it means here is what the tests compare.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(folder)
    return folder


class Engine:
    """The engine's process and the API's end of its socket."""

    def __init__(self, folder, model_dir, **changes):
        address = f"ipc://{folder}/s"
        options = dict(num_blocks=64, block_size=4, max_batch_size=8, max_sequence_len=100, num_threads=1)
        (folder / "options.json").write_bytes(msgspec.json.encode(EngineOptions(str(model_dir), **{**options, **changes})))
        self.socket = EngineSocket(address)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server.engine", "--address", address, "--options", str(folder / "options.json")]
        )
        self.beats: list[Heartbeat] = []

    async def receive(self, kind, timeout_s=60):
        """The next message of a kind; heartbeats are kept aside."""
        deadline = time.monotonic() + timeout_s
        while True:
            message = await asyncio.wait_for(self.socket.receive(), max(0.01, deadline - time.monotonic()))
            if isinstance(message, Heartbeat):
                self.beats.append(message)
            if isinstance(message, kind):
                return message
            assert not isinstance(message, Died), message.reason

    async def finish(self, *names):
        """Outputs until each of `names` has ended."""
        outputs, open_names = [], set(names)
        while open_names:
            for output in (await self.receive(StepOutputs)).outputs:
                outputs.append(output)
                if output.finish_reason:
                    open_names.remove(output.request_id)
        return outputs

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.socket.close()


async def test_a_life(tmp_path, model_dir):
    engine = Engine(tmp_path, model_dir, kv_cache_dtype="fp8")
    try:
        ready = await engine.receive(Ready)
        assert ready.layout.model_type == "llama" and set(ready.start_s) == {"load", "allocate", "warm_up"}
        assert ready.versions["kv_cache_dtype"] == "float8_e4m3fn"
        ref = pack(save_adapter(tmp_path / "adapter", "llama"), ready.layout, tmp_path / "adapter.pack")
        params = SamplingParams(max_new_tokens=5)
        engine.socket.send(Prefetch(ref))
        states = [(await engine.receive(AdapterEvent)).state for _ in range(2)]
        assert states == ["loading", "host"]
        for name, adapter in (("base", None), ("adapted", ref), ("missing", AdapterRef("h", str(tmp_path / "none"), "none"))):
            engine.socket.send(Submit(EngineRequest(name, [5, 6, 7], params, adapter)))
        outputs = await engine.finish("base", "adapted", "missing")
        ends = {o.request_id: o.finish_reason for o in outputs if o.finish_reason}
        assert ends == {"base": "length", "adapted": "length", "missing": "error"}
        engine.socket.send(Submit(EngineRequest("too-long", [5] * 50, SamplingParams(max_new_tokens=300))))
        assert "do not fit" in (await engine.finish("too-long"))[0].error
        engine.socket.send(Submit(EngineRequest("left", [5, 6], SamplingParams(max_new_tokens=90))))
        await engine.receive(StepOutputs)
        engine.socket.send(Abort(["left"]))
        assert (await engine.finish("left"))[-1].finish_reason in ("aborted", "length")
        engine.beats.clear()
        while not engine.beats or engine.beats[-1].phase != "idle":
            await engine.receive(Heartbeat)
        stats = engine.beats[-1].stats
        assert engine.beats[-1].phase_deadline_at is None and stats.num_blocks_used == 0 and stats.num_adapters_device == 1
        engine.socket.send(Submit(EngineRequest("open", [5, 6], SamplingParams(max_new_tokens=90))))
        await engine.receive(StepOutputs)
        engine.socket.send(Shutdown())
        assert (await engine.finish("open"))[-1].finish_reason in ("aborted", "length")
        assert await asyncio.to_thread(engine.process.wait, 20) == 0
    finally:
        engine.close()


async def test_it_ends_with_the_api(tmp_path, model_dir):
    engine = Engine(tmp_path, model_dir)
    try:
        await engine.receive(Ready)
        engine.socket.close()  # as when the API's process is gone
        assert await asyncio.to_thread(engine.process.wait, 20) == 0
    finally:
        engine.close()


async def test_a_hung_step_is_seen_in_the_heartbeat(tmp_path, model_dir):
    """A stopped process does not beat at all; the API's rule is that a beat older than a few seconds is none."""
    engine = Engine(tmp_path, model_dir)
    try:
        await engine.receive(Ready)
        os.kill(engine.process.pid, signal.SIGSTOP)
        while True:  # what was on its way
            try:
                await engine.receive(Heartbeat, timeout_s=1.5)
            except TimeoutError:
                break
        os.kill(engine.process.pid, signal.SIGCONT)
        await engine.receive(Heartbeat)
    finally:
        engine.close()


def test_what_messages_ask_for_has_a_deadline_too_and_submits_are_confirmed_first():
    """An order that hangs (to free an adapter, say) is found out like a step that does."""
    seen, request = [], EngineRequest("r", [1], SamplingParams(max_new_tokens=1))

    class Socket:
        def receive(self, wait_s):
            return [Forget("h"), Submit(request), Shutdown()]

        def send(self, message):
            seen.append(message)

    class Core:
        has_work, num_steps, grammars, scheduler = False, 7, (), SimpleNamespace(num_waiting=0)
        tiers = SimpleNamespace(forget=lambda adapter_hash: seen.append((adapter_hash, pulse._phase, pulse._deadline_at is not None)))

        def num_to_capture(self, *, only_wanted):
            return 0

        def add(self, request):
            seen.append(request)

        def stats(self):
            return EngineStats()

        def abort_all(self): ...

        def take_outputs(self):
            return []

    socket = Socket()
    pulse = Pulse(SimpleNamespace(send=lambda beat: None))
    try:
        EngineLoop(socket, Core(), pulse).run()
    finally:
        pulse.stop()
    assert seen[:3] == [Accepted(["r"]), ("h", "messages", True), request]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(max_sequence_len=1000), "max_sequence_len 1000 is beyond the model's 128 positions"),
        (dict(num_blocks=3), "fewer than one sequence"),
        (dict(max_batch_tokens=4), "max_batch_tokens 4 must be at least max_batch_size 8"),
    ],
)
def test_options_that_cannot_be_met_are_named(model_dir, changes, reason):
    options = dict(num_blocks=64, block_size=4, max_batch_size=8, max_sequence_len=100) | changes
    with pytest.raises(ValueError, match=reason):
        build_engine(EngineOptions(str(model_dir), **options))


async def test_what_cannot_start_says_why(tmp_path):
    engine = Engine(tmp_path, "/nowhere")
    try:
        assert "there is no config.json" in (await engine.receive(Died)).reason
        assert await asyncio.to_thread(engine.process.wait, 20) == 1
    finally:
        engine.close()


@pytest.mark.parametrize(
    "device, visible, seen, called",
    [
        ("cuda:2", None, "2", "cuda:0"),
        ("cuda:1", "3,5", "5", "cuda:0"),
        ("cuda:0", "GPU-1a,GPU-2b", "GPU-1a", "cuda:0"),
        ("cuda:2", "3,5", "3,5", "cuda:2"),
        ("cuda", None, None, "cuda"),
        ("cpu", "1", "1", "cpu"),
    ],
)
def test_an_engine_sees_its_own_gpu_alone(device, visible, seen, called):
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert see_one_gpu(device, environment) == called and environment.get("CUDA_VISIBLE_DEVICES") == seen
