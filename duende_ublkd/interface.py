"""What a ublk server calls for its own start-up: plain synchronous calls, with the care that the daemon takes.

Nothing here decides or destroys: a call lets the daemon's own reconciler look, judge and act, once, and translates what
came of it. So a device that is served, being set up, being recovered, held or not understood is not touched, by
whatever call; the error or the result says why. A running daemon is no obstacle: whoever claims a device first acts.

Rules:
1. A call is a guest. Its event loop, its ring and its threads are its own, so that it works in a thread whose asyncio
   loop runs (and blocks that loop meanwhile: `asyncio.to_thread` keeps it going). They are gone, with every descriptor,
   when it returns. The exception is a command that the kernel does not answer: a thread waits in the kernel for it.
2. A UblkControl owns nothing between two calls: no descriptor, no thread, no memory of a device. It may be shared by
   threads, and used on both sides of a fork. A process that forks while another thread is in a call hands that call's
   descriptors to its child, and with them, perhaps, a claim on a device.
3. A call ends: each command has its deadline, each wait its bound. A call that is interrupted (KeyboardInterrupt, or
   what a signal handler raises) lets a deletion that is under way finish, for FINISH_FOR seconds at most, begins nothing
   more, and passes the interruption on.
4. What is done to a device is logged, before (INFO) and after (WARNING), by the logger `duende_ublkd`.
5. Only `stop_device` and `force_delete` start a process, and only for a device that has to be stopped: the STOP_DEV may
   sleep for ever, and does so in a child of `sys.executable` then. A caller that reaps every child may meet its pid.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Self, TypeVar

from duende_ublkd.core.config import MAX_DEV_ID, Config, DaemonConfig, OnOrphan, OnUnserved, Policy
from duende_ublkd.core.errors import (
    BusyError,
    CommandOverdueError,
    DuendeError,
    HeldError,
    NoSuchDeviceError,
    UsageError,
)
from duende_ublkd.core.model import Outcome, VerdictKind
from duende_ublkd.kernel import memory
from duende_ublkd.kernel.control import DEADLINE, Control, open_control_device
from duende_ublkd.kernel.holders import is_gone
from duende_ublkd.kernel.ring import Ring
from duende_ublkd.once import ask_daemon, is_left, settle
from duende_ublkd.parts import FINISH_FOR, Parts, read_config
from duende_ublkd.report.journal import Journal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Coroutine

    from duende_ublkd.core.model import Deed, DevInfo, Judged, PassReport

_T = TypeVar("_T")

_MOST_TRIES = 3
"""Of a stop: its children are only just started, and a cold or busy machine may have none ready for the first order."""
_LONGEST_DEADLINE = 600.0
_GONE_IN = 1.0  # seconds for a thread to end; microseconds are normal
_REAPED_IN = 5.0  # seconds for a nursery to end, which has to start first if it was hardly begun
_GIVE_UP_FOR = FINISH_FOR + _REAPED_IN + 3.0  # seconds for an interrupted call to give everything back
_GLANCE = 0.0005
_BUSY = (VerdictKind.LIVE, VerdictKind.STARTING, VerdictKind.RECOVERING, VerdictKind.CLOSING)
_NOT_TOLD_TO_STOP = "deadline-over"  # the policy's rule for a device without a server, where it does not say "delete"
_MOST_NAMED = 3  # holders in a sentence


class OnHoldError(DuendeError):
    """Somebody has put the device on hold (`duende-ublkd hold`): hands off until it is released, or its time is over."""


class Finding(NamedTuple):
    """One device and what it was judged to be. `reason`: one printable sentence with the evidence."""

    dev_id: int
    verdict: VerdictKind
    reason: str


@dataclass(frozen=True, slots=True)
class Cleanup:
    """What came of a clean-up. `left` and `would_clean` empty means: nothing orphaned is there any more.

    `left`: what is orphaned, pinned, closing, wedged or unknown; of ids that were named, also what is starting.
    """

    cleaned: tuple[int, ...] = ()  # deleted, and their ids are free
    left: tuple[Finding, ...] = ()
    would_clean: tuple[int, ...] = ()  # dry run


class UblkControl:
    """Commands on the devices of one's own. What each method does with a device that is in use: nothing."""

    def __init__(self, deadline: float = DEADLINE) -> None:
        """`open` also asks whether the driver is there. `deadline`: seconds for each command of the kernel's."""
        if not 0 < deadline <= _LONGEST_DEADLINE:  # also NaN
            raise UsageError(
                f"a deadline of {deadline} s is not between 0 and {_LONGEST_DEADLINE:g} s", hint="deadline=10.0"
            )
        self._deadline = float(deadline)
        self._is_closed = False

    @classmethod
    def open(cls, *, deadline: float = DEADLINE) -> Self:
        """Ask the driver for its features (GET_FEATURES; ublk_ctrl_get_features, 6.5), and so whether it is there.

        KernelUnavailableError: no driver, no io_uring, or not permitted; its `hint` is what to type next.
        CommandOverdueError: it does not answer.
        """
        control = cls(deadline)
        control._ask(lambda asked: asked.features())
        return control

    def close(self) -> None:
        """Calls after this raise RuntimeError. There is nothing to give back."""
        self._is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get_device_info(self, dev_id: int) -> DevInfo:
        """The kernel's record of a device: GET_DEV_INFO (ublk_ctrl_get_dev_info, 6.0), which takes no lock.

        `state` is one of KernelState, `flags` are Feature bits, `max_io_bytes` bytes, `server_pid` a hint (-1: none).
        DEAD is also what a device is that was added and not started. An unprivileged one is asked about by its node's
        path (GET_DEV_INFO2; ublk_ctrl_uring_cmd_permission, 6.5).

        NoSuchDeviceError: the id is free. CommandOverdueError, KernelUnavailableError, CommandError as they say.
        """
        checked = _checked(dev_id)
        return self._ask(lambda control: control.get_device_info(checked))

    def stop_device(self, dev_id: int) -> None:
        """Stop a device that waits for a server and has none: its waiting I/O fails, its disk goes, and it is DEAD.

        That is: QUIESCED (I/O waits) or, since 6.13, FAIL_IO (I/O fails), its char device not open, its disk not held
        by a mount, swap, dm, md, loop or open file, both seen twice, the second time with its char device claimed. The
        command is STOP_DEV (ublk_ctrl_stop_dev; del_gendisk), after TRY_STOP_DEV where the driver has it (7.0). Of a
        device that is DEAD and that nobody has open there is nothing to stop.

        NoSuchDeviceError: the id is free. BusyError: somebody serves it, sets it up or has taken it, and the error names
        who. HeldError: somebody holds its disk. OnHoldError: planned work. CommandOverdueError: STOP_DEV did not answer;
        it goes on in a child, and the device is wedged until it comes back. DuendeError: not everybody who may hold it
        could be seen, or the kernel refused.
        """
        wanted = Policy(orphaned=OnOrphan.ALERT, unserved=OnUnserved.DELETE, recovery_deadline=0.0)
        came_of_it = self._act(dev_id, wanted, one_shot=False)
        device = came_of_it.device
        if device is None:
            if Outcome.STOPPED not in came_of_it.outcomes:
                raise NoSuchDeviceError("STOP_DEV", dev_id, errno.ENODEV, "no such device")
            return
        if device.verdict.kind not in (VerdictKind.ORPHANED, VerdictKind.PINNED):
            raise came_of_it.refusal("STOP_DEV", device)

    def delete_device(self, dev_id: int) -> Outcome:
        """Delete a device that is one's own and DEAD, as `duende-ublkd clean --now ID`.

        The caller vouches that the id is its own, so that no grace is waited for; every other check stays: DEAD, no
        disk, nobody has its char device open, unchanged when looked at again with the char device claimed. The command
        is DEL_DEV_ASYNC (ublk_ctrl_del_dev, 6.9), DEL_DEV before and for an unprivileged device.

        DELETED: the id is free. ALREADY_GONE: it was, or somebody else was quicker. DELETED_STILL_HELD: deleted, and the
        id frees itself when whoever holds its old disk or node lets go. Errors as of `stop_device`; BusyError also for a
        device that waits for a server, which `force_delete` stops first.
        """
        return self._delete(dev_id, Policy(recovery_deadline=0.0), one_shot=True)

    def force_delete(self, dev_id: int) -> Outcome:
        """`stop_device`, if it waits for a server, and then `delete_device`; both with all their checks.

        The I/O that waits for the former server fails. Never a device that is served or held.
        """
        return self._delete(dev_id, Policy(unserved=OnUnserved.DELETE, recovery_deadline=0.0), one_shot=False)

    def _delete(self, dev_id: int, policy: Policy, *, one_shot: bool) -> Outcome:
        came_of_it = self._act(dev_id, policy, one_shot=one_shot)
        device, deleted = came_of_it.device, {Outcome.DELETED, Outcome.DELETED_STILL_HELD}
        if device is None:
            return Outcome.DELETED if came_of_it.outcomes & deleted else Outcome.ALREADY_GONE
        if device.seen.identity.sysfs_inode is None and device.verdict.kind in (
            VerdictKind.PINNED,
            VerdictKind.CLOSING,
        ):
            return Outcome.DELETED_STILL_HELD
        raise came_of_it.refusal("DEL_DEV", device)

    def _act(self, dev_id: int, policy: Policy, *, one_shot: bool) -> _CameOfIt:
        checked = _checked(dev_id)
        self._check_open()
        config = Config(daemon=DaemonConfig(command_deadline=self._deadline, lock_memory=False), policy=policy)

        async def act() -> _CameOfIt:
            deeds = _Deeds()
            async with _parts(config, deeds, without_grace=(checked,), one_shot=one_shot) as parts:
                await settle(parts, {checked}, act=True)
                came_of_it = _came_of_it(parts, checked, deeds)
                tries = 1 if one_shot else _MOST_TRIES
                while came_of_it.has_failed and (tries := tries - 1):
                    await asyncio.sleep(came_of_it.pause)
                    await settle(parts, {checked}, act=True)
                    came_of_it = _came_of_it(parts, checked, deeds)
                return came_of_it

        return _have_done(act, self._deadline)

    def _ask(self, question: Callable[[Control], Coroutine[Any, Any, _T]]) -> _T:
        self._check_open()

        async def ask() -> _T:
            os.close(open_control_device())
            ring = Ring(8)
            try:
                return await question(Control(ring, deadline=self._deadline))
            finally:
                await ring.close()

        return _have_done(ask, self._deadline)

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("this UblkControl is closed")


