"""What the user asked for: the configuration file, from bytes to frozen records, and which policy a device gets.

Rule 1: a key that does nothing is an error. What this version cannot do is refused by name, not read and forgotten.
Rule 2: every mistake of a file is reported at once, each as `FILE:LINE: KEY: what is wrong` and what to type instead.
Rule 3: a fact that is missing never makes a policy less careful. Where it is open whether a table applies, the device
        gets what both answers allow: hands off unless every table that may apply says delete, and the longest times.

A key, its default and its parser stand together, once, as a field of the record that it ends up in.
"""

from __future__ import annotations

import re
import tomllib
from collections import deque
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from enum import Enum
from fnmatch import fnmatchcase
from ipaddress import ip_address
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from duende_ublkd.core.errors import ConfigError, UsageError
from duende_ublkd.core.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

MAX_BYTES = 64 * 1024  # a log given by mistake is longer; and tomllib is quadratic in the parts of a dotted key
MAX_DEV_ID = (1 << 20) - 1  # MINORBITS: the kernel has no more minors for ublkc
COMM_BYTES = 15  # TASK_COMM_LEN - 1: the kernel cuts a longer name of a process here

_T = TypeVar("_T")
_E = TypeVar("_E", bound=Enum)
_Path = tuple[str | int, ...]


class WrongValueError(UsageError):
    """A value that cannot be used. Whoever asked for it knows which key or option it was given to."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a file. `line` 0: the file as a whole."""

    file: str
    line: int
    key: str
    what: str
    hint: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.key}: {self.what}" if self.key else f"{where}: {self.what}"


class InvalidConfigError(ConfigError):
    """Everything that is wrong with a file, in the order of its lines."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line))
        first = self.problems[0]
        if len(self.problems) == 1:
            super().__init__(str(first), hint=first.hint)
        else:
            hint = f"correct these {len(self.problems)} places, then type: duende-ublkd check-config {first.file}"
            super().__init__("\n".join(f"{problem}; {problem.hint}" for problem in self.problems), hint=hint)


def unreadable(path: str, error: OSError) -> ConfigError:
    """Say why a configuration file could not be read, for whoever tried to."""
    file = printable(path)
    what, hint = f"cannot be read: {error.strerror or error}", f"see what is wrong with it: ls -l {file}"
    if isinstance(error, FileNotFoundError):
        hint = "copy the annotated share/duende-ublkd/duende-ublkd.toml of this package there, or name a file: --config"
        what = "no such file"
    elif isinstance(error, IsADirectoryError):
        what, hint = "is a directory", f"name the file in it: --config {file.rstrip('/')}/config.toml"
    elif isinstance(error, PermissionError):
        what, hint = "may not be read by this user", "run as root, or give the file to this user"
    return InvalidConfigError(Problem(file, 0, "", what, hint))


# --- values: each parser takes what tomllib made of a value and returns it, or raises WrongValueError

_UNITS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
_DURATION = re.compile("".join(rf"(?:([0-9]{{1,12}}){unit})?" for unit in _UNITS))
_DURATION_HINT = 'write it as "500ms", "30s", "1m30s", "2h" or "1d"'
DAY = 86_400.0
YEAR = 365 * DAY


def _shown(value: object) -> str:
    """Name a value in a message. Never its repr: that of a hostile number or table can itself fail."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return f'"{printable(value)}"'
        case int() if abs(value) < 1 << 63:
            return str(value)
        case float():
            return str(value)
        case dict():
            return "a table"
        case list():
            return "an array"
        case _:
            return "a number of that size" if isinstance(value, int) else "a date or time"


def _text(value: object, example: str) -> str:
    if not isinstance(value, str):
        raise WrongValueError(f"must be a text in quotes, not {_shown(value)}", hint=f"write it as {example}")
    return value


