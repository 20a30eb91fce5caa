"""A ublk driver in memory, servers to go with it, and an event loop whose time passes only when nobody has work left.

It does what ublk_drv was seen doing, the unpleasant things included: an added device is DEAD like a dead one, a death is
noticed late, ids are reused at once, pids are recycled, a deleted device keeps its id for as long as it is held. It keeps
its own list of `violations`: what a reaper did to a device that somebody was using. tests/kernel_contract.py holds it to
the same clauses as the real driver.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import selectors
from collections import Counter
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

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
    UnsupportedError,
)
from duende_ublkd.core.model import (
    DevInfo,
    Disk,
    DriverFacts,
    Feature,
    Holder,
    Identity,
    KernelState,
    Observation,
    Server,
    Usage,
)
from duende_ublkd.core.model import Process as Hand
from duende_ublkd.core.policy import Traits
from duende_ublkd.kernel import abi
from duende_ublkd.kernel.control import why_no_control_device

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping

    from duende_ublkd.core.config import Recovery

T = TypeVar("T")
Rdevs = frozenset[tuple[int, int]]

CHAR_MAJOR = 240
BLOCK_MAJOR = 259
SWEPT = 64  # ids that a full look asks about, known or not
DEADLINE = 10.0  # of a control command
FORMER_DEADLINE = 2.0  # seconds that a new recovery command waits for the end of a former one
TERM_GRACE = 2.0  # from SIGTERM to SIGKILL
KILL_TAKES = 3.0  # seconds of SIGKILL until it is said that somebody does not die
GLANCES = 0.03  # seconds that may lie between two looks at a device whose command is being ended


# --- time -------------------------------------------------------------------------------------------------------------


class _Skipping(selectors.SelectSelector):
    """Where a loop would wait for the time to come, the time comes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("everybody waits, and nothing will ever happen")
        self.now += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which minutes take microseconds."""

    def __init__(self) -> None:
        self._skipping = _Skipping()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.now


def run(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run() in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


# --- the inhabitants --------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Process:
    """Somebody who serves, or merely opens. `visible` False: no sweep over /proc shows what it has open."""

    pid: int
    comm: str = "ublk.test"
    alive: bool = True
    visible: bool = True
    has_ring: bool | None = None

    def as_seen(self) -> Server:
        name = self.comm if self.alive else ""
        return Server(
            self.pid, alive=self.alive, comm=name, exe=f"/usr/bin/{name}" if name else "", has_ring=self.has_ring
        )


@dataclass(eq=False)
class Instance:
    """One device from its ADD_DEV until its id is free."""

    dev_id: int
    inode: int
    flags: int
    added_at: float
    adder: Process
    state: int = KernelState.DEAD
    pid: int = -1
    disk: Disk | None = None
    listed: bool = True  # in /sys and /dev, until it is deleted
    has_node: bool = True
    openers: list[Process] = field(default_factory=list)
    holders: list[Holder] = field(default_factory=list)
    hidden_holder: bool = False  # of its disk; no sweep shows it, and the kernel knows
    unserved_since: float | None = None
    served_since: float | None = None  # by whoever finished the last recovery
    opened_at: float = 0.0
    claimed: bool = False
    releasing_until: float = 0.0  # the kernel clears UB_STATE_OPEN some time after the last close (6.15)
    started: bool = False
    left_at: float | None = None  # a living server closed it, and may be about to delete it
    overdue: str = ""  # the command on it that has not answered
    hand: Hand | None = None  # the child of a daemon that has sent it
    answer_is_heard: bool = True  # whoever sent it is still there

    @property
    def freeable(self) -> bool:
        return not (self.listed or self.openers or self.holders or self.claimed)

    def __repr__(self) -> str:
        return f"<ublk{self.dev_id} #{self.inode} {KernelState.name(self.state)}{'' if self.listed else ' deleted'}>"


class Fault(Enum):
    """What the next deletion of an id meets."""

    REFUSED = "refused"  # the kernel says EIO
    STOP_OVERDUE = "stop overdue"  # so does the stop before it
    OVERDUE = "overdue"  # no answer by the deadline; see FakeKernel.answer
    ALREADY_DONE = "already done"  # somebody else's deletion came first
    DEFECT = "defect"  # a bug of ours


class Step(Enum):
    """Where the kernel can answer with an error: whatever the daemon asks of it."""

    CONTROL_DEVICE = "the open of /dev/ublk-control"  # for whichever command it was
    GET_FEATURES = "GET_FEATURES"
    LIST = "the listing of sysfs"
    GET_DEV_INFO = "GET_DEV_INFO"
    SYSFS = "a look into sysfs"
    PROC = "the sweep over /proc"
    CHAR_DEVICE = "the open of /dev/ublkcN"
    STOP = "STOP_DEV"
    DELETE = "DEL_DEV or DEL_DEV_ASYNC"
    CHILD = "a recovery command's start"


ERRNOS = (*sorted(errno.errorcode), abi.ENOTSUPP)
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ENODEV)  # what sysfs says of a device that is not there
_NO_DRIVER = (errno.ENOENT, errno.ENXIO, errno.ENODEV)


@dataclass
class Error:
    """What a step answers, the next `times`. `works`: it does what it was asked for all the same."""

    number: int
    times: float = math.inf
    works: bool = False


# --- the driver -------------------------------------------------------------------------------------------------------


class FakeKernel:
    """`reconcile.Kernel` for the daemon; the world's own doings for the test.

    `settles_in`: seconds until the kernel has noticed a death. `disk_goes_first`: meanwhile the disk is gone already.
    `hint`: called with an id whenever the real kernel would say something; `hints_lost` makes it silent.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, *, traits: Traits | None = None, settles_in: float = 0.05
    ) -> None:
        self._loop = loop
        self.traits = traits or Traits()
        self.ability = self.traits  # what it really can; `traits` is what is believed of it
        self.settles_in = settles_in
        self.disk_goes_first = True
        self.release_takes = 0.003
        self.latency = 0.001  # seconds, of each look and each command
        self.deletion_takes: dict[int, float] = {}
        self.hint: Callable[[int], None] = lambda _dev_id: None
        self.on_late: Callable[[str, int], None] = lambda _command, _dev_id: None
        self.hints_lost = False
        self.unavailable = False
        self.descriptors_left = True
        self.looks_are_overdue = False
        self.sees_everything = True  # a sweep over /proc is complete
        self.clock_was_set = False  # the age of a node cannot be told
        self.nodes_are_older_by = 0.0  # seconds, than their devices
        self.setup_grace = 60.0  # promised to a server between ADD_DEV and open
        self.orphan_grace = 0.5  # promised to a server between close and DEL_DEV
        self.recovery_deadline: float | None = None  # promised to a new server; None: for ever
        self.commands: list[FakeCommand] = []  # recovery commands, in order
        self.on_command: Callable[[FakeCommand], None] = FakeCommand.serve  # what such a command does
        self.child_takes = 0.0  # seconds until a child has taken an order; then it is asked whether it may go
        self.off_limits: dict[int, float] = {}  # ids on hold, and until when: nothing may be done to them
        self.unanswered: set[int] = set()  # ids whose GET_DEV_INFO misses its deadline
        self.asked: Counter[int] = Counter()  # how often each id was looked at
        self.troubles: dict[int, str] = {}  # ids whose GET_DEV_INFO gives no answer, and why
        self.faults: dict[int, Fault] = {}
        self.errors: dict[Step, Error] = {}
        self.deletions_sent: Counter[int] = Counter()  # commands, by id
        self.taken: dict[int, Instance] = {}
        self.processes: dict[int, Process] = {}
        self.deletions: list[Instance] = []  # by the reaper, in order
        self.stops: list[Instance] = []  # of devices without a server, by the reaper
        self.looks = 0
        self.violations: list[str] = []
        self._inodes = 14_000
        self._pids = 4_000
        self._diskseq = 0
        self._orders: list[FakeCommand] = []  # given, and not taken yet

    # What the daemon asks

    async def driver(self) -> DriverFacts:
        await self._pass_time()
        self._insist_on_driver()
        self._open_control_device()
        if self.looks_are_overdue:
            raise CommandOverdueError("GET_FEATURES", None, DEADLINE)
        if (error := self._error_at(Step.GET_FEATURES)) and error.number not in _NO_FEATURES:
            raise abi.error_of(abi.Command.GET_FEATURES, None, -error.number)
        return DriverFacts()

    def candidates(self, known: Collection[int]) -> set[int]:
        if not self.descriptors_left:
            raise OSError(errno.EMFILE, "Too many open files")
        if (error := self._error_at(Step.LIST)) and error.number != errno.ENOENT:
            raise _os_error(error)
        listed = (dev_id for dev_id, instance in self.taken.items() if instance.listed)
        return {*listed, *known, *range(SWEPT)}

    async def observe(self, dev_ids: Collection[int]) -> list[Observation]:
        await self._pass_time()
        self._insist_on_driver()
        self._open_control_device()
        self.looks += 1
        self.asked.update(dev_ids)
        seen = [one for dev_id in sorted(dev_ids) if (one := self._ask(dev_id))]
        if (error := self._error_at(Step.SYSFS)) and error.number not in _GONE:
            raise _os_error(error)
        await self._pass_time()
        return seen

    async def look_for_users(self, seen: Collection[Observation], _remembered: Mapping[int, Rdevs]) -> dict[int, Usage]:
        await self._pass_time()
        if error := self._error_at(Step.PROC):
            raise _os_error(error)
        return {each.dev_id: self._usage(each.dev_id) for each in seen}

    async def look_for_stuck(self) -> tuple[str, ...]:
        await self._pass_time()
        return tuple(f"somebody in {each.overdue}" for each in self.taken.values() if each.overdue)

    @contextlib.contextmanager
    def claim(self, seen: Observation) -> Iterator[FakeClaim]:
        self._insist_on_driver()
        if error := self._error_at(Step.CHAR_DEVICE):
            raise _why_not_open(seen.dev_id, error)
        claim = FakeClaim(self, self._open_exclusively(seen))
        try:
            yield claim
        finally:
            claim.release()

    async def run_command(
        self,
        seen: Observation,
        argv: tuple[str, ...],
        environment: Mapping[str, str],
        rule: Recovery,
        may_go: Callable[[], bool],
    ) -> FakeCommand:
        if error := self._error_at(Step.CHILD):
            raise _os_error(error)
        until = self._loop.time() + FORMER_DEADLINE
        while former := next((each for each in self._commands_for(seen.dev_id) if each.is_under_way), None):
            if self._loop.time() >= until:
                what = f"the former recovery command of ublk{seen.dev_id} (pid {former.process.pid}) still runs"
                raise DuendeError(what, hint="look at: ps")
            await asyncio.sleep(0.1)
        command = FakeCommand(self, seen.dev_id, argv, dict(environment), rule.timeout)
        self._orders.append(command)
        self._loop.call_later(self.child_takes, self._take_order, command, may_go)
        return command

    def lose_daemon(self) -> None:
        """Its orders are not taken any more, supervisors keep to the limits of their commands, no late answer is heard."""
        for command in (*self._orders, *self.commands):
            command.abandon()
        for instance in self.taken.values():
            if not instance.hand:
                instance.overdue = ""
            instance.answer_is_heard = not instance.overdue

    def watch_former(self, dev_id: int, hand: Hand) -> bool:
        """A new daemon listens for the end of a former one's hand; False: it is over."""
        instance = self.taken.get(dev_id)
        if instance is None or instance.hand != hand:
            return False
        instance.answer_is_heard = True
        return True

    # What happens in the world

    def process(self, comm: str = "ublk.test", *, visible: bool = True) -> Process:
        self._pids += 1
        self.processes[self._pids] = Process(self._pids, comm, visible=visible)
        return self.processes[self._pids]

    def add(
        self, process: Process | None = None, *, dev_id: int = -1, flags: int = 0, state: int = KernelState.DEAD
    ) -> Instance:
        """ADD_DEV. `state`: what some kernels copy from the caller, garbage or not."""
        if dev_id < 0:
            dev_id = next(free for free in range(1 << 20) if free not in self.taken)
        if dev_id in self.taken:
            raise CommandError("ADD_DEV", dev_id, errno.EEXIST, "the id is taken")
        self._inodes += 2
        instance = Instance(dev_id, self._inodes, flags, self._loop.time(), process or self.process(), state)
        self.taken[dev_id] = instance
        self._tell(instance)
        return instance

    def open(self, instance: Instance, process: Process | None = None) -> None:
        """A server opens the char device, exclusively."""
        if not instance.listed:
            raise NoSuchDeviceError("open", instance.dev_id, errno.ENOENT, "deleted")
        if self.is_busy(instance):
            raise BusyError("open", instance.dev_id, errno.EBUSY, "somebody has it")
        instance.openers.append(process or instance.adder)
        instance.left_at, instance.opened_at = None, self._loop.time()
        self._tell(instance)

    def is_busy(self, instance: Instance) -> bool:
        return bool(instance.openers) or instance.claimed or self._loop.time() < instance.releasing_until

    def share(self, instance: Instance, process: Process) -> None:
        """The open file reaches another process: by fork, or over a socket."""
        instance.openers.append(process)

    def start(self, instance: Instance, *, disk_later: bool = False) -> None:
        """START_DEV by who has it open. `disk_later`: as seen between LIVE and add_disk()."""
        assert instance.openers
        assert not instance.started
        instance.state, instance.pid, instance.started = KernelState.LIVE, instance.openers[0].pid, True
        if not disk_later:
            self.show_disk(instance)

    def show_disk(self, instance: Instance) -> None:
        self._diskseq += 1
        instance.disk = Disk((BLOCK_MAJOR, instance.dev_id * 16), self._diskseq)
        self._tell(instance)

    def serve(self, process: Process | None = None, *, dev_id: int = -1, flags: int = 0) -> Instance:
        """ADD_DEV, open and START_DEV at once."""
        instance = self.add(process, dev_id=dev_id, flags=flags)
        self.open(instance)
        self.start(instance)
        return instance

    def kill(self, process: Process) -> None:
        """A process dies; the kernel takes its time to notice."""
        process.alive = False
        for instance in list(self.taken.values()):
            if process in instance.openers:
                instance.openers.remove(process)
                self._notice_close(instance)

    def close(self, instance: Instance, process: Process) -> None:
        """A process closes the char device and lives on."""
        instance.openers.remove(process)
        if process.visible and not self.hints_lost:  # what nobody can see asks for no grace
            instance.left_at = self._loop.time()
        self._notice_close(instance)

    def stop(self, instance: Instance) -> None:
        """STOP_DEV by its server or its administrator, who wait behind a STOP_DEV that hangs (ub->mutex)."""
        if instance.overdue == "STOP_DEV":
            return
        instance.state, instance.pid, instance.disk = KernelState.DEAD, -1, None
        self._tell(instance)

    def delete(self, instance: Instance) -> None:
        """DEL_DEV_ASYNC by its server or its administrator, who wait behind a STOP_DEV that hangs (ub->mutex)."""
        if instance.overdue == "STOP_DEV":
            return
        instance.state, instance.pid, instance.disk = KernelState.DEAD, -1, None
        instance.listed = instance.has_node = False
        self._tell(instance)
        self._free_if_unused(instance)

    def recover(self, instance: Instance, process: Process) -> None:
        """START_USER_RECOVERY and open by a second server; state and pid do not change."""
        if instance.state not in (KernelState.QUIESCED, KernelState.FAIL_IO):
            raise BusyError("START_USER_RECOVERY", instance.dev_id, errno.EBUSY, "not to be recovered")
        self.open(instance, process)

    def finish_recovery(self, instance: Instance) -> None:
        """END_USER_RECOVERY: the same disk again."""
        instance.state, instance.pid = KernelState.LIVE, instance.openers[0].pid
        instance.served_since = self._loop.time()

    def hold(self, instance: Instance, holder: Holder) -> None:
        """Somebody mounts, swaps on, or opens the disk."""
        assert instance.disk
        instance.holders.append(holder)

    def let_go(self, instance: Instance) -> None:
        """Every holder lets go; freeing an id says nothing to anybody."""
        instance.holders.clear()
        self._free_if_unused(instance)

    def recycle(self, pid: int) -> Process:
        """Somebody else's process gets the number of a dead one."""
        self.processes[pid] = Process(pid, "cron")
        return self.processes[pid]

    def answer(self, instance: Instance, *, works: bool) -> None:
        """The overdue command on a device answers after all, having done its work or not."""
        command, instance.overdue, instance.hand = instance.overdue, "", None
        if command == "STOP_DEV" and works:
            self.stop(instance)
            works = False
        if works and instance.listed:
            self._take_away(instance)
        if instance.answer_is_heard:
            self.on_late(command, instance.dev_id)

    # Behind the face

    async def _pass_time(self) -> None:
        await asyncio.sleep(self.latency)

    def _insist_on_driver(self) -> None:
        if self.unavailable:
            raise KernelUnavailableError("/dev/ublk-control is missing: the ublk driver is not loaded")

    def _error_at(self, step: Step) -> Error | None:
        error = self.errors.get(step)
        if error:
            error.times -= 1
            if error.times <= 0:
                del self.errors[step]
        return error

    def _open_control_device(self) -> None:
        if error := self._error_at(Step.CONTROL_DEVICE):
            message, hint = why_no_control_device(abi.CONTROL_DEVICE, error.number, "6.12", 0)
            raise KernelUnavailableError(message, hint=hint, no_driver=error.number in _NO_DRIVER)

    def _ask(self, dev_id: int) -> Observation | None:
        """As UblkKernel does, whose rules for an error these are; what is not there may be asked about in vain too."""
        instance = self.taken.get(dev_id)
        error = self._error_at(Step.GET_DEV_INFO)
        if error is None:
            return self._see(instance) if instance else None
        if error.number == errno.EPERM:
            raise KernelUnavailableError(f"the kernel refuses to tell of ublk{dev_id}")
        listed = instance is not None and instance.listed
        if error.number == errno.ENODEV and not listed:
            return None
        trouble = str(abi.error_of(abi.Command.GET_DEV_INFO, dev_id, -error.number))
        if error.number == errno.ENODEV:
            return Observation(
                dev_id, self._loop.time(), None, Identity(None), trouble="it is another one at each look"
            )
        if error.number == errno.ENOENT and not listed:
            trouble = ""
        if instance:
            return replace(self._see(instance), info=None, server=None, trouble=trouble)
        return Observation(dev_id, self._loop.time(), None, Identity(None), trouble=trouble)

    def _tell(self, instance: Instance) -> None:
        if not self.hints_lost:
            self.hint(instance.dev_id)

    def _identity(self, instance: Instance) -> Identity:
        if not instance.listed:
            return Identity(None)
        return Identity(instance.inode, (CHAR_MAJOR, instance.dev_id))

    def _see(self, instance: Instance) -> Observation:
        now, dev_id = self._loop.time(), instance.dev_id
        trouble = self.troubles.get(dev_id, "") or ("no answer" if dev_id in self.unanswered else "")
        unseen = not instance.listed and bool(instance.flags & Feature.UNPRIVILEGED_DEV)  # asked about by path only
        info = DevInfo(dev_id, instance.state, instance.pid, instance.flags, queues=1, queue_depth=128)
        process = self.processes.get(instance.pid)
        return Observation(
            dev_id,
            now,
            None if trouble or unseen else info,
            self._identity(instance),
            f"/dev/ublkc{dev_id}" if instance.has_node else None,
            instance.disk,
            process.as_seen() if process and not trouble else None,
            age=now - instance.added_at + self.nodes_are_older_by
            if instance.has_node and not self.clock_was_set
            else None,
            trouble=trouble,
            had_disk=instance.started and not self.hints_lost,
            overdue="GET_DEV_INFO" if dev_id in self.unanswered else "",
        )

    def _usage(self, dev_id: int) -> Usage:
        instance = self.taken.get(dev_id)
        if instance is None:
            return Usage(complete=self.sees_everything)
        openers = tuple(process.as_seen() for process in instance.openers if process.visible)
        return Usage(openers, tuple(instance.holders), self.sees_everything)

    def _notice_close(self, instance: Instance) -> None:
        self._tell(instance)
        if instance.openers:
            return
        now = self._loop.time()
        if instance.state == KernelState.LIVE:
            instance.releasing_until = now + self.settles_in + self.release_takes
            if self.disk_goes_first and not instance.flags & Feature.USER_RECOVERY:
                instance.disk = None
            self._loop.call_later(self.settles_in, self._settle, instance)
        else:
            instance.releasing_until = now + self.release_takes
        self._free_if_unused(instance)

    def _settle(self, instance: Instance) -> None:
        """What the kernel makes of a device whose server is gone. QUIESCED sends no event."""
        if instance.state != KernelState.LIVE or instance.openers:
            return
        instance.unserved_since = self._loop.time()
        if instance.flags & Feature.USER_RECOVERY_FAIL_IO:
            instance.state = KernelState.FAIL_IO
        elif instance.flags & Feature.USER_RECOVERY:
            instance.state = KernelState.QUIESCED
        else:
            self.stop(instance)

    def _open_exclusively(self, seen: Observation) -> Instance:
        instance = self.taken.get(seen.dev_id)
        if instance is None or not instance.has_node:
            raise NoSuchDeviceError("open", seen.dev_id, errno.ENODEV, "its char device is gone")
        if self.is_busy(instance):
            raise BusyError("open", seen.dev_id, errno.EBUSY, "somebody has its char device open")
        if self._identity(instance) != seen.identity:
            raise NoSuchDeviceError("open", seen.dev_id, errno.ENODEV, "its id belongs to another device now")
        if instance.state not in (KernelState.QUIESCED, KernelState.FAIL_IO):
            self._condemn("claimed", instance)
        instance.claimed = True
        return instance

    def _commands_for(self, dev_id: int) -> list[FakeCommand]:
        return [each for each in (*self._orders, *self.commands) if each.dev_id == dev_id]

    def _take_order(self, command: FakeCommand, may_go: Callable[[], bool]) -> None:
        self._orders.remove(command)
        if not command.is_known or not may_go():
            command.fail_to_start("not done: it is on hold now", NotDoneError)
            return
        self._insist_on_need(command.dev_id)
        command.begin()
        self.commands.append(command)
        self.on_command(command)

    def _insist_on_need(self, dev_id: int) -> None:
        """A recovery command may be run for a device without a server, one at a time, and for none on hold."""
        now, instance = self._loop.time(), self.taken.get(dev_id)
        just_now = now - 3 * self.latency - self.child_takes  # since the last look at it
        reasons = {
            "another one runs": any(each.is_in_the_way for each in self._commands_for(dev_id)),
            "it is on hold": now < self.off_limits.get(dev_id, 0.0),
            "it is served": instance is not None
            and any(opener.visible for opener in instance.openers)
            and instance.opened_at < just_now,
        }
        self.violations += [f"{now}: a command for ublk{dev_id}, but {why}" for why, so in reasons.items() if so]

    def _condemn(self, deed: str, instance: Instance) -> None:
        """Take down whatever speaks against this deed."""
        now = self._loop.time()
        set_up_by = instance.added_at + self.setup_grace
        reasons = {
            f"open by {instance.openers}": bool(instance.openers),
            "its state": instance.state != KernelState.DEAD,
            "it has a disk": instance.disk is not None,
            f"its server has until {set_up_by} to open it": (
                not instance.started and instance.adder.alive and instance.left_at is None and now < set_up_by
            ),
            "its server may be about to delete it": (
                instance.left_at is not None and now < instance.left_at + self.orphan_grace
            ),
            f"{instance.overdue} on it has not answered": bool(instance.overdue),
            "it is on hold": deed != "claimed" and now < self.off_limits.get(instance.dev_id, 0.0),
        }
        self.violations += [f"{now}: {instance} {deed}, but {why}" for why, so in reasons.items() if so]

    def _take_away(self, instance: Instance) -> None:
        """The reaper's own deletion takes effect."""
        if self.taken.get(instance.dev_id) is not instance:
            self.violations.append(f"ublk{instance.dev_id} deleted, which was not the claimed {instance}")
        self.deletions.append(instance)
        self.delete(instance)

    def _free_if_unused(self, instance: Instance) -> None:
        if instance.freeable and self.taken.get(instance.dev_id) is instance:
            del self.taken[instance.dev_id]


