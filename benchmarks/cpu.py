"""`python -m benchmarks.cpu`: this engine against transformers + PEFT, same machine, same weights, one run.

PEFT as its user runs it: static batches in arrival order, `PeftModel.generate(adapter_names=...)`. Ours: the engine without HTTP. Prefix
caching is off, EOS is ignored, every repeat has new prompts, and the engines take turns. Tokens that were asked for, by seconds; the median
of the repeats. The last line of the output is JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.workload import Request, mixed, num_output_tokens
from examples.embedded_model import DEFAULT_DIR, ensure_model
from server.adapters.pack import write_pack
from server.engine.build import build_engine
from server.engine.core import EngineCore, run_until_idle
from server.types import AdapterRef, EngineOptions, EngineRequest, SamplingParams
from sizing.printing import run_tool

ADAPTERS = Path(__file__).parent.parent / "examples" / "adapters"
RESULTS = Path(__file__).parent / "results"
NAMES: list[str | None] = [None, "sql", "json", "pirate"]


class Peft:
    """transformers + PEFT in static batches."""

    def __init__(self, model_dir: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        named = [name for name in NAMES if name]
        self.model = PeftModel.from_pretrained(base, ADAPTERS / named[0], adapter_name=named[0])
        for name in named[1:]:
            self.model.load_adapter(ADAPTERS / name, adapter_name=name)
        self.model.eval()

    @torch.inference_mode()
    def run(self, requests: list[Request], batch_size: int) -> float:
        """Seconds for all requests."""
        started_at = time.perf_counter()
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            width = max(len(r.prompt) for r in batch)
            ids = torch.tensor([[0] * (width - len(r.prompt)) + r.prompt for r in batch])  # [batch, width], padded on the left
            mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in batch])
            longest = max(r.num_new for r in batch)
            self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                adapter_names=[r.adapter or "__base__" for r in batch],
                max_new_tokens=longest,
                min_new_tokens=longest,
                do_sample=False,
                pad_token_id=0,
            )
        return time.perf_counter() - started_at


class Ours:
    """The engine of this repository, called directly."""

    def __init__(self, model_dir: Path, packs: Path, batch_size: int) -> None:
        self.core: EngineCore
        options = EngineOptions(
            model_dir=str(model_dir),
            device="cpu",
            max_batch_size=batch_size,
            max_batch_tokens=512,
            max_sequence_len=512,
            num_blocks=batch_size * 40,
            prefix_caching=False,
        )
        self.core, self.base, _ = build_engine(options)
        self.refs = {}
        for name in NAMES:
            if name is not None:
                out = packs / f"{name}.pack"
                write_pack(ADAPTERS / name, self.base.layout, name, out)
                self.refs[name] = AdapterRef(name, str(out), name)

    def run(self, requests: list[Request]) -> float:
        """Seconds for all requests."""
        started_at = time.perf_counter()
        for i, r in enumerate(requests):
            ref = self.refs[r.adapter] if r.adapter else None
            self.core.add(EngineRequest(str(i), r.prompt, SamplingParams(max_new_tokens=r.num_new), ref))
        outputs = run_until_idle(self.core)
        seconds = time.perf_counter() - started_at
        assert sum(len(o.token_ids) for o in outputs) == num_output_tokens(requests)
        return seconds


def measure(batch_sizes: list[int], num_repeats: int, num_batches: int) -> dict:
    """Medians of tokens a second by batch size and engine."""
    ensure_model()
    model_dir = DEFAULT_DIR
    rows: dict[str, dict] = {}
    peft = Peft(model_dir)
    vocab_size = peft.model.config.vocab_size
    peft.run(mixed(2, NAMES, vocab_size, seed=0), 2)
    with tempfile.TemporaryDirectory() as packs:
        for size in batch_sizes:
            ours = Ours(model_dir, Path(packs), size)
            ours.run(mixed(4, NAMES, vocab_size, seed=0))
            rates: dict[str, list[float]] = {"peft_mixed": [], "ours_mixed": [], "ours_base": []}
            for repeat in range(num_repeats):
                count = max(4, size * num_batches)
                requests = mixed(count, NAMES, vocab_size, seed=100 * size + repeat + 1)
                base_only = [Request(r.prompt, r.num_new, None) for r in mixed(count, NAMES, vocab_size, seed=100 * size + repeat + 51)]
                tokens = num_output_tokens(requests)
                rates["ours_mixed"].append(tokens / ours.run(requests))
                rates["ours_base"].append(num_output_tokens(base_only) / ours.run(base_only))
                rates["peft_mixed"].append(tokens / peft.run(requests, size))
                print(f"batch {size:2d}, repeat {repeat + 1}: " + ", ".join(f"{k} {v[-1]:.1f}" for k, v in rates.items()), flush=True)
            row = {name: round(statistics.median(values), 1) for name, values in rates.items()}
            row["ratio_to_peft"] = round(row["ours_mixed"] / row["peft_mixed"], 2)
            row["ratio_mixed_to_base"] = round(row["ours_mixed"] / row["ours_base"], 2)
            rows[str(size)] = row
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, default=4, help="requests a repeat, in multiples of the batch size")
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results; README's table is made from it")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    rows = measure(arguments.batch_sizes, arguments.repeats, arguments.batches)
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    print(f"\ntokens/s, medians of {arguments.repeats}; SmolLM2-135M float32, base and three adapters mixed; {versions}")
    print(f"{'batch':>5} {'PEFT mixed':>11} {'ours mixed':>11} {'ours base':>10} {'ours/PEFT':>10} {'mixed/base':>11}")
    for size, row in rows.items():
        print(
            f"{size:>5} {row['peft_mixed']:>11} {row['ours_mixed']:>11} {row['ours_base']:>10} {row['ratio_to_peft']:>10}"
            f" {row['ratio_mixed_to_base']:>11}"
        )
    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    result = {"benchmark": "cpu", "rows": rows, "versions": versions, "repeats": arguments.repeats, "machine": machine}
    if arguments.save:
        save(result)
    print(json.dumps(result))


def save(result: dict) -> None:
    """Write the result under the day and the commit that it was measured on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
    RESULTS.mkdir(exist_ok=True)
    day = datetime.now(UTC).date().isoformat()
    (RESULTS / f"{day}-cpu-{commit or 'unknown'}.json").write_text(json.dumps({**result, "commit": commit, "day": day}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_tool(main))
