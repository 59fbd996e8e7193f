"""Codes of 4 bits as the tensor cores' numbers, in the registers that they were loaded in. Needs Triton.

Called by the kernels of quantized_tile.py; quantized.py says how codes lie in words.
"""

import triton
import triton.language as tl


def _unpack_pairs(kind: str, one: str, magic: str, *, shift: bool, scaled: bool = False) -> tl.constexpr:
    """PTX that makes the 8 fields of two words into 8 registers of two numbers: codes - zero. Inputs: the words, and -zero twice;
    `scaled`: and a scale twice, by which the numbers are multiplied.

    `magic`: the bits of 128 (bfloat16) or 1024 (float16), to which a code adds itself when it is put below them. `shift`: -zero has that
    constant in it already, which is exact if the zero is whole; else the constant is taken off first."""
    offset = {"3F803F80": "C300C300", "3C003C00": "E400E400"}[one]
    # The inputs are read before anything is written: an output may have the register of an input.
    lines = [
        ".reg .b32 low, high, moved, offset, one, zero, scale, nothing;", f"mov.b32 offset, 0x{offset};", f"mov.b32 one, 0x{one};",
        "mov.b32 zero, $10;", "prmt.b32 low, $8, $9, 0x5410;", "prmt.b32 high, $8, $9, 0x7632;",
    ]  # fmt: skip
    if scaled:
        lines += ["mov.b32 scale, $11;", "mov.b32 nothing, 0x80008000;"]  # -0, which leaves every product as it is
    for field in range(8):
        lines.append(f"shr.b32 moved, {'low' if field < 4 else 'high'}, {4 * (field % 4)};")
        lines.append(f"lop3.b32 moved, moved, 0x000F000F, 0x{magic}, 0xEA;")
        if not shift:
            lines.append(f"fma.rn.{kind} moved, moved, one, offset;")
        lines.append(f"fma.rn.{kind} {'moved' if scaled else f'${field}'}, moved, one, zero;")
        if scaled:
            lines.append(f"fma.rn.{kind} ${field}, moved, scale, nothing;")
    return tl.constexpr("{\n" + "\n".join(lines) + "\n}")


_BF16, _F16 = ("bf16x2", "3F803F80", "43004300"), ("f16x2", "3C003C00", "64006400")
_ASM_BF16, _ASM_BF16_ANY = _unpack_pairs(*_BF16, shift=True), _unpack_pairs(*_BF16, shift=False)
_ASM_F16, _ASM_F16_ANY = _unpack_pairs(*_F16, shift=True), _unpack_pairs(*_F16, shift=False)
_SCALED_BF16, _SCALED_BF16_ANY = _unpack_pairs(*_BF16, shift=True, scaled=True), _unpack_pairs(*_BF16, shift=False, scaled=True)
_SCALED_F16, _SCALED_F16_ANY = _unpack_pairs(*_F16, shift=True, scaled=True), _unpack_pairs(*_F16, shift=False, scaled=True)
_REGISTERS = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r,r,r")
_SCALED_REGISTERS = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r")


@triton.jit
def numbers_of(
    words, zero, scale, table,
    DOT: tl.constexpr, WHOLE: tl.constexpr, SCALED: tl.constexpr, TABLE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The 8 fields as the tensor cores' operands: codes - zero, each of the words' shape, to which `zero` and `scale` are broadcast.
    WHOLE: the zeros are whole, and the difference is exact. SCALED: times the scale, rounded to DOT (and the scale before)."""
    if ASM:
        # 128 and 1024: what a code is added to by putting it below the constant's bits
        constant: tl.constexpr = (1024.0 if DOT == tl.float16 else 128.0) if WHOLE else 0.0  # noqa: SIM300
        minus = tl.broadcast_to((-constant - zero).to(DOT), words.shape)
        if SCALED:
            times = tl.broadcast_to(scale.to(DOT), words.shape)
            if DOT == tl.float16:  # noqa: SIM300
                return tl.inline_asm_elementwise(
                    _SCALED_F16 if WHOLE else _SCALED_F16_ANY, _SCALED_REGISTERS, [words, minus, times],
                    (tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16), True, 2,
                )  # fmt: skip
            else:
                return tl.inline_asm_elementwise(
                    _SCALED_BF16 if WHOLE else _SCALED_BF16_ANY, _SCALED_REGISTERS, [words, minus, times],
                    (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2,
                )  # fmt: skip
        elif DOT == tl.float16:  # noqa: SIM300
            return tl.inline_asm_elementwise(
                _ASM_F16 if WHOLE else _ASM_F16_ANY, _REGISTERS, [words, minus],
                (tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16), True, 2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                _ASM_BF16 if WHOLE else _ASM_BF16_ANY, _REGISTERS, [words, minus],
                (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2,
            )  # fmt: skip
    else:
        return (
            _number(words, zero, scale, table, 0, DOT, SCALED, TABLE), _number(words, zero, scale, table, 1, DOT, SCALED, TABLE),
            _number(words, zero, scale, table, 2, DOT, SCALED, TABLE), _number(words, zero, scale, table, 3, DOT, SCALED, TABLE),
            _number(words, zero, scale, table, 4, DOT, SCALED, TABLE), _number(words, zero, scale, table, 5, DOT, SCALED, TABLE),
            _number(words, zero, scale, table, 6, DOT, SCALED, TABLE), _number(words, zero, scale, table, 7, DOT, SCALED, TABLE),
        )  # fmt: skip


@triton.jit
def _number(words, zero, scale, table, FIELD: tl.constexpr, DOT: tl.constexpr, SCALED: tl.constexpr, TABLE: tl.constexpr):
    codes = (words >> (4 * FIELD)) & 15
    number = tl.load(table + codes) if TABLE else codes.to(tl.float32) - zero
    return (number * scale if SCALED else number).to(DOT)


@triton.jit
def scale_of(scales, zeros, n, n_in, group, GROUPS, HAS_ZEROS: tl.constexpr):
    """(scales, zeros) of a group for each n: float32; nought of a group that is not there."""
    inside = n_in & (group < GROUPS)
    s, z = tl.load(scales + n * GROUPS + group, mask=inside, other=0.0).to(tl.float32), tl.zeros(n.shape, tl.float32)
    if HAS_ZEROS:
        z = tl.load(zeros + n * GROUPS + group, mask=inside, other=0.0).to(tl.float32)
    return s, z
