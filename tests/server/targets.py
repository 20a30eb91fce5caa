"""Where a test server keeps a device's data: nowhere, or in memory that may outlive it."""

import mmap
import os
from pathlib import Path
from typing import Protocol


class Target(Protocol):
    """Offsets and lengths in bytes; the buffers are exactly as long as the request."""

    size: int

    def read(self, offset: int, into: memoryview) -> None: ...
    def write(self, offset: int, data: memoryview) -> None: ...
    def zero(self, offset: int, length: int) -> None: ...


class NullTarget:
    """Zeroes, whatever was written."""

    def __init__(self, size: int) -> None:
        self.size = size

    def read(self, offset: int, into: memoryview) -> None:  # noqa: ARG002 - it is nothing everywhere
        into[:] = bytes(len(into))

    def write(self, offset: int, data: memoryview) -> None:
        pass

    def zero(self, offset: int, length: int) -> None:
        pass


class RamTarget:
    """Memory; with `backing` a file's memory (in tmpfs), which a second server finds as the first one left it."""

    def __init__(self, size: int, backing: Path | None = None) -> None:
        self.size = size
        if not backing:
            self._memory = mmap.mmap(-1, size)
            return
        fd = os.open(backing, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, size)
        self._memory = mmap.mmap(fd, size)
        os.close(fd)

    def read(self, offset: int, into: memoryview) -> None:
        with memoryview(self._memory) as memory:
            into[:] = memory[offset : offset + len(into)]

    def write(self, offset: int, data: memoryview) -> None:
        with memoryview(self._memory) as memory:
            memory[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        self._memory[offset : offset + length] = bytes(length)
