"""Products of up to 16 rows with a weight of 4-bit codes, all of a strip's inputs in one program: a step of few rows without sums that
wait for a second launch.

The warps lie along the inputs: at each step every warp unpacks a unit of its own for the tensor cores, and at the end their sums are added
in one order. Needs Triton. Called by quantized_kernels.py, which says what is computed.
"""

import torch
import triton
import triton.language as tl

from server.kernels.quantized import QuantizedWeight, table_on
from server.kernels.quantized_launch import Strip
from server.kernels.quantized_tile import TYPES
from server.kernels.quantized_unpack import numbers_of, scale_of


@triton.jit(do_not_specialize=["M"])
def _strip_4bit(
    x, words, scales, zeros, table, bias, y, M, N, K, x_stride,
    GROUP: tl.constexpr, EVEN: tl.constexpr, WAYS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr,
    HAS_ZEROS: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, TABLE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y[0:M, a block of n] = x W^T + bias. EVEN: the units are shared among the ways without a rest, and every one is whole."""
    UNITS, GROUPS = (K + 127) // 128, K // GROUP
    PARTS: tl.constexpr = 128 // GROUP if GROUP < 128 else 1
    FIELDS: tl.constexpr = 8 // PARTS
    n, m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    way, c = tl.arange(0, WAYS), tl.arange(0, 16)
    m_in, wide = m < M, n.to(tl.int64)[None, :] + tl.zeros((WAYS, 1), tl.int64)
    n_in = wide < N
    acc = tl.zeros((WAYS, BLOCK_N, BLOCK_M), tl.float32)
    for first in range(0, UNITS, WAYS):
        unit = first + way
        w_in = n_in[:, :, None] if EVEN else n_in[:, :, None] & (unit < UNITS)[:, None, None]
        w = tl.load(words + wide[:, :, None] * (UNITS * 16) + unit[:, None, None] * 16 + c[None, None, :], mask=w_in, other=0)
        w = w.to(tl.uint32, bitcast=True)
        for part in tl.static_range(PARTS):
            group = unit * PARTS + part if GROUP < 128 else unit * 128 // GROUP
            s, z = scale_of(scales, zeros, wide, n_in, group[:, None], GROUPS, HAS_ZEROS)
            numbers = numbers_of(w, z[:, :, None], s[:, :, None], table, DOT, WHOLE, False, TABLE, ASM)
            d = tl.zeros((WAYS, BLOCK_N, BLOCK_M), tl.float32)
            for in_part in tl.static_range(FIELDS):
                k = (unit * 128 + 16 * (part * FIELDS + in_part))[:, None] + c[None, :]  # [way, 16]
                x_in = m_in[None, None, :] if EVEN else m_in[None, None, :] & (k < K)[:, :, None]
                x_tile = tl.load(x + m.to(tl.int64)[None, None, :] * x_stride + k[:, :, None], mask=x_in, other=0.0)
                d = tl.dot(numbers[part * FIELDS + in_part], x_tile.to(DOT), d, input_precision="ieee")
            acc += s[:, :, None] * d
    total = tl.sum(acc, 0)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y + m.to(tl.int64)[None, :] * N + n[:, None], total.to(y.dtype.element_ty), mask=(n < N)[:, None] & m_in[None, :])


def strip(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, y: torch.Tensor, choice: Strip) -> None:
    """ValueError for more rows or other codes than it is for."""
    (m, n), k = y.shape, weight.in_features
    if m > choice.block_m or weight.bits != 4:
        raise ValueError(f"{choice}: for up to {choice.block_m} rows and codes of 4 bits, not for {m} and {weight.code}")
    interpreted = triton.knobs.runtime.interpret
    _strip_4bit[(triton.cdiv(n, choice.block_n),)](
        x, weight.data, weight.scales, weight.scales if weight.zeros is None else weight.zeros, table_on(x.device),
        y if bias is None else bias, y, m, n, k, x.stride(0), GROUP=weight.group, EVEN=k % (128 * choice.warps) == 0, WAYS=choice.warps,
        BLOCK_M=choice.block_m, BLOCK_N=choice.block_n,
        # The interpreter multiplies bfloat16 as if it were integers.
        DOT=tl.float32 if interpreted and x.dtype == torch.bfloat16 else TYPES[x.dtype],
        HAS_ZEROS=weight.zeros is not None, WHOLE=weight.integer_zeros, HAS_BIAS=bias is not None, TABLE=weight.code == "nf4",
        ASM=weight.code == "int4" and x.dtype != torch.float32 and not interpreted, num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip
