"""The courier's side in the daemon: what goes to sinks over a network is handed over here, and its answer comes back.

Rules:
1. Nothing here waits, and nothing of a disk, a name server or a network is touched. The courier is kept as apart.py says,
   and started anew when it ends, later each time; a delivery that finds none waits for it, but no longer than its time.
2. Every delivery is answered once, on the loop and never before `deliver` has returned: by the courier, or by its time
   being up, or by the courier's end. A courier that is silent beyond a delivery's time limit hangs as a whole, since it
   has that limit itself: it is killed.
3. What is under way is bounded. Whoever asks for more is told so at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.alertconfig import SinkKind
from duende_ublkd.core.errors import DuendeError
from duende_ublkd.core.text import printable
from duende_ublkd.report.alerts import wire
from duende_ublkd.report.alerts.answer import Answer
from duende_ublkd.report.apart import LOOK_AT_THE_DEAD, Apart

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from duende_ublkd.core.alertconfig import SinkConfig

MOST_UNDER_WAY = 64
MOST_DETAIL = 300  # characters
GRACE = 5.0
"""Seconds beyond a sink's time limit until its silence is the courier's: on a machine that is busy, and not by little."""
START_WITHIN = 30.0  # seconds; a cold disk takes a few of them
_LONGEST_PAUSE = 60.0
_START = """
import os, sys
sys.path[:0] = sys.argv[1:]
try:
    from duende_ublkd.report.alerts import courier
except BaseException as error:
    import json
    os.write(0, b"." + json.dumps({"do": "fail", "why": repr(error)[:200]}).encode())
    os._exit(1)
