"""That nobody has to install what tests run, and that what is installed is taken."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.lab import debian, tools
from tests.lab.errors import LabError, find_tool


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DUENDE_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_program_that_is_installed_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "promtool").write_text("#!/bin/sh\n")
    (tmp_path / "promtool").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert tools.path("promtool") == tmp_path / "promtool"
    assert tools.environment("promtool") == {}
    assert tools.is_possible("promtool")


def test_what_was_fetched_once_is_not_fetched_again(own_cache: Path) -> None:
    kept = own_cache / "tools" / f"prometheus-{debian.codename()}"
    kept.mkdir(parents=True)
    assert tools.fetch("promtool") == tools.fetch("prometheus") == kept


def test_a_fetch_that_fails_says_what_to_do_and_leaves_nothing(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt_get = tmp_path / "bin" / "apt-get"
    apt_get.parent.mkdir()
    apt_get.write_text(
        '#!/bin/sh\n[ "$1" != indextargets ] || exec /usr/bin/apt-get "$@"\necho "no such host" >&2\nexit 100\n'
    )
    apt_get.chmod(0o755)
    monkeypatch.setenv("PATH", str(apt_get.parent), prepend=os.pathsep)
    with pytest.raises(LabError, match="install amtool yourself"):
        tools.fetch("amtool")
    assert list(own_cache.glob("tools/*")) == []


@pytest.mark.skipif(find_tool("dpkg-deb") is None, reason="no dpkg-deb here, so nothing is fetched either")
def test_a_deb_is_unpacked_without_installing_it(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text("Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n")
    (tree / "usr/bin").mkdir(parents=True)
    (tree / "usr/bin/x").write_text("it runs")
    subprocess.run(["dpkg-deb", "--build", tree, tmp_path / "x.deb"], check=True, capture_output=True)
    debian.unpack(tmp_path / "x.deb", tmp_path / "root")
    assert (tmp_path / "root/usr/bin/x").read_text() == "it runs"
