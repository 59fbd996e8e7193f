"""Whose turn it is: virtual token counters over tenants, and within a tenant over its adapters, of which the base is one.

VTC (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, arXiv 2401.00588): a counter holds what a tenant was given, in
tokens over its weight; the lowest is next, with its lowest adapter's oldest sequence. Who joins is lifted to the others: nobody banks
credit by staying away. Room for adapters on the device is a second thing to share. Sequences whose adapter finds none wait in a lane of
their own, whose turns go by how often each got room, so that one whose tenant is given tokens enough by other adapters still gets it.

Owns the order and the counters; engine.waiting says what each method is for. Knows neither blocks nor tiers: the scheduler starts whom
`first` names, or says that it cannot. Finding the first takes O(log n) for each tenant and adapter charged since the last time; a charge is
a constant. One thread calls it.
"""

import heapq
from collections.abc import Collection, Iterable
from itertools import islice

from server.engine.chunk import Chunk
from server.engine.sequence import Sequence
from server.engine.turns import HELD, READY, REFUSED, Line, Tenant, Turns

# A prompt's token costs 1, one that is generated 2: on an H100 25 us of arithmetic against 45 us of a full batch's step; the paper takes
# the same. What the prefix cache gives is free: it costs no step anything. Neither is what is computed again after a preemption charged.
PROMPT_PRICE, OUTPUT_PRICE = 1.0, 2.0
MIN_WEIGHT, MAX_WEIGHT = 1e-3, 1e3


