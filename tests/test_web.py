"""HTTP over TCP and over the unix socket: who may do what, and that no client can do harm to another or to the daemon."""

import asyncio
import contextlib
import gc
import json
import logging
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duende_ublkd.client import DaemonClient, DaemonLostError, DaemonNotRunningError
from duende_ublkd.core.errors import DuendeError, UsageError
from duende_ublkd.core.holds import LONGEST_TIME, Hold, NotAllowedError, Released, may_change
from duende_ublkd.core.model import Event, EventKind, Judged, Level
from duende_ublkd.core.text import printable
from duende_ublkd.report.metrics import Metrics
from duende_ublkd.report.store import Record
from duende_ublkd.report.web import Times, WebServer, _Pace
from tests.test_report import a_device

PORT = 19116
NOBODY = 65534
OWNER = 1000  # of ublk3

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users")


def a_record(seq: int, *, dev_id: int | None = 3, text: str = "it happened", **facts: object) -> Record:
    return Record(seq, Event(1_700_000_000.5 + seq % 1000, EventKind.VERDICT, Level.WARNING, text, dev_id, facts))


@dataclass(frozen=True)
class APage:
    body: bytes = "<!doctype html><title>ublk — \u202e</title>".encode()
    policy: str = "default-src 'none'"


@dataclass
class ASource:
    """The daemon's rules of holds, and a journal in memory."""

    devices: dict[int, Judged] = field(default_factory=dict)
    is_ready: bool = True
    journal: list[Record] = field(default_factory=list)
    problem: str = ""
    failure: Exception | None = None
    taken: int = 0  # records that followers fetched
    following: int = 0
    reloads: int = 0
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    held: dict[int, Hold] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)
    overdue: dict[int, str] = field(default_factory=dict)
    slow_reload: float = 0.0
    tested: list[str | None] = field(default_factory=list)
    slow_test: float = 0.0

    def __post_init__(self) -> None:
        self.changed = asyncio.Event()

    @property
    def holds(self) -> list[Hold]:
        return list(self.held.values())

    @property
    def records(self) -> dict[int, dict[str, Any]]:
        return {dev_id: {"first_seen": 1.5} for dev_id in self.devices}

    def hold(self, dev_id: int, seconds: float, why: str, uid: int) -> Hold:
        self.asked.append((dev_id, seconds, why, uid))
        if self.failure:
            raise self.failure
        self._check(dev_id, uid)
        now = time.monotonic()
        self.held[dev_id] = Hold(dev_id, now, now + seconds, uid, why, None if uid == 0 else 77)
        return self.held[dev_id]

    def release(self, dev_id: int, uid: int) -> Released:
        self._check(dev_id, uid)
        return Released(self.held.pop(dev_id, None), self.attempts.pop(dev_id, 0), self.overdue.pop(dev_id, ""))

    def _check(self, dev_id: int, uid: int) -> None:
        if not may_change(uid, self.held.get(dev_id), OWNER if dev_id == 3 else None):
            raise NotAllowedError(f"ublk{dev_id} is not yours", hint=f"sudo duende-ublkd hold {dev_id}")

    def page(self) -> APage:
        return APage()

    def status(self) -> dict[str, Any]:
        return {"version": "1", "devices": len(self.devices)}

    def alerts(self) -> dict[str, Any]:
        return {"alerts": [], "sinks": [{"name": "mail"}]}

    async def test_alert(self, sink: str | None) -> list[Mapping[str, Any]]:
        if sink not in (None, "mail"):
            raise UsageError(f"there is no sink {printable(sink)}", hint="mail")
        await asyncio.sleep(self.slow_test)
        self.tested.append(sink)
        return [{"sink": "mail", "ok": True, "detail": "250 queued", "seconds": 0.1}]

    async def reload(self) -> str:
        await asyncio.sleep(self.slow_reload)
        self.reloads += 1
        return self.problem

    async def read_events(
        self, *, after: int, limit: int, dev_id: int | None, since: float | None
    ) -> tuple[list[Record], str]:
        found = [
            record
            for record in self.journal
            if record.seq > after
            and dev_id in (None, record.event.dev_id)
            and (since is None or record.event.at >= since)
        ]
        return found[-limit:] if limit else [], "a note"

    def add(self, *records: Record) -> None:
        self.journal += records
        self.changed.set()

    async def follow_events(self, after: int) -> AsyncIterator[Record]:
        self.following += 1
        place = sum(record.seq <= after for record in self.journal)
        try:
            while True:
                if self.failure:
                    raise self.failure
                if place < len(self.journal):
                    place += 1
                    self.taken += 1
                    yield self.journal[place - 1]
                else:
                    self.changed.clear()
                    await self.changed.wait()
        finally:
            self.following -= 1


@dataclass
class AServed:
    """A source with both of its addresses."""

    source: ASource
    path: str
    local: WebServer
    tcp: WebServer

    @property
    def client(self) -> DaemonClient:
        return DaemonClient(self.path)

    async def ask(self, method: str, path: str, body: object = None) -> Any:  # noqa: ANN401
        """What the daemon answers to a command."""
        if method == "GET":
            return await asyncio.to_thread(self.client.get, path)
        assert isinstance(body, dict)
        return await asyncio.to_thread(self.client.post, path, body)

    async def raw(self, data: bytes, *, tcp: bool = False) -> bytes:
        """What comes back for these bytes until the server closes."""
        reader, writer = await self.connect(tcp=tcp)
        try:
            writer.write(data)
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(10):
                    return await reader.read(-1)
            return b""
        finally:
            writer.transport.abort()

    async def connect(self, *, tcp: bool = False) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if tcp:
            return await asyncio.open_connection("127.0.0.1", PORT)
        return await asyncio.open_unix_connection(self.path)


Test = Callable[[AServed], Awaitable[None]]


@pytest.fixture
def directory() -> Iterator[str]:
    """A directory that other users may enter, other than pytest's."""
    path = tempfile.mkdtemp(prefix="duende-web-")
    Path(path).chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def path(directory: str) -> str:
    return f"{directory}/api.sock"


