import base64
import io
import tarfile
from pathlib import Path

import pytest

from tests.lab import qemu


def results(path: Path, *, end: str = "end\n") -> Path:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = tarfile.TarInfo("./dmesg")
        member.size = 2
        archive.addfile(member, io.BytesIO(b"hi"))
    path.write_bytes(b"status 3\r\n" + base64.encodebytes(packed.getvalue()) + end.encode())
    return path


@pytest.mark.parametrize(
    "line",
    [
        "[    8.424035] Kernel panic - not syncing: sysrq triggered crash",
        "....[   12.000001] BUG: kernel NULL pointer dereference, address: 0000000000000018",
        "[   12.000001][  T170] Oops: Oops: 0000 [#1] PREEMPT SMP NOPTI",
        "[  300.000001] watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [python:170]",
    ],
)
def test_a_kernel_fault_is_recognised_whatever_stands_before_it(line: str) -> None:
    assert qemu.KERNEL_FAULT.search(line)


@pytest.mark.parametrize(
    "line",
    [
        "test_kernel.py::test_that BUG: is a word PASSED",
        "[    8.336878] reboot: Power down",
        "[  130.000001] INFO: task python:170 blocked for more than 120 seconds.",
    ],
)
def test_what_a_test_prints_is_no_kernel_fault(line: str) -> None:
    assert not qemu.KERNEL_FAULT.search(line)


def test_results_bring_the_exit_status_and_the_files(tmp_path: Path) -> None:
    assert qemu.read_results(results(tmp_path / "results")) == (3, {"dmesg": b"hi"})


@pytest.mark.parametrize("end", ["", "en"])
def test_results_that_break_off_are_no_results(tmp_path: Path, end: str) -> None:
    assert qemu.read_results(results(tmp_path / "results", end=end)) == (qemu.NO_RESULT, {})


def test_a_guest_with_a_kernel_fault_has_not_passed() -> None:
    assert not qemu.GuestResult(0, "", {}, 1, 1.0, ("Oops",)).passed
