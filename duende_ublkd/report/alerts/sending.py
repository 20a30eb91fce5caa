"""The sinks, and what is on its way to them.

Rules:
1. Each sink has one delivery under way at most, and waits for none but its own. What is told next is core/delivery.py's to
   say; here is only kept what has become of it.
2. A test goes before everything else, and past every limit: whoever sends one waits for its answer.
3. What is said of a sink in the journal is said once: that it fails, or takes only a part, and that it does not any more.
4. A sink is its name and where it leads to. One that leads elsewhere by now hears of what is open, as a new one does; what
   its former place has not been told, it is told. What waits for a sink that is no more is undeliverable.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter, deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from duende_ublkd.core import delivery
from duende_ublkd.core.alertconfig import SinkKind
from duende_ublkd.core.alerting import Alert, AlertKind, checked_time
from duende_ublkd.core.delivery import Account, Due, Entry, Now, Progress, Stage, State
from duende_ublkd.core.errors import UsageError
from duende_ublkd.core.model import EventKind, Level
from duende_ublkd.core.text import printable
from duende_ublkd.report.alerts.answer import Answer
from duende_ublkd.report.alerts.book import SINKS
from duende_ublkd.report.objects import alert_object, timestamp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from duende_ublkd.core.alertconfig import SinkConfig
    from duende_ublkd.report.alerts.book import Book, Case
    from duende_ublkd.report.journal import Journal

SICK_AFTER = 120.0  # seconds of failures until a sink is an alert for the others
MOST_TESTS = 4  # that wait for one sink
_MOST_MESSAGE = 48 << 10  # bytes of the notices in one message
_NO_ANSWER_AFTER = 60.0  # seconds beyond twice a sink's time limit: a deliverer has limits of its own
_MOST_UNDELIVERED = 100
_GONE = "not in the configuration any more"
_MOST_TAKEN = 200  # of what a rate limit counts is kept over a restart


class Deliverer(Protocol):
    """Who brings notices to sinks."""

    def configure(self, sinks: Sequence[SinkConfig]) -> None:
        """From now on these."""

    def deliver(self, sink: str, notices: Sequence[Mapping[str, Any]], done: Callable[[Answer], None]) -> None:
        """Never waits, and never raises; `done` is called once, in the loop, and not before this has returned."""


@dataclass(slots=True)
class SinkStats:
    """Of one sink, since the daemon's start. `failed` counts tries, the others notices."""

    delivered: int = 0
    failed: int = 0
    undeliverable: int = 0
    dropped: int = 0
    suppressed: int = 0


@dataclass(frozen=True, slots=True)
class SinkState:
    """How it goes with one sink; times are seconds since the epoch."""

    name: str
    kind: str
    waiting: int
    last_ok_at: float | None
    last_error: str
    next_try_at: float | None
    stats: SinkStats
    missed: str = ""  # which parts of it did not get the last one, though others did

    def to_object(self) -> dict[str, Any]:
        """As JSON values."""
        stats = self.stats
        return {
            "name": self.name,
            "kind": self.kind,
            "waiting": self.waiting,
            "last_ok_at": None if self.last_ok_at is None else timestamp(self.last_ok_at),
            "last_error": self.last_error,
            "missed": self.missed,
            "next_try_at": None if self.next_try_at is None else timestamp(self.next_try_at),
            "delivered": stats.delivered,
            "failed": stats.failed,
            "undeliverable": stats.undeliverable,
            "dropped": stats.dropped,
            "suppressed": stats.suppressed,
        }


class _Flight(NamedTuple):
    """A delivery under way. `tested`: who waits for its answer, and for nothing else."""

    dues: tuple[Due, ...]
    until: float
    tested: asyncio.Future[Answer] | None = None


class _Sink:
    """One sink of the configuration, and how it goes with it."""

    def __init__(self, config: SinkConfig) -> None:
        self.config = config
        self.account = Account()
        self.flight: _Flight | None = None
        self.tests: deque[asyncio.Future[Answer]] = deque()
        self.stats = SinkStats()
        self.last_ok_at: float | None = None
        self.last_error = ""
        self.missed = ""
        self.is_elsewhere = False  # it leads to another place than what it was told before was told to
        self.held: frozenset[tuple[int, State]] = frozenset()  # by the rate limit, and counted

    @property
    def name(self) -> str:
        return self.config.name

    def settle_tests(self, answer: Answer) -> None:
        for tested in (*self.tests, self.flight and self.flight.tested):
            _settle(tested, answer)
        self.tests.clear()


