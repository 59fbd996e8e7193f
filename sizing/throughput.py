"""Tokens a second that a card can be expected to make: a roofline, and how much of it was reached where it was measured.

A decode step reads the weights, every sequence's keys and values and the adapters of its rows; a prompt's token is arithmetic. What its
bytes alone would take, over what a step took on the measured card, is the efficiency. It is carried over to another card as it is, and so
is the time that launching the adapters' kernels adds: every figure of a card that was not measured is a projection. `measured.json` is made
from benchmarks/results by `python -m docs.tables`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sizing import budget
from sizing.adapters import ALL_LINEAR, adapter_bytes
from sizing.errors import SizingError
from sizing.instances import GPUS, Gpu
from sizing.models import known_shape
from sizing.quantization import scheme_named
from sizing.shape import ModelShape
from sizing.weights import Weights, weights_of

MEASURED: dict[str, Any] = json.loads(Path(__file__).with_name("measured.json").read_text(encoding="utf-8"))
_MODULES = {"all": [ALL_LINEAR], "qv": ["q_proj", "v_proj"]}  # of benchmarks.gpu


@dataclass(frozen=True)
class StepBytes:
    """What a decode step reads."""

    weights: float
    kv: float
    adapters: float


def step_bytes(
    shape: ModelShape, weights: Weights, *, rows: int, context: float, num_adapters: int, bytes_of_adapter: int, kv_bytes: int = 2
) -> StepBytes:
    """A step of `rows` sequences of `context` tokens each, each row with one of `num_adapters`, evenly chosen. `kv_bytes`: of one value of
    a key or value."""
    share = 1.0
    if weights.experts:
        layers = [layer.experts for layer in shape.layers if layer.experts]
        share = sum(each.expected(rows) for each in layers) / sum(each.count for each in layers)
    head = weights.embedding if shape.is_tied else weights.head
    read = weights.linears + weights.other + head + weights.experts * share
    windows = ((layer.attention.values_per_token, layer.attention.window) for layer in shape.layers)
    kv = rows * kv_bytes * sum(values * (context if window is None else min(context, window)) for values, window in windows)
    return StepBytes(read, kv, distinct(num_adapters, rows) * bytes_of_adapter)


def distinct(num_adapters: int, rows: int) -> float:
    """Adapters that a step is expected to read, each row choosing evenly."""
    return num_adapters * (1.0 - (1.0 - 1.0 / num_adapters) ** rows) if num_adapters else 0.0


def flops_per_token(shape: ModelShape) -> float:
    """Of one token through the decoder: twice its active parameters (attention over the context is left out)."""
    active = sum(linear.num_params for group in shape.groups for linear in group)
    active += sum(layer.experts.per_token * layer.experts.params_each for layer in shape.layers if layer.experts)
    return 2.0 * active


@dataclass(frozen=True)
class Efficiency:
    """Shares of what the card could do: of its bandwidth by (rows, share), for base and adapters; of its arithmetic for prompts.
    `launch_us`: what a group's pair of LoRA kernels costs a step however little it reads."""

    scheme: str
    launch_us: float
    base: tuple[tuple[int, float], ...]
    adapters: tuple[tuple[int, float], ...]
    prompts: float

    def base_at(self, rows: int) -> float:
        """At so many rows, between the nearest that were measured."""
        return _between(self.base, rows)

    def adapters_at(self, rows: int) -> float:
        """Likewise."""
        return _between(self.adapters, rows)


def _between(points: Sequence[tuple[int, float]], rows: int) -> float:
    """Straight lines over log2(rows); the ends hold beyond."""
    if rows <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if rows <= right:
            return low + (high - low) * math.log2(rows / left) / math.log2(right / left)
    return points[-1][1]


def measured_schemes() -> list[str]:
    """The schemes that there are measurements of."""
    return sorted({row["scheme"] for row in MEASURED["decode"]})


@cache
def efficiency_of(scheme: str) -> Efficiency:
    """What was reached with a scheme; of one that was not measured bf16's, under its name. SizingError if there are no measurements."""
    gpu, shape = GPUS[MEASURED["gpu"]], known_shape(MEASURED["model"])
    name = scheme if scheme in measured_schemes() else "bf16"
    rows = [row for row in MEASURED["decode"] if row["scheme"] == name]
    weights = weights_of(shape, name)
    base, adapters = [], []
    plain = {row["rows"]: row for row in rows if not row["num_adapters"]}
    for count, row in sorted(plain.items()):
        read = _bytes_of(shape, weights, row)
        base.append((count, (read.weights + read.kv) / (gpu.bandwidth_gb_s * 1e6 * row["step_ms"])))
    most: dict[int, dict[str, Any]] = {}
    for row in rows:
        if row["num_adapters"] and row["rows"] in plain and row["num_adapters"] >= most.get(row["rows"], row)["num_adapters"]:
            most[row["rows"]] = row
    added_ms = {count: row["step_ms"] - plain[count]["step_ms"] for count, row in most.items()}
    launch_ms = max(0.0, added_ms.get(1, 0.0) - _adapters_ms(gpu, shape, weights, most.get(1)))
    for count, row in sorted(most.items()):
        if row["num_adapters"] > 1 and added_ms[count] > launch_ms:
            adapters.append((count, min(1.0, _adapters_ms(gpu, shape, weights, row) / (added_ms[count] - launch_ms))))
    if not base or not adapters:
        raise SizingError(f"there is no measured decode step of {name} with and without adapters in sizing/measured.json")
    launch_us = 1000 * launch_ms / len(list(shape.groups))
    return Efficiency(name, launch_us, tuple(base), tuple(adapters), _prompts_efficiency(gpu, shape, plain))


