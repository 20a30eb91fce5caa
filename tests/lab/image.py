"""The guest's whole user land as one initramfs: no disk, no network, no file server.

Four cpio archives follow one another: the base (interpreter, packages, tools), which is cached by content; the kernel's
modules; the repository; and the one command of this boot. Python and its packages are compiled ahead with pycs that are
never checked, because an emulated CPU takes half a minute for what the host does in two seconds.
"""

import compileall
import hashlib
import importlib.metadata
import io
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from py_compile import PycInvalidationMode

from packaging.requirements import Requirement

from tests.lab import cpio
from tests.lab.cache import cache_dir, locked, replacing
from tests.lab.errors import LabError, find_tool, need_tool
from tests.lab.kernels import Kernel

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT_PARTS = ("duende_ublkd", "tests", "config", "deploy", "pyproject.toml")
HOST_ONLY_PACKAGES = {"mypy", "ruff", "import-linter"}
STDLIB_LEFT_OUT = (
    *("__pycache__", "config-*", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages"),
    *("test", "tkinter", "turtledemo", "*.a", "sitecustomize.py", "EXTERNALLY-MANAGED", "_test*.so", "_tkinter*.so"),
)
PACKAGES_LEFT_OUT = re.compile(r"(^|/)(__pycache__|tests)/")
# Where busybox has one too, its own lacks options: mke2fs makes ext2 only.
TOOLS = (
    *(
        "dmsetup",
        "losetup",
        "mke2fs",
        "mount",
        "nsenter",
        "setpriv",
        "strace",
        "swapoff",
        "swapon",
        "umount",
        "unshare",
    ),
    *("systemctl", "systemd-run"),
)
NEEDED_TOOLS = ("mke2fs", "systemctl")
# Enough of systemd to be PID 1 of a namespace and to start one service as any host would.
SYSTEMD_HOMES = (Path("/usr/lib/systemd"), Path("/lib/systemd"))
SYSTEMD_PROGRAMS = ("systemd", "systemd-executor")  # the latter since 255
SYSTEMD_UNITS = ("basic.target", "modprobe@.service", "shutdown.target", "sysinit.target")
# What is opened by name at run time, so that no binary lists it: by pyudev, and by systemd since 257.
OPENED_BY_NAME = ("libudev.so.1", "libmount.so.1", "libseccomp.so.2")
VENV = "lab/venv"
PROJECT = "/project"
UNUSED_S = 7 * 24 * 3600
INTERPRETER = f"python{sys.version_info.major}.{sys.version_info.minor}"


def build(
    kernel: Kernel,
    command: list[str],
    into: Path,
    *,
    environment: Mapping[str, str],
    extras: Mapping[str, Path] | None = None,
    interactive: bool = False,
) -> None:
    """Write the initramfs that runs `command` to the file `into`; `extras` maps paths in the guest to host files."""
    with into.open("wb") as out:
        for part in (base(), _modules(kernel)):
            with part.open("rb") as archive:
                shutil.copyfileobj(archive, out, 1 << 20)
        workshop = into.with_suffix(".tree")
        _add_project(workshop, extras or {})
        _add_command(workshop, command, environment, interactive=interactive)
        cpio.write_tree(workshop, out)
        shutil.rmtree(workshop)


def build_probe(into: Path) -> None:
    """The smallest guest that can say that it is up."""
    tree = into.with_suffix(".tree")
    _add_root_links(tree)
    _add_busybox(tree)
    _add_file(tree, "init", '#!/bin/sh\necho "LAB: guest up"\npoweroff -f\n', executable=True)
    with into.open("wb") as out:
        cpio.write_tree(tree, out)
    shutil.rmtree(tree)


def base() -> Path:
    """The archive that depends on the host's Python and packages only."""
    distributions = _guest_distributions()
    target = cache_dir() / "base" / _base_key(distributions)
    with locked("base"):
        if not target.is_dir():
            print("building the guest's base image (once)", file=sys.stderr, flush=True)
            _remove_unused(target.parent)
            with replacing(target) as workshop:
                _build_base(workshop / "tree", distributions)
                with (workshop / "base.cpio").open("wb") as out:
                    cpio.write_tree(workshop / "tree", out)
                shutil.rmtree(workshop / "tree")
        os.utime(target)
    return target / "base.cpio"


def _remove_unused(bases: Path) -> None:
    """Each change of a Python package leaves a base behind; another checkout may still use it."""
    for base_directory in bases.glob("[0-9a-f]*"):
        if time.time() - base_directory.stat().st_mtime > UNUSED_S:
            shutil.rmtree(base_directory)


def _base_key(distributions: list[importlib.metadata.Distribution]) -> str:
    parts = [Path(__file__).read_text(), sys.version, sysconfig.get_path("stdlib"), platform.platform()]
    parts += [f"{each.name}=={each.version}" for each in distributions]
    for tool in ("busybox", *TOOLS):
        found = find_tool(tool)
        parts.append(f"{found} {Path(found).stat().st_mtime_ns}" if found else f"no {tool}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _build_base(tree: Path, distributions: list[importlib.metadata.Distribution]) -> None:
    _add_root_links(tree)
    binaries = [*_add_python(tree), *_add_packages(tree, distributions)]
    for tool in TOOLS:
        found = need_tool(tool) if tool in NEEDED_TOOLS else find_tool(tool)
        if found:
            binaries.append(_copy_binary(tree, found, f"usr/bin/{tool}"))
    binaries += _add_systemd(tree)
    _link(tree, "usr/bin/mkfs.ext4", "mke2fs")
    binaries.append(_copy_binary(tree, need_tool("ldconfig"), "usr/sbin/ldconfig"))
    _add_busybox(tree)
    _add_libraries(tree, binaries)
    _strip(tree)
    _compile(tree)


def _add_root_links(tree: Path) -> None:
    for directory in ("bin", "sbin", "lib", "lib64"):
        (tree / "usr" / directory).mkdir(parents=True)
        _link(tree, directory, f"usr/{directory}")


def _add_python(tree: Path) -> list[Path]:
    """At /usr, wherever the host has it: the interpreter finds its library from where it is itself."""
    source = Path(sysconfig.get_path("stdlib"))
    library = tree / "usr" / sys.platlibdir / INTERPRETER
    shutil.copytree(source, library, ignore=shutil.ignore_patterns(*STDLIB_LEFT_OUT), symlinks=False)
    program = _copy_binary(tree, os.path.realpath(sys.executable), f"usr/bin/{INTERPRETER}")
    _link(tree, "usr/bin/python3", INTERPRETER)
    _add_file(tree, f"{VENV}/pyvenv.cfg", "home = /usr/bin\ninclude-system-site-packages = false\n")
    for name in ("python", "python3", INTERPRETER):
        _link(tree, f"{VENV}/bin/{name}", f"/usr/bin/{INTERPRETER}")
    return [program, *library.rglob("*.so")]


def _guest_distributions() -> list[importlib.metadata.Distribution]:
    """What the project needs to run and to be tested, with everything that those need."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    roots = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    open_ends = [Requirement(root) for root in roots]
    found: dict[str, importlib.metadata.Distribution] = {}
    while open_ends:
        name = open_ends.pop().name.lower()
        if name not in found and name not in HOST_ONLY_PACKAGES:
            found[name] = _installed(name)
            needs = [Requirement(need) for need in found[name].requires or ()]
            open_ends += [need for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    return sorted(found.values(), key=lambda each: each.name)


def _installed(name: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        hint = "use the project's own environment, which `make test` builds: .venv/bin/python -m tests.lab ..."
        raise LabError(f"{sys.executable} has no {name} to put into the guest", hint) from error


def _add_packages(tree: Path, distributions: Iterable[importlib.metadata.Distribution]) -> list[Path]:
    site = tree / VENV / "lib" / INTERPRETER / "site-packages"
    binaries = []
    for file in (file for each in distributions for file in each.files or ()):
        source = Path(str(file.locate())).resolve()
        if ".." in file.parts:
            if file.parent.name == "bin":
                _add_script(tree, source)
        elif not PACKAGES_LEFT_OUT.search(str(file)) and source.is_file():
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            if ".so" in target.suffixes:
                binaries.append(target)
    _add_file(tree, str(site.relative_to(tree) / "project.pth"), f"{PROJECT}\n")
    return binaries


def _add_script(tree: Path, source: Path) -> None:
    _, _, body = source.read_text().partition("\n")
    _add_file(tree, f"{VENV}/bin/{source.name}", f"#!/{VENV}/bin/python\n{body}", executable=True)


def _add_busybox(tree: Path) -> None:
    busybox = need_tool("busybox")
    _add_libraries(tree, [_copy_binary(tree, busybox, "usr/bin/busybox")])
    applets = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout.split()
    for applet in applets:
        if not (tree / "usr/bin" / applet).exists():
            _link(tree, f"usr/bin/{applet}", "busybox")
    # The kernel itself calls this path when it wants a module.
    _link(tree, "usr/sbin/modprobe", "../bin/busybox")


def _add_systemd(tree: Path) -> list[Path]:
    home = next((home for home in SYSTEMD_HOMES if (home / "systemd").is_file()), None)
    if home is None:
        raise LabError("systemd is missing", "sudo apt-get install systemd   (or your distribution's package of it)")
    for unit in SYSTEMD_UNITS:
        _add_file(tree, f"usr/lib/systemd/system/{unit}", (home / "system" / unit).read_text())
    programs = (name for name in SYSTEMD_PROGRAMS if (home / name).is_file())
    return [_copy_binary(tree, str(home / name), f"usr/lib/systemd/{name}") for name in programs]


def _add_libraries(tree: Path, binaries: Iterable[Path]) -> None:
    """Every shared library stays at its path on the host, so that RPATHs and the loader's own name hold."""
    listing = subprocess.run([need_tool("ldd"), *binaries], check=False, capture_output=True, text=True).stdout
    found = set(re.findall(r"(?:=> |^\t)(/\S+) \(0x", listing, re.MULTILINE)) | _opened_by_name()
    # /lib is a link to /usr/lib in the guest, whatever it is here. A Python of somebody's own has its library in a home
    # directory, which the daemon's unit cannot see; the loader finds it in a place of the system's, too.
    wanted = {
        re.sub(r"^/(?:root|home)/.*/", "/usr/local/lib/", re.sub(r"^/lib(64|)/", r"/usr/lib\1/", library)): library
        for library in sorted(found)
    }
    for path, library in wanted.items():
        if not (tree / path[1:]).exists() and not Path(path).is_relative_to(tree):
            _copy_binary(tree, library, path[1:])
    _add_file(tree, "etc/ld.so.conf", "".join(f"{each}\n" for each in sorted({Path(path).parent for path in wanted})))


def _opened_by_name() -> set[str]:
    """ldconfig knows where the host keeps them."""
    cache = subprocess.run([need_tool("ldconfig"), "-p"], check=True, capture_output=True, text=True).stdout
    names = "|".join(map(re.escape, OPENED_BY_NAME))
    found = re.findall(rf"({names}) .*x86-64.* => (\S+)", cache)
    return set(dict(reversed(found)).values())


def _strip(tree: Path) -> None:
    """A Python built from source carries 30 MB of debug information, which every boot would unpack."""
    strip = find_tool("strip")
    libraries = [path for path in tree.rglob("*.so*") if path.is_file() and not path.is_symlink()]
    if strip:
        subprocess.run([strip, "--strip-debug", *libraries], check=False, stderr=subprocess.DEVNULL)


def _compile(tree: Path) -> None:
    compileall.compile_dir(
        tree,
        quiet=2,
        workers=0,
        stripdir=str(tree),
        prependdir="/",
        invalidation_mode=PycInvalidationMode.UNCHECKED_HASH,
    )


def _modules(kernel: Kernel) -> Path:
    content = b"".join(path.read_bytes() for path in sorted(kernel.modules_dir.iterdir()))
    target = cache_dir() / "modules" / f"{kernel.version}-{hashlib.sha256(content).hexdigest()[:16]}"
    with locked("modules"):
        if not target.is_dir():
            with replacing(target) as workshop:
                shutil.copytree(kernel.modules_dir, workshop / "tree/usr/lib/modules" / kernel.version)
                with (workshop / "modules.cpio").open("wb") as out:
                    cpio.write_tree(workshop / "tree", out)
                shutil.rmtree(workshop / "tree")
    return target / "modules.cpio"


def _add_project(tree: Path, extras: Mapping[str, Path]) -> None:
    project = tree / PROJECT[1:]
    project.mkdir(parents=True)
    for part in PROJECT_PARTS:
        source = REPOSITORY / part
        if source.is_dir():
            shutil.copytree(source, project / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy(source, project / part)
    _compile(tree)
    _add_file(tree, "init", (Path(__file__).parent / "guest_init").read_text(), executable=True)
    entry = "import sys\n\nfrom duende_ublkd.__main__ import main\n\nsys.exit(main())\n"
    _add_file(tree, f"{VENV}/bin/duende-ublkd", f"#!/{VENV}/bin/python\n{entry}", executable=True)
    for path, source in extras.items():
        target = tree / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def _add_command(tree: Path, command: list[str], environment: Mapping[str, str], *, interactive: bool) -> None:
    script = io.StringIO()
    for name, value in environment.items():
        script.write(f"export {name}={shlex.quote(value)}\n")
    script.write(f"cd {PROJECT}\nexec {shlex.join(command)}\n")
    _add_file(tree, "lab/command", script.getvalue(), executable=True)
    if interactive:
        _add_file(tree, "lab/interactive", "")


def _copy_binary(tree: Path, source: str, path: str) -> Path:
    target = tree / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    shutil.copy(source, target)
    return target


def _add_file(tree: Path, path: str, content: str, *, executable: bool = False) -> None:
    target = tree / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(content)
    target.chmod(0o755 if executable else 0o644)


def _link(tree: Path, path: str, target: str) -> None:
    link = tree / path
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)
