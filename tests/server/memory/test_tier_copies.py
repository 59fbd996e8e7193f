"""The tiers where a copy to the device takes its time, finds no room, or a read hangs."""

import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest

from server.errors import SourceUnavailable
from server.memory.readers import Readers
from server.memory.tier import Carrier
from server.memory.tiers import AdapterTiers
from server.types import AdapterRef
from tests.server.memory.small_tiers import ref


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


@pytest.mark.parametrize("size, forgotten", [(60, False), (10, True)])
def test_what_is_read_and_not_kept_gives_its_host_memory_back(size, forgotten):
    carrier = SlowCopies()
    tiers = AdapterTiers(carrier, 100, 50)
    tiers.prefetch(ref("a", size))
    if forgotten:
        tiers.forget("a")
    failed, deadline = [], time.monotonic() + 5
    while tiers.state("a") != "absent" and time.monotonic() < deadline:
        failed += tiers.poll()[1]
        time.sleep(0.001)
    assert carrier.left == [("host", "a")] and len(failed) == (not forgotten) and tiers.host.used_bytes == 0
