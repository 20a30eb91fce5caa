"""What people are told: log lines, the table, the JSON."""

import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from duende_ublkd.core.config import Config, DeviceFacts
from duende_ublkd.core.ledger import Ledger
from duende_ublkd.core.model import (
    Action,
    Deed,
    DevInfo,
    Disk,
    Event,
    Holder,
    Identity,
    Judged,
    Observation,
    Outcome,
    PassReport,
    Server,
    Usage,
    Verdict,
    VerdictKind,
)
from duende_ublkd.core.policy import WHAT_WOULD_CHANGE_IT
from duende_ublkd.core.text import printable
from duende_ublkd.report import present
from duende_ublkd.report.journal import Journal, Outlet

HOSTILE = 'e"vil\n} 1\x1b[2J\\'


def a_device(
    dev_id: int = 3, *, kind: VerdictKind = VerdictKind.LIVE, reason: str = "served by 7", **seen: object
) -> Judged:
    now = time.monotonic()
    observation = Observation(
        dev_id,
        now,
        DevInfo(dev_id, state=1, server_pid=7, flags=0b1000, queues=2, queue_depth=64),
        Identity(1000 + dev_id, (240, dev_id)),
        f"/dev/ublkc{dev_id}",
        Disk((259, dev_id), 9),
        Server(7, alive=True, comm="loop", exe="/usr/bin/loop", unit="disk.service"),
        Usage((), (Holder("mount", "/srv (ext4)"),)),
    )
    action = Action.ALERT if kind in (VerdictKind.UNKNOWN, VerdictKind.PINNED) else Action.NONE
    return Judged(replace(observation, **seen), Verdict(kind, reason, action), now - 90)  # type: ignore[arg-type]


def a_report(*devices: Judged, **more: object) -> PassReport:
    report = PassReport(0.0, 0.01, full=True, devices={device.seen.dev_id: device for device in devices})
    return replace(report, **more)  # type: ignore[arg-type]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[tuple[str, str]]]:
    told: list[tuple[str, str]] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append((record.levelname, record.getMessage()))

    log = logging.getLogger("duende_ublkd")
    collector = Collector()
    log.addHandler(collector)
    with caplog.at_level(logging.INFO, log.name):
        yield told
    log.removeHandler(collector)


def test_a_steady_state_is_silent(lines: list[tuple[str, str]]) -> None:
    journal = Journal()
    journal.passed(a_report(a_device()))
    journal.passed(a_report(a_device()))
    assert lines == []


def test_each_change_is_one_line_with_the_sentence(lines: list[tuple[str, str]]) -> None:
    device = a_device(kind=VerdictKind.ORPHANED, reason="server 7 (loop) died, device DEAD")
    journal = Journal()
    journal.passed(a_report(device, changed=(device,)))
    journal.intends(device)
    deed = Deed(3, Action.DELETE, Outcome.DELETED, "", 0.003, 0.512)
    journal.passed(a_report(gone=(device,), deeds=(deed,)))
    assert lines == [
        ("INFO", "ublk3 is orphaned: server 7 (loop) died, device DEAD"),
        ("INFO", "ublk3 is orphaned: server 7 (loop) died, device DEAD; deleting it"),
        (
            "WARNING",
            "ublk3 deleted: server 7 (loop) died, device DEAD; id free again after 3 ms, 512 ms after the death was seen",
        ),
    ]


ASLEEP = "iou-wrk-412 (pid 412) in blk_mq_freeze_queue_wait, del_gendisk, ublk_stop_dev"


def a_wedged_device(*stuck: str, rule: str = "overdue") -> Judged:
    device = a_device(kind=VerdictKind.WEDGED, reason="STOP_DEV has not answered for 11 s")
    return replace(device, verdict=replace(device.verdict, action=Action.ALERT, rule=rule), stuck=stuck)


