"""A program of ours that runs beside the daemon, because what it waits for may never come: a disk, a network's answer.

Rules:
1. Nothing here waits. The program is talked to over a socket of packets, which is its stdin; it ends when that is closed.
2. There is never a second one beside one that has not ended. One that cannot be killed ends when it can, and is left alone.
3. The daemon executes one itself only at its start: whoever executes a program waits for the disk that it is on. Later
   ones are `spawn`'s to start, and known by their socket alone: the kernel says who sent their first message, and its end
   means their end.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import signal
import socket
import struct
import subprocess
from collections import deque
from typing import TYPE_CHECKING

from duende_ublkd.core.errors import DuendeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PACKET = 64 << 10
"""Bytes of one message, at most."""
LOOK_AT_THE_DEAD = 0.05
"""Seconds from a program's socket closing to its status being there, mostly."""
ENDS_WITHIN = 2.0
"""Seconds from there on after which it hangs; before, the machine may just be busy."""

_PACKETS_AT_ONCE = 16
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_SCM_CREDENTIALS = 2  # the socket module has no name for it

_left_behind: list[subprocess.Popen[bytes]] = []
"""Programs that hang. Nobody waits for them, and a Popen that is collected before its child has ended complains."""


class Apart:
    """The program, or, when it has ended, the place of the next one. To be used in one event loop."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        on_packet: Callable[[bytes], None],
        on_end: Callable[[], None],
        spawn: Callable[[Sequence[str], int], None] | None = None,
        pause: float = 1.0,
    ) -> None:
        """`on_end`: it has closed its socket; what is unsent is dropped. `pause`: seconds until a kernel without memory
        for a packet is asked again.

        `spawn(argv, stdin)`: starts every program but the first, and never waits; OSError or DuendeError: it cannot.
        """
        self._argv = argv
        self._on_packet = on_packet
        self._on_end = on_end
        self._spawn = spawn
        self._pause = pause
        self._may_execute = True
        self._loop = asyncio.get_running_loop()
        self._talk: _Talk | None = None
        self._dying: _Process | None = None
        self._left_at = 0.0  # on the loop's clock
        self._outbox: deque[bytes] = deque()
        self._is_full = False  # the socket; the loop says when it no longer is

    @property
    def is_there(self) -> bool:
        """It was started, and has not closed its socket."""
        return self._talk is not None

    @property
    def pid(self) -> int | None:
        """Its own, while it is there and, of one that was spawned, since its first message."""
        return self._talk.process.pid if self._talk else None

    @property
    def has_unsent(self) -> bool:
        """Whether something still waits for room in the socket."""
        return bool(self._outbox)

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it runs any more, as far as can be told."""
        return self._talk is None and (self._dying is None or self._dying.has_ended())

    @property
    def is_ending(self) -> bool:
        """It has closed its socket just now and runs still: too early for the next one, and no trouble."""
        in_time = self._loop.time() - self._left_at < ENDS_WITHIN
        return in_time and self._dying is not None and not self._dying.has_ended()

    @property
    def how_it_ended(self) -> str:
        """Of the last one, in brackets; empty: nobody can tell."""
        return self._dying.how_it_ended if self._dying else ""

    def start(self) -> None:
        """Start one. DuendeError: the predicate of a sentence about it that says why there is none."""
        if self._dying and not self._dying.has_ended():
            raise DuendeError("hangs while it ends")
        if self._dying:
            self._dying.forget()
            self._dying = None
        start = _execute if self._may_execute or self._spawn is None else self._spawn
        self.only_spawn()
        try:
            self._talk = _Talk(self._argv, start)
        except (OSError, DuendeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise DuendeError(f"cannot be started: {why}") from error
        self._loop.add_reader(self._talk.socket, self._on_readable)

    def only_spawn(self) -> None:
        """The daemon's start is over, whether one was needed or not."""
        self._may_execute = False

    def send(self, message: bytes) -> None:
        """Have it get this. To be called while it is there."""
        self._outbox.append(message)
        self._flush()

    def finish(self) -> None:
        """Nothing more will come: it ends when it has done what it was sent."""
        if self._talk:
            with contextlib.suppress(OSError):  # it has ended already
                self._talk.socket.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """Its end is noticed as any other's. One that cannot be killed ends when it reads that nothing will come."""
        if self._talk:
            self._talk.process.kill()
            self.finish()

    def leave(self) -> None:
        """Close the socket to it. It counts as one that ends."""
        if self._talk:
            self._loop.remove_reader(self._talk.socket)
            self._loop.remove_writer(self._talk.socket)
            self._talk.socket.close()
            self._dying, self._talk = self._talk.process, None
            self._left_at = self._loop.time()
        self._is_full = False
        self._outbox.clear()

    def close(self) -> None:
        """Leave it to itself; none is started any more."""
        self.leave()
        _left_behind[:] = [popen for popen in _left_behind if popen.poll() is None]
        if self._dying:
            self._dying.forget()
            self._dying = None

    def _flush(self) -> None:
        if self._talk is None:
            return
        try:
            while self._outbox:
                self._talk.socket.send(self._outbox[0])
                self._outbox.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._talk.socket, self._flush)
            self._is_full = True
            return
        except OSError as error:
            if error.errno in (errno.ENOBUFS, errno.ENOMEM):
                self._loop.call_later(self._pause, self._flush)
            return  # else it has ended, and the reading side hears of that
        if self._is_full:
            self._loop.remove_writer(self._talk.socket)
            self._is_full = False

    def _on_readable(self) -> None:
        for _ in range(_PACKETS_AT_ONCE):
            if self._talk is None:
                return
            try:
                packet = self._talk.receive()
            except BlockingIOError:
                return
            except ConnectionError:
                continue  # told once, and before what was said before the end: who it is may be among that
            except OSError:
                packet = b""
            if not packet:
                self.leave()
                self._on_end()
                return
            self._on_packet(packet)


