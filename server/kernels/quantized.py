"""Weights of few bits: how they lie in memory, and what a product with them means. Plain torch: the CPU's path and the kernels' oracle.

It knows tensors alone, not which scheme or checkpoint they come from (server/model/quantization converts all of those into this one form).
No Triton here: quantized_kernels.py has the kernels, quantized_launch.py their launch choices. Called by model/ for every quantized linear.

Codes of 4 bits lie in words of 32, such that a tile of words unpacks into tiles of the same shape, without moving anything between
threads: of each UNIT of 128 inputs, word j (0 to 15) holds input 16 i + j in bits [4 i, 4 i + 4). The last unit is padded. Codes of 8 bits
lie plainly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

UNIT = 128  # inputs whose 4-bit codes share 16 words
WORDS = 16
CODES = ("int4", "nf4", "int8", "fp8")
# The 16 values of bitsandbytes' NormalFloat4 (QLoRA, arXiv 2305.14314, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A linear's weight [out, in], or several of them one after the other.

    Semantics: W[n, k] = scales[n, k // group] * (value(code[n, k]) - zeros[n, k // group]); with `order`, column order[k] of the linear's
    weight is column k here. value: of int4 the code 0 to 15, of nf4 NF4[code], of int8 and fp8 (e4m3) the number itself."""

    code: str
    data: torch.Tensor  # int4, nf4: int32 [out, units * 16]; int8: int8 [out, in]; fp8: float8_e4m3fn [out, in]
    scales: torch.Tensor  # float16 or float32 [out, groups]
    zeros: torch.Tensor | None  # like scales; int4 alone has any
    in_features: int
    group: int
    order: torch.Tensor | None = None  # int64 [in]
    integer_zeros: bool = True  # every zero is a whole number from 0 to 16

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.data.shape[0]

    @property
    def bits(self) -> int:
        """Of a code."""
        return 8 if self.code in ("int8", "fp8") else 4

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes."""
        return sum(t.nbytes for t in (self.data, self.scales, self.zeros, self.order) if t is not None)

    def rows(self, start: int, stop: int) -> "QuantizedWeight":
        """Rows [start, stop) of it; nothing is copied."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return replace(self, data=self.data[start:stop], scales=self.scales[start:stop], zeros=zeros)


def check_group(in_features: int, group: int) -> None:
    """ValueError if inputs cannot be scaled in groups of so many."""
    if group < 16 or in_features % group or not (group % UNIT == 0 or UNIT % group == 0 or group == in_features >= UNIT):
        raise ValueError(
            f"{in_features} inputs cannot be in groups of {group}: "
            f"allowed are 16, 32, 64, multiples of {UNIT}, or all inputs, without a rest"
        )


def pack(codes: torch.Tensor) -> torch.Tensor:
    """codes of 4 bits, uint8 [out, in] -> words int32 [out, units * 16]."""
    num_out, num_in = codes.shape
    padded = F.pad(codes, (0, -num_in % UNIT)).view(num_out, -1, 8, WORDS).to(torch.int32)  # [out, units, field, word]
    words = padded[:, :, 0].clone()
    for field in range(1, 8):
        words |= padded[:, :, field] << 4 * field
    return words.reshape(num_out, -1)


_tables: dict[torch.device, torch.Tensor] = {}


def table_on(device: torch.device) -> torch.Tensor:
    """NF4's values on a device: float32 [16]."""
    if device not in _tables:
        _tables[device] = torch.tensor(NF4, device=device)
    return _tables[device]


def unpack(words: torch.Tensor, in_features: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 [out, in]."""
    units = words.view(words.shape[0], -1, 1, WORDS)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device).view(8, 1)
    return ((units >> shifts) & 15).to(torch.uint8).reshape(words.shape[0], -1)[:, :in_features]


def values(weight: QuantizedWeight) -> torch.Tensor:
    """What the codes stand for, before scale and zero: float32 [out, in]."""
    if weight.bits == 8:
        return weight.data.float()
    codes = unpack(weight.data, weight.in_features)
    if weight.code == "nf4":
        return table_on(codes.device)[codes.long()]
    return codes.float()


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The linear's weight [out, in], in the linear's own order of inputs; computed in float32."""
    grouped = values(weight).view(weight.out_features, -1, weight.group)  # [out, groups, group]
    if weight.zeros is not None:
        grouped = grouped - weight.zeros.float()[..., None]
    dense = (grouped * weight.scales.float()[..., None]).view(weight.out_features, -1).to(dtype)
    if weight.order is not None:
        dense = torch.empty_like(dense).index_copy_(1, weight.order, dense)
    return dense


def multiply_reference(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [rows, in] -> [rows, out] in x's type: the meaning of every kernel.

    Semantics: y[m, n] = sum_k x[m, k] * W[n, k] + bias[n]"""
    return F.linear(x, dequantize(weight, x.dtype), bias)


def together(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """Weights that read the same input as one, their rows one after the other; None if they are quantized differently."""
    first = weights[0]
    if len(weights) == 1:
        return first
    for other in weights[1:]:
        alike = (other.code, other.group, other.scales.dtype) == (first.code, first.group, first.scales.dtype)
        if not alike or (other.zeros is None) != (first.zeros is None) or not _equal(other.order, first.order):
            return None
    return replace(
        first,
        data=torch.cat([w.data.view(torch.uint8) for w in weights]).view(first.data.dtype),
        scales=torch.cat([w.scales for w in weights]),
        zeros=None if first.zeros is None else torch.cat([w.zeros for w in weights if w.zeros is not None]),
        integer_zeros=all(w.integer_zeros for w in weights),
    )


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)
