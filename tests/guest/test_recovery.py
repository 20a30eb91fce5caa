"""A device whose server died is served again: by a command of ours, by somebody else, or a person is told."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from duende_ublkd.core.model import Feature, KernelState
from duende_ublkd.kernel.control import kernel_version
from tests.daemon_process import DaemonProcess, command
from tests.guest.events import events
from tests.native_server import NativeServer
from tests.server.harness import (
    ServerProcess,
    block_device,
    device_info,
    drop_device,
    features,
    wait_for_state,
    wait_until,
)

RAMFS = Path("/tmp/ramfs")
REISSUE = ("--recovery", "--flags", hex(Feature.USER_RECOVERY_REISSUE))  # what the dead server had taken is asked again


@pytest.fixture(scope="module", autouse=True)
def ramfs() -> Iterator[None]:
    """Backing files that memory pressure cannot push out."""
    RAMFS.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "ramfs", "ramfs", str(RAMFS)], check=True)
    yield
    subprocess.run(["umount", str(RAMFS)], check=True)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """Whatever a test leaves, the next one finds the ids free."""
    yield
    for dev_id in (3, 4, 5):
        drop(dev_id)


@pytest.fixture
def backing() -> Iterator[Path]:
    path = RAMFS / "disk"
    yield path
    path.unlink(missing_ok=True)


def recovering(*argv: str, attempts: int = 3, timeout: str = "20s", backoff: str = "100ms", stable: str = "5m") -> str:
    """A configuration whose devices are recovered at once."""
    return f"""
[daemon]
resync_interval = "20s"
[policy]
orphan_grace = "200ms"
setup_grace = "3s"
unserved = "recover"
recovery_deadline = "0s"
[policy.recover]
command = {json.dumps(list(argv))}
timeout = "{timeout}"
attempts = {attempts}
backoff = "{backoff}"
stable = "{stable}"
"""


def mini(*options: str | Path) -> list[str]:
    return ["mini_server", "--recover", "{id}", *map(str, options)]


def is_live(dev_id: int) -> bool:
    info = device_info(dev_id)
    return info is not None and info.state == KernelState.LIVE


def end_server(dev_id: int) -> None:
    """Kill every mini_server of a device, and wait until none is left."""

    def servers() -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                argv = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if argv[0].endswith(b"mini_server") and str(dev_id).encode() in argv:
                found.append(int(entry.name))
        return found

    for pid in servers():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not servers(), 20, f"no server of ublk{dev_id} is left")


def drop(dev_id: int) -> None:
    """Whoever serves it, and what is left of it."""
    end_server(dev_id)
    drop_device(dev_id)


class Writer:
    """Writes files, each with its own content, to the disk; what it has said is there must be there."""

    SCRIPT = """
import hashlib, os, signal, sys
going = True
def stop(*_):
    global going
    going = False
