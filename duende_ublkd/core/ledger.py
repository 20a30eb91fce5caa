"""Since when is a thing so? What earlier looks at a device leave behind for the next decision.

Rules:
1. A history belongs to one instance of an id. Another identity under the same id starts a new one.
2. An unbroken time starts anew whenever one look says otherwise; what nobody looked at breaks nothing and proves nothing.
3. What a device was (served by whom, on which disk) stays known after it died: the kernel forgets it at once.
4. A record outlives the daemon and is believed of the same instance in the same boot, and of nothing else: ages, attempts
   and what it was go on. What has to be watched without a break (`seen_idle_since`, `watched_since`) begins anew.
5. Deeds wait by a clock that every change sets back (`phase_since`). What people are told must not wait for ever for that:
   it goes by `unserved_since` too, which nothing but service ends.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.model import Identity, KernelState, Process, Server, Verdict, VerdictKind
from duende_ublkd.core.trail import NO_TRAIL, Trail

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from duende_ublkd.core.model import Observation

_FIRST_RETRY = 1.0  # seconds after a deletion that failed; doubles up to the longest
_LONGEST_RETRY = 300.0
_DOUBLINGS = 9  # and then it is beyond the longest anyway
_DELETIONS = ("DEL_DEV", "DEL_DEV_ASYNC")
_LONGEST_BUSY = 30.0  # seconds between two attempts to claim what somebody unseen has open
_BUSY_UNSTARTED = 120.0  # the same for what may yet be started
_OPENS_COUNT_FOR = 3600.0  # seconds after the first look that an event of an open counts for


@dataclass(frozen=True, slots=True)
class Overdue:
    """A command that missed its deadline, and when that was seen. `of_look`: it was only a question.

    `of_former`: another process sent it, and nobody will hear of its answer.
    """

    command: str
    since: float
    of_look: bool = False
    of_former: bool = False


@dataclass(frozen=True, slots=True)
class History:
    """One instance of a device over all looks so far. Times are CLOCK_MONOTONIC seconds."""

    identity: Identity
    first_seen: float
    last_seen: float
    phase: tuple[object, ...]  # kernel state, has a disk, has a node, is served
    phase_since: float
    seen_live: bool = False  # a look found it with a disk, LIVE or waiting for another server
    had_disk: bool = False  # the last look had that from an event
    seen_idle_since: float | None = None  # we saw it DEAD, without disk, not known to be open, ever since
    idle_since: float | None = None  # it has been so, for what can be told of the time before our first look
    server: Server | None = None  # the last one known alive
    server_confirmed: bool = False  # it was seen to have the char device open; a pid alone is what somebody claimed
    disk_rdevs: frozenset[tuple[int, int]] = frozenset()
    death_seen: float | None = None
    server_died: bool = False  # its process ended; otherwise it may have let go of the device and live on
    overdue: Overdue | None = None
    hand: Process | None = None  # who has been told to stop it, and may still be at it
    failures: int = 0
    times_busy: int = 0  # claims refused since it was last seen in use: somebody unseen has it
    paused_until: float = 0.0
    pause_reason: str = ""
    verdict: Verdict | None = None
    verdict_since: float = 0.0
    watched_since: float = 0.0  # the first look of this daemon; what is older was remembered
    trail: Trail = NO_TRAIL
    unserved_since: float | None = None  # it waits for a server; who takes it and lets go again does not change that
    taken_by: Server | None = None  # who has it open meanwhile, and may come to serve it
    takers: int = 0  # those who had, and have let go

    @property
    def was_live(self) -> bool:
        """It was started, and can never be again once it is DEAD (START_DEV: UB_STATE_USED)."""
        return self.seen_live or self.had_disk


class Ledger:
    """The histories of all ids that were there at the last look."""

    def __init__(self) -> None:
        self._histories: dict[int, History] = {}
        self._remembered: dict[int, History] = {}  # of a former daemon, and not seen by this one yet
        self.keep: Callable[[int], None] = lambda _: None  # called when a record must be kept before anything goes on
        self._late: set[tuple[int, str]] = set()  # answers that came after their deadline, since the last question
        self._maybe_overdue: set[int] = set()  # every id with a command that is overdue, and some that had one
        self._has_looked_at_all = False

    def __contains__(self, dev_id: int) -> bool:
        return dev_id in self._histories

    def ids(self) -> tuple[int, ...]:
        """Every id that has a history, lowest first; of former daemons too, until they were looked at."""
        return tuple(sorted(self._histories.keys() | self._remembered.keys()))

    def get(self, dev_id: int) -> History | None:
        """The history of an id, if there is one."""
        return self._histories.get(dev_id)

    def record(self, seen: Observation) -> History:
        """Add one look and return the history that includes it."""
        past = self._histories.get(seen.dev_id)
        known = past and _same_instance(past.identity, seen.identity)
        history = _continue(past, seen) if past and known else self._begin(seen)
        self._histories[seen.dev_id] = history
        return history

    def remember(self, dev_id: int, record: Mapping[str, Any], *, has_ended: bool = True) -> None:
        """What `to_record` of another process of this boot said. `has_ended`: so its attempts to recover are not watched
        any more. ValueError: it is not a record.
        """
        past = _from_record(record)
        if has_ended and past.trail.is_running:
            past = replace(past, trail=past.trail.abandoned())
        if has_ended and not past.hand:  # a process that has ended has no command in the kernel; a child of it may
            past = replace(past, overdue=None)
        self._remembered[dev_id] = past
        if past.overdue:
            self._maybe_overdue.add(dev_id)

    def hand_of_former(self, dev_id: int) -> Process | None:
        """Who a former daemon had told to stop this device, and had not heard of again."""
        past = self._remembered.get(dev_id)
        return past.hand if past else None

    def note_hand(self, dev_id: int, hand: Process | None) -> None:
        """Somebody is about to stop this device, or has answered. It is kept: what is sent is not to be sent twice."""
        if past := self._histories.get(dev_id):
            self._histories[dev_id] = replace(past, hand=hand)
            self.keep(dev_id)

    def to_record(self, dev_id: int) -> dict[str, Any] | None:
        """What is worth knowing after a restart, as JSON values; None: nothing is known of this id."""
        past = self._histories.get(dev_id)
        return _to_record(past) if past else None

    def note_trail(self, dev_id: int, trail: Trail) -> History | None:
        """What was tried to recover it, as of now."""
        past = self._histories.get(dev_id)
        if past:
            past = self._histories[dev_id] = replace(past, trail=trail)
        return past

    def _begin(self, seen: Observation) -> History:
        """The history of an instance that this daemon sees for the first time.

        After the first full look its node's age counts no more: it was added since, and most likely just now; and that age
        is of a clock that anybody may set, or of a node that is not this device's own.
        """
        new = _begin(seen if not self._has_looked_at_all else replace(seen, age=None))
        old = self._remembered.pop(seen.dev_id, None)
        if old is None or seen.identity.sysfs_inode is None or old.identity.sysfs_inode != seen.identity.sysfs_inode:
            return new
        idle_since = None if new.idle_since is None else max(new.idle_since, old.phase_since)
        old = replace(old, seen_idle_since=None, idle_since=idle_since, watched_since=seen.at)
        return _continue(old, seen)

    def note_verdict(self, dev_id: int, verdict: Verdict, at: float) -> tuple[History, Verdict | None]:
        """Remember a decision. Returns the history and the verdict it replaces, None when the kind is unchanged."""
        past = self._histories[dev_id]
        before = past.verdict
        changed = before is None or before.kind is not verdict.kind or before.action is not verdict.action
        since = past.verdict_since
        if before is None or before.kind is not verdict.kind:
            waits_since = past.unserved_since if verdict.kind is VerdictKind.UNSERVED else None
            since = at if waits_since is None else waits_since
        history = replace(past, verdict=verdict, verdict_since=since)
        self._histories[dev_id] = history
        return history, (before or Verdict(VerdictKind.UNKNOWN, "never seen before")) if changed else None

    def note_open(self, dev_id: int, at: float) -> None:
        """The kernel said that somebody has the char device open: the idle time starts anew after that.

        Once is a file just being closed, or another cleaner. More often it is somebody who cannot be seen: then the next
        attempt, which is an open too, waits longer each time.
        """
        if past := self._histories.get(dev_id):
            self._histories[dev_id] = replace(past, seen_idle_since=at, idle_since=at, times_busy=past.times_busy + 1)
            if past.times_busy:
                pause = min(_FIRST_RETRY * 2 ** min(past.times_busy, _DOUBLINGS), _LONGEST_BUSY)
                pause = pause if past.was_live else _BUSY_UNSTARTED
                self.note_pause(dev_id, "somebody who cannot be seen has its char device open", at + pause)

    def note_death(self, dev_id: int, at: float) -> None:
        """Something told that the server died; only the first word counts."""
        past = self._histories.get(dev_id)
        if past:
            seen = at if past.death_seen is None else past.death_seen
            self._histories[dev_id] = replace(past, death_seen=seen, server_died=True)

    def note_opened(self, dev_id: int, at: float) -> None:
        """An event told that somebody opened the char device; its time of not being open starts anew.

        Not of one that can never be started again, nor for ever: some kernels tell of opens with O_PATH, too, which anybody
        may do. The exclusive open before a deletion has the last word.
        """
        past = self._histories.get(dev_id)
        if past and past.seen_idle_since is not None and not past.was_live and at < past.first_seen + _OPENS_COUNT_FOR:
            self._histories[dev_id] = replace(past, seen_idle_since=at, idle_since=at)

    def note_failure(self, dev_id: int, why: str, at: float) -> None:
        """A deletion failed: the next attempt waits, longer each time."""
        if past := self._histories.get(dev_id):
            self._histories[dev_id] = replace(past, failures=past.failures + 1)
            pause = min(_FIRST_RETRY * 2 ** min(past.failures, _DOUBLINGS), _LONGEST_RETRY)
            self.note_pause(dev_id, f"deleting it failed: {why}", at + pause)

    def note_pause(self, dev_id: int, why: str, until: float) -> None:
        """Nothing is done about this device for a while."""
        if past := self._histories.get(dev_id):
            self._histories[dev_id] = replace(past, paused_until=until, pause_reason=why)

    def note_question(self, dev_ids: Collection[int]) -> None:
        """Commands on these devices are about to be sent: late answers are to earlier ones no more."""
        self._late = {late for late in self._late if late[0] not in dev_ids}

    def note_overdue(self, dev_id: int, command: str, at: float, *, of_look: bool) -> None:
        """A command on this device did not answer in time; the first one counts until its answer comes.

        The answer may have come before whoever asked hears of the deadline: then there is nothing to note.
        """
        past = self._histories.get(dev_id)
        if past and (dev_id, command) not in self._late:
            self._maybe_overdue.add(dev_id)
            self._histories[dev_id] = replace(past, overdue=past.overdue or Overdue(command, at, of_look))

    def note_answer(self, dev_id: int, command: str) -> None:
        """A command answered after all; lifts what that one's missed deadline imposed, and nothing else."""
        self._late.add((dev_id, command))
        for histories in (self._histories, self._remembered):
            past = histories.get(dev_id)
            if past and past.overdue and past.overdue.command == command:
                histories[dev_id] = replace(past, overdue=None, hand=None)

    def forget_overdue(self, dev_id: int) -> str:
        """A person says that a command of a former daemon is over; which one, or nothing."""
        past = self._histories.get(dev_id)
        if not (past and past.overdue and past.overdue.of_former):
            return ""
        self._histories[dev_id] = replace(past, overdue=None, hand=None)
        return past.overdue.command

    def stuck_deletions(self) -> tuple[int, ...]:
        """The ids whose DEL_DEV, of whichever kind, has missed its deadline and not answered; not looked at yet or not."""
        found = []
        for dev_id in sorted(
            self._maybe_overdue
        ):  # asked with each verdict: a thousand devices must not cost a million
            past = self._histories.get(dev_id) or self._remembered.get(dev_id)
            if past is None or past.overdue is None:
                self._maybe_overdue.discard(dev_id)
            elif past.overdue.command in _DELETIONS:
                found.append(dev_id)
        return tuple(found)

    def note_full_look(self) -> None:
        """Every id that is taken is known: what is seen for the first time from now on was added later."""
        self._has_looked_at_all = True

    def forget_remembered(self) -> tuple[int, ...]:
        """After a look at all: what was remembered and is not there any more."""
        gone = tuple(sorted(self._remembered))
        self._remembered.clear()
        return gone

    def forget(self, dev_id: int) -> History | None:
        """The id is free. Returns what was known of its last device."""
        self._remembered.pop(dev_id, None)
        return self._histories.pop(dev_id, None)


