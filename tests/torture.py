"""Kills a real `enrich run` again and again until the job is done, and asks the API what was paid for.

`python -m tests.torture` is the long form and prints the table of RELIABILITY.md; the suite runs a short one.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enrich.api.client import BULK_POSTS_ON_THE_WIRE
from enrich.sandbox import Fault, SandboxSettings
from tests.harness import JOB, Api, Office, people, serving

#: Every way in which the API goes wrong, each for a small share of the requests. A lost task is not among them:
#: it takes a minute to be sure of one.
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
)
#: What a kill may leave in doubt, whatever `in_flight` is; in bulk it is what four POSTs carry.
AT_MOST_IN_DOUBT = 64
#: How a night that was not killed may end here.
ENDS = frozenset({0, 4, 10, 14})
#: Nights after the last kill in which it must come to its end.
PATIENCE = 20
#: What counts as an answer. Nothing expires in these minutes: `expired` would be a loss.
ANSWERS = frozenset({"found", "not_found", "failed"})


@dataclass
class Report:
    """What became of a tortured job; the sandbox's word, not ours."""

    rows: int
    at_most_in_doubt: int
    kills: Counter[str] = field(default_factory=Counter)
    stops: int = 0
    ended: Counter[int] = field(default_factory=Counter)
    on_the_wire_at_a_kill: int = 0
    faults: int = 0
    accepted: int = 0
    paid_twice: int = 0
    paid_without_need: int = 0
    lost: int = 0
    out_of_place: int = 0
    in_doubt: int = 0
    bought_again: int = 0
    bought_again_without_doubt: int = 0
    unanswered: int = 0
    seconds: float = 0.0

    @property
    def sound(self) -> bool:
        """Tell whether every promise was kept."""
        broken = (
            self.paid_twice,
            self.paid_without_need,
            self.lost,
            self.out_of_place,
            self.bought_again_without_doubt,
            self.unanswered,
            self.on_the_wire_at_a_kill > self.at_most_in_doubt,
            self.ended.keys() - ENDS,
        )
        return not any(broken)

    def table(self) -> str:
        """The report as a Markdown table."""
        told = {
            "leads": self.rows,
            "kills (SIGKILL)": self.kills.total(),
            **{f"… {moment}": count for moment, count in sorted(self.kills.items())},
            "stops (SIGSTOP, SIGCONT)": self.stops,
            **{f"nights that ended by themselves with exit {code}": n for code, n in sorted(self.ended.items())},
            "faults met": self.faults,
            "runs accepted by the API": self.accepted,
            "most requests on the wire at a kill": self.on_the_wire_at_a_kill,
            "paid twice": self.paid_twice,
            "paid for after the lead had left the file": self.paid_without_need,
            "accepted, but neither answered nor told": self.lost,
            "rows of the output out of their place": self.out_of_place,
            "in doubt at the end": self.in_doubt,
            "bought again by `--retry in_doubt`": self.bought_again,
            "bought again without having been in doubt": self.bought_again_without_doubt,
            "unanswered after that": self.unanswered,
        }
        return "\n".join(["| what | number |", "|---|---|", *(f"| {name} | {n:,} |" for name, n in told.items())])


