"""`[[alert]]`: where alerts are sent, which of them, and when. The tables' keys, their values, and what fits together.

Rules:
1. A key that its sink does not know is an error which names the sinks that do.
2. A sink that could get nothing is an error, and so is a kind that the sink's own severity keeps out: whoever wrote it
   would wait for a call that never comes.
3. No secret stands in the configuration: passwords, tokens and keys are the names of files. A URL may be a secret all the
   same, so that no message shows more of one than its host.

A key, its default, its parser and the sinks that know it stand together, as a field of `SinkConfig`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from enum import Enum
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from duende_ublkd.core.alerting import AlertKind, Severity
from duende_ublkd.core.text import printable
from duende_ublkd.core.values import (
    DAY,
    WrongValueError,
    absolute_path,
    choice_of,
    did_you_mean,
    duration_between,
    duration_text,
    parse_duration,
    parse_plain_command,
    parse_text,
    parse_texts,
    parse_user,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from urllib.parse import SplitResult

    from duende_ublkd.core.values import Parser

MOST_SINKS = 32  # each has a connection of its own, and a queue
RESERVED_LABELS = ("alertname", "severity", "kind", "key", "dev_id", "host")  # every alert has them already

_MOST_RECIPIENTS = 64
_MOST_LABELS = 32
_MOST_LETTERS = 1024  # of a label, as of a user's name
_LONGEST_URL = 2048
_LONGEST_HOST = 253  # RFC 1035
_LONGEST_ADDRESS = 254  # RFC 5321, with its two brackets 256


class SinkKind(Enum):
    """What is sent to."""

    ALERTMANAGER = "alertmanager"
    WEBHOOK = "webhook"
    COMMAND = "command"
    MAIL = "mail"


class Reminder(Enum):
    """How often a fault that lasts is told of again."""

    ONCE = "once"  # never
    DAILY = "daily"
    DIMINISHING = "diminishing"  # after 1, 2, 4, 8 ... days, as smartd


class Encryption(Enum):
    """How a mail server is talked to."""

    STARTTLS = "starttls"
    TLS = "tls"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most `count` in any time of so many seconds."""

    count: int
    per: float

    def __str__(self) -> str:
        return f"{self.count}/{duration_text(self.per)}"


@dataclass(frozen=True, slots=True)
class QuietHours:
    """From one minute of the day, local time, to before another; over midnight, if that is the earlier one."""

    start: int
    end: int

    def __contains__(self, minute: int) -> bool:
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end

    def __str__(self) -> str:
        return "-".join(f"{minute // 60:02}:{minute % 60:02}" for minute in (self.start, self.end))


# --- values

_FEWEST, _MOST = 1, 10_000
_RATE_HINT = 'write it as "20/1h": how many, in which time'


def _rate_limit(value: object) -> RateLimit:
    text = parse_text(value, '"20/1h"')
    parts = re.fullmatch(r"([0-9]{1,9})\s*/\s*(\S{1,60})", text)
    if parts is None:
        raise WrongValueError(f"{shown(text)} is not a number for a time", hint=_RATE_HINT)
    count = int(parts[1])
    if not _FEWEST <= count <= _MOST:
        nearest = _FEWEST if count < _FEWEST else _MOST
        what = f"{count} is not between {_FEWEST} and {_MOST}"
        raise WrongValueError(what, hint=f'the nearest is "{nearest}/{printable(parts[2])}"')
    text = parts[2] if parts[2][0].isdigit() else f"1{parts[2]}"  # "20/h"
    seconds = parse_duration(text)
    if not 1 <= seconds <= DAY:
        raise WrongValueError(f"{shown(parts[2])} is not between 1s and 1d", hint=_RATE_HINT)
    return RateLimit(count, seconds)