def _same_instance(before: Identity, now: Identity) -> bool:
    """A deleted device has lost its sysfs entry, and its id cannot be reused before it is free: still the same."""
    if now.sysfs_inode is None:
        return True
    return before.sysfs_inode == now.sysfs_inode


def _is_idle(seen: Observation) -> bool:
    return (
        seen.info is not None
        and seen.info.state == KernelState.DEAD
        and seen.disk is None
        and not (seen.usage and seen.usage.char_openers)
    )


def is_live(seen: Observation) -> bool:
    """The kernel says that it is served, and its disk is there."""
    return seen.info is not None and seen.info.state == KernelState.LIVE and seen.disk is not None


def _is_stop_of_former(overdue: Overdue | None) -> bool:
    """Its work is done once the device is DEAD and has no disk."""
    return overdue is not None and overdue.of_former and overdue.command == "STOP_DEV"


def _is_started(seen: Observation) -> bool:
    """It has a disk, and is not on its way up or down."""
    started = (KernelState.LIVE, KernelState.QUIESCED, KernelState.FAIL_IO)
    return seen.info is not None and seen.info.state in started and seen.disk is not None


def _is_unserved(seen: Observation) -> bool:
    """Its disk is there, and waits for a server."""
    return _is_started(seen) and not is_live(seen)


