"""Where each adapter's weights are: absent, being read, in host memory, on the device; and what makes room for what.

Owns states, pins and the two budgets in bytes. It does not know tensors or files: `read` (runs in a loader thread) and `place` (runs in
the engine's thread) are given by the runner. The scheduler asks for adapters when a sequence is queued and pins them while it runs.

Reads start in the order of asking, and only while the host tier has room or can make some: a long queue for cold adapters is not read into
memory at once. Eviction is Greedy-Dual-Size-Frequency (Cherkasova 1998), see _Budget.
"""

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from server.errors import AdapterRefused, ServerError
from server.memory.eviction import EvictionOrder
from server.types import AdapterRef

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    ref: AdapterRef
    num_wanted: int = 0  # sequences queued or running that need it
    num_pins: int = 0  # sequences running on the device with it
    reading: bool = False  # queued for a reader, or with one
    host: Any = None
    device: Any = None
    uses: int = 0
    load_s: float = 0.0
    forget: bool = False

    @property
    def state(self) -> str:
        if self.device is not None:
            return "device"
        if self.host is not None:
            return "host"
        return "loading" if self.reading else "absent"


@dataclass(slots=True)
class Tier:
    """What one tier holds. `idle` orders the adapters in it that nobody needs now: they alone can be evicted."""

    max_bytes: int
    used_bytes: int = 0
    count: int = 0
    idle: EvictionOrder = field(default_factory=EvictionOrder)

    def add(self, num_bytes: int) -> None:
        """An adapter came."""
        self.used_bytes += num_bytes
        self.count += 1

    def remove(self, adapter_hash: str, num_bytes: int) -> None:
        """An adapter left."""
        self.idle.withdraw(adapter_hash)
        self.used_bytes -= num_bytes
        self.count -= 1


