"""Adapters that betray themselves: the n-th content ever made can only say the two tokens of mark n.

Its LoRA on the head lifts one token of the pair far above all others and sinks the other one, or the other way round, by the sign of the
hidden state; which one it is hangs on the whole computation before it, where a LoRA on q and v (of the content's own random numbers) is
felt. So the pair tells the content, and the order of the two tells whether anything of another content was in the computation.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks.gpu.models import MODELS

MODEL = "marked"
FIRST_ID = 128  # tokens below are the prompts'
_LIFT = 1e5
NUM_MARKS = (MODELS[MODEL]["vocab_size"] - FIRST_ID) // 2
_RANK, _HEAD_RANK = 4, 1


def tokens_of(mark: int) -> frozenset[int]:
    """The two tokens that the content of that mark can say."""
    first = FIRST_ID + 2 * (mark % NUM_MARKS)
    return frozenset((first, first + 1))


def write_marked(folder: Path, mark: int) -> Path:
    """A PEFT adapter of content `mark`. The config is that of all others; the weights come last, whole."""
    shape, random = MODELS[MODEL], np.random.default_rng(mark)
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"] * shape["head_dim"]
    kv_heads = shape["num_key_value_heads"] * shape["head_dim"]

    def numbers(*size: int, scale: float) -> np.ndarray:
        return random.normal(0.0, scale, size).astype(np.float32)

    tensors = {}
    for layer in range(shape["num_hidden_layers"]):
        for name, out in (("q_proj", heads), ("v_proj", kv_heads)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = numbers(_RANK, hidden, scale=0.1)
            tensors[f"{prefix}.lora_B.weight"] = numbers(out, _RANK, scale=0.1)
    lift = np.zeros((shape["vocab_size"], _HEAD_RANK), np.float32)
    low, high = sorted(tokens_of(mark))
    lift[low], lift[high] = _LIFT, -_LIFT
    tensors["base_model.model.lm_head.lora_A.weight"] = numbers(_HEAD_RANK, hidden, scale=0.125)
    tensors["base_model.model.lm_head.lora_B.weight"] = lift
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "adapter_config.json").exists():
        (folder / "adapter_config.json").write_text(json.dumps(_config()))
    staged = folder / ".adapter_model.new"  # a file that no source looks at
    save_file(tensors, staged, metadata={"format": "pt"})
    staged.replace(folder / "adapter_model.safetensors")
    return folder


def _config() -> dict:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": _RANK,
        "lora_alpha": _RANK,
        "rank_pattern": {"lm_head": _HEAD_RANK},
        "alpha_pattern": {"lm_head": _HEAD_RANK},
        "target_modules": ["q_proj", "v_proj", "lm_head"],
        "base_model_name_or_path": MODEL,
        "bias": "none",
        "inference_mode": True,
    }
