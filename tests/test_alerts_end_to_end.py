"""From a verdict to whoever is told, with all that is between: real files, processes, sockets and kills."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from tests.desk_process import PAUSE, Subject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the daemon is root's, and so are its files")

PATIENCE = 60.0
LATE = 0.5  # seconds; on two CPUs that others use, too
SCRIPT = """\
#!/bin/sh
test -e {place}/open || exit 1
echo "$DUENDE_UBLKD_ALERT_STATE $DUENDE_UBLKD_ALERT_KEY" >> {place}/told
"""


class Receiver:
    """A webhook's other end that takes what it gets."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                receiver.bodies.append(json.loads(self.rfile.read(length)))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Nobody reads it."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def told(self) -> list[str]:
        return [f"{body['state']} {body['key']}" for body in self.bodies]


@contextlib.contextmanager
def a_process(place: Path, wish: str) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-m", "tests.desk_process", str(place / "run"), str(place / "config.toml"), wish]
    with (place / "log").open("a") as log:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout
    for line in process.stdout:
        if line.strip() == word:
            return
    raise AssertionError(f"it ended before it said {word}")


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def configure(place: Path, *sinks: str) -> None:
    tables = "\n".join(f"[[alert]]\n{sink}" for sink in sinks)
    (place / "config.toml").write_text(f'[daemon]\nstate_dir = "{place}/state"\nlock_memory = false\n{tables}\n')


def a_command(place: Path) -> str:
    script = place / "tell"
    script.write_text(SCRIPT.format(place=place))
    script.chmod(0o755)
    return f'sink = "command"\ncommand = ["{script}"]\n'


def told_by_command(place: Path) -> list[str]:
    return (place / "told").read_text().splitlines() if (place / "told").exists() else []


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A place whose commands are ended, should their daemon have been killed."""
    (tmp_path / "run").mkdir(mode=0o755)
    yield tmp_path
    for pid in (tmp_path / "pids").read_text().split() if (tmp_path / "pids").exists() else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def test_what_was_raised_before_a_kill_is_told_by_the_next_daemon_in_order_and_once(place: Path) -> None:
    closed = Receiver()
    closed.close()
    configure(place, a_command(place), f'sink = "webhook"\nurl = "http://127.0.0.1:{closed.port}/"\n')
    with a_process(place, "pinned") as process:
        wait_for(process, "saved")  # raised, and both sinks are out of order
    assert told_by_command(place) == []
    (place / "open").touch()
    again = Receiver()
    configure(place, a_command(place), f'sink = "webhook"\nurl = "http://127.0.0.1:{again.port}/"\n')
    try:
        with a_process(place, "nothing") as process:
            wait_for(process, "ready")
            until(lambda: len(told_by_command(place)) >= 2 and len(again.told) >= 2)
        raised, over = told_by_command(place)
        assert (raised.split()[0], over.split()[0]) == ("raised", "over")
        assert raised.split()[1] == over.split()[1]
        assert raised.endswith("/pinned")
        assert again.told == [raised, over]
        assert again.bodies[0]["raised_at"] == again.bodies[1]["raised_at"]
    finally:
        again.close()


def test_a_delivery_whose_end_a_killed_daemon_did_not_hear_is_made_again(place: Path) -> None:
    """The command has written, and goes on: nobody hears that it has taken the notice."""
    script = place / "tell"
    (place / "open").touch()
    script.write_text(SCRIPT.format(place=place) + f"echo $$ >> {place}/pids\nexec sleep 30\n")
    script.chmod(0o755)
    configure(place, f'sink = "command"\ncommand = ["{script}"]\ntimeout = "40s"\n')
    with a_process(place, "pinned") as process:
        wait_for(process, "saved")
        until(lambda: len(told_by_command(place)) == 1)
    a_command(place)  # one that ends
    with a_process(place, "nothing") as process:
        wait_for(process, "ready")
        until(lambda: len(told_by_command(place)) >= 3)
    states = [line.split()[0] for line in told_by_command(place)]
    assert states == ["raised", "raised", "over"]


def test_a_sink_that_hangs_delays_neither_a_deletion_nor_another_sink_nor_the_loop(place: Path) -> None:
    """A command that never ends, a server that never answers, and a name that nobody knows."""
    silent = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # it accepts nothing
    (place / "open").touch()
    hang = f"echo $$ >> {place}/pids; exec sleep 300"
    configure(
        place,
        f'sink = "command"\nname = "hangs"\nseverity = "info"\ncommand = ["/bin/sh", "-c", "{hang}"]\ntimeout = "60s"\n',
        f'sink = "webhook"\nseverity = "info"\nurl = "http://127.0.0.1:{silent.server_address[1]}/"\ntimeout = "60s"\n',
        'sink = "alertmanager"\nseverity = "info"\nurl = "http://name.invalid:9093"\n',
        f'name = "good"\nseverity = "info"\n{a_command(place)}',
    )

    async def story() -> None:
        subject = Subject(str(place / "run"), str(place / "config.toml"))
        await subject.start()
        lags: list[float] = []
        watch = asyncio.ensure_future(_measure(lags))
        bench = subject.bench
        for number in range(5):
            orphan = await bench.an_orphan()
            began = time.monotonic()
            while bench.is_there(orphan):
                await bench.wait(PAUSE)
            assert time.monotonic() - began < 3.0, "its grace is half a second"
            async with asyncio.timeout(PATIENCE):
                while len(told_by_command(place)) <= number:
                    await bench.wait(PAUSE)
        desk = subject.lasting.desk
        async with asyncio.timeout(PATIENCE):
            while desk.stats["good"].delivered < 5:
                await bench.wait(PAUSE)
        watch.cancel()
        waiting = {state.name: state.waiting for state in desk.sinks}
        assert waiting == {"hangs": 5, "webhook": 5, "alertmanager": 5, "good": 0}
        assert max(lags) < LATE, f"the loop stood still for {max(lags):.3f} s"
        print(f"\nthe loop's timers were at most {max(lags) * 1000:.1f} ms late")
        await subject.lasting.close(5.0)
        await subject.carriers.close()
        subject.children.close()

    asyncio.run(story())
    silent.server_close()


async def _measure(lags: list[float]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + 0.01
        await asyncio.sleep(0.01)
        lags.append(loop.time() - due)
