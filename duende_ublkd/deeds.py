"""What is done to one device, from the announcement to the report: `look again -> act -> report`.

Rules:
1. A deletion looks again with the device claimed: opened exclusively, so that no server can take it and its id cannot be
   reused. Whatever differs from the first look spares the device.
2. A device that waits for a server is stopped by a child of the kernel room, never from here, with its users looked for
   once more under the claim. That is all: a stop that came back leaves an orphan, with its grace before it.
3. A recovery claims nothing: its server has to open the device. It is judged by the kernel's state, not by an exit code.
   A command whose work cannot be told any more (no answer, another instance) is left alone, since it may be serving.
4. A control command that missed its deadline makes its device wedged: nothing but the late answer changes that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from duende_ublkd.core import recovery
from duende_ublkd.core.config import UnfilledError, fill
from duende_ublkd.core.errors import (
    BusyError,
    CommandError,
    CommandOverdueError,
    DuendeError,
    HeldError,
    InterruptedCommandError,
    KernelUnavailableError,
    NoSuchDeviceError,
    NotDoneError,
)
from duende_ublkd.core.model import Action, Deed, Judged, KernelState, Outcome, PassReport, VerdictKind
from duende_ublkd.core.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from contextlib import AbstractAsyncContextManager, AbstractContextManager

    from duende_ublkd.core.config import Policy, Recovery
    from duende_ublkd.core.ledger import History, Ledger
    from duende_ublkd.core.model import DevInfo, DriverFacts, Observation, Process, Server, Usage, Verdict
    from duende_ublkd.core.policy import Traits
    from duende_ublkd.core.trail import Trail

Rdevs = frozenset[tuple[int, int]]

CONFIRM_FOR = 0.5
"""Seconds to wait for the id to become free; without a holder it takes some milliseconds."""
MOST_DELETIONS = 64
"""Under way at once: each takes a descriptor."""
MOST_RECOVERIES = 8
"""Under way at once: each is a program of somebody's, on a machine that has lost a disk."""
_MOST_SENT = min(4, 2 * (os.cpu_count() or 1))
"""DEL_DEVs in the kernel at once. They take one mutex for all devices (ublk_ctl_mutex), and should that be stuck, each keeps
one of the 4 x CPUs workers of io-wq that every other command needs. One more may wait for the holders of a device that
cannot be deleted asynchronously: such devices delay no other."""
_FIRST_CONFIRM = 0.001
_SPARED_PAUSE = 1.0
_TAKEN_PAUSE = 5.0
_FIRST_GLANCE = 0.02  # seconds between two questions whether a device is served again; grows
_LONGEST_GLANCE = 0.25


class Claim(Protocol):
    """A device that nobody else can take; the only way to delete one."""

    async def look_again(self) -> Observation | None:
        """Look once more at what the claim pins; None: the id is free."""

    async def stop(self, seen: Observation, may_go: Callable[[Process | None], bool]) -> None:
        """Stop a device without a server, which fails its waiting I/O. HeldError: somebody holds its disk.

        DuendeError: `may_go` said no. It is asked before a child begins, and at the last moment with that child's process.
        """

    async def delete(self, info: DevInfo) -> None:
        """Delete it and release the claim; InterruptedCommandError: deleted, and held."""


class Ended(Protocol):
    """How a command ended. `status`: exit code, negative signal, or None when that could not be seen."""

    @property
    def status(self) -> int | None:
        """Exit code, negative: the signal."""

    @property
    def output(self) -> str:
        """The end of what it said."""

    @property
    def trouble(self) -> str:
        """Why there is no status."""


class Command(Protocol):
    """A recovery command that runs."""

    async def started(self) -> None:
        """Wait until it runs; DuendeError says why it does not."""

    async def ended(self) -> Ended:
        """Wait for its own process's end; its children may live on."""

    async def has_open(self, dev_id: int) -> bool:
        """Whether it or a child of it has this device's char node open; True also when that cannot be told."""

    def keep(self) -> None:
        """No limits any more: it, or a child of it, serves."""

    def leave(self) -> None:
        """Nobody can tell: it goes on until its time is over, and then ends unless it has a device open."""

    async def end(self) -> str:
        """End it and its children; what was left, and why."""


