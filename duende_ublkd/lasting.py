"""What outlives the daemon: the journal, each device's age and attempts, the holds, and the alerts.

Rules:
1. Nothing here is waited for. The journal is written by a child; what it cannot write waits in memory, bounded.
2. Holds and records are in two places: in the run directory, which no disk can keep from being read, and in the journal.
   The first wins. So a daemon that is restarted while the journal's disk hangs still keeps its hands off what is on hold,
   and runs no recovery command beside one that runs. What cannot be written there is taken away, so that what is old
   does not win.
3. Records of devices are of one boot: identities and times mean nothing in another.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.config import duration_text
from duende_ublkd.core.errors import DuendeError, UsageError
from duende_ublkd.core.holds import LONGEST_TIME, MOST_TEXT, Hold, Holds, NotAllowedError, Released, may_change
from duende_ublkd.core.model import EventKind, Level
from duende_ublkd.core.text import printable
from duende_ublkd.kernel import holdfile, runfile
from duende_ublkd.report.alerts.desk import Desk
from duende_ublkd.report.journal import Journal
from duende_ublkd.report.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from duende_ublkd.core.config import Config
    from duende_ublkd.core.model import Judged, PassReport, Process
    from duende_ublkd.reconcile import Reconciler
    from duende_ublkd.report.alerts.sending import Deliverer

_READ_FOR = 10.0
"""Seconds until a silent disk is trouble, and that the first look waits for what a former daemon knew; a cold start takes a
few of them."""
_HOLDS = "holds"  # what the daemon is degraded by, as the following
_JOURNAL = "journal"
_RUN_DIRECTORY = "run-directory"
_DEVICE = "device/"  # keys of the journal's state, as the following
_HOLD = "hold/"
_AGAIN = 5.0  # seconds until what the run directory did not take is tried again
_PACE = 1.0  # seconds between two changes of one user who is not root: each is an entry of a bounded journal


class Lasting:
    """The daemon's memory beyond its own life; a reporter, and whom holds are asked of."""

    def __init__(
        self,
        config: Config,
        directory: str,
        spawn: Callable[[Sequence[str], int], None],
        watch_former: Callable[[int, Process], bool],
        deliverer: Deliverer,
    ) -> None:
        """`directory`: the run directory. `spawn(argv, stdin)`: starts a program, and waits for no disk.

        `watch_former(dev_id, hand)`: whether a child of a former daemon is still about to stop a device. `deliverer`: who
        brings alerts to the sinks.
        """
        self._directory = directory
        self._boot_id = holdfile.boot_id()
        self._reconciler: Reconciler | None = None
        self._watch_former = watch_former
        self._alerts = config.alerts
        self._late: asyncio.Task[None] | None = None
        self._is_run_directory_sick = False
        self._holds_unwritten = False
        self._holds_again: asyncio.TimerHandle | None = None  # after trouble
        self._paces: dict[int, float] = {}  # uid -> its last change, of those who are not root
        self.store = Store(
            config.daemon.state_dir,
            max_age=config.journal.keep,
            max_bytes=config.journal.max_size,
            on_trouble=self._on_trouble,
            on_recovered=self._on_recovered,
            spawn=spawn,
            answer_within=_READ_FOR,
        )
        self.journal = Journal(self.store.append)
        self.desk = Desk(self.journal, self.store.save, deliverer, boot_id=self._boot_id, instance_of=self._instance_of)

    def _instance_of(self, device: Judged) -> int | None:
        """Also of one that is deleted and has lost its sysfs entry: it is still the one that it was."""
        inode = device.seen.identity.sysfs_inode
        history = self._the_reconciler.ledger.get(device.seen.dev_id) if inode is None else None
        return history.identity.sysfs_inode if history else inode

    async def restore(self, reconciler: Reconciler) -> None:
        """Start the journal, and go on from what it has kept."""
        self._reconciler = reconciler
        reconciler.ledger.keep = self._save_device
        saved = await self.store.open(_READ_FOR)
        self._restore_alerts(saved)
        devices = {key: value for key, value in saved.items() if key.startswith(_DEVICE)}
        records, doubts = runfile.load_records(self._directory)
        for doubt in doubts:
            self._note(Level.WARNING, f"not believed: {printable(doubt)}")
        devices |= {f"{_DEVICE}{dev_id}": record for dev_id, record in records.items()}
        for key, value in devices.items():
            self._restore_device(reconciler, key, value)
        holds = {key: value for key, value in saved.items() if key.startswith(_HOLD)}
        reconciler.holds = self._restore_holds(holds)
        for key in holds.keys() - {f"{_HOLD}{hold.dev_id}" for hold in reconciler.holds.all()}:
            self.store.save(key, None)
        for hold in reconciler.holds.all():
            reconciler.hold(hold)
            self._save_hold(hold.dev_id)
        if reconciler.holds.all() or self._holds_unwritten:
            self._write_holds()  # they may be the journal's

    def _restore_alerts(self, saved: Mapping[str, Any]) -> None:
        """Where the disk is silent they are told again, until it is known what a former daemon has told of them."""
        self.desk.restore(saved)
        self.desk.configure(self._alerts)
        if self.store.stats.trouble:
            self._late = asyncio.ensure_future(self._restore_alerts_later())
        else:
            self.desk.degraded(_JOURNAL, None)

    async def _restore_alerts_later(self) -> None:
        self.desk.restore(await self.store.open(math.inf))

    def take(self, config: Config) -> None:
        """Tell the sinks of this configuration from now on."""
        self._alerts = config.alerts
        self.desk.configure(config.alerts)

    async def close(self, deadline: float) -> None:
        """Nobody is told of anything any more; what is not written yet has so many seconds."""
        self.desk.close()
        for each in (self._late, self._holds_again):
            if each:
                each.cancel()
        await self.store.close(deadline)

    def _restore_device(self, reconciler: Reconciler, key: str, value: Any) -> None:  # noqa: ANN401 - JSON
        number = key.removeprefix(_DEVICE)
        if not (number.isascii() and number.isdigit()):
            self._note(Level.WARNING, f"the record {printable(key)} is nobody's")
            self.store.save(key, None)
            return
        dev_id = int(number)
        try:
            if value["boot_id"] == self._boot_id:
                reconciler.ledger.remember(dev_id, value["device"])
                hand = reconciler.ledger.hand_of_former(dev_id)
                if hand and not self._watch_former(dev_id, hand):
                    reconciler.ledger.note_answer(dev_id, "STOP_DEV")
                if value["device"]["trail"]["began"] is not None:
                    self._note_abandoned(dev_id, value["device"]["trail"])
                return
        except (KeyError, TypeError, ValueError) as error:
            self._note(Level.WARNING, f"the record {printable(key)} is not understood: {error!r}")
        self._save(dev_id, None)

    def _note_abandoned(self, dev_id: int, trail: Mapping[str, Any]) -> None:
        """What a former daemon wrote "before" for gets its "after" from this one."""
        attempt = trail["attempts"]
        text = (
            f"ublk{dev_id}: the daemon that ran attempt {attempt} to recover it has ended; what came of it is not known"
        )
        facts = {"phase": "after", "action": "recover", "outcome": "abandoned", "attempt": attempt}
        self.journal.note(EventKind.RECOVERY, Level.WARNING, text, dev_id, **facts)

    def forget_the_gone(self) -> None:
        """After the first look at all: what a former daemon knew of devices that are not there any more."""
        for dev_id in self._the_reconciler.ledger.forget_remembered():
            self._save(dev_id, None)

    def _restore_holds(self, saved: Mapping[str, Any]) -> Holds:
        """Rule 2. DuendeError: nobody can tell what is on hold, and so nobody may act."""
        now = time.monotonic()
        try:
            if holdfile.read(self._directory) is not None:
                return holdfile.load(self._directory, now)
        except holdfile.UnwrittenError:
            if self.store.stats.trouble:
                raise
            self._holds_unwritten = True
        try:
            found = [Holds.from_record(record, self._boot_id, now) for record in saved.values()]
            return Holds(hold for holds in found for hold in holds.all())
        except ValueError as error:
            raise DuendeError(
                f"the holds in the journal are not understood: {error}", hint="look at: duende-ublkd events"
            ) from error

    # Reports

    def intends(self, device: Judged) -> None:
        """Before something is done: the journal has it, and the attempt counts, whatever becomes of this daemon."""
        self.journal.intends(device)
        self.desk.intends(device)
        self._save_device(device.seen.dev_id)

    def passed(self, report: PassReport) -> None:
        """After a pass or a deed."""
        self.journal.passed(report)
        self.desk.passed(report)
        for dev_id in {
            *(device.seen.dev_id for device in (*report.changed, *report.gone)),
            *(deed.dev_id for deed in report.deeds),
        }:
            self._save_device(dev_id)

    def records(self) -> dict[int, dict[str, Any]]:
        """What is known of each device beyond the last look, for commands that look themselves."""
        ledger = self._the_reconciler.ledger
        known = ((dev_id, ledger.to_record(dev_id)) for dev_id in self._the_reconciler.devices)
        return {dev_id: record for dev_id, record in known if record is not None}

    # Holds

    @property
    def holds(self) -> Sequence[Hold]:
        """Those that are in force."""
        now = time.monotonic()
        return [hold for hold in self._the_reconciler.holds.all() if hold.until > now]

    def hold(self, dev_id: int, seconds: float, why: str, uid: int) -> Hold:
        """Hands off an id. UsageError: not so long; NotAllowedError: not by this user."""
        if not 0 < seconds <= LONGEST_TIME:
            longest = duration_text(LONGEST_TIME)
            raise UsageError(
                f"{seconds:g} s is not between 0 and {longest}", hint=f"duende-ublkd hold {dev_id} --for 1h"
            )
        instance = self._check_right("hold", dev_id, uid)
        now = time.monotonic()
        hold = Hold(dev_id, now, now + seconds, uid, printable(why, MOST_TEXT), instance)
        self._the_reconciler.hold(hold)
        reason = f" ({hold.why})" if hold.why else ""
        text = f"ublk{dev_id} on hold for {duration_text(seconds)} by {_who(uid)}{reason}"
        self._note_hold(text, hold, "set")
        return hold

    def release(self, dev_id: int, uid: int) -> Released:
        """End a hold, and begin anew with what was given up. NotAllowedError: not by this user."""
        self._check_right("release", dev_id, uid)
        released = self._the_reconciler.release(dev_id)
        if released.hold:
            self._note_hold(f"ublk{dev_id} released by {_who(uid)}", released.hold, "released")
        if attempts := released.attempts:
            text = f"ublk{dev_id}: {attempts} attempts to recover it are forgotten, says {_who(uid)}"
            self.journal.note(EventKind.RECOVERY, Level.INFO, text, dev_id, attempts=attempts)
        if released.overdue:
            text = f"ublk{dev_id}: {released.overdue} of an earlier daemon is over, says {_who(uid)}"
            self.journal.note(EventKind.ACTION, Level.INFO, text, dev_id, command=released.overdue)
        if released.attempts or released.overdue:
            self._save_device(dev_id)
        return released

    def on_hold_ended(self, hold: Hold, why: str) -> None:
        """A hold ended by itself, which a reader of the file sees, too: many that end together are written once."""
        self._journal_hold(f"ublk{hold.dev_id} is on hold no more: {why}", hold, "over")
        if not self._holds_unwritten:
            self._holds_unwritten = True
            asyncio.get_running_loop().call_soon(self._write_holds)

    def _check_right(self, deed: str, dev_id: int, uid: int) -> int | None:
        """The instance that this user's hold is bound to; None: root's is bound to the id."""
        device = self._the_reconciler.devices.get(dev_id)
        info = device.seen.info if device else None
        if not may_change(uid, self._the_reconciler.holds.get(dev_id), info.owner_uid if info else None):
            raise NotAllowedError(
                f"user {uid} may not change ublk{dev_id}: it is not this user's own, or root has set the hold",
                hint=f"sudo duende-ublkd {deed} {dev_id}",
            )
        if uid == 0:
            return None
        instance = device.seen.identity.sysfs_inode if device else None
        if instance is None:
            raise NotAllowedError(f"ublk{dev_id} is deleted: it is nobody's own", hint="duende-ublkd list")
        now = time.monotonic()
        if now - self._paces.get(uid, -_PACE) < _PACE:
            raise NotAllowedError("one change in a second is enough", hint=f"sleep 1; duende-ublkd {deed} {dev_id}")
        self._paces[uid] = now
        return instance

    def _note_hold(self, text: str, hold: Hold, state: str) -> None:
        self._journal_hold(text, hold, state)
        self._write_holds()

    def _journal_hold(self, text: str, hold: Hold, state: str) -> None:
        facts = {"state": state, "uid": hold.uid, "why": hold.why, "instance": hold.instance}
        self.journal.note(EventKind.HOLD, Level.INFO, text, hold.dev_id, **facts)
        self._save_hold(hold.dev_id)

    def _save_hold(self, dev_id: int) -> None:
        hold = self._the_reconciler.holds.get(dev_id)
        record = Holds([hold]).to_record(self._boot_id) if hold else None
        self.store.save(f"{_HOLD}{dev_id}", record)

    def _write_holds(self) -> None:
        self._holds_unwritten = False
        if self._holds_again:
            self._holds_again.cancel()
        try:
            holdfile.write(self._directory, self._the_reconciler.holds.to_record(self._boot_id))
        except OSError as error:
            why = f"the holds cannot be written to {self._directory}: {error.strerror}"
            if not self._holds_again:
                self._note(Level.ERROR, f"{why}; they last as long as this daemon, or as the journal has them")
                with contextlib.suppress(OSError):  # there is none, or it cannot be changed either
                    holdfile.empty(self._directory)
            self.desk.degraded(_HOLDS, why)
            self._holds_again = asyncio.get_running_loop().call_later(_AGAIN, self._write_holds)
        else:
            self._holds_again = None
            self.desk.degraded(_HOLDS, None)

    def _save_device(self, dev_id: int) -> None:
        record = self._the_reconciler.ledger.to_record(dev_id)
        self._save(dev_id, record and {"boot_id": self._boot_id, "device": record})

    def _save(self, dev_id: int, record: dict[str, Any] | None) -> None:
        self.store.save(f"{_DEVICE}{dev_id}", record)
        try:
            runfile.save_record(self._directory, dev_id, record)
        except OSError as error:
            why = f"nothing can be kept in {self._directory}: {error.strerror}"
            if not self._is_run_directory_sick:
                self._note(Level.ERROR, why)
            with contextlib.suppress(OSError):  # there is none, or it cannot be removed either
                runfile.save_record(self._directory, dev_id, None)
            self._is_run_directory_sick = True
            self.desk.degraded(_RUN_DIRECTORY, why)
        else:
            self._is_run_directory_sick = False
            self.desk.degraded(_RUN_DIRECTORY, None)

    @property
    def _the_reconciler(self) -> Reconciler:
        assert self._reconciler  # noqa: S101 - restored before anything is reported
        return self._reconciler

    # The journal's own trouble

    def _on_trouble(self, sentence: str) -> None:
        self._note(Level.ERROR, f"{sentence}; what happens meanwhile is kept in memory, as far as it fits")
        self.desk.degraded(_JOURNAL, f"the journal: {sentence}")

    def _on_recovered(self, lost: int) -> None:
        self.desk.degraded(_JOURNAL, None)
        gap = f"; {lost} events are lost" if lost else "; nothing is lost"
        self._note(Level.INFO, f"the journal is written again{gap}")

    def _note(self, level: Level, text: str) -> None:
        self.journal.note(EventKind.DAEMON, level, text)


def _who(uid: int) -> str:
    return f"uid {uid}" if uid else "root"
