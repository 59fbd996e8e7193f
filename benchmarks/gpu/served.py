"""The parts over HTTP on one server: `http`, and `arrivals` in a file of its own.

Owns the server's start, with the adapters of all parts in its folder and packed in its store. Called by __main__ and by start.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.gpu.adapters import register_adapters, write_adapters
from benchmarks.gpu.arrivals import arrival_adapters, measure_arrivals
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.offline import run_ours
from benchmarks.gpu.plan import default_options, result
from benchmarks.gpu.rows import installed
from benchmarks.gpu.serve import RandomServer
from benchmarks.gpu.traffic import seconds_of, send
from benchmarks.gpu.workloads import AdapterSet, Case, sizes, throughput_case


def run_served(bench: Bench, parts: Sequence[str]) -> bool:
    """The parts, in order, on one server. False if the base's layout could not be had."""
    of = sizes(bench.model)
    sets = [of.few] * ("http" in parts) + [arrival_adapters(of)] * ("arrivals" in parts)
    if not bench.layout_path.exists() and not run_ours(bench, []):
        return False
    with make_server(bench, sets) as server:
        server.wait_healthy(bench.deadline_at)
        server.wait_captured(bench.deadline_at)
        if "http" in parts:
            measure_http(bench, server)
        if "arrivals" in parts:
            measure_arrivals(bench, server)
    return True


def make_server(bench: Bench, sets: Sequence[AdapterSet], **environment: str) -> RandomServer:
    """A server, starting, with the sets' adapters in its folder, and in its store if the base's layout is known."""
    folders = [folder for adapters in sets for folder in write_adapters(bench.work, bench.model, adapters)]
    adapters_dir, store_dir = bench.work / "adapters", bench.work / "store"
    if bench.layout_path.exists():
        ids = [adapters.id(bench.model, index) for adapters in sets for index in range(adapters.count)]
        settled_at = max(folder.stat().st_mtime for folder in folders)
        register_adapters(ids, settled_at, bench.layout_path.read_bytes(), bench.model_dir, adapters_dir, store_dir)
    log = bench.work / f"server-{time.monotonic_ns()}.log"
    options = default_options(bench.plan([])) | bench.options
    return RandomServer(bench.model_dir, adapters_dir, store_dir, log, options, **environment)


def direct_case(of_model: str) -> Case:
    """The traffic of `http`, for the engine called directly: the few large adapters in turn, all requests at once."""
    of = sizes(of_model)
    return replace(throughput_case("http", of, of.few), name="direct")


def measure_http(bench: Bench, server: RandomServer) -> None:
    """The same requests as the engine called directly gets, not streamed and streamed in turn."""
    case = direct_case(bench.model)
    common = {"engine": "ours", "versions": installed(), "options": bench.options, "num_clients": bench.num_clients}
    send(bench, server.url, case, 0, stream=False)
    for repeat in range(1, bench.repeats + 1):
        for stream in (False, True):
            seconds = seconds_of(send(bench, server.url, case, repeat, stream=stream))
            row = result(case, repeat, seconds) | {"case": "streamed" if stream else "not streamed"}
            print(f"ours: http, {row['case']}, repeat {repeat}: {row['rate']} tokens/s", flush=True)
            bench.keep([common | row])
        if time.monotonic() + 3 * seconds > bench.deadline_at:
            break
