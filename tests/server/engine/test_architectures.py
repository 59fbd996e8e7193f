"""Every architecture that is called verified: ragged, chunked, mixed batches equal plain eager Hugging Face."""

import random

import pytest
import torch

from server.engine.core import run_until_idle
from server.model.architectures import VERIFIED
from server.types import EngineRequest, SamplingParams
from tests.server.engine.tiny_models import CONFIGS, DEVICE, VOCAB, make_engine, make_pair

PROMPT_LENS = (1, 5, 23, 37, 16)
NUM_NEW = 6


def test_every_verified_architecture_has_a_model_here():
    assert set(CONFIGS) == set(VERIFIED)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
@torch.inference_mode()
def test_equals_eager(model_type):
    reference, served = make_pair(model_type)
    core, _ = make_engine(served, num_blocks=40)  # 16 tokens a step: prompts are cut in chunks, decode rows ride along
    rng = random.Random(0)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(n)] for n in PROMPT_LENS]
    params = SamplingParams(max_new_tokens=NUM_NEW, num_logprobs=0, raw_logprobs=True, num_prompt_logprobs=0)
    outputs = []
    for i, prompt in enumerate(prompts):  # they join while others run
        core.add(EngineRequest(str(i), prompt, params))
        outputs += core.step()
    outputs += run_until_idle(core)
    assert core.pool.num_used == 0
    for i, prompt in enumerate(prompts):
        mine = [o for o in outputs if o.request_id == str(i)]
        assert [o.finish_reason for o in mine] == [None] * (NUM_NEW - 1) + ["length"]
        tokens = [t for o in mine for t in o.token_ids]
        got = [p.logprob for p in mine[0].prompt_logprobs[1:]] + [p.logprob for o in mine for p in o.logprobs]
        text = prompt + tokens
        logprobs = reference(torch.tensor([text[:-1]], device=DEVICE)).logits[0].log_softmax(-1).cpu()
        expected = logprobs[torch.arange(len(text) - 1), text[1:]]
        assert tokens == logprobs[len(prompt) - 1 :].argmax(-1).tolist()
        assert torch.allclose(torch.tensor(got), expected, atol=5e-5), (torch.tensor(got) - expected).abs().max()
