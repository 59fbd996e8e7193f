"""This repository's engine on the offline cases: `python -m benchmarks.gpu.ours PLAN ROWS`.

One start serves every case: an adapter of any size takes its place beside the others. A program of its own, so that the device's memory is
free for the next engine when it ends. benchmarks.gpu.offline starts it. torch is imported in `main` alone: the processes that make adapters
import this module again.
"""

import sys
import time
from pathlib import Path

from benchmarks.gpu.plan import Plan, repeats, result, warm_up_cases
from benchmarks.gpu.rows import append_row, installed


def main(plan_path: str, rows_path: str) -> int:
    """Measure every case of the plan; of a plan without cases, leave the base's layout alone."""
    plan, rows = Plan.read(Path(plan_path)), Path(rows_path)
    from benchmarks.gpu.our_engine import OurEngine, write_layout

    if not plan.cases:
        write_layout(plan)
        return 0
    started_at = time.monotonic()
    engine = OurEngine(plan)
    start_s = time.monotonic() - started_at
    common = {"engine": "ours", "versions": installed()}
    start = {
        "part": "start",
        "case": "in process",
        "seconds": round(start_s, 2),
        "phases": engine.phases,
        "weight_bytes": engine.weight_bytes,
    }
    append_row(rows, common | start)
    for adapters in dict.fromkeys(case.adapters for case in plan.cases if case.adapters):
        engine.prepare(adapters)
    for case in warm_up_cases(plan.cases):
        engine.run(case, 0)
    for case, repeat in repeats(plan):
        row = result(case, repeat, engine.run(case, repeat))
        print(f"ours: {case.part}, {case.name}, repeat {repeat}: {row['rate']} tokens/s", flush=True)
        append_row(rows, common | row | {"options": plan.options, "stats": engine.stats()})
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
