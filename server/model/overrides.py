"""The fifth seam: what an adapter replaces rather than adds. The input embedding, and any module that acts on each token by itself.

Owns the patched `forward` of those modules. Which rows are whose comes from ForwardState, the replacements from DeviceAdapter.
"""

import copy

import torch
from torch import nn

from server.model.forward import ForwardState


def with_parameters(module: nn.Module, parameters: dict[str, torch.Tensor]) -> nn.Module:
    """A module that is `module` with some of its parameters replaced; everything else is shared, nothing is copied."""
    clone = copy.copy(module)
    clone.__dict__.pop("forward", None)  # the patched one belongs to the base's instance
    clone._parameters = dict(module._parameters)
    for name, tensor in parameters.items():
        clone._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    if isinstance(clone, nn.Embedding):
        clone.num_embeddings = clone.weight.shape[0]
    return clone


class EmbeddingSite:
    """The input embedding: LoRA on it, trained rows of it, or another one altogether, for each adapter's rows."""

    def __init__(self, module: nn.Embedding, state: ForwardState) -> None:
        self.module, self.state = module, state
        self._base = module.forward
        self._num_rows = module.weight.shape[0]
        # Gemma's embedding multiplies by sqrt(hidden); PEFT scales its delta by the same.
        scale = getattr(module, "embed_scale", None)
        self.scale = 1.0 if scale is None else float(scale)
        module.forward = self.forward

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [1, tokens] -> [1, tokens, hidden]. An id beyond the base's rows is an added token of its row's adapter."""
        segments = [s for s in self.state.token_segments if s.adapter.embedding is not None]
        if not segments:
            return self._base(ids)
        out = self._base(ids.clamp(max=self._num_rows - 1))
        for segment in segments:
            segment.adapter.embedding.apply(out[0, segment.start : segment.stop], ids[0, segment.start : segment.stop], self.scale)
        return out


class ReplacedModule:
    """A norm, router or the like that some adapter replaces: each such adapter's rows go through its own copy."""

    def __init__(self, name: str, module: nn.Module, axis: int, state: ForwardState) -> None:
        self.name, self.axis, self.state = name, axis, state
        self._module, self._base = module, module.forward

    def install(self) -> None:
        """Take the module's place."""
        self._module.forward = self.forward

    def uninstall(self) -> None:
        """Give the module its place back: compiled layers have seen it there, and would be compiled anew otherwise."""
        self._module.__dict__.pop("forward", None)

    def forward(self, *args, **kwargs):
        """As the base's, with the rows of adapters that replace this module computed again by their own."""
        out = self._base(*args, **kwargs)
        num_rows = args[0].shape[self.axis]
        for segment in self.state.token_segments:
            own = segment.adapter.modules.get(self.name)
            if own is not None:
                rows = (slice(None),) * self.axis + (slice(segment.start, segment.stop),)
                new = own(*(a[rows] if self._has_rows(a, num_rows) else a for a in args), **kwargs)
                out = _put(out, new, rows)
        return out

    def _has_rows(self, argument: object, num_rows: int) -> bool:
        """What the probe permuted: a tensor that has the batch's rows on the module's axis."""
        return isinstance(argument, torch.Tensor) and argument.dim() > self.axis and argument.shape[self.axis] == num_rows


def _put(out, new, rows: tuple[slice, ...]):
    if isinstance(out, tuple):
        return tuple(_put(o, n, rows) if isinstance(o, torch.Tensor) else o for o, n in zip(out, new, strict=True))
    out[rows] = new
    return out
