"""Kills a real `enrich run` again and again until the job is done, and asks the API what was paid for.

`python -m tests.torture` is the long form and prints the table of RELIABILITY.md; the suite runs a short one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enrich.sandbox import Fault, SandboxSettings
from tests.harness import JOB, Api, Office, people, serving

#: Every way in which the API goes wrong, each for a small share of the requests.
FAULTS = (
    "rate-limit=0.01,retry_after=1",
    "rate-limit-date=0.005,retry_after=1",
    "rate-limit-bare=0.01",
    "error-before=0.01,status=500",
    "error-before-503=0.01",
    "html=0.01",
    "redirect=0.005",
    "reset-before=0.01",
    "slow=0.02,seconds=1",
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
)
#: What a kill may leave in doubt, whatever `in_flight` is.
AT_MOST_IN_DOUBT = 64


@dataclass
class Report:
    """What became of a tortured job; the sandbox's word, not ours."""

    rows: int
    kills: int = 0
    stops: int = 0
    ended: Counter[int] = field(default_factory=Counter)
    worst_in_doubt_after_kill: int = 0
    faults: int = 0
    accepted: int = 0
    distinct: int = 0
    paid_twice: int = 0
    paid_without_need: int = 0
    lost: int = 0
    in_doubt: int = 0
    bought_again: int = 0
    unanswered: int = 0
    seconds: float = 0.0

    def table(self) -> str:
        """The report as a Markdown table."""
        told = {
            "rows": self.rows,
            "kills (SIGKILL)": self.kills,
            "stops (SIGSTOP, SIGCONT)": self.stops,
            "faults met": self.faults,
            "runs accepted by the API": self.accepted,
            "most requests on the wire at a kill": self.worst_in_doubt_after_kill,
            "paid twice": self.paid_twice,
            "paid after the lead had left the file": self.paid_without_need,
            "accepted, but neither answered nor told": self.lost,
            "in doubt at the end": self.in_doubt,
            "bought again by --retry in_doubt": self.bought_again,
            "unanswered after that": self.unanswered,
        }
        return "\n".join(
            ["| what | number |", "|---|---|", *(f"| {name} | {number:,} |" for name, number in told.items())]
        )


