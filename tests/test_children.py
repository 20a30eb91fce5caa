"""The nursery, its supervisors and its hands, as real processes on the host.

What needs a driver is in tests/guest. A file named /dev/ublkc990 stands for another device's char device: whoever has it
open is taken for its server. A node /dev/ublkb990 of a loop device's number stands for a disk, and /dev/null, which takes
any command and answers 0, for the control device.
"""

import ast
import asyncio
import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from duende_ublkd.core.errors import (
    BusyError,
    CommandError,
    CommandOverdueError,
    DuendeError,
    KernelUnavailableError,
    UsageError,
)
from duende_ublkd.core.model import OPENING, Process
from duende_ublkd.kernel import abi, binding, children, nursery
from duende_ublkd.kernel.children import (
    Children,
    Command,
    CommandOrder,
    Credentials,
    Ended,
    StillRunningError,
    resolve_user,
)
from duende_ublkd.kernel.servers import start_time_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="changes users, makes device nodes")

MEMORY_DEVICES = 1  # the major number of /dev/null (3) and /dev/urandom (9)
URANDOM = 9
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C"}
DEV_ID = 990
NOBODY = 65534
LOOP0 = (7, 0)
NULL_COMMAND = 0x7500
SIGNALS_OF_LIBC = 3 << 31  # signals 32 and 33: its posix_spawn() leaves them ignored, and they are nobody's to change


def an_order(*argv: str, timeout: float = 60.0, **changes: object) -> CommandOrder:
    fields: dict[str, Any] = {"dev_id": 1, "argv": argv, "environment": ENVIRONMENT, "timeout": timeout, **changes}
    return CommandOrder(**fields)


def a_script(text: str, *, dev_id: int = 1) -> CommandOrder:
    return an_order("sh", "-c", text, dev_id=dev_id)


def with_children(body: Callable[[Children], Coroutine[Any, Any, None]], **options: Any) -> None:  # noqa: ANN401 - those of Children
    """Run `body`; an error that only the loop saw is an error of the test."""

    async def run() -> None:
        unhandled: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(str(context)))
        subject = Children(**options)
        try:
            await body(subject)
        finally:
            subject.close()
        assert unhandled == []

    asyncio.run(run())


async def until(condition: Callable[[], object], deadline: float = 10.0) -> None:
    async with asyncio.timeout(deadline):
        while not condition():
            await asyncio.sleep(0.005)


async def end_of(subject: Children, order: CommandOrder) -> Ended:
    """How it ended, with nothing of it left."""
    command = subject.run(order)
    await command.started()
    async with asyncio.timeout(20):
        ended = await command.ended()
    assert await subject.former_is_over(order.dev_id, 20)
    return ended


def status_of(pid: int | str, name: str) -> str:
    """A line of /proc/PID/status; empty: the process has gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{name}:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def is_alive(pid: int) -> bool:
    return status_of(pid, "State")[:1] not in ("", "Z", "X")


def parent_of(pid: int) -> int:
    return int(status_of(pid, "PPid"))


def living_children(pid: int) -> set[int]:
    found = {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    return {each for each in found if is_alive(each) and status_of(each, "PPid") == str(pid)}


def those_with(marker: str) -> set[int]:
    """The living processes that have this among their arguments."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and marker.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.add(int(entry.name))
    return {pid for pid in found if is_alive(pid)}


async def spares_of(subject: Children, *, other_than: frozenset[int] = frozenset()) -> frozenset[int]:
    """Its spares, when all are there and wait."""
    subject.start()
    found: frozenset[int] = frozenset()

    def waiting() -> bool:
        nonlocal found
        assert subject.nursery_pid
        every = living_children(subject.nursery_pid)
        found = frozenset(pid for pid in every if status_of(pid, "Name") == "ublkd-spare")
        return len(found - other_than) == children.SPARES and all(is_waiting(pid) for pid in found)

    await until(waiting)
    return found


def is_waiting(pid: int) -> bool:
    return status_of(pid, "State").startswith("S")


@pytest.fixture
def marker() -> Iterator[str]:
    """Seconds for sleep(1) that no other process has; whatever still sleeps them is killed after the test."""
    text = f"{800 + time.time_ns() % 100_000_000 / 1e8:.8f}"
    yield text
    for pid in those_with(text):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def char_device() -> Iterator[Path]:
    path = Path(f"/dev/ublkc{DEV_ID}")
    path.touch(exist_ok=False)
    yield path
    path.unlink()


@pytest.fixture
def disk() -> Iterator[Path]:
    path = Path(f"/dev/ublkb{DEV_ID}")
    try:
        os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(*LOOP0))
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL))
    except OSError as error:
        path.unlink(missing_ok=True)
        pytest.skip(f"no loop device that is free: {error.strerror}")
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def obedient_control(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abi, "CONTROL_DEVICE", "/dev/null")


# --- a command runs --------------------------------------------------------------------------------------------------


def test_a_command_tells_its_status_and_its_output() -> None:
    async def body(subject: Children) -> None:
        assert await end_of(subject, a_script("echo out; echo err >&2; exit 3")) == Ended(3, "out\nerr", 8)
        assert await end_of(subject, an_order("true")) == Ended(0, "", 0)
        assert await end_of(subject, a_script("kill -9 $$")) == Ended(-9, "", 0)

    with_children(body)


def test_output_is_made_printable_and_its_last_lines_are_shown() -> None:
    async def body(subject: Children) -> None:
        ended = await end_of(subject, a_script(r"seq 30; printf 'a\033[2Jb\n\377\n'"))
        lines = ended.output.split("\n")
        assert lines[:2] == ["13", "14"]
        assert lines[-2:] == [r"a\x1b[2Jb", "\N{REPLACEMENT CHARACTER}"]
        assert len(lines) == children.MOST_LINES

    with_children(body)


@pytest.mark.parametrize(
    ("argv", "what", "hint"),
    [
        (("no-such-command-990",), "no-such-command-990 cannot be run: No such file", "full path"),
        (("/etc/passwd",), "/etc/passwd cannot be run: Permission denied", "chmod"),
        (("/",), "/ cannot be run: Permission denied", "chmod"),
        (("/etc/passwd/x",), "Not a directory", "by hand"),
    ],
)
def test_a_command_that_cannot_be_run_is_named_with_what_to_do(argv: tuple[str, ...], what: str, hint: str) -> None:
    async def body(subject: Children) -> None:
        command = subject.run(an_order(*argv))
        with pytest.raises(DuendeError, match=what) as caught:
            await command.started()
        assert hint in caught.value.hint
        ended = await command.ended()
        assert ended.status is None
        assert what in ended.trouble
        assert await command.end() == ""

    with_children(body)


def test_a_script_without_an_interpreter_line_is_explained(tmp_path: Path) -> None:
    script = tmp_path / "recover"
    script.write_text("echo hello\n")
    script.chmod(0o755)

    async def body(subject: Children) -> None:
        with pytest.raises(DuendeError, match="Exec format error") as caught:
            await subject.run(an_order(str(script))).started()
        assert "#!/bin/sh" in caught.value.hint

    with_children(body)


def test_a_command_longer_than_an_order_is_refused() -> None:
    async def body(subject: Children) -> None:
        with pytest.raises(UsageError, match="64 KiB"):
            subject.run(an_order("echo", "x" * (64 << 10)))
        assert await end_of(subject, an_order("true")) == Ended(0, "", 0)

    with_children(body)


def test_a_command_has_a_clean_descriptor_table_and_only_the_environment_given() -> None:
    async def body(subject: Children) -> None:
        with Path("/etc/passwd").open("rb") as leaked:
            os.set_inheritable(leaked.fileno(), True)
            listed = await end_of(subject, an_order("ls", "/proc/self/fd"))
        assert listed.output.split() == ["0", "1", "2", "3"]  # the last is the listing itself
        links = await end_of(subject, an_order("readlink", *(f"/proc/self/fd/{fd}" for fd in range(3))))
        stdin, stdout, stderr = links.output.split()
        assert stdin == "/dev/null"
        assert stdout == stderr
        assert stdout.startswith("pipe:")
        environment = await end_of(subject, an_order("env", environment={"PATH": "/usr/bin:/bin", "A": "b c\udcff"}))
        assert environment.output.split("\n") == ["PATH=/usr/bin:/bin", "A=b c\N{REPLACEMENT CHARACTER}"]

    with_children(body)


