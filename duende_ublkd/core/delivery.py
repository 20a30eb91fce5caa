"""What is to be told to which sink, and when: the schedule of alerts, without a clock and without anybody being told.

Rules:
1. Each sink hears of each alert that concerns it: that it is raised, where it asks for it that it still lasts, and that it
   is over, in this order. The same fault, come again, is told of when its former alert is done with. What has been
   delivered is repeated only where nobody knows that it was: at least once.
2. A sink that does not take what it is told gets it again, later each time, one try at a time whatever else waits: a dead
   sink costs one try in five minutes, a dead Alertmanager one a minute. What is tried again loses its place in the
   queue little by little, so that one notice which is never taken does not keep the others waiting, nor they it. Nor is it
   in one message with what has not failed yet.
3. A sink that says "never" may mean all that it is told: its password is being changed, its server is set up anew. Only
   where it takes others does that say something of the notice, which is then given up soon; else it is tried for a day.
4. What waits is told in the order in which it came up, a day of waiting being worth as much as a step in severity. So
   behind a rate limit the critical ones come first, and still nothing waits for ever.
5. Alertmanager forgets what it does not hear again. It hears of all open alerts in each `resend`, and of those that are
   over for as long as Prometheus would tell it. It tells people of a group of alerts only after gathering it, and of none
   that is over by then: so an alert is open for it for a while, however short the fault was. What it does not hear of for
   five minutes is over for it: pauses after failures are short there, and no refusal ends the telling of what is open.
6. Times are seconds of one steady clock that means about the same in the next process: the epoch as of a process's start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from duende_ublkd.core.alertconfig import Reminder, SinkKind
from duende_ublkd.core.alerting import Severity, checked_time

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from duende_ublkd.core.alertconfig import SinkConfig
    from duende_ublkd.core.alerting import Alert

GIVE_UP_AFTER = 86_400.0  # seconds
TRY_AFRESH_FOR = 3600.0  # seconds, of a process that finds out that its former one has tried for long
MOST_REFUSALS = 6  # by a sink that says that it will never take it, and has taken others meanwhile: a minute
FIRST_PAUSE = 1.0  # seconds after a try that failed; doubles
LONGEST_PAUSE = 300.0
LONGEST_PAUSE_OF_SERVICE = 60.0  # Alertmanager takes for over what it has not heard of for five of them
JITTER = 0.25  # of the pause, up or down: what was down for many machines is not asked by all of them at once
RESOLVED_FOR = 900.0  # seconds, as Prometheus has it
LEAST_OPEN = 60.0  # seconds; twice what Alertmanager gathers a group for (group_wait), unless it is told otherwise
MOST_AT_ONCE = 64  # alerts in one message to Alertmanager
DAY = 86_400.0
_STEP = DAY  # seconds of waiting that a step in severity is worth
_PER_TRY = 60.0  # and what each try costs
_MOST_TRIES = 60
_DOUBLINGS = 9  # and then a pause is beyond the longest anyway
_MOST_REMINDERS = 10  # of which the pause between two of them still doubles: years
_LOOK_AT_CLOCK = 3600.0  # seconds; which local time it is may change by a rule of its own (DST)
_MINUTES = 24 * 60


class State(Enum):
    """What a notice says of its alert."""

    RAISED = "raised"
    REMINDER = "reminder"  # it still lasts
    OVER = "over"
    TEST = "test"


class Stage(Enum):
    """How far one sink has come with one alert."""

    UNTOLD = "untold"
    TOLD = "told"  # that it is raised
    DONE = "done"  # it knows all that there is to know
    LOST = "lost"  # undeliverable


class Now(NamedTuple):
    """This moment: on the steady clock, and in minutes of the local day."""

    at: float
    minute: float = 720.0


@dataclass(frozen=True, slots=True)
class Progress:
    """What one sink was told of one alert. `since`: when the next thing to tell it came up."""

    since: float
    stage: Stage = Stage.UNTOLD
    told_at: float = 0.0  # when it took the last of them that was news to it, and
    sent_at: float = 0.0  # the last of them at all
    reminders: int = 0
    tries: int = 0  # of what is told next, and
    refusals: int = 0  # how many of them were answered with "never", and
    splits: int = 0  # how many were when others were in the same message
    not_before: float = 0.0
    is_doubted: bool = False  # the sink has taken others since the first of these tries

    def told(self, state: State, now: float, *, ends_here: bool) -> Progress:
        """The sink has taken it. `ends_here`: it need not hear that the alert is over."""
        told = replace(self._untried(), sent_at=now)
        if state is State.OVER or ends_here:
            return replace(told, stage=Stage.DONE, told_at=now if self.stage is not Stage.DONE else self.told_at)
        if state is State.REMINDER:
            return replace(told, told_at=now, reminders=self.reminders + 1)
        if self.stage is Stage.TOLD:  # said again to Alertmanager
            return told
        return replace(told, stage=Stage.TOLD, told_at=now)

    def failed(
        self, now: float, dice: float, *, refused: bool, alone: bool = True, longest: float = LONGEST_PAUSE
    ) -> Progress:
        """The sink has not taken it. `refused`: and says that it never will; perhaps because of another, if not `alone`."""
        if refused and self.stage is Stage.LOST:
            longest = LONGEST_PAUSE  # Alertmanager has never known it
        return replace(
            self,
            tries=self.tries + 1,
            refusals=self.refusals + alone if refused else 0,
            splits=self.splits + (refused and not alone),
            not_before=now + pause_after(self.tries - self.splits + 1, dice, longest),
        )

    def soon(self) -> Progress:
        """Nothing speaks against another try any more: the sink may be another by now. Refusals are counted anew."""
        if not self.tries:
            return self
        tries = max(self.tries - self.splits, 1)
        return replace(self, tries=tries, refusals=0, splits=0, not_before=0.0, is_doubted=False)

    def after_another(self, failures: int) -> Progress:
        """The sink has taken another one, after so many failures. More than one: it was the sink, and no notice that it
        cannot take. What it refuses from now on, it refuses for itself.
        """
        if not self.tries:
            return self
        if self.is_doubted:
            return replace(self, not_before=0.0) if failures > 1 else self
        return replace(self.soon() if failures > 1 else replace(self, refusals=0), is_doubted=True)

    def over(self, now: float) -> Progress:
        """The alert is over: that is what there is to tell next, unless its beginning is not told yet."""
        if self.stage is not Stage.TOLD:
            return self
        return replace(self._untried(), since=now)

    def _untried(self) -> Progress:
        return replace(self, tries=0, refusals=0, splits=0, not_before=0.0, is_doubted=False)

    def lost(self) -> Progress:
        """Nobody tries any more; but Alertmanager hears of what is open, as one of those that have failed."""
        return replace(self, stage=Stage.LOST)

    def to_object(self) -> list[Any]:
        """JSON that `from_object` understands. Tries are counted anew by the next process, which tries at once."""
        return [self.stage.value, self.since, self.told_at, self.sent_at, self.reminders]

    @classmethod
    def from_object(cls, value: Any, now: float) -> Self:  # noqa: ANN401 - JSON
        """What `to_object` made; no time in it is later than now. ValueError: it is no such thing."""
        try:
            stage, since, told_at, sent_at, reminders = value
            times = [min(checked_time(each), now) for each in (since, told_at, sent_at)]
            return cls(times[0], Stage(stage), times[1], times[2], max(int(reminders), 0))
        except (TypeError, OverflowError) as error:
            raise ValueError(f"not what a sink was told: {error!r}") from error


@dataclass(frozen=True, slots=True)
class Entry:
    """One alert as one sink sees it. `is_superseded`: the same fault has come again, and waits for this alert's turn."""

    number: int  # orders the alerts of one key
    alert: Alert
    progress: Progress
    is_superseded: bool = False


