"""`test-alert` as a person meets it: with a daemon, without one, with sinks that take it and sinks that do not."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from duende_ublkd.client import DaemonClient, DaemonLostError
from tests.receivers import Receiver, hang, listening, status
from tests.test_planned import ADaemon, directory, needs_root, run, says

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

__all__ = ["directory"]  # a fixture


@contextmanager
def a_receiver(receiver: Receiver) -> Iterator[Receiver]:
    """One that serves while this thread waits for a command."""
    ready, over = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with listening(receiver):
            ready.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(30)
    try:
        yield receiver
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


def a_configuration(place: Path, *sinks: str) -> tuple[str, str]:
    file = place / "config.toml"
    file.write_text("\n".join(f"[[alert]]\n{sink}\n" for sink in sinks))
    file.chmod(0o600)
    return "--config", str(file)


def hook(receiver: Receiver, more: str = "") -> str:
    return f'sink = "webhook"\nurl = "http://127.0.0.1:{receiver.port}/secret-path"\n{more}'


# --- with a daemon


@needs_root
def test_a_running_daemon_sends_it_and_each_answer_is_a_line(directory: Path) -> None:
    with ADaemon(directory) as daemon:
        done = run(directory, "test-alert")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "mail  took it in 0.10 s: 250 queued\n"
        done = run(directory, "test-alert", "mail", "--json")
        assert json.loads(done.stdout) == [{"sink": "mail", "ok": True, "detail": "250 queued", "seconds": 0.1}]
        assert daemon.source.tested == [None, "mail"]
        says(run(directory, "test-alert", "mial"), 2, "there is no sink mial", "try: ")


@needs_root
def test_an_answer_that_takes_longer_than_any_other_is_waited_for(directory: Path) -> None:
    with ADaemon(directory) as daemon:
        daemon.source.slow_test = 1.0
        client = DaemonClient(f"{directory}/api.sock")
        with pytest.raises(DaemonLostError, match="does not answer"):
            client.post("/api/v1/test-alert", {"sink": None}, answer_within=0.2)
        assert client.post("/api/v1/test-alert", {"sink": None}, answer_within=30.0)[0]["ok"]


@pytest.mark.parametrize(
    "answer", ["{}", "[]", '[{"sink": "mail"}]', '[{"sink": 1, "ok": 1, "detail": 2, "seconds": "x"}]']
)
def test_an_answer_of_another_version_is_told_as_that(directory: Path, answer: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{directory}/api.sock")
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                asked = b""
                while not asked.endswith(b"}"):  # unread, it would have the answer thrown away
                    asked += connection.recv(65536)
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(answer)}\r\nConnection: close\r\n\r\n"
                connection.sendall((head + answer).encode())

        thread = threading.Thread(target=serve)
        thread.start()
        done = run(directory, "test-alert")
        thread.join()
    says(done, 1, "the daemon's answer is not understood", "try: duende-ublkd --version")


# --- without one


def test_without_a_daemon_it_is_sent_all_the_same_and_what_did_not_arrive_is_said(
    directory: Path,
    tmp_path: Path,
) -> None:
    told = tmp_path / "told"
    script = f"import os; open({str(told)!r}, 'w').write(os.environ['DUENDE_UBLKD_ALERT_JSON'])"
    command = json.dumps([os.path.realpath(sys.executable), "-c", script])
    with a_receiver(Receiver()) as well, a_receiver(Receiver(status(500, "out of cheese"))) as sick:
        config = a_configuration(
            tmp_path,
            hook(well, 'severity = "critical"\n'),
            hook(sick, 'name = "sick"\n'),
            f'sink = "command"\ncommand = {command}\n',
        )
        done = run(directory, "test-alert", *config)
        assert done.returncode == 1, done.stderr
        assert "this command sends the alert by itself" in done.stderr
        lines = done.stdout.splitlines()
        assert re.fullmatch(rf"webhook  took it in \d+\.\d\d s: taken by 127\.0\.0\.1:{well.port}", lines[0])
        assert re.fullmatch(r"sick     DID NOT TAKE IT, after \d+\.\d\d s: HTTP 500: out of cheese", lines[1])
        assert lines[2].startswith("command  took it in ")
        (notice,) = [request.json for request in well.requests]
        assert (notice["state"], notice["kind"], notice["host"]) == ("test", "test", socket.gethostname())
        assert json.loads(told.read_text())["state"] == "test"
        assert "secret-path" not in done.stdout + done.stderr


@needs_root
def test_a_configuration_that_is_named_is_tried_without_the_daemon(directory: Path, tmp_path: Path) -> None:
    with ADaemon(directory) as daemon, a_receiver(Receiver()) as well:
        done = run(directory, "test-alert", "webhook", "--json", *a_configuration(tmp_path, hook(well)))
        assert (done.returncode, [each["sink"] for each in json.loads(done.stdout)]) == (0, ["webhook"])
        assert daemon.source.tested == []
        says(done, 0, "another configuration is named")


def test_a_sink_that_hangs_is_given_up_and_no_process_is_left_behind(directory: Path, tmp_path: Path) -> None:
    with a_receiver(Receiver(behaviour=hang)) as deaf:
        done = run(directory, "test-alert", *a_configuration(tmp_path, hook(deaf, 'timeout = "1s"\n')))
    assert done.returncode == 1
    assert f"127.0.0.1:{deaf.port} does not answer: given up after 1 s" in done.stdout
    here = f"RUNTIME_DIRECTORY={directory}".encode()
    assert [pid for pid in _pids() if here in _environment(pid)] == []


def _pids() -> list[int]:
    return [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()]


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def test_a_dry_run_sends_nothing_and_says_to_whom_it_would(directory: Path, tmp_path: Path) -> None:
    with a_receiver(Receiver()) as well:
        config = a_configuration(tmp_path, hook(well), hook(well, 'name = "other"\n'))
        done = run(directory, "test-alert", "--dry-run", *config)
        assert done.returncode == 0
        assert len(done.stdout.splitlines()) == 2
        assert done.stdout.startswith(f"would get a test alert: webhook to http://127.0.0.1:{well.port}/...")
        done = run(directory, "test-alert", "other", "--dry-run", "--json", *config)
        assert json.loads(done.stdout) == [{"sink": "other", "kind": "webhook", "dry_run": True}]
        assert well.connections == 0


@pytest.mark.parametrize("option", [(), ("--dry-run",)])
def test_wrong_use_says_what_to_do(directory: Path, tmp_path: Path, option: tuple[str, ...]) -> None:
    def tried(sink: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(directory, "test-alert", *option, *arguments, *a_configuration(tmp_path, sink))

    mail: Any = 'sink = "mail"\nto = ["a@b.example"]\nfrom = "c@d.example"\nserver = "localhost:25"\n'
    says(tried(mail, "mial"), 2, "has no sink with the name mial", 'try: did you mean "mail"?')
    says(tried(mail, "\x1b[2J"), 2, r"has no sink with the name \x1b[2J", "possible here: mail")
    says(tried('sink = "mial"\n'), 2, "config.toml:2", "mail")
    done = run(directory, "test-alert", *option, "--config", str(_empty(tmp_path)))
    says(done, 2, "has no [[alert]]: nobody is told of anything", 'try: add a table, such as: [[alert]] sink = "alertm')


def _empty(place: Path) -> Path:
    file = place / "empty.toml"
    file.touch(0o600)
    return file
