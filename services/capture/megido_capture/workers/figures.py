"""`/metrics` of a group: those of its workers, each with the label `node`, and how many there are."""

from collections.abc import Iterable

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from megido_capture.workers.group import Group

TIMEOUT = 2.0


class GroupFigures(Collector):
    """A worker that does not answer is left out of the scrape."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def describe(self) -> Iterable[Metric]:
        """Nothing: registered before there is anybody to ask."""
        return []

    def collect(self) -> Iterable[Metric]:
        gauge = GaugeMetricFamily("megido_capture_workers", "Workers that serve")
        gauge.add_metric([], len(self._group.serving()))
        yield gauge
        restarts = CounterMetricFamily("megido_capture_worker_restarts", "Workers that ended and were started again")
        restarts.add_metric([], sum(worker.restarts for worker in self._group.workers))
        yield restarts
        yield from _merged(self._group.scrape(TIMEOUT))


def _merged(texts: dict[str, str]) -> Iterable[Metric]:
    merged: dict[str, Metric] = {}
    for node, text in texts.items():
        for family in text_string_to_metric_families(text):
            into = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                into.add_sample(sample.name, {"node": node, **sample.labels}, sample.value)
    return merged.values()
