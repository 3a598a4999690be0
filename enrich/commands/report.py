"""`enrich report`: writes the report of a job as one HTML page or as JSON."""

from __future__ import annotations

import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec.structs import replace

from enrich.commands import options
from enrich.commands.streams import echo_message
from enrich.errors import EnrichError, JobError
from enrich.exit_codes import JobArguments
from enrich.job.job import Job
from enrich.models import parse_count
from enrich.report.page_file import INSTALL_HINT, default_report_path, given_report_path, is_extra_missing, write_report

if TYPE_CHECKING:
    from enrich.report.data import Comparison, Report


def _compare(job: Job, other: str, *, use_sandbox: bool) -> Comparison:
    from enrich.report.compare import compare_executions, compare_jobs

    if (number := parse_count(other)) is not None:
        return compare_executions(job, number)
    return compare_jobs(job, options.JobOptions(Path(other), use_sandbox=use_sandbox).load())


def _require_extra() -> None:
    if is_extra_missing():
        raise JobError("the report is not installed", INSTALL_HINT)


def _build_report(job: Job, job_arguments: JobArguments, now: datetime, *, with_rows: bool = False) -> Report:
    from enrich.report.build import build_report

    return build_report(job, job_arguments, now, with_rows=with_rows)


def _render_page(data: Report, job: Job, now: datetime) -> str:
    import ctypes

    from enrich.report.page_file import with_relative_paths
    from enrich.report.render import render_report

    # Return freed memory to the system, because drawing the charts takes another 100 MiB.
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    return render_report(with_relative_paths(data, job, now, Path.cwd()))


def write_run_report(job: Job, job_arguments: JobArguments) -> str | None:
    """Write the report that the job requests of every run. Return an error text, None without one. Raises nothing."""
    try:
        now = datetime.now().astimezone()
        path = job.report_path(now)
        if path is not None:
            _require_extra()
            write_report(path, _render_page(_build_report(job, job_arguments, now), job, now), job)
    except KeyboardInterrupt:
        return "the report was not written: interrupted"
    except EnrichError as error:
        return f"the report was not written: {error.message}" + (f"; {error.hint}" if error.hint else "")
    except BaseException as error:  # noqa: BLE001 - a panic of the chart library is no Exception; its text may hold data
        return f"the report was not written: this is a bug: {type(error).__name__}"
    return None


@click.command()
@options.job_options(has_input=True)
@click.option("-o", "page", type=options.FILE_OR_STDOUT, help="Write to this file, or - for stdout.")
@click.option(
    "--compare", metavar="RUN|JOB", help="Compare the last run with another run, or the job with another job."
)
@click.option("--with-rows", is_flag=True, help="Add the leads, which are personal data.")
@options.JSON_OPTION
def report(
    job_options: options.JobOptions, page: Path | None, compare: str | None, with_rows: bool, as_json: bool
) -> None:
    """Write the report of JOB: match rate, spend, provider performance, required actions.

    Reads the ledger and the input, without network. Contains no leads unless you pass --with-rows.
    """
    to_stdout = page == Path("-")
    if to_stdout and as_json:
        raise click.UsageError("--json and -o - both write to stdout: choose one")
    job = job_options.load()
    now = datetime.now().astimezone()
    path = None
    if page is not None and not to_stdout:
        path = given_report_path(job, page.absolute())
    elif not to_stdout and not as_json:
        path = default_report_path(job, now)
    if path is not None or to_stdout:
        _require_extra()
    # First, so that an invalid comparison is reported before the long reading.
    comparison = None if compare is None else _compare(job, compare, use_sandbox=job_options.use_sandbox)
    data = replace(_build_report(job, job_options.arguments(), now, with_rows=with_rows), comparison=comparison)
    if to_stdout:
        click.echo(_render_page(data, job, now))
    elif path is not None:
        write_report(path, _render_page(data, job, now), job)
        if sys.stderr.isatty() or (page is not None and path != page.absolute()):
            echo_message(str(path), label="report: ")
    if as_json:
        options.echo_json(data.as_json())
