"""What the machine says of itself, as `doctor` needs it: read, not judged.

Rules:
1. No device node is opened, and none of a ublk device is asked anything: names, numbers and kernel texts alone. A path
   below /dev is looked at by lstat(), which devtmpfs answers from memory; no other path of a mount is touched, since its
   file system may be on a dead disk. So a symbolic link in a path is not followed, and what is behind one is not seen.
2. Of a process, `status`, `limits`, `stat`, `cgroup` and the links below `ns` and `fd` are read. None takes mmap_lock, which
   a process in a page fault on a dead swap holds for ever (`servers` has the reasons).
3. What cannot be read is None, or not there. Nothing here raises for what the machine does.
4. Every read has a bound. The caller gives it a deadline, too: it is made to run in a thread.
"""

# Names and links of /proc and /sys, as text: a Path would only be turned back into one.
# ruff: noqa: PTH110, PTH112, PTH115, PTH116, PTH208

from __future__ import annotations

import contextlib
import os
import re
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from duende_ublkd.core.recovery import PATH
from duende_ublkd.core.text import printable
from duende_ublkd.kernel.holders import Mount, disk_id, mount_of, read_whole, unescape

if TYPE_CHECKING:
    from collections.abc import Iterator

Rdev = tuple[int, int]

UNLIMITED = -1
_SMALL = 1 << 16
_LARGE = 64 << 20  # a mount table; the kernel's own limit is 100,000 mounts
_MODULES = 8 << 20  # modules.dep of a distribution has one
_MOST_SWAPS = 64  # MAX_SWAPFILES is below 32
_DELETED = " (deleted)"  # seq_path's mark of a swap whose disk has gone
_CAP_SYS_PTRACE = 19
_FIRST_USER, _FIRST_PID = "user:[4026531837]", "pid:[4026531836]"  # PROC_*_INIT_INO, part of the ABI since 3.8


@dataclass(frozen=True, slots=True)
class Roots:
    """Where the machine's texts are: a test has trees of its own."""

    proc: str = "/proc"
    sys: str = "/sys"
    dev: str = "/dev"
    modules: str = "/lib/modules"


@dataclass(frozen=True, slots=True)
class Driver:
    """ublk_drv. `is_loaded`: it is there; `is_builtin`: as a part of the kernel; `is_available`: modprobe would find it."""

    is_loaded: bool = False
    is_builtin: bool = False
    is_available: bool | None = None  # None: /lib/modules has no list for this kernel


@dataclass(frozen=True, slots=True)
class Node:
    """A file in /dev, by lstat()."""

    is_char: bool
    mode: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Process:
    """One process. Sizes in bytes; limits are the soft ones, UNLIMITED or None for not known."""

    pid: int
    capabilities: int | None = None  # CapEff
    locked: int | None = None  # VmLck
    resident: int | None = None  # VmRSS
    swapped: int | None = None  # VmSwap
    memlock: int | None = None  # RLIMIT_MEMLOCK
    nofile: int | None = None  # RLIMIT_NOFILE
    files: int | None = None  # descriptors
    tasks: int | None = None  # of its cgroup, and what the cgroup may have
    most_tasks: int | None = None
    namespaces: dict[str, str] = field(default_factory=dict)  # user, pid, mnt
    dev_type: str | None = None  # the file system at its /dev, "" for a directory of its root's

    @property
    def in_first_user_namespace(self) -> bool | None:
        """Whether capabilities are those of the machine."""
        link = self.namespaces.get("user")
        return None if link is None else link == _FIRST_USER

    @property
    def in_first_pid_namespace(self) -> bool | None:
        """Whether it sees every process."""
        link = self.namespaces.get("pid")
        return None if link is None else link == _FIRST_PID


@dataclass(frozen=True, slots=True)
class Swap:
    """A line of /proc/swaps. `ublk`: the ids of the ublk devices that it is on, through whatever lies between."""

    path: str
    is_file: bool
    used: int  # bytes
    is_deleted: bool
    ublk: frozenset[int]


