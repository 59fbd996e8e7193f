"""Random adapters in a poisoned arena, and what their deltas are in float64 by the formula alone (not by what the arena says)."""

import os
from typing import NamedTuple

import numpy as np
import torch

from server.kernels.grouped import BASE_BYTES, DESC_WIDTH, NONE, GroupShape, SiteEntry, TileArrays, Tiles, describe, empty_tiles, fill_tiles
from server.kernels.launch import Choice

DEVICE = torch.device(os.environ.get("MANYLORA_TEST_DEVICE", "cpu"))
ON_CARD = DEVICE.type == "cuda"


class Site(NamedTuple):
    """An adapter's factors at one site, in the arena's type; None: not there."""

    a: torch.Tensor | None = None  # [rank, in]
    b: torch.Tensor | None = None  # [rank, out]
    scale: float = 1.0
    gain: torch.Tensor | None = None  # [out]
    bias: torch.Tensor | None = None  # [out]


def shape_of(in_features: int, outs: list[int], index: int = 0) -> GroupShape:
    stops = np.cumsum(outs).tolist()
    return GroupShape(in_features, tuple((stop - out, stop) for stop, out in zip(stops, outs, strict=True)), index)


def site(rank: int, in_features: int, out: int, dtype: torch.dtype, *, gain: bool = False, bias: bool = False, scale: float = 0.7) -> Site:
    """Random factors, of a size that makes x A B about as large as x."""
    a = torch.randn(rank, in_features, device=DEVICE).div(in_features**0.5).to(dtype) if rank else None
    b = torch.randn(rank, out, device=DEVICE).div(max(rank, 1) ** 0.5).to(dtype) if rank else None
    gain_vector = (0.5 + torch.rand(out, device=DEVICE)).to(dtype) if gain else None
    return Site(a, b, scale, gain_vector, torch.randn(out, device=DEVICE).to(dtype) if bias else None)


def pack(adapters: list[list[list[Site]]], dtype: torch.dtype, rank_cap: int) -> tuple[torch.Tensor, list[int]]:
    """adapters[i][group][site] -> (arena, each adapter's base in elements). All that nobody should read is NaN."""
    line = BASE_BYTES // dtype.itemsize
    runs, bases, at = [], [], 3 * line
    for groups in adapters:
        pieces: list[torch.Tensor] = []
        end = len(groups) * DESC_WIDTH * 8 // dtype.itemsize

        def place(tensor: torch.Tensor | None, pieces=pieces) -> int:
            nonlocal end
            if tensor is None:
                return NONE
            gap = 24 + (-end) % 8
            pieces.extend((torch.full((gap,), torch.nan, dtype=dtype, device=DEVICE), tensor.flatten()))
            offset, end = end + gap, end + gap + tensor.numel()
            return offset

        rows = []
        for sites in groups:
            ranks = [0 if s.a is None else len(s.a) for s in sites]
            stops = np.cumsum(ranks).tolist()
            a = place(torch.cat([s.a for s in sites if s.a is not None]) if any(ranks) else None)
            entries = [
                SiteEntry(stop - rank, stop, place(s.b), s.scale, place(s.gain), place(s.bias))
                for s, rank, stop in zip(sites, ranks, stops, strict=True)
            ]
            rows.append(describe(a, sum(ranks), entries, rank_cap))
        header = torch.from_numpy(np.stack(rows)).flatten().view(dtype).to(DEVICE)
        run = torch.cat([header, *pieces, torch.full(((-end) % line + line,), torch.nan, dtype=dtype, device=DEVICE)])
        runs.append(run)
        bases.append(at)
        at += len(run)
    return torch.cat([torch.full((3 * line,), torch.nan, dtype=dtype, device=DEVICE), *runs]), bases


def expected(y: torch.Tensor, x: torch.Tensor, adapter_of_row: list[int], adapters: list, shape: GroupShape) -> torch.Tensor:
    """The formula in float64, row by row of an adapter at a time; adapter -1 is the base."""
    y = y.double()
    for adapter in set(adapter_of_row) - {-1}:
        rows = torch.tensor([i for i, a in enumerate(adapter_of_row) if a == adapter], device=y.device)
        for (start, stop), s in zip(shape.columns, adapters[adapter][shape.index], strict=True):
            part = y[rows, start:stop]
            if s.gain is not None:
                part = part * s.gain.double()
            if s.a is not None:
                part = part + s.scale * (x[rows].double() @ s.a.double().T @ s.b.double())
            if s.bias is not None:
                part = part + s.bias.double()
            y[rows, start:stop] = part
    return y


def buffers(arrays: TileArrays, block_m: int, *, spare_tiles: int = 0, spare_rows: int = 0) -> Tiles:
    """The step's tiles in buffers of their own, whose unused entries hold what would hurt."""
    tiles = empty_tiles(len(arrays.tile_base) + spare_tiles, len(arrays.row_ids) + spare_rows, block_m, DEVICE)
    for tensor in tiles[1:4]:
        tensor.fill_(1 << 20)
    fill_tiles(tiles, arrays)
    return tiles


def small_choice(**changes) -> Choice:
    """Blocks as small as they can be, so that small shapes have many of them."""
    small = Choice(16, 3, 0, 32, 16, 4, 2, 5, 16, 3, 16, 4, 2, 7, 32, 2, 4, 16, 2, 4, pdl=False)
    return small._replace(**changes)
