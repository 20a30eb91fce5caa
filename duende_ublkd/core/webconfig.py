"""The web configuration file, as Prometheus's exporters take it: TLS, clients' certificates, users, and headers.

Rules:
1. Each key means what it means to an exporter, or is refused by its name: a server that is more open than its file says
   would be worse than none.
2. Every mistake is reported at once, as those of the configuration are.
3. The files that it names are read with it, so that a certificate and its key are of one moment. Paths are relative to the
   directory of the file.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

from duende_ublkd.core.config import InvalidConfigError, Problem
from duende_ublkd.core.text import printable
from duende_ublkd.core.values import WrongValueError, did_you_mean, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from duende_ublkd.core.keylines import KeyPath

MOST_FILE_BYTES = 64 * 1024  # of each of the files that it names; 40 authorities, which OpenSSL takes 10 ms to read
MOST_USERS = 256
DEAREST_HASH = 14  # log2 of bcrypt's rounds: about a second

_Read: TypeAlias = "Callable[[str, bool], bytes]"


class ClientAuth(Enum):
    """Whether a client has to show a certificate. Go's others take one without asking who signed it."""

    NONE = "NoClientCert"
    IF_GIVEN = "VerifyClientCertIfGiven"
    REQUIRED = "RequireAndVerifyClientCert"


class TlsVersion(Enum):
    """In the order of their age."""

    TLS12 = "TLS12"
    TLS13 = "TLS13"


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """`tls_server_config`, with what is in its files: PEM. `names`: of the files, for messages."""

    cert: bytes
    key: bytes = field(repr=False)
    client_auth: ClientAuth = ClientAuth.NONE
    client_ca: bytes = b""
    allowed_sans: tuple[str, ...] = ()
    min_version: TlsVersion = TlsVersion.TLS12
    max_version: TlsVersion = TlsVersion.TLS13
    names: Mapping[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class WebConfig:
    """The whole file. `users`: each with the bcrypt hash of a password. `headers`: of every answer (see report/web.py)."""

    tls: TlsConfig | None = None
    users: Mapping[str, str] = field(default_factory=dict, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)


def read_web_config(data: object, lines: Mapping[KeyPath, int], name: str, read: _Read) -> WebConfig:
    """What a parsed file asks for. `data`: mappings, sequences, texts and None; `lines`: of each of its keys.

    `read(path, secret)`: what is in a file that it names; it raises WrongValueError. InvalidConfigError: every mistake.
    """
    reader = _Reader(lines, printable(name), read)
    config = reader.document({} if data is None else data)
    if reader.problems:
        raise InvalidConfigError(*reader.problems)
    return config


# --- values


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise WrongValueError(f"must be a text, not {_named(value)}", hint="write a text")
    return value


def _named(value: object) -> str:
    match value:
        case dict():
            return "a mapping"
        case list():
            return "a sequence"
        case _:
            return "nothing" if not value else shown(value)


def _word(words: Mapping[str, Any], refused: Mapping[str, tuple[str, str]]) -> Callable[[object], Any]:
    def parse(value: object) -> Any:  # noqa: ANN401 - what the words stand for
        text = _text(value)
        if text in refused:
            what, hint = refused[text]
            raise WrongValueError(f"{shown(text)} {what}", hint=hint)
        if text not in words:
            what = f"{shown(text)} is not one of {', '.join(words)}"
            raise WrongValueError(what, hint=did_you_mean(text, [*words]))
        return words[text]

    return parse


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) and each for each in value):
        raise WrongValueError(f"must be a sequence of texts, not {_named(value)}", hint="write each after a dash")
    return tuple(value)


def _only(wanted: str, why: str) -> Callable[[object], bool]:
    """A switch that can stand in one way only."""

    def parse(value: object) -> bool:
        if str(value).lower() != wanted:
            raise WrongValueError(why, hint=f"write {wanted}, or remove it")
        return True

    return parse


_HASH = re.compile(r"\$2[aby]\$([0-9]{2})\$[./A-Za-z0-9]{53}")
_HASH_HINT = "htpasswd -nBC 10 NAME prints one"


