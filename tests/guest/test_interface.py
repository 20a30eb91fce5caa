"""The Python interface on a real kernel: what is in use is refused by name, what is not is gone afterwards."""

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from duende_ublkd import (
    BusyError,
    DuendeError,
    Feature,
    HeldError,
    KernelState,
    NoSuchDeviceError,
    OnHoldError,
    Outcome,
    UblkControl,
    VerdictKind,
    cleanup_orphaned_devices,
    detect_orphaned_devices,
)
from duende_ublkd.core.holds import Hold, Holds
from duende_ublkd.kernel import holdfile
from tests.native_server import NativeServer
from tests.server.harness import (
    ServerProcess,
    block_device,
    char_device_is_open,
    device_info,
    features,
    read_back,
    wait_for_state,
    wait_until,
    write_pattern,
)

RUN = Path("/run/duende-ublkd")
NO_GRACE = """
[policy]
orphan_grace = "0s"
setup_grace = "0s"
"""

Refusing = Callable[[UblkControl, int], object]
REFUSING: dict[str, Refusing] = {
    "stop": UblkControl.stop_device,
    "delete": UblkControl.delete_device,
    "force": UblkControl.force_delete,
}
every_way = pytest.mark.parametrize("way", REFUSING.values(), ids=REFUSING)


@pytest.fixture
def control() -> Iterator[UblkControl]:
    with UblkControl.open(deadline=20.0) as control:
        yield control


@pytest.fixture
def no_grace(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(NO_GRACE)
    return path


def an_orphan(*options: str) -> int:
    """The id of a device whose server is dead."""
    with NativeServer(*options) as server:
        dev_id = server.wait_for("LIVE")
    wait_for_state(dev_id, KernelState.DEAD)
    return dev_id


@contextlib.contextmanager
def unserved(dev_id: int, state: int) -> Iterator[None]:
    """A device that waits for a server; dropped at the end if it is still there."""
    with ServerProcess.start(
        id=dev_id, target="ram", size=8, recovery="fail-io" if state == KernelState.FAIL_IO else "queue"
    ) as server:
        server.wait_for("after-start")
        write_pattern(block_device(dev_id), 1 << 16)
        server.kill()
        wait_for_state(dev_id, state)
        yield


@contextlib.contextmanager
def on_hold(dev_id: int, why: str) -> Iterator[None]:
    """As a daemon leaves it that `duende-ublkd hold` was told to."""
    now = time.monotonic()
    RUN.mkdir(exist_ok=True)
    holds = Holds([Hold(dev_id, now, now + 600, 0, why)])
    holdfile.write(str(RUN), holds.to_record(holdfile.boot_id()))
    try:
        yield
    finally:
        (RUN / holdfile.NAME).unlink()


def tasks() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}


def count_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_device_is_told_of_as_the_kernel_has_it_and_a_free_id_as_free(control: UblkControl) -> None:
    with NativeServer("--id", "3", "--depth", "32") as server:
        server.wait_for("LIVE")
        info = control.get_device_info(3)
        assert (info.dev_id, info.state, info.server_pid) == (3, KernelState.LIVE, server.pid)
        assert (info.queues, info.queue_depth) == (1, 32)
    assert control.force_delete(3) in (Outcome.DELETED, Outcome.ALREADY_GONE)
    with pytest.raises(NoSuchDeviceError, match="GET_DEV_INFO on ublk3: no such device"):
        control.get_device_info(3)
    with pytest.raises(NoSuchDeviceError, match="STOP_DEV on ublk3: no such device"):
        control.stop_device(3)
    assert control.delete_device(3) is Outcome.ALREADY_GONE
    assert control.force_delete(3) is Outcome.ALREADY_GONE


def test_an_orphan_is_found_and_cleaned_when_its_grace_is_over(no_grace: Path) -> None:
    dev_id = an_orphan("--id", "4")
    assert detect_orphaned_devices() == (), "the defaults give it a minute"
    ((found, verdict, reason),) = detect_orphaned_devices(config=no_grace)
    assert (found, verdict) == (dev_id, VerdictKind.ORPHANED)
    assert "nobody has it open, nothing holds it" in reason
    assert cleanup_orphaned_devices(dry_run=True, config=no_grace).would_clean == (dev_id,)
    assert cleanup_orphaned_devices([], config=no_grace) == cleanup_orphaned_devices([dev_id + 1], now=True)
    assert device_info(dev_id) is not None
    done = cleanup_orphaned_devices(config=no_grace)
    assert (done.cleaned, done.left, done.would_clean) == ((dev_id,), (), ())
    assert device_info(dev_id) is None
    assert detect_orphaned_devices(config=no_grace) == ()


def test_a_clean_up_leaves_what_is_in_its_grace_and_takes_it_when_it_is_vouched_for() -> None:
    dev_id = an_orphan("--id", "5")
    (left,) = cleanup_orphaned_devices([dev_id]).left
    assert (left.dev_id, left.verdict) == (dev_id, VerdictKind.STARTING)
    assert cleanup_orphaned_devices([dev_id], now=True).cleaned == (dev_id,)
    assert device_info(dev_id) is None