def serve(path: str, test: Test, times: Times | None = None, **source: Any) -> None:  # noqa: ANN401
    async def run() -> None:
        served = ASource(**source)
        local, tcp = WebServer(served, Metrics(), times), WebServer(served, Metrics(), times)
        await local.listen_local(path)
        await tcp.listen("127.0.0.1", PORT)
        try:
            await test(AServed(served, path, local, tcp))
        finally:
            await local.close()
            await tcp.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    asyncio.run(run())


def fetch(path: str, body: bytes | None = None) -> tuple[int, str]:
    """Over TCP."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", body, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def a_request(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: here", "Connection: close", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def parse(answer: bytes) -> tuple[int, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


async def until(condition: Callable[[], bool], deadline: float = 10.0) -> None:
    async with asyncio.timeout(deadline):
        while not condition():
            await asyncio.sleep(0.01)


# --- looking


def test_the_pages_answer_over_tcp_and_over_the_socket(path: str) -> None:
    async def look(served: AServed) -> None:
        def get(path: str) -> tuple[int, str]:
            return fetch(path)

        assert await asyncio.to_thread(get, "/-/healthy") == (200, "healthy\n")
        assert await asyncio.to_thread(get, "/-/ready") == (200, "ready\n")
        served.source.is_ready = False
        assert await asyncio.to_thread(get, "/-/ready") == (503, "not ready\n")
        assert "duende_ublkd_build_info" in (await asyncio.to_thread(get, "/metrics"))[1]
        assert json.loads((await asyncio.to_thread(get, "/api/v1/devices"))[1])[0]["dev_id"] == 3
        assert (await served.ask("GET", "/api/v1/devices"))[0]["dev_id"] == 3
        status, body = await asyncio.to_thread(get, "/nowhere")
        assert status == 404
        assert json.loads(body)["error"] == "there is nothing at /nowhere"
        with pytest.raises(UsageError, match="nothing at /nowhere") as told:
            await served.ask("GET", "/nowhere")
        assert "/api/v1/holds" in told.value.hint

    serve(path, look, devices={3: a_device()})


def test_the_page_comes_with_its_policy_and_is_not_kept_by_anybody(path: str) -> None:
    async def look(served: AServed) -> None:
        for tcp in (True, False):
            head, _, body = (await served.raw(a_request("GET", "/"), tcp=tcp)).decode().partition("\r\n\r\n")
            assert body.encode() == APage().body
            for line in (
                "HTTP/1.1 200 OK",
                "Content-Type: text/html; charset=utf-8",
                "Content-Security-Policy: default-src 'none'",
                "X-Content-Type-Options: nosniff",
                "Referrer-Policy: no-referrer",
                "Cache-Control: no-store",
            ):
                assert line in head.split("\r\n"), line

    serve(path, look)


@pytest.mark.parametrize("where", ["/metrics", "/-/healthy", "/api/v1/status", "/nowhere"])
def test_every_answer_is_of_this_moment_and_of_the_kind_that_it_says(path: str, where: str) -> None:
    async def look(served: AServed) -> None:
        head = (await served.raw(a_request("GET", where))).partition(b"\r\n\r\n")[0].split(b"\r\n")
        assert b"Cache-Control: no-store" in head
        assert b"X-Content-Type-Options: nosniff" in head

    serve(path, look)


def test_the_status_and_the_alerts_are_the_sources(path: str) -> None:
    async def look(served: AServed) -> None:
        assert await served.ask("GET", "/api/v1/status") == {"version": "1", "devices": 1}
        assert await served.ask("GET", "/api/v1/alerts") == {"alerts": [], "sinks": [{"name": "mail"}]}

    serve(path, look, devices={3: a_device()})


def test_holds_are_told_with_every_field(path: str) -> None:
    async def look(served: AServed) -> None:
        served.source.held[3] = Hold(3, time.monotonic() - 10, time.monotonic() + 60, 0, "new kernel")
        (hold,) = await served.ask("GET", "/api/v1/holds")
        since, until = (datetime.fromisoformat(hold.pop(name)) for name in ("since", "until"))
        assert 69.9 < (until - since).total_seconds() < 70.1
        assert -1 < time.time() + 60 - until.timestamp() < 5
        assert 55 < hold.pop("seconds_left") <= 60
        assert hold == {"dev_id": 3, "uid": 0, "why": "new kernel", "whatever_has_the_id": True}

    serve(path, look)


@needs_root
def test_what_is_remembered_is_believed_of_root_alone(path: str) -> None:
    async def look(served: AServed) -> None:
        def remembered() -> Any:  # noqa: ANN401
            return served.client.get("/api/v1/records", trusted=True)

        assert await asyncio.to_thread(remembered) == [{"dev_id": 3, "record": {"first_seen": 1.5}}]
        impostor = await asyncio.to_thread(
            subprocess.Popen,
            [sys.executable, "-I", "-S", "-c", _IMPOSTOR, f"{served.path}.2"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert impostor.stdout
        await asyncio.to_thread(impostor.stdout.readline)
        with pytest.raises(DuendeError, match="is uid 65534, and not root"):
            DaemonClient(f"{served.path}.2").get("/api/v1/records", trusted=True)
        await asyncio.to_thread(impostor.communicate)

    serve(path, look, devices={3: a_device()})


_IMPOSTOR = """
import os, socket, sys
channel = socket.socket(socket.AF_UNIX)
channel.bind(sys.argv[1])
os.setgroups([]), os.setgid(65534), os.setuid(65534)
channel.listen()
print("there", flush=True)
sys.stdin.read()
"""


def test_events_are_filtered_and_told_with_every_field(path: str) -> None:
    async def look(served: AServed) -> None:
        served.source.add(a_record(1, dev_id=None), a_record(2, more=1), a_record(3, dev_id=4), a_record(5))
        answer = await served.ask("GET", "/api/v1/events")
        assert answer["note"] == "a note"
        assert answer["events"][1] == {
            "seq": 2,
            "at": "2023-11-14T22:13:22.500+00:00",
            "kind": "verdict",
            "level": "warning",
            "dev_id": 3,
            "text": "it happened",
            "facts": {"more": 1},
        }

        async def seqs(query: str) -> list[int]:
            return [event["seq"] for event in (await served.ask("GET", f"/api/v1/events?{query}"))["events"]]

        assert await seqs("") == [1, 2, 3, 5]
        assert await seqs("after=2") == [3, 5]
        assert await seqs("dev_id=3&limit=1") == [5]
        assert await seqs("limit=0") == []
        assert await seqs("since=1700000003.5") == [3, 5]

    serve(path, look)


@pytest.mark.parametrize(
    "query",
    [
        "after=-1", "after=x", "after=", "after=9223372036854775808", "after=%D9%A3", "limit=1001", "limit=1.5",
        "dev_id=1048576", "since=nan", "since=inf", "since=", "follow=2", "follow=true", "x=1", "%00=1",
    ],
)  # fmt: skip
def test_a_parameter_that_makes_no_sense_is_an_error_with_a_hint(path: str, query: str) -> None:
    async def look(served: AServed) -> None:
        with pytest.raises(UsageError) as told:
            await served.ask("GET", f"/api/v1/events?{query}")
        assert told.value.hint
        assert str(told.value).isprintable()

    serve(path, look)


# --- changing


@needs_root
def test_root_may_hold_and_release_over_the_socket(path: str) -> None:
    async def change(served: AServed) -> None:
        hold = await served.ask("POST", "/api/v1/hold", {"dev_id": 5, "seconds": 60, "why": "new\nkernel \udc80"})
        assert served.source.asked == [(5, 60.0, "new\\nkernel \\x80", 0)]
        assert (hold["dev_id"], hold["uid"], hold["why"]) == (5, 0, "new\\nkernel \\x80")
        await served.ask("POST", "/api/v1/hold", {"dev_id": 6})
        assert served.source.asked[1] == (6, 600.0, "", 0)
        assert (await served.ask("POST", "/api/v1/release", {"dev_id": 5}))["released"]["dev_id"] == 5
        assert (await served.ask("POST", "/api/v1/release", {"dev_id": 5}))["released"] is None

    serve(path, change)


_AS_ANOTHER = """
import http.client, json, os, socket, sys
os.setgroups([]), os.setgid(int(sys.argv[3])), os.setuid(int(sys.argv[3]))
for method, path, body in json.loads(sys.argv[2]):
    connection = http.client.HTTPConnection("here", timeout=20)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(sys.argv[1])
    connection.request(method, path, body)
    answer = connection.getresponse()
    print(json.dumps([answer.status, json.loads(answer.read())]), flush=True)
