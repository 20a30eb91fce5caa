"""One pass after the other on the fake driver: who is deleted, who is spared, who is told, and how often."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from duende_ublkd.core.config import Config, DaemonConfig, OnOrphan, Policy, load
from duende_ublkd.core.holds import Hold, Holds
from duende_ublkd.core.model import Action, Feature, Outcome, VerdictKind
from duende_ublkd.core.policy import Traits
from duende_ublkd.daemon import Daemon
from duende_ublkd.deeds import _MOST_SENT, MOST_DELETIONS
from duende_ublkd.reconcile import Agenda, Reconciler
from tests.bench import MOUNT, RESYNC, Bench, Recorder, deleting, on_the_bench, recovering
from tests.fake_kernel import DEADLINE, FakeKernel, Fault, VirtualLoop, run

if TYPE_CHECKING:
    from typing import Any

    from duende_ublkd.core.model import Observation
    from tests.fake_kernel import Instance, Process

CAREFUL_DRY_RUN = Config(daemon=DaemonConfig(dry_run=True))


# --- deleting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, Feature.UNPRIVILEGED_DEV], ids=["privileged", "unprivileged"])
@pytest.mark.parametrize("traits", [Traits(), Traits(async_delete=False), Traits(False, False)], ids=str)
def test_an_orphan_is_gone_after_its_grace_and_the_report_says_how_fast(flags: int, traits: Traits) -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan(flags)
        await bench.wait(0.5)
        assert bench.is_there(orphan)
        await bench.wait(0.5)
        assert not bench.is_there(orphan)
        assert bench.recorder.announced == [orphan.dev_id]
        (deed,) = bench.recorder.deeds
        assert deed.outcome is Outcome.DELETED
        assert deed.reaction is not None
        assert 0.5 < deed.reaction < 1
        assert [each.seen.dev_id for each in bench.recorder.gone] == [orphan.dev_id]
        assert bench.reconciler.devices == {}
        assert orphan.dev_id not in bench.reconciler.ledger

    on_the_bench(test, traits=traits)


def test_with_every_hint_lost_an_orphan_is_gone_after_two_resync_intervals() -> None:
    async def test(bench: Bench) -> None:
        await bench.wait(1)
        bench.kernel.hints_lost = True
        instance = bench.kernel.serve()
        bench.kernel.kill(instance.openers[0])
        await bench.wait(60 + 2 * RESYNC)
        assert not bench.is_there(instance)

    on_the_bench(test)


def test_a_slow_deletion_delays_nobody() -> None:
    async def test(bench: Bench) -> None:
        slow = await bench.a_live_device()
        others = [await bench.a_live_device() for _ in range(20)]
        bench.kernel.deletion_takes[slow.dev_id] = 9.0
        for instance in (slow, *others):
            bench.kernel.kill(instance.openers[0])
        await bench.wait(1)
        assert [each for each in others if bench.is_there(each)] == []
        assert bench.is_there(slow)
        await bench.wait(9)
        assert not bench.is_there(slow)

    on_the_bench(test)


def test_a_held_orphan_is_deleted_so_that_its_id_frees_itself_when_the_holder_lets_go() -> None:
    async def test(bench: Bench) -> None:
        instance = await bench.a_live_device()
        bench.kernel.hold(instance, MOUNT)
        bench.kernel.kill(instance.openers[0])
        await bench.wait(RESYNC)
        assert not instance.listed
        assert bench.recorder.outcomes == [Outcome.DELETED_STILL_HELD]
        assert bench.verdict(instance) is VerdictKind.PINNED
        assert "/srv" in bench.reconciler.devices[instance.dev_id].verdict.reason
        bench.kernel.let_go(instance)
        await bench.wait(6)
        assert bench.reconciler.devices == {}
        assert bench.kernel.deletions == [instance]

    on_the_bench(test)


def test_a_held_orphan_waits_where_del_dev_would_block_the_whole_driver() -> None:
    async def test(bench: Bench) -> None:
        instance = await bench.a_live_device()
        bench.kernel.hold(instance, MOUNT)
        bench.kernel.kill(instance.openers[0])
        await bench.wait(RESYNC)
        assert instance.listed
        assert bench.verdict(instance) is VerdictKind.PINNED
        bench.kernel.let_go(instance)
        await bench.wait(6)
        assert not bench.is_there(instance)

    on_the_bench(test, traits=Traits(async_delete=False, delete_can_be_cancelled=False))


def test_a_deleted_id_that_is_reused_at_once_counts_as_freed_and_the_new_device_is_left_alone() -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        while bench.is_there(orphan):
            await bench.wait(0.0001)
        second = bench.kernel.serve()
        assert second.dev_id == orphan.dev_id
        await bench.wait(10)
        assert bench.recorder.outcomes == [Outcome.DELETED]
        assert bench.is_there(second)
        assert bench.verdict(second) is VerdictKind.LIVE

    on_the_bench(test)


# --- sparing ----------------------------------------------------------------------------------------------------------


def test_a_server_may_take_its_time_between_adding_and_opening_and_then_keep_it_open_for_hours() -> None:
    async def test(bench: Bench) -> None:
        instance = bench.kernel.add()
        await bench.wait(59)
        assert bench.verdict(instance) is VerdictKind.STARTING
        bench.kernel.open(instance)
        await bench.wait(7200)
        assert bench.verdict(instance) is VerdictKind.STARTING
        bench.kernel.start(instance)
        await bench.wait(RESYNC)
        assert bench.verdict(instance) is VerdictKind.LIVE
        assert bench.recorder.announced == []

    on_the_bench(test)


def test_a_device_that_somebody_opens_between_the_two_looks_is_spared_and_waits_for_its_whole_grace_again() -> None:
    async def test(bench: Bench) -> None:
        instance = bench.kernel.add()
        server = instance.adder
        # Opened between the look that condemns it and the claim: nobody sees it, until the claim meets it.
        server.visible = False
        await bench.wait(59)
        bench.kernel.hints_lost = True
        bench.kernel.open(instance)
        await bench.wait(2)
        assert bench.recorder.outcomes == [Outcome.SPARED]
        bench.kernel.close(instance, server)
        await bench.wait(58)
        assert bench.is_there(instance)
        await bench.wait(5)
        assert not bench.is_there(instance)

    on_the_bench(test)


def test_who_cannot_be_seen_but_has_it_open_is_asked_less_and_less_often() -> None:
    async def test(bench: Bench) -> None:
        instance = await bench.a_live_device()
        hidden = bench.kernel.process(visible=False)
        bench.kernel.share(instance, hidden)
        bench.kernel.stop(instance)
        bench.kernel.kill(instance.openers[0])
        await bench.wait(600)
        assert set(bench.recorder.outcomes) == {Outcome.SPARED}
        assert len(bench.recorder.deeds) < 30
        bench.kernel.kill(hidden)
        await bench.wait(2 * RESYNC)
        assert not bench.is_there(instance)

    on_the_bench(test)


class ReusesIdBeforeClaim(FakeKernel):
    """Somebody else is quicker: deletes the orphan and adds another device between the first look and the claim."""

    async def look_for_users(self, *arguments: Any) -> Any:  # noqa: ANN401 - passed on
        found = await super().look_for_users(*arguments)
        for instance in [each for each in self.taken.values() if each.started and not each.openers and not each.disk]:
            self.delete(instance)
            self.add(dev_id=instance.dev_id)
        return found


def test_an_id_that_was_reused_between_the_two_looks_is_not_touched() -> None:
    async def main() -> None:
        bench = Bench()
        bench.kernel.__class__ = ReusesIdBeforeClaim
        orphan = await bench.an_orphan()
        await bench.wait(10)
        assert bench.kernel.deletions == []
        assert not bench.is_there(orphan)
        assert bench.verdict(bench.kernel.taken[orphan.dev_id]) is VerdictKind.STARTING

    run(main())


@pytest.mark.parametrize("trouble", ["GET_DEV_INFO has not answered for 10 s"])
def test_a_second_look_without_an_answer_spares(trouble: str) -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        while not bench.recorder.announced:
            await bench.wait(0.0001)
        bench.kernel.troubles[orphan.dev_id] = trouble
        await bench.wait(1)
        assert bench.recorder.outcomes == [Outcome.SPARED]
        assert trouble in bench.recorder.deeds[0].detail
        bench.kernel.troubles.clear()
        await bench.wait(10)
        assert not bench.is_there(orphan)

    on_the_bench(test)


def test_two_cleaners_stay_friends() -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        bench.kernel.faults[orphan.dev_id] = Fault.ALREADY_DONE
        await bench.wait(2)
        assert bench.recorder.outcomes == [Outcome.ALREADY_GONE]
        assert [each.seen.dev_id for each in bench.recorder.gone] == [orphan.dev_id]

    on_the_bench(test)


def test_a_recovered_device_is_live_again_and_was_never_touched() -> None:
    async def test(bench: Bench) -> None:
        instance = await bench.a_live_device(Feature.USER_RECOVERY)
        bench.kernel.kill(instance.openers[0])
        await bench.wait(300)
        assert bench.verdict(instance) is VerdictKind.UNSERVED
        bench.kernel.recover(instance, bench.kernel.process())
        await bench.wait(1)
        assert bench.verdict(instance) is VerdictKind.RECOVERING
        bench.kernel.finish_recovery(instance)
        await bench.wait(3)
        assert bench.verdict(instance) is VerdictKind.LIVE
        assert bench.recorder.announced == []

    on_the_bench(test)


# --- failing ----------------------------------------------------------------------------------------------------------


def test_an_overdue_deletion_makes_it_wedged_and_nothing_more_is_sent_until_that_one_answers() -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        bench.kernel.faults[orphan.dev_id] = Fault.OVERDUE
        await bench.wait(2 + DEADLINE)
        assert bench.verdict(orphan) is VerdictKind.WEDGED
        await bench.wait(3600)
        assert bench.recorder.announced == [orphan.dev_id]
        bench.reconciler.note_answer(orphan.dev_id, "GET_DEV_INFO")  # another one's late answer frees nobody
        await bench.wait(10)
        assert bench.verdict(orphan) is VerdictKind.WEDGED
        bench.kernel.answer(orphan, works=False)
        await bench.wait(1)
        assert not bench.is_there(orphan)

    on_the_bench(test)


# --- a control plane that is stuck


async def two_stuck(bench: Bench) -> tuple[Instance, Instance]:
    """Deletions without an answer, past their deadlines."""
    one, other = [await bench.a_live_device() for _ in range(2)]
    for each in (one, other):
        bench.kernel.faults[each.dev_id] = Fault.OVERDUE
        bench.kernel.kill(each.openers[0])
    await bench.wait(1 + DEADLINE)
    assert [bench.rule(each) for each in (one, other)] == ["overdue", "overdue"]
    return one, other


def test_behind_two_deletions_without_an_answer_the_others_wait_until_one_of_them_has_answered() -> None:
    async def test(bench: Bench) -> None:
        one, other = await two_stuck(bench)
        orphans = [await bench.an_orphan() for _ in range(6)]
        await bench.wait(3600)
        assert {(bench.verdict(each), bench.rule(each)) for each in orphans} == {(VerdictKind.WEDGED, "control-plane")}
        assert f"the deletions of ublk{one.dev_id}, ublk{other.dev_id} have not answered" in bench.reason(orphans[0])
        assert bench.kernel.deletions_sent == {one.dev_id: 1, other.dev_id: 1}
        assert bench.recorder.announced == [one.dev_id, other.dev_id]
        bench.kernel.answer(one, works=True)
        await bench.wait(1)
        assert not any(bench.is_there(each) for each in (one, *orphans))
        assert bench.rule(other) == "overdue"

    on_the_bench(test)


def test_one_deletion_without_an_answer_holds_back_nobody_else() -> None:
    async def test(bench: Bench) -> None:
        stuck = await bench.an_orphan()
        bench.kernel.faults[stuck.dev_id] = Fault.OVERDUE
        await bench.wait(1 + DEADLINE)
        orphans = [await bench.an_orphan() for _ in range(6)]
        await bench.wait(2)
        assert bench.rule(stuck) == "overdue"
        assert not any(bench.is_there(each) for each in orphans)

    on_the_bench(test)


def test_a_control_plane_that_is_stuck_changes_nothing_for_who_is_served_and_devices_are_still_recovered() -> None:
    async def test(bench: Bench) -> None:
        await two_stuck(bench)
        live = await bench.a_live_device()
        unserved = await bench.an_unserved_device()
        await bench.wait(4)
        assert (bench.verdict(live), bench.verdict(unserved)) == (VerdictKind.LIVE, VerdictKind.UNSERVED)
        await bench.wait(4)
        assert [command.dev_id for command in bench.kernel.commands] == [unserved.dev_id]
        assert (bench.verdict(live), bench.verdict(unserved)) == (VerdictKind.LIVE, VerdictKind.LIVE)

    on_the_bench(test, recovering(deadline=5.0))


def test_what_waits_for_a_server_is_not_stopped_while_its_deletion_could_not_follow() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.recovery_deadline = 60.0
        one, _ = await two_stuck(bench)
        device = await bench.an_unserved_device()
        await bench.wait(50)
        assert bench.verdict(device) is VerdictKind.UNSERVED
        await bench.wait(3600)
        assert bench.rule(device) == "control-plane"
        assert bench.kernel.stops == []
        bench.kernel.answer(one, works=False)
        await bench.wait(2)
        assert bench.kernel.stops == [device]

    on_the_bench(test, deleting())


def test_no_more_than_a_few_deletions_are_in_the_kernel_at_once() -> None:
    async def test(bench: Bench) -> None:
        orphans = [await bench.a_live_device() for _ in range(20)]
        for each in orphans:
            bench.kernel.deletion_takes[each.dev_id] = 1.0
            bench.kernel.kill(each.openers[0])
        most = 0
        while len(bench.kernel.deletions) < len(orphans):
            await bench.wait(0.01)
            most = max(most, bench.kernel.deletions_sent.total() - len(bench.kernel.deletions))
        assert most == _MOST_SENT

    on_the_bench(test)


def test_when_every_deletion_hangs_few_are_sent_before_the_rest_wait() -> None:
    """The first one that misses its deadline makes room for one more; from the second on nothing is sent."""

    async def test(bench: Bench) -> None:
        orphans = [await bench.a_live_device() for _ in range(20)]
        for each in orphans:
            bench.kernel.faults[each.dev_id] = Fault.OVERDUE
            bench.kernel.kill(each.openers[0])
        await bench.wait(3600)
        assert bench.kernel.deletions_sent.total() <= _MOST_SENT + 1
        rules = Counter(bench.rule(each) for each in orphans)
        assert rules["overdue"] == bench.kernel.deletions_sent.total()
        assert rules["overdue"] + rules["control-plane"] == len(orphans)

    on_the_bench(test)


# --- who sleeps in the kernel


def counting_looks_for_stuck(bench: Bench) -> list[float]:
    """When it was looked for, from now on."""
    times: list[float] = []
    look = bench.kernel.look_for_stuck

    async def look_and_count() -> tuple[str, ...]:
        times.append(bench.now)
        return await look()

    bench.kernel.look_for_stuck = look_and_count  # type: ignore[method-assign]  # counted
    return times


def test_who_sleeps_in_the_kernel_is_looked_for_when_something_is_wedged_and_only_now_and_again() -> None:
    async def test(bench: Bench) -> None:
        times = counting_looks_for_stuck(bench)
        orphan = await bench.a_live_device()
        await bench.wait(600)
        assert times == []
        bench.kernel.faults[orphan.dev_id] = Fault.OVERDUE
        bench.kernel.kill(orphan.openers[0])
        await bench.wait(1 + DEADLINE)
        assert len(times) == 1
        await bench.wait(600)
        assert 10 <= len(times) <= 21
        assert all(later - earlier >= 30.0 for earlier, later in itertools.pairwise(times))
        bench.kernel.answer(orphan, works=True)
        await bench.wait(1)
        looked = len(times)
        await bench.wait(600)
        assert len(times) == looked

    on_the_bench(test)


def test_who_sleeps_in_the_kernel_is_told_with_the_verdict_and_stays_known_as_long_as_that() -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        bench.kernel.faults[orphan.dev_id] = Fault.OVERDUE
        await bench.wait(1 + DEADLINE)
        (told,) = [each for each in bench.recorder.changed if each.verdict.kind is VerdictKind.WEDGED]
        assert told.stuck == ("somebody in DEL_DEV_ASYNC",)
        await bench.wait(17)  # some passes later, none of which has looked
        assert bench.reconciler.devices[orphan.dev_id].stuck == told.stuck
        bench.hold(orphan, 3600)
        bench.kernel.answer(orphan, works=False)
        await bench.wait(1)
        assert bench.reconciler.devices[orphan.dev_id].stuck == ()

    on_the_bench(test)


def test_a_device_whose_look_is_overdue_is_wedged_and_asked_no_more_until_that_look_is_answered() -> None:
    async def test(bench: Bench) -> None:
        device = await bench.a_live_device()
        other = await bench.a_live_device()
        bench.kernel.unanswered.add(device.dev_id)
        bench.agenda.soon(device.dev_id)
        await bench.wait(1)
        assert bench.verdict(device) is VerdictKind.WEDGED
        asked = bench.kernel.asked.copy()
        await bench.wait(10 * RESYNC)
        assert bench.kernel.asked[device.dev_id] == asked[device.dev_id]
        assert bench.kernel.asked[other.dev_id] > asked[other.dev_id]
        bench.kernel.unanswered.clear()
        bench.reconciler.note_answer(device.dev_id, "GET_DEV_INFO")
        await bench.wait(1)
        assert bench.verdict(device) is VerdictKind.LIVE

    on_the_bench(test)


def test_an_answer_that_overtakes_the_news_of_its_deadline_leaves_nothing_wedged() -> None:
    async def test(bench: Bench) -> None:
        device = await bench.a_live_device()
        bench.kernel.unanswered.add(device.dev_id)
        bench.agenda.soon(device.dev_id)
        await bench.wait(0)
        while bench.kernel.asked[device.dev_id] < 2:
            await bench.wait(0.0001)
        bench.reconciler.note_answer(device.dev_id, "GET_DEV_INFO")  # the pass has still to come to its end
        bench.kernel.unanswered.clear()
        await bench.wait(RESYNC)
        assert bench.verdict(device) is VerdictKind.LIVE

    on_the_bench(test)


def test_a_full_look_that_runs_while_a_deletion_becomes_overdue_does_not_forget_that() -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        bench.kernel.faults[orphan.dev_id] = Fault.OVERDUE
        while not orphan.overdue:
            await bench.wait(0.0001)
        await bench.wait(DEADLINE - 0.0015)
        bench.agenda.soon(None)
        await bench.wait(1)
        assert bench.verdict(orphan) is VerdictKind.WEDGED
        assert bench.recorder.gone == []
        await bench.wait(3600)
        assert bench.recorder.announced == [orphan.dev_id]

    on_the_bench(test)


@pytest.mark.parametrize("before_the_end", [0.0005, 0.001, 0.0015, 0.002, 0.0025])
def test_a_full_look_that_runs_while_a_deletion_ends_does_not_bring_the_device_back(before_the_end: float) -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        bench.kernel.deletion_takes[orphan.dev_id] = 1.0
        while not bench.recorder.announced:
            await bench.wait(0.0001)
        told = len(bench.recorder.changed)
        await bench.wait(1.002 - before_the_end)
        bench.agenda.soon(None)
        await bench.wait(5)
        assert bench.recorder.changed[told:] == []
        assert len(bench.recorder.gone) == 1

    on_the_bench(test)


def test_a_refused_deletion_is_tried_again_ever_more_rarely_and_in_the_end_works() -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        for times in range(1, 13):
            bench.kernel.faults[orphan.dev_id] = Fault.REFUSED
            while len(bench.recorder.deeds) < times:
                await bench.wait(1)
        assert set(bench.recorder.outcomes) == {None}
        assert "input/output error" in bench.recorder.deeds[0].detail
        await bench.wait(301)
        assert not bench.is_there(orphan)

    on_the_bench(test)


def test_the_attempts_after_a_refusal_are_a_second_apart_then_two_then_four() -> None:
    async def test(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        orphan = await bench.an_orphan()
        times: list[float] = []
        for _ in range(4):
            bench.kernel.faults[orphan.dev_id] = Fault.REFUSED
            count = len(bench.recorder.deeds)
            while len(bench.recorder.deeds) == count:
                await bench.wait(0.01)
            times.append(loop.time())
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert gaps == pytest.approx([1, 2, 4], abs=0.1)

    on_the_bench(test)


def test_a_dry_run_changes_nothing_and_says_once_what_it_would_have_done() -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        await bench.wait(600)
        assert bench.is_there(orphan)
        assert bench.recorder.announced == []
        assert bench.recorder.outcomes == [Outcome.WOULD_DELETE]
        assert bench.recorder.deeds[0].action is Action.DELETE

    on_the_bench(test, CAREFUL_DRY_RUN)


def test_an_end_of_the_dry_run_deletes_at_the_next_full_look() -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        await bench.wait(60)
        bench.reconciler.config = replace(CAREFUL_DRY_RUN, daemon=DaemonConfig(dry_run=False))
        await bench.wait(RESYNC + 1)
        assert not bench.is_there(orphan)

    on_the_bench(test, CAREFUL_DRY_RUN)


def test_a_driver_that_was_gone_is_looked_at_again_when_it_is_back() -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        bench.kernel.unavailable = True
        await bench.wait(3 * RESYNC)
        assert bench.recorder.troubles
        bench.kernel.unavailable = False
        await bench.wait(RESYNC + 5)
        assert not bench.is_there(orphan)

    on_the_bench(test)


def test_a_look_that_misses_its_deadline_is_trouble_and_not_the_end() -> None:
    async def test(bench: Bench) -> None:
        instance = await bench.a_live_device()
        bench.kernel.looks_are_overdue = True
        await bench.wait(2 * RESYNC)
        assert "has not answered" in bench.recorder.troubles[0]
        bench.kernel.looks_are_overdue = False
        await bench.wait(2 * RESYNC)
        assert bench.verdict(instance) is VerdictKind.LIVE

    on_the_bench(test)


def test_a_defect_in_a_deed_ends_the_daemon() -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        bench.kernel.faults[orphan.dev_id] = Fault.DEFECT
        with pytest.raises(ZeroDivisionError):
            await bench.wait(5)

    on_the_bench(test)


# --- telling ----------------------------------------------------------------------------------------------------------


def test_a_steady_state_is_silent() -> None:
    async def test(bench: Bench) -> None:
        await bench.a_live_device()
        queueing = await bench.a_live_device(Feature.USER_RECOVERY)
        held = await bench.a_live_device()
        opened = bench.kernel.add()
        bench.kernel.open(opened)
        bench.kernel.hold(held, MOUNT)
        bench.kernel.kill(held.openers[0])
        bench.kernel.kill(queueing.openers[0])
        bench.kernel.add(state=1)  # a stray state
        await bench.wait(120)
        told = bench.recorder.told()
        await bench.wait(3600)
        assert bench.recorder.told() == told
        assert bench.kernel.looks > 120

    on_the_bench(test)


def test_what_somebody_else_deleted_is_reported_gone() -> None:
    async def test(bench: Bench) -> None:
        instance = await bench.a_live_device()
        bench.kernel.hints_lost = True
        server = instance.openers[0]
        bench.kernel.stop(instance)
        bench.kernel.close(instance, server)
        bench.kernel.delete(instance)
        await bench.wait(RESYNC + 1)
        assert [each.seen.dev_id for each in bench.recorder.gone] == [instance.dev_id]

    on_the_bench(test)


def test_a_pass_that_only_looks_starts_nothing() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        kernel, recorder = FakeKernel(loop), Recorder()
        reconciler = Reconciler(kernel, Config(), recorder, Agenda(), clock=loop.time)
        instance = kernel.serve()
        await reconciler.run_pass(None, act=False)
        kernel.kill(instance.openers[0])
        for _ in range(20):
            await asyncio.sleep(1)
            await reconciler.run_pass(None, act=False)
        await reconciler.finish_deeds()
        assert reconciler.devices[0].verdict.action is Action.DELETE
        assert kernel.deletions == []

    run(main())


def test_without_grace_an_owner_gets_its_own_dead_device_away_at_the_first_look() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        kernel, recorder = FakeKernel(loop), Recorder()
        kernel.setup_grace = kernel.orphan_grace = 0.0
        mine, served = kernel.add(), kernel.serve()
        both = (mine.dev_id, served.dev_id)
        reconciler = Reconciler(kernel, Config(), recorder, Agenda(), clock=loop.time, without_grace=both)
        await reconciler.run_pass(None)
        await reconciler.finish_deeds()
        assert kernel.deletions == [mine]
        assert kernel.violations == []

    run(main())


@pytest.mark.parametrize("orphaned", [OnOrphan.ALERT, OnOrphan.IGNORE])
def test_who_names_an_orphan_has_it_deleted_whatever_the_configuration_says_of_orphans(orphaned: OnOrphan) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        kernel = FakeKernel(loop)
        kernel.setup_grace = kernel.orphan_grace = 0.0
        mine, other, served = kernel.add(), kernel.add(), kernel.serve()
        config = Config(policy=Policy(orphaned=orphaned))
        named = (mine.dev_id, served.dev_id)
        reconciler = Reconciler(kernel, config, Recorder(), Agenda(), clock=loop.time, named=named, without_grace=named)
        await reconciler.run_pass(None)
        await reconciler.finish_deeds()
        assert kernel.deletions == [mine]
        assert kernel.violations == []
        assert kernel.taken.keys() == {other.dev_id, served.dev_id}

    run(main())


# --- giving up what waits for a server --------------------------------------------------------------------------------


GIVES_UP = deleting()


@pytest.mark.parametrize("flags", [Feature.USER_RECOVERY, Feature.USER_RECOVERY | Feature.USER_RECOVERY_FAIL_IO])
def test_a_device_that_nobody_recovers_is_stopped_after_its_deadline_and_then_deleted_as_an_orphan(flags: int) -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.recovery_deadline = 60.0
        device = await bench.an_unserved_device(flags)
        await bench.wait(59.5)
        assert bench.kernel.stops == []
        assert bench.recorder.announced == []
        await bench.wait(0.7)
        assert bench.kernel.stops == [device]
        assert bench.is_there(device)
        assert bench.recorder.outcomes == [Outcome.STOPPED]
        await bench.wait(1)
        assert not bench.is_there(device)
        assert bench.recorder.outcomes == [Outcome.STOPPED, Outcome.DELETED]

    on_the_bench(test, GIVES_UP)


def test_a_held_device_is_never_stopped_and_somebody_is_told_who_holds_it() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.recovery_deadline = 60.0
        device = await bench.an_unserved_device()
        bench.kernel.hold(device, MOUNT)
        await bench.wait(3600)
        assert bench.recorder.announced == []
        assert bench.rule(device) == "held"
        (reason,) = bench.alerts()
        assert "held by mount /srv (ext4), so it is not deleted" in reason
        bench.kernel.let_go(device)
        await bench.wait(7)
        assert bench.kernel.stops == [device]

    on_the_bench(test, GIVES_UP)


def test_a_holder_that_only_the_kernel_knows_spares_it_and_is_asked_less_and_less_often() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.recovery_deadline = 60.0
        device = await bench.an_unserved_device()
        device.hidden_holder = True
        await bench.wait(3600)
        assert bench.kernel.stops == []
        assert set(bench.recorder.outcomes) == {Outcome.SPARED}
        assert "its disk is in use" in bench.recorder.deeds[0].detail
        assert len(bench.recorder.deeds) < 30
        device.hidden_holder = False
        await bench.wait(301)
        assert bench.kernel.stops == [device]

    on_the_bench(test, GIVES_UP)


def test_a_server_that_cannot_be_seen_and_takes_its_time_is_asked_less_and_less_often() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.recovery_deadline = 60.0
        device = await bench.an_unserved_device()
        await bench.wait(50)
        bench.kernel.recover(device, bench.kernel.process(visible=False))
        await bench.wait(600)
        assert set(bench.recorder.outcomes) == {Outcome.SPARED}
        assert len(bench.recorder.deeds) < 30
        bench.kernel.finish_recovery(device)
        await bench.wait(2 * RESYNC)
        assert bench.verdict(device) is VerdictKind.LIVE

    on_the_bench(test, GIVES_UP)


def test_a_stop_that_is_refused_again_and_again_calls_somebody() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.recovery_deadline = 60.0
        device = await bench.an_unserved_device()
        device.hidden_holder = True
        await bench.wait(600)
        assert bench.alerts()

    on_the_bench(test, GIVES_UP)


def test_a_device_whose_holders_could_not_all_be_looked_for_is_not_stopped() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.recovery_deadline = 60.0
        device = await bench.an_unserved_device()
        bench.kernel.sees_everything = False
        await bench.wait(3600)
        assert bench.recorder.announced == []
        assert bench.rule(device) == "holders-unknown"
        assert len(bench.alerts()) == 1
        bench.kernel.sees_everything = True
        await bench.wait(7)
        assert bench.kernel.stops == [device]

    on_the_bench(test, GIVES_UP)


def test_a_holder_that_comes_between_the_two_looks_spares_it() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.recovery_deadline = 60.0
        device = await bench.an_unserved_device()
        await bench.wait(59)
        while not bench.recorder.announced:
            await bench.wait(0.0001)
        bench.kernel.hold(device, MOUNT)
        await bench.wait(600)
        assert bench.recorder.outcomes == [Outcome.SPARED]
        assert "mount /srv" in bench.recorder.deeds[0].detail

    on_the_bench(test, GIVES_UP)


def test_a_sweep_that_is_incomplete_only_the_second_time_spares_it() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.recovery_deadline = 60.0
        await bench.an_unserved_device()
        await bench.wait(59)
        while not bench.recorder.announced:
            await bench.wait(0.0001)
        bench.kernel.sees_everything = False
        await bench.wait(600)
        assert bench.recorder.outcomes == [Outcome.SPARED]

    on_the_bench(test, GIVES_UP)


@pytest.mark.parametrize("finished", [False, True], ids=["opened", "served"])
def test_a_server_that_comes_right_before_the_claim_wins(finished: bool) -> None:  # noqa: FBT001
    async def main() -> None:
        bench = Bench(GIVES_UP)
        bench.kernel.recovery_deadline = 60.0
        device = await bench.an_unserved_device()
        await bench.wait(50)
        kernel, claim = bench.kernel, bench.kernel.claim

        def late(seen: Observation) -> Any:  # noqa: ANN401 - passed on
            if not device.openers:
                kernel.recover(device, kernel.process())
                if finished:
                    kernel.finish_recovery(device)
            return claim(seen)

        kernel.claim = late  # type: ignore[method-assign]  # what happens in that moment
        await bench.wait(30)
        assert bench.recorder.outcomes == [Outcome.SPARED]
        assert bench.kernel.stops == []
        await bench.wait(600)
        assert bench.verdict(device) is (VerdictKind.LIVE if finished else VerdictKind.UNSERVED)
        assert finished or "does not serve it" in bench.alerts()[-1]
        assert len(bench.recorder.deeds) == 1

    run(main())


def test_a_daemon_that_has_not_watched_the_whole_deadline_itself_does_not_stop() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.recovery_deadline = 60.0
        device = await bench.an_unserved_device()
        await bench.wait(40)
        await bench.restart()
        await bench.wait(59)
        assert bench.kernel.stops == []
        assert bench.rule(device) == "not-yet-given-up"
        assert "has not watched it for its whole deadline" in bench.reason(device)
        await bench.wait(2)
        assert bench.kernel.stops == [device]

    on_the_bench(test, GIVES_UP)


@pytest.mark.parametrize("works", [False, True])
def test_a_stop_that_misses_its_deadline_makes_it_wedged_and_nothing_is_sent_behind_it(works: bool) -> None:  # noqa: FBT001
    async def test(bench: Bench) -> None:
        bench.kernel.recovery_deadline = 60.0
        device = await bench.an_unserved_device()
        bench.kernel.faults[device.dev_id] = Fault.STOP_OVERDUE
        await bench.wait(62 + DEADLINE)
        assert bench.verdict(device) is VerdictKind.WEDGED
        await bench.wait(3600)
        assert bench.recorder.announced == [device.dev_id]
        assert bench.kernel.deletions == []
        bench.kernel.answer(device, works=works)
        await bench.wait(2)
        assert not bench.is_there(device)
        assert len(bench.kernel.stops) == (0 if works else 1)

    on_the_bench(test, GIVES_UP)


@pytest.mark.parametrize("heard", [False, True])
@pytest.mark.parametrize("works", [False, True])
def test_a_stop_of_a_former_daemon_that_has_not_answered_is_remembered_until_it_is_done_or_a_person_says_so(
    *, works: bool, heard: bool
) -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.recovery_deadline = 60.0
        device = await bench.an_unserved_device()
        bench.kernel.faults[device.dev_id] = Fault.STOP_OVERDUE
        await bench.wait(62 + DEADLINE)
        for _ in range(2):
            await bench.restart()
            await bench.wait(200)
            assert bench.rule(device) == "overdue"
            assert "STOP_DEV has not answered" in bench.reason(device)
        assert bench.recorder.announced == [device.dev_id]
        assert (bench.kernel.stops, bench.kernel.deletions) == ([], [])
        device.answer_is_heard = heard
        bench.kernel.answer(device, works=works)
        await bench.wait(2 * RESYNC)
        if not works and not heard:
            assert bench.rule(device) == "overdue"
            assert bench.reconciler.release(device.dev_id).overdue == "STOP_DEV"
        await bench.wait(60 + RESYNC)  # this daemon has to watch the deadline itself
        assert bench.kernel.stops == ([] if works else [device])
        assert not bench.is_there(device)

    on_the_bench(test, GIVES_UP)


def test_a_stop_whose_child_has_ended_with_its_daemon_is_forgotten_and_sent_again() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.recovery_deadline = 60.0
        device = await bench.an_unserved_device()
        bench.kernel.faults[device.dev_id] = Fault.STOP_OVERDUE
        await bench.wait(62 + DEADLINE)
        device.hand = None
        await bench.restart()
        await bench.wait(30)
        assert bench.rule(device) == "not-yet-given-up"
        await bench.wait(60)
        assert bench.kernel.stops == [device]
        assert not bench.is_there(device)

    on_the_bench(test, GIVES_UP)


def test_who_stops_a_device_is_written_down_before_the_stop_and_again_after_it() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.recovery_deadline = 60.0
        device = await bench.an_unserved_device()
        kept: list[tuple[bool, bool]] = []
        ledger = bench.reconciler.ledger

        def keep(dev_id: int) -> None:
            record = ledger.to_record(dev_id)
            assert record
            kept.append((record["hand"] is not None, bench.kernel.stops == [device]))

        ledger.keep = keep
        await bench.wait(62)
        assert kept == [(True, False), (False, True)]

    on_the_bench(test, GIVES_UP)


def test_a_stop_that_somebodys_hold_on_the_disk_prevents_leaves_no_child_in_the_record() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.recovery_deadline = 60.0
        device = await bench.an_unserved_device()
        device.hidden_holder = True
        await bench.wait(62)
        assert set(bench.recorder.outcomes) == {Outcome.SPARED}
        record = bench.reconciler.ledger.to_record(device.dev_id)
        assert record
        assert record["hand"] is None

    on_the_bench(test, GIVES_UP)


def test_a_release_takes_back_no_deadline_whose_answer_this_daemon_will_hear() -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        bench.kernel.faults[orphan.dev_id] = Fault.OVERDUE
        await bench.wait(1 + DEADLINE)
        assert not bench.reconciler.release(orphan.dev_id).overdue
        await bench.wait(100)
        assert bench.rule(orphan) == "overdue"
        assert bench.recorder.announced == [orphan.dev_id]

    on_the_bench(test)


def test_a_deletion_that_has_not_answered_is_over_with_its_daemon_and_the_next_one_begins_anew() -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        bench.kernel.faults[orphan.dev_id] = Fault.OVERDUE
        await bench.wait(1 + DEADLINE)
        assert bench.rule(orphan) == "overdue"
        await bench.restart()
        await bench.wait(RESYNC)
        assert bench.recorder.announced == [orphan.dev_id, orphan.dev_id]
        assert not bench.is_there(orphan)

    on_the_bench(test)


def test_a_command_that_runs_once_stops_nothing_however_long_it_looks() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        kernel, recorder = FakeKernel(loop), Recorder()
        reconciler = Reconciler(kernel, GIVES_UP, recorder, Agenda(), clock=loop.time, only_orphans=True)
        kernel.kill(kernel.serve(flags=Feature.USER_RECOVERY).openers[0])
        for _ in range(200):
            await asyncio.sleep(1)
            await reconciler.run_pass(None)
        await reconciler.finish_deeds()
        assert reconciler.devices[0].verdict.action is Action.DELETE
        assert recorder.announced == []

    run(main())


# --- planned work -----------------------------------------------------------------------------------------------------


def test_an_orphan_on_hold_is_left_alone_and_deleted_on_time_when_the_hold_is_over() -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        hold = bench.hold(orphan, 610)  # not a multiple of the resync interval
        bench.kernel.off_limits[orphan.dev_id] = hold.until
        await bench.wait(609.9)
        assert bench.recorder.announced == []
        assert bench.rule(orphan) == "on-hold"
        assert "by root (upgrade)" in bench.reason(orphan)
        assert bench.alerts() == []
        await bench.wait(0.3)
        assert not bench.is_there(orphan)
        assert bench.ended_holds == [(hold, "its time is over")]

    on_the_bench(test)


def test_a_device_without_a_server_on_hold_is_recovered_on_time_when_the_hold_is_over() -> None:
    async def test(bench: Bench) -> None:
        device = await bench.an_unserved_device()
        hold = bench.hold(device, 610)
        bench.kernel.off_limits[device.dev_id] = hold.until
        await bench.wait(609.9)
        assert bench.kernel.commands == []
        assert bench.rule(device) == "on-hold"
        await bench.wait(1)
        assert len(bench.kernel.commands) == 1
        assert bench.verdict(device) is VerdictKind.LIVE

    on_the_bench(test, recovering())


def test_a_device_without_a_server_on_hold_is_not_given_up_before_the_hold_is_over() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.recovery_deadline = 60.0
        device = await bench.an_unserved_device()
        hold = bench.hold(device, 610)
        bench.kernel.off_limits[device.dev_id] = hold.until
        await bench.wait(609.9)
        assert bench.recorder.announced == []
        await bench.wait(0.3)
        assert bench.kernel.stops == [device]

    on_the_bench(test, GIVES_UP)


def test_what_planned_work_may_cause_calls_nobody_until_the_hold_is_over() -> None:
    async def test(bench: Bench) -> None:
        unserved = await bench.an_unserved_device()
        held = await bench.a_live_device()
        bench.hold(unserved, 610)
        bench.hold(held, 610)
        bench.kernel.hold(held, MOUNT)
        bench.kernel.kill(held.openers[0])
        await bench.wait(600)
        assert bench.alerts() == []
        assert bench.recorder.announced == []
        await bench.wait(12)
        assert len(bench.alerts()) == 2

    on_the_bench(test)


def test_what_planned_work_does_not_explain_still_calls_somebody() -> None:
    async def test(bench: Bench) -> None:
        wedged, unknown = await bench.a_live_device(), await bench.a_live_device()
        bench.hold(wedged, 600)
        bench.hold(unknown, 600)
        bench.kernel.unanswered.add(wedged.dev_id)
        bench.kernel.troubles[unknown.dev_id] = "input/output error"
        await bench.wait(2 * RESYNC)
        assert len(bench.alerts()) == 2
        assert all("on hold for" in reason for reason in bench.alerts())

    on_the_bench(test)


def test_a_deletion_that_was_decided_and_not_yet_sent_when_the_hold_came_is_spared() -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        while not bench.recorder.announced:
            await bench.wait(0.0001)
        bench.kernel.off_limits[orphan.dev_id] = bench.hold(orphan, 60).until
        await bench.wait(50)
        assert bench.recorder.outcomes == [Outcome.SPARED]
        assert "on hold" in bench.recorder.deeds[0].detail
        await bench.wait(11)
        assert not bench.is_there(orphan)

    on_the_bench(test)


def test_a_stop_that_was_decided_and_not_yet_sent_when_the_hold_came_is_spared() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.recovery_deadline = 60.0
        device = await bench.an_unserved_device()
        await bench.wait(59)
        while not bench.recorder.announced:
            await bench.wait(0.0001)
        bench.kernel.off_limits[device.dev_id] = bench.hold(device, 60).until
        await bench.wait(50)
        assert bench.recorder.outcomes == [Outcome.SPARED]

    on_the_bench(test, GIVES_UP)


def test_a_hold_that_comes_before_a_child_has_taken_the_order_to_stop_is_heeded() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.recovery_deadline = 60.0
        bench.kernel.child_takes = 1.0
        device = await bench.an_unserved_device()
        while not device.claimed:
            await bench.wait(0.01)
        await bench.wait(0.9)
        bench.kernel.off_limits[device.dev_id] = bench.hold(device, 60).until
        await bench.wait(50)
        assert bench.kernel.stops == []
        assert "it is on hold now" in bench.recorder.deeds[0].detail
        await bench.wait(20)
        assert bench.kernel.stops == [device]

    on_the_bench(test, GIVES_UP)


def test_a_release_lets_the_action_follow_at_once() -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        hold = bench.hold(orphan, 3600)
        await bench.wait(100)
        assert bench.reconciler.release(orphan.dev_id)[0] is hold
        await bench.wait(0.1)
        assert not bench.is_there(orphan)
        assert bench.ended_holds == []  # somebody ended it, who knows

    on_the_bench(test)


def test_a_hold_that_was_bound_to_an_instance_ends_when_another_one_has_its_id() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.a_live_device()
        hold = bench.hold(first, 3600, bound=True, uid=1000)
        bench.kernel.kill(first.openers[0])
        await bench.wait(10)
        assert "by uid 1000" in bench.reason(first)
        bench.kernel.delete(first)
        second = bench.kernel.serve(dev_id=first.dev_id)
        await bench.wait(1)
        assert bench.ended_holds == [(hold, "its device is gone")]
        bench.kernel.kill(second.openers[0])
        await bench.wait(2)
        assert not bench.is_there(second)

    on_the_bench(test)


def test_a_hold_on_an_id_goes_on_when_another_device_has_it() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.a_live_device()
        bench.kernel.off_limits[first.dev_id] = bench.hold(first, 100).until
        bench.kernel.delete(first)
        bench.kernel.kill(first.openers[0])
        second = bench.kernel.serve(dev_id=first.dev_id)
        await bench.wait(1)
        bench.kernel.kill(second.openers[0])
        await bench.wait(90)
        assert bench.is_there(second)
        assert bench.ended_holds == []
        await bench.wait(10)
        assert not bench.is_there(second)

    on_the_bench(test)


def test_the_end_of_a_hold_on_a_device_that_needs_nothing_is_told_on_time() -> None:
    async def test(bench: Bench) -> None:
        device = await bench.a_live_device()
        hold = bench.hold(device, 40)
        await bench.wait(40.1)
        assert bench.ended_holds == [(hold, "its time is over")]

    on_the_bench(test)


# --- the agenda -------------------------------------------------------------------------------------------------------


def test_the_agenda_gives_what_is_due_the_earliest_first_and_all_instead_of_some() -> None:
    async def main() -> None:
        loop, agenda = asyncio.get_running_loop(), Agenda()
        began = loop.time()
        agenda.later(3, 5)
        agenda.later(3, 9)
        agenda.later(4, 5)
        agenda.later(5, 6)
        assert await agenda.next() == {3, 4}
        assert loop.time() - began == pytest.approx(5)
        agenda.later(None, 1)
        assert await agenda.next() is None
        asyncio.get_running_loop().call_later(2, agenda.soon, 7)
        assert await agenda.next() == {7}
        assert loop.time() - began == pytest.approx(8)

    run(main())


def test_waiting_for_the_agenda_can_be_cancelled_even_when_something_becomes_due_that_moment() -> None:
    async def main() -> None:
        agenda = Agenda()
        waiting = asyncio.ensure_future(agenda.next())
        await asyncio.sleep(1)
        agenda.later(3, 30)
        waiting.cancel()
        await asyncio.wait([waiting], timeout=1)
        assert waiting.cancelled()

    run(main())


def test_who_waits_for_the_agenda_gets_a_defect_instead() -> None:
    async def main() -> None:
        agenda = Agenda()
        asyncio.get_running_loop().call_later(1, agenda.fail, ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            await agenda.next()

    run(main())


def test_virtual_time_does_not_hide_a_deadlock() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    loop = VirtualLoop()
    task = loop.create_task(main())
    with pytest.raises(AssertionError, match="nothing will ever happen"):
        loop.run_until_complete(task)
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()


# --- who is taken for whom --------------------------------------------------------------------------------------------


def test_whoever_looks_into_a_corpse_is_not_its_server_and_changes_no_policy() -> None:
    config = load(b'[[device]]\nmatch = { server = "ublk.test" }\norphaned = "alert"\n', "config.toml")

    async def test(bench: Bench) -> None:
        kept = await bench.an_orphan()
        await bench.wait(2)
        assert bench.is_there(kept)
        probe = bench.kernel.process("blkid")
        bench.kernel.open(kept, probe)
        await bench.wait(0.05)
        bench.kernel.close(kept, probe)
        await bench.wait(10 * RESYNC)
        assert bench.is_there(kept)

    on_the_bench(test, config)


def test_an_open_that_an_event_told_of_starts_the_grace_anew() -> None:
    async def test(bench: Bench) -> None:
        added = bench.kernel.add()
        await bench.wait(59)
        bench.reconciler.note_opened(added.dev_id)  # and closed again before anybody could look
        await bench.wait(58)
        assert bench.is_there(added)
        await bench.wait(5)
        assert not bench.is_there(added)

    on_the_bench(test)


# --- surroundings -----------------------------------------------------------------------------------------------------


def test_a_look_that_finds_no_descriptor_left_is_trouble_and_not_the_end() -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        bench.kernel.descriptors_left = False
        await bench.wait(2 * RESYNC)
        assert "Too many open files" in bench.recorder.troubles[-1]
        bench.kernel.descriptors_left = True
        await bench.wait(2 * RESYNC)
        assert not bench.is_there(orphan)

    on_the_bench(test)


def test_a_dry_run_that_a_reload_brings_holds_back_what_still_waits_for_its_turn() -> None:
    async def test(bench: Bench) -> None:
        devices = [await bench.a_live_device() for _ in range(MOST_DELETIONS + 6)]
        for each in devices:
            bench.kernel.deletion_takes[each.dev_id] = 5.0
            bench.kernel.kill(each.openers[0])
        await bench.wait(2)
        assert len(bench.recorder.announced) == MOST_DELETIONS
        bench.reconciler.config = Config(daemon=DaemonConfig(dry_run=True))
        await bench.wait(20)
        assert len(bench.recorder.announced) == MOST_DELETIONS

    on_the_bench(test)


def test_a_deletion_that_cannot_be_confirmed_is_not_called_a_failure() -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        while orphan not in bench.kernel.deletions:
            await bench.wait(0.0001)
        bench.kernel.unavailable = True
        await bench.wait(0.5)
        (deed,) = bench.recorder.deeds
        assert deed.outcome is Outcome.DELETED_STILL_HELD
        assert "nobody could tell" in deed.detail

    on_the_bench(test)


# --- evidence that deceives -------------------------------------------------------------------------------------------


PROTECTED = load(
    b"""
