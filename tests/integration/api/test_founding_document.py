"""The founding document's curl lines, verbatim, by curl, against the whole line of services."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trustme

from megido_shared import events, ids
from megido_shared.bus.local import Journal
from megido_shared.datadir import DataDir
from megido_shared.testing import a_completed_flow, a_request, a_response
from tests.integration.api.processes import api, free_port, service
from tests.support.site import Site
from tests.support.waiting import until

LINES = r"""
curl http://localhost:8000/proxy/api/requests/
curl "http://localhost:8000/proxy/api/requests/?method=POST&protocol=HTTPS&limit=50"
curl "http://localhost:8000/proxy/api/requests/?search=api.example.com"
curl http://localhost:8000/proxy/api/requests/123/
curl -X POST http://localhost:8000/proxy/api/requests/123/replay/
curl -X POST http://localhost:8000/proxy/api/requests/123/replay/ \
  -H "Content-Type: application/json" \
  -d '{"target_url": "http://localhost:3000/test"}'
curl http://localhost:8000/proxy/api/websocket-messages/list/
curl "http://localhost:8000/proxy/api/websocket-messages/list/?connection_id=ws_12345"
curl http://localhost:8000/proxy/api/errors/list/
curl "http://localhost:8000/proxy/api/errors/list/?error_type=TIMEOUT"
curl http://localhost:8000/proxy/api/stats/
"""


def lines() -> list[str]:
    joined = LINES.strip().replace("\\\n", "")
    return joined.splitlines()


@pytest.fixture
def site() -> Iterator[Site]:
    with closing(Site(trustme.CA())) as running:
        yield running


@pytest.fixture
def line(database: str, tmp_path: Path) -> Iterator[Path]:
    """API, ingest and replayer over one data directory. Returns the folder of a `.curlrc` that leads
    localhost:8000 to the API's free port."""
    common = ["--data-dir", str(tmp_path / "data"), "--database-url", database]
    metrics = [free_port(), free_port()]
    with ExitStack() as stack:
        server, port = stack.enter_context(api(database, tmp_path))
        ports = ["--metrics-port", str(metrics[0]), "--log-dir", str(tmp_path / "logs")]
        ingest = stack.enter_context(service("megido_ingest", *common, *ports, log=tmp_path / "ingest.log"))
        ports = ["--metrics-port", str(metrics[1])]
        replayer = stack.enter_context(service("megido_replayer", *common, *ports, log=tmp_path / "replayer.log"))
        server.wait_ready(port)
        ingest.wait_ready(metrics[0])
        replayer.wait_ready(metrics[1])
        (tmp_path / ".curlrc").write_text(f'connect-to = "localhost:8000:127.0.0.1:{port}"\n')
        yield tmp_path


def run(command: str, home: Path) -> Any:
    """A line as a person types it (plus silence and failing on an error status)."""
    shown = command.replace("curl ", "curl -sSf ", 1)
    env = {"CURL_HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", shown], env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, (command, done.stderr)
    return json.loads(done.stdout)


def history(line: Path, database: str, port: int) -> None:
    """What the lines ask for: request 123, a conversation ws_12345, a timeout."""
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute("SELECT setval('flow_ids', 122)")
    request = a_request(scheme="http", host="localhost", port=port, target=b"/echo?api.example.com", method=b"POST")
    flow = a_completed_flow(request=request, response=a_response())
    where: dict[str, Any] = {"node": flow.node, "epoch": flow.epoch, "time_us": flow.time_us}
    message = events.WebSocketMessage(
        **where,
        event_id=ids.new_id(),
        seq=2,
        message_id=ids.new_id(),
        flow_id=flow.flow_id,
        connection_id="ws_12345",
        url="ws://localhost/",
        direction="SEND",
        message_type="TEXT",
        payload=b"hello",
        size=5,
    )
    error = events.ErrorRaised(
        **where,
        event_id=ids.new_id(),
        seq=3,
        error_id=ids.new_id(),
        failure=events.Failure(events.ErrorType.TIMEOUT, "too slow"),
    )
    journal = Journal.open(DataDir(line / "data"), "capture")
    for event in (flow, message, error):
        assert journal.publish(event)
    journal.close()


def test_each_line_works(line: Path, database: str, site: Site) -> None:
    history(line, database, site.http_port)
    until(lambda: run(lines()[8], line)["total"], "the stored history")
    answers = dict(zip(lines(), [run(command, line) for command in lines()], strict=True))
    found = list(answers.values())
    assert [one["id"] for one in found[0]["requests"]] == [123]
    assert (found[1]["limit"], found[1]["requests"]) == (50, [])
    assert found[2]["total"] == 1
    assert (found[3]["id"], found[3]["response"]["status_code"]) == (123, 200)

    replayed = found[4]
    assert replayed["success"] is True, replayed
    assert set(replayed) >= {"success", "request", "response", "timestamp", "error_message", "replayed_request_id"}
    assert set(replayed["request"]) == {"url", "original_url", "method", "headers", "raw_headers", "body"}
    assert set(replayed["response"]) == {"status_code", "headers", "raw_headers", "body", "response_time", "success"}
    assert replayed["response"]["status_code"] == 200
    assert site.received == [("POST", "/echo?api.example.com")]
    redirected = found[5]
    assert redirected["request"]["original_url"] == found[3]["url"]
    if not redirected["success"]:  # nothing listens on 3000 here, usually
        assert redirected["response"]["success"] is False
        assert redirected["response"]["error"] == redirected["error_message"]

    assert [message["payload"] for message in found[6]["messages"]] == ["hello"]
    assert found[7]["total"] == 1
    assert found[8]["total"] >= 1
    assert [error["error_message"] for error in found[9]["errors"]] == ["too slow"]
    assert found[10]["total_requests"] >= 1
    assert found[10]["total_websocket_messages"] == 1
