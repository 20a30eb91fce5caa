"""Which fault a verdict is, and for how long it is one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duende_ublkd.core.alerting import (
    Alert,
    AlertKind,
    Severity,
    fault_of,
    is_part_of,
    lasts,
    takes_the_place_of,
)
from duende_ublkd.core.holds import Hold
from duende_ublkd.core.model import Action, Identity, Judged, Observation, Verdict, VerdictKind
from duende_ublkd.core.policy import WHAT_WOULD_CHANGE_IT
from duende_ublkd.core.trail import Trail

HOLD = Hold(3, 0.0, 100.0, 0)


def judged(
    kind: VerdictKind,
    action: Action = Action.NONE,
    rule: str = "",
    hold: Hold | None = None,
    trouble: str = "exited with 1",
) -> Judged:
    seen = Observation(3, 1.0, None, Identity(4711))
    trail = Trail(attempts=1, trouble=trouble)
    return Judged(seen, Verdict(kind, "for a reason", action, rule=rule), 0.0, hold, trail)


def an_alert(**changes: Any) -> Alert:  # noqa: ANN401 - any field of it
    known = {
        "key": "ublk3/4711/pinned",
        "kind": AlertKind.PINNED,
        "severity": Severity.WARNING,
        "summary": "ublk3 is pinned",
        "raised_at": 1000.5,
        "dev_id": 3,
        "instance": 4711,
        "facts": {"holders": ["mount /srv"]},
    }
    return Alert(**{**known, **changes})


FAULTS = (
    AlertKind.UNSERVED,
    AlertKind.RECOVERY_FAILED,
    AlertKind.RECOVERY_GIVEN_UP,
    AlertKind.ORPHANED,
    AlertKind.PINNED,
    AlertKind.WEDGED,
    AlertKind.UNKNOWN,
)
ON_HOLD = judged(VerdictKind.PINNED, rule="on-hold", hold=HOLD)


# --- what raises an alert ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "fault"),
    [
        (judged(VerdictKind.LIVE), None),
        (judged(VerdictKind.CLOSING), None),
        (judged(VerdictKind.ORPHANED, Action.DELETE), None),
        (judged(VerdictKind.ORPHANED, Action.ALERT), AlertKind.ORPHANED),
        (judged(VerdictKind.ORPHANED, Action.NONE), None),
        (judged(VerdictKind.UNSERVED, Action.NONE, "deadline-open"), None),
        (judged(VerdictKind.UNSERVED, Action.ALERT, "deadline-over"), AlertKind.UNSERVED),
        (judged(VerdictKind.UNSERVED, Action.ALERT, "given-up"), AlertKind.RECOVERY_GIVEN_UP),
        (judged(VerdictKind.UNSERVED, Action.NONE, "backoff"), AlertKind.RECOVERY_FAILED),
        (judged(VerdictKind.UNSERVED, Action.NONE, "backoff", HOLD), None),
        (judged(VerdictKind.UNSERVED, Action.NONE, "backoff", trouble=""), None),  # it was served, and not for long
        (judged(VerdictKind.UNSERVED, Action.RECOVER), None),
        (judged(VerdictKind.RECOVERING), None),
        (judged(VerdictKind.PINNED, Action.DELETE), None),
        (judged(VerdictKind.PINNED, Action.ALERT), AlertKind.PINNED),
        (ON_HOLD, None),
        (judged(VerdictKind.WEDGED, Action.ALERT), AlertKind.WEDGED),
        (judged(VerdictKind.WEDGED, Action.ALERT, hold=HOLD), AlertKind.WEDGED),
        (judged(VerdictKind.UNKNOWN, Action.ALERT), AlertKind.UNKNOWN),
    ],
    ids=str,
)
def test_a_verdict_calls_somebody_for_what_it_is(device: Judged, fault: AlertKind | None) -> None:
    assert fault_of(device) is fault


@pytest.mark.parametrize("kind", VerdictKind)
def test_every_verdict_that_asks_for_a_person_is_a_fault_that_lasts_as_long_as_the_verdict(kind: VerdictKind) -> None:
    for rule in ("", *WHAT_WOULD_CHANGE_IT):
        device = judged(kind, Action.ALERT, rule)
        fault = fault_of(device)
        is_asked_for = kind in (
            VerdictKind.ORPHANED,
            VerdictKind.UNSERVED,
            VerdictKind.PINNED,
            VerdictKind.WEDGED,
            VerdictKind.UNKNOWN,
        )
        assert (fault is not None) == (is_asked_for or rule in ("given-up", "backoff"))
        if is_asked_for and fault and rule not in ("given-up", "backoff"):
            assert lasts(fault, device)


def test_the_rules_that_are_known_by_name_are_rules_of_the_policy() -> None:
    assert {"given-up", "backoff", "on-hold"} <= WHAT_WOULD_CHANGE_IT.keys()


# --- what keeps it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "device", "still"),
    [
        (AlertKind.UNSERVED, judged(VerdictKind.RECOVERING), True),
        (AlertKind.UNSERVED, judged(VerdictKind.UNSERVED, rule="deadline-open"), True),
        (AlertKind.UNSERVED, judged(VerdictKind.LIVE), False),
        (AlertKind.RECOVERY_FAILED, judged(VerdictKind.RECOVERING, rule="recovery-runs"), True),
        (AlertKind.RECOVERY_GIVEN_UP, judged(VerdictKind.UNSERVED, rule="on-hold", hold=HOLD), True),
        (AlertKind.ORPHANED, judged(VerdictKind.ORPHANED, Action.DELETE), True),  # tried once more
        (AlertKind.ORPHANED, judged(VerdictKind.ORPHANED, Action.NONE), False),  # to be ignored, by now
        (AlertKind.PINNED, ON_HOLD, True),
        (AlertKind.PINNED, judged(VerdictKind.CLOSING), False),
        (AlertKind.PINNED, judged(VerdictKind.ORPHANED, Action.ALERT), False),
        (AlertKind.WEDGED, judged(VerdictKind.WEDGED, Action.ALERT), True),
        (AlertKind.WEDGED, judged(VerdictKind.LIVE), False),
        *((kind, judged(VerdictKind.UNKNOWN, Action.ALERT, "no-answer"), True) for kind in FAULTS),
        (AlertKind.UNKNOWN, judged(VerdictKind.LIVE), False),
    ],
    ids=str,
)
def test_an_alert_lasts_as_long_as_its_fault_and_not_as_what_raised_it(
    kind: AlertKind, device: Judged, *, still: bool
) -> None:
    assert lasts(kind, device) is still


def test_a_device_that_is_not_served_is_one_fault_and_the_worst_name_of_it_wins() -> None:
    assert takes_the_place_of(AlertKind.RECOVERY_GIVEN_UP) == (AlertKind.RECOVERY_FAILED, AlertKind.UNSERVED)
    assert is_part_of(AlertKind.RECOVERY_FAILED) == (AlertKind.UNSERVED, AlertKind.RECOVERY_GIVEN_UP)
    assert takes_the_place_of(AlertKind.PINNED) == is_part_of(AlertKind.PINNED) == ()


# --- nouns ------------------------------------------------------------------------------------------------------------


def test_a_severity_is_at_least_itself_and_the_lesser_ones() -> None:
    told = {(one, other) for one in Severity for other in Severity if one.at_least(other)}
    info, warning, critical = Severity
    assert told == {
        (info, info),
        (warning, info),
        (warning, warning),
        (critical, info),
        (critical, warning),
        (critical, critical),
    }


@pytest.mark.parametrize("kind", AlertKind)
def test_every_kind_has_a_severity_and_a_line_in_the_runbook(kind: AlertKind) -> None:
    assert kind.severity in Severity
    assert kind.runbook == f"alert-{kind.value}"


def test_an_alert_is_what_it_was_after_it_was_written_down() -> None:
    alert = an_alert(over_at=2000.0, over_why="ublk3 is gone")
    assert Alert.from_object(alert.to_object()) == alert
    assert Alert.from_object(an_alert(dev_id=None, instance=None).to_object()).over_at is None


BROKEN = st.one_of(
    st.none(),
    st.integers(),
    st.text(max_size=5),
    st.floats(),
    st.lists(st.integers(), max_size=2),
    st.just({}),
)


@given(st.sampled_from(sorted(an_alert().to_object())), BROKEN)
def test_a_record_that_is_damaged_is_refused_or_an_alert_all_the_same(name: str, value: object) -> None:
    record = {**an_alert().to_object(), name: value}
    try:
        alert = Alert.from_object(record)
    except ValueError:
        return
    assert isinstance(alert.summary, str)
    assert isinstance(alert.raised_at, float)
    assert isinstance(replace(alert, over_why="").facts, dict)


def test_a_record_without_a_field_is_refused() -> None:
    for name in an_alert().to_object():
        record = an_alert().to_object()
        del record[name]
        if name == "runbook":  # it is what its kind says
            assert Alert.from_object(record) == an_alert()
            continue
        with pytest.raises(ValueError, match="no alert"):
            Alert.from_object(record)
