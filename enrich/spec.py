"""The job file: its model, its loading, its errors with line numbers, its JSON Schema."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from enrich.errors import JobError
from enrich.jobfile import Document

#: The ledger of `--sandbox` lies beside the real one.
SANDBOX_SUFFIX = ".sandbox.db"
OUTPUT_SUFFIXES = (".csv", ".csv.gz", ".parquet")

#: What the ledger can hold, in millionths, as a 64-bit integer.
MOST_CREDITS = 1e12

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def parse_duration(value: object) -> timedelta:
    """Read `90d`, `24h`, `1h30m`, `45s`. Raises ValueError."""
    match = _DURATION.fullmatch(value.replace(" ", "")) if isinstance(value, str) else None
    if match is None or not any(match.groups()):
        raise ValueError("a duration is a number with its unit: 90d, 24h, 30m or 45s")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    try:
        return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    except OverflowError as error:
        raise ValueError("this duration is too long") from error


def _text(value: object) -> object:
    """Refuse what YAML made of a text that had no quotes."""
    if isinstance(value, bool | int | float | date | datetime) or value is None:
        raise ValueError(f"must be text, but YAML reads it as {_yaml_word(value)}: put it in quotes")
    return value


def _yaml_word(value: object) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", type(None): "nothing"}
    return kinds.get(type(value), "a date")


def _credits(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value <= MOST_CREDITS:
        raise ValueError("must be a number of credits")
    return value


def _columns(value: object) -> object:
    return value if isinstance(value, list) else [_text(value)]


def _separator(value: str) -> str:
    if len(value) != 1 or value in '"\r\n\0':
        raise ValueError('must be one character, such as "," or ";" or "\\t", and no quote or line end')
    return value


def _encoding(value: str) -> str:
    try:
        "a".encode(value)
    except (LookupError, ValueError) as error:
        raise ValueError("no encoding that is known: use a name such as utf-8, cp1252 or utf-16") from error
    return value


Text = Annotated[str, BeforeValidator(_text), Field(min_length=1)]
Separator = Annotated[
    str, AfterValidator(_separator), WithJsonSchema({"type": "string", "minLength": 1, "maxLength": 1})
]
Encoding = Annotated[Text, AfterValidator(_encoding)]
Duration = Annotated[
    timedelta,
    BeforeValidator(parse_duration),
    WithJsonSchema({"type": "string", "pattern": r"^(\d+d)?(\d+h)?(\d+m)?(\d+s)?$", "examples": ["24h", "90d"]}),
]
Transform = Literal["trim", "lower", "domain"]


class _Strict(BaseModel):
    """A part of the job file: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class Input(_Strict):
    """The CSV (or TSV) of leads."""

    path: Text = Field(description="The file of leads; relative to the job file.")
    separator: Separator = Field(",", description="One character.")
    encoding: Encoding = Field("utf-8", description="As Python names it: utf-8, cp1252, utf-16 …")


class Output(_Strict):
    """The enriched file."""

    path: Text = Field(
        description="A .csv, .csv.gz or .parquet file; strftime codes allowed; relative to the job file."
    )
    separator: Separator = Field(",", description="One character.")
    encoding: Encoding = Field("utf-8", description="As Python names it.")


class Param(_Strict):
    """Where a param's value comes from: columns of the input, or a constant."""

    columns: Annotated[list[Text], BeforeValidator(_columns), Field(min_length=1)] = Field(
        [],
        alias="column",
        description="A column, or several: the first that is not blank after the transforms counts.",
    )
    transform: list[Transform] = Field([], description="In this order: trim, lower, domain.")
    value: Annotated[str | None, BeforeValidator(_text), Field(min_length=1)] = Field(
        None, description="A constant, in quotes."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Param:
        if bool(self.columns) == (self.value is not None):
            raise ValueError("needs either `column` or `value`")
        if self.value is not None and self.transform:
            raise ValueError("a constant `value` has no `transform`")
        return self


class Limits(_Strict):
    """What the run may use."""

    requests_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Submits and polls together, at most; null: find what the API allows."
    )
    in_flight: Annotated[int, Field(ge=1)] = Field(200, description="Tasks at Databar at once.")
    max_credits: Annotated[float, Field(ge=0), BeforeValidator(_credits)] | None = Field(
        None, description="Credits that one execution may spend; null: no cap."
    )


