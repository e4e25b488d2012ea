"""A layer of mitmproxy that raises: its connection ends, the others go on, and the log holds no traffic."""

import re
import sys
from pathlib import Path

from megido_shared.events import ErrorType, FlowCompleted, FlowFailed
from tests.integration.capture.harness import Proxy, _started, curl
from tests.integration.capture.upstream import Upstream

BROKEN = """
from mitmproxy.proxy.layers.http import _http1

send = _http1.Http1Client.send

def broken(self, event):
    if getattr(getattr(event, "request", None), "path", "") == "/crash":
        raise AssertionError(f"Unexpected event: {bytes(reversed(b'terces a')) * 1000!r}")
    return send(self, event)

_http1.Http1Client.send = broken

from megido_capture.__main__ import main
raise SystemExit(main())
"""


def broken_proxy(tmp_path: Path) -> Proxy:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    command = [sys.executable, str(script), "--data-dir", str(tmp_path / "data"), "--listen-port", "0"]
    ready = re.compile(r"proxy on \S+?:(\d+)\b.*metrics on \S+:(\d+)")
    return _started([*command, "--metrics-port", "0", "--no-forwarder"], tmp_path / "data", ready, {})


async def test_a_layer_that_crashes(tmp_path: Path, upstream: Upstream) -> None:
    proxy = broken_proxy(tmp_path)
    try:
        answer = await curl(proxy, f"http://127.0.0.1:{upstream.port}/crash")
        assert (answer.code, answer.status) == (52, 0), "closed at once"
        assert (await curl(proxy, f"http://127.0.0.1:{upstream.port}/plain")).status == 200
        failed, completed = await proxy.until(lambda events: len([event for event in events if event.seq]) == 2)
    finally:
        assert proxy.stop() == 0
    assert isinstance(failed, FlowFailed) and isinstance(completed, FlowCompleted)
    assert failed.failure.error_type is ErrorType.OTHER
    assert failed.failure.message == "Unexpected event: <8000 bytes>"
    assert failed.failure.stack_trace.endswith("AssertionError: Unexpected event: <8000 bytes>")
    printed = "".join(proxy.output)
    assert "mitmproxy has crashed!" in printed and "in broken" in printed
    assert "a secret" not in printed and len(printed) < 8_000
