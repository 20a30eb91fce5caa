"""TLS, clients' certificates and passwords over TCP: who is let in, and that nobody who knocks hinders the daemon."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import logging
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import bcrypt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duende_ublkd.core.config import InvalidConfigError
from duende_ublkd.core.webconfig import ClientAuth, TlsConfig, TlsVersion, WebConfig
from duende_ublkd.report.access import Access, TooManyError, check
from duende_ublkd.report.metrics import Metrics
from duende_ublkd.report.web import Times, WebServer
from tests.certificates import Authority
from tests.test_report import a_device
from tests.test_web import APage, ASource, a_record, a_request, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PORT = 19118
CHEAP = bcrypt.hashpw(b"right", bcrypt.gensalt(4)).decode()
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="asks with curl")

Test: TypeAlias = "Callable[[WebServer, ASource], Awaitable[None]]"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("ca"))
    made.issue(made.directory / "server", "127.0.0.1")
    made.issue(made.directory / "renewed", "127.0.0.1")
    made.issue(made.directory / "alice", "alice.example.org", "192.0.2.7", "2001:db8::7")
    return made


def a_tls(authority: Authority, name: str = "server", **changes: Any) -> TlsConfig:  # noqa: ANN401
    crt = authority.directory / f"{name}.crt"
    return TlsConfig(crt.read_bytes(), crt.with_suffix(".key").read_bytes(), **changes)


def a_mutual_tls(authority: Authority, **changes: Any) -> TlsConfig:  # noqa: ANN401
    wanted = {"client_auth": ClientAuth.REQUIRED, "client_ca": authority.certificate.read_bytes(), **changes}
    return a_tls(authority, **wanted)


def serve(web: WebConfig | None, test: Test, times: Times | None = None, **source: Any) -> None:  # noqa: ANN401
    async def run() -> None:
        served = ASource(**source)
        server = WebServer(served, Metrics(), times)
        await server.listen("127.0.0.1", PORT, web)
        try:
            await test(server, served)
        finally:
            await server.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    asyncio.run(run())


def get(
    context: ssl.SSLContext | None, path: str = "/-/healthy", *, user: str = "", password: str = ""
) -> tuple[int, dict[str, str], bytes]:
    """One question on a connection of its own."""
    if context:
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            "127.0.0.1", PORT, context=context, timeout=20
        )
    else:
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=a_basic(user, password) if user else {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def a_basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}


async def asked(context: ssl.SSLContext | None, path: str = "/-/healthy", **who: str) -> int:
    return (await asyncio.to_thread(get, context, path, **who))[0]


# --- TLS


def test_who_trusts_the_authority_is_answered_and_who_speaks_plainly_is_not(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async def look(_server: WebServer, _source: ASource) -> None:
        assert await asked(authority.client()) == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            await asked(ssl.create_default_context())
        with pytest.raises((http.client.BadStatusLine, ConnectionError)):
            await asked(None)
        assert await asked(authority.client(), "/api/v1/devices") == 200

    with caplog.at_level(logging.INFO):
        serve(WebConfig(a_tls(authority)), look, devices={3: a_device()})
    assert [record for record in caplog.records if record.name != "asyncio" or record.levelno > logging.INFO] == []


@needs_curl
def test_curl_is_answered_with_a_certificate_and_a_password(authority: Authority) -> None:
    web = WebConfig(a_mutual_tls(authority), users={"alice": CHEAP})
    directory = authority.directory

    async def look(_server: WebServer, _source: ASource) -> None:
        async def curl(*options: str) -> tuple[int, str]:
            files = ("--cacert", str(authority.certificate), *options)
            command = ["curl", "-sS", "--max-time", "20", "-w", "%{http_code}", "-o", "/dev/null", *files]
            done = await asyncio.to_thread(
                subprocess.run,
                [*command, f"https://127.0.0.1:{PORT}/metrics"],
                check=False,
                capture_output=True,
                text=True,
                timeout=60,
            )
            return done.returncode, done.stdout

        shown = ("--cert", f"{directory}/alice.crt", "--key", f"{directory}/alice.key")
        assert await curl(*shown, "--user", "alice:right") == (0, "200")
        assert await curl(*shown, "--user", "alice:wrong") == (0, "401")
        assert (await curl("--user", "alice:right"))[0] != 0

    serve(web, look)


def test_a_certificate_is_asked_for_and_only_the_authoritys_own_counts(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path)
    mine, others = authority.directory / "alice.crt", other.issue(tmp_path / "mallory", "alice.example.org")

    async def look(_server: WebServer, _source: ASource) -> None:
        assert await asked(authority.client(mine)) == 200
        for stranger in (authority.client(), authority.client(others)):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asked(stranger)

    async def look_if_given(_server: WebServer, _source: ASource) -> None:
        assert await asked(authority.client(mine)) == 200
        assert await asked(authority.client()) == 200
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asked(authority.client(others))

    tls = a_mutual_tls(authority)
    serve(WebConfig(tls), look)
    serve(WebConfig(replace(tls, client_auth=ClientAuth.IF_GIVEN)), look_if_given)


@pytest.mark.parametrize("comment", ["# Autorité racine\n".encode(), b"# Autorit\xe9 racine\n\xff\n"])
def test_the_authorities_may_have_comments_in_any_encoding(authority: Authority, comment: bytes) -> None:
    mine, itself = authority.directory / "alice.crt", authority.certificate.read_bytes()

    async def look(_server: WebServer, _source: ASource) -> None:
        assert await asked(authority.client(mine)) == 200
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asked(authority.client())

    web = WebConfig(a_mutual_tls(authority, client_ca=comment + itself + comment))
    check(web, "web.yml")
    serve(web, look)


@pytest.mark.parametrize("what", ["nothing", "a comment", "DER", "a broken one"])
def test_what_holds_no_authority_is_a_mistake_of_its_key(authority: Authority, what: str) -> None:
    pem = authority.certificate.read_bytes()
    given = {
        "nothing": b"",
        "a comment": "# Autorité\n".encode(),
        "DER": ssl.PEM_cert_to_DER_cert(pem.decode()),
        "a broken one": pem[:200] + b"\xe9" + pem[200:],
    }
    with pytest.raises(InvalidConfigError, match=r"tls_server_config\.client_ca_file: .*ca\.pem holds no certificate"):
        check(WebConfig(a_mutual_tls(authority, client_ca=given[what], names={"client_ca_file": "ca.pem"})), "web.yml")


def test_an_authority_that_another_one_has_signed_is_enough(authority: Authority, tmp_path: Path) -> None:
    """As with the exporters: Go takes every certificate of the file for one to be trusted."""
    middle = Authority(tmp_path)
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-key", middle.key, "-subj", "/CN=middle", "-days", "2"),
            *("-CA", authority.certificate, "-CAkey", authority.key, "-out", middle.certificate),
            *("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign"),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    signed = middle.issue(tmp_path / "bob", "bob.example.org")

    async def look(_server: WebServer, _source: ASource) -> None:
        assert await asked(authority.client(signed)) == 200
        with pytest.raises((ssl.SSLError, ConnectionError)):  # signed by the one above, which is not in the file
            await asked(authority.client(authority.directory / "alice.crt"))

    serve(WebConfig(a_mutual_tls(authority, client_ca=middle.certificate.read_bytes())), look)


def told_of_refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "duende_ublkd"]


def test_whose_certificate_is_refused_is_in_the_log_with_the_reason_and_anybody_fills_it_slowly(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    others = Authority(tmp_path).issue(tmp_path / "mallory", "alice.example.org")

    async def look(_server: WebServer, _source: ASource) -> None:
        async def knock(context: ssl.SSLContext) -> None:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asked(context)

        await knock(authority.client(others))
        await until(lambda: len(told_of_refusals(caplog)) == 1)
        await knock(authority.client())
        await knock(authority.client(others))
        await asyncio.sleep(1.5)
        assert len(told_of_refusals(caplog)) == 1
        await knock(authority.client())
        await until(lambda: len(told_of_refusals(caplog)) == 2)

    with caplog.at_level(logging.INFO):
        serve(WebConfig(a_mutual_tls(authority)), look, Times(refusals=1.5))
    first, second = told_of_refusals(caplog)
    assert first.startswith("HTTP client 127.0.0.1 is refused: its certificate is not accepted: unable to get ")
    is_refused = "HTTP client 127.0.0.1 is refused: it has shown no certificate"
    assert second == f"{is_refused} (others since the last such line: 2)"


def test_who_does_not_get_as_far_as_a_certificate_is_not_in_the_log(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async def look(server: WebServer, _source: ASource) -> None:
        with pytest.raises((http.client.BadStatusLine, ConnectionError)):
            await asked(None)
        with pytest.raises(ssl.SSLCertVerificationError):
            await asked(ssl.create_default_context())
        await until(lambda: len(server._crowd) == 0)

    with caplog.at_level(logging.INFO):
        serve(WebConfig(a_mutual_tls(authority)), look)
    assert told_of_refusals(caplog) == []


@pytest.mark.parametrize("name", ["alice.example.org", "192.0.2.7", "2001:db8:0::7"])
def test_of_those_with_a_certificate_only_the_named_ones_stay(
    authority: Authority, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    mine, server = authority.directory / "alice.crt", authority.directory / "server.crt"

    async def look(_server: WebServer, _source: ASource) -> None:
        assert await asked(authority.client(mine)) == 200
        with pytest.raises((ssl.SSLError, http.client.BadStatusLine, ConnectionError)):
            await asked(authority.client(server))

    with caplog.at_level(logging.INFO):
        serve(WebConfig(a_mutual_tls(authority, allowed_sans=("bob.example.org", name))), look)
    assert told_of_refusals(caplog) == [
        "HTTP client 127.0.0.1 is refused: its certificate has none of client_allowed_sans"
    ]


def test_the_versions_of_tls_are_those_that_are_asked_for(authority: Authority) -> None:
    old = authority.client()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    new = authority.client()
    new.minimum_version = ssl.TLSVersion.TLSv1_3

    async def look_new(_server: WebServer, _source: ASource) -> None:
        assert await asked(new) == 200
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asked(old)

    async def look_old(_server: WebServer, _source: ASource) -> None:
        assert await asked(old) == 200
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asked(new)

    serve(WebConfig(a_tls(authority, min_version=TlsVersion.TLS13)), look_new)
    serve(WebConfig(a_tls(authority, max_version=TlsVersion.TLS12)), look_old)


def test_what_comes_along_with_the_end_of_the_handshake_is_not_lost(authority: Authority) -> None:
    """The client's last flight and its request in one packet."""

    def converse() -> bytes:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        speaker = authority.client().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        with socket.create_connection(("127.0.0.1", PORT), timeout=10) as channel:
            while True:
                try:
                    speaker.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    channel.sendall(outgoing.read())
                    incoming.write(channel.recv(1 << 16))
            speaker.write(a_request("GET", "/-/healthy"))
            channel.sendall(outgoing.read())
            answer = b""
            while b"healthy" not in answer:
                data = channel.recv(1 << 16)
                assert data
                incoming.write(data)
                with contextlib.suppress(ssl.SSLWantReadError):
                    answer += speaker.read(1 << 16)
            return answer

    async def look(_server: WebServer, _source: ASource) -> None:
        for _ in range(20):
            assert b"200 OK" in await asyncio.to_thread(converse)

    serve(WebConfig(a_tls(authority)), look)


