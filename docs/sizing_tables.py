"""Tables of docs/sizing.md: schemes, what fits, how fast by roofline, the prediction against what was reserved. `tables` fills them in."""

import json
from pathlib import Path

from benchmarks.gpu_memory import PARTS, compare
from sizing.adapters import ALL_LINEAR, adapter_bytes
from sizing.fit import Demand, Model, fit
from sizing.instances import INSTANCES
from sizing.memory import EngineLimits
from sizing.models import known_shape
from sizing.quantization import SCHEMES
from sizing.throughput import MEASURED, efficiency_of, measured_schemes
from sizing.weights import weights_of

_MODELS = ("llama-3.2-3b", "mistral-7b", "llama-2-7b", "llama-3.1-8b", "llama-2-13b", "qwen2.5-14b")
_INSTANCES = ("g6.xlarge", "g6e.xlarge")
_RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def sizing_schemes() -> str:
    """Every scheme, and what the 7B of the article takes in it."""
    rows = ["| `quantize` | bytes a weight | what is stored | Llama-2-7B, GB |", "|---|---|---|---|"]
    for name, scheme in SCHEMES.items():
        if name in ("fp16", "fp32"):  # a dtype, not a quantization
            continue
        whole = weights_of(known_shape("llama-2-7b"), name).total / 1e9
        rows.append(f"| `{name}` | {scheme.bytes_per_weight:.3g} | {scheme.what} | {whole:.2f} |")
    return "\n".join(rows)


def sizing_fits() -> str:
    """Well-known models with 25 adapters of rank 16 on all linears, 16 sequences at once."""
    head = " | ".join(f"{name}: free, GB | tokens/s | USD/M tokens" for name in _INSTANCES)
    rows = [f"| model | weights, GB | {head} |", f"|---|---|{'---|---|---|' * len(_INSTANCES)}"]
    for name in _MODELS:
        for scheme in ("bf16", "int4"):
            shape = known_shape(name)
            model = Model(shape=shape, limits=EngineLimits.of(shape, {}), scheme=scheme)
            demand = Demand(num_adapters=25, bytes_of_adapter=adapter_bytes(shape, 16, [ALL_LINEAR]), concurrency=16)
            cells = [f"{name}, {scheme}", f"{weights_of(shape, scheme).total / 1e9:.1f}"]
            for instance in _INSTANCES:
                found = fit(model, demand, INSTANCES[instance])
                free = (found.memory.room - found.adapters - found.kv) / 1e9
                million = found.usd_per_million
                fits = [f"{free:.1f}", f"{found.full_tokens_per_s:.0f}", "?" if million is None else f"{million:.2f}"]
                cells += fits if found.fits else [f"{free:.1f}: does not fit", "", ""]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def sizing_efficiency() -> str:
    """What was reached of the measured card, by scheme and rows."""
    rows = ["| scheme | rows | base: share of the bandwidth | adapters: share of the bandwidth |", "|---|---|---|---|"]
    for scheme in measured_schemes():
        found = efficiency_of(scheme)
        adapters = dict(found.adapters)
        rows += [f"| `{scheme}` | {count} | {share:.2f} | {_share(adapters.get(count))} |" for count, share in found.base]
    bf16, files = efficiency_of("bf16"), sorted({row["file"] for row in MEASURED["decode"]})
    rows.append(
        f"\nPrompts reach {bf16.prompts:.2f} of the card's bfloat16 arithmetic; launching the kernels of one adapter or more adds "
        f"{bf16.launch_us:.1f} us a group of linears and step. {MEASURED['gpu']}, {MEASURED['model']}; {', '.join(files)}."
    )
    return "\n".join(rows)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def sizing_memory() -> str:
    """The prediction against the newest record of a GPU."""
    files = sorted(_RESULTS.glob("*-memory.json"))
    if not files:
        return "Not recorded yet: `python -m benchmarks.gpu_memory` on a GPU, then `python -m docs.tables`."
    record = json.loads(files[-1].read_text())
    rows = [f"| model | {' | '.join(f'{part}, GB (predicted)' for part in PARTS)} | used of what is set aside |", f"|---|{'---|' * 4}"]
    for case in record["cases"]:
        found, took = compare(case), case["reserved"]
        cells = [f"{took[part] / 1e9:.2f} ({100 * found[part]:+.1f}%)" for part in PARTS]
        rows.append(f"| {case['model']} | {' | '.join(cells)} | {100 * found['set aside']:.0f}% |")
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    rows.append(f"\n{record['day']}, commit {record['commit']}, {record['gpu']}; {versions}.")
    return "\n".join(rows)


TABLES = {
    "sizing_schemes": sizing_schemes,
    "sizing_fits": sizing_fits,
    "sizing_efficiency": sizing_efficiency,
    "sizing_memory": sizing_memory,
}