def torture(folder: Path, *, rows: int, kills: int, seed: int, stop_s: float = 1.0) -> Report:
    """Run the job, killing it `kills` times, and judge it by the sandbox's audit."""
    rng = random.Random(seed)
    office = Office(folder)
    office.write_job(JOB, limits="{requests_per_second: 400, in_flight: 500}", policy="{max_attempts: 5}")
    staying = people(rows)
    leaving = people(rows // 10, start=rows)
    settings = SandboxSettings(
        latency="lognormal(0.8,0.6)",
        seed=seed,
        fault_seed=seed,
        balance=1_000_000,
        no_data_seconds=0.5,
        faults=tuple(map(Fault.parse, FAULTS)),
    )
    report = Report(rows)
    began = time.monotonic()
    with serving(folder / "api.db", settings) as api:
        office.write_leads(staying + leaving)
        left_at = kills // 3
        paid_when_left: set[str] = set()
        night = 0
        while True:
            if night == left_at:
                rng.shuffle(staying)
                office.write_leads(staying)
                paid_when_left = _paid(api)
            code = _one_night(office, api, rng, report, stop_s=stop_s, kill=night < kills, moment=night)
            report.worst_in_doubt_after_kill = max(report.worst_in_doubt_after_kill, _on_the_wire(office))
            night += 1
            if code is not None:
                report.ended[code] += 1
                if night > kills and code in (0, 10, 14):
                    break
            assert night < kills + 40, f"it does not end: {report}"
        _judge(office, api, report, {row[0] for row in leaving}, paid_when_left)
        _buy_again(office, api, report)
        report.faults = sum(api.audit()["faults"].values())
    report.seconds = time.monotonic() - began
    return report


def _one_night(
    office: Office, api: Api, rng: random.Random, report: Report, *, stop_s: float, kill: bool, moment: int
) -> int | None:
    """Start the run; kill it at a random or a chosen moment. Return its exit code, None when it was killed."""
    process = office.start("run", "job.yaml", "--json", api=api)
    if not kill:
        process.communicate(timeout=300)
        return process.returncode
    part = office.folder / ".job.enrich-part"
    match moment % 4:
        case 0:  # while POSTs are on the wire
            _wait(process, lambda: _on_the_wire(office) > 0, 3)
        case 1:  # while the output is written, or any moment in which it does not come to that
            _wait(process, part.exists, rng.uniform(0.5, 2.5))
        case _:
            _wait(process, lambda: False, rng.uniform(0.3, 2.5))
    if moment % 5 == 0 and process.poll() is None:  # a laptop that sleeps
        process.send_signal(signal.SIGSTOP)
        time.sleep(stop_s)
        process.send_signal(signal.SIGCONT)
        report.stops += 1
        _wait(process, lambda: False, rng.uniform(0.1, 1.0))
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        report.kills += 1
        return None
    process.communicate()
    return process.returncode


def _wait(process: subprocess.Popen[str], holds: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not holds():
        time.sleep(0.005)


def _ask(office: Office, sql: str) -> list[Any]:
    if not office.ledger_path.exists():
        return []
    with closing(sqlite3.connect(f"{office.ledger_path.as_uri()}?mode=ro", uri=True)) as db:
        try:
            return db.execute(sql).fetchall()
        except sqlite3.OperationalError:  # killed before its tables were made
            return []


def _on_the_wire(office: Office) -> int:
    return sum(count for (count,) in _ask(office, "SELECT count(*) FROM attempts WHERE state = 'submitting'"))


def _paid(api: Api) -> set[str]:
    return {run["params"]["first_name"] for run in api.audit()["runs"] if run["accepted"]}


def _judge(office: Office, api: Api, report: Report, left: set[str], paid_when_left: set[str]) -> None:
    """Hold the output against the sandbox's audit."""
    audit = api.audit()
    report.accepted, report.distinct = audit["accepted"], audit["distinct"]
    report.paid_twice = audit["paid_twice"]
    report.paid_without_need = len((_paid(api) & left) - paid_when_left)
    output = {row["First Name"]: row for row in office.output()}
    told = {"found", "not_found", "failed", "expired", "in_doubt"}
    states = dict(_ask(office, "SELECT json_extract(params, '$.first_name'), state FROM requests"))
    for run in audit["runs"]:
        name = run["params"]["first_name"]
        status = states.get(name) if name in left else output[name]["enrich_status"]
        report.lost += bool(run["accepted"]) and status not in told
    report.in_doubt = sum(row["enrich_status"] == "in_doubt" for row in output.values())


def _buy_again(office: Office, api: Api, report: Report) -> None:
    """Ask again for those in doubt, and for no others."""
    before = {json.dumps(run["params"]): run["accepted"] for run in api.audit()["runs"]}
    doubtful = {row["First Name"] for row in office.output() if row["enrich_status"] == "in_doubt"}
    api.heal()
    for _ in range(10):
        done = office.enrich("run", "job.yaml", "--json", "--retry", "in_doubt,failed", api=api)
        if done.code in (0, 10):
            break
    failed_before = {name for name, status in _last_failed(office).items() if status}
    for run in api.audit()["runs"]:
        again = run["accepted"] - before.get(json.dumps(run["params"]), 0)
        name = run["params"]["first_name"]
        report.bought_again += again
        assert not again or name in doubtful | failed_before, f"{name} was not in doubt and was bought again"
    report.unanswered = sum(row["enrich_status"] not in ("found", "not_found", "failed") for row in office.output())


def _last_failed(office: Office) -> dict[str, bool]:
    rows = _ask(
        office,
        "SELECT json_extract(params, '$.first_name'), sum(a.state = 'failed') FROM requests r "
        "JOIN attempts a ON a.request_id = r.id GROUP BY r.id",
    )
    return {name: bool(count) for name, count in rows}


def main() -> None:
    """Torture a job from the command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rows", type=int, default=5_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stop", type=float, default=60.0, help="seconds of SIGSTOP, the first time")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = torture(
            Path(folder), rows=arguments.rows, kills=arguments.kills, seed=arguments.seed, stop_s=arguments.stop
        )
    print(report.table())
    print(f"\n{report.seconds:.0f} s, {os.cpu_count()} cores, exits {dict(report.ended)}", file=sys.stderr)
    bad = report.paid_twice or report.lost or report.unanswered or report.paid_without_need
    sys.exit(1 if bad or report.worst_in_doubt_after_kill > AT_MOST_IN_DOUBT else 0)


if __name__ == "__main__":
    main()