courier.main()
"""


@dataclass(slots=True)
class _Asked:
    """A delivery under way; `sent_at` None: no courier has taken it yet."""

    sink: str
    packets: list[bytes]
    limit: float
    began: float
    done: Callable[[Answer], None]
    timer: asyncio.TimerHandle
    is_sent: bool = False


class Courier:
    """Delivers to sinks over a network. To be used in one event loop."""

    def __init__(
        self,
        *,
        on_trouble: Callable[[str], None],
        spawn: Callable[[Sequence[str], int], None] | None = None,
        grace: float = GRACE,
        first_pause: float = 1.0,
        start_within: float = START_WITHIN,
    ) -> None:
        """`on_trouble(sentence)`: there is no courier, and why; "": there is one again.

        `spawn(argv, stdin)`: starts every courier but the first, and never waits; OSError or DuendeError: it cannot.
        """
        self._on_trouble = on_trouble
        self._grace = grace
        self._first_pause = self._pause = first_pause
        self._start_within = start_within
        self._loop = asyncio.get_running_loop()
        self._apart = Apart(arguments(), on_packet=self._take, on_end=self._note_end, spawn=spawn)
        self._joiner = wire.Joiner()
        self._sinks: dict[str, SinkConfig] = {}
        self._asked: dict[int, _Asked] = {}
        self._numbers = itertools.count(1)
        self._is_ready = False
        self._has_failed = False  # and has said why
        self._trouble = ""
        self._retry: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None  # until it is to be ready
        self._ended: asyncio.Future[None] | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The courier's, while there is one and, of one that was spawned, since its first message."""
        return self._apart.pid

    @property
    def trouble(self) -> str:
        """Why there is no courier; empty: there is one, or none is needed."""
        return self._trouble

    @property
    def under_way(self) -> int:
        """Deliveries without an answer."""
        return len(self._asked)

    def start(self) -> None:
        """At the daemon's start: the only courier that this process executes itself, if a sink needs one now."""
        if self._sinks:
            self._start()
        self._apart.only_spawn()

    def configure(self, sinks: Sequence[SinkConfig]) -> None:
        """From now on these; those that need no network are not ours. What is under way goes on."""
        self._sinks = {sink.name: sink for sink in sinks if sink.sink is not SinkKind.COMMAND}
        if self._is_ready:
            self._send_configuration()

    def deliver(self, sink: str, notices: Sequence[Mapping[str, Any]], done: Callable[[Answer], None]) -> None:
        """Have a sink get these; `done` is called once, later."""
        config = self._sinks.get(sink)
        why = ""
        packets: list[bytes] = []
        number = next(self._numbers)
        if self._closed:
            why = "the daemon ends"
        elif config is None:
            why = f"there is no sink {printable(sink, 60)} that needs a network"
        elif len(self._asked) >= MOST_UNDER_WAY:
            why = f"{MOST_UNDER_WAY} deliveries are under way already"
        else:
            try:
                packets = list(wire.packets({"do": "deliver", "id": number, "sink": sink, "notices": list(notices)}))
            except (ValueError, TypeError, RecursionError) as error:
                why = f"it cannot be sent: {error}"
        if why or config is None:
            self._loop.call_soon(done, Answer(ok=False, permanent=False, detail=why, seconds=0.0))
            return
        limit = _limit_of(config) + self._grace
        timer = self._loop.call_later(limit, self._give_up, number)
        self._asked[number] = _Asked(sink, packets, limit, self._loop.time(), done, timer)
        self._pump()

    async def close(self, deadline: float = 0.5) -> None:
        """Leave off: what is under way is answered, as not delivered, and the courier ends."""
        if self._closed:
            return
        self._closed = True
        for timer in (self._retry, self._deadline):
            if timer:
                timer.cancel()
        self._answer_all("the daemon ends", only_sent=False)
        if self._apart.is_there:
            self._ended = self._loop.create_future()
            self._apart.finish()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(deadline):
                    await self._ended
                    while not self._apart.has_ended:  # noqa: ASYNC110 - it has closed its socket, so it ends
                        await asyncio.sleep(LOOK_AT_THE_DEAD / 10)
        self._apart.kill()
        self._apart.close()

    # --- the courier ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._apart.is_there or self._retry or self._closed:
            return
        if self._apart.is_ending:
            self._try_later()
            return
        self._joiner = wire.Joiner()
        self._has_failed = False
        try:
            self._apart.start()
        except DuendeError as error:
            self._say(f"the courier of alerts {error}")
            self._try_later()
            return
        self._deadline = self._loop.call_later(self._start_within, self._note_silence)

    def _pump(self) -> None:
        if not self._is_ready:
            self._start()
            return
        for number, asked in list(self._asked.items()):
            if not asked.is_sent:
                asked.is_sent = True
                asked.timer.cancel()
                asked.timer = self._loop.call_later(asked.limit, self._give_up, number)
                self._send(asked.packets)

    def _send(self, packets: Sequence[bytes]) -> None:
        for packet in packets:
            self._apart.send(packet)

    def _send_configuration(self) -> None:
        sinks = [sink.to_object() for sink in self._sinks.values()]
        self._send(list(wire.packets({"do": "configure", "sinks": sinks})))

    def _take(self, packet: bytes) -> None:
        try:
            message = self._joiner.take(packet)
            if message is not None:
                self._take_message(message)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self._say(f"the courier of alerts is not understood: {printable(repr(error))}")
            self._apart.kill()

    def _take_message(self, message: Mapping[str, Any]) -> None:
        if message.get("do") == "ready":
            self._be_ready()
            return
        if message.get("do") == "fail":
            self._say(f"the courier of alerts cannot run: {printable(str(message['why']))}")
            self._has_failed = True
            return
        answer = Answer(
            ok=bool(message["ok"]),
            permanent=bool(message["permanent"]),
            detail=printable(str(message["detail"]), MOST_DETAIL),
            seconds=float(message["seconds"]),
            missed=printable(str(message["missed"]), MOST_DETAIL),
        )
        if asked := self._asked.pop(message["id"], None):
            self._pause = self._first_pause
            asked.timer.cancel()
            asked.done(answer)

    def _be_ready(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None
        self._is_ready = True
        self._say("")
        self._send_configuration()
        self._pump()

    # --- what goes wrong --------------------------------------------------------------------------------------------

    def _give_up(self, number: int) -> None:
        """Its time is up."""
        asked = self._asked.pop(number)
        if not asked.is_sent:
            why = self._trouble or "the courier of alerts has not started yet: does the disk that it is on answer?"
            self._answer(asked, why)
            return
        self._answer(asked, f"the courier of alerts has not answered for {asked.limit:g} s, and another one is started")
        self._say("the courier of alerts hangs")
        self._apart.kill()

    def _note_silence(self) -> None:
        self._deadline = None
        self._say(
            f"the courier of alerts has said nothing for {self._start_within:g} s: does the disk that it is on answer?"
        )
        self._apart.kill()

    def _note_end(self) -> None:
        self._is_ready = False
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None
        if self._closed:
            if self._ended and not self._ended.done():
                self._ended.set_result(None)
            return
        self._loop.call_later(LOOK_AT_THE_DEAD, self._tell_end)
        self._answer_all("the courier of alerts ended, and another one is started", only_sent=True)
        self._try_later()

    def _tell_end(self) -> None:
        if not (self._closed or self._is_ready or self._has_failed):
            self._say(f"the courier of alerts ended{self._apart.how_it_ended}; another one is started")

    def _try_later(self) -> None:
        if not self._retry and not self._closed:
            self._retry = self._loop.call_later(self._pause, self._try_again)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _try_again(self) -> None:
        self._retry = None
        if self._sinks or self._asked:
            self._start()

    def _say(self, sentence: str) -> None:
        if sentence != self._trouble and not self._closed:
            self._trouble = sentence
            self._on_trouble(sentence)

    def _answer_all(self, why: str, *, only_sent: bool) -> None:
        for number, asked in list(self._asked.items()):
            if asked.is_sent or not only_sent:
                del self._asked[number]
                asked.timer.cancel()
                self._answer(asked, why)

    def _answer(self, asked: _Asked, why: str) -> None:
        """Not while whoever asks us for something else is still at it."""
        seconds = round(self._loop.time() - asked.began, 3)
        self._loop.call_soon(asked.done, Answer(ok=False, permanent=False, detail=why, seconds=seconds))


def arguments() -> list[str]:
    """How a courier is executed. It finds what this process found, and looks for nothing else."""
    root = str(Path(__file__).parents[3])
    places = [root, *(path for path in sys.path if path.startswith("/") and path != root)]
    return [sys.executable, "-I", "-S", "-c", _START, *dict.fromkeys(places)]


def _limit_of(sink: SinkConfig) -> float:
    """The courier's own limit for a delivery."""
    return sink.timeout
