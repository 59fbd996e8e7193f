"""The tiers of adapters: states, budgets, pins, and what is evicted for what."""

import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest

from server.errors import AdapterRefused, SourceUnavailable
from server.memory.readers import Readers
from server.memory.tier import Carrier
from server.memory.tiers import AdapterTiers
from server.types import AdapterRef


def make_tiers(host=100, device=50, read=None, events=None):
    sizes = {}

    def default_read(ref):
        return SimpleNamespace(bytes=int(ref.path), hash=ref.hash)

    def note(adapter_hash, state, *_):
        if events is not None:
            events.append((adapter_hash, state))
        sizes[adapter_hash] = state

    return AdapterTiers(Carrier(read or default_read, lambda host_adapter: host_adapter), host, device, note)


def ref(name, size=10):
    return AdapterRef(name, str(size), name)


def settle(tiers, *hashes, state="host"):
    failed = []
    deadline = time.monotonic() + 5
    while any(tiers.state(h) != state for h in hashes):
        assert time.monotonic() < deadline, {h: tiers.state(h) for h in hashes}
        tiers.arrived.wait(0.05)
        failed += tiers.poll()[1]
    return failed


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


class SlowCopies(Carrier):
    """A device on which a copy is whole when the test says so; it has room for `room` adapters, whatever the budget says."""

    places_early = True

    def __init__(self, room=10):
        super().__init__(lambda ref: SimpleNamespace(bytes=int(ref.path), hash=ref.hash), self._place)
        self.room, self.whole, self.placed, self.left = room, set(), [], []

    def _place(self, host):
        if self.room == 0:
            return None
        self.room -= 1
        self.placed.append(host.hash)
        return SimpleNamespace(bytes=host.bytes, hash=host.hash)

    def is_whole(self, device):
        return device.hash in self.whole

    def leave_host(self, host):
        self.left.append(("host", host.hash))

    def leave_device(self, device):
        self.room += 1
        self.left.append(("device", device.hash))


def until_read(tiers, count=1):
    """Poll until `count` reads are through."""
    arrived, deadline = [], time.monotonic() + 5
    while time.monotonic() < deadline and tiers.host.count < count:
        arrived += tiers.poll()[0]
        time.sleep(0.001)
    return arrived + tiers.poll()[0]


def test_a_copy_starts_when_the_adapter_is_read_and_arrives_when_it_is_whole():
    carrier = SlowCopies()
    tiers = AdapterTiers(carrier, 100, 50)
    tiers.want(ref("a"))
    assert until_read(tiers) == [] and carrier.placed == ["a"] and tiers.state("a") == "copying"
    assert not tiers.acquire("a") and not tiers.has_news
    carrier.whole.add("a")
    assert tiers.has_news and tiers.poll()[0] == ["a"] and tiers.state("a") == "device"
    assert tiers.acquire("a") and not tiers.yield_room()
    tiers.release("a")
    assert tiers.yield_room() and carrier.left == [("device", "a")] and tiers.state("a") == "host"


def test_a_copy_ahead_pushes_out_nothing_that_is_wanted():
    carrier = SlowCopies()
    carrier.whole = {"a", "b", "c"}
    tiers = AdapterTiers(carrier, 100, 20)
    for name in "ab":
        tiers.want(ref(name))
    assert sorted(until_read(tiers, 2)) == ["a", "b"]
    tiers.want(ref("c"))
    assert until_read(tiers, 3) == ["c"] and tiers.state("c") == "host"  # read, and no room that nobody wants
    tiers.unwant("a")
    assert tiers.acquire("c") and sorted(tiers.state(name) for name in "abc") == ["device", "device", "host"]


def test_a_carrier_without_room_makes_idle_adapters_leave():
    carrier = SlowCopies(room=1)
    carrier.whole = {"a", "b"}
    tiers = AdapterTiers(carrier, 100, 50)
    tiers.want(ref("a"))
    until_read(tiers)
    assert tiers.acquire("a")
    tiers.want(ref("b"))
    until_read(tiers, 2)
    assert tiers.state("b") == "host" and not tiers.acquire("b")
    tiers.release("a")
    assert tiers.acquire("b") and tiers.state("a") == "host"


@pytest.mark.parametrize("forget", [False, True])
def test_an_adapter_that_nobody_wants_any_more_keeps_its_memory_until_the_copy_is_done(forget):
    carrier = SlowCopies()
    tiers = AdapterTiers(carrier, 5, 50)  # a host tier that is full at once
    tiers.want(ref("a"))
    until_read(tiers)
    tiers.unwant("a")
    if forget:
        tiers.forget("a")
    assert tiers.state("a") == "copying" and carrier.left == []
    carrier.whole.add("a")
    tiers.poll()
    assert ("host", "a") in carrier.left and tiers.state("a") == ("absent" if forget else "device")


def test_reads_that_hang_are_given_up_and_hold_up_nobody_else():
    opened, dropped = threading.Event(), []

    def read(ref):
        if ref.name.startswith("hangs"):
            opened.wait(30)
        return SimpleNamespace(bytes=10, hash=ref.hash)

    carrier = Carrier(read, lambda host: host)
    carrier.leave_host = dropped.append
    tiers = AdapterTiers(carrier, 100, 50, readers=partial(Readers, drop=carrier.leave_host, timeout_s=1.0))
    try:
        for name in ("hangs-1", "hangs-2", "a", "b"):
            tiers.want(AdapterRef(name, "/p", name))
        arrived, failed = [], []
        deadline = time.monotonic() + 60
        while len(arrived) + len(failed) < 4:
            assert time.monotonic() < deadline
            tiers.arrived.wait(0.01)
            if tiers.has_news:
                here, gone = tiers.poll()
                arrived, failed = arrived + here, failed + gone
        assert sorted(arrived) == ["a", "b"] and sorted(name for name, _ in failed) == ["hangs-1", "hangs-2"]
        assert all(isinstance(error, SourceUnavailable) and "within 1 s" in error.message for _, error in failed)
        opened.set()
        while len(dropped) < 2:  # what they read in the end is let go of, and never taken for what was asked for
            assert time.monotonic() < deadline
            tiers.poll()
        tiers.unwant("hangs-1")
        tiers.want(AdapterRef("hangs-1", "/p", "hangs-1"))
        while tiers.state("hangs-1") != "host":
            assert time.monotonic() < deadline
            tiers.poll()
        assert tiers.host.used_bytes == 30 and tiers._readers._num_hung == 0
    finally:
        opened.set()
        tiers.close()
