"""Prometheus metrics of one server: LoRAX's names where they mean the same, `manylora_*` for the rest.

Owns the registry and its labels. Their values are from closed sets, but for adapters, of which a fleet has thousands: only so many have
series of their own (`AdapterSeries`). Does not know where the numbers come from: the API observes requests, and copies the engine's
counters here from each heartbeat.
"""

import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol
from weakref import WeakValueDictionary

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
disable_created_metrics()  # a second gauge a series, which nobody reads

_SECONDS = tuple(0.0001 * 1.5**k for k in range(1, 36))  # LoRAX's buckets
_COARSE_SECONDS = tuple(0.01 * 2.0**k for k in range(15))  # for what there are many of: 10 ms to 160 s
_TOKENS = tuple(float(1 << k) for k in range(17))
# prometheus_client insists on a counter's suffix; LoRAX's dashboards read the names without it.
_LORAX_COUNTER = re.compile(rb"^((?:# (?:HELP|TYPE) )?lorax_\w+?)_total\b", re.MULTILINE)

FAILURES = ("overloaded", "validation", "generation", "incomplete", "dropped", "template", "download_adapter", "unavailable", "internal")
_ENGINE = {  # field of ipc.messages.EngineStats -> (name, what it is); *_total are counters
    "num_running": ("lorax_batch_current_size", "Sequences that are being generated"),
    "num_waiting": ("lorax_queue_length", "Sequences that wait for their first step"),
    "num_tokens": ("manylora_tokens_held", "Tokens of all sequences, queued and running"),
    "max_tokens": ("manylora_tokens_max", "Tokens that the KV blocks hold"),
    "max_batch_size": ("manylora_batch_size_max", "Sequences of one step at most"),
    "num_blocks_used": ("manylora_kv_blocks_used", "KV blocks held by sequences"),
    "num_blocks": ("manylora_kv_blocks", "KV blocks there are"),
    "num_blocks_cached": ("manylora_kv_blocks_cached", "KV blocks that hold a prefix that can be reused, in use or not"),
    "num_steps": ("manylora_engine_steps_total", "Steps of the engine"),
    "num_prompt_tokens": ("manylora_prompt_tokens_total", "Prompt tokens taken in"),
    "num_cached_tokens": ("manylora_cached_prompt_tokens_total", "Prompt tokens read from the prefix cache"),
    "num_output_tokens": ("manylora_output_tokens_total", "Tokens generated"),
    "num_preemptions": ("manylora_preemptions_total", "Sequences put back to be computed again for want of blocks"),
    "num_adapters_device": ("manylora_adapters_device", "Adapters in device memory"),
    "num_adapters_host": ("manylora_adapters_host", "Adapters in host memory"),
    "adapter_bytes_device": ("manylora_adapter_bytes_device", "Bytes of adapters in device memory"),
    "adapter_bytes_host": ("manylora_adapter_bytes_host", "Bytes of adapters in host memory"),
}
ENGINE_COUNTERS = frozenset(field for field, (name, _) in _ENGINE.items() if name.endswith("_total"))


class Underway(Protocol):
    """A request that has not ended."""

    @property
    def adapter(self) -> str | None:
        """The adapter's id; None: the base, or not known yet."""
        ...

    @property
    def state(self) -> Literal["preparing", "waiting", "running"]:
        """Checked, fetched and tokenized; with the engine and without a token; with a token."""
        ...


