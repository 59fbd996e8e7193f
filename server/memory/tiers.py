"""Where each adapter's weights are: absent, being read, in host memory, on the device; and what makes room for what.

Owns states, pins and the two budgets in bytes. It does not know tensors or files: `carrier` reads (in a loader thread) and places (in the
engine's thread; the copy itself may take longer). The scheduler asks for adapters when a sequence is queued and pins them while it runs;
an adapter that somebody waits for goes on to the device as soon as it is read, if that pushes out nothing that is wanted.

Reads start in the order of asking, and only while the host tier has room or can make some: a long queue for cold adapters is not read into
memory at once. Eviction is Greedy-Dual-Size-Frequency (Cherkasova 1998), see eviction.py.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from server.errors import AdapterRefused
from server.memory.readers import Readers
from server.memory.tier import Carrier, Entry, Tier
from server.types import AdapterRef

log = logging.getLogger(__name__)


class AdapterTiers:
    """The engine's adapters. All methods are for the engine's thread; only the carrier's `read` runs elsewhere."""

    def __init__(
        self,
        carrier: Carrier,
        host_bytes: int,
        device_bytes: int,
        on_event: Callable[[str, str, int, float, str | None], None] = lambda *_: None,
        num_readers: int = 2,
        readers: Callable[..., Readers] = Readers,
    ) -> None:
        self._carrier, self._on_event = carrier, on_event
        self.host, self.device = Tier(host_bytes), Tier(device_bytes)
        self._entries: dict[str, Entry] = {}
        self._to_read: OrderedDict[str, None] = OrderedDict()  # in order of asking
        self._readers = readers(lambda ref: self._carrier.read(ref), num_readers)
        self._copying: list[Entry] = []
        self.arrived = self._readers.arrived  # set when a read is done

    def want(self, ref: AdapterRef) -> None:
        """A sequence that needs it was queued: read it as soon as there is room, if it is not here."""
        entry = self._entries.setdefault(ref.hash, Entry(ref))
        entry.num_wanted += 1
        entry.forget = False
        self.host.idle.withdraw(ref.hash)
        if entry.state == "host":
            self._place_early(entry)
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
        entry = self._entries.setdefault(ref.hash, Entry(ref))
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
        for ref, host, seconds, error in self._readers.take():
            entry = self._entries[ref.hash]
            entry.reading = False
            if error is None and host.bytes > (limit := self.device.max_bytes):
                error = AdapterRefused(f"adapter '{ref.name}' needs {host.bytes} bytes on the device; adapters may take {limit} in all")
            if error is not None:
                failed.append((ref.hash, error))
                self._on_event(ref.hash, "failed", 0, seconds, str(error))
            if error is not None or (entry.forget and entry.num_wanted == 0):
                if host is not None:
                    self._carrier.leave_host(host)
                self._let_go(entry)
            else:
                self._keep_on_host(entry, host, seconds)
                if entry.num_wanted > 0:
                    self._place_early(entry)
                if not entry.copying:
                    arrived.append(ref.hash)
        arrived += self._poll_copies()
        self._start_reads()
        return arrived, failed

    @property
    def has_news(self) -> bool:
        """Whether `poll` has something to collect."""
        return self.arrived.is_set() or self._readers.is_late or any(self._carrier.is_whole(entry.device) for entry in self._copying)

    def yield_room(self, keep: str = "") -> bool:
        """Let one adapter leave the device that no sequence runs with, for the sake of something else; False if there is none but
        `keep`."""
        victim = self.device.idle.pop()
        if victim == keep and victim is not None:
            victim = self.device.idle.pop()
            self.device.idle.offer(keep, self._worth(self._entries[keep]))
        if victim is None:
            return False
        self._leave_device(self._entries[victim])
        return True

    def state(self, adapter_hash: str) -> str:
        """ "absent", "loading", "host", "copying" or "device"."""
        entry = self._entries.get(adapter_hash)
        return "absent" if entry is None else entry.state

    def acquire(self, adapter_hash: str) -> bool:
        """Pin it on the device for a sequence that starts to run; False if it is not whole there yet or finds no room.

        What `place` raises is raised here, and nothing has changed then."""
        entry = self._entries[adapter_hash]
        if entry.device is None and not self._move_to_device(entry):
            return False
        if entry.copying:
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

    def is_within_budget(self, adapter_hash: str) -> bool:
        """Whether an adapter that was refused room would have it if the carrier had a place for it."""
        host = self._entries[adapter_hash].host
        return host is not None and self.device.used_bytes + host.bytes <= self.device.max_bytes

    def on_device(self, adapter_hash: str) -> Any:
        """What `place` returned; only for a pinned adapter."""
        return self._entries[adapter_hash].device

    def close(self) -> None:
        """Stop the readers."""
        self._readers.close()

    def _ask_for(self, entry: Entry, ref: AdapterRef) -> None:
        if entry.state == "absent":
            entry.ref, entry.reading = ref, True
            self._to_read[ref.hash] = None
            self._on_event(ref.hash, "loading", 0, 0.0, None)
            self._start_reads()

    def _start_reads(self) -> None:
        """Hand reads to the readers while the host tier has room; its size is known once it is read, so the tier may run over by a few."""
        while self._to_read and self._readers.has_idle:
            self._trim_host(self.host.max_bytes - 1)
            if self.host.used_bytes >= self.host.max_bytes:
                return  # what is there is needed; the next sequence to end makes room
            adapter_hash, _ = self._to_read.popitem(last=False)
            self._readers.read(self._entries[adapter_hash].ref)

    def _keep_on_host(self, entry: Entry, host: Any, seconds: float) -> None:
        entry.host, entry.load_s = host, seconds
        self.host.add(host.bytes)
        self._on_event(entry.ref.hash, "host", host.bytes, seconds, None)
        if entry.num_wanted == 0:
            self._offer_host(entry)
        self._trim_host(self.host.max_bytes)

    def _offer_host(self, entry: Entry) -> None:
        if entry.copying:
            return  # its host memory is being read; _poll_copies comes back to it
        self.host.idle.offer(entry.ref.hash, self._worth(entry))
        self._trim_host(self.host.max_bytes)

    def _trim_host(self, to_bytes: int) -> None:
        while self.host.used_bytes > to_bytes and (victim := self.host.idle.pop()) is not None:
            self._leave_host(self._entries[victim])

    def _move_to_device(self, entry: Entry) -> bool:
        if entry.host is None:
            self._ask_for(entry, entry.ref)
            return False
        while self.device.used_bytes + entry.host.bytes > self.device.max_bytes:
            if not self.yield_room():
                return False
        while True:
            try:
                device = self._carrier.place(entry.host)
            except Exception as error:  # the device may be fuller than the budget knows
                if not (self._carrier.is_full(error) and self.yield_room()):
                    raise
                continue
            if device is not None:
                self._keep_on_device(entry, device)
                return True
            if not self.yield_room():
                return False

    def _place_early(self, entry: Entry) -> None:
        """Start the copy of an adapter that is wanted, if there is room that nobody else needs."""
        if not self._carrier.places_early:
            return
        while self.device.used_bytes + entry.host.bytes > self.device.max_bytes:
            victim = self.device.idle.peek()
            if victim is None or self._entries[victim].num_wanted > 0:
                return
            self._leave_device(self._entries[victim])
        try:
            device = self._carrier.place(entry.host)
        except Exception as error:  # `acquire` will meet it again, and tell the sequence that needs it
            log.warning("adapter %s could not be copied ahead (%s)", entry.ref.hash, error)
            return
        if device is not None:
            self._keep_on_device(entry, device)

    def _keep_on_device(self, entry: Entry, device: Any) -> None:
        entry.device = device
        self.device.add(device.bytes)
        entry.copying = not self._carrier.is_whole(device)
        if entry.copying:
            self._copying.append(entry)
        else:
            self._settle(entry)

    def _poll_copies(self) -> list[str]:
        whole = [entry for entry in self._copying if self._carrier.is_whole(entry.device)]
        for entry in whole:
            self._copying.remove(entry)
            entry.copying = False
            self._settle(entry)
            if entry.num_wanted == 0 and entry.forget:
                self._drop(entry)
            elif entry.num_wanted == 0 and entry.host is not None:
                self._offer_host(entry)
        return [entry.ref.hash for entry in whole if entry.device is not None]

    def _settle(self, entry: Entry) -> None:
        """It is whole on the device: it can be pinned now, and until then it can be asked to leave."""
        self._on_event(entry.ref.hash, "device", entry.device.bytes, entry.load_s, None)
        self.device.idle.offer(entry.ref.hash, self._worth(entry))

    def _leave_device(self, entry: Entry) -> None:
        self.device.remove(entry.ref.hash, entry.device.bytes)
        self._carrier.leave_device(entry.device)
        entry.device = None
        self._on_event(entry.ref.hash, entry.state, 0 if entry.host is None else entry.host.bytes, 0.0, None)
        self._let_go(entry)

    def _leave_host(self, entry: Entry) -> None:
        self.host.remove(entry.ref.hash, entry.host.bytes)
        self._carrier.leave_host(entry.host)
        entry.host = None
        self._on_event(entry.ref.hash, entry.state, 0, 0.0, None)
        self._let_go(entry)

    def _drop(self, entry: Entry) -> None:
        if entry.copying:
            return  # _poll_copies comes back to it
        if entry.device is not None:
            self._leave_device(entry)
        if entry.host is not None:
            self._leave_host(entry)
        self._let_go(entry)

    def _let_go(self, entry: Entry) -> None:
        """Forget an adapter that is nowhere and that nobody needs; a read that has not started yet is called off."""
        if entry.num_wanted > 0:
            return
        if entry.ref.hash in self._to_read:
            del self._to_read[entry.ref.hash]
            entry.reading = False
        if entry.state == "absent":
            self._entries.pop(entry.ref.hash, None)

    def _worth(self, entry: Entry) -> float:
        """Seconds that keeping it is likely to save, by byte."""
        size = entry.device.bytes if entry.device is not None else entry.host.bytes
        return max(1, entry.uses) * max(entry.load_s, 1e-6) / max(1, size)