# 6.1 takes GET_FEATURES for a command on a device and finds none; others do not know it.
_NO_FEATURES = (errno.ENODEV, errno.EOPNOTSUPP, abi.ENOTSUPP, errno.EINVAL)


def _os_error(error: Error) -> OSError:
    return OSError(error.number, os.strerror(error.number))


def _why_not_open(dev_id: int, error: Error) -> CommandError:
    meaning = os.strerror(error.number)
    if error.number == errno.EBUSY:
        return BusyError("open", dev_id, error.number, meaning)
    if error.number in _NO_DRIVER:
        return NoSuchDeviceError("open", dev_id, errno.ENODEV, meaning)
    return CommandError("open", dev_id, error.number, meaning)


def _why_not_stopped(dev_id: int, error: Error) -> CommandError:
    why = abi.error_of(abi.Command.STOP_DEV, dev_id, -error.number)
    return HeldError(why.command, dev_id, why.errno, why.meaning) if isinstance(why, BusyError) else why


class FakeClaim:
    """An exclusive open of /dev/ublkcN."""

    def __init__(self, kernel: FakeKernel, instance: Instance) -> None:
        self._kernel = kernel
        self._instance = instance
        self._released = False

    async def look_again(self) -> Observation | None:
        seen = await self._kernel.observe([self._instance.dev_id])
        return seen[0] if seen else None

    async def stop(self, _seen: Observation, may_go: Callable[[Hand | None], bool]) -> None:
        kernel, instance = self._kernel, self._instance
        was_held, was_swept = (
            bool(instance.holders),
            kernel.sees_everything,
        )  # what comes later meets the kernel's own lock
        await asyncio.sleep(kernel.child_takes)
        hand = Hand(kernel.process("hand").pid, 1)
        if not may_go(None) or not may_go(hand):
            raise NotDoneError("not done: it is on hold now", hint="duende-ublkd release")
        now, deadline = kernel._loop.time(), kernel.recovery_deadline
        reasons = {
            "it is served": instance.state == KernelState.LIVE or bool(instance.openers),
            "it may wait for a server for ever": deadline is None,
            "it may still be recovered": (
                deadline is not None
                and instance.unserved_since is not None
                and now < instance.unserved_since + deadline
            ),
            "a sweep shows who holds it": was_held,
            "the sweep was not complete": not was_swept,
            "it is on hold": now < kernel.off_limits.get(instance.dev_id, 0.0),
            f"{instance.overdue} on it has not answered": bool(instance.overdue),
        }
        kernel.violations += [f"{now}: {instance} stopped, but {why}" for why, so in reasons.items() if so]
        if instance.hidden_holder or instance.holders:
            raise HeldError("STOP_DEV", instance.dev_id, errno.EBUSY, "its disk is in use")
        kernel._open_control_device()
        if error := kernel._error_at(Step.STOP):
            if error.works:
                kernel.stops.append(instance)
                kernel.stop(instance)
            raise _why_not_stopped(instance.dev_id, error)
        if kernel.faults.get(instance.dev_id) is Fault.STOP_OVERDUE:
            del kernel.faults[instance.dev_id]
            instance.hand = hand
            raise await self._miss_deadline("STOP_DEV")
        try:
            await asyncio.sleep(kernel.latency)
        finally:  # a hand does what it was told to, whatever becomes of its daemon
            kernel.stops.append(instance)
            kernel.stop(instance)

    async def delete(self, info: DevInfo) -> None:
        kernel, instance = self._kernel, self._instance
        if not info.unprivileged:
            kernel.traits = kernel.ability  # async deletion is tried, whatever is believed
        if info.unprivileged or not kernel.ability.async_delete:
            await self._delete_and_wait()
            return
        try:
            await self._send("DEL_DEV_ASYNC")
        except UnsupportedError:
            kernel.traits = replace(kernel.traits, async_delete=False)
            await self._delete_and_wait()
            return
        kernel._take_away(instance)
        self.release()

    def release(self) -> None:
        kernel, instance = self._kernel, self._instance
        if self._released:
            return
        self._released = True
        instance.claimed = False
        instance.releasing_until = kernel._loop.time() + kernel.release_takes
        kernel._tell(instance)
        kernel._free_if_unused(instance)

    async def _send(self, command: str) -> None:
        """A command on its way: who is harmed by it, how long it takes, and what it meets."""
        kernel, instance = self._kernel, self._instance
        kernel._open_control_device()
        kernel._condemn(f"deleted by {command}", instance)
        kernel.deletions_sent[instance.dev_id] += 1
        await asyncio.sleep(kernel.deletion_takes.get(instance.dev_id, kernel.latency))
        if error := kernel._error_at(Step.DELETE):
            why = abi.error_of(abi.Command[command], instance.dev_id, -error.number)
            if error.works and not isinstance(why, UnsupportedError):
                kernel._take_away(instance)
            raise why
        match kernel.faults.pop(instance.dev_id, None):
            case Fault.REFUSED:
                raise CommandError(command, instance.dev_id, errno.EIO, "input/output error")
            case Fault.OVERDUE:
                raise await self._miss_deadline(command)
            case Fault.ALREADY_DONE:
                kernel.delete(instance)
                raise NoSuchDeviceError(command, instance.dev_id, errno.ENODEV, "no such device")
            case Fault.DEFECT:
                raise ZeroDivisionError("a defect")
            case Fault.STOP_OVERDUE | None:
                return

    async def _miss_deadline(self, command: str) -> CommandOverdueError:
        """A daemon that is killed takes its own commands with it, but not what a hand was told to do."""
        self._instance.overdue, self._instance.answer_is_heard = command, True
        try:
            await asyncio.sleep(DEADLINE)
        except asyncio.CancelledError:
            if not self._instance.hand:
                self._instance.overdue = ""
            raise
        return CommandOverdueError(command, self._instance.dev_id, DEADLINE)

    async def _delete_and_wait(self) -> None:
        """DEL_DEV answers when the id is free, or is cancelled at its deadline: deleted either way."""
        kernel, instance = self._kernel, self._instance
        await self._send("DEL_DEV")
        if instance.holders and not kernel.ability.delete_can_be_cancelled:
            kernel.violations.append(
                f"{instance} deleted while held: this kernel now adds and deletes nothing any more"
            )
        kernel._take_away(instance)
        self.release()
        until = kernel._loop.time() + DEADLINE
        while kernel.taken.get(instance.dev_id) is instance:
            if kernel._loop.time() >= until:
                raise InterruptedCommandError("DEL_DEV", instance.dev_id, errno.EINTR, "deleted; its id is held")
            await asyncio.sleep(0.1)


