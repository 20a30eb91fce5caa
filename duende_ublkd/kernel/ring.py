"""One io_uring ring, bound to the running event loop.

How it works: commands that arrive in one turn of the loop are written to the submission queue and go to the kernel in
one system call; completions ring an eventfd that the loop reads. No thread, no polling, no sleep.

Rules:
1. The kernel writes to a command's buffer whenever it likes until the completion. So a command is owned by the ring
   from submission to completion, whatever its caller does meanwhile: give up, be cancelled, or close the ring.
2. Every command has a deadline (or says that it has none, as a server's FETCH). After it comes ASYNC_CANCEL, after that
   the caller gets CommandOverdueError; the late completion is collected and counted all the same.
3. No more commands are in flight than the completion queue has room for; the rest wait their turn. Cancellations and
   no-ops do not: the first make room, and the second tell a ring that is full from one that carries nothing.

4. The kernel takes nothing from it but what `OPERATIONS` names: neither this code gone wrong nor whoever gets hold of the
   descriptor can read, write or open anything with it.

`binding` says what is special about an entry of 128 bytes, and what a restriction cannot tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.errors import CommandError, CommandOverdueError, KernelUnavailableError
from duende_ublkd.kernel import abi, binding

if TYPE_CHECKING:
    from collections.abc import Callable

CANCEL_GRACE = 1.0  # seconds; an interruptible wait answers its cancellation in well under one millisecond
CLOSE_GRACE = 1.0
OPERATIONS = (abi.IORING_OP_NOP, abi.IORING_OP_ASYNC_CANCEL, abi.IORING_OP_URING_CMD)
RETRY = 0.01  # seconds after which the kernel, short of memory, is offered the same entries again

_NOP = "NOP"
_why_no_ring = binding.why_no_ring


@dataclass(frozen=True, slots=True)
class Completion:
    """What the kernel answered. `result`: negative errno or the command's value; `cancelled`: we had asked for that."""

    result: int
    cancelled: bool = False


@dataclass(slots=True, eq=False)
class _Flight:
    """A command from its request to its completion. `keep` holds every buffer that the kernel may touch."""

    name: str
    dev_id: int | None
    user_data: int
    entry: bytes  # packed when asked for, so that what cannot be packed fails its caller and nobody else
    keep: object = None
    future: asyncio.Future[Completion] | None = None  # None: an ASYNC_CANCEL, whose answer says nothing that we need
    waited: float = 0.0
    timer: asyncio.TimerHandle | None = None
    goes_first: bool = False
    place: int = 0
    sent: bool = False
    cancelled: bool = False
    overdue: bool = False

    @property
    def abandoned(self) -> bool:
        """Whoever asked has gone, with an error or by being cancelled."""
        return self.future is not None and self.future.done()


# Rule 1 outlives the ring: what a closed ring could not collect stays referenced for as long as the process lives.
_abandoned: list[_Flight] = []


@dataclass(slots=True)
class RingStats:
    """Counters since the ring was made; `in_flight` and `overdue` are as of now."""

    submitted: int = 0
    system_calls: int = 0
    late: int = 0
    overflows: int = 0
    in_flight: int = 0
    overdue: int = 0


