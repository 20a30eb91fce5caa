"""Decide what a device is and what to do about it. Every rule that can destroy data is here.

Rule 1: nothing outside this file chooses to delete a device.
Rule 2: this file imports no clock, no logger and nothing that does I/O, so the whole truth table fits in a unit test.
Rule 3: a pid proves nothing by itself. A dead `ublksrv_pid` can stand on a healthy device (a server that forked), a living
        one on a corpse (a recycled number). The kernel's state, the disk and the open char device decide.
Rule 4: only a device that is DEAD, has no disk, and is not open is ever deleted, and only after its grace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from duende_ublkd.core.config import OnOrphan
from duende_ublkd.core.model import Action, KernelState, Verdict, VerdictKind

if TYPE_CHECKING:
    from duende_ublkd.core.config import Policy
    from duende_ublkd.core.ledger import History
    from duende_ublkd.core.model import DevInfo, Holder, Observation, Server

SETTLING = 45.0
"""Seconds that a device may be on its way down: up to 6.14 the kernel notices a server that died with every tag in flight
only after the request timeout of 30 s (ublk_timeout)."""

LETTING_GO = 1.0
"""Seconds that the kernel may take to free a deleted device that nobody holds; milliseconds are normal."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What this kernel's DEL_DEV can do. `async_delete`: DEL_DEV_ASYNC (6.9). `delete_can_be_cancelled`: 6.3."""

    async_delete: bool = True
    delete_can_be_cancelled: bool = True


def needs_usage(seen: Observation) -> bool:
    """Whether it has to be looked up who has this device open: not where the verdict does not depend on it."""
    if seen.info is None:
        return _is_deleted_unseen(seen)
    if seen.info.state == KernelState.LIVE:
        return seen.disk is not None and not _alive(seen.server)
    return seen.info.state != KernelState.DEAD or seen.disk is None or seen.identity.sysfs_inode is None


def _is_deleted_unseen(seen: Observation) -> bool:
    """An unprivileged device whose node is gone: its id is taken, and it cannot even be asked about."""
    return seen.info is None and seen.identity.sysfs_inode is None and not seen.trouble


def decide(seen: Observation, past: History, policy: Policy, traits: Traits, now: float) -> Verdict:
    """What the device is, why, and what to do. `past` includes `seen`."""
    if past.overdue:
        return Verdict(
            VerdictKind.WEDGED,
            f"{past.overdue.command} has not answered for {_span(now - past.overdue.since)}; nothing more is sent to it",
            Action.ALERT,
            look_again_in=5.0,
        )
    if seen.info is None:
        if _is_deleted_unseen(seen):
            return _deleted(seen, past, now)
        return Verdict(VerdictKind.UNKNOWN, seen.trouble or "GET_DEV_INFO gave no answer", Action.ALERT, 5.0)
    if seen.info.state == KernelState.LIVE:
        return _live(seen, past, now)
    if seen.info.state in (KernelState.QUIESCED, KernelState.FAIL_IO):
        return _without_server(seen, past, policy, now)
    if seen.info.state == KernelState.DEAD:
        return _dead(seen, seen.info, past, policy, traits, now)
    return Verdict(VerdictKind.UNKNOWN, f"the kernel's state {seen.info.state} is not known here", Action.ALERT)


def _live(seen: Observation, past: History, now: float) -> Verdict:
    if seen.disk is None:
        return _live_without_disk(past, now)
    if _alive(seen.server):
        return Verdict(VerdictKind.LIVE, f"served by {seen.server}")
    if seen.usage is None or (not seen.usage.complete and not seen.usage.char_openers):
        return Verdict(VerdictKind.LIVE, "the kernel says LIVE; who serves it cannot be seen from here")
    if seen.usage.char_openers:
        opener = seen.usage.char_openers[0]
        return Verdict(VerdictKind.LIVE, f"served by {opener}, which has its char device open")
    gone_for = now - past.phase_since
    dead = f"LIVE, but its server {past.server or seen.server or ''} is gone".replace("  ", " ")
    if gone_for < SETTLING:
        return Verdict(VerdictKind.CLOSING, f"{dead}; the kernel has not noticed yet", look_again_in=_soon(gone_for))
    reason = f"{dead} since {_span(gone_for)}; a leaked descriptor or a stuck request keeps the kernel from noticing"
    return Verdict(VerdictKind.WEDGED, reason, Action.ALERT, look_again_in=5.0)


