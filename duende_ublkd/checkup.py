"""What of a machine keeps ublk, or the daemon, from doing what it should: judged from what was read of it.

Rules:
1. These judges take what was read and return findings. They read nothing and ask nobody.
2. From WARNING on a person has to do something, and the hint says what to type. What nobody can do anything about today is
   a note, however bad it is, so that the command's exit code stays of use.
3. A finding's `id` is a name that programs rely on; its sentence may change. What is not known is no finding of its own,
   unless something depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from duende_ublkd import __version__
from duende_ublkd.core import known_kernels
from duende_ublkd.core.config import OnUnserved
from duende_ublkd.core.errors import ExitCode
from duende_ublkd.core.known_kernels import Answer, Basis, Severity
from duende_ublkd.core.model import Feature, feature_names
from duende_ublkd.core.text import printable
from duende_ublkd.kernel.survey import UNLIMITED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from duende_ublkd.core.config import Config
    from duende_ublkd.core.known_kernels import Kernel
    from duende_ublkd.core.model import DriverFacts
    from duende_ublkd.kernel.survey import Machine, Node, Process, Swap

NEEDED_MEMORY = 64 << 20  # bytes that the daemon locks, generously
_FULL = 0.9  # of a limit
_OK, _NOTE, _WARNING, _CRITICAL = Severity.OK, Severity.NOTE, Severity.WARNING, Severity.CRITICAL


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found out. `means`: an exit code of its own, whatever the level."""

    id: str
    group: str
    level: Severity
    text: str
    hint: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    means: ExitCode = ExitCode.DONE


@dataclass(frozen=True, slots=True)
class Device:
    """A ublk device, as far as it matters here. `flags` None: it did not answer."""

    dev_id: int
    flags: int | None
    unserved: OnUnserved = OnUnserved.ALERT  # what its policy does without a server
    server: str = ""  # `812 (nbdublk)`
    memory: Process | None = None  # of that server
    mounts: tuple[str, ...] = ()
    has_node: bool = True
    overdue: str = ""

    def has(self, feature: Feature) -> bool:
        """It was added with this flag."""
        return bool(self.flags and self.flags & feature)


@dataclass(frozen=True, slots=True)
class DriverAnswer:
    """What the driver told. `trouble`: why it told nothing; then `hint`."""

    trouble: str = ""
    hint: str = ""
    ring_trouble: str = ""
    ring_hint: str = ""
    is_confined: bool | None = None  # whether the kernel let the ring be restricted; None: there is no ring
    facts: DriverFacts | None = None
    devices: tuple[Device, ...] = ()


@dataclass(frozen=True, slots=True)
class DaemonAnswer:
    """What a running daemon told over its socket. `is_there`: somebody listens."""

    is_there: bool = False
    trouble: str = ""
    hint: str = ""
    is_ready: bool = True
    journal: str = ""  # what is wrong with it
    version: str = ""
    overdue: int = 0  # commands


def survey_is_stuck(seconds: float) -> Finding:
    """Nothing is known of the machine."""
    text = f"reading /proc and /sys is not done after {seconds:g} s, so most of this machine is not known"
    return Finding("survey", "surroundings", _CRITICAL, text, "dmesg | tail; ps -eo pid,stat,wchan,comm | grep ' D'")


# --- the kernel and its driver


def kernel_findings(kernel: Kernel, *, has_driver: bool) -> list[Finding]:
    """Which build runs, whether it can be judged, and which known bugs it has."""
    facts = {
        "release": kernel.release,
        "vendor": kernel.vendor,
        "package": kernel.package,
        "basis": kernel.basis.value,
        "version": known_kernels.version_text(kernel.version) if kernel.version else None,
    }
    text, level, hint = f"{kernel} runs", _OK, ""
    if kernel.version is None:
        level, text = _NOTE, f"{kernel}: there is no version number in that, so that it cannot be judged"
        hint = "cat /proc/version  # the known bugs, with their versions, are in duende_ublkd/core/known_kernels.py"
    elif kernel.basis is Basis.UNKNOWN:
        level = _NOTE
        text = f"{kernel}: who built it is not known, nor which fixes it has; what its number has, it may have"
        hint = "cat /proc/version; ask who built it for the fixes named below"
    elif kernel.basis is Basis.DISTRIBUTION:
        level = _NOTE
        text = f"{kernel}: its vendor carries fixes across; what the version it started from has, it may have"
        hint = "look for the fixes named below in the package's changelog"
    elif known_kernels.is_newer_than_table(kernel):
        level = _NOTE
        text = f"{kernel} is newer than every kernel that is known here (up to {known_kernels.KNOWS_UP_TO})"
        hint = "is there a newer duende-ublkd? duende-ublkd --version"
    bugs = known_kernels.known_bugs(kernel, has_driver=has_driver)
    return [
        Finding("kernel", "kernel", level, text, hint, facts),
        *(_of_bug(bug, answer, kernel) for bug, answer in bugs),
    ]


