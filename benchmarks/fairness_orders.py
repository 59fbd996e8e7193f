"""Orders of waiting that the product's is compared with, behind the same seam (server.engine.waiting)."""

import heapq
from collections.abc import Collection, Iterable

from server.engine.chunk import Chunk
from server.engine.fairness import FairQueue
from server.engine.sequence import Sequence
from server.engine.waiting import WaitingQueue


class ArrivalQueue:
    """First come, first served: while the first one's adapter finds no room nobody else starts."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, Sequence]] = []
        self._put_by: list[tuple[int, Sequence]] = []
        self._running: Collection[str] = ()
        self._stopped = False
        self.num_queued = 0

    def join(self, sequence: Sequence) -> None:
        """Nothing is kept of who is here."""

    def leave(self, sequence: Sequence) -> None:
        """What left is dropped when it comes up."""
        if sequence.is_queued:
            sequence.is_queued = False
            self.num_queued -= 1

    def push(self, sequence: Sequence) -> None:
        """A preempted one has its old place."""
        sequence.is_queued = True
        self.num_queued += 1
        heapq.heappush(self._heap, (sequence.order, sequence))

    def begin(self, running: Collection[str], now: float) -> None:
        """All are looked at again."""
        self._running, self._stopped = running, False
        for item in self._put_by:
            heapq.heappush(self._heap, item)
        self._put_by.clear()

    def first(self) -> Sequence | None:
        """The oldest."""
        while self._heap and not self._stopped:
            sequence = self._heap[0][1]
            if sequence.is_queued and not sequence.num_unknown:
                return sequence
            item = heapq.heappop(self._heap)
            if sequence.is_queued:
                self._put_by.append(item)
        return None

    def take(self, sequence: Sequence) -> None:
        """It is the first."""
        heapq.heappop(self._heap)
        self.leave(sequence)

    def start(self, sequence: Sequence) -> None:
        """As `take`."""
        self.take(sequence)

    def refuse(self, sequence: Sequence) -> bool:
        """Nobody passes it."""
        self._stopped = True
        return False

    def charge(self, chunks: Iterable[Chunk]) -> None:
        """Nothing is counted."""

    def work_before(self, sequence: Sequence) -> float:
        """Not asked here: nobody has a deadline."""
        return 0.0


class SkippingQueue(ArrivalQueue):
    """vLLM's rule (v1/core/sched/scheduler.py): in order of arrival, but a request is skipped in this step if its adapter is not among
    those that run and there are as many as may. However long it has been skipped, others go on being started."""

    def __init__(self) -> None:
        super().__init__()
        self._is_full = False

    def begin(self, running: Collection[str], now: float) -> None:
        """There may be room again."""
        super().begin(running, now)
        self._is_full = False

    def first(self) -> Sequence | None:
        """The oldest that is not skipped."""
        while (sequence := super().first()) is not None:
            if not self._is_full or not sequence.adapter_hash or sequence.adapter_hash in self._running:
                return sequence
            self._put_by.append(heapq.heappop(self._heap))
        return None

    def refuse(self, sequence: Sequence) -> bool:
        """It is skipped, and so is everybody in this step whose adapter does not run."""
        self._is_full = True
        self._put_by.append(heapq.heappop(self._heap))
        return False


ORDERS: dict[str, type[WaitingQueue]] = {"order of arrival": ArrivalQueue, "vLLM's rule": SkippingQueue, "here": FairQueue}
