"""Daemons for the campaign: the production code, forked from a process that has imported it, dying or failing on cue.

Nothing in the daemon knows of this: its calls to the kernel are wrapped from outside, before it starts.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import duende_ublkd.daemon  # noqa: F401 - imported once, for all that are forked
from duende_ublkd import __main__ as program
from duende_ublkd.kernel import binding, devices
from duende_ublkd.kernel.children import Children
from duende_ublkd.kernel.ring import Ring
from duende_ublkd.report.journal import Journal
from tests.server import nursery

if TYPE_CHECKING:
    from collections.abc import Callable

COMMANDS = ("GET_FEATURES", "GET_DEV_INFO", "DEL_DEV_ASYNC", "DEL_DEV")
CALLS = ("CLAIM", "STOP_DEV", "INTENT", "REPORT")
PHASES = ("before", "sent", "after")
_STOP_IS_UNDER_WAY = 0.005  # seconds
_SHORTAGES = (errno.ENOMEM, errno.EAGAIN, errno.EBUSY)


@dataclass(frozen=True)
class Doom:
    """It kills itself before or after the n-th such command or call, or once the kernel has it (`sent`)."""

    step: str
    nth: int
    phase: str


@dataclass(frozen=True)
class Shortage:
    """Of the calls to submit to the ring, or to get an entry, the first `spared` work; then `share` of `calls` do not."""

    spared: int
    calls: int
    share: float
    seed: int


def main(arguments: list[str]) -> int:
    """One daemon; the only argument is an order of `world.Daemon` as JSON."""
    order: dict[str, Any] = json.loads(arguments[0])
    os.environ |= order["environment"]
    if order["doom"]:
        _doom(Doom(**order["doom"]))
    if order["shortage"]:
        _run_short(Shortage(**order["shortage"]))
    sys.argv = ["duende-ublkd", "run", "--config", order["config"]]
    program.main()
    return 0


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _Countdown:
    """Whether this is the n-th time that the step is reached."""

    def __init__(self, doom: Doom) -> None:
        self._doom = doom
        self._times = 0

    def is_now(self, step: str) -> bool:
        if step != self._doom.step:
            return False
        self._times += 1
        return self._times == self._doom.nth


def _doom(doom: Doom) -> None:
    countdown = _Countdown(doom)
    _wrap_ring(doom, countdown)
    _wrap_stop(doom, countdown)
    _wrap_call(devices, "_open_exclusively", "CLAIM", doom, countdown)
    _wrap_call(Journal, "intends", "INTENT", doom, countdown)
    _wrap_call(Journal, "passed", "REPORT", doom, countdown)


def _wrap_ring(doom: Doom, countdown: _Countdown) -> None:
    original = Ring.command

    async def command(self: Ring, name: str, *rest: Any, **more: Any) -> Any:  # noqa: ANN401 - whatever it takes
        if not countdown.is_now(name):
            return await original(self, name, *rest, **more)
        if doom.phase == "before":
            _die()
        submitted = self.stats.submitted
        task = asyncio.ensure_future(original(self, name, *rest, **more))
        while doom.phase == "sent" and self.stats.submitted == submitted and not task.done():
            await asyncio.sleep(0)
        if doom.phase == "after":
            await asyncio.wait([task])
        _die()
        return await task

    Ring.command = command  # type: ignore[method-assign]


def _wrap_stop(doom: Doom, countdown: _Countdown) -> None:
    original = Children.stop_device

    async def stop_device(self: Children, *rest: Any, **more: Any) -> None:  # noqa: ANN401 - whatever it takes
        if not countdown.is_now("STOP_DEV"):
            return await original(self, *rest, **more)
        if doom.phase == "before":
            _die()
        task = asyncio.ensure_future(original(self, *rest, **more))
        await asyncio.wait([task], timeout=_STOP_IS_UNDER_WAY if doom.phase == "sent" else None)
        _die()
        return await task

    Children.stop_device = stop_device  # type: ignore[method-assign]


def _wrap_call(owner: Any, name: str, step: str, doom: Doom, countdown: _Countdown) -> None:  # noqa: ANN401 - a module or a class
    original = getattr(owner, name)

    def call(*rest: Any, **more: Any) -> Any:  # noqa: ANN401 - whatever it takes
        is_now = countdown.is_now(step)
        if is_now and doom.phase == "before":
            _die()
        answer = original(*rest, **more)
        if is_now:
            _die()
        return answer

    setattr(owner, name, call)


def _run_short(shortage: Shortage) -> None:
    """As a kernel that has no memory for requests, or whose completion queue is full."""
    chance = random.Random(shortage.seed)
    counter = iter(range(1 << 60))

    def fails() -> bool:
        number = next(counter) - shortage.spared
        return 0 <= number < shortage.calls and chance.random() < shortage.share

    queue: Any = binding.queue
    submit: Callable[..., int] = queue.io_uring_submit
    get_entry: Callable[..., Any] = queue.io_uring_get_sqe

    def io_uring_submit(ring: Any) -> int:  # noqa: ANN401 - the binding has no types
        if fails():
            number = chance.choice(_SHORTAGES)
            raise OSError(number, os.strerror(number))
        return submit(ring)

    def io_uring_get_sqe(ring: Any) -> Any:  # noqa: ANN401 - the binding has no types
        return None if chance.random() < shortage.share / 4 and fails() else get_entry(ring)

    queue.io_uring_submit = io_uring_submit
    queue.io_uring_get_sqe = io_uring_get_sqe


if __name__ == "__main__":
    nursery.serve(main, adopts=True)
