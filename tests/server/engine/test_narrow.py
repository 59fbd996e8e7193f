"""The last layer for the rows that are wanted alone: what is left out was nothing that anybody reads."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from server.engine import runner
from server.engine.core import run_until_idle
from server.model.attention import ATTENTION_NAME, AttentionShape
from server.model.forward import ForwardState
from server.model.layers import Layers, Narrow
from server.types import EngineRequest, SamplingParams
from tests.server.engine.peft_oracle import pack, save_adapter
from tests.server.engine.test_adapters import LLAMA_KINDS
from tests.server.engine.test_core import engine, prompt, run
from tests.server.engine.tiny_models import CONFIGS, make_engine, make_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
KINDS = ["plain", "all-linear", "dora", "saved-norms", "head"]


def rows_of_the_last_layer(base):
    """Rows that its MLP gets, pass by pass."""
    rows: list[int] = []
    base.layers.modules[-1].mlp.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[1]))
    return rows


def asked(refs):
    """Decode rows from the second step on, beside prompts that come in two chunks and that end in one."""
    return [
        EngineRequest(name, prompt(i, 20 + 15 * i), SamplingParams(max_new_tokens=6, seed=i), ref)
        for i, (name, ref) in enumerate(refs.items())
    ]


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_every_answer_is_the_same_and_fewer_rows_are_computed(kernels, tmp_path, monkeypatch):
    if kernels == "triton":
        pytest.importorskip("triton")
    said, rows = [], []
    for least in (runner.MIN_NARROWED, 10**9):
        monkeypatch.setattr(runner, "MIN_NARROWED", least)
        core, base = engine(kernels=kernels, max_batch_tokens=96, max_sequence_len=128, prefix_caching=False)
        refs = {"base": None}
        for seed, kind in enumerate(KINDS if kernels == "torch" else KINDS[:3]):
            folder = save_adapter(tmp_path / f"{least} {kind}", "llama", seed=seed, **LLAMA_KINDS[kind])
            refs[kind] = pack(folder, base.layout, tmp_path / f"{least} {kind}.pack")
        rows.append(rows_of_the_last_layer(base))
        said.append(run(core, asked(refs)))
    assert said[0] == said[1]
    num_prompt = sum(len(request.token_ids) for request in asked(refs))
    assert sum(rows[1]) > num_prompt and sum(rows[0]) < sum(rows[1]) - num_prompt / 2


def test_prompt_logprobs_still_have_every_row():
    core, base = engine(max_batch_tokens=128, max_sequence_len=128, prefix_caching=False)
    rows, said = rows_of_the_last_layer(base), {}
    told = SamplingParams(max_new_tokens=1, num_prompt_logprobs=0)
    for together in ([("told", told), ("plain", SamplingParams(max_new_tokens=1))], [("alone", told)]):
        for name, params in together:
            core.add(EngineRequest(name, prompt(1, 60), params))
        said |= {output.request_id: output.prompt_logprobs for output in run_until_idle(core)}
    assert rows == [61, 60]
    for mine, alone in zip(said["told"][1:], said["alone"][1:], strict=True):
        assert mine.logprob == pytest.approx(alone.logprob, abs=1e-5)


def test_a_chunk_in_the_middle_of_a_prompt_needs_no_last_layer_at_all():
    core, base = engine(max_batch_tokens=32, max_batch_size=4, max_sequence_len=128, prefix_caching=False)
    rows = rows_of_the_last_layer(base)
    assert len(run(core, [EngineRequest("long", prompt(3, 90), SamplingParams(max_new_tokens=2))])["long"]) == 2
    assert rows == [1, 1]


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_every_architecture_says_the_same_of_prompts_that_it_narrows(model_type, monkeypatch):
    said, rows = [], []
    for least in (runner.MIN_NARROWED, 10**9):
        monkeypatch.setattr(runner, "MIN_NARROWED", least)
        core, base = make_engine(make_model(model_type, attention=ATTENTION_NAME), max_batch_tokens=96, prefix_caching=False)
        rows.append([])
        base.layers.modules[-1].register_forward_hook(lambda _, args, __, seen=rows[-1]: seen.append(args[0].shape[1]))
        said.append(run(core, asked(dict.fromkeys(("one", "two")))))
    assert said[0] == said[1] and rows[1][0] == 55 and rows[0][0] == 2


class Mixer(nn.Module):
    """A layer without attention."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Identity()

    def forward(self, hidden_states, cos=None):
        return hidden_states + (0 if cos is None else cos)


def layers_of(*modules):
    model = nn.Module()
    model.layers = nn.ModuleList(modules)
    names = [(f"layers.{i}.attention", AttentionShape(1, 8, 8, None)) for i, module in enumerate(modules) if isinstance(module, Block)]
    state = ForwardState()
    return model, state, Layers(dict(model.named_modules()), names, state)


def test_a_list_with_layers_that_have_no_attention_is_not_narrowed():
    assert not layers_of(Block(), Block(), Mixer())[2].narrows and layers_of(Block(), Block())[2].narrows


@torch.inference_mode()
def test_hidden_states_by_name_or_in_another_form_have_the_whole_layer():
    model, state, layers = layers_of(Block())
    state.narrow = Narrow(torch.tensor([3]), nullcontext)
    with layers.narrowing():
        last, hidden = model.layers[-1], torch.randn(1, 8, 8)
    assert torch.equal(last(hidden_states=hidden), hidden)
    assert torch.equal(last(hidden[0]), hidden[0]) and torch.equal(last(hidden.expand(4, 1, 8, 8, 8)), hidden.expand(4, 1, 8, 8, 8))
    for cos in (torch.randn(1, 8, 8), torch.randn(8, 8)):
        narrow = last(hidden, cos=cos)
        assert torch.equal(narrow[0, 3], (hidden + cos)[0, 3]) and not narrow[0, :3].any() and not narrow[0, 4:].any()