@dataclass(frozen=True, slots=True)
class Account:
    """How it goes with one sink. `taken`: when it took the notices that its rate limit still counts."""

    failures: int = 0  # one after the other
    failing_since: float | None = None
    not_before: float = 0.0
    taken: tuple[float, ...] = ()
    round_began: float = 0.0  # everything open was, or is being, said again since

    def succeeded(self, now: float, sink: SinkConfig) -> Account:
        """It has taken a message."""
        taken = (*self._counted(now, sink), now) if sink.rate_limit else ()
        return Account(taken=taken, round_began=self.round_began)

    def failed(self, now: float, dice: float, longest: float = LONGEST_PAUSE) -> Account:
        """It has not."""
        return replace(
            self,
            failures=self.failures + 1,
            failing_since=now if self.failing_since is None else self.failing_since,
            not_before=now + pause_after(self.failures + 1, dice, longest),
        )

    def restored(self, failing_since: float | None, taken: Sequence[float], now: float) -> Account:
        """With what a former process knew: since when it had failed, and when it took what a rate limit counts."""
        times = tuple(sorted(min(at, now) for at in taken))
        if failing_since is not None:
            failing_since = min(max(failing_since, now - GIVE_UP_AFTER + TRY_AFRESH_FOR), now)
        return replace(self, failing_since=failing_since, taken=(*times, *self.taken))

    def free_at(self, now: float, sink: SinkConfig) -> float:
        """When its rate limit lets it take another notice."""
        limit, taken = sink.rate_limit, self._counted(now, sink)
        return now if limit is None or len(taken) < limit.count else taken[-limit.count] + limit.per

    def with_round(self, now: float, sink: SinkConfig) -> Account:
        """It is time to say everything again, or not yet."""
        return self if now < self.round_began + sink.resend else replace(self, round_began=now)

    def _counted(self, now: float, sink: SinkConfig) -> tuple[float, ...]:
        limit = sink.rate_limit
        return tuple(at for at in self.taken if at > now - limit.per)[-limit.count :] if limit else ()


