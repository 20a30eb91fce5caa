r"""Kernel builds that are known to be bad for ublk: which ones, what happens, what to do, and how that is known.

Rules:
1. A row says "surely" only of versions that were measured, or whose source was read. A stable branch after the last release
   that was looked at is "perhaps", and so is everything where only the version that a distribution started from is known:
   distributions carry fixes, and bugs, across.
2. A version number is believed where the vendor builds what upstream released (Debian, Fedora, Arch, mainline). The
   package's own version is better than the release string: Debian's `6.1.0-49-amd64` is built from 6.1.192, which only
   /proc/version tells, and Ubuntu's `6.8.0-32-generic` starts from 6.8.1, which /proc/version_signature tells.
3. Spans are half-open, [since, before), in mainline's order: 6.17.9 < 6.18-rc1 < 6.18 < 6.18.1 < 6.19-rc1. So a span ends
   in a stable branch (6.18.4), and later branches are behind that end.
4. What applies to every kernel of a range, and is in no branch mended, is a note: there is nothing to be done today.

A finding's level is never above NOTE where it is only perhaps so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, IntEnum

KNOWS_UP_TO = "7.3.4"  # the newest release that was looked at

Version = tuple[int, int, int, int]  # the last one is the release candidate's number, or _FINAL
Span = tuple[str, str]

_FINAL = 1000
_VERSION = re.compile(r"([0-9]{1,3})\.([0-9]{1,4})(?:\.([0-9]{1,5}))?")
_CANDIDATE = re.compile(r"(?:[-~.]|-[0-9]{6})rc([0-9]{1,3})(?![0-9])")
# Behind the build's number: the compiler, before it, has a package of Debian's or Ubuntu's too.
_DEBIAN_PACKAGE = re.compile(
    r"#[0-9]{1,4} [^#]{0,80}\bDebian (([0-9]{1,3}\.[0-9]{1,4}(?:\.[0-9]{1,5})?)(?:~rc([0-9]{1,3}))?-[0-9][\w.~+]{0,40})"
)
_UBUNTU_BUILD = re.compile(r"#[0-9][\w.~]{0,40}-Ubuntu\b")
_UBUNTU_RELEASE = re.compile(r"([0-9.]{3,15})-([0-9]{1,5})-([a-z][a-z0-9-]{1,30})")
_UBUNTU_SIGNATURE = re.compile(r"Ubuntu (\S{1,60}) ([0-9]{1,3}\.[0-9]{1,4}\.[0-9]{1,5})")
_UBUNTU_FLAVOUR = re.compile(
    r"(?:generic|lowlatency|aws|azure|gcp|gke|gkeop|ibm|kvm|laptop|nvidia|oem|oracle|raspi|realtime|starfive|xilinx)\b"
)
_FIRST_OF_CLOUD = 1000  # ABI numbers of Ubuntu's derived kernels (azure, aws, ...) begin here, and count for themselves


class Severity(IntEnum):
    """How much a finding matters. From WARNING on somebody has to do something."""

    OK = 0
    NOTE = 1
    WARNING = 2
    CRITICAL = 3

    @property
    def label(self) -> str:
        """The word for it."""
        return self.name.lower()


class Basis(Enum):
    """What a kernel's version number says about its source."""

    UPSTREAM = "upstream"  # built from that release
    DISTRIBUTION = "distribution"  # started from that release, and took from others what its vendor chose
    UNKNOWN = "unknown"  # nobody here knows who built it, or from what