signal.signal(signal.SIGTERM, stop)
number = 0
while going:
    data = hashlib.sha256(str(number).encode()).digest() * 4096
    fd = os.open(f"{sys.argv[1]}/{number % 64}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(fd, data)
    os.fsync(fd)
    os.close(fd)
    print(number, flush=True)
    number += 1
"""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT, str(directory)], stdout=subprocess.PIPE, text=True
        )

    def wait_for(self, count: int) -> None:
        """Until it has written so many more."""
        assert self._process.stdout
        for _ in range(count):
            assert self._process.stdout.readline()

    def stop(self) -> int:
        """The number of the last one that is on the disk."""
        assert self._process.stdout
        self._process.send_signal(signal.SIGTERM)
        said = self._process.stdout.read().split()
        self._process.stdout.close()
        assert self._process.wait(30) == 0
        return int(said[-1])

    def check(self, last: int) -> None:
        for number in range(max(last - 63, 0), last + 1):
            data = (self._directory / str(number % 64)).read_bytes()
            assert data == hashlib.sha256(str(number).encode()).digest() * 4096, number


@pytest.mark.parametrize("how", ["foreground", "daemon"])
def test_a_mounted_file_system_under_load_survives_its_servers_death(how: str, backing: Path) -> None:
    options: list[str | Path] = ["--backing", backing, *(["--daemon"] if how == "daemon" else [])]
    target = Path("/tmp/recovered")
    target.mkdir(exist_ok=True)
    with (
        DaemonProcess(recovering(*mini(*options), attempts=10)) as daemon,
        NativeServer("--id", "3", *REISSUE, "--size", "64", "--backing", str(backing)) as server,
    ):
        server.wait_for("LIVE")
        subprocess.run(["mkfs.ext4", "-q", block_device(3)], check=True)
        subprocess.run(["mount", "-t", "ext4", block_device(3), str(target)], check=True)
        daemon.wait_verdict(3, "live")
        writer = Writer(target)
        writer.wait_for(5)
        for times in (1, 2, 3):
            end_server(3)
            server.kill()
            wait_until(lambda: daemon.metric("duende_ublkd_reaction_seconds_count") == times, 40, "it is recovered")  # noqa: B023
            assert is_live(3)
            writer.wait_for(5)
        last = writer.stop()
        subprocess.run(["umount", str(target)], check=True)
        subprocess.run(["mount", "-t", "ext4", "-o", "ro", block_device(3), str(target)], check=True)
        writer.check(last)
        subprocess.run(["umount", str(target)], check=True)
        assert daemon.metric("duende_ublkd_actions_total", action="recover", outcome="recovered") == 3
        slowest = max(float(each) for each in re.findall(r"(\d+) ms after the death was seen", daemon.log))
        print(f"\nslowest recovery: {slowest:.0f} ms after the death was seen")
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log
        assert is_live(3), "the server that was recovered outlives the daemon"


BAD_COMMANDS = {
    "fails": (["sh", "-c", "echo 'no such pool'; exit 7"], r"the command exited with 7, saying: no such pool"),
    "does not exist": (["/opt/no-such-program"], r"/opt/no-such-program"),
    "hangs": (["sleep", "1000"], r"not served after 3 s: the command was still running"),
    "leaves children": (
        ["sh", "-c", "setsid sleep 1000 & (setsid sh -c 'trap \"\" TERM; sleep 1001; sleep 1002' &) ; exit 1"],
        r"the command exited with 1",
    ),
    "is loud": (["sh", "-c", "dd if=/dev/zero bs=1M count=100 2>/dev/null; exit 1"], r"exited with 1"),
    "lies": (["true"], r"not served after 3 s: the command exited with 0"),
}


@pytest.mark.parametrize("what", BAD_COMMANDS)
def test_a_bad_recovery_command_is_bounded_explained_and_counted(what: str) -> None:
    argv, pattern = BAD_COMMANDS[what]
    timeout = "30s" if what == "is loud" else "3s"
    with (
        DaemonProcess(recovering(*argv, attempts=2, timeout=timeout)) as daemon,
        NativeServer("--id", "3", "--recovery") as server,
        NativeServer("--id", "4") as other,
    ):
        server.wait_for("LIVE")
        other.wait_for("LIVE")
        daemon.wait_verdict(3, "live")
        server.kill()
        daemon.wait_log("ublk3 is unserved: .*running its recovery command")
        other.kill()
        wait_until(lambda: device_info(4) is None, 20, "the other device's id is free")
        daemon.wait_log(rf"ublk3 could not be recovered, attempt 1 of 2: .*{pattern}", 60)
        daemon.wait_log(r"ublk3 is unserved: .*recovery given up after 2 attempts", 60)
        assert daemon.metric("duende_ublkd_actions_total", action="recover", outcome="failed") == 2
        wait_until(lambda: not [pid for pid in pids_of("sleep") if pid], 10, "nothing of the command is left")
        status = Path(f"/proc/{daemon.process.pid}/status").read_text()
        assert int(status.split("VmRSS:")[1].split()[0]) < 100 << 10
        explained = command("explain", "3", "--config", str(daemon.config_path)).stdout
        assert "2 of 2 attempts used up" in explained, explained
        assert "rule:         given-up" in explained, explained
        info = device_info(3)
        assert info is not None
        assert info.state == KernelState.QUIESCED
        with NativeServer("--recover", "3") as second:
            second.wait_for("RECOVERED")
            daemon.wait_verdict(3, "live")
        assert daemon.stop() == 0


def test_a_server_that_recovers_by_itself_meets_no_command_of_ours() -> None:
    with (
        DaemonProcess(recovering(*mini()).replace('recovery_deadline = "0s"', 'recovery_deadline = "3s"')) as daemon,
        NativeServer("--id", "3", "--recovery") as server,
    ):
        server.wait_for("LIVE")
        daemon.wait_verdict(3, "live")
        for _ in range(3):
            server.kill()
            end_server(3)
            wait_for_state(3, KernelState.QUIESCED)
            daemon.wait_verdict(3, "unserved")
            with NativeServer("--recover", "3") as second:
                second.wait_for("RECOVERED")
                daemon.wait_verdict(3, "live")
        assert "recovery command" not in daemon.log
        # In the middle of it: the device is open when the deadline is over.
        wait_for_state(3, KernelState.QUIESCED)
        with NativeServer("--recover", "3", "--stop-after", "open") as slow:
            slow.wait_for("OPEN")
            device = daemon.wait_verdict(3, "recovering")
            assert str(slow.pid) in device["reason"]
            time.sleep(5)  # the deadline itself is what is tested
            daemon.wait_verdict(3, "recovering")
            assert "recovery command" not in daemon.log
        # The slow one has died. Up to 6.14 its memory map (ub->mm) stays, which START_USER_RECOVERY, refusing with
        # EINVAL, does not reset: unless the next one's happens to lie at the same place, its mmap is refused, too.
        forgets = kernel_version(os.uname().release) >= (6, 15)
        daemon.wait_log("ublk3 recovered" if forgets else "ublk3 recovered|recovery given up after 3 attempts", 60)
        assert daemon.stop() == 0


def test_servers_that_come_and_die_before_they_serve_are_told_of_and_no_command_runs_beside_them() -> None:
    with (
        DaemonProcess(recovering(*mini()).replace('recovery_deadline = "0s"', 'recovery_deadline = "15s"')) as daemon,
        NativeServer("--id", "3", "--recovery") as server,
    ):
        server.wait_for("LIVE")
        daemon.wait_verdict(3, "live")
        server.kill()
        wait_for_state(3, KernelState.QUIESCED)
        daemon.wait_verdict(3, "unserved")

        def seen() -> str:
            return str((daemon.device(3) or {})["reason"])

        came = 0
        until = time.monotonic() + 120
        while "have taken it and let go" not in seen():
            assert time.monotonic() < until, daemon.log
            with NativeServer("--recover", "3", "--stop-after", "open") as another:
                if not another.says("OPEN"):
                    continue  # the ring of the former one has not let go yet: EBUSY
                came += 1
                wait_until(lambda: str(another.pid) in seen(), 20, "it is seen")
            daemon.wait_verdict(3, "unserved")
        assert came > 1
        assert "recovery command" not in daemon.log
        assert len(raised()) == 1, raised()
        # Nobody comes any more: with the deadline, the command's time has come.
        forgets = kernel_version(os.uname().release) >= (6, 15)  # what a dead server has mapped, as above
        daemon.wait_log("ublk3 recovered" if forgets else "ublk3 recovered|recovery given up after 3 attempts", 60)
        assert daemon.stop() == 0


def raised() -> list[dict[str, Any]]:
    return [each for each in events() if each["kind"] == "alert" and each["facts"].get("state") == "raised"]


def test_somebody_who_is_quicker_than_a_slow_command_is_not_fought() -> None:
    with (
        DaemonProcess(recovering("sleep", "1000", timeout="8s")) as daemon,
        NativeServer("--id", "3", "--recovery") as server,
    ):
        server.wait_for("LIVE")
        daemon.wait_verdict(3, "live")
        server.kill()
        daemon.wait_log("running its recovery command")
        with NativeServer("--recover", "3") as second:
            second.wait_for("RECOVERED")
            daemon.wait_log(rf"ublk3 is served again: by {second.pid} \(mini_server\), not by the command", 30)
            wait_until(lambda: not pids_of("sleep"), 10, "the superfluous command is ended")
            assert second.is_running
            assert is_live(3)
            assert daemon.wait_verdict(3, "live")
        assert daemon.stop() == 0


def test_a_flapping_server_opens_the_breaker_and_calls_one_person_once() -> None:
    flapping = mini("--daemon", "--die-after", "1")
    with (
        DaemonProcess(recovering(*flapping, attempts=4)) as daemon,
        NativeServer("--id", "3", "--recovery") as server,
    ):
        server.wait_for("LIVE")
        daemon.wait_verdict(3, "live")
        server.kill()
        daemon.wait_log(r"recovery given up after 4 attempts", 90)
        time.sleep(5)  # nothing more is to happen: that takes its time to be seen
        assert daemon.metric("duende_ublkd_actions_total", action="recover", outcome="recovered") == 4
        assert len(raised()) == 1, raised()
        assert "given up" in raised()[0]["text"]
        # A person mends the cause, and says so.
        done = command("release", "3")
        assert done.returncode == 0, done.stderr
        wait_until(
            lambda: (daemon.metric("duende_ublkd_actions_total", action="recover", outcome="recovered") or 0) > 4,
            30,
            "it is tried anew",
        )
        assert daemon.stop() == 0


def test_a_restarted_daemon_goes_on_counting_and_lets_the_running_command_be() -> None:
    with (
        DaemonProcess(recovering("sh", "-c", "sleep 20; exit 1", attempts=2, timeout="20s")) as daemon,
        NativeServer("--id", "3", "--recovery") as server,
    ):
        server.wait_for("LIVE")
        daemon.wait_verdict(3, "live")
        server.kill()
        daemon.wait_log("running its recovery command")
        wait_until(lambda: len(pids_of("sleep")) == 1, 10, "the command runs")
        time.sleep(0.5)  # for the journal's writer, which nothing waits for
        daemon.kill()
        daemon.restart()
        device = daemon.device(3)
        assert device
        assert device["recovery"]["attempts"] == 1, device
        assert len(pids_of("sleep")) == 1
        assert "died" in str(device) or "the daemon ended during attempt 1" in device["reason"], device
        daemon.wait_log("ublk3 could not be recovered, attempt 2 of 2", 90)
        daemon.wait_log("recovery given up after 2 attempts", 60)
        assert daemon.stop() == 0


def test_a_hold_keeps_hands_off_across_a_restart_and_the_action_follows_its_end() -> None:
    with (
        DaemonProcess(recovering(*mini("--daemon"))) as daemon,
        NativeServer("--id", "3", "--recovery") as server,
        NativeServer("--id", "4") as orphan,
    ):
        server.wait_for("LIVE")
        orphan.wait_for("LIVE")
        daemon.wait_verdict(4, "live")
        for dev_id in ("3", "4"):
            done = command("hold", dev_id, "--why", "upgrade")
            assert done.returncode == 0, done.stderr
        server.kill()
        orphan.kill()
        wait_for_state(3, KernelState.QUIESCED)
        daemon.wait_log("ublk4 is orphaned: .*on hold for .* by root \\(upgrade\\)")
        daemon.kill()
        daemon.restart()
        listed = json.loads(command("list", "--json").stdout)
        assert [each["hold"]["why"] for each in listed] == ["upgrade", "upgrade"], listed
        assert command("clean", "4").returncode == 1
        assert daemon.metric("duende_ublkd_hold_until_timestamp_seconds", dev_id="3")
        until = time.monotonic() + 20
        for dev_id in ("3", "4"):
            assert command("hold", dev_id, "--for", "20s", "--why", "the rest").returncode == 0
        while time.monotonic() < until:
            info, other = device_info(3), device_info(4)
            assert info
            assert info.state == KernelState.QUIESCED
            assert other
            time.sleep(0.2)
        wait_until(lambda: is_live(3), 20, "it is recovered after the hold")
        wait_until(lambda: device_info(4) is None, 20, "it is deleted after the hold")
        kinds = [each["text"] for each in events() if each["kind"] == "hold"]
        assert any("on hold for 20s by root (the rest)" in text for text in kinds), kinds
        assert any("on hold no more" in text for text in kinds), kinds
        assert daemon.stop() == 0


def test_an_unserved_device_is_given_up_only_when_nobody_holds_it() -> None:
    config = """
[daemon]
resync_interval = "5s"
[policy]
orphan_grace = "200ms"
unserved = "delete"
recovery_deadline = "2s"
"""
    target = Path("/tmp/held")
    target.mkdir(exist_ok=True)
    with (
        DaemonProcess(config) as daemon,
        NativeServer("--id", "3", "--recovery") as free,
        ServerProcess.start(id=4, target="ram", size=16, recovery="queue", backing=Path("/tmp/held.img")) as mounted,
        NativeServer("--id", "5", "--recovery") as opened,
    ):
        for one in (free, opened):
            one.wait_for("LIVE")
        mounted.wait_for("after-start")
        subprocess.run(["mkfs.ext4", "-q", block_device(4)], check=True)
        subprocess.run(["mount", "-t", "ext4", block_device(4), str(target)], check=True)
        descriptor = os.open(block_device(5), os.O_RDONLY)
        for dev_id in (3, 4, 5):
            daemon.wait_verdict(dev_id, "live")
        for each in (free, mounted, opened):
            each.kill()
        wait_until(lambda: device_info(3) is None, 30, "what nobody holds is deleted")
        daemon.wait_log(r"ublk3 stopped: ")
        daemon.wait_log(r"ublk4 is unserved: .*held by mount /tmp/held \(ext4\), so it is not deleted")
        daemon.wait_log(rf"ublk5 is unserved: .*held by open pid {os.getpid()}")
        time.sleep(6)  # several looks more
        for dev_id in (4, 5):
            info = device_info(dev_id)
            assert info
            assert info.state == KernelState.QUIESCED
        os.close(descriptor)
        wait_until(lambda: device_info(5) is None, 30, "what nobody holds any more is deleted")
        with ServerProcess.recover(4, target="ram", size=16, backing=Path("/tmp/held.img")) as second:
            second.wait_for("after-recovery")
            assert target.joinpath("lost+found").exists()
            subprocess.run(["umount", str(target)], check=True)
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log


def test_a_failing_device_is_recovered_too() -> None:
    if not features() & Feature.USER_RECOVERY_FAIL_IO:
        pytest.skip("this kernel has no FAIL_IO (6.13)")
    with (
        DaemonProcess(recovering(*mini())) as daemon,
        NativeServer("--id", "3", "--fail-io") as server,
    ):
        server.wait_for("LIVE")
        daemon.wait_verdict(3, "live")
        server.kill()
        daemon.wait_log("ublk3 recovered: served again", 30)
        assert daemon.stop() == 0


def pids_of(comm: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/comm"):
        try:
            if entry.read_text().strip() == comm:
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found
