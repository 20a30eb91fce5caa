"""What tests use: servers as processes, the kernel's word on a device, and real I/O on its disk.

Everything is synchronous and has a deadline; nothing needs the caller's event loop, so async tests can use it too (in a
thread). A ServerProcess cleans up whatever ids it ever announced.
"""

import asyncio
import atexit
import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import mmap
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from duende_ublkd.core.errors import NoSuchDeviceError
from duende_ublkd.core.model import DevInfo, KernelState
from duende_ublkd.kernel import abi
from duende_ublkd.kernel.control import Control
from duende_ublkd.kernel.ring import Ring

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE = 60.0  # seconds; what takes one on an idle machine takes ten on an emulated CPU that others want too
BLKFLSBUF = 0x1261
BLOCK = 4096
T = TypeVar("T")
Option = str | float | bool | Path | list[str] | None


class ServerError(AssertionError):
    """The server did not do what the test told it to."""


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a server's standard output."""

    step: str
    at: float
    pid: int
    dev_ids: tuple[int, ...]
    details: dict[str, Any]


class ServerProcess:
    """`python -m tests.server COMMAND ...`; a context manager that leaves no process and no device behind."""

    def __init__(self, command: str, *arguments: str, unprivileged: bool = False) -> None:
        self.events: list[Event] = []
        self._unprivileged = unprivileged
        self._news = threading.Condition()
        self._ended = False
        self._process = _Child([command, *arguments])
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @classmethod
    def start(cls, command: str = "add", **options: Option) -> Self:
        """Options as on the command line: `start(id=3, target="ram", die_at="after-add", hold_io=True)`."""
        unprivileged = bool(options.get("unprivileged"))
        if unprivileged:
            Path(abi.CONTROL_DEVICE).chmod(0o666)  # as the udev rule of a host with unprivileged servers does
        return cls(command, *_arguments(options), unprivileged=unprivileged)

    @classmethod
    def recover(cls, dev_id: int, **options: Option) -> Self:
        """A second server for a QUIESCED or FAIL_IO device; geometry and size come from the kernel."""
        return cls.start("recover", id=dev_id, **options)

    @property
    def dev_ids(self) -> tuple[int, ...]:
        """Every id that was ever announced."""
        with self._news:
            return tuple(sorted({dev_id for event in self.events for dev_id in event.dev_ids}))

    @property
    def dev_id(self) -> int:
        """The only id."""
        (dev_id,) = self.dev_ids
        return dev_id

    @property
    def pid(self) -> int:
        """The process that serves: with --fork-after-open not the one that was started."""
        with self._news:
            return self.events[-1].pid if self.events else self._process.pid

    @property
    def opener_pid(self) -> int:
        """The process that was started and that opened the char devices."""
        return self._process.pid

    @property
    def helper_pid(self) -> int:
        """The helper of --leak-fd."""
        return int(self.wait_for("leaked").details["helper"])

    def wait_for(self, step: str, timeout: float = DEADLINE) -> Event:
        """The first event of that name, past or to come."""
        return self._wait_for(step, 0, timeout)

    def wait_dead(self, timeout: float = DEADLINE) -> int:
        """Until the serving process is gone and reaped; the exit status of the process that was started."""
        _wait_gone(self.pid, timeout)
        return self._process.wait(timeout)

    def go_on(self) -> None:
        """Leave the pause."""
        self.tell("go")

    def tell(self, command: str) -> None:
        """One line on its standard input: go, hold, release, stats, stop."""
        os.write(self._process.stdin, f"{command}\n".encode())

    def stats(self, timeout: float = DEADLINE) -> dict[int, dict[str, int]]:
        """Requests answered so far, by device and operation."""
        served = self._ask("stats", timeout).details["served"]
        return {int(dev_id): counts for dev_id, counts in served.items()}

    def waiting(self, timeout: float = DEADLINE) -> int:
        """Requests received and not answered."""
        return int(self._ask("stats", timeout).details["waiting"])

    def kill(self) -> None:
        """SIGKILL, and reaped when this returns (a forked worker: by init, soon)."""
        pid = self.pid
        _signal(pid, signal.SIGKILL)
        _signal(self._process.pid, signal.SIGKILL)
        _wait_gone(pid, DEADLINE)
        self._process.wait(DEADLINE)

    def terminate(self, timeout: float = DEADLINE) -> int:
        """SIGTERM: it ends as --exit-on-sigterm-with says. Returns the exit status."""
        _signal(self.pid, signal.SIGTERM)
        return self.wait_dead(timeout)

    def close(self, *, delete: bool = True) -> None:
        """Kill what is left of it, and delete what is left of its devices, but for those that nobody can delete."""
        self.kill()
        for event in list(self.events):
            if event.step == "leaked":
                _signal(event.details["helper"], signal.SIGKILL)
                _wait_gone(event.details["helper"], DEADLINE)
        self._reader.join(DEADLINE)
        self._process.close()
        for dev_id in self.dev_ids if delete else ():
            drop_device(dev_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, command: str, timeout: float) -> Event:
        with self._news:
            since = len(self.events)
        self.tell(command)
        return self._wait_for(command, since, timeout)

    def _wait_for(self, step: str, since: int, timeout: float) -> Event:
        deadline = time.monotonic() + timeout
        with self._news:
            while True:
                for event in self.events[since:]:
                    if event.step == step:
                        return event
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    raise ServerError(f"no {step}: {self._story()}")
                self._news.wait(left)

    def _story(self) -> str:
        told = "; ".join(f"{event.step} {event.details or ''}" for event in self.events)
        return f"it {'ended' if self._ended else 'runs'} after [{told}] {self._process.complaints()}"

    def _read(self) -> None:
        for line in self._process.stdout:
            told = json.loads(line)
            event = Event(told.pop("step"), told.pop("at"), told.pop("pid"), tuple(told.pop("dev_ids")), told)
            if self._unprivileged and event.step in ("after-add", "after-start"):
                _play_udev(event.dev_ids)
            with self._news:
                self.events.append(event)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


