"""vLLM on the offline cases, in process: `python -m benchmarks.gpu.peer_vllm PLAN ROWS`. One process for each configuration of vLLM.

Run where vLLM can be imported (benchmarks.gpu.offline puts --vllm-site on the path), it imports nothing of server/. Its dummy weights, its
defaults, prefix cache off, as many sequences as ours; flags that make it faster, and how it quantizes, are the plan's.
"""

import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import MODELS
from benchmarks.gpu.plan import Plan, repeats, result, warm_up_cases
from benchmarks.gpu.rows import append_row, installed
from benchmarks.gpu.workloads import Case, sizes

# In process as our engine is; no report of its use; its dual stream was its best LoRA setting tried on an H100.
ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LORA_ENABLE_DUAL_STREAM": "1",
}


class VllmEngine:
    """vLLM's LLM with the plan's adapters, which it knows by name."""

    def __init__(self, plan: Plan) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        of = sizes(plan.model)
        arguments: dict[str, Any] = {
            "model": plan.model_dir,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": of.max_sequence_len,
            "max_num_seqs": of.max_running,
            "gpu_memory_utilization": 0.88,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
        }
        sets = list(dict.fromkeys(case.adapters for case in plan.cases if case.adapters))
        if sets:
            max_loras = plan.vllm["max_loras"]
            cpu = max(max_loras, sum(adapters.count for adapters in sets))
            rank = max(8, *(adapters.rank for adapters in sets))
            arguments |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": max_loras, "max_cpu_loras": cpu}
        self.settings = arguments | plan.vllm
        self.vocab_size = MODELS[plan.model]["vocab_size"]
        numbers = itertools.count(1)
        self._requests = {
            adapters.name: [
                LoRARequest(f"{adapters.name}-{Path(folder).name}", next(numbers), folder) for folder in plan.adapter_folders[adapters.name]
            ]
            for adapters in sets
        }
        self._touches = {case.adapters: case for case in warm_up_cases(plan.cases)}  # the last of a set has one token of each adapter
        self._there = sets[0] if len(sets) == 1 else None
        self._llm = LLM(**self.settings)

    def prepare(self, case: Case) -> None:
        """Where sets take each other's places, have the case's adapters on the device before it is measured."""
        if case.adapters not in (None, self._there):
            self._there = case.adapters
            self.run(self._touches[case.adapters], 0)

    def run(self, case: Case, repeat: int) -> float:
        """Seconds for all requests. RuntimeError if they did not get their tokens."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": ids} for ids in case.prompts(self.vocab_size, repeat)]
        params = SamplingParams(temperature=0.0, max_tokens=case.num_new, ignore_eos=True, detokenize=False)
        known = self._requests[case.adapters.name] if case.adapters else []
        adapters = [known[pick] for pick in case.picks() if pick is not None] or None
        started_at = time.perf_counter()
        outputs = self._llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
        seconds = time.perf_counter() - started_at
        if (num_tokens := sum(len(output.outputs[0].token_ids) for output in outputs)) != case.num_output_tokens:
            raise RuntimeError(f"{case.name}: {num_tokens} tokens, not {case.num_output_tokens}")
        return seconds


def main(plan_path: str, rows_path: str) -> int:
    """Measure every case of the plan. Its sets of adapters fit max_loras, each by itself."""
    plan, rows = Plan.read(Path(plan_path)), Path(rows_path)
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    started_at = time.monotonic()
    engine = VllmEngine(plan)
    start_s = time.monotonic() - started_at
    common = {"engine": "vllm", "versions": installed(), "settings": plan.vllm}
    append_row(rows, common | {"part": "start", "case": "in process", "seconds": round(start_s, 2)})
    for case in warm_up_cases(plan.cases):
        engine.run(case, 0)
    for case, repeat in repeats(plan):
        engine.prepare(case)
        row = result(case, repeat, engine.run(case, repeat))
        print(f"vllm: {case.part}, {case.name}, repeat {repeat}: {row['rate']} tokens/s", flush=True)
        append_row(rows, common | row)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