class Kernel(Protocol):
    """What is asked of the kernel. UblkKernel documents each call; all may raise KernelUnavailableError."""

    @property
    def traits(self) -> Traits:
        """What this kernel's DEL_DEV can do."""

    async def driver(self) -> DriverFacts:
        """What the driver says of itself, and that it is there."""

    def candidates(self, known: Collection[int]) -> set[int]:
        """Every id worth asking about in a full look."""

    async def observe(self, dev_ids: Collection[int]) -> list[Observation]:
        """One look at these ids; those that are free are left out."""

    async def look_for_users(self, seen: Collection[Observation], remembered: Mapping[int, Rdevs]) -> dict[int, Usage]:
        """Who has these devices open, and who holds their disks."""

    async def look_for_stuck(self) -> tuple[str, ...]:
        """Who sleeps in the kernel on some ublk device's account: a sentence each."""

    def claim(self, seen: Observation) -> AbstractContextManager[Claim]:
        """Hold a device exclusively; BusyError, NoSuchDeviceError."""

    async def run_command(
        self,
        seen: Observation,
        argv: tuple[str, ...],
        environment: Mapping[str, str],
        rule: Recovery,
        may_go: Callable[[], bool],
    ) -> Command:
        """Start a recovery command, if `may_go` says so at the last moment; DuendeError: also while a former one runs."""


class Reporter(Protocol):
    """Who is told."""

    def intends(self, device: Judged) -> None:
        """Called right before something is done to a device."""

    def passed(self, report: PassReport) -> None:
        """Called after each pass, and after each deed with a report of that alone."""


class Judge(Protocol):
    """Who decides, by the configuration and the holds of this moment."""

    @property
    def is_dry_run(self) -> bool:
        """Nothing is to be done."""

    def decide(self, seen: Observation, history: History) -> Verdict:
        """What a device is, and what to do."""

    def is_held(self, seen: Observation) -> bool:
        """Somebody has it on hold."""

    def policy_for(self, seen: Observation, history: History) -> Policy:
        """The policy that the configuration gives this device."""

    def clock(self) -> float:
        """That of the observations."""


@dataclass(frozen=True, slots=True)
class _Result:
    """How one attempt to recover ended."""

    outcome: Outcome | None
    detail: str
    facts: dict[str, Any]
    is_left_alone: bool = False  # the command, which may still run


