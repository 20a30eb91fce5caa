"""What README tells people to install: the wheel, and the unit in it."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
EXPOSURE = 3.8  # systemd 252 says 3.7; other versions weigh a little differently
# What systemd.exec(5) has for a service that trusts itself with little.
SANDBOX = (
    *("User", "DynamicUser", "CapabilityBoundingSet", "NoNewPrivileges", "UMask", "LimitCORE", "SystemCallFilter"),
    *("PrivateDevices", "PrivateIPC", "PrivateMounts", "PrivateNetwork", "PrivateTmp", "PrivateUsers", "DevicePolicy"),
    *("ProcSubset", "ProtectClock", "ProtectControlGroups", "ProtectHome", "ProtectHostname", "ProtectKernelLogs"),
    *("ProtectKernelModules", "ProtectKernelTunables", "ProtectProc", "ProtectSystem", "RestrictAddressFamilies"),
    *("RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID", "LockPersonality", "MemoryDenyWriteExecute"),
    *("SystemCallArchitectures", "DeviceAllow", "WatchdogSec"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(target), "."],
        check=True,
        cwd=REPOSITORY,
    )
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_has_the_program_its_configuration_its_unit_and_both_licences(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    for ending in (
        "share/duende-ublkd/duende-ublkd.toml",
        "share/duende-ublkd/duende-ublkd.service",
        "licenses/LICENSE-MIT",
        "licenses/LICENSE-APACHE",
        "duende_ublkd/core/policy.py",
    ):
        assert any(name.endswith(ending) for name in names), ending
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "duende-ublkd = duende_ublkd.__main__:main" in wheel.read(entry_points).decode()
    assert not any(name.startswith("tests/") for name in names)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with a program that every machine has."""
    path = tmp_path / "duende-ublkd.service"
    text = (REPOSITORY / "deploy" / "duende-ublkd.service").read_text()
    path.write_text(text.replace("/usr/local/bin/duende-ublkd", shutil.which("true") or "/bin/true"))
    return path


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    assert program, "apt-get install systemd"
    return subprocess.run([program, *arguments], check=False, capture_output=True, text=True)


def test_systemd_has_nothing_to_say_about_the_unit(unit: Path) -> None:
    done = analyze("verify", str(unit))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_units_sandbox_is_as_tight_as_it_was(unit: Path) -> None:
    """systemd's own score: 10 is a unit without a sandbox; ours had 7.4 before it had one."""
    done = analyze("security", "--offline=true", f"--threshold={EXPOSURE * 10:.0f}", str(unit))
    score = re.search(r"Overall exposure level for \S+: (\d+\.\d+)", done.stdout)
    assert score, done.stdout + done.stderr
    assert float(score[1]) <= EXPOSURE, done.stdout
    assert done.returncode == 0, done.stderr


def test_each_setting_that_the_unit_lacks_has_its_reason_in_it() -> None:
    text = (REPOSITORY / "deploy" / "duende-ublkd.service").read_text()
    settings = dict(line.split("=", 1) for line in text.splitlines() if re.match(r"[A-Z]\w+=", line))
    reasons = " ".join(line for line in text.splitlines() if line.startswith("#"))
    for name in SANDBOX:
        assert name in settings or f"{name}=" in reasons, name
    assert settings["WatchdogSignal"] == "SIGKILL"
    assert settings["TimeoutStopSec"] == "5s"
