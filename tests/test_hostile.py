"""Names that a process, a path or a unit may have, from the real /proc to wherever somebody reads them.

Whoever runs a server chooses its name, its program's path and, with a delegated cgroup, a unit's; none of it may break a
line, a metric, a page, a command or a query, nor steer a terminal.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from duende_ublkd.core import recovery
from duende_ublkd.core.config import Config, DeviceFacts, Recovery, UnfilledError, fill, load
from duende_ublkd.core.model import Holder, Server, Usage
from duende_ublkd.core.text import printable
from duende_ublkd.kernel import holders, servers
from duende_ublkd.kernel.children import CommandOrder
from duende_ublkd.report import present
from duende_ublkd.report.journal import Journal, _ForServiceManager, _ForTerminal
from duende_ublkd.report.metrics import Metrics
from duende_ublkd.report.reader import read_file
from tests.daemon_process import command
from tests.test_children import with_children
from tests.test_report import a_device, a_report
from tests.test_servers import a_child
from tests.test_store import opened, run, written

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from duende_ublkd.core.model import Judged
    from duende_ublkd.kernel.children import Children

# 15 bytes each: what is no text, forged ends of lines, fields, labels and queries, and what steers a terminal.
COMMS = [
    b"a\n<3>ublk0 gone",
    b'"} 1\nx{y="',
    b"\x1b]0;pwned\x07\x1b[2J",
    b"x) Z 1 1 1\n(",
    b"');DROP TABLE--",
    b"$(reboot);`id`|",
    b"\xe2\x80\xaegpj.\xff\xfe\xc0\xaf\r",
    b"{id} {{ %s %(x)",
    b"\\n\\x1b\\",
]
PROGRAM_DIRECTORY = "\x1b[31m\n<0>x \u202e\udcff'\"; $(x) {id}\\n"

NAMED = """
import ctypes, sys
ctypes.CDLL(None).prctl(15, ctypes.c_char_p(bytes.fromhex(sys.argv[1])), 0, 0, 0)
sys.stdout.write(sys.stdin.readline()); sys.stdout.flush(); sys.stdin.read()
"""


@contextmanager
def a_process_called(comm: bytes) -> Iterator[int]:
    with a_child(sys.executable, "-c", NAMED, comm.hex()) as child:
        yield child.pid


@contextmanager
def a_cgroup(directory: Path, name: str, pid: int) -> Iterator[None]:
    """Of the v2 hierarchy, mounted here for as long as it takes, where this machine lets us."""
    mount = ["mount", "-t", "cgroup2", "none", str(directory)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no hierarchy of cgroups can be mounted here")
    with ExitStack() as undo:
        undo.callback(subprocess.run, ["umount", "-l", str(directory)], check=True)
        place = directory / name
        place.mkdir()
        undo.callback(place.rmdir)
        (place / "cgroup.procs").write_text(str(pid))
        undo.callback((directory / "cgroup.procs").write_text, str(pid))
        yield


def a_device_of(server: Server | None, *holders: Holder) -> Judged:
    assert server
    made = a_device(server=server, reason=f"served by {server}, held by {', '.join(map(str, holders))}")
    usage = Usage((server,), holders)
    return replace(made, seen=replace(made.seen, usage=usage))


class Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record)


def logged(do: Callable[[], object]) -> list[logging.LogRecord]:
    collector, log = Collector(), logging.getLogger("duende_ublkd")
    log.addHandler(collector)
    log.setLevel(logging.INFO)
    try:
        do()
    finally:
        log.removeHandler(collector)
        log.setLevel(logging.NOTSET)
    return collector.lines


def check_everywhere(device: Judged) -> None:
    """Each place where a person or a program reads of it."""
    lines = logged(lambda: Journal().passed(a_report(device, changed=(device,))))
    assert len(lines) == 1
    for formatter in (_ForServiceManager("%(message)s"), _ForTerminal("%(levelname)s %(message)s")):
        assert formatter.format(lines[0]).isprintable()
    metrics = Metrics()
    metrics.passed(a_report(device))
    samples = metrics.render().decode().splitlines()
    assert all(line.isprintable() and line.startswith(("#", "duende_ublkd_", "process_")) for line in samples)
    assert sum(line.startswith("duende_ublkd_device_info{") for line in samples) == 1
    assert max(map(len, samples)) < 1000
    table = present.table([device], 100).split("\n")
    assert len(table) == 2
    assert all(line.isprintable() for line in table)
    assert json.loads(json.dumps(present.as_object(device)))["dev_id"] == 3


@pytest.mark.parametrize("comm", COMMS)
def test_a_process_may_call_itself_anything(comm: bytes) -> None:
    with a_process_called(comm) as pid:
        assert Path(f"/proc/{pid}/comm").read_bytes() == comm[:15] + b"\n"
        server = servers.inspect(pid)
    assert server
    assert server.comm.isprintable()
    assert server.start_time > 0
    check_everywhere(a_device_of(server))


@pytest.mark.parametrize("name", [PROGRAM_DIRECTORY, "/".join(["\n" * 250] * 14)])
def test_a_program_may_lie_anywhere(tmp_path: Path, name: str) -> None:
    place = tmp_path
    for part in name.split("/"):
        place /= part
    place.mkdir(parents=True, exist_ok=True)
    program = shutil.copy(shutil.which("cat") or "/bin/cat", place / "cat")
    with a_child(str(program)) as child:
        server = servers.inspect(child.pid)
    assert server
    assert server.exe.isprintable()
    assert len(server.exe) <= 200
    check_everywhere(a_device_of(server))
    assert recovery.placeholders(a_device().seen, server)["server"] is None  # nothing is run that was only shown
    with pytest.raises(UnfilledError):
        fill(["{server}"], recovery.placeholders(a_device().seen, server))


@pytest.mark.parametrize(
    "name", ["a b\"}';--.service", "\x1b[2J\u202e.service", "x" * 240 + ".service", "\udcff.service"]
)
def test_a_unit_may_be_called_anything(tmp_path: Path, name: str) -> None:
    with a_child() as child, a_cgroup(tmp_path, name, child.pid):
        server = servers.inspect(child.pid)
    assert server
    assert server.unit.endswith(".service") or len(name) > 200  # one whose end is cut off is none
    assert server.unit.isprintable()
    assert len(server.unit) <= 200
    check_everywhere(a_device_of(server))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_mount_may_be_anywhere(tmp_path: Path) -> None:
    """The deepest path that mount(2) takes, on a file system whose source is text that its mounter chose."""
    place = Path(str(tmp_path) + "/\x1b[2J\n 1:2 - ext4\u202e\\040")
    place.mkdir()
    with ExitStack() as undo:
        options = [
            "mount",
            "-t",
            "tmpfs",
            "-o",
            "size=4k",
            "/dev/ublkb3\n1 1 259:0 / / rw - ext4 /dev/ublkb3",
            str(place),
        ]
        if subprocess.run(options, check=False, capture_output=True).returncode:
            pytest.skip("nothing can be mounted here")
        undo.callback(subprocess.run, ["umount", "-l", str(place)], check=True)
        mounts = [
            mount
            for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n")
            if (mount := holders.mount_of(line))
        ]
        (mine,) = [mount for mount in mounts if mount.mountpoint == str(place)]
        assert (mine.fstype, mine.rdev[0]) == ("tmpfs", 0)
        usage = holders.look({3: holders.Target(3, (240, 3), frozenset({(259, 0)}))})[3]
    assert [holder for holder in usage.holders if holder.kind == "mount"] == []  # no line was forged


def ran(argv: tuple[str, ...], environment: dict[str, str]) -> str:
    outputs: list[str] = []

    async def body(children: Children) -> None:
        started = children.run(CommandOrder(3, argv, environment, 60.0))
        await started.started()
        outputs.append((await started.ended()).output)

    with_children(body)
    return outputs[0]


def test_a_recovery_command_gets_hostile_names_as_one_line_in_one_variable_and_runs_nothing_of_them() -> None:
    server = Server(7, alive=False, comm=printable(COMMS[5]), exe="/tmp/$(touch x); {id}", unit="'; x.service")
    rule = Recovery(
        ("/bin/sh", "-c", 'echo "$#:$1:$DUENDE_UBLKD_SERVER_COMM:$DUENDE_UBLKD_SERVER_UNIT"', "sh", "{server}")
    )
    seen = a_device().seen
    argv = fill(rule.command, recovery.placeholders(seen, server))
    assert argv[4] == "/tmp/$(touch x); {id}"  # one part, not filled in again
    environment = recovery.environment(seen, server, 1, rule, "served by\n$(x)")
    assert ran(argv, environment) == "1:/tmp/$(touch x); {id}:$(reboot);`id`|:'; x.service"


def test_no_name_changes_a_query_or_is_lost_in_the_journal(tmp_path: Path) -> None:
    place = tmp_path / "state"
    names = [printable(comm) for comm in COMMS]

    async def scenario() -> None:
        async with opened(place) as store:
            journal = Journal(store.append)
            for name in names:
                device = a_device_of(Server(7, alive=True, comm=name), Holder("mount", name))
                journal.passed(a_report(device, changed=(device,)))
                store.save(f"device/{name}", name)
            await written(store)
            assert len((await store.read(dev_id=3, limit=100))[0]) == len(names)

    run(scenario())
    found = read_file(str(place), limit=100)
    assert [record.event.facts["server"]["comm"] for record in found] == names
    with closing(sqlite3.connect(place / "journal.sqlite")) as journal:
        assert journal.execute("SELECT count(*) FROM state").fetchone() == (len(names),)
        assert {name for (name,) in journal.execute("SELECT name FROM sqlite_master WHERE type = 'table'")} == {
            "events",
            "state",
        }


def test_no_name_matches_a_table_that_is_not_for_it() -> None:
    config = load(b'[[device]]\nmatch = { server = "ublk*" }\norphaned = "ignore"\n', "f")
    for comm in COMMS:
        facts = DeviceFacts(3, printable(comm), "/x", server_known=True)
        assert config.policy_for(facts).policy == Config().policy


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"LC_ALL": "C.UTF-8"},
    ],
)
def test_every_locale_can_be_written_to(tmp_path: Path, environment: dict[str, str]) -> None:
    name = "\u4e2d\u2026\x1b[2J\u202e\n" + os.fsdecode(b"\xff")
    path = tmp_path / f"config{name}.toml"
    path.write_text("")
    for arguments in (
        ("--id", "3", "--server", name),
        ("--id", "3", "--server", name, "--json"),
        ("--unit", f"x{name}.y"),
    ):
        ended = subprocess.run(
            [sys.executable, "-m", "duende_ublkd", "check-config", str(path), *arguments],
            check=False,
            capture_output=True,
            env={**os.environ, **environment},
        )
        assert (ended.returncode, ended.stderr) == (0, b"")
        shown = ended.stdout.decode("utf-8", "replace")
        assert all(line.isprintable() for line in shown.splitlines())


def test_an_error_about_a_hostile_file_is_two_printable_lines(tmp_path: Path) -> None:
    path = tmp_path / "\x1b[2J\n\u202e\udcff"
    path.write_text("x")
    path.chmod(0o666)
    ended = command("check-config", str(path))
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 2
    assert all(line.isprintable() for line in ended.stderr.splitlines())