def test_every_answer_has_the_headers_that_are_asked_for_and_the_page_its_own_policy_alone(
    authority: Authority,
) -> None:
    """A browser keeps to both of two policies, and would not run the page's script under `default-src 'self'`."""
    headers = {"Content-Security-Policy": "default-src 'self'", "X-Frame-Options": "deny"}

    async def look(_server: WebServer, _source: ASource) -> None:
        for path in ("/metrics", "/nowhere"):
            assert await asyncio.to_thread(policies, path) == ["default-src 'self'"]
        assert await asyncio.to_thread(policies, "/") == [APage().policy]

    def policies(path: str) -> list[str]:
        connection = http.client.HTTPSConnection("127.0.0.1", PORT, context=authority.client(), timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            assert answer.headers["X-Frame-Options"] == "deny"
            return list(answer.headers.get_all("Content-Security-Policy", []))

    serve(WebConfig(a_tls(authority), headers=headers), look)


# --- passwords


def test_nothing_is_told_to_who_has_no_password_whatever_is_asked(authority: Authority) -> None:
    async def look(_server: WebServer, _source: ASource) -> None:
        for path in ("/", "/metrics", "/-/healthy", "/api/v1/devices", "/nowhere"):
            status, headers, body = await asyncio.to_thread(get, authority.client(), path)
            assert status == 401
            assert headers["WWW-Authenticate"] == 'Basic realm="duende-ublkd", charset="UTF-8"'
            assert b"ublk3" not in body
            for user, password in (
                ("alice", "wrong"),
                ("bob", "right"),
                ("alice", ""),
                ("", "right"),
                ("x" * 2000, ""),
            ):
                assert await asked(authority.client(), path, user=user or " ", password=password) == 401
        assert await asked(authority.client(), "/metrics", user="alice", password="right") == 200
        assert await asked(authority.client(), "/metrics", user="josé", password="pässword") == 200
        assert await asked(authority.client(), "/metrics", user="josé", password="pässworD") == 401

    other = bcrypt.hashpw("pässword".encode(), bcrypt.gensalt(4)).decode()
    users = {"alice": CHEAP, "josé": other.replace("$2b$", "$2y$")}
    serve(WebConfig(a_tls(authority), users=users), look, devices={3: a_device()})


def test_a_user_who_was_let_in_does_not_wait_behind_those_who_guess() -> None:
    dear = bcrypt.hashpw(b"right", bcrypt.gensalt(11)).decode()

    async def knock() -> None:
        access = Access(WebConfig(users={"alice": dear}))
        right = a_basic("alice", "right")["Authorization"]
        assert await access.knows(right)
        guesses = [asyncio.ensure_future(access.knows(a_basic("alice", f"{n}")["Authorization"])) for n in range(16)]
        await asyncio.sleep(0)
        began = time.monotonic()
        assert await access.knows(right)
        assert time.monotonic() - began < 0.05
        assert not any(guess.done() for guess in guesses)
        with pytest.raises(TooManyError):
            await asyncio.gather(*(access.knows(a_basic("bob", f"{n}")["Authorization"]) for n in range(4)))
        access.close()
        async with asyncio.timeout(20):
            told = await asyncio.gather(*guesses, return_exceptions=True)
        assert sum(isinstance(each, TooManyError) for each in told) >= 14, "who waits is not left waiting"
        with pytest.raises(TooManyError):
            await access.knows(a_basic("alice", "x")["Authorization"])

    asyncio.run(knock())


def test_who_comes_when_too_many_guess_is_told_to_come_again() -> None:
    dear = bcrypt.hashpw(b"right", bcrypt.gensalt(10)).decode()

    async def look(_server: WebServer, _source: ASource) -> None:
        answers = await asyncio.gather(*(_guess(f"{n}") for n in range(24)))
        refused = [answer for answer in answers if answer.startswith(b"HTTP/1.1 503 ")]
        assert 1 <= len(refused) <= 24 - 16
        assert all(b"\r\nRetry-After: 1\r\n" in answer for answer in refused)
        assert all(answer.startswith(b"HTTP/1.1 401 ") for answer in answers if answer not in refused)

    serve(WebConfig(users={"alice": dear}), look)


async def _guess(password: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    name, value = next(iter(a_basic("alice", password).items()))
    writer.write(a_request("GET", "/metrics", b"", f"{name}: {value}"))
    async with asyncio.timeout(30):
        answer = await reader.read()
    writer.transport.abort()
    return answer


def test_it_takes_as_long_to_refuse_a_stranger_as_a_user() -> None:
    """In time of the processor: what else the machine does is another matter."""
    hashes = {name: bcrypt.hashpw(b"right", bcrypt.gensalt(8)).decode() for name in ("alice", "bob")}

    async def knock() -> None:
        before = set(threading.enumerate())
        access = Access(WebConfig(users=hashes))
        await access.knows(a_basic("alice", "right")["Authorization"])  # whose digest is remembered
        (thread,) = {each for each in threading.enumerate() if each.name == "passwords"} - before
        assert thread.ident
        clock = time.pthread_getcpuclockid(thread.ident)

        async def cost(user: str) -> float:
            began = time.clock_gettime(clock)
            assert not await access.knows(a_basic(user, "wrong")["Authorization"])
            return time.clock_gettime(clock) - began

        costs = [{user: await cost(user) for user in ("alice", "bob", "mallory", "")} for _ in range(30)]
        least = {user: min(each[user] for each in costs) for user in costs[0]}
        assert max(least.values()) < 1.5 * min(least.values()), least
        access.close()

    asyncio.run(knock())


def test_a_stranger_costs_what_some_user_costs_always_the_same() -> None:
    hashes = {f"u{cost}": bcrypt.hashpw(b"x", bcrypt.gensalt(cost)).decode() for cost in (4, 5)}

    async def knock() -> None:
        access = Access(WebConfig(users=hashes))
        passwords = access._passwords
        assert passwords
        costs = {passwords._stranger(f"stranger{n}")[:7] for n in range(40)}
        assert costs == {b"$2b$04$", b"$2b$05$"}
        assert len({passwords._stranger("mallory") for _ in range(10)}) == 1

    asyncio.run(knock())


def test_a_password_counts_up_to_its_72nd_byte_as_with_the_exporters() -> None:
    hashed = bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4)).decode()

    async def knock() -> None:
        access = Access(WebConfig(users={"alice": hashed}))
        assert await access.knows(a_basic("alice", "x" * 100)["Authorization"])
        assert not await access.knows(a_basic("alice", "x" * 71)["Authorization"])
        assert not await access.knows(a_basic("alice", "x" * 71 + "\0")["Authorization"])
        access.close()

    asyncio.run(knock())


