"""GPTQ checkpoints (arXiv 2210.17323) of 4 bits, as AutoGPTQ and GPTQModel write them: `gptq` and `gptq_v2`, in any order of inputs.

A word of qweight [in / 8, out] holds eight inputs of one output; qzeros [groups, out / 8] eight outputs of one group, of format `gptq` less
one. g_idx [in] says whose group an input is: inputs are put in the groups' order, and the activations with them.
"""

from collections.abc import Mapping
from typing import Any

import torch

from server.kernels.quantized import QuantizedWeight, check_group, pack
from server.model.quantization.scheme import Scheme, expect, require


class _Reader:
    mark = "qweight"

    def __init__(self, config: Mapping[str, Any]) -> None:
        require(config, "bits", (4,))
        version = require(config, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
        if config.get("dynamic"):
            raise ValueError("quantization_config.dynamic (bits that differ by module) is not supported")
        self._added = 1 if version == "gptq" else 0
        self._group = int(config.get("group_size", 128))
        self._ordered = bool(config.get("desc_act"))
        self.names = ("qweight", "qzeros", "scales", *(("g_idx",) if self._ordered else ()))

    def read(self, tensors: Mapping[str, torch.Tensor], in_features: int, out_features: int) -> QuantizedWeight:
        group = in_features if self._group == -1 else self._group
        check_group(in_features, group)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=tensors["qweight"].device)
        words = expect(tensors, "qweight", (in_features // 8, out_features))
        codes = ((words[:, None] >> shifts[:, None]) & 15).to(torch.uint8).reshape(in_features, out_features)
        zero_words = expect(tensors, "qzeros", (in_features // group, out_features // 8))
        zeros = ((zero_words[..., None] >> shifts) & 15).reshape(-1, out_features) + self._added
        scales = expect(tensors, "scales", (in_features // group, out_features))
        order = self._order(expect(tensors, "g_idx", (in_features,)), group) if self._ordered else None
        codes = (codes if order is None else codes[order]).T.contiguous()
        return QuantizedWeight("int4", pack(codes), scales.T.half().contiguous(), zeros.T.half().contiguous(), in_features, group, order)

    def _order(self, group_of: torch.Tensor, group: int) -> torch.Tensor | None:
        """The inputs by group; None if they are so already."""
        counts = torch.bincount(group_of.long(), minlength=len(group_of) // group)
        if not bool((counts == group).all()):
            raise ValueError(f"g_idx does not put {group} inputs in every group")
        order = torch.argsort(group_of, stable=True)
        return None if bool((order[1:] > order[:-1]).all()) else order


SCHEME = Scheme("gptq", 4.25, "GPTQ checkpoints of 4 bits, with activation order or without", method="gptq", reader=_Reader)
