"""How often each payload rule was applied: counted once a flow, however often and in whatever order it comes."""

from collections import Counter
from collections.abc import Sequence

import psycopg
from psycopg.rows import TupleRow

from megido_ingest.prepare import RuleHits
from megido_shared import ids

_NEW = """
UPDATE flows SET rules_counted = true WHERE flow_id = ANY (%s::uuid[]) AND rules_counted IS NOT TRUE RETURNING flow_id
"""
_ADD = """
UPDATE payload_rules AS r
SET hits = r.hits + h.count, last_hit_at = greatest(r.last_hit_at, 'epoch'::timestamptz + h.at * interval '1 us')
FROM (VALUES {values}) AS h (id, count, at) WHERE r.id = h.id;
"""
_LARGEST = (1 << 63) - 1


async def counted(connection: psycopg.AsyncConnection[TupleRow], hits: Sequence[RuleHits]) -> str:
    """Marks the flows of which the hits have not been counted before, and answers the SQL that adds these to the
    rules, "" for none: to be sent with the commit, because workers share the rows that it locks."""
    if not hits:
        return ""
    cursor = await connection.execute(_NEW, [[ids.to_uuid(hit.flow_id) for hit in hits]])
    new = {row[0].bytes for row in await cursor.fetchall()}
    counts: Counter[int] = Counter()
    latest: dict[int, int] = {}
    for hit in hits:
        if hit.flow_id in new:
            counts.update(hit.rules)
            latest |= {rule: max(hit.time_us, latest.get(rule, 0)) for rule in hit.rules}
    values = [
        f"({int(rule)}::bigint, {count}, {int(latest[rule])}::bigint)"
        for rule, count in sorted(counts.items())
        if 0 <= rule <= _LARGEST
    ]
    return _ADD.format(values=", ".join(values)) if values else ""
