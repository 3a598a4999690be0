"""`enrich cron`: writes the crontab line and systemd units of a job, and installs nothing. Also cron's environment."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import click
from msgspec import Struct

from enrich.commands import options
from enrich.commands.init import write_new_file
from enrich.commands.paths import absolute_path, files_written, nearest_existing
from enrich.commands.streams import echo_message
from enrich.errors import JobError, printable
from enrich.files.object_store import CREDENTIAL_VARIABLES
from enrich.job.field_types import parse_duration
from enrich.job.local_files import read_text
from enrich.job.locations import ObjectUrl, is_url

#: Environment variables copied from the current shell to the units and the crontab line.
INHERITED_VARIABLES = ("DATABAR_BASE_URL", "SSL_CERT_FILE", "SSL_CERT_DIR", "ENRICH_LEDGER")
DAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat")
#: It is written into the units without quotes.
_USER_NAME = re.compile(r"[\w.][\w.@$+-]*")
_ENV_FILE_HINT = "`--env-file` is a file with the variables of your crontab, one NAME=VALUE per line"
_LONG_DAYS = ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")


class ScheduledJob(Struct, frozen=True):
    """The command, user and schedule of a job: a local time and days of the week (0 is Sunday; empty: every day).

    A run writes to `writable_folders`. All paths are absolute.
    """

    name: str
    command: Sequence[str]
    job: Path
    log: Path
    key_file: Path
    user: str
    hour: int
    minute: int
    max_time: str
    writable_folders: Sequence[Path]
    days: tuple[int, ...] = ()
    environ: Mapping[str, str] = {}
    #: The object storages that the job uses: s3, gs, az.
    storages: Sequence[str] = ()

    @property
    def unit_name(self) -> str:
        """The name of the systemd units, without suffix."""
        return "enrich-" + (re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-.") or "job")

    def command_line(self) -> list[str]:
        """Return the command with its arguments."""
        end = ["--if-locked", "skip", "--max-time", self.max_time, "--log-file", str(self.log)]
        return [*self.command, "run", str(self.job), *end]

    def storage_comments(self) -> str:
        """Return comment lines that name the variables for object storage. Their values are secrets."""
        return "".join(
            f"# Add to the environment of the run, for {scheme}://: {CREDENTIAL_VARIABLES[scheme]}\n"
            for scheme in self.storages
        )

    def check_printable(self) -> None:
        """Raise JobError if a path or variable has a character that does not fit on one line."""
        for text in (
            *self.command_line(),
            *map(str, self.writable_folders),
            str(self.key_file),
            *self.environ.values(),
        ):
            if not text.isprintable():
                raise JobError(f"{text!r}: a path with a line break cannot be used in a crontab", "rename it")


def parse_days(text: str) -> tuple[int, ...]:
    """Parse `mon-fri` or `mon,thu` to day numbers (0 is Sunday). () means every day. Raises ValueError."""
    days: set[int] = set()
    for part in text.lower().replace(" ", "").split(","):
        first, dash, last = part.partition("-")
        start = _parse_day(first)
        end = _parse_day(last) if dash else start
        days |= {(start + step) % 7 for step in range((end - start) % 7 + 1)}
    return tuple(sorted(days)) if len(days) < len(DAYS) else ()


def _parse_day(word: str) -> int:
    for number, name in enumerate(_LONG_DAYS):
        if word in (name, name[:3]):
            return number
    raise ValueError(f"`{word}` is not a day: use mon, tue, wed, thu, fri, sat, sun, or mon-fri")


def crontab_line(job: ScheduledJob) -> str:
    """Return the line for the user's `crontab -e`. Raises JobError for unprintable characters."""
    job.check_printable()
    days = ",".join(map(str, job.days)) or "*"
    environ = {**job.environ, "DATABAR_API_KEY_FILE": str(job.key_file)}
    words = [f"{name}={_quote_for_cron(value)}" for name, value in environ.items()]
    return f"{job.minute} {job.hour} * * {days} {' '.join([*words, *map(_quote_for_cron, job.command_line())])}"


def _quote_for_cron(word: str) -> str:
    r"""Quote a word for the shell and escape its `%` for cron, which would turn it into a line break.

    cron removes the backslash of every `\%`. The quotes are closed around it, so that no backslash of the word
    itself can come directly before it.
    """
    quoted = shlex.quote(word)
    return quoted.replace("%", r"'\%'" if quoted.startswith("'") else r"\%")


def crontab_text(job: ScheduledJob) -> str:
    """Return the crontab line with comments that explain it."""
    return f"""\
# {printable(job.name)}: for `crontab -e` of the user {job.user}.
# The key is alone in {printable(str(job.key_file))}, mode 0600, owned by that user.
# Without a terminal a run prints only problems. cron mails them to MAILTO.
{job.storage_comments()}{crontab_line(job)}
"""


