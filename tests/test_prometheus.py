"""What deploy/ gives to Prometheus's people, checked by their own programs: rules, scrapes, routes, and the dashboard."""

import json
import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from duende_ublkd.core.alertconfig import MOST_SINKS
from duende_ublkd.core.alerting import AlertKind
from duende_ublkd.core.holds import MOST_HOLDS, Hold
from duende_ublkd.core.model import DriverFacts, Feature
from duende_ublkd.core.trail import Trail
from duende_ublkd.report.alerts.alertmanager import name_of
from duende_ublkd.report.alerts.book import MOST_ALERTS
from duende_ublkd.report.device_series import MOST_DEVICES
from duende_ublkd.report.metrics import Metrics
from tests.lab import tools
from tests.monitors import DEPLOY, Alertmanager, wait_until
from tests.test_deploy import headings
from tests.test_metrics import GOLDEN, AJournal, Desk, Sink, Stats, text_of
from tests.test_metrics import an_alert as an_open_alert
from tests.test_report import a_device, a_report

RULES = sorted((DEPLOY / "prometheus").glob("*.rules.yml"))
RULE_TESTS = sorted((Path(__file__).parent / "rules").glob("*.test.yml"))
DASHBOARD = DEPLOY / "grafana" / "duende-ublkd.json"
STANDARD = {"up", "process_start_time_seconds", "process_resident_memory_bytes", "process_cpu_seconds_total"}
PUSHED_ONLY = {AlertKind.CLEANED, AlertKind.TEST}  # over as soon as they are raised: nothing that a scrape could see
FLEET_OF = 60  # hosts of a cluster; promtool refuses a test whose queries touch more than 10,000 samples

pytestmark = pytest.mark.skipif(
    not (tools.is_possible("promtool") and tools.is_possible("amtool")), reason="neither promtool nor amtool here"
)


def tool(name: str, *arguments: str | Path) -> str:
    """What it says when it is content."""
    done = subprocess.run(
        [tools.path(name), *arguments], check=False, capture_output=True, text=True, cwd=RULE_TESTS[0].parent
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def rules_of(path: Path) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def alerts_of(paths: Iterable[Path] = RULES) -> list[dict[str, Any]]:
    return [rule for path in paths for rule in rules_of(path) if "alert" in rule]


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.name)
def test_promtool_has_nothing_to_say_about_the_rules(path: Path) -> None:
    assert f"SUCCESS: {len(rules_of(path))} rules found" in tool("promtool", "check", "rules", "--lint=all", path)


@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.name)
def test_the_rules_do_what_their_own_tests_say(path: Path) -> None:
    assert "SUCCESS" in tool("promtool", "test", "rules", path)


def expected_to_fire(path: Path) -> set[str]:
    """The alerts that a test of rules expects to see."""
    found = set()
    for test in yaml.safe_load(path.read_text())["tests"]:
        for each in test["promql_expr_test"]:
            for sample in each["exp_samples"]:
                found.update(re.findall(r'alertname="(\w+)"', sample["labels"]))
    return found


def test_each_alert_was_seen_firing() -> None:
    (rules,) = (path for path in RULES if "fleet" not in path.name)
    seen = set.union(*map(expected_to_fire, RULE_TESTS))
    assert {alert["alert"] for alert in alerts_of([rules])} == seen


def test_each_alert_says_how_much_it_matters_what_it_is_and_where_to_read_on() -> None:
    for alert in alerts_of():
        name, annotations = alert["alert"], alert["annotations"]
        assert alert["labels"]["severity"] in ("info", "warning", "critical"), name
        assert annotations.keys() == {"summary", "description", "runbook_url"}, name
        page, _, anchor = annotations["runbook_url"].partition("#")
        assert page == "README.md", name
        assert anchor in headings(), f"{name}: README has no heading for #{anchor}"


def test_each_alert_of_the_daemons_own_has_a_heading_and_a_rule_of_the_same_name() -> None:
    rules = {alert["alert"]: alert for alert in alerts_of()}
    for kind in AlertKind:
        assert kind.runbook in headings(), kind
        if kind in PUSHED_ONLY:
            continue
        rule = rules[name_of(kind.value)]
        assert rule["labels"]["severity"] == kind.severity.value, kind
        assert rule["annotations"]["runbook_url"].endswith(f"#{kind.runbook}"), kind
        assert kind.value in (rule["labels"].get("kind"), *re.findall(r'kind="([^"]+)"', rule["expr"])), kind


def known_metrics() -> set[str]:
    exposed = set(re.findall(r"^(\w+)", re.sub(r"^#.*$", "", GOLDEN.read_text(), flags=re.MULTILINE), re.MULTILINE))
    return exposed | STANDARD


def metrics_in(expression: str) -> set[str]:
    """Every name in it that could be one of ours; recorded ones have colons."""
    return set(re.findall(r"\b(?:[\w:]*duende_ublkd_[\w:]+|up\b|process_\w+)", re.sub(r'"[^"]*"', '""', expression)))


