"""`enrich collect`: the output again, from input and ledger alone."""

from __future__ import annotations

from datetime import datetime

from enrich.collector import Collector
from enrich.connect import remembered
from enrich.errors import Exit, Refused
from enrich.job import Job
from enrich.question import Question
from enrich.receipt import Receipt
from enrich.rows import Rows
from enrich.store.database import exists
from enrich.store.ledger import Ledger
from enrich.surroundings import Options, wish
from enrich.tables.writing import prepare


def collect_offline(job: Job, *, partial: bool) -> Receipt:
    """Write the output; the caller holds the lock.

    Raises Refused when rows are pending and `partial` is not set, or when the job never ran.
    """
    if not exists(job.ledger):
        raise Refused(f"{job.ledger}: there is no ledger: this job has never run", "enrich run it first")
    ledger = Ledger(job.ledger, read_only=True)
    try:
        question = remembered(ledger, job)
        now = datetime.now().astimezone()
        target = job.output_path(now)
        job.feeds(now)  # refuses an output that is one of them
        prepare(target, job.input_path, job.name)
        counted = joined(ledger, job, question).write(target, partial=partial)
    finally:
        ledger.close()
    rows = counted.statuses.total()
    return Receipt(job.name, int(Exit.OK), rows=rows, output=str(target)).with_rows(counted.statuses, counted.hits)


def joined(ledger: Ledger, job: Job, question: Question) -> Collector:
    """Make ready to join the present input with the ledger alone. Raises EnrichError when the input can't be read."""
    rows = Rows(job, ledger.forgotten())
    rows.check_new_columns(question)
    ledger.begin_pass(wish(job, Options(), 0))
    if job.model.caps is not None:
        for batch in rows.batches(question, rows.order()):
            ledger.look(batch.asked())
        ledger.choose()
    return Collector(ledger, job, question, rows)
