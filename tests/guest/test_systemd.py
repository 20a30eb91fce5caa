"""The unit of deploy/ as a real systemd runs it, with its whole sandbox on.

systemd is PID 1 of namespaces of its own: what it starts sees the guest's devices and network, and a /run, /etc/systemd and
/var/lib that are gone with it. The servers here are units, too, since the daemon sees the pids of its own namespace only.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from duende_ublkd.core.model import KernelState
from tests.guest.capabilities import NUMBERS, PROBES
from tests.server.harness import block_device, device_info, drop_device, wait_for_state, wait_until

UNIT = "duende-ublkd.service"
DEPLOYED = Path(__file__).parents[2] / "deploy" / UNIT
CGROUP = Path("/sys/fs/cgroup/systemd-test")
PATIENCE = 9  # seconds; the unit's own would take the tests a minute
DEV_IDS = range(20, 30)

CONFIG = """
[daemon]
resync_interval = "10s"
[policy]
orphan_grace = "200ms"
setup_grace = "3s"
[[device]]
match = { ids = "23" }
unserved = "recover"
recovery_deadline = "0s"
recover = { command = ["/usr/local/bin/mini_server", "--recover", "{id}"], timeout = "60s" }
[[device]]
match = { ids = "24" }
unserved = "recover"
recovery_deadline = "0s"
recover = { command = ["/usr/bin/systemctl", "restart", "recovered@{id}.service"], timeout = "60s" }
[[device]]
match = { ids = "25" }
unserved = "recover"
recovery_deadline = "0s"
recover = { command = ["/usr/bin/sleep", "1234"], timeout = "10m" }
"""
BOOT = """
set -e
echo $$ >{cgroup}/cgroup.procs
exec /usr/bin/unshare --pid --fork --kill-child --mount --uts --ipc --cgroup --propagation private --mount-proc sh -ec '
/usr/bin/mount --make-rshared /
/usr/bin/umount /sys/fs/cgroup
/usr/bin/mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /etc/systemd /etc/duende-ublkd
/usr/bin/mount --bind -o ro /proc/sys /proc/sys
for each in /run /etc/systemd /etc/duende-ublkd /var/lib; do /usr/bin/mount -t tmpfs tmpfs $each; done
mkdir -p /etc/systemd/system
export container=lab
exec /usr/lib/systemd/systemd --system --unit=basic.target --log-target=console --log-level=notice --show-status=no
' </dev/null
"""


class Systemd:
    """The service manager, and the daemon's unit in it."""

    def __init__(self, log: Path) -> None:
        self._log = log
        CGROUP.mkdir(exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["sh", "-c", BOOT.format(cgroup=CGROUP)], stdout=output, stderr=output, start_new_session=True
            )
        try:
            wait_until(self._is_up, 60, "systemd is up")
        except BaseException:
            print(log.read_text(errors="replace"))
            self.close()
            raise

    def _is_up(self) -> bool:
        assert self._process.poll() is None, self._log.read_text(errors="replace")
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        if not children:
            return False
        self._pid = children[0]
        return self.ask("is-system-running").stdout.strip() in ("running", "degraded")

    @property
    def root(self) -> Path:
        """Its file systems."""
        return Path(f"/proc/{self._pid}/root")

    @property
    def daemons_log(self) -> str:
        path = self.root / "run/daemon.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def inside(self, *argv: str, deadline: float = 90.0) -> subprocess.CompletedProcess[str]:
        """Run a command among its processes."""
        enter = ["/usr/bin/nsenter", "-t", self._pid, "-p", "-m", "-C", "-u", "-i"]
        return subprocess.run([*enter, *argv], check=False, capture_output=True, text=True, timeout=deadline)

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.inside("systemctl", *arguments)

    def do(self, *arguments: str) -> None:
        done = self.ask(*arguments)
        assert done.returncode == 0, f"{done.stderr}\n{self.story()}"

    def show(self, name: str, unit: str = UNIT) -> str:
        return self.ask("show", "-P", name, unit).stdout.strip()

    def write(self, path: str, text: str) -> None:
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def serve(self, dev_id: int, *options: str) -> None:
        """Start a server as a unit of its own, and wait until it serves."""
        command = ["mini_server", "--id", str(dev_id), *options]
        done = self.inside("systemd-run", "-q", "--collect", f"--unit=server{dev_id}", *command)
        assert done.returncode == 0, done.stderr
        wait_for_state(dev_id, KernelState.LIVE)

    def kill(self, dev_id: int) -> None:
        self.do("kill", "--signal=KILL", f"server{dev_id}")

    def pids_of(self, *argv: str) -> list[int]:
        """Whoever runs with exactly these arguments; pids as this test sees them."""
        wanted = b"".join(each.encode() + b"\0" for each in argv)
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if entry.read_bytes() == wanted:
                    found.append(int(entry.parent.name))
        return found

    def end(self, *argv: str) -> None:
        """Kill whoever runs with exactly these arguments."""
        for pid in self.pids_of(*argv):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.pids_of(*argv), 30, "it is gone")

    def story(self) -> str:
        return f"--- systemd\n{self._log.read_text(errors='replace')[-4000:]}\n--- daemon\n{self.daemons_log[-6000:]}"

    def close(self) -> None:
        """With PID 1 all of them die."""
        self._process.kill()
        self._process.wait()
        wait_until(lambda: "populated 0" in (CGROUP / "cgroup.events").read_text(), 30, "its processes are gone")
        for directory, _, _ in os.walk(CGROUP, topdown=False):
            Path(directory).rmdir()


