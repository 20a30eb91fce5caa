"""The C compiler and the newest kernel's own headers are the oracle for abi.py: numbers, layouts, whole entries."""

import errno
import itertools
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from duende_ublkd.core import errors
from duende_ublkd.core.model import DevInfo, Feature, KernelState, feature_names
from duende_ublkd.kernel import abi
from duende_ublkd.kernel.abi import Command, CtrlCmd, IoCommand
from tests.lab import kernels

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")

HEADERS = """
#include <stdint.h>
#include <stddef.h>
#include <stdio.h>
#include <linux/ublk_cmd.h>
#include <linux/io_uring.h>
"""

# What each struct.Struct unpacks, in C's words.
LAYOUTS = {
    "ublksrv_ctrl_cmd": (
        abi.CTRL_CMD,
        ("dev_id", "queue_id", "len", "addr", "data", "dev_path_len", "pad", "reserved"),
    ),
    "ublksrv_ctrl_dev_info": (
        abi.DEV_INFO,
        (
            *("nr_hw_queues", "queue_depth", "state", "io_desc_size", "max_io_buf_bytes", "dev_id", "ublksrv_pid"),
            *("pad1", "flags", "ublksrv_flags", "owner_uid", "owner_gid", "reserved1", "reserved2"),
        ),
    ),
    "ublksrv_io_cmd": (abi.IO_CMD, ("q_id", "tag", "result", "addr")),
    "ublksrv_io_desc": (abi.IO_DESC, ("op_flags", "nr_sectors", "start_sector", "addr")),
    "ublk_param_discard": (
        abi.PARAMS_DISCARD,
        (
            *("discard_alignment", "discard_granularity", "max_discard_sectors", "max_write_zeroes_sectors"),
            *("max_discard_segments", "reserved0"),
        ),
    ),
    "ublk_params": (
        abi.PARAMS_BASIC,
        (
            *("len", "types", "basic.attrs", "basic.logical_bs_shift", "basic.physical_bs_shift"),
            *("basic.io_opt_shift", "basic.io_min_shift", "basic.max_sectors", "basic.chunk_sectors"),
            *("basic.dev_sectors", "basic.virt_boundary_mask"),
        ),
    ),
    "io_uring_sqe": (
        abi._SQE_HEAD,
        (
            *("opcode", "flags", "ioprio", "fd", "cmd_op", "__pad1", "addr", "len", "uring_cmd_flags", "user_data"),
            *("buf_index", "personality", "splice_fd_in"),
        ),
    ),
}
WHOLE = {"ublksrv_ctrl_cmd", "ublksrv_ctrl_dev_info", "ublksrv_io_cmd", "ublksrv_io_desc", "ublk_param_discard"}


def compiled(directory: Path, body: str) -> bytes:
    """What the C program with this body prints."""
    source = directory / "oracle.c"
    source.write_text(f"{HEADERS}int main(void) {{\n{body}\nreturn 0;\n}}\n")
    program = directory / "oracle"
    subprocess.run(["gcc", "-Wall", "-Werror", "-I", kernels.uapi_headers(), "-o", program, source], check=True)
    return subprocess.run([program], check=True, capture_output=True).stdout


def numbers(directory: Path, expressions: dict[str, str]) -> dict[str, int]:
    body = "".join(f'printf("%lld\\n", (long long)({expression}));\n' for expression in expressions.values())
    answers = compiled(directory, body).split()
    return dict(zip(expressions, map(int, answers), strict=True))


@needs_compiler
def test_every_control_command_has_the_headers_number(tmp_path: Path) -> None:
    said = numbers(tmp_path, {command.name: f"UBLK_U_CMD_{command.name}" for command in Command})
    assert said == {command.name: command.encoded for command in Command}


@needs_compiler
def test_the_commands_with_a_plain_number_are_exactly_the_headers(tmp_path: Path) -> None:
    header = (kernels.uapi_headers() / "linux/ublk_cmd.h").read_text()
    plain = set(re.findall(r"#define\s+UBLK_CMD_(\w+)", header))
    assert plain == {command.name for command in Command if command.has_legacy}
    said = numbers(tmp_path, {name: f"UBLK_CMD_{name}" for name in plain})
    assert said == {command.name: command.nr for command in Command if command.has_legacy}


@needs_compiler
def test_every_io_command_has_the_headers_number(tmp_path: Path) -> None:
    said = numbers(tmp_path, {command.name: f"UBLK_U_IO_{command.name}" for command in IoCommand})
    assert said == {command.name: command.encoded for command in IoCommand}


@needs_compiler
def test_the_feature_bits_are_the_headers_no_more_and_no_fewer(tmp_path: Path) -> None:
    header = (kernels.uapi_headers() / "linux/ublk_cmd.h").read_text()
    names = set(re.findall(r"#define\s+UBLK_F_(\w+)", header))
    assert names == {feature.name for feature in Feature}
    said = numbers(tmp_path, {name: f"UBLK_F_{name}" for name in names})
    assert said == {feature.name: feature.value for feature in Feature}


