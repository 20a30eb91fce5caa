"""These tests make and break block devices: they run in a guest, and on no host, whatever driver it has."""

import contextlib
import os
from collections.abc import Iterator

import pytest

from duende_ublkd.kernel.devices import list_char_devices
from tests.server.harness import ServerError, drop_device, wait_until

collect_ignore_glob = [] if os.environ.get("DUENDE_IN_GUEST") == "1" else ["*"]
GOES_BY_ITSELF_IN = 3.0
SETTLED_IN = 30.0  # seconds for what a test has killed, stopped or deleted to be gone


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "leaves_for_ever(*ids): nothing but a reboot ends these devices, on some kernel")


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """A device that one test leaves is another test's surprise: a daemon would look after it, too.

    What a server that was killed last has left is deleted; what is still served, or cannot be deleted, fails the test.
    """
    marker = request.node.get_closest_marker("leaves_for_ever")
    before = {*list_char_devices(), *(marker.args if marker else ())}
    yield
    with contextlib.suppress(ServerError):  # a daemon may be about to do it
        wait_until(lambda: not set(list_char_devices()) - before, GOES_BY_ITSELF_IN, "the test's devices are gone")
    for dev_id in set(list_char_devices()) - before:
        drop_device(dev_id, SETTLED_IN)
