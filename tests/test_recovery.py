"""Recovery commands on the fake kernel in virtual time: when one runs, what comes of it, and when it is given up."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from duende_ublkd.core import recovery
from duende_ublkd.core.config import Config, DaemonConfig, Match, OnOrphan, OnUnserved, Policy
from duende_ublkd.core.config import DeviceRule as Table
from duende_ublkd.core.model import Action, Feature, KernelState, Observation, Outcome, VerdictKind
from duende_ublkd.core.trail import NO_TRAIL, OVERRUN
from duende_ublkd.deeds import MOST_RECOVERIES
from duende_ublkd.reconcile import Agenda, Reconciler
from tests.bench import RESYNC, Bench, Recorder, a_recovery, deleting, on_the_bench, recovering
from tests.fake_kernel import FakeCommand, FakeKernel, run

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from tests.fake_kernel import Instance

SOON = recovering(deadline=2.0)


def dies_after(seconds: float) -> Callable[[FakeCommand], None]:
    """A server that starts well each time."""

    def serve(command: FakeCommand) -> None:
        command.serve()
        asyncio.get_running_loop().call_later(0.2 + seconds, command.exit, 1)

    return serve


async def until_a_command_runs(bench: Bench, count: int = 1) -> FakeCommand:
    while len(bench.kernel.commands) < count:
        await bench.wait(0.005)
    return bench.kernel.commands[count - 1]


# --- when it runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [Feature.USER_RECOVERY, Feature.USER_RECOVERY | Feature.USER_RECOVERY_FAIL_IO])
def test_the_command_runs_when_the_deadline_is_over_and_not_before(flags: int) -> None:
    async def test(bench: Bench) -> None:
        device = await bench.an_unserved_device(flags)
        assert device.unserved_since is not None
        await bench.wait(59.5)
        assert bench.kernel.commands == []
        assert bench.verdict(device) is VerdictKind.UNSERVED
        assert bench.rule(device) == "deadline-open"
        command = await until_a_command_runs(bench)
        assert 60 <= command.at - device.unserved_since < 60.3
        await bench.wait(1)
        assert bench.verdict(device) is VerdictKind.LIVE
        assert bench.recorder.outcomes == [Outcome.RECOVERED]

    on_the_bench(test, recovering())


def test_what_the_command_is_told_of_its_device() -> None:
    words = ("bring-back", "{id}", "--to={block_device}", "{char_device}", "{server}", "{{id}}")

    async def test(bench: Bench) -> None:
        device = await bench.a_live_device(Feature.USER_RECOVERY)
        server = device.openers[0]
        bench.kernel.kill(server)
        command = await until_a_command_runs(bench)
        assert command.argv == ("bring-back", "0", "--to=/dev/ublkb0", "/dev/ublkc0", "/usr/bin/ublk.test", "{id}")
        told = {name.removeprefix("DUENDE_UBLKD_"): value for name, value in command.environment.items()}
        reason = told.pop("REASON")
        assert reason == "QUIESCED without a server: its I/O waits for a new server; attempt 1 of 5"
        assert told == {
            "PATH": recovery.PATH,
            "LANG": "C.UTF-8",
            "DEV_ID": "0",
            "BLOCK_DEVICE": "/dev/ublkb0",
            "CHAR_DEVICE": "/dev/ublkc0",
            "KERNEL_STATE": "QUIESCED",
            "FLAGS": "USER_RECOVERY",
            "ATTEMPT": "1",
            "ATTEMPTS": "5",
            "TIMEOUT_S": "30",
            "SERVER": "/usr/bin/ublk.test",
            "SERVER_PID": str(server.pid),
            "SERVER_COMM": "ublk.test",
            "SERVER_UNIT": "",
        }

    on_the_bench(test, recovering(deadline=2.0, command=words, attempts=5))


def test_a_server_that_comes_back_by_itself_before_the_deadline_needs_no_command() -> None:
    async def test(bench: Bench) -> None:
        device = await bench.an_unserved_device()
        await bench.wait(59)
        bench.kernel.recover(device, bench.kernel.process())
        await bench.wait(30)
        assert bench.verdict(device) is VerdictKind.RECOVERING
        await bench.wait(600)  # however long it takes
        assert bench.rule(device) == "taken-too-long"
        bench.kernel.finish_recovery(device)
        await bench.wait(3600)
        assert bench.verdict(device) is VerdictKind.LIVE
        assert bench.kernel.commands == []
        assert bench.recorder.announced == []

    on_the_bench(test, recovering())


@pytest.mark.parametrize("config", [Config(), recovering(), deleting()], ids=["alert", "recover", "delete"])
def test_servers_that_come_and_die_before_they_serve_are_told_of_once_and_no_deed_is_done_beside_them(
    config: Config,
) -> None:
    async def test(bench: Bench) -> None:
        device = await bench.an_unserved_device()
        died_at = bench.now
        for _ in range(60):
            await bench.wait(19)
            server = bench.kernel.process()
            bench.kernel.recover(device, server)
            await bench.wait(1)
            bench.kernel.kill(server)
        assert bench.rule(device) == "taken-in-vain"
        assert "servers have taken it and let go" in bench.reason(device)
        since = bench.reconciler.devices[device.dev_id].since
        assert since == pytest.approx(died_at, abs=1)
        alerts = [each.seen.at for each in bench.recorder.changed if each.verdict.action is Action.ALERT]
        assert len(alerts) <= 5  # until there were two, and they are shown as servers at work
        assert alerts[0] - died_at < 130
        assert bench.is_there(device)
        assert bench.kernel.commands == []
        assert bench.kernel.stops == []

    on_the_bench(test, config)


def test_a_server_that_comes_in_vain_once_does_not_have_somebody_called_before_the_command_has_run() -> None:
    async def test(bench: Bench) -> None:
        device = await bench.an_unserved_device()
        await bench.wait(50)
        server = bench.kernel.process()
        bench.kernel.recover(device, server)
        await bench.wait(5)
        bench.kernel.kill(server)
        await bench.wait(70)
        assert len(bench.kernel.commands) == 1
        assert bench.verdict(device) is VerdictKind.LIVE
        assert bench.alerts() == []

    on_the_bench(test, recovering())


def test_commands_that_take_the_device_in_vain_are_told_of_when_they_are_given_up_and_not_before() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = FakeCommand.take_and_hang
        device = await bench.an_unserved_device()
        await bench.wait(600)
        assert len(bench.kernel.commands) == 3
        assert bench.rule(device) == "given-up"
        (alert,) = bench.alerts()
        assert "recovery given up after 3 attempts" in alert

    on_the_bench(test, SOON)


@pytest.mark.parametrize("deadline", [2.0, 60.0])
def test_no_attempt_is_wasted_on_a_device_that_somebody_has_open_who_cannot_serve_it(deadline: float) -> None:
    async def test(bench: Bench) -> None:
        device = await bench.a_live_device(Feature.USER_RECOVERY)
        helper = bench.kernel.process("sleep")
        helper.has_ring = False
        server = device.openers[0]
        bench.kernel.share(device, helper)
        bench.kernel.settles_in = 0
        bench.kernel.kill(server)
        device.state = KernelState.QUIESCED  # as up to 6.14, where the ring's end is enough
        bench.agenda.soon(None)
        await bench.wait(44)
        assert bench.alerts() == []
        await bench.wait(40)
        assert bench.kernel.commands == []
        assert bench.rule(device) == "leaked-descriptor"
        (alert,) = bench.alerts()
        assert f"{helper.pid} (sleep) has its char device open" in alert
        bench.kernel.kill(helper)
        await bench.wait(5)
        assert len(bench.kernel.commands) == 1
        assert bench.verdict(device) is VerdictKind.LIVE

    on_the_bench(test, recovering(deadline=deadline))


class ServerInBetween(FakeKernel):
    """A server takes the device right after the look that finds its deadline over."""

    async def observe(self, dev_ids: Collection[int]) -> list[Observation]:
        seen = await super().observe(dev_ids)
        for instance in list(self.taken.values()):
            over = instance.unserved_since is not None and self._loop.time() >= instance.unserved_since + 2
            if over and not instance.openers and instance.disk:
                self._loop.call_later(0.0012, self._take, instance)
        return seen

    def _take(self, instance: Instance) -> None:
        if not instance.openers:
            self.recover(instance, self.process())


def test_a_server_that_opens_the_device_between_the_decision_and_the_command_is_seen_in_time() -> None:
    async def main() -> None:
        bench = Bench(SOON)
        bench.kernel.__class__ = ServerInBetween
        device = await bench.an_unserved_device()
        await bench.wait(30)
        assert bench.verdict(device) is VerdictKind.RECOVERING
        await bench.wait(600)
        assert bench.rule(device) == "taken-too-long"
        assert bench.kernel.commands == []
        assert bench.recorder.announced == []

    run(main())


def test_a_dry_run_says_once_that_it_would_recover_and_runs_nothing() -> None:
    async def test(bench: Bench) -> None:
        await bench.an_unserved_device()
        await bench.wait(3600)
        assert bench.kernel.commands == []
        assert bench.recorder.announced == []
        assert bench.recorder.outcomes == [Outcome.WOULD_RECOVER]
        assert bench.recorder.deeds[0].action is Action.RECOVER

    on_the_bench(test, replace(SOON, daemon=DaemonConfig(dry_run=True)))


def test_a_pass_that_looks_after_orphans_only_recovers_nothing() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        kernel, recorder = FakeKernel(loop), Recorder()
        reconciler = Reconciler(kernel, SOON, recorder, Agenda(), clock=loop.time, only_orphans=True)
        kernel.kill(kernel.serve(flags=Feature.USER_RECOVERY).openers[0])
        for _ in range(20):
            await asyncio.sleep(1)
            await reconciler.run_pass(None)
        await reconciler.finish_deeds()
        assert reconciler.devices[0].verdict.action is Action.RECOVER
        assert kernel.commands == []
        assert recorder.deeds == []

    run(main())


# --- what comes of it -------------------------------------------------------------------------------------------------


def test_a_server_in_the_foreground_is_kept_and_never_ended() -> None:
    async def test(bench: Bench) -> None:
        device = await bench.an_unserved_device()
        await bench.wait(3600)
        (command,) = bench.kernel.commands
        assert (command.kept, command.was_ended) == (True, False)
        assert bench.verdict(device) is VerdictKind.LIVE
        (deed,) = bench.recorder.deeds
        assert deed.outcome is Outcome.RECOVERED
        assert (deed.facts["attempt"], deed.facts["attempts"], deed.facts["status"]) == (1, 3, None)
        assert deed.reaction is not None
        assert 2 < deed.reaction < 3
        assert bench.alerts() == []

    on_the_bench(test, SOON)


def test_a_server_that_took_until_just_before_the_timeout_is_kept() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = lambda command: command.serve(within=29.99)
        await bench.an_unserved_device()
        await bench.wait(600)
        assert bench.recorder.outcomes == [Outcome.RECOVERED]
        assert bench.kernel.commands[0].kept

    on_the_bench(test, SOON)


@pytest.mark.parametrize("status", [0, 1])
def test_a_server_that_went_into_the_background_is_kept_whatever_its_parent_exits_with(status: int) -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = lambda command: command.serve_as_daemon(within=5, status=status)
        device = await bench.an_unserved_device()
        await bench.wait(600)
        (command,) = bench.kernel.commands
        assert (command.kept, command.was_ended) == (True, False)
        assert bench.recorder.outcomes == [Outcome.RECOVERED]
        assert bench.recorder.deeds[0].facts["status"] == status
        assert bench.verdict(device) is VerdictKind.LIVE

    on_the_bench(test, SOON)


def test_a_command_that_has_somebody_else_serve_and_exits_with_0_has_recovered_it() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = lambda command: command.ask_another(within=5)
        device = await bench.an_unserved_device()
        await bench.wait(600)
        assert bench.recorder.outcomes == [Outcome.RECOVERED]
        assert bench.verdict(device) is VerdictKind.LIVE

    on_the_bench(test, SOON)


def test_a_command_that_has_somebody_else_serve_is_waited_for_until_it_says_so_itself() -> None:
    def serve_first_and_exit_later(command: FakeCommand) -> None:
        command.ask_another(within=1, exits_after=5)

    async def test(bench: Bench) -> None:
        bench.kernel.on_command = serve_first_and_exit_later
        device = await bench.an_unserved_device()
        await bench.wait(600)
        assert not bench.kernel.commands[0].was_ended
        assert bench.recorder.outcomes == [Outcome.RECOVERED]
        assert bench.verdict(device) is VerdictKind.LIVE

    on_the_bench(test, SOON)


def test_a_failed_command_that_somebody_serves_after_is_not_called_a_failure() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = lambda command: command.ask_another(within=0.04, status=1)
        device = await bench.an_unserved_device()
        await bench.wait(600)
        assert bench.recorder.outcomes == [Outcome.RECOVERED_BY_ANOTHER]
        assert bench.verdict(device) is VerdictKind.LIVE
        assert bench.alerts() == []

    on_the_bench(test, SOON)


def test_a_command_that_exits_with_0_and_is_not_served_by_its_timeout_has_failed() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = lambda command: command.fail(status=0)
        await bench.an_unserved_device()
        command = await until_a_command_runs(bench)
        await bench.wait(29)
        assert bench.recorder.deeds == []
        await bench.wait(1.5)
        (deed,) = bench.recorder.deeds
        assert deed.outcome is None
        assert deed.detail == "not served after 30 s: the command exited with 0, saying: no backing file"
        assert deed.took == pytest.approx(30, abs=0.5)
        assert command.was_ended

    on_the_bench(test, SOON)


def test_a_command_that_fails_is_over_at_once_and_its_last_line_is_told() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = lambda command: command.fail(within=0.2, status=3)
        await bench.an_unserved_device()
        await until_a_command_runs(bench)
        await bench.wait(0.9)
        deed = bench.recorder.deeds[0]
        assert deed.outcome is None
        assert deed.detail == "the command exited with 3, saying: no backing file"
        assert deed.facts == {"attempt": 1, "attempts": 3, "status": 3, "output": "no backing file"}
        assert deed.took < 1

    on_the_bench(test, SOON)


@pytest.mark.parametrize("act", [FakeCommand.hang, FakeCommand.take_and_hang], ids=["idle", "with the device open"])
def test_a_command_that_hangs_is_ended_after_its_timeout(act: Callable[[FakeCommand], None]) -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = act
        device = await bench.an_unserved_device()
        command = await until_a_command_runs(bench)
        await bench.wait(29.5)
        assert bench.recorder.deeds == []
        assert bench.verdict(device) is VerdictKind.RECOVERING
        assert "(attempt 1 of 3) runs for" in bench.reason(device)
        await bench.wait(0.8)
        assert command.was_ended
        assert bench.recorder.deeds[0].detail == "not served after 30 s: the command was still running"
        assert device.openers == []

    on_the_bench(test, SOON)


def test_a_program_that_is_missing_fails_the_attempt_and_not_the_daemon() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = FakeCommand.fail_to_start
        await bench.an_unserved_device()
        await bench.wait(60)
        assert bench.recorder.outcomes == [None] * 3
        assert bench.recorder.deeds[0].detail == "bring-back: no such file"

    on_the_bench(test, SOON)


def test_a_command_whose_former_server_is_not_known_does_not_run_and_says_why() -> None:
    async def test(bench: Bench) -> None:
        device = bench.kernel.serve(flags=Feature.USER_RECOVERY)
        bench.kernel.kill(device.openers[0])  # before the first look at it
        await bench.wait(60)
        assert bench.kernel.commands == []
        assert bench.recorder.outcomes == [None] * 3
        detail = bench.recorder.deeds[0].detail
        assert detail == "the command cannot be filled in: what {server} stands for is not known"
        assert "given up after 3 attempts" in bench.reason(device)

    on_the_bench(test, recovering(deadline=2.0, command=("bring-back", "{server}")))


# --- how often --------------------------------------------------------------------------------------------------------


def test_the_attempts_are_apart_by_a_pause_that_doubles_give_or_take_a_quarter() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = lambda command: command.fail(within=0.0)
        await bench.an_unserved_device()
        await bench.wait(3600)
        gaps = [later.at - earlier.at for earlier, later in itertools.pairwise(bench.kernel.commands)]
        assert len(gaps) == 6
        for number, gap in enumerate(gaps):
            assert 0.75 * 4 * 2**number <= gap <= 1.25 * 4 * 2**number + 0.3

    on_the_bench(test, recovering(deadline=2.0, attempts=7, backoff=4.0))


def test_the_pause_has_bounds() -> None:
    rule = a_recovery(backoff=4.0)
    assert [recovery.pause_after(attempt, rule, 0.5) for attempt in (1, 2, 3)] == [4, 8, 16]
    assert (recovery.pause_after(1, rule, 0.0), recovery.pause_after(1, rule, 1.0)) == (3, 5)
    assert recovery.pause_after(100, rule, 0.5) == recovery.LONGEST_BACKOFF
    assert recovery.pause_after(10_000, rule, 1.0) <= recovery.LONGEST_BACKOFF * 1.25
    assert recovery.pause_after(0, rule, 0.5) == 4
    assert recovery.pause_after(5, a_recovery(backoff=0.0), 1.0) == 0


def test_when_the_attempts_are_used_up_somebody_is_called_once_and_nothing_runs_any_more() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = FakeCommand.fail
        device = await bench.an_unserved_device()
        await bench.wait(60)
        assert bench.rule(device) == "given-up"
        told = bench.recorder.told()
        await bench.wait(6 * 3600)
        assert len(bench.kernel.commands) == 3
        (reason,) = bench.alerts()
        assert "recovery given up after 3 attempts: the command exited with 1, saying: no backing file" in reason
        assert bench.recorder.told() == told

    on_the_bench(test, SOON)


def test_a_release_lets_it_try_anew() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = FakeCommand.fail
        device = await bench.an_unserved_device()
        await bench.wait(60)
        assert bench.rule(device) == "given-up"
        bench.kernel.on_command = FakeCommand.serve
        assert bench.reconciler.release(device.dev_id) == (None, 3, "")
        await bench.wait(1)
        assert bench.verdict(device) is VerdictKind.LIVE
        assert bench.recorder.deeds[-1].facts["attempt"] == 1

    on_the_bench(test, SOON)


def test_a_server_that_dies_again_each_time_uses_the_attempts_up() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = dies_after(3)
        device = await bench.an_unserved_device()
        await bench.wait(3600)
        assert bench.recorder.outcomes == [Outcome.RECOVERED] * 4
        assert len(bench.kernel.commands) == 4
        assert bench.rule(device) == "given-up"
        (reason,) = bench.alerts()
        assert "given up after 4 attempts: it was served again each time, and never for long" in reason

    on_the_bench(test, recovering(deadline=2.0, attempts=4))


@pytest.mark.parametrize(("served_for", "attempt"), [(299, 3), (302, 1)])
def test_stable_service_has_earlier_attempts_forgotten_and_shorter_service_does_not(
    served_for: float, attempt: int
) -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = dies_after(3)
        await bench.an_unserved_device()
        await until_a_command_runs(bench)
        bench.kernel.on_command = dies_after(served_for)
        await until_a_command_runs(bench, 2)
        bench.kernel.on_command = FakeCommand.serve
        await bench.wait(served_for + 60)
        assert [deed.facts["attempt"] for deed in bench.recorder.deeds] == [1, 2, attempt]

    on_the_bench(test, recovering(deadline=2.0, stable=300.0))


def test_a_moment_without_an_answer_has_no_attempt_forgotten_where_the_policy_depends_on_that_answer() -> None:
    policy = recovering(deadline=2.0).policy
    table = Table(Match(owner_uid=0), policy, "device[0]")

    async def test(bench: Bench) -> None:
        bench.kernel.on_command = dies_after(3)
        device = await bench.an_unserved_device()
        for _ in range(200):
            await bench.wait(1.5)
            if device.openers:
                bench.kernel.troubles[device.dev_id] = "input/output error"
                bench.agenda.soon(device.dev_id)
                await bench.wait(0.1)
                bench.kernel.troubles.clear()
                bench.agenda.soon(device.dev_id)
        assert len(bench.kernel.commands) == 3
        assert bench.rule(device) == "given-up"

    on_the_bench(test, Config(devices=(table,)))


def test_a_moment_without_an_answer_does_not_interrupt_service() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = dies_after(3)
        device = await bench.an_unserved_device()
        await until_a_command_runs(bench)
        bench.kernel.on_command = dies_after(400)
        await until_a_command_runs(bench, 2)
        await bench.wait(200)
        bench.kernel.troubles[device.dev_id] = "input/output error"
        bench.agenda.soon(device.dev_id)
        await bench.wait(0.1)
        assert bench.verdict(device) is VerdictKind.UNKNOWN
        bench.kernel.troubles.clear()
        bench.kernel.on_command = FakeCommand.serve
        await bench.wait(210)
        assert [deed.facts["attempt"] for deed in bench.recorder.deeds] == [1, 2, 1]

    on_the_bench(test, recovering(deadline=2.0, stable=300.0))


def test_a_release_while_the_command_runs_forgets_nothing() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = lambda command: command.fail(within=5)
        device = await bench.an_unserved_device()
        await until_a_command_runs(bench)
        await bench.wait(1)
        assert bench.reconciler.release(device.dev_id) == (None, 0, "")
        await bench.wait(1)
        assert bench.rule(device) == "recovery-runs"
        await until_a_command_runs(bench, 2)
        await bench.wait(6)
        assert [deed.facts["attempt"] for deed in bench.recorder.deeds] == [1, 2]

    on_the_bench(test, SOON)


# --- others -----------------------------------------------------------------------------------------------------------


def test_a_server_that_is_quicker_than_the_running_command_stays_and_the_command_is_ended() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = FakeCommand.hang
        device = await bench.an_unserved_device()
        command = await until_a_command_runs(bench)
        await bench.wait(3)
        other = bench.kernel.process()
        bench.kernel.recover(device, other)
        bench.kernel.finish_recovery(device)
        await bench.wait(40)
        assert command.was_ended
        assert bench.recorder.outcomes == [Outcome.RECOVERED_BY_ANOTHER]
        assert bench.recorder.deeds[0].detail == f"by {other.as_seen()}, not by the command"
        assert device.openers == [other]
        await bench.wait(3600)
        assert len(bench.kernel.commands) == 1

    on_the_bench(test, SOON)


@pytest.mark.parametrize("again", [False, True], ids=["deleted", "added again"])
def test_a_command_whose_device_is_deleted_meanwhile_is_left_alone_and_so_is_the_next_device(again: bool) -> None:  # noqa: FBT001
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = FakeCommand.hang
        device = await bench.an_unserved_device()
        command = await until_a_command_runs(bench)
        bench.kernel.delete(device)
        second = bench.kernel.serve(dev_id=device.dev_id, flags=Feature.USER_RECOVERY) if again else None
        await bench.wait(29)
        assert (command.left, command.kept, command.is_over) == (True, False, False)
        assert bench.recorder.outcomes == [None]
        assert "the command is left to itself until its time is over" in bench.recorder.deeds[0].detail
        await bench.wait(90)
        assert command.is_over
        assert bench.kernel.deletions == []
        assert len(bench.kernel.commands) == 1
        if second:
            assert bench.is_there(second)
            assert bench.verdict(second) is VerdictKind.LIVE
            assert bench.reconciler.devices[second.dev_id].trail == NO_TRAIL

    on_the_bench(test, SOON)


def test_a_command_is_left_alone_when_nobody_can_tell_what_became_of_its_device() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = FakeCommand.hang
        device = await bench.an_unserved_device()
        command = await until_a_command_runs(bench)
        bench.kernel.unanswered.add(device.dev_id)
        await bench.wait(29)
        assert (command.left, command.kept, command.is_over) == (True, False, False)
        assert bench.verdict(device) is VerdictKind.WEDGED
        assert bench.recorder.outcomes == [None]
        await bench.wait(3600)
        assert len(bench.kernel.commands) == 1

    on_the_bench(test, SOON)


def test_a_command_is_left_alone_while_the_control_device_is_gone() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = FakeCommand.hang
        await bench.an_unserved_device()
        command = await until_a_command_runs(bench)
        await bench.wait(1)
        bench.kernel.unavailable = True
        await bench.wait(28)
        assert (command.left, command.kept, command.is_over) == (True, False, False)
        detail = bench.recorder.deeds[0].detail
        assert "nobody can tell whether it serves" in detail
        assert "the command is left to itself until its time is over" in detail

    on_the_bench(test, SOON)


class BlindSweep(FakeKernel):
    """The sweep for users fails once a command has exited."""

    async def look_for_users(self, *arguments: Any) -> Any:  # noqa: ANN401 - passed on
        if any(each._ended.done() for each in self.commands):
            raise OSError(24, "Too many open files")
        return await super().look_for_users(*arguments)


def test_a_command_is_left_alone_when_nobody_can_tell_whether_its_child_has_taken_the_device() -> None:
    async def main() -> None:
        bench = Bench(SOON)
        bench.kernel.__class__ = BlindSweep
        bench.kernel.on_command = lambda command: command.serve_as_daemon(within=5, status=1)
        await bench.an_unserved_device()
        command = await until_a_command_runs(bench)
        await bench.wait(60)
        assert (command.left or command.kept, command.was_ended, command.is_over) == (True, False, False)
        assert "Too many open files" in bench.recorder.deeds[0].detail

    run(main())


def test_so_many_commands_run_at_once_and_the_others_wait_for_their_turn() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = lambda command: command.serve(within=20)
        devices = [await bench.a_live_device(Feature.USER_RECOVERY) for _ in range(MOST_RECOVERIES + 3)]
        for each in devices:
            bench.kernel.kill(each.openers[0])
        await bench.wait(10)
        assert len(bench.kernel.commands) == MOST_RECOVERIES
        taken_meanwhile = devices[-1]
        bench.kernel.recover(taken_meanwhile, bench.kernel.process())
        bench.kernel.finish_recovery(taken_meanwhile)
        await bench.wait(60)
        assert {bench.verdict(each) for each in devices} == {VerdictKind.LIVE}
        assert sorted(each.dev_id for each in bench.kernel.commands) == [each.dev_id for each in devices[:-1]]

    on_the_bench(test, SOON)


def test_a_device_that_waits_for_its_turn_waits_once_however_often_it_is_looked_at() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = FakeCommand.hang
        for each in [await bench.a_live_device(Feature.USER_RECOVERY) for _ in range(MOST_RECOVERIES + 3)]:
            bench.kernel.kill(each.openers[0])
        await bench.wait(5)
        under_way = len(asyncio.all_tasks())
        await bench.wait(20)
        assert len(bench.kernel.commands) == MOST_RECOVERIES
        assert len(asyncio.all_tasks()) <= under_way

    on_the_bench(test, SOON)


def test_orphans_are_deleted_while_commands_run() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = FakeCommand.hang
        device = await bench.an_unserved_device()
        await until_a_command_runs(bench)
        orphan = await bench.an_orphan()
        await bench.wait(1)
        assert not bench.is_there(orphan)
        assert bench.verdict(device) is VerdictKind.RECOVERING

    on_the_bench(test, SOON)


# --- another daemon ---------------------------------------------------------------------------------------------------


def test_what_deletes_on_a_persons_word_stops_no_device_whose_recovery_runs() -> None:
    wanted = Policy(orphaned=OnOrphan.DELETE, unserved=OnUnserved.DELETE, recovery_deadline=0.0)

    async def test(bench: Bench) -> None:
        device = await bench.an_unserved_device()
        bench.kernel.on_command = lambda command: command.serve(within=10)
        await until_a_command_runs(bench)
        await bench.wait(1)
        other = bench.another_reconciler(Config(policy=wanted), Recorder())
        await other.run_pass({device.dev_id}, thorough=True)
        await other.finish_deeds()
        assert other.devices[device.dev_id].verdict.rule == "recovery-runs"
        assert bench.kernel.stops == []
        await bench.wait(60)
        assert bench.recorder.outcomes == [Outcome.RECOVERED]

    on_the_bench(test, SOON)


def test_what_deletes_on_a_persons_word_stops_no_device_whose_command_was_left_alone_and_may_still_run() -> None:
    wanted = Policy(orphaned=OnOrphan.DELETE, unserved=OnUnserved.DELETE, recovery_deadline=0.0)

    async def test(bench: Bench) -> None:
        device = await bench.an_unserved_device()
        bench.kernel.on_command = lambda command: command.serve(within=10)
        command = await until_a_command_runs(bench)
        bench.kernel.troubles[device.dev_id] = "input/output error"
        await bench.wait(1)
        bench.kernel.troubles.clear()
        assert command.left
        other = bench.another_reconciler(Config(policy=wanted), Recorder())
        await other.run_pass({device.dev_id}, thorough=True)
        await other.finish_deeds()
        assert other.devices[device.dev_id].verdict.rule == "not-yet-given-up"
        assert "a recovery command may still run" in other.devices[device.dev_id].verdict.reason
        assert bench.kernel.stops == []

    on_the_bench(test, SOON)


def test_what_deletes_on_a_persons_word_stops_a_device_whose_recovery_was_given_up() -> None:
    wanted = Policy(orphaned=OnOrphan.DELETE, unserved=OnUnserved.DELETE, recovery_deadline=0.0)

    async def test(bench: Bench) -> None:
        bench.kernel.on_command = FakeCommand.fail
        bench.kernel.recovery_deadline = 0.0
        device = await bench.an_unserved_device()
        await bench.wait(60)
        other = bench.another_reconciler(Config(policy=wanted), Recorder())
        await other.run_pass({device.dev_id}, thorough=True)
        await other.finish_deeds()
        assert bench.kernel.stops == [device]

    on_the_bench(test, SOON)


@pytest.mark.parametrize(("deadline", "watched"), [(60.0, 5.0), (2.0, 2.0)])
def test_a_device_that_is_due_when_a_daemon_starts_is_watched_for_a_moment_before_its_command_runs(
    deadline: float, watched: float
) -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = FakeCommand.fail
        device = await bench.an_unserved_device()
        await bench.wait(deadline - 1)
        await bench.restart()
        began = bench.now
        await bench.wait(1.5)
        assert bench.rule(device) == "deadline-open"
        command = await until_a_command_runs(bench)
        assert watched <= command.at - began < watched + 0.2

    on_the_bench(test, recovering(deadline=deadline))


def test_a_server_that_comes_back_right_after_the_daemon_has_started_needs_no_command() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = FakeCommand.fail
        device = await bench.an_unserved_device()
        await bench.wait(59)
        await bench.restart()
        await bench.wait(4)
        bench.kernel.recover(device, bench.kernel.process())
        await bench.wait(1)
        bench.kernel.finish_recovery(device)
        await bench.wait(60)
        assert bench.kernel.commands == []

    on_the_bench(test, recovering(deadline=60.0))


def test_the_daemons_end_leaves_the_command_to_itself_and_the_next_daemon_finds_it_serving() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = lambda command: command.serve(within=20)
        device = await bench.an_unserved_device()
        command = await until_a_command_runs(bench)
        await bench.restart()
        await bench.wait(3600)
        assert (command.was_ended, command.is_over) == (False, False)
        assert bench.verdict(device) is VerdictKind.LIVE
        assert bench.kernel.commands == [command]
        assert bench.recorder.deeds == []  # nobody has watched it to its end

    on_the_bench(test, SOON)


def test_the_next_daemon_runs_no_second_command_before_the_limit_of_the_first_and_counts_that_one() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = FakeCommand.hang
        device = await bench.an_unserved_device()
        command = await until_a_command_runs(bench)
        await bench.wait(5)
        await bench.restart()
        await bench.wait(6)
        assert bench.rule(device) == "backoff"
        assert "attempt 1 of 3: the daemon ended during attempt 1" in bench.reason(device)
        bench.kernel.on_command = FakeCommand.serve
        second = await until_a_command_runs(bench, 2)
        assert 30 <= second.at - command.at - OVERRUN < 31
        assert second.environment["DUENDE_UBLKD_ATTEMPT"] == "2"

    on_the_bench(test, SOON)


def test_attempts_that_a_former_daemon_used_up_stay_used_up() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = FakeCommand.fail
        device = await bench.an_unserved_device()
        await bench.wait(60)
        for _ in range(3):
            await bench.restart()
            await bench.wait(600)
        assert bench.rule(device) == "given-up"
        assert len(bench.kernel.commands) == 3

    on_the_bench(test, SOON)


def test_a_release_while_the_command_of_a_former_daemon_may_still_run_starts_no_second_one_beside_it() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = FakeCommand.hang
        device = await bench.an_unserved_device()
        command = await until_a_command_runs(bench)
        await bench.wait(5)
        await bench.restart()
        await bench.wait(1)
        bench.reconciler.release(device.dev_id)
        second = await until_a_command_runs(bench, 2)
        assert second.at - command.at >= 30

    on_the_bench(test, SOON)


def test_a_command_that_was_left_alone_is_given_its_time_before_another_one_runs() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = FakeCommand.hang
        device = await bench.an_unserved_device()
        command = await until_a_command_runs(bench)
        await bench.wait(1)
        bench.kernel.troubles[device.dev_id] = "input/output error"
        await bench.wait(1)
        bench.kernel.troubles.clear()
        await bench.wait(27)
        assert not command.is_over
        second = await until_a_command_runs(bench, 2)
        assert 30 <= second.at - command.at < 31
        assert command.is_over

    on_the_bench(test, SOON)


def test_a_command_that_was_left_alone_and_takes_the_device_before_its_limit_goes_on() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = lambda command: command.serve(within=20)
        device = await bench.an_unserved_device()
        command = await until_a_command_runs(bench)
        await bench.wait(1)
        bench.kernel.troubles[device.dev_id] = "input/output error"
        await bench.wait(1)
        assert command.left
        bench.kernel.troubles.clear()
        await bench.wait(3600)
        assert not command.is_over
        assert bench.verdict(device) is VerdictKind.LIVE
        assert bench.kernel.commands == [command]

    on_the_bench(test, SOON)


@pytest.mark.parametrize("blind", [False, True], ids=["seen", "unseen"])
def test_a_command_that_does_not_die_has_none_beside_it_and_each_refusal_is_told_and_counts(blind: bool) -> None:  # noqa: FBT001
    def never_die(command: FakeCommand) -> None:
        command.is_undying = True
        command.hang()

    async def test(bench: Bench) -> None:
        bench.kernel.on_command = never_die
        bench.kernel.sees_everything = not blind
        device = await bench.an_unserved_device()
        command = await until_a_command_runs(bench)
        await bench.wait(200)
        assert bench.kernel.commands == [command]
        assert not command.is_over
        first, *others = [deed.detail for deed in bench.recorder.deeds]
        died_not = f"pid {command.process.pid} (bring-back) did not die of SIGKILL in time"
        assert first == f"not served after 30 s: the command was still running; {died_not}"
        still = f"the former recovery command of ublk{device.dev_id} (pid {command.process.pid}) still runs"
        assert others == [still] * 2
        assert [deed.facts["attempt"] for deed in bench.recorder.deeds] == [1, 2, 3]
        assert bench.rule(device) == "given-up"

    on_the_bench(test, SOON)


def test_a_command_that_fails_and_leaves_what_does_not_die_is_given_its_time_before_another_attempt() -> None:
    def leave_a_child(command: FakeCommand) -> None:
        command.children.append(command.kernel.process("child"))
        command.is_undying = True
        command.fail()

    async def test(bench: Bench) -> None:
        bench.kernel.on_command = leave_a_child
        device = await bench.an_unserved_device()
        command = await until_a_command_runs(bench)
        await bench.wait(29)
        (deed,) = bench.recorder.deeds
        child = f"pid {command.children[0].pid} (child) did not die of SIGKILL in time"
        assert deed.detail == f"the command exited with 1, saying: no backing file; {child}"
        assert bench.rule(device) == "backoff"
        await bench.wait(5)
        assert len(bench.recorder.deeds) == 2

    on_the_bench(test, SOON)


@pytest.mark.parametrize("within", [30.5, 31.9])
def test_a_server_that_is_done_while_its_command_is_being_ended_lives(within: float) -> None:
    def serve_late(command: FakeCommand) -> None:
        command.ignores_sigterm = True
        command.serve(within=within)

    async def test(bench: Bench) -> None:
        bench.kernel.on_command = serve_late
        device = await bench.an_unserved_device()
        await bench.wait(3600)
        (command,) = bench.kernel.commands
        assert (command.kept, command.is_over) == (True, False)
        assert bench.recorder.outcomes == [Outcome.RECOVERED]
        assert bench.verdict(device) is VerdictKind.LIVE

    on_the_bench(test, SOON)


def test_a_command_that_ignores_sigterm_and_is_not_done_is_killed() -> None:
    def serve_too_late(command: FakeCommand) -> None:
        command.ignores_sigterm = True
        command.serve(within=33)

    async def test(bench: Bench) -> None:
        bench.kernel.on_command = serve_too_late
        await bench.an_unserved_device()
        command = await until_a_command_runs(bench)
        await bench.wait(32.5)
        assert command.is_over
        assert bench.recorder.deeds[0].detail == "not served after 30 s: the command was still running"

    on_the_bench(test, SOON)


def test_a_command_is_spared_when_nobody_can_see_any_more_what_comes_of_it_while_it_is_being_ended() -> None:
    def serve_late(command: FakeCommand) -> None:
        command.ignores_sigterm = True
        command.serve(within=31)

    async def test(bench: Bench) -> None:
        bench.kernel.on_command = serve_late
        await bench.an_unserved_device()
        command = await until_a_command_runs(bench)
        await bench.wait(30.5)
        assert command.was_ended
        bench.kernel.unavailable = True
        await bench.wait(10)
        assert not command.is_over
        assert command.left or command.kept
        (deed,) = bench.recorder.deeds
        assert "nobody can tell whether it serves" in deed.detail

    on_the_bench(test, SOON)


def test_a_server_that_nobody_can_see_is_kept_with_its_command_and_never_ended() -> None:
    def serve_unseen(command: FakeCommand) -> None:
        command.process.visible = False  # a descriptor that is registered with a ring, and closed
        command.serve()

    async def test(bench: Bench) -> None:
        bench.kernel.on_command = serve_unseen
        device = await bench.an_unserved_device()
        await bench.wait(3600)
        (command,) = bench.kernel.commands
        assert (command.kept, command.was_ended, command.is_over) == (True, False, False)
        (deed,) = bench.recorder.deeds
        assert (deed.outcome, deed.detail) == (Outcome.RECOVERED, "who serves it cannot be seen")
        assert bench.verdict(device) is VerdictKind.LIVE

    on_the_bench(test, SOON)


def test_a_hold_that_comes_before_a_child_has_taken_the_order_is_heeded_and_told() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.child_takes = 5.0
        device = await bench.an_unserved_device()
        while not bench.recorder.announced:
            await bench.wait(0.005)
        await bench.wait(4.5)
        bench.hold(device, 3600)
        await bench.wait(3000)
        assert bench.kernel.commands == []
        assert [deed.detail for deed in bench.recorder.deeds] == ["not done: it is on hold now"]
        assert bench.rule(device) == "on-hold"

    on_the_bench(test, SOON)


def test_the_time_of_a_command_counts_from_its_start() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.child_takes = 5.0
        bench.kernel.on_command = lambda command: command.serve(within=2.9)
        device = await bench.an_unserved_device()
        await bench.wait(15)
        assert bench.recorder.outcomes == [Outcome.RECOVERED]
        assert bench.verdict(device) is VerdictKind.LIVE

    on_the_bench(test, recovering(deadline=2.0, timeout=3.0))


def test_the_limit_that_the_next_daemon_waits_for_counts_from_the_start_too() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.child_takes = 5.0
        bench.kernel.on_command = FakeCommand.hang
        ledger = bench.reconciler.ledger
        kept: list[Any] = []
        ledger.keep = lambda dev_id: kept.append(ledger.to_record(dev_id))
        device = await bench.an_unserved_device()
        command = await until_a_command_runs(bench)
        await bench.wait(1)
        assert bench.reconciler.devices[device.dev_id].trail.limit == pytest.approx(command.at + 30, abs=0.01)
        assert kept[-1]["trail"]["limit"] == pytest.approx(command.at + 30, abs=0.01)

    on_the_bench(test, SOON)


def test_a_reload_that_takes_the_command_away_is_heeded_by_whoever_waits_for_a_turn() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = FakeCommand.hang
        for each in [await bench.a_live_device(Feature.USER_RECOVERY) for _ in range(MOST_RECOVERIES + 2)]:
            bench.kernel.kill(each.openers[0])
        await bench.wait(10)
        bench.reconciler.config = Config(policy=Policy(unserved=OnUnserved.ALERT))
        await bench.wait(10 * RESYNC)
        assert len(bench.kernel.commands) == MOST_RECOVERIES

    on_the_bench(test, SOON)


def test_whoever_waits_for_a_turn_runs_the_command_of_the_configuration_of_that_moment() -> None:
    async def test(bench: Bench) -> None:
        bench.kernel.on_command = FakeCommand.hang
        for each in [await bench.a_live_device(Feature.USER_RECOVERY) for _ in range(MOST_RECOVERIES + 2)]:
            bench.kernel.kill(each.openers[0])
        await bench.wait(10)
        bench.reconciler.config = recovering(deadline=2.0, command=("another", "{id}"))
        await bench.wait(60)
        assert {each.argv[0] for each in bench.kernel.commands[MOST_RECOVERIES:]} == {"another"}

    on_the_bench(test, SOON)
