"""The binary face of ublk_drv and of io_uring's submission entries: numbers, layouts, and what each errno means.

Everything here is from include/uapi/linux/ublk_cmd.h and io_uring.h of 7.3; a test asks the C compiler whether it is
so. Native byte order throughout. No I/O.
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass
from enum import Enum

from duende_ublkd.core.errors import (
    BusyError,
    CommandError,
    DeviceExistsError,
    InterruptedCommandError,
    NoSuchDeviceError,
    NotPermittedError,
    UnsupportedError,
)
from duende_ublkd.core.model import DevInfo

CONTROL_DEVICE = "/dev/ublk-control"
CHAR_DEVICE = "/dev/ublkc{}"
BLOCK_DEVICE = "/dev/ublkb{}"
ANY_DEV_ID = 0xFFFF_FFFF  # ADD_DEV picks the lowest free id
NO_QUEUE = 0xFFFF  # queue_id of every command that is not about a queue; ADD_DEV insists on it

IORING_OP_NOP = 0
IORING_OP_ASYNC_CANCEL = 14
IORING_OP_URING_CMD = 46
IORING_SETUP_SQE128 = 1 << 10
IORING_OFF_SQES = 0x1000_0000
SQE_SIZE = 128
COMMAND_SIZE = 80  # what an SQE128 carries beyond its first 48 bytes

# opcode, flags, ioprio, fd, cmd_op, pad, addr, len, op flags, user_data, buf_index, personality, splice_fd
_SQE_HEAD = struct.Struct("=BBHiIIQIIQHHI")

ENOTSUPP = 524  # the kernel's own, leaked to user space by 6.8 and by 6.1 before .120

_IOC_WRITE = 1
_IOC_READ = 2


def _ioc(direction: int, nr: int, size: int) -> int:
    return direction << 30 | size << 16 | ord("u") << 8 | nr


# struct ublksrv_ctrl_cmd: dev_id, queue_id, len, addr, data, dev_path_len, pad, reserved
CTRL_CMD = struct.Struct("=IHHQQHHI")
# nr_hw_queues, queue_depth, state, io_desc_size, max_io_buf_bytes, dev_id, ublksrv_pid, pad1, flags, ublksrv_flags,
# owner_uid, owner_gid, reserved1, reserved2
DEV_INFO = struct.Struct("=HHHHIIiIQQIIQQ")
IO_CMD = struct.Struct("=HHiQ")  # q_id, tag, result, addr
IO_DESC = struct.Struct("=IIQQ")  # op_flags, nr_sectors, start_sector, addr
# len, types | basic: attrs, four shifts, max_sectors, chunk_sectors, dev_sectors, virt_boundary_mask
PARAMS_BASIC = struct.Struct("=II IBBBBIIQQ")
# discard: alignment, granularity, max_discard_sectors, max_write_zeroes_sectors, max_segments, reserved
PARAMS_DISCARD = struct.Struct("=IIIIHH")
PARAM_TYPE_BASIC = 1 << 0
PARAM_TYPE_DISCARD = 1 << 1
ATTR_VOLATILE_CACHE = 1 << 2


class Command(Enum):
    """Control commands: (number, direction of the ioctl encoding, whether the old plain number exists too)."""

    GET_QUEUE_AFFINITY = (0x01, _IOC_READ, True)
    GET_DEV_INFO = (0x02, _IOC_READ, True)
    ADD_DEV = (0x04, _IOC_READ | _IOC_WRITE, True)
    DEL_DEV = (0x05, _IOC_READ | _IOC_WRITE, True)
    START_DEV = (0x06, _IOC_READ | _IOC_WRITE, True)
    STOP_DEV = (0x07, _IOC_READ | _IOC_WRITE, True)
    SET_PARAMS = (0x08, _IOC_READ | _IOC_WRITE, True)
    GET_PARAMS = (0x09, _IOC_READ, True)
    START_USER_RECOVERY = (0x10, _IOC_READ | _IOC_WRITE, True)
    END_USER_RECOVERY = (0x11, _IOC_READ | _IOC_WRITE, True)
    GET_DEV_INFO2 = (0x12, _IOC_READ, True)
    GET_FEATURES = (0x13, _IOC_READ, False)  # 6.5
    DEL_DEV_ASYNC = (0x14, _IOC_READ, False)  # 6.9; the header really says _IOR
    UPDATE_SIZE = (0x15, _IOC_READ | _IOC_WRITE, False)  # 6.16
    QUIESCE_DEV = (0x16, _IOC_READ | _IOC_WRITE, False)  # 6.16
    TRY_STOP_DEV = (0x17, _IOC_READ | _IOC_WRITE, False)  # 7.0

    @property
    def nr(self) -> int:
        """The plain number: all that 6.0 to 6.3 know, and refused where CONFIG_BLKDEV_UBLK_LEGACY_OPCODES is off."""
        return self.value[0]

    @property
    def encoded(self) -> int:
        """The ioctl-encoded number, understood since 6.4."""
        nr, direction, _ = self.value
        return _ioc(direction, nr, CTRL_CMD.size)

    @property
    def has_legacy(self) -> bool:
        """Whether a kernel may know the command by its plain number."""
        return self.value[2]


class IoCommand(Enum):
    """What a server says on /dev/ublkcN: (number, ioctl direction)."""

    FETCH_REQ = (0x20, _IOC_READ | _IOC_WRITE)
    COMMIT_AND_FETCH_REQ = (0x21, _IOC_READ | _IOC_WRITE)
    NEED_GET_DATA = (0x22, _IOC_READ | _IOC_WRITE)

    @property
    def encoded(self) -> int:
        """The ioctl-encoded number."""
        nr, direction = self.value
        return _ioc(direction, nr, IO_CMD.size)


@dataclass(frozen=True, slots=True)
class CtrlCmd:
    """struct ublksrv_ctrl_cmd. `addr`, `length`: its buffer; `path_length`: of the node's path in front of that."""

    dev_id: int
    queue_id: int = NO_QUEUE
    length: int = 0
    addr: int = 0
    data: int = 0
    path_length: int = 0

    def pack(self) -> bytes:
        """The 32 bytes that go into the submission entry's command area."""
        return CTRL_CMD.pack(
            self.dev_id, self.queue_id, self.length, self.addr, self.data & (1 << 64) - 1, self.path_length, 0, 0
        )


