"""LoRA deltas of many adapters at once: where an adapter's factors lie, how rows become tiles, and what the kernels mean.

It knows an arena (one tensor), byte-wise descriptors in it and the rows of a step; not who an adapter is or when it was loaded. No Triton
here: grouped_kernels.py has the kernels, launch.py their launch choices. Called by model/ (groups), the runner (tiles of a step) and tests.

An adapter is one run of the arena from `base` on, `base` counted in elements of the arena's type and 64 bytes aligned. It begins with its
descriptor, int64 [num_groups, DESC_WIDTH]; offsets in it are relative to `base`, in elements:
    [0] a: A [sum of ranks, in], the ranks of the group's sites in their order; -1: none     [1] num_ranks: sum of ranks
    [2 + 6 s] site s: r_start, r_stop (its rows of A), b: B [rank, out] or -1, scale: a float32's bits, gain, bias: [out] or -1
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from server.kernels.lora import GroupDelta, Part, add_delta

MAX_SITES = 4
SITE_WIDTH = 6
DESC_WIDTH = 2 + SITE_WIDTH * MAX_SITES
BASE_BYTES = 64  # an adapter's run begins at a multiple of this
RANK_CAP = 512  # the most ranks of one adapter at one group, unless a scratch of another width is given
NONE = -1
ZERO = -2  # base of a tile of the base model's rows, where every row must be written
KERNEL_TYPES = (torch.bfloat16, torch.float16, torch.float32)


class SiteEntry(NamedTuple):
    """What an adapter does to one site; as it is, nothing. Offsets are relative to the adapter's base, in elements; -1: not there."""

    r_start: int = 0
    r_stop: int = 0
    b: int = NONE
    scale: float = 1.0
    gain: int = NONE
    bias: int = NONE


class GroupShape(NamedTuple):
    """A group of sibling linears that read one input, as the model has it. `columns`: each site's (start, stop) in the packed product."""

    in_features: int
    columns: tuple[tuple[int, int], ...]
    index: int

    @property
    def out_features(self) -> int:
        """Columns of the packed product."""
        return self.columns[-1][1]

    @property
    def aligned(self) -> bool:
        """Whether rows of A, B and the product begin at multiples of 8 elements, so that loads can be vectors."""
        return self.in_features % 8 == 0 and all(start % 8 == 0 and stop % 8 == 0 for start, stop in self.columns)


class TileArrays(NamedTuple):
    """The tiles of a step as numpy arrays, as many as there are."""

    tile_base: np.ndarray  # int64 [tiles]
    tile_start: np.ndarray  # int32 [tiles]
    tile_len: np.ndarray  # int32 [tiles]
    row_ids: np.ndarray  # int32 [rows with an adapter]


class Tiles(NamedTuple):
    """The tiles of a step in buffers of a fixed capacity, refreshed in place; live tiles first, then -1 in `tile_base`.

    Tile t is rows row_ids[tile_start[t] : + tile_len[t]] of the batch, all of the adapter at tile_base[t]. Rows of the base are in none."""

    tile_base: torch.Tensor  # int64 [tile_cap]
    tile_start: torch.Tensor  # int32 [tile_cap]
    tile_len: torch.Tensor  # int32 [tile_cap]
    row_ids: torch.Tensor  # int32 [row_cap]
    block_m: int


def _numbers(site: SiteEntry) -> list[int]:
    scale = int(np.float32(site.scale).view(np.int32))
    return [site.r_start, site.r_stop, site.b, scale, site.gain, site.bias]


_NO_SITE = _numbers(SiteEntry())


def describe(a: int, num_ranks: int, sites: Sequence[SiteEntry], rank_cap: int = RANK_CAP) -> np.ndarray:
    """One group's row of an adapter's descriptor: int64 [DESC_WIDTH]. ValueError names what does not fit."""
    if len(sites) > MAX_SITES:
        raise ValueError(f"sites: a group has {len(sites)} sites; at most {MAX_SITES} are allowed")
    if not 0 <= num_ranks <= rank_cap or (a == NONE) != (num_ranks == 0):
        raise ValueError(f"num_ranks: {num_ranks} with a = {a}; allowed is 1 to {rank_cap}, or 0 with a = -1")
    row = [a, num_ranks]
    for index, site in enumerate(sites):
        if not 0 <= site.r_start <= site.r_stop <= num_ranks or (site.b == NONE) != (site.r_start == site.r_stop):
            raise ValueError(f"site {index}: ranks [{site.r_start}, {site.r_stop}) of {num_ranks} with b = {site.b}")
        row += _numbers(site)
    return np.array(row + _NO_SITE * (MAX_SITES - len(sites)), np.int64)


