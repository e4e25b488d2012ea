-- Statistics by time, kept as flows are stored, so that a dashboard does not scan.
--
-- Statement triggers see exactly the rows that a transaction adds or raises, with what they held before: a delivery
-- that changes no row changes no rollup, and a rollup is committed with its rows or not at all. They stand on the
-- partitioned parents only, so what retention does to a partition (drop, truncate, put pinned rows back) counts nothing:
-- what was counted stays counted. A worker counts in its own shard; readers sum.

CREATE TABLE rollups (
    minutes smallint NOT NULL,               -- the bucket's width: 1, 60 or 1440
    name text COLLATE "C" NOT NULL,
    bucket timestamptz NOT NULL,             -- its beginning, UTC
    label text COLLATE "C" NOT NULL,
    shard integer NOT NULL,
    value bigint NOT NULL,
    PRIMARY KEY (minutes, name, bucket, label, shard)
) WITH (fillfactor = 70);

-- The number of the latency histogram's bin: four to a doubling (megido_shared.db.rollups.time_us is its inverse).
CREATE FUNCTION latency_bin(us bigint) RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE STRICT
RETURN floor(4 * ln(greatest(us, 1)::float8) / ln(2::float8))::integer;

-- A statement that adds rows of (at timestamptz, name text, label text, value bigint) to all three widths.
CREATE FUNCTION rollup_statement(rows text, shard integer) RETURNS text
LANGUAGE sql IMMUTABLE
RETURN format($sql$
    WITH counted AS MATERIALIZED (%s)
    INSERT INTO rollups AS r (minutes, name, bucket, label, shard, value)
    SELECT w.minutes, c.name, date_bin(make_interval(mins => w.minutes), c.at, 'epoch'), c.label, %s, sum(c.value)
    FROM counted AS c CROSS JOIN (VALUES (1::smallint), (60::smallint), (1440::smallint)) AS w (minutes)
    GROUP BY 1, 2, 3, 4 HAVING sum(c.value) <> 0 ORDER BY 1, 2, 3, 4
    ON CONFLICT ON CONSTRAINT rollups_pkey DO UPDATE SET value = r.value + excluded.value
$sql$, rows, shard);

-- What flows count for, from a relation with their columns and a sign (1 added, -1 taken off).
CREATE FUNCTION rollup_of_flows(signed text) RETURNS text
LANGUAGE sql IMMUTABLE
RETURN format($sql$
    SELECT g.at, n.name, n.label, n.value
    FROM (
        SELECT date_bin('1 minute', s.started_at, 'epoch') AS at, s.method, s.protocol, s.host, s.status,
               CASE WHEN s.rank = 3 THEN s.error_type END AS error, latency_bin(s.response_time_us) AS bin,
               grouping(s.method) AS m, grouping(s.protocol) AS p, grouping(s.host) AS h, grouping(s.status) AS c,
               grouping(CASE WHEN s.rank = 3 THEN s.error_type END) AS e,
               grouping(latency_bin(s.response_time_us)) AS b,
               sum(s.sign) AS flows,
               sum(s.sign) FILTER (WHERE s.rank = 4 AND s.status IS NOT NULL) AS responses,
               sum(s.sign) FILTER (WHERE s.rank = 4 AND s.response_time_us IS NOT NULL) AS timed,
               sum(s.sign * s.response_time_us) FILTER (WHERE s.rank = 4) AS time_us,
               sum(s.sign * s.request_size) AS request_bytes,
               sum(s.sign * s.response_size) AS response_bytes
        FROM (%s) AS s
        GROUP BY GROUPING SETS (
            (date_bin('1 minute', s.started_at, 'epoch')),
            (date_bin('1 minute', s.started_at, 'epoch'), s.method),
            (date_bin('1 minute', s.started_at, 'epoch'), s.protocol),
            (date_bin('1 minute', s.started_at, 'epoch'), s.host),
            (date_bin('1 minute', s.started_at, 'epoch'), s.status),
            (date_bin('1 minute', s.started_at, 'epoch'), CASE WHEN s.rank = 3 THEN s.error_type END),
            (date_bin('1 minute', s.started_at, 'epoch'), latency_bin(s.response_time_us))
        )
    ) AS g
    CROSS JOIN LATERAL (
        SELECT 'requests' AS name, '' AS label, g.flows AS value WHERE g.m + g.p + g.h + g.c + g.e + g.b = 6
        UNION ALL SELECT 'responses', '', g.responses WHERE g.m + g.p + g.h + g.c + g.e + g.b = 6
        UNION ALL SELECT 'responses_timed', '', g.timed WHERE g.m + g.p + g.h + g.c + g.e + g.b = 6
        UNION ALL SELECT 'response_time_us', '', g.time_us WHERE g.m + g.p + g.h + g.c + g.e + g.b = 6
        UNION ALL SELECT 'request_bytes', '', g.request_bytes WHERE g.m + g.p + g.h + g.c + g.e + g.b = 6
        UNION ALL SELECT 'response_bytes', '', g.response_bytes WHERE g.m + g.p + g.h + g.c + g.e + g.b = 6
        UNION ALL SELECT 'method', g.method, g.flows WHERE g.m = 0
        UNION ALL SELECT 'protocol', g.protocol, g.flows WHERE g.p = 0
        UNION ALL SELECT 'host', g.host, g.flows WHERE g.h = 0
        UNION ALL SELECT 'status', g.status::text, g.flows WHERE g.c = 0 AND g.status IS NOT NULL
        UNION ALL SELECT 'error', g.error, g.flows WHERE g.e = 0 AND g.error IS NOT NULL
        -- The times of completed flows only.
        UNION ALL SELECT 'latency', g.bin::text, g.timed WHERE g.b = 0 AND g.bin IS NOT NULL
    ) AS n
    WHERE n.value <> 0
$sql$, signed);

