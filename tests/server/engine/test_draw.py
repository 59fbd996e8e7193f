"""A batch drawn on the device against each row drawn by itself on the host."""

import pytest
import torch

from server.engine.draw import NOT_FINITE, draw_all
from server.engine.sampler import sample
from server.engine.sequence import Sequence
from server.types import EngineRequest, SamplingParams
from tests.server.engine.tiny_models import DEVICE

KINDS = {
    "greedy": {},
    "temperature": dict(temperature=0.9),
    "top-k": dict(temperature=1.3, top_k=7),
    "top-p": dict(temperature=0.7, top_p=0.6),
    "both": dict(temperature=1.1, top_k=20, top_p=0.8),
    "min-p": dict(temperature=1.5, min_p=0.2),
    "typical": dict(temperature=1.0, typical_p=0.5),
    "all": dict(temperature=1.2, top_k=30, top_p=0.9, min_p=0.02, typical_p=0.8),
}


def rows(kinds, num, seed=0):
    params = [SamplingParams(max_new_tokens=9, seed=seed * 1000 + i, **KINDS[kinds[i % len(kinds)]]) for i in range(num)]
    return [Sequence(EngineRequest(str(i), [1] * (1 + i % 5), p), i, "base") for i, p in enumerate(params)]


@pytest.mark.parametrize("kinds", [[kind] for kind in KINDS] + [list(KINDS)], ids=[*KINDS, "mixed"])
def test_as_row_by_row(kinds):
    generator = torch.Generator().manual_seed(len(kinds))
    logits = (3 * torch.randn(64, 400, generator=generator)).to(DEVICE)
    sequences, sizes = rows(kinds, 64), [400 if i % 3 else 350 for i in range(64)]
    drawn = draw_all(logits.clone(), sequences, sizes).tolist()
    assert drawn == [result.token for result in sample(logits.clone(), sequences, sizes)]
    assert all(token < size for token, size in zip(drawn, sizes, strict=True))
    alone = [int(draw_all(logits[i : i + 1].clone(), sequences[i : i + 1], sizes[i : i + 1])) for i in (0, 7, 63)]
    assert alone == [drawn[0], drawn[7], drawn[63]]


def test_a_flat_distribution_needs_more_than_the_likeliest():
    logits = (0.01 * torch.randn(6, 3000, generator=torch.Generator().manual_seed(3))).to(DEVICE)
    sequences = rows(["top-p", "all", "typical"], 6, seed=4)
    assert draw_all(logits.clone(), sequences, [3000] * 6).tolist() == [r.token for r in sample(logits.clone(), sequences, [3000] * 6)]


def test_rows_that_are_not_finite_are_told_and_change_no_other():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    sequences = rows(["greedy", "temperature"], 4)
    healthy = draw_all(logits.clone(), sequences, [50] * 4).tolist()
    logits[1, 3], logits[2] = torch.nan, torch.inf
    assert draw_all(logits, sequences, [50] * 4).tolist() == [healthy[0], NOT_FINITE, NOT_FINITE, healthy[3]]
