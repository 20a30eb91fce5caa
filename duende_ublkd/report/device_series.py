"""The series of single devices, as the text of a scrape.

There may be hundreds of devices, and between two scrapes hardly one of them changes. prometheus_client takes about 25 µs
for each sample, every time, on the loop that has to react; so what a device's lines say is kept until it says another thing.

Rules:
1. A device that is gone has no line any more.
2. What anybody can choose (a process's name) is cut, and changes a few times for one server at most: who renames a server
   again and again makes no series with it. Everything else is from a set that is known.
3. A time is the same number in each scrape, unless the machine's clock was set.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from duende_ublkd.core.model import VerdictKind

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from duende_ublkd.core.model import Judged

MOST_DEVICES = 1000  # that have series of their own; the lines of so many are 300 KB
_MOST_NAME = 80  # characters of a process's name or of a unit
_MOST_NAMES = 3  # of one server: its program's, after an exec another one's, and what that calls itself
_CLOCK_WAS_SET = 1.0  # seconds; less is an adjustment that goes on all the time

_FAMILIES = (
    ("device_info", "A device and who serves it."),
    ("device_verdict_since_timestamp_seconds", "When the verdict began."),
    ("device_recovery_attempts", "Attempts since it was last served for long."),
)
_Lines = tuple[str, ...]  # one for each family; empty: none


class Clock:
    """Turns CLOCK_MONOTONIC into seconds since the epoch."""

    def __init__(self, now: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._monotonic = monotonic
        self._offset = now() - monotonic()

    def epoch(self, at: float) -> float:
        """When that was, to the millisecond."""
        offset = self._now() - self._monotonic()
        if abs(offset - self._offset) >= _CLOCK_WAS_SET:
            self._offset = offset
        return round(at + self._offset, 3)


@dataclass(slots=True)
class _Names:
    """What one server has called itself: (comm, unit)."""

    who: tuple[object, ...]
    said: tuple[str, str]
    count: int = 1


class DeviceSeries:
    """Renders devices; to be kept from scrape to scrape."""

    def __init__(self, prefix: str, clock: Clock) -> None:
        self._prefix = prefix
        self._clock = clock
        self._known: dict[int, tuple[tuple[object, ...], _Lines]] = {}
        self._names: dict[int, _Names] = {}
        self.left_out = 0  # devices of the last scrape that were too many

    def render(self, devices: Collection[Judged]) -> str:
        """All families, those without a sample too."""
        shown = _the_most_telling(devices)
        self.left_out = len(devices) - len(shown)
        ids = {device.seen.dev_id for device in shown}
        for known in (self._known, self._names):
            for dev_id in known.keys() - ids:
                del known[dev_id]
        lines = [self._lines_of(device) for device in shown]
        return "".join(
            f"# HELP {self._prefix}_{name} {what}\n# TYPE {self._prefix}_{name} gauge\n"
            f"{''.join(each[number] for each in lines)}"
            for number, (name, what) in enumerate(_FAMILIES)
        )

    def _lines_of(self, device: Judged) -> _Lines:
        seen, kind = device.seen, device.verdict.kind.value
        said = (
            seen.state_name,
            *self._names_of(device),
            kind,
            self._clock.epoch(device.since),
            device.trail.attempts,
        )
        known = self._known.get(seen.dev_id)
        if known and known[0] == said:
            return known[1]
        lines = self._write(seen.dev_id, *said)
        self._known[seen.dev_id] = (said, lines)
        return lines

    def _write(
        self, dev_id: int, state: str, comm: str, unit: str, verdict: str, since: float, attempts: int
    ) -> _Lines:
        info, began, tried = (f"{self._prefix}_{name}" for name, _ in _FAMILIES)
        dev = f'dev_id="{dev_id}"'
        names = f'server_comm="{_escaped(comm)}",unit="{_escaped(unit)}"'
        return (
            f'{info}{{{dev},kernel_state="{_escaped(state)}",{names}}} 1.0\n',
            f'{began}{{{dev},verdict="{verdict}"}} {since:.3f}\n',
            f"{tried}{{{dev}}} {attempts}.0\n" if attempts else "",
        )

    def _names_of(self, device: Judged) -> tuple[str, str]:
        """Rule 2."""
        server = device.seen.server
        if server is None:
            return "", ""
        who = (device.seen.identity.sysfs_inode, server.pid, server.start_time)
        said = server.comm[:_MOST_NAME], server.unit[:_MOST_NAME]
        known = self._names.get(device.seen.dev_id)
        if known is None or known.who != who:
            known = self._names[device.seen.dev_id] = _Names(who, said)
        if known.said != said and known.count < _MOST_NAMES:
            known.said = said
            known.count += 1
        return known.said


def _the_most_telling(devices: Collection[Judged]) -> list[Judged]:
    if len(devices) <= MOST_DEVICES:
        return list(devices)
    well_last = sorted(devices, key=lambda each: (each.verdict.kind is VerdictKind.LIVE, each.seen.dev_id))
    return sorted(well_last[:MOST_DEVICES], key=lambda each: each.seen.dev_id)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
