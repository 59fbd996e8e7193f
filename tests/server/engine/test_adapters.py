"""Adapters of every kind, mixed in one batch, against PEFT: logits within 1e-4 and the same greedy text."""

import random

import pytest
import torch

from server.engine.core import run_until_idle
from server.model.attention import ATTENTION_NAME
from server.types import EngineRequest, SamplingParams
from tests.server.engine.peft_oracle import load_reference, pack, save_adapter
from tests.server.engine.tiny_models import DEVICE, VOCAB, make_engine, make_model

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA_KINDS = {
    "plain": {},
    "all-linear": dict(r=8, target_modules="all-linear"),
    "rank-1": dict(r=1, target_modules=ALL),
    "odd-rank": dict(r=5, target_modules=["k_proj", "up_proj"]),
    "rslora": dict(use_rslora=True, r=9),
    "dora": dict(use_dora=True, target_modules=ALL),
    "patterns": dict(target_modules=ALL, rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7}, alpha_pattern={"v_proj": 40}),
    "layers": dict(layers_to_transform=[0, 2]),
    "regex": dict(target_modules=r".*\.layers\.[01]\..*(up|o)_proj"),
    "exclude": dict(target_modules="all-linear", exclude_modules=["down_proj"]),
    "lora-bias": dict(lora_bias=True),
    "head": dict(target_modules=["q_proj", "lm_head"]),
    "embedding": dict(target_modules=["q_proj", "embed_tokens"]),
    "saved-head": dict(modules_to_save=["lm_head"]),
    "saved-embedding": dict(modules_to_save=["embed_tokens"]),
    "saved-norms": dict(modules_to_save=["input_layernorm", "norm"]),
    "tokens": dict(trainable_token_indices=[5, 3, 90]),
    "added-tokens": dict(resize=3, modules_to_save=["embed_tokens", "lm_head"]),
}
OTHERS = {
    "gpt2": {
        "plain": dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
        "dora": dict(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True),
        "bias": dict(target_modules=["c_attn"], fan_in_fan_out=True, bias="all"),
        "tokens": dict(target_modules=["c_fc"], fan_in_fan_out=True, trainable_token_indices=[4, 8]),
    },
    "gemma2": {
        "plain": dict(target_modules="all-linear"),
        "embedding": dict(target_modules=["embed_tokens", "o_proj"]),
        "tokens": dict(trainable_token_indices=[7]),
    },
    "gemma3_text": {
        "norms": dict(modules_to_save=["q_norm", "pre_feedforward_layernorm"]),
        "embedding": dict(target_modules=["embed_tokens"]),
    },
    "qwen2": {"bias": dict(bias="lora_only"), "dora": dict(use_dora=True), "all-biases": dict(bias="all", target_modules=ALL)},
    "phi3": {"fused": dict(target_modules=["qkv_proj", "gate_up_proj", "down_proj"])},
    "mixtral": {"attention": {}, "router": dict(modules_to_save=["gate"])},
    "deepseek_v3": {"all": dict(target_modules=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"])},
    "gpt_neox": {"fused": dict(target_modules=["query_key_value", "dense", "dense_h_to_4h"], bias="all")},
    "opt": {"plain": dict(target_modules=["q_proj", "fc1", "out_proj", "project_in"]), "tied": dict(modules_to_save=["lm_head"])},
}

# PEFT warns about what it saves and about tied weights; what it means here is what the tests compare.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def serve_and_compare(model_type, kinds, tmp_path, *, num_new=5, **model_changes):
    """All kinds and the base in one engine at once; each row against its own PEFT model."""
    kinds = {name: dict(config) for name, config in kinds.items()}
    core, base = make_engine(
        make_model(model_type, attention=ATTENTION_NAME, **model_changes), num_blocks=256, max_batch_size=32, max_batch_tokens=48
    )
    rng = random.Random(0)
    params = SamplingParams(max_new_tokens=num_new, num_logprobs=VOCAB + 10, raw_logprobs=True, num_prompt_logprobs=0)
    prompts, resizes = {"base": [rng.randrange(3, VOCAB) for _ in range(11)]}, {}
    core.add(EngineRequest("base", prompts["base"], params))
    for name, config in kinds.items():
        resizes[name] = config.pop("resize", 0)
        folder = save_adapter(tmp_path / name, model_type, seed=len(prompts), model_changes=model_changes, resize=resizes[name], **config)
        prompts[name] = [rng.randrange(3, VOCAB + resizes[name]) for _ in range(rng.randrange(6, 20))]
        if "trainable_token_indices" in config:
            prompts[name] += config["trainable_token_indices"]
        core.add(EngineRequest(name, prompts[name], params, pack(folder, base.layout, tmp_path / f"{name}.pack")))
    outputs = run_until_idle(core)
    for name, prompt in prompts.items():
        mine = [o for o in outputs if o.request_id == name]
        assert mine[-1].finish_reason == "length", (name, mine[-1].error)
        plain = make_model(model_type, **model_changes)
        reference = (
            plain if name == "base" else load_reference(tmp_path / name, model_type, model_changes=model_changes, resize=resizes[name])
        )
        tokens = [t for o in mine for t in o.token_ids]
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt + tokens[:-1]], device=DEVICE)).logits[0].log_softmax(-1).cpu()
            without = plain(torch.tensor([[min(t, VOCAB - 1) for t in prompt]], device=DEVICE)).logits[0].log_softmax(-1).cpu()
        assert tokens == expected[len(prompt) - 1 :].argmax(-1).tolist(), name
        for step, output in enumerate(mine):
            got = torch.tensor([value for _, value in sorted(output.logprobs[0].top)])
            assert got.shape == expected[0].shape
            assert torch.allclose(got, expected[len(prompt) - 1 + step], atol=1e-4), name
        prompt_logprobs = torch.tensor([p.logprob for p in mine[0].prompt_logprobs[1:]])
        assert torch.allclose(prompt_logprobs, expected[torch.arange(len(prompt) - 1), prompt[1:]], atol=1e-4), name
        if name != "base":  # an oracle that is the base would prove nothing
            assert (expected[len(prompt) - 1, :VOCAB] - without[-1]).abs().max() > 1e-2, name
    for name in kinds:
        core.tiers.forget(f"hash-of-{name}")
    assert core.pool.num_used == core.tiers.device.used_bytes == core.tiers.host.used_bytes == 0


@pytest.mark.parametrize("tied", [False, True])
def test_every_kind_on_llama(tied, tmp_path):
    kinds = LLAMA_KINDS
    if tied:  # the head is the embedding: what PEFT makes of these has a meaning of its own
        kinds = {name: LLAMA_KINDS[name] for name in ("plain", "embedding", "tokens", "saved-head", "saved-norms")}
    serve_and_compare("llama", kinds, tmp_path, tie_word_embeddings=tied)


@pytest.mark.parametrize("model_type", sorted(OTHERS))
def test_other_architectures(model_type, tmp_path):
    serve_and_compare(model_type, OTHERS[model_type], tmp_path)