def is_contradicted(seen: Observation, past: History | None) -> bool:
    """Whether something speaks against the pid that the kernel tells of for a LIVE device: others have it open; or another
    one was seen to, since it was last started or recovered. Who has registered its file with its ring and closed it is not
    seen at all: that alone speaks against nobody.
    """
    claimed = seen.server
    if claimed is None or not is_live(seen):
        return False
    if any(_may_be_same(claimed, each) for each in (seen.usage.char_openers if seen.usage else ())):
        return False
    is_of_this_life = past is not None and past.phase[:1] == (KernelState.LIVE,)
    known = past.server if past and past.server_confirmed and is_of_this_life else None
    return bool(_openers(seen)) or (known is not None and not _may_be_same(claimed, known))


def _may_be_same(one: Server, other: Server) -> bool:
    """Of one whose /proc/PID cannot be read the start is not known."""
    return one.pid == other.pid and (one.start_time == other.start_time or 0 in (one.start_time, other.start_time))


def _phase(seen: Observation, past: History | None = None) -> tuple[object, ...]:
    state = seen.info.state if seen.info else None
    return state, seen.disk is not None, seen.identity.sysfs_inode is not None, _is_served(seen, past)


def _is_served(seen: Observation, past: History | None) -> bool:
    if _openers(seen):
        return True
    if not (seen.server and seen.server.alive and seen.server.may_serve):
        return False
    if past is None or not is_contradicted(seen, past):
        return True
    # What nobody looked at breaks nothing.
    return bool(past.phase[-1]) and not (seen.usage and seen.usage.complete)


