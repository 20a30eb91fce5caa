"""Servers that alerts are sent to, well-behaved and not, on real sockets of the test's own loop; and what they need."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.alertconfig import SinkConfig, SinkKind, usual_rate
from duende_ublkd.report.alerts.dispatch import Courier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from duende_ublkd.report.alerts.answer import Answer

Behaviour = "Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]"


@dataclass
class Request:
    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:  # noqa: ANN401 - JSON
        return json.loads(self.body)


async def read_request(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(head[0], headers, body)


@dataclass
class Receiver:
    """An HTTP server; `answer` is what it says to everything, unless it behaves in a way of its own."""

    answer: bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    behaviour: Any = None
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    written: int = 0
    port: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            over = (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError)
            with contextlib.suppress(*over):
                if self.behaviour:
                    await self.behaviour(self, reader, writer)
                else:
                    self.requests.append(await read_request(reader))
                    writer.write(self.answer)
                    await writer.drain()
        finally:
            writer.transport.abort() if self.behaviour else writer.close()
            self._tasks.discard(task)

    def leave(self) -> None:
        for task in self._tasks:
            task.cancel()


@contextlib.asynccontextmanager
async def listening(
    receiver: Receiver | None = None, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[Receiver]:
    receiver = receiver or Receiver()
    server = await asyncio.start_server(receiver.serve, host, 0, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        receiver.leave()
        await asyncio.sleep(0)


def status(number: int, body: str = "", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {number} Because", f"Content-Length: {len(body)}", *headers]
    return ("\r\n".join(lines) + f"\r\n\r\n{body}").encode()


# --- how not to behave


async def hang(_: Receiver, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
    await read_request(reader)
    await asyncio.sleep(3600)


async def close_at_once(_: Receiver, __: asyncio.StreamReader, ___: asyncio.StreamWriter) -> None:
    """It hangs up."""


async def headers_without_end(self: Receiver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"".join(b"X-%d: %s\r\n" % (number, b"y" * 1000) for number in range(64)))
        self.written += 64_000
        await writer.drain()


async def a_byte_now_and_then(self: Receiver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    for byte in b"HTTP/1.1 500 Oh\r\nX: " + b"y" * 100_000:
        writer.write(bytes([byte]))
        self.written += 1
        await writer.drain()
        await asyncio.sleep(0.05)


def a_gigabyte(number: int) -> Any:  # noqa: ANN401 - a behaviour
    async def behave(self: Receiver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 %d Because\r\nContent-Length: 1073741824\r\n\r\n" % number)
        while self.written < 1 << 30:
            writer.write(b"z" * 65536)
            await writer.drain()
            self.written += 65536

    return behave


def say(text: bytes) -> Any:  # noqa: ANN401 - a behaviour
    async def behave(_: Receiver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(text)
        await writer.drain()
        await reader.read(1)
        await asyncio.sleep(0.2)

    return behave


# --- sinks, notices, and who delivers them


def a_sink(kind: str = "webhook", **changes: Any) -> SinkConfig:  # noqa: ANN401 - fields of SinkConfig
    sink = SinkKind(kind)
    return SinkConfig(sink, **{"name": kind, "rate_limit": usual_rate(sink), "timeout": 5.0, **changes})


def a_notice(**changes: Any) -> dict[str, Any]:  # noqa: ANN401 - fields of a notice
    return {
        "version": 1,
        "state": "raised",
        "key": "ublk3/4711/pinned",
        "kind": "pinned",
        "severity": "warning",
        "dev_id": 3,
        "instance": 4711,
        "summary": "ublk3 is pinned: its old disk is mounted at /mnt by 4121 (postgres)",
        "runbook_url": "https://example.org/README.md#alert-pinned",
        "host": "node7",
        "daemon_version": "0.1.0",
        "raised_at": "2026-01-02T03:04:05.678+00:00",
        "over_at": None,
        "facts": {"kernel_state": "DEAD", "holders": [{"kind": "mount", "what": "/mnt"}]},
        "labels": {},
        **changes,
    }


@contextlib.asynccontextmanager
async def a_courier(*sinks: SinkConfig, **changes: Any) -> AsyncIterator[Courier]:  # noqa: ANN401 - as Courier() takes them
    courier = Courier(**{"on_trouble": lambda _: None, "first_pause": 0.05, **changes})
    courier.configure(sinks)
    courier.start()
    try:
        async with asyncio.timeout(60):
            while courier.pid and not courier._is_ready:  # its start is not to count among the time limits of a test
                await asyncio.sleep(0.01)
        yield courier
    finally:
        await courier.close()


async def told(courier: Courier, sink: str, *notices: dict[str, Any]) -> Answer:
    answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    courier.deliver(sink, notices or [a_notice()], answer.set_result)
    assert not answer.done()
    async with asyncio.timeout(60):
        return await answer


async def one_told(sink: SinkConfig, *notices: dict[str, Any], **changes: Any) -> Answer:  # noqa: ANN401 - as Courier()
    async with a_courier(sink, **changes) as courier:
        return await told(courier, sink.name, *notices)


# --- certificates


@dataclass(frozen=True)
class Certificates:
    """`server`: for localhost and 127.0.0.1, signed by `authority`; `client`: signed by it, too. Each with its key."""

    place: Path

    def file(self, name: str) -> str:
        return str(self.place / f"{name}.pem")

    def key(self, name: str) -> str:
        return str(self.place / f"{name}.key")

    def context(self, name: str, *, wants_client: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.file(name), self.key(name))
        if wants_client:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.file("authority"))
        return context


def make_certificates(place: Path) -> Certificates:
    found = Certificates(place)
    _openssl("req", "-x509", *_new_key(found, "authority"), "-subj", "/CN=authority", "-days", "2")
    for name, host in (
        ("server", "DNS:localhost,IP:127.0.0.1"),
        ("elsewhere", "DNS:elsewhere.example"),
        ("client", ""),
    ):
        names = ["-addext", f"subjectAltName={host}"] if host else []
        _openssl("req", "-x509", *_new_key(found, name), "-subj", f"/CN={name}", "-days", "2", *_signed(found), *names)
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    _openssl("req", "-x509", *_new_key(found, "selfsigned"), "-subj", "/CN=self", "-days", "2", *names)
    (place / "request.csr").touch()
    _openssl("req", "-new", *_new_key(found, "expired", out="request.csr"), "-subj", "/CN=expired", *names)
    dates = ["-not_before", "20200101000000Z", "-not_after", "20210101000000Z"]
    _sign_with_dates(found, dates)
    return found


def _new_key(found: Certificates, name: str, out: str | None = None) -> list[str]:
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", found.key(name)]
    return [*key, "-out", str(found.place / out) if out else found.file(name)]


def _signed(found: Certificates) -> list[str]:
    return ["-CA", found.file("authority"), "-CAkey", found.key("authority")]


def _sign_with_dates(found: Certificates, dates: list[str]) -> None:
    """With openssl-ca, the only one of OpenSSL 3.0's commands that takes a date of the past."""
    config = found.place / "ca.cnf"
    (found.place / "index.txt").touch()
    (found.place / "serial").write_text("10\n")
    config.write_text(
        f"[ca]\ndefault_ca=d\n[d]\ndatabase={found.place}/index.txt\nserial={found.place}/serial\n"
        f"new_certs_dir={found.place}\ndefault_md=sha256\npolicy=p\ncopy_extensions=copy\n[p]\ncommonName=supplied\n"
    )
    start, end = dates[1], dates[3]
    signer = ["-cert", found.file("authority"), "-keyfile", found.key("authority")]
    request = ["-in", str(found.place / "request.csr"), "-out", found.file("expired"), "-batch", "-notext"]
    _openssl("ca", "-config", str(config), *signer, *request, "-startdate", start, "-enddate", end)


def _openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
