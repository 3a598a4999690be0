"""`enrich cancel`: cancels the tasks of a job that are running at Databar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import click

from enrich.commands import options
from enrich.databar.clock import SystemClock
from enrich.job.job import Job
from enrich.ledger.database import check_ledger_exists
from enrich.ledger.lock import lock_ledger, open_for_run
from enrich.models import format_credits, pluralize
from enrich.run.cancel import CancelSummary, cancel_tasks


def format_cancel(job: Job, summary: CancelSummary) -> Iterator[str]:
    """Yield the summary as lines of text."""
    at_least = "at least " if summary.credits_unknown else ""
    refund = f": {at_least}{format_credits(summary.credits_refunded)} credits refunded" if summary.cancelled else ""
    yield f"{job.title}: {pluralize(summary.cancelled, 'task')} cancelled{refund}"
    if summary.finished:
        spent = f"{at_least}{format_credits(summary.credits_spent)}"
        yield f"  {pluralize(summary.finished, 'task')} had finished: results stored ({spent} credits)"
    if summary.credits_unknown:
        yield f"  {pluralize(summary.credits_unknown, 'result')} of unknown price"
    if summary.still_open:
        yield f"  {pluralize(summary.still_open, 'task')} still running: the next run collects the results"
    for task in summary.bulk:
        yield f"  not cancelled: bulk task {task['task_id']} ({pluralize(task['requests'], 'request')})"
    if summary.cancelled:
        yield f"  The leads are now failed. Send them again: enrich run {job.document.path} --retry failed"


@click.command()
@options.job_options(sandbox="Cancel the tasks of the sandbox.")
@options.JSON_OPTION
def cancel(job_options: options.JobOptions, as_json: bool) -> int:
    """Cancel the tasks of JOB that are running at Databar, and print the refund.

    Their leads become `failed` and are sent again only by --retry failed. Bulk tasks are listed, not cancelled.
    """
    job = job_options.load()
    check_ledger_exists(job.ledger)
    with ExitStack() as stack:
        stack.enter_context(lock_ledger(job.ledger, 0))
        access = stack.enter_context(options.open_access(job, use_sandbox=job_options.use_sandbox))
        ledger, lease = stack.enter_context(open_for_run(job.ledger))
        summary = cancel_tasks(job, access, ledger, lease or SystemClock())
    if summary.error:
        options.echo_error(summary.error, summary.hint)
    options.echo_result(summary.as_json(), format_cancel(job, summary), as_json=as_json)
    return summary.exit_code
