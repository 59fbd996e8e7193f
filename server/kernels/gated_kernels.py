"""The activation of a gated MLP (gated_programs.py) on tensors: checked and launched with a card's choices.

Needs Triton. Called by model/ for the products of gate and up where layers are compiled; `gate_reference` says what it computes.
"""

import torch
import torch.nn.functional as F
import triton

from server.kernels.gated_programs import gate_kernel, silu_mul_kernel
from server.kernels.grouped import GroupShape, Tiles, apply_group_reference, check_rows
from server.kernels.grouped_kernels import Call, common_options, launch_call
from server.kernels.launch import Choice

_SILU_BLOCK = 1024


def is_gated(shape: GroupShape) -> bool:
    """Whether a group may be gate and up: two sites as wide as each other."""
    return len(shape.columns) == 2 and shape.columns[0][1] * 2 == shape.out_features


def gate_reference(
    y: torch.Tensor, x: torch.Tensor, arena: torch.Tensor, shape: GroupShape, tiles: Tiles, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The meaning of shrink and `gate`: y [rows, 2 width], x [rows, in] -> [rows, width], computed in `dtype`."""
    whole = y.to(dtype, copy=True)
    apply_group_reference(whole, x, arena, shape, tiles, dtype)
    gate, up = whole.chunk(2, dim=1)
    return F.silu(gate) * up


def gate_call(
    y: torch.Tensor, arena: torch.Tensor, shape: GroupShape, tiles: Tiles, scratch: torch.Tensor, choice: Choice, out: torch.Tensor
) -> Call:
    """What `gate` launches."""
    check_rows(y, shape.out_features, arena, tiles, scratch, choice.block_m, choice.split_k)
    width = shape.out_features // 2
    if not is_gated(shape) or out.shape != (len(y), width) or out.dtype != y.dtype or not out.is_contiguous():
        raise ValueError(
            f"out: {out.dtype} {list(out.shape)} of columns {shape.columns}; expected contiguous {y.dtype} [{len(y)}, {width}]"
        )
    num_tiles = tiles.tile_base.numel()
    chunks = triton.cdiv(width, choice.gate_block_n * choice.gate_chunk)
    options = common_options(arena, shape, choice._replace(pdl=False))
    options.pop("PDL")
    return Call(
        gate_kernel,
        chunks,
        0,  # a program for each chunk of each tile
        (y, arena, scratch, *tiles[:4], shape.index, num_tiles, scratch.shape[1], y.stride(0), out, width, chunks),
        dict(
            RANK_CAP=scratch.shape[2], SPLIT=choice.split_k, MANY=choice.many_tiles, BLOCK_M=tiles.block_m, BLOCK_N=choice.gate_block_n,
            CHUNK=choice.gate_chunk, BLOCK_R=choice.expand_block_r, num_warps=choice.gate_warps, num_stages=choice.expand_stages, **options,
        ),
    )  # fmt: skip


def gate(
    y: torch.Tensor, arena: torch.Tensor, shape: GroupShape, tiles: Tiles, scratch: torch.Tensor, choice: Choice, out: torch.Tensor
) -> None:
    """silu(gate) * up of the product y [rows, 2 width] with the deltas of shrink's scratch, into out [rows, width]; in rows of live tiles.

    Gains, which scale y itself, do not count. ValueError if shapes and types do not fit each other."""
    launch_call(gate_call, y, arena, shape, tiles, scratch, choice, out)


_prepared: dict[tuple, tuple] = {}


def silu_mul(y: torch.Tensor) -> torch.Tensor:
    """y [rows, 2 width], its columns adjacent -> silu(gate) * up [rows, width], computed in float32. ValueError of another shape."""
    if y.ndim != 2 or y.shape[1] % 2 or y.stride(1) != 1:
        raise ValueError(f"y: {list(y.shape)} with strides {y.stride()}; expected [rows, 2 width] with adjacent columns")
    width = y.shape[1] // 2
    out = torch.empty(y.shape[0], width, dtype=y.dtype, device=y.device)
    grid = (len(y), triton.cdiv(width, _SILU_BLOCK), 1)
    if not len(y):
        return out
    key = (width, y.dtype, y.stride(0), y.data_ptr() % 16, y.device.index)
    if (compiled := _prepared.get(key)) is None:  # launched directly from then on, as in grouped_kernels
        compiled = silu_mul_kernel[grid](y, out, y.stride(0), WIDTH=width, BLOCK_N=_SILU_BLOCK, num_warps=4)
        if not triton.knobs.runtime.interpret:
            _prepared[key] = compiled
    else:
        compiled[grid](y, out, y.stride(0), width, _SILU_BLOCK)
    return out
