"""A response from the proxy's cache says so in its row."""

from megido_shared import ids
from megido_shared.events import FlowCompleted
from megido_shared.testing import a_request, a_response
from tests.integration.ingest.support import Log, ingest, rows
from tests.integration.ingest.traffic import an_event


async def test_cached_is_stored(database: str) -> None:
    log = Log()
    for cached in (True, False):
        log.add(
            an_event(FlowCompleted, flow_id=ids.new_id(), request=a_request(), response=a_response(), cached=cached)
        )
    await ingest(database, [log.records])
    assert rows(database, "SELECT cached FROM flows ORDER BY flow_id") == [(True,), (False,)]
