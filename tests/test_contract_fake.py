"""The fake driver keeps the contract; tests/guest/test_contract.py asks the same of the real one."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from duende_ublkd.core.model import Feature, Holder
from duende_ublkd.core.policy import Traits
from tests.fake_kernel import FakeKernel, Instance, Process, VirtualLoop
from tests.kernel_contract import CLAUSES, World

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

T = TypeVar("T")


class FakeActor:
    def __init__(self, kernel: FakeKernel, instance: Instance, process: Process) -> None:
        self._kernel = kernel
        self._instance = instance
        self._process = process

    @property
    def dev_id(self) -> int:
        return self._instance.dev_id

    def open(self) -> None:
        self._kernel.open(self._instance, self._process)

    def start(self) -> None:
        self._kernel.start(self._instance)

    def kill(self) -> None:
        self._kernel.kill(self._process)


class FakeWorld:
    def __init__(self, loop: VirtualLoop, kernel: FakeKernel) -> None:
        self._loop = loop
        self.kernel = kernel

    def run(self, question: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(question)

    def wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        until = self._loop.time() + 60
        while not is_so():
            assert self._loop.time() < until, what
            self.run(asyncio.sleep(0.005))

    def add(self, *, dev_id: int = -1, recoverable: bool = False, unprivileged: bool = False) -> FakeActor:
        flags = Feature.USER_RECOVERY * recoverable | Feature.UNPRIVILEGED_DEV * unprivileged
        process = self.kernel.process()
        return FakeActor(self.kernel, self.kernel.add(process, dev_id=dev_id, flags=flags), process)

    def recover(self, dev_id: int) -> FakeActor:
        process, instance = self.kernel.process(), self.kernel.taken[dev_id]
        self.wait_until(lambda: not self.kernel.is_busy(instance), "the dead server's file is closed")
        self.kernel.recover(instance, process)
        self.kernel.finish_recovery(instance)
        return FakeActor(self.kernel, instance, process)

    @contextlib.contextmanager
    def hold_open(self, dev_id: int) -> Iterator[None]:
        instance = self.kernel.taken[dev_id]
        self.kernel.hold(instance, Holder("open", "pid 812 (dd)"))
        yield
        self.kernel.let_go(instance)


@pytest.fixture(params=[Traits(), Traits(async_delete=False)], ids=["DEL_DEV_ASYNC", "DEL_DEV"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with contextlib.closing(VirtualLoop()) as loop:
        yield FakeWorld(loop, FakeKernel(loop, traits=request.param))


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_the_fake_driver_keeps_the_contract(clause: Callable[[World], None], world: World) -> None:
    clause(world)
