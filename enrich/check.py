"""`enrich check`: everything that can be said of a job before it runs. Looks only, and without network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from enrich.database import CHECKED_AT_START, RESTORE
from enrich.drift import differences
from enrich.errors import PRECEDENCE, EnrichError, Exit, JobError, Refused
from enrich.job import Job
from enrich.ledger import Ledger
from enrich.question import Question, make_question, missing_params, unknown_params
from enrich.records import check as check_ledger
from enrich.rows import Rows
from enrich.snapshot import DOCUMENTED, READ_ON
from enrich.spec import Param
from enrich.template import PLACEHOLDER
from enrich.waterfall import Field, Waterfall


@dataclass(slots=True)
class Checked:
    """What was found. `asking` of the `rows` ask something; both None when the input could not be read.

    `source` says where the waterfall's description comes from, `changes` what the vendor changed.
    """

    source: str
    problems: list[EnrichError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    question: Question | None = None
    rows: int | None = None
    asking: int | None = None

    @property
    def exit_code(self) -> Exit:
        """The exit code that a run would have."""
        held = {problem.exit_code for problem in self.problems}
        return next((code for code in PRECEDENCE if code in held), Exit.OK)


def summary(job: Job, checked: Checked) -> str:
    """Say in one line what is fine."""
    asking = "" if checked.rows is None else f"{checked.rows:,} rows, {checked.asking:,} can be asked, "
    return f"{job.name}: {asking}{job.model.waterfall} as known from {checked.source}"


def as_json(job: Job, checked: Checked) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    problems = [{"message": problem.message, "hint": problem.hint} for problem in checked.problems]
    return {
        "exit_code": int(checked.exit_code),
        "job": job.name,
        "rows": checked.rows,
        "can_be_asked": checked.asking,
        "waterfall": job.model.waterfall,
        "described_by": checked.source,
        "changes": checked.changes,
        "notes": checked.notes,
        "problems": problems,
    } | ({"error": problems[0]["message"]} if problems else {})


def check_job(job: Job, bound_to: Mapping[str, str | None], live: Waterfall | None = None) -> Checked:
    """Check a job as far as possible, all problems at once.

    `bound_to` is what the runs will work with (`api_host`, `workspace`), as far as known; `live` is what the API
    says of the waterfall, None: not asked.
    """
    checked = Checked("")
    remembered: Waterfall | None = None
    providers: list[int] = []
    try:
        remembered, providers = _ledger(job, bound_to)
    except EnrichError as error:
        checked.problems.append(error)
    documented = DOCUMENTED.get(job.model.waterfall)
    waterfall = live or remembered or documented
    checked.source = _source(live, remembered, documented)
    if live and remembered:
        checked.changes = list(differences(remembered, live))
    checked.problems += _unfilled(job)
    rows = _rows(job, checked.problems)
    if waterfall is None:
        checked.notes.append(f"the waterfall `{job.model.waterfall}` is in no documentation: `--online` asks the API")
    elif waterfall is documented:
        checked.problems += missing_params(job, waterfall)
        asks = f"says {checked.source}, which may be out of date: `--online` asks the API"
        checked.notes += [f"{problem.message}, {asks}" for problem in unknown_params(job, waterfall)]
        checked.question = _documented_question(job, waterfall, checked.problems)
    else:
        checked.problems += [*unknown_params(job, waterfall), *missing_params(job, waterfall)]
        checked.question = _question(job, waterfall, providers, checked.problems)
    if rows is not None and checked.question is not None:
        _read(rows, checked.question, checked)
    checked.problems += _paths(job)
    return checked


def _source(live: Waterfall | None, remembered: Waterfall | None, documented: Waterfall | None) -> str:
    if live:
        return "the API now"
    if remembered:
        return "the API at the last run"
    return f"the documentation of {READ_ON}" if documented else "nobody"


def _ledger(job: Job, bound_to: Mapping[str, str | None]) -> tuple[Waterfall | None, list[int]]:
    """Read what the ledger remembers of the waterfall. Raises what a run would."""
    path = job.ledger_path
    if not is_there(path):
        return None, []
    if path.is_file() and path.stat().st_size <= CHECKED_AT_START:
        found = check_ledger(path)
        if found.problems:
            raise Refused(f"{path}: the ledger is not sound: {'; '.join(found.problems)}", RESTORE)
    with closing(Ledger(path, read_only=True)) as ledger:
        bound = {name: ledger.fact(name) for name in bound_to}
        known = ledger.waterfall(job.model.waterfall)
    for name, value in bound_to.items():
        if None not in (value, bound[name]) and value != bound[name]:
            raise JobError(
                f"{path}: this ledger belongs to another {name.replace('_', ' ')}: {bound[name]}, not {value}",
                "use another `ledger:`, or the key and DATABAR_BASE_URL that it was made with",
            )
    if known is None:
        return None, []
    return Waterfall.model_validate(known[0]), known[1] or []


def _unfilled(job: Job) -> Iterator[JobError]:
    for name, param in job.model.params.items():
        if PLACEHOLDER in param.columns:
            hint = f"put the name of the column there that holds the {name}, or {{value: …}} for a constant"
            yield job.error(["params", name], "is still to be filled in", hint)


def _rows(job: Job, problems: list[EnrichError]) -> Rows | None:
    """Open the input and hold each part of the job against it; what does not fit is a problem and left out then."""
    model = job.model
    alone: dict[str, object] = {"params": {}, "only_if_empty": [], "where": None, "order_by": None, "caps": None}
    bare = model.model_copy(update=alone)

    def fits(**part: object) -> bool:
        try:
            Rows(replace(job, model=bare.model_copy(update=part)))
        except JobError as error:
            problems.append(error)
            return False
        return True

    try:
        known = Rows(replace(job, model=bare)).columns[:1]
        params = {name: param if _fits(name, param, fits) else Param(value="?") for name, param in model.params.items()}
        only = [
            column
            for index, column in enumerate(model.only_if_empty)
            if fits(only_if_empty=[*known * index, column])  # at its index, so that its line is named
        ]
        where = model.where if fits(where=model.where) else None
        good = model.model_copy(update={"params": params, "only_if_empty": only, "where": where})
        return Rows(replace(job, model=good))
    except EnrichError as error:
        problems.append(error)
        return None


def _fits(name: str, param: Param, fits: Callable[..., bool]) -> bool:
    """Try each column of a param, so that each that is missing is told."""
    if PLACEHOLDER in param.columns:
        return False
    alone = [param.model_copy(update={"columns": [column]}) for column in param.columns]
    return not [each for each in alone if not fits(params={name: each})]


def _question(job: Job, waterfall: Waterfall, providers: list[int], problems: list[EnrichError]) -> Question | None:
    """Make the question; its params were looked at before."""
    if not providers:
        providers = [each.id for each in waterfall.available_enrichments if each.enabled_by_default]
    known = waterfall.model_copy(update={"input_params": []})
    try:
        question = make_question(job, known, providers)
    except JobError as error:
        problems.append(error)
        return None
    required = tuple(each.name for each in waterfall.input_params if each.required and each.name in job.model.params)
    return replace(question, required=required)


def _documented_question(job: Job, waterfall: Waterfall, problems: list[EnrichError]) -> Question | None:
    """Make the question from the documentation, which does not know the providers and not every field."""
    lenient = waterfall.model_copy(
        update={
            "is_email_verifying": True,
            "output_fields": waterfall.output_fields or [Field(name=waterfall.identifier)],
        }
    )
    return _question(job, lenient, job.model.enrichments or [0], problems)


def _read(rows: Rows, question: Question, checked: Checked) -> None:
    """Read the input to its end."""
    try:
        rows.check_new_columns(question)
        checked.rows = checked.asking = 0
        for batch in rows.batches(question):
            checked.rows += batch.frame.height
            checked.asking += sum(fingerprint is not None for fingerprint in batch.fingerprints)
    except EnrichError as error:
        checked.rows = checked.asking = None
        checked.problems.append(error)


def written(job: Job, now: datetime) -> dict[str, Path]:
    """The files that a run writes, by their key in the job file."""
    model = job.model
    named = {"rejects": model.rejects and model.rejects.path, "changes": model.changes and model.changes.path}
    paths = {"output": job.output_path(now), "ledger": job.ledger_path}
    paths |= {key: job.path(path, now) for key, path in named.items() if path}
    return paths | ({"metrics": job.path(model.metrics)} if model.metrics else {})


def read_files(job: Job) -> dict[str, Path]:
    """The files that a run reads, by their key in the job file."""
    paths = {"the job file": job.document.path.resolve(), "input": job.input_path}
    optional = {"suppress": job.model.suppress, "notify": job.model.notify}
    return paths | {key: job.path(path) for key, path in optional.items() if path}


def _paths(job: Job) -> Iterator[EnrichError]:
    now = datetime.now().astimezone()
    outgoing, incoming = written(job, now), read_files(job)
    for (one, path), (other, same) in combinations((outgoing | incoming).items(), 2):
        if one in outgoing and _is_same(path, same):
            yield JobError(f"{path}: `{one}` and `{other}` are the same file", f"choose another `{one}`")
    for key, path in outgoing.items():
        if reason := _unwritable(path):
            yield Refused(f"{path}: `{key}` cannot be written: {reason}", "mend the rights, or choose another folder")
    if os.path.exists(job.ledger_path) and not os.access(job.ledger_path, os.R_OK | os.W_OK):  # noqa: PTH110 - never raises
        yield Refused(f"{job.ledger_path}: this user may not write the ledger", "run as its owner, or mend the rights")
    for key, path in incoming.items():
        if key not in ("input", "the job file") and (not os.access(path, os.R_OK) or path.is_dir()):
            yield Refused(f"{path}: `{key}` cannot be read", "make it, or leave the key out")
    output = outgoing["output"]
    if _is_database(output):
        yield JobError(f"{output}: the output would replace a ledger", "choose another `output`")


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one == other or one.samefile(other)
    except OSError:  # one of them is not there, or not to be seen
        return False


def _is_database(path: Path) -> bool:
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(16) == b"SQLite format 3\0"
    except OSError:
        return False


def is_there(path: Path) -> bool:
    """Tell whether a file is there. Raises Refused where this user may not look."""
    try:
        return path.exists()
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}", "mend the rights of its folder, or run as its owner") from error


def existing(path: Path) -> Path:
    """Return the nearest part of a path that this user can see."""
    return next(each for each in (path, *path.parents) if os.path.exists(each))  # noqa: PTH110 - never raises


def _unwritable(path: Path) -> str | None:
    try:
        if path.is_dir():
            return "it is a folder"
        folder = existing(path.parent)
        if not folder.is_dir():
            return f"{folder} is no folder"
        return None if os.access(folder, os.W_OK | os.X_OK) else f"no right to write in {folder}"
    except OSError as error:
        return error.strerror or str(error)
