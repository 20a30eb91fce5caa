"""Holds, events and alerts as programs get to see them: over HTTP, from the commands, and sent to the sinks of alerts."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.alerting import RUNBOOK

if TYPE_CHECKING:
    from collections.abc import Mapping

    from duende_ublkd.core.alerting import Alert
    from duende_ublkd.core.delivery import State
    from duende_ublkd.core.holds import Hold
    from duende_ublkd.report.store import Record


def hold_object(hold: Hold, *, now: float, at: float) -> dict[str, Any]:
    """A hold; `now` and `at` are the same moment by CLOCK_MONOTONIC and by the epoch.

    `whatever_has_the_id` False: the hold ends with the device that it was set on.
    """
    return {
        "dev_id": hold.dev_id,
        "since": timestamp(at - (now - hold.since)),
        "until": timestamp(at + (hold.until - now)),
        "seconds_left": round(max(hold.until - now, 0.0), 3),
        "uid": hold.uid,
        "why": hold.why,
        "whatever_has_the_id": hold.instance is None,
    }


def event_object(record: Record) -> dict[str, Any]:
    """An event of the journal; `seq` is its place in it, for asking what came after."""
    event = record.event
    return {
        "seq": record.seq,
        "at": timestamp(event.at),
        "kind": event.kind.value,
        "level": event.level.value,
        "dev_id": event.dev_id,
        "text": event.text,
        "facts": event.facts,
    }


def alert_object(alert: Alert) -> dict[str, Any]:
    """An alert; `over_at` null: it is open."""
    times = {"raised_at": timestamp(alert.raised_at), "over_at": alert.over_at and timestamp(alert.over_at)}
    return {**alert.to_object(), **times}


def notice_object(alert: Alert, state: State, *, host: str, version: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """What a sink is told of an alert; the body that a webhook gets. `version` 1: keys may come, none goes or changes."""
    return {
        "version": 1,
        "state": state.value,
        "key": alert.key,
        "kind": alert.kind.value,
        "severity": alert.severity.value,
        "dev_id": alert.dev_id,
        "instance": alert.instance,
        "summary": alert.summary,
        "runbook_url": f"{RUNBOOK}#{alert.runbook}",
        "host": host,
        "daemon_version": version,
        "raised_at": timestamp(alert.raised_at),
        "over_at": alert.over_at and timestamp(alert.over_at),
        "over_why": alert.over_why,
        "facts": alert.facts,
        "labels": dict(labels),
    }


def timestamp(at: float) -> str:
    """RFC 3339, to the millisecond."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
