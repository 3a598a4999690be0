"""Turns the rows of a batch into requests: params as sent, fingerprints, or why a row has no request."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count, repeat

import polars as pl

from enrich.files.values import quote_json
from enrich.job.job import Job
from enrich.job.spec import Param
from enrich.ledger.forgotten import ForgottenRequests
from enrich.models import RowRequest, RowStatus
from enrich.rows.template import RequestTemplate

#: No top-level domain is a number: a text that ends in one is a date, an amount or an IP address.
_HOST_PATTERN = r"^(?:[\p{L}\p{M}\p{N}_-]+\.)+[\p{L}\p{M}\p{N}-]*\p{L}[\p{L}\p{M}\p{N}-]*$"


def extract_domain(text: pl.Expr) -> pl.Expr:
    """Extract the domain of a URL, an email address or a bare host, without `www.`; '' when there is none."""
    host = (
        text.str.strip_chars()
        .str.to_lowercase()
        .str.replace(r"^([a-z][a-z0-9+.-]*://|//|mailto:)", "")
        .str.replace(r"(?s)[/?#].*$", "")
        .str.replace(r"^.*@", "")
        .str.replace(r":\d*$", "")
        .str.replace(r"\.$", "")
        .str.replace(r"^www\.(.*\.)", "${1}")
    )
    return host.map_batches(_blank_non_hosts, return_dtype=pl.String)


def _blank_non_hosts(texts: pl.Series) -> pl.Series:
    """Blank the texts that are not a host."""
    return texts.set(~texts.str.contains(_HOST_PATTERN), "")


#: The columns that enrich adds after the job's own. Those of an earlier output are replaced.
STATUS_COLUMNS: dict[str, pl.DataType] = {
    "enrich_status": pl.String(),
    "enrich_error": pl.String(),
    "enrich_provider": pl.String(),
    "enrich_credits": pl.Float64(),
    "enrich_task_id": pl.String(),
    "enrich_at": pl.String(),
}

#: A row's position in the input, from 0. Only in a dataset, whose parts may be read in any order.
INDEX_COLUMN = "enrich_index"
ENRICH_COLUMNS = (*STATUS_COLUMNS, INDEX_COLUMN)

#: The columns of the change feed after its key.
CHANGE_COLUMNS = ("field", "old", "new", "provider", "at")

#: Characters that JSON escapes.
_NEEDS_ESCAPING = r'["\\\x00-\x1f]'
#: One `@` with something before it and a dot after it.
_EMAIL = r"^[^@]+@[^@]*\.[^@]*$"
#: Whitespace as Python's `str.isspace` defines it.
_WHITESPACE = r"[\s\x1c-\x1f]"

#: Why a row is filtered, where the job's expressions are not the reason.
SUPPRESSED_REASON = "suppressed: listed as never to be sent"
FORGOTTEN_REASON = "forgotten at the person's wish"


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Some rows in the input's order. `first_position` is the position of the first, from 0.

    `frame` has the input's columns in their types, as they are written to the output. The lists run parallel to it: a
    row has either a fingerprint and params (JSON, as sent), or a status (`invalid`, `filtered`) and perhaps the reason
    in `errors`. `groups` has the values that `caps` counts. `queue_order` is the send order; None: that of the input.
    """

    first_position: int
    frame: pl.DataFrame
    fingerprints: list[bytes | None]
    params: list[str | None]
    statuses: list[RowStatus | None]
    errors: list[str | None]
    groups: list[str | None]
    queue_order: list[int] | None = None

    def requests(self) -> Iterator[RowRequest]:
        """Yield the requests of those rows that have one."""
        queue_order = self.queue_order or repeat(None)
        rows = zip(count(self.first_position), self.fingerprints, self.params, queue_order, self.groups, strict=False)
        return (RowRequest._make(row) for row in rows if row[1] is not None)


