"""Sampling: each row by its own parameters, each draw by seed and position alone, each warper against its definition."""

import math

import pytest
import torch

from server.engine.sampler import describe_prompt, sample, uniform
from server.engine.sequence import Sequence
from server.types import EngineRequest, SamplingParams

VOCAB = 600


def row(prompt=(1, 2, 3), outputs=(), **params):
    sequence = Sequence(EngineRequest("r", list(prompt), SamplingParams(max_new_tokens=100, **params)), 0, "base")
    for token in outputs:
        sequence.expect()
        sequence.learn(token)
    return sequence


def draw(logits, *sequences):
    return sample(logits.clone(), list(sequences), [logits.shape[1]] * len(sequences))


def distribution(logits, num_draws=4000, **params):
    """Empirical distribution over seeds."""
    sequences = [row(seed=seed, **params) for seed in range(num_draws)]
    tokens = [s.token for s in draw(logits.expand(num_draws, -1), *sequences)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / num_draws


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(VOCAB) * 3


def test_a_row_is_the_same_whatever_shares_the_batch(logits):
    torch.manual_seed(1)
    others = torch.randn(6, VOCAB) * 3
    kinds = [
        dict(temperature=0.8, top_p=0.9, seed=7, num_logprobs=3),
        dict(temperature=1.3, top_k=5, min_p=0.01, seed=8),
        dict(repetition_penalty=1.3, frequency_penalty=0.5, num_logprobs=0),
        dict(temperature=0.7, typical_p=0.5, seed=9),
        dict(logit_bias={5: 100.0}),
        dict(temperature=2.0, seed=3, presence_penalty=-1.0, num_logprobs=2, raw_logprobs=True),
    ]
    for kind in kinds:
        alone = draw(logits[None], row(outputs=(4, 4, 5), **kind))[0]
        noisy = [row(outputs=(9,), temperature=50.0, top_k=1 + i, seed=i, logit_bias={i: -100.0}) for i in range(6)]
        mixed = draw(torch.cat([others[:3], logits[None], others[3:]]), *noisy[:3], row(outputs=(4, 4, 5), **kind), *noisy[3:])[3]
        assert alone == mixed


def test_greedy_beside_temperature_is_still_greedy(logits):
    sampled = draw(logits.expand(2, -1), row(), row(temperature=5.0, seed=1))
    assert sampled[0].token == int(logits.argmax())


def test_draws_depend_on_seed_and_position(logits):
    tokens = {draw(logits[None], row(temperature=1.0, seed=s))[0].token for s in range(40)}
    assert len(tokens) > 5
    assert uniform(1, 2) == uniform(1, 2) != uniform(2, 1)
    values = [uniform(s, 5) for s in range(4000)]
    assert min(values) >= 0 and max(values) < 1 and abs(sum(values) / 4000 - 0.5) < 0.02


def test_plain_temperature_draws_the_softmax(logits):
    expected = torch.softmax(logits / 0.9, -1)
    assert (distribution(logits, temperature=0.9) - expected).abs().max() < 0.03


@pytest.mark.parametrize("vocab", [20, VOCAB])
@pytest.mark.parametrize(
    ("params", "keep"),
    [
        (dict(top_k=3), lambda p: p >= p.sort(descending=True).values[2]),
        (dict(top_p=0.6), lambda p: _nucleus(p, 0.6)),
        (dict(min_p=0.3), lambda p: p >= 0.3 * p.max()),
        (dict(top_k=4, top_p=0.7), lambda p: _nucleus(p * (p >= p.sort(descending=True).values[3]), 0.7)),
        (dict(typical_p=0.4), lambda p: _typical(p, 0.4)),
        (dict(top_p=0.9999), lambda p: _nucleus(p, 0.9999)),
    ],
)
def test_warpers_keep_what_their_definition_keeps(params, keep, vocab):
    torch.manual_seed(3)
    logits = torch.randn(vocab) * (0.2 if params == dict(top_p=0.9999) else 2)
    p = torch.softmax(logits, -1)
    kept = keep(p)
    sampled = draw(logits[None], row(temperature=1.0, seed=1, num_logprobs=vocab, **params))[0]
    expected = torch.log(p * kept / (p * kept).sum())
    assert {i for i, _ in sampled.logprob.top} == set(kept.nonzero().flatten().tolist())
    for token, logprob in sampled.logprob.top:
        assert logprob == pytest.approx(expected[token].item(), abs=1e-4)
    tokens = {draw(logits[None], row(temperature=1.0, seed=s, **params))[0].token for s in range(50)}
    assert tokens <= set(kept.nonzero().flatten().tolist())


def _nucleus(p, mass):
    p = p / p.sum()
    values, order = p.sort(descending=True)
    kept = torch.zeros_like(p, dtype=torch.bool)
    kept[order] = (values.cumsum(0) - values < mass) & (values > 0)
    return kept


def _typical(p, mass):
    distance = (-p.log() - -(p * p.log()).sum()).abs()
    order = distance.argsort(stable=True)
    kept = torch.zeros_like(p, dtype=torch.bool)
    kept[order] = p[order].cumsum(0) - p[order] < mass
    return kept


def test_penalties(logits):
    outputs = (7, 7, 8)
    plain = torch.log_softmax(logits, -1)

    def logprobs(**params):
        top = draw(logits[None], row(prompt=(1, 7), outputs=outputs, num_logprobs=VOCAB, **params))[0].logprob.top
        return torch.tensor([value for _, value in sorted(top)])

    changed = logits.clone()
    changed[7] -= 2 * 0.5 + 0.25
    changed[8] -= 1 * 0.5 + 0.25
    assert torch.allclose(logprobs(frequency_penalty=0.5, presence_penalty=0.25), torch.log_softmax(changed, -1), atol=1e-5)
    changed = logits.clone()
    for token in (1, 7, 8):
        changed[token] = changed[token] / 1.5 if changed[token] > 0 else changed[token] * 1.5
    assert torch.allclose(logprobs(repetition_penalty=1.5), torch.log_softmax(changed, -1), atol=1e-5)
    assert torch.allclose(logprobs(repetition_penalty=1.5, raw_logprobs=True), plain, atol=1e-5)
    changed = logits.clone()
    changed[3] += 4
    assert torch.allclose(logprobs(logit_bias={3: 4.0}), torch.log_softmax(changed, -1), atol=1e-5)


def test_a_row_that_is_not_finite_fails_alone(logits):
    broken = torch.full_like(logits, math.nan)
    sampled = draw(torch.stack([logits, broken, logits]), row(), row(temperature=1.0), row())
    assert sampled[1].token is None
    assert sampled[0].token == sampled[2].token == int(logits.argmax())


def test_columns_beyond_a_rows_vocabulary_are_never_drawn():
    logits = torch.zeros(2, 12)
    logits[:, 10:] = 100
    sampled = sample(logits, [row(), row()], [10, 12])
    assert sampled[0].token < 10 <= sampled[1].token


def test_prompt_logprobs():
    logits = torch.randn(2, 9)
    described = describe_prompt(logits, [4, 5], 2)
    assert described[1].token_id == 5
    assert described[1].logprob == pytest.approx(logits[1].log_softmax(-1)[5].item(), abs=1e-6)
    assert len(described[0].top) == 2
