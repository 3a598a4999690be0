"""Batches of rows with their requests, and the columns that enrich adds. Known batches are not mapped again.

The ledger keeps the ids of a batch's requests, and why the other rows have none, under a digest of all that they depend
on: the cells, which rows are selected and suppressed, and how the job maps cells to requests. What the ledger has about
a request is always looked up.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from hashlib import blake2b
from importlib.metadata import version
from importlib.resources import files
from itertools import compress
from typing import NamedTuple, TypeVar, cast

import msgspec
import polars as pl
from msgspec import Struct, field
from msgspec.structs import replace

from enrich.files.values import has_no_text
from enrich.job.job import Job
from enrich.job.spec import STEP_FIELDS, step_column, step_columns
from enrich.json_text import to_json_text
from enrich.ledger.database import Database
from enrich.ledger.decisions import find_known_batch, store_known_batch
from enrich.ledger.erasure import ForgottenRequests
from enrich.models import Decision, RequestBatch, RowStatus
from enrich.rows.template import RequestTemplate

T = TypeVar("T")


#: The columns that enrich adds after the job's own. Those of an earlier output are replaced.
STATUS_COLUMNS: dict[str, pl.DataType] = {
    "enrich_status": pl.String(),
    "enrich_error": pl.String(),
    "enrich_provider": pl.String(),
    "enrich_credits": pl.Float64(),
    "enrich_task_id": pl.String(),
    "enrich_at": pl.String(),
}


#: The types of a step's columns in the output, in the order of `STEP_FIELDS`.
_STEP_TYPES = [pl.String(), pl.String(), pl.Float64(), pl.String(), pl.String()]


#: The columns of a row of a job with steps, after those of its steps.
_ROW_COLUMNS = ("enrich_status", "enrich_error", "enrich_credits")


def status_columns(job: Job) -> dict[str, pl.DataType]:
    """Return the columns that enrich adds after the job's own, with their types."""
    if not job.step_jobs:
        return STATUS_COLUMNS
    columns = {
        step_column(step.step, field): kind
        for step in job.step_jobs
        for field, kind in zip(STEP_FIELDS, _STEP_TYPES, strict=True)
    }
    return columns | {name: STATUS_COLUMNS[name] for name in _ROW_COLUMNS}


def own_columns(job: Job, former_steps: Iterable[str]) -> set[str]:
    """Return the columns of an earlier output that are replaced: those of every job, of its steps, of former steps."""
    return {*ENRICH_COLUMNS, *status_columns(job), *(column for step in former_steps for column in step_columns(step))}


#: A row's position in the input, from 0. Only in a dataset, whose parts may be read in any order.
INDEX_COLUMN = "enrich_index"


ENRICH_COLUMNS = (*STATUS_COLUMNS, INDEX_COLUMN)


#: The columns of the change feed after its key.
CHANGE_COLUMNS = ("field", "old", "new", "provider", "at")


