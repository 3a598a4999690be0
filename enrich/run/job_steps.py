"""The steps of a job, ready to be read: each with its template, and with the columns that it sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from enrich.job.job import Job
from enrich.job.name_hints import suggest_name
from enrich.job.steps import step_column
from enrich.rows.job_input import JobInput
from enrich.rows.template import RequestTemplate
from enrich.rows.where import columns_used


@dataclass(frozen=True, slots=True)
class Step:
    """A step, its template, and the table that it reads. `depends_on` has the numbers of earlier steps."""

    job: Job
    template: RequestTemplate
    job_input: JobInput
    depends_on: frozenset[int]
    #: The columns of the params and conditions that an earlier step gives.
    earlier_columns: frozenset[str]
    #: The steps whose columns the params read.
    params_depend_on: frozenset[int]
    #: The steps whose columns the step's own conditions read.
    conditions_depend_on: frozenset[int]


def make_steps(job: Job, job_input: JobInput, templates: Sequence[RequestTemplate]) -> tuple[Step, ...]:
    """Check each step against the columns that it can read, and `complete` against those that the steps give.

    Raises JobError for a column that none of them is.
    """
    steps: list[Step] = []
    for step_job, template in zip(job.steps, templates, strict=True):
        given = [(*step.template.columns, step_column(step.job.step, "status")) for step in steps]
        _check_order(job, step_job, templates, job_input.columns, len(steps))
        step_input = job_input.for_step(step_job, [column for columns in given for column in columns])
        earlier = {column for columns in given for column in columns}
        by_params = {column for param in step_job.model.params.values() for column in param.columns} & earlier
        by_conditions = _condition_columns(step_job, step_input.header, earlier)
        depends_on, params_depend_on, conditions_depend_on = (
            frozenset(number for number, columns in enumerate(given) if read.intersection(columns))
            for read in (by_params | by_conditions, by_params, by_conditions)
        )
        earlier_columns = frozenset(by_params | by_conditions)
        steps.append(
            Step(step_job, template, step_input, depends_on, earlier_columns, params_depend_on, conditions_depend_on)
        )
    columns = list(dict.fromkeys(column for template in templates for column in template.columns))
    for index, column in enumerate(job.complete):
        if column not in columns:
            raise job.error(["complete", index], f"no step has the column `{column}`", suggest_name(column, columns))
    return tuple(steps)


def _check_order(
    job: Job, step: Job, templates: Sequence[RequestTemplate], input_columns: Sequence[str], number: int
) -> None:
    """Raise JobError when a step reads a column that only it or a later step gives."""
    given = [
        {*template.columns, step_column(each.step, "status")}
        for each, template in zip(job.steps, templates, strict=True)
    ]
    known = set(input_columns).union(*given[:number])
    read: list[tuple[list[str | int], str]] = [
        (["params", name], column) for name, param in step.model.params.items() for column in param.columns
    ]
    read += [(["only_if_empty", index], column) for index, column in enumerate(step.model.only_if_empty)]
    for key_path, column in read:
        later = [each.step for each, columns in zip(job.steps, given, strict=True) if column in columns]
        if column not in known and later:
            message = f"`{column}` comes from a later step: `{later[0]}`"
            raise step.error(key_path, message, f"move `{step.step}` after `{later[0]}`")


def _condition_columns(step: Job, header: Sequence[str], earlier: set[str]) -> set[str]:
    """Return the columns of earlier steps that the conditions of a step read."""
    read = set(step.model.only_if_empty) & earlier
    return read if step.model.where is None else read | columns_used(step.model.where, header, earlier)