class Sending:
    """Has the sinks told what is in the book."""

    def __init__(
        self,
        book: Book,
        journal: Journal,
        deliverer: Deliverer,
        *,
        save: Callable[[str, object | None], None],
        now: Callable[[], Now],
        clock: Callable[[], float],
        dice: Callable[[], float],
        notice: Callable[[Alert, State, SinkConfig], Mapping[str, Any]],
        wake: Callable[[], None],
        on_sick: Callable[[str, str | None], None],
    ) -> None:
        """`now`: steady; `clock`: as people have it. `notice`: what a sink is told. `wake`: there may be something to do.

        `on_sick(sink, sentence)`: nothing can be delivered to it, and why; None: not so, or not any more.
        """
        self._book = book
        self._journal = journal
        self._deliverer = deliverer
        self._save = save
        self._now = now
        self._clock = clock
        self._dice = dice
        self._notice = notice
        self._wake = wake
        self._on_sick = on_sick
        self._loop = asyncio.get_running_loop()
        self._sinks: dict[str, _Sink] = {}
        self._former: Mapping[str, Any] = {}  # accounts, as they were saved
        self._saved = ""
        self._undelivered: deque[tuple[float, Mapping[str, Any]]] = deque(maxlen=_MOST_UNDELIVERED)

    # --- what there is to see -----------------------------------------------------------------------------------------

    @property
    def stats(self) -> dict[str, SinkStats]:
        """By the sinks' names."""
        return {name: sink.stats for name, sink in self._sinks.items()}

    @property
    def states(self) -> tuple[SinkState, ...]:
        """In the order of the configuration."""
        return tuple(self._state_of(sink) for sink in self._sinks.values())

    @property
    def undelivered(self) -> tuple[Mapping[str, Any], ...]:
        """What was given up within the last day, as JSON values."""
        since = self._now().at - delivery.DAY
        return tuple(shown for at, shown in self._undelivered if at > since)

    def waiting(self) -> list[tuple[str, Due]]:
        """What some sink has not heard."""
        return [(sink.name, due) for sink in self._sinks.values() for due in self._waiting(sink)]

    def _state_of(self, sink: _Sink) -> SinkState:
        account = sink.account
        left = account.not_before - self._now().at
        next_try_at = self._clock() + left if account.failures and sink.flight is None and left > 0 else None
        waiting = len(self._waiting(sink))
        kind = sink.config.sink.value
        return SinkState(
            sink.name, kind, waiting, sink.last_ok_at, sink.last_error, next_try_at, sink.stats, sink.missed
        )

    def _waiting(self, sink: _Sink) -> list[Due]:
        return delivery.what_waits(self._entries(sink), sink.config, sink.account, self._now())

    def _entries(self, sink: _Sink) -> list[Entry]:
        """What this sink may still have to hear of."""
        entries = []
        for case in self._book:
            progress = case.told.get(sink.name)
            if progress is None or delivery.is_at_rest(progress, case.alert, sink.config):
                continue
            is_superseded = self._book.latest(case.alert.key) is not case
            entries.append(Entry(case.number, case.alert, progress, is_superseded))
        return entries

    # --- the configuration ----------------------------------------------------------------------------------------------

    def restore(self, saved: object) -> None:
        """How it went with the sinks of a former daemon. What is known of one by now counts more."""
        self._former = saved if isinstance(saved, dict) else {}
        for sink in self._sinks.values():
            self._take_account(sink, is_late=True)

    def _take_account(self, sink: _Sink, *, is_late: bool) -> None:
        now = self._now().at
        former = self._former.get(sink.name)
        if not isinstance(former, dict):
            return
        if former.get("to", place := _place_of(sink.config)) != place:
            sink.is_elsewhere = True
            return
        try:
            since, taken = former["failing_since"], [checked_time(each) for each in former["taken"]]
            failing_since = None if since is None else checked_time(since)
        except (KeyError, TypeError, ValueError, OverflowError):
            return  # it counts from now on
        if is_late:
            failing_since = sink.account.failing_since
        sink.account = sink.account.restored(failing_since, taken, now)

    def configure(self, sinks: Iterable[SinkConfig]) -> None:
        """From now on these; `fit` is to follow. What is known of one that is no more is forgotten; the others are tried at
        once: somebody may have mended what was wrong with them.
        """
        wanted = {sink.name: sink for sink in sinks}
        for name in self._sinks.keys() - wanted.keys():
            self._sinks[name].settle_tests(Answer(ok=False, permanent=False, detail=f"it is {_GONE}", seconds=0.0))
            self._on_sick(name, None)
        former, self._sinks = self._sinks, {}
        for name, config in wanted.items():
            sink = self._sinks[name] = _at_its_place(former.get(name), config)
            sink.config = config
            sink.account = replace(sink.account, failures=0, not_before=0.0)
            if name not in former:
                self._take_account(sink, is_late=False)
        self._former = {}
        self._deliverer.configure(tuple(wanted.values()))
        self._save_accounts()

    def fit(self) -> None:
        """Have each alert told to the sinks that there are now, and to no other."""
        left: Counter[str] = Counter()
        for case in self._book:
            told = self.told_now(case)
            for name in sorted(case.told.keys() - self._sinks.keys()):
                if owed := delivery.owed(case.told[name], case.alert):
                    left[name] += 1
                    self._show_undelivered(name, case, owed, f"the sink is {_GONE}")
            if told != case.told:
                case.told = told
                self._book.save(case)
        for sink in self._sinks.values():
            sink.is_elsewhere = False
        for name, count in left.items():
            text = f"{printable(name, 60)} is {_GONE}: what waited for it is undeliverable, {count} in number"
            self._journal.note(
                EventKind.ALERT, Level.WARNING, text, state="left", sink=printable(name, 60), count=count
            )

    def told_at_first(self, alert: Alert) -> dict[str, Progress]:
        """Whom a new alert concerns."""
        now = self._now().at
        return {name: Progress(now) for name, sink in self._sinks.items() if delivery.concerns(alert, sink.config)}

    def told_now(self, case: Case) -> dict[str, Progress]:
        """Whom it concerns now. One that has heard of it hears of its end, whatever it asks for by now; what was given up,
        or told to another place, is told again, should it still last.
        """
        told = {}
        anew = {} if case.alert.is_over else self.told_at_first(case.alert)
        for name, sink in self._sinks.items():
            progress = case.told.get(name)
            is_elsewhere = sink.is_elsewhere and progress is not None and progress.stage is Stage.TOLD
            if progress is None or (name in anew and (is_elsewhere or progress.stage is Stage.LOST)):
                progress = anew.get(name)
            elif progress.stage is Stage.UNTOLD and not delivery.concerns(case.alert, sink.config):
                progress = None
            if progress:
                told[name] = progress.soon()
        return told

    def count_dropped(self, told: Iterable[str]) -> None:
        """There was no place for an alert that these were to hear of."""
        for name in told:
            if sink := self._sinks.get(name):
                sink.stats.dropped += 1

    def _save_accounts(self) -> None:
        known = {
            name: {
                "failing_since": sink.account.failing_since,
                "taken": list(sink.account.taken[-_MOST_TAKEN:]),
                "to": _place_of(sink.config),
            }
            for name, sink in self._sinks.items()
            if sink.account.failing_since is not None or sink.account.taken or _place_of(sink.config)
        }
        encoded = json.dumps(known)
        if encoded != self._saved:
            self._saved = encoded
            self._save(SINKS, known or None)

    # --- tests ----------------------------------------------------------------------------------------------------------

    async def test(self, name: str | None) -> list[dict[str, Any]]:
        """Send an alert for trial to one sink, None: to each, and wait for the answers. UsageError: there is none."""
        if not self._sinks:
            raise UsageError(
                "there is no sink for alerts", hint='add one to the configuration: [[alert]] sink = "mail"'
            )
        if name is not None and name not in self._sinks:
            known = ", ".join(self._sinks)
            raise UsageError(f"there is no sink {printable(name, 60)}", hint=f"the sinks are: {known}")
        chosen = list(self._sinks.values()) if name is None else [self._sinks[name]]
        if busy := [sink.name for sink in chosen if len(sink.tests) >= MOST_TESTS]:
            raise UsageError(f"{MOST_TESTS} tests wait for {busy[0]} already", hint="wait for their answers")
        asked: list[tuple[_Sink, asyncio.Future[Answer]]] = [(sink, self._loop.create_future()) for sink in chosen]
        for sink, tested in asked:
            sink.tests.append(tested)
        self._wake()
        answers = await asyncio.gather(*(tested for _, tested in asked))
        return [
            {"sink": sink.name, "ok": answer.ok, "detail": answer.detail, "seconds": round(answer.seconds, 3)}
            for (sink, _), answer in zip(asked, answers, strict=True)
        ]

    def close(self) -> None:
        """Nobody waits any more."""
        for sink in self._sinks.values():
            sink.settle_tests(Answer(ok=False, permanent=False, detail="the daemon ends", seconds=0.0))

    # --- deliveries -----------------------------------------------------------------------------------------------------

    def serve(self) -> float | None:
        """Have each sink told what is due; when the next of it is, None: not before something changes."""
        times = [self._serve(sink) for sink in self._sinks.values()]
        return min((at for at in times if at is not None), default=None)

    def _serve(self, sink: _Sink) -> float | None:
        now = self._now()
        if sink.flight and now.at >= sink.flight.until:
            late = Answer(ok=False, permanent=False, detail="nothing was heard of the delivery", seconds=0.0)
            self._land(sink, sink.flight, late)
        if sink.flight:
            return sink.flight.until
        while sink.tests:
            if not (tested := sink.tests.popleft()).done():
                return self._test(sink, tested, now.at)
        if sink.config.sink is SinkKind.ALERTMANAGER:
            sink.account = sink.account.with_round(now.at, sink.config)
        plan = delivery.plan(self._entries(sink), sink.config, sink.account, now)
        held = frozenset((due.entry.number, due.state) for due in plan.held)
        sink.stats.suppressed += len(held - sink.held)
        sink.held = held
        if not plan.message:
            return plan.next_at
        dues, notices = self._fit(plan.message, sink.config)
        return self._send(sink, _Flight(dues, self._deadline(sink, now.at)), notices)

    def _test(self, sink: _Sink, tested: asyncio.Future[Answer], now: float) -> float:
        text = f"this is a test of {sink.name}, sent by hand; nothing is wrong"
        alert = Alert("daemon/test", AlertKind.TEST, AlertKind.TEST.severity, text, self._clock())
        notice = self._notice(alert, State.TEST, sink.config)
        return self._send(sink, _Flight((), self._deadline(sink, now), tested), [notice])

    def _send(self, sink: _Sink, flight: _Flight, notices: Sequence[Mapping[str, Any]]) -> float:
        sink.flight = flight
        self._deliverer.deliver(sink.name, notices, lambda answer: self._land(sink, flight, answer))
        return flight.until

    def _deadline(self, sink: _Sink, now: float) -> float:
        return now + 2 * sink.config.timeout + _NO_ANSWER_AFTER

    def _fit(self, dues: Sequence[Due], config: SinkConfig) -> tuple[tuple[Due, ...], list[Mapping[str, Any]]]:
        """As many as one message takes, and one at least; the others follow it."""
        notices: list[Mapping[str, Any]] = []
        left = _MOST_MESSAGE
        for due in dues:
            notice = self._notice(due.entry.alert, due.state, config)
            left -= len(json.dumps(notice))
            if left < 0 and notices:
                break
            notices.append(notice)
        return tuple(dues[: len(notices)]), notices

    # --- answers --------------------------------------------------------------------------------------------------------

    def _land(self, sink: _Sink, flight: _Flight, answer: Answer) -> None:
        if sink.flight is not flight or self._sinks.get(sink.name) is not sink:
            return  # nobody waits for it any more
        sink.flight = None
        now = self._now().at
        _settle(flight.tested, answer)
        if answer.ok:
            self._note_taken(sink, flight, answer, now)
        elif flight.tested:
            sink.last_error = printable(answer.detail, 300)
        else:
            self._note_failed(sink, flight, answer, now)
        self._save_accounts()
        self._wake()

    def _note_taken(self, sink: _Sink, flight: _Flight, answer: Answer, now: float) -> None:
        if sink.account.failures > 1:
            self._note_sink(
                Level.INFO, f"alerts are delivered to {sink.name} again", sink, "delivering", sink.last_error
            )
        if sink.account.failures:
            for each in self._book:
                if sink.name in each.told:
                    each.told[sink.name] = each.told[sink.name].after_another(sink.account.failures)
        self._note_missed(sink, answer)
        sink.account = sink.account.succeeded(now, sink.config)
        sink.last_ok_at, sink.last_error = self._clock(), ""
        self._on_sick(sink.name, None)
        for due in flight.dues:
            case = self._book.get(due.entry.number)
            if case is None or sink.name not in case.told:
                continue
            entry = replace(due.entry, alert=case.alert, progress=case.told[sink.name])
            case.told[sink.name] = delivery.progress_after(entry, sink.config, due.state, now)
            if due.is_news:
                sink.stats.delivered += 1
                self._book.save(case)
                self._record(Level.INFO, "delivered", sink, case, due.state)

    def _note_missed(self, sink: _Sink, answer: Answer) -> None:
        """Once until it changes: by the names, since what is said of them may be another each time."""
        if answer.missed == sink.missed:
            return
        sink.missed = answer.missed
        if answer.missed:
            detail = printable(answer.detail, 300)
            text = f"alerts reach only a part of {sink.name}: {detail}"
            self._note_sink(Level.WARNING, text, sink, "missing", detail)
        else:
            self._note_sink(Level.INFO, f"alerts reach all of {sink.name} again", sink, "complete", "")

    def _note_failed(self, sink: _Sink, flight: _Flight, answer: Answer, now: float) -> None:
        sink.last_error = printable(answer.detail, 300)
        sink.stats.failed += 1
        told = [case.told.get(sink.name) for due in flight.dues if (case := self._book.get(due.entry.number))]
        is_no_news = answer.permanent and bool(told) and all(each and each.stage is Stage.LOST for each in told)
        if not is_no_news:
            self._note_trouble(sink, now)
        is_alone = len(flight.dues) == 1
        for due in flight.dues:
            case = self._book.get(due.entry.number)
            if case and sink.name in case.told:
                case.told[sink.name] = case.told[sink.name].failed(
                    now,
                    self._dice(),
                    refused=answer.permanent,
                    alone=is_alone,
                    longest=delivery.longest_pause(sink.config),
                )
        self._give_up(sink, now)
        failing_since = sink.account.failing_since
        if failing_since is not None and now - failing_since >= SICK_AFTER:
            self._tell_sick(sink)

    def _note_trouble(self, sink: _Sink, now: float) -> None:
        """That it fails, which what it has refused for good does not show."""
        if sink.account.failures == 1:  # it may have been the notice; this is the next one, or there is no other
            text = f"alerts cannot be delivered to {sink.name}, and are sent again: {sink.last_error}"
            self._note_sink(Level.WARNING, text, sink, "failing", sink.last_error)
        sink.account = sink.account.failed(now, self._dice(), delivery.longest_pause(sink.config))

    def _give_up(self, sink: _Sink, now: float) -> None:
        """What nobody is to try any more. It is shown, and in the journal, and that is all."""
        for due in self._waiting(sink):
            case = self._book.get(due.entry.number)
            if case is None or not delivery.is_hopeless(due.entry.progress, sink.account, now):
                continue
            case.told[sink.name] = due.entry.progress.lost()
            self._book.save(case)
            sink.stats.undeliverable += 1
            self._show_undelivered(sink.name, case, due.state, sink.last_error)
            self._record(Level.WARNING, "undeliverable", sink, case, due.state)
            self._tell_sick(sink)

    def _show_undelivered(self, sink: str, case: Case, state: State, why: str) -> None:
        shown = {"at": timestamp(self._clock()), "sink": printable(sink, 60), "notice": state.value, "why": why}
        self._undelivered.append((self._now().at, {**alert_object(case.alert), **shown}))

    def _tell_sick(self, sink: _Sink) -> None:
        self._on_sick(sink.name, f"alerts cannot be delivered to {sink.name}: {sink.last_error}")

    def _note_sink(self, level: Level, text: str, sink: _Sink, state: str, why: str) -> None:
        self._journal.note(EventKind.ALERT, level, text, state=state, sink=sink.name, why=why)

    def _record(self, level: Level, word: str, sink: _Sink, case: Case, state: State) -> None:
        alert = case.alert
        what = {State.RAISED: "raised", State.REMINDER: "lasts", State.OVER: "over"}[state]
        why = f": {sink.last_error}" if sink.last_error else f", not to {sink.missed}" if sink.missed else ""
        about = "the daemon" if alert.dev_id is None else f"ublk{alert.dev_id}"
        text = f"alert {alert.kind.value} on {about} ({what}): {word} to {sink.name}{why}"
        facts = {"state": word, "notice": state.value, "sink": sink.name, "key": alert.key, "alert": alert.kind.value}
        tell = self._journal.record if level is Level.INFO else self._journal.note
        tell(EventKind.ALERT, level, text, alert.dev_id, **facts)


def _at_its_place(former: _Sink | None, config: SinkConfig) -> _Sink:
    """The sink that there was, or one that leads elsewhere under its name."""
    if former is None:
        return _Sink(config)
    if _place_of(former.config) == _place_of(config):
        return former
    former.settle_tests(Answer(ok=False, permanent=False, detail="it leads to another place by now", seconds=0.0))
    sink = _Sink(config)
    sink.stats, sink.is_elsewhere = former.stats, True
    return sink


def _place_of(config: SinkConfig) -> str:
    """Where it leads to; a digest, since a webhook's address is often its secret. An Alertmanager at another address hears
    of all that is open with the next resend in any case, and of what is over: it stays the same.
    """
    if config.sink is SinkKind.ALERTMANAGER:
        return ""
    known = json.dumps([config.sink.value, config.url, list(config.to), list(config.command)])
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def _settle(tested: asyncio.Future[Answer] | None, answer: Answer) -> None:
    if tested and not tested.done():
        tested.set_result(answer)
