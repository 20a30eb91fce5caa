"""The configuration: what is accepted, how mistakes are told, and which policy a device gets."""

from __future__ import annotations

import errno
import re
import tomllib
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from duende_ublkd.core.alertconfig import SinkConfig, SinkKind, keys_of, usual_rate
from duende_ublkd.core.alerting import AlertKind
from duende_ublkd.core.config import (
    MAX_BYTES,
    SECTIONS,
    Address,
    Config,
    DaemonConfig,
    DeviceFacts,
    DeviceRule,
    FlagMatch,
    InvalidConfigError,
    JournalConfig,
    Match,
    OnOrphan,
    OnUnserved,
    Policy,
    Problem,
    Recovery,
    UnfilledError,
    WrongValueError,
    duration_text,
    fill,
    load,
    parse_duration,
    unreadable,
)
from duende_ublkd.core.errors import ConfigError, DuendeError, ExitCode
from duende_ublkd.core.keylines import key_lines
from duende_ublkd.core.model import Feature
from duende_ublkd.core.values import MOST_CHARACTERS, MOST_PARTS, PLACEHOLDERS, parse_size, schema, size_text

ANNOTATED = Path(__file__).parent.parent / "config" / "duende-ublkd.toml"
COMMAND = ("ublk", "recover", "-n", "{id}")
RECOVER = 'recover = { command = ["ublk", "recover", "-n", "{id}"] }'


def a_config(text: str) -> Config:
    return load(text.encode(), "duende.toml")


def problems_of(text: str | bytes, name: str = "duende.toml") -> tuple[Problem, ...]:
    with pytest.raises(InvalidConfigError) as caught:
        load(text.encode() if isinstance(text, str) else text, name)
    assert caught.value.exit_code is ExitCode.USAGE
    assert all(problem.hint for problem in caught.value.problems)
    return caught.value.problems


def the_problem(text: str | bytes, name: str = "duende.toml") -> tuple[str, str]:
    """The one mistake of a file, as a person reads it, and the hint."""
    (problem,) = problems_of(text, name)
    return str(problem), problem.hint


def facts(dev_id: int = 3, **changes: str | int | None) -> DeviceFacts:
    known: dict[str, Any] = {"comm": "ublk", "exe": "/usr/bin/ublk", "unit": "", "owner_uid": 0, "server_known": True}
    return DeviceFacts(dev_id, **(known | changes))


# --- what is accepted


def test_an_empty_file_means_the_defaults() -> None:
    assert load(b"", "duende.toml") == Config()


def test_the_annotated_file_changes_nothing() -> None:
    assert load(ANNOTATED.read_bytes(), ANNOTATED.name) == Config()


def test_the_annotated_file_shows_every_key() -> None:
    data, examples = tomllib.loads(ANNOTATED.read_text()), tomllib.loads(with_examples())
    assert set(data) == set(SECTIONS)
    for name, record in SECTIONS.items():
        without_default = {key for key, parse in schema(record).items() if isinstance(parse, type)}
        assert set(data[name]) == set(schema(record)) - without_default
        assert set(examples[name]) == set(schema(record))
    assert set(examples["policy"]["recover"]) == set(schema(Recovery))
    assert {key for table in examples["device"] for key in table.get("match", {})} == set(schema(Match))
    assert {key for table in examples["alert"] for key in table} == set(keys_of(None))
    assert {table["sink"] for table in examples["alert"]} == {sink.value for sink in SinkKind}


def test_the_annotated_alerts_load_and_show_the_defaults() -> None:
    shown = {sink.sink: sink for sink in a_config(with_examples()).alerts}
    webhook, alertmanager, mail = (shown[kind] for kind in (SinkKind.WEBHOOK, SinkKind.ALERTMANAGER, SinkKind.MAIL))
    usual = SinkConfig(SinkKind.WEBHOOK, "webhook", rate_limit=usual_rate(SinkKind.WEBHOOK))
    for key in ("name", "severity", "timeout", "rate_limit", "reminder"):
        assert getattr(webhook, key) == getattr(usual, key)
    assert alertmanager.resend == usual.resend
    assert mail.tls is usual.tls


def test_every_kind_of_alert_stands_in_the_annotated_file_with_its_severity() -> None:
    (text,) = re.findall(r"There are: (.*?)\.\n", ANNOTATED.read_text().replace("\n# ", " "), flags=re.DOTALL)
    told = {
        name: severity
        for names, severity in re.findall(r"([a-z, -]+) \((\w+)\)", text)
        for name in re.findall("[a-z-]+", names)
    }
    kinds = {kind.value: kind.severity.value for kind in AlertKind if kind is not AlertKind.TEST}
    assert told == kinds


def with_examples() -> str:
    """The annotated file with every example in force."""
    return re.sub(r"^#(?=[\[\w])", "", ANNOTATED.read_text(), flags=re.MULTILINE)


def test_the_annotated_examples_of_devices_load_and_show_every_matcher() -> None:
    first, heir, other = a_config(with_examples()).devices
    assert all(getattr(first.match, matcher.name) is not None for matcher in fields(Match))
    assert first.policy == Policy(orphaned=OnOrphan.ALERT, orphan_grace=10.0)
    assert heir.policy == Policy(unserved=OnUnserved.RECOVER, recover=Recovery(COMMAND, user="nobody"))
    assert other.policy.recover is not None
    assert other.policy.recover.command[:2] == ("systemctl", "restart")


def test_the_annotated_recovery_shows_the_defaults() -> None:
    shown = tomllib.loads(with_examples())["policy"]["recover"]
    for entry in fields(Recovery):
        if entry.default is not MISSING and entry.default is not None:
            assert entry.metadata["parse"](shown[entry.name]) == entry.default


def test_every_key_reaches_its_record() -> None:
    config = a_config("""
        [daemon]
        resync_interval = "1m30s"
        command_deadline = "2s"
        dry_run = true
        [policy]
        orphaned = "ignore"
        orphan_grace = "0s"
        setup_grace = "1d"
        unserved = "delete"
        recovery_deadline = "2h"
        [http]
        listen = "[::1]:80"
        [journal]
        keep = "1h"
        max_size = "1536KiB"
    """)
    assert config.daemon == DaemonConfig(resync_interval=90.0, command_deadline=2.0, dry_run=True)
    assert config.policy == Policy(
        orphaned=OnOrphan.IGNORE,
        orphan_grace=0.0,
        setup_grace=86400.0,
        unserved=OnUnserved.DELETE,
        recovery_deadline=7200.0,
    )
    assert config.journal == JournalConfig(keep=3600.0, max_size=1536 * 1024)
    assert config.http.listen == Address("::1", 80)
    assert str(config.http.listen) == "[::1]:80"


def test_an_empty_listen_switches_http_off() -> None:
    assert a_config('http.listen = ""').http.listen is None


def test_a_device_table_overrides_policy_even_above_it() -> None:
    config = a_config('[[device]]\norphan_grace = "2s"\n[policy]\nsetup_grace = "5s"\n')
    assert config.devices[0].policy == Policy(orphan_grace=2.0, setup_grace=5.0)


def test_two_files_that_ask_for_the_same_are_equal_wherever_their_lines_stand() -> None:
    assert a_config('[[device]]\nmatch.ids = "1"') == a_config('\n\n[[device]]\n\nmatch = { ids = "1" }')


def test_a_byte_order_mark_and_crlf_change_nothing() -> None:
    text = b'\xef\xbb\xbf[daemon]\r\ndry_run = true\r\n[http]\r\nlisten = "x"\r\n'
    assert the_problem(text)[0].startswith("duende.toml:4: http.listen: ")
    assert load(text.replace(b'"x"', b'""'), "x").daemon.dry_run


