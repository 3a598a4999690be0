"""Ends a run before its work is done: after a signal, at --max-time, or when the ledger cannot be written.

Nothing new is sent then, answers in flight are recorded, and ready results are fetched.
"""

from __future__ import annotations

import asyncio

from enrich.errors import EnrichError, Interrupted, LedgerFailed
from enrich.exit_codes import ExitCode
from enrich.run.context import RunContext
from enrich.run.run_state import RunState

#: Largest share of --max-time that is reserved for collecting submitted tasks.
COLLECT_TIME_SHARE = 0.2


def out_of_time_error() -> EnrichError:
    """Return the reason of a run that `--max-time` has ended."""
    return EnrichError("--max-time is reached", "the rest is pending; the next run resumes")


def interrupt(context: RunContext, run_state: RunState, code: ExitCode) -> None:
    """End the run after a signal: send no new POST, record answers to POSTs in flight, fetch ready results."""
    run_state.stop(code, Interrupted(code))
    context.ledger_writer.shorten_waits()
    _start_winding_down(context, run_state, run_state.timeouts.drain_posts_s)


def end_without_ledger(context: RunContext, run_state: RunState, error: LedgerFailed) -> None:
    """End the run when the ledger cannot be written: send nothing new; answers in flight go to the rescue file."""
    run_state.stop(error.exit_code, error)
    _start_winding_down(context, run_state, run_state.timeouts.post_s)


async def enforce_max_time(context: RunContext, run_state: RunState) -> None:
    """Stop submitting early enough to collect; abort when --max-time is reached and no POST is in flight."""
    max_time_s = context.options.max_time_s
    if max_time_s is None:
        return
    while (remaining_s := max_time_s - context.elapsed_s() - _collect_reserve_s(run_state, max_time_s)) > 0:
        await run_state.pause(min(remaining_s, 1.0), run_state.abort)
    run_state.out_of_time = True
    run_state.stop_submitting.set()
    run_state.notify_change()
    await asyncio.sleep(max_time_s - context.elapsed_s())
    context.ledger_writer.shorten_waits()
    # A slow POST that is cut off now would be unconfirmed.
    await run_state.wait_for_posts(run_state.timeouts.drain_posts_s)
    run_state.abort_now()
    context.ledger.shorten_waits()


def _collect_reserve_s(run_state: RunState, max_time_s: float) -> float:
    """Return how many seconds to reserve for collecting the running tasks."""
    return min(COLLECT_TIME_SHARE * max_time_s, max(10.0, 4 * run_state.poll_schedule.median_s))


def _start_winding_down(context: RunContext, run_state: RunState, drain_posts_s: float) -> None:
    async def wind_down() -> None:
        run_state.finish_polling()
        await run_state.wait_for_posts(drain_posts_s)
        await asyncio.sleep(run_state.timeouts.ready_results_s)
        run_state.abort_now()
        context.ledger.shorten_waits()

    run_state.early_ends.add(asyncio.create_task(wind_down()))
