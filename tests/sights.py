"""What the status page is shown with in tests: a quiet machine, one with trouble, and a crowd."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from duende_ublkd.core.holds import Hold
from duende_ublkd.core.model import (
    Action,
    DevInfo,
    Disk,
    Event,
    EventKind,
    Holder,
    Identity,
    Judged,
    KernelState,
    Level,
    Observation,
    Server,
    Usage,
    Verdict,
    VerdictKind,
)
from duende_ublkd.core.trail import NO_TRAIL
from duende_ublkd.report import objects, present
from duende_ublkd.report.page import Health, View
from duende_ublkd.report.store import Record

DEAD = KernelState.DEAD
QUIESCED = KernelState.QUIESCED


def a_device(
    dev_id: int,
    kind: VerdictKind = VerdictKind.LIVE,
    reason: str = "",
    action: Action = Action.NONE,
    *,
    rule: str = "served",
    state: int = KernelState.LIVE,
    age: float = 90.0,
    holders: Sequence[Holder] = (),
    server: Server | None = None,
    **judged: Any,  # noqa: ANN401 - of Judged
) -> dict[str, Any]:
    """An element of `list --json`."""
    now = time.monotonic()
    server = server or Server(
        4000 + dev_id, alive=True, comm="ublk.loop", exe="/usr/bin/ublk", unit=f"disk-{dev_id}.service"
    )
    seen = Observation(
        dev_id,
        now,
        DevInfo(dev_id, state=state, server_pid=server.pid, flags=0b1000, queues=2, queue_depth=64),
        Identity(1000 + dev_id, (240, dev_id)),
        f"/dev/ublkc{dev_id}",
        Disk((259, dev_id), 9),
        server,
        Usage((), tuple(holders)),
    )
    verdict = Verdict(kind, reason or f"served by {server}", action, rule=rule)
    return present.as_object(replace(Judged(seen, verdict, now - age), **judged))


def a_record(
    seq: int, text: str, level: Level = Level.INFO, *, ago: float = 0.0, kind: EventKind = EventKind.VERDICT
) -> Record:
    return Record(seq, Event(time.time() - ago, kind, level, text, None, {}))


def an_alert(
    key: str, summary: str, *, kind: str = "pinned", severity: str = "warning", ago: float = 300.0
) -> dict[str, Any]:
    return {
        "key": key,
        "kind": kind,
        "severity": severity,
        "dev_id": 3,
        "instance": 1003,
        "summary": summary,
        "runbook": f"alert-{kind}",
        "facts": {},
        "raised_at": objects.timestamp(time.time() - ago),
        "over_at": None,
        "over_why": "",
    }


def a_sink(name: str, kind: str, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    well = {"waiting": 0, "last_ok_at": time.time() - 40, "last_error": "", "next_try_at": None}
    counts = {"delivered": 12, "failed": 0, "undeliverable": 0, "dropped": 0, "suppressed": 0}
    return {"name": name, "kind": kind, **well, **counts, **more}


def a_view(*devices: Mapping[str, Any], **more: Any) -> View:  # noqa: ANN401 - of View
    now = time.time()
    return replace(
        View(
            version="0.1.0",
            host="db7.example",
            started_at=now - 9 * 86400,
            last_look_at=now - 12,
            devices=devices,
            health=Health(lag=0.004, locked=47 << 20),
            features=(
                "SUPPORT_ZERO_COPY",
                "USER_RECOVERY",
                "USER_RECOVERY_REISSUE",
                "UNPRIVILEGED_DEV",
                "CMD_IOCTL_ENCODE",
            ),
            slots_max=64,
            alerts={
                "alerts": [],
                "sinks": [a_sink("alertmanager", "alertmanager"), a_sink("mail", "mail", delivered=3)],
            },
        ),
        **more,
    )


def nothing() -> View:
    """A machine that has no device, and where nothing has happened."""
    return a_view(alerts={})


def quiet() -> View:
    """Three devices, and nothing wrong."""
    return a_view(
        a_device(0, holders=[Holder("swap", "/dev/ublkb0")], age=9 * 86400),
        a_device(1, holders=[Holder("mount", "/srv/data (ext4)"), Holder("open", "pid 812 (dd)")], age=9 * 86400),
        a_device(3, age=1800),
        events=[
            a_record(1, "duende-ublkd 0.1.0 looks after 2 devices", ago=9 * 86400, kind=EventKind.DAEMON),
            a_record(2, "ublk3 is orphaned: server 4121 (ublk.loop) died, device DEAD, nobody has it open", ago=1900),
            a_record(
                3,
                "ublk3 deleted: server 4121 (ublk.loop) died, device DEAD, nobody has it open, nothing holds it; id free "
                "again after 61 ms, 812 ms after the death was seen",
                Level.WARNING,
                ago=1899,
                kind=EventKind.ACTION,
            ),
            a_record(4, "ublk3 is live: served by 4003 (ublk.loop)", ago=1800),
        ],
    )


def troubled() -> View:
    """A wedged, a pinned, an unserved and a held device, one being recovered, and a mail server that does not answer."""
    now = time.monotonic()
    hold = Hold(4, now - 600, now + 1500, 0, "firmware of the shelf")
    trail = replace(NO_TRAIL, attempts=2, trouble="exit status 1: no such backing file")
    dead = Server(4121, alive=False, comm="ublk.loop")
    quick = a_view(
        a_device(0, holders=[Holder("swap", "/dev/ublkb0")], age=9 * 86400),
        a_device(
            2,
            VerdictKind.WEDGED,
            "STOP_DEV has not answered for 11 s; nothing more is sent to it",
            Action.ALERT,
            rule="overdue",
            stuck=("iou-wrk-412 (pid 412) in blk_mq_freeze_queue_wait, del_gendisk, ublk_stop_dev",),
            age=11,
        ),
        a_device(
            3,
            VerdictKind.PINNED,
            "DEAD, its disk gone, and still held by mount /srv/backup (ext4); the id frees itself when they let go",
            Action.ALERT,
            rule="pinned",
            state=DEAD,
            holders=[Holder("mount", "/srv/backup (ext4)")],
            server=dead,
            age=4000,
        ),
        a_device(
            4,
            VerdictKind.UNSERVED,
            "QUIESCED, no server; on hold for 25m more by root",
            rule="on-hold",
            state=QUIESCED,
            hold=hold,
            server=dead,
        ),
        a_device(
            5,
            VerdictKind.UNSERVED,
            "QUIESCED, no server for 35 s; its I/O waits; attempt 3 of 3 to recover it begins in 4 s",
            Action.NONE,
            rule="backoff",
            state=QUIESCED,
            trail=trail,
            server=dead,
            age=35,
        ),
        a_device(
            7,
            VerdictKind.STARTING,
            "DEAD, being set up by 9120 (qemu-storage-d), which has its char device open",
            state=DEAD,
            age=2,
        ),
        a_device(1, holders=[Holder("mount", "/srv/data (ext4)")], age=9 * 86400),
    )
    refused = "connect to mx1.example:25: Connection refused"
    return replace(
        quick,
        holds=[objects.hold_object(hold, now=now, at=time.time())],
        alerts={
            "alerts": [
                an_alert(
                    "ublk2/1002/wedged",
                    "ublk2 is wedged: STOP_DEV has not answered for 11 s",
                    kind="wedged",
                    severity="critical",
                    ago=9,
                ),
                an_alert("ublk3/1003/pinned", "ublk3 is pinned: held by mount /srv/backup (ext4)", ago=4000),
            ],
            "sinks": [
                a_sink("alertmanager", "alertmanager"),
                a_sink(
                    "on-call",
                    "mail",
                    waiting=2,
                    last_error=refused,
                    last_ok_at=time.time() - 7200,
                    next_try_at=time.time() + 40,
                    failed=9,
                ),
                a_sink(
                    "chat",
                    "command",
                    undeliverable=1,
                    last_error="exit status 2",
                    failed=6,
                    last_ok_at=time.time() - 90000,
                ),
            ],
            "undelivered": [
                {
                    "key": "ublk9/1009/orphaned",
                    "sink": "chat",
                    "summary": "ublk9 is orphaned",
                    "notice": "raised",
                    "why": "exit status 2",
                    "at": objects.timestamp(time.time() - 80000),
                }
            ],
        },
        events=[
            *quiet().events,
            a_record(5, "ublk3 is pinned: held by mount /srv/backup (ext4)", Level.WARNING, ago=4000),
            a_record(6, "ublk4 on hold for 35m by root (firmware of the shelf)", ago=600, kind=EventKind.HOLD),
            a_record(
                7,
                "ublk5 could not be recovered, attempt 2 of 3: exit status 1: no such backing file",
                Level.ERROR,
                ago=20,
                kind=EventKind.RECOVERY,
            ),
            a_record(
                8,
                "ublk2 is wedged: STOP_DEV has not answered for 11 s; nothing more is sent to it",
                Level.WARNING,
                ago=9,
            ),
        ],
        runbook="https://docs.example/duende.html",
    )


def a_crowd(count: int = 500, *, wrong: int = 3) -> View:
    """So many devices, the last of them pinned."""
    calm = [
        a_device(dev_id, holders=[Holder("mount", f"/srv/tenant-{dev_id:04d} (xfs)")], age=3600.0 * (dev_id + 1))
        for dev_id in range(count - wrong)
    ]
    pinned = [
        a_device(
            dev_id,
            VerdictKind.PINNED,
            f"DEAD, its disk gone, and still held by mount /srv/tenant-{dev_id:04d} (xfs)",
            Action.ALERT,
            rule="pinned",
            state=DEAD,
            holders=[Holder("mount", f"/srv/tenant-{dev_id:04d} (xfs)")],
            age=400,
        )
        for dev_id in range(count - wrong, count)
    ]
    return a_view(*calm, *pinned, events=quiet().events)