def parse_duration(value: object) -> float:
    """Return the seconds of "500ms", "1m30s", "2h" or "1d"."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = _shown(value)
        raise _wrong_duration(value, value)
    text = _text(value, '"30s"')
    counts = _DURATION.fullmatch(text)
    if not text or counts is None:
        raise _wrong_duration(text, _shown(text))
    return sum(int(n or 0) * unit for n, unit in zip(counts.groups(), _UNITS.values(), strict=True)) / 1000


def _wrong_duration(text: str, shown: str) -> WrongValueError:
    unknown = [unit for unit in re.findall(r"[^\W\d_]+", text) if unit not in _UNITS]
    if text.startswith("-"):
        return WrongValueError(f"{shown} is negative", hint=_DURATION_HINT)
    if re.fullmatch("[0-9]{1,6}", text):
        return WrongValueError(f"{shown} has no unit", hint=f'did you mean "{text}s"?')
    if unknown and text[:1].isdigit():
        units = ", ".join(reversed(_UNITS))
        return WrongValueError(f"{shown} has the unknown unit {_shown(unknown[0])}", hint=f"the units are {units}")
    return WrongValueError(f"{shown} is not a duration", hint=f"{_DURATION_HINT}: whole numbers, largest unit first")


def duration_text(seconds: float) -> str:
    """Write a duration as the file would have it; the inverse of `parse_duration`, to the millisecond."""
    left, text = round(seconds * 1000), ""
    for name, unit in _UNITS.items():
        n, left = divmod(left, unit)
        text += f"{n}{name}" if n else ""
    return text or "0s"


def _duration(at_least: float, at_most: float) -> Callable[[object], float]:
    def parse(value: object) -> float:
        seconds = parse_duration(value)
        if at_least <= seconds <= at_most:
            return seconds
        low, high = duration_text(at_least), duration_text(at_most)
        nearest = low if seconds < at_least else high
        raise WrongValueError(f"{_shown(value)} is not between {low} and {high}", hint=f'the nearest is "{nearest}"')

    return parse


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise WrongValueError(f"must be true or false, not {_shown(value)}", hint="write true or false, without quotes")
    return value


def _directory(value: object) -> str:
    text = _text(value, '"/var/lib/duende-ublkd"')
    if not text.startswith("/") or "\0" in text:
        raise WrongValueError(f"{_shown(text)} is not an absolute path", hint='write it as "/var/lib/duende-ublkd"')
    return text


def _choice(members: type[_E]) -> Callable[[object], _E]:
    names = [str(member.value) for member in members]

    def parse(value: object) -> _E:
        text = _text(value, f'"{names[0]}"')
        if text in names:
            return members(text)
        raise WrongValueError(f"{_shown(text)} is not one of {', '.join(names)}", hint=_did_you_mean(text, names))

    return parse


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = get_close_matches(word[:60].lower().replace("-", "_"), known, n=1)
    return f'did you mean "{near[0]}"?' if near else f"possible here: {', '.join(known)}"


def _unserved(value: object) -> OnUnserved:
    if value in ("recover", "delete"):
        raise WrongValueError(f"{_shown(value)}: this version can only alert", hint='write unserved = "alert"')
    return _choice(OnUnserved)(value)


def _ids(value: object) -> tuple[range, ...]:
    example = "3" if isinstance(value, bool) or not isinstance(value, int) else _shown(value)
    text = _text(value, f'"{example}", or "0-15,20"')
    return tuple(_span(part.strip()) for part in text.split(","))


def _span(text: str) -> range:
    ends = re.fullmatch(r"([0-9]{1,7})(?:\s*-\s*([0-9]{1,7}))?", text)
    if ends is None:
        raise WrongValueError(f"{_shown(text)} is not a device number or a range", hint='write it as "3" or "0-15,20"')
    low, high = int(ends[1]), int(ends[2] or ends[1])
    if low > high:
        raise WrongValueError(f"{_shown(text)} is an empty range", hint=f'did you mean "{high}-{low}"?')
    if high > MAX_DEV_ID:
        raise WrongValueError(f"{high} is no device number", hint=f"the kernel's highest is {MAX_DEV_ID}")
    return range(low, high + 1)


def _server(value: object) -> str:
    """A pattern for a process's name or its program's; a path would never match either."""
    pattern = _text(value, '"ublk.loop"')
    base = pattern.rpartition("/")[2]
    if not pattern or base != pattern:
        hint = f"did you mean {_shown(base)}?" if base else 'write it as "ublk.loop" or "my-server-*"'
        raise WrongValueError(f"{_shown(pattern)} is not the name of a program, without its directory", hint=hint)
    return pattern


def _unit(value: object) -> str:
    """A pattern for a systemd unit; without a suffix or a wildcard it would never match."""
    pattern = _text(value, '"swap-*.service"')
    if pattern and ("." in pattern or any(sign in pattern for sign in "*?[")):
        return pattern
    hint = f"did you mean {_shown(pattern + '.service')}?" if pattern else 'write it as "swap-*.service"'
    raise WrongValueError(f"{_shown(pattern)} is not the full name of a unit", hint=hint)


def _uid(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        hint = "write the number that `id -u NAME` prints, without quotes"
        raise WrongValueError(f"must be a user's number, not {_shown(value)}", hint=hint)
    if not 0 <= value < (1 << 32) - 1:  # (uid_t)-1 means nobody
        raise WrongValueError(f"{_shown(value)} is no user's number", hint="write the number that `id -u NAME` prints")
    return value


_LISTEN = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):([0-9]{1,5})")


def _listen(value: object) -> Address | None:
    """Addresses only: a name would make the start depend on a resolver."""
    text = _text(value, f'"{Address()}"; "" switches HTTP off')
    if not text:
        return None
    parts = _LISTEN.fullmatch(text)
    if parts is None:
        raise WrongValueError(f"{_shown(text)} is not ADDRESS:PORT", hint=_listen_hint(text))
    six, four, port = parts[1], parts[2], int(parts[3])
    try:
        host = ip_address(six or four)
    except ValueError:
        raise WrongValueError(f"{_shown(six or four)} is no IP address", hint=_listen_hint(text)) from None
    if host.version != (6 if six else 4):
        raise WrongValueError(f"{_shown(text)} is not ADDRESS:PORT", hint=f'did you mean "{host}:{port}"?')
    if not 1 <= port <= 65535:  # noqa: PLR2004 - what 16 bits hold
        raise WrongValueError(f"port {port} is not between 1 and 65535", hint=f'did you mean "{Address(str(host))}"?')
    return Address(str(host), port)


def _listen_hint(text: str) -> str:
    if text in ("off", "none", "no", "false"):
        return 'did you mean listen = ""?'
    if named := re.fullmatch(r"(?:localhost)?:?([0-9]{1,5})", text):
        return f'did you mean "127.0.0.1:{named[1]}"?'
    if bare := re.fullmatch(r"([0-9A-Fa-f:]*:):?([0-9A-Fa-f]+):([0-9]{1,5})", text):
        return f'did you mean "[{text[: bare.start(3) - 1]}]:{bare[3]}"?'
    return f'write it as "{Address()}" or "[::1]:10116"; "" switches HTTP off'


# --- records: the configuration as the rest of the program sees it


def _read_by(parse: Callable[[object], object]) -> dict[str, object]:
    return {"parse": parse}


def schema(record: type) -> dict[str, Callable[[object], Any]]:
    """Return the keys of a record's table, each with its parser."""
    return {entry.name: entry.metadata["parse"] for entry in fields(record)}


