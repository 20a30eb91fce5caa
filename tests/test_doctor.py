"""`doctor`: what is read of a machine, what is made of it, and how it is said."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import os
import socketserver
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from duende_ublkd import __version__, checkup, doctor
from duende_ublkd.checkup import DaemonAnswer, Device, DriverAnswer, Finding
from duende_ublkd.core import config as configuration
from duende_ublkd.core.config import OnUnserved
from duende_ublkd.core.errors import ExitCode
from duende_ublkd.core.known_kernels import Severity, identify
from duende_ublkd.core.model import DriverFacts, Feature
from duende_ublkd.kernel.process import SoleDaemon
from duende_ublkd.kernel.survey import (
    UNLIMITED,
    DaemonLock,
    Driver,
    Layers,
    Machine,
    Node,
    Process,
    Roots,
    Swap,
    find_program,
    read_driver,
    read_lock,
    read_process,
    read_swaps,
    survey,
)
from tests.test_cli import REPOSITORY, run, without_ublk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

OK, NOTE, WARNING, CRITICAL = Severity.OK, Severity.NOTE, Severity.WARNING, Severity.CRITICAL
RECOVERY = Feature.USER_RECOVERY
REISSUE = Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE
ALL_CAPABILITIES = (1 << 41) - 1
MIB = 1 << 20
FIRST = {"user": "user:[4026531837]", "pid": "pid:[4026531836]", "mnt": "mnt:[4026531832]"}
DEBIAN = "6.12.107+deb13-amd64"

STATUS = """\
Name:\tpython3
VmLck:\t   40960 kB
VmRSS:\t   30720 kB
VmSwap:\t       0 kB
CapEff:\t00000000a0200002
"""
LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max open files            20000                65536                files
Max locked memory         8388608              unlimited            bytes
"""


