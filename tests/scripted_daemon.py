"""As much of the daemon as tells people, as a process of its own, with a kernel that does what its stdin says.

`python -m tests.scripted_daemon CONFIG RUN_DIRECTORY PORT [DEED ID ...]`: journal, holds, alerts, courier, metrics and
HTTP are the daemon's own, and so is what judges; only the kernel is the tests' fake. The deeds of the command line are
done before its first look, so that a second one finds the world that the first one has left. It says `ready`, and then
`done` after each line.

Deeds: `serve 3` (recoverable), `lend 3` (not recoverable: an orphan when its server dies), `kill 3`, `recover 3`.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from duende_ublkd.core.config import load
from duende_ublkd.core.model import Feature
from duende_ublkd.lasting import Lasting
from duende_ublkd.parts import Reporters
from duende_ublkd.reconcile import Agenda, Reconciler
from duende_ublkd.report.alerts.dispatch import Courier
from duende_ublkd.report.metrics import Metrics
from duende_ublkd.report.web import WebServer
from tests.fake_kernel import FakeKernel
from tests.test_web import ASource

if TYPE_CHECKING:
    from collections.abc import Sequence

LOOK_EVERY = 0.5  # seconds


class ScriptedDaemon:
    """To be made in the running loop."""

    def __init__(self, config_path: str, directory: str) -> None:
        loop = asyncio.get_running_loop()
        config = load(Path(config_path).read_bytes(), config_path)
        self.kernel = FakeKernel(loop)
        self.metrics = Metrics()
        self.courier = Courier(on_trouble=print, spawn=_spawn)
        self.lasting = Lasting(config, directory, _spawn, lambda _dev_id, _hand: False, self.courier)
        self.agenda = Agenda()
        reporters = Reporters(self.lasting, self.metrics)
        self.reconciler = Reconciler(self.kernel, config, reporters, self.agenda, clock=loop.time)
        self.kernel.hint = self.agenda.soon
        self.metrics.read_from(
            overdue=int,
            locked=lambda: 1,
            store=self.lasting.store,
            holds=lambda: self.lasting.holds,
            alerts=self.lasting.desk,
        )

    def do(self, deed: str, dev_id: int) -> None:
        """What happens in the world."""
        match deed:
            case "serve":
                self.kernel.serve(dev_id=dev_id, flags=Feature.USER_RECOVERY)
            case "lend":
                self.kernel.serve(dev_id=dev_id)
            case "kill":
                (server,) = self.kernel.taken[dev_id].openers
                self.kernel.kill(server)
            case "recover":
                self.kernel.recover(self.kernel.taken[dev_id], self.kernel.process())
                self.kernel.finish_recovery(self.kernel.taken[dev_id])
            case _:
                raise ValueError(deed)
        self.agenda.soon(dev_id)

    async def run(self, port: int) -> None:
        await self.lasting.restore(self.reconciler)
        self.courier.start()
        web = WebServer(ASource(), self.metrics)
        await web.listen("127.0.0.1", port)
        looking = asyncio.ensure_future(self._look())
        lines = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        print("ready", flush=True)
        while line := (await lines.readline()).split():
            self.do(line[0].decode(), int(line[1]))
            print("done", flush=True)
        looking.cancel()

    async def _look(self) -> None:
        await self.reconciler.run_pass(None)
        self.lasting.forget_the_gone()
        while True:
            dev_ids = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY):
                    dev_ids = await self.agenda.next()
            await self.reconciler.run_pass(dev_ids)


def _spawn(argv: Sequence[str], stdin: int) -> None:
    subprocess.Popen(argv, stdin=stdin)


async def main() -> None:
    config_path, directory, port, *deeds = sys.argv[1:]
    daemon = ScriptedDaemon(config_path, directory)
    for deed, dev_id in zip(deeds[::2], deeds[1::2], strict=True):
        daemon.do(deed, int(dev_id))
    await daemon.run(int(port))


if __name__ == "__main__":
    asyncio.run(main())
