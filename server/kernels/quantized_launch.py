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
    """`block_n` rows of the weight by `block_m` rows of x a program; K in `split_k` parts, whose sums a second launch adds up, or, of
    4-bit codes with `join`, the program of a tile that comes last. `ahead`: scales of 4-bit codes are loaded a unit before they are used.
    `scaled`: numbers of 4-bit codes are multiplied by their scales before the product, which rounds them to x's type, and saves a second
    set of sums. Two warps a program multiply by mma.sync, four by wgmma where there is."""

    block_m: int
    block_n: int
    split_k: int
    warps: int
    stages: int
    ahead: bool = False
    join: bool = False
    scaled: bool = False


class Dense(NamedTuple):
    """`block_rows` rows of the weight at a time: as many as stay in the card's L2."""

    block_rows: int


Choice = Few | Tile | Dense


class _Row(NamedTuple):
    """A line of a card's table: up to `max_rows` rows. `waves`: programs that are wanted at most, in multiples of the card's SMs; parts of
    K have `least_part` inputs at least."""

    max_rows: int
    tile: Tile
    waves: int
    least_part: int = 256


class _Table(NamedTuple):
    """A card's table. `few_rows`: the most rows that numbers of 8 bits are multiplied for by Few; 4 bits cost too many instructions there.
    `scaled_rows`: from so many rows on, e4m3 is multiplied as it is."""

    few_rows: int
    few: Few
    tiles_4bit: tuple[_Row, ...]
    tiles_8bit: tuple[_Row, ...]
    scaled_rows: int
    dense_bytes: int


_AMPERE = _Table(
    2, Few(2, 4, 2),
    (_Row(16, Tile(16, 64, 1, 2, 4, True), 6), _Row(32, Tile(32, 64, 1, 2, 4, True), 4), _Row(256, Tile(64, 64, 1, 4, 3), 2)),
    (_Row(16, Tile(16, 64, 1, 4, 3), 4), _Row(32, Tile(32, 64, 1, 4, 3), 4), _Row(256, Tile(64, 64, 1, 4, 3), 2)),
    64, 1 << 40,
)  # fmt: skip
_TABLES = {
    "hopper": _Table(
        2, Few(2, 4, 2),
        (
            _Row(8, Tile(8, 64, 1, 2, 4, True, True), 4, 1024),
            _Row(16, Tile(16, 64, 1, 2, 4, True, True), 4, 1024),
            _Row(32, Tile(32, 64, 1, 2, 4, True), 5),
            _Row(128, Tile(64, 128, 1, 4, 4, True), 2),
            _Row(256, Tile(128, 128, 1, 4, 3, True, True, True), 1, 1024),
        ),
        (_Row(16, Tile(16, 64, 1, 4, 4), 4), _Row(32, Tile(32, 64, 1, 4, 4), 4), _Row(128, Tile(64, 64, 1, 4, 4), 3)),
        33, 1 << 40,
    ),
    # Projections, measured by nobody yet: a byte takes eleven times as long as on Hopper, arithmetic six, so tiles pay for longer.
    "ada": _AMPERE,
    "generic": _AMPERE,
}  # fmt: skip


def choose(card: Card, num_rows: int, in_features: int, out_features: int, code: str) -> Choice:
    """The way for a product of `num_rows` rows with a weight [out_features, in_features] of a code."""
    table = _TABLES[card.name]
    is_wide = code in ("int8", "fp8")
    if is_wide and num_rows <= table.few_rows:
        return table.few._replace(rows=num_rows)
    if not (code == "fp8" and num_rows >= table.scaled_rows):
        for row in table.tiles_8bit if is_wide else table.tiles_4bit:
            if num_rows <= row.max_rows:
                return row.tile._replace(split_k=_split(row, num_rows, in_features, out_features, card.num_sms))
    return Dense(max(256, table.dense_bytes // (2 * in_features) // 256 * 256))


def _split(row: _Row, num_rows: int, in_features: int, out_features: int, num_sms: int) -> int:
    """Parts of K: as many as make the wanted number of programs."""
    tiles = -(-out_features // row.tile.block_n) * -(-num_rows // row.tile.block_m)
    split_k = 1
    while split_k < 8 and in_features >= split_k * 2 * row.least_part and tiles * split_k * 2 <= num_sms * row.waves:
        split_k *= 2
    return split_k
