"""From logits to tokens, each row by its own parameters.

A draw depends on (seed, position) and the row's logits, never on the batch: one uniform number a token, hashed from seed and position,
picks from the row's distribution by inversion. Penalties: repetition (CTRL, arXiv 1909.05858), frequency and presence (OpenAI: by
counts in the output). Warpers in transformers' order: temperature, top-k, top-p (arXiv 1904.09751), min-p (arXiv 2407.01082), typical
(arXiv 2202.00666).
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from server.engine.masks import GrammarMasks
from server.engine.sequence import Sequence
from server.types import Logprob, SamplingParams

NUM_CANDIDATES = 256  # likeliest tokens looked at before the whole vocabulary is sorted


@dataclass(frozen=True, slots=True)
class Sampled:
    """A row's token; None if its logits are not finite. `logprob` if the request asked."""

    token: int | None
    logprob: Logprob | None = None


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    data = (seed & (2**64 - 1)).to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 11) / 2**53


def sample(logits: torch.Tensor, sequences: list[Sequence], vocab_sizes: list[int], masks: GrammarMasks | None = None) -> list[Sampled]:
    """One token for each row: logits [rows, vocabulary], of which row i has the first vocab_sizes[i] columns."""
    logits = logits.float()
    for row, size in enumerate(vocab_sizes):
        if size < logits.shape[1]:
            logits[row, size:] = float("-inf")
    params = [sequence.request.params for sequence in sequences]
    raw = {i: logits[i].clone() for i, p in enumerate(params) if p.num_logprobs >= 0 and p.raw_logprobs}
    _penalize(logits, sequences)
    failed = _mask(logits, sequences, masks)
    best_values, best = logits.max(-1)  # [rows]
    tokens, finite = best.tolist(), torch.isfinite(best_values).tolist()
    for row in failed:
        finite[row] = False
    warped: dict[int, torch.Tensor] = {}
    for row, (p, sequence) in enumerate(zip(params, sequences, strict=True)):
        if p.temperature > 0 and finite[row]:
            keep = p.num_logprobs >= 0 and not p.raw_logprobs
            tokens[row], logprobs = _draw(logits[row] / p.temperature, p, uniform(p.seed, len(sequence.tokens)), keep)
            if logprobs is not None:
                warped[row] = logprobs
    results = []
    for row, p in enumerate(params):
        if not finite[row]:
            results.append(Sampled(None))
            continue
        logprob = None
        if p.num_logprobs >= 0:
            source = warped.get(row)
            if source is None:
                source = torch.log_softmax(raw.get(row, logits[row]), -1)
            logprob = describe(source, tokens[row], p.num_logprobs)
        results.append(Sampled(tokens[row], logprob))
    return results


def _mask(logits: torch.Tensor, sequences: list[Sequence], masks: GrammarMasks | None) -> Iterable[int]:
    """Leave each row with a grammar the tokens that it allows, in place; the rows whose grammar failed."""
    matchers = {row: sequence.matcher for row, sequence in enumerate(sequences) if sequence.matcher is not None}
    return masks.apply(logits, matchers) if matchers and masks is not None else ()


def describe(logprobs: torch.Tensor, token: int, num_top: int) -> Logprob:
    """The token's log probability and the `num_top` likeliest: logprobs [vocabulary]."""
    top: list[tuple[int, float]] = []
    if num_top > 0:
        values, ids = logprobs.topk(min(num_top, len(logprobs)))
        top = [(i, v) for i, v in zip(ids.tolist(), values.tolist(), strict=True) if v != float("-inf")]
    return Logprob(token, logprobs[token].item(), top)


