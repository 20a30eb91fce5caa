"""The ring on the host's own io_uring.

/dev/null takes any command and answers 0. What has to stay in flight is a read from an empty pipe: the kernel cancels
it at once when asked. No file of an ordinary machine refuses cancellation, so a ring that never asks stands in for such
a kernel; the real thing (STOP_DEV behind a stuck request) is in tests/guest.
"""

import asyncio
import ctypes
import errno
import gc
import os
import resource
import struct
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from duende_ublkd.core.errors import CommandError, CommandOverdueError, KernelUnavailableError
from duende_ublkd.kernel import abi, binding, ring
from duende_ublkd.kernel.ring import Completion, Ring

IORING_OP_READ = 22
NULL_COMMAND = 0x7500


@pytest.fixture(autouse=True)
def short_graces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "CANCEL_GRACE", 0.05)
    monkeypatch.setattr(ring, "CLOSE_GRACE", 0.05)


@pytest.fixture(autouse=True)
def reads(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Let the rings of these tests read from pipes, which the daemon's cannot."""
    if "confined" not in request.fixturenames:
        monkeypatch.setattr(ring, "OPERATIONS", (*ring.OPERATIONS, IORING_OP_READ))


@pytest.fixture
def confined() -> None:
    """Rings as the daemon has them."""


@pytest.fixture
def null() -> Iterator[int]:
    descriptor = os.open("/dev/null", os.O_RDWR)
    yield descriptor
    os.close(descriptor)


class Pipe:
    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


class DeafRing(Ring):
    """Its cancellations get lost, as with a kernel that sleeps uninterruptibly."""

    def _cancel(self, flight: ring._Flight) -> None:
        flight.cancelled = True


class BusyKernelRing(Ring):
    """As long as `busy`, its kernel takes nothing."""

    busy = True

    def _submit(self) -> bool:
        return not self.busy and super()._submit()


class Buffer:
    """Memory that the kernel writes to, and that tells when it is freed."""

    def __init__(self, size: int = 8) -> None:
        self.memory = (ctypes.c_char * size)()
        self.address = ctypes.addressof(self.memory)


async def null_command(on: Ring, fd: int, *, deadline: float | None = 5.0) -> Completion:
    return await on.command("NULL", fd, NULL_COMMAND, b"", deadline=deadline)


async def read(on: Ring, pipe: Pipe, *, deadline: float | None, buffer: Buffer | None = None) -> Completion:
    """Through the ring as a command would be, but as an opcode that blocks."""
    buffer = buffer or Buffer()
    number = next(on._numbers)
    entry = bytearray(abi.pack_sqe(IORING_OP_READ, pipe.reader, number, addr=buffer.address))
    struct.pack_into("=Q", entry, 8, 2**64 - 1)
    struct.pack_into("=I", entry, 24, len(buffer.memory))
    return await on._perform(ring._Flight("READ", 7, number, bytes(entry), buffer), deadline)


def with_ring(body: Callable[[Ring], Coroutine[Any, Any, None]], made: Callable[[], Ring] = Ring) -> None:
    """Run `body` on a ring of its own; an error that only the loop saw is an error of the test."""

    async def run() -> None:
        unhandled: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(str(context)))
        subject = made()
        try:
            await body(subject)
        finally:
            await subject.close()
        assert unhandled == []

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def test_a_command_gets_the_kernels_answer(null: int) -> None:
    async def body(subject: Ring) -> None:
        assert await null_command(subject, null) == Completion(0)
        assert (await null_command(subject, -1)).result == -errno.EBADF

    with_ring(body)


def test_commands_of_one_turn_share_their_system_calls(null: int) -> None:
    async def body(subject: Ring) -> None:
        answers = await asyncio.gather(*(null_command(subject, null) for _ in range(100)))
        assert [answer.result for answer in answers] == [0] * 100
        assert (subject.stats.submitted, subject.stats.system_calls) == (100, 2)

    with_ring(body)


def test_more_commands_than_entries_and_completions_queue_up(null: int) -> None:
    async def body(subject: Ring) -> None:
        answers = await asyncio.gather(*(null_command(subject, null) for _ in range(1000)))
        assert len(answers) == 1000
        assert subject.stats.overflows == 0

    with_ring(body, lambda: Ring(4))


