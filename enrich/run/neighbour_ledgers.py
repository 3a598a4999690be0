"""Keeps a new ledger from buying what another one in its folder has paid for: a copied, renamed or re-pointed job."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from msgspec.structs import replace

from enrich.errors import CommandRefused, RunCancelled, RunDeclined
from enrich.job.job import Job
from enrich.ledger import execution_records, neighbours, step_results
from enrich.ledger.database import Database
from enrich.ledger.neighbours import Overlap
from enrich.models import pluralize
from enrich.run.context import RunContext
from enrich.run.run_state import RunState
from enrich.run.step_rows import StepRows

#: Minimum number and share of the paid requests with which a run is refused. Jobs may share a few leads.
MIN_REQUESTS, MIN_SHARE = 10, 0.01
#: Seconds for the comparison.
TIMEOUT_S = 20.0


def find_overlap(
    ledger: Database, job: Job, bound_to: Mapping[str, str | None], step_rows: StepRows | None, number: int = 0
) -> Overlap | None:
    """Compare the requests of this pass with the other ledgers in its folder. None: it is not new, or no file.

    With steps, what is known of all of them is compared before the first, and a later one before it sends anything.
    """
    if job.sandbox or not isinstance(job.ledger, Path):
        return None
    if step_rows is None or not number:
        if execution_records.has_own_submissions(ledger):
            return None
    elif execution_records.has_sent_step(ledger, step_rows.steps[number].job.step):
        return None
    if step_rows is None:
        batches = neighbours.seen_fingerprints(ledger)
    else:
        batches = _fingerprints_of_steps(
            ledger, step_rows, range(number, number + 1 if number else len(step_rows.steps))
        )
    return neighbours.compare_with_neighbours(batches, job.ledger, bound_to, TIMEOUT_S)


def _fingerprints_of_steps(ledger: Database, step_rows: StepRows, numbers: Iterable[int]) -> Iterator[list[bytes]]:
    """Yield the distinct requests that steps would send now, many at a time. A limit of the run changes nothing."""
    step_results.begin_plan(ledger)
    for number in numbers:
        for step_batch in replace(step_rows, leads=None).step_batches(number):
            rows = zip(step_batch.to_send().fingerprints, step_batch.known, strict=True)
            new = [name for name, result in rows if name is not None and not (result and result.was_sent)]
            step_results.add_planned(ledger, step_rows.steps[number].job.step, new)
    yield from neighbours.planned_fingerprints(ledger)


def refusal(job: Job, overlap: Overlap, number: int = 0) -> CommandRefused | None:
    """Return why a run needs the user's confirmation; None: it does not. `number` is that of the step."""
    if overlap.paid < max(MIN_REQUESTS, MIN_SHARE * overlap.requests):
        return None
    paid = f"{overlap.paid:,} of the {pluralize(overlap.requests, 'request')}"
    message = f"{paid} are already paid for in {_names(overlap)}. The new ledger {job.ledger} pays for them again"
    ((main_ledger, _),) = overlap.by_ledger.most_common(1)
    shared = os.path.relpath(main_ledger, job.document.folder)
    hint = f"share its results with `ledger: {shared}` in the job file, or pay again with --new-ledger"
    if number:  # the other ledger does not have the answers of the earlier steps
        hint = f"--new-ledger pays again for the step `{job.steps[number].step}`"
    return RunDeclined(message, hint)


def overlap_notes(overlap: Overlap) -> list[str]:
    """Return the notes about a comparison that refuses nothing."""
    notes = []
    if overlap.paid:
        paid = f"{overlap.paid:,} of the {pluralize(overlap.requests, 'request')}"
        notes.append(f"{paid} were already paid for in {_names(overlap)}, and are paid again in this ledger")
    if overlap.unread:
        names = ", ".join(path.name for path in overlap.unread)
        notes.append(f"{names} could not be read, so it is unknown whether it has paid for the same requests")
    return notes


def _names(overlap: Overlap) -> str:
    return ", ".join(path.name for path, _ in overlap.by_ledger.most_common())


def confirm_paying_again(context: RunContext, error: CommandRefused) -> None:
    """Ask the user whether to pay again. Raises RunCancelled for a no, and the error where no user can answer."""
    confirm = context.options.confirm_new_ledger
    if confirm is None:
        raise error
    with context.signals.interruptible():
        if not confirm(f"{error.message}.\nPay again?"):
            raise RunCancelled


async def check_neighbours(context: RunContext, run_state: RunState, step_rows: StepRows | None, number: int) -> None:
    """Compare a new ledger with those beside it, before anything is spent, and again before a later step sends.

    Raises RunDeclined when they have paid for much of the input, unless the user agrees to pay again.
    """
    if context.options.new_ledger or run_state.pays_again:
        return
    bound_to = context.preflight.bound_to
    overlap = await context.ledger_writer.submit(find_overlap, context.job, bound_to, step_rows, number)
    if overlap is None:
        return
    error = refusal(step_rows.job_input.job if step_rows else context.job, overlap, number)
    if error is not None:
        if run_state.counters.submitted:  # the run does not stop for a confirmation any more
            raise error
        confirm_paying_again(context, error)
        run_state.pays_again = True
    run_state.paid_in_other_ledgers += overlap.paid
    for note in overlap_notes(overlap):
        run_state.add_note(note)
