import urllib.error
import urllib.request

from prometheus_client import CollectorRegistry, Counter

from megido_shared.ops import OpsServer


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_probes_and_metrics() -> None:
    registry = CollectorRegistry()
    Counter("megido_things", "Things.", registry=registry).inc(3)
    missing = ["the database cannot be reached"]
    server = OpsServer(registry, lambda: missing)
    try:
        assert get(server.port, "/livez") == (200, "ok\n")
        assert get(server.port, "/readyz") == (503, "the database cannot be reached\n")
        missing.clear()
        assert get(server.port, "/readyz") == (200, "ready\n")
        status, text = get(server.port, "/metrics")
        assert status == 200
        assert "megido_things_total 3.0" in text
        assert get(server.port, "/other")[0] == 404
    finally:
        server.close()
