"""A real server and clients that do whatever they like: each answer is well formed, and the server goes on for the next.

As in test_fuzz, `HYPOTHESIS_PROFILE=search` goes looking for what these examples have not met.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import struct
import tempfile
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from duende_ublkd.core.model import Holder, Server, Usage
from duende_ublkd.report.metrics import Metrics
from duende_ublkd.report.web import Times, WebServer
from tests.test_fuzz import CHANGES, changed, fuzzed
from tests.test_report import a_device
from tests.test_servers import open_descriptors
from tests.test_web import ASource, a_record, a_request

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

PORT = 19117
_T = TypeVar("_T")
HOSTILE = 'a\n\x1b[2J\u202e"\\}\udcff{x="y"} 1\n' + "x" * 4096
POSSIBLE = {100, 200, 400, 403, 404, 405, 408, 411, 413, 414, 417, 431, 501, 503, 505}


class Served:
    """A server in a thread of its own, and what it logs."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.loop = asyncio.new_event_loop()
        self.source = self._do(self._make_source())
        self._servers = [self._do(self._listen(local=local)) for local in (True, False)]
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def _do(self, what: Coroutine[Any, Any, _T]) -> _T:
        """Before the thread runs."""
        return self.loop.run_until_complete(what)

    async def _make_source(self) -> ASource:
        seen = a_device()
        server = Server(7, alive=True, comm=HOSTILE, exe=HOSTILE, unit=HOSTILE)
        usage = Usage(holders=(Holder("mount", HOSTILE),))
        hostile = replace(seen, seen=replace(seen.seen, server=server, usage=usage))
        return ASource(devices={3: hostile}, journal=[a_record(n, text=HOSTILE, fact=HOSTILE) for n in range(5)])

    async def _listen(self, *, local: bool) -> WebServer:
        server = WebServer(self.source, Metrics(), Times(patience=0.5, heartbeat=0.2, slowest=0.5))
        await (server.listen_local(self.path) if local else server.listen("127.0.0.1", PORT))
        return server

    async def _no_connections(self) -> None:
        async with asyncio.timeout(20):
            while any(
                each._runner and each._runner.server and each._runner.server.connections for each in self._servers
            ):
                await asyncio.sleep(0.01)

    def wait_until_idle(self) -> None:
        asyncio.run_coroutine_threadsafe(self._no_connections(), self.loop).result(30)

    def close(self) -> None:
        for server in self._servers:
            asyncio.run_coroutine_threadsafe(server.close(), self.loop).result(20)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="duende-fuzz-") as place:
        made = Served(f"{place}/api.sock")
        try:
            yield made
        finally:
            made.close()


def connected(served: Served, *, tcp: bool) -> socket.socket:
    channel = socket.socket(socket.AF_INET if tcp else socket.AF_UNIX)
    channel.settimeout(10)
    channel.connect(("127.0.0.1", PORT) if tcp else served.path)
    return channel