[policy]
unserved = "delete"
[[device]]
match = { server = "nbdublk" }
unserved = "alert"
""",
    "config.toml",
)


@pytest.mark.parametrize("how", ["its pid is of another namespace", "its pid is somebody else's now"])
def test_a_pid_that_was_only_claimed_or_is_anothers_by_now_does_not_choose_the_policy(how: str) -> None:
    async def test(bench: Bench) -> None:
        server, stranger = bench.kernel.process("nbdublk"), bench.kernel.process("kworker")
        device = bench.kernel.add(server, flags=Feature.USER_RECOVERY)
        bench.kernel.open(device)
        bench.kernel.start(device)
        if "namespace" in how:
            device.pid = stranger.pid
        await bench.wait(60)
        bench.kernel.recovery_deadline = None
        bench.kernel.kill(server)
        await bench.wait(20)
        if "somebody" in how:
            bench.kernel.recycle(server.pid)
        await bench.wait(300)
        assert bench.is_there(device)
        assert bench.kernel.stops == []
        assert bench.rule(device) == "deadline-over"

    on_the_bench(test, PROTECTED)


def test_what_devtmpfs_left_to_a_new_device_does_not_shorten_its_grace() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.nodes_are_older_by = 3600.0
        await bench.wait(RESYNC)
        device = bench.kernel.add()
        await bench.wait(59)
        assert bench.is_there(device)
        assert bench.kernel.violations == []

    on_the_bench(test)


def test_a_hold_that_is_set_while_a_one_shot_command_waits_for_its_turn_counts() -> None:
    async def test(bench: Bench) -> None:
        held = Holds()
        bench.reconciler.read_holds = lambda: held
        slow = [await bench.a_live_device(Feature.UNPRIVILEGED_DEV) for _ in range(_MOST_SENT)]
        late = await bench.a_live_device()
        for each in slow:
            bench.kernel.deletion_takes[each.dev_id] = 5.0
        for each in (*slow, late):
            bench.kernel.kill(each.openers[0])
        await bench.wait(3)
        assert bench.is_there(late)
        held.set(Hold(late.dev_id, bench.now, bench.now + 1000, 0, "mine", None))
        await bench.wait(60)
        assert bench.is_there(late)
        assert not any(bench.is_there(each) for each in slow)

    on_the_bench(test)


def test_a_device_that_waits_for_its_turn_can_still_be_opened_by_its_server() -> None:
    async def test(bench: Bench) -> None:
        slow = [await bench.a_live_device() for _ in range(_MOST_SENT)]
        for each in slow:
            bench.kernel.deletion_takes[each.dev_id] = 5.0
        late = await bench.a_live_device()
        for each in (*slow, late):
            bench.kernel.kill(each.openers[0])
        await bench.wait(3)
        assert bench.is_there(late)
        assert not bench.kernel.is_busy(late)
        assert sum(bench.kernel.is_busy(each) for each in slow) == _MOST_SENT

    on_the_bench(test)


def test_devices_whose_deletion_waits_for_their_holders_delay_no_other() -> None:
    async def test(bench: Bench) -> None:
        held = [await bench.a_live_device(Feature.UNPRIVILEGED_DEV) for _ in range(3 * _MOST_SENT)]
        other = await bench.a_live_device()
        for each in held:
            bench.kernel.hold(each, MOUNT)
        for each in (*held, other):
            bench.kernel.kill(each.openers[0])
        await bench.wait(2)
        assert not bench.is_there(other)

    on_the_bench(test)


def test_no_recovery_command_runs_for_a_device_that_somebody_unseen_has_taken() -> None:
    async def test(bench: Bench) -> None:
        device = await bench.an_unserved_device()
        bench.kernel.sees_everything = False
        bench.kernel.recover(device, bench.kernel.process(visible=False))
        await bench.wait(100)
        assert bench.kernel.commands == []
        assert "somebody who cannot be seen" in bench.reason(device)

    on_the_bench(test, recovering(deadline=10))


@pytest.mark.parametrize("case", ["leaked", "unseen", "taken"])
def test_who_keeps_a_device_from_everybody_and_does_nothing_with_it_is_told_of(case: str) -> None:
    async def test(bench: Bench) -> None:
        kernel = bench.kernel
        if case == "leaked":
            device = await bench.a_live_device()
            server = device.openers[0]
            kernel.share(device, kernel.process("helper"))
            kernel.stop(device)
            kernel.kill(server)
        elif case == "unseen":
            device = kernel.add(kernel.process(visible=False))
            kernel.open(device)
        else:
            device = await bench.an_unserved_device()
            kernel.recover(device, kernel.process())
        await bench.wait(600)
        assert bench.alerts()
        told = bench.recorder.told()
        await bench.wait(3600)
        assert bench.recorder.told() - told < 200
        assert bench.is_there(device)

    on_the_bench(test)


def test_who_keeps_a_device_that_was_never_started_and_cannot_start_it_is_told_of() -> None:
    async def test(bench: Bench) -> None:
        helper = bench.kernel.process("sleep")
        helper.has_ring = False
        device = bench.kernel.add()
        bench.kernel.open(device, helper)
        await bench.wait(55)
        assert bench.verdict(device) is VerdictKind.STARTING
        await bench.wait(20)
        assert (bench.verdict(device), bench.rule(device)) == (VerdictKind.PINNED, "leaked-descriptor")
        assert len(bench.alerts()) == 1
        await bench.wait(3600)
        assert len(bench.alerts()) == 1
        assert bench.is_there(device)

    on_the_bench(test)


async def a_container(bench: Bench) -> tuple[Instance, Process]:
    """Up to 6.16: the kernel tells of the server by its number in there, which is another process's out here."""
    device = await bench.a_live_device()
    server, init = device.openers[0], bench.kernel.process("systemd")
    device.pid = init.pid
    bench.agenda.soon(None)
    await bench.wait(0.1)
    assert bench.reason(device) == f"served by {server.as_seen()}, which has its char device open"
    return device, server


