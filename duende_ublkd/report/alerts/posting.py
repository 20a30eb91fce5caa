"""One POST over HTTP, and what came of it as a sentence.

Rules:
1. Redirects are not followed: what an alert says, and the password that it is sent with, goes where the configuration
   says and nowhere else. No proxy is taken from the environment, for the same reason.
2. An answer is read up to 4 KiB, and only when it is a refusal, to say why. The connection is closed after it.
3. Of an URL, only host and port are shown: the path of a webhook is often its secret.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from duende_ublkd import __version__
from duende_ublkd.core.text import printable
from duende_ublkd.report.alerts.aside import Aside, UndeliveredError
from duende_ublkd.report.alerts.files import check_file, read_secret

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping

T = TypeVar("T")

MOST_READ = 4096  # bytes of an answer
MOST_SHOWN = 120  # characters of it
MOST_HEADER = 8190  # bytes
_PORTS = {"https": 443, "http": 80, "smtp": 25}
_NOT_FOR_EVER = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
_EXPIRED, _SELF_SIGNED, _WRONG_NAME = (10,), (18, 19), (62, 63, 64)  # X509_V_ERR_* of <openssl/x509_vfy.h>
_NOT_KNOWN = (2, *_SELF_SIGNED, 20, 21)  # whoever has signed it


@dataclass(slots=True)
class Target:
    """Where a sink's deliveries go. `doing`: for whoever gives up waiting."""

    url: str
    sink: Mapping[str, Any]
    aside: Aside = field(default_factory=Aside)
    doing: str = ""

    @property
    def place(self) -> str:
        """Host and port, for people."""
        return place_of(self.url)

    async def in_time(self, delivery: Awaitable[T]) -> T:
        """Within the sink's time limit, or UndeliveredError says what it was waited for."""
        limit = float(self.sink["timeout"])
        try:
            async with asyncio.timeout(limit):
                return await delivery
        except TimeoutError:
            why = self.aside.under_way or self.doing
            raise UndeliveredError(f"{why}: given up after {limit:g} s") from None


def place_of(url: str) -> str:
    """Host and port of a URL, for people."""
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return printable(f"{host}:{parts.port or _PORTS.get(parts.scheme, 80)}", MOST_SHOWN)


async def post(target: Target, body: bytes, headers: Mapping[str, str]) -> None:
    """Until it is taken; however long that takes. UndeliveredError: it is not."""
    context, credentials = await target.aside.run(
        "a file that the configuration names is read, and its disk does not answer",
        lambda: (_tls_context(target.url, target.sink), _credentials(target.sink)),
    )
    is_tls = target.url.lower().startswith("https:")
    target.doing = f"no {'TLS ' if is_tls else ''}connection to {target.place} comes about"
    connector = aiohttp.TCPConnector(resolver=_Resolver(target), ssl=context, force_close=True, use_dns_cache=False)
    async with aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),  # ours goes over all of it, the reading of files as well
        auto_decompress=False,  # 4 KiB are 4 KiB
        trust_env=False,
        max_line_size=MOST_HEADER,
        max_field_size=MOST_HEADER,
        trace_configs=[_trace(target)],
    ) as session:
        try:
            async with session.post(
                target.url, data=body, headers={**_OUR_HEADERS, **credentials, **headers}, allow_redirects=False
            ) as response:
                await _judge(target, response)
                response.close()  # whatever it still has to say
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UndeliveredError(_why(error, target)) from error


_OUR_HEADERS = {
    "Content-Type": "application/json",
    "User-Agent": f"duende-ublkd/{__version__}",
    "Accept-Encoding": "identity",
}


def _trace(target: Target) -> aiohttp.TraceConfig:
    """Knows when it is the server that we wait for."""
    trace = aiohttp.TraceConfig()

    async def connected(*_: object) -> None:
        target.doing = f"{target.place} does not answer"

    trace.on_connection_create_end.append(connected)
    return trace