def test_a_command_starts_as_from_a_login_with_default_signals_in_a_session_of_its_own_and_with_nothing_locked() -> (
    None
):
    async def body(subject: Children) -> None:
        told = await end_of(
            subject, an_order("sed", "-n", "-E", "/^(Sig(Blk|Ign|Cgt)|VmLck|Umask)/p", "/proc/self/status")
        )
        umask, locked, *masks = (line.split()[1] for line in told.output.split("\n"))
        assert (umask, locked) == ("0022", "0")
        assert [int(mask, 16) & ~SIGNALS_OF_LIBC for mask in masks] == [0, 0, 0]
        command = subject.run(an_order("cat", "/proc/self/stat"))
        pid, _, _, _, group, session = (await command.ended()).output.split()[:6]
        assert await subject.former_is_over(1, 5)
        assert pid == group == session == str(command.pid)
        assert (await end_of(subject, an_order("readlink", "/proc/self/cwd"))).output == "/"

    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        with_children(body, lock_memory=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        signal.signal(signal.SIGUSR2, before)


def test_a_command_runs_as_another_user_with_that_ones_groups() -> None:
    async def body(subject: Children) -> None:
        user = Credentials(NOBODY, NOBODY, (12, NOBODY))
        told = await end_of(subject, an_order("grep", "-E", "^(Uid|Gid|Groups|CapEff)", "/proc/self/status", user=user))
        assert [line.split()[1:] for line in told.output.split("\n")] == [
            [str(NOBODY)] * 4,
            [str(NOBODY)] * 4,
            ["12", str(NOBODY)],
            ["0" * 16],
        ]

    with_children(body)


def test_a_user_is_found_by_name_and_by_number() -> None:
    assert resolve_user("root").uid == 0
    assert resolve_user("0") == resolve_user("root")
    for wrong in ("no-such-user-990", "4000000000", "", "\0", "9" * 30):
        with pytest.raises(UsageError, match="there is no user") as caught:
            resolve_user(wrong)
        assert "getent passwd" in caught.value.hint


def test_a_hundred_megabytes_of_output_cost_four_kibibytes() -> None:
    async def body(subject: Children) -> None:
        began = time.monotonic()
        command = subject.run(a_script("head -c 100000000 /dev/zero | tr '\\0' x; echo; echo done; sleep 1"))
        await command.started()
        assert command.pid
        supervisor = parent_of(command.pid)
        before = int(status_of(supervisor, "VmHWM").split()[0])
        async with asyncio.timeout(30):
            await until(lambda: those_with("100000000"))
            await until(lambda: not those_with("100000000"), 30)
            grown = int(status_of(supervisor, "VmHWM").split()[0]) - before
            ended = await command.ended()
        assert ended.status == 0
        assert ended.output_bytes == 100_000_006
        assert ended.output.endswith("…\ndone")
        assert grown < 1024
        assert time.monotonic() - began < 20

    with_children(body)


A_LAST_WORD = """
import fcntl, os, sys, time
fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 1 << 20)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
os.write(1, b"x" * 300_000 + b"end")
"""


def test_what_a_command_wrote_before_its_end_is_told_with_its_end(tmp_path: Path) -> None:
    """Also when the supervisor was slow, and the command has made its pipe larger than one read."""
    go = tmp_path / "go"

    async def body(subject: Children) -> None:
        command = subject.run(an_order(sys.executable, "-c", A_LAST_WORD, str(go)))
        await command.started()
        pid = command.pid
        assert pid
        supervisor = parent_of(pid)
        os.kill(supervisor, signal.SIGSTOP)
        go.touch()
        await until(lambda: not is_alive(pid))
        os.kill(supervisor, signal.SIGCONT)
        ended = await command.ended()
        assert ended.output_bytes == 300_003
        assert ended.output.endswith("…")

    with_children(body)


def test_twenty_orders_at_once_all_run() -> None:
    async def body(subject: Children) -> None:
        ends = await asyncio.gather(*(end_of(subject, a_script(f"echo {n}; exit {n}", dev_id=n)) for n in range(20)))
        assert [(end.status, end.output) for end in ends] == [(n, str(n)) for n in range(20)]

    with_children(body)


def test_there_is_a_bound_on_orders_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "MOST_ORDERS", 2)

    async def body(subject: Children) -> None:
        running = [subject.run(an_order("sleep", "30", dev_id=n)) for n in range(2)]
        with pytest.raises(DuendeError, match="under way already"):
            subject.run(an_order("true", dev_id=2))
        assert await running[0].end() == ""
        await until(lambda: len(subject._commands) == 1)
        assert await end_of(subject, an_order("true", dev_id=2)) == Ended(0, "", 0)
        assert await running[1].end() == ""

    with_children(body)


# --- a command is ended or kept --------------------------------------------------------------------------------------


def test_a_command_that_ignores_sigterm_is_killed(marker: str) -> None:
    async def body(subject: Children) -> None:
        command = subject.run(a_script(f"trap '' TERM; echo ready; while :; do sleep {marker}; done"))
        await command.started()
        await until(lambda: those_with(marker))
        began = time.monotonic()
        assert await command.end() == ""
        assert 1.9 < time.monotonic() - began < 5
        assert await command.ended() == Ended(-signal.SIGKILL, "ready", 6)
        assert not those_with(marker)

    with_children(body)


def test_a_command_that_was_taken_while_the_loop_stalled_has_its_time_to_be_executed(
    marker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "STARTED_IN", 1.0)

    async def body(subject: Children) -> None:
        await spares_of(subject)
        command = subject.run(an_order("sleep", marker))
        time.sleep(2)  # the stall itself: it was taken meanwhile, and the patience is over
        await command.started()
        assert await command.end() == ""

    with_children(body)


def test_a_command_that_obeys_sigterm_ends_at_once(marker: str) -> None:
    async def body(subject: Children) -> None:
        command = subject.run(an_order("sleep", marker))
        await command.started()
        began = time.monotonic()
        assert await command.end() == ""
        assert time.monotonic() - began < 1
        assert (await command.ended()).status == -signal.SIGTERM

    with_children(body)


def test_descendants_that_left_their_session_and_their_parents_are_all_ended(marker: str) -> None:
    script = f"""
        setsid setsid sleep {marker} &
        (setsid sh -c 'trap "" TERM; sleep {marker}; sleep {marker}; :' </dev/null >/dev/null 2>&1 &)
        (sleep {marker} </dev/null >/dev/null 2>&1 &)
        exit 4
    """

    async def body(subject: Children) -> None:
        command = subject.run(a_script(script))
        assert (await command.ended()).status == 4
        await until(lambda: len(those_with(marker)) == 3)
        assert await command.end() == ""
        assert not those_with(marker)

    with_children(body)


def test_ending_spares_strangers(marker: str) -> None:
    with subprocess.Popen(["sleep", marker]) as stranger:

        async def body(subject: Children) -> None:
            command = subject.run(an_order("sleep", marker))
            await command.started()
            assert await command.end() == ""

        with_children(body)
        assert stranger.poll() is None
        assert those_with(marker) == {stranger.pid}
        stranger.kill()


def test_a_process_that_got_the_pid_of_a_descendant_is_not_signalled(
    marker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["sh", "-c", f"sleep {marker} >/dev/null 2>&1 &"], check=True)
    wait_for(lambda: those_with(marker))  # the shell forks first
    (stranger,) = those_with(marker)
    assert parent_of(stranger) != os.getpid()
    monkeypatch.setattr(nursery, "descendants", lambda: [stranger])
    nursery.signal_all(signal.SIGKILL)
    with subprocess.Popen(["sleep", marker]) as child:
        monkeypatch.setattr(nursery, "descendants", lambda: [child.pid])
        nursery.signal_all(signal.SIGKILL)
        assert child.wait(10) == -signal.SIGKILL
    assert is_alive(stranger)


