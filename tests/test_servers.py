"""Processes as they are: real children of this test, and the kernel's texts about hostile ones."""

from __future__ import annotations

import asyncio
import errno
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duende_ublkd.core.model import Condition
from duende_ublkd.core.text import printable
from duende_ublkd.kernel import servers
from duende_ublkd.kernel.binding import WaitingRing
from duende_ublkd.kernel.servers import DeathWatch, condition_of, has_ring, inspect, is_alive, start_time_of, unit_of

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 10.0  # seconds for what takes a millisecond, on the slowest of test machines
SYS_EXIT = 60 if platform.machine() == "x86_64" else 93  # ends the calling thread only
LEADER_EXITS = f"""
import ctypes, os, sys, threading
def serve():
    while b") Z " not in open("/proc/self/stat", "rb").read():
        os.sched_yield()
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=serve).start()
ctypes.CDLL(None).syscall({SYS_EXIT}, 0)
"""


@contextmanager
def a_child(*command: str, keeps: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A child that has answered: one that only runs may still have this process's name. `cat` unless told otherwise."""
    keep = () if keeps is None else (keeps,)
    pipe = subprocess.PIPE
    with subprocess.Popen(command or ("cat",), stdin=pipe, stdout=pipe, pass_fds=keep) as child:
        assert child.stdin
        assert child.stdout
        try:
            child.stdin.write(b"ready\n")
            child.stdin.flush()
            assert child.stdout.readline() == b"ready\n"
            yield child
        finally:
            child.kill()


@contextmanager
def a_zombie() -> Iterator[int]:
    with a_child() as child:
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        yield child.pid


def a_dead_pid() -> int:
    with a_child() as child:
        child.kill()
    return child.pid


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# --- printable -------------------------------------------------------------------------------------------------------


@given(st.text() | st.binary(), st.integers(1, 300))
def test_whatever_a_name_holds_one_bounded_printable_line_is_shown(text: str | bytes, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit


@given(st.text(st.characters(categories=["L", "N", "P"]), max_size=50))
def test_an_honest_name_is_shown_as_it_is(text: str) -> None:
    assert printable(text) == text
    assert printable(text.encode()) == text


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("a\nb", "a\\nb"),
        ("\x1b[2J", "\\x1b[2J"),
        (b"\xff\xfe", "\\xff\\xfe"),
        (os.fsdecode(b"\xe4.img"), "\\xe4.img"),
        ("invoice\u202egpj.exe", "invoice\\u202egpj.exe"),
        ("dev-disk-by\\x2dlabel.swap", "dev-disk-by\\x2dlabel.swap"),
        ("x" * 300, "x" * 199 + "…"),
        ("\n" * 200, "\\n" * 99 + "…"),
    ],
)
def test_control_characters_bad_bytes_and_bidi_overrides_are_escaped(hostile: str | bytes, shown: str) -> None:
    assert printable(hostile) == shown


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_a_number_that_names_no_process_has_no_server() -> None:
    assert inspect(-1) is None
    assert inspect(0) is None


def test_a_living_child_is_seen_with_its_name_and_program() -> None:
    with a_child() as child:
        seen = inspect(child.pid)
        assert seen is not None
        assert (seen.pid, seen.alive, seen.comm) == (child.pid, True, "cat")
        assert seen.exe.startswith("/")
        assert seen.start_time > 0


def test_one_that_has_gone_is_not_alive_and_nameless() -> None:
    pid = a_dead_pid()
    seen = inspect(pid)
    assert seen is not None
    assert (seen.alive, seen.comm, seen.exe, seen.start_time) == (False, "", "", 0)


def test_a_number_beyond_all_pids_is_not_alive() -> None:
    assert is_alive(2**31 - 1) is False
    assert is_alive(2**40) is False


def test_a_zombie_is_not_alive_and_still_has_its_name() -> None:
    with a_zombie() as pid:
        seen = inspect(pid)
        assert seen is not None
        assert (seen.alive, seen.comm) == (False, "cat")


def test_a_server_whose_leader_has_exited_lives_as_long_as_its_threads() -> None:
    with a_child(sys.executable, "-c", LEADER_EXITS) as child:
        seen = inspect(child.pid)
        assert seen is not None
        assert seen.alive is True


def the_condition(pid: int) -> str:
    seen = inspect(pid)
    assert seen is not None
    return seen.condition


def wait_for_condition(pid: int, condition: Condition) -> None:
    until = time.monotonic() + PATIENCE
    while the_condition(pid) != condition.value:
        assert time.monotonic() < until, the_condition(pid)


def test_a_process_that_is_stopped_is_seen_to_be_and_is_well_again_when_it_goes_on() -> None:
    with a_child() as child:
        assert the_condition(child.pid) == Condition.WELL.value
        child.send_signal(signal.SIGSTOP)
        wait_for_condition(child.pid, Condition.STOPPED)
        child.send_signal(signal.SIGCONT)
        wait_for_condition(child.pid, Condition.WELL)


