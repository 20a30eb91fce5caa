"""The commands that ask the daemon: `hold` and `release` for planned work, `events` for what came of everything.

What is on hold, and what has happened, is told without a daemon too, from the files that it left. Changing something needs
the daemon: it is the one whose hands are to be off.
"""

# ruff: noqa: T201 - commands print

from __future__ import annotations

import json
import select
import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from duende_ublkd.client import (
    DaemonClient,
    DaemonLostError,
    DaemonNotRunningError,
    not_understood,
    run_directory,
    socket_path,
)
from duende_ublkd.core.config import duration_text, parse_duration
from duende_ublkd.core.errors import DuendeError, ExitCode, UsageError
from duende_ublkd.core.holds import DEFAULT_TIME, LONGEST_TIME, MOST_TEXT, SHORTEST_TIME
from duende_ublkd.core.text import printable
from duende_ublkd.kernel import holdfile
from duende_ublkd.parts import read_config
from duende_ublkd.report import objects

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable

COMMANDS = ("hold", "release", "events")
LISTED = 100  # events, unless told
LISTED_BEFORE_FOLLOWING = 10
MOST_LISTED = 1000

_RETRY = 1.0  # seconds, as tail -F
_DAY = 86_400.0
_LONGEST_SINCE = 3650 * _DAY


def add_commands(
    commands: argparse._SubParsersAction[Any],  # its only name
    common: argparse.ArgumentParser,
    reader: argparse.ArgumentParser,
    changer: argparse.ArgumentParser,
    device: Callable[[str], int],
) -> None:
    """Add these commands to a parser; `device` makes an id of what a person types."""
    hold = commands.add_parser(
        "hold", parents=[common, reader, changer], help="hands off a device for a while; without ID: what is on hold"
    )
    hold.add_argument("id", type=device, nargs="?", metavar="ID", help="3, ublk3 or /dev/ublkb3")
    span = f"{duration_text(SHORTEST_TIME)} to {duration_text(LONGEST_TIME)}"
    hold.add_argument(
        "--for",
        type=_hold_time,
        metavar="TIME",
        dest="seconds",
        help=f"{span} (default: {duration_text(DEFAULT_TIME)})",
    )
    hold.add_argument("--why", metavar="TEXT", help="shown wherever the hold is")
    release = commands.add_parser("release", parents=[common, changer], help="end a hold")
    release.add_argument("id", type=device, metavar="ID", help="3, ublk3 or /dev/ublkb3")
    events = commands.add_parser("events", parents=[common, reader], help="what happened, and what was done")
    events.add_argument("id", type=device, nargs="?", metavar="ID", help="only of this device")
    events.add_argument("--limit", type=_limit, metavar="N", help=f"the latest N (default: {LISTED})")
    events.add_argument("--since", type=_since, metavar="TIME", help="only of the last TIME, such as 1h")
    events.add_argument("--follow", action="store_true", help="go on with what happens, until interrupted")


def run(options: argparse.Namespace) -> ExitCode:
    """Carry out one of COMMANDS; raises DuendeError."""
    if options.config is not None:
        read_config(options.config)  # what is asked of the daemon needs none; a wrong one is a mistake all the same
    match options.command:
        case "hold" if options.id is None:
            return _list_holds(options)
        case "hold":
            return _hold(options)
        case "release":
            return _release(options)
        case "events" if options.follow:
            try:
                return _follow(options)
            except KeyboardInterrupt:
                return ExitCode.DONE
        case _:
            return _list_events(options)


def _hold_time(text: str) -> float:
    return _duration(text, "--for", SHORTEST_TIME, LONGEST_TIME)


def _since(text: str) -> float:
    return _duration(text, "--since", 0.0, _LONGEST_SINCE)


def _duration(text: str, option: str, shortest: float, longest: float) -> float:
    try:
        seconds = parse_duration(text)
    except UsageError as error:
        raise UsageError(f"{option}: {error}", hint=error.hint) from error
    if not shortest <= seconds <= longest:
        between = f"between {duration_text(shortest)} and {duration_text(longest)}"
        raise UsageError(f"{option}: {printable(text)} is not {between}", hint=f"{option} 10m")
    return seconds


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MOST_LISTED)) and int(text) <= MOST_LISTED):
        raise UsageError(f"--limit: {printable(text)!r} is not a number from 0 to {MOST_LISTED}", hint="--limit 20")
    return int(text)


# --- hold, release


