"""Tokens for a whole batch without the host: what sampler.py draws for one row, for all rows at once and still on the device.

Same meaning as sampler.sample for rows that ask for tokens alone (no penalties, no log probabilities): a row's token depends on its own
logits, parameters and its uniform number, never on the batch. Called by the runner where steps overlap.
"""

import numpy as np
import torch

from server.engine.sampler import uniform
from server.engine.sequence import Sequence

NOT_FINITE = -2  # in place of a token: the row's logits are not finite


def draw_all(logits: torch.Tensor, sequences: list[Sequence], vocab_sizes: list[int]) -> torch.Tensor:
    """One token a row: logits [rows, vocabulary], of which row i has the first vocab_sizes[i] columns -> int64 [rows]."""
    if min(vocab_sizes) < logits.shape[1]:
        sizes = _to_device(np.array(vocab_sizes), logits.device)
        logits = logits.masked_fill(torch.arange(logits.shape[1], device=logits.device) >= sizes[:, None], float("-inf"))
    best_values, tokens = logits.max(-1)  # [rows]
    params = [sequence.request.params for sequence in sequences]
    # A row's candidates stand in an order of its own: likeliest first where a warper goes by rank, else by id. So each kind by itself.
    for ordered in (False, True):
        rows = [row for row, p in enumerate(params) if p.temperature > 0 and (p.top_k > 0 or p.top_p < 1.0) == ordered]
        if rows:
            index = _to_device(np.array(rows), logits.device)
            tokens = tokens.index_put((index,), _draw(logits[index].float(), [sequences[row] for row in rows], ordered))
    return torch.where(torch.isfinite(best_values), tokens, NOT_FINITE)


def _draw(logits: torch.Tensor, sequences: list[Sequence], ordered: bool) -> torch.Tensor:
    """logits [rows, vocabulary] of rows with a temperature -> int64 [rows]. `ordered`: they have a warper that goes by rank."""
    params = [sequence.request.params for sequence in sequences]
    columns = [
        [p.temperature for p in params],
        [uniform(p.seed, len(sequence.tokens)) for p, sequence in zip(params, sequences, strict=True)],
        [p.top_k or logits.shape[1] for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        [p.typical_p for p in params],
    ]
    packed = _to_device(np.array(columns, np.float64), logits.device)  # [6, rows]
    temperature, u, top_k, top_p, min_p, typical_p = packed[:, :, None].unbind(0)  # [rows, 1] each
    logits = logits / temperature.to(logits.dtype)
    total = torch.logsumexp(logits, -1, keepdim=True)  # [rows, 1]
    ids = None
    if ordered:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)  # likeliest first
        rank = torch.arange(logits.shape[1], device=logits.device)
        kept = torch.where(rank < top_k, logits, float("-inf"))
        total = torch.where(top_k < logits.shape[1], torch.logsumexp(kept, -1, keepdim=True), total)
        logits = kept
    probabilities = torch.exp(logits - total)  # [rows, vocabulary]
    keep = probabilities > 0
    if any(p.top_p < 1.0 for p in params):
        keep &= (top_p >= 1.0) | (probabilities.cumsum(-1) - probabilities < top_p)
    if any(p.min_p > 0.0 for p in params):
        keep &= probabilities >= min_p * probabilities.amax(-1, keepdim=True)
    if any(p.typical_p < 1.0 for p in params):
        keep &= (typical_p >= 1.0) | _typical(probabilities * keep, keep, typical_p)
    cumulative = (probabilities * keep).double().cumsum(-1)  # [rows, vocabulary]
    index = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)  # [rows, 1]
    last = keep.shape[1] - 1 - keep.flip(-1).int().argmax(-1, keepdim=True)
    index = torch.minimum(index, last)
    return (index if ids is None else ids.gather(1, index))[:, 0]


def _typical(probabilities: torch.Tensor, keep: torch.Tensor, typical_p: torch.Tensor) -> torch.Tensor:
    """Of the kept tokens those nearest to the distribution's entropy, up to a mass of `typical_p` [rows, 1]: [rows, candidates]."""
    distribution = probabilities / probabilities.sum(-1, keepdim=True)
    surprise = -torch.log(distribution.clamp_min(1e-38))
    entropy = (distribution * surprise).sum(-1, keepdim=True)
    distance = torch.where(keep, (surprise - entropy).abs(), torch.inf)
    order = distance.argsort(dim=-1, stable=True)
    mass = distribution.gather(1, order)
    return torch.zeros_like(keep).scatter(1, order, mass.cumsum(-1) - mass < typical_p)


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Without waiting for what the device does now."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
