"""Every control command against the driver itself, and what each kernel answers when it should not work.

A device without a server is added and left alone (DEAD); mini_server, which shares no code with us, serves the others.
"""

# One coroutine at a time runs here: nobody minds when it blocks, and polling is all that the driver offers.

import asyncio
import contextlib
import errno
import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest

from duende_ublkd.core.errors import (
    BusyError,
    CommandError,
    CommandOverdueError,
    DeviceExistsError,
    InterruptedCommandError,
    KernelUnavailableError,
    NoSuchDeviceError,
    NotPermittedError,
    UnsupportedError,
)
from duende_ublkd.core.model import DevInfo, Feature, KernelState
from duende_ublkd.kernel import abi
from duende_ublkd.kernel.control import Control, kernel_version
from duende_ublkd.kernel.ring import Completion, Ring

KERNEL = kernel_version(platform.release())
NEW = DevInfo(dev_id=-1, state=0, server_pid=-1, flags=0, queues=1, queue_depth=16, max_io_bytes=1 << 17)
SECTORS = 1 << 17
PARAMS = abi.PARAMS_BASIC.pack(
    abi.PARAMS_BASIC.size, abi.PARAM_TYPE_BASIC, abi.ATTR_VOLATILE_CACHE, 9, 12, 12, 9, 256, 0, SECTORS, 0
)
USER = 1000

Body = Callable[[Control], Coroutine[Any, Any, None]]
needs_server = pytest.mark.skipif(shutil.which("mini_server") is None, reason="the lab brought no tests/native along")


def since(*version: int) -> bool:
    return version <= KERNEL


def with_control(body: Body, *, deadline: float = 5.0, made: Callable[[], Ring] = Ring) -> None:
    async def run() -> None:
        ring = made()
        control = Control(ring, deadline=deadline)
        try:
            await body(control)
        finally:
            control.deadline = 20.0
            await clean_up(control)
            await ring.close()

    asyncio.run(run())


async def clean_up(control: Control) -> None:
    """Only what these tests made is in the guest, and its servers are dead."""
    for node in Path("/sys/class/ublk-char").iterdir():
        dev_id = int(node.name.removeprefix("ublkc"))
        info = await control.get_device_info(dev_id)
        if info.state != KernelState.DEAD:
            await control.stop_device(dev_id)
        await control.delete_device(dev_id, via_node=info.unprivileged)


async def gone(control: Control, dev_id: int) -> None:
    """Return when the id is free; the last reference is dropped asynchronously."""
    async with asyncio.timeout(10):
        with contextlib.suppress(NoSuchDeviceError):
            while await control.get_device_info(dev_id):
                await asyncio.sleep(0.001)


async def add_when_free(control: Control, dev_id: int) -> None:
    """An id that answers ENODEV may be taken for a moment more: its number is given back a little later."""
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(DeviceExistsError):
                assert (await control.add_device(replace(NEW, dev_id=dev_id))).dev_id == dev_id
                return
            await asyncio.sleep(0.001)


async def state_is(control: Control, dev_id: int, state: int) -> DevInfo:
    async with asyncio.timeout(10):
        while (info := await control.get_device_info(dev_id)).state != state:
            await asyncio.sleep(0.01)
    return info


