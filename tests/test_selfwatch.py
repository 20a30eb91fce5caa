"""The daemon's watch over itself: what counts as progress, and who hears of it.

The service manager here is a socket that listens, the ring the host's own. That a real systemd restarts a daemon that is
stuck is shown in tests/guest/test_systemd.py.
"""

import asyncio
import contextlib
import ctypes
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from duende_ublkd.core.errors import CommandOverdueError
from duende_ublkd.core.model import Level
from duende_ublkd.kernel import abi, ring, selfwatch
from duende_ublkd.kernel.process import watchdog_patience
from duende_ublkd.kernel.ring import Ring
from duende_ublkd.kernel.selfwatch import SelfWatch, longest_look
from duende_ublkd.report.metrics import Metrics

PATIENCE = 0.6
IORING_OP_READ = 22


class ServiceManager:
    """What it has heard."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def hear(self) -> list[str]:
        """All that has come since it was last asked."""
        heard = []
        with contextlib.suppress(BlockingIOError):
            while True:
                heard.append(self._socket.recv(4096).decode())
        return heard

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServiceManager]:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    made = ServiceManager(tmp_path / "notify")
    yield made
    made.close()


class Surroundings:
    """A ring whose no-op can be made to fail, and what was said."""

    def __init__(self) -> None:
        self.is_stuck = False
        self.said: list[tuple[Level, str]] = []

    async def nop(self, deadline: float) -> None:
        if self.is_stuck:
            await asyncio.sleep(deadline)
            raise CommandOverdueError("NOP", None, deadline)

    def note(self, level: Level, text: str) -> None:
        self.said.append((level, text))


def watched(
    body: Callable[[SelfWatch, Surroundings], Coroutine[Any, Any, None]], *, patience: float | None = PATIENCE
) -> None:
    async def run() -> None:
        around = Surroundings()
        watch = SelfWatch(around.nop, patience=patience, status=lambda: "2 live", note=around.note)
        defects: list[BaseException] = []
        watch.start(defects.append)
        try:
            await body(watch, around)
        finally:
            watch.close()
        assert defects == []

    asyncio.run(run())


def fed(heard: list[str]) -> int:
    return sum("WATCHDOG=1" in each.splitlines() for each in heard)


async def until(condition: Callable[[], object], deadline: float = 30.0) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("microseconds", "pid", "patience"),
    [
        ("30000000", "{pid}", 30.0),
        ("30000000", None, 30.0),
        ("30000000", "1", None),  # meant for another process
        (None, "{pid}", None),
        ("0", "{pid}", None),
        ("-5", "{pid}", None),
        ("soon", "{pid}", None),
        (str(2**64 - 1), "{pid}", None),
    ],
)
def test_whether_a_service_manager_waits_is_read_as_systemd_says(
    microseconds: str | None, pid: str | None, patience: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WATCHDOG_USEC", microseconds), ("WATCHDOG_PID", pid)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value.format(pid=os.getpid()))
    assert watchdog_patience() == patience


def test_as_long_as_it_gets_on_it_says_so_thrice_within_the_service_managers_patience(manager: ServiceManager) -> None:
    async def body(_: SelfWatch, around: Surroundings) -> None:
        began = time.monotonic()
        times: list[float] = []
        while len(times) < 10:
            await until(lambda: "WATCHDOG=1\nSTATUS=2 live" in manager.hear())
            times.append(time.monotonic())
        gaps = [after - before for before, after in zip([began, *times], times, strict=False)]
        assert sorted(gaps)[len(gaps) // 2] < PATIENCE / 2
        assert around.said == []

    watched(body)


def test_a_ring_that_carries_nothing_stops_it_and_is_told_once(manager: ServiceManager) -> None:
    async def body(_: SelfWatch, around: Surroundings) -> None:
        await until(lambda: fed(manager.hear()))
        around.is_stuck = True
        await until(lambda: around.said)
        manager.hear()
        await asyncio.sleep(2 * PATIENCE)  # long enough to be killed
        heard = manager.hear()
        assert fed(heard) == 0
        assert set(heard) == {"STATUS=stuck: its ring has not carried a no-op within 0.1 s"}
        ((level, text),) = around.said
        assert level is Level.ERROR
        assert "its ring has not carried a no-op" in text
        assert "it is restarted" in text
        around.is_stuck = False
        await until(lambda: fed(manager.hear()))
        assert around.said[1:] == [(Level.INFO, "the daemon gets on again")]

    watched(body)


def test_a_look_that_does_not_end_stops_it_and_one_that_ends_late_does_not(manager: ServiceManager) -> None:
    async def body(watch: SelfWatch, around: Surroundings) -> None:
        for _ in range(3):
            watch.look_began(0.5)
            await asyncio.sleep(0.3)
            watch.look_ended(0.5)
        assert fed(manager.hear()) > 3
        assert around.said == []
        watch.look_began(0.1)
        await until(lambda: around.said)
        assert "a look at the devices has not ended within" in around.said[0][1]
        manager.hear()
        await asyncio.sleep(2 * PATIENCE)  # long enough to be killed
        assert fed(manager.hear()) == 0
        watch.look_ended(5.0)
        await until(lambda: fed(manager.hear()))

    watched(body)


def test_a_look_that_is_due_and_does_not_begin_stops_it(manager: ServiceManager) -> None:
    async def body(watch: SelfWatch, around: Surroundings) -> None:
        watch.look_ended(0.1)
        await until(lambda: around.said)
        assert "no look at the devices has begun" in around.said[0][1]
        manager.hear()
        await asyncio.sleep(2 * PATIENCE)  # long enough to be killed
        assert fed(manager.hear()) == 0

    watched(body)


def test_a_loop_that_stands_still_says_nothing(manager: ServiceManager) -> None:
    async def body(_: SelfWatch, __: Surroundings) -> None:
        await until(lambda: fed(manager.hear()))
        time.sleep(3 * PATIENCE)
        assert fed(manager.hear()) == 0

    watched(body)


def test_a_look_may_last_as_long_as_all_of_its_deadlines() -> None:
    """GET_FEATURES and GET_DEV_INFO, each sent as often as it can be, and the looks at /proc."""
    commands = 2 + 4 * 4
    assert longest_look(10.0, 1.0) > commands * (10.0 + 1.0) + 5.0 + 2.0
    assert longest_look(600.0, 1.0) > commands * (600.0 + 1.0) + 5.0 + 2.0


def test_the_worst_lag_of_the_last_minute_is_shown_and_a_long_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfwatch, "TICK", 0.02)
    monkeypatch.setattr(selfwatch, "REMEMBERED", 1.5)
    monkeypatch.setattr(selfwatch, "LONG_LAG", 0.3)

    async def body(watch: SelfWatch, around: Surroundings) -> None:
        metrics = Metrics()
        metrics.read_from(overdue=int, locked=int, lag=lambda: watch.lag)

        def shown() -> float:
            found = re.search(rb"^duende_ublkd_event_loop_lag_seconds (\S+)$", metrics.render(), re.MULTILINE)
            assert found
            return float(found[1])

        await asyncio.sleep(0.1)
        assert shown() < 0.3
        time.sleep(0.5)
        await asyncio.sleep(0.1)
        assert 0.4 < shown() < 5
        ((level, text),) = around.said
        assert level is Level.WARNING
        assert re.fullmatch(r"the daemon stood still for \d\.\d s", text)
        await until(lambda: shown() < 0.3)

    watched(body, patience=None)


def test_without_a_service_manager_that_waits_it_watches_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfwatch, "ROUND", 0.05)

    async def body(_: SelfWatch, around: Surroundings) -> None:
        around.is_stuck = True
        await until(lambda: around.said)
        assert around.said[0][1].endswith("has not carried a no-op within 0.025 s")

    watched(body, patience=None)


def test_its_own_defect_is_no_silence() -> None:
    async def run() -> None:
        async def nop(_: float) -> None:
            raise ZeroDivisionError

        defects: list[BaseException] = []
        watch = SelfWatch(nop, patience=None, status=str, note=lambda *_: None)
        watch.start(defects.append)
        await until(lambda: defects)
        watch.close()
        assert isinstance(defects[0], ZeroDivisionError)

    asyncio.run(run())


STUCK = """
import asyncio, sys, time
from duende_ublkd.kernel.selfwatch import SelfWatch

