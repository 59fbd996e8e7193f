"""A gated MLP's activation as part of the product: what is rewritten and what not, and the same answers."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd

from server.engine.core import run_until_idle
from server.model import operators, product
from server.model.attention import ATTENTION_NAME
from server.model.fusion import FuseActivations
from server.types import EngineRequest, SamplingParams
from tests.server.engine.peft_oracle import pack, save_adapter
from tests.server.engine.test_adapters import LLAMA_KINDS
from tests.server.engine.test_core import engine, prompt
from tests.server.engine.tiny_models import make_engine, make_model

GATED = torch.ops.manylora.gated
WEIGHT = torch.eye(4)


class Doubles:
    """A seam whose product is twice its input, and whose deltas are one more than it."""

    def call(self, x, weight, bias):
        return 2 * x

    def call_apart(self, x, weight, bias):
        return 2 * x, x + 1

    def call_gated(self, x, weight, bias):
        whole = self.call(x, weight, bias)
        return F.silu(whole[..., :2]) * whole[..., 2:]


def rewriting(graphs: list):
    """A backend that rewrites as layers are compiled with, and computes with torch's own operators: no compiler of C++ is needed."""

    def backend(module, inputs):
        FuseActivations()(module.graph)
        module.recompile()
        graphs.append([node.target for node in module.graph.nodes])
        return aot_autograd(fw_compiler=lambda made, _: made.forward)(module, inputs)

    return backend


def gated(h, linear):
    y = linear(h + 1)
    return F.silu(y[..., 0:2]) * y[..., 2:4]


def up_first(h, linear):
    y = linear(h + 1)
    return y[..., 2:4] * F.silu(y[..., 0:2])


def halves_exchanged(h, linear):
    y = linear(h + 1)
    return F.silu(y[..., 2:4]) * y[..., 0:2]


def unequal(h, linear):
    y = linear(h + 1)
    return F.silu(y[..., 0:1]) * y[..., 1:4]


def whole_read_too(h, linear):
    y = linear(h + 1)
    return F.silu(y[..., 0:2]) * y[..., 2:4] + y.sum()


def up_read_too(h, linear):
    y = linear(h + 1)
    up = y[..., 2:4]
    return F.silu(y[..., 0:2]) * up + up


def gelu(h, linear):
    y = linear(h + 1)
    return F.gelu(y[..., 0:2]) * y[..., 2:4]


@pytest.mark.parametrize("function", [gated, up_first])
def test_activations_that_become_part_of_their_product(function):
    check(function, 1)


@pytest.mark.parametrize("function", [halves_exchanged, unequal, whole_read_too, up_read_too, gelu])
def test_activations_that_are_left_alone(function):
    check(function, 0)


def test_deltas_that_are_computed_beside_their_product_are_added_as_before():
    check(gated, 0, apart=True)


def check(function, num_rewritten, *, apart=False):
    torch._dynamo.reset()
    seam, graphs = Doubles(), []
    key = operators.new_key(seam)

    def linear(x):
        if not apart:
            return torch.ops.manylora.linear(x, WEIGHT, None, key)
        product, deltas = torch.ops.manylora.linear_apart(x, WEIGHT, None, key)
        return product + deltas

    def run(h):
        return function(h, linear)

    with torch.inference_mode():
        h = torch.randn(1, 3, 4)
        given, exact = h.clone(), run(h)
        got = torch.compile(run, backend=rewriting(graphs), dynamic=True)(h)
    assert [targets.count(GATED) for targets in graphs] == [num_rewritten]
    assert torch.equal(got, exact) and torch.equal(h, given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules, as they are imported
def test_layers_share_what_was_compiled_for_the_first(monkeypatch):
    """More layers than dynamo compiles one function for: a pass of its own for each would leave the ninth and all behind it eager."""
    import torch._inductor.compile_fx

    graphs = []

    def compile_fx(module, inputs, **options):
        graphs.append(module)
        return module.forward

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    monkeypatch.setattr(product, "_can_block", lambda weight: False)
    torch._dynamo.reset()
    core, base = make_engine(make_model("llama", attention=ATTENTION_NAME, num_hidden_layers=10, layer_types=None))
    base.use_operators(None, compile_layers=True)
    with torch.compiler.set_stance("default"):
        core.add(EngineRequest("one", prompt(0, 9), SamplingParams(max_new_tokens=2)))
        assert run_until_idle(core)[-1].error is None
    assert len(base.layers) == 10 and 0 < len(graphs) <= 2


def watch(monkeypatch, group, name, called):
    do = getattr(group, name)

    def watched(*tensors):
        called.append(name)
        return do(*tensors)

    monkeypatch.setattr(group, name, watched)


@pytest.mark.parametrize("kinds", [["all-linear"], ["dora", "lora-bias"]], ids=["lora", "gains"])
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_compiled_layers_answer_as_before(kinds, tmp_path, monkeypatch):
    pytest.importorskip("server.kernels.grouped_kernels", reason="Triton is not installed", exc_type=ImportError)
    monkeypatch.setenv("MANYLORA_TEST_ENGINE", json.dumps({"kernels": "triton", "overlap": True, "compile_layers": False}))
    monkeypatch.setattr(product, "_can_block", lambda weight: False)  # a GPU's plain weights
    folders = [save_adapter(tmp_path / kind, "llama", seed=seed, **LLAMA_KINDS[kind]) for seed, kind in enumerate(kinds)]
    torch._dynamo.reset()
    said, graphs, called = [], [], []  # called: operators
    for compiled in (False, True):
        core, base = engine()
        for group in base.groups:
            watch(monkeypatch, group, "call_gated", called)
        watch(monkeypatch, core.runner.tiling, "gated", called)
        for layer in base.layers.modules if compiled else ():
            layer.compile(dynamic=True, backend=rewriting(graphs))
        refs = [None, *(pack(folder, base.layout, tmp_path / f"{compiled}-{folder.name}") for folder in folders)]
        for turn in (refs, [None]):  # adapters and base together, then the base alone
            for i, ref in enumerate(turn):
                core.add(EngineRequest(f"{len(turn)}-{i}", prompt(i, 3 + 2 * i), SamplingParams(max_new_tokens=2), ref))
            outputs = run_until_idle(core, timeout_s=120)
            assert [o.error for o in outputs if o.error] == []
            said.append(sorted((o.request_id, o.token_ids) for o in outputs))
        fused = {"call_gated", "gated"} if kinds == ["all-linear"] else {"call_gated"}  # gains: the activation of the whole sum
        assert set(called) == (fused if compiled else set())
    assert said[:2] == said[2:]
    assert graphs and all(targets.count(GATED) == 1 for targets in graphs)
