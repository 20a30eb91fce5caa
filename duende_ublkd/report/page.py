"""The status page: what a person on call wants in one look, as HTML that is complete without scripts.

Rules:
1. Everything that is shown goes through `_text`: made printable, cut, and escaped. Names come from whoever chose them.
2. The page takes nothing from anywhere else. Its policy lets the browser run and draw what is in here, by hash, and fetch
   from this daemon; there is no `style=`, no `on…=`, and no form.
3. There is one way that the page comes about: `render`. Its script asks for `status_object`, which is small however many
   devices there are, and where `tag` is another one, for the page itself; of that it takes over what is different, so that
   scroll position, focus and selection stay. The tag covers all that is shown, but for what the script counts on by itself.
4. Template, style and script are read when this module is imported: a page is made without touching a disk.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.alerting import AlertKind
from duende_ublkd.core.model import EventKind, Level, VerdictKind
from duende_ublkd.core.policy import WHAT_WOULD_CHANGE_IT
from duende_ublkd.core.text import printable
from duende_ublkd.report.glance import LATE, Standing, State, is_failing, look_at, moment
from duende_ublkd.report.objects import timestamp
from duende_ublkd.report.present import age

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from duende_ublkd.report.glance import Glance, Trouble
    from duende_ublkd.report.store import Record

EVENTS = 20  # the newest that are shown
MANY = 25  # devices in order: more are folded away, so that what matters stays in sight
FILTERED = 6  # devices from which on a filter helps
_MOST_ALERTS = 100
_MOST_HOLDERS = 6
_LONGEST_TEXT = 1500  # characters
_DAY = 86_400

_PLACE = re.compile(r"\{\{([a-z-]+)\}\}")


def _load() -> tuple[str, str]:
    """The template with its style and script, and the policy that lets them through."""
    here = Path(__file__).parent
    template, style, script = ((here / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    policy = (
        "default-src 'none'",
        f"script-src {_hash(script)}",
        f"style-src {_hash(style)}",
        "img-src data:",  # the icon in the tab
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return template.replace("{{style}}", style).replace("{{script}}", script), "; ".join(policy)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_TEMPLATE, _POLICY = _load()


@dataclass(frozen=True, slots=True)
class Health:
    """How the daemon itself does. `lag`: of its timers, in seconds; `locked`: bytes; `dropped`: events since the start."""

    lag: float = 0.0
    overdue: int = 0
    journal_trouble: str = ""
    journal_waiting: int = 0
    journal_dropped: int = 0
    locked: int = 0


@dataclass(frozen=True, slots=True)
class View:
    """Everything that the page shows. Times are seconds since the epoch; None: it has not happened yet.

    `devices`: as `present.as_object` makes them; `holds`: as `objects.hold_object` does; `events`: oldest first; `alerts`:
    {"alerts": [...], "sinks": [...], "undelivered": [...]} as the API has them; `trouble`: why the driver cannot be asked,
    and `hint` what to type then; `look_every`: seconds between full looks; `runbook`: the address of the page that alerts'
    anchors lead into, "" for none.
    """

    version: str
    host: str
    started_at: float
    last_look_at: float | None = None
    devices: Sequence[Mapping[str, Any]] = ()
    holds: Sequence[Mapping[str, Any]] = ()
    events: Sequence[Record] = ()
    alerts: Mapping[str, Any] = field(default_factory=dict)
    health: Health = Health()
    trouble: str = ""
    hint: str = ""
    features: tuple[str, ...] = ()
    slots_max: int | None = None
    dry_run: bool = False
    look_every: float = 30.0
    runbook: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """`policy`: the Content-Security-Policy that it is to be sent with."""

    body: bytes
    policy: str


def render(view: View, now: float) -> Page:
    """The page of this moment."""
    parts = _parts(view, look_at(view, now), now)
    return Page(_PLACE.sub(lambda place: parts[place[1]], _TEMPLATE).encode(), _POLICY)


def status_object(view: View, now: float) -> dict[str, Any]:
    """Whether anything is wrong, and the daemon's health, as JSON values: for programs, and for the page's own script."""
    glance = look_at(view, now)
    health = view.health
    return {
        "now": timestamp(now),
        "clock": _clock_text(now, now),
        "version": view.version,
        "host": view.host,
        "state": glance.state.value,
        "sentence": glance.sentence,
        "troubles": [{"gist": each.gist, "text": each.text} for each in glance.troubles],
        "verdicts": dict(glance.counts),
        "holds": len(view.holds),
        "alerts": sum(not alert.get("over_at") for alert in view.alerts.get("alerts", ())),
        "undelivered": len(view.alerts.get("undelivered", ())),
        "dry_run": view.dry_run,
        "started_at": timestamp(view.started_at),
        "last_look_at": None if view.last_look_at is None else timestamp(view.last_look_at),
        "driver": {"up": not view.trouble, "trouble": view.trouble, "features": list(view.features)},
        "health": {
            "event_loop_lag_seconds": round(health.lag, 6),
            "commands_overdue": health.overdue,
            "memory_locked_bytes": health.locked,
            "journal": {
                "up": not health.journal_trouble,
                "trouble": health.journal_trouble,
                "waiting_events": health.journal_waiting,
                "dropped_events": health.journal_dropped,
            },
        },
        "tag": _tag(view, glance),
    }


@dataclass(slots=True)
class _Moment:
    """One view, and what was made of it so far. `until`: by the clock of `Pages`."""

    view: View
    now: float
    until: float
    page: Page | None = None
    status: dict[str, Any] | None = None


class Pages:
    """Page and status, of one view for `fresh_for` seconds: many who look cost no more than one, and what the script hears
    in the one is in the other.
    """

    def __init__(
        self, view: Callable[[], View], *, fresh_for: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._view = view
        self._fresh_for = fresh_for
        self._clock = clock
        self._last: _Moment | None = None

    def page(self) -> Page:
        """For a browser."""
        last = self._moment()
        last.page = last.page or render(last.view, last.now)
        return last.page

    def status(self) -> dict[str, Any]:
        """For programs, and for the page's own script."""
        last = self._moment()
        last.status = last.status or status_object(last.view, last.now)
        return last.status

    def _moment(self) -> _Moment:
        if self._last is None or self._clock() >= self._last.until:
            self._last = _Moment(self._view(), time.time(), self._clock() + self._fresh_for)
        return self._last


