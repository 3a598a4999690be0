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
from benchmarks.server import ROOT, RunningServer

KIB_PER_MIB = 1024


@dataclass(frozen=True, slots=True)
class BenchmarkCase:
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
    reported_s: float
    cpu_s: float
    peak_mib: float
    requests: int


@dataclass(frozen=True, slots=True)
class Result:
    """All trials of one contender."""

    name: str
    trials: tuple[Trial, ...]

    @property
    def rows_per_s(self) -> list[float]:
        """Rows per second, as a process, of each trial."""
        return [self.rows / trial.wall_s for trial in self.trials]

    @property
    def best_rate(self) -> float:
        """Rows per second of the trial that was disturbed least."""
        return max(self.rows_per_s)

    @property
    def median_rate(self) -> float:
        """Rows per second of the middle trial."""
        return median(self.rows_per_s)

    @property
    def rows(self) -> int:
        """How many were answered in each trial."""
        return self.trials[0].rows

    @property
    def reported_s(self) -> float:
        """How long the best trial worked, without the interpreter's start, in seconds."""
        return min(trial.reported_s for trial in self.trials)

    @property
    def cpu_s(self) -> float:
        """CPU seconds of the middle trial."""
        return median(trial.cpu_s for trial in self.trials)

    @property
    def cpu_per_1000(self) -> float:
        """CPU seconds for 1,000 rows."""
        return 1000 * self.cpu_s / self.rows

    @property
    def speed_cells(self) -> list[str]:
        """The cells that every table begins with: name, rows, the best rate, the middle one, how far apart they are."""
        return [self.name, f"{self.rows:,}", f"{self.best_rate:,.0f}", f"{self.median_rate:,.0f}", self.spread]

    @property
    def spread(self) -> str:
        """How far apart the trials are: the range of the rates as a share of their median."""
        return (
            f"{(max(self.rows_per_s) - min(self.rows_per_s)) / self.median_rate:.0%}" if len(self.trials) > 1 else "-"
        )

    @property
    def peak_mib(self) -> float:
        """Peak memory, of all trials."""
        return max(trial.peak_mib for trial in self.trials)

    @property
    def requests(self) -> float:
        """API requests for each row."""
        return median(trial.requests for trial in self.trials) / self.rows


def loop_case(kind: str, tasks: int, rows: int, *, uvloop: bool = False) -> BenchmarkCase:
    """Make a contender of a plain loop, see `benchmarks.loops`."""
    name = f"{kind}, {tasks} tasks" + (", uvloop" if uvloop else "")
    options = ["--tasks", str(tasks), "--rows", str(rows), *(["--uvloop"] if uvloop else [])]
    return BenchmarkCase(
        name, rows, lambda _, url: [sys.executable, "-m", "benchmarks.loops", kind, "--base-url", url, *options]
    )


def enrich_case(name: str, rows: int, bulk: int | None = None) -> BenchmarkCase:
    """Make a contender of `enrich run`, with a new ledger each time; `bulk`: so many requests to a task."""

    def command(folder: Path, _: str) -> list[str]:
        job = write_job(folder, rows, bulk)
        return [sys.executable, "-m", "enrich", "run", str(job), "--json", "--yes"]

    return BenchmarkCase(name, rows, command)


def supports_bulk() -> bool:
    """Tell whether this `enrich` knows `dispatch` in a job file."""
    schema = subprocess.run([sys.executable, "-m", "enrich", "schema"], capture_output=True, check=True)
    return "dispatch" in json.loads(schema.stdout)["properties"]


def measure(case: BenchmarkCase, server: RunningServer) -> Trial:
    """Run a contender once. Raises RuntimeError when it did not answer every row."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        command = case.command(folder, server.base_url)
        environ = {"PATH": os.defpath, "HOME": name, **server.environ}
        before = server.request_count()
        began = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            output = process.stdout.read()
            _, status, used = os.wait4(process.pid, 0)
            wall_s = time.perf_counter() - began
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{case.name}: exit {process.returncode}: {output.decode()[:500]}")
        report: dict[str, Any] = json.loads(output)
        if report.get("found", report["rows"]) != case.rows:
            raise RuntimeError(f"{case.name}: not every row was answered: {report}")
        return Trial(
            rows=case.rows,
            wall_s=wall_s,
            reported_s=report["elapsed_s"],
            cpu_s=used.ru_utime + used.ru_stime,
            peak_mib=used.ru_maxrss / KIB_PER_MIB,
            requests=server.request_count() - before,
        )


def measure_in_rounds(cases: Sequence[BenchmarkCase], server: RunningServer, seconds: float) -> list[Result]:
    """Let all run in turn, for as many rounds as fit into `seconds`, at least one.

    In turn, because what disturbs the machine for a while shall disturb them all.
    """
    trials: list[list[Trial]] = [[] for _ in cases]
    began = round_began = time.perf_counter()
    while True:
        for case, own_trials in zip(cases, trials, strict=True):
            own_trials.append(measure(case, server))
            print(f"  {case.name}: {own_trials[-1].rows / own_trials[-1].wall_s:,.0f} rows/s", file=sys.stderr)
        now = time.perf_counter()
        if now - began + (now - round_began) > seconds:
            return [Result(one.name, tuple(mine)) for one, mine in zip(cases, trials, strict=True)]
        round_began = now


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a Markdown table, numbers to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    marks = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
        for line in [lines[0], marks, *lines[1:]]
    )
