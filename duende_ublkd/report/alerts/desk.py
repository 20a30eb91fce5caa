"""The desk where people are told: which faults are alerts, since when, and until when.

Rules:
1. A fault is an alert by what is seen, not by an event: raised when it is there and nobody was called yet, over when it
   has been gone for a while. One that comes and goes is one alert: each time that it comes back soon, it has to be gone for
   twice as long before it counts as over. What cannot come back (the device is gone) is over at once.
2. After a restart all goes on as it was saved; what this daemon's first look at all does not find any more is over. Where
   nothing of a former daemon can be read, what it has told is told again, rather than lost; should it come to be read
   later, it is gone on with from there.
3. Nothing here waits: not for a disk, a name or a network, not for the journal and not for any sink. There is one timer,
   for whatever is due next.
4. Alerts are few enough for a person, and bounded. What there is no place for is counted, and is an alert itself.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from duende_ublkd import __version__
from duende_ublkd.core.alerting import Alert, AlertKind, Severity, fault_of, is_part_of, lasts, takes_the_place_of
from duende_ublkd.core.delivery import Now, State
from duende_ublkd.core.model import Action, EventKind, Level, Outcome, VerdictKind
from duende_ublkd.core.text import printable
from duende_ublkd.report.alerts.book import KEPT, MOST_ALERTS, MOST_BYTES, NO_PLACE, SINKS, Book, Case
from duende_ublkd.report.alerts.sending import Sending
from duende_ublkd.report.journal import facts_of, sentence_of
from duende_ublkd.report.objects import alert_object, notice_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from duende_ublkd.core.alertconfig import SinkConfig
    from duende_ublkd.core.model import Deed, Judged, PassReport
    from duende_ublkd.report.alerts.sending import Deliverer, SinkState, SinkStats
    from duende_ublkd.report.journal import Journal

MOST_SUMMARY = 500  # characters
MOST_FACTS = 700  # bytes of JSON
_DRIVER = "daemon/driver"


class Desk:
    """Keeps the alerts, and has the sinks told. A reporter; to be used in one event loop."""

    def __init__(
        self,
        journal: Journal,
        save: Callable[[str, object | None], None],
        deliverer: Deliverer,
        *,
        boot_id: str,
        instance_of: Callable[[Judged], int | None] | None = None,
        clock: Callable[[], float] = time.time,
        dice: Callable[[], float] = random.random,
        minute_of_day: Callable[[], float] | None = None,
    ) -> None:
        """`save(key, value)`: over restarts; None: no longer. `instance_of`: also of one that has lost its sysfs entry."""
        self._journal = journal
        self._boot_id = boot_id
        self._instance_of = instance_of or (lambda device: device.seen.identity.sysfs_inode)
        self._clock = clock
        self._minute_of_day = minute_of_day or _minute_of_day
        self._loop = asyncio.get_running_loop()
        self._offset = clock() - self._loop.time()
        self._host = printable(socket.gethostname())
        self._devices: Mapping[int, Judged] = {}
        self._coming: dict[int, tuple[AlertKind, float]] = {}  # by id: raised, should it last until then
        self._left_out: set[str] = set()  # keys of open faults that there is no place for
        self._dropped = 0
        self._timer: asyncio.TimerHandle | None = None
        self._is_woken = False
        self._closed = False
        self._is_configured = False
        self._book = Book(save)
        self._sending = Sending(
            self._book,
            journal,
            deliverer,
            save=save,
            now=self._now,
            clock=clock,
            dice=dice,
            notice=self._notice,
            wake=self._wake,
            on_sick=lambda sink, sentence: self.degraded(f"sink/{sink}", sentence),
        )

    # --- what there is to see -----------------------------------------------------------------------------------------

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """Those that are open, the oldest first."""
        return tuple(case.alert for case in self._book.all_open())

    @property
    def stats(self) -> Mapping[str, SinkStats]:
        """By the sinks' names."""
        return self._sending.stats

    @property
    def queue_length(self) -> int:
        """Notices that some sink has not taken yet."""
        return len(self._sending.waiting())

    @property
    def sinks(self) -> tuple[SinkState, ...]:
        """In the order of the configuration."""
        return self._sending.states

    @property
    def undelivered(self) -> tuple[Mapping[str, Any], ...]:
        """What was given up within the last day, as JSON values."""
        return self._sending.undelivered

    def to_object(self) -> dict[str, Any]:
        """All of it, as JSON values: what is open, and what is over and not told yet; `waits_for` names the sinks."""
        waits_for: dict[int, list[str]] = {}
        for name, due in self._sending.waiting():
            waits_for.setdefault(due.entry.number, []).append(name)
        shown = [case for case in self._book if not case.alert.is_over or case.number in waits_for]
        return {
            "alerts": [{**alert_object(case.alert), "waits_for": waits_for.get(case.number, [])} for case in shown],
            "sinks": [state.to_object() for state in self.sinks],
            "undelivered": list(self.undelivered),
            "dropped": self._dropped,
        }

    # --- beginning and end ----------------------------------------------------------------------------------------------

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what was saved; also when that could only be read a while after the start."""
        for doubt in self._book.restore(saved, self._now().at):
            self._journal.note(EventKind.DAEMON, Level.WARNING, printable(doubt, MOST_SUMMARY))
        for case in self._book.all_open():
            if case.boot_id != self._boot_id:
                self._end(case, "the machine was started anew")
        self._sending.restore(saved.get(SINKS))
        if self._is_configured:
            self._fit_to_sinks()

    def configure(self, sinks: Iterable[SinkConfig]) -> None:
        """Tell these from now on. A new one hears of what is open."""
        self._sending.configure(sinks)
        self._is_configured = True
        self._fit_to_sinks()

    def _fit_to_sinks(self) -> None:
        self._sending.fit()
        self._wake()

    async def test(self, sink: str | None) -> list[dict[str, Any]]:
        """Send an alert for trial to one sink, None: to each, and wait for the answers. UsageError: there is none."""
        return await self._sending.test(sink)

    def close(self) -> None:
        """Nothing is sent any more. What is under way is sent again by the next daemon, unless its answer has come."""
        self._closed = True
        if self._timer:
            self._timer.cancel()
        self._sending.close()

    # --- faults of devices ----------------------------------------------------------------------------------------------

    def intends(self, device: Judged) -> None:
        """Nobody is told of what is only about to be done."""

    def passed(self, report: PassReport) -> None:
        """After a pass or a deed: what is new, and what is over."""
        self._devices = report.devices
        for device in report.gone:
            self._note_gone(device)
        for deed in report.deeds:
            self._note_deed(deed, report)
        if report.is_deed:
            return
        self._note_driver(report)
        if report.trouble:
            return
        for device in report.devices.values() if report.full else report.changed:
            self._look_at(device)
        if report.full:
            self._end_what_nobody_saw(report)

    def _note_driver(self, report: PassReport) -> None:
        if report.trouble:
            hint = f"; try: {report.hint}" if report.hint else ""
            self._raise_of_daemon(AlertKind.DRIVER_MISSING, _DRIVER, f"{report.trouble}{hint}")
        else:
            self._be_well(_DRIVER, "the ublk driver answers again")

    def _note_gone(self, device: Judged) -> None:
        dev_id = device.seen.dev_id
        self._coming.pop(dev_id, None)
        for case in self._book.open_of(dev_id):
            self._end(case, f"ublk{dev_id} is gone")

    def _note_deed(self, deed: Deed, report: PassReport) -> None:
        name = f"ublk{deed.dev_id}"
        if deed.action is Action.DELETE and deed.outcome is Outcome.DELETED:
            for device in report.gone:
                self._raise_of(
                    device, AlertKind.CLEANED, f"{name} was orphaned, and is deleted: {device.verdict.reason}"
                )
        device_now = report.devices.get(deed.dev_id)
        if deed.action is not Action.RECOVER or deed.outcome is not None or device_now is None or device_now.hold:
            return
        attempt, attempts = deed.facts.get("attempt", 0), deed.facts.get("attempts", 0)
        if attempt < attempts:  # else it is given up, and the next look says so
            text = f"{name} could not be recovered, attempt {attempt} of {attempts}: {deed.detail}"
            self._raise_of(device_now, AlertKind.RECOVERY_FAILED, text)

    def _look_at(self, device: Judged) -> None:
        dev_id, instance = device.seen.dev_id, self._instance_of(device)
        for case in self._book.open_of(dev_id):
            if instance is not None and case.alert.instance not in (None, instance):
                self._end(case, f"the id {dev_id} is another device's now")
            elif lasts(case.alert.kind, device):
                is_seen = device.verdict.kind is not VerdictKind.UNKNOWN or case.alert.kind is AlertKind.UNKNOWN
                self._confirm(case, sentence_of(device) if is_seen else case.alert.summary)
            else:
                self._doubt(case, sentence_of(device))
        kind = fault_of(device)
        if kind is None or self._told_of(dev_id, instance, kind):
            self._coming.pop(dev_id, None)
        elif kind.settles_in:
            if self._coming.get(dev_id, (None,))[0] is not kind:
                self._coming[dev_id] = kind, self._now().at + kind.settles_in
                self._wake()
        else:
            self._coming.pop(dev_id, None)
            self._raise_of(device, kind, sentence_of(device))

    def _end_what_nobody_saw(self, report: PassReport) -> None:
        """After a look at all."""
        for case in self._book.all_open():
            dev_id = case.alert.dev_id
            if dev_id is not None and dev_id not in report.devices:
                self._end(case, f"ublk{dev_id} is gone")
            elif dev_id is None and case.is_of_former:
                self._doubt(case, "not so any more since the daemon was started anew")
        if self._left_out:
            faults = ((device, fault_of(device)) for device in report.devices.values())
            keys = {_key_of(each.seen.dev_id, self._instance_of(each), kind) for each, kind in faults if kind}
            self._left_out = {key for key in self._left_out if key in keys or key.startswith("daemon/")}

    def _raise_of(self, device: Judged, kind: AlertKind, text: str) -> None:
        """Unless it is told of already, by this alert or by a worse one."""
        dev_id, instance = device.seen.dev_id, self._instance_of(device)
        if case := self._told_of(dev_id, instance, kind):
            self._confirm(case, text)
            return
        told = {case.alert.kind: case for case in self._book.open_of(dev_id)}
        if any(worse in told for worse in is_part_of(kind)):
            return
        for lesser in takes_the_place_of(kind):
            if lesser in told:
                self._end(told[lesser], text)
        key = _key_of(dev_id, instance, kind)
        self._raise(Alert(key, kind, kind.severity, "", self._clock(), dev_id, instance), text, facts_of(device))

    def _told_of(self, dev_id: int, instance: int | None, kind: AlertKind) -> Case | None:
        """The open alert of this fault. Of a device that is deleted already a new daemon cannot tell which one it was."""
        for case in self._book.open_of(dev_id):
            if case.alert.kind is kind and (instance is None or case.alert.instance in (None, instance)):
                return case
        return None

    # --- the daemon's own -----------------------------------------------------------------------------------------------

    def degraded(self, cause: str, sentence: str | None) -> None:
        """Something of the daemon itself is out of order, and what; None: not any more. One alert for each cause."""
        key = f"daemon/{cause}"
        if sentence is None:
            self._be_well(key, "it is in order again")
        else:
            self._raise_of_daemon(AlertKind.DEGRADED, key, sentence)

    def _raise_of_daemon(self, kind: AlertKind, key: str, text: str) -> None:
        if case := self._book.open(key):
            self._confirm(case, text)
        else:
            cause = key.partition("/")[2]
            self._raise(Alert(key, kind, kind.severity, "", self._clock()), text, {"cause": cause})

    def _be_well(self, key: str, why: str) -> None:
        self._left_out.discard(key)
        if case := self._book.open(key):
            self._doubt(case, why)

    # --- one alert ------------------------------------------------------------------------------------------------------

    def _raise(self, alert: Alert, text: str, facts: Mapping[str, Any]) -> None:
        alert = replace(alert, summary=printable(text, MOST_SUMMARY), facts=_fit(facts))
        if not self._has_place_for(alert):
            return
        level = Level.INFO if alert.severity is Severity.INFO else Level.WARNING
        self._record(level, text, alert, {"state": "raised", **facts})
        if alert.kind.is_momentary:
            alert = replace(alert, over_at=alert.raised_at)
        self._book.add(alert, self._boot_id, self._sending.told_at_first(alert), self._now().at)
        self._wake()

    def _confirm(self, case: Case, text: str) -> None:
        """The fault is still there. Its sentence is another each time, which is news to nobody."""
        case.gone_since = None
        case.is_of_former = False
        case.alert = replace(case.alert, summary=printable(text, MOST_SUMMARY))

    def _doubt(self, case: Case, why: str) -> None:
        """The fault is gone, as far as can be seen; should it be back soon, nobody is told."""
        if case.gone_since is None:
            case.gone_since, case.gone_why = self._now().at, why
            self._wake()

    def _end(self, case: Case, why: str) -> None:
        now = self._now().at
        why = printable(why, MOST_SUMMARY)
        self._book.note_over(case)
        case.alert = replace(case.alert, over_at=max(self._clock(), case.alert.raised_at), over_why=why)
        case.over_since = now
        case.told = {name: progress.over(now) for name, progress in case.told.items()}
        self._record(Level.INFO, why, case.alert, {"state": "over", "instance": case.alert.instance})
        self._book.save(case)
        self._wake()

    def _record(self, level: Level, text: str, alert: Alert, facts: Mapping[str, Any]) -> None:
        """The log has a line of whoever has seen it."""
        known = {**facts, "key": alert.key, "alert": alert.kind.value, "severity": alert.severity.value}
        self._journal.record(EventKind.ALERT, level, text, alert.dev_id, **known)

    def _has_place_for(self, alert: Alert) -> bool:
        """Make it, where something counts less. A fault that is left out is raised as soon as there is a place."""
        while self._book.is_full and alert.key != NO_PLACE:
            victim = self._book.least(alert)
            if victim is None:
                if alert.key not in self._left_out:
                    self._note_dropped(alert, self._sending.told_at_first(alert))
                return False
            self._book.forget(victim)
            if not victim.is_done_with:
                self._note_dropped(victim.alert, victim.told)
        self._left_out.discard(alert.key)
        return True

    def _note_dropped(self, alert: Alert, told: Iterable[str]) -> None:
        if not alert.is_over:
            self._left_out.add(alert.key)
        self._dropped += 1
        self._sending.count_dropped(told)
        limit = f"{MOST_ALERTS}, or {MOST_BYTES >> 20} MiB of them"
        text = f"{self._dropped} alerts were dropped: there is no place for more than {limit}"
        self._raise_of_daemon(AlertKind.DEGRADED, NO_PLACE, text)

    def _notice(self, alert: Alert, state: State, sink: SinkConfig) -> Mapping[str, Any]:
        return notice_object(alert, state, host=self._host, version=__version__, labels=sink.labels)

    # --- time -----------------------------------------------------------------------------------------------------------

    def _now(self) -> Now:
        """Steady, whatever becomes of the clock that people have."""
        return Now(self._loop.time() + self._offset, self._minute_of_day())

    def _wake(self) -> None:
        """Something has changed: what is due is looked for, once for all that changes in this moment."""
        if not self._is_woken and not self._closed:
            self._is_woken = True
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._is_woken = False
        if self._closed:
            return
        times = [*self._settle(self._now().at), self._sending.serve()]
        if self._timer:
            self._timer.cancel()
        self._timer = None
        due = min((at for at in times if at is not None), default=None)
        if due is not None:
            self._timer = self._loop.call_at(due - self._offset, self._go_on)

    def _settle(self, now: float) -> list[float]:
        """What time alone has decided; when it decides the next."""
        times = self._raise_what_lasts(now)
        for case in self._book:
            until = _due(case)
            if until is None or self._book.get(case.number) is not case:  # it has made place for another one since
                continue
            if now < until:
                times.append(until)
            elif case.over_since is None:
                self._end(case, case.gone_why)
            else:
                self._book.forget(case)
        if self._dropped and self._book.is_half_empty:
            self._be_well(NO_PLACE, "there is place for alerts again")
        return times

    def _raise_what_lasts(self, now: float) -> list[float]:
        times = []
        for dev_id, (kind, at) in tuple(self._coming.items()):
            if now < at:
                times.append(at)
                continue
            del self._coming[dev_id]
            if device := self._devices.get(dev_id):  # as it was last seen: any other verdict would have been told of
                self._raise_of(device, kind, sentence_of(device))
        return times


def _due(case: Case) -> float | None:
    """When a fault that is gone counts as over, or what is over is forgotten."""
    if case.over_since is not None:
        return case.over_since + KEPT if case.is_done_with else None
    return None if case.gone_since is None else case.gone_since + case.hold_down


def _key_of(dev_id: int, instance: int | None, kind: AlertKind) -> str:
    return f"ublk{dev_id}/{'-' if instance is None else instance}/{kind.value}"


def _fit(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept and sent of them: without the reason, which is in the summary, and without what is too large."""
    kept = {name: value for name, value in facts.items() if name != "reason" and value not in (None, [], "")}
    sizes = {name: len(json.dumps(value)) + len(name) + 6 for name, value in kept.items()}
    while sum(sizes.values()) > MOST_FACTS:
        largest = max(sizes, key=lambda name: sizes[name])
        del kept[largest], sizes[largest]
    return kept


def _minute_of_day() -> float:
    """By the time zone that the process has read at its start: no disk is asked."""
    now = time.localtime()
    return now.tm_hour * 60 + now.tm_min + now.tm_sec / 60
