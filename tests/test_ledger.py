"""Since when is a thing so: what the ledger keeps from look to look, and what it forgets."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from duende_ublkd.core.ledger import History, Ledger, Overdue, is_contradicted
from duende_ublkd.core.model import (
    Action,
    Condition,
    DevInfo,
    Disk,
    Identity,
    KernelState,
    Observation,
    Process,
    Server,
    Usage,
    Verdict,
    VerdictKind,
)
from duende_ublkd.core.trail import OVERRUN, Trail

FIRST, SECOND, NONE = Identity(14_628, (240, 3)), Identity(14_796, (240, 3)), Identity(None)
DISK = Disk((259, 0), 7, ((259, 1),))
RDEVS = frozenset({(259, 0), (259, 1)})
SERVER = Server(4121, alive=True, comm="ublk.loop")
NOBODY = Usage()
WITHOUT_RING = Server(4123, alive=True, has_ring=False)
OPEN = Usage(char_openers=(Server(4122, alive=True),))


def a_look(
    at: float,
    *,
    state: int | None = KernelState.DEAD,
    identity: Identity = FIRST,
    disk: Disk | None = None,
    server: Server | None = None,
    usage: Usage | None = Usage(),  # noqa: B008 - frozen
    age: float | None = None,
) -> Observation:
    info = None if state is None else DevInfo(3, state, -1, 0, 1, 128)
    return Observation(3, at, info, identity, "/dev/ublkc3", disk, server, usage, age)


def live(at: float) -> Observation:
    return a_look(at, state=KernelState.LIVE, disk=DISK, server=SERVER, usage=None)


def after(*looks: Observation) -> History:
    ledger = Ledger()
    return [ledger.record(look) for look in looks][-1]


def test_idle_time_counts_from_the_first_look_and_goes_on() -> None:
    history = after(a_look(10), a_look(11), a_look(50))
    assert (history.first_seen, history.last_seen) == (10, 50)
    assert (history.seen_idle_since, history.idle_since) == (10, 10)


def test_a_device_that_was_there_before_us_is_as_old_as_its_node() -> None:
    history = after(a_look(100, age=70), a_look(101, age=71))
    assert (history.seen_idle_since, history.idle_since) == (100, 30)


def test_a_device_that_is_seen_first_after_a_full_look_is_new_whatever_its_node_and_the_clock_say() -> None:
    ledger = Ledger()
    ledger.note_full_look()
    history = ledger.record(a_look(100, age=5000))
    assert (history.seen_idle_since, history.idle_since) == (100, 100)


@pytest.mark.parametrize(
    "break_",
    [
        a_look(20, usage=OPEN),
        a_look(20, state=KernelState.LIVE),
        a_look(20, state=KernelState.QUIESCED),
        a_look(20, state=None),
        a_look(20, disk=DISK),
    ],
    ids=["open", "live", "quiesced", "no answer", "disk"],
)
def test_one_look_that_says_otherwise_starts_the_idle_time_anew_whatever_the_age(break_: Observation) -> None:
    assert after(a_look(10, age=500), break_).idle_since is None
    history = after(a_look(10, age=500), break_, a_look(30, age=520))
    assert (history.seen_idle_since, history.idle_since) == (30, 30)


def test_another_identity_is_another_device() -> None:
    ledger = Ledger()
    ledger.record(live(10))
    ledger.note_overdue(3, "DEL_DEV", 11, of_look=False)
    history = ledger.record(a_look(20, identity=SECOND))
    assert history == after(a_look(20, identity=SECOND))


def test_a_deleted_device_is_still_the_same_and_what_follows_is_not() -> None:
    history = after(live(10), a_look(20, identity=NONE))
    assert (history.identity, history.server, history.disk_rdevs) == (FIRST, SERVER, RDEVS)
    assert not after(live(10), a_look(20, identity=NONE), a_look(30, identity=SECOND)).seen_live
    assert not after(a_look(20, identity=NONE), a_look(30, identity=SECOND)).seen_live


def test_what_it_was_stays_known_after_its_death() -> None:
    history = after(live(10), a_look(20), a_look(30))
    assert history.seen_live
    assert (history.server, history.disk_rdevs) == (SERVER, RDEVS)
    assert (history.death_seen, history.phase_since) == (20, 20)


def test_live_without_a_disk_was_not_started() -> None:
    assert not after(a_look(10, state=KernelState.LIVE), a_look(20)).seen_live


def test_a_death_is_as_of_the_first_word_and_a_recovery_takes_it_back() -> None:
    ledger = Ledger()
    ledger.record(live(10))
    ledger.note_death(3, 11)
    ledger.note_death(3, 12)
    quiesced = a_look(20, state=KernelState.QUIESCED, disk=DISK)
    assert ledger.record(quiesced).death_seen == 11
    assert ledger.record(live(30)).death_seen is None


@pytest.mark.parametrize(
    "unable", [{"condition": Condition.DYING.value}, {"has_ring": False}, {"alive": False}], ids=str
)
def test_who_cannot_serve_is_no_server_and_does_not_keep_a_death_from_being_seen(unable: dict[str, Any]) -> None:
    opener = replace(OPEN.char_openers[0], **unable)
    looks = live(10), replace(live(20), server=replace(SERVER, alive=False), usage=Usage(char_openers=(opener,)))
    history = after(*looks)
    assert (history.server, history.death_seen, history.phase_since) == (SERVER, 20, 20)
    assert not history.server_confirmed
    never = after(replace(live(10), server=opener, usage=Usage(char_openers=(opener,))))
    assert (never.server, never.server_confirmed) == (None, False)


def test_a_server_that_is_killed_and_cannot_end_has_died() -> None:
    dying = replace(SERVER, condition=Condition.DYING.value)
    history = after(live(10), replace(live(20), server=dying), replace(live(30), server=dying))
    assert (history.server, history.death_seen, history.phase_since) == (SERVER, 20, 20)
    stopped = replace(SERVER, condition=Condition.STOPPED.value)
    assert after(live(10), replace(live(20), server=stopped)).death_seen is None


def test_a_fork_that_serves_is_the_known_server() -> None:
    history = after(a_look(10, state=KernelState.LIVE, disk=DISK, server=replace(SERVER, alive=False), usage=OPEN))
    assert history.server == OPEN.char_openers[0]


@pytest.mark.parametrize(("was_live", "expected"), [(True, [2, 4, 8, 16, *[30] * 7]), (False, [120] * 11)])
def test_a_refused_claim_starts_the_idle_time_anew_and_from_the_second_on_waits(
    *, was_live: bool, expected: list[float]
) -> None:
    ledger = Ledger()
    ledger.record(live(9) if was_live else a_look(9, age=500))
    ledger.record(a_look(10, age=500))
    pauses = []
    for _ in range(12):
        ledger.note_open(3, 20)
        history = ledger.record(a_look(20))
        assert (history.seen_idle_since, history.idle_since) == (20, 20)
        pauses.append(history.paused_until - 20)
    assert pauses == [-20, *expected]
    assert ledger.record(a_look(30, usage=OPEN)).times_busy == 0


def test_failures_wait_twice_as_long_each_time_up_to_five_minutes_however_many() -> None:
    ledger = Ledger()
    ledger.record(a_look(10))
    pauses = []
    for _ in range(2000):
        ledger.note_failure(3, "EIO", 0)
        history = ledger.record(a_look(10))
        pauses.append(history.paused_until)
    assert pauses[:10] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]
    assert set(pauses[10:]) == {300}
    assert history.pause_reason == "deleting it failed: EIO"


def test_an_overdue_command_is_as_of_the_first_and_only_its_own_answer_ends_it() -> None:
    ledger = Ledger()
    ledger.record(a_look(10))
    ledger.note_overdue(3, "DEL_DEV", 20, of_look=False)
    ledger.note_overdue(3, "DEL_DEV", 30, of_look=False)
    ledger.note_answer(3, "GET_DEV_INFO")
    history = ledger.record(a_look(40))
    assert history.overdue
    assert history.overdue.since == 20
    ledger.note_answer(3, "DEL_DEV")
    assert ledger.record(a_look(50)).overdue is None


def test_a_verdict_has_a_beginning_and_its_change_is_told_once() -> None:
    ledger = Ledger()
    ledger.record(a_look(10))
    starting = Verdict(VerdictKind.STARTING, "added")
    orphaned = Verdict(VerdictKind.ORPHANED, "dead")
    history, before = ledger.note_verdict(3, starting, 10)
    assert (history.verdict_since, before and before.kind) == (10, VerdictKind.UNKNOWN)
    assert ledger.note_verdict(3, replace(starting, reason="added, and older"), 20)[1] is None
    history, before = ledger.note_verdict(3, orphaned, 30)
    assert (history.verdict_since, before and before.kind) == (30, VerdictKind.STARTING)
    history, before = ledger.note_verdict(3, replace(orphaned, action=Action.DELETE), 40)
    assert (history.verdict_since, before) == (30, orphaned)


# --- who serves it, and since when nobody does ------------------------------------------------------------------------


FIRST_TRY, SECOND_TRY = Server(800, alive=True, start_time=1), Server(801, alive=True, start_time=2)


def waiting(at: float, *openers: Server, complete: bool = True) -> Observation:
    return a_look(at, state=KernelState.QUIESCED, disk=DISK, usage=Usage(openers, complete=complete))


def test_a_device_is_without_service_until_it_is_live_whoever_takes_it_meanwhile() -> None:
    looks = [live(10), waiting(20), waiting(30, FIRST_TRY), waiting(40), waiting(50, SECOND_TRY), waiting(60)]
    history = after(*looks)
    assert (history.unserved_since, history.takers, history.phase_since) == (20, 2, 60)
    no_answer, dead = a_look(70, state=None, disk=DISK), a_look(70)
    for other in (no_answer, dead, waiting(70)):
        assert after(*looks, other).unserved_since == 20
    history = after(*looks, live(70))
    assert (history.unserved_since, history.takers, history.taken_by) == (None, 0, None)
    assert after(*looks, live(70), waiting(80)).unserved_since == 80


def test_what_was_started_and_is_not_waiting_is_not_without_service() -> None:
    assert after(live(10)).unserved_since is None
    assert after(live(10), a_look(20)).unserved_since is None
    assert after(a_look(10, state=KernelState.QUIESCED)).unserved_since is None  # a stray state
    assert after(waiting(10)).unserved_since == 10


def test_a_server_that_takes_a_device_counts_once_when_it_has_let_go_and_a_blind_look_lets_go_of_nothing() -> None:
    both = (SECOND_TRY, FIRST_TRY)
    assert after(waiting(10, FIRST_TRY), waiting(20, *both), waiting(30, FIRST_TRY)).takers == 0
    blind, no_answer = waiting(20, complete=False), a_look(20, state=None, disk=DISK)
    for nothing in (blind, no_answer, replace(blind, usage=None)):
        assert after(waiting(10, FIRST_TRY), nothing, waiting(30, FIRST_TRY)).takers == 0
        assert after(waiting(10, FIRST_TRY), nothing, waiting(30)).takers == 1
    assert after(waiting(10, FIRST_TRY), waiting(20, SECOND_TRY)).takers == 1
    assert after(waiting(10, WITHOUT_RING), waiting(20)).takers == 0


def test_the_verdict_that_nobody_serves_it_began_when_that_began_however_often_somebody_takes_it_meanwhile() -> None:
    ledger = Ledger()
    unserved, recovering = Verdict(VerdictKind.UNSERVED, "waits"), Verdict(VerdictKind.RECOVERING, "taken")
    begun = []
    for look, verdict in (
        (waiting(20), unserved),
        (waiting(30, FIRST_TRY), recovering),
        (waiting(40), unserved),
    ):
        ledger.record(look)
        begun.append(ledger.note_verdict(3, verdict, look.at)[0].verdict_since)
    assert begun == [20, 30, 20]


CLAIMED = Server(1, alive=True, comm="systemd", start_time=1)
REAL = Server(812, alive=True, comm="server", start_time=9)


def claiming(at: float, usage: Usage | None, server: Server = CLAIMED) -> Observation:
    return a_look(at, state=KernelState.LIVE, disk=DISK, server=server, usage=usage)


def test_a_claimed_server_is_believed_until_something_speaks_against_it() -> None:
    assert not is_contradicted(claiming(10, None), None)
    assert not is_contradicted(claiming(10, NOBODY), after(claiming(5, NOBODY)))
    assert not is_contradicted(claiming(10, Usage((WITHOUT_RING,))), None)
    assert not is_contradicted(claiming(10, Usage((REAL, CLAIMED))), None)
    assert not is_contradicted(claiming(10, Usage((replace(CLAIMED, start_time=0),))), None)
    assert is_contradicted(claiming(10, Usage((REAL,))), None)
    assert is_contradicted(claiming(10, Usage((replace(CLAIMED, start_time=2),))), None)
    assert not is_contradicted(replace(claiming(10, Usage((REAL,))), disk=None), None)


def test_who_was_seen_to_serve_speaks_against_a_claim_until_the_device_is_recovered() -> None:
    known = after(claiming(10, Usage((REAL,))))
    for usage in (None, NOBODY, Usage(complete=False)):
        assert is_contradicted(claiming(20, usage), known)
    assert not is_contradicted(claiming(20, None, REAL), known)
    again = after(claiming(10, Usage((REAL,))), waiting(20), claiming(30, None))
    assert not is_contradicted(claiming(40, None), again)
    assert again.server == CLAIMED


def test_a_claim_does_not_hide_the_end_of_who_was_seen_to_serve() -> None:
    blind = Usage(complete=False)
    looks = [claiming(10, Usage((REAL,))), claiming(20, None), claiming(30, blind)]
    history = after(*looks)
    assert (history.server, history.server_confirmed, history.phase_since) == (REAL, True, 10)
    history = after(*looks, claiming(40, NOBODY), claiming(50, None), claiming(60, blind), claiming(70, NOBODY))
    assert (history.server, history.server_confirmed, history.phase_since) == (REAL, True, 40)
    assert history.death_seen == 40
    history = after(*looks, claiming(40, NOBODY), claiming(50, Usage((REAL,))))
    assert (history.phase_since, history.death_seen) == (50, None)


def test_notes_about_an_id_that_is_free_are_dropped() -> None:
    ledger = Ledger()
    ledger.note_open(3, 1)
    ledger.note_death(3, 1)
    ledger.note_failure(3, "EIO", 1)
    ledger.note_overdue(3, "DEL_DEV", 1, of_look=False)
    ledger.note_answer(3, "DEL_DEV")
    assert ledger.forget(3) is None
    assert ledger.ids() == ()
    ledger.record(a_look(10))
    assert 3 in ledger
    assert ledger.forget(3)
    assert ledger.get(3) is None


# --- what a former daemon knew ----------------------------------------------------------------------------------------


QUIESCED = a_look(20, state=KernelState.QUIESCED, disk=DISK)
TRIED = Trail(attempts=2, not_before=70.0, trouble="exit 1")


def a_former_ledger(trail: Trail = TRIED) -> Ledger:
    """Of a device that was served, died at 20 and is waiting."""
    ledger = Ledger()
    ledger.record(live(10))
    ledger.record(QUIESCED)
    ledger.note_death(3, 21)
    ledger.note_trail(3, trail)
    ledger.note_verdict(3, Verdict(VerdictKind.UNSERVED, "waits"), 20)
    return ledger


def written(ledger: Ledger) -> Any:  # noqa: ANN401 - JSON
    return json.loads(json.dumps(ledger.to_record(3), allow_nan=False))


def remembering(record: Any, look: Observation) -> History:  # noqa: ANN401 - JSON
    ledger = Ledger()
    ledger.remember(3, record)
    assert ledger.ids() == (3,)
    assert 3 not in ledger
    assert ledger.get(3) is None
    return ledger.record(look)


def test_what_was_known_of_an_instance_goes_on_after_a_restart() -> None:
    former = a_former_ledger()
    history = remembering(written(former), replace(QUIESCED, at=50, server=None))
    before = former.get(3)
    assert before
    assert (history.first_seen, history.phase_since, history.death_seen) == (10, 20, 20)
    assert (history.server, history.disk_rdevs, history.was_live) == (SERVER, RDEVS, True)
    assert (history.server_died, history.trail, history.phase) == (True, TRIED, before.phase)
    assert (history.verdict and history.verdict.kind, history.verdict_since) == (VerdictKind.UNSERVED, 20)
    assert (history.last_seen, history.watched_since, history.identity) == (50, 50, FIRST)


def test_how_long_a_device_is_without_service_goes_on_after_a_restart() -> None:
    former = a_former_ledger()
    former.record(waiting(30, FIRST_TRY))
    former.record(waiting(40))
    history = remembering(written(former), waiting(50))
    assert (history.unserved_since, history.takers, history.phase_since) == (20, 1, 40)
    assert remembering(written(former), replace(live(50), identity=FIRST)).unserved_since is None


@pytest.mark.parametrize("key", ["unserved_since", "takers"])
def test_a_record_of_an_earlier_version_is_believed_in_what_it_says(key: str) -> None:
    record = written(after_a_stop_that_is_not_over())
    del record[key]
    history = remembering(record, replace(QUIESCED, at=50))
    assert history.overdue
    assert (history.overdue.command, history.trail) == ("STOP_DEV", TRIED)
    assert history.unserved_since == (20 if key == "takers" else 50)


def after_a_stop_that_is_not_over() -> Ledger:
    former = a_former_ledger()
    former.note_hand(3, HAND)
    return former


def test_what_has_to_be_watched_without_a_break_begins_anew_after_a_restart() -> None:
    ledger = Ledger()
    ledger.record(live(10))
    ledger.record(a_look(20))
    history = remembering(written(ledger), a_look(50, age=45))
    assert (history.phase_since, history.watched_since) == (20, 50)
    assert (history.seen_idle_since, history.idle_since) == (50, 20)  # the former daemon saw it served until then
    assert remembering(written(ledger), a_look(50)).idle_since == 50


def test_a_state_that_changed_while_no_daemon_ran_is_as_old_as_its_first_look() -> None:
    history = remembering(written(a_former_ledger()), a_look(50))
    assert history.phase_since == 50
    assert history.was_live


@pytest.mark.parametrize("identity", [SECOND, NONE], ids=["another instance", "deleted"])
def test_nothing_is_remembered_of_another_instance_or_of_one_that_cannot_be_told(identity: Identity) -> None:
    look = a_look(50, identity=identity)
    assert remembering(written(a_former_ledger()), look) == after(look)


def test_nothing_is_remembered_by_a_record_without_an_instance() -> None:
    record = written(a_former_ledger()) | {"instance": None}
    assert remembering(record, a_look(50, identity=NONE)) == after(a_look(50, identity=NONE))


def test_what_is_remembered_is_used_once_and_dropped_when_the_id_is_free() -> None:
    ledger = Ledger()
    ledger.remember(3, written(a_former_ledger()))
    assert ledger.forget(3) is None
    assert ledger.ids() == ()
    assert ledger.record(QUIESCED) == after(QUIESCED)
    ledger.remember(3, written(a_former_ledger()))
    assert ledger.record(a_look(60, identity=SECOND)) == after(a_look(60, identity=SECOND))
    assert ledger.record(replace(QUIESCED, at=70)).trail == Trail()


def test_an_attempt_that_was_under_way_is_abandoned() -> None:
    history = remembering(written(a_former_ledger(TRIED.begun(60.0, 30.0))), replace(QUIESCED, at=65))
    assert (history.trail.is_running, history.trail.attempts, history.trail.not_before) == (False, 3, 90.0 + OVERRUN)


HAND = Process(812, 5551)


def after_a_stop(*, overdue: bool) -> Ledger:
    """Of a daemon that follows one whose child was stopping this device, past its deadline or not yet."""
    former = a_former_ledger()
    former.note_hand(3, HAND)
    if overdue:
        former.note_overdue(3, "STOP_DEV", 25, of_look=False)
    ledger = Ledger()
    ledger.remember(3, written(former))
    return ledger


def seen_after_a_stop(*, overdue: bool = True) -> Ledger:
    ledger = after_a_stop(overdue=overdue)
    ledger.record(replace(QUIESCED, at=50))
    return ledger


def overdue_of(ledger: Ledger) -> Overdue | None:
    history = ledger.get(3)
    assert history
    return history.overdue


@pytest.mark.parametrize("overdue", [False, True])
def test_a_stop_that_a_child_of_a_former_daemon_was_told_is_as_one_that_has_missed_its_deadline(
    *, overdue: bool
) -> None:
    ledger = after_a_stop(overdue=overdue)
    assert ledger.hand_of_former(3) == HAND
    ledger.record(replace(QUIESCED, at=50))
    assert overdue_of(ledger) == Overdue("STOP_DEV", 20, of_former=True)
    assert ledger.hand_of_former(3) is None  # asked before the first look, and of a former one


@pytest.mark.parametrize(
    ("command", "of_look"), [("DEL_DEV", False), ("DEL_DEV_ASYNC", False), ("open", False), ("GET_DEV_INFO", True)]
)
def test_whatever_else_has_not_answered_a_daemon_is_over_with_it_and_not_for_who_looks_beside_it(
    command: str, *, of_look: bool
) -> None:
    former = a_former_ledger()
    former.note_overdue(3, command, 25, of_look=of_look)
    assert remembering(written(former), replace(QUIESCED, at=50)).overdue is None
    beside = Ledger()
    beside.remember(3, written(former), has_ended=False)
    kept = beside.record(replace(QUIESCED, at=50)).overdue
    assert kept == (None if of_look else Overdue(command, 20, of_former=True))


@pytest.mark.parametrize("when", ["before the first look", "after it"])
def test_the_end_of_a_former_daemons_child_ends_what_it_imposed(when: str) -> None:
    ledger = after_a_stop(overdue=False)
    if when == "after it":
        ledger.record(replace(QUIESCED, at=50))
    ledger.note_answer(3, "DEL_DEV")
    assert ledger.to_record(3) is None or written(ledger)["hand"] == [812, 5551]
    ledger.note_answer(3, "STOP_DEV")
    history = ledger.record(replace(QUIESCED, at=60))
    assert (history.overdue, history.hand) == (None, None)
    assert (written(ledger)["hand"], written(ledger)["overdue"]) == (None, None)


def test_who_is_told_to_stop_a_device_is_kept_at_once_and_so_is_that_it_has_answered() -> None:
    ledger = a_former_ledger()
    kept: list[tuple[int, Any]] = []
    ledger.keep = lambda dev_id: kept.append((dev_id, written(ledger)["hand"]))
    ledger.note_hand(3, HAND)
    ledger.note_hand(4, HAND)  # which nobody knows
    ledger.note_hand(3, None)
    assert kept == [(3, [812, 5551]), (3, None)]


def test_deletions_that_have_not_answered_are_named_until_they_have_and_stops_are_not() -> None:
    ledger = Ledger()
    for dev_id in (9, 3, 5, 7):
        ledger.record(replace(QUIESCED, dev_id=dev_id))
    for dev_id, command in ((9, "DEL_DEV"), (3, "DEL_DEV_ASYNC"), (5, "STOP_DEV"), (7, "open")):
        ledger.note_overdue(dev_id, command, 25, of_look=False)
    assert ledger.stuck_deletions() == (3, 9)
    ledger.note_answer(3, "DEL_DEV_ASYNC")
    assert ledger.stuck_deletions() == (9,)
    ledger.forget(9)
    assert ledger.stuck_deletions() == ()


def test_a_stop_of_a_former_daemon_is_over_when_the_device_is_dead_without_a_disk() -> None:
    ledger = seen_after_a_stop()
    for state, disk in ((KernelState.LIVE, None), (KernelState.DEAD, DISK), (None, None)):
        history = ledger.record(a_look(60, state=state, disk=disk))
        assert (overdue_of(ledger) is None, history.hand) == (False, HAND), (state, disk)
    history = ledger.record(a_look(70))
    assert (history.overdue, history.hand) == (None, None)


def test_a_stop_of_this_daemon_is_over_when_it_has_answered_and_not_before() -> None:
    ledger = Ledger()
    ledger.record(QUIESCED)
    ledger.note_overdue(3, "STOP_DEV", 25, of_look=False)
    ledger.record(a_look(30))
    ledger.forget_overdue(3)
    assert overdue_of(ledger)


def test_a_person_can_say_that_a_command_of_a_former_daemon_is_over() -> None:
    ledger = seen_after_a_stop()
    ledger.forget_overdue(3)
    history = ledger.get(3)
    assert history
    assert (history.overdue, history.hand) == (None, None)
    ledger.forget_overdue(4)  # which nobody knows


def test_after_a_look_at_all_what_was_remembered_and_is_not_there_is_named_once_and_forgotten() -> None:
    ledger = Ledger()
    ledger.remember(3, written(a_former_ledger()))
    ledger.remember(7, written(a_former_ledger()))
    ledger.record(replace(QUIESCED, at=50))
    assert ledger.forget_remembered() == (7,)
    assert ledger.forget_remembered() == ()
    assert ledger.ids() == (3,)


def test_a_device_that_nobody_knows_has_no_record() -> None:
    assert Ledger().to_record(3) is None


def test_a_record_that_was_remembered_says_the_same_when_it_is_written_again() -> None:
    record = written(a_former_ledger())
    ledger = Ledger()
    ledger.remember(3, record)
    ledger.record(replace(QUIESCED, at=50))
    assert written(ledger) == record


RECORD = written(a_former_ledger())
BROKEN: dict[str, Any] = {
    "not an object": [1, 2],
    "nothing": None,
    **{
        f"without {key}": {name: value for name, value in RECORD.items() if name != key}
        for key in RECORD
        if key not in ("unserved_since", "takers")
    },
    "takers that are many": RECORD | {"takers": "many"},
    "a time without service that is endless": RECORD | {"unserved_since": float("inf")},
    "half a number of a node": RECORD | {"char_rdev": [240]},
    "a disk of one number": RECORD | {"disk_rdevs": [[259]]},
    "a disk without numbers": RECORD | {"disk_rdevs": [["a", "b"]]},
    "an endless number": RECORD | {"disk_rdevs": [[float("inf"), 0]]},
    "a phase that is a number": RECORD | {"phase": 7},
    "a time that is a text": RECORD | {"phase_since": "long ago"},
    "a verdict of tomorrow": RECORD | {"verdict": "haunted"},
    "a server that is a text": RECORD | {"server": "ublk.loop"},
    "a server with a beard": RECORD | {"server": {**RECORD["server"], "beard": "long"}},
    "a trail that is a number": RECORD | {"trail": 3},
    "a trail with an unknown word": RECORD | {"trail": {**RECORD["trail"], "luck": 1}},
    "a trail of many attempts": RECORD | {"trail": {**RECORD["trail"], "attempts": "many"}},
    "a trail that began once": RECORD | {"trail": {**RECORD["trail"], "began": "once"}},
    "a trail that waits for nothing": RECORD | {"trail": {**RECORD["trail"], "not_before": None}},
    "a trail that waits for ever": RECORD | {"trail": {**RECORD["trail"], "not_before": float("inf")}},
    "a hand of one number": RECORD | {"hand": [812]},
    "a hand that is a text": RECORD | {"hand": "812"},
    "a hand without numbers": RECORD | {"hand": ["a", "b"]},
    "a time that is no number": RECORD | {"phase_since": float("nan")},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_is_refused_and_nothing_of_it_is_remembered(name: str) -> None:
    ledger = Ledger()
    with pytest.raises(ValueError, match="not a record of a device"):
        ledger.remember(3, BROKEN[name])
    assert ledger.ids() == ()