class Tree:
    """A machine made of files."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.roots = Roots(*(str(top / name) for name in ("proc", "sys", "dev", "modules")))
        for root in ("proc", "sys", "dev", "modules"):
            (top / root).mkdir()

    def write(self, path: str, text: str) -> None:
        file = self.top / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def link(self, path: str, target: str) -> None:
        place = self.top / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)

    def process(self, name: str, *, mountinfo: str = "", cgroup: str = "0::/a.slice\n") -> None:
        for file, text in (("status", STATUS), ("limits", LIMITS), ("cgroup", cgroup), ("mountinfo", mountinfo)):
            self.write(f"proc/{name}/{file}", text)
        for kind, link in FIRST.items():
            self.link(f"proc/{name}/ns/{kind}", link)

    def mounts(self, *lines: str) -> None:
        self.write("proc/self/mountinfo", "".join(f"{line}\n" for line in lines))

    def disk(
        self, name: str, rdev: str, *, slaves: Iterable[str] = (), backing: str = "", partition_of: str = ""
    ) -> None:
        parent = f"{partition_of}/" if partition_of else ""
        place = f"sys/devices/virtual/block/{parent}{name}"
        (self.top / place).mkdir(parents=True, exist_ok=True)
        self.link(f"sys/class/block/{name}", f"../../devices/virtual/block/{parent}{name}")
        self.link(f"sys/dev/block/{rdev}", f"../../devices/virtual/block/{parent}{name}")
        for slave in slaves:
            (self.top / place / "slaves" / slave).mkdir(parents=True)
        if backing:
            self.write(f"{place}/loop/backing_file", f"{backing}\n")
        if partition_of:
            self.write(f"{place}/partition", "1\n")

    def swaps(self, *entries: str) -> list[Swap]:
        head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
        self.write("proc/swaps", head + "".join(f"{entry}\n" for entry in entries))
        return list(read_swaps(self.roots, Layers(self.roots)))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def mount(rdev: str, where: str, fstype: str = "ext4", source: str = "/dev/x", options: str = "rw") -> str:
    return f"36 35 {rdev} / {where} rw - {fstype} {source} {options}"


def a_process(**changes: Any) -> Process:  # noqa: ANN401 - fields of it
    process = Process(
        812,
        capabilities=ALL_CAPABILITIES,
        locked=40 * MIB,
        resident=30 * MIB,
        swapped=0,
        memlock=UNLIMITED,
        nofile=65536,
        files=20,
        tasks=9,
        most_tasks=100,
        namespaces=FIRST,
        dev_type="devtmpfs",
    )
    return replace(process, **changes)


def a_machine(**changes: Any) -> Machine:  # noqa: ANN401 - fields of it
    machine = Machine(
        release=DEBIAN,
        banner="",
        signature="",
        driver=Driver(is_loaded=True, is_available=True),
        control=Node(is_char=True, mode=0o600, uid=0, gid=0),
        limit=64,
        io_uring_disabled=0,
        io_uring_group=-1,
        tasks=100,
        most_tasks=32768,
        hides_processes="",
        swaps=(),
        state_on=frozenset(),
        me=a_process(pid=1),
        first_mounts=FIRST["mnt"],
        lock=DaemonLock(812, is_held=True),
        daemon=a_process(),
    )
    return replace(machine, **changes)


def a_config(text: str = "") -> configuration.Config:
    return configuration.load(text.encode(), "config.toml")


def by_id(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.id: finding for finding in findings}


def levels(findings: Iterable[Finding]) -> dict[str, Severity]:
    return {finding.id: finding.level for finding in findings}


# --- what is read: swaps, and what is under them


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("/dev/ublkb3 partition 1000 0 -2", {3}),
        ("/dev/ublkb3p1 partition 1000 0 -2", {3}),
        ("/dev/ublkb12\\040(deleted) partition 1000 0 -2", {12}),
        ("/dev/dm-0 partition 1000 0 -2", {3, 4}),
        ("/dev/mapper/swap partition 1000 0 -2", {3, 4}),
        ("/dev/md0 partition 1000 0 -2", {3, 4, 5}),
        ("/dev/loop0 partition 1000 0 -2", {6}),
        ("/dev/loop0p1 partition 1000 0 -2", {6}),
        ("/dev/loop0\\040(deleted) partition 1000 0 -2", {6}),
        ("/dev/loop2 partition 1000 0 -2", {11}),
        ("/dev/zram0 partition 1000 0 -2", {7}),
        ("/srv/data/swap file 1000 0 -2", {6}),
        ("/srv/data/inner/swap file 1000 0 -2", set()),
        ("/srv/data-2/swap file 1000 0 -2", set()),
        ("/pool/swap file 1000 0 -2", {8}),
        ("/pools/swap file 1000 0 -2", {8, 9}),
        ("/ring/swap file 1000 0 -2", {10}),
        ("/dev/sda2 partition 1000 0 -2", set()),
        ("/swap file 1000 0 -2", set()),
    ],
)
def test_a_swap_is_followed_down_to_the_ublk_devices_under_it(tree: Tree, entry: str, expected: set[int]) -> None:
    tree.disk("sda", "8:0")
    tree.disk("sda2", "8:2", partition_of="sda")
    tree.disk("ublkb6", "259:6")
    tree.disk("dm-0", "254:0", slaves=["ublkb3p1", "ublkb4"])
    tree.disk("md0", "9:0", slaves=["dm-0", "ublkb5"])
    tree.disk("loop0", "7:0", backing="/srv/data/image (deleted)")
    tree.disk("loop0p1", "259:7", partition_of="loop0")
    tree.disk("loop1", "7:1", backing="/ring/image", slaves=["ublkb10"])
    tree.disk("loop2", "7:2", backing="/dev/ublkb11")
    tree.disk("zram0", "251:0")
    tree.write("sys/devices/virtual/block/zram0/backing_dev", "/dev/ublkb7\n")
    tree.link("dev/mapper/swap", "../dm-0")
    tree.mounts(
        mount("8:2", "/"),
        mount("259:6", "/srv/data"),
        mount("8:2", "/srv/data/inner"),
        mount("0:40", "/pool", "btrfs", "/dev/ublkb8"),
        mount("0:41", "/pools", "bcachefs", "/dev/ublkb8:/dev/ublkb9"),
        mount("0:42", "/tmp", "tmpfs", "ublkb3"),
        mount("7:1", "/ring"),
    )
    (swap,) = tree.swaps(entry)
    assert swap.ublk == frozenset(expected)


def test_a_swap_tells_its_kind_its_use_and_whether_its_disk_is_gone(tree: Tree) -> None:
    gone, file = tree.swaps("/dev/ublkb3\\040(deleted) partition 16380 512 -2", "/a\\040b file 100 x -3")
    assert gone == Swap("/dev/ublkb3 (deleted)", is_file=False, used=512 * 1024, is_deleted=True, ublk=frozenset({3}))
    assert (file.path, file.is_file, file.used, file.is_deleted) == ("/a b", True, 0, False)
    assert tree.swaps("nonsense") == []


def test_a_later_mount_covers_an_earlier_one(tree: Tree) -> None:
    tree.disk("ublkb1", "259:1")
    tree.disk("sda", "8:0")
    tree.mounts(mount("259:1", "/"), mount("8:0", "/"), mount("259:1", "/var"), mount("8:0", "/var/lib"))
    layers = Layers(tree.roots)
    assert layers.under_path("/etc") == frozenset()
    assert layers.under_path("/var/log") == {1}
    assert layers.under_path("/var/lib/duende-ublkd") == frozenset()
    tree.mounts()
    assert Layers(tree.roots).under_path("/var/log") == frozenset()


# --- what is read: the driver, processes, the lock


def test_the_driver_is_loaded_builtin_available_or_not(tree: Tree) -> None:
    assert read_driver(tree.roots, "6.1") == Driver(is_available=None)
    tree.write("modules/6.1/modules.dep", "kernel/drivers/block/null_blk.ko.xz:\n")
    assert read_driver(tree.roots, "6.1") == Driver(is_available=False)
    tree.write("modules/6.1/modules.dep", "kernel/drivers/block/ublk_drv.ko.xz:\n")
    assert read_driver(tree.roots, "6.1") == Driver(is_available=True)
    tree.write("sys/module/ublk_drv/initstate", "live\n")
    assert read_driver(tree.roots, "6.1") == Driver(is_loaded=True, is_available=True)
    tree.write("modules/6.1/modules.builtin", "kernel/drivers/block/ublk_drv.ko\n")
    assert read_driver(tree.roots, "6.1") == Driver(is_loaded=True, is_builtin=True, is_available=True)
    tree.write("sys/module/ublk_drv/parameters/ublks_max", "64\n")
    (tree.top / "sys/module/ublk_drv/initstate").unlink()
    assert read_driver(tree.roots, "7.0").is_builtin, "a module that was never loaded has no state of loading"


def test_a_process_is_read(tree: Tree) -> None:
    tree.process("812", mountinfo=mount("0:5", "/dev", "devtmpfs") + "\n", cgroup="0::/system.slice/d.service\n")
    tree.write("sys/fs/cgroup/system.slice/d.service/pids.current", "9\n")
    tree.write("sys/fs/cgroup/system.slice/d.service/pids.max", "18000\n")
    (tree.top / "proc/812/fd").mkdir()
    for name in ("0", "1"):
        tree.write(f"proc/812/fd/{name}", "")
    process = read_process(tree.roots, 812)
    assert process == Process(
        812,
        capabilities=0xA0200002,
        locked=40 * MIB,
        resident=30 * MIB,
        swapped=0,
        memlock=8 * MIB,
        nofile=20000,
        files=2,
        tasks=9,
        most_tasks=18000,
        namespaces=FIRST,
        dev_type="devtmpfs",
    )
    assert process.in_first_pid_namespace is True
    assert read_process(tree.roots, 813) is None


@pytest.mark.parametrize(
    ("cgroup", "most", "expected"),
    [
        ("8:pids:/x\n0::/\n", "pids/x/pids.max:100", 100),
        ("8:cpu,pids:/x\n0::/\n", "pids/x/pids.max:max", UNLIMITED),
        ("0::/../../x\n", "../../x/pids.max:100", None),
        ("0::/\n", "pids.max:", None),
    ],
)
def test_the_limit_of_a_cgroup_is_found_in_either_hierarchy(
    tree: Tree, cgroup: str, most: str, expected: int | None
) -> None:
    name, text = most.split(":")
    tree.process("812", cgroup=cgroup)
    tree.write(f"sys/fs/cgroup/{name}", f"{text}\n")
    process = read_process(tree.roots, 812)
    assert process
    assert process.most_tasks == expected


def test_this_very_process_is_read() -> None:
    process = read_process(Roots(), os.getpid())
    assert process
    assert process.pid == os.getpid()
    assert process.resident
    assert process.resident > MIB
    assert process.files == len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert process.namespaces.keys() == {"user", "pid", "mnt"}


def test_a_process_that_has_locked_its_memory_is_told_apart_from_one_that_has_not() -> None:
    wait = "print('ready', flush=True); input()"
    lock = "from duende_ublkd.kernel.memory import lock_memory; lock_memory();"
    for code, expected in ((wait, False), (lock + wait, True)):
        with subprocess.Popen(
            [sys.executable, "-c", code], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout
            if child.stdout.readline() != "ready\n":
                pytest.skip("this user may not lock so much memory")
            process = read_process(Roots(), child.pid)
            child.communicate("\n")
        assert process
        assert checkup.is_locked(process) is expected, process


def test_the_daemons_lock_is_seen_without_being_tried(tmp_path: Path) -> None:
    """Not even for a moment: a daemon that starts then would take us for another daemon."""
    assert read_lock(Roots(), str(tmp_path)) == DaemonLock(None, is_held=False)
    daemon = SoleDaemon(str(tmp_path))
    assert read_lock(Roots(), str(tmp_path)) == DaemonLock(os.getpid(), is_held=True)
    daemon.close()
    assert read_lock(Roots(), str(tmp_path)) == DaemonLock(os.getpid(), is_held=False)
    SoleDaemon(str(tmp_path)).close()


def test_who_waits_for_the_lock_does_not_hold_it(tree: Tree) -> None:
    lock = tree.top / "lock"
    lock.write_text("812\n")
    inode = lock.stat().st_ino
    for line, expected in (
        (
            f"1: FLOCK  ADVISORY  WRITE 812 ff:ff:{inode} 0 EOF",
            True,
        ),  # a file system with a number of its own for locks
        (f"1: FLOCK  ADVISORY  WRITE 99 ff:ff:{inode} 0 EOF", False),
        (f"1: -> FLOCK  ADVISORY  WRITE 812 ff:ff:{inode} 0 EOF", False),
        (f"1: POSIX  ADVISORY  WRITE 812 ff:ff:{inode} 0 EOF", False),
        ("1: FLOCK", False),
    ):
        tree.write("proc/locks", f"{line}\n")
        assert read_lock(tree.roots, str(tree.top)) == DaemonLock(812, is_held=expected), line
    (tree.top / "proc/locks").unlink()
    assert read_lock(tree.roots, str(tree.top)) == DaemonLock(812, is_held=None)
    lock.write_text("\x1b[31m")
    assert read_lock(tree.roots, str(tree.top)).pid is None


def test_a_machine_is_read_in_one_go(tree: Tree) -> None:
    tree.process("self", mountinfo=mount("0:5", "/dev", "devtmpfs") + "\n" + mount("259:3", "/var") + "\n")
    tree.disk("ublkb3", "259:3")
    for path, text in {
        "proc/sys/kernel/osrelease": f"{DEBIAN}\n",
        "proc/version": "Linux version 6.12\n",
        "proc/sys/kernel/io_uring_disabled": "1\n",
        "proc/sys/kernel/io_uring_group": "-1\n",
        "proc/sys/kernel/pid_max": "4194304\n",
        "proc/sys/kernel/threads-max": "5000\n",
        "proc/loadavg": "0.0 0.1 0.2 3/345 678\n",
        "sys/module/ublk_drv/parameters/ublks_max": "64\n",
        "dev/ublk-control": "",
    }.items():
        tree.write(path, text)
    machine = survey(tree.roots, str(tree.top), "/var/lib/duende-ublkd")
    assert (machine.release, machine.banner, machine.signature) == (DEBIAN, "Linux version 6.12", "")
    assert (machine.io_uring_disabled, machine.io_uring_group, machine.limit) == (1, -1, 64)
    assert (machine.tasks, machine.most_tasks) == (345, 5000)
    assert machine.state_on == {3}
    assert machine.control
    assert not machine.control.is_char
    assert machine.me
    assert machine.me.dev_type == "devtmpfs"
    assert machine.daemon is None


@pytest.mark.parametrize(
    ("options", "capabilities", "expected"),
    [
        ("rw,hidepid=invisible", "0", "hidepid=invisible"),
        ("rw,hidepid=2", "0", "hidepid=2"),
        ("rw,hidepid=2", f"{1 << 19:x}", ""),
        ("rw,hidepid=off", "0", ""),
        ("rw,subset=pid", f"{1 << 19:x}", "subset=pid"),
        ("rw", "0", ""),
    ],
)
def test_a_proc_that_hides_processes_is_noticed(tree: Tree, options: str, capabilities: str, expected: str) -> None:
    tree.process("self", mountinfo=mount("0:20", "/proc", "proc", "proc", options) + "\n")
    tree.write("proc/self/status", f"CapEff:\t{capabilities}\n")
    assert survey(tree.roots, str(tree.top), "/").hides_processes == expected


def test_of_an_empty_machine_nothing_is_known_and_all_is_judged(tree: Tree) -> None:
    machine = survey(tree.roots, "/nowhere", "/var/lib\0")
    assert machine.me is None
    findings = by_id(asyncio.run(doctor.examine(None, tree.roots)))
    assert findings["control-device"].means is ExitCode.NO_KERNEL
    assert findings["swap"].level is OK
    assert findings["configuration"].level is OK


def test_a_program_is_found_by_its_path_or_where_recovery_commands_look(tmp_path: Path) -> None:
    program = tmp_path / "server"
    assert find_program(str(program)) is None
    program.write_text("#!/bin/sh\n")
    assert find_program(str(program)) is None, "it may not be executed"
    program.chmod(0o755)
    assert find_program(str(program)) == str(program)
    assert find_program(str(tmp_path)) is None, "a directory"
    assert find_program("sh") in ("/bin/sh", "/usr/bin/sh")
    assert find_program("no-such-program-anywhere") is None


# --- what is made of it: the kernel and the driver


@pytest.mark.parametrize(
    ("release", "level", "words"),
    [
        (DEBIAN, OK, "runs"),
        ("custom", NOTE, "no version number"),
        ("6.12.9-mine", NOTE, "who built it is not known"),
        ("6.8.0-32-generic", NOTE, "carries fixes across"),
        ("9.1.0", NOTE, "newer than every kernel"),
    ],
)
def test_a_kernel_that_cannot_be_judged_is_said_to_be_so(release: str, level: Severity, words: str) -> None:
    finding = by_id(checkup.kernel_findings(identify(release), has_driver=True))["kernel"]
    assert finding.level is level
    assert words in finding.text
    assert bool(finding.hint) == (level > OK)


def test_a_known_bug_is_as_bad_as_it_is_where_it_is_sure_and_a_note_where_it_is_not() -> None:
    sure = by_id(checkup.kernel_findings(identify("6.18.4"), has_driver=True))["init-queues-oops"]
    assert sure.level is CRITICAL
    assert "529d4d632788" in sure.text
    perhaps = by_id(checkup.kernel_findings(identify("6.18.4-mine"), has_driver=True))["init-queues-oops"]
    assert perhaps.level is NOTE
    assert perhaps.text.startswith("this kernel may be affected")


def test_why_a_kernel_has_no_driver_is_said_where_it_has_none() -> None:
    bookworm = identify("6.1.0-49-amd64")
    assert "not-built-debian" in levels(checkup.kernel_findings(bookworm, has_driver=False))
    assert "not-built-debian" not in levels(checkup.kernel_findings(bookworm, has_driver=True))


@pytest.mark.parametrize(
    ("driver", "level", "hint"),
    [
        (Driver(is_loaded=True), OK, ""),
        (Driver(is_builtin=True), OK, ""),
        (Driver(is_available=True), CRITICAL, "modprobe ublk_drv; at each boot"),
        (Driver(is_available=None), CRITICAL, "modprobe ublk_drv  # if that fails"),
        (Driver(is_available=False), CRITICAL, "CONFIG_BLK_DEV_UBLK"),
    ],
)
def test_a_driver_that_is_not_there_has_something_to_type(driver: Driver, level: Severity, hint: str) -> None:
    machine = a_machine(driver=driver)
    finding = by_id(checkup.driver_findings(machine, DriverAnswer(), identify(DEBIAN)))["driver"]
    assert finding.level is level
    assert hint in finding.hint


def test_a_control_device_that_cannot_be_used_has_an_exit_code_of_its_own() -> None:
    answer = DriverAnswer("/dev/ublk-control may be opened by root only", "run it as root")
    finding = by_id(checkup.driver_findings(a_machine(), answer, identify(DEBIAN)))["control-device"]
    assert (finding.level, finding.means, finding.hint) == (CRITICAL, ExitCode.NO_KERNEL, "run it as root")
    well = by_id(checkup.driver_findings(a_machine(), DriverAnswer(), identify(DEBIAN)))["control-device"]
    assert well.level is OK
    assert "mode 0600, uid 0" in well.text


def test_what_the_driver_cannot_do_is_named_with_what_that_costs() -> None:
    def found(features: int, release: str) -> dict[str, Finding]:
        return by_id(checkup.driver_findings(a_machine(), DriverAnswer(facts=DriverFacts(features)), identify(release)))

    everything = found(0x1FFFFF, "7.3.4")
    assert "features-missing" not in everything
    assert "SAFE_STOP_DEV" in everything["features"].facts["features"]
    older = found(0x1FE, "6.12.107")["features-missing"]
    assert older.level is NOTE
    assert older.facts["missing"].keys() == {"SAFE_STOP_DEV"}
    assert "TRY_STOP_DEV" in older.text
    assert "DEL_DEV_ASYNC" in found(0x1FE, "6.8.12")["features-missing"].facts["missing"]
    assert found(0, "6.1.192")["features"].level is NOTE


@pytest.mark.parametrize(
    ("release", "plain", "unprivileged", "level"),
    [
        ("6.12.30", 57, 0, OK),
        ("6.12.30", 58, 0, NOTE),
        ("6.12.30", 63, 1, WARNING),
        ("6.12.31", 64, 0, OK),
        ("6.12.31", 10, 64, WARNING),
        ("6.8.0-32-generic", 64, 0, NOTE),
    ],
)
def test_slots_are_counted_as_this_kernel_counts_them(
    release: str, plain: int, unprivileged: int, level: Severity
) -> None:
    flags = [0] * plain + [int(Feature.UNPRIVILEGED_DEV)] * unprivileged
    devices = tuple(Device(number, each) for number, each in enumerate(flags))
    answer = DriverAnswer(facts=DriverFacts(0x1FE), devices=devices)
    slots = by_id(checkup.driver_findings(a_machine(limit=64), answer, identify(release)))["slots"]
    assert slots.level is level, slots.text
    assert ("EACCES" in slots.text) == (plain + unprivileged >= 64 and level > OK)


def test_io_uring_that_is_off_ends_in_three_and_one_that_is_restricted_is_a_note() -> None:
    off = DriverAnswer("x", "", "io_uring is disabled", "sysctl kernel.io_uring_disabled=0")
    (finding,) = checkup.io_uring_findings(a_machine(io_uring_disabled=2), off)
    assert (finding.level, finding.means) == (CRITICAL, ExitCode.NO_KERNEL)
    (finding,) = checkup.io_uring_findings(a_machine(io_uring_disabled=1, io_uring_group=44), DriverAnswer())
    assert finding.level is NOTE
    assert "group 44" in finding.text
    for usual in (0, None):
        (finding,) = checkup.io_uring_findings(a_machine(io_uring_disabled=usual), DriverAnswer())
        assert finding.level is OK


def test_a_ring_that_the_kernel_does_not_restrict_is_a_note() -> None:
    def level(*, is_confined: bool | None) -> Severity | None:
        found = checkup.io_uring_findings(a_machine(), DriverAnswer(is_confined=is_confined))
        return next((finding.level for finding in found if finding.id == "io-uring-restricted"), None)

    assert [level(is_confined=value) for value in (True, False, None)] == [OK, NOTE, None]


# --- what is made of it: swaps and devices

SWAP = Swap("/dev/ublkb3", is_file=False, used=0, is_deleted=False, ublk=frozenset({3}))
LOCKED = a_process()
UNLOCKED = a_process(locked=0)


@pytest.mark.parametrize(
    ("swap", "device", "expected"),
    [
        (SWAP, Device(3, 0), {"swap-without-recovery": CRITICAL}),
        (SWAP, Device(3, int(Feature.USER_COPY)), {"swap-without-recovery": CRITICAL}),
        (SWAP, Device(3, None), {"swap-not-known": WARNING}),
        (SWAP, Device(4, 0), {"swap-not-known": WARNING}),
        (SWAP, Device(3, REISSUE, OnUnserved.RECOVER, memory=LOCKED), {"swap": OK}),
        (SWAP, Device(3, REISSUE, OnUnserved.RECOVER), {"swap": OK}),
        (SWAP, Device(3, REISSUE, OnUnserved.RECOVER, memory=UNLOCKED), {"swap-server-unlocked": WARNING}),
        (SWAP, Device(3, REISSUE, OnUnserved.ALERT, memory=LOCKED), {"swap-not-recovered": WARNING}),
        (SWAP, Device(3, REISSUE, OnUnserved.DELETE, memory=LOCKED), {"swap-not-recovered": WARNING}),
        (SWAP, Device(3, RECOVERY, OnUnserved.RECOVER, memory=LOCKED), {"swap-without-reissue": WARNING}),
        (
            SWAP,
            Device(3, REISSUE | Feature.USER_RECOVERY_FAIL_IO, OnUnserved.RECOVER, memory=LOCKED),
            {"swap-fails-io": WARNING},
        ),
        (
            SWAP,
            Device(3, RECOVERY, memory=UNLOCKED),
            {"swap-without-reissue": WARNING, "swap-not-recovered": WARNING, "swap-server-unlocked": WARNING},
        ),
        (replace(SWAP, is_deleted=True), Device(3, REISSUE, OnUnserved.RECOVER), {"swap-lost": CRITICAL}),
        (replace(SWAP, ublk=frozenset()), Device(3, 0), {"swap": OK}),
    ],
)
def test_what_becomes_of_a_swap_whose_server_dies(swap: Swap, device: Device, expected: dict[str, Severity]) -> None:
    findings = checkup.swap_findings([swap], [device])
    assert levels(findings) == expected
    assert all(finding.hint for finding in findings if finding.level > OK)


def test_a_swap_over_several_devices_is_judged_for_each() -> None:
    raid = replace(SWAP, path="/dev/md0", ublk=frozenset({3, 4}))
    good = Device(3, REISSUE, OnUnserved.RECOVER, memory=LOCKED)
    findings = checkup.swap_findings([raid], [good, Device(4, 0)])
    assert [(finding.id, finding.facts["dev_id"]) for finding in findings] == [
        ("swap", 3),
        ("swap-without-recovery", 4),
    ]
    assert "swapoff /dev/md0" in findings[1].hint


@pytest.mark.parametrize(
    ("locked", "resident", "swapped", "expected"),
    [
        (40 * MIB, 30 * MIB, 0, True),
        (0, 30 * MIB, 0, False),
        (MIB, 30 * MIB, 0, False),
        (40 * MIB, 30 * MIB, 4096, False),
        (None, 30 * MIB, 0, None),
        (0, None, None, None),
    ],
)
def test_a_process_is_locked_when_all_of_it_is(
    locked: int | None, resident: int | None, swapped: int | None, *, expected: bool | None
) -> None:
    assert checkup.is_locked(a_process(locked=locked, resident=resident, swapped=swapped)) is expected


def test_devices_that_cannot_be_claimed_or_do_not_answer_are_warned_of_and_lost_mounts_are_noted() -> None:
    devices = [
        Device(1, 0, mounts=("/srv (ext4)",)),
        Device(2, REISSUE, mounts=("/var (ext4)",)),
        Device(3, 0, has_node=False),
        Device(4, None, overdue="GET_DEV_INFO", mounts=("/x",)),
    ]
    found = by_id(checkup.device_findings(devices))
    assert {name: finding.facts.get("dev_id") for name, finding in found.items()} == {
        "devices": None,
        "mount-without-recovery": 1,
        "node-missing": 3,
        "device-silent": 4,
    }
    assert found["mount-without-recovery"].level is NOTE
    assert found["node-missing"].level is found["device-silent"].level is WARNING


# --- what is made of it: the daemon, its configuration and its rights


@pytest.mark.parametrize(
    ("lock", "answer", "expected"),
    [
        (DaemonLock(None, is_held=False), DaemonAnswer(trouble="nobody listens"), {"daemon": NOTE}),
        (DaemonLock(812, is_held=True), DaemonAnswer(trouble="nobody listens"), {"daemon": WARNING}),
        (DaemonLock(812, is_held=True), DaemonAnswer(is_there=True, trouble="no answer"), {"daemon": CRITICAL}),
        (DaemonLock(None, is_held=None), DaemonAnswer(is_there=True, trouble="uid 1000"), {"daemon": CRITICAL}),
        (
            DaemonLock(812, is_held=True),
            DaemonAnswer(is_there=True, version=__version__),
            {"daemon": OK, "journal": OK},
        ),
        (
            DaemonLock(812, is_held=True),
            DaemonAnswer(is_there=True, is_ready=False),
            {"daemon": WARNING, "journal": OK},
        ),
        (
            DaemonLock(812, is_held=True),
            DaemonAnswer(is_there=True, journal="full"),
            {"daemon": OK, "journal": WARNING},
        ),
        (
            DaemonLock(812, is_held=True),
            DaemonAnswer(is_there=True, version="0.0.1", overdue=2),
            {"daemon": OK, "daemon-version": NOTE, "daemon-overdue": WARNING, "journal": OK},
        ),
    ],
)
def test_how_a_daemon_is(lock: DaemonLock, answer: DaemonAnswer, expected: dict[str, Severity]) -> None:
    findings = list(checkup.daemon_findings(a_machine(lock=lock), answer))
    assert levels(findings) == expected
    assert all(finding.hint for finding in findings if finding.level > OK)


def test_a_journal_on_a_device_that_it_tells_of_is_warned_of() -> None:
    (finding,) = checkup.config_findings(a_machine(state_on=frozenset({3})), a_config())
    assert finding.level is WARNING
    assert "ublk3" in finding.text
    (finding,) = checkup.config_findings(a_machine(), a_config())
    assert finding.level is OK


def test_a_daemon_that_only_says_what_it_would_do_is_noted() -> None:
    assert levels(checkup.config_findings(a_machine(), a_config("[daemon]\ndry_run = true\n"))) == {
        "dry-run": NOTE,
        "state-dir": OK,
    }


def test_a_recovery_program_that_is_missing_is_named() -> None:
    finding = checkup.of_programs(["sh", "/opt/\x1b[31m"], ["/opt/\x1b[31m"])
    assert finding.level is WARNING
    assert "/opt/\\x1b[31m" in finding.text
    assert checkup.of_programs([], []).level is OK


def test_missing_capabilities_are_named_with_what_they_are_needed_for() -> None:
    def found(mine: int | None, daemons: int, config: str = "") -> dict[str, Finding]:
        machine = a_machine(me=a_process(capabilities=mine), daemon=a_process(capabilities=daemons))
        return by_id(checkup.privilege_findings(machine, a_config(config)))

    full = found(ALL_CAPABILITIES, ALL_CAPABILITIES)
    assert {finding.level for finding in full.values()} == {OK}
    without_ptrace = found(ALL_CAPABILITIES, ALL_CAPABILITIES & ~(1 << 19))["daemon-capabilities"]
    assert without_ptrace.level is WARNING
    assert without_ptrace.facts["missing"] == ["CAP_SYS_PTRACE"]
    assert "nothing is deleted" in without_ptrace.text
    assert found(ALL_CAPABILITIES, ALL_CAPABILITIES & ~(1 << 12))["daemon-capabilities"].level is NOTE
    assert found(0, ALL_CAPABILITIES)["capabilities"].level is WARNING
    assert found(None, ALL_CAPABILITIES)["capabilities"].level is NOTE
    without_setuid = ALL_CAPABILITIES & ~(1 << 7)
    assert found(ALL_CAPABILITIES, without_setuid)["daemon-capabilities"].level is OK
    as_nobody = '[policy]\nunserved = "recover"\nrecover = { command = ["sh"], user = "65534" }\n'
    assert found(ALL_CAPABILITIES, without_setuid, as_nobody)["daemon-capabilities"].level is WARNING


def test_no_capability_is_asked_for_that_the_unit_does_not_give() -> None:
    unit = (REPOSITORY / "deploy" / "duende-ublkd.service").read_text()
    lines = [line for line in unit.splitlines() if line.startswith("CapabilityBoundingSet=")]
    given = {name for line in lines for name in line.partition("=")[2].split()}
    assert {each.name for each in checkup.CAPABILITIES} <= given


@pytest.mark.parametrize(
    ("daemon", "me", "config", "level"),
    [
        (a_process(), a_process(), "", OK),
        (a_process(locked=0), a_process(), "", WARNING),
        (a_process(locked=None), a_process(), "", NOTE),
        (a_process(locked=0), a_process(), "[daemon]\nlock_memory = false\n", NOTE),
        (None, a_process(), "", OK),
        (None, a_process(capabilities=0, memlock=8 * MIB), "", NOTE),
        (None, a_process(capabilities=0, memlock=UNLIMITED), "", OK),
        (None, a_process(capabilities=1 << 14, memlock=8 * MIB), "", OK),
    ],
)
def test_whether_memory_is_locked_or_could_be(
    daemon: Process | None, me: Process, config: str, level: Severity
) -> None:
    (finding,) = checkup.memory_findings(a_machine(daemon=daemon, me=me), a_config(config))
    assert finding.level is level, finding


@pytest.mark.parametrize(
    ("changes", "daemon", "expected"),
    [
        ({}, a_process(), {"open-files": OK, "cgroup-tasks": OK, "tasks": OK}),
        ({}, a_process(files=59000), {"open-files": WARNING, "cgroup-tasks": OK, "tasks": OK}),
        ({}, a_process(nofile=100), {"open-files": WARNING, "cgroup-tasks": OK, "tasks": OK}),
        ({}, a_process(nofile=UNLIMITED), {"open-files": OK, "cgroup-tasks": OK, "tasks": OK}),
        ({}, a_process(tasks=90), {"open-files": OK, "cgroup-tasks": WARNING, "tasks": OK}),
        ({}, a_process(most_tasks=UNLIMITED), {"open-files": OK, "cgroup-tasks": OK, "tasks": OK}),
        ({}, a_process(most_tasks=None), {"open-files": OK, "tasks": OK}),
        ({"tasks": 32000}, a_process(), {"open-files": OK, "cgroup-tasks": OK, "tasks": WARNING}),
        ({"tasks": None}, None, {"open-files": OK, "cgroup-tasks": OK}),
    ],
)
def test_how_near_to_its_limits_it_is(
    changes: dict[str, Any], daemon: Process | None, expected: dict[str, Severity]
) -> None:
    assert levels(checkup.limit_findings(a_machine(daemon=daemon, **changes), devices=8)) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"namespaces": OK, "dev": OK}),
        ({"me": a_process(namespaces={**FIRST, "user": "user:[1]"})}, {"user-namespace": CRITICAL, "dev": OK}),
        ({"me": a_process(namespaces={**FIRST, "pid": "pid:[1]"})}, {"pid-namespace": WARNING, "dev": OK}),
        ({"first_mounts": "mnt:[1]"}, {"namespaces": OK, "mount-namespace": NOTE, "dev": OK}),
        ({"first_mounts": ""}, {"namespaces": OK, "dev": OK}),
        ({"hides_processes": "hidepid=2"}, {"namespaces": OK, "proc": WARNING, "dev": OK}),
        ({"me": a_process(dev_type="tmpfs")}, {"namespaces": OK, "dev": WARNING}),
        ({"me": a_process(dev_type="")}, {"namespaces": OK, "dev": WARNING}),
        ({"me": a_process(namespaces={}, dev_type=None)}, {}),
        ({"daemon": a_process(dev_type="tmpfs")}, {"namespaces": OK, "dev": WARNING}),
    ],
)
def test_what_a_container_hides(changes: dict[str, Any], expected: dict[str, Severity]) -> None:
    machine = a_machine(**{"daemon": None, **changes})
    assert levels(checkup.surrounding_findings(machine)) == expected


# --- asking a daemon


class _Answers(http.server.BaseHTTPRequestHandler):
    pages: dict[str, tuple[int, str]]

    def do_GET(self) -> None:
        status, text = self.pages.get(self.path, (404, '{"error": "there is nothing", "hint": ""}'))
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass

    def address_string(self) -> str:
        return "local"


@contextlib.contextmanager
def a_daemon(path: Path, pages: dict[str, tuple[int, str]]) -> Iterator[str]:
    handler = type("Answers", (_Answers,), {"pages": pages})
    with socketserver.UnixStreamServer(str(path), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield str(path)
        finally:
            server.shutdown()
            thread.join()


WELL = {
    "/-/ready": (200, "ready\n"),
    "/metrics": (
        200,
        'duende_ublkd_build_info{version="0.9"} 1.0\nduende_ublkd_commands_overdue 0.0\nduende_ublkd_journal_up 1.0\n',
    ),
    "/api/v1/events?limit=1": (200, '{"events": [], "note": ""}'),
}


def test_a_daemon_that_is_well_says_so(tmp_path: Path) -> None:
    with a_daemon(tmp_path / "api.sock", WELL) as path:
        assert doctor.ask(path) == DaemonAnswer(is_there=True, version="0.9")


@pytest.mark.parametrize(
    ("page", "answer", "expected"),
    [
        ("/-/ready", (503, "not ready\n"), DaemonAnswer(is_there=True, is_ready=False, version="0.9")),
        (
            "/metrics",
            (200, "duende_ublkd_commands_overdue 2.0\nduende_ublkd_journal_up 0.0\n"),
            DaemonAnswer(is_there=True, overdue=2, journal="it is not written to at this moment"),
        ),
        (
            "/api/v1/events?limit=1",
            (200, '{"events": [], "note": "the disk \\u001b[31m is full"}'),
            DaemonAnswer(is_there=True, version="0.9", journal="the disk \\x1b[31m is full"),
        ),
    ],
)
def test_a_daemon_that_is_not_well_says_that(
    tmp_path: Path, page: str, answer: tuple[int, str], expected: DaemonAnswer
) -> None:
    with a_daemon(tmp_path / "api.sock", {**WELL, page: answer}) as path:
        assert doctor.ask(path) == expected


def test_a_listener_that_is_no_daemon_is_trouble(tmp_path: Path) -> None:
    with a_daemon(tmp_path / "api.sock", {**WELL, "/api/v1/events?limit=1": (200, "[[[")}) as path:
        answer = doctor.ask(path)
    assert answer.is_there
    assert "not understood" in answer.trouble


def test_a_daemon_that_is_not_there_is_no_trouble_of_one_that_is(tmp_path: Path) -> None:
    answer = doctor.ask(str(tmp_path / "api.sock"))
    assert not answer.is_there
    assert "does not run" in answer.trouble


# --- how it is said


def a_finding(name: str, level: Severity, group: str = "limits", **changes: Any) -> Finding:  # noqa: ANN401
    return replace(Finding(name, group, level, f"the sentence of {name}", f"do-{name}"), **changes)


@pytest.mark.parametrize(
    ("findings", "expected"),
    [
        ([], ExitCode.DONE),
        ([a_finding("a", NOTE)], ExitCode.DONE),
        ([a_finding("a", WARNING), a_finding("b", OK)], ExitCode.LEFT_OVER),
        ([a_finding("a", CRITICAL)], ExitCode.LEFT_OVER),
        ([a_finding("a", CRITICAL, means=ExitCode.USAGE), a_finding("b", CRITICAL)], ExitCode.USAGE),
        (
            [a_finding("a", CRITICAL, means=ExitCode.USAGE), a_finding("b", CRITICAL, means=ExitCode.NO_KERNEL)],
            ExitCode.NO_KERNEL,
        ),
    ],
)
def test_the_exit_code_is_that_of_the_worst(findings: list[Finding], expected: ExitCode) -> None:
    assert doctor.exit_code(findings) is expected


def test_the_worst_comes_first_in_groups_that_stay_together() -> None:
    findings = [
        a_finding("a", OK, "kernel"),
        a_finding("b", WARNING, "kernel"),
        a_finding("c", CRITICAL, "limits"),
        a_finding("d", OK, "limits"),
        a_finding("e", WARNING, "daemon"),
    ]
    assert [finding.id for finding in doctor.in_order(findings)] == ["c", "d", "b", "a", "e"]


def test_the_text_is_aligned_wrapped_and_ends_with_the_count() -> None:
    long = a_finding("a", WARNING, text="word " * 40, hint="one line " * 20)
    lines = doctor.as_text([long, a_finding("name", OK), a_finding("n", CRITICAL, "kernel")], 80).splitlines()
    assert lines[0] == "Kernel"
    assert lines[1] == "  CRITICAL  n     the sentence of n"
    assert lines[2] == "                  do: do-n"
    assert lines[4] == "Limits"
    assert lines[5].startswith("  WARNING   a     word word")
    wrapped = [line for line in lines if "word" in line]
    assert len(wrapped) > 1
    assert all(len(line) <= 80 for line in wrapped)
    assert sum("one line" in line for line in lines) == 1, "a hint can be copied"
    assert "do-name" not in "\n".join(lines), "what is well needs no hint"
    assert lines[-1] == "doctor: 1 warnings, 1 critical"
    assert doctor.as_text([a_finding("a", NOTE)], 80).splitlines()[-1] == "doctor: nothing wrong"


def test_foreign_text_cannot_steer_a_terminal() -> None:
    finding = a_finding("a", WARNING, text="\x1b[31mred", hint="\x1b[31mred")
    assert "\x1b" not in doctor.as_text([finding], 80)
    assert "\x1b" not in str(doctor.as_object([finding]))


def test_a_text_of_the_kernel_that_does_not_come_costs_its_deadline_and_no_other_finding(tree: Tree) -> None:
    """A pipe without a writer is opened as a lock that nobody gives back."""
    stuck = tree.top / "proc" / "swaps"
    os.mkfifo(stuck)
    findings = by_id(asyncio.run(doctor.examine(None, tree.roots, patience=0.2)))
    with stuck.open("wb"):
        pass  # and the thread goes on
    assert findings["survey"].level is CRITICAL
    assert "0.2 s" in findings["survey"].text
    assert findings["control-device"].means is ExitCode.NO_KERNEL
    assert {"configuration", "devices", "recovery-program"} <= findings.keys()


def test_what_hangs_is_given_up_and_what_fails_is_the_callers() -> None:
    over = threading.Event()

    async def ask() -> float:
        began = time.monotonic()
        assert await doctor._in_a_thread(over.wait, 0.05) is None
        return time.monotonic() - began

    assert asyncio.run(ask()) < 2
    over.set()
    with pytest.raises(ZeroDivisionError):
        asyncio.run(doctor._in_a_thread(lambda: 1 / 0, 5))
    assert asyncio.run(doctor._in_a_thread(lambda: 3, 5)) == 3


# --- the command


@without_ublk
def test_without_the_driver_everything_else_is_found_out_and_the_exit_code_is_three() -> None:
    done = run("doctor")
    assert done.returncode == 3, done.stderr
    assert not done.stderr
    assert "do: modprobe ublk_drv" in done.stdout
    assert "io-uring" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("doctor: ")


@without_ublk
def test_with_json_it_prints_one_object_and_a_wrong_configuration_is_one_finding_of_many(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[policy]\norphan_grase = '1s'\n[daemon]\ndry = 1\n")
    done = run("doctor", "--json", "--config", str(config))
    assert done.returncode == 3, "that there is no driver is worse"
    answer = json.loads(done.stdout)
    assert answer["worst"] == "critical"
    found = {finding["id"]: finding for finding in answer["findings"]}
    assert found["configuration"]["level"] == "critical"
    assert len(found["configuration"]["facts"]["problems"]) == 2
    assert "orphan_grace" in found["configuration"]["text"] + found["configuration"]["hint"]
    assert {"kernel", "driver", "control-device", "swap", "daemon"} <= found.keys()
    assert all(finding["hint"] for finding in answer["findings"] if finding["level"] != "ok")


def test_a_wrong_configuration_alone_ends_in_two(tmp_path: Path) -> None:
    _, findings = asyncio.run(doctor._read_configuration(str(tmp_path / "nowhere.toml")))
    assert doctor.exit_code(findings) is ExitCode.USAGE
    assert "no such file" in findings[0].text
    assert findings[0].hint
    assert findings[0].hint not in findings[0].text


def test_what_the_defaults_would_ask_for_is_nothing_to_say_of_a_wrong_configuration(tree: Tree, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    ids = {"state-dir", "recovery-program"}
    for text, expected in (("", ids), ("[polcy]\n", set())):
        config.write_text(text)
        assert by_id(asyncio.run(doctor.examine(str(config), tree.roots))).keys() & ids == expected


@without_ublk
def test_a_missing_recovery_program_is_found(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[policy]\nunserved = "recover"\nrecover = { command = ["/opt/gone", "{id}"] }\n')
    done = run("doctor", "--config", str(config))
    assert "there is no program /opt/gone" in done.stdout, done.stdout