class Due(NamedTuple):
    """Something to be told, from when on, and its place in the queue. `is_news`: the sink does not know it yet."""

    entry: Entry
    state: State
    at: float
    is_news: bool = True

    @property
    def place(self) -> tuple[float, int]:
        """What is smaller goes first."""
        progress = self.entry.progress
        since = progress.since if self.state is not State.REMINDER else self.at
        if not self.is_news:
            since = progress.sent_at
        tries = min(progress.tries, _MOST_TRIES)
        return since - _STEP * self.entry.alert.severity.rank + _PER_TRY * tries, self.entry.number


class Plan(NamedTuple):
    """What to tell now, all of it in one message; else when to look again, None: not before something changes.

    `held`: what the rate limit alone keeps from being told now.
    """

    message: tuple[Due, ...] = ()
    next_at: float | None = None
    held: tuple[Due, ...] = ()


def longest_pause(sink: SinkConfig) -> float:
    """Seconds between two tries, at most and on average."""
    return min(sink.resend, LONGEST_PAUSE_OF_SERVICE) if sink.sink is SinkKind.ALERTMANAGER else LONGEST_PAUSE


def pause_after(failures: int, dice: float, longest: float = LONGEST_PAUSE) -> float:
    """Seconds until the next try; `dice`: a random number from 0 to 1."""
    pause = min(FIRST_PAUSE * 2.0 ** min(max(failures - 1, 0), _DOUBLINGS), longest)
    return pause * (1 + JITTER * (2 * dice - 1))


def concerns(alert: Alert, sink: SinkConfig) -> bool:
    """Whether a sink hears of an alert at all. That nothing can be delivered to it is not told to itself."""
    return alert.key != sick_sink_key(sink.name) and sink.wants(alert.kind, alert.severity)


def sick_sink_key(name: str) -> str:
    """Of the alert that alerts cannot be delivered to this sink."""
    return f"daemon/sink/{name}"


def plan(entries: Iterable[Entry], sink: SinkConfig, account: Account, now: Now) -> Plan:
    """What one sink is to be told next. `entries`: for each key those that it has not done with, the oldest first."""
    dues = [due for entry in _heads(entries, sink) if (due := _due(entry, sink, account, now))]
    ready = sorted((due for due in dues if due.at <= now.at), key=lambda due: due.place)
    waits = [due.at for due in dues if due.at > now.at]
    if not ready:
        return Plan(next_at=min(waits, default=None))
    may_go_at = max(account.not_before, account.free_at(now.at, sink))
    if may_go_at > now.at:
        held = tuple(ready) if account.not_before <= now.at else ()
        return Plan(next_at=min([may_go_at, *waits]), held=held)
    if sink.sink is not SinkKind.ALERTMANAGER:
        return Plan((ready[0],))
    return Plan(tuple(_together(ready)))


def _together(ready: Sequence[Due]) -> Sequence[Due]:
    """What goes in one message: news first. What was refused in company goes in half as large a company each time, so that
    the one that cannot be taken is alone in the end.
    """
    if clean := [due for due in ready if not due.entry.progress.tries]:
        return sorted(clean, key=lambda due: not due.is_news)[:MOST_AT_ONCE]
    suspects = sorted(ready, key=lambda due: -due.entry.progress.splits)
    return suspects[: max(MOST_AT_ONCE >> suspects[0].entry.progress.splits, 1)]


def is_waiting(due: Due, now: float) -> bool:
    """It is news that has not been told: nothing for later, and nothing that is merely said again."""
    return due.is_news and (due.state is not State.REMINDER or due.at <= now)


def what_waits(entries: Iterable[Entry], sink: SinkConfig, account: Account, now: Now) -> list[Due]:
    """Of everything that a sink has not been told, what comes first for each alert; also what it may not hear yet."""
    found = (_due(entry, sink, account, now) for entry in entries)
    return [due for due in found if due and is_waiting(due, now.at)]


def is_at_rest(progress: Progress, alert: Alert, sink: SinkConfig) -> bool:
    """Nothing is to be told to this sink until something becomes of the alert; of most alerts, most of the time."""
    if sink.sink is SinkKind.ALERTMANAGER:
        return False
    if progress.stage is Stage.TOLD:
        return sink.reminder is Reminder.ONCE and not alert.is_over
    return progress.stage is not Stage.UNTOLD


