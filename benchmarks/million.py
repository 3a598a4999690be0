"""Time and memory for a million rows that are all answered: plan, a run with nothing to send, collect, report, check.

The script makes the input and the ledger. Each command runs as a separate process, over CSV and over Parquet. Controls
are the same file read and written by Python's `csv`, and by polars without any processing, and for the report and
`ledger check` all answers read by `sqlite3` and parsed as JSON. The last column compares processor time with that of
the control: `csv` or `sqlite3`. `--growth` measures several sizes, one after the other. `--others` fills the ledger
with unrelated requests, to measure what a small file of 100 rows then costs.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from enrich.ledger import enroll, records
from enrich.sandbox import SandboxSettings
from enrich.sandbox.server import serve_in_thread

JOB = """\
version: 1
name: million
input: leads.csv
output: leads_enriched.csv
ledger: million.db
waterfall: email_getter
params:
  first_name: First Name
  last_name: Last Name
  company: {column: [Website, Email], transform: [domain]}
columns:
  work_email: email
limits: {requests_per_second: 1000}
"""
HEADER = ["First Name", "Last Name", "Company", "Website", "Email", "Phone", "Country", "Note"]
#: The commands that are compared with reading the input, and those that are compared with reading the ledger.
READS_INPUT = ("plan", "run", "collect")
READS_LEDGER = frozenset(("report", "check"))
#: The sandbox's answers without the task id: with a match, and with no match.
FOUND_ANSWER = (
    '","status":"completed","data":[{"result":{"email":"ada.lovelace@company.example"},"result_field":["email"],'
    '"enrichment_data":{"Mailhound":{"email":"ada.lovelace@company.example","score":87}},"steps":[{"action":"search",'
    '"provider":"Mailhound","result":"found","details":null,"cost":"2","is_verified":false,'
    '"provider_logo":"https://logos.example/833.png"}]}],"credits_spent":2.0,"error":null}'
)
NOT_FOUND_ANSWER = (
    '","status":"completed","data":[{"result":{"email":null},"result_field":["email"],"enrichment_data":{"Mailhound":'
    '{},"Postbote":{}},"steps":[{"action":"search","provider":"Mailhound","result":"not_found","details":null,'
    '"cost":"0","is_verified":false,"provider_logo":"https://logos.example/833.png"},{"action":"search","provider":'
    '"Postbote","result":"not_found","details":null,"cost":"0","is_verified":false,'
    '"provider_logo":"https://logos.example/966.png"}]}],"credits_spent":0.0,"error":null}'
)
#: Settles each pending request as the sandbox would have answered it: 7 of 10 found.
SETTLE_SQL = """
INSERT INTO attempts (id, request_id, execution_id, previous_state, state, task_id, claimed_ms, submitted_ms,
                      settled_ms, settled_execution_id, acknowledged, reserved, credits, provider, answer)
SELECT id, id, :execution, 'pending', iif(id % 10 < 7, 'found', 'not_found'), 'task-' || id, :now, :now, :now + id,
       :execution, 1, 5000000, iif(id % 10 < 7, 2000000, 0), iif(id % 10 < 7, 'Mailhound', NULL),
       '{"task_id":"task-' || id || iif(id % 10 < 7, :found, :missed)
FROM requests WHERE state = 'pending';
UPDATE requests SET state = iif(id % 10 < 7, 'found', 'not_found'), attempt_count = 1, attempt_id = id,
       answer_id = iif(id % 10 < 7, id, NULL) WHERE state = 'pending';
UPDATE executions SET submitted = (SELECT count(*) FROM attempts), spent = (SELECT sum(credits) FROM attempts)
WHERE id = :execution
"""
OTHER_REQUESTS_SQL = """
WITH RECURSIVE others (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM others WHERE n < :others)
INSERT INTO requests (fingerprint, call_id, params, state)
SELECT randomblob(16), (SELECT min(id) FROM calls),
       '{"company":"other' || n || '.example","first_name":"First' || n || '","last_name":"Last' || n || '"}', 'pending'
