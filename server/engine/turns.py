"""What a fair order is made of: tenants, their lines (one an adapter), and whose turn it is by a counter. engine.fairness has the rules."""

import heapq
from typing import Protocol

from server.engine.sequence import Sequence

READY, REFUSED, HELD = 0, 1, 2  # lanes: may start; needs room on the device first; may not start for now


class Member(Protocol):
    """What takes turns: a tenant among tenants, or a line among those of its tenant."""

    counters: list[float]  # by lane: tokens given, room given

    def first(self, lane: int) -> Sequence | None:
        """The sequence whose turn it is when it is this member's."""


class Turns:
    """The members that have something in a lane, the lowest counter first; of equal ones, who waits longest.

    Counters only grow. A note in the heap may be too low, never too high, and is put right when it comes up: a charge is free here."""

    __slots__ = ("_lane", "_last", "_noted", "_notes", "level")

    def __init__(self, lane: int) -> None:
        self._lane = lane
        self._notes: list[tuple[float, int, Member]] = []
        self._noted: set[Member] = set()
        self._last: Member | None = None
        self.level = 0.0  # the counter of the last one whose turn it was, before it was charged: all who wait have as much

    def __contains__(self, member: Member) -> bool:
        return member in self._noted

    def enter(self, member: Member, order: int) -> None:
        """It has something in the lane now. `order`: of the sequence that it came with; no two members have one in common."""
        if member not in self._noted:
            self._noted.add(member)
            heapq.heappush(self._notes, (member.counters[self._lane], order, member))

    def lift(self, member: Member) -> None:
        """It joins those who wait: to the lowest of them, or if nobody waits to who was last."""
        first = self.first() or self._last
        floor = self.level if first is None else max(self.level, first.counters[self._lane])
        member.counters[self._lane] = max(member.counters[self._lane], floor)

    def passed(self, member: Member, *, was_first: bool) -> None:
        """It was given its turn, and is not charged yet. `was_first`: because its counter was the lowest."""
        self._last = member
        if was_first:
            self.level = max(self.level, member.counters[self._lane])

    def first(self) -> Member | None:
        """Whose turn it is."""
        lane, notes = self._lane, self._notes
        while notes:
            noted, _, member = notes[0]
            sequence = member.first(lane)
            if sequence is None:
                heapq.heappop(notes)
                self._noted.discard(member)
            elif noted < member.counters[lane]:
                heapq.heapreplace(notes, (member.counters[lane], sequence.order, member))
            else:
                return member
        return None


class Tenant:
    """A tenant's counters and lines."""

    __slots__ = ("counters", "lines", "name", "num_active", "num_queued", "price", "turns", "weight_queued", "work")

    def __init__(self, name: str) -> None:
        self.name = name
        self.price = 1.0  # one over its weight
        self.counters = [0.0, 0.0]
        self.turns = (Turns(READY), Turns(REFUSED))
        self.lines: dict[str, Line] = {}  # by adapter
        self.num_queued = self.num_active = 0  # sequences, and lines that have some
        self.work = 0.0  # of those sequences
        self.weight_queued = 1.0  # its weight when it joined the queue

    def first(self, lane: int) -> Sequence | None:
        """Of its first line."""
        line = self.turns[lane].first()
        return None if line is None else line.first(lane)


class Line:
    """One tenant's sequences for one adapter, in order of arrival."""

    __slots__ = ("_heap", "adapter_hash", "counters", "lane", "num_open", "num_queued", "tenant", "work")

    def __init__(self, tenant: Tenant, adapter_hash: str, lane: int) -> None:
        self.tenant, self.adapter_hash, self.lane = tenant, adapter_hash, lane
        self.counters = [0.0, 0.0]
        self._heap: list[tuple[int, Sequence]] = []  # what has left the queue is dropped when it comes up
        self.num_queued = 0  # preempted ones, which are elsewhere, included
        self.work = 0.0  # of those
        self.num_open = 0  # sequences queued, running or waiting for the adapter

    def first(self, lane: int) -> Sequence | None:
        """None as well if the line is in another lane."""
        if lane != self.lane:
            return None
        heap = self._heap
        while heap and not heap[0][1].is_queued:
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def push(self, sequence: Sequence) -> None:
        """Add a sequence."""
        heapq.heappush(self._heap, (sequence.order, sequence))

    def pop(self) -> None:
        """The first leaves."""
        heapq.heappop(self._heap)