def _hold(options: argparse.Namespace) -> ExitCode:
    seconds = DEFAULT_TIME if options.seconds is None else options.seconds
    why = printable(options.why or "", MOST_TEXT)
    client = DaemonClient(socket_path())
    if options.dry_run:
        return _say_hold(client.get("/api/v1/holds"), options, seconds)
    hold = client.post("/api/v1/hold", {"dev_id": options.id, "seconds": seconds, "why": why})
    if options.json:
        print(json.dumps(hold, indent=2))
    else:
        until = _clock(_time(hold, "until"))
        print(
            f"ublk{options.id} on hold until {until} ({_span(seconds)}): nothing is done to it. "
            f"Release it with: duende-ublkd release {options.id}"
        )
    return ExitCode.DONE


def _say_hold(holds: object, options: argparse.Namespace, seconds: float) -> ExitCode:
    """What would be done."""
    until = time.time() + seconds
    present = _find(holds, options.id)
    if options.json:
        would = {"dev_id": options.id, "until": objects.timestamp(until), "replaces": present, "dry_run": True}
        print(json.dumps(would, indent=2))
    else:
        instead = f", instead of until {_clock(_time(present, 'until'))}" if present else ""
        print(
            f"ublk{options.id} would be on hold until {_clock(datetime.fromtimestamp(until).astimezone())} "
            f"({_span(seconds)}){instead}"
        )
    return ExitCode.DONE


def _release(options: argparse.Namespace) -> ExitCode:
    client = DaemonClient(socket_path())
    if options.dry_run:
        answer: object = {"released": _find(client.get("/api/v1/holds"), options.id)}
    else:
        answer = client.post("/api/v1/release", {"dev_id": options.id})
    if not isinstance(answer, dict) or "released" not in answer:
        raise not_understood()
    if attempts := answer.get("attempts_forgotten"):
        print(f"ublk{options.id}: {attempts} attempts to recover it are forgotten, and begin anew")
    if overdue := answer.get("overdue_forgotten"):
        print(f"ublk{options.id}: {printable(str(overdue))} of an earlier daemon counts as over, and may be asked anew")
    if answer["released"]:
        print(f"ublk{options.id} {'would be ' if options.dry_run else ''}released")
    elif not (attempts or overdue):
        print(f"ublk{options.id} was not on hold")
        return ExitCode.LEFT_OVER
    return ExitCode.DONE


def _list_holds(options: argparse.Namespace) -> ExitCode:
    if options.seconds is not None or options.why is not None or options.dry_run:
        raise UsageError("hold takes the id of the device", hint="duende-ublkd hold 3 --for 10m")
    try:
        holds = DaemonClient(socket_path()).get("/api/v1/holds")
    except DaemonNotRunningError:
        now, at = time.monotonic(), time.time()
        left = holdfile.load(run_directory(), now).all()
        holds = [objects.hold_object(hold, now=now, at=at) for hold in left]
    if options.json:
        print(json.dumps(holds, indent=2))
    else:
        print(_hold_table(holds))
    return ExitCode.DONE


def _hold_table(holds: object) -> str:
    if not isinstance(holds, list):
        raise not_understood()
    if not holds:
        return "No device is on hold."
    rows = [("DEVICE", "UNTIL", "LEFT", "BY", "WHY"), *map(_hold_row, holds)]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )


def _hold_row(hold: object) -> tuple[str, str, str, str, str]:
    until = _time(hold, "until")
    try:
        uid, left, why = int(hold["uid"]), float(hold["seconds_left"]), str(hold["why"])  # type: ignore[index]
        by = "root" if uid == 0 else f"uid {uid}"
        return f"ublk{int(hold['dev_id'])}", _clock(until), _span(left), by, printable(why)  # type: ignore[index]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise not_understood() from error


def _find(holds: object, dev_id: int) -> dict[str, Any] | None:
    if not isinstance(holds, list) or not all(isinstance(hold, dict) for hold in holds):
        raise not_understood()
    return next((hold for hold in holds if hold.get("dev_id") == dev_id), None)


# --- events


def _list_events(options: argparse.Namespace) -> ExitCode:
    events, _ = _past(options, LISTED)
    if options.json:
        print(json.dumps(events, indent=2))
    else:
        for event in events:
            print(_line(event))
    return ExitCode.DONE