class FairQueue:
    """The product's order. Sequences that were preempted come before all others, in the order in which they first started."""

    # A sequence whose turn it is and whose adapter finds no room is passed by those of adapters that run for so long. Then those adapters
    # that have run longest, a quarter of all at most, start no more sequences until it has room.
    MAX_OVERTAKEN_S = 2.0
    # Room goes to whose turn at room it is as soon as the tokens of its tenant allow that; to one in such a time whatever they say.
    ROOM_TURN_S = 1.0

    def __init__(self) -> None:
        self._tenants: dict[str, Tenant] = {}
        self._lines: dict[str, dict[str, Line]] = {}  # adapter -> tenant -> line
        self._turns = (Turns(READY), Turns(REFUSED))
        self._preempted: list[tuple[int, Sequence]] = []
        self._put_by: list[tuple[int, Sequence]] = []  # preempted, and without room for their adapter in this step
        self._refused_at: dict[str, float] = {}  # adapters that somebody waits to have room for, the longest first
        self._held: set[str] = set()
        self._running: Collection[str] = ()
        self._now = self._room_turn_at = 0.0
        self._no_room = False  # somebody was refused in this step
        self._num_lines, self._max_lines = 0, 64
        self.num_queued, self.work, self._weight_queued = 0, 0.0, 0.0

    def join(self, sequence: Sequence) -> None:
        """As WaitingQueue."""
        request = sequence.request
        if not MIN_WEIGHT <= request.weight <= MAX_WEIGHT:
            raise ValueError(f"a weight is between {MIN_WEIGHT} and {MAX_WEIGHT}. Given: {request.weight}")
        tenant = self._tenants.get(request.tenant)
        if tenant is None:
            tenant = self._tenants[request.tenant] = Tenant(request.tenant)
        tenant.price = 1.0 / request.weight
        lines = self._lines.setdefault(sequence.adapter_hash, {})
        line = lines.get(request.tenant)
        if line is None:
            line = lines[request.tenant] = Line(tenant, sequence.adapter_hash, self._lane_of(sequence.adapter_hash))
            tenant.lines[sequence.adapter_hash] = line
            self._num_lines += 1
        line.num_open += 1
        sequence.line = line
        if self._num_lines > self._max_lines:
            self._forget_idle()

    def leave(self, sequence: Sequence) -> None:
        """As WaitingQueue."""
        if sequence.is_queued:
            self._dequeue(sequence)
        sequence.line.num_open -= 1

    def push(self, sequence: Sequence) -> None:
        """As WaitingQueue. Lifts the counters of those who had nothing in the queue."""
        line, tenant = sequence.line, sequence.line.tenant
        if not tenant.num_queued:
            self._turns[READY].lift(tenant)
        if not line.num_queued:
            tenant.turns[READY].lift(line)
        self._count(sequence, 1)
        if sequence.start_order is not None:
            heapq.heappush(self._preempted, (sequence.start_order, sequence))
        else:
            line.push(sequence)
            self._enter(line)

    def begin(self, running: Collection[str], now: float) -> None:
        """As WaitingQueue."""
        self._running, self._now, self._no_room = running, now, False
        for item in self._put_by:
            heapq.heappush(self._preempted, item)
        self._put_by.clear()
        if self._held and not self._is_anybody_late():
            self._hold(())

    def first(self) -> Sequence | None:
        """As WaitingQueue."""
        while self._preempted:
            sequence = self._preempted[0][1]
            if sequence.is_queued:
                # Its last token may not be here yet. It is once this step is launched, and nobody passes it.
                return None if sequence.num_unknown else sequence
            heapq.heappop(self._preempted)
        while True:
            ready, refused = self._first(READY), None if self._no_room else self._first(REFUSED)
            if refused is not None and (ready is None or self._comes_first(refused, ready)):
                return refused
            if ready is None or not ready.adapter_hash or ready.adapter_hash in self._running:
                return ready
            if not self._no_room and not self._refused_at:
                return ready
            self._note_refusal(ready.adapter_hash)  # room goes to those who wait for it already

    def take(self, sequence: Sequence) -> None:
        """As WaitingQueue."""
        if sequence.start_order is not None:
            heapq.heappop(self._preempted)
        else:
            sequence.line.pop()
        self._dequeue(sequence)

    def start(self, sequence: Sequence) -> None:
        """As WaitingQueue. Its adapter's other sequences need no more room: they go by tokens alone again."""
        line, tenant = sequence.line, sequence.line.tenant
        was_first = line.lane == READY and sequence.start_order is None
        self._turns[READY].passed(tenant, was_first=was_first)
        tenant.turns[READY].passed(line, was_first=was_first)
        if line.lane == REFUSED:
            self._turns[REFUSED].passed(tenant, was_first=True)
            tenant.turns[REFUSED].passed(line, was_first=True)
            line.counters[REFUSED] += 1.0
            tenant.counters[REFUSED] += tenant.price
            self._room_turn_at = self._now
        self.take(sequence)
        if self._refused_at.pop(sequence.adapter_hash, None) is not None:
            self._move(sequence.adapter_hash)

    def refuse(self, sequence: Sequence) -> bool:
        """As WaitingQueue."""
        self._no_room = True
        if sequence.start_order is not None:
            self._put_by.append(heapq.heappop(self._preempted))
        self._note_refusal(sequence.adapter_hash)
        if self._is_anybody_late():
            most = min(len(self._refused_at), max(1, len(self._running) // 4))
            self._hold(islice(self._running, most))
        return self._now - self._refused_at[sequence.adapter_hash] > self.MAX_OVERTAKEN_S

    def charge(self, chunks: Iterable[Chunk]) -> None:
        """As WaitingQueue."""
        for sequence, num_tokens, samples in chunks:
            cost = OUTPUT_PRICE if samples else 0.0
            if sequence.num_charged < sequence.prompt_len:
                num_prompt = min(sequence.num_computed + num_tokens, sequence.prompt_len)
                if num_prompt > sequence.num_charged:
                    cost += PROMPT_PRICE * (num_prompt - sequence.num_charged)
                    sequence.num_charged = num_prompt
            line = sequence.line
            tenant = line.tenant
            line.counters[READY] += cost
            tenant.counters[READY] += cost * tenant.price

    def work_before(self, sequence: Sequence) -> float:
        """As WaitingQueue. While its tenant's share of its own queue is worked off, so are the others' shares."""
        request = sequence.request
        tenant, line = self._tenants.get(request.tenant), self._lines.get(sequence.adapter_hash, {}).get(request.tenant)
        if tenant is None or not tenant.num_queued:
            return 0.0
        own = tenant.work if line is None else min(tenant.work, line.work * tenant.num_active)
        return min(self.work, own * self._weight_queued / tenant.weight_queued)

    def _first(self, lane: int) -> Sequence | None:
        tenant = self._turns[lane].first()
        return None if tenant is None else tenant.first(lane)

    def _comes_first(self, refused: Sequence, ready: Sequence) -> bool:
        return self._now - self._room_turn_at >= self.ROOM_TURN_S or _tokens(refused) <= _tokens(ready)

    def _is_anybody_late(self) -> bool:
        refused_at = next(iter(self._refused_at.values()), self._now)
        return self._now - refused_at > self.MAX_OVERTAKEN_S

    def _note_refusal(self, adapter_hash: str) -> None:
        if adapter_hash not in self._refused_at:
            self._refused_at[adapter_hash] = self._now
            self._move(adapter_hash)

    def _hold(self, adapter_hashes: Iterable[str]) -> None:
        before, self._held = self._held, set(adapter_hashes)
        for adapter_hash in before ^ self._held:
            self._move(adapter_hash)

    def _lane_of(self, adapter_hash: str) -> int:
        return HELD if adapter_hash in self._held else REFUSED if adapter_hash in self._refused_at else READY

    def _move(self, adapter_hash: str) -> None:
        lane = self._lane_of(adapter_hash)
        for line in self._lines.get(adapter_hash, {}).values():
            line.lane = lane
            self._enter(line)

    def _enter(self, line: Line) -> None:
        """Let the line take its turns in the lane that it is in."""
        sequence = line.first(line.lane)
        if sequence is None or line.lane == HELD:
            return
        tenant, lane = line.tenant, line.lane
        if lane == REFUSED and line not in tenant.turns[lane]:
            if tenant not in self._turns[lane]:
                self._turns[lane].lift(tenant)
            tenant.turns[lane].lift(line)
        tenant.turns[lane].enter(line, sequence.order)
        self._turns[lane].enter(tenant, sequence.order)

    def _dequeue(self, sequence: Sequence) -> None:
        self._count(sequence, -1)
        line = sequence.line
        others = self._lines[line.adapter_hash].values()
        if line.adapter_hash in self._refused_at and not any(other.num_queued for other in others):
            del self._refused_at[line.adapter_hash]
            self._move(line.adapter_hash)

    def _count(self, sequence: Sequence, sign: int) -> None:
        """It is in the queue now (1), or is no more (-1)."""
        sequence.is_queued = sign > 0
        line, tenant = sequence.line, sequence.line.tenant
        if sign > 0:
            tenant.num_active += not line.num_queued
            if not tenant.num_queued:
                tenant.weight_queued = 1.0 / tenant.price
                self._weight_queued += tenant.weight_queued
        for owner in (self, tenant, line):
            owner.num_queued += sign
            owner.work = owner.work + sign * sequence.work if owner.num_queued else 0.0
        if sign < 0:
            tenant.num_active -= not line.num_queued
            if not tenant.num_queued:
                self._weight_queued -= tenant.weight_queued

    def _forget_idle(self) -> None:
        """Forget who has nothing here and would be lifted anyway when it comes back."""
        for tenant in list(self._tenants.values()):
            is_gone = not any(line.num_open for line in tenant.lines.values()) and not _owes(tenant, self._turns)
            for line in list(tenant.lines.values()):
                if is_gone or not (line.num_open or _owes(line, tenant.turns)):
                    del tenant.lines[line.adapter_hash], self._lines[line.adapter_hash][tenant.name]
                    self._num_lines -= 1
                    if not self._lines[line.adapter_hash]:
                        del self._lines[line.adapter_hash]
            if is_gone:
                del self._tenants[tenant.name]
        self._max_lines = 64 + 2 * self._num_lines


def _tokens(sequence: Sequence) -> tuple[float, float, int]:
    line = sequence.line
    return line.tenant.counters[READY], line.counters[READY], sequence.order


def _owes(member: Line | Tenant, turns: tuple[Turns, Turns]) -> bool:
    return any(counter > turns[lane].level for lane, counter in enumerate(member.counters))
