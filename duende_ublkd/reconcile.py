"""One pass: observe -> decide -> look again -> act -> report.

Rules:
1. A pass looks, decides and reports; what it decides to delete is done by a task per device, so that a slow deletion
   delays nobody, and independent devices go in parallel. A device with a task under way is left out of passes.
2. The look again happens with the device claimed: opened exclusively, so that no server can take it and its id cannot be
   reused. Whatever differs from the first look spares the device.
3. A control command that missed its deadline makes its device wedged: nothing but the late answer changes that.
4. The kernel is a protocol here: the real one and the fake one of the tests are held to the same contract.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from duende_ublkd.core import policy
from duende_ublkd.core.config import DeviceFacts
from duende_ublkd.core.errors import (
    BusyError,
    CommandError,
    CommandOverdueError,
    DuendeError,
    InterruptedCommandError,
    KernelUnavailableError,
    NoSuchDeviceError,
)
from duende_ublkd.core.ledger import Ledger
from duende_ublkd.core.model import Action, Deed, Judged, Outcome, PassReport

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from collections.abc import Set as AbstractSet
    from contextlib import AbstractContextManager

    from duende_ublkd.core.config import Config, Policy
    from duende_ublkd.core.ledger import History
    from duende_ublkd.core.model import DevInfo, DriverFacts, Observation, Usage

Rdevs = frozenset[tuple[int, int]]

CONFIRM_FOR = 0.5
"""Seconds to wait for the id to become free; without a holder it takes some milliseconds."""
MOST_DEEDS = 64
"""Deletions under way at once: each takes a descriptor, and its turn at the driver's mutex by its deadline."""
_FIRST_CONFIRM = 0.001
_SPARED_PAUSE = 1.0


class Claim(Protocol):
    """A device that nobody else can take; the only way to delete one."""

    async def look_again(self) -> Observation | None:
        """Look once more at what the claim pins; None: the id is free."""

    async def delete(self, info: DevInfo) -> None:
        """Delete it and release the claim; InterruptedCommandError: deleted, and held."""


class Kernel(Protocol):
    """What is asked of the kernel. UblkKernel documents each call; all may raise KernelUnavailableError."""

    @property
    def traits(self) -> policy.Traits:
        """What this kernel's DEL_DEV can do."""

    async def driver(self) -> DriverFacts:
        """What the driver says of itself, and that it is there."""

    def candidates(self, known: Collection[int]) -> set[int]:
        """Every id worth asking about in a full look."""

    async def observe(self, dev_ids: Collection[int]) -> list[Observation]:
        """One look at these ids; those that are free are left out."""

    async def look_for_users(self, seen: Collection[Observation], remembered: Mapping[int, Rdevs]) -> dict[int, Usage]:
        """Who has these devices open, and who holds their disks."""

    def claim(self, seen: Observation) -> AbstractContextManager[Claim]:
        """Hold a device exclusively; BusyError, NoSuchDeviceError."""


class Reporter(Protocol):
    """Who is told."""

    def intends(self, device: Judged) -> None:
        """Called right before something destructive is done."""

    def passed(self, report: PassReport) -> None:
        """Called after each pass, and after each deed with a report of that alone."""


