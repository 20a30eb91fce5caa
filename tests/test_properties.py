"""Any history whatever of devices, servers, holders, holds and daemons: nothing in use is deleted, no orphan stays.

The fake kernel takes down whatever speaks against a deed: a server, a holder, a deadline or a hold that is not over, a
recovery command for a device that is served, two of them at once for one device. `TestErrors` has the kernel answer
whatever it is asked with any errno, in such histories; another test goes through all of them one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from duende_ublkd.core.config import Config, OnUnserved, Policy, Recovery
from duende_ublkd.core.errors import BusyError
from duende_ublkd.core.holds import Hold
from duende_ublkd.core.model import Action, Feature, Holder, Judged, KernelState, Outcome, PassReport
from duende_ublkd.core.policy import Traits
from duende_ublkd.reconcile import Agenda, Reconciler
from tests.fake_kernel import ERRNOS, Error, FakeCommand, FakeKernel, Fault, Instance, Step, VirtualLoop

if TYPE_CHECKING:
    from collections.abc import Callable

# The same histories on every machine; `HYPOTHESIS_PROFILE=search` goes looking for new ones.
settings.register_profile("ci", max_examples=250, stateful_step_count=40, deadline=None, derandomize=True)
settings.register_profile("search", max_examples=20_000, stateful_step_count=60, deadline=None, print_blob=True)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

RESYNC = Config().daemon.resync_interval
LONGEST_WAIT = 300 + 10 * RESYNC  # seconds: the longest pause after a failed deletion, and some full looks
PLAIN = 0
QUEUEING = int(Feature.USER_RECOVERY)
FAILING = int(Feature.USER_RECOVERY | Feature.USER_RECOVERY_FAIL_IO)
UNPRIVILEGED = int(Feature.UNPRIVILEGED_DEV)
DEADLINE = 5.0  # for a new server
RULE = Recovery(("bring-back", "{id}"), timeout=8.0, attempts=3, backoff=0.5, stable=60.0)
COMMON_ERRNOS = (
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EAGAIN,
    errno.EINTR,
    errno.EIO,
    errno.EPERM,
    errno.ENODEV,
)
which = st.integers(min_value=0, max_value=5)


class Checking:
    """A reporter that takes the daemon at its word: what it says was deleted, it has sent a command for."""

    def __init__(self, kernel: FakeKernel) -> None:
        self._kernel = kernel
        self._sent_before: dict[int, int] = {}

    def intends(self, device: Judged) -> None:
        dev_id = device.seen.dev_id
        if device.verdict.action is Action.DELETE:
            self._sent_before[dev_id] = self._kernel.deletions_sent[dev_id]

    def passed(self, report: PassReport) -> None:
        for deed in report.deeds:
            if deed.outcome in (Outcome.DELETED, Outcome.DELETED_STILL_HELD):
                sent = self._kernel.deletions_sent[deed.dev_id] - self._sent_before[deed.dev_id]
                assert sent, f"ublk{deed.dev_id} is said to be {deed.outcome}, and no command was sent: {deed.detail}"


class Daemon:
    """One life of the daemon's loop, without its pages and signals."""

    def __init__(self, loop: VirtualLoop, kernel: FakeKernel, former: Daemon | None = None) -> None:
        """`former`: whose configuration, holds and records it goes on with."""
        self._agenda = Agenda(loop)
        self._reconciler = Reconciler(kernel, Config(), Checking(kernel), self._agenda, clock=loop.time)
        self._found: dict[int, Any] = {}
        if former:
            self._take_over(former, kernel)
        self.task = loop.create_task(self._run())
        kernel.hint = self._agenda.soon
        kernel.on_late = self._on_late

    def _take_over(self, former: Daemon, kernel: FakeKernel) -> None:
        self.configure(former._reconciler.config)
        for hold in former._reconciler.holds.all():
            self._reconciler.hold(hold)
        self._found = former.records
        for dev_id, record in self._found.items():
            ledger = self._reconciler.ledger
            ledger.remember(dev_id, json.loads(json.dumps(record)))
            hand = ledger.hand_of_former(dev_id)
            if hand and not kernel.watch_former(dev_id, hand):
                ledger.note_answer(dev_id, "STOP_DEV")

    def configure(self, config: Config) -> None:
        self._reconciler.config = config

    def hold(self, hold: Hold) -> None:
        self._reconciler.hold(hold)

    def release(self, dev_id: int) -> None:
        self._reconciler.release(dev_id)

    @property
    def records(self) -> dict[int, Any]:
        """What is written down: also what a daemon that was killed before its first look has found so."""
        ledger = self._reconciler.ledger
        return self._found | {dev_id: record for dev_id in ledger.ids() if (record := ledger.to_record(dev_id))}

    async def _run(self) -> None:
        self._agenda.soon(None)
        while True:
            dev_ids = await self._agenda.next()
            await self._reconciler.run_pass(dev_ids)
            if dev_ids is None:
                self._agenda.later(None, RESYNC)

    def _on_late(self, command: str, dev_id: int) -> None:
        self._reconciler.ledger.note_answer(dev_id, command)
        self._agenda.soon(dev_id)

    async def die(self) -> None:
        """As with SIGKILL: whatever was under way ends where it is."""
        reconciler = self._reconciler
        tasks = [self.task, *reconciler._deletions.values(), *reconciler._recoveries.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def is_deletable(instance: Instance) -> bool:
    return (
        instance.listed
        and not instance.openers
        and instance.state == KernelState.DEAD
        and instance.disk is None
        and instance.has_node
    )


def is_served(instance: Instance) -> bool:
    return instance.state == KernelState.LIVE and bool(instance.openers)


def is_unserved(instance: Instance) -> bool:
    """By its state; a new server may have it open."""
    return instance.listed and instance.state in (KernelState.QUIESCED, KernelState.FAIL_IO)


def _serve_and_die(command: FakeCommand) -> None:
    command.serve()
    command.kernel._loop.call_later(3.2, command.exit, 1)


def _go_to_the_background_and_fail(command: FakeCommand) -> None:
    command.serve_as_daemon(status=1)


def _say_that_all_is_well(command: FakeCommand) -> None:
    command.fail(status=0)


def _serve_unseen(command: FakeCommand) -> None:
    command.process.visible = False
    command.serve()


def _serve_while_being_ended(command: FakeCommand) -> None:
    command.ignores_sigterm = True
    command.serve(within=RULE.timeout + 1.0)


def _never_die(command: FakeCommand) -> None:
    command.is_undying = True
    command.hang()


WHAT_COMMANDS_DO = (
    FakeCommand.serve,
    FakeCommand.serve_as_daemon,
    FakeCommand.ask_another,
    FakeCommand.fail,
    FakeCommand.fail_to_start,
    FakeCommand.hang,
    FakeCommand.take_and_hang,
    _serve_and_die,
    _go_to_the_background_and_fail,
    _say_that_all_is_well,
    _serve_unseen,
    _serve_while_being_ended,
    _never_die,
)


def happens_to(
    wanted: Callable[[Instance], bool], **arguments: st.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A rule for one of the devices that fit; it waits until there is one."""

    def fitting(machine: Histories) -> list[Instance]:
        return [instance for instance in machine.kernel.taken.values() if wanted(instance)]

    def decorate(event: Callable[..., None]) -> Callable[..., None]:
        def happen(machine: Histories, number: int, **chosen: Any) -> None:  # noqa: ANN401 - whatever the event takes
            devices = fitting(machine)
            event(machine, devices[number % len(devices)], **chosen)

        happen.__name__ = event.__name__
        ruled: Callable[..., None] = rule(number=which, **arguments)(happen)  # type: ignore[call-overload]  # an event may take anything
        return precondition(lambda machine: bool(fitting(machine)))(ruled)

    return decorate


class Histories(RuleBasedStateMachine):
    """Each rule is something that servers, administrators, kernels or bad luck do; the daemon runs all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.kernel = FakeKernel(self.loop)
        self.daemon = Daemon(self.loop, self.kernel)
        self.gives_up = False

    def teardown(self) -> None:
        try:
            self.everybody_comes_to_rest()
            alive = [each for each in self.kernel.taken.values() if each.listed and not self.may_go(each)]
            self.loop.run_until_complete(asyncio.sleep(LONGEST_WAIT))
            self.nothing_in_use_was_touched()
            self.the_daemon_runs()
            left = list(self.kernel.taken.values())
            assert [each for each in left if is_deletable(each)] == [], "an orphan is left"
            assert [each for each in left if self.has_to_be_given_up(each)] == [], (
                "its deadline is over, and it is left"
            )
            assert [each for each in left if not each.listed and not each.openers] == [], "an id is left"
            assert [each for each in alive if each not in left] == [], "somebody's device is gone"
        finally:
            self.loop.run_until_complete(self.daemon.die())
            self.loop.close()

    def may_go(self, instance: Instance) -> bool:
        """Nobody may complain when it is deleted."""
        return is_deletable(instance) or (self.gives_up and is_unserved(instance) and not instance.openers)

    def has_to_be_given_up(self, instance: Instance) -> bool:
        held = instance.openers or instance.holders or instance.disk is None or not instance.has_node
        return self.gives_up and is_unserved(instance) and not held

    def everybody_comes_to_rest(self) -> None:
        """No hint helps from now on, and nothing else happens."""
        kernel = self.kernel
        kernel.hints_lost = True
        kernel.unavailable = kernel.looks_are_overdue = False
        kernel.sees_everything = True
        kernel.troubles.clear()
        kernel.faults.clear()
        kernel.errors.clear()
        self.loop.run_until_complete(asyncio.sleep(60))  # what is under way meets its deadline or its end
        for instance in list(kernel.taken.values()):
            if instance.overdue:
                kernel.answer(instance, works=False)
            if not instance.answer_is_heard:  # a person has looked at it
                self.daemon.release(instance.dev_id)
            instance.hidden_holder = False
            if instance.disk is None:
                kernel.let_go(instance)

    # The daemon's promises

    @invariant()
    def nothing_in_use_was_touched(self) -> None:
        assert self.kernel.violations == [], self.kernel.violations

    @invariant()
    def the_daemon_runs(self) -> None:
        if self.daemon.task.done():
            self.daemon.task.result()

    # Kernels, and what goes wrong with them

    @initialize(
        generation=st.sampled_from([(True, True), (False, True), (False, False)]),
        settles_in=st.sampled_from([0.05, 0.7, 29.0]),
        disk_goes_first=st.booleans(),
        believes_in_async=st.booleans(),
        unserved=st.sampled_from(OnUnserved),
        does=st.sampled_from(WHAT_COMMANDS_DO),
        first=st.lists(st.sampled_from([PLAIN, QUEUEING, FAILING]), min_size=1, max_size=3),
    )
    def boot(
        self,
        generation: tuple[bool, bool],
        settles_in: float,
        *,
        disk_goes_first: bool,
        believes_in_async: bool,
        unserved: OnUnserved,
        does: Callable[[FakeCommand], None],
        first: list[int],
    ) -> None:
        """`first`: flags of devices whose server the daemon sees, and sees die."""
        self.kernel.on_command = does
        recover = RULE if unserved is OnUnserved.RECOVER else None
        self.daemon.configure(Config(policy=Policy(unserved=unserved, recovery_deadline=DEADLINE, recover=recover)))
        self.gives_up = unserved is OnUnserved.DELETE
        self.kernel.recovery_deadline = DEADLINE if self.gives_up else None
        self.kernel.ability = Traits(*generation)
        # What the version says of async deletion may be wrong either way.
        self.kernel.traits = Traits(generation[1] and believes_in_async, generation[1])
        self.kernel.settles_in = settles_in
        self.kernel.disk_goes_first = disk_goes_first
        devices = [self.kernel.serve(flags=flags) for flags in first]
        self.loop.run_until_complete(asyncio.sleep(0.05))
        for each in devices:
            self.kernel.kill(each.adder)
        self.loop.run_until_complete(asyncio.sleep(settles_in + DEADLINE * bool(len(first) % 2)))

    @rule(seconds=st.sampled_from([0.0005, 0.001, 0.0015, 0.002, 0.004, 0.05, 0.1, 0.3, 0.6, 2.0, 15.0, 31.0, 62.0]))
    def time_passes(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))

    @rule(lost=st.booleans())
    def hints_are_lost_or_not(self, *, lost: bool) -> None:
        self.kernel.hints_lost = lost

    @rule(dev_id=which)
    def a_stray_hint_arrives(self, dev_id: int) -> None:
        self.kernel.hint(dev_id)

    @rule(dev_id=which, fault=st.sampled_from([Fault.REFUSED, Fault.OVERDUE, Fault.STOP_OVERDUE, Fault.ALREADY_DONE]))
    def a_deletion_will_go_wrong(self, dev_id: int, fault: Fault) -> None:
        self.kernel.faults[dev_id] = fault

    @happens_to(lambda each: bool(each.overdue), works=st.booleans())
    def an_overdue_command_answers(self, instance: Instance, *, works: bool) -> None:
        self.kernel.answer(instance, works=works)

    @rule(dev_id=which, seconds=st.sampled_from([0.001, 0.4, 8.0]))
    def deletions_are_slow(self, dev_id: int, seconds: float) -> None:
        self.kernel.deletion_takes[dev_id] = seconds

    @rule(unavailable=st.booleans())
    def the_control_device_comes_and_goes(self, *, unavailable: bool) -> None:
        self.kernel.unavailable = unavailable

    @rule(overdue=st.booleans())
    def looks_are_overdue(self, *, overdue: bool) -> None:
        self.kernel.looks_are_overdue = overdue

    @rule(dev_id=which, trouble=st.sampled_from(["", "GET_DEV_INFO has not answered"]))
    def a_device_gives_no_answer(self, dev_id: int, trouble: str) -> None:
        self.kernel.troubles[dev_id] = trouble

    @rule(everything=st.booleans(), clock_was_set=st.booleans())
    def the_view_is_dim(self, *, everything: bool, clock_was_set: bool) -> None:
        self.kernel.sees_everything, self.kernel.clock_was_set = everything, clock_was_set

    @rule()
    def the_daemon_is_killed_and_starts_again(self) -> None:
        self.loop.run_until_complete(self.daemon.die())
        self.kernel.lose_daemon()
        self.daemon = Daemon(self.loop, self.kernel, self.daemon)

    # Recovery commands, and planned work

    @rule(does=st.sampled_from(WHAT_COMMANDS_DO))
    def commands_will_do(self, does: Callable[[FakeCommand], None]) -> None:
        self.kernel.on_command = does

    @rule(seconds=st.sampled_from([0.0, 0.3, 3.0]))
    def children_take_their_time(self, seconds: float) -> None:
        self.kernel.child_takes = seconds

    @rule(dev_id=which, seconds=st.sampled_from([0.3, 7.0, 90.0]))
    def root_sets_a_hold(self, dev_id: int, seconds: float) -> None:
        now = self.loop.time()
        self.daemon.hold(Hold(dev_id, now, now + seconds, 0))
        self.kernel.off_limits[dev_id] = now + seconds

    @rule(dev_id=which)
    def root_releases_a_hold(self, dev_id: int) -> None:
        self.kernel.off_limits.pop(dev_id, None)
        self.daemon.release(dev_id)

    @happens_to(lambda each: each.disk is not None, hidden=st.booleans())
    def a_disk_is_used_by_somebody_who_cannot_be_seen(self, instance: Instance, *, hidden: bool) -> None:
        instance.hidden_holder = hidden

    # Servers

    @precondition(lambda self: len(self.kernel.taken) < 5)
    @rule(
        flags=st.sampled_from([PLAIN, PLAIN, QUEUEING, FAILING, UNPRIVILEGED]),
        visible=st.sampled_from([True, True, False]),
        state=st.sampled_from([KernelState.DEAD] * 5 + [KernelState.LIVE, KernelState.QUIESCED]),
    )
    def a_server_adds_a_device(self, flags: int, *, visible: bool, state: int) -> None:
        self.kernel.add(self.kernel.process(visible=visible), flags=flags, state=state)

    @precondition(lambda self: len(self.kernel.taken) < 5)
    @rule(flags=st.sampled_from([PLAIN, PLAIN, QUEUEING, FAILING, UNPRIVILEGED]))
    def a_server_starts_up(self, flags: int) -> None:
        self.kernel.serve(flags=flags)

    @happens_to(lambda each: each.listed and each.adder.alive and not (each.started or each.openers or each.claimed))
    def a_server_opens_its_device(self, instance: Instance) -> None:
        with contextlib.suppress(BusyError):
            self.kernel.open(instance)

    @happens_to(lambda each: each.listed and bool(each.openers) and not each.started, disk_later=st.booleans())
    def a_server_starts_its_device(self, instance: Instance, *, disk_later: bool) -> None:
        self.kernel.start(instance, disk_later=disk_later)

    @happens_to(lambda each: is_served(each) and each.started and each.disk is None)
    def a_disk_appears(self, instance: Instance) -> None:
        self.kernel.show_disk(instance)

    @happens_to(lambda each: bool(each.openers), visible=st.booleans(), opener_dies=st.booleans())
    def a_server_forks(self, instance: Instance, *, visible: bool, opener_dies: bool) -> None:
        opener = instance.openers[0]
        self.kernel.share(instance, self.kernel.process("worker", visible=visible))
        if opener_dies:
            self.kernel.kill(opener)

    @happens_to(is_served)
    def the_kernel_tells_of_another_process(self, instance: Instance) -> None:
        """Up to 6.16: of a server in a container by its number in there."""
        instance.pid = self.kernel.process("init").pid

    @happens_to(lambda each: bool(each.openers))
    def a_helper_without_a_ring_outlives_the_server(self, instance: Instance) -> None:
        helper = self.kernel.process("helper")
        helper.has_ring = False
        self.kernel.share(instance, helper)
        for opener in instance.openers[:-1]:
            self.kernel.kill(opener)

    @happens_to(lambda each: bool(each.openers))
    def a_server_dies(self, instance: Instance) -> None:
        self.kernel.kill(instance.openers[0])

    @happens_to(lambda each: not each.openers and each.adder.alive)
    def a_server_dies_before_it_opens_its_device(self, instance: Instance) -> None:
        self.kernel.kill(instance.adder)

    @happens_to(lambda each: is_served(each) and len(each.openers) == 1, after=st.sampled_from([0.0, 0.001, 0.1, 0.4]))
    def a_server_stops_closes_and_deletes(self, instance: Instance, after: float) -> None:
        self.kernel.stop(instance)
        self.kernel.close(instance, instance.openers[0])
        self.loop.call_later(after, self.kernel.delete, instance)

    @happens_to(is_served)
    def a_server_stops_its_device_and_keeps_it_open(self, instance: Instance) -> None:
        self.kernel.stop(instance)

    @happens_to(lambda each: is_unserved(each) and not each.openers)
    def a_new_server_takes_over(self, instance: Instance) -> None:
        with contextlib.suppress(BusyError):
            self.kernel.recover(instance, self.kernel.process())

    @precondition(lambda self: len(self.kernel.taken) < 5)
    @rule(
        flags=st.sampled_from([QUEUEING, FAILING]), seconds=st.sampled_from([1.0, DEADLINE - 0.2, DEADLINE + 0.1, 9.0])
    )
    def a_server_dies_and_another_one_comes_by_itself(self, flags: int, seconds: float) -> None:
        instance = self.kernel.serve(flags=flags)
        self.loop.run_until_complete(asyncio.sleep(0.05))
        self.kernel.kill(instance.adder)
        self.loop.call_later(self.kernel.settles_in + seconds, self._come_back, instance)

    @precondition(lambda self: len(self.kernel.taken) < 5)
    @rule(flags=st.sampled_from([QUEUEING, FAILING]), seconds=st.sampled_from([0.1, 0.3, 2.0, 9.0]))
    def a_server_dies_and_nobody_comes_in_time(self, flags: int, seconds: float) -> None:
        instance = self.kernel.serve(flags=flags)
        self.loop.run_until_complete(asyncio.sleep(0.05))
        self.kernel.kill(instance.adder)
        self.loop.run_until_complete(asyncio.sleep(self.kernel.settles_in + DEADLINE + seconds))

    @precondition(lambda self: any(is_unserved(each) for each in self.kernel.taken.values()))
    @rule(seconds=st.sampled_from([0.01, 0.5, DEADLINE + 0.1, RULE.timeout]))
    def the_deadline_comes_nearer(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))

    def _come_back(self, instance: Instance) -> None:
        if is_unserved(instance) and not self.kernel.is_busy(instance):
            self.kernel.recover(instance, self.kernel.process())
            self.loop.call_later(0.002, self._finish_recovery, instance)

    def _finish_recovery(self, instance: Instance) -> None:
        if is_unserved(instance) and instance.openers:
            self.kernel.finish_recovery(instance)

    @happens_to(lambda each: is_unserved(each) and bool(each.openers))
    def a_recovery_ends(self, instance: Instance) -> None:
        self.kernel.finish_recovery(instance)

    @happens_to(lambda each: each.pid > 0)
    def the_pid_of_a_server_is_used_again(self, instance: Instance) -> None:
        if not self.kernel.processes[instance.pid].alive:
            self.kernel.recycle(instance.pid)

    # Administrators, and users of the disks

    @happens_to(lambda each: each.listed and each.disk is not None)
    def an_administrator_stops_a_device(self, instance: Instance) -> None:
        self.kernel.stop(instance)

    @happens_to(lambda each: each.listed)
    def an_administrator_deletes_a_device(self, instance: Instance) -> None:
        self.kernel.delete(instance)

    @happens_to(lambda each: each.disk is not None)
    def a_disk_is_mounted(self, instance: Instance) -> None:
        self.kernel.hold(instance, Holder("mount", "/srv (ext4)"))

    @happens_to(lambda each: bool(each.holders))
    def a_disk_is_unmounted(self, instance: Instance) -> None:
        self.kernel.let_go(instance)

    @happens_to(lambda each: each.listed)
    def a_node_is_removed_by_hand(self, instance: Instance) -> None:
        instance.has_node = False