def _tag(view: View, glance: Glance) -> str:
    """Another one where the page would show something else, ages left out: of the clock's own jitter, too."""
    shown = [
        *(glance.state.value, glance.sentence, [each.text for each in glance.troubles]),
        [{name: value for name, value in device.items() if name not in _VOLATILE} for device in view.devices],
        [{name: value for name, value in hold.items() if name not in _VOLATILE} for hold in view.holds],
        [record.seq for record in view.events[-EVENTS:]],
        *(view.alerts, _daemon_facts(view), view.dry_run, view.version, view.host, view.runbook),
    ]
    return hashlib.blake2s(json.dumps(shown, default=str).encode("utf-8", "replace"), digest_size=12).hexdigest()


_VOLATILE = {"since", "until", "seconds_left", "hold"}


# --- the parts ------------------------------------------------------------------------------------------------------


def _parts(view: View, glance: Glance, now: float) -> dict[str, str]:
    return {
        "title": _text(f"{glance.sentence} - {view.host}"),
        "icon": _ICONS[glance.state],
        "host": _text(view.host),
        "version": _text(view.version),
        "tag": _tag(view, glance),
        "now": f"{now:.3f}",
        "clock": _clock(now, now),
        "zone": _text(datetime.fromtimestamp(now).astimezone().strftime("%Z")),
        "dry-run": _DRY_RUN if view.dry_run else "",
        "banner": _banner(glance),
        "counts": _counts(glance),
        "devices": _devices(view, glance, now),
        "alerts": _alerts(view, now),
        "holds": _holds(view.holds, now),
        "events": _events(view.events, now),
        "daemon": _daemon(view, now),
    }


def _text(value: object, limit: int = _LONGEST_TEXT) -> str:
    """Rule 1."""
    return html.escape(printable(str(value), limit))


def _icon(name: str) -> str:
    return f'<svg class="i" aria-hidden="true"><use href="#i-{name}"></use></svg>'


def _favicon(color: str, mark: str) -> str:
    drawing = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'><circle cx='8' cy='8' r='8' fill='{color}'/>"
        f"<path d='{mark}' fill='none' stroke='white' stroke-width='2.2' stroke-linecap='round'/></svg>"
    )
    return f"data:image/svg+xml;base64,{base64.b64encode(drawing.encode()).decode()}"