def detect_orphaned_devices(*, config: str | os.PathLike[str] | None = None) -> tuple[Finding, ...]:
    """The devices that are orphaned, lowest id first; nothing is touched. As `duende-ublkd list` judges them.

    Orphaned: DEAD, without a disk, open nowhere, and so for its grace; one whose age the look cannot tell is not
    believed to be older than the call. One on hold is among them, and its reason says so. `config`: a configuration's path;
    None: /etc/duende-ublkd/config.toml, or the defaults where that does not exist.

    KernelUnavailableError, ConfigError; DuendeError: nobody knows what is on hold.
    """
    chosen = _read_config(config)

    async def detect() -> tuple[Finding, ...]:
        async with _parts(chosen) as parts:
            await settle(parts, None, act=False)
            devices = parts.reconciler.devices.values()
            return tuple(_finding(each) for each in devices if each.verdict.kind is VerdictKind.ORPHANED)

    return _have_done(detect, chosen.daemon.command_deadline)


def cleanup_orphaned_devices(
    ids: Collection[int] | None = None,
    *,
    now: bool = False,
    dry_run: bool = False,
    config: str | os.PathLike[str] | None = None,
) -> Cleanup:
    """Delete orphaned devices, once, as `duende-ublkd clean` does: by the same configuration, with the same checks.

    `ids`: only these, and whatever the configuration says of orphans; None: all that it lets be deleted.
    `now`: these ids are the caller's own, so that their grace is not waited for.
    `dry_run`: change nothing. `config` as of `detect_orphaned_devices`, and so are the errors; UsageError: `now` without
    ids. A device that could not be deleted is no error: it is in `left`, with the reason.
    """
    if now and ids is None:
        raise UsageError("now=True takes the ids that are your own", hint="cleanup_orphaned_devices([3], now=True)")
    named = None if ids is None else {_checked(dev_id) for dev_id in ids}
    chosen = _read_config(config)
    if dry_run:
        chosen = replace(chosen, daemon=replace(chosen.daemon, dry_run=True))

    async def clean() -> Cleanup:
        deeds = _Deeds()
        own = tuple(named) if named and now else ()
        async with _parts(chosen, deeds, named=tuple(named or ()), without_grace=own) as parts:
            await settle(parts, named, act=True)
            return _cleanup(parts.reconciler.devices.values(), deeds.done, named=named is not None)

    return _have_done(clean, chosen.daemon.command_deadline)


