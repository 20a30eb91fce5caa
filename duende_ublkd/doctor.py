"""`doctor`: what of this machine keeps ublk, or the daemon, from doing what it should, and what to do about each.

Rules:
1. It looks and changes nothing: GET_FEATURES and GET_DEV_INFO are all that it asks of the driver, it opens no device but
   the control device, and every wait has a deadline.
2. What cannot be found out is said, as a finding; it keeps no other finding from being shown.
3. What is found is judged in `checkup`; this file reads, asks and prints.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import textwrap
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeVar

from duende_ublkd import checkup
from duende_ublkd.checkup import DaemonAnswer, Device, DriverAnswer, Finding
from duende_ublkd.client import DaemonClient, DaemonNotRunningError, run_directory, socket_path
from duende_ublkd.core.config import Config, InvalidConfigError, OnUnserved
from duende_ublkd.core.errors import ConfigError, DuendeError, ExitCode, KernelUnavailableError
from duende_ublkd.core.known_kernels import Severity, identify
from duende_ublkd.core.text import printable
from duende_ublkd.kernel.control import open_control_device
from duende_ublkd.kernel.ring import Ring
from duende_ublkd.kernel.survey import Process, Roots, find_program, read_process, survey
from duende_ublkd.once import ask_daemon
from duende_ublkd.parts import DEFAULT_PATH, Parts, read_config

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from duende_ublkd.core.model import Judged, PassReport, Server
    from duende_ublkd.kernel.survey import Machine

_T = TypeVar("_T")

ANSWER_FOR = 40.0  # seconds for three answers of a daemon; the client has a limit for each
READ_FOR = 10.0  # seconds for /proc and /sys; and for the configuration, and for the programs that it names
_MOST_TEXT = 1000
_GROUPS = {
    "kernel": "Kernel",
    "driver": "Driver",
    "io_uring": "io_uring",
    "devices": "Devices, swap and mounts",
    "daemon": "Daemon",
    "configuration": "Configuration",
    "privileges": "Privileges",
    "memory": "Memory",
    "limits": "Limits",
    "surroundings": "Surroundings",
}


def run(options: argparse.Namespace) -> ExitCode:
    """Carry out the command. It raises nothing for what it finds."""
    findings = asyncio.run(examine(options.config))
    if options.json:
        _say(json.dumps(as_object(findings), indent=2))
    else:
        _say(as_text(findings, shutil.get_terminal_size((120, 24)).columns))
    return exit_code(findings)


async def examine(config_path: str | None, roots: Roots | None = None, *, patience: float = READ_FOR) -> list[Finding]:
    """Find out everything, and judge it. `roots`: where a test has its machine. `patience`: seconds for each reading."""
    roots = roots or Roots()
    config, findings = await _read_configuration(config_path)
    is_configured = worst(findings) < Severity.CRITICAL  # else these are the defaults, which nobody has asked for
    machine = await _in_a_thread(lambda: survey(roots, run_directory(), config.daemon.state_dir), patience)
    driver = await _ask_driver(config, roots)
    daemon = await _in_a_thread(ask, ANSWER_FOR) or DaemonAnswer(
        is_there=True, trouble="the daemon does not answer", hint="systemctl restart duende-ublkd"
    )
    if machine is None:
        findings += [checkup.survey_is_stuck(patience), checkup.control_device(None, driver)]
    else:
        findings += _judge(machine, driver, daemon, config)
        findings += checkup.config_findings(machine, config) if is_configured else ()
    findings += checkup.device_findings(driver.devices)
    if is_configured:
        findings.append(await _look_for_programs(config, patience))
    return findings


async def _look_for_programs(config: Config, patience: float) -> Finding:
    programs = sorted({policy.recover.command[0] for policy in config.policies() if policy.recover} - {"{server}"})
    missing = await _in_a_thread(lambda: [each for each in programs if find_program(each) is None], patience)
    return checkup.programs_are_stuck(patience) if missing is None else checkup.of_programs(programs, missing)


def _judge(machine: Machine, driver: DriverAnswer, daemon: DaemonAnswer, config: Config) -> list[Finding]:
    kernel = identify(machine.release, machine.banner, machine.signature)
    return [
        *checkup.kernel_findings(kernel, has_driver=machine.driver.is_loaded),
        *checkup.driver_findings(machine, driver, kernel),
        *checkup.io_uring_findings(machine, driver),
        *checkup.swap_findings(machine.swaps, driver.devices),
        *checkup.daemon_findings(machine, daemon),
        *checkup.privilege_findings(machine, config),
        *checkup.memory_findings(machine, config),
        *checkup.limit_findings(machine, len(driver.devices)),
        *checkup.surrounding_findings(machine),
    ]


def exit_code(findings: Sequence[Finding]) -> ExitCode:
    """The worst of them: no kernel to talk to, a wrong configuration, something to do, nothing."""
    means = {finding.means for finding in findings}
    if ExitCode.NO_KERNEL in means:
        return ExitCode.NO_KERNEL
    if ExitCode.USAGE in means:
        return ExitCode.USAGE
    return ExitCode.LEFT_OVER if worst(findings) >= Severity.WARNING else ExitCode.DONE


def worst(findings: Sequence[Finding]) -> Severity:
    """The highest level."""
    return max((finding.level for finding in findings), default=Severity.OK)


# --- what it prints


def as_object(findings: Sequence[Finding]) -> dict[str, Any]:
    """`doctor --json`."""
    return {
        "worst": worst(findings).label,
        "findings": [
            {
                "id": finding.id,
                "group": finding.group,
                "level": finding.level.label,
                "text": printable(finding.text, _MOST_TEXT),
                "hint": printable(finding.hint, _MOST_TEXT),
                "facts": finding.facts,
            }
            for finding in in_order(findings)
        ],
    }


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """By group, the group with the worst finding first, and the worst of a group first."""
    of_group = {group: worst([each for each in findings if each.group == group]) for group in _GROUPS}
    groups = sorted(_GROUPS, key=lambda group: -of_group[group])
    return sorted(findings, key=lambda finding: (groups.index(finding.group), -finding.level))


def as_text(findings: Sequence[Finding], width: int) -> str:
    """For people, in lines of so many characters; a hint is one line, so that it can be copied."""
    lines: list[str] = []
    group = ""
    names = max((len(finding.id) for finding in findings), default=0)
    for finding in in_order(findings):
        if finding.group != group:
            group = finding.group
            lines += [*([""] if lines else []), _GROUPS[group]]
        lines += _shown(finding, names, width)
    counts = Counter(finding.level for finding in findings)
    bad = f"{counts[Severity.WARNING]} warnings, {counts[Severity.CRITICAL]} critical"
    end = bad if worst(findings) >= Severity.WARNING else "nothing wrong"
    return "\n".join([*lines, "", f"doctor: {end}"])


def _shown(finding: Finding, names: int, width: int) -> Iterator[str]:
    level = finding.level.label
    head = f"  {level.upper() if finding.level >= Severity.WARNING else level:<8}  {finding.id:<{names}}  "
    first, *others = textwrap.wrap(printable(finding.text, _MOST_TEXT), max(width - len(head), 40)) or [""]
    yield head + first
    yield from (" " * len(head) + line for line in others)
    if finding.hint and finding.level > Severity.OK:
        yield f"{' ' * len(head)}do: {printable(finding.hint, _MOST_TEXT)}"


def _say(text: str) -> None:
    print(text)  # noqa: T201 - a command's output, as in cli


# --- what is read, and asked


async def _in_a_thread(work: Callable[[], _T], seconds: float) -> _T | None:
    """What it returns; None: it is not done in time, and goes on alone. Its exceptions are the caller's.

    Not an executor of asyncio's, whose threads are waited for at the end.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)  # type: ignore[arg-type]

    def perform() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:  # noqa: BLE001 - whoever waits gets it
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=perform, name="doctor", daemon=True).start()
    done, _ = await asyncio.wait({answer}, timeout=seconds)
    return answer.result() if done else None


