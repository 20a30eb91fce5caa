"""What a person is told, and about what: the nouns of alerts, and which fault a verdict is.

Rules:
1. One fault is one alert. Its key is made of what stays the same as long as the fault lasts (the device's id, which
   instance of the id, and the kind), and never of what changes meanwhile (its age, its holders, its sentence).
2. What raises an alert is narrower than what keeps it: a device that has called somebody because nobody serves it is not
   well because somebody has just begun to recover it, nor because nothing can be seen of it. So `fault_of` and `lasts` are
   two questions.
3. An alert that is over stays over: the same fault, come again, is another alert with the same key and a later time.
4. What is here is foreign text made printable already, and JSON: it is kept in the journal and sent to other machines.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Self

from duende_ublkd.core.model import Action, VerdictKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from duende_ublkd.core.model import Judged

RUNBOOK = "README.md"  # what to do about each alert


class Severity(Enum):
    """How much it matters that somebody comes."""

    INFO = "info"  # nobody has to
    WARNING = "warning"  # somebody has to, in working hours
    CRITICAL = "critical"  # now

    @property
    def rank(self) -> int:
        """From 0 on."""
        return _RANKS[self]

    def at_least(self, other: Severity) -> bool:
        """Whether it matters as much as `other`, or more."""
        return self.rank >= other.rank


_RANKS = {Severity.INFO: 0, Severity.WARNING: 1, Severity.CRITICAL: 2}


class AlertKind(Enum):
    """What a person is told about. README has a heading for each."""

    CLEANED = "cleaned"  # an orphan was found and deleted; over as soon as it is raised
    ORPHANED = "orphaned"  # an orphan that is not deleted
    UNSERVED = "unserved"  # past its deadline
    RECOVERY_FAILED = "recovery-failed"  # an attempt; another follows
    RECOVERY_GIVEN_UP = "recovery-given-up"
    PINNED = "pinned"
    WEDGED = "wedged"
    UNKNOWN = "unknown"
    DRIVER_MISSING = "driver-missing"
    DEGRADED = "degraded"  # the daemon itself; one alert for each cause
    TEST = "test"

    @property
    def severity(self) -> Severity:
        """Of an alert of this kind."""
        return _SEVERITIES[self]

    @property
    def is_momentary(self) -> bool:
        """It tells of what has happened, and is over as soon as it is raised."""
        return self in (AlertKind.CLEANED, AlertKind.TEST)

    @property
    def settles_in(self) -> float:
        """Seconds that it has to last before somebody is called: the kernel, udev and servers on their way out need some."""
        return _SETTLES_IN.get(self, 0.0)

    @property
    def runbook(self) -> str:
        """The anchor of its heading in README: `### Alert: pinned`."""
        return f"alert-{self.value}"


_SEVERITIES = {
    AlertKind.CLEANED: Severity.INFO,
    AlertKind.ORPHANED: Severity.WARNING,
    AlertKind.UNSERVED: Severity.CRITICAL,
    AlertKind.RECOVERY_FAILED: Severity.WARNING,
    AlertKind.RECOVERY_GIVEN_UP: Severity.CRITICAL,
    AlertKind.PINNED: Severity.WARNING,
    AlertKind.WEDGED: Severity.CRITICAL,
    AlertKind.UNKNOWN: Severity.WARNING,
    AlertKind.DRIVER_MISSING: Severity.CRITICAL,
    AlertKind.DEGRADED: Severity.WARNING,
    AlertKind.TEST: Severity.INFO,
}

_SETTLES_IN = {
    AlertKind.ORPHANED: 3.0,  # one that was spared at the last moment is tried again a second later
    AlertKind.PINNED: 3.0,  # udev reads a disk that is going away
    AlertKind.UNKNOWN: 3.0,  # the next look may see what this one has missed
}


@dataclass(frozen=True, slots=True)
class Alert:
    """One fault that a person is told about. Times are seconds since the epoch."""

    key: str  # `ublk3/4711/pinned`: id, instance, kind; or `daemon/journal`
    kind: AlertKind
    severity: Severity
    summary: str  # one printable line
    raised_at: float
    dev_id: int | None = None
    instance: int | None = None  # the sysfs inode
    facts: dict[str, Any] = field(default_factory=dict)  # JSON values
    over_at: float | None = None
    over_why: str = ""  # one printable line

    @property
    def is_over(self) -> bool:
        """The fault is gone."""
        return self.over_at is not None

    @property
    def runbook(self) -> str:
        """The anchor of its heading in README."""
        return self.kind.runbook

    def to_object(self) -> dict[str, Any]:
        """As JSON values, for the journal and for programs."""
        return {
            "key": self.key,
            "kind": self.kind.value,
            "severity": self.severity.value,
            "dev_id": self.dev_id,
            "instance": self.instance,
            "summary": self.summary,
            "runbook": self.runbook,
            "facts": self.facts,
            "raised_at": self.raised_at,
            "over_at": self.over_at,
            "over_why": self.over_why,
        }

    @classmethod
    def from_object(cls, value: Mapping[str, Any]) -> Self:
        """What `to_object` made. ValueError: it is no such thing."""
        try:
            alert = cls(
                key=value["key"],
                kind=AlertKind(value["kind"]),
                severity=Severity(value["severity"]),
                dev_id=value["dev_id"],
                instance=value["instance"],
                summary=value["summary"],
                facts=dict(value["facts"]),
                raised_at=checked_time(value["raised_at"]),
                over_at=None if value["over_at"] is None else checked_time(value["over_at"]),
                over_why=value["over_why"],
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"no alert: {error!r}") from error
        texts = (alert.key, alert.summary, alert.over_why)
        numbers = (alert.dev_id, alert.instance)
        if not all(isinstance(text, str) for text in texts) or not all(
            isinstance(each, int | None) for each in numbers
        ):
            raise ValueError(f"no alert: {alert}")
        return alert


def checked_time(value: Any) -> float:  # noqa: ANN401 - JSON
    """Seconds since the epoch that everybody can write down as a date. ValueError, TypeError: they are not."""
    seconds = float(value)
    if not 0 <= seconds <= _LATEST:
        raise ValueError(f"{seconds} is no time")
    return seconds


_LATEST = 253_402_300_799.0  # 9999-12-31T23:59:59Z


_ALERTED = {
    VerdictKind.ORPHANED: AlertKind.ORPHANED,
    VerdictKind.UNSERVED: AlertKind.UNSERVED,
    VerdictKind.PINNED: AlertKind.PINNED,
    VerdictKind.WEDGED: AlertKind.WEDGED,
    VerdictKind.UNKNOWN: AlertKind.UNKNOWN,
}
_WORSE_AND_WORSE = (AlertKind.RECOVERY_FAILED, AlertKind.UNSERVED, AlertKind.RECOVERY_GIVEN_UP)
"""One fault: a device is not served. The worse one takes the place of the other, and the other is not told beside it."""
_GIVEN_UP = "given-up"  # the rules of core/policy.py
_BACKOFF = "backoff"
_ON_HOLD = "on-hold"


def fault_of(device: Judged) -> AlertKind | None:
    """What a person is to be called for now, if nobody was yet. What planned work may cause calls nobody."""
    verdict = device.verdict
    if verdict.rule == _BACKOFF and device.trail.trouble and device.hold is None:
        return (
            AlertKind.RECOVERY_FAILED
        )  # not where each attempt succeeds, and the server dies again: until it is given up
    if verdict.action is not Action.ALERT:
        return None
    if verdict.rule == _GIVEN_UP:
        return AlertKind.RECOVERY_GIVEN_UP
    return _ALERTED.get(verdict.kind)


def lasts(kind: AlertKind, device: Judged) -> bool:
    """Whether the fault that somebody was called for is still there, as far as anybody can see. Nobody's hands being on it
    mend nothing.
    """
    verdict = device.verdict
    if verdict.kind is VerdictKind.UNKNOWN:
        return True
    match kind:
        case AlertKind.UNSERVED | AlertKind.RECOVERY_FAILED | AlertKind.RECOVERY_GIVEN_UP:
            return verdict.kind in (VerdictKind.UNSERVED, VerdictKind.RECOVERING)
        case AlertKind.ORPHANED | AlertKind.PINNED:
            is_wanted = verdict.action is not Action.NONE or verdict.rule == _ON_HOLD
            return is_wanted and _ALERTED.get(verdict.kind) is kind
        case _:
            return _ALERTED.get(verdict.kind) is kind


def takes_the_place_of(kind: AlertKind) -> tuple[AlertKind, ...]:
    """The kinds that an alert of this one ends, for the same device."""
    return _WORSE_AND_WORSE[: _WORSE_AND_WORSE.index(kind)] if kind in _WORSE_AND_WORSE else ()


def is_part_of(kind: AlertKind) -> tuple[AlertKind, ...]:
    """The kinds that have told of this one, for the same device."""
    return _WORSE_AND_WORSE[_WORSE_AND_WORSE.index(kind) + 1 :] if kind in _WORSE_AND_WORSE else ()
