"""An instance that is to go stops taking requests, finishes those it has, and says so; one that is ready says so too.

Reads the metadata service, speaks to the group's two hooks and to systemd. Knows nothing of requests: the server drains by itself when it
is told to stop. `agent` calls `step` every few seconds; nothing here blocks.
"""

import logging
import subprocess
import time
from collections.abc import Callable, Sequence

from server.host.group import Group
from server.host.metadata import InstanceMetadata

log = logging.getLogger(__name__)

SETTLE_S = 10.0  # from the group's decision until the load balancer sends nothing more
EXTEND_EVERY_S = 60.0
_FIRST_PAUSE_S, _NUM_TRIES = 5.0, 7  # each pause is twice the last one: five minutes in all, the drain hook's own time
_LONGEST_PAUSE_S = 60.0  # after calls that failed


class Completion:
    """Lets the transition that waits at a hook go on: tried with growing pauses until it went through, given up after `_NUM_TRIES`
    answers that nothing waits. A call that fails is no answer, however many do.

    Nothing waits where the agent was started anew in an instance that is in service, where the hook was made after the launch, or where
    its time is over; and no answer of Auto Scaling's tells these from a transition that is about to wait."""

    def __init__(self, group: Group, hook: str) -> None:
        """`hook` empty: there is nothing to do."""
        self._group, self._hook = group, hook
        self._num_left, self._pause_s, self._next_at = _NUM_TRIES if hook else 0, _FIRST_PAUSE_S, 0.0
        self._failed_pause_s = _FIRST_PAUSE_S

    @property
    def is_due(self) -> bool:
        """Whether to try now."""
        return self._num_left > 0 and time.monotonic() >= self._next_at

    def step(self) -> bool:
        """Try if it is time to; whether it went through now. botocore's errors pass through."""
        if not self.is_due:
            return False
        try:
            is_through = self._group.complete_hook(self._hook)
        except Exception:
            self._next_at = time.monotonic() + self._failed_pause_s
            self._failed_pause_s = min(2 * self._failed_pause_s, _LONGEST_PAUSE_S)
            raise
        self._next_at, self._pause_s = time.monotonic() + self._pause_s, 2 * self._pause_s
        self._failed_pause_s = _FIRST_PAUSE_S
        self._num_left = 0 if is_through else self._num_left - 1
        if is_through:
            return True
        if not self._num_left:
            log.info("hook %s: nothing waits there", self._hook)
        return False


class Lifecycle:
    """What this instance is on its way to, and the drain."""

    def __init__(
        self,
        metadata: InstanceMetadata,
        group: Group,
        *,
        is_serving: Callable[[], bool],
        stop_server: Sequence[str],
        start_server: Sequence[str],
        drain_hook: str,
        launch_hook: str = "",
        settle_s: float = SETTLE_S,
    ) -> None:
        """`stop_server` ends when the server has (`systemctl stop`). `launch_hook` empty: no hook holds a launch."""
        self._metadata, self._group, self._is_serving = metadata, group, is_serving
        self._stop_server, self._start_server = list(stop_server), list(start_server)
        self._drain_hook, self._launch_hook, self._settle_s = drain_hook, launch_hook, settle_s
        self._target: str | None = None
        self._was_in_service = False
        self._launch, self._end = Completion(group, launch_hook), Completion(group, drain_hook)
        self._leaving_since_at: float | None = None
        self._extended_at = 0.0
        self._stopping: subprocess.Popen[bytes] | None = None
        self._is_told = True  # the group, where this instance knew first that it goes
        self.drained = False

    @property
    def is_leaving(self) -> bool:
        """Whether a drain has begun."""
        return self._leaving_since_at is not None

    @property
    def is_wanted(self) -> bool:
        """Whether the group has this instance serve, or is about to."""
        return self._target == "InService" and not self.is_leaving

    def step(self) -> None:
        """Look at what is to come and do the next thing about it."""
        self._tell_group()
        if self.drained:
            self._return_if_wanted()
            return
        if self._leaving_since_at is None:
            reason = self._reason_to_leave()
            if reason is None:
                self._announce_when_serving()
                return
            log.warning("draining: %s", reason)
            self._leaving_since_at = time.monotonic()
            self._tell_group()
        self._drain()

    def _reason_to_leave(self) -> str | None:
        target = self._metadata.lifecycle_target()
        if target != self._target:  # the launch hook holds the way into a warm pool, and once more the way out of it
            self._target, self._launch = target, Completion(self._group, self._launch_hook)
        self._was_in_service = self._was_in_service or target == "InService"
        if target == "Terminated":
            return "the group terminates this instance"
        if target is not None and target.startswith("Warmed:") and self._was_in_service:
            return "the group returns this instance to its warm pool"
        if notice := self._metadata.spot_notice():
            self._is_told = False
            return f"spot notice, {notice}"
        return None

    def _tell_group(self) -> None:
        """The group learns of a spot notice here: it takes the instance out of the load balancer and starts another one now, not in two
        minutes. The drain has no time to wait for a call that fails; it is made again at every step."""
        if self._is_told:
            return
        try:
            self._group.mark_unhealthy("spot")
            self._is_told = True
        except Exception as error:
            log.warning("the group cannot be told of the spot notice, and will be again: %r", error)

    def _announce_when_serving(self) -> None:
        """A launch that waits at the hook goes on when the server answers, not before."""
        if self._launch.is_due and self._is_serving() and self._launch.step():
            log.info("serving; the launch goes on")

    def _drain(self) -> None:
        now = time.monotonic()
        assert self._leaving_since_at is not None
        if self._stopping is None:
            if now - self._leaving_since_at < self._settle_s:
                return
            self._stopping = subprocess.Popen(self._stop_server)
        if self._stopping.poll() is None:
            if now - self._extended_at > EXTEND_EVERY_S:
                self._group.extend_hook(self._drain_hook)
                self._extended_at = now
            return
        log.info("drained after %.0f s, exit status %d", now - self._leaving_since_at, self._stopping.returncode)
        self.drained = True
        self._end = Completion(self._group, self._drain_hook)
        self._end.step()

    def _return_if_wanted(self) -> None:
        """A running instance of a warm pool comes back without a boot. A hook that waits only after the drain is completed then."""
        target = self._metadata.lifecycle_target()
        if target != self._target:
            self._target, self._end = target, Completion(self._group, self._drain_hook)
        if target == "InService" and self._metadata.spot_notice() is None:
            log.info("in service again; starting the server")
            subprocess.run(self._start_server, check=True)
            self._leaving_since_at = self._stopping = None
            self.drained, self._launch = False, Completion(self._group, self._launch_hook)
        else:
            self._end.step()
