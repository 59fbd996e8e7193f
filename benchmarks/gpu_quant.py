"""Quantized bases with adapters on top: speed and memory on a GPU, and what rounding does to the embedded model's perplexity.

    python -m benchmarks.gpu_quant --out rows.jsonl                      # on the GPU: every scheme, as long as --limit-s allows
    python -m benchmarks.gpu_quant --option kv_cache_dtype=fp8 --out rows.jsonl     # keys and values in e4m3
    python -m benchmarks.gpu_quant --engine vllm --vllm-site DIR --out rows.jsonl   # vLLM's fp8 and AWQ on the same cases
    python -m benchmarks.gpu_quant --perplexity --out perplexity.jsonl   # on a CPU, with the embedded model
    python -m benchmarks.gpu_quant --perplexity --kv --out kv.jsonl      # the same of keys and values in fewer bits
    python -m benchmarks.gpu_quant --table FILE.. [--save]

Speed: Mistral-7B's shape with random weights, rounded at the start as a checkpoint would be; each scheme in a process of its own, rows
appended as they come. vLLM rounds to fp8 while it loads, as ours does; its AWQ (what `int4` is in size and form) is of a checkpoint whose
weights are made up, with the kernel that it chooses and with Marlin's. Perplexity: of SmolLM2-135M on the reference that Python carries
with it (pydoc_data.topics). The embedded model was 4-bit once (Q4_1), which flatters what 4 bits do to it.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.arguments import default_work, option
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import AWQ, MODELS, write_model
from benchmarks.gpu.offline import run_ours, run_vllm
from benchmarks.gpu.rows import read_rows, stamp
from benchmarks.gpu.workloads import AdapterSet, Case, sizes, throughput_case
from benchmarks.gpu_quant_table import FP8_KV
from sizing.printing import run_tool

SCHEMES = ("bf16", "int4", "fp8", "int8", "hqq", "nf4")
# vLLM's: arguments of its LLM, and what the checkpoint says of itself
VLLM_SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "bf16": ({}, None),
    "fp8": ({"quantization": "fp8"}, None),
    "awq": ({}, AWQ),
    "awq-marlin": ({"linear_backend": "marlin"}, AWQ),
}


def cases(model: str, names: Sequence[str]) -> list[Case]:
    """Decode at 1 and 64 rows and 768 requests at once, each with and without adapters; the names that are asked for."""
    of = sizes(model)
    qv = AdapterSet(of.few.rank, "qv", of.few.count)
    one, many = of.decode_batches[:2]
    found = []
    for batch, adapters, count in ((one, None, 0), (one, of.few, 1), (many, None, 0), (many, qv, qv.count), (many, of.few, of.few.count)):
        name = f"decode{batch} " + (f"{adapters.name} x{count}" if adapters else "base")
        found.append(Case("decode", name, batch, of.decode_prompt_len, of.decode_num_new, adapters, count))
    found += [throughput_case("offline", of, None), throughput_case("offline", of, of.few)]
    return [case for case in found if not names or any(case.name.startswith(name) or case.part == name for name in names)]


def measure(arguments: argparse.Namespace) -> bool:
    """Every scheme of each engine while there is time. False if one of them did not come to its end."""
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    deadline_at = time.monotonic() + arguments.limit_s
    bench = Bench(
        model=arguments.model,
        model_dir=write_model(work, arguments.model),
        device=arguments.device,
        work=work,
        out=arguments.out,
        stamp=stamp(arguments.model, arguments.device, arguments.commit),
        repeats=arguments.repeats,
        vllm_repeats=arguments.repeats,
        deadline_at=deadline_at,
        options=dict(arguments.option),
        vllm_site=arguments.vllm_site,
        vllm_options=dict(arguments.vllm_option),
        max_loras=(),
        num_clients=0,
    )
    done = True
    asked = [(engine, scheme) for engine in arguments.engine for scheme in _schemes(engine, arguments.scheme)]
    for engine, scheme in asked:
        left_s = deadline_at - time.monotonic()
        if left_s < arguments.least_s:
            print(f"{engine}, {scheme}: no time left", flush=True)
            done = False
            continue
        limited = replace(bench, deadline_at=time.monotonic() + min(left_s, arguments.scheme_limit_s))
        started_at = time.monotonic()
        ended = _run(limited, engine, scheme, cases(arguments.model, arguments.case))
        print(f"{engine}, {scheme}: {'done' if ended else 'not all of it'} in {time.monotonic() - started_at:.0f} s", flush=True)
        done &= ended
    return done


def _schemes(engine: str, names: Sequence[str]) -> list[str]:
    """Those of the names that the engine has; all that it has if none is named."""
    known = tuple(VLLM_SCHEMES) if engine == "vllm" else SCHEMES
    return [name for name in names or known if name in known]


def _run(bench: Bench, engine: str, scheme: str, chosen: Sequence[Case]) -> bool:
    of_keys = FP8_KV if engine == "ours" and bench.options.get("kv_cache_dtype") == "fp8" else ""
    one = replace(bench, stamp=bench.stamp | {"scheme": scheme + of_keys})
    if engine == "ours":
        own = {} if scheme == "bf16" else {"quantize": scheme}
        return run_ours(replace(one, options=bench.options | own), chosen)
    options, quantization = VLLM_SCHEMES[scheme]
    model_dir = write_model(bench.work, bench.model, quantization)
    return run_vllm(replace(one, model_dir=model_dir, vllm_options=options | bench.vllm_options), chosen)


def main(argv: Sequence[str]) -> int:
    """0 if all that was asked for is measured, 1 if something of it is missing, 2 for arguments that cannot be."""
    arguments = _parse(argv)
    try:
        if arguments.table:
            return _tables(arguments)
        if arguments.perplexity:
            from benchmarks.gpu_quant_perplexity import measure_kv, measure_perplexity

            if arguments.kv:
                return 0 if measure_kv(arguments.out, arguments.tokens) else 1
            return 0 if measure_perplexity(arguments.out, arguments.tokens, arguments.scheme) else 1
        return 0 if measure(arguments) else 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _tables(arguments: argparse.Namespace) -> int:
    """The tables of what the files have rows of: schemes, keys and values, ours beside vLLM's."""
    from benchmarks import gpu_quant_kv_table, gpu_quant_peer, gpu_quant_table

    rows = read_rows(arguments.table)
    of_kv = gpu_quant_kv_table.kv_rows(rows)
    beside = [row for row in rows if row["part"] != "kv"] if any(row.get("engine") == "vllm" for row in rows) else []
    has_base = any(row.get("scheme") in ("bf16", "as it is") and row.get("engine") != "vllm" for row in rows)
    schemes = [row for row in rows if row["part"] != "kv"] if has_base or not beside else []  # where ours is there only beside vLLM's
    for module, own in ((gpu_quant_table, schemes), (gpu_quant_kv_table, of_kv), (gpu_quant_peer, beside)):
        if own or (module is gpu_quant_table and not of_kv and not beside):
            try:
                result = module.make_result(own)
            except ValueError as error:
                if module is not gpu_quant_peer or not schemes:
                    raise
                print(f"\nno table beside vLLM: {error}")  # ours has its own
                continue
            print(module.table(result))
            if arguments.save:
                print(f"\nwrote {module.save(result)}")
            print(json.dumps({"benchmark": result["benchmark"], "figures": result["figures"]}))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_quant", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--perplexity", action="store_true", help="of the embedded model, on a CPU")
    parser.add_argument("--kv", action="store_true", help="with --perplexity: of the types that keys and values are kept in")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="make the table of these files of rows")
    parser.add_argument("--save", action="store_true", help="with --table: keep the result under benchmarks/results")
    parser.add_argument("--out", type=Path, default=Path("quant.jsonl"), help="file that rows are appended to (%(default)s)")
    parser.add_argument("--engine", nargs="+", choices=["ours", "vllm"], default=["ours"], help="in this order (ours)")
    parser.add_argument("--scheme", nargs="+", choices=[*dict.fromkeys((*SCHEMES, *VLLM_SCHEMES))], default=[], help="in this order (all)")
    parser.add_argument("--vllm-site", type=Path, help="folder that vLLM is in; without it, it must be importable")
    parser.add_argument("--vllm-option", nargs="*", type=option, default=[], metavar="NAME=VALUE", help="more arguments of vLLM's LLM")
    parser.add_argument("--case", nargs="+", default=[], metavar="NAME", help="beginnings of cases' names, or 'decode', 'offline' (all)")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text, for the perplexity (%(default)s)")
    parser.add_argument("--model", choices=sorted(MODELS), default="mistral-7b")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--work", type=Path, default=default_work(), help="folder for adapters and packs (%(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="of each measurement, while there is time (2)")
    parser.add_argument("--limit-s", type=float, default=520.0, help="seconds for the whole call (520)")
    parser.add_argument("--scheme-limit-s", type=float, default=240.0, help="seconds for one scheme (240)")
    parser.add_argument("--least-s", type=float, default=45.0, help="seconds without which a scheme is not begun (45)")
    parser.add_argument("--option", nargs="*", type=option, default=[], metavar="NAME=VALUE", help="fields of EngineOptions, for ours")
    parser.add_argument("--commit", help="the commit that is measured, where git cannot say it")
    arguments: Any = parser.parse_args(argv)
    return arguments


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
