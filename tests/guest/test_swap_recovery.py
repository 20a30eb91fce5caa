"""The swap is on a device whose server dies while memory is short: the recovery must not need what the swap holds."""

import ctypes
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from duende_ublkd.core.model import KernelState
from duende_ublkd.kernel.memory import lock_memory, reclaim_without_io
from tests.daemon_process import DaemonProcess
from tests.guest.test_recovery import REISSUE, recovering
from tests.native_server import NativeServer
from tests.server.harness import block_device, device_info, drop_device, wait_until

DEV_ID = 6
MIB = 1 << 20
IN_SWAP = 64 * MIB
NOTICED_IN = 90  # seconds; up to 6.14 it is the request timeout, 30 s, where every tag was in flight
LEFT_FREE = 256 * MIB  # by what cannot be swapped out
MOST_BLOCKS = 1024
RAM = Path("/tmp/unswappable")
SHM = Path("/tmp/swappable")
PR_SET_IO_FLUSHER = 57
# Touches a megabyte after the other until it is told to end, killed, or hangs for want of memory.
PRESS = """
import os, time
with open("/proc/self/oom_score_adj", "w") as file:
    file.write("1000")
block, kept = os.urandom(1 << 20), []
while True:
    kept.append(bytearray(block))
    time.sleep(0.02)
"""


@pytest.fixture
def ramfs() -> Iterator[Path]:
    """Where neither the disk's content nor the server's program can be swapped out: the guest's root is a tmpfs."""
    RAM.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "ramfs", "ramfs", str(RAM)], check=True)
    SHM.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MOST_BLOCKS}M", "tmpfs", str(SHM)], check=True)
    yield RAM
    subprocess.run(["umount", str(SHM)], check=True)
    subprocess.run(["umount", str(RAM)], check=True)


@pytest.fixture
def steady() -> Iterator[None]:
    """The test itself must not be swapped out either, nor wait for the swap when it needs memory."""
    libc = ctypes.CDLL(None)
    lock_memory()
    assert reclaim_without_io()
    yield
    assert libc.prctl(PR_SET_IO_FLUSHER, 0, 0, 0, 0) == 0
    assert libc.munlockall() == 0


def meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(name)


def in_swap() -> int:
    return meminfo("SwapTotal") - meminfo("SwapFree")


def major_faults(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[9])


def block(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest() * (MIB // 32)


def fill(path: Path) -> int:
    """Write to a tmpfs until much of it is in the swap; the number of blocks."""
    number = 0
    with path.open("wb") as file:
        while in_swap() < IN_SWAP:
            file.write(block(number))
            number += 1
            assert number < MOST_BLOCKS, "memory does not fill"
    return number


def test_a_swap_is_served_again_when_memory_is_short(ramfs: Path, steady: None) -> None:
    assert steady is None
    program, backing, hog = ramfs / "mini_server", ramfs / "disk", SHM / "hog"
    found = shutil.which("mini_server")
    assert found
    shutil.copy(found, program)
    config = recovering(str(program), "--recover", "{id}", "--backing", str(backing), "--lock")
    with (
        DaemonProcess(config) as daemon,
        NativeServer(
            "--id", str(DEV_ID), *REISSUE, "--size", "384", "--backing", str(backing), "--lock", program=str(program)
        ) as server,
    ):
        server.wait_for("LIVE")
        subprocess.run(["mkswap", block_device(DEV_ID)], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["swapon", block_device(DEV_ID)], check=True)
        daemon.wait_verdict(DEV_ID, "live")
        ballast = max(meminfo("MemAvailable") - LEFT_FREE, 0) // MIB
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={ramfs / 'ballast'}", "bs=1M", f"count={ballast}"],
            check=True,
            stderr=subprocess.DEVNULL,
        )
        blocks = fill(hog)
        presser = subprocess.Popen([sys.executable, "-c", PRESS])
        before = in_swap()
        wait_until(lambda: in_swap() > before + 16 * MIB or presser.poll() is not None, 120, "memory is short")
        # Memory is as short as it gets with a swap that works. Who goes on asking for more while the swap has no server
        # drains the kernel's own reserves, and 6.12 may then hang as a whole (kthreadd, kswapd), whoever recovers what.
        presser.send_signal(signal.SIGSTOP)
        faults = major_faults(daemon.process.pid)
        killed = server.kill()
        wait_until(lambda: kernel_state() != KernelState.LIVE, NOTICED_IN, "the kernel has noticed")
        noticed = time.monotonic()
        wait_until(lambda: is_live_again(server.pid), 90, "the swap is served again")
        print(
            f"\nnoticed by the kernel after {noticed - killed:.2f} s, served again {time.monotonic() - noticed:.2f} s later"
        )
        assert major_faults(daemon.process.pid) == faults, "the daemon had to read something from a disk"
        presser.kill()
        presser.wait()
        with hog.open("rb") as file:
            for number in range(blocks):
                assert file.read(MIB) == block(number), number
        daemon.wait_log(rf"ublk{DEV_ID} recovered: served again")
        assert daemon.metric("duende_ublkd_reaction_seconds_count") == 1, daemon.log
        hog.unlink()
        subprocess.run(["swapoff", block_device(DEV_ID)], check=True)
        assert daemon.stop() == 0
        info = device_info(DEV_ID)
        assert info
        if info.server_pid > 0:
            os.kill(info.server_pid, 9)
        drop_device(DEV_ID)


def kernel_state() -> int:
    info = device_info(DEV_ID)
    assert info
    return info.state


def is_live_again(former: int) -> bool:
    info = device_info(DEV_ID)
    return info is not None and info.state == KernelState.LIVE and info.server_pid not in (former, -1)