def _check_user(name: str, value: object) -> None:
    """The hash is shown to nobody."""
    if not name or ":" in name:
        raise WrongValueError("is no name of a user: HTTP has the sign : after it", hint="choose another name")
    found = _HASH.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise WrongValueError("is not the bcrypt hash of a password", hint=_HASH_HINT)
    if not 4 <= int(found[1]) <= DEAREST_HASH:  # noqa: PLR2004 - bcrypt's own least
        what = f"has 2^{int(found[1])} rounds, and 2^{DEAREST_HASH} take a second of a processor for each password"
        raise WrongValueError(what, hint=_HASH_HINT)


_HEADERS: Mapping[str, tuple[str, ...]] = {  # with the values that each can have; (): any
    "Content-Security-Policy": (),
    "Strict-Transport-Security": (),
    "X-Content-Type-Options": ("nosniff",),
    "X-Frame-Options": ("deny", "sameorigin"),
    "X-XSS-Protection": (),
}
_LONGEST_HEADER = 4096


def _check_header(name: str, value: object) -> None:
    if name not in _HEADERS:
        raise WrongValueError("is no header that can be set here", hint=_which_header(name))
    text = _text(value)
    if not re.fullmatch("[ -~]*", text) or len(text) > _LONGEST_HEADER:
        raise WrongValueError("is not one line of ASCII", hint="write it as one line")
    if _HEADERS[name] and text.lower() not in _HEADERS[name]:
        raise WrongValueError(f"{shown(text)} is not one of {', '.join(_HEADERS[name])}", hint="write one of them")


def _which_header(name: str) -> str:
    near = next((each for each in _HEADERS if each.lower() == name.lower()), None)
    return f'did you mean "{near}"?' if near else f"possible here: {', '.join(_HEADERS)}"


# --- the file

_UNVERIFIED = ("takes any certificate, whoever signed it", "write RequireAndVerifyClientCert, and client_ca_file")
_OLD = ("is broken since long", "write TLS12")
_VERSION = _word({each.value: each for each in TlsVersion}, {"TLS10": _OLD, "TLS11": _OLD})
_TLS: Mapping[str, Callable[[object], Any]] = {
    "cert_file": _text,
    "key_file": _text,
    "client_auth_type": _word(
        {each.value: each for each in ClientAuth},
        {"RequestClientCert": _UNVERIFIED, "RequireAnyClientCert": _UNVERIFIED},
    ),
    "client_ca_file": _text,
    "client_allowed_sans": _texts,
    "min_version": _VERSION,
    "max_version": _VERSION,
    "prefer_server_cipher_suites": _only("true", "this server's order always counts"),
}
_OF_OPENSSL = ("is not supported: OpenSSL's own choice counts", "remove it")
_INLINE = ("is not supported", "put it into a file of its own, and write {}")
_REFUSED: Mapping[KeyPath, tuple[str, str]] = {
    ("tls_server_config", "cipher_suites"): _OF_OPENSSL,
    ("tls_server_config", "curve_preferences"): _OF_OPENSSL,
    ("tls_server_config", "cert"): (_INLINE[0], _INLINE[1].format("cert_file")),
    ("tls_server_config", "key"): (_INLINE[0], _INLINE[1].format("key_file")),
    ("tls_server_config", "client_ca"): (_INLINE[0], _INLINE[1].format("client_ca_file")),
    ("rate_limit",): ("is not supported: there is a limit of clients, and one of requests, already", "remove it"),
}


