"""A complete cluster on one machine: a PostgreSQL server, Ray with three workers, the sandbox, and a dataset of leads.

Run it from a checkout: `make demo-cluster`. It takes about a minute and writes its files to `out/cluster`. The server
and Ray stop at the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.partitions import make_dataset
from tests.support.postgres import NOT_INSTALLED, PostgresServer, dedicated_server, find_binaries

ENRICH = Path(sys.executable).with_name("enrich")
JOB = """\
version: 1
name: cluster
input: leads/          # a folder of Parquet files, partitioned by country
output: enriched/      # another; its column enrich_index keeps the order
ledger: {ledger}
waterfall: email_getter
params:
  first_name: First Name
  last_name: Last Name
  company: {{column: Website, transform: [domain]}}
columns:
  work_email: email
limits: {{requests_per_second: 200}}
"""


def run_enrich(server: PostgresServer, *words: str) -> int:
    """Print a command and run it as a user does; return its exit code."""
    print(f"\n$ enrich {' '.join(words)}", flush=True)
    return subprocess.run([ENRICH, *words], env=os.environ | server.environ, check=False).returncode


def main() -> None:
    """Make the dataset, run the job twice, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--requests", type=int, default=1_000)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("out/cluster"))
    options = parser.parse_args()
    if find_binaries() is None:
        sys.exit(f"error: {NOT_INSTALLED}")
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    make_dataset(options.folder / "leads", options.rows, options.requests, files=8)
    job = options.folder / "job.yaml"
    with dedicated_server() as server:
        job.write_text(JOB.format(ledger=server.ledger_url("cluster")))
        run_command = ["run", str(job), "--sandbox", "--engine", "ray", "--workers", str(options.workers), "--summary"]
        print(f"{options.rows:,} leads in {options.folder / 'leads'}, with {options.requests:,} distinct requests")
        first = run_enrich(server, *run_command)
        if first not in (0, 10):
            sys.exit(first)
        print("\nOnce more: all results are in the ledger, so nothing is charged.")
        began = time.monotonic()
        run_enrich(server, *run_command)
        print(f"({time.monotonic() - began:.0f} s, with the start of Ray)")
        run_enrich(server, "ledger", "check", str(job), "--sandbox")
    dataset = pl.scan_parquet(options.folder / "enriched.sandbox" / "*.parquet").sort("enrich_index")
    with pl.Config(tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, tbl_width_chars=120):
        print(dataset.select("enrich_index", "First Name", "Last Name", "country", "work_email", "enrich_status")
              .head(8).collect())  # fmt: skip


if __name__ == "__main__":
    main()