def test_a_server_deletes_what_its_predecessor_left_and_takes_the_id_again_and_again(
    control: UblkControl, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "duende_ublkd")
    for _ in range(3):
        an_orphan("--id", "6")
        assert control.delete_device(6) is Outcome.DELETED
        with NativeServer("--id", "6") as server:
            server.wait_for("LIVE")
            with pytest.raises(BusyError, match=str(server.pid)):
                control.delete_device(6)
        wait_for_state(6, KernelState.DEAD)
        assert control.force_delete(6) is Outcome.DELETED
    before = [record for record in caplog.records if "deleting it" in record.message]
    after = [record for record in caplog.records if record.message.startswith("ublk6 deleted: ")]
    assert len(before) >= len(after) == 6
    assert {record.levelno for record in after} == {logging.WARNING}


@every_way
def test_a_served_device_is_refused_by_the_name_of_its_server(control: UblkControl, way: Refusing) -> None:
    with ServerProcess.start(id=7, target="ram", size=8, recovery="queue") as server:
        server.wait_for("after-start")
        digest = write_pattern(block_device(7), 1 << 16)
        with pytest.raises(
            BusyError, match=rf"on ublk7: not done, it is live: served by {server.pid} \(python"
        ) as told:
            way(control, 7)
        assert told.value.hint.startswith("duende-ublkd explain 7")
        assert read_back(block_device(7), 1 << 16) == digest


@every_way
@pytest.mark.parametrize("stage", ["open", "fetch"])
def test_a_starting_device_is_refused_by_the_name_of_who_sets_it_up(
    control: UblkControl, way: Refusing, stage: str
) -> None:
    with NativeServer("--id", "8", "--stop-after", stage) as server:
        server.wait_for(stage.upper())
        began = time.monotonic()
        with pytest.raises(BusyError, match=rf"it is starting: DEAD, being set up by {server.pid} \(mini_server\)"):
            way(control, 8)
        assert time.monotonic() - began < 20
        assert device_info(8) is not None
        server.kill()
    assert control.delete_device(8) is Outcome.DELETED


@every_way
def test_a_mounted_device_that_waits_for_a_server_is_refused_by_the_name_of_its_mount(
    control: UblkControl, way: Refusing, tmp_path: Path
) -> None:
    with ServerProcess.start(id=9, target="ram", size=64, recovery="queue") as server:
        server.wait_for("after-start")
        subprocess.run(["mkfs.ext4", "-q", block_device(9)], check=True)
        # Read-only, so that nothing has to be written when it is unmounted: nobody would answer.
        subprocess.run(["mount", "-t", "ext4", "-o", "ro,noload", block_device(9), str(tmp_path)], check=True)
        try:
            server.kill()
            wait_for_state(9, KernelState.QUIESCED)
            with pytest.raises(HeldError, match=rf"held by mount {tmp_path} \(ext4\)"):
                way(control, 9)
            assert wait_for_state(9, KernelState.QUIESCED)
            assert Path("/sys/block/ublkb9").exists()
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)
        assert control.force_delete(9) is Outcome.DELETED
        assert device_info(9) is None


@pytest.mark.parametrize("state", [KernelState.QUIESCED, KernelState.FAIL_IO], ids=["queue", "fail-io"])
def test_a_device_that_waits_for_a_server_is_stopped_and_deleted_only_when_told_to(
    control: UblkControl, state: int
) -> None:
    if state == KernelState.FAIL_IO and not features() & Feature.USER_RECOVERY_FAIL_IO:
        pytest.skip("this kernel has no FAIL_IO (6.13)")
    with unserved(10, state):
        with pytest.raises(BusyError, match="it is unserved") as told:
            control.delete_device(10)
        assert "force_delete(10) stops it first" in told.value.hint
        assert cleanup_orphaned_devices([10], now=True).cleaned == ()
        assert wait_for_state(10, state)
        control.stop_device(10)
        info = control.get_device_info(10)
        assert info.state == KernelState.DEAD
        assert not Path("/sys/block/ublkb10").exists()
        control.stop_device(10)
        assert control.get_device_info(10) == info, "of a dead device there is nothing to stop"
        assert control.delete_device(10) is Outcome.DELETED
    with unserved(10, state):
        assert control.force_delete(10) is Outcome.DELETED
        assert device_info(10) is None


def test_a_device_that_a_new_server_has_taken_is_refused_by_its_name(control: UblkControl) -> None:
    with (
        unserved(11, KernelState.QUIESCED),
        ServerProcess.recover(11, target="ram", size=8, pause_at="after-open") as new,
    ):
        new.wait_for("after-open")
        with pytest.raises(BusyError, match=str(new.opener_pid)):
            control.force_delete(11)
        assert Path("/sys/block/ublkb11").exists()
        new.go_on()
        new.wait_for("after-recovery")


