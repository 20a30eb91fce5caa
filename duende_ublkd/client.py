"""The daemon as a command asks it, over its unix socket.

Everything is bounded: the time to connect, the time and the size of an answer, a line of a stream. A command that asks
never makes the run directory, or anything else.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, NoReturn

from duende_ublkd.core.errors import DuendeError, UsageError
from duende_ublkd.core.holds import NotAllowedError
from duende_ublkd.core.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_RUN_DIR = "/run/duende-ublkd"
_SOCKET_NAME = "api.sock"
_CONNECT_FOR = 2  # seconds
_ANSWER_FOR = 10.0
_MOST_SILENCE = 40.0  # seconds in a stream; the daemon sends an empty line after each 15 without an event
_MOST_BYTES = 16 << 20  # of an answer
_MOST_LINE = 1 << 20
_WITHOUT = "duende-ublkd list  # works without the daemon"


class DaemonNotRunningError(DuendeError):
    """Nobody listens."""


class DaemonLostError(DuendeError):
    """It took the connection and did not answer to the end."""


def run_directory() -> str:
    """Where the daemon's lock, socket and holds are.

    Of RUNTIME_DIRECTORY, only a directory with the daemon's name is taken: a unit of somebody else's, whose ExecStartPre=
    runs `duende-ublkd clean`, has one of its own there, and would find no holds in it.
    """
    for path in os.environ.get("RUNTIME_DIRECTORY", "").split(":"):
        if path.rstrip("/").rpartition("/")[2] == "duende-ublkd":
            return path.rstrip("/")
    return _RUN_DIR


def socket_path() -> str:
    """Where the daemon listens."""
    return f"{run_directory()}/{_SOCKET_NAME}"


class DaemonClient:
    """Asks the daemon; a connection for each question."""

    def __init__(self, path: str) -> None:
        self._path = path

    def get(self, path: str, *, trusted: bool = False) -> Any:  # noqa: ANN401 - JSON
        """What is at this path. Raises DuendeError; UsageError: the daemon says what is wrong with the question.

        `trusted`: only of a daemon that is root's, or this user's own.
        """
        return self._ask("GET", path, None, trusted=trusted)

    def get_text(self, path: str, *, trusted: bool = False) -> tuple[int, str]:
        """The status and the text of a page that is not JSON. DuendeError: there is no answer."""
        status, data = self._exchange("GET", path, None, trusted=trusted)
        return status, data.decode(errors="replace")

    def post(self, path: str, body: Mapping[str, object], *, answer_within: float = _ANSWER_FOR) -> Any:  # noqa: ANN401 - JSON
        """Have something done; raises as `get` does, and NotAllowedError."""
        return self._ask("POST", path, json.dumps(body).encode(), answer_within=answer_within)

    def follow(self, path: str) -> Iterator[dict[str, Any] | None]:
        """Objects as they come, and None now and then while none does, until the daemon ends."""
        connection = _UnixConnection(self._path, _MOST_SILENCE)
        try:
            try:
                connection.request("GET", path)
                with contextlib.closing(connection.getresponse()) as response:
                    if response.status != http.client.OK:
                        _raise_error(response.status, _read_all(response))
                    while line := response.readline(_MOST_LINE):
                        yield _read_line(line)
            except (OSError, http.client.HTTPException) as error:
                raise _lost(error) from error
        finally:
            connection.close()

    def _ask(
        self,
        method: str,
        path: str,
        body: bytes | None,
        *,
        trusted: bool = False,
        answer_within: float = _ANSWER_FOR,
    ) -> Any:  # noqa: ANN401 - JSON
        status, data = self._exchange(method, path, body, trusted=trusted, answer_within=answer_within)
        if status != http.client.OK:
            _raise_error(status, data)
        return _parse(data)

    def _exchange(
        self, method: str, path: str, body: bytes | None, *, trusted: bool, answer_within: float = _ANSWER_FOR
    ) -> tuple[int, bytes]:
        connection = _UnixConnection(self._path, answer_within)
        try:
            if trusted:
                connection.connect()
                _check_listener(connection.sock, self._path)
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            with contextlib.closing(connection.getresponse()) as response:
                return response.status, _read_all(response)
        except (OSError, http.client.HTTPException) as error:
            raise _lost(error) from error
        finally:
            connection.close()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("duende-ublkd", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # Not settimeout: a nonblocking connect to a full backlog does not wait, but fails at once.
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _CONNECT_FOR, 0))
            _connect(channel, self._path)
            channel.settimeout(self.timeout)
        except OSError as error:
            channel.close()
            raise _unreachable(self._path, error) from error
        self.sock = channel


def _connect(channel: socket.socket, path: str) -> None:
    """As connect(), which returns too early when a signal comes, or when this program was stopped and goes on: the kernel
    says EINTR (unix_stream_connect), and Python takes a socket that can be written to for one that is connected.
    """
    until = time.monotonic() + _CONNECT_FOR
    while True:
        channel.connect(path)
        try:
            channel.getpeername()
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
            if time.monotonic() > until:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
        else:
            return


def _check_listener(channel: socket.socket, path: str) -> None:
    """Whose process made it listen, the kernel knows."""
    credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    _, uid, _ = struct.unpack("iII", credentials)
    if uid not in (0, os.geteuid()):
        raise DuendeError(
            f"who listens at {printable(path)} is uid {uid}, and not root", hint=f"ls -l {printable(path)}"
        )


def _unreachable(path: str, error: OSError) -> DuendeError:
    path = printable(path)
    match error.errno:
        case errno.ENOENT | errno.ECONNREFUSED | errno.ENOTDIR:
            return DaemonNotRunningError(
                f"the daemon does not run: nobody listens at {path}", hint="systemctl start duende-ublkd"
            )
        case errno.EACCES:
            return DuendeError(f"this user may not connect to {path}", hint=f"ls -ld {path}")
        case errno.EAGAIN:
            return DaemonLostError(f"the daemon takes no connection at {path}", hint=_WITHOUT)
        case _:
            return DuendeError(f"cannot connect to {path}: {error.strerror or error}", hint=_WITHOUT)


def _lost(error: Exception) -> DuendeError:
    if isinstance(error, TimeoutError):
        return DaemonLostError("the daemon does not answer", hint="journalctl -u duende-ublkd")
    if isinstance(error, ConnectionError | http.client.IncompleteRead):
        return DaemonLostError("the daemon closed the connection: it ends, or has too many clients", hint=_WITHOUT)
    return DaemonLostError(f"the daemon does not speak HTTP: {printable(str(error))}", hint=_WITHOUT)


def _read_all(response: http.client.HTTPResponse) -> bytes:
    until = time.monotonic() + _ANSWER_FOR
    data = bytearray()
    while piece := response.read1(1 << 16):
        data += piece
        if len(data) > _MOST_BYTES:
            raise DuendeError(f"the daemon's answer is longer than {_MOST_BYTES >> 20} MiB", hint=_WITHOUT)
        if time.monotonic() > until:
            raise TimeoutError
    if response.length:  # what is still to come
        raise http.client.IncompleteRead(bytes(data), response.length)
    return bytes(data)


def _read_line(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        raise http.client.IncompleteRead(line)
    if not line.strip():
        return None
    value = _parse(line)
    if not isinstance(value, dict):
        raise not_understood()
    return value


def _parse(data: bytes) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise not_understood() from error


def not_understood() -> DuendeError:
    """What to say of an answer that is not as this version's."""
    return DuendeError(
        "the daemon's answer is not understood: it may be of another version",
        hint="duende-ublkd --version; systemctl restart duende-ublkd",
    )


def _raise_error(status: int, data: bytes) -> NoReturn:
    """What the daemon says is wrong."""
    value = _parse(data)
    if not isinstance(value, dict) or not isinstance(value.get("error"), str):
        raise not_understood()
    sentence, hint = value["error"], value.get("hint")
    hint = hint if isinstance(hint, str) else ""
    if status == http.client.FORBIDDEN:
        raise NotAllowedError(sentence, hint=hint)
    if status < http.client.INTERNAL_SERVER_ERROR:
        raise UsageError(sentence, hint=hint)
    raise DuendeError(sentence, hint=hint)
