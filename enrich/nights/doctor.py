"""`enrich doctor`: what will go wrong tonight. Looks only: it collects the facts that `outlook` judges."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from enrich.api.credentials import Access, find_base_url, find_key
from enrich.api.network import find_certificates, find_proxy
from enrich.budget import make_budget
from enrich.errors import PRECEDENCE, EnrichError, Exit
from enrich.job import Job
from enrich.model import State, read_balance, to_micros
from enrich.nights import machine, outlook
from enrich.nights.outlook import Finding, failed
from enrich.place import LedgerPlace, Postgres
from enrich.report.file import EXTRA, lacks_extra
from enrich.setup.check import Checked, check_job, summary
from enrich.setup.online import Live, ask
from enrich.setup.places import existing, inputs, is_there, read_files, written
from enrich.store.database import exists
from enrich.store.ledger import Ledger
from enrich.store.lock import is_held
from enrich.store.sqlite import lock_path

#: Executions that are looked back at.
LAST = 7
#: What a request takes in a young ledger, in bytes, and how many requests tell it better.
REQUEST_BYTES, ENOUGH = 2_000, 100
#: How much smaller gzip makes a CSV, at most.
PACKED = 10
#: Variables that change where and how the API is reached.
ROUTES = (
    "DATABAR_BASE_URL",
    *(name for lower in ("https_proxy", "all_proxy", "no_proxy") for name in (lower, lower.upper())),
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "ENRICH_LEDGER",
)


@dataclass(frozen=True, slots=True)
class Visit:
    """How the doctor looks: `environ` is what cron will have, `shell` what the person has now.

    `sandbox` is the way to the sandbox when the job is looked at there. `night` is when the job runs next.
    """

    environ: Mapping[str, str]
    shell: Mapping[str, str]
    now: datetime
    night: datetime
    offline: bool = False
    sandbox: Access | None = None


def exit_code(findings: Sequence[Finding]) -> Exit:
    """The exit code that tonight's run would have for what fails."""
    held = {finding.code for finding in findings if finding.mark == "fail"}
    return next((code for code in PRECEDENCE if code in held), Exit.OK)


