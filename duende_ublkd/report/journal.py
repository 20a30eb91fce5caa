"""The log: one line per thing that changed, with the verdict's sentence. A steady state is silent.

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
from typing import TYPE_CHECKING

from duende_ublkd.core.model import Action, Outcome, VerdictKind
from duende_ublkd.core.text import printable

if TYPE_CHECKING:
    from duende_ublkd.core.model import Deed, Judged, PassReport

log = logging.getLogger("duende_ublkd")

_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_LINE_LIMIT = 2000
_BACKLOG = 2000  # lines
_DONE = {
    Outcome.ALREADY_GONE: "was already gone",
    Outcome.SPARED: "spared",
    Outcome.DELETED_STILL_HELD: "deleted, its id still held",
    Outcome.WOULD_DELETE: "would be deleted (dry run)",
}


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

    def drain(self, deadline: float) -> None:
        """Wait until everything is written, for so many seconds at most."""
        until = time.monotonic() + deadline
        with self._lines.all_tasks_done:
            while self._lines.unfinished_tasks and (left := until - time.monotonic()) > 0:
                self._lines.all_tasks_done.wait(left)

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
    """Writes what passes report."""

    def __init__(self) -> None:
        self._trouble = ""

    def intends(self, device: Judged) -> None:
        """Before a destructive action."""
        verdict = device.verdict
        log.info("ublk%d is %s: %s; deleting it", device.seen.dev_id, verdict.kind.value, verdict.reason)

    def passed(self, report: PassReport) -> None:
        """After a pass or a deed."""
        if report.trouble != self._trouble and not report.is_deed:
            self._trouble = report.trouble
            if report.trouble:
                log.error("%s%s", report.trouble, f"; try: {report.hint}" if report.hint else "")
            else:
                log.info("the ublk driver answers again")
        for device in report.changed:
            if device.verdict.action is Action.DELETE:
                continue  # the deed has its own lines, before and after
            level = _level(device)
            log.log(level, "ublk%d is %s: %s", device.seen.dev_id, device.verdict.kind.value, device.verdict.reason)
        reasons = {device.seen.dev_id: device.verdict.reason for device in report.gone}
        acted = {deed.dev_id for deed in report.deeds}
        for dev_id in reasons.keys() - acted:
            log.info("ublk%d is gone", dev_id)
        for deed in report.deeds:
            _write_deed(deed, reasons.get(deed.dev_id, ""))


def _level(device: Judged) -> int:
    needs_a_human = device.verdict.action is Action.ALERT or device.verdict.kind is VerdictKind.UNSERVED
    return logging.WARNING if needs_a_human else logging.INFO


def _write_deed(deed: Deed, reason: str) -> None:
    if deed.outcome is None:
        log.error("ublk%d could not be deleted: %s", deed.dev_id, deed.detail)
    elif deed.outcome is Outcome.DELETED:
        after = "" if deed.reaction is None else f", {deed.reaction * 1000:.0f} ms after the death was seen"
        log.warning("ublk%d deleted: %s; id free again after %.0f ms%s", deed.dev_id, reason, deed.took * 1000, after)
    else:
        level = logging.WARNING if deed.outcome is Outcome.DELETED_STILL_HELD else logging.INFO
        log.log(level, "ublk%d %s: %s", deed.dev_id, _DONE[deed.outcome], deed.detail)
