"""One case of benchmarks.gpu_memory, in a process of its own: start the engine, run full steps, say what each part took."""

import gc
import math
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from benchmarks.gpu import random_base
from benchmarks.gpu.adapters import pack_adapters, write_adapters
from benchmarks.gpu.workloads import prompts
from benchmarks.gpu_memory import CASES, options_of
from server.engine.build import build_engine
from server.engine.core import EngineCore, run_until_idle
from server.model.base import BaseModel
from server.types import AdapterRef, BaseLayout, EngineOptions, EngineRequest, SamplingParams

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_NUM_NEW = 4


class _Meter:
    """Bytes that torch's allocator has given out, and that are taken of the card by anybody. On a CPU: nought, and all memory."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self.on_gpu = self._device.type == "cuda"
        if self.on_gpu:
            torch.cuda.set_device(self._device.index or 0)
            torch.zeros(1, device=self._device).add_(1)  # brings CUDA up
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    @property
    def card(self) -> int:
        """What there is."""
        return torch.cuda.mem_get_info(self._device)[1] if self.on_gpu else psutil.virtual_memory().total

    @property
    def num_sms(self) -> int:
        """Streaming multiprocessors; on a CPU none."""
        return torch.cuda.get_device_properties(self._device).multi_processor_count if self.on_gpu else 0

    @property
    def taken(self) -> int:
        """What is not free of it."""
        if not self.on_gpu:
            return 0
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    @property
    def allocated(self) -> int:
        """What tensors hold."""
        if not self.on_gpu:
            return 0
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(self._device)

    def forget_peak(self) -> None:
        """Begin `peak` anew."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def peak(self) -> int:
        """The most that tensors held since `forget_peak`."""
        return torch.cuda.max_memory_allocated(self._device) if self.on_gpu else 0


def measure(model: str, device: str, work: Path) -> dict[str, Any]:
    """The case's row: options, card, bytes by part. RuntimeError if a request failed."""
    started_at, options, adapters = time.monotonic(), options_of(model), CASES[model].adapters
    meter = _Meter(device)
    context = meter.taken
    marks: dict[str, int] = {}

    def mark(phase: str) -> None:
        gc.collect()
        marks[phase] = meter.allocated
        print(f"{phase}: {time.monotonic() - started_at:.1f} s", flush=True)

    random_base.install()
    core, base, _ = build_engine(
        msgspec.convert(options | {"model_dir": str(work / "models" / model), "device": device}, EngineOptions), mark
    )
    while core.num_to_capture():
        core.capture_more()
    started = meter.allocated
    weights = marks["allocate"] - marks["load"] if meter.on_gpu else _weight_bytes(base.layout)
    arena = _arena_bytes(base)
    meter.forget_peak()
    _run_full_steps(core, base, model, work)
    stats, graphs = core.stats(), core.runner.graphs
    return {
        "model": model,
        "options": options,
        "adapters": {"rank": adapters.rank, "modules": adapters.modules, "count": stats.num_adapters_device},
        "card": meter.card,
        "num_sms": meter.num_sms,
        "reserved": {
            "weights": weights,
            "adapters": stats.adapter_bytes_device,
            "arena": arena,
            "context": context,
            "graphs": graphs.num_bytes if graphs else 0,
            "steps": max(0, meter.peak - weights - arena),  # workspaces and what steps hold at their peak
            "at rest": max(0, started - weights - arena),  # of that, what is held all the time
            "card taken": meter.taken,
        },
        "num_blocks": core.pool.num_blocks,
        "backends": {"attention": base.attention.name if base.attention else "", "cuda_graphs": graphs is not None},
        "seconds": round(time.monotonic() - started_at, 1),
    }


def _run_full_steps(core: EngineCore, base: BaseModel, model: str, work: Path) -> None:
    """A full batch of sequences whose prompts fill two steps, each sequence with one of the adapters, sampled as costs most."""
    adapters, scheduler = CASES[model].adapters, core.scheduler
    folders = write_adapters(work, model, adapters)
    packs = pack_adapters(folders, msgspec.msgpack.encode(base.layout), work / "packs")
    refs = [AdapterRef(hash, str(path), path.name) for hash, path in packs]
    longest = scheduler.max_sequence_len - _NUM_NEW
    prompt_len = max(2, min(longest, -(-2 * scheduler.max_batch_tokens // scheduler.max_batch_size)))
    params = SamplingParams(max_new_tokens=_NUM_NEW, temperature=0.8, top_p=0.9)
    for i, prompt in enumerate(prompts(scheduler.max_batch_size, prompt_len, base.layout.vocab_size, f"memory {model}")):
        core.add(EngineRequest(str(i), prompt, params, refs[i % len(refs)]))
    outputs = run_until_idle(core, 120.0)
    if failed := next((output.error for output in outputs if output.finish_reason not in (None, "length")), None):
        raise RuntimeError(f"{model}: {failed}")


def _arena_bytes(base: BaseModel) -> int:
    """Bytes of the memory that keys and values lie in: the arena's."""
    assert base.attention is not None
    storages = (tensor.untyped_storage() for tensor in (*base.attention.keys, *base.attention.values))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _weight_bytes(layout: BaseLayout) -> int:
    """Where torch's allocator does not count: the modules' parameters, by their shapes."""
    values = sum(math.prod(shape) for module in layout.modules for shape in module.parameters.values())
    return _ITEM_BYTES[layout.dtype] * (values - (layout.vocab_size * layout.hidden_size if layout.tied_head else 0))
