"""Runs several workers over one ledger on a server while machines and processes fail.

Workers are killed, or stopped for longer than their leases; the server is restarted in order and by a crash; the run
itself is killed; the API has every kind of fault. `python -m tests.support.cluster_torture` is the long form and
prints its table; the suite runs short ones.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from enrich.sandbox import Fault, SandboxSettings
from tests.support.answer_check import ANSWER_STATUSES
from tests.support.postgres import PostgresServer, dedicated_server, find_binaries
from tests.support.ray_head import RayHead
from tests.support.torture import FAULTS, markdown_table
from tests.support.workspace import JOB, SandboxApi, Workspace, make_leads, serve_api

#: Seconds of a lease, and seconds that a worker is stopped: past its lease, but before the other workers replace it.
LEASE_S, STOP_S = 2, 3
#: Exit codes allowed for a run that was not killed; 4 when the server was down at the wrong moment.
ALLOWED_EXIT_CODES = frozenset({0, 4, 10, 12, 14})
#: Without random 429s, which would push the rate far below the limit that the test checks.
FAULTS_WITHOUT_RATE_LIMITS = tuple(fault for fault in FAULTS if not fault.startswith("rate-limit"))
#: Faults are injected only with at least this many workers, so that others can take over.
MIN_WORKERS = 2
MAX_EXTRA_RUNS = 30
ON_RAY = ("run", "job.yaml", "--json", "--engine", "ray", "--workers")


@dataclass
class ClusterTortureReport:
    """The result of a torture test, measured by the sandbox."""

    rows: int
    workers: int
    rate: int
    cap: float
    injected: Counter[str] = field(default_factory=Counter)
    exit_codes: Counter[int] = field(default_factory=Counter)
    faults: int = 0
    accepted: int = 0
    paid_twice: int = 0
    lost: int = 0
    in_doubt: int = 0
    unanswered_rows: int = 0
    busiest_second: int = 0
    max_charged: float = 0.0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every guarantee held. `busiest_second` is not judged, because it also depends on the machine."""
        broken_promises = (
            self.paid_twice,
            self.lost,
            self.unanswered_rows,
            self.problems,
            self.exit_codes.keys() - ALLOWED_EXIT_CODES,
        )
        return not any(broken_promises) and self.max_charged <= self.cap + 1e-6

    def as_markdown(self) -> str:
        """Return the report as a Markdown table."""
        numbers_by_name: dict[str, float] = {
            "leads": self.rows,
            "workers": self.workers,
            **dict(sorted(self.injected.items())),
            **{f"runs that ended without a kill, exit {code}": n for code, n in sorted(self.exit_codes.items())},
            "faults of the API": self.faults,
            "requests accepted by the API": self.accepted,
            "paid twice": self.paid_twice,
            "accepted, but neither answered nor in doubt": self.lost,
            "in doubt at the end": self.in_doubt,
            "unanswered otherwise": self.unanswered_rows,
            f"most requests in any second, of {self.rate} allowed": self.busiest_second,
            f"most credits charged in one run, of {self.cap:g} allowed": round(self.max_charged, 2),
            "problems that `ledger check` finds": len(self.problems),
        }
        return markdown_table(numbers_by_name)


