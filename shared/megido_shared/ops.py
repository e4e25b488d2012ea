"""`/livez`, `/readyz` and `/metrics` of a service that has no HTTP server of its own.

A thread and the standard library's WSGI server, so that the capture process needs no web framework and a
busy event loop does not fail a probe.
"""

import socketserver
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

type Ready = Callable[[], list[str]]
"""What is missing, one line each; an empty list means ready. Called from another thread; must not block."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


class OpsServer:
    """Serves from the moment it is made until `close`. Port 0 picks a free one; `port` tells which."""

    def __init__(self, registry: CollectorRegistry, ready: Ready, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._ready = ready
        self._metrics = make_wsgi_app(registry)
        self._server = make_server(host, port, self._answer, server_class=_Server, handler_class=_Quiet)
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="ops", daemon=True)
        self._thread.start()

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        match environ.get("PATH_INFO"):
            case "/metrics":
                answer: Iterable[bytes] = self._metrics(environ, start_response)
                return answer
            case "/livez":
                return _text(start_response, "200 OK", "ok\n")
            case "/readyz":
                missing = self._ready()
                status = "503 Service Unavailable" if missing else "200 OK"
                return _text(start_response, status, "\n".join(missing or ["ready"]) + "\n")
            case _:
                return _text(start_response, "404 Not Found", "try /livez, /readyz or /metrics\n")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


def _text(start_response: StartResponse, status: str, text: str) -> list[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [text.encode()]