def _quiet_hours(value: object) -> QuietHours:
    text = parse_text(value, '"22:00-07:00"')
    times = re.fullmatch(r"([0-9]{1,2}):([0-9]{2})\s*-\s*([0-9]{1,2}):([0-9]{2})", text)
    hint = 'write it as "22:00-07:00"'
    if times is None:
        raise WrongValueError(f"{shown(text)} is not from one time of the day to another", hint=hint)
    minutes = []
    for hour, minute in ((times[1], times[2]), (times[3], times[4])):
        if int(hour) > 23 or int(minute) > 59:  # noqa: PLR2004 - a day's last hour, and an hour's last minute
            raise WrongValueError(f"{hour}:{minute} is no time of the day", hint="they go from 00:00 to 23:59")
        minutes.append(60 * int(hour) + int(minute))
    if minutes[0] == minutes[1]:
        raise WrongValueError(
            f"{shown(text)} begins when it ends", hint='write severity = "critical" for a sink that is always quiet'
        )
    return QuietHours(*minutes)


_KINDS = tuple(kind for kind in AlertKind if kind is not AlertKind.TEST)
_KINDS_EXAMPLE = '["pinned", "wedged"], or ["!cleaned"] for all but that'


def _kinds(value: object) -> tuple[AlertKind, ...]:
    """Those that are named, or all but those with a "!"; in the order in which AlertKind has them."""
    named: dict[AlertKind, bool] = {}
    for index, text in enumerate(parse_texts(value, _KINDS_EXAMPLE)):
        is_out = text.startswith("!")
        kind = _kind(text.removeprefix("!"), index, is_out=is_out)
        if kind in named:
            raise WrongValueError(f'"{kind.value}" stands here twice', hint="remove one of them", part=index)
        if named and is_out is not next(iter(named.values())):
            what = "is among kinds that it gets" if is_out else 'is among kinds with "!", that it does not get'
            hint = 'name those that it gets, or, each with "!", those that it does not get'
            raise WrongValueError(f"{shown(text)} {what}", hint=hint, part=index)
        named[kind] = is_out
    is_out = next(iter(named.values()))
    kinds = tuple(kind for kind in _KINDS if (kind in named) is not is_out)
    if not kinds:
        raise WrongValueError("leaves nothing that this sink gets", hint="remove one of them, or the whole [[alert]]")
    return kinds


def _kind(word: str, index: int, *, is_out: bool) -> AlertKind:
    names = [kind.value for kind in _KINDS]
    if word in names:
        return AlertKind(word)
    if word == AlertKind.TEST.value:
        what, hint = f"{shown(word)} is what test-alert sends, whatever stands here", "remove it"
        raise WrongValueError(what, hint=hint, part=index)
    hint = did_you_mean(word.replace("_", "-"), names)
    hint = hint.replace('did you mean "', 'did you mean "!') if is_out else hint
    raise WrongValueError(f"{shown(word)} is no kind of alert", hint=hint, part=index)


def _name(value: object) -> str:
    text = parse_text(value, '"on-call"')
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,62}", text):
        hint = 'letters, digits, ".", "_" and "-", as in "on-call", 63 of them at most'
        raise WrongValueError(f"{shown(text)} cannot be the name of a sink", hint=hint)
    return text


_PARTS_OF_HOST = (
    r"(?:[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.)*[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.?"
)
_URL_EXAMPLE = '"https://example.org:9093"'


def _url(value: object) -> str:
    """Rule 3: no message has the value itself."""
    text = parse_text(value, _URL_EXAMPLE)
    if len(text) > _LONGEST_URL:
        raise WrongValueError(
            f"has {len(text)} characters, more than {_LONGEST_URL}", hint=f"write it as {_URL_EXAMPLE}"
        )
    if not re.fullmatch("[!-~]*", text):
        hint = "write each as %XX, and a name with other letters in its ASCII form (xn--...)"
        raise WrongValueError("holds a space, or a sign that is not ASCII", hint=hint)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme is None:
        raise WrongValueError("is not a URL with http:// or https://", hint=f"write it as {_URL_EXAMPLE}")
    if scheme[1].lower() not in ("http", "https"):
        what = f"has the scheme {shown(scheme[1])}, and not http or https"
        raise WrongValueError(what, hint=f"write it as {_URL_EXAMPLE}")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        what, hint = "has a host or a port that cannot be", f"write it as {_URL_EXAMPLE}, or https://[::1]:9093"
        raise WrongValueError(what, hint=hint) from None
    _check_url(parts, port)
    return text


