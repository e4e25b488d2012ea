"""kill -9 of one of several workers under load: the others serve on, and what a client completed is in the journals.

MEGIDO_KILLS (3) sets the number of kills, MEGIDO_SEED the seed.
"""

import asyncio
import os
import random
import signal
import time
from pathlib import Path

import pytest
import trustme

from tests.faults.balance import SEED
from tests.faults.test_capture_kill import KILLS, Over, check, loaded
from tests.integration.capture.harness import read_events, start
from tests.integration.capture.test_workers import all_serve, workers


@pytest.mark.timeout(120 + 20 * KILLS)
@pytest.mark.parametrize("over", ["http", "h2"])
async def test_a_killed_worker_loses_nothing_that_a_client_completed(tmp_path: Path, over: Over) -> None:
    print(f"seed {SEED}, {KILLS} kills")
    rng = random.Random(SEED)
    data_dir, authority = tmp_path / "data", trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "upstream.pem"))
    options = ("--workers", "2", "--set", f"ssl_verify_upstream_trusted_ca={tmp_path / 'upstream.pem'}")
    proxy = await asyncio.to_thread(start, data_dir, *options)
    async with loaded(over, authority, proxy) as load:
        completed = load.ledger.completed
        for _ in range(KILLS):
            await served(completed, 100)
            victim = rng.choice(workers(proxy))
            os.kill(victim, signal.SIGKILL)
            began = time.monotonic()
            await served(completed, 20)  # by the one that is left, as long as it is
            await all_serve(proxy)
            print(f"both serve after {time.monotonic() - began:.1f} s, {len(completed)} completed")
            assert victim not in workers(proxy)
    assert await asyncio.to_thread(proxy.stop) == 0
    found = await read_events(data_dir)
    check(over, load.ledger, found)
    assert {event.node for event in found} == {"capture-0", "capture-1"}


async def served(completed: dict[str, int], more: int) -> None:
    before, deadline = len(completed), time.monotonic() + 30
    while len(completed) < before + more:
        assert time.monotonic() < deadline, "nobody is served"
        await asyncio.sleep(0.02)
