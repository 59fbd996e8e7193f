"""Trials of products beside deltas: made-up adapters are real to the kernels, and nothing of them stays."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from server.engine import beside
from server.engine.beside import NUM_ADAPTERS, RANK, Beside
from server.kernels.grouped import BASE_BYTES, DESC_WIDTH, NONE, GroupShape, read_group
from server.model.fastest import choose
from server.model.forward import ForwardState
from tests.server.engine.tiny_models import DEVICE

pytest.importorskip("triton")
SHAPES = [GroupShape(48, ((0, 32), (32, 48)), 3), GroupShape(32, ((0, 80),), 0)]


@pytest.fixture
def trials(monkeypatch):
    """(of a shape, of so many elements) a Beside, its arena and state, and what `seconds_of` was given, called six times."""
    from server.engine.tiling import Tiling

    seen = []

    def seconds_of(gemm, x, weights):
        seen.extend(gemm(x, weights[0]) for _ in range(6))
        return 1.5

    def make(shape, num_elements=1 << 18, dtype=torch.float32):
        state, arena = ForwardState(), torch.zeros(num_elements, dtype=dtype, device=DEVICE)
        return Beside(Tiling(state, arena, 64), state, arena, shape), arena, state, seen

    if DEVICE.type != "cuda":
        monkeypatch.setattr(beside, "seconds_of", seconds_of)
        monkeypatch.setattr(Tiling, "captured", lambda self: nullcontext())
    return make


@pytest.mark.skipif(DEVICE.type == "cuda", reason="looks at what is timed without a graph")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=["two sites", "one site"])
def test_a_product_is_timed_beside_the_deltas_of_many_adapters(trials, shape, dtype):
    timer, arena, state, seen = trials(shape, dtype=dtype)
    x, weight = torch.randn(40, shape.in_features, dtype=dtype), torch.randn(shape.out_features, shape.in_features, dtype=dtype)
    tiles = []
    assert timer(lambda x, weight: tiles.append(state.tiles) or F.linear(x, weight), x, [weight]) == 1.5
    assert state.tiles is None
    bases = [each.tile_base[each.tile_base != NONE].tolist() for each in tiles]
    assert all(len({*each}) == len(each) == NUM_ADAPTERS for each in bases)  # one or two of the 40 rows are of one
    assert bases[4:] == bases[:2] and len({base for each in bases for base in each}) == 4 * NUM_ADAPTERS  # in turns
    for base in bases[1]:  # as an adapter that was loaded lies there
        delta = read_group(arena, base, shape, torch.float32)
        assert delta.a.shape == (RANK * len(shape.columns), shape.in_features)
        assert [(part.start, part.stop, part.b.shape) for part in delta.parts] == [(a, b, (RANK, b - a)) for a, b in shape.columns]
    for base in bases[1]:
        factors_at = base + ((shape.index + 1) * DESC_WIDTH * 8 + BASE_BYTES) // arena.element_size()  # they begin before that
        arena[factors_at : base + bases[0][1] - bases[0][0]] = 0.5
    seen.clear()
    timer(F.linear, x, [weight])
    product, deltas = seen[1]
    assert torch.equal(product, F.linear(x, weight)) and deltas.abs().sum() > 0 and seen[0][1].abs().sum() == 0
    timer.close()
    assert not arena.any()


class Stream:
    """As torch's: one of a few, which are handed out in turns."""

    num_made = 0

    def __init__(self, device=None):
        self.cuda_stream, self.waited_for = Stream.num_made % 3, []
        Stream.num_made += 1

    def wait_stream(self, other):
        self.waited_for.append(other)


def test_deltas_never_run_on_the_stream_that_captures(monkeypatch):
    from server.engine.tiling import Tiling

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    for first in range(3):
        Stream.num_made = 0
        captures = [Stream() for _ in range(3)]
        monkeypatch.setattr(Stream, "num_made", first)
        tiling = Tiling(ForwardState(), torch.zeros(64, device=DEVICE), 16)
        for current in captures * 3:
            monkeypatch.setattr(torch.cuda, "current_stream", lambda device, current=current: current)
            side = tiling._side_stream()
            assert side.cuda_stream != current.cuda_stream and side.waited_for[-1] is current
            assert tiling._side_stream() is side


@pytest.mark.skipif(DEVICE.type == "cuda", reason="looks at what is timed without a graph")
def test_few_rows_have_an_adapter_each(trials):
    timer, _, state, _ = trials(SHAPES[0], num_elements=6 * 4096)  # no room for as many as many rows have
    tiles = []
    timer(lambda x, weight: tiles.append(state.tiles) or F.linear(x, weight), torch.randn(5, 48), [torch.randn(48, 48)])
    assert all(len({*each.tile_base[each.tile_base != NONE].tolist()}) == 5 for each in tiles)


def test_a_group_that_no_kernel_can_say_is_left_alone(trials):
    shape = GroupShape(16, tuple((16 * i, 16 * i + 16) for i in range(5)), 0)
    timer, *_ = trials(shape)
    with pytest.raises(RuntimeError, match="a group of 5 linears"):
        timer(F.linear, torch.randn(4, 16, device=DEVICE), [torch.randn(80, 16, device=DEVICE)])
    timer.close()


def test_an_arena_without_room_says_so(trials):
    timer, _, state, _ = trials(SHAPES[0], num_elements=4096)
    with pytest.raises(RuntimeError, match=r"room for \d of 24 adapters"):
        timer(F.linear, torch.randn(40, 48, device=DEVICE), [torch.randn(48, 48, device=DEVICE)])
    assert state.tiles is None


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: MANYLORA_TEST_DEVICE=cuda")
def test_on_the_card_what_is_chosen_beside_deltas_is_right(trials):
    shape = GroupShape(4096, ((0, 4096), (4096, 5120), (5120, 6144)), 2)
    timer, arena, _, _ = trials(shape, num_elements=1 << 24, dtype=torch.bfloat16)
    weights, kept = [torch.randn(6144, 4096, device=DEVICE, dtype=torch.bfloat16) / 64 for _ in range(4)], {}
    for num_rows, gemm in choose([16, 64], weights, kept, timer=timer, kind=" beside").items():
        x = torch.randn(num_rows, 4096, device=DEVICE, dtype=torch.bfloat16)
        want = x.double() @ weights[0].double().T
        assert (gemm(x, weights[0]).double() - want).norm() <= 4e-3 * want.norm()
    assert len(kept) == 2
    timer.close()
    assert not arena.any()
