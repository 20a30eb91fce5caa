"""Read the journal's file directly, for `events` where no daemon answers; a daemon beside it is not disturbed.

Reading a database in WAL mode takes its log's index, a file beside it, which has to be made where there is none. Where
this user or the file system does not allow that, a copy of the journal is read: nobody can be writing it then.

What somebody else than root or this user may have put there is not believed, and no symbolic link is followed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from duende_ublkd.core.errors import DuendeError
from duende_ublkd.report.store import Record, records_of
from duende_ublkd.report.writer import FILE_NAME, VERSION, readable_text, select_events

if TYPE_CHECKING:
    from collections.abc import Collection

    from duende_ublkd.core.model import EventKind

BUSY = 2.0  # seconds that a lock is waited for; a writer never holds one that keeps readers out for long
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def read_file(
    directory: str,
    *,
    after: int = 0,
    limit: int = 200,
    dev_id: int | None = None,
    kinds: Collection[EventKind] = (),
    since: float | None = None,
) -> list[Record]:
    """The newest `limit` events that match, oldest first. DuendeError says why not, and what to do about it."""
    path = Path(directory).absolute() / FILE_NAME
    wanted: dict[str, Any] = {"after": after, "limit": max(limit, 0), "dev_id": dev_id, "since": since}
    wanted["kinds"] = [kind.value for kind in kinds]
    _check(path)
    try:
        try:
            rows = _rows(path, wanted)
        except sqlite3.OperationalError as error:
            if _code(error) not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
                raise
            rows = _rows_of_copy(path, wanted)
    except OSError as error:
        raise DuendeError(f"{path} cannot be read: {error.strerror}", hint=f"ls -l {path}*") from error
    except sqlite3.DatabaseError as error:
        raise _explained(path, error) from error
    return records_of(reversed(rows))


def _check(path: Path) -> None:
    """That there is a file which may be read and believed, in words for each other case."""
    try:
        with _opened(path) as file:
            file.read(1)
    except FileNotFoundError as error:
        raise DuendeError(
            f"there is no journal in {path.parent} yet",
            hint="the daemon begins it: systemctl status duende-ublkd; another place is state_dir in its configuration",
        ) from error
    except PermissionError as error:
        raise DuendeError(
            f"{path} may not be read by this user", hint="run it as root: sudo duende-ublkd events"
        ) from error
    except OSError as error:
        raise DuendeError(f"{path} cannot be read: {error.strerror}", hint=f"ls -l {path}") from error


def _opened(path: Path) -> BinaryIO:
    """Not waiting for the other end of a FIFO. OSError; DuendeError: it is not what the daemon has written."""
    for place in (path.parent, path):
        about = place.stat() if place == path.parent else place.lstat()
        if why := _why_not_ours(about):
            raise DuendeError(f"{place} is not believed: {why}", hint=f"ls -ld {place}")
    if not stat.S_ISREG(about.st_mode):
        raise DuendeError(f"{path} is not believed: it is no regular file", hint=f"ls -l {path}")
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def _why_not_ours(about: os.stat_result) -> str:
    if about.st_uid not in (0, os.geteuid()):
        return f"it belongs to uid {about.st_uid}"
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not stat.S_ISLNK(about.st_mode):
        return f"it can be written by others (mode {stat.S_IMODE(about.st_mode):04o})"
    return ""


def _rows(path: Path, wanted: dict[str, Any]) -> list[list[Any]]:
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=BUSY, isolation_level=None)
    try:
        connection.text_factory = readable_text
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise DuendeError(
                f"{path} was written by a newer duende-ublkd: version {version}, this one knows {VERSION}",
                hint="read it with the program that the daemon runs from",
            )
        return select_events(connection, wanted)
    finally:
        connection.close()


def _rows_of_copy(path: Path, wanted: dict[str, Any]) -> list[list[Any]]:
    with tempfile.TemporaryDirectory(prefix="duende-ublkd-") as place:
        for suffix in ("", "-wal"):
            with (
                contextlib.suppress(FileNotFoundError),
                _opened(path.with_name(FILE_NAME + suffix)) as source,
                Path(place, FILE_NAME + suffix).open("xb") as copy,
            ):
                shutil.copyfileobj(source, copy)
        return _rows(Path(place) / FILE_NAME, wanted)


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", -1) & 0xFF


def _explained(path: Path, error: sqlite3.DatabaseError) -> DuendeError:
    if _code(error) in _DAMAGED or "no such table" in str(error):
        return DuendeError(
            f"{path} is no journal, or is damaged: {error}",
            hint="the daemon puts a damaged journal aside when it starts; move the file away if there is no daemon",
        )
    if _code(error) == sqlite3.SQLITE_BUSY:
        return DuendeError(f"{path} is locked by somebody else", hint=f"see who has it: fuser -v {path}")
    return DuendeError(f"{path} cannot be read: {error}", hint=f"ls -l {path}*")
