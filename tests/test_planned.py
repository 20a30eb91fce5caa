"""The commands that ask the daemon, as a person meets them: with one, without one, and while it comes and goes."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from asyncio import AbstractEventLoop, new_event_loop, run_coroutine_threadsafe
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import IO, Any, Self

import pytest

from duende_ublkd import client
from duende_ublkd.client import DaemonClient, DaemonLostError, DaemonNotRunningError
from duende_ublkd.core.errors import DuendeError
from duende_ublkd.core.holds import Hold, Holds
from duende_ublkd.core.model import Event, EventKind, Level
from duende_ublkd.kernel import holdfile
from duende_ublkd.report.metrics import Metrics
from duende_ublkd.report.store import Store
from duende_ublkd.report.web import Times, WebServer
from tests.test_web import ASource, a_record

REPOSITORY = Path(__file__).parents[1]
DEADLINE = 30.0

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the fake daemon lets root change what it likes")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A run directory; shorter than pytest's, since a socket's path has its limit."""
    path = Path(tempfile.mkdtemp(prefix="duende-")) / "duende-ublkd"
    path.mkdir()
    yield path
    shutil.rmtree(path.parent)


class ADaemon:
    """The real server on its real socket, over a source that is told what to say."""

    def __init__(self, directory: Path, *seqs: int) -> None:
        """`seqs`: what it remembers when it begins to listen."""
        self._seqs = seqs
        self._path = f"{directory}/api.sock"
        self._loop: AbstractEventLoop = new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self.source: ASource

    def __enter__(self) -> Self:
        self._thread.start()
        self.do(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self.do(self._server.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        self.source = ASource()
        for seq in self._seqs:
            self.source.add(a_record(seq, dev_id=3, text="it happened"))
        self._server = WebServer(self.source, Metrics(), Times(heartbeat=0.2))
        await self._server.listen_local(self._path)

    def do(self, coroutine: Any) -> Any:  # noqa: ANN401
        return run_coroutine_threadsafe(coroutine, self._loop).result(DEADLINE)

    def add(self, *seqs: int, dev_id: int | None = 3, text: str = "it happened") -> None:
        for seq in seqs:
            self._loop.call_soon_threadsafe(self.source.add, a_record(seq, dev_id=dev_id, text=text))


@pytest.fixture
def daemon(directory: Path) -> Iterator[ADaemon]:
    with ADaemon(directory) as running:
        yield running


def environment(directory: Path) -> dict[str, str]:
    return {**os.environ, "RUNTIME_DIRECTORY": str(directory), "TZ": "UTC", "COLUMNS": "100"}


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "duende_ublkd", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment(directory),
        timeout=60,
    )


def says(done: subprocess.CompletedProcess[str], code: int, *sentences: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for sentence in sentences:
        assert sentence in done.stderr, done.stderr


def without_journal(directory: Path) -> tuple[str, str]:
    """Options that name a state directory in which nothing is."""
    config = directory.parent / "config.toml"
    config.write_text(f'[daemon]\nstate_dir = "{directory.parent}/state"\n')
    return "--config", str(config)


# --- hold and release


@needs_root
def test_a_hold_says_until_when_and_how_to_end_it(directory: Path, daemon: ADaemon) -> None:
    done = run(directory, "hold", "/dev/ublkb3", "--why", "new \x1b[2J kernel")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"ublk3 on hold until [0-9: -]+ \(10 min\): nothing is done to it\. "
        r"Release it with: duende-ublkd release 3\n",
        done.stdout,
    ), done.stdout
    assert daemon.source.asked == [(3, 600.0, "new \\x1b[2J kernel", 0)]
    done = run(directory, "hold", "4", "--for", "1h30m", "--json")
    assert json.loads(done.stdout)["dev_id"] == 4
    assert daemon.source.asked[1] == (4, 5400.0, "", 0)
    listed = run(directory, "hold").stdout.splitlines()
    assert listed[0].split() == ["DEVICE", "UNTIL", "LEFT", "BY", "WHY"]
    assert listed[1].startswith("ublk3 ")
    assert listed[1].endswith("root  new \\x1b[2J kernel")
    assert re.search(" 1 h (30|29) min ", listed[2])  # a moment has passed
    assert [hold["dev_id"] for hold in json.loads(run(directory, "hold", "--json").stdout)] == [3, 4]


@needs_root
def test_a_release_says_whether_there_was_anything_to_release(directory: Path, daemon: ADaemon) -> None:
    daemon.source.held[3] = Hold(3, time.monotonic(), time.monotonic() + 60, 0)
    done = run(directory, "release", "3", "--dry-run")
    assert (done.returncode, done.stdout) == (0, "ublk3 would be released\n")
    assert 3 in daemon.source.held
    done = run(directory, "release", "ublk3")
    assert (done.returncode, done.stdout) == (0, "ublk3 released\n")
    assert daemon.source.held == {}
    daemon.source.overdue[3], daemon.source.attempts[3] = "DEL_DEV", 2
    done = run(directory, "release", "3")
    told = [
        "ublk3: 2 attempts to recover it are forgotten, and begin anew",
        "ublk3: DEL_DEV of an earlier daemon counts as over, and may be asked anew",
    ]
    assert (done.returncode, done.stdout.splitlines()) == (0, told)
    for arguments in (("release", "3"), ("release", "3", "--dry-run")):
        done = run(directory, *arguments)
        assert (done.returncode, done.stdout) == (1, "ublk3 was not on hold\n")


def test_a_dry_run_of_a_hold_changes_nothing_and_says_what_it_would_replace(directory: Path, daemon: ADaemon) -> None:
    done = run(directory, "hold", "3", "--for", "90s", "--dry-run")
    assert re.fullmatch(r"ublk3 would be on hold until [0-9: -]+ \(1 min 30 s\)\n", done.stdout), done.stdout
    daemon.source.held[3] = Hold(3, time.monotonic(), time.monotonic() + 60, 0)
    assert ", instead of until " in run(directory, "hold", "3", "--dry-run").stdout
    would = json.loads(run(directory, "hold", "3", "--dry-run", "--json").stdout)
    assert would["replaces"]["dev_id"] == 3
    assert daemon.source.asked == []


def test_without_a_daemon_nothing_can_be_held_and_the_error_says_how_to_start_it(directory: Path) -> None:
    for arguments in (("hold", "3"), ("hold", "3", "--dry-run"), ("release", "3")):
        says(run(directory, *arguments), 1, "the daemon does not run", "try: systemctl start duende-ublkd")


def test_without_a_daemon_what_it_left_on_hold_is_listed(directory: Path) -> None:
    assert run(directory, "hold").stdout == "No device is on hold.\n"
    now = time.monotonic()
    holds = Holds([Hold(7, now, now + 100_000, 1000, "disk"), Hold(8, now - 10, now - 5, 0)])
    holdfile.write(str(directory), holds.to_record(holdfile.boot_id()))
    lines = run(directory, "hold").stdout.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"ublk7   \S+ \S+  1 d 3 h  uid 1000  disk", lines[1]), lines
    (directory / "holds.json").write_text("{")
    says(run(directory, "hold"), 1, "nobody knows which devices are on hold", "try: ls -l")


