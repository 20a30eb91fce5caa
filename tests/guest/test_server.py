"""The test server is a real one, and dies into exactly the states that ublk_drv is known to leave behind."""

import contextlib
import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from duende_ublkd.core.model import Feature, KernelState
from tests.server.harness import (
    BLOCK,
    DEADLINE,
    ServerProcess,
    block_device,
    char_device_is_open,
    device_info,
    direct_read,
    direct_write,
    drop_device,
    features,
    in_background,
    read_back,
    some_thread_hangs_in_the_kernel,
    wait_for_state,
    wait_until,
    write_pattern,
)

MIB = 1 << 20
EIO = 5
LAB_UID = 1000


@pytest.fixture
def backing() -> Iterator[Path]:
    path = Path("/dev/shm/backing")
    yield path
    path.unlink(missing_ok=True)


def test_data_written_to_the_disk_is_in_the_server_and_comes_back(backing: Path) -> None:
    with ServerProcess.start(target="ram", size=1, queues=2, backing=backing) as server:
        server.wait_for("after-start")
        written = write_pattern(block_device(server.dev_id), MIB)
        assert hashlib.sha256(backing.read_bytes()[:MIB]).hexdigest() == written
        reads = server.stats()[server.dev_id].get("READ", 0)
        assert read_back(block_device(server.dev_id), MIB) == written
        assert server.stats()[server.dev_id]["READ"] > reads


def test_one_process_serves_three_devices_and_takes_them_away_again() -> None:
    with ServerProcess.start(target="ram", devices=3, size=1) as server:
        server.wait_for("after-start")
        assert len(server.dev_ids) == 3
        written = {dev_id: write_pattern(block_device(dev_id), MIB, seed=dev_id) for dev_id in server.dev_ids}
        assert {dev_id: read_back(block_device(dev_id), MIB) for dev_id in server.dev_ids} == written
        assert server.terminate() == 0
        assert [device_info(dev_id) for dev_id in server.dev_ids] == [None] * 3


def test_a_null_device_takes_everything_and_gives_zeroes() -> None:
    with ServerProcess.start(target="null") as server:
        server.wait_for("after-start")
        direct_write(block_device(server.dev_id), b"x" * BLOCK)
        assert direct_read(block_device(server.dev_id)) == bytes(BLOCK)


def test_a_file_system_lives_on_it(tmp_path: Path) -> None:
    with ServerProcess.start(target="ram", size=8) as server:
        server.wait_for("after-start")
        disk = block_device(server.dev_id)
        subprocess.run(["mkfs.ext4", "-q", "-E", "nodiscard", disk], check=True)
        content = os.urandom(MIB)
        with mounted(disk, tmp_path):
            (tmp_path / "file").write_bytes(content)
        with mounted(disk, tmp_path):
            assert (tmp_path / "file").read_bytes() == content
        assert server.terminate() == 0


