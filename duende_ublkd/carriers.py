"""Who carries alerts to each kind of sink: a child of the daemon runs the commands, the courier talks to the network.

Rules for a sink that is a command:
1. It is run as a recovery command is: by a child that was there before, with nothing of the daemon's open, in a session of
   its own, as another user where the configuration says so, and without a shell.
2. It gets one notice, in its environment (README documents it), and has taken it when it exits with 0. Whatever else
   becomes of it is a failure, and it is run again, later each time.
3. When its time is over, or its own process has ended, whatever is left of it is ended. One sink runs one command at a
   time: until nothing of the former one is left, the next one waits.
4. Where no child is ready none is made for it: that may wait for a disk, and devices come first.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.alertconfig import SinkKind
from duende_ublkd.core.errors import DuendeError
from duende_ublkd.core.recovery import PATH
from duende_ublkd.core.text import printable
from duende_ublkd.kernel.children import CommandOrder
from duende_ublkd.report.alerts.answer import Answer
from duende_ublkd.report.alerts.dispatch import MOST_DETAIL, Courier

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from duende_ublkd.core.alertconfig import SinkConfig
    from duende_ublkd.kernel.children import Children, Credentials

MOST_JSON = 4 << 10  # bytes of a notice in one variable
_FORMER_FOR = 2.0  # seconds for a run that has ended to be over
_FIRST_PLACE = -1000
"""Below it are no devices: a sink's command has an id of its own, so that Children tells them apart."""


class Carriers:
    """Brings notices to all sinks; never waits. To be used in one event loop."""

    def __init__(
        self,
        children: Callable[[], Children],
        users: Callable[[], Mapping[str, Credentials]],
        *,
        on_trouble: Callable[[str], None],
        spawn: Callable[[Sequence[str], int], None],
    ) -> None:
        """`users`: looked up when the configuration was read. `on_trouble(sentence)`: of the courier; "": none any more."""
        self.courier = Courier(on_trouble=on_trouble, spawn=spawn)
        self._commands = Commands(children, users)
        self._sinks: dict[str, SinkConfig] = {}

    def configure(self, sinks: Sequence[SinkConfig]) -> None:
        """From now on these."""
        self._sinks = {sink.name: sink for sink in sinks}
        self._commands.configure(sinks)
        self.courier.configure(sinks)

    def deliver(self, sink: str, notices: Sequence[Mapping[str, Any]], done: Callable[[Answer], None]) -> None:
        """Have a sink get these; `done` is called once, later."""
        is_command = sink in self._sinks and self._sinks[sink].sink is SinkKind.COMMAND
        carrier = self._commands if is_command else self.courier
        carrier.deliver(sink, notices, done)

    async def close(self) -> None:
        """Leave off. A command under way goes on by itself until its time is over."""
        self._commands.close()
        await self.courier.close()


class Commands:
    """Runs the commands that are sinks."""

    def __init__(self, children: Callable[[], Children], users: Callable[[], Mapping[str, Credentials]]) -> None:
        self._children = children
        self._users = users
        self._sinks: dict[str, SinkConfig] = {}
        self._places: dict[str, int] = {}  # by name; each keeps its own
        self._runs: set[asyncio.Task[None]] = set()

    def configure(self, sinks: Sequence[SinkConfig]) -> None:
        """From now on these; those that are no commands are not ours."""
        self._sinks = {sink.name: sink for sink in sinks if sink.sink is SinkKind.COMMAND}
        for name in self._sinks:
            self._places.setdefault(name, _FIRST_PLACE - len(self._places))

    def deliver(self, sink: str, notices: Sequence[Mapping[str, Any]], done: Callable[[Answer], None]) -> None:
        """Run the command for the only notice of these; `done` is called once, later."""
        run = asyncio.ensure_future(self._tell(self._sinks[sink], notices[0], done))
        self._runs.add(run)
        run.add_done_callback(self._runs.discard)

    def close(self) -> None:
        """Nobody waits for them any more."""
        for run in self._runs:
            run.cancel()

    async def _tell(self, sink: SinkConfig, notice: Mapping[str, Any], done: Callable[[Answer], None]) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            trouble, said = await self._run(sink, notice)
        except (DuendeError, OSError) as error:
            trouble, said = str(error), ""
        detail = "; ".join(each for each in (trouble, said) if each) or "exited with 0"
        done(
            Answer(ok=not trouble, permanent=False, detail=printable(detail, MOST_DETAIL), seconds=loop.time() - began)
        )

    async def _run(self, sink: SinkConfig, notice: Mapping[str, Any]) -> tuple[str, str]:
        """What went wrong, and what the command said last. DuendeError: it could not be run."""
        children, place = self._children(), self._places[sink.name]
        if not children.is_alive:
            raise DuendeError("no child is ready to run it", hint="it is run again")
        if not await children.former_is_over(place, _FORMER_FOR):
            raise DuendeError("what its former run has left behind has not ended", hint="it is run again")
        user = self._users()[sink.user] if sink.user else None
        command = children.run(
            CommandOrder(
                place,
                sink.command,
                environment(notice),
                sink.timeout,
                user,
                title=f"the command of the sink {sink.name}",
            )
        )
        try:
            await command.started()
            async with asyncio.timeout(sink.timeout):
                ended = await command.ended()
        except TimeoutError:
            left = await command.end()
            return f"it has not ended within {sink.timeout:g} s, and was ended{_after(left)}", ""
        left = await command.end()
        said = " / ".join(line for line in ended.output.splitlines() if line.strip())
        if ended.status is None:
            return ended.trouble or "its end was not seen", said
        if ended.status:
            how = f"exited with {ended.status}" if ended.status > 0 else f"ended by signal {-ended.status}"
            return f"{how}{_after(left)}", said
        return "", said


def environment(notice: Mapping[str, Any]) -> dict[str, str]:
    """The whole environment of such a command; README documents it."""
    dev_id = notice["dev_id"]
    known = {
        "STATE": notice["state"],
        "KIND": notice["kind"],
        "SEVERITY": notice["severity"],
        "SUMMARY": notice["summary"],
        "KEY": notice["key"],
        "ID": "" if dev_id is None else str(dev_id),
        "BLOCK_DEVICE": "" if dev_id is None else f"/dev/ublkb{dev_id}",
        "SINCE": notice["raised_at"],
        "RUNBOOK": notice["runbook_url"],
        "HOST": notice["host"],
        "JSON": _as_json(notice),
    }
    return {"PATH": PATH, "LANG": "C.UTF-8", **{f"DUENDE_UBLKD_ALERT_{name}": value for name, value in known.items()}}


def _as_json(notice: Mapping[str, Any]) -> str:
    """All of it; where that is too long, without the facts."""
    whole = json.dumps(notice)
    return whole if len(whole) <= MOST_JSON else json.dumps({**notice, "facts": {}})


def _after(left: str) -> str:
    return f"; {left}" if left else ""
