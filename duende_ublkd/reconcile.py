"""One pass: observe -> decide -> look again -> act -> report.

Rules:
1. A pass looks, decides and reports; what it decides to do is done by a task per device (`deeds.py`), so that a slow
   deletion delays nobody, and independent devices go in parallel. A device that is being deleted is left out of passes;
   one that is being recovered is looked at, and nothing else is done to it.
2. A hint, a timer or a look again asked for by a verdict all mean the same: look now, at this id or at all.
3. The kernel is a protocol here: the real one and the fake one of the tests are held to the same contract.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from duende_ublkd.core import policy, recovery
from duende_ublkd.core.config import DeviceFacts, OnOrphan
from duende_ublkd.core.errors import CommandError, CommandOverdueError, DuendeError, KernelUnavailableError
from duende_ublkd.core.holds import Holds, Released
from duende_ublkd.core.ledger import Ledger, is_live
from duende_ublkd.core.model import Action, Deed, Judged, Outcome, PassReport, VerdictKind
from duende_ublkd.core.trail import NO_TRAIL
from duende_ublkd.deeds import Deeds

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Mapping
    from collections.abc import Set as AbstractSet

    from duende_ublkd.core.config import Config, Policy
    from duende_ublkd.core.holds import Hold
    from duende_ublkd.core.ledger import History
    from duende_ublkd.core.model import Observation, Usage, Verdict
    from duende_ublkd.deeds import Kernel, Rdevs, Reporter


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
    """Brings what is there to what should be there, one pass at a time. Also the judge of its deeds."""

    def __init__(
        self,
        kernel: Kernel,
        config: Config,
        reporter: Reporter,
        agenda: Agenda,
        *,
        named: Collection[int] = (),
        without_grace: Collection[int] = (),
        only_orphans: bool = False,
        clock: Callable[[], float] = time.monotonic,
        on_hold_ended: Callable[[Hold, str], None] | None = None,
    ) -> None:
        """`named`: ids that somebody wants deleted if they are orphaned, whatever the configuration says of orphans.
        `without_grace`: ids whose owner vouches for them (`clean --now`). `only_orphans`: a one-shot command, which
        has not watched any deadline, leaves what waits for a server alone. `clock`: that of the observations.
        `on_hold_ended(hold, why)`: a hold ended by itself.
        """
        self.clock = clock
        self.config = config
        self.holds = Holds()
        self.ledger = Ledger()
        self.devices: dict[int, Judged] = {}
        self.read_holds: Callable[[], Holds] | None = None
        self._kernel = kernel
        self._reporter = reporter
        self._agenda = agenda
        self._named = frozenset(named)
        self._without_grace = frozenset(without_grace)
        self._only_orphans = only_orphans
        self._on_hold_ended = on_hold_ended or (lambda _hold, _why: None)
        self._deeds = Deeds(kernel, self.ledger, self.devices, reporter, self)
        self._stuck_looked_at = -_STUCK_EVERY
        self._blind = ""  # what the last look at users could not see
        self._blind_since: float | None = None
        self._deletions: dict[int, asyncio.Task[None]] = {}
        self._recoveries: dict[int, asyncio.Task[None]] = {}

    @property
    def is_dry_run(self) -> bool:
        """Nothing is to be done."""
        return self.config.daemon.dry_run

    async def run_pass(self, dev_ids: set[int] | None, *, act: bool = True, thorough: bool = False) -> PassReport:
        """Look at some or all ids and judge them. `act` False only looks; `thorough` asks for users of every device."""
        began = self.clock()
        left_out = self._left_out()
        try:
            driver = await self._kernel.driver()
            wanted = (self._kernel.candidates(self.ledger.ids()) if dev_ids is None else dev_ids) - left_out
            seen = await self._observe(wanted, thorough=thorough or dev_ids is None)
        except (KernelUnavailableError, CommandError, CommandOverdueError, OSError) as error:
            no_driver = isinstance(error, KernelUnavailableError) and error.no_driver
            gone = self._notice_gone(self.devices.keys() - left_out) if no_driver else []
            took = self.clock() - began
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
        self._end_holds()
        changed = []
        for number, each in enumerate(seen, 1):
            if device := self._judge(each):
                changed.append(device)
            if number % _JUDGED_AT_ONCE == 0:
                await asyncio.sleep(0)  # others have their turn: signals, watchdog, clients
        if dev_ids is None:
            self.ledger.note_full_look()
        changed = await self._with_stuck(changed, {each.dev_id for each in seen})
        self._sort_devices()
        deeds = [_would_do(device) for device in changed if self.is_dry_run and device.verdict.action in _DEEDS]
        took = self.clock() - began
        report = PassReport(
            began, took, dev_ids is None, tuple(changed), tuple(gone), tuple(deeds), self.devices, driver
        )
        self._reporter.passed(report)
        for each in seen:
            device = self.devices[each.dev_id]
            if act and self._may_do(device.verdict):
                self._start(device)
            elif device.verdict.look_again_in is not None:
                self._agenda.later(each.dev_id, device.verdict.look_again_in)
            if device.hold:
                self._agenda.later(each.dev_id, max(device.hold.until - self.clock(), 0.0))
        return report

    async def _with_stuck(self, changed: list[Judged], dev_ids: AbstractSet[int]) -> list[Judged]:
        """Where something is wedged, a person needs to know by whom: looked for at once, and then now and again."""
        wedged = {dev_id for dev_id in dev_ids if self.devices[dev_id].verdict.kind is VerdictKind.WEDGED}
        is_new = any(each.seen.dev_id in wedged for each in changed)
        if not wedged or not (is_new or self.clock() >= self._stuck_looked_at + _STUCK_EVERY):
            return changed
        self._stuck_looked_at = self.clock()
        stuck = await self._kernel.look_for_stuck()
        for dev_id in wedged & self.devices.keys():
            self.devices[dev_id] = replace(self.devices[dev_id], stuck=stuck)
        return [self.devices.get(each.seen.dev_id, each) for each in changed]

    def _may_do(self, verdict: Verdict) -> bool:
        if self.is_dry_run or verdict.action not in _DEEDS:
            return False
        return not (self._only_orphans and verdict.kind is VerdictKind.UNSERVED)

    def _sort_devices(self) -> None:
        """In place: the deeds take what they delete out of the same dictionary."""
        if list(self.devices) != sorted(self.devices):
            in_order = sorted(self.devices.items())
            self.devices.clear()
            self.devices.update(in_order)

    def note_answer(self, dev_id: int, command: str) -> None:
        """A command that missed its deadline has answered; its asker may still have to hear of the deadline."""
        was_stuck = self.ledger.stuck_deletions()
        self.ledger.note_answer(dev_id, command)
        self._agenda.soon(None if was_stuck != self.ledger.stuck_deletions() else dev_id)

    async def finish_deeds(self) -> set[int]:
        """Wait until nothing destructive is under way; the ids that something was done to."""
        done: set[int] = set()
        while self._deletions:
            done |= self._deletions.keys()
            await asyncio.wait(self._deletions.values())
        return done

    @property
    def under_way(self) -> frozenset[int]:
        """The ids whose deletion is not over."""
        return frozenset(self._deletions)

    def leave_recoveries(self) -> None:
        """Watch recovery commands no more; they run on by themselves, until their limit."""
        for task in self._recoveries.values():
            task.cancel()

    def note_opened(self, dev_id: int) -> None:
        """Somebody has opened a device's char node; not we, as long as nothing is done to it."""
        if dev_id not in self._deletions:
            self.ledger.note_opened(dev_id, self.clock())

    def hold(self, hold: Hold) -> None:
        """Hands off a device from now on; a deletion that has not sent its command yet ends here too."""
        self.holds.set(hold)
        self._agenda.soon(hold.dev_id)

    def release(self, dev_id: int) -> Released:
        """End a hold, and begin anew with what was given up: a person has looked at the device."""
        hold = self.holds.release(dev_id)
        overdue = self.ledger.forget_overdue(dev_id)
        history = self.ledger.get(dev_id)
        attempts = 0
        if history and not history.trail.is_running:
            attempts = history.trail.attempts
            self.ledger.note_trail(dev_id, history.trail.forgotten())
        self._agenda.soon(dev_id)
        return Released(hold, attempts, overdue)

    def is_held(self, seen: Observation) -> bool:
        """Somebody has it on hold. DuendeError: nobody can tell."""
        if self.read_holds:  # this process is not the one that is asked for holds
            self.holds = self.read_holds()
        return self.holds.active(seen.dev_id, seen.identity.sysfs_inode, self.clock()) is not None

    def decide(self, seen: Observation, history: History) -> Verdict:
        """What a device is and what to do, by the configuration and the holds of this moment."""
        hold = self.holds.active(seen.dev_id, seen.identity.sysfs_inode, self.clock())
        chosen = self.policy_for(seen, history)
        traits = replace(self._kernel.traits, stuck=self.ledger.stuck_deletions())
        return policy.decide(seen, history, chosen, traits, seen.at, hold)

    def policy_for(self, seen: Observation, history: History) -> Policy:
        """The policy that the configuration gives this device, and whoever named it."""
        chosen = self.config.policy_for(facts_of(seen, history)).policy
        if seen.dev_id in self._named:
            chosen = replace(chosen, orphaned=OnOrphan.DELETE)
        if seen.dev_id in self._without_grace:
            return replace(chosen, setup_grace=0.0, orphan_grace=0.0)
        return chosen

    def _left_out(self) -> frozenset[int]:
        """What a pass does not look at: it would miss what a deed learns meanwhile, or ask what was not answered yet."""
        unanswered = (dev_id for dev_id in self.ledger.ids() if self._waits_for_look(dev_id))
        return frozenset((*self._deletions, *unanswered))

    def _end_holds(self) -> None:
        for hold in self.holds.expire(self.clock()):
            self._on_hold_ended(hold, "its time is over")

    def _waits_for_look(self, dev_id: int) -> bool:
        history = self.ledger.get(dev_id)
        return bool(history and history.overdue and history.overdue.of_look)

    async def _observe(self, wanted: Collection[int], *, thorough: bool) -> list[Observation]:
        self.ledger.note_question(wanted)
        seen = await self._kernel.observe(wanted)
        unclear = [each for each in seen if thorough or self._needs_usage(each) or self._wants_server(each)]
        remembered = {each.dev_id: self._disk_rdevs(each.dev_id) for each in unclear}
        usage = await self._kernel.look_for_users(unclear, remembered)
        if usage or thorough:
            self._note_blind(usage)
        return [replace(each, usage=usage.get(each.dev_id)) for each in seen]

    def _needs_usage(self, seen: Observation) -> bool:
        return policy.needs_usage(seen, self.ledger.get(seen.dev_id))

    def _note_blind(self, usage: Mapping[int, Usage]) -> None:
        blind = next((each for each in usage.values() if not each.complete), None)
        self._blind = (blind.blind or "somebody's open files") if blind else ""
        if not blind:
            self._blind_since = None
        elif self._blind_since is None:
            self._blind_since = self.clock()

    @property
    def blind(self) -> str:
        """What the looks at who uses the devices, one after the other for a while, could not see; empty: they see it all."""
        if self._blind_since is None or self.clock() < self._blind_since + _BLIND_FOR:
            return ""
        return self._blind

    def _wants_server(self, seen: Observation) -> bool:
        """It is served, and its policy or its recovery will need to know by whom."""
        history = self.ledger.get(seen.dev_id)
        if not is_live(seen) or (history and history.server_confirmed):
            return False
        if any(rule.match.server or rule.match.unit for rule in self.config.devices):
            return True
        possible = [self.policy_for(seen, history)] if history else self.config.policies()
        return any(recovery.asks_for_server(each.recover) for each in possible)

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
        if seen.overdue:
            self.ledger.note_overdue(seen.dev_id, seen.overdue, seen.at, of_look=True)
        inode = seen.identity.sysfs_inode
        if inode is not None and (dropped := self.holds.drop_of_others(seen.dev_id, inode)):
            self._on_hold_ended(dropped, "its device is gone")
        history = self._follow_trail(seen, self.ledger.get(seen.dev_id) or history)
        verdict = self.decide(seen, history)
        history, before = self.ledger.note_verdict(seen.dev_id, verdict, seen.at)
        last = self.devices.get(seen.dev_id)
        if seen.usage is None and last and last.seen.identity == seen.identity:
            seen = replace(seen, usage=last.seen.usage)  # for people: who used it when somebody last looked
        hold = self.holds.active(seen.dev_id, inode, self.clock())
        stuck = last.stuck if last and verdict.kind is VerdictKind.WEDGED else ()
        device = Judged(seen, verdict, history.verdict_since, hold, history.trail, stuck)
        self.devices[seen.dev_id] = device
        return device if before else None

    def _follow_trail(self, seen: Observation, history: History) -> History:
        """A device that was served for long enough has its attempts before it again."""
        if history.trail == NO_TRAIL or seen.info is None:  # without an answer nobody knows, nor which policy it has
            return history
        rule = self.policy_for(seen, history).recover
        stable = rule.stable if rule else math.inf
        trail = history.trail.looked_at(seen.at, stable, served=is_live(seen))
        return self.ledger.note_trail(seen.dev_id, trail) or history

    def _start(self, device: Judged) -> None:
        dev_id = device.seen.dev_id
        if device.verdict.action is Action.RECOVER:
            self._agenda.later(dev_id, _GLANCE_AT_RECOVERY)
        if dev_id in self._recoveries:
            return
        if device.verdict.action is Action.DELETE:
            self._deletions[dev_id] = self._begin(dev_id, self._deeds.delete(device), self._deletions)
            return
        self._recoveries[dev_id] = self._begin(dev_id, self._deeds.recover(device), self._recoveries)

    def _begin(
        self, dev_id: int, deed: Coroutine[None, None, None], tasks: dict[int, asyncio.Task[None]]
    ) -> asyncio.Task[None]:
        task = asyncio.ensure_future(deed)
        task.add_done_callback(lambda _: self._finished(dev_id, tasks))
        return task

    def _finished(self, dev_id: int, tasks: dict[int, asyncio.Task[None]]) -> None:
        task = tasks.pop(dev_id)
        if not task.cancelled() and (defect := task.exception()):
            self._agenda.fail(defect)
        self._agenda.soon(dev_id)


_DEEDS = (Action.DELETE, Action.RECOVER)
_JUDGED_AT_ONCE = 50
_STUCK_EVERY = 30.0  # seconds; a look at every thread of the machine
_BLIND_FOR = 60.0  # seconds; one slow look is no trouble
_GLANCE_AT_RECOVERY = 1.0  # seconds until a device whose recovery begins, or waits for its turn, is looked at again


def facts_of(seen: Observation, history: History) -> DeviceFacts:
    """What configuration tables match on; of a server that is dead, what was known while it lived."""
    server = history.server
    return DeviceFacts(
        dev_id=seen.dev_id,
        comm=server.comm if server else None,
        exe=server.exe if server else None,
        unit=server.unit if server else None,
        owner_uid=seen.info.owner_uid if seen.info else None,
        flags=seen.info.flags if seen.info else None,
        server_known=server is not None,
    )


def _would_do(device: Judged) -> Deed:
    action = device.verdict.action
    outcome = Outcome.WOULD_DELETE if action is Action.DELETE else Outcome.WOULD_RECOVER
    return Deed(device.seen.dev_id, action, outcome, device.verdict.reason, 0.0)
