"""A job: its file read and checked, its paths resolved, its errors with line numbers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from enrich.errors import JobError
from enrich.fields import MOST_CREDITS
from enrich.jobfile import Document
from enrich.place import (
    SANDBOX,
    STDIN,
    LedgerPlace,
    Place,
    Postgres,
    Url,
    for_sandbox,
    format_of,
    is_dataset,
    is_pattern,
    locate,
    locate_input,
    locate_ledger,
)
from enrich.spec import Canary, Caps, Changes, Input, JobModel, Limits, Output, Param, Policy, Refresh, Report

_Table = TypeVar("_Table", Input, Output)

#: The ledger of `--sandbox` lies beside the real one.
SANDBOX_SUFFIX = f".{SANDBOX}.db"
OUTPUT_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".parquet", ".xlsx")


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the command line says instead; its paths are relative to the working directory."""

    input: Path | str | None = None
    output: Path | str | None = None
    ledger: Path | str | None = None
    max_credits: float | None = None
    sandbox: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A job file that was read, its paths resolved. `input_path` may be a glob, or STDIN."""

    model: JobModel
    document: Document
    name: str
    input: Input
    input_path: Place
    output: Output
    output_base: Path
    ledger: LedgerPlace

    @property
    def max_credits(self) -> float | None:
        """The cap of one execution, in credits."""
        return self.model.limits.max_credits

    def output_path(self, now: datetime) -> Place:
        """The output's place at a local time, which its strftime codes stand for."""
        return locate(self.output_base, _dated(self.output.path, now))

    def place(self, named: str, now: datetime) -> Place:
        """Find the place of another file of the run, such as `rejects`, at a local time."""
        return locate(self.document.path.resolve().parent, _dated(named, now))

    def feeds(self, now: datetime) -> dict[str, Place]:
        """The files beside the output, by their keys of the job file. Raises JobError when two files are one."""
        taken = self.taken(now)
        return {kind: taken[kind] for kind in ("rejects", "changes") if kind in taken}

    def report_path(self, now: datetime) -> Path | None:
        """The report that every run writes, if any. Raises JobError when it is another file of the job."""
        report = self.model.report
        if report is None or report.path is None:
            return None
        place = self.path(_dated(report.path, now))
        taken = self.taken(now)
        self._check_apart("report", place, taken | {"input": self.input_path})
        self._check_outside("report", place, taken["output"])
        return place

    def taken(self, now: datetime) -> dict[str, Place]:
        """All files of the job but the input and the report. Raises JobError when two are one."""
        model = self.model
        named = {"rejects": model.rejects, "changes": model.changes}
        feeds = {kind: self.place(output.path, now) for kind, output in named.items() if output is not None}
        taken: dict[str, Place] = {"output": self.output_path(now), "the job file": self.document.path}
        if not isinstance(self.ledger, Postgres):
            taken["ledger"] = self.ledger
        taken |= {key: self.path(named) for key in ("suppress", "notify", "metrics") if (named := getattr(model, key))}
        for kind, place in feeds.items():
            self._check_apart(kind, place, taken)
            taken[kind] = place
        for kind, place in taken.items():
            if kind != "output":
                self._check_outside(kind, place, taken["output"])
        return taken

    def _check_apart(self, kind: str, place: Place, taken: Mapping[str, Place]) -> None:
        if other := next((key for key, path in taken.items() if _is_same(place, path)), None):
            raise self.error([kind], f"{place} is written twice: it is `{other}`", "give each file a name of its own")

    def _check_outside(self, kind: str, place: object, output: Place) -> None:
        """Refuse a file of the job in the folder that every run replaces."""
        if not isinstance(place, Path) or not isinstance(output, Path) or not is_dataset(output):
            return
        if place.resolve().is_relative_to(output.resolve()):
            message = f"{output} is replaced as a whole by every run, and has `{kind}` in it"
            raise self.error(["output"], message, "name a folder of its own")

    def path(self, named: str) -> Path:
        """Resolve a path of the job file."""
        return _absolute(self.document.path.resolve().parent, named)

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
    given = _input(model.input, overrides.input)
    input_path = _place(document, "input", Path.cwd() if overrides.input else home, given.path)
    output = model.output or Output(path=f"{_stem(input_path, name)}_enriched.csv")
    if overrides.output is not None:
        output = _elsewhere(output, overrides.output)
    ledger = _ledger(document, overrides, home, model.ledger or f".enrich/{name}.db")
    job = Job(
        model=model,
        document=document,
        name=name,
        input=given,
        input_path=input_path,
        output=output,
        output_base=Path.cwd() if overrides.output else home,
        ledger=ledger,
    )
    _check_written(job, home)
    return job