async def _read_configuration(path: str | None) -> tuple[Config, list[Finding]]:
    """The configuration, or the defaults where it cannot be used, and what is to be said of it."""
    where = printable(DEFAULT_PATH if path is None else path)
    try:
        config = await _in_a_thread(lambda: read_config(path, with_web=True), READ_FOR)
    except ConfigError as error:
        problems = error.problems if isinstance(error, InvalidConfigError) else ()
        text = "; ".join(f"{problem} ({problem.hint})" for problem in problems) if len(problems) > 1 else str(error)
        facts = {"file": where, "problems": [str(problem) for problem in problems] or [str(error)]}
        found = Finding(
            "configuration",
            "configuration",
            Severity.CRITICAL,
            f"it cannot be used: {text}",
            error.hint,
            facts,
            ExitCode.USAGE,
        )
        return Config(), [found]
    if config is None:
        text = (
            f"{where} could not be read within {READ_FOR:g} s: its disk, or who knows the users in it, does not answer"
        )
        hint = "getent passwd root; dmesg | tail"
        found = Finding(
            "configuration", "configuration", Severity.CRITICAL, text, hint, {"file": where}, ExitCode.USAGE
        )
        return Config(), [found]
    return config, [Finding("configuration", "configuration", Severity.OK, "it can be used", facts={"file": where})]


