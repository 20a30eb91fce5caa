"""The command `test-alert`: is somebody told, if something is wrong? A real alert goes to the sinks by the real way.

A running daemon sends it, so that all that a real one meets is met: its configuration, its sandbox, its network. Where none
runs, or another configuration is named, this command sends it by itself, and says so.
"""

# ruff: noqa: T201 - commands print

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

from duende_ublkd.client import DaemonClient, DaemonNotRunningError, not_understood, socket_path
from duende_ublkd.core.errors import ExitCode, UsageError
from duende_ublkd.core.text import printable
from duende_ublkd.core.values import did_you_mean
from duende_ublkd.parts import DEFAULT_PATH, known_users, read_config

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from duende_ublkd.core.alertconfig import SinkConfig
    from duende_ublkd.core.config import Config

COMMAND = "test-alert"
_ANSWER_WITHIN = (
    1500.0  # seconds; what is under way comes first, and each has five minutes, and as much until it is given up
)


def add_command(
    commands: argparse._SubParsersAction[Any],  # its only name
    common: argparse.ArgumentParser,
    reader: argparse.ArgumentParser,
    changer: argparse.ArgumentParser,
) -> None:
    """Add it to a parser."""
    test = commands.add_parser(
        COMMAND, parents=[common, reader, changer], help="send an alert for trial, and say what each sink answers"
    )
    test.add_argument("sink", nargs="?", metavar="SINK", help="only to this one: its name, as check-config shows it")


def run(options: argparse.Namespace) -> ExitCode:
    """Carry it out; raises DuendeError."""
    if options.dry_run:
        return _say_what_would_be_sent(options)
    answers = _checked(_ask(options))
    if options.json:
        print(json.dumps(answers, indent=2))
    else:
        width = max(len(answer["sink"]) for answer in answers)
        for answer in answers:
            print(_line(answer, width))
    return ExitCode.DONE if all(answer["ok"] for answer in answers) else ExitCode.LEFT_OVER


def _line(answer: dict[str, Any], width: int) -> str:
    seconds = f"{answer['seconds']:.2f} s"
    how = f"took it in {seconds}" if answer["ok"] else f"DID NOT TAKE IT, after {seconds}"
    return f"{answer['sink']:<{width}}  {how}: {answer['detail']}"


def _ask(options: argparse.Namespace) -> object:
    """The daemon, or, where it is not its configuration that is tried or there is none, ourselves."""
    why = "the daemon is not asked, since another configuration is named"
    if options.config is None:
        try:
            return DaemonClient(socket_path()).post(
                "/api/v1/test-alert", {"sink": options.sink}, answer_within=_ANSWER_WITHIN
            )
        except DaemonNotRunningError:
            why = "the daemon does not run"
    config = read_config(options.config)
    _chosen(config, options.sink, options.config)
    _tell(f"{why}: this command sends the alert by itself")
    return asyncio.run(_send(config, options.sink))


def _checked(answers: object) -> list[dict[str, Any]]:
    """What has the form of answers, made printable."""
    if not isinstance(answers, list) or not answers:
        raise not_understood()
    try:
        return [
            {
                "sink": printable(str(answer["sink"]), 80),
                "ok": answer["ok"] is True,
                "detail": printable(str(answer["detail"]), 1000),
                "seconds": float(answer["seconds"]),
            }
            for answer in answers
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise not_understood() from error


async def _send(config: Config, sink: str | None) -> list[dict[str, Any]]:
    """With a desk, carriers and children of our own, as the daemon has them."""
    from duende_ublkd.carriers import Carriers  # noqa: PLC0415 - all of it is the daemon's, and no other command's
    from duende_ublkd.kernel.children import Children  # noqa: PLC0415
    from duende_ublkd.report.alerts.desk import Desk  # noqa: PLC0415
    from duende_ublkd.report.journal import Journal  # noqa: PLC0415

    children = Children()
    carriers = Carriers(lambda: children, known_users, on_trouble=lambda _: None, spawn=children.spawn)
    desk = Desk(Journal(lambda _: 0), lambda _, __: None, carriers, boot_id="")
    try:
        children.start()
        desk.configure(config.alerts)
        return await desk.test(sink)
    finally:
        desk.close()
        await carriers.close()
        children.close()


def _say_what_would_be_sent(options: argparse.Namespace) -> ExitCode:
    sinks = _chosen(read_config(options.config), options.sink, options.config)
    if options.json:
        print(json.dumps([{"sink": sink.name, "kind": sink.sink.value, "dry_run": True} for sink in sinks], indent=2))
    else:
        for sink in sinks:
            print(f"would get a test alert: {sink}")
    return ExitCode.DONE


def _chosen(config: Config, name: str | None, path: str | None) -> Sequence[SinkConfig]:
    """The sinks of the configuration that are meant. UsageError: there is none."""
    where = path or DEFAULT_PATH
    if not config.alerts:
        raise UsageError(
            f"{printable(where)} has no [[alert]]: nobody is told of anything",
            hint='add a table, such as: [[alert]] sink = "alertmanager" url = "http://127.0.0.1:9093"',
        )
    if name is None:
        return config.alerts
    chosen = [sink for sink in config.alerts if sink.name == name]
    if not chosen:
        hint = did_you_mean(name, [sink.name for sink in config.alerts])
        raise UsageError(f"{printable(where)} has no sink with the name {printable(name, 80)}", hint=hint)
    return chosen


def _tell(sentence: str) -> None:
    print(f"duende-ublkd: {sentence}", file=sys.stderr, flush=True)
