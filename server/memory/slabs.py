"""Host memory for adapters that are on their way to the device: large slabs, page-locked where there is a GPU, cut into runs.

Owns the slabs. It does not know adapters. Page-locking is slow and holds up the driver, so it is done by the slab and never by the adapter.
Runs are taken in the readers' threads and given back in the engine's.
"""

import threading
from dataclasses import dataclass

import torch

UNIT_BYTES = 1 << 20
SLAB_BYTES = 256 << 20


@dataclass(eq=False, slots=True)
class _Slab:
    data: torch.Tensor  # uint8 [bytes]
    is_free: bytearray  # one for each unit


@dataclass(eq=False, slots=True)
class HostRun:
    """Some bytes of a slab. `data` may be used until `release`."""

    data: torch.Tensor  # uint8 [bytes]
    _owner: "HostSlabs"
    _slab: _Slab
    _first: int
    _num_units: int

    def release(self) -> None:
        """Give the bytes back; once."""
        self._owner._release(self)


class HostSlabs:
    """Allocates runs of bytes. Thread-safe."""

    def __init__(self, *, pinned: bool, slab_bytes: int = SLAB_BYTES) -> None:
        self._pinned, self._slab_bytes = pinned, slab_bytes
        self._slabs: list[_Slab] = []
        self._lock = threading.Lock()

    @property
    def total_bytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.data.numel() for slab in self._slabs)

    def reserve(self, num_bytes: int) -> None:
        """Have slabs of so many bytes ready, so that the first adapters do not wait for page-locking."""
        while self.total_bytes < num_bytes:
            self._add(1)

    def allocate(self, num_bytes: int) -> HostRun:
        """A run of `num_bytes`; a new slab is made where none has room."""
        num_units = max(1, -(-num_bytes // UNIT_BYTES))
        while True:
            with self._lock:
                for slab in self._slabs:
                    first = slab.is_free.find(b"\x01" * num_units)
                    if first >= 0:
                        slab.is_free[first : first + num_units] = bytes(num_units)
                        start = first * UNIT_BYTES
                        return HostRun(slab.data[start : start + num_bytes], self, slab, first, num_units)
            self._add(num_units)  # not under the lock: the engine's thread must be able to release meanwhile

    def _add(self, num_units: int) -> None:
        units = max(num_units, self._slab_bytes // UNIT_BYTES)
        slab = _Slab(torch.empty(units * UNIT_BYTES, dtype=torch.uint8, pin_memory=self._pinned), bytearray(b"\x01" * units))
        with self._lock:
            self._slabs.append(slab)

    def _release(self, run: HostRun) -> None:
        with self._lock:
            run._slab.is_free[run._first : run._first + run._num_units] = b"\x01" * run._num_units
            empty = [slab for slab in self._slabs if 0 not in slab.is_free]
            for slab in empty[1:]:  # one empty slab is kept for the next
                self._slabs.remove(slab)