async def nop(deadline):
    pass

def a_function_that_never_returns():
    time.sleep(60)

async def main():
    SelfWatch(nop, patience=0.8, status=str, note=print).start(print)
    await asyncio.sleep(0.1)
    print("begins", flush=True)
    a_function_that_never_returns()

asyncio.run(main())
"""


def test_a_loop_that_is_stuck_tells_where_before_it_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        try:
            assert process.stdout.readline() == b"begins\n"
            said = b""
            while b"a_function_that_never_returns" not in said:
                more = os.read(process.stderr.fileno(), 4096)
                assert more, said
                said += more
            assert process.poll() is None
        finally:
            process.kill()


# --- the ring's part ---------------------------------------------------------------------------------------------------


class BusyKernelRing(Ring):
    """As long as `busy`, its kernel takes nothing."""

    busy = True

    def _submit(self) -> bool:
        return not self.busy and super()._submit()


def with_ring(body: Callable[[Any], Coroutine[Any, Any, None]], made: Callable[[], Ring] = Ring) -> None:
    async def run() -> None:
        subject = made()
        try:
            await body(subject)
        finally:
            await subject.close()

    asyncio.run(run())


def test_a_no_op_comes_back_and_leaves_nothing_behind() -> None:
    async def body(subject: Ring) -> None:
        for _ in range(100):
            await subject.nop(5.0)
        assert subject.stats.in_flight == 0
        assert subject.stats.submitted == 100

    with_ring(body)


def test_a_no_op_comes_back_from_a_ring_that_is_full_of_commands_that_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for a pipe, as commands wait for a device; as many as there may be, and more in the queue before it."""
    monkeypatch.setattr(ring, "OPERATIONS", (*ring.OPERATIONS, IORING_OP_READ))
    reader, writer = os.pipe()
    memory = bytearray(8)
    address = (ctypes.c_char * 8).from_buffer(memory)

    async def body(subject: Ring) -> None:
        hanging = []
        for _ in range(3 * subject._capacity):
            number = next(subject._numbers)
            entry = bytearray(abi.pack_sqe(IORING_OP_READ, reader, number, addr=ctypes.addressof(address)))
            struct.pack_into("=Q", entry, 8, 2**64 - 1)
            struct.pack_into("=I", entry, 24, 8)
            flight = ring._Flight("READ", 7, number, bytes(entry), address)
            hanging.append(asyncio.ensure_future(subject._perform(flight, None)))
        await until(lambda: subject.stats.in_flight == subject._capacity)
        for _ in range(10):
            await subject.nop(5.0)
        assert subject.stats.in_flight == subject._capacity
        for each in hanging:
            each.cancel()
        os.close(writer)  # whatever still waits is at its end

    try:
        with_ring(body)
    finally:
        os.close(reader)


def test_a_ring_that_the_kernel_takes_nothing_from_fails_its_no_ops_and_piles_none_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ring, "CANCEL_GRACE", 0.05)

    async def body(subject: BusyKernelRing) -> None:
        for _ in range(200):
            with pytest.raises(CommandOverdueError):
                await subject.nop(0.01)
        assert subject.stats.in_flight == 1
        subject.busy = False
        await until(lambda: not subject.stats.in_flight)
        await subject.nop(5.0)

    with_ring(body, BusyKernelRing)
