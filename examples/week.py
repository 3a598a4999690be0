"""Simulates a week of nightly runs of two jobs, and compares the run summaries with the vendor's bill.

Run it from a checkout: `.venv/bin/python examples/week.py`, or `make week`. It uses the sandbox and takes about half a
minute. `--folder` keeps all files: job files, leads, outputs, feeds, log, metrics and the ledger.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

JOBS = Path(__file__).with_name("jobs")
ENRICH = Path(sys.executable).with_name("enrich")
#: Runs the program with its clock shifted to the sandbox's time, so that a week takes half a minute.
SHIFTED_CLOCK_SCRIPT = """import sys, time
ahead, clock = int(sys.argv.pop(1)), time.time_ns
time.time_ns = lambda: clock() + ahead
from enrich.cli import main
sys.exit(main())"""
HOUR = 3600
WEEK = 7 * 24 * HOUR
MONDAY = 4 * 24 * HOUR  # the first Monday of Unix time
#: Exit codes of a good run; 10: some rows failed at the vendor.
SUCCESS_CODES = (0, 10)
COUNTRIES = ("DE", "FR", "US", "GB", "")
HEADER = ("day", "event", "exit", "rows", "submitted", "reused", "found", "credits", "paid twice")
TABLE = "{:<10}{:<38}{:>5}{:>6}{:>10}{:>8}{:>7}{:>9}{:>12}"


def make_lead(number: int) -> list[str]:
    """Invent a lead; every tenth works for the same large company, every thirtieth has no last name."""
    company = "big-oak" if number % 10 == 0 else f"company{number}"
    last = "" if number % 30 == 7 else f"Last{number}"
    country = COUNTRIES[number * 7 % 11 % len(COUNTRIES)]
    website = f"https://www.{company}.example/about"
    return [f"L-{number:03}", f"First{number}", last, website, str(number * 37 % 400), country]


def write_leads(folder: Path, count: int, *, duplicates: int = 0, removed: int = 0) -> None:
    """Export the CRM: `count` leads without the first `removed` ones; the last `duplicates` appear twice."""
    rows = [make_lead(number) for number in range(removed, count)]
    again = [["L-" + row[0], *row[1:]] for row in rows[-duplicates:]] if duplicates else []
    _write(
        folder / "leads.csv", [["Lead", "First Name", "Last Name", "Website", "Team Size", "Country"], *rows, *again]
    )


def write_fair_guests(folder: Path) -> None:
    """Export the guests of a trade fair; half of them are in the CRM."""
    guests = [
        [first, last, f"company{number}.example"]
        for number in range(51, 70)
        for _, first, last, *_ in [make_lead(number)]
    ]
    strangers = [[f"Guest{number}", f"Of{number}", "fair.example"] for number in range(19)]
    _write(folder / "fair.csv", [["Vorname", "Nachname", "Firma"], *guests, *strangers], separator=";")


def _write(path: Path, rows: list[list[str]], separator: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows(rows)


@dataclass(frozen=True)
class SandboxApi:
    """The sandbox's API and its controls."""

    base_url: str
    key: str

    def call(self, path: str, **body: Any) -> dict[str, Any]:
        """Call the API (`/v1/...`) or a control (`/__...`); return the response's JSON."""
        url = self.base_url.removesuffix("/v1") + path
        answer = httpx.request(
            "POST" if body else "GET", url, json=body or None, headers={"x-apikey": self.key}, trust_env=False
        )
        result: dict[str, Any] = answer.raise_for_status().json()
        return result

    def wait_until(self, day: int, hour: int) -> None:
        """Move the sandbox's clock to this hour of the week; Monday is day 0."""
        now = self.call("/__advance", seconds=0)["now"]
        seconds = (MONDAY + (day * 24 + hour) * HOUR - now) % WEEK
        self.call("/__advance", seconds=seconds)

    def inject_fault(self, name: str, times: int, scope: str = "", **params: float) -> None:
        """Apply a fault to the next `times` matching requests."""
        self.call("/__faults", name=name, next=times, scope=scope, params=params)


