"""A whole API process with two (fake) engines: what goes where, and what the death of one costs."""

import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.api.live import LiveServer, live_server, wait_for
from tests.server.api.test_adapters import PROMPT, write_adapter

KEY = "an-admin-key-of-a-test"
ADMIN = {"authorization": f"Bearer {KEY}"}
DEVICES = {"cuda:0", "cuda:1"}
LONG = {"inputs": "one two three four", "parameters": {"max_new_tokens": 100}}


@pytest.fixture(scope="module")
def shared_two(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("two"), model_dir, num_gpus=2, admin_key=KEY) as live:
        yield live


@pytest.fixture
def two(shared_two: LiveServer) -> LiveServer:
    shared_two.control()
    wait_for(lambda: metric(shared_two, "manylora_engine_up") == 2)
    return shared_two


def metric(live: LiveServer, name: str) -> float:
    return float(next(line.split()[1] for line in live.client.get("/metrics").text.splitlines() if line.split(" ")[0] == name))


def devices(live: LiveServer, kind: str, **wanted: Any) -> list[str]:
    """The devices of the engines that were told this, in order."""
    return [one["device"] for one in live.seen(kind) if all(one[key] == value for key, value in wanted.items())]


def order(live: LiveServer, path: str, body: Any = None) -> Any:
    answer = live.post(f"/v1/{path}", body, headers=ADMIN)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ask(live: LiveServer, adapter_id: str) -> str:
    """One answer with the adapter; its hash."""
    answer = live.post("/generate", {"inputs": PROMPT, "parameters": {"adapter_id": adapter_id, "max_new_tokens": 2}})
    assert answer.status_code == 200, answer.text
    return next(one for one in live.seen("Submit") if one["request_id"].startswith(answer.headers["x-request-id"]))["adapter"]["hash"]


def pid_on(live: LiveServer, device: str) -> int:
    return [one for one in live.seen("Start") if one["device"] == device][-1]["pid"]


class Opened:
    """So many requests that are open; each asks for another number of tokens, by which it is found in the engines' logs."""

    def __init__(self, live: LiveServer, count: int) -> None:
        self._live, self._known = live, len(live.seen("Submit"))
        self._pool = ThreadPoolExecutor(count)
        self._answers = {100 - n: self._pool.submit(self._ask, 100 - n) for n in range(count)}
        wait_for(lambda: len(live.seen("Submit")) == self._known + count)

    def _ask(self, max_new_tokens: int) -> httpx.Response:
        return self._live.post("/generate", {"inputs": "one two three four", "parameters": {"max_new_tokens": max_new_tokens}})

    def codes(self) -> dict[str, list[int]]:
        """How they ended, by device."""
        answers = {num: future.result(15) for num, future in self._answers.items()}
        self._pool.shutdown()
        codes: dict[str, list[int]] = {device: [] for device in sorted(DEVICES)}
        for one in self._live.seen("Submit")[self._known :]:
            if (answer := answers.pop(one["params"]["max_new_tokens"], None)) is not None:
                codes[one["device"]].append(answer.status_code)
        return codes


def test_each_engine_has_a_gpu_and_info_and_metrics_know_both(two: LiveServer) -> None:
    engines = two.client.get("/info").json()["engines"]
    assert {one["device"] for one in engines} == DEVICES and all(one["unhealthy"] is None and one["num_blocks"] == 100 for one in engines)
    assert metric(two, "manylora_engine_up") == 2 and two.client.get("/startup").status_code == 200
    wait_for(lambda: metric(two, "manylora_batch_size_max") == 8)  # four and four
    two.control(step_s=0.02)
    opened = Opened(two, 4)
    wait_for(lambda: metric(two, "lorax_batch_current_size") == 4)
    assert metric(two, "manylora_load_ratio") == 0.5
    assert opened.codes() == dict.fromkeys(DEVICES, [200, 200])


def test_an_adapter_lives_on_one_engine_and_adapters_on_both(two: LiveServer, tmp_path: Path) -> None:
    names = [f"placed-{seed}" for seed in range(4)]
    for seed, name in enumerate(names):
        write_adapter(two.folder / "adapters" / name, seed=seed + 10)
    hashes = {name: ask(two, name) for name in names * 3}
    homes = {name: set(devices(two, "Submit", adapter={"hash": one} | adapter_of(two, one))) for name, one in hashes.items()}
    assert all(len(home) == 1 for home in homes.values()), homes
    assert Counter(next(iter(home)) for home in homes.values()) == dict.fromkeys(DEVICES, 2)
    wait_for(lambda: metric(two, "manylora_adapters_host") == 4)


