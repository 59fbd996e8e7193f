"""What the scheduler asks of an order in which sequences wait. engine.fairness is the product's; benchmarks have others beside it."""

from collections.abc import Collection, Iterable
from typing import Protocol

from server.engine.chunk import Chunk
from server.engine.sequence import Sequence


class WaitingQueue(Protocol):
    """What the scheduler asks of an order of waiting sequences. Sequences whose adapter is still being read are not in it."""

    num_queued: int

    def join(self, sequence: Sequence) -> None:
        """It is here, queued or not, until `leave`. ValueError if its request is not to be had in this order."""

    def leave(self, sequence: Sequence) -> None:
        """It has ended, wherever it is."""

    def push(self, sequence: Sequence) -> None:
        """It can start from now on, for the first time or again after a preemption."""

    def begin(self, running: Collection[str], now: float) -> None:
        """A step's turns begin. `running`: the adapters that sequences run with, in the order in which they began to."""

    def first(self) -> Sequence | None:
        """Whose turn it is; None if nobody can start any more in this step."""

    def take(self, sequence: Sequence) -> None:
        """The first leaves the queue: its adapter has to be read."""

    def start(self, sequence: Sequence) -> None:
        """The first leaves the queue, and runs."""

    def refuse(self, sequence: Sequence) -> bool:
        """The first's adapter finds no room on the device now; whether that has gone on for too long."""

    def charge(self, chunks: Iterable[Chunk]) -> None:
        """The chunks are in the next step."""

    def work_before(self, sequence: Sequence) -> float:
        """The work (engine.waits) that is likely to be started before this one, in the queue or about to join it."""
        ...
