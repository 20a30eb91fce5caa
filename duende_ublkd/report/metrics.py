"""Metrics in the manner of a Prometheus exporter; the only file that imports prometheus_client.

A scrape renders the last snapshot: it never reaches the ring, and a device that is gone has no series any more. Names and
labels are a contract; README lists them.
"""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from duende_ublkd import __version__
from duende_ublkd.core.model import DriverFacts, Outcome, VerdictKind, feature_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from prometheus_client.metrics_core import Metric

    from duende_ublkd.core.holds import Hold
    from duende_ublkd.core.model import Judged, PassReport
    from duende_ublkd.report.store import Store

_PREFIX = "duende_ublkd"
_COMMAND_BUCKETS = (0.0001, 0.0005, 0.001, 0.005, 0.02, 0.1, 0.5, 2.5, 10.0)
_PASS_BUCKETS = (0.0005, 0.001, 0.005, 0.02, 0.1, 0.5, 2.5, 10.0)
_REACTION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """What the daemon counts. `render()` is a scrape."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._snapshot = _Snapshot()
        self._counted: dict[int, int | None] = {}  # id -> the instance that was counted as an orphan
        self.registry.register(self._snapshot)
        self._orphans = Counter(
            "orphans_detected", "Devices found orphaned.", namespace=_PREFIX, registry=self.registry
        )
        self._actions = Counter(
            "actions", "Actions by outcome.", ["action", "outcome"], namespace=_PREFIX, registry=self.registry
        )
        self._commands = Counter(
            "control_commands",
            "Control commands by result: ok, overdue, or the errno.",
            ["command", "result"],
            namespace=_PREFIX,
            registry=self.registry,
        )
        self._command_seconds = Histogram(
            "control_command_seconds",
            "How long control commands took.",
            ["command"],
            buckets=_COMMAND_BUCKETS,
            namespace=_PREFIX,
            registry=self.registry,
        )
        self._reaction = Histogram(
            "reaction_seconds",
            "From a server's death being seen to its id being free, or to another server serving.",
            buckets=_REACTION_BUCKETS,
            namespace=_PREFIX,
            registry=self.registry,
        )
        self._passes = Histogram(
            "reconcile_seconds",
            "How long passes took, waiting for the kernel included.",
            buckets=_PASS_BUCKETS,
            namespace=_PREFIX,
            registry=self.registry,
        )
        self._uevents = Counter(
            "uevents", "Kernel events received.", ["subsystem", "action"], namespace=_PREFIX, registry=self.registry
        )
        self._overflows = Counter(
            "uevent_overflows", "Times that kernel events were lost.", namespace=_PREFIX, registry=self.registry
        )
        self._resyncs = Counter("resyncs", "Full looks at every id.", namespace=_PREFIX, registry=self.registry)

    def render(self) -> bytes:
        """The exposition text of now."""
        return generate_latest(self.registry)

    def read_from(
        self,
        *,
        overdue: Callable[[], int],
        locked: Callable[[], int],
        store: Store | None = None,
        holds: Callable[[], Sequence[Hold]] = tuple,
        lag: Callable[[], float] = float,
    ) -> None:
        """What a scrape asks for itself: overdue commands, locked memory, the journal, the holds, the lag."""
        self._snapshot.lag = lag
        self._snapshot.overdue = overdue
        self._snapshot.locked = locked
        self._snapshot.store = store
        self._snapshot.holds = holds

    def intends(self, device: Judged) -> None:
        """A deed is counted when it is done."""

    def passed(self, report: PassReport) -> None:
        """Count what a pass or a deed changed, and keep its devices for scrapes."""
        self._snapshot.devices = report.devices
        if not report.is_deed:
            self._snapshot.trouble = report.trouble
            self._snapshot.driver = report.driver or DriverFacts()
            self._passes.observe(report.took)
            self._resyncs.inc(report.full)
        for device in report.gone:
            self._counted.pop(device.seen.dev_id, None)
        for device in report.changed:
            self._count_orphan(device)
        for deed in report.deeds:
            outcome = deed.outcome.value if deed.outcome else "failed"
            self._actions.labels(deed.action.value, outcome).inc()
            if deed.outcome in (Outcome.DELETED, Outcome.RECOVERED) and deed.reaction is not None:
                self._reaction.observe(deed.reaction)

    def _count_orphan(self, device: Judged) -> None:
        """Each instance once, however often it is spared and found again."""
        dev_id, instance = device.seen.dev_id, device.seen.identity.sysfs_inode
        if device.verdict.kind is VerdictKind.ORPHANED and self._counted.get(dev_id) != instance:
            self._counted[dev_id] = instance
            self._orphans.inc()

    def command(self, name: str, result: str, seconds: float) -> None:
        """One control command answered."""
        self._commands.labels(name, result).inc()
        self._command_seconds.labels(name).observe(seconds)

    def uevent(self, subsystem: str, action: str) -> None:
        """One kernel event arrived."""
        self._uevents.labels(subsystem, action).inc()

    def overflowed(self) -> None:
        """Kernel events were lost."""
        self._overflows.inc()


class _Snapshot(Collector):
    """Series of the devices of the last pass."""

    def __init__(self) -> None:
        self.devices: Mapping[int, Judged] = {}
        self.trouble = ""
        self.driver = DriverFacts()
        self.overdue: Callable[[], int] = int
        self.locked: Callable[[], int] = int
        self.lag: Callable[[], float] = float
        self.store: Store | None = None
        self.holds: Callable[[], Sequence[Hold]] = tuple

    def collect(self) -> Iterable[Metric]:
        devices = list(self.devices.values())
        build = InfoMetricFamily(f"{_PREFIX}_build", "What runs.")
        build.add_metric([], {"version": __version__, "python": platform.python_version()})
        yield build
        yield GaugeMetricFamily(f"{_PREFIX}_driver_up", "Whether the ublk driver answered.", value=not self.trouble)
        yield GaugeMetricFamily(f"{_PREFIX}_slots_used", "Ids that are taken.", value=len(devices))
        yield GaugeMetricFamily(
            f"{_PREFIX}_commands_overdue", "Commands past their deadline now.", value=self.overdue()
        )
        yield GaugeMetricFamily(
            f"{_PREFIX}_memory_locked_bytes", "Memory that cannot be swapped out.", value=self.locked()
        )
        late = "How late the event loop's timers were, at worst within the last minute."
        yield GaugeMetricFamily(f"{_PREFIX}_event_loop_lag_seconds", late, value=self.lag())
        counts = GaugeMetricFamily(f"{_PREFIX}_devices", "Devices by verdict.", labels=["verdict"])
        for kind in VerdictKind:
            counts.add_metric([kind.value], sum(device.verdict.kind is kind for device in devices))
        yield counts
        if self.driver.slots_max is not None:
            what = "ublks_max: how many devices there may be up to 6.14; since then, how many unprivileged ones."
            yield GaugeMetricFamily(f"{_PREFIX}_slots_max", what, value=self.driver.slots_max)
        features = InfoMetricFamily(f"{_PREFIX}_kernel_feature", "What the driver can do.", labels=["feature"])
        for name in feature_names(self.driver.features):
            features.add_metric([name], {})
        yield features
        yield from _per_device(devices)
        if self.store:
            yield from _journal(self.store)
        yield _holds(self.holds())


def _journal(store: Store) -> Iterable[Metric]:
    stats = store.stats
    yield GaugeMetricFamily(f"{_PREFIX}_journal_up", "Whether the journal can be written.", value=not stats.trouble)
    waiting = "Events that wait in memory to be written."
    yield GaugeMetricFamily(f"{_PREFIX}_journal_waiting_events", waiting, value=stats.waiting)
    events = CounterMetricFamily(f"{_PREFIX}_journal_events", "Events of the journal by outcome.", labels=["outcome"])
    events.add_metric(["written"], stats.written)
    events.add_metric(["dropped"], stats.dropped)
    yield events


def _holds(holds: Sequence[Hold]) -> Metric:
    until = GaugeMetricFamily(
        f"{_PREFIX}_hold_until_timestamp_seconds", "When a hold ends by itself.", labels=["dev_id"]
    )
    offset = time.time() - time.monotonic()
    for hold in holds:
        until.add_metric([str(hold.dev_id)], hold.until + offset)
    return until


def _per_device(devices: Iterable[Judged]) -> Iterable[Metric]:
    labels = ["dev_id", "kernel_state", "server_comm", "unit"]
    info = InfoMetricFamily(f"{_PREFIX}_device", "A device and who serves it.", labels=labels)
    since = GaugeMetricFamily(
        f"{_PREFIX}_device_verdict_since_timestamp_seconds", "When the verdict began.", labels=["dev_id", "verdict"]
    )
    attempts = GaugeMetricFamily(
        f"{_PREFIX}_device_recovery_attempts", "Attempts since it was last served for long.", labels=["dev_id"]
    )
    offset = time.time() - time.monotonic()
    for device in devices:
        seen = device.seen
        comm, unit = (seen.server.comm, seen.server.unit) if seen.server else ("", "")
        info.add_metric([str(seen.dev_id), seen.state_name, comm, unit], {})
        since.add_metric([str(seen.dev_id), device.verdict.kind.value], device.since + offset)
        if device.trail.attempts:
            attempts.add_metric([str(seen.dev_id)], device.trail.attempts)
    yield info
    yield since
    yield attempts
