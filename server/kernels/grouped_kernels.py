"""The grouped LoRA kernels (grouped_programs.py) on tensors: shrink, expand, write, checked and launched with a card's choices.

Needs Triton: import it where there is a GPU (or Triton's interpreter). Called by model/ for every group; grouped.py says what it computes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from server.kernels.grouped import MAX_SITES, GroupShape, Tiles, check_rows
from server.kernels.grouped_programs import expand_kernel, shrink_kernel
from server.kernels.launch import Choice

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class Call(NamedTuple):
    """A kernel with all that it is launched with. A tile makes `per_tile` items, each a program's turn; `most` as of Choice's programs."""

    kernel: triton.JITFunction
    per_tile: int
    most: int
    args: tuple
    options: dict

    @property
    def num_programs(self) -> int:
        """Programs of the grid."""
        return _num_programs(self.args[8] * self.per_tile, self.most)

    def launch(self):
        """Run it on the current stream; Triton's compiled kernel."""
        return self.kernel[(self.num_programs,)](*self.args, **self.options)

    @property
    def constants(self) -> tuple:
        """The values of the kernel's parameters behind `args`, in their order."""
        return tuple(self.options[name] for name in self.kernel.arg_names[len(self.args) :])

    def compile(self):
        """Triton's compiled kernel, also into its disk cache, without a launch; tensors on the meta device will do."""
        return self.kernel.warmup(*self.args, grid=(self.num_programs,), **self.options)


def shrink_call(x: torch.Tensor, arena: torch.Tensor, shape: GroupShape, tiles: Tiles, scratch: torch.Tensor, choice: Choice) -> Call:
    """What `shrink` launches."""
    check_rows(x, shape.in_features, arena, tiles, scratch, choice.block_m, choice.split_k)
    num_tiles = tiles.tile_base.numel()
    return Call(
        shrink_kernel,
        choice.split_k,
        choice.shrink_programs,
        (x, arena, scratch, *tiles[:4], shape.index, num_tiles, scratch.shape[1], x.stride(0)),
        dict(
            K=shape.in_features, RANK_CAP=scratch.shape[2], SPLIT=choice.split_k, MANY=choice.many_tiles, BLOCK_M=tiles.block_m,
            BLOCK_K=choice.block_k, BLOCK_R=choice.shrink_block_r, num_warps=choice.shrink_warps, num_stages=choice.shrink_stages,
            **common_options(arena, shape, choice),
        ),
    )  # fmt: skip


def expand_call(
    y: torch.Tensor, arena: torch.Tensor, shape: GroupShape, tiles: Tiles, scratch: torch.Tensor, choice: Choice, fresh: bool = False
) -> Call:
    """What `expand` launches, or `write`."""
    check_rows(y, shape.out_features, arena, tiles, scratch, choice.block_m, choice.split_k)
    block_n, chunk, warps = choice.block_n, choice.chunk, choice.expand_warps
    if fresh:
        block_n, chunk, warps = choice.write_block_n, choice.write_chunk, choice.write_warps
    num_tiles, stops = tiles.tile_base.numel(), _stops(shape)
    chunks = sum(triton.cdiv(stop - start, block_n * chunk) for start, stop in shape.columns)
    return Call(
        expand_kernel,
        chunks,
        choice.expand_programs,
        (y, arena, scratch, *tiles[:4], shape.index, num_tiles, scratch.shape[1], y.stride(0), *stops, chunks),
        dict(
            RANK_CAP=scratch.shape[2], SPLIT=choice.split_k, MANY=choice.many_tiles, BLOCK_M=tiles.block_m, BLOCK_N=block_n,
            CHUNK=chunk, BLOCK_R=choice.expand_block_r, num_warps=warps, num_stages=choice.expand_stages,
            FRESH=fresh, **common_options(arena, shape, choice),
        ),
    )  # fmt: skip


def write_call(y: torch.Tensor, arena: torch.Tensor, shape: GroupShape, tiles: Tiles, scratch: torch.Tensor, choice: Choice) -> Call:
    """What `write` launches."""
    return expand_call(y, arena, shape, tiles, scratch, choice, fresh=True)


def shrink(x: torch.Tensor, arena: torch.Tensor, shape: GroupShape, tiles: Tiles, scratch: torch.Tensor, choice: Choice) -> None:
    """x [rows, in] times each row's A, into `scratch` [split_k, row_cap, rank_cap]. It needs no y: it may run beside the base's product.

    ValueError if types or shapes do not fit each other. Ranks beyond rank_cap are refused where descriptors are made (`describe`)."""
    launch_call(shrink_call, x, arena, shape, tiles, scratch, choice)


