"""The inhabitants of a campaign: a daemon, servers that nobody may touch, victims; and what must be true at all times.

The guards, for the whole campaign: devices with known content that are served, one that waits for a new server, one whose
server is still setting it up. Each check reads them, and asks whether they are the same devices with the same servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from duende_ublkd.client import DaemonClient
from duende_ublkd.core.errors import DuendeError, NoSuchDeviceError
from duende_ublkd.core.model import DevInfo, KernelState
from duende_ublkd.kernel.control import kernel_version
from duende_ublkd.report.web import SOCKET_NAME
from tests.native_server import NativeServer
from tests.server.harness import (
    BLOCK,
    ServerProcess,
    ask_kernel,
    block_device,
    direct_read,
    drop_device,
    in_background,
    wait_for_state,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from duende_ublkd.kernel.control import Control
    from tests.campaign.doomed import Doom, Shortage

T = TypeVar("T")

REPOSITORY = Path(__file__).resolve().parents[2]
SYSFS_CLASS = Path("/sys/class/ublk-char")
_SHOWN = 5  # of the devices that a violation is about
SETUP_GRACE = 2.0  # seconds; as in CONFIG. A server takes a tenth of that on an emulated CPU
RECOVERY_IDS = range(800, 850)
CONFIG = """
[daemon]
resync_interval = "3s"
command_deadline = "{deadline}"
state_dir = "{state}"
[http]
listen = ""
[policy]
orphan_grace = "100ms"
setup_grace = "2s"
[[device]]
match = {{ ids = "100-799" }}
unserved = "delete"
recovery_deadline = "1s"
[[device]]
match = {{ ids = "800-849" }}
unserved = "delete"
recovery_deadline = "4s"
"""
READY_BY = 90.0  # seconds; an emulated CPU that others want too
TERM_BY = 5.0  # seconds from SIGTERM to the end: the daemon's promise
FREE_BY = 60.0  # seconds until the id of a dead server is free; a second or two where nothing is in the way
SETTLED_BY = 30.0
ANSWERS_BY = 20.0
MIB = 1 << 20


class ViolationError(AssertionError):
    """A promise that was not kept."""


def wait_for(what: str, is_true: Callable[[], T], by: float) -> T:
    """Ask until the answer is true, and return it; ViolationError after so many seconds."""
    until = time.monotonic() + by
    while not (answer := is_true()):
        if time.monotonic() > until:
            raise ViolationError(f"after {by:g} s still not so: {what}")
        time.sleep(0.01)
    return answer


def promise(what: str, *, kept: bool) -> None:
    if not kept:
        raise ViolationError(what)


class Cradle:
    """The process that daemons are forked from; whatever they leave behind becomes its child."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.campaign.doomed"], cwd=REPOSITORY, stdin=theirs.fileno()
        )
        theirs.close()

    def bear(self, order: Mapping[str, object], log: Path) -> tuple[int, socket.socket]:
        """A new daemon's pid, and where its exit status will be told."""
        channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with Path(os.devnull).open("rb") as nothing, log.open("ab") as said:
            fds = [nothing.fileno(), said.fileno(), said.fileno(), theirs.fileno()]
            socket.send_fds(self._orders, [json.dumps([json.dumps(order)]).encode()], fds)
        theirs.close()
        channel.settimeout(READY_BY)
        return int(channel.recv(64)), channel

    def children(self) -> set[int]:
        pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return {pid for pid in pids if parent_of(pid) == self._process.pid}

    def close(self) -> None:
        self._orders.close()
        self._process.wait(SETTLED_BY)