def test_what_has_another_devices_char_device_open_is_left_alone(marker: str, char_device: Path) -> None:
    script = f"(setsid sh -c 'exec 5<{char_device}; exec sleep {marker}' &); trap '' TERM; sleep {marker}; exit 5"

    async def body(subject: Children) -> None:
        command = subject.run(a_script(script, dev_id=DEV_ID + 1))
        await command.started()
        await until(lambda: len(those_with(marker)) == 2)
        await until(servers)
        left = await command.end()
        assert re.fullmatch(rf"pid \d+ \(sleep\) is left alone: it has {char_device} open", left)
        assert len(those_with(marker)) == 2
        assert command.pid is not None
        assert is_alive(command.pid)

    with_children(body)


def test_what_opens_another_devices_char_device_when_it_is_asked_to_end_is_not_killed(
    marker: str, char_device: Path
) -> None:
    script = f"trap 'exec 5<{char_device}; exec sleep {marker}' TERM; echo ready; while :; do sleep 0.02; done"

    async def body(subject: Children) -> None:
        command = subject.run(a_script(script))
        await command.started()
        await asyncio.sleep(0.3)  # its trap is set long before
        assert "is left alone" in await command.end(1.0)
        assert command.pid is not None
        assert servers() == [command.pid]

    with_children(body)


def test_what_cannot_be_looked_into_is_left_alone(marker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, _: int | None) -> set[int]:
        raise PermissionError(errno.EACCES, f"Permission denied to {pid}")

    with subprocess.Popen(["sleep", marker]) as child:
        assert child.pid in nursery.descendants()
        assert nursery.who_serves(None, None) == ""
        monkeypatch.setattr(nursery, "open_char_devices", refuse)
        assert "is left alone: its open files cannot be read" in nursery.who_serves(None, None)
        child.kill()


def test_a_dead_process_that_nobody_has_reaped_has_nothing_open() -> None:
    with subprocess.Popen(["true"]) as child:
        wait_for(lambda: not is_alive(child.pid))
        assert child.pid in nursery.descendants()
        assert nursery.open_char_devices(child.pid, None) == set()


def test_what_has_its_own_devices_char_device_open_is_ended(marker: str, char_device: Path) -> None:
    async def body(subject: Children) -> None:
        command = subject.run(a_script(f"exec 5<{char_device}; exec sleep {marker}", dev_id=DEV_ID))
        await command.started()
        await until(servers)
        assert await command.end() == ""

    with_children(body)


def servers() -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(PermissionError):
            if entry.name.isdigit() and DEV_ID in nursery.open_char_devices(int(entry.name), None):
                found.append(int(entry.name))
    return found


JAILED = """
import os, signal, sys, time
os.chroot(sys.argv[2])
file = open("/dev/ublkc990")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(float(sys.argv[1]))
"""


def test_a_server_of_another_device_in_a_root_of_its_own_is_left_alone(marker: str, tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / f"dev/ublkc{DEV_ID}").touch()

    async def body(subject: Children) -> None:
        command = subject.run(an_order(sys.executable, "-c", JAILED, marker, str(tmp_path)))
        await command.started()
        await until(servers)
        assert "is left alone: it has /dev/ublkc990 open" in await command.end(1.0)
        assert command.pid
        assert is_alive(command.pid)

    with_children(body)


@pytest.fixture
def urandom(tmp_path: Path) -> Path:
    node = tmp_path / "made-elsewhere"
    os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(MEMORY_DEVICES, URANDOM))
    try:
        os.close(os.open(node, os.O_RDONLY))
    except OSError as error:
        pytest.skip(f"no device can be opened here: {error.strerror}")
    return node


def test_a_char_device_is_known_by_its_number_whatever_its_node_is_called(marker: str, urandom: Path) -> None:
    script = f"exec 5<{urandom}; echo ready; exec sleep {marker}"

    async def body(subject: Children) -> None:
        other = subject.run(replace(a_script(script, dev_id=1), char_rdev=(MEMORY_DEVICES, 1)))
        own = subject.run(replace(a_script(script, dev_id=URANDOM), char_rdev=(MEMORY_DEVICES, URANDOM)))
        blind = subject.run(a_script(script, dev_id=2))
        await until(lambda: len(those_with(marker)) == 3)
        assert re.search(r"is left alone: it has /dev/ublkc[39] open", await other.end(1.0))
        assert not await blind.has_open(2)
        assert await own.has_open(URANDOM)
        assert await blind.end() == ""
        assert len(those_with(marker)) == 2

    with_children(body)


@pytest.mark.parametrize("has_statx", [True, False])
def test_open_char_devices_are_found_by_name_and_by_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, urandom: Path, *, has_statx: bool
) -> None:
    if not has_statx:
        monkeypatch.setattr(nursery, "_statx", None)
    names = ("ublkc7", "ublkc8", "xublkc70", "ublkc71x", "ublkc", "ublkc\N{SUPERSCRIPT TWO}")
    for name in names:
        (tmp_path / name).touch()
    with contextlib.ExitStack() as stack:
        for path in (urandom, *(tmp_path / name for name in names)):
            stack.enter_context(path.open("rb"))
        (tmp_path / "ublkc8").unlink()
        urandom.unlink()
        own = os.getpid()
        assert nursery.open_char_devices(own, None) == {7, 8}
        assert {7, 8, URANDOM} <= nursery.open_char_devices(own, MEMORY_DEVICES) <= {3, 7, 8, URANDOM}
        assert URANDOM not in nursery.open_char_devices(own, MEMORY_DEVICES + 1)


A_SERVER = """
import sys, time
marker, progress = sys.argv[1:]
for number in range(1_000_000):
    print("x" * 1000, flush=True)
    with open(progress, "w") as file:
        file.write(f"{number} ")
    time.sleep(0.002)
"""


def test_a_server_that_is_kept_goes_on_without_nursery_and_daemon(marker: str, tmp_path: Path) -> None:
    progress = tmp_path / "progress"
    order = an_order(sys.executable, "-c", A_SERVER, marker, str(progress), timeout=0.1)
    seen: dict[str, int] = {}

    def done() -> int:
        return int(progress.read_text().split(" ")[0] or 0) if progress.exists() else 0

    async def body(subject: Children) -> None:
        command = subject.run(order)
        await command.started()
        command.keep()
        await until(done)
        assert subject.nursery_pid
        assert command.pid
        seen.update(server=command.pid, supervisor=parent_of(command.pid))
        os.kill(subject.nursery_pid, signal.SIGKILL)

    with_children(body)
    at = done()
    wait_for(lambda: done() > at + 200)  # three times what a pipe holds
    assert is_alive(seen["server"])
    os.kill(seen["server"], signal.SIGKILL)
    wait_for(lambda: not is_alive(seen["supervisor"]))


def test_a_word_that_was_said_right_before_the_daemon_died_is_heard() -> None:
    """The kernel tells a reset connection first, when messages of ours were never read."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    talk = nursery.Talk(theirs)
    talk.say(taken=1)
    ours.send(b'{"do": "keep"}')
    ours.close()
    assert talk.hear() == {"do": "keep"}
    with pytest.raises(nursery.Gone):
        talk.hear()
    talk.close()


def wait_for(condition: Callable[[], object], deadline: float = 10.0) -> None:
    until_then = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < until_then
        time.sleep(0.01)


A_DAEMON = """
import asyncio, sys
from duende_ublkd.kernel.children import Children, CommandOrder
async def main():
    order = CommandOrder(990, tuple(sys.argv[2:]), {"PATH": "/usr/bin:/bin"}, float(sys.argv[1]))
    command = Children().run(order)
    await command.started()
    print(command.pid, flush=True)
    await asyncio.sleep(100)
