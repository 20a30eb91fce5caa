"""The Python interface where there is no driver; what it does with devices is for the guest's tests."""

import asyncio
import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import duende_ublkd
from duende_ublkd import (
    ConfigError,
    DuendeError,
    KernelUnavailableError,
    UblkControl,
    UsageError,
    VerdictKind,
    cleanup_orphaned_devices,
    detect_orphaned_devices,
    interface,
    once,
)
from duende_ublkd.core.config import Config
from duende_ublkd.core.errors import ExitCode
from duende_ublkd.core.holds import Hold, Holds
from duende_ublkd.kernel import holdfile
from duende_ublkd.kernel.holders import is_gone
from duende_ublkd.parts import Parts
from duende_ublkd.reconcile import Agenda, Reconciler
from tests.fake_kernel import FakeKernel, Instance, run

without_ublk = pytest.mark.skipif(
    Path("/dev/ublk-control").exists(), reason="this machine has ublk: the guest's tests cover it"
)

CALLS: dict[str, Callable[[], object]] = {
    "open": UblkControl.open,
    "get_device_info": lambda: UblkControl().get_device_info(3),
    "stop_device": lambda: UblkControl().stop_device(3),
    "delete_device": lambda: UblkControl().delete_device(3),
    "force_delete": lambda: UblkControl().force_delete(3),
    "detect": detect_orphaned_devices,
    "cleanup": cleanup_orphaned_devices,
    "cleanup_now": lambda: cleanup_orphaned_devices([3], now=True),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tasks() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}


def descriptors() -> list[str]:
    """Every open file, but the one that reads the list."""
    found = []
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(f"{each.name} {each.readlink()}")
    return sorted(found)


def test_importing_the_package_imports_nothing_else() -> None:
    program = (
        "import sys; before = set(sys.modules); import duende_ublkd; duende_ublkd.__version__; "
        "print(*sorted(set(sys.modules) - before))"
    )
    assert python(program).split() == ["duende_ublkd"]


def test_an_error_class_can_be_had_without_an_event_loop_and_without_the_binding() -> None:
    loaded = python("import sys; from duende_ublkd import BusyError, DevInfo; print(*sorted(sys.modules))").split()
    assert "duende_ublkd.core.errors" in loaded
    assert not {"asyncio", "liburing", "duende_ublkd.interface"} & set(loaded)


def test_every_name_that_is_promised_is_there() -> None:
    for name in duende_ublkd.__all__:
        assert getattr(duende_ublkd, name).__name__ == name
        assert getattr(duende_ublkd, name).__module__ in (
            "duende_ublkd.interface",
            "duende_ublkd.core.errors",
            "duende_ublkd.core.model",
        )
    assert set(duende_ublkd.__all__) <= set(dir(duende_ublkd))


def test_a_name_that_is_not_there_is_an_attribute_error_and_a_module_can_still_be_imported_from_it() -> None:
    assert not hasattr(duende_ublkd, "delete_everything")
    assert python("from duende_ublkd import parts; print(parts.__name__)").strip() == "duende_ublkd.parts"


@without_ublk
@each_call
def test_without_the_driver_each_call_says_how_to_load_it(call: Callable[[], object]) -> None:
    with pytest.raises(KernelUnavailableError, match="/dev/ublk-control is missing") as told:
        call()
    assert "modprobe ublk_drv" in told.value.hint
    assert told.value.no_driver
    assert told.value.exit_code is ExitCode.NO_KERNEL


@without_ublk
@each_call
def test_a_call_leaves_no_descriptor_and_no_thread(call: Callable[[], object]) -> None:
    with pytest.raises(KernelUnavailableError):
        call()
    before = descriptors(), tasks()
    for _ in range(20):
        with pytest.raises(KernelUnavailableError):
            call()
        assert tasks() == before[1]
    assert descriptors() == before[0]


