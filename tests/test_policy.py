"""The truth table of policy.decide(): what each device is called, why, and that nothing in use is ever deleted."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

from duende_ublkd.core import policy
from duende_ublkd.core.config import OnOrphan, OnUnserved, Policy, Recovery
from duende_ublkd.core.holds import Hold
from duende_ublkd.core.ledger import History, Overdue
from duende_ublkd.core.model import (
    OPENING,
    Action,
    Condition,
    DevInfo,
    Disk,
    Feature,
    Holder,
    Identity,
    KernelState,
    Observation,
    Server,
    Usage,
    Verdict,
    VerdictKind,
)
from duende_ublkd.core.policy import Traits
from duende_ublkd.core.trail import NO_TRAIL, Trail

if TYPE_CHECKING:
    from collections.abc import Iterator

NOW = 1000.0
IDENTITY = Identity(14_628, (240, 3))
DELETED = Identity(None)
DISK = Disk((259, 0), 7)
DEAD, LIVE, QUIESCED, FAIL_IO = KernelState.DEAD, KernelState.LIVE, KernelState.QUIESCED, KernelState.FAIL_IO
ALIVE = Server(4121, alive=True, comm="ublk.loop")
GONE = Server(4121, alive=False)
OTHER = Server(4122, alive=True, comm="worker")
NOBODY = Usage()
OPEN = Usage(char_openers=(OTHER,))
MOUNTED = Usage(holders=(Holder("mount", "/srv (ext4)"),))
SWEPT_IN_PART = Usage(complete=False)
MODERN = Traits()
OLD = Traits(async_delete=False, delete_can_be_cancelled=False)
ONE_STUCK, TWO_STUCK = Traits(stuck=(7,)), Traits(stuck=(7, 9))
STOPPED = replace(ALIVE, condition=Condition.STOPPED.value)
DYING = replace(ALIVE, condition=Condition.DYING.value)
WITHOUT_RING = Server(4123, alive=True, comm="bash", has_ring=False)
LEAKED = Usage(char_openers=(WITHOUT_RING,))
DYING_OPENER = Usage(char_openers=(DYING,))
USAGES = (None, NOBODY, OPEN, MOUNTED, SWEPT_IN_PART, replace(OPEN, holders=MOUNTED.holders), LEAKED, DYING_OPENER)
DEFAULT = Policy()
A_WHILE = policy.SETTLING + 1


@dataclass(frozen=True)
class Case:
    """A device with its history and everything else that is decided upon. As it stands: an orphan to delete."""

    state: int | None = DEAD
    disk: Disk | None = None
    node: bool = True
    listed: bool = True
    usage: Usage | None = NOBODY
    server: Server | None = None
    trouble: str = ""
    unprivileged: bool = False
    seen_live: bool = True
    server_died: bool = True
    phase_for: float = 100.0  # seconds
    idle_for: float | None = 100.0
    watched_for: float | None = 100.0
    overdue: str = ""  # the command
    paused_for: float = 0.0
    times_busy: int = 0
    daemon_for: float = 3600.0  # since this daemon's first look
    trail: Trail = NO_TRAIL
    unserved_for: float | None = None
    takers: int = 0
    confirmed: Server | None = None  # was seen to have it open while LIVE
    hold: Hold | None = None
    policy: Policy = DEFAULT
    traits: Traits = MODERN

    def seen(self) -> Observation:
        flags = int(Feature.UNPRIVILEGED_DEV) if self.unprivileged else 0
        info = None if self.state is None else DevInfo(3, self.state, -1, flags, 1, 128)
        return Observation(
            3,
            NOW,
            info,
            IDENTITY if self.listed else DELETED,
            "/dev/ublkc3" if self.node and self.listed else None,
            self.disk,
            self.server,
            self.usage,
            trouble=self.trouble,
        )

    def history(self) -> History:
        return History(
            identity=IDENTITY,
            first_seen=0.0,
            last_seen=NOW,
            phase=(self.state,),
            phase_since=NOW - self.phase_for,
            seen_live=self.seen_live,
            seen_idle_since=None if self.watched_for is None else NOW - self.watched_for,
            idle_since=None if self.idle_for is None else NOW - self.idle_for,
            server=self.confirmed or (GONE if self.seen_live else None),
            server_confirmed=self.confirmed is not None,
            server_died=self.server_died,
            overdue=Overdue(self.overdue, NOW - 11) if self.overdue else None,
            paused_until=NOW + self.paused_for,
            pause_reason="deleting it failed: DEL_DEV_ASYNC on ublk3: input/output error" if self.paused_for else "",
            watched_since=NOW - self.daemon_for,
            times_busy=self.times_busy,
            trail=self.trail,
            unserved_since=None if self.unserved_for is None else NOW - self.unserved_for,
            takers=self.takers,
        )

    def verdict(self, later: float = 0.0) -> Verdict:
        return policy.decide(self.seen(), self.history(), self.policy, self.traits, NOW + later, self.hold)


LIVE_CASE = Case(state=LIVE, disk=DISK, server=ALIVE, usage=None, idle_for=None, watched_for=None)
ADDED = Case(seen_live=False, idle_for=1.0, watched_for=1.0, phase_for=1.0)
UNSERVED = Case(state=QUIESCED, disk=DISK, phase_for=1.0, idle_for=None, watched_for=None)
KEEPS = Policy(orphaned=OnOrphan.ALERT)
RULE = Recovery(("bring-back", "{id}"))
RECOVERS = Policy(unserved=OnUnserved.RECOVER, recover=RULE)
GIVES_UP = Policy(unserved=OnUnserved.DELETE)
LATE = replace(UNSERVED, phase_for=61.0, usage=NOBODY)
TO_RECOVER = replace(LATE, policy=RECOVERS)
TO_GIVE_UP = replace(LATE, policy=GIVES_UP)
FLAPPING = replace(UNSERVED, phase_for=5.0, unserved_for=61.0, takers=3, usage=NOBODY)
NOT_ITS_SERVER = replace(LIVE_CASE, confirmed=OTHER, usage=NOBODY)
NEVER_STARTED = Case(seen_live=False)
HOLD = Hold(3, NOW - 60, NOW + 540, 0, "upgrade")

# case, verdict, action, what the sentence names
TRUTH = {
    "served": (LIVE_CASE, "live", "none", "served by 4121 (ublk.loop)"),
    "served by a fork": (replace(LIVE_CASE, server=GONE, usage=OPEN), "live", "none", "4122 (worker)"),
    "served by another than the kernel tells of": (
        replace(LIVE_CASE, usage=OPEN),
        "live",
        "none",
        "served by 4122 (worker), which has its char device open",
    ),
    "served by one of two openers": (
        replace(LIVE_CASE, usage=Usage(char_openers=(OTHER, ALIVE))),
        "live",
        "none",
        "served by 4121 (ublk.loop)",
    ),
    "another had it, nobody looked": (replace(NOT_ITS_SERVER, usage=None), "live", "none", "cannot be seen from here"),
    "another had it, seen in part": (replace(NOT_ITS_SERVER, usage=SWEPT_IN_PART), "live", "none", "cannot be seen"),
    "another had it, and just now": (replace(NOT_ITS_SERVER, phase_for=1.0), "closing", "none", "not noticed yet"),
    "another had it": (NOT_ITS_SERVER, "wedged", "alert", "its server 4122 (worker) is gone since 100 s"),
    "another had it, and is being killed": (
        replace(NOT_ITS_SERVER, usage=Usage(char_openers=(replace(OTHER, condition=Condition.DYING.value),))),
        "wedged",
        "alert",
        "its server 4122 (worker) was killed and has not ended",
    ),
    "served, no pid": (replace(LIVE_CASE, server=None, usage=OPEN), "live", "none", "char device open"),
    "served by who knows": (replace(LIVE_CASE, server=GONE, usage=SWEPT_IN_PART), "live", "none", "cannot be seen"),
    "served, nobody looked": (replace(LIVE_CASE, server=GONE), "live", "none", "cannot be seen"),
    "just died": (replace(LIVE_CASE, server=GONE, usage=Usage(), phase_for=1.0), "closing", "none", "not noticed yet"),
    "died, not noticed": (replace(LIVE_CASE, server=GONE, usage=Usage()), "wedged", "alert", "leaked descriptor"),
    "served by one that is stopped": (
        replace(LIVE_CASE, server=STOPPED),
        "live",
        "none",
        "served by 4121 (ublk.loop), which is stopped",
    ),
    "just killed": (replace(LIVE_CASE, server=DYING, usage=NOBODY, phase_for=1.0), "closing", "none", "was killed and"),
    "killed, without end": (
        replace(LIVE_CASE, server=DYING, usage=NOBODY),
        "wedged",
        "alert",
        "its server 4121 (ublk.loop) was killed and has not ended since 100 s; one of its threads sleeps",
    ),
    "killed, and has it open": (replace(LIVE_CASE, server=DYING, usage=DYING_OPENER), "wedged", "alert", "was killed"),
    "killed, a fork serves": (replace(LIVE_CASE, server=DYING, usage=OPEN), "live", "none", "4122 (worker)"),
    "died, open without a ring": (
        replace(LIVE_CASE, server=GONE, usage=LEAKED),
        "wedged",
        "alert",
        "4123 (bash) has its char device open, and no io_uring to serve it with",
    ),
    "died, one of two openers has a ring": (
        replace(LIVE_CASE, server=GONE, usage=Usage(char_openers=(WITHOUT_RING, *OPEN.char_openers))),
        "live",
        "none",
        "4122 (worker)",
    ),
    "served, and open elsewhere without a ring": (replace(LIVE_CASE, usage=LEAKED), "live", "none", "served by 4121"),
    "being stopped": (replace(LIVE_CASE, disk=None, phase_for=1.0), "closing", "none", "disk already gone"),
    "stop without end": (replace(LIVE_CASE, disk=None), "wedged", "alert", "STOP_DEV"),
    "disk to come": (
        replace(LIVE_CASE, disk=None, seen_live=False, phase_for=1.0),
        "starting",
        "none",
        "not there yet",
    ),
    "stray LIVE": (replace(LIVE_CASE, disk=None, seen_live=False), "unknown", "alert", "stray state"),
    "quiesced": (UNSERVED, "unserved", "none", "waits for a new server"),
    "fails I/O": (replace(UNSERVED, state=FAIL_IO), "unserved", "none", "its I/O fails"),
    "unserved, held": (replace(UNSERVED, usage=MOUNTED), "unserved", "none", "mount /srv"),
    "unserved too long": (replace(UNSERVED, phase_for=61.0), "unserved", "alert", "over 60 s"),
    "unserved too long, held": (replace(LATE, usage=MOUNTED), "unserved", "alert", "held by mount /srv"),
    "to be recovered, new daemon": (replace(TO_RECOVER, daemon_for=4.9), "unserved", "none", "to be recovered in"),
    "to be recovered, new for 5 s": (replace(TO_RECOVER, daemon_for=5.0), "unserved", "recover", "attempt 1 of 3"),
    "to be recovered soon": (replace(TO_RECOVER, phase_for=59.0), "unserved", "none", "60 s to be recovered in"),
    "to be recovered": (TO_RECOVER, "unserved", "recover", "attempt 1 of 3"),
    "held, to be recovered": (replace(TO_RECOVER, usage=MOUNTED), "unserved", "recover", "attempt 1 of 3"),
    "taken, to be recovered": (
        replace(TO_RECOVER, usage=OPEN, phase_for=59.0),
        "recovering",
        "none",
        "has taken its char device",
    ),
    "without service, servers come and go": (
        FLAPPING,
        "unserved",
        "alert",
        "waits for a new server; without service for 61 s, 3 servers have taken it and let go",
    ),
    "without service, one came": (replace(FLAPPING, takers=1), "unserved", "alert", "for 61 s, 1 server has taken"),
    "without service, none was seen": (replace(FLAPPING, takers=0), "unserved", "alert", "without service for 61 s"),
    "without service for less": (replace(FLAPPING, unserved_for=59.0), "unserved", "none", "60 s to be recovered in"),
    "without service, to be recovered": (
        replace(FLAPPING, policy=RECOVERS, unserved_for=119.0),
        "unserved",
        "none",
        "60 s to be recovered in",
    ),
    "without service, to be recovered, for long": (
        replace(FLAPPING, policy=RECOVERS, unserved_for=121.0),
        "unserved",
        "alert",
        "without service for 2 min",
    ),
    "without service, an attempt failed just now": (
        replace(FLAPPING, policy=RECOVERS, unserved_for=3600.0, trail=Trail(1, not_before=NOW - 119, trouble="exit 1")),
        "unserved",
        "none",
        "60 s to be recovered in",
    ),
    "without service, an attempt failed long ago": (
        replace(FLAPPING, policy=RECOVERS, unserved_for=3600.0, trail=Trail(1, not_before=NOW - 121, trouble="exit 1")),
        "unserved",
        "alert",
        "without service for 60 min",
    ),
    "without service, to be given up": (
        replace(FLAPPING, policy=GIVES_UP, unserved_for=3600.0),
        "unserved",
        "alert",
        "without service for 60 min",
    ),
    "taken by the next of many": (
        replace(FLAPPING, usage=OPEN, unserved_for=121.0),
        "unserved",
        "alert",
        "3 servers have taken it and let go; 4122 (worker) has its char device now",
    ),
    "taken by the next of many, for not that long": (
        replace(FLAPPING, usage=OPEN, unserved_for=119.0),
        "recovering",
        "none",
        "has taken its char device",
    ),
    "taken by the second": (
        replace(FLAPPING, usage=OPEN, unserved_for=3600.0, takers=1),
        "recovering",
        "none",
        "has taken its char device",
    ),
    "taken, and not served": (replace(TO_RECOVER, usage=OPEN), "unserved", "alert", "has had its char device for"),
    "to be recovered, open without a ring": (
        replace(TO_RECOVER, usage=LEAKED),
        "unserved",
        "alert",
        "4123 (bash) has its char device open, and no server can take it before that is closed, so no command is run",
    ),
    "to be recovered, open in one that is dying": (
        replace(TO_RECOVER, usage=DYING_OPENER),
        "unserved",
        "alert",
        "so no command is run",
    ),
    "to be recovered, open without a ring for a moment": (
        replace(TO_RECOVER, usage=LEAKED, policy=replace(RECOVERS, recovery_deadline=2.0), phase_for=3.0),
        "unserved",
        "none",
        "so no command is run",
    ),
    "unserved, open in one that is dying": (
        replace(UNSERVED, usage=DYING_OPENER),
        "unserved",
        "none",
        "4121 (ublk.loop) has its char device open",
    ),
    "control plane stuck": (
        Case(traits=TWO_STUCK),
        "wedged",
        "alert",
        "nothing holds it; the control plane is stuck: the deletions of ublk7, ublk9 have not answered",
    ),
    "control plane very stuck": (Case(traits=Traits(stuck=(4, 5, 7, 9))), "wedged", "alert", "ublk7 and others have"),
    "one deletion stuck": (Case(traits=ONE_STUCK), "orphaned", "delete", "device DEAD"),
    "held, control plane stuck": (Case(usage=MOUNTED, traits=TWO_STUCK), "wedged", "alert", "until mount /srv"),
    "given up, control plane stuck": (replace(TO_GIVE_UP, traits=TWO_STUCK), "wedged", "alert", "is stuck"),
    "kept, control plane stuck": (Case(policy=KEEPS, traits=TWO_STUCK), "orphaned", "alert", "device DEAD"),
    "served, control plane stuck": (replace(LIVE_CASE, traits=TWO_STUCK), "live", "none", "served by 4121"),
    "unserved, control plane stuck": (replace(UNSERVED, traits=TWO_STUCK), "unserved", "none", "waits for a new"),
    "to be recovered, control plane stuck": (replace(TO_RECOVER, traits=TWO_STUCK), "unserved", "recover", "attempt 1"),
    "on hold, control plane stuck": (Case(traits=TWO_STUCK, hold=HOLD), "wedged", "alert", "on hold for 9 min"),
    "recovery runs": (
        replace(TO_RECOVER, trail=NO_TRAIL.begun(NOW - 5, 30)),
        "recovering",
        "none",
        "the recovery command (attempt 1 of 3) runs for 5 s",
    ),
    "recovery failed": (
        replace(TO_RECOVER, trail=Trail(1, not_before=NOW + 2, trouble="exit 1")),
        "unserved",
        "none",
        "attempt 1 of 3: exit 1",
    ),
    "recovered in vain": (replace(TO_RECOVER, trail=Trail(1, not_before=NOW + 2)), "unserved", "none", "not for long"),
    "recovery again": (replace(TO_RECOVER, trail=Trail(1, not_before=NOW)), "unserved", "recover", "attempt 2 of 3"),
    "recovery given up": (
        replace(TO_RECOVER, trail=Trail(3, trouble="exit 1")),
        "unserved",
        "alert",
        "recovery given up after 3 attempts: exit 1",
    ),
    "no command": (replace(LATE, policy=replace(RECOVERS, recover=None)), "unserved", "alert", "for over 60 s"),
    "to be given up": (TO_GIVE_UP, "unserved", "delete", "nothing holds its disk"),
    "to be given up soon": (replace(TO_GIVE_UP, phase_for=59.0), "unserved", "none", "60 s to be recovered in"),
    "given up, held": (replace(TO_GIVE_UP, usage=MOUNTED), "unserved", "alert", "mount /srv (ext4), so it is not"),
    "given up, open": (
        replace(TO_GIVE_UP, usage=OPEN, phase_for=59.0),
        "recovering",
        "none",
        "has taken its char device",
    ),
    "given up, open without a ring": (
        replace(TO_GIVE_UP, usage=LEAKED),
        "unserved",
        "alert",
        "4123 (bash) has its char device open, and no server can take it before that is closed, so it is not deleted",
    ),
    "given up, open in one that is dying": (
        replace(TO_GIVE_UP, usage=DYING_OPENER),
        "unserved",
        "alert",
        "so it is not",
    ),
    "given up, unsure": (replace(TO_GIVE_UP, usage=SWEPT_IN_PART), "unserved", "alert", "not everybody"),
    "given up, not looked": (replace(TO_GIVE_UP, usage=None), "unserved", "alert", "nobody looked who holds it"),
    "given up, new daemon": (replace(TO_GIVE_UP, daemon_for=59.0), "unserved", "none", "not watched it for its whole"),
    "given up, command left": (
        replace(TO_GIVE_UP, trail=Trail(1, limit=NOW + 0.1)),
        "unserved",
        "none",
        "a recovery command may still run",
    ),
    "given up, command over": (replace(TO_GIVE_UP, trail=Trail(1, limit=NOW)), "unserved", "delete", "nothing holds"),
    "given up, refused": (replace(TO_GIVE_UP, paused_for=4.0), "unserved", "alert", "input/output error"),
    "given up, overdue": (replace(TO_GIVE_UP, overdue="DEL_DEV_ASYNC"), "wedged", "alert", "has not answered"),
    "orphan on hold": (Case(hold=HOLD), "orphaned", "none", "on hold for 9 min more by root (upgrade)"),
    "held on hold": (Case(usage=MOUNTED, hold=HOLD), "pinned", "none", "on hold for 9 min"),
    "to be recovered on hold": (replace(TO_RECOVER, hold=HOLD), "unserved", "none", "on hold for 9 min"),
    "to be given up on hold": (replace(TO_GIVE_UP, hold=HOLD), "unserved", "none", "on hold for 9 min"),
    "unserved on hold": (replace(LATE, hold=HOLD), "unserved", "none", "on hold for 9 min"),
    "wedged on hold": (Case(overdue="DEL_DEV_ASYNC", hold=HOLD), "wedged", "alert", "on hold for 9 min"),
    "unknown on hold": (Case(state=7, hold=replace(HOLD, uid=1000, why="")), "unknown", "alert", "more by uid 1000"),
    "served on hold": (replace(LIVE_CASE, hold=HOLD), "live", "none", "on hold for 9 min"),
    "taken over": (replace(UNSERVED, usage=OPEN), "recovering", "none", "4122 (worker) has taken its char device"),
    "quiesced, stopped": (replace(UNSERVED, disk=None), "closing", "none", "being stopped"),
    "stray QUIESCED": (replace(UNSERVED, disk=None, seen_live=False), "unknown", "alert", "stray state"),
    "added": (ADDED, "starting", "none", "of 60 s left to open it"),
    "being set up": (replace(ADDED, usage=OPEN), "starting", "none", "being set up by 4122 (worker)"),
    "being set up for long": (
        replace(NEVER_STARTED, usage=OPEN, phase_for=7200.0),
        "starting",
        "none",
        "being set up by 4122 (worker), which has its char device open, for 120 min now",
    ),
    "never started, open without a ring": (
        replace(NEVER_STARTED, usage=LEAKED),
        "pinned",
        "alert",
        "DEAD, never seen LIVE, for 100 s; 4123 (bash) has its char device open, and no io_uring to serve it with",
    ),
    "never started, open without a ring for a moment": (
        replace(NEVER_STARTED, usage=LEAKED, phase_for=59.0),
        "starting",
        "none",
        "being set up by 4123 (bash)",
    ),
    "never started, open in one that was killed": (
        replace(NEVER_STARTED, usage=DYING_OPENER),
        "pinned",
        "alert",
        "4121 (ublk.loop) has its char device open, and was killed",
    ),
    "never started, one of two openers has a ring": (
        replace(NEVER_STARTED, usage=Usage(char_openers=(WITHOUT_RING, OTHER))),
        "starting",
        "none",
        "being set up by 4122 (worker)",
    ),
    "never opened": (replace(ADDED, idle_for=61.0), "orphaned", "delete", "never seen LIVE"),
    "not yet closed": (Case(usage=OPEN, phase_for=44.0), "closing", "none", "not yet closed by 4122 (worker)"),
    "never closed": (Case(usage=OPEN), "pinned", "alert", "until 4122 (worker) closes its char device"),
    "open, by whom unseen": (
        replace(ADDED, times_busy=2, paused_for=100.0),
        "unknown",
        "alert",
        "never seen LIVE",
    ),
    "open once, by whom unseen": (replace(ADDED, times_busy=1, paused_for=100.0), "starting", "none", "left to open"),
    "watched briefly": (Case(idle_for=0.2, watched_for=0.2), "closing", "none", "watched for 500 ms"),
    "idle only begins": (Case(idle_for=None, watched_for=None), "closing", "none", "only begins"),
    "orphan": (Case(), "orphaned", "delete", "server 4121 died, device DEAD, nobody has it open, nothing holds it"),
    "orphan of the living": (Case(server_died=False), "orphaned", "delete", "server 4121 has let go, device DEAD"),
    "orphan, swept in part": (
        Case(usage=SWEPT_IN_PART),
        "orphaned",
        "delete",
        "device DEAD, nobody was seen to have it open or to hold it (not all could be seen)",
    ),
    "orphan, kept": (Case(policy=KEEPS), "orphaned", "alert", "device DEAD"),
    "orphan, ignored": (Case(policy=Policy(orphaned=OnOrphan.IGNORE)), "orphaned", "none", "device DEAD"),
    "orphan, refused": (Case(paused_for=4.0), "orphaned", "alert", "input/output error"),
    "orphan, old kernel": (Case(traits=OLD), "orphaned", "delete", "device DEAD"),
    "held": (Case(usage=MOUNTED), "pinned", "delete", "until mount /srv (ext4) lets go"),
    "held, kept": (Case(usage=MOUNTED, policy=KEEPS), "pinned", "alert", "mount /srv"),
    "held, old kernel": (Case(usage=MOUNTED, traits=OLD), "pinned", "alert", "then it can be deleted"),
    "unsure, old kernel": (Case(usage=SWEPT_IN_PART, traits=OLD), "unknown", "alert", "overlooked"),
    "held, no async": (Case(usage=MOUNTED, traits=OLD, unprivileged=True), "pinned", "alert", "then it can be deleted"),
    "DEAD with a disk": (Case(disk=DISK, phase_for=1.0), "closing", "none", "in transition"),
    "DEAD with a disk for ever": (Case(disk=DISK), "unknown", "alert", "DEAD with a disk"),
    "nobody looked": (Case(usage=None), "unknown", "alert", "nobody looked"),
    "no node": (Case(node=False), "unknown", "alert", "mknod /dev/ublkc3 c 240 3"),
    "deleted, undead": (replace(UNSERVED, listed=False), "unknown", "alert", "no server can take it"),
    "just deleted": (Case(listed=False, phase_for=0.1), "closing", "none", "letting go"),
    "deleted, held": (Case(listed=False, usage=MOUNTED), "pinned", "alert", "mount /srv"),
    "deleted, open": (Case(listed=False, usage=OPEN), "pinned", "alert", "4122 (worker) closes its char device"),
    "deleted, by whom held": (Case(listed=False), "pinned", "alert", "cannot be seen"),
    "overdue": (Case(overdue="DEL_DEV_ASYNC"), "wedged", "alert", "DEL_DEV_ASYNC has not answered for 11 s"),
    "its open overdue": (replace(TO_GIVE_UP, overdue=OPENING), "wedged", "alert", "open has not answered for 11 s"),
    "no answer": (Case(state=None, trouble="EIO"), "unknown", "alert", "EIO"),
    "no answer nor reason": (Case(state=None), "unknown", "alert", "GET_DEV_INFO gave no answer"),
    "a state of tomorrow": (Case(state=7), "unknown", "alert", "state 7"),
}


@pytest.mark.parametrize("name", TRUTH)
def test_truth_table(name: str) -> None:
    case, kind, action, named = TRUTH[name]
    verdict = case.verdict()
    assert (verdict.kind.value, verdict.action.value) == (kind, action)
    assert named in verdict.reason


def test_the_table_has_every_verdict() -> None:
    assert {kind for _, kind, _, _ in TRUTH.values()} == {kind.value for kind in VerdictKind}


# --- every combination ------------------------------------------------------------------------------------------------


TRAILS = (
    NO_TRAIL.begun(NOW - 5, 30),
    Trail(1, not_before=NOW + 2, trouble="exit 1"),
    Trail(2, not_before=NOW - 2),
    Trail(3, trouble="exit 1"),
    Trail(1, limit=NOW + 2, not_before=NOW + 2),
)


def everything() -> Iterator[Case]:
    """Some hundred thousand devices, most of which no kernel would show."""
    times = ((None, None), (0.1, 0.1), (0.5, 0.5), (59.9, 59.9), (60.0, 0.1), (60.0, 0.5), (3600.0, 3600.0))
    for state, disk, (listed, node), usage, server, seen_live, (idle, watched) in itertools.product(
        (None, DEAD, LIVE, QUIESCED, FAIL_IO, 7),
        (None, DISK),
        ((True, True), (True, False), (False, False)),
        USAGES,
        (None, ALIVE, GONE, DYING),
        (False, True),
        times,
    ):
        case = Case(state, disk, node, listed, usage, server, seen_live=seen_live, idle_for=idle, watched_for=watched)
        yield case
        if server is None:
            yield replace(case, overdue="DEL_DEV_ASYNC")
            yield replace(case, paused_for=1.0)
            yield replace(case, policy=KEEPS, phase_for=1.0)
            yield replace(case, policy=Policy(setup_grace=0.0, orphan_grace=0.0), phase_for=0.0)
            yield replace(case, traits=OLD)
            yield replace(case, traits=TWO_STUCK)
            yield replace(case, unprivileged=True, traits=Traits(delete_can_be_cancelled=False))
            yield replace(case, hold=HOLD)
            yield replace(case, policy=Policy(setup_grace=0.0), phase_for=46.0)
        if server is ALIVE and state == LIVE:
            yield replace(case, confirmed=OTHER)
            yield replace(case, confirmed=OTHER, phase_for=1.0)
        if server is None and state in (QUIESCED, FAIL_IO):
            for chosen, phase_for in itertools.product((DEFAULT, RECOVERS, GIVES_UP), (0.0, 59.9, 61.0)):
                yield replace(case, policy=chosen, phase_for=phase_for, unserved_for=3600.0, takers=5)
            yield replace(case, policy=RECOVERS)
            yield replace(case, policy=RECOVERS, phase_for=59.0)
            yield replace(case, policy=RECOVERS, hold=HOLD)
            yield replace(case, policy=RECOVERS, daemon_for=4.9)
            yield replace(case, policy=replace(RECOVERS, recovery_deadline=1.0), daemon_for=0.9)
            yield replace(case, policy=replace(RECOVERS, recovery_deadline=1.0), daemon_for=1.1)
            for trail in TRAILS:
                yield replace(case, policy=RECOVERS, trail=trail)
                yield replace(case, policy=GIVES_UP, trail=trail)
            for phase_for, daemon_for in itertools.product((59.9, 60.0, 3600.0), repeat=2):
                yield replace(case, policy=GIVES_UP, phase_for=phase_for, daemon_for=daemon_for)
            yield replace(case, policy=GIVES_UP, paused_for=1.0)
            yield replace(case, policy=GIVES_UP, overdue="DEL_DEV_ASYNC")
            yield replace(case, policy=GIVES_UP, hold=HOLD)
            yield replace(case, policy=GIVES_UP, phase_for=3600.0, traits=TWO_STUCK)


def why_hands_off(case: Case) -> list[str]:
    """The promise, in other words than the policy's: each reason alone is enough."""
    usage = case.usage or Usage()
    reasons = {
        "no sysfs entry": not case.listed,
        "nobody looked": case.usage is None,
        "open": bool(usage.char_openers),
        "overdue": bool(case.overdue),
        "paused": case.paused_for > 0,
        "on hold": case.hold is not None,
        "would wait behind others": len(case.traits.stuck) > 1,
        **(_why_not_given_up(case, usage) if case.state in (QUIESCED, FAIL_IO) else _why_not_deleted(case, usage)),
    }
    return [reason for reason, so in reasons.items() if so]


