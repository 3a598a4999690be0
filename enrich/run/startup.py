"""The start of a run: what may refuse it, and its record in the ledger. Nothing is spent here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from enrich.errors import (
    LOCKED_HINT,
    NOTHING_SENT,
    ApiUnreachable,
    EnrichError,
    Interrupted,
    LedgerLocked,
    WorkspaceMismatch,
)
from enrich.files.writer import prepare_file
from enrich.ledger import erasure, lease_table, records, rescue_import, resume, transitions
from enrich.ledger.database import Database
from enrich.ledger.lease_table import LeaseHolder
from enrich.ledger.rescue_file import find_rescue_files
from enrich.models import pluralize
from enrich.rows.job_input import JobInput
from enrich.rows.job_steps import make_steps
from enrich.run.background import end_without_ledger, interrupt, load_schedule
from enrich.run.budget import make_budget
from enrich.run.context import RunContext, RunFiles, RunOptions, rescue_folders
from enrich.run.other_ledgers import confirm_paying_again, find_output_of_other_ledger
from enrich.run.plan_file import planned_cost
from enrich.run.preflight import Preflight, check_api_host, preflight, read_binding
from enrich.run.rate_limit import AdaptiveRateLimiter, InFlightLimit
from enrich.run.run_state import RunState
from enrich.run.step_batch import LeadSelection
from enrich.run.step_rows import StepRows

#: Seconds between checks whether the processes of an earlier run are gone.
RECHECK_S = 0.5


@dataclass(slots=True)
class Startup:
    """What is found out before the run is recorded. With a postponed error, the run sends nothing new."""

    context: RunContext
    postponed_errors: list[EnrichError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: Notes that are also shown without a terminal.
    problems: list[str] = field(default_factory=list)
    #: None: one of the files cannot be used.
    files: RunFiles | None = None

    async def check(self, check: Callable[[Startup], Awaitable[None]]) -> None:
        """Run a check. While the API may hold paid results, its error is postponed, to collect these first.

        That the API cannot be reached is postponed, too, if the ledger has results to write.
        """
        try:
            await check(self)
        except Interrupted:
            raise
        except EnrichError as error:
            submit, since_ms = self.context.ledger_writer.submit, self.context.results_kept_since_ms()
            has_results = isinstance(error, ApiUnreachable) and await submit(records.has_own_submissions)
            # The API may still hold a result that was paid for.
            may_collect = await submit(transitions.submitted_tasks) or await submit(resume.written_off_tasks, since_ms)
            if not (has_results or may_collect):
                if isinstance(error, ApiUnreachable):
                    error.hint = f"{error.hint}. No output is written: {NOTHING_SENT}"
                raise
            self.postponed_errors.append(error)

    @property
    def outage(self) -> ApiUnreachable | None:
        """The reason why the API cannot be reached, if nothing else is wrong."""
        first = next(iter(self.postponed_errors), None)
        return first if isinstance(first, ApiUnreachable) else None

    def opened_files(self) -> RunFiles:
        """Return the files. Raises the first postponed error."""
        if self.postponed_errors:
            raise self.postponed_errors[0]
        assert self.files is not None  # noqa: S101 - `open_files` has passed
        return self.files


async def wait_for_other_processes(context: RunContext) -> None:
    """Wait until the processes of earlier runs are gone. A SQLite ledger never has any.

    Raises LedgerLocked when the leader of another run renews its lease: that run continues, and only lost its lock in a
    restart of the server.
    """
    first_seen: dict[int, LeaseHolder] = {}
    while others := await context.ledger_writer.submit(lease_table.other_holders):
        remaining_s = max(other.remaining_s for other in others)
        if not first_seen:
            context.environment.on_message(f"waiting up to {remaining_s:.0f} s for processes of an earlier run to end")
        for other in others:
            if other.is_leader and other.expires_at_s > first_seen.setdefault(other.id, other).expires_at_s:
                raise LedgerLocked(
                    f"{context.job.ledger}: another run is using this ledger ({other.name})", LOCKED_HINT
                )
        if not others[0].is_leader:
            await context.ledger_writer.submit(lease_table.revoke_leases, others)
        await asyncio.sleep(min(max(remaining_s, 0.01), RECHECK_S))


async def import_rescue_files(startup: Startup) -> None:
    """Import what an earlier run could not write into the ledger. Raises CommandRefused for a damaged rescue file."""
    context = startup.context
    job, now_ms = context.job, context.environment.clock.now_ms()
    imported = await context.ledger_writer.submit(
        rescue_import.import_rescue_files, rescue_folders(job), job.name, now_ms
    )
    rescue_import.remove_imported_files(imported)
    startup.notes += [f"{path} was imported: {result}" for path, result in imported]
    startup.notes += [
        f"{path} was not imported: it belongs to another ledger. If {job.ledger} was moved, move this file, too"
        for path in (find_rescue_files(job.ledger, rescue_folders(job)) if isinstance(job.ledger, Path) else ())
    ]


async def recover_requests(startup: Startup) -> None:
    """Mark the requests as unconfirmed that were being sent when an earlier run was killed."""
    context = startup.context
    unconfirmed = await context.ledger_writer.submit(resume.recover, context.environment.clock.now_ms())
    if unconfirmed:
        note = f"{pluralize(unconfirmed, 'request')} unconfirmed: being sent when the last run was killed"
        startup.notes.insert(0, note)


async def check_ledger_host(context: RunContext) -> None:
    """Raise JobError when the ledger belongs to another API host, so that nothing of it is sent there."""
    binding = await context.ledger_writer.submit(read_binding, context.job)
    check_api_host(binding, context.access.host)


async def open_files(startup: Startup) -> None:
    """Open the input and prepare the location of every file. Raises EnrichError when one of them cannot be used."""
    context, job, now = startup.context, startup.context.job, datetime.now().astimezone()
    target, extra_output_paths = job.output_path(now), job.extra_output_paths(now)
    forgotten = await context.ledger_writer.submit(erasure.load_forgotten)
    with context.signals.interruptible():  # a pipe or object storage may block
        for kind, location in {"output": target, **extra_output_paths}.items():
            prepare_file(location, job.input_path, job.temporary_name, kind)
        startup.files = RunFiles(JobInput(job, forgotten), target, extra_output_paths)
    startup.notes += startup.files.job_input.notes()
    writer = await context.ledger_writer.submit(records.last_writer, str(target))
    if writer not in (None, job.name):
        startup.problems.append(f"{target} is the output of the job `{writer}`, too: this run replaces it")


async def check_new_ledger(startup: Startup) -> None:
    """Refuse a new ledger, or an older copy, when another one paid for an earlier output, unless the user agrees.

    Raises CommandRefused. Adds a problem when an earlier output cannot be read.
    """
    context, options = startup.context, startup.context.options
    if options.new_ledger:
        return
    refusal, problem = await find_output_of_other_ledger(
        context.job, context.ledger_writer.submit, context.signals.interruptible
    )
    startup.problems += [problem] if problem is not None else []
    if refusal is not None:
        confirm_paying_again(context, refusal)
        # One confirmation also covers the other ledgers in the folder.
        startup.context = replace(context, options=replace(options, new_ledger=True))


async def run_preflight(startup: Startup) -> None:
    """Query the API before the run, and make the budget.

    Raises EnrichError when job, input, API and ledger do not match, or a cap cannot be enforced.
    """
    context, job, options = startup.context, startup.context.job, startup.context.options
    bindings = [await context.ledger_writer.submit(read_binding, step) for step in job.steps]
    result = await preflight(
        context.client,
        bindings,
        context.access.host,
        context.environment.timeouts.startup_s,
        update_providers=options.update_providers,
        workspace_renamed=options.workspace_renamed,
    )
    workspace = result.bound_to["workspace"]
    if options.workspace_renamed and workspace is not None:
        await context.ledger_writer.submit(records.rename_workspace, workspace)
    if startup.files is not None:
        job_input, check_stopped = startup.files.job_input, context.signals.raise_if_received
        step_rows = make_step_rows(job_input, context.ledger, result, options, check_stopped)
        startup.files = replace(startup.files, step_rows=step_rows)
    startup.context = replace(context, preflight=result)
    most = await context.ledger_writer.submit(planned_cost, job, options.plan, result)
    steps = zip(job.steps, result.steps, strict=True)
    budgets = tuple(make_budget(step_job, step.template, result.balance, most) for step_job, step in steps)
    for step in result.steps:
        await context.ledger_writer.submit(
            records.save_description, step.description.target, step.description.model_dump(), step.providers
        )
    startup.context = replace(startup.context, budgets=budgets)


def make_step_rows(
    job_input: JobInput,
    ledger: Database,
    result: Preflight,
    options: RunOptions,
    check_stopped: Callable[[], None] = lambda: None,
) -> StepRows | None:
    """Check the input against the columns of the job and of its steps. None: the job has no steps. Raises JobError."""
    job_input.check_new_columns(result.template)
    if not job_input.job.step_jobs:
        return None
    steps = make_steps(job_input.job, job_input, [step.template for step in result.steps])
    is_limited = options.limit is not None or options.sample is not None
    leads = LeadSelection(options.limit, options.sample, options.seed) if is_limited else None
    return StepRows(job_input, ledger, steps, leads, check_stopped)


async def start_run(startup: Startup) -> tuple[RunContext, RunState]:
    """Record the start of the run with its budget. From here on, signals end it early instead of at once."""
    context, model = startup.context, startup.context.job.model
    environment, ledger_writer, signals = context.environment, context.ledger_writer, context.signals
    paths = {step.job.step: list(step.preflight.template.columns.values()) for step in context.steps()}
    execution_id = await ledger_writer.submit(
        records.start_execution,
        context.job.name,
        context.budget.cap,
        environment.clock.now_ms(),
        context.preflight.balance,
        paths if context.job.step_jobs else paths[""],
    )
    run_state = RunState(
        execution_id,
        environment.clock,
        AdaptiveRateLimiter(model.limits.requests_per_second),
        environment.timeouts,
        in_flight_limit=InFlightLimit(model.limits.in_flight, result_ttl_s=context.job.result_ttl.total_seconds()),
        lease_valid=environment.lease_valid,
        on_message=environment.on_message,
        answers_only=any(isinstance(error, WorkspaceMismatch) for error in startup.postponed_errors),
    )
    await load_schedule(context.steps()[0], run_state)
    signals.on_first_signal = partial(interrupt, context, run_state)
    ledger_writer.on_failure = partial(end_without_ledger, context, run_state)
    for note in [*startup.notes, *context.preflight.notes]:
        run_state.add_note(note)
    for problem in startup.problems:
        run_state.notes.append(problem)
        environment.on_problem(problem)
    return context, run_state
