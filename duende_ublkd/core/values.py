"""Values of the configuration: each parser takes what tomllib made of one and returns it, or raises WrongValueError.

Rule 1: whoever wrote the value is told what is wrong with it and what to write instead, never by its repr.
Rule 2: a command is an array, never a line for a shell, and the program in it is the file's own or, as "{server}" alone,
        the former server's; any other placeholder is only ever an argument.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from enum import Enum
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from duende_ublkd.core.errors import DuendeError, UsageError
from duende_ublkd.core.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MOST_PARTS = 64  # of a command; with MOST_CHARACTERS in each it stays far below what execve() takes
MOST_CHARACTERS = 4096
PLACEHOLDERS = ("id", "block_device", "char_device", "server")
_OF_AN_ALERT = ("id", "block_device")  # its command has them in its environment

_E = TypeVar("_E", bound=Enum)
Parser: TypeAlias = "Callable[[object], Any] | type[Any]"


class WrongValueError(UsageError):
    """A value that cannot be used. Whoever asked for it knows which key or option it was given to.

    `part`: the index of what is wrong in it, if the value is an array, or the key, if it is a table.
    """

    def __init__(self, message: str, *, hint: str, part: int | str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.part = part


class UnfilledError(DuendeError, ValueError):
    """What a placeholder of a command stands for is not known."""

    def __init__(self, placeholder: str) -> None:
        named = f"{{{placeholder}}}"
        super().__init__(f"what {named} stands for is not known", hint=f"write a recover.command without {named}")
        self.placeholder = placeholder


# --- how a record's fields are read


def read_by(parse: Parser, *, example: str = "") -> dict[str, object]:
    """What a key is read by; a record: it is a table of its own. `example`: for a key that has to be there."""
    return {"parse": parse, "example": example}


def schema(record: type) -> dict[str, Parser]:
    """Return the keys of a record's table, each with its parser, or with the record of the table that it is."""
    return {entry.name: entry.metadata["parse"] for entry in fields(record)}


def required_keys(record: type) -> dict[str, str]:
    """The keys that have no default, each with an example."""
    return {entry.name: entry.metadata["example"] for entry in fields(record) if entry.default is MISSING}


# --- plain values

_UNITS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
_DURATION = re.compile("".join(rf"(?:([0-9]{{1,12}}){unit})?" for unit in _UNITS))
_DURATION_HINT = 'write it as "500ms", "30s", "1m30s", "2h" or "1d"'
DAY = 86_400.0
YEAR = 365 * DAY

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_SIZE_UNITS = {"GiB": GIB, "MiB": MIB, "KiB": KIB}
_SIZE_HINT = 'write it as "512KiB", "64MiB" or "1GiB"'
COMMAND_EXAMPLE = '["ublk", "recover", "-n", "{id}"]'


def shown(value: object) -> str:
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


def parse_text(value: object, example: str) -> str:
    if not isinstance(value, str):
        raise WrongValueError(f"must be a text in quotes, not {shown(value)}", hint=f"write it as {example}")
    return value


def parse_duration(value: object) -> float:
    """Return the seconds of "500ms", "1m30s", "2h" or "1d"."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = shown(value)
        raise _wrong_duration(value, value)
    text = parse_text(value, '"30s"')
    counts = _DURATION.fullmatch(text)
    if not text or counts is None:
        raise _wrong_duration(text, shown(text))
    return sum(int(n or 0) * unit for n, unit in zip(counts.groups(), _UNITS.values(), strict=True)) / 1000


def _wrong_duration(text: str, written: str) -> WrongValueError:
    unknown = [unit for unit in re.findall(r"[^\W\d_]+", text) if unit not in _UNITS]
    if text.startswith("-"):
        return WrongValueError(f"{written} is negative", hint=_DURATION_HINT)
    if re.fullmatch("[0-9]{1,6}", text):
        return WrongValueError(f"{written} has no unit", hint=f'did you mean "{text}s"?')
    if unknown and text[:1].isdigit():
        units = ", ".join(reversed(_UNITS))
        return WrongValueError(f"{written} has the unknown unit {shown(unknown[0])}", hint=f"the units are {units}")
    return WrongValueError(f"{written} is not a duration", hint=f"{_DURATION_HINT}: whole numbers, largest unit first")


def duration_text(seconds: float) -> str:
    """Write a duration as the file would have it; the inverse of `parse_duration`, to the millisecond."""
    left, text = round(seconds * 1000), ""
    for name, unit in _UNITS.items():
        n, left = divmod(left, unit)
        text += f"{n}{name}" if n else ""
    return text or "0s"


def duration_between(at_least: float, at_most: float) -> Callable[[object], float]:
    def parse(value: object) -> float:
        seconds = parse_duration(value)
        if at_least <= seconds <= at_most:
            return seconds
        low, high = duration_text(at_least), duration_text(at_most)
        nearest = low if seconds < at_least else high
        raise WrongValueError(f"{shown(value)} is not between {low} and {high}", hint=f'the nearest is "{nearest}"')

    return parse


def parse_size(value: object) -> int:
    """Return the bytes of "512KiB", "64MiB" or "1GiB"."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    text = shown(value) if number else parse_text(value, '"64MiB"')
    count_of = re.fullmatch("([0-9]{1,12})(KiB|MiB|GiB)", text)
    if count_of is None:
        raise _wrong_size(text, text if number else shown(text))
    return int(count_of[1]) * _SIZE_UNITS[count_of[2]]


