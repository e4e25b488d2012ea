-- Retention: what is kept for how long, what stays all the same, and what was removed when and for whom.

CREATE TABLE flow_pins (
    flow_id uuid NOT NULL PRIMARY KEY,
    pinned_by text NOT NULL,
    pinned_at timestamptz NOT NULL
);

-- One row, made by the first change. 0 is no limit.
CREATE TABLE retention_policy (
    only_row boolean NOT NULL PRIMARY KEY CHECK (only_row),
    days integer NOT NULL,
    max_bytes bigint NOT NULL,
    log_days integer NOT NULL,
    log_max_bytes bigint NOT NULL,
    every_minutes integer NOT NULL,
    changed_by text NOT NULL,
    changed_at timestamptz NOT NULL
);

-- Append-only.
CREATE TABLE retention_changes (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    changes jsonb NOT NULL,
    changed_by text NOT NULL,
    changed_at timestamptz NOT NULL
);

-- Every run that somebody asked for, and every scheduled one that removed something or failed.
CREATE TABLE retention_runs (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    state text COLLATE "C" NOT NULL,
    dry_run boolean NOT NULL,
    requested_by text NOT NULL,
    requested_at timestamptz NOT NULL,
    finished_at timestamptz,
    report jsonb NOT NULL,
    error text NOT NULL
);
CREATE INDEX retention_runs_open ON retention_runs (id) WHERE state IN ('queued', 'running');

-- The partitions of the event tables with their day, and which rows of each stay (`kept`): those of pinned flows and of
-- flows that are still open, and of the bodies those that they name. Of these, `pinned` are those that stay because a
-- flow is pinned. What an open flow becomes later would count as another request if its row had gone; the leader ends
-- those whose node is dead. A table that is added with one of these columns is covered.
CREATE FUNCTION day_leaves() RETURNS TABLE (day date, parent name, leaf name, leaf_id oid, kept text, pinned text)
LANGUAGE sql STABLE
AS $$
    WITH leaves AS (
        SELECT to_date(right(c.relname, 8), 'YYYYMMDD') AS day, p.relname AS parent, c.relname AS leaf, c.oid AS leaf_id,
            (SELECT array_agg(attname::text) FROM pg_attribute
             WHERE attrelid = p.oid AND attnum > 0 AND NOT attisdropped) AS names
        FROM pg_inherits AS i
        JOIN pg_class AS c ON c.oid = i.inhrelid
        JOIN pg_class AS p ON p.oid = i.inhparent
        WHERE p.relkind = 'p' AND c.relkind = 'r' AND pg_table_is_visible(c.oid)
            AND c.relname = p.relname || '_' || right(c.relname, 8) AND right(c.relname, 8) ~ '^\d{8}$'
    ),
    ranges AS (
        SELECT l.*, format('f.flow_id >= day_floor(%L) AND f.flow_id < day_floor(%L)', l.day, l.day + 1) AS of_day,
            't.flow_id IN (SELECT k.flow_id FROM flow_pins AS k)' AS by_flow,
            't.sha256 IN (SELECT unnest(ARRAY[f.request_body_key, f.response_body_key]) FROM flows AS f' AS by_body
        FROM leaves AS l
    )
    SELECT r.day, r.parent, r.leaf, r.leaf_id,
        CASE
            WHEN r.parent = 'flows' THEN format('(t.rank = 1 OR %s)', r.by_flow)
            WHEN r.parent = 'body_chunks' THEN
                format('(%s OR t.flow_id IN (SELECT f.flow_id FROM flows AS f WHERE f.rank = 1 AND %s))',
                       r.by_flow, r.of_day)
            WHEN r.names @> '{flow_id}' THEN r.by_flow
            WHEN r.names @> '{day,sha256}' THEN
                format('%s LEFT JOIN flow_pins AS k USING (flow_id) WHERE (f.rank = 1 OR k.flow_id IS NOT NULL) AND %s)',
                       r.by_body, r.of_day)
            ELSE 'false'
        END,
        CASE
            WHEN r.names @> '{flow_id}' THEN r.by_flow
            WHEN r.names @> '{day,sha256}' THEN
                format('%s JOIN flow_pins AS k USING (flow_id) WHERE %s)', r.by_body, r.of_day)
            ELSE 'false'
        END
    FROM ranges AS r
    ORDER BY 1, 2
$$;

