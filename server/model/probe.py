"""One small forward pass that finds out what a model is made of: its attention layers, its sites, which of them are siblings.

Nothing is assumed from names. A linear is a site if it is called once, on every token in order; siblings are linears of one parent that
really got the same tensor; a module is replaceable if it treats each token by itself, which is tried by permuting them.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from server.model.attention import AttentionShape, attend
from server.model.quantization.linear import QuantizedLinear
from server.types import Site

NUM_TOKENS = 11  # a prime, so that no other dimension of a model is likely to be it
LINEARS = (nn.Linear, Conv1D, QuantizedLinear)
_ORDER = [3, 0, 10, 7, 1, 9, 2, 8, 6, 4, 5]


@dataclass(slots=True)
class _Call:
    name: str
    module: nn.Module
    input: torch.Tensor
    axis: int
    replaceable: bool


@dataclass(slots=True)
class Probe:
    """What the pass showed, in order of execution."""

    attention: list[tuple[nn.Module, AttentionShape]] = field(default_factory=list)
    groups: list[list[str]] = field(default_factory=list)  # names of sibling linears
    axes: dict[str, int] = field(default_factory=dict)  # replaceable module -> axis of its input that counts tokens


def _token_axis(tensor: object) -> int | None:
    if not isinstance(tensor, torch.Tensor):
        return None
    # [1, tokens, ..], [1, heads, tokens, ..] or [tokens, ..]
    for axis in (1, 2) if tensor.shape[:1] == (1,) else (0,):
        if axis < tensor.dim() and tensor.shape[axis] == NUM_TOKENS:
            return axis
    return None


def _acts_by_token(module: nn.Module, args: tuple, out: object, axis: int) -> bool:
    order = torch.tensor(_ORDER, device=args[0].device)
    try:
        permuted = module.forward(*(a.index_select(axis, order) if _token_axis(a) == axis else a for a in args))
    except Exception:  # a module that cannot take another order of its input is not one that acts on each token
        return False
    before, after = (x if isinstance(x, tuple) else (x,) for x in (out, permuted))
    if len(before) != len(after):
        return False
    for x, y in zip(before, after, strict=True):
        if not isinstance(x, torch.Tensor) or _token_axis(x) is None:
            return False
        if not torch.equal(x.index_select(_token_axis(x), order), y):
            return False
    return True


@torch.inference_mode()
def probe(model: nn.Module, decoder: nn.Module, embedding: nn.Module, head: nn.Module) -> Probe:
    """Run `decoder` once on NUM_TOKENS tokens and note what happened. ValueError if a layer's window is not told to the attention call."""
    found, calls, counts, handles = Probe(), [], {}, []
    names = {id(module): name for name, module in model.named_modules()}

    def attention_of(module: nn.Module):
        def call(q, k, v, scale, softcap, sinks, window):
            shape = AttentionShape(k.shape[1], k.shape[2], v.shape[2], window, q.shape[1], float(scale), softcap, sinks is not None)
            found.attention.append((module, shape))
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1).transpose(0, 1) for t in (k, v))
            position = torch.arange(len(q), device=q.device)
            seen = position <= position[:, None]
            head_sinks = None if sinks is None else sinks.view(-1, 1, 1)
            return attend(q.transpose(0, 1), k, v, seen, scale, softcap, head_sinks).transpose(0, 1)

        return call

    def on_call(module: nn.Module, args: tuple, out: object) -> None:
        name = names[id(module)]
        counts[name] = counts.get(name, 0) + 1
        axis = _token_axis(args[0]) if args else None
        if axis is not None and counts[name] == 1 and module not in (embedding, head):
            is_linear = isinstance(module, LINEARS)
            calls.append(_Call(name, module, args[0], axis, not is_linear and _acts_by_token(module, args, out, axis)))

    for module in model.modules():
        module.__dict__["manylora_attention"] = attention_of(module)
        is_leaf = next(module.parameters(recurse=False), None) is not None and next(module.children(), None) is None
        if is_leaf or isinstance(module, QuantizedLinear):
            handles.append(module.register_forward_hook(on_call))
    try:
        ids = torch.arange(NUM_TOKENS, device=embedding.weight.device)[None]
        decoder(inputs_embeds=embedding(ids), position_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            module.__dict__.pop("manylora_attention", None)
    _group(found, [call for call in calls if counts[call.name] == 1])
    return found


def _group(found: Probe, calls: list[_Call]) -> None:
    previous: _Call | None = None
    for call in calls:
        if call.replaceable:
            found.axes[call.name] = call.axis
        if not isinstance(call.module, LINEARS):
            continue
        sibling = (
            previous is not None
            and call.input is previous.input
            and call.name.rpartition(".")[0] == previous.name.rpartition(".")[0]
            and type(call.module) is type(previous.module) in (nn.Linear, QuantizedLinear)
            and (call.module.bias is None) == (previous.module.bias is None)
        )
        if sibling:
            found.groups[-1].append(call.name)
        else:
            found.groups.append([call.name])
        previous = call


def describe_site(name: str, module: nn.Module, group: int) -> Site:
    """The site that a module is."""
    if isinstance(module, nn.Embedding):
        return Site(name, "embedding", module.weight.shape[0], module.weight.shape[1], group=group)
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
        return Site(name, "linear", inputs, outputs, has_bias=True, transposed=True, group=group)
    return Site(name, "linear", module.in_features, module.out_features, has_bias=module.bias is not None, group=group)
