"""Loads a job: reads and checks its file, resolves its paths, and reports errors with line numbers."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace
from pydantic import ValidationError

from enrich.errors import JobError
from enrich.job.document import YamlDocument, validate_document
from enrich.job.field_types import MAX_CREDITS
from enrich.job.local_files import (
    MAX_JOB_NAME_BYTES,
    inclusion_problem,
    is_same_file,
    real_path,
    why_no_file,
    why_no_ledger,
)
from enrich.job.locations import (
    STDIN,
    InputLocation,
    LedgerLocation,
    Location,
    PostgresLocation,
    default_output_path,
    format_of,
    is_dataset,
    is_sandbox_ledger,
    parse_input_location,
    parse_ledger_location,
    parse_location,
    sandbox_file_name,
    sandbox_ledger_location,
)
from enrich.job.spec import Input, JobModel, Output, SteppedJobModel, step_columns, step_model
from enrich.job.target import TargetModel
from enrich.models import job_title

_Table = TypeVar("_Table", Input, Output)

OUTPUT_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".parquet", ".xlsx")


class Overrides(Struct, frozen=True):
    """Settings of the command line that override the job file. Paths are relative to the working directory."""

    input: Path | str | None = None
    output: Path | str | None = None
    ledger: Path | str | None = None
    max_credits: float | None = None
    sandbox: bool = False


class Job(Struct, frozen=True):
    """A loaded job file with resolved paths. `input_path` can be a glob or STDIN."""

    model: JobModel
    document: YamlDocument
    name: str
    input: Input
    input_path: InputLocation
    output: Output
    output_base: Path
    ledger: LedgerLocation
    #: A sandbox run: its ledger and the files of the job file have their own names.
    sandbox: bool = False
    #: The output is that of the command line (`--output`).
    output_is_given: bool = False
    #: The jobs of the steps; () for a job without `steps`, which is its own only step.
    step_jobs: tuple[Job, ...] = ()
    #: The columns that each complete lead has a value in; (): those of the last step.
    complete: tuple[str, ...] = ()
    #: Of the job of a step: its name, the place of its keys in the file, and what it alone may spend.
    step: str = ""
    key_prefix: tuple[str | int, ...] = ()
    step_max_credits: float | None = None

    @property
    def steps(self) -> tuple[Job, ...]:
        """The steps of the job, in their order. A job without `steps` is one step."""
        return self.step_jobs or (self,)

    @property
    def max_attempts_by_step(self) -> dict[str, int]:
        """`policy.max_attempts` of each step."""
        return {step.step: step.model.policy.max_attempts for step in self.steps}

    @property
    def result_ttl(self) -> timedelta:
        """How long Databar keeps a result; with steps, the shortest time."""
        return min(step.model.policy.result_ttl for step in self.steps)

    @property
    def temporary_name(self) -> str:
        """The part of the names of temporary files that no job with another ledger has in common with this one."""
        return f"{self.name}.{blake2b(os.fsencode(str(self.ledger)), digest_size=3).hexdigest()}"

    @property
    def title(self) -> str:
        """The job's name for people, marked for a sandbox run."""
        return job_title(self.name, sandbox=self.sandbox)

    @property
    def max_credits(self) -> float | None:
        """The budget cap of one run, in credits. None: no cap."""
        return self.model.limits.max_credits

    def output_path(self, now: datetime) -> Location:
        """The location of the output. Its strftime codes are replaced with `now`, a local time."""
        return parse_location(self.output_base, _expand_date(self.output.path, now))

    def location_of(self, path_or_url: str, now: datetime) -> Location:
        """Return the location of another file of the run, such as `rejects`. `now` is a local time."""
        return parse_location(self.document.folder, _expand_date(path_or_url, now))

    def extra_output_paths(self, now: datetime) -> dict[str, Location]:
        """The `rejects` and `changes` files, by their job file keys. Raises JobError if two files are the same."""
        files = self.file_locations(now)
        return {kind: place for kind in ("rejects", "changes") if isinstance(place := files.get(kind), Location)}

    def report_path(self, now: datetime) -> Path | None:
        """The report that every run writes, or None. Raises JobError if two files of the job are the same."""
        report = self.file_locations(now).get("report")
        return report if isinstance(report, Path) else None

    def file_locations(self, now: datetime) -> dict[str, InputLocation]:
        """All files of the job by their keys. Raises JobError if two are the same and one of them is written."""
        files, output = self._locations(now), self.output_path(now)
        names = list(files)
        for kind, location in files.items():
            if kind not in ("the job file", "ledger") and (error := self.name_error(kind, location)) is not None:
                raise error
        for place, kind in enumerate(names):
            if kind in _FILES_READ:
                continue
            for other in names[:place]:
                if is_same_file(files[kind], files[other]):
                    message = f"{files[kind]}: `{kind}` and `{other}` are the same file"
                    raise self.error([kind], message, "give each file its own name")
        for kind, location in files.items():
            if kind not in ("input", "output"):
                self._check_outside_dataset(kind, location, output)
            if kind not in _FILES_READ and (problem := inclusion_problem(self.input_path, location, kind)) is not None:
                raise self.error([kind], *problem)
        return files

    def name_error(self, key: str, location: InputLocation) -> JobError | None:
        """Return an error if no file can have the name that this key of the job file gives. None: one can."""
        reason = why_no_file(location)
        return None if reason is None else self.error([key], f"{location}: {reason}", "choose another name")

    def _locations(self, now: datetime) -> dict[str, InputLocation]:
        """All files of the job by their keys, first those that it reads."""
        model = self.model
        files: dict[str, InputLocation] = {"the job file": self.document.path}
        if self.input_path != STDIN:
            files["input"] = self.input_path
        files |= {key: self.resolve_path(named) for key in ("suppress", "notify") if (named := getattr(model, key))}
        if not isinstance(self.ledger, PostgresLocation):
            files["ledger"] = self.ledger
        if model.metrics:
            files["metrics"] = self.resolve_path(model.metrics)
        files["output"] = self.output_path(now)
        written = {"rejects": model.rejects, "changes": model.changes}
        files |= {kind: self.location_of(output.path, now) for kind, output in written.items() if output is not None}
        if model.report is not None and model.report.path is not None:
            files["report"] = self.resolve_path(_expand_date(model.report.path, now))
        return files

    def check_not_own(self, path: Path, what: str, hint: str = "choose another name", allowed: str = "") -> None:
        """Raise JobError if a file that a command writes has an impossible name, or is one of the job's or its input.

        `what` names the file in messages. It may be the job's file with the key `allowed`.
        """
        if reason := why_no_file(path):
            raise JobError(f"{path}: the {what} cannot be written: {reason}", hint)
        for key, place in self._locations(datetime.now().astimezone()).items():
            if key != allowed and is_same_file(path, place):
                raise JobError(f"{path}: the {what} would replace `{key}` of the job", hint)
        if (problem := inclusion_problem(self.input_path, path, what)) is not None:
            raise JobError(problem[0], hint)

    def _check_outside_dataset(self, kind: str, location: object, output: Location) -> None:
        """Raise JobError if a file of the job is in the output folder, which every run replaces."""
        if not isinstance(location, Path) or not isinstance(output, Path) or not is_dataset(output):
            return
        if real_path(location).is_relative_to(real_path(output)):
            message = f"{output} is replaced by every run, and contains `{kind}`"
            raise self.error(["output"], message, "choose a separate folder")

    def resolve_path(self, path: str) -> Path:
        """Resolve a path that is relative to the folder of the job file."""
        return Path(os.path.normpath(self.document.folder / path))

    def error(self, key_path: Sequence[str | int], message: str, hint: str | None = None) -> JobError:
        """Return a JobError that names the job file, the line and the key."""
        if self.key_prefix:
            steps, index = self.key_prefix
            # The other keys of a step's model stand at the job.
            if key_path[0] in TargetModel.model_fields or key_path[0] in self.document.data[steps][index]:
                key_path = [*self.key_prefix, *key_path]
        return JobError(f"{self.document.place_of(key_path)}: {message}", hint)


