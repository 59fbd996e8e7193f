"""A pack applied in plain torch answers as PEFT does: every kind of adapter that PEFT can save, on models of three shapes."""

import pytest
import torch

from server.adapters.pack import read_header, write_pack
from tests.server.adapters.layouts import HIDDEN, VOCAB, describe, gemma, gpt2, llama, pack_outputs, peft_outputs, phi, tied_llama, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {"rank_pattern": {"layers.1.self_attn.q_proj": 8, "v_proj": 2}, "alpha_pattern": {"layers.0.*q_proj": 3, "k_proj": 0.5}}

CASES = {
    "one linear": (llama, {}),
    "all linears by name": (llama, {"target_modules": ALL, "lora_alpha": 3}),
    "all-linear": (llama, {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "pattern": (llama, {"target_modules": r".*layers\.1\..*(q|up)_proj", "exclude_modules": ".*up_proj"}),
    "rslora": (llama, {"target_modules": ALL, "use_rslora": True, "lora_alpha": 5}),
    "rank and alpha patterns": (llama, {"target_modules": ALL, **PATTERNS}),
    "rank patterns with rslora": (llama, {"target_modules": ALL, "use_rslora": True, **PATTERNS}),
    "layers_to_transform": (llama, {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "dora": (llama, {"target_modules": ALL, "use_dora": True, **PATTERNS}),
    "dora head": (llama, {"target_modules": ["lm_head", "v_proj"], "use_dora": True}),
    "dora with a head's bias": (phi, {"target_modules": ["lm_head", "fc1"], "use_dora": True}),
    "lora_bias": (llama, {"target_modules": ALL, "lora_bias": True, "lora_alpha": 3}),
    "bias lora_only": (llama, {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    "bias all": (phi, {"target_modules": ["fc1"], "bias": "all", "lora_bias": True}),
    "bias all with dora": (phi, {"target_modules": ["fc1", "q_proj"], "bias": "all", "use_dora": True}),
    "bias all with saved norms": (phi, {"target_modules": ["fc1"], "bias": "all", "modules_to_save": ["input_layernorm", "k_proj"]}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": (llama, {"target_modules": ["lm_head"]}),
    "embedding of a tied base": (tied_llama, {"target_modules": ["embed_tokens"]}),
    "head of a tied base": (tied_llama, {"target_modules": ["lm_head"]}),
    "embedding and head of a tied base": (tied_llama, {"target_modules": ["lm_head", "embed_tokens"]}),
    "tied delta from the embedding": (tied_llama, {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "tied delta from the head": (tied_llama, {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True}),
    "tied delta by pattern": (tied_llama, {"target_modules": ".*embed_tokens", "ensure_weight_tying": True}),
    "saved embedding": (llama, {"modules_to_save": ["embed_tokens"]}),
    "saved embedding of a tied base": (tied_llama, {"modules_to_save": ["embed_tokens"]}),
    "saved head of a tied base": (tied_llama, {"modules_to_save": ["lm_head"]}),
    "saved and tied": (tied_llama, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    "saved norms": (llama, {"modules_to_save": ["norm"]}),
    "saved linear": (llama, {"modules_to_save": ["v_proj", "gate_proj"]}),
    "saved block": (llama, {"modules_to_save": ["layers.0.mlp"], "target_modules": ALL}),
    "saved modules alone": (llama, {"target_modules": "dummy-target-modules", "modules_to_save": ["norm", "lm_head"]}),
    "tokens": (llama, {"trainable_token_indices": [3, 1, 60]}),
    "tokens of a tied base": (tied_llama, {"trainable_token_indices": [3, 1, 60]}),
    "tokens of the head": (llama, {"trainable_token_indices": {"lm_head": [5]}}),
    "tokens of both": (llama, {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [6]}}),
    "tokens of both, tied": (tied_llama, {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [6]}}),
    "same tokens of both, tied": (tied_llama, {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [5]}}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2 with PEFT's correction": (gpt2, {"target_modules": ["c_attn"]}),
    "gpt2 dora": (gpt2, {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    "gpt2 saved": (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["c_fc", "ln_f"]}),
    "gpt2 bias all": (gpt2, {"target_modules": ["c_attn"], "bias": "all"}),
    "gpt2 embedding": (gpt2, {"target_modules": ["wte", "c_attn"]}),
    "gemma": (gemma, {"target_modules": "all-linear"}),
    "gemma embedding": (gemma, {"target_modules": ["embed_tokens", "q_proj"]}),
    "gemma tied delta": (gemma, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "gemma tokens": (gemma, {"trainable_token_indices": [2, 4]}),
    "gemma saved": (gemma, {"modules_to_save": ["embed_tokens", "norm"]}),
}
GROWN = {
    "added tokens, head with a bias": (phi, {"target_modules": ["fc1"]}),
    "added tokens": (llama, {}),
    "added tokens, tied": (tied_llama, {}),
    "added tokens, saved": (llama, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "added tokens, saved head": (llama, {"modules_to_save": ["lm_head"]}),
    "added tokens, saved, tied": (tied_llama, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "added tokens, saved head, tied": (tied_llama, {"modules_to_save": ["lm_head"]}),
    "added tokens, delta on both": (llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "added tokens, delta by pattern": (llama, {"target_modules": "(model.embed_tokens|lm_head)"}),
    "added tokens, dora head": (llama, {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"], "use_dora": True}),
    "added tokens, delta, tied": (tied_llama, {"target_modules": ["embed_tokens"]}),
    "added tokens, tied delta": (tied_llama, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "added tokens, trained": (llama, {"trainable_token_indices": [64, 65, 3]}),
    "added tokens, trained, tied": (tied_llama, {"trainable_token_indices": [64, 65, 3]}),
}


def compare(tmp_path, base, config, resize=None, hashes=True):
    train(base(), tmp_path / "adapter", resize=resize, **config)
    layout = describe(base(), hashes=hashes)
    header = write_pack(tmp_path / "adapter", layout, "h", tmp_path / "pack")
    assert header == read_header(tmp_path / "pack")[0] and header.fingerprint == layout.fingerprint
    ids = torch.tensor([[0, 3, 1, 60, 5, 6, 2, (resize or VOCAB) - 1]])
    names = [site.name for site in layout.sites]
    expected, expected_of = peft_outputs(base(), tmp_path / "adapter", ids, names, resize)
    logits, of = pack_outputs(base(), layout, tmp_path / "pack", ids, names)
    assert logits.shape == expected.shape and header.vocab_size == logits.shape[-1]
    for name in names:
        torch.testing.assert_close(of[name], expected_of[name], atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        untouched = base()(input_ids=ids.clamp(max=VOCAB - 1)).logits
    assert (expected[..., :VOCAB] - untouched).abs().max() > 1e-3, "the adapter does nothing: the comparison would prove nothing"
    return header


@pytest.mark.parametrize("case", CASES)
def test_pack_answers_as_peft(case, tmp_path):
    base, config = CASES[case]
    compare(tmp_path, base, config)


@pytest.mark.parametrize("case", GROWN)
def test_pack_with_added_tokens_answers_as_peft(case, tmp_path):
    base, config = GROWN[case]
    header = compare(tmp_path, base, config, resize=VOCAB + 6)
    assert header.vocab_size == VOCAB + 6


@pytest.mark.parametrize("case", ["embedding", "dora head", "embedding and head of a tied base", "gemma embedding"])
def test_saved_copy_of_the_base_is_left_out_only_where_its_hash_is_known(case, tmp_path):
    base, config = CASES[case]
    (tmp_path / "known").mkdir()
    (tmp_path / "unknown").mkdir()
    known = compare(tmp_path / "known", base, config)
    unknown = compare(tmp_path / "unknown", base, config, hashes=False)
    assert all(site.weight is None for site in known.sites)
    assert unknown.data_bytes >= known.data_bytes + VOCAB * HIDDEN * 4 / 2
