"""How the LoRA kernels are launched: one table a card, and the choice for a group out of it. Plain numbers, no tensors, no Triton.

Called by model/ once a group and batch size, before anything is captured. `benchmarks/gpu_kernels.py` measures the choices.
"""

from typing import NamedTuple

from server.kernels.grouped import GroupShape


class Card(NamedTuple):
    """What the choices depend on. `pdl`: programmatic dependent launch, so that expand begins while the shrink ends."""

    name: str
    num_sms: int
    bytes_per_s: float
    pdl: bool


class Choice(NamedTuple):
    """A launch of one group's pair of kernels. `*_programs`: the most programs of a grid, which walk the tiles; 0: one an item."""

    block_m: int  # rows of a tile; the same for every group of a step
    split_k: int  # parts of K, and planes of the scratch
    many_tiles: int  # where more tiles than this are live, K is cut into half as many parts; 0: nowhere
    block_k: int
    shrink_block_r: int
    shrink_warps: int
    shrink_stages: int
    shrink_programs: int
    block_n: int
    chunk: int  # blocks of columns that one program expands, one after another
    expand_block_r: int
    expand_warps: int
    expand_stages: int
    expand_programs: int
    write_block_n: int  # of an expand that writes and does not read
    write_chunk: int
    write_warps: int
    gate_block_n: int  # of the activation that adds gate's and up's deltas
    gate_chunk: int
    gate_warps: int
    pdl: bool


class Line(NamedTuple):
    """A line of a card's table: up to `max_rows` rows a step. `waves`: programs of a grid, in multiples of the card's SMs."""

    max_rows: int
    block_m: int
    split_k: int
    block_k: int
    block_n: int
    chunk_n: int  # columns that one program expands; twice as many where a site is wider than 8192
    shrink_warps: int
    shrink_stages: int
    expand_warps: int
    waves: int
    write_block_n: int
    write_chunk_n: int
    write_warps: int
    gate_block_n: int
    gate_chunk_n: int
    gate_warps: int
    many_tiles: int = 0


# Products are chosen beside deltas that are launched so, and the choices are kept: raise model/fastest.py's _VERSION with a change here.
_ANY = 1 << 30
_LONG_K = 8192
_TABLES: dict[str, tuple[Line, ...]] = {
    # Few rows: as many programs as can be, since each reads little. Many rows: the same factors serve 64 rows at once.
    "hopper": (
        Line(8, 16, 8, 256, 128, 128, 4, 4, 4, 0, 128, 128, 4, 32, 128, 4),
        Line(1024, 16, 8, 256, 128, 512, 4, 3, 4, 8, 128, 512, 4, 32, 128, 4, many_tiles=20),
        Line(_ANY, 64, 2, 256, 128, 512, 4, 3, 8, 16, 256, 1024, 4, 64, 512, 4),
    ),
    # A projection, measured by nobody yet. 300 GB/s times a latency of 0.8 us is 240 KB in flight, 4 KB an SM, so half of Hopper's
    # split fills the card; 100 KB of shared memory an SM hold three programs of 3 x (16 + 64) x 64 elements; no PDL before sm_90.
    "ada": (
        Line(8, 16, 8, 128, 128, 128, 4, 3, 4, 0, 128, 128, 4, 32, 128, 4),
        Line(512, 16, 4, 128, 128, 512, 4, 3, 4, 8, 128, 512, 4, 32, 128, 4),
        Line(_ANY, 64, 1, 64, 128, 512, 4, 3, 4, 8, 128, 512, 4, 32, 256, 4),
    ),
    # Anything else with Triton: Ada's row, whose needs any card since Ampere meets.
    "generic": (
        Line(8, 16, 8, 128, 128, 128, 4, 3, 4, 0, 128, 128, 4, 32, 128, 4),
        Line(512, 16, 4, 128, 128, 512, 4, 3, 4, 8, 128, 512, 4, 32, 128, 4),
        Line(_ANY, 64, 1, 64, 128, 512, 4, 3, 4, 8, 128, 512, 4, 32, 256, 4),
    ),
}


def card_of(capability: tuple[int, int], num_sms: int) -> Card:
    """The card by CUDA's compute capability and its number of SMs."""
    if capability == (9, 0):
        return Card("hopper", num_sms, 3.0e12, pdl=True)
    if capability == (8, 9):
        return Card("ada", num_sms, 300e9, pdl=False)
    return Card("generic", num_sms, 300e9, pdl=False)


def block_m_of(card: Card, num_rows: int) -> int:
    """Rows of a tile in a step of up to `num_rows` rows: the same for every group, since all share the step's tiles."""
    return line_of(card, num_rows).block_m


def max_split_k(card: Card, num_rows: int) -> int:
    """Planes that a scratch for steps of up to `num_rows` rows needs, whatever the group."""
    return line_of(card, num_rows).split_k


def choose(card: Card, num_rows: int, shape: GroupShape, item_bytes: int = 2) -> Choice:
    """The launch for a group in a step of up to `num_rows` rows, of numbers of `item_bytes`."""
    row = line_of(card, num_rows)
    split_k, block_k = _cut(shape.in_features, row.split_k, row.block_k * 2 // item_bytes)
    widest = max(stop - start for start, stop in shape.columns)

    def columns(block_n: int, chunk_n: int) -> tuple[int, int]:
        """(columns of a block, blocks of a chunk) in a group of this width."""
        block_n = min(block_n, max(16, _power_of_two(widest)))
        chunk_n *= 2 if widest > 8192 and chunk_n == 512 else 1
        return block_n, max(1, min(chunk_n, _power_of_two(widest)) // block_n)

    block_n, chunk = columns(row.block_n, row.chunk_n)
    write_block_n, write_chunk = columns(row.write_block_n, row.write_chunk_n)
    gate_block_n, gate_chunk = columns(row.gate_block_n, row.gate_chunk_n)
    return Choice(
        block_m=row.block_m,
        split_k=split_k,
        # A short K has few parts already, and a long one is worth its own.
        many_tiles=row.many_tiles if split_k == row.split_k and shape.in_features <= _LONG_K else 0,
        block_k=block_k,
        # Rank 16 at each of the group's sites in one go; more ranks are a loop.
        shrink_block_r={1: 16, 2: 32}.get(len(shape.columns), 64),
        shrink_warps=row.shrink_warps,
        shrink_stages=row.shrink_stages,
        shrink_programs=card.num_sms * row.waves,
        block_n=block_n,
        chunk=chunk,
        expand_block_r=16,
        expand_warps=row.expand_warps,
        expand_stages=1,
        expand_programs=card.num_sms * row.waves,
        write_block_n=write_block_n,
        write_chunk=write_chunk,
        write_warps=row.write_warps,
        gate_block_n=gate_block_n,
        gate_chunk=gate_chunk,
        gate_warps=row.gate_warps,
        pdl=card.pdl,
    )


def line_of(card: Card, num_rows: int) -> Line:
    """The line of the card's table for a step of up to `num_rows` rows."""
    return next(row for row in _TABLES[card.name] if num_rows <= row.max_rows)


def _cut(in_features: int, split_k: int, block_k: int) -> tuple[int, int]:
    """(split_k, block_k): both at most what was asked for and, where it can be, such that no part of K is ragged."""
    block_k = min(block_k, max(16, _power_of_two(in_features)))
    while split_k > 1 and in_features < split_k * block_k:
        split_k //= 2
    for block in (block_k, block_k // 2):
        if block >= 32 and in_features % (split_k * block) == 0:
            return split_k, block
    return split_k, block_k


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
