"""Alerts by mail: what is in the message, and what a real SMTP server, or one that misbehaves, makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import email
import json
import socket
from datetime import UTC, datetime, timedelta
from email import policy
from email.message import EmailMessage
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, LoginPassword
from hypothesis import example, given, settings
from hypothesis import strategies as st

from duende_ublkd.core.alertconfig import Encryption
from duende_ublkd.report.alerts import alertmanager, mail
from tests import receivers
from tests.receivers import Certificates, Receiver, a_courier, a_notice, a_sink, listening, one_told, told

if TYPE_CHECKING:
    from collections.abc import Iterator

    from duende_ublkd.core.alertconfig import SinkConfig
    from duende_ublkd.report.alerts.answer import Answer


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return receivers.make_certificates(tmp_path_factory.mktemp("certificates"))


class Mailbox:
    """What aiosmtpd asks; `says` answers for each recipient that is not taken, and for the message itself."""

    def __init__(self, **says: str) -> None:
        self._says = says
        self.got: list[tuple[list[str], EmailMessage]] = []
        self.logins: list[tuple[bytes, bytes]] = []

    async def handle_RCPT(self, _: Any, __: Any, envelope: Any, address: str, ___: Any) -> str:  # noqa: ANN401, N802
        if reply := self._says.get(address.partition("@")[0]):
            return reply
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _: Any, __: Any, envelope: Any) -> str:  # noqa: ANN401, N802
        if reply := self._says.get("DATA"):
            return reply
        message = email.message_from_bytes(envelope.content, policy=policy.default)
        assert isinstance(message, EmailMessage)
        self.got.append((list(envelope.rcpt_tos), message))
        return "250 OK"

    def authenticate(self, _: Any, __: Any, ___: Any, ____: Any, login: LoginPassword) -> AuthResult:  # noqa: ANN401
        self.logins.append((login.login, login.password))
        return AuthResult(success=login.password == b"s3cret", handled=False)


@contextlib.contextmanager
def a_server(mailbox: Mailbox, **options: Any) -> Iterator[int]:  # noqa: ANN401 - as aiosmtpd's
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    controller = Controller(mailbox, hostname="127.0.0.1", port=port, **options)
    controller.start()
    try:
        yield port
    finally:
        controller.stop()


def by_mail(port: int, **changes: Any) -> SinkConfig:  # noqa: ANN401 - fields of SinkConfig
    usual: dict[str, Any] = {
        "to": ("oncall@example.org",),
        "from_": "duende-ublkd@example.org",
        "server": f"127.0.0.1:{port}",
        "tls": Encryption.NONE,
    }
    return a_sink("mail", **{**usual, **changes})


def send(sink: SinkConfig, *notices: dict[str, Any]) -> Answer:
    return asyncio.run(one_told(sink, *notices))


# --- the message


def a_message(**changes: Any) -> EmailMessage:  # noqa: ANN401 - fields of a notice
    return mail.message_of(a_notice(**changes), by_mail(25).to_object(), datetime(2026, 1, 2, 4, tzinfo=UTC))


def test_a_message_has_what_a_person_on_call_needs() -> None:
    message = a_message()
    assert message["Subject"] == (
        "[node7] warning: ublk3 is pinned: its old disk is mounted at /mnt by 4121 (postgres)"
    )
    assert message["From"] == "duende-ublkd@example.org"
    assert message["To"] == "oncall@example.org"
    assert message["Auto-Submitted"] == "auto-generated"
    assert message.get_content_type() == "text/plain"
    assert parsedate_to_datetime(message["Date"]) == datetime(2026, 1, 2, 4, tzinfo=UTC)
    text = message.get_content()
    for line in (
        "ublk3 is pinned: its old disk is mounted at /mnt by 4121 (postgres)",
        "Host:     node7",
        "Device:   ublk3 (/dev/ublkb3)",
        "Since:    2026-01-02T03:04:05.678+00:00",
        "  holders: kind mount, what /mnt",
        "To see more:  duende-ublkd explain 3",
        "What to do:   https://example.org/README.md#alert-pinned",
    ):
        assert line in text.splitlines()


def test_what_is_over_or_still_lasts_is_seen_in_the_subject() -> None:
    assert a_message(state="over", over_why="nobody holds it")["Subject"].startswith("[node7] warning: over: ublk3 ")
    assert "Why over: nobody holds it" in a_message(state="over", over_why="nobody holds it").get_content()
    assert a_message(state="reminder")["Subject"].startswith("[node7] warning: still: ublk3 ")
    assert "duende-ublkd doctor" in a_message(dev_id=None).get_content()


def test_what_is_told_twice_has_the_same_id_and_what_follows_refers_to_the_first() -> None:
    first, again = a_message(), a_message(summary="ublk3 is pinned: by another one", facts={})
    assert first["Message-ID"] == again["Message-ID"]
    assert first["References"] is None
    over = a_message(state="over")
    assert over["Message-ID"] != first["Message-ID"]
    assert over["References"] == over["In-Reply-To"] == first["Message-ID"]
    others = [a_message(key="ublk4"), a_message(raised_at="2026-01-02T03:04:06+00:00"), a_message(host="node8")]
    assert len({message["Message-ID"] for message in (first, *others)}) == 4


def test_the_reminder_of_another_day_is_another_message() -> None:
    now = datetime(2026, 1, 2, 4, tzinfo=UTC)
    ids = [mail.message_id(a_notice(state="reminder"), now + timedelta(hours=hours)) for hours in (0, 1, 24)]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    "text", ["a\r\nBcc: x@y.example", "a\nb", "\x00", "a" * 5000, "é \ud800 \x1b[31m", ".\r\n.\r\n"]
)
def test_no_text_gets_out_of_its_place_in_a_message(text: str) -> None:
    message = a_message(summary=text, host=text, kind=text, facts={text: text}, over_why=text, severity=text)
    raw = message.as_bytes()
    head = raw.partition(b"\r\n\r\n")[0]
    names = [name.lower() for name in email.message_from_bytes(raw).keys()]  # noqa: SIM118 - with those that come twice
    assert len(names) == len(set(names))
    assert "bcc" not in names
    assert all(len(line) < 998 for line in raw.split(b"\r\n"))
    assert b"\0" not in raw
    assert len(head) < 2000


ENCODED = "=?utf-8?q?=0D=0ABcc:_x=40y=2Eexample?="
HOSTILE = st.text(max_size=300) | st.sampled_from(
    ["\r\n.\r\n", "a\r\nBcc: x@y.example\r\n\r\n", "\ud800", ENCODED, f"==??{ENCODED}"]
)


@settings(max_examples=100)
@example({"summary": ENCODED})
@given(
    st.dictionaries(st.sampled_from(["summary", "host", "kind", "severity", "key", "over_why", "runbook_url"]), HOSTILE)
)
def test_whatever_a_notice_says_it_is_one_message_and_one_alert(texts: dict[str, str]) -> None:
    notice = a_notice(**texts, facts={**texts, "nested": [texts]})
    raw = mail.message_of(notice, by_mail(25).to_object()).as_bytes()
    names = [name.lower() for name in email.message_from_bytes(raw).keys()]  # noqa: SIM118 - with those that come twice
    assert sorted(names) == sorted({*names})
    assert {"from", "to", "subject", "date", "message-id"} <= set(names) <= HEADERS
    assert b"\r\n.\r\n" not in raw
    alert = json.loads(json.dumps(alertmanager.alert_object(notice, {}, datetime.now(UTC), 60.0)))
    assert all(value and value.isprintable() for value in alert["labels"].values())
    assert all(line.isprintable() for text in alert["annotations"].values() for line in text.split("\n"))


HEADERS = {
    "from",
    "to",
    "subject",
    "date",
    "message-id",
    "auto-submitted",
    "x-mailer",
    "content-type",
    "content-transfer-encoding",
    "mime-version",
}


# --- a server


def test_a_real_server_gets_it_once_for_all_recipients() -> None:
    mailbox = Mailbox()
    with a_server(mailbox) as port:
        answer = send(
            by_mail(port, to=("a@example.org", "b@example.org")), a_notice(summary="ünïcode"), a_notice(key="x")
        )
    assert answer.ok
    assert answer.detail == f"taken by 127.0.0.1:{port} for a@example.org, b@example.org"
    (to, message), _ = mailbox.got
    assert to == ["a@example.org", "b@example.org"]
    assert message["Subject"] == "[node7] warning: ünïcode"


def test_starttls_is_used_and_its_certificate_has_to_be_right(certificates: Certificates, tmp_path: Path) -> None:
    mailbox = Mailbox()
    password = tmp_path / "password"
    password.write_text("s3cret\n")
    password.chmod(0o600)
    options = {
        "tls_context": certificates.context("server"),
        "require_starttls": True,
        "authenticator": mailbox.authenticate,
        "auth_required": True,
    }
    with a_server(mailbox, **options) as port:
        login = {"username": "duende", "password_file": str(password), "tls": Encryption.STARTTLS}
        good = by_mail(port, ca_file=certificates.file("authority"), **login)
        assert send(good).ok
        assert mailbox.logins == [(b"duende", b"s3cret")]
        untrusted = send(by_mail(port, **login))
        assert "its certificate is not trusted: " in untrusted.detail
        assert "ca_file = a file with" in untrusted.detail
        assert len(mailbox.logins) == 1
        password.write_text("wrong\n")
        wrong = send(good)
        assert wrong.detail.startswith("it does not take username and password_file: 535 ")
        assert wrong.permanent
        assert "wrong" not in wrong.detail
    assert len(mailbox.got) == 1


@pytest.mark.parametrize("secret", ["pässword", "parol\u043c"])
def test_a_password_that_smtplib_cannot_send_is_told_as_that_and_nothing_of_it_is_shown(
    tmp_path: Path, secret: str
) -> None:
    mailbox = Mailbox()
    password = tmp_path / "word"
    password.write_text(f"{secret}\n", "utf-8")
    password.chmod(0o600)
    with a_server(mailbox, authenticator=mailbox.authenticate, auth_require_tls=False) as port:
        told = send(by_mail(port, username="duende", password_file=str(password)))
        assert told.detail == (
            f"password_file {password} has more than ASCII, which no mail server is sent: choose another password"
        )
        assert not told.permanent
        password.write_text("s3cret\n")
        told = send(by_mail(port, username="jürgen", password_file=str(password)))
        assert told.detail == "username has more than ASCII, which no mail server is sent"
        assert send(by_mail(port, username="duende", password_file=str(password))).ok
    assert mailbox.logins == [(b"duende", b"s3cret")]


def test_what_cannot_be_encoded_is_not_shown() -> None:
    with pytest.raises(UnicodeEncodeError) as caught:
        "s3crät".encode("ascii")
    assert mail._why_no_message(caught.value) == "something in it cannot be encoded"
    assert mail._why_no_message(ValueError("too long")) == "too long"


def test_tls_from_the_start_is_one_word(certificates: Certificates) -> None:
    mailbox = Mailbox()
    with a_server(mailbox, ssl_context=certificates.context("server")) as port:
        sink = by_mail(port, tls=Encryption.TLS, ca_file=certificates.file("authority"))
        assert send(sink).ok
    with a_server(mailbox) as port:
        sink = by_mail(port, tls=Encryption.TLS, ca_file=certificates.file("authority"))
        assert send(sink).detail == "what answers there does not speak TLS"
    assert len(mailbox.got) == 1


def test_without_starttls_nothing_is_sent_to_a_server_that_was_to_have_it() -> None:
    mailbox = Mailbox()
    with a_server(mailbox) as port:
        answer = send(by_mail(port, tls=Encryption.STARTTLS))
    assert answer.detail.startswith('it offers no STARTTLS: tls = "tls"')
    assert mailbox.got == []


def test_a_recipient_that_is_refused_is_named_and_the_others_get_it() -> None:
    mailbox = Mailbox(b="550 no such user", c="451 later")
    with a_server(mailbox) as port:
        some = send(by_mail(port, to=("a@example.org", "b@example.org")))
        never = send(by_mail(port, to=("b@example.org",)))
        later = send(by_mail(port, to=("b@example.org", "c@example.org")))
    assert some.ok
    assert some.detail == f"taken by 127.0.0.1:{port} for a@example.org; not for b@example.org (550 no such user)"
    assert (some.missed, never.missed) == ("b@example.org", "")
    assert (never.ok, never.permanent) == (False, True)
    assert never.detail == "no recipient is taken: b@example.org (550 no such user)"
    assert (later.ok, later.permanent) == (False, False)
    assert [to for to, _ in mailbox.got] == [["a@example.org"]]


@pytest.mark.parametrize(("reply", "is_permanent"), [("554 this looks like spam", True), ("452 no space left", False)])
def test_a_message_that_is_refused_is_refused_for_ever_or_for_now(reply: str, is_permanent: bool) -> None:  # noqa: FBT001
    with a_server(Mailbox(DATA=reply)) as port:
        answer = send(by_mail(port))
    assert (answer.ok, answer.permanent) == (False, is_permanent)
    assert answer.detail == f"it does not take the message: {reply}"


def replies_without_end(first: bytes) -> Any:  # noqa: ANN401 - a behaviour
    async def behave(self: Receiver, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        while True:
            writer.write(b"250-and so on\r\n" * 1000)
            self.written += 15_000
            await writer.drain()

    return behave


@pytest.mark.parametrize(
    ("behaviour", "why", "is_permanent"),
    [
        (receivers.say(b"554 go away\r\n"), "it takes no connection: 554 go away", True),
        (receivers.say(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "what answers there does not speak SMTP", False),
        (receivers.close_at_once, "it closed the connection, or does not speak SMTP", False),
        (replies_without_end(b"220 hello\r\n"), "it closed the connection, or does not speak SMTP", False),
        (replies_without_end(b"220-hello\r\n"), "it closed the connection, or does not speak SMTP", False),
        (receivers.say(b"220 hello\r\n"), "", False),
        (receivers.say(b"220-" + b"x" * 20_000), "", False),
    ],
)
def test_a_server_that_misbehaves_is_given_up(behaviour: Any, why: str, is_permanent: bool) -> None:  # noqa: ANN401, FBT001
    async def scenario() -> tuple[Receiver, Answer]:
        async with listening(Receiver(behaviour=behaviour)) as receiver:
            return receiver, await one_told(by_mail(receiver.port, timeout=5.0))

    receiver, answer = asyncio.run(scenario())
    assert answer.detail.startswith(why)
    assert answer.detail
    assert (answer.ok, answer.permanent) == (False, is_permanent)
    assert answer.seconds < 5
    assert receiver.written < 16 << 20


async def _never(_: Receiver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"220 hello\r\n")
    while await reader.read(1000):
        await asyncio.sleep(0)


async def _slowly(self: Receiver, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    for byte in b"220-" + b"x" * 10_000:
        writer.write(bytes([byte]))
        self.written += 1
        await writer.drain()
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("behaviour", [_never, _slowly])
def test_a_server_that_hangs_has_its_time_and_its_thread_ends_with_it(behaviour: Any) -> None:  # noqa: ANN401
    async def scenario() -> None:
        async with listening(Receiver(behaviour=behaviour)) as receiver, a_courier() as courier:
            courier.configure([by_mail(receiver.port, timeout=2.0)])
            for _ in range(3):
                answer = await told(courier, "mail")
                assert answer.detail == f"127.0.0.1:{receiver.port} does not answer: given up after 2 s"
            assert receiver.connections == 3
            tasks = Path(f"/proc/{courier.pid}/task")
            async with asyncio.timeout(10):
                while len(list(tasks.iterdir())) > 1:
                    await asyncio.sleep(0.05)

    asyncio.run(scenario())


def test_nobody_listening_is_told_as_that() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        answer = send(by_mail(taken.getsockname()[1]))
    assert answer.detail == "Connection refused: nobody listens there; does it run?"


def test_a_password_is_not_sent_without_tls_to_another_machine(tmp_path: Path) -> None:
    async def scenario() -> None:
        receiver = Receiver(behaviour=receivers.say(b"220 hello\r\n"))
        server = await asyncio.start_server(receiver.serve, "0.0.0.0", 0)
        port = server.sockets[0].getsockname()[1]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))
            ours = probe.getsockname()[0]
        sink = by_mail(port, server=f"{ours}:{port}", username="duende", password_file=str(tmp_path / "no"))
        answer = await one_told(sink)
        assert answer.detail == 'a password is not sent without TLS: tls = "starttls", or "tls"'
        server.close()

    asyncio.run(scenario())
