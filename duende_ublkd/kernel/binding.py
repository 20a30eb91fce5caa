"""io_uring through liburing, and a ring for a process that may wait; the only file that imports liburing.

liburing 2024.5.3 knows no 128-byte entries: a second mapping of them is written to instead. Its entries are handed out
in order, so that the n-th one lies at (n & mask) * 128. Only its compiled parts are loaded: the package's own __init__
scans site-packages and writes a cache there, which fails where /usr is read-only, and costs 4 MiB and most of the time.

The nursery's children load this file too and keep its memory locked, so it imports nothing that is not small: no
dataclasses, no typing, and not `abi` either. The few numbers that it would take from there are its own.

A ring is made disabled, and enabled by `confine`, which has the kernel take nothing but the named operations from then
on, for whoever has the descriptor, and no registration at all. What these restrictions cannot tell is which command an
URING_CMD carries, nor to which file it goes: any file that knows commands would take any of its own. That no other one
is sent to is the doing of this package alone, which opens /dev/ublk-control for them and nothing else.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import importlib.util
import mmap
import os
import sys
import types

TYPE_CHECKING = False  # typing costs half a MiB
if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import liburing

SETUP_SQE128 = 1 << 10
_SETUP_R_DISABLED = 1 << 6  # since 5.10
_OP_URING_CMD = 46
_REGISTER_RESTRICTIONS, _REGISTER_ENABLE_RINGS = 11, 12
_RESTRICTION_SQE_OP = 1
_SIZEOF_RESTRICTION = 16  # u16 what, u8 which, and zeroes
_NR_IO_URING_REGISTER = 427  # on every architecture; liburing 2024.5.3 does not know how to enable a ring
OFF_SQES = 0x1000_0000
SQE_SIZE = 128
_FD_AT = slice(4, 8)  # where an entry has its descriptor
_ENTRIES = 4  # the kernel gives a ring as many workers as it has entries, and one of them may be stuck


def _part_of_binding(name: str) -> types.ModuleType:
    if "liburing" not in sys.modules:
        spec = importlib.util.find_spec("liburing")
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError("No module named 'liburing'", name="liburing")
        package = types.ModuleType("liburing")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["liburing"] = package
    return importlib.import_module(f"liburing.{name}")


queue, register = _part_of_binding("queue"), _part_of_binding("register")
_syscall = ctypes.CDLL(None, use_errno=True)["syscall"]
_errno = ctypes.CDLL(None)["__errno_location"]
_errno.restype = ctypes.POINTER(ctypes.c_int)


def location() -> str:
    """The directory of sys.path that liburing was found in."""
    return os.path.dirname(sys.modules["liburing"].__path__[0])  # noqa: PTH120 - pathlib costs another half MiB


def checked(call: Callable[..., int], *arguments: object) -> int:
    """Call into liburing with a clean C errno: the binding believes a stale one over the error it was given."""
    _errno()[0] = 0
    return call(*arguments)


def set_up(entries: int) -> liburing.io_uring:
    """A ring with 128-byte entries, of no use before `confine`; OSError, which `why_no_ring` explains."""
    ring = queue.io_uring()
    checked(queue.io_uring_queue_init, entries, ring, SETUP_SQE128 | _SETUP_R_DISABLED)
    return ring


def confine(ring_fd: int, operations: Collection[int]) -> bool:
    """Enable a ring for these operations alone; False: for any, since this kernel cannot restrict it. OSError."""
    restrictions = b"".join(
        _RESTRICTION_SQE_OP.to_bytes(2, sys.byteorder) + bytes([operation]).ljust(_SIZEOF_RESTRICTION - 2, b"\0")
        for operation in operations
    )
    is_confined = not _register(ring_fd, _REGISTER_RESTRICTIONS, restrictions, len(operations))
    if number := _register(ring_fd, _REGISTER_ENABLE_RINGS, None, 0):
        raise OSError(number, os.strerror(number))
    return is_confined


def _register(ring_fd: int, what: int, argument: bytes | None, count: int) -> int:
    """The errno of io_uring_register(2)."""
    answer = _syscall(
        ctypes.c_long(_NR_IO_URING_REGISTER),
        ctypes.c_uint(ring_fd),
        ctypes.c_uint(what),
        ctypes.c_char_p(argument),
        ctypes.c_uint(count),
    )
    return ctypes.get_errno() if answer < 0 else 0


def map_entries(ring_fd: int, entries: int) -> mmap.mmap:
    """The submission entries in their true size."""
    return mmap.mmap(ring_fd, entries * SQE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=OFF_SQES)


def why_no_ring(number: int) -> tuple[str, str]:
    """What the errno of io_uring_setup means, and what to type next."""
    if number == errno.EPERM:
        return (
            "io_uring is disabled on this machine (kernel.io_uring_disabled)",
            "sysctl kernel.io_uring_disabled=0  # or 1 with this group in kernel.io_uring_group",
        )
    if number == errno.ENOSYS:
        return "this kernel has no io_uring", "use a kernel with CONFIG_IO_URING, 6.0 or newer"
    if number == errno.EINVAL:
        return "this kernel's io_uring has no 128-byte entries", "use kernel 6.0 or newer; see: uname -r"
    if number == errno.ENOMEM:
        return "no memory may be locked for an io_uring ring", "raise the limit: ulimit -l unlimited"
    return f"io_uring cannot be set up: {os.strerror(number)}", "look at: dmesg | tail"


class WaitingRing:
    """A ring of a process that waits for each command, for as long as the kernel takes. OSError when it cannot be.

    It carries nothing but URING_CMD; `is_confined` False: this kernel cannot restrict it.
    """

    def __init__(self) -> None:
        self._ring = set_up(_ENTRIES)
        try:
            self.is_confined = confine(self._ring.ring_fd, (_OP_URING_CMD,))
            self._entries = map_entries(self._ring.ring_fd, _ENTRIES)
        except OSError:
            queue.io_uring_queue_exit(self._ring)
            raise
        self._cqe = queue.io_uring_cqe()
        self._tail = 0

    def perform(self, fd: int, entry: bytes) -> int:
        """Send one packed entry, with `fd` in it, and wait: the completion's result."""
        place = (self._tail % _ENTRIES) * SQE_SIZE
        self._tail += 1
        queue.io_uring_get_sqe(self._ring)
        packed = bytearray(entry)
        packed[_FD_AT] = fd.to_bytes(4, sys.byteorder)
        self._entries[place : place + SQE_SIZE] = bytes(packed)
        self._submit()
        self._wait()
        result = int(self._cqe.res)
        queue.io_uring_cq_advance(self._ring, 1)
        return result

    def close(self) -> None:
        """Give it back; what the kernel has not answered goes on in there."""
        self._entries.close()
        queue.io_uring_queue_exit(self._ring)

    def _submit(self) -> None:
        while True:
            try:
                checked(queue.io_uring_submit, self._ring)
            except InterruptedError:
                continue
            return

    def _wait(self) -> None:
        """A stop and continue of the process interrupts the wait, although no handler has run."""
        while (answer := queue.io_uring_wait_cqe(self._ring, self._cqe)) < 0:
            if answer != -errno.EINTR:
                raise OSError(-answer, os.strerror(-answer))