def on_calendar(job: ScheduledJob) -> str:
    """Format the schedule as an OnCalendar value of systemd."""
    days = ",".join(DAYS[day] for day in job.days)
    return f"{days} *-*-* {job.hour:02}:{job.minute:02}:00".strip()


def systemd_timer(job: ScheduledJob) -> str:
    """Return the text of the systemd timer."""
    return f"""\
[Unit]
Description=Run enrich every night: {_escape_percent(job.name)}

[Timer]
OnCalendar={on_calendar(job)}
# Start a missed run after the machine was off.
Persistent=true

[Install]
WantedBy=timers.target
"""


def systemd_service(job: ScheduledJob) -> str:
    """Return the text of the systemd service. Raises JobError for unprintable characters."""
    job.check_printable()
    environ = "".join(f"Environment={_quote_word(f'{name}={value}')}\n" for name, value in job.environ.items())
    # In a command line, systemd would also expand `$NAME`.
    command = " ".join(_quote_word(word).replace("$", "$$") for word in job.command_line())
    writes = " ".join(_quote_word(str(folder)) for folder in job.writable_folders)
    used = (*job.writable_folders, job.job, job.key_file, Path(job.command[0]))
    is_shared = any(Path(tmp) in (path, *path.parents) for path in used for tmp in ("/tmp", "/var/tmp"))  # noqa: S108
    private_tmp = "" if is_shared else "PrivateTmp=true\n"
    return f"""\
[Unit]
Description=Enrich leads: {_escape_percent(job.name)}
Wants=network-online.target
After=network-online.target

[Service]
Type=oneshot
User={job.user}
# The unit reads the key from %d. The file can belong to root, mode 0600.
LoadCredential=databar_api_key:{_escape_percent(str(job.key_file))}
Environment=DATABAR_API_KEY_FILE=%d/databar_api_key
Environment=LANG=C.UTF-8
{job.storage_comments()}{environ}ExecStart={command}
# Not failures: 13 (out of time) and 143 (stopped). The next run resumes.
# Failures that require action: 2, 3, 5 (job, key, input), 4 (API unreachable), 10 (leads failed),
# 12 (cap or credits), 14 (unconfirmed), 15 (canary). A locked ledger (11) is skipped with 0.
# Add 10 if a few failed leads are normal for you.
SuccessExitStatus=13 143
# A stopped run records its open requests and exits within 10 seconds.
TimeoutStopSec=30
UMask=0077
NoNewPrivileges=true
ProtectSystem=strict
ProtectHome=read-only
# Folders of the output, the ledger and the log. They must exist before the unit starts.
ReadWritePaths={writes}
{private_tmp}PrivateDevices=true
ProtectKernelTunables=true
ProtectKernelModules=true
ProtectControlGroups=true
RestrictSUIDSGID=true
LockPersonality=true
"""


def _escape_percent(text: str) -> str:
    """Escape `%`, which systemd would read as a specifier, and unprintable characters."""
    return printable(text).replace("%", "%%")


def _quote_word(text: str) -> str:
    """Quote a word for a systemd unit file."""
    quoted = _escape_percent(text).replace("\\", "\\\\").replace('"', '\\"')
    plain = re.fullmatch(r"[\w@+=:,./%-]+", quoted, re.ASCII)
    return quoted if plain else f'"{quoted}"'


def enrich_command() -> list[str]:
    """Return the absolute command that starts this program."""
    for path in (Path(sys.argv[0]), Path(sys.executable).parent / "enrich"):
        if path.name == "enrich" and path.is_file() and os.access(path, os.X_OK):
            return [str(absolute_path(path))]
    return [sys.executable, "-m", "enrich"]


def make_cron_environ(given: tuple[str, ...], env_file: Path | None) -> dict[str, str]:
    """Return the environment under cron: HOME, PATH and the crontab's variables. A bare name in `given` is copied."""
    environ = {"HOME": pwd.getpwuid(os.getuid()).pw_dir, "PATH": "/usr/bin:/bin"}
    if env_file is not None:
        try:
            environ |= parse_env_lines(read_text(env_file).splitlines())
        except UnicodeDecodeError:
            raise JobError(f"{env_file} is not UTF-8 text", _ENV_FILE_HINT) from None
        except OSError as error:
            raise JobError(f"{env_file} cannot be read: {error.strerror}", _ENV_FILE_HINT) from error
        except ValueError as error:
            raise JobError(f"{env_file}: {error}") from error
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals and name in os.environ:
            value = os.environ[name]
        elif not (name and equals):
            raise click.BadParameter(
                f"`{pair}` must be NAME=VALUE, or the NAME of a variable that is set", param_hint="--env"
            )
        environ[name] = value
    return environ


@contextmanager
def cron_environment(environ: dict[str, str]) -> Iterator[dict[str, str]]:
    """Use cron's environment during the block. Yields a copy of the shell's environment."""
    shell = dict(os.environ)
    os.environ.clear()
    os.environ.update(environ)
    try:
        yield shell
    finally:
        os.environ.clear()
        os.environ.update(shell)


