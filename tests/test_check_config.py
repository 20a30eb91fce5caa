"""`check-config`: what it says of a file, of the devices that are there, and of one that need not be."""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pytest

from duende_ublkd import check_config
from duende_ublkd.core.config import DeviceFacts, InvalidConfigError, Policy, Recovery, load
from duende_ublkd.core.errors import ExitCode, UsageError
from duende_ublkd.core.model import Feature

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TWO_TABLES = """\
[policy]
setup_grace = "2m"

[[device]]
match = { ids = "3", server = "ublk*" }
unserved = "recover"
recover = { command = ["ublk", "recover", "-n", "{id}"], attempts = 5 }

[[device]]
match = { unit = "swap-*.service", owner_uid = 1000, flags = ["USER_RECOVERY"] }
orphaned = "alert"
"""
SERVED = DeviceFacts(3, "ublk", "/usr/bin/ublk", "a.service", 0, server_known=True, flags=0)


def a_file(directory: Path, text: str = TWO_TABLES) -> str:
    path = directory / "config.toml"
    path.write_text(text)
    return str(path)


def a_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--config")
    check_config.add_arguments(parser)
    return parser


Capture = pytest.CaptureFixture[str]


def told(
    capture: Capture, *arguments: str, devices: Sequence[tuple[str, DeviceFacts]] | str = (), default: str = "/nowhere"
) -> list[str]:
    """The lines that the command prints, which it ends well."""
    options = a_parser().parse_args(arguments)
    assert check_config.run(options, default, devices) is ExitCode.DONE
    return capture.readouterr().out.splitlines()


def answer(capture: Capture, *arguments: str, devices: Sequence[tuple[str, DeviceFacts]] | str = ()) -> dict[str, Any]:
    printed: dict[str, Any] = json.loads("\n".join(told(capture, "--json", *arguments, devices=devices)))
    return printed


# --- the file


def test_a_right_file_is_called_right_and_its_tables_are_counted(tmp_path: Path, capsys: Capture) -> None:
    path = a_file(tmp_path)
    assert told(capsys, path)[0] == f"{path}: right, 2 [[device]] tables"
    assert told(capsys, a_file(tmp_path, ""))[0] == f"{path}: right"
    assert told(capsys, a_file(tmp_path, "[[device]]\n"))[0] == f"{path}: right, 1 [[device]] table"


def test_the_file_is_the_one_that_is_named_else_that_of_config_else_the_default(
    tmp_path: Path, capsys: Capture
) -> None:
    path = a_file(tmp_path)
    for arguments in ((path,), (path, "--config", path), ("--config", path), ()):
        assert told(capsys, *arguments, default=path)[0].startswith(f"{path}: right")


def test_two_files_are_one_too_many_and_an_empty_name_is_none(tmp_path: Path) -> None:
    path = a_file(tmp_path)
    for arguments, sentence in (
        ([path, "--config", "/other"], f"two files are named: /other and {path}"),
        (["", "--config", path], "two files are named"),
        ([""], '"": an empty name is no file\'s'),
        (["--config", ""], '"": an empty name is no file\'s'),
    ):
        with pytest.raises(UsageError, match=re.escape(sentence)):
            check_config.run(a_parser().parse_args(arguments), path, "not asked")


def test_mistakes_of_the_web_configuration_are_looked_for_again_by_the_file_that_names_it(tmp_path: Path) -> None:
    web = tmp_path / "web.yml"
    web.write_text("one: 1\ntwo: 2\n")
    path = a_file(tmp_path, f'[http]\nweb_config_file = "{web}"\n')
    with pytest.raises(InvalidConfigError, match=re.escape(f"{web}:1: ")) as found:
        check_config.run(a_parser().parse_args([path]), "/nowhere", "not asked")
    assert found.value.hint == f"correct these 2 places, then type: duende-ublkd check-config {path}"


