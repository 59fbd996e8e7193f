"""Tensors on their way into a pack: shapes now, numbers in blocks of rows when they are written, so that no weight is ever whole in memory.

Owns the arithmetic of folding (a delta into a replaced weight). It does not know the pack's layout. Called by plan.py, merge.py, pack.py.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from server.adapters.refusal import quote, refuse
from server.types import PackDtype

BLOCK_BYTES = 8 << 20
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00}  # all ones in it: infinity or not a number


@dataclass(frozen=True, eq=False)
class Part:
    """A tensor to be written: `blocks()` gives its rows in order, in any float type. `key` is what a message calls it."""

    key: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]


@dataclass
class SiteParts:
    """A server.types.PackedSite that is not laid out yet: the same fields, with parts for tensors."""

    site: int
    group: int = -1
    rank: int = 0
    scale: float = 1.0
    a: Part | None = None
    b: Part | None = None
    bias: Part | None = None
    magnitude: Part | None = None
    base_bias: Part | None = None
    weight: Part | None = None


@dataclass
class Contents:
    """All that a pack will hold. `overrides` are (module, parameter, tensor), `tokens` (module, token ids, rows)."""

    vocab_size: int
    sites: list[SiteParts] = field(default_factory=list)
    overrides: list[tuple[str, str, Part]] = field(default_factory=list)
    tokens: list[tuple[str, list[int], Part]] = field(default_factory=list)


def as_part(key: str, array: np.ndarray) -> Part:
    """An array as it is. [rows, ...]"""

    def blocks() -> Iterator[np.ndarray]:
        for start, stop in row_ranges(array.shape):
            yield array[start:stop]

    return Part(key, array.shape, blocks)


def with_rows(part: Part, row_ids: list[int], rows: np.ndarray) -> Part:
    """`part` [rows, n] with rows [len(row_ids), n] in the place of some."""
    ids = np.asarray(row_ids)

    def blocks() -> Iterator[np.ndarray]:
        start = 0
        for block in part.blocks():
            inside = (ids >= start) & (ids < start + len(block))
            if inside.any():
                block = block.astype(np.float32)
                block[ids[inside] - start] = rows[inside].astype(np.float32)
            yield block
            start += len(block)

    return Part(part.key, part.shape, blocks)


def fold_delta(weight: Part, rows_by_rank: np.ndarray, rank_by_columns: np.ndarray, scale: float, magnitude: np.ndarray | None) -> Part:
    """weight [rows, columns] + scale * rows_by_rank [rows, r] @ rank_by_columns [r, columns], in float32.

    With magnitude [rows] (DoRA, arXiv 2402.09353, section 4.1) each row is then brought to that length."""

    def blocks() -> Iterator[np.ndarray]:
        right = rank_by_columns.astype(np.float32)  # [r, columns]
        start = 0
        for block in weight.blocks():
            stop = start + len(block)
            left = rows_by_rank[start:stop].astype(np.float32)  # [block rows, r]
            folded = block.astype(np.float32) + scale * (left @ right)  # [block rows, columns]
            if magnitude is not None:
                norm = np.linalg.norm(folded, axis=1)
                folded *= (magnitude[start:stop].astype(np.float32) / norm)[:, None]
            yield folded
            start = stop

    return Part(weight.key, weight.shape, blocks)


def to_dtype(part: Part, dtype: PackDtype) -> Iterator[np.ndarray]:
    """The part's blocks, contiguous and in a pack's dtype. AdapterRefused names the tensor if a number is not finite there."""
    for block in part.blocks():
        with np.errstate(over="ignore", invalid="ignore"):
            converted = np.ascontiguousarray(block, dtype=DTYPES[dtype])
        if not _is_finite(converted, dtype):
            reason = f"numbers beyond the range of {dtype}" if np.isfinite(block.astype(np.float32)).all() else "NaN or infinity in it"
            raise refuse(f"tensor {quote(part.key)} has {reason}", param=part.key)
        yield converted


def check_finite(part: Part) -> None:
    """AdapterRefused names the part if a number in it is not finite."""
    for _ in to_dtype(part, "float32"):
        pass


def hash_weight(part: Part, dtype: PackDtype) -> str:
    """sha256 of a weight as a pack of `dtype` would hold it: what BaseLayout.weight_hashes has."""
    digest = hashlib.sha256()
    for block in to_dtype(part, dtype):
        digest.update(block.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def _is_finite(array: np.ndarray, dtype: str) -> bool:
    if dtype == "float32":
        return bool(np.isfinite(array).all())
    exponent = np.uint16(_EXPONENT[dtype])
    return bool(((array.view(np.uint16) & exponent) != exponent).all())


def row_ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of BLOCK_BYTES each as float32, so that a block and its conversions stay small."""
    row_bytes = 4 * int(np.prod(shape[1:], dtype=np.int64))
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
