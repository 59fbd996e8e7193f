"""What benchmarks.gpu_quant_kernels tries beside the card's choice, by code and number of rows. No torch.

Of 4-bit codes at few rows: sums joined by the last program of a tile, tiles of other sizes; at many: tiles whose numbers are scaled before
the product, which need one set of sums and so can be larger, and Dense in blocks.
"""

from server.kernels.quantized_launch import Choice, Dense, Few, Tile

WHOLE = 1 << 30  # rows of a weight


def variations(default: Choice, bits: int, num_rows: int) -> list[Choice]:
    """The card's choice, then others worth a try."""
    others = _wide(num_rows) if bits == 8 else _few(num_rows) if num_rows <= 32 else _some(num_rows) if num_rows <= 128 else _many(num_rows)
    return list(dict.fromkeys([default, *others]))


def _few(num_rows: int) -> list[Choice]:
    """4 bits, up to 32 rows: a step of decode is bytes, and how soon the next product can begin."""
    block_m = 16 if num_rows <= 16 else 32
    found: list[Choice] = [Tile(block_m, 64, split, 2, 4, True, True) for split in (1, 2, 4, 8)]
    found += [Tile(block_m, 64, split, 2, 4, True) for split in (2, 4, 8)]
    found += [Tile(block_m, 64, split, 2, 6, True, True) for split in (2, 4, 8)]
    found += [Tile(block_m, 128, split, 4, 4, True, True) for split in (2, 4, 8)]
    found += [Tile(block_m, 32, split, 2, 4, False, True) for split in (1, 2, 4)]
    if num_rows <= 8:
        found += [Tile(8, 64, split, 2, 4, True, True) for split in (1, 2, 4, 8)]
    return found


def _some(num_rows: int) -> list[Choice]:
    """4 bits, up to 128 rows."""
    found: list[Choice] = [Tile(64, 128, split, 4, 4, True, True, scaled) for split in (1, 2, 4) for scaled in (False, True)]
    found += [Tile(64, 64, split, 4, 4, False, True) for split in (1, 2, 4)] + [
        Tile(64, 64, split, 2, 4, True, True) for split in (1, 2, 4)
    ]
    found += [Tile(64, 128, split, 8, 3, False, True, True) for split in (1, 2)] + [
        Tile(32, 64, split, 2, 4, True, True) for split in (1, 2)
    ]
    if num_rows > 64:
        found += [Tile(128, 128, split, 8, 3, False, True, scaled) for split in (1, 2, 4) for scaled in (False, True)]
        found += [Tile(128, 128, split, 4, 3, True, True, True) for split in (1, 2)]
    return [*found, Dense(WHOLE)]


def _many(num_rows: int) -> list[Choice]:
    """4 bits, more rows: a weight unpacked once a tile, or made anew once for all."""
    splits = (1, 2) if num_rows <= 512 else (1,)
    found: list[Choice] = []
    for split in splits:
        found += [
            Tile(128, 128, split, 8, 3, False, True), Tile(128, 128, split, 8, 3, False, True, True),
            Tile(128, 128, split, 4, 3, True, True, True), Tile(256, 128, split, 8, 2, False, True, True),
            Tile(64, 128, split, 4, 4, True, True, True),
        ]  # fmt: skip
    return [*found, Dense(2048), Dense(4096), Dense(WHOLE)]


def _wide(num_rows: int) -> list[Choice]:
    """8 bits."""
    found: list[Choice] = []
    block_m = next((m for m in (16, 32) if num_rows <= m), 64)
    if num_rows <= 512:
        splits = (1, 2, 4, 8) if num_rows <= 64 else (1, 2)
        found += [Tile(block_m, n, split, warps, 4) for n, warps in ((64, 4), (64, 2), (128, 8)) for split in splits]
    if num_rows > 64:
        found += [Tile(128, 128, split, 8, 3) for split in (1, 2)]
    if num_rows <= 2:
        found += [Few(num_rows, n, warps) for n, warps in ((2, 2), (4, 1), (4, 2), (4, 4))]
    return [*found, *(Dense(rows) for rows in ((4096, WHOLE) if num_rows > 128 else (WHOLE,) if num_rows >= 32 else ()))]
