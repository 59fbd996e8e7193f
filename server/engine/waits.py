"""How long sequences wait for their first step: how long a newcomer would, by what was measured, and who has waited for too long.

Owns the measured rate and the deadlines. Knows no order: the waiting queue says how much comes before a newcomer. The scheduler calls it.
"""

import heapq
import math

from server.engine.sequence import Sequence
from server.errors import Overloaded

MEMORY_S = 10.0  # what is older counts little
MIN_MEASURED_S = 1.0  # nobody is refused for an estimate from less


class Waits:
    """`max_queue_s`: how long a sequence may wait for its first step; None: for ever.

    A sequence's work is its prompt and twice the answer that it is likely to have; the rate is the work that was started a second while
    somebody waited."""

    def __init__(self, max_queue_s: float | None) -> None:
        self.max_queue_s = max_queue_s
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._work = self._seconds = 0.0
        self._outputs, self._num_outputs = 0.0, 0.0
        self._waited_from: float | None = None  # since the last step somebody has waited

    def work(self, sequence: Sequence) -> float:
        """What it is likely to take, in tokens of a prompt."""
        num_outputs = sequence.request.params.max_new_tokens
        if self._num_outputs:
            num_outputs = min(num_outputs, self._outputs / self._num_outputs)
        return sequence.prompt_len + 2.0 * num_outputs

    def check(self, work_ahead: float) -> None:
        """Overloaded if what comes before a newcomer takes longer than it may wait. Says nothing before the rate was measured."""
        wait_s = self.estimate(work_ahead)
        if self.max_queue_s is not None and wait_s is not None and wait_s > self.max_queue_s:
            raise Overloaded(
                f"Model is overloaded: the request would wait {wait_s:.1f} s for its turn, and may wait {self.max_queue_s:g} s",
                retry_after_s=wait_s - self.max_queue_s,
            )

    def over(self, work_ahead: float) -> Overloaded:
        """What one is told whose time is up, `work_ahead` still being before it."""
        message = f"Model is overloaded: the request has waited {self.max_queue_s:g} s for its first step"
        return Overloaded(message, retry_after_s=max(1.0, self.estimate(work_ahead) or 0.0))

    def estimate(self, work_ahead: float) -> float | None:
        """Seconds until so much work has been started; None if the rate is not known."""
        if self._seconds < MIN_MEASURED_S or not self._work:
            return None
        return work_ahead * self._seconds / self._work

    def watch(self, sequence: Sequence) -> None:
        """It has come, and may wait from now on."""
        if self.max_queue_s is not None:
            heapq.heappush(self._deadlines, (sequence.arrived_at + self.max_queue_s, sequence.order, sequence))

    def ended(self, sequence: Sequence) -> None:
        """Its answer is whole, or what there is of it."""
        if sequence.started_at is not None:
            self._outputs = 0.98 * self._outputs + sequence.num_outputs
            self._num_outputs = 0.98 * self._num_outputs + 1.0

    def note_step(self, now: float, started: float, *, somebody_waits: bool) -> None:
        """A step was scheduled, in which so much work was started."""
        if self._waited_from is not None:
            seconds = now - self._waited_from
            kept = math.exp(-seconds / MEMORY_S)
            self._work, self._seconds = kept * self._work + started, kept * self._seconds + seconds
        self._waited_from = now if somebody_waits else None

    def is_over(self, now: float) -> bool:
        """Whether `expired` may have something to return."""
        return bool(self._deadlines) and self._deadlines[0][0] <= now

    def expired(self, now: float) -> list[Sequence]:
        """Those whose time is up, each once; the ones that started or ended in time are among them."""
        found = []
        while self.is_over(now):
            found.append(heapq.heappop(self._deadlines)[2])
        return found
