"""Who keeps ublk disks and char devices alive: one sweep over /proc and /sys for all devices at once.

What is looked at: the mount table of every mount namespace that a process is in, /proc/swaps, every process's open
files, holders and slaves in /sys/block, the backing files of loop and zram, /sys/fs, which lists a file system for as
long as it lives, mounted visibly or not, and what the kernel exports by itself: namespaces of nvmet, backstores of LIO and
units of USB mass storage in configfs, devices of rnbd-server and Xen's blkback in sysfs.

Facts that shape it:
- A disk's name and dev_t outlive it. Its last user frees the dev_t, so one that /sys/dev/block shows as another disk's
  has no user of ours left; and an id stays taken while its disk has a user, so the name `ublkbN` means that one id.
- A file system without a block device of its own (btrfs, bcachefs) shows dev_t 0:N and names its disk as the source.
  tmpfs, overlay, fuse and their like show any text that their mounter, who may be anybody, chose: no evidence.
- A descriptor's link is text made from memory (d_path), and a node of a disk may have any name: a container makes its
  own. Following the link asks the file's file system, which may never answer: so it is asked with AT_STATX_DONT_SYNC,
  which NFS, FUSE, SMB and Ceph answer from memory. One that does not (9p) costs the sweep, and so what depends on it.
- A leader that has exited while its threads go on has neither namespaces nor descriptors; its threads still do.
- An export has its disk open in the kernel, without a descriptor and without a claim (nvmet, LIO's fileio, USB, rnbd and
  blkback): neither /proc nor an exclusive open shows it. configfs has the path by which it was opened, and an export whose
  path leads nowhere from here may be of any disk. nvmet's `enable` is 0 as soon as it begins to drain, with the disk still
  open: so one that is off counts as well, as long as the disk is there.
- The caller may have locked all memory, future too: a read buffer is as large as what is read, never as its limit.

What a sweep cannot see, so `complete` does not promise it: a descriptor in flight over a unix socket, registered with
an io_uring and then closed, or private to one thread (CLONE_FILES undone); a mapping of the char device whose
descriptor is closed (`maps` takes mmap_lock); users inside the kernel that leave no trace (ZFS, a file system's external
journal, a pNFS client, another vendor's target), and an export whose path leads to another disk by now. For the char device
the exclusive open answers. For a disk that is there O_EXCL answers for those that claim it: mounts, swap, dm, md, ZFS,
journals. Who has merely opened or mapped it, O_EXCL does not see; from 7.0 on TRY_STOP_DEV does, and before 7.0 nothing.
"""

# Below /proc every call is made once per descriptor of every process: plain strings and os, no Path objects.
# ruff: noqa: PTH115, PTH208

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import itertools
import os
import queue
import re
import stat
import struct
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from duende_ublkd.core.model import Holder, Server, Usage
from duende_ublkd.core.text import printable
from duende_ublkd.kernel import servers, stuck

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

Rdev = tuple[int, int]

MOST_HOLDERS = 20  # shown of one device; the rest is a number
_NAME_LIMIT = 120
_TABLE_LIMIT = 64 << 20  # bytes of one mount table; the kernel's own limit is 100,000 mounts
_CHUNK = 65536
_MOST_EXPORTS = 4096
_TEXT_ONLY_SOURCES = frozenset({"fuse", "mqueue", "overlay", "proc", "ramfs", "sysfs", "tmpfs"})
_NO_FILESYSTEMS = frozenset({"bpf", "cgroup", "fuse", "pstore", "resctrl", "selinux", "smackfs"})  # in /sys/fs
_SHADOW_SUFFIX = " (deleted)"  # d_path's mark of an unlinked file, in swaps, fd links and backing_file
_DISK_NAME = re.compile(r"ublkb([0-9]{1,7})(?:p[0-9]{1,4})?")
_CHAR_NAME = re.compile(r"ublkc([0-9]{1,7})")
# Whose exports configfs has to show, by module; those of a gadget driver of old are shown nowhere.
_EXPORTERS = {"nvmet": "nvmet", "target_core_mod": "target", "usb_f_mass_storage": "usb_gadget"}
_OLD_GADGETS = ("g_acm_ms", "g_mass_storage", "g_multi")
_DISKLESS_BACKSTORES = ("alua", "pscsi_", "rd_", "user_")  # in target/core; a `user_` one is a process's
_LIO_FILE = re.compile(rb"File: (.*)  Size: [0-9]", re.DOTALL)  # fd_show_configfs_dev_params
_LIO_DISK = re.compile(rb"Major: ([0-9]{1,9}) Minor: ([0-9]{1,9})  CLAIMED")  # iblock_show_configfs_dev_params
_ESCAPE = re.compile(rb"\\([0-3][0-7]{2})")
_NAMESPACE = re.compile(r"mnt:\[[0-9]+\]")
# In every process, never a ublk node, and not worth asking about.
_DULL = re.compile(r"/dev/(?:null|zero|random|urandom|tty|ptmx|pts/.*|shm/.*)", re.DOTALL)
_FIRST_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO, part of the ABI since 3.8
_CAP_SYS_PTRACE = 19
_PF_KTHREAD = 0x00200000
_GLANCE = 0.001  # seconds between two looks for a thread's end
_O_PATH = 0o10000000  # of the generic ABI; alpha, parisc and sparc have no ublk users to speak of