@dataclass(frozen=True, slots=True)
class FakeEnded:
    """How a command ended."""

    status: int | None
    output: str = ""
    trouble: str = ""


class FakeCommand:
    """A recovery command and its supervisor; what it does is told to it by `FakeKernel.on_command`, in the methods of the
    last part. `ignores_sigterm`: only SIGKILL ends it. `is_undying`: nothing does.
    """

    def __init__(
        self, kernel: FakeKernel, dev_id: int, argv: tuple[str, ...], environment: dict[str, str], timeout: float
    ) -> None:
        self.kernel, self.dev_id, self.argv, self.environment, self.timeout = kernel, dev_id, argv, environment, timeout
        self.process = kernel.process(argv[0])
        self.children: list[Process] = []
        self.ignores_sigterm = self.is_undying = False
        self.kept = self.left = self.was_ended = self.did_not_start = False
        self.is_known = True  # to the daemon of the moment
        self.at = kernel._loop.time()  # when a child took it
        self._ending: asyncio.Task[str] | None = None
        self._spares_servers = False
        self._started: asyncio.Future[None] = kernel._loop.create_future()
        self._ended: asyncio.Future[FakeEnded] = kernel._loop.create_future()

    @property
    def is_over(self) -> bool:
        return self.did_not_start or not any(each.alive for each in self._all)

    @property
    def is_under_way(self) -> bool:
        """As far as its daemon can tell."""
        return self.is_known and not self.is_over and not (self.kept and not self.process.alive)

    @property
    def is_in_the_way(self) -> bool:
        """It forbids another command beside it. The next daemon cannot know of a former server, nor of what does not die."""
        if self.is_over:
            return False
        if self.kept:
            return self.is_under_way and not self._has_open(any_of=self._all)
        return self.is_known or not self.is_undying

    @property
    def _all(self) -> list[Process]:
        return [self.process, *self.children]

    async def started(self) -> None:
        await asyncio.shield(self._started)

    async def ended(self) -> FakeEnded:
        return await asyncio.shield(self._ended)

    async def has_open(self, dev_id: int) -> bool:
        assert dev_id == self.dev_id
        return self._has_open(any_of=[each for each in self._all if each.visible])

    def keep(self) -> None:
        self.kept, self.left = True, False
        if self._ending:
            self._ending.cancel()
            self._ending = None

    def leave(self) -> None:
        self.left = True
        self._go_on_alone()

    async def end(self) -> str:
        """The supervisor goes on with it whether or not somebody waits here; only `keep` makes it stop."""
        self.kept = self.left = self._spares_servers = False
        self._ending = self._ending or self.kernel._loop.create_task(self._end_all())
        done, _ = await asyncio.wait([self._ending], timeout=TERM_GRACE + KILL_TAKES + 1)
        over = next(iter(done), None)
        return over.result() if over and not over.cancelled() else "its supervisor has not answered"

    # Its supervisor

    def begin(self) -> None:
        self.at = self.kernel._loop.time()

    def abandon(self) -> None:
        """The daemon is gone."""
        if self.is_known:
            self.is_known = False
            self._go_on_alone()

    def _go_on_alone(self) -> None:
        """Nobody watches it any more: what has a device open is left alone from now on, as far as that can be seen."""
        self._spares_servers = True
        self.kernel._loop.call_later(max(self.at + self.timeout - self.kernel._loop.time(), 0.0), self._expire)

    def _expire(self) -> None:
        if not (self.is_over or self.kept or self._ending):
            self._ending = self.kernel._loop.create_task(self._end_all())

    def _is_spared(self) -> bool:
        """A supervisor looks before each round."""
        visible = [each for each in self._all if each.visible]
        self.kept = self._spares_servers and self._has_open(any_of=visible)
        return self.kept

    async def _end_all(self) -> str:
        if self._is_spared():
            return "it is left alone: it has a char device open"
        self.was_ended = True
        if not (self.ignores_sigterm or self.is_undying):
            self._kill_all(seen_within=3 * self.kernel.latency)
        if not self.is_over:
            await asyncio.sleep(TERM_GRACE)
        if self._is_spared():
            return "it is left alone: it has a char device open"
        if not (self.is_over or self.is_undying):
            self._kill_all(seen_within=GLANCES)
        if not self.is_over:
            await asyncio.sleep(KILL_TAKES)
        left = next((each for each in self._all if each.alive), None)
        return f"pid {left.pid} ({left.comm}) did not die of SIGKILL in time" if left else ""

    def _kill_all(self, *, seen_within: float) -> None:
        """`seen_within`: seconds until whoever has this done can have seen that it serves."""
        just_now = self.kernel._loop.time() - seen_within
        for one in self.kernel.taken.values():
            serves = any(each in one.openers for each in self._all) and one.state == KernelState.LIVE
            watched = self.is_known and not self.left
            if watched and serves and one.served_since is not None and one.served_since < just_now:
                self.kernel.violations.append(f"the server of {one} was ended")
        for each in self._all:
            self.kernel.kill(each)
        self.exit(-9)

    def _has_open(self, *, any_of: list[Process]) -> bool:
        instance = self.kernel.taken.get(self.dev_id)
        return instance is not None and any(each in instance.openers for each in any_of)

    # What a command may do

    def start(self) -> None:
        self._started.set_result(None)

    def fail_to_start(self, why: str = "", kind: type[DuendeError] = DuendeError) -> None:
        self.did_not_start = True
        self._started.set_exception(kind(why or f"{self.argv[0]}: no such file", hint="see PATH"))
        self._started.exception()  # whoever waited for it may be gone

    def exit(self, status: int, output: str = "") -> None:
        """Its own process ends, and lets go of what it has open; its children live on."""
        self.kernel.kill(self.process)
        if not self._ended.done():
            self._ended.set_result(FakeEnded(status, output))

    def fail(self, *, within: float = 0.2, status: int = 1) -> None:
        """Say why not, and exit."""
        self.start()
        self.kernel._loop.call_later(within, self.exit, status, "no backing file")

    def hang(self) -> None:
        """Do nothing, for ever."""
        self.start()

    def take_and_hang(self, *, within: float = 0.2) -> None:
        """Open the device, and never finish the recovery."""
        self.start()
        self.kernel._loop.call_later(within, self._take)

    def serve(self, *, within: float = 0.2) -> None:
        """Open the device, and finish the recovery; it stays in the foreground."""
        self.take_and_hang(within=within / 2)
        self.kernel._loop.call_later(within, self.finish)

    def serve_as_daemon(self, *, within: float = 0.2, status: int = 0) -> None:
        """As servers do that put themselves into the background: a child serves, and its parent exits."""
        self.take_and_hang(within=within / 4)
        self.kernel._loop.call_later(within / 2, self._fork, status)
        self.kernel._loop.call_later(within, self.finish)

    def ask_another(self, *, within: float = 0.2, status: int = 0, exits_after: float | None = None) -> None:
        """As `systemctl start` does: the server is somebody else's child."""
        self.start()
        self.kernel._loop.call_later(within / 2, self._take, self.kernel.process())
        self.kernel._loop.call_later(within, self.finish)
        self.kernel._loop.call_later(within / 4 if exits_after is None else exits_after, self.exit, status)

    def finish(self) -> None:
        """END_USER_RECOVERY by whoever has the device open."""
        instance = self.kernel.taken.get(self.dev_id)
        if instance and instance.openers and instance.state in (KernelState.QUIESCED, KernelState.FAIL_IO):
            self.kernel.finish_recovery(instance)

    def _take(self, process: Process | None = None) -> None:
        process = process or self.process
        instance = self.kernel.taken.get(self.dev_id)
        if instance is None or not process.alive:
            return
        try:
            self.kernel.recover(instance, process)
        except (BusyError, NoSuchDeviceError) as error:
            self.exit(1, str(error))

    def _fork(self, status: int) -> None:
        instance = self.kernel.taken.get(self.dev_id)
        if instance and self.process in instance.openers:
            self.children.append(self.kernel.process("worker"))
            self.kernel.share(instance, self.children[0])
        self.exit(status)
