"""Closes a run: completes its summary, and records its end in the ledger."""

from __future__ import annotations

from itertools import takewhile
from json import JSONDecodeError
from typing import Any

from msgspec.structs import replace

from enrich.errors import CommandRefused, EnrichError, JobError, LedgerDamaged
from enrich.exit_codes import ExitCode
from enrich.ledger import queries, records, resume, step_results
from enrich.ledger.database import Database
from enrich.ledger.sqlite_errors import damaged_ledger_error
from enrich.ledger.verify import as_enrich_error
from enrich.models import State, format_credits, pluralize, to_credits
from enrich.rows.requests import left_out_by_param
from enrich.run.background import save_latencies, start_phase
from enrich.run.balance import ROUNDING_CREDITS, explain_balance
from enrich.run.budget import Cost
from enrich.run.context import RunContext, RunFiles
from enrich.run.enrolling import INPUT_CHANGED, input_versions
from enrich.run.output import Outcome
from enrich.run.phases import fetch_balance
from enrich.run.progress import Phase
from enrich.run.provider_stats import ProviderStats, ProviderTotals, count_kinds, read_descriptions
from enrich.run.run_state import RunState
from enrich.run.signals import SignalHandler
from enrich.run.summary import RunSummary, cost_per_lead, summarize_steps

#: After a signal, the answers of a run are read again only up to this many, so that the exit is quick.
MAX_READ_WHEN_INTERRUPTED = 100_000


async def finish_failed_run(
    context: RunContext, run_state: RunState, failure: EnrichError | JSONDecodeError, files: RunFiles | None = None
) -> RunSummary:
    """Finish a run that a failure ended after its start. No more files are written.

    `files` has the input, if the failure may be that it changed and can no longer be read.
    """
    ledger = context.job.ledger
    reason = as_enrich_error(failure, ledger) or damaged_ledger_error(ledger)
    code = reason.exit_code
    # Exit codes 2 and 5 promise that nothing was spent.
    if files is not None and await _failed_by_changed_input(run_state, files, reason):
        code, reason = ExitCode.API, EnrichError(f"{INPUT_CHANGED}: {reason.message}", reason.hint)
    elif code is ExitCode.REFUSED and run_state.counters.submitted:
        code = ExitCode.BUG
    run_state.exit_reasons.setdefault(code, reason)
    await start_phase(context, run_state, Phase.COLLECT)
    return await finish_run(context, run_state, Outcome(run_state.exit_code({})))


async def _failed_by_changed_input(run_state: RunState, files: RunFiles, reason: EnrichError) -> bool:
    """Return whether a run with requests or answers failed because its input has changed since it was enrolled."""
    if not isinstance(reason, JobError | CommandRefused) or isinstance(reason, LedgerDamaged):
        return False
    if not run_state.enrolled or not (run_state.counters.attempted_requests or run_state.counters.settled):
        return False
    return await input_versions(files) != run_state.file_versions


