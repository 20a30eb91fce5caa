"""`python -m tests.campaign`, in a guest: inject faults until there are enough, and print what came of them."""

from __future__ import annotations

import argparse
import platform
import random
import sys
import time
import traceback
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from duende_ublkd.core.errors import DuendeError
from tests.campaign.kinds import KINDS, Kind
from tests.campaign.world import World

SEED = 20261122
FAULTS = 700
"""For each kernel; three of them make more than 2,000."""


@dataclass
class Tally:
    """What came of one kind."""

    rounds: int = 0
    injected: int = 0
    violations: int = 0
    seconds: float = 0.0
    worst: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    killed_at: Counter[str] = field(default_factory=Counter)


class Campaign:
    """Rounds of all kinds in an order that the seed decides, in a world that a violation does not outlive."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._world: World | None = None
        self.tallies: dict[str, Tally] = {}
        self.violations: list[str] = []
        self._is_over = False

    def run(self, rounds: list[tuple[Kind, int]]) -> None:
        for kind, number in rounds:
            self._one_round(kind, number)
        if self._world:
            self._guarded("the end", "campaign", 0, self._world.close)

    def run_until(self, faults: int) -> None:
        """Every kind by its share of so many faults."""
        for kind, number in self._in_order(faults):
            tally = self.tallies.get(kind.name, Tally())
            if tally.injected < max(kind.share * faults, 1) and tally.rounds < kind.most:
                self._one_round(kind, number)
        self.run([])

    def _in_order(self, faults: int) -> list[tuple[Kind, int]]:
        """More rounds than are needed, mixed: how many faults a round has, it says afterwards."""
        tickets = [(kind, number) for kind in KINDS for number in range(min(int(kind.share * faults) + 1, kind.most))]
        mixed = random.Random(self._seed).sample([kind.name for kind, _ in tickets], len(tickets))
        numbers: dict[str, int] = defaultdict(int)
        by_name = {kind.name: kind for kind in KINDS}
        order = []
        for name in mixed:
            order.append((by_name[name], numbers[name]))
            numbers[name] += 1
        return order

    def _one_round(self, kind: Kind, number: int) -> None:
        if self._is_over:
            return
        tally = self.tallies.setdefault(kind.name, Tally())
        began = time.monotonic()
        chance = random.Random(f"{self._seed} {kind.name} {number}")

        def do() -> None:
            self._world = self._world or World(self._seed)
            self._world.worst.clear()
            self._world.killed_at.clear()
            injected = kind.do(self._world, chance)
            tally.injected += injected
            self._world.check()
            tally.killed_at += self._world.killed_at
            for what, value in self._world.worst.items():
                tally.worst[what] = max(tally.worst[what], value)

        tally.rounds += 1
        if not self._guarded(kind.name, kind.name, number, do):
            tally.violations += 1
        took = time.monotonic() - began
        tally.seconds += took
        print(f"{kind.name} {number}: {took:.1f} s  {dict(self._world.worst) if self._world else ''}", flush=True)

    def _guarded(self, what: str, kind: str, number: int, do: object) -> bool:
        """False: it was a violation. A world with one in it is not fit for further faults, and no promise is asked of it."""
        try:
            do()  # type: ignore[operator]
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the next kind has its turn
            repeat = f"python -m tests.lab campaign --seed {self._seed} --only {kind} --from {number} --rounds 1"
            text = f"VIOLATION in {what}, round {number}: {error or type(error).__name__}\n  repeat: {repeat}"
            self.violations.append(text)
            print(text, flush=True)
            traceback.print_exc(limit=-4, file=sys.stdout)
            self._abandon()
            return False
        return True

    def _abandon(self) -> None:
        world, self._world = self._world, None
        try:
            if world:
                world.abandon()
        except (AssertionError, DuendeError, OSError) as error:
            self._is_over = True
            print(f"what is left cannot be cleared away, so that this is the end: {error}", flush=True)

    def table(self) -> str:
        lines = [f"{'kind':20} {'rounds':>6} {'injected':>8} {'violations':>10} {'seconds':>8}  worst"]
        for name, tally in sorted(self.tallies.items()):
            worst = ", ".join(f"{what}: {value:.2f}" for what, value in sorted(tally.worst.items()) if value)
            lines.append(
                f"{name:20} {tally.rounds:6} {tally.injected:8} {tally.violations:10} {tally.seconds:8.0f}  {worst}"
            )
        injected = sum(tally.injected for tally in self.tallies.values())
        seconds = sum(tally.seconds for tally in self.tallies.values())
        rounds = sum(tally.rounds for tally in self.tallies.values())
        lines.append(f"{'all':20} {rounds:6} {injected:8} {len(self.violations):10} {seconds:8.0f}")
        for tally in self.tallies.values():
            lines += [f"the daemon was killed {what}: {times}" for what, times in sorted(tally.killed_at.items())]
        return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    campaign = Campaign(options.seed)
    if options.only:
        kind = next(kind for kind in KINDS if kind.name == options.only)
        campaign.run([(kind, number) for number in range(options.first, options.first + options.rounds)])
    elif options.short:
        campaign.run([(kind, number) for kind in KINDS for number in range(kind.short)])
    else:
        campaign.run_until(options.faults)
    print(f"\nfault campaign on {platform.release()}, seed {options.seed}\n{campaign.table()}", flush=True)
    for violation in campaign.violations:
        print(violation)
    return 1 if campaign.violations else 0


def parser() -> argparse.ArgumentParser:
    """The options are the same on the host, which passes them on."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--faults", type=int, default=FAULTS, help=f"at least so many on each kernel ({FAULTS})")
    parser.add_argument("--short", action="store_true", help="a round of most kinds, as CI has it")
    parser.add_argument("--only", choices=[kind.name for kind in KINDS], metavar="KIND")
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="ROUND", help="with --only: begin there")
    parser.add_argument("--rounds", type=int, default=1, help="with --only: so many")
    return parser


if __name__ == "__main__":
    sys.exit(main())
