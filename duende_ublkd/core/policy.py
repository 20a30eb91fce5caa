"""Decide what a device is and what to do about it. Every rule that can destroy data is here.

Rule 1: nothing outside this file chooses to delete a device.
Rule 2: this file imports no clock, no logger and nothing that does I/O, so the whole truth table fits in a unit test.
Rule 3: a pid proves nothing by itself. A dead `ublksrv_pid` can stand on a healthy device (a server that forked), a living
        one on a corpse (a recycled number, or that of another pid namespace). The kernel's state, the disk and the open char
        device decide.
Rule 4: only a device that is DEAD, has no disk, and is not open is ever deleted, and only after its grace. Where the
        policy says so, a device that waits for a server (QUIESCED, FAIL_IO) is stopped first: only when its deadline is
        over, and only when everybody who could hold its disk was looked for and nobody does.
Rule 5: every verdict names its rule, and `WHAT_WOULD_CHANGE_IT` has a sentence for each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from duende_ublkd.core.config import OnOrphan, OnUnserved
from duende_ublkd.core.ledger import is_contradicted
from duende_ublkd.core.model import OPENING, Action, Condition, KernelState, Verdict, VerdictKind

if TYPE_CHECKING:
    from duende_ublkd.core.config import Policy, Recovery
    from duende_ublkd.core.holds import Hold
    from duende_ublkd.core.ledger import History
    from duende_ublkd.core.model import DevInfo, Holder, Observation, Server
    from duende_ublkd.core.trail import Trail

SETTLING = 45.0
"""Seconds that a device may be on its way down: up to 6.14 the kernel notices a server that died with every tag in flight
only after the request timeout of 30 s (ublk_timeout)."""

COURTESY = 5.0
"""Seconds that a daemon watches before it runs a recovery command for a device that had no server before it came."""

LONG_SETUP = 3600.0
"""Seconds of being set up from which on it is said for how long."""

LETTING_GO = 1.0
"""Seconds that the kernel may take to free a deleted device that nobody holds; milliseconds are normal."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What this kernel's DEL_DEV can do. `async_delete`: DEL_DEV_ASYNC (6.9). `delete_can_be_cancelled`: 6.3.

    `stuck`: devices whose deletion has not answered by its deadline. ublk_ctl_mutex is one for all devices: from two on,
    nothing is added or deleted on this machine until whoever has it lets go.
    """

    async_delete: bool = True
    delete_can_be_cancelled: bool = True
    stuck: tuple[int, ...] = ()

    @property
    def is_control_plane_stuck(self) -> bool:
        """A second deletion stalls, too."""
        return len(self.stuck) > 1


def needs_usage(seen: Observation, past: History | None = None) -> bool:
    """Whether it has to be looked up who has this device open: not where the verdict does not depend on it.

    `past`: what was known before this look.
    """
    if seen.info is None:
        return _is_deleted_unseen(seen)
    if seen.info.state == KernelState.LIVE:
        return seen.disk is not None and (not _alive(seen.server) or is_contradicted(seen, past))
    return seen.info.state != KernelState.DEAD or seen.disk is None or seen.identity.sysfs_inode is None


def _is_deleted_unseen(seen: Observation) -> bool:
    """An unprivileged device whose node is gone: its id is taken, and it cannot even be asked about."""
    return seen.info is None and seen.identity.sysfs_inode is None and not seen.trouble


def decide(
    seen: Observation, past: History, policy: Policy, traits: Traits, now: float, hold: Hold | None = None
) -> Verdict:
    """What the device is, why, and what to do. `past` includes `seen`; `hold`: the one that is in force on it."""
    verdict = _decide(seen, past, policy, traits, now)
    if traits.is_control_plane_stuck and verdict.action is Action.DELETE:
        verdict = _behind_the_others(verdict, traits.stuck)
    return _hands_off(verdict, hold, now) if hold else verdict


def _behind_the_others(verdict: Verdict, stuck: tuple[int, ...]) -> Verdict:
    """It would only wait, too, and take a worker that other commands need."""
    ids = ", ".join(f"ublk{dev_id}" for dev_id in stuck[:3]) + (" and others" if len(stuck) > 3 else "")  # noqa: PLR2004
    reason = f"{verdict.reason}; the control plane is stuck: the deletions of {ids} have not answered"
    return Verdict(VerdictKind.WEDGED, reason, Action.ALERT, 5.0, "control-plane", "it is deleted, when they have")


def _hands_off(verdict: Verdict, hold: Hold, now: float) -> Verdict:
    """Planned work: nothing is done, and what the work itself may cause calls nobody."""
    planned = verdict.kind in (VerdictKind.ORPHANED, VerdictKind.UNSERVED, VerdictKind.PINNED)
    idle = verdict.action is Action.NONE or (verdict.action is Action.ALERT and not planned)
    left = max(hold.until - now, 0.0)
    by = f"uid {hold.uid}" if hold.uid else "root"
    note = f"on hold for {_span(left)} more by {by}" + (f" ({hold.why})" if hold.why else "")
    if idle:
        return replace(verdict, reason=f"{verdict.reason}; {note}")
    then = {
        Action.DELETE: "it is deleted",
        Action.RECOVER: "the recovery command runs",
        Action.ALERT: "somebody is told",
    }
    return replace(
        verdict,
        reason=f"{verdict.reason}; {note}",
        action=Action.NONE,
        look_again_in=left,
        rule="on-hold",
        then=then[verdict.action],
    )


def _decide(seen: Observation, past: History, policy: Policy, traits: Traits, now: float) -> Verdict:
    if past.overdue:
        return Verdict(
            VerdictKind.WEDGED,
            f"{past.overdue.command} has not answered for {_span(now - past.overdue.since)}; nothing more is sent to it",
            Action.ALERT,
            look_again_in=5.0,
            rule="open-overdue" if past.overdue.command == OPENING else "overdue",
        )
    if seen.info is None:
        if _is_deleted_unseen(seen):
            return _deleted(seen, past, now)
        reason = seen.trouble or "GET_DEV_INFO gave no answer"
        return Verdict(VerdictKind.UNKNOWN, reason, Action.ALERT, 5.0, "no-answer")
    if seen.info.state == KernelState.LIVE:
        return _live(seen, past, now)
    if seen.info.state in (KernelState.QUIESCED, KernelState.FAIL_IO):
        return _without_server(seen, past, policy, now)
    if seen.info.state == KernelState.DEAD:
        return _dead(seen, seen.info, past, policy, traits, now)
    reason = f"the kernel's state {seen.info.state} is not known here"
    return Verdict(VerdictKind.UNKNOWN, reason, Action.ALERT, rule="strange-state")


def _live(seen: Observation, past: History, now: float) -> Verdict:
    if seen.disk is None:
        return _live_without_disk(past, now)
    if _alive(seen.server) and not is_contradicted(seen, past):
        stopped = ", which is stopped" if seen.server and seen.server.condition == Condition.STOPPED.value else ""
        return Verdict(VerdictKind.LIVE, f"served by {seen.server}{stopped}", rule="served")
    if seen.usage is None or (not seen.usage.complete and not seen.usage.char_openers):
        reason = "the kernel says LIVE; who serves it cannot be seen from here"
        return Verdict(VerdictKind.LIVE, reason, rule="served-unseen")
    if opener := next((each for each in seen.usage.char_openers if each.may_serve), None):
        return Verdict(VerdictKind.LIVE, f"served by {opener}, which has its char device open", rule="served")
    return _live_without_server(seen, past, now)


def _live_without_server(seen: Observation, past: History, now: float) -> Verdict:
    """LIVE by the kernel's word alone. Since 6.15 it notices a death at the last close of the char device, and until 6.17 a
    server that was killed in START_DEV's partition scan never ends.
    """
    gone_for = now - past.phase_since
    opener = _other_opener(seen)
    dying = next((each for each in (seen.server, *_char_openers(seen)) if each and _is_dying(each)), None)
    if dying:
        what, rule = f"LIVE, but its server {dying} was killed and has not ended", "server-cannot-end"
    else:
        what = f"LIVE, but its server {past.server or seen.server or ''} is gone".replace("  ", " ")
        rule = "leaked-descriptor" if opener else "death-never-noticed"
    if gone_for < SETTLING:
        reason = f"{what}; the kernel has not noticed yet"
        return Verdict(VerdictKind.CLOSING, reason, look_again_in=_soon(gone_for), rule="death-unnoticed")
    why = {
        "server-cannot-end": "one of its threads sleeps in the kernel, and nothing can wake it from outside",
        "leaked-descriptor": f"{opener} has its char device open, and no io_uring to serve it with",
        "death-never-noticed": "a leaked descriptor or a stuck request keeps the kernel from noticing",
    }
    reason = f"{what} since {_span(gone_for)}; {why[rule]}"
    return Verdict(VerdictKind.WEDGED, reason, Action.ALERT, look_again_in=5.0, rule=rule)


def _char_openers(seen: Observation) -> tuple[Server, ...]:
    return seen.usage.char_openers if seen.usage else ()


def _other_opener(seen: Observation) -> Server | None:
    """Who has the char device open and cannot be its server."""
    return next((each for each in _char_openers(seen) if not each.may_serve and not _is_dying(each)), None)


def _is_dying(server: Server) -> bool:
    return server.condition == Condition.DYING.value


def _live_without_disk(past: History, now: float) -> Verdict:
    """START_DEV sets LIVE before the disk is there; a blocked STOP_DEV has removed it; 6.13 to 7.1 copy ADD_DEV's state."""
    lasted = now - past.phase_since
    if past.was_live:
        if lasted < SETTLING:
            reason = "LIVE, its disk already gone: being stopped"
            return Verdict(VerdictKind.CLOSING, reason, look_again_in=_soon(lasted), rule="being-stopped")
        reason = f"LIVE without its disk for {_span(lasted)}: a STOP_DEV does not come to an end"
        return Verdict(VerdictKind.WEDGED, reason, Action.ALERT, look_again_in=5.0, rule="stop-stuck")
    if lasted < SETTLING:
        reason = "LIVE, its disk not there yet: being started"
        return Verdict(VerdictKind.STARTING, reason, look_again_in=_soon(lasted), rule="being-started")
    reason = f"LIVE without a disk for {_span(lasted)}: a stuck START_DEV, or a stray state that ADD_DEV left"
    return Verdict(VerdictKind.UNKNOWN, reason, Action.ALERT, look_again_in=5.0, rule="stray-state")


