"""The input as batches of rows, each with the question it asks; read alike for asking and for joining."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b

import polars as pl

from enrich.job import Job, nearest
from enrich.model import RowStatus
from enrich.question import Question
from enrich.spec import Param
from enrich.tables.cells import text_frame
from enrich.tables.csvfile import likely_separator
from enrich.tables.source import Source

#: The columns that we add behind the job's own; an earlier output's are replaced.
STATUS_COLUMNS: dict[str, pl.DataType] = {
    "enrich_status": pl.String(),
    "enrich_error": pl.String(),
    "enrich_provider": pl.String(),
    "enrich_credits": pl.Float64(),
    "enrich_task_id": pl.String(),
    "enrich_at": pl.String(),
}

#: What looks at other rows of a table than one's own; in quotes it is text or a column.
_OTHER_ROWS = re.compile(r"\b(over|select)\b", re.IGNORECASE)
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_MISSING_COLUMN = re.compile(r'unable to find column "(.*)"; valid columns')


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows in the input's order. `first` is the position of the first, from 0.

    `frame` has the input's columns in their types, as they are written back. The lists run along it: a row either
    has a fingerprint and params (JSON, as sent), or a status (`invalid`, `filtered`) and perhaps the reason.
    """

    first: int
    frame: pl.DataFrame
    fingerprints: list[bytes | None]
    params: list[str | None]
    statuses: list[RowStatus | None]
    errors: list[str | None]

    def asked(self) -> Iterator[tuple[int, bytes, str]]:
        """Yield position, fingerprint and params of the rows that ask something."""
        for index, (fingerprint, params) in enumerate(zip(self.fingerprints, self.params, strict=True)):
            if fingerprint is not None and params is not None:
                yield self.first + index, fingerprint, params


class Rows:
    """The rows of a job's input."""

    def __init__(self, job: Job) -> None:
        """Read the header and check the job against it.

        Raises Refused when the input can't be read, JobError when the job names what it lacks.
        """
        self._job = job
        self._source = Source(job.input_path, job.input)
        self._header = list(self._source.schema)
        #: The columns that are written back, with their types; a blank of text is `""` or null.
        self.schema = {name: kind for name, kind in self._source.schema.items() if name not in STATUS_COLUMNS}
        self.columns = list(self.schema)
        self._check_columns()
        self._check_where()

    def stamp(self) -> object:
        """Identity of the input's files: one was replaced, changed or added when this differs. None: it is gone."""
        return self._source.stamp()

    def check_new_columns(self, question: Question) -> None:
        """Refuse new columns that the input has already."""
        for name in question.columns:
            if name in STATUS_COLUMNS:
                raise self._job.error(["columns", name], "this name is taken by the status columns", "choose another")
            if name in self.columns:
                raise self._job.error(
                    ["columns", name],
                    f"the input has a column of this name already ({self._job.input_path})",
                    "choose another name for the new column",
                )

    def batches(self, question: Question) -> Iterator[Batch]:
        """Read the whole input once. Raises Refused that names file, row and remedy."""
        ask = _Asking(self._job, question, self._header)
        kept = [place for place, name in enumerate(self._header) if name in self.schema]
        first = 0
        for frame in self._source.batches():
            text = text_frame(frame)
            batch = ask.batch(first, text, self._wanted(text))
            yield batch if text is frame else replace(batch, frame=frame.select(pl.nth(kept)))
            first += frame.height

    def _check_columns(self) -> None:
        model = self._job.model
        for name, param in model.params.items():
            for column in param.columns:
                self._check_column(column, ["params", name])
        for index, column in enumerate(model.only_if_empty):
            self._check_column(column, ["only_if_empty", index])

    def _check_column(self, column: str, where: list[str | int]) -> None:
        if column in self._header:
            return
        hint = nearest(column, self._header)
        written = self._job.input
        if written.format == "csv" and (other := likely_separator(self._header, written.separator)):
            shown = {"\t": '"\\t"'}.get(other, f'"{other}"')
            hint = f"its header looks separated by {shown}: input: {{path: …, separator: {shown}}}"
        raise self._job.error(where, f"the input has no column `{column}` ({self._job.input_path})", hint)

    def _check_where(self) -> None:
        """Try `where` on no rows; it must look at one row at a time, for rows come in batches."""
        where = self._job.model.where
        if where is None:
            return
        lonely = "must say yes or no for each row by itself", "for example: Country = 'DE'"
        if _OTHER_ROWS.search(_QUOTED.sub("", where)):
            raise self._job.error(["where"], *lonely)
        try:
            answer = _select(where, pl.DataFrame(schema=dict.fromkeys(self._header, pl.String)))
        except pl.exceptions.PolarsError as error:
            reason = str(error).splitlines()[0]
            if missing := _MISSING_COLUMN.match(reason):
                self._check_column(missing[1], ["where"])
            raise self._job.error(["where"], f"not a polars SQL expression over the columns: {reason}") from error
        if answer.schema != {"wanted": pl.Boolean} or answer.height:
            raise self._job.error(["where"], *lonely)

    def _wanted(self, frame: pl.DataFrame) -> pl.Series:
        """Tell which rows `where` and `only_if_empty` leave in."""
        places = map(self._header.index, self._job.model.only_if_empty)
        blank = [pl.nth(place).str.strip_chars() == "" for place in places]
        wanted = frame.select(pl.all_horizontal(pl.repeat(value=True, n=pl.len()), *blank).alias("wanted")).to_series()
        if self._job.model.where is None:
            return wanted
        try:
            return wanted & _select(self._job.model.where, frame).to_series().fill_null(value=False)
        except pl.exceptions.PolarsError as error:
            reason = str(error).splitlines()[0].split(" for ")[0]
            hint = "cells are text and may be blank: TRY_CAST(… AS INT) gives null where CAST fails"
            raise self._job.error(["where"], f"cannot be computed: {reason}", hint) from error


