"""The desk in virtual time: which alerts there are, who hears of them, and what becomes of it all over a restart.

Post is a deliverer whose sinks are well, down, silent or unwilling as the test has it. Real processes, a real journal on a
real disk and real commands are in tests/test_alerts_end_to_end.py.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from duende_ublkd.core import delivery
from duende_ublkd.core.alertconfig import RateLimit, Reminder, SinkConfig, SinkKind
from duende_ublkd.core.alerting import AlertKind, Severity
from duende_ublkd.core.config import Config
from duende_ublkd.core.errors import UsageError
from duende_ublkd.core.holds import Hold
from duende_ublkd.core.model import (
    Action,
    Deed,
    Event,
    EventKind,
    Identity,
    Judged,
    Level,
    Outcome,
    PassReport,
    VerdictKind,
)
from duende_ublkd.parts import Reporters
from duende_ublkd.report.alerts import book, sending
from duende_ublkd.report.alerts.answer import Answer
from duende_ublkd.report.alerts.desk import MOST_FACTS, Desk
from duende_ublkd.report.journal import Journal
from duende_ublkd.report.store import MOST_STATE, size_in_batch
from tests.bench import MOUNT, RESYNC, Bench, on_the_bench, recovering
from tests.fake_kernel import FakeCommand, run
from tests.test_report import a_device

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence


WEBHOOK = SinkConfig(SinkKind.WEBHOOK, "hook", severity=Severity.INFO, url="http://127.0.0.1:1")
MAIL = SinkConfig(SinkKind.MAIL, "mail", severity=Severity.INFO)
ALERTMANAGER = SinkConfig(SinkKind.ALERTMANAGER, "am", severity=Severity.INFO, url="http://127.0.0.1:9093")
DOWN = Answer(ok=False, permanent=False, detail="connection refused", seconds=0.0)
REFUSED = Answer(ok=False, permanent=True, detail="400 Bad Request", seconds=0.0)
LATENCY = 0.2


@dataclass(frozen=True)
class Taken:
    """A notice that a sink has taken."""

    at: float
    sink: str
    key: str
    state: str
    raised_at: str


class Post:
    """A deliverer. `answers`: what a sink answers; None: nothing, ever. Without an entry it takes everything."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.sinks: list[str] = []
        self.answers: dict[str, Answer | None] = {}
        self.unwanted: set[str] = set()  # keys that every sink refuses
        self.taken: list[Taken] = []
        self.tries: Counter[str] = Counter()
        self.messages: list[list[dict[str, Any]]] = []
        self.under_way: Counter[str] = Counter()
        self._timers: list[asyncio.TimerHandle] = []

    def configure(self, sinks: Sequence[SinkConfig]) -> None:
        self.sinks = [sink.name for sink in sinks]

    def deliver(self, sink: str, notices: Sequence[Mapping[str, Any]], done: Callable[[Answer], None]) -> None:
        self.tries[sink] += 1
        self.under_way[sink] += 1
        assert self.under_way[sink] == 1, f"two deliveries to {sink} at once"
        assert notices
        self.messages.append(json.loads(json.dumps(notices)))
        answer = self.answers.get(sink, Answer(ok=True, permanent=False, detail="", seconds=LATENCY))
        if answer and any(notice["key"] in self.unwanted for notice in notices):
            answer = REFUSED
        if answer is None:
            self.under_way[sink] -= 1  # it is given up by whoever asked
            return
        if answer.ok:
            self.taken += [
                Taken(self.loop.time(), sink, notice["key"], notice["state"], notice["raised_at"]) for notice in notices
            ]
        self._timers.append(self.loop.call_later(LATENCY, self._answer, sink, answer, done))

    def _answer(self, sink: str, answer: Answer, done: Callable[[Answer], None]) -> None:
        self.under_way[sink] -= 1
        done(answer)

    def cut(self) -> None:
        """The daemon is killed: nobody hears the answers."""
        for timer in self._timers:
            timer.cancel()
        self.under_way.clear()

    def told(self, sink: str = "hook") -> list[tuple[str, str]]:
        return [(each.key, each.state) for each in self.taken if each.sink == sink]

    def states(self, sink: str = "hook") -> list[str]:
        return [each.state for each in self.taken if each.sink == sink]


class Bureau:
    """A desk, and one after the other in its place. What they save is all that the next one gets."""

    def __init__(self, *sinks: SinkConfig) -> None:
        self.post = Post()
        self.saved: dict[str, str] = {}
        self.events: list[Event] = []
        self.sinks = sinks
        self.boot_id = "this boot"
        self.minute = 720.0
        self.devices: dict[int, Judged] = {}
        self.desk = self._a_desk()
        self.desk.configure(sinks)

    def _a_desk(self) -> Desk:
        return Desk(
            Journal(self.events.append),
            self._save,
            self.post,
            boot_id=self.boot_id,
            clock=asyncio.get_running_loop().time,
            dice=lambda: 0.5,
            minute_of_day=lambda: self.minute,
        )

    def _save(self, key: str, value: object | None) -> None:
        if value is None:
            self.saved.pop(key, None)
        else:
            self.saved[key] = json.dumps(value)

    def restart(self, *sinks: SinkConfig, forgetful: bool = False) -> None:
        """Killed, and started anew."""
        self.desk.close()
        self.post.cut()
        self.desk = self._a_desk()
        if not forgetful:
            self.desk.restore({key: json.loads(value) for key, value in self.saved.items()})
        self.desk.configure(sinks or self.sinks)

    def look(self, *devices: Judged, full: bool = True, **more: Any) -> None:  # noqa: ANN401 - of a report
        self.devices = {device.seen.dev_id: device for device in devices}
        changed = () if full else devices
        self.desk.passed(PassReport(0.0, 0.01, full, changed=changed, devices=self.devices, **more))

    @property
    def keys(self) -> list[str]:
        return [alert.key for alert in self.desk.alerts]

    def journal(self, state: str) -> list[Event]:
        return [event for event in self.events if event.kind is EventKind.ALERT and event.facts["state"] == state]


def with_bureau(*sinks: SinkConfig) -> Callable[[Callable[[Bureau], Coroutine[Any, Any, None]]], Callable[[], None]]:
    """A test in virtual time."""

    def decorate(story: Callable[[Bureau], Coroutine[Any, Any, None]]) -> Callable[[], None]:
        async def main() -> None:
            unhandled: list[str] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(str(context)))
            bureau = Bureau(*sinks)
            await story(bureau)
            bureau.desk.close()
            assert unhandled == []

        def test() -> None:
            run(main())

        test.__name__, test.__doc__ = story.__name__, story.__doc__
        return test

    return decorate


def pinned(dev_id: int = 3, **seen: Any) -> Judged:  # noqa: ANN401 - of an observation
    return a_device(dev_id, kind=VerdictKind.PINNED, reason="held by mount /srv", **seen)


def closing(dev_id: int = 3) -> Judged:
    return a_device(dev_id, kind=VerdictKind.CLOSING, reason="on its way")


def judged(kind: VerdictKind, action: Action, rule: str = "", dev_id: int = 3) -> Judged:
    device = a_device(dev_id, kind=kind, reason=rule or kind.value)
    return replace(device, verdict=replace(device.verdict, action=action, rule=rule))


