"""What a scrape says: a fixed world's whole text, what Prometheus's own tool thinks of it, and what it costs the loop."""

import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from duende_ublkd.core.alerting import Alert, AlertKind, Severity
from duende_ublkd.core.holds import Hold
from duende_ublkd.core.model import Action, Deed, DriverFacts, Feature, Judged, Outcome, Server, VerdictKind
from duende_ublkd.core.text import printable
from duende_ublkd.core.trail import Trail
from duende_ublkd.kernel.abi import Command
from duende_ublkd.report import device_series
from duende_ublkd.report.device_series import Clock
from duende_ublkd.report.metrics import COMMANDS, Metrics
from duende_ublkd.report.store import StoreStats
from tests.lab import tools
from tests.test_report import HOSTILE, a_device, a_report

GOLDEN = Path(__file__).parent / "golden" / "metrics.txt"
README = Path(__file__).parents[1] / "README.md"
BOOT = 1_800_000_000.0  # seconds since the epoch, when CLOCK_MONOTONIC was 0
NOW = 5000.0


@dataclass
class AJournal:
    stats: StoreStats = field(default_factory=lambda: StoreStats(written=120, dropped=3, waiting=2, trouble="full"))


@dataclass
class Stats:
    delivered: int = 0
    failed: int = 0
    undeliverable: int = 0
    dropped: int = 0
    suppressed: int = 0


@dataclass
class Sink:
    name: str
    waiting: int = 0
    last_ok_at: float | None = None
    last_error: str = ""


@dataclass
class Desk:
    """The alerts as the daemon has them."""

    alerts: Sequence[Alert] = ()
    sinks: Sequence[Sink] = ()
    stats: dict[str, Stats] = field(default_factory=dict)
    queue_length: int = 0


def an_alert(kind: AlertKind, key: str, dev_id: int | None = None, raised_at: float = BOOT) -> Alert:
    return Alert(key, kind, Severity.WARNING, "it is so", raised_at, dev_id)


def at(seconds: float) -> Clock:
    """A clock that stands still."""
    return Clock(lambda: BOOT + seconds, lambda: seconds)


def a_fixed_world() -> Metrics:
    """Everything that there is to be seen, once."""
    metrics = Metrics(at(NOW))
    hold = Hold(4, NOW - 60, NOW + 540, 0, "upgrade")
    desk = Desk(
        (
            an_alert(AlertKind.UNSERVED, "ublk4/1004/unserved", 4, BOOT + 4900.25),
            an_alert(AlertKind.DEGRADED, "daemon/journal", None, BOOT + 4000),
        ),
        (Sink("alertmanager", 0, BOOT + 4950.5), Sink("pager", 2, None, "HTTP 500")),
        {"alertmanager": Stats(7, 1), "pager": Stats(0, 9, 1, 0, 4)},
        2,
    )
    metrics.read_from(
        overdue=lambda: 1,
        locked=lambda: 41_943_040,
        store=AJournal(),
        holds=lambda: [hold],
        lag=lambda: 0.0125,
        alerts=desk,
        dry_run=lambda: True,
    )
    unserved = replace(
        a_device(4, kind=VerdictKind.UNSERVED, reason="nobody serves it", server=None),
        since=NOW - 120.5,
        hold=hold,
        trail=Trail(attempts=2),
    )
    live = replace(a_device(3), since=NOW - 4000)
    driver = DriverFacts(Feature.USER_RECOVERY | Feature.QUIESCE, 64)
    orphan = a_device(9, kind=VerdictKind.ORPHANED)
    metrics.passed(a_report(live, unserved, at=NOW - 1, took=0.25, changed=(live, unserved, orphan), driver=driver))
    metrics.passed(
        a_report(live, unserved, deeds=(Deed(9, Action.DELETE, Outcome.DELETED, "", 0.003, 0.5),), full=False)
    )
    metrics.command("GET_DEV_INFO", "ok", 0.0002)
    metrics.command("DEL_DEV_ASYNC", "EBUSY", 0.004)
    metrics.uevent("ublk-char", "add")
    metrics.overflowed()
    return metrics


def text_of(metrics: Metrics) -> str:
    return metrics.render().decode()


