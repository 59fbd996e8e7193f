"""Which kernel a product is computed with: by measurement, and only one that computes the same."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from server.kernels import cublaslt
from server.kernels.cublaslt import CublasError
from server.kernels.grouped import GroupShape
from server.model import fastest
from server.model.fastest import KeptWay, Way, choose, is_aligned, use_fastest
from tests.server.engine.tiny_models import DEVICE


def aligned(*shape: int, dtype=torch.float32) -> torch.Tensor:
    """Random numbers where a kernel may read them."""
    size = torch.Size(shape).numel()
    whole = torch.randn(size + cublaslt.ALIGNMENT, dtype=dtype, device=DEVICE)
    skip = -whole.data_ptr() % cublaslt.ALIGNMENT // whole.element_size()
    return whole[skip : skip + size].view(shape)


def right(x, weight):
    return F.linear(x, weight)


right.kernel = (1,) * 8  # as cuBLASLt's have it


def also_right(x, weight):
    return x @ weight.T


also_right.kernel = (2,) * 8


def wrong(x, weight):
    return F.linear(x, weight) * 1.1


def unwritten(x, weight):
    return torch.full((*x.shape[:-1], len(weight)), torch.nan, device=x.device)


def refusing(x, weight):
    raise CublasError("cublasLtMatmul", 14)


def chosen_of(times, weights=None, row_counts=(4,), kept=None, **more):
    """The kernels that are chosen if they, torch's own among them, take so long."""
    kept = {} if kept is None else kept
    gemms = [gemm for gemm in times if gemm is not F.linear]
    weights = [aligned(8, 16)] if weights is None else weights
    timers = (lambda gemm, x, weights: times[gemm],)
    ways = choose(row_counts, weights, kept, propose=lambda num_rows, weight: gemms, timers=timers, **more)
    assert not any(way.goes_first for way in ways.values())
    return {num_rows: way.gemm for num_rows, way in ways.items()}


def test_the_fastest_is_chosen():
    assert chosen_of({F.linear: 1.0, right: 0.9, also_right: 0.8}) == {4: also_right}


def test_torchs_own_stays_where_nothing_is_clearly_faster():
    assert chosen_of({F.linear: 1.0, right: 0.99, also_right: 1.2}) == {}


@pytest.mark.parametrize("broken", [wrong, unwritten, refusing])
def test_what_computes_something_else_or_nothing_is_not_chosen(broken):
    assert chosen_of({F.linear: 1.0, broken: 0.1, right: 0.9}) == {4: right}


@pytest.mark.parametrize(
    "error",
    [
        OSError("no such file"),
        AttributeError("no such function"),
        CublasError("cublasLtCreate", 1),
        torch.OutOfMemoryError("too little"),
        ValueError("scratch"),
    ],
)
def test_a_library_that_fails_leaves_torchs_own(error, caplog):
    def propose(num_rows, weight):
        if num_rows == 8:
            raise error
        return [right]

    times = {F.linear: 1.0, right: 0.5}
    found = choose([4, 8, 16], [aligned(8, 16)], {}, propose=propose, timers=[lambda gemm, x, weights: times[gemm]])
    assert found == {4: Way(right)} and f"8 rows and more stay torch's own: {error}" in caplog.text


def test_where_nothing_is_proposed_nothing_is_timed():
    kept = {}
    assert choose([4], [aligned(8, 16)], kept, propose=lambda *_: [], timers=[lambda gemm, x, weights: 1 / 0]) == {}
    assert list(kept.values()) == [None]  # nor asked for again


def test_each_number_of_rows_has_its_own_choice_and_weights_take_turns():
    seen = []

    def timer(gemm, x, weights):
        seen.append((x.shape[0], len(weights)))
        return 1.0 if gemm is F.linear else 0.5 if x.shape[0] == 2 else 2.0

    weights = [aligned(8, 16) for _ in range(6)]
    assert choose([2, 4], weights, {}, propose=lambda *_: [right], timers=[timer]) == {2: Way(right)}
    assert {*seen} == {(2, 4), (4, 4)}


@pytest.mark.parametrize(
    ("num_layers", "cache_weights", "num_turns"),
    [(6, 0, 4), (2, 0, 2), (6, 2.4, 5), (2, 2.4, 5), (2, 100, 8), (20, 100, 8)],  # a launch of a trial reads one, and there are 8
)
def test_as_many_weights_take_turns_as_the_cache_does_not_hold(monkeypatch, num_layers, cache_weights, num_turns):
    weights, seen = [aligned(8, 16) for _ in range(num_layers)], []
    monkeypatch.setattr(fastest, "_cache_bytes", lambda device: int(cache_weights * weights[0].nbytes))
    choose([4], weights, {}, propose=lambda *_: [right], timers=[lambda gemm, x, weights: seen.append(weights) or 1.0])
    assert len({weight.data_ptr() for weight in seen[0]}) == len(seen[0]) == num_turns
    for index, weight in enumerate(seen[0]):
        assert torch.equal(weight, weights[index if index < num_layers else 0])


