"""`check-config`: whether a file is right, where alerts go, and which of its tables each device gets, or would get.

Rules:
1. The answer is the daemon's own: the same `policy_for`, asked with the same facts.
2. Who may change the file or a program in it is part of whether it is right. An argument of a command that others may
   change, perhaps a script, is worth a warning: what it means to the command, nobody but its author knows.
3. Of a device that is asked about and need not be there, what is not told is not known. A name that is told is a name as
   the daemon would see it: that of a program, with the process's name cut as the kernel cuts it.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from duende_ublkd.core import alertconfig
from duende_ublkd.core.config import (
    COMM_BYTES,
    MAX_DEV_ID,
    DeviceFacts,
    InvalidConfigError,
    Policy,
    Recovery,
    WrongValueError,
    duration_text,
    parse_feature,
)
from duende_ublkd.core.errors import ExitCode, UsageError
from duende_ublkd.core.model import feature_names
from duende_ublkd.core.text import printable
from duende_ublkd.parts import doubtful_arguments, read_config

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence

    from duende_ublkd.core.config import ChosenPolicy, Config

_QUESTIONS = ("id", "server", "unit", "owner_uid", "flags")
_MAX_UID = (1 << 32) - 2  # (uid_t)-1 means nobody


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE, and the options of the question; --json and --config are every command's."""
    parser.add_argument("file", nargs="?", metavar="FILE")
    question = parser.add_argument_group(
        "a device that need not be there", "which table would it get? What is not told of it is not known."
    )
    question.add_argument("--id", type=_number("--id", MAX_DEV_ID), metavar="N", help="its number")
    question.add_argument("--server", type=_name("--server"), metavar="NAME", help="program of its server")
    question.add_argument("--unit", type=_unit, metavar="UNIT", help="systemd unit of its server")
    question.add_argument("--owner-uid", type=_number("--owner-uid", _MAX_UID), metavar="N", help="who owns it")
    question.add_argument("--flags", type=_flags, metavar="A,B", help="the flags that it has, and no others")


def is_question(options: argparse.Namespace) -> bool:
    """Whether it is about a device that need not be there, so that nobody has to look at those that are."""
    return any(getattr(options, name) is not None for name in _QUESTIONS)


def run(options: argparse.Namespace, default_path: str, devices: Sequence[tuple[str, DeviceFacts]] | str) -> ExitCode:
    """Print what there is to say of a file. `devices`: those present; a text: why they cannot be shown.

    `default_path`: where it is when none is named; that need not be there. Raises ConfigError for a file that is wrong;
    with --json, after its mistakes were printed.
    """
    if options.file is not None and options.config not in (None, options.file):
        what = f"two files are named: {printable(options.config)} and {printable(options.file)}"
        raise UsageError(what, hint="duende-ublkd check-config FILE")
    named = options.config if options.file is None else options.file
    path = default_path if named is None else named
    is_there = named is not None or os.access(path, os.F_OK)
    try:
        config = read_config(path if is_there else None, with_web=True)
    except InvalidConfigError as error:
        if options.json:
            _say(json.dumps({"file": path, "ok": False, "problems": _problems(error)}, indent=2))
        raise
    asked, note = _asked(options, devices)
    chosen = [(name, facts, config.policy_for(facts)) for name, facts in asked]
    tables = len(config.devices)
    warnings = _warnings(config)
    if options.json:
        found = [_as_object(facts, choice) for _, facts, choice in chosen]
        answer = {"file": path if is_there else None, "ok": True, "device_tables": tables, "devices": found}
        _say(json.dumps({**answer, "note": note or None, "alerts": _sinks(config), "warnings": warnings}, indent=2))
        return ExitCode.DONE
    what = printable(path) if is_there else f"no {path}, so the built-in defaults"
    _say(f"{what}: right" + (f", {tables} [[device]] table{'s' if tables > 1 else ''}" if tables else ""))
    for sink in config.alerts:
        _say(f"alerts of {sink}")
    for name, _, choice in chosen:
        _say(_in_full(name, choice) if is_question(options) else _in_short(name, choice))
    for warning in warnings:
        _say(f"warning: {warning}")
    if note:
        _say(f"note: {note}")
    return ExitCode.DONE


def _warnings(config: Config) -> list[str]:
    """One for each argument that names a file which others may change, and for each secret that others may read."""
    policies = [(config.policy_source, config.policy), *((rule.source, rule.policy) for rule in config.devices)]
    found = {
        (policy.recover.command, index): f"{source}: recover.command[{index}]: {what}"
        for source, policy in reversed(policies)  # one that is inherited is told of where it stands
        if policy.recover
        for index, what in doubtful_arguments(policy.recover)
    }
    commands = [
        f"{sink.source}: command[{index}]: {what}" for sink in config.alerts for index, what in doubtful_arguments(sink)
    ]
    secrets = [f"{sink.source}: {key}: {what}" for sink in config.alerts for key, what in alertconfig.doubts(sink)]
    return [*reversed(found.values()), *commands, *secrets]


def _sinks(config: Config) -> list[dict[str, str]]:
    """What may be shown of them: a URL may be a secret."""
    return [
        {"table": sink.source, "sink": sink.sink.value, "name": sink.name, "text": str(sink)} for sink in config.alerts
    ]