class _Reader:
    """One reading of one file."""

    def __init__(self, lines: Mapping[KeyPath, int], file: str, read: _Read) -> None:
        self.problems: list[Problem] = []
        self._lines = lines
        self._file = file
        self._read = read

    def document(self, data: object) -> WebConfig:
        sections = {
            "tls_server_config": self._tls,
            "http_server_config": self._http,
            "basic_auth_users": self._users,
        }
        found: dict[str, Any] = {}
        for key, value in self._entries((), data, sections):
            with_value = {} if value is None else value
            found[key] = sections[key]((key,), with_value)
        return WebConfig(
            found.get("tls_server_config"), found.get("basic_auth_users", {}), found.get("http_server_config", {})
        )

    def _entries(self, path: KeyPath, value: object, known: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """The entries of a mapping that are known; the others are mistakes."""
        if not isinstance(value, dict):
            self._wrong(
                path, f"must be a mapping, not {_named(value)}", f"write keys with a colon: {next(iter(known))}: ..."
            )
            return
        for key, entry in value.items():
            here = (*path, key)
            if here in _REFUSED:
                self._wrong(here, *_REFUSED[here])
            elif key in known:
                yield key, entry
            else:
                self._wrong(here, "unknown key", did_you_mean(key, [*known]))

    def _tls(self, path: KeyPath, value: object) -> TlsConfig | None:
        before = len(self.problems)
        found: dict[str, Any] = {}
        for key, entry in self._entries(path, value, _TLS):
            with self._telling((*path, key)):
                found[key] = _TLS[key](entry)
        if isinstance(value, dict):
            self._check_tls(path, found, value)
        files = {key: self._content((*path, key), found[key]) for key in _FILES if key in found}
        if len(self.problems) > before:
            return None
        return TlsConfig(
            cert=files["cert_file"],
            key=files["key_file"],
            client_auth=found.get("client_auth_type", ClientAuth.NONE),
            client_ca=files.get("client_ca_file", b""),
            allowed_sans=found.get("client_allowed_sans", ()),
            min_version=found.get("min_version", TlsVersion.TLS12),
            max_version=found.get("max_version", TlsVersion.TLS13),
            names={key: found[key] for key in files},
        )

    def _content(self, path: KeyPath, name: str) -> bytes:
        try:
            return self._read(name, path[-1] == "key_file")
        except WrongValueError as error:
            self._wrong(path, str(error), error.hint)
            return b""

    def _check_tls(self, path: KeyPath, found: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        """What does not fit together, of what is no mistake by itself."""
        for key in ("cert_file", "key_file"):
            if key not in given:
                self._wrong(path, f"has no {key}", f"add {key}: ...")
        auth = found.get("client_auth_type", ClientAuth.NONE)
        if auth is not ClientAuth.NONE and "client_ca_file" not in given:
            self._wrong((*path, "client_auth_type"), "nobody is named who signs them", "add client_ca_file: ...")
        if "client_auth_type" in found or "client_auth_type" not in given:
            for key in ("client_ca_file", "client_allowed_sans"):
                if auth is ClientAuth.NONE and key in given:
                    what = "does nothing: no client is asked for a certificate"
                    self._wrong((*path, key), what, f"add client_auth_type: {ClientAuth.REQUIRED.value}")
        if found.get("min_version") is TlsVersion.TLS13 and found.get("max_version") is TlsVersion.TLS12:
            self._wrong((*path, "max_version"), "is older than min_version", "write TLS13")

    def _http(self, path: KeyPath, value: object) -> dict[str, str]:
        known = {"http2": _only("false", "this server speaks HTTP/1.1 alone"), "headers": None}
        headers: dict[str, str] = {}
        for key, entry in self._entries(path, value, known):
            with self._telling((*path, key)):
                if parse := known[key]:
                    parse(entry)
                else:
                    headers = self._checked((*path, key), entry, _check_header)
        return headers

    def _users(self, path: KeyPath, value: object) -> dict[str, str]:
        users = self._checked(path, value, _check_user)
        if len(users) > MOST_USERS:
            self._wrong(path, f"has {len(users)} users, more than {MOST_USERS}", "remove some of them")
        return users

    def _checked(self, path: KeyPath, value: object, check: Callable[[str, object], None]) -> dict[str, str]:
        if not isinstance(value, dict):
            self._wrong(path, f"must be a mapping, not {_named(value)}", "write each as NAME: VALUE")
            return {}
        for key, entry in value.items():
            with self._telling((*path, key)):
                check(key, entry)
        return value

    @contextmanager
    def _telling(self, path: KeyPath) -> Iterator[None]:
        """A wrong value is a mistake at this key, and reading goes on."""
        try:
            yield
        except WrongValueError as error:
            self._wrong(path, str(error), error.hint)

    def _wrong(self, path: KeyPath, what: str, hint: str) -> None:
        line = next((self._lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self._lines), 0)
        key = ".".join(printable(str(part), 60) for part in path)
        self.problems.append(Problem(self._file, line, key, what, printable(hint, 1000)))


_FILES = ("cert_file", "key_file", "client_ca_file")