@pytest.mark.parametrize("entries", [1, 2, 32, 256])
def test_a_ring_of_any_power_of_two_wraps_around(null: int, entries: int) -> None:
    async def body(subject: Ring) -> None:
        for _ in range(5):
            await asyncio.gather(*(null_command(subject, null) for _ in range(entries + 1)))
        assert subject.stats.submitted == 5 * (entries + 1)

    with_ring(body, lambda: Ring(entries))


def test_a_ring_of_another_size_is_refused_because_its_entries_would_be_misplaced() -> None:
    async def body() -> None:
        with pytest.raises(ValueError, match="power of two"):
            Ring(48)

    asyncio.run(body())


def test_user_data_is_never_used_twice(null: int, pipe: Pipe) -> None:
    seen: list[int] = []

    class Watched(Ring):
        def _put(self, place: int, entry: bytes) -> None:
            seen.append(struct.unpack_from("=Q", entry, 32)[0])
            super()._put(place, entry)

    async def body(subject: Ring) -> None:
        await asyncio.gather(*(null_command(subject, null) for _ in range(50)))
        await read(subject, pipe, deadline=0.01)
        await asyncio.gather(*(null_command(subject, null) for _ in range(50)))

    with_ring(body, Watched)
    assert len(seen) == len(set(seen)) == 102
    assert 0 not in seen


def test_a_command_that_cannot_be_packed_fails_its_caller_and_nobody_else(null: int) -> None:
    async def body(subject: Ring) -> None:
        too_long = subject.command("LONG", null, NULL_COMMAND, bytes(81), deadline=5)
        bad_descriptor = subject.command("BAD", 1 << 40, NULL_COMMAND, b"", deadline=5)
        answers = await asyncio.gather(too_long, bad_descriptor, null_command(subject, null), return_exceptions=True)
        assert isinstance(answers[0], ValueError)
        assert isinstance(answers[1], struct.error)
        assert answers[2] == Completion(0)

    with_ring(body)


def test_after_its_deadline_a_command_is_cancelled_and_says_so(pipe: Pipe) -> None:
    async def body(subject: Ring) -> None:
        began = time.monotonic()
        assert await read(subject, pipe, deadline=0.05) == Completion(-errno.ECANCELED, cancelled=True)
        assert time.monotonic() - began >= 0.05
        await until(lambda: subject.stats.in_flight == 0)
        assert (subject.stats.overdue, subject.stats.late) == (0, 0)

    with_ring(body)


def test_a_command_without_a_deadline_waits_for_its_answer(pipe: Pipe) -> None:
    async def body(subject: Ring) -> None:
        waiting = asyncio.create_task(read(subject, pipe, deadline=None))
        await until(lambda: subject.stats.in_flight == 1)
        os.write(pipe.writer, b"x")
        assert await waiting == Completion(1)

    with_ring(body)


def test_a_command_that_ignores_its_cancellation_is_overdue_and_stays_owned(pipe: Pipe) -> None:
    late: list[tuple[str, int | None, int]] = []

    async def body(subject: Ring) -> None:
        buffer = Buffer()
        owned = weakref.ref(buffer)
        memory = buffer.memory
        with pytest.raises(CommandOverdueError, match=r"READ on ublk7 has not answered for 0\.06 s"):
            await read(subject, pipe, deadline=0.01, buffer=buffer)
        assert (subject.stats.overdue, subject.stats.in_flight) == (1, 1)
        del buffer
        gc.collect()
        assert owned() is not None
        os.write(pipe.writer, b"late")
        await until(lambda: bool(late))
        assert late == [("READ", 7, 4)]
        assert memory.raw.startswith(b"late")
        gc.collect()
        assert owned() is None
        assert (subject.stats.overdue, subject.stats.in_flight, subject.stats.late) == (0, 0, 1)

    with_ring(body, lambda: DeafRing(on_late=lambda *what: late.append(what)))


