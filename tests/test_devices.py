"""What holds the claim on a device while its deletion is under way: /dev/null stands for the char device.

And what is made of ids that the kernel does not answer for: the control device is one that does as it is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from inotify_simple import INotify, flags

from duende_ublkd.core.errors import (
    CommandError,
    CommandOverdueError,
    DuendeError,
    KernelUnavailableError,
    NoSuchDeviceError,
    NotDoneError,
    UnsupportedError,
)
from duende_ublkd.core.model import DevInfo, Disk, Feature, Identity, KernelState, Observation
from duende_ublkd.kernel import abi, devices
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
    """Its deletions miss their deadline; `meanwhile` is what happens the moment that this is known.

    GET_DEV_INFO answers what `answers` has for the id, else `otherwise`; None: that the id is free.
    """

    meanwhile: Callable[[], object] = staticmethod(lambda: None)
    knows_async = True
    noted: list[tuple[str, str]]
    answers: dict[int, DevInfo | Exception | None]
    otherwise: Callable[[int], Exception | None] = staticmethod(lambda _: None)
    asked: list[int]

    async def get_device_info(self, dev_id: int) -> DevInfo:
        self.asked.append(dev_id)
        answer = self.answers.get(dev_id, self.otherwise(dev_id))
        if isinstance(answer, DevInfo):
            return answer
        raise answer or NoSuchDeviceError("GET_DEV_INFO", dev_id, errno.ENODEV, "no such device")

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
    control.noted, control.answers, control.asked = [], {}, []
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
def test_a_stop_that_was_not_sent_is_not_counted(
    monkeypatch: pytest.MonkeyPatch, failure: DuendeError | None, results: list[str]
) -> None:
    async def body(kernel: UblkKernel, control: SilentControl) -> None:
        async def stop(*_: object, **__: object) -> None:
            if failure:
                raise failure

        monkeypatch.setattr(kernel.children, "stop_device", stop)
        claim = UblkClaim(kernel, DEV_ID, os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
        seen = Observation(DEV_ID, 0.0, PRIVILEGED, Identity(1), disk=Disk((259, 0)))
        with contextlib.nullcontext() if failure is None else pytest.raises(type(failure)):
            await claim.stop(seen, lambda _: True)
        claim.release()
        assert control.noted == [("STOP_DEV", each) for each in results]

    run(body)


def test_the_claim_of_a_device_that_is_deleted_at_last_is_given_back_since_its_deletion_may_wait_for_that(
    entry: Path,
) -> None:
    async def body(kernel: UblkKernel, control: SilentControl) -> None:
        control.knows_async = False
        control.answers[DEV_ID] = PRIVILEGED
        descriptor = await delete_in_vain(kernel, PRIVILEGED)
        await kernel.observe([DEV_ID])
        assert is_open(descriptor)
        (entry / "dev").unlink()
        entry.rmdir()
        await kernel.observe([DEV_ID + 1])
        assert is_open(descriptor)
        await kernel.observe([DEV_ID])
        assert not is_open(descriptor)

    run(body)


# --- ids that the kernel does not answer for -------------------------------------------------------------------------


def not_begun(dev_id: int) -> CommandError:
    return CommandError("GET_DEV_INFO", dev_id, errno.ECANCELED, "cancelled before it began")


def overdue(dev_id: int) -> CommandOverdueError:
    return CommandOverdueError("GET_DEV_INFO", dev_id, 11.0)


SILENCES = pytest.mark.parametrize("silence", [not_begun, overdue])


@SILENCES
def test_free_ids_that_the_kernel_does_not_answer_for_are_one_error_and_no_devices(
    silence: Callable[[int], Exception],
) -> None:
    async def body(kernel: UblkKernel, control: SilentControl) -> None:
        control.otherwise = silence
        for _ in range(2):
            with pytest.raises(KernelUnavailableError, match=r"whether id 0 is free, nor for 63 more: GET_DEV_INFO"):
                await kernel.observe(range(64))
        control.otherwise = lambda _: None
        for dev_id in range(64):
            kernel.note_answer("GET_DEV_INFO", dev_id)
        assert await kernel.observe(range(64)) == []

    run(body)


def test_an_id_whose_question_has_not_been_answered_is_not_asked_about_again_until_it_is() -> None:
    async def body(kernel: UblkKernel, control: SilentControl) -> None:
        control.otherwise = overdue
        for _ in range(3):
            with pytest.raises(KernelUnavailableError):
                await kernel.observe([5])
        assert control.asked == [5]
        control.answers[5] = replace(PRIVILEGED, dev_id=5)
        kernel.note_answer("GET_DEV_INFO", 5)
        assert [each.info is not None for each in await kernel.observe([5])] == [True]

    run(body)


def test_an_id_that_was_answered_for_since_is_asked_about_again_though_a_former_question_never_was(entry: Path) -> None:
    async def body(kernel: UblkKernel, control: SilentControl) -> None:
        control.answers[DEV_ID] = overdue(DEV_ID)
        await kernel.observe([DEV_ID])
        control.answers[DEV_ID] = None
        (entry / "dev").unlink()
        entry.rmdir()
        for _ in range(2):
            assert await kernel.observe([DEV_ID]) == []

    run(body)


@SILENCES
def test_a_device_in_sysfs_is_seen_to_be_unclear_whatever_becomes_of_the_ids_around_it(
    silence: Callable[[int], Exception],
) -> None:
    async def body(kernel: UblkKernel, control: SilentControl) -> None:
        control.otherwise = silence
        (seen,) = await kernel.observe([1, 2, DEV_ID])
        assert (seen.dev_id, seen.info, seen.trouble) == (DEV_ID, None, str(silence(DEV_ID)))

    run(body)


def test_among_devices_that_are_answered_for_one_id_stands_for_all_that_are_not() -> None:
    async def body(kernel: UblkKernel, control: SilentControl) -> None:
        control.answers[DEV_ID] = PRIVILEGED
        control.answers[1] = None
        control.otherwise = not_begun
        for _ in range(2):
            unclear, seen = await kernel.observe([1, 2, 3, DEV_ID])
            assert (unclear.dev_id, unclear.info, seen.info) == (2, None, PRIVILEGED)
            assert "cancelled before it began" in unclear.trouble
        control.otherwise = lambda _: None
        assert [each.dev_id for each in await kernel.observe([1, 2, 3, DEV_ID])] == [DEV_ID]

    run(body)


@pytest.mark.parametrize("how", ["seen before", "of a former daemon"])
def test_a_device_without_an_entry_in_sysfs_is_unclear_where_something_is_known_of_it(how: str) -> None:
    async def body(kernel: UblkKernel, control: SilentControl) -> None:
        if how == "seen before":
            control.answers[7] = replace(PRIVILEGED, dev_id=7)
            await kernel.observe([7])
            del control.answers[7]
        else:
            kernel.candidates([7])
        control.otherwise = overdue
        (seen,) = await kernel.observe([6, 7])
        assert (seen.dev_id, seen.info, seen.overdue) == (7, None, "GET_DEV_INFO")
        control.answers[7] = None
        assert await kernel.observe([7]) == []
        control.answers[7] = not_begun(7)
        with pytest.raises(KernelUnavailableError):  # nothing is known of the id any more
            await kernel.observe([7])

    run(body)


# --- the claim -------------------------------------------------------------------------------------------------------


def test_a_device_that_has_taken_the_id_of_the_one_that_was_judged_is_not_opened(
    entry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own server's open would fail."""

    async def body(kernel: UblkKernel, _: SilentControl) -> None:
        node = tmp_path / f"node{DEV_ID}"
        os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        monkeypatch.setattr(abi, "CHAR_DEVICE", f"{tmp_path}/node{{}}")
        (entry / "dev").write_text("1:3\n")
        judged = Observation(DEV_ID, 0.0, PRIVILEGED, devices.read_identity(DEV_ID))
        with INotify(nonblocking=True) as opens:
            opens.add_watch(str(node), flags.OPEN)
            with kernel.claim(judged):
                assert len(opens.read(timeout=0)) == 1
            another = replace(judged, identity=Identity(12345, (1, 3)))
            with pytest.raises(NoSuchDeviceError, match="belongs to another device now"), kernel.claim(another):
                pass
            assert opens.read(timeout=0) == []

    run(body)
