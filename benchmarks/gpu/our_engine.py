"""This repository's engine with a random base, called directly as the peers are. benchmarks.gpu.ours drives it."""

import time
from pathlib import Path

import msgspec
import torch

from benchmarks.gpu import random_base
from benchmarks.gpu.adapters import pack_adapters, write_adapters
from benchmarks.gpu.models import MODELS
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.workloads import AdapterSet, Case
from server.engine.build import build_engine
from server.engine.core import EngineCore, outputs_until_idle
from server.types import AdapterRef, EngineRequest, SamplingParams


def write_layout(plan: Plan) -> None:
    """Leave the base's layout where the plan wants it, without an engine."""
    device = torch.device(plan.device)
    base = random_base.random_base(Path(plan.model_dir), torch.float32 if device.type == "cpu" else torch.bfloat16, device)
    Path(plan.layout).write_bytes(msgspec.msgpack.encode(base.layout))


class OurEngine:
    """The engine with its packed adapters."""

    def __init__(self, plan: Plan) -> None:
        random_base.install()
        self.plan = plan
        self.core: EngineCore
        self.core, base, self.phases = build_engine(plan.engine_options(), on_phase=lambda phase: print(f"ours: {phase}", flush=True))
        while self.core.num_to_capture():  # a server does it while it has nothing else to do
            self.core.capture_more()
        self.weight_bytes = base.weight_bytes
        self._layout = msgspec.msgpack.encode(base.layout)
        Path(plan.layout).write_bytes(self._layout)
        self._refs: dict[str, list[AdapterRef]] = {}

    def prepare(self, adapters: AdapterSet) -> None:
        """Make the set's packs, if they are not there."""
        if adapters.name not in self._refs:
            folders = write_adapters(Path(self.plan.work), self.plan.model, adapters)
            packs = pack_adapters(folders, self._layout, Path(self.plan.work) / "packs")
            self._refs[adapters.name] = [AdapterRef(hash, str(path), path.name) for hash, path in packs]

    def run(self, case: Case, repeat: int) -> float:
        """Seconds from the first request in to the last token out. RuntimeError if a request did not get its tokens."""
        prompts = case.prompts(MODELS[self.plan.model]["vocab_size"], repeat)
        refs = self._refs[case.adapters.name] if case.adapters else []
        params = SamplingParams(max_new_tokens=case.num_new)
        started_at = time.perf_counter()
        for i, (prompt, pick) in enumerate(zip(prompts, case.picks(), strict=True)):
            self.core.add(EngineRequest(f"{case.name} {repeat} {i}", prompt, params, None if pick is None else refs[pick]))
        num_tokens, failed = 0, None
        for output in outputs_until_idle(self.core, self.plan.remaining_s()):  # none is kept, as in a server
            num_tokens += len(output.token_ids)
            failed = failed or (output.error if output.finish_reason not in (None, "length") else None)
        seconds = time.perf_counter() - started_at
        if failed:
            raise RuntimeError(f"{case.name}: {failed}")
        if num_tokens != case.num_output_tokens:
            raise RuntimeError(f"{case.name}: {num_tokens} tokens, not {case.num_output_tokens}")
        return seconds

    def stats(self) -> dict[str, int]:
        """The engine's counters since its start, and what it holds."""
        return msgspec.structs.asdict(self.core.stats())