class Answer(Enum):
    """Whether a row applies."""

    YES = "yes"
    PERHAPS = "perhaps"
    NO = "no"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A running kernel, as far as its own words tell. `version` None: not even a number."""

    release: str
    version: Version | None
    basis: Basis
    vendor: str = ""
    abi: int | None = None  # Ubuntu's count of its builds from one base
    base: str = ""  # the version in Ubuntu's release string, which that count is of
    package: str = ""  # the vendor's own version, where it told

    def __str__(self) -> str:
        named = f" ({self.vendor}'s {self.package})" if self.package else f" (of {self.vendor})" if self.vendor else ""
        return self.release + named


@dataclass(frozen=True, slots=True)
class KnownBug:
    """A row. `surely`, `perhaps`: spans of upstream versions. `ubuntu`: (base, first ABI, first ABI that is good again).

    `vendors`: only their kernels, of whatever version unless there are spans. `if_missing`: it explains why there is no
    driver, and says nothing where there is one.
    """

    id: str
    severity: Severity
    symptom: str
    remedy: str
    source: str
    surely: tuple[Span, ...] = ()
    perhaps: tuple[Span, ...] = ()
    ubuntu: tuple[tuple[str, int, int], ...] = ()
    vendors: tuple[str, ...] = ()
    if_missing: bool = False


_NEWEST = "999.0"  # open to the future
_BOOT_NEWER = "boot a kernel of {} or newer"

TABLE: tuple[KnownBug, ...] = (
    KnownBug(
        "init-queues-oops",
        Severity.CRITICAL,
        "the first ADD_DEV oopses in ublk_init_queues and keeps ublk_ctl_mutex: no device can be added or deleted any more "
        "until a reboot",
        "boot another kernel: 6.18.6 or newer, or Ubuntu's 6.17.0-41 or newer; do not start a ublk server on this one",
        "529d4d632788 without 011af85ccd87 (ublk_init_queues before ublk_add_tag_set); Launchpad 2154635",
        surely=(("6.18.4", "6.18.6"),),
        ubuntu=(("6.17.0", 24, 41), ("6.17.0", 1015, 1019)),
    ),
    KnownBug(
        "add-dev-garbage-state",
        Severity.WARNING,
        "a device that was only added shows the state and pid that its server wrote into the request; a STOP_DEV or DEL_DEV "
        "that believes them dereferences a disk that is not there, and the kernel panics",
        "boot a kernel with the fix: 6.1.183, 6.12.103, 7.2 or newer; until then let nobody stop or delete a device that "
        "has no /dev/ublkbN",
        "CVE-2026-74472, ublk_ctrl_add_dev: kernel-owned dev_info fields are not reset",
        surely=(
            ("6.0", "6.1.183"),
            ("6.2-rc1", "6.6-rc1"),
            ("6.7-rc1", "6.12.103"),
            ("6.13-rc1", "6.18.36"),
            ("6.19-rc1", "7.0.1"),
            ("7.1-rc1", "7.1.6"),
            ("7.2-rc1", "7.2-rc6"),
        ),
        perhaps=(("6.6-rc1", "6.7-rc1"), ("6.18.36", "6.19-rc1"), ("7.0.1", "7.1-rc1"), ("7.1.6", "7.2-rc1")),
    ),
    KnownBug(
        "partition-scan-wedge",
        Severity.WARNING,
        "a server that dies during START_DEV, while the kernel reads the partition table, hangs for ever with the disk's "
        "locks: the device stays LIVE, a STOP_DEV of it never returns, a DEL_DEV blocks every ADD_DEV of the machine",
        _BOOT_NEWER.format("6.18.4") + "; never delete such a device by hand, reboot instead",
        "ublk_ctrl_start_dev; mended by 7fc4da6a304b (asynchronous scan); CVE-2025-68823's fix does not cover it",
        surely=(("6.7-rc1", "6.18.4"),),
        perhaps=(("6.19-rc1", "6.19"),),
    ),
    KnownBug(
        "stop-starting-oops",
        Severity.WARNING,
        "a STOP_DEV or DEL_DEV of a device whose server is about to start it oopses the kernel when the server goes on",
        _BOOT_NEWER.format("7.3.4")
        + "; until then nobody but this daemon should delete devices that it calls starting",
        "since f7700a4415af; mended in 7.3.4 by UB_STATE_STOPPING (ublk_ctrl_start_dev)",
        surely=(("7.1-rc1", "7.2.14"), ("7.3-rc1", "7.3.4")),
        perhaps=(("7.2.14", "7.3-rc1"),),
    ),
    KnownBug(
        "stop-starting-uaf",
        Severity.NOTE,
        "a STOP_DEV or DEL_DEV of a device whose server is about to start it leaves a LIVE device that nobody serves, or "
        "has the kernel use memory that it has freed",
        "let nobody but this daemon delete devices that it calls starting; " + _BOOT_NEWER.format("7.3.4"),
        "ublk_stop_dev cancels FETCH commands that START_DEV still counts",
        surely=(("6.1.70", "6.2-rc1"), ("6.7-rc1", "7.1-rc1")),
        perhaps=(("6.6.1", "6.7-rc1"),),
    ),
    KnownBug(
        "io-wq-lost-work",
        Severity.WARNING,
        "io_uring's workers lose what was given to them: a command to the driver may never be carried out, and a server may "
        "wait for ever for its START_DEV",
        _BOOT_NEWER.format("7.3.2") + "; a command that hangs is not carried out: start that server again",
        "measured on 6.18.40 and 7.0 to 7.0.14, not on 6.17 and 6.18; io-wq lost-wakeup fixes of 7.3.2",
        surely=(("6.18.40", "6.18.41"), ("7.0", "7.0.15")),
        perhaps=(("6.18.1", "6.18.40"), ("6.18.41", "7.0"), ("7.0.15", "7.3.2")),
    ),
    KnownBug(
        "del-dev-global-wait",
        Severity.WARNING,
        "DEL_DEV of a device that anybody still holds waits beyond any signal, and keeps every ADD_DEV and DEL_DEV of the "
        "machine waiting",
        _BOOT_NEWER.format("6.3") + "; until then unmount, swapoff and close before anything is deleted by hand",
        "ublk_ctrl_del_dev: wait_event with ublk_ctl_mutex held",
        surely=(("6.0", "6.3-rc1"),),
    ),
    KnownBug(
        "close-under-load-panic",
        Severity.WARNING,
        "a server that is closed or killed under load may panic the kernel",
        "boot a kernel of 6.15 or newer (Ubuntu 24.04: apt install linux-generic-hwe-24.04); until then let I/O end before "
        "a server does",
        "CVE-2025-37906, io_uring_cmd_complete_in_task against ublk_cancel_cmd; not in Ubuntu's 6.8",
        surely=(("6.8-rc1", "6.9-rc1"),),
        perhaps=(("6.7-rc1", "6.8-rc1"), ("6.9-rc1", "6.15-rc6")),
        ubuntu=(("6.8.0", 0, 100_000),),
    ),
    KnownBug(
        "recovery-may-be-last",
        Severity.NOTE,
        "a server that dies after START_USER_RECOVERY and the mmap of its queues leaves a device that nobody can recover "
        "any more (EINVAL)",
        _BOOT_NEWER.format("6.15")
        + "; such a device can only be given up: umount or swapoff, then duende-ublkd explain ID",
        "ublk_ctrl_start_recovery resets the queues, and nr_queues_ready is 0 at the second call",
        surely=(("6.0", "6.15-rc1"),),
    ),
    KnownBug(
        "leaked-char-device",
        Severity.NOTE,
        "a server's death is noticed only when nobody has its /dev/ublkcN open any more: a helper that inherited it keeps a "
        "dead device LIVE, its I/O hanging",
        "have servers open it with O_CLOEXEC and pass it to nobody; who has it: duende-ublkd explain ID",
        "since 82a8a30c581b the work is done in ublk_ch_release; not mended in 7.3.4",
        surely=(("6.15-rc1", "7.3.5"),),
        perhaps=(("6.14.1", "6.15-rc1"), ("7.3.5", _NEWEST)),
    ),
    KnownBug(
        "death-noticed-by-timeout",
        Severity.NOTE,
        "when a server dies with every one of its tags in use, the kernel notices after 30 s: the device is LIVE until then",
        "give servers a deeper queue, or " + _BOOT_NEWER.format("6.15") + "; the daemon waits",
        "ublk_uring_cmd_cancel_fn has nothing to cancel; ublk_timeout is 30 s",
        surely=(("6.7-rc1", "6.15-rc1"),),
    ),
    KnownBug(
        "death-noticed-by-poll",
        Severity.NOTE,
        "a server's death is looked for every 5 s, and that of one that had fetched and not started is never noticed: its "
        "char device stays busy",
        _BOOT_NEWER.format("6.7") + "; the daemon waits",
        "ublk_daemon_monitor_work",
        surely=(("6.0", "6.7-rc1"),),
    ),
    KnownBug(
        "del-dev-says-done",
        Severity.NOTE,
        "a DEL_DEV that was interrupted says that the id is free, when somebody still holds it",
        _BOOT_NEWER.format("6.4.8"),
        "ublk_ctrl_del_dev returned 0 for -EINTR up to 6.4.7",
        surely=(("6.3-rc1", "6.4.8"),),
    ),
    KnownBug(
        "start-wants-openers-pid",
        Severity.NOTE,
        "START_DEV fails with EINVAL for a server in a container's pid namespace, and for one whose device another process "
        "opened",
        "run servers in the machine's own pid namespace, or boot 7.0 or newer, or Ubuntu's 6.17.0-41 or newer",
        "c2c8089f325e compares the pid with the opener's; mended by 'fix ublksrv pid handling for pid namespaces'",
        surely=(("6.16.1", "6.18.3"),),
        perhaps=(("6.18.3", "6.18.15"), ("6.19-rc1", "7.0-rc1")),
        ubuntu=(("6.17.0", 0, 41),),
    ),
    KnownBug(
        "no-legacy-opcodes",
        Severity.NOTE,
        "the driver is built without the old command numbers: servers built with a library of before 6.4 fail with "
        "EOPNOTSUPP",
        "use servers that send ioctl-encoded commands (UBLK_F_CMD_IOCTL_ENCODE)",
        "CONFIG_BLKDEV_UBLK_LEGACY_OPCODES is not set",
        vendors=("ubuntu", "amazon"),
    ),
    KnownBug(
        "not-built-debian",
        Severity.CRITICAL,
        "Debian builds its 6.1 kernel without ublk",
        "apt install -t bookworm-backports linux-image-amd64, and boot it",
        "CONFIG_BLK_DEV_UBLK is not set in Debian 12's linux-image",
        surely=(("6.0", "6.2-rc1"),),
        vendors=("debian",),
        if_missing=True,
    ),
    KnownBug(
        "not-in-linux-yet",
        Severity.CRITICAL,
        "it is older than ublk, which came with 6.0",
        "boot a kernel of 6.0 or newer; if the vendor has added ublk to this one: modprobe ublk_drv",
        "71f28f3136af (drivers/block/ublk_drv.c), 6.0",
        surely=(("1.0", "6.0-rc1"),),
        if_missing=True,
    ),
    KnownBug(
        "in-another-package",
        Severity.CRITICAL,
        "Ubuntu has the driver in a package of its own",
        "apt install linux-modules-extra-$(uname -r) && modprobe ublk_drv",
        "linux-modules-extra",
        surely=(("6.0", _NEWEST),),
        vendors=("ubuntu",),
        if_missing=True,
    ),
)

_LIMIT_COUNTS_ALL = KnownBug(
    "slots-count-all", Severity.NOTE, "", "", "", surely=(("6.3-rc1", "6.12.31"), ("6.13-rc1", "6.15-rc1"))
)


def version(text: str) -> Version:
    """6.12.107, 7.2-rc6 or 6.7, which is behind its candidates and before 6.7.1."""
    found = _VERSION.match(text)
    if found is None:
        raise ValueError(f"{text!r} is no version of Linux")
    return _version(found, _CANDIDATE.search(text))


def version_text(of: Version) -> str:
    """The inverse of `version`."""
    major, minor, patch, candidate = of
    if candidate != _FINAL:
        return f"{major}.{minor}-rc{candidate}"
    return f"{major}.{minor}.{patch}" if patch else f"{major}.{minor}"


def identify(release: str, banner: str = "", signature: str = "") -> Kernel:
    """Who built a kernel from what. `release`: uname -r; `banner`: /proc/version; `signature`: /proc/version_signature."""
    found = _VERSION.match(release)
    if found is None:
        return Kernel(release, None, Basis.UNKNOWN)
    number, rest = _version(found, _CANDIDATE.search(release)), release[found.end() :]
    rest = re.sub(r"^-rc[0-9]{1,3}", "", rest)
    package = _DEBIAN_PACKAGE.search(banner)
    if package is not None and version(package[2])[:2] == number[:2]:
        built_from = (*version(package[2])[:3], int(package[3] or _FINAL))
        return Kernel(release, built_from, Basis.UPSTREAM, "debian", package=package[1])
    if re.match(r"-[0-9]{6}(?:rc[0-9]{1,3})?-generic", rest):
        return Kernel(release, number, Basis.UPSTREAM, "ubuntu-mainline")
    if (ubuntu := _ubuntu(release, number, banner, signature)) is not None:
        return ubuntu
    for vendor, basis, pattern in _SUFFIXES:
        if re.search(pattern, rest):
            return Kernel(release, number, basis, vendor)
    # Mainline's own additions: a commit of `git describe`, a `+` or `-dirty` for a changed tree.
    own = re.fullmatch(r"(?:-[0-9]{5}-g[0-9a-f]{7,40})?(?:-dirty)?\+?", rest)
    return Kernel(release, number, Basis.UPSTREAM if own else Basis.UNKNOWN)


_DEBIAN_ARCHITECTURE = r"(?:amd64|arm64|armmp|686|686-pae|powerpc64le|riscv64|s390x|loong64)\b"
# What follows the number in a release string. Debian's old scheme (`6.1.0-49-amd64`) tells the branch and nothing more.
_SUFFIXES = (
    ("debian", Basis.UPSTREAM, rf"^(?:\+(?:deb[0-9]{{1,2}}|bpo))?-(?:cloud-|rt-)?{_DEBIAN_ARCHITECTURE}"),
    ("debian", Basis.DISTRIBUTION, rf"^-(?:0\.deb[0-9]{{1,2}}\.)?[0-9]{{1,3}}-(?:cloud-|rt-)?{_DEBIAN_ARCHITECTURE}"),
    ("proxmox", Basis.DISTRIBUTION, r"-pve$"),
    ("oracle", Basis.DISTRIBUTION, r"\.el[0-9]{1,2}uek"),
    ("red hat", Basis.DISTRIBUTION, r"\.el[0-9]{1,2}"),
    ("suse", Basis.DISTRIBUTION, r"^-[0-9]{6}\.[0-9.]{1,20}-"),
    ("fedora", Basis.UPSTREAM, r"\.fc[0-9]{1,3}\b"),
    ("amazon", Basis.UPSTREAM, r"\.amzn[0-9]{1,4}\b"),
    ("arch", Basis.UPSTREAM, r"^-(?:arch|zen|hardened)[0-9]{1,3}-[0-9]{1,3}"),
    ("suse", Basis.UPSTREAM, r"^-[0-9]{1,3}-(?:default|longterm)$"),
    ("arch or alpine", Basis.UPSTREAM, r"^-[0-9]{1,3}-(?:lts|virt)$"),
    ("gentoo", Basis.UPSTREAM, r"^-gentoo"),
)


def _version(found: re.Match[str], candidate: re.Match[str] | None) -> Version:
    return int(found[1]), int(found[2]), int(found[3] or 0), int(candidate[1]) if candidate else _FINAL


def _ubuntu(release: str, number: Version, banner: str, signature: str) -> Kernel | None:
    parts = _UBUNTU_RELEASE.match(release)
    signed = _UBUNTU_SIGNATURE.match(signature)
    if parts is None or not (signed or _UBUNTU_BUILD.search(banner) or _UBUNTU_FLAVOUR.match(parts[3])):
        return None
    started_from = version(signed[2]) if signed else number
    package = signed[1] if signed else ""
    return Kernel(release, started_from, Basis.DISTRIBUTION, "ubuntu", int(parts[2]), parts[1], package)


def judge(bug: KnownBug, kernel: Kernel) -> Answer:
    """Whether a row applies to a kernel."""
    if bug.vendors and kernel.vendor not in bug.vendors:
        return Answer.NO
    if kernel.version is None:
        return Answer.PERHAPS
    if (answer := _by_abi(bug, kernel)) is not None:
        return answer
    sure = bool(bug.vendors and not bug.surely) or _is_in(kernel.version, bug.surely)
    if not sure and not _is_in(kernel.version, bug.perhaps):
        return Answer.NO
    # Which driver a vendor builds is told by its name and the branch alone.
    believed = kernel.basis is Basis.UPSTREAM or bool(bug.vendors)
    return Answer.YES if sure and believed else Answer.PERHAPS


def _by_abi(bug: KnownBug, kernel: Kernel) -> Answer | None:
    """What is known of Ubuntu's own builds; None: nothing, of builds from this base."""
    of_base = [(first, good) for base, first, good in bug.ubuntu if base == kernel.base]
    if kernel.vendor != "ubuntu" or kernel.abi is None or not of_base:
        return None
    if any(first <= kernel.abi < good for first, good in of_base):
        return Answer.YES
    return Answer.NO if kernel.abi < _FIRST_OF_CLOUD else Answer.PERHAPS


