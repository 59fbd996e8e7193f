"""What keys and values in fewer bits do to a model's text, as one result and as the documentation's table. No torch.

Rows come from `python -m benchmarks.gpu_quant --perplexity --kv`. Called by benchmarks.gpu_quant and docs.tables.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import Row

RESULTS = Path(__file__).resolve().parent / "results"
_NAMES = {"float32": "float32 (`auto` on a CPU)", "bfloat16": "bfloat16 (`auto` on a GPU)", "fp8": "e4m3 (`fp8`)"}
_ABOUT = ("model", "text", "num_tokens", "window", "day", "commit", "versions")


def kv_rows(rows: Sequence[Row]) -> list[Row]:
    """Those of the newest run that has all three types, in the table's order. Empty if there is none."""
    found = {row["kv"]: row for row in rows if row["part"] == "kv"}
    return [found[name] for name in _NAMES] if found.keys() >= _NAMES.keys() else []


def make_result(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows that `kv_rows` found. ValueError if there are none, or they are not of one text and commit."""
    if not rows or any(row[name] != rows[0][name] for row in rows for name in _ABOUT):
        raise ValueError("the rows of keys and values are not of one run")
    figures = {f"kv_{row['kv']}_perplexity_drift": row["drift"] for row in rows[1:]}
    about = {name: rows[0][name] for name in _ABOUT}
    return {"benchmark": "kv_cache", **about, "figures": figures, "rows": list(rows)}


def table(result: dict[str, Any]) -> str:
    """The table of a result, in Markdown."""
    lines = [
        "| keys and values in | perplexity | drift | logits off: mean | at most | of their spread | same likeliest token |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [_NAMES[row["kv"]], f"{row['perplexity']:.3f}"]
        exact = row["kv"] == "float32"
        cells += (
            ["", "", "", "", ""] if exact else [f"{row['drift']:+.2%}", f"{row['logit_error_mean']:.3f}", f"{row['logit_error_max']:.2f}"]
        )
        cells += [] if exact else [f"{row['logit_error_relative']:.1%}", f"{row['same_greedy']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {number.split('+')[0]}" for name, number in result["versions"].items() if name != "triton")
    text = f"{result['num_tokens']} tokens of {result['text']} in windows of {result['window']}"
    when = f"{result['day']}, commit {result['commit']}"
    lines.append(f"\n{result['model']}, float32 beside the cache, {text}, on a CPU; {when}; {versions}.")
    return "\n".join(lines)


def newest() -> str:
    """The table of the newest saved result."""
    found = max(RESULTS.glob("kv-*.json"), default=None)
    return "Not measured yet." if found is None else table(json.loads(found.read_text()))


def save(result: dict[str, Any]) -> Path:
    """Write the result under the day and the commit."""
    path = RESULTS / f"kv-{result['day']}-{result['commit']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
