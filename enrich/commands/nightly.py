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
    from enrich.nights.outlook import Finding

T = TypeVar("T")
FOLDER = click.Path(path_type=Path, file_okay=False)
#: What the unit and the line take over from the present shell.
TAKEN_OVER = ("DATABAR_BASE_URL", "SSL_CERT_FILE", "SSL_CERT_DIR", "ENRICH_LEDGER")


def _read_by(read: Callable[[str], T], value: str) -> T:
    try:
        return read(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _at(_: click.Context, __: click.Parameter, value: str) -> tuple[int, int]:
    from enrich.nights.schedule import parse_at

    return _read_by(parse_at, value)


def _days(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...]:
    from enrich.nights.schedule import parse_days

    return () if value is None else _read_by(parse_days, value)


@click.command(short_help="Print the crontab line and the systemd units for JOB.")
@options.JOB_ARGUMENT
@click.option("--at", default="02:00", show_default=True, callback=_at, metavar="HH:MM", help="When, in local time.")
@click.option("--days", callback=_days, metavar="mon-fri", help="On these days; default: every day.")
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
    from enrich.fields import parse_duration
    from enrich.nights import machine, schedule
    from enrich.setup.places import existing, written

    _read_by(parse_duration, max_time)
    job = options.load(job_file, None, None, None, use_sandbox=False)
    log = (log_file or job_file.with_name(f"{job.name}.log")).absolute()
    key = key_file or Path(os.environ.get("DATABAR_API_KEY_FILE", "").strip() or "/etc/enrich/databar_api_key")
    night = schedule.Night(*at, days)
    folders = {existing(path.parent) for path in (*written(job, datetime.now().astimezone()).values(), log)}
    plan = schedule.Plan(
        name=job.name,
        command=machine.executable(),
        job=job_file.absolute(),
        log=log,
        key_file=key.absolute(),
        user=user or pwd.getpwuid(os.getuid()).pw_name,
        night=night,
        max_time=max_time.replace(" ", ""),
        writes=sorted(folder for folder in folders if folders.isdisjoint(folder.parents)),
        environ={name: os.environ[name] for name in TAKEN_OVER if os.environ.get(name)},
    )
    units = {f"{plan.unit}.service": schedule.service(plan), f"{plan.unit}.timer": schedule.timer(plan)}
    if output_dir is not None:
        _write(output_dir, units, force=force)
    if only != "systemd" and not (output_dir and only is None):
        click.echo(schedule.crontab(plan), nl=False)
    if only != "crontab" and output_dir is None:
        for name, text in units.items():
            click.echo(f"\n# /etc/systemd/system/{name}\n{text}", nl=False)


def _write(folder: Path, units: dict[str, str], *, force: bool) -> None:
    from enrich.setup.init import save

    for name, text in units.items():
        save(text, folder / name, force=force)
        click.echo(f"{folder / name} is written", err=True)


@click.command(short_help="Say what will go wrong with JOB tonight.")
@options.JOB_ARGUMENT
@click.option("--env", "given", multiple=True, metavar="NAME=VALUE", help="A variable that the crontab sets.")
@click.option("--env-file", type=click.File(encoding="utf-8"), help="A file of such variables, one a line.")
@click.option("--at", default="02:00", show_default=True, callback=_at, metavar="HH:MM", help="When the job runs next.")
@click.option("--offline", is_flag=True, help="Do not ask the API.")
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Look at the sandbox's ledger, and ask the sandbox.")
@options.AS_JSON
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
    from enrich.nights import doctor as practice
    from enrich.nights.outlook import failed, next_night

    environ = _cron_environ(given, env_file)
    now = datetime.now().astimezone()
    findings: list[Finding] = []
    with ExitStack() as stack:
        shell = stack.enter_context(_as_cron(environ))
        access = stack.enter_context(options.access(None, use_sandbox=True)) if use_sandbox else None
        visit = practice.Visit(environ, shell, now, next_night(now, *at), offline, access)
        try:
            job = options.load(job_file, None, None, None, use_sandbox)
        except EnrichError as error:
            findings = [failed("job", error), *practice.environment(visit)]
        else:
            findings = list(practice.examine(job, visit))
    if as_json:
        click.echo(json.dumps(practice.as_json(str(job_file), findings), ensure_ascii=False))
    else:
        click.echo("\n".join(map(str, findings)))
    return practice.exit_code(findings)


def _cron_environ(given: tuple[str, ...], env_file: TextIO | None) -> dict[str, str]:
    """Make the environment that cron will give: next to nothing, and what the crontab sets."""
    from enrich.nights.machine import read_environ

    environ = {"HOME": pwd.getpwuid(os.getuid()).pw_dir, "PATH": "/usr/bin:/bin"}
    if env_file is not None:
        environ |= _read_by(lambda _: read_environ(env_file), "")
    for pair in given:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise click.BadParameter(f"`{pair}` must be NAME=VALUE", param_hint="--env")
        environ[name] = value
    return environ


@contextmanager
def _as_cron(environ: dict[str, str]) -> Iterator[dict[str, str]]:
    """Live in cron's environment; yield the shell's."""
    shell = dict(os.environ)
    os.environ.clear()
    os.environ.update(environ)
    try:
        yield shell
    finally:
        os.environ.clear()
        os.environ.update(shell)