def test_an_answer_within_the_cancel_grace_is_an_answer(pipe: Pipe) -> None:
    async def body(subject: Ring) -> None:
        waiting = asyncio.create_task(read(subject, pipe, deadline=0.001))
        flight = await the_flight(subject)
        await until(lambda: flight.cancelled)
        os.write(pipe.writer, b"x")
        assert await waiting == Completion(1, cancelled=True)
        assert subject.stats.late == 0

    with_ring(body, DeafRing)


async def the_flight(subject: Ring) -> ring._Flight:
    await until(lambda: bool(subject._in_flight))
    return next(iter(subject._in_flight.values()))


def test_the_loop_reports_a_failing_on_late_and_no_completion_is_lost(pipe: Pipe) -> None:
    def fail(*_: object) -> None:
        raise LookupError("on_late")

    async def run() -> None:
        reported: list[BaseException] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))
        subject = DeafRing(on_late=fail)
        reads = (read(subject, pipe, deadline=0.01, buffer=Buffer(1)) for _ in range(3))
        answers = await asyncio.gather(*reads, return_exceptions=True)
        assert all(isinstance(answer, CommandOverdueError) for answer in answers)
        os.write(pipe.writer, b"abc")
        await until(lambda: len(reported) == 3)
        assert subject.stats.in_flight == 0
        await subject.close()

    asyncio.run(run())


def test_a_caller_that_is_cancelled_leaves_its_command_to_the_ring(pipe: Pipe) -> None:
    async def body(subject: Ring) -> None:
        buffer = Buffer()
        owned = weakref.ref(buffer)
        caller = asyncio.create_task(read(subject, pipe, deadline=0.05, buffer=buffer))
        flight = await the_flight(subject)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        del caller, buffer
        gc.collect()
        assert owned() is not None
        assert subject.stats.submitted == 1
        # Nobody waits for it, and its deadline ends it all the same.
        await until(lambda: subject.stats.in_flight == 0)
        assert flight.cancelled
        assert flight.timer is None
        assert owned() is None
        assert subject.stats.late == 0

    with_ring(body)


def test_a_caller_that_is_cancelled_before_the_turn_ends_sends_nothing(null: int) -> None:
    async def body(subject: Ring) -> None:
        caller = asyncio.create_task(null_command(subject, null))
        await asyncio.sleep(0)
        assert len(subject._waiting) == 1
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await null_command(subject, null)
        assert subject.stats.submitted == 1

    with_ring(body)


def test_what_finds_no_room_before_its_deadline_is_never_sent(null: int, pipe: Pipe) -> None:
    """And what comes after it is, once there is room again."""

    async def body(subject: Ring) -> None:
        blocking = [asyncio.create_task(read(subject, pipe, deadline=None, buffer=Buffer(1))) for _ in range(4)]
        await until(lambda: subject.stats.in_flight == 4)
        with pytest.raises(CommandError, match="not sent"):
            await null_command(subject, null, deadline=0.02)
        assert subject.stats.overdue == 0
        waiting = asyncio.create_task(null_command(subject, null))
        os.write(pipe.writer, b"abcd")
        await asyncio.gather(*blocking)
        assert await waiting == Completion(0)
        assert subject.stats.submitted == 5

    with_ring(body, lambda: Ring(2))


def test_cancellations_need_no_room_and_overflowing_completions_are_all_collected(pipe: Pipe) -> None:
    """16 commands fill a completion queue of 16; their 16 cancellations have answers too."""

    async def body(subject: Ring) -> None:
        reads = [asyncio.create_task(read(subject, pipe, deadline=0.02)) for _ in range(16)]
        answers = await asyncio.gather(*reads)
        assert {answer.result for answer in answers} == {-errno.ECANCELED}
        await until(lambda: subject.stats.in_flight == 0)
        assert subject.stats.submitted == 32
        assert subject.stats.overflows >= 1

    with_ring(body, lambda: Ring(8))


def test_a_kernel_that_takes_nothing_is_asked_again(null: int) -> None:
    async def body(subject: Ring) -> None:
        assert isinstance(subject, BusyKernelRing)
        waiting = asyncio.gather(*(null_command(subject, null) for _ in range(10)))
        await until(lambda: len(subject._unsubmitted) == 8)
        subject.busy = False
        assert [answer.result for answer in await waiting] == [0] * 10

    with_ring(body, lambda: BusyKernelRing(8))