_ICONS = {
    State.WELL: _favicon("#1a7f37", "M4.5 8.5l2.5 2.5 4.5-5.5"),
    State.TENDED: _favicon("#8a5a00", "M8 4v4.3l2.8 1.7"),
    State.WRONG: _favicon("#c62828", "M8 3.8v5M8 12.2v.1"),
}
_DRY_RUN = (
    '<p class="note" id="dry-run"><strong>Dry run.</strong> '
    "The daemon says what it would do, and changes nothing on this machine.</p>"
)
_STANDING_ICONS = {
    Standing.PERSON: "wrong",
    Standing.TENDED: "tended",
    Standing.ON_HOLD: "hold",
    Standing.CALM: "well",
}
_STANDING_WORDS = {
    Standing.PERSON: "needs a person",
    Standing.TENDED: "taken care of",
    Standing.ON_HOLD: "on hold",
    Standing.CALM: "as it should be",
}


def _banner(glance: Glance) -> str:
    lines = "".join(_trouble(each) for each in glance.troubles)
    troubles = f'<ul id="troubles">{lines}</ul>' if lines else ""
    state = glance.state.value
    return f'<div id="banner" class="{state}" role="status">{_icon(state)}<h1>{_text(glance.sentence)}</h1>{troubles}</div>'


def _trouble(trouble: Trouble) -> str:
    head, colon, rest = trouble.text.partition(": ")
    return f'<li><a href="#{_text(trouble.where)}">{_text(head)}</a>{colon}{_text(rest)}</li>'


def _counts(glance: Glance) -> str:
    """Every verdict, those that there are none of too: what is missing says something as well."""
    tiles = []
    for kind in VerdictKind:
        count = glance.counts[kind.value]
        none = "" if count else ' class="none"'
        link = f'<a href="#devices" data-verdict="{kind.value}"><b>{count}</b> {kind.value}</a>'
        tiles.append(f'<li id="n-{kind.value}"{none}>{link}</li>')
    return f'<ul id="counts">{"".join(tiles)}</ul>'


def _clock(at: float, now: float) -> str:
    """This host's time; with the day where it may be another one."""
    return f'<time datetime="{timestamp(at)}" title="{timestamp(at)}">{_clock_text(at, now)}</time>'


def _clock_text(at: float, now: float) -> str:
    return f"{datetime.fromtimestamp(at).astimezone():{'%H:%M:%S' if abs(now - at) < _DAY / 2 else '%d %b %H:%M'}}"


def _since(at: float, now: float, name: str = "") -> str:
    """An age, which the script counts on."""
    known_as = f' id="{name}"' if name else ""
    return f'<time{known_as} datetime="{timestamp(at)}" title="{timestamp(at)}" data-at="{at:.0f}">{_span(now - at)}</time>'


def _span(seconds: float) -> str:
    """No milliseconds: nobody reads them here."""
    return age(max(round(seconds), 1))


def _table(name: str, heads: Sequence[str], rows: Iterable[str]) -> str:
    """Roles are written down, since on a phone a table is laid out as something else and would lose them."""
    head = "".join(f'<th scope="col" role="columnheader">{each}</th>' for each in heads)
    return (
        f'<table id="{name}" role="table"><thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup" id="{name}-rows">{"".join(rows)}</tbody></table>'
    )


def _row(name: str, first: str, cells: Iterable[str], *, more: str = "") -> str:
    rest = "".join(f'<td role="cell">{cell}</td>' for cell in cells)
    return f'<tr id="{name}" role="row"{more}><th scope="row" role="rowheader">{first}</th>{rest}</tr>'


# Devices


_DEVICE_HEADS = ("Device", "Verdict", "Why", "Used by", "Since")


