"""Who sleeps in the kernel: a /proc made for the test, and that of the machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from duende_ublkd.kernel import stuck
from tests.test_servers import a_child, open_descriptors

if TYPE_CHECKING:
    from pathlib import Path

FREEZING = ("blk_mq_freeze_queue_wait", "del_gendisk", "ublk_stop_dev.part.0", "ublk_ctrl_uring_cmd", "io_uring_cmd")


def a_thread(
    proc: Path, pid: int, *frames: str, tid: int | None = None, state: str = "D", comm: bytes = b"iou-wrk-412"
) -> Path:
    """`frames`: its kernel stack, innermost first."""
    path = proc / str(pid) / "task" / str(tid or pid)
    path.mkdir(parents=True)
    (path / "stat").write_bytes(b"%d (%s) %s 1 %s\n" % (tid or pid, comm, state.encode(), b"0 " * 48))
    (path / "stack").write_text("".join(f"[<0>] {frame}+0x5d/0x90 [ublk_drv]\n" for frame in frames))
    return path


def test_a_thread_that_sleeps_in_the_driver_is_told_by_its_innermost_functions_and_the_one_that_led_there(
    tmp_path: Path,
) -> None:
    a_thread(tmp_path, 412, "ep_poll", state="S", comm=b"ublk.loop")
    (tmp_path / "412" / "task" / "419").mkdir()
    a_thread(tmp_path, 413, *FREEZING)
    assert stuck.look(tmp_path) == (
        "iou-wrk-412 (pid 413) in blk_mq_freeze_queue_wait, del_gendisk, ublk_stop_dev.part.0, ublk_ctrl_uring_cmd",
    )


def test_every_thread_of_a_process_is_looked_at_and_named_by_its_process(tmp_path: Path) -> None:
    a_thread(tmp_path, 412, "ep_poll", state="S")
    a_thread(tmp_path, 412, "__mutex_lock", "ublk_ctrl_add_dev", tid=413, comm=b"worker")
    assert stuck.look(tmp_path) == ("worker (pid 412) in __mutex_lock, ublk_ctrl_add_dev",)


@pytest.mark.parametrize(
    ("state", "frames", "is_told"),
    [
        ("D", ("io_schedule", "bdev_open", "blkdev_open"), True),
        ("D", ("folio_wait_bit_common", "read_part_sector", "bdev_disk_changed"), True),
        ("D", ("rwsem_down_write_slowpath", "ext4_sync_file"), False),  # somebody else's trouble
        ("D", ("io_schedule", "my_ublk_lookalike"), False),
        ("S", FREEZING, False),
        ("R", FREEZING, False),
        ("T", FREEZING, False),
        ("D", (), False),  # a stack that may not be read is empty
    ],
)
def test_only_who_sleeps_uninterruptibly_about_ublk_or_a_disk_is_told(
    tmp_path: Path, state: str, frames: tuple[str, ...], *, is_told: bool
) -> None:
    a_thread(tmp_path, 412, *frames, state=state)
    assert bool(stuck.look(tmp_path)) == is_told


def test_no_more_than_a_few_are_told_and_the_rest_is_not_even_looked_at(tmp_path: Path) -> None:
    for pid in range(400, 400 + 3 * stuck.MOST_TOLD):
        a_thread(tmp_path, pid, *FREEZING)
    looked_at: list[str] = []
    told = stuck.look(tmp_path, looked_at.append)
    assert len(told) == len(looked_at) == stuck.MOST_TOLD
    assert "(pid 400)" in told[0]  # lowest first


def test_whoever_is_told_what_is_looked_at_may_end_the_look(tmp_path: Path) -> None:
    for pid in (412, 413):
        a_thread(tmp_path, pid, *FREEZING)

    def note(what: str) -> None:
        if what == "pid 413":
            raise TimeoutError(what)

    before = open_descriptors()
    with pytest.raises(TimeoutError):
        stuck.look(tmp_path, note)
    assert open_descriptors() == before


def test_names_cannot_forge_a_state_and_are_made_printable(tmp_path: Path) -> None:
    a_thread(tmp_path, 412, *FREEZING, state="S", comm=b"x) D 1")
    a_thread(tmp_path, 413, "__mutex_lock", "ublk_ctrl_del_dev", comm=b"a\n\x1b[2J) S")
    assert stuck.look(tmp_path) == ("a\\n\\x1b[2J) S (pid 413) in __mutex_lock, ublk_ctrl_del_dev",)


def test_what_is_gone_or_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "400").mkdir()
    (tmp_path / "401" / "task" / "401").mkdir(parents=True)
    (tmp_path / "self").symlink_to("413")
    (tmp_path / "uptime").touch()
    (a_thread(tmp_path, 402, *FREEZING) / "stack").unlink()
    directory = a_thread(tmp_path, 403, *FREEZING) / "stack"
    directory.unlink()
    directory.mkdir()
    a_thread(tmp_path, 413, "__mutex_lock", "ublk_ctrl_del_dev")
    assert len(stuck.look(tmp_path)) == 1
    assert stuck.look(tmp_path / "nowhere") == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="reads kernel stacks")
def test_the_machines_own_threads_are_looked_at_all_of_them_and_nothing_is_left_open() -> None:
    looked_at: list[str] = []
    before = open_descriptors()
    with a_child() as child:
        told = stuck.look(note=looked_at.append)
    assert open_descriptors() == before
    if len(told) < stuck.MOST_TOLD:
        assert {f"pid {os.getpid()}", f"pid {child.pid}"} <= set(looked_at)
