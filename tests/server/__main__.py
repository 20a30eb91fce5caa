"""The command line of the test server, and a server's life from ADD_DEV to DEL_DEV.

Set-up (ADD, SET_PARAMS, open) and serving (FETCH, START, I/O) run in two event loops with a ring each, so that the
process can fork in between with nothing in flight: a worker that serves what its parent opened, or a helper that leaks
the file.
"""

import argparse
import asyncio
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from duende_ublkd.core.errors import BusyError, DuendeError
from duende_ublkd.core.model import DevInfo, Feature, feature_names
from duende_ublkd.kernel import abi
from duende_ublkd.kernel.control import Control
from duende_ublkd.kernel.ring import Ring
from tests.server.device import SECTOR, Device
from tests.server.script import STEPS, Console, Script
from tests.server.targets import NullTarget, RamTarget, Target

log = logging.getLogger("tests.server")

MIB = 1 << 20
MAX_IO_BYTES = 256 << 10
MAX_RING_ENTRIES = 4096
CONTROL_DEADLINE = 60.0  # STOP_DEV waits for I/O that a test may be holding back on purpose
SETTLE_DEADLINE = 10.0
RECOVERY_FLAGS = {
    "none": Feature(0),
    "queue": Feature.USER_RECOVERY,
    "reissue": Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE,
    "fail-io": Feature.USER_RECOVERY | Feature.USER_RECOVERY_FAIL_IO,
}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.log:
        logging.basicConfig(
            filename=options.log,
            level=logging.DEBUG,
            format=f"%(relativeCreated)6d {os.getpid()} %(message)s",
        )
    if options.unprivileged:
        _become(options.uid)
    script = Script(options.die_at, options.pause_at)
    try:
        if options.command in ("add", "recover"):
            return _run_server(options, script)
        return asyncio.run(_one_command(options, script))
    except (DuendeError, OSError) as error:
        script.say("failed", error=f"{type(error).__name__}: {error}")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.server", description="A ublk server for tests.")
    parser.add_argument("command", choices=("add", "recover", "stop", "delete", "quiesce"))
    which = parser.add_argument_group("which devices, and what they are")
    which.add_argument("--id", type=int, default=-1, help="-1: the lowest free id")
    which.add_argument("--devices", type=int, default=1, help="so many, with consecutive ids")
    which.add_argument("--target", choices=("null", "ram"), default="null")
    which.add_argument("--size", type=int, default=16, help="MiB")
    which.add_argument("--backing", type=Path, help="file of the ram target; with several devices PATH.ID")
    which.add_argument("--queues", type=int, default=1)
    which.add_argument("--depth", type=int, default=8)
    which.add_argument("--recovery", choices=RECOVERY_FLAGS, default="none")
    which.add_argument("--quiesce", action="store_true", help="with UBLK_F_QUIESCE")
    which.add_argument(
        "--unprivileged", action="store_true", help="as --uid; somebody must chown the nodes, as udev would"
    )
    which.add_argument("--uid", type=int, default=1000)
    which.add_argument("--part-scan", action="store_true", help="let the kernel scan, even if it could be told not to")
    how = parser.add_argument_group("how it behaves")
    how.add_argument("--die-at", choices=STEPS)
    how.add_argument("--pause-at", choices=STEPS, action="append", default=[])
    how.add_argument("--slow-io", type=float, default=0, metavar="MS")
    how.add_argument("--hold-io", action="store_true", help="answer no I/O after the start until told to `release`")
    how.add_argument("--exit-on-sigterm-with", choices=("stop,delete", "stop", "nothing"), default="stop,delete")
    how.add_argument("--fork-after-open", action="store_true", help="a forked worker serves, the opener exits")
    how.add_argument("--leak-fd", action="store_true", help="a forked helper keeps the char device open for ever")
    how.add_argument("--claim-pid", type=int, help="the pid told to START_DEV, as a server in a container would")
    how.add_argument("--log", type=Path, help="append what was done, each I/O included, to this file")
    return parser


def _become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _run_server(options: argparse.Namespace, script: Script) -> int:
    devices = asyncio.run(_set_up(options, script))
    if options.leak_fd:
        script.say("leaked", helper=_fork_helper())
    opener = _Opener(os.getpid())
    if options.fork_after_open:
        opener = _fork_worker()
        script.say("forked", opener=opener.pid)
    return asyncio.run(_serve(options, script, devices, opener))


@dataclass(frozen=True, slots=True)
class _Opener:
    """The process that opened the char devices; with a `leash` it is not the server, and lives while that is open."""

    pid: int
    leash: int | None = None

    async def dismiss(self) -> None:
        """Let it end, and wait until it is reaped. Not before START_DEV: since 6.17 the opener must be there."""
        if self.leash is not None:
            os.close(self.leash)
            await _until(lambda: not Path(f"/proc/{self.pid}").exists())


