"""What was tried to recover one device: a count that outlives attempts, servers and daemons."""

from __future__ import annotations

from dataclasses import dataclass, replace

OVERRUN = 15.0
"""Seconds that a command may outlive its limit: its time counts from when a child took it, and ending it takes a while."""


@dataclass(frozen=True, slots=True)
class Trail:
    """What was tried for one instance of a device. Times are CLOCK_MONOTONIC seconds."""

    attempts: int = 0  # begun since it was last served for long enough
    began: float | None = None  # the attempt under way
    limit: float = 0.0  # when that one, or a command of it that nobody watches any more, is to be over
    not_before: float = 0.0
    trouble: str = ""  # why the last attempt failed
    served_since: float | None = None

    @property
    def is_running(self) -> bool:
        """A recovery command is under way."""
        return self.began is not None

    def is_given_up(self, attempts: int) -> bool:
        """The breaker is open: so many attempts are used up."""
        return not self.is_running and self.attempts >= attempts

    def begun(self, now: float, timeout: float) -> Trail:
        """One more attempt is under way."""
        return replace(self, attempts=self.attempts + 1, began=now, limit=now + timeout, served_since=None)

    def succeeded(self, now: float, pause: float) -> Trail:
        """The device is served again. Should that not last, the next attempt waits like after a failure."""
        return replace(self, began=None, limit=0.0, trouble="", not_before=now + pause, served_since=now)

    def failed(self, why: str, now: float, pause: float) -> Trail:
        """The attempt came to nothing."""
        return replace(self, began=None, limit=0.0, trouble=why, not_before=now + pause)

    def left_alone(self, why: str, now: float, pause: float) -> Trail:
        """Nobody can tell what came of it; the command may run on until its limit, and nothing beside it."""
        return replace(self, began=None, trouble=why, not_before=max(self.limit, now + pause))

    def forgotten(self) -> Trail:
        """Attempts begin anew, though not beside a command that may still run."""
        return Trail(limit=self.limit, not_before=self.limit)

    def abandoned(self) -> Trail:
        """The daemon that ran the command is gone; the command may run on until its limit, and nothing beside it."""
        why = f"the daemon ended during attempt {self.attempts}"
        limit = self.limit + OVERRUN
        return replace(self, began=None, limit=limit, trouble=why, not_before=max(limit, self.not_before))

    def looked_at(self, now: float, stable: float, *, served: bool) -> Trail:
        """A look found it served or not."""
        if served:
            return replace(self, served_since=now) if self.served_since is None and not self.is_running else self
        if self.served_since is not None and now - self.served_since >= stable:
            return self.forgotten()
        return replace(self, served_since=None)


NO_TRAIL = Trail()
