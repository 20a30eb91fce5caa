"""HTTP on the daemon's own loop, over TCP and over a unix socket; the only file that imports aiohttp.

Rules:
1. Everything is rendered from the last pass, or asked of the source: no request reaches the ring or the kernel, and a slow
   client waits for itself alone.
2. Anybody may look. What changes something is taken over the unix socket alone, where the kernel tells the caller's uid;
   over TCP all callers look alike. The source decides what a uid may do.
3. A connection that brings no new request for a while is cut: one that is idle, that sends its request byte by byte, and
   that does not read its answer are all the same. A follower of events is cut when it does not take a line for a while;
   nothing is fetched for it meanwhile, so what it costs is one buffer.
4. Each address has its own limit of clients, and root has places of its own on the unix socket: whoever fills one up locks
   out neither the other's clients nor the administrator. Followers, which nobody cuts as long as they read, have half of the
   places. A client counts before its TLS handshake, and the handshake has a deadline.
5. Each address has a share of the loop's time: answers are made one after the other, with a pause after each that is longer
   the longer it took. Many clients wait for each other, and the daemon for none of them. A connection takes a turn of its
   own before anything of it is read, so that rubbish costs as much as a question. Root is not made to wait.
6. TLS and passwords are for TCP alone: on the unix socket the kernel says who calls. Their renewal is for the next client;
   the listener stays, and who is connected stays.
7. A header of the web configuration takes the place of ours, but for the Content-Security-Policy: an answer that has one,
   which is the page, keeps its own and no other. A browser keeps to both of two, and a common one for sites, such as
   "default-src 'self'", would stop the page's script: the page would stand still without a word.

aiohttp is the server, on the daemon's own loop, because limits, parsing and TLS of strangers' bytes are somebody's
full-time work: it costs 13 MiB of locked memory once; TLS nothing, since asyncio has loaded OpenSSL anyway, but 256 KiB for
the buffers of each client that has shaken hands.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import re
import socket
import ssl
import stat
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from duende_ublkd.core.config import MAX_DEV_ID, Address
from duende_ublkd.core.errors import DuendeError, UsageError
from duende_ublkd.core.holds import DEFAULT_TIME, LONGEST_TIME, MOST_TEXT, SHORTEST_TIME, NotAllowedError
from duende_ublkd.core.text import printable
from duende_ublkd.report import objects, present
from duende_ublkd.report.access import Access, TooManyError, why_refused
from duende_ublkd.report.journal import log
from duende_ublkd.report.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

    from duende_ublkd.core.holds import Hold, Released
    from duende_ublkd.core.model import Judged
    from duende_ublkd.core.webconfig import WebConfig
    from duende_ublkd.report.store import Record

_AUTHORITIES = {"SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": os.devnull}  # where OpenSSL is to look for them
_given = {name: os.environ.get(name) for name in _AUTHORITIES}
os.environ |= _AUTHORITIES
try:
    # aiohttp.connector, which only a client needs, reads the system's certificate authorities while it is imported:
    # 2 MiB of locked memory, and an eighth of the daemon's start.
    from aiohttp import web
    from aiohttp.http import HttpProcessingError
finally:
    for _name, _value in _given.items():
        if _value is None:
            del os.environ[_name]
        else:
            os.environ[_name] = _value

SOCKET_NAME = "api.sock"  # in the run directory
MOST_EVENTS = 1000  # in one answer

_BODY_LIMIT = 4096  # bytes
_MOST_HEADERS = 48  # of a request; a browser sends twenty
_LONGEST_LINE = 4096  # bytes, of each of them; with so many clients this is 12 MiB at worst
_MOST_CLIENTS = 64  # connections at once; a further one is closed, so that no client can use up the descriptors
_MOST_FOLLOWERS = 32  # of them
_PLACES_OF_ROOT = 8  # further ones, of clients and of followers
_GOODBYE = 1.0  # seconds for requests under way at the end
_SHARE = 0.2  # of the loop's time, for each address
_LEAST_COST = 0.0005  # seconds that the smallest request takes, all in all
_HANDSHAKE_COST = 0.006  # with a key of RSA and 4096 bits
_LONGEST_PAUSE = 2.0  # after an answer, whatever it took: a scrape still comes through
_EXPECTATION_FAILED = 417
_PATHS = (
    "/, /api/v1/status, /api/v1/devices, /api/v1/holds, /api/v1/events, /api/v1/alerts, /metrics, /-/healthy, /-/ready"
)
_SAME_OVER_SOCKET = f"or send the same request to the unix socket, /run/duende-ublkd/{SOCKET_NAME}"


class Page(Protocol):
    """The status page, and the Content-Security-Policy that goes with it."""

    @property
    def body(self) -> bytes:
        """HTML as UTF-8."""

    @property
    def policy(self) -> str:
        """Of one line."""


class Source(Protocol):
    """What the pages are made from, and who does what they ask for."""

    @property
    def devices(self) -> Mapping[int, Judged]:
        """The devices of the last pass."""

    @property
    def is_ready(self) -> bool:
        """Whether a first full look is done, and the driver answered the last one."""

    @property
    def records(self) -> Mapping[int, Mapping[str, Any]]:
        """What is known of the devices beyond the last look: for commands that look themselves."""

    @property
    def holds(self) -> Sequence[Hold]:
        """The holds that are in force."""

    def hold(self, dev_id: int, seconds: float, why: str, uid: int) -> Hold:
        """Set or replace a hold. Raises UsageError; NotAllowedError: this user may not."""

    def release(self, dev_id: int, uid: int) -> Released:
        """End a hold, None: there was none, and forget so many attempts to recover. Raises as `hold` does."""

    def page(self) -> Page:
        """What a person on call wants to see in one look."""

    def status(self) -> Mapping[str, Any]:
        """The same for programs, and for the page's own script."""

    def alerts(self) -> Mapping[str, Any]:
        """What people are told of, and how each sink does."""

    async def test_alert(self, sink: str | None) -> list[Mapping[str, Any]]:
        """Send an alert for trial to one sink, None: to each; what each answered. UsageError: there is no such sink."""

    async def reload(self) -> str:
        """Take the configuration anew; returns why the old one stays, or nothing."""

    async def read_events(
        self, *, after: int, limit: int, dev_id: int | None, since: float | None
    ) -> tuple[list[Record], str]:
        """The latest events that match, oldest first, and what is to be known about the list."""

    def follow_events(self, after: int) -> AsyncIterator[Record]:
        """Every event after this one, as they come. One that is missing is told of by the fact `missed` of another."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds that clients are given."""

    patience: float = 60.0  # for the next request, and until an answer is read
    heartbeat: float = 15.0  # of silence, until a follower gets an empty line
    slowest: float = 15.0  # for a follower to take a line when its buffer is full
    handshake: float = 10.0  # for TLS
    refusals: float = 60.0  # between two lines of the log about clients whose certificates are refused