class Ring:
    """A ring with 128-byte entries. Make it inside the running loop; close it with `await close()`."""

    def __init__(self, entries: int = 64, *, on_late: Callable[[str, int | None, int], None] | None = None) -> None:
        """`entries`: a power of two. `on_late(name, dev_id, result)`: a command that was given up has completed."""
        if entries.bit_count() != 1:
            raise ValueError(f"a ring of {entries} entries: it takes a power of two")
        self._loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as undo:
            self._ring = _set_up(entries)
            undo.callback(binding.queue.io_uring_queue_exit, self._ring)
            self._entries = undo.enter_context(binding.map_entries(self._ring.ring_fd, entries))
            self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(os.close, self._event)
            binding.checked(binding.register.io_uring_register_eventfd, self._ring, self._event)
            self.is_confined = _confine(self._ring.ring_fd)
            self._loop.add_reader(self._event, self._on_event)
            undo.callback(self._loop.remove_reader, self._event)
            self._give_back = undo.pop_all().close
        self._mask = entries - 1
        self._capacity = 2 * entries  # the kernel makes the completion queue twice as long as the submission queue
        self._tail = 0
        self._cqe = binding.queue.io_uring_cqe()
        self._waiting: deque[_Flight] = deque()
        self._unsubmitted: deque[_Flight] = deque()  # written to the queue, and the kernel has not taken it yet
        self._in_flight: dict[int, _Flight] = {}
        self._numbers = itertools.count(1)
        self._flush: asyncio.Handle | None = None
        self._idle: asyncio.Future[None] | None = None
        self._closed = False
        self._on_late = on_late
        self._stats = RingStats()

    @property
    def stats(self) -> RingStats:
        """The counters, up to date."""
        self._stats.in_flight = len(self._in_flight)
        return self._stats

    async def command(
        self,
        name: str,
        fd: int,
        cmd_op: int,
        command: bytes,
        *,
        deadline: float | None,
        keep: object = None,
        dev_id: int | None = None,
    ) -> Completion:
        """Send one IORING_OP_URING_CMD to `fd` and wait for its completion.

        `command`: up to 80 bytes. `deadline`: seconds; None for a command that may take for ever. `keep`: the buffers
        that the command points to. Raises CommandOverdueError when neither the command nor its cancellation answered,
        CommandError (ECANCELED) when the kernel did not take it by its deadline, so that nobody will answer it either,
        RuntimeError on a closed ring.
        """
        number = next(self._numbers)
        entry = abi.pack_sqe(abi.IORING_OP_URING_CMD, fd, number, cmd_op=cmd_op, command=command)
        return await self._perform(_Flight(name, dev_id, number, entry, keep), deadline)

    async def nop(self, deadline: float) -> None:
        """Prove that commands go to the kernel and come back. CommandOverdueError: they do not.

        Nothing but the kernel's own entry is needed for it: however many commands hang, it is answered.
        """
        if any(flight.name == _NOP for flight in self._in_flight.values()):
            raise CommandOverdueError(_NOP, None, deadline)  # the former one is still on its way
        number = next(self._numbers)
        entry = abi.pack_sqe(abi.IORING_OP_NOP, -1, number)
        await self._perform(_Flight(_NOP, None, number, entry, goes_first=True), deadline)

    async def close(self) -> None:
        """Cancel what is in flight, wait a moment for it, give the ring back. Callers still waiting get an error."""
        if self._closed:
            return
        self._closed = True
        for flight in self._waiting:
            _give_up(flight, RuntimeError(f"{flight.name}: the ring was closed before it could be sent"))
        self._waiting.clear()
        for flight in list(self._in_flight.values()):
            self._cancel(flight)
        try:
            if self._in_flight:
                self._idle = self._loop.create_future()
                await asyncio.wait([self._idle], timeout=CLOSE_GRACE)
        finally:
            self._tear_down()

    def _tear_down(self) -> None:
        if self._flush:
            self._flush.cancel()
        for flight in self._in_flight.values():
            _give_up(flight, CommandOverdueError(flight.name, flight.dev_id, flight.waited))
        _abandoned.extend(self._in_flight.values())
        self._in_flight.clear()
        self._give_back()

    async def _perform(self, flight: _Flight, deadline: float | None) -> Completion:
        """Send whatever entry the flight carries, and wait for its completion."""
        if self._closed:
            raise RuntimeError(f"{flight.name}: the ring is closed")
        flight.future = self._loop.create_future()
        if deadline is not None:
            flight.waited = deadline
            flight.timer = self._loop.call_later(deadline, self._expire, flight)
        if flight.goes_first:
            self._waiting.appendleft(flight)
        else:
            self._waiting.append(flight)
        self._plan_flush()
        return await flight.future

    def _plan_flush(self) -> None:
        if self._flush is None:
            self._flush = self._loop.call_soon(self._send_waiting)

    def _send_waiting(self) -> None:
        self._flush = None
        self._blank_abandoned()
        while self._write_waiting():
            if not self._submit():
                self._flush = self._loop.call_later(RETRY, self._send_waiting)
                return

    def _blank_abandoned(self) -> None:
        """An entry cannot be taken back; but its descriptor may be closed by now, and its number another file's."""
        for flight in self._unsubmitted:
            if flight.abandoned:
                self._put(flight.place, abi.pack_sqe(abi.IORING_OP_NOP, -1, flight.user_data))

    def _write_waiting(self) -> bool:
        """Fill the submission queue; False when there is nothing to submit."""
        while self._waiting:
            flight = self._waiting[0]
            if flight.abandoned:
                _stop_timer(self._waiting.popleft())
                continue
            if not flight.goes_first and len(self._in_flight) >= self._capacity:
                break
            if not binding.queue.io_uring_get_sqe(self._ring):
                break
            self._write(self._waiting.popleft())
        return bool(self._unsubmitted)

    def _write(self, flight: _Flight) -> None:
        flight.place = (self._tail & self._mask) * abi.SQE_SIZE
        self._tail += 1
        self._put(flight.place, flight.entry)
        self._unsubmitted.append(flight)
        self._in_flight[flight.user_data] = flight

    def _put(self, place: int, entry: bytes) -> None:
        self._entries[place : place + abi.SQE_SIZE] = entry

    def _submit(self) -> bool:
        """One io_uring_enter; False when the kernel took nothing and wants to be asked again."""
        self._stats.system_calls += 1
        try:
            sent = binding.checked(binding.queue.io_uring_submit, self._ring)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENOMEM):
                raise
            return False
        self._stats.submitted += sent
        for _ in range(sent):
            self._unsubmitted.popleft().sent = True
        return sent > 0

    def _on_event(self) -> None:
        os.eventfd_read(self._event)
        if binding.queue.io_uring_cq_has_overflow(self._ring):
            self._stats.overflows += 1  # and peeking at the queue's end makes the kernel hand out what did not fit
        # One at a time: the binding has room for a single completion's address.
        while binding.queue.io_uring_peek_batch_cqe(self._ring, self._cqe, 1):
            user_data, result = self._cqe.user_data, self._cqe.res
            binding.queue.io_uring_cq_advance(self._ring, 1)
            self._complete(self._in_flight.pop(user_data), result)
        if self._waiting:
            self._plan_flush()
        if self._idle and not self._in_flight and not self._idle.done():
            self._idle.set_result(None)

    def _complete(self, flight: _Flight, result: int) -> None:
        _stop_timer(flight)
        flight.keep = None
        if flight.future and not flight.future.done():
            flight.future.set_result(Completion(result, flight.cancelled))
        if flight.overdue:
            self._stats.overdue -= 1
            self._stats.late += 1
            if self._on_late:
                # In a turn of its own: an exception in there must not cost the completions that come behind.
                self._loop.call_soon(self._on_late, flight.name, flight.dev_id, result)

    def _expire(self, flight: _Flight) -> None:
        if not flight.sent:
            # The kernel never had it: nothing to own, nothing to cancel.
            _give_up(flight, _not_sent(flight))
            return
        self._cancel(flight)
        flight.timer = self._loop.call_later(CANCEL_GRACE, self._declare_overdue, flight)

    def _cancel(self, flight: _Flight) -> None:
        flight.cancelled = True
        number = next(self._numbers)
        entry = abi.pack_sqe(abi.IORING_OP_ASYNC_CANCEL, -1, number, addr=flight.user_data)
        self._waiting.appendleft(_Flight("ASYNC_CANCEL", flight.dev_id, number, entry, goes_first=True))
        self._plan_flush()

    def _declare_overdue(self, flight: _Flight) -> None:
        flight.overdue = True
        self._stats.overdue += 1
        _give_up(flight, CommandOverdueError(flight.name, flight.dev_id, flight.waited + CANCEL_GRACE))


def _stop_timer(flight: _Flight) -> None:
    if flight.timer:
        flight.timer.cancel()
        flight.timer = None


def _give_up(flight: _Flight, error: Exception) -> None:
    _stop_timer(flight)
    if flight.future and not flight.future.done():
        flight.future.set_exception(error)


def _not_sent(flight: _Flight) -> Exception:
    if flight.goes_first:  # a question to the ring itself, and this is the answer
        return CommandOverdueError(flight.name, flight.dev_id, flight.waited)
    why = f"not sent: the kernel took no command for {flight.waited:.3g} s"
    return CommandError(flight.name, flight.dev_id, errno.ECANCELED, why)


def _set_up(entries: int) -> Any:  # noqa: ANN401 - liburing has no types
    try:
        return binding.set_up(entries)
    except OSError as error:
        message, hint = _why_no_ring(error.errno or 0)
        raise KernelUnavailableError(message, hint=hint) from error


def _confine(ring_fd: int) -> bool:
    """After this nothing can be registered any more. False: this kernel restricts no ring."""
    try:
        return binding.confine(ring_fd, OPERATIONS)
    except OSError as error:
        message, hint = _why_no_ring(error.errno or 0)
        raise KernelUnavailableError(message, hint=hint) from error