# --- durations


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("1s", 1), ("60s", 60), ("10m", 600), ("5ms", 0.005), ("2h", 7200), ("1d", 86400), ("1m30s", 90)],
)
def test_a_duration_is_a_number_with_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@given(st.integers(0, 400 * 86_400_000))
def test_a_duration_survives_being_written_and_read(milliseconds: int) -> None:
    assert parse_duration(duration_text(milliseconds / 1000)) == milliseconds / 1000


@given(st.text(max_size=12) | st.from_regex("-?[0-9]{1,4}([.][0-9])?[a-z]{0,3}", fullmatch=True))
def test_any_text_is_a_duration_or_gets_a_hint(text: str) -> None:
    try:
        assert parse_duration(text) >= 0
    except WrongValueError as error:
        what, hint = str(error), error.hint
        assert what.isprintable()
        assert hint.isprintable()


@pytest.mark.parametrize(
    ("value", "what", "hint"),
    [
        ("30", "30 has no unit", 'did you mean "30s"?'),
        ('"30"', '"30" has no unit', 'did you mean "30s"?'),
        ("-5", "-5 is negative", "write it as"),
        ('"-5s"', '"-5s" is negative', "write it as"),
        ("1.5", "1.5 is not a duration", "whole numbers"),
        ("nan", "nan is not a duration", "whole numbers"),
        ('"1.5s"', '"1.5s" is not a duration', "whole numbers"),
        ('"30s1m"', '"30s1m" is not a duration', "largest unit first"),
        ('"30 s"', '"30 s" is not a duration', "write it as"),
        ('""', '"" is not a duration', "write it as"),
        ('"5min"', '"5min" has the unknown unit "min"', "the units are ms, s, m, h, d"),
        ("true", "must be a text in quotes, not true", 'write it as "30s"'),
        ("[]", "must be a text in quotes, not an array", 'write it as "30s"'),
        ('"999ms"', '"999ms" is not between 1s and 1d', 'the nearest is "1s"'),
        ('"2d"', '"2d" is not between 1s and 1d', 'the nearest is "1d"'),
    ],
)
def test_a_wrong_duration_is_explained(value: str, what: str, hint: str) -> None:
    message, told = the_problem(f"[daemon]\n\nresync_interval = {value}\n")
    assert message == f"duende.toml:3: daemon.resync_interval: {what}"
    assert hint in told


@pytest.mark.parametrize(
    ("line", "bounds"),
    [
        ('daemon.command_deadline = "11m"', "1s and 10m"),
        ('daemon.command_deadline = "0s"', "1s and 10m"),
        ('policy.orphan_grace = "366d"', "0s and 365d"),
        ('policy.setup_grace = "999999999999d"', "0s and 365d"),
        ('journal.keep = "59m"', "1h and 3650d"),
        ('journal.keep = "3651d"', "1h and 3650d"),
    ],
)
def test_every_duration_has_bounds(line: str, bounds: str) -> None:
    assert the_problem(line)[0].endswith(f"is not between {bounds}")


# --- sizes


@pytest.mark.parametrize(
    ("text", "size"), [("512KiB", 512 << 10), ("64MiB", 64 << 20), ("10GiB", 10 << 30), ("1536KiB", 1536 << 10)]
)
def test_a_size_is_a_number_with_a_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.integers(0, 1 << 30))
def test_a_size_survives_being_written_and_read(kibibytes: int) -> None:
    assert parse_size(size_text(kibibytes << 10)) == kibibytes << 10