def _fork_worker() -> _Opener:
    """Returns in the worker only."""
    opener = os.getpid()
    leash, worker_end = os.pipe()
    if os.fork():
        os.close(worker_end)
        os.read(leash, 1)
        os._exit(0)
    os.close(leash)
    return _Opener(opener, worker_end)


def _fork_helper() -> int:
    """A child that inherits the open char devices and does nothing, deaf to the pipes of its parent."""
    helper = os.fork()
    if helper:
        return helper
    silence = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(silence, fd)
    while True:
        signal.pause()


async def _set_up(options: argparse.Namespace, script: Script) -> list[Device]:
    """Everything up to the open char devices."""
    ring = Ring(64)
    control = Control(ring, deadline=CONTROL_DEADLINE)
    console = Console({"go": script.go_on})
    if options.command == "add":
        devices = await _add_all(options, script, control)
    else:
        devices = await _take_over_all(options, script, control)
    for device in devices:
        device.open()
    await script.reach("after-open")
    console.close()
    await ring.close()
    return devices


async def _add_all(options: argparse.Namespace, script: Script, control: Control) -> list[Device]:
    devices = []
    flags = await _flags(options, control)
    for number in range(options.devices):
        dev_id = options.id + number if options.id >= 0 else -1
        info = await control.add_device(
            DevInfo(dev_id, 0, -1, flags, options.queues, options.depth, MAX_IO_BYTES),
        )
        script.dev_ids.append(info.dev_id)
        if flags & ~info.flags:
            raise DuendeError(f"the kernel refused the flags {feature_names(flags & ~info.flags)}")
        devices.append(Device(info, _target(options, info.dev_id, options.size * MIB)))
    await script.reach("after-add")
    for device in devices:
        if options.unprivileged:
            await _until(functools.partial(_is_ours, device))
        await control.set_params(device.dev_id, _params(device.target.size), via_node=options.unprivileged)
    await script.reach("after-params")
    return devices


async def _flags(options: argparse.Namespace, control: Control) -> int:
    flags = RECOVERY_FLAGS[options.recovery]
    if options.quiesce:
        flags |= Feature.QUIESCE
    if options.unprivileged:
        flags |= Feature.UNPRIVILEGED_DEV
    # A scan after START_DEV (6.18.4 and later) would be taken for the test's own I/O.
    if not options.part_scan and await control.features() & Feature.NO_AUTO_PART_SCAN:
        flags |= Feature.NO_AUTO_PART_SCAN
    return flags


