"""An engine process without a model: speaks ipc.messages over the real socket and answers with the prompt's own tokens, over and over.

An adapter turns the prompt around. A control file (JSON, read each turn) makes it slow, bundle tokens, fall silent, hang or die, or gives
the token ids to answer with, once; what it was told goes to a log file, one JSON line a message. `of` in the control file is for the
engine on that device alone.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from server.adapters.pack import read_header
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
from server.types import AdapterRef, BaseLayout, EngineOptions, EngineRequest, Logprob, Module, SequenceOutput, Site

HIDDEN = 8
SITE = "model.layers.0.self_attn.q_proj"


def layout(vocab_size: int, fingerprint: str = "f" * 64) -> BaseLayout:
    """One layer with one linear: enough for an adapter to be packed."""
    site = Site(SITE, "linear", HIDDEN, HIDDEN)
    names = ["", "model", "model.layers", "model.layers.0", "model.layers.0.self_attn", SITE]
    modules = [
        Module(name, "Linear" if name == SITE else "Container", {"weight": [HIDDEN, HIDDEN]} if name == SITE else {}) for name in names
    ]
    return BaseLayout(
        fingerprint=fingerprint, model_type="llama", num_layers=1, vocab_size=vocab_size, hidden_size=HIDDEN, tied_head=True,
        embedding="model.embed_tokens", head="lm_head", dtype="float32", sites=[site], modules=modules,
    )  # fmt: skip


@dataclass
class Running:
    request: EngineRequest
    tokens: list[int]
    once: bool = False  # the tokens are the whole answer
    num_sent: int = 0


@dataclass
class FakeEngine:
    socket: ApiSocket
    control_path: Path
    log_path: Path
    device: str
    running: dict[str, Running] = field(default_factory=dict)
    control: dict[str, Any] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)  # hash -> bytes
    num_steps: int = 0
    beat_at: float = 0.0

    def run(self) -> int:
        while True:
            self._read_control()
            if "exit" in self.control and self.running:
                return int(self.control["exit"])
            for message in self.socket.receive(0.001 if self.running else 0.01):
                if isinstance(message, Shutdown):
                    return 0
                self._take(message)
            self._beat()
            if self.running and not self.control.get("hang"):
                self._step()
                time.sleep(self.control.get("step_s", 0.0))

    def _read_control(self) -> None:
        try:
            control = json.loads(self.control_path.read_text() or "{}")
            self.control = control | control.pop("of", {}).get(self.device, {})
        except (FileNotFoundError, ValueError):
            self.control = {}

    def _take(self, message: ToEngine) -> None:
        seen: dict[str, Any] = {"kind": type(message).__name__, "device": self.device}
        if isinstance(message, Submit):
            request = message.request
            self.socket.send(Accepted([request.request_id]))
            seen |= msgspec.to_builtins(request, str_keys=True)
            tokens = request.token_ids[::-1] if request.adapter is not None else request.token_ids
            answer = self.control.get("answer")
            self.running[request.request_id] = Running(request, tokens if answer is None else answer, once=answer is not None)
            if request.adapter is not None:
                self._hold(request.adapter)
        elif isinstance(message, Abort):
            seen["request_ids"] = message.request_ids
            for request_id in message.request_ids:
                if self.running.pop(request_id, None) is not None:
                    self.socket.send(StepOutputs([SequenceOutput(request_id, finish_reason="aborted")]))
        elif isinstance(message, Prefetch | Pin):
            seen["hash"] = message.adapter.hash
            self._hold(message.adapter)
        elif isinstance(message, Forget):
            seen |= {"hash": message.hash, "running": [one.request.adapter.hash for one in self.running.values() if one.request.adapter]}
            if self.held.pop(message.hash, None):
                self.socket.send(AdapterEvent(message.hash, "absent"))
        elif isinstance(message, Unpin):
            seen["hash"] = message.hash
        with self.log_path.open("a") as log:
            log.write(json.dumps(seen) + "\n")

    def _hold(self, adapter: AdapterRef) -> None:
        """As the real engine: read the pack, tell where the adapter is; a refusal if the control file says so."""
        if adapter.hash in self.held:
            return
        if "refuse_adapters" in self.control:
            self.socket.send(AdapterEvent(adapter.hash, "failed", error=self.control["refuse_adapters"]))
            return
        assert read_header(Path(adapter.path))[0].hash == adapter.hash  # never another's weights, whatever the API says
        self.held[adapter.hash] = Path(adapter.path).stat().st_size
        self.socket.send(AdapterEvent(adapter.hash, "loading"))
        self.socket.send(AdapterEvent(adapter.hash, "host", self.held[adapter.hash], 0.001))

    def _beat(self) -> None:
        now = time.monotonic()
        if now < self.beat_at or self.control.get("silent"):
            return
        self.beat_at = now + 0.1
        stats = EngineStats(num_running=len(self.running), num_steps=self.num_steps, max_batch_size=4, num_adapters_host=len(self.held))
        hangs = self.control.get("hang")
        self.socket.send(Heartbeat(self.num_steps, "step" if hangs else "idle", now - 1 if hangs else None, stats))

    def _step(self) -> None:
        self.num_steps += 1
        outputs = []
        for request_id, one in list(self.running.items()):
            if "fail" in self.control:
                output = SequenceOutput(
                    request_id, finish_reason="error", error=self.control["fail"], error_kind=self.control["kind"],
                    error_param=self.control.get("param"),
                )  # fmt: skip
            else:
                output = self._advance(one)
            outputs.append(output)
            if output.finish_reason is not None:
                del self.running[request_id]
        self.socket.send(StepOutputs(outputs))

    def _advance(self, one: Running) -> SequenceOutput:
        params, output = one.request.params, SequenceOutput(one.request.request_id)
        if one.num_sent == 0:
            output.queued_s = 0.001
            if params.num_prompt_logprobs >= 0:
                output.prompt_logprobs = [
                    Logprob(id, None if n == 0 else -1.0 - n, [(id, -1.0 - n)][: params.num_prompt_logprobs])
                    for n, id in enumerate(one.request.token_ids)
                ]
        for _ in range(self.control.get("bundle", 1)):
            id = one.tokens[one.num_sent % len(one.tokens)]
            output.token_ids.append(id)
            if params.num_logprobs >= 0:
                # A sample's seed decides how likely it is, so that best_of has something to choose.
                value = -0.5 - (params.seed % 7)
                top = [(id, value)] + [(other, value - 1 - other) for other in range(params.num_logprobs)]
                output.logprobs.append(Logprob(id, value, top[: params.num_logprobs]))
            one.num_sent += 1
            if id in params.stop_token_ids or (one.once and one.num_sent == len(one.tokens)):
                output.finish_reason = "stop"
            elif one.num_sent >= params.max_new_tokens:
                output.finish_reason = "length"
            if output.finish_reason is not None:
                break
        return output


def main() -> int:
    die_with_parent()
    parser = argparse.ArgumentParser()
    for name in ("--address", "--options", "--control", "--log", "--vocab-size"):
        parser.add_argument(name, required=True)
    arguments = parser.parse_args()
    options = msgspec.json.decode(Path(arguments.options).read_bytes(), type=EngineOptions)
    socket = ApiSocket(arguments.address)
    engine = FakeEngine(socket, Path(arguments.control), Path(arguments.log), options.device)
    engine._read_control()
    with engine.log_path.open("a") as log:
        log.write(json.dumps({"kind": "Start", "device": options.device, "pid": os.getpid()}) + "\n")
    try:
        socket.send(Starting("load", 0.0))
        if "refuse" in engine.control:
            socket.send(Died(engine.control["refuse"]))
            return 3
        fingerprint = engine.control.get("fingerprint", "f" * 64)
        socket.send(
            Ready(
                layout=layout(int(arguments.vocab_size), fingerprint), device="cpu", max_sequence_len=options.max_sequence_len,
                block_size=options.block_size, num_blocks=100, adapter_bytes=1 << 20, start_s={"load": 0.0}, versions={"fake": "1"},
            )
        )  # fmt: skip
        return engine.run()
    except PeerLost:
        return 0
    finally:
        socket.close()


if __name__ == "__main__":
    sys.exit(main())
