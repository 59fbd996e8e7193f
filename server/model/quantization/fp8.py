"""e4m3 numbers, while loading: one scale for each output. Products of many rows round each row of the activations to e4m3 as well."""

import torch

from server.kernels.quantized import QuantizedWeight
from server.model.quantization.scheme import Scheme

_MOST = torch.finfo(torch.float8_e4m3fn).max


def quantize(weight: torch.Tensor) -> QuantizedWeight:
    """Each output's greatest weight becomes e4m3's greatest number, 448."""
    values = weight.float()
    scales = (values.abs().amax(1, keepdim=True) / _MOST).clamp(min=1e-12)
    codes = (values / scales).clamp(-_MOST, _MOST).to(torch.float8_e4m3fn)
    return QuantizedWeight("fp8", codes, scales, None, weight.shape[1], weight.shape[1])


SCHEME = Scheme("fp8", 8.0, "e4m3 numbers made while loading, a scale for each output and each row of activations", quantize, card=(8, 9))
