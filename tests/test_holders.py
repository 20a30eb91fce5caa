"""Holders in a /proc and /sys made for the test, hostile names included, and in those of the machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duende_ublkd.core.model import Holder, Usage
from duende_ublkd.kernel import holders
from duende_ublkd.kernel.holders import Mount, Node, Progress, Sweeper, Target, look
from tests.test_servers import LEADER_EXITS, a_child, open_descriptors

if TYPE_CHECKING:
    from collections.abc import Mapping

PATIENCE = 10.0
CHAR, DISK, PARTITION = (240, 3), (259, 0), (259, 1)
UBLK3 = Target(3, CHAR, frozenset({DISK, PARTITION}))
FIRST_NS, OTHER_NS = "mnt:[4026531832]", "mnt:[4026532999]"
ROOT_MOUNT = b"22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
PROC_MOUNT = b"23 22 0:21 / %s rw - proc proc rw%s\n"


class Machine:
    """A /proc and a /sys of plain files; `nodes` says what a descriptor with such a link would be."""

    def __init__(self, root: Path) -> None:
        self.proc, self.sys = root / "proc", root / "sys"
        self.nodes: dict[str, Node] = {}
        (self.proc / "self" / "ns").mkdir(parents=True)
        (self.proc / "self" / "ns" / "pid").symlink_to("pid:[4026531836]")
        self.set_proc_options(b"")
        self.set_swaps()
        for name in ("block", "dev/block", "fs"):
            (self.sys / name).mkdir(parents=True)
        self.process(1, "systemd")

    def set_proc_options(self, options: bytes, *, may_trace: bool = True) -> None:
        own = self.proc / "self"
        own.joinpath("mountinfo").write_bytes(PROC_MOUNT % (os.fsencode(self.proc), options))
        own.joinpath("status").write_bytes(b"Name:\tx\nCapEff:\t%016x\n" % (1 << 19 if may_trace else 0))

    def set_swaps(self, *lines: bytes) -> None:
        header = b"Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
        (self.proc / "swaps").write_bytes(header + b"".join(line + b"\n" for line in lines))

    def process(
        self,
        pid: int,
        comm: str = "dd",
        *,
        links: Mapping[str, str] | None = None,
        ns: str | None = FIRST_NS,
        mounts: bytes = b"",
        below: str = "",
    ) -> Path:
        path = self.proc / str(pid) / below
        for name in ("ns", "fd", "fdinfo"):
            (path / name).mkdir(parents=True)
        if ns:
            (path / "ns" / "mnt").symlink_to(ns)
        (path / "mountinfo").write_bytes(ROOT_MOUNT + mounts)
        (path / "comm").write_text(comm + "\n")
        for name, link in (links or {}).items():
            (path / "fd" / name).symlink_to(link)
            (path / "fdinfo" / name).write_text("pos:\t0\nflags:\t0100002\nmnt_id:\t24\n")
        return path

    def disk(self, name: str, rdev: tuple[int, int], parent: str = "") -> Path:
        path = self.sys / "block" / parent / name
        (path / "holders").mkdir(parents=True)
        (path / "slaves").mkdir()
        number = f"{rdev[0]}:{rdev[1]}"
        (path / "dev").write_text(number + "\n")
        (self.sys / "dev" / "block" / number).symlink_to(f"../../devices/virtual/block/{name}")
        return path

    def node(self, directory: int, name: str, link: str) -> Node | None:
        del directory, name
        return self.nodes.get(link)

    def look(self, target: Target = UBLK3) -> Usage:
        return look({target.dev_id: target}, proc=self.proc, sys=self.sys, node=self.node)[target.dev_id]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def what(usage: Usage) -> list[str]:
    return [str(holder) for holder in usage.holders]


# --- the kernel's texts ----------------------------------------------------------------------------------------------

PATHS = st.binary(max_size=60).filter(lambda path: b"\0" not in path).map(lambda path: b"/" + path)


def mangled(path: bytes) -> bytes:
    """As seq_escape(" \\t\\n\\\\#") writes it."""
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes([byte]) for byte in path)


@given(PATHS, PATHS, st.lists(st.sampled_from([b"shared:1", b"master:7", b"unbindable"]), max_size=3))
def test_a_mount_line_comes_back_as_it_was_whatever_the_paths_hold(
    mountpoint: bytes, source: bytes, optional: list[bytes]
) -> None:
    fields = [
        b"36",
        b"35",
        b"259:7",
        b"/",
        mangled(mountpoint),
        b"rw",
        *optional,
        b"-",
        b"ext4",
        mangled(source),
        b"rw",
    ]
    mount = holders.mount_of(b" ".join(fields))
    assert mount == Mount((259, 7), "/", os.fsdecode(mountpoint), "ext4", os.fsdecode(source), "rw")


@given(st.binary() | st.lists(st.sampled_from([b" ", b"-", b":", b"9", b"/", b"\\04", b"\\777", b"\n"])).map(b"".join))
def test_no_text_of_the_kernel_makes_a_parser_fail(text: bytes) -> None:
    for line in text.split(b"\n"):
        holders.mount_of(line)
    holders.rdev_of(text)
    for path in (*holders.swap_paths(text), holders.unescape(text)):
        holders.disk_id(path)
        holders.char_id(path)


@pytest.mark.parametrize(
    ("path", "dev_id"),
    [
        ("/dev/ublkb3", 3),
        ("/dev/ublkb3 (deleted)", 3),
        ("/dev/ublkb0p12", 0),
        ("ublkb7", 7),
        ("/dev/ublkb3\n", None),
        ("/dev/ublkb3x", None),
        ("/dev/ublkb", None),
        ("/dev/ublkb3/file", None),
        ("/dev/ublkc3", None),
        ("/dev/ublkb\u0663", None),
        ("/dev/ublkb99999999999", None),
    ],
)
def test_a_disk_is_known_by_its_whole_name(path: str, dev_id: int | None) -> None:
    assert holders.disk_id(path) == dev_id


# --- mounts ----------------------------------------------------------------------------------------------------------


def test_a_device_that_nobody_uses_has_a_complete_and_empty_usage(machine: Machine) -> None:
    assert machine.look() == Usage()


def test_no_targets_no_look() -> None:
    assert look({}) == {}


def test_a_mount_of_a_disk_that_has_gone_is_found_by_its_remembered_number(machine: Machine) -> None:
    machine.process(90, mounts=b"40 22 259:1 / /srv/a\\040b rw - ext4 /dev/disk/by-label/x rw\n", ns=OTHER_NS)
    assert what(machine.look()) == ["mount /srv/a b (ext4), mount namespace of pid 90"]


def test_a_mount_of_a_disk_never_seen_is_found_by_its_source_and_only_if_no_other_disk_has_the_number(
    machine: Machine,
) -> None:
    machine.process(90, ns=OTHER_NS, mounts=b"40 22 259:9 / /srv rw - xfs /dev/ublkb3p1 rw\n")
    assert what(machine.look(Target(3))) == ["mount /srv (xfs), mount namespace of pid 90"]
    machine.disk("nvme0n1", (259, 9))
    assert machine.look(Target(3)) == Usage()


def test_a_number_that_another_disk_has_by_now_is_no_evidence(machine: Machine) -> None:
    machine.disk("ublkb5", DISK)
    machine.process(90, ns=OTHER_NS, mounts=b"40 22 259:0 / /srv rw - xfs /dev/ublkb5 rw\n")
    assert machine.look() == Usage()
    assert what(machine.look(Target(5))) == ["mount /srv (xfs), mount namespace of pid 90"]


def test_a_partition_of_a_present_disk_is_found_without_being_told(machine: Machine) -> None:
    machine.disk("ublkb3", DISK)
    machine.disk("ublkb3p1", (259, 44), "ublkb3")
    machine.process(90, ns=OTHER_NS, mounts=b"40 22 259:44 / /srv rw - vfat /dev/mynode rw\n")
    assert what(machine.look(Target(3))) == ["mount /srv (vfat), mount namespace of pid 90"]


def test_a_file_system_without_a_device_number_is_found_by_its_source(machine: Machine) -> None:
    lines = b"40 22 0:55 / /b rw - btrfs /dev/ublkb3 rw\n41 22 0:56 / /c rw - bcachefs /dev/sda:/dev/ublkb3 rw\n"
    machine.process(90, ns=OTHER_NS, mounts=lines)
    assert [holder.what.split(",")[0] for holder in machine.look().holders] == ["/b (btrfs)", "/c (bcachefs)"]


@pytest.mark.parametrize("fstype", [b"tmpfs", b"fuse", b"fuse.sshfs", b"overlay"])
def test_a_source_that_anybody_can_invent_holds_nothing(machine: Machine, fstype: bytes) -> None:
    machine.process(90, ns=OTHER_NS, mounts=b"40 22 0:55 / /b rw - %s /dev/ublkb3 rw\n" % fstype)
    assert machine.look() == Usage()


def test_copies_of_a_mount_in_many_namespaces_are_one_holder_and_the_first_process_names_it(machine: Machine) -> None:
    line = b"40 22 259:0 / /srv rw - ext4 /dev/ublkb3 rw\n"
    (machine.proc / "1" / "mountinfo").write_bytes(ROOT_MOUNT + line)
    for pid in range(50, 60):
        machine.process(pid, ns=f"mnt:[{pid}]", mounts=line)
    assert what(machine.look()) == ["mount /srv (ext4)"]


def test_a_namespace_shared_by_many_is_read_once(machine: Machine) -> None:
    for pid in range(50, 60):
        machine.process(pid, ns=OTHER_NS, mounts=b"40 22 259:0 / /srv/%d rw - ext4 /dev/ublkb3 rw\n" % pid)
    assert what(machine.look()) == ["mount /srv/50 (ext4), mount namespace of pid 50"]


def test_a_namespace_that_no_process_is_in_makes_the_look_incomplete(machine: Machine) -> None:
    (machine.proc / "1" / "mountinfo").write_bytes(b"40 22 0:4 %s /run/x.mnt rw - nsfs nsfs rw\n" % OTHER_NS.encode())
    assert not machine.look().complete
    machine.process(90, ns=OTHER_NS)
    assert machine.look().complete
    machine.process(91, links={"5": "mnt:[77]"})
    assert not machine.look().complete


def test_a_file_system_that_no_mount_table_shows_is_still_a_holder(machine: Machine) -> None:
    (machine.sys / "fs" / "ext4" / "ublkb3p1").mkdir(parents=True)
    (machine.sys / "fs" / "ext4" / "features").mkdir()
    (machine.sys / "fs" / "btrfs" / "6c9a-uuid" / "devices" / "ublkb4").mkdir(parents=True)
    assert what(machine.look()) == ["mount ext4 on ublkb3p1, in no mount table that can be seen"]
    assert what(machine.look(Target(4))) == ["mount btrfs on ublkb4, in no mount table that can be seen"]
    machine.process(90, ns=OTHER_NS, mounts=b"40 22 259:1 / /srv rw - ext4 /dev/ublkb3p1 rw\n")
    assert what(machine.look()) == ["mount /srv (ext4), mount namespace of pid 90"]


def test_more_holders_than_a_person_reads_are_counted(machine: Machine) -> None:
    lines = b"".join(b"%d 22 259:0 / /srv/%d rw - ext4 /dev/ublkb3 rw\n" % (n, n) for n in range(100, 200))
    machine.process(90, ns=OTHER_NS, mounts=lines)
    found = machine.look().holders
    assert len(found) == holders.MOST_HOLDERS + 1
    assert found[-1] == Holder("holder", "and 80 more")


# --- swap and stacks -------------------------------------------------------------------------------------------------


def test_swap_on_a_disk_is_found_before_and_after_the_disk_has_gone(machine: Machine) -> None:
    machine.set_swaps(
        b"/dev/ublkb3\\040(deleted)                 partition\t1048572\t\t0\t\t-2",
        b"/dev/ublkb4p1                           partition\t1048572\t\t0\t\t-3",
        b"/dev/\x1b\\012/ublkb5                      partition\t1048572\t\t0\t\t-3",
        b"/swapfile                               file\t\t1048572\t\t0\t\t-4",
    )
    assert what(machine.look()) == ["swap /dev/ublkb3 (deleted)"]
    assert what(machine.look(Target(4))) == ["swap /dev/ublkb4p1"]
    assert what(machine.look(Target(5))) == ["swap /dev/\\x1b\\n/ublkb5"]


def test_devices_on_top_are_named(machine: Machine) -> None:
    disk = machine.disk("ublkb3", DISK)
    partition = machine.disk("ublkb3p1", PARTITION, "ublkb3")
    (disk / "holders" / "dm-0").mkdir()
    (partition / "holders" / "md127").mkdir()
    (machine.disk("dm-0", (253, 0)) / "dm").mkdir()
    (machine.sys / "block" / "dm-0" / "dm" / "name").write_text("vg-root\n")
    for name, attribute, text in (
        ("loop0", "loop/backing_file", "/dev/ublkb3 (deleted)\n"),
        ("zram0", "backing_dev", "/dev/ublkb3p1\n"),
        ("zram1", "backing_dev", "none\n"),
    ):
        path = machine.disk(name, (7, 0) if name == "loop0" else (251, int(name[-1]))) / attribute
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert what(machine.look()) == [
        "dm dm-0 (vg-root)",
        "md md127",
        "loop loop0 on /dev/ublkb3 (deleted)",
        "holder zram0 on /dev/ublkb3p1",
    ]


def test_a_mapping_over_a_disk_that_has_gone_is_found_by_its_slaves(machine: Machine) -> None:
    (machine.disk("dm-4", (253, 4)) / "slaves" / "ublkb3").symlink_to("../../../ublkb3")
    assert what(machine.look()) == ["dm dm-4"]


# --- exports ---------------------------------------------------------------------------------------------------------

NVMET = "kernel/config/nvmet/subsystems"
LIO = "kernel/config/target/core"
GADGET = "kernel/config/usb_gadget/g1/functions/mass_storage.0"
INFO = "Status: ACTIVATED  Max Queue Depth: 0  SectorSize: 512  HwMaxSectors: 16384\n"
FILEIO = INFO + "        TCM FILEIO ID: 0        File: %s  Size: 1048576  Mode: O_DSYNC Async: 0\n"
IBLOCK = (
    INFO + "        iBlock device: x  UDEV PATH: /dev/x  readonly: 0\n        Major: %d Minor: %d  CLAIMED: IBLOCK\n"
)


def export(machine: Machine, directory: str, **attributes: str) -> None:
    path = machine.sys / directory
    path.mkdir(parents=True, exist_ok=True)
    for name, text in attributes.items():
        (path / name).write_text(f"{text}\n")


def test_a_disk_that_the_kernel_exports_is_held(machine: Machine) -> None:
    machine.nodes = {"/dev/disk/by-id/x": Node(stat.S_IFBLK, PARTITION)}
    export(machine, f"{NVMET}/nqn.a/namespaces/1", device_path="/dev/ublkb3", enable="1")
    export(machine, f"{NVMET}/nqn.b/namespaces/7", device_path="/dev/disk/by-id/x", enable="1")
    export(machine, f"{LIO}/fileio_0/one", udev_path="", info=FILEIO % "/dev/ublkb3", enable="1")
    export(machine, f"{LIO}/iblock_1/two", udev_path="/dev/x", info=IBLOCK % DISK, enable="1")
    export(machine, f"{GADGET}/lun.0", file="/dev/ublkb3p1")
    export(machine, "class/rnbd-server/ctl/devices/dev!ublkb3")
    (machine.sys / "class/rnbd-server/ctl/devices/dev!ublkb3/block_dev").symlink_to("../../virtual/block/ublkb3")
    export(machine, "bus/xen-backend/devices/vbd-4-51712", physical_device="103:0")
    usage = machine.look()
    assert what(usage) == [
        "nvmet /dev/ublkb3, namespace 1 of nqn.a",
        "nvmet /dev/disk/by-id/x, namespace 7 of nqn.b",
        "lio /dev/ublkb3, backstore fileio_0/one",
        "lio /dev/x, backstore iblock_1/two",
        "gadget /dev/ublkb3p1, lun.0 of g1/mass_storage.0",
        "rnbd /dev/ublkb3, export dev!ublkb3",
        "xen backend vbd-4-51712",
    ]
    assert usage.complete


def test_what_is_exported_of_other_disks_or_of_none_holds_nothing(machine: Machine) -> None:
    machine.nodes = {"/srv/disk.img": Node(stat.S_IFREG, None), "/dev/cciss/c0d0": Node(stat.S_IFBLK, (104, 0))}
    export(machine, f"{NVMET}/nqn.a/namespaces/1", device_path="/srv/disk.img", enable="1")
    export(machine, f"{NVMET}/nqn.a/namespaces/2", device_path="(null)", enable="0")
    export(machine, f"{NVMET}/nqn.a/namespaces/3", device_path="/dev/ublkb5", enable="1")
    machine.process(7, ns=OTHER_NS, mounts=b"50 22 0:6 /ublkb5 /pod/a rw - devtmpfs udev rw\n")
    export(machine, f"{NVMET}/nqn.a/namespaces/4", device_path="/pod/a", enable="1")
    export(machine, f"{NVMET}/nqn.a", attr_model="ublkb3")
    export(machine, f"{LIO}/alua/lu_gps")
    export(machine, f"{LIO}/fileio_0", hba_info="HBA Index: 1")
    export(machine, f"{LIO}/user_0/four", udev_path="/dev/ublkb3", info=INFO, enable="1")
    export(machine, f"{LIO}/iblock_1/two", udev_path="/dev/gone", info=IBLOCK % (8, 0), enable="1")
    export(machine, f"{GADGET}/lun.0", file="")
    export(machine, "class/rnbd-server/ctl/devices/x")
    (machine.sys / "class/rnbd-server/ctl/devices/x/block_dev").symlink_to("../../devices/block/cciss!c0d0")
    export(machine, "bus/xen-backend/devices/vbd-4-51712", physical_device="8:0")
    export(machine, "bus/xen-backend/devices/vif-4-0", state="4")
    assert machine.look() == Usage()


def test_an_export_that_is_off_counts_as_long_as_the_disk_is_there_since_it_may_be_draining(machine: Machine) -> None:
    export(machine, f"{NVMET}/nqn.a/namespaces/1", device_path="/dev/ublkb3", enable="0")
    assert machine.look() == Usage()
    machine.disk("ublkb3", DISK)
    assert what(machine.look()) == ["nvmet /dev/ublkb3, namespace 1 of nqn.a (off)"]


def test_an_export_whose_path_leads_nowhere_from_here_may_be_of_any_disk(machine: Machine) -> None:
    export(machine, f"{NVMET}/nqn.a/namespaces/1", device_path="/dev/in-a-container\x1b", enable="1")
    usage = machine.look()
    assert usage == Usage(complete=False)
    assert usage.blind == "nvmet /dev/in-a-container\\x1b, namespace 1 of nqn.a: its disk"
    export(machine, f"{NVMET}/nqn.a/namespaces/1", enable="0")
    assert machine.look() == Usage()


@pytest.mark.parametrize(
    ("module", "group"), [("nvmet", "nvmet"), ("target_core_mod", "target"), ("usb_f_mass_storage", "usb_gadget")]
)
def test_exports_that_configfs_does_not_show_make_the_look_incomplete(
    machine: Machine, module: str, group: str
) -> None:
    export(machine, f"module/{module}")
    (machine.sys / "kernel/config").mkdir(parents=True)
    assert module in machine.look().blind
    (machine.sys / "kernel/config" / group).mkdir()
    assert machine.look() == Usage()


def test_a_gadget_driver_whose_disks_are_shown_nowhere_makes_the_look_incomplete(machine: Machine) -> None:
    export(machine, "module/g_mass_storage")
    assert not machine.look().complete


def test_an_export_that_cannot_be_read_makes_the_look_incomplete(machine: Machine) -> None:
    export(machine, f"{NVMET}/nqn.a/namespaces/1/device_path", enable="1")  # a directory: EISDIR
    assert not machine.look().complete


def test_more_exports_than_anybody_has_are_not_looked_at(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "_MOST_EXPORTS", 3)
    machine.nodes = {"/dev/sda": Node(stat.S_IFBLK, (8, 0))}
    for number in range(3):
        export(machine, f"{NVMET}/nqn.a/namespaces/{number}", device_path="/dev/sda", enable="1")
    assert machine.look() == Usage()
    export(machine, f"{NVMET}/nqn.a/namespaces/3", device_path="/dev/ublkb3", enable="1")
    assert machine.look() == Usage(complete=False)


@settings(max_examples=25)  # each one makes a tree of files
@given(st.binary(), st.binary(), st.binary(), st.binary())
def test_random_exports_never_break_a_look(
    tmp_path_factory: pytest.TempPathFactory, path: bytes, info: bytes, numbers: bytes, enable: bytes
) -> None:
    machine = Machine(tmp_path_factory.mktemp("machine"))
    export(machine, f"{NVMET}/n/namespaces/1")
    export(machine, f"{LIO}/fileio_0/one")
    export(machine, "bus/xen-backend/devices/vbd-1-1")
    for name, text in (
        (f"{NVMET}/n/namespaces/1/device_path", b"/" + path),
        (f"{NVMET}/n/namespaces/1/enable", enable),
        (f"{LIO}/fileio_0/one/info", b"File: /" + info + b"  Size: 1Major: 1 Minor: 2  CLAIMED"),
        ("bus/xen-backend/devices/vbd-1-1/physical_device", numbers),
    ):
        (machine.sys / name).write_bytes(text)
    look({3: UBLK3}, proc=machine.proc, sys=machine.sys)


# --- open files ------------------------------------------------------------------------------------------------------


def test_who_has_the_char_device_open_is_a_server_and_who_has_the_disk_open_is_a_holder(machine: Machine) -> None:
    machine.nodes = {"/dev/ublkc3": Node(stat.S_IFCHR, CHAR), "/dev/ublkb3": Node(stat.S_IFBLK, DISK)}
    machine.process(812, "ublk.loop", links={"4": "/dev/ublkc3", "5": "/dev/ublkc3", "0": "/dev/null"})
    machine.process(813, "dd", links={"3": "/dev/ublkb3", "4": "/dev/ublkb3"})
    usage = machine.look()
    assert [(opener.pid, opener.comm) for opener in usage.char_openers] == [(812, "ublk.loop")]
    assert what(usage) == ["open pid 813 (dd)"]


def test_a_node_of_any_name_is_known_by_its_number(machine: Machine) -> None:
    alias = "/var/lib/kubelet/dev/0b1c"
    machine.nodes = {"/dev/xvda": Node(stat.S_IFBLK, PARTITION), alias: Node(stat.S_IFBLK, DISK)}
    machine.process(812, "guest", links={"4": "/dev/xvda"})
    bind = b"50 22 0:6 /ublkb3 %s rw - devtmpfs devtmpfs rw\n" % alias.encode()
    machine.process(813, "pod", links={"4": alias}, ns=OTHER_NS, mounts=bind)
    assert what(machine.look()) == ["open pid 812 (guest)", "open pid 813 (pod)"]


def test_an_alias_of_device_zero_is_an_alias_too(machine: Machine) -> None:
    machine.nodes = {"/run/a": Node(stat.S_IFBLK, DISK)}
    machine.process(
        813, links={"4": "/run/a"}, ns=OTHER_NS, mounts=b"50 22 0:6 /ublkb0 /run/a rw - devtmpfs devtmpfs rw\n"
    )
    assert what(machine.look(Target(0, None, frozenset({DISK})))) == ["open pid 813 (dd)"]


def test_a_node_whose_number_is_not_known_is_found_by_name(machine: Machine) -> None:
    machine.nodes = {
        "/dev/ublkc3 (deleted)": Node(stat.S_IFCHR, CHAR),
        "/dev/ublkb3 (deleted)": Node(stat.S_IFBLK, None),
    }
    machine.process(812, links={"4": "/dev/ublkc3 (deleted)"})
    machine.process(813, links={"4": "/dev/ublkb3 (deleted)"})
    usage = machine.look(Target(3))
    assert [opener.pid for opener in usage.char_openers] == [812]
    assert what(usage) == ["open pid 813 (dd)"]


def test_a_file_that_only_looks_like_a_node_holds_nothing(machine: Machine) -> None:
    machine.nodes = {
        "/home/x/ublkc3": Node(stat.S_IFREG, (0, 0)),
        "/home/x/ublkb3": Node(stat.S_IFREG, (0, 0)),
        "/home/y/ublkb3": Node(stat.S_IFCHR, (1, 5)),
        "/dev/ublkc3": Node(stat.S_IFCHR, (1, 5)),
    }
    machine.process(812, links={str(n): link for n, link in enumerate(machine.nodes)})
    assert machine.look() == Usage()


def test_a_descriptor_that_never_reached_the_driver_holds_nothing(machine: Machine) -> None:
    machine.nodes = {"/dev/ublkc3": Node(stat.S_IFCHR, CHAR)}
    path = machine.process(812, links={"4": "/dev/ublkc3"})
    (path / "fdinfo" / "4").write_text("pos:\t0\nflags:\t012000000\n")
    assert machine.look() == Usage()


def test_the_threads_of_a_leader_that_has_exited_are_looked_at(machine: Machine) -> None:
    machine.nodes = {"/dev/ublkc3": Node(stat.S_IFCHR, CHAR)}
    machine.process(812, ns=None)
    machine.process(812, below="task/815", links={"4": "/dev/ublkc3"}, ns=OTHER_NS)
    assert [opener.pid for opener in machine.look().char_openers] == [812]


def test_a_disk_opened_by_a_node_that_a_container_made_is_held(machine: Machine) -> None:
    machine.nodes = {"/data/blk": Node(stat.S_IFBLK, DISK), "/data/other": Node(stat.S_IFREG, None)}
    machine.process(7, "postgres", links={"4": "/data/blk", "5": "/data/other"}, ns=OTHER_NS)
    assert what(machine.look()) == ["open pid 7 (postgres)"]


@pytest.mark.parametrize("how", ["bind mount", "node of its own"])
def test_a_loop_device_over_a_disk_of_another_name_holds_it(machine: Machine, how: str) -> None:
    if how == "bind mount":
        machine.process(7, "kubelet", ns=OTHER_NS, mounts=b"50 22 0:6 /ublkb3 /var/lib/x rw - devtmpfs udev rw\n")
    else:
        machine.nodes = {"/var/lib/x": Node(stat.S_IFBLK, DISK)}
    loop = machine.disk("loop0", (7, 0)) / "loop"
    loop.mkdir()
    (loop / "backing_file").write_text("/var/lib/x\n")
    assert what(machine.look()) == ["loop loop0 on /var/lib/x"]


def test_no_file_system_is_asked_about_a_descriptor_that_has_no_path_or_is_known(machine: Machine) -> None:
    asked: list[str] = []

    def node(directory: int, name: str, link: str) -> Node | None:
        del directory, name
        asked.append(link)
        return None

    links = ["/mnt/nfs/data", "socket:[4]", "anon_inode:[io_uring]", "/dev/null", "/dev/pts/0", "/home/x", "/dev/sda"]
    machine.process(812, links={str(n): link for n, link in enumerate(links)})
    look({3: UBLK3}, proc=machine.proc, sys=machine.sys, node=node)
    assert sorted(asked) == ["/dev/sda", "/home/x", "/mnt/nfs/data"]


HOSTILE = [
    "/dev/ublkb3\n(deleted)",
    "/tmp/\x1b[2Jublk",
    "/dev/" + "a/" * 2040 + "ublkb3",
    "/tmp/ublk" + os.fsdecode(b"\xff\xfe"),
    "/tmp/ublkb3\tx (deleted) (deleted)",
    "/dev/ublkb3 (deleted)",
]


def test_hostile_names_are_neither_lost_nor_shown_raw(machine: Machine) -> None:
    machine.nodes = dict.fromkeys(HOSTILE, Node(stat.S_IFBLK, DISK))
    mountpoint = b"/srv/" + b"\\012\x1b\xff" * 900
    machine.process(
        812,
        "a\x1b\nb) S",
        links={str(n): link for n, link in enumerate(HOSTILE)},
        ns=OTHER_NS,
        mounts=b"40 22 259:0 / %s rw - ext4 /dev/ublkb3 rw\n" % mountpoint,
    )
    usage = machine.look()
    assert usage.complete
    assert [holder.kind for holder in usage.holders] == ["mount", "open"]
    assert usage.holders[1].what == "pid 812 (a\\x1b\\nb) S)"
    for holder in usage.holders:
        assert holder.what.isprintable()
        assert len(holder.what) <= 120


@settings(max_examples=25)  # each one makes a tree of files
@given(st.binary(), st.binary())
def test_random_tables_never_break_a_look(tmp_path_factory: pytest.TempPathFactory, table: bytes, swaps: bytes) -> None:
    machine = Machine(tmp_path_factory.mktemp("machine"))
    machine.process(812, ns=OTHER_NS, mounts=table)
    machine.set_swaps(swaps)
    machine.look()


# --- what cannot be seen ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "may_trace", "complete"),
    [
        (b",hidepid=invisible", False, False),
        (b",hidepid=2,gid=4", False, False),
        (b",hidepid=2,gid=4", True, True),
        (b",hidepid=off", False, True),
        (b",subset=pid", True, False),
        (b"", False, True),
    ],
)
def test_a_proc_that_hides_processes_makes_the_look_incomplete(
    machine: Machine, options: bytes, *, may_trace: bool, complete: bool
) -> None:
    machine.set_proc_options(options, may_trace=may_trace)
    assert machine.look().complete is complete


def test_a_look_from_a_container_is_incomplete(machine: Machine) -> None:
    link = machine.proc / "self" / "ns" / "pid"
    link.unlink()
    link.symlink_to("pid:[4026532555]")
    assert not machine.look().complete


def test_a_process_that_vanishes_is_nothing_special(machine: Machine) -> None:
    (machine.proc / "812").mkdir()
    machine.process(813, links={"4": "/dev/ublkb3"})
    assert machine.look() == Usage()


@pytest.mark.parametrize(("flags", "complete"), [(b"4194304", False), (b"2129984", True)])
def test_a_process_that_may_not_be_looked_into_counts_unless_it_is_a_kernel_thread(
    machine: Machine, flags: bytes, *, complete: bool
) -> None:
    path = machine.process(812, links={"4": "/dev/x"})
    (path / "stat").write_bytes(b"812 (a) b) S 2 0 0 0 -1 %s 0 0\n" % flags)

    def node(directory: int, name: str, link: str) -> Node | None:
        raise PermissionError(13, f"{directory} {name} {link}")

    assert look({3: UBLK3}, proc=machine.proc, sys=machine.sys, node=node)[3].complete is complete


def test_a_proc_that_is_not_there_is_incomplete(tmp_path: Path) -> None:
    assert look({3: UBLK3}, proc=tmp_path / "no", sys=tmp_path / "no")[3] == Usage(complete=False)


# --- the machine of the test -----------------------------------------------------------------------------------------


def dev_full() -> tuple[int, int]:
    number = Path("/dev/full").stat().st_rdev
    return os.major(number), os.minor(number)


def test_a_real_opener_of_a_real_device_is_found_and_this_process_is_not() -> None:
    before = open_descriptors()
    with Path("/dev/full").open("rb") as full, a_child(keeps=full.fileno()) as child:
        openers = look({3: Target(3, dev_full())})[3].char_openers
    found = {opener.pid: opener for opener in openers}
    assert found[child.pid].comm == "cat"
    assert found[child.pid].alive is True
    assert os.getpid() not in found
    assert open_descriptors() == before


def test_a_real_server_whose_leader_has_exited_is_found_by_its_threads() -> None:
    with a_child(sys.executable, "-c", "import os; fd = os.open('/dev/full', os.O_RDWR)\n" + LEADER_EXITS) as child:
        openers = look({3: Target(3, dev_full())})[3].char_openers
    found = {opener.pid: opener for opener in openers}
    assert (found[child.pid].has_ring, found[child.pid].may_serve) == (False, False)


def test_whether_an_opener_of_the_char_device_has_a_ring_is_seen(machine: Machine) -> None:
    machine.nodes["/dev/ublkc3"] = Node(stat.S_IFCHR, CHAR)
    machine.process(811, links={"5": "/dev/ublkc3"})
    machine.process(812, links={"4": "anon_inode:[io_uring]", "5": "/dev/ublkc3"})
    machine.process(813, ns=None).joinpath("fd").rmdir()
    thread = machine.process(813, links={"4": "anon_inode:[io_uring]", "5": "/dev/ublkc3"}, below="task/814")
    assert thread.exists()
    openers = {opener.pid: opener.has_ring for opener in machine.look().char_openers}
    assert openers == {811: False, 812: True, 813: True}


def test_a_descriptor_beyond_4_kib_of_path_is_asked_about(tmp_path: Path) -> None:
    """readlink() gives up on it, and a node may hide there. Only who changes into it step by step can make it."""
    making = "import os\nfor _ in range(25): os.mkdir('d' * 200); os.chdir('d' * 200)\n"
    making += "fd = os.open('ublkb3', os.O_CREAT)\nprint(input(), flush=True)\ninput()"
    with a_child(sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r})\n" + making):
        asked: list[tuple[str, Node | None]] = []

        def node(directory: int, name: str, link: str) -> Node | None:
            asked.append((link, holders.node_of(directory, name, link)))
            return asked[-1][1]

        look({3: UBLK3}, node=node)
    assert ("", Node(stat.S_IFREG, (0, 0))) in asked


def test_a_real_mount_is_found_in_the_real_table(tmp_path: Path) -> None:
    number = Path("/").stat().st_dev
    if os.major(number) == 0:
        pytest.skip("the root file system has no device number of its own")
    target = Target(3, None, frozenset({(os.major(number), os.minor(number))}))
    usage = look({3: target}, sys=tmp_path)[3]
    assert any(holder.kind == "mount" and holder.what.startswith("/ (") for holder in usage.holders)


def test_the_node_of_a_real_descriptor_is_what_stat_says() -> None:
    with Path("/dev/null").open("rb") as file:
        directory = os.open("/proc/self/fd", os.O_RDONLY)
        try:
            assert holders.node_of(directory, str(file.fileno()), "/dev/null") == Node(stat.S_IFCHR, (1, 3))
            with pytest.raises(FileNotFoundError):
                holders.node_of(directory, "99999", "")
        finally:
            os.close(directory)


def test_two_thousand_processes_and_a_hundred_devices_take_less_than_a_resync(machine: Machine) -> None:
    links = {str(n): f"socket:[{n}]" for n in range(8)} | {"8": "/dev/sda"}
    one = machine.process(1000, links=links)
    for pid in range(1001, 3000):
        (machine.proc / str(pid)).symlink_to(one)
    targets = {n: Target(n, (240, n), frozenset({(259, n)})) for n in range(100)}
    start = time.perf_counter()
    found = look(targets, proc=machine.proc, sys=machine.sys, node=machine.node)
    took = time.perf_counter() - start
    print(f"2000 processes, 18000 descriptors, 100 devices: {took:.3f} s")
    assert all(usage == Usage() for usage in found.values())
    assert took < 5


# --- the thread ------------------------------------------------------------------------------------------------------


def test_a_sweeper_looks_and_inspects_beside_the_loop() -> None:
    async def story(pid: int) -> None:
        sweeper = Sweeper()
        usage = await sweeper.look({3: Target(3, dev_full())}, PATIENCE)
        seen = await sweeper.inspect([pid, -1], PATIENCE)
        assert pid in {opener.pid for opener in usage[3].char_openers}
        assert [server.comm for server in seen.values()] == ["cat"]
        assert sweeper.stuck_at is None
        sweeper.close()

    with Path("/dev/full").open("rb") as full, a_child(keeps=full.fileno()) as child:
        asyncio.run(story(child.pid))


class Stuck:
    """A look that the kernel holds until `let_go`."""

    def __init__(self) -> None:
        self.called, self.let_go = threading.Event(), threading.Event()
        self.calls = 0

    def __call__(self, targets: Mapping[int, Target], *, progress: Progress) -> dict[int, Usage]:
        self.calls += 1
        self.called.set()
        progress.at = "mountinfo of pid 812"
        self.let_go.wait(PATIENCE)
        return dict.fromkeys(targets, Usage())


async def until_free(sweeper: Sweeper) -> None:
    async with asyncio.timeout(PATIENCE):
        while sweeper.stuck_at:
            await asyncio.sleep(0)


def test_behind_a_stuck_look_nobody_waits_and_all_is_incomplete_until_it_is_back() -> None:
    async def story() -> None:
        stuck = Stuck()
        sweeper = Sweeper(stuck)
        assert await sweeper.look({3: UBLK3}, 0.02) == {3: Usage(complete=False)}
        assert sweeper.stuck_at == "mountinfo of pid 812"
        started = time.perf_counter()
        assert await sweeper.look({3: UBLK3, 4: Target(4)}, PATIENCE) == dict.fromkeys((3, 4), Usage(complete=False))
        assert (await sweeper.inspect([os.getpid()], PATIENCE))[os.getpid()].alive is None
        assert time.perf_counter() - started < PATIENCE / 2
        assert stuck.calls == 1
        stuck.let_go.set()
        await until_free(sweeper)
        assert await sweeper.look({3: UBLK3}, PATIENCE) == {3: Usage()}
        sweeper.close()

    asyncio.run(story())


def test_a_caller_that_is_cancelled_leaves_the_thread_marked_busy() -> None:
    async def story() -> None:
        stuck = Stuck()
        sweeper = Sweeper(stuck)
        task = asyncio.create_task(sweeper.look({3: UBLK3}, PATIENCE))
        assert await asyncio.to_thread(stuck.called.wait, PATIENCE)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert sweeper.stuck_at
        stuck.let_go.set()
        await until_free(sweeper)
        sweeper.close()

    asyncio.run(story())


def test_a_look_that_nobody_waits_for_any_more_gives_up(machine: Machine) -> None:
    with pytest.raises(holders.GaveUpError):
        look({3: UBLK3}, proc=machine.proc, sys=machine.sys, progress=Progress(give_up=True))


def test_a_defect_reaches_the_caller_and_the_thread_goes_on() -> None:
    async def story() -> None:
        failures = [ZeroDivisionError()]

        def work(targets: Mapping[int, Target], *, progress: Progress) -> dict[int, Usage]:
            del progress
            if failures:
                raise failures.pop()
            return dict.fromkeys(targets, Usage())

        sweeper = Sweeper(work)
        with pytest.raises(ZeroDivisionError):
            await sweeper.look({3: UBLK3}, PATIENCE)
        assert await sweeper.look({3: UBLK3}, PATIENCE) == {3: Usage()}
        sweeper.close()

    asyncio.run(story())


def test_who_joins_waits_for_the_thread_until_the_kernel_has_let_go_of_it() -> None:
    async def story() -> None:
        stuck = Stuck()
        sweeper = Sweeper(stuck)
        task = Path(f"/proc/self/task/{sweeper._thread.native_id}")
        assert not sweeper.join(0.02)  # nobody has closed it
        await sweeper.look({3: UBLK3}, 0.02)
        sweeper.close()
        began = time.monotonic()
        assert not sweeper.join(0.05)
        assert 0.05 <= time.monotonic() - began < PATIENCE / 2
        assert task.exists()
        stuck.let_go.set()
        assert sweeper.join(PATIENCE)
        assert not task.exists()

    asyncio.run(story())


def test_who_sleeps_in_the_kernel_is_not_looked_for_behind_a_look_that_is_stuck() -> None:
    async def story() -> None:
        stuck = Stuck()
        sweeper = Sweeper(stuck)
        assert isinstance(await sweeper.look_for_stuck(PATIENCE), tuple)
        assert sweeper.stuck_at is None
        await sweeper.look({3: UBLK3}, 0.02)
        began = time.monotonic()
        assert await sweeper.look_for_stuck(PATIENCE) == ()
        assert time.monotonic() - began < PATIENCE / 2
        stuck.let_go.set()
        sweeper.close()

    asyncio.run(story())


def test_a_look_for_who_sleeps_that_nobody_waits_for_any_more_gives_up() -> None:
    with pytest.raises(holders.GaveUpError):
        holders._look_for_stuck(Progress(give_up=True))
    progress = Progress()
    holders._look_for_stuck(progress)
    assert progress.at.startswith("pid ")


def test_a_stuck_thread_does_not_keep_the_interpreter_from_exiting() -> None:
    program = """
import asyncio, threading
from duende_ublkd.kernel.holders import Sweeper, Target
never = threading.Event()
async def main():
    sweeper = Sweeper(lambda targets, progress: never.wait())
    print(await sweeper.look({3: Target(3)}, 0.02))
    sweeper.close()
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert "complete=False" in done.stdout
