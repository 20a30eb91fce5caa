"""The log and the journal: one line per thing that changed, with the verdict's sentence. A steady state is silent.

An event is made once, from a pass's report; a line of the log and a record of the journal are two ways to keep it. What a
person is called for is not decided here: the desk (alerts/desk.py) has it recorded.

WARNING: we changed the machine, or something needs a human. ERROR: we could not. INFO: we held back. On a service
manager's stream each line starts with its priority (sd-daemon(3)); on a terminal with the time.

Whoever reads the lines may hang, and be on the very disk that the daemon has to look after. So a thread of its own writes
them; what it cannot keep up with is dropped and counted.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import queue
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.model import Action, Event, EventKind, Level, Outcome, VerdictKind
from duende_ublkd.core.policy import WHAT_WOULD_CHANGE_IT
from duende_ublkd.core.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from duende_ublkd.core.model import Deed, Judged, PassReport

log = logging.getLogger("duende_ublkd")

_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_LEVELS = {Level.INFO: logging.INFO, Level.WARNING: logging.WARNING, Level.ERROR: logging.ERROR}
_LINE_LIMIT = 2000
_BACKLOG = 2000  # lines


class _ForServiceManager(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"<{_PRIORITIES.get(record.levelno, 5)}>{printable(super().format(record), _LINE_LIMIT)}"


class _ForTerminal(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), _LINE_LIMIT)


class Outlet(logging.handlers.QueueHandler):
    """Hands lines to a thread that may take its time, and never waits for it."""

    def __init__(self, handler: logging.Handler) -> None:
        self._lines: queue.Queue[logging.LogRecord] = queue.Queue(_BACKLOG)
        super().__init__(self._lines)
        self._handler = handler
        self.dropped = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def enqueue(self, record: logging.LogRecord) -> None:
        """Called by logging for each line."""
        try:
            self._lines.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def drain(self, deadline: float) -> bool:
        """Wait until everything is written, for so many seconds at most; whether it is."""
        until = time.monotonic() + deadline
        with self._lines.all_tasks_done:
            while self._lines.unfinished_tasks and (left := until - time.monotonic()) > 0:
                self._lines.all_tasks_done.wait(left)
            return not self._lines.unfinished_tasks

    def _write(self) -> None:
        while True:
            self._handler.handle(self._lines.get())
            if self.dropped and self._lines.empty():
                lost, self.dropped = self.dropped, 0
                log.warning("%d log lines were dropped: nobody took them in time", lost)
            self._lines.task_done()


def set_up_logging() -> Outlet:
    """Log to stderr, in the manner of whoever reads it."""
    handler = logging.StreamHandler(sys.stderr)
    if os.environ.get("JOURNAL_STREAM"):
        handler.setFormatter(_ForServiceManager("%(message)s"))
    else:
        handler.setFormatter(_ForTerminal("%(asctime)s %(levelname)-7s %(message)s"))
    outlet = Outlet(handler)
    log.addHandler(outlet)
    log.setLevel(logging.INFO)
    log.propagate = False
    return outlet


class Journal:
    """Turns what passes report into events: each is a line of the log, and goes to `record`."""

    def __init__(self, record: Callable[[Event], object] | None = None) -> None:
        self._keep = record or (lambda _: None)
        self._trouble = ""

    def note(self, kind: EventKind, level: Level, text: str, dev_id: int | None = None, **facts: Any) -> None:  # noqa: ANN401 - JSON values
        """One line, in the log and in the journal."""
        log.log(_LEVELS[level], "%s", text)
        self.record(kind, level, text, dev_id, **facts)

    def record(self, kind: EventKind, level: Level, text: str, dev_id: int | None = None, **facts: Any) -> None:  # noqa: ANN401 - JSON values
        """In the journal alone: the log has a line that says the same, or nobody is to be woken by it."""
        self._keep(Event(time.time(), kind, level, printable(text, _LINE_LIMIT), dev_id, facts))

    def intends(self, device: Judged) -> None:
        """Before something is done to a device."""
        verdict, dev_id = device.verdict, device.seen.dev_id
        deleting = verdict.action is not Action.RECOVER
        doing = "deleting it" if deleting else "running its recovery command"
        if deleting and verdict.kind is VerdictKind.UNSERVED:
            doing = "stopping it"
        text = f"ublk{dev_id} is {verdict.kind.value}: {verdict.reason}; {doing}"
        kind = EventKind.ACTION if deleting else EventKind.RECOVERY
        facts = {"phase": "before", "action": verdict.action.value, **facts_of(device)}
        self.note(kind, Level.INFO, text, dev_id, **facts)

    def passed(self, report: PassReport) -> None:
        """After a pass or a deed."""
        if report.trouble != self._trouble and not report.is_deed:
            self._trouble = report.trouble
            self._note_driver(report)
        for device in report.changed:
            self._note_verdict(device)
        reasons = {device.seen.dev_id: device.verdict.reason for device in report.gone}
        acted = {deed.dev_id for deed in report.deeds}
        for dev_id in reasons.keys() - acted:
            self.note(EventKind.VERDICT, Level.INFO, f"ublk{dev_id} is gone", dev_id)
        for deed in report.deeds:
            level, text = _deed_line(deed, reasons.get(deed.dev_id, ""))
            kind = EventKind.RECOVERY if deed.action is Action.RECOVER else EventKind.ACTION
            self.note(kind, level, text, deed.dev_id, **_deed_facts(deed))

    def _note_driver(self, report: PassReport) -> None:
        if report.trouble:
            hint = f"; try: {report.hint}" if report.hint else ""
            self.note(EventKind.DAEMON, Level.ERROR, f"{report.trouble}{hint}")
        else:
            self.note(EventKind.DAEMON, Level.INFO, "the ublk driver answers again")

    def _note_verdict(self, device: Judged) -> None:
        dev_id, verdict = device.seen.dev_id, device.verdict
        is_told_with_deed = verdict.action in (Action.DELETE, Action.RECOVER)  # which has lines before and after it
        tell = self.record if is_told_with_deed else self.note
        level = Level.INFO if is_told_with_deed else _level(device)
        tell(EventKind.VERDICT, level, sentence_of(device), dev_id, **facts_of(device))


def sentence_of(device: Judged) -> str:
    """What a device is, why, and what a person can do where it is wedged."""
    verdict = device.verdict
    return f"ublk{device.seen.dev_id} is {verdict.kind.value}: {verdict.reason}{_wedged_by(device)}"


def _wedged_by(device: Judged) -> str:
    """Who sleeps in the kernel, and what to do about it."""
    if device.verdict.kind is not VerdictKind.WEDGED:
        return ""
    asleep = f"; asleep in the kernel: {'; '.join(device.stuck)}" if device.stuck else ""
    return f"{asleep}; what it takes: {WHAT_WOULD_CHANGE_IT.get(device.verdict.rule, 'not known')}"


def facts_of(device: Judged) -> dict[str, Any]:
    """What the journal keeps of a device, as JSON values."""
    seen, verdict, server = device.seen, device.verdict, device.seen.server
    return {
        "instance": seen.identity.sysfs_inode,
        "verdict": verdict.kind.value,
        "rule": verdict.rule,
        "reason": verdict.reason,
        "kernel_state": seen.state_name,
        "server": {"pid": server.pid, "comm": server.comm, "unit": server.unit, "alive": server.alive}
        if server
        else None,
        "holders": [str(holder) for holder in seen.usage.holders] if seen.usage else None,
        "attempts": device.trail.attempts,
        "stuck": list(device.stuck),
    }


def _level(device: Judged) -> Level:
    needs_a_human = device.verdict.action is Action.ALERT or device.verdict.kind is VerdictKind.UNSERVED
    return Level.WARNING if needs_a_human and device.hold is None else Level.INFO


def _deed_line(deed: Deed, reason: str) -> tuple[Level, str]:
    name = f"ublk{deed.dev_id}"
    after = "" if deed.reaction is None else f", {deed.reaction * 1000:.0f} ms after the death was seen"
    detail = f": {deed.detail}" if deed.detail else ""
    match deed.outcome:
        case None if deed.action is Action.RECOVER:
            attempt = f"attempt {deed.facts['attempt']} of {deed.facts['attempts']}" if deed.facts else "not even tried"
            return Level.ERROR, f"{name} could not be recovered, {attempt}{detail}"
        case None:
            return Level.ERROR, f"{name} could not be deleted{detail}"
        case Outcome.DELETED:
            return Level.WARNING, f"{name} deleted: {reason}; id free again after {deed.took * 1000:.0f} ms{after}"
        case Outcome.RECOVERED:
            return Level.WARNING, f"{name} recovered: served again after {deed.took * 1000:.0f} ms{after}"
        case outcome:
            level, done = _DONE[outcome]
            return level, f"{name} {done}{detail}"


_DONE = {
    Outcome.DELETED_STILL_HELD: (Level.WARNING, "deleted, its id still held"),
    Outcome.STOPPED: (Level.WARNING, "stopped"),
    Outcome.RECOVERED_BY_ANOTHER: (Level.INFO, "is served again"),
    Outcome.ALREADY_GONE: (Level.INFO, "was already gone"),
    Outcome.SPARED: (Level.INFO, "spared"),
    Outcome.WOULD_DELETE: (Level.INFO, "would be deleted (dry run)"),
    Outcome.WOULD_RECOVER: (Level.INFO, "would be recovered (dry run)"),
}


def _deed_facts(deed: Deed) -> dict[str, Any]:
    outcome = deed.outcome.value if deed.outcome else "failed"
    return {
        "phase": "after",
        "action": deed.action.value,
        "outcome": outcome,
        "detail": deed.detail,
        "took_s": round(deed.took, 3),
        "reaction_s": None if deed.reaction is None else round(deed.reaction, 3),
        **deed.facts,
    }