@given(st.text(max_size=12) | st.from_regex("-?[0-9]{1,4} ?[KMGTkmgt]?i?[Bb]?", fullmatch=True))
def test_any_text_is_a_size_or_gets_a_hint(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except WrongValueError as error:
        what, hint = str(error), error.hint
        assert what.isprintable()
        assert hint.isprintable()


@pytest.mark.parametrize(
    ("value", "what", "hint"),
    [
        ("64", "64 has no unit", 'did you mean "64MiB"?'),
        ('"64"', '"64" has no unit', 'did you mean "64MiB"?'),
        ("67108864", "67108864 is not a size", 'write it as "512KiB", "64MiB" or "1GiB"'),
        ('"64MB"', '"64MB" has the unknown unit "MB"', 'did you mean "64MiB"?'),
        ('"64M"', '"64M" has the unknown unit "M"', 'did you mean "64MiB"?'),
        ('"1gib"', '"1gib" has the unknown unit "gib"', 'did you mean "1GiB"?'),
        ('"64 MiB"', '"64 MiB" has the unknown unit "MiB"', 'did you mean "64MiB"?'),
        ('"1TiB"', '"1TiB" has the unknown unit "TiB"', "the units are KiB, MiB, GiB"),
        ("-1", "-1 is negative", "write it as"),
        ('"-1MiB"', '"-1MiB" is negative', "write it as"),
        ("1.5", "1.5 is not a size", "a whole number with one unit"),
        ('"1GiB512MiB"', '"1GiB512MiB" is not a size', "a whole number with one unit"),
        ('""', '"" is not a size', "write it as"),
        ("true", "must be a text in quotes, not true", 'write it as "64MiB"'),
        ('"1023KiB"', '"1023KiB" is not between 1MiB and 10GiB', 'the nearest is "1MiB"'),
        ('"11GiB"', '"11GiB" is not between 1MiB and 10GiB', 'the nearest is "10GiB"'),
    ],
)
def test_a_wrong_size_is_explained(value: str, what: str, hint: str) -> None:
    message, told = the_problem(f"[journal]\n\nmax_size = {value}\n")
    assert message == f"duende.toml:3: journal.max_size: {what}"
    assert hint in told


# --- the recovery command


def recovering(**keys: str) -> str:
    """A `[policy]` that recovers; its lines after the third are these keys, but for the command, which is the third."""
    lines = {"command": '["ublk"]', **keys}
    return 'policy.unserved = "recover"\n\n' + "".join(f"policy.recover.{k} = {v}\n" for k, v in lines.items())


def test_every_key_of_a_recovery_reaches_its_record() -> None:
    """In one line or as a table of its own."""
    keys = {
        "command": '["/usr/bin/x", "{{{server}}}"]',
        "timeout": '"2m"',
        "attempts": "100",
        "backoff": '"0s"',
        "stable": '"1d"',
        "user": '"1000"',
    }
    wanted = Recovery(("/usr/bin/x", "{{{server}}}"), 120.0, 100, 0.0, 86400.0, "1000")
    inline = f"recover = {{ {', '.join(f'{key} = {value}' for key, value in keys.items())} }}"
    table = "\n".join(f"{key} = {value}" for key, value in keys.items())
    for text in (f"{inline}", f"[policy.recover]\n{table}"):
        assert a_config(f'[policy]\nunserved = "recover"\n{text}').policy.recover == wanted
    for text in (f"{inline}", f"[device.recover]\n{table}"):
        assert a_config(f'[[device]]\nunserved = "recover"\n{text}').devices[0].policy.recover == wanted


def test_a_recovery_needs_no_more_than_a_command() -> None:
    policy = a_config(f'[policy]\nunserved = "recover"\n{RECOVER}').policy
    assert policy == Policy(unserved=OnUnserved.RECOVER, recover=Recovery(COMMAND))
    assert Recovery(COMMAND) == Recovery(COMMAND, 30.0, 3, 1.0, 300.0, None)


LONG = "x" * (MOST_CHARACTERS + 1)


@pytest.mark.parametrize(
    ("key", "value", "what", "hint"),
    [
        ("command", '"ublk recover"', ': must be an array of texts, not "ublk recover"', 'write it as ["ublk", "rec'),
        ("command", "[]", ": is empty", 'write it as ["ublk", "recover", "-n", "{id}"]'),
        ("command", '["ublk", "-n", 3]', "[2]: must be a text in quotes, not 3", 'write "3"'),
        ("command", '["ublk", []]', "[1]: must be a text in quotes, not an array", "write the whole as ["),
        ("command", f"{['x'] * (MOST_PARTS + 1)}", ": has 65 parts, more than 64", "into a script"),
        ("command", f'["x", "{LONG}"]', "[1]: has 4097 characters, more than 4096", "into a script"),
        ("command", '["x", "a\\u0000b"]', r'[1]: "a\x00b" holds a NUL, and no argument can', "remove it"),
        ("command", '["x", "{idd}"]', '[1]: "{idd}" has the unknown placeholder "{idd}"', 'did you mean "{id}"?'),
        ("command", '["x", "{Block-Device}"]', "unknown placeholder", 'did you mean "{block_device}"?'),
        ("command", '["x", "{}"]', 'unknown placeholder "{}"', 'did you mean "{id}"?'),
        ("command", '["x", "{q}w"]', 'the unknown placeholder "{q}"', "possible here: {id}, {block_device}, {char_"),
        ("command", '["x", "{id!r}"]', 'unknown placeholder "{id!r}"', 'did you mean "{id}"?'),
        ("command", '["x", "a}b"]', '[1]: "a}b" has a "}" that stands alone', 'write "}}"'),
        ("command", '["x", "{id"]', '[1]: "{id" has a "{" that stands alone', 'write "{{"'),
        ("command", '["x", "{{id}"]', 'has a "}" that stands alone', 'write "}}"'),
        ("command", '["", "x"]', '[0]: "" is not the name of a program', 'write it as "ublk" or "/usr/bin/ublk"'),
        ("command", '["/usr/bin/"]', '"/usr/bin/" is not the name of a program', 'write it as "ublk"'),
        ("command", '["./ublk"]', '"./ublk" is a relative path', '"/usr/local/bin/ublk", or the bare name, "ublk"'),
        ("command", '["bin/ublk"]', '"bin/ublk" is a relative path', 'the bare name, "ublk"'),
        ("command", '["ublk recover"]', '"ublk recover" is more than the name', 'own: ["ublk", "recover"]'),
        ("command", '["{id}", "x"]', '[0]: "{id}" has a placeholder in the name of the program', "arguments"),
        ("command", '["/opt/{id}"]', '"/opt/{id}" has a placeholder in the name of the program', "arguments"),
        ("timeout", '"999ms"', ': "999ms" is not between 1s and 1h', 'the nearest is "1s"'),
        ("timeout", '"61m"', ': "61m" is not between 1s and 1h', 'the nearest is "1h"'),
        ("backoff", '"61m"', ': "61m" is not between 0s and 1h', 'the nearest is "1h"'),
        ("stable", '"0s"', ': "0s" is not between 1s and 1d', 'the nearest is "1s"'),
        ("stable", '"25h"', ': "25h" is not between 1s and 1d', 'the nearest is "1d"'),
        ("attempts", "0", ": 0 is not between 1 and 100", "the nearest is 1"),
        ("attempts", "101", ": 101 is not between 1 and 100", "the nearest is 100"),
        ("attempts", "true", ": must be a whole number, not true", "from 1 to 100, without quotes"),
        ("attempts", '"3"', ': must be a whole number, not "3"', "from 1 to 100, without quotes"),
        ("attempts", "3.0", ": must be a whole number, not 3.0", "from 1 to 100"),
        ("user", "65534", ": must be a text in quotes, not 65534", 'write it as "65534"'),
        ("user", "true", ": must be a text in quotes, not true", 'write it as "nobody"'),
        ("user", '""', ': "" is not the name of a user', 'write it as "nobody" or "65534"'),
        ("user", '"nobody:nogroup"', '"nobody:nogroup" is not the name of a user', '"nobody"'),
        ("user", '"-1"', '"-1" is not the name of a user', '"nobody"'),
        ("user", '"a\\u0000"', r'"a\x00" is not the name of a user', '"nobody"'),
        ("user", '"4294967295"', ': "4294967295" is no user\'s number', "id -u"),
        ("user", f'"{"9" * 5000}"', "is no user's number", "id -u"),
        ("cmd", "[]", ": unknown key", 'did you mean "command"?'),
        ("owner_uid", "0", ": unknown key", "it belongs to match = {"),
    ],
)
def test_a_wrong_recovery_is_explained(key: str, value: str, what: str, hint: str) -> None:
    message, told = the_problem(recovering(**{key: value}))
    line = 3 if key == "command" else 4
    assert message.startswith(f"duende.toml:{line}: policy.recover.{key}")
    assert what in message
    assert hint in told


def test_one_attempt_is_enough_to_ask_for() -> None:
    recover = a_config(recovering(attempts="1")).policy.recover
    assert recover == Recovery(("ublk",), attempts=1)


def test_the_line_of_a_wrong_part_is_its_own() -> None:
    text = '[[device]]\nunserved = "recover"\n[device.recover]\ncommand = [\n  "x",\n  "{server}",\n  "{sever}",\n]\n'
    assert the_problem(text)[0].startswith("duende.toml:7: device[0].recover.command[2]: ")


def test_a_command_of_the_greatest_size_is_right() -> None:
    command = ["/srv/a b/x", "y" * MOST_CHARACTERS, *["{id}"] * (MOST_PARTS - 3), ""]
    recover = a_config(recovering(command=f"{command}")).policy.recover
    assert recover is not None
    assert recover.command == tuple(command)


@pytest.mark.parametrize("name", ["nobody", "_x", "svc$", "a.b", r"DOM\\\\user", "émile", "0", "4294967294"])
def test_a_user_is_a_name_or_a_number(name: str) -> None:
    assert a_config(recovering(user=f'"{name}"')).policy.recover is not None


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("{ timeout = '1s' }", "3: policy.recover: has no command", f"add command = {list(COMMAND)}".replace("'", '"')),
        ("3", "3: policy.recover: must be one table, not 3", 'write it as { command = ["ublk", "recover", "-n", "{id}'),
        ("['ublk']", "3: policy.recover: must be one table, not an array", "write it as { command = ["),
    ],
)
def test_a_recovery_that_is_no_table_with_a_command_is_explained(text: str, message: str, hint: str) -> None:
    told = the_problem(f'[policy]\nunserved = "recover"\nrecover = {text}')
    assert told[0] == f"duende.toml:{message}"
    assert hint in told[1]


def test_every_mistake_of_a_recovery_is_told_at_once() -> None:
    text = "[policy]\nunserved = 'recover'\n[policy.recover]\ncommand = 1\nattempts = 0\nuser = ''\nx = 1\n"
    assert [problem.line for problem in problems_of(text)] == [4, 5, 6, 7]


# --- a recovery and who uses it