def lock_memory(*, small_threads: bool = False) -> None:
    """Lock all memory of this process, now and to come, as a server has to that may serve swap: mlockall(2).

    Everything becomes resident: each thread's whole stack (8 MiB, as a rule) and what glibc reserves for its
    allocations, touched or not. `small_threads`: threads made from now on have stacks of 256 KiB and share one arena,
    which is too little for deep recursion; to be asked for before the first thread is made. A lock is not inherited by
    children. DuendeError: a limit keeps it from that, and `hint` says which.
    """
    if small_threads:
        memory.keep_threads_small()
    memory.lock_memory()


@contextlib.asynccontextmanager
async def _parts(
    config: Config,
    deeds: _Deeds | None = None,
    *,
    named: tuple[int, ...] = (),
    without_grace: tuple[int, ...] = (),
    one_shot: bool = True,
) -> AsyncIterator[Parts]:
    """The daemon's parts for one call, all of them given back."""
    os.close(open_control_device())
    parts = Parts(config, (deeds,) if deeds else (), named=named, without_grace=without_grace, one_shot=one_shot)
    ask_daemon(parts.reconciler)  # it knows what it is about to recover
    try:
        yield parts
    finally:
        nursery = parts.children.nursery_pid
        await parts.close()
        if nursery:
            _wait_until_reaped(nursery)
        parts.sweeper.join(_GONE_IN)