@dataclass(frozen=True, slots=True)
class Target:
    """One device to look for. `disk_rdevs`: the disk and its partitions, those of a disk that has gone included."""

    dev_id: int
    char_rdev: Rdev | None = None
    disk_rdevs: frozenset[Rdev] = frozenset()


class Mount(NamedTuple):
    """One line of a mountinfo, escapes undone, bytes that are no UTF-8 as surrogates."""

    rdev: Rdev
    root: str
    mountpoint: str
    fstype: str
    source: str
    super_options: str


class Node(NamedTuple):
    """What kind of file a descriptor is: S_IFMT's part of the mode, and st_rdev where it is known."""

    kind: int
    rdev: Rdev | None


class Export(NamedTuple):
    """A disk that the kernel gives to others. `path`: as whoever made the export wrote it; "": not set."""

    kind: str
    name: str
    path: str
    is_on: bool = True
    rdev: Rdev | None = None


@dataclass(slots=True)
class Progress:
    """Shared by a job's thread and whoever waits for it: where it is, and whether it may give up."""

    at: str = ""
    give_up: bool = False


if TYPE_CHECKING:
    NodeOf = Callable[[int, str, str], Node | None]  # see node_of


# --- the kernel's texts ----------------------------------------------------------------------------------------------


def unescape(text: bytes) -> str:
    r"""Undo seq_file's `\040`. A path is bytes: what is no UTF-8 comes back as surrogates, as from os.readlink()."""
    return _ESCAPE.sub(lambda found: bytes([int(found[1], 8)]), text).decode("utf-8", "surrogateescape")


def mount_of(line: bytes) -> Mount | None:
    """One line of /proc/PID/mountinfo; None for what is none."""
    left, separator, right = line.partition(b" - ")
    fields, tail = left.split(b" "), right.split(b" ")
    if not separator or len(fields) < 6 or len(tail) < 3:  # noqa: PLR2004 - proc_pid_mountinfo(5): six, then three
        return None
    rdev = rdev_of(fields[2])
    if rdev is None:
        return None
    return Mount(rdev, unescape(fields[3]), unescape(fields[4]), *(unescape(part) for part in tail[:3]))


def rdev_of(text: bytes) -> Rdev | None:
    """`259:3`, as mountinfo and sysfs have it."""
    major, separator, minor = text.strip().partition(b":")
    if not separator or not major.isdigit() or not minor.isdigit():
        return None
    return int(major[:10]), int(minor[:10])


def swap_paths(table: bytes) -> list[str]:
    """The first column of /proc/swaps; that of a disk that has gone ends in ` (deleted)`."""
    return [unescape(re.split(rb"[ \t]", line, maxsplit=1)[0]) for line in table.split(b"\n")[1:] if line]


def disk_id(path: str) -> int | None:
    """N for a path that ends in `ublkbN` or a partition of it, deleted or not."""
    return _id(_DISK_NAME, path)


def char_id(path: str) -> int | None:
    """N for a path that ends in `ublkcN`, deleted or not."""
    return _id(_CHAR_NAME, path)