WEDGED = judged(VerdictKind.WEDGED, Action.ALERT, "overdue")
LATE = judged(VerdictKind.UNSERVED, Action.ALERT, "deadline-over")
GIVEN_UP = judged(VerdictKind.UNSERVED, Action.ALERT, "given-up")
RECOVERING = judged(VerdictKind.RECOVERING, Action.NONE, "recovery-runs")
LIVE = a_device()


# --- one fault is one alert -------------------------------------------------------------------------------------------


@with_bureau(WEBHOOK)
async def test_a_fault_is_raised_once_and_over_once_however_often_it_is_looked_at(bureau: Bureau) -> None:
    for age in range(20):
        bureau.look(replace(WEDGED, verdict=replace(WEDGED.verdict, reason=f"no answer for {age} s")))
        await asyncio.sleep(5)
    assert bureau.post.told() == [("ublk3/1003/wedged", "raised")]
    (alert,) = bureau.desk.alerts
    assert "no answer for 19 s" in alert.summary
    bureau.look(LIVE)
    await asyncio.sleep(book.HOLD_DOWN + 1)
    assert bureau.post.states() == ["raised", "over"]
    assert bureau.desk.alerts == ()
    assert [len(bureau.journal(state)) for state in ("raised", "delivered", "over")] == [1, 2, 1]
    (raised,) = bureau.journal("raised")
    assert (raised.dev_id, raised.facts["verdict"], raised.facts["severity"]) == (3, "wedged", "critical")
    assert "what it takes: " in raised.text


@with_bureau(WEBHOOK)
async def test_a_device_that_flips_every_half_minute_is_told_of_a_few_times_and_then_no_more(bureau: Bureau) -> None:
    for _ in range(120):
        bureau.look(pinned(), full=False)
        await asyncio.sleep(30)
        bureau.look(closing(), full=False)
        await asyncio.sleep(30)
    assert len(bureau.post.taken) <= 8
    assert len(bureau.journal("raised")) <= 4
    assert bureau.keys == ["ublk3/1003/pinned"]
    bureau.look(LIVE)
    await asyncio.sleep(book.LONGEST_HOLD_DOWN)
    assert bureau.post.states()[-1] == "over"


@with_bureau(WEBHOOK)
async def test_what_is_seen_for_a_moment_only_calls_nobody(bureau: Bureau) -> None:
    """udev reads a disk that is going away, and holds it for some milliseconds."""
    bureau.look(pinned(), full=False)
    await asyncio.sleep(1)
    bureau.look(closing(), full=False)
    await asyncio.sleep(60)
    assert (bureau.keys, bureau.post.taken, bureau.journal("raised")) == ([], [], [])
    bureau.look(pinned(), full=False)
    await asyncio.sleep(AlertKind.PINNED.settles_in + 1)
    assert bureau.post.states() == ["raised"]


@with_bureau(WEBHOOK)
async def test_a_device_that_is_not_served_is_one_alert_at_a_time_and_stays_one_while_it_is_recovered(
    bureau: Bureau,
) -> None:
    bureau.look(LATE)
    await asyncio.sleep(1)
    bureau.look(RECOVERING)
    await asyncio.sleep(60)
    bureau.look(judged(VerdictKind.UNSERVED, Action.NONE, "backoff"))
    await asyncio.sleep(60)
    assert bureau.keys == ["ublk3/1003/unserved"]
    bureau.look(GIVEN_UP)
    await asyncio.sleep(1)
    assert bureau.keys == ["ublk3/1003/recovery-given-up"]
    bureau.look(LATE)
    await asyncio.sleep(60)
    assert bureau.post.told() == [
        ("ublk3/1003/unserved", "raised"),
        ("ublk3/1003/unserved", "over"),
        ("ublk3/1003/recovery-given-up", "raised"),
    ]


@with_bureau(WEBHOOK)
async def test_what_is_gone_is_over_at_once_and_another_device_of_its_id_is_another_fault(bureau: Bureau) -> None:
    bureau.look(WEDGED)
    await asyncio.sleep(1)
    another = replace(WEDGED, seen=replace(WEDGED.seen, identity=Identity(9999)))
    bureau.look(another, full=False)
    await asyncio.sleep(1)
    assert bureau.keys == ["ublk3/9999/wedged"]
    bureau.look(full=False, gone=(another,))
    await asyncio.sleep(1)
    assert bureau.keys == []
    assert bureau.post.told() == [
        ("ublk3/1003/wedged", "raised"),
        ("ublk3/1003/wedged", "over"),
        ("ublk3/9999/wedged", "raised"),
        ("ublk3/9999/wedged", "over"),
    ]


@with_bureau(WEBHOOK)
async def test_a_hold_keeps_new_alerts_away_and_ends_none(bureau: Bureau) -> None:
    hold = Hold(3, 0.0, 1e9, 0)
    on_hold = replace(pinned(), hold=hold)
    on_hold = replace(on_hold, verdict=replace(on_hold.verdict, action=Action.NONE, rule="on-hold"))
    bureau.look(on_hold)
    await asyncio.sleep(60)
    assert bureau.keys == []
    bureau.look(pinned())
    await asyncio.sleep(60)
    bureau.look(on_hold)
    await asyncio.sleep(60)
    assert bureau.post.states() == ["raised"]
    assert bureau.keys == ["ublk3/1003/pinned"]


@with_bureau(WEBHOOK)
async def test_a_fault_is_not_over_because_nothing_can_be_seen_of_its_device_any_more(bureau: Bureau) -> None:
    bureau.look(LATE)
    await asyncio.sleep(60)
    before = bureau.desk.alerts[0].summary
    for _ in range(3):
        bureau.look(judged(VerdictKind.UNKNOWN, Action.ALERT, "no-answer"))
        await asyncio.sleep(60)
    assert bureau.post.told() == [("ublk3/1003/unserved", "raised"), ("ublk3/1003/unknown", "raised")]
    assert bureau.desk.alerts[0].summary == before
    assert "no-answer" in bureau.desk.alerts[1].summary
    bureau.look(LATE)
    await asyncio.sleep(60)
    assert bureau.keys == ["ublk3/1003/unserved"]
    bureau.look(judged(VerdictKind.UNKNOWN, Action.ALERT, "no-answer"))
    await asyncio.sleep(60)
    bureau.look(LIVE)
    await asyncio.sleep(60)
    assert bureau.keys == []


# --- deeds and the daemon itself --------------------------------------------------------------------------------------


@with_bureau(WEBHOOK, ALERTMANAGER)
async def test_an_orphan_that_is_deleted_is_told_of_once(bureau: Bureau) -> None:
    orphan = judged(VerdictKind.ORPHANED, Action.DELETE)
    deed = Deed(3, Action.DELETE, Outcome.DELETED, "", 0.003, 0.5)
    bureau.desk.passed(PassReport(0.0, 0.01, full=False, gone=(orphan,), deeds=(deed,)))
    await asyncio.sleep(1)
    assert bureau.desk.alerts == ()
    assert bureau.post.told() == [("ublk3/1003/cleaned", "raised")]
    await asyncio.sleep(600)
    assert bureau.post.states() == ["raised"]
    states = bureau.post.states("am")
    assert states[0] == "raised"
    assert states[-1] == "over"