def _without_server(seen: Observation, past: History, policy: Policy, now: float) -> Verdict:
    """QUIESCED or FAIL_IO: a server may come at any moment, by itself or because our command starts one."""
    name, lasted = seen.state_name, now - past.phase_since
    if seen.identity.sysfs_inode is None:
        reason = f"{name}, and deleted: its char device is gone, so that no server can take it"
        return Verdict(VerdictKind.UNKNOWN, reason, Action.ALERT, look_again_in=5.0, rule="deleted-undead")
    if seen.disk is None:
        if past.was_live and lasted < SETTLING:
            reason = f"{name}, its disk gone: being stopped"
            return Verdict(VerdictKind.CLOSING, reason, look_again_in=_soon(lasted), rule="being-stopped")
        reason = f"{name} without a disk: a stray state that ADD_DEV left, or a stuck STOP_DEV"
        return Verdict(VerdictKind.UNKNOWN, reason, Action.ALERT, look_again_in=5.0, rule="stray-state")
    if past.trail.began is not None:
        return _being_recovered(name, past.trail, policy, now)
    if opener := next((each for each in _char_openers(seen) if each.may_serve), None):
        return _taken(name, opener, past, policy, now)
    if policy.recovery_deadline > lasted:
        return _deadline_open(seen, past, policy, policy.recovery_deadline - lasted, now)
    # A server that comes back by itself may have begun to while nobody looked.
    courtesy = past.watched_since + min(policy.recovery_deadline, COURTESY) - now
    if policy.unserved is OnUnserved.RECOVER and courtesy > 0:
        reason = f"{_waiting(seen)}; {_span(policy.recovery_deadline)} to be recovered in"
        then = _AFTER_DEADLINE[policy.unserved]
        return Verdict(VerdictKind.UNSERVED, reason, look_again_in=courtesy, rule="deadline-open", then=then)
    if policy.unserved is OnUnserved.RECOVER and policy.recover:
        return _to_be_recovered(seen, past.trail, policy, policy.recover, lasted, now)
    if policy.unserved is OnUnserved.DELETE:
        return _to_be_given_up(seen, past, policy, now)
    reason = f"{_waiting(seen)}, for over {_span(policy.recovery_deadline)}"
    return Verdict(VerdictKind.UNSERVED, reason, Action.ALERT, rule="deadline-over")


