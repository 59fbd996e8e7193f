"""`python -m server.host.agent`: beside the server on every instance. Drains it when the instance is to go, reports its load,
watches whether it serves, and the GPU.

Wires the parts and calls each in its own rhythm; one part's failure is logged and holds up no other. systemd restarts it, also when it
hangs (WatchdogSec); it keeps nothing.
"""

import argparse
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from server.host.gpu import GpuWatch
from server.host.group import Group
from server.host.lifecycle import SETTLE_S, Lifecycle
from server.host.load import LoadReport, ServerProbe, publish_boot
from server.host.metadata import DEFAULT_ENDPOINT, InstanceMetadata, MetadataUnavailable
from server.host.serving import DRAIN_S, HEAL_S, START_S, ServingWatch

log = logging.getLogger("server.host.agent")

LIFECYCLE_S, LOAD_S, GPU_S, BOOT_S = 5.0, 10.0, 30.0, 60.0
# Of AWS's calls, so that one which hangs stays far below the unit's WatchdogSec.
_CALLS = {"connect_timeout": 5, "read_timeout": 20, "retries": {"total_max_attempts": 3, "mode": "standard"}}


@dataclass
class Beat:
    """Work to be done every so often."""

    name: str
    every_s: float
    work: Callable[[], object]
    next_at: float = field(default=0.0)

    def run_if_due(self, now: float) -> None:
        """Run it; whatever goes wrong is logged and tried again next time."""
        if now < self.next_at:
            return
        self.next_at = now + self.every_s
        try:
            self.work()
        except Exception as error:
            log.warning("%s: %s: %s", self.name, type(error).__name__, error)


class GpuReport:
    """A fatal GPU error makes the instance unhealthy, once."""

    def __init__(self, watch: GpuWatch, group: Group) -> None:
        self._watch, self._group = watch, group
        self._is_reported = False
        self._errors: list[str] = []

    def step(self) -> None:
        """Look, and report until it got through."""
        self._errors += self._watch.errors()
        if not self._errors or self._is_reported:
            return
        for error in self._errors:
            log.error("GPU: %s", error)
        self._group.mark_unhealthy("gpu")  # first: a metric that is refused must not keep a broken GPU in service
        self._is_reported = True
        self._group.publish({"GpuErrors": float(len(self._errors))}, unit="Count")


def make_beats(flags: argparse.Namespace, metadata: InstanceMetadata, group: Group) -> list[Beat]:
    """The agent's parts."""
    probe = ServerProbe(flags.port)
    lifecycle = Lifecycle(
        metadata,
        group,
        is_serving=probe.is_serving,
        stop_server=["systemctl", "stop", flags.unit],
        start_server=["systemctl", "start", flags.unit],
        drain_hook=flags.drain_hook,
        launch_hook=flags.launch_hook,
        settle_s=flags.settle_s,
    )
    load, gpu = LoadReport(probe, group), GpuReport(GpuWatch(), group)
    bounds = {"start_s": flags.start_s, "heal_s": flags.heal_s, "drain_s": flags.drain_s}
    serving = ServingWatch(probe, group, is_wanted=lambda: lifecycle.is_wanted, **bounds)
    return [
        Beat("lifecycle", flags.lifecycle_s, lifecycle.step),
        Beat("serving", flags.lifecycle_s, serving.step),
        Beat("load", flags.load_s, lambda: None if lifecycle.is_leaving else load.step()),
        Beat("gpu", GPU_S, gpu.step),
        Beat("boot", BOOT_S, lambda: publish_boot(flags.boot_record, group)),
    ]


def _or(default: float) -> Callable[[str], float]:
    """Seconds; `default` where the environment file of an older user-data does not have them."""
    return lambda text: float(text) if text else default


def tell_watchdog(address: str) -> None:
    """systemd's "WATCHDOG=1" (sd_notify(3)); empty: nobody waits for it."""
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.sendto(b"WATCHDOG=1", f"\0{address[1:]}" if address.startswith("@") else address)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.host.agent", description="Drain, load and GPU health of one instance.")
    parser.add_argument("--port", type=int, required=True, help="of the server on this instance")
    parser.add_argument("--unit", default="manylora.service", help="systemd unit of the server")
    parser.add_argument("--drain-hook", required=True, help="lifecycle hook that holds a termination")
    parser.add_argument("--launch-hook", default="", help="lifecycle hook that holds a launch; empty: none")
    parser.add_argument("--settle-s", type=float, default=SETTLE_S, help="from the decision until the server is stopped")
    parser.add_argument("--start-s", type=_or(START_S), default=START_S, help="a server that never served yet may take; empty: the default")
    parser.add_argument("--heal-s", type=_or(HEAL_S), default=HEAL_S, help="one that served may be away, before the instance is replaced")
    parser.add_argument("--drain-s", type=_or(DRAIN_S), default=DRAIN_S, help="one that was told to stop may take for running requests")
    parser.add_argument("--boot-record", type=Path, default=Path("/var/log/manylora/boot.jsonl"), help="steps that user-data timed")
    parser.add_argument("--lifecycle-s", type=float, default=LIFECYCLE_S, help="pause between two looks at the metadata service")
    parser.add_argument("--load-s", type=float, default=LOAD_S, help="pause between two reports of the load")
    parser.add_argument("--notify-socket", default="", help="systemd's, for its watchdog; empty: none")
    parser.add_argument("--metadata-endpoint", default=DEFAULT_ENDPOINT, help="address of the metadata service")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run until SIGTERM; 1 if this is no EC2 instance."""
    import boto3
    from botocore.config import Config

    flags = _parse(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    metadata = InstanceMetadata(flags.metadata_endpoint)
    try:
        instance_id, region = metadata.instance_id, metadata.region
    except MetadataUnavailable as error:
        log.error("%s", error)
        return 1
    clients = [boto3.client(name, region_name=region, config=Config(**_CALLS)) for name in ("autoscaling", "cloudwatch")]
    group = Group(instance_id, *clients)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    beats = [*make_beats(flags, metadata, group), Beat("watchdog", LIFECYCLE_S, lambda: tell_watchdog(flags.notify_socket))]
    log.info("agent of %s in %s", instance_id, region)
    while not stop.wait(0.5):
        for beat in beats:
            beat.run_if_due(time.monotonic())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
