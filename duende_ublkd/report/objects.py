"""Holds and events as programs get to see them: the same objects over HTTP and from the commands."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def timestamp(at: float) -> str:
    """RFC 3339, to the millisecond."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