NO_COMMAND = '"recover", and there is no command to run'
IDLE = "does nothing: "


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[policy]\nunserved='recover'", f"2: policy.unserved: {NO_COMMAND}", "to [policy]"),
        ("[[device]]\nunserved='recover'", f"2: device[0].unserved: {NO_COMMAND}", "here or to [policy]"),
        (
            f"[[device]]\nunserved='recover'\n[[device]]\nunserved='recover'\n{RECOVER}",
            f"2: device[0].unserved: {NO_COMMAND}",
            "here or to [policy]",
        ),
        (
            f"[policy]\nunserved='recover'\n[[device]]\n{RECOVER}",
            f"2: policy.unserved: {NO_COMMAND}",
            "to [policy]",
        ),
        (
            "[policy]\nunserved='recover'\n[[device]]\norphaned='alert'",
            f"2: policy.unserved: {NO_COMMAND}",
            "to [policy]",
        ),
        (
            f"[policy]\n{RECOVER}",
            f"2: policy.recover: {IDLE}neither [policy] nor a [[device]] without its own recover has unserved =",
            'write unserved = "recover" where it is to run',
        ),
        (
            f"[policy]\n{RECOVER}\n[[device]]\nunserved='recover'\n{RECOVER}",
            f"2: policy.recover: {IDLE}neither",
            'write unserved = "recover"',
        ),
        (
            f"[[device]]\n{RECOVER}",
            f'2: device[0].recover: {IDLE}unserved is "alert" for this table',
            'write unserved = "recover" in this [[device]], or remove it',
        ),
        (
            f"[[device]]\nunserved='delete'\n{RECOVER}",
            f'3: device[0].recover: {IDLE}unserved is "delete" for this table',
            "or remove it",
        ),
        (
            f"policy={{unserved='delete'}}\n[[device]]\n\n{RECOVER}",
            f'4: device[0].recover: {IDLE}unserved is "delete" for this table',
            "or remove it",
        ),
        (
            f"[policy]\nunserved='recover'\n{RECOVER}\n[[device]]\nunserved='alert'\n{RECOVER}",
            f'6: device[0].recover: {IDLE}unserved is "alert" for this table',
            "or remove it",
        ),
    ],
)
def test_a_recovery_without_a_user_or_a_user_without_a_recovery_is_explained(
    text: str, message: str, hint: str
) -> None:
    told = the_problem(text)
    assert told[0].startswith(f"duende.toml:{message}")
    assert hint in told[1]


@pytest.mark.parametrize(
    "text",
    [
        f"[policy]\nunserved='recover'\n{RECOVER}",
        f"[policy]\nunserved='recover'\n{RECOVER}\n[[device]]\nunserved='alert'",
        f"[policy]\nunserved='recover'\n{RECOVER}\n[[device]]\n{RECOVER}",
        f"[policy]\n{RECOVER}\n[[device]]\nunserved='recover'",
        f"[[device]]\nunserved='recover'\n[policy]\n{RECOVER}",
        f"[[device]]\nunserved='recover'\n{RECOVER}",
    ],
)
def test_a_recovery_that_somebody_uses_is_right(text: str) -> None:
    a_config(text)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (f"[policy]\nunserved = 'recovr'\n{RECOVER}", "policy.unserved"),
        (f"[policy]\nunserved = []\n[[device]]\n{RECOVER}", "policy.unserved"),
        (f"[policy]\n{RECOVER}\n[[device]]\nunserved = 'recovr'", "device[0].unserved"),
        (f"[[device]]\nunserved = 'recovr'\n{RECOVER}", "device[0].unserved"),
        (f"policy = 3\n[[device]]\n{RECOVER}", "policy"),
        (f"device = 3\n[policy]\n{RECOVER}", "device"),
        ("[policy]\nunserved = 'recover'\nrecover = {}", "policy.recover"),
    ],
)
def test_nothing_is_concluded_from_what_is_a_mistake_itself(text: str, key: str) -> None:
    (problem,) = problems_of(text)
    assert problem.key == key


def test_a_recovery_of_a_table_replaces_that_of_policy_as_a_whole() -> None:
    config = a_config("""
        [policy]
        unserved = "recover"
        recover = { command = ["a"], timeout = "5s", attempts = 9, user = "nobody" }
        [[device]]
        match.ids = "1"
        recover = { command = ["b"], stable = "1m" }
        [[device]]
        match.ids = "2"
    """)
    assert config.policy_for(facts(1)).policy.recover == Recovery(("b",), stable=60.0)
    assert config.policy_for(facts(2)).policy.recover == config.policy.recover
    assert config.policy.recover == Recovery(("a",), timeout=5.0, attempts=9, user="nobody")


def test_a_policy_has_a_recovery_only_where_it_is_run() -> None:
    """`[policy]`'s own is inherited by tables that only alert, and may be there for a table alone."""
    config = a_config(f"[policy]\n{RECOVER}\n[[device]]\nmatch.ids='1'\nunserved='recover'\n[[device]]\nmatch.ids='2'")
    assert [config.policy_for(facts(dev_id)).policy.recover for dev_id in (1, 2, 3)] == [Recovery(COMMAND), None, None]


# --- filling in

VALUES = {"id": "3", "block_device": "/dev/ublkb3", "char_device": "/dev/ublkc3", "server": "/usr/bin/ublk"}


def test_a_command_is_filled_part_by_part() -> None:
    command = ("ublk", "-n", "{id}", "{block_device}:{char_device}", "{server}", "{{id}}", "{{{id}}}", "}}{{", "")
    filled = ("ublk", "-n", "3", "/dev/ublkb3:/dev/ublkc3", "/usr/bin/ublk", "{id}", "{3}", "}{", "")
    assert fill(command, VALUES) == filled


def test_what_is_filled_in_stays_one_part_and_is_not_filled_again() -> None:
    hostile = "/opt/{id} x; rm -rf {{}} \\1 \n"
    assert fill(("x", "{server}"), {**VALUES, "server": hostile}) == ("x", hostile)


def test_a_value_that_is_not_known_is_named() -> None:
    for values in ({**VALUES, "server": None}, {"id": "3"}):
        with pytest.raises(UnfilledError, match=r"what \{server\} stands for is not known") as caught:
            fill(("x", "{id}", "{server}"), values)
        assert caught.value.placeholder == "server"
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value, DuendeError)
        assert "{server}" in caught.value.hint
        assert fill(("x", "{id}", "{{server}}"), values) == ("x", "3", "{server}"), "nobody asked for it"


PARTS = st.lists(st.sampled_from(["{", "}", "{{", "}}", *(f"{{{name}}}" for name in PLACEHOLDERS), "id", "x", "{no}"]))


@given(st.lists(PARTS.map("".join), max_size=4))
def test_every_command_that_loads_can_be_filled(parts: list[str]) -> None:
    """And in its parts no sign of a template is left but those that stand for themselves."""
    text = recovering(command=f"{['x', *parts]}")
    try:
        policy = a_config(text).policy
    except InvalidConfigError:
        return
    assert policy.recover is not None
    values = dict.fromkeys(PLACEHOLDERS, "v")
    for part, filled in zip(parts, fill(policy.recover.command, values)[1:], strict=True):
        assert filled == part.format(**values), "Python's own templates agree on this much"


# --- flags


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ('["USER_RECOVERY"]', FlagMatch(Feature.USER_RECOVERY, 0)),
        ('["ublk_f_user_recovery"]', FlagMatch(Feature.USER_RECOVERY, 0)),
        ('["!UBLK_F_Zoned", "QUIESCE", "!user_copy"]', FlagMatch(Feature.QUIESCE, Feature.ZONED | Feature.USER_COPY)),
    ],
)
def test_flags_are_read_in_every_way_that_people_write_them(names: str, wanted: FlagMatch) -> None:
    (rule,) = a_config(f"[[device]]\nmatch.flags = {names}").devices
    assert rule.match.flags == wanted


@pytest.mark.parametrize(
    ("value", "what", "hint"),
    [
        ('"ZONED"', 'flags: must be an array of texts, not "ZONED"', '["USER_RECOVERY", "!UNPRIVILEGED_DEV"]'),
        ("[]", "flags: is empty", '["USER_RECOVERY", "!UNPRIVILEGED_DEV"]'),
        ("[8]", "flags[0]: must be a text in quotes, not 8", 'write "8"'),
        ('["user-recovry"]', 'flags[0]: "user-recovry" is no flag of a ublk device', 'did you mean "USER_RECOVERY"?'),
        ('["ZONED", "!quiesced"]', 'flags[1]: "quiesced" is no flag of a ublk device', 'did you mean "!QUIESCE"?'),
        ('["UBLK_F_SONED"]', '"UBLK_F_SONED" is no flag', 'did you mean "ZONED"?'),
        ('["q"]', '"q" is no flag of a ublk device', "possible here: SUPPORT_ZERO_COPY, "),
        ('[""]', '"" is no flag of a ublk device', "possible here: SUPPORT_ZERO_COPY, "),
        ('["ZONED", "zoned"]', 'flags[1]: "ZONED" stands here twice', "remove one"),
        ('["!ZONED", "!zoned"]', 'flags[1]: "ZONED" stands here twice', "remove one"),
        ('["ZONED", "!ZONED"]', 'flags[1]: "ZONED" is to be set and not to be set', "remove one"),
        ('["!ZONED", "ZONED"]', 'flags[1]: "ZONED" is to be set and not to be set', "remove one"),
    ],
)
def test_wrong_flags_are_explained(value: str, what: str, hint: str) -> None:
    message, told = the_problem(f"[[device]]\n\nmatch.flags = {value}")
    assert message.startswith("duende.toml:3: device[0].match.flags")
    assert what in message
    assert hint in told


