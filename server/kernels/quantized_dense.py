"""Products of many rows with a quantized weight: the weight is made anew in x's type, some rows of it at a time, and cuBLAS multiplies.

Weights of e4m3 are not made anew: each row of x is rounded to e4m3 with a scale of its own, and the tensor cores multiply both as they are.
Needs Triton. Called by quantized_kernels.py, which says what is computed.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from server.kernels.quantized import UNIT, QuantizedWeight, dequantize, table_on
from server.kernels.quantized_launch import Dense


@triton.jit
def _dequantize_4bit(
    words, scales, zeros, table, out, N, K,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, HAS_ZEROS: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """out[n, k] = scales * (value(code) - zeros), a unit of BLOCK_N rows a program."""
    UNITS, GROUPS = (K + 127) // 128, K // GROUP
    unit = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_in, wide, c = n < N, n.to(tl.int64), tl.arange(0, 16)
    w = tl.load(words + wide[:, None] * (UNITS * 16) + (unit * 16 + c)[None, :], mask=n_in[:, None], other=0).to(tl.uint32, bitcast=True)
    for field in tl.static_range(8):
        k = unit * 128 + 16 * field + c
        group = (unit * 128 + 16 * field) // GROUP
        s_in = n_in & (group < GROUPS)
        s = tl.load(scales + wide * GROUPS + group, mask=s_in, other=0.0).to(tl.float32)
        z = tl.zeros((BLOCK_N,), tl.float32)
        if HAS_ZEROS:
            z = tl.load(zeros + wide * GROUPS + group, mask=s_in, other=0.0).to(tl.float32)
        codes = (w >> (4 * field)) & 15
        v = tl.load(table + codes) if TABLE else codes.to(tl.float32)
        tl.store(
            out + wide[:, None] * K + k[None, :], (s[:, None] * (v - z[:, None])).to(out.dtype.element_ty), n_in[:, None] & (k < K)[None, :]
        )


@triton.jit
def _dequantize_8bit(data, scales, out, K, BLOCK_K: tl.constexpr):
    """out[n, k] = scales[n] * data[n, k], a block of a row a program."""
    n = tl.program_id(1)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    at = n.to(tl.int64) * K + k
    tl.store(
        out + at, (tl.load(data + at, mask=k < K, other=0.0).to(tl.float32) * tl.load(scales + n)).to(out.dtype.element_ty), mask=k < K
    )


@triton.jit
def _round_rows(x, rounded, scales, x_stride, K, BLOCK_K: tl.constexpr):
    """Each row of x as e4m3 numbers times one scale, whose greatest is e4m3's greatest."""
    m = tl.program_id(0).to(tl.int64)
    greatest = 0.0
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        greatest = tl.maximum(greatest, tl.max(tl.abs(tl.load(x + m * x_stride + k, mask=k < K, other=0.0).to(tl.float32))))
    scale = tl.maximum(greatest, 1e-12) / 448.0
    tl.store(scales + m, scale)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        value = tl.load(x + m * x_stride + k, mask=k < K, other=0.0).to(tl.float32) / scale
        tl.store(rounded + m * K + k, value.to(rounded.dtype.element_ty), mask=k < K)


def weight_rows(weight: QuantizedWeight, out: torch.Tensor) -> torch.Tensor:
    """The weight as it lies, [out, in] into `out` of any of the kernels' types (`order` is not undone)."""
    n, k = out.shape
    if weight.bits == 8:
        _dequantize_8bit[(triton.cdiv(k, 2048), n)](weight.data, weight.scales, out, k, BLOCK_K=2048, num_warps=4)
    else:
        _dequantize_4bit[(triton.cdiv(k, UNIT), triton.cdiv(n, 32))](
            weight.data, weight.scales, weight.scales if weight.zeros is None else weight.zeros, table_on(out.device), out, n, k,
            GROUP=weight.group, BLOCK_N=32, HAS_ZEROS=weight.zeros is not None, TABLE=weight.code == "nf4", num_warps=4,
        )  # fmt: skip
    return out


def dense(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, y: torch.Tensor, choice: Dense) -> None:
    buffer = torch.empty(min(choice.block_rows, weight.out_features), weight.in_features, dtype=x.dtype, device=x.device)
    for start in range(0, weight.out_features, choice.block_rows):
        stop = min(start + choice.block_rows, weight.out_features)
        part = weight_rows(weight.rows(start, stop), buffer[: stop - start])
        torch.mm(x, part.T, out=y[:, start:stop])
    if bias is not None:
        y += bias


def scaled(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """Both operands in e4m3, a scale for each row of x and each row of the weight."""
    if x.device.type == "cpu" or x.dtype != torch.bfloat16 or weight.in_features % 16 or weight.out_features % 16:
        y.copy_(F.linear(x, dequantize(weight, x.dtype), bias))
        return
    m, k = x.shape
    rounded = torch.empty(m, k, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    _round_rows[(m,)](x, rounded, scales, x.stride(0), k, BLOCK_K=min(4096, triton.next_power_of_2(k)), num_warps=8)
    torch.ops.aten._scaled_mm.out(
        rounded, weight.data.T, scales, weight.scales.view(1, -1), bias=None, out_dtype=x.dtype, use_fast_accum=True, out=y
    )
    if bias is not None:
        y += bias