def adapter_of(live: LiveServer, adapter_hash: str) -> dict[str, Any]:
    """The adapter as the engine was told."""
    return next(one["adapter"] for one in live.seen("Submit") if one.get("adapter") and one["adapter"]["hash"] == adapter_hash)


def test_publish_needs_one_engine_a_pin_holds_on_both_and_unload_frees_both(two: LiveServer) -> None:
    write_adapter(two.folder / "adapters" / "source", seed=50)
    order(two, "adapters", {"name": "published", "id": "source"})
    adapter_hash = ask(two, "published")
    assert len(devices(two, "Prefetch", hash=adapter_hash)) == 1
    order(two, "adapters/published/pin")
    wait_for(lambda: set(devices(two, "Pin", hash=adapter_hash)) == DEVICES)
    order(two, "adapters/published/unload")
    wait_for(lambda: set(devices(two, "Unpin", hash=adapter_hash)) == DEVICES == set(devices(two, "Forget", hash=adapter_hash)))
    row = next(row for row in two.client.get("/v1/adapters", headers=ADMIN).json()["data"] if row["id"] == "published")
    assert row["tier"] in ("absent", "disk") and not row["pinned"]
    assert ask(two, "published") == adapter_hash


@pytest.mark.fault(
    "Engine", "one of several engines killed under load", "503 and `Retry-After`, those that it had confirmed alone",
    "the others go on, and take over what it had not confirmed; `/health` stays 200; it is started again with its pins",
)  # fmt: skip
def test_one_engine_dies_and_nobody_else_notices(two: LiveServer) -> None:
    write_adapter(two.folder / "adapters" / "kept", seed=60)
    order(two, "adapters", {"name": "kept", "id": "kept"})
    order(two, "adapters/kept/pin")
    kept = ask(two, "kept")
    wait_for(lambda: set(devices(two, "Pin", hash=kept)) == DEVICES)
    starts = {device: devices(two, "Start").count(device) for device in DEVICES}
    two.control(step_s=0.01)
    opened = Opened(two, 6)
    os.kill(pid_on(two, "cuda:0"), signal.SIGKILL)
    codes = []
    while engine_on(two, "cuda:0")["unhealthy"] is None:
        time.sleep(0.005)
    for _ in range(10):  # while it is away
        codes.append(two.post("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 1}}).status_code)
        assert two.client.get("/health").status_code == 200
    assert set(codes) == {200}
    assert opened.codes() == {"cuda:0": [503] * 3, "cuda:1": [200] * 3}
    wait_for(lambda: metric(two, "manylora_engine_up") == 2)
    assert devices(two, "Start").count("cuda:0") == starts["cuda:0"] + 1 and devices(two, "Start").count("cuda:1") == starts["cuda:1"]
    wait_for(lambda: devices(two, "Pin", hash=kept).count("cuda:0") == 2)  # the new one is told, the other is not told again
    assert devices(two, "Pin", hash=kept).count("cuda:1") == 1
    two.control(step_s=0.01)
    assert Opened(two, 6).codes() == dict.fromkeys(DEVICES, [200] * 3)


def test_what_the_dead_engine_never_had_is_answered_by_the_other(two: LiveServer) -> None:
    """Eight clients that ask without a pause, before, while and after one engine is killed: only what it had said that it has may fail."""
    killed, num_after = threading.Event(), []

    def ask_on() -> list[tuple[str, int]]:
        seen = []
        while len(num_after) < 200:
            was_killed = killed.is_set()
            answer = two.post("/generate", {"inputs": "one two three", "parameters": {"max_new_tokens": 4}})
            seen.append((answer.headers.get("x-request-id", ""), answer.status_code))
            if was_killed:
                num_after.append(answer.status_code)
        return seen

    two.control(step_s=0.002)
    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask_on) for _ in range(8)]
        num_submitted = len(two.seen("Submit"))
        wait_for(lambda: len(two.seen("Submit")) > num_submitted + 50)
        os.kill(pid_on(two, "cuda:0"), signal.SIGKILL)
        killed.set()
        codes = [code for one in asking for _, code in one.result(60)]
    assert set(num_after) == {200}
    assert codes.count(503) <= 8 and set(codes) <= {200, 503}  # those that the dead one had at that moment
    wait_for(lambda: metric(two, "manylora_engine_up") == 2)


