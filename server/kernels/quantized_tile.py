"""Products of a tile of rows with a quantized weight: tiles of codes are unpacked in registers and multiplied by the tensor cores.

The weight is the left operand: its tiles stay in the registers that they were unpacked in, and x goes through shared memory. Scales are
applied to the sums of a group. K may be cut into parts whose sums are planes that a second launch adds up, always in one order.
Needs Triton. Called by quantized_kernels.py, which says what is computed.
"""

import torch
import triton
import triton.language as tl

from server.kernels.quantized import UNIT, QuantizedWeight, table_on
from server.kernels.quantized_launch import Tile

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _unpack_pairs(kind: str, one: str, magic: str, *, shift: bool) -> tl.constexpr:
    """PTX that makes the 8 fields of two words into 8 registers of two numbers: codes - zero. Inputs: the words, and -zero twice.

    `magic`: the bits of 128 (bfloat16) or 1024 (float16), to which a code adds itself when it is put below them. `shift`: -zero has that
    constant in it already, which is exact if the zero is whole; else the constant is taken off first."""
    offset = {"3F803F80": "C300C300", "3C003C00": "E400E400"}[one]
    # The inputs are read before anything is written: an output may have the register of an input.
    lines = [
        ".reg .b32 low, high, moved, offset, one, zero;", f"mov.b32 offset, 0x{offset};", f"mov.b32 one, 0x{one};", "mov.b32 zero, $10;",
        "prmt.b32 low, $8, $9, 0x5410;", "prmt.b32 high, $8, $9, 0x7632;",
    ]  # fmt: skip
    for field in range(8):
        lines.append(f"shr.b32 moved, {'low' if field < 4 else 'high'}, {4 * (field % 4)};")
        lines.append(f"lop3.b32 moved, moved, 0x000F000F, 0x{magic}, 0xEA;")
        if not shift:
            lines.append(f"fma.rn.{kind} moved, moved, one, offset;")
        lines.append(f"fma.rn.{kind} ${field}, moved, one, zero;")
    return tl.constexpr("{\n" + "\n".join(lines) + "\n}")


_ASM_BF16 = _unpack_pairs("bf16x2", "3F803F80", "43004300", shift=True)
_ASM_BF16_ANY = _unpack_pairs("bf16x2", "3F803F80", "43004300", shift=False)
_ASM_F16 = _unpack_pairs("f16x2", "3C003C00", "64006400", shift=True)
_ASM_F16_ANY = _unpack_pairs("f16x2", "3C003C00", "64006400", shift=False)
_ASM_REGISTERS = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r,r,r")


@triton.jit
def _numbers(words, zero, table, DOT: tl.constexpr, WHOLE: tl.constexpr, TABLE: tl.constexpr, ASM: tl.constexpr):
    """The 8 fields as the tensor cores' operands: codes - zero [n, 16] each. WHOLE: the zeros are whole, and the difference is exact."""
    # 128 and 1024: what a code is added to by putting it below the constant's bits
    if ASM and DOT != tl.float16:  # noqa: SIM300
        minus = tl.broadcast_to(((-128.0 if WHOLE else 0.0) - zero).to(tl.bfloat16)[:, None], words.shape)
        return tl.inline_asm_elementwise(
            _ASM_BF16 if WHOLE else _ASM_BF16_ANY, _ASM_REGISTERS, [words, minus],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2,
        )  # fmt: skip
    elif ASM:
        minus = tl.broadcast_to(((-1024.0 if WHOLE else 0.0) - zero).to(tl.float16)[:, None], words.shape)
        return tl.inline_asm_elementwise(
            _ASM_F16 if WHOLE else _ASM_F16_ANY, _ASM_REGISTERS, [words, minus],
            (tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16), True, 2,
        )  # fmt: skip
    else:
        return (
            _number(words, zero, table, 0, DOT, TABLE), _number(words, zero, table, 1, DOT, TABLE),
            _number(words, zero, table, 2, DOT, TABLE), _number(words, zero, table, 3, DOT, TABLE),
            _number(words, zero, table, 4, DOT, TABLE), _number(words, zero, table, 5, DOT, TABLE),
            _number(words, zero, table, 6, DOT, TABLE), _number(words, zero, table, 7, DOT, TABLE),
        )  # fmt: skip


@triton.jit
def _number(words, zero, table, FIELD: tl.constexpr, DOT: tl.constexpr, TABLE: tl.constexpr):
    codes = (words >> (4 * FIELD)) & 15
    if TABLE:
        return tl.load(table + codes).to(DOT)
    return (codes.to(tl.float32) - zero[:, None]).to(DOT)


@triton.jit
def _scale_of(scales, zeros, n, n_in, group, GROUPS, HAS_ZEROS: tl.constexpr):
    """(scales, zeros) of a group: float32 [n] each; nought of a group that is not there."""
    inside = n_in & (group < GROUPS)
    s, z = tl.load(scales + n * GROUPS + group, mask=inside, other=0.0).to(tl.float32), tl.zeros(n.shape, tl.float32)
    if HAS_ZEROS:
        z = tl.load(zeros + n * GROUPS + group, mask=inside, other=0.0).to(tl.float32)
    return s, z


