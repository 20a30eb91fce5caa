"""ublk's control plane: every command that /dev/ublk-control takes, with its errors given a meaning.

Rules:
1. The control device is open only while a command is under way: an open file would keep the module from being unloaded.
2. Commands go out ioctl-encoded; a kernel that answers "not supported" to that is asked once more with the plain number
   (6.0 to 6.3 know nothing else, and those without CONFIG_BLKDEV_UBLK_LEGACY_OPCODES refuse it), and what worked stays.
3. An unprivileged device (UBLK_F_UNPRIVILEGED_DEV) is found only through its node's path, in front of every payload,
   also for root. GET_DEV_INFO tells so with EINVAL, and is then asked again as GET_DEV_INFO2.
4. This file sends what it is told to. Whether a device may be stopped or deleted is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import time
from typing import TYPE_CHECKING

from duende_ublkd.core.errors import CommandError, CommandOverdueError, KernelUnavailableError, UnsupportedError
from duende_ublkd.kernel import abi
from duende_ublkd.kernel.abi import Command, CtrlCmd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from duende_ublkd.core.model import DevInfo
    from duende_ublkd.kernel.ring import Ring

_NO_DRIVER = (errno.ENOENT, errno.ENXIO, errno.ENODEV)
DEADLINE = 10.0  # seconds, unless configured


class Control:
    """Commands to ublk_drv. Every method may raise CommandError, CommandOverdueError or KernelUnavailableError."""

    def __init__(
        self,
        ring: Ring,
        *,
        deadline: float = DEADLINE,
        on_command: Callable[[str, str, float], None] | None = None,
    ) -> None:
        """`on_command(name, result, seconds)`: called for each answer; result is `ok`, `overdue` or an errno's name."""
        self._ring = ring
        self._on_command = on_command
        self._fd: int | None = None
        self._users = 0
        self._encoding_proven = False
        self._legacy = False
        self._features: int | None = None
        self.deadline = deadline

    async def features(self) -> int:
        """The driver's UBLK_F_* bits; asked once. 0: the driver is older than 6.5 and cannot say."""
        if self._features is None:
            buffer = ctypes.create_string_buffer(8)
            try:
                await self._send(Command.GET_FEATURES, abi.ANY_DEV_ID, buffer=buffer)
            except CommandError as error:
                # 6.1 takes it for a command on a device and finds none; 6.3 does not know it; 6.8 says ENOTSUPP.
                if error.errno not in (errno.ENODEV, errno.EOPNOTSUPP, abi.ENOTSUPP, errno.EINVAL):
                    raise
            self._features = int.from_bytes(buffer.raw, "little")
        return self._features

    def forget(self) -> None:
        """Forget what was learnt of the driver: the module is another one now."""
        self._features = None
        self._encoding_proven = self._legacy = False

    async def get_device_info(self, dev_id: int) -> DevInfo:
        """GET_DEV_INFO, which takes no lock in any version. NoSuchDeviceError: the id is free."""
        buffer = ctypes.create_string_buffer(abi.DEV_INFO.size)
        try:
            await self._send(Command.GET_DEV_INFO, dev_id, buffer=buffer)
        except CommandError as error:
            if error.errno != errno.EINVAL:
                raise
            raw = await self._send_with_path(Command.GET_DEV_INFO2, dev_id, bytes(abi.DEV_INFO.size))
            return abi.unpack_dev_info(raw)
        return abi.unpack_dev_info(buffer.raw)

    async def add_device(self, info: DevInfo) -> DevInfo:
        """ADD_DEV; `info.dev_id` -1 takes the lowest free id. Returns the record as the kernel negotiated it."""
        buffer = ctypes.create_string_buffer(abi.pack_dev_info(info), abi.DEV_INFO.size)
        dev_id = info.dev_id if info.dev_id >= 0 else abi.ANY_DEV_ID
        await self._send(Command.ADD_DEV, dev_id, buffer=buffer)
        return abi.unpack_dev_info(buffer.raw)

    async def set_params(self, dev_id: int, params: bytes, *, via_node: bool = False) -> None:
        """SET_PARAMS: `params` is struct ublk_params, its own length first. Takes the device's mutex."""
        if via_node:
            await self._send_with_path(Command.SET_PARAMS, dev_id, params)
            return
        await self._send(Command.SET_PARAMS, dev_id, buffer=ctypes.create_string_buffer(params, len(params)))

    async def get_params(self, dev_id: int, size: int = 128, *, via_node: bool = False) -> bytes:
        """GET_PARAMS: up to `size` bytes of struct ublk_params. Blocks behind a blocked STOP_DEV."""
        request = size.to_bytes(4, "little").ljust(size, b"\0")
        if via_node:
            return await self._send_with_path(Command.GET_PARAMS, dev_id, request)
        buffer = ctypes.create_string_buffer(request, size)
        await self._send(Command.GET_PARAMS, dev_id, buffer=buffer)
        return buffer.raw

    async def get_queue_affinity(self, dev_id: int, queue: int, *, via_node: bool = False) -> bytes:
        """GET_QUEUE_AFFINITY: the CPU mask of one queue, 128 bytes."""
        if via_node:
            return await self._send_with_path(Command.GET_QUEUE_AFFINITY, dev_id, bytes(128), data=queue)
        buffer = ctypes.create_string_buffer(128)
        await self._send(Command.GET_QUEUE_AFFINITY, dev_id, buffer=buffer, data=queue)
        return buffer.raw

    async def start_device(self, dev_id: int, pid: int, *, via_node: bool = False) -> None:
        """START_DEV. Waits for the server's FETCHes for as long as it takes."""
        await self._simple(Command.START_DEV, dev_id, via_node=via_node, data=pid, patient=True)

    async def stop_device(self, dev_id: int, *, via_node: bool = False) -> None:
        """STOP_DEV. On a device that is not DEAD it can block for ever, beyond cancellation (del_gendisk)."""
        await self._simple(Command.STOP_DEV, dev_id, via_node=via_node)

    async def try_stop_device(self, dev_id: int, *, via_node: bool = False) -> None:
        """TRY_STOP_DEV (7.0): BusyError when the disk is opened, mounted or swapped on."""
        await self._simple(Command.TRY_STOP_DEV, dev_id, via_node=via_node)

    async def delete_device(self, dev_id: int, *, via_node: bool = False) -> None:
        """DEL_DEV: returns when the id is free. InterruptedCommandError: deleted, but somebody still holds the id."""
        await self._simple(Command.DEL_DEV, dev_id, via_node=via_node)

    async def delete_device_async(self, dev_id: int) -> None:
        """DEL_DEV_ASYNC (6.9): does not wait for the holders. Never possible for an unprivileged device."""
        await self._simple(Command.DEL_DEV_ASYNC, dev_id, via_node=False)

    async def start_user_recovery(self, dev_id: int, *, via_node: bool = False) -> None:
        """START_USER_RECOVERY: for a new server only; up to 6.14 it resets the queues."""
        await self._simple(Command.START_USER_RECOVERY, dev_id, via_node=via_node)

    async def end_user_recovery(self, dev_id: int, pid: int, *, via_node: bool = False) -> None:
        """END_USER_RECOVERY. Waits for the new server's FETCHes."""
        await self._simple(Command.END_USER_RECOVERY, dev_id, via_node=via_node, data=pid, patient=True)

    async def quiesce_device(self, dev_id: int, timeout_ms: int, *, via_node: bool = False) -> None:
        """QUIESCE_DEV (6.16)."""
        await self._simple(Command.QUIESCE_DEV, dev_id, via_node=via_node, data=timeout_ms)

    async def update_size(self, dev_id: int, sectors: int, *, via_node: bool = False) -> None:
        """UPDATE_SIZE (6.16): the disk's new size in sectors of 512 bytes."""
        await self._simple(Command.UPDATE_SIZE, dev_id, via_node=via_node, data=sectors)

    async def _simple(
        self, command: Command, dev_id: int, *, via_node: bool, data: int = 0, patient: bool = False
    ) -> None:
        if via_node:
            await self._send_with_path(command, dev_id, b"", data=data, patient=patient)
        else:
            await self._send(command, dev_id, data=data, patient=patient)

    async def _send_with_path(
        self, command: Command, dev_id: int, payload: bytes, *, data: int = 0, patient: bool = False
    ) -> bytes:
        """Put the node's path in front of the payload; return the payload as the kernel left it."""
        path = abi.CHAR_DEVICE.format(dev_id).encode() + b"\0"
        buffer = ctypes.create_string_buffer(path + payload, len(path) + len(payload))
        await self._send(command, dev_id, buffer=buffer, data=data, path_length=len(path), patient=patient)
        return buffer.raw[len(path) :]

    async def _send(
        self,
        command: Command,
        dev_id: int,
        *,
        buffer: ctypes.Array[ctypes.c_char] | None = None,
        data: int = 0,
        path_length: int = 0,
        patient: bool = False,
    ) -> int:
        request = CtrlCmd(
            dev_id,
            length=len(buffer) if buffer else 0,
            addr=ctypes.addressof(buffer) if buffer else 0,
            data=data,
            path_length=path_length,
        )
        deadline = None if patient else self.deadline
        legacy = self._legacy and command.has_legacy
        try:
            return await self._submit(command, request, buffer, deadline, legacy=legacy)
        except UnsupportedError:
            if legacy or self._encoding_proven or not command.has_legacy:
                raise
        result = await self._submit(command, request, buffer, deadline, legacy=True)
        self._legacy = True
        return result

    async def _submit(
        self, command: Command, request: CtrlCmd, keep: object, deadline: float | None, *, legacy: bool
    ) -> int:
        about = None if request.dev_id == abi.ANY_DEV_ID else request.dev_id
        began = time.monotonic()
        with self._control_device() as fd:
            try:
                completion = await self._ring.command(
                    command.name,
                    fd,
                    command.nr if legacy else command.encoded,
                    request.pack(),
                    deadline=deadline,
                    keep=keep,
                    dev_id=about,
                )
            except CommandOverdueError:
                self.note(command.name, "overdue", time.monotonic() - began)
                raise
        self.note(command.name, _result_name(completion.result), time.monotonic() - began)
        if completion.result < 0:
            raise abi.error_of(command, about, completion.result)
        if not legacy and command.has_legacy:
            self._encoding_proven = True
        return completion.result

    def note(self, name: str, result: str, seconds: float) -> None:
        """Count a command, also one that a child has sent."""
        if self._on_command:
            self._on_command(name, result, seconds)

    @contextlib.contextmanager
    def _control_device(self) -> Iterator[int]:
        """Share one descriptor among the commands that are under way."""
        if self._fd is None:
            self._fd = open_control_device()
        self._users += 1
        try:
            yield self._fd
        finally:
            self._users -= 1
            if not self._users:
                os.close(self._fd)
                self._fd = None


