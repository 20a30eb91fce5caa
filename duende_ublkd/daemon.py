"""The daemon: builds the parts, takes the hints, keeps looking, and ends in order.

Order of the start: the lock (one daemon), the ring, the children, what a former daemon left, memory locked, the addresses,
the hints, the first full look; only then READY=1. A hint that arrives before the first look is done leads to another look.
Order of the end: no more looks, deletions under way finished or left to the kernel, recovery commands left to themselves,
then the ring, and the journal last.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

from duende_ublkd import __version__
from duende_ublkd.carriers import Carriers
from duende_ublkd.client import run_directory
from duende_ublkd.core.alerting import RUNBOOK
from duende_ublkd.core.errors import DuendeError, KernelUnavailableError
from duende_ublkd.core.model import EventKind, Level, feature_names
from duende_ublkd.core.text import printable
from duende_ublkd.kernel.control import open_control_device
from duende_ublkd.kernel.memory import keep_what_is_there, lock_memory, locked_bytes
from duende_ublkd.kernel.process import SoleDaemon, make_run_directory, tell_service_manager, watchdog_patience
from duende_ublkd.kernel.ring import CANCEL_GRACE
from duende_ublkd.kernel.selfwatch import SelfWatch, longest_look
from duende_ublkd.kernel.servers import DeathWatch
from duende_ublkd.kernel.udev import NodeWatch, Uevents
from duende_ublkd.lasting import Lasting
from duende_ublkd.parts import Parts
from duende_ublkd.report import objects, present
from duende_ublkd.report.journal import log
from duende_ublkd.report.metrics import Metrics
from duende_ublkd.report.page import Health, Pages, View
from duende_ublkd.report.web import SOCKET_NAME, WebServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
    from typing import Any

    from duende_ublkd.core.config import Config
    from duende_ublkd.core.holds import Hold, Released
    from duende_ublkd.core.model import DriverFacts, Judged, PassReport, Process
    from duende_ublkd.report.page import Page
    from duende_ublkd.report.store import Record

_EVENTS_SHOWN = 50  # on the page
_LAST_WORDS = 0.5  # seconds that the journal has for what is not written yet
_READ_FOR = 5.0  # seconds for a changed configuration to be read, and the users in it to be looked up
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Daemon:
    """One run of the daemon; also the listener of its own hints and the source of its own pages."""

    def __init__(self, config: Config, read: Callable[[], Config], directory: str) -> None:
        """`read`: the configuration anew. `directory`: the run directory."""
        self._config = config
        self._directory = directory
        self._read = read
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._ready = False
        self._metrics = Metrics()
        self._carriers = Carriers(
            lambda: self._parts.children,
            lambda: self._parts.kernel.users,
            on_trouble=self._on_courier,
            spawn=self._spawn,
        )
        self._lasting = Lasting(config, directory, self._spawn, self._watch_former, self._carriers)
        self._journal = self._lasting.journal
        self._desk = self._lasting.desk
        self._parts = Parts(
            config,
            (self._lasting, self._metrics, self),
            on_command=self._metrics.command,
            on_trouble=self._on_children,
            on_hold_ended=self._lasting.on_hold_ended,
        )
        self._metrics.read_from(
            overdue=lambda: self._parts.ring.stats.overdue + self._parts.children.overdue,
            locked=locked_bytes,
            store=self._lasting.store,
            holds=lambda: self.holds,
            lag=lambda: self._watch.lag,
            dry_run=lambda: self._config.daemon.dry_run,
            alerts=self._desk,
        )
        self._watch = SelfWatch(
            self._parts.ring.nop, patience=watchdog_patience(), status=self._status_line, note=self._on_self
        )
        self._agenda = self._parts.agenda
        self._web: WebServer | None = None
        self._local: WebServer | None = None
        self._deaths = DeathWatch(self._on_death)
        self._nodes: NodeWatch | None = None
        self._trouble = ""
        self._hint = ""  # what to type then
        self._driver: DriverFacts | None = None
        self._started_at = time.time()
        self._last_look_at: float | None = None  # at all devices
        self._host = printable(socket.gethostname())
        self._pages = Pages(self._view)
        self._reloading = asyncio.Lock()
        self._reload_is_due = False
        self._reloads: set[asyncio.Task[str]] = set()

    @property
    def devices(self) -> Mapping[int, Judged]:
        """The devices of the last pass."""
        return self._parts.reconciler.devices

    @property
    def is_ready(self) -> bool:
        """A first full look is done, and the driver answered the last one."""
        return self._ready and not self._trouble

    @property
    def records(self) -> Mapping[int, dict[str, Any]]:
        """What is known of the devices beyond the last look."""
        return self._lasting.records()

    @property
    def holds(self) -> Sequence[Hold]:
        """The holds that are in force."""
        return self._lasting.holds

    def hold(self, dev_id: int, seconds: float, why: str, uid: int) -> Hold:
        """Hands off a device for so long."""
        return self._lasting.hold(dev_id, seconds, why, uid)

    def release(self, dev_id: int, uid: int) -> Released:
        """End a hold, and begin anew with what was given up."""
        return self._lasting.release(dev_id, uid)

    async def read_events(
        self, *, after: int, limit: int, dev_id: int | None, since: float | None
    ) -> tuple[list[Record], str]:
        """What the journal holds, and why that may not be all."""
        return await self._lasting.store.read(after=after, limit=limit, dev_id=dev_id, since=since)

    def follow_events(self, after: int) -> AsyncIterator[Record]:
        """Events as they come."""
        return self._lasting.store.follow(after)

    def alerts(self) -> dict[str, Any]:
        """What people are told of, and how each sink does."""
        return self._desk.to_object()

    def page(self) -> Page:
        """What a person on call wants to see in one look."""
        return self._pages.page()

    def status(self) -> dict[str, Any]:
        """The same for programs."""
        return self._pages.status()

    def _view(self) -> View:
        now, at = time.monotonic(), time.time()
        store = self._lasting.store
        return View(
            __version__,
            self._host,
            self._started_at,
            self._last_look_at,
            devices=[present.as_object(device) for device in self.devices.values()],
            holds=[objects.hold_object(hold, now=now, at=at) for hold in self.holds],
            events=store.tail(limit=_EVENTS_SHOWN),
            alerts=self.alerts(),
            health=Health(
                self._watch.lag,
                self._parts.ring.stats.overdue + self._parts.children.overdue,
                store.stats.trouble,
                store.stats.waiting,
                store.stats.dropped,
                locked_bytes(),
            ),
            trouble=self._trouble,
            hint=self._hint,
            features=feature_names(self._driver.features) if self._driver else (),
            slots_max=self._driver.slots_max if self._driver else None,
            dry_run=self._config.daemon.dry_run,
            look_every=self._config.daemon.resync_interval,
            runbook=RUNBOOK,
        )

    async def test_alert(self, sink: str | None) -> list[Mapping[str, Any]]:
        """Send an alert for trial to one sink, None: to each; what each answered."""
        return [*await self._desk.test(sink)]

    async def run(self) -> None:
        """Until told to stop. Raises DuendeError for what keeps it from starting, and for a defect."""
        self._loop.add_signal_handler(signal.SIGUSR1, self._agenda.soon, None)
        self._loop.add_signal_handler(signal.SIGHUP, self._reload_later)
        os.close(open_control_device())
        try:
            self._parts.children.start()
            await self._lasting.restore(self._parts.reconciler)
            self._carriers.courier.start()
            self._lock_memory()
            self._web = await self._listen(self._config)
            self._local = WebServer(self, self._metrics)
            await self._local.listen_local(f"{self._directory}/{SOCKET_NAME}")
            await self._run()
        finally:
            tell_service_manager("STOPPING=1")
            self._desk.close()
            left, _, _ = await asyncio.gather(self._parts.close(), self._close_servers(), self._carriers.close())
            for dev_id in sorted(left):
                self._note(Level.WARNING, f"ublk{dev_id}: its deletion is not over, and the kernel's to finish")
            self._note(Level.INFO, "stopped")
            await self._lasting.close(_LAST_WORDS)

    def _spawn(self, argv: Sequence[str], stdin: int) -> None:
        self._parts.children.spawn(argv, stdin)

    def _watch_former(self, dev_id: int, hand: Process) -> bool:
        return self._parts.children.watch_former(dev_id, hand)

    async def _close_servers(self) -> None:
        await asyncio.gather(*(server.close() for server in (self._web, self._local) if server))

    async def _run(self) -> None:
        self._nodes = NodeWatch(self)
        uevents = Uevents(self)
        self._parts.kernel.saw_disk = uevents.saw_disk
        self._take_signals()
        self._watch.start(self._agenda.fail)
        try:
            await self._look_until_stopped()
        finally:
            self._watch.close()
            uevents.close()
            self._nodes.close()
            self._deaths.close()

    async def _look_until_stopped(self) -> None:
        if await self._unless_stopped(self._look_first()):
            return
        count = len(self.devices)
        self._note(Level.INFO, f"duende-ublkd {__version__} looks after {count} device{'' if count == 1 else 's'}")
        tell_service_manager(f"READY=1\nSTATUS={self._status_line()}")
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
        first = await self._look(None)
        if first.trouble:
            raise KernelUnavailableError(first.trouble, hint=first.hint)
        self._lasting.forget_the_gone()
        self._ready = True
        self._agenda.later(None, self._config.daemon.resync_interval)

    async def _look_once(self) -> None:
        dev_ids = await self._agenda.next()
        await self._look(dev_ids)
        if dev_ids is None:
            self._agenda.later(None, self._config.daemon.resync_interval)
            self._keep_children()

    async def _look(self, dev_ids: set[int] | None) -> PassReport:
        longest = longest_look(self._config.daemon.command_deadline, CANCEL_GRACE)
        self._watch.look_began(longest)
        report = await self._parts.reconciler.run_pass(dev_ids)
        blind = self._parts.reconciler.blind
        why = f"not everybody who uses devices can be seen: {blind}; what depends on it is not done"
        self._desk.degraded("look", why if blind else None)
        self._watch.look_ended(self._config.daemon.resync_interval + longest)
        return report

    def _status_line(self) -> str:
        """For `systemctl status`: one line."""
        if self._trouble:
            return printable(self._trouble)
        counts = collections.Counter(device.verdict.kind.value for device in self.devices.values())
        return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "no ublk devices"

    def _keep_children(self) -> None:
        """Should they have died, and none of them taken the place of the dead: others, before they are needed."""
        try:
            self._parts.children.start()
        except DuendeError as error:
            why = f"{error}; {error.hint}"
            self._note(Level.WARNING, why)
            self._desk.degraded("children", why)
        else:
            self._desk.degraded("children", None)

    def intends(self, device: Judged) -> None:
        """Nothing to do before a deed."""

    def passed(self, report: PassReport) -> None:
        """Watch what a pass found: the servers' lives and the nodes' opens and closes."""
        if report.is_deed:
            return
        self._trouble, self._hint = report.trouble, report.hint
        if report.full and not report.trouble:
            self._last_look_at = time.time()
        self._driver = report.driver or self._driver
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
        keep_what_is_there()
        if not self._config.daemon.lock_memory:
            return
        try:
            lock_memory()
        except DuendeError as error:
            why = f"{error}; {error.hint}"
            self._note(Level.WARNING, why)
            self._desk.degraded("memory", why)

    def _take_signals(self) -> None:
        for number in STOP_SIGNALS:
            self._loop.add_signal_handler(number, self._stop.set)
        self._loop.add_signal_handler(signal.SIGHUP, self._start_reload)
        if self._reload_is_due:
            self._start_reload()

    def _reload_later(self) -> None:
        """It is still starting, perhaps for seconds, where a disk does not answer."""
        self._reload_is_due = True

    def _start_reload(self) -> None:
        reload: asyncio.Task[str] = asyncio.ensure_future(self.reload())
        self._reloads.add(reload)
        reload.add_done_callback(self._end_reload)

    def _end_reload(self, reload: asyncio.Task[str]) -> None:
        self._reloads.discard(reload)
        if not reload.cancelled() and (defect := reload.exception()):
            self._agenda.fail(defect)

    async def reload(self) -> str:
        """Take the configuration file anew; keep the old one when the new one is wrong, and return why it is."""
        async with self._reloading:
            return await self._take_config()

    async def _take_config(self) -> str:
        tell_service_manager(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            config = await self._read_anew()
            if config.http.listen != self._config.http.listen or (config.http.listen and not self._web):
                await self._move_to(config)
            elif self._web:
                self._web.take(config.web)
            self._parts.take(config)
            self._lasting.take(config)
        except DuendeError as error:
            why = "; ".join([*str(error).splitlines(), error.hint])
            self._note(Level.ERROR, f"the old configuration stays: {why}")
        else:
            why = ""
            fixed = _needs_restart(self._config, config)
            self._config = config
            self._agenda.soon(None)
            self._note(Level.INFO, f"configuration read anew{fixed}")
        finally:
            tell_service_manager("READY=1")
        return why

    async def _read_anew(self) -> Config:
        """DuendeError, whatever goes wrong: reading has changed nothing yet, so that the old configuration can stay."""
        try:
            return await _in_a_thread(self._read)
        except DuendeError:
            raise
        except Exception as error:  # a defect in reading is no reason for a daemon to end that has a configuration
            log.exception("a defect in reading the configuration")
            why = f"reading the new one failed: {type(error).__name__}: {printable(str(error), 300)}"
            raise DuendeError(why, hint="its traceback is in the log: journalctl -u duende-ublkd") from error

    async def _move_to(self, config: Config) -> None:
        """Listen where this configuration says. UsageError: that cannot be had, and the old address is listened on still.

        Of one port, the old address may be in the new one's way: it is given back first.
        """
        old, new = self._config.http.listen, config.http.listen
        in_the_way = self._web if old and new and old.port == new.port else None
        if in_the_way:
            in_the_way.stop_listening()
        try:
            web = await self._listen(config)
        except DuendeError:
            if in_the_way:
                await self._listen_again(in_the_way)
            raise
        if self._web:
            await self._web.close()
        self._web = web

    async def _listen_again(self, web: WebServer) -> None:
        try:
            await web.listen_again()
        except DuendeError as error:  # the next reload tries anew
            self._note(Level.ERROR, f"nobody is served over TCP any more: {error}")
            self._web = None
            await web.close()

    def _on_children(self, sentence: str) -> None:
        """Their memory could not be locked; nobody tells when that is over."""
        self._note(Level.WARNING, sentence)
        self._desk.degraded("children-memory", sentence)

    def _on_courier(self, sentence: str) -> None:
        if sentence:
            self._note(Level.WARNING, sentence)
        self._desk.degraded("courier", sentence or None)

    def _on_self(self, level: Level, text: str) -> None:
        """INFO: it gets on again. WARNING: it stood still for a moment, which is over. ERROR: it is stuck."""
        self._note(level, text)
        cause = "late" if level is Level.WARNING else "stuck"
        if level is not Level.INFO:
            self._desk.degraded(cause, text)
        if level is not Level.ERROR:
            self._desk.degraded(cause, None)

    def _note(self, level: Level, text: str) -> None:
        self._journal.note(EventKind.DAEMON, level, text)

    async def _listen(self, config: Config) -> WebServer | None:
        address = config.http.listen
        if address is None:
            return None
        server = WebServer(self, self._metrics)
        await server.listen(address.host, address.port, config.web)
        return server


async def _in_a_thread(read: Callable[[], Config]) -> Config:
    """Read what is on disks, and may be asked of others, without having the loop wait. DuendeError: it takes too long.

    Not an executor of asyncio's, whose threads are waited for at the end.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Config] = loop.create_future()

    def settle(outcome: Config | BaseException) -> None:
        if answer.done():
            return
        if isinstance(outcome, BaseException):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)

    def work() -> None:
        try:
            outcome: Config | BaseException = read()
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            outcome = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=work, name="configuration", daemon=True).start()
    try:
        async with asyncio.timeout(_READ_FOR):
            return await answer
    except TimeoutError:
        why = f"the configuration could not be read within {_READ_FOR:g} s"
        raise DuendeError(why, hint="is its disk, or who knows the users in it, out of order?") from None


def _needs_restart(old: Config, new: Config) -> str:
    """Which changed keys a running daemon does not take."""
    keys = {
        "daemon.lock_memory": old.daemon.lock_memory != new.daemon.lock_memory,
        "daemon.state_dir": old.daemon.state_dir != new.daemon.state_dir,
        "journal": old.journal != new.journal,
    }
    changed = ", ".join(key for key, differs in keys.items() if differs)
    return f"; {changed} as before until systemctl restart duende-ublkd" if changed else ""


async def run(config: Config, read: Callable[[], Config]) -> None:
    """Run the daemon until a signal stops it. `read`: the configuration anew."""
    directory = run_directory()
    make_run_directory(directory)
    lock = SoleDaemon(directory)
    try:
        await Daemon(config, read, directory).run()
    finally:
        lock.close()