@contextlib.contextmanager
def mounted(disk: Path, directory: Path) -> Iterator[None]:
    subprocess.run(["mount", disk, directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


def test_discarded_blocks_read_as_zeroes() -> None:
    with ServerProcess.start(target="ram", size=1) as server:
        server.wait_for("after-start")
        disk = block_device(server.dev_id)
        direct_write(disk, b"x" * 2 * BLOCK)
        subprocess.run(["blkdiscard", "-o", "0", "-l", str(BLOCK), disk], check=True)
        assert direct_read(disk) == bytes(BLOCK)
        assert direct_read(disk, offset=BLOCK) == b"x" * BLOCK
        assert server.stats()[server.dev_id]["DISCARD"] == 1


@pytest.mark.parametrize("step", ["after-add", "after-params", "after-open", "after-fetch"])
def test_a_server_that_dies_before_the_start_leaves_a_dead_device_without_a_disk(step: str) -> None:
    with ServerProcess.start(die_at=step) as server:
        server.wait_for(step)
        assert server.wait_dead() == -9
        wait_until(lambda: not char_device_is_open(server.dev_id), what="the char device is closed")
        info = device_info(server.dev_id)
        assert info
        assert (info.state, info.server_pid) == (KernelState.DEAD, -1)
        assert Path(f"/dev/ublkc{server.dev_id}").exists()
        assert not block_device(server.dev_id).exists()


@pytest.mark.parametrize("step", ["after-start", "in-flight", "before-commit"])
def test_a_server_that_dies_while_it_serves_leaves_a_dead_device(step: str) -> None:
    with ServerProcess.start(die_at=step, depth=2) as server:
        if step != "after-start":
            server.wait_for("after-start")
            read = in_background(lambda: direct_read(block_device(server.dev_id)))
            assert isinstance(read.exception(DEADLINE), OSError)
        server.wait_for(step)
        server.wait_dead()
        assert wait_for_state(server.dev_id, KernelState.DEAD).server_pid == -1
        wait_until(lambda: not block_device(server.dev_id).exists(), what="the disk is gone")


def test_with_every_tag_in_flight_an_old_kernel_learns_of_a_death_by_timeout_only() -> None:
    with ServerProcess.start(die_at="all-in-flight", depth=1) as server:
        server.wait_for("after-start")
        read = in_background(lambda: direct_read(block_device(server.dev_id)))
        server.wait_for("all-in-flight")
        server.wait_dead()
        if not notices_every_death():
            info = device_info(server.dev_id)
            assert info
            assert (info.state, info.server_pid) == (KernelState.LIVE, server.pid)
        wait_for_state(server.dev_id, KernelState.DEAD)
        assert isinstance(read.exception(DEADLINE), OSError)


def notices_every_death() -> bool:
    """Since 6.15 the last close of the char device tells the kernel; before that, an idle tag had to.

    UBLK_F_AUTO_BUF_REG of 6.16 is the nearest that can be asked for.
    """
    return bool(features() & Feature.AUTO_BUF_REG)


def test_a_server_that_stopped_its_device_and_then_died_leaves_it_dead() -> None:
    with ServerProcess.start(pause_at="after-stop") as server:
        server.wait_for("after-start")
        server.tell("stop")
        server.wait_for("after-stop")
        info = device_info(server.dev_id)
        assert info
        assert info.state == KernelState.DEAD
        assert char_device_is_open(server.dev_id)
        server.kill()
        wait_until(lambda: not char_device_is_open(server.dev_id), what="the char device is closed")


def test_a_paused_server_goes_on_when_told() -> None:
    with ServerProcess.start(pause_at=["after-add", "after-fetch"]) as server:
        server.wait_for("after-add")
        assert not char_device_is_open(server.dev_id)
        server.go_on()
        server.wait_for("after-fetch")
        assert char_device_is_open(server.dev_id)
        server.go_on()
        server.wait_for("after-start")
        wait_for_state(server.dev_id, KernelState.LIVE)


def test_held_requests_are_answered_when_released() -> None:
    with ServerProcess.start(hold_io=True) as server:
        server.wait_for("after-start")
        read = in_background(lambda: direct_read(block_device(server.dev_id)))
        server.wait_for("in-flight")
        assert server.waiting() == 1
        assert not read.done()
        server.tell("release")
        assert read.result(DEADLINE) == bytes(BLOCK)


@pytest.mark.parametrize("mode", ["queue", "reissue"])
def test_a_second_server_recovers_the_data_and_the_requests_of_the_meantime(mode: str, backing: Path) -> None:
    with ServerProcess.start(target="ram", size=2, recovery=mode, backing=backing) as first:
        first.wait_for("after-start")
        disk = block_device(first.dev_id)
        written = write_pattern(disk, MIB)
        first.kill()
        wait_for_state(first.dev_id, KernelState.QUIESCED)
        late = in_background(lambda: direct_write(disk, b"late" * (BLOCK // 4), MIB))
        wait_until(some_thread_hangs_in_the_kernel, what="the write is queued")
        assert not late.done()
        with ServerProcess.recover(first.dev_id, target="ram", backing=backing) as second:
            second.wait_for("after-recovery")
            info = wait_for_state(first.dev_id, KernelState.LIVE)
            assert info.server_pid == second.pid
            late.result(DEADLINE)
            assert read_back(disk, MIB) == written
            assert direct_read(disk, offset=MIB) == b"late" * (BLOCK // 4)


def test_a_request_in_the_dead_server_fails_or_is_issued_again_as_the_mode_says(backing: Path) -> None:
    with ServerProcess.start(target="ram", size=1, recovery="reissue", die_at="in-flight", backing=backing) as first:
        first.wait_for("after-start")
        write = in_background(lambda: direct_write(block_device(first.dev_id), b"x" * BLOCK))
        first.wait_dead()
        wait_for_state(first.dev_id, KernelState.QUIESCED)
        with ServerProcess.recover(first.dev_id, target="ram", backing=backing) as second:
            write.result(DEADLINE)
            assert backing.read_bytes()[:BLOCK] == b"x" * BLOCK
            second.terminate()
    with ServerProcess.start(target="ram", size=1, recovery="queue", die_at="in-flight") as first:
        first.wait_for("after-start")
        write = in_background(lambda: direct_write(block_device(first.dev_id), b"x" * BLOCK))
        failure = write.exception(DEADLINE)
        assert isinstance(failure, OSError)
        assert failure.errno == EIO


def test_a_fail_io_device_answers_errors_until_it_is_recovered(backing: Path) -> None:
    needs(Feature.USER_RECOVERY_FAIL_IO)
    with ServerProcess.start(target="ram", size=1, recovery="fail-io", backing=backing) as first:
        first.wait_for("after-start")
        disk = block_device(first.dev_id)
        written = write_pattern(disk, MIB)
        first.kill()
        wait_for_state(first.dev_id, KernelState.FAIL_IO)
        with pytest.raises(OSError, match="Remote I/O error"):  # BLK_STS_TARGET
            direct_read(disk)
        with ServerProcess.recover(first.dev_id, target="ram", backing=backing) as second:
            second.wait_for("after-recovery")
            assert read_back(disk, MIB) == written


def needs(feature: Feature) -> None:
    if not features() & feature:
        pytest.skip(f"this kernel has no {feature.name}")


def test_a_quiesced_device_stays_live_until_its_server_is_gone() -> None:
    needs(Feature.QUIESCE)
    with ServerProcess.start(recovery="queue", quiesce=True) as server:
        server.wait_for("after-start")
        with ServerProcess.start("quiesce", id=server.dev_id) as command:
            command.wait_for("done")
            server.wait_for("ended-by-others")
            server.wait_dead()
            wait_for_state(server.dev_id, KernelState.QUIESCED)


def test_a_device_stopped_by_somebody_else_ends_its_server() -> None:
    with ServerProcess.start() as server:
        server.wait_for("after-start")
        with ServerProcess.start("stop", id=server.dev_id) as command:
            command.wait_for("done")
        assert server.wait_dead() == 0
        assert server.events[-1].step == "ended-by-others"


def test_an_ordinary_user_can_add_serve_and_delete_a_device() -> None:
    with ServerProcess.start(target="ram", size=1, unprivileged=True, uid=LAB_UID) as server:
        server.wait_for("after-start")
        info = device_info(server.dev_id)
        assert info
        assert info.unprivileged
        assert info.owner_uid == LAB_UID
        assert info.state == KernelState.LIVE
        written = write_pattern(block_device(server.dev_id), MIB // 4)
        assert read_back(block_device(server.dev_id), MIB // 4) == written
        assert server.terminate() == 0
        assert not Path(f"/dev/ublkc{server.dev_id}").exists()


def test_a_dead_unprivileged_server_leaves_a_dead_device() -> None:
    with ServerProcess.start(unprivileged=True) as server:
        server.wait_for("after-start")
        server.kill()
        assert wait_for_state(server.dev_id, KernelState.DEAD).unprivileged


def test_a_forked_worker_serves_what_its_dead_parent_opened() -> None:
    with ServerProcess.start(target="ram", size=1, fork_after_open=True) as server:
        server.wait_for("after-start")
        assert server.pid != server.opener_pid
        info = device_info(server.dev_id)
        assert info
        assert info.state == KernelState.LIVE
        assert info.server_pid in (-1, server.opener_pid)
        assert not Path(f"/proc/{server.opener_pid}").exists()
        written = write_pattern(block_device(server.dev_id), MIB // 4)
        assert read_back(block_device(server.dev_id), MIB // 4) == written


def test_a_leaked_char_device_stays_taken_after_its_servers_death() -> None:
    with ServerProcess.start(leak_fd=True) as server:
        server.wait_for("after-start")
        server.kill()
        assert Path(f"/proc/{server.helper_pid}").exists()
        assert char_device_is_open(server.dev_id)
        if notices_every_death():
            # The kernel waits for the last close, which will not come.
            info = device_info(server.dev_id)
            assert info
            assert info.state == KernelState.LIVE
        else:
            wait_for_state(server.dev_id, KernelState.DEAD)


def test_dropping_a_device_that_is_gone_is_nothing() -> None:
    with ServerProcess.start() as server:
        server.wait_for("after-start")
        server.terminate()
        drop_device(server.dev_id)