def test_each_rule_asks_for_metrics_that_there_are() -> None:
    for path in RULES:
        known = known_metrics() | {rule["record"] for rule in rules_of(path) if "record" in rule}
        for rule in rules_of(path):
            asked = metrics_in(rule["expr"])
            assert asked, rule
            assert asked <= known, rule


# --- a fleet


def a_fleet(hosts: int) -> list[dict[str, str]]:
    """Cluster x, in which everything goes wrong on one host in ten, and y, which is as large and well."""
    series: list[dict[str, str]] = []

    def add(name: str, values: str, **labels: str) -> None:
        shown = ",".join(f'{key}="{value}"' for key, value in labels.items())
        series.append({"series": f"{name}{{{shown}}}", "values": values})

    for cluster in ("x", "y"):
        for host in range(hosts):
            sick = cluster == "x" and host % 10 == 0
            here = {"cluster": cluster, "job": "duende-ublkd", "instance": f"{cluster}{host}"}
            add("up", "0x10" if sick else "1x10", **here)
            if not sick:  # what is down tells nothing of its driver
                add("duende_ublkd_driver_up", "0x10" if cluster == "x" and host % 10 == 1 else "1x10", **here)
            for verdict in ("live", "unserved"):
                count = int(sick) if verdict == "unserved" else 3
                add("duende_ublkd_devices", f"{count}x10", verdict=verdict, **here)
            add("duende_ublkd_orphans_detected_total", "0+60x10" if sick else "0x10", **here)
            for edge in ("60", "+Inf"):
                add("duende_ublkd_reaction_seconds_bucket", "0+9x10" if sick else "0x10", le=edge, **here)
    return series


def fire_of_a_fleet(directory: Path, hosts: int, expected: list[dict[str, Any]]) -> float:
    """Evaluate the fleet's rules with promtool, and see whether these alerts fire; returns the seconds that it took."""
    text = {
        "rule_files": [str(path) for path in RULES if "fleet" in path.name],
        "evaluation_interval": "5m",
        "tests": [
            {
                "interval": "5m",
                "input_series": a_fleet(hosts),
                "promql_expr_test": [
                    {
                        "expr": 'count by (alertname, cluster) (ALERTS{alertstate="firing"})',
                        "eval_time": "45m",
                        "exp_samples": expected,
                    }
                ],
            }
        ],
    }
    path = directory / f"fleet-{hosts}.yml"
    path.write_text(json.dumps(text))
    began = time.monotonic()
    tool("promtool", "test", "rules", path)
    return time.monotonic() - began


def test_a_fleet_sends_one_alert_for_each_thing_that_is_wrong_with_it(tmp_path: Path) -> None:
    (fleet,) = (path for path in RULES if "fleet" in path.name)
    expected = [{"labels": f'{{alertname="{alert["alert"]}",cluster="x"}}', "value": 1} for alert in alerts_of([fleet])]
    took = fire_of_a_fleet(tmp_path, FLEET_OF, expected)
    print(f"\n{2 * FLEET_OF} hosts: {took:.1f} s for ten evaluations")


def test_a_handful_of_hosts_is_no_fleet(tmp_path: Path) -> None:
    one_slow = [{"labels": '{alertname="DuendeUblkdFleetSlow",cluster="x"}', "value": 1}]
    fire_of_a_fleet(tmp_path, 10, one_slow)


def test_no_series_of_the_fleets_has_a_host_or_a_device_in_it() -> None:
    (fleet,) = (path for path in RULES if "fleet" in path.name)
    for rule in rules_of(fleet):
        outermost = re.match(r"(?:sum|count)\s*by\s*\(([^)]*)\)", rule["expr"])
        if "record" in rule and outermost:
            labels = {label.strip() for label in outermost[1].split(",")}
            assert labels <= {"cluster", "job", "version", "verdict", "kind", "action", "outcome", "le"}, rule
        else:  # of what is aggregated already
            assert all(name.startswith("cluster_job") for name in metrics_in(rule["expr"])), rule


# --- scraping


def test_promtool_takes_the_scrape_configuration_and_both_jobs_have_the_name_that_the_rules_ask_for() -> None:
    path = DEPLOY / "prometheus" / "scrape.yml"
    tool("promtool", "check", "config", "--syntax-only", path)
    plain, secured = yaml.safe_load(path.read_text())["scrape_configs"]
    assert plain["job_name"] == "duende-ublkd"
    assert {"target_label": "job", "replacement": "duende-ublkd"} in secured["relabel_configs"]
    assert secured["tls_config"].keys() >= {"ca_file", "cert_file", "key_file"}
    assert secured["basic_auth"].keys() == {"username", "password_file"}
    most = a_full_host()
    for job in (plain, secured):
        assert job["sample_limit"] > most


