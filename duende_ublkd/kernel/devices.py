"""See devices and take them away: what reconcile asks of the real kernel.

Facts that shape it:
- Two equal answers of GET_DEV_INFO prove nothing: a freed id, with its names and numbers, is reused by the next ADD_DEV.
  The kernfs inode of /sys/class/ublk-char/ublkcN differs; it is read before and after, so that one observation is of one
  instance.
- Opening /dev/ublkcN is exclusive (ublk_ch_open: test_and_set_bit(UB_STATE_OPEN)). While we hold it no server can take
  the device, and our file pins the id: ADD_DEV of it says EEXIST. So the open is at once the last question ("does
  anybody have it?") and the lock for the deletion. Measured on 6.12, 6.18 and 7.3.
- A deleted device that somebody holds has neither a node nor a sysfs entry, only a taken id. A full look therefore asks
  for every id up to the highest known one and some more. Where the kernel answers for none of them (no memory, or no task
  left for io-wq), those that nothing else tells of are no devices: that is said once, and not for each of them.
- DEL_DEV waits for every open file, ours too: it is sent with the device open, so that its id cannot be reused before the
  kernel has looked it up, and the device is closed once the node is gone, however late that is. (Up to 6.2 the kernel looks
  the id up only when it has the mutex. Were the node another cleaner's work, and ours still waiting for the mutex, then the
  id could be added anew in between; but that one's DEL_DEV waits for our file with the mutex held, so there is no choice.)
- STOP_DEV of a device whose disk is there can end in an uninterruptible sleep (del_gendisk), and so can an open of its
  block node (open_mutex): both are a child's to do, which was started before it was needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.errors import (
    BusyError,
    CommandError,
    CommandOverdueError,
    HeldError,
    KernelUnavailableError,
    NoSuchDeviceError,
    UnsupportedError,
)
from duende_ublkd.core.model import Disk, DriverFacts, Feature, Identity, Observation
from duende_ublkd.core.policy import Traits
from duende_ublkd.kernel import abi
from duende_ublkd.kernel.children import Children, Command, CommandOrder, Credentials
from duende_ublkd.kernel.control import Control, kernel_version
from duende_ublkd.kernel.holders import Sweeper, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping

    from duende_ublkd.core.config import Recovery
    from duende_ublkd.core.model import DevInfo, Process, Usage

SYSFS_CLASS = "/sys/class/ublk-char"
SLOTS_MAX = "/sys/module/ublk_drv/parameters/ublks_max"
SWEEP_AT_LEAST = 64  # ublks_max of old: the ids that an automatic ADD_DEV hands out first
SWEEP_AT_MOST = 1024  # an id beyond was given by somebody, and is known from sysfs or from before
SWEEP_MARGIN = 8
USAGE_DEADLINE = 5.0
SERVER_DEADLINE = 2.0
FORMER_DEADLINE = 2.0
BOOT_SLACK = 3.0  # seconds from the start of the clocks to devtmpfs's first nodes, generously
_BOOT_NODES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/kmsg")
_DELETED_SOON = 0.001  # first pause between two looks for the node's end; doubles
_STABLE_READS = 4
_DELETIONS = (abi.Command.DEL_DEV.name, abi.Command.DEL_DEV_ASYNC.name)
_LOOKS = (abi.Command.GET_DEV_INFO.name, abi.Command.GET_DEV_INFO2.name)
_STILL_UNANSWERED = "GET_DEV_INFO has still not answered"
_NO_ANSWER_HINT = (
    "see the memory, and the tasks that are left: free -m; systemctl show -p TasksCurrent -p TasksMax duende-ublkd"
)
_ANOTHER = "its id belongs to another device now"
_CAP_HINT = "run it as the host's root, in a container with --cap-add SYS_ADMIN; see: capsh --print"

Rdevs = frozenset[tuple[int, int]]


class UblkKernel:
    """The running kernel, through a ring of the running event loop."""

    def __init__(self, control: Control, sweeper: Sweeper, children: Children) -> None:
        self.control = control
        self.children = children
        self.users: Mapping[str, Credentials] = {}  # who recovery commands run as, looked up when they were configured
        self.saw_disk: Callable[[int], bool] = lambda _: False  # the daemon, which hears uevents, knows better
        self._sweeper = sweeper
        self._kept: dict[int, int] = {}
        self._known: set[int] = set()  # ids that a device has, or that the caller has a history of
        self._unanswered: set[int] = set()  # ids whose GET_DEV_INFO has missed its deadline
        version = kernel_version(os.uname().release)
        self.traits = Traits(async_delete=version >= (6, 9), delete_can_be_cancelled=version >= (6, 3))

    def keep(self, dev_id: int, claim: int) -> None:
        """Hold a claim whose device may still be deleted, until its command answers."""
        self._kept[dev_id] = claim

    def note_answer(self, command: str, dev_id: int) -> None:
        """A command that had missed its deadline has answered: the claim that was kept for a deletion is given back."""
        if command in _DELETIONS:
            self._give_back(dev_id)
        if command in _LOOKS:
            self._unanswered.discard(dev_id)

    def _give_back(self, dev_id: int) -> None:
        if (claim := self._kept.pop(dev_id, None)) is not None:
            os.close(claim)

    def close(self) -> None:
        """Give every claim back: what has not answered by now is the kernel's to finish."""
        for claim in self._kept.values():
            os.close(claim)
        self._kept.clear()

    def forget_driver(self) -> None:
        """The module went and came: whatever was learnt of the driver is of the old one."""
        self.control.forget()

    async def driver(self) -> DriverFacts:
        """Ask the driver about itself; also the question whether it is there at all."""
        return DriverFacts(await self.control.features(), _read_slots_max())

    async def observe(self, dev_ids: Collection[int]) -> list[Observation]:
        """One look at the given ids, lowest first; those that are free are left out. Raises KernelUnavailableError.

        Of the ids that nothing is known of, and that the kernel does not answer for, the lowest stands for all, where no
        other device's trouble tells of it; where there is no device at all, it is an error.
        """
        wanted = sorted(dev_ids)
        seen = await asyncio.gather(*(self._observe_one(dev_id) for dev_id in wanted))
        self._known -= {dev_id for dev_id, each in zip(wanted, seen, strict=True) if each is None}
        found = [each for each in seen if each is not None]
        present = [each for each in found if self._is_known(each)]
        unanswered = [each for each in found if not self._is_known(each)]
        if unanswered and not any(each.trouble for each in present):
            present = sorted([*present, _standing_for(unanswered, alone=not present)], key=lambda each: each.dev_id)
        self._known.update(each.dev_id for each in present)
        return await self._with_servers(present)

    def _is_known(self, seen: Observation) -> bool:
        """There is a device, or was one: an answer, an entry in sysfs or a history says so."""
        shows = seen.identity.sysfs_inode is not None or seen.disk is not None
        return shows or not seen.trouble or seen.dev_id in self._known

    def candidates(self, known: Collection[int]) -> set[int]:
        """Every id worth asking about in a full look; `known`: those of earlier looks."""
        self._known.update(known)
        listed = {*list_char_devices(), *known}
        automatic = max((dev_id for dev_id in listed if dev_id < SWEEP_AT_MOST), default=0)
        return listed | set(range(max(automatic + SWEEP_MARGIN, SWEEP_AT_LEAST)))

    async def look_for_users(self, seen: Collection[Observation], remembered: Mapping[int, Rdevs]) -> dict[int, Usage]:
        """Who has these devices open, and who holds their disks: one sweep over /proc for all of them."""
        targets = {
            each.dev_id: Target(
                each.dev_id,
                each.identity.char_rdev,
                remembered.get(each.dev_id, frozenset()) | (each.disk.rdevs if each.disk else frozenset()),
            )
            for each in seen
        }
        return await self._sweeper.look(targets, USAGE_DEADLINE) if targets else {}

    async def look_for_stuck(self) -> tuple[str, ...]:
        """Who sleeps in the kernel on some ublk device's account: a sentence each."""
        return await self._sweeper.look_for_stuck(USAGE_DEADLINE)

    @contextlib.contextmanager
    def claim(self, seen: Observation) -> Iterator[UblkClaim]:
        """Hold /dev/ublkcN exclusively. BusyError: somebody has it. NoSuchDeviceError: it went, or is another one now."""
        claim = UblkClaim(self, seen.dev_id, _open_exclusively(seen))
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
    ) -> Command:
        """Start a recovery command in a child. DuendeError: there is no child to be had, or a former command still runs."""
        user = self.users[rule.user] if rule.user else None
        await self.children.former_is_over(seen.dev_id, FORMER_DEADLINE)  # what served may only just have died
        order = CommandOrder(seen.dev_id, argv, environment, rule.timeout, user, seen.identity.char_rdev)
        return self.children.run(order, may_go=may_go)

    async def _observe_one(self, dev_id: int) -> Observation | None:
        for _ in range(_STABLE_READS):
            before = read_identity(dev_id)
            if before.sysfs_inode is None:
                # Deleted: up to 6.2 DEL_DEV waits for our file, and every other one and ADD_DEV wait for that DEL_DEV.
                self._give_back(dev_id)
                if dev_id in self._unanswered and dev_id not in self._known:
                    return _observation(dev_id, time.monotonic(), before, None, None, _STILL_UNANSWERED)
            at = time.monotonic()
            info, trouble, overdue = None, "", ""
            try:
                info = await self.control.get_device_info(dev_id)
            except NoSuchDeviceError:
                self._unanswered.discard(dev_id)
                if read_identity(dev_id).sysfs_inode is None:
                    return None
                continue  # added this very moment
            except CommandOverdueError as error:
                trouble, overdue = str(error), error.command
                self._unanswered.add(dev_id)
            except CommandError as error:
                if error.errno == errno.EPERM and error.command == "GET_DEV_INFO":
                    raise KernelUnavailableError(
                        f"the kernel refuses to tell of ublk{dev_id}: {error.meaning}", hint=_CAP_HINT
                    ) from error
                # An unprivileged device whose node is gone cannot even be asked about: deleted, and still held.
                trouble = "" if error.errno == errno.ENOENT and before.sysfs_inode is None else str(error)
            disk = read_disk(dev_id)
            had_disk = self.saw_disk(dev_id)
            if read_identity(dev_id) == before:
                seen = _observation(dev_id, at, before, disk, info, trouble)
                return replace(seen, had_disk=had_disk, overdue=overdue)
        self._known.add(dev_id)
        return _observation(
            dev_id, time.monotonic(), Identity(None), None, None, "another device took the id at each look"
        )

    async def _with_servers(self, seen: list[Observation]) -> list[Observation]:
        pids = [each.info.server_pid for each in seen if each.info and each.info.server_pid > 0]
        if not pids:
            return seen
        known = await self._sweeper.inspect(pids, SERVER_DEADLINE)
        return [replace(each, server=known.get(each.info.server_pid)) if each.info else each for each in seen]


