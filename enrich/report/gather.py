"""Puts the report together from ledger and input alone: no network, nothing written, one view of one moment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from enrich.errors import CommandRefused, EnrichError
from enrich.job.job import Job
from enrich.job.locations import STDIN
from enrich.ledger.database import ledger_exists
from enrich.ledger.ledger import Ledger
from enrich.ledger.lock import is_locked
from enrich.model import SettledAttempt, count_by_status, to_credits
from enrich.monitoring.log_file import redact_message
from enrich.report.anomalies import AnswerStats, find_anomalies
from enrich.report.earned import reported_waterfall
from enrich.report.facts import Report, ReportedRun, ReportedWaterfall
from enrich.report.needs import report_actions
from enrich.report.nights import latency_histogram, reported_runs, run_traffic
from enrich.report.present import MAX_GROUP_VALUES, InputStats, read_input_stats
from enrich.rows.template import RequestTemplate
from enrich.run.preflight import template_from_ledger
from enrich.run.provider_stats import ProviderStats, load_waterfalls
from enrich.run.rebuild import prepare_collector
from enrich.watch.outcome import JobArguments, RequiredAction

#: The last night is held against so many before it that were answered something.
COMPARED_RUNS = 7


def build_report(job: Job, job_arguments: JobArguments, now: datetime, *, with_rows: bool = False) -> Report:
    """Put together what the report of a job tells at a time; `target` is the job as commands name it.

    What can't be read is not known, and a note says why. Raises Refused when the ledger can't be read.
    """
    if not ledger_exists(job.ledger):
        return _make_report(job, now, notes=["this job has never run: nothing is known yet"])
    with closing(Ledger(job.ledger, read_only=True)) as ledger, ledger.snapshot():
        return _build_from_ledger(job, ledger, job_arguments, now, with_rows=with_rows)


def _build_from_ledger(
    job: Job, ledger: Ledger, job_arguments: JobArguments, now: datetime, *, with_rows: bool
) -> Report:
    now_ms = int(now.timestamp() * 1000)
    ledger_held = is_locked(job.ledger)
    executions = ledger.job_executions(job.name)
    # A run may have begun just before this moment of the ledger, or ended just after it: neither was killed.
    ledger_held = ledger_held or is_locked(job.ledger)
    runs = reported_runs(
        executions, ledger.outcome_counts(job.name), ledger.newest_execution_id(), is_running=ledger_held
    )
    last_run = runs[-1] if runs else None
    stats, unread = _try_read_input(job, ledger, now_ms, with_rows=with_rows)
    answers = _AnswerTotals(ledger, job, runs)
    for settled in ledger.settled_attempts(job.name):
        answers.add(settled)
    requests = count_by_status(ledger.state_counts())
    counts = requests if stats is None else stats.by_status()
    output = str(job.output_path(now.astimezone()))
    reasons_file = (
        output if job.model.rejects is None else str(job.location_of(job.model.rejects.path, now.astimezone()))
    )
    earnings = answers.provider_stats.totals()
    return _make_report(
        job,
        now,
        waterfall=reported_waterfall(job.model.waterfall, earnings),
        nights=runs,
        stats=stats,
        requests=requests,
        credits_spent=to_credits(sum(row.spent for row in executions)),
        credits_unknown=sum(row.unknown for row in executions),
        planned=_planned_credits(executions[-1].receipt if executions else None),
        latencies=latency_histogram(ledger.latencies(job.name)),
        traffic=run_traffic(ledger, executions, now_ms),
        anomalies=find_anomalies(answers.last, answers.before),
        needs=[
            *unread.needs(job_arguments),
            *report_actions(last_run, counts, "request" if stats is None else "row", reasons_file, job_arguments),
        ],
        notes=[*unread.notes(), *_report_notes(runs, stats, answers.erased, others=ledger.has_other_jobs(job.name))],
    )


def _make_report(job: Job, now: datetime, *, stats: InputStats | None = None, **fields: Any) -> Report:  # noqa: ANN401 - fields of it
    nothing: dict[str, Any] = {
        "waterfall": ReportedWaterfall(job.model.waterfall, (), 0, 0, 0, 0.0, 0.0),
        "nights": (),
        "requests": count_by_status({}),
        "credits_spent": 0.0,
        "credits_unknown": 0,
        "planned": None,
        "latencies": None,
        "traffic": None,
        "anomalies": (),
        "needs": (),
    }
    rows: dict[str, Any] = {"rows": None, "statuses": {}, "columns": (), "groups": (), "ages": (), "leads": None}
    if stats is not None:
        rows |= {name: getattr(stats, name) for name in ("rows", "columns", "groups", "ages", "leads")}
        rows["statuses"] = stats.by_status()
    return Report(
        job=job.name,
        made_at=now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        ledger=str(job.ledger),
        input=str(job.input_path),
        output=str(job.output_path(now.astimezone())),
        **nothing | rows | fields,
    )


@dataclass(frozen=True, slots=True)
class _UnreadInput:
    """Why nothing is known of the rows, and whether somebody should look at that."""

    reason: str | None = None
    is_expected: bool = True

    @property
    def _text(self) -> str:
        return f"nothing is known of the rows: {self.reason}"

    def needs(self, job_arguments: JobArguments) -> Iterator[RequiredAction]:
        if not self.is_expected:
            yield RequiredAction(self._text, (f"enrich check {job_arguments.run_args}",))

    def notes(self) -> Iterator[str]:
        if self.is_expected and self.reason is not None:
            yield self._text


def _try_read_input(
    job: Job, ledger: Ledger, now_ms: int, *, with_rows: bool
) -> tuple[InputStats | None, _UnreadInput]:
    """Read the present input, or tell why it can't be read."""
    if job.input_path == STDIN:
        return None, _UnreadInput("the input came through a pipe; --input names a file instead")
    try:
        template = _read_template(ledger, job)
    except EnrichError as error:
        return None, _UnreadInput(error.message, is_expected=isinstance(error, CommandRefused))
    try:
        by = [] if job.model.report is None else job.model.report.by
        return read_input_stats(
            prepare_collector(ledger, job, template), by, now_ms, with_rows=with_rows
        ), _UnreadInput()
    except EnrichError as error:
        return None, _UnreadInput(redact_message(error.message), is_expected=False)


