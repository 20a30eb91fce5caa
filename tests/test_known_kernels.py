"""The table of bad kernels: whom a release string names, and where each row begins and ends."""

from __future__ import annotations

import pytest

from duende_ublkd.core import known_kernels as known
from duende_ublkd.core.known_kernels import Answer, Basis, Kernel, Severity, identify, judge, version

YES, PERHAPS, NO = Answer.YES, Answer.PERHAPS, Answer.NO

DEBIAN_GCC = "(debian-kernel) (x86_64-linux-gnu-gcc-14 (Debian 14.2.0-19) 14.2.0, GNU ld)"
UBUNTU_GCC = "(buildd@lcy02-amd64-032) (x86_64-linux-gnu-gcc-13 (Ubuntu 13.2.0-23ubuntu4) 13.2.0, GNU ld)"


def the(name: str) -> known.KnownBug:
    (bug,) = [bug for bug in known.TABLE if bug.id == name]
    return bug


def mainline(text: str) -> Kernel:
    release = text if "-rc" in text or text.count(".") == 2 else f"{text}.0"
    return identify(release)


# --- who a kernel is


@pytest.mark.parametrize(
    ("release", "banner", "signature", "expected"),
    [
        ("6.18.4", "", "", ("6.18.4", Basis.UPSTREAM, "")),
        ("7.2.0-rc5", "", "", ("7.2-rc5", Basis.UPSTREAM, "")),
        ("7.2.0-rc5-00123-g0123456789ab-dirty", "", "", ("7.2-rc5", Basis.UPSTREAM, "")),
        ("6.19.0+", "", "", ("6.19", Basis.UPSTREAM, "")),
        (
            "6.12.107+deb13-amd64",
            f"Linux version 6.12.107+deb13-amd64 {DEBIAN_GCC} #1 SMP PREEMPT_DYNAMIC Debian 6.12.107-1 (2026-11-02)",
            "",
            ("6.12.107", Basis.UPSTREAM, "debian"),
        ),
        (
            "6.1.0-49-amd64",
            f"Linux version 6.1.0-49-amd64 {DEBIAN_GCC} #1 SMP PREEMPT_DYNAMIC Debian 6.1.192-1 (2026-10-01)",
            "",
            ("6.1.192", Basis.UPSTREAM, "debian"),
        ),
        ("6.1.0-49-amd64", "", "", ("6.1", Basis.DISTRIBUTION, "debian")),
        ("6.1.0-0.deb11.25-cloud-amd64", "", "", ("6.1", Basis.DISTRIBUTION, "debian")),
        ("6.12.107+deb13-cloud-arm64", "", "", ("6.12.107", Basis.UPSTREAM, "debian")),
        ("6.12.9-amd64", "", "", ("6.12.9", Basis.UPSTREAM, "debian")),
        ("7.2-rc3+deb14-amd64", "", "", ("7.2-rc3", Basis.UPSTREAM, "debian")),
        (
            "7.2-rc3+deb14-amd64",
            f"Linux version 7.2-rc3 {DEBIAN_GCC} #1 SMP Debian 7.2~rc3-1~exp1 (2026-08-02)",
            "",
            ("7.2-rc3", Basis.UPSTREAM, "debian"),
        ),
        ("6.8.0-32-generic", "", "", ("6.8", Basis.DISTRIBUTION, "ubuntu")),
        (
            "6.8.0-32-generic",
            f"Linux version 6.8.0-32-generic {UBUNTU_GCC} #32-Ubuntu SMP",
            "Ubuntu 6.8.0-32.32-generic 6.8.1",
            ("6.8.1", Basis.DISTRIBUTION, "ubuntu"),
        ),
        ("6.17.0-1015-azure", "", "", ("6.17", Basis.DISTRIBUTION, "ubuntu")),
        ("6.8.0-9-some-new-flavour", "#14~24.04.1-Ubuntu SMP", "", ("6.8", Basis.DISTRIBUTION, "ubuntu")),
        ("6.18.4-061804-generic", "", "", ("6.18.4", Basis.UPSTREAM, "ubuntu-mainline")),
        ("7.0.0-070000rc5-generic", "", "", ("7.0-rc5", Basis.UPSTREAM, "ubuntu-mainline")),
        ("6.17.8-300.fc43.x86_64", "", "", ("6.17.8", Basis.UPSTREAM, "fedora")),
        ("6.18.0-0.rc3.20251022git.30.fc44.x86_64", "", "", ("6.18-rc3", Basis.UPSTREAM, "fedora")),
        ("6.18.4-arch1-1", "", "", ("6.18.4", Basis.UPSTREAM, "arch")),
        ("6.12.58-1-lts", "", "", ("6.12.58", Basis.UPSTREAM, "arch or alpine")),
        ("6.1.115-126.197.amzn2023.x86_64", "", "", ("6.1.115", Basis.UPSTREAM, "amazon")),
        ("6.17.7-1-default", "", "", ("6.17.7", Basis.UPSTREAM, "suse")),
        ("6.4.0-150600.23.65-default", "", "", ("6.4", Basis.DISTRIBUTION, "suse")),
        ("6.12.0-55.9.1.el10_0.x86_64", "", "", ("6.12", Basis.DISTRIBUTION, "red hat")),
        ("6.12.0-100.28.2.el9uek.x86_64", "", "", ("6.12", Basis.DISTRIBUTION, "oracle")),
        ("6.8.12-4-pve", "", "", ("6.8.12", Basis.DISTRIBUTION, "proxmox")),
        ("6.6.87.2-microsoft-standard-WSL2", "", "", ("6.6.87", Basis.UNKNOWN, "")),
        ("6.18.44-vendor-v657", "", "", ("6.18.44", Basis.UNKNOWN, "")),
    ],
)
def test_a_release_is_understood(release: str, banner: str, signature: str, expected: tuple[str, Basis, str]) -> None:
    kernel = identify(release, banner, signature)
    assert kernel.version is not None
    assert (known.version_text(kernel.version), kernel.basis, kernel.vendor) == expected


