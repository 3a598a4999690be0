"""`enrich report`: one page to look at."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from enrich.commands import options
from enrich.commands.witnessed import target_of

if TYPE_CHECKING:
    from enrich.job import Job
    from enrich.report.facts import Comparison, Report
    from enrich.watch.outcome import Target


@click.command(short_help="Write the report of JOB: one HTML page.")
@options.JOB_ARGUMENT
@click.option("-o", "page", type=click.Path(path_type=Path, allow_dash=True), help="Write this file; - for stdout.")
@click.option("--compare", metavar="EXECUTION|JOB", help="Hold the newest execution, or the job, against another.")
@click.option("--with-rows", is_flag=True, help="Show the leads, too: personal data.")
@click.option("--input", "input_path", metavar="FILE", help="Read this file or URL instead.")
@options.LEDGER
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Look into the ledger of the sandbox.")
@options.AS_JSON
def report(
    job_file: Path,
    page: Path | None,
    compare: str | None,
    with_rows: bool,
    input_path: str | None,
    ledger: str | None,
    use_sandbox: bool,
    as_json: bool,
) -> None:
    """Write the report of JOB: what was got, what it cost, who earned it, what needs a person.

    From the ledger and the input alone, without network. It holds no leads, unless --with-rows asks for them.
    """
    from dataclasses import replace

    from enrich.report.file import usual_place, write
    from enrich.report.gather import gather

    to_stdout = page == Path("-")
    if to_stdout and as_json:
        raise click.UsageError("--json and -o - would both write to stdout: choose one")
    job = options.load(job_file, input_path, None, ledger, use_sandbox)
    now = datetime.now().astimezone()
    place = None if to_stdout or (as_json and page is None) else page.absolute() if page else usual_place(job, now)
    if place is not None or to_stdout:
        _need_extra()
    target = target_of(job_file, input_path, None, ledger, use_sandbox=use_sandbox)
    # Whom it can't be compared with is said before all is read.
    comparison = None if compare is None else _compared(job, compare, use_sandbox=use_sandbox)
    told = replace(gather(job, target, now, with_rows=with_rows), comparison=comparison)
    if to_stdout:
        click.echo(_page(told))
    elif place is not None:
        write(place, _page(told), job, now)
        if sys.stderr.isatty():
            click.echo(f"the report is in {place}", err=True)
    if as_json:
        click.echo(json.dumps(told.as_json(), ensure_ascii=False))


def _compared(job: Job, other: str, *, use_sandbox: bool) -> Comparison:
    from enrich.report.compare import compare_executions, compare_jobs

    if other.isdecimal():
        return compare_executions(job, int(other))
    return compare_jobs(job, options.load(Path(other), None, None, None, use_sandbox))


def _need_extra() -> None:
    from enrich.errors import JobError
    from enrich.report.file import EXTRA, lacks_extra

    if lacks_extra():
        raise JobError("the report needs its extra", EXTRA)


def _page(told: Report) -> str:
    from enrich.report.page import render

    return render(told)


def leave_report(job: Job, target: Target) -> str | None:
    """Write the report that the job wants of every run; return what went wrong. Nothing that happens breaks the run."""
    from enrich.errors import EnrichError, Interrupted
    from enrich.report.file import write
    from enrich.report.gather import gather

    try:
        now = datetime.now().astimezone()
        place = job.report_path(now)
        if place is not None:
            _need_extra()
            write(place, _page(gather(job, target, now)), job, now)
    except (KeyboardInterrupt, Interrupted):
        return "the report was not written: interrupted"
    except EnrichError as error:
        return f"the report was not written: {error.message}" + (f"; {error.hint}" if error.hint else "")
    except BaseException as error:  # noqa: BLE001 - a panic of what draws is no Exception; its text may hold data
        return f"the report was not written: this is a bug: {type(error).__name__}"
    return None