@pytest.mark.parametrize(
    ("arguments", "sentences"),
    [
        (("hold", "3", "--for", "600"), ("--for: ", "has no unit", 'did you mean "600s"')),
        (("hold", "3", "--for", "0s"), ("--for: 0s is not between 1s and 30d", "--for 10m")),
        (("hold", "3", "--for", "31d"), ("--for: 31d is not between 1s and 30d",)),
        (("hold", "3", "--for", "ever"), ("--for: ",)),
        (("hold", "--for", "10m"), ("hold takes the id", "duende-ublkd hold 3 --for 10m")),
        (("hold", "--dry-run"), ("hold takes the id",)),
        (("hold", "x"), ("is not the id of a ublk device",)),
        (("release",), ("ID", "duende-ublkd release --help")),
        (("events", "--limit", "-1"), ("--limit",)),
        (("events", "--limit", "1001"), ("--limit: '1001' is not a number from 0 to 1000", "--limit 20")),
        (("events", "--limit", "x"), ("--limit: 'x' is not a number", "--limit 20")),
        (("events", "--since", "yesterday"), ("--since: ",)),
        (("events", "--follow", "--since", "1"), ("--since: ", "no unit")),
    ],
)
def test_wrong_use_says_what_is_right(directory: Path, arguments: tuple[str, ...], sentences: tuple[str, ...]) -> None:
    says(run(directory, *arguments), 2, *sentences)