def test_an_entry_whose_caller_has_gone_before_the_kernel_took_it_does_nothing(pipe: Pipe) -> None:
    """Its descriptor's number may name another file by then."""

    async def body(subject: Ring) -> None:
        assert isinstance(subject, BusyKernelRing)
        gone = asyncio.create_task(read(subject, pipe, deadline=None))
        with pytest.raises(CommandError, match="not sent"):
            await read(subject, pipe, deadline=0.02)
        gone.cancel()
        os.write(pipe.writer, b"not to be read")
        subject.busy = False
        await until(lambda: subject.stats.submitted == 2 and subject.stats.in_flight == 0)
        os.set_blocking(pipe.reader, False)
        assert os.read(pipe.reader, 100) == b"not to be read"
        assert (subject.stats.overdue, subject.stats.late) == (0, 0)

    with_ring(body, BusyKernelRing)


def test_closing_ends_what_is_in_flight_and_what_waits(null: int, pipe: Pipe) -> None:
    async def body(subject: Ring) -> None:
        reads = [asyncio.create_task(read(subject, pipe, deadline=None)) for _ in range(4)]
        await until(lambda: subject.stats.in_flight == 4)
        waiting = asyncio.create_task(null_command(subject, null))
        await until(lambda: bool(subject._waiting))
        await subject.close()
        assert {(await each).result for each in reads} == {-errno.ECANCELED}
        with pytest.raises(RuntimeError, match="closed before it could be sent"):
            await waiting
        with pytest.raises(RuntimeError, match="the ring is closed"):
            await null_command(subject, null)
        await subject.close()

    with_ring(body, lambda: Ring(2))


def test_closing_does_not_wait_for_a_stuck_command_and_never_frees_its_buffer(pipe: Pipe) -> None:
    owned: list[weakref.ref[Buffer]] = []

    async def body(subject: Ring) -> None:
        buffer = Buffer()
        owned.append(weakref.ref(buffer))
        stuck = asyncio.create_task(read(subject, pipe, deadline=None, buffer=buffer))
        await until(lambda: subject.stats.in_flight == 1)
        began = time.monotonic()
        await subject.close()
        assert time.monotonic() - began < 1
        with pytest.raises(CommandOverdueError):
            await stuck

    with_ring(body, DeafRing)
    gc.collect()
    assert owned[0]() is not None


def test_closing_that_is_itself_cancelled_still_gives_the_ring_back(pipe: Pipe) -> None:
    async def body(subject: Ring) -> None:
        stuck = asyncio.create_task(read(subject, pipe, deadline=None))
        await until(lambda: subject.stats.in_flight == 1)
        closing = asyncio.create_task(subject.close())
        await until(lambda: subject._idle is not None)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(subject._event)
        with pytest.raises(CommandOverdueError):
            await stuck

    with_ring(body, DeafRing)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_hundred_rings_leave_no_descriptor_and_no_mapping(null: int) -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("[io_uring]")

    async def one() -> None:
        subject = Ring(8)
        await null_command(subject, null)
        await subject.close()

    async def run() -> None:
        await one()
        before = open_descriptors(), mappings()
        for _ in range(100):
            await one()
        assert (open_descriptors(), mappings()) == before

    asyncio.run(run())


def test_a_ring_that_cannot_be_completed_leaves_no_descriptor() -> None:
    async def run() -> None:
        before, limits = open_descriptors(), resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        failures = 0
        for room in range(4):
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + room, limits[1]))
            try:
                await Ring(8).close()
            except (OSError, KernelUnavailableError):
                failures += 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert open_descriptors() == before
        assert failures >= 2

    asyncio.run(run())


def test_waiting_costs_no_turn_of_the_loop(pipe: Pipe) -> None:
    async def body(subject: Ring) -> None:
        waiting = asyncio.create_task(read(subject, pipe, deadline=5))
        await until(lambda: subject.stats.in_flight == 1)
        calls, before = subject.stats.system_calls, time.process_time()
        await asyncio.wait([waiting], timeout=0.5)
        assert time.process_time() - before < 0.05
        assert subject.stats.system_calls == calls
        os.write(pipe.writer, b"x")
        await waiting

    with_ring(body)


