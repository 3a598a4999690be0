"""`enrich collect`: rebuilds the output from input and ledger alone."""

from __future__ import annotations

from datetime import datetime

from enrich.errors import CommandRefused
from enrich.exit_codes import ExitCode
from enrich.files.writer import prepare_file
from enrich.job.job import Job
from enrich.ledger import enroll, erasure, queries
from enrich.ledger.database import Database, ledger_exists
from enrich.models import RequestSelection
from enrich.rows.job_input import JobInput
from enrich.rows.template import RequestTemplate
from enrich.run.collector import Collector
from enrich.run.context import RunOptions, select_requests
from enrich.run.enrolled import EnrolledSteps
from enrich.run.job_steps import make_steps
from enrich.run.preflight import template_from_ledger
from enrich.run.step_input import StepInput
from enrich.run.step_rows import StepRows
from enrich.run.step_summary import cost_per_lead, summarize_steps
from enrich.run.summary import RunSummary


def rebuild_output(job: Job, *, partial: bool) -> RunSummary:
    """Write the output. The caller must hold the ledger's lock.

    Raises CommandRefused when rows are pending and `partial` is not set, or when the job never ran.
    """
    if not ledger_exists(job.ledger):
        raise CommandRefused(f"{job.ledger}: no ledger, because this job has never run", "run it first: enrich run JOB")
    ledger = Database(job.ledger, read_only=True)
    try:
        template = template_from_ledger(ledger, job)
        now = datetime.now().astimezone()
        target = job.output_path(now)
        job.extra_output_paths(now)  # raises when the output is one of these files
        prepare_file(target, job.input_path, job.name)
        counts = prepare_collector(ledger, job, template).write(target, partial=partial)
        _, unknown = queries.spent_totals(ledger) if job.step_jobs else (0, 0)
    finally:
        ledger.close()
    summary = RunSummary(
        job.name,
        int(ExitCode.OK),
        sandbox=job.sandbox,
        rows=counts.statuses.total(),
        output=str(target),
        steps=summarize_steps(job, EnrolledSteps(), {}, counts),
        cost_per_lead=cost_per_lead(counts, unknown),
    )
    return summary.with_row_counts(counts.statuses, counts.filled_by_column)


def prepare_collector(ledger: Database, job: Job, template: RequestTemplate) -> Collector:
    """Prepare to join the current input with the ledger alone. Raises EnrichError when the input cannot be read."""
    job_input = JobInput(job, erasure.load_forgotten(ledger))
    job_input.check_new_columns(template)
    if job.step_jobs:
        steps = make_steps(job, job_input, [template_from_ledger(ledger, step) for step in job.step_jobs])
        step_rows = StepRows(job, job_input, ledger, steps)
        StepInput(step_rows, 0).begin(RequestSelection())
        step_rows.prepare()
        return Collector(ledger, job, template, job_input, step_rows=step_rows)
    selection = select_requests(job, RunOptions(), 0)
    enroll.begin_pass(ledger)
    if job.model.caps is not None:
        for batch in job_input.batches(template, job_input.queue_order()):
            enroll.preview(ledger, batch.requests(), selection)
        enroll.apply_limits(ledger, selection)
    return Collector(ledger, job, template, job_input, selection=selection)