asyncio.run(main())
"""


@contextlib.contextmanager
def a_daemon(timeout: float, *argv: str) -> Iterator[int]:
    """A daemon of its own that runs a command, and the command's pid. It is killed at the end."""
    arguments = [sys.executable, "-c", A_DAEMON, str(timeout), *argv]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as daemon:
        assert daemon.stdout
        try:
            yield int(daemon.stdout.readline())
        finally:
            daemon.kill()


def test_without_the_daemon_a_commands_own_time_limit_counts(marker: str) -> None:
    with a_daemon(2.0, "sh", "-c", f"setsid sleep {marker} & sleep {marker}") as pid:
        supervisor = parent_of(pid)
        wait_for(lambda: len(those_with(marker)) == 2)
        began = time.monotonic()
    assert is_alive(pid)
    wait_for(lambda: not those_with(marker))
    assert time.monotonic() - began > 1
    wait_for(lambda: not is_alive(supervisor))


def test_without_the_daemon_whoever_serves_a_device_is_spared(marker: str, char_device: Path) -> None:
    with a_daemon(0.5, "sh", "-c", f"exec 5<{char_device}; exec sleep {marker}") as pid:
        supervisor = parent_of(pid)
        wait_for(lambda: servers() == [pid])
    with pytest.raises(AssertionError):
        wait_for(lambda: not is_alive(pid), 2)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_alive(supervisor))


def test_a_supervisor_without_work_takes_no_time(marker: str) -> None:
    def switches(pid: int) -> str:
        return status_of(pid, "voluntary_ctxt_switches")

    async def body(subject: Children) -> None:
        command = subject.run(an_order("sleep", marker))
        await command.started()
        assert command.pid
        supervisor = parent_of(command.pid)
        await asyncio.sleep(0.2)  # until it has said what it had to say
        before = switches(supervisor)
        await asyncio.sleep(0.5)
        assert switches(supervisor) == before
        await command.end()

    with_children(body)


# --- a command whose exec hangs, a former one, a hold ---------------------------------------------------------------


