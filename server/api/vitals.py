"""What was last heard of an engine, and what follows from it: well, unwell, or to be killed. Monotonic seconds alone; api.engine asks."""

import math
import time

from server.ipc.messages import FromEngine, Heartbeat, Ready

_START_SILENCE = 5  # times the hang's timeout: loading and compiling may keep the interpreter, and with it the heartbeat, for long


class Vitals:
    """Of one engine process after the other."""

    def __init__(self, *, start_timeout_s: float, heartbeat_timeout_s: float, hang_timeout_s: float) -> None:
        self._start_timeout_s, self._heartbeat_timeout_s, self._hang_timeout_s = start_timeout_s, heartbeat_timeout_s, hang_timeout_s
        self.heartbeat: Heartbeat | None = None
        self._started_at = self._heard_at = 0.0
        self._unwell_since_at: float | None = None
        self._ready_at: float | None = None

    def begin(self) -> None:
        """A new process was started; silence is counted from its first word on."""
        self._started_at, self._heard_at = time.monotonic(), math.inf
        self.heartbeat = self._unwell_since_at = self._ready_at = None

    def hear(self, message: FromEngine) -> None:
        """It said something."""
        self._heard_at = time.monotonic()
        if isinstance(message, Heartbeat):
            self.heartbeat = message
        elif isinstance(message, Ready):
            self._ready_at = self._heard_at

    @property
    def age_s(self) -> float:
        """Since its start."""
        return time.monotonic() - self._started_at

    @property
    def ready_s(self) -> float:
        """Since it became ready; 0 if it never did."""
        return 0.0 if self._ready_at is None else time.monotonic() - self._ready_at

    def unhealthy_reason(self) -> str | None:
        """Why an engine that was ready is unwell: silent, or stuck; None if it is not."""
        now, beat = time.monotonic(), self.heartbeat
        if (silent_s := now - self._heard_at) > self._heartbeat_timeout_s:
            return f"the engine has been silent for {silent_s:.0f} s"
        if beat is not None and beat.phase_deadline_at is not None and now > beat.phase_deadline_at:
            return f"the engine is stuck in phase '{beat.phase}'"
        return None

    def note(self, reason: str | None) -> bool:
        """It is well (None) or unwell now; whether it has just fallen ill."""
        if reason is None:
            self._unwell_since_at = None
            return False
        is_new = self._unwell_since_at is None
        self._unwell_since_at = self._unwell_since_at or time.monotonic()
        return is_new

    @property
    def is_lost(self) -> bool:
        """Whether it has been unwell for too long."""
        return self._unwell_since_at is not None and time.monotonic() - self._unwell_since_at > self._hang_timeout_s

    def why_not_started(self) -> str | None:
        """Why an engine that is not ready yet is given up; None if it is not."""
        if self.age_s > self._start_timeout_s:
            return f"the engine was not ready after {self._start_timeout_s:.0f} s"
        if (silent_s := time.monotonic() - self._heard_at) > _START_SILENCE * self._hang_timeout_s:
            return f"the engine has been silent for {silent_s:.0f} s while it started"
        return None
