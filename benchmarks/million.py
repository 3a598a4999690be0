"""What a million rows take that are all answered: to plan, for a night with nothing to do, and to collect.

The input and the ledger are made here; each command runs as a process of its own, over CSV and over Parquet, and
is measured beside a control: the same file read and written by Python's `csv`, and by polars without any thought.
`--others` fills the ledger with other people's requests, to see what a file of some lines costs then.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from enrich.sandbox import SandboxSettings
from enrich.sandbox.server import embedded

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
#: What the sandbox answers, without the task's number: found, and missed.
FOUND = (
    '","status":"completed","data":[{"result":{"email":"ada.lovelace@company.example"},"result_field":["email"],'
    '"enrichment_data":{"Mailhound":{"email":"ada.lovelace@company.example","score":87}},"steps":[{"action":"search",'
    '"provider":"Mailhound","result":"found","details":null,"cost":"2","is_verified":false,'
    '"provider_logo":"https://logos.example/833.png"}]}],"credits_spent":2.0,"error":null}'
)
MISSED = (
    '","status":"completed","data":[{"result":{"email":null},"result_field":["email"],"enrichment_data":{"Mailhound":'
    '{},"Postbote":{}},"steps":[{"action":"search","provider":"Mailhound","result":"not_found","details":null,'
    '"cost":"0","is_verified":false,"provider_logo":"https://logos.example/833.png"},{"action":"search","provider":'
    '"Postbote","result":"not_found","details":null,"cost":"0","is_verified":false,'
    '"provider_logo":"https://logos.example/966.png"}]}],"credits_spent":0.0,"error":null}'
)
#: Ends each request that waits as the sandbox would have answered it, 7 of 10 found.
ANSWERED = """
INSERT INTO attempts (id, request_id, execution_id, came_from, state, task_id, claimed_ms, submitted_ms, settled_ms,
                      settled_in, seen_alive, reserved, credits, provider, answer)
SELECT id, id, :execution, 'pending', iif(id % 10 < 7, 'found', 'not_found'), 'task-' || id, :now, :now, :now + id,
       :execution, 1, 5000000, iif(id % 10 < 7, 2000000, 0), iif(id % 10 < 7, 'Mailhound', NULL),
       '{"task_id":"task-' || id || iif(id % 10 < 7, :found, :missed)
FROM requests WHERE state = 'pending';
UPDATE requests SET state = iif(id % 10 < 7, 'found', 'not_found'), attempts = 1, attempt_id = id,
       answer_id = iif(id % 10 < 7, id, NULL) WHERE state = 'pending';
UPDATE executions SET submitted = (SELECT count(*) FROM attempts), spent = (SELECT sum(credits) FROM attempts)
WHERE id = :execution
"""
OTHERS = """
WITH RECURSIVE others (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM others WHERE n < :others)
INSERT INTO requests (fingerprint, call_id, params, state)
SELECT randomblob(16), (SELECT min(id) FROM calls),
       '{"company":"other' || n || '.example","first_name":"First' || n || '","last_name":"Last' || n || '"}', 'pending'
FROM others
"""


@dataclass(frozen=True, slots=True)
class Taken:
    """What a process took: seconds, processor seconds, and its peak of memory in MiB."""

    seconds: float
    cpu: float
    peak: float


def leads(rows: int, questions: int) -> Iterator[list[str]]:
    """Make leads that ask so many distinct questions."""
    for row in range(rows):
        number = row % questions
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


def write_leads(folder: Path, rows: int, questions: int) -> None:
    """Write the input, as CSV and as Parquet, and its first 100 rows."""
    import polars as pl  # noqa: PLC0415 - in a process of its own, whose memory is nobody's peak

    for name, some in (("leads.csv", rows), ("few.csv", min(rows, 100))):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([HEADER])
            csv.writer(file, lineterminator="\n").writerows(islice(leads(rows, questions), some))
    text = pl.scan_csv(folder / "leads.csv", infer_schema=False).with_columns(pl.all().fill_null(""))
    text.sink_parquet(folder / "leads.parquet")


def write_ledger(job_file: Path, others: int) -> None:
    """Answer all that the input asks, and as much else."""
    from enrich.connect import remembered  # noqa: PLC0415 - likewise
    from enrich.job import load_job  # noqa: PLC0415
    from enrich.rows import Rows  # noqa: PLC0415
    from enrich.store.ledger import Ledger  # noqa: PLC0415

    job = load_job(job_file)
    with closing(Ledger(job.ledger)) as ledger, ledger.transaction():
        question = remembered(ledger, job)
        db: Any = ledger._db
        db.execute(OTHERS, {"others": others}) if others else None
        for batch in Rows(job).batches(question):
            ledger.enroll(question.call, batch.asked())
        now = int(time.time() * 1000)
        known = {"execution": ledger.executions(last=1)[0]["id"], "now": now, "found": FOUND, "missed": MISSED}
        for statement in ANSWERED.split(";\n"):
            db.execute(statement, known)


def by_csv(source: Path, target: Path) -> None:
    """Read and write the file as Python does it, cell by cell."""
    with source.open(newline="", encoding="utf-8") as file, target.open("w", newline="", encoding="utf-8") as into:
        csv.writer(into).writerows(csv.reader(file))


def by_polars(source: Path, target: Path) -> None:
    """Read and write the file as polars does it, in streams."""
    import polars as pl  # noqa: PLC0415 - likewise

    pl.scan_csv(source, infer_schema=False).sink_csv(target)


def apart(work: Callable[..., None], *arguments: object) -> Taken:
    """Do something in a fresh process."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    begun = time.perf_counter()
    process.start()
    assert process.pid is not None
    return _wait(process.pid, begun)


