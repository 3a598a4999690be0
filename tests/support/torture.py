"""Kills a real `enrich run` repeatedly until the job is done, and compares its output with the API's audit.

Meanwhile the API has every kind of fault, connections misdeliver responses, the clock steps by hours, and in some runs
the ledger is renamed away.

`python -m tests.support.torture` is the long form and prints the table of RELIABILITY.md; the suite runs a short one.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

from enrich.databar.client import MAX_BULK_POSTS_IN_FLIGHT
from enrich.exit_codes import ExitCode
from enrich.job.target import TargetKind
from enrich.sandbox import Fault, SandboxSettings
from tests.support.answer_check import ANSWER_STATUSES, misassigned_rows
from tests.support.faulty_proxy import ProxyFaultKind, faulty_proxy, random_faults
from tests.support.workspace import JOBS, SandboxApi, Workspace, lead_name, make_leads, serve_api

#: The faults of the API, each for a small share of the requests. Those that end a run (no-credits, unauthorized,
#: forbidden, unavailable) are left out, and a lost task, as it takes a minute to be sure of one.
FAULTS = (
    "rate-limit=0.001,retry_after=1",
    "rate-limit-date=0.001,retry_after=1",
    "rate-limit-bare=0.01",
    "error-before=0.01,status=500",
    "error-before-503=0.01",
    "html=0.01",
    "redirect=0.005",
    "reset-before=0.01",
    "post:slow=0.4,seconds=0.3",
    "get:slow=0.02,seconds=1",
    "error-after-502=0.005",
    "error-after-504=0.005",
    "html-200=0.003",
    "reset-after=0.005",
    "silence-after=0.003,seconds=2",
    "silence-before=0.003,seconds=2",
    "broken-json=0.003",
    "wrong-json=0.003",
    "no-task-id=0.003",
    "late-task=0.01,seconds=1",
    "odd-status=0.02",
    "get:error-before-500=0.02",
    "get:reset-before=0.02",
    "get:html-200=0.01",
    "get:broken-json=0.01",
    "other-success=0.01,status=201",
    "other-success=0.01,status=202",
    "flickering-task=0.01,seconds=8",
    "wrong-date=0.01,seconds=7200",
    "wrong-date=0.01,seconds=-93600",
    "wrong-date=0.01,seconds=-7200,age=7200",
    "long-id=0.002",
    "get:long-id=0.003",
    "get:odd-credits=0.002,credits=NaN",
    "get:odd-credits=0.002,credits=-5",
    "get:odd-credits=0.002,credits=1e300",
    "get:invalid-utf8=0.003",
    "get:deep-json=0.002",
    "get:many-steps=0.002,steps=20000",
    "get:gzip-bomb=0.001,mebibytes=64",
)
#: Faults of connections, each for a small share of the POSTs and of the polls. A POST never gets the response
#: of a task that does not exist: it takes a minute to be sure of that. The responses of two POSTs are never swapped:
#: nothing in them shows which request they answer.
PROXY_FAULTS: Mapping[ProxyFaultKind, tuple[float, float]] = {
    ProxyFaultKind.REPEAT: (0.03, 0.03),
    ProxyFaultKind.UNSOLICITED: (0.01, 0.01),
    ProxyFaultKind.SWAP: (0.0, 0.02),
    ProxyFaultKind.OTHER_TASK: (0.005, 0.01),
    ProxyFaultKind.UNKNOWN_TASK: (0.0, 0.005),
    ProxyFaultKind.TRUNCATED: (0.005, 0.01),
    ProxyFaultKind.STATUS: (0.01, 0.0),
}
#: The first name of a lead in the params of its request: SQL.
LEAD_NAME = "coalesce(json_extract(params, '$.first_name'), json_extract(params, '$.phone'))"
#: Offsets of this machine's clock, in hours.
CLOCK_STEPS_H = (-30, -7, -2, 0, 0, 2, 7, 30)
#: In one of this many runs the ledger is renamed away or replaced by a copy, and put back after the run.
LEDGER_AWAY_EVERY = 8
#: Requests that a kill may leave in doubt, whatever `in_flight` is; in bulk, the rows of four POSTs.
MAX_IN_DOUBT = 64
#: Exit codes allowed here for a run that was not killed. 13: after a clock step a task of an earlier run may look
#: older than `patience`; the next run polls it first.
ALLOWED_EXIT_CODES = frozenset({0, 4, 10, 13, 14})
#: The job must be finished within this many runs after the last kill.
MAX_EXTRA_RUNS = 20


def markdown_table(numbers_by_name: Mapping[str, float]) -> str:
    """Return the numbers of a report as a Markdown table."""
    lines = (f"| {name} | {number:,} |" for name, number in numbers_by_name.items())
    return "\n".join(["| measured | number |", "|---|---|", *lines])


@dataclass
class TortureReport:
    """The result of a torture test, measured by the sandbox."""

    rows: int
    max_in_doubt: int
    kills: Counter[str] = field(default_factory=Counter)
    stops: int = 0
    exit_codes: Counter[int] = field(default_factory=Counter)
    max_in_flight_at_kill: int = 0
    ledger_away: int = 0
    missing_ledger_ignored: int = 0
    clock_steps: int = 0
    faults: int = 0
    proxy_faults: Counter[str] = field(default_factory=Counter)
    accepted: int = 0
    paid_twice: int = 0
    paid_after_removal: int = 0
    lost: int = 0
    #: Leads that had another lead's answer after any run, and what was wrong.
    misassigned_rows: dict[str, str] = field(default_factory=dict)
    misplaced_rows: int = 0
    in_doubt: int = 0
    retried: int = 0
    retried_without_doubt: int = 0
    unanswered: int = 0
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every guarantee held."""
        broken_promises = (
            self.paid_twice,
            self.paid_after_removal,
            self.lost,
            self.misassigned_rows,
            self.missing_ledger_ignored,
            self.misplaced_rows,
            self.retried_without_doubt,
            self.unanswered,
            self.max_in_flight_at_kill > self.max_in_doubt,
            self.exit_codes.keys() - ALLOWED_EXIT_CODES,
        )
        return not any(broken_promises)

    def as_markdown(self) -> str:
        """Return the report as a Markdown table."""
        numbers_by_name = {
            "leads": self.rows,
            "kills (SIGKILL)": self.kills.total(),
            **{f"… {moment}": count for moment, count in sorted(self.kills.items())},
            "suspends (SIGSTOP, SIGCONT)": self.stops,
            **{f"runs that ended without a kill, exit {code}": n for code, n in sorted(self.exit_codes.items())},
            "runs whose ledger was moved or replaced": self.ledger_away,
            "… that did not end with exit 1": self.missing_ledger_ignored,
            "clock steps by hours": self.clock_steps,
            "faults of the API": self.faults,
            "misdelivered responses": self.proxy_faults.total(),
            "requests accepted by the API": self.accepted,
            "most requests in flight at a kill": self.max_in_flight_at_kill,
            "paid twice": self.paid_twice,
            "paid after the lead was removed": self.paid_after_removal,
            "accepted, but neither answered nor in doubt": self.lost,
            "rows with another row's answer": len(self.misassigned_rows),
            "output rows out of order": self.misplaced_rows,
            "in doubt at the end": self.in_doubt,
            "retried with `--retry in_doubt`": self.retried,
            "retried without having been in doubt": self.retried_without_doubt,
            "unanswered after the retry": self.unanswered,
        }
        return markdown_table(numbers_by_name)


