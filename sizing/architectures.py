"""How each served architecture is built, from its config.json alone: one entry of FAMILIES a `model_type`.

Owns what transformers' modules add up to: which linears there are, which of them read one input, how many norms, how wide a key is. A test
builds each architecture and compares. `models` calls `shape_of`; an architecture that is not here is refused by its name.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from sizing.config import Config
from sizing.shape import Attention, Experts, Group, Layer, Linear


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between architectures. Functions get the config; `windows` gets (config, layer)."""

    attention: Callable[[Config], tuple[Group, ...]]
    mlp: Callable[[Config], tuple[Group, ...]]
    norms: int = 2  # a layer
    norm_width: int = 1  # tensors a norm: 2 with a bias
    final_norm: bool = True
    tied: bool = False  # where the config does not say
    head_bias: bool = False
    more: Callable[[Config], int] = lambda config: 0  # further parameters of a layer
    experts: Callable[[Config, int], Experts | None] = lambda config, layer: None
    router: Callable[[Config, Experts], int] = lambda config, experts: config.hidden * experts.count
    shared: Callable[[Config], tuple[Group, ...]] = lambda config: ()  # linears beside the experts
    shape: Callable[[Config], Attention] | None = None
    window: Callable[[Config, int], bool] = lambda config, layer: True  # where there is a sliding_window and the config lists no layers
    outside: Callable[[Config], int] = lambda config: 0  # positions and the like
    outer: Callable[[Config], tuple[Group, ...]] = lambda config: ()
    embedding_dim: Callable[[Config], int] = lambda config: config.hidden
    has_sinks: bool = False
    grouped: bool = True  # False: a key and a value for each head, whatever the config says


def _split(bias: str | bool, out_bias: str | bool = False, out: str = "o_proj", default: bool = False):
    """q, k, v of one input, then the output's; `bias`: a key of the config, or whether there is one."""

    def groups(config: Config) -> tuple[Group, ...]:
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        has_bias, out_has = config.flag(bias, default), config.flag(out_bias, default)
        sizes = (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads))
        return (
            tuple(Linear(name, config.hidden, count * dim, has_bias) for name, count in sizes),
            (Linear(out, heads * dim, config.hidden, out_has),),
        )

    return groups


def _fused_qkv(config: Config) -> tuple[Group, ...]:
    width = (config.heads + 2 * config.kv_heads) * config.head_dim
    return ((Linear("qkv_proj", config.hidden, width),), (Linear("o_proj", config.heads * config.head_dim, config.hidden),))


def _gated(bias: str | bool = False, inner: str = "intermediate_size", times: str | None = None):
    def groups(config: Config) -> tuple[Group, ...]:
        width, has_bias = config.number(inner) * (config.number(times) if times else 1), config.flag(bias)
        pair = tuple(Linear(name, config.hidden, width, has_bias) for name in ("gate_proj", "up_proj"))
        return (pair, (Linear("down_proj", width, config.hidden, has_bias),))

    return groups


def _fused_gated(config: Config) -> tuple[Group, ...]:
    inner = config.number("intermediate_size")
    return ((Linear("gate_up_proj", config.hidden, 2 * inner),), (Linear("down_proj", inner, config.hidden),))


def _plain(up: str, down: str, bias: str | bool, inner: str = "intermediate_size", default: bool = True):
    def groups(config: Config) -> tuple[Group, ...]:
        width = config.number(inner, 4 * config.hidden)
        has_bias = config.flag(bias, default)
        return ((Linear(up, config.hidden, width, has_bias),), (Linear(down, width, config.hidden, has_bias),))

    return groups


def _neox_attention(config: Config) -> tuple[Group, ...]:
    bias = config.flag("attention_bias", True)
    qkv = Linear("query_key_value", config.hidden, 3 * config.hidden, bias)
    return ((qkv,), (Linear("dense", config.hidden, config.hidden, bias),))


def _gpt2_attention(config: Config) -> tuple[Group, ...]:
    return ((Linear("c_attn", config.hidden, 3 * config.hidden, True),), (Linear("c_proj", config.hidden, config.hidden, True),))