def test_no_header_lets_anybody_in_or_breaks_anything() -> None:
    loop = asyncio.new_event_loop()

    async def make() -> Access:
        return Access(WebConfig(users={"alice": CHEAP}))

    access = loop.run_until_complete(make())
    pieces = st.sampled_from(["Basic ", "basic\t", "Bearer ", "YWxpY2U6cmlnaHQ", "=", "\udcff", "alice:right", "\0"])
    encoded = st.binary(max_size=90).map(lambda data: f"Basic {base64.b64encode(b'alice:' + data).decode()}")

    @settings(max_examples=150)
    @given(st.none() | st.text(max_size=60) | st.lists(pieces, max_size=4).map("".join) | encoded)
    def fuzz(header: str | None) -> None:
        is_right = header is not None and header.partition(" ")[2].strip().rstrip("=") == "YWxpY2U6cmlnaHQ"
        assert loop.run_until_complete(access.knows(header)) in (False, is_right)

    try:
        fuzz()
    finally:
        access.close()
        loop.close()


# --- renewal


def test_a_renewed_certificate_is_shown_to_the_next_client_and_nobody_is_cut(authority: Authority) -> None:
    def serial(connection: http.client.HTTPSConnection) -> str:
        assert isinstance(connection.sock, ssl.SSLSocket)
        certificate = connection.sock.getpeercert()
        assert certificate
        return str(certificate["serialNumber"])

    def ask(connection: http.client.HTTPSConnection) -> int:
        connection.request("GET", "/-/healthy")
        answer = connection.getresponse()
        answer.read()
        return answer.status

    async def look(server: WebServer, source: ASource) -> None:
        listener = server._server
        old, new = (
            http.client.HTTPSConnection("127.0.0.1", PORT, context=authority.client(), timeout=20) for _ in range(2)
        )
        assert await asyncio.to_thread(ask, old) == 200
        follower = http.client.HTTPSConnection("127.0.0.1", PORT, context=authority.client(), timeout=20)
        await asyncio.to_thread(follower.request, "GET", "/api/v1/events?follow=1")
        stream = await asyncio.to_thread(follower.getresponse)
        server.take(WebConfig(a_tls(authority, "renewed")))
        assert await asyncio.to_thread(ask, new) == 200
        assert await asyncio.to_thread(ask, old) == 200
        assert serial(old) != serial(new)
        source.add(a_record(1))
        assert await asyncio.to_thread(stream.readline) == b"\n"
        assert b'"seq": 1' in await asyncio.to_thread(stream.readline)
        assert server._server is listener
        for connection in (old, new, follower):
            connection.close()

    serve(WebConfig(a_tls(authority)), look)


