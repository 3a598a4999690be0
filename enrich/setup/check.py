"""`enrich check`: everything that can be said of a job before it runs. Looks only, and without network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from enrich.api.waterfall import Field, Waterfall
from enrich.api.waterfall import Param as Offered
from enrich.errors import PRECEDENCE, EnrichError, Exit, JobError, Refused
from enrich.job import Job
from enrich.place import STDIN, Postgres, Url
from enrich.question import Question, make_question, missing_params, unknown_params
from enrich.report.file import EXTRA, lacks_extra
from enrich.rows import Rows
from enrich.setup.drift import differences
from enrich.setup.places import clashes, is_there
from enrich.setup.snapshot import DOCUMENTED, READ_ON
from enrich.setup.template import PLACEHOLDER
from enrich.spec import Param
from enrich.store.database import exists
from enrich.store.ledger import Ledger
from enrich.store.records import check as check_ledger
from enrich.store.sqlite import CHECKED_AT_START, RESTORE


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
    asking = ""
    if checked.rows is not None:
        asking = f"{checked.rows:,} {'row' if checked.rows == 1 else 'rows'}, {checked.asking:,} can be asked, "
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
    rows = None
    if job.input_path == STDIN or isinstance(job.input_path, Url):
        checked.notes.append("the input comes through a pipe or from a storage: it was not read")
    else:
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
    checked.problems += clashes(job)
    if job.model.report is not None and job.model.report.path is not None and lacks_extra():
        checked.notes.append(f"no run can write the `report` without its extra: {EXTRA}")
    return checked


def _source(live: Waterfall | None, remembered: Waterfall | None, documented: Waterfall | None) -> str:
    if live:
        return "the API now"
    if remembered:
        return "the API at the last run"
    return f"the documentation of {READ_ON}" if documented else "nobody"


def _ledger(job: Job, bound_to: Mapping[str, str | None]) -> tuple[Waterfall | None, list[int]]:
    """Read what the ledger remembers of the waterfall. Raises what a run would."""
    path = job.ledger
    if not (exists(path) if isinstance(path, Postgres) else is_there(path)):
        return None, []
    if isinstance(path, Path) and path.is_file() and path.stat().st_size <= CHECKED_AT_START:
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
    alone = dict.fromkeys(("where", "order_by", "caps", "suppress", "changes", "report")) | {
        "params": {},
        "only_if_empty": [],
    }
    bare = model.model_copy(update=alone)

    def fits(**part: object) -> bool:
        try:
            Rows(replace(job, model=bare.model_copy(update=part)))
        except EnrichError as error:
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
        good: dict[str, object] = {"params": params, "only_if_empty": only}
        order = [column for index, column in enumerate(model.order_by or ()) if fits(order_by=[*known * index, column])]
        good["order_by"] = order or None
        for key in ("where", "caps", "suppress", "changes", "report"):
            part = getattr(model, key)
            good[key] = part if part is None or fits(params=params, **{key: part}) else None
        return Rows(replace(job, model=model.model_copy(update=good)))
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
    """Make the question with the params that the job has, whatever was said of them before."""
    if not providers:
        providers = [each.id for each in waterfall.available_enrichments if each.enabled_by_default]
    offered = {param.name: param for param in waterfall.input_params}
    mapped = [offered.get(name, Offered(name=name)) for name in job.model.params]
    try:
        return make_question(job, waterfall.model_copy(update={"input_params": mapped}), providers)
    except JobError as error:
        problems.append(error)
        return None


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
