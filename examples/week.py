"""Seven nights of two jobs against the sandbox, and whether the week's receipts are the vendor's bill.

Run it from a checkout: `.venv/bin/python examples/week.py`, or `make week`. It takes about half a minute. `--folder`
keeps all that the week leaves behind: job files, leads, outputs, feeds, log, metrics and the ledger.
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
#: The program on a machine whose clock is as late as the vendor's: the week takes half a minute.
AS_LATE = """import sys, time
ahead, clock = int(sys.argv.pop(1)), time.time_ns
time.time_ns = lambda: clock() + ahead
from enrich.cli import main
main()"""
HOUR = 3600
WEEK = 7 * 24 * HOUR
MONDAY = 4 * 24 * HOUR  # the first one of Unix time
#: How a night ends when all went well; 10: the vendor failed at some rows.
WELL = (0, 10)
COUNTRIES = ("DE", "FR", "US", "GB", "")
HEADER = ("night", "what", "exit", "rows", "submitted", "reused", "found", "credits", "sold twice")
TABLE = "{:<10}{:<38}{:>5}{:>6}{:>10}{:>8}{:>7}{:>9}{:>12}"


def lead(number: int) -> list[str]:
    """Invent a lead; every tenth works for one large company, every thirtieth lacks a name."""
    company = "big-oak" if number % 10 == 0 else f"company{number}"
    last = "" if number % 30 == 7 else f"Last{number}"
    country = COUNTRIES[number * 7 % 11 % len(COUNTRIES)]
    website = f"https://www.{company}.example/about"
    return [f"L-{number:03}", f"First{number}", last, website, str(number * 37 % 400), country]


def write_leads(folder: Path, count: int, *, twice: int = 0, left: int = 0) -> None:
    """Export the CRM: `count` leads without the first `left`; `twice` of them are in it once more."""
    rows = [lead(number) for number in range(left, count)]
    again = [["L-" + row[0], *row[1:]] for row in rows[-twice:]] if twice else []
    _write(
        folder / "leads.csv", [["Lead", "First Name", "Last Name", "Website", "Team Size", "Country"], *rows, *again]
    )


def write_fair(folder: Path) -> None:
    """Export the guests of a fair, half of whom are in the CRM."""
    guests = [
        [first, last, f"company{number}.example"] for number in range(51, 70) for _, first, last, *_ in [lead(number)]
    ]
    strangers = [[f"Guest{number}", f"Of{number}", "fair.example"] for number in range(19)]
    _write(folder / "fair.csv", [["Vorname", "Nachname", "Firma"], *guests, *strangers], separator=";")


def _write(path: Path, rows: list[list[str]], separator: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows(rows)


@dataclass(frozen=True)
class Vendor:
    """The sandbox, and its switches."""

    base_url: str
    key: str

    def call(self, path: str, **body: Any) -> dict[str, Any]:
        """Ask the API (`/v1/...`), or turn a switch (`/__...`)."""
        url = self.base_url.removesuffix("/v1") + path
        answer = httpx.request(
            "POST" if body else "GET", url, json=body or None, headers={"x-apikey": self.key}, trust_env=False
        )
        told: dict[str, Any] = answer.raise_for_status().json()
        return told

    def wait_until(self, day: int, hour: int) -> None:
        """Move the clock to that hour of the week; Monday is day 0."""
        now = self.call("/__advance", seconds=0)["now"]
        seconds = (MONDAY + (day * 24 + hour) * HOUR - now) % WEEK
        self.call("/__advance", seconds=seconds)

    def fault(self, name: str, times: int, scope: str = "", **params: float) -> None:
        """Let the next requests meet a fault."""
        self.call("/__faults", name=name, next=times, scope=scope, params=params)


@contextmanager
def vendor(folder: Path) -> Iterator[Vendor]:
    """Serve the sandbox, as a process of its own, until the week is over."""
    books, month = folder / "vendor" / "books.db", str(30 * 24 * HOUR)
    options = ["--state", str(books), "--latency", "fixed(0.1)", "--miss-kind", "null_result", "--result-ttl", month]
    (folder / "vendor").mkdir()
    with subprocess.Popen([ENRICH, "sandbox", *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = dict(process.stdout.readline().strip().split("=", 1) for _ in range(2))
            yield Vendor(said["DATABAR_BASE_URL"], said["DATABAR_API_KEY"])
        finally:
            process.terminate()


@dataclass(frozen=True)
class Run:
    """One `enrich run`: how it ended, what its receipt says, how many questions the vendor had sold twice by then."""

    night: str
    what: str
    code: int
    expected: tuple[int, ...]
    receipt: dict[str, Any]
    sold_twice: int
    chosen: bool

    def __str__(self) -> str:
        """The run's line of the table."""
        counts = [self.receipt.get(name) for name in ("rows", "submitted", "reused", "found")]
        told = ["-" if count is None else count for count in counts]
        spent = f"{self.receipt['credits_spent']:.2f}" if self.receipt else "-"
        surprise = "" if self.code in self.expected else f"  expected {' or '.join(map(str, self.expected))}"
        return TABLE.format(self.night, self.what, self.code, *told, spent, self.sold_twice) + surprise