class OnOrphan(Enum):
    """What to do with a device that is orphaned."""

    DELETE = "delete"
    ALERT = "alert"
    IGNORE = "ignore"


class OnUnserved(Enum):
    """What to do with a device whose I/O hangs or fails for longer than `recovery_deadline`."""

    ALERT = "alert"


@dataclass(frozen=True, slots=True)
class Address:
    """Where HTTP listens."""

    host: str = "127.0.0.1"
    port: int = 10116

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """`[daemon]`. Durations are seconds, here and in every record."""

    resync_interval: float = field(default=30.0, metadata=_read_by(_duration(1, DAY)))
    command_deadline: float = field(default=10.0, metadata=_read_by(_duration(1, 600)))
    dry_run: bool = field(default=False, metadata=_read_by(_boolean))
    lock_memory: bool = field(default=True, metadata=_read_by(_boolean))
    state_dir: str = field(default="/var/lib/duende-ublkd", metadata=_read_by(_directory))


@dataclass(frozen=True, slots=True)
class Policy:
    """`[policy]`, and what a `[[device]]` overrides of it."""

    orphaned: OnOrphan = field(default=OnOrphan.DELETE, metadata=_read_by(_choice(OnOrphan)))
    orphan_grace: float = field(default=0.5, metadata=_read_by(_duration(0, YEAR)))
    setup_grace: float = field(default=60.0, metadata=_read_by(_duration(0, YEAR)))
    unserved: OnUnserved = field(default=OnUnserved.ALERT, metadata=_read_by(_unserved))
    recovery_deadline: float = field(default=60.0, metadata=_read_by(_duration(0, YEAR)))


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """`[http]`. `listen` None: no HTTP at all."""

    listen: Address | None = field(default=Address(), metadata=_read_by(_listen))


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What is known of a device and of the server behind it, now or remembered from when it lived. None: not known.

    `server_known` False: nobody ever saw its server, so `comm`, `exe` and `unit` say nothing. "" is not known either:
    no process has an empty name, and one without a unit (in a container, or gone while it was read) may have had one.
    """

    dev_id: int
    comm: str | None = None
    exe: str | None = None
    unit: str | None = None
    owner_uid: int | None = None
    server_known: bool = False


@dataclass(frozen=True, slots=True)
class Match:
    """`match` of a `[[device]]`: every matcher given has to agree; none given matches every device."""

    ids: tuple[range, ...] | None = field(default=None, metadata=_read_by(_ids))
    server: str | None = field(default=None, metadata=_read_by(_server))
    unit: str | None = field(default=None, metadata=_read_by(_unit))
    owner_uid: int | None = field(default=None, metadata=_read_by(_uid))

    def answers(self, facts: DeviceFacts) -> dict[str, bool | None]:
        """Return what each matcher given says of a device. None: the fact that it asks for is not known."""
        said: dict[str, bool | None] = {}
        if self.ids is not None:
            said["ids"] = any(facts.dev_id in span for span in self.ids)
        if self.server is not None:
            said["server"] = _is_server(self.server, facts)
        if self.unit is not None:
            said["unit"] = fnmatchcase(facts.unit, self.unit) if facts.server_known and facts.unit else None
        if self.owner_uid is not None:
            said["owner_uid"] = None if facts.owner_uid is None else facts.owner_uid == self.owner_uid
        return said


def _is_server(pattern: str, facts: DeviceFacts) -> bool | None:
    """Whether a server has this name: as a process (comm), or as the program that it runs."""
    if not facts.server_known:
        return None
    # The kernel's mark on a program that was replaced under its process, as every upgrade does.
    exe = (facts.exe or "").removesuffix(" (deleted)").rpartition("/")[2]
    if any(name and fnmatchcase(name, pattern) for name in (facts.comm, exe)):
        return True
    if not facts.comm or not exe:
        return None
    cut = len(facts.comm.encode(errors="replace")) >= COMM_BYTES
    # A name that was cut may have gone on as the pattern does: then some beginning of the pattern matches what is left.
    maybe = cut and any(fnmatchcase(facts.comm, pattern[:end]) for end in range(1, len(pattern)))
    return None if maybe else False


@dataclass(frozen=True, slots=True)
class DeviceRule:
    """One `[[device]]`: whom it is for, and the whole policy they get. `source` names it: `device[0] (FILE:12)`."""

    match: Match
    policy: Policy
    source: str = field(default="device", compare=False)


@dataclass(frozen=True, slots=True)
class ChosenPolicy:
    """The policy of one device, the table or tables it came from, and the sentence that says why."""

    policy: Policy
    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class Config:
    """A whole file. Two are equal when they ask for the same, wherever their lines stand."""

    daemon: DaemonConfig = DaemonConfig()
    policy: Policy = Policy()
    devices: tuple[DeviceRule, ...] = ()
    http: HttpConfig = HttpConfig()
    policy_source: str = field(default="policy (built-in defaults)", compare=False)

    def policy_for(self, facts: DeviceFacts) -> ChosenPolicy:
        """Return the first table that matches; with a fact missing, the most careful of all that may (rule 3)."""
        doubtful: list[DeviceRule] = []
        unknown: list[str] = []
        for rule in self.devices:
            answers = rule.match.answers(facts)
            if False in answers.values():
                continue
            if all(answers.values()):
                why = f"first match, by {', '.join(answers)}" if answers else "matches every device"
                return _choose(ChosenPolicy(rule.policy, rule.source, why), doubtful, unknown)
            doubtful.append(rule)
            unknown += [name for name, said in answers.items() if said is None and name not in unknown]
        why = "no [[device]] matches" if self.devices else "there is no [[device]]"
        return _choose(ChosenPolicy(self.policy, self.policy_source, why), doubtful, unknown)


def _choose(sure: ChosenPolicy, doubtful: Sequence[DeviceRule], unknown: Sequence[str]) -> ChosenPolicy:
    """Join the table that surely applies with those before it that may."""
    if not doubtful:
        return sure
    policy = _careful([*(rule.policy for rule in doubtful), sure.policy])
    maybe = " or ".join(rule.source for rule in doubtful)
    missing = ", ".join(unknown)
    reason = f"cannot tell whether {maybe} applies (not known: {missing}), so each setting is the more careful one"
    return ChosenPolicy(policy, f"{maybe} or {sure.source}", reason)


def _careful(policies: Sequence[Policy]) -> Policy:
    """What each of these policies allows. Where they differ on the deed, none is done, and somebody is told."""
    orphaned = {policy.orphaned for policy in policies}
    unserved = {policy.unserved for policy in policies}
    return Policy(
        orphaned=orphaned.pop() if len(orphaned) == 1 else OnOrphan.ALERT,
        orphan_grace=max(policy.orphan_grace for policy in policies),
        setup_grace=max(policy.setup_grace for policy in policies),
        unserved=unserved.pop() if len(unserved) == 1 else OnUnserved.ALERT,
        recovery_deadline=max(policy.recovery_deadline for policy in policies),
    )


# --- the file

SECTIONS: Mapping[str, type] = {"daemon": DaemonConfig, "policy": Policy, "http": HttpConfig}
_HOMES = {"[daemon]": DaemonConfig, "[policy] or [[device]]": Policy, "[http]": HttpConfig, "match = { ... }": Match}
_NOT_YET = {
    "alert": ("this version writes alerts to the log only", "remove [[alert]]"),
    "recover": ("this version cannot run a recovery", "remove the key"),
}


def load(text: bytes, name: str) -> Config:
    """Read a configuration. `name` is the file's, for messages and sources."""
    file = printable(name)
    source = _decoded(text, file)
    try:
        data = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(source, file, str(error)) from None
    except (ValueError, RecursionError) as error:  # what Python gives up on before tomllib does
        what, hint = "holds a number of thousands of digits", "remove it"
        if isinstance(error, RecursionError):
            what, hint = "is nested too deeply", "remove some of the brackets"
        raise InvalidConfigError(Problem(file, 0, "", what, hint)) from None
    reader = _Reader(source, file)
    config = reader.document(data)
    if reader.problems:
        raise InvalidConfigError(*reader.problems)
    return config


