"""vLLM's rows of benchmarks.gpu_quant beside ours: the pairs that are compared, their figures, and the table of them. No torch.

Compared is what is alike in size: fp8 with fp8, our `int4` with AWQ (4 bits, groups of 128, whole zeros). Of AWQ there are two kernels in
vLLM, what it chooses itself and Marlin: each case is compared with the faster. A pair is of one card since one boot, two pairs may be of
two; all are of one code, the newest that was measured. Called by benchmarks.gpu_quant and docs.tables.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import Row

RESULTS = Path(__file__).resolve().parent / "results"
# Ours -> vLLM's; what a case is called, in a column's words and in a figure's
PAIRS = {"bf16": ("bf16",), "fp8": ("fp8",), "int4": ("awq", "awq-marlin")}
_COLUMNS = (
    ("decode1 base", "1 row, ms a step", "decode1"), ("decode1 r16-all x1", "with one adapter", "decode1_lora"),
    ("decode64 base", "64 rows, ms a step", "decode64"), ("decode64 r16-qv x25", "25 adapters r16 on q, v", "decode64_qv"),
    ("decode64 r16-all x25", "25 adapters r16 on all", "decode64_all"), ("base", "768 x 256/128, tokens/s", "offline"),
    ("r16-all x25", "with 25 adapters", "offline_all"),
)  # fmt: skip
_PARTS = ("decode", "offline")


def cases_of(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """The medians of one scheme's repeats by case: `rate`, and `step_ms` of decode."""
    cases: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["case"] for row in rows if row["part"] != "start"):
        same = [row for row in rows if row["case"] == name]
        cases[name] = {"rate": statistics.median(row["rate"] for row in same)}
        if "step_ms" in same[0]:
            cases[name]["step_ms"] = statistics.median(row["step_ms"] for row in same)
    return cases


def make_result(rows: Sequence[Row]) -> dict[str, Any]:
    """The pairs that were measured with the newest code. ValueError if none was, in both engines on one card since one boot."""
    speeds = [row for row in rows if row.get("scheme") and row.get("engine") and row["part"] in _PARTS]
    newest_code = max(speeds, key=lambda row: row["at"])["code"] if speeds else None
    speeds = [row for row in speeds if row["code"] == newest_code]
    pairs = {ours: pair for ours, theirs in PAIRS.items() if (pair := _pair(speeds, ours, theirs)) is not None}
    if not pairs:
        raise ValueError("no scheme has rows of both engines on one card since one boot, of the newest code: nothing can be compared")
    counted = [row for row in speeds if any(_place(row) == tuple(pair["place"]) for pair in pairs.values())]
    return {
        "benchmark": "gpu_quant_peer",
        "machine": {key: counted[-1][key] for key in ("gpu", "driver", "python", "commit", "code", "model", "day", "at")},
        "versions": {engine: next(row["versions"] for row in counted if row["engine"] == engine) for engine in ("ours", "vllm")},
        "figures": _figures(pairs), "pairs": pairs, "rows": counted,
    }  # fmt: skip


def _place(row: Row) -> tuple[str, str]:
    return row["gpu_uuid"], row["boot_id"]


def _pair(rows: Sequence[Row], ours: str, theirs: Sequence[str]) -> dict[str, Any] | None:
    """Both engines' cases of a scheme, of the place where the most cases are in both, the latest of such; None if there is none."""
    found = []
    for place in dict.fromkeys(map(_place, rows)):
        here = [row for row in rows if _place(row) == place]
        mine = cases_of([row for row in here if row["engine"] == "ours" and row["scheme"] == ours])
        other = {name: cases_of([row for row in here if row["engine"] == "vllm" and row["scheme"] == name]) for name in theirs}
        other = {name: cases for name, cases in other.items() if cases}
        if common := mine.keys() & {case for cases in other.values() for case in cases}:
            found.append((len(common), max(row["at"] for row in here), {"place": list(place), "ours": mine, "vllm": other}))
    return max(found, key=lambda each: each[:2])[2] if found else None


def _figures(pairs: dict[str, Any]) -> dict[str, float]:
    """Ours / vLLM's, by scheme and case: of what both have measured."""
    figures = {}
    for ours, pair in pairs.items():
        for case, _, name in _COLUMNS:
            mine, theirs = pair["ours"].get(case), _fastest(pair, case)
            if mine and theirs:
                figures[f"{ours}_{name}_to_vllm"] = round(mine["rate"] / theirs[1]["rate"], 3)
    return figures


def _fastest(pair: dict[str, Any], case: str) -> tuple[str, dict[str, float]] | None:
    """(vLLM's scheme, its figures) of the fastest of those that one of ours is compared with."""
    found = [(name, cases[case]) for name, cases in pair["vllm"].items() if case in cases]
    return max(found, key=lambda one: one[1]["rate"], default=None)


def table(result: dict[str, Any]) -> str:
    """In Markdown: here, vLLM, and how many times its speed ours is."""
    heads = " | ".join(head for _, head, _ in _COLUMNS)
    lines = [f"| here / vLLM (how many times as fast) | {heads} |", "|" + "---|" * (1 + len(_COLUMNS))]
    for ours, pair in result["pairs"].items():
        lines.append(f"| {ours} / {PAIRS[ours][0]} | {' | '.join(_cell(pair, case) for case, _, _ in _COLUMNS)} |")
    with_marlin = any("awq-marlin" in pair["vllm"] for pair in result["pairs"].values())
    kernels = " Of AWQ's kernels the faster, m: Marlin's." if with_marlin else ""
    cards = len({pair["place"][0] for pair in result["pairs"].values()})
    each = "" if cards == 1 else " Each line is of one card, not all of the same."
    machine = result["machine"]
    versions = "; ".join(f"{who}: " + ", ".join(map(" ".join, of.items())) for who, of in result["versions"].items())
    where = f"{machine['day']}, commit {machine['commit']}, {machine['gpu']}, {machine['model']}'s shape"
    lines.append(f"\n{where}; {versions}.{kernels}{each}")
    return "\n".join(lines)


def _cell(pair: dict[str, Any], case: str) -> str:
    mine, found = pair["ours"].get(case), _fastest(pair, case)
    if found is None:
        return "-"
    name, theirs = found
    field, digits = ("step_ms", 2) if "step_ms" in theirs else ("rate", 0)
    there = f"{theirs[field]:.{digits}f}" + (" m" if name == "awq-marlin" else "")
    if mine is None:
        return f"- / {there}"
    return f"{mine[field]:.{digits}f} / {there} ({mine['rate'] / theirs['rate']:.2f}x)"


def newest() -> str:
    """The table of the newest saved result."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob("vllm-quant-*.json")]
    return table(max(found, key=lambda result: result["machine"]["at"])) if found else "Not measured on a GPU yet."


def save(result: dict[str, Any]) -> Path:
    """Write the result under the day and the commit."""
    path = RESULTS / f"vllm-quant-{result['machine']['day']}-{result['machine']['commit']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