class _Child:
    """One server, born in the nursery."""

    def __init__(self, arguments: list[str]) -> None:
        self._status: int | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        stdin, self.stdin = os.pipe()
        out, stdout = os.pipe()
        self.stdout = os.fdopen(out, "rb")
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = [stdin, stdout, self._errors.fileno(), theirs.fileno()]
        socket.send_fds(_nursery(), [json.dumps(arguments).encode()], fds)
        theirs.close()
        os.close(stdin)
        os.close(stdout)
        self._channel.settimeout(DEADLINE)
        try:
            self.pid = int(self._channel.recv(64))  # the first one waits for the nursery's imports
        except TimeoutError as error:
            self.close()
            raise ServerError("the nursery does not answer") from error

    def wait(self, timeout: float) -> int:
        """The exit status, once it is dead and reaped; negative: the signal."""
        if self._status is None:
            self._channel.settimeout(timeout)
            self._status = int(self._channel.recv(64))
        return self._status

    def complaints(self) -> str:
        """Its standard error so far."""
        return os.pread(self._errors.fileno(), 1 << 16, 0).decode(errors="replace")

    def close(self) -> None:
        for each in (self.stdout, self._errors, self._channel):
            each.close()
        os.close(self.stdin)


@functools.cache
def _nursery() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    nursery = subprocess.Popen([sys.executable, "-m", "tests.server.nursery"], cwd=REPOSITORY, stdin=theirs.fileno())
    theirs.close()

    def end() -> None:
        ours.close()
        nursery.wait(DEADLINE)

    atexit.register(end)
    return ours


def _arguments(options: dict[str, Option]) -> Iterator[str]:
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None or value is False:
            continue
        if value is True:
            yield flag
            continue
        for each in value if isinstance(value, list) else [value]:
            yield flag
            yield str(each)


def _play_udev(dev_ids: tuple[int, ...]) -> None:
    """Give the nodes of unprivileged devices to their owners."""
    for dev_id in dev_ids:
        info = device_info(dev_id)
        for node in (abi.CHAR_DEVICE.format(dev_id), abi.BLOCK_DEVICE.format(dev_id)):
            if info and Path(node).exists():
                os.chown(node, info.owner_uid, info.owner_gid)


def some_thread_hangs_in_the_kernel() -> bool:
    """Whether a thread of this process, such as one of `in_background`, is in an uninterruptible sleep."""
    return any(_state_of(task) == "D" for task in Path("/proc/self/task").iterdir())