def kept_columns(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the columns that are written to the output."""
    # By place: polars would take a name such as `^a.*$` for a pattern.
    return frame.select(pl.nth([place for place, name in enumerate(frame.columns) if name not in ENRICH_COLUMNS]))


class InputRows(NamedTuple):
    """Some rows of the input as they are read. The other parts run parallel to `frame`.

    `first_position` is the position of the first, from 0. `text` has every cell as text. `suppressed` None: there is no
    suppression list. `queue_order` is the send order; None: that of the input.
    """

    first_position: int
    frame: pl.DataFrame
    text: pl.DataFrame
    selected: pl.Series
    suppressed: pl.Series | None
    queue_order: list[int] | None


class RowBatch(Struct, frozen=True):
    """Some rows in the input's order. `first_position` is the position of the first, from 0.

    `frame` has the input's columns in their types, as they are written to the output. The lists run parallel to it: a
    row has either a fingerprint and params (JSON, as sent), or a status (`invalid`, `filtered`) and perhaps the reason
    in `errors`. `groups` has the values that `caps` counts; None: the job has none. `queue_order` is the send order;
    None: that of the input. `left_out` counts the selected rows whose cell is filled but gives no param, by param and
    reason. `missing` counts the invalid rows by the param they lack. `values` has the text of each param as it is sent,
    '' where it has no value.

    `digest` is that of `KnownBatches`. A known batch has the `ids` of the requests instead of their fingerprints,
    params and values, which `complete` computes.
    """

    first_position: int
    frame: pl.DataFrame
    fingerprints: list[bytes | None]
    params: list[str | None]
    statuses: list[RowStatus | None]
    errors: list[str | None]
    groups: list[str | None] | None
    queue_order: list[int] | None = None
    left_out: LeftOutCounts = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    values: Mapping[str, pl.Series] = {}
    digest: bytes | None = None
    ids: list[int | None] | None = None
    complete: Callable[[], RowBatch] | None = None

    @property
    def request_keys(self) -> Sequence[bytes | int | None]:
        """The id of each row's request, or its fingerprint where the id is unknown."""
        return self.fingerprints if self.ids is None else self.ids

    def parts(self, max_rows: int) -> Iterator[RowBatch]:
        """Divide the rows into batches of at most this many."""
        if self.frame.height <= max_rows:
            yield self
            return
        for start in range(0, self.frame.height, max_rows):
            yield self.part(slice(start, start + max_rows))

    def part(self, rows: slice) -> RowBatch:
        """Return some of the rows. Those from the first have all counts."""
        complete, is_first = self.complete, rows.start == 0
        return RowBatch(
            self.first_position + rows.start,
            self.frame[rows],
            self.fingerprints[rows],
            self.params[rows],
            self.statuses[rows],
            self.errors[rows],
            self.groups and self.groups[rows],
            self.queue_order and self.queue_order[rows],
            self.left_out if is_first else Counter(),
            self.missing if is_first else Counter(),
            {name: value[rows] for name, value in self.values.items()},
            ids=self.ids and self.ids[rows],
            complete=None if complete is None else lambda: complete().part(rows),
        )

    def requests(self) -> RequestBatch:
        """Return the requests of those rows that have one."""
        names = self.request_keys
        has_request = [name is not None for name in names] if None in names else None

        def of_requests(column: Sequence[T]) -> Sequence[T]:
            return column if has_request is None else list(compress(column, has_request))

        complete = self.complete
        return RequestBatch(
            of_requests(range(self.first_position, self.first_position + len(names))),
            of_requests(cast("list[bytes]", self.fingerprints)),
            of_requests(cast("list[str]", self.params)),
            None if self.queue_order is None else of_requests(self.queue_order),
            None if self.groups is None else of_requests(self.groups),
            None if self.ids is None else of_requests(cast("list[int]", self.ids)),
            None if complete is None else lambda: complete().requests(),
        )


class RowCounts(Struct, frozen=True):
    """What was read: rows, how many of them have a request, and why the others have none.

    `left_out` and `missing` are those of `RowBatch`. `skipped` counts the invalid rows by reason, without the columns.
    """

    rows: int = 0
    requests: int = 0
    row_decisions: Counter[Decision] = field(default_factory=Counter)
    left_out: LeftOutCounts = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)

    @classmethod
    def from_batch(cls, batch: RowBatch) -> RowCounts:
        """Count the rows of one batch."""
        requests = sum(name is not None for name in batch.request_keys)
        statuses = Counter(batch.statuses)
        # A row may wait for an earlier step: nothing was decided about it.
        decided = ((status, number) for status, number in statuses.items() if status is not RowStatus.PENDING)
        row_decisions = Counter({Decision(status.value): number for status, number in decided if status is not None})
        skipped: Counter[str] = Counter()
        if statuses[RowStatus.INVALID]:
            rows = zip(batch.statuses, batch.errors, strict=True)
            skipped.update((why or "").partition(" (")[0] for status, why in rows if status is RowStatus.INVALID)
        return cls(batch.frame.height, requests, row_decisions, batch.left_out, batch.missing, skipped)

    def __add__(self, other: RowCounts) -> RowCounts:
        """Add the counts of several batches or blocks."""
        return RowCounts(*(getattr(self, name) + getattr(other, name) for name in self.__struct_fields__))


#: Rows by param and the reason why it is left out (`LeftOut`).
LeftOutCounts = Counter[tuple[str, str]]


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

    def recall(self, build_batch: Callable[[InputRows], RowBatch], rows: InputRows) -> RowBatch:
        """Return the batch that `build_batch` makes, with ids instead of requests if it is known."""
        digest = self._digest(rows)
        content = find_known_batch(self.ledger, self.job, rows.first_position, digest)
        if content is None:
            return replace(build_batch(rows), digest=digest)
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
            kept_columns(rows.frame),
            [],
            [],
            statuses,
            errors,
            None,
            rows.queue_order,
            Counter({(param, reason): count for param, reason, count in known["left_out"]}),
            Counter(known["missing"]),
            ids=ids,
            complete=lambda: build_batch(rows),
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