class WebServer:
    """Serves one address until `close()`."""

    def __init__(self, source: Source, metrics: Metrics, times: Times | None = None) -> None:
        self._source = source
        self._metrics = metrics
        self.times = times or Times()
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None
        self._socket_path: Path | None = None
        self._address: Address | None = None
        self._followers = 0
        self._ending = asyncio.get_running_loop().create_future()
        self._reloads: set[asyncio.Task[str]] = set()
        self._access: Access | None = None
        self._crowd: set[_Connection] = set()
        self.pace = _Pace(self._ending)
        self.refusals = _Refusals(self.times.refusals)

    async def listen(self, host: str, port: int, web: WebConfig | None = None) -> None:
        """Raises UsageError when the address cannot be had. `web`: who is let in; None: everybody."""
        self.take(web)
        await self._set_up()
        self._address = Address(host, port)
        try:
            await self.listen_again()
        except UsageError:
            await self.close()
            raise

    def stop_listening(self) -> None:
        """Give the TCP address back; who is connected stays."""
        if self._server:
            self._server.close()
            self._server = None

    async def listen_again(self) -> None:
        """On the address that was given back. UsageError: somebody else has it."""
        address, runner = self._address, self._runner
        if address is None or runner is None:
            raise RuntimeError("listen_again() of a server that never listened, or was closed")
        try:
            listener = _listening(address)
            self._server = await asyncio.get_running_loop().create_server(
                lambda: _Connection(self, runner, is_local=False), sock=listener
            )
        except OSError as error:
            raise UsageError(
                f"cannot listen on {address}: {error.strerror}",
                hint='set another address, or none with "": [http] listen = "127.0.0.1:10117"',
            ) from error

    async def listen_local(self, path: str) -> None:
        """On a unix socket, in place of one that a killed daemon left: the caller has the daemon's lock."""
        runner = await self._set_up()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        place = Path(path)
        try:
            _clear(place)
            self._socket_path = place
            _bind(listener, place)
            self._server = await asyncio.get_running_loop().create_unix_server(
                lambda: _Connection(self, runner, is_local=True), sock=listener
            )
        except (OSError, UsageError) as error:
            listener.close()
            await self.close()
            if isinstance(error, UsageError):
                raise
            why = error.strerror or str(error)
            raise UsageError(f"cannot listen on {path}: {why}", hint=f"ls -ld {path} {place.parent}") from error

    def take(self, web: WebConfig | None) -> None:
        """Let in whom this lets in, from the next client and the next request on."""
        former, self._access = self._access, Access(web) if web else None
        if former:
            former.close()

    async def close(self) -> None:
        """Stop listening; requests under way get a moment, and a client that does not read gets no more than that."""
        if self._socket_path:
            self._socket_path.unlink(missing_ok=True)
            self._socket_path = None
        if self._server:
            self._server.close()
        if not self._ending.done():
            self._ending.set_result(None)
        for connection in [*self._crowd]:
            connection.end_greeting()
        if self._access:
            self._access.close()
        if self._runner:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2 * _GOODBYE):
                    await self._runner.cleanup()
            self._runner = None

    def admit(self, connection: _Connection) -> bool:
        """Whether there is a place for it, which it has then (rule 4)."""
        places = _MOST_CLIENTS + (_PLACES_OF_ROOT if connection.uid == 0 else 0)
        if len(self._crowd) >= places:
            return False
        self._crowd.add(connection)
        return True

    def dismiss(self, connection: _Connection) -> None:
        """It has gone."""
        self._crowd.discard(connection)

    def tls_for(self, connection: _Connection) -> ssl.SSLContext | None:
        """What a new connection is to be secured with (rule 6)."""
        return self._access.context if self._access and not connection.is_local else None

    def welcomes(self, certificate: Mapping[str, Any] | None) -> bool:
        """Whether a client with this certificate may stay."""
        return self._access is None or self._access.welcomes(certificate)

    @contextlib.contextmanager
    def _following(self, connection: _Connection) -> Iterator[None]:
        """Have one of the followers' places (rule 4). DuendeError: there is none."""
        if self._followers >= _MOST_FOLLOWERS + (_PLACES_OF_ROOT if connection.uid == 0 else 0):
            what = f"{self._followers} clients follow the events already, and there are no more places for that"
            raise DuendeError(
                what, hint="ask again and again, without follow: after=SEQ of the last event that you have"
            )
        self._followers += 1
        try:
            yield
        finally:
            self._followers -= 1

    async def _set_up(self) -> web.AppRunner:
        app = web.Application(client_max_size=_BODY_LIMIT, middlewares=[self._guard])
        for path, get in (
            ("/", self._get_page),
            ("/metrics", self._get_metrics),
            ("/-/healthy", self._get_healthy),
            ("/-/ready", self._get_ready),
            ("/api/v1/status", self._get_status),
            ("/api/v1/alerts", self._get_alerts),
            ("/api/v1/devices", self._get_devices),
            ("/api/v1/records", self._get_records),
            ("/api/v1/holds", self._get_holds),
            ("/api/v1/events", self._get_events),
        ):
            app.router.add_get(path, get)
        app.router.add_post("/api/v1/hold", self._post_hold)
        app.router.add_post("/api/v1/release", self._post_release)
        app.router.add_post("/api/v1/test-alert", self._post_test_alert)
        app.router.add_post("/-/reload", self._post_reload)
        app.on_response_prepare.append(self._protect)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=_GOODBYE,
            handler_cancellation=True,  # a follower that is gone leaves at once, not with the next event
            auto_decompress=False,  # 4 KiB are 4 KiB
            max_line_size=_LONGEST_LINE,
            max_field_size=_LONGEST_LINE,
            max_headers=_MOST_HEADERS,
            logger=_logger(),
        )
        await self._runner.setup()
        return self._runner

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Every error becomes an object with a sentence and a hint; a defect's traceback goes to the log alone."""
        connection = _connection_of(request)
        if connection is None:
            raise ConnectionResetError("the client is gone")
        connection.expect_more()
        try:
            if connection.uid != 0:
                await self.pace.turn(_LEAST_COST)
            return await self._refusal(connection, request) or await handler(request)
        except web.HTTPException as error:
            return _refusal_of(request, error)
        except DuendeError as error:
            status = 403 if isinstance(error, NotAllowedError) else 400 if isinstance(error, UsageError) else 503
            return _error(status, str(error), error.hint)
        except ConnectionError:
            raise  # there is nobody to tell any more
        except Exception:  # noqa: BLE001 - whatever it is, a client is told in a sentence
            log.exception("%s %s failed", request.method, printable(request.path))
            return _error(500, "the daemon failed to answer; its log has the reason", "journalctl -u duende-ublkd")

    async def _refusal(self, connection: _Connection, request: web.Request) -> web.Response | None:
        """What a client hears that is not known, or of whom nobody can tell now; None: it may go on."""
        if self._access is None or connection.is_local:
            return None
        try:
            if await self._access.knows(request.headers.get("Authorization")):
                return None
        except TooManyError:
            answer = _error(503, "too many passwords are looked at just now", "try again in a second")
            answer.headers["Retry-After"] = "1"
            return answer
        answer = _error(401, "a user and a password are needed here", "curl --user NAME: one of basic_auth_users")
        answer.headers["WWW-Authenticate"] = 'Basic realm="duende-ublkd", charset="UTF-8"'
        return answer

    async def _protect(self, request: web.Request, response: web.StreamResponse) -> None:
        """What a browser is told with every answer: it is of this moment, and of the kind that it says."""
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        connection = _connection_of(request)
        if self._access and connection and not connection.is_local:
            for name, value in self._access.headers.items():
                if name != "Content-Security-Policy" or name not in response.headers:  # rule 7
                    response.headers[name] = value
        if response.status == _EXPECTATION_FAILED and connection and connection.uid != 0:
            await self.pace.turn(_LEAST_COST)  # aiohttp makes this answer before it asks _guard

    async def _get_metrics(self, _: web.Request) -> web.Response:
        with self.pace.measured():
            return web.Response(body=self._metrics.render(), headers={"Content-Type": Metrics.content_type})

    async def _get_healthy(self, _: web.Request) -> web.Response:
        return web.Response(text="healthy\n")

    async def _get_ready(self, _: web.Request) -> web.Response:
        ready = self._source.is_ready
        return web.Response(text="ready\n" if ready else "not ready\n", status=200 if ready else 503)

    async def _get_page(self, _: web.Request) -> web.Response:
        with self.pace.measured():
            page = self._source.page()
        headers = {"Content-Security-Policy": page.policy, "Referrer-Policy": "no-referrer"}
        return web.Response(body=page.body, content_type="text/html", charset="utf-8", headers=headers)

    async def _get_status(self, _: web.Request) -> web.Response:
        with self.pace.measured():
            return _json(self._source.status())

    async def _get_alerts(self, _: web.Request) -> web.Response:
        with self.pace.measured():
            return _json(self._source.alerts())

    async def _get_devices(self, _: web.Request) -> web.Response:
        with self.pace.measured():
            return _json([present.as_object(device) for device in self._source.devices.values()])

    async def _get_records(self, _: web.Request) -> web.Response:
        with self.pace.measured():
            return _json([{"dev_id": dev_id, "record": record} for dev_id, record in self._source.records.items()])

    async def _get_holds(self, _: web.Request) -> web.Response:
        with self.pace.measured():
            return _json([_hold_object(hold) for hold in self._source.holds])

    async def _post_hold(self, request: web.Request) -> web.Response:
        uid = self._uid_of(request, f"duende-ublkd hold ID, {_SAME_OVER_SOCKET}")
        body = await _read_body(request, {"dev_id", "seconds", "why"})
        hold = self._source.hold(_dev_id(body), _seconds(body), _why(body), uid)
        return _json(_hold_object(hold))

    async def _post_release(self, request: web.Request) -> web.Response:
        uid = self._uid_of(request, f"duende-ublkd release ID, {_SAME_OVER_SOCKET}")
        body = await _read_body(request, {"dev_id"})
        done = self._source.release(_dev_id(body), uid)
        hold = _hold_object(done.hold) if done.hold else None
        return _json({"released": hold, "attempts_forgotten": done.attempts, "overdue_forgotten": done.overdue})

    async def _post_test_alert(self, request: web.Request) -> web.Response:
        command = "duende-ublkd test-alert"
        if self._uid_of(request, f"{command}, {_SAME_OVER_SOCKET}") != 0:
            raise NotAllowedError("only root may have alerts sent", hint=f"sudo {command}")
        sink = _sink(await _read_body(request, {"sink"}))
        if connection := _connection_of(request):
            connection.expect_nothing()  # the slowest sink is waited for, for as long as its own timeout lets it
        try:
            return _json(await self._source.test_alert(sink))
        finally:
            if connection:
                connection.expect_more()

    async def _post_reload(self, request: web.Request) -> web.Response:
        command = "systemctl reload duende-ublkd"
        if self._uid_of(request, f"{command}, {_SAME_OVER_SOCKET}") != 0:
            raise NotAllowedError("only root may make the daemon reload its configuration", hint=f"sudo {command}")
        reload = asyncio.ensure_future(self._source.reload())
        self._reloads.add(reload)
        reload.add_done_callback(self._end_reload)
        problem = await asyncio.shield(reload)  # a caller who leaves does not leave half a configuration
        if problem:
            raise UsageError(problem)  # what to type stands in it
        return _json({"reloaded": True})

    def _end_reload(self, reload: asyncio.Task[str]) -> None:
        self._reloads.discard(reload)
        if not reload.cancelled() and (defect := reload.exception()):
            log.error("reloading failed", exc_info=defect)

    async def _get_events(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        if unknown := sorted(query.keys() - {"after", "limit", "dev_id", "since", "follow"}):
            raise UsageError(
                f"there is no parameter {printable(unknown[0])!r}", hint="after, limit, dev_id, since, follow"
            )
        after = _count(query, "after", 0, (1 << 63) - 1)
        dev_id = _count(query, "dev_id", 0, MAX_DEV_ID) if "dev_id" in query else None
        if _count(query, "follow", 0, 1):
            return await self._follow(request, after, dev_id)
        limit = _count(query, "limit", 100, MOST_EVENTS)
        since = _epoch(query["since"]) if "since" in query else None
        records, note = await self._source.read_events(after=after, limit=limit, dev_id=dev_id, since=since)
        with self.pace.measured():
            return _json({"events": [objects.event_object(record) for record in records], "note": note})

    async def _follow(self, request: web.Request, after: int, dev_id: int | None) -> web.StreamResponse:
        connection = _connection_of(request)
        if connection is None:
            raise ConnectionResetError("the client is gone")
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        response.force_close()
        if request.method == "HEAD":
            return response
        with self._following(connection):
            connection.expect_nothing()
            await response.prepare(request)
            events = self._source.follow_events(after)
            async with contextlib.aclosing(self._lines(events, dev_id)) as lines:
                async for line in lines:
                    try:
                        async with asyncio.timeout(self.times.slowest):
                            await response.write(line)
                    except (TimeoutError, ConnectionError):
                        connection.cut()
                        break
        return response

    async def _lines(self, events: AsyncIterator[Record], dev_id: int | None) -> AsyncGenerator[bytes, None]:
        """A line for each event, and an empty one at first, so that the head is sent, and after each time of silence."""
        loop = asyncio.get_running_loop()
        yield b"\n"
        silent_since = loop.time()
        coming: asyncio.Task[Record | None] = asyncio.ensure_future(_next(events))
        try:
            while not self._ending.done():
                left = silent_since + self.times.heartbeat - loop.time()
                await asyncio.wait({coming, self._ending}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                line = b""
                if coming.done():
                    record = coming.result()
                    if record is None:
                        return
                    if dev_id in (None, record.event.dev_id) or "missed" in record.event.facts:
                        line = _dumps(objects.event_object(record)) + b"\n"
                    coming = asyncio.ensure_future(_next(events))
                if line or loop.time() >= silent_since + self.times.heartbeat:
                    yield line or b"\n"
                    silent_since = loop.time()
        except Exception:  # noqa: BLE001 - the answer has begun: it can only end
            log.exception("events cannot be followed any further")
        finally:
            await _give_up(coming, events)

    def _uid_of(self, request: web.Request, instead: str) -> int:
        """Who asks. NotAllowedError: nobody can tell."""
        connection = _connection_of(request)
        if connection is None or connection.uid is None:
            raise NotAllowedError("nobody can tell who asks here, so nothing can be changed from here", hint=instead)
        return connection.uid


class _Pace:
    """Rule 5: turns, and a pause after each, until all ends."""

    def __init__(self, ending: asyncio.Future[None]) -> None:
        self._ending = ending
        self._free_at = 0.0
        self._queue = asyncio.Lock()

    async def turn(self, cost: float) -> None:
        """Wait for it; whoever comes later waits longer. `cost`: the seconds that it takes at least."""
        loop = asyncio.get_running_loop()
        async with self._queue:
            if (left := self._free_at - loop.time()) > 0:
                await asyncio.wait({self._ending}, timeout=left)
            self._free_at = max(self._free_at, loop.time()) + cost / _SHARE

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Have it paid for: what is done inside keeps the loop from everything else."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            yield
        finally:
            took = loop.time() - began
            self._free_at = max(self._free_at, began + min(took / _SHARE, _LONGEST_PAUSE))


class _Refusals:
    """The log's lines about clients whose certificates are refused: one at a time, as anybody could fill it with them."""

    def __init__(self, pause: float) -> None:
        """`pause`: seconds between two lines."""
        self._pause = pause
        self._silent_until = 0.0
        self._untold = 0

    def note(self, client: str, why: str) -> None:
        """Somebody has been refused."""
        now = asyncio.get_running_loop().time()
        if now < self._silent_until:
            self._untold += 1
            return
        others = f" (others since the last such line: {self._untold})" if self._untold else ""
        self._silent_until, self._untold = now + self._pause, 0
        log.info("HTTP client %s is refused: %s%s", printable(client, 60), printable(why, 300), others)


class _Connection(asyncio.Protocol):
    """A client: let in or turned away, who it is, and how long its silence is borne. The rest is aiohttp's.

    It counts when the connection is made, not when asyncio asks for a protocol: of many that come at once, each would be
    the first then. TLS is shaken hands over afterwards, under the certificate of that moment.
    """

    def __init__(self, server: WebServer, runner: web.AppRunner, *, is_local: bool) -> None:
        self._server = server
        self._runner = runner
        self._transport: asyncio.Transport | None = None
        self._http: asyncio.Protocol | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._greeting: asyncio.Task[None] | None = None
        self._early: list[bytes] = []  # what came with the end of the handshake
        self.is_local = is_local
        self.uid: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self.is_local:
            self.uid = _peer_uid(transport)
        if not self._server.admit(self) or not isinstance(transport, asyncio.Transport):
            transport.close()
            return
        self._transport = transport
        if self.uid == 0:
            self._begin(transport)
        else:
            transport.pause_reading()
            self._greeting = asyncio.ensure_future(self._greet(transport))

    async def _greet(self, transport: asyncio.Transport) -> None:
        """Wait for this client's turn, and shake hands then, if that is wanted."""
        context = self._server.tls_for(self)
        try:
            with contextlib.suppress(OSError):  # it took too long, or the client has gone
                if context:
                    await self._shake_hands(transport, context)
                    return
                async with asyncio.timeout(self._server.times.patience):
                    await self._server.pace.turn(_LEAST_COST)
                self._begin(transport)
                transport.resume_reading()
        finally:
            if not self._http:  # asyncio does not tell of the end of a connection whose handshake has none
                transport.abort()
                self.connection_lost(None)

    async def _shake_hands(self, transport: asyncio.Transport, context: ssl.SSLContext) -> None:
        """The server's part of it is the dearest that a stranger can ask for. OSError: it comes to nothing."""
        why = ""
        try:
            async with asyncio.timeout(self._server.times.handshake):
                await self._server.pace.turn(_HANDSHAKE_COST)
                secured = await asyncio.get_running_loop().start_tls(
                    transport, self, context, server_side=True, ssl_shutdown_timeout=_GOODBYE
                )
        except ssl.SSLError as error:
            why = why_refused(error)
        else:
            if secured and self._server.welcomes(secured.get_extra_info("peercert")):
                self._transport = secured
                self._begin(secured)
            elif secured:
                why = "its certificate has none of client_allowed_sans"
        if why:
            self._server.refusals.note(_address_of(transport), why)

    def _begin(self, transport: asyncio.Transport) -> None:
        """Let aiohttp talk to it."""
        server = self._runner.server
        if server is None:
            transport.abort()
            return
        self._greeting = None
        self._http = server()
        self._http.connection_made(transport)
        self.expect_more()
        early, self._early = self._early, []
        for data in early:
            self._http.data_received(data)

    def end_greeting(self) -> None:
        """The server ends, and nobody waits for a handshake."""
        if self._greeting:
            self._greeting.cancel()
            self.cut()

    def expect_more(self) -> None:
        """Cut it unless another request comes in time."""
        self.expect_nothing()
        self._timer = asyncio.get_running_loop().call_later(self._server.times.patience, self.cut)

    def expect_nothing(self) -> None:
        """Leave it alone: somebody else looks after it."""
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def cut(self) -> None:
        """Close it, and drop what it did not take."""
        if self._transport:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.dismiss(self)
        self.expect_nothing()
        self._transport = None
        if self._greeting and self._greeting is not asyncio.current_task():
            self._greeting.cancel()
        if self._http:
            self._http.connection_lost(exc)
            self._http = None

    def data_received(self, data: bytes) -> None:
        if self._http:
            self._http.data_received(data)
        elif self._greeting:
            self._early.append(data)

    def eof_received(self) -> bool | None:
        return self._http.eof_received() if self._http else None

    def pause_writing(self) -> None:
        if self._http:
            self._http.pause_writing()

    def resume_writing(self) -> None:
        if self._http:
            self._http.resume_writing()


def _connection_of(request: web.Request) -> _Connection | None:
    protocol = request.transport.get_protocol() if request.transport else None
    return protocol if isinstance(protocol, _Connection) else None


def _peer_uid(transport: asyncio.BaseTransport) -> int | None:
    """Of the process that connected, as it was then."""
    size = struct.calcsize("3i")
    try:
        credentials = transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        _, uid, _ = struct.unpack("iII", credentials)
    except (OSError, AttributeError, struct.error):
        return None
    return int(uid)


def _address_of(transport: asyncio.Transport) -> str:
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) else "of an unknown address"


def _listening(address: Address) -> socket.socket:
    """A socket that listens there. `::` is every address there is, IPv4's too, as with the exporters."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # in spite of clients that have just left
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # whatever the host's bindv6only says
        listener.bind((address.host, address.port))
        listener.listen()  # here already, as this may be what tells that somebody else does
    except OSError:
        listener.close()
        raise
    return listener


def _clear(path: Path) -> None:
    """Make place for a socket."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UsageError(f"{path} is in the way: it is not a socket", hint=f"see what it is: ls -ld {path}")
        path.unlink()


def _bind(listener: socket.socket, path: Path) -> None:
    listener.bind(str(path))
    path.chmod(0o666)  # anybody may look; before it listens, so that nobody finds it shut


async def _next(events: AsyncIterator[Record]) -> Record | None:
    try:
        return await anext(events)
    except StopAsyncIteration:
        return None


async def _give_up(coming: asyncio.Task[Record | None], events: AsyncIterator[Record]) -> None:
    """Leave no task and no generator behind."""
    coming.cancel()
    await asyncio.wait({coming}, timeout=_GOODBYE)
    if not coming.done():
        return  # it runs still, and cannot be closed
    if not coming.cancelled():
        coming.exception()  # seen
    if aclose := getattr(events, "aclose", None):
        await aclose()


def _logger() -> logging.Logger:
    """What aiohttp logs, without what clients do wrong: anybody could fill the log with that."""
    logger = logging.getLogger("duende_ublkd.http")
    logger.addFilter(_is_ours)
    return logger


def _is_ours(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | ConnectionError)


def _dumps(value: object) -> bytes:
    """As UTF-8. A lone surrogate has none, but an escape that JSON understands."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=_dumps(value), status=status, content_type="application/json", charset="utf-8")


def _error(status: int, sentence: str, hint: str) -> web.Response:
    return _json({"error": printable(sentence, 1000), "hint": hint}, status)


def _refusal_of(request: web.Request, error: web.HTTPException) -> web.Response:
    """An error that aiohttp found, in our words."""
    path = printable(request.path)
    match error:
        case web.HTTPNotFound():
            return _error(404, f"there is nothing at {path}", _PATHS)
        case web.HTTPMethodNotAllowed():
            possible = ", ".join(sorted(error.allowed_methods))
            answer = _error(405, f"{path} does not take {printable(request.method)}", f"possible here: {possible}")
            answer.headers["Allow"] = possible
            return answer
        case web.HTTPRequestEntityTooLarge():
            return _error(413, f"the body is longer than {_BODY_LIMIT} bytes", "send one JSON object")
        case _:
            return _error(error.status, f"{path}: {error.reason}", "")


def _hold_object(hold: Hold) -> dict[str, Any]:
    return objects.hold_object(hold, now=time.monotonic(), at=time.time())


async def _read_body(request: web.Request, known: set[str]) -> dict[str, Any]:
    hint = 'send a JSON object, such as {"dev_id": 3}'
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise UsageError("the body is not JSON", hint=hint) from error
    if not isinstance(body, dict):
        raise UsageError("the body is not a JSON object", hint=hint)
    if unknown := sorted(body.keys() - known):
        raise UsageError(
            f"there is no key {printable(unknown[0])!r}", hint=f"possible here: {', '.join(sorted(known))}"
        )
    return body


def _sink(body: Mapping[str, Any]) -> str | None:
    sink = body.get("sink")
    if sink is not None and not isinstance(sink, str):
        raise UsageError("sink has to be the name of one, or null for each", hint='{"sink": "mail"}')
    return sink


def _dev_id(body: Mapping[str, Any]) -> int:
    dev_id = body.get("dev_id")
    if not isinstance(dev_id, int) or isinstance(dev_id, bool) or not 0 <= dev_id <= MAX_DEV_ID:
        raise UsageError(f"dev_id has to be a number from 0 to {MAX_DEV_ID}", hint='{"dev_id": 3}')
    return dev_id


def _seconds(body: Mapping[str, Any]) -> float:
    seconds = body.get("seconds", DEFAULT_TIME)
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not is_number or not SHORTEST_TIME <= seconds <= LONGEST_TIME:  # not a number is not between them either
        raise UsageError(
            f"seconds has to be a number from {SHORTEST_TIME:.0f} to {LONGEST_TIME:.0f}",
            hint=f'{{"dev_id": 3, "seconds": {DEFAULT_TIME:.0f}}}',
        )
    return float(seconds)


def _why(body: Mapping[str, Any]) -> str:
    why = body.get("why", "")
    if not isinstance(why, str):
        raise UsageError("why has to be a text", hint='{"dev_id": 3, "why": "new kernel"}')
    return printable(why, MOST_TEXT)


def _count(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    text = query.get(name, str(default))
    if not re.fullmatch("[0-9]{1,19}", text) or int(text) > most:
        raise UsageError(f"{name} has to be a number from 0 to {most}", hint=f"{name}={default}")
    return int(text)


def _epoch(text: str) -> float:
    try:
        since = float(text)
    except ValueError:
        since = math.nan
    if not math.isfinite(since):
        raise UsageError("since has to be a number: seconds since the epoch", hint="since=$(date -d '1 hour ago' +%s)")
    return since
