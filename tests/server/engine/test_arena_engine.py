"""The engine on an arena with the Triton kernels, as on a GPU but interpreted: same answers, one memory for tokens and adapters."""

import json

import pytest
import torch

from server.engine.core import run_until_idle
from server.engine.tiling import WARM_ROWS, Tiling
from server.kernels.launch import _TABLES, card_of, choose, line_of, max_split_k
from server.model.attention import ATTENTION_NAME, PagedAttention
from server.model.forward import ForwardState
from server.types import EngineRequest, SamplingParams
from sizing.budget import scratch_bytes
from tests.server.engine.peft_oracle import pack, save_adapter
from tests.server.engine.test_adapters import LLAMA_KINDS, OTHERS, serve_and_compare
from tests.server.engine.test_core import (  # noqa: F401 - collected here again
    engine,
    folders,
    prompt,
    test_a_bad_pack_fails_those_who_asked_for_it,
    test_a_replaced_adapter_never_reads_its_predecessors_cache,
    test_cached_prefixes_change_no_text_and_are_used,
)
from tests.server.engine.tiny_models import make_engine, make_model

grouped_kernels = pytest.importorskip("server.kernels.grouped_kernels", reason="Triton is not installed", exc_type=ImportError)
gated_kernels = pytest.importorskip("server.kernels.gated_kernels", reason="Triton is not installed", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.fixture(autouse=True)
def on_an_arena(monkeypatch):
    monkeypatch.setenv("MANYLORA_TEST_ENGINE", json.dumps({"kernels": "triton", "overlap": True}))


@pytest.mark.parametrize(
    "model_type, kinds",
    [
        ("llama", ["plain", "odd-rank", "dora", "lora-bias", "head", "embedding", "saved-norms", "added-tokens"]),
        ("qwen2", None),
        ("gpt2", None),
    ],
    ids=["llama", "qwen2", "gpt2"],
)
def test_mixed_kinds_equal_peft(model_type, kinds, tmp_path):
    serve_and_compare(model_type, {kind: LLAMA_KINDS[kind] for kind in kinds} if kinds else OTHERS[model_type], tmp_path, num_new=3)


def test_idle_adapters_make_room_for_tokens_and_tokens_for_adapters(tmp_path):
    params, num_blocks = SamplingParams(max_new_tokens=3), 20  # interpreted, a step takes a tenth of a second and more
    roomy, base = engine(num_blocks=400)
    made = [save_adapter(tmp_path / f"a{i}", "llama", seed=i, r=4) for i in range(3)]
    refs = [pack(folder, base.layout, tmp_path / f"p{i}") for i, folder in enumerate(made)] + [None]
    block_bytes = PagedAttention.num_bytes(base.attention_shapes, 4, base.dtype)
    adapter_bytes = -(-((tmp_path / "p0").stat().st_size + 4096) // block_bytes) * block_bytes
    # Tokens and one adapter fit at a time, of what four sequences and three adapters ask for.
    core, _ = engine(num_blocks=num_blocks, adapter_device_bytes=adapter_bytes, max_sequence_len=40)
    said = []
    for each in (roomy, core):
        for turn in range(2):
            for i, ref in enumerate(refs):
                each.add(EngineRequest(f"{turn}{i}", prompt(i, 30), params, ref))
        said.append({})
        for output in run_until_idle(each, timeout_s=120):
            assert output.error is None
            said[-1].setdefault(output.request_id, []).extend(output.token_ids)
    assert said[0] == said[1] and len(said[0]) == 8
    while core.tiers.yield_room():
        pass
    assert core.pool.num_used == 0 and core.tiers.device.used_bytes == 0


def test_compiled_layers_are_alike_and_never_compiled_again(folders, tmp_path):  # noqa: F811 - the fixture
    import torch._dynamo
    from torch._dynamo.utils import counters

    params = SamplingParams(max_new_tokens=3)

    def answers(core, base):
        refs = [
            None,
            pack(folders / "one", base.layout, tmp_path / f"{id(core)}1"),
            pack(folders / "two", base.layout, tmp_path / f"{id(core)}2"),
        ]
        for i in range(4):
            core.add(EngineRequest(str(i), prompt(i, 3 + 4 * i), params, refs[i % 3]))
        said = {}
        for output in run_until_idle(core):
            said.setdefault(output.request_id, []).extend(output.token_ids)
        return said

    plain = answers(*make_engine(make_model("llama", attention=ATTENTION_NAME)))
    torch._dynamo.reset()
    counters.clear()
    core, base = make_engine(make_model("llama", attention=ATTENTION_NAME))
    for layer in base.layers.modules:
        layer.compile(dynamic=True, backend="eager")
    core.add(EngineRequest("warm-up", prompt(0, 9), SamplingParams(max_new_tokens=1)))
    run_until_idle(core)
    num_graphs = counters["stats"]["unique_graphs"]
    assert len(base.layers) == 3 and 0 < num_graphs <= 2  # one for all layers, or one more where a layer's window differs
    with torch.compiler.set_stance("fail_on_recompile"):
        core.add(EngineRequest("again", prompt(1, 13), SamplingParams(max_new_tokens=1)))
        assert run_until_idle(core)[-1].error is None
    assert answers(core, base) == plain


def test_the_kernels_of_every_kind_of_step_are_compiled_before_the_first(monkeypatch):
    core, base = engine(max_batch_tokens=2048)
    launched = set()
    for name in ("shrink", "expand", "write"):
        monkeypatch.setattr(grouped_kernels, name, lambda *arguments, name=name: launched.add((name, arguments[2][:2], arguments[-1])))
    monkeypatch.setattr(gated_kernels, "gate", lambda *arguments: launched.add(("gate", arguments[2][:2], arguments[-2])))
    monkeypatch.setattr(gated_kernels, "silu_mul", lambda y: launched.add(("silu_mul",)))
    core.runner.tiling.warm_up(base.group_shapes)
    for num_rows in (1, 2, 8, 9, 64, 300, 512, 513, 2048):
        for shape in base.group_shapes:
            choice = choose(core.runner.tiling.card, num_rows, shape, base.dtype.itemsize)
            assert {(name, shape[:2], choice) for name in ("shrink", "expand", "write")} <= launched
            if gated_kernels.is_gated(shape):
                apart = choice._replace(pdl=False)
                assert {("shrink", shape[:2], apart), ("gate", shape[:2], apart), ("silu_mul",)} <= launched


def test_deltas_beside_the_products_are_the_same_answers(folders, tmp_path):  # noqa: F811 - the fixture
    """As captured steps compute them: products and deltas apart, the sum where it is read."""
    said = []
    for apart in (False, True):
        core, base = engine()
        refs = [
            None,
            pack(folders / "one", base.layout, tmp_path / f"{apart}1"),
            pack(folders / "two", base.layout, tmp_path / f"{apart}2"),
        ]
        decode, called = base.decode, []

        def decode_apart(*arguments, base=base, decode=decode, called=called, apart=apart):
            slots = base.state.slots_touched(base.state.touched)
            if apart and base.state.tiles is not None and not base.state.has_gains:
                base.state.set_apart(slots)
                called.append(slots)
            return decode(*arguments)

        base.decode = decode_apart
        for i in range(4):
            core.add(EngineRequest(str(i), prompt(i, 3 + 4 * i), SamplingParams(max_new_tokens=3), refs[i % 3]))
        outputs = run_until_idle(core)
        assert bool(called) == apart and [o.error for o in outputs if o.error] == []
        said.append(sorted((o.request_id, o.token_ids) for o in outputs))
    assert said[0] == said[1]


@pytest.mark.parametrize("capability", [(9, 0), (8, 9), (8, 0)])
def test_every_line_of_a_cards_table_has_its_kernels_compiled_at_the_start(capability):
    card = card_of(capability, 64)
    assert [line_of(card, num_rows) for num_rows in WARM_ROWS] == list(_TABLES[card.name])


@pytest.mark.parametrize("max_rows", [1, 64, 700, 1024, 1500, 4096, 16384])
@pytest.mark.parametrize("capability", [(9, 0), (8, 9), (8, 0)])
def test_the_kernels_partial_sums_are_in_the_budget(monkeypatch, capability, max_rows):
    card = card_of(capability, 64)
    monkeypatch.setattr(Tiling, "_card", lambda self: card)
    tiling = Tiling(ForwardState(), torch.empty(0, device="meta"), max_rows)
    assert tiling._scratch.nbytes <= scratch_bytes(max_rows)
    for num_rows in {1, min(513, max_rows), max_rows}:
        assert max_split_k(card, num_rows) * num_rows <= len(tiling._scratch)