@pytest.fixture
def sick_disk(tmp_path: Path, marker: str) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A command on a disk that hangs, and what makes the disk answer: whoever opens a leased file waits for it."""
    script = tmp_path / "recover"
    script.write_text(f"#!/bin/sh\nexec sleep {marker}\n")
    script.chmod(0o755)
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    lease = os.open(script, os.O_RDONLY)
    fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    def answer() -> None:
        nonlocal lease
        if lease >= 0:
            os.close(lease)
            lease = -1

    yield script, answer
    answer()
    signal.signal(signal.SIGIO, before)


def in_exec(subject: Children) -> set[int]:
    """Processes of supervisors that have not become a command yet."""
    every = {each.supervisor for each in subject._commands if each.supervisor}
    return {child for pid in every for child in living_children(pid) if status_of(child, "Name") == "ublkd-command"}


SickDisk = tuple[Path, Callable[[], None]]


def test_a_command_that_is_given_up_in_its_exec_never_runs_and_no_other_runs_beside_it(
    marker: str, sick_disk: SickDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, answer = sick_disk
    monkeypatch.setattr(children, "STARTED_IN", 0.5)
    monkeypatch.setattr(children, "NURSERY_IN", 0.0)

    async def body(subject: Children) -> None:
        await spares_of(subject)
        command = subject.run(an_order(str(script)))
        await until(lambda: in_exec(subject))
        (pid,) = in_exec(subject)
        assert command.supervisor
        os.kill(command.supervisor, signal.SIGSTOP)  # so that the command is under way for as long as is looked
        with pytest.raises(DuendeError, match=r"was not started: it could not be executed within 0\.5 s"):
            await command.started()
        assert (await command.ended()).status is None
        with pytest.raises(StillRunningError, match=r"the former recovery command of ublk1 still runs") as caught:
            subject.run(an_order("true"))
        assert str(command.supervisor) in caught.value.hint
        assert not await subject.former_is_over(1, 0.1)
        os.kill(command.supervisor, signal.SIGCONT)
        assert await subject.former_is_over(1, 5)
        assert not is_alive(pid)
        answer()
        assert await end_of(subject, an_order("true")) == Ended(0, "", 0)
        assert not those_with(marker)

    with_children(body)


def test_a_command_whose_daemon_goes_during_its_exec_never_runs(marker: str, sick_disk: SickDisk) -> None:
    script, answer = sick_disk
    pids: set[int] = set()

    async def body(subject: Children) -> None:
        command = subject.run(an_order(str(script)))
        await until(lambda: in_exec(subject))
        assert command.supervisor
        pids.update({command.supervisor, *in_exec(subject)})

    with_children(body)
    assert len(pids) == 2
    wait_for(lambda: not any(map(is_alive, pids)))
    answer()
    assert not those_with(marker)


class DeafCommand(Command):
    """It does not hear that it is executed."""

    def _hear(self, message: dict[str, Any] | None) -> None:
        if message is None or "started" not in message:
            super()._hear(message)


def test_a_command_that_starts_as_it_is_given_up_is_ended_unless_it_serves(
    marker: str, char_device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "Command", DeafCommand)
    monkeypatch.setattr(children, "STARTED_IN", 0.5)
    monkeypatch.setattr(children, "NURSERY_IN", 0.0)

    async def body(subject: Children) -> None:
        await spares_of(subject)
        idle = subject.run(an_order("sleep", marker))
        serving = subject.run(a_script(f"exec 5<{char_device}; exec sleep {marker}", dev_id=DEV_ID))
        await until(lambda: len(those_with(marker)) == 2)
        for each in (idle, serving):
            with pytest.raises(DuendeError, match="could not be executed"):
                await each.started()
        assert await subject.former_is_over(1, 5)
        assert not await subject.former_is_over(DEV_ID, 1)
        assert set(servers()) == those_with(marker)

    with_children(body)


def test_a_kept_command_is_under_way_until_its_own_process_has_ended(marker: str) -> None:
    async def body(subject: Children) -> None:
        command = subject.run(a_script(f"sleep {marker} & read line <&1; sleep {marker}"))
        await command.started()
        command.keep()
        with pytest.raises(StillRunningError, match=rf"ublk1 \(pid {command.pid}\) still runs"):
            subject.run(an_order("true"))
        with pytest.raises(StillRunningError):
            subject.run(an_order("true"))
        assert await end_of(subject, an_order("true", dev_id=2)) == Ended(0, "", 0)
        assert command.pid
        os.kill(command.pid, signal.SIGKILL)
        assert await subject.former_is_over(1, 5)
        assert those_with(marker)
        assert await end_of(subject, an_order("true")) == Ended(0, "", 0)

    with_children(body)


def test_a_command_that_was_not_kept_is_under_way_until_all_that_it_started_has_ended(marker: str) -> None:
    async def body(subject: Children) -> None:
        command = subject.run(a_script(f"(setsid sleep {marker} </dev/null >/dev/null 2>&1 &)"))
        assert (await command.ended()).status == 0
        assert not await subject.former_is_over(1, 0.2)
        with pytest.raises(StillRunningError):
            subject.run(an_order("true"))
        assert await command.end() == ""
        assert await subject.former_is_over(1, 5)

    with_children(body)


def test_a_command_that_could_not_be_ended_in_time_is_still_under_way(marker: str) -> None:
    """No time at all stands for a process that SIGKILL does not reach yet."""

    async def body(subject: Children) -> None:
        command = subject.run(a_script(f"(setsid sleep {marker} </dev/null >/dev/null 2>&1 &)"))
        assert (await command.ended()).status == 0
        await until(lambda: those_with(marker))
        assert "did not die of SIGKILL in time" in await command.end(0.0)
        assert not await subject.former_is_over(1, 0.3)
        for pid in those_with(marker):
            os.kill(pid, signal.SIGKILL)
        assert await subject.former_is_over(1, 5)

    with_children(body)


def test_a_command_that_is_left_is_ended_at_the_end_of_its_time_and_heard_of_until_then(marker: str) -> None:
    async def body(subject: Children) -> None:
        command = subject.run(an_order("sleep", marker, timeout=0.8))
        await command.started()
        command.leave()
        assert not await subject.former_is_over(1, 0.4)
        assert those_with(marker)
        assert await subject.former_is_over(1, 5)
        assert (await command.ended()).status == -signal.SIGTERM

    with_children(body)


def test_a_command_that_is_left_is_spared_when_it_serves_and_one_that_was_kept_stays_kept(
    marker: str, char_device: Path
) -> None:
    async def body(subject: Children) -> None:
        serving = subject.run(
            replace(a_script(f"exec 5<{char_device}; exec sleep {marker}", dev_id=DEV_ID), timeout=0.5)
        )
        kept = subject.run(an_order("sleep", marker, timeout=0.5))
        await until(lambda: len(those_with(marker)) == 2)
        kept.keep()
        for each in (serving, kept):
            each.leave()
        await asyncio.sleep(1)
        assert len(those_with(marker)) == 2
        assert not await subject.former_is_over(DEV_ID, 0)

    with_children(body)


def test_a_hold_that_comes_before_a_child_has_the_order_is_heeded(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    asked: list[bool] = []

    def may_go() -> bool:
        asked.append(True)
        return False

    async def body(subject: Children) -> None:
        command = subject.run(an_order("touch", str(trace)), may_go=may_go)
        assert asked == []
        with pytest.raises(DuendeError, match=r"^not done: it is on hold now$") as caught:
            await command.started()
        assert "release 1" in caught.value.hint
        assert asked == [True]
        assert (await command.ended()).trouble == "not done: it is on hold now"
        assert await end_of(subject, an_order("true")) == Ended(0, "", 0)
        assert not trace.exists()

    with_children(body)


# --- the nursery -----------------------------------------------------------------------------------------------------


def test_a_spare_that_has_become_a_child_is_replaced() -> None:
    async def body(subject: Children) -> None:
        before = await spares_of(subject)
        running = [subject.run(an_order("sleep", "30", dev_id=n)) for n in range(3)]
        for each in running:
            await each.started()
        busy = {parent_of(each.pid) for each in running if each.pid}
        assert len(busy) == len(running)
        assert busy & before
        assert busy.isdisjoint(await spares_of(subject))
        for each in running:
            assert await each.end() == ""

    with_children(body)


def test_a_spare_that_cannot_be_watched_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    orders, ours = socket.socketpair()
    with orders, ours:
        subject = nursery.Nursery(orders, 1, lock=False)
        listing = Path(f"/proc/self/task/{os.getpid()}/children")
        before = listing.read_text()
        monkeypatch.setattr(os, "pidfd_open", fail)
        for _ in range(2):
            with pytest.raises(OSError, match="Too many"):
                subject._fork()
        assert subject._spares == set()
        assert listing.read_text() == before


def test_a_spare_that_dies_is_replaced() -> None:
    async def body(subject: Children) -> None:
        before = await spares_of(subject)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        await spares_of(subject, other_than=before)
        assert await end_of(subject, an_order("true")) == Ended(0, "", 0)

    with_children(body)


def has_nursery(subject: Children) -> bool:
    return subject.is_alive


def test_after_the_death_of_the_nursery_one_of_its_spares_takes_its_place_and_nothing_is_executed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body(subject: Children) -> None:
        for _ in range(3):
            spares = await spares_of(subject)
            monkeypatch.setattr(sys, "executable", "/no/such/interpreter")
            dead = subject.nursery_pid
            assert dead
            os.kill(dead, signal.SIGKILL)
            wait_for(lambda dead=dead: not is_alive(dead))  # type: ignore[misc]
            assert not has_nursery(subject)
            assert await end_of(subject, an_order("true")) == Ended(0, "", 0)
            await until(lambda: has_nursery(subject))
            assert subject.nursery_pid in spares
            assert status_of(subject.nursery_pid, "Name") == "ublkd-nursery"
            assert await spares_of(subject, other_than=spares)
            heir = subject.nursery_pid
            assert not any(is_alive(pid) for pid in spares - {heir})

    with_children(body, lock_memory=True)


def test_without_nursery_and_spares_the_next_order_executes_another() -> None:
    async def body(subject: Children) -> None:
        spares = await spares_of(subject)
        dead = subject.nursery_pid
        assert dead
        for pid in (dead, *spares):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not any(map(is_alive, (dead, *spares))))
        assert await end_of(subject, an_order("true")) == Ended(0, "", 0)
        assert has_nursery(subject)
        assert subject.nursery_pid not in {dead, *spares}

    with_children(body)


def test_an_heir_that_dies_as_well_is_noticed() -> None:
    async def body(subject: Children) -> None:
        spares = await spares_of(subject)
        dead = subject.nursery_pid
        assert dead
        for pid in spares:
            os.kill(pid, signal.SIGSTOP)
        os.kill(dead, signal.SIGKILL)
        await until(lambda: subject.nursery_pid is None)
        assert not has_nursery(subject)
        for pid in spares:
            os.kill(pid, signal.SIGKILL)
        await until(lambda: subject._orders is None)
        assert await end_of(subject, an_order("true")) == Ended(0, "", 0)

    with_children(body)


def test_spares_that_do_not_become_heirs_in_time_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(subject: Children) -> None:
        spares = await spares_of(subject)
        monkeypatch.setattr(children, "NURSERY_IN", 0.1)
        assert subject.nursery_pid
        for pid in spares:
            os.kill(pid, signal.SIGSTOP)
        os.kill(subject.nursery_pid, signal.SIGKILL)
        await until(lambda: subject.nursery_pid is None)
        await asyncio.sleep(0.2)
        assert await end_of(subject, an_order("true")) == Ended(0, "", 0)
        for pid in spares:
            os.kill(pid, signal.SIGCONT)
        await until(lambda: not any(map(is_alive, spares)))
        assert has_nursery(subject)
        assert subject.nursery_pid not in spares

    with_children(body)


def test_a_command_outlives_the_nursery_and_is_still_heard_of(marker: str) -> None:
    async def body(subject: Children) -> None:
        command = subject.run(a_script(f"sleep {marker}; exit 6"))
        await command.started()
        await until(lambda: those_with(marker) - {command.pid})
        dead = subject.nursery_pid
        assert dead
        os.kill(dead, signal.SIGKILL)
        await until(lambda: subject.nursery_pid != dead)
        for pid in those_with(marker) - {command.pid}:
            os.kill(pid, signal.SIGTERM)
        assert (await command.ended()).status == 6

    with_children(body)


def test_closing_leaves_no_process() -> None:
    pids: set[int] = set()

    async def body(subject: Children) -> None:
        pids.update(await spares_of(subject))
        assert subject.nursery_pid
        pids.add(subject.nursery_pid)
        await end_of(subject, an_order("true"))

    with_children(body)
    assert len(pids) == children.SPARES + 1
    wait_for(lambda: not any(map(is_alive, pids)), 1.0)  # the one that ran the command says so before it ends


def test_signals_to_the_whole_group_end_neither_nursery_nor_spares() -> None:
    async def body(subject: Children) -> None:
        spares = await spares_of(subject)
        assert subject.nursery_pid
        for pid in (subject.nursery_pid, *spares):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(pid, number)
        assert await end_of(subject, an_order("true")) == Ended(0, "", 0)
        assert subject.nursery_pid in {parent_of(pid) for pid in spares if is_alive(pid)}

    with_children(body)


def test_an_order_that_is_not_taken_in_time_is_given_up_and_never_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(children, "STARTED_IN", 0.2)
    monkeypatch.setattr(children, "NURSERY_IN", 0.0)
    trace = tmp_path / "trace"

    async def body(subject: Children) -> None:
        spares = await spares_of(subject)
        for pid in spares:
            os.kill(pid, signal.SIGSTOP)
        command = subject.run(an_order("touch", str(trace)))
        with pytest.raises(DuendeError, match=r"no child took the order within 0\.2 s"):
            await command.started()
        assert (await command.ended()).status is None
        for pid in spares:
            os.kill(pid, signal.SIGCONT)
        await until(lambda: not all(map(is_alive, spares)))
        assert await end_of(subject, an_order("true")) == Ended(0, "", 0)
        assert not trace.exists()

    with_children(body)


def test_a_supervisor_that_is_killed_is_told_of(marker: str) -> None:
    async def body(subject: Children) -> None:
        command = subject.run(an_order("sleep", marker))
        await command.started()
        assert command.pid
        os.kill(parent_of(command.pid), signal.SIGKILL)
        assert await command.ended() == Ended(None, "", 0, "its supervisor is gone, and its end was not seen")
        assert await command.end() == "its supervisor is gone, and its end was not seen"

    with_children(body)


def test_a_command_whose_supervisor_is_killed_is_under_way_until_its_own_process_has_ended(marker: str) -> None:
    async def body(subject: Children) -> None:
        command = subject.run(an_order("sleep", marker))
        await command.started()
        assert command.pid
        os.kill(parent_of(command.pid), signal.SIGKILL)
        assert (await command.ended()).status is None
        assert not await subject.former_is_over(1, 0.1)
        with pytest.raises(StillRunningError, match=f"pid {command.pid}"):
            subject.run(an_order("true"))
        os.kill(command.pid, signal.SIGKILL)
        assert await subject.former_is_over(1, 5)
        assert await end_of(subject, an_order("true")) == Ended(0, "", 0)

    with_children(body)


def test_whoever_waits_may_be_cancelled_without_effect(marker: str) -> None:
    async def body(subject: Children) -> None:
        command = subject.run(an_order("sleep", marker))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(command.ended(), 0.2)
        assert command.pid
        assert is_alive(command.pid)
        assert await command.end() == ""
        assert (await command.ended()).status == -signal.SIGTERM

    with_children(body)


def test_memory_is_locked_in_the_nursery_and_in_its_spares_and_little_of_it_is_there_twice() -> None:
    def own(pid: int) -> int:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return sum(int(kib) for kib in re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.MULTILINE)[:2])

    async def body(subject: Children) -> None:
        spares = await spares_of(subject)
        for pid in (subject.nursery_pid, *spares):
            assert pid
            assert int(status_of(pid, "VmLck").split()[0]) > 8192
        assert all(own(pid) < 3072 for pid in spares)

    troubles: list[str] = []
    with_children(body, lock_memory=True, on_trouble=troubles.append)
    assert troubles == []


def test_memory_that_cannot_be_locked_is_told_and_not_fatal() -> None:
    program = """