def _check_url(parts: SplitResult, port: int | None) -> None:
    if "@" in parts.netloc:
        hint = 'write username = "..." and password_file = "/..." instead'
        raise WrongValueError("has the name of a user in it, and perhaps a password", hint=hint)
    if not _is_host(parts.hostname or ""):
        what = f"has {shown(parts.hostname)} for its host" if parts.hostname else "has no host"
        raise WrongValueError(what, hint=f"write it as {_URL_EXAMPLE}")
    if port == 0:
        raise WrongValueError("has port 0, and nobody listens there", hint=f"write it as {_URL_EXAMPLE}")
    if parts.fragment:
        raise WrongValueError('has a "#", and what follows is never sent', hint='remove it, or write it as "%23"')


def _is_host(text: str) -> bool:
    """A name, or an address without brackets."""
    try:
        ip_address(text)
    except ValueError:
        digits = re.fullmatch(r"[0-9.]+|.*:.*", text)  # an address, or it would be one
        return len(text) <= _LONGEST_HOST and not digits and bool(re.fullmatch(_PARTS_OF_HOST, text))
    return True


def host_of(url: str) -> str:
    """What may be shown of a URL (rule 3)."""
    parts = urlsplit(url)
    rest = "/..." if parts.path.strip("/") or parts.query else ""
    return f"{parts.scheme}://{parts.netloc}{rest}"


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.rstrip(".").lower() == "localhost"


def _urls(value: object) -> tuple[str, ...]:
    """The members of one cluster."""
    found: list[str] = []
    for index, text in enumerate(parse_texts(value, f"[{_URL_EXAMPLE}]")):
        try:
            url = _url(text)
        except WrongValueError as error:
            raise WrongValueError(str(error), hint=error.hint, part=index) from None
        if url.rstrip("/") in (each.rstrip("/") for each in found):
            raise WrongValueError("stands here twice", hint="remove one of them", part=index)
        found.append(url)
    return tuple(found)


_SERVER_EXAMPLE = '"mail.example.org:587"'


def _server(value: object) -> str:
    text = parse_text(value, _SERVER_EXAMPLE)
    parts = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/@\s]+)):([0-9]{1,5})", text)
    if parts is None or not _is_host(parts[1] or parts[2]):
        raise WrongValueError(f"{shown(text)} is not HOST:PORT", hint=_server_hint(text))
    if not 1 <= int(parts[3]) <= 65535:  # noqa: PLR2004 - what 16 bits hold
        raise WrongValueError(f"port {int(parts[3])} is not between 1 and 65535", hint=f"write it as {_SERVER_EXAMPLE}")
    return text


def _server_hint(text: str) -> str:
    if ":" not in text and _is_host(text):
        return f'did you mean "{text}:{25 if _is_local(text) else 587}"?'
    if text.count(":") > 1 and _is_host(text):
        return f'did you mean "[{text}]:587"?'
    return f'write it as {_SERVER_EXAMPLE}, "localhost:25" or "[::1]:25"'


def _mail_address(value: object) -> str:
    text = parse_text(value, '"oncall@example.org"')
    name = re.fullmatch(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}(?:@(.*))?", text)
    if name and name[1] and _is_host(name[1]) and len(text) <= _LONGEST_ADDRESS:
        return text
    inner = re.search(r"<\s*([^<>\s]+@[^<>\s]+)\s*>", text)
    if inner:
        hint = f"did you mean {shown(inner[1])}?"
    elif name and "@" not in text:
        hint = f'did you mean "{text}@localhost"?'
    else:
        hint = 'write it as "oncall@example.org"'
    raise WrongValueError(f"{shown(text)} is not the address of a mailbox", hint=hint)


