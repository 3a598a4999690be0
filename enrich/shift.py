"""Dispatcher and poller side by side: what is sent, and how it is judged, in one process or in each worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from enrich.api.client import Client
from enrich.budget import Budget
from enrich.dispatcher import Dispatcher
from enrich.execution import Execution
from enrich.model import Call
from enrich.poller import Poller
from enrich.store.journal import Journal


@dataclass(frozen=True, slots=True)
class Shift:
    """What dispatcher and poller need to know; see there. `workers`: so many work at the same queue."""

    call: Call
    budget: Budget
    bound_to: Mapping[str, str | None]
    bulk: int | None
    paths: tuple[str, ...]
    max_attempts: int
    patience_s: float
    workers: int = 1

    def poller(self, execution: Execution, journal: Journal, client: Client) -> Poller:
        """Make the poller, to whom tasks that were left at the API are given before the work."""
        return Poller(execution, journal, client, self.paths, self.max_attempts, self.patience_s)

    async def work(self, poller: Poller, limit: int | None = None, *, only_new: bool = False) -> None:
        """Submit and poll until `limit` requests were asked, or all that are wanted, and answered."""
        execution = poller.execution
        dispatcher = Dispatcher(
            execution,
            poller.journal,
            poller.client,
            self.call,
            self.budget,
            self.bound_to,
            poller.add,
            limit,
            only_new,
            self.bulk,
            self.workers,
            self.patience_s,
        )

        async def dispatch() -> None:
            try:
                await dispatcher.run()
            finally:
                poller.no_more = True
                execution.notify()

        await execution.until_leaving(dispatch(), poller.run())
