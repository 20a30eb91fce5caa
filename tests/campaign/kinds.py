"""The kinds of faults. Each is a function of the world and a source of chance, does a round, and says how many it injected.

A death counts as one fault, and so does a stop of a process, a limit, a jump of a clock, a flood. What is true afterwards is
the business of `World.check`, but for what is true of one kind only.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import random
import resource
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from duende_ublkd.core.errors import DuendeError
from duende_ublkd.core.model import DevInfo, Feature, KernelState
from tests.campaign import doomed
from tests.campaign.doomed import Doom, Shortage
from tests.campaign.world import (
    FREE_BY,
    RECOVERY_IDS,
    SETTLED_BY,
    SETUP_GRACE,
    SYSFS_CLASS,
    Daemon,
    ViolationError,
    World,
    family_of,
    infos,
    parent_of,
    promise,
    wait_for,
)
from tests.native_server import NativeServer
from tests.server.harness import (
    BLOCK,
    ServerError,
    ServerProcess,
    ask_kernel,
    block_device,
    direct_read,
    in_background,
    wait_for_state,
)
from tests.server.script import STEPS as PYTHON_STEPS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from duende_ublkd.kernel.control import Control

ASYNC_SCAN = (6, 18)
"""From here on (6.18.4) a server may die within START_DEV: before, the partition scan hangs for ever, and the device."""
NO_AUTO_PART_SCAN = (7, 0)
"""From here on the scan can be left out, and a server may die within its own STOP_DEV: in between, that waits in the dying
server for reads which only its end would fail, for ever.
"""
LAST_FPUT = (6, 15)
"""From here on a death is noticed when the file goes; before, with all requests taken, only after 30 s."""
FAIL_IO = (6, 13)
BATCH = 8
_STEPS = (
    "control",
    "add",
    "params",
    "open",
    "mmap",
    "fetch",
    "start-sent",
    "start",
    "io",
    "stop-sent",
    "stop",
    "delete",
)
_RECOVERY_STEPS = ("control", "add", "open", "mmap", "fetch", "start-sent", "start")
_HOUR = 3600
_NR_PIDFD_GETFD = 438
_SO_RCVBUFFORCE = 33
_HUGE = 1000


@dataclass(frozen=True)
class Kind:
    """`share`: of all the faults of a campaign. `short`: rounds in the short form that CI runs, `most`: in the long one."""

    name: str
    do: Callable[[World, random.Random], int]
    share: float
    short: int = 1
    most: int = 1 << 30  # rounds


# --- deaths of servers ------------------------------------------------------------------------------------------------


def _flags(world: World, chance: random.Random) -> tuple[str, ...]:
    options = [(), (), ("--recovery",)]
    if world.kernel >= FAIL_IO:
        options.append(("--fail-io",))
    return chance.choice(options)


def _unscanned(world: World) -> tuple[str, ...]:
    """Nothing but a test's own I/O, where that can be had: see `scan_death` for what a scan without a server does."""
    return ("--flags", hex(Feature.NO_AUTO_PART_SCAN)) if world.kernel >= NO_AUTO_PART_SCAN else ()


def _wait_scanned(world: World, dev_id: int) -> None:
    """Where the scan goes on after START_DEV and cannot be had without: until it has read something, and no more comes."""
    if not ASYNC_SCAN <= world.kernel < NO_AUTO_PART_SCAN:
        return
    disk = Path(f"/sys/block/ublkb{dev_id}")
    last = ""
    until = time.monotonic() + SETTLED_BY
    while time.monotonic() < until:
        now = disk.joinpath("stat").read_text()
        if now == last and int(now.split()[0]) and not any(map(int, disk.joinpath("inflight").read_text().split())):
            return
        last = now
        time.sleep(0.2)  # a scan never pauses for so long
    raise ViolationError(f"the kernel has read the partition table of ublk{dev_id} within {SETTLED_BY:g} s")