class AdapterTiers:
    """The engine's adapters. `read(ref)` returns an object with `.bytes` in host memory, `place(host)` one on the device.

    All methods are for the engine's thread; only `read` runs elsewhere."""

    def __init__(
        self,
        read: Callable[[AdapterRef], Any],
        place: Callable[[Any], Any],
        host_bytes: int,
        device_bytes: int,
        on_event: Callable[[str, str, int, float, str | None], None] = lambda *_: None,
        num_readers: int = 2,
    ) -> None:
        self._read, self._place, self._on_event = read, place, on_event
        self.host, self.device = Tier(host_bytes), Tier(device_bytes)
        self._entries: dict[str, _Entry] = {}
        self._to_read: OrderedDict[str, None] = OrderedDict()  # in order of asking
        self._num_reading, self._num_readers = 0, num_readers
        self._jobs: queue.SimpleQueue[AdapterRef | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[AdapterRef, Any, float, Exception | None]] = queue.SimpleQueue()
        self.arrived = threading.Event()  # set when poll() has something to collect
        self._readers = [threading.Thread(target=self._run_reader, name=f"adapter-reader-{i}", daemon=True) for i in range(num_readers)]
        for thread in self._readers:
            thread.start()

    def want(self, ref: AdapterRef) -> None:
        """A sequence that needs it was queued: read it as soon as there is room, if it is not here."""
        entry = self._entries.setdefault(ref.hash, _Entry(ref))
        entry.num_wanted += 1
        entry.forget = False
        self.host.idle.withdraw(ref.hash)
        self._ask_for(entry, ref)

    def unwant(self, adapter_hash: str) -> None:
        """A sequence that needed it has ended, however it did."""
        entry = self._entries[adapter_hash]
        entry.num_wanted -= 1
        if entry.num_wanted > 0:
            return
        if entry.forget:
            self._drop(entry)
        elif entry.host is not None:
            self._offer_host(entry)
        else:
            self._let_go(entry)
        self._start_reads()

    def prefetch(self, ref: AdapterRef) -> None:
        """Bring it into host memory without a request."""
        entry = self._entries.setdefault(ref.hash, _Entry(ref))
        entry.forget = False
        self._ask_for(entry, ref)

    def forget(self, adapter_hash: str) -> None:
        """Free its memory, at once or when its last sequence ends."""
        entry = self._entries.get(adapter_hash)
        if entry is not None:
            entry.forget = True
            if entry.num_wanted == 0:
                self._drop(entry)
                self._start_reads()

    def poll(self) -> tuple[list[str], list[tuple[str, Exception]]]:
        """Collect what the readers finished: (adapters that are in host memory now, adapters that could not be read and why)."""
        self.arrived.clear()
        arrived: list[str] = []
        failed: list[tuple[str, Exception]] = []
        while True:
            try:
                ref, host, seconds, error = self._done.get_nowait()
            except queue.Empty:
                break
            self._num_reading -= 1
            entry = self._entries[ref.hash]
            entry.reading = False
            if error is None and host.bytes > self.device.max_bytes:
                limit = self.device.max_bytes
                error = AdapterRefused(f"adapter '{ref.name}' needs {host.bytes} bytes on the device; adapters may take {limit} in all")
            if error is not None:
                failed.append((ref.hash, error))
                self._on_event(ref.hash, "failed", 0, seconds, str(error))
                self._let_go(entry)
            elif entry.forget and entry.num_wanted == 0:
                self._let_go(entry)
            else:
                self._keep_on_host(entry, host, seconds)
                arrived.append(ref.hash)
        self._start_reads()
        return arrived, failed

    def state(self, adapter_hash: str) -> str:
        """ "absent", "loading", "host" or "device"."""
        entry = self._entries.get(adapter_hash)
        return "absent" if entry is None else entry.state

    def acquire(self, adapter_hash: str) -> bool:
        """Pin it on the device for a sequence that starts to run; False if it is not in host memory or finds no room.

        What `place` raises is raised here, and nothing has changed then."""
        entry = self._entries[adapter_hash]
        if entry.device is None and not self._move_to_device(entry):
            return False
        entry.num_pins += 1
        entry.uses += 1
        self.device.idle.withdraw(adapter_hash)
        return True

    def release(self, adapter_hash: str) -> None:
        """The sequence does not run any more; the adapter stays until its room is needed."""
        entry = self._entries[adapter_hash]
        entry.num_pins -= 1
        assert entry.num_pins >= 0, adapter_hash
        if entry.num_pins == 0:
            self.device.idle.offer(adapter_hash, self._worth(entry))

    def on_device(self, adapter_hash: str) -> Any:
        """What `place` returned; only for a pinned adapter."""
        return self._entries[adapter_hash].device

    def close(self) -> None:
        """Stop the readers."""
        for _ in self._readers:
            self._jobs.put(None)

    def _run_reader(self) -> None:
        while (ref := self._jobs.get()) is not None:
            started_at = time.monotonic()
            host, error = None, None
            try:
                host = self._read(ref)
            except ServerError as refusal:
                error = refusal
            except Exception as unexpected:
                log.exception("reading adapter %s failed", ref.hash)
                error = unexpected
            self._done.put((ref, host, time.monotonic() - started_at, error))
            self.arrived.set()

    def _ask_for(self, entry: _Entry, ref: AdapterRef) -> None:
        if entry.state == "absent":
            entry.ref, entry.reading = ref, True
            self._to_read[ref.hash] = None
            self._on_event(ref.hash, "loading", 0, 0.0, None)
            self._start_reads()

    def _start_reads(self) -> None:
        """Hand reads to the readers while the host tier has room; its size is known once it is read, so the tier may run over by a few."""
        while self._to_read and self._num_reading < self._num_readers:
            self._trim_host(self.host.max_bytes - 1)
            if self.host.used_bytes >= self.host.max_bytes:
                return  # what is there is needed; the next sequence to end makes room
            adapter_hash, _ = self._to_read.popitem(last=False)
            self._num_reading += 1
            self._jobs.put(self._entries[adapter_hash].ref)

    def _keep_on_host(self, entry: _Entry, host: Any, seconds: float) -> None:
        entry.host, entry.load_s = host, seconds
        self.host.add(host.bytes)
        self._on_event(entry.ref.hash, "host", host.bytes, seconds, None)
        if entry.num_wanted == 0:
            self._offer_host(entry)
        self._trim_host(self.host.max_bytes)

    def _offer_host(self, entry: _Entry) -> None:
        self.host.idle.offer(entry.ref.hash, self._worth(entry))
        self._trim_host(self.host.max_bytes)

    def _trim_host(self, to_bytes: int) -> None:
        while self.host.used_bytes > to_bytes and (victim := self.host.idle.pop()) is not None:
            self._leave_host(self._entries[victim])

    def _move_to_device(self, entry: _Entry) -> bool:
        if entry.host is None:
            self._ask_for(entry, entry.ref)
            return False
        while self.device.used_bytes + entry.host.bytes > self.device.max_bytes:
            victim = self.device.idle.pop()
            if victim is None:
                return False
            self._leave_device(self._entries[victim])
        entry.device = self._place(entry.host)
        self.device.add(entry.device.bytes)
        self._on_event(entry.ref.hash, "device", entry.device.bytes, entry.load_s, None)
        return True

    def _leave_device(self, entry: _Entry) -> None:
        self.device.remove(entry.ref.hash, entry.device.bytes)
        entry.device = None
        self._on_event(entry.ref.hash, entry.state, 0 if entry.host is None else entry.host.bytes, 0.0, None)
        self._let_go(entry)

    def _leave_host(self, entry: _Entry) -> None:
        self.host.remove(entry.ref.hash, entry.host.bytes)
        entry.host = None
        self._on_event(entry.ref.hash, entry.state, 0, 0.0, None)
        self._let_go(entry)

    def _drop(self, entry: _Entry) -> None:
        if entry.device is not None:
            self._leave_device(entry)
        if entry.host is not None:
            self._leave_host(entry)
        self._let_go(entry)

    def _let_go(self, entry: _Entry) -> None:
        """Forget an adapter that is nowhere and that nobody needs; a read that has not started yet is called off."""
        if entry.num_wanted > 0:
            return
        if entry.ref.hash in self._to_read:
            del self._to_read[entry.ref.hash]
            entry.reading = False
        if entry.state == "absent":
            self._entries.pop(entry.ref.hash, None)

    def _worth(self, entry: _Entry) -> float:
        """Seconds that keeping it is likely to save, by byte."""
        size = entry.device.bytes if entry.device is not None else entry.host.bytes
        return max(1, entry.uses) * max(entry.load_s, 1e-6) / max(1, size)