@needs_compiler
def test_the_device_states_are_the_headers_no_more_and_no_fewer(tmp_path: Path) -> None:
    header = (kernels.uapi_headers() / "linux/ublk_cmd.h").read_text()
    names = set(re.findall(r"#define\s+UBLK_S_DEV_(\w+)", header))
    said = numbers(tmp_path, {name: f"UBLK_S_DEV_{name}" for name in names})
    assert said == {name: getattr(KernelState, name) for name in names}
    assert [KernelState.name(number) for number in sorted(said.values())] == sorted(names, key=lambda name: said[name])


@needs_compiler
def test_the_other_constants_are_the_headers(tmp_path: Path) -> None:
    ours = {
        "IORING_OP_NOP": abi.IORING_OP_NOP,
        "IORING_OP_ASYNC_CANCEL": abi.IORING_OP_ASYNC_CANCEL,
        "IORING_OP_URING_CMD": abi.IORING_OP_URING_CMD,
        "IORING_SETUP_SQE128": abi.IORING_SETUP_SQE128,
        "IORING_OFF_SQES": abi.IORING_OFF_SQES,
        "UBLK_PARAM_TYPE_BASIC": abi.PARAM_TYPE_BASIC,
        "UBLK_PARAM_TYPE_DISCARD": abi.PARAM_TYPE_DISCARD,
        "UBLK_ATTR_VOLATILE_CACHE": abi.ATTR_VOLATILE_CACHE,
        "(__u32)-1": abi.ANY_DEV_ID,
        "(__u16)-1": abi.NO_QUEUE,
        "2 * sizeof(struct io_uring_sqe)": abi.SQE_SIZE,
        "2 * sizeof(struct io_uring_sqe) - offsetof(struct io_uring_sqe, cmd)": abi.COMMAND_SIZE,
    }
    assert numbers(tmp_path, {name: name for name in ours}) == ours


def offsets_and_sizes(layout: struct.Struct) -> list[tuple[int, int]]:
    """Where each field of a format without implicit padding lies."""
    codes = re.findall(r"[a-zA-Z]", layout.format)
    sizes = [struct.calcsize(f"={code}") for code in codes]
    return list(zip(itertools.accumulate(sizes, initial=0), sizes, strict=False))


@needs_compiler
def test_every_field_lies_where_the_compiler_puts_it(tmp_path: Path) -> None:
    fields = [(name, member) for name, (_, members) in LAYOUTS.items() for member in members]
    said = numbers(
        tmp_path,
        {f"{name}.{member}": f"offsetof(struct {name}, {member})" for name, member in fields}
        | {f"sizeof {name}.{member}": f"sizeof(((struct {name} *)0)->{member})" for name, member in fields}
        | {name: f"sizeof(struct {name})" for name in LAYOUTS},
    )
    for name, (layout, members) in LAYOUTS.items():
        theirs = [(said[f"{name}.{member}"], said[f"sizeof {name}.{member}"]) for member in members]
        assert offsets_and_sizes(layout) == theirs, name
        assert layout.size == said[name] or name not in WHOLE


@needs_compiler
def test_the_basic_parameters_end_where_the_discard_parameters_begin(tmp_path: Path) -> None:
    said = numbers(tmp_path, {"discard": "offsetof(struct ublk_params, discard)"})
    assert said == {"discard": abi.PARAMS_BASIC.size}


@needs_compiler
def test_a_command_entry_is_byte_for_byte_the_compilers(tmp_path: Path) -> None:
    entry = compiled(
        tmp_path,
        """
        static union { unsigned char raw[128]; struct io_uring_sqe sqe; } entry;
        struct ublksrv_ctrl_cmd *command = (void *)(entry.raw + offsetof(struct io_uring_sqe, cmd));
        entry.sqe.opcode = IORING_OP_URING_CMD;
        entry.sqe.fd = 17;
        entry.sqe.cmd_op = UBLK_U_CMD_GET_DEV_INFO2;
        entry.sqe.user_data = 0x1122334455667788;
        command->dev_id = 5;
        command->queue_id = -1;
        command->len = 77;
        command->addr = 0xaabbccddeeff0011;
        command->data[0] = -1;
        command->dev_path_len = 13;
        fwrite(&entry, sizeof entry, 1, stdout);
        """,
    )
    command = CtrlCmd(5, length=77, addr=0xAABBCCDDEEFF0011, data=-1, path_length=13).pack()
    ours = abi.pack_sqe(
        abi.IORING_OP_URING_CMD, 17, 0x1122334455667788, cmd_op=Command.GET_DEV_INFO2.encoded, command=command
    )
    assert ours == entry