def test_a_wedged_device_is_told_of_with_who_sleeps_in_the_kernel_and_what_it_takes(
    lines: list[tuple[str, str]],
) -> None:
    events: list[Event] = []
    device = a_wedged_device(ASLEEP, "dd (pid 7) in io_schedule, bdev_open")
    Journal(events.append).passed(a_report(device, changed=(device,)))
    ((level, line),) = lines
    start = f"ublk3 is wedged: STOP_DEV has not answered for 11 s; asleep in the kernel: {ASLEEP}; dd (pid 7) in"
    assert (level, line[: len(start)]) == ("WARNING", start)
    assert "; what it takes: the command's answer" in line
    assert [event.facts["stuck"] for event in events] == [list(device.stuck)]
    assert events[0].text == line


def test_a_wedged_device_with_nobody_to_be_seen_asleep_is_told_of_without_them(lines: list[tuple[str, str]]) -> None:
    device = a_wedged_device(rule="control-plane")
    Journal().passed(a_report(device, changed=(device,)))
    assert "asleep" not in lines[0][1]
    assert "what it takes: the end of whatever holds ublk_ctl_mutex" in lines[0][1]


def test_every_reason_to_be_wedged_fits_a_line_of_the_journal_with_what_it_takes(lines: list[tuple[str, str]]) -> None:
    journal = Journal()
    for rule, remedy in WHAT_WOULD_CHANGE_IT.items():
        device = a_wedged_device(rule=rule)
        journal.passed(a_report(device, changed=(device,)))
        assert lines[-1][1].endswith(remedy), rule


def test_who_sleeps_in_the_kernel_is_in_the_json_and_in_the_explanation_of_a_wedged_device() -> None:
    device = a_wedged_device(ASLEEP)
    assert present.as_object(device)["stuck"] == [ASLEEP]
    assert re.search(rf"^  asleep: +{re.escape(ASLEEP)}$", present.explain(explained(device)), re.MULTILINE)
    nobody = present.explain(explained(a_wedged_device()))
    assert re.search(r"^  asleep: +nobody that can be seen$", nobody, re.MULTILINE)
    assert re.search(r"^  asleep: +not looked for$", present.explain(explained(a_device())), re.MULTILINE)


@pytest.mark.parametrize(
    ("outcome", "level"),
    [
        (None, "ERROR"),
        (Outcome.SPARED, "INFO"),
        (Outcome.ALREADY_GONE, "INFO"),
        (Outcome.DELETED_STILL_HELD, "WARNING"),
    ],
)
def test_every_outcome_has_its_level(lines: list[tuple[str, str]], outcome: Outcome | None, level: str) -> None:
    Journal().passed(a_report(deeds=(Deed(3, Action.DELETE, outcome, "because", 0.1),)))
    assert lines[0][0] == level
    assert "because" in lines[0][1]


def test_a_missing_driver_is_told_once_and_its_return_too(lines: list[tuple[str, str]]) -> None:
    journal = Journal()
    for trouble in ("it is missing", "it is missing", "", ""):
        journal.passed(a_report(trouble=trouble))
    assert [text for _, text in lines] == ["it is missing", "the ublk driver answers again"]