def test_tls_and_passwords_come_and_go_without_the_listener(authority: Authority) -> None:
    async def look(server: WebServer, _source: ASource) -> None:
        kept = http.client.HTTPConnection("127.0.0.1", PORT, timeout=20)

        def ask() -> int:
            kept.request("GET", "/-/healthy")
            answer = kept.getresponse()
            answer.read()
            return answer.status

        assert await asyncio.to_thread(ask) == 200
        server.take(WebConfig(a_tls(authority), users={"alice": CHEAP}))
        assert await asyncio.to_thread(ask) == 401, "who is connected already needs a password, too"
        assert await asked(authority.client(), user="alice", password="right") == 200
        server.take(None)
        assert await asked(None) == 200
        kept.close()

    serve(None, look)


def test_a_client_that_does_not_say_goodbye_keeps_no_place(authority: Authority) -> None:
    async def leave(server: WebServer, _source: ASource) -> None:
        with socket.create_connection(("127.0.0.1", PORT)) as plain:
            secured = authority.client().wrap_socket(plain, server_hostname="127.0.0.1", do_handshake_on_connect=False)
            await asyncio.to_thread(secured.do_handshake)
            await asyncio.to_thread(secured.sendall, a_request("GET", "/-/healthy"))
            assert b"200 OK" in await asyncio.to_thread(secured.recv, 1 << 16)
            began = time.monotonic()
            await until(lambda: len(server._crowd) == 0)
            assert time.monotonic() - began < 5
            secured.close()

    serve(WebConfig(a_tls(authority)), leave)