@dataclass
class Week:
    """The folder of two jobs that share a ledger, the vendor, and what has happened."""

    folder: Path
    api: Vendor
    night: str = ""
    runs: list[Run] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start `enrich` as cron would: with next to nothing in its environment."""
        environ = {"HOME": str(self.folder), "PATH": os.defpath, "DATABAR_BASE_URL": self.api.base_url}
        environ["DATABAR_API_KEY_FILE"] = str(self.folder / "key")
        ahead_ns = int((self.api.call("/__advance", seconds=0)["now"] - time.time()) * 1e9)
        return subprocess.Popen(
            [sys.executable, "-c", AS_LATE, str(ahead_ns), *words],
            cwd=self.folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ask(self, *words: str) -> dict[str, Any]:
        """Run a command that is to succeed, and read what it prints."""
        with self.start(*words, "--json") as process:
            told, complaint = process.communicate()
        self.expect(process.returncode == 0, f"enrich {' '.join(words)}: exit {process.returncode}: {complaint}")
        answer: dict[str, Any] = json.loads(told)
        return answer

    def run(
        self,
        what: str,
        *options: str,
        job: str = "leads.yaml",
        expected: tuple[int, ...] = WELL,
        meanwhile: Callable[[subprocess.Popen[str]], None] | None = None,
        chosen: bool = False,
    ) -> Run:
        """Run a job; `chosen`: a person wants some questions to be asked twice."""
        with self.start("run", job, "--json", "--log-file", "enrich.log", *options) as process:
            if meanwhile is not None:
                meanwhile(process)
            told, _ = process.communicate()
        receipt = json.loads(told) if told else {}
        done = Run(
            self.night, what, process.returncode, expected, receipt, self.api.call("/__audit")["paid_twice"], chosen
        )
        self.runs.append(done)
        self.expect(done.code in expected, f"{self.night}, {what}: exit {done.code}: {receipt.get('error', '')}")
        print(done, flush=True)
        return done

    def expect(self, holds: bool, claim: str) -> None:  # noqa: FBT001 - reads as a sentence
        """Remember what should have held."""
        if not holds:
            self.broken.append(claim)


def monday(week: Week) -> None:
    """The first run, with a plan that somebody has looked at."""
    write_leads(week.folder, 60)
    plan = week.ask("plan", "leads.yaml", "-o", "monday.plan")
    run = week.run("first run, as planned", "--plan", "monday.plan")
    # What failed at no charge was asked again.
    week.expect(run.receipt["submitted"] >= plan["to_submit"], "Monday's run asks what its plan says")
    again = week.run("the same once more")
    week.expect(not again.receipt["submitted"], "what is known is not asked again")


def tuesday(week: Week) -> None:
    """The file has grown: new leads, some of them twice, and one has left. Another list knows half of them."""
    write_leads(week.folder, 80, twice=5, left=1)
    week.run("20 new, 5 of them twice, one left")
    write_fair(week.folder)
    fair = week.run("a fair's guests, half of them known", job="fair.yaml")
    week.expect(fair.receipt["reused"] > 0, "the jobs share a ledger")


def wednesday(week: Week) -> None:
    """A power cut: two runs were accepted whose task nobody has heard of, others were on the wire and not accepted."""
    write_leads(week.folder, 120, twice=5, left=1)
    week.api.fault("slow", 10, scope="post", seconds=0)
    week.api.fault("silence-after", 2)
    week.api.fault("silence-before", 1000)
    week.run("kill -9 in the middle", expected=(-9,), meanwhile=lambda run: kill(run, week.api))
    week.api.call("/__faults", clear=True)
    doubts = week.run("cron's next start resumes", expected=(14,))
    books = week.ask("reconcile", "leads.yaml", "--since", str(doubts.receipt["execution"] - 1))
    week.expect(books["in_doubt"]["number"] >= 2, "reconcile knows the doubts")
    week.expect(books["unexplained"] == 0, "the doubts explain the balance")
    week.run("a person: --retry in_doubt", "--retry", "in_doubt", chosen=True)


def kill(run: subprocess.Popen[str], api: Vendor) -> None:
    """Kill the run as soon as five requests have met silence."""
    while run.poll() is None and api.call("/__faults")["happened"].get("silence-before", 0) < 5:
        time.sleep(0.05)
    run.kill()


def thursday(week: Week) -> None:
    """Wednesday's plan for tonight is refused, for the prices have changed."""
    write_leads(week.folder, 135, twice=5, left=1)
    week.ask("plan", "leads.yaml", "-o", "thursday.plan")
    week.api.call("/__prices", prices={"833": 0.75})
    week.run("a plan at yesterday's prices", "--plan", "thursday.plan", expected=(5,))
    week.ask("plan", "leads.yaml", "-o", "thursday.plan")
    week.run("a new plan", "--plan", "thursday.plan")