@dataclass(frozen=True, slots=True)
class DaemonLock:
    """The lock of the running daemon. `pid`: what is written in it; `is_held`: None, if that cannot be told."""

    pid: int | None = None
    is_held: bool | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything that was read in one go."""

    release: str
    banner: str  # /proc/version
    signature: str  # /proc/version_signature, which Ubuntu has
    driver: Driver
    control: Node | None
    limit: int | None  # ublks_max
    io_uring_disabled: int | None  # None: before 6.6
    io_uring_group: int | None
    tasks: int | None  # processes and threads of the machine, and how many there can be
    most_tasks: int | None
    hides_processes: str  # what /proc is mounted with that hides some from us: hidepid= or subset=pid
    swaps: tuple[Swap, ...]
    state_on: frozenset[int]  # the ublk devices under the daemon's state_dir
    me: Process | None
    first_mounts: str  # mount namespace of pid 1, "" if not told
    lock: DaemonLock
    daemon: Process | None  # the process that has the lock


def survey(roots: Roots, run_directory: str, state_dir: str) -> Machine:
    """Read it all. Blocks as long as the kernel does."""
    release = _line(f"{roots.proc}/sys/kernel/osrelease") or os.uname().release
    layers = Layers(roots)
    lock = read_lock(roots, run_directory)
    tasks, most_tasks = _tasks_of_machine(roots)
    me = read_process(roots, os.getpid(), name="self")
    return Machine(
        release=release,
        banner=_line(f"{roots.proc}/version"),
        signature=_line(f"{roots.proc}/version_signature"),
        driver=read_driver(roots, release),
        control=_node(f"{roots.dev}/ublk-control"),
        limit=_number(f"{roots.sys}/module/ublk_drv/parameters/ublks_max"),
        io_uring_disabled=_number(f"{roots.proc}/sys/kernel/io_uring_disabled"),
        io_uring_group=_number(f"{roots.proc}/sys/kernel/io_uring_group"),
        tasks=tasks,
        most_tasks=most_tasks,
        hides_processes=_what_hides(roots, me),
        swaps=tuple(read_swaps(roots, layers)),
        state_on=layers.under_path(state_dir),
        me=me,
        first_mounts=_link(f"{roots.proc}/1/ns/mnt"),
        lock=lock,
        daemon=read_process(roots, lock.pid) if lock.pid and lock.is_held else None,
    )


# --- the driver


def read_driver(roots: Roots, release: str) -> Driver:
    """Whether the driver is there, as what, and whether it could be."""
    module = f"{roots.sys}/module/ublk_drv"
    is_loaded = os.path.isdir(module)
    lists = f"{roots.modules}/{release}"
    builtin = _read(f"{lists}/modules.builtin", _MODULES)
    loadable = _read(f"{lists}/modules.dep", _MODULES)
    is_builtin = b"/ublk_drv.ko" in (builtin or b"") or (is_loaded and not os.path.exists(f"{module}/initstate"))
    if builtin is None and loadable is None:
        return Driver(is_loaded, is_builtin)
    return Driver(is_loaded, is_builtin, is_builtin or b"/ublk_drv.ko" in (loadable or b""))


def _node(path: str) -> Node | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return Node(stat.S_ISCHR(found.st_mode), stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid)


# --- processes


def read_process(roots: Roots, pid: int, *, name: str = "") -> Process | None:
    """What is known of a process; None: it has gone. `name`: of its directory, where that is not the number."""
    directory = f"{roots.proc}/{name or pid}"
    status = _read(f"{directory}/status")
    if status is None:
        return None
    limits = _read(f"{directory}/limits") or b""
    tasks, most_tasks = _tasks_of_cgroup(roots, _read(f"{directory}/cgroup") or b"")
    links = {kind: _link(f"{directory}/ns/{kind}") for kind in ("user", "pid", "mnt")}
    return Process(
        pid,
        capabilities=_field(status, b"CapEff", 16),
        locked=_kilobytes(status, b"VmLck"),
        resident=_kilobytes(status, b"VmRSS"),
        swapped=_kilobytes(status, b"VmSwap"),
        memlock=_limit(limits, b"Max locked memory"),
        nofile=_limit(limits, b"Max open files"),
        files=len(_list(f"{directory}/fd")) or None,
        tasks=tasks,
        most_tasks=most_tasks,
        namespaces={kind: link for kind, link in links.items() if link},
        dev_type=_type_at_dev(f"{directory}/mountinfo"),
    )


def find_program(program: str) -> str | None:
    """Where a recovery command's program is; None: nowhere. It asks the file systems that may have it."""
    where = [program] if program.startswith("/") else [f"{directory}/{program}" for directory in PATH.split(":")]
    for path in where:
        with contextlib.suppress(OSError, ValueError):
            if stat.S_ISREG(os.stat(path).st_mode) and os.access(path, os.X_OK):
                return path
    return None