def _live_without_disk(past: History, now: float) -> Verdict:
    """START_DEV sets LIVE before the disk is there; a blocked STOP_DEV has removed it; 6.13 to 7.1 copy ADD_DEV's state."""
    lasted = now - past.phase_since
    if past.was_live:
        if lasted < SETTLING:
            return Verdict(
                VerdictKind.CLOSING, "LIVE, its disk already gone: being stopped", look_again_in=_soon(lasted)
            )
        reason = f"LIVE without its disk for {_span(lasted)}: a STOP_DEV does not come to an end"
        return Verdict(VerdictKind.WEDGED, reason, Action.ALERT, look_again_in=5.0)
    if lasted < SETTLING:
        return Verdict(VerdictKind.STARTING, "LIVE, its disk not there yet: being started", look_again_in=_soon(lasted))
    reason = f"LIVE without a disk for {_span(lasted)}: a stuck START_DEV, or a stray state that ADD_DEV left"
    return Verdict(VerdictKind.UNKNOWN, reason, Action.ALERT, look_again_in=5.0)


def _without_server(seen: Observation, past: History, policy: Policy, now: float) -> Verdict:
    name, lasted = seen.state_name, now - past.phase_since
    if seen.disk is None:
        if past.was_live and lasted < SETTLING:
            return Verdict(VerdictKind.CLOSING, f"{name}, its disk gone: being stopped", look_again_in=_soon(lasted))
        reason = f"{name} without a disk: a stray state that ADD_DEV left, or a stuck STOP_DEV"
        return Verdict(VerdictKind.UNKNOWN, reason, Action.ALERT, look_again_in=5.0)
    if seen.usage and seen.usage.char_openers:
        opener = seen.usage.char_openers[0]
        return Verdict(VerdictKind.RECOVERING, f"{name}; {opener} has taken its char device", look_again_in=2.0)
    effect = (
        "its I/O waits for a new server" if seen.info and seen.info.state == KernelState.QUIESCED else "its I/O fails"
    )
    held = f"; held by {_list(seen.usage.holders)}" if seen.usage and seen.usage.holders else ""
    left = policy.recovery_deadline - lasted
    if left > 0:
        reason = f"{name} without a server: {effect}{held}; {_span(policy.recovery_deadline)} to be recovered in"
        return Verdict(VerdictKind.UNSERVED, reason, look_again_in=left)
    reason = f"{name} without a server for over {_span(policy.recovery_deadline)}: {effect}{held}"
    return Verdict(VerdictKind.UNSERVED, reason, Action.ALERT)


def _dead(seen: Observation, info: DevInfo, past: History, policy: Policy, traits: Traits, now: float) -> Verdict:
    """Reasons to hold back, one after the other; what is left is an orphan."""
    if seen.identity.sysfs_inode is None:
        return _deleted(seen, past, now)
    can_be_async = traits.async_delete and not info.unprivileged
    return (
        _in_transition(seen, past, now)
        or _in_use(seen, past, now)
        or _grace(past, policy, now)
        or _paused(past, now)
        or _held(seen, past, policy, waits_for_ever=not (can_be_async or traits.delete_can_be_cancelled))
        or Verdict(
            VerdictKind.ORPHANED, f"{_corpse(past)}, nobody has it open, nothing holds it", _ON_ORPHAN[policy.orphaned]
        )
    )


_ON_ORPHAN = {OnOrphan.DELETE: Action.DELETE, OnOrphan.ALERT: Action.ALERT, OnOrphan.IGNORE: Action.NONE}


def _on_its_way(past: History) -> VerdictKind:
    return VerdictKind.CLOSING if past.was_live else VerdictKind.STARTING


def _in_transition(seen: Observation, past: History, now: float) -> Verdict | None:
    """START_DEV that failed sets DEAD before the disk is gone; some kernels take the disk away first, some the state."""
    if seen.disk is None:
        return None
    lasted = now - past.phase_since
    if lasted < SETTLING:
        return Verdict(_on_its_way(past), "DEAD, its disk still there: in transition", look_again_in=_soon(lasted))
    return Verdict(VerdictKind.UNKNOWN, f"DEAD with a disk for {_span(lasted)}", Action.ALERT, look_again_in=5.0)


