"""bitsandbytes' 8 bits: made while loading, or read from a checkpoint that bitsandbytes wrote.

The same numbers as LLM.int8()'s (arXiv 2208.07339), a scale for each output. Activations are not rounded here, so nothing is set apart
as an outlier.
"""

from collections.abc import Mapping
from typing import Any

import torch

from server.kernels.quantized import QuantizedWeight
from server.model.quantization.int8 import quantize
from server.model.quantization.scheme import Scheme, expect


class _Reader:
    """The weight as int8, and each output's greatest weight."""

    names, mark = ("weight", "SCB"), "SCB"

    def __init__(self, config: Mapping[str, Any]) -> None:
        pass

    def read(self, tensors: Mapping[str, torch.Tensor], in_features: int, out_features: int) -> QuantizedWeight:
        codes = expect(tensors, "weight", (out_features, in_features))
        if codes.dtype != torch.int8:
            raise ValueError(f"weight is {codes.dtype}, expected torch.int8")
        scales = expect(tensors, "SCB", (out_features,)).float().view(-1, 1) / 127
        return QuantizedWeight("int8", codes, scales, None, in_features, in_features)


SCHEME = Scheme(
    "int8-bnb", 8.0, "bitsandbytes' 8 bits, made while loading or read from its checkpoints", quantize, "bitsandbytes-int8", _Reader
)