def _mail_addresses(value: object) -> tuple[str, ...]:
    texts = parse_texts(value, '["oncall@example.org"]')
    if len(texts) > _MOST_RECIPIENTS:
        what = f"has {len(texts)} addresses, more than {_MOST_RECIPIENTS}"
        raise WrongValueError(what, hint="have the mail server keep a list, and name that")
    found: list[str] = []
    for index, text in enumerate(texts):
        try:
            address = _mail_address(text)
        except WrongValueError as error:
            raise WrongValueError(str(error), hint=error.hint, part=index) from None
        if address in found:
            raise WrongValueError(f"{shown(address)} stands here twice", hint="remove one of them", part=index)
        found.append(address)
    return tuple(found)


_LABELS_EXAMPLE = '{ cluster = "berlin" }'


def _labels(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise WrongValueError(f"must be a table of texts, not {shown(value)}", hint=f"write it as {_LABELS_EXAMPLE}")
    if len(value) > _MOST_LABELS:
        raise WrongValueError(f"has {len(value)} labels, more than {_MOST_LABELS}", hint="remove some of them")
    for name, text in value.items():
        _check_label(name, text)
    return value


def _check_label(name: str, text: object) -> None:
    """In the way of Alertmanager, which takes no alert at all with another name; `__` is for its own."""
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) or name.startswith("__") or len(name) > _MOST_LETTERS:
        near = re.sub("[^A-Za-z0-9_]", "_", name[:60]).strip("_").lstrip("0123456789_")
        hint = f'did you mean "{near}"?' if near else f"write it as {_LABELS_EXAMPLE}"
        raise WrongValueError("is not the name of a label: letters, digits and _", hint=hint, part=name)
    if name in RESERVED_LABELS:
        raise WrongValueError("is a label that every alert has already", hint="choose another name", part=name)
    if not isinstance(text, str):
        hint = f'write "{shown(text)}"' if isinstance(text, int | float) else f"write it as {_LABELS_EXAMPLE}"
        raise WrongValueError(f"must be a text in quotes, not {shown(text)}", hint=hint, part=name)
    if not text or len(text) > _MOST_LETTERS or not text.isprintable():
        what = "is empty, which is no label at all" if not text else "is longer than a label, or no plain text"
        raise WrongValueError(what, hint="remove it, or write a word", part=name)


def _username(value: object) -> str:
    text = parse_text(value, '"duende"')
    if not text or not text.isprintable() or len(text) > _MOST_LETTERS:
        raise WrongValueError(f"{shown(text)} is not the name of a user", hint='write it as "duende"')
    return text


# --- the record

_ALERTMANAGER, _WEBHOOK, _COMMAND, _MAIL = SinkKind
_HTTP = (_ALERTMANAGER, _WEBHOOK)
_PEOPLE = (_WEBHOOK, _COMMAND, _MAIL)  # whom nobody spares what comes too often
_EVERY = tuple(SinkKind)


def _key(parse: Parser, sinks: Collection[SinkKind], *, example: str = "") -> dict[str, object]:
    """What a key is read by, and which sinks know it. `example`: it has to be there."""
    return {"parse": parse, "sinks": frozenset(sinks), "example": example}


_FILE = absolute_path("/etc/duende-ublkd/password")


