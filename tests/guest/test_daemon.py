"""The promises, kept by a running daemon on a real kernel."""

import concurrent.futures
import errno
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from duende_ublkd.core.errors import CommandError
from duende_ublkd.core.model import Feature, KernelState
from tests.daemon_process import DaemonProcess, command
from tests.native_server import NativeServer
from tests.server.harness import (
    ServerProcess,
    block_device,
    device_info,
    features,
    read_back,
    wait_for_state,
    wait_until,
    write_pattern,
)

QUICK = """
[daemon]
resync_interval = "20s"
[policy]
orphan_grace = "200ms"
setup_grace = "3s"
recovery_deadline = "2s"
"""
SETUP_GRACE = 3.0


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess(QUICK) as running:
        yield running
        assert running.stop() == 0
        assert "Traceback" not in running.log, running.log


def is_free(dev_id: int) -> bool:
    try:
        return device_info(dev_id) is None
    except CommandError as error:
        if error.errno != errno.ENOENT:
            raise
        return False  # an unprivileged device whose node is gone already, and whose id is not


def test_a_killed_servers_id_is_free_again_and_can_be_added_at_once(daemon: DaemonProcess) -> None:
    with ServerProcess.start(id=5, target="ram", size=8) as server:
        server.wait_for("after-start")
        write_pattern(block_device(5), 1 << 20)
        daemon.wait_verdict(5, "live")
        before = daemon.metric("duende_ublkd_reaction_seconds_count") or 0
        server.kill()
        wait_until(lambda: is_free(5), 20, "id 5 is free")
    with NativeServer("--id", "5") as again:
        assert again.wait_for("LIVE") == 5
        daemon.wait_verdict(5, "live")
        again.kill()
        wait_until(lambda: is_free(5), 20, "id 5 is free again")
    whose = r"server \d+ \(python3?\) (?:died|has let go)"
    daemon.wait_log(rf"ublk5 deleted: {whose}, device DEAD, nobody has it open, nothing holds it; id free")
    assert (daemon.metric("duende_ublkd_reaction_seconds_count") or 0) >= before + 1


@pytest.mark.parametrize("stage", ["open", "fetch"])
def test_a_device_whose_server_has_its_node_open_is_never_touched_before_its_start(
    daemon: DaemonProcess, stage: str
) -> None:
    with ServerProcess.start(id=6, pause_at=f"after-{stage}") as server:
        server.wait_for(f"after-{stage}")
        device = daemon.wait_verdict(6, "starting")
        time.sleep(3 * SETUP_GRACE)  # the time itself is what is tested
        assert device_info(6) is not None
        device = daemon.wait_verdict(6, "starting")
        assert str(server.pid) in device["reason"]
        server.go_on()
        server.wait_for("after-start")
        daemon.wait_verdict(6, "live")
        server.kill()
        wait_until(lambda: is_free(6), 20, "id 6 is free")


def test_a_device_not_yet_opened_has_its_setup_grace_and_is_then_reaped(daemon: DaemonProcess) -> None:
    with NativeServer("--id", "7", "--stop-after", "add") as server:
        server.wait_for("ADD")
        added = time.monotonic()
        daemon.wait_verdict(7, "starting")
        wait_until(lambda: is_free(7), 30, "id 7 is free")
        assert time.monotonic() - added >= SETUP_GRACE - 0.5


@pytest.mark.parametrize("stage", ["open", "fetch"])
def test_a_server_that_dies_before_its_start_leaves_nothing(daemon: DaemonProcess, stage: str) -> None:
    with NativeServer("--id", "8", "--stop-after", stage) as server:
        server.wait_for(stage.upper())
        daemon.wait_verdict(8, "starting")
        server.kill()
        wait_until(lambda: is_free(8), 30, "id 8 is free")


def test_a_server_that_deletes_its_own_device_gets_no_error_with_a_clean_beside_it(daemon: DaemonProcess) -> None:
    for _ in range(3):
        with ServerProcess.start(id=9, exit_on_sigterm_with="stop,delete") as server:
            server.wait_for("after-start")
            daemon.wait_verdict(9, "live")
            with concurrent.futures.ThreadPoolExecutor() as pool:
                cleaning = pool.submit(command, "clean", "9")
                status = server.terminate()
                done = cleaning.result()
            assert done.returncode == 0, done.stdout + done.stderr
            assert status == 0
            wait_until(lambda: is_free(9), 20, "id 9 is free")
    assert "ERROR" not in daemon.log


@pytest.mark.parametrize("mode", ["queue", "fail-io"])
def test_a_recoverable_device_is_left_alone_and_reported_unserved(daemon: DaemonProcess, mode: str) -> None:
    if mode == "fail-io" and not features() & Feature.USER_RECOVERY_FAIL_IO:
        pytest.skip("this kernel has no FAIL_IO (6.13)")
    state = KernelState.FAIL_IO if mode == "fail-io" else KernelState.QUIESCED
    backing = Path("/tmp/backing")
    with ServerProcess.start(id=10, target="ram", size=8, recovery=mode, backing=backing) as server:
        server.wait_for("after-start")
        daemon.wait_verdict(10, "live")
        server.kill()
        wait_for_state(10, state)
        device = daemon.wait_verdict(10, "unserved")
        assert device["kernel_state"] == KernelState.name(state)
        daemon.wait_log(r"ublk10 is unserved: .* without a server: .*, for over 2 s")
        assert Path("/sys/block/ublkb10").exists()
        with ServerProcess.recover(10, target="ram", size=8, backing=backing) as second:
            second.wait_for("after-recovery")
            daemon.wait_verdict(10, "live")


