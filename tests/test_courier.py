"""Alerts over a network, by the real courier to real sockets: what arrives, what is said when it does not, and who waits."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from duende_ublkd.core.errors import DuendeError
from duende_ublkd.kernel.children import Children
from duende_ublkd.report.alerts import alertmanager, dispatch, wire
from duende_ublkd.report.alerts.webhook import signed
from tests import monitors, receivers
from tests.lab import tools
from tests.receivers import (
    Certificates,
    Receiver,
    a_courier,
    a_notice,
    a_sink,
    listening,
    one_told,
    status,
    told,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from duende_ublkd.core.alertconfig import SinkConfig
    from duende_ublkd.report.alerts.answer import Answer

T = TypeVar("T")
NOBODY = 65534
AT_ONCE = 0.5  # seconds; what waits for nothing takes less, and every time limit here is longer


def run(task: Awaitable[T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(120):
            return await task

    return asyncio.run(bounded())


async def until(condition: Callable[[], object], deadline: float = 30) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return receivers.make_certificates(tmp_path_factory.mktemp("certificates"))


def hook(receiver: Receiver, **changes: Any) -> SinkConfig:  # noqa: ANN401 - fields of SinkConfig
    return a_sink(url=f"http://127.0.0.1:{receiver.port}/hooks/s3cret", **changes)


def secret_file(place: Path, text: str = "s3cret\n", mode: int = 0o600) -> Path:
    file = place / "secret"
    file.write_text(text)
    file.chmod(mode)
    return file


# --- webhooks


def test_a_webhook_gets_each_notice_as_it_is_with_the_labels_of_its_sink() -> None:
    async def scenario() -> None:
        async with listening() as receiver, a_courier(hook(receiver, labels={"cluster": "berlin"})) as courier:
            answer = await told(courier, "webhook", a_notice(summary="é \ud800"), a_notice(state="over"))
            assert answer.ok
            assert answer.detail == f"taken by 127.0.0.1:{receiver.port}"
            first, second = receiver.requests
            assert first.line == "POST /hooks/s3cret HTTP/1.1"
            assert first.headers["content-type"] == "application/json"
            assert receivers_signature(first) is None
            assert first.json == a_notice(summary="é \ud800", labels={"cluster": "berlin"})
            assert second.json["state"] == "over"

    run(scenario())


def receivers_signature(request: receivers.Request) -> tuple[str, str] | None:
    found = request.headers.get("x-duende-ublkd-timestamp"), request.headers.get("x-duende-ublkd-signature")
    return None if None in found else (str(found[0]), str(found[1]))


def test_a_signed_notice_can_be_checked_by_whoever_has_the_secret(tmp_path: Path) -> None:
    async def scenario() -> None:
        file = secret_file(tmp_path)
        async with listening() as receiver, a_courier(hook(receiver, secret_file=str(file))) as courier:
            for secret in ("s3cret", "another"):
                file.write_text(f"{secret}\n")
                assert (await told(courier, "webhook")).ok
                request = receiver.requests.pop()
                signature = receivers_signature(request)
                assert signature
                assert abs(int(signature[0]) - time.time()) < 60
                signed_text = f"{signature[0]}.".encode() + request.body
                assert signature[1] == "sha256=" + hmac.new(secret.encode(), signed_text, hashlib.sha256).hexdigest()

    run(scenario())


def test_the_signature_of_the_manual_is_the_one_that_is_sent() -> None:
    assert signed(b'{"version": 1}', b"s3cret", 1767323045.9) == {
        "X-Duende-Ublkd-Timestamp": "1767323045",
        "X-Duende-Ublkd-Signature": "sha256=f1fe08d90340c48c726757a95d82fbadf500b11dfcddab28885030196362b9db",
    }


@pytest.mark.parametrize(
    ("username", "headers"),
    [
        ({"username": "duende"}, "Basic ZHVlbmRlOnMzY3JldA=="),
        ({}, "Bearer s3cret"),
    ],
)
def test_credentials_come_from_their_files(tmp_path: Path, username: dict[str, str], headers: str) -> None:
    async def scenario() -> None:
        key = "password_file" if username else "bearer_token_file"
        async with listening() as receiver:
            sink = hook(receiver, **username, **{key: str(secret_file(tmp_path))})
            assert (await one_told(sink)).ok
            assert receiver.requests[0].headers["authorization"] == headers

    run(scenario())


def _readable(file: Path) -> None:
    file.chmod(0o604)


def _writable(file: Path) -> None:
    file.chmod(0o660)


def _anothers(file: Path) -> None:
    os.chown(file, NOBODY, NOBODY)


def _empty(file: Path) -> None:
    file.write_text("\n")


def _long(file: Path) -> None:
    file.write_text("x" * 20_000)


def _lines(file: Path) -> None:
    file.write_text("a\nb\n")


def _gone(file: Path) -> None:
    file.unlink()


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_readable, "can be read by others (mode 0604): chmod o-r "),
        (_writable, "can be written by others (mode 0660): chmod go-w "),
        (_anothers, f"belongs to uid {NOBODY}: chown root "),
        (_empty, "is empty"),
        (_long, "is no secret of one line: is it the right file?"),
        (_lines, "is no secret of one line: is it the right file?"),
        (_gone, "cannot be read: No such file or directory"),
        (_fifo, "is no regular file"),
    ],
)
def test_a_secret_that_is_none_is_not_used_and_nothing_is_sent(
    tmp_path: Path, spoil: Callable[[Path], None], why: str
) -> None:
    async def scenario() -> None:
        file = secret_file(tmp_path)
        async with listening() as receiver, a_courier(hook(receiver, secret_file=str(file))) as courier:
            spoil(file)
            answer = await told(courier, "webhook")
            assert f"secret_file {file} {why}" in answer.detail
            assert (answer.ok, answer.permanent) == (False, False)
            assert "s3cret" not in answer.detail
            assert receiver.connections == 0
            file.unlink(missing_ok=True)
            secret_file(tmp_path)
            assert (await told(courier, "webhook")).ok

    run(scenario())


@pytest.mark.parametrize("secret", [b"s3cret\xe4", b"\xff\xfe"])
def test_a_password_that_is_no_text_is_told_as_that_and_nothing_of_it_is_shown(tmp_path: Path, secret: bytes) -> None:
    async def scenario() -> None:
        file = secret_file(tmp_path)
        file.write_bytes(secret)
        async with (
            listening() as receiver,
            a_courier(hook(receiver, username="duende", password_file=str(file))) as courier,
        ):
            answer = await told(courier, "webhook")
            assert answer.detail == f"password_file {file} is no UTF-8: is it the right file?"
            assert receiver.connections == 0

    run(scenario())


CONNECTION_CLOSED = "it closed the connection without an answer"


@pytest.mark.parametrize(
    ("receiver", "why", "is_permanent"),
    [
        (Receiver(status(500, "out of cheese")), "HTTP 500: out of cheese", False),
        (Receiver(status(503)), "HTTP 503", False),
        (Receiver(status(400, "no \x1b[31m such field\n")), r"HTTP 400: no \x1b[31m such field", True),
        (
            Receiver(status(401, "")),
            "HTTP 401; are username and password_file, or bearer_token_file, right?",
            True,
        ),
        (Receiver(status(404, "nothing")), "HTTP 404: nothing; is url right?", True),
        (Receiver(status(408)), "HTTP 408", False),
        (Receiver(status(425)), "HTTP 425", False),
        (Receiver(status(429, "slow down")), "HTTP 429: slow down", False),
        (
            Receiver(status(302, "", "Location: http://127.0.0.1:1/elsewhere")),
            "HTTP 302: it redirects to 127.0.0.1:1, which is not followed: write where to as url",
            False,
        ),
        (Receiver(behaviour=receivers.hang), "127.0.0.1:PORT does not answer: given up after 1 s", False),
        (Receiver(behaviour=receivers.close_at_once), CONNECTION_CLOSED, False),
        (
            Receiver(behaviour=receivers.a_byte_now_and_then),
            "127.0.0.1:PORT does not answer: given up after 1 s",
            False,
        ),
        (
            Receiver(behaviour=receivers.say(b"SSH-2.0-OpenSSH_9.2\r\n")),
            "what answers there is no HTTP server: ",
            False,
        ),
        (
            Receiver(b"HTTP/1.1 200 OK\r\nX" + b"y" * 90_000 + b": z\r\n\r\n"),
            "what answers there is no HTTP ser",
            False,
        ),
        (Receiver(b"HTTP/1.1 500 Oh\r\nContent-Length: 9\r\n\r\nhalf"), "HTTP 500", False),
        (
            Receiver(b"HTTP/1.1 500 Oh\r\nTransfer-Encoding: chunked\r\n\r\nzz"),
            "what answers there is no HTTP server",
            False,
        ),
    ],
)
def test_what_a_webhook_that_does_not_take_it_says_is_told(receiver: Receiver, why: str, is_permanent: bool) -> None:  # noqa: FBT001
    async def scenario() -> Answer:
        async with listening(receiver):
            return await one_told(hook(receiver, timeout=1.0))

    answer = run(scenario())
    assert not answer.ok
    assert answer.detail.startswith(why.replace("PORT", str(receiver.port)))
    assert answer.permanent is is_permanent
    assert answer.seconds < 3
    assert receiver.connections == 1
    assert "hooks" not in answer.detail


def test_headers_without_end_are_read_no_further_than_anybody_needs() -> None:
    async def scenario() -> Answer:
        receiver = Receiver(behaviour=receivers.headers_without_end)
        async with listening(receiver):
            answer = await one_told(hook(receiver, timeout=20.0))
        assert receiver.written < 16 << 20
        return answer

    answer = run(scenario())
    assert not answer.ok
    assert "is no HTTP server" in answer.detail or CONNECTION_CLOSED in answer.detail
    assert answer.seconds < 15


@pytest.mark.parametrize("number", [200, 500])
def test_of_an_answer_of_a_gigabyte_only_the_beginning_is_read(number: int) -> None:
    async def scenario() -> Answer:
        receiver = Receiver(behaviour=receivers.a_gigabyte(number))
        async with listening(receiver):
            answer = await one_told(hook(receiver, timeout=20.0))
            await until(lambda: not receiver._tasks)
        assert receiver.written < 32 << 20
        return answer

    answer = run(scenario())
    assert answer.ok is (number == 200)
    assert answer.seconds < 15
    assert number == 200 or "HTTP 500: zzzz" in answer.detail
    assert len(answer.detail) <= 300


def test_nobody_listening_is_told_as_that() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        answer = run(one_told(a_sink(url=f"http://127.0.0.1:{port}/")))
    assert answer.detail == "Connection refused: nobody listens there; does it run?"


def test_a_sink_that_hangs_delays_no_other() -> None:
    async def scenario() -> None:
        async with listening(Receiver(behaviour=receivers.hang)) as deaf, listening() as well:
            sinks = hook(deaf, name="deaf", timeout=20.0), hook(well, name="well")
            async with a_courier(*sinks) as courier:
                slow = asyncio.ensure_future(told(courier, "deaf"))
                await until(lambda: deaf.connections)
                began = time.monotonic()
                for _ in range(20):
                    assert (await told(courier, "well")).ok
                assert time.monotonic() - began < 10
                assert not slow.done()
            assert (await slow).detail == "the daemon ends"

    run(scenario())


# --- TLS


def over_tls(receiver: Receiver, host: str = "127.0.0.1", **changes: Any) -> SinkConfig:  # noqa: ANN401 - as SinkConfig
    return a_sink(url=f"https://{host}:{receiver.port}/", **changes)


@pytest.mark.parametrize(
    ("shown", "ca", "why"),
    [
        (
            "server",
            "",
            "its certificate is not trusted: .*local issuer.*; ca_file = a file with the certificate of the auth",
        ),
        (
            "selfsigned",
            "",
            "its certificate is not trusted: self-signed certificate; ca_file = a file with the certificate it",
        ),
        ("server", "selfsigned", "its certificate is not trusted: .*; it is not of the authority in ca_file"),
        ("elsewhere", "authority", "its certificate is for another name: .*127.0.0.1"),
        ("expired", "authority", "its certificate has expired, or the clock here is wrong"),
    ],
)
def test_a_certificate_that_is_not_to_be_trusted_is_told_plainly(
    certificates: Certificates, shown: str, ca: str, why: str
) -> None:
    async def scenario() -> None:
        async with listening(tls=certificates.context(shown)) as receiver:
            answer = await one_told(over_tls(receiver, ca_file=certificates.file(ca) if ca else ""))
            assert re.match(why, answer.detail), answer.detail
            assert (answer.ok, answer.permanent) == (False, False)
            assert receiver.requests == []

    run(scenario())


def test_a_trusted_certificate_is_enough_and_a_clients_own_is_sent(certificates: Certificates) -> None:
    async def scenario() -> None:
        context = certificates.context("server", wants_client=True)
        no_tls = receivers.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        async with listening(tls=context) as receiver, listening(Receiver(behaviour=no_tls)) as plain:
            ca, cert, key = certificates.file("authority"), certificates.file("client"), certificates.key("client")
            ca_key = certificates.key("authority")
            sinks = (
                over_tls(receiver, "localhost", name="good", ca_file=ca, cert_file=cert, key_file=key),
                over_tls(receiver, name="without", ca_file=ca),
                over_tls(plain, name="plain", ca_file=ca),
                over_tls(receiver, name="no-ca", ca_file=key),
                over_tls(receiver, name="no-key", ca_file=ca, cert_file=cert, key_file=ca_key),
            )
            async with a_courier(*sinks) as courier:
                assert (await told(courier, "good")).ok
                assert "does it want cert_file and key_file?" in (await told(courier, "without")).detail
                assert (await told(courier, "plain")).detail == "what answers there does not speak TLS"
                assert f"ca_file {key} holds no certificate" in (await told(courier, "no-ca")).detail
                assert f"{cert} and {ca_key} cannot be used" in (await told(courier, "no-key")).detail
            assert len(receiver.requests) == 1

    run(scenario())


def test_a_key_that_others_can_read_is_not_used(certificates: Certificates, tmp_path: Path) -> None:
    async def scenario() -> None:
        key = tmp_path / "client.key"
        key.write_bytes(Path(certificates.key("client")).read_bytes())
        key.chmod(0o644)
        async with listening(tls=certificates.context("server")) as receiver:
            sink = over_tls(receiver, cert_file=certificates.file("client"), key_file=str(key))
            answer = await one_told(sink)
            assert answer.detail == f"key_file {key} can be read by others (mode 0644): chmod o-r {key}"
            assert receiver.connections == 0

    run(scenario())


# --- names


@contextlib.contextmanager
def courier_with(resolv_conf: Path, monkeypatch: pytest.MonkeyPatch, place: Path) -> Iterator[None]:
    """The couriers of this block have a resolv.conf of their own, and no other way to a name but a file of hosts, if any."""
    nsswitch, hosts = place / "nsswitch.conf", place / "hosts"
    nsswitch.write_text("hosts: files dns\n")
    hosts.open("a").close()
    mounts = f"mount --bind {resolv_conf} /etc/resolv.conf && mount --bind {nsswitch} /etc/nsswitch.conf"
    mounts += f" && mount --bind {hosts} /etc/hosts"
    program = place / "python"
    inner = f'{mounts} && exec {sys.executable} "$@"'
    program.write_text(f"#!/bin/sh\nexec unshare --mount --propagation private sh -c '{inner}' sh \"$@\"\n")
    program.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(program))
        yield


def test_a_name_server_that_never_answers_hangs_the_sinks_that_ask_it_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text("nameserver 127.0.0.77\noptions timeout:30 attempts:3\n")

    async def scenario() -> None:
        with courier_with(resolv_conf, monkeypatch, tmp_path):
            named = [a_sink(name=f"named{number}", url="http://alerts.example/x", timeout=1.0) for number in range(8)]
            mail = a_sink("mail", to=("a@b.example",), from_="c@d.example", server="mail.example:25", timeout=1.0)
            async with listening() as well, a_courier(*named, mail, hook(well, name="well")) as courier:
                answers = await asyncio.gather(*(told(courier, sink.name) for sink in (*named, mail)))
                for answer in answers[:-1]:
                    assert "the name alerts.example is looked up, and no name server answers: given up" in answer.detail
                assert "the name mail.example is looked up, and no name server answers" in answers[-1].detail
                assert (await told(courier, "well")).ok
                again = await told(courier, "named0")
                assert "the name alerts.example is looked up, and no name server answers" in again.detail
                assert courier.pid
                threads = len(list(Path(f"/proc/{courier.pid}/task").iterdir()))
                assert threads <= 1 + len(named) + 1

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as name_server:
        name_server.bind(("127.0.0.77", 53))
        run(scenario())


def test_a_name_that_nobody_has_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text("nameserver 127.0.0.77\noptions timeout:1 attempts:1\n")

    async def scenario() -> Answer:
        with courier_with(resolv_conf, monkeypatch, tmp_path):  # nobody listens at 127.0.0.77
            return await one_told(a_sink(url="http://alerts.example/", timeout=20.0))

    assert re.match("its name is not known: .*resolution", run(scenario()).detail)


@contextlib.contextmanager
def an_address_where_nobody_answers(port: int) -> Iterator[str]:
    """As a host behind a firewall that drops what comes: its queue of connections is full."""
    address = ("127.0.0.1", port)  # which comes before any other that a name may have
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(address)
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(address)
        yield address[0]


@pytest.mark.parametrize("kind", ["webhook", "mail"])
def test_an_address_that_leads_nowhere_does_not_take_the_time_of_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    async def scenario() -> None:
        async with listening(Receiver(behaviour=receivers.say(b"554 go away\r\n")), host="127.0.0.78") as receiver:
            with an_address_where_nobody_answers(receiver.port) as nowhere:
                (tmp_path / "hosts").write_text(f"{nowhere} two.example\n127.0.0.78 two.example\n")
                url = {"url": f"http://two.example:{receiver.port}/"}
                server = {"to": ("a@b.example",), "from_": "c@d.example", "server": f"two.example:{receiver.port}"}
                sink = a_sink(kind, timeout=8.0, **(url if kind == "webhook" else server))
                with courier_with(tmp_path / "hosts", monkeypatch, tmp_path):
                    answer = await one_told(sink)
        assert answer.detail.startswith(("what answers there is no HTTP server", "it takes no connection: 554 go away"))
        assert receiver.connections == 1
        assert answer.seconds > 0.2

    run(scenario())


# --- Alertmanager


def test_an_alert_has_labels_that_stay_the_same_and_the_rest_in_its_annotations() -> None:
    sink = a_sink("alertmanager", url="http://x", labels={"cluster": "berlin", "severity": "page"})
    now = datetime(2026, 1, 2, 3, 10, tzinfo=UTC)
    notice = a_notice(kind="recovery-given-up")
    raised = alertmanager.alert_object(notice, sink.to_object(), now, 60.0)
    over = alertmanager.alert_object(
        {**notice, "state": "over", "over_at": "2026-01-02T03:09:00+00:00", "summary": "gone", "facts": {}},
        sink.to_object(),
        now,
        60.0,
    )
    assert raised["labels"] == over["labels"]
    assert raised["labels"] == {
        "alertname": "DuendeUblkdRecoveryGivenUp",
        "cluster": "berlin",
        "dev_id": "3",
        "host": "node7",
        "key": "ublk3/4711/pinned",
        "kind": "recovery-given-up",
        "severity": "warning",
    }
    assert raised["annotations"]["summary"] == notice["summary"]
    assert raised["annotations"]["runbook_url"] == notice["runbook_url"]
    assert "kernel_state: DEAD" in raised["annotations"]["description"]
    assert raised["startsAt"] == over["startsAt"] == "2026-01-02T03:04:05.678+00:00"
    assert over["endsAt"] == "2026-01-02T03:09:00.000+00:00"


@pytest.mark.parametrize(("resend", "minutes"), [(60.0, 5), (600.0, 40)])
def test_an_alert_that_nobody_sends_again_ends_by_itself_after_some_resends(resend: float, minutes: int) -> None:
    now = datetime(2026, 1, 2, 3, 10, tzinfo=UTC)
    found = alertmanager.alert_object(a_notice(), {}, now, resend)
    assert datetime.fromisoformat(found["endsAt"]) == now + timedelta(minutes=minutes)
    test = alertmanager.alert_object(a_notice(state="test", kind="test"), {}, now, resend)
    assert datetime.fromisoformat(test["endsAt"]) == now + timedelta(minutes=5)


def test_an_alert_never_ends_before_it_begins_though_the_clock_was_set_back() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    over = a_notice(state="over", over_at="2026-01-01T00:00:00+00:00")
    for notice in (over, a_notice()):
        found = alertmanager.alert_object(notice, {}, now, 60.0)
        assert found["startsAt"] <= found["endsAt"]


def test_an_alert_that_was_noted_while_the_clock_was_ahead_is_open_now_and_over_now() -> None:
    now = datetime(2026, 1, 2, 1, tzinfo=UTC)  # it was raised two hours later
    over = alertmanager.alert_object(a_notice(state="over", over_at="2026-01-02T03:05:00+00:00"), {}, now, 60.0)
    assert over["startsAt"] == over["endsAt"] == now.isoformat(timespec="milliseconds")
    raised = alertmanager.alert_object(a_notice(), {}, now, 60.0)
    assert raised["startsAt"] == now.isoformat(timespec="milliseconds")
    assert datetime.fromisoformat(raised["endsAt"]) == now + alertmanager.MOMENT
    later = alertmanager.alert_object(
        a_notice(state="over", over_at="2026-01-02T03:05:00+00:00"), {}, now + timedelta(days=1), 60.0
    )
    assert (later["startsAt"], later["endsAt"]) == ("2026-01-02T03:04:05.678+00:00", "2026-01-02T03:05:00.000+00:00")


def firing(real: monitors.Alertmanager) -> dict[str, Any]:
    return {alert["labels"]["key"]: alert for alert in real.alerts()}


@pytest.mark.skipif(not tools.is_possible("alertmanager"), reason="it is neither installed nor to be fetched here")
def test_a_real_alertmanager_has_what_is_raised_until_it_is_over(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = "route: {receiver: nobody}\nreceivers: [{name: nobody}]\n"
        with monitors.Alertmanager(tmp_path, config) as real:
            async with a_courier(a_sink("alertmanager", url=f"{real.address}/")) as courier:
                now = datetime.now(UTC)
                lasting = a_notice(raised_at=(now - timedelta(hours=1)).isoformat(), summary='"é\\\n\x07"')
                daemon = a_notice(key="daemon/journal", kind="degraded", dev_id=None, instance=None)
                test = a_notice(key="test", kind="test", state="test", severity="info", raised_at=now.isoformat())
                assert (await told(courier, "alertmanager", lasting, daemon, test)).ok
                found = firing(real)
                assert found.keys() == {"ublk3/4711/pinned", "daemon/journal", "test"}
                assert found["ublk3/4711/pinned"]["labels"]["alertname"] == "DuendeUblkdPinned"
                assert "dev_id" not in found["daemon/journal"]["labels"]
                ends = datetime.fromisoformat(found["test"]["endsAt"])
                assert timedelta(minutes=4) < ends - now < timedelta(minutes=6)
                over = {**lasting, "state": "over", "over_at": now.isoformat()}
                assert (await told(courier, "alertmanager", over)).ok
                assert firing(real).keys() == {"daemon/journal", "test"}
                bad = a_notice(raised_at=now.isoformat(), labels={"no label": "x"})
                answer = await told(courier, "alertmanager", bad)
                assert (answer.ok, answer.permanent) == (False, True)
                assert answer.detail.startswith("HTTP 400: ")

    run(scenario())


def test_one_member_that_takes_it_is_enough_and_the_others_are_named() -> None:
    async def scenario() -> None:
        async with (
            listening(Receiver(behaviour=receivers.hang)) as deaf,
            listening(Receiver(status(500, "sick"))) as sick,
            listening() as well,
        ):
            urls = tuple(f"http://127.0.0.1:{each.port}" for each in (deaf, sick, well))
            sinks = [
                a_sink("alertmanager", name="some", urls=urls, timeout=1.0),
                a_sink("alertmanager", name="none", urls=urls[:2], timeout=1.0),
                a_sink("alertmanager", name="all", urls=urls[2:], timeout=1.0),
            ]
            async with a_courier(*sinks) as courier:
                some = await told(courier, "some")
                none = await told(courier, "none")
                every = await told(courier, "all")
            assert well.requests[0].line == "POST /api/v2/alerts HTTP/1.1"
            silent = f"127.0.0.1:{deaf.port}: 127.0.0.1:{deaf.port} does not answer: given up after 1 s"
            assert some.ok
            assert some.detail == f"taken by 1 of 3; not by {silent}; 127.0.0.1:{sick.port}: HTTP 500: sick"
            assert some.missed == f"127.0.0.1:{deaf.port}, 127.0.0.1:{sick.port}"
            assert (none.missed, every.missed) == ("", "")
            assert not none.ok
            assert none.detail == f"{silent}; 127.0.0.1:{sick.port}: HTTP 500: sick"
            assert every.ok

    run(scenario())


def test_of_an_alert_that_was_raised_and_is_over_in_one_message_the_latest_counts() -> None:
    async def scenario() -> None:
        async with listening() as receiver:
            over = a_notice(state="over", over_at="2026-01-02T03:09:00+00:00")
            sink = a_sink("alertmanager", url=f"http://127.0.0.1:{receiver.port}")
            assert (await one_told(sink, a_notice(), over)).ok
            (alert,) = receiver.requests[0].json
            assert alert["endsAt"] == "2026-01-02T03:09:00.000+00:00"

    run(scenario())


# --- the courier as a process


def links_of(pid: int) -> dict[int, str]:
    return {int(each.name): str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()}


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def parent_of(pid: int) -> int:
    return int(status_of(pid)["PPid"])


@contextlib.contextmanager
def a_nursery() -> Iterator[Children]:
    children = Children()
    children.start()
    try:
        yield children
    finally:
        children.close()


def test_the_courier_is_a_weak_process_that_ends_with_its_socket() -> None:
    async def scenario() -> int:
        async with listening() as receiver, a_courier(hook(receiver)) as courier:
            await told(courier, "webhook")
            pid = courier.pid
            assert pid
            about = status_of(pid)
            for capabilities in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                assert int(about[capabilities], 16) == 0
            assert about["NoNewPrivs"] == "1"
            assert int(about["VmLck"].split()[0]) == 0
            assert int(about["VmRSS"].split()[0]) < 80_000
            assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "0\n"
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert re.search(r"Max data size +268435456 +268435456", limits)
            assert re.search(r"Max core file size +0 +0", limits)
            assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
            inherited = {link for number, link in links_of(pid).items() if number < 3}
            assert inherited == {"/dev/null", next(link for link in inherited if link.startswith("socket:"))}
            assert all(link.startswith(("socket:", "anon_inode:")) for n, link in links_of(pid).items() if n > 2)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(pid, number)
            assert (await told(courier, "webhook")).ok
            assert courier.pid == pid
            return pid

    Path("/proc/self/oom_score_adj").write_text("100")
    try:
        pid = run(scenario())
    finally:
        Path("/proc/self/oom_score_adj").write_text("0")
    assert not Path(f"/proc/{pid}").exists()


def test_a_courier_whose_daemon_is_killed_ends_though_a_sink_hangs() -> None:
    async def scenario() -> None:
        async with listening(Receiver(behaviour=receivers.hang)) as deaf:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with ours, theirs:
                courier = subprocess.Popen(dispatch.arguments(), stdin=theirs.fileno())
                theirs.close()
                for order in (
                    {"do": "configure", "sinks": [hook(deaf, timeout=300.0).to_object()]},
                    {"do": "deliver", "id": 1, "sink": "webhook", "notices": [a_notice()]},
                ):
                    for packet in wire.packets(order):
                        ours.send(packet)
                await until(lambda: deaf.connections)
                ours.close()
                await until(lambda: courier.poll() is not None, 10)
                assert courier.returncode == 0

    run(scenario())


def test_notices_that_fit_no_single_packet_arrive_whole() -> None:
    async def scenario() -> None:
        async with listening() as receiver:
            facts = {"text": "x" * 100_000}
            notices = [a_notice(key=f"ublk{number}", dev_id=number, facts=facts) for number in range(10)]
            assert (await one_told(a_sink("alertmanager", url=f"http://127.0.0.1:{receiver.port}"), *notices)).ok
            assert [alert["labels"]["dev_id"] for alert in receiver.requests[0].json] == [
                str(each) for each in range(10)
            ]

    run(scenario())


def test_what_can_never_be_sent_is_answered_and_sends_nothing() -> None:
    async def scenario() -> None:
        async with listening() as receiver, a_courier(hook(receiver), a_sink("command", command=("true",))) as courier:
            for name in ("nobody", "command"):
                assert "there is no sink" in (await told(courier, name)).detail
            assert (
                "bytes are more than" in (await told(courier, "webhook", a_notice(facts={"x": "y" * (9 << 20)}))).detail
            )
            assert "it cannot be sent" in (await told(courier, "webhook", a_notice(facts={"x": object()}))).detail
            assert receiver.connections == 0

    run(scenario())


def test_a_configuration_that_changes_counts_from_the_next_delivery_on() -> None:
    async def scenario() -> None:
        async with listening() as one, listening() as other, a_courier(hook(one)) as courier:
            assert (await told(courier, "webhook")).ok
            courier.configure([hook(other)])
            assert (await told(courier, "webhook")).ok
            courier.configure([])
            assert "there is no sink" in (await told(courier, "webhook")).detail
            assert (len(one.requests), len(other.requests)) == (1, 1)

    run(scenario())


def test_where_no_sink_needs_a_network_there_is_no_courier() -> None:
    async def scenario() -> None:
        async with a_courier(a_sink("command", command=("true",))) as courier:
            await asyncio.sleep(0.2)
            assert courier.pid is None
            assert courier.trouble == ""

    run(scenario())


def test_the_first_courier_is_a_child_of_ours_and_each_later_one_is_spawned() -> None:
    troubles: list[str] = []

    async def scenario() -> None:
        with a_nursery() as children:
            how = {"spawn": children.spawn, "on_trouble": troubles.append}
            async with listening() as receiver, a_courier(hook(receiver), **how) as courier:
                assert (await told(courier, "webhook")).ok
                assert courier.pid
                assert parent_of(courier.pid) == os.getpid()
                for _ in range(2):
                    pid = courier.pid
                    assert pid
                    os.kill(pid, signal.SIGKILL)
                    await until(lambda pid=pid: courier.pid not in (pid, None))  # type: ignore[misc]
                    assert parent_of(courier.pid) == children.nursery_pid
                    assert (await told(courier, "webhook")).ok

    run(scenario())
    assert troubles == [
        "the courier of alerts ended (killed by signal 9); another one is started",
        "",
        "the courier of alerts ended; another one is started",
        "",
    ]


def test_what_is_under_way_when_the_courier_dies_is_answered_as_not_delivered() -> None:
    async def scenario() -> None:
        async with (
            listening(Receiver(behaviour=receivers.hang)) as deaf,
            a_courier(hook(deaf, timeout=100.0)) as courier,
        ):
            delivery = asyncio.ensure_future(told(courier, "webhook"))
            await until(lambda: deaf.connections)
            assert courier.pid
            os.kill(courier.pid, signal.SIGKILL)
            answer = await delivery
            assert (answer.ok, answer.permanent) == (False, False)
            assert answer.detail == "the courier of alerts ended, and another one is started"
            assert courier.under_way == 0

    run(scenario())


def test_a_courier_that_hangs_is_killed_when_its_time_is_up_and_another_one_delivers() -> None:
    troubles: list[str] = []

    async def scenario() -> None:
        async with listening() as receiver:
            sink = hook(receiver, timeout=0.2)
            async with a_courier(sink, grace=0.5, on_trouble=troubles.append) as courier:
                await until(lambda: courier.pid and courier._is_ready)
                pid = courier.pid
                assert pid
                os.kill(pid, signal.SIGSTOP)
                began = time.monotonic()
                answer = await told(courier, "webhook")
                assert time.monotonic() - began < 5
                assert answer.detail == "the courier of alerts has not answered for 0.7 s, and another one is started"
                await until(lambda: courier.pid not in (pid, None) and courier._is_ready)
                assert (await told(courier, "webhook")).ok

    run(scenario())
    assert troubles[0] == "the courier of alerts hangs"
    assert troubles[-1] == ""


A_LAGGARD = """
import os, socket, time
socket.socket(fileno=os.dup(0)).send(b'.{"do": "ready"}')
os.closerange(0, 256)
time.sleep(100)
"""


def test_no_courier_is_started_beside_one_that_hangs_while_it_ends() -> None:
    troubles: list[str] = []
    laggards: list[subprocess.Popen[bytes]] = []

    def spawn(_: Sequence[str], stdin: int) -> None:
        laggards.append(subprocess.Popen([sys.executable, "-c", A_LAGGARD], stdin=stdin))

    async def scenario() -> None:
        async with listening() as receiver:
            sink = hook(receiver, timeout=0.5)
            async with a_courier(sink, grace=0.5, spawn=spawn, on_trouble=troubles.append) as courier:
                await until(lambda: courier.pid)
                assert courier.pid
                os.kill(courier.pid, signal.SIGKILL)
                await until(lambda: "the courier of alerts hangs while it ends" in troubles)
                answer = await told(courier, "webhook")
                assert answer.detail == "the courier of alerts hangs while it ends"
                assert len(laggards) == 1
                laggards[0].kill()
                laggards[0].wait()
                await until(lambda: len(laggards) == 2)

    try:
        run(scenario())
    finally:
        for each in laggards:
            each.kill()
            each.wait()


def test_a_courier_that_cannot_be_started_is_told_and_tried_again() -> None:
    troubles: list[str] = []

    async def scenario() -> None:
        children = Children()
        async with listening() as receiver:
            sink = hook(receiver, timeout=0.5)
            async with a_courier(sink, grace=0.5, spawn=children.spawn, on_trouble=troubles.append) as courier:
                assert courier.pid
                os.kill(courier.pid, signal.SIGKILL)
                await until(lambda: any("cannot be started" in each for each in troubles))
                assert "the courier of alerts cannot be started: " in (await told(courier, "webhook")).detail
                children.start()
                await until(lambda: courier.trouble == "")
                assert (await told(courier, "webhook")).ok
        children.close()

    run(scenario())


def test_a_delivery_waits_for_a_courier_that_is_started_again() -> None:
    failing = [True]

    def spawn(argv: Sequence[str], stdin: int) -> None:
        if failing:
            failing.clear()
            raise DuendeError("not now")
        spawned.append(subprocess.Popen(argv, stdin=stdin))

    spawned: list[subprocess.Popen[bytes]] = []

    async def scenario() -> None:
        async with listening() as receiver, a_courier(hook(receiver), spawn=spawn) as courier:
            await until(lambda: courier._is_ready)
            assert courier.pid
            os.kill(courier.pid, signal.SIGKILL)
            await until(lambda: not courier._is_ready)
            assert (await told(courier, "webhook")).ok
            assert not failing

    run(scenario())
    for each in spawned:
        each.wait(10)


@pytest.mark.parametrize("said", ["nonsense", '.{"id": 1}', ".[]", "." + "[" * 10_000])
def test_a_courier_that_cannot_be_understood_is_replaced(said: str, tmp_path: Path) -> None:
    babbler = tmp_path / "babbler.py"
    babbler.write_text(f"import socket, time\nsocket.socket(fileno=0).send({said.encode()!r})\ntime.sleep(100)\n")
    argvs = [[sys.executable, str(babbler)]]
    troubles: list[str] = []

    async def scenario() -> None:
        with a_nursery() as children:

            def spawn(argv: Sequence[str], stdin: int) -> None:
                children.spawn(argvs.pop() if argvs else argv, stdin)

            how = {"spawn": spawn, "on_trouble": troubles.append}
            async with listening() as receiver, a_courier(hook(receiver), **how) as courier:
                await until(lambda: courier.pid)
                assert courier.pid
                os.kill(courier.pid, signal.SIGKILL)
                await until(lambda: any("is not understood" in each for each in troubles))
                assert (await told(courier, "webhook")).ok

    run(scenario())
    assert argvs == []
    assert troubles[-1] == ""


def test_a_courier_that_never_says_that_it_is_ready_is_killed(tmp_path: Path) -> None:
    mute = tmp_path / "mute"
    mute.write_text("#!/bin/sh\nexec sleep 100\n")
    mute.chmod(0o755)
    troubles: list[str] = []

    async def scenario() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", str(mute))
            courier = dispatch.Courier(on_trouble=troubles.append, start_within=0.3, first_pause=0.05)
            courier.configure([a_sink(url="http://127.0.0.1:1/")])
            courier.start()
        await until(lambda: len([each for each in troubles if "has said nothing for 0.3 s" in each]) > 1)
        await courier.close()

    run(scenario())
    assert "the courier of alerts ended (killed by signal 9); another one is started" in troubles


def test_a_courier_that_lacks_what_it_needs_says_what_that_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aiohttp.py").write_text("raise ImportError('no such wheel')\n")
    monkeypatch.syspath_prepend(tmp_path)
    troubles: list[str] = []

    async def scenario() -> None:
        courier = dispatch.Courier(on_trouble=troubles.append, grace=0.5, first_pause=0.05)
        courier.configure([a_sink(url="http://127.0.0.1:1/", timeout=1.0)])
        courier.start()
        await until(lambda: troubles)
        assert (await told(courier, "webhook")).detail == troubles[0]
        await courier.close()

    run(scenario())
    assert troubles == ["the courier of alerts cannot run: ImportError('no such wheel')"]


def test_closing_waits_for_nobody_and_answers_what_is_under_way() -> None:
    async def scenario() -> None:
        async with (
            listening(Receiver(behaviour=receivers.hang)) as deaf,
            a_courier(hook(deaf, timeout=100.0)) as courier,
        ):
            answers = [asyncio.ensure_future(told(courier, "webhook")) for _ in range(2)]
            await until(lambda: deaf.connections == 2)
            pid = courier.pid
            assert pid
            os.kill(pid, signal.SIGSTOP)
            began = time.monotonic()
            await courier.close()
            assert time.monotonic() - began < 0.5 + AT_ONCE
            assert [(await each).detail for each in answers] == ["the daemon ends"] * 2
            assert (await told(courier, "webhook")).detail == "the daemon ends"
            await until(lambda: not is_alive(pid))

    run(scenario())


def is_alive(pid: int) -> bool:
    try:
        return status_of(pid)["State"][0] not in "ZX"
    except FileNotFoundError:
        return False


def test_more_than_can_be_under_way_is_refused_at_once() -> None:
    async def scenario() -> None:
        async with (
            listening(Receiver(behaviour=receivers.hang)) as deaf,
            a_courier(hook(deaf, timeout=100.0)) as courier,
        ):
            waiting = [asyncio.ensure_future(told(courier, "webhook")) for _ in range(dispatch.MOST_UNDER_WAY)]
            await until(lambda: courier.under_way == dispatch.MOST_UNDER_WAY)
            began = time.monotonic()
            assert (await told(courier, "webhook")).detail == "64 deliveries are under way already"
            assert time.monotonic() - began < AT_ONCE
            await courier.close()
            await asyncio.gather(*waiting)

    run(scenario())


def test_a_hundred_deliveries_leave_nothing_behind_in_the_courier() -> None:
    async def scenario() -> None:
        async with listening() as receiver, a_courier(hook(receiver)) as courier:
            await told(courier, "webhook")
            assert courier.pid
            before = len(links_of(courier.pid))
            for _ in range(100):
                assert (await told(courier, "webhook")).ok
            assert len(links_of(courier.pid)) == before
            assert int(status_of(courier.pid)["Threads"]) <= 2

    run(scenario())


# --- the packets


@pytest.mark.parametrize("size", [0, 1, wire.PACKET - 20, wire.PACKET, wire.PACKET + 1, 5 * wire.PACKET])
def test_a_message_of_any_size_comes_out_as_it_went_in(size: int) -> None:
    joiner = wire.Joiner()
    for _ in range(2):
        *first, last = (joiner.take(packet) for packet in wire.packets({"x": "y" * size}))
        assert first == [None] * len(first)
        assert last == {"x": "y" * size}


def test_a_message_without_end_is_refused() -> None:
    joiner = wire.Joiner()
    for _ in range(wire.MOST // wire.PACKET):
        assert joiner.take(b"+" + b"x" * wire.PACKET) is None
    with pytest.raises(ValueError, match="without end"):
        joiner.take(b"+" + b"x" * wire.PACKET)