def test_what_was_found_is_taken_over_by_the_next_start(monkeypatch):
    kept = {}
    assert chosen_of({F.linear: 1.0, right: 0.9, also_right: 0.8}, kept=kept) == {4: also_right}
    assert chosen_of({F.linear: 1.0, right: 1.1}, weights=[aligned(8, 32)], kept=kept) == {}
    assert kept == {"torch.float32 4 x [8, 16]": KeptWay([2] * 8), "torch.float32 4 x [8, 32]": None}
    asked = []
    monkeypatch.setattr(cublaslt, "gemm_of", lambda num_rows, weight, kernel: asked.append((num_rows, kernel)) or also_right)
    times = {F.linear: 1.0, right: 0.1}  # whatever it would be now
    assert chosen_of(times, kept=kept) == {4: also_right} and asked == [(4, [2] * 8)]
    assert chosen_of(times, weights=[aligned(8, 32)], kept=kept) == {}
    monkeypatch.setattr(cublaslt, "gemm_of", lambda *_: wrong)
    assert chosen_of(times, kept=kept) == {}


def test_no_trial_begins_after_its_time():
    kept = {}
    assert chosen_of({F.linear: 1.0, right: 0.5}, kept=kept, deadline_at=0.0) == {} and kept == {}


def test_choices_are_kept_in_a_file(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(cublaslt, "version", lambda: 130100)
    path, kept = fastest._kept_at(torch.empty(2))
    assert (path.name, kept) == (f"manylora-gemms-{fastest._VERSION}-NVIDIA-L4-130100.json", {})
    kept = {"one": KeptWay([1] * 8), "first": KeptWay([2] * 8, goes_first=True), "two": None}
    fastest._keep(path, kept)
    assert fastest._kept_at(torch.empty(2)) == (path, kept)
    for broken in ('{"one": [[1, 2]]}', '{"one": [["x", 2, 3, 4, 5, 6, 7, 8]]}', '{"one": [1, 2, 3, 4, 5, 6, 7, 8]}', "[]", "{", "\xff"):
        path.write_bytes(broken.encode("latin-1"))
        assert fastest._kept_at(torch.empty(2)) == (path, {}), "it is written anew"
    (tmp_path / "file").touch()
    fastest._keep(tmp_path / "file" / "below", {})
    assert "the choices of kernels are not kept" in caplog.text


def test_weights_that_lie_badly_are_left_to_torch():
    askew = aligned(9, 16).flatten()[1:129].view(8, 16)
    assert not is_aligned(askew) and not is_aligned(aligned(16, 8).T) and is_aligned(aligned(8, 16))
    assert chosen_of({F.linear: 1.0, right: 0.5}, weights=[askew]) == {}
    assert chosen_of({F.linear: 1.0, right: 0.5}, weights=[askew, aligned(8, 16)]) == {4: right}


class Plain:
    """As much of a group and its product as counts."""

    def __init__(self, weight, bias=None, is_quantized=False):
        self.weight_of_all, self.bias_of_all, self.is_quantized, self.ways, self.ways_beside = weight, bias, is_quantized, {}, {}
        self.product, self.shape = self, weight is not None and GroupShape(weight.shape[1], ((0, weight.shape[0]),), id(self))


class Stopwatch:
    """Beside deltas everything takes `times`, `first` where it goes first."""

    def __init__(self, times, first=None):
        self.times, self.first, self.is_open = times, times if first is None else first, True

    def __call__(self, gemm, x, weights, *, goes_first=False):
        assert self.is_open
        return self.first[gemm] if goes_first else self.times[gemm]

    def close(self):
        self.is_open = False


@pytest.mark.parametrize("max_trials_s", [0, 60])
def test_trials_end_with_the_time_of_a_start(monkeypatch, max_trials_s):
    kept, group = {"torch.float32 2 x [8, 16]": KeptWay([1] * 8)}, Plain(aligned(8, 16))
    monkeypatch.setattr(fastest, "_kept_at", lambda weight: (None, kept))
    monkeypatch.setattr(cublaslt, "gemm_of", lambda *_: right)
    monkeypatch.setattr(fastest, "choose", partial(choose, propose=lambda *_: [right]))
    monkeypatch.setattr(fastest, "seconds_of", lambda gemm, x, weights: {F.linear: 1.0, right: 0.5}[gemm])
    use_fastest([group], [2, 4], lambda shape: Stopwatch({F.linear: 1.0, right: 0.5}), max_trials_s=max_trials_s)
    assert [*group.ways] == ([2, 4] if max_trials_s else [2]), "what was kept needs no time"
    assert [*group.ways_beside] == ([2, 4] if max_trials_s else [])


def test_products_that_are_alike_share_a_choice_and_others_have_none(monkeypatch):
    shapes, watch = [], Stopwatch({})

    def choice(row_counts, weights, kept, deadline_at, timers=(), kind=""):
        assert (watch in timers) == (kind == f" beside deltas of {[(0, len(weights[0]))]}")
        return {len(weights): also_right if timers else right}

    monkeypatch.setattr(fastest, "choose", choice)
    one, other, wide = Plain(aligned(8, 16)), Plain(aligned(8, 16)), Plain(aligned(32, 16))
    left = [Plain(None), Plain(aligned(8, 16), bias=aligned(8)), Plain(aligned(8, 16), is_quantized=True)]
    use_fastest([one, wide, *left, other], [4], lambda shape: shapes.append(shape) or watch, max_trials_s=60)
    assert one.ways == other.ways == {2: right} and wide.ways == {1: right}
    assert one.ways_beside == other.ways_beside == {2: also_right} and wide.ways_beside == {1: also_right}
    assert [(product.ways, product.ways_beside) for product in left] == [({}, {})] * 3
    assert shapes == [one.shape, wide.shape] and not watch.is_open


def test_alone_and_beside_deltas_each_have_their_own_choice(monkeypatch):
    monkeypatch.setattr(fastest, "_kept_at", lambda weight: (None, kept))
    monkeypatch.setattr(fastest, "choose", partial(choose, propose=lambda *_: [right, also_right]))
    monkeypatch.setattr(fastest, "seconds_of", lambda gemm, x, weights: {F.linear: 1.0, right: 0.5, also_right: 0.9}[gemm])
    kept, group = {}, Plain(aligned(8, 16))
    use_fastest([group], [4], lambda shape: Stopwatch({F.linear: 1.0, right: 1.5, also_right: 0.9}), max_trials_s=60)
    assert (group.ways, group.ways_beside) == ({4: Way(right)}, {4: Way(also_right)})
    assert kept == {
        "torch.float32 4 x [8, 16]": KeptWay([1] * 8),
        "torch.float32 4 x [8, 16] beside deltas of [(0, 8)]": KeptWay([2] * 8),
    }


@pytest.mark.parametrize(
    ("first", "way"),
    [
        ({right: 0.8, also_right: 1.5}, Way(right, goes_first=True)),  # it was the second behind the deltas
        ({right: 0.95, also_right: 0.91}, Way(also_right)),
        ({also_right: 0.5}, Way(also_right, goes_first=True)),  # no more are tried before them
    ],
)
def test_the_best_beside_deltas_are_tried_before_them_too(monkeypatch, first, way):
    kept, group = {}, Plain(aligned(8, 16))
    monkeypatch.setattr(fastest, "_kept_at", lambda weight: (None, kept))
    monkeypatch.setattr(fastest, "choose", partial(choose, propose=lambda *_: [right, also_right]))
    monkeypatch.setattr(fastest, "seconds_of", lambda gemm, x, weights: 1.0)
    monkeypatch.setattr(fastest, "_NUM_FIRST", len(first))
    use_fastest([group], [4], lambda shape: Stopwatch({F.linear: 1.2, right: 0.97, also_right: 0.9}, first), max_trials_s=60)
    assert (group.ways, group.ways_beside) == ({}, {4: way})
    monkeypatch.setattr(cublaslt, "gemm_of", lambda num_rows, weight, kernel: {1: right, 2: also_right}[kernel[0]])
    monkeypatch.setattr(fastest, "_fastest", None)  # the next start tries nothing
    again = Plain(aligned(8, 16))
    use_fastest([again], [4], lambda shape: Stopwatch({}), max_trials_s=60)
    assert again.ways_beside == {4: way}


def test_without_room_for_adapters_to_try_torchs_own_stays_beside_deltas(caplog):
    def no_room(gemm, x, weights):
        raise RuntimeError("the arena has room for 3 of 4 adapters")

    assert choose([4, 8], [aligned(8, 16)], {}, propose=lambda *_: [right], timers=[no_room]) == {}
    assert "stay torch's own: the arena has room for 3 of 4" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: MANYLORA_TEST_DEVICE=cuda")
def test_on_the_card_what_real_measurements_choose_is_right():
    weights = [torch.randn(4096, 14336, device=DEVICE, dtype=torch.bfloat16) / 120 for _ in range(4)]
    assert fastest.seconds_of(F.linear, aligned(64, 14336, dtype=torch.bfloat16), weights) > 0
    for num_rows, (gemm, _) in choose([16, 64, 128], weights, {}).items():
        x = torch.randn(num_rows, 14336, device=DEVICE, dtype=torch.bfloat16)
        want = x.double() @ weights[0].double().T
        assert (gemm(x, weights[0]).double() - want).norm() <= 4e-3 * want.norm()
