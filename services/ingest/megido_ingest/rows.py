"""Argument types of the SQL functions that store a batch, field by field. A test compares them with the database."""

from megido_ingest.packing import RowType


def _type(name: str, fields: str) -> RowType:
    return RowType(name, [tuple(field.split()) for field in fields.strip().splitlines()])  # type: ignore[misc]


POSITION = _type(
    "ingest_position",
    """
    source_id text
    topic text
    partition integer
    generation bigint
    next_offset bigint
    last_event_id bytea
    rewound boolean
    """,
)
FLOW = _type(
    "ingest_flow",
    """
    flow_id uuid
    epoch uuid
    event_id uuid
    posted_id bigint
    rank smallint
    seq bigint
    started_at timestamptz
    source_port integer
    port integer
    request_size bigint
    request_body_state smallint
    response_body_state smallint
    cached boolean
    is_replay boolean
    node text
    source_app text
    source_ip text
    method text
    scheme text
    protocol text
    host text
    url text
    target bytea
    authority bytea
    http_version text
    user_agent text
    request_headers bytea
    request_trailers bytea
    request_body_key bytea
    request_sha256 bytea
    request_chunks integer
    status smallint
    reason bytea
    response_http_version text
    response_headers bytea
    response_trailers bytea
    response_size bigint
    response_body_key bytea
    response_sha256 bytea
    response_chunks integer
    content_type text
    response_time_us bigint
    error_type text
    error_message text
    error_stack text
    original_flow_id uuid
    replay_job_id uuid
    replay_position integer
    detail bytea
    """,
)
BODY = _type(
    "ingest_body",
    """
    day date
    sha256 bytea
    size bigint
    data bytea
    """,
)
CHUNK = _type(
    "ingest_chunk",
    """
    flow_id uuid
    side smallint
    index integer
    data bytea
    """,
)
MESSAGE = _type(
    "ingest_message",
    """
    message_id uuid
    posted_id bigint
    node text
    epoch uuid
    seq bigint
    event_id uuid
    flow_id uuid
    connection_id text
    url text
    direction text
    message_type text
    payload bytea
    payload_size bigint
    truncated boolean
    sequence bigint
    close_code integer
    close_reason text
    source_ip text
    source_app text
    occurred_at timestamptz
    """,
)
ERROR = _type(
    "ingest_error",
    """
    error_id uuid
    posted_id bigint
    origin smallint
    node text
    epoch uuid
    seq bigint
    event_id uuid
    flow_id uuid
    error_type text
    error_message text
    stack_trace text
    url text
    source_ip text
    occurred_at timestamptz
    """,
)
AUTH = _type(
    "ingest_auth",
    """
    auth_id uuid
    posted_id bigint
    node text
    epoch uuid
    seq bigint
    event_id uuid
    username text
    success boolean
    failure_reason text
    source_ip text
    occurred_at timestamptz
    """,
)
NODE = _type(
    "ingest_node",
    """
    node text
    epoch uuid
    service text
    state text
    version text
    listen text
    config_version bigint
    config_stale boolean
    pinned text
    counters text
    captured bigint
    seen_at timestamptz
    started_at timestamptz
    source_app text
    config_error text
    """,
)
GAP = _type(
    "ingest_gap",
    """
    source_id text
    topic text
    partition integer
    next_offset bigint
    kind text
    count bigint
    epoch uuid
    """,
)
LETTER = _type(
    "ingest_dead_letter",
    """
    source_id text
    topic text
    partition integer
    offset bigint
    event_type text
    reason text
    key bytea
    value bytea
    node text
    epoch uuid
    seq bigint
    counted boolean
    """,
)
REDRIVE = _type(
    "ingest_redrive",
    """
    source_id text
    topic text
    partition integer
    offset bigint
    attempt integer
    stored boolean
    event_type text
    reason text
    key bytea
    value bytea
    node text
    epoch uuid
    seq bigint
    counted boolean
    """,
)
ALL = (POSITION, FLOW, BODY, CHUNK, MESSAGE, ERROR, AUTH, NODE, GAP, LETTER, REDRIVE)
