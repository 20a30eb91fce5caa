"""What of the daemon can be tried without a driver; the rest is for the guest's tests."""

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from duende_ublkd.core.alertconfig import SinkConfig, SinkKind
from duende_ublkd.core.config import Address, Config, DaemonConfig, HttpConfig
from duende_ublkd.core.errors import UsageError
from duende_ublkd.core.model import Level
from duende_ublkd.daemon import Daemon
from duende_ublkd.report.web import WebServer
from tests.test_web import PORT, a_request

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the daemon is root's")


def test_a_look_that_hangs_is_given_up_when_it_is_told_to_stop() -> None:
    async def stop_while_it_looks() -> bool:
        daemon = Daemon.__new__(Daemon)
        daemon._stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, daemon._stop.set)
        return await daemon._unless_stopped(asyncio.sleep(60))

    began = time.monotonic()
    assert asyncio.run(stop_while_it_looks())
    assert time.monotonic() - began < 10


def test_a_look_that_ends_is_followed_by_the_next() -> None:
    async def look() -> bool:
        daemon = Daemon.__new__(Daemon)
        daemon._stop = asyncio.Event()
        return await daemon._unless_stopped(asyncio.sleep(0))

    assert not asyncio.run(look())


@needs_root
def test_what_is_amiss_with_the_daemon_itself_is_an_alert_on_its_pages_until_it_is_mended(tmp_path: Path) -> None:
    async def story() -> None:
        config = Config(daemon=DaemonConfig(state_dir=str(tmp_path / "state")))
        daemon = Daemon(config, lambda: config, str(tmp_path))
        desk = daemon._desk
        await daemon._lasting.restore(daemon._parts.reconciler)
        assert daemon.alerts() == {"alerts": [], "sinks": [], "undelivered": [], "dropped": 0}
        daemon._on_self(Level.ERROR, "the daemon is stuck: its ring has not carried a no-op within 5 s")
        daemon._on_courier("the courier of alerts hangs")
        daemon._on_children("memory of the daemon's children cannot be locked")
        assert [alert.key for alert in desk.alerts] == ["daemon/stuck", "daemon/courier", "daemon/children-memory"]
        assert daemon.status()["alerts"] == 3
        assert b"has not carried a no-op" in daemon.page().body
        assert json.loads(json.dumps(daemon.alerts()))["alerts"][0]["kind"] == "degraded"
        daemon._on_self(Level.INFO, "the daemon gets on again")
        daemon._on_courier("")
        daemon._on_self(Level.WARNING, "the daemon stood still for 6 s")
        doubted = [case.alert.key for case in desk._book.all_open() if case.gone_since is not None]
        assert doubted == ["daemon/stuck", "daemon/courier", "daemon/late"]
        with pytest.raises(UsageError, match="no sink"):
            await daemon.test_alert(None)
        await daemon._lasting.close(1.0)
        await daemon._carriers.close()
        await daemon._parts.close()

    asyncio.run(story())


@needs_root
def test_a_configuration_that_is_taken_anew_brings_its_sinks(tmp_path: Path) -> None:
    async def story() -> None:
        config = Config(daemon=DaemonConfig(state_dir=str(tmp_path / "state")))
        daemon = Daemon(config, lambda: config, str(tmp_path))
        await daemon._lasting.restore(daemon._parts.reconciler)
        sink = SinkConfig(SinkKind.COMMAND, "tell", command=("/bin/echo", "heard"))
        daemon._parts.children.start()
        daemon._lasting.take(Config(alerts=(sink,)))
        (answer,) = await daemon.test_alert("tell")
        assert (answer["sink"], answer["ok"], answer["detail"]) == ("tell", True, "heard")
        await daemon._lasting.close(5.0)
        await daemon._carriers.close()
        await daemon._parts.close()

    asyncio.run(story())


# --- reloading

OTHER_PORT = PORT + 1  # test_fuzz_http's