def _devices(view: View, glance: Glance, now: float) -> str:
    if not glance.devices:
        nothing = (
            "Not known: the driver cannot be asked." if view.trouble else "There are no ublk devices on this machine."
        )
        return f'<p class="empty" id="no-devices">{nothing}</p>'
    calm = [device for standing, device in glance.devices if standing is Standing.CALM]
    folded = calm if len(calm) > MANY else []
    shown = glance.devices[: len(glance.devices) - len(folded)]
    parts = [_TOOLBAR] if len(glance.devices) >= FILTERED else []
    if shown:
        rows = (_device(device, standing, view, now) for standing, device in shown)
        parts.append(_table("first", _DEVICE_HEADS, rows))
    if folded:
        rows = (_device(device, Standing.CALM, view, now) for device in folded)
        words = "All" if not shown else "The other"
        parts.append(
            f'<details id="calm"><summary>{words} {len(folded)} devices, which are as they should be</summary>'
            f"{_table('rest', _DEVICE_HEADS, rows)}</details>"
        )
    return "".join(parts)


_TOOLBAR = (
    '<div id="filter" class="filter" data-keep hidden><label>Filter <input type="search" id="filter-text" '
    'placeholder="name, server, unit, holder ..." autocomplete="off" spellcheck="false"></label>'
    '<label>Verdict <select id="filter-verdict"><option value="">every</option>'
    + "".join(f"<option>{kind.value}</option>" for kind in VerdictKind)
    + '</select></label><output id="filter-count" role="status"></output></div>'
)


def _device(device: Mapping[str, Any], standing: Standing, view: View, now: float) -> str:
    name, verdict = f"ublk{device['dev_id']}", _text(device["verdict"])
    since = moment(device["since"])
    state = "" if device["verdict"] == "live" else f'<span class="sub">{_text(device["kernel_state"])}</span>'
    chip = (
        f'<span class="chip s{standing.value}">{_icon(_STANDING_ICONS[standing])}{verdict}</span>{state}'
        f'<span class="sr">, {_STANDING_WORDS[standing]}</span>'
    )
    cells = (
        chip,
        f"<p>{_text(device['reason'])}</p>{_further(device, standing, view)}",
        _users(device),
        "" if since is None else _since(since, now),
    )
    return _row(name, name, cells, more=f' data-verdict="{verdict}"')


def _further(device: Mapping[str, Any], standing: Standing, view: View) -> str:
    """What a person who is needed has to know beyond the sentence."""
    lines = []
    if trail := device["recovery"]:
        now_or_then = "its command runs" if trail["running"] else f"the last failed: {trail['last_failure']}"
        counted = f"{trail['attempts']} attempt{'' if trail['attempts'] == 1 else 's'} to recover it"
        lines.append(("Recovery", f"{counted}; {now_or_then if trail['last_failure'] or trail['running'] else 'over'}"))
    if device["stuck"]:
        lines.append(("Asleep in the kernel", "; ".join(device["stuck"])))
    if standing is Standing.PERSON:
        lines.append(("What it takes", WHAT_WOULD_CHANGE_IT.get(device["rule"], "not known")))
    told = "".join(f"<dt>{head}</dt><dd>{_text(text)}</dd>" for head, text in lines)
    if standing is Standing.PERSON:
        given_up = device["rule"] == "given-up"  # of core/policy.py
        anchor = AlertKind.RECOVERY_GIVEN_UP.runbook if given_up else f"alert-{device['verdict']}"
        runbook = _runbook(view, anchor)
        told += f"<dt>More</dt><dd><code>duende-ublkd explain {device['dev_id']}</code>; runbook: {runbook}</dd>"
    return f"<dl>{told}</dl>" if told else ""


def _runbook(view: View, anchor: str) -> str:
    """What to do about it: a link, where there is an address to link to."""
    where = _text(f"{view.runbook}#{anchor}" if view.runbook else anchor)
    if view.runbook.startswith(("https://", "http://")):
        return f'<a href="{where}" rel="noreferrer">{_text(anchor)}</a>'
    return where


def _users(device: Mapping[str, Any]) -> str:
    server, holders = device["server"], device["holders"]
    lines = [_text(server["unit"])] if server and server["unit"] else []
    lines += [f"{_text(holder['kind'])} {_text(holder['what'])}" for holder in holders[:_MOST_HOLDERS]]
    if len(holders) > _MOST_HOLDERS:
        lines.append(f"and {len(holders) - _MOST_HOLDERS} more")
    return f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>" if lines else ""


# Alerts