def a_full_host() -> int:
    """Samples of as many devices, holds, alerts and sinks as there can be, with room for 100 errors of the kernel's."""
    metrics = Metrics()
    devices = [replace(a_device(each), trail=Trail(attempts=1)) for each in range(MOST_DEVICES)]
    holds = [Hold(each, 0.0, 1.0, 0, "") for each in range(MOST_HOLDS)]
    alerts = [an_open_alert(AlertKind.UNSERVED, f"ublk{each}/1/unserved", each) for each in range(MOST_ALERTS)]
    names = [f"sink{each}" for each in range(MOST_SINKS)]
    desk = Desk(alerts, [Sink(name, last_ok_at=1.0) for name in names], {name: Stats() for name in names})
    metrics.read_from(overdue=int, locked=int, store=AJournal(), holds=lambda: holds, alerts=desk)
    metrics.passed(a_report(*devices, driver=DriverFacts(~Feature(0), 64)))
    samples = sum(not line.startswith("#") for line in text_of(metrics).splitlines())
    print(f"\na full host: {samples} samples")
    return samples + 100


# --- Alertmanager


def test_amtool_has_nothing_to_say_about_the_routes() -> None:
    said = tool("amtool", "check-config", DEPLOY / "alertmanager" / "alertmanager.yml")
    assert "SUCCESS" in said
    assert "4 inhibit rules" in said


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        ({"alertname": "DuendeUblkdUnserved", "severity": "critical"}, "on-call"),
        ({"alertname": "DuendeUblkdFleetDown", "severity": "critical"}, "on-call"),
        ({"alertname": "DuendeUblkdPinned", "severity": "warning"}, "tickets"),
        ({"alertname": "DuendeUblkdCleaned", "severity": "info"}, "log"),
        ({"alertname": "SomethingElse", "severity": "critical"}, "tickets"),
    ],
)
def test_each_severity_has_its_receiver(labels: dict[str, str], receiver: str) -> None:
    config = DEPLOY / "alertmanager" / "alertmanager.yml"
    given = [f"{name}={value}" for name, value in labels.items()]
    said = tool("amtool", "config", "routes", "test", f"--config.file={config}", *given)
    assert said.splitlines()[0] == receiver


def an_alert(name: str, **labels: str) -> dict[str, Any]:
    return {"labels": {"alertname": f"DuendeUblkd{name}", **labels}}


@pytest.mark.skipif(not tools.is_possible("alertmanager"), reason="no Alertmanager here")
def test_what_was_pushed_silences_its_rule_and_a_cluster_silences_its_hosts(tmp_path: Path) -> None:
    unserved = {"kind": "unserved", "dev_id": "3", "host": "a"}
    journal = {"kind": "degraded", "host": "a"}
    posted = [
        an_alert("Unserved", key="ublk3/7/unserved", **unserved),
        an_alert("Unserved", job="duende-ublkd", instance="a:10116", **unserved),
        an_alert("Unserved", job="duende-ublkd", **{**unserved, "host": "b"}),
        an_alert("Unattended", dev_id="3", host="a"),
        an_alert("Degraded", key="daemon/journal", **journal),
        an_alert("JournalDown", cause="journal", **journal),
        an_alert("FleetDown", cluster="x"),
        an_alert("Down", cluster="x", host="c"),
        an_alert("Down", cluster="y", host="d"),
    ]
    with Alertmanager(tmp_path) as alertmanager:
        alertmanager.post(*posted)

        def silenced() -> set[tuple[str, str, str]]:
            inhibited = (each for each in alertmanager.alerts() if each["status"]["inhibitedBy"])
            labels = (each["labels"] for each in inhibited)
            return {(each["alertname"], each.get("host", ""), each.get("key", "")) for each in labels}

        wait_until(lambda: len(alertmanager.alerts()) == len(posted) and silenced(), 20, "all are there")
        wanted = {("DuendeUblkdUnserved", "a", ""), ("DuendeUblkdJournalDown", "a", ""), ("DuendeUblkdDown", "c", "")}
        wait_until(lambda: silenced() == wanted, 20, f"{wanted} are silenced")


# --- the dashboard


def panels() -> list[dict[str, Any]]:
    found = json.loads(DASHBOARD.read_text())["panels"]
    assert len(found) > 20
    return [each for each in found if each["type"] != "row"]


def queries() -> list[str]:
    """As Grafana would send them."""
    found = []
    for panel in panels():
        for target in panel["targets"]:
            text = str(target["expr"]).replace("$__rate_interval", "5m")
            found.append(re.sub(r"\$(\w+)", ".*", text))
    return found


def test_promtool_takes_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"query:{number}", "expr": each} for number, each in enumerate(queries())]
    path = tmp_path / "queries.yml"
    path.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
    assert f"SUCCESS: {len(rules)} rules found" in tool("promtool", "check", "rules", path)


def test_every_query_of_the_dashboard_asks_for_metrics_that_there_are() -> None:
    shown = set()
    for query in queries():
        asked = metrics_in(query)
        assert asked, query
        assert asked <= known_metrics(), query
        shown |= asked
    for name in ("duende_ublkd_devices", "duende_ublkd_alert_sink_up", "duende_ublkd_event_loop_lag_seconds"):
        assert name in shown


def test_the_dashboard_has_no_data_source_of_its_own_and_no_two_panels_in_one_place() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert "id" not in dashboard
    taken: set[tuple[int, int]] = set()
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(numbers) == len(set(numbers))
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references)), panel["title"]
    defined = {each["name"] for each in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", DASHBOARD.read_text())) - {"__rate_interval", "__all"}
    assert used <= defined
