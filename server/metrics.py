"""Prometheus metrics of one server: LoRAX's names where they mean the same, `manylora_*` for the rest.

Owns the registry and its labels, whose values are all from closed sets (no adapter ids: a fleet has thousands). Does not know where the
numbers come from: the API observes requests, and copies the engine's counters here from each heartbeat.
"""

import re
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
disable_created_metrics()  # a second gauge a series, which nobody reads

_SECONDS = tuple(0.0001 * 1.5**k for k in range(1, 36))  # LoRAX's buckets
_TOKENS = tuple(float(1 << k) for k in range(17))
# prometheus_client insists on a counter's suffix; LoRAX's dashboards read the names without it.
_LORAX_COUNTER = re.compile(rb"^((?:# (?:HELP|TYPE) )?lorax_\w+?)_total\b", re.MULTILINE)

FAILURES = ("overloaded", "validation", "generation", "incomplete", "dropped", "template", "download_adapter", "unavailable", "internal")
_ENGINE = {  # field of ipc.messages.EngineStats -> (name, what it is); *_total are counters
    "num_running": ("lorax_batch_current_size", "Sequences that are being generated"),
    "num_waiting": ("lorax_queue_length", "Sequences that wait for their first step"),
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


class Metrics:
    """All series of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
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
        self.engine_up = Gauge("manylora_engine_up", "1 while the engine answers", registry=r)
        self.engine_starts = Counter("manylora_engine_starts", "Times that the engine was started", registry=r)
        self.adapter_resolutions = Counter("manylora_adapter_resolutions", "Adapters resolved, by outcome", ["outcome"], registry=r)
        self.adapter_resolve = _histogram(r, "manylora_adapter_resolve_seconds", "Seconds to find, fetch and pack an adapter", _SECONDS)
        self.adapter_states = Counter("manylora_adapter_states", "Changes of an adapter's tier", ["state"], registry=r)
        for cause in FAILURES:
            self.request_failure.labels(err=cause)
        r.register(_EngineCounters(self._engine))

    def failed(self, cause: str) -> None:
        """Count a failed request; a cause outside FAILURES counts as internal."""
        self.request_failure.labels(err=cause if cause in FAILURES else "internal").inc()

    def observe_engine(self, stats: Mapping[str, float]) -> None:
        """Take over the engine's numbers (fields of EngineStats)."""
        self._engine.update(stats)

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


def _histogram(registry: CollectorRegistry, name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(name, description, buckets=buckets, registry=registry)
