"""8 bits by rounding to the nearest, while loading: one scale for each output, symmetric. Activations keep their type."""

import torch

from server.kernels.quantized import QuantizedWeight
from server.model.quantization.scheme import Scheme


def quantize(weight: torch.Tensor) -> QuantizedWeight:
    """Each output's greatest weight becomes 127."""
    values = weight.float()
    scales = (values.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)
    codes = (values / scales).round().clamp(-127, 127).to(torch.int8)
    return QuantizedWeight("int8", codes, scales, None, weight.shape[1], weight.shape[1])


SCHEME = Scheme("int8", 8.0, "8 bits rounded to the nearest while loading, a scale for each output", quantize)
