"""For all tests.

1. Guests boot in the background as soon as the tests are collected, one emulated CPU each, and are waited for last.
2. Generated examples are the same on every machine, and a busy machine is no mistake; `HYPOTHESIS_PROFILE=search` goes
   looking for new ones.
"""

import os
from collections.abc import Iterator

import pytest

from tests.lab.suite import GuestSuite

GUESTS = pytest.StashKey[dict[str, GuestSuite]]()


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("hypothesispytest"):
        return  # in a guest: it has no such tests, and importing hypothesis takes long there
    from hypothesis import HealthCheck, settings  # noqa: PLC0415 - a guest is not to import it

    settings.register_profile(
        "suite",
        deadline=None,
        derandomize=os.environ.get("HYPOTHESIS_PROFILE") != "search",
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("suite")


def _guest_kernel(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("guest_kernel") if callspec else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _guest_kernel(item) is not None)


@pytest.fixture(scope="session", autouse=True)
def guests(request: pytest.FixtureRequest) -> Iterator[dict[str, GuestSuite]]:
    wanted = dict.fromkeys(kernel for item in request.session.items if (kernel := _guest_kernel(item)))
    suites = {kernel: GuestSuite.start(kernel) for kernel in wanted}
    request.config.stash[GUESTS] = suites
    try:
        yield suites
    finally:
        for suite in suites.values():
            suite.stop()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    suites = config.stash.get(GUESTS, {})
    if suites:
        terminalreporter.section("tests in guest kernels")
    for suite in suites.values():
        counts = suite.counts()
        told = (
            f"{counts.run} run, {counts.failed} failed, {counts.skipped} skipped in {counts.seconds:.0f} s"
            if counts
            else "no result"
        )
        terminalreporter.write_line(f"{suite.kernel}: {told}, log in .lab/{suite.log.name}")
        for failure in suite.failures():
            terminalreporter.write_line(failure)
