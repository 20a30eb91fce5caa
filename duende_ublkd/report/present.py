"""A device as people and programs get to see it: the objects of `list --json`, the table, the sentences of `explain`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.config import duration_text
from duende_ublkd.core.ledger import is_contradicted
from duende_ublkd.core.model import Action, VerdictKind, feature_names
from duende_ublkd.core.policy import WHAT_WOULD_CHANGE_IT
from duende_ublkd.core.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from duende_ublkd.core.config import ChosenPolicy
    from duende_ublkd.core.holds import Hold
    from duende_ublkd.core.ledger import History
    from duende_ublkd.core.model import Judged, Server
    from duende_ublkd.core.trail import Trail


def as_object(device: Judged) -> dict[str, Any]:
    """One element of `list --json`. `since`: RFC 3339, when the verdict began; None stands for "not known"."""
    seen, info = device.seen, device.seen.info
    holders = seen.usage.holders if seen.usage else ()
    return {
        "dev_id": seen.dev_id,
        "verdict": device.verdict.kind.value,
        "reason": device.verdict.reason,
        "action": device.verdict.action.value,
        "rule": device.verdict.rule,
        "kernel_state": seen.state_name,
        "flags": list(feature_names(info.flags)) if info else [],
        "queues": info.queues if info else None,
        "queue_depth": info.queue_depth if info else None,
        "owner_uid": info.owner_uid if info else None,
        "server": _server_object(_server_of(device)),
        "holders": [{"kind": holder.kind, "what": holder.what} for holder in holders],
        "stuck": list(device.stuck),
        "since": _timestamp(device.since),
        "block_device": f"/dev/ublkb{seen.dev_id}" if seen.disk else None,
        "char_device": seen.char_device,
        "hold": _hold_object(device.hold),
        "recovery": _trail_object(device.trail),
    }


def table(devices: Sequence[Judged], width: int) -> str:
    """Columns for a terminal of so many characters; the last one is cut to fit."""
    if not devices:
        return "No ublk devices."
    rows = [("DEVICE", "VERDICT", "STATE", "SERVER", "SINCE", "WHY")]
    rows += [
        (
            f"ublk{device.seen.dev_id}",
            device.verdict.kind.value,
            device.seen.state_name,
            str(_server_of(device) or "-"),
            age(time.monotonic() - device.since),
            device.verdict.reason,
        )
        for device in devices
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(_line(row, widths, width) for row in rows)


@dataclass(frozen=True, slots=True)
class Explanation:
    """All that led to one verdict. `remembered`: a daemon runs, and what it knows of earlier looks is in `history`."""

    device: Judged
    history: History
    chosen: ChosenPolicy
    remembered: bool = False


def explanation_object(of: Explanation) -> dict[str, Any]:
    """`explain --json`: the object of `list --json`, the policy, the time line, and what comes next."""
    verdict, history = of.device.verdict, of.history
    return {
        **as_object(of.device),
        "would_change_it": WHAT_WOULD_CHANGE_IT.get(verdict.rule, ""),
        "next": {"in_s": verdict.look_again_in, "what": verdict.then or "it is looked at again"}
        if verdict.look_again_in is not None
        else None,
        "policy": {
            "source": of.chosen.source,
            "reason": of.chosen.reason,
            "settings": dict(_settings(of.chosen)),
        },
        "history": {
            "from_daemon": of.remembered,
            "first_seen": _timestamp(history.first_seen),
            "state_since": _timestamp(history.phase_since),
            "was_live": history.was_live,
            "idle_since": None if history.idle_since is None else _timestamp(history.idle_since),
            "death_seen": None if history.death_seen is None else _timestamp(history.death_seen),
            "last_server": _server_object(history.server),
        },
    }


def explain(of: Explanation) -> str:
    """Every fact of one device, the rule that fired, what would change the verdict, and what happens when."""
    device, history = of.device, of.history
    seen, info, verdict = device.seen, device.seen.info, device.verdict
    facts: list[tuple[str, str]] = [
        ("verdict", f"{verdict.kind.value}, for {age(time.monotonic() - device.since)}"),
        ("because", verdict.reason),
        ("rule", verdict.rule),
        ("action", verdict.action.value),
        ("next", _next_sentence(device)),
        ("changed by", WHAT_WOULD_CHANGE_IT.get(verdict.rule, "not known")),
        ("policy", f"{of.chosen.source} ({of.chosen.reason})"),
        ("settings", ", ".join(f"{name} = {value}" for name, value in _settings(of.chosen))),
        ("recovery", _trail_sentence(of)),
        ("hold", _hold_sentence(device.hold)),
        ("kernel state", f"{seen.state_name}, for {age(time.monotonic() - history.phase_since)}"),
        ("flags", ", ".join(feature_names(info.flags)) or "none" if info else "not known"),
        ("queues", f"{info.queues} of depth {info.queue_depth}" if info else "not known"),
        ("owner", f"uid {info.owner_uid}, gid {info.owner_gid}" if info else "not known"),
        ("ublksrv_pid", _pid_sentence(device)),
        ("last server", _last_server_sentence(history)),
        ("char device", _char_sentence(device)),
        ("block device", _disk_sentence(device)),
        ("held by", _holder_sentence(device)),
        ("asleep", _asleep_sentence(device)),
        ("instance", f"sysfs inode {seen.identity.sysfs_inode}" if seen.identity.sysfs_inode else "deleted"),
        ("age", "not known" if seen.age is None else f"at least {age(seen.age)}"),
        ("watched", _watched_sentence(of)),
    ]
    return "\n".join([f"ublk{seen.dev_id}", *(f"  {name + ':':<14}{what}" for name, what in facts)])


def _next_sentence(device: Judged) -> str:
    verdict = device.verdict
    if verdict.look_again_in is None:
        return "nothing, until something changes" if verdict.action in (Action.NONE, Action.ALERT) else "now"
    at = datetime.fromtimestamp(time.time() + verdict.look_again_in).astimezone()
    return f"in {age(verdict.look_again_in)}, at {at:%H:%M:%S}: {verdict.then or 'it is looked at again'}"


def _asleep_sentence(device: Judged) -> str:
    """Who sleeps in the kernel: looked for where something is wedged."""
    if device.verdict.kind is not VerdictKind.WEDGED:
        return "not looked for"
    return "; ".join(device.stuck) or "nobody that can be seen"


def _settings(chosen: ChosenPolicy) -> list[tuple[str, str]]:
    policy = chosen.policy
    settings = [
        ("orphaned", policy.orphaned.value),
        ("orphan_grace", duration_text(policy.orphan_grace)),
        ("setup_grace", duration_text(policy.setup_grace)),
        ("unserved", policy.unserved.value),
        ("recovery_deadline", duration_text(policy.recovery_deadline)),
    ]
    if rule := policy.recover:
        settings.append(("recover", printable(" ".join(rule.command))))
    return settings


def _trail_sentence(of: Explanation) -> str:
    trail, rule = of.device.trail, of.chosen.policy.recover
    if rule is None:
        return "no command configured"
    what = f"{trail.attempts} of {rule.attempts} attempts used up, each of {duration_text(rule.timeout)} at most"
    if trail.is_running:
        what += "; the last one runs"
    elif trail.trouble:
        what += f"; the last one failed: {trail.trouble}"
    return what


def _hold_object(hold: Hold | None) -> dict[str, Any] | None:
    if hold is None:
        return None
    return {"until": _timestamp(hold.until), "uid": hold.uid, "why": hold.why}


def _hold_sentence(hold: Hold | None) -> str:
    if hold is None:
        return "none"
    who = f"uid {hold.uid}" if hold.uid else "root"
    return f"for {age(hold.until - time.monotonic())} more, by {who}" + (f": {hold.why}" if hold.why else "")


def _trail_object(trail: Trail) -> dict[str, Any] | None:
    if not trail.attempts:
        return None
    return {"attempts": trail.attempts, "running": trail.is_running, "last_failure": trail.trouble or None}


def _last_server_sentence(history: History) -> str:
    if history.server is None:
        return "never seen"
    died = "" if history.death_seen is None else f", gone for {age(time.monotonic() - history.death_seen)}"
    return f"{history.server}{died}"


def _watched_sentence(of: Explanation) -> str:
    first = age(time.monotonic() - of.history.first_seen)
    return f"by the daemon for {first}" if of.remembered else "by this command alone; no daemon told of earlier looks"


def age(seconds: float) -> str:
    """A span for people: 340ms, 12s, 5m, 3h, 2d."""
    if seconds < 1:
        return f"{max(seconds, 0) * 1000:.0f}ms"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


def _line(row: Iterable[str], widths: Sequence[int], width: int) -> str:
    *cells, last = row
    line = "  ".join(cell.ljust(size) for cell, size in zip(cells, widths, strict=True)) + "  " + last
    return line if len(line) <= width else line[: max(width - 1, 1)] + "…"


def _server_of(device: Judged) -> Server | None:
    """Who serves it, did, or has it open. Not the one that the kernel tells of, where that one is alive and not believed."""
    seen, claimed = device.seen, device.seen.server
    openers = seen.usage.char_openers if seen.usage else ()
    could_serve = claimed is not None and claimed.alive is True and claimed.may_serve
    is_other = could_serve and device.verdict.rule in _NOT_BY_THE_CLAIMED
    is_believed = not (is_other or is_contradicted(seen, None))
    if claimed and claimed.alive and is_believed:
        return claimed
    if openers:
        return next((each for each in openers if each.may_serve), openers[0])
    return claimed if is_believed else None


_NOT_BY_THE_CLAIMED = (
    "served-unseen",
    "death-unnoticed",
    "leaked-descriptor",
    "death-never-noticed",
    "server-cannot-end",
)
"""Rules of a LIVE device that the process which the kernel tells of does not serve, even if it could."""


def _server_object(server: Server | None) -> dict[str, Any] | None:
    if server is None:
        return None
    return {
        "pid": server.pid,
        "alive": server.alive,
        "comm": server.comm or None,
        "exe": server.exe or None,
        "unit": server.unit or None,
    }


def _timestamp(monotonic: float) -> str:
    at = time.time() - (time.monotonic() - monotonic)
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


def _pid_sentence(device: Judged) -> str:
    info, server = device.seen.info, device.seen.server
    if info is None or info.server_pid <= 0 or server is None:
        return "none"
    life = {True: "alive", False: "no such process", None: "cannot be told"}[server.alive]
    where = f", unit {server.unit}" if server.unit else ""
    return printable(f"{server}: {life}{where}")


def _char_sentence(device: Judged) -> str:
    seen = device.seen
    if seen.char_device is None:
        return "no node" + ("" if seen.identity.sysfs_inode else " and no sysfs entry: deleted")
    if seen.usage is None:
        return f"{seen.char_device}, nobody looked who has it open"
    if seen.usage.char_openers:
        return f"{seen.char_device}, open in {', '.join(map(str, seen.usage.char_openers))}"
    return f"{seen.char_device}, " + (
        "not open" if seen.usage.complete else "nobody seen to have it open, not all could be"
    )


def _disk_sentence(device: Judged) -> str:
    disk = device.seen.disk
    if disk is None:
        return "none"
    partitions = f", {len(disk.partitions)} partitions" if disk.partitions else ""
    return f"/dev/ublkb{device.seen.dev_id} ({disk.rdev[0]}:{disk.rdev[1]}{partitions})"


def _holder_sentence(device: Judged) -> str:
    usage = device.seen.usage
    if usage is None:
        return "nobody looked"
    blind = f": {usage.blind}" if usage.blind else ""
    doubt = "" if usage.complete else f" (not everything could be seen{blind})"
    return (", ".join(map(str, usage.holders)) or "nothing") + doubt