def test_a_server_in_a_container_is_told_by_its_open_device_and_not_by_the_number_that_the_kernel_tells() -> None:
    async def test(bench: Bench) -> None:
        device, server = await a_container(bench)
        told = bench.recorder.told()
        for _ in range(20):
            await bench.wait(7)
            bench.agenda.soon(device.dev_id)
            await bench.wait(0.1)
            assert f"served by {server.pid} " in bench.reason(device)
        bench.kernel.sees_everything = server.visible = False
        bench.agenda.soon(device.dev_id)
        await bench.wait(100)
        assert (bench.verdict(device), bench.rule(device)) == (VerdictKind.LIVE, "served-unseen")
        assert bench.recorder.told() == told

    on_the_bench(test)


def test_the_end_of_a_server_in_a_container_that_the_kernel_does_not_notice_is_told_of() -> None:
    async def test(bench: Bench) -> None:
        device, server = await a_container(bench)
        await bench.wait(100)
        server.visible = False  # as where its ring has leaked
        bench.agenda.soon(device.dev_id)
        await bench.wait(30)
        assert (bench.verdict(device), bench.alerts()) == (VerdictKind.CLOSING, [])
        await bench.wait(30)
        assert (bench.verdict(device), bench.rule(device)) == (VerdictKind.WEDGED, "death-never-noticed")
        (alert,) = bench.alerts()
        assert f"its server {server.as_seen()} is gone" in alert
        await bench.wait(3600)
        assert bench.is_there(device)
        assert bench.recorder.announced == []

    on_the_bench(test)


