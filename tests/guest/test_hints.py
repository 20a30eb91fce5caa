"""Uevents and inotify on the real driver: that they come, and what may be concluded from their order."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from duende_ublkd.kernel.devices import read_identity
from duende_ublkd.kernel.udev import NodeWatch, Uevents
from tests.native_server import NativeServer
from tests.server.harness import device_info, drop_device, wait_until

DEV_ID = 50


@dataclass
class Listener:
    uevents: Counter[tuple[str, str]] = field(default_factory=Counter)
    nodes: Counter[int] = field(default_factory=Counter)
    overflows: int = 0

    def on_uevent(self, subsystem: str, action: str, dev_id: int) -> None:
        if dev_id == DEV_ID:
            self.uevents[subsystem, action] += 1

    def on_driver(self, action: str) -> None:
        raise AssertionError(f"the driver: {action}")

    def on_overflow(self) -> None:
        self.overflows += 1

    def on_node(self, dev_id: int, *, opened: bool) -> None:
        assert opened in (False, True)
        self.nodes[dev_id] += 1


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_life_is_told_in_events() -> None:
    async def listen() -> None:
        listener = Listener()
        uevents = Uevents(listener)
        with NativeServer("--id", str(DEV_ID)) as server:
            server.wait_for("LIVE")
            await until(lambda: listener.uevents["block", "add"] == 1)
            server.kill()
            await until(lambda: listener.uevents["block", "remove"] == 1)
            wait_until(lambda: (info := device_info(DEV_ID)) is not None and info.state == 0)
        drop_device(DEV_ID)
        await until(lambda: listener.uevents["ublk-char", "remove"] == 1)
        assert listener.uevents["ublk-char", "add"] == 1
        assert listener.overflows == 0
        uevents.close()

    asyncio.run(listen())


def test_inotify_tells_of_the_death_of_a_recoverable_devices_server() -> None:
    async def listen() -> None:
        listener = Listener()
        nodes = NodeWatch(listener)
        with NativeServer("--id", str(DEV_ID), "--recovery") as server:
            server.wait_for("LIVE")
            nodes.keep({DEV_ID: (f"/dev/ublkc{DEV_ID}", read_identity(DEV_ID).sysfs_inode or 0)})
            assert not listener.nodes
            server.kill()
            await until(lambda: listener.nodes[DEV_ID] > 0)
        nodes.keep({})
        nodes.close()
        wait_until(lambda: (info := device_info(DEV_ID)) is not None and info.state != 1)
        drop_device(DEV_ID)

    asyncio.run(listen())


def test_lost_events_are_told_once_and_leave_no_disk_of_an_earlier_instance() -> None:
    """The loss comes in the middle of an id's lives: what is lost are the end of one and the beginning of the next."""

    async def listen() -> None:
        listener = Listener()
        uevents = Uevents(listener, buffer=4096)
        with NativeServer("--id", str(DEV_ID)) as server:
            server.wait_for("LIVE")
            for _ in range(500):
                Path("/sys/class/mem/null/uevent").write_text("change")
            server.kill()
            wait_until(lambda: (info := device_info(DEV_ID)) is not None and info.state == 0)
        drop_device(DEV_ID)
        with NativeServer("--id", str(DEV_ID), "--stop-after", "add") as starting:
            starting.wait_for("ADD")
            assert not uevents.saw_disk(DEV_ID)
            assert listener.overflows == 1
            starting.kill()
        drop_device(DEV_ID)
        await until(lambda: listener.uevents["ublk-char", "remove"] == 1)
        assert listener.overflows == 1
        uevents.close()

    asyncio.run(listen())


def test_the_disk_of_an_earlier_instance_is_never_taken_for_one_of_this() -> None:
    """Twenty lives of one id, with no time between them: the event loop never runs, so that all events are still unread."""

    async def listen() -> None:
        uevents = Uevents(Listener())
        for _ in range(20):
            with NativeServer("--id", str(DEV_ID), "--stop-after", "add") as starting:
                starting.wait_for("ADD")
                assert not uevents.saw_disk(DEV_ID)
                starting.kill()
            drop_device(DEV_ID)
            assert not uevents.saw_disk(DEV_ID)
            with NativeServer("--id", str(DEV_ID)) as server:
                server.wait_for("LIVE")
                server.kill()
                wait_until(lambda: (info := device_info(DEV_ID)) is not None and info.state == 0)
                assert uevents.saw_disk(DEV_ID)
            drop_device(DEV_ID)
        uevents.close()

    asyncio.run(listen())