def _alerts(view: View, now: float) -> str:
    alerts = view.alerts.get("alerts", ())
    sinks = view.alerts.get("sinks", ())
    undelivered = view.alerts.get("undelivered", ())
    parts = [_open_alerts(view, alerts, now)]
    if undelivered:
        parts += [
            "<h3>Could not be delivered</h3>",
            _table(
                "undelivered",
                ("Sink", "Alert", "Since"),
                (_undelivered(each, now) for each in undelivered[:_MOST_ALERTS]),
            ),
        ]
    parts.append("<h3>Where alerts go</h3>")
    if sinks:
        parts.append(_table("sinks", ("Sink", "State"), (_sink(each, now) for each in sinks)))
    else:
        parts.append(
            '<p class="empty" id="sinks">Nowhere: no sink is configured. What people are told is on this page and in '
            "the journal.</p>"
        )
    return "".join(parts)


def _open_alerts(view: View, alerts: Sequence[Mapping[str, Any]], now: float) -> str:
    if not alerts:
        return '<p class="empty" id="no-alerts">No alert is open.</p>'
    rows = [_alert(view, alert, now) for alert in alerts[:_MOST_ALERTS]]
    left = len(alerts) - len(rows)
    more = f'<p class="empty" id="more-alerts">and {left} more: /api/v1/alerts</p>' if left else ""
    return _table("open", ("Alert", "What", "Since"), rows) + more


_SEVERITY_ICONS = {"info": "info", "warning": "tended", "critical": "wrong"}
_SEVERITY_STANDING = {"info": 3, "warning": 1, "critical": 0}


def _alert(view: View, alert: Mapping[str, Any], now: float) -> str:
    severity = alert["severity"]
    chip = (
        f'<span class="chip s{_SEVERITY_STANDING.get(severity, 1)}">{_icon(_SEVERITY_ICONS.get(severity, "tended"))}'
        f'{_text(alert["kind"])}</span><span class="sub">{_text(severity)}</span>'
    )
    raised = moment(alert["raised_at"])
    over = "<p>It is over.</p>" if alert.get("over_at") else ""
    late = ", ".join(alert.get("waits_for", ()))
    untold = f'<p class="late">{_icon("tended")}not yet told to {_text(late)}</p>' if late else ""
    runbook = f'<span class="sub">runbook: {_runbook(view, alert["runbook"])}</span>'
    what = f"<p>{_text(alert['summary'])}</p>{over}{untold}{runbook}"
    cells = (what, "" if raised is None else _since(raised, now))
    return _row(f"a-{_key(json.dumps([alert['key'], alert['raised_at']]))}", chip, cells)


def _key(text: str) -> str:
    """Of foreign text, what an id may be."""
    return hashlib.blake2s(text.encode("utf-8", "replace"), digest_size=6).hexdigest()


def _undelivered(entry: Mapping[str, Any], now: float) -> str:
    at = moment(entry["at"])
    what = f"<p>{_text(entry['summary'])}</p><p>{_text(entry['why'])}</p>"
    name = _key(json.dumps([entry["key"], entry["sink"], entry["notice"], at]))
    sink = f'{_text(entry["sink"])}<span class="sub">{_text(entry["notice"])}</span>'
    return _row(f"u-{name}", sink, (what, "" if at is None else _since(at, now)))


_COUNTERS = ("delivered", "failed", "undeliverable", "dropped", "suppressed")


def _sink(sink: Mapping[str, Any], now: float) -> str:
    waiting, error = sink.get("waiting", 0), sink.get("last_error")
    word, icon, standing = _sink_state(sink)
    lines = [f'<span class="chip s{standing}">{_icon(icon)}{word}</span>']
    if error:
        lines.append(f"<p>{_text(error)}</p>")
    if missed := sink.get("missed"):
        lines.append(f"<p>the last one did not reach {_text(missed)}</p>")
    if waiting:
        again = moment(sink.get("next_try_at"))
        lines.append(f"<p>{waiting} waiting{'' if again is None else f', next try {_clock(again, now)}'}</p>")
    if (well := moment(sink.get("last_ok_at"))) is not None:
        lines.append(f"<p>last delivered {_clock(well, now)}</p>")
    counts = {**sink.get("stats", {}), **sink}
    counted = ", ".join(f"{counts[name]} {name}" for name in _COUNTERS if counts.get(name))
    lines.append(f'<span class="sub">{counted or "nothing yet"}</span>')
    kind = "" if sink["kind"] == sink["name"] else f'<span class="sub">{_text(sink["kind"])}</span>'
    return _row(f"k-{_key(sink['name'])}", f"{_text(sink['name'])}{kind}", ("".join(lines),))


