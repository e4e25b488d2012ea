"""What is kept of a client that has a place."""

from typing import Any, cast

from mitmproxy import tls
from mitmproxy.proxy.context import Context
from mitmproxy.test import taddons, tflow

from megido_capture.access.farewell import Farewell
from megido_capture.configuration.settings import CaptureSettings
from megido_capture.limits.clients import Limits
from megido_capture.recording.connections import Connections
from tests.unit.capture.fakes import Parts


def test_the_hello_of_a_client_is_kept_only_until_its_handshake_is_ours() -> None:
    parts = Parts()
    connections = Connections(parts.emitter, parts.registry, parts.recorder, parts.counters, parts.clock)
    farewell = Farewell(lambda client: None)
    limits = Limits(CaptureSettings(), parts.registry, connections, parts.counters, farewell=farewell)
    client = tflow.tclient_conn()
    place = limits._places.take(client)
    with taddons.context() as running:
        context = Context(client, running.options)
    hello = tls.ClientHelloData(context, cast(Any, None))
    limits.tls_clienthello(hello)
    hello.ignore_connection = True
    assert place.in_use, "it passes through"
    hello.ignore_connection = False
    limits.tls_start_client(tls.TlsData(client, context))
    assert place.hello is None and not place.in_use