def test_a_blind_look_is_told_of_when_it_is_one_of_many_and_until_one_sees_everything() -> None:
    async def test(bench: Bench) -> None:
        await bench.a_live_device()
        reconciler = bench.reconciler
        bench.kernel.sees_everything = False
        await bench.wait(RESYNC + 1)
        bench.kernel.sees_everything = True
        await bench.wait(RESYNC)
        bench.kernel.sees_everything = False
        await bench.wait(59)
        assert reconciler.blind == ""
        await bench.wait(RESYNC + 3)
        assert reconciler.blind == "somebody's open files"
        bench.kernel.sees_everything = True
        await bench.wait(RESYNC)
        assert reconciler.blind == ""

    on_the_bench(test)


def test_nobody_is_told_of_what_cannot_be_seen_where_there_is_no_device() -> None:
    async def test(bench: Bench) -> None:
        device = await bench.a_live_device()
        bench.kernel.sees_everything = False
        await bench.wait(100)
        assert bench.reconciler.blind
        bench.kernel.delete(device)
        bench.kernel.kill(device.adder)
        await bench.wait(RESYNC + 1)
        assert bench.reconciler.blind == ""

    on_the_bench(test)


def test_the_daemon_has_an_alert_for_looks_that_are_blind_and_ends_it() -> None:
    told: list[tuple[str, str | None]] = []

    class Desk:
        def degraded(self, cause: str, sentence: str | None) -> None:
            told.append((cause, sentence))

    class Watch:
        def look_began(self, _longest: float) -> None:
            pass

        def look_ended(self, _longest: float) -> None:
            pass

    async def test(bench: Bench) -> None:
        await bench.a_live_device()
        daemon: Any = Daemon.__new__(Daemon)
        daemon._config, daemon._desk, daemon._watch, daemon._parts = Config(), Desk(), Watch(), bench
        bench.kernel.sees_everything = False
        await bench.wait(100)
        await daemon._look(None)
        bench.kernel.sees_everything = True
        await daemon._look(None)

    on_the_bench(test)
    sentence = "not everybody who uses devices can be seen: somebody's open files; what depends on it is not done"
    assert told == [("look", sentence), ("look", None)]


def test_opens_that_anybody_may_do_do_not_keep_an_orphan_for_ever() -> None:
    async def test(bench: Bench) -> None:
        orphan = await bench.an_orphan()
        for _ in range(20):
            await bench.wait(0.1)
            bench.reconciler.note_opened(orphan.dev_id)
        assert not bench.is_there(orphan)
        never_started = bench.kernel.add()
        bench.kernel.kill(never_started.adder)
        for _ in range(3700):
            await bench.wait(1)
            bench.reconciler.note_opened(never_started.dev_id)
        assert not bench.is_there(never_started)

    on_the_bench(test)
