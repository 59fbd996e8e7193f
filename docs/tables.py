"""`python -m docs.tables`: writes the tables of docs/*.md that are facts of the code; tests/test_docs.py fails when they have drifted.

A table lies between two comments, `<!-- table: NAME -->` and `<!-- end -->`.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import gpu_quant_kv_table, gpu_quant_peer, gpu_quant_table
from benchmarks.gpu.table import newest, readme_table
from docs import (
    cli_tables,
    deploy_tables,
    edge_tables,
    fault_table,
    flag_tables,
    measured,
    openai_tables,
    parity,
    server_settings,
    sizing_tables,
    tenant_tables,
)
from server.adapters.config import FIELDS
from server.settings.fields import Settings
from sizing.printing import run_tool

FOLDER = Path(__file__).parent
_TABLE = re.compile(r"(<!-- table: ([a-z_]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_KINDS = {"applied": "applied", "inert": "without effect", "refused": "refused"}


def lora_fields() -> str:
    """Every field of PEFT's LoraConfig and what is done with it."""
    rows = ["| field | here | why, or what is allowed |", "|---|---|---|"]
    rows += [f"| `{name}` | {_KINDS[field.kind]} | {field.reason} |" for name, field in FIELDS.items()]
    return "\n".join(rows)


def settings() -> str:
    """Every setting."""
    rows = ["| flag | default | what it is | also read from |", "|---|---|---|---|"]
    group = None
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        if extra["group"] != group:
            group = extra["group"]
            rows.append(f"| **{group}** | | | |")
        default = "required" if field.is_required() else "auto" if field.default is None else f"`{field.default}`"
        also = f"`{extra['lorax']}`" if extra["lorax"] else ""
        rows.append(f"| `--{name.replace('_', '-')}` | {default} | {field.description} | {also} |")
    return "\n".join(rows)


def architectures() -> str:
    """Every verified architecture."""
    source = (FOLDER.parent / "server" / "model" / "architectures.py").read_text()  # the module's package imports torch
    return ", ".join(f"`{name}`" for name in sorted(re.findall(r'^        "([a-z0-9_]+)",$', source, re.MULTILINE)))


def cpu_benchmark() -> str:
    """The newest saved run of `make bench`."""
    newest = max((FOLDER.parent / "benchmarks" / "results").glob("*-cpu-*.json"))
    result = json.loads(newest.read_text())
    rows = [
        "| batch | PEFT, adapters mixed | here, adapters mixed | here, base only | here / PEFT | mixed / base |",
        "|---|---|---|---|---|---|",
    ]
    for size, row in result["rows"].items():
        rates = (row["peft_mixed"], row["ours_mixed"], row["ours_base"])
        rows.append(f"| {size} | {' | '.join(str(rate) for rate in rates)} | {row['ratio_to_peft']} | {row['ratio_mixed_to_base']} |")
    versions = ", ".join(f"{name} {number.split('+')[0]}" for name, number in result["versions"].items())
    machine = result["machine"]
    rows.append(f"\n{result['day']}, commit {result['commit']}, {machine['cores']} cores ({machine['processor']}), {versions}.")
    return "\n".join(rows)


def gpu_benchmark() -> str:
    """The newest saved run of `python -m benchmarks.gpu` on an H100."""
    return readme_table(*newest())


TABLES: dict[str, Callable[[], str]] = {
    "lora_fields": lora_fields,
    "settings": settings,
    "lorax_flags": flag_tables.lorax_flags,
    "vllm_flags": flag_tables.vllm_flags,
    "lorax_api": parity.table,
    "faults": fault_table.table,
    "openai_fields": openai_tables.openai_fields,
    "openai_refused": openai_tables.openai_refused,
    "architectures": architectures,
    "cpu_benchmark": cpu_benchmark,
    "gpu_benchmark": gpu_benchmark,
    "quantizations": gpu_quant_table.newest,
    "quantizations_beside_vllm": gpu_quant_peer.newest,
    "kv_names": flag_tables.kv_names,
    "kv_types": gpu_quant_kv_table.newest,
    "quantization_names": flag_tables.quantization_names,
    **cli_tables.TABLES,
    **deploy_tables.TABLES,
    **edge_tables.TABLES,
    **sizing_tables.TABLES,
    **tenant_tables.TABLES,
}


def fill(text: str) -> str:
    """`text` with every table in it as the code has it now."""
    return _TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def pages() -> list[Path]:
    """Every page of the documentation."""
    return sorted([*FOLDER.glob("*.md"), FOLDER.parent / "README.md"])


def main() -> int:
    """Write the tables that have changed, the deployment's list of settings, and what plans are measured by."""
    for path, made in ((server_settings.PATH, server_settings.server_settings()), (measured.PATH, measured.measured())):
        if not path.exists() or path.read_text() != made:
            path.write_text(made)
            print(f"wrote {path.name}")
    for page in pages():
        text = page.read_text()
        if fill(text) != text:
            page.write_text(fill(text))
            print(f"wrote {page.name}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
