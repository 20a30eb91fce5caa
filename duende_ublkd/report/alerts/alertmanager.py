"""Alertmanager, by its API v2: POST /api/v2/alerts with a list of alerts.

Facts:
- An alert is its labels: what is raised and what is over has the same ones, so nothing that changes is among them. The
  key of ours makes two faults of one device two alerts.
- The members of a cluster tell each other of notifications and not of alerts: each gets all. One that takes them is enough.
- An alert is over when its endsAt is past. A firing one gets an endsAt, too, some resends away, so that it ends by itself
  when the daemon does; Prometheus does the same. One for trial ends by itself in any case.
- One that begins or ends in the future fires until then, whatever it is said to be: what was noted while the clock was
  ahead counts as of now.
"""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.text import printable
from duende_ublkd.report.alerts.answer import Taken
from duende_ublkd.report.alerts.aside import UndeliveredError
from duende_ublkd.report.alerts.posting import Target, post

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PATH = "/api/v2/alerts"
MOMENT = timedelta(minutes=5)
"""That an alert fires which nobody sends again: as long as Alertmanager's own resolve_timeout would have it."""
_RESENDS = 4  # missed ones until a firing alert ends by itself; as Prometheus


async def deliver(targets: Sequence[Target], notices: Iterable[Mapping[str, Any]]) -> Taken:
    """Send to all members. UndeliveredError: none took it."""
    resend = float(targets[0].sink.get("resend") or 60.0)
    now = datetime.now(UTC)
    alerts = {
        notice["key"]: alert_object(notice, targets[0].sink, now, resend) for notice in notices
    }  # the latest of each
    body = json.dumps(list(alerts.values())).encode()
    told = await asyncio.gather(*(_tell(target, body) for target in targets))
    troubles = [(target, trouble) for target, trouble in zip(targets, told, strict=True) if trouble]
    texts = [f"{target.place}: {trouble}" if len(targets) > 1 else str(trouble) for target, trouble in troubles]
    if len(troubles) == len(targets):
        is_permanent = all(trouble.is_permanent for _, trouble in troubles)
        raise UndeliveredError("; ".join(texts), is_permanent=is_permanent)
    if troubles:
        detail = f"taken by {len(targets) - len(troubles)} of {len(targets)}; not by {'; '.join(texts)}"
        return Taken(detail, ", ".join(target.place for target, _ in troubles))
    return Taken(f"taken by {', '.join(target.place for target in targets)}")


async def _tell(target: Target, body: bytes) -> UndeliveredError | None:
    """A member that hangs has its own time limit: the others are not to be lost with it."""
    try:
        await target.in_time(post(target, body, {}))
    except UndeliveredError as error:
        return error
    return None


def alert_object(notice: Mapping[str, Any], sink: Mapping[str, Any], now: datetime, resend: float) -> dict[str, Any]:
    """A postable alert. `resend`: seconds until it is sent again while it lasts."""
    starts_at = min(datetime.fromisoformat(notice["raised_at"]), now)
    return {
        "labels": labels_of(notice, sink),
        "annotations": {
            "summary": printable(str(notice["summary"]), 1000),
            "description": _description(notice),
            "runbook_url": printable(str(notice["runbook_url"]), 300),
        },
        "startsAt": starts_at.isoformat(timespec="milliseconds"),
        "endsAt": _ends_at(notice, starts_at, now, resend).isoformat(timespec="milliseconds"),
    }


def labels_of(notice: Mapping[str, Any], sink: Mapping[str, Any]) -> dict[str, str]:
    """Its identity. Ours are not to be changed by the configuration's; an empty one would be no label."""
    given = {**(notice.get("labels") or {}), **(sink.get("labels") or {})}
    ours = {
        "alertname": name_of(str(notice["kind"])),
        "severity": notice["severity"],
        "kind": notice["kind"],
        "key": notice["key"],
        "host": notice["host"],
        "dev_id": "" if notice.get("dev_id") is None else notice["dev_id"],
    }
    return {name: printable(str(value), 1000) for name, value in {**given, **ours}.items() if str(value)}


def name_of(kind: str) -> str:
    """recovery-given-up: DuendeUblkdRecoveryGivenUp."""
    return "DuendeUblkd" + "".join(word.capitalize() for word in kind.split("-"))


def _ends_at(notice: Mapping[str, Any], starts_at: datetime, now: datetime, resend: float) -> datetime:
    if notice["state"] == "over" and notice.get("over_at"):
        over_at = max(datetime.fromisoformat(notice["over_at"]), starts_at)  # one that ends before it begins is refused
        return min(over_at, now)
    again = timedelta() if notice["state"] == "test" else timedelta(seconds=_RESENDS * resend)
    return now + max(again, MOMENT)


def _description(notice: Mapping[str, Any]) -> str:
    """What the facts add to the summary; one line each."""
    lines = [f"{name}: {_shown(value)}" for name, value in (notice.get("facts") or {}).items()]
    about = (
        f"ublk{notice['dev_id']} on {notice['host']}" if notice.get("dev_id") is not None else f"on {notice['host']}"
    )
    over = [f"over: {printable(str(notice['over_why']), 1000)}"] if notice.get("over_why") else []
    return "\n".join([printable(f"{about}: {notice['summary']}", 1000), *over, *lines[:_MOST_FACTS]])


_MOST_FACTS = 30


def _shown(value: object) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 200)
