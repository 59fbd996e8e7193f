"""Where each adapter's weights are: absent, being read, in host memory, on the device; and what makes room for what.

Owns states, pins and the two budgets in bytes. It does not know tensors or files: `read` (runs in a loader thread) and `place` (runs in
the engine's thread) are given by the runner. The scheduler asks for adapters when a sequence is queued and pins them while it runs.

Eviction is Greedy-Dual-Size-Frequency (Cherkasova 1998): priority = clock + uses x (seconds to reload) / bytes, the clock rising to the
priority of what was last evicted, so that what was once popular ages.
"""

import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from server.errors import AdapterRefused, ServerError
from server.types import AdapterRef

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    ref: AdapterRef
    num_wanted: int = 0  # sequences queued or running that need it
    num_pins: int = 0  # sequences running on the device with it
    reading: bool = False
    host: Any = None
    device: Any = None
    uses: int = 0
    load_s: float = 0.0
    forget: bool = False
    priority: dict[str, float] = field(default_factory=dict)  # tier -> priority

    @property
    def state(self) -> str:
        if self.device is not None:
            return "device"
        if self.host is not None:
            return "host"
        return "loading" if self.reading else "absent"


class _Budget:
    """Bytes of one tier and the order in which its adapters leave it."""

    def __init__(self, tier: str, max_bytes: int) -> None:
        self.tier, self.max_bytes, self.used_bytes, self.count, self.clock = tier, max_bytes, 0, 0, 0.0
        self._heap: list[tuple[float, int, str]] = []
        self._tick = itertools.count()

    def touch(self, entry: _Entry, size: int) -> None:
        priority = self.clock + max(1, entry.uses) * max(entry.load_s, 1e-6) / max(1, size)
        entry.priority[self.tier] = priority
        heapq.heappush(self._heap, (priority, next(self._tick), entry.ref.hash))

    def pop_victim(self, entries: dict[str, _Entry], evictable: Callable[[_Entry], bool]) -> _Entry | None:
        skipped, victim = [], None
        while self._heap:
            item = heapq.heappop(self._heap)
            entry = entries.get(item[2])
            if entry is None or entry.priority.get(self.tier) != item[0]:
                continue  # an older note of an adapter that has been used since, or has gone
            if not evictable(entry):
                skipped.append(item)
                continue
            self.clock, victim = max(self.clock, item[0]), entry
            break
        for item in skipped:
            heapq.heappush(self._heap, item)
        return victim


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
        self.host, self.device = _Budget("host", host_bytes), _Budget("device", device_bytes)
        self._entries: dict[str, _Entry] = {}
        self._jobs: queue.SimpleQueue[AdapterRef | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[AdapterRef, Any, float, Exception | None]] = queue.SimpleQueue()
        self.arrived = threading.Event()  # set when poll() has something to collect
        self._readers = [threading.Thread(target=self._run_reader, name=f"adapter-reader-{i}", daemon=True) for i in range(num_readers)]
        for thread in self._readers:
            thread.start()

    def want(self, ref: AdapterRef) -> None:
        """A sequence that needs it was queued: start to read it now, if it is not here."""
        entry = self._entries.get(ref.hash)
        if entry is None:
            entry = self._entries[ref.hash] = _Entry(ref)
        entry.num_wanted += 1
        entry.forget = False
        self._start_reading(entry, ref)

    def unwant(self, adapter_hash: str) -> None:
        """A sequence that needed it has ended, however it did."""
        entry = self._entries[adapter_hash]
        entry.num_wanted -= 1
        if entry.num_wanted == 0 and entry.forget:
            self._drop(entry)
        elif entry.num_wanted == 0 and entry.state == "absent":
            del self._entries[adapter_hash]

    def prefetch(self, ref: AdapterRef) -> None:
        """Bring it into host memory without a request."""
        entry = self._entries.setdefault(ref.hash, _Entry(ref))
        self._start_reading(entry, ref)

    def forget(self, adapter_hash: str) -> None:
        """Free its memory, at once or when its last sequence ends."""
        entry = self._entries.get(adapter_hash)
        if entry is not None:
            entry.forget = True
            if entry.num_wanted == 0 and not entry.reading:
                self._drop(entry)

    def poll(self) -> list[tuple[str, Exception]]:
        """Collect what the readers finished; returns (hash, error) of reads that failed."""
        self.arrived.clear()
        failed = []
        while True:
            try:
                ref, host, seconds, error = self._done.get_nowait()
            except queue.Empty:
                return failed
            entry = self._entries[ref.hash]
            entry.reading = False
            if error is None and host.bytes > self.device.max_bytes:
                error = AdapterRefused(
                    f"adapter '{ref.name}' needs {host.bytes} bytes on the device; all adapters together may take {self.device.max_bytes}"
                )
            if error is None:
                self._keep_on_host(entry, host, seconds)
                continue
            failed.append((ref.hash, error))
            self._on_event(ref.hash, "failed", 0, seconds, str(error))
            if entry.num_wanted == 0:
                del self._entries[ref.hash]

    def state(self, adapter_hash: str) -> str:
        """ "absent", "loading", "host" or "device"."""
        entry = self._entries.get(adapter_hash)
        return "absent" if entry is None else entry.state

    def acquire(self, adapter_hash: str) -> bool:
        """Pin it on the device for a sequence that is about to run; False if it is not in host memory yet or finds no room."""
        entry = self._entries[adapter_hash]
        if entry.device is None and not self._move_to_device(entry):
            return False
        entry.num_pins += 1
        entry.uses += 1
        self.device.touch(entry, entry.device.bytes)
        return True

    def release(self, adapter_hash: str) -> None:
        """The sequence does not run any more; the adapter stays until its room is needed."""
        entry = self._entries[adapter_hash]
        entry.num_pins -= 1
        assert entry.num_pins >= 0, adapter_hash

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
            try:
                host, error = self._read(ref), None
            except ServerError as refusal:
                host, error = None, refusal
            except Exception as unexpected:
                log.exception("reading adapter %s failed", ref.hash)
                host, error = None, unexpected
            self._done.put((ref, host, time.monotonic() - started_at, error))
            self.arrived.set()

    def _start_reading(self, entry: _Entry, ref: AdapterRef) -> None:
        if entry.state == "absent":
            entry.ref, entry.reading = ref, True
            self._on_event(ref.hash, "loading", 0, 0.0, None)
            self._jobs.put(ref)

    def _keep_on_host(self, entry: _Entry, host: Any, seconds: float) -> None:
        if entry.forget and entry.num_wanted == 0:
            self._drop(entry)
            return
        entry.host, entry.load_s = host, seconds
        self.host.used_bytes += host.bytes
        self.host.count += 1
        self.host.touch(entry, host.bytes)
        self._on_event(entry.ref.hash, "host", host.bytes, seconds, None)
        # What a queued or running sequence needs is never evicted: the tier may run over its budget by what is in use.
        while self.host.used_bytes > self.host.max_bytes:
            victim = self.host.pop_victim(self._entries, lambda e: e.host is not None and e.num_wanted == 0)
            if victim is None:
                break
            self._leave_host(victim)

    def _move_to_device(self, entry: _Entry) -> bool:
        if entry.host is None:
            self._start_reading(entry, entry.ref)
            return False
        while self.device.used_bytes + entry.host.bytes > self.device.max_bytes:
            victim = self.device.pop_victim(self._entries, lambda e: e.device is not None and e.num_pins == 0)
            if victim is None:
                return False
            self._leave_device(victim)
        entry.device = self._place(entry.host)
        self.device.used_bytes += entry.device.bytes
        self.device.count += 1
        self._on_event(entry.ref.hash, "device", entry.device.bytes, entry.load_s, None)
        return True

    def _leave_device(self, entry: _Entry) -> None:
        self.device.used_bytes -= entry.device.bytes
        self.device.count -= 1
        entry.device = None
        self._on_event(entry.ref.hash, entry.state, 0 if entry.host is None else entry.host.bytes, 0.0, None)
        self._delete_if_idle(entry)

    def _leave_host(self, entry: _Entry) -> None:
        self.host.used_bytes -= entry.host.bytes
        self.host.count -= 1
        entry.host = None
        self._on_event(entry.ref.hash, entry.state, 0, 0.0, None)
        self._delete_if_idle(entry)

    def _drop(self, entry: _Entry) -> None:
        if entry.device is not None:
            self._leave_device(entry)
        if entry.host is not None:
            self._leave_host(entry)
        self._delete_if_idle(entry)

    def _delete_if_idle(self, entry: _Entry) -> None:
        if entry.state == "absent" and entry.num_wanted == 0:
            self._entries.pop(entry.ref.hash, None)
