-- Text search, filled by a background indexer that follows the feed: nothing of it is on the insert path. Additive:
-- workers of before go on beside it.

-- Trusted: who may create objects in the database may create it. Both Postgres that Megido starts have it, and so do
-- hosted ones.
CREATE EXTENSION IF NOT EXISTS pg_trgm;

-- What is searched in of each flow: short lines apart from long texts, whose index costs a hundred times as much to
-- fill, so that it never holds up the other. A row may be older than its flow, or still be missing: what the feed holds
-- past the cursor `line-index` has to be looked at in `flows` itself, and what it holds past `text-index` is not
-- searched in yet.
CREATE TABLE flow_lines (
    flow_id uuid NOT NULL PRIMARY KEY,
    line text NOT NULL            -- the URL, a line feed, the user agent
) PARTITION BY RANGE (flow_id);
CREATE INDEX flow_lines_line ON flow_lines USING gin (line gin_trgm_ops);

CREATE TABLE flow_text (
    flow_id uuid NOT NULL PRIMARY KEY,
    headers text NOT NULL,        -- "name: value", a line each, of the request and of the response
    request_body text,            -- megido_shared.bodytext; null without text
    response_body text,
    lossy boolean NOT NULL        -- a body's text is not the whole body, or not exactly it
) PARTITION BY RANGE (flow_id);
-- A larger list of what is pending makes filling faster; the indexer empties it whenever it has caught up.
CREATE INDEX flow_text_content ON flow_text
    USING gin (headers gin_trgm_ops, request_body gin_trgm_ops, response_body gin_trgm_ops)
    WITH (gin_pending_list_limit = 16384);

-- What few flows have, so that finding those few is no scan and storing the many costs nothing.
CREATE INDEX flows_source_app ON flows (source_app, flow_id) WHERE source_app <> '';
CREATE INDEX flows_error_type ON flows (error_type, flow_id) WHERE error_type IS NOT NULL;
CREATE INDEX flows_is_replay ON flows (flow_id) WHERE is_replay;
-- A few KB a million flows. Ids run with the time but for what is posted or imported with a time of its own.
CREATE INDEX flows_started_at ON flows USING brin (started_at) WITH (pages_per_range = 32, autosummarize = on);

-- As before, and with the partitions of flow_text.
CREATE OR REPLACE FUNCTION ensure_partitions(first date, last date) RETURNS integer
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
        FOREACH parent IN ARRAY ARRAY['flows', 'bodies', 'body_chunks', 'websocket_messages', 'errors', 'auth_attempts',
                                      'flow_lines', 'flow_text']
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

SELECT ensure_partitions(day, day)
FROM (
    SELECT to_date(right(inhrelid::regclass::text, 8), 'YYYYMMDD') AS day
    FROM pg_inherits WHERE inhparent = 'flows'::regclass
) AS days;
