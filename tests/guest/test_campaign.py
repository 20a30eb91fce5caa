"""One round of most kinds of fault; `make campaign` injects thousands, of all kinds."""

import pytest

from tests.campaign.__main__ import SEED, Campaign
from tests.campaign.kinds import KINDS


def test_no_fault_costs_a_device_in_use_or_leaves_an_orphan_a_descriptor_or_a_hang(
    capsys: pytest.CaptureFixture[str],
) -> None:
    campaign = Campaign(SEED)
    with capsys.disabled():
        campaign.run([(kind, number) for kind in KINDS for number in range(kind.short)])
        print(f"\n{campaign.table()}")
    assert campaign.violations == []
    assert all(campaign.tallies[kind.name].injected for kind in KINDS if kind.short)
