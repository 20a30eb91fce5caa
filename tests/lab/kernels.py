"""Kernels that have ublk_drv, for the guest: fetched from Debian, or the host's own.

Nothing here needs root. What was fetched stays in the cache until `refresh`.

Debian's image packages carry no modules.dep (their postinst runs depmod), so dependencies are read from the modules.
"""

import gzip
import json
import lzma
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.lab.cache import cache_dir, locked, replacing
from tests.lab.debian import PrivateApt, unpack
from tests.lab.errors import LabError, need_tool


@dataclass(frozen=True)
class _Source:
    """Where a kernel comes from: what the suite's metapackage asks for, or the newest of one series that it still has."""

    suite: str
    series: str = ""


SOURCES = {
    "6.12": _Source("trixie"),
    "newest": _Source("trixie-backports"),
    # The series between the two that is maintained for longest. trixie-backports keeps the packages of its former kernels.
    "6.18": _Source("trixie-backports", "6.18"),
}
EVERY_TIME = ("6.12", "newest")
REQUIRED_MODULES = ("ublk_drv",)
# In loading order; dependencies come in by themselves, but ext4 asks for crc32c by a crypto name that no module has.
WANTED_MODULES = ("crc32c_generic", "ext4", "loop", "dm_mod", "md_mod", "raid1")
OWN_KERNEL_HINT = (
    "or use a kernel of your own that has ublk_drv: DUENDE_LAB_KERNEL=/boot/vmlinuz-VERSION "
    "DUENDE_LAB_MODULES=/lib/modules/VERSION"
)


@dataclass(frozen=True)
class Kernel:
    """A bootable kernel, and a directory of plain .ko files with a modules.dep and a loading order."""

    name: str
    version: str
    vmlinuz: Path
    modules_dir: Path


def names() -> tuple[str, ...]:
    """The matrix: two kernels, or with DUENDE_LAB_MATRIX=all (`make test-all`) every one."""
    if os.environ.get("DUENDE_LAB_KERNEL"):
        return ("host",)
    matrix = os.environ.get("DUENDE_LAB_MATRIX", "")
    if matrix not in ("", "all"):
        raise LabError(f"DUENDE_LAB_MATRIX={matrix} is not known", "leave it out for two kernels, or set it to: all")
    return tuple(SOURCES) if matrix else EVERY_TIME


def fetch(name: str, *, refresh: bool = False) -> Kernel:
    with locked("kernels"):
        if name == "host":
            return _host_kernel()
        if name not in SOURCES:
            raise LabError(f"no kernel is called {name!r}", f"known: {', '.join(SOURCES)}")
        home = cache_dir() / "kernels" / name
        if refresh or not (home / "debs").is_dir():
            _download(name, home / "debs")
        return _unpacked(name, home)


def one_module(kernel: Kernel, name: str) -> Path:
    """A module that needs no other, as a plain .ko: for the guest that wants it, and not a part of every boot."""
    target = cache_dir() / "kernels" / "more" / f"{kernel.version}-{name}"
    with locked("kernels"):
        if not target.is_dir():
            with replacing(target) as workshop:
                (workshop / f"{name}.ko").write_bytes(_decompressed(_module_of(kernel, name, workshop / "root")))
                shutil.rmtree(workshop / "root", ignore_errors=True)
    return target / f"{name}.ko"


def _module_of(kernel: Kernel, name: str, workshop: Path) -> Path:
    if kernel.name == "host":
        tree = Path(os.environ.get("DUENDE_LAB_MODULES") or f"/lib/modules/{kernel.version}")
    else:
        tree = workshop
        for deb in sorted((cache_dir() / "kernels" / kernel.name / "debs").glob("*.deb")):
            unpack(deb, workshop)
    found = next((path for path in tree.rglob("*.ko*") if _module_name(path) == name), None)
    if found is None:
        raise LabError(f"the modules of {kernel.version} have no {name}", OWN_KERNEL_HINT)
    return found


