"""Memory that cannot be swapped out: the swap may be on a device that the daemon has to look after.

mlockall(MCL_CURRENT | MCL_FUTURE) makes every page resident at once, untouched ones too, so that threads are kept small
before any is made: their stacks, and glibc's habit of reserving 64 MiB for each thread's allocations. A lock is not
inherited by children (mlock(2)).
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import threading

from duende_ublkd.core.errors import DuendeError

_MCL_CURRENT = 1
_MCL_FUTURE = 2
_M_ARENA_MAX = -8  # <malloc.h>
_STACK = 256 << 10  # bytes; no thread here recurses
_LOCKED = re.compile(rb"^VmLck:\s*(\d+) kB$", re.MULTILINE)


def keep_threads_small() -> None:
    """To be called before the first thread is made."""
    threading.stack_size(_STACK)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none, and no arenas
        libc.mallopt(_M_ARENA_MAX, 1)


def lock_memory() -> None:
    """Lock all memory of this process, now and to come. DuendeError says what limit keeps it from that."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE) == 0:
        return
    number = ctypes.get_errno()
    hint = "ulimit -l unlimited; in a unit: LimitMEMLOCK=infinity, or CAP_IPC_LOCK in its capabilities"
    if number not in (errno.EPERM, errno.ENOMEM, errno.EAGAIN):
        hint = "lock_memory = false"
    raise DuendeError(f"memory cannot be locked: {os.strerror(number)}", hint=hint)


def locked_bytes() -> int:
    """VmLck of /proc/self/status: how much of this process is locked."""
    with open("/proc/self/status", "rb") as status:
        found = _LOCKED.search(status.read())
    return int(found[1]) * 1024 if found else 0
