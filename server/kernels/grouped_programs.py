"""What the grouped LoRA kernels do, in Triton: shrink (h = x A^T) and expand (y = gain y + scale h B + bias), one launch each a group.

Decode is bytes, not arithmetic: only live ranks are read, each once a tile; rows of the base are in no tile, or in ZERO tiles, which read
no factors. K is cut into `split_k` parts, half as many where many tiles are live, whose partial sums are planes of a scratch that expand
adds up as it loads: no zeroing, no atomics, the same bits every time. The grid follows from the buffers' capacity alone and every program
walks the live tiles: a captured graph may be replayed with any tiles.
grouped.py says what is computed, grouped_kernels.py launches it.
"""

import triton
import triton.language as tl

from server.kernels.grouped import DESC_WIDTH, NONE, SITE_WIDTH

_DESC_WIDTH, _SITE_WIDTH, _NONE = tl.constexpr(DESC_WIDTH), tl.constexpr(SITE_WIDTH), tl.constexpr(NONE)


@triton.jit
def _place(arena, base, offset, ALIGNED: tl.constexpr):
    """Where a factor lies; where all offsets are multiples of 8, the compiler is told so and loads vectors."""
    at = base + offset
    if ALIGNED:
        at = tl.multiple_of(at, 8)
    return arena + at


@triton.jit
def _parts(tile_base, num_tiles, SPLIT: tl.constexpr, MANY: tl.constexpr):
    """Parts that K is cut into in this step: half of SPLIT where more than MANY tiles are live, which fill the card by themselves. What a
    captured launch cannot know when it is captured, and so is looked up."""
    if (MANY > 0) & (SPLIT % 2 == 0):
        base = tl.load(tile_base + MANY, mask=num_tiles > MANY, other=_NONE)
        parts = tl.where(base == _NONE, SPLIT, SPLIT // 2)
    else:
        parts = tl.full((), SPLIT, tl.int32)
    return parts


@triton.jit
def _shrink_ranks(
    x, a, at, rows, live, r0, num_ranks, k_start, part_size, x_stride,
    K: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """BLOCK_R ranks from r0 on, over `part_size` of K, for the rows of one tile; `at`: each row's place in the part's plane."""
    r = r0 + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, part_size, BLOCK_K):
        k = k_start + k0 + tl.arange(0, BLOCK_K)
        x_mask, a_mask = live[:, None], (r < num_ranks)[:, None]
        if not EVEN:  # some part reaches beyond K
            x_mask, a_mask = x_mask & (k < K)[None, :], a_mask & (k < K)[None, :]
        x_tile = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=x_mask, other=0.0)
        a_tile = tl.load(a + r.to(tl.int64)[:, None] * K + k[None, :], mask=a_mask, other=0.0)
        acc = tl.dot(x_tile.to(DOT), tl.trans(a_tile.to(DOT)), acc, input_precision="ieee")
    tl.store(at[:, None] + r[None, :], acc, mask=live[:, None] & (r < num_ranks)[None, :])


