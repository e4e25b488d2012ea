-- The live configuration: who changed what, what nodes say about it, and how often each rule was applied.

CREATE TABLE config_changes (
    version bigint NOT NULL PRIMARY KEY,
    scope text COLLATE "C" NOT NULL,
    changes jsonb NOT NULL,
    changed_by text NOT NULL,
    changed_at timestamptz NOT NULL
);
CREATE INDEX config_changes_scope ON config_changes (scope, version);

ALTER TABLE nodes
    ADD source_app text NOT NULL DEFAULT '',
    ADD config_error text NOT NULL DEFAULT '';
ALTER TYPE ingest_node ADD ATTRIBUTE source_app text, ADD ATTRIBUTE config_error text;

-- True once the rules that were applied to the flow have been added to their hits.
ALTER TABLE flows ADD rules_counted boolean;

-- As before, and step 6 stores what is new of a node.
-- Stores one batch. Idempotent: what is stored already, or is outranked by it, changes neither rows nor counters.
-- Raises MG001 (detail: the streams, JSON; none when the claims are not known here at all) when another worker has
-- claimed a stream since.
-- Answers the batch's number, how many rows are new or raised (0 everywhere when all of it had been stored before),
-- and the flows whose parked chunks are to be assembled in this transaction.
CREATE OR REPLACE FUNCTION ingest(
    shard integer, positions ingest_position[], new_flows ingest_flow[], new_bodies ingest_body[],
    new_chunks ingest_chunk[], new_messages ingest_message[], new_errors ingest_error[],
    new_auth ingest_auth[], new_nodes ingest_node[], gaps ingest_gap[], letters ingest_dead_letter[],
    OUT batch bigint, OUT flow_count bigint, OUT message_count bigint, OUT error_count bigint, OUT auth_count bigint,
    OUT letter_count bigint, OUT to_assemble uuid[]
)
LANGUAGE plpgsql
AS $$
DECLARE
    stale text;
    repeated boolean;
    held_count bigint;
    overtaken bigint;
    touched uuid[];