# --- events


def test_events_are_a_line_each_with_local_time_level_and_device(directory: Path, daemon: ADaemon) -> None:
    daemon.add(1)
    daemon.add(2, dev_id=None, text="evil\x1b[2J\nline")
    done = run(directory, "events")
    assert done.stdout.splitlines() == [
        "2023-11-14 22:13:21  WARNING  ublk3     it happened",
        "2023-11-14 22:13:22  WARNING  -         evil\\x1b[2J\\nline",
    ]
    assert done.stderr == "duende-ublkd: a note\n"
    assert [event["seq"] for event in json.loads(run(directory, "events", "--json").stdout)] == [1, 2]
    assert [event["seq"] for event in json.loads(run(directory, "events", "3", "--json").stdout)] == [1]
    assert [event["seq"] for event in json.loads(run(directory, "events", "--limit", "1", "--json").stdout)] == [2]
    assert json.loads(run(directory, "events", "--since", "1h", "--json").stdout) == []


async def keep(directory: str, *events: Event) -> list[int]:
    """A journal as a daemon leaves it."""
    store = Store(directory, max_age=1e9, max_bytes=1 << 20, on_trouble=pytest.fail, on_recovered=lambda _: None)
    await store.open(DEADLINE)
    seqs = [store.append(event) for event in events]
    await store.close(DEADLINE)
    return seqs


def test_without_a_daemon_events_come_from_the_journal_that_it_left(directory: Path) -> None:
    options = without_journal(directory)
    state = directory.parent / "state"
    state.mkdir()
    now = time.time()
    events = [
        Event(now - 7200, EventKind.DAEMON, Level.INFO, "old"),
        Event(now, EventKind.VERDICT, Level.INFO, "ublk3 is live", 3),
        Event(now, EventKind.ACTION, Level.ERROR, "ublk4 could not be deleted", 4, {"errno": 16}),
    ]
    seqs = asyncio.run(keep(str(state), *events))
    done = run(directory, "events", *options)
    assert done.stderr == "duende-ublkd: the daemon does not run; this is its file\n"
    assert [line[21:] for line in done.stdout.splitlines()] == [
        "         -         old",
        "         ublk3     ublk3 is live",
        "ERROR    ublk4     ublk4 could not be deleted",
    ]
    told = json.loads(run(directory, "events", "--json", "--since", "1h", "4", *options).stdout)
    assert [(event["seq"], event["facts"]) for event in told] == [(seqs[2], {"errno": 16})]
    with AFollower(directory, "--json", "--limit", "1", *options) as follower:
        assert follower.seq() == seqs[2]
        with ADaemon(directory, *seqs, seqs[2] + 1):
            assert follower.seq() == seqs[2] + 1


def test_without_a_daemon_and_a_journal_the_error_says_so(directory: Path) -> None:
    says(run(directory, "events", *without_journal(directory)), 1, "there is no journal in ", "try: ")


