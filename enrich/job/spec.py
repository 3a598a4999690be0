"""The model of the job file, and its JSON Schema."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from enrich.job.locations import Format, format_of, separator_of

#: Maximum number of credits. In millionths it still fits into the ledger's 64-bit integers.
MAX_CREDITS = 1e12

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def parse_duration(value: object) -> timedelta:
    """Parse a duration such as `90d`, `24h`, `1h30m` or `45s`. Raises ValueError."""
    match = _DURATION.fullmatch(value.replace(" ", "")) if isinstance(value, str) else None
    if match is None or not any(match.groups()):
        raise ValueError("a duration is a number with its unit: 90d, 24h, 30m or 45s")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    try:
        return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    except OverflowError as error:
        raise ValueError("this duration is too long") from error


def check_text(value: object) -> object:
    """Raise ValueError if YAML converted an unquoted text to another type, such as a number or a date."""
    if isinstance(value, bool | int | float | date | datetime) or value is None:
        raise ValueError(f"must be text, but YAML reads it as {_yaml_type_name(value)}: put it in quotes")
    return value


def _yaml_type_name(value: object) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", type(None): "nothing"}
    return kinds.get(type(value), "a date")


def _check_credits(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value <= MAX_CREDITS:
        raise ValueError("must be a number of credits")
    return value


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [check_text(value)]


def _check_separator(value: str) -> str:
    if len(value) != 1 or value in '"\r\n\0':
        raise ValueError('must be one character, such as "," or ";" or "\\t", and no quote or line end')
    return value


def _check_encoding(value: str) -> str:
    try:
        "a".encode(value)
    except (LookupError, ValueError) as error:
        raise ValueError("no encoding that is known: use a name such as utf-8, cp1252 or utf-16") from error
    return value


def _check_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        _ = parts.port  # raises if the port is not a number
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or not value.isprintable():
        raise ValueError("must be an address that begins with https:// or http://")
    return value


Text = Annotated[str, BeforeValidator(check_text), Field(min_length=1)]
Separator = Annotated[
    str, AfterValidator(_check_separator), WithJsonSchema({"type": "string", "minLength": 1, "maxLength": 1})
]
Encoding = Annotated[Text, AfterValidator(_check_encoding)]
Duration = Annotated[
    timedelta,
    BeforeValidator(parse_duration),
    WithJsonSchema({"type": "string", "pattern": r"^(\d+d)?(\d+h)?(\d+m)?(\d+s)?$", "examples": ["24h", "90d"]}),
]
Credits = Annotated[float, Field(ge=0), BeforeValidator(_check_credits)]
Url = Annotated[Text, AfterValidator(_check_url)]
_TEXT_SCHEMA = {"type": "string", "minLength": 1}
#: One column name or a list of them. The value is always a list.
Columns = Annotated[
    list[Text],
    BeforeValidator(_as_list),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [_TEXT_SCHEMA, {"type": "array", "items": _TEXT_SCHEMA, "minItems": 1}]}),
]


Transform = Literal["trim", "lower", "domain"]


class _StrictModel(BaseModel):
    """Base of all parts of the job file. Unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


def _default_separator(values: dict[str, Any]) -> str:
    return separator_of(values["path"])


def _default_format(values: dict[str, Any]) -> Format:
    return format_of(values["path"]) or "csv"


class Input(_StrictModel):
    """The leads: a file, or several files of one format that are read as one."""

    path: Text = Field(
        description="A file, a folder, a glob such as leads/*.csv, a storage URL such as s3://bucket/leads.csv or "
        "s3://bucket/leads/, or - for stdin; relative to the job file."
    )
    separator: Separator = Field(
        default_factory=_default_separator, description="One character; default: a tab for .tsv, else a comma."
    )
    encoding: Encoding = Field("utf-8", description="As Python names it: utf-8, cp1252, utf-16 …")
    format: Format = Field(
        default_factory=_default_format,
        description="Default: by the path's ending, which .gz may follow; csv where it says nothing.",
    )
    sheet: Text | None = Field(None, description="The sheet of a workbook; default: the first.")

    @model_validator(mode="after")
    def _check_sheet(self) -> Input:
        if self.sheet is not None and self.format != "xlsx":
            raise ValueError("`sheet` is for workbooks: format xlsx")
        return self


