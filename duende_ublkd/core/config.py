"""What the user asked for: the configuration file, from bytes to frozen records, and which policy a device gets.

Rule 1: a key that does nothing is an error. What this version cannot do is refused by name, not read and forgotten.
Rule 2: every mistake of a file is reported at once, each as `FILE:LINE: KEY: what is wrong` and what to type instead.
Rule 3: a fact that is missing never makes a policy less careful. Where it is open whether a table applies, the device
        gets what both answers allow: hands off unless every table that may apply says the same, and the longest times.

A key, its default and its parser stand together, once, as a field of the record that it ends up in.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field, replace
from enum import Enum
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from duende_ublkd.core import alertconfig
from duende_ublkd.core.alertconfig import MOST_SINKS, SinkConfig, SinkKind
from duende_ublkd.core.errors import ConfigError
from duende_ublkd.core.keylines import key_lines
from duende_ublkd.core.model import Feature
from duende_ublkd.core.text import printable
from duende_ublkd.core.values import (
    COMMAND_EXAMPLE,
    DAY,
    GIB,
    MIB,
    YEAR,
    Address,
    UnfilledError,
    WrongValueError,
    absolute_path,
    choice_of,
    did_you_mean,
    duration_between,
    duration_text,
    fill,
    integer_between,
    is_uid,
    parse_boolean,
    parse_command,
    parse_duration,
    parse_listen,
    parse_text,
    parse_texts,
    parse_user,
    read_by,
    required_keys,
    schema,
    shown,
    size_between,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from duende_ublkd.core.keylines import KeyPath
    from duende_ublkd.core.values import Parser
    from duende_ublkd.core.webconfig import WebConfig

__all__ = [  # what the rest of the program takes from here, the values' own names among it
    "COMM_BYTES",
    "MAX_BYTES",
    "MAX_DEV_ID",
    "SECTIONS",
    "Address",
    "ChosenPolicy",
    "Config",
    "DaemonConfig",
    "DeviceFacts",
    "DeviceRule",
    "FlagMatch",
    "HttpConfig",
    "InvalidConfigError",
    "JournalConfig",
    "Match",
    "OnOrphan",
    "OnUnserved",
    "Policy",
    "Problem",
    "Recovery",
    "SinkConfig",
    "SinkKind",
    "UnfilledError",
    "WrongValueError",
    "duration_text",
    "fill",
    "load",
    "parse_duration",
    "parse_feature",
    "refused",
    "unreadable",
]

MAX_BYTES = 64 * 1024  # a log given by mistake is longer; and tomllib is quadratic in the parts of a dotted key
MAX_DEV_ID = (1 << 20) - 1  # MINORBITS: the kernel has no more minors for ublkc
COMM_BYTES = 15  # TASK_COMM_LEN - 1: the kernel cuts a longer name of a process here

_T = TypeVar("_T")
_RECOVER_EXAMPLE = f"{{ command = {COMMAND_EXAMPLE} }}"


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

    def __init__(self, *problems: Problem, named_by: str = "") -> None:
        """`named_by`: the configuration that names this file, where it is not the configuration itself."""
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line))
        first = self.problems[0]
        if len(self.problems) == 1:
            super().__init__(str(first), hint=first.hint)
        else:
            file = named_by or first.file
            hint = f"correct these {len(self.problems)} places, then type: duende-ublkd check-config {file}"
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


def _ids(value: object) -> tuple[range, ...]:
    example = "3" if isinstance(value, bool) or not isinstance(value, int) else shown(value)
    text = parse_text(value, f'"{example}", or "0-15,20"')
    return tuple(_span(part.strip()) for part in text.split(","))


def _span(text: str) -> range:
    ends = re.fullmatch(r"([0-9]{1,7})(?:\s*-\s*([0-9]{1,7}))?", text)
    if ends is None:
        raise WrongValueError(f"{shown(text)} is not a device number or a range", hint='write it as "3" or "0-15,20"')
    low, high = int(ends[1]), int(ends[2] or ends[1])
    if low > high:
        raise WrongValueError(f"{shown(text)} is an empty range", hint=f'did you mean "{high}-{low}"?')
    if high > MAX_DEV_ID:
        raise WrongValueError(f"{high} is no device number", hint=f"the kernel's highest is {MAX_DEV_ID}")
    return range(low, high + 1)


def _server(value: object) -> str:
    """A pattern for a process's name or its program's; a path would never match either."""
    pattern = parse_text(value, '"ublk.loop"')
    base = pattern.rpartition("/")[2]
    if not pattern or base != pattern:
        hint = f"did you mean {shown(base)}?" if base else 'write it as "ublk.loop" or "my-server-*"'
        raise WrongValueError(f"{shown(pattern)} is not the name of a program, without its directory", hint=hint)
    return pattern


def _unit(value: object) -> str:
    """A pattern for a systemd unit; without a suffix or a wildcard it would never match."""
    pattern = parse_text(value, '"swap-*.service"')
    if pattern and ("." in pattern or any(sign in pattern for sign in "*?[")):
        return pattern
    hint = f"did you mean {shown(pattern + '.service')}?" if pattern else 'write it as "swap-*.service"'
    raise WrongValueError(f"{shown(pattern)} is not the full name of a unit", hint=hint)


def _uid(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        hint = "write the number that `id -u NAME` prints, without quotes"
        raise WrongValueError(f"must be a user's number, not {shown(value)}", hint=hint)
    if not is_uid(value):
        raise WrongValueError(f"{shown(value)} is no user's number", hint="write the number that `id -u NAME` prints")
    return value


def parse_feature(text: str) -> Feature:
    """Return the flag of a device with this name, written with or without UBLK_F_, in either case."""
    word = text.strip().upper().removeprefix("UBLK_F_")
    if word in Feature.__members__:
        return Feature[word]
    hint = did_you_mean(word, [*Feature.__members__])
    raise WrongValueError(f"{shown(text)} is no flag of a ublk device", hint=hint)


def _flags(value: object) -> FlagMatch:
    present, absent = Feature(0), Feature(0)
    for index, text in enumerate(parse_texts(value, '["USER_RECOVERY", "!UNPRIVILEGED_DEV"]')):
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


# --- records: the configuration as the rest of the program sees it


_WEB_CONFIG_FILE = absolute_path("/etc/duende-ublkd/web-config.yml")


def _web_config_file(value: object) -> str:
    return "" if value == "" else _WEB_CONFIG_FILE(value)


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
class DaemonConfig:
    """`[daemon]`. Durations are seconds, here and in every record."""

    resync_interval: float = field(default=30.0, metadata=read_by(duration_between(1, DAY)))
    command_deadline: float = field(default=10.0, metadata=read_by(duration_between(1, 600)))
    dry_run: bool = field(default=False, metadata=read_by(parse_boolean))
    lock_memory: bool = field(default=True, metadata=read_by(parse_boolean))
    state_dir: str = field(default="/var/lib/duende-ublkd", metadata=read_by(absolute_path("/var/lib/duende-ublkd")))


@dataclass(frozen=True, slots=True)
class Recovery:
    """`recover`: the command that brings a server back, and how often to try.

    `command`: a program and its arguments, for `fill`. `backoff` doubles with each attempt. Served for `stable`: earlier
    attempts are forgotten. `user`: a name or a number; None: as the daemon itself.
    """

    command: tuple[str, ...] = field(metadata=read_by(parse_command, example=COMMAND_EXAMPLE))
    timeout: float = field(default=30.0, metadata=read_by(duration_between(1, 3600)))
    attempts: int = field(default=3, metadata=read_by(integer_between(1, 100)))
    backoff: float = field(default=1.0, metadata=read_by(duration_between(0, 3600)))
    stable: float = field(default=300.0, metadata=read_by(duration_between(1, DAY)))
    user: str | None = field(default=None, metadata=read_by(parse_user))


@dataclass(frozen=True, slots=True)
class Policy:
    """`[policy]`, and what a `[[device]]` overrides of it. In a Config, `recover` is there for RECOVER, and only then."""

    orphaned: OnOrphan = field(default=OnOrphan.DELETE, metadata=read_by(choice_of(OnOrphan)))
    orphan_grace: float = field(default=0.5, metadata=read_by(duration_between(0, YEAR)))
    setup_grace: float = field(default=60.0, metadata=read_by(duration_between(0, YEAR)))
    unserved: OnUnserved = field(default=OnUnserved.ALERT, metadata=read_by(choice_of(OnUnserved)))
    recovery_deadline: float = field(default=60.0, metadata=read_by(duration_between(0, YEAR)))
    recover: Recovery | None = field(default=None, metadata=read_by(Recovery))


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """`[http]`. `listen` None: no HTTP over TCP. `web_config_file` "": everybody may look."""

    listen: Address | None = field(default=Address(), metadata=read_by(parse_listen))
    web_config_file: str = field(default="", metadata=read_by(_web_config_file))


@dataclass(frozen=True, slots=True)
class JournalConfig:
    """`[journal]`. `max_size` in bytes."""

    keep: float = field(default=90 * DAY, metadata=read_by(duration_between(3600, 10 * YEAR)))
    max_size: int = field(default=64 * MIB, metadata=read_by(size_between(MIB, 10 * GIB)))


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

    ids: tuple[range, ...] | None = field(default=None, metadata=read_by(_ids))
    server: str | None = field(default=None, metadata=read_by(_server))
    unit: str | None = field(default=None, metadata=read_by(_unit))
    owner_uid: int | None = field(default=None, metadata=read_by(_uid))
    flags: FlagMatch | None = field(default=None, metadata=read_by(_flags))

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
    alerts: tuple[SinkConfig, ...] = ()
    web: WebConfig | None = None  # what http.web_config_file asks for, once that is read
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
_SINKS_EXAMPLE = f'add sink = "{SinkKind.MAIL.value}"; there are {", ".join(sink.value for sink in SinkKind)}'
_EXAMPLES = {"match": '{ ids = "0-15" }', "recover": _RECOVER_EXAMPLE}


def load(text: bytes, name: str, *, check: Callable[[Recovery | SinkConfig], None] | None = None) -> Config:
    """Read a configuration. `name` is the file's, for messages and sources.

    `check`: what this module cannot tell of a command; it raises WrongValueError, `part` being the index of one of the
    command's, or another key of its table.
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
    reads = printable(lines[line - 1].strip() if line <= len(lines) else "")
    hint = f"the line is: {reads}"
    if message.startswith("Cannot "):  # declare twice, overwrite, mutate, redefine
        what, hint = _what_stands_twice([each.strip() for each in lines], reads)
    elif message.startswith("Duplicate "):
        hint = f"remove one of them; {hint}"
    elif message.startswith(("Invalid ", "Expected newline")):
        hint += ' -- texts and durations stand in quotes: orphan_grace = "500ms"'
    return InvalidConfigError(Problem(file, line, "", printable(what), hint))