#: The files that a run only reads. Two of them may be the same.
_FILES_READ = ("the job file", "input", "suppress", "notify")
#: The codes of strftime that mean the same on every system, except those that put a line break or a slash into a name.
_DATE_CODES = frozenset(f"%{letter}" for letter in "aAbBcCdeFGgHIjklmMpPsSTuUVwWXyYzZ%")


def load_job(path: Path, overrides: Overrides | None = None) -> Job:
    """Load a job file. Raises JobError that names the file, line and key, and for an unknown key the closest match."""
    overrides = overrides or Overrides()
    if str(path) != str(path).encode(errors="replace").decode():
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise JobError(f"{shown}: the name of the job file is not UTF-8 text", "rename it")
    document = YamlDocument(path)
    model = validate_document(document)
    given = {"input": overrides.input, "output": overrides.output, "ledger": overrides.ledger}
    document.replaced_keys = frozenset(key for key, value in given.items() if value is not None)
    if overrides.max_credits is not None:
        if not 0 <= overrides.max_credits <= MAX_CREDITS:
            raise JobError("--max-credits: must be a number of credits")
        limits = model.limits.model_copy(update={"max_credits": overrides.max_credits})
        model = model.model_copy(update={"limits": limits})
    name = model.name or path.stem
    if len(os.fsencode(name)) > MAX_JOB_NAME_BYTES:
        message = f"{document.place_of(['name'])}: the job's name is too long"
        raise JobError(message, f"set `name:` to at most {MAX_JOB_NAME_BYTES} characters")
    if overrides.sandbox:
        model = _with_sandbox_names(model)
    input_settings = _override_input(model.input, overrides.input)
    input_base = Path.cwd() if overrides.input else document.folder
    input_path = _checked_location(document, "input", input_base, input_settings.path)
    output = model.output or Output(path=default_output_path(input_path, name, sandbox=overrides.sandbox))
    if overrides.output is not None:
        output = _with_path(output, overrides.output)
    ledger = _ledger_location(document, overrides, model.ledger or f".enrich/{name}.db")
    job = Job(
        model=model,
        document=document,
        name=name,
        input=input_settings,
        input_path=input_path,
        output=output,
        output_base=Path.cwd() if overrides.output else document.folder,
        ledger=ledger,
        sandbox=overrides.sandbox,
        output_is_given=overrides.output is not None,
    )
    _check_outputs(job)
    return _with_steps(job, model) if isinstance(model, SteppedJobModel) else job