@with_bureau(WEBHOOK)
async def test_a_recovery_that_failed_is_told_of_and_the_last_one_only_as_given_up(bureau: Bureau) -> None:
    bureau.look(RECOVERING)
    for attempt in (1, 2):
        deed = Deed(3, Action.RECOVER, None, "exited with 1", 1.0, facts={"attempt": attempt, "attempts": 2})
        bureau.desk.passed(PassReport(0.0, 1.0, full=False, deeds=(deed,), devices=bureau.devices))
        await asyncio.sleep(5)
        assert bureau.keys == ["ublk3/1003/recovery-failed"]
    assert "attempt 1 of 2: exited with 1" in bureau.desk.alerts[0].summary
    bureau.look(GIVEN_UP)
    await asyncio.sleep(5)
    assert bureau.keys == ["ublk3/1003/recovery-given-up"]
    assert bureau.post.told()[0] == ("ublk3/1003/recovery-failed", "raised")


@with_bureau(WEBHOOK)
async def test_a_driver_that_is_gone_is_an_alert_until_it_answers(bureau: Bureau) -> None:
    for _ in range(3):
        bureau.look(trouble="no ublk driver", hint="modprobe ublk_drv")
        await asyncio.sleep(30)
    assert [(alert.key, alert.kind) for alert in bureau.desk.alerts] == [("daemon/driver", AlertKind.DRIVER_MISSING)]
    assert "modprobe ublk_drv" in bureau.desk.alerts[0].summary
    bureau.look()
    await asyncio.sleep(30)
    assert bureau.post.states() == ["raised", "over"]


@with_bureau(WEBHOOK)
async def test_devices_that_nobody_could_look_at_are_not_well(bureau: Bureau) -> None:
    bureau.look(WEDGED)
    await asyncio.sleep(1)
    bureau.restart()
    for _ in range(3):
        bureau.look(trouble="Too many open files")
        await asyncio.sleep(60)
    assert bureau.keys == ["ublk3/1003/wedged", "daemon/driver"]


@with_bureau(WEBHOOK)
async def test_each_cause_of_being_degraded_is_an_alert_of_its_own(bureau: Bureau) -> None:
    bureau.desk.degraded("journal", "the journal's disk does not answer")
    bureau.desk.degraded("memory", "memory cannot be locked")
    bureau.desk.degraded("journal", "the journal's writer ended")
    bureau.desk.degraded("holds", None)
    await asyncio.sleep(1)
    assert bureau.keys == ["daemon/journal", "daemon/memory"]
    bureau.desk.degraded("journal", None)
    await asyncio.sleep(30)
    assert bureau.keys == ["daemon/memory"]


# --- a sink in trouble ------------------------------------------------------------------------------------------------


@with_bureau(WEBHOOK, MAIL, ALERTMANAGER)
async def test_a_dead_sink_delays_nobody_and_gets_everything_once_it_is_back(bureau: Bureau) -> None:
    bureau.post.answers = {"mail": DOWN, "am": None}
    for number in range(20):
        bureau.desk.degraded(f"cause-{number}", "amiss")
    await asyncio.sleep(60)
    assert len(bureau.post.told("hook")) == 20
    assert bureau.post.told("mail") == []
    assert 5 <= bureau.post.tries["mail"] <= 8
    assert bureau.post.tries["am"] == 1
    states = {state.name: state for state in bureau.desk.sinks}
    assert (states["hook"].waiting, states["mail"].waiting, states["mail"].last_error) == (0, 20, "connection refused")
    assert states["mail"].next_try_at
    assert bureau.desk.queue_length == 40
    bureau.post.answers = {"am": None}
    await asyncio.sleep(60)
    assert sorted(bureau.post.told("mail")) == sorted(bureau.post.told("hook"))
    said = [event.facts["state"] for event in bureau.events if event.facts.get("sink") == "mail"]
    assert said == ["failing", "delivering", *["delivered"] * 20]
    bureau.post.answers = {}
    await asyncio.sleep(120)  # nothing was heard of what it was asked; it is asked again
    assert sorted(set(bureau.post.told("am"))) == sorted(bureau.post.told("hook"))
    assert bureau.desk.queue_length == 0


@with_bureau(WEBHOOK)
async def test_an_answer_that_comes_when_nobody_waits_for_it_any_more_says_nothing(bureau: Bureau) -> None:
    asked: list[Callable[[Answer], None]] = []
    bureau.post.deliver = lambda _sink, _notices, done: asked.append(done)  # type: ignore[method-assign, assignment]
    bureau.desk.degraded("journal", "amiss")
    await asyncio.sleep(120)
    assert len(asked) == 2  # it is given up, and asked again
    asked[0](Answer(ok=True, permanent=False, detail="", seconds=100.0))
    await asyncio.sleep(1)
    assert (bureau.desk.stats["hook"].delivered, bureau.desk.queue_length, len(asked)) == (0, 1, 2)
    asked[1](Answer(ok=True, permanent=False, detail="", seconds=1.0))
    await asyncio.sleep(1)
    assert (bureau.desk.stats["hook"].delivered, bureau.desk.queue_length, len(asked)) == (1, 0, 2)


@with_bureau(WEBHOOK, MAIL)
async def test_a_sink_that_stays_dead_is_an_alert_for_the_others_and_not_for_itself(bureau: Bureau) -> None:
    bureau.post.answers = {"mail": DOWN, "hook": DOWN}
    bureau.desk.degraded("journal", "amiss")
    await asyncio.sleep(600)
    assert bureau.keys == ["daemon/journal", "daemon/sink/hook", "daemon/sink/mail"]
    bureau.post.answers = {"mail": DOWN}
    await asyncio.sleep(600)
    assert sorted(bureau.post.told("hook")) == [("daemon/journal", "raised"), ("daemon/sink/mail", "raised")]
    assert bureau.keys == ["daemon/journal", "daemon/sink/mail"]
    bureau.post.answers = {}
    await asyncio.sleep(600)
    assert bureau.keys == ["daemon/journal"]
    assert bureau.post.told("hook")[-1] == ("daemon/sink/mail", "over")
    assert ("daemon/sink/mail", "raised") not in bureau.post.told("mail")


@with_bureau(WEBHOOK)
async def test_the_open_ones_are_shown_the_oldest_first_also_after_a_restart(bureau: Bureau) -> None:
    for cause in ("first", "second", "third"):
        bureau.desk.degraded(cause, "amiss")
        await asyncio.sleep(5)
    bureau.restart()
    assert bureau.keys == ["daemon/first", "daemon/second", "daemon/third"]


@with_bureau(WEBHOOK)
async def test_what_is_refused_is_given_up_soon_and_shown_and_the_rest_is_told(bureau: Bureau) -> None:
    bureau.post.unwanted = {"daemon/bad"}
    bureau.desk.degraded("bad", "amiss")
    bureau.desk.degraded("good", "amiss")
    await asyncio.sleep(120)
    assert bureau.post.told() == [("daemon/good", "raised")]
    assert bureau.desk.stats["hook"].undeliverable == 1
    (given_up,) = bureau.desk.undelivered
    assert (given_up["key"], given_up["sink"], given_up["why"]) == ("daemon/bad", "hook", "400 Bad Request")
    (event,) = bureau.journal("undeliverable")
    assert event.facts["sink"] == "hook"
    assert bureau.desk.queue_length == 0
    bureau.desk.degraded("bad", None)
    await asyncio.sleep(120)
    assert ("daemon/bad", "over") not in bureau.post.told()  # it never heard that it was raised
    await asyncio.sleep(delivery.DAY)
    assert bureau.desk.undelivered == ()


