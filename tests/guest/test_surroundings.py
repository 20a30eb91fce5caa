"""Bad surroundings, each with an error that says what to type next."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from duende_ublkd.core.model import KernelState
from tests.daemon_process import DaemonProcess, command
from tests.native_server import NativeServer
from tests.server.harness import device_info, drop_device, wait_for_state, wait_until

NOBODY = 65534
PR_CAPBSET_DROP = 24
CAP_SYS_ADMIN = 21
IO_URING_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")


def says(done: subprocess.CompletedProcess[str], code: int, *sentences: str) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for sentence in sentences:
        assert sentence in done.stderr, done.stderr


@pytest.fixture
def no_module() -> Iterator[None]:
    subprocess.run(["rmmod", "ublk_drv"], check=True)
    yield
    load_module()


def load_module() -> None:
    module = next(Path(f"/lib/modules/{os.uname().release}").rglob("ublk_drv.ko*"))
    subprocess.run(["insmod", str(module)], check=True)
    wait_until(lambda: Path("/dev/ublk-control").exists(), 10, "the control device is there")


def test_not_root_says_sudo() -> None:
    Path("/dev/ublk-control").chmod(0o600)  # an unprivileged server of another test may have opened it to all
    done = command("list", user=NOBODY, group=NOBODY, cwd="/project")
    says(done, 3, "/dev/ublk-control may be opened by root only", "try: run it as root: sudo")


def test_no_cap_sys_admin_says_what_is_missing() -> None:
    def drop() -> None:
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SYS_ADMIN, 0, 0, 0)

    with NativeServer("--id", "40") as server:
        server.wait_for("LIVE")
        done = command("list", preexec_fn=drop)
        says(done, 3, "CAP_SYS_ADMIN", "try: ")
        server.kill()
    assert command("clean", "--now", "40").returncode == 0


def test_a_machine_with_io_uring_disabled_says_which_sysctl() -> None:
    if not IO_URING_DISABLED.exists():
        pytest.skip("this kernel cannot disable io_uring (6.6)")
    IO_URING_DISABLED.write_text("2")
    try:
        says(command("list"), 3, "io_uring is disabled", "try: sysctl kernel.io_uring_disabled=0")
        says(command("run"), 3, "io_uring is disabled", "try: sysctl kernel.io_uring_disabled=0")
    finally:
        IO_URING_DISABLED.write_text("0")


@pytest.mark.usefixtures("no_module")
def test_without_the_module_it_says_how_to_load_it() -> None:
    for arguments in (("list",), ("clean",), ("run",)):
        says(command(*arguments), 3, "/dev/ublk-control is missing", "try: modprobe ublk_drv")


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 10116)):
        says(command("run"), 2, "cannot listen on 127.0.0.1:10116", "try: ")


def test_the_module_may_go_and_come_under_the_running_daemon() -> None:
    with DaemonProcess('[daemon]\nresync_interval = "1s"\n[policy]\norphan_grace = "100ms"\n') as daemon:
        subprocess.run(["rmmod", "ublk_drv"], check=True)
        daemon.wait_log("/dev/ublk-control is missing: the ublk driver is not loaded")
        assert daemon.metric("duende_ublkd_driver_up") == 0
        load_module()
        daemon.wait_log("the ublk driver answers again")
        with NativeServer("--id", "41") as server:
            server.wait_for("LIVE")
            daemon.wait_verdict(41, "live")
            server.kill()
            wait_until(lambda: device_info(41) is None, 20, "id 41 is free")
        assert daemon.stop() == 0
        assert daemon.log.count("is missing") == 1, daemon.log
        assert "Traceback" not in daemon.log, daemon.log


def test_a_clock_that_is_set_forward_ages_no_device(tmp_path: Path) -> None:
    """Between ADD and open nothing but its age speaks for a device, and its node has that from the wall clock."""
    config = tmp_path / "config.toml"
    config.write_text('[policy]\nsetup_grace = "30s"\n')
    with NativeServer("--id", "43", "--stop-after", "add") as server:
        server.wait_for("ADD")
        time.clock_settime(time.CLOCK_REALTIME, time.time() + 40)
        try:
            done = command("clean", "--config", str(config))
            assert "Cleaned 0 orphaned devices" in done.stdout, done.stdout
            assert device_info(43) is not None
        finally:
            time.clock_settime(time.CLOCK_REALTIME, time.time() - 40)
        server.kill()
    assert command("clean", "--now", "43").returncode == 0


def test_a_stopped_daemon_ends_within_five_seconds_and_leaves_its_log_in_order() -> None:
    with DaemonProcess() as daemon, NativeServer("--id", "42", "--recovery") as server:
        server.wait_for("LIVE")
        daemon.wait_verdict(42, "live")
        assert daemon.stop() == 0
        assert daemon.log.splitlines()[-1].endswith("stopped")
    drop_device(42)


def test_whoever_reads_its_log_may_hang_and_it_ends_all_the_same(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'[daemon]\nstate_dir = "{tmp_path}/state"\n')
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, b"x" * 4096):
            pass
    os.set_blocking(writer, True)
    process = subprocess.Popen([sys.executable, "-m", "duende_ublkd", "run", "--config", str(config)], stderr=writer)
    try:
        wait_until(is_ready, 60, "it is ready")
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert time.monotonic() - began < 5
    finally:
        process.kill()
        process.wait()
        os.close(reader)
        os.close(writer)


def is_ready() -> bool:
    try:
        with urllib.request.urlopen("http://127.0.0.1:10116/-/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


DRY = """
[daemon]
resync_interval = "1h"
[policy]
orphan_grace = "0s"
"""


def test_a_dry_run_stays_one_over_a_reload_and_clean_says_what_it_leaves() -> None:
    with DaemonProcess(DRY, "--dry-run") as daemon, NativeServer("--id", "44") as server:
        server.wait_for("LIVE")
        daemon.wait_verdict(44, "live")
        server.kill()
        daemon.wait_log("ublk44 would be deleted")
        daemon.config_path.write_text(DRY + 'unserved = "alert"\n')
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_log("configuration read anew")
        looks = daemon.metric("duende_ublkd_resyncs_total") or 0
        daemon.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: (daemon.metric("duende_ublkd_resyncs_total") or 0) > looks, 20, "it has looked again")
        assert device_info(44) is not None
        assert "ublk44 deleted" not in daemon.log
        done = command("clean", "--dry-run", "44", "--config", str(daemon.config_path))
        assert (done.returncode, "ublk44 would be deleted" in done.stdout) == (1, True), done.stdout
        assert daemon.stop() == 0
    assert command("clean", "--now", "44").returncode == 0
    assert device_info(44) is None


def test_an_orphan_that_is_only_to_be_told_of_is_deleted_by_who_names_it(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[policy]\norphaned = "alert"\norphan_grace = "0s"\nsetup_grace = "0s"\n')
    with NativeServer("--id", "45") as server:
        server.wait_for("LIVE")
        named = command("clean", "45", "--config", str(config))
        assert (named.returncode, device_info(45) is None) == (0, False), named.stdout
        server.kill()
        wait_for_state(45, KernelState.DEAD)
    everything = command("clean", "--config", str(config))
    assert (everything.returncode, "ublk45 left, orphaned" in everything.stdout) == (1, True), everything.stdout
    assert device_info(45) is not None
    named = command("clean", "45", "--config", str(config))
    assert (named.returncode, device_info(45)) == (0, None), named.stdout
