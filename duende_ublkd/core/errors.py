"""Errors that a person reads: what happened, what to type next, and the exit code.

Exit codes (the contract of every command): 0 done and nothing orphaned is left, 1 something is left, 2 wrong use or
configuration, 3 the kernel's control device is missing or not permitted.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command's exit status says."""

    DONE = 0
    LEFT_OVER = 1
    USAGE = 2
    NO_KERNEL = 3


class DuendeError(Exception):
    """An error with a next step. `str()` is the sentence; `hint` is what to type or look at next."""

    exit_code = ExitCode.LEFT_OVER

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(DuendeError):
    """The command line or a port or path given by the user is wrong."""

    exit_code = ExitCode.USAGE


class ConfigError(UsageError):
    """The configuration cannot be used. The message starts with `FILE:LINE: KEY`."""


class KernelUnavailableError(DuendeError):
    """ublk's control device or io_uring is missing or not permitted here. `no_driver`: so no device can be there."""

    exit_code = ExitCode.NO_KERNEL

    def __init__(self, message: str, *, hint: str = "", no_driver: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.no_driver = no_driver


class CommandError(DuendeError):
    """The kernel answered a control command with an error that the caller has to understand.

    `errno` is the positive error number, `command` the kernel's name of the command.
    """

    def __init__(self, command: str, dev_id: int | None, errno: int, meaning: str) -> None:
        about = "" if dev_id is None else f" on ublk{dev_id}"
        super().__init__(f"{command}{about}: {meaning}")
        self.command = command
        self.dev_id = dev_id
        self.errno = errno
        self.meaning = meaning


class NoSuchDeviceError(CommandError):
    """ENODEV: the id is free, or became free."""


class BusyError(CommandError):
    """EBUSY: somebody has the device."""


class HeldError(BusyError):
    """EBUSY of the disk: mounted, swapped on, open, or claimed by another device."""


class DeviceExistsError(CommandError):
    """EEXIST: the id is taken, or the device was started once already."""


class UnsupportedError(CommandError):
    """EOPNOTSUPP or ENOTSUPP: this kernel does not know the command, or the device lacks the flag for it."""


class NotPermittedError(CommandError):
    """EPERM or EACCES: no CAP_SYS_ADMIN in the first user namespace, or ublks_max is reached."""


class InterruptedCommandError(CommandError):
    """EINTR: a cancelled wait. After DEL_DEV the device *is* deleted; only its id is still held."""


class NotDoneError(DuendeError):
    """It was put on hold at the last moment: nothing was done."""


class CommandOverdueError(DuendeError):
    """A command did not answer by its deadline, nor to its cancellation. The ring still owns it."""

    def __init__(self, command: str, dev_id: int | None, waited: float) -> None:
        about = "" if dev_id is None else f" on ublk{dev_id}"
        super().__init__(f"{command}{about} has not answered for {waited:.3g} s and cannot be cancelled")
        self.command = command
        self.dev_id = dev_id