class _Deeds:
    """What was done; logged as the daemon does it."""

    def __init__(self) -> None:
        self.done: list[Deed] = []
        self._journal = Journal()

    def intends(self, device: Judged) -> None:
        """Before something is done to a device."""
        self._journal.intends(device)

    def passed(self, report: PassReport) -> None:
        """After a pass or a deed; verdicts are the caller's to tell."""
        self.done += report.deeds
        if report.is_deed:
            self._journal.passed(report)


def _came_of_it(parts: Parts, dev_id: int, deeds: _Deeds) -> _CameOfIt:
    now, history = time.monotonic(), parts.reconciler.ledger.get(dev_id)
    late, pause = None, 0.0
    if history:
        pause = max(history.paused_until - now, 0.0)
        if history.overdue:
            late = CommandOverdueError(history.overdue.command, dev_id, now - history.overdue.since)
    return _CameOfIt(parts.reconciler.devices.get(dev_id), tuple(deeds.done), late, pause)


@dataclass(frozen=True, slots=True)
class _CameOfIt:
    """One device after a call. `device` None: its id is free."""

    device: Judged | None
    deeds: tuple[Deed, ...]
    late: CommandOverdueError | None  # what did not answer
    pause: float  # seconds until another attempt

    @property
    def has_failed(self) -> bool:
        """The last attempt, for a reason that may be another one the next time."""
        return self.late is None and bool(self.deeds) and self.deeds[-1].outcome is None

    @property
    def outcomes(self) -> set[Outcome | None]:
        """Of everything that was done."""
        return {deed.outcome for deed in self.deeds}

    def refusal(self, command: str, device: Judged) -> DuendeError:
        """Why the command was not sent to it, or to no effect."""
        if self.late:
            return self.late
        dev_id, kind = device.seen.dev_id, device.verdict.kind
        why = f"not done, it is {kind.value}: {self._reason(device)}"
        error: DuendeError
        if device.hold and kind in (VerdictKind.ORPHANED, VerdictKind.UNSERVED, VerdictKind.PINNED):
            return OnHoldError(f"{command} on ublk{dev_id}: {why}", hint=f"duende-ublkd release {dev_id}")
        if kind in (VerdictKind.UNSERVED, VerdictKind.PINNED) and device.seen.usage and device.seen.usage.holders:
            error = HeldError(command, dev_id, errno.EBUSY, why)
        elif self._is_busy(device):
            error = BusyError(command, dev_id, errno.EBUSY, why)
        else:
            error = DuendeError(f"{command} on ublk{dev_id}: {why}")
        error.hint = f"duende-ublkd explain {dev_id}"
        if device.verdict.rule == _NOT_TOLD_TO_STOP:
            error.hint += f"  # UblkControl.force_delete({dev_id}) stops it first, and fails the I/O that waits"
        return error

    def _is_busy(self, device: Judged) -> bool:
        """Somebody has it, or may have it any moment; otherwise nobody knows, or the kernel did not do it."""
        if device.verdict.kind in _BUSY or device.verdict.rule == _NOT_TOLD_TO_STOP:
            return True
        return bool(self.deeds) and self.deeds[-1].outcome is Outcome.SPARED

    def _reason(self, device: Judged) -> str:
        """The verdict's, and what the last attempt met, unless the verdict tells that already."""
        if device.verdict.rule == _NOT_TOLD_TO_STOP and device.hold is None:
            users = device.seen.usage.holders[:_MOST_NAMED] if device.seen.usage else ()
            held = f"; held by {', '.join(map(str, users))}" if users else ""
            return f"{device.seen.state_name} without a server, and its disk is still there{held}"
        reason = device.verdict.reason
        last = self.deeds[-1].detail if self.deeds and self.deeds[-1].outcome in (None, Outcome.SPARED) else ""
        return reason if last in reason else f"{reason}; {last}"


