"""What a person on call sees first: whether anything is wrong, in one sentence, and what needs a person, foremost.

Rules:
1. Nothing is made up here: what is wrong is what the verdicts, the driver, the alerts and the daemon's own figures say.
2. Whether a device needs a person is its verdict's action, which knows of holds: a wedged one on hold still does.
3. Silence is not health: without a look, or with the last one long ago, "nothing is wrong" is not said.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.alerting import AlertKind
from duende_ublkd.core.model import Action, VerdictKind
from duende_ublkd.report.present import age

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from duende_ublkd.report.page import View

LATE = 1.0  # seconds of the event loop's lag that are trouble; a deadline of the daemon's is a few seconds
MISSED_LOOKS = 4  # times the interval of full looks: fewer can be one slow look
_NAMED = 5  # devices told of singly in what is wrong


class State(Enum):
    """Of everything together."""

    WELL = "well"
    TENDED = "tended"  # not as it should be, and taken care of
    WRONG = "wrong"  # a person is needed


class Standing(IntEnum):
    """Of one device, in the order in which a person wants to see them."""

    PERSON = 0  # it needs one
    TENDED = 1  # not as it should be: the daemon, a new server or the kernel is at it
    ON_HOLD = 2
    CALM = 3


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that is wrong. `gist`: a clause for the sentence; `where`: the id of the place on the page."""

    gist: str
    text: str
    where: str


@dataclass(frozen=True, slots=True)
class Glance:
    """The whole in one look."""

    state: State
    sentence: str
    troubles: tuple[Trouble, ...]
    devices: tuple[tuple[Standing, Mapping[str, Any]], ...]  # in the order of their standing
    counts: Mapping[str, int]  # by verdict, every one


def look_at(view: View, now: float) -> Glance:
    """Judge what the page is to show. `now`: seconds since the epoch."""
    stood = tuple((standing_of(device), device) for device in view.devices)
    in_order = tuple(sorted(stood, key=_place))
    found = Counter(device["verdict"] for device in view.devices)
    counts = {kind.value: found.get(kind.value, 0) for kind in VerdictKind}
    troubles = (*_of_driver(view, now), *_of_devices(in_order), *_of_alerts(view), *_of_daemon(view))
    tended = [device for standing, device in in_order if standing is Standing.TENDED]
    if troubles:
        state, sentence = State.WRONG, _joined([trouble.gist for trouble in troubles])
    elif view.last_look_at is None:
        state, sentence = State.TENDED, "Nobody is needed yet: the first look at the devices is not done"
    elif tended:
        state, sentence = State.TENDED, f"Nobody is needed yet: {_listed(tended)}"
    else:
        state, sentence = State.WELL, f"Nothing is wrong: {_inventory(in_order, counts)}"
    return Glance(state, sentence, troubles, in_order, counts)


def standing_of(device: Mapping[str, Any]) -> Standing:
    """Of an object of `list --json`."""
    if device["action"] == Action.ALERT.value:
        return Standing.PERSON
    if device["hold"] is not None:
        return Standing.ON_HOLD
    return Standing.CALM if device["verdict"] in _CALM else Standing.TENDED


_CALM = {kind.value for kind in (VerdictKind.LIVE, VerdictKind.STARTING, VerdictKind.CLOSING)}
_WORST_FIRST = (
    *(VerdictKind.WEDGED, VerdictKind.UNSERVED, VerdictKind.UNKNOWN, VerdictKind.PINNED, VerdictKind.ORPHANED),
    *(VerdictKind.RECOVERING, VerdictKind.CLOSING, VerdictKind.STARTING, VerdictKind.LIVE),
)
_PLACES = {kind.value: place for place, kind in enumerate(_WORST_FIRST)}


def _place(stood: tuple[Standing, Mapping[str, Any]]) -> tuple[int, int, int]:
    standing, device = stood
    return standing, _PLACES.get(device["verdict"], 0), device["dev_id"]


def _of_driver(view: View, now: float) -> list[Trouble]:
    if view.trouble:
        hint = f"; try: {view.hint}" if view.hint else ""
        return [Trouble("the ublk driver cannot be asked", f"{view.trouble}{hint}", "daemon")]
    if view.last_look_at is not None and now - view.last_look_at > MISSED_LOOKS * view.look_every:
        silence = age(now - view.last_look_at)
        text = f"The last full look at the devices was {silence} ago; one is due every {age(view.look_every)}"
        return [Trouble(f"nobody has looked at the devices for {silence}", text, "daemon")]
    return []


