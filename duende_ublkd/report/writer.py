"""The journal's writer: the one program that touches the journal's disk, run as a child of the daemon.

A disk may never answer, and whoever waits for it then cannot be killed. So it is this process that waits; the daemon
talks to it over a socket, on its stdin. It is started as a file of its own, knows nothing of the rest of the package,
and ends when the daemon has closed the socket and everything that was sent is written.

Messages are JSON, one per packet of at most 64 KiB. A request is `{"id", "do": "open" | "write" | "read", …}`; each
answer carries its id; `"more": true` says that another answer follows, `"error"` is a sentence for people.

How the file is kept, and why:
- WAL: readers and the writer never wait for each other, and a reader that may not write can read what a crash left,
  which a rollback journal would first have to be rolled back for. Its price, a log that grows while somebody reads
  without end, is bounded: it is emptied early, and past its limit nothing is written until that reader has gone.
- synchronous=FULL: what is acknowledged is on the disk. The last line before a kernel crash is the one that matters, and
  nobody but this process waits for it. With NORMAL it would be lost, in WAL mode without any damage to tell of it.
- Pages of deleted events are used again; auto_vacuum=INCREMENTAL gives back what a smaller limit leaves over.
- The directory and the files are this user's alone, and no symbolic links; nobody else can put others in their place. Else
  nothing is read and nothing written, which the daemon tells; it goes on in memory.
- A damaged file is put aside, one of a newer version is left alone. A lock of SQLite's ends with any descriptor of the
  file that this process closes (fcntl(2)), so the file is never opened beside its connection.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sqlite3
import stat
import sys
import time

TYPE_CHECKING = False  # typing itself would be a tenth of this program's start
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

FILE_NAME = "journal.sqlite"
VERSION = 1  # PRAGMA user_version
COLUMNS = "seq, at, kind, level, dev_id, text, facts"

_SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE events(
  seq INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, level TEXT NOT NULL,
  dev_id INTEGER, text TEXT NOT NULL, facts TEXT);
CREATE INDEX events_of_device ON events(dev_id) WHERE dev_id IS NOT NULL;
CREATE TABLE state(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
PRAGMA user_version = 1;
COMMIT;
"""
_PRAGMAS = (
    "auto_vacuum = INCREMENTAL",  # has a meaning before the first table only
    "journal_mode = WAL",
    "wal_autocheckpoint = 0",
    "synchronous = FULL",
    "secure_delete = OFF",
    "cache_size = -512",  # KiB
)
_MAGIC = b"SQLite format 3\0"
_HEADER = 100  # bytes; user_version is at 60, big-endian
_SUFFIXES = ("", "-wal", "-shm")
_DAMAGED_KEPT = 2
_BUSY_MS = 1000  # that a lock of somebody else's is waited for
_SMALLEST = 1 << 20  # bytes; below, the log alone would be more than that
_MOST_RESERVED = 8 << 20  # bytes of max_bytes that are not for the database: its log, and the log's index
_STEP = 200  # events deleted at once
_STEPS_PER_WRITE = 5  # twenty times what a batch brings at most, so that deleting always catches up
_VACUUM_STEP = 64  # pages
_IDLE_MS = 60_000
_PACKET = 60 << 10
_LONGEST_ROW = 48 << 10
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # a service manager and a terminal send them to all of us


class DamagedError(Exception):
    """The file is no journal; `str()` says what it is."""


class RefusedError(Exception):
    """The directory or the file may not be used, or not now; `str()` is the sentence."""


def select_events(connection: sqlite3.Connection, wanted: dict[str, Any]) -> list[list[Any]]:
    """The newest rows that match, newest first. Keys of `wanted`: after, limit, dev_id, kinds, since."""
    conditions, values = ["seq > ?"], [wanted.get("after", 0)]
    if wanted.get("dev_id") is not None:
        conditions.append("dev_id = ?")
        values.append(wanted["dev_id"])
    if kinds := list(wanted.get("kinds") or ()):
        conditions.append(f"kind IN ({', '.join('?' * len(kinds))})")
        values += kinds
    if wanted.get("since") is not None:
        conditions.append("at >= ?")
        values.append(wanted["since"])
    query = f"SELECT {COLUMNS} FROM events WHERE {' AND '.join(conditions)} ORDER BY seq DESC LIMIT ?"  # noqa: S608 - names of our own
    return [list(row) for row in connection.execute(query, [*values, wanted.get("limit", 200)])]


