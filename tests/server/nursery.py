"""A process that has imported everything and forks test servers: on an emulated CPU an import costs more than a test.

It listens on its standard input, a SOCK_SEQPACKET socket. One message starts one server: its arguments as JSON, and
four descriptors: standard input, output, error, and a socket on which the nursery answers the pid, and the exit status
once the server is dead and reaped. It ends when its socket is closed; servers do not.
"""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable

from tests.server.__main__ import main

_HIGHEST_FD = 1024
_PR_SET_CHILD_SUBREAPER = 36


def serve(live: Callable[[list[str]], int] = main, *, adopts: bool = False) -> None:
    """`live`: what a child does with its arguments. `adopts`: whoever its children leave behind becomes its own child."""
    if adopts and ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("prctl")
    orders = socket.socket(fileno=0)
    bell, rung = socket.socketpair()
    for end in (bell, rung):
        end.setblocking(False)
    signal.set_wakeup_fd(rung.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(orders, selectors.EVENT_READ)
        selector.register(bell, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if bell in ready:
                bell.recv(4096)
                _reap(children)
            if orders in ready:
                message, fds, _, _ = socket.recv_fds(orders, 65536, 4)
                if not message:
                    return
                _give_birth(live, json.loads(message), fds, children)


def _give_birth(
    live: Callable[[list[str]], int], arguments: list[str], fds: list[int], children: dict[int, socket.socket]
) -> None:
    pid = os.fork()
    if not pid:
        _live(live, arguments, fds)
    for fd in fds[:3]:
        os.close(fd)
    children[pid] = socket.socket(fileno=fds[3])
    children[pid].send(str(pid).encode())


def _live(live: Callable[[list[str]], int], arguments: list[str], fds: list[int]) -> None:
    """The child; never returns."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in range(3):
        os.dup2(fds[number], number)
    os.closerange(3, _HIGHEST_FD)
    status = 1
    try:
        status = live(arguments)
    except SystemExit as usage:
        status = usage.code if isinstance(usage.code, int) else 1
    except BaseException:  # noqa: BLE001 - a fork must not return into the nursery's own loop
        sys.excepthook(*sys.exc_info())
    os._exit(status)


def _reap(children: dict[int, socket.socket]) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            told = children.pop(pid, None)  # None: adopted
            with told or contextlib.nullcontext(), contextlib.suppress(OSError):
                if told:
                    told.send(str(os.waitstatus_to_exitcode(status)).encode())


if __name__ == "__main__":
    serve()