def open_control_device(path: str = abi.CONTROL_DEVICE) -> int:
    """Open the control device, or say in KernelUnavailableError what to type next."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        message, hint = why_no_control_device(path, error.errno or 0, os.uname().release, os.geteuid())
        missing = error.errno in _NO_DRIVER
        raise KernelUnavailableError(message, hint=hint, no_driver=missing) from error


def why_no_control_device(path: str, number: int, release: str, euid: int) -> tuple[str, str]:
    """What the errno of an open means on this kernel for this user, and what to type next."""
    if number in (errno.EACCES, errno.EPERM):
        if euid != 0:
            return f"{path} may be opened by root only", "run it as root: sudo duende-ublkd ..."
        return f"{path} may not be opened here", "give the service DeviceAllow=/dev/ublk-control rw and CAP_SYS_ADMIN"
    if number in _NO_DRIVER:
        if kernel_version(release) < (6, 0):
            return (
                f"{path} is missing: kernel {release} is older than ublk, which came with 6.0",
                "boot a kernel of 6.0 or newer; if the vendor has added ublk to this one: modprobe ublk_drv",
            )
        return (
            f"{path} is missing: the ublk driver is not loaded",
            "modprobe ublk_drv  # if that fails, the kernel was built without CONFIG_BLK_DEV_UBLK",
        )
    return f"{path}: {os.strerror(number)}", "look at: dmesg | tail"


def kernel_version(release: str) -> tuple[int, ...]:
    """(6, 12) of `6.12.107+deb13-amd64`."""
    numbers = release.split("-", 1)[0].split("+", 1)[0].split(".")[:2]
    return tuple(int(number) for number in numbers if number.isdigit())


def _result_name(result: int) -> str:
    if result >= 0:
        return "ok"
    return errno.errorcode.get(-result, "ENOTSUPP" if -result == abi.ENOTSUPP else f"E{-result}")
