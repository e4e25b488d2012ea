"""Which services run, with which arguments."""

from collections.abc import Callable

from megido.launcher.checks import free_port
from megido.launcher.options import UpOptions
from megido.launcher.process import Spec
from megido.main import SERVICES

CAPTURE, REPLAYER, FORWARDER, INGEST, API = "capture", "replayer", "forwarder", "ingest", "api"
STOP_ORDER = (CAPTURE, REPLAYER, FORWARDER, INGEST, API)
"""What makes events, what carries them, what stores them, what shows them; Postgres last."""


LAGS = {FORWARDER: "megido_forwarder_lag_", INGEST: "megido_ingest_lag_"}
"""Who carries a backlog, and what its metrics are called."""


PROBE_PORTS = {CAPTURE: 9490, REPLAYER: 9480, INGEST: 9470, FORWARDER: 9460}
"""Of probes and metrics, as far as they are free. The API has them on its own port."""


def specs(options: UpOptions) -> list[Spec]:
    makers: dict[str, Callable[[UpOptions], Spec]] = {
        CAPTURE: _capture,
        INGEST: _ingest,
        API: _api,
        REPLAYER: _replayer,
    }
    made = [make(options) for name, make in makers.items() if options.runs(name)]
    if options.common.kafka and (options.runs(CAPTURE) or options.runs(REPLAYER)):
        made.append(_forwarder(options))
    return made


def _common(options: UpOptions) -> list[str]:
    kafka = ["--kafka", options.common.kafka] if options.common.kafka else []
    return ["--data-dir", str(options.common.data_dir.root), *kafka]


def _protected(*more: int) -> list[str]:
    """Megido's own ports, which nobody reaches through proxy or replayer; what each knows itself left out."""
    return [f"--protect=127.0.0.1:{port}" for port in (*more, *PROBE_PORTS.values())]


def _service(name: str, preferred: int, arguments: list[str]) -> Spec:
    return Spec(
        name,
        SERVICES[name][0],
        lambda port: [*arguments, "--metrics-port", str(port)],
        lambda: free_port(preferred),
    )


def _capture(options: UpOptions) -> Spec:
    arguments = [
        *_common(options),
        *("--listen-port", str(options.proxy_port)),
        *("--api-url", f"http://127.0.0.1:{options.api_port}"),
        *_protected(),
    ]
    if options.common.kafka or options.runs(INGEST):
        # With Kafka one forwarder of ours ships every journal; without, ingest reads them where they are.
        arguments.append("--no-forwarder")
    # The user's own come last, so that they win.
    return _service(CAPTURE, PROBE_PORTS[CAPTURE], [*arguments, *options.capture_arguments])


def _ingest(options: UpOptions) -> Spec:
    return _service(INGEST, PROBE_PORTS[INGEST], [*_common(options), "--log-dir", str(options.log_dir)])


def _replayer(options: UpOptions) -> Spec:
    shipped = ["--no-forwarder"] if options.common.kafka else []
    own = _protected(options.api_port, options.proxy_port)
    return _service(REPLAYER, PROBE_PORTS[REPLAYER], [*_common(options), *shipped, *own])


def _api(options: UpOptions) -> Spec:
    arguments = [*_common(options), "--port", str(options.api_port)]
    return Spec(API, SERVICES[API][0], lambda _: arguments, lambda: options.api_port)


def _forwarder(options: UpOptions) -> Spec:
    return Spec(
        FORWARDER,
        "megido_shared.bus.forwarder",
        lambda port: [*_common(options), "--metrics-port", str(port)],
        lambda: free_port(PROBE_PORTS[FORWARDER]),
    )