def _of_bug(bug: known_kernels.KnownBug, answer: Answer, kernel: Kernel) -> Finding:
    sure = answer is Answer.YES
    text = f"{bug.symptom} ({bug.source})" if sure else f"this kernel may be affected: {bug.symptom} ({bug.source})"
    level = bug.severity if sure else min(bug.severity, _NOTE)
    facts = {"applies": answer.value, "source": bug.source}
    hint = known_kernels.remedy(bug, kernel) if level > _NOTE else bug.remedy
    return Finding(bug.id, "kernel", level, text, hint, facts)


def driver_findings(machine: Machine, answer: DriverAnswer, kernel: Kernel) -> Iterator[Finding]:
    """Whether the driver is there and answers, what it can do, and how much room it has."""
    driver = machine.driver
    how = "built into the kernel" if driver.is_builtin else "loaded" if driver.is_loaded else "not loaded"
    facts = {"loaded": driver.is_loaded, "builtin": driver.is_builtin, "available": driver.is_available}
    if not driver.is_loaded and not driver.is_builtin:
        yield _no_driver(machine, facts)
    else:
        yield Finding("driver", "driver", _OK, f"ublk_drv is {how}", facts=facts)
    yield control_device(machine.control, answer)
    if answer.facts is not None:
        yield from _features(answer.facts, kernel)
        yield from _slots(machine, answer, kernel)


def _no_driver(machine: Machine, facts: dict[str, Any]) -> Finding:
    if machine.driver.is_available:
        hint = "modprobe ublk_drv; at each boot: echo ublk_drv > /etc/modules-load.d/ublk.conf"
    elif machine.driver.is_available is None:
        hint = "modprobe ublk_drv  # if that fails, the kernel was built without CONFIG_BLK_DEV_UBLK"
    else:
        hint = (
            "boot a kernel with CONFIG_BLK_DEV_UBLK, or install the package with its further modules "
            "(Ubuntu: linux-modules-extra-$(uname -r))"
        )
    missing = "" if machine.driver.is_available is not False else ", and this kernel has no such module"
    return Finding("driver", "driver", _CRITICAL, f"ublk_drv is not loaded{missing}", hint, facts)


def control_device(node: Node | None, answer: DriverAnswer) -> Finding:
    """Whether the driver can be talked to. `node`: what is in its place."""
    facts = {} if node is None else {"mode": f"{node.mode:04o}", "uid": node.uid, "gid": node.gid}
    if answer.trouble:
        return Finding(
            "control-device", "driver", _CRITICAL, answer.trouble, answer.hint, facts, means=ExitCode.NO_KERNEL
        )
    where = f" (mode {facts['mode']}, uid {facts['uid']}, gid {facts['gid']})" if facts else ""
    return Finding("control-device", "driver", _OK, f"/dev/ublk-control can be used{where}", facts=facts)


_USED = {
    Feature.CMD_IOCTL_ENCODE: "commands go out by their old numbers, which newer kernels refuse",
    Feature.USER_RECOVERY: "no device survives its server, and nothing can be recovered",
    Feature.USER_RECOVERY_REISSUE: "what a dead server had taken fails with EIO, also after a recovery",
    Feature.SAFE_STOP_DEV: "no TRY_STOP_DEV: a device that is given up is stopped after a look at who holds it, and who "
    "opens it in between loses it",
}


