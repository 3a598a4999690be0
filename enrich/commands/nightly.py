"""`enrich cron` and `enrich doctor`: a job at night."""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

import click

from enrich.commands import options
from enrich.errors import EnrichError

if TYPE_CHECKING:
    from enrich.commands.doctor.checks import Finding

T = TypeVar("T")
FOLDER = click.Path(path_type=Path, file_okay=False)
#: What the unit and the line take over from the present shell.
INHERITED_VARIABLES = ("DATABAR_BASE_URL", "SSL_CERT_FILE", "SSL_CERT_DIR", "ENRICH_LEDGER")


def _parse_option(parse: Callable[[str], T], value: str) -> T:
    try:
        return parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _time_option(_: click.Context, __: click.Parameter, value: str) -> tuple[int, int]:
    from enrich.commands.cron import parse_time_of_day

    return _parse_option(parse_time_of_day, value)


def _days_option(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...]:
    from enrich.commands.cron import parse_days

    return () if value is None else _parse_option(parse_days, value)


@click.command(short_help="Print the crontab line and the systemd units for JOB.")
@options.JOB_ARGUMENT
@click.option(
    "--at", default="02:00", show_default=True, callback=_time_option, metavar="HH:MM", help="When, in local time."
)
@click.option("--days", callback=_days_option, metavar="mon-fri", help="On these days; default: every day.")
@click.option("--max-time", default="5h", show_default=True, metavar="5h", help="Stop a run after this time.")
@click.option("--user", help="Who runs it; default: you.")
@click.option("--key-file", type=options.FILE, help="Where the key lies; default: DATABAR_API_KEY_FILE.")
@click.option("--log-file", type=options.FILE, help="The log; default: <name>.log beside the job.")
@click.option("--crontab", "only", flag_value="crontab", help="Print the crontab line only.")
@click.option("--systemd", "only", flag_value="systemd", help="Print the systemd units only.")
@click.option("--output-dir", type=FOLDER, help="Write the systemd units into this folder instead.")
@click.option("--force", is_flag=True, help="Replace units that are there.")
def cron(
    job_file: Path,
    at: tuple[int, int],
    days: tuple[int, ...],
    max_time: str,
    user: str | None,
    key_file: Path | None,
    log_file: Path | None,
    only: str | None,
    output_dir: Path | None,
    force: bool,
) -> None:
    """Print the crontab line and the systemd units that run JOB every night; nothing is installed."""
    from enrich.commands import cron
    from enrich.commands.doctor import system
    from enrich.commands.paths import files_written, nearest_existing
    from enrich.job.spec import parse_duration

    _parse_option(parse_duration, max_time)
    job = options.load_job_file(job_file, None, None, None, use_sandbox=False)
    log = (log_file or job_file.with_name(f"{job.name}.log")).absolute()
    key_path = key_file or Path(os.environ.get("DATABAR_API_KEY_FILE", "").strip() or "/etc/enrich/databar_api_key")
    run_schedule = cron.Schedule(*at, days)
    folders = {
        nearest_existing(path.parent) for path in (*files_written(job, datetime.now().astimezone()).values(), log)
    }
    plan = cron.ScheduledJob(
        name=job.name,
        command=system.enrich_command(),
        job=job_file.absolute(),
        log=log,
        key_file=key_path.absolute(),
        user=user or pwd.getpwuid(os.getuid()).pw_name,
        schedule=run_schedule,
        max_time=max_time.replace(" ", ""),
        writable_folders=sorted(folder for folder in folders if folders.isdisjoint(folder.parents)),
        environ={name: os.environ[name] for name in INHERITED_VARIABLES if os.environ.get(name)},
    )
    units = {
        f"{plan.unit_name}.service": cron.systemd_service(plan),
        f"{plan.unit_name}.timer": cron.systemd_timer(plan),
    }
    if output_dir is not None:
        _write_units(output_dir, units, force=force)
    if only != "systemd" and not (output_dir and only is None):
        click.echo(cron.crontab_text(plan), nl=False)
    if only != "crontab" and output_dir is None:
        for name, text in units.items():
            click.echo(f"\n# /etc/systemd/system/{name}\n{text}", nl=False)


def _write_units(folder: Path, units: dict[str, str], *, force: bool) -> None:
    from enrich.commands.init.command import write_new_file

    for name, text in units.items():
        write_new_file(text, folder / name, force=force)
        click.echo(f"{folder / name} is written", err=True)


@click.command(short_help="Say what will go wrong with JOB tonight.")
@options.JOB_ARGUMENT
@click.option("--env", "given", multiple=True, metavar="NAME=VALUE", help="A variable that the crontab sets.")
@click.option("--env-file", type=click.File(encoding="utf-8"), help="A file of such variables, one a line.")
@click.option(
    "--at", default="02:00", show_default=True, callback=_time_option, metavar="HH:MM", help="When the job runs next."
)
@click.option("--offline", is_flag=True, help="Do not ask the API.")
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Look at the sandbox's ledger, and ask the sandbox.")
@options.JSON_OPTION
def doctor(
    job_file: Path,
    given: tuple[str, ...],
    env_file: TextIO | None,
    at: tuple[int, int],
    offline: bool,
    use_sandbox: bool,
    as_json: bool,
) -> int:
    """Say what will go wrong with JOB tonight: one line for each finding, with its remedy.

    It sees the world as cron will: without the variables of this shell. Nothing is written or paid. Exit 0
    when nothing fails, else the exit code that the run would have.
    """
    from enrich.commands.doctor import command
    from enrich.commands.doctor.checks import error_finding, next_run_time

    environ = _make_cron_environ(given, env_file)
    now = datetime.now().astimezone()
    findings: list[Finding] = []
    with ExitStack() as stack:
        shell = stack.enter_context(_cron_environment(environ))
        access = stack.enter_context(options.open_access(None, use_sandbox=True)) if use_sandbox else None
        context = command.DoctorContext(environ, shell, now, next_run_time(now, *at), offline, access)
        try:
            job = options.load_job_file(job_file, None, None, None, use_sandbox)
        except EnrichError as error:
            findings = [error_finding("job", error), *command.environment_findings(context)]
        else:
            findings = list(command.job_findings(job, context))
    if as_json:
        click.echo(json.dumps(command.findings_as_json(str(job_file), findings), ensure_ascii=False))
    else:
        click.echo("\n".join(map(str, findings)))
    return command.findings_exit_code(findings)


def _make_cron_environ(given: tuple[str, ...], env_file: TextIO | None) -> dict[str, str]:
    """Make the environment that cron will give: next to nothing, and what the crontab sets."""
    from enrich.commands.doctor.system import parse_env_lines

    environ = {"HOME": pwd.getpwuid(os.getuid()).pw_dir, "PATH": "/usr/bin:/bin"}
    if env_file is not None:
        environ |= _parse_option(lambda _: parse_env_lines(env_file), "")
    for pair in given:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise click.BadParameter(f"`{pair}` must be NAME=VALUE", param_hint="--env")
        environ[name] = value
    return environ


@contextmanager
def _cron_environment(environ: dict[str, str]) -> Iterator[dict[str, str]]:
    """Live in cron's environment; yield the shell's."""
    shell = dict(os.environ)
    os.environ.clear()
    os.environ.update(environ)
    try:
        yield shell
    finally:
        os.environ.clear()
        os.environ.update(shell)
