"""How an engine divides a device's memory: what is set aside, and how KV blocks and adapters share the rest.

The server calls this with the memory that it finds free (server/engine/backends.py), the planner with what it expects to be free: so they
cannot differ but by that. Bytes and counts in, bytes and counts out.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

GRAPH_BYTES = 1 << 30  # what the captured steps of a 7B model take, and some room
SPARE_BYTES = 768 << 20  # attention's workspace as it is at least, cuBLAS's, fragments
WORKSPACE_BYTES = 256 << 20  # FlashInfer's, at least
ALIGNMENT = 64  # of a block of the arena
KV_BYTES: dict[str, int | None] = {"auto": None, "fp8": 1}  # kv_cache_dtype -> bytes of a value of a key; None: of the model's type


class Limits(Protocol):
    """What of the engine's options says how much it needs (server.types.EngineOptions has them all)."""

    @property
    def block_size(self) -> int: ...
    @property
    def num_blocks(self) -> int | None: ...
    @property
    def kv_cache_bytes(self) -> int | None: ...
    @property
    def max_batch_tokens(self) -> int: ...
    @property
    def max_batch_size(self) -> int: ...
    @property
    def max_sequence_len(self) -> int: ...
    @property
    def adapter_device_bytes(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Widths:
    """What of a model says how much a step needs."""

    widest_out: int  # columns of the widest group's product
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class SetAside:
    """Bytes that neither blocks nor adapters get."""

    spare: int
    activations: int
    graphs: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.spare + self.activations + self.graphs


@dataclass(frozen=True, slots=True)
class Shares:
    """`num_blocks` blocks in all; adapters get at most `adapter_bytes`, in an arena out of the blocks' memory, else beside it."""

    num_blocks: int
    adapter_bytes: int


def kv_item_bytes(kv_cache_dtype: str, item_bytes: int) -> int:
    """Bytes of one value of a key or a value, of a model whose own values take `item_bytes`. KeyError if there is no such type."""
    return KV_BYTES[kv_cache_dtype] or item_bytes


def block_bytes(bytes_per_token: int, block_size: int) -> int:
    """Bytes of a block in an arena, where blocks begin at multiples of ALIGNMENT. `bytes_per_token`: keys and values of all layers."""
    return -(-bytes_per_token * block_size // ALIGNMENT) * ALIGNMENT


def blocks_of(num_tokens: int, block_size: int) -> int:
    """Blocks that so many tokens of one sequence take."""
    return -(-num_tokens // block_size)


class Heads(Protocol):
    """A layer's attention, as it counts for the workspace (server.model.attention.AttentionShape)."""

    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def key_dim(self) -> int: ...


def workspace_bytes(shapes: Iterable[Heads], num_rows: int, num_sequences: int, num_sms: int) -> int:
    """What FlashInfer wants for partial results of a captured step of `num_rows` rows of up to `num_sequences` sequences: a float for each
    head and dimension of each row of the most tiles of 128 rows that there can be (its PrefillPlan), and one more for their weights."""
    most = 0
    for shape in shapes:
        num_tiles = -(-num_rows * (shape.num_heads // shape.num_kv_heads) // 128) + num_sequences
        num_tiles = max(num_tiles, 2 * num_sms // shape.num_kv_heads)
        most = max(most, num_tiles * 128 * shape.num_heads * (shape.key_dim + 1) * 4)
    return max(WORKSPACE_BYTES, most + (16 << 20))


def set_aside(widths: Widths, limits: Limits, item_bytes: int, workspace: int = WORKSPACE_BYTES, *, graphs: bool) -> SetAside:
    """What an engine on a GPU keeps free before it takes the rest. `workspace`: FlashInfer's; `graphs`: whether steps are captured.

    A step of `max_batch_tokens` needs, beside weights and cache: the widest group's product and what is made of it, some hidden states, the
    LoRA kernels' scratch, and the logits of a full batch with their copy in float32 and their sorted one."""
    rows = limits.max_batch_tokens * (2 * widths.widest_out + 8 * widths.hidden_size) * item_bytes
    logits = limits.max_batch_size * widths.vocab_size * (item_bytes + 4 * 6)
    activations = int(1.2 * (rows + logits)) + scratch_bytes(limits.max_batch_tokens)
    return SetAside(SPARE_BYTES + workspace - WORKSPACE_BYTES, activations, GRAPH_BYTES if graphs else 0)


def scratch_bytes(max_batch_tokens: int) -> int:
    """The most that the LoRA kernels' partial sums take on any card: floats of 512 ranks, for each row in 8 parts in steps of up to 1024
    rows and in 4 in larger ones (kernels.launch has each card's)."""
    return max(4 * max_batch_tokens, 8 * min(max_batch_tokens, 1024)) * 512 * 4


def share_arena(free_bytes: int, bytes_of_block: int, limits: Limits) -> Shares:
    """Blocks and adapters in one memory of `free_bytes`. `num_blocks` may be 0 or less than a sequence needs: the caller says so."""
    asked = asked_blocks(bytes_of_block, limits)
    if asked is None:
        # A sequence of the greatest length must fit beside whatever adapters there are, or it would wait for ever.
        for_adapters = free_bytes - blocks_of(limits.max_sequence_len, limits.block_size) * bytes_of_block
        adapter_bytes = min(limits.adapter_device_bytes or free_bytes // 2, for_adapters)
        return Shares(max(1, free_bytes // bytes_of_block), max(0, adapter_bytes))
    # Both share the arena; so many blocks for tokens, and so many bytes for adapters beside them.
    adapter_bytes = limits.adapter_device_bytes or max(bytes_of_block, (free_bytes - asked * bytes_of_block) // 2)
    return Shares(asked + -(-adapter_bytes // bytes_of_block), adapter_bytes)


def share_apart(free_bytes: int, bytes_of_block: int, limits: Limits) -> Shares:
    """Blocks and adapters each in memory of their own: the plain path's."""
    # What all sequences of a full batch could use at most.
    useful = limits.max_batch_size * blocks_of(limits.max_sequence_len, limits.block_size)
    blocks = asked_blocks(bytes_of_block, limits) or max(1, min(useful, free_bytes // 4 // bytes_of_block))
    return Shares(blocks, limits.adapter_device_bytes or (free_bytes - blocks * bytes_of_block) // 3)


def asked_blocks(bytes_of_block: int, limits: Limits) -> int | None:
    """The number of blocks that the options name; None if it is the engine's choice."""
    if limits.num_blocks is not None:
        return limits.num_blocks
    return None if limits.kv_cache_bytes is None else limits.kv_cache_bytes // bytes_of_block