TestHistories = Histories.TestCase
TestHistories.settings = settings(PROFILE, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


class HistoriesWithErrors(Histories):
    """The same, and whatever is asked of the kernel may be answered with any errno, once or for a while."""

    @rule(
        step=st.sampled_from(Step),
        number=st.sampled_from(ERRNOS),
        times=st.sampled_from([1, 2, 5, 100]),
        works=st.booleans(),
    )
    def the_kernel_will_answer_with_an_error(self, step: Step, number: int, times: int, *, works: bool) -> None:
        self.kernel.errors[step] = Error(number, times, works)

    @rule(steps=st.sets(st.sampled_from(Step), min_size=2), number=st.sampled_from(COMMON_ERRNOS))
    def the_machine_is_short_of_something(self, steps: set[Step], number: int) -> None:
        self.kernel.errors |= {step: Error(number, 20) for step in steps}

    @rule()
    def the_kernel_answers_properly_again(self) -> None:
        self.kernel.errors.clear()


TestErrors = HistoriesWithErrors.TestCase
TestErrors.settings = settings(
    PROFILE,
    max_examples=PROFILE.max_examples * 3 // 5,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.mark.parametrize("step", Step)
def test_no_errno_of_any_command_costs_a_device_in_use_or_leaves_an_orphan(step: Step) -> None:
    for number in ERRNOS:
        _go_through(step, Error(number, times=30))
    for number in COMMON_ERRNOS:
        _go_through(step, Error(number, times=1))
        _go_through(step, Error(number, times=2, works=True))


def _go_through(step: Step, error: Error) -> None:
    """A device of each kind, three deaths, an error for as long as it comes; and at the end all is as it should be."""
    loop = VirtualLoop()
    kernel = FakeKernel(loop)
    kernel.recovery_deadline = DEADLINE
    daemon = Daemon(loop, kernel)
    unserved, rule = (OnUnserved.RECOVER, RULE) if step is Step.CHILD else (OnUnserved.DELETE, None)
    daemon.configure(Config(policy=Policy(unserved=unserved, recovery_deadline=DEADLINE, recover=rule)))
    what = (
        f"{step.value}: {errno.errorcode.get(error.number, error.number)}, {error.times:g} times, works: {error.works}"
    )
    try:
        served, doomed, recoverable, held = (kernel.serve(flags=flags) for flags in (PLAIN, PLAIN, QUEUEING, QUEUEING))
        kernel.hold(held, Holder("mount", "/srv (ext4)"))
        loop.run_until_complete(asyncio.sleep(1))
        for instance in (doomed, recoverable, held):
            kernel.kill(instance.adder)
        loop.run_until_complete(asyncio.sleep(0.3))
        kernel.errors[step] = error
        loop.run_until_complete(asyncio.sleep(2 * DEADLINE))
        kernel.errors.clear()
        for instance in (recoverable, held):  # attempts that the errors have used up
            daemon.release(instance.dev_id)
        until = loop.time() + LONGEST_WAIT
        while not (_is_done(recoverable, rule) and _is_done(doomed, None)) and not daemon.task.done():
            assert loop.time() < until, f"{what}: left are {kernel.taken}"
            loop.run_until_complete(asyncio.sleep(RESYNC / 10))
        if daemon.task.done():
            daemon.task.result()
        assert kernel.violations == [], what
        assert is_served(served), what
        assert held.listed, what
    finally:
        loop.run_until_complete(daemon.die())
        loop.close()


def _is_done(instance: Instance, rule: Recovery | None) -> bool:
    return is_served(instance) if rule else not instance.listed
