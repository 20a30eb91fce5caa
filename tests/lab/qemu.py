"""Boot a guest, run one command in it, bring back its exit status, its output and the files that it left in /results.

The first serial port is the guest's console, live; the second carries the results, because a console that kernel
messages break into is no place for data. Every run has a time limit and no QEMU outlives its parent.

A boot that ends before the guest's first own line is the emulator's fault and is tried again; all that comes later, a
kernel panic included, is the test's.
"""

import base64
import binascii
import io
import json
import os
import platform
import re
import selectors
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.lab import image
from tests.lab.cache import cache_dir, locked
from tests.lab.errors import LabError, need_tool
from tests.lab.kernels import Kernel

GUEST_UP = "LAB: guest up"
GUEST_DOWN = "LAB: guest down"
BOOTS = 3
# Measured: 8 s to the first line on an idle core, 60 s with five guests on two.
BOOT_LIMIT_S = 300.0
KVM_PROBE_LIMIT_S = 20.0
POWER_OFF_LIMIT_S = 15.0
NO_RESULT = 125
TIMED_OUT = 124
# -cpu max, and TCG with a thread for each CPU, now and then panic the guest in early boot (an int3 trap in jump-label
# patching).
ACCELERATORS = {
    "kvm": ["-accel", "kvm", "-cpu", "host"],
    "tcg": [
        *("-accel", "tcg,thread=single"),
        *("-cpu", "Haswell-v4,-pcid,-x2apic,-tsc-deadline,-invpcid,-spec-ctrl"),  # what TCG warns that it lacks
    ],
}
# An emulated CPU that waits for its turn on the host looks locked up to the watchdog.
COMMAND_LINE = "console=ttyS0 quiet panic=-1 mitigations=off nowatchdog random.trust_cpu=on"
KERNEL_FAULT = re.compile(
    r"\[ *\d+\.\d{6}\](?:\[[^\]]*\])? "  # what a test prints has no kernel time before it
    r"((?:[\w ]+: )?(?:BUG: |Oops|Kernel panic|general protection fault|refcount_t: |list_(?:add|del) corruption).*)"
)


@dataclass(frozen=True)
class GuestResult:
    exit_status: int
    output: str
    files: Mapping[str, bytes]
    boots: int
    seconds: float
    kernel_faults: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.exit_status == 0 and not self.kernel_faults


def run(
    kernel: Kernel,
    command: list[str],
    *,
    timeout_s: float,
    memory: str = "2G",
    cpus: int = 2,
    accel: str | None = None,
    on_output: Callable[[str], None] = lambda _: None,
    environment: Mapping[str, str] | None = None,
    extras: Mapping[str, Path] | None = None,
    hardware: Sequence[str] = (),
) -> GuestResult:
    """`accel` is kvm or tcg; without it, what works here. `hardware`: more of QEMU's own arguments."""
    started = time.monotonic()
    accel = accel or accelerator(kernel)
    with tempfile.TemporaryDirectory(prefix="duende-lab-") as scratch:
        initrd = Path(scratch, "initrd")
        image.build(kernel, command, initrd, environment=guest_environment(kernel, environment), extras=extras)
        for boot in range(1, BOOTS + 1):
            machine = _Machine(kernel, initrd, accel, memory, cpus, Path(scratch, "results"), tuple(hardware))
            outcome = machine.run(timeout_s, on_output)
            if outcome.came_up:
                return outcome.result(boot, time.monotonic() - started)
            on_output(f"\nLAB: boot {boot} of {BOOTS} died under {accel} before the guest's first line\n")
            accel = "tcg"
    raise LabError(
        f"no guest came up in {BOOTS} boots of {kernel.version}; the last one said:\n{outcome.output[-2000:]}",
        "boot again; if it stays so, try another QEMU, or DUENDE_LAB_ACCEL=kvm or tcg",
    )


def guest_environment(kernel: Kernel, more: Mapping[str, str] | None) -> dict[str, str]:
    return {
        "DUENDE_IN_GUEST": "1",
        "DUENDE_LAB_KERNEL_VERSION": kernel.version,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "TERM": "dumb",
        **(more or {}),
    }


def run_interactive(
    kernel: Kernel,
    command: list[str],
    *,
    environment: Mapping[str, str] | None = None,
    extras: Mapping[str, Path] | None = None,
) -> int:
    """The guest's console is the caller's terminal; Ctrl-A x ends it by force."""
    with tempfile.TemporaryDirectory(prefix="duende-lab-") as scratch:
        initrd = Path(scratch, "initrd")
        told = guest_environment(kernel, environment)
        image.build(kernel, command, initrd, environment=told, extras=extras, interactive=True)
        machine = _Machine(kernel, initrd, accelerator(kernel), "2G", 2, Path(scratch, "results"))
        with _killed_at_exit(machine.command("stdio,id=console,signal=off,mux=on")) as process:
            process.wait()
        return read_results(Path(scratch, "results"))[0]