def expand(y: torch.Tensor, arena: torch.Tensor, shape: GroupShape, tiles: Tiles, scratch: torch.Tensor, choice: Choice) -> None:
    """The deltas of shrink's scratch added to y [rows, sum of outs], in place. ValueError as of `shrink`."""
    launch_call(expand_call, y, arena, shape, tiles, scratch, choice)


def write(y: torch.Tensor, arena: torch.Tensor, shape: GroupShape, tiles: Tiles, scratch: torch.Tensor, choice: Choice) -> None:
    """The deltas of shrink's scratch written to y [rows, sum of outs], whatever was there: nought where an adapter does nothing, and in
    the rows of ZERO tiles. Gains, which need the base's product, do not count. ValueError as of `shrink`."""
    launch_call(write_call, y, arena, shape, tiles, scratch, choice)


def apply_group(
    y: torch.Tensor, x: torch.Tensor, arena: torch.Tensor, shape: GroupShape, tiles: Tiles, scratch: torch.Tensor, choice: Choice
) -> None:
    """Every row's delta at one group, in two launches: y [rows, sum of outs] in place (rows may be strided), x [rows, in].

    Semantics: `apply_group_reference`, with float32 accumulation; products' operands have the arena's type. `scratch` may be shared by all
    groups of a model that run one after another; neither it nor unused tiles need to hold anything in particular."""
    shrink(x, arena, shape, tiles, scratch, choice)
    expand(y, arena, shape, tiles, scratch, choice)


class _Prepared(NamedTuple):
    """A kernel that Triton has compiled and launched before, and the constants that its launcher still wants."""

    compiled: Any
    constants: tuple
    per_tile: int
    most: int


_NUM_ARGS = 11  # of every kernel, before its constants and whatever tensor one has in addition
_prepared: dict[tuple, _Prepared] = {}


def launch_call(
    make_call: Callable[..., Call], rows: torch.Tensor, arena: torch.Tensor, shape: GroupShape, tiles: Tiles, scratch: torch.Tensor,
    choice: Choice, *out: torch.Tensor,
) -> None:  # fmt: skip
    """Launch what `make_call` of all this makes; by what was compiled before, where there is such."""
    # Triton's own way from a call to a launch binds and specializes some twenty arguments: 100 us a pair and more, 128 pairs a step. So
    # what was compiled for the same shapes, strides and alignment is launched directly; what differs otherwise is an argument.
    stride = rows.stride(0)
    key = (
        make_call,
        shape[:2],
        choice,
        arena.dtype,
        rows.device.index,
        scratch.shape[2],
        stride,
        *(one.data_ptr() % 16 for one in (rows, *out)),
    )
    prepared = _prepared.get(key)
    if prepared is None:
        call = make_call(rows, arena, shape, tiles, scratch, choice, *out)
        compiled = call.launch()
        if not triton.knobs.runtime.interpret:
            _prepared[key] = _Prepared(compiled, (*call.args[_NUM_ARGS + len(out) :], *call.constants), call.per_tile, call.most)
        return
    num_tiles = tiles.tile_base.numel()
    grid = (_num_programs(num_tiles * prepared.per_tile, prepared.most), 1, 1)
    prepared.compiled[grid](rows, arena, scratch, *tiles[:4], shape.index, num_tiles, scratch.shape[1], stride, *out, *prepared.constants)


def _stops(shape: GroupShape) -> list[int]:
    """Where the sites' columns end; an absent site is none wide."""
    stops = [stop for _, stop in shape.columns]
    return stops + stops[-1:] * (MAX_SITES - len(stops))


def _num_programs(items: int, most: int) -> int:
    """One program an item, or `most` that walk them: fewer to start for nothing where most of the capacity is unused."""
    return max(1, min(items, most) if most else items)


def common_options(arena: torch.Tensor, shape: GroupShape, choice: Choice) -> dict:
    """Options that depend on the arena's type and the card."""
    interpreted = triton.knobs.runtime.interpret
    # The interpreter multiplies bfloat16 as if it were integers.
    return {
        "DOT": tl.float32 if interpreted else _TYPES[arena.dtype],
        "ALIGNED": shape.aligned,
        "PDL": choice.pdl and not interpreted,
        **({"launch_pdl": True} if choice.pdl and not interpreted else {}),
    }
