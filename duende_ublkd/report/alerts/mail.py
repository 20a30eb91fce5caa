"""Mail: one message for each notice, handed to one SMTP server.

Facts:
- smtplib blocks. It runs aside, on a connection that was made here and that is shut down when time is up.
- A server may refuse one recipient and take the message for the others. It counts as delivered then, and says for whom not.
- A message that is sent twice, since the first answer was lost, has the same Message-ID. What follows on a raised alert
  refers to it, so that a mail program shows one fault as one thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import os
import smtplib
import socket
import ssl
from datetime import UTC, datetime
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any

from duende_ublkd import __version__
from duende_ublkd.core.text import printable
from duende_ublkd.report.alerts.answer import Taken
from duende_ublkd.report.alerts.aside import UndeliveredError
from duende_ublkd.report.alerts.files import read_secret
from duende_ublkd.report.alerts.posting import (
    MOST_SHOWN,
    Target,
    look_up,
    tls_context,
    why_no_tls,
    why_not_connected,
    why_not_trusted,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MOST_REPLY = 64 << 10  # bytes of all replies of one connection
_MOST_SUBJECT = 150  # characters
_MOST_FACTS = 30
_LEAST_REPLY = 200
_HARD = 500  # replies from here on mean never
_STATES = {"raised": "", "reminder": "still: ", "over": "over: ", "test": "test: "}


async def deliver(targets: Sequence[Target], notices: Sequence[Mapping[str, Any]]) -> Taken:
    """All on one connection; the first that nobody gets ends it, with UndeliveredError."""
    (target,) = targets
    host, _, port = str(target.sink["server"]).rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    connection = await _connected(target, host, int(port))
    # What smtplib makes of the connection detaches this object from it; the copy stays ours to shut it down by.
    brake = connection.dup()
    try:
        refused = await target.aside.run(
            f"{target.place} does not answer", lambda: _hand_over(connection, host, target.sink, notices)
        )
    finally:
        with brake, contextlib.suppress(OSError):  # closed already: all is done
            brake.shutdown(socket.SHUT_RDWR)
    to = [each for each in target.sink["to"] if each not in refused]
    text = f"taken by {target.place} for {printable(', '.join(to), MOST_SHOWN)}"
    if refused:
        text += "; not for " + "; ".join(f"{printable(each)} ({reply})" for each, reply in refused.items())
    return Taken(text, ", ".join(printable(each) for each in refused))


async def _connected(target: Target, host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    try:
        found = await look_up(target, host, port)
    except OSError as error:
        raise UndeliveredError(f"its name is not known: {error.strerror}") from error
    target.doing = f"no connection to {target.place} comes about"
    limit, trouble = float(target.sink["timeout"]), OSError("it has no address")
    for left, (family, address) in zip(reversed(range(len(found))), found, strict=True):
        # An address that nobody answers at is not to take the time of the next one: IPv6 that leads nowhere is common.
        patience = limit / (2 * len(found)) if left else None
        connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            async with asyncio.timeout(patience):
                await loop.sock_connect(connection, address)
        except OSError as error:  # TimeoutError is one
            connection.close()
            trouble = error
        except BaseException:
            connection.close()
            raise
        else:
            connection.settimeout(limit)
            return connection
    raise UndeliveredError(why_not_connected(trouble)) from trouble


# --- in its thread ------------------------------------------------------------------------------------------------------


def _hand_over(
    connection: socket.socket, host: str, sink: Mapping[str, Any], notices: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Who does not get it, and what the server says to that."""
    with contextlib.closing(connection):
        try:
            return _converse(connection, host, sink, notices)
        except ssl.SSLCertVerificationError as error:
            raise UndeliveredError(why_not_trusted(error, sink)) from error
        except ssl.SSLError as error:
            raise UndeliveredError(why_no_tls(error)) from error
        except smtplib.SMTPRecipientsRefused as error:
            replies = [f"{printable(each)} ({_reply(*reply)})" for each, reply in error.recipients.items()]
            is_permanent = all(code >= _HARD for code, _ in error.recipients.values())
            raise UndeliveredError(f"no recipient is taken: {'; '.join(replies)}", is_permanent=is_permanent) from error
        except smtplib.SMTPResponseException as error:
            if error.smtp_code < _LEAST_REPLY:
                raise UndeliveredError("what answers there does not speak SMTP") from error
            what = _refused_what(error)
            raise UndeliveredError(
                f"{what}: {_reply(error.smtp_code, error.smtp_error)}", is_permanent=error.smtp_code >= _HARD
            ) from error
        except smtplib.SMTPServerDisconnected as error:
            raise UndeliveredError("it closed the connection, or does not speak SMTP") from error
        except smtplib.SMTPException as error:
            raise UndeliveredError(printable(str(error), MOST_SHOWN)) from error
        except ValueError as error:
            raise UndeliveredError(f"no message can be made of it: {_why_no_message(error)}") from error
        except OSError as error:
            raise UndeliveredError(f"the connection broke: {error.strerror or error}") from error


