"""A tiny random model of every architecture that is served, and what plain eager Hugging Face says about it."""

import json
import os

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from server.engine.build import assemble
from server.engine.core import EngineCore
from server.model.attention import ATTENTION_NAME
from server.model.base import BaseModel
from server.types import EngineOptions

VOCAB = 97
DEVICE = torch.device(os.environ.get("MANYLORA_TEST_DEVICE", "cpu"))  # "cuda" runs the same tests on a GPU, oracle included
_LLAMA = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)
_MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)

CONFIGS: dict[str, dict] = {
    "llama": {},
    "mistral": dict(sliding_window=9),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2": dict(use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": {},
    "qwen2_moe": dict(**_MOE, shared_expert_intermediate_size=40, use_sliding_window=False),
    "qwen3_moe": dict(**_MOE),
    "gemma": {},
    "gemma2": dict(sliding_window=9, query_pre_attn_scalar=8, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    "gemma3_text": dict(sliding_window=9, query_pre_attn_scalar=8, sliding_window_pattern=2),
    "phi": dict(partial_rotary_factor=0.5),
    "phi3": dict(sliding_window=9, pad_token_id=0),
    "olmo": {},
    "olmo2": {},
    "granite": dict(embedding_multiplier=2.0, logits_scaling=3.0, residual_multiplier=0.5, attention_multiplier=0.2),
    "gpt2": dict(n_embd=32, n_layer=3, n_head=4, n_positions=128, vocab_size=VOCAB),
    "gpt_neox": dict(rotary_pct=0.5),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=16),
    "cohere": dict(logit_scale=0.5),
    "cohere2": dict(sliding_window=9, logit_scale=0.5),
    "glm": dict(pad_token_id=0),
    "glm4": dict(pad_token_id=0),
    "starcoder2": dict(sliding_window=9),
    "deepseek_v3": dict(
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=24,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        head_dim=8,
    ),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=9),
    "smollm3": dict(pad_token_id=0, use_sliding_window=True, sliding_window=9, no_rope_layers=[1, 0, 1]),
    "stablelm": dict(partial_rotary_factor=0.5),
}
_OWN_SHAPE = {"gpt2"}


def make_config(model_type: str, **changes):
    """The tiny config of an architecture."""
    shape = {} if model_type in _OWN_SHAPE else dict(_LLAMA)
    return AutoConfig.for_model(model_type, **{**shape, **CONFIGS[model_type], "bos_token_id": 1, "eos_token_id": 2, **changes})


def make_model(model_type: str, *, seed: int = 0, attention: str = "eager", **changes) -> torch.nn.Module:
    """A random model in float32 with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(model_type, **changes), attn_implementation=attention, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif "sinks" in name or "bias" in name:
                parameter.normal_(0, 0.5)
    return model.to(DEVICE)


def make_engine(model: torch.nn.Module, **changes) -> tuple[EngineCore, BaseModel]:
    """The engine around a model that was made with attention=ATTENTION_NAME."""
    options = dict(model_dir="", block_size=4, num_blocks=64, max_batch_tokens=16, max_batch_size=8, max_sequence_len=64)
    base = BaseModel(model)
    # MANYLORA_TEST_ENGINE: options of every engine in these tests as JSON, such as {"kernels": "triton"} under TRITON_INTERPRET=1
    options.update(adapter_device_bytes=1 << 24, adapter_host_bytes=1 << 28, **json.loads(os.environ.get("MANYLORA_TEST_ENGINE", "{}")))
    return assemble(base, EngineOptions(**{**options, **changes})), base


def make_pair(model_type: str, **changes) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(eager reference, the same weights for the engine)."""
    return make_model(model_type, **changes), make_model(model_type, attention=ATTENTION_NAME, **changes)
