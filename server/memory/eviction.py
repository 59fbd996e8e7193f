"""In which order idle things are evicted: Greedy-Dual-Size-Frequency (Cherkasova 1998).

Priority = clock + worth, where worth is uses x seconds to reload / bytes, and the clock rises to the priority of what was last evicted, so
that what was once popular ages. Owns the order alone; does not know what is evicted.
"""

import heapq
import itertools


class EvictionOrder:
    """A heap of what may be evicted, O(log n) a change. What is in use is not in it."""

    def __init__(self) -> None:
        self._clock = 0.0
        self._heap: list[tuple[float, int, str]] = []
        self._current: dict[str, int] = {}  # key -> the tick of its valid note; older notes in the heap are stale
        self._ticks = itertools.count()

    def __len__(self) -> int:
        return len(self._current)

    def offer(self, key: str, worth: float) -> None:
        """It may be evicted from now on; a second offer replaces the first."""
        tick = next(self._ticks)
        self._current[key] = tick
        heapq.heappush(self._heap, (self._clock + worth, tick, key))
        if len(self._heap) > 2 * len(self._current) + 64:
            self._heap = [note for note in self._heap if self._current.get(note[2]) == note[1]]
            heapq.heapify(self._heap)

    def withdraw(self, key: str) -> None:
        """It is in use again, or gone."""
        self._current.pop(key, None)

    def peek(self) -> str | None:
        """What `pop` would return."""
        while self._heap and self._current.get(self._heap[0][2]) != self._heap[0][1]:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> str | None:
        """What to evict first, taken out of the order; None if there is nothing."""
        while self._heap:
            priority, tick, key = heapq.heappop(self._heap)
            if self._current.get(key) == tick:
                del self._current[key]
                self._clock = max(self._clock, priority)
                return key
        return None