def _taken(name: str, by: Server, past: History, policy: Policy, now: float) -> Verdict:
    """A new server is at it, or hangs in it, or is the next of many that come and go."""
    lasted, longest = now - past.phase_since, max(policy.recovery_deadline, SETTLING)
    if lasted >= longest:
        reason = f"{name}; {by} has had its char device for {_span(lasted)}, and does not serve it"
        return Verdict(VerdictKind.UNSERVED, reason, Action.ALERT, look_again_in=5.0, rule="taken-too-long")
    if past.takers > 1 and _left_alone_for(past, now) >= 2 * longest:
        reason = f"{name}{_in_vain(past, now)}; {by} has its char device now"
        return Verdict(VerdictKind.UNSERVED, reason, Action.ALERT, look_again_in=2.0, rule="taken-in-vain")
    reason = f"{name}; {by} has taken its char device"
    return Verdict(VerdictKind.RECOVERING, reason, look_again_in=2.0, rule="taken")


def _deadline_open(seen: Observation, past: History, policy: Policy, left: float, now: float) -> Verdict:
    """Each server that comes and goes has the deadline begin anew, so that nothing is done beside the next one. Somebody is
    told nevertheless: when the device has been without service for the deadline; or, where a deed is to follow, for twice
    that, since one server that came in vain may have put it off.
    """
    patience = policy.recovery_deadline * (1 if policy.unserved is OnUnserved.ALERT else 2)
    told_in, then = patience - _left_alone_for(past, now), _AFTER_DEADLINE[policy.unserved]
    if told_in > 0:
        reason = f"{_waiting(seen)}; {_span(policy.recovery_deadline)} to be recovered in"
        then = then if left <= told_in else _AFTER_DEADLINE[OnUnserved.ALERT]
        wait = min(left, told_in)
        return Verdict(VerdictKind.UNSERVED, reason, look_again_in=wait, rule="deadline-open", then=then)
    reason = f"{_waiting(seen)}{_in_vain(past, now)}"
    then = "" if policy.unserved is OnUnserved.ALERT else then
    return Verdict(VerdictKind.UNSERVED, reason, Action.ALERT, left, "taken-in-vain", then)