def readable_text(raw: bytes) -> str:
    """For `text_factory`: a file that somebody has edited may hold any bytes."""
    return raw.decode("utf-8", "replace")


class Database:
    """The file, opened when it is needed and opened anew after trouble."""

    def __init__(self, directory: str, max_age: float, max_bytes: int) -> None:
        self._directory = directory = directory.rstrip("/") or "/"  # with a slash, lstat() would follow a link
        self._path = f"{directory}/{FILE_NAME}"
        self._max_age = max_age
        self._max_bytes = max(max_bytes, _SMALLEST)
        self._reserved = min(self._max_bytes // 2, _MOST_RESERVED)
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._state_in_log = False
        self.notes: list[str] = []  # what happened to the file, for the next answer
        self.is_new = False  # nothing of what was written before is in it; for the next answer

    def opened(self) -> sqlite3.Connection:
        """The connection, to the file that is there now."""
        if self._connection and self._file != _identity(self._path):
            self.close()
            self.notes.append(f"{self._path} was removed or replaced while it was in use")
        if self._connection is None:
            self._check_directory()
            self._check_file()
            self._connection = self._connect()
            self._file = _identity(self._path)
        return self._connection

    def close(self) -> None:
        """Give the file back; what its log holds goes into it, if that can be."""
        if self._connection:
            connection, self._connection = self._connection, None
            connection.close()

    def last_seq(self) -> int:
        """Of all that was ever written, as far as it is still there."""
        (found,) = self.opened().execute("SELECT max(seq) FROM events").fetchone()
        return int(found or 0)

    def state(self) -> list[list[Any]]:
        """All of it, by key."""
        return [list(row) for row in self.opened().execute("SELECT key, value FROM state ORDER BY key")]

    def as_it_lies(self) -> tuple[int, list[list[Any]]]:
        """The last seq and the state, where opening the file fails because nothing can be written beside it.

        Without its log, so it may be some events old; the state is checkpointed each time.
        """
        path = self._path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        connection = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
        try:
            connection.text_factory = readable_text
            (last,) = connection.execute("SELECT max(seq) FROM events").fetchone()
            return last or 0, [list(row) for row in connection.execute("SELECT key, value FROM state ORDER BY key")]
        finally:
            connection.close()

    def write(self, events: list[list[Any]], state: list[list[Any]]) -> None:
        """All or nothing. An event that is there already stays as it is: its batch came twice."""
        connection = self.opened()
        self._empty_log(self._reserved // 2)
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.executemany("INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", events)
            for key, value in state:
                if value is None:
                    connection.execute("DELETE FROM state WHERE key = ?", (key,))
                else:
                    connection.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (key, value))
            for _ in range(_STEPS_PER_WRITE):
                if not self._delete_for_size():
                    break
            self._give_back(4 * _VACUUM_STEP)
            connection.execute("COMMIT")
            self._state_in_log = self._state_in_log or bool(state)
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def read(self, wanted: dict[str, Any]) -> list[list[Any]]:
        """The newest rows that match, newest first; by the deadline in `wanted`, or an error."""
        connection = self.opened()
        until = time.monotonic() + wanted["deadline"]
        connection.set_progress_handler(lambda: time.monotonic() > until, 10_000)
        try:
            return select_events(connection, wanted)
        finally:
            connection.set_progress_handler(None, 0)

    def tidy(self) -> bool:
        """One small step of housekeeping; returns whether there is more of it."""
        if self._connection is None or self._file != _identity(self._path):
            return False
        deleted = self._delete_old() or self._delete_for_size()
        given_back = self._give_back(_VACUUM_STEP)
        if self._state_in_log or self._log_size() > self._reserved // 4:
            self._checkpoint(wait=False)
        return deleted or given_back

    def rest(self) -> None:
        """Nothing happens for a while: put everything into the one file."""
        if self._connection and self._file == _identity(self._path) and self._log_size():
            self._checkpoint()

    def put_aside(self, why: str) -> None:
        """Keep the damaged file under another name, and make room for a new one."""
        try:
            self.close()
        except sqlite3.Error:
            self._connection = None  # it is damaged: that its log cannot be written into it is no news
        prefix = f"{FILE_NAME}.corrupt-"
        names = [name.removeprefix(prefix) for name in os.listdir(self._directory) if name.startswith(prefix)]
        numbers = sorted(int(name) for name in names if name.isdigit())
        new = f"{self._path}.corrupt-{numbers[-1] + 1 if numbers else 1}"
        for suffix in _SUFFIXES:
            with contextlib.suppress(FileNotFoundError):
                os.rename(self._path + suffix, new + suffix)
        for number in numbers[: -_DAMAGED_KEPT + 1]:
            for suffix in _SUFFIXES:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{self._path}.corrupt-{number}{suffix}")
        self.notes.append(f"{self._path} is damaged ({why}) and kept as {new}; a new journal is begun")

    def describe(self, error: Exception) -> str:
        """One sentence, with the cause that SQLite's own words may hide."""
        what = (isinstance(error, OSError) and error.strerror) or str(error)
        if isinstance(error, sqlite3.OperationalError):
            what += self._cause(what)
        if isinstance(error, RefusedError):
            return str(error)
        return f"the journal in {self._directory} cannot be used: {what}"

    def _cause(self, what: str) -> str:
        try:
            about = os.statvfs(self._directory)
        except OSError as error:
            return f" ({error.strerror})"
        if about.f_flag & os.ST_RDONLY:
            return " (its file system is read-only)"
        return " (its disk is full)" if not about.f_bavail and "full" not in what else ""

    # --- opening ----------------------------------------------------------------------------------------------------

    def _check_directory(self) -> None:
        if not os.path.lexists(self._directory):
            os.makedirs(self._directory, 0o700, exist_ok=True)
        about = os.lstat(self._directory)
        if stat.S_ISLNK(about.st_mode):
            raise RefusedError(f"{self._directory} is a symbolic link: write what it leads to as state_dir")
        if not stat.S_ISDIR(about.st_mode):
            raise RefusedError(f"{self._directory} is no directory: write another one as state_dir, or remove it")
        _check_owner(self._directory, about)
        for path in _ways_to(self._directory):
            _check_way(path)

    def _check_file(self) -> None:
        """Nothing is changed until it is known to be ours. The directory is ours alone: no race with a stranger."""
        for path in (self._path + suffix for suffix in _SUFFIXES):
            try:
                about = os.lstat(path)
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(about.st_mode):
                kind = "a symbolic link" if stat.S_ISLNK(about.st_mode) else "no regular file"
                raise RefusedError(f"{path} is {kind}: nothing is written through it; rm {path}")
            _check_owner(path, about)
            if about.st_nlink > 1:
                raise RefusedError(
                    f"{path} has another name somewhere, where it may be read or written: mv {path} aside"
                )
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(file, 0o600)  # SQLite gives its log the same mode
            header = os.read(file, _HEADER)
        finally:
            os.close(file)
        self.is_new = self.is_new or not header
        if header and not header.startswith(_MAGIC):
            self.put_aside("it is no database")
            self._check_file()
            return
        self._check_version(int.from_bytes(header[60:64], "big"))

    def _check_version(self, version: int) -> None:
        if version > VERSION:
            raise RefusedError(
                f"{self._path} has version {version}, this program knows {VERSION}: it is left alone; move it away"
            )

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=_BUSY_MS / 1000, isolation_level=None, cached_statements=32)
        try:
            connection.text_factory = readable_text
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            self._check_version(version)
            _check_tables(connection, version)
            for pragma in _PRAGMAS:
                connection.execute(f"PRAGMA {pragma}")
            if not version:
                connection.executescript(_SCHEMA)
        except BaseException:
            connection.close()
            raise
        return connection

    # --- size and age -----------------------------------------------------------------------------------------------

    def _pragma(self, name: str) -> int:
        return int(self.opened().execute(f"PRAGMA {name}").fetchone()[0])

    def _most_pages(self) -> int:
        return (self._max_bytes - self._reserved) // self._pragma("page_size")

    def _delete_for_size(self) -> bool:
        used = self._pragma("page_count") - self._pragma("freelist_count")
        if used <= self._most_pages():
            return False
        oldest = "DELETE FROM events WHERE seq IN (SELECT seq FROM events ORDER BY seq LIMIT ?)"
        return self.opened().execute(oldest, (_STEP,)).rowcount > 0

    def _delete_old(self) -> bool:
        """Of the oldest some, those whose time is over: one that a wrong clock dated ahead keeps nothing behind it."""
        if self._max_age <= 0:
            return False
        oldest = "SELECT seq FROM (SELECT seq, at FROM events ORDER BY seq LIMIT ?) WHERE at < ?"
        found = self.opened().execute(oldest, (_STEP, time.time() - self._max_age)).fetchall()
        if not found:
            return False
        marks = ", ".join("?" * len(found))
        delete = f"DELETE FROM events WHERE seq IN ({marks})"  # noqa: S608 - question marks
        self.opened().execute(delete, [seq for (seq,) in found])
        return True

    def _give_back(self, most: int) -> bool:
        """Shorten the file where it has free pages above its limit."""
        over = min(self._pragma("page_count") - self._most_pages(), self._pragma("freelist_count"), most)
        if over <= 0:
            return False
        before = self._pragma("page_count")
        self.opened().execute(f"PRAGMA incremental_vacuum({over})").fetchall()
        return self._pragma("page_count") < before

    def _log_size(self) -> int:
        try:
            return os.stat(self._path + "-wal").st_size
        except FileNotFoundError:
            return 0

    def _checkpoint(self, *, wait: bool = True) -> None:
        """As much of it as the readers of the moment allow; `wait`: for them to go."""
        self._state_in_log = False
        connection = self.opened()
        connection.execute(f"PRAGMA busy_timeout = {_BUSY_MS if wait else 0}")
        try:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            connection.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")

    def _empty_log(self, most: int) -> None:
        if self._log_size() <= most:
            return
        self._checkpoint()
        if self._log_size() > most:
            raise RefusedError(f"somebody reads {self._path} without end, so its log cannot be emptied: see fuser")


