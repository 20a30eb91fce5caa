"""What a restarted daemon has to know, in the run directory; and whether a former one is still there."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from duende_ublkd.core.errors import DuendeError, UsageError
from duende_ublkd.kernel import holdfile, runfile
from duende_ublkd.kernel.process import SoleDaemon
from tests.test_servers import LEADER_EXITS, a_child, a_stat


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


TAKE_THE_LOCK = "import sys; from duende_ublkd.kernel.process import SoleDaemon; lock = SoleDaemon(sys.argv[1])\n"
SAY_SO = "print('ready', flush=True); sys.stdin.read()"


def refusal(directory: Path, proc: Path | str = "/proc") -> DuendeError:
    with pytest.raises(DuendeError) as caught:
        SoleDaemon(str(directory), proc=str(proc))
    return caught.value


def test_a_daemon_that_lives_is_named_and_is_a_mistake_of_whoever_starts_another(tmp_path: Path) -> None:
    with a_child(sys.executable, "-c", TAKE_THE_LOCK + SAY_SO, str(tmp_path)) as child:
        error = refusal(tmp_path)
        assert (type(error), error.exit_code) == (UsageError, 2)
        assert str(error) == f"another duende-ublkd runs already, as pid {child.pid}"


def test_behind_a_killed_daemon_with_a_thread_that_cannot_end_another_start_is_worth_a_try(tmp_path: Path) -> None:
    with a_child(sys.executable, "-c", TAKE_THE_LOCK + LEADER_EXITS, str(tmp_path)) as child:
        error = refusal(tmp_path)
        assert error.exit_code == 1
        assert f"(pid {child.pid}) was killed and has not ended" in str(error)
        assert f"/proc/{child.pid}/task/*/stack" in error.hint
    SoleDaemon(str(tmp_path)).close()


@pytest.mark.parametrize(
    ("stat", "exit_code", "words"),
    [
        (a_stat(b"S"), 2, "another duende-ublkd runs"),
        (a_stat(b"D"), 2, "another duende-ublkd runs"),
        (a_stat(b"T", exit_code=19), 2, "another duende-ublkd runs"),
        (a_stat(b"D", exit_code=9), 1, "was killed and has not ended"),
        (a_stat(b"Z"), 1, "was killed and has not ended"),
        (a_stat(b"S", comm=b"x) Z 1 ("), 2, "another duende-ublkd runs"),
        (b"", 2, "another duende-ublkd runs"),
        (None, 1, "is gone, and its lock is still held"),
    ],
)
def test_what_became_of_whoever_has_the_lock_is_read_from_its_state(
    tmp_path: Path, stat: bytes | None, exit_code: int, words: str
) -> None:
    lock = SoleDaemon(str(tmp_path))
    if stat is not None:
        (tmp_path / str(os.getpid())).mkdir()
        (tmp_path / str(os.getpid()) / "stat").write_bytes(stat)
    error = refusal(tmp_path, tmp_path)
    lock.close()
    assert (error.exit_code, words in str(error)) == (exit_code, True), error


@pytest.mark.parametrize("text", ["", "-1\n", "812 \x1b"])
def test_a_lock_that_does_not_say_whose_it_is_is_somebodys(tmp_path: Path, text: str) -> None:
    lock = SoleDaemon(str(tmp_path))
    (tmp_path / "lock").write_text(text)
    error = refusal(tmp_path)
    lock.close()
    assert (error.exit_code, str(error)) == (2, "another duende-ublkd runs already, as pid ?")