def _of_devices(in_order: Sequence[tuple[Standing, Mapping[str, Any]]]) -> list[Trouble]:
    """One gist for all of them; each of the first few in a line of its own."""
    devices = [device for standing, device in in_order if standing is Standing.PERSON]
    if not devices:
        return []
    gist = "1 device needs a person" if len(devices) == 1 else f"{len(devices)} devices need a person"
    named = [
        Trouble(gist, f"ublk{device['dev_id']} is {device['verdict']}: {device['reason']}", f"ublk{device['dev_id']}")
        for device in devices[:_NAMED]
    ]
    left = len(devices) - len(named)
    return named + ([Trouble(gist, f"and {left} more, below", "devices")] if left else [])


def _of_alerts(view: View) -> list[Trouble]:
    silent = [sink for sink in view.alerts.get("sinks", ()) if is_failing(sink)]
    gist = "alerts do not get out"
    found = [
        Trouble(gist, f"Alerts do not reach {sink['name']}: {sink.get('last_error') or 'no answer'}", "sinks")
        for sink in silent
    ]
    if lost := _unheard(view):
        count = f"{lost} alert{'' if lost == 1 else 's'}"
        found.append(Trouble(gist, f"{count} could not be delivered: given up, and not tried again", "undelivered"))
    if dropped := view.alerts.get("dropped", 0):
        found.append(Trouble(gist, f"Alerts for which there was no place, and that are dropped: {dropped}", "alerts"))
    return found


def _unheard(view: View) -> int:
    """What was given up for a sink that has taken nothing since; one that works again is no trouble any more."""
    last_ok = {sink["name"]: moment(sink.get("last_ok_at")) or 0.0 for sink in view.alerts.get("sinks", ())}
    lost = view.alerts.get("undelivered", ())
    return sum((moment(each["at"]) or 0.0) > last_ok.get(each["sink"], 0.0) for each in lost)


def moment(value: object) -> float | None:
    """Seconds since the epoch, from them or from RFC 3339."""
    if isinstance(value, int | float):
        return float(value)
    try:
        return datetime.fromisoformat(value).timestamp() if isinstance(value, str) else None
    except ValueError:
        return None


def is_failing(sink: Mapping[str, Any]) -> bool:
    """Something waits for it that it did not take."""
    return bool(sink.get("last_error")) and bool(sink.get("waiting"))


def _of_daemon(view: View) -> list[Trouble]:
    found = []
    health = view.health
    if health.journal_trouble:
        lost = f", {health.journal_dropped} are lost" if health.journal_dropped else ""
        text = f"{health.journal_trouble}; {health.journal_waiting} events wait in memory{lost}"
        found.append(Trouble("the journal is not written", text, "daemon"))
    if health.overdue:
        text = f"Commands to the kernel past their deadline: {health.overdue}"
        found.append(Trouble("the kernel does not answer everything", text, "daemon"))
    if health.lag >= LATE:
        text = f"Timers of the daemon were late by {health.lag:.1f} s at worst within the last minute"
        found.append(Trouble("the daemon is late", text, "daemon"))
    known = {"daemon/journal"} if health.journal_trouble else set()
    known |= {"daemon/late"} if health.lag >= LATE else set()
    known |= {f"daemon/sink/{sink['name']}" for sink in view.alerts.get("sinks", ()) if is_failing(sink)}
    return found + [
        Trouble("the daemon is degraded", alert["summary"], "alerts")
        for alert in view.alerts.get("alerts", ())
        if alert["kind"] == AlertKind.DEGRADED.value and not alert["over_at"] and alert["key"] not in known
    ]


def _joined(gists: Sequence[str]) -> str:
    different = list(dict.fromkeys(gists))
    *most, last = different
    sentence = f"{', '.join(most)}, and {last}" if most else last
    return sentence[0].upper() + sentence[1:]


def _listed(devices: Sequence[Mapping[str, Any]]) -> str:
    if len(devices) == 1:
        return f"ublk{devices[0]['dev_id']} is {devices[0]['verdict']}"
    found = Counter(device["verdict"] for device in devices)
    return f"{len(devices)} devices are taken care of, " + _enumerated(found)


def _enumerated(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def _inventory(in_order: Sequence[tuple[Standing, Mapping[str, Any]]], counts: Mapping[str, int]) -> str:
    if not in_order:
        return "no ublk devices"
    total = f"{len(in_order)} device{'' if len(in_order) == 1 else 's'}"
    on_hold = sum(standing is Standing.ON_HOLD for standing, _ in in_order)
    held = f", {on_hold} on hold" if on_hold else ""
    if counts[VerdictKind.LIVE.value] == len(in_order):
        return f"{total}, {'served' if len(in_order) == 1 else 'all served'}{held}"
    words = {"served" if verdict == VerdictKind.LIVE.value else verdict: count for verdict, count in counts.items()}
    return f"{total}, {_enumerated(words)}{held}"