def test_a_release_without_a_number_is_not_judged() -> None:
    kernel = identify("custom-build")
    assert (kernel.version, kernel.basis) == (None, Basis.UNKNOWN)
    assert known.known_bugs(kernel, has_driver=True) == []
    assert not known.is_newer_than_table(kernel)


def test_a_mainline_kernel_that_was_compiled_on_ubuntu_or_debian_is_mainline() -> None:
    for gcc in (UBUNTU_GCC, DEBIAN_GCC):
        kernel = identify("6.18.4", f"Linux version 6.18.4 {gcc} #1 SMP PREEMPT_DYNAMIC Thu Jan  8 2026")
        assert (kernel.vendor, kernel.basis, kernel.package) == ("", Basis.UPSTREAM, "")


def test_ubuntus_abi_number_is_told_apart_from_its_base() -> None:
    kernel = identify("6.17.0-1015-azure", signature="Ubuntu 6.17.0-1015.15~24.04.1-azure 6.17.13")
    assert (kernel.abi, kernel.base, kernel.package) == (1015, "6.17.0", "6.17.0-1015.15~24.04.1-azure")
    assert kernel.version == version("6.17.13")


def test_a_package_of_another_branch_is_not_believed() -> None:
    """Somebody's own 6.18 with Debian's old banner kept in its configuration."""
    kernel = identify("6.18.4-amd64", "#1 SMP Debian 6.1.192-1 (2026-10-01)")
    assert kernel.version == version("6.18.4")


def test_versions_are_ordered_as_mainline_releases_them() -> None:
    texts = ["6.17.9", "6.18-rc1", "6.18-rc2", "6.18", "6.18.1", "6.18.10", "6.19-rc1", "7.0"]
    assert sorted(texts, key=version) == texts
    assert [known.version_text(version(text)) for text in texts] == texts
    with pytest.raises(ValueError, match="no version"):
        version("six")


# --- the rows

