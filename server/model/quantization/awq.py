"""AWQ checkpoints (arXiv 2306.00978), as AutoAWQ and llm-compressor's AWQ export write them: `version` gemm, 4 bits, whole zeros.

A word of qweight [in, out / 8] holds eight outputs of one input in the order 0 2 4 6 1 3 5 7; qzeros [groups, out / 8] likewise.
"""

from collections.abc import Mapping
from typing import Any

import torch

from server.kernels.quantized import QuantizedWeight, check_group, pack
from server.model.quantization.scheme import Scheme, expect, require

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class _Reader:
    names, mark = ("qweight", "qzeros", "scales"), "qweight"

    def __init__(self, config: Mapping[str, Any]) -> None:
        require(config, "bits", (4,), config.get("w_bit"))
        require({"version": str(config.get("version", "gemm")).lower()}, "version", ("gemm",))
        require(config, "zero_point", (True,), True)
        self._group = int(config.get("group_size", config.get("q_group_size", 128)))

    def read(self, tensors: Mapping[str, torch.Tensor], in_features: int, out_features: int) -> QuantizedWeight:
        group = in_features if self._group == -1 else self._group
        check_group(in_features, group)
        codes = _columns(expect(tensors, "qweight", (in_features, out_features // 8)))  # [in, out]
        zeros = _columns(expect(tensors, "qzeros", (in_features // group, out_features // 8)))
        scales = expect(tensors, "scales", (in_features // group, out_features))
        return QuantizedWeight(
            "int4", pack(codes.T.contiguous()), scales.T.half().contiguous(), zeros.T.half().contiguous(), in_features, group
        )


def _columns(words: torch.Tensor) -> torch.Tensor:
    """Words int32 [rows, out / 8] -> codes uint8 [rows, out]."""
    codes = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    for place, column in enumerate(_ORDER):
        codes[..., column] = (words >> 4 * place) & 15
    return codes.view(words.shape[0], -1)


SCHEME = Scheme("awq", 4.25, "AWQ checkpoints of 4 bits", method="awq", reader=_Reader)
