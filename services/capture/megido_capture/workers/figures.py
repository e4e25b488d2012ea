"""`/metrics` of a group: those of its workers, each with the label `node`, and how many there are."""

import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from megido_capture.workers.worker import Serving

TIMEOUT = 2.0
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class GroupFigures(Collector):
    """A worker that does not answer is left out of the scrape."""

    def __init__(self, serving: Callable[[], list[Serving]], restarts: Callable[[], int]) -> None:
        self._serving = serving
        self._restarts = restarts

    def describe(self) -> Iterable[Metric]:
        """Nothing yet: registered before there is anybody to ask."""
        return []

    def collect(self) -> Iterable[Metric]:
        serving = self._serving()
        gauge = GaugeMetricFamily("megido_capture_workers", "Workers that serve")
        gauge.add_metric([], len(serving))
        yield gauge
        restarts = CounterMetricFamily("megido_capture_worker_restarts", "Workers that ended and were started again")
        restarts.add_metric([], self._restarts())
        yield restarts
        yield from _merged(serving)


def _merged(serving: list[Serving]) -> Iterable[Metric]:
    merged: dict[str, Metric] = {}
    if not serving:
        return []
    with ThreadPoolExecutor(len(serving)) as pool:
        for worker, text in zip(serving, pool.map(_scrape, serving), strict=True):
            for family in text_string_to_metric_families(text):
                into = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    into.add_sample(sample.name, {"node": worker.node, **sample.labels}, sample.value)
    return merged.values()


def _scrape(worker: Serving) -> str:
    try:
        with _opener.open(f"http://127.0.0.1:{worker.metrics_port}/metrics", timeout=TIMEOUT) as answer:
            text: str = answer.read().decode()
            return text
    except (OSError, HTTPException):
        return ""
