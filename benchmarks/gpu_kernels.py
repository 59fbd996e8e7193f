"""`python -m benchmarks.gpu_kernels --out F`: the grouped LoRA kernels on this card, right first, then fast.

Mistral-7B's four groups a layer, 32 layers of weights of their own, bf16, inside CUDA graphs. Each case: relative error against float64 on
fresh inputs; microseconds a pair of launches with the card's choices and with the best of a sweep (one field at a time, then together,
until `--seconds`); milliseconds that a step's base products gain by the deltas, in each order of their kernels; the floor that the bytes
set. The last line is JSON.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import triton

from benchmarks.gpu_kernels_cases import CASES, DEVICE, DTYPE, ITEM, LAYERS, RANK_CAP, RANKS, WIDTHS, Adapters, Case, shape_of
from server.engine.tiling import Tiling
from server.kernels.ahead import Job, compile_ahead
from server.kernels.grouped import Tiles, empty_tiles, fill_tiles, make_tiles, tile_cap
from server.kernels.grouped_kernels import apply_group
from server.kernels.launch import Choice, block_m_of, card_of, choose
from server.model.forward import ForwardState
from sizing.printing import run_tool

SCRATCH_LEN = 32 * 2048 * RANK_CAP
ORDERS = ("after", "first", "apart")  # shrink and expand behind the product; shrink and write before it; beside it
MAX_ERROR = 8e-3  # bf16 operands and a bf16 result
VARIATIONS: dict[str, tuple] = {
    "split_k": (2, 4, 8, 16), "block_k": (128, 512), "shrink_stages": (2, 4), "block_n": (64, 256), "chunk": (1, 2, 4, 8, 16),
    "expand_warps": (2, 4, 8), "expand_programs": (0, 1056, 2112),
}  # fmt: skip


@dataclass
class Bench:
    """One case on the card: its buffers at the capacity of the worst case (every row another adapter), and what is timed with them."""

    case: Case
    adapters: Adapters
    weights: dict[str, torch.Tensor]  # [layers, sum of outs, in] each
    scratch: torch.Tensor  # float32, cut to each choice's split

    def __post_init__(self) -> None:
        case, card = self.case, card_here()
        self.block_m = block_m_of(card, case.num_rows)
        turn = np.arange(case.num_rows)
        self.of_row = turn * case.num_adapters // case.num_rows if case.chunks else turn % case.num_adapters
        num_tiles = tile_cap(case.num_rows, max(case.num_adapters, min(256, case.num_rows)), self.block_m)
        self.tiles: Tiles = empty_tiles(num_tiles, case.num_rows, self.block_m, DEVICE)
        fill_tiles(self.tiles, make_tiles(self.adapters.bases[self.of_row], self.block_m))
        self.default = {group: choose(card, case.num_rows, shape_of(group, 0)) for group in case.groups}
        self.x = {group: torch.randn(case.num_rows, WIDTHS[group][0], dtype=DTYPE, device=DEVICE) for group in case.groups}
        self.y = {group: torch.randn(case.num_rows, sum(WIDTHS[group][1]), dtype=DTYPE, device=DEVICE) for group in case.groups}

    def planes(self, choice: Choice) -> torch.Tensor:
        """The part of the scratch that a choice uses."""
        size = choice.split_k * self.case.num_rows * RANK_CAP
        return self.scratch[:size].view(choice.split_k, self.case.num_rows, RANK_CAP)

    def add(self, group: str, layer: int, choice: Choice) -> None:
        """One pair of launches."""
        shape, planes = shape_of(group, layer), self.planes(choice)
        apply_group(self.y[group], self.x[group], self.adapters.arena, shape, self.tiles, planes, choice)

    def error(self, group: str, choice: Choice) -> float:
        """Relative error against float64 on fresh inputs, in a layer of the middle, with a poisoned scratch."""
        shape = shape_of(group, 17)
        self.x[group].normal_()
        self.y[group].normal_()
        right = self.adapters.exact(self.y[group], self.x[group], self.of_row, shape)
        self.planes(choice).fill_(math.nan)
        self.add(group, 17, choice)
        return ((self.y[group].double() - right).norm() / right.norm()).item()

    def pair_us(self, group: str, choice: Choice) -> float:
        """Microseconds a pair, one after another through all layers' weights."""
        return graph_ms(lambda: [self.add(group, layer, choice) for layer in range(LAYERS)]) / LAYERS * 1e3

    def base_ms(self) -> float:
        """A step's base products of the touched groups."""
        products = [(group, layer) for layer in range(LAYERS) for group in self.case.groups]
        return graph_ms(lambda: [torch.mm(self.x[g], self.weights[g][layer].T, out=self.y[g]) for g, layer in products])

    def step_ms(self, choices: dict[str, Choice], order: str) -> float:
        """The same with the deltas; "apart" without their sum, which is part of what comes next."""
        state, names = ForwardState(), list(WIDTHS)
        state.tiles, state.has_gains = self.tiles, order == "after"
        arena, num_rows = self.adapters.arena, self.case.num_rows
        tiling = Tiling(state, arena, num_rows, lambda card, n, shape, item_bytes: choices[names[shape.index % len(names)]])

        def step() -> None:
            for layer in range(LAYERS):
                for group in self.case.groups:
                    x, weight, y = self.x[group], self.weights[group][layer].T, self.y[group]
                    shape, compute = shape_of(group, layer), lambda x=x, w=weight, y=y: torch.mm(x, w, out=y)
                    if order == "apart":
                        tiling.apart(x, shape, compute)
                    else:
                        tiling.around(x, shape, compute, lambda y, x=x, w=weight: torch.addmm(y, x, w, out=y))

        with tiling.captured():
            return graph_ms(step)

    def floor_us(self, group: str) -> float:
        """What the bytes of a pair take: each adapter's factors once, x once, y read and written."""
        (k, outs), ranks = WIDTHS[group], RANKS[self.case.kind][group]
        factors = self.case.num_adapters * sum(rank * (k + out) for rank, out in zip(ranks, outs, strict=True))
        touched = sum(out for rank, out in zip(ranks, outs, strict=True) if rank)
        return (factors + self.case.num_rows * (k + 2 * touched)) * ITEM / card_here().bytes_per_s * 1e6