def test_a_wrong_file_is_an_error_and_with_json_its_mistakes_are_printed(tmp_path: Path, capsys: Capture) -> None:
    path = a_file(tmp_path, '[policy]\norphaned = "nuke"\nunserved = "recover"\n')
    for arguments in ([path], [path, "--json"]):
        with pytest.raises(InvalidConfigError):
            check_config.run(a_parser().parse_args(arguments), "/nowhere", "not asked")
    printed = json.loads(capsys.readouterr().out)
    assert (printed["file"], printed["ok"]) == (path, False)
    assert [(each["line"], each["key"]) for each in printed["problems"]] == [
        (2, "policy.orphaned"),
        (3, "policy.unserved"),
    ]
    assert all(each["what"] and each["hint"] for each in printed["problems"])


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(InvalidConfigError, match="no such file"):
        told(capsys, str(tmp_path / "x.toml"))


def test_where_there_is_no_file_and_none_was_named_the_defaults_are_what_counts(
    tmp_path: Path, capsys: Capture
) -> None:
    default = str(tmp_path / "x.toml")
    assert told(capsys, default=default)[0] == f"no {default}, so the built-in defaults: right"
    answer = json.loads("\n".join(told(capsys, "--json", default=default)))
    assert (answer["ok"], answer["file"]) == (True, None)


def test_a_user_that_is_not_there_is_a_mistake_in_its_line(tmp_path: Path, capsys: Capture) -> None:
    recover = 'unserved = "recover"\nrecover.command = ["true"]\nrecover.user = "nobody-here"\n'
    for text, line, key in (
        (f"[policy]\n{recover}", 4, "policy.recover.user"),
        ('[[alert]]\nsink = "command"\ncommand = ["true"]\nuser = "nobody-here"\n', 4, "alert[0].user"),
    ):
        file = a_file(tmp_path, text)
        with pytest.raises(
            InvalidConfigError, match=rf"config\.toml:{line}: {re.escape(key)}: there is no user"
        ) as caught:
            told(capsys, "--json", file)
        (problem,) = json.loads(capsys.readouterr().out)["problems"]
        assert (problem["file"], problem["line"], problem["key"]) == (file, line, key)
        assert caught.value.hint == "getent passwd nobody-here; to see all: getent passwd"


def test_a_web_configuration_that_is_not_there_is_told_by_its_name_and_the_key_that_names_it(
    tmp_path: Path, capsys: Capture
) -> None:
    web = tmp_path / "web.yml"
    file = a_file(tmp_path, f'[http]\nweb_config_file = "{web}"\n')
    with pytest.raises(InvalidConfigError, match=r"web\.yml: no such file") as caught:
        told(capsys, "--json", file)
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["file"] == str(web)
    assert "[http] web_config_file names it" in caught.value.hint


ALERTS = """[[alert]]
sink = "webhook"
name = "chat"
url = "https://hooks.example.org/services/T0/secret"
kinds = ["pinned", "wedged"]
[[alert]]
sink = "alertmanager"
url = "http://192.0.2.7:9093"
username = "duende"
password_file = "/etc/duende-ublkd/password"
severity = "info"
[[alert]]
sink = "command"
command = ["/bin/true", "all"]
user = "nobody"
quiet_hours = "22:00-07:00"
"""


def test_each_sink_has_a_line_with_what_is_not_usual_and_without_a_secret(tmp_path: Path, capsys: Capture) -> None:
    path = a_file(tmp_path, ALERTS)
    assert told(capsys, path)[1:5] == [
        'alerts of webhook "chat" to https://hooks.example.org/...: severity = warning, kinds = pinned, wedged',
        "alerts of alertmanager to http://192.0.2.7:9093: severity = info",
        "alerts of command to /bin/true all: severity = warning, quiet_hours = 22:00-07:00, user = nobody",
        (
            f"warning: alert[1] ({path}:6): username: what it proves can be read on the way to http://192.0.2.7:9093; "
            "write https://..."
        ),
    ]
    printed = answer(capsys, path)
    assert [(each["sink"], each["name"]) for each in printed["alerts"]] == [
        ("webhook", "chat"),
        ("alertmanager", "alertmanager"),
        ("command", "command"),
    ]
    assert "secret" not in json.dumps(printed)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_the_command_of_a_sink_is_looked_at_as_that_of_a_recovery(tmp_path: Path, capsys: Capture) -> None:
    program, script = tmp_path / "tell", tmp_path / "script"
    for file in (program, script):
        file.write_text("#!/bin/sh\n")
        file.chmod(0o755)
    text = f'[[alert]]\nsink = "command"\ncommand = ["{program}", "{script}"]\n'
    script.chmod(0o777)
    assert told(capsys, a_file(tmp_path, text))[2].startswith(
        f"warning: alert[0] ({tmp_path}/config.toml:1): command[1]: {script} can be written by others"
    )
    program.chmod(0o777)
    with pytest.raises(
        InvalidConfigError, match=r"alert\[0\]\.command\[0\]: .*tell can be written by others"
    ) as caught:
        told(capsys, a_file(tmp_path, text))
    assert caught.value.hint == f"chmod go-w {program}"