class Deeds:
    """Deletions and recoveries, each a coroutine that ends with a report; whoever runs them sees to one per device."""

    def __init__(
        self, kernel: Kernel, ledger: Ledger, devices: dict[int, Judged], reporter: Reporter, judge: Judge
    ) -> None:
        """`devices`: the present ones, from which what is deleted is taken."""
        self._kernel = kernel
        self._ledger = ledger
        self._devices = devices
        self._reporter = reporter
        self._judge = judge
        self._deletions = asyncio.Semaphore(MOST_DELETIONS)
        self._sent_deletions = asyncio.Semaphore(_MOST_SENT)
        self._sent_waiting = asyncio.Semaphore(1)
        self._recoveries = asyncio.Semaphore(MOST_RECOVERIES)

    async def delete(self, device: Judged) -> None:
        """Delete what was judged to be deleted; every failure ends here, as a deed with its reason."""
        async with self._deletions:
            if not self._judge.is_dry_run:
                await self._try_to_delete(device)

    async def recover(self, device: Judged) -> None:
        """Run the recovery command once, if that is still right, and see what comes of it."""
        async with self._recoveries:
            again = await self._look_once_more(device.seen)
            history = self._ledger.get(device.seen.dev_id)
            if again is None or history is None or self._judge.is_dry_run:
                return
            rule = self._judge.policy_for(again, history).recover
            if rule and self._judge.decide(again, history).action is Action.RECOVER:
                if self._is_taken_unseen(again):
                    why, now = "somebody who cannot be seen has its char device open", self._judge.clock()
                    self._ledger.note_trail(again.dev_id, history.trail.failed(why, now, _TAKEN_PAUSE))
                else:
                    await self._try_to_recover(replace(device, seen=again), history, rule)

    def _is_taken_unseen(self, seen: Observation) -> bool:
        """Where a look may have overlooked a new server, the exclusive open does not."""
        if seen.usage and seen.usage.complete:
            return False
        try:
            with self._kernel.claim(seen):
                return False
        except (DuendeError, OSError):
            return True

    # Deleting

    async def _try_to_delete(self, device: Judged) -> None:
        began = self._judge.clock()
        dev_id = device.seen.dev_id
        history = self._ledger.get(dev_id)
        self._reporter.intends(device)
        self._ledger.note_question([dev_id])
        outcome: Outcome | None = None
        detail = ""
        try:
            outcome, detail = await self._delete(device)
        except CommandOverdueError as error:
            self._ledger.note_overdue(dev_id, error.command, self._judge.clock(), of_look=False)
            detail = str(error)
        except NotDoneError as error:
            outcome, detail = self._spare(dev_id, str(error))
        except (DuendeError, OSError) as error:
            detail = str(error)
            self._ledger.note_failure(dev_id, detail, self._judge.clock())
        ended = self._judge.clock()
        died = history.death_seen if history else None
        reaction = ended - died if outcome is Outcome.DELETED and died is not None else None
        gone: tuple[Judged, ...] = ()
        if outcome in (Outcome.DELETED, Outcome.ALREADY_GONE):
            self._ledger.forget(dev_id)
            gone = tuple(filter(None, [self._devices.pop(dev_id, None)]))
        self._report(Deed(dev_id, Action.DELETE, outcome, detail, ended - began, reaction), began, gone)

    async def _delete(self, device: Judged) -> tuple[Outcome, str]:
        """Reasons to hold back, one after the other, and then the deletion."""
        dev_id = device.seen.dev_id
        try:
            async with self._turn(device):  # before the claim, which keeps a late server out
                with self._kernel.claim(device.seen) as claim:
                    again = await claim.look_again()
                    if again is None:
                        return Outcome.ALREADY_GONE, "somebody else deleted it"
                    if again.info and again.info.state != KernelState.DEAD:
                        return await self._stop(device, claim, again)
                    if outcome := await self._send_deletion(device, claim, replace(again, usage=device.seen.usage)):
                        return outcome
        except BusyError:
            reason = "somebody has opened its char device"
            if device.verdict.kind is VerdictKind.UNSERVED:  # a new server: a claim must not hinder it again and again
                self._ledger.note_failure(dev_id, reason, self._judge.clock())
            else:
                self._ledger.note_open(dev_id, self._judge.clock())
            return Outcome.SPARED, reason
        except NoSuchDeviceError:
            return Outcome.ALREADY_GONE, "somebody else deleted it"
        return await self._confirm(device.seen)

    def _turn(self, device: Judged) -> AbstractAsyncContextManager[None]:
        """One of the few places for DEL_DEV. What is to be stopped needs none; what waits for its holders has its own."""
        info = device.seen.info
        if info is None or info.state != KernelState.DEAD:
            return contextlib.nullcontext()
        is_waited_for = info.unprivileged or not self._kernel.traits.async_delete
        is_held = device.verdict.kind is VerdictKind.PINNED
        return self._sent_waiting if is_waited_for and is_held else self._sent_deletions

    async def _send_deletion(self, device: Judged, claim: Claim, again: Observation) -> tuple[Outcome, str] | None:
        """The last word before the command; None: it is done, and the id to be looked at."""
        reason = self._why_not(device, again)
        if reason or again.info is None:
            return self._spare(again.dev_id, reason)
        try:
            await claim.delete(again.info)
        except InterruptedCommandError as error:  # of any other command it says nothing of the kind
            return Outcome.DELETED_STILL_HELD, error.meaning
        return None

    def _spare(self, dev_id: int, reason: str) -> tuple[Outcome, str]:
        self._ledger.note_pause(dev_id, reason, self._judge.clock() + _SPARED_PAUSE)
        return Outcome.SPARED, reason

    async def _stop(self, device: Judged, claim: Claim, again: Observation) -> tuple[Outcome, str]:
        """Stop what nobody serves and nobody holds; who holds it is looked for once more, now that no server can come."""
        usage = await self._kernel.look_for_users(
            [again], {again.dev_id: device.seen.disk.rdevs if device.seen.disk else frozenset()}
        )
        again = replace(again, usage=usage.get(again.dev_id))
        if reason := self._why_not(device, again):
            return self._spare(again.dev_id, reason)
        try:
            await claim.stop(again, lambda hand: self._may_stop(again, hand))
        except CommandOverdueError:
            raise  # whoever was told to stop it may still be at it
        except HeldError as error:
            self._ledger.note_failure(again.dev_id, error.meaning, self._judge.clock())
            outcome = Outcome.SPARED, error.meaning
        except NoSuchDeviceError as error:
            outcome = self._spare(again.dev_id, error.meaning)
        except (DuendeError, OSError):
            self._ledger.note_hand(again.dev_id, None)
            raise
        else:
            outcome = Outcome.STOPPED, "its waiting I/O has failed, its disk is gone; its id is freed next"
        self._ledger.note_hand(again.dev_id, None)
        return outcome

    def _may_stop(self, seen: Observation, hand: Process | None) -> bool:
        """The last word, before a child begins (None) and again before it sends STOP_DEV. Who it is, is written down."""
        if self._judge.is_held(seen):
            return False
        if hand:
            self._ledger.note_hand(seen.dev_id, hand)
        return True

    def _why_not(self, device: Judged, again: Observation) -> str:
        """The second look, with nobody able to change the answer any more. Empty: go on."""
        if self._judge.is_dry_run:
            return "dry run"
        if again.identity.sysfs_inode is None:
            return "somebody else deleted it"
        if again.identity != device.seen.identity:
            return "its id belongs to another device now"
        if self._judge.is_held(again):
            return "somebody has it on hold"
        verdict = self._judge.decide(again, self._ledger.record(again))
        return "" if verdict.action is Action.DELETE else verdict.reason

    async def _confirm(self, deleted: Observation) -> tuple[Outcome, str]:
        """Wait for the id to become free; nothing but asking tells (freeing an id emits no event)."""
        pause, until = _FIRST_CONFIRM, self._judge.clock() + CONFIRM_FOR
        try:
            while not await self._is_free(deleted):
                if self._judge.clock() > until:
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

    # Recovering

    async def _look_once_more(self, seen: Observation) -> Observation | None:
        """The same instance as it is now, with who has it open; None: it is not there, or nobody can tell."""
        try:
            now = await self._kernel.observe([seen.dev_id])
            usage = await self._kernel.look_for_users(now, {seen.dev_id: seen.disk.rdevs if seen.disk else frozenset()})
        except (DuendeError, OSError):
            return None  # the next pass meets it too, and reports it
        return next((replace(one, usage=usage.get(one.dev_id)) for one in now if one.identity == seen.identity), None)

    async def _try_to_recover(self, device: Judged, history: History, rule: Recovery) -> None:
        began = self._judge.clock()
        dev_id, trail = device.seen.dev_id, history.trail.begun(began, rule.timeout)
        self._ledger.note_trail(dev_id, trail)
        self._reporter.intends(replace(device, trail=trail))
        try:
            result = await self._bring_back(device, history, trail.attempts, rule)
        except NotDoneError as error:  # and it counts for nothing
            self._ledger.note_trail(dev_id, history.trail)
            self._report(Deed(dev_id, Action.RECOVER, Outcome.SPARED, str(error), self._judge.clock() - began), began)
            return
        except UnfilledError as error:
            result = _Result(None, f"the command cannot be filled in: {error}", {})
        except (DuendeError, OSError) as error:
            result = _Result(None, str(error), {})
        ended = self._judge.clock()
        pause = recovery.pause_after(trail.attempts, rule, random.random())  # noqa: S311 - jitter, not a secret
        now = self._ledger.get(dev_id)
        if now and now.identity == history.identity:
            self._ledger.note_trail(dev_id, _after_attempt(now.trail, result, ended, pause))
        died = history.death_seen
        reaction = ended - died if result.outcome is Outcome.RECOVERED and died is not None else None
        facts = {"attempt": trail.attempts, "attempts": rule.attempts, **result.facts}
        self._report(Deed(dev_id, Action.RECOVER, result.outcome, result.detail, ended - began, reaction, facts), began)

    async def _bring_back(self, device: Judged, history: History, attempt: int, rule: Recovery) -> _Result:
        """Run the command and watch the kernel's state until the device is served, or the attempt is over."""
        seen = device.seen
        confirmed = history.server if history.server_confirmed else None
        argv = fill(rule.command, recovery.placeholders(seen, confirmed))
        environment = recovery.environment(seen, history.server, attempt, rule, device.verdict.reason)
        command = await self._kernel.run_command(seen, argv, environment, rule, lambda: not self._judge.is_held(seen))
        await command.started()
        began = self._judge.clock()  # its time begins now: a machine short of memory may have taken long
        self._note_start(seen, began + rule.timeout)
        ending = asyncio.ensure_future(command.ended())
        try:
            return await self._watch(seen, command, ending, began + rule.timeout, rule)
        except (DuendeError, OSError) as error:
            return _left_alone(command, f"nobody can tell whether it serves: {error}")
        finally:
            ending.cancel()

    def _note_start(self, seen: Observation, limit: float) -> None:
        now = self._ledger.get(seen.dev_id)
        if now and now.identity == seen.identity and now.trail.is_running:
            self._ledger.note_trail(seen.dev_id, replace(now.trail, limit=limit))
            self._ledger.keep(seen.dev_id)  # the next daemon waits for it as long as the command's supervisor does

    async def _watch(
        self, seen: Observation, command: Command, ending: asyncio.Future[Ended], until: float, rule: Recovery
    ) -> _Result:
        glance = _FIRST_GLANCE
        while True:
            over = self._judge.clock() >= until  # asked before the look: what was served in time counts
            same = await self._glance(seen)
            if same is None or same.info is None:
                why = same.trouble if same else "the device is gone, or its id is another device's now"
                return _left_alone(command, why)
            if _is_served(same):
                if by := await self._served_by(same, command, ending, over=over):
                    return by
            elif ending.done() and ending.result().status != 0 and not await self._openers(same):
                return await self._failed(seen, command, ending, "")
            elif over:
                return await self._failed(seen, command, ending, f"not served after {rule.timeout:g} s")
            await asyncio.wait([ending], timeout=min(glance, max(until - self._judge.clock(), 0.0)))
            if ending.done():
                await asyncio.sleep(glance)
            glance = min(glance * 1.5, _LONGEST_GLANCE)

    async def _glance(self, seen: Observation) -> Observation | None:
        now = await self._kernel.observe([seen.dev_id])
        return next((one for one in now if one.identity == seen.identity), None)

    async def _served_by(
        self, seen: Observation, command: Command, ending: asyncio.Future[Ended], *, over: bool
    ) -> _Result | None:
        """Who has brought it back; None: the command may still be about to say so.

        The command is ended only where somebody else is seen to serve: what cannot be seen may be its own server.
        """
        facts = _facts(ending)
        if await command.has_open(seen.dev_id) or (ending.done() and ending.result().status == 0):
            command.keep()
            return _Result(Outcome.RECOVERED, "", facts)
        if not ending.done() and not over:
            return None
        if others := await self._openers(seen):
            left = await command.end()
            return _Result(Outcome.RECOVERED_BY_ANOTHER, f"by {others[0]}, not by the command{_after(left)}", facts)
        command.keep()
        return _Result(Outcome.RECOVERED, "who serves it cannot be seen", facts)

    async def _openers(self, seen: Observation) -> tuple[Server, ...]:
        usage = await self._kernel.look_for_users([seen], {seen.dev_id: seen.disk.rdevs if seen.disk else frozenset()})
        found = usage.get(seen.dev_id)
        return found.char_openers if found else ()

    async def _failed(self, seen: Observation, command: Command, ending: asyncio.Future[Ended], what: str) -> _Result:
        """End it, and see to it that it is no server by now: one may serve at the last moment."""
        facts = _facts(ending)
        how = _how_it_ended(ending.result()) if ending.done() else "the command was still running"
        end = asyncio.ensure_future(command.end())
        while not end.done():
            await asyncio.wait([end], timeout=_FIRST_GLANCE)
            now = await self._glance(seen)
            if not end.done() and now and _is_served(now):
                command.keep()  # at once, since it is being ended; whose server it is comes after that
                end.cancel()
                by = await self._served_by(now, command, ending, over=True)
                return by or _Result(Outcome.RECOVERED, "", facts)
        left = end.result()
        reason = f"{what}: {how}{_after(left)}" if what else f"{how}{_after(left)}"
        return _Result(None, reason, facts, is_left_alone=bool(left))

    def _report(self, deed: Deed, began: float, gone: tuple[Judged, ...] = ()) -> None:
        self._reporter.passed(PassReport(began, deed.took, False, (), gone, (deed,), self._devices))


def _is_served(seen: Observation) -> bool:
    return seen.info is not None and seen.info.state == KernelState.LIVE and seen.disk is not None


def _left_alone(command: Command, why: str) -> _Result:
    command.leave()
    return _Result(None, f"{why}; the command is left to itself until its time is over", {}, is_left_alone=True)


def _after_attempt(trail: Trail, result: _Result, now: float, pause: float) -> Trail:
    if result.outcome:
        return trail.succeeded(now, pause)
    if result.is_left_alone:
        return trail.left_alone(result.detail, now, pause)
    return trail.failed(result.detail, now, pause)


def _facts(ending: asyncio.Future[Ended]) -> dict[str, Any]:
    if not ending.done():
        return {"status": None, "output": ""}
    return {"status": ending.result().status, "output": ending.result().output}


def _how_it_ended(ended: Ended) -> str:
    if ended.status is None:
        return ended.trouble or "the command's end was not seen"
    how = (
        f"the command exited with {ended.status}" if ended.status >= 0 else f"signal {-ended.status} ended the command"
    )
    last = ended.output.strip().rpartition("\n")[2]
    return f"{how}, saying: {printable(last, 160)}" if last else how


def _after(left: str) -> str:
    return f"; {left}" if left else ""
