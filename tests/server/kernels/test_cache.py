"""Keys and values written into the paged cache: strided views, skipped rows, nothing else touched."""

import pytest
import torch

from tests.server.kernels.packed import DEVICE

cache = pytest.importorskip("server.kernels.cache", reason="Triton is not installed", exc_type=ImportError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_heads, dim", [(1, 64), (2, 96), (3, 128)])
def test_writes_where_the_slots_say(dtype, num_heads, dim):
    torch.manual_seed(dim)
    blocks, size, num_tokens, width = 6, 4, 9, num_heads * dim
    # An arena whose blocks hold two layers' keys and values; the second layer's are written.
    arena = torch.randn(blocks, 2, 2, size, num_heads, dim, device=DEVICE).to(dtype)
    product = torch.randn(num_tokens, 3 * width, device=DEVICE).to(dtype)
    key = product[:, width : 2 * width].view(num_tokens, num_heads, dim)
    value = product[:, 2 * width :].view(num_tokens, num_heads, dim)
    slots = torch.randperm(blocks * size, device=DEVICE)[:num_tokens]
    slots[2], slots[8] = -1, -1
    right = arena.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            right[slot // size, 1, 0, slot % size] = key[token]
            right[slot // size, 1, 1, slot % size] = value[token]
    cache.write_kv(arena[:, 1, 0], arena[:, 1, 1], slots, key, value)
    assert torch.equal(arena, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_e4m3_is_what_torch_makes_of_it_and_too_large_is_448(dtype):
    """Every number of 16 bits (in float32: every bfloat16, and what lies between them) through the kernel, bit for bit."""
    words = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    rows = words.view(torch.bfloat16).float() * 1.003 if dtype == torch.float32 else words.view(dtype)
    rows = rows.where(~rows.isnan(), torch.nan).view(64, 8, 128).to(DEVICE)  # quiet ones: at others numpy, which interprets, warns
    arena = torch.zeros(20, 2, 4, 8, 128, dtype=torch.float8_e4m3fn, device=DEVICE)
    slots = torch.arange(64, device=DEVICE) + 7
    slots[5] = -1
    cache.write_kv(arena[:, 0], arena[:, 1], slots, rows, rows.flip(0).contiguous())
    wrote = arena.view(torch.uint8).transpose(0, 1).reshape(2, 80, 8, 128)[:, 7:71].cpu()
    finite = rows.float().cpu().clamp(-448, 448)  # NaN stays NaN
    for half, wanted in ((wrote[0], finite), (wrote[1], finite.flip(0))):
        bits = wanted.to(torch.float8_e4m3fn).view(torch.uint8)
        bits[5] = 0
        # A NaN has no sign that anybody asks for.
        assert torch.equal(half.where(~wanted.isnan(), half | 0x80), bits.where(~wanted.isnan(), bits | 0x80))
    assert {0x7E, 0xFE, 0x7F, 0x01} <= set(wrote.unique().tolist())  # +-448, NaN, the least


def test_no_tokens_and_only_skipped_tokens_write_nothing():
    arena = torch.randn(2, 4, 1, 16, device=DEVICE)
    before = arena.clone()
    for num_tokens in (0, 3):
        rows = torch.full((num_tokens, 1, 16), torch.nan, device=DEVICE)
        cache.write_kv(arena, arena, torch.full((num_tokens,), -1, dtype=torch.int64, device=DEVICE), rows, rows)
    assert torch.equal(arena, before)


def test_what_does_not_fit_is_refused():
    caches, rows, slots = torch.zeros(2, 4, 1, 16), torch.zeros(3, 1, 16), torch.zeros(3, dtype=torch.int64)
    for arguments, word in (
        ((caches, caches, slots, rows, rows[:2]), "do not fit"),
        ((caches, caches, slots, rows[..., :8], rows[..., :8]), "do not fit"),
        ((caches, caches, slots, rows.half(), rows), "float16"),
        ((caches.to(torch.float8_e5m2), caches.to(torch.float8_e5m2), slots, rows, rows), "float8_e5m2"),
        ((caches.to(torch.float8_e4m3fn), caches, slots, rows, rows), "float8_e4m3fn"),
        ((caches, caches, slots.int(), rows, rows), "int32"),
        ((caches, caches, slots[:2], rows, rows), "slots"),
        ((caches.transpose(2, 3), caches.transpose(2, 3), slots, rows.transpose(1, 2), rows.transpose(1, 2)), "adjacent"),
    ):
        with pytest.raises(ValueError, match=word):
            cache.write_kv(*arguments)
