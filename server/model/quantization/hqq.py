"""HQQ in 4 bits, while loading: no data is needed. Groups of 64 inputs whose zeros are fitted by half-quadratic splitting.

The method is Badri and Shaji's (mobiusml.github.io/hqq_blog): the error is split into a sparse part, which a shrinkage of the l_p norm
(p < 1) finds, and the rest, for which the best zero is a mean. Both are done in turn, with a growing weight on the split.
"""

import torch

from server.kernels.quantized import QuantizedWeight, check_group, pack
from server.model.quantization.scheme import Scheme, grouped

GROUP = 64
_NORM, _BETA, _GROWTH, _ROUNDS = 0.7, 10.0, 1.01, 20


def quantize(weight: torch.Tensor) -> QuantizedWeight:
    """ValueError if the inputs cannot be in groups of 64."""
    check_group(weight.shape[1], GROUP)
    values = grouped(weight, GROUP)
    least, most = values.amin(2, keepdim=True), values.amax(2, keepdim=True)  # [out, groups, 1]
    scales = ((most - least) / 15).clamp(min=1e-7).half().float()
    zeros = _fit_zeros(values, scales, (-least / scales).round())
    zeros = zeros.bfloat16()  # what the tensor cores' operand can hold: then code - zero is rounded once
    codes = (values / scales + zeros.float()).round().clamp(0, 15).to(torch.uint8)
    return QuantizedWeight(
        "int4", pack(codes.view(weight.shape)), scales[..., 0].half(), zeros[..., 0].half(), weight.shape[1], GROUP, integer_zeros=False
    )


def _fit_zeros(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Zeros [out, groups, 1] that make the l_p norm of the error small; those of the best round."""
    best, best_error, beta = zeros, torch.inf, _BETA
    for _ in range(_ROUNDS):
        codes = (values / scales + zeros).round().clamp(0, 15)
        error = values - (codes - zeros) * scales
        mean_error = error.abs().mean().item()
        if mean_error >= best_error:
            break
        best, best_error = zeros, mean_error
        shrunk = error.sign() * (error.abs() - error.abs().clamp(min=1e-12).pow(_NORM - 1) / beta).clamp(min=0)
        zeros = (codes - (values - shrunk) / scales).mean(2, keepdim=True)
        beta *= _GROWTH
    return best


SCHEME = Scheme("hqq", 4.5, "HQQ in 4 bits while loading, groups of 64 with fitted zeros; no data needed", quantize)
