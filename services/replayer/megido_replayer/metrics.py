"""The replayer's metrics, each named once."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from megido_replayer.queries import Outcome

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.items = Counter(
            "megido_replay_items", "Items that ended here, by state", ["state"], registry=self.registry
        )
        self.seconds = Histogram(
            "megido_replay_item_seconds",
            "From loading an item's request to its outcome in the row",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.jobs = Gauge("megido_replay_jobs_running", "Jobs that this process is running", registry=self.registry)
        self.dropped = Gauge(
            "megido_replay_journal_dropped", "Records that the journal could not take", registry=self.registry
        )
        self.counts: dict[str, int] = {}
        """Items by state, for the heartbeat."""

    def ended(self, outcome: Outcome, seconds: float) -> None:
        self.items.labels(outcome.state).inc()
        self.seconds.observe(seconds)
        self.counts[outcome.state] = self.counts.get(outcome.state, 0) + 1