def _unserved_for(past: History, now: float) -> float:
    return now - (past.phase_since if past.unserved_since is None else past.unserved_since)


def _left_alone_for(past: History, now: float) -> float:
    """Without service, and since the last attempt of our own failed: of those somebody is told in another way."""
    return min(_unserved_for(past, now), now - past.trail.not_before)


def _in_vain(past: History, now: float) -> str:
    """Behind whatever says that it is not served."""
    for_so_long = f"; without service for {_span(_unserved_for(past, now))}"
    if not past.takers:
        return for_so_long
    many = "1 server has" if past.takers == 1 else f"{past.takers} servers have"
    return f"{for_so_long}, {many} taken it and let go"


_AFTER_DEADLINE = {
    OnUnserved.ALERT: "somebody is told",
    OnUnserved.RECOVER: "the recovery command runs",
    OnUnserved.DELETE: "it is stopped and deleted, if nothing holds its disk",
}


def _waiting(seen: Observation) -> str:
    queued = seen.info is not None and seen.info.state == KernelState.QUIESCED
    effect = "its I/O waits for a new server" if queued else "its I/O fails"
    held = f"; held by {_list(seen.usage.holders)}" if seen.usage and seen.usage.holders else ""
    opener = next(iter(_char_openers(seen)), None)
    taken = f"; {opener} has its char device open, and no server can take it before that is closed" if opener else ""
    return f"{seen.state_name} without a server: {effect}{held}{taken}"


def _being_recovered(name: str, trail: Trail, policy: Policy, now: float) -> Verdict:
    of = f" of {policy.recover.attempts}" if policy.recover else ""
    lasted = max(now - (now if trail.began is None else trail.began), 0.0)  # begun after this look, and judged by it
    reason = f"{name}; the recovery command (attempt {trail.attempts}{of}) runs for {_span(lasted)}"
    return Verdict(VerdictKind.RECOVERING, reason, look_again_in=1.0, rule="recovery-runs")