def read_whole(path: str, limit: int) -> bytes:
    """A kernel file of unknown length, up to about `limit` bytes of it."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        chunks: list[bytes] = []
        while limit > 0 and (chunk := os.read(file, _CHUNK)):
            chunks.append(chunk)
            limit -= len(chunk)
        return b"".join(chunks)
    finally:
        os.close(file)


def _id(pattern: re.Pattern[str], path: str) -> int | None:
    found = pattern.fullmatch(path.removesuffix(_SHADOW_SUFFIX).rpartition("/")[2])
    return int(found[1]) if found else None


# --- asking about a descriptor ---------------------------------------------------------------------------------------

_AT_FDCWD = -100
_AT_STATX_DONT_SYNC = 0x4000
_AT_NO_AUTOMOUNT = 0x800
_STATX_TYPE = 1
_SIZEOF_STATX = 256
_OFFSET_OF_MODE, _OFFSET_OF_RDEV = 28, 128


def _find_statx() -> Callable[..., int] | None:
    try:
        found = ctypes.CDLL(None, use_errno=True).statx
    except (OSError, AttributeError):  # musl before 1.2.5
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p]
    return found


_statx = _find_statx()


def node_of(directory: int, name: str, link: str) -> Node | None:
    """What the file behind /proc/PID/fd/`name` is, without asking a file system that may not answer.

    Without statx() in the C library the name alone has to do. Raises OSError as stat() would.
    """
    if _statx is None:
        kind = stat.S_IFCHR if char_id(link) is not None else stat.S_IFBLK if disk_id(link) is not None else 0
        return Node(kind, None) if kind else None
    buffer = ctypes.create_string_buffer(_SIZEOF_STATX)
    if _statx(directory, os.fsencode(name), _AT_STATX_DONT_SYNC | _AT_NO_AUTOMOUNT, _STATX_TYPE, buffer):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    (mode,) = struct.unpack_from("=H", buffer, _OFFSET_OF_MODE)
    major, minor = struct.unpack_from("=II", buffer, _OFFSET_OF_RDEV)
    return Node(stat.S_IFMT(mode), (major, minor))


# --- the sweep -------------------------------------------------------------------------------------------------------


class GaveUpError(Exception):
    """Whoever waited has gone: the rest of the look is nobody's."""


@dataclass(slots=True)
class _Finds:
    """What one device's users are so far."""

    openers: dict[int, Server] = field(default_factory=dict)
    holders: dict[Holder, None] = field(default_factory=dict)  # in the order they were found


@dataclass(slots=True)
class _Body:
    """A directory of /proc that has a descriptor table: a process, or a thread whose leader has exited."""

    pid: int
    path: str
    namespace: str


def look(
    targets: Mapping[int, Target],
    *,
    proc: str | Path = "/proc",
    sys: str | Path = "/sys",
    node: NodeOf = node_of,
    progress: Progress | None = None,
) -> dict[int, Usage]:
    """Find the users of all targets. Blocks as long as the kernel does: the daemon has `Sweeper` do it.

    `node` tells what a descriptor is (a tree made for a test has no device nodes). Raises nothing for what the machine
    does; evidence that could not be had makes every Usage incomplete.
    """
    if not targets:
        return {}
    sweep = _Sweep(targets, str(proc), str(sys), node, progress or Progress())
    sweep.run()
    return {dev_id: sweep.usage(dev_id) for dev_id in targets}


