"""The grouped LoRA kernels against float64: types, ranks, popularity, poison and replays. In Triton's interpreter, or on a card."""

import numpy as np
import pytest
import torch

from server.kernels.grouped import (
    DESC_WIDTH,
    NONE,
    ZERO,
    GroupShape,
    SiteEntry,
    apply_group_reference,
    describe,
    fill_tiles,
    make_tiles,
    new_scratch,
    tile_cap,
)
from server.kernels.launch import card_of, choose, max_split_k
from tests.server.kernels.packed import DEVICE, ON_CARD, Site, buffers, expected, pack, shape_of, site, small_choice

grouped_kernels = pytest.importorskip("server.kernels.grouped_kernels", reason="Triton is not installed", exc_type=ImportError)
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
RANK_CAP = 160


def batch(popularity: str, num_rows: int, num_adapters: int) -> list[int]:
    """Each row's adapter: identical, distinct (in turn) or skewed, the last with rows of the base between."""
    if popularity == "identical":
        return [1] * num_rows
    if popularity == "distinct":
        return [i % num_adapters for i in range(num_rows)]
    draws = np.random.default_rng(0).zipf(1.5, num_rows) - 2
    return np.where(draws < num_adapters, draws, -1).tolist()


def check(shape, adapters, adapter_of_row, dtype, choice, *, spare_tiles=3, spare_rows=5, base_index=None):
    """The kernel and the plain meaning against the formula, with everything around them poisoned."""
    arena, bases = pack(adapters, dtype, RANK_CAP)
    num_rows, n = len(adapter_of_row), shape.out_features
    x = torch.randn(num_rows, shape.in_features, device=DEVICE).to(dtype)
    room = torch.full((num_rows, n + 24), torch.nan, device=DEVICE).to(dtype)
    room[:, 8 : 8 + n] = torch.randn(num_rows, n, device=DEVICE)
    on_base = torch.tensor(adapter_of_row, device=DEVICE) == -1
    x[on_base] = torch.nan  # nobody may read them
    before = room.clone()
    tiles = buffers(
        make_tiles(np.array([NONE if a < 0 else bases[a] for a in adapter_of_row], np.int64), choice.block_m),
        choice.block_m,
        spare_tiles=spare_tiles,
        spare_rows=spare_rows,
    )
    right = expected(before[:, 8 : 8 + n], x, adapter_of_row, adapters, shape)
    plain = before[:, 8 : 8 + n].clone()
    apply_group_reference(plain, x, arena, shape, tiles)
    scratch = new_scratch(choice.split_k, tiles.row_ids.numel(), DEVICE, RANK_CAP).fill_(torch.nan)
    check_write(shape, adapters, adapter_of_row, x, arena, bases, choice)
    grouped_kernels.apply_group(room[:, 8 : 8 + n], x, arena, shape, tiles, scratch, choice)
    for result in (plain, room[:, 8 : 8 + n]):
        error = (result.double() - right).abs().max() / right.abs().max().clamp(min=1)
        assert error < TOLERANCE[dtype], f"relative error {error:.1e}"
        assert torch.equal(result[on_base], before[:, 8 : 8 + n][on_base])
    assert room[:, :8].isnan().all() and room[:, 8 + n :].isnan().all()


def check_write(shape, adapters, adapter_of_row, x, arena, bases, choice):
    """The deltas by themselves, in every row and column whatever was there: nought for the base's rows and where there is no delta."""
    of_row = np.array([ZERO if a < 0 else bases[a] for a in adapter_of_row], np.int64)
    tiles = buffers(make_tiles(of_row, choice.block_m), choice.block_m, spare_tiles=2, spare_rows=3)
    assert sorted(tiles.row_ids[: len(x)].tolist()) == list(range(len(x)))
    room = torch.full((len(x), shape.out_features + 24), torch.nan, device=DEVICE).to(x.dtype)
    deltas, gainless = room[:, 8 : 8 + shape.out_features], [[[s._replace(gain=None) for s in g] for g in a] for a in adapters]
    right = expected(torch.zeros_like(deltas), x, adapter_of_row, gainless, shape)
    scratch = new_scratch(choice.split_k, tiles.row_ids.numel(), DEVICE, RANK_CAP).fill_(torch.nan)
    grouped_kernels.shrink(x, arena, shape, tiles, scratch, choice)
    grouped_kernels.write(deltas, arena, shape, tiles, scratch, choice)
    assert (deltas.double() - right).abs().max() / right.abs().max().clamp(min=1) < TOLERANCE[x.dtype]
    assert not deltas[torch.tensor(adapter_of_row, device=DEVICE) == -1].any()
    assert room[:, :8].isnan().all() and room[:, 8 + shape.out_features :].isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 40, 128])