class AFollower:
    """`events --follow` in a process of its own."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "duende_ublkd", "events", "--follow", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=REPOSITORY,
            env=environment(directory),
        )
        self._lines = _Lines(self.process.stdout)
        self._errors = _Lines(self.process.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE)
        self._lines.close()
        self._errors.close()

    def line(self) -> str:
        return self._lines.next()

    def error(self) -> str:
        return self._errors.next()

    def seq(self) -> int:
        return int(json.loads(self.line())["seq"])


class _Lines:
    """What a process writes, as it comes; "" is its end."""

    def __init__(self, stream: IO[str] | None) -> None:
        assert stream
        self._stream = stream
        self._lines: Queue[str] = Queue()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for line in self._stream:
            self._lines.put(line)
        self._lines.put("")

    def next(self) -> str:
        return self._lines.get(timeout=DEADLINE)

    def close(self) -> None:
        self._thread.join(DEADLINE)
        self._stream.close()


def wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_follower_shows_the_last_ten_and_then_what_comes(directory: Path, daemon: ADaemon) -> None:
    daemon.add(*range(1, 31))
    with AFollower(directory, "--json") as follower:
        assert [follower.seq() for _ in range(10)] == list(range(21, 31))
        wait(lambda: daemon.source.following == 1)
        for seq in (31, 32):
            daemon.add(seq)
            assert follower.seq() == seq


def test_a_follower_of_one_device_shows_that(directory: Path, daemon: ADaemon) -> None:
    daemon.add(1)
    with AFollower(directory, "4", "--limit", "0") as follower:
        wait(lambda: daemon.source.following == 1)
        daemon.add(2)
        daemon.add(3, dev_id=4, text="mine")
        assert follower.line().endswith("  ublk4     mine\n")


def test_an_interrupted_follower_ends_silently(directory: Path, daemon: ADaemon) -> None:
    with AFollower(directory, "--limit", "0") as follower:
        assert follower.error() == "duende-ublkd: a note\n"
        wait(lambda: daemon.source.following == 1)
        follower.process.send_signal(signal.SIGINT)
        assert follower.process.wait(DEADLINE) == 0
        assert (follower.line(), follower.error()) == ("", "")


def test_a_follower_whose_reader_has_gone_ends_without_waiting_for_an_event(directory: Path, daemon: ADaemon) -> None:
    """As `duende-ublkd events --follow | head` leaves it when head has ended."""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "duende_ublkd", "events", "--follow", "--limit", "0"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=environment(directory),
    )
    os.close(writer)
    wait(lambda: daemon.source.following == 1)
    assert process.poll() is None
    os.close(reader)
    _, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, errors) == (0, "duende-ublkd: a note\n")
    wait(lambda: daemon.source.following == 0)


def test_a_follower_whose_output_cannot_be_written_ends_and_says_so(directory: Path, daemon: ADaemon) -> None:
    daemon.add(1)
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "duende_ublkd", "events", "--follow"],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=environment(directory),
            timeout=DEADLINE,
        )
    says(done, 1, "the output cannot be written: No space left on device")


def test_a_follower_outlives_the_daemon_and_misses_nothing(directory: Path) -> None:
    with ADaemon(directory) as daemon:
        daemon.add(1)
        follower = AFollower(directory, "--json")
        assert follower.error() == "duende-ublkd: a note\n"
        assert follower.seq() == 1
        wait(lambda: daemon.source.following == 1)
    with follower:
        assert "waiting for it to come back" in follower.error()
        with ADaemon(directory, 1, 2, 3):
            assert [follower.seq() for _ in range(2)] == [2, 3]
            assert follower.error() == "duende-ublkd: the daemon is back\n"
        assert "waiting for it to come back" in follower.error()
        with ADaemon(directory, 1, 2):  # one that has lost its journal
            assert [follower.seq() for _ in range(2)] == [1, 2]


def test_a_follower_waits_for_a_daemon_that_is_not_there_yet(directory: Path) -> None:
    with AFollower(directory, "--json", *without_journal(directory)) as follower:
        assert "there is no journal in " in follower.error()
        assert "waiting for it to come back" in follower.error()
        with ADaemon(directory) as daemon:
            assert follower.error() == "duende-ublkd: the daemon is back\n"
            daemon.add(1)
            assert follower.seq() == 1


# --- the client


class AListener:
    """A server that answers with these bytes."""

    def __init__(self, path: str, answer: bytes, *, ends: bool = True) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen(1)
        self._answer = answer
        self._ends = ends
        self._thread = threading.Thread(target=self._serve)
        self._done = threading.Event()

    def _serve(self) -> None:
        channel, _ = self._socket.accept()
        with channel:
            channel.recv(1 << 16)
            try:
                channel.sendall(self._answer)
                if not self._ends:
                    self._done.wait(DEADLINE)
            except BrokenPipeError:
                return  # the client has seen enough

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._socket.close()


@pytest.mark.parametrize(
    ("answer", "kind", "sentence"),
    [
        (b"", DaemonLostError, "closed the connection"),
        (b"hello\r\n\r\n", DaemonLostError, "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[]", DaemonLostError, "closed the connection"),
        (b"HTTP/1.1 200 OK\r\n\r\n[", DuendeError, "not understood"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000, DuendeError, "not understood"),
        (b"HTTP/1.1 500 No\r\n\r\nsorry", DuendeError, "not understood"),
        (b"HTTP/1.1 400 No\r\n\r\n[]", DuendeError, "not understood"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b" " * ((16 << 20) + 1), DuendeError, "longer than 16 MiB"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_an_answer_that_is_none_is_an_error_with_a_hint(
    directory: Path, answer: bytes, kind: type[DuendeError], sentence: str
) -> None:
    path = f"{directory}/api.sock"
    with AListener(path, answer), pytest.raises(kind, match=sentence) as told:
        DaemonClient(path).get("/api/v1/holds")
    assert told.value.hint


@pytest.mark.parametrize(
    "line", [b'{"seq": 1}', b"[]\n", b"x\n", b" " * (1 << 21)], ids=["no end", "no object", "no JSON", "too long"]
)
def test_a_line_that_is_none_ends_a_stream_with_an_error(directory: Path, line: bytes) -> None:
    path = f"{directory}/api.sock"
    stream = b'HTTP/1.0 200 OK\r\n\r\n\n{"seq": 0}\n' + line
    with AListener(path, stream):
        lines = DaemonClient(path).follow("/api/v1/events?follow=1")
        assert next(lines) is None
        assert next(lines) == {"seq": 0}
        with pytest.raises(DuendeError):
            next(lines)


@pytest.fixture
def interrupted() -> Iterator[None]:
    """Every tenth of a second a signal; a program that is stopped and goes on sees the same."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("noise", [[], ["interrupted"]], ids=["in silence", "under signals"])
