"""Runs dispatcher and poller side by side, in one process or in each worker."""

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
    """Settings of dispatcher and poller; see there. `workers`: how many share the same queue."""

    call: Call
    budget: Budget
    bound_to: Mapping[str, str | None]
    bulk: int | None
    column_paths: tuple[str, ...]
    max_attempts: int
    patience_s: float
    workers: int = 1

    def make_poller(self, run_state: RunState, ledger_writer: LedgerWriter, client: Client) -> Poller:
        """Make the poller. Add the tasks that earlier runs left open to it before `submit_and_poll`."""
        return Poller(run_state, ledger_writer, client, self.column_paths, self.max_attempts, self.patience_s)

    async def submit_and_poll(self, poller: Poller, limit: int | None = None, *, only_new: bool = False) -> None:
        """Submit and poll until `limit` requests (None: all selected ones) were sent and settled."""
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
