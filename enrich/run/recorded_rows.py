"""Finds the rows that are recorded in the ledger with the requests of a step (table `step_rows`).

Several rows can have one request. Its answer belongs only to the rows that are recorded with it. A row
is known by a hash of all its cells, and by one of those that the steps send: so it is known again when a cell that only
a condition reads has changed, and when a step was added.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import polars as pl

from enrich.job.job import Job
from enrich.ledger import step_results
from enrich.ledger.database import Database


class Identities(NamedTuple):
    """What tells the rows of a batch apart: all their cells, and those that the steps send."""

    all_cells: pl.Series
    sent_cells: pl.Series

    def hashes(self, job: Job, rows: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield the hashes of rows in a step, each with the index of its row in the list. `job` is that of the step."""
        for kind, cells in zip(self._fields, self, strict=True):
            prefix = blake2b(f"{job.name}\0{job.step}\0{kind}\0".encode(), digest_size=8, person=b"enrich-step-row")
            for index, text in enumerate(cells.gather(list(rows)).to_list()):
                hasher = prefix.copy()
                hasher.update(text.encode())
                yield index, int.from_bytes(hasher.digest(), "big", signed=True)


def sent_columns(job: Job, input_columns: Iterable[str]) -> list[str]:
    """Return the columns of the input that the steps send."""
    sent = {column for step in job.step_jobs for param in step.model.params.values() for column in param.columns}
    return [name for name in input_columns if name in sent]


def identities(text: pl.DataFrame, sent: Sequence[str]) -> Identities:
    """Return what tells the rows of a table apart. `sent` are the columns that the steps send."""
    return Identities(_joined(text, text.columns), _joined(text, sent))


def _joined(text: pl.DataFrame, columns: Sequence[str]) -> pl.Series:
    if not columns:
        return pl.repeat("", text.height, dtype=pl.String, eager=True)
    # Columns are numbered: polars would take a name such as `^a.*$` for a pattern.
    cells = pl.DataFrame([text.get_column(name).alias(str(number)) for number, name in enumerate(columns)])
    return cells.select(pl.concat_str(pl.all().fill_null(""), separator="\x1f")).to_series()


def find_recorded_rows(
    ledger: Database, job: Job, fingerprints: Sequence[bytes | None], rows: Sequence[int], names: Identities
) -> dict[int, step_results.RecordedRow]:
    """Return those of the rows that are recorded with their request. `names` tells all rows of the batch apart."""
    requests = [
        (rows[index], (fingerprint, row_hash))
        for index, row_hash in names.hashes(job, rows)
        if (fingerprint := fingerprints[rows[index]]) is not None
    ]
    found = step_results.find_recorded_rows(ledger, job.step, [pair for _, pair in requests]) if requests else {}
    recorded: dict[int, step_results.RecordedRow] = {}
    for index, known in found.items():
        row = requests[index][0]
        if row not in recorded or not known.is_requested_by_other:
            recorded[row] = known
    return recorded
