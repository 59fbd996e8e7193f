"""`python -m benchmarks.gpu`: runs parts and appends their rows, or makes the table of rows. See the package for the commands."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import benchmarks.gpu
from benchmarks.gpu.arguments import default_work, option
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clients import LoadFailed
from benchmarks.gpu.models import MODELS, write_model
from benchmarks.gpu.offline import run_ours, run_vllm
from benchmarks.gpu.rows import read_rows, stamp
from benchmarks.gpu.serve import ServerFailed, flags_for
from benchmarks.gpu.served import direct_case, run_served
from benchmarks.gpu.start import run_start
from benchmarks.gpu.table import make_result, save, table
from benchmarks.gpu.workloads import offline_cases, sizes
from sizing.printing import run_tool

_OFFLINE = ("offline-base", "offline-r16", "offline-r8", "decode")
_SERVED = ("http", "arrivals")


def main(argv: Sequence[str]) -> int:
    """0 if all that was asked for is measured, 1 if something of it is missing, 2 for arguments that cannot be."""
    arguments = _parse(argv)
    try:
        if arguments.table:
            return _print_table(arguments.table, arguments.save)
        return 0 if _measure(arguments) else 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _measure(arguments: argparse.Namespace) -> bool:
    of = sizes(arguments.model)
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        model=arguments.model,
        model_dir=write_model(work, arguments.model),
        device=arguments.device,
        work=work,
        out=arguments.out,
        stamp=stamp(arguments.model, arguments.device, arguments.commit),
        repeats=arguments.repeats,
        vllm_repeats=arguments.vllm_repeats,
        deadline_at=time.monotonic() + arguments.limit_s,
        options=dict(arguments.option),
        vllm_site=arguments.vllm_site,
        vllm_options=dict(arguments.vllm_option),
        max_loras=tuple(arguments.max_loras or of.max_loras),
        num_clients=arguments.clients,
    )
    started_at = time.monotonic()
    parts: list[str] = arguments.part
    bench.plan([]).engine_options()  # a wrong option is answered before anything is started
    if {*_SERVED, "start"} & {*parts}:
        flags_for(bench.options)
    cases = [case for part in parts if part in _OFFLINE for case in offline_cases(part, of)]
    ours = cases * ("ours" in arguments.engine) + [direct_case(arguments.model)] * ("http" in parts)
    done = not ours or run_ours(bench, ours)
    if cases and "vllm" in arguments.engine:
        done &= run_vllm(bench, cases)
    if served := [part for part in parts if part in _SERVED]:
        done &= _attempt(lambda: run_served(bench, served))
    if "start" in parts:
        done &= _attempt(lambda: run_start(bench))
    print(f"{' '.join(arguments.part)}: {time.monotonic() - started_at:.0f} s; rows in {arguments.out}", flush=True)
    return done


def _attempt(work: Callable[[], bool]) -> bool:
    """False if the server or its clients failed; what was measured before is kept."""
    try:
        return work()
    except (ServerFailed, LoadFailed) as error:
        print(f"failed: {error}", flush=True)
        return False


def _print_table(files: Sequence[Path], keep: bool) -> int:
    result = make_result(read_rows(files))
    print(table(result))
    if keep:
        print(f"\nwrote {save(result)}")
    print(json.dumps({"benchmark": "gpu", "figures": result["figures"], "machine": result["machine"]}))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=benchmarks.gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--part", nargs="+", choices=[*_OFFLINE, *_SERVED, "start"], help="what to measure; parts named together share starts"
    )
    what.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="make the table of these files of rows")
    parser.add_argument("--out", type=Path, default=Path("rows.jsonl"), help="file that rows are appended to (rows.jsonl)")
    parser.add_argument("--save", action="store_true", help="with --table: keep the result under benchmarks/results")
    parser.add_argument("--engine", nargs="+", choices=["ours", "vllm"], default=["ours", "vllm"], help="of the offline parts (both)")
    parser.add_argument("--model", choices=sorted(MODELS), default="mistral-7b")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--work", type=Path, default=default_work(), help="folder for adapters, packs, logs: up to 48 GB (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement, while there is time (3)")
    parser.add_argument("--vllm-repeats", type=int, default=1, help="likewise, vLLM's (1)")
    parser.add_argument("--limit-s", type=float, default=540.0, help="seconds for the whole call (540)")
    parser.add_argument("--option", nargs="*", type=option, default=[], metavar="NAME=VALUE", help="fields of EngineOptions, for ours")
    parser.add_argument("--vllm-site", type=Path, help="folder that vLLM is in; without it, it must be importable")
    parser.add_argument("--vllm-option", nargs="*", type=option, default=[], metavar="NAME=VALUE", help="more arguments of vLLM's LLM")
    parser.add_argument("--max-loras", type=int, nargs="+", help="vLLM's max_loras to try with the many adapters (64 128 256)")
    parser.add_argument("--clients", type=int, default=8, help="client processes of the parts over HTTP (8)")
    parser.add_argument("--commit", help="the commit that is measured, where git cannot say it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
