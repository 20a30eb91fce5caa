"""The daemon: builds the parts, takes the hints, keeps looking, and ends in order.

Order of the start: the lock (one daemon), the ring, the address, the hints, the first full look; only then READY=1. A hint
that arrives before the first look is done leads to another look. Order of the end: no more looks, deeds under way finished
or left to the kernel, then the ring.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

from duende_ublkd import __version__
from duende_ublkd.core.errors import DuendeError, KernelUnavailableError
from duende_ublkd.kernel.control import open_control_device
from duende_ublkd.kernel.memory import lock_memory, locked_bytes
from duende_ublkd.kernel.process import SoleDaemon, run_directory, tell_service_manager
from duende_ublkd.kernel.servers import DeathWatch
from duende_ublkd.kernel.udev import NodeWatch, Uevents
from duende_ublkd.parts import Parts, read_config
from duende_ublkd.report.journal import Journal, log
from duende_ublkd.report.metrics import Metrics
from duende_ublkd.report.web import WebServer

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from duende_ublkd.core.config import Address, Config
    from duende_ublkd.core.model import Judged, PassReport

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Daemon:
    """One run of the daemon; also the listener of its own hints and the source of its own pages."""

    def __init__(self, config: Config, path: str | None) -> None:
        self._config = config
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._ready = False
        self._metrics = Metrics()
        self._parts = Parts(config, (Journal(), self._metrics, self), on_command=self._metrics.command)
        self._metrics.read_from(overdue=lambda: self._parts.ring.stats.overdue, locked=locked_bytes)
        self._agenda = self._parts.agenda
        self._web: WebServer | None = None
        self._deaths = DeathWatch(self._on_death)
        self._nodes: NodeWatch | None = None
        self._trouble = ""
        self._reloading = asyncio.Lock()
        self._reloads: set[asyncio.Task[None]] = set()

    @property
    def devices(self) -> Mapping[int, Judged]:
        """The devices of the last pass."""
        return self._parts.reconciler.devices

    @property
    def is_ready(self) -> bool:
        """A first full look is done, and the driver answered the last one."""
        return self._ready and not self._trouble

    async def run(self) -> None:
        """Until told to stop. Raises DuendeError for what keeps it from starting, and for a defect."""
        os.close(open_control_device())
        self._lock_memory()
        self._web = await self._listen(self._config.http.listen)
        self._nodes = NodeWatch(self)
        uevents = Uevents(self)
        self._parts.kernel.saw_disk = uevents.saw_disk
        self._take_signals()
        try:
            await self._look_until_stopped()
        finally:
            tell_service_manager("STOPPING=1")
            uevents.close()
            self._nodes.close()
            self._deaths.close()
            await self._parts.close()
            if self._web:
                await self._web.close()
        log.info("stopped")

    async def _look_until_stopped(self) -> None:
        if await self._unless_stopped(self._look_first()):
            return
        count = len(self.devices)
        log.info("duende-ublkd %s looks after %d device%s", __version__, count, "" if count == 1 else "s")
        tell_service_manager("READY=1")
        while not await self._unless_stopped(self._look_once()):
            pass

    async def _unless_stopped(self, look: Coroutine[None, None, None]) -> bool:
        """Run it to its end, unless told to stop; returns whether that was so."""
        looking = asyncio.ensure_future(look)
        stopped = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait([looking, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if looking.done():
            looking.result()
        else:
            looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await looking
        return self._stop.is_set()

    async def _look_first(self) -> None:
        first = await self._parts.reconciler.run_pass(None)
        if first.trouble:
            raise KernelUnavailableError(first.trouble, hint=first.hint)
        self._ready = True
        self._agenda.later(None, self._config.daemon.resync_interval)

    async def _look_once(self) -> None:
        dev_ids = await self._agenda.next()
        await self._parts.reconciler.run_pass(dev_ids)
        if dev_ids is None:
            self._agenda.later(None, self._config.daemon.resync_interval)

    def intends(self, device: Judged) -> None:
        """Nothing to do before a deed."""

    def passed(self, report: PassReport) -> None:
        """Watch what a pass found: the servers' lives and the nodes' opens and closes."""
        if report.is_deed:
            return
        self._trouble = report.trouble
        servers = {
            each.seen.server.pid for each in report.devices.values() if each.seen.server and each.seen.server.alive
        }
        self._deaths.keep_only(servers)
        for pid in servers:
            self._deaths.watch(pid)
        if self._nodes:
            nodes = {
                dev_id: (each.seen.char_device, each.seen.identity.sysfs_inode)
                for dev_id, each in report.devices.items()
                if each.seen.char_device and each.seen.identity.sysfs_inode
            }
            self._nodes.keep(nodes)

    def on_uevent(self, subsystem: str, action: str, dev_id: int) -> None:
        """A hint from the kernel."""
        self._metrics.uevent(subsystem, action)
        self._agenda.soon(dev_id)

    def on_driver(self, action: str) -> None:
        """The module came or went."""
        self._metrics.uevent("misc", action)
        self._parts.kernel.forget_driver()
        self._agenda.soon(None)

    def on_overflow(self) -> None:
        """Hints were lost."""
        self._metrics.overflowed()
        self._agenda.soon(None)

    def on_node(self, dev_id: int, *, opened: bool) -> None:
        """A node was opened or closed, by a server or by ourselves."""
        if opened:
            self._parts.reconciler.note_opened(dev_id)
        self._agenda.soon(dev_id)

    def _on_death(self, pid: int) -> None:
        now = time.monotonic()
        for dev_id, device in self.devices.items():
            if device.seen.server and device.seen.server.pid == pid:
                self._parts.reconciler.ledger.note_death(dev_id, now)
                self._agenda.soon(dev_id)

    def _lock_memory(self) -> None:
        """Before the first look, and with everything imported. A daemon that may be swapped out is better than none."""
        if not self._config.daemon.lock_memory:
            return
        try:
            lock_memory()
        except DuendeError as error:
            log.warning("%s; %s", error, error.hint)

    def _take_signals(self) -> None:
        for number in STOP_SIGNALS:
            self._loop.add_signal_handler(number, self._stop.set)
        self._loop.add_signal_handler(signal.SIGUSR1, self._agenda.soon, None)
        self._loop.add_signal_handler(signal.SIGHUP, self._start_reload)

    def _start_reload(self) -> None:
        reload = asyncio.ensure_future(self.reload())
        self._reloads.add(reload)
        reload.add_done_callback(self._end_reload)

    def _end_reload(self, reload: asyncio.Task[None]) -> None:
        self._reloads.discard(reload)
        if not reload.cancelled() and (defect := reload.exception()):
            self._agenda.fail(defect)

    async def reload(self) -> None:
        """Take the configuration file anew; keep the old one when the new one is wrong."""
        async with self._reloading:
            await self._take_config()

    async def _take_config(self) -> None:
        tell_service_manager(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            config = read_config(self._path)
            if config.http.listen != self._config.http.listen:
                web = await self._listen(config.http.listen)
                if self._web:
                    await self._web.close()
                self._web = web
        except DuendeError as error:
            log.error("the old configuration stays: %s; %s", error, error.hint)
        else:
            self._config = self._parts.reconciler.config = config
            self._parts.control.deadline = config.daemon.command_deadline
            self._agenda.soon(None)
            log.info("configuration read anew")
        tell_service_manager("READY=1")

    async def _listen(self, address: Address | None) -> WebServer | None:
        if address is None:
            return None
        server = WebServer(self, self._metrics)
        await server.listen(address.host, address.port)
        return server


async def run(config: Config, path: str | None) -> None:
    """Run the daemon until a signal stops it."""
    lock = SoleDaemon(run_directory())
    try:
        await Daemon(config, path).run()
    finally:
        lock.close()