def _type_at_dev(mountinfo: str) -> str | None:
    mounts = _mounts(mountinfo)
    at_dev = (mount.fstype for mount in reversed(mounts) if mount.mountpoint == "/dev")
    return next(at_dev, "") if mounts else None


def _what_hides(roots: Roots, me: Process | None) -> str:
    """CAP_SYS_PTRACE sees through hidepid, and nothing through subset=pid."""
    mounts = _mounts(f"{roots.proc}/self/mountinfo")
    options = next((each.super_options for each in reversed(mounts) if each.mountpoint == "/proc"), "").split(",")
    if "subset=pid" in options:
        return "subset=pid"
    may_trace = me is not None and me.capabilities is not None and me.capabilities >> _CAP_SYS_PTRACE & 1
    hiding = [each for each in options if each.startswith("hidepid=") and each not in {"hidepid=0", "hidepid=off"}]
    return hiding[0] if hiding and not may_trace else ""


def _mounts(path: str) -> list[Mount]:
    lines = (_read(path, _LARGE) or b"").split(b"\n")
    return [mount for line in lines if (mount := mount_of(line)) is not None]


def read_lock(roots: Roots, run_directory: str) -> DaemonLock:
    """Who has the daemon's lock. It is not tried: a daemon that starts at that moment would take us for another one."""
    try:
        file = os.open(f"{run_directory}/lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        return DaemonLock(None, is_held=False if isinstance(error, FileNotFoundError) else None)
    try:
        found, text = os.fstat(file), os.read(file, 32).strip()
    except OSError:
        return DaemonLock()
    finally:
        os.close(file)
    pid = int(text) if text.isdigit() else None
    locks = _read(f"{roots.proc}/locks", _LARGE)
    return DaemonLock(pid, None if locks is None else _is_locked(locks, found, pid))


def _is_locked(locks: bytes, file: os.stat_result, pid: int | None) -> bool:
    """Some file systems show another device in stat() than their locks have; the pid will do there."""
    for line in locks.splitlines():
        parts = line.split()
        if len(parts) < 6 or parts[1] != b"FLOCK":  # noqa: PLR2004 - a line of /proc/locks; a waiter has `->` there
            continue
        major, minor, inode = [*parts[5].split(b":"), b"", b""][:3]
        device = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}".encode()
        if inode == b"%d" % file.st_ino and (device == major + b":" + minor or parts[4] == b"%d" % (pid or 0)):
            return True
    return False


def _tasks_of_cgroup(roots: Roots, cgroup: bytes) -> tuple[int | None, int | None]:
    """How many tasks a process's cgroup has, and may have."""
    for line in cgroup.splitlines():
        hierarchy, _, rest = line.partition(b":")
        controllers, _, path = rest.partition(b":")
        is_pids = b"pids" in controllers.split(b",")
        if (hierarchy != b"0" and not is_pids) or b".." in path:
            continue
        mount = f"{roots.sys}/fs/cgroup" + ("/pids" if is_pids else "")
        directory = f"{mount}{os.fsdecode(path).rstrip('/')}"
        most = _line(f"{directory}/pids.max")
        if most:
            return _number(f"{directory}/pids.current"), UNLIMITED if most == "max" else _number(
                f"{directory}/pids.max"
            )
    return None, None


def _tasks_of_machine(roots: Roots) -> tuple[int | None, int | None]:
    there = re.search(r" [0-9]{1,9}/([0-9]{1,9}) ", _line(f"{roots.proc}/loadavg"))
    limits = [_number(f"{roots.proc}/sys/kernel/{name}") for name in ("pid_max", "threads-max")]
    return int(there[1]) if there else None, min((limit for limit in limits if limit is not None), default=None)


# --- what lies under what


