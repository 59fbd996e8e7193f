"""The whole engine with keys and values in e4m3: it says what rounded ones mean, whoever shares the batch, and is off by little."""

import json
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoTokenizer

from server.engine.build import build_engine
from server.engine.core import run_until_idle
from server.model import kv_dtype
from server.model.attention import ATTENTION_NAME
from server.types import EngineOptions, EngineRequest, SamplingParams
from tests.server.engine.test_core import (  # noqa: F401 - collected here again
    engine,
    folders,
    prompt,
    test_a_replaced_adapter_never_reads_its_predecessors_cache,
    test_cached_prefixes_change_no_text_and_are_used,
    test_preempted_sequences_say_the_same,
    test_the_text_is_the_same_whatever_shares_the_batch,
)
from tests.server.engine.tiny_models import VOCAB, make_engine, make_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
UNIT = 2.0**-4  # e4m3's half step, of a number's size


@pytest.fixture(autouse=True)
def in_fp8(monkeypatch):
    monkeypatch.setenv("MANYLORA_TEST_ENGINE", json.dumps({"kernels": "torch", "kv_cache_dtype": "fp8"}))


@pytest.fixture
def on_an_arena(monkeypatch):
    pytest.importorskip("server.kernels.grouped_kernels", reason="Triton is not installed", exc_type=ImportError)
    monkeypatch.setenv("MANYLORA_TEST_ENGINE", json.dumps({"kernels": "triton", "overlap": True, "kv_cache_dtype": "fp8"}))


def test_adapters_lie_between_blocks_of_e4m3(on_an_arena, folders, tmp_path):  # noqa: F811 - the fixture
    test_cached_prefixes_change_no_text_and_are_used(folders, tmp_path)


def first_logprobs(core, num=6):
    """log probabilities of all tokens after prompts that take several steps each: float32 [num, VOCAB]."""
    params = SamplingParams(max_new_tokens=1, num_logprobs=VOCAB, raw_logprobs=True)
    for i in range(num):
        core.add(EngineRequest(str(i), prompt(i, 10 + 8 * i), params))
    outputs = sorted(run_until_idle(core), key=lambda output: int(output.request_id))
    assert [output.error for output in outputs] == [None] * num
    return torch.tensor([[value for _, value in sorted(output.logprobs[0].top)] for output in outputs])


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "deepseek_v3", "gpt_oss", "gpt2"])
def test_it_is_the_exact_engine_on_rounded_keys_and_values_and_not_far_from_the_unrounded(model_type):
    """Equal to an engine whose cache is float32 and whose keys and values are rounded on their way there. Beside the one that rounds
    nothing: where scores are small an attention's output is off by no more than e4m3's half step of its size (model/test_kv_dtype.py has
    the bound), and what layers add to the residual stream adds up, so the logits are off by at most a half step a layer of their spread."""
    check_against_rounded(model_type)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_so_it_is_on_an_arena(on_an_arena, model_type):
    check_against_rounded(model_type)


def check_against_rounded(model_type):
    core, base = make_engine(make_model(model_type, attention=ATTENTION_NAME))
    assert {tensor.dtype for tensor in (*base.attention.keys, *base.attention.values)} == {kv_dtype.FP8}
    mine, said = first_logprobs(core), {}
    for rounds in (True, False):
        plain, its_base = make_engine(make_model(model_type, attention=ATTENTION_NAME), kv_cache_dtype="auto")
        write = its_base.attention.write

        def rounding(layer, k, v, write=write, rounds=rounds):
            write(layer, *((kv_dtype.stored(x, kv_dtype.FP8).view(kv_dtype.FP8).float() for x in (k, v)) if rounds else (k, v)))

        its_base.attention.write = rounding
        said[rounds] = first_logprobs(plain)
    assert torch.equal(mine, said[True])
    spread = said[False] - said[False].mean(-1, keepdim=True)
    assert 0 < float((mine - said[False]).norm() / spread.norm()) < base.layout.num_layers * UNIT


def test_what_a_sequence_reads_does_not_depend_on_how_its_prompt_was_cut():
    """A prompt reads its own keys and values as the cache has them, so chunks of any length, and decoding, mean the same."""
    said = []
    for changes in (dict(max_batch_tokens=64), dict(max_batch_tokens=8), dict(max_batch_tokens=11, num_blocks=24)):
        core, _ = engine(**changes)
        said.append(first_logprobs(core))
    for other in said[1:]:
        torch.testing.assert_close(other, said[0], atol=2e-5, rtol=0)


def test_numbers_too_large_are_kept_as_the_greatest():
    model = make_model("llama", attention=ATTENTION_NAME)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(4000.0)
    core, base = make_engine(model)
    assert first_logprobs(core).isfinite().all()
    kept = torch.cat([tensor.float().abs().reshape(-1) for tensor in base.attention.values])
    assert float(kept.max()) == 448 and int((kept == 448).sum()) > 100


def test_the_embedded_model_reads_a_text_nearly_as_well(model_dir):
    """A prompt in chunks and a decoded answer. Rounding moves single tokens' probabilities; the perplexity of the whole it moves by less
    than 3% (by 0.8% over 4096 tokens: docs/quantization.md)."""
    ids = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)(topics["lambda"] + topics["with"]).input_ids[:200]
    params, said = SamplingParams(max_new_tokens=4, num_logprobs=0, num_prompt_logprobs=0), {}
    for kept_in in ("auto", "fp8"):
        options = EngineOptions(
            str(model_dir), device="cpu", num_blocks=20, max_batch_tokens=128, max_sequence_len=256, kv_cache_dtype=kept_in
        )
        core, _, _ = build_engine(options)
        core.add(EngineRequest("a", ids, params))
        outputs = run_until_idle(core)
        assert [output.error for output in outputs if output.error] == []
        prompts = next(output.prompt_logprobs for output in outputs if output.prompt_logprobs)
        said[kept_in] = torch.tensor([one.logprob for one in prompts[1:]]), [one.logprob for output in outputs for one in output.logprobs]
    (exact, answer), (mine, its_answer) = said["auto"], said["fp8"]
    assert len(exact) == 199 and len(answer) == len(its_answer) == 4
    assert float((mine - exact).abs().max()) > 0 and abs(float((mine - exact).mean())) < 0.03
    assert float((mine - exact).abs().mean()) < 0.25