def _in_use(seen: Observation, past: History, now: float) -> Verdict | None:
    if seen.usage is None:
        return Verdict(VerdictKind.UNKNOWN, "DEAD; nobody looked who has it open", Action.ALERT, look_again_in=1.0)
    if seen.usage.char_openers:
        opener = seen.usage.char_openers[0]
        doing = "not yet closed by" if past.was_live else "being set up by"
        reason = f"DEAD, {doing} {opener}, which has its char device open"
        return Verdict(_on_its_way(past), reason, look_again_in=_soon(now - past.phase_since, at_most=15.0))
    if seen.char_device is None:
        reason = f"DEAD, and its node is missing: mknod /dev/ublkc{seen.dev_id} c {_numbers(seen.identity.char_rdev)}"
        return Verdict(VerdictKind.UNKNOWN, reason, Action.ALERT, look_again_in=5.0)
    return None


def _grace(past: History, policy: Policy, now: float) -> Verdict | None:
    """None when the grace is over. A server may delete for itself, or not have opened its new device yet."""
    if past.seen_idle_since is None or past.idle_since is None:
        return Verdict(
            _on_its_way(past), "DEAD, its idle time only begins", look_again_in=max(policy.orphan_grace, 0.02)
        )
    settled_in = past.seen_idle_since + policy.orphan_grace - now
    set_up_in = 0.0 if past.was_live else past.idle_since + policy.setup_grace - now
    if set_up_in > 0:
        left = f"{_span(set_up_in)} of {_span(policy.setup_grace)} left"
        reason = f"added, never seen LIVE, open nowhere; its server has {left} to open it"
        return Verdict(_on_its_way(past), reason, look_again_in=max(set_up_in, settled_in))
    if settled_in > 0:
        reason = f"{_corpse(past)}, open nowhere; watched for {_span(policy.orphan_grace)} before that is believed"
        return Verdict(_on_its_way(past), reason, look_again_in=settled_in)
    return None


def _paused(past: History, now: float) -> Verdict | None:
    if now >= past.paused_until:
        return None
    reason = f"{_corpse(past)}; {past.pause_reason}"
    return Verdict(VerdictKind.ORPHANED, reason, Action.ALERT, look_again_in=past.paused_until - now)


def _held(seen: Observation, past: History, policy: Policy, *, waits_for_ever: bool) -> Verdict | None:
    """Up to 6.2 DEL_DEV waits for holders uninterruptibly, with the mutex held that every ADD_DEV and DEL_DEV needs."""
    if seen.usage and seen.usage.holders:
        reason = f"{_corpse(past)}; its id stays taken until {_list(seen.usage.holders)} lets go"
        if waits_for_ever:
            return Verdict(VerdictKind.PINNED, f"{reason}; then it can be deleted", Action.ALERT, look_again_in=5.0)
        return Verdict(VerdictKind.PINNED, reason, _ON_ORPHAN[policy.orphaned])
    if waits_for_ever and not (seen.usage and seen.usage.complete):
        reason = "DEAD; this kernel's DEL_DEV would block every other one if a holder had been overlooked"
        return Verdict(VerdictKind.UNKNOWN, reason, Action.ALERT, look_again_in=5.0)
    return None


def _deleted(seen: Observation, past: History, now: float) -> Verdict:
    """No node, no sysfs entry, id taken: somebody's reference is all that is left, and only its owner can drop it."""
    lasted = now - past.phase_since
    if seen.usage and seen.usage.holders:
        reason = f"deleted; its id frees itself when {_list(seen.usage.holders)} lets go"
    elif lasted < LETTING_GO:
        return Verdict(VerdictKind.CLOSING, "deleted; the kernel is letting go of it", look_again_in=_soon(lasted))
    elif seen.usage and seen.usage.char_openers:
        reason = f"deleted; its id frees itself when {seen.usage.char_openers[0]} closes its char device"
    else:
        reason = "deleted; its id frees itself when a holder that cannot be seen lets go"
    return Verdict(VerdictKind.PINNED, reason, Action.ALERT, look_again_in=min(max(lasted / 4, 0.25), 5.0))


def _alive(server: Server | None) -> bool:
    return server is not None and server.alive is True


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