@dataclass
class FaultInjector:
    """Injects faults into a run at random intervals until none remain."""

    server: PostgresServer
    rng: random.Random
    report: ClusterTortureReport
    remaining: list[str]
    head: RayHead | None

    def inject_until_exit(self, run: subprocess.Popen[str]) -> None:
        """Inject faults until the run ends."""
        while self.remaining and run.poll() is None:
            self._wait(run, self.rng.uniform(0.3, 1.5))
            workers = list(worker_pids(run.pid if self.head is None else self.head.pid))
            if run.poll() is None and len(workers) >= MIN_WORKERS:
                self._inject(self.remaining[0], run, workers)

    def _inject(self, fault: str, run: subprocess.Popen[str], workers: list[int]) -> None:
        worker_pid = self.rng.choice(workers)
        with suppress(ProcessLookupError):  # it has just ended
            match fault:
                case "workers killed":
                    os.kill(worker_pid, signal.SIGKILL)
                case "workers stopped for longer than a lease":
                    os.kill(worker_pid, signal.SIGSTOP)
                    self._wait(run, STOP_S)
                    with suppress(ProcessLookupError):  # the other workers have replaced it
                        os.kill(worker_pid, signal.SIGCONT)
                case "restarts of the server":
                    self.server.restart("fast")
                case "crashes of the server":
                    self.server.restart("immediate")
                case "runs killed":
                    run.kill()
            self.report.injected[fault] += 1
            self.remaining.pop(0)

    @staticmethod
    def _wait(run: subprocess.Popen[str], seconds: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            run.wait(seconds)


def worker_pids(pid: int) -> Iterator[int]:
    """Yield the process ids of a run's workers: Ray actors below its process."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        with suppress(ValueError, OSError):  # not a process, or one that has ended
            number = int(entry.name)
            parents[number] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            titles[number] = (entry / "cmdline").read_bytes().decode(errors="replace")
    for number, title in titles.items():
        if title.startswith("ray::WorkerActor"):
            ancestor = number
            while ancestor in parents and ancestor != pid:
                ancestor = parents[ancestor]
            if ancestor == pid:
                yield number


def run_torture(
    folder: Path,
    server: PostgresServer,
    *,
    rows: int,
    workers: int,
    injections: dict[str, int],
    seed: int,
    rate: int = 60,
    faults: Iterable[str] = FAULTS_WITHOUT_RATE_LIMITS,
    head: RayHead | None = None,
) -> ClusterTortureReport:
    """Run the job until it is finished, inject faults meanwhile, and check it against the sandbox's audit.

    The runs connect to the cluster of `head`. None: each starts one.
    """
    rng = random.Random(seed)
    remaining = [name for name, count in injections.items() for _ in range(count)]
    rng.shuffle(remaining)
    cap = rows / 4  # in credits, low enough to end some runs
    report = ClusterTortureReport(rows, workers, rate, cap)
    workspace = Workspace(folder, f"{server.ledger_url()}&lease={LEASE_S}", server.environ)
    limits = f"{{requests_per_second: {rate}, in_flight: 300, max_credits: {cap:g}}}"
    workspace.write_job(JOB, limits=limits, policy="{max_attempts: 5}")
    workspace.write_leads(make_leads(rows))
    settings = SandboxSettings(
        latency="lognormal(0.5,0.6)",
        seed=seed,
        fault_seed=seed,
        balance=1_000_000,
        no_data_seconds=0.5,
        faults=tuple(map(Fault.parse, faults)),
    )
    injector = FaultInjector(server, rng, report, remaining, head)
    address = () if head is None else ("--address", head.address)
    started_at = time.monotonic()
    with patch.dict(os.environ, server.environ), serve_api(folder / "api.db", settings) as api:
        for _ in range(MAX_EXTRA_RUNS + len(remaining)):
            run = workspace.start_subprocess(*ON_RAY, str(workers), *address, api=api, RAY_worker_niceness="0")
            injector.inject_until_exit(run)
            out, err = run.communicate(timeout=600)
            if run.returncode == -signal.SIGKILL:
                continue
            report.exit_codes[run.returncode] += 1
            assert "Traceback" not in err, err
            summary = json.loads(out)
            if "execution" not in summary:  # the server was down at the start
                continue
            report.max_charged = max(report.max_charged, _credits_bought(workspace, summary))
            if run.returncode in (0, 10, 14) and not (remaining and summary["submitted"]):
                break  # nothing is left to do or to inject
        else:
            raise AssertionError(f"it does not end:\n{report.as_markdown()}")
        _check_audit(workspace, api, report)
    report.seconds = time.monotonic() - started_at
    return report


def _credits_bought(workspace: Workspace, summary: dict[str, Any]) -> float:
    """Return the credits that an execution bought, at the maximum price where the true one is unknown.

    Excludes tasks of earlier executions that settled in it.
    """
    (row,) = workspace.sql(
        "SELECT coalesce(sum(CASE WHEN state = 'refused' THEN 0 ELSE coalesce(credits, reserved) END), 0) / 1e6 "
        "FROM attempts WHERE execution_id = ?",
        summary["execution"],
    )
    return float(row[0])


def _check_audit(workspace: Workspace, api: SandboxApi, report: ClusterTortureReport) -> None:
    """Compare output and ledger with the sandbox's audit."""
    audit = api.audit()
    report.accepted, report.paid_twice, report.busiest_second = (
        audit["accepted"],
        audit["paid_twice"],
        audit["busiest_second"],
    )
    report.faults = sum(audit["faults"].values())
    states = {
        json.loads(params)["first_name"]: state for params, state in workspace.sql("SELECT params, state FROM requests")
    }
    known = {task for (task,) in workspace.sql("SELECT task_id FROM attempts")}
    in_doubt = {
        json.loads(params)["first_name"]
        for (params,) in workspace.sql(
            "SELECT params FROM requests r JOIN attempts a ON a.request_id = r.id WHERE a.state = 'in_doubt'"
        )
    }
    for run in audit["runs"]:
        name = run["params"]["first_name"]
        report.lost += name not in in_doubt and (
            states[name] not in ANSWER_STATUSES or not known.issuperset(run["task_ids"])
        )
    output = workspace.read_output()
    assert [row["First Name"] for row in output] == [lead[0] for lead in make_leads(report.rows)]
    report.in_doubt = sum(row["enrich_status"] == "in_doubt" for row in output)
    report.unanswered_rows = sum(row["enrich_status"] not in ANSWER_STATUSES | {"in_doubt"} for row in output)
    check = workspace.run_in_process("ledger", "check", "job.yaml", "--json")
    report.problems = check.json_output["problems"]


#: The faults for a run, with their counts in the long form.
INJECTIONS = {
    "workers killed": 20,
    "workers stopped for longer than a lease": 6,
    "restarts of the server": 4,
    "crashes of the server": 4,
    "runs killed": 6,
}


def main() -> None:
    """Run the torture test of a cluster from the command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rows", type=int, default=4_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if not find_binaries():
        sys.exit("there is no PostgreSQL server on this machine")
    with tempfile.TemporaryDirectory() as folder, dedicated_server(fsync="on") as server:
        report = run_torture(
            Path(folder), server, rows=given.rows, workers=given.workers, injections=INJECTIONS, seed=given.seed
        )
    print(report.as_markdown())
    print(f"\n{report.seconds:.0f} s, {os.cpu_count()} cores", file=sys.stderr)
    sys.exit(0 if report.passed else 1)


if __name__ == "__main__":
    main()
