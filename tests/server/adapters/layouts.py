"""Tiny random models, their BaseLayout, real PEFT adapters on them, and a pack applied in plain torch as server/types.py says.

The oracle is PEFT: an adapter is saved by PEFT, loaded by PEFT onto a fresh base, and compared with the pack on another fresh base.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from server.adapters.pack import load_pack, view_tensor
from server.adapters.parts import as_part, hash_weight
from server.types import BaseLayout, Module, PackedAdapter, PackedSite, PackedTensor, Site

HIDDEN, VOCAB, LAYERS = 32, 64, 2
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

Base = Callable[[], nn.Module]


def llama(tied: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        tie_word_embeddings=tied,
        attention_bias=True,
        initializer_range=0.1,  # with less, attention is so flat that a delta on a query hardly shows
    )
    return _with_noise(LlamaForCausalLM(config))


def tied_llama() -> nn.Module:
    return llama(tied=True)


def gpt2() -> nn.Module:
    torch.manual_seed(1)
    config = GPT2Config(n_embd=HIDDEN, n_layer=LAYERS, n_head=4, vocab_size=VOCAB, n_positions=32, bos_token_id=0, eos_token_id=0)
    return _with_noise(GPT2LMHeadModel(config))


def gemma() -> nn.Module:
    torch.manual_seed(2)
    config = Gemma3TextConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _with_noise(Gemma3ForCausalLM(config))


def phi() -> nn.Module:
    """Its head has a bias."""
    torch.manual_seed(3)
    config = PhiConfig(hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=VOCAB)
    return _with_noise(PhiForCausalLM(config))


def _with_noise(model: nn.Module) -> nn.Module:
    """Biases and norms away from 0 and 1, so that replacing or losing one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def describe(model: nn.Module, dtype: str = "float32", hashes: bool = True) -> BaseLayout:
    """The layout that an engine would send for `model`."""
    modules = {name: module for name, module in model.named_modules() if name}
    sites, groups = [], {}
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        siblings = next((s for s in _SIBLINGS if last in s), (last,))
        group = groups.setdefault((parent, siblings), len(groups))
        has_bias = getattr(module, "bias", None) is not None
        if isinstance(module, nn.Linear):
            sites.append(Site(name, "linear", module.in_features, module.out_features, has_bias, False, group))
        elif isinstance(module, Conv1D):
            sites.append(Site(name, "linear", *module.weight.shape, has_bias, True, group))
        elif isinstance(module, nn.Embedding) and module is model.get_input_embeddings():
            sites.append(Site(name, "embedding", *module.weight.shape))
    of = {id(module): name for name, module in modules.items()}
    embedding, head = of[id(model.get_input_embeddings())], of[id(model.get_output_embeddings())]
    site_names = {site.name for site in sites}
    weight = model.get_input_embeddings().weight.detach().numpy()
    head_weight = model.get_output_embeddings().weight.detach().numpy()
    return BaseLayout(
        fingerprint="tiny",
        model_type=model.config.model_type,
        num_layers=LAYERS,
        vocab_size=weight.shape[0],
        hidden_size=weight.shape[1],
        tied_head=model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        embedding=embedding,
        head=head,
        dtype=dtype,
        sites=sites,
        modules=[
            Module(
                name,
                type(module).__name__,
                {n: list(p.shape) for n, p in module.named_parameters(recurse=False)},
                replaceable=name in site_names or "Norm" in type(module).__name__,
            )
            for name, module in modules.items()
        ],
        weight_hashes=(
            {embedding: hash_weight(as_part("", weight), dtype), head: hash_weight(as_part("", head_weight), dtype)} if hashes else {}
        ),
    )


def train(model: nn.Module, folder: Path, seed: int = 7, resize: int | None = None, **config) -> Path:
    """Save a PEFT adapter with random numbers in everything that it trains. `resize` gives the vocabulary more rows first."""
    torch.manual_seed(seed)
    config = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], **config}
    if resize:
        model.resize_token_embeddings(resize, mean_resizing=False)
    peft_model = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad or resize and parameter.shape[0] == resize:
                step = 0.2 * torch.randn_like(parameter)
                parameter.copy_(step if "lora_A" in name or "lora_B" in name or "lora_embedding" in name else parameter + step)
    peft_model.save_pretrained(folder, save_embedding_layers=True if resize else "auto")
    return folder