def _why_not_deleted(case: Case, usage: Usage) -> dict[str, bool]:
    grace = case.policy
    needed = 0.0 if case.seen_live else grace.setup_grace
    cannot_wait = not case.traits.delete_can_be_cancelled and (case.unprivileged or not case.traits.async_delete)
    return {
        "not DEAD": case.state != DEAD,
        "has a disk": case.disk is not None,
        "no node": not case.node,
        "not watched": case.watched_for is None or case.watched_for < grace.orphan_grace,
        "grace not over": case.idle_for is None or case.idle_for < needed,
        "not wanted": grace.orphaned is not OnOrphan.DELETE,
        "would block": cannot_wait and (bool(usage.holders) or not usage.complete),
    }


def _why_not_given_up(case: Case, usage: Usage) -> dict[str, bool]:
    """Of a device that waits for a server: it would be stopped."""
    deadline = case.policy.recovery_deadline
    return {
        "no disk": case.disk is None,
        "held": bool(usage.holders),
        "not everybody seen": not usage.complete,
        "may still be recovered": case.phase_for < deadline,
        "not watched": case.daemon_for < deadline,
        "not wanted": case.policy.unserved is not OnUnserved.DELETE,
        "being recovered": case.trail.is_running or case.trail.limit > NOW,
    }