def uapi_headers(*, refresh: bool = False) -> Path:
    """The include directory of the newest kernel's linux-libc-dev: the oracle for our own ABI definitions.

    Who brings a kernel of their own may bring its headers too, if they know the commands by ioctl.
    """
    own = Path("/usr/include/linux/ublk_cmd.h")
    if names() == ("host",) and own.is_file() and "UBLK_U_CMD_DEL_DEV_ASYNC" in own.read_text():
        return own.parents[1]
    with locked("kernels"):
        include = cache_dir() / "kernels" / "uapi" / "include"
        if refresh or not include.is_dir():
            with replacing(include) as workshop:
                apt = PrivateApt(SOURCES["newest"].suite, workshop / "apt", instead=OWN_KERNEL_HINT)
                apt.download(["linux-libc-dev"], workshop, "headers")
                for deb in workshop.glob("*.deb"):
                    unpack(deb, workshop / "root")
                    deb.unlink()
                headers = workshop / "root/usr/include"
                for part in ("linux", "asm-generic"):
                    (headers / part).rename(workshop / part)
                shutil.copytree(next(headers.glob("x86_64-linux-gnu/asm")), workshop / "asm")
                shutil.rmtree(workshop / "root")
                shutil.rmtree(workshop / "apt")
        return include


def _download(name: str, debs: Path) -> None:
    with replacing(debs) as workshop:
        source = SOURCES[name]
        apt = PrivateApt(source.suite, workshop / "apt", instead=OWN_KERNEL_HINT)
        apt.download(_image_packages(apt, source.series), workshop, f"kernel {name}")
        shutil.rmtree(workshop / "apt")


def _unpacked(name: str, home: Path) -> Kernel:
    image = home / "image"
    record = image / "kernel.json"
    modules = [*REQUIRED_MODULES, *WANTED_MODULES]
    wanted = {"modules": modules, "debs": sorted(deb.name for deb in (home / "debs").glob("*.deb"))}
    if not record.is_file() or json.loads(record.read_text()) != wanted:
        with replacing(image) as workshop:
            root = workshop / "root"
            for deb in sorted((home / "debs").glob("*.deb")):
                unpack(deb, root)
            vmlinuz = next(path for path in root.rglob("vmlinuz*") if path.is_file())
            shutil.copyfile(vmlinuz, workshop / "vmlinuz")
            _collect_modules(next(root.glob("usr/lib/modules/*")), workshop / "modules")
            shutil.rmtree(root)
            (workshop / "kernel.json").write_text(json.dumps(wanted))
    return Kernel(name, release_of(image / "vmlinuz"), image / "vmlinuz", image / "modules")


def _host_kernel() -> Kernel:
    vmlinuz = Path(os.environ["DUENDE_LAB_KERNEL"])
    version = release_of(vmlinuz)
    source = Path(os.environ.get("DUENDE_LAB_MODULES") or f"/lib/modules/{version}")
    collected = cache_dir() / "kernels" / f"host-{version}"
    with replacing(collected) as workshop:
        _collect_modules(source, workshop)
    return Kernel("host", version, vmlinuz, collected)


def release_of(vmlinuz: Path) -> str:
    """What `uname -r` will say: the boot protocol keeps the offset of the string at 0x20e, less the boot sector."""
    try:
        with vmlinuz.open("rb") as image:
            head = image.read(0x10000)
    except OSError as error:
        raise LabError(f"cannot read the kernel {vmlinuz}: {error.strerror}", "check DUENDE_LAB_KERNEL") from error
    if head[0x202:0x206] != b"HdrS":
        raise LabError(f"{vmlinuz} is not an x86 kernel image", "give the vmlinuz, not an uncompressed vmlinux")
    (offset,) = struct.unpack_from("<H", head, 0x20E)
    return head[offset + 0x200 :].split(b"\0", 1)[0].split(b" ", 1)[0].decode()