def _steps(world: World) -> list[str]:
    wedging = {"start-sent"} if world.kernel < ASYNC_SCAN else set()
    if ASYNC_SCAN <= world.kernel < NO_AUTO_PART_SCAN:
        wedging = {"stop-sent"}
    return [step for step in _STEPS if step not in wedging]


def server_death(world: World, chance: random.Random) -> int:
    """C servers that die at any step of their lives, all at about the same time."""
    victims = []
    for dev_id in world.ids(BATCH):
        step = chance.choice(_steps(world))
        plain = step in ("io", "stop-sent", "stop", "delete")  # what is in flight on others waits for a new server
        end = ("--end",) if step in ("stop-sent", "stop", "delete") else ()
        dies_in_scan = step in ("start-sent", "start") and ASYNC_SCAN <= world.kernel < NO_AUTO_PART_SCAN
        flags = () if plain or dies_in_scan else _flags(world, chance)
        flags += _unscanned(world) if flags or step == "stop-sent" else ()
        server = NativeServer("--id", str(dev_id), "--depth", "4", "--size", "1", "--die-at", step, *end, *flags)
        victims.append((dev_id, step, server))
    for dev_id, step, server in victims:
        if step == "io":
            server.wait_for("LIVE")
            in_background(functools.partial(_read_somewhere, dev_id, chance.randrange(200)))
        _wait_dead(server, f"ublk{dev_id}'s server dies at {step}")
    world.until_free([dev_id for dev_id, _, _ in victims])
    return len(victims)


def _wait_dead(server: NativeServer, what: str) -> None:
    wait_for(what, lambda: not server.is_running, SETTLED_BY)
    server.kill()  # closes what is left of it here


def _read_somewhere(dev_id: int, block: int) -> None:
    with contextlib.suppress(OSError):
        direct_read(block_device(dev_id), BLOCK, block * BLOCK)


def live_death(world: World, chance: random.Random) -> int:
    """Servers of devices that the daemon has seen LIVE: killed all at once, or one after the other."""
    with _live(world, chance, 2 * BATCH) as servers:
        if chance.random() < 0.5:
            wait_for("the daemon has seen them", lambda: _known(world, servers), FREE_BY)
        pause = chance.choice([0.0, 0.0, 0.005, 0.05])
        for server in servers.values():
            server.kill()
            time.sleep(pause)
        world.until_free(servers)
    return len(servers)


@contextlib.contextmanager
def _live(world: World, chance: random.Random, count: int) -> Iterator[dict[int, NativeServer]]:
    servers = {
        dev_id: NativeServer(
            "--id", str(dev_id), "--depth", "4", "--size", "1", *_flags(world, chance), *_unscanned(world)
        )
        for dev_id in world.ids(count)
    }
    try:
        for dev_id, server in servers.items():
            server.wait_for("LIVE")
            _wait_scanned(world, dev_id)
        yield servers
    finally:
        for server in servers.values():
            server.kill()


def _known(world: World, servers: dict[int, NativeServer]) -> bool:
    return servers.keys() <= {each["dev_id"] for each in world.daemon.answers() if each["verdict"] == "live"}


def python_server_death(world: World, chance: random.Random) -> int:
    """The project's own test server, at any step that it knows; also with a worker that it has forked."""
    # Late noticed, or never reached: a scan whose first read is not answered keeps everybody else from opening the disk.
    slow = {"all-in-flight"} if world.kernel < LAST_FPUT or ASYNC_SCAN <= world.kernel < NO_AUTO_PART_SCAN else set()
    wedging = set() if world.kernel >= ASYNC_SCAN else {"in-scan"}
    recovery = {"after-start-recovery", "after-recovery"}
    step = chance.choice([each for each in PYTHON_STEPS if each not in slow | wedging | recovery])
    (dev_id,) = world.ids(1)
    part_scan = step == "in-scan" and world.kernel < (7, 0)
    forks = chance.random() < 0.3 and step not in ("after-add", "after-params", "in-scan")
    server = ServerProcess.start(
        id=dev_id, target="ram", size=1, depth=4, die_at=step, fork_after_open=forks, part_scan=part_scan
    )
    try:
        if step in ("in-flight", "all-in-flight", "before-commit"):
            with contextlib.suppress(ServerError):  # the kernel's own read of the partition table may have come first
                server.wait_for("after-start")
            for block in range(4):
                in_background(functools.partial(_read_somewhere, dev_id, block * 16))
        elif step in ("after-stop", "after-close", "after-delete"):
            server.wait_for("after-start")
            server.tell("stop")
        elif step == "in-scan":
            server.wait_for("after-fetch")
            time.sleep(1.0)  # some kernels scan after START_DEV, and some do not: then it is killed as it serves
            server.kill()
        server.wait_dead()
        world.until_free([dev_id])
    finally:
        server.close(delete=False)
    return 1


