"""Metrics in the manner of a Prometheus exporter; the only file that imports prometheus_client.

A scrape renders the last snapshot: it never reaches the ring, and a device that is gone has no series any more. Names and
labels are a contract; README lists them.

Rules:
1. A set of labels that is known beforehand is there from the start, at 0: rate() and increase() see the first event, too.
   What is not known beforehand is bounded: a value that is not of the set is counted as `other`.
2. What nobody has seen has no sample: before the first look there is neither `driver_up` nor a count of devices.
3. One format, the text format that every collector reads, and no compression. OpenMetrics would add a creation time to each
   counter and nothing that is used here; gzip would take its time on the loop that has to react.
"""

from __future__ import annotations

import collections
import errno
import platform
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from duende_ublkd import __version__
from duende_ublkd.core.model import Action, DriverFacts, Outcome, VerdictKind, feature_names
from duende_ublkd.report.device_series import Clock, DeviceSeries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from prometheus_client.metrics_core import Metric

    from duende_ublkd.core.alerting import Alert
    from duende_ublkd.core.holds import Hold
    from duende_ublkd.core.model import Judged, PassReport
    from duende_ublkd.report.store import StoreStats

PREFIX = "duende_ublkd"
COMMANDS = ("GET_FEATURES", "GET_DEV_INFO", "GET_DEV_INFO2", "STOP_DEV", "DEL_DEV", "DEL_DEV_ASYNC")
"""Those that the daemon sends."""

