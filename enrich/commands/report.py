"""`enrich report`: writes the report of a job as one HTML page or as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import click

from enrich.commands import options
from enrich.errors import EnrichError, Interrupted, JobError
from enrich.exit_codes import JobArguments
from enrich.job.job import Job
from enrich.report.build import build_report
from enrich.report.compare import compare_executions, compare_jobs
from enrich.report.data import Comparison, Report
from enrich.report.page_file import INSTALL_HINT, default_report_path, is_extra_missing, write_report


def _compare(job: Job, other: str, *, use_sandbox: bool) -> Comparison:
    if other.isdecimal():
        return compare_executions(job, int(other))
    return compare_jobs(job, options.JobOptions(Path(other), use_sandbox=use_sandbox).load())


def _require_extra() -> None:
    if is_extra_missing():
        raise JobError("the report needs its extra", INSTALL_HINT)


def _render_page(data: Report) -> str:
    from enrich.report.render import render_report

    return render_report(data)


def write_run_report(job: Job, job_arguments: JobArguments) -> str | None:
    """Write the report that the job requests of every run. Return an error text, None without one. Raises nothing."""
    try:
        now = datetime.now().astimezone()
        path = job.report_path(now)
        if path is not None:
            _require_extra()
            write_report(path, _render_page(build_report(job, job_arguments, now)), job, now)
    except (KeyboardInterrupt, Interrupted):
        return "the report was not written: interrupted"
    except EnrichError as error:
        return f"the report was not written: {error.message}" + (f"; {error.hint}" if error.hint else "")
    except BaseException as error:  # noqa: BLE001 - a panic of the chart library is no Exception; its text may hold data
        return f"the report was not written: this is a bug: {type(error).__name__}"
    return None


@click.command()
@options.job_options(has_input=True)
@click.option("-o", "page", type=click.Path(path_type=Path, allow_dash=True), help="Write this file; - for stdout.")
@click.option("--compare", metavar="EXECUTION|JOB", help="Hold the newest execution, or the job, against another.")
@click.option("--with-rows", is_flag=True, help="Show the leads, too: personal data.")
@options.JSON_OPTION
def report(
    job_options: options.JobOptions,
    page: Path | None,
    compare: str | None,
    with_rows: bool,
    as_json: bool,
) -> None:
    """Write the report of JOB: what was got, what it cost, who earned it, what needs a person.

    From the ledger and the input alone, without network. It holds no leads, unless --with-rows asks for them.
    """
    to_stdout = page == Path("-")
    if to_stdout and as_json:
        raise click.UsageError("--json and -o - would both write to stdout: choose one")
    job = job_options.load()
    now = datetime.now().astimezone()
    path = (
        None if to_stdout or (as_json and page is None) else page.absolute() if page else default_report_path(job, now)
    )
    if path is not None or to_stdout:
        _require_extra()
    # First, so that an invalid comparison is reported before the long reading.
    comparison = None if compare is None else _compare(job, compare, use_sandbox=job_options.use_sandbox)
    data = replace(build_report(job, job_options.arguments(), now, with_rows=with_rows), comparison=comparison)
    if to_stdout:
        click.echo(_render_page(data))
    elif path is not None:
        write_report(path, _render_page(data), job, now)
        if sys.stderr.isatty():
            click.echo(f"the report is in {path}", err=True)
    if as_json:
        click.echo(json.dumps(data.as_json(), ensure_ascii=False))
