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

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from enrich.errors import JobError
from enrich.jobfile import Document

#: The ledger of `--sandbox` lies beside the real one.
SANDBOX_SUFFIX = ".sandbox.db"
OUTPUT_SUFFIXES = (".csv", ".csv.gz", ".parquet")

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def parse_duration(value: object) -> timedelta:
    """Read `90d`, `24h`, `1h30m`, `45s`. Raises ValueError."""
    match = _DURATION.fullmatch(value.replace(" ", "")) if isinstance(value, str) else None
    if match is None or not any(match.groups()):
        raise ValueError("a duration is a number with its unit: 90d, 24h, 30m or 45s")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def _text(value: object) -> object:
    """Refuse what YAML made of a text that had no quotes."""
    if isinstance(value, bool | int | float | date | datetime) or value is None:
        raise ValueError(f"must be text, but YAML reads it as {_yaml_word(value)}: put it in quotes")
    return value


def _yaml_word(value: object) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", type(None): "nothing"}
    return kinds.get(type(value), "a date")


def _credits(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number of credits")  # noqa: TRY004 - pydantic reports ValueErrors
    return value


Text = Annotated[str, BeforeValidator(_text), Field(min_length=1)]
Constant = Annotated[str, BeforeValidator(_text), Field(min_length=1)]
Duration = Annotated[
    timedelta,
    BeforeValidator(parse_duration),
    WithJsonSchema({"type": "string", "pattern": r"^(\d+d)?(\d+h)?(\d+m)?(\d+s)?$", "examples": ["24h", "90d"]}),
]
Transform = Literal["trim", "lower", "domain"]


class _Strict(BaseModel):
    """A part of the job file: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=False)


class Input(_Strict):
    """The CSV (or TSV) of leads."""

    path: Text = Field(description="The file of leads; relative to the job file.")
    separator: Annotated[str, Field(min_length=1, max_length=1)] = Field(",", description="One character.")
    encoding: Text = Field("utf-8", description="As Python names it: utf-8, cp1252, utf-16 …")


class Output(_Strict):
    """The enriched file."""

    path: Text = Field(
        description="A .csv, .csv.gz or .parquet file; strftime codes allowed; relative to the job file."
    )
    separator: Annotated[str, Field(min_length=1, max_length=1)] = Field(",", description="One character.")
    encoding: Text = Field("utf-8", description="As Python names it.")


class Param(_Strict):
    """Where a param's value comes from: columns of the input, or a constant."""

    column: Text | Annotated[list[Text], Field(min_length=1)] | None = Field(
        None, description="A column, or several: the first that is not blank after the transforms counts."
    )
    transform: list[Transform] = Field([], description="In this order: trim, lower, domain.")
    value: Constant | None = Field(None, description="A constant, in quotes.")

    @model_validator(mode="after")
    def _one_source(self) -> Param:
        if (self.column is None) == (self.value is None):
            raise ValueError("needs either `column` or `value`")
        if self.value is not None and self.transform:
            raise ValueError("a constant `value` has no `transform`")
        return self

    @property
    def columns(self) -> list[str]:
        """The columns it reads, in the order in which they are tried."""
        if self.column is None:
            return []
        return [self.column] if isinstance(self.column, str) else list(self.column)


class Limits(_Strict):
    """What the run may use."""

    requests_per_second: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Submits and polls together, at most; null: find what the API allows."
    )
    in_flight: Annotated[int, Field(ge=1)] = Field(200, description="Tasks at Databar at once.")
    max_credits: Annotated[float, BeforeValidator(_credits), Field(ge=0)] | None = Field(
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
        limits = model.limits.model_copy(update={"max_credits": overrides.max_credits})
        model = model.model_copy(update={"limits": limits})
    home = path.resolve().parent
    name = model.name or path.stem
    input_path = _absolute(home, overrides.input.absolute() if overrides.input else model.input.path)
    output = model.output or Output(path=f"{_stem(input_path)}_enriched.csv")
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
    defs["Param"] = _with_short_form(defs["Param"], [text, {"type": "array", "items": text, "minItems": 1}])
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


#: pydantic's words for the branches of a union: no keys of the file.
_BRANCHES = re.compile(r"^(function-.*|constrained-.*|list\[.*|str|nullable.*)$")


def _job_error(document: Document, error: ValidationError) -> JobError:
    """Write all that is wrong, each with its line."""
    lines: dict[str, None] = {}
    hints: list[str] = []
    for problem in error.errors(include_url=False):
        where = [step for step in problem["loc"] if not _BRANCHES.match(str(step))]
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown key"
            if hint := nearest(str(where[-1]), _keys_beside(where)):
                hints.append(hint)
        elif problem["type"] == "missing":
            message = "is missing"
        line = document.line(where)
        lines.setdefault(f"{document.path}:{line}: {_dotted(where)}: {message}")
    return JobError("\n".join(lines), "; ".join(dict.fromkeys(hints)) or None)


def _keys_beside(where: Sequence[str | int]) -> list[str]:
    """Name the keys that are known where an unknown one was found."""
    parts: dict[tuple[str, ...], type[BaseModel]] = {
        (): JobModel,
        ("input",): Input,
        ("output",): Output,
        ("limits",): Limits,
        ("policy",): Policy,
        ("policy", "refresh"): Refresh,
    }
    parent = tuple(map(str, where[:-1]))
    model = Param if parent[:1] == ("params",) else parts.get(parent, JobModel)
    return list(model.model_fields)