-- Locks a partition against everybody, waiting no longer than until `deadline` (1 ms once that is past). `lock_timeout`
-- alone is for each lock anew: who wants the first of several would wait for all of them.
CREATE FUNCTION lock_leaf(leaf name, deadline timestamptz) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    PERFORM set_config('lock_timeout', greatest(1, ceil(extract(epoch FROM deadline - clock_timestamp()) * 1000))::text,
                       true);
    EXECUTE format('LOCK TABLE %I IN ACCESS EXCLUSIVE MODE', leaf);
END
$$;

-- Removes a day's rows, but for those that stay, and notes it in the run: all of it or nothing. Called on its own, so
-- that its locks are never held by a stopped client. They are the partitions' alone: an attempt waits for all of them
-- together 200 ms at most, and then ends, to be made again. Who reads or writes the day meanwhile waits for that and for
-- the work, which follows without another wait. What is put back counts in no rollup: their triggers stand on the
-- parents, and it is put into the partition.
CREATE FUNCTION retire_day(retired date, run bigint, noted jsonb) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT SET lock_timeout = '200ms'
AS $$
DECLARE
    deadline CONSTANT timestamptz := clock_timestamp() + interval '200 ms';
    one record;
    filled boolean;
BEGIN
    IF retired >= (now() AT TIME ZONE 'UTC')::date - 1 THEN
        RAISE EXCEPTION 'retire_day: % is not over for long enough', retired;
    END IF;
    -- Who pins a flow has done so before, or waits and finds it gone.
    LOCK TABLE flow_pins IN SHARE MODE;
    FOR one IN SELECT l.leaf FROM day_leaves() AS l WHERE l.day = retired LOOP
        PERFORM lock_leaf(one.leaf, deadline);
    END LOOP;
    PERFORM set_config('lock_timeout', '1ms', true);
    FOR one IN SELECT l.* FROM day_leaves() AS l WHERE l.day = retired LOOP
        EXECUTE format('SELECT EXISTS (SELECT FROM %I AS t WHERE %s)', one.leaf, one.kept) INTO filled;
        IF filled THEN
            EXECUTE format('CREATE TEMPORARY TABLE %I ON COMMIT DROP AS SELECT t.* FROM %I AS t WHERE %s',
                           'kept_' || one.leaf, one.leaf, one.kept);
        END IF;
    END LOOP;
    FOR one IN SELECT l.* FROM day_leaves() AS l WHERE l.day = retired LOOP
        EXECUTE format('TRUNCATE %I', one.leaf);
        IF to_regclass(format('pg_temp.%I', 'kept_' || one.leaf)) IS NOT NULL THEN
            EXECUTE format('INSERT INTO %I SELECT * FROM %I', one.leaf, 'kept_' || one.leaf);
        END IF;
    END LOOP;
    UPDATE retention_runs SET report = jsonb_set(report, '{days}', report -> 'days' || noted) WHERE id = run;
END
$$;

-- Drops a day's partitions when all are empty; answers whether it did. The parents are locked in the order of every
-- other statement (parent, then partition), and none of them is waited for while others are held: what somebody uses
-- ends the attempt.
CREATE FUNCTION drop_empty_day(dropped date) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT SET lock_timeout = '100ms'
AS $$
DECLARE
    one record;
    filled boolean;
BEGIN
    IF dropped >= (now() AT TIME ZONE 'UTC')::date - 1 THEN
        RETURN false;
    END IF;
    FOR one IN SELECT l.* FROM day_leaves() AS l WHERE l.day = dropped LOOP
        EXECUTE format('SELECT EXISTS (SELECT FROM %I)', one.leaf) INTO filled;
        IF filled THEN
            RETURN false;
        END IF;
    END LOOP;
    PERFORM pg_advisory_xact_lock(hashtext('megido.partitions'));
    FOR one IN SELECT l.* FROM day_leaves() AS l WHERE l.day = dropped LOOP
        EXECUTE format('LOCK TABLE ONLY %I IN ACCESS EXCLUSIVE MODE NOWAIT', one.parent);
        EXECUTE format('LOCK TABLE %I IN ACCESS EXCLUSIVE MODE NOWAIT', one.leaf);
        EXECUTE format('SELECT EXISTS (SELECT FROM %I)', one.leaf) INTO filled;
        IF filled THEN
            RAISE EXCEPTION 'drop_empty_day: rows of % came meanwhile', dropped USING ERRCODE = 'lock_not_available';
        END IF;
        EXECUTE format('DROP TABLE %I', one.leaf);
    END LOOP;
    RETURN true;
END
$$;

-- They take away: only the owner, and whom the operator grants it.
REVOKE EXECUTE ON FUNCTION retire_day(date, bigint, jsonb), drop_empty_day(date), lock_leaf(name, timestamptz) FROM PUBLIC;