# --- other wrong values


@pytest.mark.parametrize(
    ("line", "what", "hint"),
    [
        ("daemon.dry_run = 1", "must be true or false, not 1", "without quotes"),
        ('daemon.dry_run = "true"', 'must be true or false, not "true"', "without quotes"),
        ('policy.orphaned = "Delete"', '"Delete" is not one of delete, alert, ignore', 'did you mean "delete"?'),
        ('policy.orphaned = "nuke"', '"nuke" is not one of', "possible here: delete, alert, ignore"),
        ("policy.orphaned = true", "must be a text in quotes, not true", 'write it as "delete"'),
        ("policy.orphaned = 1979-05-27", "must be a text in quotes, not a date or time", 'write it as "delete"'),
        ('policy.unserved = "alrt"', '"alrt" is not one of alert, recover, delete', 'did you mean "alert"?'),
        (
            'policy.unserved = "restart"',
            '"restart" is not one of alert, recover, delete',
            "possible here: alert, recover",
        ),
        ('http.listen = "off"', '"off" is not ADDRESS:PORT', 'did you mean listen = ""?'),
        ('http.listen = "10116"', "is not ADDRESS:PORT", 'did you mean "127.0.0.1:10116"?'),
        ('http.listen = ":80"', "is not ADDRESS:PORT", 'did you mean "127.0.0.1:80"?'),
        ('http.listen = "localhost:80"', "is not ADDRESS:PORT", 'did you mean "127.0.0.1:80"?'),
        ('http.listen = "::1:80"', "is not ADDRESS:PORT", 'did you mean "[::1]:80"?'),
        ('http.listen = "[127.0.0.1]:80"', "is not ADDRESS:PORT", 'did you mean "127.0.0.1:80"?'),
        ('http.listen = "127.0.0.300:80"', '"127.0.0.300" is no IP address', '"[::1]:10116"'),
        ('http.listen = "127.0.0.1:99999"', "port 99999 is not between", 'did you mean "127.0.0.1:10116"?'),
        ('http.listen = "127.0.0.1:0"', "port 0 is not between", 'did you mean "127.0.0.1:10116"?'),
        ("http.listen = 10116", "must be a text in quotes, not 10116", '"127.0.0.1:10116"'),
        ("device = [{ match = { ids = 3 } }]", "must be a text in quotes, not 3", 'write it as "3"'),
        ("device = [{ match = { ids = true } }]", "must be a text in quotes, not true", 'write it as "3"'),
        ('device = [{ match = { ids = "" } }]', '"" is not a device number', '"0-15,20"'),
        ('device = [{ match = { ids = "1,,2" } }]', '"" is not a device number', '"0-15,20"'),
        ('device = [{ match = { ids = "15-0" } }]', '"15-0" is an empty range', 'did you mean "0-15"?'),
        ('device = [{ match = { ids = "0-1048576" } }]', "1048576 is no device number", "1048575"),
        ('device = [{ match = { server = "/usr/bin/ublk" } }]', "is not the name of a program", '"ublk"?'),
        ('device = [{ match = { server = "" } }]', "is not the name of a program", "my-server-*"),
        ('device = [{ match = { unit = "swap" } }]', "is not the full name of a unit", '"swap.service"?'),
        ('device = [{ match = { unit = "" } }]', "is not the full name of a unit", "swap-*.service"),
        ('device = [{ match = { owner_uid = "root" } }]', 'must be a user\'s number, not "root"', "id -u"),
        ("device = [{ match = { owner_uid = true } }]", "must be a user's number, not true", "id -u"),
        ("device = [{ match = { owner_uid = -1 } }]", "-1 is no user's number", "id -u"),
        ("device = [{ match = { owner_uid = 4294967295 } }]", "4294967295 is no user's number", "id -u"),
        (f"device = [{{ match = {{ owner_uid = 0x{'f' * 9000} }} }}]", "a number of that size is no user", "id -u"),
    ],
)
def test_a_wrong_value_is_explained(line: str, what: str, hint: str) -> None:
    message, told = the_problem("# two lines\n\n" + line)
    assert message.startswith("duende.toml:3: ")
    assert what in message
    assert hint in told


# --- unknown names, and what this version does not do yet


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[daemon]\nresync_intervall = 1", "2: daemon.resync_intervall: unknown key", '"resync_interval"?'),
        ("[daemon]\nDry-Run = true", "2: daemon.Dry-Run: unknown key", '"dry_run"?'),
        ("[daemon]\nqqq = 1", "2: daemon.qqq: unknown key", "resync_interval, command_deadline, dry_run"),
        ("\n[polcy]", "2: polcy: unknown section or key", 'did you mean "policy"?'),
        ("[[devices]]", "1: devices: unknown section or key", 'did you mean "device"?'),
        ("dry_run = true", "1: dry_run: unknown section or key", "it belongs to [daemon]"),
        ("[daemon]\norphan_grace = '1s'", "2: daemon.orphan_grace: unknown key", "belongs to [policy] or [[device]]"),
        ("[[device]]\n\nids = '1'", "3: device[0].ids: unknown key", "it belongs to match = {"),
        ("[[device]]\n[device.match]\nsrver = 'x'", "3: device[0].match.srver: unknown key", '"server"?'),
        ("[alert]\nsink = 'mail'", "1: alert: must be tables of the form [[alert]], not a table", "write [[alert]]"),
        ("http.url = ''", "1: http.url: unknown key", "it belongs to [[alert]]"),
        ("http = { listen = '', web_config_file = '/x' }", "1: http.web_config_file: does nothing", "remove one"),
        ("http.web_config_file = 'x'", '1: http.web_config_file: "x" is not an absolute path', "write it as"),
        ("[[device]]\nflags = ['ZONED']", "2: device[0].flags: unknown key", "it belongs to match = {"),
        ("[policy]\ncommand = ['x']", "2: policy.command: unknown key", "it belongs to recover = {"),
        ("[daemon]\nrecover = {}", "2: daemon.recover: unknown key", "it belongs to [policy] or [[device]]"),
        ("[daemon]\nmax_size = '1MiB'", "2: daemon.max_size: unknown key", "it belongs to [journal]"),
        ("daemon = 3", "1: daemon: must be one table, not 3", "write [daemon]"),
        ("[[policy]]", "1: policy: must be one table, not an array", "write [policy]"),
        ("[device]\norphaned = 'alert'", "1: device: must be tables of the form [[device]]", "write [[device]]"),
        ("device = [1]", "1: device: must be tables of the form [[device]]", "write [[device]]"),
        ("[[device]]\nmatch = 'x'", '2: device[0].match: must be one table, not "x"', "{ ids ="),
    ],
)
def test_a_wrong_name_is_explained(text: str, message: str, hint: str) -> None:
    told = the_problem(text)
    assert told[0].startswith(f"duende.toml:{message}")
    assert hint in told[1]


