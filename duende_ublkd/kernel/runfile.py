"""Small files in the run directory, which is on tmpfs: what a restarted daemon has to know whatever the disks do.

A file is replaced as a whole, and synced never: it does not have to outlive the machine, whose next boot has other devices.
Nothing is read from, or written to, a directory that others can write or that a symbolic link stands for; what is read is
a regular file, with this one name, that nobody else can have written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.errors import UsageError
from duende_ublkd.core.text import printable
from duende_ublkd.kernel import ownership

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORDS = "devices"  # a directory with one file for each device
_MOST_RECORD = 64 << 10  # bytes


def check_directory(path: str) -> None:
    """UsageError: others may put things into the run directory, or another one in its place."""
    try:
        ownership.Trust().check(path)
        os.close(ownership.open_directory(path))
    except ownership.Doubt as doubt:
        raise UsageError(f"the run directory: {printable(str(doubt), 1000)}", hint=doubt.hint) from doubt
    except OSError as error:
        where = printable(path)
        raise UsageError(
            f"the run directory {where} cannot be used: {error.strerror}", hint=f"ls -ld {where}"
        ) from error


@contextlib.contextmanager
def opened(directory: str, below: str = "") -> Iterator[int]:
    """A descriptor of the run directory, or of one in it. OSError: there is none, or others can write it."""
    try:
        there = ownership.open_directory(directory)
        if below:
            try:
                inner = ownership.open_directory(below, dir_fd=there)
            finally:
                os.close(there)
            there = inner
    except ownership.Doubt as doubt:
        raise PermissionError(errno.EPERM, str(doubt)) from doubt
    try:
        yield there
    finally:
        os.close(there)


def replace(directory: str, name: str, data: bytes) -> None:
    """Write a file that anybody may read. OSError: the old one is still there."""
    with opened(directory) as there:
        _replace(there, name, data, 0o644)


def _replace(there: int, name: str, data: bytes, mode: int) -> None:
    _write_new(there, f".{name}", data, mode)
    os.rename(f".{name}", name, src_dir_fd=there, dst_dir_fd=there)


def _write_new(there: int, name: str, data: bytes, mode: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=there)  # of a daemon that was killed while it wrote
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=there)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(fd, mode)  # whatever the umask is
    except BaseException:
        os.unlink(name, dir_fd=there)
        raise


def save_record(directory: str, dev_id: int, record: dict[str, Any] | None) -> None:
    """Keep what is known of a device; None: it is gone. OSError."""
    name = f"{dev_id}.json"
    if record is None:
        with contextlib.suppress(FileNotFoundError), opened(directory, RECORDS) as there:
            os.unlink(name, dir_fd=there)
        return
    data = json.dumps(record).encode()
    if len(data) > _MOST_RECORD:
        raise OSError(errno.EFBIG, f"more than {_MOST_RECORD} bytes of a device")
    try:
        with opened(directory, RECORDS) as there:
            _replace(there, name, data, 0o600)
    except FileNotFoundError:
        with opened(directory) as there:
            os.mkdir(RECORDS, 0o700, dir_fd=there)
        with opened(directory, RECORDS) as there:
            _replace(there, name, data, 0o600)


def load_records(directory: str) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """What a former daemon kept, and what of it cannot be believed."""
    where, found, doubts = f"{directory}/{RECORDS}", {}, []
    try:
        with opened(directory, RECORDS) as there:
            for name in sorted(os.listdir(there)):
                number = name.removesuffix(".json")
                if name.endswith(".json") and number.isascii() and number.isdigit():
                    try:
                        found[int(number)] = _read_record(there, name)
                    except (OSError, ValueError, RecursionError) as error:
                        doubts.append(f"{where}/{name}: {error}")
    except FileNotFoundError:
        return {}, []
    except OSError as error:
        return {}, [f"{where}: {error.strerror}"]
    return found, doubts


def _read_record(there: int, name: str) -> dict[str, Any]:
    # O_NONBLOCK: of a FIFO nobody may ever open the other end.
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=there)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        try:
            ownership.check_owner(name, status)
        except ownership.Doubt as doubt:
            raise PermissionError(errno.EPERM, f"others may have written it: {doubt}") from doubt
        if not stat.S_ISREG(status.st_mode):
            raise PermissionError(errno.EPERM, "it is no regular file")
        record = json.loads(file.read(_MOST_RECORD + 1))
    if not isinstance(record, dict):
        raise ValueError("not a record")  # noqa: TRY004 - of what was read, not of a caller
    return record