def test_ranks_and_types(dtype, rank):
    torch.manual_seed(rank)
    shape = shape_of(96, [48, 16])
    adapters = [[[site(rank, 96, 48, dtype), site(rank if rank < 40 else 1, 96, 16, dtype)]] for _ in range(2)]
    check(shape, adapters, batch("distinct", 5, 2), dtype, small_choice())


# Off a card a tile costs a tenth of a second: types are tried where tiles are few, and as many adapters as have every rank.
ROWS_AND_TYPES = [
    *((num_rows, dtype) for num_rows in ((1, 16, 50, 300, 4096) if ON_CARD else (1, 16)) for dtype in TOLERANCE),
    *([] if ON_CARD else [(50, torch.float32), (300, torch.bfloat16)]),
]


@pytest.mark.parametrize(("num_rows", "dtype"), ROWS_AND_TYPES, ids=str)
@pytest.mark.parametrize("popularity", ["identical", "distinct", "skewed"])
def test_popularity(dtype, popularity, num_rows):
    torch.manual_seed(num_rows)
    size = 16 if ON_CARD else 1
    shape = shape_of(64 * size, [32 * size, 16 * size])
    num_adapters = max(2, min(num_rows, 40 if ON_CARD else 14))
    adapters = [[[site(i % 7, 64 * size, 32 * size, dtype), site(4, 64 * size, 16 * size, dtype)]] for i in range(num_adapters)]
    block_m = 64 if num_rows >= 300 else 16
    choice = small_choice(block_m=block_m, split_k=2, block_n=32, shrink_programs=0, expand_programs=0)
    check(shape, adapters, batch(popularity, num_rows, num_adapters), dtype, choice)


@pytest.mark.parametrize(("programs", "dtype"), [(0, torch.float32), (1, torch.bfloat16), (5, torch.float32)], ids=str)
def test_sites_that_an_adapter_leaves_alone_and_gains_and_biases(dtype, programs):
    torch.manual_seed(0)
    outs = [40, 24, 8, 16]
    shape = shape_of(64, outs, index=2)
    kinds = [
        [site(5, 64, 40, dtype), Site(), Site(), site(2, 64, 16, dtype)],
        [Site(), site(3, 64, 24, dtype, gain=True), site(1, 64, 8, dtype, bias=True), Site()],
        [site(9, 64, 40, dtype, gain=True, bias=True, scale=-1.5), *(site(0, 64, out, dtype, bias=True) for out in outs[1:])],
        [Site(), Site(), Site(), site(0, 64, 16, dtype, gain=True)],
        [Site()] * 4,
        [site(40, 64, out, dtype) for out in outs],
    ]
    other = [site(2, 64, out, dtype) for out in outs]
    adapters = [[other, [Site()] * 4, kind] for kind in kinds]
    choice = small_choice(shrink_programs=programs, expand_programs=programs)
    check(shape, adapters, [0, 1, 2, 3, 4, 5, -1, 2, 2, 5, 0, -1, 1], dtype, choice)


