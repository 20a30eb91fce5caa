"""Many devices, and many rounds: what the daemon does under load, with its grace switched off."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from duende_ublkd.core.model import KernelState
from tests.daemon_process import DaemonProcess
from tests.native_server import NativeServer
from tests.server.harness import device_info, wait_for_state, wait_until

NO_GRACE = """
[policy]
orphan_grace = "0s"
setup_grace = "10s"
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess(NO_GRACE) as running:
        yield running
        if running.process.poll() is None:
            assert running.stop() == 0
        assert "Traceback" not in running.log, running.log


def is_free(dev_id: int) -> bool:
    return device_info(dev_id) is None


def test_two_hundred_rounds_of_kill_and_readd_lose_no_live_device(daemon: DaemonProcess) -> None:
    refused: list[float] = []
    for _ in range(200):
        began = time.monotonic()
        while (server := _try_add(13)) is None:
            time.sleep(0.05)
            assert time.monotonic() - began < 20, daemon.log[-3000:]
        refused.append(time.monotonic() - began)
        with server:
            info = device_info(13)
            assert info is not None
            assert info.state == KernelState.LIVE
    refused.sort()
    print(f"\n200 rounds: id refused for {refused[100] * 1000:.0f} ms (median), {refused[-1] * 1000:.0f} ms (longest)")
    wait_until(lambda: is_free(13), 20, "id 13 is free")
    assert daemon.metric("duende_ublkd_actions_total", action="delete", outcome="deleted")


def _try_add(dev_id: int) -> NativeServer | None:
    """A started server, or None while the id is refused with EEXIST; tried again as an eager supervisor would."""
    server = NativeServer("--id", str(dev_id))
    try:
        server.wait_for("LIVE")
    except AssertionError:
        server.kill()
        return None
    return server


def test_sixty_four_servers_dying_at_once_leave_all_ids_free(daemon: DaemonProcess) -> None:
    """Prints the daemon's time beside that of a C program that sends the same deletions in one batch."""
    ids = [str(dev_id) for dev_id in range(100, 164)]
    _start_and_kill(ids, lambda: daemon.wait_log("ublk163 is live", 60))
    began = time.monotonic()
    wait_until(lambda: all(map(is_free, map(int, ids))), 60, "all 64 ids are free")
    took = time.monotonic() - began
    assert daemon.stop() == 0
    _start_and_kill(ids, lambda: None)
    for each in ids:
        wait_for_state(int(each), KernelState.DEAD)
    done = subprocess.run(["batch_delete", *ids], check=True, capture_output=True, text=True)
    print(
        f"\n64 devices: the daemon {took * 1000:.0f} ms after the last kill, grace 0; the C program: {done.stdout.strip()}"
    )
    assert all(is_free(int(each)) for each in ids)


def _start_and_kill(ids: list[str], when_up: Callable[[], object]) -> None:
    servers = [NativeServer("--id", each, "--depth", "4", "--size", "1") for each in ids]
    for server in servers:
        server.wait_for("LIVE")
    when_up()
    for server in servers:
        os.kill(server.pid, signal.SIGKILL)
    for server in servers:
        server.kill()