def card_here():
    """The card that this runs on."""
    properties = torch.cuda.get_device_properties(0)
    return card_of((properties.major, properties.minor), properties.multi_processor_count)


def graph_ms(step) -> float:
    """Milliseconds of a captured step: the median of three timings of at least 10 ms."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(num_replays: int) -> float:
        begin.record()
        for _ in range(num_replays):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / num_replays

    timed(2)
    num_replays = max(3, min(50, math.ceil(10 / timed(2))))
    return sorted(timed(num_replays) for _ in range(3))[1]


def variations(choice: Choice, group: str, num_rows: int) -> list[Choice]:
    """Every choice that differs in one field and fits this group, the scratch and the card."""
    found, num_planes = [], SCRATCH_LEN // (num_rows * RANK_CAP)
    for field, values in VARIATIONS.items():
        for value in values:
            changed = choice._replace(**{field: value})
            fits = changed.split_k * changed.block_k <= WIDTHS[group][0] and changed.split_k <= num_planes
            stage_bytes = (changed.block_m + changed.shrink_block_r) * changed.block_k * ITEM
            if changed != choice and fits and stage_bytes * changed.shrink_stages <= 200_000 and (card_here().pdl or not changed.pdl):
                found.append(changed)
    return found


def sweep(bench: Bench, group: str, default_us: float, deadline: float) -> tuple[Choice, float, dict]:
    """(best choice, its microseconds, what each single change measured): single changes first, then those that helped together."""
    default = bench.default[group]
    measured: dict[str, float] = {}

    def try_out(choice: Choice) -> float:
        if time.monotonic() > deadline:
            return math.inf
        try:
            us = bench.pair_us(group, choice)
        except triton.runtime.errors.OutOfResources:
            us = math.inf
        measured[" ".join(f"{f}={v}" for f, v in changes(default, choice).items())] = us
        return us

    singles = sorted(((try_out(choice), choice) for choice in variations(default, group, bench.case.num_rows)), key=lambda pair: pair[0])
    best, best_us = default, default_us
    for us, choice in singles:
        if us < 0.985 * default_us:
            changed = best._replace(**changes(default, choice))
            together_us = us if best == default else try_out(changed)
            if together_us < 0.99 * best_us:
                best, best_us = changed, together_us
    return best, best_us, {change: round(us, 2) for change, us in measured.items() if us < math.inf}


def changes(default: Choice, choice: Choice) -> dict:
    """The fields that differ."""
    return {field: value for field, value in choice._asdict().items() if value != getattr(default, field)}


def compile_cases(cases: list[Case], *, with_variations: bool, num_processes: int) -> None:
    """Fill Triton's cache for what will be timed, on all cores."""
    card, jobs = card_here(), set()
    for case in cases:
        for group in case.groups:
            choice = choose(card, case.num_rows, shape_of(group, 0))
            several = variations(choice, group, case.num_rows) if with_variations else [choice]
            jobs |= {Job(torch.cuda.get_device_capability(), DTYPE, shape_of(group, 0), c, RANK_CAP) for c in several}
    started_at = time.monotonic()
    compile_ahead(sorted(jobs, key=str), num_processes)
    print(f"compiled {len(jobs)} pairs in {time.monotonic() - started_at:.0f} s", flush=True)


