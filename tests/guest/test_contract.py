"""The real driver keeps the contract that the tests' fake is held to."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import subprocess
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from duende_ublkd.core.config import Config
from duende_ublkd.core.errors import CommandError
from duende_ublkd.parts import Parts
from tests.kernel_contract import CLAUSES, World
from tests.server.harness import ServerError, ServerProcess, block_device, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from duende_ublkd.deeds import Kernel

T = TypeVar("T")
STEPS = ["after-params", "after-open"]


class RealActor:
    """A server process that pauses before each step."""

    def __init__(self, process: ServerProcess) -> None:
        self._process = process

    @property
    def dev_id(self) -> int:
        return self._process.dev_id

    def reach(self, step: str) -> None:
        try:
            self._process.wait_for(step)
        except ServerError as error:
            raise CommandError(step, None, errno.EBUSY, str(error)) from error

    def open(self) -> None:
        self._process.go_on()
        self.reach("after-open")

    def start(self) -> None:
        self._process.go_on()
        self.reach("after-start")

    def kill(self) -> None:
        self._process.kill()


class RealWorld:
    def __init__(self, runner: asyncio.Runner, kernel: Kernel) -> None:
        self._runner = runner
        self._stack = contextlib.ExitStack()
        self.kernel = kernel

    def run(self, question: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(question)

    def wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        wait_until(is_so, what=what)

    def add(self, *, dev_id: int = -1, recoverable: bool = False, unprivileged: bool = False) -> RealActor:
        recovery = "queue" if recoverable else "none"
        return self._began(
            ServerProcess.start(id=dev_id, recovery=recovery, unprivileged=unprivileged, pause_at=STEPS), STEPS[0]
        )

    def recover(self, dev_id: int) -> RealActor:
        return self._began(ServerProcess.recover(dev_id), "after-recovery")

    @contextlib.contextmanager
    def hold_open(self, dev_id: int) -> Iterator[None]:
        with block_device(dev_id).open("rb") as disk, subprocess.Popen(["sleep", "infinity"], stdin=disk) as holder:
            disk.close()
            try:
                yield
            finally:
                holder.kill()

    def sweep_up(self) -> None:
        self._stack.close()

    def _began(self, process: ServerProcess, step: str) -> RealActor:
        self._stack.enter_context(process)
        actor = RealActor(process)
        actor.reach(step)
        return actor


@pytest.fixture(scope="module")
def parts() -> Iterator[tuple[asyncio.Runner, Parts]]:
    with asyncio.Runner() as runner:

        async def build() -> Parts:
            return Parts(Config(), ())

        built = runner.run(build())
        yield runner, built
        runner.run(built.close())


@pytest.fixture
def world(parts: tuple[asyncio.Runner, Parts]) -> Iterator[World]:
    runner, built = parts
    real = RealWorld(runner, built.kernel)
    try:
        yield real
    finally:
        real.sweep_up()


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_the_real_driver_keeps_the_contract(clause: Callable[[World], None], world: World) -> None:
    clause(world)
