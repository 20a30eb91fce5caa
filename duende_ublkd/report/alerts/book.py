"""The book of alerts: those that are open, those that are over and not done with, and what each sink was told of them.

Rules:
1. What is in the book is saved, and what is saved is all that the next daemon needs to go on. The store has it before
   anything is sent; nobody waits until it is on the disk. A fault that a kill has come before is seen again by the next
   daemon, and told again; what has merely happened in that moment is not.
2. The latest alert of a key is the one that may be open. An earlier one of the same key that was never ended is the same
   fault, and told of with the later one.
3. The book is bounded, in alerts and in bytes. For a new alert goes what is done with, then what counts less, then what is
   over. What is open and counts as much stays: else each look would put another one out. So does the alert that says that
   there is no place: it would be raised again by its own end, without end.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from duende_ublkd.core import delivery
from duende_ublkd.core.alerting import Alert, checked_time
from duende_ublkd.core.delivery import Progress, Stage
from duende_ublkd.report.store import size_in_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from duende_ublkd.core.alerting import Severity

PREFIX = "alert/"  # of what is saved
SINKS = f"{PREFIX}sinks"
NO_PLACE = "daemon/alerts"  # the key of the alert that there is no place for another one
MOST_ALERTS = 1000
MOST_BYTES = 2 << 20  # of all that is saved of them, as the store counts it: half of what that takes of everybody
HOLD_DOWN = 10.0  # seconds that a fault has to be gone
LONGEST_HOLD_DOWN = 3600.0
KEPT = delivery.RESOLVED_FOR  # seconds that what is over is remembered


@dataclass(eq=False, slots=True)
class Case:
    """One alert, and what was told of it. `number`: microseconds since the epoch, made strictly increasing."""

    number: int
    alert: Alert
    boot_id: str
    told: dict[str, Progress] = field(default_factory=dict)
    hold_down: float = HOLD_DOWN
    over_since: float | None = None
    gone_since: float | None = None  # the fault
    gone_why: str = ""
    is_of_former: bool = False  # and nothing of this process has seen its fault yet
    size: int = 0

    @property
    def place(self) -> str:
        """Under which it is saved."""
        return f"{PREFIX}{self.alert.key}#{self.number}"

    @property
    def is_done_with(self) -> bool:
        """Nothing new can come of it."""
        return self.alert.is_over and all(each.stage in (Stage.DONE, Stage.LOST) for each in self.told.values())

    def to_object(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "alert": self.alert.to_object(),
            "boot_id": self.boot_id,
            "told": {name: progress.to_object() for name, progress in self.told.items()},
            "hold_down": self.hold_down,
            "over_since": self.over_since,
        }

    @classmethod
    def from_object(cls, number: int, value: Mapping[str, Any], now: float) -> Case:
        """What `to_object` made; no time in it is later than now. ValueError: it is no such thing."""
        try:
            alert = Alert.from_object(value["alert"])
            told = {str(name): Progress.from_object(each, now) for name, each in value["told"].items()}
            over_since = min(checked_time(value["over_since"]), now) if alert.is_over else None
            hold_down = min(max(checked_time(value["hold_down"]), HOLD_DOWN), LONGEST_HOLD_DOWN)
            return cls(number, alert, str(value["boot_id"]), told, hold_down, over_since, is_of_former=True)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not an alert and what was told of it: {error!r}") from error


class Book:
    """The cases of one machine, by their numbers."""

    def __init__(self, save: Callable[[str, object | None], None]) -> None:
        """`save(key, value)`: over restarts; None: no longer."""
        self._save = save
        self._cases: dict[int, Case] = {}  # in the order of their numbers
        self._open: dict[str, Case] = {}  # by key
        self._of_device: dict[int, dict[int, Case]] = {}  # open ones, by id and number
        self._latest: dict[str, Case] = {}  # by key
        self._bytes = 0
        self._changes = 0
        self._victims: dict[
            Severity, deque[int]
        ] = {}  # by the severity of what needs a place; as of when it was looked
        self._no_victim: dict[Severity, int] = {}  # as of so many changes there was none
        self._last_number = 0

    def __len__(self) -> int:
        return len(self._cases)

    def __iter__(self) -> Iterator[Case]:
        """All of them, the oldest first."""
        return iter(tuple(self._cases.values()))

    def get(self, number: int) -> Case | None:
        """The case of this number, unless it is forgotten."""
        return self._cases.get(number)

    def open(self, key: str) -> Case | None:
        """The open alert of this key."""
        return self._open.get(key)

    def all_open(self) -> tuple[Case, ...]:
        """The open ones."""
        return tuple(self._open.values())

    def open_of(self, dev_id: int) -> tuple[Case, ...]:
        """The open ones of a device's id."""
        return tuple(self._of_device.get(dev_id, {}).values())

    def latest(self, key: str) -> Case | None:
        """The last one of this key, open or not."""
        return self._latest.get(key)

    @property
    def is_full(self) -> bool:
        """There is no place for another one."""
        return len(self._cases) >= MOST_ALERTS or self._bytes >= MOST_BYTES

    @property
    def is_half_empty(self) -> bool:
        """There is place for many."""
        return len(self._cases) < MOST_ALERTS // 2 and self._bytes < MOST_BYTES // 2

    def add(self, alert: Alert, boot_id: str, told: dict[str, Progress], now: float) -> Case:
        """A new one."""
        self._last_number = max(self._last_number + 1, int(now * 1_000_000))
        case = Case(self._last_number, alert, boot_id, told)
        if alert.is_over:
            case.over_since = now
        if former := self._latest.get(alert.key):
            case.hold_down = min(2 * former.hold_down, LONGEST_HOLD_DOWN)
        self._latest[alert.key] = case
        self._enter(case)
        self.save(case)
        return case

    def note_over(self, case: Case) -> None:
        """It is open no more."""
        self._changes += 1
        del self._open[case.alert.key]
        if case.alert.dev_id is not None:
            of_device = self._of_device[case.alert.dev_id]
            del of_device[case.number]
            if not of_device:
                del self._of_device[case.alert.dev_id]

    def save(self, case: Case) -> None:
        """As it is now."""
        record = case.to_object()
        size = size_in_batch(case.place, json.dumps(record))
        self._changes += 1
        self._bytes += size - case.size
        case.size = size
        self._save(case.place, record)

    def forget(self, case: Case) -> None:
        """It is told, or nobody is to be told."""
        if self._open.get(case.alert.key) is case:
            self.note_over(case)
        if self._latest.get(case.alert.key) is case:
            del self._latest[case.alert.key]
        del self._cases[case.number]
        self._bytes -= case.size
        self._changes += 1
        self._save(case.place, None)

    def least(self, alert: Alert) -> Case | None:
        """Which one has to make place for this (rule 3); None: there is none."""
        queue = self._victims.setdefault(alert.severity, deque())
        while queue:
            if (case := self._cases.get(queue.popleft())) and _gives_way(case, alert):
                return case
        if self._no_victim.get(alert.severity) == self._changes:
            return None
        candidates = sorted((case for case in self._cases.values() if _gives_way(case, alert)), key=_weight)
        queue.extend(case.number for case in candidates[1:])
        if not candidates:
            self._no_victim[alert.severity] = self._changes
            return None
        return candidates[0]

    def restore(self, saved: Mapping[str, Any], now: float) -> list[str]:
        """Enter what was saved and is not here yet; returns a sentence on each that is not understood."""
        doubts = []
        found = []
        for place, value in saved.items():
            if place == SINKS or not place.startswith(PREFIX):
                continue
            try:
                number = int(place.rpartition("#")[2])
                if number not in self._cases:
                    found.append(Case.from_object(number, value, now))
            except ValueError as error:
                doubts.append(f"what was saved as {place} is not understood: {error}")
                self._save(place, None)
        for case in sorted(found, key=lambda case: -case.number):
            self._take_over(case)
        self._cases = dict(sorted(self._cases.items()))
        self._open = {case.alert.key: case for case in self._cases.values() if not case.alert.is_over}
        return doubts

    def _take_over(self, case: Case) -> None:
        if case.alert.key in self._open and not case.alert.is_over:
            self._save(case.place, None)
            return
        self._last_number = max(self._last_number, case.number)
        self._latest.setdefault(case.alert.key, case)
        case.size = size_in_batch(case.place, json.dumps(case.to_object()))
        self._bytes += case.size
        self._enter(case)

    def _enter(self, case: Case) -> None:
        alert = case.alert
        self._cases[case.number] = case
        if alert.is_over:
            return
        self._open[alert.key] = case
        if alert.dev_id is not None:
            self._of_device.setdefault(alert.dev_id, {})[case.number] = case


def _gives_way(case: Case, alert: Alert) -> bool:
    if case.alert.key == NO_PLACE and not case.alert.is_over:
        return False
    if case.is_done_with or not case.alert.severity.at_least(alert.severity):
        return True
    return case.alert.is_over and case.alert.severity is alert.severity


def _weight(case: Case) -> tuple[bool, int, bool, int]:
    return not case.is_done_with, case.alert.severity.rank, not case.alert.is_over, case.number
