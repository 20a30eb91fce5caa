"""The daemon's disposable children: a program of its own, started before memory is short and kept small.

The daemon runs `PROGRAM` with `python -I -S -c`, its order socket being descriptor 3. (As a script it would be compiled
at each start, which takes 1.5 MiB that never come back.) It keeps some children forked ahead. They all wait on that
socket; whichever gets an order does it, and another is forked. A child becomes a *supervisor*, which runs a recovery
command, a *hand*, which does what may sleep for ever, a program of the daemon's that nobody waits for, or the *heir* of a
nursery that has died: to execute another one would be to wait for a disk.

Rules:
1. An order is a JSON message with one descriptor, on which its child talks to the daemon: `taken` there, `go` back, and
   nothing is done without the `go`. So what the daemon has given up is never done later. (A program has it for its
   stdin, and an heir for its order socket.) A command whose exec hangs is killed when it is given up, or when the daemon
   goes: SIGKILL, which works as soon as the disk answers, and before the command's first instruction.
2. Only a descendant of its own is ever signalled, through a pidfd opened before its descent was looked at. A process
   group proves nothing; but a subreaper without children has no descendants, which is how "all gone" is known.
3. A supervisor kills nobody who may serve a device: none of its command's processes, as soon as one has another device's
   char device open, or cannot be looked into. Whom it spares it serves on: it reads their output until nobody is left
   to write any, so that a server in the foreground neither blocks on a full pipe nor dies of a closed one.
4. Without the daemon, or left by it, the order's own time limit counts, and then any open char device spares its process.
5. The nursery and its spares end with the daemon's end of the order socket and by nothing else (but a nursery that is
   slow to is killed): a service manager that signals the whole group would take the supervisor's pipe from a server.
   Children with an order go on. A nursery that died leaves spares that still take orders, until the daemon has seen it,
   makes one of them the heir, and closes the socket.
6. A char device is known by its number, wherever its node lies and from whichever root it was opened, and also by its
   name; either is enough.
7. Nothing is executed that others than root, the daemon's user and the command's own may change: asked of the program
   that was found, right before, in the process that executes it and that may wait for its disk.

What it cannot see: a char device that is only mapped, or registered with an io_uring, its descriptor closed. (To read
/proc/PID/maps or map_files takes that process's mmap_lock, which one that waits for a sick disk may hold for ever.)

oom_score_adj is inherited by the commands on purpose: what brings the swap back must not be the first to be killed.
Imports are few, because every page is locked: no asyncio, no dataclasses, no typing.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import gc
import json
import os
import select
import signal
import socket
import stat
import sys
import time

from duende_ublkd.core.text import printable
from duende_ublkd.kernel.binding import WaitingRing
from duende_ublkd.kernel.ownership import Doubt, Trust

TYPE_CHECKING = False  # typing costs half a MiB
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

PROGRAM = (
    "import sys; sys.path.extend(sys.argv[3:]); from duende_ublkd.kernel import nursery; "
    "nursery.main(spares=int(sys.argv[1]), lock=sys.argv[2] == 'lock')"
)
ORDER_FD = 3
MOST_ORDER = 64 << 10  # bytes of one order
TAIL = 4096  # bytes kept of a command's output
_CHUNK = 64 << 10  # what a pipe holds
_TERM_GRACE = 2.0  # seconds between SIGTERM and SIGKILL
_KILL_AGAIN = 0.1  # seconds; those that were forked meanwhile
_LAST_EFFORT = 10.0  # seconds of killing when no daemon waits for it
_BREATH = 1.0  # seconds before a spare is replaced that died without an order, or could not be forked
_CHAR_DEVICE = "/dev/ublkc"
_CHAR_NAME = "ublkc"
_DEEPEST = 1000  # generations between a supervisor and its last descendant; a stale chain of parents may be a circle
_MOST_NAMED = 3
_MOST_DOUBT = 300  # characters of each half of a sentence that goes through a pipe in one piece
_VANISHED = (errno.ENOENT, errno.ESRCH)

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36
_libc = ctypes.CDLL(None, use_errno=True)
_statx = getattr(_libc, "statx", None)  # musl has it since 1.2.5
_AT_FDCWD, _AT_NO_AUTOMOUNT, _AT_STATX_DONT_SYNC = -100, 0x800, 0x4000
_STATX_TYPE, _STATX_SIZE = 1, 256
_STX_MODE, _STX_RDEV_MAJOR, _STX_RDEV_MINOR = slice(28, 30), slice(128, 132), slice(132, 136)

_UNSUPPORTED = (-errno.EOPNOTSUPP, -524)  # the latter is abi.ENOTSUPP


class Gone(Exception):  # noqa: N818 - not an error: the daemon has gone
    """Nobody is at the other end."""


class Talk:
    """A child's connection to the daemon."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def fileno(self) -> int:
        return self._connection.fileno()

    def say(self, **message: object) -> None:
        """Never waits for a daemon that does not listen; the message is lost on one that has gone."""
        try:
            self._connection.send(json.dumps(message).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return  # nobody hears it; the next hear() says so

    def hear(self) -> dict[str, Any]:
        """The next message; Gone at the end."""
        try:
            raw = self._connection.recv(_CHUNK)
        except ConnectionError:  # told once, and before the messages that were sent before the end
            raw = self._connection.recv(_CHUNK)
        if not raw:
            raise Gone
        heard: dict[str, Any] = json.loads(raw)
        return heard

    def hear_with_descriptor(self) -> int | None:
        """The descriptor that comes with the next message; None: there is none, or the daemon has gone."""
        received = _receive(self._connection)
        return received[1] if received else None

    def close(self) -> None:
        self._connection.close()


# --- the nursery -----------------------------------------------------------------------------------------------------


def main(*, spares: int, lock: bool) -> NoReturn:
    """Keep spares until the daemon has gone."""
    os.closerange(ORDER_FD + 1, os.sysconf("SC_OPEN_MAX"))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    orders = socket.socket(fileno=ORDER_FD)
    orders.set_inheritable(False)
    _prctl(_PR_SET_NAME, b"ublkd-nursery")
    if lock:
        _lock_memory(orders, _MCL_CURRENT | _MCL_FUTURE)
    gc.collect()
    gc.freeze()
    Nursery(orders, spares, lock=lock).run()
    os._exit(0)


class Nursery:
    """Spares, and the children that they have become."""

    def __init__(self, orders: socket.socket, spares: int, *, lock: bool) -> None:
        self._orders = orders
        self._wanted = spares
        self._lock = lock
        self._spares: set[int] = set()
        self._pidfds: dict[int, int] = {}  # of every child, by descriptor
        self._taken, self._take = os.pipe2(os.O_CLOEXEC)
        self._not_before = 0.0

    def run(self) -> None:
        """Until the daemon has closed its end."""
        poll = select.poll()
        poll.register(self._orders, 0)  # its end, and nothing of the orders that are not for us
        poll.register(self._taken, select.POLLIN)
        while True:
            wait = self._fill(poll)
            for fd, _ in poll.poll(wait):
                if fd == self._orders.fileno():
                    self._see_spares_off()
                    return
                if fd == self._taken:
                    self._spares.discard(int.from_bytes(os.read(self._taken, 4), sys.byteorder))
                else:
                    poll.unregister(fd)
                    self._reap(fd)

    def _fill(self, poll: select.poll) -> float | None:
        """Fork what is missing; the milliseconds until the next try, None: all are there."""
        while len(self._spares) < self._wanted:
            wait = self._not_before - time.monotonic()
            if wait > 0:
                return wait * 1000 + 1
            try:
                poll.register(self._fork(), select.POLLIN)
            except OSError:  # memory, processes or descriptors are short
                self._not_before = time.monotonic() + _BREATH
        return None

    def _fork(self) -> int:
        pid = os.fork()
        if pid == 0:
            _be_spare(self._orders, self._take, self._lock)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)  # nobody would hear of its end
            os.waitpid(pid, 0)
            raise
        self._spares.add(pid)
        self._pidfds[pidfd] = pid
        return pidfd

    def _reap(self, pidfd: int) -> None:
        pid = self._pidfds.pop(pidfd)
        os.close(pidfd)
        os.waitpid(pid, 0)
        # Its last word may still be in the pipe, and is then of no use.
        if pid in self._spares:
            self._spares.discard(pid)
            self._not_before = time.monotonic() + _BREATH

    def _see_spares_off(self) -> None:
        """They end by themselves; the wait is so that nobody finds them half gone."""
        until = time.monotonic() + _BREATH
        for pidfd, pid in self._pidfds.items():
            wait = max(0.0, until - time.monotonic()) if pid in self._spares else 0.0
            poll = select.poll()  # select() takes no descriptor above 1023
            poll.register(pidfd, select.POLLIN)
            if poll.poll(wait * 1000):
                os.waitpid(pid, 0)