def _wrong_size(text: str, written: str) -> WrongValueError:
    if text.startswith("-"):
        return WrongValueError(f"{written} is negative", hint=_SIZE_HINT)
    if re.fullmatch("[0-9]{1,6}", text):
        return WrongValueError(f"{written} has no unit", hint=f'did you mean "{text}MiB"?')
    if unit := re.fullmatch(r"([0-9]{1,12})\s*([^\W\d_]{1,20})", text):
        near = next((name for name in _SIZE_UNITS if name[0].lower() == unit[2][0].lower()), None)
        hint = f'did you mean "{unit[1]}{near}"?' if near else f"the units are {', '.join(reversed(_SIZE_UNITS))}"
        return WrongValueError(f"{written} has the unknown unit {shown(unit[2])}", hint=hint)
    return WrongValueError(f"{written} is not a size", hint=f"{_SIZE_HINT}: a whole number with one unit")


def size_text(size: int) -> str:
    """Write a size as the file would have it; the inverse of `parse_size`."""
    name, unit = next((each for each in _SIZE_UNITS.items() if size >= each[1] and size % each[1] == 0), ("KiB", KIB))
    return f"{size // unit}{name}"


def size_between(at_least: int, at_most: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        size = parse_size(value)
        if at_least <= size <= at_most:
            return size
        low, high = size_text(at_least), size_text(at_most)
        nearest = low if size < at_least else high
        raise WrongValueError(f"{shown(value)} is not between {low} and {high}", hint=f'the nearest is "{nearest}"')

    return parse


def integer_between(at_least: int, at_most: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            hint = f"write a number from {at_least} to {at_most}, without quotes"
            raise WrongValueError(f"must be a whole number, not {shown(value)}", hint=hint)
        if at_least <= value <= at_most:
            return value
        nearest = at_least if value < at_least else at_most
        what = f"{shown(value)} is not between {at_least} and {at_most}"
        raise WrongValueError(what, hint=f"the nearest is {nearest}")

    return parse


def parse_boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise WrongValueError(f"must be true or false, not {shown(value)}", hint="write true or false, without quotes")
    return value


def absolute_path(example: str) -> Callable[[object], str]:
    """A parser of absolute paths."""

    def parse(value: object) -> str:
        text = parse_text(value, f'"{example}"')
        if not text.startswith("/") or "\0" in text:
            raise WrongValueError(f"{shown(text)} is not an absolute path", hint=f'write it as "{example}"')
        return text

    return parse


def choice_of(members: type[_E]) -> Callable[[object], _E]:
    names = [str(member.value) for member in members]

    def parse(value: object) -> _E:
        text = parse_text(value, f'"{names[0]}"')
        if text in names:
            return members(text)
        raise WrongValueError(f"{shown(text)} is not one of {', '.join(names)}", hint=did_you_mean(text, names))

    return parse


def did_you_mean(word: str, known: Sequence[str]) -> str:
    near = nearest(word, known)
    return f'did you mean "{near}"?' if near else f"possible here: {', '.join(known)}"


def nearest(word: str, known: Sequence[str]) -> str | None:
    written = {name.lower(): name for name in known}
    near = get_close_matches(word[:60].lower().replace("-", "_"), written, n=1)
    return written[near[0]] if near else None


def parse_texts(value: object, example: str) -> list[str]:
    if not isinstance(value, list):
        raise WrongValueError(f"must be an array of texts, not {shown(value)}", hint=f"write it as {example}")
    if not value:
        raise WrongValueError("is empty", hint=f"write it as {example}")
    for index, part in enumerate(value):
        if not isinstance(part, str):
            hint = f'write "{shown(part)}"' if isinstance(part, int | float) else f"write the whole as {example}"
            raise WrongValueError(f"must be a text in quotes, not {shown(part)}", hint=hint, part=index)
    return value


# --- commands and users

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def parse_command(value: object) -> tuple[str, ...]:
    """A command with placeholders."""
    return _parse_parts(value, COMMAND_EXAMPLE, _check_part, _check_program)


def parse_plain_command(value: object) -> tuple[str, ...]:
    """A command in which every sign stands for itself."""
    return _parse_parts(value, '["/usr/local/bin/tell-people", "all"]', _check_plain_part, _check_name)


def _parse_parts(
    value: object, example: str, check: Callable[[str], None], check_program: Callable[[str], None]
) -> tuple[str, ...]:
    parts = parse_texts(value, example)
    if len(parts) > MOST_PARTS:
        what, hint = f"has {len(parts)} parts, more than {MOST_PARTS}", "put the command into a script, and name that"
        raise WrongValueError(what, hint=hint)
    for index, part in enumerate(parts):
        try:
            _check_length(part)
            check(part)
            if index == 0:
                check_program(part)
        except WrongValueError as error:
            raise WrongValueError(str(error), hint=error.hint, part=index) from None
    return tuple(parts)


def _check_length(part: str) -> None:
    if len(part) > MOST_CHARACTERS:
        what = f"has {len(part)} characters, more than {MOST_CHARACTERS}"
        raise WrongValueError(what, hint="put the command into a script, and name that")
    if "\0" in part:
        raise WrongValueError(f"{shown(part)} holds a NUL, and no argument can", hint="remove it")


def _check_part(part: str) -> None:
    for sign in _PLACEHOLDER.finditer(part):
        if sign[0] in ("{", "}"):
            what = f'{shown(part)} has a "{sign[0]}" that stands alone'
            raise WrongValueError(what, hint=f'write "{sign[0] * 2}" for the sign itself')
        if sign[1] is not None and sign[1] not in PLACEHOLDERS:
            hint = did_you_mean(sign[0], [f"{{{name}}}" for name in PLACEHOLDERS])
            raise WrongValueError(f"{shown(part)} has the unknown placeholder {shown(sign[0])}", hint=hint)


def _check_plain_part(part: str) -> None:
    """What looks like a placeholder was meant for one."""
    if found := next((name for name in PLACEHOLDERS if f"{{{name}}}" in part), None):
        what = f'{shown(part)} has the placeholder "{{{found}}}", and nothing is filled in here'
        where = f"DUENDE_UBLKD_ALERT_{found.upper() if found in _OF_AN_ALERT else 'JSON'}"
        raise WrongValueError(what, hint=f"what is known is in the command's environment: {where}")


def _check_program(program: str) -> None:
    """Rule 2."""
    if program == "{server}":
        return
    if any(sign[1] is not None for sign in _PLACEHOLDER.finditer(program)):
        what, hint = (
            "has a placeholder in the name of the program",
            'write the program itself, or "{server}" alone; its arguments may have placeholders',
        )
        raise WrongValueError(f"{shown(program)} {what}", hint=hint)
    _check_name(program)


def _check_name(program: str) -> None:
    """What is run is the same wherever the daemon was started."""
    absolute, words, base = program.startswith("/"), program.split(), program.rpartition("/")[2]
    if not base:
        what, hint = "is not the name of a program", 'write it as "ublk" or "/usr/bin/ublk"'
    elif not absolute and words != [program]:
        what, hint = "is more than the name of a program", f"write each word as a text of its own: {_array_text(words)}"
    elif not absolute and base != program:
        what = "is a relative path"
        hint = f'write the absolute path, as "/usr/local/bin/{_bare(base)}", or the bare name, "{_bare(base)}"'
    else:
        return
    raise WrongValueError(f"{shown(program)} {what}", hint=hint)


def _bare(text: str) -> str:
    return shown(text)[1:-1]


def _array_text(words: Sequence[str]) -> str:
    words_shown = ", ".join(shown(word) for word in words[:MOST_PARTS])
    return printable(f"[{words_shown}]")


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


def parse_user(value: object) -> str:
    """A name is looked up when it is needed; it may be known to no file of this machine."""
    number = isinstance(value, int) and not isinstance(value, bool)
    text = parse_text(value, f'"{shown(value)}"' if number else '"nobody"')
    if re.fullmatch("[0-9]+", text):
        if len(text) > 10 or not is_uid(int(text)):  # noqa: PLR2004 - digits of 32 bits
            raise WrongValueError(
                f"{shown(text)} is no user's number", hint="write the user's name, or what `id -u` prints"
            )
        return text
    if not re.fullmatch(r"[^-\s:,/][^\s:,/]{0,255}", text) or not text.isprintable():
        raise WrongValueError(f"{shown(text)} is not the name of a user", hint='write it as "nobody" or "65534"')
    return text


def is_uid(number: int) -> bool:
    return 0 <= number < (1 << 32) - 1  # (uid_t)-1 means nobody


# --- addresses


@dataclass(frozen=True, slots=True)
class Address:
    """Where HTTP listens."""

    host: str = "127.0.0.1"
    port: int = 10116

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


_LISTEN = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):([0-9]{1,5})")


def parse_listen(value: object) -> Address | None:
    """Addresses only: a name would make the start depend on a resolver."""
    text = parse_text(value, f'"{Address()}"; "" switches HTTP off')
    if not text:
        return None
    parts = _LISTEN.fullmatch(text)
    if parts is None:
        raise WrongValueError(f"{shown(text)} is not ADDRESS:PORT", hint=_listen_hint(text))
    six, four, port = parts[1], parts[2], int(parts[3])
    try:
        host = ip_address(six or four)
    except ValueError:
        raise WrongValueError(f"{shown(six or four)} is no IP address", hint=_listen_hint(text)) from None
    if host.version != (6 if six else 4):
        raise WrongValueError(f"{shown(text)} is not ADDRESS:PORT", hint=f'did you mean "{host}:{port}"?')
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
