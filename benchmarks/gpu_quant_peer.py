"""vLLM's rows of benchmarks.gpu_quant beside ours: the pairs that are compared, their figures, and README's table of them. No torch.

Compared is what is alike in size: fp8 with fp8, our `int4` with AWQ (4 bits, groups of 128, whole zeros). Of AWQ there are two kernels in
vLLM, what it chooses itself and Marlin: each case is compared with the faster. Called by gpu_quant_table.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.rows import Row

# Ours -> vLLM's; what a case is called, in a column's words and in a figure's
PAIRS = {"bf16": ("bf16",), "fp8": ("fp8",), "int4": ("awq", "awq-marlin")}
_COLUMNS = (
    ("decode1 base", "1 row, ms a step", "decode1"), ("decode1 r16-all x1", "with one adapter", "decode1_lora"),
    ("decode64 base", "64 rows, ms a step", "decode64"), ("decode64 r16-qv x25", "25 adapters r16 on q, v", "decode64_qv"),
    ("decode64 r16-all x25", "25 adapters r16 on all", "decode64_all"), ("base", "768 x 256/128, tokens/s", "offline"),
    ("r16-all x25", "with 25 adapters", "offline_all"),
)  # fmt: skip


def cases_of(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """The medians of one scheme's repeats by case: `rate`, and `step_ms` of decode."""
    cases: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["case"] for row in rows if row["part"] != "start"):
        same = [row for row in rows if row["case"] == name]
        cases[name] = {"rate": statistics.median(row["rate"] for row in same)}
        if "step_ms" in same[0]:
            cases[name]["step_ms"] = statistics.median(row["step_ms"] for row in same)
    return cases


def peer_of(rows: Sequence[Row]) -> dict[str, Any] | None:
    """What a result keeps of vLLM's rows; None if there are none."""
    if not rows:
        return None
    schemes = {row["scheme"]: [other for other in rows if other["scheme"] == row["scheme"]] for row in rows}
    return {
        "versions": rows[-1]["versions"], "gpus": sorted({row.get("gpu_uuid", "") for row in rows}),
        "schemes": {name: cases_of(of) for name, of in schemes.items()},
    }  # fmt: skip


def peer_figures(schemes: dict[str, dict[str, Any]], peer: dict[str, Any]) -> dict[str, float]:
    """Ours / vLLM's, by scheme and case: of what both have measured."""
    figures = {}
    for ours in PAIRS:
        for case, _, name in _COLUMNS:
            mine, theirs = schemes.get(ours, {"cases": {}})["cases"].get(case), _fastest(peer, ours, case)
            if mine and theirs:
                figures[f"{ours}_{name}_to_vllm"] = round(mine["rate"] / theirs[1]["rate"], 3)
    return figures


def _fastest(peer: dict[str, Any], ours: str, case: str) -> tuple[str, dict[str, float]] | None:
    """(vLLM's scheme, its figures) of the fastest of those that one of ours is compared with."""
    found = [(name, peer["schemes"][name][case]) for name in PAIRS[ours] if case in peer["schemes"].get(name, {})]
    return max(found, key=lambda one: one[1]["rate"], default=None)


def peer_table(result: dict[str, Any]) -> list[str]:
    """The lines of the table, in Markdown: here, vLLM, and how many times its speed ours is."""
    peer = result["vllm"]
    lines = [
        "\nBeside vLLM, each cell: here / vLLM (how many times as fast):\n",
        "| here / vLLM | " + " | ".join(head for _, head, _ in _COLUMNS) + " |", "|" + "---|" * (1 + len(_COLUMNS)),
    ]  # fmt: skip
    for ours, theirs in PAIRS.items():
        if any(name in peer["schemes"] for name in theirs):
            cells = [_cell(result, ours, case) for case, _, _ in _COLUMNS]
            lines.append(f"| {ours} / {theirs[0]} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {number}" for name, number in peer["versions"].items())
    lines.append(f"\nvLLM: {versions}; of AWQ's kernels the faster{_with_marlin(peer)}.{_other_card(result)}")
    return lines


def _cell(result: dict[str, Any], ours: str, case: str) -> str:
    mine = result["schemes"].get(ours, {"cases": {}})["cases"].get(case)
    found = _fastest(result["vllm"], ours, case)
    if found is None:
        return "-"
    name, theirs = found
    field, digits = ("step_ms", 2) if "step_ms" in theirs else ("rate", 0)
    there = f"{theirs[field]:.{digits}f}" + (" m" if name == "awq-marlin" else "")
    if mine is None:
        return f"- / {there}"
    return f"{mine[field]:.{digits}f} / {there} ({mine['rate'] / theirs['rate']:.2f}x)"


def _with_marlin(peer: dict[str, Any]) -> str:
    return ", m: Marlin's" if "awq-marlin" in peer["schemes"] else ""


def _other_card(result: dict[str, Any]) -> str:
    """Said where a ratio is of two cards."""
    ours = {row.get("gpu_uuid", "") for row in result["rows"] if row.get("engine") != "vllm"}
    return "" if {*result["vllm"]["gpus"]} <= ours else " Not all of vLLM's rows are of the same card."