def _select(where: str, frame: pl.DataFrame) -> pl.DataFrame:
    """Compute `where`; the line break ends a comment."""
    return frame.sql(f"SELECT ({where}\n) AS wanted FROM leads", table_name="leads")  # noqa: S608 - over this frame only


class _Asking:
    """Maps rows to questions; remembers the occurrences that `dedupe: false` tells apart."""

    def __init__(self, job: Job, question: Question, header: list[str]) -> None:
        self._params = job.model.params
        self._question = question
        self._occurrences: Counter[bytes] | None = None if job.model.dedupe else Counter()
        call = json.dumps([1, "run", question.call.waterfall, question.call.body()], sort_keys=True)
        self._prefix = blake2b(call.encode(), digest_size=16, person=b"enrich-request")
        self._names = sorted(self._params)
        # Named by number, so that no param is in the way of another column.
        self._values = [source(self._params[name], header).alias(str(i)) for i, name in enumerate(self._names)]
        self._kept = [place for place, name in enumerate(header) if name not in STATUS_COLUMNS]

    def batch(self, first: int, frame: pl.DataFrame, wanted: pl.Series) -> Batch:
        batch = Batch(first, frame.select(pl.nth(self._kept)), [], [], [], [])
        values = frame.select(*self._values, pl.lit(wanted).alias("wanted"))
        for *row, keep in values.iter_rows():
            params = {name: value for name, value in zip(self._names, row, strict=True) if value}
            error = self._problem(params) if keep else None
            status = RowStatus.FILTERED if not keep else RowStatus.INVALID if error else None
            text = None
            fingerprint = None
            if status is None:
                text = json.dumps(params, ensure_ascii=False, separators=(",", ":"))
                fingerprint = self._fingerprint(text)
            batch.fingerprints.append(fingerprint)
            batch.params.append(text)
            batch.statuses.append(status)
            batch.errors.append(error)
        return batch

    def _problem(self, params: dict[str, str]) -> str | None:
        """Say why a row cannot be asked."""
        for name in self._question.required:
            if name not in params:
                return f"{name} is empty ({self._sources(name)})"
        for name in filter(params.get, self._question.emails):
            local, at, domain = params[name].partition("@")
            if not (local and at and "." in domain) or "@" in domain or any(map(str.isspace, params[name])):
                return f"{name} is no e-mail address ({self._sources(name)})"
        return None if params else "no param has a value"

    def _sources(self, name: str) -> str:
        return ", ".join(self._params[name].columns) or "a constant"

    def _fingerprint(self, params: str) -> bytes:
        """Name a request by what is sent; stable over versions, machines and the job file's order of params."""
        digest = self._prefix.copy()
        digest.update(b"\0" + params.encode())
        shared = digest.digest()
        if self._occurrences is None:
            return shared
        occurrence = self._occurrences[shared]
        self._occurrences[shared] += 1
        if occurrence:
            digest.update(b"\0%d" % occurrence)
        return digest.digest()


def source(param: Param, header: list[str]) -> pl.Expr:
    """Compute a param: NFC, without outer blanks; '' where nothing is to be sent.

    Columns are taken by their place: polars would read a name like `^x$` as a pattern.
    """
    if param.value is not None:
        return clean(pl.lit(param.value))
    candidates = []
    for column in param.columns:
        value = pl.nth(header.index(column))
        for transform in param.transform:
            value = TRANSFORMS[transform](value)
        value = clean(value)
        candidates.append(pl.when(value != "").then(value))
    return pl.coalesce([*candidates, pl.lit("")])


def clean(text: pl.Expr) -> pl.Expr:
    """Normalise (Unicode NFC) and cut outer blanks."""
    return text.str.normalize("NFC").str.strip_chars()


def domain(text: pl.Expr) -> pl.Expr:
    """Take the domain of a URL, an e-mail address or a bare host, without `www.`; '' when there is none."""
    return (
        text.str.strip_chars()
        .str.to_lowercase()
        .str.replace(r"^([a-z][a-z0-9+.-]*://|//|mailto:)", "")
        .str.replace(r"(?s)[/?#].*$", "")
        .str.replace(r"^.*@", "")
        .str.replace(r":\d*$", "")
        .str.replace(r"\.$", "")
        .str.replace(r"^www\.(.*\.)", "${1}")
        # No top-level domain is a number: what ends in one is a date, an amount or an IP address.
        .str.extract(r"^((?:[\p{L}\p{M}\p{N}_-]+\.)+[\p{L}\p{M}\p{N}-]*\p{L}[\p{L}\p{M}\p{N}-]*)$")
        .fill_null("")
    )


TRANSFORMS = {
    "trim": lambda text: text.str.strip_chars(),
    "lower": lambda text: text.str.to_lowercase(),
    "domain": domain,
}