class _Process:
    """A child of ours, or, without a Popen, of somebody else's."""

    def __init__(self, popen: subprocess.Popen[bytes] | None) -> None:
        self.popen = popen
        self.pid = popen.pid if popen else None
        self._pidfd = -1

    def is_of(self, pid: int) -> None:
        """The first message told who it is. One that has ended meanwhile stays unknown."""
        if self.pid is None:
            with contextlib.suppress(OSError):
                self._pidfd = os.pidfd_open(pid)
                self.pid = pid

    def has_ended(self) -> bool:
        """Whether nothing of it runs any more; asked when its socket is closed, which is all that an unknown one has."""
        if self.popen:
            return self.popen.poll() is not None
        if self._pidfd < 0:
            return True
        poll = select.poll()  # select() takes no descriptor above 1023
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    @property
    def how_it_ended(self) -> str:
        """In brackets; empty: nobody can tell."""
        status = self.popen.poll() if self.popen else None
        if status is None:
            return ""
        return f" (killed by signal {-status})" if status < 0 else f" (exit status {status})"

    def kill(self) -> None:
        """A child of somebody else's is killed by its pidfd, which never means another."""
        if self.popen:
            self.popen.kill()
        elif self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def forget(self) -> None:
        """Nobody asks any more."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self.popen and self.popen.poll() is None:
            _left_behind.append(self.popen)


class _Talk:
    """A running program and the socket to it. Raises OSError or DuendeError when it cannot be started."""

    def __init__(
        self, argv: Sequence[str], spawn: Callable[[Sequence[str], int], subprocess.Popen[bytes] | None]
    ) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self.socket.setblocking(False)
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
                popen = spawn(argv, theirs.fileno())
            except BaseException:
                self.socket.close()
                raise
        self.process = _Process(popen)
        with contextlib.suppress(OSError):  # a packet fits the default, unless somebody has lowered it
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * PACKET)

    def receive(self) -> bytes:
        """The next packet; empty: the program has closed its end. OSError, BlockingIOError among them."""
        packet, told, _, _ = self.socket.recvmsg(PACKET, socket.CMSG_SPACE(_CREDENTIALS.size))
        for level, kind, data in told if packet else ():
            if (level, kind) == (socket.SOL_SOCKET, _SCM_CREDENTIALS):
                self.process.is_of(_CREDENTIALS.unpack(data)[0])
        return packet


def _execute(argv: Sequence[str], stdin: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - our own file
        argv,
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # not ours: whoever reads it may wait for the last one who has it open
        cwd="/",
    )
