"""Write a directory as a newc cpio archive, everything owned by root.

The kernel unpacks archives that follow one another, each over what is there.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

CONSOLE = (stat.S_IFCHR | 0o600, "dev/console", 5, 1)


def write_tree(tree: Path, out: BinaryIO) -> None:
    writer = _Writer(out)
    # The kernel opens /dev/console for init before anything can mount a devtmpfs.
    writer.add(stat.S_IFDIR | 0o755, "dev")
    mode, name, major, minor = CONSOLE
    writer.add(mode, name, device=(major, minor))
    for path in sorted(tree.rglob("*")):
        status = path.lstat()
        name = str(path.relative_to(tree))
        if stat.S_ISLNK(status.st_mode):
            writer.add(status.st_mode, name, os.fsencode(path.readlink()))
        elif stat.S_ISDIR(status.st_mode):
            writer.add(status.st_mode, name)
        else:
            writer.add(status.st_mode, name, path.read_bytes())
    writer.add(0, "TRAILER!!!")


class _Writer:
    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._inode = 0

    def add(self, mode: int, name: str, data: bytes = b"", *, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        encoded = os.fsencode(name) + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._out.write(_padded(header))
        self._out.write(_padded(data))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