"""


async def ask_as(uid: int, path: str, *requests: tuple[str, str, object]) -> list[tuple[int, Any]]:
    """What a process of another user is answered."""
    encoded = [(method, where, None if body is None else json.dumps(body)) for method, where, body in requests]
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-I", "-S", "-c", _AS_ANOTHER, path, json.dumps(encoded), str(uid)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [(status, body) for status, body in map(json.loads, done.stdout.splitlines())]


@needs_root
def test_another_user_may_look_at_everything_and_change_what_is_his(path: str) -> None:
    async def change(served: AServed) -> None:
        answers = await ask_as(
            OWNER,
            path,
            ("GET", "/api/v1/devices", None),
            ("GET", "/api/v1/holds", None),
            ("GET", "/api/v1/events", None),
            ("POST", "/api/v1/hold", {"dev_id": 4}),
            ("POST", "/api/v1/hold", {"dev_id": 3, "seconds": 5}),
            ("POST", "/api/v1/release", {"dev_id": 3}),
        )
        assert [status for status, _ in answers] == [200, 200, 200, 403, 200, 200]
        assert served.source.asked == [(4, 600.0, "", OWNER), (3, 5.0, "", OWNER)]
        assert answers[3][1] == {"error": "ublk4 is not yours", "hint": "sudo duende-ublkd hold 4"}
        assert answers[4][1]["uid"] == OWNER
        assert answers[4][1]["whatever_has_the_id"] is False

    serve(path, change)


@needs_root
def test_who_owns_nothing_changes_nothing_and_what_root_has_set_is_roots(path: str) -> None:
    async def change(served: AServed) -> None:
        await served.ask("POST", "/api/v1/hold", {"dev_id": 3})
        requests: tuple[tuple[str, str, object], ...] = (
            ("POST", "/api/v1/hold", {"dev_id": 3}),
            ("POST", "/api/v1/release", {"dev_id": 3}),
            ("POST", "/-/reload", {}),
            ("POST", "/api/v1/test-alert", {}),
        )
        for uid in (NOBODY, OWNER):
            assert [status for status, _ in await ask_as(uid, path, *requests)] == [403, 403, 403, 403]
        assert served.source.held[3].uid == 0
        assert served.source.tested == []
        assert served.source.reloads == 0

    serve(path, change)


@needs_root
def test_root_may_reload_and_hears_why_the_old_configuration_stays(path: str) -> None:
    async def change(served: AServed) -> None:
        assert await served.ask("POST", "/-/reload", {}) == {"reloaded": True}
        served.source.problem = "config.toml:2: no"
        with pytest.raises(UsageError, match=r"config\.toml:2: no") as told:
            await served.ask("POST", "/-/reload", {})
        assert not told.value.hint, "which file it is, and what to type, stands in the problem"
        assert served.source.reloads == 2

    serve(path, change)


@needs_root
def test_root_may_have_alerts_sent_and_waits_for_the_slowest_sink(path: str) -> None:
    async def change(served: AServed) -> None:
        (answer,) = await served.ask("POST", "/api/v1/test-alert", {"sink": "mail"})
        assert answer["detail"] == "250 queued"
        assert await served.ask("POST", "/api/v1/test-alert", {})
        assert served.source.tested == ["mail", None]
        with pytest.raises(UsageError, match="there is no sink male") as told:
            await served.ask("POST", "/api/v1/test-alert", {"sink": "male"})
        assert told.value.hint == "mail"
        with pytest.raises(UsageError, match="sink has to be the name of one"):
            await served.ask("POST", "/api/v1/test-alert", {"sink": 3})

    serve(path, change, Times(patience=0.2), slow_test=0.8)


@needs_root
def test_a_reload_goes_on_without_the_one_who_asked(path: str) -> None:
    async def leave(served: AServed) -> None:
        _, writer = await served.connect()
        writer.write(a_request("POST", "/-/reload"))
        await asyncio.sleep(0.2)
        assert served.source.reloads == 0
        writer.transport.abort()
        await until(lambda: served.source.reloads == 1)

    serve(path, leave, slow_reload=0.5)


@pytest.mark.parametrize("where", ["/api/v1/hold", "/api/v1/release", "/-/reload", "/api/v1/test-alert"])
def test_over_tcp_nothing_can_be_changed_and_the_answer_names_the_way(path: str, where: str) -> None:
    async def change(served: AServed) -> None:
        status, body = await asyncio.to_thread(fetch, where, b'{"dev_id": 3}')
        assert status == 403
        answer = json.loads(body)
        assert "nothing can be changed from here" in answer["error"]
        assert "duende-ublkd" in answer["hint"]
        assert "api.sock" in answer["hint"]
        assert (served.source.asked, served.source.reloads, served.source.tested) == ([], 0, [])

    serve(path, change)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff", "JSON"),
        (b"[" * 4000, "JSON"),
        (b"[]", "object"),
        (b"3", "object"),
        (b"null", "object"),
        (b"{}", "dev_id"),
        (b'{"dev_id": "3"}', "dev_id"),
        (b'{"dev_id": true}', "dev_id"),
        (b'{"dev_id": 3.0}', "dev_id"),
        (b'{"dev_id": -1}', "dev_id"),
        (b'{"dev_id": 1048576}', "dev_id"),
        (b'{"dev_id": ' + b"9" * 4000 + b"}", "dev_id"),
        (b'{"dev_id": 3, "seconds": 0}', "seconds"),
        (b'{"dev_id": 3, "seconds": true}', "seconds"),
        (b'{"dev_id": 3, "seconds": "60"}', "seconds"),
        (b'{"dev_id": 3, "seconds": null}', "seconds"),
        (b'{"dev_id": 3, "seconds": NaN}', "seconds"),
        (b'{"dev_id": 3, "seconds": Infinity}', "seconds"),
        (b'{"dev_id": 3, "seconds": 1e999}', "seconds"),
        (b'{"dev_id": 3, "seconds": 2592001}', "seconds"),
        (b'{"dev_id": 3, "why": 7}', "why"),
        (b'{"dev_id": 3, "id": 3}', "'id'"),
        (b'{"dev_id": 3, "\\n": 3}', "'\\\\n'"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_body_that_is_not_as_it_should_be_is_an_error_and_nothing_is_done(path: str, body: bytes, word: str) -> None:
    async def send(served: AServed) -> None:
        status, answer = parse(await served.raw(a_request("POST", "/api/v1/hold", body)))
        assert status == 400
        assert word in answer["error"]
        assert answer["hint"]
        assert served.source.asked == []

    serve(path, send)


def test_a_body_that_is_too_long_is_not_read(path: str) -> None:
    async def send(served: AServed) -> None:
        for size in (4097, 1 << 22):
            status, answer = parse(await served.raw(a_request("POST", "/api/v1/hold", b" " * size)))
            assert status == 413
            assert "longer than 4096 bytes" in answer["error"]
        bomb = a_request("POST", "/api/v1/hold", b"x\x9c", "Content-Encoding: deflate")
        assert parse(await served.raw(bomb))[0] == 400

    serve(path, send)


_bodies = (
    st.binary(max_size=60)
    | st.dictionaries(
        st.sampled_from(["dev_id", "seconds", "why", "uid"]),
        st.integers() | st.floats() | st.text(max_size=300) | st.none() | st.booleans() | st.just([3]),
        max_size=4,
    ).map(lambda value: json.dumps(value).encode())
)  # fmt: skip


def test_no_body_brings_a_traceback_or_a_hold_that_cannot_be(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """One server for all examples: none may spoil it for the next."""
    loop = asyncio.new_event_loop()
    source = loop.run_until_complete(_make_source())
    server = loop.run_until_complete(_listen_local(source, path))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    @settings(max_examples=150)
    @given(st.sampled_from(["/api/v1/hold", "/api/v1/release"]), _bodies)
    def fuzz(where: str, body: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(20)
            channel.connect(path)
            channel.sendall(a_request("POST", where, body))
            answer = b"".join(iter(lambda: channel.recv(1 << 16), b""))
        status, value = parse(answer)
        assert status in (200, 400, 403)
        if status != 200:
            assert value["error"].isprintable()
        while source.asked:
            dev_id, seconds, why, uid = source.asked.pop()
            assert 0 <= dev_id < 1 << 20
            assert 1 <= seconds <= LONGEST_TIME
            assert why.isprintable()
            assert len(why) <= 200
            assert uid == os.geteuid()

    try:
        fuzz()
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    assert caplog.text == ""


async def _make_source() -> ASource:
    return ASource()


async def _listen_local(source: ASource, path: str) -> WebServer:
    server = WebServer(source, Metrics())
    await server.listen_local(path)
    return server


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: here\r\n\r\n",
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
        b"POST /api/v1/hold HTTP/1.1\r\nHost: here\r\nContent-Length: -1\r\n\r\n",
        b"POST /api/v1/hold HTTP/1.1\r\nHost: here\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /api/v1/hold HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        b"POST /api/v1/hold HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n" + b"fff\r\n" + b"x" * 8192,
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_http_is_refused_without_a_word_in_the_log(
    path: str, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def send(served: AServed) -> None:
        for tcp in (False, True):
            answer = await served.raw(data, tcp=tcp)
            assert b"Traceback" not in answer
            assert answer == b"" or answer.split()[1] in (b"400", b"403", b"404", b"413"), answer
        assert served.source.asked == []
        assert (await served.ask("GET", "/api/v1/holds")) == []

    with caplog.at_level(logging.INFO):
        serve(path, send, Times(patience=1.0))
    assert [record for record in caplog.records if record.name != "asyncio"] == []


def test_a_defect_is_a_plain_sentence_for_the_client_and_a_traceback_for_the_log(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def send(served: AServed) -> None:
        answer = await served.raw(a_request("POST", "/api/v1/hold", b'{"dev_id": 3}'))
        assert parse(answer)[0] == 500
        assert b"secret" not in answer
        with pytest.raises(DuendeError, match="its log has the reason"):
            await served.ask("POST", "/api/v1/hold", {"dev_id": 3})

    serve(path, send, failure=RuntimeError("secret"))
    assert "RuntimeError: secret" in caplog.text


def test_what_cannot_be_done_now_is_told_with_its_hint(path: str) -> None:
    async def send(served: AServed) -> None:
        with pytest.raises(DuendeError, match="no space") as told:
            await served.ask("POST", "/api/v1/hold", {"dev_id": 3})
        assert told.value.hint == "df /run"
        assert not isinstance(told.value, UsageError)

    serve(path, send, failure=DuendeError("no space", hint="df /run"))


def test_a_wrong_method_says_which_is_right(path: str) -> None:
    async def send(served: AServed) -> None:
        answer = await served.raw(a_request("POST", "/api/v1/devices", b"{}"))
        assert parse(answer)[0] == 405
        assert b"Allow: GET, HEAD" in answer

    serve(path, send)


def _stop_reading(writer: asyncio.StreamWriter) -> None:
    assert isinstance(writer.transport, asyncio.Transport)
    writer.transport.pause_reading()


def test_a_head_has_limits(path: str) -> None:
    async def send(served: AServed) -> None:
        def lines(count: int) -> list[str]:
            return [f"X-{n}: y" for n in range(count - 3)]  # a_request has three

        for tcp in (True, False):
            assert b" 200 " in (await served.raw(a_request("GET", "/-/healthy", b"", *lines(48)), tcp=tcp))[:20]
            assert b" 400 " in (await served.raw(a_request("GET", "/-/healthy", b"", *lines(50)), tcp=tcp))[:20]
            assert b" 200 " in (await served.raw(a_request("GET", "/-/healthy", b"", f"X: {'y' * 4000}"), tcp=tcp))[:20]
            assert b" 400 " in (await served.raw(a_request("GET", "/-/healthy", b"", f"X: {'y' * 4200}"), tcp=tcp))[:20]
            assert b" 400 " in (await served.raw(a_request("GET", f"/?{'y' * 4200}"), tcp=tcp))[:20]

    serve(path, send)


def test_after_an_answer_the_loop_has_four_times_as_long_for_itself() -> None:
    async def spend() -> None:
        loop = asyncio.get_running_loop()
        pace = _Pace(loop.create_future())
        await pace.turn(0.0)
        began = loop.time()
        with pace.measured():
            time.sleep(0.05)
        await asyncio.gather(pace.turn(0.01), pace.turn(0.01))
        assert 0.25 + 0.05 <= loop.time() - began < 5

    asyncio.run(spend())


@needs_root
def test_root_does_not_wait_until_others_have_been_answered(path: str) -> None:
    async def ask(served: AServed) -> None:
        for server in (served.local, served.tcp):
            server.pace._free_at = asyncio.get_running_loop().time() + 2
        began = time.monotonic()
        assert await served.ask("GET", "/api/v1/holds") == []
        assert time.monotonic() - began < 1.5
        assert (await asyncio.to_thread(fetch, "/-/healthy"))[0] == 200
        assert time.monotonic() - began >= 2

    serve(path, ask)


@pytest.mark.parametrize("where", ["/metrics", "/nowhere"])
def test_an_expectation_that_nobody_meets_waits_for_its_turn_as_every_question_does(path: str, where: str) -> None:
    """aiohttp answers it by itself, before anything of ours is asked."""
    question = f"GET {where} HTTP/1.1\r\nHost: here\r\nExpect: x\r\n\r\n".encode()

    async def ask(served: AServed) -> None:
        for tcp in (True, False):
            reader, writer = await served.connect(tcp=tcp)
            writer.write(question)
            await reader.readuntil(b"Expectation Failed\r\n")
            for server in (served.local, served.tcp):
                server.pace._free_at = asyncio.get_running_loop().time() + 1
            began = time.monotonic()
            writer.write(question)
            async with asyncio.timeout(10):
                await reader.readuntil(b"Expectation Failed\r\n")
            took = time.monotonic() - began
            assert took >= 0.99 if tcp or os.geteuid() != 0 else took < 0.9, "root alone is not made to wait"
            writer.transport.abort()

    serve(path, ask)


def test_what_is_expected_and_can_be_met_is(path: str) -> None:
    async def ask(served: AServed) -> None:
        body = b'{"dev_id": 3}'
        answer = await served.raw(a_request("POST", "/api/v1/hold", body, "Expect: 100-continue"), tcp=True)
        assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 403 ")

    serve(path, ask)


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"])
def test_rubbish_waits_for_its_turn_as_a_question_does(path: str, data: bytes) -> None:
    async def send(served: AServed) -> None:
        served.tcp.pace._free_at = asyncio.get_running_loop().time() + 1
        began = time.monotonic()
        assert b" 400 " in (await served.raw(data, tcp=True))[:20]
        assert time.monotonic() - began >= 0.99
        assert served.tcp.pace._free_at > asyncio.get_running_loop().time() - 0.5, "and the next one waits for it"

    serve(path, send)


def test_a_client_that_waits_for_its_first_turn_is_not_waited_for_at_the_end(path: str) -> None:
    async def leave(served: AServed) -> None:
        served.tcp.pace._free_at = asyncio.get_running_loop().time() + 60
        clients = [await served.connect(tcp=True) for _ in range(3)]
        await until(lambda: len(served.tcp._crowd) == 3)
        clients[0][1].transport.abort()
        began = time.monotonic()
        await served.tcp.close()
        assert time.monotonic() - began < 4
        await until(lambda: len(served.tcp._crowd) == 0)
        for _, writer in clients:
            writer.transport.abort()

    serve(path, leave)


def test_a_client_that_asks_and_asks_is_read_no_further_than_a_queue(path: str) -> None:
    """What is read and not answered yet stays in memory that is locked. What the kernel holds meanwhile is its own."""

    async def ask(served: AServed) -> None:
        loop = asyncio.get_running_loop()
        most = 1 << 24
        with socket.create_connection(("127.0.0.1", PORT)) as channel:
            channel.setblocking(False)
            await until(lambda: any(each._http for each in served.tcp._crowd))  # it is read from now on
            served.tcp.pace._free_at = loop.time() + 60
            taken, quiet_since = 0, loop.time()
            while loop.time() - quiet_since < 1 and taken < most:
                with contextlib.suppress(BlockingIOError):
                    taken += channel.send(b"GET /-/healthy HTTP/1.1\r\nHost: here\r\n\r\n" * 1000)
                    quiet_since = loop.time()
                await asyncio.sleep(0)
            assert taken < most

    serve(path, ask)


# --- crowds


def test_clients_beyond_the_limit_are_turned_away_and_the_other_address_is_served(path: str) -> None:
    async def crowd(served: AServed) -> None:
        idle = [await served.connect(tcp=True) for _ in range(70)]
        async with asyncio.timeout(10):
            refused = await asyncio.gather(*(reader.read(1) for reader, _ in idle[64:]))
        assert refused == [b""] * 6
        assert await served.ask("GET", "/api/v1/holds") == []
        for _, writer in idle:
            writer.close()
            await writer.wait_closed()
        assert (await asyncio.to_thread(fetch, "/-/healthy"))[0] == 200

    serve(path, crowd)


def test_clients_that_come_all_at_once_are_counted_one_by_one(path: str) -> None:
    """A listener takes a whole backlog before any of its connections is made."""

    async def crowd(served: AServed) -> None:
        channels = [socket.create_connection(("127.0.0.1", PORT)) for _ in range(90)]
        assert served.tcp._runner
        assert served.tcp._runner.server
        server = served.tcp._runner.server
        await until(lambda: len(server.connections) >= 64)
        await asyncio.sleep(0.2)
        assert len(server.connections) == 64
        for channel in channels:
            channel.close()

    serve(path, crowd)


_IDLERS = """
import os, select, socket, sys
os.setgroups([]), os.setgid(65534), os.setuid(65534)
idle = [socket.socket(socket.AF_UNIX) for _ in range(int(sys.argv[2]))]
poll = select.poll()
for channel in idle:
    channel.connect(sys.argv[1])
    poll.register(channel, select.POLLIN)
