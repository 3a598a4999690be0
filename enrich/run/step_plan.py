"""Plans a job with steps: the first step exactly, later ones at most, as what they send depends on answers to come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import polars as pl
from msgspec import Struct

from enrich.ledger import enroll, queries, step_results
from enrich.ledger.database import Database
from enrich.ledger.step_results import StepResult, choose_requests
from enrich.models import (
    DECISIONS_TO_SEND,
    Decision,
    RequestSelection,
    RowStatus,
    State,
    format_credits,
    pluralize,
    to_credits,
)
from enrich.rows.job_steps import Step, StepDecision
from enrich.run.budget import NO_COST, Cost
from enrich.run.plan import format_cost
from enrich.run.preflight import Preflight
from enrich.run.step_batch import StepBatch
from enrich.run.step_rows import StepRows, StepTables
from enrich.run.terminal_text import pad, wrap_parts

#: Decisions after which the row may have another answer at the end of the run.
_OPEN = frozenset({*DECISIONS_TO_SEND, Decision.POSSIBLE, Decision.WAITING, Decision.IN_DOUBT, Decision.OVER_LIMIT})


class StepDecisions(NamedTuple):
    """The decisions about the rows of a batch in one step.

    `uncertain`: an earlier step that the row depends on may bring another answer. `may_change`: another request, too.
    `is_bought_again`: the row has an answer, and is sent anew only if its request changes.
    """

    decisions: Sequence[Decision]
    uncertain: Sequence[bool]
    may_change: Sequence[bool]
    may_be_selected: Sequence[bool]
    is_bought_again: Sequence[bool]


def decide_steps(rows: StepRows, table: StepTables, selections: Sequence[RequestSelection]) -> Iterator[StepDecisions]:
    """Decide about a batch in every step."""
    is_open: list[pl.Series] = []
    for number, (step_batch, _) in enumerate(table.steps):
        made = _decide(rows, table, number, is_open, selections[number])
        # A row that waits for an earlier step may still be sent, or have another answer.
        pairs = zip(made.decisions, step_batch.decisions, strict=True)
        is_row_open = [planned in _OPEN or decided is StepDecision.WAIT for planned, decided in pairs]
        is_open.append(pl.Series("", is_row_open, pl.Boolean))
        yield made


def _decide(
    rows: StepRows, table: StepTables, number: int, is_open: Sequence[pl.Series], selection: RequestSelection
) -> StepDecisions:
    """Decide about a batch in a step. `is_open`: the rows that earlier steps may still give another answer."""
    step, (step_batch, text) = rows.steps[number], table.steps[number]
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
        allowed = rows.leads.may_send(table.first_position, as_new)

    def decide_row(row: int, decided: StepDecision, by_ledger: Decision, answered: Decision | None) -> Decision:
        left_out = Decision.INVALID if decided is StepDecision.REJECT else Decision.FILTERED
        if not uncertain[row]:
            if decided is StepDecision.SEND:
                return by_ledger
            if row in requesting_rows and by_ledger in DECISIONS_TO_SEND:
                return Decision.OVER_LIMIT
            return answered if answered is not None and decided is StepDecision.KEEP else left_out
        if names[row] is None and not may_change[row] and not is_filtered[row]:
            return Decision.INVALID
        if is_filtered[row] or not may_be_selected[row] or decided is StepDecision.REJECT:
            return answered or left_out
        if answered is None or may_change[row] or by_ledger in DECISIONS_TO_SEND:
            return Decision.POSSIBLE if allowed[row] else Decision.OVER_LIMIT
        return answered

    decisions, is_bought_again = [], []
    for row, (name, result, decided) in enumerate(zip(names, known, step_batch.decisions, strict=True)):
        choice = None if name is None else choices.get(name)
        by_ledger = Decision.NEW if choice is None else choice.decision
        # The decision if the request is not sent again; None: it was never sent.
        answered = _as_answered(result, by_ledger) if result is not None and result.was_sent else None
        decision = decide_row(row, decided, by_ledger, answered)
        is_possible = decision is Decision.POSSIBLE
        is_bought_again.append(is_possible and answered is not None and by_ledger not in DECISIONS_TO_SEND)
        decisions.append(decision)
    return StepDecisions(decisions, uncertain, may_change, may_be_selected, is_bought_again)


def _as_answered(result: StepResult, by_ledger: Decision) -> Decision:
    """Return the decision about a request that is not sent: by its state."""
    if by_ledger not in DECISIONS_TO_SEND:
        return by_ledger
    return Decision.WAITING if result.state is State.PENDING else Decision(result.state.value)


def _any_open(is_open: Sequence[pl.Series], numbers: frozenset[int], height: int) -> list[bool]:
    """Return which rows any of these steps may still give another answer."""
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


@dataclass(slots=True)
class StepForecast:
    """What a run would do in a step.

    `requests` are those that the input needs, answered or not. `to_submit` are sent whatever the answers to come are.
    `at_most` counts these, those that may be sent, and rows whose request is not known yet. `sent_again` counts rows
    with a result whose request changes if an earlier result changes.
    """

    step: Step
    #: The average price of the newest answers, in millionths; None: unknown.
    _likely_price: float | None
    requests: int = 0
    to_submit: int = 0
    may_be_sent: int = 0
    sent_again: int = 0
    #: Rows that a limited run has no place for so far.
    beyond_limit: int = 0
    #: Rows whose request the step has sent, sends, or may send.
    leads: int = 0
    #: `decided`: selected rows whose earlier results are final. `requested`: those that have a request.
    decided: int = 0
    requested: int = 0
    #: Its condition also holds where an earlier step has failed.
    follows_failure: bool = False

    @property
    def worst_price(self) -> float | None:
        """The highest price of a request, in credits. None: unknown, or it depends on the row."""
        return to_credits(self.step.template.worst_price)

    @property
    def at_most(self) -> int:
        """How many requests the step sends at most."""
        return self.to_submit + self.may_be_sent

    @property
    def likely(self) -> float | None:
        """How many requests the step sends by the share that it has sent so far; None: not known."""
        if not self.may_be_sent:
            return float(self.to_submit)
        if self._likely_price is None or not self.decided:
            return None
        return self.to_submit + self.may_be_sent * self.requested / self.decided

    @property
    def cost(self) -> Cost:
        """The expected cost."""
        maximum = Cost.for_requests(self.at_most, None, self.step.template.worst_price).maximum
        likely = self.likely
        if likely is None or (self._likely_price is None and likely):
            return Cost(None if self.at_most else 0.0, maximum)
        return Cost(round((self._likely_price or 0) * likely / 1_000_000, 6), maximum)

    def add(self, step_batch: StepBatch, made: StepDecisions, ledger: Database) -> set[int]:
        """Add the rows of a batch. Return those whose request the step has sent, sends, or may send."""
        certain, possible, known = [], [], []
        leads = set()
        requesting_rows = set(step_batch.requesting_rows)
        for row, (decision, name) in enumerate(zip(made.decisions, step_batch.built.fingerprints, strict=True)):
            is_certain = not made.uncertain[row]
            is_requested = decision not in (Decision.INVALID, Decision.FILTERED, Decision.OVER_LIMIT)
            if is_requested:
                leads.add(row)
            self.decided += is_certain and bool(made.may_be_selected[row]) and decision is not Decision.INVALID
            self.requested += is_certain and is_requested
            self.beyond_limit += decision is Decision.OVER_LIMIT
            if decision in DECISIONS_TO_SEND and name is not None:
                certain.append(name)
            elif decision is Decision.POSSIBLE:
                self.sent_again += made.is_bought_again[row]
                if name is None or made.may_change[row]:
                    self.may_be_sent += 1
                else:
                    possible.append(name)
            elif is_requested and name is not None and (row in requesting_rows or not is_certain):
                known.append(name)
        step_results.add_planned(ledger, self.step.job.step, certain)
        step_results.add_planned(ledger, self.step.job.step, possible, "possible")
        step_results.add_planned(ledger, self.step.job.step, known, "known")
        self.leads += len(leads)
        return leads

    def as_json(self) -> dict[str, Any]:
        """Return the object of the step that `--json` prints."""
        target, likely = self.step.job.model.target, self.likely
        return {
            "name": self.step.job.step,
            target.kind.value: target.id,
            "to_submit": self.to_submit,
            "at_most": self.at_most,
            "likely": None if likely is None else round(likely, 1),
            "sent_again": self.sent_again,
            "worst_price": self.worst_price,
            "max_credits": self.step.job.step_max_credits,
            "cost": self.cost.as_json(),
        }


class StepsPlan(Struct, frozen=True):
    """What a run of a job with steps would do, with amounts in credits. None: unknown, or not set."""

    job: str
    sandbox: bool
    rows: int
    steps: Sequence[StepForecast]
    balance: float | None
    max_credits: float | None
    #: The lowest of `max_credits` and what `min_balance` leaves, and what open tasks have reserved of it.
    cap: float | None
    reserved: float
    notes: list[str] = []

    @property
    def to_submit(self) -> int:
        """How many requests are sent whatever the answers to come are."""
        return sum(step.to_submit for step in self.steps)

    @property
    def cost(self) -> Cost:
        """The expected cost of all steps, each within its own cap, together within the rest of the run's."""
        total = NO_COST
        for step in self.steps:
            total += step.cost.within(step.step.job.step_max_credits)
        return total.within(self.cap, self.reserved)

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {
            "job": self.job,
            "exit_code": 0,
            "rows": self.rows,
            "requests": sum(step.requests for step in self.steps),
            "to_submit": self.to_submit,
            "balance": self.balance,
            "cost": self.cost.as_json(),
            "max_credits": self.max_credits,
            "steps": [step.as_json() for step in self.steps],
            "sandbox": self.sandbox,
            "notes": self.notes,
        }