def _check_written(job: Job, home: Path) -> None:
    """Refuse files to be written that no run can write."""
    model = job.model
    for key, written in (("output", job.output), ("rejects", model.rejects), ("changes", model.changes)):
        if written is None:
            continue
        _place(job.document, key, home, written.path)
        if key == "output" and written.path.endswith("/"):
            if format_of(written.path.rstrip("/")) is not None:
                raise job.error([key], f"`{written.path}`: a folder has no ending of a file", "as in out/leads/")
        elif not written.path.lower().endswith(OUTPUT_SUFFIXES):
            folder = "; for a folder: leads/" if key == "output" else ""
            raise job.error(
                [key],
                f"`{written.path}` is of no type that can be written",
                f"use {', '.join(OUTPUT_SUFFIXES)}{folder}",
            )
    if model.report is not None and model.report.path is not None:
        place = _place(job.document, "report", home, model.report.path)
        if isinstance(place, Url) or place.suffix.lower() not in (".html", ".htm"):
            raise job.error(["report"], f"`{model.report.path}` is no HTML file on this machine", "as in report.html")


def _ledger(document: Document, overrides: Overrides, home: Path, named: str) -> LedgerPlace:
    """Find the ledger. Raises JobError for a URL of no use."""
    given = overrides.ledger
    try:
        if given is not None:
            told = locate_ledger(Path.cwd(), given, home / ".enrich")
            return for_sandbox(told) if overrides.sandbox and isinstance(told, Postgres) else told
        ledger = locate_ledger(home, named, home / ".enrich")
    except ValueError as error:
        where = "--ledger" if given is not None else f"{document.path}:{document.line(['ledger'])}: ledger"
        raise JobError(f"{where}: {error}") from error
    return for_sandbox(ledger) if overrides.sandbox else ledger


def _input(known: Input, path: Path | str | None) -> Input:
    """Take another path from the command line; stdin has the format that the job's input has."""
    if path is None:
        return known
    like = {"format": known.format, "separator": known.separator} if str(path) == str(STDIN) else {}
    return _elsewhere(known, path, **like)


def _elsewhere(known: _Table, path: Path | str, **like: object) -> _Table:
    """Change the path, and with it what followed from its ending."""
    told = known.model_dump(exclude_unset=True)
    if format_of(str(path)) is not None:
        told.pop("format", None)
        told.pop("sheet", None)
    try:
        return type(known).model_validate({**like, **told, "path": str(path)})
    except ValidationError:
        raise JobError(f"`{path}` is no path of a file") from None


def _place(document: Document, key: str, base: Path, named: str) -> Place:
    """Find a place. Raises JobError for a URL of no use."""
    try:
        return locate_input(base, named) if key == "input" else locate(base, named)
    except ValueError as error:
        raise JobError(f"{document.path}:{document.line([key])}: {key}: {error}") from error


def _dated(named: str, now: datetime) -> str:
    return now.strftime(named) if "%" in named else named


def _is_same(one: Place, other: Place) -> bool:
    """Tell whether two places are one, whatever links lead there."""
    if isinstance(one, Path) and isinstance(other, Path):
        return one.resolve() == other.resolve()
    return one == other


def _absolute(base: Path, path: str | Path) -> Path:
    return Path(os.path.normpath(base / path))


def _stem(where: Place, name: str) -> str:
    """Name the output for its input, or for the job when that is several files; a name, and no strftime code."""
    if where == STDIN:
        return "stdin"
    stem = name if is_pattern(where) else where.name.removesuffix(".gz").rsplit(".", 1)[0]
    return stem.replace("%", "%%")


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
        if problem["type"] == "default_factory_not_called":
            continue  # what it follows from is an error of its own
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
        ("rejects",): Output,
        ("changes",): Changes,
        ("caps",): Caps,
        ("canary",): Canary,
        ("report",): Report,
        ("limits",): Limits,
        ("policy",): Policy,
        ("policy", "refresh"): Refresh,
    }
    parent = tuple(map(str, where[:-1]))
    model = Param if parent[:1] == ("params",) else parts.get(parent, JobModel)
    return [field.alias or name for name, field in model.model_fields.items()]