def _features(driver: DriverFacts, kernel: Kernel) -> Iterator[Finding]:
    names = list(feature_names(driver.features))
    if not driver.features:
        text = "the driver cannot say what it can do (that came with 6.5)"
        yield Finding("features", "driver", _NOTE, text, "boot a kernel of 6.5 or newer", {"features": []})
        return
    yield Finding("features", "driver", _OK, ", ".join(names), facts={"features": names})
    missing = {str(feature.name): cost for feature, cost in _USED.items() if not driver.features & feature}
    if kernel.version is not None and kernel.version < known_kernels.version("6.9-rc1"):
        missing["DEL_DEV_ASYNC"] = "deleting a device that is held waits for its holders, one command for each"
    if missing:
        text = "; ".join(f"without {name}: {cost}" for name, cost in missing.items())
        hint = "nothing has to be done; a newer kernel has it (uname -r)"
        yield Finding("features-missing", "driver", _NOTE, text, hint, {"missing": missing})


def _slots(machine: Machine, answer: DriverAnswer, kernel: Kernel) -> Iterator[Finding]:
    limit = machine.limit
    if limit is None:
        return
    counts_all = known_kernels.limit_counts_all(kernel)
    unprivileged = sum(device.has(Feature.UNPRIVILEGED_DEV) for device in answer.devices)
    used = unprivileged if counts_all is Answer.NO else len(answer.devices)
    what = "unprivileged devices" if counts_all is Answer.NO else "devices"
    facts = {"limit": limit, "used": used, "devices": len(answer.devices), "counts": counts_all.value}
    hint = f"duende-ublkd clean; echo {2 * limit or 64} > /sys/module/ublk_drv/parameters/ublks_max"
    text = f"{used} of {limit} {what} (ublks_max) are there"
    level = _OK if used < _FULL * limit else _WARNING if used >= limit and counts_all is not Answer.PERHAPS else _NOTE
    yield Finding(
        "slots", "driver", level, text + (": ADD_DEV fails with EACCES" if used >= limit else ""), hint, facts
    )


def io_uring_findings(machine: Machine, answer: DriverAnswer) -> Iterator[Finding]:
    """Whether rings can be had, by us and by servers."""
    disabled, group = machine.io_uring_disabled, machine.io_uring_group
    facts = {"io_uring_disabled": disabled, "io_uring_group": group, "is_restricted": answer.is_confined}
    if answer.ring_trouble:
        yield Finding(
            "io-uring", "io_uring", _CRITICAL, answer.ring_trouble, answer.ring_hint, facts, means=ExitCode.NO_KERNEL
        )
    elif disabled == 1:
        who = f"members of group {group}, " if group is not None and group >= 0 else ""
        text = (
            f"rings are for {who}whoever has CAP_SYS_ADMIN (kernel.io_uring_disabled=1): no other user's server starts"
        )
        hint = "sysctl kernel.io_uring_disabled=0, or kernel.io_uring_group=$(getent group GROUP | cut -d: -f3)"
        yield Finding("io-uring", "io_uring", _NOTE, text, hint, facts)
    else:
        yield Finding("io-uring", "io_uring", _OK, "a ring with 128-byte entries can be set up", facts=facts)
    if answer.is_confined:
        text = "the kernel restricts the daemon's ring to the commands that it needs"
        yield Finding("io-uring-restricted", "io_uring", _OK, text)
    elif answer.is_confined is False:
        text = "the kernel does not restrict the daemon's ring: whoever took the daemon over could have it do any I/O"
        hint = (
            "look for what forbids IORING_REGISTER_RESTRICTIONS, which kernels have since 5.10: journalctl -k -g audit"
        )
        yield Finding("io-uring-restricted", "io_uring", _NOTE, text, hint)


# --- swaps and devices


def swap_findings(swaps: Sequence[Swap], devices: Sequence[Device]) -> list[Finding]:
    """What becomes of each swap when the server of the device that it is on dies."""
    by_id = {device.dev_id: device for device in devices}
    on_ublk = [swap for swap in swaps if swap.ublk]
    if not on_ublk:
        return [Finding("swap", "devices", _OK, "no swap is on a ublk device", facts={"swaps": len(swaps)})]
    found: list[Finding] = []
    for swap in on_ublk:
        for dev_id in sorted(swap.ublk):
            found += list(_of_swap(swap, dev_id, by_id.get(dev_id))) or [_good_swap(swap, dev_id)]
    return found


