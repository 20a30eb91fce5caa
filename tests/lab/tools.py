"""Programs of Debian's that tests run and nobody has to install: Chromium, Prometheus, Alertmanager and their tools.

`path("chromium")` is a program that can be run, with `environment("chromium")` added to its own. One that is installed on
this machine is taken as it is; else its packages are fetched from this release's own suite and unpacked in the lab's cache
(Chromium: some 130 MB, a minute; the others: 20 to 40 MB each). Nothing of the machine changes, and nothing needs root.
On a machine that is no Debian and has the program not installed, LabError says what to install; `is_possible(name)` tells
beforehand, for a test that then skips.

    prometheus = subprocess.Popen([tools.path("prometheus"), f"--config.file={config}"])
    subprocess.run([tools.path("promtool"), "check", "rules", rules], check=True)
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.lab import debian
from tests.lab.cache import cache_dir, locked, replacing
from tests.lab.errors import LabError, find_tool


@dataclass(frozen=True)
class _Tool:
    """`program`: where its package has it. `installed`: what it may be called in PATH. `libraries`: it needs others'."""

    packages: tuple[str, ...]
    program: str
    installed: tuple[str, ...]
    libraries: bool = False


_CHROMIUM = ("chromium-headless-shell", "fonts-dejavu-core", "fontconfig-config")
_TOOLS = {
    "chromium": _Tool(
        _CHROMIUM, "usr/lib/chromium/chromium-headless-shell", ("chromium-headless-shell", "chromium"), True
    ),
    "prometheus": _Tool(("prometheus",), "usr/bin/prometheus", ("prometheus",)),
    "promtool": _Tool(("prometheus",), "usr/bin/promtool", ("promtool",)),
    "alertmanager": _Tool(
        ("prometheus-alertmanager",), "usr/bin/prometheus-alertmanager", ("prometheus-alertmanager", "alertmanager")
    ),
    "amtool": _Tool(("prometheus-alertmanager",), "usr/bin/amtool", ("amtool",)),
}
# The loader is the machine's own, and takes no C library but its own. Of the rest, what no program here ever loads.
_NOT_UNPACKED = ("libc6", "libc-bin", "libllvm", "libgl1-mesa-dri", "libz3-", "perl", "libperl", "dpkg", "adwaita-")

# Its own fonts and no others, so that a picture is the same everywhere.
_FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir prefix="relative">usr/share/fonts</dir><cachedir prefix="xdg">fontconfig</cachedir></fontconfig>
"""
_LIBRARY_HOMES = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/pulseaudio")


def names() -> tuple[str, ...]:
    return tuple(_TOOLS)


def is_possible(name: str) -> bool:
    """It is installed, or can be fetched here."""
    return _installed(_TOOLS[name]) is not None or debian.codename() is not None


def path(name: str) -> Path:
    """The program, fetched if need be."""
    tool = _TOOLS[name]
    return _installed(tool) or fetch(name) / tool.program


def environment(name: str) -> dict[str, str]:
    """What its environment needs beside the usual; nothing for one that is installed."""
    tool = _TOOLS[name]
    if _installed(tool) or not tool.libraries:
        return {}
    root = fetch(name)
    homes = [root / home for home in _LIBRARY_HOMES]
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(str(home) for home in homes if home.is_dir()),
        "FONTCONFIG_FILE": str(root / "fonts.conf"),
    }


def fetch(name: str, *, refresh: bool = False) -> Path:
    """The directory that its packages are unpacked in."""
    tool = _TOOLS[name]
    root = cache_dir() / "tools" / f"{tool.packages[0]}-{debian.codename()}"
    with locked(f"tool-{tool.packages[0]}"):
        if refresh or not root.is_dir():
            with _private_apt(root, name) as (apt, workshop):
                _fill(workshop, apt, tool)
    return root


@contextmanager
def _private_apt(root: Path, name: str) -> Iterator[tuple[debian.PrivateApt, Path]]:
    suite, package = debian.codename(), _TOOLS[name].packages[0]
    instead = f"or install {name} yourself, so that it is found in PATH; on Debian: sudo apt-get install {package}"
    if suite is None:
        raise LabError(f"{name} is missing, and can be fetched on Debian only", instead)
    with replacing(root) as workshop:
        yield debian.PrivateApt(suite, workshop / "apt", instead=instead), workshop
        shutil.rmtree(workshop / "apt")


def _fill(root: Path, apt: debian.PrivateApt, tool: _Tool) -> None:
    packages = list(tool.packages)
    if tool.libraries:
        packages = [each for each in apt.with_all_needs(packages) if not each.startswith(_NOT_UNPACKED)]
    debs = root / "debs"
    debs.mkdir()
    apt.download(packages, debs, tool.packages[0])
    for deb in sorted(debs.glob("*.deb")):
        debian.unpack(deb, root)
    shutil.rmtree(debs)
    (root / "fonts.conf").write_text(_FONTS)


def _installed(tool: _Tool) -> Path | None:
    found = (find_tool(name) for name in tool.installed)
    return next((Path(each) for each in found if each), None)