@needs_compiler
def test_a_cancellation_entry_is_byte_for_byte_the_compilers(tmp_path: Path) -> None:
    entry = compiled(
        tmp_path,
        """
        static union { unsigned char raw[128]; struct io_uring_sqe sqe; } entry;
        entry.sqe.opcode = IORING_OP_ASYNC_CANCEL;
        entry.sqe.fd = -1;
        entry.sqe.addr = 0xfedcba9876543210;
        entry.sqe.cancel_flags = IORING_ASYNC_CANCEL_ANY;
        entry.sqe.user_data = 3;
        fwrite(&entry, sizeof entry, 1, stdout);
        """,
    )
    assert abi.pack_sqe(abi.IORING_OP_ASYNC_CANCEL, -1, 3, addr=0xFEDCBA9876543210, op_flags=4) == entry


def test_an_entry_is_never_longer_than_its_place() -> None:
    with pytest.raises(ValueError, match="80 bytes"):
        abi.pack_sqe(abi.IORING_OP_URING_CMD, 0, 1, command=bytes(81))


@needs_compiler
def test_a_device_record_means_in_c_what_it_means_here(tmp_path: Path) -> None:
    info = DevInfo(9, KernelState.QUIESCED, -1, Feature.USER_RECOVERY | Feature.QUIESCE, 4, 128, 1 << 19, 1000, 100)
    record = compiled(
        tmp_path,
        """
        static struct ublksrv_ctrl_dev_info info = {
            .dev_id = 9, .state = UBLK_S_DEV_QUIESCED, .ublksrv_pid = -1,
            .flags = UBLK_F_USER_RECOVERY | UBLK_F_QUIESCE, .nr_hw_queues = 4, .queue_depth = 128,
            .max_io_buf_bytes = 1 << 19, .owner_uid = 1000, .owner_gid = 100,
        };
        fwrite(&info, sizeof info, 1, stdout);
        """,
    )
    assert abi.pack_dev_info(info) == record
    assert abi.unpack_dev_info(record) == info


def test_adding_with_the_lowest_free_id_asks_for_minus_one() -> None:
    raw = abi.pack_dev_info(DevInfo(-1, 0, 0, 0, 1, 1))
    assert abi.unpack_dev_info(raw).dev_id == abi.ANY_DEV_ID


def test_a_bit_without_a_name_is_still_told() -> None:
    assert feature_names(Feature.USER_RECOVERY | 1 << 40) == ("USER_RECOVERY", "BIT_40")
    assert KernelState.name(7) == "STATE_7"


@pytest.mark.parametrize(
    ("command", "number", "kind", "sentence"),
    [
        (Command.GET_DEV_INFO, errno.ENODEV, errors.NoSuchDeviceError, "no such device"),
        (Command.TRY_STOP_DEV, errno.ENODEV, errors.NoSuchDeviceError, "no such device, or it has no disk"),
        (Command.ADD_DEV, errno.EEXIST, errors.DeviceExistsError, "the id is taken, perhaps by a deleted device that"),
        (Command.ADD_DEV, errno.EACCES, errors.NotPermittedError, "ublks_max is reached"),
        (Command.START_DEV, errno.EEXIST, errors.DeviceExistsError, "it is LIVE, or was started once already"),
        (Command.START_USER_RECOVERY, errno.EBUSY, errors.BusyError, "it is not QUIESCED or FAIL_IO"),
        (Command.TRY_STOP_DEV, errno.EBUSY, errors.BusyError, "its disk is in use"),
        (Command.STOP_DEV, errno.EOPNOTSUPP, errors.UnsupportedError, "this kernel does not know the command"),
        (Command.DEL_DEV_ASYNC, abi.ENOTSUPP, errors.UnsupportedError, "this kernel does not know the command"),
        (Command.QUIESCE_DEV, errno.EOPNOTSUPP, errors.UnsupportedError, "the device was added without UBLK_F_QUIESCE"),
        (Command.STOP_DEV, errno.EPERM, errors.NotPermittedError, "not permitted: it takes CAP_SYS_ADMIN"),
        (Command.GET_DEV_INFO2, errno.EACCES, errors.NotPermittedError, "not permitted on this device's node"),
        (Command.DEL_DEV, errno.EINTR, errors.InterruptedCommandError, "deleted, but the wait for its last holder"),
        (Command.DEL_DEV, errno.ECANCELED, errors.CommandError, "cancelled before it began"),
        (Command.STOP_DEV, errno.EINVAL, errors.CommandError, "the kernel calls the request invalid"),
        (Command.STOP_DEV, errno.EFAULT, errors.CommandError, os.strerror(errno.EFAULT)),
        (Command.STOP_DEV, 523, errors.CommandError, "Unknown error 523"),
    ],
)
def test_every_answer_of_the_kernel_has_a_class_and_a_sentence(
    command: Command, number: int, kind: type[errors.CommandError], sentence: str
) -> None:
    error = abi.error_of(command, 3, -number)
    assert type(error) is kind
    assert str(error).startswith(f"{command.name} on ublk3: {sentence}")
    assert (error.command, error.dev_id, error.errno) == (command.name, 3, number)
    assert error.exit_code == errors.ExitCode.LEFT_OVER


def test_an_answer_about_no_device_names_none() -> None:
    assert str(abi.error_of(Command.GET_FEATURES, None, -errno.EPERM)).startswith("GET_FEATURES: not permitted")
