"""A guest that is watched from the host: real devices, their servers and a daemon, which do what they are told over TCP.

`python3 -m tests.watched_guest PORT_OF_ALERTMANAGER`, in a guest with a network. One line, one deed, and `done` when it is:
`serve 3` (recoverable), `lend 3` (not recoverable), `kill 3`, `recover 3`, `start`, `crash` (SIGKILL for the daemon), `end`.
"""

import contextlib
import socket
import sys

from tests.daemon_process import DaemonProcess
from tests.lab import network
from tests.native_server import NativeServer

METRICS_PORT = 10116
DEEDS_PORT = 10117
CONFIG = """
[daemon]
resync_interval = "5s"
[policy]
recovery_deadline = "1s"
orphan_grace = "200ms"
[http]
listen = "0.0.0.0:{metrics}"
[[alert]]
sink = "alertmanager"
url = "http://{host}:{alertmanager}"
severity = "info"
resend = "5s"
"""


class World:
    """What there is in this guest."""

    def __init__(self, alertmanager: int) -> None:
        self.servers: dict[int, NativeServer] = {}
        self.daemon: DaemonProcess | None = None
        self._config = CONFIG.format(metrics=METRICS_PORT, host=network.HOST, alertmanager=alertmanager)

    def do(self, deed: str, dev_id: int) -> None:
        match deed:
            case "serve":
                self._serve("LIVE", dev_id, "--id", "--recovery")
            case "lend":
                self._serve("LIVE", dev_id, "--id")
            case "recover":
                self._serve("RECOVERED", dev_id, "--recover")
            case "kill":
                self.servers.pop(dev_id).kill()
            case "start" if self.daemon is None:
                self.daemon = DaemonProcess(self._config, port=METRICS_PORT)
                self.daemon.wait_ready()
            case "start" if self.daemon:
                self.daemon.restart()
            case "crash" if self.daemon:
                self.daemon.kill()
            case _:
                raise ValueError(deed)

    def _serve(self, word: str, dev_id: int, what: str, *more: str) -> None:
        server = NativeServer(what, str(dev_id), *more)
        assert server.wait_for(word) == dev_id
        self.servers[dev_id] = server

    def end(self) -> None:
        """Leave nothing behind; say what the daemon has said."""
        assert self.daemon
        for dev_id in tuple(self.servers):
            self.servers.pop(dev_id).kill()
        print(self.daemon.log, flush=True)
        assert "Traceback" not in self.daemon.log
        assert self.daemon.stop() == 0


def obey(world: World, connection: socket.socket) -> bool:
    """What is asked over one connection; whether it was the last."""
    with connection, connection.makefile("rw") as lines:
        lines.write("ready\n")
        lines.flush()
        for line in lines:
            print(f"world: {line.strip()}", flush=True)
            deed, _, dev_id = line.strip().partition(" ")
            if deed == "end":
                return True
            world.do(deed, int(dev_id or 0))
            lines.write("done\n")
            lines.flush()
    return False


def main() -> None:
    network.bring_up()
    world = World(int(sys.argv[1]))
    with socket.create_server(("0.0.0.0", DEEDS_PORT)) as listener:
        is_over = False
        while not is_over:
            connection, _ = listener.accept()
            # One that a forwarded port has taken before anybody listened here may be dead already.
            with contextlib.suppress(ConnectionError):
                is_over = obey(world, connection)
    world.end()


if __name__ == "__main__":
    main()
