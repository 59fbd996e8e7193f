"""vLLM's gauge `vllm:lora_requests_info`, by which gateways route a request to a server that has its adapter.

Owns no state: what is under way comes from the metrics, what is in memory from api.residency. `running_lora_adapters` lists adapters with
running requests, then those in device memory, the last used first, as long as a step has room for another; `waiting_lora_adapters` those
that requests wait for; `max_lora` is how many a step can mix.
"""

import time
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from server.api.residency import Residency
from server.metrics import Metrics

_LABELS = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")


class LoraRequestsInfo:
    """One sample at each scrape, its value the time."""

    def __init__(self, metrics: Metrics, residency: Residency, max_lora: int) -> None:
        self._metrics, self._residency, self._max = metrics, residency, max_lora

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        requests = [(one.adapter, one.state) for one in self._metrics.underway.values() if one.adapter is not None]
        running = dict.fromkeys(name for name, state in requests if state == "running")
        waiting = dict.fromkeys(name for name, state in requests if state != "running" and name not in running)
        for name in self._resident():
            if len(running) >= self._max - 1:  # a full list would turn away newcomers, for whom an idle one gives way here
                break
            running.setdefault(name)
        family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters that requests run with, or that are in memory", labels=_LABELS)
        family.add_metric([str(self._max), _joined(running), _joined(waiting)], time.time())
        yield family

    def _resident(self) -> list[str]:
        uses = [(adapter_id, use.ref.hash) for (_, adapter_id, merge), use in self._residency.uses() if merge is None]
        tiers = [(name, self._residency.tier(adapter_hash)) for name, adapter_hash in reversed(uses)]
        return [name for name, tier in tiers if tier is not None and tier.state == "device"]


def _joined(names: dict[str, None]) -> str:
    return ",".join(name.replace(",", "%2C") for name in names)