def accelerator(kernel: Kernel) -> str:
    """KVM only where a guest has come up under it: /dev/kvm may exist and still not run a stock kernel."""
    chosen = os.environ.get("DUENDE_LAB_ACCEL")
    if chosen:
        if chosen not in ACCELERATORS:
            raise LabError(f"DUENDE_LAB_ACCEL={chosen} is not known", f"one of: {', '.join(ACCELERATORS)}")
        return chosen
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    version = subprocess.run([need_tool("qemu-system-x86_64"), "--version"], check=True, capture_output=True, text=True)
    asked = f"{platform.release()}, {version.stdout.splitlines()[0]}, guest {kernel.version}"
    answers = cache_dir() / "kvm.json"
    with locked("kvm"):
        known: dict[str, bool] = json.loads(answers.read_text()) if answers.is_file() else {}
        if asked not in known:
            known[asked] = _kvm_boots(kernel)
            answers.with_suffix(".new").write_text(json.dumps(known, indent=2))
            answers.with_suffix(".new").rename(answers)
    return "kvm" if known[asked] else "tcg"


def _kvm_boots(kernel: Kernel) -> bool:
    print(f"trying KVM (at most {KVM_PROBE_LIMIT_S:.0f} s, once)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="duende-lab-") as scratch:
        initrd = Path(scratch, "initrd")
        image.build_probe(initrd)
        machine = _Machine(kernel, initrd, "kvm", "512M", 2, Path(scratch, "results"))
        return machine.run(KVM_PROBE_LIMIT_S, lambda _: None).came_up


class _Limit:
    """A deadline that moves as the guest gets on."""

    def __init__(self, seconds: float) -> None:
        self._started = time.monotonic()
        self.seconds = seconds

    def elapsed(self) -> float:
        return time.monotonic() - self._started

    def left(self) -> float:
        return self.seconds - self.elapsed()


@dataclass
class _Outcome:
    results: Path
    output: str = ""
    came_up: bool = False
    went_down: bool = False
    timed_out: bool = False

    def result(self, boots: int, seconds: float) -> GuestResult:
        status, files = read_results(self.results)
        if status == NO_RESULT and self.timed_out:
            status = TIMED_OUT
        log = self.output + files.get("dmesg", b"").decode(errors="replace")
        faults = tuple(dict.fromkeys(found.strip() for found in KERNEL_FAULT.findall(log)))
        return GuestResult(status, self.output, files, boots, seconds, faults)


@dataclass(frozen=True)
class _Machine:
    kernel: Kernel
    initrd: Path
    accel: str
    memory: str
    cpus: int
    results: Path
    hardware: tuple[str, ...] = ()

    def command(self, console: str) -> list[str]:
        return [
            *(need_tool("qemu-system-x86_64"), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *(*ACCELERATORS[self.accel], "-m", self.memory, "-smp", str(self.cpus)),
            *("-kernel", str(self.kernel.vmlinuz), "-initrd", str(self.initrd), "-append", COMMAND_LINE),
            *("-chardev", console, "-serial", "chardev:console"),
            *("-chardev", f"file,id=results,path={self.results}", "-serial", "chardev:results"),
            *self.hardware,
        ]

    def run(self, timeout_s: float, on_output: Callable[[str], None]) -> _Outcome:
        outcome = _Outcome(self.results)
        limit = _Limit(min(BOOT_LIMIT_S, timeout_s))
        with _killed_at_exit(self.command("stdio,id=console,signal=on"), stdin=subprocess.DEVNULL) as process:
            for text in _texts_until(process, limit):
                outcome.output += text
                if not outcome.came_up and GUEST_UP in outcome.output:
                    outcome.came_up = True
                    limit.seconds = timeout_s
                if not outcome.went_down and GUEST_DOWN in outcome.output[-1000:]:
                    outcome.went_down = True
                    limit.seconds = limit.elapsed() + POWER_OFF_LIMIT_S
                on_output(text)
            if process.poll() is None and not outcome.went_down:
                outcome.timed_out = True
                text = f"\nLAB: time limit of {limit.seconds:.0f} s is over\n"
                outcome.output += text
                on_output(text)
        return outcome


@contextmanager
def _killed_at_exit(command: list[str], *, stdin: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """In its own session, so that Ctrl-C reaches us and not QEMU; dead with us, however we die."""
    batch = stdin is not None
    with subprocess.Popen(
        [need_tool("setpriv"), "--pdeathsig", "KILL", *command],
        stdin=stdin,
        stdout=subprocess.PIPE if batch else None,
        stderr=subprocess.STDOUT if batch else None,
        start_new_session=batch,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _texts_until(process: subprocess.Popen[bytes], limit: _Limit) -> Iterator[str]:
    """What the process says, as it says it, until it ends or the limit (which may move) is over."""
    if process.stdout is None:
        return
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := limit.left()) > 0:
            if selector.select(left):
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if not chunk:
                    process.wait(max(limit.left(), 1))
                    return
                yield chunk.decode(errors="replace").replace("\r\n", "\n")


def read_results(path: Path) -> tuple[int, dict[str, bytes]]:
    text = path.read_text(errors="replace") if path.is_file() else ""
    whole = re.search(r"status (\d+)\s+([A-Za-z0-9+/=\s]*?)\s+end\s*\Z", text)
    if not whole:
        return NO_RESULT, {}
    try:
        packed = base64.b64decode(whole[2], validate=False)
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            files = {
                member.name.removeprefix("./"): content.read()
                for member in archive
                if (content := archive.extractfile(member)) is not None
            }
    except (binascii.Error, tarfile.TarError, EOFError):
        return NO_RESULT, {}
    return int(whole[1]), files
