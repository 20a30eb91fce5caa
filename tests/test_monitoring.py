"""A real Prometheus and a real Alertmanager hear of a dead server, from the daemon and by the rules, and that it is served
again; and of everything that happened while Alertmanager, and then the daemon, were away.
"""

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import bcrypt
import pytest
import yaml

from duende_ublkd.core.webconfig import WebConfig
from duende_ublkd.report import webfile
from duende_ublkd.report.metrics import Metrics
from duende_ublkd.report.web import WebServer
from tests import monitors, watched_guest
from tests.certificates import Authority
from tests.lab import kernels, network, qemu
from tests.lab.errors import LabError
from tests.monitors import Alertmanager, Prometheus, free_port, wait_until
from tests.native import build as native
from tests.test_prometheus import queries
from tests.test_report import a_device, a_report
from tests.test_web import ASource

UNSERVED = "DuendeUblkdUnserved"
SOON = 180.0  # seconds, on a machine that is busy with guests, and in one of them
BOOTED_WITHIN = 600.0
GUEST_LIMIT = 1500.0  # of the whole guest; it takes about 300
OUTAGE = 60.0
GOODBYE = 60.0

pytestmark = pytest.mark.skipif(not monitors.is_possible(), reason="neither Prometheus nor Alertmanager here")


