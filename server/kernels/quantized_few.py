"""Products of 1 to 4 rows with a quantized weight: each code is read once and multiplied on the ordinary cores, without tensor cores.

A decode step of few rows is bytes, and then instructions: numbers are made of codes by their bits (a mantissa's upper bits under a fixed
exponent), and scales and zeros are applied a group at a time, so that a code costs half a shift, a mask and a multiplication a row.
Needs Triton. Called by quantized_kernels.py, which says what is computed.
"""

import torch
import triton
import triton.language as tl

from server.kernels.quantized import UNIT, QuantizedWeight, table_on
from server.kernels.quantized_launch import Few


@triton.jit
def _spread(words, table, FIELD: tl.constexpr, TABLE: tl.constexpr):
    """A field of 4 bits as a float32: its value in the table, or one of its bits: 1 + code / 16 for an odd FIELD, 1 + code / 256 for an
    even one, which saves every second shift."""
    if TABLE:
        return tl.load(table + ((words >> (4 * FIELD)) & 15))
    SHIFT: tl.constexpr = 15 - 4 * (FIELD - FIELD % 2)
    moved = words << SHIFT if SHIFT > 0 else words >> -SHIFT
    bits = (moved & (0x780000 if FIELD % 2 == 1 else 0x78000)) | 0x3F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _add_field(products, added, total, v, x, k, K: tl.constexpr, FIELD: tl.constexpr, TABLE: tl.constexpr):
    """The running sums with one field more: of x * v [n, q, 4], of what x * the constant in v came to [q, 4], of x [q, 4]."""
    at = k[:, None] + (16 * FIELD + tl.arange(0, 4))[None, :]
    part = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
    factor = part if TABLE else part * (16.0 if FIELD % 2 == 1 else 256.0)
    return products + v * factor[None, :, :], added + factor, total + part


@triton.jit
def _scaled_sum(products, added, total, s, z, TABLE: tl.constexpr):
    """scales * (sum of x * value - zeros * sum of x) over a thread's four words: [n, q]."""
    sums = tl.sum(products, 2) - z * tl.sum(total, 1)[None, :]
    return s * (sums if TABLE else sums - tl.sum(added, 1)[None, :])