def _known_server(seen: Observation) -> Server | None:
    """Who serves it. Whoever has a DEAD device open may be its server, or anybody who looks into it: that is left open.

    The pid that the kernel tells of is what somebody claimed (up to 6.16), or a former server's, and another process's by
    now, where nobody serves: it counts while the device is LIVE, and where nobody is seen to have it open.
    """
    if seen.info is None or seen.info.state == KernelState.DEAD:
        return None
    openers = _openers(seen)
    claimed = seen.server if is_live(seen) and seen.server and seen.server.alive and seen.server.may_serve else None
    if claimed and (not openers or any(_same_process(claimed, opener) for opener in openers)):
        return claimed
    return openers[0] if openers else None


def _is_confirmed(seen: Observation, server: Server | None) -> bool:
    """Up to 6.16 the pid that the kernel tells of may be any number."""
    return server is not None and any(_same_process(server, opener) for opener in _openers(seen))


def _openers(seen: Observation) -> tuple[Server, ...]:
    """Those that may be its server."""
    return tuple(each for each in seen.usage.char_openers if each.may_serve) if seen.usage else ()


def _same_process(one: Server, other: Server | None) -> bool:
    return other is not None and (one.pid, one.start_time) == (other.pid, other.start_time)


def _begin(seen: Observation) -> History:
    idle = _is_idle(seen)
    return History(
        identity=seen.identity,
        first_seen=seen.at,
        last_seen=seen.at,
        phase=_phase(seen),
        phase_since=seen.at,
        seen_live=_is_started(seen),
        had_disk=seen.had_disk,
        seen_idle_since=seen.at if idle else None,
        idle_since=seen.at - (seen.age or 0.0) if idle else None,
        server=_known_server(seen),
        server_confirmed=_is_confirmed(seen, _known_server(seen)),
        disk_rdevs=seen.disk.rdevs if seen.disk else frozenset(),
        watched_since=seen.at,
        unserved_since=seen.at if _is_unserved(seen) else None,
        taken_by=_taker(seen, None),
    )