def _to_be_recovered(
    seen: Observation, trail: Trail, policy: Policy, rule: Recovery, lasted: float, now: float
) -> Verdict:
    if trail.is_given_up(rule.attempts):
        why = f": {trail.trouble}" if trail.trouble else ": it was served again each time, and never for long"
        tries = f"{trail.attempts} attempt{'' if trail.attempts == 1 else 's'}"
        reason = f"{_waiting(seen)}; recovery given up after {tries}{why}"
        return Verdict(VerdictKind.UNSERVED, reason, Action.ALERT, rule="given-up")
    if now < trail.not_before:
        what = trail.trouble or "it was served again, and not for long"
        reason = f"{_waiting(seen)}; attempt {trail.attempts} of {rule.attempts}: {what}"
        wait = trail.not_before - now
        then = "the recovery command runs"
        return Verdict(VerdictKind.UNSERVED, reason, look_again_in=wait, rule="backoff", then=then)
    if _char_openers(seen):  # START_USER_RECOVERY would be refused; or it is a server that has no ring yet
        reason = f"{_waiting(seen)}, so no command is run"
        if lasted < max(policy.recovery_deadline, SETTLING):
            then = "the recovery command runs"
            return Verdict(VerdictKind.UNSERVED, reason, look_again_in=2.0, rule="not-free", then=then)
        return Verdict(VerdictKind.UNSERVED, reason, Action.ALERT, look_again_in=5.0, rule="leaked-descriptor")
    attempt = f"attempt {trail.attempts + 1} of {rule.attempts}"
    return Verdict(VerdictKind.UNSERVED, f"{_waiting(seen)}; {attempt}", Action.RECOVER, rule="to-be-recovered")


def _to_be_given_up(seen: Observation, past: History, policy: Policy, now: float) -> Verdict:
    """Stopping it fails whatever I/O waits. Reasons to hold back, one after the other; nobody looks into the past for it."""
    if past.paused_until > now:
        reason, then = f"{_waiting(seen)}; {past.pause_reason}", "another attempt to delete it"
        return Verdict(VerdictKind.UNSERVED, reason, Action.ALERT, past.paused_until - now, "paused", then)
    left = max(past.watched_since + policy.recovery_deadline, past.trail.limit) - now
    if left > 0:
        attempt = past.trail.limit > now
        why = "a recovery command may still run" if attempt else "this daemon has not watched it for its whole deadline"
        reason = f"{_waiting(seen)}; {why}"
        then = "it is stopped and deleted, if nothing holds its disk"
        return Verdict(VerdictKind.UNSERVED, reason, look_again_in=left, rule="not-yet-given-up", then=then)
    if seen.usage is None:
        reason = f"{_waiting(seen)}; nobody looked who holds it"
        return Verdict(VerdictKind.UNSERVED, reason, Action.ALERT, look_again_in=1.0, rule="holders-unknown")
    if seen.usage.char_openers or seen.usage.holders:
        reason = f"{_waiting(seen)}, so it is not deleted"
        rule = "leaked-descriptor" if seen.usage.char_openers else "held"
        return Verdict(VerdictKind.UNSERVED, reason, Action.ALERT, look_again_in=5.0, rule=rule)
    if not seen.usage.complete:
        blind = f" ({seen.usage.blind})" if seen.usage.blind else ""
        reason = f"{_waiting(seen)}; not everybody who may hold it could be seen{blind}, so it is not deleted"
        return Verdict(VerdictKind.UNSERVED, reason, Action.ALERT, look_again_in=5.0, rule="holders-unknown")
    reason = f"{_waiting(seen)}, for over {_span(policy.recovery_deadline)}; nothing holds its disk"
    return Verdict(VerdictKind.UNSERVED, reason, Action.DELETE, rule="to-be-given-up")


def _dead(seen: Observation, info: DevInfo, past: History, policy: Policy, traits: Traits, now: float) -> Verdict:
    """Reasons to hold back, one after the other; what is left is an orphan."""
    if seen.identity.sysfs_inode is None:
        return _deleted(seen, past, now)
    can_be_async = traits.async_delete and not info.unprivileged
    return (
        _in_transition(seen, past, now)
        or _in_use(seen, past, policy, now)
        or _open_unseen(past, now)
        or _grace(past, policy, now)
        or _paused(past, now)
        or _held(seen, past, policy, waits_for_ever=not (can_be_async or traits.delete_can_be_cancelled))
        or Verdict(
            VerdictKind.ORPHANED,
            f"{_corpse(past)}, {_by_nobody(seen)}",
            _ON_ORPHAN[policy.orphaned],
            rule="orphaned",
        )
    )


