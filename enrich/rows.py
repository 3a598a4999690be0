"""The input as batches of rows, each with the question it asks; read alike for asking and for joining."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import polars as pl

from enrich.asking import CHANGE_COLUMNS, OUR_COLUMNS, Asking, Batch
from enrich.bounded_read import read_bounded
from enrich.errors import Refused
from enrich.job import Job, nearest
from enrich.order import ranks, sort_keys
from enrich.privacy import LONGEST_LIST, Forgotten, read_suppression
from enrich.question import Question
from enrich.tables.cells import text_frame
from enrich.tables.csvfile import likely_separator
from enrich.tables.parts import Block, Part, Stretch
from enrich.tables.reading import Shape
from enrich.tables.source import Counting, Source
from enrich.where import EXAMPLE, ONE_ROW, compares_rows, compute, why_not

_MISSING_COLUMN = re.compile(r'unable to find column "(.*)"; valid columns')


class Rows:
    """The rows of a job's input."""

    def __init__(self, job: Job, forgotten: Forgotten | None = None) -> None:
        """Read the header and check the job against it.

        Raises Refused when the input can't be read, JobError when the job names what it lacks.
        """
        self._job = job
        self._forgotten = forgotten or Forgotten(b"")
        suppress = job.model.suppress
        self._suppression = None if suppress is None else read_suppression(job.path(suppress))
        self._source: Source | Stretch | Block = Source(job.input_path, job.input)
        #: All columns that can be named, with their types.
        self.known = self._source.schema
        self._header = list(self.known)
        #: The columns that are written back; a blank of text is `""` or null.
        self.schema = {name: kind for name, kind in self.known.items() if name not in OUR_COLUMNS}
        self.columns = list(self.schema)
        self._check_columns()
        self._check_where()

    def undivided(self) -> str | None:
        """Say why what is asked depends on all rows, so that no part can be asked by itself; None: it doesn't.

        `dedupe: false` holds for collecting, too; the order only for asking.
        """
        if not self._job.model.dedupe:
            return "`dedupe: false` counts equal rows from the first to the last"
        if self._job.model.order_by is not None:
            return "`order_by` compares all rows"
        return None

    def parts(self, counting: Counting | None = None) -> list[Part]:
        """Divide the rows; `counting` counts those of files that do not say it themselves. Raises Refused."""
        return self._whole.parts(counting)

    def part(self, part: Part) -> Rows:
        """Return the rows of one part, with their places in the whole; needs nothing but the part's file."""
        return self._over(Stretch(part, self.shape))

    def block(self, first: int, frame: pl.DataFrame) -> Rows:
        """Return rows that were read already, the first of which has this place in the whole."""
        return self._over(Block(first, frame))

    @property
    def shape(self) -> Shape:
        """What the files are read as."""
        return self._whole.shape

    @property
    def _whole(self) -> Source:
        assert isinstance(self._source, Source)  # noqa: S101 - what is asked of a part is an error of ours
        return self._source

    @property
    def first(self) -> int:
        """The place of the first row in the whole."""
        return self._source.first

    def sample(self) -> Rows:
        """Return no rows of it, to be sent where blocks are read."""
        return self.block(0, pl.DataFrame(schema=self.known))

    def _over(self, source: Stretch | Block) -> Rows:
        rows = copy(self)
        rows._source = source  # noqa: SLF001 - that of our own copy
        return rows

    def stamp(self) -> object:
        """Identity of the input's files: one was replaced, changed, added or is gone when this differs."""
        return self._whole.stamp()

    def digest(self) -> str:
        """Hash the bytes of the input's files (SHA-256, hex)."""
        return self._whole.digest()

    def suppressed_digest(self) -> str | None:
        """Hash the bytes of the list of `suppress` (SHA-256, hex); None: there is none."""
        suppress = self._job.model.suppress
        return None if suppress is None else _digest(self._job.path(suppress))

    def check_new_columns(self, question: Question) -> None:
        """Refuse new columns that the input has already."""
        for name in question.columns:
            if name in OUR_COLUMNS:
                raise self._job.error(["columns", name], "this name is taken by the status columns", "choose another")
            if name in self.columns and self._job.model.merge is None:
                raise self._job.error(
                    ["columns", name],
                    f"the input has a column of this name already ({self._job.input_path})",
                    "choose another name for the new column, or complete the old one: merge: fill_empty",
                )

    def order(self) -> pl.Series | None:
        """Read the input once to give each row its place in the order of asking; None: the input's order."""
        if self._job.model.order_by is None:
            return None
        places = list(map(self._header.index, self._job.model.order_by))
        keys = [sort_keys(text_frame(frame), places) for frame in self._source.batches()]
        return ranks(pl.concat(keys)) if keys else None

    def batches(self, question: Question, order: pl.Series | None = None) -> Iterator[Batch]:
        """Read the whole input once. Raises Refused that names file, row and remedy."""
        ask = Asking(self._job, question, self._header, self._forgotten)
        kept = [place for place, name in enumerate(self._header) if name in self.schema]
        first = self._source.first
        for frame in self._source.batches():
            text = text_frame(frame)
            places = None
            if order is not None:
                known = order.slice(first, frame.height).to_list()
                # The file may have grown since its order was read.
                places = [*known, *range(first + len(known), first + frame.height)]
            batch = ask.batch(first, text, self._wanted(text), self._suppressed(text), places)
            yield batch if text is frame else replace(batch, frame=frame.select(pl.nth(kept)))
            first += frame.height

    @property
    def key(self) -> list[str]:
        """The columns that tell in the change feed which lead; default: those that are asked with."""
        model = self._job.model
        if model.changes is not None and model.changes.key is not None:
            return model.changes.key
        return list(dict.fromkeys(column for param in model.params.values() for column in param.columns))

    def _check_columns(self) -> None:
        model = self._job.model
        for name, param in model.params.items():
            for column in param.columns:
                self._check_column(column, ["params", name])
        for index, column in enumerate(model.only_if_empty):
            self._check_column(column, ["only_if_empty", index])
        for index, column in enumerate(model.order_by or ()):
            self._check_column(column, ["order_by", index])
        for index, column in enumerate(self.key if model.changes is not None else ()):
            self._check_column(column, ["changes", "key", index])
            if column in CHANGE_COLUMNS:
                hint = "choose other columns as its `key`, or rename it"
                raise self._job.error(["changes"], f"the feed has a column `{column}` of its own", hint)
        for index, column in enumerate(model.report.by if model.report is not None else ()):
            self._check_column(column, ["report", "by", index])
            if column in OUR_COLUMNS:
                message = f"`{column}` is a column of the output, and every run writes it anew"
                raise self._job.error(["report", "by", index], message, "group by a column of your own")
        if model.caps is not None and model.caps.by not in model.params:
            self._check_column(model.caps.by, ["caps", "by"], also=model.params)

    def _check_column(self, column: str, where: list[str | int], also: Iterable[str] = ()) -> None:
        if column in self._header:
            return
        hint = nearest(column, [*self._header, *also])
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
        if (problem := why_not(where)) is not None:
            raise self._job.error(["where"], problem, EXAMPLE)
        try:
            answer = compute(where, pl.DataFrame(schema=dict.fromkeys(self._header, pl.String)))
        except pl.exceptions.PolarsError as error:
            reason = str(error).splitlines()[0]
            if missing := _MISSING_COLUMN.match(reason):
                self._check_column(missing[1], ["where"])
            raise self._job.error(["where"], f"not a polars SQL expression over the columns: {reason}") from error
        if answer.schema != {"wanted": pl.Boolean} or answer.height or compares_rows(where, self._header):
            raise self._job.error(["where"], ONE_ROW, EXAMPLE)

    def _suppressed(self, frame: pl.DataFrame) -> pl.Series | None:
        if self._suppression is None:
            return None
        params = self._job.model.params.values()
        if any(param.value is not None and self._suppression.lists(param.value) for param in params):
            return pl.repeat(value=True, n=frame.height, eager=True)
        return self._suppression.hits(frame, {self._header.index(name) for param in params for name in param.columns})

    def _wanted(self, frame: pl.DataFrame) -> pl.Series:
        """Tell which rows `where` and `only_if_empty` leave in."""
        places = map(self._header.index, self._job.model.only_if_empty)
        blank = [pl.nth(place).str.strip_chars() == "" for place in places]
        wanted = frame.select(pl.all_horizontal(pl.repeat(value=True, n=pl.len()), *blank).alias("wanted")).to_series()
        if self._job.model.where is None:
            return wanted
        try:
            return wanted & compute(self._job.model.where, frame).to_series().fill_null(value=False)
        except pl.exceptions.PolarsError as error:
            reason = str(error).splitlines()[0].split(" for ")[0]
            hint = "cells are text and may be blank: TRY_CAST(… AS INT) gives null where CAST fails"
            raise self._job.error(["where"], f"cannot be computed: {reason}", hint) from error


def _digest(path: Path) -> str:
    try:
        return sha256(read_bounded(path, LONGEST_LIST)).hexdigest()
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error