import asyncio, resource, ctypes
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
ctypes.CDLL(None).prctl(24, 14, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_IPC_LOCK: gone with the next exec
from duende_ublkd.kernel.children import Children, CommandOrder
async def main():
    told = []
    subject = Children(lock_memory=True, on_trouble=told.append)
    command = subject.run(CommandOrder(1, ("true",), {"PATH": "/usr/bin:/bin"}, 5))
    print((await command.ended()).status, told[0])
    subject.close()
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert re.match(r"0 memory of the daemon's children cannot be locked: ", done.stdout)


# --- a hand ----------------------------------------------------------------------------------------------------------


async def stop(
    subject: Children,
    *,
    try_first: bool = False,
    rdev: tuple[int, int] = LOOP0,
    deadline: float = 5,
    may_go: Callable[[Process | None], bool] = lambda _: True,
) -> None:
    """With /dev/null in the place of the claimed char device."""
    claim = os.open("/dev/null", os.O_RDWR)
    try:
        await subject.stop_device(DEV_ID, rdev, claim, try_first=try_first, deadline=deadline, may_go=may_go)
    finally:
        os.close(claim)


@pytest.mark.usefixtures("obedient_control")
def test_a_disk_without_a_node_is_not_stopped() -> None:
    async def body(subject: Children) -> None:
        with pytest.raises(CommandError, match="/dev/ublkb990: No such file") as caught:
            await stop(subject)
        assert caught.value.errno == errno.ENOENT

    with_children(body)


@pytest.mark.usefixtures("obedient_control")
def test_a_node_that_is_no_block_device_or_another_disk_is_not_stopped(disk: Path) -> None:
    async def body(subject: Children) -> None:
        with pytest.raises(CommandError, match="not the disk that was looked at"):
            await stop(subject, rdev=(7, 1))
        disk.unlink()
        disk.touch()
        with pytest.raises(CommandError, match="not a block device"):
            await stop(subject)
        disk.unlink()
        disk.symlink_to("/dev/loop0")
        with pytest.raises(CommandError, match="symbolic links"):
            await stop(subject)

    with_children(body)


@pytest.mark.usefixtures("disk", "obedient_control")
@pytest.mark.parametrize("try_first", [False, True])
def test_a_disk_that_is_claimed_is_busy(*, try_first: bool) -> None:
    async def body(subject: Children) -> None:
        claim = os.open("/dev/loop0", os.O_RDONLY | os.O_EXCL)
        try:
            with pytest.raises(BusyError, match="mounted, swapped on, or claimed by dm, md or loop"):
                await stop(subject, try_first=try_first)
        finally:
            os.close(claim)
        await stop(subject, try_first=try_first)

    with_children(body)


@pytest.mark.skipif(Path(abi.CONTROL_DEVICE).exists(), reason="there is a driver")
@pytest.mark.usefixtures("disk")
def test_without_a_driver_a_stop_says_what_to_type() -> None:
    async def body(subject: Children) -> None:
        with pytest.raises(KernelUnavailableError, match="ublk-control is missing") as caught:
            await stop(subject)
        assert caught.value.hint

    with_children(body)


class Answering(binding.WaitingRing):
    """A driver that answers as told, and notes what it was asked, whether the disk was free then, and who had the claim."""

    def __init__(self, *answers: int, claim: Path | None = None) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[int, bool]] = []
        self.claims: list[int] = []
        self.handed_over = threading.Event()
        self._claim = claim

    def perform(self, fd: int, entry: bytes) -> int:
        assert Path(f"/proc/self/fd/{fd}").readlink() == Path("/dev/null")
        assert self.handed_over.wait(10)
        self.claims.append(descriptors_of(self._claim))
        command = int.from_bytes(entry[8:12], sys.byteorder)
        try:
            os.close(os.open("/dev/loop0", os.O_RDONLY | os.O_EXCL))
            self.asked.append((command, True))
        except OSError:
            self.asked.append((command, False))
        return self.answers.pop(0)


STOP, TRY = abi.Command.STOP_DEV, abi.Command.TRY_STOP_DEV


@pytest.mark.usefixtures("obedient_control")
@pytest.mark.parametrize(
    ("try_first", "answers", "asked", "told"),
    [
        (False, [0], [(STOP.encoded, False)], ("STOP_DEV", 0)),
        (False, [-95, 0], [(STOP.encoded, False), (STOP.nr, False)], ("STOP_DEV", 0)),
        (True, [0], [(TRY.encoded, True)], ("TRY_STOP_DEV", 0)),
        (True, [-16], [(TRY.encoded, True)], ("TRY_STOP_DEV", -16)),
        (True, [-524, 0], [(TRY.encoded, True), (STOP.encoded, False)], ("STOP_DEV", 0)),
        (False, [-524, -524], [(STOP.encoded, False), (STOP.nr, False)], ("STOP_DEV", -524)),
    ],
)
def test_a_stop_is_sent_with_the_disk_claimed_and_a_try_with_it_free(
    disk: Path,
    *,
    try_first: bool,
    answers: list[int],
    asked: list[tuple[int, bool]],
    told: tuple[str, int],
    tmp_path: Path,
) -> None:
    claim = tmp_path / "char device"
    claim.touch()
    driver = Answering(*answers, claim=claim)

    def hand_over(ours: socket.socket) -> None:
        with claim.open("rb") as claimed:
            socket.send_fds(ours, [b"{}"], [claimed.fileno()])
        driver.handed_over.set()

    answer = answer_of_a_hand(driver, hand_over, try_first=try_first)
    assert driver.asked == asked
    assert (answer["command"], answer["result"]) == told
    assert driver.claims == [1] * len(asked)  # the caller has given up its own
    assert descriptors_of(claim) == 0
    os.close(os.open(disk, os.O_RDONLY | os.O_EXCL))  # nothing of it is left open


