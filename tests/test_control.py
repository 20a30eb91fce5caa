"""What the control plane says where there is none; what it does where there is one is for the guest's tests."""

import errno
from pathlib import Path

import pytest

from duende_ublkd.core.errors import ExitCode, KernelUnavailableError
from duende_ublkd.kernel.control import kernel_version, open_control_device, why_no_control_device

CONTROL = "/dev/ublk-control"


@pytest.mark.parametrize(
    ("release", "version"),
    [
        ("6.12.107+deb13-amd64", (6, 12)),
        ("5.14.0-503.11.1.el9_5.x86_64", (5, 14)),
        ("6.8.0-32-generic", (6, 8)),
        ("7.3-rc1", (7, 3)),
        ("10.0.1", (10, 0)),
        ("a kernel of my own", ()),
    ],
)
def test_a_release_names_its_version(release: str, version: tuple[int, ...]) -> None:
    assert kernel_version(release) == version


@pytest.mark.parametrize(
    ("number", "release", "euid", "sentence", "hint"),
    [
        (errno.ENOENT, "6.12.1", 0, "the ublk driver is not loaded", "modprobe ublk_drv"),
        (errno.ENXIO, "6.12.1", 0, "the ublk driver is not loaded", "modprobe ublk_drv"),
        (errno.ENOENT, "5.10.0-30-amd64", 0, "kernel 5.10.0-30-amd64 is older than ublk", "6.0 or newer"),
        (errno.EACCES, "6.12.1", 1000, "may be opened by root only", "sudo"),
        (errno.EPERM, "6.12.1", 0, "may not be opened here", "DeviceAllow=/dev/ublk-control"),
        (errno.EMFILE, "6.12.1", 0, "Too many open files", "dmesg"),
    ],
)
def test_each_reason_has_a_sentence_and_a_next_step(
    number: int, release: str, euid: int, sentence: str, hint: str
) -> None:
    told, next_step = why_no_control_device(CONTROL, number, release, euid)
    assert CONTROL in told
    assert sentence in told
    assert hint in next_step


def test_a_missing_control_device_is_exit_code_3_and_means_that_there_are_no_devices(tmp_path: Path) -> None:
    with pytest.raises(KernelUnavailableError) as told:
        open_control_device(str(tmp_path / "ublk-control"))
    assert told.value.exit_code is ExitCode.NO_KERNEL
    assert told.value.no_driver
