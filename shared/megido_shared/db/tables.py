"""The tables, for reading with SQLAlchemy Core. The migrations make them; a test proves that both agree.

Event tables are partitioned by day on their UUIDv7 key, bodies by the same day. There are no foreign keys
between event tables: topics arrive in any order, links join when they are read.
"""

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Identity,
    Integer,
    LargeBinary,
    MetaData,
    Sequence,
    SmallInteger,
    Table,
    Text,
    Uuid,
)
from sqlalchemy.dialects.postgresql import JSONB

metadata = MetaData()

flow_ids = Sequence("flow_ids", metadata=metadata)
"""Integer ids of flows: the founding document's `id`. Messages, errors and auth attempts have theirs."""
message_ids = Sequence("message_ids", metadata=metadata)
error_ids = Sequence("error_ids", metadata=metadata)
auth_ids = Sequence("auth_ids", metadata=metadata)
batch_ids = Sequence("batch_ids", metadata=metadata)

_time = DateTime(timezone=True)

BODY_NONE = 0
BODY_STORED = 1
BODY_TRUNCATED = 2
BODY_NOT_STORED = 3
BODY_INCOMPLETE = 4
"""States of a body: none at all; whole; the first part; size and hash only; a chunk is missing."""

flows = Table(
    "flows",
    metadata,
    Column("flow_id", Uuid, primary_key=True),
    Column("id", BigInteger, nullable=False),
    Column("rank", SmallInteger, nullable=False),
    Column("prev_rank", SmallInteger, nullable=False),
    Column("batch_id", BigInteger, nullable=False),
    Column("node", Text, nullable=False),
    Column("epoch", Uuid, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("event_id", Uuid, nullable=False),
    Column("started_at", _time, nullable=False),
    Column("source_app", Text, nullable=False),
    Column("source_ip", Text, nullable=False),
    Column("source_port", Integer, nullable=False),
    Column("method", Text, nullable=False),
    Column("scheme", Text, nullable=False),
    Column("protocol", Text, nullable=False, comment="HTTP, HTTPS, WS, WSS"),
    Column("host", Text, nullable=False),
    Column("port", Integer, nullable=False),
    Column("url", Text, nullable=False, comment="a text view; target has the bytes"),
    Column("target", LargeBinary, nullable=False),
    Column("authority", LargeBinary, nullable=False),
    Column("http_version", Text, nullable=False),
    Column("user_agent", Text, nullable=False),
    Column("request_headers", LargeBinary, nullable=False, comment="codecs.pack_headers of the event's slice"),
    Column("request_trailers", LargeBinary),
    Column("request_size", BigInteger, nullable=False),
    Column("request_body_state", SmallInteger, nullable=False),
    Column("request_body_key", LargeBinary, comment="sha256 of the stored part, key into bodies"),
    Column("request_sha256", LargeBinary, comment="of the whole body, when known"),
    Column("status", SmallInteger),
    Column("reason", LargeBinary),
    Column("response_http_version", Text),
    Column("response_headers", LargeBinary),
    Column("response_trailers", LargeBinary),
    Column("response_size", BigInteger),
    Column("response_body_state", SmallInteger, nullable=False),
    Column("response_body_key", LargeBinary),
    Column("response_sha256", LargeBinary),
    Column("content_type", Text, comment="of the response, lower case, without parameters"),
    Column("response_time_us", BigInteger),
    Column("cached", Boolean, nullable=False),
    Column("error_type", Text),
    Column("error_message", Text),
    Column("error_stack", Text),
    Column("is_replay", Boolean, nullable=False),
    Column("original_flow_id", Uuid),
    Column("replay_job_id", Uuid),
    Column("replay_position", Integer),
    Column("detail", LargeBinary, nullable=False, comment="detail.Detail as MessagePack"),
    Column("request_chunks", Integer, comment="BodyChunks that the body still waits for; null once it is assembled"),
    Column("response_chunks", Integer),
    Column("rules_counted", Boolean, comment="true once the rules applied to it have been added to their hits"),
)

bodies = Table(
    "bodies",
    metadata,
    Column("day", Date, primary_key=True),
    Column("sha256", LargeBinary, primary_key=True),
    Column("size", BigInteger, nullable=False, comment="bytes before codecs.pack"),
    Column("data", LargeBinary, nullable=False),
)

flow_lines = Table(
    "flow_lines",
    metadata,
    Column("flow_id", Uuid, primary_key=True),
    Column("line", Text, nullable=False, comment="the URL, a line feed, the user agent"),
)
"""For searches in URLs; behind `flows` by what the feed holds past the cursor `LINE_INDEX`."""

flow_text = Table(
    "flow_text",
    metadata,
    Column("flow_id", Uuid, primary_key=True),
    Column("headers", Text, nullable=False, comment="`name: value`, a line each, of request and response"),
    Column("request_body", Text, comment="bodytext; null without text"),
    Column("response_body", Text),
    Column("lossy", Boolean, nullable=False, comment="a body's text is not the whole body, or not exactly it"),
)
"""For searches in headers and bodies; behind `flows` by what the feed holds past the cursor `TEXT_INDEX`."""

LINE_INDEX = "line-index"
TEXT_INDEX = "text-index"

body_chunks = Table(
    "body_chunks",
    metadata,
    Column("flow_id", Uuid, primary_key=True),
    Column("side", SmallInteger, primary_key=True, comment="0 request, 1 response"),
    Column("index", Integer, primary_key=True),
    Column("data", LargeBinary, nullable=False, comment="codecs.pack"),
)

websocket_messages = Table(
    "websocket_messages",
    metadata,
    Column("message_id", Uuid, primary_key=True),
    Column("id", BigInteger, nullable=False),
    Column("batch_id", BigInteger, nullable=False),
    Column("node", Text, nullable=False),
    Column("epoch", Uuid, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("event_id", Uuid, nullable=False),
    Column("flow_id", Uuid, nullable=False),
    Column("connection_id", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("direction", Text, nullable=False),
    Column("message_type", Text, nullable=False),
    Column("payload", LargeBinary, nullable=False, comment="codecs.pack"),
    Column("payload_size", BigInteger, nullable=False),
    Column("truncated", Boolean, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("close_code", Integer),
    Column("close_reason", Text),
    Column("source_ip", Text, nullable=False),
    Column("source_app", Text, nullable=False),
    Column("occurred_at", _time, nullable=False),
)

errors = Table(
    "errors",
    metadata,
    Column("error_id", Uuid, primary_key=True, comment="the flow's id when a flow failed"),
    Column("id", BigInteger, nullable=False),
    Column("batch_id", BigInteger, nullable=False),
    Column("node", Text, nullable=False),
    Column("epoch", Uuid, nullable=False),
    Column("seq", BigInteger, nullable=False, comment="0 for a projection of a flow or an auth attempt"),
    Column("event_id", Uuid, nullable=False),
    Column("flow_id", Uuid),
    Column("error_type", Text, nullable=False),
    Column("error_message", Text, nullable=False),
    Column("stack_trace", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("source_ip", Text, nullable=False),
    Column("occurred_at", _time, nullable=False),
)

auth_attempts = Table(
    "auth_attempts",
    metadata,
    Column("auth_id", Uuid, primary_key=True),
    Column("id", BigInteger, nullable=False),
    Column("batch_id", BigInteger, nullable=False),
    Column("node", Text, nullable=False),
    Column("epoch", Uuid, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("event_id", Uuid, nullable=False),
    Column("username", Text, nullable=False),
    Column("success", Boolean, nullable=False),
    Column("failure_reason", Text, nullable=False),
    Column("source_ip", Text, nullable=False),
    Column("occurred_at", _time, nullable=False),
)

nodes = Table(
    "nodes",
    metadata,
    Column("node", Text, primary_key=True),
    Column("epoch", Uuid, primary_key=True),
    Column("service", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("listen", Text, nullable=False),
    Column("config_version", BigInteger, nullable=False),
    Column("config_stale", Boolean, nullable=False),
    Column("pinned", JSONB, nullable=False),
    Column("counters", JSONB, nullable=False),
    Column("captured", BigInteger, nullable=False),
    Column("seen_at", _time, nullable=False),
    Column("started_at", _time, comment="of the node's latest start, by its own clock"),
    Column("source_app", Text, nullable=False),
    Column("config_error", Text, nullable=False, comment="why a newer configuration is not applied"),
)

ingest_offsets = Table(
    "ingest_offsets",
    metadata,
    Column("source_id", Text, primary_key=True),
    Column("topic", Text, primary_key=True),
    Column("partition", Integer, primary_key=True),
    Column("offset", BigInteger, nullable=False, comment="the next one to read"),
    Column("last_event_id", LargeBinary, nullable=False),
    Column("generation", BigInteger, nullable=False, comment="the claim that may advance it"),
)

feed = Table(
    "feed",
    metadata,
    Column("seq", BigInteger, Identity(always=True), primary_key=True),
    Column("batch_id", BigInteger, nullable=False),
    Column("committed_at", _time, nullable=False),
)

feed_cursors = Table(
    "feed_cursors",
    metadata,
    Column("reader", Text, primary_key=True),
    Column("seq", BigInteger, nullable=False),
)

counters = Table(
    "counters",
    metadata,
    Column("name", Text, primary_key=True),
    Column("label", Text, primary_key=True),
    Column("shard", Integer, primary_key=True),
    Column("value", BigInteger, nullable=False),
)
"""Summed over shards on reading. Names: requests, requests_by_method, requests_by_protocol, responses,
responses_timed, response_time_us (the sum over those), websocket_messages, errors, errors_by_type, auth_attempts,
auth_failures."""

rollups = Table(
    "rollups",
    metadata,
    Column("minutes", SmallInteger, primary_key=True, autoincrement=False, comment="the width: 1, 60 or 1440"),
    Column("name", Text, primary_key=True),
    Column("bucket", _time, primary_key=True, comment="its beginning, UTC"),
    Column("label", Text, primary_key=True),
    Column("shard", Integer, primary_key=True),
    Column("value", BigInteger, nullable=False),
)
"""Statistics by time, kept by triggers, summed over shards on reading. By the flow's `started_at`; names: requests,
responses, responses_timed, response_time_us (the sum over those), request_bytes, response_bytes; by label method,
protocol, host, status, error (of failed flows and of errors without a flow), latency (the bin, `latency_bin` in SQL);
messages, auth_failures."""

UNCOUNTED = "_uncounted"
"""Behind a gap's kind in `accounting`: so many gaps, each of an unknown number of records."""

accounting = Table(
    "accounting",
    metadata,
    Column("node", Text, primary_key=True),
    Column("epoch", Uuid, primary_key=True),
    Column("kind", Text, primary_key=True, comment="stored, dead_lettered, expired, corrupt, torn"),
    Column("shard", Integer, primary_key=True),
    Column("value", BigInteger, nullable=False),
    Column("max_seq", BigInteger, nullable=False),
)

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("source_id", Text, nullable=False),
    Column("topic", Text, nullable=False),
    Column("partition", Integer, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("event_type", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("key", LargeBinary, nullable=False),
    Column("value", LargeBinary, nullable=False),
    Column("state", Text, nullable=False, comment="new, queued (on its way through ingest again), redriven, discarded"),
    Column("created_at", _time, nullable=False),
    Column("attempts", Integer, nullable=False, comment="how often it was put through ingest again"),
    Column("changed_by", Text, nullable=False, comment="who put it through again or discarded it"),
    Column("changed_at", _time),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("topic", Text, nullable=False),
    Column("key", LargeBinary, nullable=False),
    Column("value", LargeBinary, nullable=False),
    Column("headers", JSONB, nullable=False, comment="text values"),
    Column("created_at", _time, nullable=False),
)

posted_requests = Table(
    "posted_requests",
    metadata,
    Column("id", BigInteger, primary_key=True),
    Column("flow_id", Uuid, nullable=False),
    Column("event", LargeBinary, nullable=False, comment="the FlowStarted that was published"),
    Column("created_at", _time, nullable=False),
)

payload_rules = Table(
    "payload_rules",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("name", Text, nullable=False),
    Column("target_url_pattern", Text, nullable=False),
    Column("injection_type", Text, nullable=False, comment="header, param, cookie, body"),
    Column("injection_point", Text, nullable=False),
    Column("payload_content", Text, nullable=False),
    Column("active", Boolean, nullable=False),
    Column("target_apps", ARRAY(Text), nullable=False),
    Column("created_by", Text, nullable=False),
    Column("created_at", _time, nullable=False),
    Column("updated_at", _time, nullable=False),
    Column("hits", BigInteger, nullable=False),
    Column("last_hit_at", _time),
)

config_snapshots = Table(
    "config_snapshots",
    metadata,
    Column("scope", Text, primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("settings", JSONB, nullable=False),
    Column("updated_at", _time, nullable=False),
)

config_changes = Table(
    "config_changes",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False, comment="one count over all scopes"),
    Column("scope", Text, nullable=False),
    Column("changes", JSONB, nullable=False, comment="field: {old, new}; of a secret only that it changed"),
    Column("changed_by", Text, nullable=False),
    Column("changed_at", _time, nullable=False),
)
"""Append-only."""

flow_pins = Table(
    "flow_pins",
    metadata,
    Column("flow_id", Uuid, primary_key=True),
    Column("pinned_by", Text, nullable=False),
    Column("pinned_at", _time, nullable=False),
)
"""Flows that retention leaves alone, with all that belongs to them."""

retention_policy = Table(
    "retention_policy",
    metadata,
    Column("only_row", Boolean, primary_key=True),
    Column("days", Integer, nullable=False, comment="0 is no limit, here and below"),
    Column("max_bytes", BigInteger, nullable=False),
    Column("log_days", Integer, nullable=False),
    Column("log_max_bytes", BigInteger, nullable=False),
    Column("every_minutes", Integer, nullable=False),
    Column("changed_by", Text, nullable=False),
    Column("changed_at", _time, nullable=False),
)

retention_changes = Table(
    "retention_changes",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("changes", JSONB, nullable=False, comment="field: {old, new}"),
    Column("changed_by", Text, nullable=False),
    Column("changed_at", _time, nullable=False),
)
"""Append-only."""

retention_runs = Table(
    "retention_runs",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("state", Text, nullable=False, comment="queued, running, done, failed"),
    Column("dry_run", Boolean, nullable=False),
    Column("requested_by", Text, nullable=False),
    Column("requested_at", _time, nullable=False),
    Column("finished_at", _time),
    Column("report", JSONB, nullable=False, comment="megido_shared.retention.Report; grows with the run"),
    Column("error", Text, nullable=False),
)

replay_jobs = Table(
    "replay_jobs",
    metadata,
    Column("job_id", Uuid, primary_key=True),
    Column("state", Text, nullable=False, comment="queued, running, paused, done, cancelled, failed"),
    Column("options", JSONB, nullable=False, comment="megido_shared.replay.ReplayOptions"),
    Column("created_by", Text, nullable=False),
    Column("created_at", _time, nullable=False),
    Column("updated_at", _time, nullable=False),
)

replay_items = Table(
    "replay_items",
    metadata,
    Column("job_id", Uuid, primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("original_flow_id", Uuid, nullable=False),
    Column("original_id", BigInteger, nullable=False),
    Column(
        "state",
        Text,
        nullable=False,
        comment="queued, claimed, sent, succeeded, failed, timed_out, skipped, cancelled, unknown",
    ),
    Column("attempt", Integer, nullable=False),
    Column("claimed_by", Text),
    Column("lease_until", _time),
    Column("result_flow_id", Uuid),
    Column("status", SmallInteger),
    Column("error", Text),
    Column("deviations", ARRAY(Text), nullable=False, comment="how the request sent differs from the original"),
    Column("updated_at", _time, nullable=False),
)
