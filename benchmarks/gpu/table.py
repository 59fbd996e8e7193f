"""From rows to figures, ratios and the table: what was to be reached, what was measured. No torch.

Owns which rows may stand side by side (one machine since one boot, one code) and which of them count: of each engine, part and case the
newest run's, their median. A figure whose rows are missing is missing, never guessed.
"""

import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import Row
from benchmarks.gpu.workloads import Sizes, sizes

RESULTS = Path(__file__).resolve().parents[1] / "results"
_SAME = {"gpu_uuid": "GPU", "boot_id": "boot of the machine", "code": "code under server/", "commit": "commit", "model": "base model"}
_MACHINE = ("gpu", "gpu_uuid", "driver", "boot_id", "cores", "python", "commit", "code", "model", "day")


class Measured:
    """The rows that count, by engine, part, case and vLLM's settings."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows: dict[tuple[str, str, str, str], list[Row]] = {}
        for row in rows:
            key = (row["engine"], row["part"], row["case"], json.dumps(row.get("settings", {}), sort_keys=True))
            kept = self._rows.setdefault(key, [])
            if kept and kept[0]["run"] != row["run"]:
                kept.clear()
            kept.append(row)

    def value(self, engine: str, part: str, case: str, field: str = "rate", max_loras: int | None = None) -> float | None:
        """The median over repeats; with several settings of vLLM the best of them, or of those with `max_loras`."""
        medians = self._medians(engine, part, case, field)
        return max((value for settings, value in medians if max_loras is None or settings.get("max_loras") == max_loras), default=None)

    def best_settings(self, part: str, case: str) -> dict[str, Any]:
        """vLLM's settings that were the fastest."""
        return max(self._medians("vllm", part, case, "rate"), key=lambda each: each[1], default=({}, 0.0))[0]

    def _medians(self, engine: str, part: str, case: str, field: str) -> list[tuple[dict[str, Any], float]]:
        return [
            (json.loads(settings), statistics.median(row[field] for row in rows))
            for (*key, settings), rows in self._rows.items()
            if key == [engine, part, case] and all(row.get(field) is not None for row in rows)
        ]

    def all(self) -> list[dict[str, Any]]:
        """One entry a measurement: medians of its numbers, the rest as its first repeat had it."""
        entries = []
        for (engine, part, case, settings), rows in self._rows.items():
            entry: dict[str, Any] = {"engine": engine, "part": part, "case": case, "settings": json.loads(settings), "repeats": len(rows)}
            for name, value in rows[0].items():
                if name in ("phases", "options", "num_adapters", "rank", "modules", "num_requests", "prompt_len", "num_new"):
                    entry[name] = value
                elif isinstance(value, float) or name == "seconds":
                    entry[name] = round(statistics.median(row[name] for row in rows), 4)
            entries.append(entry)
        return [{name: value for name, value in entry.items() if name != "at"} for entry in entries]


@dataclass(frozen=True)
class Goal:
    """One line of the table: a figure and what it should come to."""

    figure: str
    what: str
    bound: float | None  # None: shown beside the others
    at_most: bool = False

    def verdict(self, value: float | None) -> str:
        """Whether a figure is good enough."""
        if value is None or self.bound is None:
            return ""
        return "reached" if (value <= self.bound if self.at_most else value >= self.bound) else "NOT REACHED"

    def aim(self, at_most: str, at_least: str) -> str:
        """The bound with its sign."""
        return "" if self.bound is None else f"{at_most if self.at_most else at_least} {self.bound:g}"


