"""vLLM on the offline cases, in process: `python -m benchmarks.gpu.peer_vllm PLAN ROWS`. One process for each configuration of vLLM.

Run where vLLM can be imported (benchmarks.gpu.offline puts --vllm-site on the path), it imports nothing of server/. Its dummy weights, its
defaults, prefix cache off, as many sequences as ours; flags that make it faster are the plan's.
"""

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
        adapters = next((case.adapters for case in plan.cases if case.adapters), None)
        if adapters is not None:
            max_loras = plan.vllm["max_loras"]
            cpu = max(max_loras, adapters.count)
            arguments |= {"enable_lora": True, "max_lora_rank": max(8, adapters.rank), "max_loras": max_loras, "max_cpu_loras": cpu}
        self.settings = arguments | plan.vllm
        self.vocab_size = MODELS[plan.model]["vocab_size"]
        folders = plan.adapter_folders.get(adapters.name, []) if adapters else []
        self._requests = [LoRARequest(Path(folder).name, number, folder) for number, folder in enumerate(folders, 1)]
        self._llm = LLM(**self.settings)

    def run(self, case: Case, repeat: int) -> float:
        """Seconds for all requests. RuntimeError if they did not get their tokens."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": ids} for ids in case.prompts(self.vocab_size, repeat)]
        params = SamplingParams(temperature=0.0, max_tokens=case.num_new, ignore_eos=True, detokenize=False)
        adapters = [self._requests[pick] for pick in case.picks() if pick is not None] or None
        started_at = time.perf_counter()
        outputs = self._llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
        seconds = time.perf_counter() - started_at
        if (num_tokens := sum(len(output.outputs[0].token_ids) for output in outputs)) != case.num_output_tokens:
            raise RuntimeError(f"{case.name}: {num_tokens} tokens, not {case.num_output_tokens}")
        return seconds


def main(plan_path: str, rows_path: str) -> int:
    """Measure every case of the plan; cases with adapters all use the same set."""
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
        row = result(case, repeat, engine.run(case, repeat))
        print(f"vllm: {case.part}, {case.name}, repeat {repeat}: {row['rate']} tokens/s", flush=True)
        append_row(rows, common | row)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