class Refresh(_Strict):
    """When an answer is too old."""

    found: Duration | None = None
    not_found: Duration | None = None


class Policy(_Strict):
    """How long things may last and how often they are tried."""

    result_ttl: Duration = Field(timedelta(hours=24), description="How long the API keeps a result.")
    refresh: Refresh = Field(Refresh(), description="Older answers are asked again; default: never.")
    max_attempts: Annotated[int, Field(ge=1)] = Field(
        3, description="A task that failed at no charge is asked again, this often in all."
    )
    patience: Duration = Field(
        timedelta(hours=1), description="A task still running after this no longer holds the run."
    )


def _short_input(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


def _short_params(value: object) -> object:
    if isinstance(value, dict):
        return {name: param if isinstance(param, dict) else {"column": param} for name, param in value.items()}
    return value


def _with_short_form(schema: dict[str, Any], short: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"anyOf": [*short, schema]}


class JobModel(_Strict):
    """A job of enrich: which leads, which waterfall, which columns go in and come out."""

    version: Literal[1] = Field(description="The version of this file format.")
    name: Annotated[Text, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = Field(
        None, description="Default: the file's stem."
    )
    input: Annotated[Input, BeforeValidator(_short_input)] = Field(description="The leads: a path, or an object.")
    output: Annotated[Output, BeforeValidator(_short_input)] | None = Field(
        None, description="Default: <input stem>_enriched.csv beside the job file."
    )
    ledger: Text | None = Field(None, description="Default: .enrich/<name>.db beside the job file.")
    waterfall: Text = Field(description="The waterfall's identifier; `enrich waterfalls` lists them.")
    enrichments: Annotated[list[int], Field(min_length=1)] | None = Field(
        None, description="The providers, in the order they are asked; default: those enabled by default."
    )
    email_verifier: int | None = Field(None, description="A verifier of the waterfall.")
    params: Annotated[dict[Text, Param], BeforeValidator(_short_params), Field(min_length=1)] = Field(
        description="The waterfall's params: a column, or an object."
    )
    columns: Annotated[dict[Text, Text], Field(min_length=1)] | None = Field(
        None, description="New column: field of the result (dotted path); default: the waterfall's output fields."
    )
    only_if_empty: list[Text] = Field([], description="Ask only for rows where these input columns are blank.")
    where: Text | None = Field(None, description="A polars SQL expression over the input columns; cells are text.")
    dedupe: bool = Field(
        default=True, description="Equal questions are paid once; false: one run for every row, literally."
    )
    limits: Limits = Limits()
    policy: Policy = Policy()


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the command line says instead; its paths are relative to the working directory."""

    input: Path | None = None
    output: Path | None = None
    ledger: Path | None = None
    max_credits: float | None = None
    sandbox: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A job file that was read, its paths resolved."""

    model: JobModel
    document: Document
    name: str
    input: Input
    input_path: Path
    output: Output
    output_base: Path
    ledger_path: Path

    @property
    def max_credits(self) -> float | None:
        """The cap of one execution, in credits."""
        return self.model.limits.max_credits

    def output_path(self, now: datetime) -> Path:
        """The output's path at a local time, which its strftime codes stand for."""
        path = now.strftime(self.output.path) if "%" in self.output.path else self.output.path
        return _absolute(self.output_base, path)

    def error(self, where: Sequence[str | int], message: str, hint: str | None = None) -> JobError:
        """Make an error that names the file, the line and the key."""
        return JobError(f"{self.document.path}:{self.document.line(where)}: {_dotted(where)}: {message}", hint)


def load_job(path: Path, overrides: Overrides | None = None) -> Job:
    """Read a job file. Raises JobError that names the file, the line, the key and the nearest right name."""
    overrides = overrides or Overrides()
    document = Document(path)
    if "api_key" in document.data:
        raise JobError(
            f"{path}:{document.line(['api_key'])}: api_key: a job file holds no key",
            "set DATABAR_API_KEY, or DATABAR_API_KEY_FILE for cron",
        )
    try:
        model = JobModel.model_validate(document.data)
    except ValidationError as error:
        raise _job_error(document, error) from error
    if overrides.max_credits is not None:
        if not 0 <= overrides.max_credits <= MOST_CREDITS:
            raise JobError("--max-credits: must be a number of credits")
        limits = model.limits.model_copy(update={"max_credits": overrides.max_credits})
        model = model.model_copy(update={"limits": limits})
    home = path.resolve().parent
    name = model.name or path.stem
    input_path = _absolute(home, overrides.input.absolute() if overrides.input else model.input.path)
    stem = _stem(input_path).replace("%", "%%")  # a name, and no strftime code
    output = model.output or Output(path=f"{stem}_enriched.csv")
    if overrides.output is not None:
        output = output.model_copy(update={"path": str(overrides.output)})
    ledger = _absolute(home, model.ledger or f".enrich/{name}.db")
    if overrides.sandbox:
        ledger = ledger.with_name(ledger.stem + SANDBOX_SUFFIX)
    job = Job(
        model=model,
        document=document,
        name=name,
        input=model.input,
        input_path=input_path,
        output=output,
        output_base=Path.cwd() if overrides.output else home,
        ledger_path=overrides.ledger.absolute() if overrides.ledger else ledger,
    )
    if not output.path.lower().endswith(OUTPUT_SUFFIXES):
        raise job.error(
            ["output"], f"`{output.path}` is of no type that can be written", f"use {', '.join(OUTPUT_SUFFIXES)}"
        )
    return job


def _absolute(base: Path, path: str | Path) -> Path:
    return Path(os.path.normpath(base / path))


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


def json_schema() -> dict[str, Any]:
    """Return the job file's JSON Schema, for editors."""
    schema = JobModel.model_json_schema()
    text = {"type": "string", "minLength": 1}
    defs, properties = schema["$defs"], schema["properties"]
    defs["Input"] = _with_short_form(defs["Input"], [text])
    defs["Output"] = _with_short_form(defs["Output"], [text])
    several = {"type": "array", "items": text, "minItems": 1}
    column = defs["Param"]["properties"]["column"]
    defs["Param"]["properties"]["column"] = {"anyOf": [text, several], "description": column["description"]}
    defs["Param"] = _with_short_form(defs["Param"], [text, several])
    properties["name"]["description"] = "Default: the file's stem."
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Write a hint with the nearest right name, or with all of them when they are few."""
    names = list(known)
    by_fold = {candidate.casefold(): candidate for candidate in names}
    close = get_close_matches(name.casefold(), by_fold, n=1, cutoff=0.6)
    if close:
        return f"did you mean `{by_fold[close[0]]}`?"
    few = 12
    return f"known: {', '.join(names)}" if 0 < len(names) <= few else None


def _dotted(where: Sequence[str | int]) -> str:
    return ".".join(map(str, where))


#: pydantic's kinds of errors in words of the file.
_MESSAGES = {
    "missing": "is missing",
    "model_type": "must be a mapping of keys",
    "dict_type": "must be a mapping of keys",
    "list_type": "must be a list: [...]",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
}


def _job_error(document: Document, error: ValidationError) -> JobError:
    """Write all that is wrong, in the order of the lines; a single one has its hint apart."""
    found: list[tuple[int, str, str | None]] = []
    for problem in error.errors(include_url=False):
        where = [step for step in problem["loc"] if step != "[key]"]
        message = _MESSAGES.get(problem["type"], problem["msg"].removeprefix("Value error, "))
        hint = None
        if problem["type"] == "extra_forbidden":
            message, hint = "unknown key", nearest(str(where[-1]), _keys_beside(where))
        line = document.line(where)
        found.append((line, f"{document.path}:{line}: {_dotted(where)}: {message}", hint))
    found.sort(key=lambda each: each[0])
    if len(found) == 1:
        return JobError(found[0][1], found[0][2])
    return JobError("\n".join(f"{text}, {hint}" if hint else text for _, text, hint in found))


def _keys_beside(where: Sequence[str | int]) -> list[str]:
    """Name the keys that are known where an unknown one was found."""
    parts: dict[tuple[str, ...], type[BaseModel]] = {
        ("input",): Input,
        ("output",): Output,
        ("limits",): Limits,
        ("policy",): Policy,
        ("policy", "refresh"): Refresh,
    }
    parent = tuple(map(str, where[:-1]))
    model = Param if parent[:1] == ("params",) else parts.get(parent, JobModel)
    return [field.alias or name for name, field in model.model_fields.items()]
