"""Bytes of a model's weights on the device, by what they are: the decoder's linears (what a scheme quantizes), experts, the rest.

Called by `memory` for what is reserved and by `throughput` for what a step reads.
"""

from dataclasses import dataclass

from sizing.quantization import Scheme, scheme_named
from sizing.shape import Linear, ModelShape


@dataclass(frozen=True)
class Weights:
    """Bytes. `embedding` is read by the row (and is the head's weight where that is tied); `extra`: seen in the files beyond the shape."""

    linears: int
    experts: int
    embedding: int
    head: int
    other: int
    extra: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.linears + self.experts + self.embedding + self.head + self.other + self.extra


def weights_of(shape: ModelShape, scheme: str | None = None, dtype: str = "bf16") -> Weights:
    """The weights as they lie on the device: under `scheme` (None: the checkpoint's own), what is not quantized in `dtype`.

    SizingError if there is no such scheme."""
    plain = scheme_named(dtype)
    chosen = scheme_named(scheme or shape.quantization or dtype)
    item_bytes = plain.bits / 8
    linears = sum(_linear_bytes(linear, chosen, item_bytes) for group in shape.groups for linear in group)
    per_expert = chosen.bytes_per_weight if chosen.has_experts else item_bytes
    experts = sum(layer.experts.count * layer.experts.params_each for layer in shape.layers if layer.experts)
    embedding = round(shape.embedding_params * item_bytes)
    head = _linear_bytes(shape.head, plain, item_bytes) if shape.head else 0
    other = round((shape.other_params + sum(layer.other_params for layer in shape.layers)) * item_bytes)
    extra = 0
    if shape.num_params_seen is not None and shape.quantization is None:
        extra = round((shape.num_params_seen - shape.num_params) * item_bytes)
    elif shape.stored_bytes is not None and chosen.name == shape.quantization:
        stored = sum(_linear_bytes(linear, chosen, item_bytes, in_file=True) for group in shape.groups for linear in group)
        extra = max(0, shape.stored_bytes - (stored + round(experts * per_expert) + embedding + head + other))
    return Weights(linears, round(experts * per_expert), embedding, head, other, extra)


def _linear_bytes(linear: Linear, scheme: Scheme, item_bytes: float, *, in_file: bool = False) -> int:
    bias = round(linear.out_features * item_bytes) if linear.has_bias else 0
    num_bytes = scheme.file_bytes if in_file else scheme.num_bytes
    return num_bytes(linear.out_features, linear.in_features) + bias
