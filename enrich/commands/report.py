"""`enrich report`: writes the report of a job as one HTML page or as JSON, and replaces only an earlier report."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec.structs import replace

from enrich.commands import options
from enrich.commands.streams import echo_message
from enrich.errors import CommandRefused, EnrichError, JobError, install_hint
from enrich.exit_codes import JobArguments
from enrich.files.atomic import replace_file
from enrich.job.job import Job
from enrich.job.local_files import real_path
from enrich.job.locations import sandbox_file_name
from enrich.models import parse_count

if TYPE_CHECKING:
    from enrich.report.data import Comparison, Report

#: The last line of every report; a file without it was not written by enrich.
REPORT_MARKER = b"\n<!-- a report of enrich -->\n"
#: The line before it in the report of a sandbox run.
SANDBOX_MARKER = b"\n<!-- SANDBOX -->"
PAGE_SUFFIXES = (".html", ".htm")
_OTHER_FILE_HINT = "choose another file: `report` in the job file, or enrich report JOB -o FILE"
INSTALL_HINT = install_hint("report")
_LIBRARIES = ("jinja2", "vl_convert")


def _compare(job: Job, other: str, *, use_sandbox: bool) -> Comparison:
    from enrich.report.compare import compare_executions, compare_jobs

    if (number := parse_count(other)) is not None:
        return compare_executions(job, number)
    return compare_jobs(job, options.JobOptions(Path(other), use_sandbox=use_sandbox).load())


def is_extra_missing() -> bool:
    """Return True when a library for drawing a report is not installed."""
    return any(find_spec(name) is None for name in _LIBRARIES)


def _require_extra() -> None:
    if is_extra_missing():
        raise JobError("the report is not installed", INSTALL_HINT)


def _build_report(job: Job, job_arguments: JobArguments, now: datetime, *, with_rows: bool = False) -> Report:
    from enrich.report.build import build_report

    return build_report(job, job_arguments, now, with_rows=with_rows)


def _render_page(data: Report, job: Job, now: datetime) -> str:
    import ctypes

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


# The file


def default_report_path(job: Job, now: datetime) -> Path:
    """Return the report's path: the job's own, else beside its output, else beside the job file."""
    named = job.report_path(now)
    if named is not None:
        return named
    output = job.output_path(now)
    folder = output.parent if isinstance(output, Path) else job.document.folder
    name = f"{job.name}_report.html"
    return folder / (sandbox_file_name(name) if job.sandbox else name)


def given_report_path(job: Job, path: Path) -> Path:
    """Return where to write a page of this name: in a sandbox not over a real run's report. Raises JobError."""
    job.check_not_own(path, "report", _OTHER_FILE_HINT, allowed="report")
    with suppress(OSError):  # `write_report` reports a file that cannot be read
        if job.sandbox and _is_real_report(path):
            return path.with_name(sandbox_file_name(path.name))
    return path


def write_report(path: Path, page: str, job: Job) -> None:
    """Write a report atomically (mode 0600). Raises JobError rather than replace another file, CommandRefused."""
    job.check_not_own(path, "report", _OTHER_FILE_HINT, allowed="report")
    try:
        if path.exists() and not is_report(path):
            raise JobError(f"{path} exists and is not a report of enrich", _OTHER_FILE_HINT)
        if job.sandbox and _is_real_report(path):
            raise CommandRefused(f"{path}: the report would replace that of a real run", _OTHER_FILE_HINT)
        marker = (SANDBOX_MARKER if job.sandbox else b"") + REPORT_MARKER
        replace_file(path, page.encode(errors="replace") + marker)
    except OSError as error:
        raise CommandRefused(f"{path}: the report cannot be written: {error.strerror}", _OTHER_FILE_HINT) from error


def is_report(path: Path) -> bool:
    """Return True for a report of enrich, and for an empty HTML file: another empty file may be a lock or a journal."""
    if not path.is_file():
        return False
    end = _read_end(path, len(REPORT_MARKER))
    return end == REPORT_MARKER if end else path.suffix.lower() in PAGE_SUFFIXES


def _is_real_report(path: Path) -> bool:
    """Return True for the report of a real run."""
    end = _read_end(path, len(SANDBOX_MARKER + REPORT_MARKER)) if is_report(path) else b""
    return bool(end) and not end.startswith(SANDBOX_MARKER)


def _read_end(path: Path, count: int) -> bytes:
    """Return the last bytes of a file."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - count))
        return file.read()


def with_relative_paths(report: Report, job: Job, now: datetime, folder: Path) -> Report:
    """Return the report with paths relative to `folder` if the job file is in it, else to that of the job file."""
    job_file = Path(os.path.abspath(job.document.path))  # noqa: PTH100 - without `..`, but with symbolic links
    is_inside = folder != Path(folder.anchor) and folder in job_file.parents
    relative = _relative_paths(job, now, folder if is_inside else job_file.parent)

    def shorten(text: str) -> str:
        for path, short in relative.items():
            text = text.replace(path, short)
        return text

    return replace(
        report,
        job_file=shorten(str(job_file)),
        input=shorten(report.input),
        output=shorten(report.output),
        ledger=shorten(report.ledger),
        actions=[
            replace(action, text=shorten(action.text), commands=tuple(map(shorten, action.commands)))
            for action in report.actions
        ],
        notes=[shorten(note) for note in report.notes],
    )


def _relative_paths(job: Job, now: datetime, base: Path) -> Mapping[str, str]:
    """Return the local paths of the job with their relative forms, the longest first, and the folder itself."""
    named = [job.document.path, job.input_path, job.ledger, *job.file_locations(now).values()]
    paths = {path.absolute() for path in named if isinstance(path, Path)}
    paths |= {real_path(path) for path in paths}
    relative = {str(path): os.path.relpath(path, base) for path in paths} | {f"{base}{os.sep}": ""}
    return dict(sorted(relative.items(), key=lambda pair: -len(pair[0])))