def _good_swap(swap: Swap, dev_id: int) -> Finding:
    text = f"the swap {swap.path} on ublk{dev_id} is recovered when its server dies"
    return Finding("swap", "devices", _OK, text, facts=_swap_facts(swap, dev_id))


def _swap_facts(swap: Swap, dev_id: int) -> dict[str, Any]:
    return {"swap": swap.path, "dev_id": dev_id, "used_bytes": swap.used}


def _of_swap(swap: Swap, dev_id: int, device: Device | None) -> Iterator[Finding]:
    what = f"the swap {swap.path} is on ublk{dev_id}"

    def finding(name: str, level: Severity, text: str, hint: str) -> Finding:
        return Finding(name, "devices", level, text, hint, _swap_facts(swap, dev_id))

    if swap.is_deleted:
        text = f"the swap {swap.path} is lost with the server of ublk{dev_id}: no swapoff finds it, and the id is taken"
        yield finding("swap-lost", _CRITICAL, text, "reboot: nothing else ends it, and what was in it is gone")
        return
    if device is None or device.flags is None:
        text = f"{what}, of which nobody could tell whether it outlives its server"
        yield finding("swap-not-known", _WARNING, text, f"duende-ublkd explain {dev_id}; swapoff {swap.path}")
        return
    if not device.has(Feature.USER_RECOVERY):
        text = (
            f"{what}, which was added without UBLK_F_USER_RECOVERY: when its server dies the swap is lost, swapoff becomes "
            "impossible, and the id stays taken until a reboot"
        )
        hint = f"swapoff {swap.path}  # now, while the server lives; then add the device with user recovery and reissue"
        yield finding("swap-without-recovery", _CRITICAL, text, hint)
        return
    yield from (finding(*each) for each in _of_recoverable_swap(swap, what, device))


def _of_recoverable_swap(swap: Swap, what: str, device: Device) -> Iterator[tuple[str, Severity, str, str]]:
    again = f"swapoff {swap.path}, add the device anew with {{}}, swapon {swap.path}"
    if not device.has(Feature.USER_RECOVERY_REISSUE):
        text = (
            f"{what}, which was added without UBLK_F_USER_RECOVERY_REISSUE: what the server had taken when it dies fails, "
            "and a program whose page it was is killed, although the device is recovered"
        )
        yield "swap-without-reissue", _WARNING, text, again.format("UBLK_F_USER_RECOVERY_REISSUE")
    if device.has(Feature.USER_RECOVERY_FAIL_IO):
        text = f"{what}, which fails its I/O while it has no server (UBLK_F_USER_RECOVERY_FAIL_IO): programs are killed"
        yield "swap-fails-io", _WARNING, text, again.format("user recovery and reissue alone")
    if device.unserved is not OnUnserved.RECOVER:
        text = f"{what}, and by its policy nobody recovers that: unserved is {device.unserved.value!r}"
        hint = (
            f'[[device]] match = {{ ids = "{device.dev_id}" }}, unserved = "recover", recover = {{ command = [...] }}; '
            f"then: duende-ublkd check-config --id {device.dev_id}"
        )
        yield "swap-not-recovered", _WARNING, text, hint
    if device.memory is not None and is_locked(device.memory) is False:
        text = (
            f"{what}, and its server {device.server} has not locked its memory: it may wait for the swap that it serves"
        )
        hint = (
            "have it call mlockall(MCL_CURRENT | MCL_FUTURE), from Python duende_ublkd.lock_memory(small_threads=True); in "
            "its unit: LimitMEMLOCK=infinity"
        )
        yield "swap-server-unlocked", _WARNING, text, hint


def is_locked(process: Process) -> bool | None:
    """Whether it has its memory locked; None: it does not tell.

    After mlockall() VmLck is more than VmRSS, but for what cannot be locked, and needs not be (a ring's queues).
    """
    if process.locked is None or process.resident is None:
        return None
    return process.locked * 2 >= process.resident and not process.swapped


