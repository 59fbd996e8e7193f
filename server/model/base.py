"""The base model as the engine runs it: Hugging Face's module with the seams in place, in three parts (embed, decode, head).

Owns the module, the patched sites, the cache of keys and values, and the layout that adapters are packed for. It does not know requests.
The three parts are split so that a step capture holds the decoder alone: embeddings in, hidden states out.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import msgspec
import torch
from torch import nn

from server.kernels.grouped import GroupShape
from server.model import operators
from server.model.adapter import AdapterPlacer, DeviceAdapter, HostAdapter
from server.model.attention import AttentionShape, PagedAttention
from server.model.flashinfer import FlashInferAttention
from server.model.forward import ForwardState
from server.model.fusion import FuseActivations
from server.model.layers import KeysWritten, Layers
from server.model.linear import HeadGroup, SiteGroup, TileDeltas
from server.model.overrides import EmbeddingSite, ReplacedModule
from server.model.probe import LINEARS, Probe, describe_site, probe
from server.model.quantization.linear import QuantizedLinear
from server.types import BaseLayout, Module, Site

Attention = PagedAttention | FlashInferAttention
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _hash_weight(weight: torch.Tensor) -> str:
    """sha256 of a weight's bytes, as adapters.parts.hash_weight has it."""
    return hashlib.sha256(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


def _kind(module: nn.Module) -> tuple[str, dict[str, list[int]]]:
    """A module's class and the shapes of its own parameters; of a quantized linear those of the linear that it stands for."""
    if isinstance(module, QuantizedLinear):
        return "Linear", module.parameter_shapes
    return type(module).__name__, {name: list(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}


class _ComputedDecoder(nn.Module):
    """Stands in the decoder's place while the head runs: whatever is asked of it, its hidden states are already there."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.last_hidden_state = hidden

    @property
    def decoder(self) -> "_ComputedDecoder":
        return self

    def forward(self, *args, **kwargs):
        return _DecoderOutput(self.last_hidden_state)


class _DecoderOutput(SimpleNamespace):
    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__(last_hidden_state=hidden)

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None  # caches, attentions, router logits: nobody asked for them


def _check_windows(config, found: Probe) -> None:
    """Refuse a model that hides part of the past in its masks alone: those never reach the paged cache."""
    windows = [shape.window for _, shape in found.attention]
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        window = getattr(config, "sliding_window", None)
        if window is not None and getattr(config, "use_sliding_window", True) and not any(windows):
            raise ValueError(f"'{config.model_type}' has sliding_window {window} but does not pass it to its attention function")
        return
    if len(kinds) != len(windows):
        raise ValueError(f"'{config.model_type}' has {len(kinds)} layer_types and {len(windows)} attention layers")
    for layer, (kind, window) in enumerate(zip(kinds, windows, strict=True)):
        if kind not in ("full_attention", "sliding_attention") or (kind == "sliding_attention") != (window is not None):
            raise ValueError(f"'{config.model_type}' layer {layer}: attention of kind '{kind}' called with window {window}")


class AttentionSeam:
    """One attention layer, as operators.attend calls it."""

    def __init__(self, base: "BaseModel", index: int, shape: AttentionShape) -> None:
        self._base, self._index, self._shape = base, index, shape

    def call(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        """q [tokens, heads, key_dim], k and v [tokens, kv_heads, dim] -> [tokens, heads, value_dim]."""
        self._base.stop_at_keys(self._index, k, v)
        return self._base.attention.run(self._index, q, k, v, self._shape.scale, self._shape.softcap, sinks)


class BaseModel:
    """A causal language model of transformers, patched. ValueError where it is built in a way that the seams cannot serve."""

    def __init__(self, model: nn.Module, revision: str = "") -> None:
        self.model, self.config, self.revision = model.eval().requires_grad_(False), model.config, revision
        self.state = ForwardState()
        self.embedding_module: nn.Embedding = model.get_input_embeddings()
        self.head_module: nn.Module = model.get_output_embeddings()
        self._decoder_name = model.base_model_prefix
        self.decoder: nn.Module = getattr(model, self._decoder_name)
        self.device, self.dtype = self.embedding_module.weight.device, self.embedding_module.weight.dtype
        self._modules = dict(model.named_modules())
        self._names = {id(module): name for name, module in self._modules.items()}
        found = probe(model, self.decoder, self.embedding_module, self.head_module)
        _check_windows(model.config, found)
        self._attention_layers = found.attention
        self.layers = Layers(self._modules, [(self._names[id(module)], shape) for module, shape in found.attention], self.state)
        self.compiles = False
        self._axes = found.axes
        self._replaced: dict[str, ReplacedModule] = {}
        self._replaces_apart = False
        self.attention: Attention | None = None
        hashes = {name: _hash_weight(self._modules[name].weight) for name in self._tied_names()}
        self.groups, sites = self._patch(found)
        self._embedding = EmbeddingSite(self.embedding_module, self.state)
        self.layout = self._describe(sites, hashes)
        self._placer = AdapterPlacer(self.groups, self.layout, self._modules, self.device, self._replace)

    @property
    def attention_shapes(self):
        """Each attention layer's shape, in order."""
        return [shape for _, shape in self._attention_layers]

    @property
    def placer(self) -> AdapterPlacer:
        """What builds an adapter's views."""
        return self._placer

    @property
    def group_shapes(self) -> list[GroupShape]:
        """The decoder's groups as kernels.grouped knows them, by index."""
        return [group.shape for group in self.groups if not isinstance(group, HeadGroup)]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the base's weights on its device."""
        held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in self.model.parameters()}
        return sum(held.values()) + sum(group.product.own_bytes for group in self.groups)

    @torch.inference_mode()
    def warm_up(self, max_rows: int) -> None:
        """Have the kernels of quantized products compiled: the first step that needs one would stop everybody for seconds."""
        seen: set[tuple] = set()
        for group in self.groups:
            group.product.warm_up(max_rows, self.dtype, seen)

    def attach_cache(self, num_blocks: int, block_size: int, kv_dtype: torch.dtype) -> None:
        """Allocate the keys' and values' blocks and connect every attention layer to them."""
        self.attach_attention(PagedAttention.allocate(self.attention_shapes, num_blocks, block_size, kv_dtype, self.device))

    def attach_attention(self, attention: Attention) -> None:
        """Connect every attention layer to keys and values that lie somewhere."""
        self.attention = attention
        for index, (module, shape) in enumerate(self._attention_layers):
            module.__dict__["manylora_attention"] = partial(self._attend, index, shape.window)

    def use_operators(self, deltas: TileDeltas, *, compile_layers: bool) -> None:
        """Run attention and the decoder's groups as opaque operators, and each decoder layer compiled by itself, if they are alike."""
        for group in self.groups:
            if not isinstance(group, HeadGroup):
                group.use_operator(deltas)
        self._seams = [AttentionSeam(self, index, shape) for index, (_, shape) in enumerate(self._attention_layers)]
        for seam, (module, _) in zip(self._seams, self._attention_layers, strict=True):
            module.manylora_key = operators.new_key(seam)
        for replaced in self._replaced.values():
            replaced.uninstall()
        self._replaces_apart = True
        passes = {"pre_grad_custom_pass": FuseActivations()}
        for layer in self.layers.modules if compile_layers else ():
            layer.compile(dynamic=True, options=passes)
        self.compiles = compile_layers

    @contextmanager
    def replacements(self) -> Iterator[None]:
        """While inside, modules that some adapter replaces look at whose rows they get, and nothing is compiled."""
        for replaced in self._replaced.values() if self._replaces_apart else ():
            replaced.install()
        try:
            with torch.compiler.set_stance("force_eager") if self._replaces_apart else nullcontext():
                yield
        finally:
            for replaced in self._replaced.values() if self._replaces_apart else ():
                replaced.uninstall()

    def _attend(self, layer: int, window: int | None, q, k, v, scale, softcap, sinks, told_window):
        if told_window != window:
            raise RuntimeError(f"attention layer {layer} was probed with window {window} and is called with {told_window}")
        self.stop_at_keys(layer, k, v)
        return self.attention.run(layer, q, k, v, scale, softcap, sinks)

    def stop_at_keys(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """KeysWritten if the pass is to end once k and v [tokens, kv_heads, dim] of this layer are in the cache."""
        if self.state.stops_at_keys:
            self.attention.write(layer, k, v)
            raise KeysWritten

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [tokens] -> [tokens, hidden]."""
        return self.embedding_module(ids[None])[0]

    def decode(self, embeddings: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """embeddings [tokens, hidden] at positions [tokens] -> hidden states [tokens, hidden], of wanted rows if the state narrows."""
        with nullcontext() if self.state.narrow is None else self.layers.narrowing():
            return self.decoder(inputs_embeds=embeddings[None], position_ids=positions[None], use_cache=False)[0][0]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [rows, hidden] -> logits [rows, vocabulary]: the model's own forward, so that its scaling and soft caps hold."""
        self.model._modules[self._decoder_name] = _ComputedDecoder(hidden[None])
        try:
            return self.model(input_ids=None, inputs_embeds=hidden[None], use_cache=False).logits[0]
        finally:
            self.model._modules[self._decoder_name] = self.decoder

    @torch.inference_mode()
    def place(self, host: HostAdapter) -> DeviceAdapter:
        """Put an adapter on the model's device."""
        return self._placer.place(host)

    def _replace(self, name: str) -> None:
        """From now on this module looks at whose rows it gets; until some adapter replaces it, it costs nothing."""
        if name not in self._replaced:
            self._replaced[name] = ReplacedModule(name, self._modules[name], self._axes[name], self.state)
            if not self._replaces_apart:
                self._replaced[name].install()

    def _patch(self, found: Probe) -> tuple[list[SiteGroup], list[Site]]:
        groups, sites = [], []
        embedding_name = self._names[id(self.embedding_module)]
        sites.append(describe_site(embedding_name, self.embedding_module, -1))
        for index, names in enumerate(found.groups):
            members = [self._modules[name] for name in names]
            described = [describe_site(name, module, index) for name, module in zip(names, members, strict=True)]
            groups.append(SiteGroup(index, names, members, [site.out_features for site in described], self.state))
            sites.extend(described)
        if isinstance(self.head_module, LINEARS):
            site = describe_site(self._names[id(self.head_module)], self.head_module, len(groups))
            groups.append(
                HeadGroup(len(groups), [site.name], [self.head_module], [site.out_features], self.state, share_weight=self._is_tied)
            )
            sites.append(site)
        return groups, sites

    def _tied_names(self) -> list[str]:
        """The embedding and the head: what PEFT may save a second time although nothing changed it. Of a quantized head nobody can say."""
        modules = [module for module in (self.embedding_module, self.head_module) if not isinstance(module, QuantizedLinear)]
        return [self._names[id(module)] for module in modules]

    @property
    def _is_tied(self) -> bool:
        return not isinstance(self.head_module, QuantizedLinear) and self.head_module.weight is self.embedding_module.weight

    def _describe(self, sites: list[Site], weight_hashes: dict[str, str]) -> BaseLayout:
        site_names = {site.name for site in sites}
        modules = [
            Module(
                name,
                *_kind(module),
                replaceable=name in site_names or name in self._axes,
            )
            for name, module in self._modules.items()
            if name
        ]
        layout = BaseLayout(
            fingerprint="",
            model_type=self.config.model_type,
            num_layers=len(self._attention_layers),
            vocab_size=self.embedding_module.weight.shape[0],
            hidden_size=self.embedding_module.weight.shape[1],
            tied_head=self._is_tied,
            embedding=self._names[id(self.embedding_module)],
            head=self._names[id(self.head_module)],
            dtype=DTYPE_NAMES[self.dtype],
            sites=sites,
            modules=modules,
            weight_hashes=weight_hashes,
        )
        digest = hashlib.sha256(msgspec.msgpack.encode(layout)).hexdigest()[:32]
        return msgspec.structs.replace(layout, fingerprint=digest)