class UblkClaim:
    """An exclusively opened /dev/ublkcN, and the only way to delete it. Nobody can serve or re-add the id meanwhile."""

    def __init__(self, kernel: UblkKernel, dev_id: int, fd: int) -> None:
        self._kernel = kernel
        self._dev_id = dev_id
        self._fd = fd

    async def look_again(self) -> Observation | None:
        """Look once more at what the claim pins. None: the id is free."""
        seen = await self._kernel.observe([self._dev_id])
        return seen[0] if seen else None

    async def stop(self, seen: Observation, may_go: Callable[[Process | None], bool]) -> None:
        """Stop a device that waits for a server, which fails its waiting I/O and takes its disk away.

        `may_go`: asked with None before a child begins, and with that child's process right before STOP_DEV is sent.
        HeldError: its disk is mounted, swapped on, claimed or (7.0) open. NoSuchDeviceError: it has no disk any more.
        CommandOverdueError: the stop still runs, in a child that nobody waits for. DuendeError: `may_go` said no.
        """
        if seen.disk is None:
            raise NoSuchDeviceError("STOP_DEV", self._dev_id, errno.ENODEV, "it has no disk any more")
        control = self._kernel.control
        safely = bool(await control.features() & Feature.SAFE_STOP_DEV)
        began, result = time.monotonic(), ""
        try:
            await self._kernel.children.stop_device(
                self._dev_id,
                seen.disk.rdev,
                self._fd,
                try_first=safely,
                deadline=control.deadline,
                may_go=may_go,
            )
            result = "ok"
        except CommandError as error:
            result = errno.errorcode.get(error.errno, str(error.errno))
            if isinstance(error, BusyError):
                raise HeldError(error.command, self._dev_id, error.errno, error.meaning) from error
            raise
        except CommandOverdueError:
            result = "overdue"
            raise
        finally:
            if result:  # it was sent
                control.note("STOP_DEV", result, time.monotonic() - began)

    async def delete(self, info: DevInfo) -> None:
        """Delete the device and release the claim. The id is free when the last holder lets go.

        InterruptedCommandError: deleted, and held. NoSuchDeviceError: somebody else deleted it.
        """
        if info.unprivileged or not await self._delete_async():
            await self._delete_and_wait(via_node=info.unprivileged)

    def release(self) -> None:
        """Close it, at most once."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    async def _sent(self, deletion: Coroutine[Any, Any, None]) -> None:
        """The claim is kept the very moment that the deadline is known to be missed: the answer may come next."""
        try:
            await deletion
        except CommandOverdueError:
            self._keep()
            raise

    def _keep(self) -> None:
        """A deletion that has missed its deadline may still be done: until it answers, nobody is to serve the device."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._kernel.keep(self._dev_id, fd)

    async def _delete_async(self) -> bool:
        kernel = self._kernel
        try:
            await self._sent(kernel.control.delete_device_async(self._dev_id))
        except UnsupportedError:
            kernel.traits = replace(kernel.traits, async_delete=False)
            return False
        kernel.traits = replace(kernel.traits, async_delete=True)
        self.release()
        return True

    async def _delete_and_wait(self, *, via_node: bool) -> None:
        command = self._kernel.control.delete_device(self._dev_id, via_node=via_node)
        deletion = asyncio.ensure_future(self._sent(command))
        pause = _DELETED_SOON
        while not (deletion.done() or self._is_deleted()):
            await asyncio.wait([deletion], timeout=pause)
            pause = min(pause * 2, 0.1)
        if deletion.done():
            deletion.result()
        self.release()  # or DEL_DEV would wait for this file, too
        await deletion

    def _is_deleted(self) -> bool:
        """The kernel has taken the device away (cdev_device_del); a node that somebody made with mknod would stay."""
        return os.fstat(self._fd).st_nlink == 0 or read_identity(self._dev_id).sysfs_inode is None