_OTHER = "other"
_RESULTS = frozenset({"ok", "overdue", "ENOTSUPP", *errno.errorcode.values()})
_OUTCOMES = (
    *((Action.DELETE, outcome) for outcome in Outcome if "recover" not in outcome.value),
    *((Action.RECOVER, outcome) for outcome in Outcome if "recover" in outcome.value),
    (Action.RECOVER, Outcome.SPARED),
)
_UEVENTS = {
    "block": ("add", "change", "remove"),
    "ublk-char": ("add", "change", "remove"),
    "misc": ("add", "remove"),
}
_UEVENT_ACTIONS = frozenset({"add", "remove", "change", "move", "online", "offline", "bind", "unbind"})
_COMMAND_BUCKETS = (0.0001, 0.0005, 0.001, 0.005, 0.02, 0.1, 0.5, 2.5, 10.0)
_PASS_BUCKETS = (0.0005, 0.001, 0.005, 0.02, 0.1, 0.5, 2.5, 10.0)
_REACTION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """What the daemon counts. `render()` is a scrape."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, clock: Clock | None = None) -> None:
        """`clock`: says when on the wall clock something was."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        clock = clock or Clock()
        self._registry = CollectorRegistry()
        self._snapshot = _Snapshot(clock)
        self._devices = DeviceSeries(PREFIX, clock)
        self._counted: dict[int, int | None] = {}  # id -> the instance that was counted as an orphan
        self._registry.register(self._snapshot)
        self._orphans = self._counter("orphans_detected", "Devices found orphaned.")
        self._actions = self._counter("actions", "Actions by outcome.", "action", "outcome")
        what = "Control commands by result: ok, overdue, or the errno."
        self._commands = self._counter("control_commands", what, "command", "result")
        what = "How long control commands took."
        self._command_seconds = self._histogram("control_command_seconds", what, _COMMAND_BUCKETS, "command")
        what = "From a server's death being seen to its id being free, or to another server serving."
        self._reaction = self._histogram("reaction_seconds", what, _REACTION_BUCKETS)
        what = "How long passes took, waiting for the kernel included."
        self._passes = self._histogram("reconcile_seconds", what, _PASS_BUCKETS)
        self._uevents = self._counter("uevents", "Kernel events received.", "subsystem", "action")
        self._overflows = self._counter("uevent_overflows", "Times that kernel events were lost.")
        self._resyncs = self._counter("resyncs", "Full looks at every id.")
        self._begin_at_zero()
        ProcessCollector(registry=self._registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(name, what, labels, namespace=PREFIX, registry=self._registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, what, labels, namespace=PREFIX, buckets=buckets, registry=self._registry)

    def _begin_at_zero(self) -> None:
        for action, outcome in _OUTCOMES:
            self._actions.labels(action.value, outcome.value)
        for action in (Action.DELETE, Action.RECOVER):
            self._actions.labels(action.value, "failed")
        for command in COMMANDS:
            self._command_seconds.labels(command)
            for result in ("ok", "overdue"):
                self._commands.labels(command, result)
        for subsystem, actions in _UEVENTS.items():
            for action_of_event in actions:
                self._uevents.labels(subsystem, action_of_event)

    def render(self) -> bytes:
        """The exposition text of now."""
        own = self._devices.render(self._snapshot.devices.values())
        self._snapshot.left_out = self._devices.left_out
        return generate_latest(self._registry) + own.encode()

    def read_from(
        self,
        *,
        overdue: Callable[[], int],
        locked: Callable[[], int],
        store: JournalSource | None = None,
        holds: Callable[[], Sequence[Hold]] = tuple,
        lag: Callable[[], float] = float,
        alerts: AlertSource | None = None,
        dry_run: Callable[[], bool] = bool,
    ) -> None:
        """What a scrape asks for itself: overdue commands, locked memory, the journal, holds, the lag, alerts, dry_run."""
        self._snapshot.lag = lag
        self._snapshot.dry_run = dry_run
        self._snapshot.overdue = overdue
        self._snapshot.locked = locked
        self._snapshot.store = store
        self._snapshot.holds = holds
        self._snapshot.alerts = alerts

    def intends(self, device: Judged) -> None:
        """A deed is counted when it is done."""

    def passed(self, report: PassReport) -> None:
        """Count what a pass or a deed changed, and keep its devices for scrapes."""
        self._snapshot.devices = report.devices
        if not report.is_deed:
            self._count_look(report)
        for device in report.gone:
            self._counted.pop(device.seen.dev_id, None)
        for device in report.changed:
            self._count_orphan(device)
        for deed in report.deeds:
            outcome = deed.outcome.value if deed.outcome else "failed"
            self._actions.labels(deed.action.value, outcome).inc()
            if deed.outcome in (Outcome.DELETED, Outcome.RECOVERED) and deed.reaction is not None:
                self._reaction.observe(deed.reaction)

    def _count_look(self, report: PassReport) -> None:
        self._snapshot.has_looked = True
        self._snapshot.trouble = report.trouble
        self._snapshot.driver = report.driver or DriverFacts()
        self._passes.observe(report.took)
        self._resyncs.inc(report.full)
        if report.full and not report.trouble:
            self._snapshot.looked_at = report.at + report.took

    def _count_orphan(self, device: Judged) -> None:
        """Each instance once, however often it is spared and found again."""
        dev_id, instance = device.seen.dev_id, device.seen.identity.sysfs_inode
        if device.verdict.kind is VerdictKind.ORPHANED and self._counted.get(dev_id) != instance:
            self._counted[dev_id] = instance
            self._orphans.inc()

    def command(self, name: str, result: str, seconds: float) -> None:
        """One control command answered."""
        name = name if name in COMMANDS else _OTHER
        self._commands.labels(name, result if result in _RESULTS else _OTHER).inc()
        self._command_seconds.labels(name).observe(seconds)

    def uevent(self, subsystem: str, action: str) -> None:
        """One kernel event arrived."""
        subsystem = subsystem if subsystem in _UEVENTS else _OTHER
        self._uevents.labels(subsystem, action if action in _UEVENT_ACTIONS else _OTHER).inc()

    def overflowed(self) -> None:
        """Kernel events were lost."""
        self._overflows.inc()


class JournalSource(Protocol):
    """Where events are kept."""

    @property
    def stats(self) -> StoreStats:
        """As of now."""


class SinkStats(Protocol):
    """What became of the alerts for one sink since the start of the daemon."""

    @property
    def delivered(self) -> int:
        """Taken by whoever it is."""

    @property
    def failed(self) -> int:
        """Tries that were not."""

    @property
    def undeliverable(self) -> int:
        """Given up."""

    @property
    def dropped(self) -> int:
        """For which there was no place."""

    @property
    def suppressed(self) -> int:
        """Held back by the sink's own rate limit."""


class SinkState(Protocol):
    """One configured sink, as of now."""

    @property
    def name(self) -> str:
        """As it is configured."""

    @property
    def waiting(self) -> int:
        """Alerts that are not delivered yet."""

    @property
    def last_ok_at(self) -> float | None:
        """When it last took one, in seconds since the epoch. None: not since the start of the daemon."""

    @property
    def last_error(self) -> str:
        """Of the last try. Empty: it was taken, or nothing was tried."""


class AlertSource(Protocol):
    """The alerts and where they go."""

    @property
    def alerts(self) -> Iterable[Alert]:
        """Those that are not over."""

    @property
    def sinks(self) -> Iterable[SinkState]:
        """Every one that is configured."""

    @property
    def stats(self) -> Mapping[str, SinkStats]:
        """Of each sink, by its name."""

    @property
    def queue_length(self) -> int:
        """What is not delivered yet, to any sink."""


class _Snapshot(Collector):
    """What is read when it is asked for: of the last pass, and of what the daemon is made of."""

    def __init__(self, clock: Clock) -> None:
        self.devices: Mapping[int, Judged] = {}
        self.has_looked = False
        self.looked_at: float | None = None
        self.left_out = 0
        self.trouble = ""
        self.driver = DriverFacts()
        self.overdue: Callable[[], int] = int
        self.locked: Callable[[], int] = int
        self.lag: Callable[[], float] = float
        self.dry_run: Callable[[], bool] = bool
        self.store: JournalSource | None = None
        self.holds: Callable[[], Sequence[Hold]] = tuple
        self.alerts: AlertSource | None = None
        self._clock = clock

    def collect(self) -> Iterable[Metric]:
        build = InfoMetricFamily(f"{PREFIX}_build", "What runs.")
        build.add_metric([], {"version": __version__, "python": platform.python_version()})
        yield build
        yield _gauge("dry_run", "Whether it only says what it would do.", self.dry_run())
        yield _gauge("commands_overdue", "Commands past their deadline now.", self.overdue())
        yield _gauge("memory_locked_bytes", "Memory that cannot be swapped out.", self.locked())
        late = "How late the event loop's timers were, at worst within the last minute."
        yield _gauge("event_loop_lag_seconds", late, self.lag())
        if self.has_looked:
            yield from self._last_look()
        if self.store:
            yield from _journal(self.store)
        yield from _holds(self.holds(), self._clock)
        if self.alerts:
            yield from _alerts(self.alerts)
            yield from _sinks(self.alerts)

    def _last_look(self) -> Iterable[Metric]:
        yield _gauge("driver_up", "Whether the ublk driver answered.", not self.trouble)
        if self.looked_at is not None:
            what = "When every id was last looked at."
            yield _gauge("last_full_look_timestamp_seconds", what, self._clock.epoch(self.looked_at))
        yield _gauge("slots_used", "Ids that are taken.", len(self.devices))
        if self.driver.slots_max is not None:
            what = "ublks_max: how many devices there may be up to 6.14; since then, how many unprivileged ones."
            yield _gauge("slots_max", what, self.driver.slots_max)
        kinds = collections.Counter(device.verdict.kind for device in self.devices.values())
        counts = _family("devices", "Devices by verdict.", "verdict")
        for kind in VerdictKind:
            counts.add_metric([kind.value], kinds[kind])
        yield counts
        left_out = "Devices that have no series of their own, because there are too many."
        yield _gauge("device_series_left_out", left_out, self.left_out)
        features = InfoMetricFamily(f"{PREFIX}_kernel_feature", "What the driver can do.", labels=["feature"])
        for name in feature_names(self.driver.features):
            features.add_metric([name], {})
        yield features


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", what, value=value)


def _family(name: str, what: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{PREFIX}_{name}", what, labels=labels)


def _journal(store: JournalSource) -> Iterable[Metric]:
    stats = store.stats
    yield _gauge("journal_up", "Whether the journal can be written.", not stats.trouble)
    yield _gauge("journal_waiting_events", "Events that wait in memory to be written.", stats.waiting)
    events = CounterMetricFamily(f"{PREFIX}_journal_events", "Events of the journal by outcome.", labels=["outcome"])
    events.add_metric(["written"], stats.written)
    events.add_metric(["dropped"], stats.dropped)
    yield events


def _holds(holds: Sequence[Hold], clock: Clock) -> Iterable[Metric]:
    since = _family("hold_since_timestamp_seconds", "When a hold was set.", "dev_id")
    until = _family("hold_until_timestamp_seconds", "When a hold ends by itself.", "dev_id")
    for hold in holds:
        since.add_metric([str(hold.dev_id)], clock.epoch(hold.since))
        until.add_metric([str(hold.dev_id)], clock.epoch(hold.until))
    yield since
    yield until


def _alerts(source: AlertSource) -> Iterable[Metric]:
    """Of a device: `dev_id`. Of the daemon itself: `cause`, what follows `daemon/` in the alert's key."""
    what = "When an alert that is not over was raised."
    raised = _family("alert_raised_timestamp_seconds", what, "kind", "dev_id", "cause")
    latest: dict[tuple[str, str, str], float] = {}
    for alert in source.alerts:
        cause = alert.key.partition("/")[2] if alert.dev_id is None else ""
        labels = (alert.kind.value, "" if alert.dev_id is None else str(alert.dev_id), cause)
        latest[labels] = max(latest.get(labels, 0.0), round(alert.raised_at, 3))
    for labels, at in latest.items():
        raised.add_metric(labels, at)
    yield raised


def _sinks(source: AlertSource) -> Iterable[Metric]:
    yield _gauge("alert_queue_length", "Alerts that are not delivered yet, to whatever sink.", source.queue_length)
    up = _family("alert_sink_up", "Whether the last delivery to a sink succeeded, or none was tried yet.", "sink")
    waiting = _family("alert_sink_waiting", "Alerts that a sink has not taken yet.", "sink")
    taken = _family("alert_sink_last_success_timestamp_seconds", "When a sink last took an alert.", "sink")
    outcomes = CounterMetricFamily(f"{PREFIX}_alerts", "Alerts by what became of them.", labels=["sink", "outcome"])
    stats = source.stats
    for sink in source.sinks:
        up.add_metric([sink.name], not sink.last_error)
        waiting.add_metric([sink.name], sink.waiting)
        if sink.last_ok_at is not None:
            taken.add_metric([sink.name], round(sink.last_ok_at, 3))
        of_sink = stats[sink.name]
        for outcome, count in (
            ("delivered", of_sink.delivered),
            ("failed", of_sink.failed),
            ("undeliverable", of_sink.undeliverable),
            ("dropped", of_sink.dropped),
            ("suppressed", of_sink.suppressed),
        ):
            outcomes.add_metric([sink.name, outcome], count)
    yield from (up, waiting, taken, outcomes)
