"""The checks of `enrich doctor`: facts about the machine, and pure functions that turn facts into findings."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from msgspec import Struct

from enrich.databar.clock import CLOCK_TOLERANCE_MS
from enrich.errors import EnrichError
from enrich.exit_codes import ExitCode, JobArguments, format_actions, required_actions
from enrich.job.locations import Location
from enrich.ledger.records import ExecutionRow
from enrich.models import iso_time, pluralize, to_credits

DAY_S = 86_400.0
#: An input that did not change for longer than this (seconds) causes a warning.
STALE_INPUT_S = 2 * DAY_S
#: The marks of findings, in the order of the output.
MARKS = ("fail", "warn", "ok")
#: Number of days for which the output names are checked.
DAYS_AHEAD = 366


class Finding(Struct, frozen=True):
    """A finding of the doctor. `exit_code` is the exit code that a run would have because of a `fail`."""

    mark: Literal["ok", "warn", "fail"]
    subject: str
    message: str
    remedy: str | None = None
    exit_code: ExitCode = ExitCode.OK

    def lines(self) -> Iterator[str]:
        """Yield the finding as text, each line of the remedy on a line of its own."""
        yield f"{self.mark:<6}{self.subject:<13}{' '.join(self.message.split())}"
        for number, line in enumerate((self.remedy or "").splitlines()):
            yield f"{'':<6}{'':<13}{' ' if number else '→'} {' '.join(line.split())}"


def format_findings(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield the findings as text: failures, warnings, the rest, and their number."""
    counts = Counter(finding.mark for finding in findings)
    for finding in sorted(findings, key=lambda each: MARKS.index(each.mark)):
        yield from finding.lines()
    if counts["fail"] or counts["warn"]:
        yield f"{pluralize(counts['fail'], 'failure')}, {pluralize(counts['warn'], 'warning')}"
    else:
        yield "No problems found"


def error_finding(subject: str, error: EnrichError) -> Finding:
    """Turn an error that a run would raise into a finding."""
    return Finding("fail", subject, error.message, error.hint, error.exit_code)


def check_clock(ahead_s: float | None) -> Finding:
    """Check by how many seconds the API's clock is ahead of this machine's. None: the API sent no time."""
    if ahead_s is None:
        return Finding("ok", "clock", "not compared: the API sends no time")
    if abs(ahead_s) * 1000 <= CLOCK_TOLERANCE_MS:
        return Finding("ok", "clock", "agrees with the API's")
    direction = "behind" if ahead_s > 0 else "ahead of"
    message = f"this machine's clock is {timedelta(seconds=abs(round(ahead_s)))} {direction} the API's"
    return Finding("warn", "clock", message, "set it by NTP, because cron starts runs by it")


def check_balance(
    balance: int | None, min_balance: int | None, max_price: int | None, recent_spends: Sequence[int]
) -> Finding:
    """Check the balance (None: not reported) against the needs of the next run. All in millionths of a credit.

    `max_price` is the maximum price of one request. `recent_spends` are the amounts that the last runs spent.
    """
    if balance is None:
        return Finding("ok", "balance", "not reported by the API")
    balance_text = f"{to_credits(balance):,.2f} credits"
    if balance < 0:
        return Finding("fail", "balance", f"{balance_text}: runs are refused", "top up", ExitCode.REFUSED)
    if min_balance is not None and balance < min_balance:
        least = f"limits.min_balance is {to_credits(min_balance):,.2f}"
        return Finding(
            "fail", "balance", f"{balance_text}, but {least}", "top up, or lower min_balance", ExitCode.REFUSED
        )
    if max_price is not None and balance - (min_balance or 0) < max_price:
        price = f"one request may cost {to_credits(max_price):,.2f}"
        return Finding("fail", "balance", f"{balance_text}, but {price}", "top up", ExitCode.REFUSED)
    if balance - (min_balance or 0) < max(recent_spends, default=0):
        return Finding(
            "warn",
            "balance",
            f"{balance_text}, less than the {to_credits(max(recent_spends)):,.2f} of a past run",
            "top up",
        )
    return Finding("ok", "balance", balance_text)


