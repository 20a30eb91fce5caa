"""What README tells people to install: the wheel, and the unit in it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


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


def test_systemd_has_nothing_to_say_about_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    assert analyze, "apt-get install systemd"
    unit = tmp_path / "duende-ublkd.service"
    text = (REPOSITORY / "deploy" / "duende-ublkd.service").read_text()
    unit.write_text(text.replace("/usr/local/bin/duende-ublkd", shutil.which("true") or "/bin/true"))
    done = subprocess.run([analyze, "verify", str(unit)], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
