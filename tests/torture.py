"""Kills a real `enrich run` again and again until the job is done, and asks the API what was paid for.

Meanwhile the API fails in all its ways, connections get out of step, the clock steps by hours, and now and then the
ledger is renamed away under the run.

`python -m tests.torture` is the long form and prints the table of RELIABILITY.md; the suite runs a short one.
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

from enrich.api.client import BULK_POSTS_ON_THE_WIRE
from enrich.errors import Exit
from enrich.sandbox import Fault, SandboxSettings
from tests.harness import JOB, Api, Office, people, serving
from tests.out_of_step import Act, by_chance, out_of_step
from tests.own_answers import ANSWERS, wrong_rows
from tests.stepping_clock import start_by_clock

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
#: How connections get out of step, each for a small share of the POSTs and of the polls. A POST never gets the answer
#: of a task that exists nowhere: it takes a minute to be sure of that. Nor are the answers of two POSTs exchanged:
#: nothing in them tells whose they are.
TRICKS: Mapping[Act, tuple[float, float]] = {
    Act.REPEAT: (0.03, 0.03),
    Act.UNASKED: (0.01, 0.01),
    Act.SWAP: (0.0, 0.02),
    Act.ANOTHER: (0.005, 0.01),
    Act.NOWHERE: (0.0, 0.005),
    Act.CUT: (0.005, 0.01),
    Act.STATUS: (0.01, 0.0),
}
#: By how much the clock of this machine may be off, in hours.
HOURS = (-30, -7, -2, 0, 0, 2, 7, 30)
#: In each of so many nights the ledger is renamed away under the run, or replaced by a copy, and back after it.
LEDGER_AWAY_EACH = 8
#: What a kill may leave in doubt, whatever `in_flight` is; in bulk it is what four POSTs carry.
AT_MOST_IN_DOUBT = 64
#: How a night that was not killed may end here.
ENDS = frozenset({0, 4, 10, 14})
#: Nights after the last kill in which it must come to its end.
PATIENCE = 20


@dataclass
class Report:
    """What became of a tortured job; the sandbox's word, not ours."""

    rows: int
    at_most_in_doubt: int
    kills: Counter[str] = field(default_factory=Counter)
    stops: int = 0
    ended: Counter[int] = field(default_factory=Counter)
    on_the_wire_at_a_kill: int = 0
    ledger_away: int = 0
    ledger_not_missed: int = 0
    clock_steps: int = 0
    faults: int = 0
    tricks: Counter[str] = field(default_factory=Counter)
    accepted: int = 0
    paid_twice: int = 0
    paid_without_need: int = 0
    lost: int = 0
    #: Leads that had it on any night, and why it is another's.
    anothers: dict[str, str] = field(default_factory=dict)
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
            self.anothers,
            self.ledger_not_missed,
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
            "nights whose ledger was away or replaced": self.ledger_away,
            "… that went on without it": self.ledger_not_missed,
            "steps of the clock by hours": self.clock_steps,
            "faults met": self.faults,
            "answers out of step": self.tricks.total(),
            "runs accepted by the API": self.accepted,
            "most requests on the wire at a kill": self.on_the_wire_at_a_kill,
            "paid twice": self.paid_twice,
            "paid for after the lead had left the file": self.paid_without_need,
            "accepted, but neither answered nor told": self.lost,
            "rows with another's answer": len(self.anothers),
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
    attacks: bool = True,
    bulk: int | None = None,
    tamper: Callable[[Office], bool] | None = None,
) -> Report:
    """Run the job, killing it `kills` times, and judge it by the sandbox's audit.

    `attacks`: beside kills and faults let connections get out of step, the clock step, and the ledger be away.
    `bulk`: send so many requests as one task. `tamper` may falsify ledger or output between nights, until it tells
    that it did: to see the judge find it.
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
    with (
        serving(folder / "api.db", settings) as api,
        out_of_step(api.base_url, by_chance(TRICKS if attacks else {}, seed)) as proxy,
        _stepping(folder / "clock", random.Random(seed), report, going=attacks),
    ):
        behind = replace(api, base_url=proxy.base_url)
        night, done = 0, False
        while not done:
            office.write_leads(town.dusk(night))
            kill = report.kills.total() < kills
            away = attacks and kill and night % LEDGER_AWAY_EACH == LEDGER_AWAY_EACH // 2
            plan = Plan(night, stop_s if not report.stops else 1.0, kill=kill, ledger_away=away)
            code = _one_night(office, behind, rng, report, plan)
            on_the_wire = _names(office, "submitting")
            report.on_the_wire_at_a_kill = max(report.on_the_wire_at_a_kill, len(on_the_wire))
            audit = api.audit()
            report.anothers |= _anothers(office, audit, settings, bulk=bulk is not None)
            town.dawn(_accepted(audit), on_the_wire)
            night += 1
            done = not kill and night > kills and code in (0, 10, 14) and not tamper
            if tamper and tamper(office):
                tamper = None
            assert night < 2 * kills + PATIENCE, f"it does not end:\n{report.table()}"
        _judge(office, api, report, town)
        proxy.heal()
        report.tricks = proxy.happened
        _buy_again(office, api, behind, report)
        report.anothers |= _anothers(office, api.audit(), settings, bulk=bulk is not None)
        report.faults = sum(api.audit()["faults"].values())
    report.seconds = time.monotonic() - began
    return report


@contextmanager
def _stepping(clock: Path, rng: random.Random, report: Report, *, going: bool) -> Iterator[None]:
    """Step the clock that the runs see, by hours, every second or so; at the end it is right."""
    over = Event()

    def step() -> None:
        while not over.wait(rng.uniform(0.2, 2.0)):
            clock.write_text(str(rng.choice(HOURS) * 3600))
            report.clock_steps += 1

    thread = Thread(target=step, daemon=True)
    if going:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if going:
            thread.join()
        clock.write_text("0")


@dataclass(frozen=True)
class Plan:
    """What a night has in store; `stop_s`: for how long a run that falls asleep sleeps."""

    night: int
    stop_s: float
    kill: bool
    ledger_away: bool


def _one_night(office: Office, api: Api, rng: random.Random, report: Report, plan: Plan) -> int | None:
    """Start the run; kill it at a random or a chosen moment. Return its exit code, None when it was killed."""
    moment, comes, at_most = _moment(office, rng, plan)
    process = start_by_clock(office, api, office.folder / "clock")
    if plan.kill:
        came = _wait(process, comes, at_most)
        if plan.ledger_away and came and process.poll() is None:
            take_ledger_away(office, process, report, replaced=rng.random() < 1 / 2)
            return None
        if moment == "asleep" and process.poll() is None:
            _sleep(process, plan.stop_s)
            report.stops += 1
            moment = "after a sleep"
            _wait(process, _never, rng.uniform(0.0, 1.0))
        elif not came or plan.ledger_away:
            moment = "at any moment"
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            report.kills[moment] += 1
            return None
    process.communicate(timeout=300)
    report.ended[process.returncode] += 1
    return process.returncode


def take_ledger_away(office: Office, process: subprocess.Popen[str], report: Report, *, replaced: bool = False) -> None:
    """Rename the ledger away until the run has ended because of it; `replaced`: a copy takes its place meanwhile."""
    files = [Path(f"{office.ledger_path}{ending}") for ending in ("", "-wal", "-shm")]
    away = office.folder / "away"
    away.mkdir(exist_ok=True)
    moved = [path for path in files if path.exists()]
    for path in moved:
        path.rename(away / path.name)
    if replaced:
        for path in moved:
            shutil.copy(away / path.name, path)
    _, said = process.communicate(timeout=600)
    for path in files:  # of a ledger in its place
        path.unlink(missing_ok=True)
    for path in moved:
        (away / path.name).rename(path)
    report.ledger_away += 1
    report.ledger_not_missed += process.returncode != Exit.BUG or "this is a bug" in said


def _moment(office: Office, rng: random.Random, plan: Plan) -> tuple[str, Callable[[], bool], float]:
    """Choose when to strike: its name, how to know it, and for how many seconds to wait for it."""
    executions, attempts = _count(office, "executions"), _count(office, "attempts")
    wire = rng.choice((1, 4, 16))

    def begun() -> bool:  # what the ledger says before is about the night before
        return _count(office, "executions") > executions

    def sending() -> bool:
        return _count(office, "attempts") > attempts

    def posting() -> bool:
        return begun() and _count(office, "attempts", "submitting") >= wire

    def polling() -> bool:
        return begun() and not _count(office, "attempts", "submitting") and _count(office, "attempts", "submitted") > 0

    moments: list[tuple[str, Callable[[], bool], float]] = [
        ("asleep", posting, 5.0),
        ("with POSTs on the wire", posting, 5.0),
        ("at any moment", _never, rng.uniform(0.1, 3.0)),
        ("while polling only", polling, 5.0),
        ("while enrolling", begun, 5.0),
        ("while the output is written", (office.folder / ".job.enrich-part").exists, 10.0),
        ("at any moment", _never, rng.uniform(0.1, 3.0)),
    ]
    return ("in the first seconds", sending, 30.0) if plan.ledger_away else moments[plan.night % len(moments)]


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
    for mode in ("ro", "rw"):
        with closing(sqlite3.connect(f"{office.ledger_path.as_uri()}?mode={mode}", uri=True)) as db:
            try:
                return db.execute(sql).fetchall()
            except sqlite3.OperationalError as error:
                if "no such table" in str(error):  # killed before they were made
                    return []
                if mode == "rw" or "readonly" not in str(error):  # what a kill left has to be recovered first
                    raise
    return []


def _count(office: Office, table: str, state: str | None = None) -> int:
    rows = _ask(office, f"SELECT count(*) FROM {table}" + (f" WHERE state = '{state}'" if state else ""))
    return int(rows[0][0]) if rows else 0


def _names(office: Office, state: str) -> set[str]:
    """Name the leads with an attempt in a state."""
    sql = "SELECT json_extract(params, '$.first_name') FROM requests r JOIN attempts a ON a.request_id = r.id"
    return {name for (name,) in _ask(office, f"{sql} WHERE a.state = '{state}'")}


def _accepted(audit: Mapping[str, Any]) -> dict[str, int]:
    """Tell how many runs of each lead were accepted."""
    return {run["params"]["first_name"]: run["accepted"] for run in audit["runs"]}


def _anothers(office: Office, audit: Mapping[str, Any], settings: SandboxSettings, *, bulk: bool) -> dict[str, str]:
    """Name the leads that have another's answer, in the output that is there now or in the ledger."""
    sql = "SELECT json_extract(params, '$.first_name'), a.state, coalesce(a.task_id, '')"
    settled = _ask(office, f"{sql} FROM requests r JOIN attempts a ON a.request_id = r.id")
    ledger = [dict(zip(("First Name", "enrich_status", "enrich_task_id"), row, strict=True)) for row in settled]
    output = office.output() if (office.folder / "out.csv").exists() else []
    wrong = wrong_rows(ledger, audit, settings, bulk=bulk, column=None)
    return wrong | wrong_rows(output, audit, settings, bulk=bulk)


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


def _buy_again(office: Office, api: Api, behind: Api, report: Report) -> None:
    """Ask again for those in doubt, and for no others; `behind` is the API behind the proxy."""
    before = _accepted(api.audit())
    doubtful = {row["First Name"] for row in office.output() if row["enrich_status"] == "in_doubt"}
    api.heal()
    if doubtful:
        office.enrich("run", "job.yaml", "--json", "--retry", "in_doubt", api=behind)
    for name, accepted in _accepted(api.audit()).items():
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
    for name, why in report.anothers.items():
        print(f"{name}: {why}", file=sys.stderr)
    print(f"\n{report.seconds:.0f} s, {os.cpu_count()} cores", file=sys.stderr)
    sys.exit(0 if report.sound else 1)


if __name__ == "__main__":
    main()
