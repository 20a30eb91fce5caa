"""Who is let in by HTTP: TLS, clients' certificates, users with passwords. The only file that imports bcrypt.

Rules:
1. Nothing here reads a disk: the web configuration holds what its files held when it was read.
2. A password costs a tenth of a second of a processor by design. It is looked at by one thread that gives way to all
   others, behind a short queue, and whoever finds the queue full is told to come again: nobody who guesses slows a
   decision down. A right one is remembered, as a digest under a key that this process alone has, so that who has been let
   in once waits for nobody.
3. How long an answer takes tells nothing: a user whom nobody knows is looked at as long as one who is known.

bcrypt takes half a MiB of locked memory, and is imported by whoever has users alone.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import os
import secrets
import ssl
import threading
from collections import deque
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.config import InvalidConfigError, Problem
from duende_ublkd.core.text import printable
from duende_ublkd.core.webconfig import ClientAuth, TlsVersion

if TYPE_CHECKING:
    from collections.abc import Mapping

    from duende_ublkd.core.webconfig import TlsConfig, WebConfig

_MOST_WAITING = 16  # passwords; at a tenth of a second each, the last one waits as long as a scrape does
_BCRYPT_BYTES = 72  # what follows counts for nothing, as with the exporters
_NICE = 10
_LONGEST_CREDENTIALS = 4096
_VERSIONS = {TlsVersion.TLS12: ssl.TLSVersion.TLSv1_2, TlsVersion.TLS13: ssl.TLSVersion.TLSv1_3}
_VERIFIED = {
    ClientAuth.NONE: ssl.CERT_NONE,
    ClientAuth.IF_GIVEN: ssl.CERT_OPTIONAL,
    ClientAuth.REQUIRED: ssl.CERT_REQUIRED,
}


class TooManyError(Exception):
    """So many passwords are being looked at that this one is not."""


class _UnusableError(Exception):
    """Which key of tls_server_config, and why."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(why)
        self.key = key


def check(config: WebConfig, name: str) -> None:
    """Whether it can be served with at all. `name`: of its file. InvalidConfigError."""
    try:
        if config.tls:
            _context(config.tls)
    except _UnusableError as error:
        hint = "openssl x509 -noout -subject -in FILE shows a certificate"
        problem = Problem(printable(name), 0, f"tls_server_config.{error.key}", printable(str(error), 300), hint)
        raise InvalidConfigError(problem) from error
    if config.users:
        import bcrypt  # noqa: F401, PLC0415 - from the disk now, and not when a user comes


class Access:
    """One web configuration in force."""

    def __init__(self, config: WebConfig) -> None:
        self.headers: Mapping[str, str] = config.headers
        self.context = _context(config.tls) if config.tls else None
        self._sans = {_san(each) for each in config.tls.allowed_sans} if config.tls else set()
        self._passwords = _Passwords(config.users) if config.users else None

    def welcomes(self, certificate: Mapping[str, Any] | None) -> bool:
        """Whether a client with this certificate may stay; None: it has shown none, and need not."""
        if not self._sans or not certificate:
            return True
        return any(_san(str(value)) in self._sans for _, value in certificate.get("subjectAltName", ()))

    async def knows(self, authorization: str | None) -> bool:
        """Whether a request with this header may be answered. TooManyError: nobody can tell just now."""
        if self._passwords is None:
            return True
        user, password = _credentials(authorization or "")
        return user is not None and await self._passwords.fits(user, password)

    def close(self) -> None:
        """Look at no more passwords."""
        if self._passwords:
            self._passwords.close()


