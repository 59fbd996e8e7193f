"""Writes a step's keys and values into the paged cache: one Triton launch for both, at places that a table on the device gives.

It knows slots (block * block_size + offset), not sequences. Needs Triton: import it where there is a GPU (or Triton's interpreter).
Called by model/attention for every layer.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _write_kv(
    keys_cache, values_cache, slots, key, value,
    keys_block, keys_slot, keys_head, values_block, values_slot, values_head, key_token, key_head, value_token, value_head,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, HEADS_PAD: tl.constexpr, DIM_PAD: tl.constexpr,
):  # fmt: skip
    """One program a token: cache[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = key[token], and the same for values."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot >= 0:
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        h, d = tl.arange(0, HEADS_PAD)[:, None], tl.arange(0, DIM_PAD)[None, :]
        mask = (h < HEADS) & (d < DIM)
        k = tl.load(key + token * key_token + h * key_head + d, mask=mask)
        v = tl.load(value + token * value_token + h * value_head + d, mask=mask)
        tl.store(keys_cache + block * keys_block + offset * keys_slot + h * keys_head + d, k, mask=mask)
        tl.store(values_cache + block * values_block + offset * values_slot + h * values_head + d, v, mask=mask)


def write_kv(keys_cache: torch.Tensor, values_cache: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Key and value [tokens, kv_heads, dim] into caches [blocks, block_size, kv_heads, dim], in place.

    Any strides but the last, which is 1: caches may be views into an arena whose block holds all layers, key and value slices of one
    product. slots int64 [tokens]: block * block_size + offset; -1: skip. Two tokens must not have one slot.
    Semantics: cache[slots[t] // block_size, slots[t] % block_size] = key[t] for each t with slots[t] >= 0. ValueError if shapes differ."""
    num_tokens, num_heads, dim = key.shape
    block_size = keys_cache.shape[1]
    if value.shape != key.shape or values_cache.shape != keys_cache.shape or keys_cache.shape[2:] != key.shape[1:]:
        raise ValueError(
            f"key {list(key.shape)}, value {list(value.shape)} and caches {list(keys_cache.shape)}, {list(values_cache.shape)} do not fit"
        )
    if {key.dtype, value.dtype, values_cache.dtype} != {keys_cache.dtype}:
        raise ValueError(f"key is {key.dtype}, value {value.dtype}; the caches are {keys_cache.dtype} and {values_cache.dtype}")
    if slots.dtype != torch.int64 or slots.shape != (num_tokens,) or not slots.is_contiguous():
        raise ValueError(f"slots: {slots.dtype} {list(slots.shape)}; expected contiguous int64 [{num_tokens}]")
    if any(tensor.stride(-1) != 1 for tensor in (keys_cache, values_cache, key, value)):
        raise ValueError("key, value and caches need adjacent elements in their last dimension")
    if num_tokens:
        heads_pad, dim_pad = triton.next_power_of_2(num_heads), triton.next_power_of_2(dim)
        _write_kv[(num_tokens,)](
            keys_cache, values_cache, slots, key, value, *keys_cache.stride()[:3], *values_cache.stride()[:3],
            *key.stride()[:2], *value.stride()[:2],
            BLOCK_SIZE=block_size, HEADS=num_heads, DIM=dim, HEADS_PAD=heads_pad, DIM_PAD=dim_pad,
            num_warps=max(1, min(8, heads_pad * dim_pad // 256)),
        )  # fmt: skip
