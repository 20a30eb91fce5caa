"""A device as people and programs get to see it: the objects of `list --json`, the table, the sentences of `explain`."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.model import feature_names
from duende_ublkd.core.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from duende_ublkd.core.model import Judged, Server


def as_object(device: Judged) -> dict[str, Any]:
    """One element of `list --json`. `since`: RFC 3339, when the verdict began; None stands for "not known"."""
    seen, info = device.seen, device.seen.info
    holders = seen.usage.holders if seen.usage else ()
    return {
        "dev_id": seen.dev_id,
        "verdict": device.verdict.kind.value,
        "reason": device.verdict.reason,
        "action": device.verdict.action.value,
        "kernel_state": seen.state_name,
        "flags": list(feature_names(info.flags)) if info else [],
        "queues": info.queues if info else None,
        "queue_depth": info.queue_depth if info else None,
        "owner_uid": info.owner_uid if info else None,
        "server": _server_object(_server_of(device)),
        "holders": [{"kind": holder.kind, "what": holder.what} for holder in holders],
        "since": _timestamp(device.since),
        "block_device": f"/dev/ublkb{seen.dev_id}" if seen.disk else None,
        "char_device": seen.char_device,
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


def explain(device: Judged, policy_source: str, policy_reason: str) -> str:
    """Every fact of one device, and what follows from it."""
    seen, info = device.seen, device.seen.info
    facts: list[tuple[str, str]] = [
        ("verdict", f"{device.verdict.kind.value}, for {age(time.monotonic() - device.since)}"),
        ("because", device.verdict.reason),
        ("action", device.verdict.action.value),
        ("policy", f"{policy_source} ({policy_reason})"),
        ("kernel state", seen.state_name),
        ("flags", ", ".join(feature_names(info.flags)) or "none" if info else "not known"),
        ("queues", f"{info.queues} of depth {info.queue_depth}" if info else "not known"),
        ("owner", f"uid {info.owner_uid}, gid {info.owner_gid}" if info else "not known"),
        ("ublksrv_pid", _pid_sentence(device)),
        ("char device", _char_sentence(device)),
        ("block device", _disk_sentence(device)),
        ("held by", _holder_sentence(device)),
        ("age", "not known" if seen.age is None else f"at least {age(seen.age)}"),
    ]
    if device.verdict.look_again_in is not None:
        facts.append(("looks again", f"in {age(device.verdict.look_again_in)}"))
    return "\n".join([f"ublk{seen.dev_id}", *(f"  {name + ':':<14}{what}" for name, what in facts)])


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
    seen = device.seen
    if seen.server and seen.server.alive:
        return seen.server
    if seen.usage and seen.usage.char_openers:
        return seen.usage.char_openers[0]
    return seen.server


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
    doubt = "" if usage.complete else " (not everything could be seen)"
    return (", ".join(map(str, usage.holders)) or "nothing") + doubt
