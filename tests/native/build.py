"""Compile the C programs beside this file for the guest: static, so that they need nothing of it."""

import hashlib
import shutil
import subprocess
from pathlib import Path

from tests.lab import kernels
from tests.lab.cache import cache_dir, locked, replacing
from tests.lab.errors import LabError

SOURCES = Path(__file__).parent
PROGRAMS = ("batch_delete", "mini_server", "wedge")
GUEST_DIRECTORY = "/usr/local/bin"
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static")


def build(name: str) -> Path:
    """The program, from the lab's cache if its sources and the way to build it are unchanged."""
    source = SOURCES / f"{name}.c"
    parts = [source.read_bytes(), (SOURCES / "uring.h").read_bytes(), " ".join(FLAGS).encode()]
    target = cache_dir() / "native" / f"{name}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}"
    headers = kernels.uapi_headers()
    with locked("native"):
        if not target.is_dir():
            with replacing(target) as workshop:
                _compile([*FLAGS, "-I", str(headers), "-o", str(workshop / name), str(source)])
    return target / name


def guest_files() -> dict[str, Path]:
    """What `extras` of the lab's guests takes: every program at its place on the guest's PATH."""
    return {f"{GUEST_DIRECTORY}/{name}": build(name) for name in PROGRAMS}


def _compile(arguments: list[str]) -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        raise LabError("gcc is missing", "sudo apt-get install gcc libc6-dev")
    done = subprocess.run([compiler, *arguments], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise LabError(f"gcc {' '.join(arguments)}:\n{done.stderr}", "a static program wants libc6-dev's libc.a")