async def _judge(target: Target, response: aiohttp.ClientResponse) -> None:
    status = response.status
    if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        return
    if status < HTTPStatus.BAD_REQUEST:
        to = place_of(response.headers.get("Location", "")) if "://" in response.headers.get("Location", "") else ""
        why = f"HTTP {status}: it redirects{f' to {to}' if to else ''}, which is not followed: write where to as url"
        raise UndeliveredError(why)
    target.doing = f"{target.place} answered HTTP {status}, and does not end saying why"
    said = printable((await _read_some(response)).strip(), MOST_SHOWN)
    about = _ADVICE.get(status, "")
    why = f"HTTP {status}" + (f": {said}" if said else "") + (f"; {about}" if about else "")
    is_permanent = status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in _NOT_FOR_EVER
    raise UndeliveredError(why, is_permanent=is_permanent)


_ADVICE = {
    401: "are username and password_file, or bearer_token_file, right?",
    403: "do username and password_file, or bearer_token_file, allow it?",
    404: "is url right?",
    405: "is url right?",
}


async def _read_some(response: aiohttp.ClientResponse) -> bytes:
    said = bytearray()
    try:
        while len(said) < MOST_READ and (piece := await response.content.read(MOST_READ - len(said))):
            said += piece
    except aiohttp.ClientError:
        return bytes(said)  # the status is what matters
    return bytes(said)


class _Resolver(AbstractResolver):
    """getaddrinfo(3) in the target's own thread: a resolver that does not answer is waited for there alone."""

    def __init__(self, target: Target) -> None:
        self._target = target

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        infos = await look_up(self._target, host, port, family)
        return [
            ResolveResult(
                hostname=host, host=address[0], port=port, family=family, proto=0, flags=socket.AI_NUMERICHOST
            )
            for family, address in infos
        ]

    async def close(self) -> None:
        """Nothing is open."""


async def look_up(
    target: Target, host: str, port: int, family: socket.AddressFamily = socket.AF_UNSPEC
) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    """The addresses of a name; OSError."""
    name = printable(host, MOST_SHOWN)
    found = await target.aside.run(
        f"the name {name} is looked up, and no name server answers",
        lambda: socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM),
    )
    return [(family, address) for family, _, _, _, address in found]


def _tls_context(url: str, sink: Mapping[str, Any]) -> ssl.SSLContext | bool:
    return tls_context(sink) if url.lower().startswith("https:") else True