def without_this_machine(text: str) -> str:
    """Without the series of the process itself, and without the versions."""
    lines = [line for line in text.splitlines() if not re.match(r"(# \w+ )?process_", line)]
    return re.sub(r"build_info\{.*\}", 'build_info{python="…",version="…"}', "\n".join(lines)) + "\n"


def families(metrics: Metrics) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text_of(metrics))}


def samples(metrics: Metrics, name: str) -> Iterator[dict[str, str]]:
    for family in text_string_to_metric_families(text_of(metrics)):
        yield from (sample.labels for sample in family.samples if sample.name == name)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(text_of(metrics)):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return None


def test_a_fixed_world_gives_the_text_that_is_written_down() -> None:
    """To take a change over: run this test, and copy what it says is different, after a look at it."""
    assert without_this_machine(text_of(a_fixed_world())) == GOLDEN.read_text()


@pytest.mark.skipif(not tools.is_possible("promtool"), reason="no promtool here")
def test_promtool_has_nothing_to_say_about_a_scrape() -> None:
    for metrics in (Metrics(), a_fixed_world()):
        done = subprocess.run(
            [tools.path("promtool"), "check", "metrics"], check=False, input=metrics.render(), capture_output=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.skipif(not tools.is_possible("promtool"), reason="no promtool here")
def test_promtool_would_have_something_to_say() -> None:
    text = text_of(Metrics()).replace("resyncs_total", "resyncs")
    done = subprocess.run(
        [tools.path("promtool"), "check", "metrics"], check=False, input=text.encode(), capture_output=True
    )
    assert b'counter metrics should have "_total" suffix' in done.stderr
    assert done.returncode != 0


def test_every_metric_stands_in_readme() -> None:
    readme = README.read_text()
    names = set(re.findall(r"^# TYPE (\S+)", text_of(a_fixed_world()), re.MULTILINE))
    ours = {name.removeprefix("duende_ublkd_") for name in names if not name.startswith("process_")}
    assert len(ours) > 30
    assert [name for name in sorted(ours) if f"`{name}" not in readme] == []


def test_a_device_that_is_gone_has_no_series() -> None:
    metrics = Metrics()
    metrics.passed(a_report(a_device(3), a_device(4)))
    assert value(metrics, "duende_ublkd_devices", verdict="live") == 2
    assert 'dev_id="4"' in text_of(metrics)
    metrics.passed(a_report(a_device(3)))
    assert 'dev_id="4"' not in text_of(metrics)
    assert value(metrics, "duende_ublkd_devices", verdict="live") == 1


def test_a_device_shows_its_present_verdict_and_no_former_one() -> None:
    metrics = Metrics(at(NOW))
    metrics.passed(a_report(replace(a_device(3), since=NOW - 9)))
    wedged = replace(a_device(3, kind=VerdictKind.WEDGED), since=NOW - 1)
    name = "duende_ublkd_device_verdict_since_timestamp_seconds"
    assert value(metrics, name, dev_id="3", verdict="live") == BOOT + NOW - 9
    metrics.passed(a_report(wedged))
    assert list(samples(metrics, name)) == [{"dev_id": "3", "verdict": "wedged"}]
    assert value(metrics, name, dev_id="3", verdict="wedged") == BOOT + NOW - 1


def test_the_first_look_tells_of_the_driver_and_nothing_before_it_does() -> None:
    metrics = Metrics()
    for name in ("driver_up", "devices", "slots_used", "last_full_look_timestamp_seconds"):
        assert f"duende_ublkd_{name}" not in families(metrics)
    metrics.passed(a_report(trouble="it is missing"))
    assert value(metrics, "duende_ublkd_driver_up") == 0
    assert "duende_ublkd_last_full_look_timestamp_seconds" not in families(metrics)
    metrics.passed(a_report())
    assert value(metrics, "duende_ublkd_driver_up") == 1
    assert value(metrics, "duende_ublkd_devices", verdict="unknown") == 0
    assert "duende_ublkd_last_full_look_timestamp_seconds" in families(metrics)


def test_whether_it_only_says_what_it_would_do_is_asked_in_each_scrape() -> None:
    metrics, answers = Metrics(), [False, True]
    assert value(metrics, "duende_ublkd_dry_run") == 0
    metrics.read_from(overdue=int, locked=int, dry_run=answers.pop)
    assert value(metrics, "duende_ublkd_dry_run") == 1
    assert value(metrics, "duende_ublkd_dry_run") == 0


def test_what_was_done_is_counted() -> None:
    metrics = Metrics()
    metrics.passed(a_report(deeds=(Deed(3, Action.DELETE, Outcome.DELETED, "", 0.003, 0.5),)))
    metrics.passed(a_report(deeds=(Deed(3, Action.DELETE, None, "EPERM", 0.003),)))
    metrics.command("GET_DEV_INFO", "ok", 0.0002)
    assert value(metrics, "duende_ublkd_actions_total", action="delete", outcome="deleted") == 1
    assert value(metrics, "duende_ublkd_actions_total", action="delete", outcome="failed") == 1
    assert value(metrics, "duende_ublkd_reaction_seconds_count") == 1
    assert value(metrics, "duende_ublkd_control_commands_total", command="GET_DEV_INFO", result="ok") == 1


def test_every_counter_whose_labels_are_known_is_there_before_its_first_event() -> None:
    metrics = Metrics()
    for outcome in Outcome:
        action = "recover" if "recover" in outcome.value else "delete"
        assert value(metrics, "duende_ublkd_actions_total", action=action, outcome=outcome.value) == 0
    for action in ("delete", "recover"):
        assert value(metrics, "duende_ublkd_actions_total", action=action, outcome="failed") == 0
    for command in COMMANDS:
        assert value(metrics, "duende_ublkd_control_commands_total", command=command, result="overdue") == 0
        assert value(metrics, "duende_ublkd_control_command_seconds_count", command=command) == 0
    assert value(metrics, "duende_ublkd_uevents_total", subsystem="ublk-char", action="remove") == 0


def test_the_commands_that_are_counted_are_ublks() -> None:
    assert set(COMMANDS) <= {command.name for command in Command}


def test_no_value_of_a_label_is_made_up_by_who_reports_it() -> None:
    metrics = Metrics()
    before = len(text_of(metrics).splitlines())
    for number in range(300):
        metrics.command(f"COMMAND_{number}", f"E{number}", 0.1)
        metrics.uevent(f"subsystem{number}", f"action{number}")
    assert value(metrics, "duende_ublkd_control_commands_total", command="other", result="other") == 300
    assert value(metrics, "duende_ublkd_uevents_total", subsystem="other", action="other") == 300
    assert len(text_of(metrics).splitlines()) < before + 20


def test_hostile_names_break_no_line_and_come_back_as_they_were() -> None:
    server = Server(7, alive=True, comm=printable(HOSTILE), unit="dev-disk-by\\x2dlabel\n.swap")
    metrics = Metrics()
    metrics.passed(a_report(a_device(server=server)))
    for line in text_of(metrics).splitlines():
        assert line.isprintable()
        assert line.startswith(("#", "duende_ublkd_", "process_"))
    (labels,) = samples(metrics, "duende_ublkd_device_info")
    assert labels["server_comm"] == printable(HOSTILE)
    assert labels["unit"] == "dev-disk-by\\x2dlabel\n.swap"


def test_a_server_that_renames_itself_at_each_look_makes_a_handful_of_series() -> None:
    metrics = Metrics()
    seen = set()
    for number in range(100):
        server = Server(7, alive=True, comm=f"name-{number}" * 40, start_time=5)
        metrics.passed(a_report(a_device(server=server)))
        (labels,) = samples(metrics, "duende_ublkd_device_info")
        seen.add(labels["server_comm"])
        assert len(labels["server_comm"]) <= 80
    assert len(seen) <= 3
    metrics.passed(a_report(a_device(server=Server(8, alive=True, comm="next", start_time=9))))
    (labels,) = samples(metrics, "duende_ublkd_device_info")
    assert labels["server_comm"] == "next"


def test_a_time_is_the_same_number_in_each_scrape_unless_the_clock_was_set() -> None:
    wall = 0.0

    def now() -> float:
        return BOOT + wall + time.monotonic()

    metrics = Metrics(Clock(now))
    metrics.passed(a_report(a_device(3)))
    name = "duende_ublkd_device_verdict_since_timestamp_seconds"
    first = value(metrics, name, dev_id="3", verdict="live")
    assert first is not None
    wall = 0.4
    assert value(metrics, name, dev_id="3", verdict="live") == first
    wall = 3600.0
    assert value(metrics, name, dev_id="3", verdict="live") == pytest.approx(first + 3600, abs=0.1)


def test_of_too_many_devices_those_that_are_well_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_series, "MOST_DEVICES", 3)
    metrics = Metrics()
    devices = [a_device(each) for each in range(5)]
    devices[4] = a_device(4, kind=VerdictKind.WEDGED)
    metrics.passed(a_report(*devices))
    assert [each["dev_id"] for each in samples(metrics, "duende_ublkd_device_info")] == ["0", "1", "4"]
    assert value(metrics, "duende_ublkd_device_series_left_out") == 2
    assert value(metrics, "duende_ublkd_devices", verdict="live") == 4


