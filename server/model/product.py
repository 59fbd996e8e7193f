"""How the base's products are computed: one weight for linears that read the same input, in the layout that the device is fastest with.

On a GPU that is the plain weight. On a CPU it is oneDNN's own blocked layout, through the operators that torch's inductor uses for frozen
weights: 2.8 to 3.9 times MKL's speed at 1 to 64 rows on the machine of benchmarks/LOG.md. The plain copy is given up there, so nothing is
held twice. Quantized linears are one product likewise. Anything else (a subclass with a forward of its own) computes as it always did.
"""

import logging
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from server.model.fastest import Way, is_aligned
from server.model.quantization.linear import QuantizedLinear, QuantizedProduct

log = logging.getLogger(__name__)

_PLAIN = (nn.Linear, Conv1D)
_BLOCKED_DTYPES = (torch.float32, torch.bfloat16)


class Product:
    """x [.., in] -> [.., sum of outs] of some linears. `weight(i)` is the i-th one's weight [out, in], made anew if need be."""

    def __init__(self, modules: list[nn.Module], *, share_weight: bool = False) -> None:
        """Take over the modules' weights. `share_weight`: somebody else reads the same tensor (a tied embedding), so it stays.

        ValueError if several modules are given that are not plain linears."""
        self._modules = modules
        self._blocked: torch.Tensor | None = None
        self._quantized: QuantizedProduct | None = None
        # The plain weight of all [sum of outs, in] and their bias; None where something else than `linear` of them computes.
        self.weight_of_all: torch.Tensor | None = None
        self.bias_of_all: torch.Tensor | None = None
        # By number of rows, what is faster than torch's own, where a plain weight has no bias: alone, and beside deltas.
        self.ways: Mapping[int, Way] = {}
        self.ways_beside: Mapping[int, Way] = {}
        self.in_features = modules[0].weight.shape[0] if isinstance(modules[0], Conv1D) else modules[0].in_features
        if all(isinstance(module, QuantizedLinear) for module in modules):
            self._use_quantized()
            return
        if any(type(module) not in _PLAIN for module in modules):
            if len(modules) > 1:
                raise ValueError("only plain linears can be one product")
            self._compute: Callable[[torch.Tensor], torch.Tensor] = modules[0].forward
            return
        weights = [_dense(module) for module in modules]  # [out, in] each
        self._bounds = [0]
        for weight in weights:
            self._bounds.append(self._bounds[-1] + weight.shape[0])
        bias = None if modules[0].bias is None else torch.cat([module.bias.data for module in modules])
        if _can_block(weights[0]):
            self._use_blocked(torch.cat(weights) if len(weights) > 1 else weights[0], bias, share_weight)
        elif len(modules) > 1:
            self._use_shared(torch.cat(weights), bias)
        else:
            self.weight_of_all, self.bias_of_all = weights[0], bias
            self._compute = modules[0].forward

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._compute(x)

    @property
    def is_quantized(self) -> bool:
        """Whether only `linear` can multiply: `weight_of_all` says the shape alone."""
        return self._quantized is not None

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, shares_card: bool = False) -> torch.Tensor:
        """The product, where `weight_of_all` and `bias_of_all` were handed through an operator. `shares_card`: deltas are computed at the
        same time."""
        if self._quantized is not None:
            return self._quantized(x)
        way = self.way(x, weight, bias, shares_card=shares_card)
        return F.linear(x, weight, bias) if way is None else way.gemm(x, weight)

    def way(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, shares_card: bool) -> Way | None:
        """How `linear` will compute it; None: as torch or a quantized product does."""
        way = (self.ways_beside if shares_card else self.ways).get(x.numel() // x.shape[-1])
        return None if way is None or bias is not None or not is_aligned(x) or not is_aligned(weight) else way

    def weight(self, index: int) -> torch.Tensor:
        """The weight of one of the linears: [out, in]; of a quantized one what its codes stand for, in float32."""
        if self._quantized is not None:
            return self._quantized.dense(index)
        if self._blocked is None:
            return _dense(self._modules[index])
        return self._blocked.to_dense()[self._bounds[index] : self._bounds[index + 1]]

    @property
    def own_bytes(self) -> int:
        """Bytes of a weight that is no parameter of any module: a quantized one's, or oneDNN's copy."""
        if self._quantized is not None:
            return sum(weight.num_bytes for weight in self._quantized.weights)
        return 0 if self._blocked is None else self._bounds[-1] * self.in_features * self._blocked.dtype.itemsize

    def warm_up(self, max_rows: int, dtype: torch.dtype, seen: set[tuple]) -> None:
        """Have what a quantized product of up to so many rows needs compiled; of a plain one nothing is."""
        if self._quantized is not None:
            self._quantized.warm_up(max_rows, dtype, seen)

    def _use_quantized(self) -> None:
        weights = [module.quantized for module in self._modules]
        bias = None if self._modules[0].bias is None else torch.cat([module.bias.data for module in self._modules])
        self._compute = self._quantized = QuantizedProduct(weights, bias)
        for module in self._modules:
            module.quantized = None  # nothing is held twice
        # Nothing in it: who asks the operator for the shape of its result asks this for its number of rows.
        self.weight_of_all = torch.empty(self._quantized.out_features, 0, device=weights[0].data.device)
        self.bias_of_all = bias

    def _use_shared(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """One weight for all; the modules' own parameters become views of it."""
        for index, module in enumerate(self._modules):
            rows = slice(self._bounds[index], self._bounds[index + 1])
            module.weight.data = weight[rows]
            if bias is not None:
                module.bias.data = bias[rows]
        self.weight_of_all, self.bias_of_all = weight, bias
        self._compute = lambda x: F.linear(x, weight, bias)

    def _use_blocked(self, weight: torch.Tensor, bias: torch.Tensor | None, share_weight: bool) -> None:
        blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._blocked = blocked
        if not share_weight:
            for module in self._modules:
                # Same shape and type, no memory; whoever should read it after all gets what cannot be overlooked.
                nothing = torch.full((1, 1), torch.nan, dtype=weight.dtype)
                module.weight.data = nothing.expand(module.weight.shape)
        linear = torch.ops.mkldnn._linear_pointwise

        def compute(x: torch.Tensor) -> torch.Tensor:
            y = linear(x.reshape(-1, x.shape[-1]), blocked, bias, "none", [], "")
            return y.view(*x.shape[:-1], y.shape[-1])

        self._compute = compute


def _dense(module: nn.Module) -> torch.Tensor:
    """A plain linear's weight: [out, in]."""
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


_works: dict[torch.dtype, bool] = {}


def _can_block(weight: torch.Tensor) -> bool:
    """Whether oneDNN's operators are there and right, tried once a type on a small product."""
    if weight.device.type != "cpu" or weight.dtype not in _BLOCKED_DTYPES or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype not in _works:
        try:
            x, w = torch.randn(5, 48, dtype=weight.dtype), torch.randn(33, 48, dtype=weight.dtype)
            y = torch.ops.mkldnn._linear_pointwise(x, torch.ops.mkldnn._reorder_linear_weight(w, None), None, "none", [], "")
            exact = x.double() @ w.double().T
            _works[weight.dtype] = bool((y.double() - exact).abs().max() <= 4 * torch.finfo(weight.dtype).eps * 48)
        except (AttributeError, RuntimeError, NotImplementedError) as error:
            log.info("oneDNN's linear is not used for %s (%s)", weight.dtype, type(error).__name__)
            _works[weight.dtype] = False
    return _works[weight.dtype]
