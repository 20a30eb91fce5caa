"""Hints that something changed: uevents and inotify. The only file that imports pyudev and inotify_simple.

A hint says "look now, at this id, or at all", and nothing else. Facts:
- Uevents come from the kernel's own netlink group, so that no udevd is needed. They may be lost (ENOBUFS): then a full look.
- A server's death sends a block `remove` before the kernel's state has settled, and on a recoverable device (QUIESCED,
  FAIL_IO) nothing at all. There inotify helps: IN_CLOSE_WRITE at the last close of /dev/ublkcN, IN_OPEN when a new server
  takes it. Neither keeps a device from being deleted.
- Events of one id come in order: `add` of the char device, `add` and `remove` of the disk, `remove` of the char device, and
  only then can the id be added again. So a disk's event after the char device's last one is of the present instance. That
  is the one thing that a look at the kernel cannot tell afterwards: whether a DEAD device was ever started.
- libudev reads from a socket that anybody could send to, and drops what does not come from the kernel. What the kernel
  says is taken by its form all the same: another name than ublk's is nobody's, another action is `other`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import socket
from typing import TYPE_CHECKING, Protocol

import pyudev
from inotify_simple import INotify, flags, parse_events

from duende_ublkd.core.errors import DuendeError

if TYPE_CHECKING:
    from collections.abc import Mapping

RECEIVE_BUFFER = 8 << 20  # bytes; some 8,000 events. Grown as far as rmem_max where CAP_NET_ADMIN is missing
_READ_AT_ONCE = 16 << 10  # bytes: a thousand events; whoever makes more of them waits for his turn
_WATCHED = flags.OPEN | flags.CLOSE_WRITE | flags.CLOSE_NOWRITE | flags.ATTRIB
_ACTIONS = frozenset({"add", "remove", "change", "move", "online", "offline", "bind", "unbind"})
_NAME = re.compile(r"ublk[bc]([0-9]{1,7})(?:p[0-9]+)?")


class Listener(Protocol):
    """Who wants the hints."""

    def on_uevent(self, subsystem: str, action: str, dev_id: int) -> None:
        """Something about this id."""

    def on_driver(self, action: str) -> None:
        """The control device came (`add`) or went (`remove`)."""

    def on_overflow(self) -> None:
        """Events were lost."""

    def on_node(self, dev_id: int, *, opened: bool) -> None:
        """A device's char node was opened, or else closed or removed."""