def test_a_table_behind_one_that_matches_everything_is_an_error() -> None:
    message, hint = the_problem('[[device]]\norphaned = "alert"\n\n[[device]]\nmatch.ids = "1"\n')
    assert message == "duende.toml:4: device[1]: never reached: device[0] (duende.toml:1) matches every device"
    assert "to the end" in hint


def test_all_mistakes_are_told_at_once_in_the_order_of_their_lines() -> None:
    text = """\
[http]
listen = 1
[daemon]
dry_run = 0
[[device]]
match = { ids = "3-1", owner_uid = "me" }
[[device]]
orphaned = "x"
unknwon = 1
"""
    with pytest.raises(ConfigError) as caught:
        a_config(text)
    assert [problem.line for problem in problems_of(text)] == [2, 4, 6, 6, 8, 9]
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert lines[1] == (
        "duende.toml:4: daemon.dry_run: must be true or false, not 0; write true or false, without quotes"
    )
    assert caught.value.hint == "correct these 6 places, then type: duende-ublkd check-config duende.toml"


def test_quotes_are_advised_for_values_alone() -> None:
    assert "quotes" in the_problem("[policy]\norphan_grace = ms")[1]
    for text in ("[policy", "dry_run", "[daemon]\n[daemon]\n", "a = 1\na = 1\n"):
        assert "quotes" not in the_problem(text)[1]


def test_one_mistake_is_its_own_sentence_and_hint() -> None:
    with pytest.raises(ConfigError) as caught:
        a_config("daemon.dry_run = 0")
    assert str(caught.value) == "duende.toml:1: daemon.dry_run: must be true or false, not 0"
    assert caught.value.hint == "write true or false, without quotes"


# --- files that are no configuration


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (b"[daemon]\nresync_interval = 30s\n", "f:2: Expected newline", "resync_interval = 30s -- texts and durations"),
        (b"[daemon]\ndry_run = true\ndry_run = true", "f:3: dry_run stands twice", "the line is: dry_run = true"),
        (b"[daemon]\n[http]\n[daemon]", "f:3: [daemon] stands twice", "write its keys under the first [daemon]"),
        (b"[http]\n[[http]]", "f:2: [http] and [[http]] cannot both be there", "[http] or [[http]]"),
        (b"[[alert]]\n[alert]\n", "f:2: [alert] and [[alert]] cannot both be there", "[alert] or [[alert]]"),
        (b"policy.recover = 1\npolicy.recover.user = 1\n", "f:2: it sets anew what", "policy.recover.user"),
        (b"policy = { setup_grace = 1, setup_grace = 2 }\n", "f:1: Duplicate inline", "remove one of them; the line"),
        (b"[daemon]\n\ndry_run", "f:3: Expected '='", "the line is: dry_run"),
        (b"[daemon]\na\x00b = 1", "f:2: Expected '='", r"the line is: a\x00b"),
        (b"[daemon]\n\na = '\xff'", "f:3: not UTF-8: byte 0xff at offset 15", "save the file as UTF-8"),
        (b"\xff\xfe[\x00d\x00", "f:1: not UTF-8: byte 0xff at offset 0", "save the file as UTF-8"),
        (b"a = " + b"9" * 5000, "f: holds a number of thousands", "remove it"),
        (b"a = " + b"[" * 5000, "f: is nested too deeply", "brackets"),
        (b"#" * (MAX_BYTES + 1), "f: larger than 64 KiB", "--config"),
    ],
)
def test_a_file_that_is_no_toml_is_explained(text: bytes, message: str, hint: str) -> None:
    told = the_problem(text, "f")
    assert told[0].startswith(message)
    assert hint in told[1]


@pytest.mark.parametrize(
    ("number", "message", "hint"),
    [
        (errno.ENOENT, "/etc/d.toml: no such file", "share/duende-ublkd/duende-ublkd.toml"),
        (errno.EACCES, "/etc/d.toml: may not be read by this user", "run as root"),
        (errno.EISDIR, "/etc/d.toml: is a directory", "--config /etc/d.toml/config.toml"),
        (errno.EIO, "/etc/d.toml: cannot be read: because", "ls -l /etc/d.toml"),
    ],
)
def test_a_file_that_cannot_be_read_is_explained(number: int, message: str, hint: str) -> None:
    error = unreadable("/etc/d.toml", OSError(number, "because"))
    assert str(error) == message
    assert hint in error.hint
    assert error.exit_code is ExitCode.USAGE


def test_hostile_names_and_values_reach_no_terminal() -> None:
    text = (
        '[daemon]\n"\\u001b[2J" = 1\n[policy]\norphaned = "\\u001b]0;\\u202e\\n"\n[http]\nlisten = "' + "x" * 999 + '"'
    )
    with pytest.raises(ConfigError) as caught:
        load(text.encode(), "evil\x1b\n\udcff")
    for line in [*str(caught.value).split("\n"), caught.value.hint]:
        assert line.isprintable()
        assert len(line) < 500
    assert str(caught.value).count("\n") == 2


# --- which policy a device gets


def rules(*tables: str, policy: str = "") -> Config:
    return a_config(f"[policy]\n{policy}\n" + "".join(f"[[device]]\n{table}\n" for table in tables))


def test_the_first_table_that_matches_gives_the_policy_and_its_line() -> None:
    config = rules('match.ids = "0-2,7"\norphaned="ignore"', 'match.ids = "2-5"\norphaned="alert"')
    chosen = config.policy_for(facts(2))
    assert chosen.policy.orphaned is OnOrphan.IGNORE
    assert chosen.source == "device[0] (duende.toml:3)"
    assert chosen.reason == "first match, by ids"
    assert config.policy_for(facts(5)).source == "device[1] (duende.toml:6)"
    assert config.policy_for(facts(7)).source == "device[0] (duende.toml:3)"


def test_what_no_table_matches_gets_the_policy_section() -> None:
    chosen = rules('match.ids = "1"').policy_for(facts(2))
    assert (chosen.source, chosen.reason) == ("policy (duende.toml:1)", "no [[device]] matches")
    assert Config().policy_for(facts()).source == "policy (built-in defaults)"
    assert Config().policy_for(facts()).reason == "there is no [[device]]"


def test_a_table_without_matchers_matches_every_device() -> None:
    for table in ("", "match = {}"):
        chosen = rules(table).policy_for(DeviceFacts(9))
        assert chosen.source.startswith("device[0]")
        assert chosen.reason == "matches every device"


@pytest.mark.parametrize(
    ("pattern", "changes", "matched"),
    [
        ("ublk", {}, True),
        ("ubl[jk]", {}, True),
        ("UBLK", {}, False),
        ("ublk.loop", {"comm": "ublk.loop"}, True),
        ("ublk", {"comm": "worker-1"}, True),
        ("ublk", {"comm": "worker-1", "exe": "/opt/ublk (deleted)"}, True),
        ("bin", {}, False),
        ("ublk", {"exe": None}, True),
        ("other", {"exe": None}, None),
        ("other", {"exe": ""}, None),
        ("other", {"comm": None}, None),
        ("ublk", {"server_known": False}, None),
        ("my-very-long-name", {"comm": "my-very-long-na", "exe": "/usr/bin/python3"}, None),
        ("my-*-name-of-old", {"comm": "my-very-long-na", "exe": "/usr/bin/python3"}, None),
        ("my-very-long-na", {"comm": "my-very-long-na", "exe": "/usr/bin/python3"}, True),
        ("your-server", {"comm": "my-very-long-na", "exe": "/usr/bin/python3"}, False),
        ("my-very-long-name", {"comm": "my-very-long", "exe": "/usr/bin/python3"}, False),
    ],
)
def test_a_server_is_matched_by_process_or_program(pattern: str, changes: dict[str, Any], *, matched: bool) -> None:
    assert Match(server=pattern).answers(facts(**changes)) == {"server": matched}