def _decoded(text: bytes, file: str) -> str:
    if len(text) > MAX_BYTES:
        what, hint = f"larger than {MAX_BYTES // 1024} KiB", "name a configuration file: --config FILE"
        raise InvalidConfigError(Problem(file, 0, "", what, hint))
    text = text.removeprefix(b"\xef\xbb\xbf")  # an editor's byte order mark
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        what = f"not UTF-8: byte 0x{text[error.start]:02x} at offset {error.start}"
        line = text.count(b"\n", 0, error.start) + 1
        raise InvalidConfigError(Problem(file, line, "", what, "save the file as UTF-8")) from None


def _syntax_error(source: str, file: str, message: str) -> InvalidConfigError:
    """Turn tomllib's `what (at line L, column C)` into ours."""
    lines = source.splitlines() or [""]
    at = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    line = int(at[1]) if at and at[1] else len(lines)
    what = message[: at.start()] if at else message
    what += f" (column {at[2]})" if at and at[2] else " (end of file)"
    reads = lines[line - 1].strip() if line <= len(lines) else ""
    hint = f'the line is: {printable(reads)} -- texts and durations stand in quotes: orphan_grace = "500ms"'
    return InvalidConfigError(Problem(file, line, "", printable(what), hint))


class _Reader:
    """One reading of one file: what tomllib made of it goes in, records and problems come out."""

    def __init__(self, source: str, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self._lines = key_lines(source)

    def document(self, data: dict[str, Any]) -> Config:
        parsers: dict[str, Callable[[object], Any]] = {
            name: self._section((name,), record) for name, record in SECTIONS.items()
        }
        found = self._table((), data, {**parsers, "device": self._overrides})
        policy = found.get("policy", Policy())
        rules = [
            DeviceRule(keys.pop("match", Match()), replace(policy, **keys), self._source(("device", index)))
            for index, keys in enumerate(found.pop("device", ()))
        ]
        if not self.problems:  # a match that could not be read would look like one that matches everything
            self._refuse_unreachable(rules)
        if "policy" in data:
            found["policy_source"] = self._source(("policy",))
        return Config(**found, devices=tuple(rules))

    def _section(self, path: _Path, record: type[_T]) -> Callable[[object], _T]:
        return lambda value: record(**self._table(path, value, schema(record)))

    def _overrides(self, value: object) -> list[dict[str, Any]]:
        """Read what each `[[device]]` gives; the policy that it overrides may stand below it."""
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise WrongValueError(
                f"must be tables of the form [[device]], not {_shown(value)}", hint="write [[device]]"
            )
        found = []
        for index, entry in enumerate(value):
            path = ("device", index)
            parsers = {"match": self._section((*path, "match"), Match), **schema(Policy)}
            found.append(self._table(path, entry, parsers))
        return found

    def _table(self, path: _Path, value: object, parsers: Mapping[str, Callable[[object], Any]]) -> dict[str, Any]:
        """Read one table, and go on after a mistake."""
        if not isinstance(value, dict):
            hint = f"write [{path[-1]}]" if len(path) == 1 else 'write it as { ids = "0-15" }'
            raise WrongValueError(f"must be one table, not {_shown(value)}", hint=hint)
        found = {}
        for key, entry in value.items():
            here = (*path, key)
            if key in _NOT_YET:
                self._wrong(here, *_NOT_YET[key])
            elif key not in parsers:
                self._wrong(here, "unknown key" if path else "unknown section or key", _where_to(key, [*parsers]))
            else:
                try:
                    found[key] = parsers[key](entry)
                except WrongValueError as error:
                    self._wrong(here, str(error), error.hint)
        return found

    def _refuse_unreachable(self, rules: Sequence[DeviceRule]) -> None:
        greedy = next((rule for rule in rules if rule.match == Match()), None)
        if greedy is not None and greedy is not rules[-1]:
            index = next(index for index, rule in enumerate(rules) if rule is greedy) + 1
            what = f"never reached: {greedy.source} matches every device"
            self._wrong(("device", index), what, "move the table that matches every device to the end")

    def _wrong(self, path: _Path, what: str, hint: str) -> None:
        self.problems.append(Problem(self.file, self._line(path), _path_text(path), what, hint))

    def _source(self, path: _Path) -> str:
        return f"{_path_text(path)} ({self.file}:{self._line(path)})"

    def _line(self, path: _Path) -> int:
        """The line of a key; where it escaped notice, that of the nearest table around it."""
        return next((self._lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self._lines), 1)


def _where_to(key: str, known: Sequence[str]) -> str:
    home = next((home for home, record in _HOMES.items() if key in schema(record)), None)
    return f"it belongs to {home}" if home else _did_you_mean(key, known)


def _path_text(path: _Path) -> str:
    """`device[0].match.ids`, with whatever is no plain key in quotes."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            plain = re.fullmatch("[A-Za-z0-9_-]{1,60}", part)
            text += ("." if text else "") + (part if plain else _shown(part))
    return text


# --- the line of a key, which tomllib does not tell

_TOKEN = re.compile(
    r'''
    """ (?: \\. | [^\\] )*? """ "{0,2} | \'\'\' .*? \'\'\' \'{0,2}   # texts over several lines, which may end in quotes
    | " (?: \\. | [^"\\\n] )* " | ' [^'\n]* '
    | (?P<comment> \# [^\n]* ) | \n | [][{}=,.] | [^]\s"'\#[{}=,.]+
    ''',
    re.DOTALL | re.VERBOSE,
)
_DEPTH = 8  # deeper than any key of ours; what is below has the line of what is above


def key_lines(source: str) -> dict[_Path, int]:
    """Find the line of every key of a document that tomllib has accepted. It judges nothing and never raises."""
    return _Walk(source).lines


def _tokens(source: str) -> Iterator[tuple[str, int]]:
    line = 1
    for token in _TOKEN.finditer(source):
        if not token["comment"]:
            yield token[0], line
        line += token[0].count("\n")


class _Walk:
    def __init__(self, source: str) -> None:
        self.lines: dict[_Path, int] = {}
        self._last: dict[_Path, int] = {}  # index of the newest table of each [[array]]
        self._left = deque(_tokens(source))
        table: _Path = ()
        while self._left:
            if self._next() == "[":
                table = self._header()
            elif self._next() == "\n":
                self._take()
            else:
                self._pair(table)

    def _next(self) -> str:
        return self._left[0][0] if self._left else ""

    def _take(self) -> tuple[str, int]:
        return self._left.popleft() if self._left else ("", 0)

    def _header(self) -> _Path:
        """`[a.b]` or `[[a.b]]`. Below the name of an array stands, in every path, the index of its newest table."""
        _, line = self._take()
        if self._next() != "[":
            return self._key((), "]")
        self._take()
        path = self._key((), "]")
        self._take()
        name = path[:-1] if path and isinstance(path[-1], int) else path
        self._last[name] = self._last.get(name, -1) + 1
        path = (*name, self._last[name])
        self.lines[path] = line
        return path

    def _key(self, table: _Path, end: str) -> _Path:
        """Read a dotted key up to and with the sign that ends it."""
        path = table
        while self._left:
            sign, line = self._take()
            if sign == end:
                break
            if sign not in (".", "\n") and len(path) < _DEPTH:
                path = (*path, _unquoted(sign))
                self.lines.setdefault(path, line)
                path += (self._last[path],) if path in self._last else ()
        return path

    def _pair(self, table: _Path) -> None:
        self._value(self._key(table, "="))

    def _value(self, path: _Path) -> None:
        sign, _ = self._take()
        if sign == "{":
            while self._inside("}"):
                self._pair(path)
        elif sign == "[":
            for index in count():
                if not self._inside("]"):
                    break
                item = (*path, index)[:_DEPTH]
                self.lines.setdefault(item, self._left[0][1])
                self._value(item)
        else:
            while self._next() not in ("", "\n", ",", "]", "}"):
                self._take()

    def _inside(self, end: str) -> bool:
        """Whether another entry follows; if none does, step over the end."""
        while self._next() in ("\n", ","):
            self._take()
        if self._next() in ("", end):
            self._take()
            return False
        return True


def _unquoted(sign: str) -> str:
    if sign[0] not in "\"'":
        return sign
    try:
        return str(tomllib.loads(f"key = {sign}")["key"])
    except tomllib.TOMLDecodeError:
        return sign