def test_a_web_configuration_file_is_part_of_whether_a_file_is_right(tmp_path: Path, capsys: Capture) -> None:
    web = tmp_path / "web.yml"
    path = a_file(tmp_path, f'[http]\nweb_config_file = "{web}"\n')
    with pytest.raises(InvalidConfigError, match=r"web\.yml: no such file"):
        told(capsys, path)
    web.write_text("http_server_config:\n  headers:\n    X-Frame-Options: allow\n")
    with pytest.raises(InvalidConfigError, match=r"web\.yml:3: http_server_config\.headers\.X-Frame-Options: "):
        told(capsys, path)
    web.write_text("http_server_config: {headers: {X-Frame-Options: deny}}\n")
    assert told(capsys, path)[0] == f"{path}: right"


# --- devices that are there


def test_each_device_has_a_line_with_its_table_and_what_differs_from_the_defaults(
    tmp_path: Path, capsys: Capture
) -> None:
    path = a_file(tmp_path)
    other = DeviceFacts(4, "nbd", "/bin/nbd", "b.service", 0, server_known=True, flags=0)
    assert told(capsys, path, devices=[("ublk3", SERVED), ("ublk4", other)])[1:] == [
        (
            f"ublk3: device[0] ({path}:4), first match, by ids, server: setup_grace = 2m, unserved = recover, "
            'recover = { command = ["ublk", "recover", "-n", "{id}"], attempts = 5 }'
        ),
        f"ublk4: policy ({path}:1), no [[device]] matches: setup_grace = 2m",
    ]


def test_a_device_in_doubt_has_a_line_that_says_what_is_not_known(tmp_path: Path, capsys: Capture) -> None:
    path = a_file(tmp_path)
    (line,) = told(capsys, path, devices=[("ublk3", DeviceFacts(3, owner_uid=0))])[1:]
    assert line == (
        f"ublk3: device[0] ({path}:4) or policy ({path}:1), cannot tell whether device[0] ({path}:4) applies "
        "(not known: server), so each setting is the more careful one: setup_grace = 2m"
    )


def test_a_device_that_gets_the_defaults_has_a_line_that_says_so(tmp_path: Path, capsys: Capture) -> None:
    path = a_file(tmp_path, "")
    (line,) = told(capsys, path, devices=[("ublk3", SERVED)])[1:]
    assert line == "ublk3: policy (built-in defaults), there is no [[device]]: every setting is the default"


@pytest.mark.parametrize(
    ("devices", "note"), [([], "there is no ublk device"), ("devices are shown to root only", "devices are shown to")]
)
def test_why_no_device_is_shown_is_a_note(
    tmp_path: Path, capsys: Capture, devices: list[tuple[str, DeviceFacts]] | str, note: str
) -> None:
    path = a_file(tmp_path)
    (line,) = told(capsys, path, devices=devices)[1:]
    assert line.startswith(f"note: {note}")
    printed = answer(capsys, path, devices=devices)
    assert printed["devices"] == []
    assert printed["note"].startswith(note)


def test_no_name_and_no_command_steers_a_terminal(tmp_path: Path, capsys: Capture) -> None:
    path = a_file(tmp_path, '[policy]\nunserved = "recover"\nrecover.command = ["x", "\\u001b[2J\\n\\u202e"]\n')
    lines = told(capsys, path, devices=[("ublk3\x1b[2J\n", SERVED)])
    lines += told(capsys, path, devices="because\x1b\nof")
    lines += told(capsys, path, "--server", "evil\x1b\n", "--unit", "\x1b.service")
    assert len(lines) == 2 + 2 + 2 + len(fields(Policy))
    assert all(line.isprintable() for line in lines)


