"""The files that a sink names: passwords, tokens, keys, certificates.

Each is read anew for each delivery, so that a renewed one counts at once. A secret that others can read is none, and what
others can write is theirs: such a file is refused, and nothing is sent. Links are followed, since secrets are often handed
over as links; what they lead to is what is judged.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from duende_ublkd.core.text import printable
from duende_ublkd.report.alerts.aside import UndeliveredError

_MOST_SECRET = 16 << 10  # bytes; a token may be a JWT


def read_secret(key: str, path: str) -> bytes:
    """Without the line's end that an editor has put there. `key`: what the configuration calls it."""
    with open(_opened(key, path, is_secret=True), "rb") as file:
        secret = file.read(_MOST_SECRET + 1).rstrip(b"\r\n")
    if not secret:
        raise UndeliveredError(f"{key} {printable(path)} is empty")
    if len(secret) > _MOST_SECRET or b"\n" in secret or b"\r" in secret or b"\0" in secret:
        raise UndeliveredError(f"{key} {printable(path)} is no secret of one line: is it the right file?")
    return secret


def check_file(key: str, path: str, *, is_secret: bool) -> None:
    """For what somebody else reads: who may read and write it."""
    os.close(_opened(key, path, is_secret=is_secret))


def _opened(key: str, path: str, *, is_secret: bool) -> int:
    where = f"{key} {printable(path)}"
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        # Root without capabilities reads what is root's own, and no more.
        with contextlib.suppress(OSError):
            _check(where, printable(path), Path(path).stat(), is_secret=is_secret)
        raise UndeliveredError(f"{where} cannot be read: {error.strerror}") from error
    try:
        _check(where, printable(path), os.fstat(file), is_secret=is_secret)
    except BaseException:
        os.close(file)
        raise
    return file


def _check(where: str, path: str, status: os.stat_result, *, is_secret: bool) -> None:
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode):
        raise UndeliveredError(f"{where} is no regular file")
    if status.st_uid not in (0, os.geteuid()):
        raise UndeliveredError(f"{where} belongs to uid {status.st_uid}: chown root {path}")
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UndeliveredError(f"{where} can be written by others (mode {mode:04o}): chmod go-w {path}")
    if is_secret and mode & stat.S_IROTH:
        raise UndeliveredError(f"{where} can be read by others (mode {mode:04o}): chmod o-r {path}")
