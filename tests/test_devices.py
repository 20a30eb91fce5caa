"""What holds the claim on a device while its deletion is under way: /dev/null stands for the char device."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

import pytest

from duende_ublkd.core.errors import CommandError, CommandOverdueError, DuendeError, NotDoneError, UnsupportedError
from duende_ublkd.core.model import DevInfo, Disk, Feature, Identity, KernelState, Observation
from duende_ublkd.kernel import devices
from duende_ublkd.kernel.children import Children
from duende_ublkd.kernel.control import Control
from duende_ublkd.kernel.devices import UblkClaim, UblkKernel
from duende_ublkd.kernel.holders import Sweeper
from duende_ublkd.kernel.ring import Ring

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

DEV_ID = 990
PRIVILEGED = DevInfo(DEV_ID, KernelState.DEAD, -1, 0, 1, 128)
UNPRIVILEGED = DevInfo(DEV_ID, KernelState.DEAD, -1, int(Feature.UNPRIVILEGED_DEV), 1, 128)


class SilentControl(Control):
    """Its deletions miss their deadline; `meanwhile` is what happens the moment that this is known."""

    meanwhile: Callable[[], object] = staticmethod(lambda: None)
    knows_async = True
    noted: list[tuple[str, str]]

    async def features(self) -> int:
        return 0

    def note(self, name: str, result: str, seconds: float) -> None:
        del seconds
        self.noted.append((name, result))

    async def delete_device_async(self, dev_id: int) -> None:
        if not self.knows_async:
            raise UnsupportedError("DEL_DEV_ASYNC", dev_id, 95, "not known")
        await self._miss("DEL_DEV_ASYNC", dev_id)

    async def delete_device(self, dev_id: int, *, via_node: bool = False) -> None:
        del via_node
        await self._miss("DEL_DEV", dev_id)

    async def _miss(self, command: str, dev_id: int) -> None:
        await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_soon(self.meanwhile)
        raise CommandOverdueError(command, dev_id, 0.01)


@contextlib.asynccontextmanager
async def a_kernel() -> AsyncIterator[tuple[UblkKernel, SilentControl]]:
    ring, sweeper, children = Ring(8), Sweeper(), Children()
    control = SilentControl(ring)
    control.noted = []
    kernel = UblkKernel(control, sweeper, children)
    try:
        yield kernel, control
    finally:
        kernel.close()
        children.close()
        sweeper.close()
        await ring.close()


@pytest.fixture(autouse=True)
def entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """In sysfs, of a device that is not deleted."""
    monkeypatch.setattr(devices, "SYSFS_CLASS", str(tmp_path))
    path = tmp_path / f"ublkc{DEV_ID}"
    path.mkdir()
    (path / "dev").write_text("240:990\n")
    return path


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


async def delete_in_vain(kernel: UblkKernel, info: DevInfo) -> int:
    """A deletion without an answer, as a deed has it: its claim is released in any case. The claim's descriptor."""
    descriptor = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    claim = UblkClaim(kernel, DEV_ID, descriptor)
    with pytest.raises(CommandOverdueError):
        await claim.delete(info)
    claim.release()
    return descriptor


WAYS = pytest.mark.parametrize(
    ("info", "knows_async", "command"),
    [(PRIVILEGED, True, "DEL_DEV_ASYNC"), (PRIVILEGED, False, "DEL_DEV"), (UNPRIVILEGED, True, "DEL_DEV")],
)


def run(body: Callable[[UblkKernel, SilentControl], Awaitable[None]]) -> None:
    async def main() -> None:
        async with a_kernel() as (kernel, control):
            await body(kernel, control)

    asyncio.run(main())


@WAYS
def test_the_claim_of_a_deletion_without_an_answer_is_held_until_that_comes(
    info: DevInfo, command: str, *, knows_async: bool
) -> None:
    async def body(kernel: UblkKernel, control: SilentControl) -> None:
        control.knows_async = knows_async
        descriptor = await delete_in_vain(kernel, info)
        kernel.note_answer("GET_DEV_INFO", DEV_ID)
        kernel.note_answer(command, DEV_ID + 1)
        assert is_open(descriptor)
        kernel.note_answer(command, DEV_ID)
        assert not is_open(descriptor)
        other = os.open("/dev/null", os.O_RDONLY)  # most likely of the same number
        kernel.note_answer(command, DEV_ID)
        assert is_open(other)
        os.close(other)

    run(body)


@WAYS
def test_an_answer_that_comes_right_after_the_deadline_finds_the_claim_kept(
    info: DevInfo, command: str, *, knows_async: bool
) -> None:
    async def body(kernel: UblkKernel, control: SilentControl) -> None:
        control.knows_async = knows_async
        control.meanwhile = lambda: kernel.note_answer(command, DEV_ID)
        descriptor = await delete_in_vain(kernel, info)
        await asyncio.sleep(0)
        assert not is_open(descriptor)

    run(body)


@WAYS
def test_closing_gives_back_the_claims_that_are_kept(info: DevInfo, command: str, *, knows_async: bool) -> None:
    async def body(kernel: UblkKernel, control: SilentControl) -> None:
        control.knows_async = knows_async
        descriptor = await delete_in_vain(kernel, info)
        assert is_open(descriptor)
        kernel.close()
        assert not is_open(descriptor)
        kernel.note_answer(command, DEV_ID)

    run(body)


def test_a_device_that_the_kernel_has_taken_away_is_not_held_for_an_answer(entry: Path) -> None:
    async def body(kernel: UblkKernel, control: SilentControl) -> None:
        control.knows_async = False
        (entry / "dev").unlink()
        entry.rmdir()
        assert not is_open(await delete_in_vain(kernel, PRIVILEGED))

    run(body)


@pytest.mark.parametrize(
    ("failure", "results"),
    [
        (NotDoneError("it is on hold"), []),
        (CommandOverdueError("STOP_DEV", DEV_ID, 1.0), ["overdue"]),
        (CommandError("STOP_DEV", DEV_ID, 5, "it failed"), ["EIO"]),
        (None, ["ok"]),
    ],
)
def test_a_stop_that_was_not_sent_is_not_counted(failure: DuendeError | None, results: list[str]) -> None:
    async def body(kernel: UblkKernel, control: SilentControl) -> None:
        async def stop(*_: object, **__: object) -> None:
            if failure:
                raise failure

        kernel.children.stop_device = stop  # type: ignore[method-assign]
        claim = UblkClaim(kernel, DEV_ID, os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
        seen = Observation(DEV_ID, 0.0, PRIVILEGED, Identity(1), disk=Disk((259, 0)))
        with contextlib.nullcontext() if failure is None else pytest.raises(type(failure)):
            await claim.stop(seen, lambda _: True)
        claim.release()
        assert control.noted == [("STOP_DEV", each) for each in results]

    run(body)