def received(channel: socket.socket) -> bytes:
    """Until the server closes; it may do so with what it has not read, which resets the connection. A stream has no end."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := channel.recv(1 << 16):
            data += piece
            if b"application/x-ndjson" in data and data.endswith(b"\n\r\n"):
                break
    return data


def check(answer: bytes) -> list[int]:
    """The statuses of all the answers on a connection, each of them well formed."""
    statuses = []
    assert b"Traceback" not in answer
    assert b'File "' not in answer
    while answer:
        head, end, rest = answer.partition(b"\r\n\r\n")
        assert end, answer[:200]
        first, *lines = head.decode("ascii").split("\r\n")
        protocol, status, _ = first.split(" ", 2)
        assert protocol in ("HTTP/0.9", "HTTP/1.0", "HTTP/1.1")  # the first: aiohttp, to what it does not understand
        assert int(status) in POSSIBLE, first
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body, answer = _body(int(status), headers, rest)
        _check_body(int(status), headers, body)
        statuses.append(int(status))
    return statuses


def _body(status: int, headers: dict[str, str], rest: bytes) -> tuple[bytes, bytes]:
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size, 16)
            body, rest = body + rest[:length], rest[length + 2 :]
            if length == 0 or not rest:
                break
        return body, rest
    if status == 100:  # what follows is the answer itself
        return b"", rest
    if "content-length" not in headers:
        return rest, b""
    length = int(headers["content-length"])
    return rest[:length], rest[length:]


def _check_body(status: int, headers: dict[str, str], body: bytes) -> None:
    if status != 200 and headers.get("content-type", "").startswith("application/json") and body:
        told = json.loads(body)
        assert told.keys() == {"error", "hint"}
        assert told["error"].isprintable()


VALID = [
    *(a_request("GET", path) for path in ("/metrics", "/-/healthy", "/-/ready", "/api/v1/devices", "/api/v1/records")),
    *(a_request("GET", path) for path in ("/api/v1/holds", "/api/v1/events?after=0&limit=3&dev_id=3&since=1.5")),
    a_request("GET", "/api/v1/events?follow=1&after=0"),
    a_request("HEAD", "/metrics"),
    a_request("HEAD", "/api/v1/events?follow=1"),
    b"GET /metrics HTTP/1.1\r\nHost: x\r\nExpect: x\r\n\r\nGET /x HTTP/1.0\r\nExpect: y\r\nConnection: close\r\n\r\n",
    a_request("POST", "/api/v1/hold", b'{"dev_id": 3, "seconds": 60, "why": "x"}', "Content-Type: application/json"),
    a_request("POST", "/api/v1/release", b'{"dev_id": 3}'),
    a_request("POST", "/-/reload", b""),
    *(a_request("GET", path) for path in ("/", "/api/v1/status", "/api/v1/alerts")),
    a_request("POST", "/api/v1/test-alert", b'{"sink": "mail"}'),
    b'POST /api/v1/release HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"dev\r\n8\r\n_id": 3}\r\n0\r\n\r\n',
    b'POST /api/v1/hold HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 13\r\n\r\n{"dev_id": 3}',
    b"GET /api/v1/devices HTTP/1.1\r\nHost: x\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"CONNECT here:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]
HTTP_TRICKS = st.sampled_from(
    [
        *(
            b"\r\n\r\n",
            b"\r",
            b"\n\n",
            b"Content-Length: 5\r\n",
            b"Content-Length: +5\r\n",
            b"Transfer-Encoding: chunked\r\n",
        ),
        *(b"Transfer-Encoding: xchunked\r\n", b"Host: \r\n", b"Connection: Upgrade\r\n", b"Content-Encoding: gzip\r\n"),
        *(
            b"Content-Encoding: br\r\n",
            b"Expect: x\r\n",
            b" HTTP/1.0",
            b"HTTP/0.9",
            b"%00",
            b"%ff%fe",
            b"%0a%1b",
            b"../../etc",
        ),
        *(
            b"?follow=1&follow=1",
            b"&limit=1e9",
            b"&since=nan",
            b"&after=-1",
            b"&dev_id=\xd9\xa3",
            b"#x",
            b"http://[::",
            b"//",
        ),
        *(
            b"ffffffffffffffff\r\n",
            b"-1\r\n",
            b"5;x=y\r\n",
            b"X: " + b"y" * 9000 + b"\r\n",
            b"a: b\r\n" * 400,
            b"/" * 9000,
        ),
        *(
            b"Content-Type: multipart/form-data; boundary=x\r\n",
            b"Content-Type: \xff\r\n",
            b"Cookie: $=;\r\n",
            b"Range: bytes=0-",
        ),
    ]
)
HTTP_CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 20), HTTP_TRICKS), max_size=4) | CHANGES
WAYS = st.sampled_from(["at once", "in pieces", "half closed", "half sent", "reset", "two at once"])


def converse(served: Served, data: bytes, way: str, *, tcp: bool) -> bytes:
    """Say it in this way, and hear what there is to hear."""
    with connected(served, tcp=tcp) as channel, contextlib.suppress(OSError):  # it was cut meanwhile
        if way == "in pieces":
            for at in range(0, len(data), max(len(data) // 5, 1)):
                channel.sendall(data[at : at + max(len(data) // 5, 1)])
        elif way == "half sent":
            channel.sendall(data[: len(data) // 2])
        elif way == "two at once":
            channel.sendall(data if data.startswith(b"HEAD") else data + VALID[0])  # whose answer has no body
        else:
            channel.sendall(data)
        if way == "reset":
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return b""
        if way != "at once":
            channel.shutdown(socket.SHUT_WR)
        return received(channel)
    return b""


def is_alive(served: Served) -> bool:
    return all(check(converse(served, VALID[3], "at once", tcp=tcp)) == [200] for tcp in (True, False))


def test_whatever_a_client_says_the_answers_are_well_formed_and_the_server_goes_on(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    assert is_alive(served)
    served.wait_until_idle()
    before = open_descriptors()

    @fuzzed(250)
    @given(st.sampled_from(VALID), HTTP_CHANGES, WAYS, st.booleans())
    @example(b"", [], "at once", False)
    @example(b"\xff" * 70_000, [], "at once", True)
    def fuzz(request: bytes, changes: list[tuple[float, int, bytes]], way: str, tcp: bool) -> None:  # noqa: FBT001
        check(converse(served, changed(request, changes), way, tcp=tcp))

    with caplog.at_level(logging.INFO):
        fuzz()
    assert is_alive(served)
    served.wait_until_idle()
    assert open_descriptors() <= before
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


def test_every_page_is_well_formed_whatever_the_devices_and_events_are_called(served: Served) -> None:
    """Names reach the pages as they are in memory, where they have been made printable already; this is one wall more."""
    for request in VALID[:7]:
        assert check(converse(served, request, "at once", tcp=True)) == [200]
    devices = converse(served, VALID[3], "at once", tcp=True).partition(b"\r\n\r\n")[2]
    assert json.loads(devices)[0]["server"]["comm"] == HOSTILE
    page = converse(served, VALID[0], "at once", tcp=True).partition(b"\r\n\r\n")[2].decode()
    assert all(line.startswith(("#", "duende_ublkd_", "process_")) for line in page.splitlines())


def test_many_slow_clients_hold_up_nobody_and_leave_nothing_behind(served: Served) -> None:
    served.wait_until_idle()
    before = open_descriptors()
    slow = [connected(served, tcp=bool(n % 2)) for n in range(60)]
    for n, channel in enumerate(slow):
        channel.sendall(VALID[n % len(VALID)][: 5 + n % 40])
    assert is_alive(served)
    began = time.monotonic()
    for channel in slow:  # each is cut, though it never says more
        check(received(channel))
        channel.close()
    assert time.monotonic() - began < 10
    served.wait_until_idle()
    assert open_descriptors() <= before
