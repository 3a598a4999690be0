"""Turns the rows of a batch into requests: params as sent, fingerprints, or why a row has no request."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import compress
from typing import NamedTuple, TypeVar, cast

import polars as pl
from msgspec import Struct, field

from enrich.files.values import quote_json
from enrich.job.cell_text import clean_cells
from enrich.job.job import Job
from enrich.job.spec import STEP_FIELDS, step_column, step_columns
from enrich.job.target import Param
from enrich.ledger.erasure import ForgottenRequests
from enrich.models import Decision, RequestBatch, RowStatus
from enrich.rows.params import LeftOutCounts, ParamCells, conversion_of, param_values, split_left_out
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

#: Characters that JSON escapes.
_NEEDS_ESCAPING = r'["\\\x00-\x1f]'

#: Why a row is filtered, where the job's expressions are not the reason.
SUPPRESSED_REASON = "on a suppression list"
FORGOTTEN_REASON = "erased by `enrich forget`"


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


class RequestBuilder:
    """Maps rows to requests. Counts equal requests for `dedupe: false`, which sends each of them."""

    def __init__(self, job: Job, template: RequestTemplate, header: list[str], forgotten: ForgottenRequests) -> None:
        params = job.model.params
        self._forgotten = forgotten
        self._occurrences: Counter[bytes] | None = None if job.model.dedupe else Counter()
        target = template.target
        call = json.dumps([1, target.kind, target.id, target.body()], sort_keys=True)
        self._hash_prefix = blake2b(call.encode() + b"\0", digest_size=16, person=b"enrich-request")
        self._names = sorted(params)
        self._params = [params[name] for name in self._names]
        self._conversions = [conversion_of(template, name) for name in self._names]
        self._placeholders = job.model.placeholders
        self._invalid_reason = _invalid_reason_of(self._names, params, template)
        self._missing_names = [name for name in params if name in template.required_params], list(params)
        self._header = header
        self._group_by = job.model.caps.by if job.model.caps else None
        self._kept_columns = [place for place, name in enumerate(header) if name not in ENRICH_COLUMNS]

    def build_batch(self, read: InputRows, counted: pl.Series | None = None) -> RowBatch:
        """Map rows to requests. Rows that are not `counted` have a request, but do not count as `left_out`."""
        first_position, frame, text, selected, suppressed, queue_order = read
        cells = ParamCells(self._header, text, frame, self._placeholders)
        computed = [
            split_left_out(param_values(param, cells, conversion))
            for param, conversion in zip(self._params, self._conversions, strict=True)
        ]
        # Columns are numbered, so that the name of a param cannot collide with another column.
        values = pl.DataFrame({str(number): value for number, (value, _) in enumerate(computed)})
        reasons = [
            (pl.lit(None, pl.String) if reason is None else reason).alias(_reason_column(number))
            for number, (_, reason) in enumerate(computed)
        ]
        is_suppressed = pl.lit(value=False) if suppressed is None else suppressed
        rows = values.with_columns(
            params_as_json(self._names, values), selected.alias("selected"), is_suppressed.alias("suppressed"), *reasons
        ).with_columns(self._invalid_reason.alias("invalid"))
        row_states = rows.select(
            pl.when(_IS_FILTERED).then(1).when(pl.col("invalid").is_not_null()).then(2).otherwise(0).alias("status"),
            pl.when(_IS_FILTERED).then(_FILTER_REASON).otherwise("invalid").alias("error"),
            pl.when(~_IS_FILTERED & pl.col("invalid").is_null()).then("params").alias("params"),
        )
        params, is_invalid = row_states.get_column("params"), row_states.get_column("status") == _INVALID
        texts: list[str | None] = params.to_list()
        errors: list[str | None] = row_states.get_column("error").to_list()
        statuses = [_STATUS_BY_CODE[status] for status in row_states.get_column("status").to_list()]
        fingerprints = self._make_fingerprints(params.cast(pl.Binary).to_list())
        for index, sent in enumerate(texts) if self._forgotten.hashes else ():
            if sent is not None and sent in self._forgotten:
                statuses[index], errors[index] = RowStatus.FILTERED, FORGOTTEN_REASON
                texts[index] = fingerprints[index] = None
        return RowBatch(
            first_position,
            self.kept_columns(frame),
            fingerprints,
            texts,
            statuses,
            errors,
            self._group_values(values, text),
            queue_order,
            self._count_left_out(
                rows if counted is None else rows.filter(counted),
                [number for number, (_, reason) in enumerate(computed) if reason is not None],
            ),
            self._count_missing(values.filter(is_invalid)),
            {name: value for name, (value, _) in zip(self._names, computed, strict=True)},
        )

    def _count_left_out(self, rows: pl.DataFrame, numbers: list[int]) -> LeftOutCounts:
        """Count the rows that are not filtered, by param and reason, for the params with these numbers."""
        counts: LeftOutCounts = Counter()
        for number in numbers:
            reasons = rows.filter(~_IS_FILTERED).get_column(_reason_column(number)).drop_nulls()
            counts.update({(self._names[number], kind): count for kind, count in reasons.value_counts().iter_rows()})
        return counts

    def kept_columns(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Return the columns that are written to the output."""
        return frame.select(pl.nth(self._kept_columns))

    def _count_missing(self, invalid: pl.DataFrame) -> Counter[str]:
        """Count these invalid rows by each blank required param. Rows that lack none of them count for every param."""
        missing: Counter[str] = Counter()
        required, names = self._missing_names
        unexplained = pl.Series([True]).new_from_index(0, invalid.height)
        for name in required if invalid.height else ():
            blank = invalid.to_series(self._names.index(name)) == ""
            missing[name] += int(blank.sum())
            unexplained &= ~blank
        missing.update(dict.fromkeys(names if unexplained.any() else (), int(unexplained.sum())))
        return missing

    def _make_fingerprints(self, params: Sequence[bytes | None]) -> list[bytes | None]:
        """Hash what is sent. Hashes are stable over versions, machines and the order of params in the job file."""
        copy, occurrences = self._hash_prefix.copy, self._occurrences
        fingerprints: list[bytes | None] = []
        for text in params:
            if text is None:
                fingerprints.append(None)
                continue
            digest = copy()
            digest.update(text)
            fingerprint = digest.digest()
            if occurrences is not None:
                occurrence = occurrences[fingerprint]
                occurrences[fingerprint] += 1
                if occurrence:
                    digest.update(b"\0%d" % occurrence)
                    fingerprint = digest.digest()
            fingerprints.append(fingerprint)
        return fingerprints

    def _group_values(self, values: pl.DataFrame, text: pl.DataFrame) -> list[str | None] | None:
        """Return the value that `caps` counts: a param as it is sent, or a column; None where it is blank."""
        if self._group_by is None:
            return None
        if self._group_by in self._names:
            group = values.to_series(self._names.index(self._group_by)).alias("")
        else:
            group = clean_cells(text.to_series(self._header.index(self._group_by)))
        return group.str.to_lowercase().set(group == "", None).to_list()