def _by_nobody(seen: Observation) -> str:
    if seen.usage and seen.usage.complete:
        return "nobody has it open, nothing holds it"
    return "nobody was seen to have it open or to hold it (not all could be seen)"


_ON_ORPHAN = {OnOrphan.DELETE: Action.DELETE, OnOrphan.ALERT: Action.ALERT, OnOrphan.IGNORE: Action.NONE}


def _on_its_way(past: History) -> VerdictKind:
    return VerdictKind.CLOSING if past.was_live else VerdictKind.STARTING


def _in_transition(seen: Observation, past: History, now: float) -> Verdict | None:
    """START_DEV that failed sets DEAD before the disk is gone; some kernels take the disk away first, some the state."""
    if seen.disk is None:
        return None
    lasted = now - past.phase_since
    if lasted < SETTLING:
        reason = "DEAD, its disk still there: in transition"
        return Verdict(_on_its_way(past), reason, look_again_in=_soon(lasted), rule="in-transition")
    reason = f"DEAD with a disk for {_span(lasted)}"
    return Verdict(VerdictKind.UNKNOWN, reason, Action.ALERT, look_again_in=5.0, rule="dead-with-disk")


def _in_use(seen: Observation, past: History, policy: Policy, now: float) -> Verdict | None:
    if seen.usage is None:
        reason = "DEAD; nobody looked who has it open"
        return Verdict(VerdictKind.UNKNOWN, reason, Action.ALERT, look_again_in=1.0, rule="openers-unknown")
    if seen.usage.char_openers:
        return _open(seen.usage.char_openers, past, policy, now)
    if seen.char_device is None:
        reason = f"DEAD, and its node is missing: mknod /dev/ublkc{seen.dev_id} c {_numbers(seen.identity.char_rdev)}"
        return Verdict(VerdictKind.UNKNOWN, reason, Action.ALERT, look_again_in=5.0, rule="node-missing")
    return None


def _open(openers: tuple[Server, ...], past: History, policy: Policy, now: float) -> Verdict:
    """Who may serve may take as long as it likes to set a device up; nobody else ever starts it."""
    opener = next((each for each in openers if each.may_serve), openers[0])
    lasted = now - past.phase_since
    if past.was_live and lasted >= SETTLING:
        reason = f"DEAD for {_span(lasted)}; its id stays taken until {opener} closes its char device"
        return Verdict(VerdictKind.PINNED, reason, Action.ALERT, look_again_in=5.0, rule="leaked-descriptor")
    if not past.was_live and not opener.may_serve and lasted >= max(SETTLING, policy.setup_grace):
        cannot = "and was killed" if _is_dying(opener) else "and no io_uring to serve it with"
        reason = f"DEAD, never seen LIVE, for {_span(lasted)}; {opener} has its char device open, {cannot}"
        return Verdict(VerdictKind.PINNED, reason, Action.ALERT, look_again_in=5.0, rule="leaked-descriptor")
    doing = "not yet closed by" if past.was_live else "being set up by"
    since = f", for {_span(lasted)} now" if lasted >= LONG_SETUP else ""
    reason = f"DEAD, {doing} {opener}, which has its char device open{since}"
    return Verdict(_on_its_way(past), reason, look_again_in=_soon(lasted, at_most=15.0), rule="open")


def _open_unseen(past: History, now: float) -> Verdict | None:
    """Again and again the kernel says that somebody has it open, and no look finds anybody."""
    if past.was_live or past.times_busy < 2 or now >= past.paused_until:  # noqa: PLR2004 - once is a file being closed
        return None
    reason = f"DEAD, never seen LIVE; {past.pause_reason}"
    wait = past.paused_until - now
    return Verdict(VerdictKind.UNKNOWN, reason, Action.ALERT, wait, "open-unseen", "its grace begins anew")