@without_ublk
@each_call
def test_a_call_works_in_a_thread_whose_event_loop_runs(call: Callable[[], object]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(KernelUnavailableError):
            call()
        assert asyncio.get_running_loop() is loop

    asyncio.run(main())


@pytest.mark.parametrize("dev_id", [-1, 1 << 20, True, "3", None, 3.0])
def test_what_is_no_id_is_refused_before_anything_is_asked(dev_id: int) -> None:
    control = UblkControl()
    for call in (control.get_device_info, control.stop_device, control.delete_device, control.force_delete):
        with pytest.raises(UsageError, match="is not the id of a ublk device"):
            call(dev_id)
    with pytest.raises(UsageError, match="is not the id of a ublk device"):
        cleanup_orphaned_devices([dev_id])


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), float("inf"), 601])
def test_a_deadline_that_is_none_is_refused(deadline: float) -> None:
    with pytest.raises(UsageError, match="a deadline of"):
        UblkControl.open(deadline=deadline)


def test_a_closed_control_takes_no_calls() -> None:
    with UblkControl() as control:
        pass
    for call in (control.get_device_info, control.stop_device, control.delete_device, control.force_delete):
        with pytest.raises(RuntimeError, match="is closed"):
            call(3)


def test_now_takes_ids() -> None:
    with pytest.raises(UsageError, match="now=True takes the ids"):
        cleanup_orphaned_devices(now=True)


def test_a_wrong_configuration_is_an_error_and_nothing_is_cleaned(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[policy]\norphan_grase = '1s'\n")
    for path in (config, str(config)):
        with pytest.raises(ConfigError, match=r"config\.toml:2: "):
            cleanup_orphaned_devices(config=path)
        with pytest.raises(ConfigError, match=r"config\.toml:2: "):
            detect_orphaned_devices(config=path)


# What a call does with its loop and its thread, whatever it is for.


def test_the_parts_of_a_call_are_given_back_with_every_thread_and_descriptor() -> None:
    """A ring, a sweeper and a nursery with its children: what the largest call makes."""

    async def make() -> int:
        deeds = interface._Deeds()
        parts = Parts(Config(), (deeds,), one_shot=True)
        try:
            parts.children.start()
            await parts.sweeper.inspect([os.getpid()], 2.0)
            assert len(tasks()) > 2
            return parts.children.nursery_pid or 0
        finally:
            await parts.close()
            assert parts.sweeper.join(10.0)

    interface._have_done(make, 1.0)
    before = descriptors(), tasks()
    for _ in range(3):
        nursery = interface._have_done(make, 1.0)
        assert tasks() == before[1]
        assert not Path(f"/proc/{nursery}").exists()
    assert descriptors() == before[0]


def test_an_error_of_a_call_is_the_callers() -> None:
    async def fail() -> None:
        raise ZeroDivisionError("a defect")

    with pytest.raises(ZeroDivisionError, match="a defect"):
        interface._have_done(fail, 1.0)


def test_an_interrupted_call_ends_gives_everything_back_and_passes_the_interruption_on() -> None:
    begun, undone = threading.Event(), threading.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            undone.set()

    def interrupt() -> None:
        assert begun.wait(30)
        os.kill(os.getpid(), signal.SIGINT)

    before = descriptors(), tasks()
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        interface._have_done(work, 1.0)
    interrupter.join()
    assert is_gone(interrupter, 10.0)
    assert undone.is_set()
    assert (descriptors(), tasks()) == before


def test_a_call_that_is_interrupted_before_it_began_does_nothing() -> None:
    ran = []

    async def work() -> None:
        ran.append(True)

    call = interface._Call(work)
    call._is_given_up = True
    call.start()
    call.wait(30)
    with pytest.raises(asyncio.CancelledError):
        call.result()
    assert not ran


def test_a_call_whose_thread_is_stuck_is_waited_for_up_to_its_limit_and_then_does_nothing_more() -> None:
    stuck, went_on = threading.Event(), []

    async def work() -> None:
        stuck.wait()
        await asyncio.sleep(0)
        went_on.append(True)

    call = interface._Call(work)
    call.start()
    began = time.monotonic()
    with pytest.raises(DuendeError, match=r"has not come to its end for 0\.2 s"):
        call.wait(0.2)
    assert time.monotonic() - began < 2
    releasing = threading.Timer(0.2, stuck.set)
    releasing.start()
    call.give_up()
    releasing.join()
    with pytest.raises(asyncio.CancelledError):
        call.result()
    assert not went_on


def test_calls_of_several_threads_do_not_meet() -> None:
    def call(number: int) -> tuple[int, str]:
        async def work() -> tuple[int, str]:
            await asyncio.sleep(0.01 * (8 - number))
            return number, threading.current_thread().name

        return interface._have_done(work, 1.0)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, range(8))) == [(number, "duende-ublkd") for number in range(8)]


