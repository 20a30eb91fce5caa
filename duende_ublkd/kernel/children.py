"""The daemon's side of its disposable children: recovery commands, and what may end in an uninterruptible sleep.

The nursery (`nursery.py`) is started before memory is locked and has children ready; each order goes to one of them,
with one end of a socket pair that is this order's alone. Nothing here waits for a child or starts a thread, and only one
call waits for a disk: `start()`, where a nursery has to be executed.

Rules:
1. A child acts only when told `go`. An order that is not taken by its deadline is given up here, and its child, which
   finds the socket closed, does nothing. Whether it may still be done is asked right before the word.
2. A hand that misses its deadline is left to itself. Its answer is collected whenever it comes. It stops nothing after
   an open of the disk that took too long: it asks once more, and gets the claim on the char device with the word.
3. A recovery command is ended, kept or left by its caller's word; a supervisor without a daemon follows rules of its own.
4. A device has one recovery command at a time. One that was given up or ended counts until its supervisor is over, which
   is when nothing of it is left; one that was kept counts until its own process has ended, and so does one whose
   supervisor was killed. Those of a former daemon are not known here.
5. A nursery that has died leaves spares, and one of them becomes the next: no disk is waited for. Only where none is left
   is another one executed, by the next `start()` or order; posix_spawn(3) then holds up the daemon as long as the
   interpreter's disk does.

The daemon's unit has to leave these children alone when it stops (KillMode=process): one of them may be the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import grp
import json
import os
import pwd
import select
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duende_ublkd
from duende_ublkd.core.errors import (
    BusyError,
    CommandError,
    CommandOverdueError,
    DuendeError,
    KernelUnavailableError,
    NotDoneError,
    UsageError,
)
from duende_ublkd.core.model import OPENING, Process
from duende_ublkd.core.text import printable
from duende_ublkd.kernel import abi, binding, nursery
from duende_ublkd.kernel.control import why_no_control_device
from duende_ublkd.kernel.servers import start_time_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SPARES = 2
MOST_ORDERS = 64  # under way at once, servers that were kept not counted
TAKEN_IN = 2.0  # seconds for a hand to be found
STARTED_IN = 10.0  # and for a command to be executed, which reads from disks
NURSERY_IN = 10.0  # more for a nursery that has just been executed; on an emulated CPU it takes seconds
MOST_LINES = 20  # of a command's output
_ANSWER_GRACE = 1.0  # seconds that a supervisor has for its answer, beyond what it may take to kill
_CLOSE_GRACE = 0.1  # seconds that close() waits for the nursery, which ends in some milliseconds
_KILL_GRACE = 0.05  # and for one that was killed
_MOST_MESSAGE = 64 << 10
_NO_CHILD = "no child took the order"
_LOOK = "look at: journalctl -u duende-ublkd; systemctl restart duende-ublkd"


class StillRunningError(DuendeError):
    """The former recovery command of this device is not over."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Whose rights a command runs with."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CommandOrder:
    """What to run. `environment` is all that it gets.

    `timeout`: seconds, and counts only if the command is left, or the daemon goes away. `char_rdev`: of the device's char
    node; None: not known, and whoever has a char device open is found by its name alone. `title`: what people call it, where
    it recovers no device; its `dev_id` is no device's then.
    """

    dev_id: int
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    timeout: float
    user: Credentials | None = None
    char_rdev: tuple[int, int] | None = None
    title: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended. `status`: exit code, negative: signal; None: `trouble` says why there is none."""

    status: int | None
    output: str  # the last 4 KiB, at most 20 lines, each printable
    output_bytes: int
    trouble: str = ""


class _Talk:
    """One end of a socket pair in the event loop: messages, one by one, until the end (None)."""

    def __init__(self, hear: Callable[[dict[str, Any] | None], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._hear = hear
        self._socket, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket, self._read)

    def say(self, **message: object) -> None:
        """Whether it is heard shows in what comes back."""
        if self._socket.fileno() >= 0:
            with contextlib.suppress(OSError):
                self._socket.send(json.dumps(message).encode())

    def hand_over(self, descriptor: int) -> bool:
        """A copy of a descriptor, in a message of its own; whether it could be sent."""
        try:
            socket.send_fds(self._socket, [b"{}"], [descriptor])
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Nothing is heard any more, and the other end sees it."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()
        self.theirs.close()

    def _read(self) -> None:
        try:
            raw = self._socket.recv(_MOST_MESSAGE)
        except (BlockingIOError, ConnectionError):  # the latter is told once, before what was said before
            return
        if not raw:
            self.close()
        self._hear(json.loads(raw) if raw else None)


class Command:
    """One recovery command. The supervisor talks; whoever waits here may be cancelled without effect on it."""

    def __init__(
        self, order: CommandOrder, done: Callable[[Command], None], patience: float, may_go: Callable[[], bool]
    ) -> None:
        """`patience`: seconds until it has to be started. `may_go`: asked right before."""
        self.dev_id = order.dev_id
        self.pid: int | None = None
        self.supervisor: int | None = None
        self.is_kept = False
        self.talk = _Talk(self._hear)
        self._order = order
        self._done = done
        self._unsaid: list[dict[str, object]] | None = []  # until it has been told to go
        self._failure: DuendeError | None = None
        self._end: Ended | None = None
        self._left: str | None = None
        self._serves: bool | None = None
        self._is_over = False  # the supervisor
        self._is_let_go = False
        self._pidfd = -1  # of its own process, should the supervisor die
        self._changed = asyncio.Event()
        self._patience = patience
        self._may_go = may_go
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(patience, self._give_up)

    @property
    def is_under_way(self) -> bool:
        """Something of it may still act on the device."""
        return not self._is_let_go and not (self.is_kept and self._end is not None)

    async def no_longer_under_way(self) -> None:
        """Wait until nothing of it may act any more."""
        while self.is_under_way:
            await self._changed.wait()

    async def started(self) -> None:
        """Wait until it is executed; DuendeError says why it could not be."""
        await self._until(lambda: self.pid is not None or self._failure is not None)
        if self._failure:
            raise self._failure

    async def ended(self) -> Ended:
        """Wait for the end of the command's own process; what it has started may go on."""
        await self._until(lambda: self._end is not None or self._failure is not None)
        if self._end:
            return self._end
        return Ended(None, "", 0, self._trouble())

    def keep(self) -> None:
        """The device is served again, perhaps by this command: no limits any more."""
        self.is_kept = True
        self._say(do="keep")
        self._tell()

    def leave(self) -> None:
        """Nobody can tell what comes of it: it goes on as without a daemon, and is listened to.

        At the end of its order's time it is ended, unless something of it has a char device open. One that was kept stays
        kept.
        """
        self._say(do="leave")

    async def end(self, deadline: float = 5.0) -> str:
        """End it and all that descends from it; empty: all gone, else a sentence on what is left and why.

        Nothing is killed if one of them has another device's char device open.
        """
        if not self._is_over:
            self.is_kept = False
            self._left = None
            self._say(do="end", within=deadline)
        try:
            async with asyncio.timeout(deadline + _ANSWER_GRACE):
                await self._until(lambda: self._left is not None)
        except TimeoutError:
            return f"its supervisor has not answered for {deadline + _ANSWER_GRACE:.3g} s"
        return self._what_is_left()

    async def has_open(self, dev_id: int) -> bool:
        """Whether it or what descends from it has this order's char device open; True also when that cannot be told."""
        if dev_id != self._order.dev_id:
            raise ValueError(f"ublk{dev_id} is not what this command is for")
        if self._is_over:
            return self._end is None  # a supervisor ends after its last descendant
        self._serves = None
        self._say(do="who")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ANSWER_GRACE):
                await self._until(lambda: self._serves is not None)
        return self._serves is not False

    def close(self) -> None:
        """Stop listening; the supervisor goes on by itself."""
        self.talk.close()
        self._let_go()
        self._finish()

    def _what_is_left(self) -> str:
        if self._left is not None:
            return printable(self._left, 500)
        return "" if self._end or self.pid is None else self._trouble()  # a supervisor ends after its last descendant

    def _trouble(self) -> str:
        if self._failure:
            return str(self._failure)
        if self.is_kept:
            return "it was kept and left to itself, and its end was not seen"
        return "its supervisor is gone, and its end was not seen"

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition() and not self._is_over:
            await self._changed.wait()

    def _tell(self) -> None:
        """Wake whoever waits; the next change has an event of its own."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _say(self, **message: object) -> None:
        if self._unsaid is None:
            self.talk.say(**message)
        else:
            self._unsaid.append(message)

    def _hear(self, message: dict[str, Any] | None) -> None:
        if message is None:
            if self.pid is None and self._failure is None:
                self._failure = DuendeError(f"{self._name()} was not started: its child died", hint=_LOOK)
            self._finish()
        elif "taken" in message:
            self.supervisor = message["taken"]
            self._go()
        elif "started" in message:
            self.pid = message["started"]
            self._stop_timer()
            with contextlib.suppress(OSError):  # it has ended already, or descriptors are short
                self._pidfd = os.pidfd_open(message["started"])
        elif "exited" in message:
            self._end = Ended(message["exited"], _shown(message["output"]), message["bytes"])
        elif "trouble" in message:
            self._failure = self._failure or self._why_not_started(message)
            self._stop_timer()
        elif "left" in message:
            self._left = message["left"]
        elif "serves" in message:
            self._serves = message["serves"]
        self._tell()

    def _go(self) -> None:
        if not self._may_go():
            self._failure = _on_hold(self.dev_id)
            self.close()
            return
        self._stop_timer()
        self._timer = self._loop.call_later(self._patience, self._give_up)
        self.talk.say(do="go")
        for each in self._unsaid or ():
            self.talk.say(**each)
        self._unsaid = None

    def _give_up(self) -> None:
        """What nobody has taken will never be done. What hangs in its exec is listened to until it is really over."""
        self._timer = None
        is_taken = self._unsaid is None
        what = "it could not be executed" if is_taken else _NO_CHILD
        self._failure = DuendeError(f"{self._name()} was not started: {what} within {self._patience:.3g} s", hint=_LOOK)
        if is_taken:
            self.talk.say(do="give up")
            self._tell()
        else:
            self.close()

    def _finish(self) -> None:
        self._stop_timer()
        self._is_over = True
        if self._pidfd >= 0 and self._end is None and not _has_ended(self._pidfd):
            self._loop.add_reader(self._pidfd, self._let_go)
        else:
            self._let_go()
        self._tell()

    def _let_go(self) -> None:
        """Nothing of it is left, as far as can be seen; or nobody is to look any more."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._is_let_go = True
        self._done(self)
        self._tell()

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    @property
    def title(self) -> str:
        """What people call it."""
        return self._order.title or f"the recovery command of ublk{self.dev_id}"

    def _name(self) -> str:
        return self._order.title or f"the recovery command {printable(self._order.argv[0])}"

    def _why_not_started(self, message: dict[str, Any]) -> DuendeError:
        number, step = message["errno"], printable(message["step"] or "")
        hint = message.get("hint") or {
            errno.ENOENT: "give the command's full path, or set PATH in its environment; its first line may name a "
            "missing interpreter",
            errno.EACCES: f"chmod +x {printable(self._order.argv[0])}  # and the user needs access to its directories",
            errno.ENOEXEC: "a script starts with a line such as #!/bin/sh",
            errno.EPERM: "changing the user takes CAP_SETUID and CAP_SETGID in the daemon's unit",
        }.get(number, "run it by hand to see what it says")
        about = "" if step == "run" else f" (at: {step})"
        return DuendeError(f"{self._name()} cannot be run: {printable(message['trouble'])}{about}", hint=hint)


