"""What a test server is told to do besides serving: say where it is, and stop or die there.

Every step is one JSON line on standard output: {"step": ..., "dev_ids": [...], "pid": ..., "at": CLOCK_MONOTONIC, ...}.
Standard input takes one command per line: `go` (leave a pause; SIGUSR1 does it too), `hold` and `release` (stop
answering I/O, and answer again), `stats`, `stop` (as SIGTERM: end as --exit-on-sigterm-with says).
"""

import asyncio
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable

log = logging.getLogger("tests.server")

# In the order of a device's life. The I/O steps come at most once; those of recovery replace the first two.
STEPS = (
    *("after-add", "after-params", "after-start-recovery", "after-open", "after-fetch"),
    "in-scan",  # an I/O before START_DEV has returned: the partition scan
    *("after-start", "after-recovery"),
    "in-flight",  # the first I/O is here and not answered
    "all-in-flight",  # every tag of every queue is here; nothing is answered until then
    "before-commit",  # the first I/O is done and its COMMIT_AND_FETCH_REQ not sent
    *("after-stop", "after-close", "after-delete"),
)


class Script:
    """Says each step, then dies or pauses there if told to."""

    def __init__(self, die_at: str | None, pause_at: Iterable[str]) -> None:
        self.dev_ids: list[int] = []
        self._die_at = die_at
        self._pause_at = set(pause_at)
        self._paused: list[asyncio.Future[None]] = []
        self._seen: set[str] = set()

    def cares_for(self, step: str) -> bool:
        return step == self._die_at or step in self._pause_at

    async def reach(self, step: str) -> None:
        pause = asyncio.get_running_loop().create_future()
        if step in self._pause_at:
            self._paused.append(pause)
        self.say(step)
        if step == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step in self._pause_at:
            await pause

    async def reach_once(self, step: str) -> None:
        if step not in self._seen:
            self._seen.add(step)
            await self.reach(step)

    def go_on(self) -> None:
        for pause in self._paused:
            if not pause.done():
                pause.set_result(None)
        self._paused.clear()

    def say(self, step: str, **details: object) -> None:
        line = {"step": step, "dev_ids": self.dev_ids, "pid": os.getpid(), "at": time.monotonic(), **details}
        log.info("%s %s", step, details or "")
        # One write: a forked worker shares the pipe.
        os.write(1, json.dumps(line).encode() + b"\n")


class Console:
    """Commands on standard input, for as long as the running loop lives."""

    def __init__(self, commands: dict[str, Callable[[], None]]) -> None:
        self._commands = commands
        self._loop = asyncio.get_running_loop()
        self._rest = b""
        os.set_blocking(0, False)
        try:
            self._loop.add_reader(0, self._read)
        except PermissionError:
            # A file or /dev/null, which epoll refuses: then signals are all there is.
            log.info("standard input takes no commands")
        for number, command in ((signal.SIGUSR1, "go"), (signal.SIGTERM, "stop")):
            if command in commands:
                self._loop.add_signal_handler(number, commands[command])

    def close(self) -> None:
        self._loop.remove_reader(0)

    def _read(self) -> None:
        chunk = os.read(0, 4096)
        if not chunk:
            self.close()
            return
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            command = line.decode().strip()
            log.info("told: %s", command)
            self._commands[command]()
