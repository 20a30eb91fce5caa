"""The truth table of policy.decide(): what each device is called, why, and that nothing in use is ever deleted."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

from duende_ublkd.core import policy
from duende_ublkd.core.config import OnOrphan, Policy
from duende_ublkd.core.ledger import History, Overdue
from duende_ublkd.core.model import (
    Action,
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

if TYPE_CHECKING:
    from collections.abc import Iterator

NOW = 1000.0
IDENTITY = Identity(14_628, (240, 3))
DELETED = Identity(None)
DISK = Disk((259, 0), 7)
DEAD, LIVE, QUIESCED, FAIL_IO = KernelState.DEAD, KernelState.LIVE, KernelState.QUIESCED, KernelState.FAIL_IO
ALIVE = Server(4121, alive=True, comm="ublk.loop")
GONE = Server(4121, alive=False)
NOBODY = Usage()
OPEN = Usage(char_openers=(Server(4122, alive=True, comm="worker"),))
MOUNTED = Usage(holders=(Holder("mount", "/srv (ext4)"),))
SWEPT_IN_PART = Usage(complete=False)
USAGES = (None, NOBODY, OPEN, MOUNTED, SWEPT_IN_PART, replace(OPEN, holders=MOUNTED.holders))
MODERN = Traits()
OLD = Traits(async_delete=False, delete_can_be_cancelled=False)
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
    overdue: bool = False
    paused_for: float = 0.0
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
            phase=(),
            phase_since=NOW - self.phase_for,
            seen_live=self.seen_live,
            seen_idle_since=None if self.watched_for is None else NOW - self.watched_for,
            idle_since=None if self.idle_for is None else NOW - self.idle_for,
            server=GONE if self.seen_live else None,
            server_died=self.server_died,
            overdue=Overdue("DEL_DEV_ASYNC", NOW - 11) if self.overdue else None,
            paused_until=NOW + self.paused_for,
            pause_reason="deleting it failed: DEL_DEV_ASYNC on ublk3: input/output error" if self.paused_for else "",
        )

    def verdict(self, later: float = 0.0) -> Verdict:
        return policy.decide(self.seen(), self.history(), self.policy, self.traits, NOW + later)


LIVE_CASE = Case(state=LIVE, disk=DISK, server=ALIVE, usage=None, idle_for=None, watched_for=None)
ADDED = Case(seen_live=False, idle_for=1.0, watched_for=1.0, phase_for=1.0)
UNSERVED = Case(state=QUIESCED, disk=DISK, phase_for=1.0, idle_for=None, watched_for=None)
KEEPS = Policy(orphaned=OnOrphan.ALERT)

# case, verdict, action, what the sentence names
TRUTH = {
    "served": (LIVE_CASE, "live", "none", "served by 4121 (ublk.loop)"),
    "served by a fork": (replace(LIVE_CASE, server=GONE, usage=OPEN), "live", "none", "4122 (worker)"),
    "served, no pid": (replace(LIVE_CASE, server=None, usage=OPEN), "live", "none", "char device open"),
    "served by who knows": (replace(LIVE_CASE, server=GONE, usage=SWEPT_IN_PART), "live", "none", "cannot be seen"),
    "served, nobody looked": (replace(LIVE_CASE, server=GONE), "live", "none", "cannot be seen"),
    "just died": (replace(LIVE_CASE, server=GONE, usage=Usage(), phase_for=1.0), "closing", "none", "not noticed yet"),
    "died, not noticed": (replace(LIVE_CASE, server=GONE, usage=Usage()), "wedged", "alert", "leaked descriptor"),
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
    "taken over": (replace(UNSERVED, usage=OPEN), "recovering", "none", "4122 (worker) has taken its char device"),
    "quiesced, stopped": (replace(UNSERVED, disk=None), "closing", "none", "being stopped"),
    "stray QUIESCED": (replace(UNSERVED, disk=None, seen_live=False), "unknown", "alert", "stray state"),
    "added": (ADDED, "starting", "none", "of 60 s left to open it"),
    "being set up": (replace(ADDED, usage=OPEN), "starting", "none", "being set up by 4122 (worker)"),
    "never opened": (replace(ADDED, idle_for=61.0), "orphaned", "delete", "never seen LIVE"),
    "not yet closed": (Case(usage=OPEN), "closing", "none", "not yet closed by 4122 (worker)"),
    "watched briefly": (Case(idle_for=0.2, watched_for=0.2), "closing", "none", "watched for 500 ms"),
    "idle only begins": (Case(idle_for=None, watched_for=None), "closing", "none", "only begins"),
    "orphan": (Case(), "orphaned", "delete", "server 4121 died, device DEAD, nobody has it open, nothing holds it"),
    "orphan of the living": (Case(server_died=False), "orphaned", "delete", "server 4121 has let go, device DEAD"),
    "orphan, swept in part": (Case(usage=SWEPT_IN_PART), "orphaned", "delete", "device DEAD"),
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
    "just deleted": (Case(listed=False, phase_for=0.1), "closing", "none", "letting go"),
    "deleted, held": (Case(listed=False, usage=MOUNTED), "pinned", "alert", "mount /srv"),
    "deleted, open": (Case(listed=False, usage=OPEN), "pinned", "alert", "4122 (worker) closes its char device"),
    "deleted, by whom held": (Case(listed=False), "pinned", "alert", "cannot be seen"),
    "overdue": (Case(overdue=True), "wedged", "alert", "DEL_DEV_ASYNC has not answered for 11 s"),
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


def everything() -> Iterator[Case]:
    """Some hundred thousand devices, most of which no kernel would show."""
    times = ((None, None), (0.1, 0.1), (0.5, 0.5), (59.9, 59.9), (60.0, 0.1), (60.0, 0.5), (3600.0, 3600.0))
    for state, disk, (listed, node), usage, server, seen_live, (idle, watched) in itertools.product(
        (None, DEAD, LIVE, QUIESCED, FAIL_IO, 7),
        (None, DISK),
        ((True, True), (True, False), (False, False)),
        USAGES,
        (None, ALIVE, GONE),
        (False, True),
        times,
    ):
        case = Case(state, disk, node, listed, usage, server, seen_live=seen_live, idle_for=idle, watched_for=watched)
        yield case
        if server is None:
            yield replace(case, overdue=True)
            yield replace(case, paused_for=1.0)
            yield replace(case, policy=KEEPS, phase_for=1.0)
            yield replace(case, policy=Policy(setup_grace=0.0, orphan_grace=0.0), phase_for=0.0)
            yield replace(case, traits=OLD)
            yield replace(case, unprivileged=True, traits=Traits(delete_can_be_cancelled=False))


def why_hands_off(case: Case) -> list[str]:
    """The promise, in other words than the policy's: each reason alone is enough."""
    grace = case.policy
    needed = 0.0 if case.seen_live else grace.setup_grace
    cannot_wait = not case.traits.delete_can_be_cancelled and (case.unprivileged or not case.traits.async_delete)
    usage = case.usage or Usage()
    reasons = {
        "not DEAD": case.state != DEAD,
        "has a disk": case.disk is not None,
        "no sysfs entry": not case.listed,
        "no node": not case.node,
        "nobody looked": case.usage is None,
        "open": bool(usage.char_openers),
        "not watched": case.watched_for is None or case.watched_for < grace.orphan_grace,
        "grace not over": case.idle_for is None or case.idle_for < needed,
        "overdue": case.overdue,
        "paused": case.paused_for > 0,
        "not wanted": grace.orphaned is not OnOrphan.DELETE,
        "would block": cannot_wait and (bool(usage.holders) or not usage.complete),
    }
    return [reason for reason, so in reasons.items() if so]


