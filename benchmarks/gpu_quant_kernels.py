"""`python -m benchmarks.gpu_quant_kernels --out F`: products with quantized weights on this card, right first, then fast, beside bf16.

Mistral-7B's four groups a layer, as many layers of weights of their own as the card's L2 cannot keep, inside CUDA graphs. Each case (a
code, a number of rows, a group): relative error against the plain meaning on fresh inputs; microseconds with the card's choice and with the
best of a sweep (gpu_quant_choices); microseconds of cuBLAS on the bf16 weight; what the bytes alone take. A row of JSON each, appended as
it comes; the last line of output is the table that is asked for first: microseconds a layer by code and rows.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from benchmarks.gpu_kernels import card_here, graph_ms
from benchmarks.gpu_kernels_cases import DEVICE, DTYPE, WIDTHS
from benchmarks.gpu_quant_choices import variations
from server.kernels.quantized import QuantizedWeight, multiply_reference, pack
from server.kernels.quantized_kernels import multiply
from server.kernels.quantized_launch import Choice, Dense, Few, Tile, choose
from sizing.printing import run_tool

LAYERS = 6
MAX_ERROR = 1.5e-2  # bf16 operands and a bf16 result
MAX_FP8_ERROR = 6e-2  # activations of 3 bits of mantissa
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)


class Code(NamedTuple):
    """A code as a scheme uses it."""

    name: str
    code: str
    group: int  # 0: one for all inputs
    zeros: str  # none, whole, any

    @property
    def bits(self) -> int:
        """Of a weight."""
        return 8 if self.code in ("int8", "fp8") else 4


CODES = (Code("int4", "int4", 128, "whole"), Code("fp8", "fp8", 0, "none"), Code("int8", "int8", 0, "none"),
         Code("hqq", "int4", 64, "any"), Code("nf4", "nf4", 64, "none"))  # fmt: skip


class Job(NamedTuple):
    """What a process compiles: a choice for a code, a number of rows and inputs."""

    code: Code
    num_rows: int
    in_features: int
    choice: Choice


def random_weight(code: Code, n: int, k: int, device: str = DEVICE) -> QuantizedWeight:
    """Codes of no meaning, scaled to about a linear's size."""
    group = code.group or k
    scales = (0.5 + torch.rand(n, k // group, device=device)) * 0.02
    if code.code == "fp8":
        return QuantizedWeight("fp8", torch.randn(n, k, device=device).to(torch.float8_e4m3fn), scales, None, k, group)
    if code.code == "int8":
        return QuantizedWeight("int8", torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device), scales / 64, None, k, group)
    data = pack(torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device))
    zeros = {
        "none": None, "whole": torch.randint(4, 12, (n, k // group), device=device).half(),
        "any": (4 + 8 * torch.rand(n, k // group, device=device)).bfloat16().half(),
    }[code.zeros]  # fmt: skip
    return QuantizedWeight(code.code, data, (scales / 4).half(), zeros, k, group, None, code.zeros != "any")


def _job(code: Code, num_rows: int, in_features: int, choice: Choice) -> Job:
    """The same for all numbers of rows and inputs that share what is compiled."""
    if isinstance(choice, Few):
        return Job(code, num_rows, in_features, choice)
    rows = 16 if isinstance(choice, Tile) else 512
    if isinstance(choice, Tile) and not choice.join:
        choice = choice._replace(split_k=min(2, choice.split_k))
    return Job(code, rows, in_features if isinstance(choice, Dense) else 4096, choice)


def compile_job(job: Job) -> None:
    """Run it once on a small weight: what was compiled lies in Triton's cache then."""
    torch.set_num_threads(1)
    try:
        weight = random_weight(job.code, 512, job.in_features)
        multiply(torch.zeros(job.num_rows, job.in_features, dtype=DTYPE, device=DEVICE), weight, None, job.choice)
        torch.cuda.synchronize()
    except Exception as error:  # the measurement will meet it again and say which choice it was
        print(f"{job}: {type(error).__name__}: {error}"[:300], flush=True)


def compile_all(jobs: set[Job], num_processes: int) -> None:
    """Fill Triton's cache on all cores."""
    started_at = time.monotonic()
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_job, sorted(jobs, key=str)))
    print(f"compiled {len(jobs)} choices in {time.monotonic() - started_at:.0f} s", flush=True)


class Bench:
    """One code's weights of all groups, and the bf16 weights of the same size."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self.weights = {g: [random_weight(code, sum(outs), k) for _ in range(LAYERS)] for g, (k, outs) in WIDTHS.items()}

    def error(self, group: str, num_rows: int, choice: Choice) -> float:
        """Relative to the plain meaning in float32; infinite if a second product is not the same bits."""
        weight = self.weights[group][1]
        x = torch.randn(num_rows, weight.in_features, device=DEVICE).to(DTYPE)
        right = multiply_reference(x.float(), weight)
        y = multiply(x, weight, None, choice)
        same = torch.equal(y, multiply(x, weight, None, choice))
        return ((y.float() - right).norm() / right.norm()).item() if same else float("inf")

    def us(self, group: str, num_rows: int, choice: Choice) -> float:
        """Microseconds a product, one after another through the layers' weights."""
        x = torch.randn(num_rows, WIDTHS[group][0], dtype=DTYPE, device=DEVICE)
        repeats = max(1, 24 // LAYERS if num_rows <= 64 else 1)
        return (
            graph_ms(lambda: [multiply(x, w, None, choice) for _ in range(repeats) for w in self.weights[group]]) / LAYERS / repeats * 1e3
        )


def bf16_us(num_rows: int) -> dict[str, float]:
    """cuBLAS's microseconds a product by group."""
    times = {}
    for group, (k, outs) in WIDTHS.items():
        weights = [torch.empty(sum(outs), k, dtype=DTYPE, device=DEVICE).normal_(0, 0.02) for _ in range(LAYERS)]
        x = torch.randn(num_rows, k, dtype=DTYPE, device=DEVICE)
        out = torch.empty(num_rows, sum(outs), dtype=DTYPE, device=DEVICE)
        times[group] = graph_ms(lambda x=x, weights=weights, out=out: [torch.mm(x, w.T, out=out) for w in weights]) / LAYERS * 1e3
        del weights
    return times


def measure(bench: Bench, group: str, num_rows: int, choices: list[Choice], deadline: float) -> dict:
    """The card's choice, then the others until the deadline."""
    k, outs = WIDTHS[group]
    limit = MAX_FP8_ERROR if bench.code.code == "fp8" else MAX_ERROR
    tried: dict[str, float] = {}
    errors: dict[str, float] = {}
    wrong: dict[str, str] = {}
    for choice in choices:
        if tried and time.monotonic() > deadline:
            break
        try:
            errors[str(choice)] = error = bench.error(group, num_rows, choice)
            if not error < limit:
                wrong[str(choice)] = f"relative error {error:.1e}"
                continue
            tried[str(choice)] = bench.us(group, num_rows, choice)
        except (RuntimeError, triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError) as error:
            wrong[str(choice)] = f"{type(error).__name__}: {error}"[:300]
    default = str(choices[0])
    best = min(tried, key=tried.__getitem__) if tried else ""
    weight = bench.weights[group][0]
    num_bytes = weight.num_bytes + num_rows * (k + sum(outs)) * 2
    return {
        "code": bench.code.name, "rows": num_rows, "group": group, "default": default, "default_us": tried.get(default), "best": best,
        "best_us": tried.get(best), "error": errors.get(default), "best_error": errors.get(best),
        "floor_us": num_bytes / card_here().bytes_per_s * 1e6, "bits_a_weight": 8 * weight.num_bytes / (k * sum(outs)),
        "tried_us": {c: round(us, 2) for c, us in tried.items()}, "wrong": wrong,
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("quant-kernels.jsonl"), help="rows are appended to it")
    parser.add_argument("--seconds", type=float, default=420, help="when the sweep stops and only the card's choices are measured")
    parser.add_argument("--codes", nargs="+", default=[code.name for code in CODES], choices=[code.name for code in CODES])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1), help="that compile")
    parser.add_argument("--no-sweep", action="store_true", help="the card's choices alone")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    codes = [code for code in CODES if code.name in options.codes]
    plan = {
        (code.name, num_rows, group): variations(choose(card_here(), num_rows, k, sum(outs), code.code), code.bits, num_rows)[
            : 1 if options.no_sweep or code.name == "nf4" else None
        ] for code in codes for num_rows in options.rows for group, (k, outs) in WIDTHS.items()
    }  # fmt: skip
    compile_all(
        {_job(code, rows, WIDTHS[group][0], choice) for code in codes for (name, rows, group), all in plan.items() if name == code.name
         for choice in all}, options.processes,
    )  # fmt: skip
    stamp = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    table: dict[str, dict[int, float]] = {"bf16": {}}
    base = {num_rows: bf16_us(num_rows) for num_rows in options.rows}
    for num_rows, times in base.items():
        table["bf16"][num_rows] = round(sum(times.values()), 1)
        _append(options.out, stamp | {"code": "bf16", "rows": num_rows, "us": {g: round(us, 2) for g, us in times.items()}})
    for code in codes:
        bench, table[code.name], table[f"{code.name} best"] = Bench(code), {}, {}
        for num_rows in options.rows:
            rows = [measure(bench, group, num_rows, plan[code.name, num_rows, group], deadline) for group in WIDTHS]
            for row in rows:
                _append(options.out, stamp | row | {"bf16_us": round(base[num_rows][row["group"]], 2)})
            print(_line(rows, base[num_rows]), flush=True)
            for name, field in ((code.name, "default_us"), (f"{code.name} best", "best_us")):
                if all(row[field] for row in rows):
                    table[name][num_rows] = round(sum(row[field] for row in rows), 1)
        del bench
        torch.cuda.empty_cache()
    print(json.dumps(table))


def _append(path: Path, row: dict) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def _line(rows: list[dict], base: dict[str, float]) -> str:
    parts = [
        f"{row['group']} {row['default_us'] or 0:.1f} best {row['best_us'] or 0:.1f} ({row['best']}) floor {row['floor_us']:.1f}"
        f" bf16 {base[row['group']]:.1f} error {row['error'] or 0:.0e}{' WRONG ' + str(row['wrong'])[:400] if row['wrong'] else ''}"
        for row in rows
    ]
    return f"{rows[0]['code']} {rows[0]['rows']} rows: " + "; ".join(parts)


if __name__ == "__main__":
    sys.exit(run_tool(main))