CREATE FUNCTION rollup_shard() RETURNS integer
LANGUAGE sql STABLE
RETURN coalesce(nullif(current_setting('megido.shard', true), '')::integer, -1);

CREATE FUNCTION roll_up_flows() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF EXISTS (SELECT FROM added) THEN
            EXECUTE rollup_statement(rollup_of_flows('SELECT 1 AS sign, a.* FROM added AS a'), rollup_shard());
        END IF;
    ELSIF EXISTS (SELECT FROM added) THEN
        EXECUTE rollup_statement(
            rollup_of_flows('SELECT 1 AS sign, a.* FROM added AS a UNION ALL SELECT -1, b.* FROM removed AS b'),
            rollup_shard());
    END IF;
    RETURN NULL;
END
$$;

-- The other tables only ever gain rows that count. An error that is a failed flow's projection (it has the flow's id)
-- is counted with the flow.
CREATE FUNCTION roll_up_others() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    IF EXISTS (SELECT FROM added) THEN
        EXECUTE rollup_statement(
            CASE TG_TABLE_NAME
                WHEN 'websocket_messages' THEN
                    'SELECT occurred_at AS at, ''messages'' AS name, '''' AS label, 1 AS value FROM added'
                WHEN 'errors' THEN
                    'SELECT occurred_at AS at, ''error'' AS name, error_type AS label, 1 AS value FROM added'
                    ' WHERE flow_id IS DISTINCT FROM error_id'
                ELSE
                    'SELECT occurred_at AS at, ''auth_failures'' AS name, '''' AS label, 1 AS value FROM added'
                    ' WHERE NOT success'
            END, rollup_shard());
    END IF;
    RETURN NULL;
END
$$;

-- Writers wait from here on (and try again): what they add next is counted by the triggers, what is there below.
CREATE TRIGGER flows_rollup_insert AFTER INSERT ON flows
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION roll_up_flows();
CREATE TRIGGER flows_rollup_update AFTER UPDATE ON flows
    REFERENCING NEW TABLE AS added OLD TABLE AS removed FOR EACH STATEMENT EXECUTE FUNCTION roll_up_flows();
CREATE TRIGGER messages_rollup AFTER INSERT ON websocket_messages
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION roll_up_others();
CREATE TRIGGER errors_rollup AFTER INSERT ON errors
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION roll_up_others();
CREATE TRIGGER auth_rollup AFTER INSERT ON auth_attempts
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION roll_up_others();

DO $$
BEGIN
    EXECUTE rollup_statement(rollup_of_flows('SELECT 1 AS sign, f.* FROM flows AS f'), -1);
    EXECUTE rollup_statement($q$
        SELECT occurred_at AS at, 'messages' AS name, '' AS label, 1 AS value FROM websocket_messages
        UNION ALL SELECT occurred_at, 'error', error_type, 1 FROM errors WHERE flow_id IS DISTINCT FROM error_id
        UNION ALL SELECT occurred_at, 'auth_failures', '', 1 FROM auth_attempts WHERE NOT success
    $q$, -1);
END
$$;