@with_bureau(ALERTMANAGER)
async def test_one_alert_that_alertmanager_refuses_does_not_keep_it_from_the_others(bureau: Bureau) -> None:
    bureau.post.unwanted = {"daemon/cause-17"}
    for number in range(60):
        bureau.desk.degraded(f"cause-{number}", "amiss")
    await asyncio.sleep(900)
    assert len({key for key, _ in bureau.post.told("am")}) == 59
    assert [each["key"] for each in bureau.desk.undelivered] == ["daemon/cause-17"]
    last = {each.key: each.at for each in bureau.post.taken}
    assert min(last.values()) >= asyncio.get_running_loop().time() - 3 * ALERTMANAGER.resend


@with_bureau(WEBHOOK)
async def test_a_sink_that_refuses_everything_for_a_while_gets_it_all_the_same(bureau: Bureau) -> None:
    """Its password is being changed."""
    bureau.post.answers = {"hook": REFUSED}
    bureau.look(WEDGED)
    bureau.desk.degraded("journal", "amiss")
    await asyncio.sleep(3 * 3600)
    assert bureau.desk.stats["hook"].undeliverable == 0
    bureau.post.answers = {}
    await asyncio.sleep(400)
    assert sorted(bureau.post.told()) == [("daemon/journal", "raised"), ("ublk3/1003/wedged", "raised")]
    assert bureau.desk.undelivered == ()


@pytest.mark.parametrize("seconds", [60, 100, 900, 7200])
def test_what_lasts_is_told_to_alertmanager_again_after_it_has_refused_everything_for_a_while(seconds: float) -> None:
    async def story() -> None:
        bureau = Bureau(ALERTMANAGER)
        bureau.look(WEDGED, replace(LATE, seen=replace(LATE.seen, dev_id=4, identity=Identity(44))))
        await asyncio.sleep(300)
        bureau.post.answers = {"am": REFUSED}
        await asyncio.sleep(seconds)
        bureau.post.answers = {}
        bureau.post.taken.clear()
        await asyncio.sleep(80)
        assert sorted(set(bureau.post.told("am"))) == [("ublk3/1003/wedged", "raised"), ("ublk4/44/unserved", "raised")]
        await asyncio.sleep(3600)
        assert bureau.post.taken[-1].at >= asyncio.get_running_loop().time() - ALERTMANAGER.resend - 1
        assert bureau.desk.stats["am"].undeliverable == 0
        bureau.desk.close()

    run(story())


@with_bureau(ALERTMANAGER)
async def test_an_alert_that_lasts_does_not_end_for_alertmanager_over_a_short_outage(bureau: Bureau) -> None:
    bureau.look(WEDGED)
    await asyncio.sleep(301)
    for seconds in (70, 130, 150, 200):
        bureau.post.answers = {"am": DOWN}
        await asyncio.sleep(seconds)
        bureau.post.answers = {}
        await asyncio.sleep(600)
    times = [each.at for each in bureau.post.taken]
    gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
    assert 200 < max(gaps) < 300  # it ends by itself after 300 s


@with_bureau(ALERTMANAGER)
async def test_what_alertmanager_will_not_take_is_offered_to_it_now_and_then_and_is_no_noise(bureau: Bureau) -> None:
    bureau.post.unwanted = {"daemon/bad", "daemon/worse"}
    for cause in ("good", "bad", "worse"):
        bureau.desk.degraded(cause, "amiss")
    await asyncio.sleep(3600)
    assert bureau.desk.stats["am"].undeliverable == 2
    bureau.events.clear()
    tries = bureau.post.tries["am"]
    await asyncio.sleep(3600)
    assert 60 + 2 * 10 <= bureau.post.tries["am"] - tries <= 60 + 2 * 16
    assert bureau.events == []
    bureau.post.unwanted = set()
    await asyncio.sleep(400)
    assert {key for key, _ in bureau.post.told("am")} == {"daemon/bad", "daemon/good", "daemon/worse"}


@with_bureau(WEBHOOK)
async def test_what_nobody_takes_for_a_day_is_given_up_also_across_restarts(bureau: Bureau) -> None:
    bureau.post.answers = {"hook": DOWN}
    bureau.desk.degraded("journal", "amiss")
    for _ in range(3):
        await asyncio.sleep(delivery.DAY / 3 - 60)
        assert bureau.desk.stats["hook"].undeliverable == 0
        bureau.restart()
        bureau.desk.degraded("journal", "amiss")
    await asyncio.sleep(delivery.TRY_AFRESH_FOR - 300)
    assert bureau.desk.stats["hook"].undeliverable == 0
    await asyncio.sleep(900)
    assert bureau.desk.stats["hook"].undeliverable == 1
    tries = bureau.post.tries["hook"]
    assert 24 * 3600 / 300 - 10 <= tries <= 25 * 3600 / 300 + 60


@with_bureau(replace(WEBHOOK, rate_limit=RateLimit(5, 60.0)), MAIL)
async def test_a_rate_limit_spreads_a_storm_and_the_critical_ones_are_first(bureau: Bureau) -> None:
    bureau.look(*(pinned(dev_id) for dev_id in range(20)), replace(WEDGED, seen=replace(WEDGED.seen, dev_id=20)))
    await asyncio.sleep(4)
    await asyncio.sleep(50)
    assert len(bureau.post.told("mail")) == 21
    assert len(bureau.post.told("hook")) == 5
    assert bureau.post.told("hook")[0][0].endswith("/wedged")
    assert bureau.desk.stats["hook"].suppressed == 16
    await asyncio.sleep(4 * 60)
    assert len(bureau.post.told("hook")) == 21


@with_bureau(replace(WEBHOOK, rate_limit=RateLimit(30, 3600.0)))
async def test_a_critical_alert_does_not_wait_behind_what_a_rate_limit_has_kept_for_hours(bureau: Bureau) -> None:
    many = [pinned(dev_id) for dev_id in range(200)]
    bureau.look(*many)
    await asyncio.sleep(3 * 3600 + 60)
    bureau.look(*many, replace(WEDGED, seen=replace(WEDGED.seen, dev_id=900)))
    await asyncio.sleep(3600)
    waited = next(each.at for each in bureau.post.taken if each.key.endswith("wedged"))
    assert asyncio.get_running_loop().time() - waited <= 3600
    assert bureau.desk.queue_length > 0


@with_bureau(WEBHOOK)
async def test_a_sink_that_takes_only_a_part_is_said_once_until_it_changes_and_is_seen(bureau: Bureau) -> None:
    async def one(cause: str, answer: Answer) -> None:
        bureau.post.answers = {"hook": answer}
        bureau.desk.degraded(cause, "amiss")
        await asyncio.sleep(1)

    whole = Answer(ok=True, permanent=False, detail="taken by a, b", seconds=0.1)
    await one("first", replace(whole, detail="taken by a; not for b (550 no such user, id 1)", missed="b"))
    await one("second", replace(whole, detail="taken by a; not for b (550 no such user, id 2)", missed="b"))
    (state,) = bureau.desk.sinks
    assert (state.missed, state.last_error, state.waiting) == ("b", "", 0)
    assert state.to_object()["missed"] == "b"
    (said,) = bureau.journal("missing")
    assert (said.level, said.facts["sink"]) == (Level.WARNING, "hook")
    assert "550 no such user, id 1" in said.text
    assert "delivered to hook, not to b" in bureau.journal("delivered")[0].text
    await one("third", replace(whole, missed="b, c"))
    assert len(bureau.journal("missing")) == 2
    await one("fourth", whole)
    await one("fifth", whole)
    assert bureau.desk.sinks[0].missed == ""
    assert [event.level for event in bureau.journal("complete")] == [Level.INFO]


