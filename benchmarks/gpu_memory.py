"""`python -m benchmarks.gpu_memory`: what the engine really reserves on this card, beside what sizing/ predicts.

Starts the engine on random weights (benchmarks.gpu.random_base) once for each case, each in a process of its own: three models, with the
options that the server starts with, with memory that is named, with neither graphs nor compiled layers. Every case runs full steps of
prompts and a full batch of decode rows with its adapters. What it took goes by part, in bytes, to
benchmarks/results/DAY-COMMIT-memory.json, and tests/sizing/test_record.py holds the prediction to it. Where git cannot say the commit,
give --commit; --out names another file.

Elsewhere than on a GPU, `--model tiny --device cpu --out FILE` tries it out with the kernels in Triton's interpreter.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import MODELS, write_model
from benchmarks.gpu.rows import ROOT, installed, stamp
from benchmarks.gpu.workloads import AdapterSet
from sizing.adapters import ALL_LINEAR, adapter_bytes
from sizing.memory import EngineLimits, predict
from sizing.models import shape_of
from sizing.printing import run_tool

RESULTS = ROOT / "benchmarks" / "results"
TARGETS = {"all": [ALL_LINEAR], "qv": ["q_proj", "v_proj"]}  # of AdapterSet.modules
PARTS = ("weights", "adapters", "arena")  # what is predicted one by one; see `compare`


@dataclass(frozen=True)
class Case:
    """A model, engine options beside the server's defaults, and the adapters that are to be there."""

    adapters: AdapterSet
    options: dict[str, Any] = field(default_factory=dict)


GiB = 1 << 30
CASES: dict[str, Case] = {
    "mistral-7b": Case(AdapterSet(16, "all", 4)),
    "llama2-7b": Case(
        AdapterSet(8, "qv", 4),
        dict(kv_cache_bytes=40 * GiB, adapter_device_bytes=4 * GiB, max_batch_tokens=4096, max_batch_size=128, compile_layers=False),
    ),
    "qwen2.5-1.5b": Case(
        AdapterSet(16, "all", 4), dict(max_batch_tokens=8192, max_sequence_len=16384, cuda_graphs=False, compile_layers=False)
    ),
    "tiny": Case(
        AdapterSet(4, "all", 2),
        dict(kernels="triton", num_blocks=64, adapter_device_bytes=1 << 20, max_batch_tokens=16, max_batch_size=2, max_sequence_len=64),
    ),
}
_DEFAULTS = dict(max_batch_tokens=1024, max_batch_size=64, max_sequence_len=4096, prefix_caching=False)  # the server's


def options_of(model: str) -> dict[str, Any]:
    """The engine options of a case, as they are recorded."""
    return _DEFAULTS | CASES[model].options


def predicted(case: dict[str, Any], *, on_gpu: bool = True) -> dict[str, int]:
    """Bytes by part that sizing says of a recorded case: from the model's config alone, the options, and the card's size."""
    model, options, adapters = case["model"], case["options"], case["adapters"]
    shape = shape_of(model, MODELS[model])
    named = {key: value for key, value in options.items() if key in EngineLimits.__dataclass_fields__}
    limits = EngineLimits.of(shape, named if on_gpu else named | {"cuda_graphs": False})
    dtype, item_bytes = ("bf16", 2) if on_gpu else ("fp32", 4)
    memory = predict(shape, limits, case["card"], case["num_sms"], dtype=dtype)
    one = adapter_bytes(shape, adapters["rank"], TARGETS[adapters["modules"]], item_bytes)
    return {
        "weights": memory.weights.total,
        "adapters": adapters["count"] * memory.blocks_of_adapter(one) * memory.block_bytes,
        "arena": memory.arena,
        "context": memory.context,
        "graphs": memory.set_aside.graphs,
        "steps": memory.set_aside.spare + memory.set_aside.activations,
    }