def _latent_attention(config: Config) -> tuple[Group, ...]:
    """DeepSeek V3: queries and keys through narrow projections with a norm of their own between."""
    bias, heads, rope = config.flag("attention_bias"), config.heads, config.number("qk_rope_head_dim")
    key_dim, value_dim, kv_rank = config.number("qk_nope_head_dim") + rope, config.number("v_head_dim"), config.number("kv_lora_rank")
    q_rank = config.get("q_lora_rank")
    q_a: tuple[Group, ...] = ((Linear("q_proj", config.hidden, heads * key_dim),),)
    if q_rank:
        q_a = ((Linear("q_a_proj", config.hidden, q_rank, bias),), (Linear("q_b_proj", q_rank, heads * key_dim),))
    return (
        *q_a,
        (Linear("kv_a_proj_with_mqa", config.hidden, kv_rank + rope, bias),),
        (Linear("kv_b_proj", kv_rank, heads * (key_dim - rope + value_dim)),),
        (Linear("o_proj", heads * value_dim, config.hidden, bias),),
    )


def _latent_shape(config: Config) -> Attention:
    key_dim = config.number("qk_nope_head_dim") + config.number("qk_rope_head_dim")
    return Attention(config.heads, config.heads, key_dim, config.number("v_head_dim"))


def _experts(count: str, inner: str, sparse: Callable[[Config, int], bool] = lambda config, layer: True, bias: bool = False):
    def experts(config: Config, layer: int) -> Experts | None:
        if not sparse(config, layer):
            return None
        width = config.number(inner)
        biases = 2 * width + config.hidden if bias else 0
        return Experts(config.number(count), config.number("num_experts_per_tok"), 3 * width * config.hidden + biases)

    return experts


def _every_so_many(config: Config, layer: int) -> bool:
    dense = config.get("mlp_only_layers") or []
    return layer not in dense and config.number("num_experts") > 0 and (layer + 1) % config.number("decoder_sparse_step", 1) == 0


def _shared_expert(config: Config) -> tuple[Group, ...]:
    """Qwen2-MoE's: a gated MLP, and a gate of one output."""
    return (*_gated(inner="shared_expert_intermediate_size")(config), (Linear("shared_expert_gate", config.hidden, 1),))


def _opt_outer(config: Config) -> tuple[Group, ...]:
    width = config.number("word_embed_proj_dim", config.hidden)
    if width == config.hidden:
        return ()
    return ((Linear("project_in", width, config.hidden),), (Linear("project_out", config.hidden, width),))


def _stablelm_more(config: Config) -> int:
    heads = (config.heads + config.kv_heads) * config.head_dim if config.flag("qk_layernorm") else 0
    return heads - (2 * config.hidden if config.flag("use_parallel_residual") else 0)


def _every_other(config: Config, layer: int) -> bool:
    return (layer + 1) % 2 == 1


def _late_layers(config: Config, layer: int) -> bool:
    """Qwen's: from a layer on, if at all."""
    return config.flag("use_sliding_window") and layer >= config.number("max_window_layers", 28)


def _norms_of_heads(config: Config) -> int:
    return 2 * config.head_dim