@with_bureau(replace(MAIL, reminder=Reminder.DAILY))
async def test_what_lasts_is_told_of_again_also_across_a_restart(bureau: Bureau) -> None:
    bureau.look(WEDGED)
    await asyncio.sleep(delivery.DAY / 2)
    bureau.restart()
    bureau.look(WEDGED)
    await asyncio.sleep(delivery.DAY * 2)
    assert bureau.post.states("mail") == ["raised", "reminder", "reminder"]


@with_bureau(ALERTMANAGER)
async def test_alertmanager_hears_of_what_is_open_again_and_again_and_of_what_is_over_for_a_while(
    bureau: Bureau,
) -> None:
    for number in range(100):
        bureau.desk.degraded(f"cause-{number}", "amiss and " * 60)
    await asyncio.sleep(600)
    counts = Counter(key for key, _ in bureau.post.told("am"))
    assert set(counts.values()) <= {10, 11}
    assert len(counts) == 100
    assert max(len(json.dumps(message)) for message in bureau.post.messages) < (48 << 10) + 200
    for number in range(100):
        bureau.desk.degraded(f"cause-{number}", None)
    await asyncio.sleep(60)
    bureau.post.taken.clear()
    await asyncio.sleep(3600)
    assert set(bureau.post.states("am")) == {"over"}
    assert 13 <= Counter(key for key, _ in bureau.post.told("am"))["daemon/cause-7"] <= 16
    assert max(each.at for each in bureau.post.taken) <= asyncio.get_running_loop().time() - 3600 + 950
    assert bureau.saved == {}
    kept = bureau.desk._book
    assert (len(kept), kept._bytes, kept._open, kept._latest, kept._of_device) == (0, 0, {}, {}, {})


# --- restarts ---------------------------------------------------------------------------------------------------------


@with_bureau(WEBHOOK, MAIL)
async def test_a_daemon_that_is_killed_between_raising_and_telling_tells_when_it_is_back(bureau: Bureau) -> None:
    bureau.look(WEDGED)  # nothing is sent yet
    bureau.restart()
    await asyncio.sleep(1)
    assert bureau.post.told("hook") == bureau.post.told("mail") == [("ublk3/1003/wedged", "raised")]


@with_bureau(WEBHOOK)
async def test_a_delivery_that_nobody_knows_the_end_of_is_made_again_and_one_that_is_known_is_not(
    bureau: Bureau,
) -> None:
    bureau.look(WEDGED)
    await asyncio.sleep(LATENCY / 2)
    bureau.restart()
    await asyncio.sleep(1)
    assert bureau.post.states() == ["raised", "raised"]
    for _ in range(5):
        bureau.restart()
        bureau.look(WEDGED)
        await asyncio.sleep(60)
    assert bureau.post.states() == ["raised", "raised"]
    assert len(bureau.journal("raised")) == 1


@with_bureau(WEBHOOK)
async def test_what_a_new_daemon_does_not_find_any_more_is_over(bureau: Bureau) -> None:
    bureau.look(WEDGED, replace(LATE, seen=replace(LATE.seen, dev_id=4, identity=Identity(44))))
    bureau.desk.degraded("memory", "amiss")
    await asyncio.sleep(5)
    bureau.restart()
    await asyncio.sleep(60)
    assert len(bureau.keys) == 3  # until it has looked
    bureau.look(WEDGED)
    await asyncio.sleep(60)
    assert bureau.keys == ["ublk3/1003/wedged"]
    assert sorted(bureau.post.states()) == ["over", "over", "raised", "raised", "raised"]


@with_bureau(WEBHOOK)
async def test_a_device_that_is_deleted_and_held_is_the_same_fault_for_a_daemon_that_cannot_tell_which_it_was(
    bureau: Bureau,
) -> None:
    bureau.look(pinned())
    await asyncio.sleep(5)
    bureau.restart()
    nameless = pinned(identity=Identity(None))
    for _ in range(5):
        bureau.look(nameless)
        await asyncio.sleep(30)
    assert bureau.keys == ["ublk3/1003/pinned"]
    assert bureau.post.states() == ["raised"]


@with_bureau(WEBHOOK)
async def test_what_was_open_in_a_former_boot_is_over_and_is_told_so(bureau: Bureau) -> None:
    bureau.look(WEDGED)
    await asyncio.sleep(5)
    bureau.boot_id = "another boot"
    bureau.restart()
    await asyncio.sleep(5)
    assert bureau.keys == []
    assert bureau.post.states() == ["raised", "over"]


@with_bureau(WEBHOOK)
async def test_where_nothing_can_be_read_it_is_told_again_and_gone_on_with_when_it_can(bureau: Bureau) -> None:
    bureau.look(WEDGED)
    await asyncio.sleep(5)
    bureau.post.answers = {"hook": DOWN}
    deed = Deed(7, Action.DELETE, Outcome.DELETED, "", 0.003)
    bureau.desk.passed(PassReport(0.0, 0.0, full=False, gone=(closing(7),), deeds=(deed,), devices=bureau.devices))
    await asyncio.sleep(5)
    bureau.post.answers = {}
    saved = {key: json.loads(value) for key, value in bureau.saved.items()}
    bureau.restart(forgetful=True)
    bureau.look(WEDGED)
    await asyncio.sleep(5)
    assert bureau.post.told() == [("ublk3/1003/wedged", "raised")] * 2
    bureau.desk.restore(saved)  # the disk answers
    await asyncio.sleep(60)
    assert bureau.post.told() == [("ublk3/1003/wedged", "raised")] * 2 + [("ublk7/1007/cleaned", "raised")]
    assert bureau.keys == ["ublk3/1003/wedged"]
    assert sum(key.startswith("alert/ublk3/") for key in bureau.saved) == 1


@with_bureau(WEBHOOK)
async def test_records_that_are_damaged_are_dropped_and_said_and_keep_nobody_from_the_rest(bureau: Bureau) -> None:
    bureau.look(WEDGED)
    await asyncio.sleep(5)
    good = {key: json.loads(value) for key, value in bureau.saved.items() if key != book.SINKS}
    ((key, record),) = good.items()
    damaged: dict[str, Any] = {
        "alert/x#1": None,
        "alert/x#2": {},
        "alert/x#three": record,
        "alert/x#4": {**record, "told": {"hook": [1]}},
        "alert/x#5": {**record, "alert": {**record["alert"], "kind": "no such kind"}},
        "alert/x#6": {**record, "hold_down": float("nan")},
        "alert/sinks": ["hook"],
        "devices/3": "not ours",
    }
    bureau.saved = {key: json.dumps(value) for key, value in {**damaged, **good}.items()}
    bureau.events.clear()
    bureau.restart()
    await asyncio.sleep(5)
    assert bureau.keys == ["ublk3/1003/wedged"]
    assert sum("is not understood" in event.text for event in bureau.events) == 6
    assert [each for each in bureau.saved if each.startswith("alert/x")] == []
    assert key in bureau.saved


# --- configuration ----------------------------------------------------------------------------------------------------


