"""Decides for a plan what a run would do with each row in each step, as far as it is known before the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import polars as pl

from enrich.ledger.step_results import StepResult, choose_requests
from enrich.models import DECISIONS_TO_SEND, Decision, RequestSelection, RowStatus, State
from enrich.rows.job_steps import Step, StepDecision
from enrich.run.step_batch import StepBatch, StepTables
from enrich.run.step_rows import StepRows

#: Decisions after which the row may have another answer at the end of the run.
_OPEN = frozenset({*DECISIONS_TO_SEND, Decision.POSSIBLE, Decision.WAITING, Decision.IN_DOUBT, Decision.OVER_LIMIT})


class StepDecisions(NamedTuple):
    """The decisions about a batch in one step, with the requests of its rows as they are now.

    `uncertain`: an earlier step that the row depends on may bring another answer. `may_change`: another request, too.
    `is_bought_again`: the row has an answer, and is sent anew only if its request changes.
    """

    decisions: Sequence[Decision]
    fingerprints: Sequence[bytes | None]
    uncertain: Sequence[bool]
    may_change: Sequence[bool]
    may_be_selected: Sequence[bool]
    is_bought_again: Sequence[bool]


def decide_steps(rows: StepRows, table: StepTables, selections: Sequence[RequestSelection]) -> Iterator[StepDecisions]:
    """Decide about a batch in every step."""
    is_open: list[pl.Series] = []
    for number, (step_batch, text) in enumerate(table.steps):
        made = _decide(rows, rows.steps[number], step_batch, text, is_open, selections[number])
        # A row that waits for an earlier step may still be sent, or have another answer.
        pairs = zip(made.decisions, step_batch.decisions, strict=True)
        is_row_open = [planned in _OPEN or decided is StepDecision.WAIT for planned, decided in pairs]
        is_open.append(pl.Series("", is_row_open, pl.Boolean))
        yield made


def _decide(  # noqa: PLR0913, PLR0917 - what is known of a batch
    rows: StepRows,
    step: Step,
    step_batch: StepBatch,
    text: pl.DataFrame,
    is_open: Sequence[pl.Series],
    selection: RequestSelection,
) -> StepDecisions:
    names, known, requesting_rows = step_batch.built.fingerprints, step_batch.known, set(step_batch.requesting_rows)
    is_filtered = [status is RowStatus.FILTERED for status in step_batch.built.statuses]
    choices = choose_requests(rows.ledger, filter(None, names), selection, step.template.columns.values())
    uncertain = _any_open(is_open, step.depends_on, text.height)
    may_change = _any_open(is_open, step.params_depend_on, text.height)
    may_be_selected = _may_be_selected(rows, step, text, is_open).to_list()
    # A request that changes is new: a lead that was begun may send it, whatever it has sent before.
    as_new = [None if change else result for change, result in zip(may_change, known, strict=True)]
    allowed = [True] * text.height
    if rows.leads is not None:
        allowed = rows.leads.may_send(step_batch.batch.first_position, as_new)
    decisions, is_bought_again = [], []
    for row, decided in enumerate(step_batch.decisions):
        name, result = names[row], known[row]
        choice = choices.get(name) if name is not None else None
        by_ledger = Decision.NEW if choice is None else choice.decision
        # The decision if the request is not sent again; None: it was never sent.
        answered = _as_answered(result, by_ledger) if result is not None and result.was_sent else None
        left_out = Decision.INVALID if decided is StepDecision.REJECT else Decision.FILTERED
        if not uncertain[row]:
            if decided is StepDecision.SEND:
                decision = by_ledger
            elif row in requesting_rows and by_ledger in DECISIONS_TO_SEND:
                decision = Decision.OVER_LIMIT
            else:
                decision = answered if answered is not None and decided is StepDecision.KEEP else left_out
        elif name is None and not may_change[row] and not is_filtered[row]:
            decision = Decision.INVALID
        elif is_filtered[row] or not may_be_selected[row] or decided is StepDecision.REJECT:
            decision = answered or left_out
        elif answered is None or may_change[row] or by_ledger in DECISIONS_TO_SEND:
            decision = Decision.POSSIBLE if allowed[row] else Decision.OVER_LIMIT
        else:
            decision = answered
        is_possible = decision is Decision.POSSIBLE
        is_bought_again.append(is_possible and answered is not None and by_ledger not in DECISIONS_TO_SEND)
        decisions.append(decision)
    return StepDecisions(decisions, names, uncertain, may_change, may_be_selected, is_bought_again)


def _as_answered(result: StepResult, by_ledger: Decision) -> Decision:
    """Return the decision about a request that is not sent: by its state."""
    if by_ledger not in DECISIONS_TO_SEND:
        return by_ledger
    return Decision.WAITING if result.state is State.PENDING else Decision(result.state.value)


def _any_open(is_open: Sequence[pl.Series], numbers: frozenset[int], height: int) -> list[bool]:
    result = pl.repeat(value=False, n=height, eager=True)
    for number in numbers:
        result |= is_open[number]
    return result.to_list()


def is_sent_after_failure(rows: StepRows, step: Step, text: pl.DataFrame) -> bool:
    """Return whether the step's condition holds for any row of a batch after a failure of an earlier step."""
    for number in step.conditions_depend_on:
        blank = [name for name in rows.steps[number].template.columns if name not in rows.job_input.schema]
        cells = dict.fromkeys(blank, "") | {rows.status_column(number): State.FAILED.value}
        failed = text.with_columns(pl.lit(cell).alias(name) for name, cell in cells.items())
        if step.job_input.selected_rows(failed).any():
            return True
    return False


def _may_be_selected(rows: StepRows, step: Step, text: pl.DataFrame, is_open: Sequence[pl.Series]) -> pl.Series:
    """Return where the step's condition holds, or may hold once open steps have their answers."""
    unknown: dict[str, pl.Series] = {}
    for number in step.depends_on:
        for name in (*rows.steps[number].template.columns, rows.status_column(number)):
            unknown[name] = unknown.get(name, text.get_column(name)).set(is_open[number], None)
    return step.job_input.selected_rows(text.with_columns(unknown.values()), unknown=True)