def get(path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:10116{path}", timeout=20) as answer:
        return str(answer.read().decode())


def devices() -> dict[int, dict[str, Any]]:
    try:
        return {each["dev_id"]: each for each in json.loads(get("/api/v1/devices"))}
    except OSError:
        return {}  # it is being restarted


def wait_verdict(systemd: Systemd, dev_id: int, verdict: str) -> dict[str, Any]:
    try:
        wait_until(lambda: devices().get(dev_id, {}).get("verdict") == verdict, 60, f"ublk{dev_id} is {verdict}")
    except AssertionError as error:
        raise AssertionError(f"{error}: {devices().get(dev_id)}\n{systemd.story()}") from error
    return devices()[dev_id]


def wait_log(systemd: Systemd, pattern: str, deadline: float = 60.0) -> None:
    try:
        wait_until(lambda: re.search(pattern, systemd.daemons_log), deadline, f"it says {pattern}")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{systemd.story()}") from error


@pytest.fixture(scope="module")
def systemd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Systemd]:
    running = Systemd(tmp_path_factory.mktemp("systemd") / "log")
    try:
        running.write(f"/etc/systemd/system/{UNIT}", DEPLOYED.read_text())
        running.write("/etc/duende-ublkd/config.toml", CONFIG)
        start_as(running, "/lab/venv/bin/duende-ublkd run")
        yield running
    finally:
        running.close()
        for dev_id in DEV_IDS:
            drop_device(dev_id)


def start_as(systemd: Systemd, command: str, *more: str) -> None:
    """What differs from a host: where the program is, and that no journald takes what it says."""
    lines = ["[Service]", "ExecStart=", f"ExecStart={command}", "StandardError=append:/run/daemon.log", *more]
    systemd.write(f"/etc/systemd/system/{UNIT}.d/lab.conf", "\n".join(lines) + "\n")
    systemd.do("daemon-reload")


def test_the_unit_as_it_is_looks_after_devices_and_holds_no_mount(systemd: Systemd) -> None:
    """A file system that was mounted when the daemon's own namespace was made must go when the system unmounts it."""
    target = "/mnt"
    systemd.serve(20, "--size", "64", "--backing", "/tmp/systemd-test.img")
    subprocess.run(["mkfs.ext4", "-q", block_device(20)], check=True)
    mounted = systemd.inside("/usr/bin/mount", "-t", "ext4", str(block_device(20)), target)
    assert mounted.returncode == 0, mounted.stderr
    systemd.do("start", UNIT)
    assert systemd.show("ActiveState") == "active"
    assert systemd.show("StatusText") == "1 live"
    assert devices()[20]["server"]["unit"] == "server20.service"

    systemd.serve(21)
    wait_verdict(systemd, 21, "live")
    systemd.kill(21)
    wait_until(lambda: device_info(21) is None, 30, "id 21 is free")

    systemd.kill(20)
    device = wait_verdict(systemd, 20, "pinned")
    assert {"kind": "mount", "what": f"{target} (ext4)"} in device["holders"], device
    assert systemd.inside("/usr/bin/umount", target).returncode == 0
    wait_until(lambda: device_info(20) is None, 30, "the id frees itself once it is unmounted")


def test_the_sandbox_is_really_on_and_its_memory_locked_all_the_same(systemd: Systemd) -> None:
    systemd.do("start", UNIT)
    status = systemd.inside("cat", f"/proc/{systemd.show('MainPID')}/status").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == sum(1 << NUMBERS[each] for each in PROBES)
    assert fields["NoNewPrivs"].strip() == "1"
    assert fields["Seccomp"].strip() == "2"
    assert int(fields["VmLck"].split()[0]) > 10 << 10
    assert "cannot be locked" not in systemd.daemons_log
    systemd.do("reload", UNIT)
    wait_log(systemd, "configuration read anew")


