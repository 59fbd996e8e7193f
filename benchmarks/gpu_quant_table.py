"""Rows of benchmarks.gpu_quant as one result, and as README's table. No torch: the documentation's tables are made from saved results.

Speed is the median of a case's repeats; shares and ratios are of one run on one card. vLLM's rows are left to gpu_quant_peer. Called by
benchmarks.gpu_quant and docs.tables.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import Row
from benchmarks.gpu_quant_peer import cases_of

RESULTS = Path(__file__).resolve().parent / "results"
FP8_KV = ", fp8 KV"  # follows a scheme's name where keys and values were in e4m3
_ORDER = ("bf16", "fp8", "int8", "int4", "hqq", "nf4")
# What the columns ask for: (part, case without its adapters)
_ONE, _MANY = "decode1 ", "decode64 "


def make_result(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows by scheme, with perplexities beside them. ValueError if there is no speed of bf16 to compare with."""
    speeds = [row for row in rows if row.get("scheme") and "gpu" in row and row["part"] in ("decode", "offline", "start")]
    speeds = [row for row in speeds if row.get("engine") != "vllm"]
    perplexities = {row["scheme"]: row for row in rows if row["part"] == "perplexity"}
    measured = {row["scheme"] for row in speeds} | {"bf16" if name == "as it is" else name for name in perplexities}
    schemes = {scheme: _scheme([row for row in speeds if row["scheme"] == scheme]) for scheme in _in_order(measured)}
    if "bf16" not in schemes:
        raise ValueError("there is no row of bf16")
    for scheme, values in schemes.items():
        found = perplexities.get("as it is" if scheme == "bf16" else scheme)
        values["perplexity_drift"] = None if found is None else found["drift"]
    machine = {key: speeds[-1][key] for key in ("gpu", "driver", "python", "commit", "code", "model", "day")} if speeds else {}
    text = next(({key: row[key] for key in ("model", "text", "num_tokens")} for row in perplexities.values()), {})
    return {
        "benchmark": "gpu_quant", "machine": machine, "versions": speeds[-1]["versions"] if speeds else {}, "text": text,
        "figures": _figures(schemes), "schemes": schemes,
        "perplexities": {name: row["perplexity"] for name, row in perplexities.items()}, "rows": speeds,
    }  # fmt: skip


def _in_order(measured: set[str]) -> list[str]:
    return [name for scheme in _ORDER for name in (scheme, scheme + FP8_KV) if name in measured]


def _scheme(rows: Sequence[Row]) -> dict[str, Any]:
    """A scheme's medians by case, and bytes."""
    return {"weight_bytes": next((row["weight_bytes"] for row in rows if row["part"] == "start"), None), "cases": cases_of(rows)}


def _figures(schemes: dict[str, dict[str, Any]]) -> dict[str, float]:
    figures = {}
    for scheme, values in schemes.items():
        ratio = _ratio(_of(values, _ONE + "base"), _of(schemes["bf16"], _ONE + "base"))
        share = _share(values)
        name = scheme.replace(FP8_KV, "_fp8_kv")
        figures |= {f"{name}_decode1_to_bf16": ratio} if ratio else {}
        figures |= {f"{name}_lora_share_decode64": share} if share is not None else {}
    return figures


def _of(values: dict[str, Any], start: str, field: str = "rate") -> float | None:
    """A case's figure, by the beginning of its name."""
    return next((case.get(field) for name, case in values["cases"].items() if name.startswith(start)), None)


def _share(values: dict[str, Any]) -> float | None:
    """LoRA's share of a step of 64 rows with 25 adapters of rank 16 on q and v."""
    base, with_adapters = _of(values, _MANY + "base", "step_ms"), _of(values, _MANY + "r16-qv", "step_ms")
    return None if base is None or with_adapters is None else round(1 - base / with_adapters, 3)


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else round(above / below, 3)


def table(result: dict[str, Any]) -> str:
    """README's table of a result, in Markdown."""
    head = ("scheme", "weights, GB", "1 row, ms a step", "with one adapter", "64 rows, ms a step", "25 adapters r16 on q, v (LoRA's share)",
            "25 adapters r16 on all", "768 x 256/128, tokens/s", "with 25 adapters", "perplexity")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for scheme, values in result["schemes"].items():
        share, drift, size = _share(values), values["perplexity_drift"], values["weight_bytes"]
        cells = (
            scheme, _shown(size and size / 1e9, 1), _step(values, _ONE + "base", result),
            _shown(_of(values, _ONE + "r16-all", "step_ms"), 2), _step(values, _MANY + "base", result),
            _shown(_of(values, _MANY + "r16-qv", "step_ms"), 2) + ("" if share is None else f" ({share:.0%})"),
            _shown(_of(values, _MANY + "r16-all", "step_ms"), 2), _shown(_of(values, "base"), 0), _shown(_of(values, "r16-all"), 0),
            "-" if drift is None else f"{drift:+.2%}" if scheme != "bf16" else "0 (it is 4-bit once more)",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    machine, text = result["machine"], result["text"]
    if not machine:
        lines.append("\nSpeed: not measured on a GPU yet.")
    else:
        versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        lines.append(f"\nSpeed: {machine['day']}, commit {machine['commit']}, {machine['gpu']}, {machine['model']}'s shape; {versions}.")
    if text:
        lines.append(f"Perplexity: {text['model']}, float32 with rounded weights, {text['num_tokens']} tokens of {text['text']}.")
    return "\n".join(lines)


def _step(values: dict[str, Any], start: str, result: dict[str, Any]) -> str:
    """Milliseconds, and times bf16's speed."""
    mine, base = _of(values, start, "step_ms"), _of(result["schemes"]["bf16"], start, "step_ms")
    ratio = _ratio(base, mine)
    return _shown(mine, 2) + ("" if ratio is None or values is result["schemes"]["bf16"] else f" ({ratio:.2f}x)")


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def newest() -> str:
    """The table of the newest saved result."""
    files: Iterable[Path] = RESULTS.glob("quant-*.json")
    found = max(files, default=None)
    return "Not measured on a GPU yet." if found is None else table(json.loads(found.read_text()))


def save(result: dict[str, Any]) -> Path:
    """Write the result under the day and the commit; perplexities alone under a name that any speed is newer than."""
    machine = result["machine"]
    path = RESULTS / f"quant-{machine['day']}-{machine['commit']}.json" if machine else RESULTS / "quant-0-perplexity.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