class Output(_StrictModel):
    """The enriched file."""

    path: Text = Field(
        description="A .csv, .tsv, .jsonl (each may be followed by .gz), .parquet or .xlsx file, or a storage URL; "
        "the output may be a folder of Parquet parts, as in leads/; strftime codes allowed; relative to the job file."
    )
    separator: Separator = Field(
        default_factory=_default_separator, description="One character; default: a tab for .tsv, else a comma."
    )
    encoding: Encoding = Field("utf-8", description="As Python names it.")


class Param(_StrictModel):
    """Where a param's value comes from: columns of the input, or a constant."""

    columns: Columns = Field(
        [],
        alias="column",
        description="A column, or several: the first that is not blank after the transforms counts.",
    )
    transform: list[Transform] = Field([], description="In this order: trim, lower, domain.")
    value: Annotated[str | None, BeforeValidator(check_text), Field(min_length=1)] = Field(
        None, description="A constant, in quotes."
    )

    @model_validator(mode="after")
    def _check_one_source(self) -> Param:
        if bool(self.columns) == (self.value is not None):
            raise ValueError("needs either `column` or `value`")
        if self.value is not None and self.transform:
            raise ValueError("a constant `value` has no `transform`")
        return self


class Limits(_StrictModel):
    """What the run may use."""

    requests_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Submits and polls together, at most; null: find what the API allows."
    )
    in_flight: Annotated[int, Field(ge=1)] = Field(200, description="Tasks at Databar at once.")
    max_credits: Credits | None = Field(None, description="Credits that one execution may spend; null: no cap.")
    min_balance: Credits | None = Field(None, description="Credits that stay in the account; null: none.")


class Refresh(_StrictModel):
    """When an answer is too old."""

    found: Duration | None = None
    not_found: Duration | None = None


class Policy(_StrictModel):
    """How long things may last and how often they are tried."""

    result_ttl: Duration = Field(timedelta(hours=24), description="How long the API keeps a result.")
    refresh: Refresh = Field(Refresh(), description="Older answers are asked again; default: never.")
    max_attempts: Annotated[int, Field(ge=1)] = Field(
        3, description="A task that failed at no charge is asked again, this often in all."
    )
    patience: Duration = Field(
        timedelta(hours=1), description="A task still running after this no longer holds the run."
    )


class Dispatch(_StrictModel):
    """How requests are sent: each as a task of its own, or many as one."""

    bulk: Annotated[int, Field(ge=2, le=1000)] | None = Field(
        None, description="Up to so many requests as one task: fewer calls, but no price and no error of each row."
    )


class Caps(_StrictModel):
    """How many leads of one group are asked; those of the input that were asked before count first."""

    by: Text = Field(description="A param or a column; rows where it is blank are not capped.")
    max: Annotated[int, Field(ge=1)] = Field(description="So many leads with the same value.")


class Canary(_StrictModel):
    """The first requests are answered and judged before the others are sent."""

    rows: Annotated[int, Field(ge=1)] = Field(description="So many requests are sent first.")
    min_hit_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        description="The others are sent when at least this share of them found something."
    )


class Changes(Output):
    """The change feed."""

    path: Text = Field(description="The file for what is new since the last feed; strftime codes allowed.")
    key: Columns | None = Field(
        None, description="Columns that tell a CRM which lead; default: those that are asked with."
    )


class Report(_StrictModel):
    """The report of the job, for people."""

    path: Text | None = Field(
        None, description="The .html file that every run writes at its end; strftime codes allowed; default: none."
    )
    by: Columns = Field([], description="Columns of the input by which the report groups the rows.")

    @model_validator(mode="after")
    def _check_not_empty(self) -> Report:
        if self.path is None and not self.by:
            raise ValueError("needs `path` or `by`")
        return self


