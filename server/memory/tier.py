"""What AdapterTiers is made of: an adapter's entry, a tier's budget, and the carrier that moves adapters between tiers.

Owns no decision. It does not know tensors or files: a carrier that does is given by model/.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from server.memory.eviction import EvictionOrder
from server.types import AdapterRef


@dataclass(slots=True, eq=False)
class Entry:
    """One adapter, wherever it is."""

    ref: AdapterRef
    num_wanted: int = 0  # sequences queued or running that need it
    num_pins: int = 0  # sequences running on the device with it
    reading: bool = False  # queued for a reader, or with one
    copying: bool = False  # has its place on the device, and is not whole there yet
    host: Any = None
    device: Any = None
    uses: int = 0
    load_s: float = 0.0
    forget: bool = False

    @property
    def state(self) -> str:
        """ "absent", "loading", "host", "copying" (on its way to the device) or "device"."""
        if self.device is not None:
            return "copying" if self.copying else "device"
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


class Carrier:
    """How adapters are moved: `read(ref)` returns an object with `.bytes` in host memory, `place(host)` one on the device.

    This one is for a device on which what `place` returns can be used at once and lets go of its memory by itself."""

    places_early = False  # `place` returns before the copy is done, so that it is worth starting before it is needed

    def __init__(self, read: Callable[[AdapterRef], Any], place: Callable[[Any], Any]) -> None:
        self.read = read
        self.place = place  # None: there is no room for it, whatever the budget says

    def is_full(self, error: Exception) -> bool:
        """Whether `place` failed for want of memory, so that it may work once something else has left."""
        return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, which is not loaded here

    def is_whole(self, device: Any) -> bool:
        """Whether the copy to the device is done."""
        return True

    def leave_host(self, host: Any) -> None:
        """Free the memory of what `read` returned."""

    def leave_device(self, device: Any) -> None:
        """Free the memory of what `place` returned."""
