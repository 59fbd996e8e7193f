"""sizing/measured.json: the steps that plans take their efficiency from, out of the saved runs on an H100. `tables` writes it.

Of each quantization scheme the newest run that has a decode step of it with adapters and without.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.table import saved
from sizing.quantization import scheme_named

PATH = Path(__file__).parent.parent / "sizing" / "measured.json"


def measured() -> str:
    """The file as the results have it now."""
    runs = saved()[::-1]
    rows = [(path, run, row) for path, run in runs for row in run.get("rows", []) if row.get("engine") == "ours" and row.get("rate")]
    rows = [each for each in rows if (each[2].get("options") or {}).get("kv_cache_dtype", "auto") == "auto"]  # what plans count from
    decode: list[dict[str, Any]] = []
    for scheme in sorted({_scheme(row) for _, _, row in rows}):
        for path, _ in runs:
            steps = [_step(row, path.name) for of, _, row in rows if of == path and row["part"] == "decode" and _scheme(row) == scheme]
            if {bool(step["num_adapters"]) for step in steps} == {True, False}:
                decode += steps
                break
    path, run, requests = next(each for each in rows if each[2]["part"] == "offline-base" and _scheme(each[2]) == "bf16")
    found = {
        "gpu": "H100",
        "model": run["machine"]["model"],
        "requests": {"file": path.name} | {name: requests[name] for name in ("num_requests", "prompt_len", "num_new", "seconds")},
        "decode": decode,
    }
    return json.dumps(found, indent=1) + "\n"


def _scheme(row: dict[str, Any]) -> str:
    return scheme_named((row.get("options") or {}).get("quantize") or "bf16").name


def _step(row: dict[str, Any], file: str) -> dict[str, Any]:
    step = {"scheme": _scheme(row), "file": file, "rows": row["num_requests"], "num_adapters": row["num_adapters"]}
    step |= {name: row[name] for name in ("step_ms", "prompt_len", "num_new")}
    return step | ({"rank": row["rank"], "modules": row["modules"]} if row["num_adapters"] else {})
