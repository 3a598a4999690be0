"""The result of a check, and the check of a target by its description: the API's, a stored or a documented one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
from msgspec.structs import replace

from enrich.databar.description import DOCUMENTED_ON, DOCUMENTED_WATERFALLS, Description, Field, description_changes
from enrich.databar.description import Param as DescribedParam
from enrich.errors import CommandRefused, EnrichError, JobError, closest_name, printable
from enrich.exit_codes import ExitCode, first_exit_code
from enrich.job.job import Job
from enrich.ledger.database import Database, ledger_exists
from enrich.ledger.sqlite import CHECKED_AT_START_BYTES
from enrich.ledger.sqlite_errors import RESTORE_HINT
from enrich.ledger.verify import check_ledger
from enrich.models import RowStatus, pluralize
from enrich.rows.batches import LeftOutCounts, RowBatch
from enrich.rows.template import RequestTemplate, default_providers, make_request_template, name_problems
from enrich.run.preflight import LedgerBinding, read_binding

#: The transform whose result, the domain of a company, is not personal data and may be shown.
_DOMAIN = "domain"
#: Below this share of sendable rows the user is warned.
MIN_SENDABLE_SHARE = 0.8


@dataclass(slots=True)
class ParamFill:
    """What the params have in the rows that were read.

    `rows` are those that the job does not leave out. `filled` counts the rows in which a param has a value, `missing`
    those that cannot be sent without it: a row that lacks two params counts for both. `examples` are domains.
    """

    job: Job
    rows: int = 0
    sendable: int = 0
    filled: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, batch: RowBatch) -> None:
        """Count the rows of a batch."""
        statuses = pl.Series(batch.statuses, dtype=pl.String)
        kept = statuses.is_null() | (statuses != RowStatus.FILTERED.value)
        self.rows += int(kept.sum())
        self.sendable += int(statuses.is_null().sum())
        self.missing.update(batch.missing)
        for name, param in self.job.model.params.items():
            value = batch.values[name].filter(kept)
            blank = value == ""
            self.filled[name] += int((~blank).sum())
            is_domain = any(_DOMAIN in transforms for _, transforms in param.sources)
            if is_domain and name not in self.examples and not blank.all():
                self.examples[name] = next(text for text in value if text)

    def mapping_lines(self) -> Iterator[str]:
        """Yield a line for each param: where its value comes from, and in how many rows it has one."""
        params = self.job.model.params
        for name, param in params.items():
            if param.value is not None:
                yield f"  {name} ← {param.value!r} (constant)"
                continue
            source = ", ".join(
                f"{column} ({', '.join(transforms)})" if transforms else column for column, transforms in param.sources
            )
            example = f"   e.g. {self.examples[name]}" if name in self.examples else ""
            yield f"  {name} ← {printable(source)}   {self.filled[name]:,} of {self.rows:,} filled{example}"

    def warnings(self) -> Iterator[str]:
        """Yield a warning when few rows can be sent."""
        if not self.rows or self.sendable >= MIN_SENDABLE_SHARE * self.rows:
            return
        share = f"{self.sendable:,} of {pluralize(self.rows, 'lead')} ({self.sendable / self.rows:.0%})"
        missing = [f"{name} is missing in {count:,}" for name, count in self.missing.most_common() if count]
        yield f"only {share} can be sent: {', '.join(missing)}"


@dataclass(slots=True)
class CheckResult:
    """Findings of a check. `sendable_rows` of the `rows` have a request. Both are None if the input was not read.

    `left_out` counts the rows that lack a param although a cell is not empty. `source` is where the target's
    description comes from. `changes` lists what the vendor changed. `fill` is how the input fills the params, None
    like the counts.
    """

    source: str
    problems: list[EnrichError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    template: RequestTemplate | None = None
    rows: int | None = None
    sendable_rows: int | None = None
    left_out: LeftOutCounts = field(default_factory=Counter)
    fill: ParamFill | None = None
    #: What is known of each step of a job with steps.
    steps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def exit_code(self) -> ExitCode:
        """The exit code that a run would have because of the problems."""
        return first_exit_code({problem.exit_code for problem in self.problems})


def read_stored(job: Job, bound_to: Mapping[str, str | None], result: CheckResult) -> LedgerBinding:
    """Read what the ledger has of the target of a job, or of a step. An error becomes a problem."""
    try:
        return _read_ledger(job, bound_to)
    except EnrichError as error:
        add_problem(result.problems, error)
        return LedgerBinding(job)


def check_target(
    job: Job, stored: LedgerBinding, live: Description | None, result: CheckResult
) -> RequestTemplate | None:
    """Check the names of a job, or of a step, against the description of its target. None: it has no description."""
    target = job.model.target
    last_known, providers = stored.description, stored.providers or []
    documented = None if job.model.waterfall is None else DOCUMENTED_WATERFALLS.get(job.model.waterfall)
    description = live or last_known or documented
    if live or last_known:
        result.source = "the API now" if live else "the API at the last run"
    else:
        result.source = f"the documentation of {DOCUMENTED_ON}" if documented else "the job file alone"
    if live and last_known:
        result.changes += description_changes(last_known, live)
    if description is None:
        closest = None if job.model.waterfall is None else closest_name(job.model.waterfall, DOCUMENTED_WATERFALLS)
        suggestion = "." if closest is None else f". Did you mean `{closest}`?"
        result.notes.append(f"{target.label} is not in the documentation{suggestion} `--online` checks it with the API")
        return None
    if documented is not None and description is documented:
        # The documentation lacks the providers, the verifiers and some fields.
        lenient = documented.model_copy(update={"is_email_verifying": True})
        result.notes += [
            f"{problem.message}{f': {problem.hint}' if problem.hint else ''} (by {result.source}, "
            "which may be out of date: check it with `--online`)"
            for problem in name_problems(job, lenient)
        ]
        fields = lenient.output_fields or [Field(name=lenient.identifier)]
        template = _make_template(job, lenient.model_copy(update={"output_fields": fields}), [0], result.problems)
        if template is None or lenient.output_fields or job.model.columns:
            return template
        return replace(template, columns={})
    result.problems += name_problems(job, description, last_known, stored.answered)
    return _make_template(job, description, providers, result.problems)


def _read_ledger(job: Job, bound_to: Mapping[str, str | None]) -> LedgerBinding:
    """Read the ledger's data about the target. Raises the same errors as a run."""
    path = job.ledger
    if not ledger_exists(path):
        return LedgerBinding(job)
    if isinstance(path, Path) and path.is_file() and path.stat().st_size <= CHECKED_AT_START_BYTES:
        found = check_ledger(path)
        if found.problems:
            raise CommandRefused(f"{path}: the ledger is damaged: {'; '.join(found.problems)}", RESTORE_HINT)
    with closing(Database(path, read_only=True)) as ledger:
        stored = read_binding(ledger, job)
    for name, value in bound_to.items():
        if None not in (value, bound := stored.bound_to.get(name)) and value != bound:
            raise JobError(
                f"{path}: this ledger belongs to another {name.replace('_', ' ')}: {bound}, not {value}",
                "set another `ledger:`, or use the key and DATABAR_BASE_URL of this one",
            )
    return stored


def _make_template(
    job: Job, description: Description, providers: list[int], problems: list[EnrichError]
) -> RequestTemplate | None:
    """Make the request template with all names of the job. Unknown and missing ones were reported before."""
    if not providers:
        providers = default_providers(description)
    offered = {param.name: param for param in description.input_params}
    lenient: dict[str, object] = {
        "input_params": [offered.get(name, DescribedParam(name=name)) for name in job.model.params],
        "is_email_verifying": True,
    }
    bare_job = replace(job, model=job.model.model_copy(update={"enrichments": None}))
    try:
        return make_request_template(
            bare_job, description.model_copy(update=lenient), job.model.enrichments or providers
        )
    except JobError as error:
        add_problem(problems, error)
        return None


def add_problem(problems: list[EnrichError], error: EnrichError) -> None:
    """Add a problem, unless it is in the list already."""
    if error.message not in [problem.message for problem in problems]:
        problems.append(error)