@with_bureau(WEBHOOK)
async def test_a_sink_that_comes_hears_of_what_is_open_and_one_that_goes_is_forgotten(bureau: Bureau) -> None:
    bureau.post.answers = {"hook": DOWN}
    bureau.look(WEDGED)
    await asyncio.sleep(300)
    assert "daemon/sink/hook" in bureau.keys
    bureau.desk.configure([MAIL])
    await asyncio.sleep(60)
    told = [("ublk3/1003/wedged", "raised"), ("daemon/sink/hook", "raised"), ("daemon/sink/hook", "over")]
    assert bureau.post.told("mail") == told
    assert list(bureau.desk.stats) == ["mail"]
    assert "hook" not in "".join(value for key, value in bureau.saved.items() if "wedged" in key)
    tries = bureau.post.tries["hook"]
    await asyncio.sleep(3600)
    assert bureau.post.tries["hook"] == tries


@pytest.mark.parametrize("is_restarted", [False, True])
def test_what_waits_for_a_sink_that_is_no_more_is_undeliverable_and_said(*, is_restarted: bool) -> None:
    async def story() -> None:
        bureau = Bureau(WEBHOOK)
        bureau.look(WEDGED)
        await asyncio.sleep(1)
        bureau.post.answers = {"hook": DOWN}
        many_cleaned(bureau, 1, first=7)
        bureau.look(judged(VerdictKind.WEDGED, Action.ALERT, "overdue", 4), full=True)
        await asyncio.sleep(1)
        another = replace(WEBHOOK, name="chat")
        if is_restarted:
            bureau.restart(another)
        else:
            bureau.desk.configure([another])
        given_up = [(each["key"], each["sink"], each["notice"]) for each in bureau.desk.undelivered]
        assert given_up == [
            ("ublk3/1003/wedged", "hook", "over"),
            ("ublk7/1007/cleaned", "hook", "raised"),
            ("ublk4/1004/wedged", "hook", "raised"),
        ]
        (said,) = bureau.journal("left")
        assert (said.level, said.facts["count"], said.facts["sink"]) == (Level.WARNING, 3, "hook")
        bureau.desk.configure([another])
        assert len(bureau.journal("left")) == 1
        bureau.desk.close()

    run(story())


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (WEBHOOK, replace(WEBHOOK, url="http://127.0.0.1:2")),
        (replace(MAIL, name="hook", to=("a@x",)), replace(MAIL, name="hook", to=("b@x",))),
        (WEBHOOK, replace(MAIL, name="hook")),
    ],
    ids=["url", "to", "kind"],
)
def test_a_sink_that_leads_elsewhere_hears_of_what_is_open_and_of_what_waits(
    before: SinkConfig,
    after: SinkConfig,
    *,
    is_restarted: bool,
) -> None:
    async def story() -> None:
        bureau = Bureau(before)
        bureau.look(WEDGED)
        await asyncio.sleep(1)
        bureau.post.answers = {"hook": DOWN}
        many_cleaned(bureau, 1, first=7)
        await asyncio.sleep(1)
        bureau.post.answers = {}
        for sink in (after, after):
            if is_restarted:
                bureau.restart(sink)
            else:
                bureau.desk.configure([sink])
            await asyncio.sleep(60)
        told = [("ublk3/1003/wedged", "raised"), ("ublk3/1003/wedged", "raised"), ("ublk7/1007/cleaned", "raised")]
        assert sorted(bureau.post.told()) == told
        assert bureau.desk.undelivered == ()
        assert "127.0.0.1" not in "".join(bureau.saved.values())  # of a webhook it is often a secret
        bureau.desk.close()

    run(story())


@with_bureau(WEBHOOK)
async def test_a_sink_that_changes_in_anything_else_stays_the_one_that_it_was(bureau: Bureau) -> None:
    bureau.look(WEDGED)
    await asyncio.sleep(1)
    bureau.desk.configure([replace(WEBHOOK, timeout=3.0, labels={"team": "disks"}, secret_file="/etc/secret")])
    await asyncio.sleep(60)
    assert bureau.post.states() == ["raised"]
    assert bureau.desk.stats["hook"].delivered == 1


@with_bureau(WEBHOOK)
async def test_a_configuration_that_is_read_anew_has_everything_tried_at_once_and_what_was_given_up_too(
    bureau: Bureau,
) -> None:
    bureau.post.unwanted = {"daemon/refused"}
    bureau.desk.degraded("refused", "amiss")
    bureau.desk.degraded("taken", "amiss")
    await asyncio.sleep(120)
    bureau.post.answers = {"hook": DOWN}
    bureau.desk.degraded("down", "amiss")
    await asyncio.sleep(600)
    assert bureau.desk.stats["hook"].undeliverable == 1
    bureau.post.answers, bureau.post.unwanted = {}, set()
    bureau.desk.configure(bureau.sinks)  # somebody has put the right password into the file
    await asyncio.sleep(1)
    taken = {("daemon/down", "raised"), ("daemon/refused", "raised"), ("daemon/taken", "raised")}
    assert set(bureau.post.told()) == taken


@with_bureau(WEBHOOK)
async def test_a_sink_that_asks_for_less_hears_of_the_end_of_what_it_knows(bureau: Bureau) -> None:
    bureau.desk.degraded("known", "amiss")
    await asyncio.sleep(1)
    bureau.post.answers = {"hook": DOWN}
    bureau.desk.degraded("unknown", "amiss")
    await asyncio.sleep(1)
    bureau.post.answers = {}
    bureau.desk.configure([replace(WEBHOOK, severity=Severity.CRITICAL)])
    bureau.desk.degraded("known", None)
    bureau.desk.degraded("unknown", None)
    await asyncio.sleep(60)
    assert bureau.post.told() == [("daemon/known", "raised"), ("daemon/known", "over")]


# --- tests by hand ----------------------------------------------------------------------------------------------------


@with_bureau(replace(WEBHOOK, severity=Severity.CRITICAL, rate_limit=RateLimit(1, 3600.0)), MAIL)
async def test_a_test_goes_to_each_sink_past_every_limit_and_says_what_each_answered(bureau: Bureau) -> None:
    bureau.post.answers = {"mail": DOWN}
    for _ in range(3):
        answers = await bureau.desk.test(None)
        assert answers == [
            {"sink": "hook", "ok": True, "detail": "", "seconds": LATENCY},
            {"sink": "mail", "ok": False, "detail": "connection refused", "seconds": 0.0},
        ]
    assert bureau.post.told("hook") == [("daemon/test", "test")] * 3
    assert (await bureau.desk.test("hook"))[0]["ok"]
    assert bureau.desk.alerts == ()
    assert bureau.saved.keys() <= {"alert/sinks"}


@with_bureau(WEBHOOK)
async def test_a_test_waits_for_what_is_under_way_and_not_for_the_pause_of_a_sink_that_failed(bureau: Bureau) -> None:
    bureau.post.answers = {"hook": DOWN}
    bureau.look(WEDGED)
    await asyncio.sleep(200)
    bureau.post.answers = {}
    began = asyncio.get_running_loop().time()
    assert (await bureau.desk.test("hook"))[0]["ok"]
    assert asyncio.get_running_loop().time() - began <= 2 * LATENCY + 0.01
    await asyncio.sleep(1)
    assert bureau.post.states() == ["test", "raised"]  # it takes what it is told: the rest follows