def _state_of(task: Path) -> str:
    try:
        return task.joinpath("stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # it ended since it was listed
        return ""


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _wait_gone(pid: int, timeout: float) -> None:
    """Until a process, ours or not, has exited: its files are closed then, reaped or not."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not select.select([fd], [], [], timeout)[0]:
            raise ServerError(f"process {pid} has not ended after {timeout} s")
    finally:
        os.close(fd)


def wait_until(predicate: Callable[[], T], deadline: float = DEADLINE, what: str = "the condition") -> T:
    """Ask until the answer is true, and return it; ServerError after `deadline` seconds."""
    end = time.monotonic() + deadline
    while not (answer := predicate()):
        if time.monotonic() > end:
            raise ServerError(f"after {deadline} s still not true: {what}")
        time.sleep(0.005)
    return answer


# --- the kernel's word ------------------------------------------------------------------------------------------------


def ask_kernel(question: Callable[[Control], Coroutine[Any, Any, T]], timeout: float = DEADLINE) -> T:
    """`ask_kernel(lambda control: control.get_device_info(3))`, on a ring and in a thread of its own."""

    async def ask() -> T:
        ring = Ring(8)
        try:
            return await question(Control(ring, deadline=timeout))
        finally:
            await ring.close()

    return in_background(lambda: asyncio.run(ask())).result(timeout + 5)


def device_info(dev_id: int) -> DevInfo | None:
    """GET_DEV_INFO; None: the id is free."""
    try:
        return ask_kernel(lambda control: control.get_device_info(dev_id))
    except NoSuchDeviceError:
        return None


def features() -> int:
    """GET_FEATURES."""
    return ask_kernel(lambda control: control.features())


def wait_for_state(dev_id: int, state: int, deadline: float = DEADLINE) -> DevInfo:
    """Until GET_DEV_INFO says `state`."""

    def asked() -> DevInfo | None:
        info = device_info(dev_id)
        return info if info and info.state == state else None

    found = wait_until(asked, deadline, f"ublk{dev_id} is {KernelState.name(state)}")
    assert found
    return found


def char_device_is_open(dev_id: int) -> bool:
    """Whether somebody has /dev/ublkcN. Opens it itself for a moment."""
    try:
        fd = os.open(abi.CHAR_DEVICE.format(dev_id), os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return True
    os.close(fd)
    return False


def drop_device(dev_id: int, deadline: float = DEADLINE) -> None:
    """Delete a device whose server is dead, if it is still there, and wait until the id is free."""
    info = device_info(dev_id)
    if info and info.state == KernelState.LIVE:

        def settled() -> bool:
            now = device_info(dev_id)
            return now is None or now.state != KernelState.LIVE

        wait_until(settled, deadline, f"the kernel notices that ublk{dev_id} is dead")
    if device_info(dev_id):
        with contextlib.suppress(NoSuchDeviceError):
            ask_kernel(lambda control: _delete(control, dev_id), deadline)
    wait_until(lambda: device_info(dev_id) is None, deadline, f"ublk{dev_id} is free")


async def _delete(control: Control, dev_id: int) -> None:
    info = await control.get_device_info(dev_id)
    if info.state != KernelState.DEAD:
        await control.stop_device(dev_id, via_node=info.unprivileged)
    if info.unprivileged:
        await control.delete_device(dev_id, via_node=True)
    else:
        await control.delete_device_async(dev_id)


# --- the disk ---------------------------------------------------------------------------------------------------------


def block_device(dev_id: int) -> Path:
    return Path(abi.BLOCK_DEVICE.format(dev_id))


def write_pattern(device: Path, size: int, seed: int = 1) -> str:
    """Fill the first `size` bytes with noise, down to the server; returns its SHA-256."""
    noise = random.Random(seed).randbytes(size)
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        done = 0
        while done < size:
            done += os.pwrite(fd, noise[done:], done)
        os.fsync(fd)
    finally:
        os.close(fd)
    return hashlib.sha256(noise).hexdigest()


def read_back(device: Path, size: int) -> str:
    """The SHA-256 of the first `size` bytes as the server has them, not the page cache."""
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, BLKFLSBUF, 0)
        digest = hashlib.sha256()
        done = 0
        while done < size:
            chunk = os.pread(fd, min(size - done, 1 << 20), done)
            digest.update(chunk)
            done += len(chunk)
    finally:
        os.close(fd)
    return digest.hexdigest()


def in_background(action: Callable[[], T]) -> "concurrent.futures.Future[T]":
    """Run something that may block in the kernel; a daemon thread, so that it never keeps the tests from ending."""
    answer: concurrent.futures.Future[T] = concurrent.futures.Future()
    threading.Thread(target=_into, args=(action, answer), daemon=True).start()
    return answer


def direct_write(device: Path, data: bytes, offset: int = 0) -> None:
    """One request past the page cache: it is answered by the server, or fails. Multiples of 4096."""
    with _direct(device) as fd, mmap.mmap(-1, len(data)) as page:
        page[:] = data
        os.pwrite(fd, page, offset)


def direct_read(device: Path, length: int = BLOCK, offset: int = 0) -> bytes:
    """One request past the page cache. Multiples of 4096."""
    with _direct(device) as fd, mmap.mmap(-1, length) as page:
        count = os.preadv(fd, [page], offset)
        return page[:count]


@contextlib.contextmanager
def _direct(device: Path) -> Iterator[int]:
    fd = os.open(device, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _into(action: Callable[[], T], answer: "concurrent.futures.Future[T]") -> None:
    try:
        answer.set_result(action())
    except BaseException as error:  # noqa: BLE001 - whatever it was, the caller of result() gets it
        answer.set_exception(error)