def peft_outputs(model: nn.Module, folder: Path, ids: torch.Tensor, names: list[str], resize: int | None = None):
    """Logits and each named module's output, of PEFT with the adapter in `folder` loaded onto `model`."""
    if resize:
        model.resize_token_embeddings(resize, mean_resizing=False)
    loaded = PeftModel.from_pretrained(model, str(folder)).eval()
    return _outputs(loaded, {name: loaded.get_submodule(f"base_model.model.{name}") for name in names}, ids)


def pack_outputs(model: nn.Module, layout: BaseLayout, pack: Path, ids: torch.Tensor, names: list[str]):
    """The same, of `model` with a pack applied in plain torch."""
    with applied(model, layout, pack):
        return _outputs(model, {name: model.get_submodule(name) for name in names}, ids)


def _outputs(model: nn.Module, modules: dict[str, nn.Module], ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    seen: dict[str, torch.Tensor] = {}
    hooks = [m.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out)) for name, m in modules.items()]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    for hook in hooks:
        hook.remove()
    return logits, seen


@contextmanager
def applied(model: nn.Module, layout: BaseLayout, path: Path) -> Iterator[PackedAdapter]:
    """`model` with the pack's sites, overrides and tokens in place of its own, as PackedSite and its kin are documented."""
    header, data = load_pack(path)

    def view(tensor: PackedTensor | None) -> torch.Tensor | None:
        return None if tensor is None else torch.from_numpy(view_tensor(data, tensor, header.dtype).astype("float32"))

    patched = []
    for packed in header.sites:
        site = layout.sites[packed.site]
        patched.append((model.get_submodule(site.name), _linear if site.kind == "linear" else _embedding, packed, site))
    for module, apply, packed, site in patched:
        module.forward = apply(module, packed, site, view)
    for override in header.overrides:
        module = model.get_submodule(override.module)
        module.__dict__.setdefault("kept", {})[override.parameter] = getattr(module, override.parameter).data
        getattr(module, override.parameter).data = view(override.tensor)
    for tokens in header.tokens:
        module = model.get_submodule(tokens.module)
        module.forward = _with_tokens(module, module.forward, tokens.token_ids, view(tokens.rows))
        patched.append((module, None, None, None))
    try:
        yield header
    finally:
        for module, *_ in patched:
            module.__dict__.pop("forward", None)
        for override in header.overrides:
            module = model.get_submodule(override.module)
            getattr(module, override.parameter).data = module.kept[override.parameter]


def _linear(module: nn.Module, packed: PackedSite, site: Site, view):
    weight = view(packed.weight)
    if weight is None:
        weight = module.weight.T if site.transposed else module.weight  # [out, in]
    base_bias = module.bias if packed.base_bias is None else view(packed.base_bias)
    a, b, bias, magnitude = view(packed.a), view(packed.b), view(packed.bias), view(packed.magnitude)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, weight)
        if a is not None:
            y = y + packed.scale * (x @ a.T) @ b
        if magnitude is not None:
            y = y * magnitude / torch.linalg.norm(weight + packed.scale * (b.T @ a), dim=1)
        for shift in (base_bias, bias):
            y = y if shift is None else y + shift
        return y

    return forward


def _embedding(module: nn.Module, packed: PackedSite, site: Site, view):
    weight = module.weight if packed.weight is None else view(packed.weight)  # [rows, out]
    a, b = view(packed.a), view(packed.b)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        rows = weight[ids]
        if a is not None:
            rows = rows + packed.scale * a[ids] @ b
        return rows * getattr(module, "embed_scale", 1.0)

    return forward


def _with_tokens(module: nn.Module, base, token_ids: list[int], rows: torch.Tensor):
    def forward(x: torch.Tensor) -> torch.Tensor:
        y = base(x).clone()
        if isinstance(module, nn.Linear):
            y[..., token_ids] = x @ rows.T
            return y
        for token_id, row in zip(token_ids, rows, strict=True):
            y[x == token_id] = row * getattr(module, "embed_scale", 1.0)
        return y

    return forward


def rewrite_config(folder: Path, **changes) -> None:
    """Change fields of a saved adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