def _expand_path(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


def _expand_params(value: object) -> object:
    if isinstance(value, dict):
        return {name: param if isinstance(param, dict) else {"column": param} for name, param in value.items()}
    return value


def _with_short_form(schema: dict[str, Any], short: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"anyOf": [*short, schema]}


class JobModel(_StrictModel):
    """A job of enrich: which leads, which waterfall, which columns go in and come out."""

    version: Literal[1] = Field(description="The version of this file format.")
    name: Annotated[Text, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = Field(
        None, description="Default: the file's stem."
    )
    input: Annotated[Input, BeforeValidator(_expand_path)] = Field(description="The leads: a path, or an object.")
    output: Annotated[Output, BeforeValidator(_expand_path)] | None = Field(
        None, description="Default: <input stem>_enriched.csv beside the job file."
    )
    ledger: Text | None = Field(None, description="Default: .enrich/<name>.db beside the job file.")
    waterfall: Text = Field(description="The waterfall's identifier; `enrich waterfalls` lists them.")
    enrichments: Annotated[list[int], Field(min_length=1)] | None = Field(
        None, description="The providers, in the order they are asked; default: those enabled by default."
    )
    email_verifier: int | None = Field(None, description="A verifier of the waterfall.")
    params: Annotated[dict[Text, Param], BeforeValidator(_expand_params), Field(min_length=1)] = Field(
        description="The waterfall's params: a column, or an object."
    )
    columns: Annotated[dict[Text, Text], Field(min_length=1)] | None = Field(
        None, description="New column: field of the result (dotted path); default: the waterfall's output fields."
    )
    merge: Literal["fill_empty", "overwrite"] | None = Field(
        None,
        description="Let `columns` name columns of the input: fill their blank cells, or overwrite them. "
        "Where nothing was found they stay as they are.",
    )
    only_if_empty: list[Text] = Field([], description="Ask only for rows where these input columns are blank.")
    where: Text | None = Field(None, description="A polars SQL expression over the input columns; cells are text.")
    dedupe: bool = Field(
        default=True, description="Equal questions are paid once; false: one run for every row, literally."
    )
    order_by: Columns | None = Field(
        None, description="Ask the rows with the largest values of these columns first: numbers by size, else text."
    )
    caps: Caps | None = Field(None, description="Ask at most so many leads of one group.")
    canary: Canary | None = Field(None, description="Stop with exit 15 when the first answers look wrong.")
    suppress: Text | None = Field(
        None, description="A file of e-mail addresses and domains, one a line, that are never sent."
    )
    limits: Limits = Limits()
    policy: Policy = Policy()
    dispatch: Dispatch = Dispatch()
    rejects: Annotated[Output, BeforeValidator(_expand_path)] | None = Field(
        None, description="A file for the rows that are invalid, failed or expired, with the reason."
    )
    changes: Annotated[Changes, BeforeValidator(_expand_path)] | None = Field(
        None, description="A file for what is new since the last one: key columns, field, old, new, provider, time."
    )
    report: Annotated[Report, BeforeValidator(_expand_path)] | None = Field(
        None, description="The report: a path, or an object."
    )
    metrics: Text | None = Field(None, description="A .prom file for the textfile collector of Prometheus.")
    healthcheck: Url | None = Field(
        None, description="Is pinged at the start (/start), after a success, and after a failure (/fail)."
    )
    notify: Text | None = Field(
        None, description="A file of Apprise URLs, one a line, that are told when something needs a person."
    )


def json_schema() -> dict[str, Any]:
    """Return the job file's JSON Schema, for editors."""
    schema = JobModel.model_json_schema()
    text = {"type": "string", "minLength": 1}
    defs, properties = schema["$defs"], schema["properties"]
    defs["Input"] = _with_short_form(defs["Input"], [text])
    defs["Output"] = _with_short_form(defs["Output"], [text])
    defs["Changes"] = _with_short_form(defs["Changes"], [text])
    defs["Report"] = _with_short_form(defs["Report"], [text])
    column = defs["Param"]["properties"]["column"]
    defs["Param"] = _with_short_form(defs["Param"], column["anyOf"])
    properties["name"]["description"] = "Default: the file's stem."
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