class AdapterSeries:
    """Requests by adapter. The first `max_adapters` that answer a request have series of their own, the others share `_other`; one that
    nobody asked for in `idle_s` gives its place up, and its series go. Merged adapters share `_merged`."""

    def __init__(
        self, registry: CollectorRegistry, max_adapters: int, *, idle_s: float = 3600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        labels = ["adapter", "source"]
        self._max, self._idle_s, self._clock = max_adapters, idle_s, clock
        self._places: OrderedDict[tuple[str, str], float] = OrderedDict()  # adapter, source -> last used; the longest idle first
        self.requests = Counter("manylora_adapter_requests", "Requests answered in full", labels, registry=registry)
        self.failures = Counter("manylora_adapter_request_failures", "Requests that failed", labels, registry=registry)
        self.tokens = Counter("manylora_adapter_generated_tokens", "Tokens generated", labels, registry=registry)
        self.first_token = _histogram(
            registry, "manylora_adapter_time_to_first_token_seconds", "Seconds from arrival to first token", _COARSE_SECONDS, labels
        )
        self.duration = _histogram(
            registry, "manylora_adapter_request_duration_seconds", "Seconds from arrival to the last byte", _COARSE_SECONDS, labels
        )

    def succeeded(self, adapter: str, source: str, *, num_tokens: int, first_token_s: float, duration_s: float) -> None:
        """A request was answered in full."""
        labels = self._labels(adapter, source, place=True)
        self.requests.labels(*labels).inc()
        self.tokens.labels(*labels).inc(num_tokens)
        self.first_token.labels(*labels).observe(first_token_s)
        self.duration.labels(*labels).observe(duration_s)

    def failed(self, adapter: str, source: str) -> None:
        """A request failed. An id that never answered one has no place: anybody can make ids up."""
        self.failures.labels(*self._labels(adapter, source, place=False)).inc()

    def totals(self) -> list[dict[str, Any]]:
        """What each series counted: adapter, source, requests, failures, tokens, first_token_s (added up)."""
        columns = {
            "requests": _samples(self.requests, "_total"), "failures": _samples(self.failures, "_total"),
            "tokens": _samples(self.tokens, "_total"),
        }  # fmt: skip
        first_token = _samples(self.first_token, "_sum")
        return [
            {"adapter": adapter, "source": source}
            | {name: int(values.get((adapter, source), 0)) for name, values in columns.items()}
            | {"first_token_s": first_token.get((adapter, source), 0.0)}
            for adapter, source in sorted(set().union(*columns.values()))
        ]

    def _labels(self, adapter: str, source: str, *, place: bool) -> tuple[str, str]:
        key, now = (adapter, source), self._clock()
        if place and key not in self._places and adapter != "_merged":
            if len(self._places) >= self._max and self._places and now - next(iter(self._places.values())) > self._idle_s:
                idle, _ = self._places.popitem(last=False)
                for family in (self.requests, self.failures, self.tokens, self.first_token, self.duration):
                    if idle in family._metrics:
                        family.remove(*idle)
            if len(self._places) < self._max:
                self._places[key] = now
        if key in self._places:
            self._places[key] = now
            self._places.move_to_end(key)
            return key
        return ("_merged" if adapter == "_merged" else "_other", "")


class TenantSeries:
    """What tenants add, if there are any. Their reasons and limits are from closed sets; tenants have no series of their own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.valid = Gauge("manylora_tenants_file_valid", "Whether the tenants file as it is now is in force", registry=registry)
        self.tenants = Gauge("manylora_tenants", "Tenants that the file names", registry=registry)
        self.refused = Counter(
            "manylora_callers_refused", "Requests without a credential that holds, by reason", ["reason"], registry=registry
        )
        self.limited = Counter(
            "manylora_limit_refusals", "Requests refused by a limit of a tenant or adapter", ["limit"], registry=registry
        )


class RequestSums(NamedTuple):
    """All requests of a server since its start."""

    requests: float
    succeeded: float
    failed: float
    first_token_s: float  # added up


class Metrics:
    """All series of one server, in a registry of their own.

    `underway`: the requests that have not ended, by id; `on_end` is called with each one that has."""

    def __init__(self, *, max_adapters: int = 100) -> None:
        self.registry = CollectorRegistry()
        self.underway: WeakValueDictionary[str, Underway] = WeakValueDictionary()
        self.on_end: Callable[[Any], None] = lambda request: None
        self.adapters = AdapterSeries(self.registry, max_adapters)
        self._engine: dict[str, float] = {}
        r = self.registry
        self.request_count = Counter("lorax_request_count", "Requests to generate", registry=r)
        self.request_success = Counter("lorax_request_success", "Requests answered in full", registry=r)
        self.request_failure = Counter("lorax_request_failure", "Requests that failed, by cause", ["err"], registry=r)
        self.request_duration = _histogram(r, "lorax_request_duration", "Seconds from arrival to the last byte", _SECONDS)
        self.validation_duration = _histogram(r, "lorax_request_validation_duration", "Seconds to check and tokenize", _SECONDS)
        self.queue_duration = _histogram(r, "lorax_request_queue_duration", "Seconds a sequence waited in the engine", _SECONDS)
        self.inference_duration = _histogram(r, "lorax_request_inference_duration", "Seconds from first step to last token", _SECONDS)
        self.time_per_token = _histogram(r, "lorax_request_mean_time_per_token_duration", "Seconds a token after the first", _SECONDS)
        self.time_to_first_token = _histogram(r, "manylora_time_to_first_token_seconds", "Seconds from arrival to first token", _SECONDS)
        self.input_length = _histogram(r, "lorax_request_input_length", "Tokens of the prompt", _TOKENS)
        self.max_new_tokens = _histogram(r, "lorax_request_max_new_tokens", "Tokens asked for", _TOKENS)
        self.generated_tokens = _histogram(r, "lorax_request_generated_tokens", "Tokens generated", _TOKENS)
        self.in_flight = Gauge("manylora_sequences_in_flight", "Sequences admitted and not yet ended", registry=r)
        self.engine_up = Gauge("manylora_engine_up", "Engines that answer", registry=r)
        self.engine_starts = Counter("manylora_engine_starts", "Times that the engine was started", registry=r)
        self.adapter_resolutions = Counter("manylora_adapter_resolutions", "Adapters resolved, by outcome", ["outcome"], registry=r)
        self.adapter_resolve = _histogram(r, "manylora_adapter_resolve_seconds", "Seconds to find, fetch and pack an adapter", _SECONDS)
        self.adapter_states = Counter("manylora_adapter_states", "Changes of an adapter's tier", ["state"], registry=r)
        self.adapter_load = _histogram(r, "manylora_adapter_load_seconds", "Seconds to bring an adapter to a tier", _SECONDS, ["tier"])
        for cause in FAILURES:
            self.request_failure.labels(err=cause)
        r.register(_EngineCounters(self._engine))
        r.register(_RequestStates(self.underway))

    def failed(self, cause: str) -> None:
        """Count a failed request; a cause outside FAILURES counts as internal."""
        self.request_failure.labels(err=cause if cause in FAILURES else "internal").inc()

    def observe_engine(self, stats: Mapping[str, float]) -> None:
        """Take over the engine's numbers (fields of EngineStats)."""
        self._engine.update(stats)

    def engine_numbers(self) -> dict[str, float]:
        """The engine's last numbers (fields of EngineStats)."""
        return dict(self._engine)

    def request_sums(self) -> RequestSums:
        """What the counters of all requests say."""
        counters = (self.request_count, self.request_success, self.request_failure, self.time_to_first_token)
        suffixes = ("_total", "_total", "_total", "_sum")
        return RequestSums(*(sum(_samples(one, end).values()) for one, end in zip(counters, suffixes, strict=True)))

    def render(self) -> bytes:
        """The text exposition format."""
        return _LORAX_COUNTER.sub(rb"\1", generate_latest(self.registry))


class _EngineCounters:
    """Shows the last heartbeat's numbers; a restarted engine counts from zero, which Prometheus takes for a reset."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = values

    def collect(self) -> Iterator[Metric]:
        for field, (name, description) in _ENGINE.items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(name, description, value=self._values.get(field, 0))
        yield GaugeMetricFamily(
            "manylora_load_ratio", "What is queued and running against what fits at once", value=load_ratio(self._values)
        )


def load_ratio(stats: Mapping[str, float]) -> float:
    """How full the engine is, the queue included: the larger of tokens held against tokens that fit the KV cache, and sequences held
    against those of one step. 1: a newcomer waits; 2: as much again is queued. 0 while the engine starts."""
    shares = (
        (stats.get("num_tokens", 0), stats.get("max_tokens", 0)),
        (stats.get("num_running", 0) + stats.get("num_waiting", 0), stats.get("max_batch_size", 0)),
    )
    return max((held / most for held, most in shares if most), default=0.0)


class _RequestStates:
    """Counts the requests under way by state."""

    def __init__(self, underway: Mapping[str, Underway]) -> None:
        self._underway = underway

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("manylora_requests_underway", "Requests that have not ended, by state", labels=["state"])
        states = [one.state for one in self._underway.values()]
        for state in ("preparing", "waiting", "running"):
            family.add_metric([state], states.count(state))
        yield family


def _samples(family: Counter | Histogram, suffix: str) -> dict[tuple[str, ...], float]:
    """Label values -> value, of the family's samples of that suffix."""
    return {tuple(one.labels.values()): one.value for found in family.collect() for one in found.samples if one.name.endswith(suffix)}


def _histogram(
    registry: CollectorRegistry, name: str, description: str, buckets: tuple[float, ...], labels: Sequence[str] = ()
) -> Histogram:
    return Histogram(name, description, labels, buckets=buckets, registry=registry)
