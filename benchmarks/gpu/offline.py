"""The parts that call engines directly: which program runs which cases, one after the other, within the time.

Owns the subprocesses and the stamping of their rows. Ours needs a start for the many adapters and one for all else; vLLM one for the base,
one for each rank and number of adapters, and one for each max_loras, which it is started with. Called by __main__, by gpu_quant, and by
served for the engine called directly.
"""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.adapters import write_adapters
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.rows import ROOT, read_rows
from benchmarks.gpu.workloads import AdapterSet, Case, sizes


def run_ours(bench: Bench, cases: Sequence[Case]) -> bool:
    """All cases in one start, but for the many adapters, which have one of their own, as they have in vLLM: all that Python's collector
    walks for them slows the base too (LOG.md). A third of the time is kept for that. False if a program failed or ran out of time; what it
    measured is kept."""
    many = [case for case in cases if case.adapters == sizes(bench.model).many]
    others = [case for case in cases if case not in many]
    first = replace(bench, deadline_at=bench.deadline_at - max(0.0, bench.deadline_at - time.monotonic()) / 3) if many else bench
    done = True
    if others or not cases:
        done &= _run_program(first, "ours", first.plan(others), dict(os.environ))
    if many:
        done &= _run_program(bench, "ours", bench.plan(many), dict(os.environ))
    return done


def run_vllm(bench: Bench, cases: Sequence[Case]) -> bool:
    """The cases by configuration: LoRA off for the base, then each size of adapters; sets of one size share a start. False if one failed or
    there was no time for it."""
    environment = _vllm_environment(bench.vllm_site)
    if environment is None:
        print("vllm: cannot be imported here; left out (--vllm-site names the folder that it is in)", flush=True)
        return True
    done = True
    for size in dict.fromkeys(_size(case.adapters) for case in cases):
        chosen = [case for case in cases if _size(case.adapters) == size]
        sets = dict.fromkeys(case.adapters for case in chosen if case.adapters)
        folders = {each.name: [str(folder) for folder in write_adapters(bench.work, bench.model, each)] for each in sets}
        for max_loras in _max_loras(bench, chosen[0].adapters):
            plan = bench.plan(
                chosen,
                repeats=bench.vllm_repeats,
                adapter_folders=folders,
                vllm=bench.vllm_options | ({"max_loras": max_loras} if max_loras else {}),
            )
            done &= _run_program(bench, "peer_vllm", plan, environment)
    return done


def _size(adapters: AdapterSet | None) -> tuple[int, int] | None:
    """What vLLM is started with."""
    return (adapters.rank, adapters.count) if adapters else None


def _max_loras(bench: Bench, adapters: AdapterSet | None) -> tuple[int, ...]:
    """vLLM's setting: several are tried with the many, which do not fit it; the few all fit."""
    if adapters is None:
        return (0,)
    return bench.max_loras if adapters == sizes(bench.model).many else (adapters.count,)


def _vllm_environment(site: Path | None) -> dict[str, str] | None:
    """vLLM's own packages before this repository's code, and none of our engine's; None if there is no vLLM."""
    if site is None:
        return dict(os.environ) if importlib.util.find_spec("vllm") else None
    if not (site / "vllm").is_dir():
        raise ValueError(f"--vllm-site {site}: there is no vllm in it")
    return os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}


def _run_program(bench: Bench, program: str, plan: Plan, environment: dict[str, str]) -> bool:
    if time.monotonic() >= plan.deadline_at:
        print(f"{program}: no time left for {', '.join(case.name for case in plan.cases)} ({plan.vllm or 'as it is'})", flush=True)
        return False
    name = f"{program}-{bench.stamp['run']}-{time.monotonic_ns()}"
    rows_path, plan_path = bench.work / f"{name}.rows", plan.write(bench.work / f"{name}.plan")
    rows_path.touch()
    command = [sys.executable, "-m", f"benchmarks.gpu.{program}", str(plan_path), str(rows_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        status: int | None = process.wait(plan.remaining_s())
    except subprocess.TimeoutExpired:
        status = None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        bench.keep(read_rows([rows_path]))
    if status:
        print(f"{program}: ended with status {status}; what it had measured is kept", flush=True)
    elif status is None:
        print(f"{program}: out of time; what it had measured is kept", flush=True)
    return status == 0
