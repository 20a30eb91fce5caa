"""`[[alert]]`: what is accepted for each sink, how mistakes are told, and that no secret is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duende_ublkd.core.alertconfig import (
    MOST_SINKS,
    Encryption,
    QuietHours,
    RateLimit,
    Reminder,
    SinkConfig,
    SinkKind,
    foreign_keys,
    host_of,
    keys_of,
)
from duende_ublkd.core.alerting import AlertKind, Severity
from duende_ublkd.core.config import Config, InvalidConfigError, load
from tests.test_config import a_config, problems_of, the_problem

LEAST = {
    "alertmanager": {"url": '"http://127.0.0.1:9093"'},
    "webhook": {"url": '"http://127.0.0.1/x"'},
    "command": {"command": '["tell"]'},
    "mail": {"to": '["a@example.org"]', "from": '"b@example.org"', "server": '"mail.example.org:587"'},
}


def a_table(sink: str, **keys: str) -> str:
    """The keys that such a sink has to have, and these; `from_` is from."""
    given = {**LEAST[sink], **{key.removesuffix("_"): value for key, value in keys.items()}}
    return f'[[alert]]\nsink = "{sink}"\n' + "".join(f"{key} = {value}\n" for key, value in given.items() if value)


def a_sink(sink: str, **keys: str) -> SinkConfig:
    (made,) = a_config(a_table(sink, **keys)).alerts
    return made


def test_a_sink_has_defaults_and_the_name_of_its_kind() -> None:
    assert a_sink("alertmanager") == SinkConfig(SinkKind.ALERTMANAGER, "alertmanager", url="http://127.0.0.1:9093")
    assert a_sink("webhook").rate_limit == RateLimit(30, 3600.0)
    mail = a_sink("mail")
    assert (mail.name, mail.severity, mail.kinds, mail.timeout) == ("mail", Severity.WARNING, (), 10.0)
    assert (mail.reminder, mail.quiet_hours, mail.tls) == (Reminder.ONCE, None, Encryption.STARTTLS)
    assert a_config("").alerts == Config().alerts == ()


def test_every_key_reaches_its_record() -> None:
    http = {
        "name": '"a.B-2"',
        "severity": '"info"',
        "kinds": '["pinned", "cleaned"]',
        "timeout": '"5m"',
        "labels": '{ cluster = "berlin", _x1 = "ü" }',
        "url": '"https://example.org:8443/x?y=z"',
        "username": '"duende"',
        "password_file": '"/p"',
        "ca_file": '"/ca"',
        "cert_file": '"/cert"',
        "key_file": '"/key"',
    }
    webhook = a_sink(
        "webhook",
        **http,
        rate_limit='"5/10m"',
        reminder='"diminishing"',
        quiet_hours='"22:30-7:00"',
        secret_file='"/s"',
    )
    assert webhook == SinkConfig(
        SinkKind.WEBHOOK,
        "a.B-2",
        severity=Severity.INFO,
        kinds=(AlertKind.CLEANED, AlertKind.PINNED),
        timeout=300.0,
        rate_limit=RateLimit(5, 600.0),
        reminder=Reminder.DIMINISHING,
        quiet_hours=QuietHours(22 * 60 + 30, 7 * 60),
        url="https://example.org:8443/x?y=z",
        labels={"cluster": "berlin", "_x1": "ü"},
        username="duende",
        password_file="/p",
        ca_file="/ca",
        cert_file="/cert",
        key_file="/key",
        secret_file="/s",
    )
    assert a_sink("alertmanager", url='"https://x/api/alertmanager/"').url == "https://x/api/alertmanager/"
    cluster = a_sink("alertmanager", url="", urls='["http://a:9093", "http://[::1]:9093"]', resend='"2m"')
    assert cluster.members == cluster.urls == ("http://a:9093", "http://[::1]:9093")
    assert (cluster.resend, a_sink("alertmanager").members) == (120.0, ("http://127.0.0.1:9093",))
    assert a_sink("alertmanager", bearer_token_file='"/t"').bearer_token_file == "/t"
    command = a_sink("command", command='["/bin/tell", "{", "{x} }}"]', user='"nobody"')
    assert (command.command, command.user) == (("/bin/tell", "{", "{x} }}"), "nobody")
    mail = a_sink("mail", tls='"none"', server='"[::1]:25"', username='"x"', password_file='"/p"')
    assert (mail.to, mail.from_, mail.server) == (("a@example.org",), "b@example.org", "[::1]:25")


def test_kinds_with_a_sign_are_those_that_it_does_not_get() -> None:
    kinds = a_sink("mail", kinds='["!cleaned", "!test"]'.replace(', "!test"', "")).kinds
    assert AlertKind.CLEANED not in kinds
    assert AlertKind.TEST not in kinds
    assert len(kinds) == len(AlertKind) - 2
    assert a_sink("mail", kinds='["!unserved"]', severity='"critical"').kinds, "of those that are left, some pass"


def test_a_sink_wants_what_its_filter_lets_through() -> None:
    sink = a_sink("mail", kinds='["pinned", "wedged"]', severity='"warning"')
    assert sink.wants(AlertKind.PINNED, Severity.WARNING)
    assert not sink.wants(AlertKind.PINNED, Severity.INFO)
    assert not sink.wants(AlertKind.UNSERVED, Severity.CRITICAL)
    assert sink.wants(AlertKind.TEST, Severity.INFO)
    assert a_sink("mail").wants(AlertKind.UNSERVED, Severity.CRITICAL)


@pytest.mark.parametrize(
    ("hours", "quiet", "loud"),
    [
        (QuietHours(22 * 60, 7 * 60), (22 * 60, 0, 7 * 60 - 1), (7 * 60, 22 * 60 - 1)),
        (QuietHours(60, 120), (60, 119), (59, 120)),
    ],
)
def test_quiet_hours_go_over_midnight(hours: QuietHours, quiet: tuple[int, ...], loud: tuple[int, ...]) -> None:
    assert all(minute in hours for minute in quiet)
    assert not any(minute in hours for minute in loud)


# --- mistakes


@pytest.mark.parametrize("sink", [*SinkKind])
def test_a_key_of_another_sink_is_an_error_that_names_the_sinks_which_have_it(sink: SinkKind) -> None:
    assert set(foreign_keys(sink)) == set(keys_of(None)) - set(keys_of(sink))
    for key in foreign_keys(sink):
        message, hint = the_problem(a_table(sink.value, **{key: "3"}))
        assert f'alert[0].{key}: is not for sink = "{sink.value}": only ' in message
        assert hint.startswith("remove it")
        owners = [each.value for each in SinkKind if key in keys_of(each)]
        assert all(owner in message.split("only ")[1] for owner in owners)


def test_what_is_alertmanagers_own_is_to_be_set_there() -> None:
    for key, place in (("reminder", "repeat_interval"), ("quiet_hours", "mute_time"), ("rate_limit", "group_interval")):
        assert place in the_problem(a_table("alertmanager", **{key: '"x"'}))[1]


@pytest.mark.parametrize(
    ("sink", "keys", "what", "hint"),
    [
        ("webhook", {"url": ""}, ": has no url", 'add url = "https://'),
        ("alertmanager", {"url": ""}, ": has no url", 'add url = "https://'),
        ("command", {"command": ""}, ": has no command", 'add command = ["'),
        ("mail", {"to": ""}, ": has no to", 'add to = ["oncall@example.org"]'),
        ("mail", {"from_": ""}, ": has no from", 'add from = "duende'),
        ("mail", {"server": ""}, ": has no server", 'add server = "mail'),
        ("mail", {"severity": '"warn"'}, '.severity: "warn" is not one of info, warning, critical', '"warning"?'),
        ("mail", {"name": '"on call"'}, '.name: "on call" cannot be the name', "letters, digits"),
        ("mail", {"name": '""'}, ".name: ", "letters, digits"),
        ("mail", {"timeout": '"999ms"'}, ".timeout: ", 'the nearest is "1s"'),
        ("mail", {"timeout": '"6m"'}, ".timeout: ", 'the nearest is "5m"'),
        ("alertmanager", {"resend": '"1s"'}, ".resend: ", 'the nearest is "5s"'),
        ("mail", {"kinds": "[]"}, ".kinds: is empty", '["pinned", "wedged"]'),
        ("mail", {"kinds": '"pinned"'}, '.kinds: must be an array of texts, not "pinned"', '["pinned"'),
        ("mail", {"kinds": '["pined"]'}, '.kinds[0]: "pined" is no kind of alert', 'did you mean "pinned"?'),
        ("mail", {"kinds": '["recovery_failed"]'}, ".kinds[0]: ", 'did you mean "recovery-failed"?'),
        ("mail", {"kinds": '["!Cleaned"]'}, ".kinds[0]: ", 'did you mean "!cleaned"?'),
        ("mail", {"kinds": '["pinned", "pinned"]'}, '.kinds[1]: "pinned" stands here twice', "remove one"),
        ("mail", {"kinds": '["pinned", "!wedged"]'}, '.kinds[1]: "!wedged" is among kinds that it gets', "name those"),
        ("mail", {"kinds": '["!pinned", "wedged"]'}, '.kinds[1]: "wedged" is among kinds with "!"', "name those"),
        ("mail", {"kinds": '["test"]'}, '.kinds[0]: "test" is what test-alert sends', "remove it"),
        (
            "mail",
            {"kinds": json.dumps([f"!{kind.value}" for kind in AlertKind if kind is not AlertKind.TEST])},
            ".kinds: leaves nothing that this sink gets",
            "remove one of them",
        ),
        (
            "mail",
            {"kinds": '["pinned", "cleaned"]'},
            '.kinds: names "cleaned", whose severity is info: less than warning',
            'write severity = "info"',
        ),
        (
            "mail",
            {"kinds": '["pinned", "degraded"]', "severity": '"critical"'},
            '.kinds: lets nothing through: severity = "critical" keeps out every kind that is left',
            'write severity = "warning"',
        ),
        (
            "mail",
            {
                "kinds": '["!unserved", "!recovery-given-up", "!wedged", "!driver-missing"]',
                "severity": '"critical"',
            },
            ".kinds: lets nothing through",
            'write severity = "info"',
        ),
        ("mail", {"rate_limit": "20"}, ".rate_limit: must be a text in quotes, not 20", '"20/1h"'),
        ("mail", {"rate_limit": '"20"'}, '.rate_limit: "20" is not a number for a time', '"20/1h"'),
        ("mail", {"rate_limit": '"0/1h"'}, ".rate_limit: 0 is not between 1 and 10000", 'the nearest is "1/1h"'),
        ("mail", {"rate_limit": '"20/2d"'}, '.rate_limit: "2d" is not between 1s and 1d', '"20/1h"'),
        ("mail", {"rate_limit": '"20/hour"'}, '.rate_limit: "1hour" has the unknown unit "hour"', "the units are"),
        ("mail", {"reminder": '"weekly"'}, '.reminder: "weekly" is not one of once, daily, diminishing', "possible"),
        ("mail", {"quiet_hours": '"22-7"'}, '.quiet_hours: "22-7" is not from one time', '"22:00-07:00"'),
        ("mail", {"quiet_hours": '"24:00-07:00"'}, ".quiet_hours: 24:00 is no time of the day", "00:00 to 23:59"),
        ("mail", {"quiet_hours": '"08:00-8:00"'}, '.quiet_hours: "08:00-8:00" begins when it ends', "critical"),
        ("webhook", {"labels": "[]"}, ".labels: must be a table of texts, not an array", '{ cluster = "berlin" }'),
        ("webhook", {"labels": '{ "data-center" = "x" }'}, ".labels.data-center: is not the name", '"data_center"?'),
        ("webhook", {"labels": '{ "__x" = "x" }'}, ".labels.__x: is not the name of a label", '"x"?'),
        ("webhook", {"labels": '{ severity = "x" }'}, ".labels.severity: is a label that every alert", "another"),
        ("webhook", {"labels": "{ a = 3 }"}, ".labels.a: must be a text in quotes, not 3", 'write "3"'),
        ("webhook", {"labels": '{ a = "" }'}, ".labels.a: is empty", "remove it"),
        ("webhook", {"labels": '{ a = "\\n" }'}, ".labels.a: is longer than a label, or no plain text", "remove it"),
        ("webhook", {"username": '"x"'}, ".username: does nothing without password_file", "add password_file"),
        ("mail", {"password_file": '"/x"'}, ".password_file: does nothing without username", "add username"),
        ("mail", {"username": '""', "password_file": '"/x"'}, '.username: "" is not the name', "duende"),
        (
            "webhook",
            {"username": '"a:b"', "password_file": '"/x"'},
            '.username: has a ":", which no user of HTTP has',
            "the name alone",
        ),
        ("webhook", {"password_file": '"x"'}, '.password_file: "x" is not an absolute path', "/etc/duende-ublkd"),
        (
            "webhook",
            {"username": '"x"', "password_file": '"/x"', "bearer_token_file": '"/t"'},
            ".bearer_token_file: stands beside username",
            "remove one",
        ),
        ("webhook", {"ca_file": '"/x"'}, ".ca_file: does nothing: the URL is not https", "https://"),
        ("webhook", {"url": '"https://x"', "key_file": '"/x"'}, ".key_file: does nothing without cert_file", "add cert"),
        ("alertmanager", {"urls": '["http://b"]'}, ".urls: stands beside url", "remove url"),
        ("alertmanager", {"url": "", "urls": '["http://b", "http://b/"]'}, ".urls[1]: stands here twice", "remove"),
        ("alertmanager", {"url": "", "urls": '["http://b", "b"]'}, ".urls[1]: is not a URL with http://", "write it as"),
        (
            "alertmanager",
            {"url": '"http://a:9093/api/v2/alerts"'},
            ".url: has more than the address of Alertmanager",
            'did you mean "http://a:9093"?',
        ),
        ("alertmanager", {"url": '"http://a:9093/?x"'}, ".url: has more than the address", '"http://a:9093"?'),
        ("alertmanager", {"url": '"http://a/am/api/v2"'}, ".url: has more than the address", '"http://a/am"?'),
        ("command", {"command": '["tell {id}"]'}, '.command[0]: "tell {id}" has the placeholder', "_ALERT_ID"),
        ("command", {"command": '["tell", "{block_device}"]'}, ".command[1]: ", "DUENDE_UBLKD_ALERT_BLOCK_DEVICE"),
        ("command", {"command": '["bin/tell"]'}, '.command[0]: "bin/tell" is a relative path', '"tell"'),
        ("command", {"command": '["tell all"]'}, "is more than the name of a program", '["tell", "all"]'),
        ("command", {"command": '"tell"'}, '.command: must be an array of texts, not "tell"', "write it as ["),
        ("command", {"user": '"a b"'}, '.user: "a b" is not the name of a user', "nobody"),
        ("mail", {"to": '"a@b"'}, '.to: must be an array of texts, not "a@b"', '["oncall@example.org"]'),
        ("mail", {"to": '["root"]'}, '.to[0]: "root" is not the address of a mailbox', 'did you mean "root@localhost"?'),
        ("mail", {"to": '["Me <me@x.org>"]'}, ".to[0]: ", 'did you mean "me@x.org"?'),
        ("mail", {"to": '["a@x.org", "a@x.org"]'}, ".to[1]: ", "remove one"),
        ("mail", {"to": '["a@x.org\\nBcc: b@x.org"]'}, ".to[0]: ", "write it as"),
        ("mail", {"from_": '"a@-x-"'}, '.from: "a@-x-" is not the address', "write it as"),
        ("mail", {"server": '"mail.example.org"'}, ".server: ", 'did you mean "mail.example.org:587"?'),
        ("mail", {"server": '"localhost"'}, ".server: ", 'did you mean "localhost:25"?'),
        ("mail", {"server": '"::1"'}, ".server: ", 'did you mean "[::1]:587"?'),
        ("mail", {"server": '"smtp://x:25"'}, '.server: "smtp://x:25" is not HOST:PORT', "localhost:25"),
        ("mail", {"server": '"x:65536"'}, ".server: port 65536 is not between", "write it as"),
        ("mail", {"server": '"x:465"'}, '.server: is "starttls", and port 465 is for "tls"', 'write tls = "tls"'),
        ("mail", {"server": '"x:465"', "tls": '"none"'}, '.tls: is "none", and port 465 is for "tls"', 'tls = "tls"'),
        ("mail", {"tls": '"tls"'}, '.tls: is "tls", and port 587 is for "starttls"', 'write tls = "starttls"'),
        ("mail", {"tls": '"none"', "ca_file": '"/x"'}, '.ca_file: does nothing with tls = "none"', "starttls"),
        (
            "mail",
            {"tls": '"none"', "username": '"x"', "password_file": '"/x"'},
            ".username: would be sent for everybody on the way to read",
            'write tls = "starttls"',
        ),
    ],
)  # fmt: skip
def test_a_wrong_sink_is_explained(sink: str, keys: dict[str, str], what: str, hint: str) -> None:
    message, told = the_problem(a_table(sink, **keys))
    assert message.startswith("duende.toml:")
    assert f"alert[0]{what}" in message or (what[0] != "." and what in message)
    assert hint in told


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("x", "is not a URL with http://"),
        ("", "is not a URL with http://"),
        ("ftp://x", 'has the scheme "ftp", and not http or https'),
        ("http://", "has no host"),
        ("http:///x", "has no host"),
        ("http://a b/secret", "holds a space"),
        ("http://ü/secret", "holds a space, or a sign that is not ASCII"),
        ("http://x:y/secret", "has a host or a port that cannot be"),
        ("http://x:70000/secret", "has a host or a port that cannot be"),
        ("http://[::1/secret", "has a host or a port that cannot be"),
        ("http://x:0/secret", "has port 0"),
        ("http://me:secret@x/", "has the name of a user in it"),
        ("http://secret@x/", "has the name of a user in it"),
        ("http://256.1.1.1/secret", 'has "256.1.1.1" for its host'),
        ("http://-x-/secret", 'has "-x-" for its host'),
        ("http://x/secret#y", 'has a "#"'),
        ("http://x/" + "secret" * 400, "has 2409 characters, more than 2048"),
    ],
)
def test_a_wrong_url_is_explained_and_not_shown(url: str, what: str) -> None:
    for problem in problems_of(a_table("webhook", url=json.dumps(url))):
        assert what in str(problem)
        assert "secret" not in f"{problem} {problem.hint}"


@pytest.mark.parametrize(
    "url",
    ["http://x", "HTTPS://X.Y.:1/", "http://[2001:db8::1]:9093", "http://a_b:8080/%20?x=y", "http://xn--ber-goa/"],
)
def test_a_url_can_be_any_of_http(url: str) -> None:
    assert a_sink("webhook", url=f'"{url}"').url == url


def test_two_sinks_of_one_name_are_an_error_that_says_what_to_add() -> None:
    text = a_table("mail") + a_table("webhook", name='"mail-2"') + a_table("mail") + a_table("webhook", name='"mail"')
    assert [(problem.line, problem.what, problem.hint) for problem in problems_of(text)] == [
        (10, 'has the name "mail", as alert[0] (duende.toml:1) has', 'add name = "mail-3"'),
        (15, 'has the name "mail", as alert[0] (duende.toml:1) has', 'add name = "mail-3"'),
    ]


def test_tables_without_a_sink_or_with_an_unknown_one_are_explained_with_all_their_other_mistakes() -> None:
    problems = problems_of('[[alert]]\ntimeout = 3\n[[alert]]\nsink = "mial"\nurll = 3\n')
    assert [problem.line for problem in problems] == [1, 2, 4, 5]
    assert "add sink = " in problems[0].hint
    assert problems[2].hint == 'did you mean "mail"?'
    assert problems[3].hint == 'did you mean "url"?'


def test_there_are_not_too_many_sinks() -> None:
    tables = "".join(a_table("mail", name=f'"m{n}"') for n in range(MOST_SINKS + 1))
    assert "has 33 tables, more than 32" in the_problem(tables)[0]


def test_no_follow_up_is_told_of_a_key_that_is_a_mistake_itself() -> None:
    for keys in (
        {"username": "3"},
        {"password_file": '"x"', "username": '"x"'},
        {"kinds": '["x"]', "severity": '"info"'},
    ):
        the_problem(a_table("mail", **keys))


# --- what is shown and sent on


def test_a_sink_is_shown_in_one_line_without_a_secret() -> None:
    url = "https://hooks.example.org/T0/secret?token=secret"
    webhook = a_sink("webhook", url=f'"{url}"', secret_file='"/secret"', name='"chat"', timeout='"5s"')
    assert str(webhook) == 'webhook "chat" to https://hooks.example.org/...: severity = warning, timeout = 5s'
    assert host_of("http://x:9093") == "http://x:9093"
    mail = a_sink("mail", quiet_hours='"22:00-7:30"', rate_limit='"5/h"', kinds='["wedged"]', tls='"starttls"')
    assert str(mail) == (
        "mail to a@example.org by mail.example.org:587: severity = warning, kinds = wedged, rate_limit = 5/1h, "
        "quiet_hours = 22:00-07:30"
    )
    assert str(a_sink("command", command='["x", "\\u001b[2J"]')).isprintable()


@pytest.mark.parametrize("sink", [*SinkKind])
def test_an_object_of_a_sink_is_json_under_the_files_own_names(sink: SinkKind) -> None:
    keys: dict[str, Any] = json.loads(json.dumps(a_sink(sink.value).to_object()))
    assert set(keys) == set(keys_of(None))
    assert keys["sink"] == sink.value
    assert keys["from"] == ("b@example.org" if sink is SinkKind.MAIL else "")
    assert keys["timeout"] == 10.0


@given(st.text(max_size=60) | st.from_regex(r"https?://[^\s]{0,40}", fullmatch=True))
@settings(max_examples=300)
def test_any_text_for_a_url_a_server_or_an_address_is_taken_or_explained(text: str) -> None:
    value = json.dumps(text)
    for sink, key in (("webhook", "url"), ("mail", "server"), ("mail", "from"), ("mail", "kinds"), ("mail", "name")):
        table = a_table(sink, **{key: f"[{value}]" if key == "kinds" else value})
        try:
            (made,) = load(table.encode("utf-8", "replace"), "x.toml").alerts
        except InvalidConfigError as error:
            assert all(f"{problem} {problem.hint}".isprintable() for problem in error.problems)  # noqa: PT017
        else:
            assert str(made).isprintable()