def parent_of(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def family_of(pid: int) -> list[int]:
    """A process and all that descend from it."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    parents = {each: parent_of(each) for each in pids}
    found = [pid]
    for one in found:
        found += [each for each, parent in parents.items() if parent == one and each not in found]
    return found


class Daemon:
    """One life of the daemon; `state` and `run` outlive it."""

    def __init__(
        self,
        cradle: Cradle,
        home: Path,
        *,
        doom: Doom | None = None,
        shortage: Shortage | None = None,
        deadline: str = "10s",
    ) -> None:
        self._cradle = cradle
        self.run = home / "duende-ublkd"
        self.run.mkdir(parents=True, exist_ok=True)
        config = home / "config.toml"
        config.write_text(CONFIG.format(state=home / "state", deadline=deadline))
        self.log_path = Path(tempfile.mkstemp(prefix="log-", dir=home)[1])
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = f"{home}/notify-{self.log_path.name}"
        self._notify.bind(address)
        order = {
            "config": str(config),
            "environment": {"RUNTIME_DIRECTORY": str(self.run), "NOTIFY_SOCKET": address},
            "doom": asdict(doom) if doom else None,
            "shortage": asdict(shortage) if shortage else None,
        }
        self.pid, self._channel = cradle.bear(order, self.log_path)
        self.status: int | None = None

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def has_ended(self, within: float = 0.0) -> bool:
        if self.status is None:
            self._channel.settimeout(within or 0.0001)
            with contextlib.suppress(TimeoutError, BlockingIOError):
                self.status = int(self._channel.recv(64))
        return self.status is not None

    def wait_ready(self) -> bool:
        """False: it ended before."""
        until = time.monotonic() + READY_BY
        self._notify.settimeout(0.05)
        while not self.has_ended():
            with contextlib.suppress(TimeoutError):
                if b"READY=1" in self._notify.recv(4096):
                    return True
            promise(f"the daemon is ready within {READY_BY:g} s: {self.log[-2000:]}", kept=time.monotonic() < until)
        return False

    def must_be_ready(self) -> None:
        promise(f"a daemon starts, and does not end with {self.status}: {self.log[-2000:]}", kept=self.wait_ready())

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if not self.has_ended():
            self.signal(signal.SIGKILL)
            wait_for("the killed daemon is gone", self.has_ended, SETTLED_BY)

    def end(self) -> float:
        """SIGTERM; the seconds that it took, of which there are five."""
        began = time.monotonic()
        self.signal(signal.SIGTERM)
        promise(f"SIGTERM ends it within {TERM_BY:g} s", kept=self.has_ended(TERM_BY))
        promise(f"told to end, it ends with 0, not {self.status}: {self.log[-2000:]}", kept=self.status == 0)
        return time.monotonic() - began

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def answers(self) -> list[dict[str, object]]:
        """What it says of the devices, over its unix socket."""
        until = time.monotonic() + ANSWERS_BY
        while True:
            try:
                return list(DaemonClient(f"{self.run}/{SOCKET_NAME}").get("/api/v1/devices"))
            except DuendeError as error:
                promise(f"the daemon answers, and not: {error}", kept=time.monotonic() < until)
                time.sleep(0.1)

    def close(self) -> None:
        self.kill()
        self._channel.close()
        self._notify.close()


_BEGUN = re.compile(r"ublk(\d+) is \w+: .*; (?:deleting|stopping) it$")
_DONE = re.compile(r"ublk(\d+) (?:deleted|could not be deleted|stopped|spared|was already gone)\b")


def unfinished(log: str) -> set[int]:
    """The ids that something was about to be done to, by the log, and nothing is said to have come of it."""
    begun: set[int] = set()
    for line in log.splitlines():
        if match := _DONE.search(line):
            begun.discard(int(match[1]))
        elif match := _BEGUN.search(line):
            begun.add(int(match[1]))
    return begun


@dataclass
class Guard:
    """A device that has to stay as it is."""

    name: str
    dev_id: int
    state: int
    backing: Path | None
    is_running: Callable[[], bool]
    close: Callable[[], object]
    info: DevInfo | None = None
    inode: int = 0
    diskseq: str = ""

    def remember(self) -> None:
        self.info = wait_for_state(self.dev_id, self.state)
        self.inode, self.diskseq = self._inode(), self._diskseq()

    def check(self, now: DevInfo | None, chance: random.Random) -> None:
        who = f"{self.name}, ublk{self.dev_id},"
        promise(f"{who} is there", kept=now is not None)
        promise(f"{who} is as it was, {self.info}, not {now}", kept=self._facts(now) == self._facts(self.info))
        promise(f"{who} is the same instance", kept=self._inode() == self.inode)
        promise(f"{who} has the same disk", kept=self._diskseq() == self.diskseq)
        promise(f"the server of {who} runs", kept=self.is_running())
        if self.backing and self.state == KernelState.LIVE:
            self.compare(chance)

    def _facts(self, info: DevInfo | None) -> DevInfo | None:
        """Whose number the kernel tells of a server that is dead may change."""
        return replace(info, server_pid=-1) if info and self.state != KernelState.LIVE else info

    def compare(self, chance: random.Random) -> None:
        assert self.backing
        place = chance.randrange(self.backing.stat().st_size // BLOCK) * BLOCK
        reading = in_background(lambda: direct_read(block_device(self.dev_id), BLOCK, place))
        wait_for(f"a block of {self.name} is read", reading.done, SETTLED_BY)
        with self.backing.open("rb") as file:
            file.seek(place)
            promise(f"{self.name} has its content", kept=reading.result() == file.read(BLOCK))

    def _inode(self) -> int:
        return Path(f"{SYSFS_CLASS}/ublkc{self.dev_id}/").stat().st_ino

    def _diskseq(self) -> str:
        path = Path(f"/sys/block/ublkb{self.dev_id}/diskseq")
        return path.read_text().strip() if path.exists() else ""


class World:
    """Everything that a fault may be injected into."""

    def __init__(self, seed: int) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="campaign-"))
        self.home.chmod(0o755)
        self.kernel = kernel_version(platform.release())
        self.chance = random.Random(f"{seed} checks")
        self.cradle = Cradle()
        self.guards: list[Guard] = []
        self.worst: dict[str, float] = defaultdict(float)  # of the round, by what was measured
        self.killed_at: Counter[str] = Counter()  # of the round: the step of the daemon that was met
        self._ids: Iterator[int] = iter(())
        self.daemon = self.start_daemon()
        self.daemon.must_be_ready()
        self.raise_guards()
        self._settle()

    # Guards

    def raise_guards(self) -> None:
        self.guards = [
            self._native_guard("a device served by a C server", 10),
            self._native_guard("a recoverable device served by a C server", 11, "--recovery"),
            self._python_guard("a device served by a Python server", 12),
            self._native_guard("a device that waits for a new server", 13, "--recovery"),
            self._unborn_guard("a device that is being set up", 14),
        ]
        waiting = self.guards[3]
        waiting.close()
        waiting.state, waiting.is_running = KernelState.QUIESCED, lambda: True
        for guard in self.guards:
            guard.remember()

    def drop_guards(self) -> None:
        """The one that waits gets its server, and has its content; then all of them end, and are cleaned up after."""
        waiting = next((guard for guard in self.guards if guard.state == KernelState.QUIESCED), None)
        if waiting:
            with NativeServer("--recover", str(waiting.dev_id), "--backing", str(waiting.backing)) as server:
                server.wait_for("RECOVERED")
                waiting.compare(self.chance)
                self._delete_by_hand(waiting.dev_id, server)
        for guard in self.guards:
            guard.close()
        recoverable = self.guards[1].dev_id if self.guards else None
        gone = [guard.dev_id for guard in self.guards]
        self.guards = []
        if recoverable is not None:
            wait_for_state(recoverable, KernelState.QUIESCED)
            ask_kernel(lambda control: control.stop_device(recoverable))
        self.until_free(gone)

    def _delete_by_hand(self, dev_id: int, server: NativeServer) -> None:
        server.kill()
        wait_for_state(dev_id, KernelState.QUIESCED)
        ask_kernel(lambda control: control.stop_device(dev_id))

    def _native_guard(self, name: str, dev_id: int, *more: str) -> Guard:
        backing = self._content(dev_id)
        server = NativeServer("--id", str(dev_id), "--size", "1", "--backing", str(backing), *more)
        server.wait_for("LIVE")
        return Guard(name, dev_id, KernelState.LIVE, backing, lambda: server.is_running, server.kill)

    def _python_guard(self, name: str, dev_id: int) -> Guard:
        backing = self._content(dev_id)
        server = ServerProcess.start(id=dev_id, target="ram", size=1, backing=backing)
        server.wait_for("after-start")
        pid = server.pid
        return Guard(
            name,
            dev_id,
            KernelState.LIVE,
            backing,
            lambda: Path(f"/proc/{pid}").exists(),
            lambda: server.close(delete=False),
        )

    def _unborn_guard(self, name: str, dev_id: int) -> Guard:
        server = NativeServer("--id", str(dev_id), "--stop-after", "fetch")
        server.wait_for("FETCH")
        return Guard(name, dev_id, KernelState.DEAD, None, lambda: server.is_running, server.kill)

    def _content(self, dev_id: int) -> Path:
        backing = self.home / f"disk{dev_id}"
        backing.write_bytes(random.Random(dev_id).randbytes(MIB))
        return backing

    # The daemon

    def start_daemon(
        self, *, doom: Doom | None = None, shortage: Shortage | None = None, deadline: str = "10s"
    ) -> Daemon:
        self._baseline = 0
        return Daemon(self.cradle, self.home, doom=doom, shortage=shortage, deadline=deadline)

    def replace_daemon(self) -> None:
        """A proper daemon instead of one that was killed, or is to be."""
        self.daemon.close()
        self.check_log(self.daemon, was_killed=True)
        began = time.monotonic()
        self.daemon = self.start_daemon()
        self.daemon.must_be_ready()
        self.note("daemon ready after s", time.monotonic() - began)

    def renew_daemon(self) -> None:
        """SIGTERM, which leaves no child, and another one."""
        self.note("SIGTERM to end s", self.daemon.end())
        wait_for("the daemon's children end with it", lambda: not self.cradle.children(), SETTLED_BY)
        self.replace_daemon()

    def check_log(self, daemon: Daemon, *, was_killed: bool = False) -> None:
        log = daemon.log
        promise(f"no traceback: {log[-4000:]}", kept="Traceback" not in log)
        if not was_killed:
            wait_for("each before has its after in the log", lambda: not unfinished(daemon.log), SETTLED_BY)

    # Victims

    def ids(self, count: int) -> list[int]:
        """Ids of victims, which are reused only after hundreds of others."""
        found: list[int] = []
        while len(found) < count:
            number = next(self._ids, None)
            if number is None:
                self._ids = iter(range(100, 800))
            else:
                found.append(number)
        return found

    def until_free(self, dev_ids: Collection[int], by: float = FREE_BY) -> float:
        """Wait until these ids are free; the seconds that it took."""
        began = time.monotonic()
        still: list[int] = []

        def left() -> list[int]:
            return [dev_id for dev_id in dev_ids if Path(f"{SYSFS_CLASS}/ublkc{dev_id}").exists()] or [
                dev_id for dev_id, info in infos(dev_ids).items() if info
            ]

        def are_free() -> bool:
            nonlocal still
            still = left()
            return not still

        try:
            wait_for("every id is free", are_free, by)
        except ViolationError as violation:
            few = sorted(still)[:_SHOWN]
            told = [each for each in self.daemon.answers() if each["dev_id"] in few]
            raise ViolationError(
                f"{violation}; left are {len(still)}, such as {infos(few)}; the daemon says {told}; "
                f"its log: {self.daemon.log[-4000:]}"
            ) from None
        took = time.monotonic() - began
        self.note("ids free after s", took)
        return took

    def note(self, what: str, value: float) -> None:
        self.worst[what] = max(self.worst[what], value)

    # What must be true after each round

    def check(self) -> None:
        """Every promise that can be asked for."""
        present = infos([guard.dev_id for guard in self.guards])
        for guard in self.guards:
            guard.check(present[guard.dev_id], self.chance)
        promise(f"the daemon runs, and has not ended with {self.daemon.status}", kept=not self.daemon.has_ended())
        self.daemon.answers()
        self.check_log(self.daemon)
        self._settle()

    def _settle(self) -> None:
        """No descriptor more than when it had just settled, no child of a former daemon."""
        if not self._baseline:
            self._baseline = self._steady_descriptors()
        wait_for(
            f"the daemon has {self._baseline} descriptors again, not {self.daemon.descriptors()}",
            lambda: self.daemon.descriptors() <= self._baseline,
            SETTLED_BY,
        )
        wait_for(
            f"nothing is left of former daemons: {self.cradle.children() - {self.daemon.pid}}",
            lambda: self.cradle.children() <= {self.daemon.pid},
            SETTLED_BY,
        )

    def _steady_descriptors(self) -> int:
        """Its number of descriptors once it has stayed the same for a second."""
        count, since = 0, time.monotonic()
        while time.monotonic() - since < 1.0:
            now = self.daemon.descriptors()
            if now != count:
                count, since = now, time.monotonic()
            time.sleep(0.05)
        return count

    def abandon(self) -> None:
        """After a violation: end what can be ended, so that the next world may begin."""
        self.daemon.close()
        for guard in self.guards:
            guard.close()
        self.cradle.close()
        for path in SYSFS_CLASS.iterdir() if SYSFS_CLASS.exists() else ():
            drop_device(int(path.name.removeprefix("ublkc")))

    def close(self) -> None:
        """The end of the campaign, which has its promises too."""
        self.drop_guards()
        self.note("SIGTERM to end s", self.daemon.end())
        wait_for("the daemon's children end with it", lambda: not self.cradle.children(), SETTLED_BY)
        self.daemon.close()
        self.cradle.close()
        shutil.rmtree(self.home)


def infos(dev_ids: Iterable[int]) -> dict[int, DevInfo | None]:
    """GET_DEV_INFO of many; None: free."""

    async def ask(control: Control) -> dict[int, DevInfo | None]:
        wanted = list(dev_ids)
        return dict(zip(wanted, await asyncio.gather(*(_info(control, dev_id) for dev_id in wanted)), strict=True))

    return ask_kernel(ask)


async def _info(control: Control, dev_id: int) -> DevInfo | None:
    try:
        return await control.get_device_info(dev_id)
    except NoSuchDeviceError:
        return None