def _sink_state(sink: Mapping[str, Any]) -> tuple[str, str, int]:
    """A word, an icon, and how it is coloured."""
    if is_failing(sink):
        return "failing", "wrong", 0
    if sink.get("last_error"):
        return "last one failed", "tended", 1
    if sink.get("missed"):
        return "in part", "tended", 1
    return ("waiting", "tended", 1) if sink.get("waiting") else ("well", "well", 3)


# Holds, events, the daemon


def _holds(holds: Sequence[Mapping[str, Any]], now: float) -> str:
    if not holds:
        return '<p class="empty" id="no-holds">Nothing is on hold.</p>'
    return _table("hold-table", ("Device", "By", "For", "Left"), (_hold(hold, now) for hold in holds))


def _hold(hold: Mapping[str, Any], now: float) -> str:
    until = now + hold["seconds_left"]
    at = timestamp(until)
    left = f'<time datetime="{at}" title="until {at}" data-until="{until:.0f}">{_span(until - now)}</time>'
    who = f"uid {hold['uid']}" if hold["uid"] else "root"
    cells = (who, _text(hold["why"]) or "no reason given", left)
    return _row(f"h-{hold['dev_id']}", f"ublk{hold['dev_id']}", cells)


_LEVEL_ICONS = {Level.INFO: "info", Level.WARNING: "tended", Level.ERROR: "wrong"}


def _events(events: Sequence[Record], now: float) -> str:
    if not events:
        return '<p class="empty" id="no-events">Nothing has happened since the daemon began.</p>'
    items = (_event(record, now) for record in reversed(events[-EVENTS:]))
    return f'<ol id="event-list" reversed>{"".join(items)}</ol>'


def _event(record: Record, now: float) -> str:
    event = record.event
    level = event.level.value
    word = "alert" if event.kind is EventKind.ALERT else level
    marked = f'<span class="chip l-{level}">{_icon(_LEVEL_ICONS[event.level])}{word}</span>'
    return f'<li id="e-{record.seq}">{_clock(event.at, now)}{marked}<span>{_text(event.text)}</span></li>'


def _daemon(view: View, now: float) -> str:
    rows = [(head, _text(text), good) for head, text, good in _daemon_facts(view)]
    looked = "not yet" if view.last_look_at is None else f"{_since(view.last_look_at, now, 'looked')} ago"
    rows[1:1] = [("Last full look", looked, True), ("Running for", _since(view.started_at, now), True)]
    told = "".join(
        f"<dt>{head}</dt><dd{'' if good else ' class=bad'}>{'' if good else _icon('wrong')}{text}</dd>"
        for head, text, good in rows
    )
    return f"<dl>{told}</dl>"


def _daemon_facts(view: View) -> list[tuple[str, str, bool]]:
    """What is said, and whether it is good; in steps that are coarse enough not to change all the time."""
    health = view.health
    journal = "written" + (f", {health.journal_waiting} events wait" if health.journal_waiting else "")
    if health.journal_trouble:
        journal = f"{health.journal_trouble}; {health.journal_waiting} events wait"
    if health.journal_dropped:
        journal += f", {health.journal_dropped} are lost"
    slots = f" of {view.slots_max}" if view.slots_max is not None else ""
    return [
        ("ublk driver", view.trouble or "answers", not view.trouble),
        ("Overdue commands", str(health.overdue) if health.overdue else "none", not health.overdue),
        ("Timers late by", _lag(health.lag), health.lag < LATE),
        ("Journal", journal, not health.journal_trouble and not health.journal_dropped),
        ("Locked memory", f"{health.locked / (1 << 20):.0f} MiB" if health.locked else "none", True),
        ("Ids in use", f"{len(view.devices)}{slots}", True),
        ("Driver's features", ", ".join(view.features) or "not told", True),
    ]


def _lag(seconds: float) -> str:
    if seconds >= LATE:
        return f"{seconds:.1f} s"
    for step in (0.01, 0.1):
        if seconds <= step:
            return f"less than {step * 1000:.0f} ms"
    return "less than 1 s"
