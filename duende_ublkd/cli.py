"""The commands: what they take, what they print, and their exit codes.

Readers look at the kernel themselves, so that they work with and without a running daemon; a running one tells what it
remembers of earlier looks.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import re
import shutil
import sys
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from duende_ublkd import __version__, check_config, planned, trial
from duende_ublkd.core.config import MAX_DEV_ID, Config
from duende_ublkd.core.errors import DuendeError, ExitCode, UsageError
from duende_ublkd.core.model import Outcome
from duende_ublkd.core.text import printable
from duende_ublkd.core.values import did_you_mean
from duende_ublkd.kernel.control import open_control_device
from duende_ublkd.kernel.memory import keep_threads_small, reclaim_without_io, spare_from_oom
from duende_ublkd.once import ask_daemon, is_left, settle
from duende_ublkd.parts import DEFAULT_PATH, Parts, read_config
from duende_ublkd.reconcile import facts_of
from duende_ublkd.report import present
from duende_ublkd.report.journal import set_up_logging

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from _typeshed import ReadableBuffer

    from duende_ublkd.core.model import Deed, Judged, PassReport

LAST_LINES = 0.5  # seconds that the log's last lines may take

_DEVICE = re.compile(r"(?:/dev/)?(?:ublk[bc]?)?([0-9]{1,7})")


class LogHangsError(Exception):
    """The daemon is done, and whoever reads its log does not: nothing more may be written, nor flushed at the end.

    Its argument is the exit code.
    """


class _Parser(argparse.ArgumentParser):
    """argparse, with our kind of errors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            what = f"{printable(str(value), 80)!r} is no {action.metavar or 'choice'}"
            raise UsageError(what.lower(), hint=did_you_mean(str(value), [*action.choices]))