def test_a_mounted_device_whose_server_died_is_pinned_until_it_is_unmounted(daemon: DaemonProcess) -> None:
    target = Path("/tmp/mounted")
    target.mkdir(exist_ok=True)
    with ServerProcess.start(id=11, target="ram", size=64) as server, NativeServer("--id", "12") as other:
        server.wait_for("after-start")
        other.wait_for("LIVE")
        subprocess.run(["mkfs.ext4", "-q", block_device(11)], check=True)
        subprocess.run(["mount", "-t", "ext4", block_device(11), str(target)], check=True)
        try:
            daemon.wait_verdict(11, "live")
            server.kill()
            device = daemon.wait_verdict(11, "pinned")
            assert {"kind": "mount", "what": f"{target} (ext4)"} in device["holders"], device
            other.kill()
            wait_until(lambda: is_free(12), 20, "the other device's id is free")
            assert device_info(11) is not None
            assert command("clean", "11").returncode == 1
        finally:
            subprocess.run(["umount", str(target)], check=True)
        wait_until(lambda: is_free(11), 20, "the id frees itself once it is unmounted")
        daemon.wait_log("ublk11 is gone")


def test_a_killed_and_restarted_daemon_loses_nothing(daemon: DaemonProcess) -> None:
    """SIGKILL while it looks, while it waits, while it deletes: the next one finishes."""
    for pause in (0.0, 0.05, 0.25, 0.3, 0.4):
        with NativeServer("--id", "14") as doomed, NativeServer("--id", "15") as served:
            doomed.wait_for("LIVE")
            served.wait_for("LIVE")
            daemon.wait_verdict(14, "live")
            doomed.kill()
            time.sleep(pause)  # where in its work the daemon is hit
            daemon.kill()
            daemon.restart()
            wait_until(lambda: is_free(14), 30, f"id 14 is free, daemon killed after {pause} s")
            info = device_info(15)
            assert info is not None
            assert info.state == KernelState.LIVE
        wait_until(lambda: is_free(15), 30, "id 15 is free")


def test_a_server_that_forked_is_live_though_its_pid_is_gone(daemon: DaemonProcess) -> None:
    with ServerProcess.start(id=16, target="ram", size=8, fork_after_open=True) as server:
        server.wait_for("after-start")
        write_pattern(block_device(16), 1 << 20)
        digest = read_back(block_device(16), 1 << 20)
        daemon.wait_verdict(16, "live")
        time.sleep(2 * SETUP_GRACE)  # the time itself is what is tested
        assert read_back(block_device(16), 1 << 20) == digest
        assert daemon.wait_verdict(16, "live")


def test_an_unprivileged_device_is_reaped_too(daemon: DaemonProcess) -> None:
    with ServerProcess.start(id=17, target="null", unprivileged=True) as server:
        server.wait_for("after-start")
        daemon.wait_verdict(17, "live")
        server.kill()
        wait_until(lambda: is_free(17), 30, "id 17 is free")


def test_a_node_that_somebody_made_anew_does_not_hold_up_its_own_deletion(daemon: DaemonProcess) -> None:
    """devtmpfs takes away only nodes that it made; DEL_DEV of an unprivileged device waits for whoever has it open."""
    with ServerProcess.start(id=18, target="null", unprivileged=True) as server:
        server.wait_for("after-start")
        node = Path("/dev/ublkc18")
        made = node.stat()
        node.unlink()
        os.mknod(node, made.st_mode, made.st_rdev)
        try:
            daemon.wait_verdict(18, "live")
            server.kill()
            daemon.wait_log("ublk18 deleted: ", 8)
            assert is_free(18)
        finally:
            node.unlink()


def test_its_memory_is_locked(daemon: DaemonProcess) -> None:
    locked = daemon.metric("duende_ublkd_memory_locked_bytes")
    assert locked is not None
    assert locked > 10 << 20
    assert locked < 100 << 20, "threads take more than they need"
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0]) << 10
    print(f"\nlocked {locked / (1 << 20):.0f} MiB, resident {resident / (1 << 20):.0f} MiB")


def test_signals_make_it_look_and_reload(daemon: DaemonProcess) -> None:
    before = daemon.metric("duende_ublkd_resyncs_total")
    assert before is not None
    daemon.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: (daemon.metric("duende_ublkd_resyncs_total") or 0) > before, 10, "it looks at all")
    daemon.config_path.write_text("[policy]\norphan_grase = 3\n")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_log(r"the old configuration stays: .*config.toml:2: .*orphan_grase.*did you mean \"orphan_grace\"")
    daemon.config_path.write_text(QUICK)
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_log("configuration read anew")


def test_a_second_daemon_is_refused_by_name(daemon: DaemonProcess) -> None:
    second = command("run", "--config", str(daemon.config_path))
    assert second.returncode == 2
    assert f"another duende-ublkd runs already, as pid {daemon.process.pid}" in second.stderr
    assert "try:" in second.stderr
