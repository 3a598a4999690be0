"""Turns the validation errors of a job file into one error, with lines, keys and hints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import get_args

from pydantic import BaseModel, ValidationError

from enrich.errors import JobError, closest_name, did_you_mean, suggest_name
from enrich.job.spec import JobModel, SteppedJobModel
from enrich.job.target import SOURCES_KEY, Param, Source, TargetModel
from enrich.job.yaml_file import YamlDocument

#: Messages for pydantic's error types, in terms of the job file. In braces are the limits that pydantic gives.
_ERROR_MESSAGES = {
    "missing": "is missing",
    "model_type": "must be a mapping of keys",
    "dict_type": "must be a mapping of keys",
    "list_type": "must be a list: [...]",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be above {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
}
#: What the patterns of the names of jobs and steps allow.
_ALLOWED_NAMES = {
    "job": "must have only letters, digits and . _ -, and begin with a letter or digit",
    "step": "must have only lowercase letters, digits and _, and begin with a letter",
}


def join_validation_errors(document: YamlDocument, error: ValidationError) -> JobError:
    """Combine all validation errors, sorted by line. A single error has its hint as a separate text."""
    found: list[tuple[int, str, str | None]] = []
    #: Where a key has a wrong name, and the hint with the right one, which is not reported as missing, too.
    misspelled: list[tuple[list[str | int], str | None]] = []
    problems = error.errors(include_url=False)
    for problem in sorted(problems, key=lambda each: each["type"] != "extra_forbidden"):
        key_path = [step for step in problem["loc"] if step not in ("[key]", SOURCES_KEY)]
        if problem["type"] == "default_factory_not_called":
            continue  # the field it depends on has its own error
        message, hint = problem["msg"].removeprefix("Value error, "), None
        if (template := _ERROR_MESSAGES.get(problem["type"])) is not None:
            message = template.format_map(problem.get("ctx", {}))
        if problem["type"] == "literal_error" and isinstance(problem["input"], str):
            closest = closest_name(problem["input"], re.findall("'([^']+)'", message))
            hint = None if closest is None else did_you_mean(closest)
        if problem["type"] == "string_pattern_mismatch" and key_path[-1:] == ["name"]:
            message = _ALLOWED_NAMES["step" if _is_step(key_path[:-1]) else "job"]
        if key_path in (["input"], ["output"]) and isinstance(problem["input"], list):
            message = "must be one path, not a list"
            hint = "for several files: a folder, or a pattern such as leads/*.csv" if key_path == ["input"] else None
        if problem["type"] == "extra_forbidden":
            message, hint = "unknown key", _key_hint(key_path, is_stepped="steps" in document.data)
            misspelled.append((key_path[:-1], hint))
        elif message == "is missing" and (key_path[:-1], did_you_mean(str(key_path[-1]))) in misspelled:
            continue
        found.append((document.line_of(key_path), f"{document.place_of(key_path)}: {message}", hint))
    found.sort(key=lambda each: each[0])
    if len(found) == 1:
        no_target = found[0][1].endswith("waterfall: is missing")
        return JobError(found[0][1], "a job needs a `waterfall` or an `enrichment`" if no_target else found[0][2])
    return JobError("\n".join(f"{text}, {hint}" if hint else text for _, text, hint in found))


def _key_hint(key_path: Sequence[str | int], *, is_stepped: bool) -> str | None:
    """Return a hint for an unknown key: the level it belongs to, or the nearest valid key."""
    key, at_step = str(key_path[-1]), _is_step(key_path[:-1])
    if at_step and key in JobModel.model_fields:
        return f"`{key}` is a key of the job, for all steps together"
    if len(key_path) == 1 and key == "complete":
        return "`complete` is for a job with `steps`"
    return suggest_name(key, _sibling_keys(key_path, is_stepped=is_stepped))


def _is_step(key_path: Sequence[str | int]) -> bool:
    """Return whether this is the place of a step."""
    return len(key_path) == len(("steps", 0)) and key_path[0] == "steps"


def _sibling_keys(key_path: Sequence[str | int], *, is_stepped: bool) -> list[str]:
    """List the valid keys at the place of an unknown key."""
    model: type[BaseModel] = SteppedJobModel if is_stepped else JobModel
    for key in key_path[:-1]:
        if model is Param and isinstance(key, int):
            model = Source
        elif (field := model.model_fields.get(str(key))) is not None:
            model = _model_in(field.annotation) or model
    names = [field.alias or name for name, field in model.model_fields.items()]
    if model is SteppedJobModel:
        names = [name for name in names if name not in TargetModel.model_fields]
    return [name for name in [*names, *(["steps"] if model is JobModel else [])] if name != SOURCES_KEY]


def _model_in(annotation: object) -> type[BaseModel] | None:
    """Return the model in the type of a key, such as a list of models; None: it has none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