def _adapters_ms(gpu: Gpu, shape: ModelShape, weights: Weights, row: dict[str, Any] | None) -> float:
    """What a measured step's adapters take by their bytes alone."""
    return _bytes_of(shape, weights, row).adapters / (gpu.bandwidth_gb_s * 1e6) if row else 0.0


def _bytes_of(shape: ModelShape, weights: Weights, row: dict[str, Any]) -> StepBytes:
    one = adapter_bytes(shape, row["rank"], _MODULES[row["modules"]]) if row["num_adapters"] else 0
    read = step_bytes(shape, weights, rows=row["rows"], context=row["prompt_len"] + row["num_new"] / 2, num_adapters=0, bytes_of_adapter=0)
    return StepBytes(read.weights, read.kv, min(row["num_adapters"], row["rows"]) * one)  # the benchmark's rows take them in turn


def _prompts_efficiency(gpu: Gpu, shape: ModelShape, plain: dict[int, dict[str, Any]]) -> float:
    """What is left of a run of whole requests when its decode steps are taken off is its prompts'."""
    run = MEASURED["requests"]
    decode = plain[max(plain)]
    decode_s = run["num_requests"] * run["num_new"] / decode["rows"] * decode["step_ms"] / 1000
    flops = run["num_requests"] * run["prompt_len"] * flops_per_token(shape)
    return min(1.0, flops / (gpu.tflops * 1e12 * max(1e-9, run["seconds"] - decode_s)))


@dataclass(frozen=True)
class Throughput:
    """One card's figures. `step_ms`: a decode step; `tokens_per_s`: output of all sequences, their prompts' time in it; `per_sequence`:
    tokens a second that one of them sees; `bound`: what holds a decode step up; `is_projection`: the card, the scheme or the
    cache's type was not measured."""

    step_ms: float
    base_ms: float
    adapters_ms: float
    tokens_per_s: float
    per_sequence: float
    bound: str
    base_efficiency: float
    adapters_efficiency: float
    prompts_efficiency: float
    launch_us: float
    is_projection: bool


def throughput(
    shape: ModelShape,
    gpu: Gpu,
    *,
    rows: int,
    prompt_len: int,
    output_len: int,
    num_adapters: int = 0,
    bytes_of_adapter: int = 0,
    scheme: str | None = None,
    dtype: str = "bf16",
    kv_cache_dtype: str = "auto",
) -> Throughput:
    """`rows` sequences that run all the time, each with a prompt of `prompt_len` and an answer of `output_len` tokens."""
    chosen = scheme_named(scheme or shape.quantization or dtype)
    found = efficiency_of(chosen.name)
    read = step_bytes(
        shape,
        weights_of(shape, scheme, dtype),
        rows=rows,
        context=prompt_len + output_len / 2,
        num_adapters=num_adapters,
        bytes_of_adapter=bytes_of_adapter,
        kv_bytes=budget.kv_item_bytes(kv_cache_dtype, round(scheme_named(dtype).bits / 8)),
    )
    per_ms = gpu.bandwidth_gb_s * 1e6
    memory_ms = (read.weights + read.kv) / (per_ms * found.base_at(rows))
    arithmetic_ms = rows * flops_per_token(shape) / (gpu.tflops * 1e9 * found.prompts)
    launches_ms = found.launch_us * len(list(shape.groups)) / 1000 if read.adapters else 0.0
    adapters_ms = launches_ms + read.adapters / (per_ms * found.adapters_at(rows))
    base_ms = max(memory_ms, arithmetic_ms)
    step_s = (base_ms + adapters_ms) / 1000
    prompt_s = prompt_len * flops_per_token(shape) / (gpu.tflops * 1e12 * found.prompts)
    per_token_s = step_s / rows + prompt_s / output_len
    return Throughput(
        step_ms=base_ms + adapters_ms,
        base_ms=base_ms,
        adapters_ms=adapters_ms,
        tokens_per_s=1 / per_token_s,
        per_sequence=1 / per_token_s / rows,
        bound="bandwidth" if memory_ms >= arithmetic_ms else "arithmetic",
        base_efficiency=found.base_at(rows),
        adapters_efficiency=found.adapters_at(rows),
        prompts_efficiency=found.prompts,
        launch_us=found.launch_us,
        is_projection=gpu.name != MEASURED["gpu"] or chosen.name not in measured_schemes() or kv_cache_dtype != "auto",
    )
