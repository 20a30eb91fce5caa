"""This process as Linux sees it: that it is the only daemon, and what it tells its service manager."""

from __future__ import annotations

import fcntl
import os
import socket

from duende_ublkd.core.errors import DuendeError, UsageError
from duende_ublkd.core.model import Condition
from duende_ublkd.kernel import ownership, runfile
from duende_ublkd.kernel.servers import condition_of

_INFINITE = (1 << 64) - 1  # microseconds, in systemd's way


def make_run_directory(path: str) -> None:
    """Where lock, socket and holds are, made where it is not there. UsageError: it cannot be, or is not root's alone."""
    try:
        os.makedirs(path, mode=0o755, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {path}: {error.strerror}", hint="run the daemon as root") from error
    runfile.check_directory(path)


class SoleDaemon:
    """A lock that one running daemon has; the kernel drops it with the process."""

    def __init__(self, directory: str, *, proc: str = "/proc") -> None:
        """UsageError: another daemon has the lock; DuendeError: one that has been killed and cannot end has it still."""
        path = f"{directory}/lock"
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UsageError(f"cannot open {path}: {error.strerror}", hint="run the daemon as root") from error
        try:
            ownership.check_owner(path, os.fstat(self._fd))
        except ownership.Doubt as doubt:
            os.close(self._fd)
            raise UsageError(f"the lock is not believed: {doubt}", hint=doubt.hint) from doubt
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._fd, 32).strip()
            os.close(self._fd)
            raise _why_locked(path, int(owner) if owner.isdigit() else 0, proc) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Let another daemon start."""
        os.close(self._fd)


def _why_locked(path: str, owner: int, proc: str) -> DuendeError:
    """The kernel drops a lock with the last thread. Of a killed daemon one may sleep in it, on account of a sick disk: its
    follower comes again until that thread has ended, and is not to be given up for wrong use.
    """
    try:
        with open(f"{proc}/{owner}/stat", "rb") as file:
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):
        if owner:
            return DuendeError(
                f"the former daemon (pid {owner}) is gone, and its lock is still held",
                hint=f"see who holds it, most likely a thread that sleeps in the kernel: fuser -v {path}",
            )
        stat = b""
    except OSError:
        stat = b""
    if stat.rpartition(b")")[2].split()[:1] in ([b"Z"], [b"X"]) or condition_of(stat) is Condition.DYING:
        return DuendeError(
            f"the former daemon (pid {owner}) was killed and has not ended: a thread of it sleeps in the kernel",
            hint=f"see where: cat /proc/{owner}/task/*/stack; its lock is free when that thread has ended",
        )
    return UsageError(
        f"another duende-ublkd runs already, as pid {owner or '?'}",
        hint="to see what it does: duende-ublkd list; to stop it: systemctl stop duende-ublkd",
    )


def watchdog_patience() -> float | None:
    """sd_watchdog_enabled(3): the seconds after which the service manager kills a daemon that it has not heard of."""
    microseconds, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if pid and pid != str(os.getpid()):
        return None  # it is meant for whoever has started us
    is_number = microseconds.isascii() and microseconds.isdigit()
    return int(microseconds) / 1e6 if is_number and 0 < int(microseconds) < _INFINITE else None


def tell_service_manager(message: str) -> None:
    """sd_notify(3): `READY=1`, `STATUS=...`. Without a service manager nothing happens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.setblocking(False)
            channel.sendto(message.encode(), address)
    except OSError:
        return  # it restarts, is busy, or forbids it; or no descriptor is left: a status line less, no reason to end
