"""Debian's packages, fetched and unpacked without installing them: apt on one suite, with state of its own.

The machine's own apt is asked for the mirror and never touched: a private sources list and a private state directory
reach any suite. Nothing here needs root.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.lab.errors import LabError, need_tool

KEYRINGS = tuple(Path("/usr/share/keyrings", f"debian-archive-keyring.{suffix}") for suffix in ("gpg", "pgp"))


class PrivateApt:
    """apt on one suite of the machine's own mirror. `instead`: what a person can do where that is impossible."""

    def __init__(self, suite: str, state: Path, *, instead: str) -> None:
        for tool in ("apt-get", "apt-cache", "dpkg-deb"):
            try:
                need_tool(tool)
            except LabError as error:
                raise LabError("this host has no apt to fetch packages with", instead) from error
        self.suite = suite
        self._instead = instead
        (state / "lists/partial").mkdir(parents=True)
        (state / "cache/archives/partial").mkdir(parents=True)
        sources = state / "sources.list"
        sources.write_text(f"deb [arch=amd64 signed-by={_keyring(instead)}] {_mirror(instead)} {suite} main\n")
        # What is installed on this machine must not count: it may be of another suite or version.
        (state / "status").touch()
        self._options = [
            f"-oDir::Etc::SourceList={sources}",
            "-oDir::Etc::SourceParts=/dev/null",
            f"-oDir::State::Lists={state}/lists",
            f"-oDir::State::status={state}/status",
            f"-oDir::Cache={state}/cache",
            # apt as root drops to a user who cannot see into root's cache directory.
            "-oAPT::Sandbox::User=root",
            "-oAcquire::Languages=none",
        ]
        self._run("apt-get", "update", f"the package list of {suite}")

    def depends(self, packages: list[str]) -> str:
        """What `apt-cache depends` says of them."""
        return self._run("apt-cache", "depends", "", "--important", *packages)

    def names(self, prefix: str) -> list[str]:
        """The suite's packages that begin so."""
        return self._run("apt-cache", "pkgnames", "", prefix).split()

    def with_all_needs(self, packages: list[str]) -> list[str]:
        """These and all that they need on a machine where nothing is installed, whatever is installed on this one."""
        listing = self._run("apt-get", "install", "", "--no-install-recommends", "--print-uris", "-qq", *packages)
        return sorted(set(re.findall(r"^'.*' ([^_\s]+)_", listing, re.MULTILINE)))

    def download(self, packages: list[str], into: Path, title: str) -> None:
        listing = self._run("apt-get", "download", "", "--print-uris", *packages)
        sizes = re.findall(r"^'.*' \S+ (\d+)", listing, re.MULTILINE)
        megabytes = sum(map(int, sizes)) / 1e6
        self._run("apt-get", "download", f"{title} ({megabytes:.0f} MB)", *packages, cwd=into)

    def _run(self, tool: str, verb: str, title: str, *arguments: str, cwd: Path | None = None) -> str:
        """With a title apt may show its progress to a person; without one its output is wanted."""
        command = [tool, verb, *self._options, *arguments]
        show = bool(title) and sys.stderr.isatty()
        if title:
            print(f"fetching {title}", file=sys.stderr, flush=True)
        done = subprocess.run(
            command if show or not title else [*command, "-qq"],
            cwd=cwd,
            check=False,
            text=True,
            stdout=sys.stderr if show else subprocess.PIPE,
            stderr=None if show else subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C"},
        )
        if done.returncode != 0:
            said = f":\n{done.stderr.strip()}" if done.stderr else ""
            hint = f"check this machine's network, proxy and apt configuration; {self._instead}"
            raise LabError(f"{tool} {verb} failed on {self.suite}{said}", hint)
        return done.stdout or ""


def unpack(deb: Path, root: Path) -> None:
    subprocess.run(["dpkg-deb", "-x", deb, root], check=True)


def codename() -> str | None:
    """Of the Debian release that this is; None: it is none."""
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if re.match(r"\w+=", line)
    )
    if release.get("ID", "").strip('"') != "debian":
        return None
    return release.get("VERSION_CODENAME", "").strip('"')


def _keyring(instead: str) -> Path:
    for keyring in KEYRINGS:
        if keyring.is_file():
            return keyring
    raise LabError("Debian's archive keyring is missing", f"sudo apt-get install debian-archive-keyring; {instead}")


def _mirror(instead: str) -> str:
    own = codename()
    if own is None:
        raise LabError("only Debian's own mirrors have the lab's packages, and this is not Debian", instead)
    # Without package lists (a fresh container) apt knows what its sources say, and only if told to look no further.
    for further in ([], ["--no-release-info"]):
        command = ["apt-get", "indextargets", *further, "--format", "$(REPO_URI) $(CODENAME) $(RELEASE)"]
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for line in listed.splitlines():
            uri, *suites = line.split()
            if own in suites and not uri.startswith("cdrom:"):
                return uri
    raise LabError(
        f"apt on this machine names no mirror of {own}", "check /etc/apt/sources.list*, then: sudo apt-get update"
    )