def test_no_device_that_is_served_or_held_open_is_ever_deleted() -> None:
    """Time alone never outweighs a server, whatever the kernel's state; and what is left is deleted."""
    deleted, given_up = 0, 0
    for case in everything():
        reasons = why_hands_off(case)
        assert (case.verdict().action is Action.DELETE) == (not reasons), (case, reasons)
        deleted += not reasons
        given_up += not reasons and case.state != DEAD
    assert deleted > 100
    assert given_up > 100


def test_a_command_runs_only_for_a_device_that_waits_for_a_server_and_that_nobody_has_taken() -> None:
    commands = 0
    for case in everything():
        if case.verdict().action is Action.RECOVER:
            commands += 1
            assert case.state in (QUIESCED, FAIL_IO)
            assert case.disk
            assert case.policy.unserved is OnUnserved.RECOVER
            assert case.phase_for >= case.policy.recovery_deadline
            assert case.daemon_for >= min(case.policy.recovery_deadline, 5.0)
            assert not (case.usage and case.usage.char_openers)
            assert not any((case.overdue, case.hold, case.trail.is_running))
            assert case.trail.attempts < RULE.attempts
            assert case.trail.not_before <= NOW
    assert commands > 100


def test_every_verdict_names_a_rule_of_the_table_and_every_rule_of_the_table_is_somebodys() -> None:
    cases = itertools.chain(everything(), (case for case, *_ in TRUTH.values()))
    assert {case.verdict().rule for case in cases} == policy.WHAT_WOULD_CHANGE_IT.keys()