def tls_context(sink: Mapping[str, Any]) -> ssl.SSLContext:
    """What the sink's files make of it. UndeliveredError names the one that is wrong."""
    ca, cert, key = (str(sink.get(each) or "") for each in ("ca_file", "cert_file", "key_file"))
    if ca:
        check_file("ca_file", ca, is_secret=False)
    try:
        context = ssl.create_default_context(cafile=ca or None)
    except (OSError, ssl.SSLError) as error:
        raise UndeliveredError(f"ca_file {printable(ca)} holds no certificate: {_said_by_openssl(error)}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # From Python 3.13 on, an authority has to say what its key is for. Many a company's own does not, and curl and
    # Prometheus take it all the same.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if cert:
        check_file("cert_file", cert, is_secret=not key)
        if key:
            check_file("key_file", key, is_secret=True)
        try:
            context.load_cert_chain(cert, key or None, _no_password)
        except (OSError, ssl.SSLError, UndeliveredError) as error:
            files = printable(cert) + (f" and {printable(key)}" if key else "")
            raise UndeliveredError(f"{files} cannot be used: {_said_by_openssl(error)}") from error
    return context


def _no_password() -> str:
    """OpenSSL would ask a terminal."""
    raise UndeliveredError("the key is encrypted, and nobody is there to type its password")


def _credentials(sink: Mapping[str, Any]) -> dict[str, str]:
    if path := sink.get("bearer_token_file"):
        token = read_secret("bearer_token_file", path)
        if not token.isascii():
            raise UndeliveredError(f"bearer_token_file {printable(path)} is no token: is it the right file?")
        return {"Authorization": f"Bearer {token.decode()}"}
    if username := sink.get("username"):
        path = sink.get("password_file")
        secret = read_secret("password_file", path) if path else b""
        try:
            return {"Authorization": aiohttp.BasicAuth(username, secret.decode(), "utf-8").encode()}
        except UnicodeError as error:  # not str(error), which shows a part of it
            raise UndeliveredError(
                f"password_file {printable(str(path))} is no UTF-8: is it the right file?"
            ) from error
        except ValueError as error:
            raise UndeliveredError(f"username and password_file cannot be sent: {error}") from error
    return {}


# --- what went wrong ----------------------------------------------------------------------------------------------------


def _why(error: Exception, target: Target) -> str:
    match error:
        case aiohttp.ClientConnectorCertificateError():
            return why_not_trusted(error.certificate_error, target.sink)
        case aiohttp.ClientConnectorDNSError():
            return f"its name is not known: {_strerror(error.os_error)}"
        case aiohttp.ClientConnectorSSLError():
            return why_no_tls(error.os_error)
        case aiohttp.ClientConnectorError():
            return why_not_connected(error.os_error)
        case ssl.SSLError():
            return why_no_tls(error)
        case aiohttp.ClientOSError() if isinstance(error.__cause__, ssl.SSLError):
            return why_no_tls(error.__cause__)
        case aiohttp.ServerDisconnectedError() | ConnectionError() | aiohttp.ClientPayloadError():
            return _why_closed(target)
        case aiohttp.ClientOSError() if isinstance(error.__cause__, ConnectionError):
            return _why_closed(target)
        case OSError():
            return f"the connection broke: {_strerror(error)}"
        case _:
            # Not str(error), which may show the URL (rule 3).
            said = getattr(error, "message", "") or type(error).__name__
            return f"what answers there is no HTTP server: {printable(' '.join(str(said).split()), MOST_SHOWN)}"


def _why_closed(target: Target) -> str:
    """TLS 1.3 asks for a client's certificate when the handshake is over for the client."""
    may_want = target.url.lower().startswith("https:") and not target.sink.get("cert_file")
    also = "; does it want cert_file and key_file?" if may_want else ""
    return f"it closed the connection without an answer{also}"


def why_not_trusted(error: Exception, sink: Mapping[str, Any]) -> str:
    """Of a certificate; one sentence with what to do."""
    code, said = (
        getattr(error, "verify_code", 0),
        printable(getattr(error, "verify_message", "") or str(error), MOST_SHOWN),
    )
    if code in _EXPIRED:
        return "its certificate has expired, or the clock here is wrong"
    if code in _WRONG_NAME:
        return f"its certificate is for another name: {said}"
    if code not in _NOT_KNOWN:
        return f"its certificate is not trusted: {said}"
    if sink.get("ca_file"):
        return f"its certificate is not trusted: {said}; it is not of the authority in ca_file"
    what = "the certificate itself" if code in _SELF_SIGNED else "the certificate of the authority that signed it"
    return f"its certificate is not trusted: {said}; ca_file = a file with {what}"


def why_no_tls(error: BaseException | None) -> str:
    """Of a handshake."""
    reason = getattr(error, "reason", "") or ""
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return "what answers there does not speak TLS"
    if "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason:
        return f"it refused the TLS connection ({printable(reason.lower())}): does it want cert_file and key_file?"
    return f"no TLS connection came about: {_said_by_openssl(error)}"


def why_not_connected(error: OSError) -> str:
    """Of connect(2)."""
    said = "no answer to a connection" if isinstance(error, TimeoutError) and not error.errno else _strerror(error)
    if error.errno == errno.ECONNREFUSED:
        return f"{said}: nobody listens there; does it run?"
    return said


def _strerror(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return printable(error.strerror or str(error), MOST_SHOWN)
    if error.errno:
        return os.strerror(error.errno)  # asyncio puts the address into its own
    # Several addresses, and each said something else; or an error of aiohttp's, which may show the URL (rule 3).
    return type(error).__name__ if isinstance(error, aiohttp.ClientError) else printable(str(error), MOST_SHOWN)


def _said_by_openssl(error: BaseException | None) -> str:
    reason = getattr(error, "reason", "")
    if isinstance(error, ssl.SSLError) and reason:
        return printable(reason.lower().replace("_", " "), MOST_SHOWN)
    return printable((isinstance(error, OSError) and error.strerror) or str(error), MOST_SHOWN)