def recovery_death(world: World, chance: random.Random) -> int:
    """A server dies, and the one that takes over dies too, at any step of that."""
    dev_ids = chance.sample(RECOVERY_IDS, 4)
    steps = [step for step in _RECOVERY_STEPS if step != "start-sent" or world.kernel >= ASYNC_SCAN]
    more = ("--depth", "4", "--size", "1", "--recovery", *_unscanned(world))
    first = [NativeServer("--id", str(each), *more) for each in dev_ids]
    for dev_id, server in zip(dev_ids, first, strict=True):
        server.wait_for("LIVE")
        _wait_scanned(world, dev_id)
    for server in first:
        server.kill()
    for dev_id in dev_ids:
        wait_for_state(dev_id, KernelState.QUIESCED)
    second = [NativeServer("--recover", str(each), "--die-at", chance.choice(steps)) for each in dev_ids]
    for server in second:
        _wait_dead(server, "the second server dies too")
    world.until_free(dev_ids)
    return 2 * len(dev_ids)


def scan_death(world: World, _chance: random.Random) -> int:
    """A recoverable device's server dies while the kernel still reads its partition table, which then waits for a server.

    From 6.18.4 on that read holds the disk's open_mutex, and so our own O_EXCL open waits for it: the daemon says that the
    device is wedged, and does not give it up. No campaign includes it for as long as that is so; `--only scan-death` does.
    """
    dev_ids = world.ids(BATCH)
    servers = [NativeServer("--id", str(each), "--size", "1", "--recovery", "--die-at", "start") for each in dev_ids]
    for server in servers:
        _wait_dead(server, "a server dies as soon as it is LIVE")
    world.until_free(dev_ids)
    return len(dev_ids)


def stopped_server(world: World, chance: random.Random) -> int:
    """SIGSTOP with I/O in flight: the device stays. SIGCONT: the data is right. Or SIGKILL: it is cleaned."""
    dev_ids = world.ids(2)
    backing = [world.home / f"stopped{dev_id}" for dev_id in dev_ids]
    servers = []
    for dev_id, path in zip(dev_ids, backing, strict=True):
        path.write_bytes(random.Random(dev_id).randbytes(1 << 20))
        servers.append(NativeServer("--id", str(dev_id), "--depth", "4", "--size", "1", "--backing", str(path)))
    for server in servers:
        server.wait_for("LIVE")
    reads = []
    for dev_id, server in zip(dev_ids, servers, strict=True):
        os.kill(server.pid, signal.SIGSTOP)
        place = chance.randrange(256) * BLOCK
        reads.append((place, in_background(functools.partial(direct_read, block_device(dev_id), BLOCK, place))))
    time.sleep(chance.choice([0.5, 1.5, 4.0]))  # for so long the daemon has to resist
    world.daemon.signal(signal.SIGUSR1)
    world.daemon.answers()
    for dev_id, info in infos(dev_ids).items():
        promise(
            f"ublk{dev_id}, whose server is stopped, is LIVE: {info}",
            kept=bool(info and info.state == KernelState.LIVE),
        )
    os.kill(servers[0].pid, signal.SIGCONT)
    place, read = reads[0]
    wait_for("the read is answered when its server goes on", read.done, SETTLED_BY)
    promise("what was read is right", kept=read.result() == backing[0].read_bytes()[place : place + BLOCK])
    for server in servers:
        server.kill()
    world.until_free(dev_ids)
    for path in backing:
        path.unlink()
    return 4