def _with_steps(job: Job, model: SteppedJobModel) -> Job:
    """Add the jobs of the steps. Raises JobError if they cannot go together."""
    _check_steps(job, model)
    step_jobs = [
        replace(
            job,
            model=step_model(model, step),
            step=step.name,
            key_prefix=("steps", index),
            step_max_credits=step.limits.max_credits,
        )
        for index, step in enumerate(model.steps)
    ]
    return replace(job, step_jobs=tuple(step_jobs), complete=tuple(model.complete or ()))


def _check_steps(job: Job, model: SteppedJobModel) -> None:
    """Raise JobError for names, columns and keys that cannot go together, as far as the job file alone shows it."""
    names: set[str] = set()
    step_of_column: dict[str, str] = {}
    for index, step in enumerate(model.steps):
        name_key, hint = ("steps", index, "name"), "choose another name"
        if step.name in names:
            raise job.error(name_key, f"another step is named `{step.name}`", hint)
        names.add(step.name)
        for column in step_columns(step.name):
            if (other := step_of_column.setdefault(column, step.name)) != step.name:
                message = f"the steps `{other}` and `{step.name}` would both write `{column}`"
                raise job.error(name_key, message, hint)
    for index, step in enumerate(model.steps):
        for column in step.columns or ():
            if column in step_of_column:
                message = f"`{column}` is a column of the step `{step_of_column[column]}`"
                raise job.error(["steps", index, "columns", column], message, "choose another name")
    if model.changes is not None and model.changes.key is None:
        hint = "set the input columns that identify a lead: changes: {path: …, key: Email}"
        raise job.error(["changes"], "a job with steps needs a `key`", hint)