def test_a_process_may_fork_after_a_call() -> None:
    """No other thread is there that could hold a lock at that moment; Python 3.12 warns of one."""
    program = (
        "import os, warnings; warnings.simplefilter('error')\n"
        "from duende_ublkd import DuendeError, UblkControl\n"
        "for _ in range(5):\n"
        "    try: UblkControl.open(); raise SystemExit('there is a driver')\n"
        "    except DuendeError: pass\n"
        "    pid = os.fork()\n"
        "    if not pid: os._exit(0)\n"
        "    assert os.waitpid(pid, 0)[1] == 0\n"
    )
    if Path("/dev/ublk-control").exists():
        program = program.replace("raise SystemExit('there is a driver')", "pass")
    python(program)


def test_where_no_thread_can_be_made_a_call_says_so_at_once() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody who has a limit")
    program = (
        "import os, resource\n"
        "from duende_ublkd import DuendeError, UblkControl\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))\n"
        "os.setuid(65534)\n"
        "try: UblkControl.open()\n"
        "except DuendeError as error: print(error, '|', error.hint)\n"
    )
    assert "no thread can be started | look at: ulimit -u" in python(program)


# What a call waits for, on the fake kernel in virtual time


@dataclass
class Bench:
    """What `settle` is given, but for the kernel; what it is told of holds is in `directory`."""

    kernel: FakeKernel
    directory: Path
    agenda: Agenda = field(default_factory=Agenda)

    def __post_init__(self) -> None:
        self.kernel.hints_lost = True  # a call hears none
        self.directory.mkdir()
        clock = asyncio.get_running_loop().time
        self.reconciler = Reconciler(
            self.kernel, Config(), interface._Deeds(), self.agenda, without_grace=[0], only_orphans=True, clock=clock
        )

    def orphan(self) -> Instance:
        device = self.kernel.serve()
        self.kernel.kill(device.openers[0])
        return device

    def hold(self, dev_id: int) -> None:
        now = asyncio.get_running_loop().time()
        record = Holds([Hold(dev_id, now, now + 600.0, 0, "an upgrade")]).to_record(holdfile.boot_id())
        holdfile.write(str(self.directory), record)


@pytest.fixture
def on_the_bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Bench], Coroutine[None, None, None]]], None]:
    directory = tmp_path / "duende-ublkd"
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(directory))

    async def main(test: Callable[[Bench], Coroutine[None, None, None]]) -> None:
        await test(Bench(FakeKernel(asyncio.get_running_loop()), directory))

    return lambda test: run(main(test))


OnTheBench = Callable[[Callable[[Bench], Coroutine[None, None, None]]], None]


def test_a_device_that_somebody_has_open_for_a_moment_is_tried_again(on_the_bench: OnTheBench) -> None:
    async def test(bench: Bench) -> None:
        orphan = bench.orphan()
        await asyncio.sleep(100)
        orphan.claimed = True  # by the daemon, or by whoever probes
        asyncio.get_running_loop().call_later(0.05, setattr, orphan, "claimed", False)
        await once.settle(bench, {0}, act=True)
        assert not bench.kernel.taken

    on_the_bench(test)


