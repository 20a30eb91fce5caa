"""A running daemon as the tests see it: its configuration, its readiness, its log and its pages."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

START_DEADLINE = 180.0  # seconds; an emulated CPU under load takes tens of them to import everything
STOP_DEADLINE = 15.0


class DaemonProcess:
    """`duende-ublkd run` in the foreground; a context manager that leaves no process behind."""

    def __init__(
        self, config: str = "", *arguments: str, port: int = 10116, environment: dict[str, str] | None = None
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="duende-"))
        self.config_path = self.directory / "config.toml"
        state = f'state_dir = "{self.directory / "state"}"'
        whole = config if "[daemon]" in config else f"[daemon]\n{config}"
        self.config_path.write_text(
            whole if "state_dir" in whole else whole.replace("[daemon]", f"[daemon]\n{state}", 1)
        )
        self.port = port
        self.log_path = self.directory / "log"
        self.ready_after = 0.0  # seconds from its start
        self._arguments = arguments
        self._environment = environment or {}
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(self.directory / "notify"))
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "NOTIFY_SOCKET": str(self.directory / "notify"), **self._environment}
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "duende_ublkd", "run", "--config", str(self.config_path), *self._arguments],
                stderr=log,
                stdout=log,
                env=environment,
            )

    def __enter__(self) -> Self:
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._notify.close()

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_ready(self) -> None:
        """Wait for READY=1, as systemd does."""
        began = time.monotonic()
        until = began + START_DEADLINE
        self._notify.settimeout(0.1)
        while time.monotonic() < until:
            assert self.process.poll() is None, f"the daemon ended with {self.process.returncode}:\n{self.log}"
            try:
                if b"READY=1" in self._notify.recv(4096):
                    self.ready_after = time.monotonic() - began
                    return
            except TimeoutError:
                continue
        raise AssertionError(f"not ready in {START_DEADLINE} s:\n{self.log}")

    def _forget_notifications(self) -> None:
        """What the last one has told, READY=1 after a reload included."""
        self._notify.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._notify.recv(4096)

    def wait_log(self, pattern: str, deadline: float = 30.0) -> re.Match[str]:
        """Wait for a line that matches."""
        until = time.monotonic() + deadline
        while not (match := re.search(pattern, self.log)):
            assert self.process.poll() is None, f"the daemon ended with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < until, f"no {pattern!r} in {deadline} s:\n{self.log}"
            time.sleep(0.05)
        return match

    def kill(self) -> None:
        """SIGKILL, at whatever it is doing."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """A new process with the same configuration and log."""
        self._forget_notifications()
        self.process = self._start()
        self.wait_ready()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_DEADLINE)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=20) as answer:
            return str(answer.read().decode())

    def device(self, dev_id: int) -> dict[str, Any] | None:
        """The device as /api/v1/devices shows it after the last pass."""
        return next((each for each in json.loads(self.get("/api/v1/devices")) if each["dev_id"] == dev_id), None)

    def wait_verdict(self, dev_id: int, verdict: str, deadline: float = 30.0) -> dict[str, Any]:
        until = time.monotonic() + deadline
        while True:
            device = self.device(dev_id)
            if device and device["verdict"] == verdict:
                return device
            assert time.monotonic() < until, f"ublk{dev_id} not {verdict} in {deadline} s: {device}\n{self.log}"
            time.sleep(0.05)

    def metric(self, name: str, **labels: str) -> float | None:
        """One sample of /metrics; None when there is none."""
        for line in self.get("/metrics").splitlines():
            match = re.fullmatch(rf"{name}(?:{{(.*)}})? (\S+)", line)
            if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
                return float(match[2])
        return None


def command(
    *arguments: str,
    deadline: float = 90.0,
    **options: Any,  # noqa: ANN401 - subprocess.run's
) -> subprocess.CompletedProcess[str]:
    """Run `duende-ublkd ARGUMENTS` once."""
    return subprocess.run(
        [sys.executable, "-m", "duende_ublkd", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=deadline,
        **options,
    )