def device_findings(devices: Sequence[Device]) -> Iterator[Finding]:
    """What of the devices themselves stands out."""
    count = f"{len(devices)} ublk device{'' if len(devices) == 1 else 's'}"
    yield Finding("devices", "devices", _OK, count, facts={"dev_ids": [device.dev_id for device in devices]})
    for device in devices:
        about, facts = f"ublk{device.dev_id}", {"dev_id": device.dev_id}
        if device.overdue:
            text = f"{about}: {device.overdue} has not answered by its deadline"
            yield Finding("device-silent", "devices", _WARNING, text, f"duende-ublkd explain {device.dev_id}", facts)
        if not device.has_node:
            text = f"{about} has no /dev/ublkc{device.dev_id} here: nobody can claim it, so it is never cleaned"
            hint = "udevadm trigger -s ublk-char; in a container: bind-mount the host's /dev"
            yield Finding("node-missing", "devices", _WARNING, text, hint, facts)
        if device.mounts and device.flags is not None and not device.has(Feature.USER_RECOVERY):
            text = (
                f"{about} was added without UBLK_F_USER_RECOVERY: with its server the file system dies that is mounted at "
                + ", ".join(device.mounts)
            )
            hint = "have its server add it with UBLK_F_USER_RECOVERY, and say in the configuration how to start another one"
            mounts = {**facts, "mounts": list(device.mounts)}
            yield Finding("mount-without-recovery", "devices", _NOTE, text, hint, mounts)


# --- the daemon


def daemon_findings(machine: Machine, answer: DaemonAnswer) -> Iterator[Finding]:
    """Whether it runs, and how it is."""
    lock = machine.lock
    facts = {"pid": lock.pid if lock.is_held else None, "locked": lock.is_held, "version": answer.version or None}
    if not answer.is_there and not lock.is_held:
        text = "no daemon runs: what dies is cleaned by `duende-ublkd clean` alone, and nothing is recovered"
        yield Finding("daemon", "daemon", _NOTE, text, "systemctl enable --now duende-ublkd", facts)
        return
    if answer.trouble:
        who = f"pid {lock.pid} has the daemon's lock, but " if lock.is_held and lock.pid else ""
        level = _CRITICAL if answer.is_there else _WARNING  # it may be about to start
        hint = f"{answer.hint}; journalctl -u duende-ublkd -n 50"
        yield Finding("daemon", "daemon", level, f"{who}{answer.trouble}", hint, facts)
        return
    where = f" as pid {lock.pid}" if lock.is_held and lock.pid else ""
    if answer.is_ready:
        yield Finding("daemon", "daemon", _OK, f"it runs{where} and answers", facts=facts)
    else:
        text = (
            f"it runs{where}, and is not ready: its first look is not done, or the driver did not answer the last one"
        )
        yield Finding("daemon", "daemon", _WARNING, text, "journalctl -u duende-ublkd -n 50", facts)
    if answer.version and answer.version != __version__:
        text = f"the daemon is of version {answer.version}, this command of {__version__}"
        yield Finding("daemon-version", "daemon", _NOTE, text, "systemctl restart duende-ublkd")
    if answer.overdue:
        text = f"{answer.overdue} of its commands to the kernel have not been answered by their deadline"
        hint = "duende-ublkd list  # which device is wedged; dmesg | tail"
        yield Finding("daemon-overdue", "daemon", _WARNING, text, hint, {"overdue": answer.overdue})
    if answer.journal:
        text = f"its journal is in trouble: {answer.journal}"
        yield Finding(
            "journal", "daemon", _WARNING, text, "df -h /var/lib/duende-ublkd; journalctl -u duende-ublkd -n 50"
        )
    else:
        yield Finding("journal", "daemon", _OK, "its journal is written")


# --- the configuration