def why_refused(error: ssl.SSLError) -> str:
    """What is wrong with the certificate of a client whose handshake ended so; "": it ended for another reason."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    return "it has shown no certificate" if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE" else ""


def _san(text: str) -> str:
    """An address in one of the ways to write it."""
    try:
        return str(ip_address(text))
    except ValueError:
        return text


def _credentials(authorization: str) -> tuple[str | None, bytes]:
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic" or len(encoded) > _LONGEST_CREDENTIALS:
        return None, b""
    try:
        user, colon, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
        return (user.decode(), password) if colon else (None, b"")
    except (binascii.Error, ValueError):
        return None, b""


# --- TLS


def _context(tls: TlsConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version, context.maximum_version = _VERSIONS[tls.min_version], _VERSIONS[tls.max_version]
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION  # each would be a handshake that nobody counts
    try:
        _load_chain(context, tls)
    except ssl.SSLError as error:
        key = "key_file" if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH") else "cert_file"
        files = " and ".join(printable(tls.names.get(each, each)) for each in ("cert_file", "key_file"))
        raise _UnusableError(key, f"{files} are no certificate with its key: {_said(error)}") from error
    context.verify_mode = _VERIFIED[tls.client_auth]
    if tls.client_auth is not ClientAuth.NONE:
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # an authority need not be a root, as with the exporters
        # Comments are in any encoding, and a text for cadata has to be ASCII. What is replaced within a certificate makes it
        # unreadable, and bytes would be taken for DER.
        authorities = tls.client_ca.decode("ascii", "backslashreplace")
        try:
            context.load_verify_locations(cadata=authorities)
        except (ssl.SSLError, ValueError) as error:
            what = f"{printable(tls.names.get('client_ca_file', ''))} holds no certificate: {_said(error)}"
            raise _UnusableError("client_ca_file", what) from error
    return context


def _load_chain(context: ssl.SSLContext, tls: TlsConfig) -> None:
    """OpenSSL is given names of files alone, so the bytes that were read get names for a moment, in memory."""
    with _named(tls.cert) as cert, _named(tls.key) as key:
        context.load_cert_chain(cert, key, _no_password)


@contextlib.contextmanager
def _named(content: bytes) -> Any:  # noqa: ANN401 - a generator of a name
    file = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(file, content)
        yield f"/proc/self/fd/{file}"
    finally:
        os.close(file)


def _no_password() -> str:
    """OpenSSL would ask the terminal."""
    raise _UnusableError("key_file", "the key is encrypted, and nobody is there to type its password")


def _said(error: Exception) -> str:
    reason = getattr(error, "reason", None) or str(error)
    return reason.lower().replace("_", " ")


# --- passwords


class _Passwords:
    """Who has which password."""

    def __init__(self, hashes: Mapping[str, str]) -> None:
        import bcrypt  # noqa: PLC0415 - for those alone who have users

        self._checkpw = bcrypt.checkpw
        self._hashes = {user: hashed.encode() for user, hashed in hashes.items()}
        self._key = secrets.token_bytes(32)
        self._known: dict[str, bytes] = {}  # user -> digest of the password that was right
        self._strangers = [_of_nobody(hashed) for hashed in self._hashes.values()]
        self._worker: _Worker | None = None

    async def fits(self, user: str, password: bytes) -> bool:
        """Whether it is this user's. TooManyError."""
        digest = self._digest(user, password)
        known = self._known.get(user)
        if known and hmac.compare_digest(known, digest):
            return True
        hashed = self._hashes.get(user, self._stranger(user))
        if self._worker is None:
            self._worker = _Worker()
        fits = await self._worker.run(lambda: self._matches(password, hashed)) and user in self._hashes
        if fits:
            self._known[user] = digest
        return fits

    def close(self) -> None:
        if self._worker:
            self._worker.close()

    def _matches(self, password: bytes, hashed: bytes) -> bool:
        try:
            return self._checkpw(password[:_BCRYPT_BYTES], hashed)
        except ValueError:  # a password with a NUL: bcrypt knows none
            return False

    def _digest(self, user: str, password: bytes) -> bytes:
        name = hashlib.sha256(user.encode()).digest()  # of one length, so that the two cannot be taken for another two
        return hmac.digest(self._key, name + password, "sha256")

    def _stranger(self, user: str) -> bytes:
        """Always the same for one name: as dear as that of one user or another."""
        number = int.from_bytes(self._digest(user, b"")[:8])
        return self._strangers[number % len(self._strangers)]


def _of_nobody(hashed: bytes) -> bytes:
    """A hash of the same cost that no password has."""
    return hashed[:7] + b"." * 53


class _Worker:
    """One thread for one password at a time (rule 2). It is a daemon: nobody waits for it at the end."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[Any, asyncio.Future[bool]]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        threading.Thread(target=self._work, name="passwords", daemon=True).start()

    async def run(self, job: Any) -> bool:  # noqa: ANN401 - a function that answers whether
        answer: asyncio.Future[bool] = self._loop.create_future()
        with self._changed:
            if len(self._waiting) >= _MOST_WAITING or self._is_closed:
                raise TooManyError
            self._waiting.append((job, answer))
            self._changed.notify()
        return await answer

    def close(self) -> None:
        """Who waits still is told to come again."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
            left, self._waiting = self._waiting, deque()
        for _, answer in left:
            _settle(answer, TooManyError())

    def _work(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)  # of this thread alone, on Linux
        while True:
            with self._changed:
                while not self._waiting and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
                job, answer = self._waiting.popleft()
            if answer.cancelled():
                continue  # whoever asked has gone
            try:
                outcome: bool | BaseException = job()
            except BaseException as error:  # noqa: BLE001 - whoever waits gets it
                outcome = error
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(_settle, answer, outcome)


def _settle(answer: asyncio.Future[bool], outcome: bool | BaseException) -> None:  # noqa: FBT001 - a callback's
    if answer.done():
        return
    if isinstance(outcome, BaseException):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)