def _taker(seen: Observation, before: Server | None) -> Server | None:
    """Who has taken it while it waits; the same one until a look at everybody does not find that one any more."""
    openers = _openers(seen) if _is_unserved(seen) else ()
    is_blind = seen.info is None or seen.usage is None or not seen.usage.complete
    same = next((each for each in openers if _same_process(each, before)), None)
    return same or next(iter(openers), before if is_blind else None)


def _continue(past: History, seen: Observation) -> History:
    idle, phase = _is_idle(seen), _phase(seen, past)
    served_now = _known_server(seen)
    if is_contradicted(seen, past):
        served_now = next(iter(_openers(seen)), None)
    elif past.server_confirmed and phase == past.phase and not _is_confirmed(seen, served_now):
        served_now = past.server  # a claim does not take the place of what was seen
    death_seen = past.death_seen
    server_died = past.server_died
    if is_live(seen) and served_now:
        death_seen, server_died = None, False
    elif death_seen is None and past.seen_live and phase != past.phase:
        death_seen = seen.at
    taken_by = _taker(seen, past.taken_by)
    has_let_go = past.taken_by is not None and not (taken_by and _same_process(taken_by, past.taken_by))
    unserved_since = past.unserved_since
    if unserved_since is None and _is_unserved(seen):
        unserved_since = seen.at
    return replace(
        past,
        identity=seen.identity if seen.identity.sysfs_inode is not None else past.identity,
        last_seen=seen.at,
        phase=phase,
        phase_since=past.phase_since if phase == past.phase else seen.at,
        seen_live=past.seen_live or _is_started(seen),
        had_disk=seen.had_disk,
        seen_idle_since=(seen.at if past.seen_idle_since is None else past.seen_idle_since) if idle else None,
        idle_since=(seen.at if past.idle_since is None else past.idle_since) if idle else None,
        times_busy=past.times_busy if idle else 0,
        server=served_now or past.server,
        server_confirmed=_is_confirmed(seen, served_now)
        or (past.server_confirmed and (served_now is None or _same_process(served_now, past.server))),
        disk_rdevs=(seen.disk.rdevs if seen.disk else None) or past.disk_rdevs,
        overdue=None if idle and _is_stop_of_former(past.overdue) else past.overdue,
        hand=None if idle and _is_stop_of_former(past.overdue) else past.hand,
        death_seen=death_seen,
        server_died=server_died,
        unserved_since=None if is_live(seen) else unserved_since,
        taken_by=None if is_live(seen) else taken_by,
        takers=0 if is_live(seen) else past.takers + has_let_go,
    )