def test_a_client_that_asks_nothing_after_the_handshake_is_cut(authority: Authority) -> None:
    async def idle(server: WebServer, _source: ASource) -> None:
        with socket.create_connection(("127.0.0.1", PORT)) as plain:
            secured = authority.client().wrap_socket(plain, server_hostname="127.0.0.1", do_handshake_on_connect=False)
            await asyncio.to_thread(secured.do_handshake)
            await until(lambda: len(server._crowd) == 1)
            await until(lambda: len(server._crowd) == 0)
            secured.close()

    serve(WebConfig(a_tls(authority)), idle, Times(patience=0.5))


def test_whatever_is_said_instead_of_a_handshake_the_next_client_is_served(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    hello = _hello(authority)

    async def look(server: WebServer, _source: ASource) -> None:
        loop = asyncio.get_running_loop()

        def say(data: bytes) -> None:
            with socket.create_connection(("127.0.0.1", PORT), timeout=10) as channel, contextlib.suppress(OSError):
                channel.sendall(data)
                channel.shutdown(socket.SHUT_WR)
                while channel.recv(1 << 16):
                    pass

        @settings(max_examples=60)
        @given(st.integers(0, len(hello)), st.integers(0, 40), st.binary(max_size=30), st.booleans())
        def fuzz(at: int, drop: int, piece: bytes, whole: bool) -> None:  # noqa: FBT001
            say((hello if whole else b"")[:at] + piece + hello[at + drop :])

        await loop.run_in_executor(None, fuzz)
        await until(lambda: len(server._crowd) == 0)
        assert await asked(authority.client()) == 200

    with caplog.at_level(logging.INFO):
        serve(WebConfig(a_tls(authority)), look, Times(handshake=2.0))
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


def _hello(authority: Authority) -> bytes:
    """What a client says first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    speaker = authority.client().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with contextlib.suppress(ssl.SSLWantReadError):
        speaker.do_handshake()
    return outgoing.read()


# --- crowds


def test_clients_that_do_not_shake_hands_take_places_and_are_cut(authority: Authority) -> None:
    async def crowd(server: WebServer, _source: ASource) -> None:
        slow = [await asyncio.open_connection("127.0.0.1", PORT) for _ in range(70)]
        began = time.monotonic()
        try:
            for n, (_, writer) in enumerate(slow[:64]):
                writer.write(b"\x16\x03\x01\x02\x00\x01"[: n % 7])
            async with asyncio.timeout(10):
                assert await asyncio.gather(*(_rest(reader) for reader, _ in slow[64:])) == [b""] * 6
            assert len(server._crowd) == 64
            async with asyncio.timeout(30):
                assert await asyncio.gather(*(_rest(reader) for reader, _ in slow[:64])) == [b""] * 64
            assert time.monotonic() - began > 1.5
            await until(lambda: len(server._crowd) == 0)
            assert await asked(authority.client()) == 200
        finally:
            for _, writer in slow:
                writer.transport.abort()

    serve(WebConfig(a_tls(authority)), crowd, Times(handshake=3.0))


async def _rest(reader: asyncio.StreamReader) -> bytes:
    with contextlib.suppress(ConnectionError):
        return await reader.read()
    return b""


def test_half_a_handshake_does_not_hold_up_the_end(authority: Authority) -> None:
    async def end() -> float:
        server = WebServer(ASource(), Metrics())
        await server.listen("127.0.0.1", PORT, WebConfig(a_tls(authority)))
        _, writer = await asyncio.open_connection("127.0.0.1", PORT)
        await until(lambda: len(server._crowd) == 1)
        began = time.monotonic()
        await server.close()
        took = time.monotonic() - began
        await until(lambda: len(asyncio.all_tasks()) == 1)
        assert len(server._crowd) == 0
        writer.transport.abort()
        return took

    assert asyncio.run(end()) < 4


_LOAD = """
import base64, itertools, socket, ssl, sys, time
port, until = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
print("there", flush=True)
slow, guesses = [], []
for n in itertools.count():
    if time.monotonic() > until:
        break
    if len(slow) < 24:
        slow.append(socket.create_connection(("127.0.0.1", port), timeout=5))
        slow[-1].sendall(b"\\x16\\x03\\x01\\x02\\x00\\x01\\x00"[: n % 8])
        continue
    guess = base64.b64encode(b"alice:%d" % n).decode()
    try:
        plain = socket.create_connection(("127.0.0.1", port), timeout=5)
        guesses.append(context.wrap_socket(plain))
        guesses[-1].sendall(f"GET / HTTP/1.1\\r\\nHost: x\\r\\nAuthorization: Basic {guess}\\r\\n\\r\\n".encode() * 20)
    except OSError:
        time.sleep(0.01)
    if len(guesses) > 12:
        guesses.pop(0).close()
"""


def test_nobody_who_knocks_keeps_the_loop_from_its_work(authority: Authority) -> None:
    """Half-open handshakes, whole ones, and passwords that take a quarter of a second each, from another process."""
    dear = bcrypt.hashpw(b"right", bcrypt.gensalt(12)).decode()
    one = _seconds_of(lambda: bcrypt.checkpw(b"x", dear.encode()))

    async def look(server: WebServer, _source: ASource) -> None:
        load = [
            await asyncio.to_thread(
                subprocess.Popen,
                [sys.executable, "-I", "-c", _LOAD, str(PORT), "6"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            for _ in range(2)
        ]
        for each in load:
            assert each.stdout
            await asyncio.to_thread(each.stdout.readline)
        await until(lambda: len(server._crowd) >= 48)
        passwords = server._access._passwords if server._access else None
        await until(lambda: passwords is not None and passwords._worker is not None)
        lags = []
        until_then = time.monotonic() + 4
        began_cpu = time.thread_time()
        while time.monotonic() < until_then:
            began = time.monotonic()
            await asyncio.sleep(0.005)
            lags.append(time.monotonic() - began - 0.005)
        spent = time.thread_time() - began_cpu
        late = statistics.quantiles(lags, n=20)[-1]
        print(f"lag: median {statistics.median(lags):.4f}, 95% {late:.4f}, most {max(lags):.4f} s")
        print(f"of 4 s the loop was busy for {spent:.2f} s; a password takes {one:.3f} s")
        for each in load:
            await asyncio.to_thread(each.communicate)
        assert late < one / 2
        assert spent < 2.0, "most of the loop's time is its own"

    serve(WebConfig(a_tls(authority), users={"alice": dear}), look)


def _seconds_of(deed: Callable[[], object]) -> float:
    began = time.monotonic()
    deed()
    return time.monotonic() - began


def test_the_thread_that_looks_at_passwords_gives_way_and_goes() -> None:
    async def knock() -> None:
        before = set(threading.enumerate())
        access = Access(WebConfig(users={"alice": CHEAP}))
        assert await access.knows(a_basic("alice", "right")["Authorization"])
        (thread,) = {each for each in threading.enumerate() if each.name == "passwords"} - before
        assert thread.native_id
        status = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
        assert status.rpartition(")")[2].split()[16] == "10"
        access.close()
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()

    asyncio.run(knock())
