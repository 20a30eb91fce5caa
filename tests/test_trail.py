"""What was tried to recover a device: what counts, what is forgotten, and what is not."""

from __future__ import annotations

import pytest

from duende_ublkd.core.trail import NO_TRAIL, OVERRUN, Trail

STABLE = 300.0


def failed(times: int) -> Trail:
    trail = NO_TRAIL
    for attempt in range(times):
        trail = trail.begun(10.0 * attempt, 5.0).failed("exit 1", 10.0 * attempt + 1, 2.0)
    return trail


def test_an_attempt_counts_from_its_beginning() -> None:
    trail = NO_TRAIL.begun(100.0, 30.0)
    assert (trail.attempts, trail.began, trail.limit, trail.is_running) == (1, 100.0, 130.0, True)
    assert not NO_TRAIL.is_running


def test_a_failure_ends_the_attempt_and_says_why_and_until_when_to_wait() -> None:
    trail = NO_TRAIL.begun(100.0, 30.0).failed("exit 1", 104.0, 2.0)
    assert (trail.is_running, trail.trouble, trail.not_before, trail.attempts) == (False, "exit 1", 106.0, 1)


def test_a_success_takes_the_trouble_back_and_not_the_attempt() -> None:
    trail = failed(1).begun(20.0, 30.0).succeeded(21.0, 4.0)
    assert (trail.is_running, trail.trouble, trail.attempts) == (False, "", 2)
    assert (trail.served_since, trail.not_before) == (21.0, 25.0)


def test_it_is_given_up_when_the_attempts_are_used_up_and_the_last_one_is_over() -> None:
    assert not failed(2).is_given_up(3)
    assert not failed(2).begun(50.0, 5.0).is_given_up(3)
    assert failed(3).is_given_up(3)
    assert failed(3).is_given_up(2)  # the configuration allows fewer now


def test_what_a_former_daemon_began_is_waited_for_until_its_limit() -> None:
    trail = NO_TRAIL.begun(100.0, 30.0).abandoned()
    assert (trail.is_running, trail.not_before, trail.attempts) == (False, 130.0 + OVERRUN, 1)
    assert trail.trouble == "the daemon ended during attempt 1"
    waiting = NO_TRAIL.begun(100.0, 1.0).failed("exit 1", 101.0, 300.0).begun(101.5, 1.0).abandoned()
    assert waiting.not_before == 401.0


@pytest.mark.parametrize(("served_for", "attempts"), [(0.0, 2), (299.9, 2), (300.0, 0), (3600.0, 0)])
def test_service_that_lasted_has_everything_forgotten_once_it_is_over(served_for: float, attempts: int) -> None:
    served = failed(2).looked_at(100.0, STABLE, served=True)
    assert served.attempts == 2
    assert served.looked_at(100.0 + served_for, STABLE, served=False).attempts == attempts


def test_service_counts_from_the_first_look_at_it_and_anew_after_each_break() -> None:
    trail = failed(2).looked_at(100.0, STABLE, served=True).looked_at(300.0, STABLE, served=True)
    assert trail.served_since == 100.0
    broken = trail.looked_at(390.0, STABLE, served=False)
    assert (broken.attempts, broken.served_since) == (2, None)
    again = broken.looked_at(395.0, STABLE, served=True).looked_at(650.0, STABLE, served=False)
    assert (again.attempts, again.served_since) == (2, None)


def test_the_server_of_the_attempt_under_way_is_not_service_yet() -> None:
    running = failed(1).begun(50.0, 30.0)
    assert running.looked_at(60.0, STABLE, served=True) == running


def test_a_new_attempt_ends_the_service_before_it() -> None:
    served = failed(1).looked_at(100.0, STABLE, served=True)
    assert served.begun(110.0, 30.0).served_since is None


def test_a_device_that_is_not_served_changes_nothing_by_being_looked_at() -> None:
    assert failed(2).looked_at(1e9, STABLE, served=False) == failed(2)


def test_a_command_that_was_left_alone_is_waited_for_until_its_limit_or_for_the_pause_whichever_is_longer() -> None:
    running = NO_TRAIL.begun(100.0, 30.0)
    for pause, not_before in ((2.0, 130.0), (60.0, 165.0)):
        trail = running.left_alone("no answer", 105.0, pause)
        assert (trail.is_running, trail.trouble, trail.attempts) == (False, "no answer", 1)
        assert (trail.limit, trail.not_before) == (130.0, not_before)


def test_the_limit_of_a_command_that_is_over_is_over_too() -> None:
    running = NO_TRAIL.begun(100.0, 30.0)
    assert running.failed("exit 1", 104.0, 2.0).limit == 0.0
    assert running.succeeded(104.0, 2.0).limit == 0.0
    assert running.failed("exit 1", 104.0, 2.0).forgotten() == NO_TRAIL


@pytest.mark.parametrize(
    "trail", [NO_TRAIL.begun(100.0, 30.0).left_alone("no answer", 105.0, 2.0), Trail(2, limit=130)]
)
def test_what_is_forgotten_is_not_that_a_command_may_still_run(trail: Trail) -> None:
    assert trail.forgotten() == Trail(attempts=0, limit=130.0, not_before=130.0)