class _Sweep:
    def __init__(self, targets: Mapping[int, Target], proc: str, sys: str, node: NodeOf, progress: Progress) -> None:
        self._targets = dict(targets)
        self._proc, self._sys, self._node, self._progress = proc, sys, node, progress
        self._blind = ""  # what could not be looked at first
        self._finds = {dev_id: _Finds() for dev_id in self._targets}
        self._owners: dict[Rdev, str | None] = {}
        self._by_char = {t.char_rdev: t.dev_id for t in self._targets.values() if t.char_rdev}
        self._directories: dict[int, list[str]] = {}
        self._by_disk: dict[Rdev, int] = {}
        self._aliases: dict[str, int] = {}  # where a disk's node of devtmpfs is bind-mounted under another name
        self._namespaces_named: set[str] = set()

    def run(self) -> None:
        """Disks first: the rest compares with them. Mounts before descriptors: they tell the nodes' other names."""
        self._note("own privileges")
        self._check_sight()
        self._note("sysfs")
        self._learn_disks()
        bodies = [body for pid in self._pids() for body in self._bodies(pid)]
        self._look_at_mounts(bodies)
        self._note("swaps")
        self._look_at_swaps()
        for body in bodies:
            if body.pid != os.getpid():
                self._look_at_files(body)
        self._note("sysfs")
        self._look_at_stacks()
        self._look_at_live_filesystems()
        self._look_at_exports()
        if self._namespaces_named - {body.namespace for body in bodies}:
            self._overlook()  # kept by a bind mount or a descriptor alone, no process to look through

    def usage(self, dev_id: int) -> Usage:
        finds = self._finds[dev_id]
        holders = list(finds.holders)
        if len(holders) > MOST_HOLDERS:
            holders[MOST_HOLDERS:] = [Holder("holder", f"and {len(holders) - MOST_HOLDERS} more")]
        return Usage(tuple(finds.openers.values()), tuple(holders), not self._blind, self._blind)

    def _note(self, at: str) -> None:
        if self._progress.give_up:
            raise GaveUpError
        self._progress.at = at

    def _overlook(self, what: str = "") -> None:
        """Evidence could not be had: what is not found need not be missing."""
        self._blind = self._blind or printable(what, _NAME_LIMIT) or self._progress.at or "own privileges"

    def _hold(self, dev_id: int, kind: str, what: str) -> None:
        self._finds[dev_id].holders[Holder(kind, printable(what, _NAME_LIMIT))] = None

    def _denied(self, error: OSError) -> bool:
        """Whether an error means that evidence was withheld; that what was to be read has gone is normal."""
        return error.errno not in {errno.ENOENT, errno.ESRCH, errno.ENOTDIR, errno.ENXIO, errno.ENODEV}

    def _read(self, path: str, limit: int = 65536) -> bytes | None:
        """A whole file; None: it has gone. Anything else that fails makes the sweep incomplete."""
        try:
            data = read_whole(path, limit)
        except OSError as error:
            if self._denied(error):
                self._overlook()
            return None
        if len(data) >= limit:
            self._overlook()
        return data

    def _text(self, path: str) -> str:
        """An attribute of one line; "" also when it has gone."""
        return (self._read(path) or b"").removesuffix(b"\n").decode("utf-8", "surrogateescape")

    def _list(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(path))
        except OSError as error:
            if self._denied(error):
                self._overlook()
            return []

    # Can this process see everybody?

    def _check_sight(self) -> None:
        """/proc may hide processes (another pid namespace, hidepid) or files (subset=pid) without any error."""
        try:
            first = os.readlink(f"{self._proc}/self/ns/pid") == _FIRST_PID_NAMESPACE
        except OSError:
            first = False
        options = [
            option
            for mount in self._mounts(f"{self._proc}/self/mountinfo")
            if mount.fstype == "proc" and mount.mountpoint == self._proc
            for option in mount.super_options.split(",")
        ]
        hides = any(option.startswith("hidepid=") and option not in {"hidepid=0", "hidepid=off"} for option in options)
        if not first or "subset=pid" in options or (hides and not self._may_trace()):
            self._overlook()

    def _may_trace(self) -> bool:
        found = re.search(rb"^CapEff:\s*([0-9a-f]+)$", self._read(f"{self._proc}/self/status") or b"", re.MULTILINE)
        return bool(found and int(found[1], 16) >> _CAP_SYS_PTRACE & 1)

    # Which dev_t is whose?

    def _learn_disks(self) -> None:
        for dev_id, target in self._targets.items():
            found = {rdev_of(self._read(f"{directory}/dev") or b"") for directory in self._disk_directories(dev_id)}
            for rdev in target.disk_rdevs | {rdev for rdev in found if rdev}:
                owner = self._owner(rdev)
                if owner is None or disk_id(owner) == dev_id:
                    self._by_disk[rdev] = dev_id

    def _disk_directories(self, dev_id: int) -> list[str]:
        """A disk's directory in sysfs and those of its partitions; empty for a disk that has gone."""
        if dev_id not in self._directories:
            disk = f"{self._sys}/block/ublkb{dev_id}"
            inside = self._list(disk)
            partitions = [f"{disk}/{name}" for name in inside if name.startswith(f"ublkb{dev_id}p")]
            self._directories[dev_id] = [disk, *partitions] if inside else []
        return self._directories[dev_id]

    def _owner(self, rdev: Rdev) -> str | None:
        """The name of the disk or partition that has this dev_t now; None: no disk has."""
        if rdev not in self._owners:
            try:
                name = os.readlink(f"{self._sys}/dev/block/{rdev[0]}:{rdev[1]}").rpartition("/")[2]
            except OSError as error:
                name = None
                if self._denied(error):
                    self._overlook()
            self._owners[rdev] = name
        return self._owners[rdev]

    def _disk(self, rdev: Rdev | None, path: str) -> int | None:
        """The target whose disk this is: by dev_t, else by name if the dev_t is not another disk's by now."""
        if rdev in self._by_disk:
            return self._by_disk[rdev]
        dev_id = self._named(path)
        if dev_id is None:
            return None
        owner = self._owner(rdev) if rdev else None
        return dev_id if owner is None or disk_id(owner) == dev_id else None

    def _named(self, path: str) -> int | None:
        """The target that a disk's path or name is of."""
        dev_id = disk_id(path)
        return dev_id if dev_id in self._targets else None

    def _char(self, rdev: Rdev | None, path: str) -> int | None:
        if rdev in self._by_char:
            return self._by_char[rdev]
        target = self._targets.get(named) if (named := char_id(path)) is not None else None
        known = target is None or (target.char_rdev is not None and rdev is not None)
        return None if known else named

    # Processes

    def _pids(self) -> list[int]:
        try:
            names = os.listdir(self._proc)
        except OSError:
            self._overlook()
            return []
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def _bodies(self, pid: int) -> Iterator[_Body]:
        self._note(f"pid {pid}")
        path = f"{self._proc}/{pid}"
        namespace = self._namespace(path, pid)
        if namespace is not None:
            yield _Body(pid, path, namespace)
            return
        tasks = [f"{path}/task/{name}" for name in self._list(f"{path}/task") if name != str(pid)]
        for task in tasks:
            namespace = self._namespace(task, pid)
            if namespace is not None:
                yield _Body(pid, task, namespace)

    def _namespace(self, path: str, pid: int) -> str | None:
        """The mount namespace; "": not to be told; None: this one has exited."""
        try:
            return os.readlink(f"{path}/ns/mnt")
        except OSError as error:
            if not self._denied(error):
                return None
            self._withheld(pid)
            return ""

    def _withheld(self, pid: int) -> None:
        """A process that may not be looked into; a kernel thread has nothing to see."""
        if not self._blind:
            flags = (self._read(f"{self._proc}/{pid}/stat") or b"").rpartition(b")")[2].split()
            kernel_thread = len(flags) > 6 and flags[6].isdigit() and int(flags[6]) & _PF_KTHREAD  # noqa: PLR2004 - field 9
            if not kernel_thread:
                self._overlook()

    # Mounts

    def _mounts(self, path: str) -> Iterator[Mount]:
        for line in (self._read(path, _TABLE_LIMIT) or b"").split(b"\n"):
            mount = mount_of(line)
            if mount:
                yield mount

    def _look_at_mounts(self, bodies: Iterable[_Body]) -> None:
        """One table per namespace, from its lowest pid: that of the first process comes first."""
        seen: set[str] = set()
        shown: set[tuple[int, str]] = set()
        for body in bodies:
            if not body.namespace or body.namespace in seen:
                continue
            self._note(f"mountinfo of pid {body.pid}")
            seen.add(body.namespace)
            for mount in self._interesting(f"{body.path}/mountinfo"):
                self._look_at_mount(mount, body, shown)

    def _interesting(self, path: str) -> Iterator[Mount]:
        """Most tables are copies of one with hundreds of lines: split only the lines that can matter."""
        numbers = {b"%d:%d" % rdev for rdev in self._by_disk}
        for line in (self._read(path, _TABLE_LIMIT) or b"").split(b"\n"):
            if b"ublk" in line or b" mnt:[" in line or not numbers.isdisjoint(line.split(b" ", 3)[2:3]):
                mount = mount_of(line)
                if mount:
                    yield mount

    def _look_at_mount(self, mount: Mount, body: _Body, shown: set[tuple[int, str]]) -> None:
        if mount.fstype == "nsfs" and _NAMESPACE.fullmatch(mount.root):
            self._namespaces_named.add(mount.root)
        if mount.fstype in {"devtmpfs", "tmpfs"} and (alias := disk_id(mount.root)) is not None:
            self._aliases[mount.mountpoint] = alias
        dev_id = self._mounted(mount)
        if dev_id is None or (dev_id, mount.mountpoint) in shown:  # a copy in another namespace
            return
        shown.add((dev_id, mount.mountpoint))
        where = "" if body.pid == 1 else f", mount namespace of pid {body.pid}"
        text = f"{printable(mount.mountpoint, _NAME_LIMIT - 48)} ({printable(mount.fstype, 16)}){where}"
        self._hold(dev_id, "mount", text)

    def _mounted(self, mount: Mount) -> int | None:
        if mount.rdev[0] != 0:
            return self._disk(mount.rdev, mount.source)
        if mount.fstype.partition(".")[0] in _TEXT_ONLY_SOURCES:
            return None
        joined = mount.source.split(":")  # bcachefs names all its disks
        return next((found for source in joined if (found := self._named(source)) is not None), None)

    # Swap

    def _look_at_swaps(self) -> None:
        for path in swap_paths(self._read(f"{self._proc}/swaps", _TABLE_LIMIT) or b""):
            dev_id = self._named(path)
            if dev_id is not None:
                self._hold(dev_id, "swap", path)

    # Open files

    def _look_at_files(self, body: _Body) -> None:
        self._note(f"open files of pid {body.pid}")
        try:
            directory = os.open(f"{body.path}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            if self._denied(error):
                self._withheld(body.pid)
            return
        try:
            for name in os.listdir(directory):
                if self._progress.give_up:
                    raise GaveUpError
                self._look_at_file(body, directory, name)
        except OSError as error:
            if self._denied(error):
                self._withheld(body.pid)
        finally:
            os.close(directory)

    def _look_at_file(self, body: _Body, directory: int, name: str) -> None:
        try:
            link = os.readlink(name, dir_fd=directory)
            if not self._is_candidate(link):
                return
            node = self._node(directory, name, link)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # a path beyond 4 KiB: what it is must be asked
                self._look_at_nameless(body, directory, name)
            elif self._denied(error):
                self._withheld(body.pid)
            return
        if node is not None:
            self._look_at_node(body, name, link, node)

    def _look_at_nameless(self, body: _Body, directory: int, name: str) -> None:
        try:
            node = self._node(directory, name, "")
        except OSError as error:
            if self._denied(error):
                self._overlook()
            return
        if node is not None:
            self._look_at_node(body, name, "", node)

    def _is_candidate(self, link: str) -> bool:
        if link.startswith("mnt:["):
            self._namespaces_named.add(link)
            return False
        if link.startswith("/"):  # a container may have a node of any name, anywhere
            return _DULL.fullmatch(link) is None
        return "ublk" in link

    def _look_at_node(self, body: _Body, name: str, link: str, node: Node) -> None:
        is_char = node.kind == stat.S_IFCHR
        if not is_char and node.kind != stat.S_IFBLK:
            return
        dev_id = self._char(node.rdev, link) if is_char else self._disk(node.rdev, link)
        if dev_id is None or self._is_path_only(f"{body.path}/fdinfo/{name}"):
            return
        if is_char and body.pid in self._finds[dev_id].openers:
            return
        process = servers.inspect(body.pid, self._proc) or Server(body.pid, alive=None)
        if is_char:
            process = replace(process, has_ring=servers.has_ring(body.path))
            self._finds[dev_id].openers[body.pid] = process
        else:
            self._hold(dev_id, "open", f"pid {process}")

    def _is_path_only(self, fdinfo: str) -> bool:
        """An O_PATH descriptor never reached the driver and keeps nothing alive."""
        found = re.search(rb"^flags:\s*([0-7]+)$", self._read(fdinfo) or b"", re.MULTILINE)
        return bool(found and int(found[1], 8) & _O_PATH)

    # Devices on top

    def _look_at_stacks(self) -> None:
        for dev_id in self._targets:
            for directory in self._disk_directories(dev_id):
                for name in self._list(f"{directory}/holders"):
                    self._hold_by_device(dev_id, name)
        for name in self._list(f"{self._sys}/block"):
            device = f"{self._sys}/block/{name}"
            for slave in self._list(f"{device}/slaves"):  # outlives the disk's own `holders`
                if (below := self._named(slave)) is not None:
                    self._hold_by_device(below, name)
            if name.startswith(("loop", "zram")):
                self._look_at_backing(device, name)

    def _hold_by_device(self, dev_id: int, name: str) -> None:
        kind = "dm" if name.startswith("dm-") else "md" if name.startswith("md") else "holder"
        title = self._read(f"{self._sys}/block/{name}/dm/name") if kind == "dm" else None
        self._hold(dev_id, kind, f"{name} ({printable(title.strip(), 80)})" if title else name)

    def _look_at_backing(self, device: str, name: str) -> None:
        kind, attribute = ("loop", "loop/backing_file") if name.startswith("loop") else ("holder", "backing_dev")
        path = self._text(f"{device}/{attribute}")
        dev_id = self._backed_by(path, self._node_at(path))
        if dev_id is not None:
            self._hold(dev_id, kind, f"{name} on {path}")

    def _node_at(self, path: str) -> Node | None:
        """None: deleted, or a name in another mount namespace: it is all there is."""
        try:
            return self._node(_AT_FDCWD, path, path) if path.startswith("/") else None
        except OSError:
            return None

    def _backed_by(self, path: str, node: Node | None) -> int | None:
        """The target behind a file's name, which may be a node of another name."""
        if path in self._aliases:
            return self._aliases[path] if self._aliases[path] in self._targets else None
        is_disk = node is not None and node.kind == stat.S_IFBLK
        return self._disk(node.rdev, path) if node and is_disk else self._named(path)

    # File systems that no mount table shows

    def _look_at_live_filesystems(self) -> None:
        """ext4, xfs, f2fs and others have /sys/fs/TYPE/DISK, btrfs /sys/fs/btrfs/UUID/devices/DISK, while they live."""
        for fstype in self._list(f"{self._sys}/fs"):
            if fstype in _NO_FILESYSTEMS:
                continue
            names = self._list(f"{self._sys}/fs/{fstype}")
            if fstype == "btrfs":
                names = [disk for uuid in names for disk in self._list(f"{self._sys}/fs/btrfs/{uuid}/devices")]
            for name in names:
                dev_id = self._named(name)
                if dev_id is not None and not self._is_mounted(dev_id):
                    self._hold(dev_id, "mount", f"{fstype} on {name}, in no mount table that can be seen")

    def _is_mounted(self, dev_id: int) -> bool:
        return any(holder.kind == "mount" for holder in self._finds[dev_id].holders)

    # Exports

    def _look_at_exports(self) -> None:
        self._note("exports (configfs, rnbd, Xen)")
        self._check_exporters()
        exports = itertools.chain(self._nvmet(), self._lio(), self._gadgets(), self._rnbd(), self._xen())
        for number, export in enumerate(exports):
            self._note("exports (configfs, rnbd, Xen)")
            if number == _MOST_EXPORTS:
                self._overlook(f"more than {_MOST_EXPORTS} exports")
                return
            self._look_at_export(export)

    def _check_exporters(self) -> None:
        """Where configfs is mounted elsewhere, or nowhere any more, its exports go on."""
        for module, group in _EXPORTERS.items():
            if self._is_loaded(module) and not self._is_shown(f"kernel/config/{group}"):
                self._overlook(f"exports of {module}: no configfs at {self._sys}/kernel/config")
        for module in filter(self._is_loaded, _OLD_GADGETS):
            self._overlook(f"exports of {module}")

    def _is_loaded(self, module: str) -> bool:
        return self._is_shown(f"module/{module}")

    def _is_shown(self, directory: str) -> bool:
        # One that may not be read is as good as none. Path.is_dir raises there.
        return os.path.isdir(f"{self._sys}/{directory}")  # noqa: PTH112 - see the line above

    def _look_at_export(self, export: Export) -> None:
        node = self._node_at(export.path)
        names_a_disk = export.path in self._aliases or disk_id(export.path) is not None
        dev_id = self._disk(export.rdev, export.path) if export.rdev else self._backed_by(export.path, node)
        what = f"{export.path}, {export.name}".removeprefix(", ")
        if dev_id is not None and (export.is_on or self._disk_directories(dev_id)):
            self._hold(dev_id, export.kind, what if export.is_on else f"{what} (off)")
        elif export.is_on and export.path and not (node or export.rdev or names_a_disk):
            self._overlook(f"{export.kind} {what}: its disk")

    def _nvmet(self) -> Iterator[Export]:
        subsystems = f"{self._sys}/kernel/config/nvmet/subsystems"
        for subsystem in self._list(subsystems):
            for number in self._list(f"{subsystems}/{subsystem}/namespaces"):
                where = f"{subsystems}/{subsystem}/namespaces/{number}"
                is_on = self._text(f"{where}/enable") != "0"
                yield Export("nvmet", f"namespace {number} of {subsystem}", self._text(f"{where}/device_path"), is_on)

    def _lio(self) -> Iterator[Export]:
        core = f"{self._sys}/kernel/config/target/core"
        for backstore in self._list(core):
            if backstore.startswith(_DISKLESS_BACKSTORES):
                continue
            for name in self._list(f"{core}/{backstore}"):
                where = f"{core}/{backstore}/{name}"
                info = self._read(f"{where}/info") or b""
                file, disk = _LIO_FILE.search(info), _LIO_DISK.search(info)
                path = os.fsdecode(file[1]) if file else self._text(f"{where}/udev_path")
                rdev = (int(disk[1]), int(disk[2])) if disk else None
                is_on = self._text(f"{where}/enable") != "0"
                yield Export("lio", f"backstore {backstore}/{name}", path, is_on, rdev)

    def _gadgets(self) -> Iterator[Export]:
        gadgets = f"{self._sys}/kernel/config/usb_gadget"
        for gadget in self._list(gadgets):
            for function in self._list(f"{gadgets}/{gadget}/functions"):
                where = f"{gadgets}/{gadget}/functions/{function}"
                units = self._list(where) if function.startswith("mass_storage.") else ()
                for unit in (name for name in units if name.startswith("lun.")):
                    yield Export("gadget", f"{unit} of {gadget}/{function}", self._text(f"{where}/{unit}/file"))

    def _rnbd(self) -> Iterator[Export]:
        devices = f"{self._sys}/class/rnbd-server/ctl/devices"
        for name in self._list(devices):
            try:
                disk = os.readlink(f"{devices}/{name}/block_dev").rpartition("/")[2]
            except OSError as error:
                if self._denied(error):
                    self._overlook()
                continue
            yield Export("rnbd", f"export {name}", "/dev/" + disk.replace("!", "/"))

    def _xen(self) -> Iterator[Export]:
        backends = f"{self._sys}/bus/xen-backend/devices"
        for name in self._list(backends):
            major, separator, minor = self._text(f"{backends}/{name}/physical_device").partition(":")  # both in hex
            if separator:
                yield Export("xen", f"backend {name}", "", rdev=(_number(major), _number(minor)))


def _number(hexadecimal: str) -> int:
    return int(hexadecimal, 16) if re.fullmatch("[0-9a-f]{1,8}", hexadecimal) else -1


# --- the thread ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Job:
    work: Callable[[Progress], Any]
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[Any]
    progress: Progress = field(default_factory=Progress)


class Sweeper:
    """One thread, started here and now (before memory is short), that looks while the event loop goes on.

    A look that misses its deadline is told to give up and everybody gets `complete=False`; until the thread is back, so
    does everybody after. The thread is a daemon: stuck, it does not keep the interpreter from exiting. The caller sets
    `threading.stack_size()`.
    """

    def __init__(self, work: Callable[..., dict[int, Usage]] = look) -> None:
        self._work = work
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._overdue: _Job | None = None
        self._running: Progress | None = None
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)
        self._thread.start()

    @property
    def stuck_at(self) -> str | None:
        """What the thread was doing when a deadline passed, such as `open files of pid 812`; None: it is not stuck."""
        running = self._running
        return running.at or "the start" if self._overdue and running else None

    async def look(self, targets: Mapping[int, Target], deadline_s: float) -> dict[int, Usage]:
        """`holders.look` by a deadline; what it could not find out in time is `Usage(complete=False)`."""
        wanted = dict(targets)
        found: dict[int, Usage] | None = await self._have_done(
            lambda progress: self._work(wanted, progress=progress), deadline_s
        )
        if found is None:
            where = self.stuck_at
            blind = (
                f"the look at /proc is stuck at {where}" if where else f"the look at /proc took over {deadline_s:g} s"
            )
            return {dev_id: Usage(complete=False, blind=blind) for dev_id in wanted}
        return found

    async def inspect(self, pids: Iterable[int], deadline_s: float) -> dict[int, Server]:
        """`servers.inspect` of many by a deadline; of one that was not reached only the pid is known."""
        wanted = [pid for pid in dict.fromkeys(pids) if pid > 0]
        found: dict[int, Server] | None = await self._have_done(lambda progress: _inspect(wanted, progress), deadline_s)
        return {pid: Server(pid, alive=None) for pid in wanted} if found is None else found

    async def look_for_stuck(self, deadline_s: float) -> tuple[str, ...]:
        """`stuck.look` by a deadline; nothing where that is missed."""
        found: tuple[str, ...] | None = await self._have_done(_look_for_stuck, deadline_s)
        return found or ()

    def close(self) -> None:
        """Let the thread end when it is free; never waits for it."""
        if self._running:
            self._running.give_up = True
        self._jobs.put(None)

    def join(self, deadline_s: float) -> bool:
        """Wait until the thread that `close` has told to end is gone; whether it is, by the deadline."""
        return is_gone(self._thread, deadline_s)

    async def _have_done(self, work: Callable[[Progress], Any], deadline_s: float) -> Any:  # noqa: ANN401 - the job's own
        if self._overdue:
            return None
        loop = asyncio.get_running_loop()
        job = _Job(work, loop, loop.create_future())
        self._jobs.put(job)
        try:
            await asyncio.wait({job.answer}, timeout=deadline_s)
            return job.answer.result() if job.answer.done() else None
        finally:
            if not job.answer.done():  # also when the caller was cancelled
                job.progress.give_up = True
                self._overdue = self._overdue or job

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._running = job.progress
            result: Any = None
            failure: Exception | None = None
            try:
                if not job.progress.give_up:
                    result = job.work(job.progress)
            except GaveUpError:
                pass
            except Exception as error:  # noqa: BLE001 - the thread outlives a defect, and the caller gets it
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                job.loop.call_soon_threadsafe(self._settle, job, result, failure)

    def _settle(self, job: _Job, result: object, failure: Exception | None) -> None:
        if self._overdue is job:
            self._overdue = None
        if job.answer.done():
            return
        if failure is not None and not job.progress.give_up:
            job.answer.set_exception(failure)
        else:
            job.answer.set_result(result)


def is_gone(thread: threading.Thread, within: float) -> bool:
    """Wait until the kernel has let go of a thread that is ending, so that a fork meets it no more; whether it has.

    Not join(): from 3.13 on that waits for the kernel's part of a thread's end without a limit, and there a thread waits
    for every command that it has sent.
    """
    task = f"/proc/self/task/{thread.native_id}"
    until = time.monotonic() + within
    while thread.is_alive() or os.path.exists(task):  # noqa: PTH110 - as above
        if time.monotonic() >= until:
            return False
        time.sleep(_GLANCE)
    return True


def _look_for_stuck(progress: Progress) -> tuple[str, ...]:
    def note(what: str) -> None:
        if progress.give_up:
            raise GaveUpError
        progress.at = what

    return stuck.look(note=note)


def _inspect(pids: Iterable[int], progress: Progress) -> dict[int, Server]:
    found: dict[int, Server] = {}
    for pid in pids:
        if progress.give_up:
            raise GaveUpError
        progress.at = f"pid {pid}"
        found[pid] = servers.inspect(pid) or Server(pid, alive=None)
    return found