@pytest.mark.parametrize(
    ("unit", "known", "matched"),
    [
        ("swap-a.service", True, True),
        ("db.service", True, False),
        ("", True, None),
        (None, True, None),
        ("swap-a.service", False, None),
    ],
)
def test_a_unit_is_matched_by_its_whole_name(unit: str | None, *, known: bool, matched: bool | None) -> None:
    assert Match(unit="swap-*.service").answers(facts(unit=unit, server_known=known)) == {"unit": matched}


def test_an_owner_is_matched_by_number() -> None:
    said = [Match(owner_uid=0).answers(facts(owner_uid=uid))["owner_uid"] for uid in (0, 5, None)]
    assert said == [True, False, None]


@pytest.mark.parametrize(
    ("flags", "matched"),
    [
        (Feature.USER_RECOVERY, True),
        (Feature.USER_RECOVERY | Feature.ZONED, True),
        (Feature.USER_RECOVERY | Feature.UNPRIVILEGED_DEV, False),
        (Feature.ZONED, False),
        (0, False),
        (None, None),
    ],
)
def test_flags_match_when_all_are_as_they_are_wanted(flags: int | None, *, matched: bool | None) -> None:
    match = Match(flags=FlagMatch(Feature.USER_RECOVERY, Feature.UNPRIVILEGED_DEV))
    assert match.answers(facts(flags=flags)) == {"flags": matched}


def test_every_wanted_flag_has_to_be_set() -> None:
    match = Match(flags=FlagMatch(Feature.USER_RECOVERY | Feature.ZONED))
    assert match.answers(facts(flags=Feature.ZONED)) == {"flags": False}


def test_a_number_that_is_not_known_is_doubt() -> None:
    assert Match(ids=(range(4),)).answers(DeviceFacts(None)) == {"ids": None}


def test_every_matcher_of_a_table_has_to_agree() -> None:
    config = rules('match = { ids = "3", server = "ublk", owner_uid = 7 }\norphaned = "alert"')
    assert config.policy_for(facts(3, owner_uid=7)).reason == "first match, by ids, server, owner_uid"
    assert config.policy_for(facts(3)).source.startswith("policy")
    assert config.policy_for(DeviceFacts(4)).source.startswith("policy"), "ruled out by what is known"


def test_a_device_that_may_be_protected_is_not_deleted() -> None:
    """The daemon started after the death: nobody knows the server's name, and the default is to delete."""
    config = rules('match.server = "precious"\norphaned = "alert"\nsetup_grace = "5m"', policy='orphan_grace = "1s"')
    chosen = config.policy_for(DeviceFacts(3))
    assert chosen.policy == Policy(orphaned=OnOrphan.ALERT, orphan_grace=1.0, setup_grace=300.0)
    assert chosen.source == "device[0] (duende.toml:3) or policy (duende.toml:1)"
    assert chosen.reason == (
        "cannot tell whether device[0] (duende.toml:3) applies (not known: server), "
        "so each setting is the more careful one"
    )


def test_a_device_that_is_only_maybe_for_deletion_is_not_deleted() -> None:
    config = rules('match.server = "scratch"\norphaned = "delete"', policy='orphaned = "alert"')
    assert config.policy_for(DeviceFacts(3)).policy.orphaned is OnOrphan.ALERT
    assert config.policy_for(facts(comm="scratch")).policy.orphaned is OnOrphan.DELETE


def test_where_tables_differ_somebody_is_told() -> None:
    config = rules('match.server = "x"\norphaned = "ignore"')
    assert config.policy_for(DeviceFacts(3)).policy.orphaned is OnOrphan.ALERT


def test_where_tables_differ_on_what_is_unserved_somebody_is_told() -> None:
    config = rules('match.server = "x"\nunserved = "delete"')
    assert config.policy_for(DeviceFacts(3)).policy.unserved is OnUnserved.ALERT
    assert config.policy_for(facts(comm="x")).policy.unserved is OnUnserved.DELETE


def test_what_all_tables_that_may_apply_do_is_done() -> None:
    config = rules('match.server = "x"\nrecovery_deadline = "5m"', policy=f'unserved = "recover"\n{RECOVER}')
    policy = Policy(unserved=OnUnserved.RECOVER, recovery_deadline=300.0, recover=Recovery(COMMAND))
    assert config.policy_for(DeviceFacts(3)).policy == policy
    config = rules('match.server = "x"', policy='unserved = "delete"')
    assert config.policy_for(DeviceFacts(3)).policy.unserved is OnUnserved.DELETE


def test_where_tables_run_different_commands_none_is_run() -> None:
    other = 'match.server = "x"\nrecover = { command = ["ublk", "recover", "-n", "{id}"], user = "nobody" }'
    config = rules(other, policy=f'unserved = "recover"\n{RECOVER}')
    assert config.policy_for(DeviceFacts(3)).policy == Policy()
    assert config.policy_for(facts()).policy.recover == Recovery(COMMAND)


def test_a_doubt_about_a_table_behind_the_first_match_does_not_matter() -> None:
    config = rules('match.ids = "3"', 'match.server = "x"\norphaned = "alert"')
    assert config.policy_for(DeviceFacts(3)).policy.orphaned is OnOrphan.DELETE


NAMES = st.sampled_from(["ublk", "nbd", "my-very-long-na", "my-very-long-name", "my-*", "*"])
MATCHES = st.builds(
    Match,
    ids=st.none() | st.just((range(2),)),
    server=st.none() | NAMES,
    unit=st.none() | st.sampled_from(["a.service", "*.scope"]),
    owner_uid=st.none() | st.integers(0, 1),
    flags=st.none() | st.sampled_from([FlagMatch(8), FlagMatch(8, 32), FlagMatch(0, 8)]),
)
DEEDS = [
    (OnUnserved.ALERT, None),
    (OnUnserved.DELETE, None),
    (OnUnserved.RECOVER, Recovery(("a",))),
    (OnUnserved.RECOVER, Recovery(("b",))),
]
POLICIES = st.builds(
    lambda deed, **others: Policy(unserved=deed[0], recover=deed[1], **others),
    st.sampled_from(DEEDS),
    orphaned=st.sampled_from(OnOrphan),
    orphan_grace=st.integers(0, 9).map(float),
    setup_grace=st.integers(0, 9).map(float),
    recovery_deadline=st.integers(0, 9).map(float),
)
CONFIGS = st.builds(
    Config, policy=POLICIES, devices=st.lists(st.builds(DeviceRule, MATCHES, POLICIES), max_size=4).map(tuple)
)
WHOLE_FACTS = st.builds(
    DeviceFacts,
    dev_id=st.integers(0, 3),
    comm=st.sampled_from(["ublk", "nbd", "my-very-long-name"]),
    exe=st.sampled_from(["/bin/ublk", "/bin/python3"]),
    unit=st.sampled_from(["c.service", "a.service", "b.scope"]),
    owner_uid=st.integers(0, 2),
    server_known=st.just(True),
    flags=st.sampled_from([0, 8, 32, 40]),
)
LOSSES = ["dev_id", "comm", "exe", "unit", "owner_uid", "flags", "server", "end of comm"]


@given(CONFIGS, WHOLE_FACTS, st.sets(st.sampled_from(LOSSES)))
def test_a_missing_fact_never_makes_a_policy_less_careful(config: Config, whole: DeviceFacts, lost: set[str]) -> None:
    hidden: dict[str, Any] = dict.fromkeys(lost - {"server", "end of comm"})
    if "server" in lost:
        hidden["server_known"] = False
    if "end of comm" in lost and "comm" not in lost:
        hidden["comm"] = str(whole.comm)[:15]
    with_less, with_all = config.policy_for(replace(whole, **hidden)).policy, config.policy_for(whole).policy
    if with_less.orphaned is OnOrphan.DELETE:
        assert with_all.orphaned is OnOrphan.DELETE
    if with_less.unserved is not OnUnserved.ALERT:
        assert (with_less.unserved, with_less.recover) == (with_all.unserved, with_all.recover)
    assert (with_less.unserved is OnUnserved.RECOVER) is (with_less.recover is not None)
    assert with_less.orphan_grace >= with_all.orphan_grace
    assert with_less.setup_grace >= with_all.setup_grace
    assert with_less.recovery_deadline >= with_all.recovery_deadline