def measure(bench: Bench, deadline: float) -> dict:
    """One case: errors, times by group, the step."""
    case, best, groups = bench.case, dict(bench.default), {}
    for group in case.groups:
        error = bench.error(group, bench.default[group])
        default_us = bench.pair_us(group, bench.default[group])
        best[group], best_us, measured = sweep(bench, group, default_us, deadline)
        if best[group] != bench.default[group]:
            error = max(error, bench.error(group, best[group]))
        if not error < MAX_ERROR:
            raise SystemExit(f"{case.name}, {group}: relative error {error:.1e}")
        groups[group] = {
            "error": error, "default_us": default_us, "best_us": best_us, "floor_us": bench.floor_us(group),
            "default": bench.default[group]._asdict(), "best": best[group]._asdict(), "single_changes_us": measured,
        }  # fmt: skip
        print(
            f"{case.name:44s} {group:8s} {default_us:7.1f} us, best {best_us:7.1f}, floor {bench.floor_us(group):6.1f},"
            f" error {error:.1e} {changes(bench.default[group], best[group])}", flush=True,
        )  # fmt: skip
    base = bench.base_ms()
    added = {order: bench.step_ms(best, order) - base for order in ORDERS}
    floor = LAYERS * sum(bench.floor_us(group) for group in case.groups) / 1e3
    by_order = ", ".join(f"{order} +{ms:.2f}" for order, ms in added.items())
    print(f"{case.name:44s} step: base {base:.2f} ms, deltas {by_order}, floor {floor:.2f}", flush=True)
    return {"groups": groups, "base_ms": base, "added_ms": added, "floor_ms": floor}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--seconds", type=float, default=200, help="when the sweep stops and only the card's choices are measured")
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many cases")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile")
    options = parser.parse_args()
    deadline, cases = time.monotonic() + options.seconds, CASES[: options.cases]
    compile_cases(cases, with_variations=False, num_processes=options.processes)
    if options.seconds > 0:
        compile_cases(cases, with_variations=True, num_processes=options.processes)
    adapters = {kind: Adapters(kind, max(case.num_adapters for case in cases if case.kind == kind)) for kind in {c.kind for c in cases}}
    weights = {g: torch.empty(LAYERS, sum(outs), k, dtype=DTYPE, device=DEVICE).normal_(0, 0.02) for g, (k, outs) in WIDTHS.items()}
    scratch = torch.empty(SCRATCH_LEN, device=DEVICE)
    result = {
        "device": torch.cuda.get_device_name(), "uuid": str(torch.cuda.get_device_properties(0).uuid),
        "torch": torch.__version__, "triton": triton.__version__, "cases": {},
    }  # fmt: skip
    for case in cases:
        result["cases"][case.name] = measure(Bench(case, adapters[case.kind], weights, scratch), deadline)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1))
    print(json.dumps({name: {k: v for k, v in case.items() if k != "groups"} for name, case in result["cases"].items()}))


if __name__ == "__main__":
    sys.exit(run_tool(main))