# --- a device that need not be there


def test_a_question_is_answered_with_the_whole_policy(tmp_path: Path, capsys: Capture) -> None:
    path = a_file(tmp_path)
    assert told(capsys, path, "--id", "3", "--server", "ublk.loop", devices="not looked")[1:] == [
        f"a device with id 3 and server ublk.loop: device[0] ({path}:4), first match, by ids, server:",
        "  orphaned = delete",
        "  orphan_grace = 500ms",
        "  setup_grace = 2m",
        "  unserved = recover",
        "  recovery_deadline = 1m",
        (
            '  recover = { command = ["ublk", "recover", "-n", "{id}"], timeout = 30s, attempts = 5, backoff = 1s, '
            "stable = 5m }"
        ),
    ]
    assert told(capsys, path, "--id", "4")[-1] == "  recover = none"


@pytest.mark.parametrize(
    ("arguments", "described", "table"),
    [
        (["--id", "4", "--owner-uid", "0"], "id 4 and owner 0", "policy ("),
        (["--id", "4"], "id 4", "device[1] ("),
        (["--id", "4", "--flags", ""], "id 4 and no flags", "policy ("),
        (["--flags", "zoned,UBLK_F_USER_RECOVERY"], "flags USER_RECOVERY|ZONED", "device[0] ("),
        (
            ["--id", "4", "--unit", "swap-a.service", "--owner-uid", "1000", "--flags", "USER_RECOVERY"],
            "id 4, unit swap-a.service, owner 1000 and flags USER_RECOVERY",
            "device[1] (FILE:9), first match, by unit, owner_uid, flags",
        ),
        (["--server", "nbd", "--unit", "a.service"], "server nbd and unit a.service", "policy ("),
        (["--server", "/usr/bin/ublk"], "server /usr/bin/ublk", "device[0] (FILE:4) or device[1] (FILE:9) or policy"),
        (["--unit", "swap-a.service", "--id", "3"], "id 3 and unit swap-a.service", "device[0] (FILE:4) or device[1]"),
    ],
)
def test_what_is_not_told_of_a_device_is_not_known(
    tmp_path: Path, capsys: Capture, arguments: list[str], described: str, table: str
) -> None:
    path = a_file(tmp_path)
    line = told(capsys, path, *arguments, devices=[("ublk3", SERVED)])[1]
    assert line.startswith(f"a device with {described}: {table.replace('FILE', path)}")


def test_a_long_name_of_a_server_is_seen_as_the_daemon_would_see_it(tmp_path: Path, capsys: Capture) -> None:
    """A process's name is cut: a table for another long name with the same beginning may apply."""
    path = a_file(tmp_path, '[[device]]\nmatch.server = "my-very-long-name-2"\norphaned = "alert"\n')
    name = "my-very-long-name"
    seen = DeviceFacts(3, name[:15], f"/usr/bin/{name}", server_known=True)
    printed = answer(capsys, path, "--server", name)["devices"]
    expected = answer(capsys, path, devices=[("ublk3", seen)])["devices"]
    assert [each["table"] for each in printed] == [each["table"] for each in expected]
    assert "not known: server" in printed[0]["reason"]
    path = a_file(tmp_path, f'[[device]]\nmatch.server = "{name[:15]}"\norphaned = "alert"\n')
    assert told(capsys, path, "--server", name)[1].endswith(f"device[0] ({path}:1), first match, by server:")


