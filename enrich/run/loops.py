"""Dispatcher and poller side by side: what is sent, and how it is judged, in one process or in each worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from enrich.databar.client import Client
from enrich.ledger.writer import LedgerWriter
from enrich.models import Call
from enrich.run.budget import Budget
from enrich.run.dispatcher import Dispatcher
from enrich.run.poller import Poller
from enrich.run.state import RunState


@dataclass(frozen=True, slots=True)
class WorkConfig:
    """What dispatcher and poller need to know; see there. `workers`: so many work at the same queue."""

    call: Call
    budget: Budget
    bound_to: Mapping[str, str | None]
    bulk: int | None
    column_paths: tuple[str, ...]
    max_attempts: int
    patience_s: float
    workers: int = 1

    def make_poller(self, run_state: RunState, ledger_writer: LedgerWriter, client: Client) -> Poller:
        """Make the poller, to whom tasks that were left at the API are given before the work."""
        return Poller(run_state, ledger_writer, client, self.column_paths, self.max_attempts, self.patience_s)

    async def submit_and_poll(self, poller: Poller, limit: int | None = None, *, only_new: bool = False) -> None:
        """Submit and poll until `limit` requests were asked, or all that are wanted, and answered."""
        run_state = poller.run_state
        dispatcher = Dispatcher(
            run_state,
            poller.ledger_writer,
            poller.client,
            self.call,
            self.budget,
            self.bound_to,
            poller.add_task,
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
                poller.no_new_tasks = True
                run_state.notify_change()

        await run_state.run_until_abort(dispatch(), poller.run())
