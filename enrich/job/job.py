"""Loads a job: reads and checks its file, resolves its paths, and reports errors with line numbers."""

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
from enrich.job.locations import (
    SANDBOX_NAME,
    STDIN,
    LedgerLocation,
    Location,
    ObjectUrl,
    PostgresLocation,
    format_of,
    is_dataset,
    is_pattern,
    parse_input_location,
    parse_ledger_location,
    parse_location,
    sandbox_ledger_location,
)
from enrich.job.spec import (
    MAX_CREDITS,
    Canary,
    Caps,
    Changes,
    Input,
    JobModel,
    Limits,
    Output,
    Param,
    Policy,
    Refresh,
    Report,
)
from enrich.job.yaml_file import YamlDocument

_Table = TypeVar("_Table", Input, Output)

#: File name suffix of the `--sandbox` ledger, which is in the same folder as the real one.
SANDBOX_SUFFIX = f".{SANDBOX_NAME}.db"
OUTPUT_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".parquet", ".xlsx")


@dataclass(frozen=True, slots=True)
class Overrides:
    """Settings of the command line that override the job file. Paths are relative to the working directory."""

    input: Path | str | None = None
    output: Path | str | None = None
    ledger: Path | str | None = None
    max_credits: float | None = None
    sandbox: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A loaded job file with resolved paths. `input_path` can be a glob or STDIN."""

    model: JobModel
    document: YamlDocument
    name: str
    input: Input
    input_path: Location
    output: Output
    output_base: Path
    ledger: LedgerLocation

    @property
    def max_credits(self) -> float | None:
        """The budget cap of one run, in credits. None: no cap."""
        return self.model.limits.max_credits

    def output_path(self, now: datetime) -> Location:
        """The location of the output. Its strftime codes are replaced with `now`, a local time."""
        return parse_location(self.output_base, _expand_date(self.output.path, now))

    def location_of(self, path_or_url: str, now: datetime) -> Location:
        """Return the location of another file of the run, such as `rejects`. `now` is a local time."""
        return parse_location(self.document.path.resolve().parent, _expand_date(path_or_url, now))

    def extra_output_paths(self, now: datetime) -> dict[str, Location]:
        """The `rejects` and `changes` files, by their job file keys. Raises JobError if two files are the same."""
        files = self.file_locations(now)
        return {kind: files[kind] for kind in ("rejects", "changes") if kind in files}

    def report_path(self, now: datetime) -> Path | None:
        """The report that every run writes, or None. Raises JobError if it is another file of the job."""
        report = self.model.report
        if report is None or report.path is None:
            return None
        path = self.resolve_path(_expand_date(report.path, now))
        files = self.file_locations(now)
        self._check_distinct("report", path, files | {"input": self.input_path})
        self._check_outside_dataset("report", path, files["output"])
        return path

    def file_locations(self, now: datetime) -> dict[str, Location]:
        """All files of the job except the input and the report. Raises JobError if two are the same."""
        model = self.model
        named = {"rejects": model.rejects, "changes": model.changes}
        extra_outputs = {
            kind: self.location_of(output.path, now) for kind, output in named.items() if output is not None
        }
        files: dict[str, Location] = {"output": self.output_path(now), "the job file": self.document.path}
        if not isinstance(self.ledger, PostgresLocation):
            files["ledger"] = self.ledger
        files |= {
            key: self.resolve_path(named) for key in ("suppress", "notify", "metrics") if (named := getattr(model, key))
        }
        for kind, location in extra_outputs.items():
            self._check_distinct(kind, location, files)
            files[kind] = location
        for kind, location in files.items():
            if kind != "output":
                self._check_outside_dataset(kind, location, files["output"])
        return files

    def _check_distinct(self, kind: str, location: Location, files: Mapping[str, Location]) -> None:
        if other := next((key for key, path in files.items() if _is_same(location, path)), None):
            raise self.error(
                [kind], f"{location} is written twice: it is `{other}`", "give each file a name of its own"
            )

    def _check_outside_dataset(self, kind: str, location: object, output: Location) -> None:
        """Raise JobError if a file of the job is in the output folder, which every run replaces."""
        if not isinstance(location, Path) or not isinstance(output, Path) or not is_dataset(output):
            return
        if location.resolve().is_relative_to(output.resolve()):
            message = f"{output} is replaced as a whole by every run, and has `{kind}` in it"
            raise self.error(["output"], message, "name a folder of its own")

    def resolve_path(self, path: str) -> Path:
        """Resolve a path that is relative to the folder of the job file."""
        return _absolute_path(self.document.path.resolve().parent, path)

    def error(self, key_path: Sequence[str | int], message: str, hint: str | None = None) -> JobError:
        """Return a JobError that names the job file, the line and the key."""
        return JobError(
            f"{self.document.path}:{self.document.line_of(key_path)}: {_dotted_path(key_path)}: {message}", hint
        )


def load_job(path: Path, overrides: Overrides | None = None) -> Job:
    """Load a job file. Raises JobError that names the file, line and key, and for an unknown key the closest match."""
    overrides = overrides or Overrides()
    document = YamlDocument(path)
    if "api_key" in document.data:
        raise JobError(
            f"{path}:{document.line_of(['api_key'])}: api_key: a job file holds no key",
            "set DATABAR_API_KEY, or DATABAR_API_KEY_FILE for cron",
        )
    try:
        model = JobModel.model_validate(document.data)
    except ValidationError as error:
        raise _from_validation_error(document, error) from error
    if overrides.max_credits is not None:
        if not 0 <= overrides.max_credits <= MAX_CREDITS:
            raise JobError("--max-credits: must be a number of credits")
        limits = model.limits.model_copy(update={"max_credits": overrides.max_credits})
        model = model.model_copy(update={"limits": limits})
    job_folder = path.resolve().parent
    name = model.name or path.stem
    input_settings = _override_input(model.input, overrides.input)
    input_path = _checked_location(
        document, "input", Path.cwd() if overrides.input else job_folder, input_settings.path
    )
    output = model.output or Output(path=f"{_default_stem(input_path, name)}_enriched.csv")
    if overrides.output is not None:
        output = _with_path(output, overrides.output)
    ledger = _ledger_location(document, overrides, job_folder, model.ledger or f".enrich/{name}.db")
    job = Job(
        model=model,
        document=document,
        name=name,
        input=input_settings,
        input_path=input_path,
        output=output,
        output_base=Path.cwd() if overrides.output else job_folder,
        ledger=ledger,
    )
    _check_outputs(job, job_folder)
    return job


def _check_outputs(job: Job, job_folder: Path) -> None:
    """Raise JobError for an output, rejects, changes or report file that no run can write."""
    model = job.model
    for key, written in (("output", job.output), ("rejects", model.rejects), ("changes", model.changes)):
        if written is None:
            continue
        _checked_location(job.document, key, job_folder, written.path)
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
        location = _checked_location(job.document, "report", job_folder, model.report.path)
        if isinstance(location, ObjectUrl) or location.suffix.lower() not in (".html", ".htm"):
            raise job.error(["report"], f"`{model.report.path}` is no HTML file on this machine", "as in report.html")


def _ledger_location(
    document: YamlDocument, overrides: Overrides, job_folder: Path, path_or_url: str
) -> LedgerLocation:
    """Return the location of the ledger. Raises JobError for an unusable URL."""
    given = overrides.ledger
    try:
        if given is not None:
            location = parse_ledger_location(Path.cwd(), given, job_folder / ".enrich")
            return (
                sandbox_ledger_location(location)
                if overrides.sandbox and isinstance(location, PostgresLocation)
                else location
            )
        ledger = parse_ledger_location(job_folder, path_or_url, job_folder / ".enrich")
    except ValueError as error:
        option_or_key = "--ledger" if given is not None else f"{document.path}:{document.line_of(['ledger'])}: ledger"
        raise JobError(f"{option_or_key}: {error}") from error
    return sandbox_ledger_location(ledger) if overrides.sandbox else ledger


def _override_input(settings: Input, path: Path | str | None) -> Input:
    """Replace the input path with one from the command line. Stdin keeps the format of the job's input."""
    if path is None:
        return settings
    stdin_settings = {"format": settings.format, "separator": settings.separator} if str(path) == str(STDIN) else {}
    return _with_path(settings, path, **stdin_settings)