def test_each_sink_has_each_outcome_also_when_nothing_was_sent_yet() -> None:
    metrics = Metrics()
    metrics.read_from(overdue=int, locked=int, alerts=Desk((), (Sink("mail"),), {"mail": Stats()}))
    found = {each["outcome"] for each in samples(metrics, "duende_ublkd_alerts_total") if each["sink"] == "mail"}
    assert found == {"delivered", "failed", "undeliverable", "dropped", "suppressed"}
    assert value(metrics, "duende_ublkd_alert_sink_up", sink="mail") == 1
    assert value(metrics, "duende_ublkd_alert_queue_length") == 0
    assert list(samples(metrics, "duende_ublkd_alert_sink_last_success_timestamp_seconds")) == []


def test_alerts_of_two_instances_of_one_id_are_one_series() -> None:
    """Two samples with the same labels, and Prometheus refuses the whole scrape."""
    metrics = Metrics()
    alerts = [an_alert(AlertKind.PINNED, f"ublk3/{each}/pinned", 3, BOOT + each) for each in (1, 2)]
    metrics.read_from(overdue=int, locked=int, alerts=Desk(alerts))
    (labels,) = samples(metrics, "duende_ublkd_alert_raised_timestamp_seconds")
    assert labels == {"kind": "pinned", "dev_id": "3", "cause": ""}
    assert value(metrics, "duende_ublkd_alert_raised_timestamp_seconds", **labels) == BOOT + 2


