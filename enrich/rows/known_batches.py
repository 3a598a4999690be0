"""Finds the requests of a batch whose rows are the same as when a run enrolled it. They are not computed again.

The ledger keeps the ids of the requests, and why the other rows have none, under a digest of all that they depend on:
the cells, which rows are selected and suppressed, and how the job maps cells to requests. What the ledger has about a
request is always looked up.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from hashlib import blake2b
from importlib.metadata import version
from importlib.resources import files

import msgspec
import polars as pl
from msgspec import Struct
from msgspec.structs import replace

from enrich.files.values import has_no_text
from enrich.job.job import Job
from enrich.json_text import to_json_text
from enrich.ledger.database import Database
from enrich.ledger.erasure import ForgottenRequests
from enrich.ledger.request_ids import find_known_batch, store_known_batch
from enrich.models import RowStatus
from enrich.rows.requests import InputRows, RequestBuilder, RowBatch
from enrich.rows.template import RequestTemplate

#: What computes the params: with another version of it the digests differ.
_MAPPING_PACKAGES = ("polars", "tldextract", "idna")
_MAPPING_FOLDERS = ("enrich.rows", "enrich.job", "enrich.files")


@cache
def _mapping_versions() -> list[str]:
    """Return the versions of what computes the params; those of our own modules are their digests."""
    paths = sorted((path for folder in _MAPPING_FOLDERS for path in files(folder).iterdir()), key=str)
    own = [blake2b(path.read_bytes()).hexdigest() for path in paths if path.name.endswith((".py", ".toml"))]
    return [sys.version, *map(version, _MAPPING_PACKAGES), *own]


class KnownBatches(Struct, frozen=True):
    """The batches of a job's input that the ledger has."""

    ledger: Database
    job: str
    columns: Sequence[str]
    mapping: blake2b

    @classmethod
    def of(
        cls, ledger: Database, job: Job, template: RequestTemplate, forgotten: ForgottenRequests
    ) -> KnownBatches | None:
        """Prepare to find the batches of a job. None: its requests depend on more than their rows, or are grouped."""
        model, target = job.model, template.target
        if not model.dedupe or model.caps is not None or job.step_jobs:
            return None
        mapping = [
            _mapping_versions(),
            [target.kind, target.id, target.body()],
            {name: param.model_dump(mode="json") for name, param in model.params.items()},
            [template.required_params, template.email_params, template.priced_by, template.choices],
            sorted(model.placeholders),
            sorted(hashed.hex() for hashed in forgotten.hashes),
        ]
        columns = sorted({column for param in model.params.values() for column in param.columns})
        digest = blake2b(json.dumps(mapping, sort_keys=True).encode(), digest_size=16, person=b"enrich-batch")
        return cls(ledger, job.name, columns, digest)

    def recall(self, builder: RequestBuilder, rows: InputRows) -> RowBatch:
        """Return a batch as `build_batch` does, with ids instead of requests if it is known."""
        digest = self._digest(rows)
        content = find_known_batch(self.ledger, self.job, rows.first_position, digest)
        if content is None:
            return replace(builder.build_batch(rows), digest=digest)
        known = msgspec.json.decode(content)
        ids: list[int | None] = known["ids"]
        statuses: list[RowStatus | None] = [None] * len(ids)
        errors: list[str | None] = [None] * len(ids)
        if known["reasons"]:
            reasons = [(RowStatus(status), error) for status, error in known["reasons"]]
            places = (place for place, number in enumerate(ids) if number is None)
            for place, reason in zip(places, known["skipped"], strict=True):
                statuses[place], errors[place] = reasons[reason]
        return RowBatch(
            rows.first_position,
            builder.kept_columns(rows.frame),
            [],
            [],
            statuses,
            errors,
            None,
            rows.queue_order,
            Counter({(param, reason): count for param, reason, count in known["left_out"]}),
            Counter(known["missing"]),
            ids=ids,
            complete=lambda: builder.build_batch(rows),
        )

    def _digest(self, rows: InputRows) -> bytes:
        """Hash all that the requests of the rows depend on."""
        digest = self.mapping.copy()
        # No file with a NUL in a cell is read.
        for cells in rows.text[:, self.columns].select_seq(pl.all().str.join("\0")):
            digest.update(f"{cells.item()}\0".encode())
        no_text = (has_no_text(rows.frame.get_column(name)) for name in self.columns)
        for marks in (rows.selected, rows.suppressed, *no_text):
            digest.update(b"\2" if marks is None else bytes(marks.to_list()))
        return digest.digest()


def store_batch(ledger: Database, job: Job, batch: RowBatch, ids: Sequence[int | None]) -> None:
    """Store a batch with the ids of its requests, to be found by the next pass. Nothing is stored for a known one."""
    if batch.digest is None:
        return
    numbers, first = iter(ids), batch.first_position
    skipped = [reason for reason in zip(batch.statuses, batch.errors, strict=True) if reason[0] is not None]
    reasons = {reason: place for place, reason in enumerate(dict.fromkeys(skipped))}
    content = {
        "ids": [next(numbers) if status is None else None for status in batch.statuses],
        "reasons": list(reasons),
        "skipped": [reasons[reason] for reason in skipped],
        "left_out": [[*names, count] for names, count in batch.left_out.items()],
        "missing": batch.missing,
    }
    store_known_batch(ledger, job.name, range(first, first + batch.frame.height), batch.digest, to_json_text(content))