def _is_in(number: Version, spans: tuple[Span, ...]) -> bool:
    return any(version(since) <= number < version(before) for since, before in spans)


def known_bugs(kernel: Kernel, *, has_driver: bool) -> list[tuple[KnownBug, Answer]]:
    """The rows that apply, or may. Of a kernel without a number, none: nothing could be said but "perhaps"."""
    if kernel.version is None:
        return []
    answers = [(bug, judge(bug, kernel)) for bug in TABLE if not (bug.if_missing and has_driver)]
    return [(bug, answer) for bug, answer in answers if answer is not Answer.NO]


def remedy(bug: KnownBug, kernel: Kernel) -> str:
    """What to do about a row, with what to type for another kernel of this vendor's."""
    command = _UPGRADES.get(kernel.vendor)
    return f"{bug.remedy}; newer kernels: {command}" if command and "boot a kernel" in bug.remedy else bug.remedy


_UPGRADES = {
    "debian": "apt update && apt policy linux-image-amd64",
    "ubuntu": "apt update && apt list --upgradable 'linux-*'",
    "fedora": "dnf upgrade kernel",
    "red hat": "dnf upgrade kernel",
    "amazon": "dnf search kernel6",
    "arch": "pacman -Syu",
    "suse": "zypper update kernel-default",
}


def limit_counts_all(kernel: Kernel) -> Answer:
    """Whether ublks_max limits every device (YES), or only the unprivileged ones (NO)."""
    return judge(_LIMIT_COUNTS_ALL, kernel)


def is_newer_than_table(kernel: Kernel) -> bool:
    """Whether it came after everything that was looked at."""
    return kernel.version is not None and kernel.version > version(KNOWS_UP_TO)