#: Row statuses by their number in `row_states`.
_STATUS_BY_CODE = (None, RowStatus.FILTERED, RowStatus.INVALID)
_INVALID = _STATUS_BY_CODE.index(RowStatus.INVALID)
_IS_FILTERED = ~pl.col("selected") | pl.col("suppressed")
_FILTER_REASON = pl.when("selected").then(pl.lit(SUPPRESSED_REASON))


def _invalid_reason_of(names: list[str], params: Mapping[str, Param], template: RequestTemplate) -> pl.Expr:
    """Return why a row cannot be sent; null where it can. The params are columns named by their numbers."""

    def reason(name: str, otherwise: pl.Expr) -> pl.Expr:
        left_out = pl.col(_reason_column(names.index(name)))
        source_note = f" ({', '.join(params[name].columns) or 'a constant'})"
        text = pl.lit(f"{name}: ") + left_out + pl.lit(source_note)
        return pl.when(left_out.is_not_null()).then(text).otherwise(otherwise)

    blank = pl.all_horizontal(pl.col(str(number)) == "" for number in range(len(names)))
    no_param: pl.Expr = pl.lit("all params blank")
    for name in reversed(names):
        no_param = reason(name, no_param)
    result: pl.Expr = pl.when(blank).then(no_param)
    for name in reversed(template.required_params):
        empty = pl.lit(f"{name} blank ({', '.join(params[name].columns) or 'a constant'})")
        result = pl.when(pl.col(str(names.index(name))) != "").then(result).otherwise(reason(name, empty))
    return result


def _reason_column(number: int) -> str:
    """Return the column with the reasons why a param is left out."""
    return f"reason {number}"


def params_as_json(names: Sequence[str], values: pl.DataFrame) -> pl.Series:
    """Write the params of each row as `json.dumps` does, without empty ones. `values` has them by their numbers."""
    pairs = []
    texts = values
    needs_escaping = values.select_seq(pl.all().str.contains(_NEEDS_ESCAPING).any())
    for name, value, is_escaped in zip(names, values.iter_columns(), needs_escaping, strict=True):
        key, text = pl.lit(f"{quote_json(name)}:"), pl.col(value.name)
        if is_escaped.item():
            texts = texts.with_columns(pl.Series(f"quoted {value.name}", map(quote_json, value), pl.String))
            pairs.append(pl.when(text != "").then(key + pl.col(f"quoted {value.name}")))
        else:
            pairs.append(pl.when(text != "").then(key + '"' + text + '"'))
    return texts.select(
        ("{" + pl.concat_str(pairs, separator=",", ignore_nulls=True) + "}").alias("params")
    ).to_series()