@triton.jit(do_not_specialize=["group", "num_tiles", "num_rows"])
def shrink_kernel(
    x, arena, planes, tile_base, tile_start, tile_len, row_ids, group, num_tiles, num_rows, x_stride,
    K: tl.constexpr, RANK_CAP: tl.constexpr, SPLIT: tl.constexpr, MANY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, DOT: tl.constexpr, ALIGNED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """planes[s, position, r] = sum over part s of K of x[row_ids[position]] . A[r], for the live positions and ranks alone."""
    PART: tl.constexpr = (K + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K) * BLOCK_K
    EVEN: tl.constexpr = PART * SPLIT == K
    if PDL:  # expand may start now and read what does not come from here; this kernel reads and writes only after its predecessor
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    parts = _parts(tile_base, num_tiles, SPLIT, MANY)
    part_size = PART * (SPLIT // parts)
    item = tl.program_id(0)
    base = tl.load(tile_base + item // parts, mask=item < num_tiles * parts, other=_NONE)
    while base != _NONE:
        tile, part = item // parts, item % parts
        k_start = part * part_size
        desc = (arena + base).to(tl.pointer_type(tl.int64), bitcast=True) + group * _DESC_WIDTH
        a = _place(arena, base, tl.load(desc, mask=base >= 0, other=0), ALIGNED)
        num_ranks = tl.load(desc + 1, mask=base >= 0, other=0).to(tl.int32)
        m = tl.arange(0, BLOCK_M)
        live = m < tl.load(tile_len + tile)
        positions = tl.load(tile_start + tile) + m
        rows = tl.load(row_ids + positions, mask=live, other=0).to(tl.int64)
        at = planes + (part.to(tl.int64) * num_rows + positions) * RANK_CAP
        if (BLOCK_R > 16) & (num_ranks <= 16):  # a small adapter: no registers and products for ranks that are not there
            _shrink_ranks(x, a, at, rows, live, 0, num_ranks, k_start, part_size, x_stride, K, EVEN, BLOCK_M, BLOCK_K, 16, DOT)
        else:
            for r0 in range(0, num_ranks, BLOCK_R):
                _shrink_ranks(x, a, at, rows, live, r0, num_ranks, k_start, part_size, x_stride, K, EVEN, BLOCK_M, BLOCK_K, BLOCK_R, DOT)
        item += tl.num_programs(0)
        base = tl.load(tile_base + item // parts, mask=item < num_tiles * parts, other=_NONE)


@triton.jit
def _sum_planes(planes, positions, r, mask, num_rows, parts, RANK_CAP: tl.constexpr, SPLIT: tl.constexpr):
    """h [BLOCK_M, BLOCK_R] in float32; the planes are added in their order, the first `parts`."""
    at = planes + positions.to(tl.int64)[:, None] * RANK_CAP + r[None, :]
    h = tl.load(at, mask=mask, other=0.0)
    for s in tl.static_range(1, SPLIT):
        h += tl.load(at + s * num_rows.to(tl.int64) * RANK_CAP, mask=mask & (s < parts), other=0.0)
    return h


@triton.jit
def _site_of(block, C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr, C4: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """(site, its first column, its last + 1, block within it) of a block of columns; a block never straddles sites."""
    B1: tl.constexpr = (C1 + BLOCK_N - 1) // BLOCK_N
    B2: tl.constexpr = B1 + (C2 - C1 + BLOCK_N - 1) // BLOCK_N
    B3: tl.constexpr = B2 + (C3 - C2 + BLOCK_N - 1) // BLOCK_N
    # In units of 8 columns where that is possible: the compiler then knows the alignment of what follows.
    UNIT: tl.constexpr = 8 if ALIGNED else 1
    in2, in3, in4 = block >= B1, block >= B2, block >= B3
    site = in2.to(tl.int32) + in3.to(tl.int32) + in4.to(tl.int32)
    first = tl.where(in4, B3, tl.where(in3, B2, tl.where(in2, B1, 0)))
    start = tl.where(in4, C3 // UNIT, tl.where(in3, C2 // UNIT, tl.where(in2, C1 // UNIT, 0)))
    stop = tl.where(in4, C4 // UNIT, tl.where(in3, C3 // UNIT, tl.where(in2, C2 // UNIT, C1 // UNIT)))
    return site, start * UNIT, stop * UNIT, block - first


@triton.jit
def _expand_tile(
    y, arena, planes, tile, base, entry, row_ids, tile_start, tile_len, num_rows, parts, y_stride, start, out, chunk,
    RANK_CAP: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr, DOT: tl.constexpr, ALIGNED: tl.constexpr, FRESH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A chunk of CHUNK blocks of columns of one site, for the rows of one tile.

    The planes of the first BLOCK_R ranks are summed once a chunk; a block's B and y are asked for while the block before is computed."""
    is_live = base >= 0
    r_start, r_stop = tl.load(entry, mask=is_live, other=0).to(tl.int32), tl.load(entry + 1, mask=is_live, other=0).to(tl.int32)
    b = _place(arena, base, tl.load(entry + 2, mask=is_live, other=0), ALIGNED)
    scale = tl.load(entry + 3, mask=is_live, other=0).to(tl.int32).to(tl.float32, bitcast=True)
    gain, bias = tl.load(entry + 4, mask=is_live, other=-1), tl.load(entry + 5, mask=is_live, other=-1)
    if FRESH | (r_stop > r_start) | (gain >= 0) | (bias >= 0):
        m, n = tl.arange(0, BLOCK_M), chunk * (CHUNK * BLOCK_N) + tl.arange(0, BLOCK_N)
        live = m < tl.load(tile_len + tile)
        positions = tl.load(tile_start + tile) + m
        rows = tl.load(row_ids + positions, mask=live, other=0).to(tl.int64)
        # The first block of B is asked for before the shrink may have ended: it is the longest wait.
        rank = r_stop - r_start
        r = tl.arange(0, BLOCK_R)
        b_at = b + r.to(tl.int64)[:, None] * out + n[None, :]
        b_tile = tl.load(b_at, mask=(r < rank)[:, None] & (n < out)[None, :], other=0.0)
        if PDL:
            tl.extra.cuda.gdc_wait()
        y_at = y + rows[:, None] * y_stride + start + n[None, :]
        old_mask = live[:, None] & (not FRESH)
        old = tl.load(y_at, mask=old_mask & (n < out)[None, :], other=0.0)
        h_mask = live[:, None] & (r < rank)[None, :]
        first_h = _sum_planes(planes, positions, r_start + r, h_mask, num_rows, parts, RANK_CAP, SPLIT).to(arena.dtype.element_ty).to(DOT)
        for c in range(CHUNK):
            inside = n < out
            n_next = n + BLOCK_N
            next_inside = (n_next < out) & (c + 1 < CHUNK)
            b_next = tl.load(b_at + BLOCK_N, mask=(r < rank)[:, None] & next_inside[None, :], other=0.0)
            old_next = tl.load(y_at + BLOCK_N, mask=old_mask & next_inside[None, :], other=0.0)
            acc = tl.dot(first_h, b_tile.to(DOT), input_precision="ieee")
            for r0 in range(BLOCK_R, rank, BLOCK_R):
                more = r0 + r < rank
                b_more = tl.load(b_at + r0 * out, mask=more[:, None] & inside[None, :], other=0.0)
                h = _sum_planes(planes, positions, r_start + r0 + r, live[:, None] & more[None, :], num_rows, parts, RANK_CAP, SPLIT)
                acc = tl.dot(h.to(arena.dtype.element_ty).to(DOT), b_more.to(DOT), acc, input_precision="ieee")
            new = old.to(tl.float32)
            if (gain >= 0) & (not FRESH):
                new *= tl.load(_place(arena, base, gain, ALIGNED) + n, mask=inside, other=0.0).to(tl.float32)[None, :]
            new += scale * acc
            if bias >= 0:
                new += tl.load(_place(arena, base, bias, ALIGNED) + n, mask=inside, other=0.0).to(tl.float32)[None, :]
            tl.store(y_at, new.to(y.dtype.element_ty), mask=live[:, None] & inside[None, :])
            n, b_at, y_at, b_tile, old = n_next, b_at + BLOCK_N, y_at + BLOCK_N, b_next, old_next


@triton.jit(do_not_specialize=["group", "num_tiles", "num_rows"])
def expand_kernel(
    y, arena, planes, tile_base, tile_start, tile_len, row_ids, group, num_tiles, num_rows, y_stride,
    C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr, C4: tl.constexpr, CHUNKS: tl.constexpr,
    RANK_CAP: tl.constexpr, SPLIT: tl.constexpr, MANY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr, DOT: tl.constexpr, ALIGNED: tl.constexpr, FRESH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[rows of the tile, columns] = gain * y + scale * (sum of planes) @ B + bias, in place; C1 to C4: where the sites' columns
    end; an absent site is none wide. CHUNKS: chunks of columns of a tile, each within one site. FRESH: y is written, not read."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    parts = _parts(tile_base, num_tiles, SPLIT, MANY)
    item = tl.program_id(0)
    base = tl.load(tile_base + item // CHUNKS)
    while base != _NONE:
        site, start, stop, chunk = _site_of(item % CHUNKS, C1, C2, C3, C4, CHUNK * BLOCK_N, ALIGNED)
        desc = (arena + base).to(tl.pointer_type(tl.int64), bitcast=True) + group * _DESC_WIDTH
        _expand_tile(
            y, arena, planes, item // CHUNKS, base, desc + 2 + site * _SITE_WIDTH, row_ids, tile_start, tile_len, num_rows, parts,
            y_stride, start, stop - start, chunk, RANK_CAP, SPLIT, BLOCK_M, BLOCK_N, CHUNK, BLOCK_R, DOT, ALIGNED, FRESH, PDL,
        )  # fmt: skip
        item += tl.num_programs(0)
        base = tl.load(tile_base + item // CHUNKS, mask=item < num_tiles * CHUNKS, other=-1)
    if PDL:  # whoever waits for this kernel relies on the shrink's end too, even if no tile was live here
        tl.extra.cuda.gdc_wait()
