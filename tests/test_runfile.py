"""What a restarted daemon has to know, in the run directory."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from duende_ublkd.core.errors import DuendeError, UsageError
from duende_ublkd.kernel import holdfile, runfile


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


def test_a_record_is_for_its_owner_alone_and_what_anybody_may_ask_for_can_be_read(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        runfile.save_record(str(tmp_path), 3, {"a": 1})
        runfile.replace(str(tmp_path), "holds.json", b"{}")
    finally:
        os.umask(before)
    modes = {name: (tmp_path / name).stat().st_mode & 0o7777 for name in ("devices", "devices/3.json", "holds.json")}
    assert modes == {"devices": 0o700, "devices/3.json": 0o600, "holds.json": 0o644}


def _replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.chmod(0o777), "can be written by others (mode 0777)"),
        (lambda path: path.chmod(0o1777), "can be written by others (mode 1777)"),
        (lambda path: path.chmod(0o770), "can be written by others (mode 0770)"),
        (lambda path: os.chown(path, 12345, -1), "belongs to uid 12345"),
        (_replace_by_link, "is a symbolic link"),
    ],
)
@pytest.mark.parametrize("which", ["", "devices"])
def test_a_directory_that_others_can_change_is_neither_read_nor_written(
    tmp_path: Path, spoil: Callable[[Path], object], why: str, which: str
) -> None:
    place = tmp_path / "run"
    place.mkdir(mode=0o755)
    runfile.save_record(str(place), 3, {"a": 1})
    runfile.check_directory(str(place))
    spoil(place / which)
    found, (doubt,) = runfile.load_records(str(place))
    assert found == {}
    assert why in doubt
    for record in ({"a": 2}, None):
        with pytest.raises(PermissionError) as refused:
            runfile.save_record(str(place), 3, record)
        assert why in str(refused.value)
    assert (place / "devices" / "3.json").read_text() == '{"a": 1}'
    if which:
        return
    with pytest.raises(PermissionError):
        runfile.replace(str(place), "x", b"x")
    with pytest.raises(UsageError) as not_started:
        runfile.check_directory(f"{place}/")
    assert why in str(not_started.value)
    assert str(place) in not_started.value.hint
    with pytest.raises(DuendeError) as unknown:
        holdfile.load(str(place), 0.0)
    assert why in str(unknown.value)
    assert unknown.value.hint == not_started.value.hint.replace(f"{place}/", f"{place}")


def test_a_run_directory_below_one_that_others_can_write_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "outer" / "run"
    place.mkdir(parents=True)
    place.parent.chmod(0o777)
    with pytest.raises(UsageError, match=r"outer can be written by others \(mode 0777\)"):
        runfile.check_directory(str(place))
    with pytest.raises(UsageError, match="cannot be used: No such file"):
        runfile.check_directory(str(tmp_path / "missing"))


def test_a_record_with_another_name_and_one_that_is_a_fifo_are_not_believed_and_not_waited_for(tmp_path: Path) -> None:
    for dev_id in (3, 4):
        runfile.save_record(str(tmp_path), dev_id, {"a": 1})
    place = tmp_path / "devices"
    (place / "linked").hardlink_to(place / "3.json")
    (place / "4.json").unlink()
    os.mkfifo(place / "4.json")
    found, doubts = runfile.load_records(str(tmp_path))
    assert found == {}
    assert "3.json has another name" in doubts[0]
    assert "4.json: [Errno 1] it is no regular file" in doubts[1]


def test_a_record_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    runfile.save_record(str(tmp_path), 3, {"a": 1})
    with pytest.raises(OSError, match="more than 65536 bytes"):
        runfile.save_record(str(tmp_path), 3, {"a": "x" * 70_000})
    assert runfile.load_records(str(tmp_path)) == ({3: {"a": 1}}, [])
