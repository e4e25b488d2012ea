"""Accounting's figures, from Postgres and the bus."""

from datetime import datetime

from megido_api.state import State
from megido_shared.db.accounting import Accounts, look

READ_BYTES = 256 << 20
"""Of journals that are counted record by record for one answer, a second's work; what waits beyond is inferred."""


async def current(state: State, now: datetime) -> Accounts:
    """Raises Problem (503) when Postgres is away."""
    return await look(state.database.read, state.bus, now, read_bytes=READ_BYTES)