def thousand_ids(world: World, chance: random.Random) -> int:
    """A thousand devices that were added and never opened, by a process that is gone; all at once, or while it looks."""
    at_once = chance.random() < 0.5
    if at_once:
        world.daemon.signal(signal.SIGSTOP)
    began = time.monotonic()
    adder = os.fork()
    if not adder:
        _add_and_die(_HUGE)
    status = os.waitpid(adder, 0)[1]
    world.note("a thousand added in s", time.monotonic() - began)
    world.daemon.signal(signal.SIGCONT)
    promise("a thousand devices can be added", kept=status == 0)
    ours = {guard.dev_id for guard in world.guards}
    dev_ids = [number for number in range(_HUGE + 64) if number not in ours]
    world.note("a thousand free again after s", world.until_free(dev_ids, 900.0))
    return 1


def _add_and_die(count: int) -> None:
    async def add(control: Control) -> None:
        for _ in range(count):
            await control.add_device(DevInfo(-1, 0, -1, 0, 1, 1, 4096))

    status = 1
    try:
        ask_kernel(add, 300.0)
        status = 0
    finally:
        os._exit(status)


# --- deaths of the daemon ---------------------------------------------------------------------------------------------


def daemon_death(world: World, chance: random.Random) -> int:
    """SIGKILL before a command, once the kernel has it, or after it; then another daemon finishes what was begun."""
    step = chance.choice(
        [*doomed.CALLS, "DEL_DEV_ASYNC", "DEL_DEV_ASYNC", "GET_DEV_INFO", "GET_DEV_INFO", "GET_FEATURES"]
    )
    most = {
        "GET_DEV_INFO": 200,
        "GET_FEATURES": 3,
        "INTENT": 4,
        "REPORT": 4,
        "CLAIM": 4,
        "DEL_DEV_ASYNC": 3,
        "STOP_DEV": 1,
    }
    doom = Doom(step, chance.randint(1, most[step]), chance.choice(doomed.PHASES))
    with contextlib.ExitStack() as stack:
        servers = stack.enter_context(_live(world, chance, 3))
        (recoverable,) = stack.enter_context(_live_recoverable(world))
        world.daemon.kill()
        is_early = chance.random() < 0.3
        if is_early:
            _kill_all(servers, recoverable)
        world.daemon.close()
        world.check_log(world.daemon, was_killed=True)
        world.daemon = world.start_daemon(doom=doom)
        is_up = world.daemon.wait_ready()
        if is_up and not is_early:
            wait_for(
                "the daemon has seen them, or is dead",
                lambda: world.daemon.has_ended() or _known_or_dead(world, servers),
                FREE_BY,
            )
            _kill_all(servers, recoverable)
        world.daemon.has_ended(6.0)
        is_met = world.daemon.has_ended()
        if is_met:
            world.killed_at[f"{doom.phase} {doom.step}"] += 1
        if not is_up:
            promise(f"it died of our hand: {world.daemon.log[-3000:]}", kept=world.daemon.status == -signal.SIGKILL)
        _kill_all(servers, recoverable)
        world.replace_daemon()
        world.until_free([*servers, *recoverable])
    return 1 + is_met + len(servers) + len(recoverable)


@contextlib.contextmanager
def _live_recoverable(world: World) -> Iterator[tuple[dict[int, NativeServer]]]:
    (dev_id,) = world.ids(1)
    with NativeServer("--id", str(dev_id), "--size", "1", "--recovery", *_unscanned(world)) as server:
        server.wait_for("LIVE")
        _wait_scanned(world, dev_id)
        yield ({dev_id: server},)


def _known_or_dead(world: World, servers: dict[int, NativeServer]) -> bool:
    try:
        return _known(world, servers)
    except (DuendeError, ViolationError):
        return world.daemon.has_ended(1.0)