def pack_dev_info(info: DevInfo) -> bytes:
    """The 64 bytes of ADD_DEV's argument."""
    return DEV_INFO.pack(
        info.queues,
        info.queue_depth,
        info.state,
        0,
        info.max_io_bytes,
        info.dev_id & 0xFFFF_FFFF,
        info.server_pid,
        0,
        info.flags,
        0,
        info.owner_uid,
        info.owner_gid,
        0,
        0,
    )


def unpack_dev_info(raw: bytes | bytearray | memoryview) -> DevInfo:
    """What GET_DEV_INFO wrote."""
    queues, depth, state, _, max_io, dev_id, pid, _, flags, _, uid, gid, _, _ = DEV_INFO.unpack_from(raw)
    return DevInfo(dev_id, state, pid, flags, queues, depth, max_io, uid, gid)


def pack_sqe(
    opcode: int, fd: int, user_data: int, *, cmd_op: int = 0, addr: int = 0, op_flags: int = 0, command: bytes = b""
) -> bytes:
    """One 128-byte submission entry. For IORING_OP_URING_CMD `cmd_op` and up to 80 bytes of `command` count."""
    if len(command) > COMMAND_SIZE:
        raise ValueError(f"a submission entry carries {COMMAND_SIZE} bytes of a command, not {len(command)}")
    head = _SQE_HEAD.pack(opcode, 0, 0, fd, cmd_op, 0, addr, 0, op_flags, user_data, 0, 0, 0)
    return head + command.ljust(COMMAND_SIZE, b"\0")


_ERRORS: dict[int, type[CommandError]] = {
    errno.ENODEV: NoSuchDeviceError,
    errno.EBUSY: BusyError,
    errno.EEXIST: DeviceExistsError,
    errno.EOPNOTSUPP: UnsupportedError,
    ENOTSUPP: UnsupportedError,
    errno.EPERM: NotPermittedError,
    errno.EACCES: NotPermittedError,
    errno.EINTR: InterruptedCommandError,
}

_GENERAL = {
    errno.ENODEV: "no such device",
    errno.EOPNOTSUPP: "this kernel does not know the command",
    ENOTSUPP: "this kernel does not know the command",
    errno.EPERM: "not permitted: it takes CAP_SYS_ADMIN in the first user namespace",
    errno.EACCES: "not permitted on this device's node",
    errno.EINTR: "interrupted",
    errno.ECANCELED: "cancelled before it began",
    errno.EINVAL: "the kernel calls the request invalid (an unprivileged device wants its node's path)",
}

_SPECIAL = {
    (Command.ADD_DEV, errno.EEXIST): "the id is taken, perhaps by a deleted device that somebody still holds",
    (Command.ADD_DEV, errno.EACCES): "ublks_max is reached; orphans count until they are deleted",
    (Command.START_DEV, errno.EEXIST): "it is LIVE, or was started once already",
    (Command.START_DEV, errno.EBUSY): "it is being stopped",
    (Command.START_DEV, errno.EINVAL): "no parameters set, or not asked by the process that opened its char device",
    # Up to 6.14 also for a device that never started, and for the second call in a row.
    (Command.START_USER_RECOVERY, errno.EINVAL): "the device is not recoverable, or none of its queues was ever served",
    (Command.START_USER_RECOVERY, errno.EBUSY): "it is not QUIESCED or FAIL_IO, or its char device is open",
    (Command.TRY_STOP_DEV, errno.EBUSY): "its disk is in use",
    (Command.TRY_STOP_DEV, errno.ENODEV): "no such device, or it has no disk",
    (Command.DEL_DEV, errno.EINTR): "deleted, but the wait for its last holder was cancelled",
    (Command.DEL_DEV_ASYNC, errno.EINVAL): "an unprivileged device cannot be deleted asynchronously",
    (Command.QUIESCE_DEV, errno.EOPNOTSUPP): "the device was added without UBLK_F_QUIESCE",
    (Command.SET_PARAMS, errno.EACCES): "parameters cannot change once the device is started",
}


def error_of(command: Command, dev_id: int | None, result: int) -> CommandError:
    """The error that a negative completion of a command means (ublk_ctrl_uring_cmd, 6.1 to 7.3)."""
    number = -result
    meaning = _SPECIAL.get((command, number)) or _GENERAL.get(number) or os.strerror(number)
    return _ERRORS.get(number, CommandError)(command.name, dev_id, number, meaning)
