"""A real Prometheus and a real Alertmanager beside a test: on ports of 127.0.0.1 that were free, in a temporary directory.

Both are context managers that leave no process behind. What their people would see is asked over their own HTTP.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from tests.lab import tools
from tests.lab.errors import need_tool

T = TypeVar("T")

DEPLOY = Path(__file__).parents[1] / "deploy"
READY_WITHIN = 60.0  # seconds; one has half a processor on a busy machine
STOPPED_WITHIN = 20.0


def is_possible() -> bool:
    return tools.is_possible("prometheus") and tools.is_possible("alertmanager")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until(found: Callable[[], T | None], within: float, what: str) -> T:
    """What `found` returns, as soon as that is something."""
    until = time.monotonic() + within
    while not (result := found()):
        assert time.monotonic() < until, f"not within {within:.0f} s: {what}"
        time.sleep(0.2)
    return result


class _Program:
    """One of them; `port` stays the same when it is stopped and started again, and so does what it has stored."""

    tool = ""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.log_path = directory / f"{self.tool}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> None:
        """Returns when it answers."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [need_tool("setpriv"), "--pdeathsig", "KILL", *self._command()],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(self._is_ready, READY_WITHIN, f"{self.tool} is ready")

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOPPED_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _is_ready(self) -> bool:
        assert self._process
        assert self._process.poll() is None, self.log_path.read_text(errors="replace")
        try:
            with urllib.request.urlopen(f"{self.address}/-/ready", timeout=5) as answer:
                return int(answer.status) == 200
        except (urllib.error.URLError, OSError):
            return False

    def get(self, path: str, **query: str) -> Any:  # noqa: ANN401 - JSON
        parameters = urllib.parse.urlencode(query)
        try:
            with urllib.request.urlopen(f"{self.address}{path}?{parameters}", timeout=20) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {query}: {error.read().decode(errors='replace')}") from error


class Alertmanager(_Program):
    """With the configuration of deploy/alertmanager, or another one."""

    tool = "alertmanager"

    def __init__(self, directory: Path, config: str | None = None, *, host: str = "127.0.0.1") -> None:
        """`host`: the address that it listens on."""
        super().__init__(directory)
        self._host = host
        self._config = directory / "alertmanager.yml"
        self._config.write_text(config or (DEPLOY / "alertmanager" / "alertmanager.yml").read_text())

    def _command(self) -> list[str]:
        program = tools.path("alertmanager")
        return [
            *_with_templates(program),
            str(program),
            f"--config.file={self._config}",
            f"--storage.path={self.directory / 'alertmanager'}",
            f"--web.listen-address={self._host}:{self.port}",
            "--cluster.listen-address=",
            "--log.level=warn",
        ]

    def alerts(self, **labels: str) -> list[dict[str, Any]]:
        """Those that fire, inhibited ones too. A label "" is one that the alert has not."""
        found = self.get("/api/v2/alerts", active="true", silenced="true", inhibited="true")
        return [each for each in found if all(each["labels"].get(name, "") == value for name, value in labels.items())]

    def post(self, *alerts: dict[str, Any]) -> None:
        request = urllib.request.Request(
            f"{self.address}/api/v2/alerts", json.dumps(alerts).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert answer.status == 200


def _with_templates(program: Path) -> list[str]:
    """Debian's opens this file by its name and no other: one that is only unpacked gets a /usr/share of its own."""
    if Path("/usr/share/prometheus/alertmanager/default.tmpl").exists():
        return []
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    share = program.parents[2] / "usr/share"
    script = f'mount --bind {shlex.quote(str(share))} /usr/share && exec "$@"'
    return [need_tool("unshare"), *as_root, "--mount", "sh", "-c", script, "sh"]


class Prometheus(_Program):
    """Scrapes `targets` as deploy/prometheus/scrape.yml does, but often. The rules of that directory wait for nothing."""

    tool = "prometheus"

    def __init__(
        self,
        directory: Path,
        targets: Sequence[str],
        alertmanager: Alertmanager | None = None,
        *,
        host: str = "",
        every: int = 2,
        job: dict[str, Any] | None = None,
    ) -> None:
        """`host`: what the targets' host calls itself, where that is not what they are reached by. `every`: seconds.

        `job`: the scrape configuration, in place of the plain one.
        """
        super().__init__(directory)
        self._job = job
        self._every = f"{every}s"
        self._host = host
        self._rules = directory / "rules"
        self._rules.mkdir()
        for path in (DEPLOY / "prometheus").glob("*.rules.yml"):
            (self._rules / path.name).write_text(re.sub(r"\bfor: \w+", "for: 0s", path.read_text()))
        self._config = directory / "prometheus.yml"
        self._config.write_text(json.dumps(self._settings(targets, alertmanager)))  # JSON is YAML

    def _settings(self, targets: Sequence[str], alertmanager: Alertmanager | None) -> dict[str, Any]:
        job: dict[str, Any] = {
            "job_name": "duende-ublkd",
            "static_configs": [{"targets": list(targets)}],
            "relabel_configs": [{"source_labels": ["__address__"], "regex": r"(.+):\d+", "target_label": "host"}],
        }
        if self._host:
            job["relabel_configs"] = [{"target_label": "host", "replacement": self._host}]
        managers = [{"static_configs": [{"targets": [f"127.0.0.1:{alertmanager.port}"]}]}] if alertmanager else []
        return {
            "global": {"scrape_interval": self._every, "scrape_timeout": self._every, "evaluation_interval": "1s"},
            "rule_files": [f"{self._rules}/*.yml"],
            "scrape_configs": [self._job or job],
            "alerting": {"alertmanagers": managers},
        }

    def _command(self) -> list[str]:
        return [
            str(tools.path("prometheus")),
            f"--config.file={self._config}",
            f"--storage.tsdb.path={self.directory / 'prometheus'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--log.level=warn",
        ]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The samples of this moment, as (labels, value)."""
        found = self.get("/api/v1/query", query=expression)["data"]
        return [(each["metric"], float(each["value"][1])) for each in found["result"]]

    def firing(self, name: str, **labels: str) -> bool:
        wanted = ",".join(f'{key}="{value}"' for key, value in labels.items())
        return bool(self.query(f'ALERTS{{alertname="{name}",alertstate="firing",{wanted}}}'))