def test_ten_thousand_commands_keep_their_answers_apart(null: int) -> None:
    """Every other one goes to a closed descriptor: no answer may reach another caller."""

    async def body(subject: Ring) -> None:
        descriptors = [null if index % 2 else -1 for index in range(10_000)]
        answers = await asyncio.gather(*(null_command(subject, each) for each in descriptors))
        assert all((answer.result == 0) == (fd == null) for answer, fd in zip(answers, descriptors, strict=True))

    with_ring(body)


def test_two_rings_share_one_loop(null: int) -> None:
    async def body(subject: Ring) -> None:
        other = Ring(4)
        await asyncio.gather(*(null_command(each, null) for each in (subject, other) for _ in range(20)))
        await other.close()
        assert await null_command(subject, null) == Completion(0)

    with_ring(body)


def test_no_ring_is_explained_with_what_to_type_next() -> None:
    async def run() -> None:
        with pytest.raises(KernelUnavailableError, match="128-byte"):
            Ring(1 << 20)

    asyncio.run(run())
    message, hint = ring._why_no_ring(errno.EPERM)
    assert "io_uring is disabled" in message
    assert hint.startswith("sysctl kernel.io_uring_disabled=0")


IORING_OP_OPENAT, IORING_OP_WRITE, IORING_OP_SOCKET = 18, 23, 45


@pytest.mark.usefixtures("confined")
def test_the_daemons_ring_carries_nothing_but_what_it_needs(null: int, pipe: Pipe) -> None:
    os.write(pipe.writer, b"x")
    buffer = Buffer()

    async def body(subject: Ring) -> None:
        assert subject.is_confined
        for operation in (IORING_OP_READ, IORING_OP_WRITE, IORING_OP_OPENAT, IORING_OP_SOCKET):
            number = next(subject._numbers)
            entry = bytearray(abi.pack_sqe(operation, pipe.reader, number, addr=buffer.address))
            struct.pack_into("=I", entry, 24, 1)
            answer = await subject._perform(ring._Flight("ANY", None, number, bytes(entry), buffer), 5)
            assert answer == Completion(-errno.EACCES)
        assert await null_command(subject, null) == Completion(0)

    with_ring(body)
    assert buffer.memory.raw[:1] == b"\0"


@pytest.mark.usefixtures("confined")
def test_nothing_can_be_registered_with_the_daemons_ring_any_more() -> None:
    async def body(subject: Ring) -> None:
        event = os.eventfd(0)
        try:
            with pytest.raises(PermissionError):
                binding.checked(binding.register.io_uring_register_eventfd, subject._ring, event)
            assert binding._register(subject._ring.ring_fd, binding._REGISTER_RESTRICTIONS, None, 0) != 0
        finally:
            os.close(event)

    with_ring(body)


def test_the_childrens_ring_carries_nothing_but_commands(null: int) -> None:
    subject = binding.WaitingRing()
    try:
        assert subject.is_confined
        assert subject.perform(null, abi.pack_sqe(abi.IORING_OP_NOP, -1, 1)) == -errno.EACCES
        assert subject.perform(null, abi.pack_sqe(abi.IORING_OP_URING_CMD, -1, 2, cmd_op=NULL_COMMAND)) == 0
    finally:
        subject.close()


def test_a_ring_that_the_kernel_cannot_restrict_works_without_and_says_so(null: int) -> None:
    """The kernel refuses a list that is longer than there are kinds of restrictions; so would one that knows none."""
    made = binding.set_up(4)
    try:
        assert binding.confine(made.ring_fd, [abi.IORING_OP_NOP] * 200) is False
        entries = binding.map_entries(made.ring_fd, 4)
        binding.queue.io_uring_get_sqe(made)
        entries[: abi.SQE_SIZE] = abi.pack_sqe(abi.IORING_OP_URING_CMD, null, 1, cmd_op=NULL_COMMAND)
        assert binding.checked(binding.queue.io_uring_submit, made) == 1
        answer = binding.queue.io_uring_cqe()
        assert binding.queue.io_uring_wait_cqe(made, answer) == 0
        assert answer.res == 0
        entries.close()
    finally:
        binding.queue.io_uring_queue_exit(made)
