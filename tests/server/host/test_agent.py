"""The agent: drain on the group's word and on a spot notice, launch held until the server answers, load published."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from server.host.agent import Beat
from server.host.group import Group
from server.host.lifecycle import Lifecycle
from server.host.load import LoadReport, ServerProbe, publish_boot
from server.host.metadata import InstanceMetadata, MetadataUnavailable
from server.ipc.messages import EngineStats
from server.metrics import Metrics
from tests.server.host.instance import Autoscaling, MetadataStandIn, make_group

ROOT = Path(__file__).parents[3]


class Machine:
    """An instance in a group: metadata, Auto Scaling, CloudWatch, and a server that can be stopped."""

    def __init__(self, aws, folder: Path) -> None:
        self.name = f"fleet-{os.urandom(3).hex()}"
        self.autoscaling, self.cloudwatch = Autoscaling(aws("autoscaling")), aws("cloudwatch")
        self.instance_id = make_group(self.autoscaling, aws("ec2"), self.name)
        values = {"instance-id": self.instance_id, "placement/region": "us-east-1", "autoscaling/target-lifecycle-state": "InService"}
        self.metadata = MetadataStandIn(**values)
        self.group = Group(self.instance_id, self.autoscaling, self.cloudwatch)
        self.serving = True
        self.gate, self.stopped, self.started = folder / "gate", folder / "stopped", folder / "started"
        self.gate.touch()

    def lifecycle(self, **options) -> Lifecycle:
        # The stand-in for `systemctl stop`: ends when the running requests have, which the test decides.
        wait = f"while [ ! -e {self.gate} ]; do sleep 0.01; done; touch {self.stopped}"
        return Lifecycle(
            InstanceMetadata(self.metadata.endpoint),
            self.group,
            is_serving=lambda: self.serving,
            stop_server=["sh", "-c", wait],
            start_server=["touch", str(self.started)],
            drain_hook="drain",
            settle_s=0.0,
            **options,
        )

    def target(self, state: str) -> None:
        self.metadata.values["autoscaling/target-lifecycle-state"] = state

    @property
    def health(self) -> str:
        return self.autoscaling.describe_auto_scaling_instances(InstanceIds=[self.instance_id])["AutoScalingInstances"][0]["HealthStatus"]


@pytest.fixture
def machine(aws, tmp_path):
    machine = Machine(aws, tmp_path)
    with machine.metadata:
        yield machine


def step_until(lifecycle: Lifecycle, done, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline
        lifecycle.step()
        time.sleep(0.01)


def test_nothing_happens_to_an_instance_in_service(machine):
    lifecycle = machine.lifecycle()
    for _ in range(3):
        lifecycle.step()
    assert not lifecycle.is_leaving and not machine.stopped.exists() and not machine.autoscaling.calls


def test_a_termination_drains_the_server_and_then_completes_the_hook(machine):
    lifecycle = machine.lifecycle()
    lifecycle.step()
    machine.gate.unlink()  # a request is still running
    machine.autoscaling.waiting.add("drain")
    machine.target("Terminated")
    step_until(lifecycle, lambda: machine.autoscaling.calls)
    assert machine.autoscaling.calls == [("RecordLifecycleActionHeartbeat", "drain")] and not lifecycle.drained
    machine.gate.touch()
    step_until(lifecycle, lambda: lifecycle.drained)
    assert machine.stopped.exists() and machine.autoscaling.calls[-1] == ("CompleteLifecycleAction", "drain")


def test_a_hook_that_comes_after_the_drain_is_completed_too(machine):
    """A spot notice drains at once; the group's own termination, with its hook, follows."""
    lifecycle = machine.lifecycle()
    machine.metadata.values["spot/instance-action"] = '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}'
    step_until(lifecycle, lambda: lifecycle.drained)
    assert machine.health == "Unhealthy" and machine.stopped.exists() and not machine.autoscaling.calls
    machine.autoscaling.waiting.add("drain")
    machine.target("Terminated")
    lifecycle.step()
    assert machine.autoscaling.calls == [("CompleteLifecycleAction", "drain")]


def test_a_spot_notice_drains_though_the_group_cannot_be_told_yet(machine, monkeypatch):
    tried = []

    def fail(reason):
        tried.append(reason)
        raise ConnectionError("Auto Scaling does not answer")

    lifecycle = machine.lifecycle()
    machine.metadata.values["spot/instance-action"] = '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}'
    with monkeypatch.context() as patch:
        patch.setattr(machine.group, "mark_unhealthy", fail)
        step_until(lifecycle, lambda: lifecycle.drained)
    assert machine.stopped.exists() and machine.health == "Healthy" and set(tried) == {"spot"} and len(tried) > 1
    lifecycle.step()  # now it answers
    assert machine.health == "Unhealthy"
    tried.clear()
    with monkeypatch.context() as patch:
        patch.setattr(machine.group, "mark_unhealthy", fail)
        lifecycle.step()
    assert not tried  # it was told


def test_the_server_is_not_stopped_before_the_load_balancer_has_let_go(machine):
    lifecycle = machine.lifecycle()
    lifecycle._settle_s = 60.0
    machine.target("Terminated")
    for _ in range(5):
        lifecycle.step()
        time.sleep(0.01)
    assert lifecycle.is_leaving and not machine.stopped.exists()


def test_a_launch_is_held_until_the_server_answers(machine):
    machine.serving = False
    machine.autoscaling.waiting.add("launch")
    machine.target("Warmed:Stopped")
    lifecycle = machine.lifecycle(launch_hook="launch")
    lifecycle.step()
    assert not machine.autoscaling.calls and not lifecycle.is_leaving  # on its way into the pool it boots; that is no reason to drain
    machine.serving = True
    lifecycle.step()
    lifecycle.step()
    assert machine.autoscaling.calls == [("CompleteLifecycleAction", "launch")]


