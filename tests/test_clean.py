"""What one run of `clean` waits for, on the fake kernel in virtual time."""

import asyncio
import errno
import io
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from duende_ublkd import cli, once
from duende_ublkd.core.config import Config
from duende_ublkd.reconcile import Agenda, Reconciler
from tests.fake_kernel import FakeKernel, run


@dataclass
class Bench:
    """What `cli` is built from, but for the kernel."""

    kernel: FakeKernel
    agenda: Agenda = field(default_factory=Agenda)
    own: int = 0

    def __post_init__(self) -> None:
        self.kernel.hints_lost = True  # a command that runs once hears none
        report = cli._CleanReport(quiet=True)
        clock = asyncio.get_running_loop().time
        self.reconciler = Reconciler(self.kernel, Config(), report, self.agenda, without_grace=[self.own], clock=clock)

    async def clean(self) -> None:
        await once.settle(self, {self.own}, act=True)


def on_the_bench(test: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        await test(Bench(FakeKernel(asyncio.get_running_loop())))

    run(main())


def test_a_device_that_somebody_has_open_for_a_moment_is_tried_again() -> None:
    async def test(bench: Bench) -> None:
        orphan = bench.kernel.serve()
        bench.kernel.kill(orphan.openers[0])
        await asyncio.sleep(100)
        orphan.claimed = True  # by the daemon, or by whoever probes
        asyncio.get_running_loop().call_later(0.05, setattr, orphan, "claimed", False)
        await bench.clean()
        assert not bench.kernel.taken

    on_the_bench(test)


def test_a_server_that_is_about_to_close_its_device_is_waited_for() -> None:
    async def test(bench: Bench) -> None:
        closing = bench.kernel.serve()
        server = closing.openers[0]
        bench.kernel.stop(closing)
        await asyncio.sleep(100)
        asyncio.get_running_loop().call_later(0.05, bench.kernel.kill, server)
        await bench.clean()
        assert not bench.kernel.taken

    on_the_bench(test)


def test_a_server_that_stays_is_left_alone_and_not_waited_for_beyond_the_limit() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.serve()
        loop = asyncio.get_running_loop()
        began = loop.time()
        await bench.clean()
        assert loop.time() - began < once.SETTLE_FOR
        assert bench.kernel.taken

    on_the_bench(test)


def test_a_defect_in_a_deletion_is_not_swallowed() -> None:
    async def test(bench: Bench) -> None:
        orphan = bench.kernel.serve()
        bench.kernel.kill(orphan.openers[0])
        await asyncio.sleep(100)
        bench.agenda.fail(ZeroDivisionError("a defect"))
        with pytest.raises(ZeroDivisionError):
            await bench.clean()

    on_the_bench(test)


def test_an_output_that_cannot_be_written_ends_no_cleaning(monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    output = cli.Output(full)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(output)))

    async def test(bench: Bench) -> None:
        report = cli._CleanReport(quiet=False)
        clock = asyncio.get_running_loop().time
        bench.reconciler = Reconciler(bench.kernel, Config(), report, bench.agenda, clock=clock)
        for orphan in [bench.kernel.serve() for _ in range(3)]:
            bench.kernel.kill(orphan.openers[0])
        await asyncio.sleep(100)
        await once.settle(bench, None, act=True)
        assert not bench.kernel.taken
        assert len(report.deeds) == 3

    on_the_bench(test)
    assert output.failure
    assert output.failure.errno == errno.ENOSPC
    os.close(full)
