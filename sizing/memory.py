"""What an engine will reserve on a card, by part, before there is a card: weights, what is set aside, KV blocks and adapters.

The division is `budget`'s, which the engine calls too; what is guessed here is only what the engine finds: how much of the card CUDA itself
takes, and that the model's attention can be captured. benchmarks.gpu_memory records what the engine took, and a test compares.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from sizing import budget
from sizing.errors import SizingError
from sizing.quantization import scheme_named
from sizing.shape import ModelShape
from sizing.weights import Weights, weights_of

CONTEXT_BYTES = 512 << 20  # CUDA's own, with the code of the kernels; to be refreshed by benchmarks.gpu_memory
MAX_CAPTURED_ROWS = 2048  # of a step with prompts; the same as server.engine.captures's
CAPTURED_HEAD_DIMS = (64, 128, 256)  # FlashInfer's; the same as server.model.flashinfer's
_MOST_TOKENS = 4096  # of a sequence, where nothing is said


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """The engine's options that say how much it needs (budget.Limits), with the server's defaults. `max_sequence_len` None: the model's,
    at most 4096."""

    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_bytes: int | None = None
    kv_cache_dtype: str = "auto"
    max_batch_tokens: int = 1024
    max_batch_size: int = 64
    max_sequence_len: int = _MOST_TOKENS
    adapter_device_bytes: int | None = None
    cuda_graphs: bool | None = None

    @classmethod
    def of(cls, shape: ModelShape, values: Mapping[str, Any]) -> Self:
        """From values by name, what is not said left at its default. SizingError names one that there is not or that cannot be."""
        names = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - names):
            raise SizingError(f"{unknown[0]} is not a limit of the engine. Allowed: {', '.join(sorted(names))}")
        values = {"max_sequence_len": min(_MOST_TOKENS, shape.max_positions or _MOST_TOKENS), **values}
        limits = cls(**values)
        if limits.kv_cache_dtype not in budget.KV_BYTES:
            raise SizingError(f"kv_cache_dtype must be one of {', '.join(budget.KV_BYTES)}. Given: {limits.kv_cache_dtype}")
        if shape.max_positions and limits.max_sequence_len > shape.max_positions:
            raise SizingError(f"max_sequence_len {limits.max_sequence_len} is beyond the {shape.max_positions} positions of {shape.name}")
        if limits.max_batch_tokens < limits.max_batch_size:
            raise SizingError(f"max_batch_tokens {limits.max_batch_tokens} must be at least max_batch_size {limits.max_batch_size}")
        return limits


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on one card. `num_blocks` blocks of `block_bytes` are the arena that tokens and adapters share; adapters get at most
    `adapter_bytes` of it."""

    card: int
    context: int
    weights: Weights
    set_aside: budget.SetAside
    block_bytes: int
    block_size: int
    num_blocks: int
    adapter_bytes: int

    @property
    def arena(self) -> int:
        """Bytes of the arena; one block of it stays zero."""
        return (self.num_blocks + 1) * self.block_bytes

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return self.context + self.weights.total + self.set_aside.total + self.arena

    @property
    def room(self) -> int:
        """What is left of the card for the arena; negative: what is missing before there is any."""
        return self.card - self.context - self.weights.total - self.set_aside.total

    @property
    def max_tokens(self) -> int:
        """Tokens that the arena holds without an adapter."""
        return self.num_blocks * self.block_size

    def blocks_of_adapter(self, num_bytes: int) -> int:
        """Blocks that an adapter takes."""
        return -(-num_bytes // self.block_bytes)

    def blocks_of_sequence(self, num_tokens: int) -> int:
        """Blocks that a sequence takes."""
        return budget.blocks_of(num_tokens, self.block_size)


def widths_of(shape: ModelShape) -> budget.Widths:
    """What of a shape says how much a step needs."""
    return budget.Widths(shape.widest_out, shape.hidden_size, shape.vocab_size)


def can_capture(shape: ModelShape) -> bool:
    """Whether decode steps can be captured: whether FlashInfer has kernels for every layer's heads."""
    heads = (layer.attention for layer in shape.layers)
    return all(each.key_dim == each.value_dim and each.key_dim in CAPTURED_HEAD_DIMS and not each.has_sinks for each in heads)


def predict(
    shape: ModelShape,
    limits: EngineLimits,
    card_bytes: int,
    num_sms: int,
    *,
    scheme: str | None = None,
    dtype: str = "bf16",
    context_bytes: int = CONTEXT_BYTES,
) -> EngineMemory:
    """What the engine will take of a card of `card_bytes` and `num_sms` (as CUDA says them). SizingError if the scheme is unknown."""
    item_bytes = round(scheme_named(dtype).bits / 8)
    weights = weights_of(shape, scheme, dtype)
    graphs = can_capture(shape) if limits.cuda_graphs is None else limits.cuda_graphs
    workspace = budget.WORKSPACE_BYTES
    if graphs:
        heads = [layer.attention for layer in shape.layers]
        workspace = budget.workspace_bytes(heads, min(limits.max_batch_tokens, MAX_CAPTURED_ROWS), limits.max_batch_size, num_sms)
    kept = budget.set_aside(widths_of(shape), limits, item_bytes, workspace, graphs=graphs)
    kv_bytes = budget.kv_item_bytes(limits.kv_cache_dtype, item_bytes)
    bytes_of_block = budget.block_bytes(shape.kv_values_per_token * kv_bytes, limits.block_size)
    free = card_bytes - context_bytes - weights.total - kept.total
    shares = budget.share_arena(free, bytes_of_block, limits)
    return EngineMemory(
        card_bytes, context_bytes, weights, kept, bytes_of_block, limits.block_size, shares.num_blocks, shares.adapter_bytes
    )
