"""The embedded model and the example adapters against PEFT: every row of one mixed batch, logits within 1e-4, greedy text equal."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from server.api.text.tokenizer import load_tokenizer
from server.engine.build import build_engine
from server.engine.core import run_until_idle
from server.types import EngineOptions, EngineRequest, SamplingParams
from tests.server.engine.peft_oracle import pack

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
NAMES = [None, "sql", "json", "pirate"]
QUESTIONS = ["What is the capital of France?", "Table users(name, age). Show the name of users with age greater than 30."]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def test_mixed_batch_equals_peft(model_dir, tmp_path):
    options = EngineOptions(str(model_dir), device="cpu", num_blocks=200, max_sequence_len=512, max_batch_tokens=64, max_batch_size=8)
    core, base, _ = build_engine(options)
    tokenizer = load_tokenizer(model_dir)
    refs = {name: pack(ADAPTERS / name, base.layout, tmp_path / name) for name in NAMES if name}
    prompts = {}
    for number, question in enumerate(QUESTIONS):
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        for name in NAMES:
            prompts[f"{name}-{number}"] = (name, tokenizer.encode(text))
    params = SamplingParams(max_new_tokens=16, num_logprobs=50, raw_logprobs=True, num_prompt_logprobs=0)
    for key, (name, ids) in prompts.items():
        core.add(EngineRequest(key, ids, params, refs.get(name)))
    outputs = run_until_idle(core)
    del core, base
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    reference = PeftModel.from_pretrained(model, ADAPTERS / "sql", adapter_name="sql").eval()
    for name in ("json", "pirate"):
        reference.load_adapter(ADAPTERS / name, adapter_name=name)
    said = {}
    for key, (name, ids) in prompts.items():
        mine = [output for output in outputs if output.request_id == key]
        said[key] = tokens = [token for output in mine for token in output.token_ids]
        if name:
            reference.set_adapter(name)
        with torch.inference_mode():
            context = torch.tensor([ids + tokens[:-1]])
            if name:
                logits = reference(context).logits[0]
            else:
                with reference.disable_adapter():
                    logits = reference(context).logits[0]
        expected = logits.log_softmax(-1)
        assert tokens == expected[len(ids) - 1 :].argmax(-1).tolist(), key
        for step, output in enumerate(mine):
            for token, logprob in output.logprobs[0].top:
                assert abs(logprob - expected[len(ids) - 1 + step, token].item()) < 1e-4, key
        got = torch.tensor([logprob.logprob for logprob in mine[0].prompt_logprobs[1:]])
        assert torch.allclose(got, expected[torch.arange(len(ids) - 1), ids[1:]], atol=1e-4), key
    for number in range(len(QUESTIONS)):
        assert len({tuple(said[f"{name}-{number}"]) for name in NAMES}) == len(NAMES)
