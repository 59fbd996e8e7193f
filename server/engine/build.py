"""From EngineOptions to an EngineCore: device and dtype chosen, the base loaded, memory divided. Every "auto" is resolved here, once.

Used by the engine process, and by scripts and benchmarks that want the engine without HTTP.
"""

import gc
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from server.engine.backends import choose_backends, divide, use_arena
from server.engine.core import EngineCore, run_until_idle
from server.engine.grammar import GrammarCompiler
from server.engine.grammar_queue import GrammarQueue
from server.engine.graphs import StepGraphs
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.memory.blocks import BlockPool
from server.memory.readers import Readers
from server.memory.slabs import HostSlabs
from server.memory.tier import Carrier
from server.memory.tiers import AdapterTiers
from server.model.adapter import read_adapter
from server.model.arena_adapters import ArenaCarrier
from server.model.base import BaseModel
from server.model.load import load_base
from server.types import EngineOptions, EngineRequest, SamplingParams

log = logging.getLogger(__name__)
RESERVED_HOST_BYTES = 8 << 30  # page-locked at the start
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
        lambda: load_base(
            Path(options.model_dir),
            dtype,
            device,
            allow_unverified_architecture=options.allow_unverified_architecture,
            quantize=options.quantize,
            quantize_head=options.quantize_head,
        ),
    )
    core = timed("allocate", lambda: assemble(base, options, on_adapter, on_phase))
    timed("warm_up", lambda: _warm_up(core, base))
    return core, base, phases


def assemble(
    base: BaseModel,
    options: EngineOptions,
    on_adapter: Callable[..., None] = lambda *_: None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> EngineCore:
    """Divide the memory and connect the parts. ValueError names the option that cannot be met."""
    max_positions = getattr(base.config, "max_position_embeddings", None)
    if max_positions is not None and options.max_sequence_len > max_positions:
        raise ValueError(f"max_sequence_len {options.max_sequence_len} is beyond the model's {max_positions} positions")
    if options.max_batch_tokens < options.max_batch_size:
        raise ValueError(f"max_batch_tokens {options.max_batch_tokens} must be at least max_batch_size {options.max_batch_size}")
    plan = choose_backends(base, options)
    log.info("backends: %s", plan)
    memory = divide(base, options, plan)
    if memory.num_blocks * options.block_size < options.max_sequence_len:
        raise ValueError(
            f"the cache holds {memory.num_blocks} blocks of {options.block_size} tokens, fewer than one sequence of max_sequence_len "
            f"{options.max_sequence_len} tokens needs"
        )
    pool = BlockPool(memory.num_blocks, options.block_size)
    arena, tiling = None, None
    if plan.kernels == "triton":
        arena, tiling = use_arena(base, options, plan, memory)
        slabs = HostSlabs(pinned=base.device.type == "cuda")
        if base.device.type == "cuda":  # beside the compilations; while requests are served, page-locking would hold up their launches
            reserved = min(memory.adapter_host_bytes, RESERVED_HOST_BYTES)
            threading.Thread(target=slabs.reserve, args=(reserved,), name="host-slabs", daemon=True).start()
        carrier = ArenaCarrier(base.layout, base.group_shapes, base.placer, arena, pool, slabs)
    else:
        base.attach_cache(memory.num_blocks, options.block_size, plan.kv_dtype)
        carrier = Carrier(lambda ref: read_adapter(ref, base.layout.fingerprint, base.layout.dtype), base.place)
    readers = partial(Readers, drop=carrier.leave_host, timeout_s=options.adapter_read_timeout_s)
    tiers = AdapterTiers(carrier, memory.adapter_host_bytes, memory.adapter_device_bytes, on_adapter, readers=readers)
    scheduler = Scheduler(
        pool,
        tiers,
        max_batch_tokens=options.max_batch_tokens,
        max_batch_size=options.max_batch_size,
        max_batch_adapters=options.max_batch_adapters,
        max_queue_s=options.max_queue_s,
        max_sequence_len=options.max_sequence_len,
        vocab_size=lambda adapter_hash: tiers.on_device(adapter_hash).vocab_size if adapter_hash else base.layout.vocab_size,
        prefix_caching=options.prefix_caching,
        base_revision=options.revision or base.revision,
        shares_memory=arena is not None,
    )
    graphs = None
    if plan.cuda_graphs:
        on_phase("capture")
        graphs = StepGraphs(base, tiling, options.max_batch_size, options.max_batch_tokens)
        graphs.capture()
    runner = Runner(base, tiers, tiling=tiling, graphs=graphs, defers=plan.overlap)
    grammars = GrammarQueue(GrammarCompiler(Path(options.model_dir), vocab_size=base.layout.vocab_size))
    return EngineCore(scheduler, runner, tiers, pool, grammars)


@torch.inference_mode()
def _warm_up(core: EngineCore, base: BaseModel) -> None:
    """Steps through every part, so that the first request does not pay for what is done at first use."""
    for prompt_len in (min(24, core.scheduler.max_sequence_len - 2), 1):
        tokens = [token % base.layout.vocab_size for token in range(max(1, prompt_len))]
        core.add(EngineRequest("warm-up", tokens, SamplingParams(max_new_tokens=2)))
        failed = [output.error for output in run_until_idle(core, timeout_s=1800) if output.finish_reason == "error"]
        if failed:
            raise ValueError(f"the model does not run: {failed[0]}")
    core.num_steps = core.num_prompt_tokens = core.num_output_tokens = core.scheduler.num_cached_tokens = 0
    gc.collect()
    gc.freeze()  # what is here stays: a collection in the middle of a step need not look at a million objects of torch's