def friday(week: Week) -> None:
    """The colleagues have spent nearly all of the credits."""
    write_leads(week.folder, 150, twice=5, left=1)
    week.api.call("/__topup", credits=14.5 - week.api.call("/__audit")["balance"])
    week.run("hardly any credits", expected=(12,))
    week.run("none to spare: nothing is asked", expected=(5,))
    week.api.call("/__topup", credits=1000)
    week.run("topped up")


def saturday(week: Week) -> None:
    """The vendor has a bad night: 429s, 5xx, resets, and one run that was accepted without a word."""
    write_leads(week.folder, 175, twice=5, left=1)
    for name, times in (("rate-limit", 3), ("reset-before", 1), ("reset-after", 1), ("error-before-503", 1)):
        week.api.fault(name, times, scope="post")
        week.api.fault("slow", 4, scope="post", seconds=0)  # some go well
    for name in ("html", "error-before", "reset-before"):
        week.api.fault(name, 2, scope="get")
    doubts = week.run("429s, 5xx and resets", expected=(14,))
    week.expect(doubts.receipt["rate_limited"] >= 3, "the 429s are counted")
    week.run("a person: --accept in_doubt", "--accept", "in_doubt")


def sunday(week: Week) -> None:
    """Nothing is new. In the afternoon Monday's misses are old enough to be asked again."""
    quiet = week.run("nothing new")
    week.expect(not quiet.receipt["submitted"], "nothing new is nothing paid")
    week.expect(not quiet.receipt["changed"], "nothing new is nothing in the change feed")
    week.api.wait_until(day=6, hour=14)
    due = week.run("Monday's misses are due: refresh", chosen=True)
    week.expect(due.receipt["submitted"] > 0, "the refresh asks")


def look(week: Week) -> Iterator[str]:
    """Put the week of the CRM's leads on a page, and hold it against the receipts."""
    page = week.ask("report", "leads.yaml", "-o", "report.html")
    spent = week.ask("runs", "leads.yaml")["totals"]["credits_spent"]
    told = [page["credits_spent"], page["waterfall"]["spent"], sum(night["credits_spent"] for night in page["nights"])]
    week.expect({round(each, 6) for each in told} == {round(spent, 6)}, "the report adds up to the receipts")
    yield f"the report        {page['credits_spent']:>9.2f} credits for leads.yaml: report.html"


def bill(week: Week) -> Iterator[str]:
    """Hold the receipts against the vendor's books."""
    audit = week.api.call("/__audit")
    totals = [week.ask("runs", job)["totals"] for job in ("leads.yaml", "fair.yaml")]
    submitted, spent, unknown = (
        sum(total[name] for total in totals) for name in ("submitted", "credits_spent", "credits_unknown")
    )
    with closing(sqlite3.connect(week.folder / "week.db")) as ledger:
        known = {task for (task,) in ledger.execute("SELECT task_id FROM readable_attempts")}
    unheard = [task for run in audit["runs"] for task in run["task_ids"] if task not in known]
    price = sum(week.api.call(f"/v1/tasks/{task}")["credits_spent"] for task in unheard)
    twice = sum(run.sold_twice - before.sold_twice for before, run in pairwise(week.runs) if run.chosen)
    yield f"receipts          {spent:>9.2f} credits for {submitted} runs"
    yield f"never heard of    {price:>9.2f} credits for {len(unheard)} runs: what the doubts have cost"
    yield f"the vendor's bill {audit['credits_charged']:>9.2f} credits for {audit['accepted']} runs"
    yield f"sold twice        {audit['paid_twice']:>9} questions, {twice} of them by a person's choice"
    week.expect(round(spent + price, 6) == audit["credits_charged"], "the receipts add up to the bill")
    week.expect(submitted + len(unheard) == audit["accepted"], "every accepted run is in a receipt or was in doubt")
    week.expect(unknown == 0, "every price is known")
    week.expect(twice == audit["paid_twice"], "nothing is paid twice but by a person's choice")


NIGHTS = (monday, tuesday, wednesday, thursday, friday, saturday, sunday)


def live(folder: Path) -> int:
    """Live through the week; 0 when everything was as it should be."""
    for job in JOBS.glob("*.yaml"):
        shutil.copy(job, folder)
    with vendor(folder) as api:
        (folder / "key").write_text(api.key, encoding="utf-8")
        (folder / "key").chmod(0o600)
        week = Week(folder, api)
        print(TABLE.format(*HEADER))
        for day, night in enumerate(NIGHTS):
            api.wait_until(day, hour=2)
            week.night = night.__name__.capitalize()
            night(week)
        print("", *bill(week), *look(week), sep="\n")
    for claim in week.broken:
        print(f"BROKEN: {claim}")
    return 1 if week.broken else 0


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="an empty folder that keeps what the week leaves behind")
    folder = parser.parse_args().folder
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"{folder} is not empty")
        return live(folder.resolve())
    with tempfile.TemporaryDirectory(prefix="week-") as made:
        return live(Path(made))


if __name__ == "__main__":
    sys.exit(main())