FROM others
"""


@dataclass(frozen=True, slots=True)
class ProcessCost:
    """The cost of a process: wall-clock seconds, CPU seconds, and peak memory in MiB."""

    wall_s: float
    cpu_s: float
    peak_mib: float


def make_leads(rows: int, requests: int) -> Iterator[list[str]]:
    """Make leads with `requests` distinct requests."""
    for row in range(rows):
        number = row % requests
        site = f"https://www.company{number}.example/about" if number % 3 else ""
        yield [
            f"First{number}",
            f"Last{number}",
            f"Company {number}, Inc.",
            site,
            f"info@company{number}.example",
            f"+49 30 {row:07}",
            "DE",
            f"note {row}",
        ]


def write_leads(folder: Path, rows: int, requests: int) -> None:
    """Write the input as CSV and as Parquet, and its first 100 rows as another CSV."""
    import polars as pl  # noqa: PLC0415 - runs in a separate process, whose memory is not measured

    for name, some in (("leads.csv", rows), ("few.csv", min(rows, 100))):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([HEADER])
            csv.writer(file, lineterminator="\n").writerows(islice(make_leads(rows, requests), some))
    text = pl.scan_csv(folder / "leads.csv", infer_schema=False).with_columns(pl.all().fill_null(""))
    text.sink_parquet(folder / "leads.parquet")


def write_ledger(job_file: Path, others: int) -> None:
    """Settle all requests of the input, and `others` unrelated ones."""
    from enrich.job.job import load_job  # noqa: PLC0415
    from enrich.ledger.database import Database  # noqa: PLC0415
    from enrich.models import RequestSelection  # noqa: PLC0415
    from enrich.rows.batches import store_batch  # noqa: PLC0415
    from enrich.rows.job_input import JobInput  # noqa: PLC0415
    from enrich.run.preflight import template_from_ledger  # noqa: PLC0415 - runs in a separate process

    job = load_job(job_file)
    with closing(Database(job.ledger)) as ledger, ledger.transaction():
        template = template_from_ledger(ledger, job)
        db: Any = ledger.session
        db.execute(OTHER_REQUESTS_SQL, {"others": others}) if others else None
        for batch in JobInput(job).batches(template, ledger=ledger):
            ids = enroll.enroll(ledger, template.target, batch.requests(), RequestSelection())
            store_batch(ledger, job, batch, ids)
        now = int(time.time() * 1000)
        known = {
            "execution": records.newest_execution_id(ledger),
            "now": now,
            "found": FOUND_ANSWER,
            "missed": NOT_FOUND_ANSWER,
        }
        for statement in SETTLE_SQL.split(";\n"):
            db.execute(statement, known)


def run_in_process(function: Callable[..., None], *arguments: object) -> ProcessCost:
    """Run a function in a new process."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    begun = time.perf_counter()
    process.start()
    assert process.pid is not None
    return _wait_for_process(process.pid, begun)


def run_enrich(folder: Path, environ: dict[str, str], *words: str) -> ProcessCost:
    """Run `enrich` with these arguments."""
    return run_module(folder, "enrich", *words, environ=environ)


def run_module(folder: Path, module: str, *words: str, environ: Mapping[str, str] | None = None) -> ProcessCost:
    """Run a module as a program with these arguments."""
    begun = time.perf_counter()
    with (folder / "said.txt").open("w") as output:
        actions = [(os.POSIX_SPAWN_DUP2, output.fileno(), 1), (os.POSIX_SPAWN_DUP2, output.fileno(), 2)]
        program = [sys.executable, "-m", module, *words]
        # Empty: the modules are compiled once, as those of an installed program are.
        everything = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", **(environ or {})}
        pid = os.posix_spawn(sys.executable, program, everything, file_actions=actions)
    return _wait_for_process(pid, begun)


def _wait_for_process(pid: int, begun: float) -> ProcessCost:
    _, status, used = os.wait4(pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"a measured process ended with {code}")
    per_mib = 1024 if sys.platform != "darwin" else 1024 * 1024
    return ProcessCost(time.perf_counter() - begun, used.ru_utime + used.ru_stime, used.ru_maxrss / per_mib)


