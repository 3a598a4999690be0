"""What waits for a person, with the exact commands for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from enrich.errors import ExitCode
from enrich.model import pluralize
from enrich.report.facts import ReportedRun
from enrich.watch.outcome import SUCCESS_CODES, JobArguments, RequiredAction, exit_label, required_actions


def report_actions(
    last_run: ReportedRun | None, counts: Mapping[str, int], what: str, reasons_file: str, job_arguments: JobArguments
) -> Iterator[RequiredAction]:
    """Yield what waits, the last night first.

    `counts` are rows by status, or requests by state where the input can't be read; `what` says which of both.
    `told_in` is the file that says why a row is invalid.
    """
    if last_run is not None:
        yield from _run_actions(last_run, job_arguments, has_in_doubt=bool(counts.get("in_doubt")))
    yield from required_actions(0, counts, job_arguments, what)
    if number := counts.get("invalid", 0):
        yield RequiredAction(f"{pluralize(number, what)} invalid, so never sent: {reasons_file} says why", ())


def _run_actions(last_run: ReportedRun, job_arguments: JobArguments, *, has_in_doubt: bool) -> Iterator[RequiredAction]:
    code = last_run.exit_code
    if last_run.outcome == "killed":
        yield RequiredAction(
            f"execution {last_run.execution} was killed: the next run goes on",
            (f"enrich run {job_arguments.run_args}",),
        )
    elif (
        code is not None and code not in SUCCESS_CODES and not (code == ExitCode.IN_DOUBT and has_in_doubt)
    ):  # that is told with its rows
        ended = f"execution {last_run.execution} ended with exit {code} ({exit_label(code)})"
        others = [RequiredAction("go on", (f"enrich run {job_arguments.run_args}",))]
        yield from (
            replace(need, text=f"{ended}: {need.text}") for need in required_actions(code, {}, job_arguments) or others
        )
