"""Who sleeps in the kernel on a ublk device's account: what a person needs to know about a command that does not answer.

A thread in an uninterruptible sleep whose kernel stack (/proc/PID/task/TID/stack, which takes CAP_SYS_ADMIN) goes through
ublk_drv or through a disk's opening, scanning or removal. Which device it is about does not show. Of a process that was
killed and cannot end, the threads are still listed.

Reading a stack takes no lock that its owner may hold (proc_pid_stack: exec_update_lock of a task that is in no exec).
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from duende_ublkd.core.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MOST_TOLD = 8
_FRAME = re.compile(rb"^\[<[^>]*>\]\s+([A-Za-z0-9_.]+)\+", re.MULTILINE)
_OF_A_DISK = frozenset(
    (
        b"del_gendisk",
        b"bdev_disk_changed",
        b"blkdev_get_whole",
        b"bdev_open",
        b"bdev_release",
        b"blkdev_put",
        b"bdev_mark_dead",
    )
)
_SMALL_FILE = 16384
_SHOWN_FRAMES = 3


def look(proc: str | Path = "/proc", note: Callable[[str], None] = lambda _: None) -> tuple[str, ...]:
    """A sentence for each such thread, such as `iou-wrk-412 (pid 412) in blk_mq_freeze_queue_wait, del_gendisk,
    ublk_stop_dev`, none of them twice; at most MOST_TOLD. `note(what)` is told what is looked at, and may raise to end
    the look.
    """
    told: dict[str, None] = {}  # several workers of one process sleep in the same place
    for pid in _numbers(f"{proc}"):
        for tid in _numbers(f"{proc}/{pid}/task"):
            note(f"pid {tid}")
            path = f"{proc}/{pid}/task/{tid}"
            comm, _, rest = _read(f"{path}/stat").partition(b"(")[2].rpartition(b")")
            if not rest.lstrip().startswith(b"D"):
                continue
            frames = _FRAME.findall(_read(f"{path}/stack"))
            if where := _where(frames):
                told[f"{printable(comm)} (pid {pid}) in {', '.join(where)}"] = None
                if len(told) == MOST_TOLD:
                    return tuple(told)
    return tuple(told)


def _where(frames: list[bytes]) -> list[str]:
    """The innermost functions and the outermost one that is about ublk or a disk; empty: it is about neither."""
    about = [frame for frame in frames if frame.startswith(b"ublk_") or frame in _OF_A_DISK]
    if not about:
        return []
    shown = dict.fromkeys([*frames[:_SHOWN_FRAMES], about[-1]])
    return [frame.decode("ascii") for frame in shown]


def _numbers(path: str) -> Iterator[int]:
    try:
        names = os.listdir(path)
    except OSError:  # it has ended, or may not be looked at
        return
    yield from sorted(int(name) for name in names if name.isascii() and name.isdigit())


def _read(path: str) -> bytes:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(file, _SMALL_FILE)
    except OSError:
        return b""
    finally:
        os.close(file)
