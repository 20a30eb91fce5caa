"""What the user asked for: the configuration file, from bytes to frozen records, and which policy a device gets.

Rule 1: a key that does nothing is an error. What this version cannot do is refused by name, not read and forgotten.
Rule 2: every mistake of a file is reported at once, each as `FILE:LINE: KEY: what is wrong` and what to type instead.
Rule 3: a fact that is missing never makes a policy less careful. Where it is open whether a table applies, the device
        gets what both answers allow: hands off unless every table that may apply says the same, and the longest times.
Rule 4: a command is an array, never a line for a shell, and the program in it is the file's own or, as "{server}" alone,
        the former server's; any other placeholder is only ever an argument.

A key, its default and its parser stand together, once, as a field of the record that it ends up in.
"""

from __future__ import annotations

import re
import tomllib
from collections import deque
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
from enum import Enum
from fnmatch import fnmatchcase
from ipaddress import ip_address
from itertools import count
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, TypeVar

from duende_ublkd.core.errors import ConfigError, DuendeError, UsageError
from duende_ublkd.core.model import Feature
from duende_ublkd.core.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

MAX_BYTES = 64 * 1024  # a log given by mistake is longer; and tomllib is quadratic in the parts of a dotted key
MAX_DEV_ID = (1 << 20) - 1  # MINORBITS: the kernel has no more minors for ublkc
COMM_BYTES = 15  # TASK_COMM_LEN - 1: the kernel cuts a longer name of a process here
MOST_PARTS = 64  # of a command; with MOST_CHARACTERS in each it stays far below what execve() takes
MOST_CHARACTERS = 4096
PLACEHOLDERS = ("id", "block_device", "char_device", "server")

_T = TypeVar("_T")
_E = TypeVar("_E", bound=Enum)
_Path = tuple[str | int, ...]
_Parser: TypeAlias = "Callable[[object], Any] | type[Any]"


