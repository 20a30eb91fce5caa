"""Small files in the run directory, which is on tmpfs: what a restarted daemon has to know whatever the disks do.

A file is replaced as a whole, and synced never: it does not have to outlive the machine, whose next boot has other devices.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from typing import Any

RECORDS = "devices"  # a directory with one file for each device
_MOST_RECORD = 64 << 10  # bytes


def replace(directory: str, name: str, data: bytes) -> None:
    """Write a file that anybody may read. OSError: the old one is still there."""
    there = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _write_new(there, f".{name}", data)
        os.rename(f".{name}", name, src_dir_fd=there, dst_dir_fd=there)
    finally:
        os.close(there)


def _write_new(there: int, name: str, data: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=there)  # of a daemon that was killed while it wrote
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=there)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(fd, 0o644)  # whatever the umask is
    except BaseException:
        os.unlink(name, dir_fd=there)
        raise


def save_record(directory: str, dev_id: int, record: dict[str, Any] | None) -> None:
    """Keep what is known of a device; None: it is gone. OSError."""
    where = f"{directory}/{RECORDS}"
    if record is None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{where}/{dev_id}.json")
        return
    data = json.dumps(record).encode()
    try:
        replace(where, f"{dev_id}.json", data)
    except FileNotFoundError:
        os.mkdir(where, 0o755)
        replace(where, f"{dev_id}.json", data)


def load_records(directory: str) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """What a former daemon kept, and what of it cannot be believed."""
    where, found, doubts = f"{directory}/{RECORDS}", {}, []
    try:
        names = os.listdir(where)
    except FileNotFoundError:
        return {}, []
    except OSError as error:
        return {}, [f"{where}: {error.strerror}"]
    for name in sorted(names):
        number = name.removesuffix(".json")
        if name.endswith(".json") and number.isascii() and number.isdigit():
            try:
                found[int(number)] = _read_record(f"{where}/{name}")
            except (OSError, ValueError, RecursionError) as error:
                doubts.append(f"{where}/{name}: {error}")
    return found, doubts


def _read_record(path: str) -> dict[str, Any]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        ours = status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not stat.S_ISREG(status.st_mode) or not ours:
            raise PermissionError(errno.EPERM, "others may have written it")
        record = json.loads(file.read(_MOST_RECORD))
    if not isinstance(record, dict):
        raise ValueError("not a record")  # noqa: TRY004 - of what was read, not of a caller
    return record