@dataclass(frozen=True, slots=True)
class SinkConfig:
    """One `[[alert]]`. Durations are seconds. `source` names the table: `alert[0] (FILE:12)`.

    `kinds` (): all. `rate_limit` None: none. `reminder`, `rate_limit` and `quiet_hours` are not Alertmanager's: it has its
    own, and takes an alert that is not sent again for one that is over.
    """

    sink: SinkKind = field(metadata=_key(choice_of(SinkKind), _EVERY))
    name: str = field(metadata=_key(_name, _EVERY))
    severity: Severity = field(default=Severity.WARNING, metadata=_key(choice_of(Severity), _EVERY))
    kinds: tuple[AlertKind, ...] = field(default=(), metadata=_key(_kinds, _EVERY))
    timeout: float = field(default=10.0, metadata=_key(duration_between(1, 300), _EVERY))
    rate_limit: RateLimit | None = field(default=None, metadata=_key(_rate_limit, _PEOPLE))
    reminder: Reminder = field(default=Reminder.ONCE, metadata=_key(choice_of(Reminder), _PEOPLE))
    quiet_hours: QuietHours | None = field(default=None, metadata=_key(_quiet_hours, _PEOPLE))
    resend: float = field(default=60.0, metadata=_key(duration_between(5, 3600), [_ALERTMANAGER]))
    url: str = field(default="", metadata=_key(_url, _HTTP, example=_URL_EXAMPLE))
    urls: tuple[str, ...] = field(default=(), metadata=_key(_urls, [_ALERTMANAGER]))
    labels: Mapping[str, str] = field(default_factory=dict, metadata=_key(_labels, _HTTP))
    username: str = field(default="", metadata=_key(_username, (*_HTTP, _MAIL)))
    password_file: str = field(default="", metadata=_key(_FILE, (*_HTTP, _MAIL)))
    bearer_token_file: str = field(default="", metadata=_key(_FILE, _HTTP))
    ca_file: str = field(default="", metadata=_key(_FILE, (*_HTTP, _MAIL)))
    cert_file: str = field(default="", metadata=_key(_FILE, _HTTP))
    key_file: str = field(default="", metadata=_key(_FILE, _HTTP))
    secret_file: str = field(default="", metadata=_key(_FILE, [_WEBHOOK]))
    command: tuple[str, ...] = field(
        default=(), metadata=_key(parse_plain_command, [_COMMAND], example='["/usr/local/bin/tell-people"]')
    )
    user: str | None = field(default=None, metadata=_key(parse_user, [_COMMAND]))
    to: tuple[str, ...] = field(default=(), metadata=_key(_mail_addresses, [_MAIL], example='["oncall@example.org"]'))
    from_: str = field(default="", metadata=_key(_mail_address, [_MAIL], example='"duende-ublkd@example.org"'))
    server: str = field(default="", metadata=_key(_server, [_MAIL], example=_SERVER_EXAMPLE))
    tls: Encryption = field(default=Encryption.STARTTLS, metadata=_key(choice_of(Encryption), [_MAIL]))
    source: str = field(default="alert", compare=False)

    @property
    def members(self) -> tuple[str, ...]:
        """The URLs that are sent to."""
        return self.urls or ((self.url,) if self.url else ())

    def wants(self, kind: AlertKind, severity: Severity) -> bool:
        """Whether this sink gets such an alert. One for trial goes to every sink."""
        if kind is AlertKind.TEST:
            return True
        return severity.at_least(self.severity) and (not self.kinds or kind in self.kinds)

    def to_object(self) -> dict[str, Any]:
        """As JSON values, under the names that the keys have in the file."""
        return {key: _plain(getattr(self, name)) for key, name in _NAMES.items()}

    def __str__(self) -> str:
        """One line: where it sends, and what differs from the defaults. Nothing secret."""
        told = [f"severity = {self.severity.value}"]
        if self.kinds:
            told.append(f"kinds = {', '.join(kind.value for kind in self.kinds)}")
        told += [f"{key} = {_word(value)}" for key, value in self._unusual()]
        name = "" if self.name == self.sink.value else f' "{self.name}"'
        return f"{self.sink.value}{name} to {self._destination()}: {', '.join(told)}"

    def _unusual(self) -> Iterator[tuple[str, Any]]:
        usual = SinkConfig(self.sink, self.name, rate_limit=usual_rate(self.sink))
        for key in ("timeout", "rate_limit", "reminder", "quiet_hours", "resend", "user", "tls"):
            if (value := getattr(self, key)) != getattr(usual, key):
                yield key, value

    def _destination(self) -> str:
        match self.sink:
            case SinkKind.COMMAND:
                return printable(" ".join(self.command))
            case SinkKind.MAIL:
                return printable(f"{', '.join(self.to)} by {self.server}")
            case _:
                return printable(", ".join(host_of(url) for url in self.members))


