"""Builds the report from ledger and input only: no network, no writes, one snapshot of the ledger."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from itertools import pairwise
from math import ceil
from typing import Any

from msgspec.structs import asdict, replace

from enrich.databar.task_results import ParsedData, is_beside
from enrich.errors import CommandRefused, EnrichError
from enrich.exit_codes import SUCCESS_CODES, ExitCode, JobArguments, RequiredAction, exit_label, required_actions
from enrich.job.job import Job
from enrich.job.locations import STDIN
from enrich.job.target import Target
from enrich.ledger import erasure, queries, records
from enrich.ledger.database import Database, ledger_exists
from enrich.ledger.lock import is_locked
from enrich.ledger.records import ExecutionRow
from enrich.models import count_by_status, iso_time, pluralize, to_credits
from enrich.monitoring.log_file import redact_message
from enrich.report.anomalies import AnswerStats, find_anomalies
from enrich.report.data import (
    HistogramBar,
    LatencyHistogram,
    Report,
    ReportedProvider,
    ReportedRun,
    ReportedWaterfall,
    Traffic,
)
from enrich.report.input_stats import MAX_GROUP_VALUES, InputStats, read_input_stats
from enrich.rows.job_input import JobInput
from enrich.run import provider_stats
from enrich.run.output import prepare_collector
from enrich.run.preflight import template_from_ledger
from enrich.run.progress import read_snapshot
from enrich.run.provider_stats import AnswerKind, ProviderStats, count_kinds, read_descriptions


def _reported_run(row: ExecutionRow, settled: Mapping[str, int], *, is_running: bool) -> ReportedRun:
    """Summarize an execution. `settled` counts the requests that it settled, by state."""
    summary, ended_ms, started_ms = row.read_summary(), row.ended_ms, row.started_ms
    return ReportedRun(
        execution=row.id,
        started_at=iso_time(started_ms),
        ended_at=iso_time(ended_ms),
        exit_code=row.exit_code,
        outcome=row.outcome(is_running=is_running),
        rows=summary.get("rows"),
        submitted=row.submitted,
        found=settled.get("found", 0),
        not_found=settled.get("not_found", 0),
        failed=settled.get("failed", 0),
        expired=settled.get("expired", 0),
        credits_spent=to_credits(row.spent),
        credits_unknown=row.unknown,
        balance_before=to_credits(row.balance_before),
        balance_after=to_credits(row.balance_after),
        unexplained=_unexplained_credits(summary),
        polls=summary.get("polls"),
        rate_limited=summary.get("rate_limited"),
        elapsed_s=None if ended_ms is None else round((ended_ms - started_ms) / 1000, 3),
    )


def _unexplained_credits(summary: Mapping[str, Any]) -> float | None:
    if "difference" not in summary or None in (summary["balance_before"], summary["balance_after"]):
        return None
    return 0.0 if summary["difference"] is None else summary["difference"]["unexplained"]


def reported_providers(totals: provider_stats.ProviderTotals) -> list[ReportedProvider]:
    """Convert the totals of each provider and verifier."""
    return [ReportedProvider(passed_on=each.passed_on, **each.in_credits()) for each in totals.providers]


def reported_waterfall(
    target: Target, totals: provider_stats.ProviderTotals, retried: int, step: str = ""
) -> ReportedWaterfall:
    """Convert the totals of the waterfall."""
    return ReportedWaterfall(
        name=target.id,
        providers=reported_providers(totals),
        answers=totals.answers,
        found=totals.found,
        not_reported=totals.not_reported,
        spent=to_credits(totals.spent),
        unattributed=to_credits(totals.unattributed),
        kind=target.kind,
        step=step,
        failed=totals.failed,
        retried=retried,
    )


def report_actions(
    last_run: ReportedRun | None, counts: Mapping[str, Any], what: str, reasons_file: str, job_arguments: JobArguments
) -> Iterator[RequiredAction]:
    """Yield the actions required, those of the last run first.

    `counts` are rows by status, also by `steps`, or requests by state when the input can't be read; `what` is "row" or
    "request". `reasons_file` is the file with the reason for each skipped row.
    """
    if last_run is None:
        yield RequiredAction("Start with ten requests", (f"enrich run {job_arguments.run_args} --limit 10",))
    else:
        yield from _run_actions(last_run, job_arguments, has_in_doubt=bool(counts.get("in_doubt")))
    yield from required_actions(0, counts, job_arguments, what)
    if number := counts.get("invalid", 0):
        text = f"{pluralize(number, what)} skipped: missing or unusable input. {reasons_file} has the reasons"
        yield RequiredAction(text, ())


def _run_actions(last_run: ReportedRun, job_arguments: JobArguments, *, has_in_doubt: bool) -> Iterator[RequiredAction]:
    code = last_run.exit_code
    if last_run.outcome == "killed":
        yield RequiredAction(
            f"Run {last_run.execution} was killed. The next run resumes", (f"enrich run {job_arguments.run_args}",)
        )
        return
    # Unconfirmed rows have an action of their own.
    if code is not None and code not in SUCCESS_CODES and not (code == ExitCode.IN_DOUBT and has_in_doubt):
        ended = f"Run {last_run.execution} ended with exit code {code} ({exit_label(code)})"
        others = [RequiredAction("Resume", (f"enrich run {job_arguments.run_args}",))]
        yield from (
            replace(action, text=f"{ended}. {action.text}")
            for action in required_actions(code, {}, job_arguments) or others
        )


#: The last run is compared with up to this many earlier runs that have answers.
COMPARED_RUNS = 7


def build_report(job: Job, job_arguments: JobArguments, now: datetime, *, with_rows: bool = False) -> Report:
    """Build the report of a job as of `now`. What cannot be read stays None, with a note. Raises CommandRefused."""
    if not ledger_exists(job.ledger):
        target, actions = job.model.target, list(report_actions(None, {}, "row", "", job_arguments))
        waterfall = ReportedWaterfall(target.id, (), 0, 0, 0, 0.0, 0.0, target.kind)
        return _make_report(job, now, waterfall=waterfall, requests=count_by_status({}), actions=actions)
    with closing(Database(job.ledger, read_only=True)) as ledger, ledger.snapshot():
        return _build_from_ledger(job, ledger, job_arguments, now, with_rows=with_rows)


def _build_from_ledger(
    job: Job, ledger: Database, job_arguments: JobArguments, now: datetime, *, with_rows: bool
) -> Report:
    now_ms = int(now.timestamp() * 1000)
    ledger_held = is_locked(job.ledger)
    executions = records.list_executions(ledger, job.name)[::-1]
    # Check twice: a run that began just before this snapshot, or ended just after it, was not killed.
    ledger_held = ledger_held or is_locked(job.ledger)
    newest = records.newest_execution_id(ledger)
    settled: defaultdict[int, dict[str, int]] = defaultdict(dict)
    for execution, state, number in queries.outcome_counts(ledger, job.name):
        settled[execution][state] = number
    runs = [_reported_run(row, settled[row.id], is_running=ledger_held and row.id == newest) for row in executions]
    last_run = runs[-1] if runs else None
    stats, actions, notes = _try_read_input(job, ledger, now_ms, job_arguments, with_rows=with_rows)
    answers = _AnswerTotals(ledger, job, runs)
    requests = count_by_status(queries.state_counts(ledger))
    if stats is None:
        counts: Mapping[str, Any] = requests
    else:
        counts = stats.by_status() | {"steps": [rows for step, rows in stats.by_step.items() if step]}
    rejects, local_now = job.model.rejects, now.astimezone()
    reasons_file = job.output_path(local_now) if rejects is None else job.location_of(rejects.path, local_now)
    retried = queries.retried_failures(ledger, job.name)
    return _make_report(
        job,
        now,
        waterfall=reported_waterfall(job.model.target, answers.provider_stats.totals(), sum(retried.values())),
        step_waterfalls=[
            reported_waterfall(
                step.model.target, answers.stats_by_step[step.step].totals(), retried.get(step.step, 0), step.step
            )
            for step in job.step_jobs
        ],
        runs=runs,
        stats=stats,
        requests=requests,
        credits_spent=to_credits(sum(row.spent for row in executions)),
        credits_unknown=sum(row.unknown for row in executions),
        planned=executions[-1].read_summary().get("planned") if executions else None,
        latencies=latency_histogram(queries.latencies(ledger, job.name)),
        traffic=run_traffic(executions),
        anomalies=find_anomalies(answers.last, answers.before),
        actions=[
            *actions,
            *report_actions(last_run, counts, "request" if stats is None else "row", str(reasons_file), job_arguments),
        ],
        notes=[
            *notes,
            *_report_notes(runs, stats, answers.erased, others=records.has_other_jobs(ledger, job.name)),
        ],
    )


def _make_report(job: Job, now: datetime, *, stats: InputStats | None = None, **fields: Any) -> Report:  # noqa: ANN401 - fields of Report
    rows: dict[str, Any] = {}
    if stats is not None:
        rows = {name: getattr(stats, name) for name in ("rows", "skipped", "columns", "groups", "ages", "leads")}
        rows["statuses"] = stats.by_status()
    return Report(
        job=job.name,
        sandbox=job.sandbox,
        made_at=now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        ledger=str(job.ledger),
        input=str(job.input_path),
        output=str(job.output_path(now.astimezone())),
        job_file=str(job.document.path.absolute()),
        **rows,
        **fields,
    )


def _try_read_input(
    job: Job, ledger: Database, now_ms: int, job_arguments: JobArguments, *, with_rows: bool
) -> tuple[InputStats | None, list[RequiredAction], list[str]]:
    """Read the current input, or return None with the reason: an action if it is unexpected, else a note."""

    def unread(reason: str, *, is_expected: bool) -> tuple[None, list[RequiredAction], list[str]]:
        text = f"The rows are unknown: {reason}"
        if is_expected:
            return None, [], [text]
        return None, [RequiredAction(text, (f"enrich check {job_arguments.run_args}",))], []

    if job.input_path == STDIN:
        return unread("the input was a pipe. Name a file with --input", is_expected=True)
    try:
        template = template_from_ledger(ledger, job)
    except EnrichError as error:
        return unread(error.message, is_expected=isinstance(error, CommandRefused))
    try:
        by = [] if job.model.report is None else job.model.report.by
        collector = prepare_collector(ledger, JobInput(job, erasure.load_forgotten(ledger)), template)
        return read_input_stats(collector, by, now_ms, with_rows=with_rows), [], []
    except EnrichError as error:
        return unread(redact_message(error.message), is_expected=False)


class _AnswerTotals:
    """Totals over all answers of the job, each read once: per provider, and for the comparison of runs."""

    def __init__(self, ledger: Database, job: Job, runs: Sequence[ReportedRun]) -> None:
        try:
            paths: Mapping[str, str] = template_from_ledger(ledger, job).columns
        except EnrichError:
            paths = job.model.columns or {}
        answered = [run.execution for run in runs if run.answered + run.failed]
        descriptions = read_descriptions(ledger)
        self.provider_stats = ProviderStats(descriptions)
        self.stats_by_step = {step.step: ProviderStats(descriptions) for step in job.step_jobs}
        self.last, self.before = AnswerStats(paths), AnswerStats(paths)
        self.erased = 0
        self._stats_by_execution = dict.fromkeys(answered[-1 - COMPARED_RUNS : -1], self.before) | dict.fromkeys(
            answered[-1:], self.last
        )

        def read_match(execution: int, parsed: ParsedData) -> tuple[str, ...]:
            side = self._stats_by_execution.get(execution)
            return () if side is None else side.read_match(parsed)

        reads_beside = any(map(is_beside, paths.values()))
        attempts = queries.settled_attempts(ledger, job.name)
        for kind, number in count_kinds(attempts, read_match, read_whole=reads_beside):
            self._add(kind, number)

    def _add(self, kind: AnswerKind, answers: int) -> None:
        self.provider_stats.add(kind, answers)
        if kind.step in self.stats_by_step:
            self.stats_by_step[kind.step].add(kind, answers)
        self.erased += kind.erased * answers
        side = self._stats_by_execution.get(kind.execution)
        if side is not None:
            side.add(kind, answers)


def _report_notes(runs: Sequence[ReportedRun], stats: InputStats | None, erased: int, *, others: bool) -> Iterator[str]:
    """Yield notes that explain missing or partial numbers."""
    if not runs:
        yield "This job has no runs in this ledger."
    if others:
        yield "Other jobs use this ledger, too. Requests count all jobs; runs and credits count this job only."
    if killed := [run.execution for run in runs if run.outcome == "killed"]:
        was = f"Run {killed[0]} was" if len(killed) == 1 else f"{len(killed):,} runs were"
        yield f"{was} killed without a run summary: rows, polls, 429s, time and last balance are unknown."
    if runs and runs[-1].outcome == "running":
        yield f"Run {runs[-1].execution} is still running. Its numbers will grow."
    if erased:
        yield f"{pluralize(erased, 'result')} purged or erased: the providers are unknown."
    for column in [] if stats is None else stats.ungrouped:
        yield f"The column `{column}` makes no groups: it has more than {MAX_GROUP_VALUES:,} different values."
    if stats is not None and stats.purged:
        yield f"{pluralize(stats.purged, 'row')} with a purged result: not part of the match rates of columns."
    if unknown := sum(run.credits_unknown for run in runs):
        yield f"{pluralize(unknown, 'result')} of unknown price: the credits are a minimum."


#: Bars of equal width that cover HISTOGRAM_SHARE of the tasks; one more bar holds the slowest.
MAX_HISTOGRAM_BARS = 24
HISTOGRAM_SHARE = 0.99
#: Possible widths of a bar in seconds: the smallest that is enough is used.
BAR_WIDTHS_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800)


def latency_histogram(latencies_ms: Iterable[int]) -> LatencyHistogram | None:
    """Group latencies (ms, ascending) into bars of equal width, the slowest into one extra bar; None: no latencies."""
    durations = array("q", latencies_ms)
    if not durations:
        return None
    reach, longest = quantile_s(durations, HISTOGRAM_SHARE), durations[-1] / 1000
    width = next((width for width in BAR_WIDTHS_S if reach < width * MAX_HISTOGRAM_BARS), reach / MAX_HISTOGRAM_BARS)
    # In whole milliseconds, like the latencies.
    step = ceil(1000 * width)
    shorter = [bisect_left(durations, number * step) for number in range(MAX_HISTOGRAM_BARS + 1)]
    counts = [until - before for before, until in pairwise(shorter)]
    drawn = [number for number, count in enumerate(counts) if count]
    bars = [
        HistogramBar(number * step / 1000, (number + 1) * step / 1000, counts[number])
        for number in range(min(drawn, default=0), max(drawn, default=-1) + 1)
    ]
    if slowest := len(durations) - shorter[-1]:
        bars.append(HistogramBar(MAX_HISTOGRAM_BARS * step / 1000, longest, slowest))
    return LatencyHistogram(
        bars, count=len(durations), median=quantile_s(durations, 0.5), p90=quantile_s(durations, 0.9), longest=longest
    )


def quantile_s(durations: Sequence[int], share: float) -> float:
    """Return the latency in seconds that this share of all (ms, ascending) does not exceed."""
    return durations[max(0, ceil(share * len(durations)) - 1)] / 1000


def run_traffic(executions: Sequence[ExecutionRow]) -> Traffic | None:
    """Return the traffic of the newest execution with submits that stored it during the run. None: there is none."""
    for execution in reversed(executions):
        snapshot = read_snapshot(execution.progress) if execution.submitted else None
        if snapshot is not None and any(snapshot.traffic.totals()):
            return Traffic(execution.id, **asdict(snapshot.traffic))
    return None
