"""bitsandbytes' NormalFloat4: blocks of 64 inputs with one scale, made while loading or read from a checkpoint that bitsandbytes wrote.

The kernels are ours, not bitsandbytes'. Scales are held in float16 (bitsandbytes: float32, or 8 bits scaled once more, which are undone).
"""

import json
from collections.abc import Mapping
from typing import Any

import torch

from server.kernels.quantized import NF4, QuantizedWeight, check_group, pack
from server.model.quantization.scheme import Scheme, expect, grouped, require

BLOCK = 64


def quantize(weight: torch.Tensor) -> QuantizedWeight:
    """ValueError if the inputs cannot be in blocks of 64."""
    check_group(weight.shape[1], BLOCK)
    values = grouped(weight, BLOCK)
    scales = values.abs().amax(2).clamp(min=1e-7).half()  # [out, blocks]
    table = torch.tensor(NF4, device=weight.device)
    codes = torch.bucketize(values / scales.float()[..., None], (table[1:] + table[:-1]) / 2)
    return QuantizedWeight("nf4", pack(codes.view(weight.shape).to(torch.uint8)), scales, None, weight.shape[1], BLOCK)


class _Reader:
    """Two codes a byte, the first in the upper bits, of the weight as one row."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        require(config, "bnb_4bit_quant_type", ("nf4",), "fp4")
        self._nested = bool(config.get("bnb_4bit_use_double_quant"))
        nested = ("weight.nested_absmax", "weight.nested_quant_map") if self._nested else ()
        self.names, self.mark = ("weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4", *nested), "weight.absmax"

    def read(self, tensors: Mapping[str, torch.Tensor], in_features: int, out_features: int) -> QuantizedWeight:
        state = json.loads(bytes(tensors["weight.quant_state.bitsandbytes__nf4"].cpu().numpy()))
        if state["blocksize"] != BLOCK:
            raise ValueError(f"blocks of {state['blocksize']} inputs; allowed are {BLOCK}")
        check_group(in_features, BLOCK)
        size = in_features * out_features
        scales = expect(tensors, "weight.absmax", (size // BLOCK,))
        if self._nested:
            block, offset = state["nested_blocksize"], state["nested_offset"]
            outer = tensors["weight.nested_absmax"].float().repeat_interleave(block)[: len(scales)]
            scales = tensors["weight.nested_quant_map"].float()[scales.long()] * outer + offset
        packed = tensors["weight"].view(torch.uint8).reshape(-1)
        if len(packed) * 2 != size:
            raise ValueError(f"weight has {len(packed)} bytes, expected {size // 2}")
        codes = torch.stack((packed >> 4, packed & 15), 1).view(out_features, in_features)
        return QuantizedWeight("nf4", pack(codes), scales.half().view(out_features, -1), None, in_features, BLOCK)


SCHEME = Scheme("nf4", 4.25, "bitsandbytes' nf4, made while loading or read from its checkpoints", quantize, "bitsandbytes-nf4", _Reader)
