"""The guest is what the other tests in this directory take for granted."""

import asyncio
import importlib
import os
import platform
import shutil
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from duende_ublkd.kernel.ring import Ring


def test_the_kernel_is_the_one_that_the_lab_booted() -> None:
    assert platform.release() == os.environ["DUENDE_LAB_KERNEL_VERSION"]


def test_ublk_drv_is_loaded() -> None:
    assert stat.S_ISCHR(Path("/dev/ublk-control").stat().st_mode)


@pytest.mark.parametrize("module", ["liburing", "pyudev", "inotify_simple", "prometheus_client", "aiohttp", "sqlite3"])
def test_the_interpreter_has_the_packages_of_the_host(module: str) -> None:
    importlib.import_module(module)


def test_libudev_is_found_at_run_time() -> None:
    pyudev = importlib.import_module("pyudev")
    assert pyudev.Context().list_devices(subsystem="mem")


def test_io_uring_is_there() -> None:
    async def make_and_close() -> None:
        await Ring(8).close()

    asyncio.run(make_and_close())


def test_the_loopback_interface_is_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass


def test_ext4_can_be_made_and_mounted(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as image:
        image.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    there = tmp_path / "there"
    there.mkdir()
    subprocess.run(["mount", "-o", "loop", disk, there], check=True)
    try:
        assert shutil.disk_usage(there).total > 0
    finally:
        subprocess.run(["umount", there], check=True)


def test_a_dead_server_can_be_told_by_a_pidfd() -> None:
    with subprocess.Popen(["true"]) as child:
        descriptor = os.pidfd_open(child.pid)
        os.close(descriptor)