turned_away = 0
while ended := poll.poll(1000):
    turned_away += len(ended)
    for fd, _ in ended:
        poll.unregister(fd)
print(turned_away, flush=True)
sys.stdin.read()
"""


@needs_root
def test_a_user_who_takes_every_place_does_not_lock_out_root(path: str) -> None:
    async def crowd(served: AServed) -> None:
        idlers = await asyncio.to_thread(
            subprocess.Popen,
            [sys.executable, "-I", "-S", "-c", _IDLERS, path, "66"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert idlers.stdout
        assert int(await asyncio.to_thread(idlers.stdout.readline)) == 2
        of_root = [await served.connect() for _ in range(7)]
        assert await served.ask("GET", "/api/v1/holds") == []  # the eighth
        of_root.append(await served.connect())
        await asyncio.sleep(0.1)
        with pytest.raises(DaemonLostError, match="too many clients"):
            await served.ask("GET", "/api/v1/holds")
        for _, writer in of_root:
            writer.transport.abort()
        await asyncio.to_thread(idlers.communicate)

    serve(path, crowd)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /api/v1/devices HTTP/1.1\r\nHo",
        b"POST /api/v1/hold HTTP/1.1\r\nHost: here\r\nContent-Length: 10\r\n\r\n{",
        b"GET /-/healthy HTTP/1.1\r\nHost: here\r\n\r\n",
    ],
    ids=["silent", "half a head", "half a body", "idle after an answer"],
)
def test_a_connection_that_brings_no_request_is_cut(path: str, sent: bytes) -> None:
    async def idle(served: AServed) -> None:
        began = time.monotonic()
        await served.raw(sent)
        assert 0.4 < time.monotonic() - began < 5

    serve(path, idle, Times(patience=0.5))


def test_a_client_that_does_not_read_its_answer_is_cut(path: str) -> None:
    async def stall(served: AServed) -> None:
        _, writer = await served.connect()
        _stop_reading(writer)
        writer.write(b"GET /api/v1/devices HTTP/1.1\r\nHost: here\r\n\r\n" * 30)
        assert served.local._runner
        assert served.local._runner.server
        server = served.local._runner.server
        await until(lambda: len(server.connections) == 1)
        await until(lambda: len(server.connections) == 0)
        writer.transport.abort()

    serve(path, stall, Times(patience=0.5), devices={dev_id: a_device(dev_id) for dev_id in range(200)})


def test_a_client_that_does_not_read_does_not_hold_up_the_end(path: str) -> None:
    async def hold() -> float:
        source = ASource({dev_id: a_device(dev_id) for dev_id in range(200)})
        server = WebServer(source, Metrics())
        await server.listen("127.0.0.1", PORT)
        _, writer = await asyncio.open_connection("127.0.0.1", PORT, limit=1)
        writer.write(b"GET /api/v1/devices HTTP/1.1\r\nHost: here\r\n\r\n" * 300)
        await asyncio.sleep(0.5)  # until its answers have filled every buffer between here and there
        loop = asyncio.get_running_loop()
        began = loop.time()
        await server.close()
        took = loop.time() - began
        writer.transport.abort()
        return took

    assert path
    assert asyncio.run(hold()) < 4


# --- following


async def follow(served: AServed, query: str = "") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await served.connect()
    writer.write(b"GET /api/v1/events?follow=1%s HTTP/1.0\r\n\r\n" % query.encode())
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200"), head
    return reader, writer


async def next_line(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(10):
        return await reader.readline()


def test_a_follower_gets_the_head_at_once_and_each_event_when_it_comes(path: str) -> None:
    async def look(served: AServed) -> None:
        served.source.add(a_record(1), a_record(2))
        reader, writer = await follow(served, "&after=1")
        assert await next_line(reader) == b"\n"
        assert json.loads(await next_line(reader))["seq"] == 2
        for seq in range(3, 6):
            served.source.add(a_record(seq))
            assert json.loads(await next_line(reader))["seq"] == seq
        writer.transport.abort()
        await until(lambda: served.source.following == 0)

    serve(path, look)


def test_a_follower_of_one_device_hears_of_that_and_of_what_is_missing(path: str) -> None:
    async def look(served: AServed) -> None:
        reader, writer = await follow(served, "&dev_id=4")
        served.source.add(
            a_record(1), a_record(2, dev_id=4), a_record(3, dev_id=None), a_record(4, dev_id=None, missed=9)
        )
        assert await next_line(reader) == b"\n"
        assert [json.loads(await next_line(reader))["seq"] for _ in range(2)] == [2, 4]
        writer.transport.abort()

    serve(path, look)


def test_a_follower_hears_a_heartbeat_also_while_only_others_events_come(path: str) -> None:
    async def look(served: AServed) -> None:
        reader, writer = await follow(served, "&dev_id=4")
        await next_line(reader)
        began = time.monotonic()
        for seq in range(20):
            served.source.add(a_record(seq + 1))
            await asyncio.sleep(0.02)
        for _ in range(3):
            assert await next_line(reader) == b"\n"
        assert 0.25 < time.monotonic() - began < 5
        writer.transport.abort()

    serve(path, look, Times(heartbeat=0.1))


def test_the_end_of_the_daemon_is_the_end_of_the_stream(path: str) -> None:
    async def look(served: AServed) -> None:
        readers = [(await follow(served)) for _ in range(5)]
        began = time.monotonic()
        await served.local.close()
        assert time.monotonic() - began < 1
        for reader, writer in readers:
            assert await next_line(reader) == b"\n"
            assert await next_line(reader) == b""
            writer.transport.abort()
        assert served.source.following == 0

    serve(path, look)


def test_a_follower_that_does_not_read_is_cut_and_costs_one_buffer(path: str) -> None:
    async def look(served: AServed) -> None:
        served.source.add(*(a_record(seq, text="x" * 1000) for seq in range(1, 20_001)))
        reader, stalled = await follow(served)
        _stop_reading(stalled)
        _, good = await served.connect()
        await until(lambda: served.source.taken > 100)
        await until(lambda: served.source.following == 0)
        assert served.source.taken < 3000  # what sockets and buffers hold, and no more is fetched
        assert (await served.ask("GET", "/api/v1/holds")) == []
        for each in (stalled, good):
            each.transport.abort()
        del reader

    serve(path, look, Times(slowest=0.5))


def test_a_follower_that_reads_slowly_gets_everything(path: str) -> None:
    async def look(served: AServed) -> None:
        served.source.add(*(a_record(seq, text="x" * 1000) for seq in range(1, 3001)))
        reader, writer = await follow(served)
        await next_line(reader)
        for seq in range(1, 3001):
            if seq % 500 == 0:
                await asyncio.sleep(0.2)
            assert json.loads(await next_line(reader))["seq"] == seq
        writer.transport.abort()

    serve(path, look, Times(slowest=2.0))


def test_followers_leave_places_for_those_who_ask(path: str) -> None:
    async def look(served: AServed) -> None:
        clients = []
        for _ in range(34):
            reader, writer = await served.connect(tcp=True)
            writer.write(b"GET /api/v1/events?follow=1 HTTP/1.1\r\nHost: here\r\n\r\n")
            async with asyncio.timeout(10):
                clients.append((await reader.readuntil(b"\r\n\r\n"), reader, writer))
        assert [int(head.split()[1]) for head, _, _ in clients] == [200] * 32 + [503] * 2
        assert b"after=SEQ" in await clients[33][1].readuntil(b"}")
        assert served.source.following == 32
        assert (await asyncio.to_thread(fetch, "/metrics"))[0] == 200
        clients[0][2].transport.abort()
        await until(lambda: served.source.following == 31)
        clients[33][2].write(b"GET /api/v1/events?follow=1 HTTP/1.1\r\nHost: here\r\n\r\n")
        assert b" 200 " in await clients[33][1].readuntil(b"\r\n\r\n")
        for _, _, writer in clients:
            writer.transport.abort()
        await until(lambda: served.tcp._followers == 0)

    serve(path, look)


@needs_root
def test_root_follows_when_all_others_places_are_taken(path: str) -> None:
    async def look(served: AServed) -> None:
        followers = [await follow(served) for _ in range(40)]
        with pytest.raises(DuendeError, match="40 clients follow the events already"):
            await served.ask("GET", "/api/v1/events?follow=1")
        for _, writer in followers:
            writer.transport.abort()
        assert served.source.following <= 40

    serve(path, look)


def test_who_asks_for_the_head_of_the_events_alone_gets_no_events(path: str) -> None:
    async def look(served: AServed) -> None:
        served.source.add(a_record(1))
        answer = await served.raw(b"HEAD /api/v1/events?follow=1 HTTP/1.1\r\nHost: here\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"Content-Type: application/x-ndjson\r\n" in answer
        assert answer.endswith(b"\r\n\r\n")
        assert served.source.taken == 0

    serve(path, look)


def test_followers_that_leave_leave_nothing_behind(path: str) -> None:
    async def look(served: AServed) -> None:
        for _ in range(200):
            _, writer = await follow(served)
            writer.transport.abort()
        await until(lambda: served.source.following == 0)
        await until(lambda: len(asyncio.all_tasks()) == 1)
        gc.collect()

    serve(path, look)


def test_a_journal_that_fails_ends_the_stream_and_is_told_in_the_log(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def look(served: AServed) -> None:
        reader, writer = await follow(served)
        await next_line(reader)
        served.source.failure = RuntimeError("secret")
        served.source.changed.set()
        assert await next_line(reader) == b""
        writer.transport.abort()

    serve(path, look)
    assert "RuntimeError: secret" in caplog.text


def test_a_follower_is_not_cut_for_asking_nothing_more(path: str) -> None:
    async def look(served: AServed) -> None:
        reader, writer = await follow(served)
        await next_line(reader)
        await asyncio.sleep(0.6)
        served.source.add(a_record(1))
        assert json.loads(await next_line(reader))["seq"] == 1
        writer.transport.abort()

    serve(path, look, Times(patience=0.2))


# --- the addresses


def test_a_port_in_use_is_an_error_with_a_hint() -> None:
    async def twice() -> None:
        first, second = WebServer(ASource(), Metrics()), WebServer(ASource(), Metrics())
        await first.listen("127.0.0.1", PORT)
        try:
            await second.listen("127.0.0.1", PORT)
        finally:
            await first.close()

    with pytest.raises(UsageError, match=r"cannot listen on 127\.0\.0\.1:19116: ") as told:
        asyncio.run(twice())
    assert "[http] listen" in told.value.hint


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as tried:
        tried.bind(("::1", 0))
        return True
    return False


@pytest.mark.parametrize(
    ("host", "reached"), [("::", {"::1", "127.0.0.1"}), ("::1", {"::1"}), ("0.0.0.0", {"127.0.0.1"})]
)
def test_every_address_of_ipv6_is_every_address_of_ipv4_too(host: str, reached: set[str]) -> None:
    if ":" in host and not has_ipv6():
        pytest.skip("the kernel of this machine has IPv6 switched off: nothing can listen there")

    async def look() -> None:
        server = WebServer(ASource(), Metrics())
        await server.listen(host, PORT)
        found = set()
        for tried in ("::1", "127.0.0.1"):
            with contextlib.suppress(OSError):  # refused, or no such family here
                reader, writer = await asyncio.open_connection(tried, PORT)
                writer.write(a_request("GET", "/-/healthy"))
                assert b"healthy" in await reader.read()
                writer.close()
                found.add(tried)
        await server.close()
        assert found == reached

    asyncio.run(look())


def test_a_port_of_which_somebody_has_one_address_is_in_use() -> None:
    async def twice() -> None:
        first, second = WebServer(ASource(), Metrics()), WebServer(ASource(), Metrics())
        await first.listen("127.0.0.1", PORT)
        for host in ("0.0.0.0", "::") if has_ipv6() else ("0.0.0.0",):
            with pytest.raises(UsageError, match="Address already in use"):
                await second.listen(host, PORT)
        await first.close()

    asyncio.run(twice())


def test_an_address_that_is_given_back_can_be_had_and_who_is_connected_stays(path: str) -> None:
    async def look(served: AServed) -> None:
        kept, other = await served.connect(tcp=True), WebServer(ASource(), Metrics())
        served.tcp.stop_listening()
        with pytest.raises(ConnectionRefusedError):
            await served.connect(tcp=True)
        kept[1].write(a_request("GET", "/-/healthy"))
        assert b"healthy" in await kept[0].read()
        await other.listen("127.0.0.1", PORT)
        with pytest.raises(UsageError, match="Address already in use"):
            await served.tcp.listen_again()
        await other.close()
        await served.tcp.listen_again()
        assert (await asyncio.to_thread(fetch, "/-/healthy"))[0] == 200
        kept[1].transport.abort()

    serve(path, look)


def test_anybody_may_use_the_socket_whatever_the_umask_and_it_goes_with_the_server(path: str) -> None:
    async def look(_: AServed) -> None:
        assert stat.S_IMODE(Path(path).stat().st_mode) == 0o666

    before = os.umask(0o077)
    try:
        serve(path, look)
    finally:
        os.umask(before)
    assert not Path(path).exists()
    with pytest.raises(DaemonNotRunningError) as told:
        DaemonClient(path).get("/api/v1/holds")
    assert told.value.hint == "systemctl start duende-ublkd"


def test_the_socket_of_a_killed_daemon_is_replaced(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(path)
        killed.listen()
    with pytest.raises(DaemonNotRunningError):
        DaemonClient(path).get("/api/v1/holds")

    async def look(served: AServed) -> None:
        assert await served.ask("GET", "/api/v1/holds") == []

    serve(path, look)


def test_what_is_no_socket_is_not_replaced(path: str) -> None:
    Path(path).write_text("mine")
    with pytest.raises(UsageError, match="is in the way: it is not a socket") as told:
        asyncio.run(_listen_once(path))
    assert f"ls -ld {path}" in told.value.hint
    assert Path(path).read_text() == "mine"
    Path(path).unlink()
    Path(path).symlink_to(f"{path}.elsewhere")
    with pytest.raises(UsageError, match="is in the way"):
        asyncio.run(_listen_once(path))


@pytest.mark.parametrize("name", ["nowhere/api.sock", "x" * 100], ids=["no directory", "too long"])
def test_a_socket_that_cannot_be_made_is_an_error_with_a_hint(directory: str, name: str) -> None:
    with pytest.raises(UsageError, match="cannot listen on ") as told:
        asyncio.run(_listen_once(f"{directory}/{name}"))
    assert told.value.hint.startswith("ls -ld ")


async def _listen_once(path: str) -> None:
    server = WebServer(ASource(), Metrics())
    await server.listen_local(path)
    await server.close()


LOADED = """
import os, sys
import duende_ublkd.report.web, aiohttp.connector
loaded = aiohttp.connector._SSL_CONTEXT_VERIFIED.get_ca_certs()
print(len(loaded), os.environ.get("SSL_CERT_FILE"), "SSL_CERT_DIR" in os.environ)
"""


@pytest.mark.parametrize("bundle", [None, "/etc/ssl/certs/ca-certificates.crt"])
def test_the_servers_own_import_reads_no_authorities_and_leaves_the_environment_as_it_is(bundle: str | None) -> None:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.fspath(Path(__file__).parents[1])}
    if bundle:
        environment["SSL_CERT_FILE"] = bundle
    run = subprocess.run([sys.executable, "-c", LOADED], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["0", str(bundle), "False"]
