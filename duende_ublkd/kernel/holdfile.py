"""The holds, where they outlive the daemon: one file in its run directory, on tmpfs.

A daemon that starts again reads it, and so do the commands that work without one. It is written by the daemon alone, and
believed only when nobody but root, or the user who reads it, can have written it. No file means no holds; a file that is
not understood means that nobody knows what is on hold, which is an error: the reader then holds back. So does an empty
one, in the place of a file that is no longer true and cannot be replaced: what is on hold, the journal knows.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from typing import Any, NoReturn

from duende_ublkd.core.errors import DuendeError
from duende_ublkd.core.holds import Holds
from duende_ublkd.core.text import printable
from duende_ublkd.kernel import ownership, runfile

NAME = "holds.json"
MOST_BYTES = 1 << 20  # core.holds.MOST_HOLDS of the longest fit
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class UnwrittenError(DuendeError):
    """The file is empty: a daemon could not write it."""


def boot_id() -> str:
    """Which boot of the machine this is."""
    try:
        fd = os.open(_BOOT_ID, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            return file.read(64).decode("ascii").strip()
    except (OSError, ValueError) as error:
        raise DuendeError(
            f"cannot read {_BOOT_ID}: {error}, so it cannot be told which holds are in force",
            hint="mount -t proc proc /proc",
        ) from error


def load(directory: str, now: float) -> Holds:
    """The holds that are in force at `now` (CLOCK_MONOTONIC). DuendeError: nobody knows."""
    record = read(directory)
    if record is None:
        return Holds()
    try:
        return Holds.from_record(record, boot_id(), now)
    except ValueError as error:
        _refuse(f"{directory}/{NAME}", f"is {printable(str(error))}", error)


def read(directory: str) -> dict[str, Any] | None:
    """What `write` wrote; None: there is no file. DuendeError: it cannot be had, or not be believed."""
    path = f"{directory}/{NAME}"
    try:
        # O_NONBLOCK: of a FIFO that somebody put there, nobody may ever open the other end.
        with runfile.opened(directory) as there:
            fd = os.open(NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=there)
    except FileNotFoundError:
        return None
    except OSError as error:
        what = "is a symbolic link" if error.errno == errno.ELOOP else f"cannot be opened: {error.strerror}"
        hint = error.__cause__.hint if isinstance(error.__cause__, ownership.Doubt) else ""
        _refuse(path, printable(what, 1000), error, hint)
    try:
        _check_author(path, os.fstat(fd))
        with os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror}", error)
    finally:
        os.close(fd)
    if not data:
        _refuse(path, "is empty: it could not be written", error=UnwrittenError)
    if len(data) > MOST_BYTES:
        _refuse(path, f"is longer than {MOST_BYTES} bytes")
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"is not JSON: {printable(str(error))}", error)
    if not isinstance(record, dict):
        _refuse(path, "is not a record of holds")
    return record


def write(directory: str, record: dict[str, Any]) -> None:
    """Replace the file as a whole. OSError: the old one is still there."""
    # A lone surrogate has no UTF-8, but an escape that JSON understands.
    data = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
    if len(data) > MOST_BYTES:
        raise OSError(errno.EFBIG, f"more than {MOST_BYTES} bytes of holds")
    runfile.replace(directory, NAME, data)


def empty(directory: str) -> None:
    """What `write` could not replace is not true any more. OSError."""
    with runfile.opened(directory) as there:
        os.close(os.open(NAME, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=there))


def _check_author(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        _refuse(path, "is not a regular file")
    if status.st_uid not in (0, os.geteuid()):
        _refuse(path, f"belongs to uid {status.st_uid}, not to root")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        _refuse(path, f"may be written by others than its owner (mode {stat.S_IMODE(status.st_mode):o})")
    if status.st_nlink > 1:
        _refuse(path, "has another name somewhere")


def _refuse(
    path: str, what: str, cause: BaseException | None = None, hint: str = "", error: type[DuendeError] = DuendeError
) -> NoReturn:
    file = printable(path)
    raise error(
        f"{file} {what}, so nobody knows which devices are on hold",
        hint=hint or f"ls -l {file}; to go on with the holds that the journal has: rm {file}",
    ) from cause
