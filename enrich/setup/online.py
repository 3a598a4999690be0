"""Asks the API what is free to ask: whose key it is, what the waterfall is, what time it has."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from enrich.api.client import Client
from enrich.api.credentials import Access
from enrich.api.waterfall import User, Waterfall
from enrich.connect import patiently
from enrich.errors import JobError, JobRejected
from enrich.execution import Timing
from enrich.model import SystemClock


@dataclass(slots=True)
class _Watch(SystemClock):
    """Hears by how much the API's clock is ahead, however little."""

    ahead_ms: int | None = None

    def observe(self, api_ms: int) -> None:
        """Compare the clocks."""
        self.ahead_ms = api_ms - time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Live:
    """What the API says now. `ahead_s` is its clock before ours, None when it tells no time."""

    user: User
    waterfall: Waterfall
    ahead_s: float | None


def ask(access: Access, identifier: str, environ: Mapping[str, str] = os.environ) -> Live:
    """Ask about the account and a waterfall; nothing is paid. Raises JobError, ApiUnreachable, Unauthorized."""
    return asyncio.run(_ask(access, identifier, environ))


async def _ask(access: Access, identifier: str, environ: Mapping[str, str]) -> Live:
    clock = _Watch()
    at_most_s = Timing().start_s
    async with Client(access, clock, environ=environ) as client:
        try:
            user = await patiently(client.user, at_most_s)
        except JobRejected as error:
            raise JobError(f"DATABAR_BASE_URL: no Databar API answers there: {error.message}") from error
        try:
            waterfall = await patiently(lambda: client.waterfall(identifier), at_most_s)
        except JobRejected as error:
            raise JobError(f"waterfall: the API has no waterfall `{identifier}`", "enrich waterfalls") from error
    return Live(user, waterfall, None if clock.ahead_ms is None else clock.ahead_ms / 1000)
