"""Runs contenders as processes of their own, in turn and as often as there is time, and tells what each run took.

The process that measures must stay small: on Linux a child's peak memory begins at its parent's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.leads import write_job
from benchmarks.server import ROOT, Server

KIB_PER_MIB = 1024


@dataclass(frozen=True, slots=True)
class Contender:
    """Somebody who enriches `rows` leads; `command` is called with an empty folder and the API's base URL."""

    name: str
    rows: int
    command: Callable[[Path, str], list[str]]


@dataclass(frozen=True, slots=True)
class Trial:
    """What one run took, as a process: from its start to its end, with the interpreter's own start.

    `working_s` is what the program itself says, `cpu_s` its processor time and that of its children.
    """

    rows: int
    wall_s: float
    working_s: float
    cpu_s: float
    peak_mib: float
    requests: int


@dataclass(frozen=True, slots=True)
class Result:
    """All trials of one contender."""

    name: str
    trials: tuple[Trial, ...]

    @property
    def rates(self) -> list[float]:
        """Rows per second, as a process, of each trial."""
        return [self.rows / trial.wall_s for trial in self.trials]

    @property
    def best(self) -> float:
        """Rows per second of the trial that was disturbed least."""
        return max(self.rates)

    @property
    def median(self) -> float:
        """Rows per second of the middle trial."""
        return median(self.rates)

    @property
    def rows(self) -> int:
        """How many were answered in each trial."""
        return self.trials[0].rows

    @property
    def working_s(self) -> float:
        """How long the best trial worked, without the interpreter's start, in seconds."""
        return min(trial.working_s for trial in self.trials)

    @property
    def cpu_s(self) -> float:
        """CPU seconds of the middle trial."""
        return median(trial.cpu_s for trial in self.trials)

    @property
    def cpu_per_1000(self) -> float:
        """CPU seconds for 1,000 rows."""
        return 1000 * self.cpu_s / self.rows

    @property
    def speeds(self) -> list[str]:
        """The cells that every table begins with: name, rows, the best rate, the middle one, how far apart they are."""
        return [self.name, f"{self.rows:,}", f"{self.best:,.0f}", f"{self.median:,.0f}", self.spread]

    @property
    def spread(self) -> str:
        """How far apart the trials are: the range of the rates as a share of their median."""
        return f"{(max(self.rates) - min(self.rates)) / self.median:.0%}" if len(self.trials) > 1 else "-"

    @property
    def peak_mib(self) -> float:
        """Peak memory, of all trials."""
        return max(trial.peak_mib for trial in self.trials)

    @property
    def requests(self) -> float:
        """API requests for each row."""
        return median(trial.requests for trial in self.trials) / self.rows


def loop(kind: str, tasks: int, rows: int, *, uvloop: bool = False) -> Contender:
    """Make a contender of a plain loop, see `benchmarks.loops`."""
    name = f"{kind}, {tasks} tasks" + (", uvloop" if uvloop else "")
    options = ["--tasks", str(tasks), "--rows", str(rows), *(["--uvloop"] if uvloop else [])]
    return Contender(
        name, rows, lambda _, url: [sys.executable, "-m", "benchmarks.loops", kind, "--base-url", url, *options]
    )


def enrich_run(name: str, rows: int, bulk: int | None = None) -> Contender:
    """Make a contender of `enrich run`, with a new ledger each time; `bulk`: so many requests to a task."""

    def command(folder: Path, _: str) -> list[str]:
        job = write_job(folder, rows, bulk)
        return [sys.executable, "-m", "enrich", "run", str(job), "--json", "--yes"]

    return Contender(name, rows, command)


def has_bulk() -> bool:
    """Tell whether this `enrich` knows `dispatch` in a job file."""
    schema = subprocess.run([sys.executable, "-m", "enrich", "schema"], capture_output=True, check=True)
    return "dispatch" in json.loads(schema.stdout)["properties"]


def measure(contender: Contender, server: Server) -> Trial:
    """Run a contender once. Raises RuntimeError when it did not answer every row."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        command = contender.command(folder, server.base_url)
        environ = {"PATH": os.defpath, "HOME": name, **server.environ}
        before = server.answered()
        began = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            told = process.stdout.read()
            _, status, used = os.wait4(process.pid, 0)
            wall_s = time.perf_counter() - began
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{contender.name}: exit {process.returncode}: {told.decode()[:500]}")
        report: dict[str, Any] = json.loads(told)
        if report.get("found", report["rows"]) != contender.rows:
            raise RuntimeError(f"{contender.name}: not every row was answered: {report}")
        return Trial(
            rows=contender.rows,
            wall_s=wall_s,
            working_s=report["elapsed_s"],
            cpu_s=used.ru_utime + used.ru_stime,
            peak_mib=used.ru_maxrss / KIB_PER_MIB,
            requests=server.answered() - before,
        )


def compete(contenders: Sequence[Contender], server: Server, seconds: float) -> list[Result]:
    """Let all run in turn, for as many rounds as fit into `seconds`, at least one.

    In turn, because what disturbs the machine for a while shall disturb them all.
    """
    trials: list[list[Trial]] = [[] for _ in contenders]
    began = round_began = time.perf_counter()
    while True:
        for contender, mine in zip(contenders, trials, strict=True):
            mine.append(measure(contender, server))
            print(f"  {contender.name}: {mine[-1].rows / mine[-1].wall_s:,.0f} rows/s", file=sys.stderr)
        now = time.perf_counter()
        if now - began + (now - round_began) > seconds:
            return [Result(one.name, tuple(mine)) for one, mine in zip(contenders, trials, strict=True)]
        round_began = now


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a Markdown table, numbers to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    marks = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
        for line in [lines[0], marks, *lines[1:]]
    )