def _past(options: argparse.Namespace, default: int) -> tuple[list[dict[str, Any]], int]:
    """The latest events that are wanted, of the daemon or of what it left, and the number of the latest of all."""
    limit = default if options.limit is None else options.limit
    since = None if options.since is None else time.time() - options.since
    wanted = {"limit": limit, "dev_id": options.id, "since": since}
    try:
        client = DaemonClient(socket_path())
        latest = _latest(client)
        events, note = _ask(client, {name: value for name, value in wanted.items() if value is not None})
    except DaemonNotRunningError:
        from duende_ublkd.report.reader import read_file  # noqa: PLC0415 - SQLite, which no other command needs

        directory = read_config(options.config).daemon.state_dir
        last = read_file(directory, limit=1)
        latest = last[-1].seq if last else 0
        records = read_file(directory, limit=limit, dev_id=options.id, since=since)
        events, note = [objects.event_object(record) for record in records], "the daemon does not run; this is its file"
    if note:
        _tell(note)
    return events, max([latest, *map(_seq, events)])


def _latest(client: DaemonClient) -> int:
    events, _ = _ask(client, {"limit": 1})
    return _seq(events[-1]) if events else 0


def _ask(client: DaemonClient, query: dict[str, object]) -> tuple[list[dict[str, Any]], str]:
    answer = client.get(f"/api/v1/events?{urlencode(query)}")
    if not isinstance(answer, dict) or not isinstance(answer.get("events"), list):
        raise not_understood()
    return answer["events"], str(answer.get("note", ""))


def _follow(options: argparse.Namespace) -> ExitCode:
    since = None if options.since is None else time.time() - options.since
    after = _show_past(options)
    client = DaemonClient(socket_path())
    is_there = True
    while True:
        try:
            if not is_there and _latest(client) < after:
                after = 0  # it has lost its journal, and counts anew
            for event in client.follow(_following(after, options.id)):
                if not is_there:
                    is_there = True
                    _tell("the daemon is back")
                if event is None:
                    _stop_if_nobody_reads()
                    continue
                after = _seq(event)
                if since is None or _time(event, "at").timestamp() >= since:
                    _print_each([event], options)
            why = "the daemon has ended"
        except (DaemonNotRunningError, DaemonLostError) as error:
            why = str(error)
        if is_there:
            is_there = False
            _tell(f"{why}; waiting for it to come back")
        _stop_if_nobody_reads()
        time.sleep(_RETRY)


def _show_past(options: argparse.Namespace) -> int:
    """Returns the number to go on after."""
    try:
        events, after = _past(options, LISTED_BEFORE_FOLLOWING)
    except UsageError:
        raise
    except DuendeError as error:  # there may be a daemon, and a journal, later
        _tell(str(error))
        return 0
    _print_each(events, options)
    return after


def _following(after: int, dev_id: int | None) -> str:
    query = {"follow": 1, "after": after} | ({} if dev_id is None else {"dev_id": dev_id})
    return f"/api/v1/events?{urlencode(query)}"


def _print_each(events: Iterable[dict[str, Any]], options: argparse.Namespace) -> None:
    for event in events:
        print(json.dumps(event) if options.json else _line(event), flush=True)


def _line(event: dict[str, Any]) -> str:
    at = _time(event, "at")
    level, dev_id = str(event.get("level")), event.get("dev_id")
    shown = "" if level == "info" else printable(level.upper())
    device = "-" if dev_id is None else f"ublk{dev_id}"
    return f"{at:%Y-%m-%d %H:%M:%S}  {shown:<7}  {printable(device):<8}  {printable(str(event.get('text')), 2000)}"


def _seq(event: object) -> int:
    seq = event.get("seq") if isinstance(event, dict) else None
    if not isinstance(seq, int):
        raise not_understood()
    return seq


def _stop_if_nobody_reads() -> None:
    """Without an event there is nothing to print, and so nothing that would find a closed pipe."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if poll.poll(0):
        raise BrokenPipeError


def _tell(sentence: str) -> None:
    print(f"duende-ublkd: {printable(sentence, 1000)}", file=sys.stderr, flush=True)


# --- times


def _time(value: object, name: str) -> datetime:
    """A time of an answer, by the local clock."""
    try:
        return datetime.fromisoformat(value[name]).astimezone()  # type: ignore[index]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise not_understood() from error


def _clock(at: datetime) -> str:
    today = datetime.now().astimezone().date()
    return f"{at:%H:%M:%S}" if at.date() == today else f"{at:%Y-%m-%d %H:%M:%S}"


def _span(seconds: float) -> str:
    """10 min, 1 h 30 min, 2 d."""
    left, words = round(seconds), []
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, size)
        if count:
            words.append(f"{count} {unit}")
    return " ".join(words[:2]) or "0 s"