@pytest.mark.parametrize(("split_k", "in_features"), [(4, 96), (4, 256), (2, 40), (3, 96)])
@pytest.mark.parametrize("many_tiles", [1, 2, 3, 6, 20])
def test_half_the_parts_where_many_tiles_are_live(many_tiles, split_k, in_features):
    """Three live tiles of six: more than one and two, not more than three; the planes of parts that are left out are never read."""
    torch.manual_seed(0)
    shape = shape_of(in_features, [16, 8])
    adapters = [[[site(rank, in_features, out, torch.float32) for out in (16, 8)]] for rank in (3, 18, 1)]
    choice = small_choice(split_k=split_k, many_tiles=many_tiles)
    check(shape, adapters, [0, 1, 2, -1, 0], torch.float32, choice)
    arena, bases = pack(adapters, torch.float32, RANK_CAP)
    tiles = buffers(make_tiles(np.array([bases[i] for i in (0, 1, 2)]), 16), 16, spare_tiles=3)
    scratch = new_scratch(split_k, 3, DEVICE, RANK_CAP).fill_(torch.nan)
    grouped_kernels.shrink(torch.randn(3, in_features, device=DEVICE), arena, shape, tiles, scratch, choice)
    written = [not plane.isnan().all() for plane in scratch]
    assert written == [part < (split_k // 2 if many_tiles < 3 and split_k % 2 == 0 else split_k) for part in range(split_k)]


@pytest.mark.parametrize("in_features, outs", [(13, [7, 30]), (33, [1]), (48, [20, 5, 3])])
def test_sizes_that_are_no_multiples_of_anything(in_features, outs):
    torch.manual_seed(0)
    shape = shape_of(in_features, outs)
    assert not shape.aligned
    for dtype in TOLERANCE:
        adapters = [[[site(rank, in_features, out, dtype) for out in outs]] for rank in (3, 18)]
        check(shape, adapters, [0, 1, 1, -1, 0], dtype, small_choice())


@pytest.mark.parametrize("capability, num_sms", [((9, 0), 132), ((8, 9), 58), ((8, 0), 108)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_rows", [1, 20, 600])
def test_the_choices_of_every_card(capability, num_sms, num_rows, dtype):
    torch.manual_seed(0)
    card = card_of(capability, num_sms)
    size = 8 if ON_CARD else 1
    shape = shape_of(256 * size, [64 * size, 32 * size, 32 * size])
    choice = choose(card, num_rows, shape, dtype.itemsize)
    choice = choice._replace(pdl=choice.pdl and ON_CARD and torch.cuda.get_device_capability() >= (9, 0))
    assert choice.split_k <= max_split_k(card, num_rows)
    adapters = [[[site(rank, 256 * size, stop - start, dtype) for start, stop in shape.columns]] for rank in (4, 33)]
    check(shape, adapters, [i % 3 - 1 for i in range(min(num_rows, 20 if not ON_CARD else num_rows))], dtype, choice)


def test_a_replay_may_have_more_tiles_than_before():
    """The same buffers, the same launch; on a card one captured graph."""
    torch.manual_seed(0)
    dtype, shape, choice, num_rows = torch.float32, shape_of(64, [32]), small_choice(), 40
    adapters = [[[site(3 + i, 64, 32, dtype)]] for i in range(6)]
    arena, bases = pack(adapters, dtype, RANK_CAP)
    x, y = torch.randn(num_rows, 64, device=DEVICE), torch.zeros(num_rows, 32, device=DEVICE)
    empty = make_tiles(np.full(num_rows, NONE, np.int64), choice.block_m)
    assert len(empty.tile_base) == len(empty.row_ids) == 0
    tiles = buffers(empty, choice.block_m, spare_tiles=tile_cap(num_rows, 6, choice.block_m), spare_rows=num_rows)
    scratch = new_scratch(choice.split_k, num_rows, DEVICE, RANK_CAP).fill_(torch.nan)

    def step():
        grouped_kernels.apply_group(y, x, arena, shape, tiles, scratch, choice)

    step()
    if ON_CARD:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay
    else:
        replay = step
    for adapter_of_row in ([-1] * 40, [0] * 40, [i % 6 for i in range(40)], [5, *[-1] * 39], [i % 4 - 1 for i in range(40)]):
        fill_tiles(tiles, make_tiles(np.array([NONE if a < 0 else bases[a] for a in adapter_of_row], np.int64), choice.block_m))
        x.copy_(torch.randn_like(x))
        y.copy_(torch.randn_like(y))
        right = expected(y, x, adapter_of_row, adapters, shape)
        replay()
        assert (y.double() - right).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter: a neighbour's infinities
def test_the_result_does_not_depend_on_who_else_is_in_the_batch():
    torch.manual_seed(0)
    dtype, shape, choice = torch.float32, shape_of(64, [32]), small_choice()
    adapters = [[[site(5, 64, 32, dtype)]] for _ in range(3)]
    adapters[2][0][0].b.fill_(torch.inf)
    arena, bases = pack(adapters, dtype, RANK_CAP)
    x, results = torch.randn(1, 64, device=DEVICE), []
    for others in ([], [1], [2, 2, 1, 0]):
        of_row = np.array([bases[0], *(bases[i] for i in others)], np.int64)
        rows = torch.cat([x, torch.randn(len(others), 64, device=DEVICE)])
        y = torch.zeros(len(rows), 32, device=DEVICE)
        tiles = buffers(make_tiles(of_row, choice.block_m), choice.block_m)
        grouped_kernels.apply_group(y, rows, arena, shape, tiles, new_scratch(choice.split_k, len(rows), DEVICE, RANK_CAP), choice)
        results.append(y[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("num_rows", [0, 1, 16, 17, 500])
def test_tiles_hold_every_row_of_an_adapter_once(num_rows, block_m):
    rng = np.random.default_rng(num_rows)
    bases = rng.choice(np.array([NONE, 0, 64, 640, 1 << 40]), num_rows)
    tiles = make_tiles(bases, block_m)
    seen = []
    for base, start, length in zip(tiles.tile_base, tiles.tile_start, tiles.tile_len, strict=True):
        rows = tiles.row_ids[start : start + length]
        assert 1 <= length <= block_m and len(rows) == length and (bases[rows] == base).all() and base >= 0
        seen.extend(rows.tolist())
    assert sorted(seen) == np.flatnonzero(bases >= 0).tolist()
    assert len(tiles.tile_base) == sum(-(-int((bases == base).sum()) // block_m) for base in set(bases.tolist()) - {NONE})
    assert len(tiles.tile_base) <= tile_cap(num_rows, 4, block_m)


def test_a_descriptor_that_does_not_fit_is_refused():
    good = describe(DESC_WIDTH * 4, 5, [SiteEntry(0, 3, 800, -2.0), SiteEntry(3, 5, 900, gain=16)])
    assert good.shape == (DESC_WIDTH,) and np.int32(good[5]).view(np.float32) == -2.0 and good[2 + 6 + 4] == 16
    for arguments, word in (
        ((0, 513, []), "num_ranks"),
        ((-1, 4, []), "num_ranks"),
        ((0, 4, [SiteEntry(2, 5, 0)]), "site 0"),
        ((0, 4, [SiteEntry(0, 2, 0), SiteEntry(2, 4)]), "site 1"),
        ((0, 4, [SiteEntry()] * 5), "at most 4"),
    ):
        with pytest.raises(ValueError, match=word):
            describe(*arguments)


def test_what_does_not_fit_the_launch_is_refused():
    shape, choice = GroupShape(32, ((0, 16),), 0), small_choice()
    arena, bases = pack([[[site(2, 32, 16, torch.float32)]]], torch.float32, RANK_CAP)
    tiles = buffers(make_tiles(np.array(bases * 2), 16), 16)
    x, y, scratch = torch.zeros(2, 32, device=DEVICE), torch.zeros(2, 16, device=DEVICE), new_scratch(3, 2, DEVICE)
    for arguments, word in (
        ((y.half(), x.half(), arena, shape, tiles, scratch, choice), "float16"),
        ((y, x[:, :8], arena, shape, tiles, scratch, choice), "expected"),
        ((y, x, arena, shape, tiles._replace(block_m=64), scratch, choice), "tiles of 64"),
        ((y, x, arena, shape, tiles, scratch[:2], choice), "too small"),
        ((y, x, arena, shape, tiles, scratch[:, :1].contiguous(), choice), "too small"),
        ((y, x, arena, shape, tiles, scratch.half(), choice), "float32"),
    ):
        with pytest.raises(ValueError, match=word):
            grouped_kernels.apply_group(*arguments)
    with pytest.raises(ValueError, match="tile_base"):
        fill_tiles(tiles, make_tiles(np.array([0, 64, 128, 0]), 16))