@dataclass
class Town:
    """The leads of each night: most stay, new ones come, some are there for one night only; all in any order."""

    rows: int
    nights: int
    rng: random.Random
    #: Leads that left, with the most runs that may ever be accepted for each.
    left: dict[str, int] = field(default_factory=dict)
    tonight: list[list[str]] = field(default_factory=list)
    _passing: list[list[str]] = field(default_factory=list)

    def dusk(self, night: int) -> list[list[str]]:
        """Tell who is in the file tonight: half of the leads from the start, all after the last kill."""
        share = min(1.0, 0.5 + 0.5 * night / self.nights)
        staying = people(int(self.rows * share))
        a_few = max(1, self.rows // 10 // self.nights) if night < self.nights else 0
        self._passing = people(a_few, start=self.rows + night * a_few)
        self.tonight = staying + self._passing
        self.rng.shuffle(self.tonight)
        return self.tonight

    def dawn(self, accepted: dict[str, int], on_the_wire: set[str]) -> None:
        """Let those who were passing leave; a POST on the wire may still arrive at the API."""
        for name, *_ in self._passing:
            self.left[name] = accepted.get(name, 0) + (name in on_the_wire)


def torture(
    folder: Path,
    *,
    rows: int,
    kills: int,
    seed: int,
    stop_s: float = 1.0,
    faults: Iterable[str] = FAULTS,
    bulk: int | None = None,
    tamper: Callable[[Office], bool] | None = None,
) -> Report:
    """Run the job, killing it `kills` times, and judge it by the sandbox's audit.

    `bulk`: send so many requests as one task. `tamper` may falsify the ledger between nights, until it tells that
    it did: to see the judge find it.
    """
    rng = random.Random(seed)
    office = Office(folder)
    keys = {"dispatch": f"{{bulk: {bulk}}}"} if bulk else {}
    office.write_job(JOB, limits="{requests_per_second: 400, in_flight: 500}", policy="{max_attempts: 5}", **keys)
    settings = SandboxSettings(
        latency="lognormal(0.5,0.6)",
        seed=seed,
        fault_seed=seed,
        balance=1_000_000,
        no_data_seconds=0.5,
        faults=tuple(map(Fault.parse, faults)),
    )
    report = Report(rows, AT_MOST_IN_DOUBT if bulk is None else BULK_POSTS_ON_THE_WIRE * bulk)
    town = Town(rows, kills, rng)
    began = time.monotonic()
    with serving(folder / "api.db", settings) as api:
        night, done = 0, False
        while not done:
            office.write_leads(town.dusk(night))
            kill = report.kills.total() < kills
            code = _one_night(office, api, rng, report, night, stop_s=stop_s if not report.stops else 1.0, kill=kill)
            on_the_wire = _names(office, "submitting")
            report.on_the_wire_at_a_kill = max(report.on_the_wire_at_a_kill, len(on_the_wire))
            town.dawn(_accepted(api), on_the_wire)
            night += 1
            done = not kill and night > kills and code in (0, 10, 14) and not tamper
            if tamper and tamper(office):
                tamper = None
            assert night < 2 * kills + PATIENCE, f"it does not end:\n{report.table()}"
        _judge(office, api, report, town)
        _buy_again(office, api, report)
        report.faults = sum(api.audit()["faults"].values())
    report.seconds = time.monotonic() - began
    return report


def _one_night(
    office: Office, api: Api, rng: random.Random, report: Report, night: int, *, stop_s: float, kill: bool
) -> int | None:
    """Start the run; kill it at a random or a chosen moment. Return its exit code, None when it was killed."""
    what, comes, at_most = _moment(office, rng, night)
    process = office.start("run", "job.yaml", "--json", api=api)
    if kill:
        moment = what if _wait(process, comes, at_most) else "at any moment"
        if what == "asleep" and process.poll() is None:
            _sleep(process, stop_s)
            report.stops += 1
            moment = "after a sleep"
            _wait(process, _never, rng.uniform(0.0, 1.0))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            report.kills[moment] += 1
            return None
    process.communicate(timeout=300)
    report.ended[process.returncode] += 1
    return process.returncode


def _moment(office: Office, rng: random.Random, night: int) -> tuple[str, Callable[[], bool], float]:
    """Choose when to strike: its name, how to know it, and for how many seconds to wait for it."""
    executions = _count(office, "executions")
    wire = rng.choice((1, 4, 16))

    def begun() -> bool:  # what the ledger says before is about the night before
        return _count(office, "executions") > executions

    def posting() -> bool:
        return begun() and _count(office, "attempts", "submitting") >= wire

    def polling() -> bool:
        return begun() and not _count(office, "attempts", "submitting") and _count(office, "attempts", "submitted") > 0

    moments: list[tuple[str, Callable[[], bool], float]] = [
        ("asleep", posting, 3.0),
        ("with POSTs on the wire", posting, 3.0),
        ("at any moment", _never, rng.uniform(0.1, 3.0)),
        ("while polling only", polling, 5.0),
        ("while enrolling", begun, 3.0),
        ("while the output is written", (office.folder / ".job.enrich-part").exists, 10.0),
        ("at any moment", _never, rng.uniform(0.1, 3.0)),
    ]
    return moments[night % len(moments)]


def _wait(process: subprocess.Popen[str], comes: Callable[[], bool], seconds: float) -> bool:
    """Wait for a moment; tell whether it came."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if comes():
            return True
        time.sleep(0.004)
    return False


def _never() -> bool:
    return False


def _sleep(process: subprocess.Popen[str], seconds: float) -> None:
    """Close the laptop, and open it again."""
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)


def _ask(office: Office, sql: str) -> list[Any]:
    """Look into the ledger, which may not be there yet."""
    if not office.ledger_path.exists():
        return []
    with closing(sqlite3.connect(f"{office.ledger_path.as_uri()}?mode=ro", uri=True)) as db:
        try:
            return db.execute(sql).fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):  # killed before they were made
                return []
            raise


def _count(office: Office, table: str, state: str | None = None) -> int:
    rows = _ask(office, f"SELECT count(*) FROM {table}" + (f" WHERE state = '{state}'" if state else ""))
    return int(rows[0][0]) if rows else 0


def _names(office: Office, state: str) -> set[str]:
    """Name the leads with an attempt in a state."""
    sql = "SELECT json_extract(params, '$.first_name') FROM requests r JOIN attempts a ON a.request_id = r.id"
    return {name for (name,) in _ask(office, f"{sql} WHERE a.state = '{state}'")}


def _accepted(api: Api) -> dict[str, int]:
    """Tell how many runs of each lead were accepted."""
    return {run["params"]["first_name"]: run["accepted"] for run in api.audit()["runs"]}


def _judge(office: Office, api: Api, report: Report, town: Town) -> None:
    """Hold output and ledger against the sandbox's audit."""
    audit = api.audit()
    report.accepted, report.paid_twice = audit["accepted"], audit["paid_twice"]
    output = office.output()
    report.out_of_place = sum(
        list(row.values())[: len(lead)] != lead for row, lead in zip(output, town.tonight, strict=True)
    )
    report.in_doubt = sum(row["enrich_status"] == "in_doubt" for row in output)
    states = dict(_ask(office, "SELECT json_extract(params, '$.first_name'), state FROM requests"))
    states |= {row["First Name"]: row["enrich_status"] for row in output}
    known = {task_id for (task_id,) in _ask(office, "SELECT task_id FROM attempts")}
    doubtful = _names(office, "in_doubt")
    for run in audit["runs"]:
        name = run["params"]["first_name"]
        report.lost += name not in doubtful and (states[name] not in ANSWERS or not known.issuperset(run["task_ids"]))
        report.paid_without_need += run["accepted"] > town.left.get(name, run["accepted"])


def _buy_again(office: Office, api: Api, report: Report) -> None:
    """Ask again for those in doubt, and for no others."""
    before = _accepted(api)
    doubtful = {row["First Name"] for row in office.output() if row["enrich_status"] == "in_doubt"}
    api.heal()
    if doubtful:
        office.enrich("run", "job.yaml", "--json", "--retry", "in_doubt", api=api)
    for name, accepted in _accepted(api).items():
        if accepted > before.get(name, 0):
            report.bought_again += name in doubtful
            report.bought_again_without_doubt += name not in doubtful
    report.unanswered = sum(row["enrich_status"] not in ANSWERS for row in office.output())


def main() -> None:
    """Torture a job from the command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rows", type=int, default=3_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stop", type=float, default=60.0, help="seconds of SIGSTOP, the first time")
    parser.add_argument("--bulk", type=int, help="requests to a task; default: each by itself")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = torture(
            Path(folder), rows=given.rows, kills=given.kills, seed=given.seed, stop_s=given.stop, bulk=given.bulk
        )
    print(report.table())
    print(f"\n{report.seconds:.0f} s, {os.cpu_count()} cores", file=sys.stderr)
    sys.exit(0 if report.sound else 1)


if __name__ == "__main__":
    main()