def test_an_unprivileged_orphan_is_told_of_and_deleted(control: UblkControl) -> None:
    with ServerProcess.start(id=12, target="null", unprivileged=True) as server:
        server.wait_for("after-start")
        assert control.get_device_info(12).unprivileged
        with pytest.raises(BusyError, match=str(server.pid)):
            control.delete_device(12)
        server.kill()
        wait_until(lambda: control.delete_device(12) is Outcome.DELETED, 30, "ublk12 is deleted")
        assert device_info(12) is None


def test_a_mounted_corpse_is_deleted_and_frees_its_id_when_it_is_unmounted(
    control: UblkControl, tmp_path: Path
) -> None:
    with ServerProcess.start(id=13, target="ram", size=64) as server:
        server.wait_for("after-start")
        subprocess.run(["mkfs.ext4", "-q", block_device(13)], check=True)
        subprocess.run(["mount", "-t", "ext4", block_device(13), str(tmp_path)], check=True)
        try:
            server.kill()
            wait_for_state(13, KernelState.DEAD)
            for _ in range(2):
                assert control.delete_device(13) is Outcome.DELETED_STILL_HELD
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)
        wait_until(lambda: device_info(13) is None, 20, "id 13 is free")


@every_way
def test_a_device_on_hold_is_refused_with_who_and_why(control: UblkControl, way: Refusing, no_grace: Path) -> None:
    with unserved(14, KernelState.QUIESCED), on_hold(14, "new firmware"):
        with pytest.raises(OnHoldError, match=r"on hold for 10 min more by root \(new firmware\)") as told:
            way(control, 14)
        assert told.value.hint == "duende-ublkd release 14"
        assert wait_for_state(14, KernelState.QUIESCED)
    an_orphan("--id", "14")
    with on_hold(14, "new firmware"):
        if way is UblkControl.stop_device:
            way(control, 14)  # nothing to be done, and nothing done
        else:
            with pytest.raises(OnHoldError, match="on hold"):
                way(control, 14)
        ((_, _, reason),) = detect_orphaned_devices(config=no_grace)
        assert "on hold" in reason
        (left,) = cleanup_orphaned_devices([14], now=True).left
        assert "on hold" in left.reason
        assert device_info(14) is not None
    assert control.delete_device(14) is Outcome.DELETED


@every_way
def test_when_nobody_knows_what_is_on_hold_nothing_is_done(control: UblkControl, way: Refusing) -> None:
    an_orphan("--id", "15")
    RUN.mkdir(exist_ok=True)
    (RUN / holdfile.NAME).write_text("{")
    try:
        calls: list[Callable[[], object]] = [
            lambda: way(control, 15),
            lambda: cleanup_orphaned_devices([15], now=True),
            detect_orphaned_devices,
        ]
        for call in calls:
            with pytest.raises(DuendeError, match="nobody knows which devices are on hold"):
                call()
        assert device_info(15) is not None
    finally:
        (RUN / holdfile.NAME).unlink()
    assert control.delete_device(15) is Outcome.DELETED


def test_calls_leave_no_thread_and_no_descriptor_also_under_a_running_loop(
    control: UblkControl, no_grace: Path
) -> None:
    async def calls() -> None:
        with unserved(16, KernelState.QUIESCED):
            before = tasks(), count_descriptors()
            with pytest.raises(BusyError):
                control.delete_device(16)
            detect_orphaned_devices(config=no_grace)
            assert control.force_delete(16) is Outcome.DELETED
            with pytest.raises(NoSuchDeviceError):
                control.get_device_info(16)
            cleanup_orphaned_devices(config=no_grace)
            assert not tasks() - before[0]
            assert count_descriptors() <= before[1]
        await asyncio.sleep(0)

    asyncio.run(calls())


def test_an_interrupted_call_leaves_nothing_behind(control: UblkControl) -> None:
    """It waits, meanwhile, for a server that is being set up to let go."""
    with NativeServer("--id", "17", "--stop-after", "fetch") as server:
        server.wait_for("FETCH")
        before = tasks(), count_descriptors()
        interrupting = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))
        interrupting.start()
        with pytest.raises(KeyboardInterrupt):
            control.delete_device(17)
        interrupting.join()
        wait_until(lambda: not tasks() - before[0], 5, "the timer's thread is gone")
        assert count_descriptors() <= before[1]
        server.kill()
        wait_until(lambda: not char_device_is_open(17), 20, "nobody has it open")
    assert control.delete_device(17) is Outcome.DELETED


def test_two_that_delete_the_same_device_at_once_both_succeed(control: UblkControl) -> None:
    for _ in range(5):
        an_orphan("--id", "18")
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            outcomes = list(pool.map(control.delete_device, [18, 18]))
        assert set(outcomes) == {Outcome.DELETED, Outcome.ALREADY_GONE}
        assert device_info(18) is None