@given(st.text(), st.text(), st.text())
def test_no_name_of_a_server_breaks_the_choice(comm: str, exe: str, unit: str) -> None:
    config = rules('match = { server = "[a-*" }', 'match = { server = "*b*", unit = "*.c" }')
    assert config.policy_for(facts(comm=comm, exe=exe, unit=unit)).reason
    assert config.policy_for(facts(comm=comm + "\udcff", exe=None)).reason


# --- lines


def test_a_line_is_found_through_every_way_to_write_a_key() -> None:
    text = '''\
daemon.dry_run = true # comment = "no key"
[policy] # [nor here]
"orphaned" = "delete"
'orphan_grace' = """
setup_grace = 1
[http]
"""
    "setup\\u005fgrace"   =   "1s"
numbers = [ 1, [ 2,
  { deep = 1 } ] ]
[[device]]
match.ids = "1"
match . server = \'\'\'=\'\'\'
[[ device ]]
match = { ids = "a=b,}", x = [ { y = 1 }, 2 ], unit = "#" }
[device.match.sub]
key = 1979-05-27 07:32:00
[[device.extra]]
[[device.extra]]
key = 1.5e3
[http]
listen = ""
'''
    lines = key_lines(text)
    assert {".".join(map(str, path)): line for path, line in lines.items()} == {
        "daemon": 1,
        "daemon.dry_run": 1,
        "policy": 2,
        "policy.orphaned": 3,
        "policy.orphan_grace": 4,
        "policy.setup_grace": 8,
        "policy.numbers": 9,
        "policy.numbers.0": 9,
        "policy.numbers.1": 9,
        "policy.numbers.1.0": 9,
        "policy.numbers.1.1": 10,
        "policy.numbers.1.1.deep": 10,
        "device": 11,
        "device.0": 11,
        "device.0.match": 12,
        "device.0.match.ids": 12,
        "device.0.match.server": 13,
        "device.1": 14,
        "device.1.match": 15,
        "device.1.match.ids": 15,
        "device.1.match.x": 15,
        "device.1.match.x.0": 15,
        "device.1.match.x.0.y": 15,
        "device.1.match.x.1": 15,
        "device.1.match.unit": 15,
        "device.1.match.sub": 16,
        "device.1.match.sub.key": 17,
        "device.1.extra": 18,
        "device.1.extra.0": 18,
        "device.1.extra.1": 19,
        "device.1.extra.1.key": 20,
        "http": 21,
        "http.listen": 22,
    }


FILLERS = [
    "1",
    "'='",
    '"]"',
    "[\n 1,\n { a = '}' } ]",
    '"""\n[x]\nk0 = 1\n""""',
    "'''\n\\'''",
    "{ b = [ 1 ] }",
    '"\\""',
]
LAYOUTS = ["{key} = {value}", "'{key}'={value}", '  "{key}" = {value} # k1 = 2', "\n#\n{key}.sub = {value}"]
LAYOUT = st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(FILLERS))
TABLE = st.tuples(st.sampled_from(["[daemon{n}]", "[[device]]", "[ 'other{n}' ]"]), st.lists(LAYOUT, max_size=4))


@given(st.lists(TABLE, max_size=5), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_the_line_of_every_problem_holds_its_key(tables: list[tuple[str, list[tuple[str, str]]]], newline: str) -> None:
    """Every key is unknown, and unlike every other, so each problem has one right line."""
    text, total = "", 0
    for n, (header, pairs) in enumerate(tables):
        text += header.format(n=n) + newline
        for layout, value in pairs:
            total += 1
            text += layout.format(key=f"unknown{total}", value=value) + newline
    lines = text.split("\n")
    found = 0
    try:
        load(text.encode(), "f")
    except InvalidConfigError as error:
        for problem in error.problems:
            assert problem.key.rpartition(".")[2].partition("[")[0] in lines[problem.line - 1]
        found = len(error.problems)
        lines_of = key_lines(text.replace("\r\n", "\n"))
        unknown = [(path[-1], line) for path, line in lines_of.items() if str(path[-1]).startswith("unknown")]
        assert all(str(key) in lines[line - 1] for key, line in unknown)
        assert len(unknown) == total
    assert found or not tables or all(header == "[[device]]" and not pairs for header, pairs in tables)


# --- nothing but ConfigError

ALL_KEYS = b"""[daemon]
resync_interval = "30s"
dry_run = false
[policy]
orphaned = 'delete'
[[device]]
match = { ids = "0-15,20", server = "ublk.loop", unit = "swap-*.service", owner_uid = 0, flags = ["!ZONED", "QUIESCE"] }
orphan_grace = "10s"
[[device]]
unserved = "recover"
recover = { command = ["ublk", "-n", "{id}", "{{"], timeout = "30s", attempts = 3, user = "nobody" }
[http]
listen = "[::1]:10116"
[journal]
keep = "90d"
max_size = "64MiB"
[[alert]]
sink = "alertmanager"
urls = ["http://127.0.0.1:9093"]
labels = { cluster = "berlin" }
[[alert]]
sink = "mail"
to = ["a@example.org"]
from = "b@example.org"
server = "localhost:25"
tls = "none"
kinds = ["!cleaned"]
rate_limit = "20/1h"
quiet_hours = "22:00-07:00"
"""
PIECES = [
    *(bytes([sign]) for sign in b"[]{}=.,\"'#\n\r\x00\\-_09a \t\xef"),
    b'"""',
    b"'''",
    b"\xef\xbb\xbf",
    b"[[",
    b"1e9",
]
CHANGE = st.tuples(st.integers(0, len(ALL_KEYS)), st.integers(0, 9), st.sampled_from(PIECES))


def loads_or_explains(text: bytes) -> None:
    try:
        load(text, "f")
    except InvalidConfigError as error:
        told = [error.hint, *str(error).split("\n")]
        told += [problem.hint for problem in error.problems]
        assert all(line and line.isprintable() for line in told)


@given(st.binary())
@example(b"[" * 9000)
@example(b"a = " + b"[" * 300 + b"]" * 300)
@example(b"a = " + b"{ a = " * 100 + b"1" + b"}" * 100)
@example(b"a = 0x" + b"f" * 9000)
@example(b".".join([b"a"] * 500) + b" = 1")
def test_any_bytes_load_or_are_explained(text: bytes) -> None:
    loads_or_explains(text)


@given(st.lists(CHANGE, min_size=1, max_size=4))
@settings(max_examples=300)
def test_any_change_to_a_real_file_loads_or_is_explained(changes: list[tuple[int, int, bytes]]) -> None:
    text = ALL_KEYS
    for at, drop, piece in changes:
        text = text[:at] + piece + text[at + drop :]
    loads_or_explains(text)


@given(st.text(alphabet="[]{}=.,\"'#\n\\ab1 ", max_size=60))
@settings(max_examples=300)
def test_lines_are_looked_for_in_any_text_without_an_end_or_an_error(text: str) -> None:
    assert all(line >= 1 for line in key_lines(text).values())


def test_a_file_full_of_quotes_and_brackets_is_read_in_no_time() -> None:
    for piece in (b'"', b"'", b'"""', b"'''", b"\\", b"[", b"{", b"a.", b"[[a]]\n", b"[a"):
        loads_or_explains(piece * 8000)