def test_neither_a_zombie_nor_a_server_whose_leader_has_exited_is_dying() -> None:
    with a_zombie() as pid:
        assert the_condition(pid) == Condition.WELL.value
    with a_child(sys.executable, "-c", LEADER_EXITS) as child:
        seen = inspect(child.pid)
        assert seen is not None
        assert (seen.condition, seen.may_serve) == (Condition.WELL.value, True)


def a_stat(state: bytes, *, flags: int = 0x400040, exit_code: int = 0, comm: bytes = b"ublk.loop") -> bytes:
    """52 fields, as /proc/PID/stat has them."""
    middle = b"0 " * 12 + b"4242 " + b"0 " * 29
    return b"812 (%s) %s 1 812 812 0 -1 %d %s%d\n" % (comm, state, flags, middle, exit_code)


@pytest.mark.parametrize(
    ("stat", "condition"),
    [
        (a_stat(b"S"), Condition.WELL),
        (a_stat(b"R"), Condition.WELL),
        (a_stat(b"D"), Condition.WELL),
        (a_stat(b"T", exit_code=19), Condition.STOPPED),
        (a_stat(b"t", exit_code=5), Condition.STOPPED),
        (a_stat(b"D", exit_code=9), Condition.DYING),  # killed, and waits in do_exit() for its io_uring
        (a_stat(b"S", exit_code=9), Condition.DYING),
        (a_stat(b"D", exit_code=256), Condition.DYING),  # exit_group(1)
        (a_stat(b"D", flags=0x400044), Condition.DYING),  # PF_EXITING, its exit code not to be told
        (a_stat(b"Z", flags=0x40004C, exit_code=0), Condition.WELL),
        (a_stat(b"S", comm=b"x) D 1 1 1 1 4"), Condition.WELL),
        (a_stat(b"S", comm=b"x) T"), Condition.WELL),
        (a_stat(b"D", exit_code=9)[:-3], Condition.WELL),  # a kernel that tells less
        (b"", Condition.WELL),
    ],
)
def test_the_condition_is_what_state_flags_and_exit_code_say_together(stat: bytes, condition: Condition) -> None:
    assert condition_of(stat) is condition


def test_the_stat_of_these_tests_is_like_that_of_the_kernel() -> None:
    real = Path("/proc/self/stat").read_bytes()
    assert len(a_stat(b"S").split()) == len(real.split(b") ")[-1].split()) + 2
    assert start_time_of(a_stat(b"S")) == 4242
    assert condition_of(real) is Condition.WELL


# --- a ring ----------------------------------------------------------------------------------------------------------