def _grace(past: History, policy: Policy, now: float) -> Verdict | None:
    """None when the grace is over. A server may delete for itself, or not have opened its new device yet."""
    if past.seen_idle_since is None or past.idle_since is None:
        reason = "DEAD, its idle time only begins"
        return Verdict(_on_its_way(past), reason, look_again_in=max(policy.orphan_grace, 0.02), rule="orphan-grace")
    settled_in = past.seen_idle_since + policy.orphan_grace - now
    set_up_in = 0.0 if past.was_live else past.idle_since + policy.setup_grace - now
    if set_up_in > 0:
        left = f"{_span(set_up_in)} of {_span(policy.setup_grace)} left"
        reason = f"added, never seen LIVE, open nowhere; its server has {left} to open it"
        wait = max(set_up_in, settled_in)
        return Verdict(_on_its_way(past), reason, look_again_in=wait, rule="setup-grace", then="it is an orphan")
    if settled_in > 0:
        reason = f"{_corpse(past)}, open nowhere; watched for {_span(policy.orphan_grace)} before that is believed"
        then = "it is an orphan"
        return Verdict(_on_its_way(past), reason, look_again_in=settled_in, rule="orphan-grace", then=then)
    return None


def _paused(past: History, now: float) -> Verdict | None:
    if now >= past.paused_until:
        return None
    reason = f"{_corpse(past)}; {past.pause_reason}"
    wait = past.paused_until - now
    return Verdict(VerdictKind.ORPHANED, reason, Action.ALERT, wait, "paused", "another attempt to delete it")


def _held(seen: Observation, past: History, policy: Policy, *, waits_for_ever: bool) -> Verdict | None:
    """Up to 6.2 DEL_DEV waits for holders uninterruptibly, with the mutex held that every ADD_DEV and DEL_DEV needs."""
    if seen.usage and seen.usage.holders:
        reason = f"{_corpse(past)}; its id stays taken until {_list(seen.usage.holders)} lets go"
        if waits_for_ever:
            reason = f"{reason}; then it can be deleted"
            return Verdict(VerdictKind.PINNED, reason, Action.ALERT, look_again_in=5.0, rule="pinned")
        return Verdict(VerdictKind.PINNED, reason, _ON_ORPHAN[policy.orphaned], rule="pinned")
    if waits_for_ever and not (seen.usage and seen.usage.complete):
        reason = "DEAD; this kernel's DEL_DEV would block every other one if a holder had been overlooked"
        return Verdict(VerdictKind.UNKNOWN, reason, Action.ALERT, look_again_in=5.0, rule="holders-unknown")
    return None


def _deleted(seen: Observation, past: History, now: float) -> Verdict:
    """No node, no sysfs entry, id taken: somebody's reference is all that is left, and only its owner can drop it."""
    lasted = now - past.phase_since
    if seen.usage and seen.usage.holders:
        reason = f"deleted; its id frees itself when {_list(seen.usage.holders)} lets go"
    elif lasted < LETTING_GO:
        reason = "deleted; the kernel is letting go of it"
        return Verdict(VerdictKind.CLOSING, reason, look_again_in=_soon(lasted), rule="deleted")
    elif seen.usage and seen.usage.char_openers:
        reason = f"deleted; its id frees itself when {seen.usage.char_openers[0]} closes its char device"
    else:
        reason = "deleted; its id frees itself when a holder that cannot be seen lets go"
    wait = min(max(lasted / 4, 0.25), 5.0)
    return Verdict(VerdictKind.PINNED, reason, Action.ALERT, look_again_in=wait, rule="deleted-and-held")


def _alive(server: Server | None) -> bool:
    return server is not None and server.alive is True and server.may_serve


def _corpse(past: History) -> str:
    if past.server:
        return f"server {past.server} {'died' if past.server_died else 'has let go'}, device DEAD"
    return "DEAD, its server gone" if past.was_live else "DEAD, never seen LIVE"


def _soon(lasted: float, *, at_most: float = 2.0) -> float:
    """When to look again at what is changing: in proportion to how long it has lasted, from 20 ms on."""
    return min(max(lasted / 2, 0.02), at_most)


