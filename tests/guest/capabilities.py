"""What is lost without each capability of the daemon's unit: `python -m tests.guest.capabilities` prints it as JSON.

Each probe does one thing as the daemon does it, in a process that has the unit's capabilities or all of them but one.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from duende_ublkd.core.errors import DuendeError
from duende_ublkd.kernel.children import Children, CommandOrder, Credentials
from duende_ublkd.kernel.memory import lock_memory, reclaim_without_io
from duende_ublkd.kernel.nursery import open_char_devices
from duende_ublkd.kernel.udev import RECEIVE_BUFFER, Uevents
from tests.native_server import NativeServer
from tests.server.harness import device_info, drop_device

USER = 1000
DEV_ID = 29
NODE = Path("/dev/shm/capabilities")  # stands for the node of an unprivileged device
COMMAND = ("/usr/bin/sleep", "17")  # seconds; whoever cannot end it leaves it, and this script ends it then
NUMBERS = {
    "CAP_DAC_OVERRIDE": 1,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_NET_ADMIN": 12,
    "CAP_IPC_LOCK": 14,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
}
_PR_CAPBSET_DROP = 24
_CAPABILITY_VERSION_3 = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)


def asks_the_driver() -> None:
    """Of an id that nobody has, the driver says so to anybody."""
    assert device_info(DEV_ID)


def locks_its_memory() -> None:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))  # systemd's own default
    lock_memory()


def reclaims_without_io() -> None:
    if not reclaim_without_io():
        raise PermissionError


def sees_what_another_users_process_has_open() -> None:
    with subprocess.Popen(["sleep", "1000"], user=USER, group=USER) as process:
        try:
            open_char_devices(process.pid, None)
        finally:
            process.kill()


def opens_another_users_node() -> None:
    os.close(os.open(NODE, os.O_RDWR))


def has_a_large_buffer_for_events() -> None:
    async def listen() -> None:
        uevents = Uevents(Deaf())
        try:
            size = uevents._socket.getsockopt(1, 8)  # SOL_SOCKET, SO_RCVBUF
        finally:
            uevents.close()
        if size < 2 * RECEIVE_BUFFER:  # the kernel tells twice of what it was asked for
            raise PermissionError(f"{size} bytes")

    asyncio.run(listen())


def starts_a_command_of_another_user() -> None:
    asyncio.run(_run_command())


def ends_a_command_of_another_user() -> None:
    if left := asyncio.run(_run_command()):
        raise PermissionError(left)


async def _run_command() -> str:
    children = Children()
    children.start()
    try:
        user = Credentials(USER, USER)
        command = children.run(CommandOrder(3, COMMAND, {}, 1.0, user))
        await command.started()
        return await command.end(2.0)
    finally:
        children.close()


class Deaf:
    """Nothing that comes is of interest."""

    def on_uevent(self, subsystem: str, action: str, dev_id: int) -> None: ...

    def on_driver(self, action: str) -> None: ...

    def on_overflow(self) -> None: ...

    def on_node(self, dev_id: int, *, opened: bool) -> None: ...


PROBES: dict[str, Callable[[], None]] = {
    "CAP_SYS_ADMIN": asks_the_driver,
    "CAP_IPC_LOCK": locks_its_memory,
    "CAP_SYS_PTRACE": sees_what_another_users_process_has_open,
    "CAP_DAC_OVERRIDE": opens_another_users_node,
    "CAP_NET_ADMIN": has_a_large_buffer_for_events,
    "CAP_SYS_RESOURCE": reclaims_without_io,
    "CAP_SETUID": starts_a_command_of_another_user,
    "CAP_SETGID": starts_a_command_of_another_user,
    "CAP_KILL": ends_a_command_of_another_user,
}


def keep_only(names: set[str]) -> None:
    """Of this process's capabilities, and of whatever root program it executes."""
    kept = {NUMBERS[name] for name in names}
    for number in set(range(64)) - kept:
        _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)  # those that this kernel has none of are refused
    mask = sum(1 << number for number in kept)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)(mask, mask, 0, 0, 0, 0)
    if _libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def answer(probe: Callable[[], None], names: set[str]) -> str:
    """Empty: it works; else why it does not."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = "it died"
        try:
            keep_only(names)
            probe()
            said = ""
        except (DuendeError, OSError) as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        said = told.read().decode()
    os.waitpid(pid, 0)
    return said


def main() -> None:
    signal.alarm(120)
    NODE.touch(0o600)
    os.chown(NODE, USER, USER)
    everything = set(NUMBERS)
    with NativeServer("--id", str(DEV_ID)) as server:
        server.wait_for("LIVE")
        found = {
            name: {"with": answer(probe, everything), "without": answer(probe, everything - {name})}
            for name, probe in PROBES.items()
        }
    drop_device(DEV_ID)
    end_what_is_left()
    NODE.unlink()
    json.dump(found, sys.stdout)


def end_what_is_left() -> None:
    wanted = b"".join(each.encode() + b"\0" for each in COMMAND)
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if entry.read_bytes() == wanted and entry.stat().st_uid == USER:
                os.kill(int(entry.parent.name), signal.SIGKILL)


if __name__ == "__main__":
    main()