_FIELDS = {entry.name.removesuffix("_"): entry for entry in fields(SinkConfig) if entry.metadata}
_NAMES = {key: entry.name for key, entry in _FIELDS.items()}


def _plain(value: Any) -> Any:  # noqa: ANN401 - a field's
    match value:
        case Enum():
            return value.value
        case tuple():
            return [_plain(each) for each in value]
        case RateLimit() | QuietHours():
            return str(value)
        case _:
            return value


def _word(value: Any) -> str:  # noqa: ANN401 - a field's
    match value:
        case Enum():
            return str(value.value)
        case float():
            return duration_text(value)
        case _:
            return printable(str(value))


def usual_rate(sink: SinkKind) -> RateLimit | None:
    """`rate_limit` where none is given."""
    return None if sink is SinkKind.ALERTMANAGER else RateLimit(30, 3600.0)


def keys_of(sink: SinkKind | None) -> dict[str, Parser]:
    """The keys that a sink knows, each with its parser. None: all of them."""
    return {key: entry.metadata["parse"] for key, entry in _FIELDS.items() if sink in (None, *entry.metadata["sinks"])}


def foreign_keys(sink: SinkKind) -> dict[str, tuple[str, str]]:
    """The keys that only other sinks know: what is wrong with each, and a hint (rule 1)."""
    return {
        key: (
            f'is not for sink = "{sink.value}": {_named(entry.metadata["sinks"])} it',
            _OF_ALERTMANAGER.get(key, "remove it") if sink is SinkKind.ALERTMANAGER else "remove it",
        )
        for key, entry in _FIELDS.items()
        if sink not in entry.metadata["sinks"]
    }


_OF_ALERTMANAGER = {
    "rate_limit": "remove it, and set group_interval in Alertmanager's own configuration",
    "reminder": "remove it, and set repeat_interval in Alertmanager's own configuration",
    "quiet_hours": "remove it, and set mute_time_intervals in Alertmanager's own configuration",
    "secret_file": "remove it, or write bearer_token_file",
}


def _named(sinks: Collection[SinkKind]) -> str:
    names = [sink.value for sink in SinkKind if sink in sinks]
    *others, last = names
    return f"only {', '.join(others)} and {last} have" if others else f"only {last} has"


def missing_keys(sink: SinkKind, given: Collection[str]) -> dict[str, str]:
    """The keys without which this sink is none, each with an example of what to write."""
    if sink is SinkKind.ALERTMANAGER and "urls" in given:
        return {}
    return {
        key: entry.metadata["example"]
        for key, entry in _FIELDS.items()
        if entry.metadata["example"] and sink in entry.metadata["sinks"] and key not in given
    }


def make_sink(found: Mapping[str, Any], source: str) -> SinkConfig:
    """The record of a table's values. Each key that has to be there is."""
    sink: SinkKind = found["sink"]
    usual = {"name": sink.value, "rate_limit": usual_rate(sink)}
    return SinkConfig(**{**usual, **{_NAMES[key]: value for key, value in found.items()}}, source=source)


