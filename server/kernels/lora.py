"""LoRA deltas added to a packed product, in plain torch: the meaning that any faster kernel has to have, and the CPU's path.

It knows tensors alone. Rows of a batch are sorted by adapter, so that each adapter's rows are one slice; rows of the base are in none
and cost nothing. Called by model/linear.py for every group of sites.
"""

from typing import NamedTuple

import torch


class Part(NamedTuple):
    """What an adapter does to one site of a group: columns [start, stop) of the product, ranks [r_start, r_stop) of `a`.

    In this order: y = x @ weight.T (then only bias may follow); y *= gain; y += scale * h @ b; y += bias.
    """

    start: int
    stop: int
    r_start: int = 0
    r_stop: int = 0
    scale: float = 1.0
    b: torch.Tensor | None = None  # [rank, out]
    gain: torch.Tensor | None = None  # [out]
    bias: torch.Tensor | None = None  # [out]
    weight: torch.Tensor | None = None  # [out, in]


class GroupDelta(NamedTuple):
    """One adapter at one group of sites: all of the group's A matrices as one, then a part for each site that it touches."""

    a: torch.Tensor | None  # [sum of ranks, in]
    parts: tuple[Part, ...]


def add_delta(y: torch.Tensor, x: torch.Tensor, delta: GroupDelta) -> None:
    """y [rows, sum of outs] (the base's product, in place) and x [rows, in], both of one adapter's rows.

    Semantics, for each part p:  y[:, p] = gain_p * y[:, p] + scale_p * (x @ A_p.T) @ B_p + bias_p
    """
    h = x @ delta.a.T if delta.a is not None else None  # [rows, sum of ranks]
    for part in delta.parts:
        columns = y[:, part.start : part.stop]  # [rows, out]
        if part.weight is not None:
            torch.matmul(x, part.weight.T, out=columns) if columns.is_contiguous() else columns.copy_(x @ part.weight.T)
        if part.gain is not None:
            columns.mul_(part.gain)
        if part.b is not None:
            columns.addmm_(h[:, part.r_start : part.r_stop], part.b, alpha=part.scale)
        if part.bias is not None:
            columns.add_(part.bias)