def config_findings(machine: Machine, config: Config) -> Iterator[Finding]:
    """Whether the daemon acts at all, and whether its journal depends on what it tells of."""
    if config.daemon.dry_run:
        text = "dry_run is true: the daemon says what it would do, and neither deletes nor recovers anything"
        yield Finding(
            "dry-run", "configuration", _NOTE, text, "[daemon] dry_run = false; systemctl reload duende-ublkd"
        )
    where = printable(config.daemon.state_dir)
    facts = {"state_dir": where, "dev_ids": sorted(machine.state_on)}
    if machine.state_on:
        on = ", ".join(f"ublk{dev_id}" for dev_id in sorted(machine.state_on))
        text = (
            f"the journal ({where}) is on {on}: it is silent when that has no server, and keeps its file system in use"
        )
        yield Finding(
            "state-dir", "configuration", _WARNING, text, '[daemon] state_dir = "/var/lib/..." on another disk', facts
        )
    else:
        yield Finding("state-dir", "configuration", _OK, f"the journal ({where}) is on no ublk device", facts=facts)


def of_programs(programs: Sequence[str], missing: Sequence[str]) -> Finding:
    """Whether the programs of the recovery commands are there."""
    facts = {"programs": [printable(program) for program in programs], "missing": [printable(each) for each in missing]}
    if not missing:
        text = "the programs of the recovery commands are there" if programs else "no recovery program is configured"
        return Finding("recovery-program", "configuration", _OK, text, facts=facts)
    text = f"a recovery command cannot be run: there is no program {', '.join(map(printable, missing))}"
    hint = f"ls -l {printable(missing[0])}; a bare name is looked for in the usual directories for programs alone"
    return Finding("recovery-program", "configuration", _WARNING, text, hint, facts)


def programs_are_stuck(seconds: float) -> Finding:
    """The file systems that were asked do not answer."""
    text = f"nobody could tell within {seconds:g} s whether the programs of the recovery commands are there"
    hint = "put them on a disk that needs no ublk device, or into a tmpfs"
    return Finding("recovery-program", "configuration", _WARNING, text, hint)


# --- privileges, memory, limits


@dataclass(frozen=True, slots=True)
class Capability:
    """What a capability is needed for. `for_users`: only when recovery commands run as another user."""

    name: str
    number: int
    level: Severity
    why: str
    for_commands: bool = False
    for_users: bool = False


CAPABILITIES = (
    Capability("CAP_SYS_ADMIN", 21, _WARNING, "the driver takes no command without it", for_commands=True),
    Capability(
        "CAP_SYS_PTRACE",
        19,
        _WARNING,
        "other users' processes are not seen, so that nothing is deleted",
        for_commands=True,
    ),
    Capability(
        "CAP_DAC_OVERRIDE", 1, _WARNING, "the nodes of unprivileged devices are their users'", for_commands=True
    ),
    Capability("CAP_NET_ADMIN", 12, _NOTE, "more events of the kernel's are lost, and found at the next full look"),
    Capability("CAP_SYS_RESOURCE", 24, _NOTE, "an allocation may wait for the swap that has no server"),
    Capability("CAP_SETUID", 7, _WARNING, "recovery commands cannot run as another user", for_users=True),
    Capability("CAP_SETGID", 6, _WARNING, "recovery commands cannot run as another user", for_users=True),
    Capability("CAP_KILL", 5, _WARNING, "recovery commands of another user cannot be ended", for_users=True),
)


def privilege_findings(machine: Machine, config: Config) -> Iterator[Finding]:
    """What this process, and the daemon, may not do and should."""
    users = any(policy.recover and policy.recover.user for policy in config.policies())
    if machine.me is not None:
        needed = [each for each in CAPABILITIES if each.for_commands]
        hint = "run it as root: sudo duende-ublkd doctor; in a container: --cap-add SYS_ADMIN --cap-add SYS_PTRACE"
        yield _capabilities("capabilities", "this command", machine.me, needed, hint)
    if machine.daemon is not None:
        needed = [each for each in CAPABILITIES if users or not each.for_users]
        hint = "systemctl edit duende-ublkd: add them to CapabilityBoundingSet=, then systemctl restart duende-ublkd"
        yield _capabilities("daemon-capabilities", "the daemon", machine.daemon, needed, hint)