@contextmanager
def held(dev_id: int) -> Iterator[int]:
    """The exclusive open; since 6.15 the last closer's own work has the node for a moment longer."""
    until = time.monotonic() + 5
    while True:
        try:
            descriptor = os.open(abi.CHAR_DEVICE.format(dev_id), os.O_RDWR | os.O_CLOEXEC)
            break
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > until:
                raise
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class MiniServer:
    """mini_server as a child; killed at the end of the block."""

    def __init__(self, *options: str) -> None:
        self._options = options

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(["mini_server", *self._options], stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def says(self, word: str) -> int:
        """Wait for a word of its set-up; the id that came with it."""
        assert self.process.stdout
        for line in self.process.stdout:
            said, dev_id = line.split()
            if said == word:
                return int(dev_id)
        raise AssertionError(f"mini_server ended and never said {word}")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_the_drivers_features_are_those_of_its_version() -> None:
    async def body(control: Control) -> None:
        features = await control.features()
        assert features & Feature.USER_RECOVERY
        assert features & Feature.CMD_IOCTL_ENCODE
        assert bool(features & Feature.QUIESCE) == since(6, 16)
        assert bool(features & Feature.SAFE_STOP_DEV) == since(7, 0)
        assert not features & ~sum(Feature)

    with_control(body)


def test_a_device_gets_the_id_it_asks_for_or_the_lowest_free_one() -> None:
    async def body(control: Control) -> None:
        assert (await control.add_device(replace(NEW, dev_id=1))).dev_id == 1
        assert [(await control.add_device(NEW)).dev_id for _ in range(2)] == [0, 2]
        await control.delete_device(1)
        assert (await control.add_device(NEW)).dev_id == 1

    with_control(body)


def test_a_taken_id_is_refused() -> None:
    async def body(control: Control) -> None:
        await control.add_device(replace(NEW, dev_id=5))
        with pytest.raises(DeviceExistsError, match="ADD_DEV on ublk5: the id is taken"):
            await control.add_device(replace(NEW, dev_id=5))

    with_control(body)


def test_adding_returns_what_the_kernel_made_of_it_and_asking_returns_the_same() -> None:
    async def body(control: Control) -> None:
        added = await control.add_device(replace(NEW, queues=64, flags=Feature.USER_RECOVERY, owner_uid=77))
        assert added.queues == os.cpu_count()
        assert added.flags & Feature.CMD_IOCTL_ENCODE
        assert added.recoverable
        assert (added.state, added.server_pid, added.queue_depth) == (KernelState.DEAD, -1, 16)
        assert (added.owner_uid, added.owner_gid) == (0, 0)
        assert await control.get_device_info(added.dev_id) == added

    with_control(body)


def test_of_a_free_id_every_command_says_that_there_is_no_such_device() -> None:
    async def body(control: Control) -> None:
        for command in (
            control.get_device_info(3),
            control.stop_device(3),
            control.delete_device(3),
            control.delete_device_async(3),
            control.get_params(3),
            control.set_params(3, PARAMS),
            control.get_queue_affinity(3, 0),
            control.start_device(3, os.getpid()),
            control.start_user_recovery(3),
            control.end_user_recovery(3, os.getpid()),
            control.quiesce_device(3, 100),
            control.try_stop_device(3),
            control.update_size(3, 8),
        ):
            with pytest.raises(NoSuchDeviceError, match="on ublk3: no such device"):
                await command

    with_control(body)


def test_parameters_come_back_as_they_were_set() -> None:
    async def body(control: Control) -> None:
        dev_id = (await control.add_device(NEW)).dev_id
        with pytest.raises(CommandError, match="START_DEV on ublk0: no parameters set"):
            await control.start_device(dev_id, os.getpid())
        await control.set_params(dev_id, PARAMS)
        answer = await control.get_params(dev_id)
        _, types, *rest = abi.PARAMS_BASIC.unpack_from(answer)
        assert types & abi.PARAM_TYPE_BASIC
        assert rest == list(abi.PARAMS_BASIC.unpack(PARAMS)[2:])
        with pytest.raises(CommandError) as invalid:
            await control.set_params(dev_id, bytes(8))
        assert invalid.value.errno == errno.EINVAL

    with_control(body)


def test_a_queue_is_served_by_some_cpu() -> None:
    async def body(control: Control) -> None:
        dev_id = (await control.add_device(NEW)).dev_id
        mask = int.from_bytes(await control.get_queue_affinity(dev_id, 0), "little")
        assert 0 < mask < 1 << (os.cpu_count() or 1)
        with pytest.raises(CommandError):
            await control.get_queue_affinity(dev_id, 9)

    with_control(body)


def test_stopping_a_dead_device_changes_nothing() -> None:
    """Nobody is starting it: that would be the kernel bug that this project exists to avoid."""

    async def body(control: Control) -> None:
        added = await control.add_device(NEW)
        await control.stop_device(added.dev_id)
        assert await control.get_device_info(added.dev_id) == added

    with_control(body)


def test_an_id_deleted_asynchronously_is_free_when_its_node_is_closed() -> None:
    async def body(control: Control) -> None:
        dev_id = (await control.add_device(NEW)).dev_id
        with held(dev_id) as descriptor:
            await control.delete_device_async(dev_id)
            assert os.fstat(descriptor).st_nlink == 0
            assert not Path(f"/sys/class/ublk-char/ublkc{dev_id}").exists()
            with pytest.raises(DeviceExistsError):
                await control.add_device(replace(NEW, dev_id=dev_id))
            assert (await control.get_device_info(dev_id)).state == KernelState.DEAD
            await control.delete_device_async(dev_id)  # once more is no error
        await gone(control, dev_id)
        await add_when_free(control, dev_id)

    with_control(body)


def test_deleting_waits_for_the_holder_and_is_done_when_the_wait_is_cancelled() -> None:
    async def body(control: Control) -> None:
        dev_id = (await control.add_device(NEW)).dev_id
        control.deadline = 0.3
        with held(dev_id) as descriptor:
            with pytest.raises(
                InterruptedCommandError, match="deleted, but the wait for its last holder"
            ) as interrupted:
                await control.delete_device(dev_id)
            assert interrupted.value.errno == errno.EINTR
            assert os.fstat(descriptor).st_nlink == 0
            control.deadline = 5.0
            with pytest.raises(DeviceExistsError):
                await control.add_device(replace(NEW, dev_id=dev_id))
            assert control._ring.stats.overdue == control._ring.stats.late == 0
        await gone(control, dev_id)

    with_control(body)


def test_deleting_returns_when_the_holder_lets_go() -> None:
    async def body(control: Control) -> None:
        dev_id = (await control.add_device(NEW)).dev_id
        with held(dev_id) as descriptor:
            deleting = asyncio.create_task(control.delete_device(dev_id))
            async with asyncio.timeout(5):
                while os.fstat(descriptor).st_nlink:
                    await asyncio.sleep(0.001)
            assert not deleting.done()
        await deleting
        with pytest.raises(NoSuchDeviceError):
            await control.get_device_info(dev_id)

    with_control(body)


def test_a_delete_that_finds_no_worker_is_cancelled_before_it_began_and_deleted_nothing() -> None:
    """io-wq gives a task four workers for each CPU. ECANCELED is not EINTR: the device is still there."""
    workers = 4 * (os.cpu_count() or 1)

    async def body(control: Control) -> None:
        ids = [(await control.add_device(NEW)).dev_id for _ in range(workers + 1)]
        descriptors = [os.open(abi.CHAR_DEVICE.format(dev_id), os.O_RDWR) for dev_id in ids]
        deleting = [asyncio.create_task(control.delete_device(dev_id)) for dev_id in ids[:-1]]
        async with asyncio.timeout(20):
            while any(os.fstat(descriptor).st_nlink for descriptor in descriptors[:-1]):
                await asyncio.sleep(0.001)
        control.deadline = 0.3
        with pytest.raises(CommandError, match="cancelled before it began") as cancelled:
            await control.delete_device(ids[-1])
        assert cancelled.value.errno == errno.ECANCELED
        assert os.fstat(descriptors[-1]).st_nlink == 1
        if since(7, 0):
            assert (await control.get_device_info(ids[-1])).state == KernelState.DEAD  # needs no worker
        else:
            with pytest.raises(CommandError, match="cancelled before it began"):
                await control.get_device_info(ids[-1])
        for descriptor in descriptors:
            os.close(descriptor)
        await asyncio.gather(*deleting)

    with_control(body, deadline=60.0)


def test_recovery_is_refused_by_what_is_not_recoverable_or_not_waiting_for_it() -> None:
    async def body(control: Control) -> None:
        plain = (await control.add_device(NEW)).dev_id
        with pytest.raises(CommandError, match="the device is not recoverable") as refused:
            await control.start_user_recovery(plain)
        assert refused.value.errno == errno.EINVAL
        recoverable = (await control.add_device(replace(NEW, flags=Feature.USER_RECOVERY))).dev_id
        with pytest.raises(CommandError) as refused:
            await control.start_user_recovery(recoverable)
        assert refused.value.errno == (errno.EBUSY if since(6, 15) else errno.EINVAL)

    with_control(body)


def test_a_start_that_waits_for_its_server_is_cancelled_by_closing_the_ring() -> None:
    async def body(control: Control) -> None:
        other_ring = Ring()
        other = Control(other_ring)
        dev_id = (await control.add_device(NEW)).dev_id
        await control.set_params(dev_id, PARAMS)
        with held(dev_id):
            starting = asyncio.create_task(other.start_device(dev_id, os.getpid()))
            await asyncio.wait([starting], timeout=0.3)
            assert not starting.done()
            await other_ring.close()
            with pytest.raises(InterruptedCommandError):
                await starting
        assert (await control.get_device_info(dev_id)).state == KernelState.DEAD

    with_control(body)


def test_what_the_kernel_is_too_old_for_is_unsupported() -> None:
    async def body(control: Control) -> None:
        dev_id = (await control.add_device(NEW)).dev_id
        commands = [(control.quiesce_device(dev_id, 100), (6, 16)), (control.try_stop_device(dev_id), (7, 0))]
        if not since(6, 16):  # 6.18.15 dies of it (set_capacity_and_notify) where there is no disk
            commands.append((control.update_size(dev_id, 8), (6, 16)))
        for command, version in commands:
            with pytest.raises(CommandError) as refused:
                await command
            assert since(*version) or isinstance(refused.value, UnsupportedError)

    with_control(body)


@needs_server
def test_a_quiesced_device_keeps_its_disk_and_takes_a_new_server() -> None:
    async def body(control: Control) -> None:
        with MiniServer("--recovery") as server:
            dev_id = server.says("LIVE")
            info = await control.get_device_info(dev_id)
            assert (info.state, info.server_pid) == (KernelState.LIVE, server.process.pid)
            with pytest.raises(BusyError):
                await control.start_user_recovery(dev_id)
        await state_is(control, dev_id, KernelState.QUIESCED)
        assert Path(f"/sys/block/ublkb{dev_id}").exists()
        with held(dev_id), pytest.raises(BusyError):
            await control.start_user_recovery(dev_id)
        with held(dev_id):
            pass  # whoever opens it next finds it free
        with MiniServer("--recover", str(dev_id)) as server:
            assert server.says("RECOVERED") == dev_id
            info = await control.get_device_info(dev_id)
            assert (info.state, info.server_pid) == (KernelState.LIVE, server.process.pid)
        await state_is(control, dev_id, KernelState.QUIESCED)
        await control.stop_device(dev_id)
        assert (await control.get_device_info(dev_id)).state == KernelState.DEAD

    with_control(body)


@needs_server
def test_a_device_that_may_fail_its_io_says_so() -> None:
    if not since(6, 13):
        pytest.skip("FAIL_IO came with 6.13")

    async def body(control: Control) -> None:
        with MiniServer("--fail-io") as server:
            dev_id = server.says("LIVE")
        await state_is(control, dev_id, KernelState.FAIL_IO)

    with_control(body)


@needs_server
def test_a_dead_server_leaves_a_dead_device_that_can_be_deleted() -> None:
    async def body(control: Control) -> None:
        with MiniServer() as server:
            dev_id = server.says("LIVE")
            with pytest.raises(DeviceExistsError, match="it is LIVE"):
                await control.start_device(dev_id, server.process.pid)
            with pytest.raises(NotPermittedError, match="cannot change once the device is started"):
                await control.set_params(dev_id, PARAMS)
        assert (await state_is(control, dev_id, KernelState.DEAD)).server_pid == -1
        with held(dev_id):
            await control.delete_device_async(dev_id)
        await gone(control, dev_id)

    with_control(body)


@needs_server
def test_a_careful_stop_spares_a_disk_in_use() -> None:
    if not since(7, 0):
        pytest.skip("TRY_STOP_DEV came with 7.0")

    async def body(control: Control) -> None:
        with MiniServer() as server:
            dev_id = server.says("LIVE")
            disk = os.open(abi.BLOCK_DEVICE.format(dev_id), os.O_RDONLY)
            with pytest.raises(BusyError, match="its disk is in use"):
                await control.try_stop_device(dev_id)
            os.close(disk)
            await control.try_stop_device(dev_id)
            assert (await control.get_device_info(dev_id)).state == KernelState.DEAD
            with pytest.raises(NoSuchDeviceError, match="or it has no disk"):
                await control.try_stop_device(dev_id)

    with_control(body)


@needs_server
def test_a_live_disk_can_grow_and_be_quiesced_where_the_kernel_knows_how() -> None:
    if not since(6, 16):
        pytest.skip("UPDATE_SIZE and QUIESCE_DEV came with 6.16")

    async def body(control: Control) -> None:
        with MiniServer("--recovery", "--flags", hex(Feature.UPDATE_SIZE | Feature.QUIESCE)) as server:
            dev_id = server.says("LIVE")
            await control.update_size(dev_id, 2 * SECTORS)
            assert Path(f"/sys/block/ublkb{dev_id}/size").read_text() == f"{2 * SECTORS}\n"
            await control.quiesce_device(dev_id, 5000)
            assert server.process.wait(10) == 0
        await state_is(control, dev_id, KernelState.QUIESCED)

    with_control(body)


@needs_server
def test_quiescing_needs_the_devices_flag() -> None:
    async def body(control: Control) -> None:
        with MiniServer("--recovery") as server:
            dev_id = server.says("LIVE")
            with pytest.raises(UnsupportedError):
                await control.quiesce_device(dev_id, 1000)
            assert (await control.get_device_info(dev_id)).state == KernelState.LIVE

    with_control(body)


@needs_server
def test_a_stop_behind_a_request_that_is_not_answered_is_overdue_and_its_late_answer_is_collected() -> None:
    late: list[tuple[str, int | None, int]] = []

    async def body(control: Control) -> None:
        ring = control._ring
        with MiniServer() as server:
            dev_id = server.says("LIVE")
            server.process.send_signal(signal.SIGUSR1)
            reading = subprocess.Popen(
                ["dd", f"if=/dev/ublkb{dev_id}", "of=/dev/null", "bs=4k", "count=1", "skip=4000"],
                stderr=subprocess.DEVNULL,
            )
            assert server.says("HOLDING") == dev_id
            control.deadline = 0.3
            began = time.monotonic()
            with pytest.raises(CommandOverdueError, match=r"STOP_DEV on ublk0 has not answered for 1\.3 s"):
                await control.stop_device(dev_id)
            assert time.monotonic() - began < 3
            assert (ring.stats.overdue, ring.stats.late) == (1, 0)
            control.deadline = 10.0
            # Everything else goes on: this device's record, and other devices.
            assert (await control.get_device_info(dev_id)).state == KernelState.LIVE
            other = (await control.add_device(NEW)).dev_id
            await control.delete_device(other)
        reading.wait(40)
        async with asyncio.timeout(40):
            while not late:
                await asyncio.sleep(0.01)
        assert late == [("STOP_DEV", dev_id, 0)]
        assert (ring.stats.overdue, ring.stats.late) == (0, 1)

    with_control(body, made=lambda: Ring(on_late=lambda *what: late.append(what)))


class OldKernelRing(Ring):
    """Between us and the driver stands a kernel of 6.0 to 6.3: it knows plain numbers only."""

    refused = 0

    async def command(self, name: str, fd: int, cmd_op: int, command: bytes, **options: Any) -> Completion:  # noqa: ANN401
        if cmd_op > 0xFF:
            self.refused += 1
            return Completion(-errno.EOPNOTSUPP)
        return await super().command(name, fd, cmd_op, command, **options)


def test_on_a_kernel_before_the_encoding_the_plain_numbers_are_found_and_kept() -> None:
    async def body(control: Control) -> None:
        ring = control._ring
        assert isinstance(ring, OldKernelRing)
        assert await control.features() == 0
        dev_id = (await control.add_device(NEW)).dev_id
        assert ring.refused == 2
        await control.set_params(dev_id, PARAMS)
        assert (await control.get_params(dev_id))[:4] != bytes(4)
        assert (await control.get_device_info(dev_id)).dev_id == dev_id
        with pytest.raises(UnsupportedError):
            await control.delete_device_async(dev_id)
        await control.stop_device(dev_id)
        await control.delete_device(dev_id)
        assert ring.refused == 3
        await gone(control, dev_id)

    with_control(body, made=OldKernelRing)


def test_one_unsupported_command_does_not_unlearn_the_encoding() -> None:
    async def body(control: Control) -> None:
        dev_id = (await control.add_device(NEW)).dev_id
        with pytest.raises(CommandError):
            await control.quiesce_device(dev_id, 100)
        await control.get_device_info(dev_id)
        assert control._encoding_proven
        assert not control._legacy

    with_control(body)


@contextmanager
def as_a_user() -> Iterator[None]:
    os.setresgid(USER, USER, 0)
    os.setresuid(USER, USER, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


async def added_by_a_user(control: Control) -> int:
    with as_a_user():
        return (await control.add_device(replace(NEW, flags=Feature.UNPRIVILEGED_DEV))).dev_id


@pytest.fixture
def control_device_for_all() -> Iterator[None]:
    node = Path(abi.CONTROL_DEVICE)
    node.chmod(0o666)
    yield
    node.chmod(0o600)


@pytest.mark.usefixtures("control_device_for_all")
def test_an_unprivileged_device_is_reached_through_its_node_also_by_root() -> None:
    async def body(control: Control) -> None:
        dev_id = await added_by_a_user(control)
        info = await control.get_device_info(dev_id)
        assert info.unprivileged
        assert (info.owner_uid, info.owner_gid, info.state) == (USER, USER, KernelState.DEAD)
        for refused in (
            control.stop_device(dev_id),
            control.delete_device(dev_id),
            control.delete_device_async(dev_id),
        ):
            with pytest.raises(CommandError) as invalid:
                await refused
            assert invalid.value.errno == errno.EINVAL
        await control.set_params(dev_id, PARAMS, via_node=True)
        types = abi.PARAMS_BASIC.unpack_from(await control.get_params(dev_id, via_node=True))[1]
        assert types & abi.PARAM_TYPE_BASIC
        assert any(await control.get_queue_affinity(dev_id, 0, via_node=True))
        await control.stop_device(dev_id, via_node=True)
        await control.delete_device(dev_id, via_node=True)
        with pytest.raises(NoSuchDeviceError):
            await control.get_device_info(dev_id)

    with_control(body)


@pytest.mark.usefixtures("control_device_for_all")
def test_an_unprivileged_device_without_a_node_cannot_even_be_asked() -> None:
    async def body(control: Control) -> None:
        dev_id = await added_by_a_user(control)
        node = Path(abi.CHAR_DEVICE.format(dev_id))
        aside = node.with_name("aside")
        node.rename(aside)
        try:
            with pytest.raises(CommandError) as missing:
                await control.get_device_info(dev_id)
            assert missing.value.errno == errno.ENOENT
        finally:
            aside.rename(node)

    with_control(body)


@pytest.mark.usefixtures("control_device_for_all")
def test_without_privilege_a_privileged_device_is_not_permitted() -> None:
    async def body(control: Control) -> None:
        dev_id = (await control.add_device(NEW)).dev_id
        with as_a_user():
            for refused in (control.get_device_info(dev_id), control.delete_device(dev_id), control.add_device(NEW)):
                with pytest.raises(NotPermittedError, match="not permitted: it takes CAP_SYS_ADMIN"):
                    await refused

    with_control(body)


def test_who_may_not_open_the_control_device_is_told_what_to_do() -> None:
    async def body(control: Control) -> None:
        with as_a_user(), pytest.raises(KernelUnavailableError, match="may be opened by root only") as refused:
            await control.features()
        assert refused.value.hint.startswith("run it as root: sudo")
        assert refused.value.exit_code == 3

    with_control(body)


def test_an_unloaded_module_is_unavailable_and_a_loaded_one_works_again() -> None:
    """The ring is open all the while: nothing of ours keeps the module from being unloaded."""

    async def body(control: Control) -> None:
        features = await control.features()
        await control.delete_device((await control.add_device(NEW)).dev_id)
        subprocess.run(["rmmod", "ublk_drv"], check=True)
        try:
            with pytest.raises(KernelUnavailableError, match="the ublk driver is not loaded") as unavailable:
                await control.get_device_info(0)
            assert unavailable.value.hint.startswith("modprobe ublk_drv")
        finally:
            subprocess.run(["modprobe", "ublk_drv"], check=True)
        control.forget()
        assert await control.features() == features
        assert (await control.add_device(NEW)).dev_id == 0

    with_control(body)


def test_every_answer_is_reported_with_its_name_and_duration() -> None:
    reported: list[tuple[str, str]] = []

    def on_command(name: str, result: str, seconds: float) -> None:
        assert 0 <= seconds < 5
        reported.append((name, result))

    async def body(control: Control) -> None:
        control._on_command = on_command
        dev_id = (await control.add_device(NEW)).dev_id
        with pytest.raises(DeviceExistsError):
            await control.add_device(replace(NEW, dev_id=dev_id))
        await control.delete_device(dev_id)
        with pytest.raises(NoSuchDeviceError):
            await control.get_device_info(dev_id)
        assert reported == [("ADD_DEV", "ok"), ("ADD_DEV", "EEXIST"), ("DEL_DEV", "ok"), ("GET_DEV_INFO", "ENODEV")]

    with_control(body)


def test_no_descriptor_stays_open_between_commands() -> None:
    async def body(control: Control) -> None:
        await control.features()
        links = {entry.readlink() for entry in Path("/proc/self/fd").iterdir() if entry.exists()}
        assert Path(abi.CONTROL_DEVICE) not in links

    with_control(body)


@needs_server
def test_sixty_four_dead_devices_go_in_one_batch() -> None:
    async def body(control: Control) -> None:
        for opened in ((), ("--open",)):
            ids = [(await control.add_device(NEW)).dev_id for _ in range(64)]
            done = subprocess.run(
                ["batch_delete", *opened, *map(str, ids)], check=True, capture_output=True, text=True, timeout=60
            )
            assert done.stdout.startswith("deleted 64 in ")
            print(f"batch_delete {' '.join(opened)}: {done.stdout.strip()}")
            for dev_id in ids:
                with pytest.raises(NoSuchDeviceError):
                    await control.get_device_info(dev_id)

    with_control(body)
