"""From EngineOptions to an EngineCore: device and dtype chosen, the base loaded, memory divided. Every "auto" is resolved here, once.

Used by the engine process, and by scripts and benchmarks that want the engine without HTTP.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from server.engine.core import EngineCore, run_until_idle
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.memory.blocks import BlockPool
from server.memory.tiers import AdapterTiers
from server.model.adapter import read_adapter
from server.model.attention import PagedAttention
from server.model.base import BaseModel
from server.model.load import load_base
from server.types import EngineOptions, EngineRequest, SamplingParams

log = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_engine(
    options: EngineOptions,
    on_phase: Callable[[str], None] = lambda phase: None,
    on_adapter: Callable[[str, str, int, float, str | None], None] = lambda *_: None,
) -> tuple[EngineCore, BaseModel, dict[str, float]]:
    """The engine, its base model, and seconds by phase of the start. ValueError names the option that cannot be met."""
    phases: dict[str, float] = {}

    def timed(name: str, work: Callable):
        on_phase(name)
        started_at = time.monotonic()
        result = work()
        phases[name] = time.monotonic() - started_at
        return result

    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    device = torch.device(options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    dtype = _DTYPES.get(options.dtype, torch.float32 if device.type == "cpu" else torch.bfloat16)
    base = timed(
        "load",
        lambda: load_base(Path(options.model_dir), dtype, device, allow_unverified_architecture=options.allow_unverified_architecture),
    )
    core = timed("allocate", lambda: assemble(base, options, on_adapter))
    timed("warm_up", lambda: _warm_up(core, base))
    return core, base, phases


def assemble(base: BaseModel, options: EngineOptions, on_adapter: Callable[..., None] = lambda *_: None) -> EngineCore:
    """Divide the memory and connect the parts. ValueError names the option that cannot be met."""
    max_positions = getattr(base.config, "max_position_embeddings", None)
    if max_positions is not None and options.max_sequence_len > max_positions:
        raise ValueError(f"max_sequence_len {options.max_sequence_len} is beyond the model's {max_positions} positions")
    if options.max_batch_tokens < options.max_batch_size:
        raise ValueError(f"max_batch_tokens {options.max_batch_tokens} must be at least max_batch_size {options.max_batch_size}")
    num_blocks = _num_blocks(base, options)
    if num_blocks * options.block_size < options.max_sequence_len:
        raise ValueError(
            f"the cache holds {num_blocks} blocks of {options.block_size} tokens, fewer than one sequence of max_sequence_len "
            f"{options.max_sequence_len} tokens needs"
        )
    base.attach_cache(num_blocks, options.block_size)
    free_bytes = _free_bytes(base.device)
    layout = base.layout
    tiers = AdapterTiers(
        read=lambda ref: read_adapter(ref, layout.fingerprint, layout.dtype),
        place=base.place,
        host_bytes=options.adapter_host_bytes or psutil.virtual_memory().available // 4,
        device_bytes=options.adapter_device_bytes or free_bytes // 4,
        on_event=on_adapter,
    )
    pool = BlockPool(num_blocks, options.block_size)
    scheduler = Scheduler(
        pool,
        tiers,
        max_batch_tokens=options.max_batch_tokens,
        max_batch_size=options.max_batch_size,
        max_sequence_len=options.max_sequence_len,
        vocab_size=lambda adapter_hash: tiers.on_device(adapter_hash).vocab_size if adapter_hash else layout.vocab_size,
        prefix_caching=options.prefix_caching,
        base_revision=options.revision or base.revision,
    )
    return EngineCore(scheduler, Runner(base, tiers), tiers, pool)


def _free_bytes(device: torch.device) -> int:
    return psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def _num_blocks(base: BaseModel, options: EngineOptions) -> int:
    if options.num_blocks is not None:
        return options.num_blocks
    block_bytes = PagedAttention.num_bytes(base.attention_shapes, options.block_size, base.dtype)
    if options.kv_cache_bytes is not None:
        return options.kv_cache_bytes // block_bytes
    # A quarter of what is free, but no more than all sequences of a full batch could use.
    useful = options.max_batch_size * -(-options.max_sequence_len // options.block_size)
    return max(1, min(useful, _free_bytes(base.device) // 4 // block_bytes))


@torch.inference_mode()
def _warm_up(core: EngineCore, base: BaseModel) -> None:
    """One step through every part, so that the first request does not pay for lazy initialization."""
    core.add(EngineRequest("warm-up", [0] * min(8, base.layout.vocab_size), SamplingParams(max_new_tokens=2)))
    failed = [output.error for output in run_until_idle(core) if output.finish_reason == "error"]
    if failed:
        raise ValueError(f"the model does not run: {failed[0]}")
    core.num_steps = core.num_prompt_tokens = core.num_output_tokens = 0