def _capabilities(name: str, who: str, process: Process, needed: Sequence[Capability], hint: str) -> Finding:
    has = process.capabilities
    if has is None:
        return Finding(
            name, "privileges", _NOTE, f"what {who} may do is not told", f"grep Cap /proc/{process.pid}/status"
        )
    missing = [each for each in needed if not has >> each.number & 1]
    facts = {"effective": f"{has:016x}", "missing": [each.name for each in missing]}
    if not missing:
        return Finding(name, "privileges", _OK, f"{who} has every capability that it needs", facts=facts)
    text = f"{who} lacks " + "; ".join(f"{each.name}: {each.why}" for each in missing)
    return Finding(name, "privileges", max(each.level for each in missing), text, hint, facts)


_CAP_IPC_LOCK = 14


def memory_findings(machine: Machine, config: Config) -> Iterator[Finding]:
    """Whether the daemon's memory is locked, or could be."""
    process = machine.daemon or machine.me
    if process is None:
        return
    facts = {"locked_bytes": process.locked, "resident_bytes": process.resident, "memlock": process.memlock}
    if not config.daemon.lock_memory:
        text = "lock_memory is false: the daemon may wait for a swap that has no server, and never recover it"
        yield Finding("memory-lock", "memory", _NOTE, text, "[daemon] lock_memory = true", facts)
    elif machine.daemon is not None:
        yield _daemon_memory(machine.daemon, facts)
    else:
        yield _possible_memory(process, facts)


def _daemon_memory(daemon: Process, facts: dict[str, Any]) -> Finding:
    locked = is_locked(daemon)
    if locked:
        return Finding("memory-lock", "memory", _OK, f"the daemon has locked {_mib(daemon.locked)}", facts=facts)
    if locked is None:
        hint = f"grep Vm /proc/{daemon.pid}/status"
        return Finding("memory-lock", "memory", _NOTE, "whether the daemon's memory is locked is not told", hint, facts)
    text = f"the daemon has locked {_mib(daemon.locked)} of its {_mib(daemon.resident)}: it may wait for a dead swap"
    hint = "CAP_IPC_LOCK in its unit's CapabilityBoundingSet=, or LimitMEMLOCK=infinity; systemctl restart duende-ublkd"
    return Finding("memory-lock", "memory", _WARNING, text, hint, facts)


def _possible_memory(me: Process, facts: dict[str, Any]) -> Finding:
    may = me.capabilities is not None and bool(me.capabilities >> _CAP_IPC_LOCK & 1)
    if may or me.memlock is None or me.memlock == UNLIMITED or me.memlock >= NEEDED_MEMORY:
        return Finding("memory-lock", "memory", _OK, "a daemon could lock its memory", facts=facts)
    text = f"a daemon that is started from here may lock {_mib(me.memlock)} of the {_mib(NEEDED_MEMORY)} that it needs"
    return Finding(
        "memory-lock", "memory", _NOTE, text, "ulimit -l unlimited; under systemd its unit gives it CAP_IPC_LOCK", facts
    )


def _mib(size: int | None) -> str:
    return "an unknown size" if size is None else f"{size / (1 << 20):.0f} MiB"


_FILES_NEEDED = 128  # of its own, its children's and its clients'
_FILES_EACH = 4  # a watch of the server, a watch of the node, the device while it is deleted, and what is in between


def limit_findings(machine: Machine, devices: int) -> Iterator[Finding]:
    """How near to its limits the daemon is, and the machine."""
    process = machine.daemon or machine.me
    if process is not None and process.nofile is not None:
        yield _files(process, devices, is_daemon=machine.daemon is not None)
    if process is not None and process.tasks is not None and process.most_tasks is not None:
        text = f"{process.tasks} of {process.most_tasks} tasks in the cgroup of pid {process.pid}"
        yield _tasks(
            "cgroup-tasks", process.tasks, process.most_tasks, text, "systemctl set-property UNIT TasksMax=4096"
        )
    if machine.tasks is not None and machine.most_tasks is not None:
        text = f"{machine.tasks} of {machine.most_tasks} processes and threads on this machine"
        hint = "sysctl kernel.pid_max=4194304 kernel.threads-max=100000"
        yield _tasks("tasks", machine.tasks, machine.most_tasks, text, hint)


