"""The tiers of adapters: states, budgets, pins, and what is evicted for what."""

import threading
import time
from types import SimpleNamespace

import pytest

from server.errors import AdapterRefused
from tests.server.memory.small_tiers import make_tiers, ref, settle


def test_an_adapter_goes_up_and_comes_down():
    events = []
    tiers = make_tiers(device=20, events=events)
    for name in "abc":
        tiers.want(ref(name))
    settle(tiers, "a", "b", "c")
    assert tiers.acquire("a") and tiers.acquire("b")
    assert not tiers.acquire("c")  # both others are pinned
    tiers.release("a")
    assert tiers.acquire("c")
    assert (tiers.state("a"), tiers.state("c")) == ("host", "device")
    assert tiers.device.used_bytes == 20 and tiers.host.used_bytes == 30
    assert events.count(("a", "loading")) == 1 and ("a", "device") in events and events[-2:] == [("a", "host"), ("c", "device")]


def test_many_who_want_one_read_it_once():
    reads, gate = [], threading.Event()

    def read(r):
        reads.append(r.hash)
        gate.wait(5)
        return SimpleNamespace(bytes=1)

    tiers = make_tiers(read=read)
    for _ in range(20):
        tiers.want(ref("a"))
    gate.set()
    settle(tiers, "a")
    assert reads == ["a"]


def test_host_tier_keeps_what_is_wanted_and_evicts_the_rest():
    tiers = make_tiers(host=25)
    tiers.want(ref("a"))
    settle(tiers, "a")
    tiers.unwant("a")
    tiers.want(ref("b"))
    tiers.want(ref("c"))
    settle(tiers, "b", "c")
    assert tiers.state("a") == "absent" and tiers.state("b") == tiers.state("c") == "host"


def test_a_queue_for_cold_adapters_is_read_as_room_comes():
    order = []

    def read(r):
        order.append(r.hash)
        return SimpleNamespace(bytes=10)

    tiers = make_tiers(host=50, device=50, read=read)
    names = [f"a{i:02d}" for i in range(40)]
    for name in names:
        tiers.want(ref(name))
    deadline = time.monotonic() + 10
    for name in names:  # they are used and left in order
        while tiers.state(name) not in ("host", "device"):
            assert time.monotonic() < deadline
            tiers.arrived.wait(0.05)
            tiers.poll()
        assert tiers.host.used_bytes <= 50 + 2 * 10  # each of two readers may bring one more than fits
        assert tiers.acquire(name)
        tiers.release(name)
        tiers.unwant(name)
    assert sorted(order) == names and abs(order.index("a20") - 20) <= 1
    assert tiers.host.used_bytes <= 50


def test_a_read_that_nobody_wants_any_more_is_called_off():
    gate, reads = threading.Event(), []

    def read(r):
        reads.append(r.hash)
        gate.wait(5)
        return SimpleNamespace(bytes=1)

    tiers = make_tiers(read=read)
    for name in ("a", "b", "c", "d"):
        tiers.want(ref(name))
    tiers.unwant("d")
    gate.set()
    settle(tiers, "a", "b", "c")
    assert "d" not in reads and tiers.state("d") == "absent"


def test_nothing_grows_with_use():
    tiers = make_tiers()
    for _ in range(2000):
        tiers.want(ref("a"))
        settle(tiers, "a", state="device" if tiers.state("a") == "device" else "host")
        assert tiers.acquire("a")
        tiers.release("a")
        tiers.unwant("a")
    assert len(tiers.device.idle._heap) < 200 and len(tiers.host.idle._heap) < 200 and len(tiers._entries) == 1


def test_prefetch_after_forget_brings_it():
    tiers = make_tiers()
    tiers.prefetch(ref("a"))
    tiers.forget("a")
    tiers.prefetch(ref("a"))
    settle(tiers, "a")


def test_what_is_used_often_outlives_what_is_not():
    tiers = make_tiers(device=20)
    for name in "abc":
        tiers.want(ref(name))
    settle(tiers, "a", "b", "c")
    for entry in tiers._entries.values():
        entry.load_s = 1.0
    for _ in range(10):
        assert tiers.acquire("a")
        tiers.release("a")
    assert tiers.acquire("b")
    tiers.release("b")
    assert tiers.acquire("c")
    assert (tiers.state("a"), tiers.state("b")) == ("device", "host")


def test_forgotten_at_once_or_after_the_last_use():
    tiers = make_tiers()
    tiers.want(ref("a"))
    settle(tiers, "a")
    assert tiers.acquire("a")
    tiers.forget("a")
    assert tiers.state("a") == "device"
    tiers.release("a")
    tiers.unwant("a")
    assert tiers.state("a") == "absent" and tiers.device.used_bytes == tiers.host.used_bytes == 0
    tiers.prefetch(ref("b"))
    settle(tiers, "b")
    tiers.forget("b")
    assert tiers.state("b") == "absent" and not tiers._entries


@pytest.mark.parametrize("error", [AdapterRefused("lora_A of x is corrupt"), OSError("gone")])
def test_a_failed_read_is_reported_and_tried_again(error):
    answers = [error, SimpleNamespace(bytes=1)]

    def read(_):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    tiers = make_tiers(read=read)
    tiers.want(ref("a"))
    deadline = time.monotonic() + 5
    failed = []
    while not failed and time.monotonic() < deadline:
        tiers.arrived.wait(0.05)
        failed = tiers.poll()[1]
    assert failed == [("a", error)] and tiers.state("a") == "absent"
    tiers.unwant("a")
    tiers.want(ref("a"))
    settle(tiers, "a")


def test_an_adapter_that_can_never_fit_is_refused():
    tiers = make_tiers(host=1000, device=50)
    tiers.want(ref("big", 51))
    deadline = time.monotonic() + 5
    failed = []
    while not failed and time.monotonic() < deadline:
        tiers.arrived.wait(0.05)
        failed = tiers.poll()[1]
    assert "51 bytes" in str(failed[0][1]) and "50" in str(failed[0][1])


def test_a_step_does_not_get_slower_with_thousands_of_adapters():
    tiers = make_tiers(host=10**6, device=10 * 100)
    names = [f"a{i}" for i in range(3000)]
    for name in names:
        tiers.want(ref(name))
    settle(tiers, *names)
    for name in names:
        assert tiers.acquire(name)
        tiers.release(name)
    assert tiers.device.count == 100
    assert len(tiers.device.idle._heap) <= 2 * 100 + 65  # an eviction looks at its top, not at all adapters