@with_bureau(WEBHOOK)
async def test_a_test_of_nothing_is_refused_and_one_of_a_silent_sink_is_answered_all_the_same(bureau: Bureau) -> None:
    with pytest.raises(UsageError, match="there is no sink mail"):
        await bureau.desk.test("mail")
    bureau.post.answers = {"hook": None}
    waiting = [asyncio.ensure_future(bureau.desk.test("hook"))]
    await asyncio.sleep(1)
    waiting += [asyncio.ensure_future(bureau.desk.test("hook")) for _ in range(sending.MOST_TESTS)]
    await asyncio.sleep(1)
    with pytest.raises(UsageError, match="wait for hook already"):
        await bureau.desk.test(None)
    bureau.desk.configure([])
    for each in waiting:
        assert not (await each)[0]["ok"]
    with pytest.raises(UsageError, match="no sink"):
        await bureau.desk.test(None)


@with_bureau(WEBHOOK)
async def test_whoever_waits_for_a_test_may_go_away(bureau: Bureau) -> None:
    bureau.look(WEDGED)
    tests = [asyncio.ensure_future(bureau.desk.test("hook")) for _ in range(2)]
    await asyncio.sleep(LATENCY / 2)
    for each in tests:
        each.cancel()
    await asyncio.sleep(5)
    assert ("ublk3/1003/wedged", "raised") in bureau.post.told()


# --- bounds -----------------------------------------------------------------------------------------------------------


def many_cleaned(bureau: Bureau, count: int, first: int = 0) -> None:
    for dev_id in range(first, first + count):
        deed = Deed(dev_id, Action.DELETE, Outcome.DELETED, "", 0.003)
        bureau.desk.passed(PassReport(0.0, 0.0, full=False, gone=(closing(dev_id),), deeds=(deed,)))


@with_bureau(ALERTMANAGER)
async def test_there_are_never_too_many_and_what_has_no_place_is_counted_and_said(bureau: Bureau) -> None:
    bureau.post.answers = {"am": DOWN}
    many_cleaned(bureau, 2000)
    saved = [key for key in bureau.saved if key.startswith("alert/ublk")]
    assert len(saved) <= book.MOST_ALERTS
    assert sum(len(value) for value in bureau.saved.values()) <= book.MOST_BYTES + (4 << 10)
    assert "alert/ublk1999/2999/cleaned" in "".join(saved)  # the oldest have gone
    assert bureau.desk.stats["am"].dropped == 2000 - len(saved)
    (alert,) = bureau.desk.alerts
    assert alert.key == "daemon/alerts"
    assert alert.summary.startswith(f"{2000 - len(saved)} alerts were dropped")
    assert bureau.desk.to_object()["dropped"] == 2000 - len(saved)
    bureau.look(WEDGED)
    assert "ublk3/1003/wedged" in bureau.keys  # information makes place for what is critical
    bureau.post.answers = {}
    await asyncio.sleep(3600)
    assert bureau.keys == ["ublk3/1003/wedged"]


