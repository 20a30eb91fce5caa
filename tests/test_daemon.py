"""What of the daemon can be tried without a driver; the rest is for the guest's tests."""

import asyncio
import json
import os
import time
from pathlib import Path

import pytest

from duende_ublkd.core.alertconfig import SinkConfig, SinkKind
from duende_ublkd.core.config import Config, DaemonConfig
from duende_ublkd.core.errors import UsageError
from duende_ublkd.core.model import Level
from duende_ublkd.daemon import Daemon


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


@pytest.mark.skipif(os.geteuid() != 0, reason="the daemon is root's")
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


@pytest.mark.skipif(os.geteuid() != 0, reason="the daemon is root's")
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
