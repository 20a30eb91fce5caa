"""Ten thousand looks leave nothing behind: what a pass makes, it gives back.

In a process of its own, so that nobody else's objects are counted. tests/guest/test_memory.py has the real daemon.
"""

import gc
import subprocess
import sys
from collections import Counter

from duende_ublkd.core.model import Feature
from duende_ublkd.report.journal import Journal
from duende_ublkd.report.metrics import Metrics
from tests.bench import Bench

WARM_UP = 500
PASSES = 10_000
SLACK = 50  # objects: as many after five thousand passes as after twenty thousand, of the last tasks


def objects() -> Counter[str]:
    gc.collect()
    return Counter(type(each).__name__ for each in gc.get_objects())


async def look_ten_thousand_times(bench: Bench) -> None:
    """With a device of each kind, journal and metrics; every hundredth look sees one die, be deleted and come again."""
    reporters = (Journal(), Metrics())
    await bench.a_live_device()
    await bench.an_unserved_device(Feature.USER_RECOVERY)
    before: Counter[str] = Counter()
    for number in range(WARM_UP + PASSES):
        if number == WARM_UP:
            before = objects()
        if number % 100 == 0:
            await bench.an_orphan()
            await bench.wait(2.0)
            for told in (bench.recorder.announced, bench.recorder.deeds, bench.recorder.changed, bench.recorder.gone):
                told.clear()
            bench.kernel.deletions.clear()
            bench.kernel.processes = {pid: each for pid, each in bench.kernel.processes.items() if each.alive}
        report = await bench.reconciler.run_pass(None)
        for reporter in reporters:
            reporter.passed(report)
    grown = objects() - before
    assert grown.total() <= SLACK, grown.most_common(10)


def test_ten_thousand_looks_leave_nothing_behind() -> None:
    program = "from tests import bench, test_memory; bench.on_the_bench(test_memory.look_ten_thousand_times)"
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