def _kill_all(*groups: dict[int, NativeServer]) -> None:
    for group in groups:
        for server in group.values():
            server.kill()


def two_daemons(world: World, chance: random.Random) -> int:
    """One in the same place is refused by name; one in another (a container's) is a friend."""
    second = Daemon(world.cradle, world.home)
    promise("a second daemon ends by itself", kept=second.has_ended(SETTLED_BY))
    promise(f"it says that it was used wrongly, not {second.status}", kept=second.status == 2)
    named = f"another duende-ublkd runs already, as pid {world.daemon.pid}"
    promise(f"it names the first one: {second.log}", kept=named in second.log)
    second.close()
    friend = Daemon(world.cradle, world.home / "elsewhere")
    friend.must_be_ready()
    with _live(world, chance, BATCH) as servers:
        wait_for("both have seen them", lambda: _known(world, servers), FREE_BY)
        _kill_all(servers)
        world.until_free(servers)
        wait_for("what the friend has begun is over", lambda: not _unfinished_of(friend), SETTLED_BY)
    friend.end()
    world.check_log(friend)
    friend.close()
    return 1 + BATCH


def _unfinished_of(daemon: Daemon) -> bool:
    return any(each["verdict"] == "orphaned" for each in daemon.answers())


def blocked_daemon(world: World, chance: random.Random) -> int:
    """SIGSTOP of the daemon while servers die, and SIGCONT: what it hears is old."""
    with _live(world, chance, BATCH) as servers:
        world.daemon.signal(signal.SIGSTOP)
        _kill_all(servers)
        time.sleep(chance.choice([0.0, 0.2, 1.0]))  # how old it is
        world.daemon.signal(signal.SIGCONT)
        world.until_free(servers)
    return 1 + BATCH


def ring_shortage(world: World, chance: random.Random) -> int:
    """io_uring_submit says ENOMEM, EAGAIN or EBUSY, or no entry is to be had: at times, or for longer than a deadline."""
    is_long = chance.random() < 0.3
    spared = chance.randrange(20, 60)
    shortage = Shortage(
        spared, 400 if is_long else 60, 1.0 if is_long else chance.choice([0.2, 0.6, 0.9]), chance.randrange(1 << 30)
    )
    with _live(world, chance, 4) as servers:
        world.daemon.kill()
        world.daemon.close()
        world.daemon = world.start_daemon(shortage=shortage, deadline="2s")
        world.daemon.must_be_ready()
        _kill_all(servers)
        world.until_free(servers)
        world.check()
        world.replace_daemon()
    return 1 + len(servers)


# --- the machine around it --------------------------------------------------------------------------------------------


def uevent_flood(world: World, chance: random.Random) -> int:
    """More events than the socket's buffer can take, and deaths among them. Often the buffer is made small for it."""
    with contextlib.ExitStack() as stack:
        servers = stack.enter_context(_live(world, chance, 4))
        if chance.random() < 0.8:
            stack.enter_context(_small_buffer(world.daemon, 64 << 10))
        before = _drops(world.daemon)
        world.daemon.signal(signal.SIGSTOP)
        uevent = os.open(f"{SYSFS_CLASS}/ublkc{world.guards[0].dev_id}/uevent", os.O_WRONLY | os.O_CLOEXEC)
        stack.callback(os.close, uevent)
        for number in range(100_000):
            os.pwrite(uevent, b"change", 0)
            if not number % 500 and _drops(world.daemon) > before:
                break
        _kill_all(servers)
        world.daemon.signal(signal.SIGCONT)
        promise("the socket has overflowed", kept=_drops(world.daemon) > before)
        world.until_free(servers)
    return 1 + len(servers)


