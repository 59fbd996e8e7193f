"""Trials of products beside deltas: made-up adapters are real to the kernels, and nothing of them stays."""

from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from server.engine import beside
from server.engine.beside import NUM_ADAPTERS, RANK, Beside
from server.kernels.grouped import BASE_BYTES, DESC_WIDTH, NONE, GroupShape, SiteEntry, describe, empty_tiles, read_group
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
@pytest.mark.parametrize(("shape", "goes_first"), [*zip(SHAPES, (False, True), strict=True)], ids=["two sites", "one site, first"])
def test_a_product_is_timed_beside_the_deltas_of_many_adapters(trials, shape, goes_first, dtype):
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
    timer(F.linear, x, [weight], goes_first=goes_first)
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


DELTAS = ["deltas: shrink", "deltas: write"]
ORDERS = {False: ["fork", *DELTAS, "product", "join"], True: ["fork", "product", *DELTAS, "join"]}


@pytest.fixture
def order(monkeypatch):
    """What a captured step does about a group, in its order, where streams are only noted."""
    from server.engine.tiling import Tiling
    from server.kernels import grouped_kernels

    noted, current = [], []

    @contextmanager
    def on(stream):
        current.append("deltas: ")
        yield
        current.clear()

    for name in ("shrink", "write"):
        monkeypatch.setattr(grouped_kernels, name, lambda *_, name=name: noted.append("".join([*current, name])))
    monkeypatch.setattr(Tiling, "_side_stream", lambda self: noted.append("fork") or object())
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_stream=lambda side: noted.append("join")))
    return noted


@pytest.mark.parametrize("goes_first", [False, True])
def test_a_product_is_launched_before_the_deltas_or_behind(order, goes_first):
    from server.engine.tiling import Tiling

    state = ForwardState()
    tiling = Tiling(state, torch.zeros(1 << 12, device=DEVICE), 16)
    state.tiles = empty_tiles(17, 16, tiling.block_m(16), DEVICE)
    x = torch.ones(16, 32, device=DEVICE)
    with tiling.captured():
        y, deltas = tiling.apart(x, SHAPES[1], lambda: order.append("product") or x.repeat(1, 3)[:, :80], goes_first=goes_first)
    assert order == ORDERS[goes_first] and y.shape == deltas.shape == (16, 80) and y.all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="looks at what is timed without a graph")
@pytest.mark.parametrize("goes_first", [False, True])
def test_what_is_timed_is_launched_in_the_order_that_is_asked_for(order, monkeypatch, goes_first):
    from server.engine.tiling import Tiling

    state, arena = ForwardState(), torch.zeros(1 << 18, device=DEVICE)
    timer = Beside(Tiling(state, arena, 64), state, arena, SHAPES[1])
    monkeypatch.setattr(beside, "seconds_of", lambda both, x, weights: both(x, weights[0]) and 1.5)
    gemm = lambda x, weight: order.append("product") or F.linear(x, weight)  # noqa: E731
    assert timer(gemm, torch.randn(8, 32), [torch.randn(80, 32)], goes_first=goes_first) == 1.5
    assert order == ORDERS[goes_first]


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
    timers = timer, partial(timer, goes_first=True)
    for num_rows, (gemm, _) in choose([16, 64], weights, kept, timers=timers, kind=" beside").items():
        x = torch.randn(num_rows, 4096, device=DEVICE, dtype=torch.bfloat16)
        want = x.double() @ weights[0].double().T
        assert (gemm(x, weights[0]).double() - want).norm() <= 4e-3 * want.norm()
    assert len(kept) == 2
    timer.close()
    assert not arena.any()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: MANYLORA_TEST_DEVICE=cuda")
@pytest.mark.parametrize("num_rows", [64, 256])
def test_on_the_card_captured_in_either_order_all_is_what_one_after_the_other_gives(num_rows):
    """Two groups in turns, each reading what the one before gave, as the layers of a step do."""
    from server.engine.tiling import Tiling

    down, up = GroupShape(14336, ((0, 4096),), 0), GroupShape(4096, ((0, 7168), (7168, 14336)), 1)
    state, arena = ForwardState(), torch.zeros(1 << 27, dtype=torch.bfloat16, device=DEVICE)
    tiling = Tiling(state, arena, num_rows)
    tiles, *_ = Beside(tiling, state, arena, up)._make_sets(num_rows)
    bases = tiles.tile_base[tiles.tile_base != NONE].tolist()
    entries, width = arena.clone(), 2 * DESC_WIDTH * 8 // arena.element_size()
    arena.normal_(0, 0.02)
    for base in bases:
        arena[base : base + width] = entries[base : base + width]
        described = arena[base : base + width].view(torch.int64).view(2, DESC_WIDTH)
        a, b = described[1, 0].item(), described[1, 4].item()
        described[0] = torch.from_numpy(describe(a, RANK, [SiteEntry(r_start=0, r_stop=RANK, b=b)])).to(DEVICE)
    weights = {shape: torch.randn(shape.out_features, shape.in_features, device=DEVICE, dtype=torch.bfloat16) / 64 for shape in (down, up)}
    x = torch.empty(num_rows, 4096, device=DEVICE, dtype=torch.bfloat16)

    def layers(orders):
        state.tiles, given = tiles, x
        for order in orders:
            for shape in (up, down):
                product = partial(F.linear, given, weights[shape])
                given = torch.add(*tiling.apart(given, shape, product, goes_first=order))
        state.clear()
        return given

    with torch.inference_mode():
        graphs = []
        for orders in ([False] * 4, [True] * 4, [True, False, False, True]):
            with tiling.captured():
                x.normal_()
                layers(orders)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    graphs.append((graph, layers(orders)))
        for _ in range(20):
            x.normal_()
            want = layers([False] * 4)
            assert want.isfinite().all() and want.abs().max() > 0
            for graph, given in graphs:
                given.fill_(torch.nan)
                graph.replay()
                assert torch.equal(given, want)
