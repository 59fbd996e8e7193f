"""The arithmetic of merging LoRA factors: pruning, electing signs, summing. Arrays in, one array out; no files, no adapters.

TIES (arXiv 2306.01708), DARE (arXiv 2311.03099), with PEFT's conventions (0.21.2, utils/merge_utils.py). Called by merge.py.
"""

from collections.abc import Callable, Sequence

import numpy as np

STRATEGIES = ("linear", "ties", "dare_linear", "dare_ties")
MAJORITY_SIGN_METHODS = ("total", "frequency")


def merge_factors(
    tensors: Sequence[np.ndarray],
    weights: Sequence[float],
    strategy: str,
    density: float,
    majority_sign_method: str,
    draw: Callable[[int], np.random.Generator],
) -> np.ndarray:
    """One factor of several adapters (float32, equal shapes) merged; draw(i) gives the i-th adapter's generator for DARE's mask."""
    if strategy == "ties":
        pruned = [prune_small(tensor, density) for tensor in tensors]
    else:
        pruned = [prune_randomly(tensor, density, draw(position)) for position, tensor in enumerate(tensors)]
    stacked = np.stack(pruned)  # [adapters, ...]
    weighted = stacked * np.asarray(weights, np.float32).reshape(-1, *[1] * (stacked.ndim - 1))
    if strategy == "dare_linear":
        return weighted.sum(axis=0)
    agree = majority_sign_mask(stacked, majority_sign_method)
    return (weighted * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)


def prune_small(tensor: np.ndarray, density: float) -> np.ndarray:
    """The share `density` of the entries that is largest by magnitude; zeros elsewhere."""
    if density >= 1:
        return tensor
    num_kept = int(density * tensor.size)
    flat = tensor.reshape(-1)
    pruned = np.zeros_like(flat)
    if num_kept:
        kept = np.argpartition(np.abs(flat), flat.size - num_kept)[flat.size - num_kept :]
        pruned[kept] = flat[kept]
    return pruned.reshape(tensor.shape)


def prune_randomly(tensor: np.ndarray, density: float, generator: np.random.Generator) -> np.ndarray:
    """Each entry kept with probability `density`, and what is kept divided by it, so that the expected value stays."""
    if density >= 1:
        return tensor
    mask = generator.random(tensor.shape, dtype=np.float32) < density
    return tensor * mask / np.float32(density)


def majority_sign_mask(stacked: np.ndarray, method: str) -> np.ndarray:
    """Entries of [adapters, ...] whose sign is the elected one: of the sum ("total") or of the count ("frequency"); a tie is positive."""
    signs = np.sign(stacked)
    elected = np.where((stacked if method == "total" else signs).sum(axis=0) >= 0, 1, -1)
    return signs == elected
