"""The part `start`: from starting the server's process to the first token over HTTP, with no cache at all, then with what that left behind.

Every cache of compiled code is under one new folder: torch's, Triton's, FlashInfer's, Python's bytecode, and whatever else goes below the
home folder. An installation has bytecode, a machine on which packages were only unpacked has not; here the first start always makes all of
it. The base's weights are made, not read: the phase `load` stands in the rows, and the seconds without it.
"""

import re
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clients import Ask, Load, run_load
from benchmarks.gpu.models import MODELS, as_text
from benchmarks.gpu.rows import Row, installed
from benchmarks.gpu.serve import MODEL_NAME
from benchmarks.gpu.served import make_server
from benchmarks.gpu.workloads import AdapterSet, prompts, sizes

_LOAD_PHASE = "load"
_PROGRESS = re.compile(r" engine on \S+: .* \([0-9.]+ s\)$")  # what api.engine logs of each phase


def run_start(bench: Bench) -> bool:
    """Cold, then warm."""
    few = sizes(bench.model).few
    adapters = AdapterSet(few.rank, few.modules, 1)
    with tempfile.TemporaryDirectory(dir=bench.work, prefix="caches-") as caches:
        for case in ("cold", "warm"):
            row = _measure(bench, adapters, Path(caches)) | {"engine": "ours", "part": "start", "case": case, "versions": installed()}
            print(
                f"ours: start, {case}: first token after {row['seconds']} s, {row['seconds_without_weights']} s without weights", flush=True
            )
            bench.keep([row])
    return True


def _measure(bench: Bench, adapters: AdapterSet, caches: Path) -> Row:
    with make_server(bench, [adapters], **cache_environment(caches)) as server:
        healthy_s = server.wait_healthy(bench.deadline_at)
        first_s = healthy_s + _first_token(bench, server.url, None, 0)  # starting the client is not the server's time
        adapter_s = _first_token(bench, server.url, adapters.id(bench.model, 0), 1)
        phases: dict[str, float] = server.engine_facts()["start_s"]
        progress = [line for line in server.log_lines() if _PROGRESS.search(line)]
    return {
        "seconds": round(first_s, 3),
        "seconds_without_weights": round(first_s - phases.get(_LOAD_PHASE, 0.0), 3),
        "healthy_s": round(healthy_s, 3),
        "adapter_first_token_s": round(adapter_s, 3),
        "phases": {name: round(seconds, 3) for name, seconds in phases.items()},
        "progress_lines": len(progress),
    }


def _first_token(bench: Bench, url: str, adapter: str | None, seed: int) -> float:
    """Seconds to the first token of one request."""
    of = sizes(bench.model)
    (ids,) = prompts(1, of.prompt_len, MODELS[bench.model]["vocab_size"], f"start {seed}")
    (answer,) = run_load(Load(url, MODEL_NAME, [Ask(0.0, as_text(ids), 2, adapter)], True, 1, bench.deadline_at - time.monotonic()))
    return answer.event_times[0] - answer.sent_at


def cache_environment(folder: Path) -> dict[str, str]:
    """Where compiled code is kept, all of it below `folder`."""
    return {
        "HOME": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "FLASHINFER_WORKSPACE_BASE": str(folder),
        "CUDA_CACHE_PATH": str(folder / "cuda"),
        "PYTHONPYCACHEPREFIX": str(folder / "bytecode"),
        "PYTHONDONTWRITEBYTECODE": "",  # as if it were not set
    }
