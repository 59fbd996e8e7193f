"""What a quantization scheme is: how a weight is rounded while it is read, or how a checkpoint of rounded weights is read. One contract.

It knows one linear at a time. Which linears there are and where their tensors lie is loading.py's business; the form that every scheme
ends in, and the products with it, are kernels/quantized.py's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from server.kernels.quantized import QuantizedWeight, check_group

GROUPS = (128, 64, 32)  # tried in this order where a scheme leaves the size of a group open
Quantize = Callable[[torch.Tensor], QuantizedWeight]  # weight [out, in] of any floating type


class Reader(Protocol):
    """How the linears of one checkpoint are read."""

    names: tuple[str, ...]  # the tensors of a linear: "qweight" for "model.layers.0.mlp.down_proj.qweight"
    mark: str  # the one of them that only quantized linears have

    def read(self, tensors: Mapping[str, torch.Tensor], in_features: int, out_features: int) -> QuantizedWeight:
        """The linear's weight. ValueError says what does not fit; loading.py adds the linear's name."""
        ...


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to hold a linear's weight in few bits. `quantize` or `reader`, or both."""

    name: str
    bits: float  # of a weight, its share of scales and zeros included, at the default group
    what: str  # for the documentation
    quantize: Quantize | None = None  # while loading an ordinary checkpoint
    method: str | None = None  # `quant_method` of the checkpoints that it reads
    reader: Callable[[Mapping[str, Any]], Reader] | None = None  # of such a checkpoint's quantization_config; ValueError: it cannot be read
    card: tuple[int, int] = (0, 0)  # the least compute capability of a GPU


def group_for(in_features: int) -> int:
    """The size of group for so many inputs. ValueError if none fits."""
    for group in GROUPS:
        if in_features % group == 0:
            return group
    check_group(in_features, GROUPS[-1])
    raise AssertionError("unreachable")


def grouped(weight: torch.Tensor, group: int) -> torch.Tensor:
    """weight [out, in] -> float32 [out, groups, group]."""
    return weight.float().view(weight.shape[0], -1, group)


def require(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
    """A value of a checkpoint's quantization_config. ValueError if it is none of those allowed."""
    value = config.get(key, default)
    if value not in allowed:
        raise ValueError(f"quantization_config.{key} is {value!r}; allowed: {', '.join(repr(one) for one in allowed)}")
    return value


def expect(tensors: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A checkpoint's tensor. ValueError if its shape is another."""
    if tuple(tensors[name].shape) != shape:
        raise ValueError(f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}")
    return tensors[name]
