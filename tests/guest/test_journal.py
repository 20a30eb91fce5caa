"""The journal's disk fills up, becomes read-only, hangs: decisions go on, nothing waits, and people are told."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.daemon_process import DaemonProcess, command
from tests.guest.events import events
from tests.native_server import NativeServer
from tests.server.harness import ServerProcess, block_device, device_info, drop_device, wait_until

NOBODY = 65534
JOURNAL_ID = 30
BACKING = Path("/tmp/journal.img")
MOUNT = Path("/tmp/journal")
CONFIG = f"""
[daemon]
resync_interval = "5s"
state_dir = "{MOUNT}/state"
[policy]
orphan_grace = "100ms"
setup_grace = "3s"
"""


@dataclass
class Disk:
    """The journal's own disk, which is a ublk device too."""

    server: NativeServer

    def stop(self) -> None:
        """Its server answers nothing any more."""
        os.kill(self.server.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.server.pid, signal.SIGCONT)


@pytest.fixture
def disk() -> Iterator[Disk]:
    MOUNT.mkdir(exist_ok=True)
    with NativeServer("--id", str(JOURNAL_ID), "--size", "32", "--backing", str(BACKING)) as server:
        server.wait_for("LIVE")
        subprocess.run(["mkfs.ext4", "-q", block_device(JOURNAL_ID)], check=True)
        options = ["-t", "ext4", "-o", "errors=remount-ro"]
        subprocess.run(["mount", *options, block_device(JOURNAL_ID), str(MOUNT)], check=True)
        yield Disk(server)
        os.kill(server.pid, signal.SIGCONT)
        wait_until(lambda: subprocess.run(["umount", str(MOUNT)], check=False).returncode == 0, 60, "it is unmounted")
    BACKING.unlink()
    drop_device(JOURNAL_ID)


def orphan_and_wait(daemon: DaemonProcess, dev_id: int) -> float:
    """A server dies; the seconds until its id is free."""
    with NativeServer("--id", str(dev_id)) as server:
        server.wait_for("LIVE")
        daemon.wait_verdict(dev_id, "live")
        killed = server.kill()
        wait_until(lambda: device_info(dev_id) is None, 20, f"id {dev_id} is free")
        return time.monotonic() - killed


def texts() -> str:
    return "\n".join(each["text"] for each in events())


def wait_up(daemon: DaemonProcess, *, up: bool) -> None:
    wait_until(lambda: daemon.metric("duende_ublkd_journal_up") == up, 60, f"journal_up is {int(up)}")


def test_a_full_disk_keeps_nothing_from_being_done_and_loses_nothing(disk: Disk) -> None:
    assert disk
    with DaemonProcess(CONFIG) as daemon:
        orphan_and_wait(daemon, 31)
        hog = MOUNT / "hog"
        subprocess.run(["dd", "if=/dev/zero", f"of={hog}", "bs=64k"], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["sync"], check=True)
        for dev_id in (32, 33, 34):
            assert orphan_and_wait(daemon, dev_id) < 10
        while (daemon.metric("duende_ublkd_journal_up") or 0) == 1:  # until its own spare pages are used up
            orphan_and_wait(daemon, 35)
        daemon.wait_log("ERROR .*journal.*full")
        assert orphan_and_wait(daemon, 36) < 10
        assert "ublk36 deleted" in texts()
        hog.unlink()
        wait_up(daemon, up=True)
        assert daemon.metric("duende_ublkd_journal_events_total", outcome="dropped") == 0
        assert daemon.stop() == 0
    done = command("events", "--limit", "1000", "--config", str(daemon.config_path))
    assert done.returncode == 0, done.stderr
    for dev_id in (31, 32, 33, 34, 36):
        assert f"ublk{dev_id} deleted" in done.stdout


def test_a_read_only_disk_keeps_nothing_from_being_done(disk: Disk) -> None:
    assert disk
    with DaemonProcess(CONFIG) as daemon:
        orphan_and_wait(daemon, 31)
        Path(f"/sys/fs/ext4/ublkb{JOURNAL_ID}/trigger_fs_error").write_text("1")
        assert orphan_and_wait(daemon, 32) < 10
        wait_up(daemon, up=False)
        daemon.wait_log(r"ERROR .*journal")
        assert orphan_and_wait(daemon, 33) < 10
        assert "ublk33 deleted" in texts()
        assert (daemon.metric("duende_ublkd_journal_waiting_events") or 0) > 0
        assert daemon.stop() == 0
    with DaemonProcess(CONFIG) as daemon:  # and one that starts with it
        assert orphan_and_wait(daemon, 34) < 10
        assert daemon.metric("duende_ublkd_journal_up") == 0
        assert daemon.stop() == 0