def test_every_rule_is_in_the_truth_table() -> None:
    assert {case.verdict().rule for case, *_ in TRUTH.values()} == policy.WHAT_WOULD_CHANGE_IT.keys()


def test_a_hold_changes_what_is_done_and_never_what_a_device_is() -> None:
    for case in everything():
        if case.hold is None:
            without, on_hold = case.verdict(), replace(case, hold=HOLD).verdict()
            assert on_hold.kind is without.kind, case
            assert on_hold.action in (Action.NONE, Action.ALERT), case
            if on_hold.action is not without.action:
                assert on_hold.look_again_in == pytest.approx(HOLD.until - NOW), case
                assert on_hold.then, case


def test_every_verdict_is_a_sentence_and_nothing_is_looked_at_again_at_once() -> None:
    for case in everything():
        verdict = case.verdict()
        assert verdict.reason.strip(), case
        assert "None" not in verdict.reason, case
        assert verdict.look_again_in is None or verdict.look_again_in > 0, case


def test_a_verdict_that_asks_for_no_other_look_is_the_same_for_ever() -> None:
    for case in everything():
        verdict = case.verdict()
        if verdict.look_again_in is None and verdict.action is not Action.DELETE:
            for later in (0.3, 1.0, 50.0, 100.0, 100_000.0):
                changed = case.verdict(later)
                assert (changed.kind, changed.action) == (verdict.kind, verdict.action), (case, later)