@with_bureau(ALERTMANAGER)
async def test_more_open_faults_than_there_is_place_for_do_not_push_each_other_out(bureau: Bureau) -> None:
    devices = [pinned(dev_id) for dev_id in range(book.MOST_ALERTS + 50)]
    for _ in range(3):
        bureau.look(*devices)
        await asyncio.sleep(300)
    keys = bureau.keys
    dropped = bureau.desk.to_object()["dropped"]
    assert dropped == len(devices) - len(keys) + 1
    bureau.look(*devices)
    await asyncio.sleep(60)
    assert bureau.keys == keys
    assert Counter(bureau.post.states("am"))["over"] == 0
    assert len(set(bureau.post.told("am"))) == len(keys)
    left = devices[len(devices) // 2 :]
    bureau.look(*left)
    await asyncio.sleep(600)
    bureau.look(*left)
    await asyncio.sleep(10)
    assert {alert.dev_id for alert in bureau.desk.alerts} - {None} == {device.seen.dev_id for device in left}


@with_bureau(WEBHOOK)
async def test_more_critical_faults_than_there_is_place_for_are_counted_and_said_and_end(bureau: Bureau) -> None:
    def late(dev_id: int) -> Judged:
        return replace(LATE, seen=replace(LATE.seen, dev_id=dev_id, identity=Identity(1000 + dev_id)))

    devices = [late(dev_id) for dev_id in range(book.MOST_ALERTS + 50)]
    for _ in range(2):
        bureau.look(*devices)
        await asyncio.sleep(300)
    (said,) = (alert for alert in bureau.desk.alerts if alert.dev_id is None)
    assert said.key == "daemon/alerts"
    assert said.summary == "50 alerts were dropped: there is no place for more than 1000, or 2 MiB of them"
    assert len(bureau.keys) == book.MOST_ALERTS + 1
    assert len([event for event in bureau.journal("raised") if event.facts["key"] == "daemon/alerts"]) == 1
    left = devices[600:]
    bureau.look(*left)
    await asyncio.sleep(1200)
    bureau.look(*left)
    await asyncio.sleep(600)
    assert {alert.dev_id for alert in bureau.desk.alerts} == {device.seen.dev_id for device in left}


@with_bureau(WEBHOOK)
async def test_what_is_kept_of_an_alert_is_counted_as_the_store_counts_it(bureau: Bureau) -> None:
    summary = replace(WEDGED, verdict=replace(WEDGED.verdict, reason='"é" ' * 80))
    bureau.look(summary, pinned(4))
    await asyncio.sleep(5)
    alerts = {key: value for key, value in bureau.saved.items() if key != book.SINKS}
    assert len(alerts) == 2
    sizes = sum(size_in_batch(key, value) for key, value in alerts.items())
    assert sizes == bureau.desk._book._bytes
    assert sizes > 1.1 * sum(map(len, alerts.values()))
    bureau.restart()
    assert bureau.desk._book._bytes == sizes
    assert book.MOST_BYTES <= MOST_STATE // 2


@with_bureau(WEBHOOK)
async def test_what_is_kept_of_an_alert_is_small_however_much_is_known_of_its_device(bureau: Bureau) -> None:
    holders = tuple(replace(MOUNT, what=f"/srv/{number}" * 20) for number in range(500))
    usage = WEDGED.seen.usage
    assert usage
    bureau.look(replace(WEDGED, seen=replace(WEDGED.seen, usage=replace(usage, holders=holders)), stuck=("x" * 3000,)))
    (alert,) = bureau.desk.alerts
    assert len(json.dumps(alert.facts)) <= MOST_FACTS
    assert alert.facts["kernel_state"] == "LIVE"
    assert len(alert.summary) <= 500


@with_bureau()
async def test_without_a_sink_there_are_alerts_all_the_same(bureau: Bureau) -> None:
    bureau.look(WEDGED)
    await asyncio.sleep(5)
    shown = bureau.desk.to_object()
    assert [(alert["key"], alert["waits_for"]) for alert in shown["alerts"]] == [("ublk3/1003/wedged", [])]
    assert json.loads(json.dumps(shown)) == shown
    assert bureau.post.messages == []


# --- with a daemon's loop ---------------------------------------------------------------------------------------------


def desk_of(bench: Bench) -> tuple[Desk, Post]:
    """That hears what the bench's daemon reports."""
    post = Post()

    def instance_of(device: Judged) -> int | None:
        history = bench.reconciler.ledger.get(device.seen.dev_id)
        return history.identity.sysfs_inode if history else device.seen.identity.sysfs_inode

    clock = asyncio.get_running_loop().time
    desk = Desk(Journal(), lambda _key, _value: None, post, boot_id="b", clock=clock, instance_of=instance_of)
    desk.configure([WEBHOOK])
    both = Reporters(bench.recorder, desk)
    bench.reconciler._reporter = both
    bench.reconciler._deeds._reporter = both
    return desk, post


def test_an_orphan_of_a_real_loop_is_told_of_as_cleaned_and_a_held_one_as_pinned_until_it_is_let_go() -> None:
    async def story(bench: Bench) -> None:
        desk, post = desk_of(bench)
        orphan = await bench.an_orphan()
        await bench.wait(5)
        assert [key.rpartition("/")[2] for key, _ in post.told()] == ["cleaned"]
        held = await bench.a_live_device()
        bench.kernel.hold(held, MOUNT)
        bench.kernel.kill(held.openers[0])
        await bench.wait(RESYNC)
        (alert,) = desk.alerts
        assert (alert.kind, alert.instance) == (AlertKind.PINNED, held.inode)
        assert "/srv" in alert.summary
        bench.kernel.let_go(held)
        await bench.wait(RESYNC)
        assert desk.alerts == ()
        assert post.states() == ["raised", "raised", "over"]
        assert orphan.dev_id == 0

    on_the_bench(story)


def test_a_recovery_that_fails_until_it_is_given_up_is_told_of_in_this_order() -> None:
    async def story(bench: Bench) -> None:
        desk, post = desk_of(bench)
        bench.kernel.on_command = FakeCommand.fail
        instance = await bench.an_unserved_device()
        await bench.wait(300)
        kinds = [(key.rpartition("/")[2], state) for key, state in post.told()]
        assert kinds[0] == ("recovery-failed", "raised")
        assert ("recovery-given-up", "raised") in kinds
        assert ("unserved", "raised") not in kinds
        assert [alert.kind for alert in desk.alerts] == [AlertKind.RECOVERY_GIVEN_UP]
        assert instance.dev_id == desk.alerts[0].dev_id

    on_the_bench(story, recovering(attempts=3, deadline=1.0))


# --- any history whatever ---------------------------------------------------------------------------------------------

CAUSES = ("a", "b", "c")
SINKS = (WEBHOOK, ALERTMANAGER, replace(MAIL, rate_limit=RateLimit(3, 60.0), reminder=Reminder.DAILY))
NAMES = [sink.name for sink in SINKS]
STEPS = st.one_of(
    st.tuples(st.just("raise"), st.sampled_from(CAUSES)),
    st.tuples(st.just("well"), st.sampled_from(CAUSES)),
    st.tuples(st.just("wait"), st.sampled_from([0.0, 0.1, 0.3, 2.0, 15.0, 90.0, 1500.0])),
    st.tuples(st.just("down"), st.sampled_from(NAMES)),
    st.tuples(st.just("silent"), st.sampled_from(NAMES)),
    st.tuples(st.just("up"), st.sampled_from(NAMES)),
    st.tuples(st.just("kill"), st.none()),
    st.tuples(st.just("test"), st.sampled_from(NAMES)),
)


class History:
    """What happens to a bureau, one step after the other."""

    def __init__(self) -> None:
        self.bureau = Bureau(*SINKS)
        self.amiss: set[str] = set()
        self.tests: list[asyncio.Future[Any]] = []

    async def go_through(self, step: str, what: Any) -> None:  # noqa: ANN401 - as each step has it
        await asyncio.sleep(what if step == "wait" else 0)
        if action := getattr(self, f"_{step}", None):
            action(what)

    def _raise(self, cause: str) -> None:
        self.amiss.add(cause)
        self.bureau.desk.degraded(cause, f"amiss at {asyncio.get_running_loop().time()}")

    def _well(self, cause: str) -> None:
        self.amiss.discard(cause)
        self.bureau.desk.degraded(cause, None)

    def _down(self, sink: str) -> None:
        self.bureau.post.answers[sink] = DOWN

    def _silent(self, sink: str) -> None:
        self.bureau.post.answers[sink] = None

    def _up(self, sink: str) -> None:
        self.bureau.post.answers.pop(sink, None)

    def _kill(self, _: None) -> None:
        self.bureau.restart()
        for cause in self.amiss:
            self.bureau.desk.degraded(cause, "amiss still")
        self.bureau.look()

    def _test(self, sink: str) -> None:
        self.tests.append(asyncio.ensure_future(self.bureau.desk.test(sink)))


@settings(max_examples=120)
@given(st.lists(STEPS, max_size=40))
@example([("raise", "a"), ("kill", None)])
@example([("down", "hook"), ("raise", "a"), ("well", "a"), ("wait", 15.0), ("raise", "a"), ("kill", None)])
@example([("silent", "am"), ("raise", "a"), ("wait", 2.0), ("kill", None), ("well", "a"), ("wait", 1500.0)])
def test_whatever_happens_each_sink_hears_of_each_alert_in_order_and_of_nothing_for_ever(
    steps: list[tuple[str, Any]],
) -> None:
    async def story() -> None:
        history = History()
        for step, what in steps:
            await history.go_through(step, what)
        bureau = history.bureau
        bureau.post.answers.clear()
        # A delivery without an answer, the longest pause, what the rate limit spreads, what counts as over late.
        await asyncio.sleep(100 + 400 + 60 * len(steps) + book.LONGEST_HOLD_DOWN)
        assert {key for key in bureau.keys if "/sink/" not in key} == {f"daemon/{cause}" for cause in history.amiss}
        waiting = [(alert["key"], alert["waits_for"]) for alert in bureau.desk.to_object()["alerts"]]
        assert [key for key, sinks in waiting if sinks] == []
        for sink in NAMES:
            check_order(bureau, sink)
            check_that_nothing_is_missing(bureau, sink)
        await asyncio.gather(*history.tests, return_exceptions=True)
        bureau.desk.close()

    run(story())


def check_that_nothing_is_missing(bureau: Bureau, sink: str) -> None:
    """Each time that an alert was raised is another one."""
    for key, times in Counter(event.facts["key"] for event in bureau.journal("raised")).items():
        if key != delivery.sick_sink_key(sink):
            heard = {each.raised_at for each in bureau.post.taken if (each.sink, each.key) == (sink, key)}
            assert len(heard) == times, f"{sink} has heard of {key} {len(heard)} times, and not {times}"


def check_order(bureau: Bureau, sink: str) -> None:
    """Of each fault: it is raised, then over, then raised later; and it ends as it is."""
    for key in {each.key for each in bureau.post.taken}:
        heard = [each for each in bureau.post.taken if (each.sink, each.key) == (sink, key) and each.state != "test"]
        assert [each.raised_at for each in heard] == sorted(each.raised_at for each in heard)
        for raised_at in {each.raised_at for each in heard}:
            states = ["over" if each.state == "over" else "open" for each in heard if each.raised_at == raised_at]
            assert states == sorted(states, key=lambda state: state == "over"), states
            assert states[0] == "open"
        if heard:
            assert (heard[-1].state != "over") == (key in bureau.keys), (sink, key, heard[-1])


def test_the_desk_of_a_configuration_without_sinks_is_the_default() -> None:
    assert Config().alerts == ()
