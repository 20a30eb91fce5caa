"""A daemon's loop on the fake kernel in virtual time, and somebody to read its reports."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.config import Config, OnUnserved, Policy, Recovery
from duende_ublkd.core.holds import Hold
from duende_ublkd.core.model import Action, Deed, Feature, Holder, Judged, Outcome, PassReport, VerdictKind
from duende_ublkd.reconcile import Agenda, Reconciler
from tests.fake_kernel import FakeKernel, Instance, run

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from duende_ublkd.core.policy import Traits

RESYNC = 30.0
MANY_WAITS = 20_000
MOUNT = Holder("mount", "/srv (ext4)")


@dataclass
class Recorder:
    """A reporter that remembers what was worth telling."""

    announced: list[int] = field(default_factory=list)
    deeds: list[Deed] = field(default_factory=list)
    changed: list[Judged] = field(default_factory=list)
    gone: list[Judged] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def intends(self, device: Judged) -> None:
        self.announced.append(device.seen.dev_id)

    def passed(self, report: PassReport) -> None:
        self.deeds += report.deeds
        self.changed += report.changed
        self.gone += report.gone
        self.troubles += [report.trouble] if report.trouble else []

    @property
    def outcomes(self) -> list[Outcome | None]:
        return [deed.outcome for deed in self.deeds]

    def told(self) -> int:
        return len(self.announced) + len(self.deeds) + len(self.changed) + len(self.gone) + len(self.troubles)


class Bench:
    """A daemon's loop on a fake kernel, and somebody to read its reports."""

    def __init__(self, config: Config | None = None, traits: Traits | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.kernel = FakeKernel(loop, traits=traits)
        self.recorder = Recorder()
        self.agenda = Agenda()
        self.ended_holds: list[tuple[Hold, str]] = []
        self.reconciler = self._a_reconciler(config or Config())
        self.kernel.hint = self.agenda.soon
        self.kernel.on_late = self._on_late
        self._task = asyncio.ensure_future(self._look())
        self._waits = 0

    def _a_reconciler(self, config: Config) -> Reconciler:
        return Reconciler(
            self.kernel,
            config,
            self.recorder,
            self.agenda,
            clock=asyncio.get_running_loop().time,
            on_hold_ended=lambda hold, why: self.ended_holds.append((hold, why)),
        )

    def another_reconciler(self, config: Config, reporter: Recorder) -> Reconciler:
        """As of a command that looks once, beside the daemon: it knows what the daemon has written down."""
        another = Reconciler(
            self.kernel, config, reporter, Agenda(), without_grace=[*self.kernel.taken], clock=lambda: self.now
        )
        for dev_id, record in self._written():
            another.ledger.remember(dev_id, record, has_ended=False)
        return another

    def _written(self) -> list[tuple[int, Any]]:
        ledger = self.reconciler.ledger
        records = [(dev_id, ledger.to_record(dev_id)) for dev_id in self.reconciler.devices]
        written: list[tuple[int, Any]] = json.loads(json.dumps(records))
        return written

    async def _look(self) -> None:
        self.agenda.soon(None)
        while True:
            dev_ids = await self.agenda.next()
            await self.reconciler.run_pass(dev_ids)
            if dev_ids is None:
                self.agenda.later(None, RESYNC)

    def _on_late(self, command: str, dev_id: int) -> None:
        self.reconciler.note_answer(dev_id, command)

    async def wait(self, seconds: float) -> None:
        """Let time pass; a defect of the daemon ends the test, and so does waiting for what never comes."""
        self._waits += 1
        assert self._waits < MANY_WAITS
        done, _ = await asyncio.wait([self._task], timeout=seconds)
        for task in done:
            task.result()
        assert self.kernel.violations == [], self.kernel.violations

    async def a_live_device(self, flags: int = 0) -> Instance:
        instance = self.kernel.serve(flags=flags)
        await self.wait(0.1)
        assert self.verdict(instance) is VerdictKind.LIVE
        return instance

    async def an_orphan(self, flags: int = 0) -> Instance:
        """One that dies this moment."""
        instance = await self.a_live_device(flags)
        self.kernel.kill(instance.openers[0])
        return instance

    async def an_unserved_device(self, flags: int = Feature.USER_RECOVERY) -> Instance:
        """One whose server dies this moment, and whose disk stays."""
        instance = await self.a_live_device(flags)
        self.kernel.kill(instance.openers[0])
        await self.wait(0.2)
        return instance

    async def restart(self, *, forgetful: bool = False) -> None:
        """The daemon ends as on SIGTERM, and another one starts; unless `forgetful`, with what it has written down."""
        former = self.reconciler
        self._task.cancel()
        await asyncio.wait([self._task])
        former.leave_recoveries()
        await former.finish_deeds()
        self.kernel.lose_daemon()
        written = self._written()
        self.agenda = Agenda()
        self.reconciler = self._a_reconciler(former.config)
        for dev_id, record in [] if forgetful else written:
            ledger = self.reconciler.ledger
            ledger.remember(dev_id, record)
            hand = ledger.hand_of_former(dev_id)
            if hand and not self.kernel.watch_former(dev_id, hand):
                ledger.note_answer(dev_id, "STOP_DEV")
        self.kernel.hint = self.agenda.soon
        self._task = asyncio.ensure_future(self._look())

    def hold(self, instance: Instance, seconds: float, *, bound: bool = False, uid: int = 0) -> Hold:
        """Planned work on a device, from now on. `bound`: to this instance of its id."""
        now = self.now
        hold = Hold(instance.dev_id, now, now + seconds, uid, "upgrade", instance.inode if bound else None)
        self.reconciler.hold(hold)
        return hold

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def verdict(self, instance: Instance) -> VerdictKind:
        return self.reconciler.devices[instance.dev_id].verdict.kind

    def rule(self, instance: Instance) -> str:
        return self.reconciler.devices[instance.dev_id].verdict.rule

    def reason(self, instance: Instance) -> str:
        return self.reconciler.devices[instance.dev_id].verdict.reason

    def alerts(self) -> list[str]:
        """The reasons of every change to a verdict that calls somebody."""
        return [device.verdict.reason for device in self.recorder.changed if device.verdict.action is Action.ALERT]

    def is_there(self, instance: Instance) -> bool:
        return self.kernel.taken.get(instance.dev_id) is instance


def a_recovery(**changes: Any) -> Recovery:  # noqa: ANN401 - any field of it
    return Recovery(**{"command": ("bring-back", "{id}"), **changes})


def recovering(*, deadline: float = 60.0, **changes: Any) -> Config:  # noqa: ANN401 - any field of the rule
    """A configuration that has the command run."""
    rule = a_recovery(**changes)
    return Config(policy=Policy(unserved=OnUnserved.RECOVER, recovery_deadline=deadline, recover=rule))


def deleting(*, deadline: float = 60.0) -> Config:
    """A configuration that gives a device up when its deadline is over."""
    return Config(policy=Policy(unserved=OnUnserved.DELETE, recovery_deadline=deadline))


def on_the_bench(
    test: Callable[[Bench], Coroutine[Any, Any, None]], config: Config | None = None, traits: Traits | None = None
) -> None:
    async def main() -> None:
        await test(Bench(config, traits))

    run(main())