def has_done_with(entry: Entry, sink: SinkConfig) -> bool:
    """Nothing new can come of it any more."""
    stage = entry.progress.stage
    if not entry.alert.is_over:
        return False
    return stage in (Stage.DONE, Stage.LOST) or (stage is Stage.TOLD and _ends_when_told(entry.alert, sink))


def owed(progress: Progress, alert: Alert) -> State | None:
    """What a sink has not been told of an alert, whatever it asks for."""
    if progress.stage is Stage.UNTOLD:
        return State.RAISED
    return State.OVER if progress.stage is Stage.TOLD and alert.is_over else None


def is_hopeless(progress: Progress, account: Account, now: float) -> bool:
    """Nobody is to try any more: it was refused often enough by a sink that takes others, or has waited for a day of
    nothing but failures.
    """
    if progress.is_doubted and progress.refusals >= MOST_REFUSALS:
        return True
    if account.failing_since is None:
        return False
    return now - max(progress.since, account.failing_since) >= GIVE_UP_AFTER


def progress_after(entry: Entry, sink: SinkConfig, state: State, now: float) -> Progress:
    """The sink has taken this."""
    progress = entry.progress.told(state, now, ends_here=_ends_when_told(entry.alert, sink))
    return replace(progress, since=now) if progress.stage is Stage.TOLD and entry.alert.is_over else progress


def quiet_for(sink: SinkConfig, alert: Alert, minute: float) -> float:
    """Seconds for which a sink is not to hear of this; not many at once, for the clock on the wall may be set."""
    hours = sink.quiet_hours
    if hours is None or alert.severity is Severity.CRITICAL:
        return 0.0
    lasted = (minute - hours.start) % _MINUTES
    length = (hours.end - hours.start) % _MINUTES
    return min((length - lasted) * 60.0, _LOOK_AT_CLOCK) if lasted < length else 0.0


def _heads(entries: Iterable[Entry], sink: SinkConfig) -> Sequence[Entry]:
    """Without those that wait for an earlier one of the same key."""
    blocked: set[str] = set()
    heads = []
    for entry in entries:
        if entry.alert.key in blocked:
            continue
        if not has_done_with(entry, sink):
            blocked.add(entry.alert.key)
        heads.append(entry)
    return heads


def _ends_when_told(alert: Alert, sink: SinkConfig) -> bool:
    """What has merely happened is told once. For Alertmanager there is no such thing."""
    return alert.kind.is_momentary and sink.sink is not SinkKind.ALERTMANAGER


def _due(entry: Entry, sink: SinkConfig, account: Account, now: Now) -> Due | None:
    """What this sink is to be told of this alert next."""
    is_service = sink.sink is SinkKind.ALERTMANAGER
    due = _due_to_alertmanager(entry, sink, account) if is_service else _due_to_people(entry, sink)
    if due is None:
        return None
    at = max(due.at, entry.progress.not_before)
    if quiet := quiet_for(sink, entry.alert, now.minute):
        at = max(at, now.at + quiet)
    return due._replace(at=at)


def _due_to_people(entry: Entry, sink: SinkConfig) -> Due | None:
    progress = entry.progress
    if progress.stage is Stage.UNTOLD:
        return Due(entry, State.RAISED, progress.since)
    if progress.stage is not Stage.TOLD:
        return None
    if entry.alert.is_over:
        return Due(entry, State.OVER, progress.since)
    match sink.reminder:
        case Reminder.ONCE:
            return None
        case Reminder.DAILY:
            pause = DAY
        case Reminder.DIMINISHING:
            pause = DAY * 2 ** min(progress.reminders, _MOST_REMINDERS)
    return Due(entry, State.REMINDER, progress.told_at + pause)


def _due_to_alertmanager(entry: Entry, sink: SinkConfig, account: Account) -> Due | None:
    progress = entry.progress
    again_at = account.round_began if progress.sent_at < account.round_began else account.round_began + sink.resend
    if progress.stage is Stage.UNTOLD:
        return Due(entry, State.RAISED, progress.since)
    if not entry.alert.is_over:  # also where it was given up: nothing is lost by saying it again
        return Due(entry, State.RAISED, again_at, is_news=False)
    if progress.stage is Stage.TOLD:
        over_at = progress.since if entry.is_superseded else max(progress.since, progress.told_at + LEAST_OPEN)
        if over_at <= again_at:
            return Due(entry, State.OVER, over_at)
        return Due(entry, State.RAISED, again_at, is_news=False)
    if progress.stage is Stage.DONE and not entry.is_superseded and again_at < progress.told_at + RESOLVED_FOR:
        return Due(entry, State.OVER, again_at, is_news=False)
    return None