def plan_steps(
    rows: StepRows, ledger: Database, preflight: Preflight, selections: Sequence[RequestSelection], cap: int | None
) -> StepsPlan:
    """Plan all steps, within a cap in millionths. The pass of the ledger sees the requests of the first step."""
    row_count, _, forecasts = forecast_steps(rows, ledger, selections)
    job = rows.job_input.job
    notes = [*preflight.notes, *_notes(forecasts, ledger)]
    return StepsPlan(
        job.name,
        job.sandbox,
        row_count,
        forecasts,
        to_credits(preflight.balance),
        job.max_credits,
        to_credits(cap),
        to_credits(queries.open_reservations(ledger)),
        notes,
    )


def forecast_steps(
    rows: StepRows, ledger: Database, selections: Sequence[RequestSelection]
) -> tuple[int, int, list[StepForecast]]:
    """Read the input once. Return how many rows it has, how many of them any step sends, and what each step does."""
    forecasts = [StepForecast(step, queries.average_price(ledger, step.template.target)) for step in rows.steps]
    enroll.begin_pass(ledger)
    step_results.begin_plan(ledger)
    row_count = lead_count = 0
    for table in rows.step_tables():
        row_count += table.frame.height
        decided = decide_steps(rows, table, selections)
        leads: set[int] = set()
        for forecast, made, (step_batch, text) in zip(forecasts, decided, table.steps, strict=True):
            leads |= forecast.add(step_batch, made, ledger)
            forecast.follows_failure |= is_sent_after_failure(rows, forecast.step, text)
        lead_count += len(leads)
        enroll.preview(ledger, table.steps[0][0].to_send().requests(), selections[0])
    for number, forecast in enumerate(forecasts):
        # A step with a cap of its own may leave a shared request to a later one.
        shared_with = [each.job.step for each in rows.steps[:number] if each.job.step_max_credits is None]
        counts = step_results.planned_counts(ledger, forecast.step.job.step, shared_with)
        if rows.leads is not None and number:  # the leads of the first step are chosen
            forecast.may_be_sent += min(rows.leads.remaining, forecast.beyond_limit)
        forecast.requests = counts.requests + forecast.may_be_sent
        forecast.to_submit, forecast.may_be_sent = counts.sent, forecast.may_be_sent + counts.possible
    return row_count, lead_count, forecasts


