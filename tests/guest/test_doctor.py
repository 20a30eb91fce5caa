"""`doctor` where there is a driver: a machine without faults, swaps that would be lost, and a daemon that runs."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from duende_ublkd import __version__
from duende_ublkd.core.known_kernels import identify, version
from duende_ublkd.core.model import Feature
from tests.daemon_process import DaemonProcess, command
from tests.native_server import NativeServer
from tests.server.harness import block_device, drop_device

DEV_ID = 46
REISSUE = ("--recovery", "--flags", str(int(Feature.USER_RECOVERY_REISSUE)))
RECOVERED = """
[policy]
unserved = "recover"
recover = { command = ["mini_server", "--recover", "{id}"] }
"""

# The command, telling on stderr which ublk nodes it opens.
WATCHED = """
import os, sys
def note(event, arguments):
    if event == "open" and "/ublk" in str(arguments[0]) and str(arguments[0]).startswith("/dev/"):
        os.write(2, f"opened {arguments[0]}\\n".encode())
sys.addaudithook(note)
from duende_ublkd.__main__ import main
main()
"""


def doctor(config: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The findings by id, and the exit status."""
    done = command("doctor", "--json", "--config", str(config))
    assert "Traceback" not in done.stderr, done.stderr
    findings = json.loads(done.stdout)["findings"]
    return {finding["id"]: finding for finding in findings}, done.returncode


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(f'[daemon]\nstate_dir = "{tmp_path}/state"\n{RECOVERED}')
    return path


@contextlib.contextmanager
def swap_on(device: Path | str) -> Iterator[None]:
    subprocess.run(["mkswap", device], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["swapon", device], check=True)
    try:
        yield
    finally:
        subprocess.run(["swapoff", device], check=True)


@contextlib.contextmanager
def served(backing: Path, *arguments: str) -> Iterator[NativeServer]:
    with NativeServer("--id", str(DEV_ID), "--size", "32", "--backing", str(backing), *arguments) as server:
        server.wait_for("LIVE")
        try:
            yield server
        finally:
            server.kill()
            drop_device(DEV_ID)


def test_a_machine_without_faults_has_none_but_those_of_its_kernel(config: Path) -> None:
    found, code = doctor(config)
    well = (
        "driver",
        "control-device",
        "features",
        "slots",
        "io-uring",
        "io-uring-restricted",
        "swap",
        "devices",
        "configuration",
        "capabilities",
    )
    for name in (*well, "namespaces", "dev", "memory-lock", "open-files", "tasks", "recovery-program", "state-dir"):
        assert found[name]["level"] == "ok", found[name]
    assert "CMD_IOCTL_ENCODE" in found["features"]["facts"]["features"]
    assert found["daemon"]["level"] == "note"
    release = identify(os.uname().release, Path("/proc/version").read_text())
    assert release.version is not None
    assert found["kernel"]["facts"]["vendor"] == "debian", found["kernel"]
    assert ("partition-scan-wedge" in found) == (release.version < version("6.18.4"))
    assert ("features-missing" in found) == (release.version < version("7.0"))
    bad = [each for each in found.values() if each["level"] in ("warning", "critical")]
    assert all(each["group"] == "kernel" for each in bad), bad
    assert code == bool(bad)


def test_a_swap_whose_device_dies_with_its_server_is_critical(config: Path, tmp_path: Path) -> None:
    with served(tmp_path / "disk"), swap_on(block_device(DEV_ID)):
        found, code = doctor(config)
        finding = found["swap-without-recovery"]
        assert finding["level"] == "critical"
        assert finding["facts"]["dev_id"] == DEV_ID
        assert finding["hint"].startswith(f"swapoff {block_device(DEV_ID)}")
        assert code == 1
        done = subprocess.run(
            [sys.executable, "-c", WATCHED, "doctor", "--config", str(config)],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "120"},
        )
        print(done.stdout)
        assert done.returncode == 1, done.stderr
        assert set(done.stderr.splitlines()) == {"opened /dev/ublk-control"}, "and no device"
        assert "CRITICAL  swap-without-recovery" in done.stdout
        assert done.stdout.splitlines()[0] == "Devices, swap and mounts", "the worst comes first"
        assert ", 1 critical" in done.stdout.splitlines()[-1]


def test_a_swap_on_a_loop_device_is_on_the_device_under_it(config: Path, tmp_path: Path) -> None:
    """Recoverable, by its policy recovered, and its server may be swapped out."""
    with served(tmp_path / "disk", *REISSUE) as server:
        done = subprocess.run(
            ["losetup", "--find", "--show", block_device(DEV_ID)], check=True, capture_output=True, text=True
        )
        loop = done.stdout.strip()
        try:
            with swap_on(loop):
                found, code = doctor(config)
        finally:
            subprocess.run(["losetup", "-d", loop], check=True)
    assert code == 1
    assert found["swap-server-unlocked"]["level"] == "warning", found
    assert str(server.pid) in found["swap-server-unlocked"]["text"]
    assert not {"swap-without-recovery", "swap-without-reissue", "swap-not-recovered"} & found.keys()


def test_a_swap_of_a_locked_server_that_is_recovered_is_well_and_so_is_the_daemon(tmp_path: Path) -> None:
    with (
        DaemonProcess(RECOVERED) as daemon,
        served(tmp_path / "disk", *REISSUE, "--lock"),
        swap_on(block_device(DEV_ID)),
    ):
        daemon.wait_verdict(DEV_ID, "live")
        found, _ = doctor(daemon.config_path)
        assert found["swap"]["level"] == "ok", found
        assert found["swap"]["facts"]["dev_id"] == DEV_ID
        for name in ("daemon", "journal", "memory-lock", "daemon-capabilities"):
            assert found[name]["level"] == "ok", found[name]
        assert found["daemon"]["facts"] == {"pid": daemon.process.pid, "locked": True, "version": __version__}
        assert found["memory-lock"]["facts"]["locked_bytes"] > 10 << 20
        daemon.wait_verdict(DEV_ID, "live")