def measure(
    folder: Path, rows: int, requests: int, others: int, only: Sequence[str]
) -> Iterator[tuple[str, ProcessCost]]:
    """Make the input and the ledger, and measure each command on them."""
    job = folder / "million.yaml"
    job.write_text(JOB, encoding="utf-8")
    run_in_process(write_leads, folder, rows, requests)
    with serve_in_thread(folder / "api.db", SandboxSettings(latency="fixed(0)", failure_rate=0.0)) as api:
        environ = {"DATABAR_BASE_URL": api.base_url, "DATABAR_API_KEY": api.api_key}
        if not (folder / "million.db").exists():
            few = ("--input", str(folder / "few.csv"), "--output", str(folder / "few_enriched.csv"))
            run_enrich(folder, environ, "run", str(job), "--quiet", "--yes", *few)
            run_in_process(write_ledger, job, others)
        copied = (str(folder / "leads.csv"), str(folder / "copy.csv"))
        yield "control: Python csv", run_module(folder, "benchmarks.controls", "copy_with_csv", *copied)
        yield "control: polars", run_module(folder, "benchmarks.controls", "copy_with_polars", *copied)
        for kind in ("csv", "parquet"):
            files = ("--input", str(folder / f"leads.{kind}"), "--output", str(folder / f"leads_enriched.{kind}"))
            for word in (word for word in READS_INPUT if word in only):
                yield f"{word}, {kind}", run_enrich(folder, environ, word, str(job), "--json", *files)
        if not READS_LEDGER.isdisjoint(only):
            yield (
                "control: sqlite3",
                run_module(folder, "benchmarks.controls", "read_answers", str(folder / "million.db")),
            )
        if "report" in only:
            yield "report", run_enrich(folder, environ, "report", str(job), "-o", str(folder / "report.html"))
        if "check" in only:
            yield "ledger check", run_enrich(folder, environ, "ledger", "check", str(folder / "million.db"))
        if others:
            files = ("--input", str(folder / "few.csv"), "--output", str(folder / "few_enriched.csv"))
            yield "status", run_enrich(folder, environ, "status", str(job))
            for word in ("plan", "run"):
                yield f"{word}, 100 rows", run_enrich(folder, environ, word, str(job), "--json", *files)


def print_table(folder: Path, rows: int, requests: int, others: int, only: Sequence[str]) -> None:
    """Measure an input of this size and print the table, line by line."""
    print(f"{rows:,} rows, {requests:,} distinct requests, all answered; {others:,} other requests")
    print(f"{'':24}{'seconds':>9}{'rows/s':>12}{'CPU s':>9}{'peak MiB':>10}{'of control':>12}")
    control = 0.0
    for name, cost in measure(folder, rows, requests, others, only):
        if name in ("control: Python csv", "control: sqlite3"):
            control = cost.cpu_s
        per_s, ratio = f"{rows / cost.wall_s:>12,.0f}", f"{cost.cpu_s / control:>12.1f}"
        print(f"{name:24}{cost.wall_s:>9.2f}{per_s}{cost.cpu_s:>9.2f}{cost.peak_mib:>10.0f}{ratio}", flush=True)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.million", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--growth", help="several numbers of rows instead, such as 10000,100000,1000000")
    parser.add_argument("--requests", type=int, help="distinct requests; default: one for each row")
    parser.add_argument("--others", type=int, default=0, help="requests in the ledger that the input does not need")
    parser.add_argument("--only", default="plan,run,collect,report,check", help="some of these commands")
    parser.add_argument("--folder", type=Path, help="keep the files here, and take a ledger that is there already")
    options = parser.parse_args()
    for rows in map(int, options.growth.split(",")) if options.growth else (options.rows,):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) if options.folder is None else options.folder / f"{rows}"
            folder.mkdir(parents=True, exist_ok=True)
            print_table(folder, rows, options.requests or rows, options.others, options.only.split(","))


if __name__ == "__main__":
    main()
