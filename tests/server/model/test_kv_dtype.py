"""Keys and values in e4m3: every number against the format's own list, and one attention against the bound that rounding allows."""

import math

import pytest
import torch

from server.memory.arena import Arena
from server.model import kv_dtype
from server.model.attention import AttentionShape, PagedAttention, SequenceSpan

# Every finite e4m3 number, by the format's definition: 4 bits of exponent with bias 7, 3 of mantissa; 448 is the greatest.
NUMBERS = sorted({sign * (m / 8 * 2**-6 if e == 0 else (1 + m / 8) * 2 ** (e - 7))
                  for e in range(16) for m in range(8) if (e, m) != (15, 7) for sign in (1, -1)})  # fmt: skip
UNIT, LEAST = 2.0**-4, 2.0**-10  # half a step: of a number's size, and where numbers are so small that steps are even
SHAPE = AttentionShape(2, 16, 16, None, 4)
SIZE = 4


def nearest(value: float) -> float:
    """By search: the nearest number, of two equally near ones that with the even mantissa; beyond the greatest that one."""
    if math.isnan(value):
        return value
    near = sorted(NUMBERS, key=lambda number: abs(number - value))[:2] if abs(value) < 448 else [math.copysign(448.0, value)] * 2
    if abs(near[0] - value) != abs(near[1] - value):
        return near[0]
    return next(number for number in near if round(number / _step(number)) % 2 == 0)


def _step(number: float) -> float:
    return 2.0 ** (max(-6, math.frexp(number)[1] - 1) - 3)


def back(rows: torch.Tensor) -> torch.Tensor:
    return kv_dtype.stored(rows, kv_dtype.FP8).view(kv_dtype.FP8).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_number_is_rounded_to_the_nearest_and_kept_within_448(dtype):
    middles = [(low + high) / 2 for low, high in zip(NUMBERS, NUMBERS[1:], strict=False)]
    special = [0.0, 448.1, 464.0, 479.9, 480.0, 6e4, -6e4, float("inf"), float("-inf"), 1e-7, -1e-7]
    torch.manual_seed(0)
    values = torch.tensor([*NUMBERS, *middles, *special, *(torch.randn(300) * 3).tolist()]).to(dtype)
    wanted = torch.tensor([nearest(value) for value in values.tolist()])
    assert torch.equal(back(values), wanted) and wanted.abs().max() == kv_dtype.MOST == 448
    assert back(torch.tensor([float("nan")], dtype=dtype)).isnan().all()


def test_names_and_cards(monkeypatch):
    assert kv_dtype.dtype_of("auto", torch.bfloat16) == torch.bfloat16 and kv_dtype.dtype_of("fp8", torch.float32) == kv_dtype.FP8
    with pytest.raises(ValueError, match="kv_cache_dtype must be auto or fp8. Given: 'fp8_e5m2'"):
        kv_dtype.dtype_of("fp8_e5m2", torch.float32)
    for capability, refused in (((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        kv_dtype.check_card(torch.bfloat16, torch.device("cuda"))
        kv_dtype.check_card(kv_dtype.FP8, torch.device("cpu"))
        if refused:
            with pytest.raises(ValueError, match=f"'fp8' needs a GPU of compute capability 8.9 or above; this one has 8.{capability[1]}"):
                kv_dtype.check_card(kv_dtype.FP8, torch.device("cuda"))
        else:
            kv_dtype.check_card(kv_dtype.FP8, torch.device("cuda"))


def in_arena(dtype: torch.dtype, of_arena: torch.dtype) -> PagedAttention:
    """One layer's cache in an arena that adapters share, its free blocks full of bytes that are NaN in any type."""
    elements = SIZE * SHAPE.num_kv_heads * SHAPE.key_dim
    arena = Arena(12, 2 * elements * dtype.itemsize // of_arena.itemsize, of_arena, torch.device("cpu"))
    arena.run(0, arena.num_blocks * arena.block_bytes).fill_(255)
    pages = [arena.pages(part * elements, (SIZE, SHAPE.num_kv_heads, SHAPE.key_dim), dtype) for part in (0, 1)]
    return PagedAttention([SHAPE], [pages[0]], [pages[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "arena"])
def test_an_attention_is_the_exact_one_of_rounded_keys_and_values_and_within_the_bound(dtype, shared):
    """A prompt in two chunks beside decoding rows. With |k' - k| <= max(u |k|, h) every score is off by at most
    e = scale sum |q| max(u |k|, h), every probability by a factor of at most exp(2 e), and so an output by at most
    (exp(2 e) - 1) max |v| + max(u max |v|, h)."""
    torch.manual_seed(1)
    caches = {}
    for kept in (dtype, kv_dtype.FP8):
        here = torch.device("cpu")
        caches[kept] = in_arena(kept, dtype) if shared else PagedAttention.allocate([SHAPE], 12, SIZE, kept, here)
    exact = PagedAttention.allocate([SHAPE], 12, SIZE, dtype, torch.device("cpu"))
    seen = {0: [], 1: []}
    steps = [[(0, 6), (1, 3)], [(0, 5), (1, 1)], [(0, 1), (1, 1)], [(0, 1), (1, 4)]]
    for step in steps:
        spans, start = [], 0
        for who, num in step:
            seen[who] += [None] * num
            spans.append(SequenceSpan(start, num, len(seen[who]), list(range(6 * who, 6 * who + 6))[: -(-len(seen[who]) // SIZE)]))
            start += num
        q, k, v = (torch.randn(start, heads, 16).to(dtype) for heads in (4, 2, 2))
        rounded = [back(x).to(dtype) for x in (k, v)]
        said = {}
        for name, cache, (keys, values) in (
            ("fp8", caches[kv_dtype.FP8], (k, v)),
            ("rounded", caches[dtype], rounded),
            ("exact", exact, (k, v)),
        ):
            cache.plan(spans)
            said[name] = cache.run(0, q, keys, values, 0.25, None, None)
        assert torch.equal(said["fp8"], said["rounded"]) and not torch.equal(said["fp8"], said["exact"])
        for span in spans:
            rows, blocks = slice(span.start, span.start + span.num_tokens), torch.tensor(span.blocks)
            keys, values = (x[0][blocks].flatten(0, 1)[: span.context_len].float().abs() for x in (exact.keys, exact.values))
            off = torch.clamp(UNIT * keys, min=LEAST).repeat_interleave(2, 1)  # [positions, heads, dim]
            score = 0.25 * torch.einsum("thd,phd->thp", q[rows].float().abs(), off).amax(-1)  # [tokens, heads]
            most = values.amax((0, 2)).repeat_interleave(2)  # [heads]
            bound = torch.expm1(2 * score) * most + torch.clamp(UNIT * most, min=LEAST)
            error = (said["fp8"][rows].float() - said["exact"][rows].float()).abs().amax(-1)
            slack = 0.0 if dtype == torch.float32 else 2**-7 * float(most.max())  # bfloat16's own rounding of what is compared
            assert bool((error <= bound + slack).all())
