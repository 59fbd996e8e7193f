"""What the device is run with, and how its memory is divided: every "auto" of EngineOptions that is not the model's, resolved once.

Owns the choice between the plain path (torch alone: the CPU's) and the GPU's (arena, Triton, FlashInfer, compiled layers, graphs).
"""

import importlib.util
import logging
from dataclasses import dataclass
from functools import partial

import psutil
import torch

from server.engine.beside import Beside
from server.engine.captures import MAX_MIXED_ROWS, decode_sizes
from server.engine.tiling import Tiling
from server.memory.arena import Arena
from server.model import kv_dtype
from server.model.attention import PagedAttention
from server.model.base import BaseModel
from server.model.fastest import use_fastest
from server.model.flashinfer import FlashInferAttention, why_not
from server.types import EngineOptions
from sizing import budget

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backends:
    """What was chosen."""

    kernels: str
    attention: str
    compile_layers: bool
    cuda_graphs: bool
    overlap: bool
    kv_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Memory:
    """How the memory is divided."""

    num_blocks: int
    block_elements: int  # of one KV block, padded to the arena's alignment
    adapter_device_bytes: int
    adapter_host_bytes: int


def choose_backends(base: BaseModel, options: EngineOptions) -> Backends:
    """Resolve the options for this model on this device. ValueError names what was asked for and cannot be had."""
    on_gpu = base.device.type == "cuda"
    kept_in = kv_dtype.dtype_of(options.kv_cache_dtype, base.dtype)
    kv_dtype.check_card(kept_in, base.device)
    kernels = options.kernels if options.kernels != "auto" else "triton" if on_gpu and importlib.util.find_spec("triton") else "torch"
    reason = why_not(base.attention_shapes, base.dtype, base.device) if kernels == "triton" else "it needs the arena of kernels 'triton'"
    if options.attention == "flashinfer" and reason is not None:
        raise ValueError(f"attention 'flashinfer' cannot be used: {reason}")
    flashinfer = reason is None and options.attention != "sdpa"
    if on_gpu and not flashinfer:
        log.warning("attention is torch's own over gathered pages, which cannot be captured: %s", reason or "asked for")
    compiled = on_gpu and kernels == "triton" if options.compile_layers is None else options.compile_layers
    if compiled and kernels != "triton":
        raise ValueError("compile_layers needs kernels 'triton': what is compiled calls them as operators")
    if compiled and not len(base.layers):
        log.warning("the decoder's layers are not in a ModuleList; they are not compiled")
        compiled = False
    graphs = flashinfer if options.cuda_graphs is None else options.cuda_graphs
    if graphs and not flashinfer:
        raise ValueError(f"cuda_graphs need attention 'flashinfer', which cannot be used: {reason or 'asked for sdpa'}")
    overlap = on_gpu if options.overlap is None else options.overlap
    return Backends(kernels, "flashinfer" if flashinfer else "sdpa", compiled, graphs, overlap, kept_in)


def divide(base: BaseModel, options: EngineOptions, backends: Backends) -> Memory:
    """Bytes for KV blocks and adapters, on the device and the host, by sizing's arithmetic."""
    item_bytes, layout = base.dtype.itemsize, base.layout
    block_bytes = budget.block_bytes(PagedAttention.num_bytes(base.attention_shapes, 1, backends.kv_dtype), options.block_size)
    free = free_bytes(base.device)
    host_bytes = options.adapter_host_bytes or psutil.virtual_memory().available // 4
    if backends.kernels == "torch":
        shares = budget.share_apart(free, block_bytes, options)
    else:
        if base.device.type == "cuda":
            widths = budget.Widths(max(shape.out_features for shape in base.group_shapes), layout.hidden_size, layout.vocab_size)
            workspace = _workspace_bytes(base, options, backends)
            free -= budget.set_aside(widths, options, item_bytes, workspace, graphs=backends.cuda_graphs).total
        else:
            free //= 4
        shares = budget.share_arena(free, block_bytes, options)
    return Memory(shares.num_blocks, block_bytes // item_bytes, shares.adapter_bytes, host_bytes)


def use_arena(base: BaseModel, options: EngineOptions, backends: Backends, memory: Memory) -> tuple[Arena, Tiling]:
    """Allocate the arena, and connect the model's attention and groups to it."""
    arena = Arena(memory.num_blocks, memory.block_elements, base.dtype, base.device)
    keys, values, offset = [], [], 0
    for shape in base.attention_shapes:
        for pages, dim in ((keys, shape.key_dim), (values, shape.value_dim)):
            pages.append(arena.pages(offset, (options.block_size, shape.num_kv_heads, dim), backends.kv_dtype))
            offset += options.block_size * shape.num_kv_heads * dim
    if backends.attention == "flashinfer":
        max_pages = options.max_batch_size * (-(-options.max_sequence_len // options.block_size) + 1)  # of a decode step
        workspace = _workspace_bytes(base, options, backends)
        attention = FlashInferAttention(base.attention_shapes, keys, values, options.block_size, max_pages, base.dtype, workspace)
        base.attach_attention(attention)
    else:
        base.attach_attention(PagedAttention(base.attention_shapes, keys, values))
    tiling = Tiling(base.state, arena.data, options.max_batch_tokens)
    base.use_operators(tiling, compile_layers=backends.compile_layers)
    if base.device.type == "cuda":
        tiling.warm_up(base.group_shapes)
        base.warm_up(options.max_batch_tokens)
        if backends.cuda_graphs:
            grouped = [group for group in base.groups if group.key is not None]
            row_counts = [size.num_rows for size in decode_sizes(options.max_batch_size)]
            beside = partial(Beside, tiling, base.state, arena.data)
            use_fastest(grouped, row_counts, beside, max_trials_s=options.kernel_trials_s)
    return arena, tiling


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be taken on the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading left behind is free too
    return psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def _workspace_bytes(base: BaseModel, options: EngineOptions, backends: Backends) -> int:
    """FlashInfer's workspace."""
    if not backends.cuda_graphs:
        return budget.WORKSPACE_BYTES
    num_sms = torch.cuda.get_device_properties(base.device).multi_processor_count
    return budget.workspace_bytes(base.attention_shapes, min(options.max_batch_tokens, MAX_MIXED_ROWS), options.max_batch_size, num_sms)