def _span(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:  # noqa: PLR2004 - two minutes read better as seconds
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"


def _list(holders: tuple[Holder, ...]) -> str:
    shown = ", ".join(str(holder) for holder in holders[:3])
    more = len(holders) - 3
    return f"{shown} and {more} more" if more > 0 else shown


def _numbers(rdev: tuple[int, int] | None) -> str:
    return f"{rdev[0]} {rdev[1]}" if rdev else "MAJOR MINOR"


WHAT_WOULD_CHANGE_IT = {
    "on-hold": "duende-ublkd release, or the end of the hold",
    "control-plane": "the end of whatever holds ublk_ctl_mutex: most often somebody's DEL_DEV of a device whose server does "
    "not answer its I/O (kill that server), or of one whose server was killed in START_DEV (6.7 to 6.17: a reboot)",
    "overdue": "the command's answer; a person can look for what it waits for (dmesg, /proc/PID/stack), and say that one of "
    "a former daemon is over: duende-ublkd release",
    "open-overdue": "a new server, or the end of whoever holds the disk's open_mutex: since 6.18.4 the kernel's own read of "
    "the partition table does, which waits for the server that died in it; a person who knows that nobody uses the disk can "
    "send STOP_DEV",
    "no-answer": "an answer of the driver to GET_DEV_INFO",
    "strange-state": "a version of duende-ublkd that knows the state",
    "served": "the death of that process, or its closing the device",
    "served-unseen": "the kernel's state; a look with CAP_SYS_PTRACE in the host's pid namespace would name the server",
    "death-unnoticed": "the kernel noticing the death, within 30 s of it",
    "server-cannot-end": "a reboot, most likely; until then send it neither STOP_DEV nor DEL_DEV, which would block ADD_DEV "
    "and DEL_DEV of every device. Kernels from 6.19 and 6.18.4 on do not get there",
    "leaked-descriptor": "the end of the process that has the char device open, or its closing it: kill it, if it is idle",
    "death-never-noticed": "the end of whoever still has the char device open; a blocked request; else a reboot",
    "being-stopped": "the end of the STOP_DEV that somebody has sent",
    "stop-stuck": "the end of the STOP_DEV, which waits for I/O of the former server",
    "being-started": "the disk's arrival, or START_DEV's failure",
    "stray-state": "START_DEV by its server; or its owner, who knows whether a server is behind it, deleting it",
    "taken": "the new server finishing the recovery, or letting go",
    "taken-in-vain": "a server that finishes the recovery: the journal of those that have tried tells why they ended "
    "(journalctl -u UNIT)",
    "taken-too-long": "that server finishing the recovery; or its end, and another one",
    "recovery-runs": "the device being served, or the end of the command or of its time",
    "deadline-open": "a new server: START_USER_RECOVERY and END_USER_RECOVERY",
    "deadline-over": 'a new server; unserved = "recover" or "delete" in the configuration',
    "not-free": "whoever has its char device open closing it, or serving the device",
    "backoff": "a new server, whoever starts it",
    "given-up": "a new server, whoever starts it; or, when the cause is mended, duende-ublkd release: attempts begin anew",
    "to-be-recovered": "a new server that is quicker",
    "not-yet-given-up": "a new server",
    "held": "a new server; or every holder letting go (umount, swapoff, closing it), and then it is deleted",
    "holders-unknown": "a look that can see every process: CAP_SYS_PTRACE in the host's pid namespace",
    "to-be-given-up": "a new server that is quicker, or somebody opening its disk",
    "in-transition": "the kernel finishing what is under way",
    "dead-with-disk": "the kernel taking the disk away",
    "openers-unknown": "a look at who has it open",
    "open": "that process closing the char device, or starting the device",
    "node-missing": "the node being made anew: its exclusive open is the lock for a deletion",
    "setup-grace": "its server opening it",
    "orphan-grace": "anybody opening it, or its server deleting it",
    "open-unseen": "whoever has its char device open closing it, or starting the device; a look with CAP_SYS_PTRACE in the "
    "host's pid namespace would name him",
    "paused": "the pause being over",
    "pinned": "the holder letting go: umount, swapoff, closing it",
    "deleted": "the last reference going",
    "deleted-undead": "STOP_DEV by a person who knows what waits for it",
    "deleted-and-held": "the holder letting go; the id then frees itself",
    "orphaned": "anybody opening it",
}
"""What it takes for another verdict, by rule."""