def parse_env_lines(lines: Iterable[str]) -> dict[str, str]:
    """Parse `NAME=VALUE` lines with `#` comments, quotes and `export` as in a shell. Raises ValueError."""
    environ: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        for word in words[1:] if words[:1] == ["export"] else words:
            name, equals, value = word.partition("=")
            if not equals or not name.isidentifier() or "\0" in value:
                raise ValueError(f"line {number}: must be NAME=VALUE")
            environ[name] = value
    return environ


def _parse_folder(text: str) -> Path:
    """Parse the path of a folder, which need not exist. Raises ValueError for a URL, a file and an empty text."""
    if not text:
        raise ValueError("it is empty")
    if is_url(text):
        raise ValueError("must be a folder on this machine, not a URL")
    path = Path(text)
    if os.path.lexists(path) and not os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises PermissionError
        raise ValueError(f"{text} is not a folder: choose another, or leave the option out to print the units")
    return path


def _absolute_value(variable: str, value: str) -> str:
    """Return a URL unchanged, and absolute paths in place of others. SSL_CERT_DIR may name several folders."""
    if is_url(value):
        return value
    paths = value.split(os.pathsep) if variable == "SSL_CERT_DIR" else [value]
    return os.pathsep.join(str(absolute_path(Path(path))) for path in paths)


def _check_user(text: str) -> str:
    if not _USER_NAME.fullmatch(text):
        raise ValueError(f"{text!r} is not the name of a user")
    return text


def _check_duration(text: str) -> str:
    parse_duration(text)
    return text


@click.command()
@options.JOB_ARGUMENT
@click.option(
    "--at",
    default="02:00",
    show_default=True,
    type=options.TIME_OF_DAY,
    metavar="HH:MM",
    help="Time of day, in local time.",
)
@click.option(
    "--days", type=options.Parsed(parse_days), metavar="mon-fri", help="Days of the week. Default: every day."
)
@click.option(
    "--max-time",
    default="5h",
    show_default=True,
    type=options.Parsed(_check_duration),
    metavar="5h",
    help="Stop a run after this time.",
)
@click.option("--user", type=options.Parsed(_check_user), metavar="NAME", help="User that runs the job. Default: you.")
@click.option("--key-file", type=options.FILE, help="File with the API key. Default: DATABAR_API_KEY_FILE.")
@click.option("--log-file", type=options.FILE, help="Log file. Default: <name>.log in the folder of the job.")
@click.option("--crontab", "only", flag_value="crontab", help="Print the crontab line only.")
@click.option("--systemd", "only", flag_value="systemd", help="Print the systemd units only.")
@click.option(
    "--output-dir",
    type=options.Parsed(_parse_folder),
    metavar="DIRECTORY",
    help="Write the systemd units into this folder instead.",
)
@click.option("--force", is_flag=True, help="Replace existing units.")
def cron(
    job_file: Path,
    at: tuple[int, int],
    days: tuple[int, ...] | None,
    max_time: str,
    user: str | None,
    key_file: Path | None,
    log_file: Path | None,
    only: str | None,
    output_dir: Path | None,
    force: bool,
) -> None:
    """Print the crontab line and the systemd units that run JOB every night. Installs nothing."""
    job = options.JobOptions(job_file).load()
    log = absolute_path(log_file or job_file.with_name(f"{job.name}.log"))
    key_path = key_file or Path(os.environ.get("DATABAR_API_KEY_FILE", "").strip() or "/etc/enrich/databar_api_key")
    now = datetime.now().astimezone()
    folders = {nearest_existing(path.parent) for path in (*files_written(job, now).values(), log)}
    locations = job.file_locations(now).values()
    inherited = {name: value for name in INHERITED_VARIABLES if (value := os.environ.get(name))}
    scheduled = ScheduledJob(
        name=job.name,
        command=enrich_command(),
        job=absolute_path(job_file),
        log=log,
        key_file=absolute_path(key_path),
        user=user or pwd.getpwuid(os.getuid()).pw_name,
        hour=at[0],
        minute=at[1],
        days=days or (),
        max_time=max_time.replace(" ", ""),
        writable_folders=sorted(folder for folder in folders if folders.isdisjoint(folder.parents)),
        environ={name: _absolute_value(name, value) for name, value in inherited.items()},
        storages=sorted({location.scheme for location in locations if isinstance(location, ObjectUrl)}),
    )
    units = {
        f"{scheduled.unit_name}.service": systemd_service(scheduled),
        f"{scheduled.unit_name}.timer": systemd_timer(scheduled),
    }
    if output_dir is not None:
        for name, text in units.items():
            write_new_file(text, output_dir / name, force=force, other="another folder")
            echo_message(f"Written: {output_dir / name}")
    if only != "systemd" and not (output_dir and only is None):
        click.echo(crontab_text(scheduled), nl=False)
    if only != "crontab" and output_dir is None:
        for name, text in units.items():
            click.echo(f"\n# /etc/systemd/system/{name}\n{text}", nl=False)
