"""Base models with random weights: their shapes, and folders with a config and a tokenizer but no weights. No torch.

Speed does not depend on what the weights say, so nothing is downloaded. The tokenizer's word for id 17 is "w17", without special tokens:
a prompt of n ids is a text of n words, and every id that a random model may pick has a text to send. Used by every engine's program.
"""

import json
from pathlib import Path
from typing import Any

MODELS: dict[str, dict[str, Any]] = {
    # LoRA Land's base model, and the article's
    "mistral-7b": dict(
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=32000,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_theta=1000000.0,
        sliding_window=None,
        hidden_act="silu",
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    ),
    "llama2-7b": dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        vocab_size=32000,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        hidden_act="silu",
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    ),
}
# A tied head, biases, few heads of keys and values, a wide vocabulary: what the others do not have
MODELS["qwen2.5-1.5b"] = MODELS["llama2-7b"] | dict(
    architectures=["Qwen2ForCausalLM"],
    model_type="qwen2",
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    vocab_size=151936,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    tie_word_embeddings=True,
)
# For trying the programs out where there is no GPU; its numbers mean nothing.
MODELS["tiny"] = MODELS["mistral-7b"] | dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=512,
    max_position_embeddings=2048,
)
MODELS["marked"] = MODELS["tiny"] | dict(vocab_size=8192)  # of benchmarks.soak: room for a pair of tokens for each version of each adapter
# What a checkpoint of AutoAWQ says of itself. The head is named, so that vLLM does not look into the files that are not there.
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["lm_head"]}
MODULES = {"all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "qv": ["q_proj", "v_proj"]}


def linears(model: str, modules: str) -> list[tuple[str, int, int]]:
    """(module path, in features, out features) of every linear of `model` that the set `modules` names, layer by layer."""
    config = MODELS[model]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    kv_heads = config["num_key_value_heads"] * config["head_dim"]
    features = {
        "q_proj": (hidden, heads),
        "k_proj": (hidden, kv_heads),
        "v_proj": (hidden, kv_heads),
        "o_proj": (heads, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    parents = {name: "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp" for name in features}
    return [
        (f"model.layers.{layer}.{parents[name]}.{name}", *features[name])
        for layer in range(config["num_hidden_layers"])
        for name in MODULES[modules]
    ]


def write_model(root: Path, model: str, quantization: dict[str, Any] | None = None) -> Path:
    """The model's folder below `root`: config, tokenizer, no weights. `quantization`: the config's quantization_config."""
    folder = root / "models" / (model if quantization is None else f"{model}-{quantization['quant_method']}")
    folder.mkdir(parents=True, exist_ok=True)
    more = {} if quantization is None else {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(MODELS[model] | more))
    (folder / "generation_config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {f"w{id}": id for id in range(MODELS[model]["vocab_size"])}, "unk_token": "w0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def as_text(ids: list[int]) -> str:
    """The text that the tokenizer above reads as `ids`."""
    return " ".join(f"w{id}" for id in ids)
