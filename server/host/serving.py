"""Whether the server on this instance serves, and a new instance in its place once it did not for too long.

The load balancer sends nothing to a server that answers 503, within half a minute, and sends again when it is well. The group does not
look at that: an engine that died is started again by its API process, an API process by systemd, in a few minutes, and a new instance
takes longer than both. Owns how long is too long; `agent` asks every few seconds.
"""

import logging
import time
from collections.abc import Callable

from server.host.group import Group
from server.host.load import ServerProbe

log = logging.getLogger(__name__)

START_S, HEAL_S, DRAIN_S = 1800.0, 600.0, 3600.0
LEAVE_S = 120.0  # beside the drain: from the announcement (SIGUSR1) to SIGTERM, and the end itself
WELL_S = 20.0  # of good answers, before a mark is taken back
_REASON = "serving"


class ServingWatch:
    """Seconds that a server may be away: `start_s` until it first served since the agent began or the group came to want it, `heal_s`
    afterwards. Time in which it serves is taken off, second for second: one that is away more than it is there loses its instance, too."""

    def __init__(
        self,
        probe: ServerProbe,
        group: Group,
        *,
        is_wanted: Callable[[], bool],
        start_s: float = START_S,
        heal_s: float = HEAL_S,
        drain_s: float = DRAIN_S,
    ) -> None:
        """`is_wanted`: whether this instance is to serve at all. Time in which it is not does not count, nor that in which the server was
        told to stop, for `drain_s` and a little."""
        self._probe, self._group, self._is_wanted = probe, group, is_wanted
        self._start_s, self._heal_s, self._leave_s = start_s, heal_s, drain_s + LEAVE_S
        self._has_served = self._is_marked = False
        self._away_s = self._well_s = self._leaving_s = 0.0
        self._asked_at: float | None = None

    def step(self) -> None:
        """Ask once; mark the instance unhealthy if the time is over, and again each time that it is over once more."""
        status, reason = self._probe.health()
        now = time.monotonic()
        passed_s, self._asked_at = now - (self._asked_at or now), now
        is_leaving = self._probe.is_leaving(status, reason)
        self._leaving_s = self._leaving_s + passed_s if is_leaving else 0.0
        if not self._is_wanted():
            self._has_served, self._away_s, self._well_s = False, 0.0, 0.0
        elif is_leaving and self._leaving_s <= self._leave_s:
            self._away_s = self._well_s = 0.0
        elif status == 200:
            self._well(passed_s)
        else:
            self._ill(passed_s, reason[:200] or "no answer")

    def _well(self, passed_s: float) -> None:
        if not self._has_served:
            self._has_served, self._away_s = True, 0.0  # a start has its own time
        elif self._away_s and not self._well_s:
            log.info("serving again; was away for %.0f s", self._away_s)
        self._away_s = max(self._away_s - passed_s, 0.0)
        self._well_s += passed_s
        if self._is_marked and self._well_s >= WELL_S:
            log.warning("serving again, and not replaced yet: the mark is taken back")
            self._group.withdraw(_REASON)
            self._is_marked = False

    def _ill(self, passed_s: float, reason: str) -> None:
        if self._well_s or not self._away_s:
            log.warning("not serving: %s", reason)
        self._well_s = 0.0
        self._away_s += passed_s
        if self._away_s < (self._heal_s if self._has_served else self._start_s):
            return
        log.error("not serving for %.0f s; this instance is to be replaced: %s", self._away_s, reason)
        self._is_marked = True  # also where the call fails, which may have gone through; it is made again
        self._group.mark_unhealthy(_REASON)
        self._away_s = 0.0
