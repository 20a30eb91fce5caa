"""What the lab says when it cannot go on: what happened, and what to type next."""

import shutil

PACKAGES = {
    "apt-cache": "apt",
    "apt-get": "apt",
    "busybox": "busybox-static",
    "dpkg-deb": "dpkg",
    "ldconfig": "libc-bin",
    "ldd": "libc-bin",
    "mke2fs": "e2fsprogs",
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
    "systemctl": "systemd",
    "zstd": "zstd",
}
# A user's PATH on Debian has no sbin, and mke2fs and ldconfig live there.
SEARCH_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"


class LabError(Exception):
    """The lab cannot go on; the hint is what a person does about it."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message}\n  {hint}")


def find_tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=SEARCH_PATH)


def need_tool(name: str) -> str:
    found = find_tool(name)
    if found is None:
        package = PACKAGES.get(name, name)
        raise LabError(f"{name} is missing", f"sudo apt-get install {package}   (or your distribution's package of it)")
    return found
