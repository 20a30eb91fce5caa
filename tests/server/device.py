"""The data plane of one device: its char node, its queues, and one task for each tag.

A tag's life: FETCH_REQ waits for a request; the request's descriptor lies in the memory that the kernel shares, its
data (of a WRITE) already in the tag's buffer; COMMIT_AND_FETCH_REQ answers it, which makes the kernel take the data (of
a READ) from the buffer, and waits for the next. UBLK_IO_RES_ABORT instead of a request is the end.
"""

import asyncio
import ctypes
import errno
import logging
import mmap
import os
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from duende_ublkd.core.model import DevInfo
from duende_ublkd.kernel import abi
from duende_ublkd.kernel.abi import IoCommand
from duende_ublkd.kernel.ring import Ring
from tests.server.targets import Target

log = logging.getLogger("tests.server")

SECTOR = 512
MAX_QUEUE_DEPTH = 4096  # UBLK_MAX_QUEUE_DEPTH: queues lie that many descriptors apart, however deep they are
RES_OK = 0
RES_ABORT = -errno.ENODEV
OPERATIONS = {0: "READ", 1: "WRITE", 2: "FLUSH", 3: "DISCARD", 5: "WRITE_ZEROES"}


@dataclass(frozen=True, slots=True)
class Request:
    """struct ublksrv_io_desc, in bytes."""

    operation: str
    offset: int
    length: int


class Gate(Protocol):
    """What a request passes: `received` before it is performed, `performed` before it is answered."""

    async def received(self) -> None: ...
    async def performed(self) -> None: ...


class Device:
    """One /dev/ublkcN. `served` counts the answered requests by operation."""

    def __init__(self, info: DevInfo, target: Target) -> None:
        self.info = info
        self.target = target
        self.served: Counter[str] = Counter()
        self._fd = -1
        self._tags: list[asyncio.Task[None]] = []
        self._queues: list[_Queue] = []

    @property
    def dev_id(self) -> int:
        return self.info.dev_id

    @property
    def tags(self) -> int:
        return self.info.queues * self.info.queue_depth

    def open(self) -> None:
        self._fd = os.open(abi.CHAR_DEVICE.format(self.dev_id), os.O_RDWR | os.O_CLOEXEC)

    def fetch(self, ring: Ring, gate: Gate) -> None:
        """Start every tag."""
        for number in range(self.info.queues):
            queue = _Queue(self, number, self._fd, ring)
            self._queues.append(queue)
            for tag in range(self.info.queue_depth):
                self._tags.append(asyncio.create_task(queue.serve(tag, gate)))

    async def ended(self) -> None:
        """Until the kernel has taken back every tag: the device was stopped or quiesced."""
        await asyncio.gather(*self._tags)

    def close(self) -> None:
        """Let go of the char device, so that the id can become free."""
        for queue in self._queues:
            queue.close()
        os.close(self._fd)
        self._fd = -1


class _Queue:
    def __init__(self, device: Device, number: int, fd: int, ring: Ring) -> None:
        self._device = device
        self._number = number
        self._fd = fd
        self._ring = ring
        depth = device.info.queue_depth
        self._buffer_size = device.info.max_io_bytes
        self._buffers = mmap.mmap(-1, depth * self._buffer_size)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffers))
        self._descriptors = mmap.mmap(
            fd,
            _whole_pages(depth * abi.IO_DESC.size),
            mmap.MAP_SHARED,
            mmap.PROT_READ,
            offset=number * _whole_pages(MAX_QUEUE_DEPTH * abi.IO_DESC.size),
        )

    async def serve(self, tag: int, gate: Gate) -> None:
        answer = await self._command(IoCommand.FETCH_REQ, tag, 0)
        while answer == RES_OK:
            request = self._request(tag)
            log.debug("ublk%d q%d t%d %s", self._device.dev_id, self._number, tag, request)
            await gate.received()
            result = self._perform(request, tag)
            await gate.performed()
            self._device.served[request.operation] += 1
            answer = await self._command(IoCommand.COMMIT_AND_FETCH_REQ, tag, result)
        if answer != RES_ABORT:
            raise OSError(-answer, f"ublk{self._device.dev_id} queue {self._number} tag {tag}: {os.strerror(-answer)}")

    def close(self) -> None:
        self._descriptors.close()

    async def _command(self, command: IoCommand, tag: int, result: int) -> int:
        completion = await self._ring.command(
            command.name,
            self._fd,
            command.encoded,
            abi.IO_CMD.pack(self._number, tag, result, self._address + tag * self._buffer_size),
            deadline=None,
            keep=self._buffers,
            dev_id=self._device.dev_id,
        )
        return completion.result

    def _request(self, tag: int) -> Request:
        flags, sectors, start, _ = abi.IO_DESC.unpack_from(self._descriptors, tag * abi.IO_DESC.size)
        return Request(OPERATIONS.get(flags & 0xFF, f"OP_{flags & 0xFF}"), start * SECTOR, sectors * SECTOR)

    def _perform(self, request: Request, tag: int) -> int:
        """What to answer: the bytes moved, or a negative errno."""
        place = tag * self._buffer_size
        target = self._device.target
        with memoryview(self._buffers) as buffers, buffers[place : place + request.length] as data:
            match request.operation:
                case "READ":
                    target.read(request.offset, data)
                case "WRITE":
                    target.write(request.offset, data)
                case "DISCARD" | "WRITE_ZEROES":
                    target.zero(request.offset, request.length)
                case "FLUSH":
                    return 0
                case _:
                    return -errno.EOPNOTSUPP
        return request.length


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