def _what_stands_twice(lines: Sequence[str], reads: str) -> tuple[str, str]:
    """What is wrong with a line that sets anew what lines before it have set, and what to do about it."""
    table = reads.partition("]")[0].strip("[ ")
    one, many = f"[{table}]", f"[[{table}]]"
    if reads.startswith("["):
        is_one = not reads.startswith("[[")
        other = many if is_one else one
        if any(line.startswith(other) for line in lines):
            return f"{one} and {many} cannot both be there", f"write the same brackets everywhere: {one} or {many}"
        if is_one and sum(line.startswith(one) for line in lines) > 1:
            return f"{one} stands twice", f"write its keys under the first {one}"
    key, sign, _ = reads.partition("=")
    if sign and "." not in key and not reads.startswith("["):
        return f"{key.strip()} stands twice", f"remove one of them; the line is: {reads}"
    return "it sets anew what an earlier line has set", f"remove one of them; the line is: {reads}"


def _are_tables(value: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


class _Reader:
    """One reading of one file: what tomllib made of it goes in, records and problems come out."""

    def __init__(self, source: str, file: str, check: Callable[[Recovery | SinkConfig], None] | None) -> None:
        self.file = file
        self._check = check
        self.problems: list[Problem] = []
        self._lines = key_lines(source)

    def document(self, data: dict[str, Any]) -> Config:
        found = self._table((), data, {**SECTIONS, "device": self._overrides, "alert": self._sinks})
        policy = found.pop("policy", Policy())
        rules = [
            DeviceRule(keys.pop("match", Match()), _settled(replace(policy, **keys)), self._source(("device", index)))
            for index, keys in enumerate(found.pop("device", ()))
        ]
        self._refuse_idle_recovery(data.get("policy", {}), data.get("device", []))
        if not self.problems:  # a match that could not be read would look like one that matches everything
            self._refuse_unreachable(rules)
        http = found.get("http", HttpConfig())
        if http and http.listen is None and http.web_config_file:
            what = 'does nothing: listen = "" switches HTTP off'
            self._wrong(("http", "web_config_file"), what, "remove one of them")
        alerts = found.pop("alert", [])
        self._refuse_same_names(alerts)
        if "policy" in data:
            found["policy_source"] = self._source(("policy",))
        return Config(**found, policy=_settled(policy), devices=tuple(rules), alerts=tuple(filter(None, alerts)))

    def _section(self, path: KeyPath, record: type[_T], value: object) -> _T | None:
        """Read a table into its record. None: a key that has to be there is wrong, which was told."""
        required = required_keys(record)
        found = self._table(path, value, schema(record), required)
        if not required.keys() <= found.keys():
            return None
        made = record(**found)
        if isinstance(made, Recovery):
            self._check_rule(path, made)
        return made

    def _check_rule(self, path: KeyPath, rule: Recovery | SinkConfig) -> None:
        try:
            if self._check:
                self._check(rule)
        except WrongValueError as error:
            where = (error.part,) if isinstance(error.part, str) else ("command", error.part or 0)
            self._wrong((*path, *where), str(error), error.hint)

    def _overrides(self, value: object) -> list[dict[str, Any]]:
        """Read what each `[[device]]` gives; the policy that it overrides may stand below it."""
        if not _are_tables(value):
            raise WrongValueError(f"must be tables of the form [[device]], not {shown(value)}", hint="write [[device]]")
        found = []
        for index, entry in enumerate(value):
            path = ("device", index)
            found.append(self._table(path, entry, {"match": Match, **schema(Policy)}))
        return found

    def _sinks(self, value: object) -> list[SinkConfig | None]:
        """Read each `[[alert]]`. None: one with a mistake, which was told."""
        if not _are_tables(value):
            raise WrongValueError(f"must be tables of the form [[alert]], not {shown(value)}", hint="write [[alert]]")
        if len(value) > MOST_SINKS:
            raise WrongValueError(f"has {len(value)} tables, more than {MOST_SINKS}", hint="remove some of them")
        return [self._sink(("alert", index), entry) for index, entry in enumerate(value)]

    def _sink(self, path: KeyPath, table: dict[str, Any]) -> SinkConfig | None:
        before = len(self.problems)
        word = table.get("sink")
        sink = SinkKind(word) if word in [each.value for each in SinkKind] else None
        if "sink" not in table:
            self._wrong(path, "has no sink", _SINKS_EXAMPLE)
        own, required = table, {}
        if sink:
            foreign = alertconfig.foreign_keys(sink)
            for key in table.keys() & foreign.keys():
                self._wrong((*path, key), *foreign[key])
            own = {key: value for key, value in table.items() if key not in foreign}
            required = alertconfig.missing_keys(sink, table)
        found = self._table(path, own, alertconfig.keys_of(sink), required)
        if len(self.problems) > before:  # what was left out would look like what is not there
            return None
        made = alertconfig.make_sink(found, self._source(path))
        for key, what, hint in alertconfig.faults(made, table):
            self._wrong((*path, key), what, hint)
        if made.command:
            self._check_rule(path, made)
        return made

    def _refuse_same_names(self, alerts: Sequence[SinkConfig | None]) -> None:
        known: dict[str, SinkConfig] = {}
        taken = [sink.name for sink in alerts if sink]
        for index, sink in enumerate(alerts):
            if sink and sink.name in known:
                what = f'has the name "{sink.name}", as {known[sink.name].source} has'
                self._wrong(("alert", index), what, f'add name = "{_another(sink.name, taken)}"')
            elif sink:
                known[sink.name] = sink

    def _table(
        self,
        path: KeyPath,
        value: object,
        parsers: Mapping[str, Parser],
        required: Mapping[str, str] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Read one table, and go on after a mistake. `required`: keys that have to be there, each with an example."""
        if not isinstance(value, dict):
            hint = f"write [{path[-1]}]" if len(path) == 1 else f"write it as {_EXAMPLES[str(path[-1])]}"
            raise WrongValueError(f"must be one table, not {shown(value)}", hint=hint)
        found = {}
        for key in required.keys() - value.keys():
            self._wrong(path, f"has no {key}", f"add {key} = {required[key]}")
        for key, entry in value.items():
            here = (*path, key)
            if key not in parsers:
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

    def _wrong(self, path: KeyPath, what: str, hint: str) -> None:
        self.problems.append(Problem(self.file, self._line(path), _path_text(path), what, hint))

    def _source(self, path: KeyPath) -> str:
        return f"{_path_text(path)} ({self.file}:{self._line(path)})"

    def _line(self, path: KeyPath) -> int:
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


def _another(name: str, taken: Sequence[str]) -> str:
    """A name like this one that nobody has."""
    return next(new for new in (f"{name[:60]}-{number}" for number in range(2, MOST_SINKS + 3)) if new not in taken)


def _where_to(key: str, known: Sequence[str]) -> str:
    home = next((home for home, record in _HOMES.items() if key in schema(record)), None)
    home = home or ("[[alert]]" if key in alertconfig.keys_of(None) else None)
    return f"it belongs to {home}" if home else did_you_mean(key, known)


def _path_text(path: KeyPath) -> str:
    """`device[0].match.ids`, with whatever is no plain key in quotes."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            plain = re.fullmatch("[A-Za-z0-9_-]{1,60}", part)
            text += ("." if text else "") + (part if plain else shown(part))
    return text
