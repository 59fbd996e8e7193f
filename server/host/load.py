"""The server's own numbers as the fleet's metrics: reads /metrics on loopback, publishes LoadRatio and a few beside it.

LoadRatio is what is queued and running against what fits at once (server.metrics.load_ratio); the scaling policy holds its average at
`scaling.target_utilization`. Nothing is published while the server does not answer or drains: a missing instance must not look idle.
"""

import http.client
import json
import logging
from pathlib import Path

from server.errors import SHUTTING_DOWN
from server.host.group import Group

log = logging.getLogger(__name__)

PUBLISHED = {  # series of the server -> metric
    "manylora_load_ratio": "LoadRatio",
    "lorax_queue_length": "Queued",
    "lorax_batch_current_size": "Running",
    "manylora_adapters_device": "AdaptersOnDevice",
    "manylora_adapters_host": "AdaptersInHost",
    "manylora_kv_blocks_used": "KvBlocksUsed",
    "manylora_kv_blocks": "KvBlocks",
}
RATES = {"manylora_output_tokens_total": "OutputTokens"}  # counters: what was added since the last time
_TIMEOUT_S = 3.0


class ServerProbe:
    """The server on this instance, over loopback."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._host, self._port = host, port

    def is_serving(self) -> bool:
        """Whether /health is 200."""
        return self.health()[0] == 200

    def health(self) -> tuple[int, str]:
        """Status and body of /health; 0 if the server does not answer."""
        return self._get("/health")

    @staticmethod
    def is_leaving(status: int, reason: str) -> bool:
        """Whether an answer of `health` is that of a server which was told to stop."""
        return status == 503 and SHUTTING_DOWN in reason

    def samples(self) -> dict[str, float]:
        """Unlabelled series of /metrics by name; empty if the server does not answer."""
        status, text = self._get("/metrics")
        if status != 200:
            return {}
        lines = (line.split() for line in text.splitlines() if line and not line.startswith("#") and "{" not in line)
        return {name: float(value) for name, value, *_ in lines}

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException):
            return 0, ""
        finally:
            connection.close()


class LoadReport:
    """Publishes what the probe sees."""

    def __init__(self, probe: ServerProbe, group: Group) -> None:
        self._probe, self._group = probe, group
        self._last: dict[str, float] = {}

    def step(self) -> dict[str, float]:
        """Read once and publish; what was published."""
        if not self._probe.is_serving():
            self._last = {}
            return {}
        samples = self._probe.samples()
        values = {metric: samples[series] for series, metric in PUBLISHED.items() if series in samples}
        for series, metric in RATES.items():
            if series in samples and series in self._last:
                values[metric] = max(samples[series] - self._last[series], 0.0)  # a restarted engine counts from zero
        self._last = samples
        self._group.publish(values, high_resolution=True)
        return values


def publish_boot(record: Path, group: Group) -> bool:
    """Publish as BootSeconds, once, the steps of the boot that user-data wrote down, {"step", "seconds"} a line. False: none yet."""
    if group.name is None or not record.is_file():
        return False
    for line in record.read_text().splitlines():
        try:
            step = json.loads(line)
            group.publish({"BootSeconds": float(step["seconds"])}, unit="Seconds", Step=str(step["step"]))
        except (ValueError, KeyError, TypeError):
            log.warning("%s: not a step: %s", record, line[:200])
    record.rename(record.with_suffix(".published"))
    return True
