"""What is told to which sink, and when: one moment after the other, by a clock that the test has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duende_ublkd.core import delivery
from duende_ublkd.core.alertconfig import QuietHours, RateLimit, Reminder, SinkConfig, SinkKind
from duende_ublkd.core.alerting import AlertKind, Severity
from duende_ublkd.core.delivery import DAY, Account, Entry, Now, Plan, Progress, Stage, State
from tests.test_alerting import an_alert

NOW = 1_000_000.0
ALERTMANAGER = SinkConfig(SinkKind.ALERTMANAGER, "am", url="http://127.0.0.1:9093", resend=60.0)
WEBHOOK = SinkConfig(SinkKind.WEBHOOK, "hook", url="http://127.0.0.1:1")
MAIL = SinkConfig(SinkKind.MAIL, "mail")
TOLD = Progress(NOW, Stage.TOLD, told_at=NOW, sent_at=NOW)


def an_entry(number: int = 1, progress: Progress | None = None, **changes: Any) -> Entry:  # noqa: ANN401 - of the alert
    changes.setdefault("key", f"ublk{number}/1/pinned")
    return Entry(number, an_alert(**changes), progress or Progress(NOW))


def plan(
    *entries: Entry, sink: SinkConfig = MAIL, account: Account | None = None, at: float = NOW, minute: float = 720.0
) -> Plan:
    return delivery.plan(entries, sink, account or Account(round_began=NOW), Now(at, minute))


def told(found: Plan) -> list[tuple[int, State]]:
    return [(due.entry.number, due.state) for due in found.message]


# --- order ------------------------------------------------------------------------------------------------------------


def test_an_alert_is_told_when_it_is_raised_and_when_it_is_over_and_not_between() -> None:
    raised = an_entry()
    assert told(plan(raised)) == [(1, State.RAISED)]
    progress = delivery.progress_after(raised, MAIL, State.RAISED, NOW)
    assert plan(an_entry(progress=progress), at=NOW + DAY) == Plan()
    over = an_entry(progress=progress.over(NOW + 5), over_at=NOW + 5)
    assert told(plan(over, at=NOW + 5)) == [(1, State.OVER)]
    done = delivery.progress_after(over, MAIL, State.OVER, NOW + 6)
    assert plan(replace(over, progress=done), at=NOW + DAY) == Plan()


def test_one_that_is_over_before_it_was_told_is_told_as_raised_first() -> None:
    entry = an_entry(over_at=NOW + 1)
    assert told(plan(entry, at=NOW + 9)) == [(1, State.RAISED)]
    progress = delivery.progress_after(entry, MAIL, State.RAISED, NOW + 9)
    assert told(plan(replace(entry, progress=progress), at=NOW + 9)) == [(1, State.OVER)]


def test_a_fault_that_has_come_again_is_told_of_when_its_former_alert_is_done_with() -> None:
    former = an_entry(1, TOLD.over(NOW), key="a", over_at=NOW)
    again = an_entry(2, key="a")
    other = an_entry(3, Progress(NOW + 1), key="b")
    assert told(plan(former, again, other, at=NOW + 1)) == [(1, State.OVER)]
    done = replace(former, progress=delivery.progress_after(former, MAIL, State.OVER, NOW + 1))
    assert told(plan(done, again, other, at=NOW + 1)) == [(2, State.RAISED)]
    waits = replace(former, progress=former.progress.failed(NOW + 1, 0.5, refused=False))
    assert told(plan(waits, again, other, at=NOW + 1)) == [(3, State.RAISED)]  # it delays only its own kind


def test_what_has_merely_happened_is_told_once_but_to_alertmanager_as_everything_is() -> None:
    entry = an_entry(kind=AlertKind.CLEANED, severity=Severity.INFO, over_at=NOW)
    done = delivery.progress_after(entry, MAIL, State.RAISED, NOW)
    assert done.stage is Stage.DONE
    open_there = delivery.progress_after(entry, ALERTMANAGER, State.RAISED, NOW)
    assert open_there.stage is Stage.TOLD
    found = plan(replace(entry, progress=open_there), sink=ALERTMANAGER, at=NOW + delivery.LEAST_OPEN)
    assert told(found) == [(1, State.OVER)]


def test_the_critical_ones_go_first_and_a_day_of_waiting_is_worth_a_step() -> None:
    entries = [
        an_entry(1, Progress(NOW), severity=Severity.WARNING),
        an_entry(2, Progress(NOW + 60), severity=Severity.CRITICAL),
        an_entry(3, Progress(NOW - DAY - 100), severity=Severity.INFO),
        an_entry(4, Progress(NOW - DAY + 100), severity=Severity.WARNING),  # from before a whole day of a rate limit
    ]
    order = []
    while entries:
        ((number, _),) = told(plan(*entries, at=NOW + 61))
        order.append(number)
        entries = [entry for entry in entries if entry.number != number]
    assert order == [2, 4, 3, 1]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_sink_that_fails_is_asked_again_later_each_time_and_at_least_every_six_minutes() -> None:
    account, pauses = Account(), []
    for _ in range(12):
        account = account.failed(NOW, 0.5)
        pauses.append(account.not_before - NOW)
    assert pauses[:9] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert pauses[9:] == [300, 300, 300]
    assert delivery.pause_after(99, 1.0) == 375
    assert delivery.pause_after(1, 0.0) == 0.75
    short = account.failed(NOW, 0.5, delivery.longest_pause(ALERTMANAGER))
    assert short.not_before == NOW + 60  # what it does not hear of for five minutes is over for it
    assert delivery.longest_pause(replace(ALERTMANAGER, resend=5.0)) == 5
    assert delivery.longest_pause(replace(ALERTMANAGER, resend=3600.0)) == 60
    assert delivery.longest_pause(MAIL) == 300
    again = account.succeeded(NOW, MAIL)
    assert (again.failures, again.failing_since, again.not_before) == (0, None, 0.0)


def test_a_notice_is_tried_again_later_each_time_and_its_company_costs_it_nothing() -> None:
    progress, pauses = Progress(NOW), []
    for _ in range(4):
        progress = progress.failed(NOW, 0.5, refused=True, alone=False)
        assert progress.not_before == NOW + 1
    for _ in range(4):
        progress = progress.failed(NOW, 0.5, refused=True)
        pauses.append(progress.not_before - NOW)
    assert pauses == [1, 2, 4, 8]
    assert plan(an_entry(progress=progress), at=NOW + 7).next_at == NOW + 8
    assert told(plan(an_entry(progress=progress.soon()), at=NOW + 7)) == [(1, State.RAISED)]


def test_while_a_sink_is_not_asked_nothing_is_told_to_it_however_much_waits() -> None:
    account = Account().failed(NOW, 0.5)
    found = plan(*(an_entry(number) for number in range(5)), account=account, at=NOW + 0.5)
    assert found == Plan(next_at=account.not_before)


def test_a_notice_that_is_never_taken_lets_the_others_pass() -> None:
    poison = an_entry(1)
    for number in range(2, 9):
        poison = replace(poison, progress=poison.progress.failed(NOW, 0.5, refused=False))
        poison = replace(poison, progress=replace(poison.progress, not_before=0.0))
        assert told(plan(poison, an_entry(number, Progress(NOW + number)), at=NOW + 10)) == [(number, State.RAISED)]


def test_a_notice_that_is_never_taken_has_its_turn_again_whatever_comes() -> None:
    poison = an_entry(1, replace(Progress(NOW), tries=10_000))
    assert told(plan(poison, an_entry(2, Progress(NOW + 2 * 3600)), at=NOW + 2 * 3600)) == [(1, State.RAISED)]


def refused(progress: Progress, times: int = delivery.MOST_REFUSALS) -> Progress:
    for _ in range(times):
        progress = progress.failed(NOW, 0.5, refused=True)
    return progress


def test_a_notice_is_given_up_after_some_refusals_in_a_row_by_a_sink_that_takes_others() -> None:
    doubted = refused(Progress(NOW), 1).after_another(1)
    for _ in range(delivery.MOST_REFUSALS):
        assert not delivery.is_hopeless(doubted, Account(), NOW)
        doubted = refused(doubted, 1)
    assert delivery.is_hopeless(doubted, Account(), NOW)
    assert delivery.is_hopeless(doubted.after_another(2), Account(), NOW)
    assert not delivery.is_hopeless(doubted.failed(NOW, 0.5, refused=False), Account(), NOW)
    over = replace(doubted, stage=Stage.TOLD).over(NOW)
    for mended in (doubted.soon(), over, doubted.told(State.RAISED, NOW, ends_here=False)):
        assert not delivery.is_hopeless(refused(mended), Account(), NOW)


def test_refusals_of_everything_are_the_sinks_own_and_are_counted_anew_once_it_takes_something() -> None:
    waiting = refused(Progress(NOW), 100)
    assert not delivery.is_hopeless(waiting, Account(), NOW)
    again = waiting.after_another(100)
    assert (again.not_before, again.refusals) == (0.0, 0)
    assert not delivery.is_hopeless(refused(again, delivery.MOST_REFUSALS - 1), Account(), NOW)
    assert delivery.is_hopeless(refused(again), Account(), NOW)
    assert Progress(NOW).after_another(5) == Progress(NOW)  # it was never tried


def test_a_notice_is_given_up_after_a_day_of_failures() -> None:
    failing = Account(failures=1, failing_since=NOW)
    assert not delivery.is_hopeless(Progress(NOW - DAY), failing, NOW + DAY - 1)  # before that it was not tried
    assert delivery.is_hopeless(Progress(NOW - DAY), failing, NOW + DAY)
    assert not delivery.is_hopeless(Progress(NOW + 1), failing, NOW + DAY)
    assert not delivery.is_hopeless(Progress(NOW - DAY), Account(), NOW + DAY)  # it waits for something else


@pytest.mark.parametrize("stage", [Stage.TOLD, Stage.LOST])
def test_what_is_open_is_said_to_alertmanager_again_however_often_it_was_refused(stage: Stage) -> None:
    entry = an_entry(progress=refused(replace(TOLD, stage=stage).failed(NOW, 0.5, refused=True).after_another(1), 50))
    pause = entry.progress.not_before - NOW
    assert pause <= 300
    account = Account(round_began=NOW + 120)
    assert told(plan(entry, sink=ALERTMANAGER, account=account, at=NOW + 120 + pause)) == [(1, State.RAISED)]


def test_one_that_is_lost_is_told_no_more_and_neither_is_its_end() -> None:
    lost = Progress(NOW).lost()
    assert plan(an_entry(progress=lost), at=NOW + DAY) == Plan()
    assert plan(an_entry(progress=lost.over(NOW), over_at=NOW), at=NOW + DAY) == Plan()
    assert delivery.owed(lost.over(NOW), an_alert(over_at=NOW)) is None


def test_what_a_sink_that_is_no_more_was_to_be_told_is_known() -> None:
    assert delivery.owed(Progress(NOW), an_alert()) is State.RAISED
    assert delivery.owed(Progress(NOW), an_alert(over_at=NOW)) is State.RAISED
    assert delivery.owed(TOLD, an_alert()) is None
    assert delivery.owed(TOLD, an_alert(over_at=NOW)) is State.OVER
    assert delivery.owed(replace(TOLD, stage=Stage.DONE), an_alert(over_at=NOW)) is None


# --- rate limit, reminders, quiet hours -------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 400), min_size=1, max_size=60), st.integers(1, 5), st.sampled_from([10.0, 60.0]))
def test_a_rate_limit_is_kept_in_any_window_and_costs_no_more_than_it_must(
    pauses: list[float], count: int, per: float
) -> None:
    sink = replace(MAIL, rate_limit=RateLimit(count, per))
    account, now = Account(), NOW
    taken: list[float] = []
    for pause in pauses:
        now += pause
        free_at = account.free_at(now, sink)
        within = [at for at in taken if at > now - per]
        assert (free_at <= now) == (len(within) < count)
        if free_at > now:
            assert free_at == pytest.approx(within[-count] + per)
            now = free_at
        account = account.succeeded(now, sink)
        taken.append(now)
        assert len(account.taken) <= count
    for first, last in zip(taken, taken[count:], strict=False):
        assert last - first >= per - 1e-6


def test_what_the_rate_limit_holds_back_is_told_when_there_is_room_and_said_to_be_held() -> None:
    sink = replace(MAIL, rate_limit=RateLimit(1, 60.0))
    account = Account().succeeded(NOW, sink)
    found = plan(an_entry(1), an_entry(2), sink=sink, account=account, at=NOW + 1)
    assert (found.message, found.next_at) == ((), NOW + 60)
    assert [due.entry.number for due in found.held] == [1, 2]
    assert told(plan(an_entry(1), an_entry(2), sink=sink, account=account, at=NOW + 60)) == [(1, State.RAISED)]


@pytest.mark.parametrize(
    ("reminder", "days"),
    [(Reminder.ONCE, []), (Reminder.DAILY, [1, 2, 3, 4]), (Reminder.DIMINISHING, [1, 3, 7, 15])],
)
def test_what_lasts_is_told_of_again_as_the_sink_asks_for_it(reminder: Reminder, days: list[int]) -> None:
    sink = replace(MAIL, reminder=reminder)
    entry, reminded = an_entry(progress=TOLD), []
    for day in range(1, 16):
        found = plan(entry, sink=sink, at=NOW + day * DAY)
        if found.message:
            assert told(found) == [(1, State.REMINDER)]
            assert told(plan(entry, sink=sink, at=NOW + day * DAY - 1)) == []
            entry = replace(entry, progress=delivery.progress_after(entry, sink, State.REMINDER, NOW + day * DAY))
            reminded.append(day)
    assert reminded[: len(days)] == days
    assert bool(reminded) == bool(days)
    over = replace(entry, alert=an_alert(key="x", over_at=NOW + 40 * DAY))
    assert told(plan(over, sink=sink, at=NOW + 40 * DAY)) == [(1, State.OVER)]


def test_in_quiet_hours_everything_waits_but_what_is_critical() -> None:
    sink = replace(MAIL, quiet_hours=QuietHours(22 * 60, 7 * 60))
    warning, critical = an_entry(1), an_entry(2, severity=Severity.CRITICAL)
    assert told(plan(warning, critical, sink=sink, minute=23 * 60)) == [(2, State.RAISED)]
    found = plan(warning, sink=sink, minute=6 * 60 + 30)
    assert (found.message, found.next_at) == ((), NOW + 30 * 60)
    assert told(plan(warning, sink=sink, minute=7 * 60)) == [(1, State.RAISED)]
    assert told(plan(warning, sink=sink, minute=22 * 60 - 0.1)) == [(1, State.RAISED)]


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, 1439))
def test_quiet_hours_are_those_of_the_configuration_and_are_looked_at_again_within_an_hour(
    start: int, end: int, minute: int
) -> None:
    hours = QuietHours(start, end)
    sink = replace(MAIL, quiet_hours=hours)
    left = delivery.quiet_for(sink, an_alert(), minute)
    assert 0 <= left <= 3600
    if start != end:  # which the configuration refuses
        assert (left > 0) == (minute in hours)
    if 0 < left < 3600:
        assert (minute + left / 60) % 1440 == end


# --- Alertmanager -----------------------------------------------------------------------------------------------------


def test_alertmanager_hears_of_everything_that_is_open_in_one_message_each_resend() -> None:
    account = Account().with_round(NOW, ALERTMANAGER)
    entries = [an_entry(number, TOLD) for number in range(1, 40)]
    waits = plan(*entries, sink=ALERTMANAGER, account=account, at=NOW + 1)
    assert waits == Plan(next_at=NOW + 60)
    account = account.with_round(NOW + 60, ALERTMANAGER)
    again = plan(*entries, sink=ALERTMANAGER, account=account, at=NOW + 60)
    assert [number for number, _ in told(again)] == list(range(1, 40))
    assert {state for _, state in told(again)} == {State.RAISED}
    sent = [
        replace(entry, progress=delivery.progress_after(entry, ALERTMANAGER, State.RAISED, NOW + 61))
        for entry in entries
    ]
    assert plan(*sent, sink=ALERTMANAGER, account=account, at=NOW + 61).next_at == NOW + 120


def test_alertmanager_hears_news_at_once_and_it_takes_the_place_of_nothing() -> None:
    account = Account(round_began=NOW + 60)
    entries = [an_entry(number, TOLD) for number in range(1, 200)]
    found = plan(*entries, an_entry(500, Progress(NOW + 61)), sink=ALERTMANAGER, account=account, at=NOW + 61)
    numbers = [number for number, _ in told(found)]
    assert numbers == [500, *range(1, delivery.MOST_AT_ONCE)]


def test_an_alert_is_open_for_alertmanager_until_it_has_told_people_however_short_it_was() -> None:
    entry = an_entry(progress=TOLD.over(NOW + 1), over_at=NOW + 1)
    account = Account(round_began=NOW)
    assert plan(entry, sink=ALERTMANAGER, account=account, at=NOW + 1).next_at == NOW + delivery.LEAST_OPEN
    assert told(plan(entry, sink=ALERTMANAGER, account=account, at=NOW + delivery.LEAST_OPEN)) == [(1, State.OVER)]
    again = replace(entry, is_superseded=True)  # for Alertmanager it is one alert that goes on
    assert told(plan(again, sink=ALERTMANAGER, account=account, at=NOW + 1)) == [(1, State.OVER)]


def test_with_a_short_resend_alertmanager_hears_that_it_is_still_open_until_then() -> None:
    sink = replace(ALERTMANAGER, resend=15.0)
    entry = an_entry(progress=TOLD.over(NOW + 1), over_at=NOW + 1)
    assert told(plan(entry, sink=sink, account=Account(round_began=NOW + 15), at=NOW + 15)) == [(1, State.RAISED)]


def test_that_it_is_over_is_said_to_alertmanager_for_a_quarter_of_an_hour() -> None:
    done = Progress(NOW, Stage.DONE, told_at=NOW, sent_at=NOW)
    entry = an_entry(progress=done, over_at=NOW)
    said = []
    for minute in range(1, 40):
        at = NOW + 60 * minute
        found = plan(entry, sink=ALERTMANAGER, account=Account(round_began=at), at=at)
        if found.message:
            assert told(found) == [(1, State.OVER)]
            entry = replace(entry, progress=delivery.progress_after(entry, ALERTMANAGER, State.OVER, at))
            said.append(minute)
    assert said == list(range(1, 15))


def test_what_was_given_up_is_said_to_alertmanager_again_once_it_listens_if_it_is_still_open() -> None:
    entry = an_entry(progress=Progress(NOW).lost())
    found = plan(entry, sink=ALERTMANAGER, account=Account(round_began=NOW + DAY), at=NOW + DAY)
    assert told(found) == [(1, State.RAISED)]
    assert delivery.progress_after(entry, ALERTMANAGER, State.RAISED, NOW + DAY).stage is Stage.TOLD


def test_what_is_refused_is_sent_in_halves_until_it_is_known_which_one_cannot_be_taken() -> None:
    entries = {number: an_entry(number) for number in range(1, 51)}
    account, sizes = Account(round_began=NOW), []
    for _ in range(100):
        found = plan(*entries.values(), sink=ALERTMANAGER, account=account)
        if not found.message:
            break
        numbers = [number for number, _ in told(found)]
        sizes.append(len(numbers))
        for number in numbers:
            entry = entries[number]
            if 17 in numbers:
                progress = entry.progress.failed(NOW, 0.5, refused=True, alone=len(numbers) == 1)
                progress = replace(progress, not_before=0.0)
            else:
                progress = delivery.progress_after(entry, ALERTMANAGER, State.RAISED, NOW)
            if delivery.is_hopeless(progress, account, NOW):
                progress = replace(progress.lost(), sent_at=NOW)
            entries[number] = replace(entry, progress=progress)
        if 17 not in numbers:
            entries = {
                each: replace(entry, progress=entry.progress.after_another(1)) for each, entry in entries.items()
            }
    assert len(sizes) <= 20
    assert {number for number, entry in entries.items() if entry.progress.stage is Stage.LOST} == {17}
    assert {entry.progress.stage for number, entry in entries.items() if number != 17} == {Stage.TOLD}


# --- whom it concerns -------------------------------------------------------------------------------------------------


def test_a_sink_hears_of_what_it_asks_for_and_never_that_it_does_not_hear() -> None:
    sink = replace(MAIL, severity=Severity.WARNING, kinds=(AlertKind.PINNED, AlertKind.DEGRADED))
    assert delivery.concerns(an_alert(), sink)
    assert not delivery.concerns(an_alert(severity=Severity.INFO), sink)
    assert not delivery.concerns(an_alert(kind=AlertKind.WEDGED), sink)
    sick = an_alert(key=delivery.sick_sink_key("mail"), kind=AlertKind.DEGRADED)
    assert not delivery.concerns(sick, sink)
    assert delivery.concerns(sick, replace(sink, name="other"))


@given(
    st.sampled_from(Stage),
    st.floats(0, NOW),
    st.floats(0, NOW),
    st.floats(0, NOW),
    st.integers(0, 50),
)
def test_what_was_told_is_the_same_after_it_was_written_down(
    stage: Stage, since: float, told_at: float, sent_at: float, reminders: int
) -> None:
    progress = Progress(since, stage, told_at, sent_at, reminders)
    assert Progress.from_object(progress.to_object(), NOW) == progress
    early = Progress.from_object(progress.to_object(), 0.0)  # the clock was set back meanwhile
    assert (early.since, early.told_at, early.sent_at) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        [],
        "told",
        ["told", 1.0],
        ["tolt", 1.0, 1.0, 1.0, 0],
        ["told", float("nan"), 1.0, 1.0, 0],
        [[], 1, 1, 1, 0],
    ],
    ids=str,
)
def test_a_damaged_record_of_what_was_told_is_refused(damaged: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        Progress.from_object(damaged, NOW)