BEGIN
    flow_count := 0; message_count := 0; error_count := 0; auth_count := 0; letter_count := 0;

    -- 1. This worker's offsets, locked in sorted order; fencing.
    SELECT jsonb_agg(jsonb_build_array(held.source_id, held.topic, held.partition))
               FILTER (WHERE held.found IS DISTINCT FROM held.claimed)::text,
           bool_and(held.next_offset <= held.stored AND NOT held.rewound),
           count(*)
    INTO stale, repeated, held_count
    FROM (
        SELECT p.source_id, p.topic, p.partition, p.next_offset, p.rewound, p.generation AS claimed,
               o.generation AS found, o."offset" AS stored
        FROM unnest(positions) AS p
        JOIN ingest_offsets AS o USING (source_id, topic, partition)
        ORDER BY 1, 2, 3
        FOR UPDATE OF o
    ) AS held;
    IF held_count < cardinality(positions) THEN  -- another database than the one that we claimed in
        stale := '[]';
    END IF;
    IF stale IS NOT NULL THEN
        RAISE EXCEPTION 'streams were claimed by another worker' USING ERRCODE = 'MG001', DETAIL = stale;
    END IF;
    IF repeated THEN  -- the answer to an earlier COMMIT was lost
        RETURN;
    END IF;
    batch := nextval('batch_ids');

    -- 2. Gaps and dead letters below the stored offset were counted before.
    INSERT INTO accounting AS a (node, epoch, kind, shard, value, max_seq)
    SELECT '', g.epoch, g.kind, ingest.shard, sum(g.count), 0
    FROM unnest(gaps) AS g
    JOIN ingest_offsets AS o USING (source_id, topic, partition)
    WHERE g.kind <> 'rewound' AND g.next_offset > o."offset"
    GROUP BY g.epoch, g.kind ORDER BY 1, 2, 3
    ON CONFLICT ON CONSTRAINT accounting_pkey DO UPDATE SET value = a.value + excluded.value;

    IF cardinality(letters) > 0 THEN
        WITH stored AS (
            INSERT INTO dead_letters (source_id, topic, partition, "offset", event_type, reason, key, value, state,
                                      created_at)
            SELECT l.source_id, l.topic, l.partition, l."offset", l.event_type, l.reason, l.key, l.value, 'new', now()
            FROM unnest(letters) AS l ORDER BY 1, 2, 3, 4
            ON CONFLICT DO NOTHING
            RETURNING dead_letters.source_id, dead_letters.topic, dead_letters.partition, dead_letters."offset"
        ), fresh AS (
            SELECT l.* FROM unnest(letters) AS l JOIN stored USING (source_id, topic, partition, "offset")
        ), copied AS (
            INSERT INTO outbox (topic, key, value, headers, created_at)
            SELECT 'megido.dead-letters',
                   convert_to(f.topic || '/' || f.partition || '/' || f."offset", 'UTF8'), f.value,
                   jsonb_build_object('megido_reason', f.reason, 'megido_type', f.event_type,
                                      'megido_source', f.source_id, 'megido_topic', f.topic,
                                      'megido_partition', f.partition::text, 'megido_offset', f."offset"::text),
                   now()
            FROM fresh AS f
        ), counted AS (
            INSERT INTO accounting AS a (node, epoch, kind, shard, value, max_seq)
            SELECT f.node, f.epoch, 'dead_lettered', ingest.shard, count(*), max(f.seq)
            FROM fresh AS f WHERE f.counted GROUP BY f.node, f.epoch ORDER BY 1, 2
            ON CONFLICT ON CONSTRAINT accounting_pkey
            DO UPDATE SET value = a.value + excluded.value, max_seq = greatest(a.max_seq, excluded.max_seq)
        )
        SELECT count(*) INTO letter_count FROM fresh;
        PERFORM pg_notify('megido_outbox', '');
    END IF;

    -- 3. A flow and its late chunk must see each other, whichever worker has them.
    SELECT array_agg(DISTINCT flow_id ORDER BY flow_id) INTO touched FROM (
        SELECT c.flow_id FROM unnest(new_chunks) AS c
        UNION ALL
        SELECT f.flow_id FROM unnest(new_flows) AS f WHERE f.request_chunks > 0 OR f.response_chunks > 0
    ) AS both_sides;
    IF touched IS NOT NULL THEN
        PERFORM pg_advisory_xact_lock(hashtextextended('megido.chunks.' || t::text, 0))
        FROM unnest(touched) AS t;
    END IF;

    -- 4. Bodies, then everything that counts, in one statement. Rows come sorted by key.
    INSERT INTO bodies (day, sha256, size, data)
    SELECT b.day, b.sha256, b.size, b.data FROM unnest(new_bodies) AS b
    ON CONFLICT DO NOTHING;

    WITH changed AS (
        INSERT INTO flows (
            flow_id, id, rank, prev_rank, batch_id, node, epoch, seq, event_id, started_at, source_app, source_ip,
            source_port, method, scheme, protocol, host, port, url, target, authority, http_version, user_agent,
            request_headers, request_trailers, request_size, request_body_state, request_body_key, request_sha256,
            request_chunks, status, reason, response_http_version, response_headers, response_trailers, response_size,
            response_body_state, response_body_key, response_sha256, response_chunks, content_type, response_time_us,
            cached, error_type, error_message, error_stack, is_replay, original_flow_id, replay_job_id,
            replay_position, detail
        )
        SELECT
            f.flow_id, CASE WHEN f.posted_id > 0 THEN f.posted_id ELSE nextval('flow_ids') END, f.rank, 0, batch,
            f.node, f.epoch, f.seq, f.event_id, f.started_at, f.source_app, f.source_ip, f.source_port, f.method,
            f.scheme, f.protocol, f.host, f.port, f.url, f.target, f.authority, f.http_version, f.user_agent,
            f.request_headers, f.request_trailers, f.request_size, f.request_body_state, f.request_body_key,
            f.request_sha256, f.request_chunks, f.status, f.reason, f.response_http_version, f.response_headers,
            f.response_trailers, f.response_size, f.response_body_state, f.response_body_key, f.response_sha256,
            f.response_chunks, f.content_type, f.response_time_us, f.cached, f.error_type, f.error_message,
            f.error_stack, f.is_replay, f.original_flow_id, f.replay_job_id, f.replay_position, f.detail
        FROM unnest(new_flows) AS f
        ON CONFLICT (flow_id) DO UPDATE SET
            rank = excluded.rank, prev_rank = flows.rank, batch_id = excluded.batch_id, node = excluded.node,
            epoch = excluded.epoch, seq = excluded.seq, event_id = excluded.event_id,
            started_at = excluded.started_at, source_app = excluded.source_app, source_ip = excluded.source_ip,
            source_port = excluded.source_port, method = excluded.method, scheme = excluded.scheme,
            protocol = excluded.protocol, host = excluded.host, port = excluded.port, url = excluded.url,
            target = excluded.target, authority = excluded.authority, http_version = excluded.http_version,
            user_agent = excluded.user_agent, request_headers = excluded.request_headers,
            request_trailers = excluded.request_trailers, request_size = excluded.request_size,
            request_body_state = excluded.request_body_state, request_body_key = excluded.request_body_key,
            request_sha256 = excluded.request_sha256, request_chunks = excluded.request_chunks,
            status = excluded.status, reason = excluded.reason,
            response_http_version = excluded.response_http_version, response_headers = excluded.response_headers,
            response_trailers = excluded.response_trailers, response_size = excluded.response_size,
            response_body_state = excluded.response_body_state, response_body_key = excluded.response_body_key,
            response_sha256 = excluded.response_sha256, response_chunks = excluded.response_chunks,
            content_type = excluded.content_type, response_time_us = excluded.response_time_us,
            cached = excluded.cached, error_type = excluded.error_type, error_message = excluded.error_message,
            error_stack = excluded.error_stack, is_replay = excluded.is_replay,
            original_flow_id = excluded.original_flow_id, replay_job_id = excluded.replay_job_id,
            replay_position = excluded.replay_position, detail = excluded.detail
        WHERE excluded.rank > flows.rank
            -- What a node says of its interrupted flow outranks what maintenance said in its place (seq 0).
            OR (excluded.rank = 2 AND flows.rank = 2 AND flows.seq = 0 AND excluded.seq > 0)
        RETURNING
            flows.flow_id, flows.rank, flows.prev_rank, flows.node, flows.epoch, flows.seq, flows.method,
            flows.protocol, flows.status, flows.response_time_us,
            -- A sub-select sees the row as it was before this statement.
            CASE WHEN flows.prev_rank > 0 THEN
                (SELECT o FROM flows AS o WHERE o.flow_id = flows.flow_id)
            END AS old
    ), messages AS (
        INSERT INTO websocket_messages (
            message_id, id, batch_id, node, epoch, seq, event_id, flow_id, connection_id, url, direction, message_type,
            payload, payload_size, truncated, sequence, close_code, close_reason, source_ip, source_app, occurred_at
        )
        SELECT
            m.message_id, CASE WHEN m.posted_id > 0 THEN m.posted_id ELSE nextval('message_ids') END, batch, m.node,
            m.epoch, m.seq, m.event_id, m.flow_id, m.connection_id, m.url, m.direction, m.message_type, m.payload,
            m.payload_size, m.truncated, m.sequence, m.close_code, m.close_reason, m.source_ip, m.source_app,
            m.occurred_at
        FROM unnest(new_messages) AS m
        ON CONFLICT DO NOTHING
        RETURNING websocket_messages.node, websocket_messages.epoch, websocket_messages.seq
    ), attempts AS (
        INSERT INTO auth_attempts (
            auth_id, id, batch_id, node, epoch, seq, event_id, username, success, failure_reason, source_ip,
            occurred_at
        )
        SELECT
            a.auth_id, CASE WHEN a.posted_id > 0 THEN a.posted_id ELSE nextval('auth_ids') END, batch, a.node, a.epoch,
            a.seq, a.event_id, a.username, a.success, a.failure_reason, a.source_ip, a.occurred_at
        FROM unnest(new_auth) AS a
        ON CONFLICT DO NOTHING
        RETURNING auth_attempts.auth_id, auth_attempts.node, auth_attempts.epoch, auth_attempts.seq,
            auth_attempts.success
    ), failures AS (
        -- origin: 0 an error of its own, 1 a failed flow's projection, 2 a refused credential's.
        INSERT INTO errors (
            error_id, id, batch_id, node, epoch, seq, event_id, flow_id, error_type, error_message, stack_trace, url,
            source_ip, occurred_at
        )
        SELECT
            e.error_id, CASE WHEN e.posted_id > 0 THEN e.posted_id ELSE nextval('error_ids') END, batch, e.node,
            e.epoch, e.seq, e.event_id, e.flow_id, e.error_type, e.error_message, e.stack_trace, e.url, e.source_ip,
            e.occurred_at
        FROM unnest(new_errors) AS e
        WHERE e.origin = 0
            OR (e.origin = 1 AND e.error_id IN (SELECT c.flow_id FROM changed AS c WHERE c.rank = 3))
            OR (e.origin = 2 AND e.error_id IN (SELECT t.auth_id FROM attempts AS t))
        ON CONFLICT DO NOTHING
        RETURNING errors.node, errors.epoch, errors.seq, errors.error_type
    ), overcome AS (
        -- The flow had failed and has completed after all.
        DELETE FROM errors USING changed AS c
        WHERE errors.error_id = c.flow_id AND c.rank = 4 AND c.prev_rank = 3
        RETURNING errors.error_type
    ), grouped AS MATERIALIZED (
        SELECT c.method, c.protocol, count(*) FILTER (WHERE c.prev_rank = 0) AS fresh, count(*) AS rows,
               count(*) FILTER (WHERE c.rank = 4 AND c.status IS NOT NULL) AS responses,
               count(*) FILTER (WHERE c.rank = 4 AND c.response_time_us IS NOT NULL) AS timed,
               coalesce(sum(c.response_time_us) FILTER (WHERE c.rank = 4), 0) AS time_us
        FROM changed AS c GROUP BY c.method, c.protocol
    ), deltas (name, label, value) AS (
        SELECT 'requests', '', sum(g.fresh) FROM grouped AS g
        UNION ALL SELECT 'requests_by_method', g.method, g.rows FROM grouped AS g
        UNION ALL SELECT 'requests_by_protocol', g.protocol, g.rows FROM grouped AS g
        UNION ALL SELECT 'requests_by_method', coalesce((c.old).method, c.method), -1
            FROM changed AS c WHERE c.prev_rank > 0
        UNION ALL SELECT 'requests_by_protocol', coalesce((c.old).protocol, c.protocol), -1
            FROM changed AS c WHERE c.prev_rank > 0
        UNION ALL SELECT 'responses', '', sum(g.responses) FROM grouped AS g
        UNION ALL SELECT 'responses_timed', '', sum(g.timed) FROM grouped AS g
        UNION ALL SELECT 'response_time_us', '', sum(g.time_us) FROM grouped AS g
        UNION ALL SELECT 'websocket_messages', '', count(*) FROM messages
        UNION ALL SELECT 'errors', '', 1 FROM failures
        UNION ALL SELECT 'errors', '', -1 FROM overcome
        UNION ALL SELECT 'errors_by_type', f.error_type, 1 FROM failures AS f
        UNION ALL SELECT 'errors_by_type', o.error_type, -1 FROM overcome AS o
        UNION ALL SELECT 'auth_attempts', '', 1 FROM attempts
        UNION ALL SELECT 'auth_failures', '', 1 FROM attempts AS t WHERE NOT t.success
    ), counted AS (
        INSERT INTO counters AS k (name, label, shard, value)
        SELECT d.name, d.label, ingest.shard, sum(d.value) FROM deltas AS d
        GROUP BY d.name, d.label HAVING sum(d.value) <> 0 ORDER BY 1, 2
        ON CONFLICT ON CONSTRAINT counters_pkey DO UPDATE SET value = k.value + excluded.value
    ), terminals (node, epoch, seq, value) AS (
        SELECT c.node, c.epoch, c.seq, 1 FROM changed AS c WHERE c.seq > 0
        UNION ALL SELECT (c.old).node, (c.old).epoch, 0, -1 FROM changed AS c
            WHERE c.prev_rank > 0 AND (c.old).seq > 0
        UNION ALL SELECT m.node, m.epoch, m.seq, 1 FROM messages AS m WHERE m.seq > 0
        UNION ALL SELECT f.node, f.epoch, f.seq, 1 FROM failures AS f WHERE f.seq > 0
        UNION ALL SELECT t.node, t.epoch, t.seq, 1 FROM attempts AS t WHERE t.seq > 0
    ), accounted AS (
        INSERT INTO accounting AS a (node, epoch, kind, shard, value, max_seq)
        SELECT t.node, t.epoch, 'stored', ingest.shard, sum(t.value), max(t.seq) FROM terminals AS t
        GROUP BY t.node, t.epoch ORDER BY 1, 2
        ON CONFLICT ON CONSTRAINT accounting_pkey
        DO UPDATE SET value = a.value + excluded.value, max_seq = greatest(a.max_seq, excluded.max_seq)
    )
    SELECT (SELECT count(*) FROM changed), (SELECT count(*) FROM messages), (SELECT count(*) FROM failures),
           (SELECT count(*) FROM attempts),
           (SELECT count(*) FROM changed AS c WHERE c.prev_rank > 0 AND (c.old).rank IS DISTINCT FROM c.prev_rank)
    INTO flow_count, message_count, error_count, auth_count, overtaken;
    IF overtaken > 0 THEN
        -- Another worker's transaction committed the row as it was before while this statement waited for it, too late
        -- for this statement's snapshot: what the counters take off would be wrong. The next attempt sees it.
        RAISE EXCEPTION 'a flow was stored by another worker meanwhile' USING ERRCODE = 'serialization_failure';
    END IF;

    -- 5. Chunks wait for their flow's last record; one that comes again after its body was assembled is dropped.
    IF touched IS NOT NULL THEN
        INSERT INTO body_chunks (flow_id, side, index, data)
        SELECT c.flow_id, c.side, c.index, c.data FROM unnest(new_chunks) AS c
        WHERE NOT EXISTS (
            SELECT FROM flows AS f
            WHERE f.flow_id = c.flow_id AND f.rank = 4
                AND CASE c.side WHEN 0 THEN f.request_chunks ELSE f.response_chunks END IS NULL
        )
        ON CONFLICT DO NOTHING;
        DELETE FROM body_chunks AS c USING flows AS f  -- parked by an earlier delivery
        WHERE c.flow_id = ANY (touched) AND f.flow_id = c.flow_id AND f.rank = 4
            AND CASE c.side WHEN 0 THEN f.request_chunks ELSE f.response_chunks END IS NULL;
        SELECT array_agg(f.flow_id ORDER BY f.flow_id) INTO to_assemble
        FROM flows AS f
        WHERE f.flow_id = ANY (touched) AND (f.request_chunks > 0 OR f.response_chunks > 0);
    END IF;

    -- 6. Heartbeats: the latest wins.
    INSERT INTO nodes AS n (node, epoch, service, state, version, listen, config_version, config_stale, pinned,
                            counters, captured, seen_at, started_at, source_app, config_error)
    SELECT s.node, s.epoch, s.service, s.state, s.version, s.listen, s.config_version, s.config_stale,
           s.pinned::jsonb, s.counters::jsonb, s.captured, s.seen_at, s.started_at, s.source_app, s.config_error
    FROM unnest(new_nodes) AS s
    ON CONFLICT ON CONSTRAINT nodes_pkey DO UPDATE SET
        service = excluded.service, state = excluded.state, version = excluded.version, listen = excluded.listen,
        config_version = excluded.config_version, config_stale = excluded.config_stale, pinned = excluded.pinned,
        counters = excluded.counters, captured = excluded.captured, seen_at = excluded.seen_at,
        started_at = coalesce(excluded.started_at, n.started_at), source_app = excluded.source_app,
        config_error = excluded.config_error
    WHERE excluded.seen_at > n.seen_at;

    -- 7. New offsets.
    UPDATE ingest_offsets AS o
    SET "offset" = CASE WHEN p.rewound THEN p.next_offset ELSE greatest(o."offset", p.next_offset) END,
        last_event_id = CASE WHEN p.rewound OR p.next_offset >= o."offset" THEN p.last_event_id
                             ELSE o.last_event_id END
    FROM unnest(positions) AS p
    WHERE o.source_id = p.source_id AND o.topic = p.topic AND o.partition = p.partition;
END
$$;
