"""What only a kernel can say: the suite in tests/guest, whole, on every kernel of the lab."""

import pytest

from tests.lab import kernels
from tests.lab.suite import GuestSuite


@pytest.mark.parametrize("guest_kernel", kernels.names())
def test_every_guest_test_passes_on_a_real_kernel(guest_kernel: str, guests: dict[str, GuestSuite]) -> None:
    suite = guests[guest_kernel]
    for text in suite.follow():
        print(text, end="", flush=True)
    counts = suite.counts()
    assert suite.faults() == []
    assert suite.process.returncode == 0, f"the guest's output is above, and in {suite.log}"
    assert counts is not None
    assert counts.run > counts.skipped
