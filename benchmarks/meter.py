"""Runs benchmark cases as separate processes, in turn and as often as time allows, and measures each run.

The measuring process must stay small: on Linux, a child's peak memory starts at its parent's.
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
    """A program that enriches `rows` leads; `command` is called with an empty folder and the API's base URL."""

    name: str
    rows: int
    command: Callable[[Path, str], list[str]]


@dataclass(frozen=True, slots=True)
class Trial:
    """The measurements of one run of a process, from its start to its end, including the interpreter's start.

    `reported_s` is the time that the program itself reports, `cpu_s` the CPU time of the process and its children.
    """

    rows: int
    wall_s: float
    reported_s: float
    cpu_s: float
    peak_mib: float
    requests: int


@dataclass(frozen=True, slots=True)
class Result:
    """All trials of one case."""

    name: str
    trials: tuple[Trial, ...]

    @property
    def rows_per_s(self) -> list[float]:
        """Rows per second of each trial, including the interpreter's start."""
        return [self.rows / trial.wall_s for trial in self.trials]

    @property
    def best_rate(self) -> float:
        """Rows per second of the fastest trial, the least disturbed one."""
        return max(self.rows_per_s)

    @property
    def median_rate(self) -> float:
        """Median of the rows per second."""
        return median(self.rows_per_s)

    @property
    def rows(self) -> int:
        """Rows answered in each trial."""
        return self.trials[0].rows

    @property
    def reported_s(self) -> float:
        """Seconds of the fastest trial, without the interpreter's start."""
        return min(trial.reported_s for trial in self.trials)

    @property
    def cpu_s(self) -> float:
        """Median of the CPU seconds."""
        return median(trial.cpu_s for trial in self.trials)

    @property
    def cpu_per_1000(self) -> float:
        """CPU seconds per 1,000 rows."""
        return 1000 * self.cpu_s / self.rows

    @property
    def speed_cells(self) -> list[str]:
        """The first cells of every table: name, rows, best rate, median rate, spread."""
        return [self.name, f"{self.rows:,}", f"{self.best_rate:,.0f}", f"{self.median_rate:,.0f}", self.spread]

    @property
    def spread(self) -> str:
        """The range of the rates as a share of their median; a dash for a single trial."""
        return (
            f"{(max(self.rows_per_s) - min(self.rows_per_s)) / self.median_rate:.0%}" if len(self.trials) > 1 else "-"
        )

    @property
    def peak_mib(self) -> float:
        """Peak memory over all trials, in MiB."""
        return max(trial.peak_mib for trial in self.trials)

    @property
    def requests(self) -> float:
        """API requests per row."""
        return median(trial.requests for trial in self.trials) / self.rows


def loop_case(kind: str, tasks: int, rows: int, *, uvloop: bool = False) -> BenchmarkCase:
    """Make a case of a plain loop, see `benchmarks.loops`."""
    name = f"{kind}, {tasks} tasks" + (", uvloop" if uvloop else "")
    options = ["--tasks", str(tasks), "--rows", str(rows), *(["--uvloop"] if uvloop else [])]
    return BenchmarkCase(
        name, rows, lambda _, url: [sys.executable, "-m", "benchmarks.loops", kind, "--base-url", url, *options]
    )


def enrich_case(name: str, rows: int, bulk: int | None = None) -> BenchmarkCase:
    """Make a case of `enrich run`, with a new ledger each time; `bulk`: requests per task."""

    def command(folder: Path, _: str) -> list[str]:
        job = write_job(folder, rows, bulk)
        return [sys.executable, "-m", "enrich", "run", str(job), "--json", "--yes"]

    return BenchmarkCase(name, rows, command)


def supports_bulk() -> bool:
    """Return True when this version of `enrich` supports `dispatch` in a job file."""
    schema = subprocess.run([sys.executable, "-m", "enrich", "schema"], capture_output=True, check=True)
    return "dispatch" in json.loads(schema.stdout)["properties"]


def measure(case: BenchmarkCase, server: RunningServer) -> Trial:
    """Run a case once. Raises RuntimeError when it failed or did not answer every row."""
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
    """Run all cases in turn, for as many rounds as fit into `seconds`, at least one.

    In turn, so that a temporary disturbance of the machine affects all of them.
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
    """Format a Markdown table: first column left-aligned, the others right-aligned."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    marks = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
        for line in [lines[0], marks, *lines[1:]]
    )