HAS_RING = """
import sys
from duende_ublkd.kernel.binding import WaitingRing
ring = WaitingRing()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def may_have_rings() -> None:
    try:
        WaitingRing().close()
    except OSError as error:
        pytest.skip(f"no io_uring here: {error.strerror}")


@pytest.mark.usefixtures("may_have_rings")
def test_a_process_with_a_ring_is_told_from_one_without() -> None:
    with a_child(sys.executable, "-c", HAS_RING) as with_ring, a_child() as without:
        assert has_ring(f"/proc/{with_ring.pid}") is True
        assert has_ring(f"/proc/{without.pid}") is False


@pytest.mark.usefixtures("may_have_rings")
def test_a_ring_of_a_server_whose_leader_has_exited_is_seen_at_its_threads_alone() -> None:
    with a_child(sys.executable, "-c", HAS_RING.partition("print")[0] + LEADER_EXITS) as child:
        others = [task for task in Path(f"/proc/{child.pid}/task").iterdir() if task.name != str(child.pid)]
        assert [has_ring(task) for task in others] == [True]
        assert has_ring(f"/proc/{child.pid}") is None


def test_whether_it_has_a_ring_is_not_known_of_one_that_has_gone_or_has_too_much_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert has_ring(f"/proc/{a_dead_pid()}") is None
    with a_child() as child:
        monkeypatch.setattr(servers, "_MOST_DESCRIPTORS", 2)
        assert has_ring(f"/proc/{child.pid}") is None
    (tmp_path / "fd").mkdir()
    (tmp_path / "fd" / "3").touch()  # not a link: an error like any other
    assert has_ring(tmp_path) is None


def test_looking_at_processes_leaves_no_descriptor_behind() -> None:
    before = open_descriptors()
    for pid in (os.getpid(), a_dead_pid(), 1, 2, -1):
        inspect(pid)
        has_ring(f"/proc/{pid}")
    assert open_descriptors() == before


def test_a_hostile_name_reaches_nobody_unescaped(tmp_path: Path) -> None:
    process = tmp_path / "812"
    process.mkdir()
    (process / "comm").write_bytes(b"x) R 1\x1b\n\xff\n")
    (process / "stat").write_bytes(b"812 (x) R 1\x1b\n\xff) S 1 " + b"0 " * 17 + b"4242 0\n")
    (process / "exe").symlink_to("/tmp/a\nb (deleted)")
    seen = inspect(812, tmp_path)
    assert seen is not None
    assert (seen.comm, seen.exe, seen.unit) == ("x) R 1\\x1b\\n\\xff", "/tmp/a\\nb (deleted)", "")
    assert seen.start_time == 4242


@given(st.binary(max_size=15), st.integers(0, 2**63))
def test_no_name_can_forge_the_start_time(comm: bytes, start: int) -> None:
    stat = b"7 (%s) S 1 %s%d 9 9\n" % (comm, b"3 " * 17, start)
    assert start_time_of(stat) == start


@given(st.binary())
def test_no_text_of_a_process_makes_a_parser_fail(text: bytes) -> None:
    assert isinstance(unit_of(text), str)
    assert start_time_of(text) >= 0
    assert condition_of(text) in Condition


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        (b"0::/system.slice/ublk@3.service\n", "ublk@3.service"),
        (b"0::/system.slice/ublk.service/worker/7\n", "ublk.service"),
        (b"0::/user.slice/user-0.slice/session-4.scope\n", "session-4.scope"),
        (b"4:memory:/x.service\n1:name=systemd:/system.slice/a.service\n0::/\n", "a.service"),
        (b"1:name=systemd:/system.slice/a.service\n0::/system.slice/b.service\n", "b.service"),
        (b"0::/system.slice/gone.service (deleted)\n", "gone.service"),
        (b"0::/system.slice/with:colon.service\n", "with:colon.service"),
        (b"0::/system.slice/_cgroup.service\n", "cgroup.service"),
        (b"0::/../../other.slice/x\n", "other.slice"),
        (b"0::/init.scope\n", "init.scope"),
        (b"0::/\n", ""),
        (b"", ""),
    ],
)
def test_the_unit_is_the_last_part_that_systemd_named(cgroup: bytes, unit: str) -> None:
    assert unit_of(cgroup) == unit


# --- DeathWatch ------------------------------------------------------------------------------------------------------


async def settle() -> None:
    """Let everything that is due in the loop run."""
    for _ in range(3):
        await asyncio.sleep(0)


def test_the_death_of_a_watched_process_is_told_once() -> None:
    async def story() -> None:
        told: asyncio.Queue[int] = asyncio.Queue()
        before = open_descriptors()
        with a_child() as child:
            watch = DeathWatch(told.put_nowait)
            watch.watch(child.pid)
            watch.watch(child.pid)
            assert watch.watched == {child.pid}
            child.kill()
            assert await asyncio.wait_for(told.get(), PATIENCE) == child.pid
            watch.watch(child.pid)  # the kernel still shows the number: no reason to tell again
            await settle()
            assert told.empty()
            assert not watch.watched
        assert open_descriptors() == before

    asyncio.run(story())


def test_a_process_that_is_dead_already_is_told_once_though_it_is_watched_in_each_look() -> None:
    async def story(pid: int) -> None:
        told: list[int] = []
        watch = DeathWatch(told.append)
        for _ in range(3):
            watch.watch(pid)
            await settle()
        assert told == [pid]
        watch.keep_only([])
        watch.watch(pid)
        await settle()
        assert told == [pid, pid]

    asyncio.run(story(a_dead_pid()))
    with a_zombie() as pid:
        asyncio.run(story(pid))


def test_the_next_owner_of_a_number_is_watched_again() -> None:
    async def story() -> None:
        told: asyncio.Queue[int] = asyncio.Queue()
        with a_child() as child:
            answers = iter([None, child.pid])

            def open_pidfd(_: int) -> int:
                answer = next(answers)
                if answer is None:
                    raise ProcessLookupError
                return os.pidfd_open(answer)

            watch = DeathWatch(told.put_nowait, open_pidfd=open_pidfd)
            watch.watch(7)
            assert await asyncio.wait_for(told.get(), PATIENCE) == 7
            watch.watch(7)
            child.kill()
            assert await asyncio.wait_for(told.get(), PATIENCE) == 7

    asyncio.run(story())


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EPERM, errno.ENOSYS, errno.EINVAL])
def test_a_death_that_cannot_be_watched_is_a_counted_loss_and_no_failure(number: int) -> None:
    async def story() -> None:
        def open_pidfd(_: int) -> int:
            raise OSError(number, os.strerror(number))

        told: list[int] = []
        watch = DeathWatch(told.append, open_pidfd=open_pidfd)
        watch.watch(7)
        watch.watch(-1)
        await settle()
        assert (watch.lost, told, watch.watched) == (1, [], frozenset())

    asyncio.run(story())


def test_only_the_wanted_stay_watched_and_closing_leaves_nothing_open_and_nothing_due() -> None:
    async def story() -> None:
        told: list[int] = []
        before = open_descriptors()
        dead = a_dead_pid()
        with a_child() as one, a_child() as other:
            watch = DeathWatch(told.append)
            watch.watch(one.pid)
            watch.watch(other.pid)
            watch.keep_only([other.pid, dead])
            assert watch.watched == {other.pid}
            watch.watch(dead)
            watch.close()
            watch.watch(one.pid)
            one.kill()
            other.kill()
            await settle()
            assert told == []
            assert not watch.watched
        assert open_descriptors() == before

    asyncio.run(story())
