"""Runs dispatcher and poller side by side, in one process or in each worker."""

from __future__ import annotations

from enrich.run.dispatcher import Dispatcher
from enrich.run.poller import Poller


async def submit_and_poll(poller: Poller, limit: int | None = None, *, only_new: bool = False) -> None:
    """Submit and poll until `limit` requests (None: all selected ones) were sent and settled.

    Add the tasks that earlier runs left open to the poller before.
    """
    run_state = poller.run_state
    dispatcher = Dispatcher(
        run_state, poller.ledger_writer, poller.client, poller.config, poller.add_task, limit, only_new
    )

    async def dispatch() -> None:
        try:
            await dispatcher.run()
        finally:
            poller.no_new_tasks = True
            run_state.notify_change()

    await run_state.run_until_abort(dispatch(), poller.run())