def check_cap(max_credits: int | None, max_price: int | None, executions: Sequence[ExecutionRow]) -> Finding:
    """Check the cap (millionths of a credit) against the last executions, which are rows of the ledger."""
    if max_credits is None:
        return Finding(
            "warn", "cap", "limits.max_credits is not set: a run can spend the whole balance", "set it in the job file"
        )
    cap_text = f"limits.max_credits is {to_credits(max_credits):,.2f}"
    stopped = sum(row.exit_code == ExitCode.CREDITS for row in executions)
    max_spent = max((row.spent for row in executions), default=0)
    if max_price is not None and max_credits < max_price:
        message = f"{cap_text}, but one request may cost {to_credits(max_price):,.2f}: nothing would be sent"
        return Finding("fail", "cap", message, "raise it, or choose cheaper `enrichments`", ExitCode.CREDITS)
    if stopped:
        runs = pluralize(len(executions), "run")
        message = f"{cap_text}: {stopped} of the last {runs} stopped for credits, with rows left pending"
        return Finding("warn", "cap", message, "raise it if the backlog grows")
    if max_credits < max_spent:
        return Finding(
            "warn", "cap", f"{cap_text}, but one of the last runs needed {to_credits(max_spent):,.2f}", "raise it"
        )
    return Finding("ok", "cap", cap_text)


def check_expiring_results(submitted_ms: Sequence[int], ttl_ms: int, now_ms: int, next_run_ms: int) -> Finding:
    """Check for results that the API deletes before the next run. Times are in milliseconds since 1970 (UTC)."""
    if not submitted_ms:
        return Finding("ok", "results", "nothing is running at Databar")
    count = sum(at + ttl_ms <= next_run_ms for at in submitted_ms)
    waiting = f"{pluralize(len(submitted_ms), 'paid request')} running at Databar"
    if not count:
        return Finding("ok", "results", f"{waiting}; the first expires at {iso_time(min(submitted_ms) + ttl_ms)}")
    expired = sum(at + ttl_ms <= now_ms for at in submitted_ms)
    past = f" ({expired:,} of them have probably expired)" if expired else ""
    message = f"{waiting}, {count:,} expire before the next run at {iso_time(next_run_ms)}{past}"
    return Finding("warn", "results", message, "run the job now: it collects them first")


def check_in_doubt(count: int) -> Finding:
    """Check for unconfirmed requests, which need a decision."""
    if not count:
        return Finding("ok", "unconfirmed", "no request is unconfirmed")
    remedy = "\n".join(format_actions(required_actions(ExitCode.IN_DOUBT, {}, JobArguments("JOB", "JOB"))))
    message = f"{pluralize(count, 'request')} may have been charged: runs end with 14 until you decide"
    return Finding("warn", "unconfirmed", message, remedy)


def check_input_age(changed_s: float, now_s: float) -> Finding:
    """Check the age of the input. Times are in seconds since 1970."""
    days = (now_s - changed_s) / DAY_S
    if now_s - changed_s > STALE_INPUT_S:
        return Finding("warn", "input", f"unchanged for {days:.0f} days", "check that the export still runs")
    return Finding("ok", "input", "changed within the last two days")


def check_output_names(
    path_of: Callable[[datetime], Location], start: datetime, reserved: Mapping[Path, str]
) -> Finding:
    """Check the output names of a year, each at the time of `start`: against `reserved` paths, and for repeats."""
    daily_paths = [path_of(start + timedelta(days=day)) for day in range(DAYS_AHEAD)]
    for day, path in enumerate(daily_paths):
        if isinstance(path, Path) and path in reserved:
            message = f"in {pluralize(day, 'day')} the output is {path}, which is {reserved[path]}"
            return Finding("fail", "output", message, "choose another `output`", ExitCode.USAGE)
    later = next((day for day in range(1, DAYS_AHEAD) if daily_paths[day] == daily_paths[0]), None)
    if later is None:
        return Finding("ok", "output", f"{daily_paths[0]} at the next run; each day has its own file")
    if later == 1 and len(set(daily_paths)) == 1:
        return Finding("ok", "output", f"{daily_paths[0]}; each run replaces it")
    message = f"its name repeats after {pluralize(later, 'day')}, and then the older file is replaced"
    return Finding("warn", "output", message, "use %Y-%m-%d, or no codes at all")