def _uevent_sockets(daemon: Daemon) -> dict[str, tuple[int, int]]:
    """inode -> (descriptor, messages that the kernel could not put into it) of the daemon's sockets of uevents (15)."""
    lines = (line.split() for line in Path("/proc/net/netlink").read_text().splitlines()[1:])
    drops = {fields[9]: int(fields[8]) for fields in lines if fields[1] == "15"}
    found = {}
    for entry in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inode = str(entry.readlink()).removeprefix("socket:[").removesuffix("]")
            if inode in drops:
                found[inode] = (int(entry.name), drops[inode])
    return found


def _drops(daemon: Daemon) -> int:
    return sum(count for _, count in _uevent_sockets(daemon).values())


@contextlib.contextmanager
def _small_buffer(daemon: Daemon, size: int) -> Iterator[None]:
    ((number, _),) = tuple(_uevent_sockets(daemon).values())[:1]
    pidfd = os.pidfd_open(daemon.pid)
    theirs = ctypes.CDLL(None, use_errno=True).syscall(_NR_PIDFD_GETFD, pidfd, number, 0)
    os.close(pidfd)
    promise(f"its socket can be had: {os.strerror(ctypes.get_errno())}", kept=theirs >= 0)
    with socket.socket(fileno=theirs) as shared:
        former = shared.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2  # the kernel keeps, and tells, the double
        shared.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
        try:
            yield
        finally:
            shared.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, former)


def module_reload(world: World, chance: random.Random) -> int:
    """The driver goes and comes under the running daemon, several times, with deaths in between."""
    world.drop_guards()
    for _ in range(2):
        wait_for("the module can be unloaded", _unload, SETTLED_BY)
        time.sleep(chance.choice([0.0, 0.3, 3.5]))  # for so long there is none
        world.daemon.answers()
        subprocess.run(["modprobe", "ublk_drv"], check=True)
        with _live(world, chance, 2) as servers:
            _kill_all(servers)
            world.until_free(servers)
    world.raise_guards()
    return 6


def _unload() -> bool:
    """Refused while somebody has the control device open, as the daemon has for the moment of a command."""
    return subprocess.run(["rmmod", "ublk_drv"], check=False, capture_output=True).returncode == 0


def clock_jump(world: World, chance: random.Random) -> int:
    """The wall clock is set by hours, there and back; whoever has just added a device keeps the grace that was promised."""
    jump = chance.choice([-1, 1]) * chance.uniform(0.5, 48) * _HOUR
    (young,) = world.ids(1)
    with _live(world, chance, 2) as servers:
        _set_clock_by(jump)
        with NativeServer("--id", str(young), "--stop-after", "params") as server:
            server.wait_for("PARAMS")
            added = time.monotonic()
            _kill_all(servers)
            if chance.random() < 0.5:
                _set_clock_by(-jump)
                jump = 0.0
            wait_for(
                "a device that nobody opens goes", lambda: not Path(f"{SYSFS_CLASS}/ublkc{young}").exists(), FREE_BY
            )
            lived = time.monotonic() - added
            promise(f"its server had its grace, not {lived:.3f} s", kept=lived > SETUP_GRACE * 0.9)
        world.until_free([young, *servers])
    _set_clock_by(-jump)
    return 2 + len(servers)


def _set_clock_by(seconds: float) -> None:
    time.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_REALTIME) + seconds)


def no_descriptors(world: World, chance: random.Random) -> int:
    """The daemon may open one file more than it has, or two, or none, while servers die."""
    with _live(world, chance, 4) as servers:
        former = resource.prlimit(world.daemon.pid, resource.RLIMIT_NOFILE)
        numbers = [int(entry.name) for entry in Path(f"/proc/{world.daemon.pid}/fd").iterdir()]
        limit = max(numbers) + 1 + chance.randrange(3)
        resource.prlimit(world.daemon.pid, resource.RLIMIT_NOFILE, (limit, former[1]))
        try:
            _kill_all(servers)
            time.sleep(chance.choice([0.5, 2.0, 4.0]))  # for so long it is short of them
            promise("it lives without descriptors", kept=not world.daemon.has_ended())
        finally:
            resource.prlimit(world.daemon.pid, resource.RLIMIT_NOFILE, former)
        world.until_free(servers)
    return 1 + len(servers)


