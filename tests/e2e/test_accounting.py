"""Accounting of the running services, against the client's own ledger."""

from typing import Any

import pytest

from tests.e2e.stack import Stack
from tests.support.site import Site
from tests.support.waiting import until

pytestmark = pytest.mark.e2e


def settled(stack: Stack, captured: int = 0) -> dict[str, int]:
    """The totals, once everything is told of, drained and idle."""

    def exact() -> dict[str, Any]:
        total: dict[str, Any] = stack.get("/proxy/api/accounting/")[1]["total"]
        done = total["exact"] and not total["waiting"] and total["captured"] >= captured
        return total if done else {}

    return until(exact, "accounting is exact", seconds=60)


def test_every_request_of_a_client_is_accounted_for(stack: Stack, site: Site) -> None:
    before = settled(stack)
    answered = 0
    for number in range(12):
        where = f"http://localhost:{site.http_port}" if number % 2 else f"https://localhost:{site.https_port}"
        answered += stack.curl(f"{where}/api/data?accounted={number}").returncode == 0
    after = settled(stack, before["captured"] + answered)
    assert answered == 12
    assert {name: after[name] - before[name] for name in ("captured", "stored", "lost", "unexplained")} == {
        "captured": answered,
        "stored": answered,
        "lost": 0,
        "unexplained": 0,
    }
    assert len(stack.requests("accounted=")) == answered
