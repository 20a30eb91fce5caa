"""Memory that cannot be swapped out: the swap may be on a device that the daemon has to look after.

mlockall(MCL_CURRENT | MCL_FUTURE) makes every page resident at once, untouched ones too, so that threads are kept small
before any is made: their stacks, and glibc's habit of reserving 64 MiB for each thread's allocations. A lock is not
inherited by children (mlock(2)).

Where memory is short, an allocation reclaims some, and may wait for a page to be written to the swap: for ever, if that
is on a device without a server. PR_SET_IO_FLUSHER (5.6) has this process reclaim without I/O. It is per thread, goes on to
threads and children made later, and through execve(2): a recovery command has it, too, as a server of a disk should.

The garbage collector looks at everything at now and then, which takes tens of milliseconds: what was there at the start is
there to the end, and is not looked at again.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import re
import threading

from duende_ublkd.core.errors import DuendeError

_MCL_CURRENT = 1
_MCL_FUTURE = 2
_PR_SET_IO_FLUSHER = 57  # <linux/prctl.h>
_M_ARENA_MAX = -8  # <malloc.h>
_STACK = 256 << 10  # bytes; no thread here recurses
OOM_SCORE = -900  # that of deploy/duende-ublkd.service
_LOCKED = re.compile(rb"^VmLck:\s*(\d+) kB$", re.MULTILINE)


def keep_threads_small() -> None:
    """To be called before the first thread is made."""
    threading.stack_size(_STACK)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none, and no arenas
        libc.mallopt(_M_ARENA_MAX, 1)


def reclaim_without_io() -> bool:
    """To be called before the first thread is made. False: not permitted (CAP_SYS_RESOURCE), or an older kernel."""
    return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0)


def spare_from_oom() -> None:
    """Be among the last to be killed for want of memory, unless somebody has chosen otherwise; needs CAP_SYS_RESOURCE."""
    try:
        with open("/proc/self/oom_score_adj", "r+b", buffering=0) as file:
            if int(file.read()) == 0:
                file.write(b"%d" % OOM_SCORE)
    except (OSError, ValueError):
        return  # not permitted, or no such file: then as everybody


def keep_what_is_there() -> None:
    """Everything is imported and made: no collection looks at it again."""
    gc.collect()
    gc.freeze()


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
