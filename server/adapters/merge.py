"""Several adapters as one: LoRAX's `merged_adapters`, done right. Works on packs, so that every input has passed all checks already.

Owns which inputs can be merged and how ranks, scales and hashes of the result come about; strategies.py has the arithmetic on factors.
`linear` is the exact weighted sum of the deltas (ranks concatenated: PEFT's `cat`). ties, dare_linear and dare_ties merge A and B apart,
as PEFT's `add_weighted_adapter` does (0.21.2, tuners/lora/model.py).
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from server.adapters.pack import load_pack, view_tensor, write_contents
from server.adapters.parts import Contents, Part, SiteParts, as_part
from server.adapters.refusal import refuse
from server.adapters.strategies import MAJORITY_SIGN_METHODS, STRATEGIES, merge_factors
from server.errors import ValidationFailed
from server.types import PackedAdapter, PackedSite, PackedTensor


@dataclass(frozen=True)
class MergeInput:
    """One adapter of a merge: its mapped pack and its weight in the sum."""

    header: PackedAdapter
    data: np.ndarray
    weight: float

    def read(self, tensor: PackedTensor | None) -> np.ndarray:
        """A tensor as float32. AdapterRefused if the pack's site has it not (every site of a mergeable pack has a delta)."""
        if tensor is None:
            raise refuse(f"merged_adapters: the pack of an adapter is not complete (content hash {self.header.hash})")
        return view_tensor(self.data, tensor, self.header.dtype).astype(np.float32)


def merge_packs(
    refs: Sequence[tuple[Path, float]],
    strategy: str,
    density: float,
    majority_sign_method: str,
    seed: int,
    max_rank: int,
    out: Path,
) -> PackedAdapter:
    """Merge packs (path, weight) into one pack at `out`; its hash is merge_hash of the inputs.

    ValidationFailed: a parameter is wrong. AdapterRefused: the inputs cannot be merged, or the result's rank is above `max_rank`."""
    check_merge(len(refs), [weight for _, weight in refs], strategy, density, majority_sign_method)
    inputs = [MergeInput(*load_pack(path), weight) for path, weight in refs]
    first = inputs[0].header
    for one in inputs:
        _check_mergeable(one.header)
        if (one.header.fingerprint, one.header.dtype) != (first.fingerprint, first.dtype):
            raise refuse("merged_adapters: the adapters were packed for different bases")
    hash = merge_hash([(one.header.hash, one.weight) for one in inputs], strategy, density, majority_sign_method, seed)
    # One adapter is scaled, whatever the strategy: PEFT's rule, and pruning it would help nobody.
    exact = strategy == "linear" or len(inputs) == 1
    contents = Contents(vocab_size=first.vocab_size)
    for index in sorted({site.site for one in inputs for site in one.header.sites}):
        members = [(one, site) for one in inputs for site in one.header.sites if site.site == index]
        contents.sites.append(_sum_site(members) if exact else _merge_site(members, strategy, density, majority_sign_method, hash))
    rank = max(site.rank for site in contents.sites)
    if rank > max_rank:
        raise refuse(f"merged_adapters: the merged adapter would have rank {rank}; at most {max_rank} is allowed", param="merged_adapters")
    return write_contents(contents, hash, first.fingerprint, first.dtype, out)


def check_merge(num_adapters: int, weights: Sequence[float], strategy: str, density: float, majority_sign_method: str) -> None:
    """ValidationFailed names the parameter of `merged_adapters` that is wrong, and what is allowed."""
    if num_adapters == 0:
        raise ValidationFailed("`merged_adapters.ids` must not be empty", param="merged_adapters.ids")
    if len(weights) != num_adapters or not all(math.isfinite(weight) for weight in weights):
        raise ValidationFailed("`merged_adapters.weights` must be finite numbers, one for each id", param="merged_adapters.weights")
    if strategy not in STRATEGIES:
        allowed = ", ".join(STRATEGIES)
        raise ValidationFailed(f"`merged_adapters.merge_strategy` must be one of {allowed}", param="merged_adapters.merge_strategy")
    if majority_sign_method not in MAJORITY_SIGN_METHODS:
        allowed = ", ".join(MAJORITY_SIGN_METHODS)
        raise ValidationFailed(
            f"`merged_adapters.majority_sign_method` must be one of {allowed}", param="merged_adapters.majority_sign_method"
        )
    if strategy != "linear" and not 0 < density <= 1:
        raise ValidationFailed(f"`merged_adapters.density` must be > 0 and <= 1 for {strategy}", param="merged_adapters.density")


