"""The rows as one step sees them: which leads take part, and the requests that the run may send."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec import Struct
from msgspec.structs import replace

from enrich.ledger import step_results
from enrich.ledger.step_results import StepChoice, choose_requests
from enrich.models import COUNTED_TOWARDS_LIMIT, Decision, RequestSelection
from enrich.rows.batches import RowBatch
from enrich.rows.job_steps import StepDecision
from enrich.run.plan_file import SavedPlan
from enrich.run.step_batch import LeadSelection, StepBatch, capped_rows, find_recorded_rows
from enrich.run.step_rows import StepRows


class StepInput(Struct, frozen=True):
    """The rows as one step sees them, with the requests that the run may send."""

    rows: StepRows
    number: int

    def batches(self, selection: RequestSelection) -> Iterator[RowBatch]:
        """Read the whole input once. Yield the requests that the run may send, and those with a result."""
        step_results.begin_requesting_rows(self.rows.ledger, self.rows.steps[self.number].job.step)
        for step_batch in self.rows.step_batches(self.number, self.rows.job_input.queue_order()):
            self.rows.add_requesting_rows(self.number, step_batch)
            yield step_batch.to_send(self._final_rows(step_batch, selection))

    def _final_rows(self, step_batch: StepBatch, selection: RequestSelection) -> set[int]:
        """Return the rows beyond the limit whose request has a result, or is unconfirmed, and is not sent again."""
        if self.rows.leads is None:
            return set()
        names = step_batch.batch.fingerprints
        kept = {
            row: name
            for row in step_batch.requesting_rows
            if step_batch.decisions[row] is StepDecision.KEEP and (name := names[row]) is not None
        }
        choices = self._choose(kept.values(), selection)
        return {row for row, name in kept.items() if choices[name].decision in _FINAL}

    def _choose(self, names: Iterable[bytes], selection: RequestSelection) -> dict[bytes, StepChoice]:
        columns = self.rows.steps[self.number].template.columns.values()
        return choose_requests(self.rows.ledger, names, selection, columns)

    def choose_leads(self, selection: RequestSelection) -> None:
        """Choose the leads that a limited run begins in this step."""
        if (leads := self.rows.leads) is not None:
            leads.choose(self._candidates(leads, selection), self.rows.job_input.queue_order())

    def limit_requests(
        self, selection: RequestSelection, plan: SavedPlan | None, execution_id: int
    ) -> RequestSelection:
        """Return how the requests of the chosen leads are selected: in a later step up to what the plan foresees."""
        if not self.number:
            return replace(selection, limit=None, sample=None)
        limit = None if plan is None else plan.requests[self.number]
        return replace(selection, limit=limit, sample=None, sent_in=execution_id)

    def _candidates(self, leads: LeadSelection, selection: RequestSelection) -> Iterator[tuple[int, bytes | None]]:
        """Yield the rows that would be sent, but for those that the run may send anyway."""
        for step_batch in self.rows.step_batches(self.number, limited=False):
            first_position, names = step_batch.batch.first_position, step_batch.to_send().fingerprints
            choices = self._choose(filter(None, names), selection)
            may_send = leads.may_send(first_position, step_batch.results)
            for row, name in enumerate(names):
                choice = choices.get(name, _NEW) if name is not None else None
                if choice is not None and choice.decision in COUNTED_TOWARDS_LIMIT and not may_send[row]:
                    yield first_position + row, name if choice.sent_before else None


_NEW = StepChoice(Decision.NEW, sent_before=False)
_FINAL = {Decision.FOUND, Decision.NOT_FOUND, Decision.FAILED, Decision.EXPIRED, Decision.IN_DOUBT}


def begin_steps(rows: StepRows) -> None:
    """Find out which leads `caps` leaves out, and which ones of a limited run were begun before.

    Raises JobError if a condition of any step cannot be computed for the first rows.
    """
    caps, leads = rows.job_input.job.model.caps, rows.leads
    next(rows.step_tables(), None)
    if caps is None and leads is None:
        return
    begun = find_begun_leads(rows)
    if caps is not None:
        rows.capped[:] = capped_rows(rows.job_input, caps, begun)
    if leads is not None:
        leads.begun = begun


def find_begun_leads(rows: StepRows) -> bytearray:
    """Return for which rows a step has sent a request, one byte for each."""
    begun = bytearray()
    for tables in rows.step_tables():
        first_position = len(begun)
        begun.extend(bytes(tables.frame.height))
        for step, (step_batch, _) in zip(rows.steps, tables.steps, strict=True):
            names = step_batch.batch.fingerprints
            sent = [row for row, result in enumerate(step_batch.results) if result is not None and result.was_sent]
            for row in find_recorded_rows(rows.ledger, step.job, names, sent, step_batch.identities):
                begun[first_position + row] = 1
    return begun