@contextmanager
def start_sandbox(folder: Path) -> Iterator[SandboxApi]:
    """Serve the sandbox as a separate process until the block ends."""
    database, month = folder / "vendor" / "books.db", str(30 * 24 * HOUR)
    options = ["--state", str(database), "--latency", "fixed(0.1)", "--miss-kind", "null_result", "--result-ttl", month]
    (folder / "vendor").mkdir()
    with subprocess.Popen([ENRICH, "sandbox", *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            settings = dict(process.stdout.readline().strip().split("=", 1) for _ in range(2))
            yield SandboxApi(settings["DATABAR_BASE_URL"], settings["DATABAR_API_KEY"])
        finally:
            process.terminate()


@dataclass(frozen=True)
class RunResult:
    """One `enrich run`: its exit code, its summary, and how many lookups the vendor had charged twice by then."""

    day: str
    description: str
    exit_code: int
    expected: tuple[int, ...]
    summary: dict[str, Any]
    paid_twice: int
    repeats_allowed: bool

    def __str__(self) -> str:
        """Return the run's line of the table."""
        counts = [self.summary.get(name) for name in ("rows", "submitted", "reused", "found")]
        cells = ["-" if count is None else count for count in counts]
        spent = f"{self.summary['credits_spent']:.2f}" if self.summary else "-"
        surprise = "" if self.exit_code in self.expected else f"  expected {' or '.join(map(str, self.expected))}"
        return TABLE.format(self.day, self.description, self.exit_code, *cells, spent, self.paid_twice) + surprise


@dataclass
class Week:
    """The folder of two jobs that share a ledger, the vendor's API, the runs so far, and the checks that failed."""

    folder: Path
    api: SandboxApi
    day: str = ""
    runs: list[RunResult] = field(default_factory=list)
    failed_checks: list[str] = field(default_factory=list)

    def start_enrich(self, *words: str) -> subprocess.Popen[str]:
        """Start `enrich` as cron does: with a minimal environment."""
        environ = {"HOME": str(self.folder), "PATH": os.defpath, "DATABAR_BASE_URL": self.api.base_url}
        environ["DATABAR_API_KEY_FILE"] = str(self.folder / "key")
        ahead_ns = int((self.api.call("/__advance", seconds=0)["now"] - time.time()) * 1e9)
        return subprocess.Popen(
            [sys.executable, "-c", SHIFTED_CLOCK_SCRIPT, str(ahead_ns), *words],
            cwd=self.folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run_json(self, *words: str) -> dict[str, Any]:
        """Run a command that must succeed, and return its JSON output."""
        with self.start_enrich(*words, "--json") as process:
            output, complaint = process.communicate()
        self.check(process.returncode == 0, f"enrich {' '.join(words)}: exit {process.returncode}: {complaint}")
        answer: dict[str, Any] = json.loads(output)
        return answer

    def run(
        self,
        description: str,
        *options: str,
        job: str = "leads.yaml",
        expected: tuple[int, ...] = SUCCESS_CODES,
        meanwhile: Callable[[subprocess.Popen[str]], None] | None = None,
        repeats_allowed: bool = False,
    ) -> RunResult:
        """Run a job and check its exit code; `repeats_allowed`: the user chose to send some requests again."""
        with self.start_enrich("run", job, "--json", "--log-file", "enrich.log", *options) as process:
            if meanwhile is not None:
                meanwhile(process)
            output, _ = process.communicate()
        summary = json.loads(output) if output else {}
        result = RunResult(
            self.day,
            description,
            process.returncode,
            expected,
            summary,
            self.api.call("/__audit")["paid_twice"],
            repeats_allowed,
        )
        self.runs.append(result)
        self.check(
            result.exit_code in expected,
            f"{self.day}, {description}: exit {result.exit_code}: {summary.get('error', '')}",
        )
        print(result, flush=True)
        return result

    def check(self, holds: bool, message: str) -> None:  # noqa: FBT001 - reads as a sentence
        """Record a check that failed."""
        if not holds:
            self.failed_checks.append(message)


def monday(week: Week) -> None:
    """The first run, from a saved plan."""
    write_leads(week.folder, 60)
    plan = week.run_json("plan", "leads.yaml", "-o", "monday.plan")
    run = week.run("first run, as planned", "--plan", "monday.plan")
    # More than planned: requests that failed without a charge were sent again.
    week.check(run.summary["submitted"] >= plan["to_submit"], "Monday's run sends what its plan contains")
    again = week.run("the same once more")
    week.check(not again.summary["submitted"], "leads with a result are not sent again")


def tuesday(week: Week) -> None:
    """The file has new leads, some of them twice, and one was removed. Half of a second list is already enriched."""
    write_leads(week.folder, 80, duplicates=5, removed=1)
    week.run("20 new, 5 of them twice, one left")
    write_fair_guests(week.folder)
    fair = week.run("guests of a fair, half already enriched", job="fair.yaml")
    week.check(fair.summary["reused"] > 0, "the jobs share a ledger")


def wednesday(week: Week) -> None:
    """A power cut: two runs were accepted, but their task ids were lost; others were sent and not accepted."""
    write_leads(week.folder, 120, duplicates=5, removed=1)
    week.api.inject_fault("slow", 10, scope="post", seconds=0)
    week.api.inject_fault("silence-after", 2)
    week.api.inject_fault("silence-before", 1000)
    week.run("kill -9 in the middle", expected=(-9,), meanwhile=lambda run: kill_when_silent(run, week.api))
    week.api.call("/__faults", clear=True)
    in_doubt = week.run("the next start by cron resumes", expected=(14,))
    balance = week.run_json("reconcile", "leads.yaml", "--since", str(in_doubt.summary["execution"] - 1))
    week.check(balance["in_doubt"]["number"] >= 2, "reconcile lists the unconfirmed requests")
    week.check(balance["unexplained"] == 0, "the unconfirmed requests explain the balance")
    week.run("decision: --retry in_doubt", "--retry", "in_doubt", repeats_allowed=True)


def kill_when_silent(run: subprocess.Popen[str], api: SandboxApi) -> None:
    """Kill the run once five requests got no response."""
    while run.poll() is None and api.call("/__faults")["happened"].get("silence-before", 0) < 5:
        time.sleep(0.05)
    run.kill()


def thursday(week: Week) -> None:
    """The first plan is refused because the prices have changed since it was made."""
    write_leads(week.folder, 135, duplicates=5, removed=1)
    week.run_json("plan", "leads.yaml", "-o", "thursday.plan")
    week.api.call("/__prices", prices={"833": 0.75})
    week.run("a plan at yesterday's prices", "--plan", "thursday.plan", expected=(5,))
    week.run_json("plan", "leads.yaml", "-o", "thursday.plan")
    week.run("a new plan", "--plan", "thursday.plan")


def friday(week: Week) -> None:
    """Other users of the account have spent nearly all credits."""
    write_leads(week.folder, 150, duplicates=5, removed=1)
    week.api.call("/__topup", credits=14.5 - week.api.call("/__audit")["balance"])
    week.run("nearly no credits", expected=(12,))
    week.run("no credits to spare: nothing is sent", expected=(5,))
    week.api.call("/__topup", credits=1000)
    week.run("topped up")


def saturday(week: Week) -> None:
    """The API has many failures: 429s, 5xx, resets, and one run that was accepted without a response."""
    write_leads(week.folder, 175, duplicates=5, removed=1)
    for name, times in (("rate-limit", 3), ("reset-before", 1), ("reset-after", 1), ("error-before-503", 1)):
        week.api.inject_fault(name, times, scope="post")
        week.api.inject_fault("slow", 4, scope="post", seconds=0)  # some succeed
    for name in ("html", "error-before", "reset-before"):
        week.api.inject_fault(name, 2, scope="get")
    in_doubt = week.run("429s, 5xx and resets", expected=(14,))
    week.check(in_doubt.summary["rate_limited"] >= 3, "the 429s are counted")
    week.run("decision: --accept in_doubt", "--accept", "in_doubt")


def sunday(week: Week) -> None:
    """There are no new leads. In the afternoon, Monday's requests with no match are due for a refresh."""
    quiet = week.run("nothing new")
    week.check(not quiet.summary["submitted"], "nothing new, nothing paid")
    week.check(not quiet.summary["changed"], "nothing new in the change feed")
    week.api.wait_until(day=6, hour=14)
    due = week.run("Monday's misses are due: refresh", repeats_allowed=True)
    week.check(due.summary["submitted"] > 0, "the refresh sends")


def check_report(week: Week) -> Iterator[str]:
    """Write the report of the CRM's leads, and compare it with the run summaries."""
    page = week.run_json("report", "leads.yaml", "-o", "report.html")
    spent = week.run_json("runs", "leads.yaml")["totals"]["credits_spent"]
    totals = [
        page["credits_spent"],
        page["waterfall"]["spent"],
        sum(run["credits_spent"] for run in page["nights"]),
    ]
    week.check({round(each, 6) for each in totals} == {round(spent, 6)}, "the report adds up to the run summaries")
    yield f"the report        {page['credits_spent']:>9.2f} credits for leads.yaml: report.html"


def check_bill(week: Week) -> Iterator[str]:
    """Compare the run summaries with the vendor's records."""
    audit = week.api.call("/__audit")
    totals = [week.run_json("runs", job)["totals"] for job in ("leads.yaml", "fair.yaml")]
    submitted, spent, unknown = (
        sum(total[name] for total in totals) for name in ("submitted", "credits_spent", "credits_unknown")
    )
    with closing(sqlite3.connect(week.folder / "week.db")) as ledger:
        reported = {task for (task,) in ledger.execute("SELECT task_id FROM readable_attempts")}
    unreported = [task for run in audit["runs"] for task in run["task_ids"] if task not in reported]
    price = sum(week.api.call(f"/v1/tasks/{task}")["credits_spent"] for task in unreported)
    twice = sum(run.paid_twice - before.paid_twice for before, run in pairwise(week.runs) if run.repeats_allowed)
    yield f"run summaries     {spent:>9.2f} credits for {submitted} runs"
    yield f"no response       {price:>9.2f} credits for {len(unreported)} runs: the cost of unconfirmed requests"
    yield f"the vendor's bill {audit['credits_charged']:>9.2f} credits for {audit['accepted']} runs"
    yield f"charged twice     {audit['paid_twice']:>9} requests, {twice} of them by --retry or refresh"
    week.check(round(spent + price, 6) == audit["credits_charged"], "the run summaries add up to the bill")
    week.check(
        submitted + len(unreported) == audit["accepted"], "every accepted run is in a summary or was unconfirmed"
    )
    week.check(unknown == 0, "every price is known")
    week.check(twice == audit["paid_twice"], "nothing is paid twice except by --retry or refresh")


DAYS = (monday, tuesday, wednesday, thursday, friday, saturday, sunday)


def run_week(folder: Path) -> int:
    """Simulate the week; return 0 when all checks passed, else 1."""
    for job in JOBS.glob("*.yaml"):
        shutil.copy(job, folder)
    with start_sandbox(folder) as api:
        (folder / "key").write_text(api.key, encoding="utf-8")
        (folder / "key").chmod(0o600)
        week = Week(folder, api)
        print(TABLE.format(*HEADER))
        for day, simulate_day in enumerate(DAYS):
            api.wait_until(day, hour=2)
            week.day = simulate_day.__name__.capitalize()
            simulate_day(week)
        print("", *check_bill(week), *check_report(week), sep="\n")
    for claim in week.failed_checks:
        print(f"BROKEN: {claim}")
    return 1 if week.failed_checks else 0


def main() -> int:
    """Parse the command line and run the week."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="an empty folder for the files of the week")
    folder = parser.parse_args().folder
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"{folder} is not empty")
        return run_week(folder.resolve())
    with tempfile.TemporaryDirectory(prefix="week-") as made:
        return run_week(Path(made))


if __name__ == "__main__":
    sys.exit(main())