@dataclass
class Told:
    """A service manager, as far as it is told of readiness."""

    channel: socket.socket

    def words(self) -> list[str]:
        """Since the last time: of RELOADING, READY and STOPPING."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self.channel.recv(4096).decode().partition("=")[0])
        return found


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel:
        channel.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield Told(channel)


class Reloading(Daemon):
    """A daemon that takes whatever `next` is for the configuration that it reads: a configuration, or an error."""

    next: Any
    thief: socket.socket | None = None

    def __init__(self, config: Config, directory: str) -> None:
        super().__init__(config, self.read, directory)

    async def _listen(self, config: Config) -> WebServer | None:
        if self.thief:  # somebody is faster
            assert self._config.http.listen
            self.thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.thief.bind((self._config.http.listen.host, self._config.http.listen.port))
            self.thief.listen()
        return await super()._listen(config)

    def read(self) -> Config:
        if isinstance(self.next, BaseException):
            raise self.next
        found: Config = self.next
        return found


def reloading(directory: Path, listen: Address | None, test: Callable[[Reloading], Awaitable[None]]) -> None:
    async def story() -> None:
        config = Config(daemon=DaemonConfig(state_dir=str(directory / "state")), http=HttpConfig(listen))
        daemon = Reloading(config, str(directory))
        await daemon._lasting.restore(daemon._parts.reconciler)
        daemon._web = await daemon._listen(config)
        try:
            await test(daemon)
        finally:
            await daemon._close_servers()
            await daemon._lasting.close(1.0)
            await daemon._carriers.close()
            await daemon._parts.close()

    asyncio.run(story())


def listening_on(config: Config, host: str, port: int = PORT) -> Config:
    return replace(config, http=HttpConfig(Address(host, port)))


async def answers(host: str, port: int = PORT) -> bool:
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return False
    writer.write(a_request("GET", "/-/healthy"))
    answer = await reader.read()
    writer.close()
    return b"healthy" in answer


@needs_root
def test_a_reload_goes_from_one_address_to_all_of_the_same_port_and_back(tmp_path: Path, told: Told) -> None:
    async def move(daemon: Reloading) -> None:
        for host, elsewhere in (("0.0.0.0", True), ("127.0.0.1", False), ("0.0.0.0", True)):
            daemon.next = listening_on(daemon._config, host)
            assert await daemon.reload() == ""
            assert daemon._config is daemon.next
            assert await answers("127.0.0.1")
            assert await answers("127.0.0.2") is elsewhere
        assert told.words() == ["RELOADING", "READY"] * 3

    reloading(tmp_path, Address("127.0.0.1", PORT), move)


@needs_root
def test_a_reload_goes_to_another_port_and_leaves_the_old_one(tmp_path: Path) -> None:
    async def move(daemon: Reloading) -> None:
        daemon.next = listening_on(daemon._config, "127.0.0.1", OTHER_PORT)
        assert await daemon.reload() == ""
        assert await answers("127.0.0.1", OTHER_PORT)
        assert not await answers("127.0.0.1")
        daemon.next = replace(daemon._config, http=HttpConfig(None))
        assert await daemon.reload() == ""
        assert not await answers("127.0.0.1", OTHER_PORT)
        daemon.next = listening_on(daemon._config, "127.0.0.1")
        assert await daemon.reload() == ""
        assert await answers("127.0.0.1")

    reloading(tmp_path, Address("127.0.0.1", PORT), move)


@needs_root
def test_of_an_address_that_cannot_be_had_the_old_one_stays_with_who_is_connected(tmp_path: Path, told: Told) -> None:
    async def move(daemon: Reloading) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
        former = daemon._config
        for port in (PORT, OTHER_PORT):
            daemon.next = listening_on(former, "192.0.2.1", port)
            assert "cannot listen on 192.0.2.1:" in await daemon.reload()
            assert daemon._config is former
            assert await answers("127.0.0.1")
        writer.write(a_request("GET", "/-/healthy"))
        assert b"healthy" in await reader.read()
        writer.close()
        assert told.words() == ["RELOADING", "READY"] * 2

    reloading(tmp_path, Address("127.0.0.1", PORT), move)


@needs_root
def test_a_port_that_was_lost_while_moving_is_taken_by_the_next_reload(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def move(daemon: Reloading) -> None:
        former = daemon._config
        with socket.socket() as daemon.thief:
            daemon.next = listening_on(former, "192.0.2.1")
            assert "cannot listen on 192.0.2.1:" in await daemon.reload()
        assert "nobody is served over TCP any more: cannot listen on 127.0.0.1:" in caplog.text
        assert not await answers("127.0.0.1")
        daemon.thief, daemon.next = None, former
        assert await daemon.reload() == ""
        assert await answers("127.0.0.1")

    with caplog.at_level(logging.INFO):
        reloading(tmp_path, Address("127.0.0.1", PORT), move)


@needs_root
def test_a_defect_in_reading_leaves_the_old_configuration_and_the_daemon(
    tmp_path: Path, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    async def read_wrongly(daemon: Reloading) -> None:
        former = daemon._config
        daemon.next = TypeError("cadata should be\nsomething else")
        assert "TypeError: cadata should be\\nsomething else" in await daemon.reload()
        assert daemon._config is former
        assert await answers("127.0.0.1")
        daemon.next = listening_on(former, "127.0.0.1")
        assert await daemon.reload() == ""
        assert told.words() == ["RELOADING", "READY"] * 2

    reloading(tmp_path, Address("127.0.0.1", PORT), read_wrongly)
    assert "Traceback" in caplog.text
    assert "the old configuration stays: reading the new one failed: TypeError" in caplog.text


@needs_root
def test_a_defect_in_taking_ends_the_daemon_and_the_service_manager_does_not_wait(tmp_path: Path, told: Told) -> None:
    async def take_wrongly(daemon: Reloading) -> None:
        daemon.next = "no configuration at all"
        daemon._start_reload()
        async with asyncio.timeout(10):
            with pytest.raises(AttributeError):
                await daemon._agenda.next()
        assert told.words() == ["RELOADING", "READY"]

    reloading(tmp_path, Address("127.0.0.1", PORT), take_wrongly)


@needs_root
def test_a_scrape_says_whether_the_daemon_only_says_what_it_would_do(tmp_path: Path) -> None:
    async def look(daemon: Reloading) -> None:
        assert b"\nduende_ublkd_dry_run 0.0\n" in daemon._metrics.render()
        daemon.next = replace(daemon._config, daemon=replace(daemon._config.daemon, dry_run=True))
        assert await daemon.reload() == ""
        assert b"\nduende_ublkd_dry_run 1.0\n" in daemon._metrics.render()

    reloading(tmp_path, None, look)


@needs_root
def test_several_mistakes_of_a_new_configuration_are_one_line_of_the_log(tmp_path: Path) -> None:
    async def read(daemon: Reloading) -> None:
        daemon.next = UsageError("f:1: one\nf:2: another", hint="correct them")
        assert await daemon.reload() == "f:1: one; f:2: another; correct them"

    reloading(tmp_path, None, read)
