"""Fetches the balance of the account in the course of a run."""

from __future__ import annotations

import asyncio

from enrich.errors import ApiCallFailed
from enrich.models import read_balance
from enrich.run.context import RunContext
from enrich.run.run_state import RunState

#: Seconds to wait for the balance. After that it is left out.
BALANCE_TIMEOUT_S = 5.0


async def fetch_balance(context: RunContext, run_state: RunState) -> int | None:
    """Fetch the balance. Returns None without a request when the run was stopped, or on failure."""
    if run_state.stop_polling.is_set() or context.signals.received is not None:
        return None
    try:
        async with asyncio.timeout(BALANCE_TIMEOUT_S):
            return read_balance((await context.client.get_user()).balance)
    except (ApiCallFailed, TimeoutError):
        return None
