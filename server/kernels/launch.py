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
    pdl: bool


class _Row(NamedTuple):
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


_ANY = 1 << 30
_TABLES: dict[str, tuple[_Row, ...]] = {
    # Few rows: as many programs as can be, since each reads little. Many rows: the same factors serve 64 rows at once.
    "hopper": (
        _Row(8, 16, 8, 256, 128, 128, 4, 4, 4, 0),
        _Row(512, 16, 8, 256, 128, 512, 4, 3, 4, 8),
        _Row(_ANY, 64, 2, 256, 128, 512, 4, 3, 8, 16),
    ),
    # A projection, measured by nobody yet. 300 GB/s times a latency of 0.8 us is 240 KB in flight, 4 KB an SM, so half of Hopper's
    # split fills the card; 100 KB of shared memory an SM hold three programs of 3 x (16 + 64) x 64 elements; no PDL before sm_90.
    "ada": (
        _Row(8, 16, 8, 128, 128, 128, 4, 3, 4, 0),
        _Row(512, 16, 4, 128, 128, 512, 4, 3, 4, 8),
        _Row(_ANY, 64, 1, 64, 128, 512, 4, 3, 4, 8),
    ),
    # Anything else with Triton: Ada's row, whose needs any card since Ampere meets.
    "generic": (
        _Row(8, 16, 8, 128, 128, 128, 4, 3, 4, 0),
        _Row(512, 16, 4, 128, 128, 512, 4, 3, 4, 8),
        _Row(_ANY, 64, 1, 64, 128, 512, 4, 3, 4, 8),
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
    return _row_of(card, num_rows).block_m


def max_split_k(card: Card, num_rows: int) -> int:
    """Planes that a scratch for steps of up to `num_rows` rows needs, whatever the group."""
    return _row_of(card, num_rows).split_k


def choose(card: Card, num_rows: int, shape: GroupShape) -> Choice:
    """The launch for a group in a step of up to `num_rows` rows."""
    row = _row_of(card, num_rows)
    split_k, block_k = _cut(shape.in_features, row.split_k, row.block_k)
    widest = max(stop - start for start, stop in shape.columns)
    block_n = min(row.block_n, max(16, _power_of_two(widest)))
    chunk_n = row.chunk_n * (2 if widest > 8192 and row.chunk_n > row.block_n else 1)
    return Choice(
        block_m=row.block_m,
        split_k=split_k,
        block_k=block_k,
        # Rank 16 at each of the group's sites in one go; more ranks are a loop.
        shrink_block_r={1: 16, 2: 32}.get(len(shape.columns), 64),
        shrink_warps=row.shrink_warps,
        shrink_stages=row.shrink_stages,
        shrink_programs=card.num_sms * row.waves,
        block_n=block_n,
        chunk=max(1, min(chunk_n, _power_of_two(widest)) // block_n),
        expand_block_r=16,
        expand_warps=row.expand_warps,
        expand_stages=1,
        expand_programs=card.num_sms * row.waves,
        pdl=card.pdl,
    )


def _row_of(card: Card, num_rows: int) -> _Row:
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