def _lock_memory(orders: socket.socket, how: int) -> None:
    if _libc.mlockall(how):
        reason = os.strerror(ctypes.get_errno())
        Talk(orders).say(trouble=f"memory of the daemon's children cannot be locked: {reason}")


def _prctl(option: int, argument: int | bytes) -> None:
    value = ctypes.c_char_p(argument) if isinstance(argument, bytes) else ctypes.c_ulong(argument)
    if _libc.prctl(option, value, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


# --- a spare ---------------------------------------------------------------------------------------------------------


def _be_spare(orders: socket.socket, take: int, lock: bool) -> NoReturn:  # noqa: FBT001 - one caller
    """Wait for an order and do it. Never returns into the nursery's code."""
    status = 1
    try:
        _wait_for_order(orders, take, lock)
        status = 0
    except BaseException as error:  # noqa: BLE001 - a child must not fall back into its parent's loop
        sys.stderr.write(f"a child of the nursery died of {error!r}\n")
    finally:
        os._exit(status)


def _wait_for_order(orders: socket.socket, take: int, lock: bool) -> None:  # noqa: FBT001 - one caller
    _prctl(_PR_SET_NAME, b"ublkd-spare")
    if lock:  # what it shares with the nursery is locked there, and gets locked here when it is copied
        _lock_memory(orders, _MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)
    ring = _ring_or_errno()
    received = _receive(orders)
    if received is None:
        return
    with contextlib.suppress(BrokenPipeError):  # the nursery has died: nobody is to be forked
        os.write(take, os.getpid().to_bytes(4, sys.byteorder))
    os.close(take)
    orders.close()
    order, descriptor = received
    if order["do"] == "stop":
        _be_hand(order, Talk(socket.socket(fileno=descriptor)), ring)
        return
    if not isinstance(ring, int):
        ring.close()
    if order["do"] == "run":
        _be_supervisor(order, Talk(socket.socket(fileno=descriptor)))
    elif order["do"] == "nurse":
        _be_heir(order, socket.socket(fileno=descriptor))
    else:
        _become_program(order["argv"], descriptor)


def _receive(orders: socket.socket) -> tuple[dict[str, Any], int] | None:
    """The next order and its descriptor; None: the daemon has gone, or sees its other end closed."""
    space = socket.CMSG_SPACE(4)
    try:
        raw, descriptors, flags, _ = orders.recvmsg(MOST_ORDER, space, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:  # told once, and before the orders that were given before the end
        raw, descriptors, flags, _ = orders.recvmsg(MOST_ORDER, space, socket.MSG_CMSG_CLOEXEC)
    if len(descriptors) != 1 or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        return None
    numbers = array.array("i")
    numbers.frombytes(descriptors[0][2])
    return json.loads(raw), numbers[0]


def _is_told_to_go(talk: Talk) -> bool:
    talk.say(taken=os.getpid())
    try:
        talk.hear()
    except Gone:
        return False
    return True


def _be_hand(order: dict[str, Any], talk: Talk, ring: WaitingRing | int) -> None:
    if _is_told_to_go(talk):
        _prctl(_PR_SET_NAME, b"ublkd-hand")
        talk.say(**_answer(order, talk, ring))


def _be_supervisor(order: dict[str, Any], talk: Talk) -> None:
    if _is_told_to_go(talk):
        _prctl(_PR_SET_NAME, b"ublkd-command")
        Supervisor(order, talk).run()


def _be_heir(order: dict[str, Any], orders: socket.socket) -> None:
    """Take a dead nursery's place, on an order socket of its own."""
    _prctl(_PR_SET_NAME, b"ublkd-nursery")
    if order["lock"]:
        _lock_memory(orders, _MCL_CURRENT | _MCL_FUTURE)
    Talk(orders).say(nursery=os.getpid())
    Nursery(orders, order["spares"], lock=order["lock"]).run()


def _become_program(argv: list[str], stdin: int) -> NoReturn:
    """Execute a program of the daemon's. Its stdin is closed when it has ended, or cannot be executed."""
    complaints = os.dup(2)  # not the program's: whoever reads them may wait for the last one who has them open
    try:
        null = os.open("/dev/null", os.O_RDWR)
        _prepare(stdin, null, null)
        os.execve(argv[0], argv, os.environ)  # noqa: S606 - no shell, by promise
    except OSError as error:
        os.write(complaints, f"{argv[0]} cannot be executed: {error.strerror}\n".encode(errors="replace"))
    finally:
        os._exit(127)


def _ring_or_errno() -> WaitingRing | int:
    try:
        return WaitingRing()
    except OSError as error:
        return error.errno or errno.EIO


# --- a hand ----------------------------------------------------------------------------------------------------------


def _answer(order: dict[str, Any], talk: Talk, ring: WaitingRing | int) -> dict[str, Any]:
    """`result` of `command`, or what `failed` with which `errno`. Everything is closed again when it is given."""
    if isinstance(ring, int):
        return {"failed": "ring", "errno": ring}
    try:
        control = os.open(order["control"], os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return {"failed": "control", "errno": error.errno}
    try:
        return _stop_if_still_wanted(order, talk, ring, control)
    except OSError as error:
        return {"failed": "send", "errno": error.errno}
    finally:
        os.close(control)


def _stop_if_still_wanted(order: dict[str, Any], talk: Talk, ring: WaitingRing, control: int) -> dict[str, Any]:
    """The open may have waited, behind whoever is stuck in one, until a new server came: then nothing is to be stopped.

    With its word the daemon hands over its claim on the char device: no server can come while it is with this child.
    """
    node = _claim(order)
    if isinstance(node, dict):
        return node
    talk.say(opened=True)
    claim = talk.hear_with_descriptor()
    if claim is None:
        os.close(node)
        return {"command": "open", "failed": "late", "errno": errno.ECANCELED}
    try:
        return _stop(order, ring, control, node)
    finally:
        os.close(claim)


def _stop(order: dict[str, Any], ring: WaitingRing, control: int, node: int) -> dict[str, Any]:
    """Stop one device, unless somebody has claimed its disk. `node`: it, opened as its only user."""
    if order["try"]:
        os.close(node)  # or it would be the opener that TRY_STOP_DEV finds
        result = ring.perform(control, bytes.fromhex(order["try"]))
        if result not in _UNSUPPORTED:
            return {"command": "TRY_STOP_DEV", "result": result}
        again = _claim(order)
        if isinstance(again, dict):
            return again
        node = again
    try:  # with the node held: nobody mounts it or swaps on it in between
        for entry in order["stop"]:
            result = ring.perform(control, bytes.fromhex(entry))
            if result not in _UNSUPPORTED:
                break
    finally:
        os.close(node)
    return {"command": "STOP_DEV", "result": result}


def _claim(order: dict[str, Any]) -> int | dict[str, Any]:
    """Open the disk as its only user; what failed, if it is used, gone, or another one."""
    try:
        node = os.open(order["node"], os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        return {"failed": "open", "errno": error.errno}
    found = os.fstat(node)
    if not stat.S_ISBLK(found.st_mode):
        os.close(node)
        return {"failed": "open", "errno": errno.ENOTBLK}
    if [os.major(found.st_rdev), os.minor(found.st_rdev)] != order["rdev"]:
        os.close(node)
        return {"failed": "open", "errno": errno.ESTALE}
    return node


# --- a supervisor ----------------------------------------------------------------------------------------------------


class Supervisor:
    """Runs one command, and answers for all that descends from it."""

    def __init__(self, order: dict[str, Any], talk: Talk) -> None:
        self._order = order
        self._talk: Talk | None = talk
        self._tail = b""
        self._bytes = 0
        self._reader = -1
        self._pid = 0  # until it is reaped, so that nobody else can get it
        self._exec = -1  # says what came of the exec; open as long as it lasts
        self._is_started = False
        self._is_given_up = False
        self._kept = False
        self._time_is_over = 0.0  # when the order's own time limit is
        self._limit: float | None = None  # when to end it all; only when no daemon cares
        self._ending: Ending | None = None
        self._poll = select.poll()

    def run(self) -> None:
        """Until no descendant is left, and nobody to write to the pipe; with `keep`, the latter only."""
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        deaths = _notice_deaths()
        self._time_is_over = time.monotonic() + self._order["timeout"]
        try:
            self._pid, self._exec, self._reader = begin_command(self._order)
        except OSError as error:
            self._say_trouble(error.errno or errno.EIO, "fork")
            return
        assert self._talk  # noqa: S101 - for the type checker
        for each in (deaths, self._exec, self._reader, self._talk.fileno()):
            self._poll.register(each, select.POLLIN)
        while not self._is_over():
            for fd, _ in self._poll.poll(self._wait()):
                if fd == deaths:
                    os.read(deaths, _CHUNK)
                elif fd == self._exec:
                    self._note_exec()
                elif fd == self._reader:
                    self._read()
                elif self._talk and fd == self._talk.fileno():
                    self._obey(self._talk)
            self._reap()
            self._press_on()

    def _note_exec(self) -> None:
        """It has succeeded or failed; or the command died in it, and its death tells the rest."""
        failure = os.read(self._exec, 4096)
        self._poll.unregister(self._exec)
        os.close(self._exec)
        self._exec = -1
        if failure:
            number, step, *doubt = json.loads(failure)
            if doubt:
                self._say(trouble=f"{doubt[0]}; {doubt[1]}", errno=number, step=step, hint=doubt[1])
            else:
                self._say_trouble(number, step)
        elif not self._is_given_up:
            self._is_started = True
            self._time_is_over = time.monotonic() + self._order["timeout"]
            self._say(started=self._pid)

    def _say(self, **message: object) -> None:
        if self._talk:
            self._talk.say(**message)

    def _say_trouble(self, number: int, step: str) -> None:
        self._say(trouble=os.strerror(number), errno=number, step=step)

    def _is_over(self) -> bool:
        if self._reader >= 0 or self._exec >= 0:
            return False
        return self._kept or not has_children()

    def _wait(self) -> float | None:
        """Milliseconds until the clock alone asks for something; None: never."""
        times = [self._limit] if self._limit is not None else []
        if self._ending:
            times.append(self._ending.next_at)
        return max(0.0, min(times) - time.monotonic()) * 1000 + 1 if times else None

    def _obey(self, talk: Talk) -> None:
        try:
            word = talk.hear()
        except Gone:
            self._poll.unregister(talk)
            talk.close()
            self._talk = None
            if self._exec >= 0:
                self._give_up()
            else:
                self._leave()
            return
        if word["do"] == "keep":
            self._keep()
        elif word["do"] == "leave":
            self._leave()
        elif word["do"] == "give up":
            self._give_up()
        elif word["do"] == "who":
            self._say(serves=may_serve(self._order["dev_id"], self._order["char_major"]))
        elif word["do"] == "end":
            self._end(word["within"], self._order["dev_id"])

    def _keep(self) -> None:
        self._kept = True
        self._limit = self._ending = None

    def _leave(self) -> None:
        if self._ending:
            self._ending.spare_all()
        elif not self._kept:
            self._limit = self._time_is_over

    def _give_up(self) -> None:
        """It was never to run: end what hangs in its exec, and what has started since the daemon said so."""
        self._is_given_up = True
        if self._exec >= 0 and self._pid:
            os.kill(self._pid, signal.SIGKILL)
        self._end(_LAST_EFFORT, None)

    def _end(self, within: float, own_device: int | None) -> None:
        self._kept = False
        self._limit = None
        self._ending = Ending(within, own_device, self._order["char_major"])

    def _press_on(self) -> None:
        now = time.monotonic()
        if self._limit is not None and now >= self._limit:
            self._end(_LAST_EFFORT, None)
        if self._ending and (self._ending.next_at <= now or not has_children()):
            left = self._ending.press_on(now)
            if left is not None:
                self._tell_what_is_left(left)
                self._kept = self._ending.has_spared
                self._ending = None

    def _tell_what_is_left(self, left: str) -> None:
        if self._talk:
            self._talk.say(left=left)
            return
        line = f"{self._order['title']} outlived its time or the daemon: {left or 'ended'}\n"
        with contextlib.suppress(OSError):
            if select.select([], [2], [], 0)[1]:  # a server must not wait for whoever reads this
                os.write(2, line.encode(errors="replace"))

    def _read(self) -> bool:
        """One read; False when there is nothing more for now."""
        try:
            chunk = os.read(self._reader, _CHUNK)
        except BlockingIOError:
            return False
        if not chunk:
            self._poll.unregister(self._reader)
            os.close(self._reader)
            self._reader = -1
            return False
        self._bytes += len(chunk)
        self._tail = (self._tail + chunk)[-TAIL:]
        return True

    def _reap(self) -> None:
        """Also those that were adopted."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._pid:
                if self._exec >= 0:
                    self._note_exec()
                self._pid = 0
                if self._is_started:
                    self._report(os.waitstatus_to_exitcode(status))

    def _report(self, status: int) -> None:
        for _ in range(16):  # what it wrote before it died; others may go on writing
            if self._reader < 0 or not self._read():
                break
        self._say(exited=status, output=self._tail.decode("latin-1"), bytes=self._bytes)


class Ending:
    """SIGTERM to every descendant, then SIGKILL until none is left or the time is over."""

    def __init__(self, within: float, own_device: int | None, char_major: int | None) -> None:
        now = time.monotonic()
        self.next_at = now
        self.has_spared = False  # somebody who may serve a device
        self._own_device = own_device
        self._char_major = char_major
        self._kill_at = now + min(_TERM_GRACE, within / 2)
        self._until = now + within
        self._asked = False

    def spare_all(self) -> None:
        """Nobody can tell any more whether one of them serves: whoever has a device open is spared from now on."""
        self._own_device = None

    def press_on(self, now: float) -> str | None:
        """The next step: None while it lasts, then who is left and why."""
        try:
            return self._step(now)
        except OSError as error:  # out of descriptors or memory: hold back, and live on for a server's output
            return f"its processes cannot be looked at: {error.strerror}"

    def _step(self, now: float) -> str | None:
        if not has_children():
            return ""
        if who := who_serves(
            self._own_device, self._char_major
        ):  # before each round: it may have been opened meanwhile
            self.has_spared = True
            return who
        if now >= self._until:
            return still_there()
        if now >= self._kill_at:
            signal_all(signal.SIGKILL)
            self.next_at = min(now + _KILL_AGAIN, self._until)
        else:
            if not self._asked:
                signal_all(signal.SIGTERM)
                self._asked = True
            self.next_at = self._kill_at
        return None


def _notice_deaths() -> int:
    """A descriptor that is readable after a child's death."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return reader


def begin_command(order: dict[str, Any]) -> tuple[int, int, int]:
    """Its pid, what tells of its exec, and its output. The first is at its end when the exec has succeeded."""
    # A fork of a process this small: the C library's spawn can neither change the user nor the directory everywhere.
    reader, output = os.pipe2(os.O_CLOEXEC)
    told, failure = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
        if pid == 0:
            _become_command(order, output, failure)
    finally:
        os.close(output)
        os.close(failure)
    os.set_blocking(reader, False)
    return pid, told, reader


def _become_command(order: dict[str, Any], output: int, failure: int) -> NoReturn:
    step = "prepare"
    trust = Trust() if order["uid"] is None else Trust(order["uid"])
    try:
        _prepare(os.open("/dev/null", os.O_RDWR), output, output)
        step = "change to the user"
        if order["uid"] is not None:
            os.setgroups(order["groups"])
            os.setresgid(order["gid"], order["gid"], order["gid"])
            os.setresuid(order["uid"], order["uid"], order["uid"])
        step = "run"
        _execute(order["argv"], order["env"], trust)
    except Doubt as doubt:
        told = [str(doubt)[:_MOST_DOUBT], doubt.hint[:_MOST_DOUBT]]
        os.write(failure, json.dumps([0, step, *told]).encode())
    except OSError as error:
        os.write(failure, json.dumps([error.errno, step]).encode())
    except BaseException:  # noqa: BLE001 - nothing of this may run on in the child
        os.write(failure, json.dumps([errno.EINVAL, step]).encode())
    finally:
        os._exit(127)


def _execute(argv: list[str], environment: dict[str, str], trust: Trust) -> NoReturn:
    """As execvp(3) with the command's own PATH; os.execvpe() would import on its way. Doubt: rule 7."""
    if "/" in argv[0]:
        trust.check(argv[0])
        os.execve(argv[0], argv, environment)  # noqa: S606 - no shell, by promise
    failure = OSError(errno.ENOENT, "")
    for directory in environment.get("PATH", os.defpath).split(":"):
        path = f"{directory or '.'}/{argv[0]}"
        try:
            trust.check(path)
            os.execve(path, argv, environment)  # noqa: S606 - as above
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            failure = error
    raise failure


def _prepare(*stdio: int) -> None:
    os.setsid()
    os.chdir("/")
    os.umask(0o022)
    for number, descriptor in enumerate(stdio):
        os.dup2(descriptor, number)
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)


# --- descendants -----------------------------------------------------------------------------------------------------


def has_children() -> bool:
    """Whether anybody is left: a subreaper's descendants lose their parents to it."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def descendants() -> list[int]:
    """All that can be found in one look; who is forked during it may be missing."""
    parents = {int(name): parent_of(int(name)) for name in os.listdir("/proc") if name.isdigit()}
    for pid, parent in parents.items():
        if parent and parent not in parents:  # it died during the look, and its child was adopted
            parents[pid] = parent_of(pid)
    own = os.getpid()
    return [pid for pid in parents if _leads_to(own, pid, parents.get)]


def signal_all(number: int) -> None:
    """Signal every descendant, and nobody who got the pid of one."""
    for pid in descendants():
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:  # it has gone; or no descriptor is left, and the next round tries again
            continue
        try:
            if _leads_to(os.getpid(), pid, lambda each, _: parent_of(each)):
                signal.pidfd_send_signal(pidfd, number)
        except OSError:  # it has gone meanwhile, or a security module forbids it: it counts as left
            continue
        finally:
            os.close(pidfd)


def _leads_to(ancestor: int, pid: int, parent: Callable[[int, int], int | None]) -> bool:
    for _ in range(_DEEPEST):
        pid = parent(pid, 0) or 0
        if pid == ancestor:
            return True
        if pid == 0:
            break
    return False


def parent_of(pid: int) -> int:
    """The parent's pid; 0: it has none, or has gone."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from its third field on; empty: there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read(_CHUNK).rpartition(b")")[2].decode().split()
    except OSError:
        return []


def who_serves(own_device: int | None, char_major: int | None) -> str:
    """A sentence on the first descendant that has, or may have, a char device open that is not the given one's."""
    for pid in descendants():
        try:
            devices = open_char_devices(pid, char_major)
        except OSError as error:
            return f"{_named(pid)} is left alone: its open files cannot be read: {error.strerror}"
        for device in sorted(devices):
            if device != own_device:
                return f"{_named(pid)} is left alone: it has {_CHAR_DEVICE}{device} open"
    return ""


def may_serve(device: int, char_major: int | None) -> bool:
    """Whether a descendant has this device's char node open; also when that cannot be told."""
    try:
        return any(device in open_char_devices(pid, char_major) for pid in descendants())
    except OSError:
        return True


def open_char_devices(pid: int, char_major: int | None) -> set[int]:
    """The devices whose char nodes a process has open. By thread: a leader that has exited shows no descriptors.

    `char_major`: of those nodes; None: only their names tell.
    """
    found: set[int | None] = set()
    for thread in _list(f"/proc/{pid}/task"):
        table = f"/proc/{pid}/task/{thread}/fd"
        for descriptor in _list(table):
            path = f"{table}/{descriptor}"
            try:
                link = os.readlink(path)
                found.add(_named_by(link))
                if char_major is not None and link.startswith("/"):
                    found.add(_numbered_by(path, char_major))
            except OSError as error:
                if error.errno not in _VANISHED:
                    raise
    return {device for device in found if device is not None}


def _named_by(link: str) -> int | None:
    """The device that a char node of this name is of."""
    prefix, _, number = link.removesuffix(" (deleted)").rpartition("/")[2].partition(_CHAR_NAME)
    return int(number) if not prefix and number.isascii() and number.isdigit() else None


def _numbered_by(path: str, char_major: int) -> int | None:
    """The device that the file behind a link is the char node of. No server of a file system is asked."""
    if _statx is None:
        found = os.stat(path)
        mode, major, minor = found.st_mode, os.major(found.st_rdev), os.minor(found.st_rdev)
    else:
        answer = ctypes.create_string_buffer(_STATX_SIZE)
        if _statx(_AT_FDCWD, path.encode(), _AT_NO_AUTOMOUNT | _AT_STATX_DONT_SYNC, _STATX_TYPE, answer):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        places = (_STX_MODE, _STX_RDEV_MAJOR, _STX_RDEV_MINOR)
        mode, major, minor = (int.from_bytes(answer.raw[place], sys.byteorder) for place in places)
    return minor if stat.S_ISCHR(mode) and major == char_major else None


def _list(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError as error:
        if error.errno not in _VANISHED:
            raise
        return []


def still_there() -> str:
    """A sentence on the descendants that have not died of SIGKILL."""
    pids = descendants()
    shown = ", ".join(f"{_named(pid)} in state {(_stat(pid) or '?')[0]}" for pid in pids[:_MOST_NAMED])
    more = f" and {len(pids) - _MOST_NAMED} more" if len(pids) > _MOST_NAMED else ""
    return f"{shown or 'a process that cannot be found'}{more} did not die of SIGKILL in time"


def _named(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            comm = file.read(64).removesuffix(b"\n")
            return f"pid {pid} ({printable(comm)})"
    except OSError:
        return f"pid {pid}"