def test_no_device_that_is_served_or_held_open_is_ever_deleted() -> None:
    """Time alone never outweighs a server, whatever the kernel's state; and what is left is deleted."""
    deleted = 0
    for case in everything():
        reasons = why_hands_off(case)
        assert (case.verdict().action is Action.DELETE) == (not reasons), (case, reasons)
        deleted += not reasons
    assert deleted > 100


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
        if case.usage is None and not policy.needs_usage(case.seen()):
            verdicts = [replace(case, usage=usage).verdict() for usage in USAGES]
            assert len({(verdict.kind, verdict.action) for verdict in verdicts}) == 1, case


@pytest.mark.parametrize("count", [1, 3, 4, 40])
def test_many_holders_are_counted_and_not_listed(count: int) -> None:
    holders = tuple(Holder("mount", f"/srv/{number} (ext4)") for number in range(count))
    reason = Case(usage=Usage(holders=holders)).verdict().reason
    assert reason.count("/srv/") == min(count, 3)
    assert (f"and {count - 3} more" in reason) == (count > 3)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.011, "11 ms"), (11, "11 s"), (119, "119 s"), (125, "2 min"), (7200, "120 min")]
)
def test_times_read_well(seconds: float, text: str) -> None:
    history = replace(Case().history(), overdue=Overdue("DEL_DEV", NOW - seconds))
    assert f"for {text};" in policy.decide(Case().seen(), history, Policy(), Traits(), NOW).reason