class Uevents:
    """Uevents of ublk's devices, from the kernel's netlink group, in the running event loop."""

    def __init__(self, listener: Listener, *, buffer: int = RECEIVE_BUFFER) -> None:
        """`buffer`: bytes that events may wait in."""
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        try:
            self._monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
            for subsystem in ("ublk-char", "block", "misc"):
                self._monitor.filter_by(subsystem)
            self._monitor.start()
        except (ImportError, OSError) as error:
            raise DuendeError(f"no uevents: {error}", hint="apt-get install libudev1") from error
        with contextlib.suppress(PermissionError):  # without CAP_NET_ADMIN it stays as it is, and overflows earlier
            self._monitor.set_receive_buffer_size(buffer)
        self._socket = socket.socket(fileno=os.dup(self._monitor.fileno()))
        self._had_disk: set[int] = set()
        self._loop.add_reader(self._monitor.fileno(), self._on_readable)

    def close(self) -> None:
        """Stop listening."""
        self._loop.remove_reader(self._monitor.fileno())
        self._socket.close()

    def saw_disk(self, dev_id: int) -> bool:
        """Whether the instance that has this id had a disk, and so was started. False: no, or nobody can tell.

        True of whatever instance was there both before and after this call, since what the kernel has sent is read first.
        """
        self._on_readable()
        return dev_id in self._had_disk

    def _on_readable(self) -> None:
        """Read all that has come. Netlink tells of a loss before the messages that are older than it, and goes on losing
        until its queue is empty: so they are thrown away. To read thousands would hold up the loop for seconds, and whoever
        hears of the loss looks at all.
        """
        lost = self._take_error()
        while True:
            if lost:
                self._discard()
            try:
                device = self._monitor.poll(timeout=0)
            except OSError:  # pyudev reads nothing while the socket has an error to tell, and tells no errno
                lost = True
                if not self._take_error():
                    break
                continue
            if device is None:
                break
            self._tell(device)
        if lost:
            self._had_disk.clear()
            self._listener.on_overflow()

    def _discard(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    self._socket.recv(1, socket.MSG_DONTWAIT | socket.MSG_TRUNC)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise

    def _take_error(self) -> bool:
        """Whether the socket has an error to tell (ENOBUFS: events were lost); it is told once."""
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0

    def _tell(self, device: pyudev.Device) -> None:
        subsystem, action, name = (_word(device, of) for of in ("subsystem", "action", "sys_name"))
        action = action if action in _ACTIONS else "other"
        if subsystem == "misc":
            if name == "ublk-control":
                self._listener.on_driver(action)
        elif subsystem in ("block", "ublk-char") and (match := _NAME.fullmatch(name)):
            dev_id = int(match[1])
            if subsystem == "block":
                self._had_disk.add(dev_id)
            else:
                self._had_disk.discard(dev_id)
            self._listener.on_uevent(subsystem, action, dev_id)


def _word(device: pyudev.Device, name: str) -> str:
    """What a message says; empty: nothing, or no UTF-8, which pyudev fails at."""
    try:
        return str(getattr(device, name) or "")
    except (UnicodeError, AttributeError, TypeError):
        return ""


class NodeWatch:
    """inotify on the char nodes of the devices that are there now."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._inotify = INotify(nonblocking=True)
        self._watches: dict[int, tuple[int, int]] = {}  # id -> (watch, identity's inode)
        self._ids: dict[int, int] = {}  # watch -> id
        self._loop.add_reader(self._inotify.fileno(), self._on_readable)
        self.lost = 0

    def keep(self, present: Mapping[int, tuple[str, int]]) -> None:
        """Watch exactly these: id -> (path of the node, its device's sysfs inode)."""
        for dev_id in self._watches.keys() - present.keys():
            self._drop(dev_id)
        for dev_id, (path, inode) in present.items():
            if dev_id in self._watches and self._watches[dev_id][1] != inode:
                self._drop(dev_id)
            if dev_id not in self._watches:
                self._add(dev_id, path, inode)

    def close(self) -> None:
        """Forget every watch."""
        self._loop.remove_reader(self._inotify.fileno())
        self._inotify.close()

    def _add(self, dev_id: int, path: str, inode: int) -> None:
        try:
            watch = self._inotify.add_watch(path, _WATCHED)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOSPC, errno.ENOMEM, errno.EACCES):
                raise
            self.lost += 1  # a hint less; the full look comes anyway
            return
        self._watches[dev_id] = (watch, inode)
        self._ids[watch] = dev_id

    def _drop(self, dev_id: int) -> None:
        watch, _ = self._watches.pop(dev_id)
        if self._ids.get(watch) == dev_id:
            del self._ids[watch]
        try:
            self._inotify.rm_watch(watch)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the node went, and the watch with it
                raise

    def _on_readable(self) -> None:
        overflowed = False
        touched: dict[int, bool] = {}
        try:
            data = os.read(self._inotify.fileno(), _READ_AT_ONCE)
        except BlockingIOError:
            return
        for event in parse_events(data):
            if event.mask & flags.Q_OVERFLOW:
                overflowed = True
            elif event.wd in self._ids:
                dev_id = self._ids[event.wd]
                touched[dev_id] = touched.get(dev_id, False) or bool(event.mask & flags.OPEN)
        if overflowed:
            self._listener.on_overflow()
        for dev_id, opened in touched.items():
            self._listener.on_node(dev_id, opened=opened)
