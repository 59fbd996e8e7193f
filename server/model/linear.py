"""The second seam: every linear that an adapter may target adds its rows' LoRA deltas; siblings that read one input run as one product.

Owns the patched `forward` of the modules. It does not know requests: which rows are whose comes from ForwardState,
what an adapter does at a group from DeviceAdapter.groups. Modules keep their place and class in Hugging Face's model; only `forward` of
the instance is replaced, so whatever linear a quantizer put there stays in use.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from server.kernels.grouped import GroupShape
from server.kernels.lora import add_delta
from server.model import operators
from server.model.forward import ForwardState, Segment, Slot
from server.model.product import Product

Compute = Callable[[], torch.Tensor]  # a group's product: [rows, sum of outs]
Accumulate = Callable[[torch.Tensor], None]  # adds it to y [rows, sum of outs], in place


class TileDeltas(Protocol):
    """What runs a group's product with the deltas of a step's tiles."""

    def around(self, x: torch.Tensor, shape: GroupShape, compute: Compute, accumulate: Accumulate | None) -> torch.Tensor:
        """x [rows, in] -> [rows, sum of outs]; exactly one of `compute` and, where there is one, `accumulate` is called, once."""

    def apart(self, x: torch.Tensor, shape: GroupShape, compute: Compute, *, goes_first: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The product and the deltas, two tensors [rows, sum of outs]; `goes_first`: the product is launched first. For steps without
        gains."""

    def gated(self, x: torch.Tensor, shape: GroupShape, compute: Compute) -> torch.Tensor:
        """silu(gate) * up of the product with its deltas: [rows, half of sum of outs]. For steps without gains, and tiles of every row."""

    def silu_mul(self, y: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of a whole product y [rows, sum of outs]: [rows, half of it]."""


class SiteGroup:
    """Linears that read the same tensor. Columns [start, stop) of the group's product belong to each."""

    def __init__(
        self,
        index: int,
        names: list[str],
        modules: list[nn.Module],
        outs: list[int],
        state: ForwardState,
        *,
        share_weight: bool = False,
    ) -> None:
        self.index, self.names, self.modules, self.state = index, names, modules, state
        self.slot = Slot()
        stops = [sum(outs[: i + 1]) for i in range(len(outs))]
        self.columns = [(stop - out, stop) for stop, out in zip(stops, outs, strict=True)]
        self._input: torch.Tensor | None = None
        self._result: torch.Tensor | None = None
        self.product = Product(modules, share_weight=share_weight)
        self.key: torch.Tensor | None = None
        self._deltas: TileDeltas | None = None
        for position, module in enumerate(modules):
            module.forward = self._forward_of(position)

    def _forward_of(self, position: int):
        if len(self.modules) == 1:
            return self.compute
        start, stop = self.columns[position]
        last = position == len(self.modules) - 1

        def forward(x: torch.Tensor) -> torch.Tensor:
            # The first sibling computes for all. A caller that passes another tensor simply gets a product of its own.
            if x is not self._input:
                self._input, self._result = x, self.compute(x)
            out = self._result[..., start:stop]
            if last:
                self._input = self._result = None
            return out

        return forward

    def use_operator(self, deltas: TileDeltas) -> None:
        """From now on compute in one opaque operator, which compiled layers do not look into; `deltas` runs the kernels."""
        self._deltas, self.key, self.slot = deltas, operators.new_key(self), self.state.slot_of(self.index, self.names)

    @cached_property
    def shape(self) -> GroupShape:
        """The group as the kernels know it."""
        return GroupShape(self.product.in_features, tuple(self.columns), self.index)

    def segments(self) -> list[Segment]:
        """The rows that this group's product has, by adapter."""
        return self.state.token_segments

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """The base's product with every row's delta: x [.., in] -> [.., sum of outs]."""
        if self.key is None:
            return self._add_deltas(self.product(x), x)
        if self.product.weight_of_all is None:
            return torch.ops.manylora.add_delta(self.product(x), x, self.key)
        if self.slot.apart:  # compiled, the sum is part of what reads it
            product, deltas = torch.ops.manylora.linear_apart(x, self.product.weight_of_all, self.product.bias_of_all, self.key)
            return product + deltas
        return torch.ops.manylora.linear(x, self.product.weight_of_all, self.product.bias_of_all, self.key)

    def call(self, first: torch.Tensor, second: torch.Tensor, *bias: torch.Tensor | None) -> torch.Tensor:
        """What the operators mean: linear(x, weight, bias) and add_delta(y, x)."""
        if self.state.tiles is None:
            return self._add_deltas(self.product.linear(first, second, *bias), first) if bias else self._add_deltas(first.clone(), second)
        if not self.state.touched >> self.index & 1:
            return self.product.linear(first, second, *bias) if bias else first.clone()
        if not bias:
            y, x = first.clone(), second
            self._deltas.around(x.reshape(-1, x.shape[-1]), self.shape, lambda: y.view(-1, y.shape[-1]), None)
            return y
        x = first.reshape(-1, first.shape[-1])  # [rows, in]

        def accumulate(y: torch.Tensor) -> None:
            torch.addmm(y, x, second.T, out=y)
            if bias[0] is not None:
                y += bias[0]

        y = self._deltas.around(
            x, self.shape, lambda: self.product.linear(x, second, *bias), None if self.product.is_quantized else accumulate
        )
        return y.view(*first.shape[:-1], -1)

    def call_apart(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """What the operator linear_apart means: the product and, beside it, its rows' deltas."""
        flat_x = x.reshape(-1, x.shape[-1])
        way = self.product.way(flat_x, weight, bias, shares_card=True)
        both = self._deltas.apart(
            flat_x,
            self.shape,
            lambda: self.product.linear(flat_x, weight, bias, shares_card=True),
            goes_first=way is not None and way.goes_first,
        )
        return tuple(y.view(*x.shape[:-1], -1) for y in both)

    def call_gated(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What the operator gated means: silu of the first site's columns times the second's, with deltas: [.., half of sum of outs]."""
        flat_x, state = x.reshape(-1, x.shape[-1]), self.state
        if state.tiles is not None and state.touched >> self.index & 1 and not state.has_gains and len(self.columns) == 2:
            out = self._deltas.gated(flat_x, self.shape, lambda: self.product.linear(flat_x, weight, bias))
        else:
            out = self._deltas.silu_mul(self.call(flat_x, weight, bias))
        return out.view(*x.shape[:-1], -1)

    def _add_deltas(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        segments = self.segments()
        if segments:
            flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
            for segment in segments:
                delta = segment.adapter.groups[self.index]
                if delta is not None:
                    add_delta(flat_y[segment.start : segment.stop], flat_x[segment.start : segment.stop], delta)
        return y


class HeadGroup(SiteGroup):
    """The output head: it sees only the rows whose logits are wanted, and an adapter may give it more columns (added tokens)."""

    def segments(self) -> list[Segment]:
        """Rows by adapter among those that reach the head."""
        return self.state.head_segments

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """x [.., in] -> logits [.., widest vocabulary of the batch]; columns beyond a row's own vocabulary mean nothing."""
        y = self.product(x)
        segments = self.segments()
        if not segments:
            return y
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        widest = max(segment.adapter.vocab_size for segment in segments)
        if widest > flat_y.shape[1]:
            flat_y = F.pad(flat_y, (0, widest - flat_y.shape[1]))
        for segment in segments:
            rows_x, rows_y = flat_x[segment.start : segment.stop], flat_y[segment.start : segment.stop]
            delta = segment.adapter.groups[self.index]
            if delta is not None:
                add_delta(rows_y, rows_x, delta)
            if segment.adapter.head_tokens is not None:
                ids, weight = segment.adapter.head_tokens
                rows_y[:, ids] = rows_x @ weight.T
        return flat_y.view(*y.shape[:-1], -1)
