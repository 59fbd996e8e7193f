"""What happens to the machine: its clock, its GPU, its spot capacity."""

import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from server.engine.core import run_until_idle
from server.host import gpu
from server.host.agent import GpuReport
from server.host.gpu import GpuWatch
from server.sources import Store, content
from tests.faults.marked import MarkedServer, wait_for
from tests.server.api.live import live_server
from tests.server.api.test_adapters import PROMPT, write_adapter
from tests.server.engine.test_core import engine, requests, texts
from tests.server.host.conftest import aws, aws_endpoint, environment  # noqa: F401 - fixtures
from tests.server.host.test_agent import machine, step_until  # noqa: F401 - a fixture
from tests.server.host.test_gpu import XID
from tests.server.sources.test_store_space import fill
from tests.server.sources.toy_source import ToySource

DAY_S = 86400.0
SERVER = Path(__file__).parents[2] / "server"


@pytest.fixture
def clock(monkeypatch):
    """time.time, which the test steps."""
    true, step = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: true() + step[0])

    def set_to(seconds):
        step[0] = seconds

    return set_to


@pytest.mark.fault(
    "Machine", "the clock is stepped a day on and a day back under load", "nothing",
    "time-outs, heartbeats, limits and the cache of failures go by the monotonic clock alone",
)  # fmt: skip
def test_the_clock_is_stepped_under_load(tmp_path, model_dir, clock) -> None:
    for n in range(3):
        write_adapter(tmp_path / "adapters" / f"a{n}", seed=n)
    with live_server(tmp_path, model_dir, heartbeat_timeout_s=2, adapter_timeout_s=20, keep_alive_s=5) as live:
        live.control(step_s=0.005)
        codes, stop = [], threading.Event()

        def ask(n):
            while not stop.is_set():
                body = {"inputs": PROMPT, "parameters": {"adapter_id": f"a{n}" if n else None, "max_new_tokens": 20}}
                codes.append(live.post("/generate", body).status_code)

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for step in (DAY_S, -DAY_S, 0.0, 3600.0):
            num = len(codes)
            clock(step)
            wait_for(lambda num=num: len(codes) > num + 12)
            assert live.client.get("/health").status_code == 200
        stop.set()
        for thread in threads:
            thread.join(20)
        assert set(codes) == {200} and len(live.seen("Start")) == 1


def test_the_engine_does_not_look_at_the_clock(clock) -> None:
    core, _ = engine()
    expected = texts(run_until_idle_of(core))
    core, _ = engine()
    launch, num = core.runner.launch, [0]

    def step_the_clock(chunks, before=None):
        num[0] += 1
        clock(DAY_S * (-1) ** num[0])
        return launch(chunks, before)

    core.runner.launch = step_the_clock
    assert texts(run_until_idle_of(core)) == expected and num[0] > 5


def run_until_idle_of(core):
    for request in requests([None], num=4):
        core.add(request)
    return run_until_idle(core)


def test_the_store_keeps_its_bound_after_a_step_of_the_clock(tmp_path, clock) -> None:
    source = ToySource()
    size_bytes = source.snapshot("a").size_bytes
    store = Store(tmp_path, max_bytes=2 * size_bytes, min_idle_s=60)
    clock(2 * DAY_S)
    for path in [tmp_path / "objects" / one for one in fill(store, source, "ab").values()]:
        os.utime(path, (time.time(), time.time()))  # used in what is the future as soon as the clock is set right
    clock(0.0)
    fill(store, source, "c")
    assert len(list((tmp_path / "objects").iterdir())) == 2  # they can be evicted though their last use is to come
    clock(-DAY_S)
    write_adapter(tmp_path / "one")
    assert content.is_settled(tmp_path / "one", ["adapter_config.json"])  # written before the clock was set back