def check_free_space(folder: Path, free: int, output_bytes: int, ledger_bytes: int) -> Finding:
    """Check the free space in bytes: the output needs `output_bytes`, the ledger up to `ledger_bytes`."""
    free_text = f"{_format_size(free)} free in {folder}"
    if free < output_bytes:
        message = f"{free_text}, the output needs {_format_size(output_bytes)}"
        return Finding("fail", "disk", message, "free some space", ExitCode.REFUSED)
    if free < output_bytes + ledger_bytes:
        return Finding(
            "warn",
            "disk",
            f"{free_text}, a run may need {_format_size(output_bytes + ledger_bytes)}",
            "free some space",
        )
    return Finding("ok", "disk", f"{free_text}, a run needs at most {_format_size(output_bytes + ledger_bytes)}")


def _format_size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:  # noqa: PLR2004 - decimal units, as disks are sold
            return f"{count:,.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def next_run_time(now: datetime, hour: int, minute: int) -> datetime:
    """Return the next time after `now`, a local time, at which the local clock shows this time."""
    clock = now.replace(tzinfo=None)
    today = clock.replace(hour=hour, minute=minute, second=0, microsecond=0)
    # Only then in the time zone, whose offset may change in the night.
    return (today if today > clock else today + timedelta(days=1)).astimezone()


#: Network file systems, by their names in Linux. SQLite's locks are not safe on them.
_NETWORK = re.compile(r"nfs\d?|cifs|smb\w*|ncpfs|afs|9p|ceph|glusterfs|lustre|beegfs|gpfs|davfs|fuse\..*")
#: FUSE file systems whose data is on this machine.
_LOCAL_FUSE = frozenset(
    {"fuse.lxcfs", "fuse.portal", "fuse.gvfsd-fuse", "fuse.bindfs", "fuse.mergerfs", "fuse.ntfs-3g"}
)
_OCTAL_ESCAPE = re.compile(r"\\([0-7]{3})")
#: A program that is started must finish within this time (seconds).
_START_TIMEOUT_S = 30.0


def file_system_type(mountinfo: str, path: Path) -> str | None:
    """Return the type of the file system of a path (absolute, no links) from the text of /proc/self/mountinfo.

    A line is `36 35 98:0 /root /mount/point rw,noatime - ext4 /dev/sda1 rw`, see proc(5). A later mount covers an
    earlier one at the same mount point. None if the text does not contain it.
    """
    found: tuple[int, str] | None = None
    for line in mountinfo.splitlines():
        before, dash, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")[0]
        if not dash or len(fields) < 5 or not kind:  # noqa: PLR2004 - the mount point is the fifth
            continue
        point = Path(_OCTAL_ESCAPE.sub(lambda code: chr(int(code[1], 8)), fields[4]))
        if point in (path, *path.parents) and (found is None or len(point.parts) >= found[0]):
            found = len(point.parts), kind
    return None if found is None else found[1]


def is_network_file_system(kind: str | None) -> bool:
    """Whether this is the type of a network file system."""
    return kind is not None and kind not in _LOCAL_FUSE and _NETWORK.fullmatch(kind) is not None


def read_mountinfo() -> str:
    """Return the text of /proc/self/mountinfo, "" on a system without it."""
    try:
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def is_accessible_by_others(path: Path) -> bool:
    """Whether the group or others have any permission on a file."""
    return bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))


def startup_error(command: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """Start the program as cron would. Return the error, None if it starts."""
    try:
        result = _run_program([*command, "--version"], {**environ, "PYTHONDONTWRITEBYTECODE": "1"})
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if result.returncode:
        return " ".join(result.stderr.decode(errors="replace").split())[-200:] or f"exit {result.returncode}"
    return None


def file_name_encoding(environ: Mapping[str, str]) -> str:
    """Return the file name encoding of a Python process in this environment, "" if it does not start."""
    script = "import sys; print(sys.getfilesystemencoding())"
    return _run_program([sys.executable, "-c", script], environ).stdout.decode(errors="replace").strip()


def _run_program(command: Sequence[str], environ: Mapping[str, str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(  # noqa: S603 - our own program or interpreter
        command,
        env=environ,
        cwd="/",
        capture_output=True,
        timeout=_START_TIMEOUT_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )
