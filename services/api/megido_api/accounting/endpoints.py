"""`/proxy/api/accounting/`."""

from typing import Any

from fastapi import APIRouter

from megido_api.accounting import queries
from megido_api.accounting.schemas import Accounting
from megido_api.parameters import ONLY_KNOWN
from megido_api.state import StateDep
from megido_shared.accounting import Balance, Spots
from megido_shared.clock import utc
from megido_shared.db.accounting import Account

router = APIRouter(prefix="/proxy/api/accounting", tags=["accounting"])


@router.get(
    "/",
    summary="What became of everything that was captured",
    response_model=Accounting,
    dependencies=ONLY_KNOWN,
)
async def get_accounting(state: StateDep) -> Any:
    """By node and in total, from the sequence numbers that nodes give their records."""
    found = await queries.current(state, utc(state.clock.time_us()))
    return {
        "balanced": found.balanced,
        "exact": found.exact,
        "total": _sums(found.total, exact=found.exact),
        "nodes": [_node(account) for account in found.nodes],
        "unattributed": _others(found.unattributed),
        "posted": {"waiting": found.outbox},
        "bus": found.bus,
    }


def _node(account: Account) -> dict[str, Any]:
    heartbeat = account.heartbeat
    return {
        "node": account.node,
        "epoch": str(account.epoch),
        "service": heartbeat.service if heartbeat else None,
        "state": heartbeat.state if heartbeat else None,
        "heartbeat_age": round(heartbeat.age_s, 3) if heartbeat else None,
        **_sums(account.balance, exact=account.exact),
        "others": _others(account.others),
    }


def _sums(balance: Balance, *, exact: bool) -> dict[str, Any]:
    return {
        "captured": balance.captured,
        "stored": balance.stored,
        "waiting": balance.waiting,
        "since_heartbeat": balance.since_heartbeat,
        "dead_lettered": balance.dead_lettered,
        "dropped": balance.dropped,
        "expired": balance.expired,
        "corrupt": balance.corrupt,
        "unexplained": balance.unexplained,
        "lost": balance.lost,
        "balanced": balance.unexplained == 0,
        "exact": exact,
    }


def _others(spots: Spots) -> dict[str, int]:
    return {"dead_lettered": spots.dead_lettered, "corrupt": spots.corrupt, "expired": spots.expired}
