"""That the daemon still does its work, proved again and again, and told to the service manager only with the proof.

What is proved, in each round:
1. The event loop turns: this is a task of it. How late its timers are is measured, and shown as a metric.
2. The ring carries commands: a no-op comes back through the very path that every command takes.
3. Looks at the devices end: not one of them lasts longer than all of its deadlines together, and none is missing.

Without the proof the service manager hears nothing, kills the daemon when its patience (WatchdogSec=) is over, and starts
another one. What does not count as a failure is a kernel that does not answer: each command has a deadline, a device whose
command misses it is a verdict, and another daemon would fare no better. So it goes on, and is fed, whatever hangs there.

A loop that is stuck can log nothing. For that there is a timer of faulthandler's, a thread without Python, which writes to
stderr where every thread of the daemon is, shortly before the service manager kills it.
"""

from __future__ import annotations

import asyncio
import faulthandler
from collections import deque
from typing import TYPE_CHECKING

from duende_ublkd.core.errors import CommandOverdueError
from duende_ublkd.core.model import Level
from duende_ublkd.kernel.process import tell_service_manager

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

TICK = 1.0  # seconds between two measurements of the loop's lag
ROUND = 10.0  # seconds between two proofs where no service manager waits for them
REMEMBERED = 60.0  # seconds for which a lag is shown
LONG_LAG = 5.0  # seconds; nothing that is done in the loop takes a hundredth of it
MOST_COMMANDS = 20
"""One after the other in one look, had each of them to be sent again, and were answered at the last moment: GET_FEATURES in
two encodings, GET_DEV_INFO four times in up to four ways."""
MORE_THAN_COMMANDS = 60.0  # seconds; the looks at /proc give up after seven, and a machine without a free CPU is slow
_NOP_WITHIN = 5.0
_TRACE_AT = 0.75  # of the service manager's patience
_STDERR = 2


def longest_look(command_deadline: float, cancel_grace: float) -> float:
    """Seconds after which a look at the devices is stuck by a defect, since no command's deadline explains it."""
    return MOST_COMMANDS * (command_deadline + cancel_grace) + MORE_THAN_COMMANDS


class SelfWatch:
    """Feeds the service manager's watchdog as long as there is progress. To be made and started in the running loop."""

    def __init__(
        self,
        nop: Callable[[float], Coroutine[None, None, None]],
        *,
        patience: float | None,
        status: Callable[[], str],
        note: Callable[[Level, str], None],
    ) -> None:
        """`nop(deadline)`: of the ring. `patience`: seconds of the service manager's; None: there is none that waits.

        `status`: a line for it. `note`: told once when the proof fails, and once when it succeeds again.
        """
        self._loop = asyncio.get_running_loop()
        self._nop = nop
        self._patience = patience
        self._status = status
        self._note = note
        self._round = patience / 3 if patience else ROUND
        self._lags: deque[tuple[float, float]] = deque()
        self._expected: tuple[float, str] | None = None
        self._stuck = ""
        self._task: asyncio.Task[None] | None = None

    @property
    def lag(self) -> float:
        """The longest that a timer of the loop has been late within the last minute."""
        self._forget_old(self._loop.time())
        return max((lag for _, lag in self._lags), default=0.0)

    def look_began(self, longest: float) -> None:
        """A look at the devices has to end within so many seconds."""
        self._expected = (self._loop.time() + longest, f"a look at the devices has not ended within {longest:.0f} s")

    def look_ended(self, until_next: float) -> None:
        """The next one has to begin within so many seconds."""
        self._expected = (self._loop.time() + until_next, f"no look at the devices has begun for {until_next:.0f} s")

    def start(self, on_defect: Callable[[BaseException], None]) -> None:
        """Watch, until closed. `on_defect`: told if the watch itself dies."""

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (defect := task.exception()):
                on_defect(defect)

        self._task = asyncio.ensure_future(self._watch())
        self._task.add_done_callback(ended)

    def close(self) -> None:
        """The daemon is about to end, and its end has a limit of its own."""
        if self._task:
            self._task.cancel()
        if self._patience:
            faulthandler.cancel_dump_traceback_later()

    async def _watch(self) -> None:
        while True:
            if self._patience:
                faulthandler.dump_traceback_later(self._patience * _TRACE_AT, file=_STDERR)
            stuck = await self._what_is_stuck()
            self._tell(stuck)
            until = self._loop.time() + self._round
            while (left := until - self._loop.time()) > 0:
                await self._measure(min(left, TICK))

    async def _measure(self, seconds: float) -> None:
        due = self._loop.time() + seconds
        await asyncio.sleep(seconds)
        now = self._loop.time()
        self._forget_old(now)
        lag = max(now - due, 0.0)
        self._lags.append((now, lag))
        if lag >= LONG_LAG:
            self._note(Level.WARNING, f"the daemon stood still for {lag:.1f} s")

    def _forget_old(self, now: float) -> None:
        while self._lags and self._lags[0][0] < now - REMEMBERED:
            self._lags.popleft()

    async def _what_is_stuck(self) -> str:
        """Empty: nothing."""
        deadline = min(_NOP_WITHIN, self._round / 2)
        try:
            await self._nop(deadline)
        except CommandOverdueError:
            return f"its ring has not carried a no-op within {deadline:.2g} s"
        if self._expected and self._loop.time() > self._expected[0]:
            return self._expected[1]
        return ""

    def _tell(self, stuck: str) -> None:
        if not stuck:
            tell_service_manager(f"WATCHDOG=1\nSTATUS={self._status()}")
            if self._stuck:
                self._note(Level.INFO, "the daemon gets on again")
        else:
            tell_service_manager(f"STATUS=stuck: {stuck}")
            if not self._stuck:
                end = f"; unless that ends, it is restarted within {self._patience:.0f} s" if self._patience else ""
                self._note(Level.ERROR, f"the daemon is stuck: {stuck}{end}")
        self._stuck = stuck