def test_a_reader_of_the_log_that_hangs_holds_up_nobody_and_hears_what_it_missed() -> None:
    go_on = threading.Event()
    written: list[str] = []

    class Stalled(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            go_on.wait(30)
            written.append(record.getMessage())

    outlet = Outlet(Stalled())
    log = logging.getLogger("duende_ublkd")
    log.addHandler(outlet)
    try:
        log.setLevel(logging.INFO)
        began = time.monotonic()
        for number in range(5000):
            log.info("line %d", number)
        outlet.drain(0.1)
        assert time.monotonic() - began < 10
        assert outlet.dropped > 2000
        go_on.set()
        outlet.drain(20)
    finally:
        log.removeHandler(outlet)
        log.setLevel(logging.NOTSET)
    assert written[0] == "line 0"
    assert "log lines were dropped" in written[-1]


def test_hostile_names_do_not_break_the_table() -> None:
    server = Server(7, alive=True, comm=printable(HOSTILE), exe=printable(HOSTILE), unit=printable(HOSTILE))
    device = a_device(server=server, reason=f"served by {server}")
    assert len(present.table([device], 80).splitlines()) == 2
    assert json.loads(json.dumps(present.as_object(device)))["server"]["comm"] == printable(HOSTILE)


def test_the_json_has_every_field_of_the_contract() -> None:
    shown = present.as_object(a_device())
    assert shown | {"since": ""} == {
        "dev_id": 3,
        "verdict": "live",
        "reason": "served by 7",
        "action": "none",
        "rule": "",
        "kernel_state": "LIVE",
        "flags": ["USER_RECOVERY"],
        "queues": 2,
        "queue_depth": 64,
        "owner_uid": 0,
        "server": {"pid": 7, "alive": True, "comm": "loop", "exe": "/usr/bin/loop", "unit": "disk.service"},
        "holders": [{"kind": "mount", "what": "/srv (ext4)"}],
        "stuck": [],
        "since": "",
        "block_device": "/dev/ublkb3",
        "char_device": "/dev/ublkc3",
        "hold": None,
        "recovery": None,
    }
    assert shown["since"].endswith("+00:00")


def explained(device: Judged) -> present.Explanation:
    ledger = Ledger()
    history = ledger.record(device.seen)
    chosen = Config().policy_for(DeviceFacts(device.seen.dev_id))
    return present.Explanation(device, history, chosen)


OPENER = Server(812, alive=True, comm="server")


def shown_server(device: Judged) -> int | None:
    server = present.as_object(device)["server"]
    return server and int(server["pid"])


def test_who_serves_a_device_is_whoever_has_it_open_and_not_who_the_kernel_tells_of_where_the_two_differ() -> None:
    leaked = replace(OPENER, has_ring=False)
    claimed = Server(7, alive=True)
    assert shown_server(a_device()) == 7
    assert shown_server(a_device(usage=None)) == 7
    assert shown_server(a_device(usage=Usage((OPENER,)))) == 812
    assert shown_server(a_device(usage=Usage((OPENER, claimed)))) == 7
    assert shown_server(a_device(usage=Usage((leaked,)))) == 7
    assert shown_server(a_device(server=None, usage=Usage((leaked, OPENER)))) == 812
    assert shown_server(a_device(server=Server(7, alive=False), usage=Usage())) == 7


@pytest.mark.parametrize("rule", ["death-unnoticed", "death-never-noticed", "served-unseen"])
def test_a_living_process_that_was_not_believed_to_serve_a_device_is_not_shown_as_its_server(rule: str) -> None:
    def judged_by(rule: str, *, alive: bool | None = True) -> Judged:
        device = a_device(usage=Usage(), server=Server(7, alive))
        return replace(device, verdict=replace(device.verdict, rule=rule))

    assert shown_server(judged_by(rule)) is None
    assert shown_server(judged_by(rule, alive=False)) == 7
    assert shown_server(judged_by(rule, alive=None)) == 7
    assert shown_server(judged_by("served")) == 7
    assert "alive" in present.explain(explained(judged_by(rule)))


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_table_fits_the_terminal(width: int) -> None:
    devices = [a_device(dev_id, reason="a reason that is longer than any terminal " * 5) for dev_id in (3, 4, 1048575)]
    lines = present.table(devices, width).splitlines()
    assert len(lines) == 4
    assert all(len(line) <= width for line in lines)


def test_no_device_is_said_plainly() -> None:
    assert present.table([], 80) == "No ublk devices."


def test_a_device_without_an_answer_is_shown_all_the_same() -> None:
    device = a_device(kind=VerdictKind.UNKNOWN, info=None, usage=None, disk=None, server=None, char_device=None)
    assert present.as_object(device)["queues"] is None
    assert "not known" in present.explain(explained(device))
    assert "UNKNOWN" in present.table([device], 100)