@pytest.mark.parametrize(
    ("arguments", "what", "hint"),
    [
        (["--id", "x"], '--id: "x" is not a number from 0 to 1048575', "--id 3"),
        (["--id", "1048576"], '--id: "1048576" is not a number', "--id 3"),
        (["--id", "٣"], "is not a number", "--id 3"),
        (["--owner-uid", "4294967295"], '--owner-uid: "4294967295" is not a number from 0', "--owner-uid 3"),
        (["--server", ""], '--server: "" is not a name', "--server ublk.loop"),
        (["--server", "/bin/"], '--server: "/bin/" is not a name', "--server ublk.loop"),
        (["--unit", "swap"], '--unit: "swap" is not the full name of a unit', "did you mean --unit swap.service?"),
        (["--unit", ""], '--unit: "" is not the full name of a unit', "--unit ublk.service"),
        (["--flags", "ZONED,QUEISCE"], '--flags: "QUEISCE" is no flag of a ublk device', 'did you mean "QUIESCE"?'),
        (["--flags", "\x1b"], '--flags: "\\x1b" is no flag', "possible here: SUPPORT_ZERO_COPY"),
    ],
)
def test_a_wrong_question_is_explained(arguments: list[str], what: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        a_parser().parse_args(arguments)
    assert what in str(caught.value)
    assert hint in caught.value.hint
    assert str(caught.value).isprintable()


def test_only_what_asks_for_a_device_is_a_question() -> None:
    for arguments in (["--id", "0"], ["--owner-uid", "0"], ["--flags", ""], ["--server", "x"], ["--unit", "x.y"]):
        assert check_config.is_question(a_parser().parse_args(arguments))
    assert not check_config.is_question(a_parser().parse_args(["x", "--json"]))


# --- for programs


def test_json_says_the_same_of_devices_that_are_there(tmp_path: Path, capsys: Capture) -> None:
    path = a_file(tmp_path)
    assert answer(capsys, path, devices=[("ublk3", SERVED)]) == {
        "file": path,
        "ok": True,
        "device_tables": 2,
        "devices": [
            {
                "dev_id": 3,
                "table": f"device[0] ({path}:4)",
                "reason": "first match, by ids, server",
                "policy": {
                    "orphaned": "delete",
                    "orphan_grace": "500ms",
                    "setup_grace": "2m",
                    "unserved": "recover",
                    "recovery_deadline": "1m",
                    "recover": {
                        "command": ["ublk", "recover", "-n", "{id}"],
                        "timeout": "30s",
                        "attempts": 5,
                        "backoff": "1s",
                        "stable": "5m",
                        "user": None,
                    },
                },
            }
        ],
        "note": None,
        "alerts": [],
        "warnings": [],
    }


def test_json_answers_a_question_about_one_device_whose_number_may_not_be_known(
    tmp_path: Path, capsys: Capture
) -> None:
    path = a_file(tmp_path)
    for arguments, dev_id in ((["--id", "9"], 9), (["--server", "nbd"], None)):
        printed = answer(capsys, path, *arguments, devices="not looked")
        assert [each["dev_id"] for each in printed["devices"]] == [dev_id]
        assert printed["note"] is None


def test_a_policy_that_json_shows_means_the_same_in_a_file(tmp_path: Path, capsys: Capture) -> None:
    text = '[policy]\nunserved = "recover"\norphan_grace = "1m1s1ms"\nrecover = { command = ["é", "\\""], user = "9" }'
    (device,) = answer(capsys, a_file(tmp_path, text), "--id", "1")["devices"]
    recover = ", ".join(f"{key} = {json.dumps(value)}" for key, value in device["policy"].pop("recover").items())
    again = "".join(f"{key} = {json.dumps(value)}\n" for key, value in device["policy"].items())
    policy = load(f"[policy]\n{again}recover = {{ {recover} }}".encode(), "again").policy
    assert policy == load(text.encode(), "first").policy
    assert policy.recover == Recovery(("é", '"'), user="9")


def test_a_device_of_an_unprivileged_user_is_told_from_others_by_its_flags(tmp_path: Path, capsys: Capture) -> None:
    path = a_file(tmp_path, '[[device]]\nmatch.flags = ["UNPRIVILEGED_DEV"]\norphaned = "alert"\n')
    devices = [
        ("ublk1", DeviceFacts(1, flags=Feature.UNPRIVILEGED_DEV | Feature.ZONED)),
        ("ublk2", DeviceFacts(2, flags=0)),
    ]
    mine, other = told(capsys, path, devices=devices)[1:]
    assert mine == f"ublk1: device[0] ({path}:1), first match, by flags: orphaned = alert"
    assert other.startswith("ublk2: policy (built-in defaults), no [[device]] matches")
