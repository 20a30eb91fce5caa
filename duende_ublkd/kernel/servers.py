"""Who a pid is, whether it lives, and the moment that it dies.

What is read of a process, and why that cannot hang the reader: `comm`, `exe` and the links below `fd` take a spinlock
or RCU and walk dentries that are in memory; `stat` takes no mmap_lock. `cmdline`, `environ`, `maps`, `map_files` and
`smaps` take mmap_lock, which a process in a page fault on a dead swap device holds for ever: they are never read.
`cgroup` takes cgroup_mutex before Linux 6.8, which a stuck fork can keep: a caller that must not wait has
`holders.Sweeper.inspect` do it.

Alive is what a pidfd says. 'Z' in /proc/PID/stat is also the state of a leader that called pthread_exit() while its
threads go on serving; a pidfd becomes readable only when the whole thread group has gone.

A directory descriptor of /proc/PID names one process for good: once that has gone, reads through it fail, and never
show the next owner of the number.
"""

from __future__ import annotations

import asyncio
import os
import select
from dataclasses import replace
from typing import TYPE_CHECKING

from duende_ublkd.core.model import Condition, Server
from duende_ublkd.core.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

_UNIT_SUFFIXES = (".service", ".scope", ".slice", ".socket", ".mount", ".swap")
_MOST_DESCRIPTORS = 4096
_SMALL_FILE = 65536  # comm is 16 bytes, stat under 1 KiB, cgroup at most a dozen paths
_FLAGS_AFTER_COMM = 6  # fields 9, 22 and 52 of stat, counted from field 3
_STARTTIME_AFTER_COMM = 19
_EXIT_CODE_AFTER_COMM = 49
_PF_EXITING = 0x4