_LLAMA = dict(attention=_split("attention_bias", "attention_bias"), mlp=_gated("mlp_bias"))
_WITH_NORMS = dict(attention=_split("attention_bias", "attention_bias"), mlp=_gated(), more=_norms_of_heads)
FAMILIES: dict[str, Family] = {
    "llama": Family(**_LLAMA),
    "granite": Family(**_LLAMA),
    "smollm3": Family(**_LLAMA, tied=True, window=lambda config, layer: config.flag("use_sliding_window")),
    "mistral": Family(attention=_split(False), mlp=_gated()),
    "qwen2": Family(
        attention=_split(True),
        mlp=_gated(),
        window=_late_layers,
    ),
    "qwen3": Family(
        **_WITH_NORMS,
        window=_late_layers,
    ),
    "gemma": Family(attention=_split("attention_bias", "attention_bias"), mlp=_gated(), tied=True),
    "gemma2": Family(attention=_split("attention_bias", "attention_bias"), mlp=_gated(), norms=4, tied=True, window=_every_other),
    "gemma3_text": Family(
        **_WITH_NORMS, norms=4, tied=True, window=lambda config, layer: bool((layer + 1) % config.number("sliding_window_pattern", 6))
    ),
    "phi": Family(
        attention=_split(True, True, out="dense"),
        mlp=_plain("fc1", "fc2", True),
        norms=1,
        norm_width=2,
        head_bias=True,
        more=lambda config: 4 * config.head_dim if config.flag("qk_layernorm") else 0,
    ),
    "phi3": Family(attention=_fused_qkv, mlp=_fused_gated),
    "olmo": Family(attention=_split("attention_bias", "attention_bias"), mlp=_gated(), norms=0, final_norm=False),
    "olmo2": Family(
        attention=_split("attention_bias", "attention_bias"),
        mlp=_gated(),
        more=lambda config: (config.heads + config.kv_heads) * config.head_dim,
    ),
    "gpt2": Family(
        attention=_gpt2_attention,
        mlp=_plain("c_fc", "c_proj", True, inner="n_inner"),
        grouped=False,
        norm_width=2,
        tied=True,
        outside=lambda config: config.number("n_positions") * config.hidden,
    ),
    "gpt_neox": Family(attention=_neox_attention, mlp=_plain("dense_h_to_4h", "dense_4h_to_h", True), norm_width=2, grouped=False),
    "opt": Family(
        attention=_split("enable_bias", "enable_bias", out="out_proj", default=True),
        mlp=_plain("fc1", "fc2", "enable_bias", inner="ffn_dim"),
        grouped=False,
        norm_width=2,
        tied=True,
        outside=lambda config: (config.number("max_position_embeddings") + 2) * config.hidden,
        outer=_opt_outer,
        embedding_dim=lambda config: config.number("word_embed_proj_dim", config.hidden),
    ),
    "cohere": Family(
        attention=_split("attention_bias", "attention_bias"),
        mlp=_gated(),
        norms=1,
        tied=True,
        more=lambda config: (config.heads + config.kv_heads) * config.head_dim if config.flag("use_qk_norm") else 0,
    ),
    "cohere2": Family(
        attention=_split("attention_bias", "attention_bias"),
        mlp=_gated(),
        norms=1,
        tied=True,
        window=lambda config, layer: bool((layer + 1) % config.number("sliding_window_pattern", 4)),
    ),
    "glm": Family(attention=_split("attention_bias"), mlp=_fused_gated),
    "glm4": Family(attention=_split("attention_bias"), mlp=_fused_gated, norms=4),
    "starcoder2": Family(
        attention=_split("use_bias", "use_bias", default=True), mlp=_plain("c_fc", "c_proj", "use_bias"), norm_width=2, tied=True
    ),
    "stablelm": Family(attention=_split("use_qkv_bias"), mlp=_gated(), norm_width=2, more=_stablelm_more),
    "mixtral": Family(attention=_split(False), mlp=_gated(), experts=_experts("num_local_experts", "intermediate_size")),
    "qwen2_moe": Family(
        attention=_split("qkv_bias", default=True),
        mlp=_gated(),
        experts=_experts("num_experts", "moe_intermediate_size", _every_so_many),
        shared=_shared_expert,
        window=_late_layers,
    ),
    "qwen3_moe": Family(
        **_WITH_NORMS,
        experts=_experts("num_experts", "moe_intermediate_size", _every_so_many),
        window=lambda config, layer: config.flag("use_sliding_window"),
    ),
    "gpt_oss": Family(
        attention=_split("attention_bias", "attention_bias", default=True),
        mlp=_gated(),
        experts=_experts("num_local_experts", "intermediate_size", bias=True),
        router=lambda config, experts: (config.hidden + 1) * experts.count,
        more=lambda config: config.heads,
        has_sinks=True,
        window=_every_other,
    ),
    "deepseek_v3": Family(
        attention=_latent_attention,
        mlp=_gated(),
        shape=_latent_shape,
        more=lambda config: (config.get("q_lora_rank") or 0) + config.number("kv_lora_rank"),
        experts=_experts(
            "n_routed_experts", "moe_intermediate_size", lambda config, layer: layer >= config.number("first_k_dense_replace", 3)
        ),
        shared=_gated(inner="moe_intermediate_size", times="n_shared_experts"),
    ),
}


def layer_of(family: Family, config: Config, index: int) -> Layer:
    """Layer `index` of an architecture."""
    if not family.grouped:
        config = config.without("num_key_value_heads", "head_dim")
    attention = family.shape(config) if family.shape else Attention(config.heads, config.kv_heads, config.head_dim, config.head_dim)
    window = config.window(index, family.window)
    experts = family.experts(config, index)
    mlp = family.shared(config) if experts else family.mlp(config)
    other = family.norms * family.norm_width * config.hidden + family.more(config) + (family.router(config, experts) if experts else 0)
    attention = dataclasses.replace(attention, window=window, has_sinks=family.has_sinks)
    return Layer(attention, (*family.attention(config), *mlp), other, experts)