BOUNDARIES: dict[str, list[tuple[str, Answer]]] = {
    "init-queues-oops": [("6.18.3", NO), ("6.18.4", YES), ("6.18.5", YES), ("6.18.6", NO), ("6.17.13", NO)],
    "add-dev-garbage-state": [
        ("5.19.17", NO),
        ("6.0", YES),
        ("6.1.182", YES),
        ("6.1.183", NO),
        ("6.2", YES),
        ("6.6.50", PERHAPS),
        ("6.7-rc1", YES),
        ("6.12.102", YES),
        ("6.12.103", NO),
        ("6.12.200", NO),
        ("6.13-rc1", YES),
        ("6.18.35", YES),
        ("6.18.36", PERHAPS),
        ("6.19-rc1", YES),
        ("7.0", YES),
        ("7.0.1", PERHAPS),
        ("7.1.5", YES),
        ("7.1.6", PERHAPS),
        ("7.2-rc5", YES),
        ("7.2-rc6", NO),
        ("7.2", NO),
        ("7.3.4", NO),
    ],
    "partition-scan-wedge": [
        ("6.6.99", NO),
        ("6.7-rc1", YES),
        ("6.12.107", YES),
        ("6.17.13", YES),
        ("6.18.3", YES),
        ("6.18.4", NO),
        ("6.19-rc1", PERHAPS),
        ("6.19", NO),
        ("7.0", NO),
    ],
    "stop-starting-oops": [
        ("7.0.14", NO),
        ("7.1-rc1", YES),
        ("7.2.13", YES),
        ("7.2.14", PERHAPS),
        ("7.3-rc1", YES),
        ("7.3.3", YES),
        ("7.3.4", NO),
    ],
    "stop-starting-uaf": [
        ("6.1.69", NO),
        ("6.1.70", YES),
        ("6.1.192", YES),
        ("6.2", NO),
        ("6.6", NO),
        ("6.6.1", PERHAPS),
        ("6.7-rc1", YES),
        ("7.0.14", YES),
        ("7.1-rc1", NO),
    ],
    "io-wq-lost-work": [
        ("6.17.13", NO),
        ("6.18", NO),
        ("6.18.1", PERHAPS),
        ("6.18.40", YES),
        ("6.18.41", PERHAPS),
        ("6.19", PERHAPS),
        ("7.0", YES),
        ("7.0.14", YES),
        ("7.0.15", PERHAPS),
        ("7.3.1", PERHAPS),
        ("7.3.2", NO),
    ],
    "del-dev-global-wait": [("5.19", NO), ("6.0", YES), ("6.1.192", YES), ("6.2.16", YES), ("6.3-rc1", NO)],
    "close-under-load-panic": [
        ("6.6.99", NO),
        ("6.7-rc1", PERHAPS),
        ("6.8", YES),
        ("6.8.12", YES),
        ("6.9-rc1", PERHAPS),
        ("6.15-rc5", PERHAPS),
        ("6.15-rc6", NO),
    ],
    "recovery-may-be-last": [("6.0", YES), ("6.14.9", YES), ("6.15-rc1", NO)],
    "leaked-char-device": [
        ("6.14", NO),
        ("6.14.1", PERHAPS),
        ("6.15-rc1", YES),
        ("7.3.4", YES),
        ("7.3.5", PERHAPS),
        ("8.0", PERHAPS),
    ],
    "death-noticed-by-timeout": [("6.6.99", NO), ("6.7-rc1", YES), ("6.14.9", YES), ("6.15-rc1", NO)],
    "death-noticed-by-poll": [("5.19", NO), ("6.0", YES), ("6.6.99", YES), ("6.7-rc1", NO)],
    "del-dev-says-done": [("6.2.16", NO), ("6.3-rc1", YES), ("6.4.7", YES), ("6.4.8", NO)],
    "start-wants-openers-pid": [
        ("6.16", NO),
        ("6.16.1", YES),
        ("6.17", YES),
        ("6.18.2", YES),
        ("6.18.3", PERHAPS),
        ("6.18.15", NO),
        ("6.19", PERHAPS),
        ("7.0-rc1", NO),
    ],
    "no-legacy-opcodes": [("6.12", NO)],
    "not-built-debian": [("6.1.192", NO)],
    "not-in-linux-yet": [("5.19.17", YES), ("6.0-rc1", NO)],
    "in-another-package": [("6.8", NO)],
}


def test_every_row_has_its_boundaries_tested() -> None:
    assert set(BOUNDARIES) == {bug.id for bug in known.TABLE}


@pytest.mark.parametrize(
    ("row", "text", "expected"),
    [(row, text, answer) for row, cases in BOUNDARIES.items() for text, answer in cases],
)
def test_a_row_begins_and_ends_where_the_facts_do(row: str, text: str, expected: Answer) -> None:
    assert judge(the(row), mainline(text)) is expected


def test_every_row_says_what_happens_what_to_do_and_how_it_is_known() -> None:
    for bug in known.TABLE:
        assert bug.symptom
        assert bug.remedy
        assert bug.source
        assert bug.severity > Severity.OK
        spans = [*bug.surely, *bug.perhaps]
        assert spans or bug.vendors
        for since, before in spans:
            assert version(since) < version(before), bug.id
        for since, before in bug.surely:  # what is sure is not doubted
            assert not any(version(a) < version(before) and version(since) < version(b) for a, b in bug.perhaps), bug.id


