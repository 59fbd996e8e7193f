"""Bytes of a linear's weight by quantization scheme: what is stored for each weight, each group of weights and each row.

Owns the names of the schemes (`--quantize` and the planner take the same) and LoRAX's names for them. It does not know how a scheme is
loaded or computed: server/model does. What stays in the model's own type (embedding, head, norms, routers, a MoE's experts) is `weights`'s.
"""

import difflib
from dataclasses import dataclass

from sizing.errors import SizingError

UNIT = 128  # inputs of a row whose 4-bit codes lie together; the last unit is a whole one


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What is kept of a weight [out, in] on the device: `bits` a weight, `group_bytes` for every `group_size` weights of a row (0: no
    groups; `smaller_groups` where that does not divide the inputs), `row_bytes` a row, `column_bytes` a column (GPTQ's order of inputs).
    `file_*`: where a checkpoint's files have other bytes. `has_experts`: whether a MoE's experts are quantized too."""

    name: str
    bits: float
    what: str
    group_size: int = 0
    smaller_groups: tuple[int, ...] = ()
    group_bytes: float = 0.0
    row_bytes: float = 0.0
    column_bytes: float = 0.0
    file_group_bytes: float | None = None
    file_column_bytes: float | None = None
    has_experts: bool = False

    @property
    def bytes_per_weight(self) -> float:
        """Weights and their groups' scales; what is kept a row or a column comes on top."""
        return self.bits / 8 + (self.group_bytes / self.group_size if self.group_size else 0.0)

    def num_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a weight [out, in] on the device; a last group that is not full takes a whole one's scale."""
        padded = -(-in_features // UNIT) * UNIT if self.bits == 4 else in_features
        return self._sum(out_features, in_features, padded, self.group_bytes, self.column_bytes)

    def file_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a weight [out, in] in a checkpoint's files."""
        group_bytes = self.group_bytes if self.file_group_bytes is None else self.file_group_bytes
        column_bytes = self.column_bytes if self.file_column_bytes is None else self.file_column_bytes
        return self._sum(out_features, in_features, in_features, group_bytes, column_bytes)

    def _sum(self, out_features: int, in_features: int, values: int, group_bytes: float, column_bytes: float) -> int:
        size = next((size for size in (self.group_size, *self.smaller_groups) if size and in_features % size == 0), self.group_size)
        groups = -(-in_features // size) if size else 0
        per_row = values * self.bits / 8 + groups * group_bytes + self.row_bytes
        return round(out_features * per_row + in_features * column_bytes)


_SCHEMES = (
    Scheme(name="bf16", bits=16, what="bfloat16 as it is", has_experts=True),
    Scheme(name="fp16", bits=16, what="float16 as it is", has_experts=True),
    Scheme(name="fp32", bits=32, what="float32 as it is", has_experts=True),
    Scheme(name="fp8", bits=8, row_bytes=4, what="float8 e4m3, a float32 scale a row"),
    Scheme(name="int8", bits=8, row_bytes=4, what="int8 weights only, a float32 scale a row"),
    Scheme(name="int8-bnb", bits=8, row_bytes=4, what="bitsandbytes LLM.int8(), a float32 scale a row"),
    Scheme(
        name="int4",
        bits=4,
        group_size=128,
        smaller_groups=(64, 32),
        group_bytes=4,
        what="int4 weights only, float16 scale and zero of 128 weights",
    ),
    Scheme(
        name="awq",
        bits=4,
        group_size=128,
        group_bytes=4,
        file_group_bytes=2.5,
        what="AWQ checkpoint: float16 scale and zero of 128 weights (the file: a zero of 4 bits)",
    ),
    Scheme(
        name="gptq",
        bits=4,
        group_size=128,
        group_bytes=4,
        column_bytes=8,
        file_group_bytes=2.5,
        file_column_bytes=4,
        what="GPTQ checkpoint: as AWQ, and the order of the columns",
    ),
    Scheme(name="hqq", bits=4, group_size=64, group_bytes=4, what="HQQ 4-bit: float16 scale and zero of 64 weights"),
    Scheme(
        name="nf4",
        bits=4,
        group_size=64,
        group_bytes=2,
        file_group_bytes=4,
        what="bitsandbytes NF4: a float16 maximum of 64 weights (the file: float32)",
    ),
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