def compare(case: dict[str, Any], on_gpu: bool = True) -> dict[str, float]:
    """How far today's prediction is from what a case reserved: predicted / reserved - 1 for each of PARTS; for `set aside` the share that
    steps, workspaces and graphs used of what is kept for them (1.0: all of it)."""
    said = predicted(case, on_gpu=on_gpu)
    took = case["reserved"]
    found = {part: said[part] / took[part] - 1 for part in PARTS}
    return found | {"set aside": (took["graphs"] + took["steps"]) / (said["graphs"] + said["steps"])}


def main(argv: Sequence[str]) -> int:
    """0 if every case was measured, 1 if one failed (the others are kept), 2 for arguments that cannot be."""
    arguments = _parse(argv)
    if arguments.part:
        from benchmarks.gpu_memory_case import measure

        if not sys.stdin.readline():  # until it is this case's turn on the card; imports are done by then
            return 1
        arguments.part.write_text(json.dumps(measure(arguments.model[0], arguments.device, arguments.work)))
        return 0
    on_gpu = arguments.device != "cpu"
    if not on_gpu and (arguments.out is None or arguments.model != ["tiny"]):
        print("error: --device cpu: only --model tiny, and --out must say where the result goes", file=sys.stderr)
        return 2
    try:
        machine = stamp(",".join(arguments.model), arguments.device, arguments.commit)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    started_at = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="manylora-memory-") as work:
        cases = _run_all(arguments, Path(work))
    out = arguments.out or RESULTS / f"{machine['day']}-{machine['commit']}-memory.json"
    keep = {name: machine[name] for name in ("day", "commit", "code", "gpu", "driver", "python")}
    result = {"benchmark": "gpu_memory", **keep, "versions": installed(), "cases": cases}
    if cases:
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(cases)} of {len(arguments.model)} cases in {time.monotonic() - started_at:.0f} s; {out if cases else 'nothing was kept'}")
    return 0 if len(cases) == len(arguments.model) else 1


def _run_all(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Every case in a process of its own, one after another on the card. What failed is said and left out."""
    processes = {model: _start(model, arguments.device, work) for model in dict.fromkeys(arguments.model)}
    cases = []
    try:
        for model, process in processes.items():
            case = _finish(process, model, work, arguments.limit_s)
            if case is not None:
                cases.append(case)
                print(f"{model}: {_shown(case, arguments.device != 'cpu')}", flush=True)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return cases


def _start(model: str, device: str, work: Path) -> "subprocess.Popen[str]":
    """A case's process: it imports what it needs, and waits for its turn."""
    write_model(work, model)
    own = ["--device", device, "--part", str(work / f"{model}.json"), "--work", str(work)]
    command = [sys.executable, "-m", "benchmarks.gpu_memory", "--model", model, *own]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})
    with (work / f"{model}.log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True)


def _finish(process: "subprocess.Popen[str]", model: str, work: Path, limit_s: float) -> dict[str, Any] | None:
    """Its turn, and its row; None, with its last words printed, if it failed or took too long."""
    part, log = work / f"{model}.json", work / f"{model}.log"
    try:
        process.communicate("go\n", timeout=limit_s)
        what = f"failed with {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        what = f"not done after {limit_s:.0f} s"
    if process.returncode == 0 and part.is_file():
        return json.loads(part.read_text())
    print(f"{model}: {what}\n{log.read_text()[-4000:]}", flush=True)
    return None


def _shown(case: dict[str, Any], on_gpu: bool) -> str:
    found, took = compare(case, on_gpu), case["reserved"]
    parts = ", ".join(f"{part} {took[part] / 1e9:.2f} GB (predicted {100 * found[part]:+.1f}%)" for part in PARTS)
    return f"{parts}, {100 * found['set aside']:.0f}% used of what is set aside; {case['seconds']:.0f} s"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", nargs="+", choices=sorted(CASES), default=[name for name in CASES if name != "tiny"], help="cases to run"
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--out", type=Path, help="file of the result (benchmarks/results/DAY-COMMIT-memory.json)")
    parser.add_argument("--commit", help="the commit that is measured, where git cannot say it")
    parser.add_argument("--limit-s", type=float, default=180.0, help="seconds for one case (180)")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)  # of the process of one case: where its result goes
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
