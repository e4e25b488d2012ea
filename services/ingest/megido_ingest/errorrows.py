"""What failed as packed rows of rows.ERROR: by itself, with its flow, or as an attempt to use the proxy."""

from megido_ingest import rows, views
from megido_ingest.packing import EPOCH_2000_US
from megido_shared import events

ORIGIN_ITSELF = 0
ORIGIN_FLOW = 1
ORIGIN_AUTH = 2


def flow_error(event: events.FlowFailed) -> bytes:
    ended = event.time_us + max(0, event.timing.response_us)
    return rows.ERROR.pack(
        event.flow_id, 0, ORIGIN_FLOW, views.key(event.node), event.epoch, 0, event.event_id, event.flow_id,
        event.failure.error_type, views.plain(event.failure.message), views.plain(event.failure.stack_trace),
        views.url_of(event.request), views.key(event.client.ip), ended - EPOCH_2000_US,
    )  # fmt: skip


def own_error(event: events.ErrorRaised) -> bytes:
    return rows.ERROR.pack(
        event.error_id, event.posted_id, ORIGIN_ITSELF, views.key(event.node), event.epoch, event.seq, event.event_id,
        None, event.failure.error_type, views.plain(event.failure.message), views.plain(event.failure.stack_trace),
        views.plain(event.url), views.key(event.client.ip), event.time_us - EPOCH_2000_US,
    )  # fmt: skip


def auth_error(event: events.AuthAttempted) -> bytes:
    return rows.ERROR.pack(
        event.auth_id, 0, ORIGIN_AUTH, views.key(event.node), event.epoch, 0, event.event_id, None,
        events.ErrorType.AUTH_FAILURE, views.plain(auth_reason(event)), "", "", views.key(event.client.ip),
        event.time_us - EPOCH_2000_US,
    )  # fmt: skip


def auth_reason(event: events.AuthAttempted) -> str:
    return event.failure_reason if event.attempts <= 1 else f"{event.failure_reason} ({event.attempts} attempts)"