def test_the_hook_of_a_running_pool_is_completed_on_the_way_in_and_once_more_on_the_way_out(machine):
    lifecycle = machine.lifecycle(launch_hook="launch")
    for num_times, state in enumerate(("Warmed:Running", "InService"), start=1):
        machine.target(state)
        machine.autoscaling.waiting.add("launch")
        lifecycle.step()
        assert machine.autoscaling.calls == [("CompleteLifecycleAction", "launch")] * num_times and not lifecycle.is_leaving


def test_back_to_the_pool_and_in_service_again(machine):
    lifecycle = machine.lifecycle(launch_hook="launch")
    lifecycle.step()
    machine.target("Warmed:Running")
    step_until(lifecycle, lambda: lifecycle.drained)
    machine.target("InService")
    machine.autoscaling.waiting.add("launch")
    lifecycle.step()
    assert machine.started.exists() and not lifecycle.is_leaving
    lifecycle.step()
    assert machine.autoscaling.calls == [("CompleteLifecycleAction", "launch")]


def test_an_expired_token_is_asked_for_again_and_a_missing_service_is_said(machine):
    metadata = InstanceMetadata(machine.metadata.endpoint)
    assert metadata.region == "us-east-1"
    machine.metadata.tokens.clear()
    assert metadata.instance_id == machine.instance_id and metadata.spot_notice() is None
    with pytest.raises(MetadataUnavailable):
        _ = InstanceMetadata("http://127.0.0.1:9").region


class FakeServer:
    """Answers /health and the real metrics text of given numbers."""

    def __init__(self) -> None:
        self.metrics, self.healthy = Metrics(), True
        fake = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                text = fake.metrics.render() if self.path == "/metrics" else b""
                self.send_response(200 if fake.healthy else 503)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def show(self, **stats: int) -> None:
        base = EngineStats(max_tokens=1000, max_batch_size=10)
        self.metrics.observe_engine({name: getattr(base, name) for name in base.__struct_fields__} | stats)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def served():
    server = FakeServer()
    yield server
    server.close()


def test_the_load_is_published_under_the_groups_name(machine, served):
    report = LoadReport(ServerProbe(served.port), machine.group)
    served.show(num_tokens=500, num_running=2, num_waiting=6, num_output_tokens=100)
    assert report.step()["LoadRatio"] == 0.8
    served.show(num_tokens=1500, num_running=2, num_output_tokens=160)
    values = report.step()
    assert values["LoadRatio"] == 1.5 and values["OutputTokens"] == 60
    served.healthy = False
    assert report.step() == {}  # draining or starting: not idle
    found = machine.cloudwatch.list_metrics(Namespace="Manylora", MetricName="LoadRatio")["Metrics"]
    assert [{"Name": "AutoScalingGroupName", "Value": machine.name}] in [metric["Dimensions"] for metric in found]
    assert LoadReport(ServerProbe(9), machine.group).step() == {}


def test_boot_steps_are_published_once(machine, tmp_path):
    record = tmp_path / "boot.jsonl"
    assert not publish_boot(record, machine.group)
    record.write_text('{"step": "mount", "seconds": 3}\nnonsense\n{"step": "model", "seconds": 41.5}\n')
    assert publish_boot(record, machine.group) and not publish_boot(record, machine.group)
    metrics = machine.cloudwatch.list_metrics(Namespace="Manylora", MetricName="BootSeconds")["Metrics"]
    steps = {d["Value"] for metric in metrics for d in metric["Dimensions"] if d["Name"] == "Step"}
    assert {"mount", "model"} <= steps


def test_one_parts_failure_holds_up_no_other(caplog):
    def fail() -> None:
        raise OSError("away")

    ran: list[int] = []
    for beat in (Beat("load", 10, fail), Beat("gpu", 10, lambda: ran.append(1))):
        beat.run_if_due(100.0)
        beat.run_if_due(105.0)
    assert ran == [1] and "load: OSError: away" in caplog.text


def test_the_program_as_the_unit_starts_it(machine, served, tmp_path):
    """Whole process: metadata found, load published to moto, systemd's watchdog told, SIGTERM ends it."""
    served.show(num_tokens=250)
    systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    systemd.bind(str(tmp_path / "notify"))
    systemd.settimeout(60)
    command = [sys.executable, "-m", "server.host.agent", "--port", str(served.port), "--drain-hook", "drain"]
    command += ["--metadata-endpoint", machine.metadata.endpoint, "--load-s", "0.2", "--lifecycle-s", "0.2"]
    command += ["--start-s", "", "--heal-s", "600", "--drain-s", ""]  # as a unit gives what is not in its environment
    command += ["--notify-socket", str(tmp_path / "notify")]
    process = subprocess.Popen([*command, "--boot-record", str(tmp_path / "none")], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60

        def published() -> bool:
            found = machine.cloudwatch.list_metrics(Namespace="Manylora", MetricName="LoadRatio")["Metrics"]
            return any({"Name": "AutoScalingGroupName", "Value": machine.name} in metric["Dimensions"] for metric in found)

        while not published():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        assert systemd.recv(100) == b"WATCHDOG=1"
        process.send_signal(signal.SIGTERM)
        words = process.communicate(timeout=20)[1]
        assert process.returncode == 0 and machine.instance_id in words
    finally:
        process.kill()
        process.wait()
        systemd.close()