def _files(process: Process, devices: int, *, is_daemon: bool) -> Finding:
    limit, used = process.nofile, process.files
    who = "the daemon" if is_daemon else "this command"
    facts = {"limit": limit, "used": used}
    needed = _FILES_NEEDED + _FILES_EACH * devices
    is_full = limit is not None and limit != UNLIMITED and used is not None and used >= _FULL * limit
    too_few = limit is not None and limit != UNLIMITED and limit < needed
    if not is_full and not too_few:
        text = f"{who} may open {'any number of' if limit == UNLIMITED else limit} files"
        return Finding("open-files", "limits", _OK, text, facts=facts)
    text = (
        f"{who} has {used} of {limit} files open"
        if is_full
        else f"{who} may open {limit} files, and needs up to {needed}"
    )
    level = _WARNING if is_daemon else _NOTE
    return Finding("open-files", "limits", level, text, "LimitNOFILE=65536 in its unit; ulimit -n 65536", facts)


def _tasks(name: str, used: int, limit: int, text: str, hint: str) -> Finding:
    facts = {"used": used, "limit": None if limit == UNLIMITED else limit}
    if limit == UNLIMITED or used < _FULL * limit:
        return Finding(
            name, "limits", _OK, text if limit != UNLIMITED else f"{used} tasks, without a limit", facts=facts
        )
    return Finding(name, "limits", _WARNING, f"{text}: recovery commands may not be started", hint, facts)


# --- surroundings


def surrounding_findings(machine: Machine) -> Iterator[Finding]:
    """Whether this is the machine itself, or a container that hides some of it."""
    for who, process in (("this command", machine.me), ("the daemon", machine.daemon)):
        if process is not None:
            yield from _namespaces(who, process)
    me = machine.me
    mounts = me.namespaces.get("mnt", "") if me else ""
    if mounts and machine.first_mounts and mounts != machine.first_mounts:
        text = "this command is in another mount namespace than pid 1: its /dev and its configuration may be others"
        hint = "nsenter -t 1 -m duende-ublkd doctor"
        yield Finding("mount-namespace", "surroundings", _NOTE, text, hint)
    if machine.hides_processes:
        text = f"/proc hides processes ({machine.hides_processes}): who has a device open is not seen, so nothing is deleted"
        yield Finding(
            "proc", "surroundings", _WARNING, text, "mount -o remount,hidepid=0 /proc; or give it CAP_SYS_PTRACE"
        )
    for who, process in (("/dev", machine.me), ("the daemon's /dev", machine.daemon)):
        if process is not None and process.dev_type is not None:
            yield _dev(who, process.dev_type)


def _namespaces(who: str, process: Process) -> Iterator[Finding]:
    facts = {"pid": process.pid, **process.namespaces}
    if process.in_first_user_namespace is False:
        text = f"{who} is in a user namespace of its own: the driver takes no command from there"
        hint = "run it on the host itself, or in a container with --userns=host --privileged"
        yield Finding("user-namespace", "surroundings", _CRITICAL, text, hint, facts)
    if process.in_first_pid_namespace is False:
        text = f"{who} is in a pid namespace of its own: it does not see who has a device open, so it deletes nothing"
        hint = "run it on the host itself, or in a container with --pid=host"
        yield Finding("pid-namespace", "surroundings", _WARNING, text, hint, facts)
    if process.in_first_user_namespace and process.in_first_pid_namespace:
        yield Finding("namespaces", "surroundings", _OK, f"{who} sees every user and process", facts=facts)


def _dev(who: str, kind: str) -> Finding:
    if kind == "devtmpfs":
        return Finding("dev", "surroundings", _OK, f"{who} is the kernel's own (devtmpfs)", facts={"type": kind})
    what = printable(kind) or "a directory of the root's"
    text = f"{who} is not the kernel's own ({what}): nodes of new devices are missing"
    hint = "no PrivateDevices= in the unit; in a container: -v /dev:/dev; else mount -t devtmpfs devtmpfs /dev"
    return Finding("dev", "surroundings", _WARNING, text, hint, {"type": kind})
