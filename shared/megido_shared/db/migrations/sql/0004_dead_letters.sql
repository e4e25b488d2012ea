-- Dead letters that are put through ingest again, or discarded. Additive: workers of before go on beside it (what they
-- store of a redrive stays `queued`, and is settled when it is put through again).

ALTER TABLE dead_letters
    ADD attempts integer NOT NULL DEFAULT 0,
    ADD changed_by text NOT NULL DEFAULT '',
    ADD changed_at timestamptz;

-- A record that came once more through the bus, under the place where it was found first. node to counted are what
-- accounting has it under as a dead letter.
CREATE TYPE ingest_redrive AS (
    source_id text, topic text, partition integer, "offset" bigint, attempt integer, stored boolean, event_type text,
    reason text, key bytea, value bytea, node text, epoch uuid, seq bigint, counted boolean
);

-- In the transaction that stored a batch: what became of the redriven records in it. One that is stored now leaves the
-- dead letters, once, whatever is delivered again; `ingest` has counted it as stored if it was new. One that is refused
-- again goes back to its row, unless a later attempt is on its way. Here too a letter may be new: in a database that
-- was made anew, the bus may have the redrive and no longer the first delivery.
CREATE FUNCTION settle_redrives(shard integer, redrives ingest_redrive[], OUT stored_count bigint, OUT refused_count bigint)
LANGUAGE plpgsql
AS $$
BEGIN
    WITH wanted AS (
        SELECT DISTINCT ON (r.source_id, r.topic, r.partition, r."offset") r.*
        FROM unnest(redrives) AS r WHERE r.stored
        ORDER BY r.source_id, r.topic, r.partition, r."offset"
    ), settled AS (
        UPDATE dead_letters AS d SET state = 'redriven', changed_at = now()
        FROM wanted AS w
        WHERE d.source_id = w.source_id AND d.topic = w.topic AND d.partition = w.partition AND d."offset" = w."offset"
            AND d.state <> 'redriven'
        RETURNING w.node, w.epoch, w.seq, w.counted
    ), accounted AS (
        INSERT INTO accounting AS a (node, epoch, kind, shard, value, max_seq)
        SELECT s.node, s.epoch, 'dead_lettered', settle_redrives.shard, -count(*), max(s.seq)
        FROM settled AS s WHERE s.counted GROUP BY s.node, s.epoch ORDER BY 1, 2
        ON CONFLICT ON CONSTRAINT accounting_pkey
        DO UPDATE SET value = a.value + excluded.value, max_seq = greatest(a.max_seq, excluded.max_seq)
    )
    SELECT count(*) INTO stored_count FROM settled;

    WITH wanted AS (
        SELECT DISTINCT ON (r.source_id, r.topic, r.partition, r."offset") r.*
        FROM unnest(redrives) AS r WHERE NOT r.stored
        ORDER BY r.source_id, r.topic, r.partition, r."offset", r.attempt DESC
    ), refused AS (
        INSERT INTO dead_letters AS d (source_id, topic, partition, "offset", event_type, reason, key, value, state,
                                       created_at, attempts)
        SELECT w.source_id, w.topic, w.partition, w."offset", w.event_type, w.reason, w.key, w.value, 'new', now(),
               w.attempt
        FROM wanted AS w
        ON CONFLICT (source_id, topic, partition, "offset") DO UPDATE
        SET state = 'new', event_type = excluded.event_type, reason = excluded.reason, changed_at = now()
        WHERE d.state = 'queued' AND d.attempts = excluded.attempts
        RETURNING d.source_id, d.topic, d.partition, d."offset", d.changed_at IS NULL AS fresh
    ), told AS (
        SELECT w.*, r.fresh FROM wanted AS w JOIN refused AS r USING (source_id, topic, partition, "offset")
    ), copied AS (
        INSERT INTO outbox (topic, key, value, headers, created_at)
        SELECT 'megido.dead-letters',
               convert_to(t.topic || '/' || t.partition || '/' || t."offset", 'UTF8'), t.value,
               jsonb_build_object('megido_reason', t.reason, 'megido_type', t.event_type,
                                  'megido_source', t.source_id, 'megido_topic', t.topic,
                                  'megido_partition', t.partition::text, 'megido_offset', t."offset"::text,
                                  'megido_attempt', t.attempt::text),
               now()
        FROM told AS t
    ), accounted AS (
        INSERT INTO accounting AS a (node, epoch, kind, shard, value, max_seq)
        SELECT t.node, t.epoch, 'dead_lettered', settle_redrives.shard, count(*), max(t.seq)
        FROM told AS t WHERE t.fresh AND t.counted GROUP BY t.node, t.epoch ORDER BY 1, 2
        ON CONFLICT ON CONSTRAINT accounting_pkey
        DO UPDATE SET value = a.value + excluded.value, max_seq = greatest(a.max_seq, excluded.max_seq)
    )
    SELECT count(*) INTO refused_count FROM told;
    IF refused_count > 0 THEN
        PERFORM pg_notify('megido_outbox', '');
    END IF;
END
$$;
