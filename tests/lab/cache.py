"""The lab's cache, outside the repository: kernels, the guest's base image, what is known of this host's KVM.

Everything in it is built in a temporary directory and moved into place, so that what is there is whole.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(os.environ.get("DUENDE_LAB_CACHE") or user / "duende-ublkd")
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One builder of a thing at a time; who waited finds it built."""
    with (cache_dir() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """An empty directory that becomes `target` if the block ends well, and vanishes if it does not.

    Call it under the lock of what is built: leftovers of a killed builder are removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(leftover)
    workshop = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    workshop.chmod(0o755)
    try:
        yield workshop
        if target.exists():
            shutil.rmtree(target)
        workshop.rename(target)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
