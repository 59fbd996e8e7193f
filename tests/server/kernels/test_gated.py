"""silu(gate) * up with the deltas of both, against float64: types, ranks, base rows between, replays; and of a whole product."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from server.kernels.grouped import NONE, ZERO, fill_tiles, make_tiles, new_scratch
from tests.server.kernels.packed import DEVICE, ON_CARD, Site, buffers, expected, pack, shape_of, site, small_choice

gated_kernels = pytest.importorskip("server.kernels.gated_kernels", reason="Triton is not installed", exc_type=ImportError)
grouped_kernels = pytest.importorskip("server.kernels.grouped_kernels", reason="Triton is not installed", exc_type=ImportError)
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
RANK_CAP = 160
IN, WIDTH = 64, 40


def gated(y, x, of_row, adapters, shape):
    gate, up = expected(y, x, of_row, adapters, shape).chunk(2, dim=1)
    return F.silu(gate) * up


def close(result, right, dtype):
    error = (result.double() - right).abs().max() / right.abs().max().clamp(min=1)
    assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


def adapters_of(dtype, ranks=(3, 40, 0)):
    """Both sites, one without the other, and one with a bias alone."""
    wide = [site(rank, IN, WIDTH, dtype) if rank else Site() for rank in ranks]
    return [[[one, other]] for one, other in zip(wide, [wide[0], Site(), site(0, IN, WIDTH, dtype, bias=True)], strict=True)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("num_rows", "split_k", "many_tiles"), [(1, 3, 0), (23, 2, 1), *([(4096, 8, 20)] if ON_CARD else [])])
def test_every_row_as_the_formula_says(num_rows, split_k, many_tiles, dtype):
    torch.manual_seed(num_rows)
    shape, adapters = shape_of(IN, [WIDTH, WIDTH]), adapters_of(dtype)
    arena, bases = pack(adapters, dtype, RANK_CAP)
    of_row = [(i * 5) % 4 - 1 for i in range(num_rows)]
    choice = small_choice(split_k=split_k, many_tiles=many_tiles)
    tiles = buffers(make_tiles(np.array([ZERO if a < 0 else bases[a] for a in of_row]), 16), 16, spare_tiles=2, spare_rows=3)
    x = torch.randn(num_rows, IN, device=DEVICE).to(dtype)
    room = torch.full((num_rows, 2 * WIDTH + 24), torch.nan, device=DEVICE).to(dtype)
    y = room[:, 8 : 8 + 2 * WIDTH]
    y.copy_(torch.randn(num_rows, 2 * WIDTH, device=DEVICE))
    before = room.clone()
    out = torch.full((num_rows, WIDTH), torch.nan, device=DEVICE).to(dtype)
    scratch = new_scratch(split_k, tiles.row_ids.numel(), DEVICE, RANK_CAP).fill_(torch.nan)
    grouped_kernels.shrink(x, arena, shape, tiles, scratch, choice)
    for _ in range(2):  # a second launch goes another way on a card
        gated_kernels.gate(y, arena, shape, tiles, scratch, choice, out)
        close(out, gated(y, x, of_row, adapters, shape), dtype)
        out = torch.full_like(out, torch.nan)
    assert torch.equal(room.nan_to_num(7), before.nan_to_num(7))
    close(
        gated_kernels.gate_reference(y, x, arena, shape, tiles), gated(y, x, of_row, adapters, shape), torch.float32 if ON_CARD else dtype
    )


def test_more_tiles_than_before_in_the_same_buffers():
    torch.manual_seed(0)
    dtype, shape = torch.float32, shape_of(IN, [WIDTH, WIDTH])
    adapters, choice = adapters_of(dtype), small_choice(many_tiles=2)
    arena, bases = pack(adapters, dtype, RANK_CAP)
    tiles = buffers(make_tiles(np.array([bases[0]]), 16), 16, spare_tiles=7, spare_rows=7)
    x, y = torch.randn(8, IN, device=DEVICE), torch.randn(8, 2 * WIDTH, device=DEVICE)
    scratch = new_scratch(choice.split_k, 8, DEVICE, RANK_CAP).fill_(torch.nan)
    for of_row in ([0], [0, 1, 2, -1, 1, 0, 2, 2]):
        fill_tiles(tiles, make_tiles(np.array([ZERO if a < 0 else bases[a] for a in of_row]), 16))
        out = torch.full((8, WIDTH), torch.nan, device=DEVICE)
        grouped_kernels.shrink(x, arena, shape, tiles, scratch, choice)
        gated_kernels.gate(y, arena, shape, tiles, scratch, choice, out)
        close(out[: len(of_row)], gated(y[: len(of_row)], x[: len(of_row)], of_row, adapters, shape), dtype)
        assert out[len(of_row) :].isnan().all()
    assert (tiles.tile_base != NONE).sum() == 4


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 7), (3, 1030), (0, 8)])
def test_a_whole_product(num_rows, width, dtype):
    room = torch.randn(num_rows, 2 * width + 5, device=DEVICE).to(dtype)
    y = room[:, 2 : 2 + 2 * width]
    for _ in range(2):
        out = gated_kernels.silu_mul(y)
        gate, up = y.double().chunk(2, dim=1)
        assert out.shape == (num_rows, width) and out.dtype == dtype and out.is_contiguous()
        if num_rows:
            close(out, F.silu(gate) * up, dtype)


def test_what_does_not_fit_is_refused():
    dtype, choice = torch.float32, small_choice()
    arena, bases = pack(adapters_of(dtype), dtype, RANK_CAP)
    tiles = buffers(make_tiles(np.array(bases[:1]), 16), 16)
    scratch = new_scratch(choice.split_k, 1, DEVICE, RANK_CAP)
    even, odd = shape_of(IN, [WIDTH, WIDTH]), shape_of(IN, [WIDTH, WIDTH - 8])
    assert gated_kernels.is_gated(even) and not gated_kernels.is_gated(odd) and not gated_kernels.is_gated(shape_of(IN, [8, 8, 16]))
    for shape, out in ((odd, torch.empty(1, WIDTH, device=DEVICE)), (even, torch.empty(1, WIDTH + 1, device=DEVICE))):
        with pytest.raises(ValueError, match="out: .* expected contiguous"):
            gated_kernels.gate(torch.empty(1, shape.out_features, device=DEVICE), arena, shape, tiles, scratch, choice, out)
    with pytest.raises(ValueError, match="y: .* expected"):
        gated_kernels.silu_mul(torch.empty(2, 7, device=DEVICE))
