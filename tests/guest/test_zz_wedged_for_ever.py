"""What only a reboot ends. The very last file: `sync`, and whatever else takes that disk's open_mutex, hangs after it."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from duende_ublkd.core.model import KernelState
from duende_ublkd.core.policy import SETTLING
from duende_ublkd.kernel.control import kernel_version
from tests.daemon_process import DaemonProcess, command
from tests.guest.wedges import Reader, commands_sent, hanging, served, stack_of, stops_in_time
from tests.native_server import NativeServer
from tests.server.harness import device_info, drop_device, wait_until

KERNEL = kernel_version(os.uname().release)
SCANS_IN_START = KERNEL < (6, 18)  # 6.18.4 and later scan on their own
CONFIG = """
[daemon]
command_deadline = "2s"
resync_interval = "10s"
[policy]
orphan_grace = "200ms"
"""
_undying: list[NativeServer] = []


@pytest.mark.leaves_for_ever(52)
def test_a_server_killed_while_its_partitions_are_scanned_is_told_of_and_left_alone() -> None:
    """It never answers the scan's first read. Up to 6.17 START_DEV does the scan, with every lock of the device held.

    Beside it, since that takes the same time: somebody's STOP_DEV that hangs (56), and that does end.
    """
    starting = NativeServer("--id", "52", "--stop-after", "start-sent")
    _undying.append(starting)
    starting.wait_for("START-SENT")
    with contextlib.ExitStack() as stack:
        orphans = {dev_id: stack.enter_context(served(dev_id)) for dev_id in (53, 54)}
        stopped = stack.enter_context(served(56))
        stack.enter_context(served(55))
        reader = stack.enter_context(Reader(55))
        daemon = stack.enter_context(DaemonProcess(CONFIG))
        daemon.wait_verdict(55, "live")
        wait_until(lambda: _inflight(52), 60, "the scan has begun")
        os.kill(starting.pid, signal.SIGKILL)
        if not SCANS_IN_START:
            wait_until(lambda: device_info(52) is None, 60, "it is an orphan like any other")
            starting.kill()
        else:
            with hanging("stop", 56, stopped) as stopper:
                _expect_wedge(daemon, starting.pid)
                if not Path("/sys/block/ublkb56").exists():
                    _expect_stop_stuck(daemon, stopper)
            wait_until(lambda: device_info(56) is None, 60, "what was being stopped is deleted")
            orphans[53].kill()
            wait_until(lambda: device_info(53) is None, 60, "the orphan beside it is deleted")
            cleaned = command("clean", "--config", str(daemon.config_path), deadline=60)
            assert cleaned.returncode == 1, cleaned.stdout + cleaned.stderr
            assert "ublk52 left, wedged: " in cleaned.stdout, cleaned.stdout
        reader.goes_on()
        stops_in_time(daemon)
        daemon.restart()
        if SCANS_IN_START:
            assert daemon.wait_verdict(52, "wedged")["rule"] == "server-cannot-end"
        orphans[54].kill()
        wait_until(lambda: device_info(54) is None, 60, "the other orphan is deleted")
        assert daemon.wait_verdict(55, "live")
        assert commands_sent(daemon, "STOP_DEV", "TRY_STOP_DEV") == 0
        assert commands_sent(daemon, "DEL_DEV", "DEL_DEV_ASYNC") == 1
        assert daemon.metric("duende_ublkd_commands_overdue") == 0
        reader.goes_on()
        stops_in_time(daemon)
    for dev_id in (53, 55, 56):
        drop_device(dev_id)


def _inflight(dev_id: int) -> bool:
    """A request of its disk; the disk itself may not be there yet."""
    try:
        return Path(f"/sys/block/ublkb{dev_id}/inflight").read_text().split() != ["0", "0"]
    except FileNotFoundError:
        return False


def _expect_wedge(daemon: DaemonProcess, pid: int) -> None:
    device = daemon.wait_verdict(52, "closing")
    assert f"its server {pid} (mini_server) was killed and has not ended" in device["reason"]
    device = daemon.wait_verdict(52, "wedged", SETTLING + 30)
    assert device["rule"] == "server-cannot-end"
    assert f"{pid} (mini_server)" in device["reason"]
    assert "read_part_sector" in stack_of(pid), stack_of(pid)
    daemon.wait_log(rf"ublk52 is wedged: .*iou-wrk-{pid} \(pid {pid}\) in .*what it takes: a reboot")
    info = device_info(52)
    assert info
    assert info.state == KernelState.LIVE


def _expect_stop_stuck(daemon: DaemonProcess, stopper: int) -> None:
    """The disk went before its requests were answered."""
    assert daemon.wait_verdict(56, "wedged", SETTLING + 30)["rule"] == "stop-stuck"
    daemon.wait_log(r"ublk56 is wedged: LIVE without its disk for .*what it takes: the end of the STOP_DEV")
    device = daemon.device(56)
    assert device
    assert any(f"iou-wrk-{stopper} (pid {stopper}) in " in each for each in device["stuck"]), device