async def finish_run(context: RunContext, run_state: RunState, outcome: Outcome) -> RunSummary:
    """Complete the run summary, and record the end of the run with it."""
    await save_latencies(context, run_state)
    if cached := run_state.counters.cached:
        answers = pluralize(cached, "answer")
        run_state.add_note(f"{answers} came from the API's cache (a known task id) and charged once")
    execution_id, counters = run_state.execution_id, run_state.counters
    await context.ledger_writer.submit(resume.recover, run_state.clock.now_ms())
    totals = await context.ledger_writer.submit(records.read_execution, execution_id)
    before = context.preflight.balance
    after = await fetch_balance(context, run_state) if counters.settled or counters.attempted_requests else before
    spent, matches = totals.spent, counters.settled.get(State.FOUND, 0)
    reason, enrolled = run_state.exit_reasons.get(outcome.code), run_state.enrolled_in_all
    summary = RunSummary(
        job=context.job.name,
        exit_code=int(outcome.code),
        execution=execution_id,
        rows=None if enrolled is None else run_state.read.rows,
        requests=None if enrolled is None else enrolled.requests.total(),
        submitted=totals.submitted,
        reused=None if enrolled is None else enrolled.reused,
        paid_in_other_ledgers=run_state.paid_in_other_ledgers,
        skipped=None if enrolled is None or context.job.step_jobs else dict(run_state.read.skipped.most_common()),
        left_out=None if enrolled is None else left_out_by_param(run_state.read.left_out),
        credits_spent=to_credits(spent),
        credits_unknown=totals.unknown,
        unconfirmed=await context.ledger_writer.submit(queries.unconfirmed_posts, execution_id),
        planned=None if enrolled is None else _planned(enrolled.cost, run_state.open_tasks_cost, totals.cap).as_json(),
        cost_per_hit=to_credits(round(spent / matches)) if matches else None,
        answers=sum(counters.settled.values()),
        balance_before=to_credits(before),
        balance_after=to_credits(after),
        polls=counters.polls,
        rate_limited=counters.rate_limited,
        **run_state.files_written,
        sandbox=context.job.sandbox,
        notes=run_state.notes,
        error=None if reason is None else reason.message,
        hint=None if reason is None else reason.hint,
    )
    if outcome.counts is not None:
        summary = summary.with_row_counts(outcome.counts.statuses, outcome.counts.filled_by_column)
    if context.job.step_jobs:
        totals_by_step = await context.ledger_writer.submit(step_results.step_totals, execution_id)
        steps = summarize_steps(context.job, run_state.enrolled, totals_by_step, outcome.counts)
        _, unknown = await context.ledger_writer.submit(queries.spent_totals)
        summary = replace(summary, steps=steps, cost_per_lead=cost_per_lead(outcome.counts, unknown))
    providers = await _provider_fields(context, summary)
    difference = await _balance_change(context, execution_id, (before, after), spent)
    summary = replace(summary, **providers, difference=difference)
    if totals.cap is not None and spent > totals.cap:
        summary = await _with_overrun(context, summary, execution_id, spent - totals.cap)
    summary = replace(summary, elapsed_s=round(context.elapsed_s(), 3))
    await context.ledger_writer.submit(
        records.end_execution,
        execution_id,
        summary.exit_code,
        summary.as_json(),
        run_state.clock.now_ms(),
        after,
    )
    return summary


def _planned(new: Cost, open_tasks: Cost, cap: int | None) -> Cost:
    """Return the expected cost of a run: that of the tasks that were open, and new requests get the rest of the cap."""
    return new.within(to_credits(cap), open_tasks.maximum or 0.0) + open_tasks


async def _with_overrun(context: RunContext, summary: RunSummary, execution_id: int, beyond_cap: int) -> RunSummary:
    """Add by how much the cap was exceeded, if prices that rose while requests were running are the reason."""
    number, price_rise = await context.ledger_writer.submit(queries.cost_overruns, execution_id)
    if not number:
        return summary
    overrun = min(beyond_cap, price_rise)
    note = (
        f"the credits cap was exceeded by {format_credits(to_credits(overrun))}: {pluralize(number, 'task')} cost "
        f"{format_credits(to_credits(price_rise))} more than the highest price when they were sent"
    )
    return replace(summary, credits_over_cap=to_credits(overrun), notes=[*summary.notes, note])


async def _provider_fields(context: RunContext, summary: RunSummary) -> dict[str, Any]:
    """Return calls, matches and credits per provider, by the answers of this run."""
    if not summary.answers:
        return {}
    totals = await context.ledger_writer.submit(read_provider_totals, context.signals, summary)
    if totals is None:
        return {}
    return {
        "providers": [each.as_json() for each in totals.providers],
        "providers_not_reported": totals.not_reported,
        "credits_unattributed": to_credits(totals.unattributed),
    }


def read_provider_totals(ledger: Database, signals: SignalHandler, summary: RunSummary) -> ProviderTotals | None:
    """Read the answers of this run; None when a signal came and there are too many."""
    stats = ProviderStats(read_descriptions(ledger))

    def is_interrupted() -> bool:
        return signals.received is not None and (summary.answers or 0) > MAX_READ_WHEN_INTERRUPTED

    attempts = queries.settled_attempts(ledger, summary.job, summary.execution)
    for kind, number in count_kinds(takewhile(lambda _: not is_interrupted(), attempts)):
        stats.add(kind, number)
    return None if is_interrupted() else stats.totals()


async def _balance_change(
    context: RunContext, execution_id: int, balances: tuple[int | None, int | None], spent: int
) -> dict[str, Any] | None:
    """Explain the change of the balance. When it equals what was spent, returns None and reads nothing."""
    before, after = balances
    if before is None or after is None:
        return None
    if abs(to_credits(before - after - spent)) < ROUNDING_CREDITS:
        return None
    movements = await context.ledger_writer.submit(queries.credit_movements, execution_id)
    return explain_balance(execution_id, before, after, movements).as_json()
