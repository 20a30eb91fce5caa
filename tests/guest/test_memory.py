"""What the daemon takes of the machine's memory, that it takes no more as time goes by, and that it reads no disk for it."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from duende_ublkd.kernel.memory import OOM_SCORE
from tests.daemon_process import DaemonProcess
from tests.guest.test_recovery import REISSUE, recovering
from tests.native_server import NativeServer
from tests.server.harness import drop_device

MIB = 1 << 20
LOCKED_BUDGET = 54 * MIB  # of the daemon; 47 are measured
NURSERY_BUDGET = 20 * MIB  # resident, of which the spares share most; 14 to 16 are measured
SPARE_BUDGET = 2 * MIB  # of a spare's own
LOOKS = 90  # full ones: each asks for 64 ids and more
COMMANDS = 5_000
GROWTH = 256 << 10  # bytes: an allocator's slack, and some 50 bytes for each command
PF_MEMALLOC_NOIO = 0x80000  # <linux/sched.h>; PR_SET_IO_FLUSHER sets it


def status(pid: int, name: str) -> int:
    """A field of /proc/PID/status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def private(pid: int) -> int:
    found = re.findall(r"^Private_\w+:\s+(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return sum(map(int, found)) << 10


def children(pid: int) -> list[tuple[int, str]]:
    """Direct children with their names."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [(int(child), Path(f"/proc/{child}/comm").read_text().strip()) for child in pids]


def commands(daemon: DaemonProcess) -> float:
    found = re.findall(r"^duende_ublkd_control_commands_total{.*} (\S+)$", daemon.get("/metrics"), re.MULTILINE)
    return sum(map(float, found))


def looks(daemon: DaemonProcess) -> float:
    return daemon.metric("duende_ublkd_reconcile_seconds_count") or 0.0


def look(daemon: DaemonProcess, times: int) -> None:
    """Full looks, one after the other: a signal that comes before the last look has ended asks for no other."""
    for _ in range(times):
        before = looks(daemon)
        daemon.process.send_signal(signal.SIGUSR1)
        while looks(daemon) == before:
            time.sleep(0.1)  # a page costs the emulated guest more than a look


def test_it_stays_within_its_budget_and_five_thousand_commands_later_it_is_no_larger() -> None:
    with DaemonProcess() as daemon, NativeServer("--id", "3") as server:
        server.wait_for("LIVE")
        daemon.wait_verdict(3, "live")
        look(daemon, 20)
        pid = daemon.process.pid
        began, asked = time.monotonic(), commands(daemon)
        before = status(pid, "VmRSS"), status(pid, "VmLck")
        assert before[1] <= LOCKED_BUDGET, f"{before[1] / MIB:.1f} MiB locked"
        look(daemon, LOOKS)
        assert commands(daemon) >= asked + COMMANDS
        after = status(pid, "VmRSS"), status(pid, "VmLck")
        grown = [now - then for now, then in zip(after, before, strict=True)]
        took = time.monotonic() - began
        print(f"\nresident {after[0] / MIB:.1f}, locked {after[1] / MIB:.1f} MiB, grown by {grown} in {took:.0f} s")
        assert max(grown) <= GROWTH, f"grown by {grown} bytes in {COMMANDS} commands"
        nursery = next(child for child, name in children(pid) if name == "ublkd-nursery")
        assert status(nursery, "VmRSS") <= NURSERY_BUDGET
        for spare, name in children(nursery):
            assert private(spare) <= SPARE_BUDGET, name
        assert daemon.stop() == 0
    drop_device(3)


def test_it_is_spared_when_memory_is_short_and_reclaims_without_waiting_for_a_disk() -> None:
    with DaemonProcess() as daemon:
        pid = daemon.process.pid
        assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == str(OOM_SCORE)
        for task in Path(f"/proc/{pid}/task").iterdir():
            flags = int((task / "stat").read_text().rpartition(")")[2].split()[6])
            assert flags & PF_MEMALLOC_NOIO, f"{(task / 'comm').read_text()}: {flags:#x}"
        assert daemon.stop() == 0


@pytest.mark.skipif("PYTHONPROFILEIMPORTTIME" in os.environ, reason="somebody else looks at imports")
def test_nothing_is_imported_after_its_start() -> None:
    config = recovering("mini_server", "--recover", "{id}", "--size", "16")
    with DaemonProcess(config, environment={"PYTHONPROFILEIMPORTTIME": "1"}) as daemon:
        started = daemon.log
        with NativeServer("--id", "4") as plain, NativeServer("--id", "5", *REISSUE, "--size", "16") as server:
            plain.wait_for("LIVE")
            server.wait_for("LIVE")
            daemon.wait_verdict(4, "live")
            daemon.wait_verdict(5, "live")
            plain.kill()
            daemon.wait_log(r"ublk4 deleted", 60)
            server.kill()
            daemon.wait_log(r"ublk5 recovered", 90)
            daemon.get("/metrics")
            daemon.get("/api/v1/events")
            recovered = daemon.device(5)
            assert recovered
            daemon.process.send_signal(signal.SIGHUP)
            daemon.wait_log("configuration read anew")
            os.kill(recovered["server"]["pid"], signal.SIGSTOP)
        later = daemon.log.removeprefix(started)
        assert "import time:" in started
        assert [line for line in later.splitlines() if "import time:" in line] == [], later
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(15) == 0
    os.kill(recovered["server"]["pid"], signal.SIGKILL)
    drop_device(5)