def test_a_daemon_that_takes_no_connection_is_waited_for_two_seconds(
    directory: Path, noise: list[str], request: pytest.FixtureRequest
) -> None:
    for each in noise:
        request.getfixturevalue(each)
    path = f"{directory}/api.sock"
    with socket.socket(socket.AF_UNIX) as stuck:
        stuck.bind(path)
        stuck.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(path)
            began = time.monotonic()
            with pytest.raises(DaemonLostError, match="takes no connection"):
                DaemonClient(path).get("/api/v1/holds")
            assert 1.5 < time.monotonic() - began < 8


def test_what_is_not_there_and_what_nobody_listens_at_is_no_daemon(directory: Path) -> None:
    path = f"{directory}/api.sock"
    with pytest.raises(DaemonNotRunningError):
        DaemonClient(path).get("/")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path)
        with pytest.raises(DaemonNotRunningError) as told:
            DaemonClient(path).get("/")
    assert told.value.hint == "systemctl start duende-ublkd"
    with pytest.raises(DaemonNotRunningError):
        list(DaemonClient(path).follow("/"))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "/run/duende-ublkd"),
        ("", "/run/duende-ublkd"),
        ("/run/user/7/duende-ublkd", "/run/user/7/duende-ublkd"),
        ("/run/x:/run/user/7/duende-ublkd/", "/run/user/7/duende-ublkd"),
        ("/run/my-ublk-server", "/run/duende-ublkd"),
        ("/run/not-duende-ublkd", "/run/duende-ublkd"),
    ],
)
def test_the_run_directory_of_another_unit_is_not_taken_for_the_daemons(
    monkeypatch: pytest.MonkeyPatch, value: str | None, found: str
) -> None:
    """Else a server's `ExecStartPre=duende-ublkd clean` would find no holds where its own unit has its files."""
    if value is None:
        monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    else:
        monkeypatch.setenv("RUNTIME_DIRECTORY", value)
    assert client.run_directory() == found
    assert client.socket_path() == f"{found}/api.sock"


def test_asking_makes_no_directory(directory: Path) -> None:
    missing = directory / "duende-ublkd"
    says(run(missing, "hold", "3"), 1, "the daemon does not run")
    assert not missing.exists()
