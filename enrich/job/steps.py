"""The steps of a job: the model of each, and its columns in the output."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar

from pydantic import BaseModel

from enrich.job.spec import JobModel, StepModel, SteppedJobModel
from enrich.job.target import TargetModel

_Model = TypeVar("_Model", bound=BaseModel)

#: The columns of a step in the output, in their order.
STEP_FIELDS = ("status", "provider", "credits", "task_id", "at")

_STATUS_COLUMN = re.compile(r"enrich_([a-z][a-z0-9_]*)_status")


def step_column(step: str, field: str) -> str:
    """Return the name of a step's column of ours."""
    return f"enrich_{step}_{field}"


def step_columns(step: str) -> list[str]:
    """Return the names of all columns of a step."""
    return [step_column(step, field) for field in STEP_FIELDS]


def steps_in_header(header: Iterable[str]) -> list[str]:
    """Return the steps that have all their columns in a header: it is that of an earlier output."""
    names = set(header)
    steps = [match[1] for name in header if (match := _STATUS_COLUMN.fullmatch(name))]
    return [step for step in steps if names.issuperset(step_columns(step))]


def step_model(model: SteppedJobModel, step: StepModel) -> JobModel:
    """Return the model of a step: its own keys, the job's for the others. The job's conditions are not its own."""
    changed: dict[str, object] = {name: getattr(step, name) for name in TargetModel.model_fields}
    changed |= {"where": step.where, "only_if_empty": step.only_if_empty, "caps": None}
    changed |= {name: _merged(getattr(model, name), getattr(step, name)) for name in ("policy", "dispatch")}
    if "canary" in step.model_fields_set:
        changed["canary"] = step.canary
    return model.model_copy(update=changed)


def _merged(defaults: _Model, own: _Model) -> _Model:
    """Return the defaults with those keys replaced that the own model names."""
    values = {name: getattr(own, name) for name in own.model_fields_set}
    for name, value in values.items():
        if isinstance(value, BaseModel):
            values[name] = _merged(getattr(defaults, name), value)
    return defaults.model_copy(update=values)
