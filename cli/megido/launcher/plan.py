"""Which services run, with which arguments."""

from collections.abc import Callable, Mapping

from megido.launcher.checks import free_port
from megido.launcher.options import UpOptions
from megido.launcher.process import Spec
from megido.main import SERVICES
from megido_shared.addresses import Endpoint, database_endpoints
from megido_shared.settings import METRICS_PORTS

CAPTURE, REPLAYER, FORWARDER, INGEST, API = "capture", "replayer", "forwarder", "ingest", "api"
STOP_ORDER = ((CAPTURE, REPLAYER), (FORWARDER,), (INGEST, API))
"""What makes events, what carries them, what stores and shows them, each together; Postgres last."""


LAGS = {FORWARDER: "megido_forwarder_lag_", INGEST: "megido_ingest_lag_"}
"""Who carries a backlog, and what its metrics are called."""


type Ports = Mapping[str, int]
"""Of probes and metrics, by service: the usual ones, as far as they are free."""


def specs(options: UpOptions) -> list[Spec]:
    """Ports are chosen here, before the first service starts: proxy and replayer lead nobody to them."""
    ports = {name: free_port(port) for name, port in METRICS_PORTS.items()}
    makers: dict[str, Callable[[UpOptions, Ports], Spec]] = {
        CAPTURE: _capture,
        INGEST: _ingest,
        API: _api,
        REPLAYER: _replayer,
    }
    made = [make(options, ports) for name, make in makers.items() if options.runs(name)]
    if options.common.kafka and (options.runs(CAPTURE) or options.runs(REPLAYER)):
        made.append(_forwarder(options, ports))
    return made


def _common(options: UpOptions) -> list[str]:
    kafka = ["--kafka", options.common.kafka] if options.common.kafka else []
    return ["--data-dir", str(options.common.data_dir.root), *kafka]


def _protected(*ports: int) -> list[str]:
    """Megido's own ports, which nobody reaches through proxy or replayer; what each knows itself left out."""
    return [f"--protect=127.0.0.1:{port}" for port in ports]


def _service(name: str, ports: Ports, arguments: list[str]) -> Spec:
    return Spec(
        name,
        SERVICES[name][0],
        lambda port: [*arguments, "--metrics-port", str(port)],
        lambda: free_port(ports[name]),
    )


def _capture(options: UpOptions, ports: Ports) -> Spec:
    arguments = [
        *_common(options),
        *("--listen-port", str(options.proxy_port)),
        *("--api-url", f"http://127.0.0.1:{options.api_port}"),
        *_protected(*ports.values()),
        *(f"--protect={_shown(server)}" for server in database_endpoints(options.common.database_url)),
    ]
    if options.common.kafka or options.runs(INGEST):
        # With Kafka one forwarder of ours ships every journal; without, ingest reads them where they are.
        arguments.append("--no-forwarder")
    # The user's own come last, so that they win.
    return _service(CAPTURE, ports, [*arguments, *options.capture_arguments])


def _shown(server: Endpoint) -> str:
    return f"[{server.host}]:{server.port}" if ":" in server.host else f"{server.host}:{server.port}"


def _ingest(options: UpOptions, ports: Ports) -> Spec:
    return _service(INGEST, ports, [*_common(options), "--log-dir", str(options.log_dir)])


def _replayer(options: UpOptions, ports: Ports) -> Spec:
    shipped = ["--no-forwarder"] if options.common.kafka else []
    own = _protected(options.api_port, options.proxy_port, *ports.values())
    return _service(REPLAYER, ports, [*_common(options), *shipped, *own])


def _api(options: UpOptions, _: Ports) -> Spec:
    arguments = [*_common(options), "--port", str(options.api_port), "--log-dir", str(options.log_dir)]
    return Spec(API, SERVICES[API][0], lambda _: arguments, lambda: options.api_port)


def _forwarder(options: UpOptions, ports: Ports) -> Spec:
    return Spec(
        FORWARDER,
        "megido_shared.bus.forwarder",
        lambda port: [*_common(options), "--metrics-port", str(port)],
        lambda: free_port(ports[FORWARDER]),
    )