def _standing_for(unanswered: list[Observation], *, alone: bool) -> Observation:
    """One for many. KernelUnavailableError: there is no device that could be judged meanwhile."""
    first, more = unanswered[0], len(unanswered) - 1
    others = f", nor for {more} more" if more else ""
    if alone:
        raise KernelUnavailableError(
            f"the kernel does not say whether id {first.dev_id} is free{others}: {first.trouble}", hint=_NO_ANSWER_HINT
        )
    return replace(
        first, trouble=f"nothing is known of this id, and the kernel does not answer{others}: {first.trouble}"
    )


def _observation(
    dev_id: int, at: float, identity: Identity, disk: Disk | None, info: DevInfo | None, trouble: str
) -> Observation:
    node, age = read_char_device(dev_id, identity)
    return Observation(dev_id, at, info, identity, node, disk, age=age, trouble=trouble)


def list_char_devices() -> list[int]:
    """The ids that sysfs shows. Empty, too, when the driver is not loaded."""
    try:
        names = os.listdir(SYSFS_CLASS)
    except FileNotFoundError:
        return []
    return [int(name[5:]) for name in names if name.startswith("ublkc") and name[5:].isdigit()]


def read_identity(dev_id: int) -> Identity:
    """The instance that has this id now, as sysfs tells it."""
    directory = f"{SYSFS_CLASS}/ublkc{dev_id}"
    try:
        inode = os.stat(f"{directory}/").st_ino
        known = _identities.get(dev_id)
        if known is None or known.sysfs_inode != inode:
            known = _identities[dev_id] = Identity(inode, _read_numbers(f"{directory}/dev"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return _no_longer(dev_id)
    except OSError as error:
        if error.errno == errno.ENODEV:  # kernfs, while the entry is being removed
            return _no_longer(dev_id)
        raise
    return known


# An instance keeps its numbers, so that they are read once. One entry for each id that is there.
_identities: dict[int, Identity] = {}


def _no_longer(dev_id: int) -> Identity:
    _identities.pop(dev_id, None)
    return Identity(None)


def read_disk(dev_id: int) -> Disk | None:
    """/sys/block/ublkbN with its partitions; None when there is no disk."""
    name = f"ublkb{dev_id}"
    directory = f"/sys/block/{name}"
    try:
        rdev = _read_numbers(f"{directory}/dev")
        parts = [entry for entry in os.listdir(directory) if entry.startswith(f"{name}p")]
        partitions = tuple(_read_numbers(f"{directory}/{part}/dev") for part in sorted(parts))
        diskseq = _read_text(f"{directory}/diskseq")
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None if not os.path.isdir(directory) else Disk((0, 0))
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise
    return Disk(rdev, int(diskseq) if diskseq.isdigit() else None, partitions)


def read_char_device(dev_id: int, identity: Identity) -> tuple[str | None, float | None]:
    """The node's path, if it is this device's, and a lower bound of the seconds since ADD_DEV; None: no bound."""
    path = abi.CHAR_DEVICE.format(dev_id)
    try:
        node = os.lstat(path)
    except OSError:
        return None, None
    if not stat.S_ISCHR(node.st_mode) or (os.major(node.st_rdev), os.minor(node.st_rdev)) != identity.char_rdev:
        return None, None
    try:
        entry = os.stat(f"{SYSFS_CLASS}/ublkc{dev_id}/")
    except OSError:
        return path, None
    return path, _age_of(node, entry)


def _age_of(node: os.stat_result, entry: os.stat_result) -> float | None:
    """How old a device is at least: no older than its node, nor than the first look at its entry in sysfs.

    Where a node was made by hand, devtmpfs leaves it to the next device of that number, and it is older than that one.
    Both times are the wall clock's, there is no other, and that clock may have been set since. By how
    much it has been set since boot shows in the oldest of the nodes that devtmpfs made at boot; that, the time that the
    machine was suspended, and a slack for the time that booting took are taken off. Not seen: a clock that was set back
    before ADD_DEV and forward after it.
    """
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    made_at_boot = [stamp for path in _BOOT_NODES if (stamp := _modified(path, node.st_dev)) is not None]
    if not made_at_boot:
        return None
    set_forward = max(boot - min(made_at_boot) + BOOT_SLACK, 0.0)
    suspended = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    age = time.time() - max(node.st_ctime, node.st_mtime, entry.st_ctime) - set_forward - suspended
    return max(age, 0.0)


def _modified(path: str, st_dev: int) -> float | None:
    try:
        node = os.lstat(path)
    except OSError:
        return None
    return node.st_mtime if node.st_dev == st_dev else None


def _open_exclusively(seen: Observation) -> int:
    path = abi.CHAR_DEVICE.format(seen.dev_id)
    if read_identity(seen.dev_id) != seen.identity:  # our open of another device would make its server's fail
        raise NoSuchDeviceError("open", seen.dev_id, errno.ENODEV, _ANOTHER)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BusyError("open", seen.dev_id, errno.EBUSY, "somebody has its char device open") from error
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            raise NoSuchDeviceError("open", seen.dev_id, errno.ENODEV, "its char device is gone") from error
        raise CommandError("open", seen.dev_id, error.errno or 0, os.strerror(error.errno or 0)) from error
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        node = os.fstat(fd)
        ours = (
            stat.S_ISCHR(node.st_mode) and (os.major(node.st_rdev), os.minor(node.st_rdev)) == seen.identity.char_rdev
        )
        if not ours or node.st_nlink == 0 or read_identity(seen.dev_id) != seen.identity:
            raise NoSuchDeviceError("open", seen.dev_id, errno.ENODEV, _ANOTHER)
        undo.pop_all()
    return fd


def _read_slots_max() -> int | None:
    try:
        text = _read_text(SLOTS_MAX)
    except OSError:  # the parameter came with 6.3
        return None
    return int(text) if text.isdigit() else None


def _read_text(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 64).decode("ascii", "replace").strip()
    finally:
        os.close(fd)


def _read_numbers(path: str) -> tuple[int, int]:
    major, _, minor = _read_text(path).partition(":")
    return int(major), int(minor)
