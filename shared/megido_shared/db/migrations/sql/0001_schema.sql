-- The tables of megido_shared.db.tables, their partitions' parents, indexes and sequences.
-- Text columns that are indexed collate "C": a libc upgrade cannot damage their indexes, and comparing is cheap.
-- What we compressed ourselves is STORAGE EXTERNAL, so that Postgres does not try again.

CREATE SEQUENCE flow_ids;
CREATE SEQUENCE message_ids;
CREATE SEQUENCE error_ids;
CREATE SEQUENCE auth_ids;
CREATE SEQUENCE batch_ids;

CREATE TABLE flows (
    flow_id uuid NOT NULL PRIMARY KEY,
    id bigint NOT NULL,
    rank smallint NOT NULL,
    prev_rank smallint NOT NULL,
    batch_id bigint NOT NULL,
    node text COLLATE "C" NOT NULL,
    epoch uuid NOT NULL,
    seq bigint NOT NULL,
    event_id uuid NOT NULL,
    started_at timestamptz NOT NULL,
    source_app text COLLATE "C" NOT NULL,
    source_ip text COLLATE "C" NOT NULL,
    source_port integer NOT NULL,
    method text COLLATE "C" NOT NULL,
    scheme text COLLATE "C" NOT NULL,
    protocol text COLLATE "C" NOT NULL,
    host text COLLATE "C" NOT NULL,
    port integer NOT NULL,
    url text NOT NULL,
    target bytea NOT NULL,
    authority bytea NOT NULL,
    http_version text NOT NULL,
    user_agent text NOT NULL,
    request_headers bytea NOT NULL,
    request_trailers bytea,
    request_size bigint NOT NULL,
    request_body_state smallint NOT NULL,
    request_body_key bytea,
    request_sha256 bytea,
    status smallint,
    reason bytea,
    response_http_version text,
    response_headers bytea,
    response_trailers bytea,
    response_size bigint,
    response_body_state smallint NOT NULL,
    response_body_key bytea,
    response_sha256 bytea,
    content_type text,
    response_time_us bigint,
    cached boolean NOT NULL,
    error_type text COLLATE "C",
    error_message text,
    error_stack text,
    is_replay boolean NOT NULL,
    original_flow_id uuid,
    replay_job_id uuid,
    replay_position integer,
    detail bytea NOT NULL
) PARTITION BY RANGE (flow_id);
ALTER TABLE flows
    ALTER request_headers SET STORAGE EXTERNAL,
    ALTER request_trailers SET STORAGE EXTERNAL,
    ALTER response_headers SET STORAGE EXTERNAL,
    ALTER response_trailers SET STORAGE EXTERNAL;
CREATE INDEX flows_id ON flows (id);
CREATE INDEX flows_batch ON flows (batch_id);
CREATE INDEX flows_method_scheme ON flows (method, scheme, flow_id);
CREATE INDEX flows_status ON flows (status, flow_id);
CREATE INDEX flows_host ON flows (host, flow_id);
CREATE INDEX flows_source_ip ON flows (source_ip, flow_id);
-- Few rows at any time; what the maintenance leader looks for.
CREATE INDEX flows_open ON flows (node, epoch) WHERE rank = 1;
CREATE INDEX flows_replays ON flows (original_flow_id) WHERE original_flow_id IS NOT NULL;

CREATE TABLE bodies (
    day date NOT NULL,
    sha256 bytea NOT NULL,
    size bigint NOT NULL,
    data bytea NOT NULL,
    PRIMARY KEY (day, sha256)
) PARTITION BY RANGE (day);
ALTER TABLE bodies ALTER data SET STORAGE EXTERNAL;

CREATE TABLE body_chunks (
    flow_id uuid NOT NULL,
    side smallint NOT NULL,
    index integer NOT NULL,
    data bytea NOT NULL,
    PRIMARY KEY (flow_id, side, index)
) PARTITION BY RANGE (flow_id);
ALTER TABLE body_chunks ALTER data SET STORAGE EXTERNAL;

