"""What a restarted daemon has to know, in the run directory."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from duende_ublkd.kernel import runfile


def test_what_was_saved_is_loaded_and_what_is_gone_is_not(tmp_path: Path) -> None:
    assert runfile.load_records(str(tmp_path)) == ({}, [])
    for dev_id in (3, 1048575):
        runfile.save_record(str(tmp_path), dev_id, {"a": dev_id})
    runfile.save_record(str(tmp_path), 3, {"a": 4})
    assert runfile.load_records(str(tmp_path)) == ({3: {"a": 4}, 1048575: {"a": 1048575}}, [])
    for _ in range(2):  # twice is once
        runfile.save_record(str(tmp_path), 3, None)
    assert runfile.load_records(str(tmp_path)) == ({1048575: {"a": 1048575}}, [])


def _symlink(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"a": '),
        lambda path: path.write_bytes(b"\xff"),
        lambda path: path.chmod(0o666),
        lambda path: os.chown(path, 12345, 0),
        _symlink,
        lambda path: path.write_text('{"a": "' + "x" * 70000 + '"}'),
        lambda path: path.write_text("[" * 60000),
    ],
)
def test_a_record_that_others_may_have_written_or_that_is_broken_is_not_believed_and_told(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    for dev_id in (3, 4):
        runfile.save_record(str(tmp_path), dev_id, {"a": 1})
    spoil(tmp_path / "devices" / "3.json")
    found, doubts = runfile.load_records(str(tmp_path))
    assert found == {4: {"a": 1}}
    assert len(doubts) == 1
    assert "3.json" in doubts[0]


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    runfile.save_record(str(tmp_path), 3, {"a": 1})
    for name in (".4.json", "4.json~", "x.json", "٣.json"):
        (tmp_path / "devices" / name).write_text('{"a": 2}')
    assert runfile.load_records(str(tmp_path)) == ({3: {"a": 1}}, [])
