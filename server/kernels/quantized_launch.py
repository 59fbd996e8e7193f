"""How a product with a quantized weight is computed, by card and number of rows. Plain numbers, no tensors, no Triton.

Three ways: `Few` reads each weight once and multiplies on the ordinary cores, `Tile` unpacks tiles for the tensor cores, `Dense` makes the
weight's rows anew in the activations' type, block by block, and leaves the product to cuBLAS (fp8: rounds the activations too, and lets the
tensor cores multiply both). Called by quantized_kernels.py. `benchmarks/gpu_quant_kernels.py` measures the choices.
"""

from typing import NamedTuple

from server.kernels.launch import Card


class Few(NamedTuple):
    """`block_n` rows of the weight a program, all of its inputs; a warp's threads lie along the inputs."""

    rows: int  # that are computed: 1, 2 or 4
    block_n: int
    warps: int


class Tile(NamedTuple):
    """`block_n` rows of the weight by `block_m` rows of x a program; K in `split_k` parts, whose sums a second launch adds up."""

    block_m: int
    block_n: int
    split_k: int
    warps: int
    stages: int


class Dense(NamedTuple):
    """`block_rows` rows of the weight at a time: as many as stay in the card's L2."""

    block_rows: int


Choice = Few | Tile | Dense


class _Row(NamedTuple):
    """A line of a card's table."""

    few_rows: int  # up to so many rows `Few`
    tile_rows: int  # up to so many `Tile`
    few_block_n: int
    few_warps: int
    tile_block_n: int
    tile_warps: int
    stages: int
    waves: int  # programs of `Tile` that are wanted, in multiples of the card's SMs
    dense_bytes: int


_TABLES = {
    "hopper": _Row(4, 128, 8, 4, 64, 4, 4, 4, 32 << 20),
    # A projection, measured by nobody yet: a byte takes eleven times as long as on Hopper, arithmetic six, so tiles pay for longer.
    "ada": _Row(4, 256, 8, 4, 64, 4, 3, 4, 24 << 20),
    "generic": _Row(4, 128, 8, 4, 64, 4, 3, 4, 16 << 20),
}


def choose(card: Card, num_rows: int, in_features: int, out_features: int, bits: int) -> Choice:
    """The way for a product of `num_rows` rows with a weight [out_features, in_features]."""
    row = _TABLES[card.name]
    if num_rows <= row.few_rows:
        rows = next(n for n in (1, 2, 4) if n >= num_rows)
        return Few(rows, row.few_block_n // (2 if rows == 4 else 1), row.few_warps)  # four rows' sums take twice the registers
    if num_rows <= row.tile_rows:
        block_m = next((m for m in (16, 32) if num_rows <= m), 64)
        tiles = -(-out_features // row.tile_block_n) * -(-num_rows // block_m)
        depth = max(1, in_features // 256)  # a part of K has at least two units
        split_k = 1
        while split_k < min(8, depth) and tiles * split_k * 2 <= card.num_sms * row.waves:
            split_k *= 2
        return Tile(block_m, row.tile_block_n, split_k, row.tile_warps, row.stages)
    return Dense(max(256, row.dense_bytes // (2 * in_features) // 256 * 256))
