"""The part `arrivals`: thousands of registered adapters over HTTP with streaming, requests that come when they come.

First the peak: all requests at once, on the base. Then Poisson arrivals at a share of it, for a minute on the base alone and for a minute
with adapters drawn by Zipf's law; both have the same times of arrival and the same lengths. The server is started anew for the part, so an
adapter's first request finds it on disk (packed in the store, in the page cache) and is cold; all later ones of it count as warm.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clients import Answer
from benchmarks.gpu.rows import Row, installed
from benchmarks.gpu.serve import RandomServer
from benchmarks.gpu.traffic import seconds_of, send
from benchmarks.gpu.workloads import AdapterSet, Case, Sizes, poisson_times, sizes, throughput_case, zipf

_SHARE_OF_PEAK = 0.6
_ZIPF_ALPHA = 1.0
_NUM_WARM_UP_ADAPTERS = 8


def arrival_adapters(of: Sizes) -> AdapterSet:
    """The registered ones, and a few more for the warm-up, so that no measured adapter has been asked for."""
    return replace(of.many, count=of.num_registered + _NUM_WARM_UP_ADAPTERS)


def measure_arrivals(bench: Bench, server: RandomServer) -> None:
    """Peak, base, adapters."""
    of = sizes(bench.model)
    num_packs = _num_packs(bench)
    peak = _peak(bench, server, of)
    rate = _SHARE_OF_PEAK * peak / of.num_new
    times = poisson_times(rate, of.load_s, "arrivals")
    print(f"ours: arrivals, peak {peak:.0f} tokens/s, so {rate:.1f} requests/s: {len(times)} in {of.load_s:.0f} s", flush=True)
    common = {
        "engine": "ours", "part": "arrivals", "versions": installed(), "options": bench.options, "num_clients": bench.num_clients,
        "peak": round(peak, 1), "requests_s": round(rate, 2), "num_requests": len(times), "prompt_len": of.prompt_len,
        "num_new": of.num_new, "num_registered": of.num_registered, "rank": of.many.rank, "modules": of.many.modules,
    }  # fmt: skip
    loads: list[tuple[str, list[int | None]]] = [
        ("base", [None] * len(times)),
        ("zipf", [*zipf(len(times), of.num_registered, _ZIPF_ALPHA, "arrivals")]),
    ]
    for name, picks in loads:
        case = Case("arrivals", name, len(times), of.prompt_len, of.num_new, of.many)
        before = server.cpu_seconds()
        answers = send(bench, server.url, case, 2, stream=True, times=times, picks=picks)
        row = {"case": name, "num_adapters": len(set(picks) - {None})} | latencies(answers, times, picks)
        row |= {f"{process}_cpu_s": round(used - before[process], 1) for process, used in server.cpu_seconds().items()}
        row["num_packs_made"] = _num_packs(bench) - num_packs
        print(f"ours: arrivals, {name}: " + ", ".join(f"{key} {row[key]}" for key in row if key.endswith("_ms")), flush=True)
        bench.keep([common | row])


def _peak(bench: Bench, server: RandomServer, of: Sizes) -> float:
    """Output tokens a second on the base with all requests at once, streamed, after a warm-up of base and adapters."""
    extra = [of.num_registered + i for i in range(_NUM_WARM_UP_ADAPTERS)]
    adapters = Case("arrivals", "warm-up", 2 * len(extra), of.prompt_len, of.num_new, arrival_adapters(of))
    send(bench, server.url, adapters, 0, stream=True, picks=extra * 2)
    base = throughput_case("arrivals", of, None)
    send(bench, server.url, replace(base, num_requests=max(1, of.num_requests // 3)), 0, stream=True)
    return base.num_output_tokens / seconds_of(send(bench, server.url, base, 1, stream=True))


def latencies(answers: Sequence[Answer], times: Sequence[float], picks: Sequence[int | None]) -> Row:
    """Percentiles in milliseconds. Between tokens: all gaps of all streams. To the first token: from the time that the request was due, of
    all, and of an adapter's first and later requests. `late`: how far behind their time requests were sent."""
    gaps = [after - before for answer in answers for before, after in zip(answer.event_times, answer.event_times[1:], strict=False)]
    firsts = [answer.event_times[0] - at for answer, at in zip(answers, times, strict=True)]
    seen: set[int] = set()
    cold: list[float] = []
    warm: list[float] = []
    for first, pick in zip(firsts, picks, strict=True):
        if pick is not None:
            (warm if pick in seen else cold).append(first)
            seen.add(pick)
    lateness = [answer.sent_at - at for answer, at in zip(answers, times, strict=True)]
    row: Row = {"num_cold": len(cold), "num_warm": len(warm)}
    for name, values in (("itl", gaps), ("ttft", firsts), ("ttft_cold", cold), ("ttft_warm", warm), ("late", lateness)):
        if values:
            row |= {f"{name}_p{p}_ms": round(1000 * percentile(values, p), 3) for p in (50, 99)}
    return row


def percentile(values: Sequence[float], percent: int) -> float:
    """With linear interpolation between the two nearest (numpy's default)."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _num_packs(bench: Bench) -> int:
    """Packs in the server's store: more than before means that the server had to pack while it served."""
    return sum(1 for _ in (bench.work / "store" / "packs").glob("*.pack"))