def _with_path(settings: _Table, path: Path | str, **defaults: object) -> _Table:
    """Change the path, and the settings derived from its file extension."""
    explicit = settings.model_dump(exclude_unset=True)
    if format_of(str(path)) is not None:
        explicit.pop("format", None)
        explicit.pop("sheet", None)
    try:
        return type(settings).model_validate({**defaults, **explicit, "path": str(path)})
    except ValidationError:
        raise JobError(f"`{path}` is no path of a file") from None


def _checked_location(document: YamlDocument, key: str, base: Path, path_or_url: str) -> Location:
    """Parse a path or URL of the job file. Raises JobError for an unusable URL."""
    try:
        return parse_input_location(base, path_or_url) if key == "input" else parse_location(base, path_or_url)
    except ValueError as error:
        raise JobError(f"{document.path}:{document.line_of([key])}: {key}: {error}") from error


def _expand_date(path: str, now: datetime) -> str:
    return now.strftime(path) if "%" in path else path


def _is_same(one: Location, other: Location) -> bool:
    """Check whether two locations are the same file, also through links."""
    if isinstance(one, Path) and isinstance(other, Path):
        return one.resolve() == other.resolve()
    return one == other


def _absolute_path(base: Path, path: str | Path) -> Path:
    return Path(os.path.normpath(base / path))