@contextmanager
def a_daemon(place: Path, port: int, *world: str) -> Iterator["subprocess.Popen[str]"]:
    """tests.scripted_daemon, whose world has these deeds behind it."""
    (place / "run").mkdir(mode=0o755, exist_ok=True)
    command = [sys.executable, "-m", "tests.scripted_daemon", str(place / "config.toml"), str(place / "run"), str(port)]
    words = [word for deed in world for word in deed.split()]
    with subprocess.Popen([*command, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            said(process, "ready")
            yield process
        finally:
            process.kill()


def said(process: "subprocess.Popen[str]", word: str) -> None:
    assert process.stdout
    assert process.stdout.readline().strip() == word


def happens(process: "subprocess.Popen[str]", deed: str) -> None:
    assert process.stdin
    process.stdin.write(f"{deed}\n")
    process.stdin.flush()
    said(process, "done")


def configure(place: Path, alertmanager: str) -> None:
    (place / "config.toml").write_text(
        f"""
[daemon]
state_dir = "{place / "state"}"
[policy]
recovery_deadline = "1s"
orphan_grace = "100ms"
[[alert]]
sink = "alertmanager"
url = "{alertmanager}"
severity = "info"
resend = "5s"
"""
    )


def pushed(alertmanager: Alertmanager, name: str, **labels: str) -> list[dict[str, Any]]:
    """Those that the daemon has sent."""
    return [each for each in alertmanager.alerts(alertname=name, **labels) if "key" in each["labels"]]


def sample(prometheus: Prometheus, expression: str) -> float | None:
    """The only one; None: there is none."""
    found = prometheus.query(expression)
    assert len(found) <= 1, found
    return found[0][1] if found else None


def by_rule(alertmanager: Alertmanager, name: str, **labels: str) -> list[dict[str, Any]]:
    return alertmanager.alerts(alertname=name, key="", **labels)


def check_a_death(prometheus: Prometheus, alertmanager: Alertmanager, kill: Callable[[], None]) -> None:
    """ublk3 has a server, and then it has none."""
    wait_until(lambda: live(prometheus) == 1, SOON, "Prometheus sees a device")
    assert not alertmanager.alerts(dev_id="3")
    kill()
    (told,) = wait_until(lambda: pushed(alertmanager, UNSERVED, dev_id="3"), SOON, "the daemon tells of it")
    assert told["annotations"]["runbook_url"].endswith("#alert-unserved")
    since = 'duende_ublkd_device_verdict_since_timestamp_seconds{dev_id="3",verdict="unserved"}'
    wait_until(lambda: sample(prometheus, f"time() - {since} < 600"), SOON, "Prometheus has a sample of it")
    wait_until(lambda: prometheus.firing(UNSERVED, dev_id="3"), SOON, "the rule fires")

    def is_silenced() -> bool:
        return [each["status"]["inhibitedBy"] for each in by_rule(alertmanager, UNSERVED)] == [[told["fingerprint"]]]

    wait_until(is_silenced, SOON, "what was pushed silences the rule's alert")
    delivered = 'duende_ublkd_alerts_total{sink="alertmanager",outcome="delivered"}'
    wait_until(lambda: sample(prometheus, delivered), SOON, "the delivery is counted")


def check_a_recovery(prometheus: Prometheus, alertmanager: Alertmanager, recover: Callable[[], None]) -> None:
    recover()
    wait_until(lambda: not alertmanager.alerts(alertname=UNSERVED), SOON, "both alerts are over")
    assert not prometheus.firing(UNSERVED)
    since = 'duende_ublkd_device_verdict_since_timestamp_seconds{dev_id="3"}'
    assert [labels["verdict"] for labels, _ in prometheus.query(since)] == ["live"]


def live(prometheus: Prometheus) -> float | None:
    return sample(prometheus, 'duende_ublkd_devices{verdict="live"}')


def waiting(prometheus: Prometheus) -> float:
    """Alerts that are not delivered."""
    return sample(prometheus, "duende_ublkd_alert_queue_length") or 0.0


def check_the_dashboard(prometheus: Prometheus) -> None:
    """Prometheus takes each query, and a panel is empty only where there is nothing to be seen."""
    empty = [query for query in queries() if not prometheus.query(query)]
    assert all(re.search(r"> 0$|hold_|recovery_attempts|_bucket", query) for query in empty), empty
    assert len(empty) < len(queries()) / 3


def check_every_alert_is_there(alertmanager: Alertmanager, since: float) -> None:
    """Of what happened before `since`: 3 and 4 have no server, and 5 was an orphan."""
    for name, dev_id in ((UNSERVED, "3"), (UNSERVED, "4"), ("DuendeUblkdCleaned", "5")):
        (told,) = wait_until(lambda: pushed(alertmanager, name, dev_id=dev_id), SOON, f"{name} of ublk{dev_id}")  # noqa: B023
        assert datetime.fromisoformat(told["startsAt"]).timestamp() < since


def test_a_dead_server_is_an_alert_by_two_ways_told_once_and_over_when_it_is_served_again(tmp_path: Path) -> None:
    port = free_port()
    host = socket.gethostname()
    with (
        Alertmanager(tmp_path) as alertmanager,
        Prometheus(tmp_path, [f"127.0.0.1:{port}"], alertmanager, host=host) as prometheus,
    ):
        configure(tmp_path, alertmanager.address)
        with a_daemon(tmp_path, port, "serve 3") as daemon:
            check_a_death(prometheus, alertmanager, lambda: happens(daemon, "kill 3"))
            check_the_dashboard(prometheus)
            check_a_recovery(prometheus, alertmanager, lambda: happens(daemon, "recover 3"))
        wait_until(lambda: prometheus.firing("DuendeUblkdDown"), SOON, "a daemon that is gone is noticed")
        wait_until(lambda: by_rule(alertmanager, "DuendeUblkdDown", host=host), SOON, "and told")


def test_what_happens_while_alertmanager_and_then_the_daemon_is_away_is_told_when_they_are_back(tmp_path: Path) -> None:
    port = free_port()
    with Alertmanager(tmp_path) as alertmanager, Prometheus(tmp_path, [f"127.0.0.1:{port}"]) as prometheus:
        configure(tmp_path, alertmanager.address)
        with a_daemon(tmp_path, port, "serve 3", "serve 4", "lend 5") as daemon:
            wait_until(lambda: live(prometheus) == 3, SOON, "three devices")
            alertmanager.stop()
            for deed in ("kill 3", "kill 5"):
                happens(daemon, deed)
            wait_until(lambda: waiting(prometheus) == 2, SOON, "two alerts wait")
            wait_until(lambda: prometheus.firing("DuendeUblkdSinkFailing"), SOON, "Prometheus knows that they do")
            daemon.kill()
        with a_daemon(tmp_path, port, "serve 3", "serve 4", "kill 3", "kill 4"):
            wait_until(lambda: waiting(prometheus) == 3, SOON, "three alerts wait")
            back_at = time.time()
            alertmanager.start()
            check_every_alert_is_there(alertmanager, back_at)
            wait_until(lambda: waiting(prometheus) == 0, SOON, "nothing waits")
            lost = 'sum(duende_ublkd_alerts_total{outcome=~"undeliverable|dropped"})'
            assert sample(prometheus, lost) == 0


def the_secured_job(place: Path, port: int) -> dict[str, Any]:
    """Of deploy/prometheus/scrape.yml, with the files that it names in this directory."""
    text = (
        (monitors.DEPLOY / "prometheus" / "scrape.yml").read_text().replace("/etc/prometheus/duende-ublkd", str(place))
    )
    job: dict[str, Any] = yaml.safe_load(text)["scrape_configs"][1]
    authority = Authority(place)
    authority.issue(place / "server", "127.0.0.1")
    authority.issue(place / "prometheus", "prometheus")
    (place / "password").write_text("geheim\n")
    (place / "targets").mkdir()
    (place / "targets" / "berlin.yml").write_text(json.dumps([{"targets": [f"127.0.0.1:{port}"]}]))
    return {**job, "scrape_interval": "2s", "scrape_timeout": "2s"}


def the_web_configuration(place: Path) -> WebConfig:
    known = bcrypt.hashpw(b"geheim", bcrypt.gensalt(4)).decode()
    text = f"""
tls_server_config:
  cert_file: server.crt
  key_file: server.key
  client_auth_type: RequireAndVerifyClientCert
  client_ca_file: ca.crt
basic_auth_users:
  prometheus: {known}
"""
    return webfile.load(text.encode(), "web.yml", lambda name, _: (place / name).read_bytes())


def test_prometheus_comes_in_with_the_certificate_and_the_password_of_the_scrape_configuration(tmp_path: Path) -> None:
    port = free_port()
    job = the_secured_job(tmp_path, port)
    metrics = Metrics()
    metrics.passed(a_report(a_device(3)))

    def scrape() -> None:
        with Prometheus(tmp_path, [], job=job) as prometheus:
            up = 'up{job="duende-ublkd",host="127.0.0.1"}'
            wait_until(lambda: sample(prometheus, up) == 1, SOON, "it is let in")
            assert live(prometheus) == 1
            (tmp_path / "password").write_text("gehein\n")
            wait_until(lambda: sample(prometheus, up) == 0, SOON, "without the password it is not")

    async def serve() -> None:
        server = WebServer(ASource(), metrics)
        await server.listen("127.0.0.1", port, the_web_configuration(tmp_path))
        try:
            await asyncio.to_thread(scrape)
        finally:
            await server.close()

    asyncio.run(serve())


# --- the same with a real device, a real daemon, and a kernel that has the driver


class Guest:
    """tests.watched_guest in QEMU, with its two ports on this host's 127.0.0.1; a context manager that leaves no QEMU."""

    def __init__(self, alertmanager: Alertmanager) -> None:
        self.port = free_port()  # of its daemon
        self._deeds_port = free_port()
        self._alertmanager = alertmanager
        self._said: list[str] = []
        self._is_unwanted = False
        self._result: qemu.GuestResult | None = None
        self._thread = threading.Thread(target=self._run, name="guest")

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._deeds = wait_until(self._reach, BOOTED_WITHIN, "the guest is up")
        except BaseException:
            self._give_up()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._deeds.close()
        self._give_up()
        print(self.output)

    def _give_up(self) -> None:
        """Unless it has ended: have it end, and else its QEMU."""
        with contextlib.suppress(OSError):
            self._tell("end")
        self._thread.join(GOODBYE)
        self._is_unwanted = True
        self._thread.join(GOODBYE)

    @property
    def output(self) -> str:
        return "".join(self._said)

    def do(self, deed: str) -> None:
        self._deeds.sendall(f"{deed}\n".encode())
        assert self._deeds.recv(100) == b"done\n", self.output

    def end(self) -> None:
        """And nothing was amiss in it."""
        self._deeds.sendall(b"end\n")
        self._thread.join(SOON)
        assert self._result, self.output
        assert self._result.passed, self.output

    def _reach(self) -> socket.socket | None:
        """QEMU takes connections to its ports before there is anybody in the guest."""
        assert self._thread.is_alive(), self.output
        try:
            deeds = socket.create_connection(("127.0.0.1", self._deeds_port), timeout=SOON)
        except OSError:
            return None
        deeds.settimeout(5)
        with contextlib.suppress(OSError):
            if deeds.recv(100) == b"ready\n":
                deeds.settimeout(SOON)
                return deeds
        deeds.close()
        return None

    def _tell(self, deed: str) -> None:
        with socket.create_connection(("127.0.0.1", self._deeds_port), timeout=5) as deeds:
            deeds.sendall(f"{deed}\n".encode())

    def _note(self, text: str) -> None:
        """An error here is the end of QEMU."""
        self._said.append(text)
        if self._is_unwanted:
            raise LabError("the guest was not wanted any more", "see what the test says")

    def _run(self) -> None:
        kernel = kernels.fetch(kernels.names()[0])
        forwarded = {self.port: watched_guest.METRICS_PORT, self._deeds_port: watched_guest.DEEDS_PORT}
        self._result = qemu.run(
            kernel,
            ["python3", "-m", "tests.watched_guest", str(self._alertmanager.port)],
            timeout_s=GUEST_LIMIT,
            on_output=self._note,
            extras={**native.guest_files(), **network.extras(kernel)},
            hardware=network.hardware(forwarded),
        )


def test_a_real_server_killed_in_a_guest_is_told_of_though_alertmanager_and_the_daemon_go_away(tmp_path: Path) -> None:
    with Alertmanager(tmp_path) as alertmanager, Guest(alertmanager) as guest:
        target = f"127.0.0.1:{guest.port}"
        with Prometheus(tmp_path, [target], alertmanager, host="lab", every=5) as prometheus:
            for deed in ("start", "serve 3"):
                guest.do(deed)
            check_a_death(prometheus, alertmanager, lambda: guest.do("kill 3"))
            check_a_recovery(prometheus, alertmanager, lambda: guest.do("recover 3"))
            check_an_outage(prometheus, alertmanager, guest)
            guest.end()


def check_an_outage(prometheus: Prometheus, alertmanager: Alertmanager, guest: Guest) -> None:
    for deed in ("serve 4", "lend 5"):
        guest.do(deed)
    wait_until(lambda: live(prometheus) == 3, SOON, "three devices")
    alertmanager.stop()
    stopped_at = time.time()
    for deed in ("kill 3", "kill 5"):
        guest.do(deed)
    wait_until(lambda: waiting(prometheus) >= 2, SOON, "two alerts wait")
    for deed in ("crash", "kill 4", "start"):
        guest.do(deed)
    wait_until(lambda: waiting(prometheus) >= 3, SOON, "three alerts wait")
    wait_until(lambda: time.time() - stopped_at >= OUTAGE, SOON, "Alertmanager was away for a minute")
    back_at = time.time()
    alertmanager.start()
    check_every_alert_is_there(alertmanager, back_at)
    for deed in ("recover 3", "recover 4"):
        guest.do(deed)
    wait_until(lambda: not alertmanager.alerts(alertname=UNSERVED), SOON, "those that are served are over")
    wait_until(lambda: waiting(prometheus) == 0, SOON, "nothing waits")