def tile_cap(num_rows: int, num_adapters: int, block_m: int) -> int:
    """The most tiles that `num_rows` rows of at most `num_adapters` adapters can make."""
    return min(num_rows, min(num_rows, num_adapters) + num_rows // block_m)


def make_tiles(adapter_base_of_row: np.ndarray, block_m: int) -> TileArrays:
    """Rows of a batch, each with its adapter's base (int64 [rows], -1: the base model), as tiles of up to `block_m` rows of one adapter.

    Rows are sorted by base and keep their order within one. Tiles of one adapter stand together, so that its factors are read from L2.
    Rows that say ZERO instead of -1 are in tiles too, the first ones: kernels that write every row write noughts there."""
    order = np.argsort(adapter_base_of_row, kind="stable")
    bases = adapter_base_of_row[order]
    num_base_rows = int(np.searchsorted(bases, 0)) if ZERO not in bases[:1] else 0
    order, bases = order[num_base_rows:], bases[num_base_rows:]
    starts = np.flatnonzero(np.diff(bases, prepend=NONE))  # [adapters]
    lens = np.diff(starts, append=len(bases))  # [adapters]
    tiles_of = -(-lens // block_m)  # [adapters]
    owner = np.repeat(np.arange(len(starts)), tiles_of)  # [tiles]
    first_tile = np.cumsum(tiles_of) - tiles_of  # [adapters]
    offset = (np.arange(len(owner)) - first_tile[owner]) * block_m  # [tiles]
    return TileArrays(
        tile_base=bases[starts][owner],
        tile_start=(starts[owner] + offset).astype(np.int32),
        tile_len=np.minimum(lens[owner] - offset, block_m).astype(np.int32),
        row_ids=order.astype(np.int32),
    )


def empty_tiles(num_tiles: int, num_rows: int, block_m: int, device: torch.device | str) -> Tiles:
    """Buffers for `num_tiles` tiles over `num_rows` rows, none of them live."""
    return Tiles(
        tile_base=torch.full((num_tiles,), NONE, dtype=torch.int64, device=device),
        tile_start=torch.zeros(num_tiles, dtype=torch.int32, device=device),
        tile_len=torch.zeros(num_tiles, dtype=torch.int32, device=device),
        row_ids=torch.zeros(num_rows, dtype=torch.int32, device=device),
        block_m=block_m,
    )


def fill_tiles(tiles: Tiles, arrays: TileArrays) -> None:
    """A step's tiles into its buffers, in place. ValueError if they do not fit.

    For tests and benchmarks: an engine copies from pinned memory, all of it at once."""
    for name in TileArrays._fields:
        source, target = getattr(arrays, name), getattr(tiles, name)
        if len(source) > len(target):
            raise ValueError(f"{name}: {len(source)} entries; the buffer holds {len(target)}")
        target[: len(source)] = torch.from_numpy(np.ascontiguousarray(source))
    tiles.tile_base[len(arrays.tile_base) :] = NONE


def new_scratch(split_k: int, row_cap: int, device: torch.device | str, rank_cap: int = RANK_CAP) -> torch.Tensor:
    """Room for the shrink's partial sums: float32 [split_k, row_cap, rank_cap]. Nobody has to zero it, ever."""
    return torch.empty(split_k, row_cap, rank_cap, dtype=torch.float32, device=device)


def apply_group_reference(
    y: torch.Tensor, x: torch.Tensor, arena: torch.Tensor, shape: GroupShape, tiles: Tiles, dtype: torch.dtype = torch.float32
) -> None:
    """The meaning of the kernels, tile by tile. y [rows, sum of outs] in place; x [rows, in]; computed in `dtype`.

    Semantics, for each row m of a tile, each site and each of its columns n:
        y[m, n] = gain[n] * y[m, n] + scale * sum_r (x[m] . A[r]) * B[r - r_start, n] + bias[n]
    """
    for base, start, length in zip(tiles.tile_base.tolist(), tiles.tile_start.tolist(), tiles.tile_len.tolist(), strict=True):
        if base in (NONE, ZERO):
            continue
        rows = tiles.row_ids[start : start + length].long()  # [rows of the tile]
        out = y[rows].to(dtype)  # [rows of the tile, sum of outs]
        add_delta(out, x[rows].to(dtype), read_group(arena, base, shape, dtype))
        y[rows] = out.to(y.dtype)


def read_group(arena: torch.Tensor, base: int, shape: GroupShape, dtype: torch.dtype) -> GroupDelta:
    """What the adapter at `base` does at a group, read back from the arena: copies in `dtype`."""
    desc_at = base + shape.index * DESC_WIDTH * 8 // arena.element_size()
    desc = arena[desc_at : desc_at + DESC_WIDTH * 8 // arena.element_size()].view(torch.int64).tolist()

    def factor(offset: int, *size: int) -> torch.Tensor | None:
        return None if offset == NONE else arena[base + offset :][: int(np.prod(size))].view(size).to(dtype)

    parts = []
    for index, (start, stop) in enumerate(shape.columns):
        r_start, r_stop, b, scale, gain, bias = desc[2 + SITE_WIDTH * index :][:SITE_WIDTH]
        out, real_scale = stop - start, float(np.int32(scale).view(np.float32))
        factors = factor(b, r_stop - r_start, out), factor(gain, out), factor(bias, out)
        parts.append(Part(start, stop, r_start, r_stop, real_scale, *factors))
    return GroupDelta(factor(desc[0], desc[1], shape.in_features), tuple(parts))


def check_rows(
    rows: torch.Tensor, width: int, arena: torch.Tensor, tiles: Tiles, scratch: torch.Tensor, block_m: int, split_k: int
) -> None:
    """ValueError if what the kernels are given does not fit together."""
    if arena.dtype not in KERNEL_TYPES or rows.dtype != arena.dtype:
        raise ValueError(
            f"rows are {rows.dtype} and the arena is {arena.dtype}; allowed is one of {[str(t) for t in KERNEL_TYPES]} for both"
        )
    if rows.ndim != 2 or rows.shape[1] != width or rows.stride(1) != 1:
        raise ValueError(f"rows have shape {list(rows.shape)} and strides {rows.stride()}; expected [rows, {width}] with adjacent columns")
    if tiles.block_m != block_m:
        raise ValueError(f"tiles of {tiles.block_m} rows with a choice for {block_m}")
    if scratch.dtype != torch.float32 or not scratch.is_contiguous():
        raise ValueError("scratch: contiguous float32 is expected")
    if scratch.shape[0] < split_k or scratch.shape[1] < tiles.row_ids.numel():
        raise ValueError(f"scratch {list(scratch.shape)} is too small for {split_k} parts of {tiles.row_ids.numel()} rows")
