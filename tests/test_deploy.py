"""What README tells people to install and to write: the wheel, the unit in it, and the configurations."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from duende_ublkd.carriers import environment
from duende_ublkd.core.alertconfig import SinkKind
from duende_ublkd.core.alerting import Alert, AlertKind, Severity
from duende_ublkd.core.config import load
from duende_ublkd.core.delivery import State
from duende_ublkd.report import webfile
from duende_ublkd.report.objects import notice_object

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"
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
        "share/duende-ublkd/prometheus/duende-ublkd.rules.yml",
        "share/duende-ublkd/prometheus/duende-ublkd.fleet.rules.yml",
        "share/duende-ublkd/prometheus/scrape.yml",
        "share/duende-ublkd/alertmanager/alertmanager.yml",
        "share/duende-ublkd/apprise/duende-ublkd-apprise",
        "share/duende-ublkd/grafana/duende-ublkd.json",
        "licenses/LICENSE-MIT",
        "licenses/LICENSE-APACHE",
        "duende_ublkd/core/policy.py",
    ):
        assert any(name.endswith(ending) for name in names), ending
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "duende-ublkd = duende_ublkd.__main__:main" in wheel.read(entry_points).decode()
    assert not any(name.startswith("tests/") for name in names)


def blocks(language: str) -> list[str]:
    """README's."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def headings() -> set[str]:
    """README's anchors."""
    found = re.findall(r"^#+ (.+)$", README.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in found}


def test_every_configuration_in_readme_is_taken() -> None:
    configurations = blocks("toml")
    assert len(configurations) >= 6
    for text in configurations:
        load(text.encode(), "README.md")
    sinks = [sink.sink for text in configurations for sink in load(text.encode(), "README.md").alerts]
    assert set(sinks) == set(SinkKind)


def test_the_web_configuration_in_readme_is_taken() -> None:
    (text,) = blocks("yaml")
    config = webfile.load(text.encode(), "README.md", lambda path, _: path.encode())
    assert config.tls
    assert (config.tls.cert, config.tls.key, config.tls.client_ca) == (b"server.crt", b"server.key", b"ca.crt")
    assert list(config.users) == ["prometheus"]


def a_notice() -> dict[str, Any]:
    alert = Alert("ublk3/7/pinned", AlertKind.PINNED, Severity.WARNING, "it is", 1.0, 3, 7)
    return notice_object(alert, State.RAISED, host="a", version="1", labels={})


def names_in_readme(beginning: str, end: str) -> set[str]:
    """What stands in backticks in one sentence, without what is in brackets after it."""
    (sentence,) = re.findall(rf"{beginning}(.*?){end}", README.read_text(), re.DOTALL)
    return set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", sentence)))


def test_readme_names_every_key_of_a_webhooks_body_and_no_other() -> None:
    assert names_in_readme("Its keys: ", r"\. With a secret") == a_notice().keys()


def test_readme_names_every_variable_of_a_sinks_command_and_no_other() -> None:
    known = names_in_readme("Its environment is ", ": the webhook's object")
    given = {name.removeprefix("DUENDE_UBLKD_ALERT_") for name in environment(a_notice())}
    assert known - {"DUENDE_UBLKD_ALERT_"} == given


def test_every_link_in_readme_leads_somewhere() -> None:
    text = README.read_text()
    anchors = headings()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 10
    for link in links:
        if link.startswith("https://"):
            continue
        if link.startswith("#"):
            assert link[1:] in anchors, link
        else:
            assert (REPOSITORY / link).exists(), link


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