@pytest.mark.parametrize(
    ("release", "row", "expected"),
    [
        ("6.17.0-23-generic", "init-queues-oops", NO),
        ("6.17.0-24-generic", "init-queues-oops", YES),
        ("6.17.0-40-generic", "init-queues-oops", YES),
        ("6.17.0-41-generic", "init-queues-oops", NO),
        ("6.17.0-1014-azure", "init-queues-oops", PERHAPS),
        ("6.17.0-1015-azure", "init-queues-oops", YES),
        ("6.17.0-1017-aws", "init-queues-oops", YES),
        ("6.17.0-1019-azure", "init-queues-oops", PERHAPS),
        ("6.14.0-33-generic", "init-queues-oops", NO),
        ("6.17.0-40-generic", "start-wants-openers-pid", YES),
        ("6.17.0-41-generic", "start-wants-openers-pid", NO),
        ("6.8.0-32-generic", "close-under-load-panic", YES),
        ("6.8.0-1052-azure", "close-under-load-panic", YES),
        ("6.8.0-32-generic", "partition-scan-wedge", PERHAPS),
        ("6.8.0-32-generic", "no-legacy-opcodes", YES),
        ("6.1.115-126.197.amzn2023.x86_64", "no-legacy-opcodes", YES),
        ("6.17.8-300.fc43.x86_64", "no-legacy-opcodes", NO),
        ("6.12.0-55.el10.x86_64", "add-dev-garbage-state", PERHAPS),
        ("6.18.44-vendor-v657", "io-wq-lost-work", PERHAPS),
        ("6.18.4-arch1-1", "init-queues-oops", YES),
    ],
)
def test_a_distributions_kernel_is_surely_affected_only_where_its_own_builds_are_known(
    release: str, row: str, expected: Answer
) -> None:
    assert judge(the(row), identify(release)) is expected


def test_debians_package_decides_and_not_the_number_in_its_release_string() -> None:
    banner = "#1 SMP PREEMPT_DYNAMIC Debian 6.1.{}-1 (2026-10-01)"
    row = the("add-dev-garbage-state")
    assert judge(row, identify("6.1.0-49-amd64", banner.format(182))) is YES
    assert judge(row, identify("6.1.0-49-amd64", banner.format(183))) is NO
    assert judge(row, identify("6.1.0-49-amd64")) is PERHAPS


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("6.1.0-49-amd64", "not-built-debian"),
        ("6.8.0-32-generic", "in-another-package"),
        ("5.15.0-101-generic", "not-in-linux-yet"),
        ("5.14.0-503.el9.x86_64", "not-in-linux-yet"),
        ("6.12.107+deb13-amd64", None),
        ("6.18.4", None),
    ],
)
def test_why_there_is_no_driver_is_said_only_where_there_is_none(release: str, expected: str | None) -> None:
    kernel = identify(release)
    missing = [bug.id for bug, _ in known.known_bugs(kernel, has_driver=False) if bug.if_missing]
    assert missing == ([expected] if expected else [])
    assert not any(bug.if_missing for bug, _ in known.known_bugs(kernel, has_driver=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6.2", NO),
        ("6.3-rc1", YES),
        ("6.12.30", YES),
        ("6.12.31", NO),
        ("6.13", YES),
        ("6.14.9", YES),
        ("6.15-rc1", NO),
    ],
)
def test_ublks_max_limited_every_device_once(text: str, expected: Answer) -> None:
    assert known.limit_counts_all(mainline(text)) is expected


def test_a_kernel_that_came_after_the_table_is_known_to_be_newer() -> None:
    assert not known.is_newer_than_table(mainline(known.KNOWS_UP_TO))
    assert known.is_newer_than_table(mainline("7.3.5"))


def test_a_remedy_says_what_to_type_for_this_vendors_kernels() -> None:
    wedge = the("partition-scan-wedge")
    assert "apt policy linux-image-amd64" in known.remedy(wedge, identify("6.12.107+deb13-amd64"))
    assert "dnf upgrade kernel" in known.remedy(wedge, identify("6.17.8-300.fc43.x86_64"))
    assert known.remedy(wedge, identify("6.17.8")) == wedge.remedy