def as_json(job: str, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    named = ("mark", "subject", "message", "remedy")
    return {
        "exit_code": int(exit_code(findings)),
        "job": job,
        "findings": [{name: getattr(finding, name) for name in named} for finding in findings],
    }


def examine(job: Job, visit: Visit) -> Iterator[Finding]:
    """Look at a job and everything that its runs need. Nothing is written or paid."""
    access = visit.sandbox
    bound_to: dict[str, str | None] = {}
    if visit.sandbox is None:
        yield from environment(visit)
        access = _access(visit)
        bound_to = {"api_host": access.host} if access else {}
    live: Live | None = None
    if access and not visit.offline:
        try:
            live = ask(access, job.model.waterfall, visit.environ)
            if visit.sandbox is None:
                bound_to["workspace"] = live.user.workspace
            yield Finding("ok", "api", f"{access.host} accepts the key")
            yield outlook.clock(live.ahead_s)
        except EnrichError as error:
            yield failed("key" if error.exit_code is Exit.KEY else "api", error)
    checked = check_job(job, bound_to, live.waterfall if live else None)
    yield from (failed("job", problem) for problem in checked.problems)
    yield from (Finding("warn", "waterfall", change, "is the job still what you want?") for change in checked.changes)
    if not checked.problems:
        yield Finding("ok", "job", summary(job, checked))
    if job.model.report is not None and job.model.report.path is not None and lacks_extra():
        yield Finding("warn", "report", "tonight's run cannot write the `report` without its extra", EXTRA)
    yield from _files(job, visit)
    yield from _ledger(job, visit, checked, live)
    yield from _room(job, visit, checked)
    yield from _program(job, visit)


def environment(visit: Visit) -> Iterator[Finding]:
    """Look at the key and at what reaches the API, with the eyes of cron."""
    environ, home = visit.environ, Path(visit.environ["HOME"])
    try:
        find_key(environ, home)
        yield Finding("ok", "key", "cron will find it")
    except EnrichError as error:
        named = [name for name in ("DATABAR_API_KEY", "DATABAR_API_KEY_FILE") if visit.shell.get(name, "").strip()]
        if named and not any(environ.get(name) for name in named):
            message = f"{named[0]} is set in this shell only: cron will not have it"
            remedy = "name a key file in the crontab, see `enrich cron`; then --env DATABAR_API_KEY_FILE=…"
            yield Finding("fail", "key", message, remedy, Exit.KEY)
        else:
            yield failed("key", error)
    else:
        yield from _key_file(environ, home)
    try:
        _base_url(environ)
    except EnrichError as error:
        yield failed("api", error)
    for name in ROUTES:
        if visit.shell.get(name) and not environ.get(name):
            message = f"{name} is set in this shell only: cron will not have it"
            yield Finding("warn", "api", message, f"set it in the crontab, then --env {name}=…")


def _key_file(environ: Mapping[str, str], home: Path) -> Iterator[Finding]:
    if environ.get("DATABAR_API_KEY", "").strip():
        return
    path = Path(environ.get("DATABAR_API_KEY_FILE", "").strip() or home / ".databar" / "config")
    if not path.is_absolute():
        yield Finding("warn", "key", f"{path}: a relative path; cron starts in {home}", "name the absolute path")
    if machine.open_to_others(path):
        yield Finding("warn", "key", f"{path}: others may read the key", f"chmod 600 {path}")


def _base_url(environ: Mapping[str, str]) -> str:
    """Find the API's address. Raises JobError for what a run could not use to get there."""
    base_url = find_base_url(environ)
    find_proxy(environ, base_url)
    if base_url.startswith("https:"):
        find_certificates(environ)
    return base_url


def _access(visit: Visit) -> Access | None:
    """Find the way to the API; what is wrong with it was told before."""
    try:
        return Access(_base_url(visit.environ), find_key(visit.environ, Path(visit.environ["HOME"])))
    except EnrichError:
        return None


def _files(job: Job, visit: Visit) -> Iterator[Finding]:
    """Look at the input's age, the output's names and the ledger's file system."""
    if ages := [path.stat().st_mtime for path in inputs(job) if os.access(path, os.R_OK)]:
        yield outlook.input_age(max(ages), visit.now.timestamp())
    taken = {path: f"the {key}" if key in ("input", "ledger") else key for key, path in read_files(job).items()}
    if isinstance(job.ledger, Postgres):
        yield outlook.output_names(job.output_path, visit.night, taken)
        return
    yield outlook.output_names(job.output_path, visit.night, {**taken, job.ledger: "the ledger"})
    kind = machine.file_system(machine.mountinfo(), Path(os.path.realpath(job.ledger)))
    if machine.is_network(kind):
        message = f"{job.ledger} is on a network file system ({kind}), whose locks SQLite cannot trust"
        yield Finding("warn", "ledger", message, "keep the ledger on a local disk: `ledger:` in the job file")


def _ledger(job: Job, visit: Visit, checked: Checked, live: Live | None) -> Iterator[Finding]:
    """Look at what is left from the nights before, and at the money for the next."""
    path = job.ledger
    counts: dict[State, int] = {}
    submitted: list[int] = []
    executions: list[Any] = []
    try:
        if _is_known(path):
            with closing(Ledger(path, read_only=True)) as ledger:
                counts, executions = ledger.counts(), ledger.executions(job.name, LAST)
                submitted = [task.submitted_ms for task in ledger.tasks() for _ in task.attempts]
            yield Finding("ok", "ledger", f"{sum(counts.values()):,} requests in {path}")
        else:
            yield Finding("ok", "ledger", f"{path} will be made by the first run")
    except EnrichError:
        return  # the check has said so
    if _is_locked(path):
        yield Finding("warn", "lock", "a run holds the ledger now", "let it end before tonight's, or --if-locked skip")
    ttl_ms = int(job.model.policy.result_ttl.total_seconds() * 1000)
    now_ms, night_ms = (int(at.timestamp() * 1000) for at in (visit.now, visit.night))
    yield outlook.expiring(submitted, ttl_ms, now_ms, night_ms)
    yield outlook.doubts(counts.get(State.IN_DOUBT, 0))
    worst = checked.question.worst_price if checked.question else None
    limits = job.model.limits
    if checked.question and live:
        try:
            make_budget(job, checked.question, read_balance(live.user.balance))
        except EnrichError as error:
            yield failed("cap", error)
    yield from outlook.cap(_micros(limits.max_credits), worst, executions)
    if live:
        spent = [row["spent"] for row in executions]
        yield from outlook.money(read_balance(live.user.balance), _micros(limits.min_balance), worst, spent)


def _is_known(ledger: LedgerPlace) -> bool:
    return exists(ledger) if isinstance(ledger, Postgres) else is_there(ledger)


def _is_locked(ledger: LedgerPlace) -> bool:
    return bool(is_held(ledger)) if isinstance(ledger, Postgres) else machine.is_locked(lock_path(ledger))


def _micros(credits_: float | None) -> int | None:
    return None if credits_ is None else to_micros(credits_)


def _room(job: Job, visit: Visit, checked: Checked) -> Iterator[Finding]:
    """Look at the disks that the output and the ledger are on."""
    try:
        size = sum(path.stat().st_size * (PACKED if path.suffix.lower() == ".gz" else 1) for path in inputs(job))
        per_request = float(REQUEST_BYTES)
        if isinstance(job.ledger, Postgres):
            per_request = 0.0  # the server's disk is another's to look after
        elif is_there(job.ledger):
            with closing(Ledger(job.ledger, read_only=True)) as ledger:
                known = sum(ledger.counts().values())
            per_request = job.ledger.stat().st_size / known if known >= ENOUGH else per_request
        # The journal may hold all of it once more.
        growth = int(2 * per_request * (checked.asking or 0))
        home = job.ledger.folder if isinstance(job.ledger, Postgres) else job.ledger.parent
        ours, output = existing(home), job.output_path(visit.night)
        folders = existing(output.parent) if isinstance(output, Path) else ours, ours
        if folders[0].stat().st_dev == folders[1].stat().st_dev:
            yield outlook.room(folders[0], machine.free_bytes(folders[0]), 2 * size, growth)
        else:
            yield outlook.room(folders[0], machine.free_bytes(folders[0]), 2 * size, 0)
            yield outlook.room(folders[1], machine.free_bytes(folders[1]), 0, growth)
    except (OSError, EnrichError):
        return  # the check has said what cannot be read


def _program(job: Job, visit: Visit) -> Iterator[Finding]:
    """Start the program as cron would, and look at how it would write names."""
    command = machine.executable()
    wrong = machine.starts(command, visit.environ)
    if wrong:
        message = f"{command[0]} does not start with cron's environment: {wrong}"
        yield Finding("fail", "program", message, "install it where cron's user may run it", Exit.REFUSED)
    else:
        yield Finding("ok", "program", f"{' '.join(command)} starts with cron's environment")
    paths = [*written(job, visit.night).values(), *read_files(job).values()]
    if all(str(path).isascii() for path in paths):
        return
    encoding = machine.names_files_in(visit.environ)
    if encoding.replace("-", "").lower() != "utf8":
        message = f"cron's Python writes names of files in {encoding}, and the job's paths are not ASCII"
        yield Finding("fail", "names", message, "LANG=C.UTF-8 in the crontab, then --env LANG=C.UTF-8", Exit.REFUSED)