def describe_prompt(logits: torch.Tensor, tokens: list[int], num_top: int) -> list[Logprob]:
    """Log probabilities of prompt tokens: logits [n, vocabulary] of the positions before them, the model's own distribution."""
    logprobs = torch.log_softmax(logits.float(), -1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    if num_top <= 0:
        return [Logprob(token, value) for token, value in zip(tokens, own, strict=True)]
    values, ids = logprobs.topk(min(num_top, logprobs.shape[1]))
    tops = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return [Logprob(token, value, top) for token, value, top in zip(tokens, own, tops, strict=True)]


def _penalize(logits: torch.Tensor, sequences: list[Sequence]) -> None:
    """Penalties and biases, in place: logits [rows, vocabulary]."""
    for row, sequence in enumerate(sequences):
        p = sequence.request.params
        counts = sequence.output_counts
        if p.repetition_penalty != 1.0:
            seen = torch.tensor(list(sequence.seen), device=logits.device)
            seen = seen[seen < logits.shape[1]]
            values = logits[row, seen]
            logits[row, seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        if (p.frequency_penalty or p.presence_penalty) and counts:
            ids = torch.tensor(list(counts), device=logits.device)
            times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
            logits[row, ids] -= p.frequency_penalty * times + p.presence_penalty
        if p.logit_bias:
            ids = torch.tensor(list(p.logit_bias), device=logits.device)
            logits[row, ids] += torch.tensor(list(p.logit_bias.values()), dtype=logits.dtype, device=logits.device)


def _draw(logits: torch.Tensor, p: SamplingParams, u: float, want_logprobs: bool) -> tuple[int, torch.Tensor | None]:
    """A token from one row, logits [vocabulary] already divided by the temperature; its log probabilities after all warpers if wanted."""
    ids, values, total = _candidates(logits, p)
    if 0 < p.top_k < len(values):
        ids, values, total = ids[: p.top_k], values[: p.top_k], torch.logsumexp(values[: p.top_k], 0)
    probabilities = torch.exp(values - total)  # likeliest first where a warper needs that
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if p.top_p < 1.0:
        keep &= probabilities.cumsum(0) - probabilities < p.top_p
    if p.min_p > 0.0:
        keep &= probabilities >= p.min_p * probabilities.max()
    if p.typical_p < 1.0:
        keep = _keep_typical(probabilities * keep, keep, p.typical_p)
    probabilities = (probabilities * keep).double()
    cumulative = probabilities.cumsum(0)
    index = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    last = int(keep.nonzero()[-1])
    token = int(ids[min(index, last)])
    if not want_logprobs:
        return token, None
    logprobs = torch.full_like(logits, float("-inf"))
    logprobs[ids] = torch.log(probabilities / cumulative[-1]).to(logits.dtype)
    return token, logprobs


def _candidates(logits: torch.Tensor, p: SamplingParams) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, their logits, log of the whole distribution's mass): sorted if a warper goes by rank, and as few as that allows."""
    total = torch.logsumexp(logits, 0)
    needs_order = p.top_k > 0 or p.top_p < 1.0
    if not needs_order:
        return torch.arange(len(logits), device=logits.device), logits, total
    few = min(NUM_CANDIDATES, len(logits))
    values, ids = logits.topk(few)
    # With top-k the kept mass is what top-p is a share of, so k alone says how many are needed.
    enough = p.top_k <= few if p.top_k > 0 else float(torch.exp(values - total).sum()) >= p.top_p
    if not enough:
        values, ids = logits.sort(descending=True, stable=True)
    return ids, values, total


def _keep_typical(probabilities: torch.Tensor, keep: torch.Tensor, typical_p: float) -> torch.Tensor:
    """Of the kept tokens those nearest to the distribution's entropy, up to a mass of `typical_p`: [candidates]."""
    distribution = probabilities / probabilities.sum()
    surprise = -torch.log(distribution.clamp_min(1e-38))
    entropy = (distribution * surprise).sum()
    distance = torch.where(keep, (surprise - entropy).abs(), torch.inf)
    order = distance.argsort(stable=True)
    mass = distribution[order].cumsum(0)
    typical = torch.zeros_like(keep)
    typical[order] = mass - distribution[order] < typical_p
    return typical & keep
