"""The activation of a gated MLP, silu(gate) * up, in Triton: with the deltas of both added as they are read, or of a product that is whole.

Two thirds of a layer's columns are gate and up. Where their deltas are tensors of their own, each is written and read once for nothing but
this sum; here they never leave the registers. Ranks, tiles and planes are those of grouped_programs.py; gated_kernels.py launches it.
"""

import triton
import triton.language as tl

from server.kernels.grouped import DESC_WIDTH, NONE, SITE_WIDTH
from server.kernels.grouped_programs import _parts, _place, _sum_planes

_DESC_WIDTH, _SITE_WIDTH, _NONE = tl.constexpr(DESC_WIDTH), tl.constexpr(SITE_WIDTH), tl.constexpr(NONE)


@triton.jit
def _silu_mul(gate, up):
    """In float32, as the activation's own kernel would have it."""
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _add_delta(
    value, arena, first_b, b, bias, h, planes, positions, live, r_start, rank, scale, n, inside, num_rows, parts,
    WIDTH: tl.constexpr, RANK_CAP: tl.constexpr, SPLIT: tl.constexpr, BLOCK_R: tl.constexpr, DOT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """value [BLOCK_M, BLOCK_N] plus a site's delta in columns n, in float32; h and first_b: of the first BLOCK_R ranks."""
    acc = tl.dot(h, first_b.to(DOT), input_precision="ieee")
    r = tl.arange(0, BLOCK_R)
    for r0 in range(BLOCK_R, rank, BLOCK_R):
        more = r0 + r < rank
        b_more = tl.load(b + (r0 + r).to(tl.int64)[:, None] * WIDTH + n[None, :], mask=more[:, None] & inside[None, :], other=0.0)
        h_more = _sum_planes(planes, positions, r_start + r0 + r, live[:, None] & more[None, :], num_rows, parts, RANK_CAP, SPLIT)
        acc = tl.dot(h_more.to(arena.dtype.element_ty).to(DOT), b_more.to(DOT), acc, input_precision="ieee")
    value = value.to(tl.float32) + scale * acc
    if bias >= 0:
        value += tl.load(_place(arena, 0, bias, ALIGNED) + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit
def _site(arena, base, entry, ALIGNED: tl.constexpr):
    """(r_start, rank, where B lies, scale, where the bias lies in the arena or -1) of a site."""
    is_live = base >= 0
    r_start = tl.load(entry, mask=is_live, other=0).to(tl.int32)
    rank = tl.load(entry + 1, mask=is_live, other=0).to(tl.int32) - r_start
    b = _place(arena, base, tl.load(entry + 2, mask=is_live, other=0), ALIGNED)
    scale = tl.load(entry + 3, mask=is_live, other=0).to(tl.int32).to(tl.float32, bitcast=True)
    bias = tl.load(entry + 5, mask=is_live, other=-1)
    return r_start, rank, b, scale, tl.where(bias >= 0, base + bias, -1)


@triton.jit(do_not_specialize=["group", "num_tiles", "num_rows"])
def gate_kernel(
    y, arena, planes, tile_base, tile_start, tile_len, row_ids, group, num_tiles, num_rows, y_stride, out,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr, RANK_CAP: tl.constexpr, SPLIT: tl.constexpr, MANY: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, DOT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """out[row, n] = silu(y[row, n] + the gate's delta) * (y[row, WIDTH + n] + up's delta), for every row of the live tiles.

    CHUNKS: chunks of CHUNK blocks of columns; gains do not count. What a block reads is asked for a block ahead: nothing else would hide
    how long the memory takes, since one program's registers leave room for one more on its SM (2.8 times as fast on an H100, LOG.md)."""
    parts = _parts(tile_base, num_tiles, SPLIT, MANY)
    item = tl.program_id(0)
    base = tl.load(tile_base + item // CHUNKS)
    while base != _NONE:
        tile = item // CHUNKS
        m, r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
        live = m < tl.load(tile_len + tile)
        positions = tl.load(tile_start + tile) + m
        rows = tl.load(row_ids + positions, mask=live, other=0).to(tl.int64)
        n = item % CHUNKS * CHUNK * BLOCK_N + tl.arange(0, BLOCK_N)
        at, to = y + rows[:, None] * y_stride + n[None, :], out + rows[:, None] * WIDTH + n[None, :]
        mask = live[:, None] & (n < WIDTH)[None, :]
        gate, up = tl.load(at, mask=mask, other=0.0), tl.load(at + WIDTH, mask=mask, other=0.0)
        entry = (arena + base).to(tl.pointer_type(tl.int64), bitcast=True) + group * _DESC_WIDTH + 2
        gate_start, gate_rank, gate_b, gate_scale, gate_bias = _site(arena, base, entry, ALIGNED)
        up_start, up_rank, up_b, up_scale, up_bias = _site(arena, base, entry + _SITE_WIDTH, ALIGNED)
        b_at = r.to(tl.int64)[:, None] * WIDTH + n[None, :]
        gate_r, up_r = r < gate_rank, r < up_rank
        b_gate = tl.load(gate_b + b_at, mask=gate_r[:, None] & (n < WIDTH)[None, :], other=0.0)
        b_up = tl.load(up_b + b_at, mask=up_r[:, None] & (n < WIDTH)[None, :], other=0.0)
        gate_h = _sum_planes(planes, positions, gate_start + r, live[:, None] & gate_r[None, :], num_rows, parts, RANK_CAP, SPLIT)
        up_h = _sum_planes(planes, positions, up_start + r, live[:, None] & up_r[None, :], num_rows, parts, RANK_CAP, SPLIT)
        gate_h, up_h = gate_h.to(arena.dtype.element_ty).to(DOT), up_h.to(arena.dtype.element_ty).to(DOT)
        for c in range(CHUNK):
            inside, skip = n < WIDTH, (c + 1) * BLOCK_N
            ahead = (n + BLOCK_N < WIDTH) & (c + 1 < CHUNK)
            mask = live[:, None] & ahead[None, :]
            next_gate, next_up = tl.load(at + skip, mask=mask, other=0.0), tl.load(at + WIDTH + skip, mask=mask, other=0.0)
            next_b_gate = tl.load(gate_b + b_at + skip, mask=gate_r[:, None] & ahead[None, :], other=0.0)
            next_b_up = tl.load(up_b + b_at + skip, mask=up_r[:, None] & ahead[None, :], other=0.0)
            gate = _add_delta(
                gate, arena, b_gate, gate_b, gate_bias, gate_h, planes, positions, live, gate_start, gate_rank, gate_scale, n, inside,
                num_rows, parts, WIDTH, RANK_CAP, SPLIT, BLOCK_R, DOT, ALIGNED,
            )  # fmt: skip
            up = _add_delta(
                up, arena, b_up, up_b, up_bias, up_h, planes, positions, live, up_start, up_rank, up_scale, n, inside,
                num_rows, parts, WIDTH, RANK_CAP, SPLIT, BLOCK_R, DOT, ALIGNED,
            )  # fmt: skip
            tl.store(to + c * BLOCK_N, _silu_mul(gate, up).to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])
            gate, up, b_gate, b_up = next_gate, next_up, next_b_gate, next_b_up
            n += BLOCK_N
        item += tl.num_programs(0)
        base = tl.load(tile_base + item // CHUNKS, mask=item < num_tiles * CHUNKS, other=-1)


@triton.jit
def silu_mul_kernel(y, out, y_stride, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[row, n] = silu(y[row, n]) * y[row, WIDTH + n]: a program for a row's block of columns."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = y + row * y_stride + n
    gate, up = tl.load(at, mask=n < WIDTH, other=0.0).to(tl.float32), tl.load(at + WIDTH, mask=n < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + n, _silu_mul(gate, up).to(out.dtype.element_ty), mask=n < WIDTH)