def _to_record(past: History) -> dict[str, Any]:
    return {
        "instance": past.identity.sysfs_inode,
        "char_rdev": past.identity.char_rdev,
        "first_seen": past.first_seen,
        "phase": list(past.phase),
        "phase_since": past.phase_since,
        "was_live": past.was_live,
        "server": asdict(past.server) if past.server else None,
        "server_confirmed": past.server_confirmed,
        "overdue": past.overdue.command if past.overdue and not past.overdue.of_look else None,
        "hand": [past.hand.pid, past.hand.start_time] if past.hand else None,
        "disk_rdevs": sorted(past.disk_rdevs),
        "death_seen": past.death_seen,
        "server_died": past.server_died,
        "verdict": past.verdict.kind.value if past.verdict else None,
        "verdict_since": past.verdict_since,
        "trail": asdict(past.trail),
        "unserved_since": past.unserved_since,
        "takers": past.takers,
    }


def _from_record(record: Mapping[str, Any]) -> History:
    try:
        kind = record["verdict"]
        server = record["server"]
        return History(
            identity=Identity(record["instance"], _numbers(record["char_rdev"])),
            first_seen=_time(record["first_seen"]),
            last_seen=_time(record["first_seen"]),
            phase=tuple(record["phase"]),
            phase_since=_time(record["phase_since"]),
            seen_live=bool(record["was_live"]),
            server=_server_of(server) if server else None,
            server_confirmed=bool(record["server_confirmed"]),
            overdue=_overdue_of(record),
            hand=_hand_of(record),
            disk_rdevs=frozenset((int(major), int(minor)) for major, minor in record["disk_rdevs"]),
            death_seen=None if record["death_seen"] is None else _time(record["death_seen"]),
            server_died=bool(record["server_died"]),
            verdict=Verdict(VerdictKind(kind), "") if kind else None,
            verdict_since=_time(record["verdict_since"]),
            trail=_checked(Trail(**record["trail"])),
            # An earlier version did not write the following. What else it wrote must not be lost for that.
            unserved_since=None if record.get("unserved_since") is None else _time(record["unserved_since"]),
            takers=int(record.get("takers", 0)),
        )
    except (LookupError, AttributeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"not a record of a device: {error!r}") from error


def _overdue_of(record: Mapping[str, Any]) -> Overdue | None:
    """A stop whose answer nobody will hear is as one that has missed its deadline."""
    command = "STOP_DEV" if _hand_of(record) else record["overdue"]
    return Overdue(str(command), _time(record["verdict_since"]), of_former=True) if command else None


def _server_of(record: Mapping[str, Any]) -> Server:
    """TypeError: it has other fields, or of other types."""
    server = Server(**record)
    numbers, names = (server.pid, server.start_time), (server.comm, server.exe, server.unit, server.condition)
    answers = (server.alive, server.has_ring)
    if not (
        all(type(each) is int for each in numbers)
        and all(isinstance(each, str) for each in names)
        and all(each is None or isinstance(each, bool) for each in answers)
    ):
        raise TypeError("a field of the server is of another type")
    return server


def _hand_of(record: Mapping[str, Any]) -> Process | None:
    if not record["hand"]:
        return None
    pid, start_time = record["hand"]
    return Process(int(pid), int(start_time))


def _time(value: Any) -> float:  # noqa: ANN401 - JSON
    seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError("a time is not finite")
    return seconds


def _checked(trail: Trail) -> Trail:
    """Its fields as what they are to be."""
    return Trail(
        attempts=int(trail.attempts),
        began=None if trail.began is None else _time(trail.began),
        limit=_time(trail.limit),
        not_before=_time(trail.not_before),
        trouble=str(trail.trouble),
        served_since=None if trail.served_since is None else _time(trail.served_since),
    )


def _numbers(value: Any) -> tuple[int, int] | None:  # noqa: ANN401 - JSON
    return None if value is None else (int(value[0]), int(value[1]))
