"""A stand-in for vLLM, for the program that runs it."""

import pytest

# What the program uses of vLLM 0.26, refusing what vLLM would refuse. It keeps its arguments and calls beside the model's
# folder.
STAND_IN = """
import json, pathlib, time
from types import SimpleNamespace

class SamplingParams:
    def __init__(self, *, temperature, max_tokens, ignore_eos, detokenize):
        assert temperature == 0.0 and ignore_eos is True and detokenize is False
        self.max_tokens = max_tokens

class LLM:
    def __init__(self, *, enable_lora=False, max_loras=1, max_lora_rank=16, max_cpu_loras=None, **more):
        assert max_lora_rank in (8, 16, 32, 64) and (max_cpu_loras is None or max_cpu_loras >= max_loras)
        assert more["enable_prefix_caching"] is False and more["load_format"] == "dummy"
        self.enable_lora, self.max_num_seqs = enable_lora, more["max_num_seqs"]
        kept = dict(enable_lora=enable_lora, max_loras=max_loras, max_cpu_loras=max_cpu_loras, **more)
        with open(pathlib.Path(more["model"]).parent / "llm.jsonl", "a") as file:
            file.write(json.dumps(kept) + chr(10))
        self.calls = pathlib.Path(more["model"]).parent / "calls.jsonl"

    def generate(self, prompts, params, *, lora_request, use_tqdm):
        assert lora_request is None or (self.enable_lora and len(lora_request) == len(prompts))
        for request in lora_request or []:
            assert request.lora_int_id > 0 and (pathlib.Path(request.lora_path) / "adapter_model.safetensors").exists()
        with open(self.calls, "a") as file:
            call = dict(max_tokens=params.max_tokens, loras=[request.lora_name for request in lora_request or []])
            file.write(json.dumps(call) + chr(10))
        time.sleep(0.002)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7] * (params.max_tokens - SHORT))]) for _ in prompts]
"""
REQUEST = """
from dataclasses import dataclass

@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str
"""


@pytest.fixture
def vllm_site(tmp_path):
    def make(short: int = 0):
        site = tmp_path / f"site{short}"
        (site / "vllm" / "lora").mkdir(parents=True)
        (site / "vllm" / "__init__.py").write_text(STAND_IN.replace("SHORT", str(short)))
        (site / "vllm" / "lora" / "__init__.py").touch()
        (site / "vllm" / "lora" / "request.py").write_text(REQUEST)
        (site / "vllm-0.0.dist-info").mkdir()
        (site / "vllm-0.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.0\n")
        return site

    return make
