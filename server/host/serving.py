"""Whether the server on this instance serves, and a new instance in its place once it did not for too long.

The load balancer sends nothing to a server that answers 503, within half a minute, and sends again when it is well. The group does not
look at that: an engine that died is started again by its API process, an API process by systemd, in a few minutes, and a new instance
takes longer than both. Owns how long is too long, counted from the last good answer; `agent` asks every few seconds.
"""

import logging
import time
from collections.abc import Callable

from server.host.group import Group
from server.host.load import ServerProbe

log = logging.getLogger(__name__)

START_S, HEAL_S = 1800.0, 600.0


class ServingWatch:
    """Seconds that a server may be away: `start_s` until it first served since the agent began, `heal_s` afterwards."""

    def __init__(
        self, probe: ServerProbe, group: Group, *, is_wanted: Callable[[], bool], start_s: float = START_S, heal_s: float = HEAL_S
    ) -> None:
        """`is_wanted`: whether this instance is to serve at all. Time in which it is not, or in which the server drains, does not count."""
        self._probe, self._group, self._is_wanted = probe, group, is_wanted
        self._start_s, self._heal_s = start_s, heal_s
        self._has_served = False
        self._away_since_at: float | None = None

    def step(self) -> None:
        """Ask once; mark the instance unhealthy if the time is over, and again each time that it is over once more."""
        status, reason = self._probe.health()
        now = time.monotonic()
        if status == 200:
            if self._away_since_at is not None:
                log.info("serving again after %.0f s", now - self._away_since_at)
            self._has_served, self._away_since_at = True, None
        elif self._probe.is_leaving(status, reason) or not self._is_wanted():
            self._away_since_at = None
        elif self._away_since_at is None:
            log.warning("not serving: %s", reason[:200] or "no answer")
            self._away_since_at = now
        elif now - self._away_since_at >= (self._heal_s if self._has_served else self._start_s):
            log.error("not serving for %.0f s; this instance is to be replaced: %s", now - self._away_since_at, reason[:200] or "no answer")
            self._group.mark_unhealthy()
            self._away_since_at = now