class Agenda:
    """Which ids to look at, and when. `soon` and `later` may be called by anything in the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop or asyncio.get_running_loop()
        self._due: dict[int, float] = {}
        self._all_due: float | None = None
        self._changed = asyncio.Event()
        self._defect: BaseException | None = None

    def soon(self, dev_id: int | None) -> None:
        """Look now: at one id, or at all (None)."""
        self.later(dev_id, 0.0)

    def later(self, dev_id: int | None, seconds: float) -> None:
        """Look in so many seconds, unless an earlier look is due."""
        at = self._loop.time() + seconds
        if dev_id is None:
            self._all_due = at if self._all_due is None else min(self._all_due, at)
        else:
            self._due[dev_id] = min(self._due.get(dev_id, at), at)
        self._changed.set()

    def fail(self, defect: BaseException) -> None:
        """A task died of a defect: whoever waits for the next look gets it instead."""
        self._defect = defect
        self._changed.set()

    def check(self) -> None:
        """Raise the defect, if there is one."""
        if self._defect:
            raise self._defect

    async def next(self) -> set[int] | None:
        """Wait for the next look that is due: the ids, or None for all."""
        while True:
            self.check()
            now = self._loop.time()
            if self._all_due is not None and self._all_due <= now:
                self._all_due = None
                self._due.clear()
                return None
            if due := {dev_id for dev_id, at in self._due.items() if at <= now}:
                for dev_id in due:
                    del self._due[dev_id]
                return due
            self._changed.clear()
            times = [*self._due.values(), *([] if self._all_due is None else [self._all_due])]
            with contextlib.suppress(TimeoutError):
                # Not wait_for(), which up to Python 3.11 swallows a cancellation that meets the event being set.
                async with asyncio.timeout(max(min(times) - now, 0.0) if times else None):
                    await self._changed.wait()


class Reconciler:
    """Brings what is there to what should be there, one pass at a time."""

    def __init__(
        self,
        kernel: Kernel,
        config: Config,
        reporter: Reporter,
        agenda: Agenda,
        *,
        without_grace: Collection[int] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`without_grace`: ids whose owner vouches for them (`clean --now`). `clock`: that of the observations."""
        self._clock = clock
        self.config = config
        self.ledger = Ledger()
        self.devices: dict[int, Judged] = {}
        self._kernel = kernel
        self._reporter = reporter
        self._agenda = agenda
        self._without_grace = frozenset(without_grace)
        self._deeds: dict[int, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(MOST_DEEDS)
        self._late: set[tuple[int, str]] = set()  # answers that came after their deadline, since the last question

    async def run_pass(self, dev_ids: set[int] | None, *, act: bool = True, thorough: bool = False) -> PassReport:
        """Look at some or all ids and judge them. `act` False only looks; `thorough` asks for users of every device."""
        began = self._clock()
        left_out = self._left_out()
        try:
            driver = await self._kernel.driver()
            wanted = (self._kernel.candidates(self.ledger.ids()) if dev_ids is None else dev_ids) - left_out
            seen = await self._observe(wanted, thorough=thorough or dev_ids is None)
        except (KernelUnavailableError, CommandError, CommandOverdueError, OSError) as error:
            no_driver = isinstance(error, KernelUnavailableError) and error.no_driver
            gone = self._notice_gone(self.devices.keys() - left_out) if no_driver else []
            took = self._clock() - began
            report = PassReport(
                began,
                took,
                dev_ids is None,
                gone=tuple(gone),
                devices=self.devices,
                trouble=str(error),
                hint=error.hint
                if isinstance(error, DuendeError)
                else "see the limits: systemctl show -p LimitNOFILE duende-ublkd",
            )
            self._reporter.passed(report)
            return report
        gone = self._notice_gone(wanted - {each.dev_id for each in seen})
        changed = [device for each in seen if (device := self._judge(each))]
        self.devices = dict(sorted(self.devices.items()))
        dry_run = self.config.daemon.dry_run
        deeds = [_would_delete(device) for device in changed if dry_run and device.verdict.action is Action.DELETE]
        took = self._clock() - began
        report = PassReport(
            began, took, dev_ids is None, tuple(changed), tuple(gone), tuple(deeds), self.devices, driver
        )
        self._reporter.passed(report)
        for each in seen:
            device = self.devices[each.dev_id]
            if device.verdict.action is Action.DELETE and act and not dry_run:
                self._start(device)
            elif device.verdict.look_again_in is not None:
                self._agenda.later(each.dev_id, device.verdict.look_again_in)
        return report

    def note_answer(self, dev_id: int, command: str) -> None:
        """A command that missed its deadline has answered; its asker may still have to hear of the deadline."""
        self._late.add((dev_id, command))
        self.ledger.note_answer(dev_id, command)
        self._agenda.soon(dev_id)

    async def finish_deeds(self) -> set[int]:
        """Wait until nothing destructive is under way; the ids that something was done to."""
        done: set[int] = set()
        while self._deeds:
            done |= self._deeds.keys()
            await asyncio.wait(self._deeds.values())
        return done

    def note_opened(self, dev_id: int) -> None:
        """Somebody has opened a device's char node; not we, as long as nothing is done to it."""
        if dev_id not in self._deeds:
            self.ledger.note_opened(dev_id, self._clock())

    def policy_for(self, seen: Observation, history: History) -> Policy:
        """The policy that the configuration gives this device."""
        chosen = self.config.policy_for(facts_of(seen, history)).policy
        if seen.dev_id in self._without_grace:
            return replace(chosen, setup_grace=0.0, orphan_grace=0.0)
        return chosen

    def _left_out(self) -> frozenset[int]:
        """What a pass does not look at: it would miss what a deed learns meanwhile, or ask what was not answered yet."""
        unanswered = (dev_id for dev_id in self.ledger.ids() if self._waits_for_look(dev_id))
        return frozenset((*self._deeds, *unanswered))

    def _waits_for_look(self, dev_id: int) -> bool:
        history = self.ledger.get(dev_id)
        return bool(history and history.overdue and history.overdue.of_look)

    async def _observe(self, wanted: Collection[int], *, thorough: bool) -> list[Observation]:
        self._late = {late for late in self._late if late[0] not in wanted}
        seen = await self._kernel.observe(wanted)
        unclear = [each for each in seen if thorough or policy.needs_usage(each)]
        remembered = {each.dev_id: self._disk_rdevs(each.dev_id) for each in unclear}
        usage = await self._kernel.look_for_users(unclear, remembered)
        return [replace(each, usage=usage.get(each.dev_id)) for each in seen]

    def _disk_rdevs(self, dev_id: int) -> Rdevs:
        history = self.ledger.get(dev_id)
        return history.disk_rdevs if history else frozenset()

    def _notice_gone(self, dev_ids: AbstractSet[int]) -> list[Judged]:
        gone = sorted(dev_ids & self.devices.keys())
        for dev_id in gone:
            self.ledger.forget(dev_id)
        return [self.devices.pop(dev_id) for dev_id in gone]

    def _judge(self, seen: Observation) -> Judged | None:
        """Judge one device; returns it when the verdict is another than before."""
        history = self.ledger.record(seen)
        if seen.overdue and (seen.dev_id, seen.overdue) not in self._late:
            self.ledger.note_overdue(seen.dev_id, seen.overdue, seen.at, of_look=True)
            history = self.ledger.get(seen.dev_id) or history
        verdict = policy.decide(seen, history, self.policy_for(seen, history), self._kernel.traits, seen.at)
        history, before = self.ledger.note_verdict(seen.dev_id, verdict, seen.at)
        last = self.devices.get(seen.dev_id)
        if seen.usage is None and last and last.seen.identity == seen.identity:
            seen = replace(seen, usage=last.seen.usage)  # for people: who used it when somebody last looked
        device = Judged(seen, verdict, history.verdict_since)
        self.devices[seen.dev_id] = device
        return device if before else None

    def _start(self, device: Judged) -> None:
        dev_id = device.seen.dev_id
        task = asyncio.ensure_future(self._carry_out(device))
        self._deeds[dev_id] = task
        task.add_done_callback(lambda _: self._finished(dev_id))

    def _finished(self, dev_id: int) -> None:
        task = self._deeds.pop(dev_id)
        if not task.cancelled() and (defect := task.exception()):
            self._agenda.fail(defect)
        self._agenda.soon(dev_id)

    async def _carry_out(self, device: Judged) -> None:
        async with self._slots:
            if not self.config.daemon.dry_run:
                await self._try_to_delete(device)

    async def _try_to_delete(self, device: Judged) -> None:
        """One deletion from the announcement to the report; every failure ends here, as a deed with its reason."""
        began = self._clock()
        dev_id = device.seen.dev_id
        history = self.ledger.get(dev_id)
        self._reporter.intends(device)
        self._late = {late for late in self._late if late[0] != dev_id}
        outcome: Outcome | None = None
        detail = ""
        try:
            outcome, detail = await self._delete(device)
        except CommandOverdueError as error:
            if (dev_id, error.command) not in self._late:
                self.ledger.note_overdue(dev_id, error.command, self._clock(), of_look=False)
            detail = str(error)
        except (CommandError, KernelUnavailableError, OSError) as error:
            detail = str(error)
            self.ledger.note_failure(dev_id, detail, self._clock())
        ended = self._clock()
        died = history.death_seen if history else None
        reaction = ended - died if outcome is Outcome.DELETED and died is not None else None
        gone: tuple[Judged, ...] = ()
        if outcome in (Outcome.DELETED, Outcome.ALREADY_GONE):
            self.ledger.forget(dev_id)
            gone = tuple(filter(None, [self.devices.pop(dev_id, None)]))
        deed = Deed(dev_id, Action.DELETE, outcome, detail, ended - began, reaction)
        self._reporter.passed(PassReport(began, ended - began, False, (), gone, (deed,), self.devices))

    async def _delete(self, device: Judged) -> tuple[Outcome, str]:
        """Reasons to hold back, one after the other, and then the deletion."""
        try:
            with self._kernel.claim(device.seen) as claim:
                again = await claim.look_again()
                if again is None:
                    return Outcome.ALREADY_GONE, "somebody else deleted it"
                reason = self._why_not(device, again)
                if reason or again.info is None:
                    self.ledger.note_pause(device.seen.dev_id, reason, again.at + _SPARED_PAUSE)
                    return Outcome.SPARED, reason
                await claim.delete(again.info)
        except BusyError:
            self.ledger.note_open(device.seen.dev_id, self._clock())
            return Outcome.SPARED, "somebody has opened its char device"
        except NoSuchDeviceError:
            return Outcome.ALREADY_GONE, "somebody else deleted it"
        except InterruptedCommandError as error:
            return Outcome.DELETED_STILL_HELD, error.meaning
        return await self._confirm(device.seen)

    def _why_not(self, device: Judged, again: Observation) -> str:
        """The second look, with nobody able to change the answer any more. Empty: go on."""
        if self.config.daemon.dry_run:
            return "dry run"
        if again.identity.sysfs_inode is None:
            return "somebody else deleted it"
        if again.identity != device.seen.identity:
            return "its id belongs to another device now"
        history = self.ledger.record(replace(again, usage=device.seen.usage))
        seen = replace(again, usage=device.seen.usage)
        verdict = policy.decide(seen, history, self.policy_for(seen, history), self._kernel.traits, again.at)
        return "" if verdict.action is Action.DELETE else verdict.reason

    async def _confirm(self, deleted: Observation) -> tuple[Outcome, str]:
        """Wait for the id to become free; nothing but asking tells (freeing an id emits no event)."""
        pause, until = _FIRST_CONFIRM, self._clock() + CONFIRM_FOR
        try:
            while not await self._is_free(deleted):
                if self._clock() > until:
                    return Outcome.DELETED_STILL_HELD, "its id frees itself when the last holder lets go"
                await asyncio.sleep(pause)
                pause *= 2
        except (CommandError, CommandOverdueError, KernelUnavailableError, OSError) as error:
            return Outcome.DELETED_STILL_HELD, f"nobody could tell whether its id is free: {error}"
        return Outcome.DELETED, ""

    async def _is_free(self, deleted: Observation) -> bool:
        """Whether the id is free, or another device's already: a server that is restarted gets the lowest free one."""
        of_the_deleted = (None, deleted.identity.sysfs_inode)
        now = await self._kernel.observe([deleted.dev_id])
        return all(each.identity.sysfs_inode not in of_the_deleted for each in now)


def facts_of(seen: Observation, history: History) -> DeviceFacts:
    """What configuration tables match on; of a server that is dead, what was known while it lived."""
    server = history.server
    return DeviceFacts(
        dev_id=seen.dev_id,
        comm=server.comm if server else None,
        exe=server.exe if server else None,
        unit=server.unit if server else None,
        owner_uid=seen.info.owner_uid if seen.info else None,
        server_known=server is not None,
    )


def _would_delete(device: Judged) -> Deed:
    return Deed(device.seen.dev_id, Action.DELETE, Outcome.WOULD_DELETE, device.verdict.reason, 0.0)