@dataclass
class LeadSchedule:
    """The leads of each run in random order: most stay, new ones come, some are there for one run only."""

    rows: int
    runs: int
    rng: random.Random
    #: Removed leads, with the maximum number of runs that may ever be accepted for each.
    accepted_at_removal: dict[str, int] = field(default_factory=dict)
    current: list[list[str]] = field(default_factory=list)
    _temporary: list[list[str]] = field(default_factory=list)

    def leads_for_run(self, run_number: int) -> list[list[str]]:
        """Return the leads of a run: half of all in the first one, all after the last kill."""
        share = min(1.0, 0.5 + 0.5 * run_number / self.runs)
        permanent = make_leads(int(self.rows * share))
        a_few = max(1, self.rows // 10 // self.runs) if run_number < self.runs else 0
        self._temporary = make_leads(a_few, start=self.rows + run_number * a_few)
        self.current = permanent + self._temporary
        self.rng.shuffle(self.current)
        return self.current

    def remove_temporary(self, accepted: dict[str, int], in_flight: set[str]) -> None:
        """Remove the temporary leads; a POST in flight may still arrive at the API."""
        for name, *_ in self._temporary:
            self.accepted_at_removal[name] = accepted.get(name, 0) + (name in in_flight)


def run_torture(
    folder: Path,
    *,
    rows: int,
    kills: int,
    seed: int,
    stop_s: float = 1.0,
    faults: Iterable[str] = FAULTS,
    extra_faults: bool = True,
    bulk: int | None = None,
    kind: TargetKind = TargetKind.WATERFALL,
    tamper: Callable[[Workspace], bool] | None = None,
) -> TortureReport:
    """Run the job, killing it `kills` times, and check it against the sandbox's audit.

    `extra_faults`: besides kills and API faults, misdeliver responses, step the clock and move the ledger away.
    `bulk`: requests in one task. `kind`: of the job's target. `tamper` may falsify ledger or output between runs, until
    it returns True: for tests of the check itself.
    """
    rng = random.Random(seed)
    workspace = Workspace(folder)
    keys = {"dispatch": f"{{bulk: {bulk}}}"} if bulk else {}
    workspace.write_job(
        JOBS[kind], limits="{requests_per_second: 400, in_flight: 500}", policy="{max_attempts: 5}", **keys
    )
    settings = SandboxSettings(
        latency="lognormal(0.5,0.6)",
        seed=seed,
        fault_seed=seed,
        balance=1_000_000,
        no_data_seconds=0.5,
        faults=tuple(map(Fault.parse, faults)),
    )
    report = TortureReport(rows, MAX_IN_DOUBT if bulk is None else MAX_BULK_POSTS_IN_FLIGHT * bulk)
    schedule = LeadSchedule(rows, kills, rng)
    started_at = time.monotonic()
    with (
        serve_api(folder / "api.db", settings) as api,
        faulty_proxy(api.base_url, random_faults(PROXY_FAULTS if extra_faults else {}, seed)) as proxy,
        _step_clock(folder / "clock", random.Random(seed), report, enabled=extra_faults),
    ):
        proxied_api = replace(api, base_url=proxy.base_url)
        run_number, finished = 0, False
        while not finished:
            workspace.write_leads(schedule.leads_for_run(run_number))
            kill = report.kills.total() < kills
            ledger_away = extra_faults and kill and run_number % LEDGER_AWAY_EVERY == LEDGER_AWAY_EVERY // 2
            scenario = RunScenario(run_number, stop_s if not report.stops else 1.0, kill=kill, ledger_away=ledger_away)
            code = _run_once(workspace, proxied_api, rng, report, scenario)
            in_flight = _leads_in_state(workspace, "submitting")
            report.max_in_flight_at_kill = max(report.max_in_flight_at_kill, len(in_flight))
            audit = api.audit()
            report.misassigned_rows |= _misassigned_rows(workspace, audit, settings, bulk=bulk is not None)
            schedule.remove_temporary(_accepted_counts(audit), in_flight)
            run_number += 1
            finished = not kill and run_number > kills and code in (0, 10, 14) and not tamper
            if tamper and tamper(workspace):
                tamper = None
            assert run_number < 2 * kills + MAX_EXTRA_RUNS, f"it does not end:\n{report.as_markdown()}"
        _check_audit(workspace, api, report, schedule)
        proxy.clear_faults()
        report.proxy_faults = proxy.fault_counts
        _retry_in_doubt(workspace, api, proxied_api, report)
        report.misassigned_rows |= _misassigned_rows(workspace, api.audit(), settings, bulk=bulk is not None)
        report.faults = sum(api.audit()["faults"].values())
    report.seconds = time.monotonic() - started_at
    return report


@contextmanager
def _step_clock(clock: Path, rng: random.Random, report: TortureReport, *, enabled: bool) -> Iterator[None]:
    """Step the clock of the runs by hours, every 0.2 to 2 seconds; the offset is 0 at the end."""
    stopped = Event()

    def step() -> None:
        while not stopped.wait(rng.uniform(0.2, 2.0)):
            clock.write_text(str(rng.choice(CLOCK_STEPS_H) * 3600))
            report.clock_steps += 1

    thread = Thread(target=step, daemon=True)
    if enabled:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        if enabled:
            thread.join()
        clock.write_text("0")


@dataclass(frozen=True)
class RunScenario:
    """What happens in one run; `stop_s`: seconds between SIGSTOP and SIGCONT."""

    run_number: int
    stop_s: float
    kill: bool
    ledger_away: bool


def _run_once(
    workspace: Workspace, api: SandboxApi, rng: random.Random, report: TortureReport, scenario: RunScenario
) -> int | None:
    """Start the run; kill it at a random or a chosen moment. Return its exit code, None when it was killed."""
    moment, condition, timeout_s = _choose_moment(workspace, rng, scenario)
    process = workspace.start_subprocess("run", "job.yaml", "--json", api=api, clock=workspace.folder / "clock")
    if scenario.kill:
        reached = _wait_for(process, condition, timeout_s)
        if scenario.ledger_away and reached and process.poll() is None:
            remove_ledger(workspace, process, report, replaced=rng.random() < 1 / 2)
            return None
        if moment == "suspended" and process.poll() is None:
            _suspend(process, scenario.stop_s)
            report.stops += 1
            moment = "after a suspend"
            _wait_for(process, _never, rng.uniform(0.0, 1.0))
        elif not reached or scenario.ledger_away:
            moment = "at any moment"
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            report.kills[moment] += 1
            return None
    process.communicate(timeout=300)
    report.exit_codes[process.returncode] += 1
    return process.returncode


def remove_ledger(
    workspace: Workspace, process: subprocess.Popen[str], report: TortureReport, *, replaced: bool = False
) -> None:
    """Rename the ledger away until the run has ended because of it; `replaced`: a copy takes its place."""
    files = [Path(f"{workspace.ledger_path}{suffix}") for suffix in ("", "-wal", "-shm")]
    away_folder = workspace.folder / "away"
    away_folder.mkdir(exist_ok=True)
    moved = [path for path in files if path.exists()]
    for path in moved:
        path.rename(away_folder / path.name)
    if replaced:
        for path in moved:
            shutil.copy(away_folder / path.name, path)
    _, stderr = process.communicate(timeout=600)
    for path in files:  # those of a ledger made in its place
        path.unlink(missing_ok=True)
    for path in moved:
        (away_folder / path.name).rename(path)
    report.ledger_away += 1
    report.missing_ledger_ignored += process.returncode != ExitCode.BUG or "this is a bug" in stderr


def _choose_moment(
    workspace: Workspace, rng: random.Random, scenario: RunScenario
) -> tuple[str, Callable[[], bool], float]:
    """Choose when to kill: a name, a condition, and how many seconds to wait for it."""
    executions, attempts = _count(workspace, "executions"), _count(workspace, "attempts")
    min_in_flight = rng.choice((1, 4, 16))

    def begun() -> bool:  # until then the ledger shows the run before
        return _count(workspace, "executions") > executions

    def sending() -> bool:
        return _count(workspace, "attempts") > attempts

    def posting() -> bool:
        return begun() and _count(workspace, "attempts", "submitting") >= min_in_flight

    def polling() -> bool:
        return (
            begun()
            and not _count(workspace, "attempts", "submitting")
            and _count(workspace, "attempts", "submitted") > 0
        )

    moments: list[tuple[str, Callable[[], bool], float]] = [
        ("suspended", posting, 5.0),
        ("with POSTs in flight", posting, 5.0),
        ("at any moment", _never, rng.uniform(0.1, 3.0)),
        ("while polling only", polling, 5.0),
        ("while enrolling", begun, 5.0),
        ("while the output is written", workspace.part_path.exists, 10.0),
        ("at any moment", _never, rng.uniform(0.1, 3.0)),
    ]
    return (
        ("in the first seconds", sending, 30.0) if scenario.ledger_away else moments[scenario.run_number % len(moments)]
    )


def _wait_for(process: subprocess.Popen[str], condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition; return whether it was met."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if condition():
            return True
        time.sleep(0.004)
    return False


def _never() -> bool:
    return False


def _suspend(process: subprocess.Popen[str], seconds: float) -> None:
    """Suspend and resume the process, like a closed laptop."""
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)


def _query(workspace: Workspace, sql: str) -> list[Any]:
    """Query the ledger, which may not exist yet."""
    if not workspace.ledger_path.exists():
        return []
    for mode in ("ro", "rw"):
        with closing(sqlite3.connect(f"{workspace.ledger_path.as_uri()}?mode={mode}", uri=True)) as db:
            try:
                return db.execute(sql).fetchall()
            except sqlite3.OperationalError as error:
                if "no such table" in str(error):  # killed before the tables were made
                    return []
                if mode == "rw" or "readonly" not in str(error):  # SQLite must first recover after a kill
                    raise
    return []


def _count(workspace: Workspace, table: str, state: str | None = None) -> int:
    rows = _query(workspace, f"SELECT count(*) FROM {table}" + (f" WHERE state = '{state}'" if state else ""))
    return int(rows[0][0]) if rows else 0


def _leads_in_state(workspace: Workspace, state: str) -> set[str]:
    """Return the leads with an attempt in a state."""
    sql = f"SELECT {LEAD_NAME} FROM requests r JOIN attempts a ON a.request_id = r.id"
    return {name for (name,) in _query(workspace, f"{sql} WHERE a.state = '{state}'")}


def _accepted_counts(audit: Mapping[str, Any]) -> dict[str, int]:
    """Return how many runs of each lead were accepted."""
    return {lead_name(run["params"]): run["accepted"] for run in audit["runs"]}


def _misassigned_rows(
    workspace: Workspace, audit: Mapping[str, Any], settings: SandboxSettings, *, bulk: bool
) -> dict[str, str]:
    """Return the leads with another lead's answer, in the current output or in the ledger."""
    sql = f"SELECT {LEAD_NAME}, a.state, coalesce(a.task_id, '')"
    settled = _query(workspace, f"{sql} FROM requests r JOIN attempts a ON a.request_id = r.id")
    ledger = [dict(zip(("First Name", "enrich_status", "enrich_task_id"), row, strict=True)) for row in settled]
    output = workspace.read_output() if (workspace.folder / "out.csv").exists() else []
    wrong = misassigned_rows(ledger, audit, settings, bulk=bulk, column=None)
    return wrong | misassigned_rows(output, audit, settings, bulk=bulk)


def _check_audit(workspace: Workspace, api: SandboxApi, report: TortureReport, schedule: LeadSchedule) -> None:
    """Compare output and ledger with the sandbox's audit."""
    audit = api.audit()
    report.accepted, report.paid_twice = audit["accepted"], audit["paid_twice"]
    output = workspace.read_output()
    report.misplaced_rows = sum(
        list(row.values())[: len(lead)] != lead for row, lead in zip(output, schedule.current, strict=True)
    )
    report.in_doubt = sum(row["enrich_status"] == "in_doubt" for row in output)
    states = dict(_query(workspace, f"SELECT {LEAD_NAME}, state FROM requests"))
    states |= {row["First Name"]: row["enrich_status"] for row in output}
    known = {task_id for (task_id,) in _query(workspace, "SELECT task_id FROM attempts")}
    in_doubt = _leads_in_state(workspace, "in_doubt")
    for run in audit["runs"]:
        name = lead_name(run["params"])
        report.lost += name not in in_doubt and (
            states[name] not in ANSWER_STATUSES or not known.issuperset(run["task_ids"])
        )
        report.paid_after_removal += run["accepted"] > schedule.accepted_at_removal.get(name, run["accepted"])


def _retry_in_doubt(workspace: Workspace, api: SandboxApi, proxied_api: SandboxApi, report: TortureReport) -> None:
    """Retry the leads in doubt and no others; `api` is the API behind the proxy, `proxied_api` the proxy."""
    before = _accepted_counts(api.audit())
    in_doubt = {row["First Name"] for row in workspace.read_output() if row["enrich_status"] == "in_doubt"}
    api.clear_faults()
    if in_doubt:
        workspace.run_subprocess("run", "job.yaml", "--json", "--retry", "in_doubt", api=proxied_api)
    for name, accepted in _accepted_counts(api.audit()).items():
        if accepted > before.get(name, 0):
            report.retried += name in in_doubt
            report.retried_without_doubt += name not in in_doubt
    report.unanswered = sum(row["enrich_status"] not in ANSWER_STATUSES for row in workspace.read_output())


def main() -> None:
    """Run the torture test of a job from the command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rows", type=int, default=3_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stop", type=float, default=60.0, help="seconds of SIGSTOP, the first time")
    parser.add_argument("--bulk", type=int, help="requests to a task; default: each by itself")
    parser.add_argument("--kind", type=TargetKind, default=TargetKind.WATERFALL, help="waterfall or enrichment")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run_torture(
            Path(folder),
            rows=given.rows,
            kills=given.kills,
            seed=given.seed,
            stop_s=given.stop,
            bulk=given.bulk,
            kind=given.kind,
        )
    print(report.as_markdown())
    for name, why in report.misassigned_rows.items():
        print(f"{name}: {why}", file=sys.stderr)
    print(f"\n{report.seconds:.0f} s, {os.cpu_count()} cores", file=sys.stderr)
    sys.exit(0 if report.passed else 1)


if __name__ == "__main__":
    main()