def _read_template(ledger: Ledger, job: Job) -> RequestTemplate:
    try:
        return template_from_ledger(ledger, job)
    except ValidationError as error:
        raise CommandRefused(
            "nobody understands what the ledger remembers of the waterfall", "enrich run asks again"
        ) from error


class _AnswerTotals:
    """What all answers of the job add up to, each read once: who earned it, and what the nights were like."""

    def __init__(self, ledger: Ledger, job: Job, runs: Sequence[ReportedRun]) -> None:
        try:
            paths: Mapping[str, str] = _read_template(ledger, job).columns
        except EnrichError:
            paths = job.model.columns or {}
        answered = [run.execution for run in runs if run.answered + run.failed]
        self.provider_stats = ProviderStats(load_waterfalls(ledger.waterfalls()))
        self.last, self.before = AnswerStats(paths), AnswerStats(paths)
        self.erased = 0
        self._stats_by_execution = dict.fromkeys(answered[-1 - COMPARED_RUNS : -1], self.before) | dict.fromkeys(
            answered[-1:], self.last
        )

    def add(self, settled: SettledAttempt) -> None:
        self.provider_stats.add(settled)
        self.erased += settled.erased
        side = self._stats_by_execution.get(settled.execution)
        if side is not None:
            side.add(settled)


def _planned_credits(receipt: str | None) -> Mapping[str, float | None] | None:
    planned = json.loads(receipt).get("planned") if receipt else None
    return planned if isinstance(planned, dict) else None


def _report_notes(runs: Sequence[ReportedRun], stats: InputStats | None, erased: int, *, others: bool) -> Iterator[str]:
    """Say what the numbers do not tell by themselves."""
    if not runs:
        yield "this job has never run with this ledger"
    if others:
        yield "other jobs use this ledger, too: the requests are those of all, nights and credits are this job's own"
    if killed := [run.execution for run in runs if run.outcome == "killed"]:
        was = f"execution {killed[0]} was" if len(killed) == 1 else f"{len(killed):,} executions were"
        yield f"{was} killed and left no receipt: rows, polls, 429s, time and last balance are not known"
    if runs and runs[-1].outcome == "at work now":
        yield f"execution {runs[-1].execution} is at work now: its numbers still grow"
    if erased:
        yield f"{erased:,} answers were purged or forgotten: nobody can tell any more whom they asked"
    for column in [] if stats is None else stats.ungrouped:
        yield f"the column `{column}` makes no groups: it has more than {MAX_GROUP_VALUES:,} different values"
    if stats is not None and stats.purged:
        yield f"{stats.purged:,} rows have an answer that was purged: they are left out of the columns' hit rates"
    if unknown := sum(night.credits_unknown for night in runs):
        yield f"{unknown:,} answers have no known price: the credits are at least those that are told"