def _default_stem(location: Location, name: str) -> str:
    """Return the default stem of the output: that of the input, or the job name if the input is several files.

    `%` is doubled, so that it is not read as a strftime code.
    """
    if location == STDIN:
        return "stdin"
    stem = name if is_pattern(location) else location.name.removesuffix(".gz").rsplit(".", 1)[0]
    return stem.replace("%", "%%")


def suggest_name(name: str, known: Iterable[str]) -> str | None:
    """Return a hint with the closest known name, or with all known names if they are few. None: no hint."""
    names = list(known)
    by_fold = {candidate.casefold(): candidate for candidate in names}
    close = get_close_matches(name.casefold(), by_fold, n=1, cutoff=0.6)
    if close:
        return f"did you mean `{by_fold[close[0]]}`?"
    max_listed = 12
    return f"known: {', '.join(names)}" if 0 < len(names) <= max_listed else None


def _dotted_path(key_path: Sequence[str | int]) -> str:
    return ".".join(map(str, key_path))


#: Messages for pydantic's error types, in terms of the job file.
_ERROR_MESSAGES = {
    "missing": "is missing",
    "model_type": "must be a mapping of keys",
    "dict_type": "must be a mapping of keys",
    "list_type": "must be a list: [...]",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
}


def _from_validation_error(document: YamlDocument, error: ValidationError) -> JobError:
    """Combine all validation errors, sorted by line. A single error has its hint as a separate text."""
    found: list[tuple[int, str, str | None]] = []
    for problem in error.errors(include_url=False):
        key_path = [step for step in problem["loc"] if step != "[key]"]
        if problem["type"] == "default_factory_not_called":
            continue  # the field it depends on has its own error
        message = _ERROR_MESSAGES.get(problem["type"], problem["msg"].removeprefix("Value error, "))
        hint = None
        if problem["type"] == "extra_forbidden":
            message, hint = "unknown key", suggest_name(str(key_path[-1]), _sibling_keys(key_path))
        line = document.line_of(key_path)
        found.append((line, f"{document.path}:{line}: {_dotted_path(key_path)}: {message}", hint))
    found.sort(key=lambda each: each[0])
    if len(found) == 1:
        return JobError(found[0][1], found[0][2])
    return JobError("\n".join(f"{text}, {hint}" if hint else text for _, text, hint in found))


def _sibling_keys(key_path: Sequence[str | int]) -> list[str]:
    """List the valid keys at the place of an unknown key."""
    models: dict[tuple[str, ...], type[BaseModel]] = {
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
    parent = tuple(map(str, key_path[:-1]))
    model = Param if parent[:1] == ("params",) else models.get(parent, JobModel)
    return [field.alias or name for name, field in model.model_fields.items()]