def _cleanup(devices: Collection[Judged], deeds: list[Deed], *, named: bool) -> Cleanup:
    cleaned = tuple(deed.dev_id for deed in deeds if deed.outcome is Outcome.DELETED)
    would = {deed.dev_id for deed in deeds if deed.outcome is Outcome.WOULD_DELETE}
    left = [each for each in devices if is_left(each, named=named) and each.seen.dev_id not in would]
    return Cleanup(cleaned, tuple(_finding(each) for each in left), tuple(sorted(would)))


def _finding(device: Judged) -> Finding:
    return Finding(device.seen.dev_id, device.verdict.kind, device.verdict.reason)


def _read_config(path: str | os.PathLike[str] | None) -> Config:
    return read_config(None if path is None else os.fspath(path))


def _checked(dev_id: int) -> int:
    """-1, the kernel's word for any id, is none."""
    if isinstance(dev_id, bool) or not isinstance(dev_id, int) or not 0 <= dev_id <= MAX_DEV_ID:
        raise UsageError(f"{dev_id!r} is not the id of a ublk device (0 to {MAX_DEV_ID})", hint="duende-ublkd list")
    return dev_id


# --- a call, in a loop and a thread of its own


class _Call(Generic[_T]):
    """One coroutine with an event loop and a thread of its own, while the caller waits."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> None:
        self._work = work
        self._thread = threading.Thread(target=self._run, name="duende-ublkd", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._is_given_up = False
        self._is_over = threading.Event()
        self._results: list[_T] = []
        self._error: BaseException | None = None

    def start(self) -> None:
        """DuendeError: there is no thread to be had."""
        try:
            self._thread.start()
        except RuntimeError as error:
            self._is_over.set()
            raise DuendeError("no thread can be started", hint="look at: ulimit -u; ulimit -v; free -m") from error

    def wait(self, limit: float) -> None:
        """Until it is over and its thread is gone. DuendeError: the limit is, which what has a deadline never meets."""
        if not self._is_over.wait(limit):
            raise DuendeError(
                f"the call has not come to its end for {limit:g} s", hint="look for what it waits for: dmesg"
            )
        is_gone(self._thread, _GONE_IN)

    def give_up(self) -> None:
        """Have it end, and wait for that; it gives everything back first."""
        self._is_given_up = True
        if self._loop and self._task:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it is over
                self._loop.call_soon_threadsafe(self._task.cancel)
        if self._is_over.wait(_GIVE_UP_FOR):
            is_gone(self._thread, _GONE_IN)

    def result(self) -> _T:
        """Of a call that is over."""
        if self._error:
            raise self._error
        return self._results[0]

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                self._results.append(runner.run(self._main()))
        except BaseException as error:  # noqa: BLE001 - whatever it was, the caller gets it
            self._error = error
        finally:
            self._is_over.set()

    async def _main(self) -> _T:
        # In this order: whoever gives it up sets the flag first and looks for the loop then, so one of both is seen.
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        if self._is_given_up:
            raise asyncio.CancelledError
        return await self._work()


def _have_done(work: Callable[[], Coroutine[Any, Any, _T]], deadline: float) -> _T:
    """Run it in a thread of its own and wait for it. `deadline`: of each command."""
    call = _Call(work)
    try:
        call.start()
        # Each command of the longest call (look, stop, look, delete, confirm) at its deadline, every wait at its bound.
        call.wait(10 * deadline + 60)
    except BaseException:
        call.give_up()
        raise
    return call.result()


def _wait_until_reaped(pid: int) -> None:
    """Of a nursery that was told to end: one that was still starting then takes a while to hear of it."""
    until = time.monotonic() + _REAPED_IN
    with contextlib.suppress(ChildProcessError):  # it has been reaped
        while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < until:
            time.sleep(_GLANCE)