def test_looking_again_when_told_to_ends_at_a_verdict_that_stays() -> None:
    for case in (case for case, *_ in TRUTH.values()):
        later, looks = 0.0, 0
        while (wait := case.verdict(later).look_again_in) is not None and later < 200:
            later, looks = later + wait, looks + 1
        assert looks <= 500, case
        last, for_ever = case.verdict(later), case.verdict(100_000.0)
        assert (last.kind, last.action) == (for_ever.kind, for_ever.action), case


@pytest.mark.parametrize("grace", [0.0, 0.5, 5.0, 3600.0])
def test_the_graces_are_over_when_they_are_over_and_not_before(grace: float) -> None:
    died = Case(policy=Policy(orphan_grace=grace), watched_for=0.0, idle_for=3600.0)
    added = replace(ADDED, policy=Policy(orphan_grace=0.0, setup_grace=grace), watched_for=0.0, idle_for=0.0)
    for case in (died, added):
        assert case.verdict(grace).action is Action.DELETE
        if grace:
            assert case.verdict(grace - 0.001).action is Action.NONE
            assert case.verdict().look_again_in == pytest.approx(grace)


def test_a_device_that_was_never_live_is_watched_even_when_it_is_old() -> None:
    case = replace(ADDED, idle_for=3600.0, watched_for=0.0)
    assert case.verdict().action is Action.NONE
    assert case.verdict().look_again_in == 0.5
    assert case.verdict(0.5).action is Action.DELETE