def test_what_users_of_exporters_expect_of_a_process_is_there() -> None:
    metrics = Metrics()
    for name in ("process_start_time_seconds", "process_resident_memory_bytes", "process_open_fds"):
        assert value(metrics, name), name


def test_a_device_that_says_what_it_said_before_costs_no_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics(at(NOW))
    device = replace(a_device(3), since=NOW - 9)
    metrics.passed(a_report(device))
    before = text_of(metrics)
    monkeypatch.delattr(device_series.DeviceSeries, "_write")
    metrics.passed(a_report(replace(device, seen=replace(device.seen, at=NOW))))
    assert "duende_ublkd_device_info{" in before
    assert [line for line in text_of(metrics).splitlines() if "dev_id" in line] == [
        line for line in before.splitlines() if "dev_id" in line
    ]


def took(metrics: Metrics) -> float:
    """Seconds of the loop's that one scrape takes, when nothing else wants the processor."""
    times = []
    for _ in range(15):
        began = time.thread_time()
        metrics.render()
        times.append(time.thread_time() - began)
    return min(times)


def test_five_hundred_devices_cost_a_scrape_hardly_more_than_none() -> None:
    """prometheus_client alone takes 25 ms for them, each time; the loop has to react within a few."""
    few, many = Metrics(), Metrics()
    devices: list[Judged] = [a_device(each) for each in range(500)]
    for metrics, those in ((few, devices[:3]), (many, devices)):
        metrics.read_from(overdue=int, locked=int)
        metrics.passed(a_report(*those))
    size = len(many.render())
    print(f"\n500 devices: {took(many) * 1000:.1f} ms and {size} bytes; 3 devices: {took(few) * 1000:.1f} ms")
    assert size < 150_000
    assert took(many) < took(few) + 0.008