@triton.jit(do_not_specialize=["LIVE"])
def _few_4bit(
    x, words, scales, zeros, table, bias, y, N, LIVE, x_stride, y_stride,
    ROWS: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
    HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """y[0:LIVE, a block of n] = x W^T + bias, all of K in one program. A thread holds 4 words (32 inputs) of BLOCK_N rows at a time."""
    UNITS: tl.constexpr = (K + 127) // 128
    GROUPS: tl.constexpr = K // GROUP
    PARTS: tl.constexpr = 128 // GROUP if GROUP < 128 else 1  # groups of a unit
    FIELDS: tl.constexpr = 8 // PARTS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_in = n < N
    wide = n.to(tl.int64)
    nothing = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    acc0, acc1, acc2, acc3 = nothing, nothing, nothing, nothing
    # A row that is not there is the last one again.
    x1, x2, x3 = x + min(1, LIVE - 1) * x_stride, x + min(2, LIVE - 1) * x_stride, x + min(3, LIVE - 1) * x_stride
    for q0 in range(0, 4 * UNITS, BLOCK_Q):
        q = q0 + tl.arange(0, BLOCK_Q)
        k = q // 4 * 128 + q % 4 * 4
        inside = n_in[:, None] & (q < 4 * UNITS)[None, :]
        at = wide[:, None, None] * (UNITS * 16) + (q[:, None] * 4 + tl.arange(0, 4)[None, :])[None, :, :]
        w = tl.load(words + at, mask=inside[:, :, None], other=0).to(tl.uint32, bitcast=True)
        for part in tl.static_range(PARTS):
            group = q // 4 * PARTS + part if GROUP < 128 else q // 4 * 128 // GROUP
            s_at, s_in = wide[:, None] * GROUPS + group[None, :], inside & (group < GROUPS)[None, :]
            s, z = tl.load(scales + s_at, mask=s_in, other=0.0).to(tl.float32), 0.0
            if HAS_ZEROS:
                z = tl.load(zeros + s_at, mask=s_in, other=0.0).to(tl.float32)
            p0, o0 = tl.zeros((BLOCK_N, BLOCK_Q, 4), tl.float32), tl.zeros((BLOCK_Q, 4), tl.float32)
            p1, p2, p3, o1, o2, o3, t0, t1, t2, t3 = p0, p0, p0, o0, o0, o0, o0, o0, o0, o0
            for in_part in tl.static_range(FIELDS):
                v = _spread(w, table, part * FIELDS + in_part, TABLE)
                p0, o0, t0 = _add_field(p0, o0, t0, v, x, k, K, part * FIELDS + in_part, TABLE)
                if ROWS > 1:
                    p1, o1, t1 = _add_field(p1, o1, t1, v, x1, k, K, part * FIELDS + in_part, TABLE)
                if ROWS > 2:
                    p2, o2, t2 = _add_field(p2, o2, t2, v, x2, k, K, part * FIELDS + in_part, TABLE)
                    p3, o3, t3 = _add_field(p3, o3, t3, v, x3, k, K, part * FIELDS + in_part, TABLE)
            acc0 += _scaled_sum(p0, o0, t0, s, z, TABLE)
            if ROWS > 1:
                acc1 += _scaled_sum(p1, o1, t1, s, z, TABLE)
            if ROWS > 2:
                acc2 += _scaled_sum(p2, o2, t2, s, z, TABLE)
                acc3 += _scaled_sum(p3, o3, t3, s, z, TABLE)
    _store_rows(y, bias, n, n_in, y_stride, acc0, acc1, acc2, acc3, LIVE, ROWS, HAS_BIAS)


@triton.jit
def _store_rows(y, bias, n, n_in, y_stride, acc0, acc1, acc2, acc3, LIVE, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Sum each row's partial sums [BLOCK_N, q] and store the live ones."""
    add = tl.zeros_like(tl.sum(acc0, 1))
    if HAS_BIAS:
        add = tl.load(bias + n, mask=n_in, other=0.0).to(tl.float32)
    tl.store(y + n, (tl.sum(acc0, 1) + add).to(y.dtype.element_ty), mask=n_in)
    if ROWS > 1:
        tl.store(y + y_stride + n, (tl.sum(acc1, 1) + add).to(y.dtype.element_ty), mask=n_in & (LIVE > 1))
    if ROWS > 2:
        tl.store(y + 2 * y_stride + n, (tl.sum(acc2, 1) + add).to(y.dtype.element_ty), mask=n_in & (LIVE > 2))
        tl.store(y + 3 * y_stride + n, (tl.sum(acc3, 1) + add).to(y.dtype.element_ty), mask=n_in & (LIVE > 3))


@triton.jit(do_not_specialize=["LIVE"])
def _few_8bit(
    x, data, scales, bias, y, N, LIVE, x_stride, y_stride,
    ROWS: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """As _few_4bit, for numbers of 8 bits with one scale a row. A thread holds 16 numbers of BLOCK_N rows at a time."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_in = n < N
    acc0 = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    acc1 = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    acc2 = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    acc3 = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    # A row that is not there is the last one again.
    x1, x2, x3 = x + min(1, LIVE - 1) * x_stride, x + min(2, LIVE - 1) * x_stride, x + min(3, LIVE - 1) * x_stride
    for q0 in range(0, (K + 15) // 16, BLOCK_Q):
        k = (q0 + tl.arange(0, BLOCK_Q))[:, None] * 16 + tl.arange(0, 16)[None, :]
        k_in = k < K
        at = n.to(tl.int64)[:, None, None] * K + k[None, :, :]
        w = tl.load(data + at, mask=n_in[:, None, None] & k_in[None, :, :], other=0.0).to(tl.float32)
        acc0 += tl.sum(w * tl.load(x + k, mask=k_in, other=0.0).to(tl.float32)[None, :, :], 2)
        if ROWS > 1:
            acc1 += tl.sum(w * tl.load(x1 + k, mask=k_in, other=0.0).to(tl.float32)[None, :, :], 2)
        if ROWS > 2:
            acc2 += tl.sum(w * tl.load(x2 + k, mask=k_in, other=0.0).to(tl.float32)[None, :, :], 2)
            acc3 += tl.sum(w * tl.load(x3 + k, mask=k_in, other=0.0).to(tl.float32)[None, :, :], 2)
    s = tl.load(scales + n, mask=n_in, other=0.0).to(tl.float32)[:, None]
    _store_rows(y, bias, n, n_in, y_stride, acc0 * s, acc1 * s, acc2 * s, acc3 * s, LIVE, ROWS, HAS_BIAS)


def few(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, y: torch.Tensor, choice: Few) -> None:
    live, n = y.shape
    block_n = min(4, choice.block_n) if weight.code == "nf4" else choice.block_n  # its table's entries take registers
    grid = (triton.cdiv(n, block_n),)
    common = {"ROWS": choice.rows, "K": weight.in_features, "BLOCK_N": block_n, "HAS_BIAS": bias is not None}
    threads = 32 * choice.warps
    if weight.bits == 8:
        block_q = min(threads, triton.next_power_of_2(triton.cdiv(weight.in_features, 16)))
        a_bias = y if bias is None else bias
        _few_8bit[grid](
            x, weight.data, weight.scales, a_bias, y, n, live, x.stride(0), n, BLOCK_Q=block_q, num_warps=choice.warps, **common
        )
        return
    block_q = min(threads, triton.next_power_of_2(4 * triton.cdiv(weight.in_features, UNIT)))
    _few_4bit[grid](
        x, weight.data, weight.scales, weight.scales if weight.zeros is None else weight.zeros, table_on(x.device),
        y if bias is None else bias, y, n, live, x.stride(0), n, GROUP=weight.group, BLOCK_Q=block_q,
        HAS_ZEROS=weight.zeros is not None, TABLE=weight.code == "nf4", num_warps=choice.warps, **common,
    )  # fmt: skip
