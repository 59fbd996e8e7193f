"""4 bits by rounding to the nearest, while loading: a scale and a whole zero for each group of 128 inputs (64 or 32 if need be)."""

import torch

from server.kernels.quantized import QuantizedWeight, pack
from server.model.quantization.scheme import Scheme, group_for, grouped


def quantize(weight: torch.Tensor) -> QuantizedWeight:
    """The range of each group, nought included, in 15 steps."""
    group = group_for(weight.shape[1])
    values = grouped(weight, group)
    least, most = values.amin(2).clamp(max=0), values.amax(2).clamp(min=0)  # [out, groups]
    scales = ((most - least) / 15).clamp(min=1e-7).half()
    zeros = (-least / scales.float()).round().clamp(0, 15)
    codes = (values / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15).to(torch.uint8)
    return QuantizedWeight("int4", pack(codes.view(weight.shape)), scales, zeros.half(), weight.shape[1], group)


SCHEME = Scheme("int4", 4.25, "4 bits rounded to the nearest while loading, groups of 128", quantize)