def no_processes(world: World, chance: random.Random) -> int:
    """Neither it nor its children can fork, and one of its children is killed; servers die meanwhile."""
    group = Path("/sys/fs/cgroup/campaign")
    with contextlib.suppress(OSError):
        Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+pids")
    group.mkdir(exist_ok=True)
    for pid in family_of(world.daemon.pid):
        with contextlib.suppress(ProcessLookupError):
            group.joinpath("cgroup.procs").write_text(str(pid))
    with _live(world, chance, 4) as servers:
        now = int(group.joinpath("pids.current").read_text())
        group.joinpath("pids.max").write_text(str(now - chance.randrange(3)))
        children = [pid for pid in family_of(world.daemon.pid)[1:] if parent_of(pid) == world.daemon.pid]
        killed = chance.sample(children, 1) if children and chance.random() < 0.5 else []
        try:
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            _kill_all(servers)
            time.sleep(chance.choice([0.5, 2.0, 4.0]))  # for so long none can be made
            promise("it lives without processes", kept=not world.daemon.has_ended())
        finally:
            group.joinpath("pids.max").write_text("max")
        world.until_free(servers)
    if killed:  # others have taken its place, whose parent is not the daemon: all of them have to end with it
        world.check_log(world.daemon)
        world.renew_daemon()
    return 1 + len(killed) + len(servers)


# --- who is who -------------------------------------------------------------------------------------------------------


def id_reuse(world: World, chance: random.Random) -> int:
    """An orphan is deleted by hand, and its id is another server's at once: between two looks, or while it looks."""
    dev_ids = world.ids(4)
    is_unseen = chance.random() < 0.5
    servers = [NativeServer("--id", str(dev_id), "--size", "1") for dev_id in dev_ids]
    for server in servers:
        server.wait_for("LIVE")
    if is_unseen:
        world.daemon.signal(signal.SIGSTOP)
    again = []
    for dev_id, server in zip(dev_ids, servers, strict=True):
        server.kill()
        time.sleep(chance.choice([0.0, 0.05, 0.1, 0.15]))  # the daemon's grace is 0.1 s
        again.append(_take_id(dev_id))
    world.daemon.signal(signal.SIGCONT)
    world.daemon.signal(signal.SIGUSR1)
    for server in again:
        server.wait_for("LIVE")
    before = infos(dev_ids)
    time.sleep(1.0)  # for so long it may be taken for the former one
    promise("the new servers' devices are what they were", kept=infos(dev_ids) == before)
    promise("the new servers run", kept=all(server.is_running for server in again))
    for server in again:
        server.kill()
    world.until_free(dev_ids)
    return 2 * len(dev_ids)


def _take_id(dev_id: int) -> NativeServer:
    """As an eager supervisor does: delete whatever is there, and try until the id can be had."""
    until = time.monotonic() + FREE_BY
    while True:
        info = infos([dev_id])[dev_id]
        if info and info.state == KernelState.DEAD:
            subprocess.run(["batch_delete", str(dev_id)], check=False, capture_output=True)
        server = NativeServer("--id", str(dev_id), "--size", "1")
        try:
            server.wait_for("ADDED")
        except AssertionError:
            server.kill()
            promise(f"the id {dev_id} can be had again", kept=time.monotonic() < until)
        else:
            return server


def pid_reuse(world: World, chance: random.Random) -> int:
    """The number of a dead server is that of another process before the daemon looks."""
    with _live(world, chance, 1) as servers:
        wait_for("the daemon has seen it", lambda: _known(world, servers), FREE_BY)
        (server,) = servers.values()
        world.daemon.signal(signal.SIGSTOP)
        server.kill()
        impostor = _process_with(server.pid)
        try:
            world.daemon.signal(signal.SIGCONT)
            world.until_free(servers)
            promise("whoever has the number now is alive", kept=impostor.poll() is None)
        finally:
            impostor.kill()
            impostor.wait()
    return 2