class Layers:
    """Which ublk devices a path or a device is on: through mounts, partitions, dm, md, loop and zram."""

    def __init__(self, roots: Roots) -> None:
        self._roots = roots
        self._mounts = _mounts(f"{roots.proc}/self/mountinfo")

    def under_path(self, path: str) -> frozenset[int]:
        """The ublk devices under a file's file system, by the name of the path alone."""
        return frozenset(self._of_path(path, set()))

    def under_device(self, path: str) -> frozenset[int]:
        """The ublk devices under the block device with this path in /dev."""
        return frozenset(self._of_device(path, set()))

    def _of_path(self, path: str, seen: set[str]) -> Iterator[int]:
        mount = self._mount_of(path)
        if mount is None:
            return
        if mount.rdev[0] != 0:
            yield from self._of_name(self._name_of(mount.rdev), seen)
        else:  # btrfs and bcachefs have no number of their own, and name their disks
            for source in mount.source.split(":"):
                if source.startswith("/dev/"):
                    yield from self._of_device(source, seen)

    def _mount_of(self, path: str) -> Mount | None:
        """Later ones cover earlier ones at the same place."""
        best: Mount | None = None
        for mount in self._mounts:
            place = mount.mountpoint.rstrip("/")
            is_above = path == place or path.startswith(f"{place}/")
            if is_above and (best is None or len(mount.mountpoint) >= len(best.mountpoint)):
                best = mount
        return best

    def _of_device(self, path: str, seen: set[str]) -> Iterator[int]:
        name = path.removesuffix(_DELETED).rpartition("/")[2]
        if disk_id(name) is None and not self._is_disk(name):
            name = self._name_behind(f"{self._roots.dev}{path[4:]}" if path.startswith("/dev/") else "")
        yield from self._of_name(name, seen)

    def _name_behind(self, path: str) -> str:
        """Of a node or a link in /dev with another name than the disk's: /dev/mapper/swap."""
        try:
            found = os.lstat(path)
        except (OSError, ValueError):
            return ""
        if stat.S_ISLNK(found.st_mode):
            return _link(path).rpartition("/")[2]
        return self._name_of((os.major(found.st_rdev), os.minor(found.st_rdev))) if stat.S_ISBLK(found.st_mode) else ""

    def _of_name(self, name: str, seen: set[str]) -> Iterator[int]:
        if not name or name in seen:
            return
        seen.add(name)
        dev_id = disk_id(name)
        if dev_id is not None:
            yield dev_id
            return
        directory = f"{self._roots.sys}/class/block/{name}"
        for below in _list(f"{directory}/slaves"):
            yield from self._of_name(below, seen)
        if os.path.exists(f"{directory}/partition"):
            yield from self._of_name(_link(directory).rpartition("/")[0].rpartition("/")[2], seen)
        if backing := (_read(f"{directory}/loop/backing_file") or b"").removesuffix(b"\n"):
            path = os.fsdecode(backing)
            yield from (self._of_device if path.startswith("/dev/") else self._of_path)(path, seen)
        if (device := _line(f"{directory}/backing_dev")).startswith("/dev/"):
            yield from self._of_device(device, seen)

    def _is_disk(self, name: str) -> bool:
        return bool(name) and os.path.isdir(f"{self._roots.sys}/class/block/{name}")

    def _name_of(self, rdev: Rdev) -> str:
        return _link(f"{self._roots.sys}/dev/block/{rdev[0]}:{rdev[1]}").rpartition("/")[2]


def read_swaps(roots: Roots, layers: Layers) -> Iterator[Swap]:
    """The swaps in use."""
    for line in (_read(f"{roots.proc}/swaps") or b"").split(b"\n")[1 : _MOST_SWAPS + 1]:
        columns = line.split()
        if len(columns) < 4:  # noqa: PLR2004 - name, type, size, used
            continue
        path, is_file = unescape(columns[0]), columns[1] == b"file"
        used = int(columns[3]) * 1024 if columns[3].isdigit() else 0
        under = layers.under_path(path) if is_file else layers.under_device(path)
        yield Swap(printable(path), is_file, used, path.endswith(_DELETED), under)


# --- texts


def _read(path: str, limit: int = _SMALL) -> bytes | None:
    try:
        return read_whole(path, limit)
    except (OSError, ValueError):  # ValueError: a name with a NUL, from the configuration
        return None


def _line(path: str) -> str:
    """The first line, fit to be shown; "" for none."""
    return printable((_read(path) or b"").partition(b"\n")[0], 1000)


def _number(path: str) -> int | None:
    text = (_read(path) or b"").strip()
    return int(text) if re.fullmatch(rb"-?[0-9]{1,19}", text) else None


def _list(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except (OSError, ValueError):
        return ""


def _field(status: bytes, name: bytes, base: int) -> int | None:
    found = re.search(rb"^" + name + rb":\s*([0-9a-f]{1,32})\b", status, re.MULTILINE)
    return int(found[1], base) if found else None


def _kilobytes(status: bytes, name: bytes) -> int | None:
    size = _field(status, name, 10)
    return None if size is None else size * 1024


def _limit(limits: bytes, name: bytes) -> int | None:
    found = re.search(rb"^" + name + rb"\s+([0-9]{1,20}|unlimited)\s", limits, re.MULTILINE)
    if found is None:
        return None
    return UNLIMITED if found[1] == b"unlimited" else int(found[1])