def command(folder: Path, environ: dict[str, str], *words: str) -> Taken:
    """Run the program."""
    begun = time.perf_counter()
    with (folder / "said.txt").open("w") as said:
        actions = [(os.POSIX_SPAWN_DUP2, said.fileno(), 1), (os.POSIX_SPAWN_DUP2, said.fileno(), 2)]
        program = [sys.executable, "-m", "enrich", *words]
        pid = os.posix_spawn(sys.executable, program, os.environ | environ, file_actions=actions)
    return _wait(pid, begun)


def _wait(pid: int, begun: float) -> Taken:
    _, status, used = os.wait4(pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"a measured process ended with {code}")
    per_mib = 1024 if sys.platform != "darwin" else 1024 * 1024
    return Taken(time.perf_counter() - begun, used.ru_utime + used.ru_stime, used.ru_maxrss / per_mib)


def measure(folder: Path, rows: int, questions: int, others: int, only: Sequence[str]) -> Iterator[tuple[str, Taken]]:
    """Make the input and the ledger, and time everything that is done with them."""
    job = folder / "million.yaml"
    job.write_text(JOB, encoding="utf-8")
    apart(write_leads, folder, rows, questions)
    with embedded(folder / "api.db", SandboxSettings(latency="fixed(0)", failure_rate=0.0)) as api:
        environ = {"DATABAR_BASE_URL": api.base_url, "DATABAR_API_KEY": api.api_key}
        if not (folder / "million.db").exists():
            few = ("--input", str(folder / "few.csv"), "--output", str(folder / "few_enriched.csv"))
            command(folder, environ, "run", str(job), "--quiet", "--yes", *few)
            apart(write_ledger, job, others)
        yield "control: Python csv", apart(by_csv, folder / "leads.csv", folder / "copy.csv")
        yield "control: polars", apart(by_polars, folder / "leads.csv", folder / "copy.csv")
        for kind in ("csv", "parquet"):
            files = ("--input", str(folder / f"leads.{kind}"), "--output", str(folder / f"leads_enriched.{kind}"))
            for word in only:
                yield f"{word}, {kind}", command(folder, environ, word, str(job), "--json", *files)
        if others:
            files = ("--input", str(folder / "few.csv"), "--output", str(folder / "few_enriched.csv"))
            yield "status", command(folder, environ, "status", str(job))
            for word in ("plan", "run"):
                yield f"{word}, 100 rows", command(folder, environ, word, str(job), "--json", *files)


def main() -> None:
    """Print a table."""
    asked = argparse.ArgumentParser(prog="benchmarks.million", description=__doc__)
    asked.add_argument("--rows", type=int, default=1_000_000)
    asked.add_argument("--questions", type=int, help="distinct ones (default: every row asks its own)")
    asked.add_argument("--others", type=int, default=0, help="requests in the ledger that the input does not ask")
    asked.add_argument("--only", default="plan,run,collect", help="some of these commands")
    asked.add_argument("--folder", type=Path, help="keep the files here, and take a ledger that is there already")
    told = asked.parse_args()
    rows, questions = told.rows, told.questions or told.rows
    print(f"{rows:,} rows, {questions:,} questions, all answered; {told.others:,} other requests")
    print(f"{'':24}{'seconds':>9}{'rows/s':>12}{'CPU s':>9}{'peak MiB':>10}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = told.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name, taken in measure(folder, rows, questions, told.others, told.only.split(",")):
            per_s = f"{rows / taken.seconds:>12,.0f}"
            print(f"{name:24}{taken.seconds:>9.2f}{per_s}{taken.cpu:>9.2f}{taken.peak:>10.0f}", flush=True)


if __name__ == "__main__":
    main()