def _process_with(pid: int) -> subprocess.Popen[bytes]:
    for _ in range(200):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        process = subprocess.Popen(["sleep", "1000"])
        if process.pid == pid:
            return process
        process.kill()
        process.wait()
    raise ViolationError(f"the pid {pid} is not to be had again")


def pid_namespace(world: World, chance: random.Random) -> int:
    """A server that is number 1 in a namespace of its own: unharmed while it lives, cleaned after when it is dead."""
    return _apart(world, chance, "--pid", "--fork", "--kill-child")


def mount_namespace(world: World, chance: random.Random) -> int:
    """A server with mounts of its own, and a /dev without nodes but its own."""
    return _apart(world, chance, "--mount", "--fork", "--kill-child")


def _apart(world: World, chance: random.Random, *unshare: str) -> int:
    dev_ids = world.ids(2)
    servers = [
        NativeServer(*unshare, "mini_server", "--id", str(dev_id), "--size", "1", program="unshare")
        for dev_id in dev_ids
    ]
    try:
        for server in servers:
            server.wait_for("LIVE")
        before = infos(dev_ids)
        time.sleep(chance.choice([1.0, 4.0]))  # more than any grace, and a full look
        world.daemon.signal(signal.SIGUSR1)
        world.daemon.answers()
        for dev_id in dev_ids:
            direct_read(block_device(dev_id), BLOCK)
        promise(f"what is served from another namespace stays: {before}", kept=infos(dev_ids) == before)
    finally:
        for server in servers:
            for pid in reversed(family_of(server.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            server.kill()
    world.until_free(dev_ids)
    return len(dev_ids)


def held_elsewhere(world: World, _chance: random.Random) -> int:
    """A file system that is mounted in another mount namespace holds the id of its dead device, until that one lets go."""
    (dev_id,) = world.ids(1)
    backing = world.home / f"fs{dev_id}"
    where = world.home / "elsewhere-mnt"
    where.mkdir(exist_ok=True)
    with NativeServer("--id", str(dev_id), "--size", "8", "--backing", str(backing)) as server:
        server.wait_for("LIVE")
        subprocess.run(["mkfs.ext4", "-q", str(block_device(dev_id))], check=True)
        script = f"mount -t ext4 {block_device(dev_id)} {where} && echo MOUNTED 0 && exec sleep 1000"
        with NativeServer("--mount", "sh", "-c", script, program="unshare") as elsewhere:
            elsewhere.wait_for("MOUNTED")
            server.kill()
            time.sleep(2.0)  # the daemon may delete it, and the id stays taken
            promise("its id is taken while it is mounted", kept=infos([dev_id])[dev_id] is not None)
    world.until_free([dev_id])
    backing.unlink()
    return 1


KINDS = (
    Kind("server-death", server_death, 0.26),
    Kind("live-death", live_death, 0.16, short=0),
    Kind("python-server-death", python_server_death, 0.015),
    Kind("recovery-death", recovery_death, 0.07),
    Kind("scan-death", scan_death, 0.0, short=0, most=0),
    Kind("stopped-server", stopped_server, 0.04),
    Kind("thousand-ids", thousand_ids, 0.001, short=0, most=1),
    Kind("daemon-death", daemon_death, 0.18),
    Kind("two-daemons", two_daemons, 0.025, short=0),
    Kind("blocked-daemon", blocked_daemon, 0.04, short=0),
    Kind("ring-shortage", ring_shortage, 0.04),
    Kind("uevent-flood", uevent_flood, 0.02),
    Kind("module-reload", module_reload, 0.025),
    Kind("clock-jump", clock_jump, 0.03),
    Kind("no-descriptors", no_descriptors, 0.03),
    Kind("no-processes", no_processes, 0.03),
    Kind("id-reuse", id_reuse, 0.04),
    Kind("pid-reuse", pid_reuse, 0.01),
    Kind("pid-namespace", pid_namespace, 0.01),
    Kind("mount-namespace", mount_namespace, 0.01),
    Kind("held-elsewhere", held_elsewhere, 0.005, short=0),
)
