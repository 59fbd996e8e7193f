"""Rows of results: one JSON object a line, appended, each with the machine, the code and the versions that it was measured with.

The programs (ours, vLLM's) write bare rows to a file of their own as they go; the parts stamp them. So what a program that ran out of time
had measured is not lost. No torch.
"""

import hashlib
import json
import os
import platform
import subprocess
import time
import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "vllm")
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=uuid,name,driver_version", "--format=csv,noheader")


def append_row(path: Path, row: Row) -> None:
    """One line more."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """Every row of the files, in order. ValueError names the line that is no row; a last line that was cut off is left out."""
    rows = []
    for path in paths:
        lines = path.read_text().split("\n")
        for number, line in enumerate(lines[:-1], 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise ValueError(f"{path}, line {number}: not JSON") from None
    return rows


def installed(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Versions of those packages that this process could import."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def stamp(model: str, device: str, commit: str | None) -> Row:
    """What every row of this run has: run, day, machine, code. Rows are comparable if `gpu_uuid`, `boot_id` and `code` are equal."""
    uuid_, gpu, driver = _gpu(_seen(int(device.partition(":")[2] or 0))) if device != "cpu" else ("cpu", platform.machine(), "")
    return {
        "run": uuid.uuid4().hex[:12],
        "day": datetime.now(UTC).date().isoformat(),
        "at": round(time.time(), 1),
        "model": model,
        "gpu": gpu,
        "gpu_uuid": uuid_,
        "driver": driver,
        "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": commit or _commit(),
        "code": code_digest(),
    }


def code_digest() -> str:
    """Names the code that is measured, committed or not: every Python file of server/."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "server").rglob("*.py")):
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _seen(index: int) -> str:
    """The GPU that this process knows by that index: its index on the machine, or its UUID. nvidia-smi does not look at the variable."""
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    return visible[index] if index < len(visible) else str(index)


def _gpu(index: str) -> tuple[str, str, str]:
    """UUID, name, driver's version."""
    try:
        answer = subprocess.run([*_NVIDIA_SMI, "-i", index], capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        raise ValueError("--device: nvidia-smi shows no such GPU here; --model tiny --device cpu tries the programs out") from None
    uuid_, name, driver = (field.strip() for field in answer.splitlines()[0].split(","))
    return uuid_, name, driver


def _commit() -> str:
    try:
        answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return "unknown"
    return answer.stdout.strip() or "unknown"
