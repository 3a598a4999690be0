"""`enrich collect`: rebuilds the output from input and ledger alone."""

from __future__ import annotations

from datetime import datetime

from enrich.errors import CommandRefused
from enrich.exit_codes import ExitCode
from enrich.files.writer import prepare_file
from enrich.job.job import Job
from enrich.ledger.database import ledger_exists
from enrich.ledger.ledger import Ledger
from enrich.rows.reader import JobInput
from enrich.rows.template import RequestTemplate
from enrich.run.collector import Collector
from enrich.run.context import RunOptions, select_requests
from enrich.run.preflight import template_from_ledger
from enrich.run.summary import RunSummary


def rebuild_output(job: Job, *, partial: bool) -> RunSummary:
    """Write the output. The caller must hold the ledger's lock.

    Raises CommandRefused when rows are pending and `partial` is not set, or when the job never ran.
    """
    if not ledger_exists(job.ledger):
        raise CommandRefused(f"{job.ledger}: there is no ledger: this job has never run", "enrich run it first")
    ledger = Ledger(job.ledger, read_only=True)
    try:
        template = template_from_ledger(ledger, job)
        now = datetime.now().astimezone()
        target = job.output_path(now)
        job.extra_output_paths(now)  # raises when the output is one of these files
        prepare_file(target, job.input_path, job.name)
        counts = prepare_collector(ledger, job, template).write(target, partial=partial)
    finally:
        ledger.close()
    rows = counts.statuses.total()
    return RunSummary(job.name, int(ExitCode.OK), rows=rows, output=str(target)).with_row_counts(
        counts.statuses, counts.filled_by_column
    )


def prepare_collector(ledger: Ledger, job: Job, template: RequestTemplate) -> Collector:
    """Prepare to join the current input with the ledger alone. Raises EnrichError when the input cannot be read."""
    job_input = JobInput(job, ledger.load_forgotten())
    job_input.check_new_columns(template)
    ledger.begin_pass(select_requests(job, RunOptions(), 0))
    if job.model.caps is not None:
        for batch in job_input.batches(template, job_input.queue_order()):
            ledger.preview(batch.requests())
        ledger.apply_limits()
    return Collector(ledger, job, template, job_input)