@triton.jit(do_not_specialize=["M", "PER"])
def _tile_4bit(
    x, words, scales, zeros, table, bias, out, M, N, K, PER, x_stride,
    GROUP: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr,
    HAS_ZEROS: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, TABLE: tl.constexpr, ASM: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """A tile of y = x W^T + bias, or (SPLIT > 1) of a plane of partial sums: out [SPLIT, M, N]. W is the left operand: its tiles stay in
    registers as they were unpacked, x goes through shared memory."""
    UNITS, GROUPS = (K + 127) // 128, K // GROUP
    PARTS: tl.constexpr = 128 // GROUP if GROUP < 128 else 1
    FIELDS: tl.constexpr = 8 // PARTS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    plane = tl.program_id(2)
    n_in, m_in, wide, c = n < N, m < M, n.to(tl.int64), tl.arange(0, 16)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if AHEAD:
        s, z = _scale_of(scales, zeros, wide, n_in, plane * PER * 128 // GROUP, GROUPS, HAS_ZEROS)
    for unit in range(plane * PER, min(plane * PER + PER, UNITS)):
        w = tl.load(words + wide[:, None] * (UNITS * 16) + (unit * 16 + c)[None, :], mask=n_in[:, None], other=0)
        w = w.to(tl.uint32, bitcast=True)
        if AHEAD:  # the next unit's are asked for before this one's are used: small loads are not made ahead by themselves
            next_s, next_z = _scale_of(scales, zeros, wide, n_in, (unit + 1) * 128 // GROUP, GROUPS, HAS_ZEROS)
        for part in tl.static_range(PARTS):
            if part > 0:
                s, z = _scale_of(scales, zeros, wide, n_in, unit * PARTS + part, GROUPS, HAS_ZEROS)
            elif not AHEAD:
                s, z = _scale_of(scales, zeros, wide, n_in, unit * 128 // GROUP, GROUPS, HAS_ZEROS)
            numbers = _numbers(w, z, table, DOT, WHOLE, TABLE, ASM)
            d = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for in_part in tl.static_range(FIELDS):
                k = unit * 128 + 16 * (part * FIELDS + in_part) + c
                x_in = m_in[None, :] if EVEN else m_in[None, :] & (k < K)[:, None]
                x_tile = tl.load(x + m.to(tl.int64)[None, :] * x_stride + k[:, None], mask=x_in, other=0.0)  # [16, m]
                d = tl.dot(numbers[part * FIELDS + in_part], x_tile.to(DOT), d, input_precision="ieee")
            acc += s[:, None] * d
        if AHEAD:
            s, z = next_s, next_z
    _store_tile(out, bias, acc, n, m, n_in, m_in, plane, M, N, HAS_BIAS)


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


def tile(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, y: torch.Tensor, choice: Tile) -> None:
    (m, n), split = y.shape, choice.split_k
    grid = (triton.cdiv(n, choice.block_n), triton.cdiv(m, choice.block_m), split)
    out = y if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=y.device)
    a_bias, interpreted = y if bias is None else bias, triton.knobs.runtime.interpret
    common = {
        "BLOCK_M": choice.block_m, "BLOCK_N": choice.block_n, "HAS_BIAS": bias is not None and split == 1,
        # The interpreter multiplies bfloat16 as if it were integers.
        "DOT": tl.float32 if interpreted and x.dtype == torch.bfloat16 else TYPES[x.dtype],
        "num_warps": choice.warps, "num_stages": choice.stages,
    }  # fmt: skip
    k, depth = weight.in_features, 64 if weight.bits == 8 else UNIT
    per, even = triton.cdiv(triton.cdiv(k, depth), split), k % depth == 0
    if weight.bits == 8:
        _tile_8bit[grid](x, weight.data, weight.scales, a_bias, out, m, n, k, per, x.stride(0), BLOCK_K=depth, EVEN=even, **common)
    else:
        asm = weight.code == "int4" and x.dtype != torch.float32 and not interpreted
        _tile_4bit[grid](
            x, weight.data, weight.scales, weight.scales if weight.zeros is None else weight.zeros, table_on(x.device), a_bias, out, m, n,
            k, per, x.stride(0), GROUP=weight.group, EVEN=even, HAS_ZEROS=weight.zeros is not None, WHOLE=weight.integer_zeros,
            TABLE=weight.code == "nf4", ASM=asm, AHEAD=choice.ahead, **common,
        )  # fmt: skip
    if split > 1:
        _sum_planes[(triton.cdiv(m * n, 1024),)](out, a_bias, y, m * n, n, SPLIT=split, BLOCK=1024, HAS_BIAS=bias is not None, num_warps=4)