def _converse(
    connection: socket.socket, host: str, sink: Mapping[str, Any], notices: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    tls, username = sink.get("tls") or "starttls", sink.get("username")
    if username and tls == "none" and not _is_here(connection):
        raise UndeliveredError('a password is not sent without TLS: tls = "starttls", or "tls"')
    password = _password(sink) if username else ""
    if tls == "tls":
        connection = tls_context(sink).wrap_socket(connection, server_hostname=host)
    session = _Session(connection, host)
    try:
        if tls == "starttls":
            _start_tls(session, sink)
        if username:
            session.login(username, password)
        refused: dict[str, str] = {}
        for notice in notices:
            message = message_of(notice, sink)
            found = session.send_message(message, str(sink["from"]), list(sink["to"]))
            refused |= {each: _reply(*reply) for each, reply in found.items()}
        with contextlib.suppress(smtplib.SMTPException, OSError):  # it is delivered: how it says goodbye is all one
            session.quit()
        return refused
    finally:
        session.close()


def _why_no_message(error: ValueError) -> str:
    """Not what could not be encoded: it may be a secret."""
    is_encoding = isinstance(error, UnicodeError)
    return "something in it cannot be encoded" if is_encoding else printable(str(error), MOST_SHOWN)


def _password(sink: Mapping[str, Any]) -> str:
    """In ASCII: smtplib hands over nothing else."""
    path = sink["password_file"]
    password = read_secret("password_file", path)
    if not password.isascii():
        where = f"password_file {printable(path)}"
        raise UndeliveredError(f"{where} has more than ASCII, which no mail server is sent: choose another password")
    if not str(sink["username"]).isascii():
        raise UndeliveredError("username has more than ASCII, which no mail server is sent")
    return password.decode("ascii")


class _Session(smtplib.SMTP):
    """On a connection that is there already, with an end to what a server may say."""

    def __init__(self, connection: socket.socket, host: str) -> None:
        super().__init__(local_hostname=_own_name())
        self._host = host  # whose certificate STARTTLS asks for
        self.sock = connection
        code, said = self.getreply()
        if code != 220:  # noqa: PLR2004 - RFC 5321: ready
            self.close()
            raise smtplib.SMTPConnectError(code, said)

    def getreply(self) -> tuple[int, bytes]:
        if self.file is None and self.sock is not None:
            self.file = _Bounded(self.sock.makefile("rb"))
        return super().getreply()


class _Bounded:
    """The reading side of a session, until it has said too much."""

    def __init__(self, file: Any) -> None:  # noqa: ANN401 - what makefile() gives
        self._file = file
        self._left = _MOST_REPLY

    def readline(self, size: int = -1) -> bytes:
        line: bytes = self._file.readline(size)
        self._left -= len(line)
        if self._left < 0 or len(line) == size:
            raise smtplib.SMTPServerDisconnected("it does not stop talking")
        return line

    def close(self) -> None:
        self._file.close()


def _start_tls(session: _Session, sink: Mapping[str, Any]) -> None:
    session.ehlo_or_helo_if_needed()
    if not session.has_extn("starttls"):
        raise UndeliveredError(
            'it offers no STARTTLS: tls = "tls" if it speaks TLS from the start, or "none" if it is on this machine'
        )
    session.starttls(context=tls_context(sink))


def _is_here(connection: socket.socket) -> bool:
    return ipaddress.ip_address(connection.getpeername()[0].partition("%")[0]).is_loopback


def _own_name() -> str:
    """For EHLO. Not smtplib's own way to it, which asks a name server."""
    name = os.uname().nodename
    return name if name and all(each.isascii() and (each.isalnum() or each in "-.") for each in name) else "localhost"


def _refused_what(error: smtplib.SMTPResponseException) -> str:
    match error:
        case smtplib.SMTPAuthenticationError():
            return "it does not take username and password_file"
        case smtplib.SMTPSenderRefused():
            return f"it does not take mail from {printable(error.sender)}"
        case smtplib.SMTPConnectError():
            return "it takes no connection"
        case smtplib.SMTPHeloError():
            return "it does not take our name"
        case _:
            return "it does not take the message"


def _reply(code: int, said: bytes | str) -> str:
    text = said if isinstance(said, str) else said.decode("utf-8", "replace")
    return f"{code} {printable(' '.join(text.split()), MOST_SHOWN)}"


# --- the message --------------------------------------------------------------------------------------------------------


def message_of(notice: Mapping[str, Any], sink: Mapping[str, Any], now: datetime | None = None) -> EmailMessage:
    """What a person reads. Foreign text is in one header alone, and printable."""
    now = now or datetime.now(UTC).astimezone()
    message = EmailMessage(policy=SMTP)
    host = printable(str(notice["host"]), 60)
    summary = printable(str(notice["summary"]), 1000)
    state = _STATES.get(str(notice["state"]), "")
    message["From"] = str(sink["from"])
    message["To"] = ", ".join(sink["to"])
    subject = printable(f"[{host}] {notice['severity']}: {state}{summary}", _MOST_SUBJECT)
    message["Subject"] = subject.replace("=?", "= ?")  # the email package would decode it, a line's end in it as well
    message["Date"] = format_datetime(now)
    message["Message-ID"] = message_id(notice, now)
    first = message_id({**notice, "state": "raised"}, now)
    if first != message["Message-ID"]:
        message["In-Reply-To"] = first
        message["References"] = first
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: no vacation notice answers it
    message["X-Mailer"] = f"duende-ublkd {__version__}"
    message.set_content(_body(notice, summary), cte="quoted-printable")
    return message


def message_id(notice: Mapping[str, Any], now: datetime) -> str:
    """The same whenever the same is told again. There is at most one reminder in a day."""
    day = now.astimezone(UTC).date().isoformat() if notice["state"] in ("reminder", "test") else ""
    told = "\n".join(str(each) for each in (notice["host"], notice["key"], notice["raised_at"], notice["state"], day))
    name = "".join(each for each in str(notice["host"]) if each.isascii() and (each.isalnum() or each in "-."))
    return f"<{hashlib.sha256(told.encode('utf-8', 'replace')).hexdigest()[:32]}@{name[:60].strip('.') or 'localhost'}>"


def _body(notice: Mapping[str, Any], summary: str) -> str:
    device = "" if notice.get("dev_id") is None else f"ublk{notice['dev_id']}"
    rows = [
        ("Host", str(notice["host"])),
        ("Device", f"{device} (/dev/ublkb{notice['dev_id']})" if device else ""),
        ("Severity", str(notice["severity"])),
        ("Kind", str(notice["kind"])),
        ("Since", str(notice["raised_at"])),
        ("Over", str(notice.get("over_at") or "")),
        ("Why over", str(notice.get("over_why") or "")),
    ]
    about = "\n".join(f"{name + ':':<10}{printable(value, 300)}" for name, value in rows if value)
    facts = "\n".join(f"  {printable(str(name), 60)}: {_shown(value)}" for name, value in _some(notice.get("facts")))
    type_this = f"duende-ublkd explain {notice['dev_id']}" if device else "duende-ublkd doctor"
    pieces = [summary, about, f"Known of it:\n{facts}" if facts else ""]
    pieces.append(f"To see more:  {type_this}\nWhat to do:   {printable(str(notice['runbook_url']), 300)}")
    return "\n\n".join(piece for piece in pieces if piece) + "\n"


def _some(facts: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    return list((facts or {}).items())[:_MOST_FACTS]


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else _as_words(value)
    return printable(text, 300)


def _as_words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_as_words(each)}" for name, each in value.items())
    if isinstance(value, list):
        return "; ".join(_as_words(each) for each in value) or "none"
    return "not known" if value is None else str(value)
