"""The module that stands in a quantized linear's place, and the product of one or several of them that read the same input.

Owns the choice between the kernels (on a GPU with Triton) and the plain meaning (else). It does not know how the weight came to be.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn

from server.kernels.launch import Card, card_of
from server.kernels.quantized import QuantizedWeight, dequantize, multiply_reference, together
from server.kernels.quantized_launch import choose

log = logging.getLogger(__name__)


class QuantizedLinear(nn.Module):
    """A linear whose weight has few bits. Its parameters are its bias alone: `weight` [out, in] is nobody's to read as it was."""

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", bias)
        self.quantized: QuantizedWeight | None = None

    @property
    def parameter_shapes(self) -> dict[str, list[int]]:
        """The parameters of the linear that it stands for, as adapters meet them."""
        weight = {"weight": [self.out_features, self.in_features]}
        return weight if self.bias is None else weight | {"bias": [self.out_features]}

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [.., in] -> [.., out]. Until a product takes over."""
        assert self.quantized is not None, "its weight was not read, or belongs to a product"
        return QuantizedProduct([self.quantized], self.bias)(x)


class QuantizedProduct:
    """x [.., in] -> [.., sum of outs] of linears that read the same input, as one product if they are quantized alike."""

    def __init__(self, weights: Sequence[QuantizedWeight], bias: torch.Tensor | None) -> None:
        merged = together(weights)
        self.weights, self.bias = list(weights) if merged is None else [merged], bias
        self._outs = [weight.out_features for weight in weights]
        if merged is None:
            log.info("%d linears that read the same input are products of their own: they are quantized differently", len(weights))

    @property
    def out_features(self) -> int:
        """Columns of the product."""
        return sum(self._outs)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        parts = [_multiply(rows, weight) for weight in self.weights] if len(self.weights) > 1 else None
        if parts is None:
            y = _multiply(rows, self.weights[0], self.bias)
        else:
            y = torch.cat(parts, 1)
            y = y if self.bias is None else y.add_(self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def warm_up(self, max_rows: int, dtype: torch.dtype, seen: set[tuple]) -> None:
        """Have the kernels of products of up to `max_rows` rows compiled. `seen`: what was compiled for others, added to."""
        device = self.weights[0].data.device
        for weight in self.weights:
            for num_rows in sorted({*range(1, min(max_rows, 512) + 1), max_rows}):
                choice = choose(_card(device), num_rows, weight.in_features, weight.out_features, weight.code)
                by_16 = weight.out_features % 16 == 0  # Triton compiles for that
                kind = (weight.code, weight.group, weight.in_features, by_16, weight.integer_zeros, self.bias is None, choice)
                if kind not in seen:
                    seen.add(kind)
                    _multiply(torch.zeros(num_rows, weight.in_features, dtype=dtype, device=device), weight, self.bias)

    def dense(self, index: int) -> torch.Tensor:
        """The weight of one of the linears, made anew: float32 [out, in]."""
        if len(self.weights) > 1:
            return dequantize(self.weights[index])
        start = sum(self._outs[:index])
        return dequantize(self.weights[0].rows(start, start + self._outs[index]))


@lru_cache
def _card(device: torch.device) -> Card:
    properties = torch.cuda.get_device_properties(device)
    return card_of((properties.major, properties.minor), properties.multi_processor_count)


def _multiply(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    if x.device.type != "cuda" or not len(x):
        return multiply_reference(x, weight, bias)
    from server.kernels.quantized_kernels import multiply  # needs Triton

    return multiply(x, weight, bias, choose(_card(x.device), len(x), weight.in_features, weight.out_features, weight.code))