async def _ask_driver(config: Config, roots: Roots) -> DriverAnswer:
    """Whether there are a ring and a driver; and if so, what they tell of the devices."""
    ring_trouble = ring_hint = ""
    is_confined = None
    try:
        ring = Ring(8)
        is_confined = ring.is_confined
        await ring.close()
    except KernelUnavailableError as error:
        ring_trouble, ring_hint = str(error), error.hint
    try:
        os.close(open_control_device(f"{roots.dev}/ublk-control"))
    except KernelUnavailableError as error:
        return DriverAnswer(str(error), error.hint, ring_trouble, ring_hint, is_confined)
    if ring_trouble:
        return DriverAnswer("it cannot be asked without io_uring", ring_hint, ring_trouble, ring_hint)
    parts = Parts(config, (), one_shot=True)
    try:
        ask_daemon(parts.reconciler)
        report = await parts.reconciler.run_pass(None, act=False, thorough=True)
        servers = [server for device in report.devices.values() if (server := _server_of(device))]
        memory = await _in_a_thread(lambda: _memory_of(servers, roots), READ_FOR)
        devices = tuple(_devices(parts, report, memory or {}))
    finally:
        await parts.close()
    return DriverAnswer(report.trouble, report.hint, is_confined=is_confined, facts=report.driver, devices=devices)


def _memory_of(servers: Iterable[Server], roots: Roots) -> dict[int, Process]:
    found = {server.pid: read_process(roots, server.pid) for server in servers}
    return {pid: process for pid, process in found.items() if process is not None}


def _devices(parts: Parts, report: PassReport, memory: dict[int, Process]) -> Iterator[Device]:
    for judged in report.devices.values():
        seen = judged.seen
        history = parts.reconciler.ledger.get(seen.dev_id)
        server = _server_of(judged)
        yield Device(
            seen.dev_id,
            seen.info.flags if seen.info else None,
            parts.reconciler.policy_for(seen, history).unserved if history else OnUnserved.ALERT,
            str(server) if server else "",
            memory.get(server.pid) if server else None,
            tuple(each.what for each in seen.usage.holders if each.kind == "mount") if seen.usage else (),
            has_node=seen.char_device is not None or seen.identity.sysfs_inode is None,
            overdue=seen.overdue,
        )


def _server_of(device: Judged) -> Server | None:
    seen = device.seen
    openers = seen.usage.char_openers if seen.usage else ()
    if opener := next((each for each in openers if each.may_serve), None):
        return opener
    return seen.server if seen.server and seen.server.alive else None


def ask(path: str | None = None) -> DaemonAnswer:
    """Ask a running daemon how it is. `path`: of its socket."""
    client = DaemonClient(path or socket_path())
    try:
        status, _ = client.get_text("/-/ready", trusted=True)
        _, metrics = client.get_text("/metrics", trusted=True)
        events = client.get("/api/v1/events?limit=1", trusted=True)
    except DaemonNotRunningError as error:
        return DaemonAnswer(trouble=str(error), hint=error.hint)
    except DuendeError as error:
        return DaemonAnswer(is_there=True, trouble=str(error), hint=error.hint)
    journal = str(events.get("note") or "") if isinstance(events, dict) else ""
    if not journal and _sample(metrics, "journal_up") == 0:
        journal = "it is not written to at this moment"
    version = re.search(r'^duende_ublkd_build_info\{[^}]*version="([^"]{1,40})"', metrics, re.MULTILINE)
    return DaemonAnswer(
        is_there=True,
        is_ready=status == 200,  # noqa: PLR2004 - HTTP's OK
        journal=printable(journal, 500),
        version=version[1] if version else "",
        overdue=int(_sample(metrics, "commands_overdue") or 0),
    )


def _sample(metrics: str, name: str) -> float | None:
    found = re.search(rf"^duende_ublkd_{name} ([0-9.e+]{{1,30}})$", metrics, re.MULTILINE)
    return float(found[1]) if found else None