class RequestBuilder:
    """Maps rows to requests. Counts equal requests for `dedupe: false`, which sends each of them."""

    def __init__(self, job: Job, template: RequestTemplate, header: list[str], forgotten: ForgottenRequests) -> None:
        params = job.model.params
        self._forgotten = forgotten
        self._occurrences: Counter[bytes] | None = None if job.model.dedupe else Counter()
        call = json.dumps([1, "run", template.call.waterfall, template.call.body()], sort_keys=True)
        self._hash_prefix = blake2b(call.encode() + b"\0", digest_size=16, person=b"enrich-request")
        self._names = sorted(params)
        self._params = [params[name] for name in self._names]
        self._invalid_reason = _invalid_reason_of(self._names, params, template)
        self._header = header
        self._group_by = job.model.caps.by if job.model.caps else None
        self._kept_columns = [place for place, name in enumerate(header) if name not in ENRICH_COLUMNS]

    def build_batch(
        self,
        first_position: int,
        frame: pl.DataFrame,
        selected: pl.Series,
        suppressed: pl.Series | None,
        queue_order: list[int] | None,
    ) -> RowBatch:
        """Build the batch of a frame that begins at this position. `selected` and `suppressed` run parallel to it."""
        # Columns are numbered, so that the name of a param cannot collide with another column.
        values = pl.DataFrame(
            {str(i): param_values(param, frame, self._header) for i, param in enumerate(self._params)}
        )
        is_suppressed = pl.repeat(value=False, n=frame.height, eager=True) if suppressed is None else suppressed
        row_states = values.with_columns(
            params_as_json(self._names, values), selected.alias("wanted"), is_suppressed.alias("vetoed")
        ).select(
            pl.when(_IS_FILTERED).then(1).when(self._invalid_reason.is_not_null()).then(2).otherwise(0).alias("status"),
            pl.when(_IS_FILTERED).then(_FILTER_REASON).otherwise(self._invalid_reason).alias("error"),
            pl.when(~_IS_FILTERED & self._invalid_reason.is_null()).then("params").alias("params"),
        )
        params = row_states.get_column("params")
        texts: list[str | None] = params.to_list()
        errors: list[str | None] = row_states.get_column("error").to_list()
        statuses = [_STATUS_BY_CODE[status] for status in row_states.get_column("status")]
        fingerprints = self._make_fingerprints(params.cast(pl.Binary).to_list())
        for index, text in enumerate(texts) if self._forgotten.hashes else ():
            if text is not None and text in self._forgotten:
                statuses[index], errors[index] = RowStatus.FILTERED, FORGOTTEN_REASON
                texts[index] = fingerprints[index] = None
        kept_columns = frame.select(pl.nth(self._kept_columns))
        return RowBatch(
            first_position,
            kept_columns,
            fingerprints,
            texts,
            statuses,
            errors,
            self._group_values(values, frame),
            queue_order,
        )

    def _make_fingerprints(self, params: Sequence[bytes | None]) -> list[bytes | None]:
        """Hash what is sent. Hashes are stable over versions, machines and the order of params in the job file."""
        prefix, occurrences = self._hash_prefix, self._occurrences
        fingerprints: list[bytes | None] = []
        for text in params:
            if text is None:
                fingerprints.append(None)
                continue
            digest = prefix.copy()
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

    def _group_values(self, values: pl.DataFrame, frame: pl.DataFrame) -> list[str | None]:
        """Return the value that `caps` counts: a param as it is sent, or a column; None where it is blank."""
        if self._group_by is None:
            return [None] * frame.height
        if self._group_by in self._names:
            value, group = pl.nth(0), values.to_series(self._names.index(self._group_by))
        else:
            value, group = normalize(pl.nth(0)), frame.to_series(self._header.index(self._group_by))
        return (
            group.alias("").to_frame().select(pl.when(value != "").then(value.str.to_lowercase())).to_series().to_list()
        )


#: Row statuses by their number in `row_states`.
_STATUS_BY_CODE = (None, RowStatus.FILTERED, RowStatus.INVALID)
_IS_FILTERED = ~pl.col("wanted") | pl.col("vetoed")
_FILTER_REASON = pl.when("wanted").then(pl.lit(SUPPRESSED_REASON))


def _invalid_reason_of(names: list[str], params: Mapping[str, Param], template: RequestTemplate) -> pl.Expr:
    """Return why a row cannot be sent, with the params as columns `0`, `1` …; null where it can."""

    def value_and_source(name: str) -> tuple[pl.Expr, str]:
        return pl.col(str(names.index(name))), f"({', '.join(params[name].columns) or 'a constant'})"

    blank = pl.all_horizontal(pl.col(str(number)) == "" for number in range(len(names)))
    reason: pl.Expr = pl.when(blank).then(pl.lit("no param has a value"))
    for name in (name for name in reversed(template.email_params) if name in names):
        value, source_note = value_and_source(name)
        is_valid = (value == "") | (value.str.contains(_EMAIL) & ~value.str.contains(_WHITESPACE))
        reason = pl.when(is_valid).then(reason).otherwise(pl.lit(f"{name} is no e-mail address {source_note}"))
    for name in reversed(template.required_params):
        value, source_note = value_and_source(name)
        reason = pl.when(value != "").then(reason).otherwise(pl.lit(f"{name} is empty {source_note}"))
    return reason


def params_as_json(names: Sequence[str], values: pl.DataFrame) -> pl.Series:
    """Write the params of each row as one JSON object, just as `json.dumps` does. An empty param is left out.

    The columns of `values` are named by the number of each param.
    """
    pairs = []
    texts = values
    for name, value in zip(names, values.iter_columns(), strict=True):
        key, text = pl.lit(f"{quote_json(name)}:"), pl.col(value.name)
        if value.str.contains(_NEEDS_ESCAPING).any():
            texts = texts.with_columns(pl.Series(f"quoted {value.name}", map(quote_json, value), pl.String))
            pairs.append(pl.when(text != "").then(key + pl.col(f"quoted {value.name}")))
        else:
            pairs.append(pl.when(text != "").then(key + '"' + text + '"'))
    return texts.select(
        ("{" + pl.concat_str(pairs, separator=",", ignore_nulls=True) + "}").alias("params")
    ).to_series()


def param_values(param: Param, frame: pl.DataFrame, header: list[str]) -> pl.Series:
    """Compute a param: NFC, without surrounding whitespace; '' where nothing is to be sent."""
    if param.value is not None:
        return pl.select(normalize(pl.repeat(param.value, frame.height, dtype=pl.String))).to_series()
    text = pl.repeat("", frame.height, dtype=pl.String, eager=True)
    for column in param.columns:
        # Most rows have their value in the first column, so the others are computed for the remaining rows only.
        unfilled = (text == "").arg_true()
        if len(unfilled):
            # Unnamed: polars would take a name such as `^a.*$` for a pattern.
            cells = frame.to_series(header.index(column)).alias("")
            value = pl.nth(0)
            for transform in param.transform:
                value = TRANSFORMS[transform](value)
            found = cells.gather(unfilled).to_frame().select(normalize(value)).to_series()
            text = found if len(found) == len(text) else text.scatter(unfilled, found)
    return text


def normalize(text: pl.Expr) -> pl.Expr:
    """Normalize to Unicode NFC and strip surrounding whitespace."""
    return text.str.normalize("NFC").str.strip_chars()


TRANSFORMS = {
    "trim": lambda text: text.str.strip_chars(),
    "lower": lambda text: text.str.to_lowercase(),
    "domain": extract_domain,
}
