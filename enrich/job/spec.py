"""The model of the job file, of each of its steps, and its JSON Schema."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import timedelta
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from enrich.job.cell_text import EMPTY_VALUES, PLACEHOLDERS, clean
from enrich.job.field_types import (
    Columns,
    Credits,
    Duration,
    Encoding,
    LocalPathText,
    PathText,
    Separator,
    StrictModel,
    Text,
    Url,
)
from enrich.job.locations import Format, format_of, separator_of
from enrich.job.target import SOURCES_KEY, Param, TargetKind, TargetModel

_Model = TypeVar("_Model", bound=BaseModel)

#: The columns of a step in the output, in their order.
STEP_FIELDS = ("status", "provider", "credits", "task_id", "at")

_STATUS_COLUMN = re.compile(r"enrich_([a-z][a-z0-9_]*)_status")


def _default_separator(values: dict[str, Any]) -> str:
    return separator_of(values.get("path", ""))  # before 2.14, pydantic asks for it without a valid path, too


class Input(StrictModel):
    """The leads: a file, or several files of one format that are read as one table."""

    path: PathText = Field(
        description="A file, a folder, a glob such as leads/*.csv, an object storage URL such as s3://bucket/leads.csv "
        "or s3://bucket/leads/, a web address such as https://crm.example/leads.csv, or - for stdin; relative to the "
        "job file."
    )
    separator: Separator = Field(
        default_factory=_default_separator, description="One character; default: a tab for .tsv, else a comma."
    )
    encoding: Encoding = Field("utf-8", description="Python's name of the encoding: utf-8, cp1252, utf-16 …")
    format: Format = Field(
        default_factory=lambda values: format_of(values.get("path", "")) or "csv",
        description="Default: by the file extension, before .gz; otherwise csv.",
    )
    sheet: Text | None = Field(None, description="The sheet of a workbook; default: the first visible one with cells.")

    @model_validator(mode="after")
    def _check_sheet(self) -> Input:
        if self.sheet is not None and self.format != "xlsx":
            raise ValueError("`sheet` is for workbooks: format xlsx")
        return self


class Output(StrictModel):
    """The enriched file."""

    path: PathText = Field(
        description="A .csv, .tsv, .jsonl (each may be followed by .gz), .parquet or .xlsx file, or an object storage "
        "URL; the output may be a folder of Parquet parts, as in leads/; strftime codes allowed; relative to the job "
        "file."
    )
    separator: Separator = Field(
        default_factory=_default_separator, description="One character; default: a tab for .tsv, else a comma."
    )
    encoding: Encoding = Field("utf-8", description="Python's name of the encoding: utf-8, cp1252, utf-16 …")

    @model_validator(mode="after")
    def _check_separator(self) -> Self:
        try:
            self.separator.encode(self.encoding)
        except UnicodeEncodeError:
            raise ValueError(f"`separator` has no code in the encoding {self.encoding}") from None
        return self


class Limits(StrictModel):
    """Limits of a run."""

    requests_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Maximum rate of submits and polls together; null: find the limit of the API by probing."
    )
    in_flight: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Maximum number of tasks running at Databar; null: 200 at first, then by rate and duration."
    )
    max_credits: Credits | None = Field(
        None, description="Maximum spend of a run; running tasks count at their maximum price; null: no cap."
    )
    min_balance: Credits | None = Field(None, description="Credits to keep in the account; null: none.")


class Refresh(StrictModel):
    """After which time a result is requested again, at a price."""

    found: Duration | None = Field(None, description="Age of a match; null: never.")
    not_found: Duration | None = Field(None, description="Age of a result without a match; null: never.")


class Policy(StrictModel):
    """Ages of results, retries and waiting times."""

    result_ttl: Duration = Field(timedelta(hours=24), description="How long Databar keeps a result.")
    refresh: Refresh = Field(Refresh(), description="Request older results again; default: never.")
    max_attempts: Annotated[int, Field(ge=1)] = Field(
        3, description="Maximum number of times that a request is sent while its tasks fail without a charge."
    )
    patience: Duration = Field(
        timedelta(hours=1), description="Stop waiting for a task after this long; the next run collects it."
    )


class Dispatch(StrictModel):
    """How requests are sent: one or many per task."""

    bulk: Annotated[int, Field(ge=2, le=1000)] | None = Field(
        None, description="Maximum requests per task: fewer calls, but no price and no error per row; null: one."
    )


class Caps(StrictModel):
    """Per-group limit: how many leads with the same value are sent. Leads that were sent before count first."""

    by: Text = Field(description="A param or a column; rows where it is blank are not limited.")
    max: Annotated[int, Field(ge=1)] = Field(description="Maximum number of leads with the same value.")


class Canary(StrictModel):
    """Send the first requests alone, and the rest only if enough of them are matches."""

    rows: Annotated[int, Field(ge=1)] = Field(description="How many requests are sent first.")
    min_hit_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        description="Minimum share of matches among them for the rest to be sent."
    )


class Changes(Output):
    """The change feed."""

    path: PathText = Field(description="The file for values that are new since the last feed; strftime codes allowed.")
    key: Columns | None = Field(
        None, description="Columns that identify a lead in your CRM; default: the columns of the params."
    )


class Report(StrictModel):
    """The report page of the job."""

    path: PathText | None = Field(
        None, description="The .html file that each run writes; strftime codes allowed; default: none."
    )
    by: Columns = Field([], description="Columns of the input by which the report groups the rows.")

    @model_validator(mode="after")
    def _check_not_empty(self) -> Report:
        if self.path is None and not self.by:
            raise ValueError("needs `path` or `by`")
        return self


def _check_integer(value: object) -> object:
    if isinstance(value, bool | float):  # equal to a number of the literal
        raise ValueError("must be a whole number")  # noqa: TRY004 - pydantic reports a ValueError
    return value


def _expand_path(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class _JobFiles(StrictModel):
    """The beginning of a job file: its version, its name, where it reads and writes."""

    version: Annotated[Literal[1], BeforeValidator(_check_integer)] = Field(
        description="The version of this file format."
    )
    name: Annotated[Text, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = Field(
        None, description="Default: the file's stem."
    )
    input: Annotated[Input, BeforeValidator(_expand_path)] = Field(description="The leads: a path, or an object.")
    output: Annotated[Output, BeforeValidator(_expand_path)] | None = Field(
        None, description="Default: <input stem>_enriched.csv in the folder of the job file."
    )
    ledger: PathText | None = Field(None, description="Default: .enrich/<name>.db in the folder of the job file.")


class JobModel(TargetModel, _JobFiles):
    """A job of enrich: input, target, params, new columns, limits."""

    merge: Literal["fill_empty", "overwrite"] | None = Field(
        None,
        description="Allow `columns` to be columns of the input: fill their blank cells, or overwrite them. "
        "Rows without a match keep their cells.",
    )
    only_if_empty: list[Text] = Field([], description="Send only rows where these input columns are blank.")
    blanks: list[Text] | None = Field(
        None,
        description="Cells with one of these texts are blank for params, only_if_empty and merge: fill_empty; "
        f"default: {' '.join(PLACEHOLDERS)}",
    )
    where: Text | None = Field(
        None, description="Send only these rows: a polars SQL expression over the input columns; cells are text."
    )
    dedupe: bool = Field(default=True, description="Identical requests are sent once; false: one request for each row.")
    order_by: Columns | None = Field(
        None, description="Send the rows with the largest values of these columns first: numbers by size, then text."
    )
    caps: Caps | None = Field(None, description="Per-group limit.")
    canary: Canary | None = Field(None, description="Stop with exit 15 if too few of the first requests are matches.")
    suppress: LocalPathText | None = Field(
        None, description="A file of e-mail addresses and domains, one per line, that are never sent."
    )
    limits: Limits = Limits()
    policy: Policy = Policy()
    dispatch: Dispatch = Dispatch()
    rejects: Annotated[Output, BeforeValidator(_expand_path)] | None = Field(
        None, description="A file for skipped, failed and expired rows, with the reason."
    )
    changes: Annotated[Changes, BeforeValidator(_expand_path)] | None = Field(
        None, description="The change feed, a file: key columns, field, old, new, provider, time."
    )
    report: Annotated[Report, BeforeValidator(_expand_path)] | None = Field(
        None, description="The report: a path, or an object."
    )
    metrics: LocalPathText | None = Field(None, description="A .prom file for the textfile collector of Prometheus.")
    healthcheck: Url | None = Field(
        None, description="A URL that is pinged at the start (/start), after a success, and after a failure (/fail)."
    )
    notify: LocalPathText | None = Field(
        None, description="A file of Apprise URLs, one per line, for notifications when action is required."
    )

    @property
    def placeholders(self) -> frozenset[str]:
        """The cells that are blank although they have a text."""
        return frozenset(map(clean, PLACEHOLDERS if self.blanks is None else self.blanks)).union(EMPTY_VALUES)


class StepLimits(StrictModel):
    """Limits of one step of a run."""

    max_credits: Credits | None = Field(
        None, description="Maximum spend of this step in a run, within that of the job; null: that of the job."
    )


class StepModel(TargetModel):
    """One of several requests per lead. It can use the columns of the input and of earlier steps."""

    name: Annotated[Text, Field(pattern=r"^[a-z][a-z0-9_]*$")] = Field(
        description="In lower case; the output has the columns `enrich_<name>_status` and others."
    )
    where: Text | None = Field(None, description="Send only these rows: a polars SQL expression; cells are text.")
    only_if_empty: list[Text] = Field([], description="Send only rows where these columns are blank.")
    canary: Canary | None = Field(None, description="Default: that of the job.")
    policy: Policy = Field(Policy(), description="Its keys replace those of the job.")
    dispatch: Dispatch = Field(Dispatch(), description="Default: that of the job.")
    limits: StepLimits = StepLimits()


class SteppedJobModel(JobModel):
    """A job with several requests per lead."""

    steps: Annotated[list[StepModel], Field(min_length=1)] = Field(
        description="Several requests per lead, one step after the other, instead of one target."
    )
    complete: Columns | None = Field(
        None, description="A lead is found if each of these columns has a value; default: those of the last step."
    )
    waterfall: Text | None = None
    params: dict[Text, Param] = Field({})

    @field_validator(*TargetModel.model_fields, mode="before")
    @classmethod
    def _check_level(cls, _: object, info: ValidationInfo) -> object:
        raise ValueError(f"is a key of each step: put `{info.field_name}` into `steps`")


def step_column(step: str, field: str) -> str:
    """Return the column of the output with a field of a step (one of STEP_FIELDS)."""
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


def json_schema() -> dict[str, Any]:
    """Return the job file's JSON Schema, for editors."""
    schema, stepped = JobModel.model_json_schema(), SteppedJobModel.model_json_schema()
    text = {"type": "string", "minLength": 1}
    defs, properties = schema["$defs"] | stepped["$defs"], schema["properties"]
    properties |= {name: stepped["properties"][name] for name in ("steps", "complete")}
    schema["$defs"] = defs
    for name in ("Input", "Output", "Changes", "Report"):
        defs[name] = {"anyOf": [text, defs[name]]}
    param, source = defs["Param"], defs.pop("Source")
    del param["properties"][SOURCES_KEY]
    column = param["properties"]["column"]
    sources = {"type": "array", "minItems": 1, "items": {"anyOf": [*column["anyOf"], source]}}
    defs["Param"] = {"anyOf": [text, sources, param]}
    # A job has one target, or steps.
    schema["required"] = [name for name in schema["required"] if name not in TargetModel.model_fields]
    forms = [{"required": [kind.value, "params"]} for kind in TargetKind]
    one_form = {"oneOf": [*forms, {"required": ["steps"]}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, **one_form}