def _asked(
    options: argparse.Namespace, devices: Sequence[tuple[str, DeviceFacts]] | str
) -> tuple[Sequence[tuple[str, DeviceFacts]], str]:
    """The devices to answer for, and why there is none."""
    if is_question(options):
        facts = _facts_of(options)
        return [(f"a device with {_described(facts)}", facts)], ""
    if isinstance(devices, str):
        return [], printable(devices, 1000)
    return devices, "" if devices else "there is no ublk device"


def _say(text: str) -> None:
    print(text)  # noqa: T201 - a command's output, as in cli


def _problems(error: InvalidConfigError) -> list[dict[str, Any]]:
    return [
        {
            "file": problem.file,
            "line": problem.line or None,
            "key": problem.key,
            "what": problem.what,
            "hint": problem.hint,
        }
        for problem in error.problems
    ]


# --- the question


def _number(option: str, highest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,10}", text) or int(text) > highest:
            what = f"{option}: {_quoted(text)} is not a number from 0 to {highest}"
            raise UsageError(what, hint=f"write the number alone: {option} 3")
        return int(text)

    return parse


def _name(option: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not text.rpartition("/")[2]:
            raise UsageError(f"{option}: {_quoted(text)} is not a name", hint=f"write it as {option} ublk.loop")
        return text

    return parse


def _unit(text: str) -> str:
    """The whole name: the daemon never sees a unit without its suffix."""
    if "." not in text:
        hint = f"did you mean --unit {printable(text)}.service?" if text else "write it as --unit ublk.service"
        raise UsageError(f"--unit: {_quoted(text)} is not the full name of a unit", hint=hint)
    return text


def _flags(text: str) -> int:
    flags = 0
    for name in filter(None, text.split(",")):
        try:
            flags |= parse_feature(name)
        except WrongValueError as error:
            raise UsageError(f"--flags: {error}", hint=error.hint) from None
    return flags


def _facts_of(options: argparse.Namespace) -> DeviceFacts:
    """What the daemon would know of such a device."""
    server: str | None = options.server
    return DeviceFacts(
        dev_id=options.id,
        comm=None if server is None else _comm_of(server),
        exe=server,
        unit=options.unit,
        owner_uid=options.owner_uid,
        server_known=server is not None or options.unit is not None,
        flags=options.flags,
    )


def _comm_of(program: str) -> str:
    name = program.rpartition("/")[2].encode(errors="surrogateescape")
    return name[:COMM_BYTES].decode(errors="surrogateescape")


def _described(facts: DeviceFacts) -> str:
    told = [
        f"{name} {value}"
        for name, value in (
            ("id", facts.dev_id),
            ("server", facts.exe),
            ("unit", facts.unit),
            ("owner", facts.owner_uid),
        )
        if value is not None
    ]
    if facts.flags is not None:
        told.append(f"flags {'|'.join(feature_names(facts.flags))}" if facts.flags else "no flags")
    *others, last = told
    return f"{', '.join(others)} and {last}" if others else last


# --- the answer


def _as_object(facts: DeviceFacts, choice: ChosenPolicy) -> dict[str, Any]:
    return {
        "dev_id": facts.dev_id,
        "table": choice.source,
        "reason": choice.reason,
        "policy": _written(choice.policy),
    }


def _in_short(name: str, choice: ChosenPolicy) -> str:
    """One line, with what differs from the defaults."""
    unusual = _differing(_written(choice.policy), _written(Policy()))
    if choice.policy.recover:
        unusual["recover"] = _differing(_written(choice.policy.recover), _written(Recovery(command=())))
    settings = ", ".join(f"{key} = {_shown(value)}" for key, value in unusual.items())
    return f"{printable(name)}: {choice.source}, {choice.reason}: {settings or 'every setting is the default'}"


def _differing(settings: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value != usual[key]}


def _in_full(name: str, choice: ChosenPolicy) -> str:
    lines = [f"{key} = {_shown(value)}" for key, value in _written(choice.policy).items()]
    return "\n  ".join([f"{printable(name, 1000)}: {choice.source}, {choice.reason}:", *lines])


def _written(record: object) -> dict[str, Any]:
    """Name the settings of a policy as the file does; durations are the only numbers with a fraction."""
    if not is_dataclass(record):
        raise TypeError(f"{type(record).__name__} has no settings")
    return {entry.name: _word(getattr(record, entry.name)) for entry in fields(record)}


def _word(value: object) -> object:
    match value:
        case Enum():
            return value.value
        case float():
            return duration_text(value)
        case tuple():
            return list(value)
        case _:
            return _written(value) if is_dataclass(value) else value


def _shown(value: object) -> str:
    """Write a setting for people, who may want to type it."""
    match value:
        case None:
            return "none"
        case dict():
            return _table(value)
        case list():
            return printable(json.dumps(value, ensure_ascii=False), 500)
        case _:
            return printable(str(value))


def _table(entries: Mapping[str, object]) -> str:
    return f"{{ {', '.join(f'{key} = {_shown(value)}' for key, value in entries.items() if value is not None)} }}"


def _quoted(text: str) -> str:
    return f'"{printable(text)}"'