def _check_owner(path: str, about: os.stat_result) -> None:
    """Of the directory and the files in it: nobody else's, not even root's, who may have left them by mistake."""
    if about.st_uid != os.geteuid():
        raise RefusedError(f"{path} belongs to uid {about.st_uid}: chown {os.geteuid()} {path}")
    if about.st_mode & 0o022:
        mode = stat.S_IMODE(about.st_mode)
        raise RefusedError(f"{path} can be written by others (mode {mode:04o}): chmod go-w {path}")


def _ways_to(directory: str) -> Iterator[str]:
    """What is above it, as it is written and as it really lies."""
    for path in {directory, os.path.realpath(directory)}:
        while path != "/":
            path = os.path.dirname(path)  # noqa: PLW2901 - upwards
            yield path


def _check_way(path: str) -> None:
    """Who can write a directory can put another one in the place of what is in it, unless it is sticky."""
    about = os.lstat(path)
    if about.st_uid not in (0, os.geteuid()):
        raise RefusedError(f"{path} belongs to uid {about.st_uid}: chown -h root {path}")
    if stat.S_ISLNK(about.st_mode) or about.st_mode & stat.S_ISVTX:
        return
    if about.st_mode & stat.S_IWOTH or (about.st_mode & stat.S_IWGRP and about.st_gid != 0):
        mode = stat.S_IMODE(about.st_mode)
        raise RefusedError(f"{path} can be written by others (mode {mode:04o}): chmod go-w {path}")


