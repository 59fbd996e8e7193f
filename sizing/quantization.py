"""Bytes of a linear's weight by quantization scheme: what is stored for each weight, each group of weights and each row.

Owns the names of the schemes (`--quantize` and the planner take the same) and LoRAX's names for them. It does not know how a scheme is
loaded or computed: server/model does. What stays in the model's own type (embedding, head, norms, routers, a MoE's experts) is `weights`'s.
"""

import difflib
from dataclasses import dataclass

from sizing.errors import SizingError


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What is kept of a weight [out, in]: `bits` a weight, `group_bytes` for every `group_size` weights of a row (0: no groups),
    `row_bytes` a row, `column_bytes` a column (GPTQ's group index). `has_experts`: whether a MoE's experts are quantized too."""

    name: str
    bits: float
    what: str
    group_size: int = 0
    group_bytes: float = 0.0
    row_bytes: float = 0.0
    column_bytes: float = 0.0
    has_experts: bool = False

    @property
    def bytes_per_weight(self) -> float:
        """Weights and their groups' scales; what is kept a row or a column comes on top."""
        return self.bits / 8 + (self.group_bytes / self.group_size if self.group_size else 0.0)

    def num_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a weight [out, in]; a last group that is not full takes a whole one's scale."""
        groups = -(-in_features // self.group_size) if self.group_size else 0
        per_row = in_features * self.bits / 8 + groups * self.group_bytes + self.row_bytes
        return round(out_features * per_row + in_features * self.column_bytes)


_SCHEMES = (
    Scheme(name="bf16", bits=16, what="bfloat16 as it is", has_experts=True),
    Scheme(name="fp16", bits=16, what="float16 as it is", has_experts=True),
    Scheme(name="fp32", bits=32, what="float32 as it is", has_experts=True),
    Scheme(name="fp8", bits=8, row_bytes=4, what="float8 e4m3, a float32 scale a row"),
    Scheme(name="int8", bits=8, row_bytes=2, what="int8 weights only, a scale a row"),
    Scheme(name="int8-bnb", bits=8, row_bytes=4, what="bitsandbytes LLM.int8(), a float32 scale a row"),
    Scheme(name="int4", bits=4, group_size=128, group_bytes=4, what="int4 weights only, scale and zero of 128 weights"),
    Scheme(name="awq", bits=4, group_size=128, group_bytes=2.5, what="AWQ checkpoint: float16 scale and 4-bit zero of 128 weights"),
    Scheme(
        name="gptq",
        bits=4,
        group_size=128,
        group_bytes=2.5,
        column_bytes=4,
        what="GPTQ checkpoint: as AWQ, and each column's group",
    ),
    Scheme(name="hqq", bits=4, group_size=64, group_bytes=4, what="HQQ 4-bit: scale and zero of 64 weights"),
    Scheme(name="nf4", bits=4, group_size=64, group_bytes=4, what="bitsandbytes NF4: a float32 maximum of 64 weights"),
)
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _SCHEMES}
# LoRAX's --quantize, transformers' quant_method and torch's names -> ours.
ALIASES = {
    "none": "bf16",
    "auto": "bf16",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "bitsandbytes": "int8-bnb",
    "bitsandbytes-nf4": "nf4",
    "bitsandbytes-fp4": "nf4",
    "eetq": "int8",
    "hqq-4bit": "hqq",
}


def scheme_named(name: str) -> Scheme:
    """The scheme of that name or alias. SizingError names what there is."""
    found = SCHEMES.get(ALIASES.get(name, name))
    if found is None:
        near = difflib.get_close_matches(name, [*SCHEMES, *ALIASES], n=1)
        raise SizingError(
            f"quantize: there is no scheme '{name}'{f' (did you mean {near[0]}?)' if near else ''}. Allowed: {', '.join(SCHEMES)}"
        )
    return found