def merge_hash(inputs: Sequence[tuple[str, float]], strategy: str, density: float, majority_sign_method: str, seed: int) -> str:
    """Content hash of a merge of (content hash, weight): what makes the same result has the same hash. 64 hex digits."""
    exact = strategy == "linear" or len(inputs) == 1
    parameters = {
        "inputs": [[hash, float(weight)] for hash, weight in inputs],
        "strategy": "linear" if exact else strategy,
        "density": None if exact else float(density),
        "majority_sign_method": majority_sign_method if not exact and strategy.endswith("ties") else None,
        "seed": seed if not exact and strategy.startswith("dare") else None,
    }
    return hashlib.sha256(b"manylora merge 1\n" + json.dumps(parameters, sort_keys=True).encode()).hexdigest()


def _check_mergeable(header: PackedAdapter) -> None:
    """A merge is a sum of deltas; what replaces a weight cannot be summed."""
    reason = None
    if any(site.magnitude is not None for site in header.sites):
        reason = "DoRA (use_dora)"
    elif header.overrides or any(site.weight is not None for site in header.sites):
        reason = "replaced weights (modules_to_save or added tokens)"
    elif any(site.base_bias is not None for site in header.sites):
        reason = "trained biases (bias)"
    elif header.tokens:
        reason = "trained tokens (trainable_token_indices)"
    if reason:
        raise refuse(f"merged_adapters: an adapter with {reason} cannot be merged (content hash {header.hash})", param="merged_adapters")


def _sum_site(members: list[tuple[MergeInput, PackedSite]]) -> SiteParts:
    """sum of weight * scale * A.T @ B, as one delta: ranks side by side. One scale for all, the largest; the rest goes into A."""
    site = members[0][1]
    factors = [one.weight * packed.scale for one, packed in members]
    scale = max(factors, key=abs) or 1.0
    embedding = _is_embedding(site)
    a = np.concatenate(
        [one.read(packed.a) * np.float32(factor / scale) for (one, packed), factor in zip(members, factors, strict=True)],
        axis=1 if embedding else 0,
    )
    b = np.concatenate([one.read(packed.b) for one, packed in members], axis=0)
    biases = [np.float32(one.weight) * one.read(packed.bias) for one, packed in members if packed.bias is not None]
    parts = _parts(site, a, b)
    parts.scale = scale
    parts.bias = _named(site, "bias", np.sum(biases, axis=0)) if biases else None
    return parts


def _merge_site(
    members: list[tuple[MergeInput, PackedSite]], strategy: str, density: float, majority_sign_method: str, hash: str
) -> SiteParts:
    """A and B merged apart, each with the square root of its adapter's weight * scale (the sign on A alone)."""
    ranks = sorted({packed.rank for _, packed in members})
    if len(ranks) > 1:
        raise refuse(f"merged_adapters: {strategy} needs adapters of one rank, not {ranks}; linear takes any", param="merged_adapters")
    if any(packed.bias is not None for _, packed in members):
        raise refuse(f"merged_adapters: {strategy} is not defined for adapters with lora_bias; linear is", param="merged_adapters")
    factors = [one.weight * packed.scale for one, packed in members]
    merged, site = {}, members[0][1]
    for name in ("a", "b"):
        weights = [math.sqrt(abs(factor)) * (-1 if name == "a" and factor < 0 else 1) for factor in factors]
        tensors = [one.read(getattr(packed, name)) for one, packed in members]
        merged[name] = merge_factors(tensors, weights, strategy, density, majority_sign_method, partial(_generator, hash, site.site, name))
    return _parts(site, merged["a"], merged["b"])


def _is_embedding(site: PackedSite) -> bool:
    """An embedding's a is [rows, rank], a linear's [rank, in]; no vocabulary is as small as a rank."""
    return site.a is not None and site.a.shape[0] != site.rank


def _parts(site: PackedSite, a: np.ndarray, b: np.ndarray) -> SiteParts:
    return SiteParts(site.site, group=site.group, rank=b.shape[0], a=_named(site, "a", a), b=_named(site, "b", b))


def _named(site: PackedSite, name: str, array: np.ndarray) -> Part:
    return as_part(f"{name} of site {site.site}, merged", array)


def _generator(hash: str, site: int, name: str, position: int) -> np.random.Generator:
    """A generator that is the same wherever and whenever the same inputs are merged."""
    name = f"{hash}/{site}/{name}/{position}"
    return np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")))