def inspect(pid: int, proc: str | Path = "/proc") -> Server | None:
    """Everything that can be told of a process; None for a number that names none (the kernel's -1, or 0)."""
    if pid <= 0:
        return None
    try:
        directory = os.open(f"{proc}/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # gone, or hidden from us
        return Server(pid, alive=is_alive(pid))
    try:
        known = _read_all(pid, directory)
    finally:
        os.close(directory)
    # Asked last: what was alive after the reads was alive during them.
    return replace(known, alive=is_alive(pid))


def is_alive(pid: int) -> bool | None:
    """False: no such process. None: it cannot be told (no descriptor left, forbidden, or a thread's number)."""
    try:
        pidfd = os.pidfd_open(pid)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return None
    try:
        return not _has_exited(pidfd)
    finally:
        os.close(pidfd)


def unit_of(cgroup: bytes) -> str:
    """The systemd unit in the text of /proc/PID/cgroup: the v2 line's, else the one of v1's name=systemd."""
    paths: dict[bytes, bytes] = {}
    for line in cgroup.split(b"\n"):
        hierarchy, _, rest = line.partition(b":")
        controllers, _, path = rest.partition(b":")
        if (hierarchy == b"0" and not controllers) or controllers == b"name=systemd":
            paths.setdefault(controllers, path)
    return _last_unit(paths.get(b"", b"")) or _last_unit(paths.get(b"name=systemd", b""))


def start_time_of(stat: bytes) -> int:
    """Field 22 of the text of /proc/PID/stat, 0 if not there. The comm before it may hold anything, `) 1 (` too."""
    fields = stat.rpartition(b")")[2].split()
    try:
        return int(fields[_STARTTIME_AFTER_COMM])
    except (IndexError, ValueError):
        return 0


def condition_of(stat: bytes) -> Condition:
    """From the text of /proc/PID/stat. Of a killed process whose threads sleep on in the kernel, io_uring's requests being
    waited for before anything else (do_exit), only the group's exit code tells (field 52, for whoever may ptrace it).
    """
    fields = stat.rpartition(b")")[2].split()
    if len(fields) <= _EXIT_CODE_AFTER_COMM:
        return Condition.WELL
    if fields[0] in (b"T", b"t"):  # whose exit code is the signal that stopped it
        return Condition.STOPPED
    is_exiting = fields[_FLAGS_AFTER_COMM].isdigit() and int(fields[_FLAGS_AFTER_COMM]) & _PF_EXITING
    # A leader that is a zombie may have threads that go on serving.
    if fields[0] != b"Z" and (is_exiting or fields[_EXIT_CODE_AFTER_COMM] != b"0"):
        return Condition.DYING
    return Condition.WELL


def has_ring(process: str | Path) -> bool | None:
    """Whether one of its descriptors is an io_uring; None: that cannot be seen, or it has too many to look at.

    `process`: its directory in /proc; where the leader has exited and has no descriptors any more, that of a thread.
    """
    try:
        names = os.listdir(f"{process}/fd")
    except OSError:
        return None
    if not 0 < len(names) <= _MOST_DESCRIPTORS:
        return None
    for name in names:
        try:
            if os.readlink(f"{process}/fd/{name}") == "anon_inode:[io_uring]":
                return True
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return False


def _read_all(pid: int, directory: int) -> Server:
    comm = _read(directory, "comm").removesuffix(b"\n")
    try:
        exe = os.readlink("exe", dir_fd=directory)
    except OSError:  # a kernel thread or a zombie has none; or not permitted
        exe = ""
    stat = _read(directory, "stat")
    return Server(
        pid,
        alive=None,
        comm=printable(comm),
        exe=printable(exe),
        unit=unit_of(_read(directory, "cgroup")),
        start_time=start_time_of(stat),
        condition=condition_of(stat).value,
    )


def _read(directory: int, name: str) -> bytes:
    try:
        file = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return b""
    try:
        return os.read(file, _SMALL_FILE)
    except OSError:  # ESRCH: it went between the two calls
        return b""
    finally:
        os.close(file)


def _last_unit(path: bytes) -> str:
    for part in reversed(path.removesuffix(b" (deleted)").split(b"/")):
        name = printable(part.removeprefix(b"_"))  # systemd's escape of a unit named like a cgroup file
        if name.endswith(_UNIT_SUFFIXES) and not name.startswith("."):
            return name
    return ""


def _has_exited(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


class DeathWatch:
    """Calls `gone(pid)` in the event loop, once, when a watched process has gone.

    A hint and nothing more: a death that cannot be watched is counted in `lost`, and the next full look sees it. A pid
    is told at most once until another process has it or `keep_only` forgets it: a dead server's number stays in
    GET_DEV_INFO, and a watch that fired again on each look would make the daemon look for ever.
    """

    def __init__(
        self,
        gone: Callable[[int], object],
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        open_pidfd: Callable[[int], int] = os.pidfd_open,
    ) -> None:
        self.lost = 0
        self._gone = gone
        self._loop = loop or asyncio.get_running_loop()
        self._open_pidfd = open_pidfd
        self._watched: dict[int, int] = {}  # pid -> pidfd: names the process, whoever has the number later
        self._told: set[int] = set()
        self._closed = False

    @property
    def watched(self) -> frozenset[int]:
        return frozenset(self._watched)

    def watch(self, pid: int) -> None:
        """Watch one more process; a number that names none, or that is watched, is nothing to do."""
        if pid <= 0 or pid in self._watched or self._closed:
            return
        try:
            pidfd = self._open_pidfd(pid)
        except ProcessLookupError:
            self._tell_soon(pid)
            return
        except (OSError, OverflowError):
            self.lost += 1
            return
        if _has_exited(pidfd):  # a zombie that nobody has reaped
            os.close(pidfd)
            self._tell_soon(pid)
            return
        try:
            self._loop.add_reader(pidfd, self._died, pid)
        except OSError:  # the epoll limit of this user
            os.close(pidfd)
            self.lost += 1
            return
        self._watched[pid] = pidfd

    def keep_only(self, pids: Iterable[int]) -> None:
        """Forget every other process, told or untold."""
        wanted = set(pids)
        for pid in self._watched.keys() - wanted:
            self._drop(pid)
        self._told &= wanted

    def close(self) -> None:
        """Forget all; no call comes after this one, not even one that was already due."""
        self.keep_only(())
        self._closed = True

    def _died(self, pid: int) -> None:
        self._drop(pid)
        self._told.add(pid)
        self._gone(pid)

    def _drop(self, pid: int) -> None:
        pidfd = self._watched.pop(pid)
        self._loop.remove_reader(pidfd)
        os.close(pidfd)

    def _tell_soon(self, pid: int) -> None:
        if pid not in self._told:
            self._told.add(pid)
            self._loop.call_soon(self._tell, pid)

    def _tell(self, pid: int) -> None:
        if pid in self._told:
            self._gone(pid)