def test_each_capability_of_the_unit_is_needed() -> None:
    """The line of the unit and the probes are the same set, and each probe fails without its capability alone."""
    lines = re.findall(r"^CapabilityBoundingSet=(.*)$", DEPLOYED.read_text(), re.MULTILINE)
    assert set(" ".join(lines).split()) == set(PROBES)
    program = [sys.executable, "-m", "tests.guest.capabilities"]
    done = subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True, timeout=150)
    found = json.loads(done.stdout)
    print()
    for name, said in found.items():
        print(f"without {name}: {said['without']}")
    assert {name: said["with"] for name, said in found.items()} == dict.fromkeys(PROBES, "")
    assert all(said["without"] for said in found.values())


def test_recovery_works_in_the_sandbox_and_its_server_outlives_the_daemon(systemd: Systemd) -> None:
    systemd.write(
        "/etc/systemd/system/recovered@.service", "[Service]\nExecStart=/usr/local/bin/mini_server --recover %i\n"
    )
    systemd.do("start", UNIT)
    for dev_id in (23, 24):
        systemd.serve(dev_id, "--recovery")
        wait_verdict(systemd, dev_id, "live")
    for dev_id in (23, 24):
        systemd.kill(dev_id)
        wait_log(systemd, f"ublk{dev_id} recovered: served again")
    wait_verdict(systemd, 24, "live")
    assert devices()[23]["server"]["unit"] == UNIT, "its own command's server is in its unit"
    assert devices()[24]["server"]["unit"] == "recovered@24.service"
    held = systemd.inside("duende-ublkd", "hold", "22", "--for", "1h", "--why", "upgrade")
    assert held.returncode == 0, held.stderr

    began = time.monotonic()
    systemd.do("stop", UNIT)
    took = time.monotonic() - began
    assert systemd.show("Result") == "success", systemd.story()
    print(f"\nstopped within {took:.1f} s")
    assert systemd.daemons_log.rstrip().endswith("stopped")
    for dev_id in (23, 24):
        info = device_info(dev_id)
        assert info
        assert info.state == KernelState.LIVE
    systemd.do("start", UNIT)
    wait_verdict(systemd, 23, "live")
    assert [each["why"] for each in json.loads(get("/api/v1/holds"))] == ["upgrade"]
    systemd.do("stop", UNIT)
    for dev_id in (23, 24):
        systemd.end("/usr/local/bin/mini_server", "--recover", str(dev_id))
        drop_device(dev_id)


@pytest.mark.parametrize("how", ["STOP", "USR2"])
def test_a_daemon_that_gets_stuck_is_restarted_and_finishes_what_it_had_begun(systemd: Systemd, how: str) -> None:
    """SIGSTOP stops all of it; at SIGUSR2 the event loop alone stands still."""
    start_as(
        systemd,
        "/lab/venv/bin/python -m tests.guest.stuck_daemon run",
        "WorkingDirectory=/project",
        f"WatchdogSec={PATIENCE}",
    )
    systemd.do("restart", UNIT)
    systemd.serve(25, "--recovery")
    systemd.serve(26)
    wait_verdict(systemd, 25, "live")
    wait_verdict(systemd, 26, "live")
    systemd.kill(25)
    wait_until(lambda: len(systemd.pids_of("/usr/bin/sleep", "1234")) == 1, 30, "the recovery command runs")
    wait_verdict(systemd, 25, "recovering")
    restarts, pid = int(systemd.show("NRestarts")), systemd.show("MainPID")
    time.sleep(2 * PATIENCE)  # the time itself is what is tested: as long as it gets on, it is fed
    assert systemd.show("MainPID") == pid, systemd.story()

    assert systemd.inside("kill", f"-{how}", pid).returncode == 0
    systemd.kill(26)
    wait_until(lambda: int(systemd.show("NRestarts")) == restarts + 1, 60, "systemd restarts it")
    wait_until(lambda: device_info(26) is None, 60, "the new one deletes what the old one could not")
    assert len(systemd.pids_of("/usr/bin/sleep", "1234")) == 1, "the command is not run a second time"
    device = wait_verdict(systemd, 25, "unserved")
    assert "attempt 1 of 3: the daemon ended during attempt 1" in device["reason"], device
    if how == "USR2":
        assert "stuck_daemon.py" in systemd.daemons_log, "it has told where it was stuck"
    systemd.do("stop", UNIT)
    systemd.end("/usr/bin/sleep", "1234")
    drop_device(25)