CREATE TABLE websocket_messages (
    message_id uuid NOT NULL PRIMARY KEY,
    id bigint NOT NULL,
    batch_id bigint NOT NULL,
    node text COLLATE "C" NOT NULL,
    epoch uuid NOT NULL,
    seq bigint NOT NULL,
    event_id uuid NOT NULL,
    flow_id uuid NOT NULL,
    connection_id text COLLATE "C" NOT NULL,
    url text NOT NULL,
    direction text COLLATE "C" NOT NULL,
    message_type text COLLATE "C" NOT NULL,
    payload bytea NOT NULL,
    payload_size bigint NOT NULL,
    truncated boolean NOT NULL,
    sequence bigint NOT NULL,
    close_code integer,
    close_reason text,
    source_ip text COLLATE "C" NOT NULL,
    source_app text COLLATE "C" NOT NULL,
    occurred_at timestamptz NOT NULL
) PARTITION BY RANGE (message_id);
ALTER TABLE websocket_messages ALTER payload SET STORAGE EXTERNAL;
CREATE INDEX websocket_messages_id ON websocket_messages (id);
CREATE INDEX websocket_messages_batch ON websocket_messages (batch_id);
CREATE INDEX websocket_messages_connection ON websocket_messages (connection_id, message_id);

CREATE TABLE errors (
    error_id uuid NOT NULL PRIMARY KEY,
    id bigint NOT NULL,
    batch_id bigint NOT NULL,
    node text COLLATE "C" NOT NULL,
    epoch uuid NOT NULL,
    seq bigint NOT NULL,
    event_id uuid NOT NULL,
    flow_id uuid,
    error_type text COLLATE "C" NOT NULL,
    error_message text NOT NULL,
    stack_trace text NOT NULL,
    url text NOT NULL,
    source_ip text COLLATE "C" NOT NULL,
    occurred_at timestamptz NOT NULL
) PARTITION BY RANGE (error_id);
CREATE INDEX errors_id ON errors (id);
CREATE INDEX errors_batch ON errors (batch_id);
CREATE INDEX errors_type ON errors (error_type, error_id);
CREATE INDEX errors_source_ip ON errors (source_ip, error_id);

CREATE TABLE auth_attempts (
    auth_id uuid NOT NULL PRIMARY KEY,
    id bigint NOT NULL,
    batch_id bigint NOT NULL,
    node text COLLATE "C" NOT NULL,
    epoch uuid NOT NULL,
    seq bigint NOT NULL,
    event_id uuid NOT NULL,
    username text NOT NULL,
    success boolean NOT NULL,
    failure_reason text NOT NULL,
    source_ip text COLLATE "C" NOT NULL,
    occurred_at timestamptz NOT NULL
) PARTITION BY RANGE (auth_id);
CREATE INDEX auth_attempts_id ON auth_attempts (id);
CREATE INDEX auth_attempts_batch ON auth_attempts (batch_id);
CREATE INDEX auth_attempts_success ON auth_attempts (success, auth_id);

CREATE TABLE nodes (
    node text COLLATE "C" NOT NULL,
    epoch uuid NOT NULL,
    service text NOT NULL,
    state text NOT NULL,
    version text NOT NULL,
    listen text NOT NULL,
    config_version bigint NOT NULL,
    config_stale boolean NOT NULL,
    pinned jsonb NOT NULL,
    counters jsonb NOT NULL,
    captured bigint NOT NULL,
    seen_at timestamptz NOT NULL,
    PRIMARY KEY (node, epoch)
) WITH (fillfactor = 50);

CREATE TABLE ingest_offsets (
    source_id text COLLATE "C" NOT NULL,
    topic text COLLATE "C" NOT NULL,
    partition integer NOT NULL,
    "offset" bigint NOT NULL,
    last_event_id bytea NOT NULL,
    generation bigint NOT NULL,
    PRIMARY KEY (source_id, topic, partition)
) WITH (fillfactor = 50);

CREATE TABLE feed (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    batch_id bigint NOT NULL,
    committed_at timestamptz NOT NULL
);

CREATE TABLE feed_cursors (
    reader text COLLATE "C" NOT NULL PRIMARY KEY,
    seq bigint NOT NULL
) WITH (fillfactor = 50);

CREATE TABLE counters (
    name text COLLATE "C" NOT NULL,
    label text COLLATE "C" NOT NULL,
    shard integer NOT NULL,
    value bigint NOT NULL,
    PRIMARY KEY (name, label, shard)
) WITH (fillfactor = 50);

CREATE TABLE accounting (
    node text COLLATE "C" NOT NULL,
    epoch uuid NOT NULL,
    kind text COLLATE "C" NOT NULL,
    shard integer NOT NULL,
    value bigint NOT NULL,
    max_seq bigint NOT NULL,
    PRIMARY KEY (node, epoch, kind, shard)
) WITH (fillfactor = 50);