def faults(sink: SinkConfig, given: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What does not fit together: at which key, what is wrong, and a hint. `given`: the table as the file has it."""
    if "kinds" in given:
        yield from _kept_out(sink, is_out=given["kinds"][0].startswith("!"))
    yield from _faulty_pairs(given)
    if sink.sink in _HTTP:
        yield from _faulty_http(sink, given)
    if sink.sink is SinkKind.MAIL:
        yield from _faulty_mail(sink, given)


def _kept_out(sink: SinkConfig, *, is_out: bool) -> Iterator[tuple[str, str, str]]:
    """Rule 2. `is_out`: the kinds are those that are left, of which some may be kept out."""
    out = [kind for kind in sink.kinds if not sink.wants(kind, kind.severity)]
    if len(out) == len(sink.kinds):
        what = f'lets nothing through: severity = "{sink.severity.value}" keeps out every kind that is left'
    elif out and not is_out:
        what = f'names "{out[0].value}", whose severity is {out[0].severity.value}: less than {sink.severity.value}'
    else:
        return
    yield "kinds", what, f'write severity = "{_severity_for(sink.kinds).value}", or other kinds'


def _severity_for(kinds: Collection[AlertKind]) -> Severity:
    """The greatest that lets all of these kinds through."""
    severities: list[Severity] = [*Severity]
    return next(each for each in reversed(severities) if all(kind.severity.at_least(each) for kind in kinds))


def _faulty_pairs(given: Collection[str]) -> Iterator[tuple[str, str, str]]:
    for key, missing in (("username", "password_file"), ("password_file", "username"), ("key_file", "cert_file")):
        if key in given and missing not in given:
            yield key, f"does nothing without {missing}", f"add {missing}, or remove {key}"


def _faulty_http(sink: SinkConfig, given: Collection[str]) -> Iterator[tuple[str, str, str]]:
    if "url" in given and "urls" in given:
        yield "urls", "stands beside url", "write all of them into urls, and remove url"
    if "bearer_token_file" in given and "username" in given:
        yield "bearer_token_file", "stands beside username: only one of them can be sent", "remove one of them"
    if ":" in sink.username:
        yield "username", 'has a ":", which no user of HTTP has', "write the name alone"
    if not any(url.lower().startswith("https:") for url in sink.members):
        for key in ("ca_file", "cert_file", "key_file"):
            if key in given:
                yield key, "does nothing: the URL is not https", f"write https://..., or remove {key}"
    if sink.sink is SinkKind.ALERTMANAGER:
        for url in sink.members:
            parts = urlsplit(url)
            prefix = re.split(r"/api/v\d", parts.path)[0]  # one that a proxy asks for belongs to the address
            if parts.query or prefix != parts.path:
                key = "urls" if "urls" in given else "url"
                address = printable(f"{parts.scheme}://{parts.netloc}{prefix.rstrip('/')}")
                yield key, "has more than the address of Alertmanager", f'did you mean "{address}"?'
                return


def doubts(sink: SinkConfig) -> Iterator[tuple[str, str]]:
    """What is possible, and worth a warning: at which key, and why."""
    key = "username" if sink.username else "bearer_token_file"
    if sink.sink in _HTTP and (sink.username or sink.bearer_token_file):
        for url in sink.members:
            if url.lower().startswith("http:") and not _is_local(urlsplit(url).hostname or ""):
                yield key, f"what it proves can be read on the way to {host_of(url)}; write https://..."


def _faulty_mail(sink: SinkConfig, given: Collection[str]) -> Iterator[tuple[str, str, str]]:
    host, _, port = sink.server.rpartition(":")
    is_local = _is_local(host.strip("[]"))
    usual = {"465": Encryption.TLS, "587": Encryption.STARTTLS}.get(port, sink.tls)
    if sink.tls is not usual and (sink.tls is not Encryption.NONE or usual is Encryption.TLS):
        what = f'is "{sink.tls.value}", and port {port} is for "{usual.value}"'
        yield ("tls" if "tls" in given else "server"), what, f'write tls = "{usual.value}", or another port'
    if sink.tls is not Encryption.NONE:
        return
    if "ca_file" in given:
        yield "ca_file", 'does nothing with tls = "none"', 'write tls = "starttls", or remove ca_file'
    if sink.username and not is_local:
        what = 'would be sent for everybody on the way to read, with its password: tls = "none"'
        yield "username", what, 'write tls = "starttls"'