def open_links() -> list[Path]:
    """What this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(link.readlink())
    return found


def descriptors_of(path: Path | None) -> int:
    """How many this process has of a file."""
    return open_links().count(path) if path else 0


def answer_of_a_hand(
    driver: Answering, word: Callable[[socket.socket], object], *, try_first: bool = False
) -> dict[str, Any]:
    """A hand's work in a thread of this process. `word`: what its daemon does when it hears that the disk is open."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    order: dict[str, Any] = children._stop_order(DEV_ID, LOOP0, try_first=try_first)
    answers: list[dict[str, Any]] = []
    hand = threading.Thread(target=lambda: answers.append(nursery._answer(order, nursery.Talk(theirs), driver)))
    with ours, theirs:
        hand.start()
        assert json.loads(ours.recv(100)) == {"opened": True}
        assert driver.asked == []  # it waits for the word
        word(ours)
        hand.join(10)
    return answers[0]


def say_nothing_to_be_done(ours: socket.socket) -> None:
    ours.send(b'{"do": "nothing"}')


@pytest.mark.usefixtures("obedient_control")
@pytest.mark.parametrize("word", [say_nothing_to_be_done, socket.socket.close], ids=["nothing", "gone"])
@pytest.mark.parametrize("try_first", [False, True])
def test_a_hand_without_its_daemons_claim_sends_nothing(
    disk: Path, word: Callable[[socket.socket], object], *, try_first: bool
) -> None:
    driver = Answering(0)
    answer = answer_of_a_hand(driver, word, try_first=try_first)
    assert driver.asked == []
    assert (answer["failed"], answer["errno"]) == ("late", errno.ECANCELED)
    os.close(os.open(disk, os.O_RDONLY | os.O_EXCL))


class StoppedHand(children._Hand):
    """Its child is stopped between `taken` and `go`: before it opens the disk."""

    pids: list[int] = []  # noqa: RUF012 - filled by the loop, read by the test

    def _hear(self, message: dict[str, Any] | None) -> None:
        if message and "taken" in message:
            self.pids.append(message["taken"])
            os.kill(message["taken"], signal.SIGSTOP)
        super()._hear(message)


class HandStoppedAtWork(children._Hand):
    """Its child is stopped between the word for the STOP_DEV and the STOP_DEV."""

    pids: list[int] = []  # noqa: RUF012 - as above

    def _let_it_stop(self) -> None:
        assert self.process
        self.pids.append(self.process.pid)
        os.kill(self.process.pid, signal.SIGSTOP)
        super()._let_it_stop()


@pytest.mark.usefixtures("disk", "obedient_control")
@pytest.mark.parametrize(
    ("slow_hand", "word", "step", "result"),
    [
        (HandStoppedAtWork, signal.SIGCONT, "STOP_DEV", 0),
        (HandStoppedAtWork, signal.SIGKILL, "STOP_DEV", -errno.EINTR),
        (StoppedHand, signal.SIGCONT, OPENING, -errno.ECANCELED),  # the result of a STOP_DEV would be 0
        (StoppedHand, signal.SIGKILL, OPENING, -errno.EINTR),
    ],
)
def test_a_hand_that_misses_its_deadline_is_overdue_its_late_answer_collected_and_a_late_open_stops_nothing(
    monkeypatch: pytest.MonkeyPatch,
    slow_hand: type[StoppedHand | HandStoppedAtWork],
    word: int,
    step: str,
    result: int,
) -> None:
    late: list[tuple[str, int, int]] = []
    asked: list[Process | None] = []

    def may_go(hand: Process | None) -> bool:
        asked.append(hand)
        return True

    monkeypatch.setattr(children, "_Hand", slow_hand)
    patience = 0.2 if step == OPENING else 2.0  # the disk is to be opened in time

    async def body(subject: Children) -> None:
        with pytest.raises(
            CommandOverdueError, match=f"^{step} on ublk990 has not answered for {patience:g} s"
        ) as caught:
            await stop(subject, deadline=patience, may_go=may_go)
        assert caught.value.command == step
        assert (late, subject.overdue) == ([], 1)
        os.kill(slow_hand.pids[-1], word)
        await until(lambda: late)
        assert (late, subject.overdue) == ([(step, DEV_ID, result)], 0)
        assert [each is not None for each in asked] == ([False] if step == OPENING else [False, True])

    with_children(body, on_late=lambda *what: late.append(what))


@pytest.mark.usefixtures("disk", "obedient_control")
def test_it_is_asked_whether_it_may_be_stopped_before_the_disk_is_opened_and_by_whom_right_before_it_is_stopped() -> (
    None
):
    asked: list[tuple[Process | None, bool, str]] = []

    def may_go(hand: Process | None) -> bool:
        try:
            os.close(os.open("/dev/loop0", os.O_RDONLY | os.O_EXCL))
            free = True
        except OSError:
            free = False
        asked.append((hand, free, status_of(hand.pid, "Name") if hand else ""))
        return True

    async def body(subject: Children) -> None:
        spares = await spares_of(subject)
        times = {pid: start_time_of(Path(f"/proc/{pid}/stat").read_bytes()) for pid in spares}
        await stop(subject, may_go=may_go)
        ((before, *_), (hand, *_)) = asked
        assert before is None
        assert hand
        assert times[hand.pid] == hand.start_time > 0
        assert [what[1:] for what in asked] == [(True, ""), (False, "ublkd-hand")]

    with_children(body)


@pytest.mark.usefixtures("obedient_control")
def test_a_hold_that_comes_while_the_disk_is_being_opened_is_heeded(disk: Path) -> None:
    late: list[object] = []
    hands: list[Process] = []

    def may_go(hand: Process | None) -> bool:
        hands.extend([hand] if hand else [])
        return hand is None

    async def body(subject: Children) -> None:
        with pytest.raises(DuendeError, match=r"^not done: it is on hold now$"):
            await stop(subject, may_go=may_go)
        await until(lambda: not is_alive(hands[0].pid))
        os.close(os.open(disk, os.O_RDONLY | os.O_EXCL))
        assert (subject.overdue, late) == (0, [])

    with_children(body, on_late=lambda *what: late.append(what))


@pytest.mark.usefixtures("obedient_control")
def test_a_hand_whose_daemon_has_gone_before_its_disk_was_open_ends_and_asks_nobody(
    monkeypatch: pytest.MonkeyPatch, disk: Path
) -> None:
    monkeypatch.setattr(children, "_Hand", StoppedHand)
    late: list[object] = []
    asked: list[Process | None] = []

    def may_go(hand: Process | None) -> bool:
        asked.append(hand)
        return True

    async def body(subject: Children) -> None:
        stopping = asyncio.ensure_future(stop(subject, may_go=may_go))
        await until(lambda: asked)
        stopping.cancel()
        await asyncio.wait([stopping])
        subject.close()
        os.kill(StoppedHand.pids[-1], signal.SIGCONT)
        await until(lambda: not is_alive(StoppedHand.pids[-1]))
        os.close(os.open(disk, os.O_RDONLY | os.O_EXCL))

    with_children(body, on_late=lambda *what: late.append(what))
    assert (asked, late) == ([None], [])


# --- a hand of a former daemon


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until it is killed."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def test_the_end_of_a_former_daemons_hand_is_told_once(sleeper: subprocess.Popen[bytes]) -> None:
    late: list[tuple[str, int, int]] = []

    async def body(subject: Children) -> None:
        assert subject.watch_former(DEV_ID, children._process_named(sleeper.pid))
        assert subject.overdue == 1
        await asyncio.sleep(0.05)
        assert late == []
        sleeper.kill()
        await until(lambda: late)
        await asyncio.sleep(0.05)
        assert (late, subject.overdue) == ([("STOP_DEV", DEV_ID, -errno.EINTR)], 0)

    with_children(body, on_late=lambda *what: late.append(what))


