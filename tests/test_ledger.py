"""Since when is a thing so: what the ledger keeps from look to look, and what it forgets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from duende_ublkd.core.ledger import History, Ledger
from duende_ublkd.core.model import (
    Action,
    DevInfo,
    Disk,
    Identity,
    KernelState,
    Observation,
    Server,
    Usage,
    Verdict,
    VerdictKind,
)

FIRST, SECOND, NONE = Identity(14_628, (240, 3)), Identity(14_796, (240, 3)), Identity(None)
DISK = Disk((259, 0), 7, ((259, 1),))
RDEVS = frozenset({(259, 0), (259, 1)})
SERVER = Server(4121, alive=True, comm="ublk.loop")
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


def test_a_fork_that_serves_is_the_known_server() -> None:
    history = after(a_look(10, state=KernelState.LIVE, disk=DISK, server=replace(SERVER, alive=False), usage=OPEN))
    assert history.server == OPEN.char_openers[0]


def test_a_refused_claim_starts_the_idle_time_anew_and_from_the_second_on_waits_longer_each_time() -> None:
    ledger = Ledger()
    ledger.record(a_look(10, age=500))
    pauses = []
    for _ in range(12):
        ledger.note_open(3, 20)
        history = ledger.record(a_look(20))
        assert (history.seen_idle_since, history.idle_since) == (20, 20)
        pauses.append(history.paused_until - 20)
    assert pauses == [-20, 2, 4, 8, 16, 30, 30, 30, 30, 30, 30, 30]
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