class WrongValueError(UsageError):
    """A value that cannot be used. Whoever asked for it knows which key or option it was given to.

    `part`: the index of what is wrong in it, if the value is an array.
    """

    def __init__(self, message: str, *, hint: str, part: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.part = part


class UnfilledError(DuendeError, ValueError):
    """What a placeholder of a command stands for is not known."""

    def __init__(self, placeholder: str) -> None:
        named = f"{{{placeholder}}}"
        super().__init__(f"what {named} stands for is not known", hint=f"write a recover.command without {named}")
        self.placeholder = placeholder


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


def refused(path: str, what: str, hint: str) -> ConfigError:
    """Say why a configuration file is not taken, for whoever was to read it."""
    return InvalidConfigError(Problem(printable(path), 0, "", what, printable(hint, 1000)))


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

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_SIZE_UNITS = {"GiB": GIB, "MiB": MIB, "KiB": KIB}
_SIZE_HINT = 'write it as "512KiB", "64MiB" or "1GiB"'
_COMMAND_EXAMPLE = '["ublk", "recover", "-n", "{id}"]'
_RECOVER_EXAMPLE = f"{{ command = {_COMMAND_EXAMPLE} }}"


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


def parse_size(value: object) -> int:
    """Return the bytes of "512KiB", "64MiB" or "1GiB"."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    text = _shown(value) if number else _text(value, '"64MiB"')
    count_of = re.fullmatch("([0-9]{1,12})(KiB|MiB|GiB)", text)
    if count_of is None:
        raise _wrong_size(text, text if number else _shown(text))
    return int(count_of[1]) * _SIZE_UNITS[count_of[2]]


def _wrong_size(text: str, shown: str) -> WrongValueError:
    if text.startswith("-"):
        return WrongValueError(f"{shown} is negative", hint=_SIZE_HINT)
    if re.fullmatch("[0-9]{1,6}", text):
        return WrongValueError(f"{shown} has no unit", hint=f'did you mean "{text}MiB"?')
    if unit := re.fullmatch(r"([0-9]{1,12})\s*([^\W\d_]{1,20})", text):
        near = next((name for name in _SIZE_UNITS if name[0].lower() == unit[2][0].lower()), None)
        hint = f'did you mean "{unit[1]}{near}"?' if near else f"the units are {', '.join(reversed(_SIZE_UNITS))}"
        return WrongValueError(f"{shown} has the unknown unit {_shown(unit[2])}", hint=hint)
    return WrongValueError(f"{shown} is not a size", hint=f"{_SIZE_HINT}: a whole number with one unit")


def size_text(size: int) -> str:
    """Write a size as the file would have it; the inverse of `parse_size`."""
    name, unit = next((each for each in _SIZE_UNITS.items() if size >= each[1] and size % each[1] == 0), ("KiB", KIB))
    return f"{size // unit}{name}"


def _size(at_least: int, at_most: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        size = parse_size(value)
        if at_least <= size <= at_most:
            return size
        low, high = size_text(at_least), size_text(at_most)
        nearest = low if size < at_least else high
        raise WrongValueError(f"{_shown(value)} is not between {low} and {high}", hint=f'the nearest is "{nearest}"')

    return parse


def _integer(at_least: int, at_most: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            hint = f"write a number from {at_least} to {at_most}, without quotes"
            raise WrongValueError(f"must be a whole number, not {_shown(value)}", hint=hint)
        if at_least <= value <= at_most:
            return value
        nearest = at_least if value < at_least else at_most
        what = f"{_shown(value)} is not between {at_least} and {at_most}"
        raise WrongValueError(what, hint=f"the nearest is {nearest}")

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
    near = _nearest(word, known)
    return f'did you mean "{near}"?' if near else f"possible here: {', '.join(known)}"


def _nearest(word: str, known: Sequence[str]) -> str | None:
    written = {name.lower(): name for name in known}
    near = get_close_matches(word[:60].lower().replace("-", "_"), written, n=1)
    return written[near[0]] if near else None


def _texts(value: object, example: str) -> list[str]:
    if not isinstance(value, list):
        raise WrongValueError(f"must be an array of texts, not {_shown(value)}", hint=f"write it as {example}")
    if not value:
        raise WrongValueError("is empty", hint=f"write it as {example}")
    for index, part in enumerate(value):
        if not isinstance(part, str):
            hint = f'write "{_shown(part)}"' if isinstance(part, int | float) else f"write the whole as {example}"
            raise WrongValueError(f"must be a text in quotes, not {_shown(part)}", hint=hint, part=index)
    return value


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
    if not _is_uid(value):
        raise WrongValueError(f"{_shown(value)} is no user's number", hint="write the number that `id -u NAME` prints")
    return value


def _is_uid(number: int) -> bool:
    return 0 <= number < (1 << 32) - 1  # (uid_t)-1 means nobody


def parse_feature(text: str) -> Feature:
    """Return the flag of a device with this name, written with or without UBLK_F_, in either case."""
    word = text.strip().upper().removeprefix("UBLK_F_")
    if word in Feature.__members__:
        return Feature[word]
    hint = _did_you_mean(word, [*Feature.__members__])
    raise WrongValueError(f"{_shown(text)} is no flag of a ublk device", hint=hint)


def _flags(value: object) -> FlagMatch:
    present, absent = Feature(0), Feature(0)
    for index, text in enumerate(_texts(value, '["USER_RECOVERY", "!UNPRIVILEGED_DEV"]')):
        unset = text.startswith("!")
        try:
            flag = parse_feature(text.removeprefix("!"))
        except WrongValueError as error:
            hint = error.hint.replace('did you mean "', 'did you mean "!') if unset else error.hint
            raise WrongValueError(str(error), hint=hint, part=index) from None
        if flag & (present | absent):
            twice = "stands here twice" if bool(flag & absent) is unset else "is to be set and not to be set"
            raise WrongValueError(f'"{flag.name}" {twice}', hint="remove one of them", part=index)
        present, absent = (present, absent | flag) if unset else (present | flag, absent)
    return FlagMatch(present, absent)


_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def _command(value: object) -> tuple[str, ...]:
    parts = _texts(value, _COMMAND_EXAMPLE)
    if len(parts) > MOST_PARTS:
        what, hint = f"has {len(parts)} parts, more than {MOST_PARTS}", "put the command into a script, and name that"
        raise WrongValueError(what, hint=hint)
    for index, part in enumerate(parts):
        try:
            _check_part(part)
            if index == 0:
                _check_program(part)
        except WrongValueError as error:
            raise WrongValueError(str(error), hint=error.hint, part=index) from None
    return tuple(parts)


def _check_part(part: str) -> None:
    if len(part) > MOST_CHARACTERS:
        what = f"has {len(part)} characters, more than {MOST_CHARACTERS}"
        raise WrongValueError(what, hint="put the command into a script, and name that")
    if "\0" in part:
        raise WrongValueError(f"{_shown(part)} holds a NUL, and no argument can", hint="remove it")
    for sign in _PLACEHOLDER.finditer(part):
        if sign[0] in ("{", "}"):
            what = f'{_shown(part)} has a "{sign[0]}" that stands alone'
            raise WrongValueError(what, hint=f'write "{sign[0] * 2}" for the sign itself')
        if sign[1] is not None and sign[1] not in PLACEHOLDERS:
            hint = _did_you_mean(sign[0], [f"{{{name}}}" for name in PLACEHOLDERS])
            raise WrongValueError(f"{_shown(part)} has the unknown placeholder {_shown(sign[0])}", hint=hint)


def _check_program(program: str) -> None:
    """What is run is told by the file alone (rule 4), and wherever the daemon was started."""
    absolute, words, base = program.startswith("/"), program.split(), program.rpartition("/")[2]
    if program == "{server}":
        return
    if any(sign[1] is not None for sign in _PLACEHOLDER.finditer(program)):
        what, hint = (
            "has a placeholder in the name of the program",
            'write the program itself, or "{server}" alone; its arguments may have placeholders',
        )
    elif not base:
        what, hint = "is not the name of a program", 'write it as "ublk" or "/usr/bin/ublk"'
    elif not absolute and words != [program]:
        what, hint = "is more than the name of a program", f"write each word as a text of its own: {_array_text(words)}"
    elif not absolute and base != program:
        what = "is a relative path"
        hint = f'write the absolute path, as "/usr/local/bin/{_bare(base)}", or the bare name, "{_bare(base)}"'
    else:
        return
    raise WrongValueError(f"{_shown(program)} {what}", hint=hint)


def _bare(text: str) -> str:
    return _shown(text)[1:-1]


def _array_text(words: Sequence[str]) -> str:
    shown = ", ".join(_shown(word) for word in words[:MOST_PARTS])
    return printable(f"[{shown}]")


def fill(command: Sequence[str], values: Mapping[str, str | None]) -> tuple[str, ...]:
    """Put values in place of the placeholders. UnfilledError: the command has one whose value is None, or missing.

    What is filled in stays as it is, braces and all, and makes no part more or less.
    """

    def replacement(sign: re.Match[str]) -> str:
        if sign[1] is None:
            return sign[0][0]
        value = values.get(sign[1])
        if value is None:
            raise UnfilledError(sign[1])
        return value

    return tuple(_PLACEHOLDER.sub(replacement, part) for part in command)


def _user(value: object) -> str:
    """A name is looked up when it is needed; it may be known to no file of this machine."""
    number = isinstance(value, int) and not isinstance(value, bool)
    text = _text(value, f'"{_shown(value)}"' if number else '"nobody"')
    if re.fullmatch("[0-9]+", text):
        if len(text) > 10 or not _is_uid(int(text)):  # noqa: PLR2004 - digits of 32 bits
            raise WrongValueError(
                f"{_shown(text)} is no user's number", hint="write the user's name, or what `id -u` prints"
            )
        return text
    if not re.fullmatch(r"[^-\s:,/][^\s:,/]{0,255}", text) or not text.isprintable():
        raise WrongValueError(f"{_shown(text)} is not the name of a user", hint='write it as "nobody" or "65534"')
    return text


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


def _read_by(parse: _Parser, *, example: str = "") -> dict[str, object]:
    """What a key is read by; a record: it is a table of its own. `example`: for a key that has to be there."""
    return {"parse": parse, "example": example}


def schema(record: type) -> dict[str, _Parser]:
    """Return the keys of a record's table, each with its parser, or with the record of the table that it is."""
    return {entry.name: entry.metadata["parse"] for entry in fields(record)}


def _required(record: type) -> dict[str, str]:
    """The keys that have no default, each with an example."""
    return {entry.name: entry.metadata["example"] for entry in fields(record) if entry.default is MISSING}


class OnOrphan(Enum):
    """What to do with a device that is orphaned."""

    DELETE = "delete"
    ALERT = "alert"
    IGNORE = "ignore"


class OnUnserved(Enum):
    """What to do with a device whose I/O hangs or fails for longer than `recovery_deadline`."""

    ALERT = "alert"
    RECOVER = "recover"
    DELETE = "delete"


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
class Recovery:
    """`recover`: the command that brings a server back, and how often to try.

    `command`: a program and its arguments, for `fill`. `backoff` doubles with each attempt. Served for `stable`: earlier
    attempts are forgotten. `user`: a name or a number; None: as the daemon itself.
    """

    command: tuple[str, ...] = field(metadata=_read_by(_command, example=_COMMAND_EXAMPLE))
    timeout: float = field(default=30.0, metadata=_read_by(_duration(1, 3600)))
    attempts: int = field(default=3, metadata=_read_by(_integer(1, 100)))
    backoff: float = field(default=1.0, metadata=_read_by(_duration(0, 3600)))
    stable: float = field(default=300.0, metadata=_read_by(_duration(1, DAY)))
    user: str | None = field(default=None, metadata=_read_by(_user))


@dataclass(frozen=True, slots=True)
class Policy:
    """`[policy]`, and what a `[[device]]` overrides of it. In a Config, `recover` is there for RECOVER, and only then."""

    orphaned: OnOrphan = field(default=OnOrphan.DELETE, metadata=_read_by(_choice(OnOrphan)))
    orphan_grace: float = field(default=0.5, metadata=_read_by(_duration(0, YEAR)))
    setup_grace: float = field(default=60.0, metadata=_read_by(_duration(0, YEAR)))
    unserved: OnUnserved = field(default=OnUnserved.ALERT, metadata=_read_by(_choice(OnUnserved)))
    recovery_deadline: float = field(default=60.0, metadata=_read_by(_duration(0, YEAR)))
    recover: Recovery | None = field(default=None, metadata=_read_by(Recovery))


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """`[http]`. `listen` None: no HTTP at all."""

    listen: Address | None = field(default=Address(), metadata=_read_by(_listen))


@dataclass(frozen=True, slots=True)
class JournalConfig:
    """`[journal]`. `max_size` in bytes."""

    keep: float = field(default=90 * DAY, metadata=_read_by(_duration(3600, 10 * YEAR)))
    max_size: int = field(default=64 * MIB, metadata=_read_by(_size(MIB, 10 * GIB)))


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What is known of a device and of the server behind it, now or remembered from when it lived. None: not known.

    `server_known` False: nobody ever saw its server, so `comm`, `exe` and `unit` say nothing. "" is not known either:
    no process has an empty name, and one without a unit (in a container, or gone while it was read) may have had one.
    """

    dev_id: int | None
    comm: str | None = None
    exe: str | None = None
    unit: str | None = None
    owner_uid: int | None = None
    server_known: bool = False
    flags: int | None = None  # UBLK_F_* bits


@dataclass(frozen=True, slots=True)
class FlagMatch:
    """`flags` of a match: what has to be set, and what must not be."""

    present: int = 0
    absent: int = 0

    def agrees(self, flags: int) -> bool:
        """Whether a device has these flags."""
        return flags & self.present == self.present and not flags & self.absent


@dataclass(frozen=True, slots=True)
class Match:
    """`match` of a `[[device]]`: every matcher given has to agree; none given matches every device."""

    ids: tuple[range, ...] | None = field(default=None, metadata=_read_by(_ids))
    server: str | None = field(default=None, metadata=_read_by(_server))
    unit: str | None = field(default=None, metadata=_read_by(_unit))
    owner_uid: int | None = field(default=None, metadata=_read_by(_uid))
    flags: FlagMatch | None = field(default=None, metadata=_read_by(_flags))

    def answers(self, facts: DeviceFacts) -> dict[str, bool | None]:
        """Return what each matcher given says of a device. None: the fact that it asks for is not known."""
        said: dict[str, bool | None] = {}
        if self.ids is not None:
            said["ids"] = None if facts.dev_id is None else any(facts.dev_id in span for span in self.ids)
        if self.server is not None:
            said["server"] = _is_server(self.server, facts)
        if self.unit is not None:
            said["unit"] = fnmatchcase(facts.unit, self.unit) if facts.server_known and facts.unit else None
        if self.owner_uid is not None:
            said["owner_uid"] = None if facts.owner_uid is None else facts.owner_uid == self.owner_uid
        if self.flags is not None:
            said["flags"] = None if facts.flags is None else self.flags.agrees(facts.flags)
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
    journal: JournalConfig = JournalConfig()
    policy_source: str = field(default="policy (built-in defaults)", compare=False)

    def policies(self) -> tuple[Policy, ...]:
        """Every policy that a device may get."""
        return (self.policy, *(rule.policy for rule in self.devices))

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
    """What each of these policies allows. Where they differ on the deed, none is done, and somebody is told.

    A recovery is the deed of its command: two different ones are two deeds.
    """
    orphaned = {policy.orphaned for policy in policies}
    deeds = {(policy.unserved, policy.recover) for policy in policies}
    unserved, recover = deeds.pop() if len(deeds) == 1 else (OnUnserved.ALERT, None)
    return Policy(
        orphaned=orphaned.pop() if len(orphaned) == 1 else OnOrphan.ALERT,
        orphan_grace=max(policy.orphan_grace for policy in policies),
        setup_grace=max(policy.setup_grace for policy in policies),
        unserved=unserved,
        recovery_deadline=max(policy.recovery_deadline for policy in policies),
        recover=recover,
    )


# --- the file

SECTIONS: Mapping[str, type] = {
    "daemon": DaemonConfig,
    "policy": Policy,
    "http": HttpConfig,
    "journal": JournalConfig,
}
_HOMES = {
    "[daemon]": DaemonConfig,
    "[policy] or [[device]]": Policy,
    "[http]": HttpConfig,
    "[journal]": JournalConfig,
    "match = { ... }": Match,
    "recover = { ... }": Recovery,
}
_EXAMPLES = {"match": '{ ids = "0-15" }', "recover": _RECOVER_EXAMPLE}
_NOT_YET = {"alert": ("this version writes alerts to the log only", "remove [[alert]]")}


def load(text: bytes, name: str, *, check: Callable[[Recovery], None] | None = None) -> Config:
    """Read a configuration. `name` is the file's, for messages and sources.

    `check`: what this module cannot tell of a command; it raises WrongValueError, `part` being one of the command.
    """
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
    reader = _Reader(source, file, check)
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

    def __init__(self, source: str, file: str, check: Callable[[Recovery], None] | None) -> None:
        self.file = file
        self._check = check
        self.problems: list[Problem] = []
        self._lines = key_lines(source)

    def document(self, data: dict[str, Any]) -> Config:
        found = self._table((), data, {**SECTIONS, "device": self._overrides})
        policy = found.pop("policy", Policy())
        rules = [
            DeviceRule(keys.pop("match", Match()), _settled(replace(policy, **keys)), self._source(("device", index)))
            for index, keys in enumerate(found.pop("device", ()))
        ]
        self._refuse_idle_recovery(data.get("policy", {}), data.get("device", []))
        if not self.problems:  # a match that could not be read would look like one that matches everything
            self._refuse_unreachable(rules)
        if "policy" in data:
            found["policy_source"] = self._source(("policy",))
        return Config(**found, policy=_settled(policy), devices=tuple(rules))

    def _section(self, path: _Path, record: type[_T], value: object) -> _T | None:
        """Read a table into its record. None: a key that has to be there is wrong, which was told."""
        required = _required(record)
        found = self._table(path, value, schema(record), required)
        if not required.keys() <= found.keys():
            return None
        made = record(**found)
        if self._check and isinstance(made, Recovery):
            try:
                self._check(made)
            except WrongValueError as error:
                self._wrong((*path, "command", error.part or 0), str(error), error.hint)
        return made

    def _overrides(self, value: object) -> list[dict[str, Any]]:
        """Read what each `[[device]]` gives; the policy that it overrides may stand below it."""
        if not _are_tables(value):
            raise WrongValueError(
                f"must be tables of the form [[device]], not {_shown(value)}", hint="write [[device]]"
            )
        found = []
        for index, entry in enumerate(value):
            path = ("device", index)
            found.append(self._table(path, entry, {"match": Match, **schema(Policy)}))
        return found

    def _table(
        self,
        path: _Path,
        value: object,
        parsers: Mapping[str, _Parser],
        required: Mapping[str, str] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Read one table, and go on after a mistake. `required`: keys that have to be there, each with an example."""
        if not isinstance(value, dict):
            hint = f"write [{path[-1]}]" if len(path) == 1 else f"write it as {_EXAMPLES[str(path[-1])]}"
            raise WrongValueError(f"must be one table, not {_shown(value)}", hint=hint)
        found = {}
        for key in required.keys() - value.keys():
            self._wrong(path, f"has no {key}", f"add {key} = {required[key]}")
        for key, entry in value.items():
            here = (*path, key)
            if key in _NOT_YET:
                self._wrong(here, *_NOT_YET[key])
            elif key not in parsers:
                self._wrong(here, "unknown key" if path else "unknown section or key", _where_to(key, [*parsers]))
            else:
                parse = parsers[key]
                try:
                    found[key] = self._section(here, parse, entry) if isinstance(parse, type) else parse(entry)
                except WrongValueError as error:
                    self._wrong(here if error.part is None else (*here, error.part), str(error), error.hint)
        return found

    def _refuse_idle_recovery(self, policy: object, tables: object) -> None:
        """Refuse `unserved = "recover"` without a command, and a command that nobody runs, in tables as tomllib has them."""
        if not isinstance(policy, dict) or not _are_tables(tables):
            return
        heirs = [table for table in tables if "recover" not in table]
        if _recovers(policy) and "recover" not in policy:
            self._wrong(("policy", "unserved"), _NO_COMMAND, f"add recover = {_RECOVER_EXAMPLE} to [policy]")
        if "recover" in policy and not any(_recovers({**policy, **table}) is not False for table in ({}, *heirs)):
            what = 'does nothing: neither [policy] nor a [[device]] without its own recover has unserved = "recover"'
            self._wrong(("policy", "recover"), what, 'write unserved = "recover" where it is to run, or remove it')
        for index, table in enumerate(tables):
            path, both = ("device", index), {**policy, **table}
            if "unserved" in table and _recovers(table) and "recover" not in both:
                self._wrong((*path, "unserved"), _NO_COMMAND, f"add recover = {_RECOVER_EXAMPLE} here or to [policy]")
            if "recover" in table and _recovers(both) is False:
                what = f'does nothing: unserved is "{both.get("unserved", _UNSERVED)}" for this table'
                self._wrong((*path, "recover"), what, 'write unserved = "recover" in this [[device]], or remove it')

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


_UNSERVED = Policy().unserved.value
_NO_COMMAND = '"recover", and there is no command to run'


def _recovers(table: Mapping[str, Any]) -> bool | None:
    """Whether a table as it stands in the file asks for recovery. None: `unserved` is a mistake, so nobody knows."""
    unserved = table.get("unserved", _UNSERVED)
    return unserved == OnUnserved.RECOVER.value if unserved in [each.value for each in OnUnserved] else None


def _settled(policy: Policy) -> Policy:
    """Leave out an inherited command that this policy does not run."""
    return policy if policy.unserved is OnUnserved.RECOVER else replace(policy, recover=None)


def _are_tables(value: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


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
