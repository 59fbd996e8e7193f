"""Writes a step's keys and values into the paged cache: one Triton launch for both, at places that a table on the device gives.

It knows slots (block * block_size + offset), not sequences. Needs Triton: import it where there is a GPU (or Triton's interpreter).
Called by model/attention for every layer.
"""

import torch
import triton
import triton.language as tl

_FP8 = torch.float8_e4m3fn


@triton.jit
def _e4m3(x):
    """The bits of x as e4m3 (4 bits of exponent, 3 of mantissa, bias 7), beyond +-448 as that: uint8 of x's shape.

    By its bits, not by the compiler's conversion: Triton's interpreter, which the tests run on, has none that rounds."""
    x = x.to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    size = tl.abs(x)
    size = tl.where(size > 448.0, 448.0, size)
    size_bits = size.to(tl.int32, bitcast=True)
    # Below 2^-6 a step is 2^-9, float32's own at 2^14: the sum rounds. Above, half a step is added to the 20 bits that go, ties to even.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    large = ((size_bits + 0x7FFFF + ((size_bits >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(x != x, 0x7F, tl.where(size < 0.015625, small, large))
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _write_kv(
    keys_cache, values_cache, slots, key, value,
    keys_block, keys_slot, keys_head, values_block, values_slot, values_head, key_token, key_head, value_token, value_head,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, HEADS_PAD: tl.constexpr, DIM_PAD: tl.constexpr, FP8: tl.constexpr,
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
        if FP8:
            k, v = _e4m3(k), _e4m3(v)
        tl.store(keys_cache + block * keys_block + offset * keys_slot + h * keys_head + d, k, mask=mask)
        tl.store(values_cache + block * values_block + offset * values_slot + h * values_head + d, v, mask=mask)


def write_kv(keys_cache: torch.Tensor, values_cache: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Key and value [tokens, kv_heads, dim] into caches [blocks, block_size, kv_heads, dim], in place.

    Any strides but the last, which is 1: caches may be views into an arena whose block holds all layers, key and value slices of one
    product. slots int64 [tokens]: block * block_size + offset; -1: skip. Two tokens must not have one slot.
    Caches are of key's and value's type, or float8_e4m3fn: then numbers are rounded to the nearest, ties to even, and kept within +-448.
    Semantics: cache[slots[t] // block_size, slots[t] % block_size] = key[t] for each t with slots[t] >= 0. ValueError if shapes differ."""
    num_tokens, num_heads, dim = key.shape
    block_size = keys_cache.shape[1]
    if value.shape != key.shape or values_cache.shape != keys_cache.shape or keys_cache.shape[2:] != key.shape[1:]:
        raise ValueError(
            f"key {list(key.shape)}, value {list(value.shape)} and caches {list(keys_cache.shape)}, {list(values_cache.shape)} do not fit"
        )
    rounds = keys_cache.dtype == _FP8
    if value.dtype != key.dtype or values_cache.dtype != keys_cache.dtype or not (rounds or key.dtype == keys_cache.dtype):
        raise ValueError(f"key is {key.dtype}, value {value.dtype}; the caches are {keys_cache.dtype} and {values_cache.dtype}")
    if slots.dtype != torch.int64 or slots.shape != (num_tokens,) or not slots.is_contiguous():
        raise ValueError(f"slots: {slots.dtype} {list(slots.shape)}; expected contiguous int64 [{num_tokens}]")
    if any(tensor.stride(-1) != 1 for tensor in (keys_cache, values_cache, key, value)):
        raise ValueError("key, value and caches need adjacent elements in their last dimension")
    if rounds:
        keys_cache, values_cache = keys_cache.view(torch.uint8), values_cache.view(torch.uint8)
    if num_tokens:
        heads_pad, dim_pad = triton.next_power_of_2(num_heads), triton.next_power_of_2(dim)
        _write_kv[(num_tokens,)](
            keys_cache, values_cache, slots, key, value, *keys_cache.stride()[:3], *values_cache.stride()[:3],
            *key.stride()[:2], *value.stride()[:2],
            BLOCK_SIZE=block_size, HEADS=num_heads, DIM=dim, HEADS_PAD=heads_pad, DIM_PAD=dim_pad, FP8=rounds,
            num_warps=max(1, min(8, heads_pad * dim_pad // 256)),
        )  # fmt: skip