class Output(io.FileIO):
    """Standard output's descriptor. What cannot be written is given up, and remembered: no deed ends for it.

    `is_endless`: a command that goes on until it is stopped ends with its output; the OSError is raised, once.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.failure: OSError | None = None
        self.is_endless = False

    def write(self, data: ReadableBuffer, /) -> int:
        """As if it were written, once it failed."""
        size = memoryview(data).nbytes
        if self.failure is not None:
            return size
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except OSError as error:
            self.failure = error
            if self.is_endless:
                raise
            return size


def run(arguments: Sequence[str], output: Output | None = None) -> ExitCode:
    """Carry out one command line; raises DuendeError. `output`: where it prints to."""
    options, unknown = _parser().parse_known_args(arguments)
    command = options.command
    if unknown:
        of_command = "" if unknown[0] == arguments[0] else f"{command} "
        raise UsageError(f"unrecognized arguments: {' '.join(unknown)}", hint=f"duende-ublkd {of_command}--help")
    if output:
        output.is_endless = command == "events"
    if by_itself := _BY_THEMSELVES.get(command):
        return by_itself(options)
    if command in planned.COMMANDS:
        return planned.run(options)
    if command == "clean" and options.now and not options.ids:
        raise UsageError("--now takes the ids that are your own", hint="duende-ublkd clean --now 3")
    dry_run = getattr(options, "dry_run", False)
    read = partial(read_config, options.config, with_web=command == "run", dry_run=dry_run)
    config = read()
    if command == "run":
        return _run_daemon(config, read)
    os.close(open_control_device())
    if command == "clean":
        return asyncio.run(_clean(config, options))
    explanations = asyncio.run(_look(config, None if command == "list" else options.id))
    if command == "list":
        _print_list([each.device for each in explanations], as_json=options.json)
    else:
        _print_explanation(explanations, options)
    return ExitCode.DONE


def _run_daemon(config: Config, read: Callable[[], Config]) -> ExitCode:
    """Until it is told to stop; `read`: anew. LogHangsError: it is done, however it ended, and cannot even say so."""
    keep_threads_small()
    if config.daemon.lock_memory:
        reclaim_without_io()  # what it cannot have, it does without
    spare_from_oom()
    outlet = set_up_logging()
    from duende_ublkd import daemon  # noqa: PLC0415 - its imports (HTTP, metrics, udev) are heavy, and no other's

    code = ExitCode.DONE
    try:
        asyncio.run(daemon.run(config, read))
    except BaseException as error:
        code = error.exit_code if isinstance(error, DuendeError) else ExitCode.LEFT_OVER
        raise
    finally:
        if not outlet.drain(LAST_LINES):
            raise LogHangsError(code)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="duende-ublkd",
        description="Cleans up after dead ublk servers: frees what is safe to free, tells about the rest.",
        epilog="Exit codes: 0 done, nothing orphaned is left; 1 something is left; 2 wrong use or configuration; "
        "3 the kernel's control device is missing or not permitted.",
    )
    parser.add_argument("--version", action="version", version=f"duende-ublkd {__version__}")
    help_config = f"configuration (default: {DEFAULT_PATH})"
    parser.add_argument("--config", metavar="FILE", help=help_config)
    common = _Parser(add_help=False)
    # SUPPRESS: given before the command only, it must not be overwritten by the default of the command's own.
    common.add_argument("--config", metavar="FILE", help=help_config, default=argparse.SUPPRESS)
    reader = _Parser(add_help=False)
    reader.add_argument("--json", action="store_true", help="print JSON")
    changer = _Parser(add_help=False)
    changer.add_argument("--dry-run", action="store_true", help="change nothing, say what would be done")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    commands.add_parser("run", parents=[common, changer], help="the daemon, in the foreground")
    commands.add_parser("list", parents=[common, reader], help="every ublk device, its verdict and why")
    explain = commands.add_parser("explain", parents=[common, reader], help="everything that is known of one device")
    explain.add_argument("id", type=_device, metavar="ID", help="3, ublk3 or /dev/ublkb3")
    clean = commands.add_parser("clean", parents=[common, reader, changer], help="delete orphaned devices, once")
    clean.add_argument("ids", type=_device, nargs="*", metavar="ID", help="only these")
    clean.add_argument(
        "--now", action="store_true", help="the IDs are my own: skip their grace, but no other check", dest="now"
    )
    planned.add_commands(commands, common, reader, changer, _device)
    trial.add_command(commands, common, reader, changer)
    check = commands.add_parser(
        "check-config", parents=[common, reader], help="is this configuration right, and which table does a device get?"
    )
    check_config.add_arguments(check)
    commands.add_parser(
        "doctor", parents=[common, reader], help="what of this machine keeps ublk, or the daemon, from working"
    )
    for each in (parser, *commands.choices.values()):
        each.allow_abbrev = False  # --n is no --now
    return parser


def _device(text: str) -> int:
    match = _DEVICE.fullmatch(text)
    if not match or int(match[1]) > MAX_DEV_ID:
        raise UsageError(
            f"{text!r} is not the id of a ublk device (0 to {MAX_DEV_ID})",
            hint="duende-ublkd list  # shows the ids; 3, ublk3 and /dev/ublkb3 all name the device with id 3",
        )
    return int(match[1])


def _check_config(options: argparse.Namespace) -> ExitCode:
    if check_config.is_question(options):
        return check_config.run(options, DEFAULT_PATH, ())
    try:
        os.close(open_control_device())
        explanations = asyncio.run(_look(Config(), None))
    except DuendeError as error:
        return check_config.run(options, DEFAULT_PATH, f"{error}; {error.hint}")
    present = [(f"ublk{each.device.seen.dev_id}", facts_of(each.device.seen, each.history)) for each in explanations]
    return check_config.run(options, DEFAULT_PATH, present)


def _doctor(options: argparse.Namespace) -> ExitCode:
    from duende_ublkd import doctor  # noqa: PLC0415 - its table and its patterns are no other's, least the daemon's

    return doctor.run(options)


_BY_THEMSELVES = {  # they read a configuration themselves, or say what is wrong with it
    "check-config": _check_config,
    "doctor": _doctor,
    trial.COMMAND: trial.run,
}


async def _look(config: Config, dev_id: int | None) -> list[present.Explanation]:
    """Judge all devices, or one, without touching any."""
    parts = Parts(config, (), one_shot=True)
    remembered = ask_daemon(parts.reconciler)
    try:
        await settle(parts, None if dev_id is None else {dev_id}, act=False, on_unknown_holds=_say_unknown_holds)
        reconciler = parts.reconciler
        explanations = []
        for device in reconciler.devices.values():
            if history := reconciler.ledger.get(device.seen.dev_id):
                chosen = config.policy_for(facts_of(device.seen, history))
                known = device.seen.dev_id in remembered
                explanations.append(present.Explanation(device, history, chosen, known))
        return explanations
    finally:
        await parts.close()


def _say_unknown_holds(error: DuendeError) -> None:
    print(f"duende-ublkd: it cannot be told what is on hold: {error}; {error.hint}", file=sys.stderr)


def _print_list(devices: list[Judged], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([present.as_object(device) for device in devices], indent=2))
    else:
        print(present.table(devices, shutil.get_terminal_size((120, 24)).columns))


def _print_explanation(explanations: list[present.Explanation], options: argparse.Namespace) -> None:
    if not explanations:
        raise UsageError(f"there is no ublk{options.id}: the id is free", hint="duende-ublkd list")
    if options.json:
        print(json.dumps(present.explanation_object(explanations[0]), indent=2))
    else:
        print(present.explain(explanations[0]))


class _CleanReport:
    """Collects what `clean` did."""

    def __init__(self, *, quiet: bool) -> None:
        self.deeds: list[tuple[Deed, str]] = []
        self._quiet = quiet
        self._reasons: dict[int, str] = {}

    def intends(self, device: Judged) -> None:
        """Remember why."""
        self._reasons[device.seen.dev_id] = device.verdict.reason

    def passed(self, report: PassReport) -> None:
        """Print each deed when it is done."""
        for deed in report.deeds:
            reason = self._reasons.get(deed.dev_id, deed.detail)
            self.deeds.append((deed, reason))
            if not self._quiet:
                print(_deed_line(deed, reason), flush=True)


def _deed_line(deed: Deed, reason: str) -> str:
    match deed.outcome:
        case Outcome.DELETED:
            return f"ublk{deed.dev_id} deleted: {reason}"
        case Outcome.WOULD_DELETE:
            return f"ublk{deed.dev_id} would be deleted: {reason}"
        case Outcome.DELETED_STILL_HELD:
            return f"ublk{deed.dev_id} deleted, but its id is still held: {reason}"
        case Outcome.ALREADY_GONE:
            return f"ublk{deed.dev_id} was deleted by somebody else"
        case Outcome.SPARED:
            return f"ublk{deed.dev_id} spared: {deed.detail}"
        case _:
            return f"ublk{deed.dev_id} could not be deleted: {deed.detail}"


async def _clean(config: Config, options: argparse.Namespace) -> ExitCode:
    report = _CleanReport(quiet=options.json)
    named = tuple(options.ids)
    parts = Parts(config, (report,), named=named, without_grace=named if options.now else (), one_shot=True)
    try:
        ask_daemon(parts.reconciler)
        await settle(parts, set(named) or None, act=True)
        devices = list(parts.reconciler.devices.values())
    finally:
        await parts.close()
    cleaned = [deed for deed, _ in report.deeds if deed.outcome is Outcome.DELETED]
    would = {deed.dev_id for deed, _ in report.deeds if deed.outcome is Outcome.WOULD_DELETE}
    left = [
        device for device in devices if is_left(device, named=bool(options.ids)) and device.seen.dev_id not in would
    ]
    if options.json:
        print(
            json.dumps(
                {
                    "cleaned": [deed.dev_id for deed in cleaned],
                    "would_clean": sorted(would),
                    "left": [present.as_object(device) for device in left],
                },
                indent=2,
            )
        )
    else:
        for device in left:
            print(f"ublk{device.seen.dev_id} left, {device.verdict.kind.value}: {device.verdict.reason}")
        print(f"Cleaned {len(cleaned)} orphaned devices")
    return ExitCode.LEFT_OVER if left or would else ExitCode.DONE
