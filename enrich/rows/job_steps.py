"""The steps of a job with the columns that each reads, and what a run does with a row in a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from functools import cache, lru_cache
from typing import NamedTuple

from msgspec import Struct

from enrich.errors import EnrichError, suggest_name
from enrich.job.job import Job
from enrich.job.spec import step_column
from enrich.models import OPEN_STATES, RowStatus, State
from enrich.rows.job_input import JobInput
from enrich.rows.row_selection import columns_used
from enrich.rows.template import RequestTemplate


class Step(Struct, frozen=True):
    """A step, its template, and the table that it reads. Earlier steps that it reads are named by their numbers."""

    job: Job
    template: RequestTemplate
    job_input: JobInput
    #: The columns of the params and conditions that an earlier step gives.
    earlier_columns: frozenset[str]
    #: The steps whose columns the params read.
    params_depend_on: frozenset[int]
    #: The steps whose columns the step's own conditions read.
    conditions_depend_on: frozenset[int]

    @property
    def depends_on(self) -> frozenset[int]:
        """The steps that must be final for a row before the step sends it."""
        return self.params_depend_on | self.conditions_depend_on


def step_problems(job: Job, job_input: JobInput, templates: Sequence[RequestTemplate]) -> Iterator[EnrichError]:
    """Yield an error for each column of a step, or of `complete`, that the input and earlier steps do not give."""
    for step_input in _step_inputs(job, job_input, templates):
        yield from step_input.column_problems()
    columns = list(dict.fromkeys(column for template in templates for column in template.columns))
    for index, column in enumerate(job.complete):
        if column not in columns:
            yield job.error(["complete", index], f"no step has the column `{column}`", suggest_name(column, columns))


def make_steps(job: Job, job_input: JobInput, templates: Sequence[RequestTemplate]) -> tuple[Step, ...]:
    """Make the steps with what each reads. Raises the first of `step_problems`."""
    for problem in step_problems(job, job_input, templates):
        raise problem
    steps: list[Step] = []
    given = _given_columns(job, templates)
    for number, (step_input, template) in enumerate(
        zip(_step_inputs(job, job_input, templates), templates, strict=True)
    ):
        earlier = {column for columns in given[:number] for column in columns}
        model = step_input.job.model
        by_params = {column for param in model.params.values() for column in param.columns}.intersection(earlier)
        by_conditions = set(model.only_if_empty).intersection(earlier)
        if model.where is not None:
            by_conditions |= columns_used(model.where, step_input.header, earlier)
        params_depend_on, conditions_depend_on = (
            frozenset(giver for giver, columns in enumerate(given[:number]) if read.intersection(columns))
            for read in (by_params, by_conditions)
        )
        earlier_columns = frozenset(by_params | by_conditions)
        steps.append(
            Step(step_input.job, template, step_input, earlier_columns, params_depend_on, conditions_depend_on)
        )
    return tuple(steps)


def _given_columns(job: Job, templates: Sequence[RequestTemplate]) -> list[list[str]]:
    """Return the columns that each step gives."""
    return [
        [*template.columns, step_column(step.step, "status")]
        for step, template in zip(job.steps, templates, strict=True)
    ]


def _step_inputs(job: Job, job_input: JobInput, templates: Sequence[RequestTemplate]) -> Iterator[JobInput]:
    """Yield the input as each step sees it."""
    given = _given_columns(job, templates)
    for number, step in enumerate(job.steps):
        earlier = [column for columns in given[:number] for column in columns]
        # A column that several steps give is named with the next of them, if there is one.
        others = [number, *range(len(given) - 1, number, -1)]
        later = {column: job.steps[other].step for other in others for column in given[other]}
        yield job_input.for_step(step, earlier, later)


#: States in which an earlier step still may bring another value. A step that depends on it sends nothing new.
NOT_FINAL = frozenset({State.PENDING, State.IN_DOUBT, *OPEN_STATES})


class StepDecision(Enum):
    """What a run does with a row in a step."""

    SEND = "send"  # the request is needed: sent, unless the ledger has its answer
    KEEP = "keep"  # the request was sent before: its answer stays, and nothing new is sent
    WAIT = "wait"  # nothing is sent until earlier steps are final
    FILTER = "filter"  # left out by a condition
    LACK = "lack"  # left out: an earlier step found nothing to send
    REJECT = "reject"  # a param of the input is missing or unusable


class RowFacts(NamedTuple):
    """What the decision about a row in a step depends on.

    `left_out` and `invalid` are the reasons why the row has no request. `blank_from_step`: invalid only because an
    earlier step found no value. `selected`: the step's own condition holds. `was_sent`: the row has a request that
    was sent for it. `ready`: all steps that it depends on are final.
    """

    left_out: bool
    invalid: bool
    blank_from_step: bool
    selected: bool
    was_sent: bool
    ready: bool


@cache
def decide(facts: RowFacts) -> StepDecision:
    """Decide about a row. A request that was sent is kept while earlier steps are sent again or conditions change."""
    if facts.left_out:
        return StepDecision.FILTER
    if not facts.ready:
        return StepDecision.KEEP if facts.was_sent else StepDecision.WAIT
    if not facts.selected:
        return StepDecision.KEEP if facts.was_sent else StepDecision.FILTER
    if facts.invalid:
        return StepDecision.LACK if facts.blank_from_step else StepDecision.REJECT
    return StepDecision.SEND


@lru_cache(maxsize=4096)
def row_status(statuses: tuple[str, ...], *, is_complete: bool) -> RowStatus:
    """Return the status of a row by those of its steps. `is_complete`: each of the `complete` columns has a value."""
    present = set(map(RowStatus, statuses))
    for status in (RowStatus.IN_DOUBT, RowStatus.PENDING):
        if status in present:
            return status
    if is_complete:
        return RowStatus.FOUND
    for status in (RowStatus.FAILED, RowStatus.EXPIRED):
        if status in present:
            return status
    if present & {RowStatus.FOUND, RowStatus.NOT_FOUND}:
        return RowStatus.NOT_FOUND
    return RowStatus.INVALID if RowStatus.INVALID in present else RowStatus.FILTERED