def _shown(output: str) -> str:
    """What a supervisor sent as one character for each byte."""
    lines = output.encode("latin-1").decode(errors="replace").splitlines()
    return "\n".join(printable(line.expandtabs()) for line in lines[-MOST_LINES:])


class _Hand:
    """One order that may sleep for ever: in the open of the disk first, in its STOP_DEV then."""

    def __init__(
        self,
        dev_id: int,
        claim: int,
        ended: Callable[[_Hand, dict[str, Any] | None], None],
        may_go: Callable[[Process | None], bool],
    ) -> None:
        self.dev_id = dev_id
        self.talk = _Talk(self._hear)
        self.answer: dict[str, Any] | None = None
        self.process: Process | None = None  # once it has taken the order
        self.is_sent = False  # the STOP_DEV
        self.is_over = False
        self.is_given_up = False
        self.is_refused = False
        self._claim = claim
        self._ended = ended
        self._may_go = may_go
        self.changed = asyncio.Event()

    @property
    def is_taken(self) -> bool:
        return self.process is not None

    @property
    def is_late(self) -> bool:
        """Nobody waits for it any more, and it may still be at it; one that may not go has nothing left to do."""
        return self.is_given_up and self.is_taken and not self.is_refused

    @property
    def step(self) -> str:
        """What it is at."""
        return abi.Command.STOP_DEV.name if self.is_sent else OPENING

    async def until(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Whether it came about by the deadline."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline):
                while not condition() and not self.is_over and not self.is_refused:
                    self.changed.clear()
                    await self.changed.wait()
        return condition()

    def _hear(self, message: dict[str, Any] | None) -> None:
        if message is not None and "taken" in message:
            if self._may_go(None):
                self.process = _process_named(message["taken"])
                self.talk.say(do="go")
            else:
                self.is_refused = True
        elif message is not None and "opened" in message:
            self._let_it_stop()
        else:
            self.is_over = True
            self.answer = message
            self.talk.close()
            self._ended(self, message)
        self.changed.set()

    def _let_it_stop(self) -> None:
        """The claim is held by whoever waits for this hand: not any more when that is given up."""
        if not self.is_given_up:
            self.is_refused = not self._may_go(self.process)
            self.is_sent = not self.is_refused and self.talk.hand_over(self._claim)
        if not self.is_sent:
            self.talk.say(do="nothing")


def _on_hold(dev_id: int) -> NotDoneError:
    hint = f"duende-ublkd explain {dev_id}; to end the hold: duende-ublkd release {dev_id}"
    return NotDoneError("not done: it is on hold now", hint=hint)


class Children:
    """Gives orders to the nursery's children. To be made in the running loop.

    `on_late(command, dev_id, result)`: a hand that was given up has answered; -EINTR: it died, so the command is over.
    `on_trouble(text)`: the nursery could not lock its memory.
    """

    def __init__(
        self,
        *,
        on_late: Callable[[str, int, int], None] | None = None,
        on_trouble: Callable[[str], None] | None = None,
        lock_memory: bool = False,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_late = on_late
        self._on_trouble = on_trouble
        self._lock = lock_memory
        self._orders: socket.socket | None = None
        self._pid = 0
        self._pidfd = -1
        self._born = 0.0
        self._commands: set[Command] = set()
        self._hands: set[_Hand] = set()
        self._former: dict[int, int] = {}  # pidfd of a former daemon's hand -> its device

    @property
    def nursery_pid(self) -> int | None:
        """The nursery's pid while it runs."""
        return self._pid or None

    @property
    def is_alive(self) -> bool:
        """The nursery runs. Not so: no spare of the last one has taken its place, or not yet."""
        return self._pidfd >= 0 and not _has_ended(self._pidfd)

    @property
    def overdue(self) -> int:
        """Hands that were given up and have not answered."""
        return sum(hand.is_late for hand in self._hands) + len(self._former)

    def start(self) -> None:
        """Execute the nursery, if none runs and none is being made of a spare. To be done before memory is locked.

        Quick, unless the interpreter's disk hangs; `is_alive` tells whether it is worth the risk.
        """
        self._look_after_nursery()
        if self._orders:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            self._pid = _spawn_nursery(theirs, lock=self._lock)
            self._pidfd = os.pidfd_open(self._pid)
        except OSError as error:
            ours.close()
            raise DuendeError(
                f"the daemon's children cannot be started: {error.strerror}", hint="look at: ulimit -u; free -m"
            ) from error
        finally:
            theirs.close()
        self._orders = ours
        self._born = self._loop.time()
        self._loop.add_reader(self._pidfd, self._nursery_died)
        self._loop.add_reader(ours, self._hear_nursery)

    async def former_is_over(self, dev_id: int, deadline: float) -> bool:
        """Wait until no recovery command of this device is under way (rule 4); False: one still is."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline):
                while former := self._under_way(dev_id):
                    await former.no_longer_under_way()
        return self._under_way(dev_id) is None

    def run(self, order: CommandOrder, *, may_go: Callable[[], bool] = lambda: True) -> Command:
        """Have a child run a command. StillRunningError: the device's former one does; DuendeError: no child can be had.

        `may_go`: asked when a child has taken the order; False: it is not done, and started() says so.
        """
        if former := self._under_way(order.dev_id):
            raise _still_running(former)
        user = order.user
        self.start()
        command = Command(order, self._commands.discard, self._patience(STARTED_IN), may_go)
        self._commands.add(command)
        try:
            self._give(
                command.talk,
                do="run",
                dev_id=order.dev_id,
                title=command.title,
                argv=list(order.argv),
                env=dict(order.environment),
                timeout=order.timeout,
                uid=user.uid if user else None,
                gid=user.gid if user else None,
                groups=list(user.groups) if user else None,
                char_major=order.char_rdev[0] if order.char_rdev else None,
            )
        except BaseException:
            command.close()
            raise
        return command

    def spawn(self, argv: Sequence[str], stdin: int) -> None:
        """Have a child execute a program, `argv[0]` being its path, and leave it to itself. Never waits.

        It gets the daemon's environment, `stdin`, /dev/null for the rest, and a session of its own. Neither its start nor
        its end is told of here: when `stdin` is a socket, its other end sees both. What a child has not taken yet is not
        lost, and is done later. DuendeError: there are no children, and none are started here.
        """
        self._look_after_nursery()
        self._send(stdin, do="spawn", argv=list(argv))

    async def stop_device(
        self,
        dev_id: int,
        rdev: tuple[int, int],
        claim: int,
        *,
        try_first: bool,
        deadline: float,
        may_go: Callable[[Process | None], bool] = lambda _: True,
    ) -> None:
        """STOP_DEV of a device whose disk nobody has claimed: not mounted, not swapped on, not under dm, md or loop.

        `rdev`: of the disk that was looked at. `claim`: the device's char node, opened by the caller, who keeps it open
        until this is over; the hand has a copy while it stops the device. `try_first`: the driver has
        UBLK_F_SAFE_STOP_DEV, and TRY_STOP_DEV then spares a disk that is merely open, too. `deadline`: seconds for the
        answer, from when a hand has taken the order. A recoverable device is privileged, so no node's path is sent.
        `may_go`: asked when a hand has taken the order, with None; and with the hand's process right before STOP_DEV is
        sent. Raises DuendeError (it may not go, or there is no hand) and its subclasses BusyError,
        NoSuchDeviceError, CommandError, CommandOverdueError, KernelUnavailableError.
        """
        self.start()
        hand = _Hand(dev_id, claim, self._hand_ended, may_go)
        self._hands.add(hand)
        try:
            self._give(hand.talk, **_stop_order(dev_id, rdev, try_first=try_first))
            taken = await hand.until(lambda: hand.is_taken, self._patience(TAKEN_IN))
            if hand.is_refused:
                raise _on_hold(dev_id)
            if not taken:
                raise DuendeError(f"STOP_DEV on ublk{dev_id} was not sent: {_NO_CHILD}", hint=_LOOK)
            answered = await hand.until(lambda: hand.is_over, deadline)
            if hand.is_refused:
                raise _on_hold(dev_id)
        finally:
            hand.is_given_up = True
            if not hand.is_taken:  # also when the caller was cancelled: nothing was done, nothing will be
                hand.talk.close()
                self._hands.discard(hand)
        if not answered:
            raise CommandOverdueError(hand.step, dev_id, deadline)
        _judge(dev_id, hand.step, hand.answer)

    def watch_former(self, dev_id: int, hand: Process) -> bool:
        """Whether a hand of a former daemon is still at it; `on_late` tells of its end, with -EINTR."""
        try:
            pidfd = os.pidfd_open(hand.pid)
        except OSError:
            return False
        if _process_named(hand.pid) != hand or _has_ended(pidfd):
            os.close(pidfd)
            return False
        self._former[pidfd] = dev_id
        self._loop.add_reader(pidfd, self._former_ended, pidfd)
        return True

    def _former_ended(self, pidfd: int) -> None:
        dev_id = self._former.pop(pidfd)
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        if self._on_late:
            self._on_late(abi.Command.STOP_DEV.name, dev_id, -errno.EINTR)

    def close(self) -> None:
        """Give everything back, in at most 0.2 s. Commands and hands under way go on by themselves."""
        for pidfd in self._former:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
        self._former.clear()
        for command in tuple(self._commands):
            command.close()
        for hand in tuple(self._hands):
            hand.talk.close()
        self._hands.clear()
        if self._orders:
            self._orders_closed()
            self._end_nursery()
            self._drop_nursery()

    def _patience(self, seconds: float) -> float:
        return seconds + max(0.0, self._born + NURSERY_IN - self._loop.time())

    def _give(self, talk: _Talk, **order: object) -> None:
        busy = len(self._hands) + sum(not command.is_kept for command in self._commands)
        if busy > MOST_ORDERS:
            raise DuendeError(f"{MOST_ORDERS} commands are under way already", hint="look at: duende-ublkd list")
        self._send(talk.theirs.fileno(), **order)
        talk.theirs.close()

    def _send(self, descriptor: int, **order: object) -> None:
        if self._orders is None:
            raise DuendeError(f"{_NO_CHILD}: the nursery is gone", hint=_LOOK)
        message = json.dumps(order).encode()
        if len(message) > nursery.MOST_ORDER:
            raise UsageError("the command and its environment are longer than 64 KiB", hint="put them into a script")
        try:
            socket.send_fds(self._orders, [message], [descriptor])
        except OSError as error:
            raise DuendeError(f"{_NO_CHILD}: {error.strerror}", hint=_LOOK) from error

    def _under_way(self, dev_id: int) -> Command | None:
        return next((each for each in self._commands if each.dev_id == dev_id and each.is_under_way), None)

    def _hand_ended(self, hand: _Hand, answer: dict[str, Any] | None) -> None:
        self._hands.discard(hand)
        if hand.is_late and self._on_late:
            told = answer or {}
            self._on_late(hand.step, hand.dev_id, told.get("result", -told.get("errno", errno.EINTR)))

    def _hear_nursery(self) -> None:
        assert self._orders  # noqa: S101 - for the type checker
        try:
            raw = self._orders.recv(_MOST_MESSAGE)
        except BlockingIOError:
            return
        except ConnectionError:
            raw = b""
        if not raw:
            self._orders_closed()
            if self._pidfd < 0:  # it was the heir's, and there is none
                self._orders = None
            return
        message = json.loads(raw)
        if "nursery" in message:
            self._take_heir(message["nursery"])
        elif self._on_trouble:
            self._on_trouble(printable(message["trouble"]))

    def _orders_closed(self) -> None:
        if self._orders and self._orders.fileno() >= 0:
            self._loop.remove_reader(self._orders)
            self._orders.close()

    def _look_after_nursery(self) -> None:
        """What the loop will notice, too, when it is its turn."""
        if self._pidfd >= 0:
            if _has_ended(self._pidfd):
                self._nursery_died()
        elif self._orders and self._loop.time() > self._born + NURSERY_IN:
            self._drop_nursery()  # no spare has become the heir

    def _nursery_died(self) -> None:
        """Have one of its spares take its place; the others end with the socket that they know."""
        heirs_orders = None
        with contextlib.suppress(OSError, DuendeError):  # no descriptor, or no spare: the next order executes another
            heirs_orders = self._appoint_heir()
        self._drop_nursery()
        if heirs_orders is None:
            return
        self._orders = heirs_orders
        self._born = self._loop.time()
        self._loop.add_reader(heirs_orders, self._hear_nursery)

    def _appoint_heir(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._send(theirs.fileno(), do="nurse", spares=SPARES, lock=self._lock)
        except DuendeError:
            ours.close()
            raise
        ours.setblocking(False)
        return ours

    def _take_heir(self, pid: int) -> None:
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError:  # it has died already; or descriptors are short, and it ends with the socket
            self._drop_nursery()
            return
        self._pid = pid
        self._loop.add_reader(self._pidfd, self._nursery_died)

    def _end_nursery(self) -> None:
        """Its spares have seen the end of the socket, and its other children go on without it."""
        if self._pidfd < 0 or _has_ended(self._pidfd, within=_CLOSE_GRACE):
            return
        with contextlib.suppress(ProcessLookupError):  # it has just ended; else it is hardly begun, or stopped
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        _has_ended(self._pidfd, within=_KILL_GRACE)

    def _drop_nursery(self) -> None:
        """It has ended, or has been told to."""
        self._orders_closed()
        self._orders = None
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            with contextlib.suppress(ChildProcessError):  # an heir is no child of ours
                os.waitpid(self._pid, os.WNOHANG)
        self._pid, self._pidfd = 0, -1


def _still_running(former: Command) -> StillRunningError:
    pid = f" (pid {former.pid})" if former.pid else ""
    supervisor = former.supervisor
    hint = f"ps -o pid,stat,wchan:20,args -p {supervisor} --ppid {supervisor}" if supervisor else _LOOK
    return StillRunningError(f"{former.title.replace('the', 'the former', 1)}{pid} still runs", hint=hint)


def _has_ended(pidfd: int, *, within: float = 0.0) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(within * 1000))


def _spawn_nursery(orders: socket.socket, *, lock: bool) -> int:
    directories = dict.fromkeys([str(Path(duende_ublkd.__path__[0]).parent), binding.location()])
    argv = [sys.executable, "-I", "-S", "-c", nursery.PROGRAM, str(SPARES), "lock" if lock else "free", *directories]
    actions: list[Any] = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, orders.fileno(), nursery.ORDER_FD),
    ]
    return os.posix_spawn(
        sys.executable,
        argv,
        os.environ,
        file_actions=actions,
        setsid=True,
        setsigmask=(),
        setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
    )


def _stop_order(dev_id: int, rdev: tuple[int, int], *, try_first: bool) -> dict[str, object]:
    """Entries as this side packs them; the hand puts the control device's descriptor in."""

    def entry(cmd_op: int) -> str:
        command = abi.CtrlCmd(dev_id).pack()
        return abi.pack_sqe(abi.IORING_OP_URING_CMD, -1, 1, cmd_op=cmd_op, command=command).hex()

    stop = abi.Command.STOP_DEV
    return {
        "do": "stop",
        "node": abi.BLOCK_DEVICE.format(dev_id),
        "control": abi.CONTROL_DEVICE,
        "rdev": list(rdev),
        "try": entry(abi.Command.TRY_STOP_DEV.encoded) if try_first else "",
        "stop": [entry(stop.encoded), entry(stop.nr)],  # 6.0 to 6.3 know the plain number only
    }


def _process_named(pid: int) -> Process:
    """Whoever has this number now."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return Process(pid, start_time_of(file.read()))
    except OSError:  # it has ended
        return Process(pid, 0)


def _judge(dev_id: int, name: str, answer: dict[str, Any] | None) -> None:
    """Raise what a hand's answer means. `name`: of the step that it was at."""
    if answer is None:
        raise CommandError(name, dev_id, errno.EINTR, "its child died without an answer")
    number = answer.get("errno", 0)
    match answer.get("failed"):
        case None:
            if answer["result"] < 0:
                raise abi.error_of(abi.Command[answer["command"]], dev_id, answer["result"])
        case "ring":
            message, hint = binding.why_no_ring(number)
            raise KernelUnavailableError(message, hint=hint)
        case "control":
            message, hint = why_no_control_device(abi.CONTROL_DEVICE, number, os.uname().release, os.geteuid())
            raise KernelUnavailableError(message, hint=hint)
        case "send":
            raise CommandError(name, dev_id, number, f"it cannot be sent: {os.strerror(number)}")
        case _:
            raise _why_not_claimed(name, dev_id, number)


def _why_not_claimed(name: str, dev_id: int, number: int) -> CommandError:
    node = abi.BLOCK_DEVICE.format(dev_id)
    if number == errno.EBUSY:
        return BusyError(name, dev_id, number, f"{node} is mounted, swapped on, or claimed by dm, md or loop")
    meaning = {
        errno.ENOTBLK: f"{node} is not a block device",
        errno.ESTALE: f"{node} is not the disk that was looked at",
    }.get(number, f"{node}: {os.strerror(number)}")
    return CommandError(name, dev_id, number, meaning)


def resolve_user(name_or_uid: str) -> Credentials:
    """The rights of an account, supplementary groups included; UsageError if there is none."""
    try:
        account = pwd.getpwuid(int(name_or_uid)) if name_or_uid.isdecimal() else pwd.getpwnam(name_or_uid)
    except (KeyError, OverflowError, ValueError):
        shown = printable(name_or_uid)
        raise UsageError(
            f"there is no user {shown}", hint=f"getent passwd {shown}; to see all: getent passwd"
        ) from None
    groups = {account.pw_gid, *(each.gr_gid for each in grp.getgrall() if account.pw_name in each.gr_mem)}
    return Credentials(account.pw_uid, account.pw_gid, tuple(sorted(groups)))