def test_what_was_done_is_looked_at_once_more_however_late_it_is(
    on_the_bench: OnTheBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(once, "SETTLE_FOR", 0.0)

    async def test(bench: Bench) -> None:
        bench.orphan().claimed = True
        await asyncio.sleep(100)
        await once.settle(bench, {0}, act=True)
        assert "somebody who cannot be seen has its char device open" in bench.reconciler.devices[0].verdict.reason

    on_the_bench(test)


def test_looking_touches_nothing(on_the_bench: OnTheBench) -> None:
    async def test(bench: Bench) -> None:
        bench.orphan()
        await asyncio.sleep(100)
        await once.settle(bench, None, act=False)
        assert bench.reconciler.devices[0].verdict.kind is VerdictKind.ORPHANED
        assert bench.kernel.taken

    on_the_bench(test)


def test_a_look_does_not_wait_for_whoever_has_it_open(on_the_bench: OnTheBench) -> None:
    async def test(bench: Bench) -> None:
        device = bench.kernel.serve()
        bench.kernel.stop(device)  # and its server keeps it open
        began = asyncio.get_running_loop().time()
        await once.settle(bench, None, act=False)
        assert asyncio.get_running_loop().time() - began < 0.1

    on_the_bench(test)


def test_a_device_that_never_makes_up_its_mind_is_waited_for_up_to_the_limit(on_the_bench: OnTheBench) -> None:
    async def test(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        bench.kernel.serve()
        restless = bench.kernel.serve()
        await bench.reconciler.run_pass(None)  # sees it LIVE, so that it has the shorter grace
        bench.kernel.kill(restless.openers[0])

        stranger = bench.kernel.process()

        def open_it() -> None:
            bench.kernel.open(restless, stranger)
            loop.call_later(0.6, close_it)

        def close_it() -> None:
            bench.kernel.close(restless, stranger)
            loop.call_later(0.1, open_it)

        loop.call_later(0.1, open_it)
        began = loop.time()
        async with asyncio.timeout(10 * once.SETTLE_FOR):
            await once.settle(bench, {restless.dev_id}, act=True)
        assert once.SETTLE_FOR <= loop.time() - began < once.SETTLE_FOR + once.SHORT_WAIT
        assert restless.dev_id in bench.kernel.taken

    on_the_bench(test)


def test_what_is_on_hold_is_left_and_what_is_held_while_it_is_waited_for_too(on_the_bench: OnTheBench) -> None:
    async def test(bench: Bench) -> None:
        orphan = bench.orphan()
        await asyncio.sleep(100)
        bench.hold(0)
        await once.settle(bench, {0}, act=True)
        assert bench.kernel.taken
        assert "on hold" in bench.reconciler.devices[0].verdict.reason
        (bench.directory / holdfile.NAME).unlink()
        orphan.claimed = True  # so that it is looked at once more
        asyncio.get_running_loop().call_later(0.05, setattr, orphan, "claimed", False)
        asyncio.get_running_loop().call_later(0.02, bench.hold, 0)
        await once.settle(bench, {0}, act=True)
        assert bench.kernel.taken
        (bench.directory / holdfile.NAME).unlink()
        await once.settle(bench, {0}, act=True)
        assert not bench.kernel.taken

    on_the_bench(test)


def test_when_nobody_knows_what_is_on_hold_nothing_is_done(on_the_bench: OnTheBench) -> None:
    async def test(bench: Bench) -> None:
        bench.orphan()
        await asyncio.sleep(100)
        (bench.directory / holdfile.NAME).write_text("[]")
        with pytest.raises(DuendeError, match="nobody knows which devices are on hold"):
            await once.settle(bench, {0}, act=True)
        assert bench.kernel.taken

    on_the_bench(test)


def test_a_defect_in_a_deletion_is_not_swallowed(on_the_bench: OnTheBench) -> None:
    async def test(bench: Bench) -> None:
        bench.orphan()
        await asyncio.sleep(100)
        bench.agenda.fail(ZeroDivisionError("a defect"))
        with pytest.raises(ZeroDivisionError):
            await once.settle(bench, {0}, act=True)

    on_the_bench(test)


# Memory


@pytest.mark.parametrize("small", [False, True])
def test_memory_is_locked_and_threads_are_small_only_when_asked_for(*, small: bool) -> None:
    program = (
        "import threading, duende_ublkd\n"
        "from duende_ublkd.kernel.memory import locked_bytes\n"
        f"duende_ublkd.lock_memory(small_threads={small})\n"
        "print(threading.stack_size(), locked_bytes())\n"
    )
    stack, locked = map(int, python(program).split())
    assert stack == (256 << 10 if small else 0)
    assert locked > 5 << 20


def test_a_limit_on_locked_memory_is_named() -> None:
    program = (
        "import os, resource, duende_ublkd\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))\n"
        "duende_ublkd.lock_memory  # imported as root: its files may not be everybody's\n"
        "os.setuid(65534)\n"
        "try: duende_ublkd.lock_memory()\n"
        "except duende_ublkd.DuendeError as error: print(error, '|', error.hint)\n"
    )
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody who has a limit")
    told = python(program)
    assert "memory cannot be locked" in told
    assert "ulimit -l unlimited" in told