def _params(size: int) -> bytes:
    basic = (abi.ATTR_VOLATILE_CACHE, 9, 12, 12, 9, MAX_IO_BYTES // SECTOR, 0, size // SECTOR, 0)
    discard = (0, 4096, 8 * MIB // SECTOR, 8 * MIB // SECTOR, 1, 0)
    length = abi.PARAMS_BASIC.size + abi.PARAMS_DISCARD.size
    types = abi.PARAM_TYPE_BASIC | abi.PARAM_TYPE_DISCARD
    return abi.PARAMS_BASIC.pack(length, types, *basic) + abi.PARAMS_DISCARD.pack(*discard)


def _target(options: argparse.Namespace, dev_id: int, size: int) -> Target:
    if options.target == "null":
        return NullTarget(size)
    backing: Path | None = options.backing
    if backing and options.devices > 1:
        backing = backing.with_name(f"{backing.name}.{dev_id}")
    return RamTarget(size, backing)


async def _until(predicate: Callable[[], bool]) -> None:
    async with asyncio.timeout(SETTLE_DEADLINE):
        while not predicate():
            await asyncio.sleep(0.005)


def _is_ours(device: Device) -> bool:
    """Whether udev, or who plays it, has given us the node."""
    return os.access(abi.CHAR_DEVICE.format(device.dev_id), os.R_OK | os.W_OK)


async def _take_over_all(options: argparse.Namespace, script: Script, control: Control) -> list[Device]:
    devices = []
    for dev_id in range(options.id, options.id + options.devices):
        busy = await _start_recovery(control, dev_id)
        if busy:
            script.say("was-busy", dev_id=dev_id, times=busy)
        info = await control.get_device_info(dev_id)
        params = await control.get_params(dev_id, abi.PARAMS_BASIC.size)
        sectors = abi.PARAMS_BASIC.unpack(params)[-2]
        script.dev_ids.append(dev_id)
        devices.append(Device(info, _target(options, dev_id, sectors * SECTOR)))
    await script.reach("after-start-recovery")
    return devices


async def _start_recovery(control: Control, dev_id: int) -> int:
    """START_USER_RECOVERY, waiting for the kernel to notice the death; how often it said EBUSY."""
    busy = 0
    async with asyncio.timeout(SETTLE_DEADLINE):
        while True:
            try:
                await control.start_user_recovery(dev_id)
            except BusyError:
                busy += 1
                await asyncio.sleep(0.005)
            else:
                return busy


class _Gate:
    """What every request passes before it is answered."""

    def __init__(self, options: argparse.Namespace, script: Script, tags: int) -> None:
        self._script = script
        self._tags = tags
        self._slow_for = options.slow_io / 1000
        self._flow = asyncio.Event()
        self._wait_for_all = script.cares_for("all-in-flight")
        if not (options.hold_io or self._wait_for_all):
            self._flow.set()
        self.started = False
        self.waiting = 0

    def hold(self) -> None:
        self._flow.clear()

    def release(self) -> None:
        self._flow.set()

    async def received(self) -> None:
        if not self.started:
            await self._script.reach_once("in-scan")
            return
        self.waiting += 1
        await self._script.reach_once("in-flight")
        if self.waiting == self._tags and self._wait_for_all:
            await self._script.reach_once("all-in-flight")
        if self._slow_for:
            await asyncio.sleep(self._slow_for)
        await self._flow.wait()
        self.waiting -= 1

    async def performed(self) -> None:
        if self.started:
            await self._script.reach_once("before-commit")


async def _serve(options: argparse.Namespace, script: Script, devices: list[Device], opener: _Opener) -> int:
    tags = sum(device.tags for device in devices)
    ring = Ring(_entries(tags + len(devices) + 16))
    control = Control(ring, deadline=CONTROL_DEADLINE)
    gate = _Gate(options, script, tags)
    told_to_stop: asyncio.Future[list[None]] = asyncio.get_running_loop().create_future()

    def stop() -> None:
        if not told_to_stop.done():
            told_to_stop.set_result([])

    def say_stats() -> None:
        served = {device.dev_id: dict(device.served) for device in devices}
        script.say("stats", served=served, waiting=gate.waiting)

    commands = {"go": script.go_on, "hold": gate.hold, "release": gate.release, "stats": say_stats}
    Console(commands | {"stop": stop})
    for device in devices:
        device.fetch(ring, gate)
    ended = asyncio.gather(*(device.ended() for device in devices))
    await _until_submitted(ring, tags, ended)
    await script.reach("after-fetch")
    await _start_all(options, script, control, gate, opener)
    await asyncio.wait((told_to_stop, ended), return_when=asyncio.FIRST_COMPLETED)
    if told_to_stop.done():
        gate.release()
        await _end(options, script, control, devices)
    else:
        await ended
        for device in devices:
            device.close()
        script.say("ended-by-others")
    await ring.close()
    return 0


def _entries(wanted: int) -> int:
    return min(MAX_RING_ENTRIES, max(64, 1 << (wanted - 1).bit_length()))


async def _until_submitted(ring: Ring, tags: int, ended: asyncio.Future[list[None]]) -> None:
    while ring.stats.in_flight < tags:
        if ended.done():
            ended.result()
            raise DuendeError("the kernel took back the FETCHes at once")
        await asyncio.sleep(0)


async def _start_all(
    options: argparse.Namespace, script: Script, control: Control, gate: _Gate, opener: _Opener
) -> None:
    pid = options.claim_pid or opener.pid
    if options.command == "recover":
        gate.started = True  # what was queued in the meantime arrives before END_USER_RECOVERY has answered
        for dev_id in script.dev_ids:
            await control.end_user_recovery(dev_id, pid)
        await opener.dismiss()
        await script.reach("after-recovery")
        return
    for dev_id in script.dev_ids:
        await control.start_device(dev_id, pid, via_node=options.unprivileged)
    gate.started = True
    await opener.dismiss()
    await script.reach("after-start")


async def _end(options: argparse.Namespace, script: Script, control: Control, devices: list[Device]) -> None:
    """End as told, serving until the last disk is gone: STOP_DEV waits for the I/O in flight."""
    if options.exit_on_sigterm_with == "nothing":
        script.say("exit")
        os._exit(0)
    for device in devices:
        await control.stop_device(device.dev_id, via_node=options.unprivileged)
    await script.reach("after-stop")
    for device in devices:
        await device.ended()
        device.close()
    await script.reach("after-close")
    if options.exit_on_sigterm_with == "stop,delete":
        for device in devices:
            await control.delete_device(device.dev_id, via_node=options.unprivileged)
        await script.reach("after-delete")


async def _one_command(options: argparse.Namespace, script: Script) -> int:
    ring = Ring(64)
    control = Control(ring, deadline=CONTROL_DEADLINE)
    script.dev_ids.append(options.id)
    if options.command == "stop":
        await control.stop_device(options.id, via_node=options.unprivileged)
    elif options.command == "delete":
        await control.delete_device(options.id, via_node=options.unprivileged)
    else:
        await control.quiesce_device(options.id, int(SETTLE_DEADLINE * 1000), via_node=options.unprivileged)
    script.say("done", command=options.command)
    await ring.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
