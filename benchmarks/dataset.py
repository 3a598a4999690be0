"""Millions of rows on Ray and PostgreSQL: time, memory and rows/s by number of workers, and the ledger's cost.

`python -m benchmarks.dataset --rows 2000000 --requests 20000 --workers 1,2,4`

The script makes the dataset: Parquet, partitioned by country. The API is `benchmarks.server`, which is never the limit
unless `--rate` sets one. Each run begins with an empty ledger. `--make FOLDER` only writes the dataset.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.meter import format_table
from benchmarks.partitions import make_dataset
from benchmarks.server import RunningServer, start_server
from tests.support.postgres import PostgresServer, dedicated_server

JOB = """\
version: 1
name: dataset
input: leads/
output: enriched/
ledger: {ledger}
waterfall: email_getter
params:
  first_name: First Name
  last_name: Last Name
  company: {{column: Website, transform: [domain]}}
columns:
  work_email: email
limits: {{requests_per_second: {rate}, in_flight: {in_flight}}}
"""
HEADER = ("workers", "rows", "requests", "enroll", "work", "collect", "whole run", "rows/s", "requests/s", "polls",
          "statements a request", "bytes a request", "busiest s", "driver MiB", "worker MiB", "block MiB")  # fmt: skip
MIB = 1024 * 1024
#: Kinds of processes: the one that was started, workers that send and poll, tasks that read and write blocks.
DRIVER, WORKER, BLOCK = "driver", "worker", "block"


@dataclass
class MemoryMonitor:
    """Peak memory of each kind of process at and below `root`, sampled every 0.2 s; in MiB, without shared memory."""

    root: int
    peaks: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def monitoring(self) -> Iterator[None]:
        """Sample until the block ends."""
        ended = threading.Event()

        def poll() -> None:
            while not ended.wait(0.2):
                self._sample()

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _sample(self) -> None:
        parents: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                except OSError:
                    continue
        for pid in parents:
            if kind := self._process_kind(pid, parents):
                self.peaks[kind] = max(self.peaks[kind], _anonymous_mib(pid))

    def _process_kind(self, pid: int, parents: dict[int, int]) -> str | None:
        above = pid
        while above != self.root:
            if above not in parents:
                return None
            above = parents[above]
        if pid == self.root:
            return DRIVER
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            return None
        if not title.startswith("ray::"):
            return None
        return WORKER if title.startswith("ray::WorkerActor") else BLOCK


def _anonymous_mib(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0.0)


@dataclass(frozen=True)
class RunMeasurement:
    """The measurements of one run: seconds of its phases, and the counts of database and API."""

    summary: dict[str, Any]
    phase_seconds: tuple[float, float, float]
    wall_s: float
    statements: int
    ledger_bytes: int
    peak_requests_per_s: int
    peaks: dict[str, float]

    def cells(self, workers: int) -> list[str]:
        """Return the cells of its line in the table."""
        rows, requests = self.summary["rows"], self.summary["requests"]
        return [
            *(f"{number:,}" for number in (workers, rows, requests)),
            *(f"{seconds:.1f} s" for seconds in (*self.phase_seconds, self.wall_s)),
            f"{rows / self.wall_s:,.0f}",
            f"{requests / self.phase_seconds[1]:,.0f}",
            f"{self.summary['polls'] / requests:.2f}",
            f"{self.statements / requests:.1f}",
            f"{self.ledger_bytes / requests:,.0f}",
            f"{self.peak_requests_per_s:,}",
            *(f"{self.peaks.get(kind, 0):.0f}" for kind in (DRIVER, WORKER, BLOCK)),
        ]


def measure_run(
    folder: Path, database: PostgresServer, api: RunningServer, workers: int, **limits: str | int
) -> RunMeasurement:
    """Run the job once with an empty ledger."""
    ledger = database.ledger_url()
    schema = ledger.rpartition("=")[2]
    job = folder / "job.yaml"
    job.write_text(JOB.format(ledger=ledger, **limits))
    environ = os.environ | database.environ | api.environ
    command = [sys.executable, "-m", "enrich", "run", str(job), "--engine", "ray", "--workers", str(workers), "--json"]
    with database.connect("postgres") as db:
        db.execute("SELECT pg_stat_statements_reset()")
    began = time.monotonic()
    with subprocess.Popen([*command, "--yes"], env=environ, stdout=subprocess.PIPE) as process:
        monitor = MemoryMonitor(process.pid)
        with monitor.monitoring():
            out, _ = process.communicate()
    wall_s = time.monotonic() - began
    summary = json.loads(out)
    assert process.returncode == 0, summary
    with database.connect("postgres") as db:
        statements = _fetch_value(db, "SELECT sum(calls) FROM pg_stat_statements s JOIN pg_roles r ON r.oid = s.userid "
                              "WHERE r.rolname = 'enrich'")  # fmt: skip
        size = _fetch_value(
            db,
            "SELECT sum(pg_total_relation_size(c.oid)) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            f"WHERE n.nspname = '{schema}' AND c.relkind = 'r'",
        )
        times = db.execute(
            f"SELECT e.started_ms, min(a.claimed_ms), max(a.settled_ms), e.ended_ms FROM {schema}.attempts a "
            f"JOIN {schema}.executions e ON e.id = a.execution_id GROUP BY e.id"
        ).fetchone()
    assert times is not None
    steps = tuple((after - before) / 1000 for before, after in pairwise(times))
    database.drop_schemas()
    return RunMeasurement(
        summary,
        (steps[0], steps[1], steps[2]),
        wall_s,
        int(statements),
        int(size),
        api.peak_requests_per_s(),
        dict(monitor.peaks),
    )


def _fetch_value(db: Any, sql: str) -> Any:
    return db.execute(sql).fetchone()[0]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.dataset", description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--workers", default="1,2,4", help="numbers of workers, measured in turn")
    parser.add_argument("--rate", default="null", help="`requests_per_second` of the job; null: not set")
    parser.add_argument("--in-flight", default="null", help="`in_flight` of the job; null: not set")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="write the dataset there, and nothing else")
    options = parser.parse_args()
    if options.make:
        make_dataset(options.make, options.rows, options.requests, options.files)
        return
    lines = []
    with tempfile.TemporaryDirectory() as name, dedicated_server(
        fsync="on", shared_buffers="512MB", max_wal_size="4GB", shared_preload_libraries="pg_stat_statements"
    ) as database:  # fmt: skip
        with database.connect("postgres") as db:
            db.execute("CREATE EXTENSION pg_stat_statements")
        folder = Path(name)
        make_dataset(folder / "leads", options.rows, options.requests, options.files)
        for workers in map(int, options.workers.split(",")):
            # A new ledger beside an output that another one paid for is refused.
            shutil.rmtree(folder / "enriched", ignore_errors=True)
            with start_server() as api:
                measurement = measure_run(
                    folder, database, api, workers, rate=options.rate, in_flight=options.in_flight
                )
                lines.append(measurement.cells(workers))
            print(format_table(HEADER, lines[-1:]), file=sys.stderr)
    print(format_table(HEADER, lines))


if __name__ == "__main__":
    main()
