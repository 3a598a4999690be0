"""The leads and the job that the benchmarks share: invented people, all different."""

from __future__ import annotations

import csv
from pathlib import Path

#: The job and the loops name the same providers, so that they send the same requests.
ENRICHMENTS = [833, 966]

JOB = """\
version: 1
input: leads.csv
output: out.csv
waterfall: email_getter
enrichments: [833, 966]
params:
  first_name: First Name
  last_name: Last Name
  company: Company
columns:
  work_email: email
limits:
  requests_per_second: 100000 # no limit of ours
"""


def lead_params(number: int) -> dict[str, str]:
    """Return the params of one lead."""
    return {"first_name": f"First{number}", "last_name": f"Last{number}", "company": f"company{number}.example"}


def write_job(folder: Path, rows: int, bulk: int | None = None) -> Path:
    """Write a job and its leads into a folder; `bulk`: requests per task."""
    with (folder / "leads.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["Lead", "First Name", "Last Name", "Company", "Note"])
        writer.writerows([number, *lead_params(number).values(), f"note {number}"] for number in range(rows))
    job = folder / "job.yaml"
    job.write_text(JOB + (f"dispatch: {{bulk: {bulk}}}\n" if bulk else ""), encoding="utf-8")
    return job