GOALS = [
    Goal("ratio_base_to_vllm", "base only: ours / vLLM with LoRA off", 1.0),
    Goal("ratio_few_to_base", "the large adapters (r16, all linears): ours / our base", 0.90),
    Goal("ratio_few_to_vllm", "the large adapters: ours / vLLM", 1.6),
    Goal("ratio_many_to_base", "the small adapters (r8, q and v), every request another one: ours / our base", 0.85),
    Goal("ratio_many_to_vllm", "the small adapters: ours / vLLM at its best max_loras", 3.0),
    Goal("ratio_many_to_vllm_64", "the small adapters: ours / vLLM at max_loras 64", 8.0),
    Goal("ratio_decode64_to_base", "decode64, large adapters: ours / our base", 0.85),
    Goal("ratio_decode64_to_vllm", "decode64, large adapters: ours / vLLM", 2.0),
    Goal("ratio_decode1_to_base", "decode1, one large adapter: ours / our base", 0.90),
    Goal("ratio_itl_p99_to_base", "arrivals: p99 between tokens, adapters / base", 1.15, at_most=True),
    Goal("ratio_ttft_p99_cold_to_warm", "arrivals: p99 to first token, cold adapter / warm", 2.0, at_most=True),
    Goal("start_warm_s", "start to first token, warm caches, without reading weights (s)", 30.0, at_most=True),
    Goal("start_cold_s", "start to first token, first ever, without reading weights (s)", 180.0, at_most=True),
    Goal("ratio_http_to_direct", "over HTTP, not streamed / engine called directly", 0.95),
    Goal("ratio_http_streamed_to_direct", "over HTTP, streamed / engine called directly", None),
]


def make_result(rows: Sequence[Row]) -> dict[str, Any]:
    """Figures and measurements of the rows. ValueError if they may not stand side by side, naming what differs."""
    if not rows:
        raise ValueError("there are no rows")
    for field, what in _SAME.items():
        values = {row.get(field) for row in rows}
        if len(values) > 1 or None in values:
            raise ValueError(
                f"the rows are of more than one {what} ({field}): {', '.join(sorted(map(str, values)))}; no table is made of them"
            )
    measured = Measured(rows)
    versions: dict[str, dict[str, str]] = {}
    for row in rows:
        versions.setdefault(row["engine"], {}).update(row.get("versions", {}))
    return {
        "benchmark": "gpu",
        "machine": {name: rows[-1][name] for name in _MACHINE} | {"at": max(row.get("at", 0.0) for row in rows)},
        "versions": versions,
        "figures": _figures(measured, sizes(rows[0]["model"])),
        "rows": measured.all(),
    }


def _figures(measured: Measured, of: Sizes) -> dict[str, float]:
    few, many = (f"{adapters.name} x{adapters.count}" for adapters in (of.few, of.many))
    decode = [batch for batch in of.decode_batches if batch > 1][0]
    one = f"decode1 {of.few.name} x1"
    get: Callable[..., float | None] = measured.value
    base = get("ours", "offline-base", "base")
    ours_few, ours_many = get("ours", "offline-r16", few), get("ours", "offline-r8", many)
    ours_decode = get("ours", "decode", f"decode{decode} {few}")
    direct = get("ours", "http", "direct")
    load = ("ours", "arrivals", "zipf")
    figures = {
        "ratio_base_to_vllm": _ratio(base, get("vllm", "offline-base", "base")),
        "ratio_few_to_base": _ratio(ours_few, base),
        "ratio_few_to_vllm": _ratio(ours_few, get("vllm", "offline-r16", few)),
        "ratio_many_to_base": _ratio(ours_many, base),
        "ratio_many_to_vllm": _ratio(ours_many, get("vllm", "offline-r8", many)),
        "ratio_many_to_vllm_64": _ratio(ours_many, get("vllm", "offline-r8", many, max_loras=64)),
        "vllm_best_max_loras": measured.best_settings("offline-r8", many).get("max_loras"),
        "ratio_decode64_to_base": _ratio(ours_decode, get("ours", "decode", f"decode{decode} base")),
        "ratio_decode64_to_vllm": _ratio(ours_decode, get("vllm", "decode", f"decode{decode} {few}")),
        "ratio_decode1_to_base": _ratio(get("ours", "decode", one), get("ours", "decode", "decode1 base")),
        "ratio_itl_p99_to_base": _ratio(get(*load, "itl_p99_ms"), get("ours", "arrivals", "base", "itl_p99_ms")),
        "ratio_ttft_p99_cold_to_warm": _ratio(get(*load, "ttft_cold_p99_ms"), get(*load, "ttft_warm_p99_ms")),
        "start_warm_s": get("ours", "start", "warm", "seconds_without_weights"),
        "start_cold_s": get("ours", "start", "cold", "seconds_without_weights"),
        "ratio_http_to_direct": _ratio(get("ours", "http", "not streamed"), direct),
        "ratio_http_streamed_to_direct": _ratio(get("ours", "http", "streamed"), direct),
    }
    return {name: value for name, value in figures.items() if value is not None}


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else round(above / below, 3)


