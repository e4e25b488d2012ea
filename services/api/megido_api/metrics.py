"""Metrics of the API: one registry a process, labels from route templates only."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class RequestMetrics:
    """Counts and times every request. Outermost, so that refused ones are counted too."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        self._requests = Counter(
            "megido_api_requests_total",
            "Requests answered, by route template and status.",
            ["method", "route", "status"],
            registry=registry,
        )
        self._duration = Histogram(
            "megido_api_request_duration_seconds",
            "Time until a request was answered, by route template.",
            ["method", "route"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._in_flight = Gauge("megido_api_requests_in_flight", "Requests being answered now.", registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        began = time.monotonic()
        self._in_flight.inc()
        try:
            await self._app(scope, receive, sending)
        finally:
            self._in_flight.dec()
            route = getattr(scope.get("route"), "path", "(none)")
            method = scope["method"] if scope["method"] in _METHODS else "(other)"
            self._requests.labels(method, route, str(status)).inc()
            self._duration.labels(method, route).observe(time.monotonic() - began)


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
