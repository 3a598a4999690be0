"""Turns the rows of a batch into requests: params as sent, fingerprints, or why a row has no request.

A param is the first of its sources with a value after its transforms.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b

import polars as pl
from msgspec import Struct

from enrich.files.values import has_no_text, quote_json
from enrich.job.cell_text import clean, clean_cells, convert_some, map_distinct
from enrich.job.job import Job
from enrich.job.target import Param, Transform
from enrich.ledger.erasure import ForgottenRequests
from enrich.models import LeftOut, RowStatus
from enrich.rows.addresses import LEFT_OUT, company_domains, email_addresses, hosts
from enrich.rows.batches import InputRows, LeftOutCounts, RowBatch, kept_columns
from enrich.rows.template import RequestTemplate, is_count

#: Longer cells are left out.
MAX_PARAM_CHARACTERS = 10_000

#: Each gets the cells that have a value, as clean text.
TRANSFORMS: Mapping[Transform, Callable[[pl.Series], pl.Series]] = {
    "trim": lambda text: text,  # done for every cell
    "lower": lambda text: clean_cells(text.str.to_lowercase()),
    "domain": company_domains,
    "host": hosts,
}


class ParamCells(Struct, frozen=True):
    """The cells of a batch that params are computed from: as `text` and `typed`. Those in `placeholders` are blank."""

    header: Sequence[str]
    text: pl.DataFrame
    typed: pl.DataFrame
    placeholders: frozenset[str]
    _columns: dict[str, pl.Series] = {}

    def column(self, name: str) -> pl.Series:
        """Return the clean text of a column. A cell that can be no param is LEFT_OUT and the reason."""
        if name not in self._columns:
            index = self.header.index(name)
            text = _sendable(clean_cells(self.text.to_series(index)), self.placeholders)
            no_text = has_no_text(self.typed.to_series(index))
            self._columns[name] = text if no_text is None else text.set(no_text, LEFT_OUT + LeftOut.NO_TEXT)
        return self._columns[name]


def _sendable(text: pl.Series, placeholders: frozenset[str] = frozenset()) -> pl.Series:
    """Replace the cells of clean text that are never sent by LEFT_OUT and the reason."""
    cell = pl.first()
    unsendable = text.to_frame().select_seq(
        cell.is_in(list(placeholders)).alias(LeftOut.PLACEHOLDER),
        cell.str.contains(LEFT_OUT, literal=True).alias(LeftOut.NUL),
        (cell.str.len_chars() > MAX_PARAM_CHARACTERS).alias(LeftOut.TOO_LONG),
    )
    for cells in unsendable:
        if cells.any():
            text = text.set(cells, LEFT_OUT + cells.name)
    return text


#: Converts the filled cells of a param after its transforms. What it cannot convert is LEFT_OUT and the reason.
Conversion = Callable[[pl.Series], pl.Series]


def conversion_of(template: RequestTemplate, param_name: str) -> Conversion | None:
    """Return how the values of a param are converted for the API: addresses, counts, choices; None: not at all."""
    if param_name in template.email_params:
        return email_addresses
    if param_name == template.priced_by:
        return lambda cells: map_distinct(cells, lambda text: text if is_count(text) else LEFT_OUT + LeftOut.NO_COUNT)
    if (choices := template.choices.get(param_name)) is not None:
        return lambda cells: map_distinct(
            cells, lambda text: choices.get(text.casefold(), LEFT_OUT + LeftOut.NO_CHOICE)
        )
    return None


def param_values(param: Param, cells: ParamCells, conversion: Conversion | None) -> pl.Series:
    """Compute a param as it is sent: '' where it has no value, LEFT_OUT and the reason where it is left out."""
    if param.value is not None:
        constant = _converted(_sendable(pl.Series("", [clean(param.value)])), [], conversion)
        return constant.new_from_index(0, cells.text.height)
    result = pl.Series("", [""]).new_from_index(0, cells.text.height)
    for column, transforms in param.sources:
        # Most rows have their value in the first source, so the others are computed for the remaining rows only.
        unfilled = ~_has_value(result)
        if not unfilled.any():
            break
        before = result.filter(unfilled)
        value = _converted(cells.column(column).filter(unfilled), transforms, conversion)
        # Of several reasons the first is kept.
        value = value.zip_with(_has_value(value) | (before == ""), before)
        result = value if len(value) == len(result) else result.scatter(unfilled.arg_true(), value)
    return result


def _has_value(text: pl.Series) -> pl.Series:
    """Return which cells have a value. A blank is '', and a cell that is left out begins with LEFT_OUT (NUL)."""
    return text >= "\1"


def _converted(cells: pl.Series, transforms: Sequence[Transform], conversion: Conversion | None) -> pl.Series:
    """Apply the transforms, then the conversion, to the cells that have a value."""
    steps = [TRANSFORMS[transform] for transform in transforms]
    for step in steps if conversion is None else [*steps, conversion]:
        cells = convert_some(cells, _has_value(cells), step)
    return cells


def split_left_out(values: pl.Series) -> tuple[pl.Series, pl.Series | None]:
    """Return the values with '' for what is left out, and the reasons, null where there is none; None: all are null."""
    left_out = ~_has_value(values) & (values != "")
    if not left_out.any():
        return values, None
    reasons = values.str.slice(len(LEFT_OUT)).set(~left_out, None)
    return values.set(left_out, ""), reasons


def left_out_by_param(counts: LeftOutCounts) -> dict[str, dict[str, int]]:
    """Return the counts by param, the most frequent reason first."""
    by_param: dict[str, dict[str, int]] = {}
    for (param, kind), count in sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0][1])):
        by_param.setdefault(param, {})[kind] = count
    return by_param


def format_left_out(by_param: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Yield a line for each param, such as `company: 7 free mail, 3 two addresses`."""
    for param, counts in by_param.items():
        yield f"{param}: {', '.join(f'{count:,} {kind}' for kind, count in counts.items())}"


#: Characters that JSON escapes.
_NEEDS_ESCAPING = r'["\\\x00-\x1f]'

#: Why a row is filtered, where the job's expressions are not the reason.
SUPPRESSED_REASON = "on a suppression list"
FORGOTTEN_REASON = "erased by `enrich forget`"


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
            kept_columns(frame),
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