def table(result: dict[str, Any]) -> str:
    """Every measurement, then every goal, as text."""
    lines = [f"{'engine':6} {'part':13} {'case':24} {'max_loras':>9} {'repeats':>7} {'tokens/s':>10} {'ms a step':>9}"]
    for row in sorted(result["rows"], key=lambda row: (row["part"], row["case"], row["engine"])):
        rate, step, loras = _shown(row.get("rate"), 1), _shown(row.get("step_ms"), 2), row["settings"].get("max_loras", "")
        more = "".join(f"  {name} {row[name]}" for name in row if name.endswith("_p99_ms") or name.startswith("seconds_"))
        line = f"{row['engine']:6} {row['part']:13} {row['case']:24} {loras:>9} {row['repeats']:>7} {rate:>10} {step:>9}{more}"
        lines.append(line.rstrip())
    lines += ["", f"{'goal':84} {'to reach':>9} {'measured':>9}"]
    for goal in GOALS:
        value = result["figures"].get(goal.figure)
        lines.append(f"{goal.what:84} {goal.aim('<=', '>='):>9} {_shown(value, 3):>9}  {goal.verdict(value)}".rstrip())
    machine = result["machine"]
    lines.append(f"\n{machine['gpu']} ({machine['gpu_uuid']}), commit {machine['commit']}, {machine['day']}; {_versions(result)}")
    return "\n".join(lines)


def readme_table(*results: dict[str, Any]) -> str:
    """The goals with what was measured, in Markdown: README's table of saved results, a column each: a card and boot."""
    heads = ["measured"] if len(results) == 1 else [f"card {number}" for number in range(1, len(results) + 1)]
    lines = [f"| on one card, same run | to reach | {' | '.join(heads)} |", "|---|---|" + "---|" * len(results)]
    for goal in GOALS:
        values = [result["figures"].get(goal.figure) for result in results]
        shown = ["not measured" if all(other is None for other in values) else "" if v is None else f"{v:g}" for v in values]
        lines.append(f"| {goal.what} | {goal.aim('≤', '≥')} | {' | '.join(shown)} |")
    machine = results[0]["machine"]
    versions = max((_versions(result) for result in results), key=len)
    lines.append(f"\n{machine['day']}, commit {machine['commit']}, {machine['gpu']}, {machine['model']} in bfloat16; {versions}.")
    return "\n".join(lines)


def newest(folder: Path = RESULTS, card: str = "h100") -> list[dict[str, Any]]:
    """The saved results of the newest commit: one, or one for each card and boot that its parts were measured on."""
    results = [result for _, result in saved(folder, card)]
    last = results[-1]["machine"]
    return [each for each in results if all(each["machine"][name] == last[name] for name in ("day", "commit"))]


def saved(folder: Path = RESULTS, card: str = "h100") -> list[tuple[Path, dict[str, Any]]]:
    """All saved results of a card, the newest last."""
    results = [(path, json.loads(path.read_text())) for path in sorted(folder.glob(f"*-{card}-*.json"))]
    return sorted(results, key=lambda each: (each[1]["machine"]["day"], each[1]["machine"].get("at", 0.0)))


def save(result: dict[str, Any]) -> Path:
    """Write the result under the day, the card and the commit, beside another card's of the same."""
    machine = result["machine"]
    card = "h100" if "H100" in machine["gpu"] else machine["gpu"].lower().replace("nvidia", "").strip().replace(" ", "-")
    RESULTS.mkdir(exist_ok=True)
    for number in itertools.count(1):
        path = RESULTS / f"{machine['day']}-{card}-{machine['commit']}{'' if number == 1 else f'-{number}'}.json"
        if not path.exists() or all(json.loads(path.read_text())["machine"][name] == machine[name] for name in ("boot_id", "gpu_uuid")):
            break
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _versions(result: dict[str, Any]) -> str:
    return "; ".join(
        f"{engine}: " + ", ".join(f"{name} {number}" for name, number in found.items()) for engine, found in result["versions"].items()
    )


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
