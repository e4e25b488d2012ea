"""Every metric of ingest, with what it means."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """`lag_unit` is what the bus counts a backlog in: records on Kafka, bytes on the local bus."""

    def __init__(self, lag_unit: str) -> None:
        self.registry = CollectorRegistry()
        self.records = Counter(
            "megido_ingest_records_stored",
            "Rows that were new or raised, by kind: flow, message, error, auth.",
            ["kind"],
            registry=self.registry,
        )
        self.consumed = Counter(
            "megido_ingest_records_consumed", "Records read from the bus and committed.", registry=self.registry
        )
        self.batches = Counter("megido_ingest_batches", "Transactions that were committed.", registry=self.registry)
        self.dead_letters = Counter(
            "megido_ingest_dead_letters",
            "Records that could not be stored, kept with a reason.",
            registry=self.registry,
        )
        self.redriven = Counter(
            "megido_ingest_redriven",
            "Dead letters that came through ingest again, by outcome: stored, refused.",
            ["outcome"],
            registry=self.registry,
        )
        self.held = Gauge(
            "megido_ingest_held",
            "1 while storing has stopped because too many records would become dead letters.",
            registry=self.registry,
        )
        self.gaps = Counter(
            "megido_ingest_gaps",
            "Records that the bus could no longer give, by kind.",
            ["kind"],
            registry=self.registry,
        )
        self.failures = Counter(
            "megido_ingest_failures",
            "Attempts that had to be repeated, by what was away: database, bus, claim.",
            ["what"],
            registry=self.registry,
        )
        self.duration = Histogram(
            "megido_ingest_batch_seconds",
            "From a prepared batch to its commit.",
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
            registry=self.registry,
        )
        self.lag = Gauge(
            f"megido_ingest_lag_{lag_unit}",
            f"How far the streams that this worker reads are behind their ends, in {lag_unit}.",
            ["topic"],
            registry=self.registry,
        )
        self.lag_seconds = Gauge(
            "megido_ingest_lag_seconds",
            "Age of the newest event that is stored while others wait; 0 when nothing waits.",
            registry=self.registry,
        )
        self.leader = Gauge(
            "megido_ingest_leader", "1 where the background work runs.", registry=self.registry
        )  # fmt: skip
        self.interrupted = Counter(
            "megido_ingest_interrupted_flows",
            "Open flows that maintenance closed because their node was gone.",
            registry=self.registry,
        )