def _check_outputs(job: Job) -> None:
    """Raise JobError for an output, rejects, changes, report or metrics file that no run can write."""
    model = job.model
    for key, written in (("output", job.output), ("rejects", model.rejects), ("changes", model.changes)):
        if written is None:
            continue
        _checked_location(job.document, key, job.document.folder, written.path)
        _check_date_codes(job, key, written.path)
        if key == "output" and written.path.endswith("/"):
            if format_of(written.path.rstrip("/")) is not None:
                raise job.error([key], f"`{written.path}`: a folder must not have a file extension", "as in out/leads/")
        elif not written.path.lower().endswith(OUTPUT_SUFFIXES):
            folder = "; for a folder: leads/" if key == "output" else ""
            raise job.error(
                [key], f"`{written.path}` has an unsupported file type", f"use {', '.join(OUTPUT_SUFFIXES)}{folder}"
            )
    if model.report is not None and model.report.path is not None:
        _check_date_codes(job, "report", model.report.path)
        location = _checked_location(job.document, "report", job.document.folder, model.report.path)
        if not isinstance(location, Path) or location.suffix.lower() not in (".html", ".htm"):
            raise job.error(
                ["report"], f"`{model.report.path}` is not an HTML file on this machine", "as in report.html"
            )
    if model.metrics is not None and not model.metrics.endswith(".prom"):
        message = f"`{model.metrics}` is not read by the textfile collector, which reads *.prom only"
        raise job.error(["metrics"], message, "rename it to end in .prom")


def _check_date_codes(job: Job, key: str, path: str) -> None:
    """Raise JobError for a `%` that is no strftime code: systems differ in what they make of it."""
    unknown = next((code for code in re.findall(r"%.?", path, re.DOTALL) if code not in _DATE_CODES), None)
    if unknown is not None:
        hint = f"use codes such as %Y-%m-%d, and write `%%` for a percent sign: {path.replace('%', '%%')}"
        raise job.error([key], f"`{path}`: `{unknown}` is no date code for the name of a file", hint)


def _ledger_location(document: YamlDocument, overrides: Overrides, path_or_url: str) -> LedgerLocation:
    """Return the location of the ledger. Raises JobError for an unusable URL."""
    given, local_folder = overrides.ledger, document.folder / ".enrich"
    try:
        if given is not None:
            ledger = parse_ledger_location(Path.cwd(), given, local_folder)
            if isinstance(ledger, Path) and is_sandbox_ledger(ledger) and why_no_file(ledger) is None:
                return ledger  # the sandbox's own ledger was named
        else:
            ledger = parse_ledger_location(document.folder, path_or_url, local_folder)
        if reason := why_no_ledger(ledger):
            raise ValueError(f"{ledger}: {reason}")
    except ValueError as error:
        raise JobError(f"{document.place_of(['ledger'])}: {error}") from error
    # What exists and is no file (a folder, device or pipe) is refused when it is opened, with the name that was given.
    is_no_file = isinstance(ledger, Path) and os.path.lexists(ledger) and not os.path.isfile(ledger)  # noqa: PTH113 - as in local_files
    return sandbox_ledger_location(ledger) if overrides.sandbox and not is_no_file else ledger


def _with_sandbox_names(model: JobModel) -> JobModel:
    """Give the files that a run writes the names of a sandbox run, so that it replaces none of a real run."""
    written = {key: getattr(model, key) for key in ("output", "rejects", "changes", "report")}
    renamed = {
        key: file.model_copy(update={"path": sandbox_file_name(file.path)})
        for key, file in written.items()
        if file is not None and file.path is not None
    }
    return model.model_copy(update=renamed)


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
        raise JobError(f"`{path}` is not the path of a file") from None


def _checked_location(document: YamlDocument, key: str, base: Path, path_or_url: str) -> InputLocation:
    """Parse a path or URL of the job file. Raises JobError for an unusable URL."""
    try:
        return parse_input_location(base, path_or_url) if key == "input" else parse_location(base, path_or_url)
    except ValueError as error:
        raise JobError(f"{document.place_of([key])}: {error}") from error


def _expand_date(path: str, now: datetime) -> str:
    return now.strftime(path) if "%" in path else path
