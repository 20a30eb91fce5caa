"""What wedges a device: servers that do not answer, descriptors that leak; and somebody who reads another one meanwhile."""

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from duende_ublkd.core.model import Feature
from tests.daemon_process import DaemonProcess
from tests.native_server import NativeServer
from tests.server.harness import block_device, direct_read, features, wait_until

STOPPED_IN = 5.0  # seconds from SIGTERM to the daemon's end, whatever hangs
USUAL_START = 15.0  # and to its start, on an emulated CPU with a core of its own, at most
RING = "anon_inode:[io_uring]"
_NR_PIDFD_GETFD = 438


def served(dev_id: int, *options: str, flags: int = 0) -> NativeServer:
    """A server whose disk is LIVE and of which the kernel reads nothing by itself any more."""
    flags |= _features() & Feature.NO_AUTO_PART_SCAN
    server = NativeServer("--id", str(dev_id), "--flags", hex(flags), *options)
    server.wait_for("LIVE")
    if not flags & Feature.NO_AUTO_PART_SCAN:
        wait_until(lambda: _is_scanned(dev_id), 60, f"the partitions of ublk{dev_id} are looked for")
    return server


@functools.cache
def _features() -> int:
    return features()


def _is_scanned(dev_id: int) -> bool:
    """Since 6.18.4 it is scanned after START_DEV."""
    reads = Path(f"/sys/block/ublkb{dev_id}/stat").read_text().split()[0]
    return int(reads) > 0 and not _in_flight(dev_id)


def _in_flight(dev_id: int) -> bool:
    return Path(f"/sys/block/ublkb{dev_id}/inflight").read_text().split() != ["0", "0"]


@contextlib.contextmanager
def unanswered(dev_id: int, server: NativeServer) -> Iterator[None]:
    """Its server is stopped with a request of somebody's in flight; at the end it goes on, if it is still there."""
    os.kill(server.pid, signal.SIGSTOP)
    disk = f"if={block_device(dev_id)}"
    with subprocess.Popen(["dd", disk, "of=/dev/null", "bs=4k", "count=1", "skip=4000"], stderr=subprocess.DEVNULL):
        try:
            wait_until(lambda: _in_flight(dev_id), 60, f"a request of ublk{dev_id} is in flight")
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(server.pid, signal.SIGCONT)


@contextlib.contextmanager
def hanging(word: str, dev_id: int, server: NativeServer) -> Iterator[int]:
    """Somebody's command to a device whose server does not answer; its pid. At the end the server goes on, and it ends."""
    with contextlib.ExitStack() as after, unanswered(dev_id, server):
        sender = after.enter_context(NativeServer(word, str(dev_id), program="wedge"))
        sender.wait_for("SENT")
        wait_until(lambda: "ublk_" in stack_of(sender.pid), 60, f"the {word} is in the driver")
        yield sender.pid


def borrowed(pid: int, link: str) -> int:
    """A descriptor of our own for a file that another process has open."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if str(entry.readlink()) == link:
            pidfd = os.pidfd_open(pid)
            try:
                number = ctypes.CDLL(None, use_errno=True).syscall(_NR_PIDFD_GETFD, pidfd, int(entry.name), 0)
            finally:
                os.close(pidfd)
            if number < 0:
                raise OSError(ctypes.get_errno(), "pidfd_getfd")
            return int(number)
    raise AssertionError(f"pid {pid} does not have {link} open")


def leaked_to_a_sleeper(*descriptors: int) -> subprocess.Popen[bytes]:
    """A process that does nothing but have these open; ours are closed."""
    sleeper = subprocess.Popen(["sleep", "1000"], pass_fds=descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    return sleeper


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


class Reader:
    """Reads a disk past the page cache, again and again; a context manager."""

    def __init__(self, dev_id: int) -> None:
        self._device = block_device(dev_id)
        self._count = 0
        self._trouble: list[OSError] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(20)

    def goes_on(self) -> None:
        """It reads now, and has never failed."""
        before = self._count
        wait_until(lambda: self._count > before + 1 or self._trouble, 60, f"{self._device} is read")
        assert not self._trouble

    def _read(self) -> None:
        while not self._over.wait(0.02):
            try:
                direct_read(self._device)
            except OSError as error:
                self._trouble.append(error)
                return
            self._count += 1


def stack_of(pid: int) -> str:
    """The functions that its threads sleep in, in the kernel."""
    told = ""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            told += task.joinpath("stack").read_text()
    return told


def processes(comm: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if entry.read_text().strip() == comm:
                found.append(int(entry.parent.name))
    return found


def stops_in_time(daemon: DaemonProcess) -> None:
    """Within its five seconds; where others want the CPU so much that it starts late, as much later."""
    within = STOPPED_IN * max(1.0, daemon.ready_after / USUAL_START)
    began = time.monotonic()
    assert daemon.stop() == 0
    took = time.monotonic() - began
    print(f"\nstarted in {daemon.ready_after:.1f} s, stopped in {took:.1f} s")
    assert took < within, daemon.log
    assert "Traceback" not in daemon.log, daemon.log


def commands_sent(daemon: DaemonProcess, *names: str) -> float:
    """How many of these control commands this daemon has sent and had answered, or given up."""
    total = 0.0
    for line in daemon.get("/metrics").splitlines():
        if line.startswith("duende_ublkd_control_commands_total{") and any(
            f'command="{each}"' in line for each in names
        ):
            total += float(line.rpartition(" ")[2])
    return total