def _check_tables(connection: sqlite3.Connection, version: int) -> None:
    """Before anything is changed: that they are ours, or that there are none."""
    try:
        if version:
            connection.execute(f"SELECT {COLUMNS}, key, value FROM events, state LIMIT 1")  # noqa: S608 - our own names
        elif connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise DamagedError("it is somebody else's database")
    except sqlite3.OperationalError as error:
        if _code(error) != sqlite3.SQLITE_ERROR:
            raise
        raise DamagedError(f"it is somebody else's database: {error}") from error


def _identity(path: str) -> tuple[int, int] | None:
    try:
        about = os.stat(path)
    except FileNotFoundError:
        return None
    return about.st_dev, about.st_ino


# --- talking to the daemon ---------------------------------------------------------------------------------------------


def answers(database: Database, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What to say to one request; trouble is an answer too."""
    try:
        last, rows = _carried_out(database, request)
    except (sqlite3.Error, OSError, RefusedError, DamagedError) as error:
        sentence = database.describe(error)
        if _code(error) not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_INTERRUPT):
            _close_after_trouble(database)
        last = {"error": sentence, "refused": isinstance(error, RefusedError)}
        rows = []
        if (
            request["do"] == "open"
            and isinstance(error, (OSError, sqlite3.Error))
            and _code(error) != sqlite3.SQLITE_BUSY
        ):
            with contextlib.suppress(sqlite3.Error):
                last["last_seq"], rows = database.as_it_lies()
        yield from ({"rows": page, "more": True} for page in _pages(rows))
        yield last
        return
    for page in _pages(rows):
        yield {"rows": page, "more": True}
    notes, database.notes = database.notes, []
    is_new, database.is_new = database.is_new, False
    yield {**last, "notes": notes, "new": is_new}


def _carried_out(database: Database, request: dict[str, Any]) -> tuple[dict[str, Any], list[list[Any]]]:
    """Carry out a request; where the file turns out to be damaged, once more with a new one."""
    try:
        return _carry_out(database, request)
    except (sqlite3.DatabaseError, DamagedError) as error:
        if not isinstance(error, DamagedError) and _code(error) not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise
        database.put_aside(str(error))
    return _carry_out(database, request)


def _carry_out(database: Database, request: dict[str, Any]) -> tuple[dict[str, Any], list[list[Any]]]:
    if request["do"] == "open":
        return {"last_seq": database.last_seq()}, database.state()
    if request["do"] == "read":
        return {}, database.read(request)
    database.write(request["events"], request["state"])
    return {}, []


def _code(error: Exception) -> int:
    """SQLite's primary result code."""
    return getattr(error, "sqlite_errorcode", -1) & 0xFF


def _close_after_trouble(database: Database) -> None:
    """The next request opens it anew: the mount or the file may be another then."""
    try:
        database.close()
    except sqlite3.Error:
        return  # the trouble is told already


def _pages(rows: list[list[Any]]) -> Iterator[list[list[Any]]]:
    """Rows in portions that fit a packet; one that somebody else has put in, and that fits none or no JSON, is left out."""
    page: list[list[Any]] = []
    size = 0
    for row in rows:
        if any(isinstance(value, bytes) for value in row) or (length := len(json.dumps(row))) > _LONGEST_ROW:
            continue
        if size + length > _PACKET - 100:
            yield page
            page, size = [], 0
        page.append(row)
        size += length + 2
    if page:
        yield page


def _receive(channel: socket.socket) -> dict[str, Any] | None:
    while True:
        try:
            packet = channel.recv(_PACKET + 4096)
        except ConnectionResetError:
            continue  # the daemon went without reading an answer; what it has sent before is still to be read
        return json.loads(packet) if packet else None


def _send(channel: socket.socket, answer: dict[str, Any]) -> None:
    try:
        channel.send(json.dumps(answer).encode())
    except (BrokenPipeError, ConnectionResetError):
        return  # nobody is left to hear it; what was sent is written all the same


def serve(channel: socket.socket, database: Database) -> None:
    """Until the daemon closes its end."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    more = False
    while True:
        if poll.poll(0 if more else _IDLE_MS):
            request = _receive(channel)
            if request is None:
                return
            for answer in answers(database, request):
                _send(channel, {"id": request["id"], **answer})
            more = _tidy(database.tidy)
        else:
            was_idle = not more
            more = _tidy(database.tidy)
            if was_idle and not more:
                _tidy(database.rest)


def _tidy(step: Callable[[], bool | None]) -> bool:
    try:
        return bool(step())
    except (sqlite3.Error, OSError):
        return False  # nobody waits for it, and the next write meets the same trouble and tells it


def _may_be_killed() -> None:
    """Undo what the daemon asked for itself: short of memory, this process can be spared."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("0")
    except OSError:
        return  # no /proc, or not ours to change: it lives longer than it has to


def main(directory: str, max_age: str, max_bytes: str) -> None:
    """Serve the socket that is stdin."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _may_be_killed()
    os.umask(0o027)
    with socket.socket(fileno=0) as channel:
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * _PACKET)
        database = Database(directory, float(max_age), int(max_bytes))
        serve(channel, database)
        _close_after_trouble(database)


if __name__ == "__main__":
    main(*sys.argv[1:])
