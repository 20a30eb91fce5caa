"""A swap on a ublk device whose server dies. The last file but one: its id is lost until the next boot."""

import subprocess

from tests.daemon_process import DaemonProcess, command
from tests.native_server import NativeServer
from tests.server.harness import ServerProcess, block_device, device_info, wait_until


def test_a_swap_whose_server_died_is_pinned_and_named_and_the_rest_goes_on() -> None:
    """Nothing but a reboot frees the id: swapoff finds no path any more."""
    with DaemonProcess() as daemon, NativeServer("--id", "21") as other:
        server = ServerProcess.start(id=20, target="ram", size=16)
        server.wait_for("after-start")
        other.wait_for("LIVE")
        subprocess.run(["mkswap", block_device(20)], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["swapon", block_device(20)], check=True)
        daemon.wait_verdict(20, "live")
        server.close(delete=False)
        device = daemon.wait_verdict(20, "pinned")
        assert any(holder["kind"] == "swap" for holder in device["holders"]), device
        assert "swap /dev/ublkb20" in device["reason"], device
        other.kill()
        wait_until(lambda: device_info(21) is None, 20, "the other device's id is free")
        done = command("clean")
        assert done.returncode == 1
        assert "ublk20 left, pinned" in done.stdout
        assert daemon.stop() == 0
