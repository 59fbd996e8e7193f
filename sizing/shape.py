"""A model's shape: its linears in the groups that the engine runs as one product, its attention layers, everything else counted.

Owns the types and what follows from them by arithmetic. `architectures` makes a shape from a config; `weights`, `budget`, `throughput` and
`adapters` read it. Numbers of values throughout, not bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Linear:
    """A linear that an adapter may target, by the last part of its path: weight [out, in]."""

    name: str
    in_features: int
    out_features: int
    has_bias: bool = False

    @property
    def num_params(self) -> int:
        """Weight and bias."""
        return self.in_features * self.out_features + (self.out_features if self.has_bias else 0)


Group = tuple[Linear, ...]  # linears that read one input: the engine runs them as one product


@dataclass(frozen=True)
class Attention:
    """One layer's attention as the cache sees it. DeepSeek's latent attention is expanded before it gets there: a key a head."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None  # positions a token sees; the cache keeps them all
    has_sinks: bool = False

    @property
    def values_per_token(self) -> int:
        """Values that a token's keys and values take in the cache."""
        return self.num_kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class Experts:
    """A layer's experts: each token goes through `per_token` of `count`, of `params_each`."""

    count: int
    per_token: int
    params_each: int

    def expected(self, num_tokens: int) -> float:
        """Experts that a step of so many tokens is expected to read, each token choosing evenly."""
        return self.count * (1.0 - (1.0 - self.per_token / self.count) ** num_tokens)


@dataclass(frozen=True)
class Layer:
    """A decoder layer. `other_params`: norms, routers, sinks, whatever is no linear of its groups."""

    attention: Attention
    groups: tuple[Group, ...]
    other_params: int = 0
    experts: Experts | None = None

    @cached_property
    def linears(self) -> Group:
        """The linears of all groups."""
        return tuple(linear for group in self.groups for linear in group)


@dataclass(frozen=True)
class ModelShape:
    """A causal language model. `head` is None where it is the embedding's weight again. `outer_groups`: linears outside the layers."""

    name: str
    model_type: str
    hidden_size: int
    vocab_size: int
    layers: tuple[Layer, ...]
    embedding_params: int
    head: Linear | None
    other_params: int = 0  # final norm, positions
    outer_groups: tuple[Group, ...] = ()
    max_positions: int | None = None
    dtype: str = "bf16"  # of the checkpoint, as a scheme's name
    quantization: str | None = None  # of the checkpoint, as a scheme's name
    stored_bytes: int | None = None  # of all tensors in the checkpoint's files, if they were seen
    num_params_seen: int | None = field(default=None)  # of the files, likewise: what is loaded, a tied head once

    @property
    def groups(self) -> Iterator[Group]:
        """Every group of the decoder."""
        yield from self.outer_groups
        for layer in self.layers:
            yield from layer.groups

    @cached_property
    def num_params(self) -> int:
        """All parameters, a tied head once."""
        linears = sum(linear.num_params for group in self.groups for linear in group)
        layers = sum(each.other_params + (each.experts.count * each.experts.params_each if each.experts else 0) for each in self.layers)
        return self.embedding_params + (self.head.num_params if self.head else 0) + self.other_params + linears + layers

    @cached_property
    def widest_out(self) -> int:
        """Columns of the widest group's product."""
        return max(sum(linear.out_features for linear in group) for group in self.groups)

    @property
    def kv_values_per_token(self) -> int:
        """Values that a token takes in the cache, over all layers."""
        return sum(layer.attention.values_per_token for layer in self.layers)

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.head is None
