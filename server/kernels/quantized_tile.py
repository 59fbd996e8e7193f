"""Products of a tile of rows with a quantized weight: tiles of codes are unpacked in registers and multiplied by the tensor cores.

The weight is the left operand: its tiles stay in the registers that they were unpacked in, and x goes through shared memory. Scales are
applied to the sums of a group, or (`scaled`) to the numbers. K may be cut into parts whose sums are planes, which a second launch adds up,
or (`join`) the program of a tile that comes last: in one order either way.
Needs Triton. Called by quantized_kernels.py, which says what is computed.
"""

import torch
import triton
import triton.language as tl

from server.kernels.quantized import UNIT, QuantizedWeight, table_on
from server.kernels.quantized_launch import Tile
from server.kernels.quantized_unpack import numbers_of, scale_of

TILES = 4096  # tiles of a product whose programs may be counted
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit(do_not_specialize=["M", "PER"])
def _tile_4bit(
    x, words, scales, zeros, table, bias, out, y, counts, M, N, K, PER, x_stride,
    GROUP: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr,
    HAS_ZEROS: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, TABLE: tl.constexpr, ASM: tl.constexpr, AHEAD: tl.constexpr,
    SCALED: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """A tile of y = x W^T + bias, or of a plane of partial sums: out [parts of K, M, N]; JOIN (the number of parts): and of y, by the
    program that comes last. W is the left operand: its tiles stay in registers as they were unpacked, x goes through shared memory."""
    UNITS, GROUPS = (K + 127) // 128, K // GROUP
    PARTS: tl.constexpr = 128 // GROUP if GROUP < 128 else 1
    FIELDS: tl.constexpr = 8 // PARTS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    plane = tl.program_id(2)
    n_in, m_in, wide, c = n < N, m < M, n.to(tl.int64), tl.arange(0, 16)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if AHEAD:
        s, z = scale_of(scales, zeros, wide, n_in, plane * PER * 128 // GROUP, GROUPS, HAS_ZEROS)
    for unit in range(plane * PER, min(plane * PER + PER, UNITS)):
        w = tl.load(words + wide[:, None] * (UNITS * 16) + (unit * 16 + c)[None, :], mask=n_in[:, None], other=0)
        w = w.to(tl.uint32, bitcast=True)
        if AHEAD:  # the next unit's are asked for before this one's are used: small loads are not made ahead by themselves
            next_s, next_z = scale_of(scales, zeros, wide, n_in, (unit + 1) * 128 // GROUP, GROUPS, HAS_ZEROS)
        for part in tl.static_range(PARTS):
            if part > 0:
                s, z = scale_of(scales, zeros, wide, n_in, unit * PARTS + part, GROUPS, HAS_ZEROS)
            elif not AHEAD:
                s, z = scale_of(scales, zeros, wide, n_in, unit * 128 // GROUP, GROUPS, HAS_ZEROS)
            numbers = numbers_of(w, z[:, None], s[:, None], table, DOT, WHOLE, SCALED, TABLE, ASM)
            d = acc if SCALED else tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for in_part in tl.static_range(FIELDS):
                k = unit * 128 + 16 * (part * FIELDS + in_part) + c
                x_in = m_in[None, :] if EVEN else m_in[None, :] & (k < K)[:, None]
                x_tile = tl.load(x + m.to(tl.int64)[None, :] * x_stride + k[:, None], mask=x_in, other=0.0)  # [16, m]
                d = tl.dot(numbers[part * FIELDS + in_part], x_tile.to(DOT), d, input_precision="ieee")
            acc = d if SCALED else acc + s[:, None] * d
        if AHEAD:
            s, z = next_s, next_z
    _store_tile(out, bias, acc, n, m, n_in, m_in, plane, M, N, HAS_BIAS and JOIN == 0)
    if JOIN > 0:
        _join_planes(out, y, bias, counts, n, m, n_in, m_in, M, N, JOIN, HAS_BIAS)


@triton.jit(do_not_specialize=["M", "PER"])
def _tile_8bit(
    x, data, scales, bias, out, M, N, K, PER, x_stride,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """As _tile_4bit, for numbers of 8 bits with one scale a row."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    plane = tl.program_id(2)
    n_in, m_in = n < N, m < M
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(plane * PER, min(plane * PER + PER, (K + BLOCK_K - 1) // BLOCK_K)):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        w_in = n_in[:, None] if EVEN else n_in[:, None] & (k < K)[None, :]
        x_in = m_in[None, :] if EVEN else m_in[None, :] & (k < K)[:, None]
        w = tl.load(data + n.to(tl.int64)[:, None] * K + k[None, :], mask=w_in, other=0.0)
        x_tile = tl.load(x + m.to(tl.int64)[None, :] * x_stride + k[:, None], mask=x_in, other=0.0)
        acc = tl.dot(w.to(DOT), x_tile.to(DOT), acc, input_precision="ieee")
    acc *= tl.load(scales + n, mask=n_in, other=0.0).to(tl.float32)[:, None]
    _store_tile(out, bias, acc, n, m, n_in, m_in, plane, M, N, HAS_BIAS)


@triton.jit
def _store_tile(out, bias, acc, n, m, n_in, m_in, plane, M, N, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n_in, other=0.0).to(tl.float32)[:, None]
    at = (plane.to(tl.int64) * M + m[None, :]) * N + n[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=n_in[:, None] & m_in[None, :])


@triton.jit
def _join_planes(planes, y, bias, counts, n, m, n_in, m_in, M, N, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Of the programs of a tile the one that comes last sums the planes, in their order, into y. It leaves the count at nought."""
    count = counts + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.debug_barrier()  # every thread has stored its part before one of them says so
    if tl.atomic_add(count, 1, sem="acq_rel") == SPLIT - 1:
        at, inside = m[None, :].to(tl.int64) * N + n[:, None], n_in[:, None] & m_in[None, :]
        total = tl.load(planes + at, mask=inside, other=0.0, cache_modifier=".cg")  # others' sums: from L2, where they wrote them
        for plane in tl.static_range(1, SPLIT):
            total += tl.load(planes + plane * M.to(tl.int64) * N + at, mask=inside, other=0.0, cache_modifier=".cg")
        if HAS_BIAS:
            total += tl.load(bias + n, mask=n_in, other=0.0).to(tl.float32)[:, None]
        tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)
        tl.store(count, 0)


@triton.jit
def _sum_planes(planes, bias, y, size, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    """y [size] = sum of planes [SPLIT, size] + bias, in the planes' order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(planes + at, mask=inside, other=0.0)
    for plane in tl.static_range(1, SPLIT):
        total += tl.load(planes + plane * size.to(tl.int64) + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


_counts: dict[torch.device, torch.Tensor] = {}


def _counts_on(device: torch.device) -> torch.Tensor:
    """Noughts int32 [TILES], which every product that uses them leaves so. Products on one device come one after the other."""
    if device not in _counts:
        _counts[device] = torch.zeros(TILES, dtype=torch.int32, device=device)
    return _counts[device]


def tile(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, y: torch.Tensor, choice: Tile) -> None:
    (m, n), split = y.shape, choice.split_k
    grid = (triton.cdiv(n, choice.block_n), triton.cdiv(m, choice.block_m), split)
    out = y if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=y.device)
    a_bias, interpreted = y if bias is None else bias, triton.knobs.runtime.interpret
    common = {
        "BLOCK_M": choice.block_m, "BLOCK_N": choice.block_n,
        # The interpreter multiplies bfloat16 as if it were integers.
        "DOT": tl.float32 if interpreted and x.dtype == torch.bfloat16 else TYPES[x.dtype],
        "num_warps": choice.warps, "num_stages": choice.stages,
    }  # fmt: skip
    k, depth = weight.in_features, 64 if weight.bits == 8 else UNIT
    per, even = triton.cdiv(triton.cdiv(k, depth), split), k % depth == 0
    join = choice.join and split > 1 and weight.bits == 4 and grid[0] * grid[1] <= TILES
    if weight.bits == 8:
        _tile_8bit[grid](
            x, weight.data, weight.scales, a_bias, out, m, n, k, per, x.stride(0), BLOCK_K=depth, EVEN=even,
            HAS_BIAS=bias is not None and split == 1, **common,
        )  # fmt: skip
    else:
        asm = weight.code == "int4" and x.dtype != torch.float32 and not interpreted
        _tile_4bit[grid](
            x, weight.data, weight.scales, weight.scales if weight.zeros is None else weight.zeros, table_on(x.device), a_bias, out, y,
            _counts_on(x.device) if join else out, m, n, k, per, x.stride(0), GROUP=weight.group, EVEN=even,
            HAS_ZEROS=weight.zeros is not None, WHOLE=weight.integer_zeros, TABLE=weight.code == "nf4", ASM=asm, AHEAD=choice.ahead,
            SCALED=choice.scaled, JOIN=split if join else 0, HAS_BIAS=bias is not None and (split == 1 or join), **common,
        )  # fmt: skip
    if split > 1 and not join:
        _sum_planes[(triton.cdiv(m * n, 1024),)](out, a_bias, y, m * n, n, SPLIT=split, BLOCK=1024, HAS_BIAS=bias is not None, num_warps=4)