def test_wall_time_is_read_where_it_is_meant_alone() -> None:
    """Dates that are shown, and the ages of files, which carry wall time themselves. Whoever adds a use says here which it is."""
    shown = {
        "api/stats.py",
        "commands/keys.py",
        "api/publishing.py",
        "api/lora_info.py",
        "api/openai_common.py",
        "api/app.py",
        "__main__.py",
        "api/text/templates.py",
    }
    ages = {"api/published.py", "sources/content.py", "sources/space.py", "sources/disk.py", "sources/store.py"}
    uses = re.compile(r"\btime\.time\(|datetime\.(now|utcnow|fromtimestamp)\(")
    found = {path.relative_to(SERVER).as_posix() for path in SERVER.rglob("*.py") if uses.search(path.read_text())}
    assert found <= shown | ages, found - shown - ages


@pytest.mark.slow
@pytest.mark.fault(
    "Machine", "a spot interruption notice under load", "nothing: what is open is answered whole",
    "the group is told at once and starts another instance; the load balancer lets go, then the server drains and ends",
)  # fmt: skip
def test_a_spot_notice_under_load(tmp_path, machine) -> None:  # noqa: F811
    with MarkedServer(tmp_path / "work", drain_timeout_s=60) as server:
        server.wait_well()
        pid = server.server.pid
        streams = [server.stream(adapter, 300) for adapter in (None, 0, 1)]
        wait_for(lambda: all(stream.tokens for stream in streams))
        lifecycle = machine.lifecycle()
        until_gone = f"while grep -q '^State:.[^Z]' /proc/{pid}/status 2>&-; do sleep 0.05; done"
        lifecycle._stop_server = ["sh", "-c", f"kill -TERM {pid}; {until_gone}"]
        lifecycle.step()
        assert not lifecycle.is_leaving
        machine.metadata.values["spot/instance-action"] = '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}'
        lifecycle.step()
        assert lifecycle.is_leaving and machine.health == "Unhealthy"
        step_until(lifecycle, lambda: lifecycle.drained, timeout_s=90)
        for stream in streams:
            assert stream.done.wait(10) and stream.is_right and len(stream.tokens) == 300
        assert server.server.stop() == 0


@pytest.mark.fault(
    "Machine", "a fatal Xid of the GPU in the kernel's log", "as of an engine that dies, if its engine dies of it",
    "the instance is marked unhealthy and replaced, also where CloudWatch refuses the metric; a program's own Xids are left to its restart",
)  # fmt: skip
def test_an_xid_takes_the_instance_out_of_service(machine, tmp_path, monkeypatch) -> None:  # noqa: F811
    log = tmp_path / "kmsg"
    log.write_text(XID.format(code=31))
    watch = GpuWatch(kernel_log=log, nvidia_smi=["true"])
    report = GpuReport(watch, machine.group)
    report.step()
    assert machine.health == "Healthy"  # a program's fault

    def refuse(*_, **__):
        raise RuntimeError("AccessDenied: cloudwatch:PutMetricData")

    monkeypatch.setattr(machine.group, "publish", refuse)
    with log.open("a") as more:
        more.write(XID.format(code=79))
    with pytest.raises(RuntimeError, match="AccessDenied"):
        report.step()
    assert machine.health == "Unhealthy"
    watch.close()


@pytest.mark.fault(
    "Machine", "nvidia-smi hangs in the driver and cannot be killed", "nothing",
    "the agent goes on with drain and load; at the third time in a row, failures counted too, the instance is marked unhealthy",
)  # fmt: skip
def test_an_nvidia_smi_that_cannot_be_killed(tmp_path, monkeypatch) -> None:
    started = []

    class Unkillable(subprocess.Popen):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

        def kill(self) -> None:
            pass  # as the kernel does while a process waits for a device

    monkeypatch.setattr(gpu.subprocess, "Popen", Unkillable)
    watch = GpuWatch(kernel_log=tmp_path / "none", nvidia_smi=["sleep", "60"], timeout_s=0.2)
    try:
        assert [watch.errors() for _ in range(3)] == [[], [], ["nvidia-smi hangs"]]
        assert len(started) == 1  # not one more each half minute
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
            process.wait()
    watch._nvidia_smi = ["true"]
    assert watch.errors() == [] and len(started) == 2