def test_who_has_it_open_is_looked_up_wherever_the_verdict_depends_on_it() -> None:
    for case in everything():
        if case.usage is None and not policy.needs_usage(case.seen(), case.history()):
            verdicts = [replace(case, usage=usage).verdict() for usage in USAGES]
            assert len({(verdict.kind, verdict.action) for verdict in verdicts}) == 1, case


@pytest.mark.parametrize("count", [1, 3, 4, 40])
def test_many_holders_are_counted_and_not_listed(count: int) -> None:
    holders = tuple(Holder("mount", f"/srv/{number} (ext4)") for number in range(count))
    reason = Case(usage=Usage(holders=holders)).verdict().reason
    assert reason.count("/srv/") == min(count, 3)
    assert (f"and {count - 3} more" in reason) == (count > 3)


@pytest.mark.parametrize(("command", "way_out"), [(OPENING, "open_mutex"), ("DEL_DEV", "the command's answer")])
def test_what_did_not_answer_decides_what_would_help(command: str, way_out: str) -> None:
    history = replace(Case().history(), overdue=Overdue(command, NOW - 11))
    verdict = policy.decide(Case().seen(), history, Policy(), Traits(), NOW)
    assert (verdict.kind, verdict.action) == (VerdictKind.WEDGED, Action.ALERT)
    assert way_out in policy.WHAT_WOULD_CHANGE_IT[verdict.rule]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.011, "11 ms"), (11, "11 s"), (119, "119 s"), (125, "2 min"), (7200, "120 min")]
)
def test_times_read_well(seconds: float, text: str) -> None:
    history = replace(Case().history(), overdue=Overdue("DEL_DEV", NOW - seconds))
    assert f"for {text};" in policy.decide(Case().seen(), history, Policy(), Traits(), NOW).reason
