"""The courier: the one program that sends alerts over a network, run beside the daemon.

A network may not answer, and a name server, a password's file or a mail server neither. It is this process that waits, and
not the daemon, which starts it (dispatch.py) and talks to it over a socket, on its stdin (wire.py). It ends with that
socket, and at once: what it has not told of as delivered, the daemon sends again.

Rules:
1. Each delivery is a task of its own with its sink's time limit over all of it. What cannot be given up is in a thread
   (aside.py), one for each target: a sink that hangs delays no other.
2. It trusts nobody that it talks to: certificates are checked, answers and memory are bounded.
3. It is as weak as it can be: no capability, no new privilege, no memory locked; short of memory, it may be killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import signal
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.text import printable
from duende_ublkd.report.alerts import alertmanager, mail, webhook, wire
from duende_ublkd.report.alerts.aside import UndeliveredError
from duende_ublkd.report.alerts.posting import Target

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from duende_ublkd.report.alerts.answer import Taken

MOST_DETAIL = 300  # characters
MOST_MEMORY = 256 << 20  # bytes of data: ten times what it takes
MOST_FILES = 1024
_STACK = 512 << 10  # bytes; OpenSSL and the resolver are content with it
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # a service manager and a terminal send them to all of us
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_SET_IO_FLUSHER = 24, 38, 57  # <linux/prctl.h>
_CAPABILITY_VERSION_3 = 0x20080522
_LAST_CAPABILITY = 63
_LIMITS = {
    resource.RLIMIT_CORE: 0,  # it has passwords in its memory
    resource.RLIMIT_DATA: MOST_MEMORY,
    resource.RLIMIT_NOFILE: MOST_FILES,
}
_DELIVER = {"alertmanager": alertmanager.deliver, "webhook": webhook.deliver, "mail": mail.deliver}


class Courier:
    """Takes orders from a socket of packets until it is closed."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._targets: dict[str, list[Target]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._sending = asyncio.Lock()

    async def serve(self) -> None:
        """ValueError: who is at the other end is not the daemon."""
        joiner = wire.Joiner()
        await self._send({"do": "ready"})
        while packet := await self._receive():
            message = joiner.take(packet)
            if message is None:
                continue
            if message["do"] == "configure":
                self._configure(message["sinks"])
            else:
                self._begin(self._deliver(message))

    async def _receive(self) -> bytes:
        while True:
            try:
                return await self._loop.sock_recv(self._channel, 1 + wire.PACKET)
            except ConnectionResetError:
                continue  # the daemon went without reading an answer

    def _configure(self, sinks: list[dict[str, Any]]) -> None:
        """A sink that stays the same keeps its threads: one that hangs is not to get another."""
        before = self._targets
        self._targets = {}
        for sink in sinks:
            targets = before.get(sink["name"], [])
            same = bool(targets) and targets[0].sink == sink
            self._targets[sink["name"]] = targets if same else targets_of(sink)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _deliver(self, order: Mapping[str, Any]) -> None:
        began = time.monotonic()
        is_ok, is_permanent, missed = False, False, ""
        try:
            taken = await deliver(self._targets_of(order["sink"]), order["notices"])
            is_ok, detail, missed = True, taken.detail, taken.missed
        except UndeliveredError as error:
            detail, is_permanent = str(error), error.is_permanent
        except Exception as error:  # noqa: BLE001 - told, and tried again later; the other sinks go on
            detail = f"the courier has a defect: {error!r}"
        answer = {"id": order["id"], "ok": is_ok, "permanent": is_permanent, "detail": printable(detail, MOST_DETAIL)}
        answer |= {"missed": printable(missed, MOST_DETAIL), "seconds": round(time.monotonic() - began, 3)}
        await self._send(answer)

    def _targets_of(self, name: str) -> list[Target]:
        targets = self._targets.get(name)
        if targets is None:
            raise UndeliveredError("there is no such sink any more")
        return targets

    async def _send(self, message: dict[str, Any]) -> None:
        async with self._sending:
            for packet in wire.packets(message):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `serve` hears of that
                    await self._loop.sock_sendall(self._channel, packet)


def targets_of(sink: Mapping[str, Any]) -> list[Target]:
    """One for each member of a sink."""
    if sink["sink"] == "mail":
        return [Target(f"smtp://{sink['server']}", sink)]
    base = [str(url).rstrip("/") + alertmanager.PATH for url in sink.get("urls") or [sink["url"]]]
    return [Target(url, sink) for url in base] if sink["sink"] == "alertmanager" else [Target(str(sink["url"]), sink)]


async def deliver(targets: list[Target], notices: list[dict[str, Any]]) -> Taken:
    """Within the sink's time. UndeliveredError."""
    sink = targets[0].sink
    if sink["sink"] == "alertmanager":  # each member has its own time
        return await alertmanager.deliver(targets, notices)
    return await targets[0].in_time(_DELIVER[sink["sink"]](targets, notices))


# --- the process --------------------------------------------------------------------------------------------------------


def _become_weak() -> None:
    """Undo what the daemon has for itself, and give up what a courier does not need. What cannot be had, is done without."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_IO_FLUSHER, 0, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(_LAST_CAPABILITY + 1):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    libc.capset(header, (ctypes.c_uint32 * 6)())
    with contextlib.suppress(OSError):  # no /proc, or not ours to change: it lives longer than it has to
        Path("/proc/self/oom_score_adj").write_text("0", "ascii")
    for limit, most in _LIMITS.items():
        with contextlib.suppress(OSError, ValueError):
            _, hard = resource.getrlimit(limit)
            less = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(limit, (less, less))


async def _serve(channel: socket.socket) -> None:
    await Courier(channel).serve()


def main() -> None:
    """Serve the socket that is stdin, and end with it."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.umask(0o077)
    os.chdir("/")
    threading.stack_size(_STACK)
    _become_weak()
    with socket.socket(fileno=0) as channel:
        channel.setblocking(False)
        status = 1
        try:
            asyncio.run(_serve(channel))
            status = 0
        finally:
            os._exit(status)  # threads that hang are not waited for, nor is what is under way