CREATE TABLE dead_letters (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source_id text COLLATE "C" NOT NULL,
    topic text COLLATE "C" NOT NULL,
    partition integer NOT NULL,
    "offset" bigint NOT NULL,
    event_type text NOT NULL,
    reason text NOT NULL,
    key bytea NOT NULL,
    value bytea NOT NULL,
    state text COLLATE "C" NOT NULL,
    created_at timestamptz NOT NULL
);
-- A record that is delivered again, by a rewound stream too, is one dead letter.
CREATE UNIQUE INDEX dead_letters_place ON dead_letters (source_id, topic, partition, "offset");

CREATE TABLE outbox (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic text NOT NULL,
    key bytea NOT NULL,
    value bytea NOT NULL,
    headers jsonb NOT NULL,
    created_at timestamptz NOT NULL
);

CREATE TABLE posted_requests (
    id bigint NOT NULL PRIMARY KEY,
    flow_id uuid NOT NULL,
    event bytea NOT NULL,
    created_at timestamptz NOT NULL
);
CREATE INDEX posted_requests_flow ON posted_requests (flow_id);
CREATE INDEX posted_requests_created ON posted_requests (created_at);

CREATE TABLE payload_rules (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL,
    target_url_pattern text NOT NULL,
    injection_type text NOT NULL,
    injection_point text NOT NULL,
    payload_content text NOT NULL,
    active boolean NOT NULL,
    target_apps text[] NOT NULL,
    created_by text NOT NULL,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    hits bigint NOT NULL,
    last_hit_at timestamptz
);

CREATE TABLE config_snapshots (
    scope text COLLATE "C" NOT NULL PRIMARY KEY,
    version bigint NOT NULL,
    settings jsonb NOT NULL,
    updated_at timestamptz NOT NULL
);

CREATE TABLE replay_jobs (
    job_id uuid NOT NULL PRIMARY KEY,
    state text COLLATE "C" NOT NULL,
    options jsonb NOT NULL,
    created_by text NOT NULL,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL
);

CREATE TABLE replay_items (
    job_id uuid NOT NULL,
    position integer NOT NULL,
    original_flow_id uuid NOT NULL,
    original_id bigint NOT NULL,
    state text COLLATE "C" NOT NULL,
    attempt integer NOT NULL,
    claimed_by text,
    lease_until timestamptz,
    result_flow_id uuid,
    status smallint,
    error text,
    deviations text[] NOT NULL DEFAULT '{}',
    updated_at timestamptz NOT NULL,
    PRIMARY KEY (job_id, position)
);
CREATE INDEX replay_items_open ON replay_items (state, job_id, position)
    WHERE state IN ('queued', 'claimed', 'sent');
CREATE INDEX replay_items_result ON replay_items (result_flow_id) WHERE result_flow_id IS NOT NULL;

-- The smallest UUIDv7 of a day (UTC): where its partitions begin.
CREATE FUNCTION day_floor(day date) RETURNS uuid
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN (lpad(to_hex((extract(epoch FROM day::timestamp) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid;

-- Makes the partitions of every event table for each day from the first to the last, both included; those that
-- exist are left alone. Returns how many were made. A partition is built apart and attached, so readers and
-- writers of the parent go on meanwhile (CREATE TABLE … PARTITION OF would lock them out).
-- SECURITY DEFINER: ingest's role may call it without owning the tables.
CREATE FUNCTION ensure_partitions(first date, last date) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT
AS $$
DECLARE
    made integer := 0;
    day date;
    parent text;
    leaf text;
BEGIN
    IF last - first > 400 THEN
        RAISE EXCEPTION 'ensure_partitions: % to % is more than 400 days', first, last;
    END IF;
    -- Two callers at once would fail on the same name.
    PERFORM pg_advisory_xact_lock(hashtext('megido.partitions'));
    FOR day IN SELECT generate_series(first, last, interval '1 day')::date LOOP
        FOREACH parent IN ARRAY ARRAY['flows', 'bodies', 'body_chunks', 'websocket_messages', 'errors', 'auth_attempts']
        LOOP
            leaf := parent || '_' || to_char(day, 'YYYYMMDD');
            CONTINUE WHEN to_regclass(leaf) IS NOT NULL;
            EXECUTE format('CREATE TABLE %I (LIKE %I INCLUDING DEFAULTS INCLUDING STORAGE)', leaf, parent);
            IF parent = 'bodies' THEN
                EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                               parent, leaf, day, day + 1);
            ELSE
                EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                               parent, leaf, day_floor(day), day_floor(day + 1));
            END IF;
            made := made + 1;
        END LOOP;
    END LOOP;
    RETURN made;
END
$$;
