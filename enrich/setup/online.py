"""Asks the API what is free to ask: whose key it is, what the waterfall is, what time it has."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from enrich.connect import retry_until
from enrich.databar.client import Client
from enrich.databar.credentials import ApiAccess
from enrich.databar.waterfall import User, Waterfall
from enrich.errors import JobError, JobRejected
from enrich.execution import Timeouts
from enrich.model import SystemClock


@dataclass(slots=True)
class _ClockOffsetProbe(SystemClock):
    """Hears by how much the API's clock is ahead, however little."""

    api_ahead_ms: int | None = None

    def observe(self, api_ms: int) -> None:
        """Compare the clocks."""
        self.api_ahead_ms = api_ms - time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class ApiSnapshot:
    """What the API says now. `ahead_s` is its clock before ours, None when it tells no time."""

    user: User
    waterfall: Waterfall
    clock_ahead_s: float | None


def query_api(access: ApiAccess, identifier: str, environ: Mapping[str, str] = os.environ) -> ApiSnapshot:
    """Ask about the account and a waterfall; nothing is paid. Raises JobError, ApiUnreachable, Unauthorized."""
    return asyncio.run(_query_api(access, identifier, environ))


async def _query_api(access: ApiAccess, identifier: str, environ: Mapping[str, str]) -> ApiSnapshot:
    clock = _ClockOffsetProbe()
    timeout_s = Timeouts().startup_s
    async with Client(access, clock, environ=environ) as client:
        try:
            user = await retry_until(client.get_user, timeout_s)
        except JobRejected as error:
            raise JobError(f"DATABAR_BASE_URL: no Databar API answers there: {error.message}") from error
        try:
            waterfall = await retry_until(lambda: client.get_waterfall(identifier), timeout_s)
        except JobRejected as error:
            raise JobError(f"waterfall: the API has no waterfall `{identifier}`", "enrich waterfalls") from error
    return ApiSnapshot(user, waterfall, None if clock.api_ahead_ms is None else clock.api_ahead_ms / 1000)
