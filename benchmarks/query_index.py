"""Indexing for bench-query: the rate of the real indexer on a sample, the rest by it too, its text indexes built after.

A text index that grows row by row costs about as much a row as one that is built, but only building uses both cores.
"""

import asyncio
import time
from dataclasses import dataclass

import psycopg
from prometheus_client import CollectorRegistry

from benchmarks.query_fill import BATCH
from benchmarks.report import say
from megido_ingest.indexer import IndexMetrics, TextIndexer
from megido_shared.db.connect import conninfo, create_engine

SAMPLE_BATCHES = 10


@dataclass(frozen=True, slots=True)
class Indexed:
    """Flows a second of the indexer with its indexes in place, and seconds that the rest and the building took."""

    per_s: float
    text_s: float
    build_s: float


def index(url: str, texts: int = 0) -> Indexed:
    """Takes in everything that the feed holds; of headers and bodies the oldest `texts` flows' only, unless 0."""
    indexer = TextIndexer(url, IndexMetrics(CollectorRegistry()))
    with psycopg.connect(conninfo(url), autocommit=True) as connection:
        begun = time.perf_counter()
        asyncio.run(_rounds(indexer, url, SAMPLE_BATCHES))
        sample_s = time.perf_counter() - begun
        taken = connection.execute("SELECT count(*) FROM flow_text").fetchone()
        assert taken is not None
        say(f"text index: {taken[0] / sample_s:,.0f} flows/s with the indexes in place")
        made = connection.execute(
            "SELECT indexname, indexdef FROM pg_indexes WHERE indexname IN ('flow_lines_line', 'flow_text_content')"
        ).fetchall()
        for name, _ in made:
            connection.execute(f"DROP INDEX {name}")
        begun = time.perf_counter()
        asyncio.run(_rounds(indexer, url, max(0, texts // BATCH - SAMPLE_BATCHES) if texts else None))
        text_s = time.perf_counter() - begun
        say(f"the rest: {text_s:.0f} s; building the indexes")
        begun = time.perf_counter()
        connection.execute("SET maintenance_work_mem = '512MB'")
        for _, definition in made:
            connection.execute(definition.replace(" ON ONLY ", " ON "))
        build_s = time.perf_counter() - begun
        say(f"built in {build_s:.0f} s; vacuum")
        connection.execute("VACUUM ANALYZE flows, flow_text, rollups, bodies")
    return Indexed(taken[0] / sample_s, text_s, build_s)


async def _rounds(indexer: TextIndexer, url: str, rounds: int | None) -> None:
    engine = create_engine(url, pool_size=1)
    done = 0
    try:
        while (rounds is None or done < rounds) and await indexer.texts(engine):
            done += 1
            if done % 50 == 0:
                say(f"text: {done} batches")
        while rounds != SAMPLE_BATCHES and await indexer.lines(engine):
            pass
    finally:
        await engine.dispose()
