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


def fuse(delta: GroupDelta) -> GroupDelta:
    """The same delta with one part: the parts' B matrices side by side in [sum of ranks, outs], zeros elsewhere, their scales in them.

    More arithmetic and fewer calls: what a CPU wants, where a call costs as much as the few rows' product. A delta with anything but
    plain factors is returned as it is."""
    parts = delta.parts
    if len(parts) < 2 or any(p.b is None or p.gain is not None or p.bias is not None or p.weight is not None for p in parts):
        return delta
    start, stop = min(p.start for p in parts), max(p.stop for p in parts)
    b = delta.a.new_zeros(delta.a.shape[0], stop - start)  # [sum of ranks, outs]
    for p in parts:
        b[p.r_start : p.r_stop, p.start - start : p.stop - start] = p.b * p.scale
    return GroupDelta(delta.a, (Part(start, stop, 0, delta.a.shape[0], 1.0, b),))


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
            ranks = h if part.r_stop - part.r_start == h.shape[1] else h[:, part.r_start : part.r_stop]
            columns.addmm_(ranks, part.b, alpha=part.scale)
        if part.bias is not None:
            columns.add_(part.bias)
