"""`enrich cron`: the crontab line and the systemd units that run a job every night. Texts only."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from enrich.errors import JobError

DAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat")
_LONG_DAYS = ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
_AT = re.compile(r"([01]?[0-9]|2[0-3]):([0-5][0-9])")


@dataclass(frozen=True, slots=True)
class Night:
    """When a job runs: at a local time, on these days of the week (0 is Sunday), none named: on all."""

    hour: int
    minute: int
    days: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run, by whom, when. `writes` are folders that a run writes in; paths are absolute."""

    name: str
    command: Sequence[str]
    job: Path
    log: Path
    key_file: Path
    user: str
    night: Night
    max_time: str
    writes: Sequence[Path]
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """The name of the units."""
        return "enrich-" + (re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-.") or "job")

    def words(self) -> list[str]:
        """The command with its arguments."""
        end = ["--if-locked", "skip", "--max-time", self.max_time, "--log-file", str(self.log)]
        return [*self.command, "run", str(self.job), *end]

    def check(self) -> None:
        """Refuse what no line can hold. Raises JobError."""
        for text in (*self.words(), *map(str, self.writes), str(self.key_file), *self.environ.values()):
            if not text.isprintable():
                raise JobError(f"{text!r}: a path with a line break or the like fits in no crontab", "rename it")


def parse_at(text: str) -> tuple[int, int]:
    """Read a time of the day. Raises ValueError."""
    match = _AT.fullmatch(text.strip())
    if match is None:
        raise ValueError("must be a time of the day such as 02:00, between 0:00 and 23:59")
    return int(match[1]), int(match[2])


def parse_days(text: str) -> tuple[int, ...]:
    """Read `mon-fri` or `mon,thu`. Raises ValueError."""
    days: set[int] = set()
    for part in text.lower().replace(" ", "").split(","):
        first, dash, last = part.partition("-")
        start = _day(first)
        end = _day(last) if dash else start
        days |= {(start + step) % 7 for step in range((end - start) % 7 + 1)}
    return tuple(sorted(days)) if len(days) < len(DAYS) else ()


def _day(word: str) -> int:
    for number, name in enumerate(_LONG_DAYS):
        if word in (name, name[:3]):
            return number
    raise ValueError(f"`{word}` is no day: use mon, tue, wed, thu, fri, sat, sun, or mon-fri")


def crontab_line(plan: Plan) -> str:
    """Write the line for `crontab -e` of the user."""
    plan.check()
    night = plan.night
    days = ",".join(map(str, night.days)) or "*"
    environ = {**plan.environ, "DATABAR_API_KEY_FILE": str(plan.key_file)}
    words = [f"{name}={_for_cron(value)}" for name, value in environ.items()]
    return f"{night.minute} {night.hour} * * {days} {' '.join([*words, *map(_for_cron, plan.words())])}"


def _for_cron(word: str) -> str:
    r"""Quote a word for the shell, and its `%` for cron, which would make a line break of it.

    cron takes the backslash off `\%` wherever it stands. The quotes are closed around it, so that no backslash
    of the word itself can stand before it.
    """
    quoted = shlex.quote(word)
    return quoted.replace("%", r"'\%'" if quoted.startswith("'") else r"\%")


def crontab(plan: Plan) -> str:
    """Write the line with what to know of it."""
    return f"""\
# {_comment(plan.name)}: for `crontab -e` of the user {plan.user}.
# The key is alone in {_comment(str(plan.key_file))}, mode 0600, owned by that user.
# Off a terminal a run prints nothing but what is wrong: cron mails that to MAILTO.
{crontab_line(plan)}
"""


def _comment(text: str) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def on_calendar(night: Night) -> str:
    """Write the time as systemd reads it."""
    days = ",".join(DAYS[day] for day in night.days)
    return f"{days} *-*-* {night.hour:02}:{night.minute:02}:00".strip()


def timer(plan: Plan) -> str:
    """Write the systemd timer."""
    return f"""\
[Unit]
Description=Run enrich every night: {_literal(plan.name)}

[Timer]
OnCalendar={on_calendar(plan.night)}
# A night that the machine slept through is made up for.
Persistent=true

[Install]
WantedBy=timers.target
"""


def service(plan: Plan) -> str:
    """Write the systemd service."""
    plan.check()
    environ = "".join(f"Environment={_word(f'{name}={value}')}\n" for name, value in plan.environ.items())
    writes = " ".join(_word(str(folder)) for folder in plan.writes)
    return f"""\
[Unit]
Description=Enrich leads: {_literal(plan.name)}
Wants=network-online.target
After=network-online.target

[Service]
Type=oneshot
User={plan.user}
# The unit sees the key under %d only; the file may belong to root, mode 0600.
LoadCredential=databar_api_key:{_literal(str(plan.key_file))}
Environment=DATABAR_API_KEY_FILE=%d/databar_api_key
Environment=LANG=C.UTF-8
{environ}ExecStart={" ".join(map(_argument, plan.words()))}
# No failure: 13 (the time is over, the next run resumes) and 143 (stopped: resumes likewise).
# Left as failures, for each needs a person: 2, 3 and 5 (job, key, input), 4 (API away), 10 (rows failed),
# 12 (cap or credits), 14 (in doubt: decide), 15 (canary). 11 cannot come: a locked ledger is skipped with 0.
# When a few failed rows are your everyday, add 10.
SuccessExitStatus=13 143
# A run that is stopped writes down what is under way and leaves within 10 seconds.
TimeoutStopSec=30
UMask=0077
NoNewPrivileges=true
ProtectSystem=strict
ProtectHome=read-only
# Where a run writes: the output, the ledger, the log. These folders must be there before the unit starts.
ReadWritePaths={writes}
{_private_tmp(plan)}PrivateDevices=true
ProtectKernelTunables=true
ProtectKernelModules=true
ProtectControlGroups=true
RestrictSUIDSGID=true
LockPersonality=true
"""


def _private_tmp(plan: Plan) -> str:
    """Give the unit a /tmp of its own, unless what it needs lies in the common one."""
    used = (*plan.writes, plan.job, plan.key_file, Path(plan.command[0]))
    shared = any(Path(tmp) in (path, *path.parents) for path in used for tmp in ("/tmp", "/var/tmp"))  # noqa: S108
    return "" if shared else "PrivateTmp=true\n"


def _literal(text: str) -> str:
    """Keep systemd from reading a `%` as a specifier."""
    return _comment(text).replace("%", "%%")


def _word(text: str) -> str:
    r"""Quote a word of a unit file."""
    quoted = _literal(text).replace("\\", "\\\\").replace('"', '\\"')
    plain = re.fullmatch(r"[\w@+=:,./%-]+", quoted, re.ASCII)
    return quoted if plain else f'"{quoted}"'


def _argument(text: str) -> str:
    """Quote a word of a command, in which systemd would put variables for `$NAME`, too."""
    return _word(text).replace("$", "$$")
