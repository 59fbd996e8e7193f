"""Tiers of a few adapters whose bytes are what their path says, and waiting for what they read."""

import time
from types import SimpleNamespace

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