def _image_packages(apt: PrivateApt, series: str) -> list[str]:
    """From the metapackage, or the newest image of a series, to what has files: one image, or since 6.19 a binary and its
    modules.
    """
    found: set[str] = set()
    open_ends = {_newest_of(apt, series) if series else "linux-image-amd64"}
    while open_ends:
        found |= open_ends
        depends = re.findall(r"Depends: (linux-(?:image|binary|modules)-\S+)", apt.depends(sorted(open_ends)))
        open_ends = set(depends) - found
    real = [package for package in sorted(found) if re.search(r"-\d", package)]
    if any(package.startswith("linux-binary-") for package in real):
        real = [package for package in real if not package.startswith("linux-image-")]
    if not real:
        raise LabError(f"{apt.suite} has no linux-image-amd64 on this machine's mirror", OWN_KERNEL_HINT)
    return real


def _newest_of(apt: PrivateApt, series: str) -> str:
    newest = newest_image(apt.names(f"linux-image-{series}."), series)
    if newest is None:
        raise LabError(f"{apt.suite} has no kernel of {series} any more", OWN_KERNEL_HINT)
    return newest


def newest_image(packages: Iterable[str], series: str) -> str | None:
    """Of a series such as 6.18, the plain image with the highest version."""
    plain = re.compile(rf"linux-image-{re.escape(series)}\.[\d.]+\+\w+-amd64")
    images = (name for name in packages if plain.fullmatch(name))
    return max(images, key=lambda name: [int(number) for number in re.findall(r"\d+", name)], default=None)


def _collect_modules(tree: Path, into: Path) -> None:
    """Copy the wanted modules and all that they need, as plain .ko, and write down the order of loading."""
    available = {_module_name(path): path for path in sorted(tree.rglob("*.ko*"))}
    built_in_list = tree / "modules.builtin"
    built_in = built_in_list.read_text().split() if built_in_list.is_file() else []
    for module in REQUIRED_MODULES:
        if module not in available and not any(module in line.replace("-", "_") for line in built_in):
            raise LabError(f"the kernel modules in {tree} have no {module}", "on Ubuntu: linux-modules-extra-VERSION")
    into.mkdir(exist_ok=True)
    needs: dict[str, list[str]] = {}
    for module in (*REQUIRED_MODULES, *WANTED_MODULES):
        _add_module(module, available, needs, into)
    lines = (f"{name}.ko: {' '.join(f'{need}.ko' for need in _all_needs(name, needs))}\n" for name in needs)
    (into / "modules.dep").write_text("".join(lines))
    (into / "load-order").write_text("".join(f"{name}\n" for name in needs))


def _add_module(name: str, available: dict[str, Path], needs: dict[str, list[str]], into: Path) -> None:
    if name in needs or name not in available:
        return
    content = _decompressed(available[name])
    listed = re.search(rb"\0depends=([\w,-]*)\0", content)
    depends = [need.replace("-", "_") for need in listed[1].decode().split(",") if need] if listed else []
    for need in depends:
        _add_module(need, available, needs, into)
    (into / f"{name}.ko").write_bytes(content)
    needs[name] = [need for need in depends if need in needs]


def _all_needs(name: str, needs: dict[str, list[str]]) -> Iterable[str]:
    """As modules.dep wants it: what must be loaded first comes last."""
    found: dict[str, None] = {}
    for need in needs[name]:
        found[need] = None
        found.update(dict.fromkeys(_all_needs(need, needs)))
    return found


def _module_name(path: Path) -> str:
    return path.name.split(".ko", 1)[0].replace("-", "_")


def _decompressed(path: Path) -> bytes:
    match path.suffix:
        case ".xz":
            return lzma.decompress(path.read_bytes())
        case ".gz":
            return gzip.decompress(path.read_bytes())
        case ".zst":
            return subprocess.run([need_tool("zstd"), "-dc", path], check=True, capture_output=True).stdout
        case _:
            return path.read_bytes()