@pytest.mark.fault(
    "Engine", "one of several engines stopped (SIGSTOP)", "a wait of the heartbeat's timeout",
    "what it has not confirmed goes to another engine; it drops it when it wakes up",
)  # fmt: skip
def test_what_a_stopped_engine_has_not_taken_goes_to_the_other(tmp_path: Path, model_dir: Path) -> None:
    with live_server(tmp_path, model_dir, num_gpus=2, heartbeat_timeout_s=1, hang_timeout_s=300) as live:
        os.kill(pid_on(live, "cuda:0"), signal.SIGSTOP)
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(live.post, "/generate", LONG) for _ in range(6)]  # three of them are sent to the one that sleeps
            assert [one.result(20).status_code for one in asked] == [200] * 6
        assert devices(live, "Submit").count("cuda:1") == 6
        os.kill(pid_on(live, "cuda:0"), signal.SIGCONT)
        wait_for(lambda: devices(live, "Abort").count("cuda:0") == 3)  # it wakes to requests that are answered, and drops them
        wait_for(lambda: metric(live, "manylora_engine_up") == 2)


def test_a_version_that_was_replaced_is_freed_though_another_engine_started_meanwhile(two: LiveServer) -> None:
    source = write_adapter(two.folder / "adapters" / "moving", seed=70)
    order(two, "adapters", {"name": "moving", "id": "moving"})
    first = ask(two, "moving")
    home = devices(two, "Submit", adapter=adapter_of(two, first))[0]
    two.control(step_s=0.3)  # it runs for 18 s unless it is told otherwise: longer than an engine takes to start
    body = {"inputs": PROMPT, "parameters": {"adapter_id": "moving", "max_new_tokens": 60}}
    with ThreadPoolExecutor(1) as pool:
        num_submitted = len(two.seen("Submit"))
        running = pool.submit(two.post, "/generate", body)
        wait_for(lambda: len(two.seen("Submit")) > num_submitted)
        shutil.rmtree(source)
        write_adapter(source, seed=71)
        order(two, "adapters", {"name": "moving", "id": "moving"})
        os.kill(pid_on(two, next(iter(DEVICES - {home}))), signal.SIGKILL)
        wait_for(lambda: metric(two, "manylora_engine_up") == 1)
        wait_for(lambda: metric(two, "manylora_engine_up") == 2)
        assert not running.done() and not devices(two, "Forget", hash=first)
        two.control()
        assert running.result().status_code == 200
    wait_for(lambda: home in devices(two, "Forget", hash=first))


def test_draining_waits_for_both_and_is_bounded_on_both(tmp_path: Path, model_dir: Path) -> None:
    for folder, timeout_s, step_s, status in (("patient", 10, 0.01, 200), ("short", 0.2, 0.2, 503)):
        with live_server(tmp_path / folder, model_dir, num_gpus=2, drain_timeout_s=timeout_s) as live:
            live.control(step_s=step_s)
            opened = Opened(live, 4)
            live.server.handle_exit(signal.SIGTERM, None)
            wait_for(lambda live=live: live.client.get("/health").status_code == 503)
            assert opened.codes() == dict.fromkeys(DEVICES, [status, status])
            pids = [pid_on(live, device) for device in DEVICES]
        assert not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def engine_on(live: LiveServer, device: str) -> dict[str, Any]:
    return next(one for one in live.client.get("/info").json()["engines"] if one["device"] == device)


def until_serving(live: LiveServer, condition: Callable[[], bool]) -> None:
    wait_for(lambda: live.client.get("/health").status_code == 200 and condition())


def test_one_that_cannot_start_is_tried_again_beside_the_other(tmp_path: Path, model_dir: Path) -> None:
    control = {"of": {"cuda:1": {"refuse": "out of memory"}}}
    with live_server(tmp_path, model_dir, wait=False, control=control, num_gpus=2) as live:
        until_serving(live, lambda: devices(live, "Start").count("cuda:1") >= 2)
        wait_for(lambda: "out of memory" in engine_on(live, "cuda:1")["unhealthy"])
        assert engine_on(live, "cuda:1")["num_blocks"] is None
        assert live.post("/generate", LONG).status_code == 200 and live.server.exit_code == 0
        live.control()
        wait_for(lambda: metric(live, "manylora_engine_up") == 2)


@pytest.mark.parametrize("control", [{"refuse": "X is not verified"}, {"of": {"cuda:1": {"fingerprint": "e" * 64}}}])
def test_the_server_stops_if_none_can_start_or_their_bases_differ(tmp_path: Path, model_dir: Path, control: dict) -> None:
    with live_server(tmp_path, model_dir, wait=False, control=control, num_gpus=2) as live:
        wait_for(lambda: live.server.exit_code == 1 and live.server.should_exit)