def test_a_hung_disk_keeps_nothing_from_being_done_nor_the_daemon_from_ending_and_starting(disk: Disk) -> None:
    with DaemonProcess(CONFIG) as daemon:
        orphan_and_wait(daemon, 31)
        disk.stop()
        assert orphan_and_wait(daemon, 32) < 10
        wait_up(daemon, up=False)
        daemon.wait_log(r"ERROR .*journal.*does not answer")
        assert orphan_and_wait(daemon, 33) < 10
        assert "ublk33 deleted" in texts()
        hold = command("hold", "40", "--for", "10m")
        assert hold.returncode == 0, hold.stderr
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < 5
    with DaemonProcess(CONFIG) as daemon:
        assert "ublk40" in command("hold").stdout, "a hold is known without the journal"
        assert orphan_and_wait(daemon, 34) < 10
        assert daemon.metric("duende_ublkd_journal_up") == 0
        disk.go_on()
        wait_up(daemon, up=True)
        assert command("release", "40").returncode == 0
        wait_until(lambda: daemon.metric("duende_ublkd_journal_waiting_events") == 0, 30, "all is written")
        assert daemon.stop() == 0
    done = command("events", "--limit", "1000", "--config", str(daemon.config_path))
    assert "ublk34 deleted" in done.stdout, done.stdout + done.stderr


def test_the_journal_is_followed_while_it_is_written_and_read_when_nobody_writes_it() -> None:
    with DaemonProcess("[policy]\norphan_grace = '100ms'\n") as daemon:
        follower = subprocess.Popen(
            [sys.executable, "-m", "duende_ublkd", "events", "--follow", "--json"], stdout=subprocess.PIPE, text=True
        )
        try:
            assert follower.stdout
            with NativeServer("--id", "37") as server:
                server.wait_for("LIVE")
                daemon.wait_verdict(37, "live")
                server.kill()
                wanted = [("verdict", "live"), ("action", "deleting it"), ("action", "ublk37 deleted")]
                for kind, words in wanted:
                    while True:
                        event = json.loads(follower.stdout.readline())
                        if (event["kind"], event["dev_id"]) == (kind, 37) and words in event["text"]:
                            break
        finally:
            follower.kill()
            follower.wait()
            if follower.stdout:
                follower.stdout.close()
        assert daemon.stop() == 0
        done = command("events", "37", "--config", str(daemon.config_path))
        assert "ublk37 deleted" in done.stdout, done.stdout + done.stderr


def test_a_user_may_look_at_everything_and_hold_nothing_that_is_not_his() -> None:
    with DaemonProcess(), NativeServer("--id", "38") as server:
        server.wait_for("LIVE")
        for arguments in (("hold",), ("events", "--limit", "5")):
            done = command(*arguments, user=NOBODY, group=NOBODY, cwd="/project")
            assert done.returncode == 0, done.stderr
        for change in ("hold", "release"):
            done = command(change, "38", user=NOBODY, group=NOBODY, cwd="/project")
            assert done.returncode == 2, done.stdout + done.stderr
            assert f"user {NOBODY} may not change ublk38" in done.stderr
    drop_device(38)


def test_the_owner_of_a_device_may_hold_it_until_he_releases_it() -> None:
    owner = 1000
    with (
        DaemonProcess("[policy]\norphan_grace = '100ms'\nsetup_grace = '2s'\n") as daemon,
        ServerProcess.start(id=39, target="null", unprivileged=True) as server,
    ):
        server.wait_for("after-start")
        daemon.wait_verdict(39, "live")
        done = command("hold", "39", "--for", "10m", user=owner, group=owner, cwd="/project")
        assert done.returncode == 0, done.stderr
        server.kill()
        daemon.wait_log(r"ublk39 is orphaned: .*on hold for .* by uid 1000")
        assert is_there(39)
        done = command("release", "39", user=owner, group=owner, cwd="/project")
        assert done.returncode == 0, done.stderr
        wait_until(lambda: not is_there(39), 20, "it is deleted after its release")


def is_there(dev_id: int) -> bool:
    return Path(f"/sys/class/ublk-char/ublkc{dev_id}").exists()