def note_on_target(ledger: Database, steps: Sequence[Step], number: int) -> str | None:
    """Return a note if the target or the providers of a step have changed since the last time. None: they have not."""
    step = steps[number]
    last = step_results.last_target(ledger, step.job.name, step.job.step)
    if last in (None, step.template.target.canonical()):
        return None
    note = (
        f"{step.job.step}: its target or its providers have changed: leads that it has enriched before are paid again"
    )
    later = [each.job.step for each in steps if number in each.params_depend_on]
    return f"{note}, also by {', '.join(later)} where its results differ" if later else note


def _notes(forecasts: Sequence[StepForecast], ledger: Database) -> Iterator[str]:
    steps = [forecast.step for forecast in forecasts]
    for number, forecast in enumerate(forecasts):
        name = forecast.step.job.step
        if forecast.at_most and (note := note_on_target(ledger, steps, number)) is not None:
            yield note
        if forecast.sent_again:
            rows = pluralize(forecast.sent_again, "row")
            yield f"{name}: {rows} with a result may be charged again, because an earlier step is sent again"
        if forecast.follows_failure:
            yield f"{name}: also sent where an earlier step failed or expired"


def format_steps_plan(plan: StepsPlan, next_lines: Sequence[str] = ()) -> Iterator[str]:
    """Yield the plan as lines of text. `next_lines` are the commands that come next."""
    sandbox = "SANDBOX " if plan.sandbox else ""
    then_more = ", then more" if any(step.may_be_sent for step in plan.steps) else ""
    sends = [f"{pluralize(plan.to_submit, 'request')} to send{then_more}", format_cost(plan.cost)]
    parts = [
        f"{sandbox}{pluralize(plan.rows, 'lead')}, {pluralize(len(plan.steps), 'step')}",
        *(sends if any(step.at_most for step in plan.steps) else ["nothing to send"]),
        *([] if plan.balance is None else [f"balance {plan.balance:,.2f}"]),
        f"cap: {'none' if plan.max_credits is None else format_credits(plan.max_credits)}",
    ]
    yield from wrap_parts(parts, " · ")
    yield f"  {'step':<14}{'certain':>9}{'at most':>9}{'likely':>9}{'price':>11}{'max credits':>13}"
    for forecast in plan.steps:
        likely = "-" if forecast.likely is None else f"{forecast.likely:,.0f}"
        no_price = "unknown" if forecast.step.template.priced_by is None else "by row"
        price = no_price if forecast.worst_price is None else f"{forecast.worst_price:,.15g}"
        maximum = no_price if forecast.cost.maximum is None else f"{forecast.cost.maximum:,.2f}"
        cap = forecast.step.job.step_max_credits
        capped = "" if cap is None else f"  cap {cap:,.15g}"
        numbers = f"{forecast.to_submit:>9,}{forecast.at_most:>9,}{likely:>9}{price:>11}{maximum:>13}"
        yield f"  {pad(forecast.step.job.step, 14)}{numbers}{capped}"
    yield from (f"Note: {note}" for note in plan.notes)
    yield from next_lines