def test_a_former_hand_that_has_ended_and_a_number_that_another_process_has_are_not_watched(
    sleeper: subprocess.Popen[bytes],
) -> None:
    late: list[object] = []
    with subprocess.Popen(["true"]) as process:
        gone = children._process_named(process.pid)
    recycled = replace(children._process_named(sleeper.pid), start_time=1)

    async def body(subject: Children) -> None:
        open_before = len(open_links())
        former = [gone, Process(gone.pid, 0), recycled]
        assert [subject.watch_former(DEV_ID, hand) for hand in former] == [False] * 3
        assert (subject.overdue, len(open_links())) == (0, open_before)

    with_children(body, on_late=lambda *what: late.append(what))
    assert late == []


def test_a_former_hand_that_is_a_zombie_has_ended() -> None:
    with subprocess.Popen(["true"]) as zombie:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)

        async def body(subject: Children) -> None:
            assert not subject.watch_former(DEV_ID, children._process_named(zombie.pid))

        with_children(body)


def test_closing_gives_up_watching_former_hands(sleeper: subprocess.Popen[bytes]) -> None:
    late: list[object] = []

    async def body(subject: Children) -> None:
        open_before = len(open_links())
        assert subject.watch_former(DEV_ID, children._process_named(sleeper.pid))
        subject.close()
        sleeper.kill()
        await asyncio.sleep(0.05)
        assert (late, len(open_links())) == ([], open_before)

    with_children(body, on_late=lambda *what: late.append(what))


@pytest.mark.usefixtures("disk", "obedient_control")
def test_a_hand_that_cannot_be_had_is_an_error_and_nothing_is_done_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late: list[object] = []
    monkeypatch.setattr(children, "TAKEN_IN", 0.2)
    monkeypatch.setattr(children, "NURSERY_IN", 0.0)

    async def body(subject: Children) -> None:
        spares = await spares_of(subject)
        for pid in spares:
            os.kill(pid, signal.SIGSTOP)
        with pytest.raises(DuendeError, match="was not sent: no child took the order"):
            await stop(subject)
        for pid in spares:
            os.kill(pid, signal.SIGCONT)
        await until(lambda: not all(map(is_alive, spares)))
        await stop(subject)
        assert late == []

    with_children(body, on_late=lambda *what: late.append(what))


@pytest.mark.usefixtures("disk", "obedient_control")
def test_closing_does_not_wait_for_a_hand_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(children, "_Hand", StoppedHand)

    async def body(subject: Children) -> None:
        with pytest.raises(CommandOverdueError):
            await stop(subject, deadline=0.1)
        began = time.monotonic()
        subject.close()
        assert time.monotonic() - began < 0.5

    with_children(body)
    os.kill(StoppedHand.pids[-1], signal.SIGKILL)


@pytest.mark.usefixtures("disk", "obedient_control")
def test_a_hold_that_comes_before_a_hand_has_the_order_is_heeded() -> None:
    late: list[object] = []

    async def body(subject: Children) -> None:
        with pytest.raises(DuendeError, match=r"^not done: it is on hold now$"):
            await stop(subject, may_go=lambda _: False)
        assert subject.overdue == 0
        await stop(subject, may_go=lambda _: True)
        assert late == []

    with_children(body, on_late=lambda *what: late.append(what))


def test_closing_takes_no_longer_than_a_fifth_of_a_second() -> None:
    spares: set[int] = set()

    async def body(subject: Children) -> None:
        spares.update(await spares_of(subject))
        pid = subject.nursery_pid
        assert pid
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        subject.close()
        assert time.monotonic() - began < 0.2
        assert not status_of(pid, "State")  # reaped

    with_children(body)
    assert spares
    wait_for(lambda: not any(map(is_alive, spares)))


# --- a program -------------------------------------------------------------------------------------------------------

A_PROGRAM = """
import os, socket
channel = socket.socket(fileno=0)
links = [os.readlink(f"/proc/self/fd/{fd}") for fd in (1, 2)]
channel.send(repr([os.getpid(), os.getppid(), os.getsid(0), os.getcwd(), *links, os.environ["ITS"]]).encode())
channel.recv(1)
"""


async def heard_from(channel: socket.socket) -> str:
    async with asyncio.timeout(10):
        return (await asyncio.get_running_loop().sock_recv(channel, 4096)).decode()


def test_a_program_is_executed_with_its_stdin_and_nothing_else_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITS", "environment")

    async def body(subject: Children) -> None:
        await spares_of(subject)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with ours:
            with theirs:
                subject.spawn([sys.executable, "-c", A_PROGRAM], theirs.fileno())
            pid, parent, *rest = ast.literal_eval(await heard_from(ours))
            assert parent == subject.nursery_pid
            assert rest == [pid, "/", "/dev/null", "/dev/null", "environment"]
            assert status_of(pid, "VmLck") == "0 kB"
            assert {link.name for link in Path(f"/proc/{pid}/fd").iterdir()} == {"0", "1", "2"}
        await until(lambda: not status_of(pid, "State"))  # reaped

    with_children(body, lock_memory=True)


def test_a_program_that_cannot_be_executed_closes_its_stdin() -> None:
    async def body(subject: Children) -> None:
        await spares_of(subject)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with ours:
            with theirs:
                subject.spawn(["/no/such/program"], theirs.fileno())
            assert await heard_from(ours) == ""

    with_children(body)


def test_a_program_is_not_waited_for_and_no_nursery_is_executed_for_it(sick_disk: SickDisk, marker: str) -> None:
    script, answer = sick_disk

    async def body(subject: Children) -> None:
        null = os.open("/dev/null", os.O_RDWR)
        try:
            with pytest.raises(DuendeError, match="the nursery is gone"):
                subject.spawn([str(script)], null)
            await spares_of(subject)
            began = time.monotonic()
            subject.spawn([str(script)], null)
            assert time.monotonic() - began < 0.1
            await asyncio.sleep(0.2)
            answer()
            await until(lambda: those_with(marker))
        finally:
            os.close(null)

    with_children(body)


# --- a ring that waits -----------------------------------------------------------------------------------------------


def test_a_waiting_ring_gives_the_kernels_answers_one_by_one() -> None:
    ring = binding.WaitingRing()
    null = os.open("/dev/null", os.O_RDWR)
    entry = abi.pack_sqe(abi.IORING_OP_URING_CMD, -1, 1, cmd_op=NULL_COMMAND)
    closed = os.dup(null)
    os.close(closed)
    try:
        assert [ring.perform(fd, entry) for fd in (null, closed) * 6] == [0, -errno.EBADF] * 6
    finally:
        os.close(null)
        ring.close()


def test_the_numbers_that_binding_has_of_its_own_are_those_of_abi() -> None:
    """Those of abi are compared with the C compiler's."""
    assert (binding.SETUP_SQE128, binding.OFF_SQES, binding.SQE_SIZE) == (
        abi.IORING_SETUP_SQE128,
        abi.IORING_OFF_SQES,
        abi.SQE_SIZE,
    )
    assert -abi.ENOTSUPP in nursery._UNSUPPORTED
    entry = abi.pack_sqe(abi.IORING_OP_URING_CMD, 0x01020304, 1)
    assert entry[binding._FD_AT] == (0x01020304).to_bytes(4, sys.byteorder)


def test_the_nursery_loads_nothing_that_is_large() -> None:
    program = "import sys; import duende_ublkd.kernel.nursery; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.extend({sys.path!r}); {program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split())
    assert "liburing.queue" in loaded
    assert loaded.isdisjoint({"asyncio", "dataclasses", "inspect", "logging", "pathlib", "subprocess", "typing"})
